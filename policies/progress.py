"""How far long work is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from policies.evaluation import Progress

_LINES = 20
"""Most lines that are written where there is no terminal."""


@contextmanager
def progress_bar(what: str = "episodes") -> Iterator[Progress]:
    """Show on standard error how many pieces of work are finished."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(done: int, planned: int) -> None:
            if done == planned or done % max(1, planned // _LINES) == 0:
                print(f"{done} of {planned} {what}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, planned: bar.update(task, completed=done, total=planned)
