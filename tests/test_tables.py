"""Tables of text, in a terminal and on a page."""

from __future__ import annotations

import io

from rich.console import Console

from k1.tables import Table

TABLE = Table("what [it] is", ("name", "a|b"), [("[x]", "1.25 [1.1, 1.4]"), ("y", "-")])


def test_markdown_has_a_line_for_each_row() -> None:
    assert TABLE.markdown() == [
        "| name | a/b |", "|---|---:|", "| [x] | 1.25 [1.1, 1.4] |", "| y | - |"
    ]  # fmt: skip
    assert Table("", ("a", "b"), [], numbers=False).markdown()[1] == "|---|---|"


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    for width in (24, 80):
        stream = io.StringIO()
        Console(file=stream, width=width).print(TABLE.shown())
        told = stream.getvalue()
        assert "…" not in told
        for part in ("[x]", "1.25", "[1.1,", "1.4]", "what [it] is"):
            assert part in told
