"""Python source without running it: its code without docstrings, and its docstrings."""

import ast
import warnings
from collections.abc import Iterator
from typing import NamedTuple

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonSource(NamedTuple):
    """One Python file, parted so that no text is in both parts."""

    code: str
    """The source without the docstrings and without the comments (licences) at its top."""

    docstrings: tuple[str, ...]
    """Docstrings of the module, its classes, methods and functions, in order."""


def read_python(source: bytes) -> PythonSource | None:
    """Part the code of a file from its docstrings; None if it is not UTF-8 or not Python.

    A docstring that is all there is to a body stays in the code, which would be no Python
    without it.
    """
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        with warnings.catch_warnings():
            # Invalid escapes and the like: somebody else's source is not ours to complain about.
            warnings.simplefilter("ignore")
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    lines = text.split("\n")
    docstrings = []
    removed: set[int] = set()
    for owner, node in _docstring_nodes(module):
        span = range(node.lineno - 1, node.end_lineno or node.lineno)
        before = lines[span[0]].encode()[: node.col_offset]
        after = lines[span[-1]].encode()[node.end_col_offset :]
        if len(owner.body) > 1 and not before.strip() and not after.strip():
            removed.update(span)
            docstrings.append(ast.get_docstring(owner) or "")
    code = [line for number, line in enumerate(lines) if number not in removed]
    return PythonSource(_without_header(code), tuple(filter(_is_text, docstrings)))


def _docstring_nodes(
    owner: ast.Module | _Definition,
) -> Iterator[tuple[ast.Module | _Definition, ast.Expr]]:
    """Yield each definition that has a docstring, and the statement that is its docstring."""
    first = owner.body[0] if owner.body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        yield owner, first
    if isinstance(owner, ast.Module | ast.ClassDef):
        for child in owner.body:
            if isinstance(child, _Definition):
                yield from _docstring_nodes(child)


def _without_header(lines: list[str]) -> str:
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith("#")):
        start += 1
    return "\n".join(lines[start:])


def _is_text(docstring: str) -> bool:
    """Tell whether a docstring can be written down: escapes may have made lone surrogates."""
    try:
        docstring.encode()
    except UnicodeEncodeError:
        return False
    return bool(docstring.strip())
