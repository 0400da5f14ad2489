"""Text from the Hugging Face hub, streamed once and then kept in a cache folder.

| domain | data set | licence |
|---|---|---|
| wikitext | `Salesforce/wikitext`, wikitext-103-raw-v1 (Merity et al. 2016) | CC BY-SA 3.0, GFDL |
| code | `codeparrot/codeparrot-clean-valid`: Python files from GitHub | each file's own; only \
files under permissive licences are taken |
| arxiv | `gfissore/arxiv-abstracts-2021`: abstracts (Clement et al. 2019) | CC0 1.0 |

None of them needs a login or runs a loading script. What is read lies in `~/.cache/k1/hub`
(`$K1_CACHE/hub` if that is set) in the layout of a data folder.
"""

import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k1.data.documents import Document, Splits, one_document
from k1.data.folder import SPLITS, read_folder
from k1.data.pools import HELD_OUT_FLOOR
from k1.errors import DataError

Rows = Iterable[Mapping[str, Any]]

REMEDY = "connect to the network, or pass --data builtin or a folder"
CONNECT_SECONDS = 5.0
HELD_OUT_SHARE = 0.08
PERMISSIVE = frozenset(
    ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0")
)


@dataclass(frozen=True)
class HubText:
    """One domain on the hub."""

    domain: str
    dataset: str
    name: str | None
    """The data set's configuration."""
    revision: str | None
    """The commit, where it is known to have what is needed."""
    documents: Callable[[Rows], Iterator[tuple[str, str]]]
    """Makes texts of rows, each with a name by which it is put into a split."""
    has_splits: bool
    """Whether it comes split already; otherwise the names decide."""


def _articles(rows: Rows) -> Iterator[tuple[str, str]]:
    """Join WikiText's lines to articles: each starts with a title between single `=`."""
    lines: list[str] = []
    for row in rows:
        line = str(row["text"])
        if lines and re.fullmatch(r"\s*= [^=]+ =\s*", line):
            yield lines[0], "".join(lines)
            lines = []
        if line.strip():
            lines.append(line if line.endswith("\n") else line + "\n")
    if lines:
        yield lines[0], "".join(lines)


def _files(rows: Rows) -> Iterator[tuple[str, str]]:
    """Take permissively licensed files; those of one repository go to the same split."""
    for row in rows:
        if str(row["license"]).lower() in PERMISSIVE:
            yield str(row["repo_name"]), str(row["content"])


def _abstracts(rows: Rows) -> Iterator[tuple[str, str]]:
    for row in rows:
        # An abstract is one paragraph; its line breaks are those of a submission form.
        yield str(row["id"]), " ".join(str(row["abstract"]).split())


TEXTS = (
    HubText(
        "wikitext",
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        _articles,
        has_splits=True,
    ),
    HubText("code", "codeparrot/codeparrot-clean-valid", None, None, _files, has_splits=False),
    HubText(
        "arxiv",
        "gfissore/arxiv-abstracts-2021",
        None,
        "783a340c8a8519e7325f0391e751ca0b238e5ca5",
        _abstracts,
        has_splits=False,
    ),
)


def read_hub(max_bytes: int) -> dict[str, Splits]:
    """Return the text of the hub's domains, from the cache if it is there.

    Args:
        max_bytes: Training text to fetch per domain; held-out text comes in proportion.

    Raises:
        DataError: The hub cannot be reached or does not hold what is expected.
    """
    recipe = repr([(text.dataset, text.name, text.revision) for text in TEXTS])
    name = f"{max_bytes}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    folder = _cache() / "hub" / name
    if not folder.exists():
        _fetch(folder, max_bytes)
    return read_folder(folder)


def _cache() -> Path:
    chosen = os.environ.get("K1_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "k1"


def _fetch(folder: Path, max_bytes: int) -> None:
    """Write all domains to a temporary folder and rename it, so that a folder is whole."""
    _check_connection()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f'cannot write to the cache "{folder.parent}" ({error.strerror}); '
            "set K1_CACHE to a folder that can be written"
        ) from error
    try:
        for text in TEXTS:
            for split, documents in _stream(text, max_bytes).items():
                _write(temporary / text.domain / f"{split}.txt", documents)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
    except OSError as error:
        raise DataError(f'cannot write the cache "{folder}" ({error}); free some space') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_connection() -> None:
    """Fail within seconds where there is no network: the hub's client retries for much longer."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(endpoint, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()  # whatever it says, the hub can be reached
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"cannot reach {endpoint} ({reason}); {REMEDY}") from error


def _stream(text: HubText, max_bytes: int) -> dict[str, list[Document]]:
    held_out = max(HELD_OUT_FLOOR, int(HELD_OUT_SHARE * max_bytes))
    budget = {"train": max_bytes, "validation": held_out, "test": held_out}
    found: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for source in SPLITS if text.has_splits else ("train",):
        wanted = {source} if text.has_splits else set(SPLITS)
        for name, content in text.documents(_rows(text, source)):
            split = source if text.has_splits else _split_of(name)
            document = one_document(content)
            if document.text and split in wanted:
                found[split].append(document)
                budget[split] -= document.size
                if budget[split] <= 0:
                    wanted.remove(split)
            if not wanted:
                break
    for split, documents in found.items():
        if not documents:
            raise DataError(
                f'"{text.dataset}" on the hub holds no {split} text; '
                "pass --data builtin or a folder"
            )
    return found


def _split_of(name: str) -> str:
    share = hashlib.sha256(name.encode()).digest()[0] / 256
    if share < HELD_OUT_SHARE:
        return "test"
    return "validation" if share < 2 * HELD_OUT_SHARE else "train"


def _rows(text: HubText, split: str) -> Iterator[Mapping[str, Any]]:
    """Stream the rows of a split; whatever goes wrong there, the remedy is the same."""
    try:
        import datasets

        yield from datasets.load_dataset(
            text.dataset, text.name, split=split, revision=text.revision, streaming=True
        )
    except Exception as error:  # the libraries below raise all kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f'cannot stream "{text.dataset}" from the hub ({reason}); {REMEDY}'
        ) from error


def _write(path: Path, documents: list[Document]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write("\n\n".join(document.text for document in documents).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
