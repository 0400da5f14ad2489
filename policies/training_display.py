"""What a training shows: one line for each update, and a progress bar in a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from policies.training import Plan


class TrainingDisplay:
    """Prints to a console; a context in which the progress bar lives."""

    def __init__(self, console: Console | None = None) -> None:
        """Bind the console; by default it is standard output."""
        self.console = console or Console(highlight=False)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal, transient=True
        )
        self._bar = self._progress.add_task("decisions", total=None)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take it away."""
        self._progress.stop()

    def begin(self, steps: int, total: int) -> None:
        """The training begins or goes on."""
        self._progress.update(self._bar, completed=steps, total=total)

    def advance(self, steps: int) -> None:
        """Decisions are made."""
        self._progress.advance(self._bar, steps)

    def update(self, row: dict[str, Any], plan: Plan, seconds: float) -> None:
        """Print the line of an update, and one about its validation."""
        if row["update"]:
            self.say(update_line(row, plan, seconds))
        if row["validation"] is not None:
            self.say(validation_line(row))

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True, markup=False)


def update_line(row: dict[str, Any], plan: Plan, seconds: float) -> str:
    """Say in one line what an update came to."""
    share = row["steps"] / plan.steps
    parts = [
        f"update {row['update']:05d} | decisions {row['steps']:,}/{plan.steps:,} ({share:.1%})",
        f"return {_number(row['recent_return'], '.2f')} ({row['episodes']} episodes ended)",
        f"gain {_number(row['gain'], '+.2f')}",
        f"no-op {row['noop']:.0%}, tried {row['tried']:.0%}, credited {row['credited']:.0%}",
        f"entropy {-row['entropy_loss']:.3f}",
        f"kl {row['approx_kl']:.4f}",
        f"value loss {row['value_loss']:.3f}",
        f"explained {_number(row['explained_variance'], '.2f')}",
        f"{row['steps_per_second']:.1f} decisions/s",
        f"total {seconds / 60:.1f}m",
    ]
    return " | ".join(parts)


def validation_line(row: dict[str, Any]) -> str:
    """Say in one line what a validation came to."""
    found = row["validation"]
    return (
        f"validation at {row['steps']:,} decisions | return {found['total']:.2f} | "
        f"{found['bits_per_byte']:.4f} bits per byte | {found['length']:.1f} decisions, "
        f"stage {found['stage']:.2f} | {found['worlds']} worlds"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
