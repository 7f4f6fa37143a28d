"""Names of models and experiments, made from names of folders and files."""

import hashlib
import re
import unicodedata


def slug(name: str) -> str:
    """Returns a valid name for runs and models (which must not hold `/` or `:`), in lower case, of `a-z 0-9 - _ .`.

    Accents are dropped. If other letters or symbols are lost, a short digest of the whole name is appended, so that two
    such names never share a model.
    """
    spelt = unicodedata.normalize("NFKD", name)
    plain = spelt.encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9_.]+", "-", plain).strip("-.") or "dataset"
    if any(not c.isascii() and unicodedata.category(c)[0] in "LNS" for c in spelt):
        plain += "-" + hashlib.sha256(spelt.encode(errors="backslashreplace")).hexdigest()[:8]
    return plain
