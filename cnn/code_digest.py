"""Computes a digest of Python code that ignores comments, so that a new comment does not make an old result stale."""

import ast
import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

_parsing = threading.Lock()


def parsed(file: Path) -> ast.Module:
    """Returns a file's syntax tree; from several threads one after another, since Python 3.11's parser needs that.

    Raises:
        SyntaxError: the file is not Python.
    """
    with _parsing:  # else: SystemError, "AST constructor recursion depth mismatch"
        return ast.parse(file.read_bytes(), filename=str(file))


def code_digest(files: Iterable[Path]) -> str:
    """Returns the SHA-256 of the syntax trees of Python files: comments, formatting and docstrings do not count.

    File names relative to the common folder count; the order of the files and the place of the folder do not.

    Raises:
        SyntaxError: a file is not Python.
    """
    paths = sorted(Path(file).resolve() for file in files)
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(root).as_posix()}\n{_canonical(parsed(path))}\n".encode())
    return digest.hexdigest()


def _canonical(node: object) -> str:
    """Returns the tree as text. Unlike `ast.dump`, leaves out empty fields: they differ between Python versions."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node if not _is_docstring(item)) + "]"
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return type(node).__name__ + "(" + ",".join(f"{name}={_canonical(value)}" for name, value in fields) + ")"
    return repr(node)


def _is_docstring(node: object) -> bool:
    """Checks for a string that is a whole statement: a docstring, or the line under an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
