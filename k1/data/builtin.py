"""Real text that every installation of K-1 has already: nine domains, no network.

Three are the text named "builtin":

- `code`: the standard library's source, without docstrings and licence headers.
- `prose`: running English from the language reference that `help()` shows, the documentation
  in the standard library and in general-purpose dependencies, package descriptions, licences.
- `science`: documentation of NumPy, SciPy, SymPy, NetworkX and mpmath, with its parameters,
  formulas, examples and references.

"builtin:A,B" names domains, these six among them:

- `numerics`: the source of NumPy and SciPy, without docstrings and licence headers.
- `tables`: documentation of pandas and PyArrow, likewise from docstrings.
- `checks`: unit tests that NumPy, SciPy, SymPy, NetworkX and pandas install with themselves.
- `headers`: the C++ headers of PyTorch and PyArrow, without licence headers.
- `stubs`: type stubs of NumPy, PyTorch and pandas.
- `symbols`: the Unicode database in the standard library, a line for each character.

A document is the text of one file (one topic of the language reference), so that held-out text
never comes from a file that was trained on. Nothing is imported or run: files are only parsed.
Licences: Python's is PSF-2.0; each package keeps its own, as named in its metadata.
"""

import gc
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from k1.data.documents import Document, Splits, one_document
from k1.data.pools import HELD_OUT_FLOOR, carve
from k1.data.prose import Prose, Units, package_texts, reference_topics
from k1.data.python_source import PythonSource, read_python
from k1.errors import DataError

Unit = TypeVar("Unit")

_LICENCE_HEADER = re.compile(r"\A\s*(?://[^\n]*(?:\n\s*//[^\n]*)*|/\*.*?\*/)", re.DOTALL)
"""The first comment of a C++ file. Not all of these are licences, but no code is lost."""

SCIENCE_PACKAGES = ("numpy", "scipy", "networkx", "mpmath")
MORE_SCIENCE = ("sympy",)
"""Read only when the others don't suffice: it takes longest to parse for what it holds."""

PROSE_PACKAGES = (
    "gymnasium",
    "stable_baselines3",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "jinja2",
    "click",
)
TABLE_PACKAGES = ("pandas", "pyarrow")
TESTED_PACKAGES = (*SCIENCE_PACKAGES, *MORE_SCIENCE, "pandas")
HEADER_PACKAGES = ("torch", "pyarrow")
STUB_PACKAGES = ("numpy", "torch", "pandas")

DESCRIBED_PACKAGES = (*SCIENCE_PACKAGES, *MORE_SCIENCE, "torch", "pandas", "pyarrow")
"""Prose gives their descriptions and licences, but none of their documentation."""

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "benchmarks",
    "encodings",
    "pydoc_data",
    "_vendor",
    "_vendored",
    "array_api_extra",
    "config",
    "lib-dynload",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "turtledemo",
}
"""Tests, tables, vendored copies, and what other Python installations lack."""

GENERATED_FOLDERS = {"ops"}
"""PyTorch writes thousands of C++ headers into it that hardly differ."""

CHARACTERS_IN_A_DOCUMENT = 64

HELD_OUT_SHARE = 0.08
"""Of all bytes of a domain; validation and test get this much each."""

MOST_OF_A_DOMAIN = 1 / 20
"""Documents that would be more of a domain than this are left out: pools hold whole ones."""

LEAST_BYTES = 300_000
"""A domain with less text than this, though more was asked for, is not worth training on."""


DEFAULT_DOMAINS = ("code", "prose", "science")
MORE_DOMAINS = ("numerics", "tables", "checks", "headers", "stubs", "symbols")
BUILTIN_DOMAINS = (*DEFAULT_DOMAINS, *MORE_DOMAINS)


def named_domains(source: str) -> tuple[str, ...]:
    """Return the domains that a source "builtin" or "builtin:A,B" names, in its order.

    Raises:
        DataError: There is no such domain, or it is named twice.
    """
    _, colon, names = source.partition(":")
    domains = tuple(names.split(",")) if colon else DEFAULT_DOMAINS
    for name in domains:
        if name not in BUILTIN_DOMAINS or domains.count(name) > 1:
            problem = "is named twice" if name in BUILTIN_DOMAINS else "is none"
            raise DataError(
                f'domain "{name}" {problem} of the builtin data; there are '
                + ", ".join(BUILTIN_DOMAINS)
            )
    return domains


def read_builtin(max_bytes: int, domains: tuple[str, ...] = DEFAULT_DOMAINS) -> dict[str, Splits]:
    """Find and split the text of domains.

    The same installation always gives the same documents in the same order.

    Args:
        max_bytes: Reading stops when a domain has this much and its held-out share.
        domains: Some of `BUILTIN_DOMAINS`.

    Raises:
        DataError: A domain has too little text here.
    """
    return {domain: dict(splits) for domain, splits in _read_cached(max_bytes, domains).items()}


@lru_cache(maxsize=4)  # an environment per lane reads the same text again and again
def _read_cached(max_bytes: int, domains: tuple[str, ...]) -> dict[str, Splits]:
    wanted = max_bytes + 2 * max(HELD_OUT_FLOOR, int(max_bytes * HELD_OUT_SHARE * 1.2))
    readers: dict[str, Callable[[], Iterable[Document]]] = {
        "code": _code,
        "prose": _prose,
        "science": _science,
        "numerics": _numerics,
        "tables": _tables,
        "checks": _checks,
        "headers": _headers,
        "stubs": _stubs,
        "symbols": _symbols,
    }
    with _no_garbage_collection():
        return {domain: _split(domain, readers[domain](), wanted) for domain in domains}


