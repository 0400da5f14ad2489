"""Rows of JSON in a file: a head that says what they are about, then a line for each result.

Whoever starts again leaves out what is there, so a row is on the disk before it counts, comes once,
and a file about something else is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k1.durable import canonical_json, parse_json
from k1.errors import K1Error

FORMAT = 1
Row = dict[str, Any]


class RowFile:
    """Rows by key, in a file if there is one."""

    def __init__(self, path: Path | None, head: Row, names: tuple[str, ...]) -> None:
        """Read what a file holds, or begin it.

        Args:
            path: the file; None keeps the rows in memory.
            head: what they are about, as plain data.
            names: fields of a row that are its key.

        Raises:
            K1Error: if the file is about something else, or cannot be read or written.
        """
        self.path, self.names = path, names
        self.head = {"format": FORMAT, **head}
        self.rows: dict[Hashable, Row] = {}
        if path is None:
            return
        text = _read(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line off
        lines = _lines(path, whole)
        first = canonical_json(self.head) + "\n"
        if not lines and first.startswith(text):  # new, or its first line was cut off
            self._write(first, "w")
            return
        self._check_head(lines[0] if lines else None)
        self.rows = _by_key(path, names, lines[1:])
        if whole != text:
            self._write(whole, "w")

    def key(self, row: Row) -> Hashable:
        """The key of a row; lists in it become tuples."""
        return _key(row, self.names)

    def add(self, row: Row) -> None:
        """Add a row; it is on the disk before this returns.

        Raises:
            K1Error: if it cannot be written.
            ValueError: if there is one with this key.
        """
        row = json.loads(canonical_json(row))
        if self.key(row) in self.rows:
            raise ValueError(f"there is a row {self.key(row)} already")
        if self.path is not None:
            self._write(canonical_json(row) + "\n", "a")
        self.rows[self.key(row)] = row

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes that lock it from adding to the file.

        Raises:
            K1Error: if one is at it.
        """
        if self.path is None:
            yield
            return
        with self.path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise K1Error(
                    f"{self.path} is being written by another process: wait for it, or name "
                    "another file"
                ) from None
            yield

    def _write(self, text: str, mode: str) -> None:
        assert self.path is not None
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise K1Error(f"{self.path} cannot be written ({error}): name another file") from None

    def _check_head(self, found: Any) -> None:
        """See that the rows are about what is asked for.

        Raises:
            K1Error: if not.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise K1Error(f"{self.path} holds no records of this version of K-1: name another file")
        plain = json.loads(canonical_json(self.head))
        other = [name for name in plain if found.get(name) != plain[name]]
        if other:
            raise K1Error(
                f"{self.path} holds records with other {', '.join(other)}: name another file, or "
                "ask for the same"
            )


def read_rows(path: Path, kind: str, names: tuple[str, ...]) -> tuple[Row, list[Row]]:
    """Read a file of rows of a kind, whatever they are about, and leave it as it is.

    Args:
        path: the file.
        kind: what its head calls itself.
        names: fields of a row that are its key.

    Returns:
        Its head, without the format, and its rows.

    Raises:
        K1Error: if it cannot be read, is of another format or kind, ends within a line or has no
            row.
    """
    text = _read(path)
    if not text.endswith("\n"):
        raise K1Error(
            f"{path} is empty or ends within a line: let the command that writes it finish, or "
            "start that again"
        )
    head, *lines = _lines(path, text)
    if not isinstance(head, dict) or head.pop("format", None) != FORMAT:
        raise K1Error(f"{path} holds no records of this version of K-1: name another file")
    if head.get("kind") != kind:
        raise K1Error(
            f"{path} holds records of kind {head.get('kind')!r}, not {kind!r}: name another file"
        )
    if not lines:
        raise K1Error(f"{path} has a head and no records: name another file")
    return head, list(_by_key(path, names, lines).values())


def _key(row: Row, names: tuple[str, ...]) -> Hashable:
    values = [row[name] for name in names]
    key = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in values)
    hash(key)
    return key


def _by_key(path: Path, names: tuple[str, ...], lines: list[Any]) -> dict[Hashable, Row]:
    try:
        return {_key(row, names): row for row in lines}
    except (KeyError, TypeError):
        raise K1Error(f"{path} holds a line that is no record: name another file") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise K1Error(f"there is no file {path}: name one with records") from None
    except (OSError, ValueError) as error:
        raise K1Error(f"{path} cannot be read as records ({error}): name another file") from None


def _lines(path: Path, text: str) -> list[Any]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(parse_json(line.encode()))
        except ValueError as error:
            raise K1Error(
                f"{path} cannot be read as records (its line {number}: {error}): name another file"
            ) from None
    return found
