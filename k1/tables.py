"""Tables of text: for the terminal, and for pages as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

PAGE = 160
"""Columns of what is printed where nobody sees a terminal, such as a log file."""


@dataclass(frozen=True)
class Table:
    """A title, headers and rows of text."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """A sentence on how to read it, for pages."""
    numbers: bool = True
    """Whether all columns but the first hold figures, which go to the right."""

    def shown(self) -> RichTable:
        """Return it for the terminal; what is too wide is folded, and nothing cut off."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title), title_justify="left")
        for number, header in enumerate(self.headers):
            table.add_column(
                escape(header),
                justify="right" if number and self.numbers else "left",
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> list[str]:
        """Write it as lines of Markdown, without the title."""
        rule = "|---|" + ("---:|" if self.numbers else "---|") * (len(self.headers) - 1)
        return [_line(self.headers), rule, *map(_line, self.rows)]

    def section(self) -> list[str]:
        """Write it as lines of Markdown under its title."""
        return [f"{self.title[0].upper()}{self.title[1:]}:", "", *self.markdown(), ""]


def console() -> Console:
    """Return where tables are printed: as wide as the terminal, or as a page if there is none."""
    from rich.console import Console

    return Console(emoji=False, width=None if sys.stdout.isatty() else PAGE)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
