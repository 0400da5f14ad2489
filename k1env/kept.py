"""Records that work can go on from: a file of lines of JSON, the first of which says what of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k1.durable import canonical_json
from k1.errors import K1Error

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass
class Records:
    """Finished pieces of work by their keys, in a file if there is one."""

    path: Path | None
    head: Row
    """What the records are about: `format`, and whatever has to be the same to go on."""
    names: tuple[str, ...]
    """Fields of a row that make its key."""
    rows: dict[Key, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, head: Row, names: tuple[str, ...]) -> Records:
        """Read what a file holds, or begin it.

        Raises:
            K1Error: if the file is about something else, or cannot be read or written.
        """
        made = cls(path, head, names)
        if path is None:
            return made
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line off
            lines = [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError) as error:
            raise K1Error(
                f"{path} cannot be read as records ({error}): name another file"
            ) from None
        first = canonical_json(head) + "\n"
        if not lines and first.startswith(text):  # new, or its first line was cut off
            made._write(first, "w")
            return made
        _check_head(path, lines[0] if lines else None, head)
        try:
            made.rows = {made.key(row): row for row in lines[1:]}
        except (KeyError, TypeError):
            raise K1Error(f"{path} holds a line that is no record: name another file") from None
        if whole != text:
            made._write(whole, "w")
        return made

    def key(self, row: Row) -> Key:
        """The key of a row."""
        return tuple(row[name] for name in self.names)

    def add(self, row: Row) -> None:
        """Add a finished piece; it is on the disk before this returns."""
        self.rows[self.key(row)] = row
        if self.path is not None:
            self._write(canonical_json(row) + "\n", "a")

    def _write(self, text: str, mode: str) -> None:
        assert self.path is not None
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise K1Error(f"{self.path} cannot be written ({error}): name another file") from None


def _check_head(path: Path, found: Any, head: Row) -> None:
    """See that records are about what is asked for.

    Raises:
        K1Error: if not.
    """
    if not isinstance(found, dict) or found.get("format") != head["format"]:
        raise K1Error(f"{path} holds no records of this version of K-1: name another file")
    plain = json.loads(canonical_json(head))
    other = [name for name in plain if found.get(name) != plain[name]]
    if other:
        raise K1Error(
            f"{path} holds records with other {', '.join(other)}: name another file, or ask for "
            "the same"
        )
