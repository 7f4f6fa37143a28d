"""Makes HTML pages that need no other file and run no script."""

import base64
from html import escape
from io import BytesIO

from markdown_it import MarkdownIt
from PIL import Image

STYLE = """
body { max-width: 62rem; margin: 1rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b2a41 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .75rem; border-bottom: 1px solid #dde3ea }
th { text-align: left } h2 { margin-top: 3rem; border-bottom: 2px solid #2f6db5 } img { max-width: 100% }
code { background: #f1f4f8; padding: 0 .25rem } figure { margin: 1rem 0 }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt } h1, h2 { break-after: avoid }
  figure, img, tr, section { break-inside: avoid } * { print-color-adjust: exact }
  img { max-height: 24cm } @page { margin: 1.5cm }
}
"""


def document(title: str, body: str, style: str = "") -> str:
    """Returns a page.

    Args:
        title: text.
        body, style: HTML and CSS; the style comes before the common one.
    """
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}{STYLE}</style>{body}</html>"
    )


def rendered(markdown: str) -> str:
    """Returns Markdown as HTML, in which HTML of the Markdown is text."""
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))


def webp(picture: Image.Image) -> str:
    """Returns a picture as a `data:` address of a WebP file, which takes a fifth of the bytes of a photograph's PNG."""
    encoded = BytesIO()
    picture.convert("RGB").save(encoded, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
