"""The record of a run that cannot be changed without a trace: hash-chained JSON lines.

Each line holds an index, a kind, plain data, the hash of the line before, and its own hash over all
of that. There is no time of day in it, so the same run writes the same bytes again, and a run that
was killed and resumed is held to what it wrote before.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from k1.durable import canonical_json, fsync_folder, parse_json, read_ordinary
from k1.errors import LedgerError

GENESIS = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    index: int
    kind: str
    data: dict[str, Any]
    previous: str
    hash: str


class Ledger:
    """A ledger that a run is writing.

    One process writes at a time; `RunFolder.lock` sees to it. Use `create` or `resume`.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, stored: Sequence[Entry], index: int, size: int) -> None:
        self.path = path
        self._stored = list(stored)
        self._index = index
        self._size = size

    @classmethod
    def create(cls, path: Path) -> Self:
        """Starts an empty ledger.

        Raises:
            LedgerError: The file exists or cannot be created.
        """
        path = Path(path)
        try:
            path.open("xb").close()
            fsync_folder(path.parent)
        except FileExistsError as error:
            raise LedgerError(f"{path} exists; resume that run or choose another folder") from error
        except OSError as error:
            raise LedgerError(
                f"cannot create {path}: {error.strerror or error}; "
                "choose a folder that exists and can be written"
            ) from error
        return cls(path, [], 0, 0)

    @classmethod
    def resume(cls, path: Path, *, index: int, head: str) -> Self:
        """Continues from a checkpoint that was taken after `index` entries.

        What the killed run wrote after the checkpoint stays, and `append` holds the resumed run to
        it. A last line that the crash tore is cut off; the resumed run writes it again.

        Args:
            path: The ledger of the run.
            index: How many entries the checkpoint knew of.
            head: The hash of the last of these, or `GENESIS` if there were none.

        Raises:
            LedgerError: The file cannot be read, a line is bad, or the checkpoint does not belong
                to this ledger.
        """
        path = Path(path)
        entries, size, torn = _parse(path)
        if not 0 <= index <= len(entries):
            raise LedgerError(
                f"{path} has {len(entries)} whole entries, but the checkpoint was taken after "
                f"{index}; resume from an earlier checkpoint"
            )
        if _head(entries, index) != head:
            raise LedgerError(
                f"the checkpoint does not belong to {path}: their hashes after {index} entries "
                "differ; resume with the checkpoints of the same run"
            )
        if torn:
            try:
                _cut(path, size)
            except OSError as error:
                raise LedgerError(
                    f"cannot cut the torn last line off {path}: {error.strerror or error}; "
                    "make the file writable"
                ) from error
        return cls(path, entries, index, size)

    @property
    def index(self) -> int:
        """The number of entries so far; store it in a checkpoint."""
        return self._index

    @property
    def head(self) -> str:
        """The hash of the last entry so far; store it in a checkpoint."""
        return _head(self._stored, self._index)

    @property
    def entries(self) -> list[Entry]:
        """The entries so far, without those that a resumed run has yet to reproduce."""
        return self._stored[: self._index]

    @property
    def pending(self) -> int:
        """How many stored entries a resumed run has yet to reproduce."""
        return len(self._stored) - self._index

    def append(self, kind: str, /, **data: Any) -> Entry:
        """Adds an entry; when it returns, the entry is on the disk.

        While a resumed run repeats what was written before the crash, nothing is written: the
        entry is compared with the stored one.

        Args:
            kind: What happened.
            **data: Plain data that JSON holds exactly; tuples become lists.

        Returns:
            The entry, with the data as a reader of the file gets it.

        Raises:
            LedgerError: The data is not finite plain data, the resumed run departs from what was
                recorded, another process has changed the file, or the disk refuses. The ledger is
                as it was before.
        """
        index, previous = self._index, self.head
        try:
            plain = json.loads(canonical_json(data, kind))
            entry = Entry(index, kind, plain, previous, _hash(index, kind, plain, previous))
        except ValueError as error:
            raise LedgerError(
                f"cannot record entry {index}: {error}; turn it into finite plain data first"
            ) from error
        if index < len(self._stored):
            self._compare(self._stored[index], entry)
        else:
            self._write(_render(entry))
            self._stored.append(entry)
        self._index += 1
        return entry

    def _compare(self, stored: Entry, entry: Entry) -> None:
        if stored.hash == entry.hash:
            return
        if stored.kind != entry.kind:
            difference = f"its kind was {stored.kind!r} and is now {entry.kind!r}"
        else:
            names = sorted(
                name
                for name in stored.data.keys() | entry.data.keys()
                if _differ(stored.data, entry.data, name)
            )
            difference = f"{', '.join(names)} differ in this {entry.kind!r} entry"
        raise LedgerError(
            f"the resumed run does not reproduce entry {entry.index} of {self.path}: {difference}; "
            "resume with the same code, settings, data and machine, or start a new run"
        )

    def _write(self, line: bytes) -> None:
        try:
            # Unbuffered, so that nothing is left to be written by a later close.
            with self.path.open("r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end != self._size:
                    raise LedgerError(
                        f"{self.path} was changed by another process; "
                        "stop the other one and resume this run"
                    )
                try:
                    if file.write(line) != len(line):
                        raise OSError("the disk took only a part of the line")
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(self._size)
                    raise
        except OSError as error:
            raise LedgerError(
                f"cannot write {self.path}: {error.strerror or error}; "
                "free space or make the file writable, then resume"
            ) from error
        self._size += len(line)


def read_ledger(path: Path) -> list[Entry]:
    """Reads a ledger and verifies every line of its chain.

    Raises:
        LedgerError: The file cannot be read, or a line is bad: the message names the first one and
            says why.
    """
    path = Path(path)
    entries, _, torn = _parse(path)
    if torn:
        raise LedgerError(
            f"line {len(entries) + 1} of {path} is torn: {torn}; resume the run to complete it"
        )
    return entries


def _parse(path: Path) -> tuple[list[Entry], int, str]:
    """Reads all whole lines.

    Returns:
        The entries, the number of bytes that they take, and what tore the last line, if anything.
    """
    try:
        content = read_ordinary(path)
    except FileNotFoundError as error:
        raise LedgerError(f"there is no ledger at {path}; name the folder of a run") from error
    except OSError as error:
        raise LedgerError(
            f"cannot read {path}: {error.strerror or error}; make it a readable file"
        ) from error
    entries: list[Entry] = []
    size = 0
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        end = size + len(line) + 1
        try:
            value = parse_json(line)
        except ValueError as error:
            if end == len(content):
                return entries, size, "it is no JSON"
            raise _bad_line(path, number, "it is no JSON") from error
        entries.append(_verified(value, line, entries, path))
        size = end
    return entries, size, "it has no line end" if rest else ""


def _verified(value: Any, line: bytes, before: Sequence[Entry], path: Path) -> Entry:
    number = len(before) + 1
    if not isinstance(value, dict) or set(value) != {"index", "kind", "data", "previous", "hash"}:
        raise _bad_line(path, number, "it is no ledger entry")
    entry = Entry(**value)
    if type(entry.index) is not int or entry.index != len(before):
        raise _bad_line(path, number, f"its index is {entry.index!r} instead of {len(before)}")
    if not isinstance(entry.kind, str) or not isinstance(entry.data, dict):
        raise _bad_line(path, number, "its kind is no string or its data no object")
    if entry.previous != _head(before, len(before)):
        raise _bad_line(path, number, "it does not follow from the line before")
    try:
        if entry.hash != _hash(entry.index, entry.kind, entry.data, entry.previous):
            raise _bad_line(path, number, "its contents do not match its hash")
        if line + b"\n" != _render(entry):
            raise _bad_line(path, number, "it is not written as the ledger writes")
    except ValueError as error:
        raise _bad_line(path, number, str(error)) from error
    return entry


def _bad_line(path: Path, number: int, reason: str) -> LedgerError:
    return LedgerError(
        f"line {number} of {path} is bad: {reason}; restore the file from a copy, "
        "or treat the run as void from there on"
    )


def _head(entries: Sequence[Entry], index: int) -> str:
    return entries[index - 1].hash if index else GENESIS


def _hash(index: int, kind: str, data: dict[str, Any], previous: str) -> str:
    body = canonical_json({"index": index, "kind": kind, "data": data}, "entry")
    return hashlib.sha256((previous + body).encode()).hexdigest()


def _render(entry: Entry) -> bytes:
    return (canonical_json(vars(entry), "entry") + "\n").encode()


def _differ(left: dict[str, Any], right: dict[str, Any], name: str) -> bool:
    # As text, because True == 1 == 1.0 in Python but not in the ledger.
    if name not in left or name not in right:
        return True
    return canonical_json(left[name]) != canonical_json(right[name])


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())
