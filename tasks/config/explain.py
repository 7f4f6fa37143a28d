"""Explains all keys: as comments in a YAML file, and as the page `flows/configuration.md`, which this module prints."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from tasks.config.keys import Key, Section, sections_of, users_of_options
from tasks.config.retention import RetentionConfig
from tasks.config.run import RunConfig

COMMENT_CHARACTERS = 100  # of a line of comment
PAGE = """\
<!-- Generated: `.venv/bin/python -m tasks.config.explain > flows/configuration.md` -->
# Configuration

Every key of `convoy train`, `convoy resume` and deployments, with its default and its values; `null` means unset. The
sentences are the docstrings of the fields in `cnn/config` and `tasks/config`. `--set KEY=VALUE` sets a key, and
`--config FILE` reads a YAML file of keys; [`flows/README.md`](README.md#train) says which wins.

```
convoy config --explain > recipe.yaml            # the configuration with the sentences below, as a file for --config
convoy config --schema > convoy.schema.json      # JSON schema, for editors and CI
```

An editor with a YAML language server completes and checks keys if the file begins with
`# yaml-language-server: $schema=convoy.schema.json`.
"""


def explained(config: RunConfig) -> str:
    """Returns a configuration as YAML for `--config`; comments give each key's sentence, default and values."""
    values = config.resolved()
    lines: list[str] = []
    for section in sections_of(RunConfig, config.model):
        lines += [*_comment(section.text), ""]
        if section.name:
            lines[-1:] = [f"{section.name}:" + ("" if section.keys else " {}")]
        for key in section.keys:
            last = key.name.removeprefix(f"{section.name}.")
            value = (values[section.name] if section.name else values)[last]
            comment = _comment(key.text, f"Default: {_yaml(key.default)}; values: {key.values}")
            indent = "  " if section.name else ""
            lines += [*(indent + line for line in (*comment, f"{last}: {_yaml(value)}")), ""]
    return "\n".join(lines).rstrip()


def _comment(*texts: str) -> Iterator[str]:
    for paragraph in (paragraph for text in texts for paragraph in text.split("\n\n")):
        yield from textwrap.wrap(paragraph, COMMENT_CHARACTERS, initial_indent="# ", subsequent_indent="# ")


def _yaml(value: Any) -> str:
    """Returns a value in one line of YAML."""
    listed = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf"))
    return listed.strip()[1:-1]


def reference_page() -> str:
    """Returns the page about all keys, in Markdown."""
    top, *sections = sections_of(RunConfig)
    parts = [PAGE, *_table(top, "Top level")]
    for section in sections:
        if section.name == "network":
            for first, *more in users_of_options().values():
                (options,) = (each for each in sections_of(RunConfig, first) if each.name == "network")
                parts += _table(options, f"`network` of `{first}`" + (f" and {len(more)} more" if more else ""))
        else:
            parts += _table(section, f"`{section.name}`")
    (retention,) = sections_of(RetentionConfig)
    return "\n".join([*parts, *_table(retention, "Keys of `convoy prune`")]).rstrip()


def _table(section: Section, title: str) -> Iterator[str]:
    yield f"## {title}\n\n{section.text}\n"
    if section.keys:
        yield "| key | meaning | default | values |\n|---|---|---|---|"
        yield from map(_row, section.keys)
    yield ""


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.text, f"`{_yaml(key.default)}`", key.values)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    print(reference_page())
