"""Documents: what they look like, when two are the same, and how large they are."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

SEPARATOR = "\n\n"
"""Stands between two documents in the token stream and belongs to the first of them."""


@dataclass(frozen=True)
class Document:
    """One text without blank lines inside, so that a blank line always ends a document."""

    text: str

    @cached_property
    def key(self) -> bytes:
        """Digest by which documents are compared and ordered; case and white space don't count."""
        return hashlib.sha256("".join(self.text.casefold().split()).encode()).digest()

    @cached_property
    def size(self) -> int:
        """UTF-8 bytes, the separator included."""
        return len(self.text.encode()) + len(SEPARATOR)


Splits = dict[str, list[Document]]
"""The documents of one domain by "train", "validation" and "test" (or by pool)."""


def total_size(documents: list[Document]) -> int:
    """Return the UTF-8 bytes of all documents together."""
    return sum(document.size for document in documents)


def non_blank_lines(text: str) -> list[str]:
    """Return the lines of a text that hold something, without white space at their ends."""
    return [line for line in map(str.rstrip, _lines(text)) if line]


def one_document(text: str) -> Document:
    """Make one document of a whole text by dropping its blank lines."""
    return Document("\n".join(non_blank_lines(text)))


def split_documents(text: str) -> Iterator[Document]:
    """Yield the documents of a text in which blank lines separate them."""
    lines: list[str] = []
    for line in map(str.rstrip, _lines(text)):
        if line:
            lines.append(line)
        elif lines:
            yield Document("\n".join(lines))
            lines = []
    if lines:
        yield Document("\n".join(lines))


def _lines(text: str) -> list[str]:
    # Not str.splitlines: it also splits at form feeds and U+2028, which are no line ends here.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
