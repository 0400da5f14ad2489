"""Real text that every installation of K-1 has already: three domains, no network.

- `code`: the standard library's source, without docstrings and licence headers.
- `prose`: running English from the language reference that `help()` shows, the documentation
  in the standard library and in general-purpose dependencies, package descriptions, licences.
- `science`: documentation of NumPy, SciPy, SymPy, NetworkX and mpmath, with its parameters,
  formulas, examples and references.

A document is the text of one file (one topic of the language reference), so that held-out text
never comes from a file that was trained on. Nothing is imported or run: files are only parsed.
Licences: Python's is PSF-2.0; each package keeps its own, as named in its metadata.
"""

import gc
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator
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

HELD_OUT_SHARE = 0.08
"""Of all bytes of a domain; validation and test get this much each."""

MOST_OF_A_DOMAIN = 1 / 20
"""Documents that would be more of a domain than this are left out: pools hold whole ones."""

LEAST_BYTES = 300_000
"""A domain with less text than this, though more was asked for, is not worth training on."""


def read_builtin(max_bytes: int) -> dict[str, Splits]:
    """Find and split the text of the three domains.

    The same installation always gives the same documents in the same order.

    Args:
        max_bytes: Reading stops when a domain has this much and its held-out share.

    Raises:
        DataError: A domain has too little text here.
    """
    return {domain: dict(splits) for domain, splits in _read_cached(max_bytes).items()}


@lru_cache(maxsize=2)  # an environment per lane reads the same text again and again
def _read_cached(max_bytes: int) -> dict[str, Splits]:
    wanted = max_bytes + 2 * max(HELD_OUT_FLOOR, int(max_bytes * HELD_OUT_SHARE * 1.2))
    with _no_garbage_collection():
        readers = {"code": _code(), "prose": _prose(), "science": _science()}
        return {domain: _split(domain, readers[domain], wanted) for domain in readers}


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
    for path in _shuffled(_standard_library()):
        source = _parsed(path)
        if source:
            yield one_document(source.code)


def _science() -> Iterator[Document]:
    seen: set[str] = set()
    paths = chain(
        _shuffled(_package_files(SCIENCE_PACKAGES)), _shuffled(_package_files(MORE_SCIENCE))
    )
    for path in paths:
        source = _parsed(path)
        if source:
            new = [text for text in dict.fromkeys(source.docstrings) if text not in seen]
            seen.update(new)
            yield one_document("\n".join(new))


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
    return _python_files("stdlib", Path(sysconfig.get_path("stdlib")))


def _package_files(packages: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for package in packages:
        folder = _package_folder(package)
        if folder:
            files |= _python_files(package, folder)
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


def _python_files(name: str, root: Path) -> dict[str, Path]:
    """Return the Python files below a folder by a name that doesn't depend on where it lies."""
    files: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in SKIPPED_FOLDERS and "-" not in sub]
        for file in names:
            if file.endswith(".py"):
                path = Path(folder, file)
                files[f"{name}/{path.relative_to(root).as_posix()}"] = path
    return files


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