def _split(domain: str, documents: Iterable[Document], wanted: int) -> Splits:
    found: dict[bytes, Document] = {}
    size = 0
    for document in documents:
        if size >= wanted:
            break
        if not document.text or document.size > MOST_OF_A_DOMAIN * wanted:
            continue
        if document.key not in found:
            found[document.key] = document
            size += document.size
    if size < min(LEAST_BYTES, wanted) or len(found) < 4:
        raise DataError(
            f'domain "{domain}" of the builtin data has only {size} bytes in this Python '
            f"installation, {min(LEAST_BYTES, wanted)} are needed; pass a folder of text instead"
        )
    rest = [found[key] for key in sorted(found)]
    target = max(int(HELD_OUT_SHARE * size), min(HELD_OUT_FLOOR, size // 4))
    rest, test = carve(rest, target)
    train, validation = carve(rest, target)
    return {"train": train, "validation": validation, "test": test}


def _code() -> Iterator[Document]:
    return _source_code(_standard_library())


def _source_code(files: dict[str, Path]) -> Iterator[Document]:
    for path in _shuffled(files):
        source = _parsed(path)
        if source:
            yield one_document(source.code)


def _science() -> Iterator[Document]:
    return _documentation(
        chain(_shuffled(_package_files(SCIENCE_PACKAGES)), _shuffled(_package_files(MORE_SCIENCE)))
    )


def _documentation(paths: Iterable[Path]) -> Iterator[Document]:
    seen: set[str] = set()
    for path in paths:
        source = _parsed(path)
        if source:
            new = [text for text in dict.fromkeys(source.docstrings) if text not in seen]
            seen.update(new)
            yield one_document("\n".join(new))


def _numerics() -> Iterator[Document]:
    return _source_code(_package_files(("numpy", "scipy")))


def _tables() -> Iterator[Document]:
    return _documentation(_shuffled(_package_files(TABLE_PACKAGES)))


def _checks() -> Iterator[Document]:
    files = _package_files(TESTED_PACKAGES, skipped=SKIPPED_FOLDERS - {"tests"})
    return _source_code({name: path for name, path in files.items() if "/tests/" in name})


def _headers() -> Iterator[Document]:
    skipped = SKIPPED_FOLDERS | GENERATED_FOLDERS
    for path in _shuffled(_package_files(HEADER_PACKAGES, ".h", skipped)):
        text = _text(path)
        yield one_document(_LICENCE_HEADER.sub("", text, count=1))


def _stubs() -> Iterator[Document]:
    for path in _shuffled(_package_files(STUB_PACKAGES, ".pyi")):
        yield one_document(_text(path))


def _symbols() -> Iterator[Document]:
    """Yield consecutive characters with code point, category and name."""
    starts = range(0, sys.maxunicode + 1, CHARACTERS_IN_A_DOCUMENT)
    for start in _shuffled({f"U+{start:04X}": start for start in starts}):
        lines = []
        for code in range(start, start + CHARACTERS_IN_A_DOCUMENT):
            name = unicodedata.name(chr(code), "")
            # Names such as CJK UNIFIED IDEOGRAPH-4E00 say nothing but the code point.
            if name and not name.endswith(f"-{code:04X}") and not name.startswith("HANGUL SYL"):
                lines.append(f"U+{code:04X} {unicodedata.category(chr(code))} {name}")
        yield Document("\n".join(lines))


def _prose() -> Iterator[Document]:
    """Yield prose in shuffled order, so that a small amount is a sample of all kinds."""
    files = {**_standard_library(), **_package_files(PROSE_PACKAGES)}
    units: Units = {name: partial(_docstrings, path) for name, path in files.items()}
    units |= reference_topics(Path(sysconfig.get_path("stdlib")))
    for folder in _site_folders():
        units |= package_texts(folder, (*PROSE_PACKAGES, *DESCRIBED_PACKAGES))
    prose = Prose()
    for read in _shuffled(units):
        yield Document(prose.of(read()))


def _docstrings(path: Path) -> tuple[str, ...]:
    source = _parsed(path)
    return source.docstrings if source else ()


def _shuffled(units: dict[str, Unit]) -> Iterator[Unit]:
    """Yield units in an order that mixes their kinds and depends on their names alone."""
    for name in sorted(units, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield units[name]


def _standard_library() -> dict[str, Path]:
    return _files("stdlib", Path(sysconfig.get_path("stdlib")))


def _package_files(
    packages: tuple[str, ...], suffix: str = ".py", skipped: Set[str] = SKIPPED_FOLDERS
) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for package in packages:
        folder = _package_folder(package)
        if folder:
            files |= _files(package, folder, suffix, skipped)
    return files


def _package_folder(package: str) -> Path | None:
    """Find a top-level package without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    # Without an origin it is no package but a folder that happens to have its name.
    return Path(spec.origin).parent if spec and spec.origin else None


def _site_folders() -> list[Path]:
    folders = map(_package_folder, (*PROSE_PACKAGES, *DESCRIBED_PACKAGES))
    return list(dict.fromkeys(folder.parent for folder in folders if folder))


def _files(
    name: str, root: Path, suffix: str = ".py", skipped: Set[str] = SKIPPED_FOLDERS
) -> dict[str, Path]:
    """Return the files of a kind below a folder by a name that doesn't depend on where it lies."""
    files: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in skipped and "-" not in sub]
        for file in names:
            if file.endswith(suffix):
                path = Path(folder, file)
                files[f"{name}/{path.relative_to(root).as_posix()}"] = path
    return files


def _text(path: Path) -> str:
    """Return a file's text; nothing if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except (OSError, ValueError):
        return ""


@cache
def _parsed(path: Path) -> PythonSource | None:
    try:
        source = path.read_bytes()
    except OSError:
        return None
    return read_python(source)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Halve the time that parsing takes: syntax trees hold no cycles but many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _parsed.cache_clear()
        if enabled:
            gc.enable()
