"""What a run shows while it goes on: a dashboard in a terminal, a log everywhere else.

Both have one interface (`start`, `event`, `outcome`, `promotion`), and both copy what
they show in the calling thread, so a refresh never touches the device.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Self, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from k1 import display
from k1.display import percent
from k1env.boundary import STAGES
from k1env.plain_log import PlainLog
from k1env.view import SessionView, bounds_lines, duration, evidence_line, loss_line, stage_lines
from k1env.watch import Watch, banner_words

BANNER_SECONDS = 12.0
GLOSSARY = "a cheat is what the stage forbids, kept only if a trial on copies shows that it helps"
TREE_COLUMNS = "mean gradient norm, steps updated, leaves"
_WORD_STYLES = {"cheat succeeded": "bold green", "cheat refused": "red", "impossible": "yellow"}


class Dashboard(Watch):
    """A calm picture of the run at the bottom of a terminal; announcements scroll up above it."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Draw to a console, by default on the standard output."""
        super().__init__(console or Console(), clock)
        self._banner: tuple[int, float] | None = None
        self._live = Live(
            self,
            console=self.console,
            refresh_per_second=2,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop drawing; the last picture stays."""
        self.activity = self.activity if any(error) else "finished"
        self._live.stop()

    def _announce(self, stage: int) -> None:
        self._banner = (stage, self.clock() + BANNER_SECONDS)
        at = f" at decision {self.view.decision}" if self.view else ""
        title = f"STAGE {stage} OF {len(STAGES)} REACHED{at}: {STAGES[stage - 1]}"
        self.console.print(Rule(Text(title, "bold green"), style="bold green"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw everything, cut to the terminal's present size."""
        width, height = options.max_width, max(1, console.size.height - 1)
        if self._banner and self.clock() < self._banner[1] and height >= 12:
            text = Text("\n".join(banner_words(self._banner[0])), justify="center")
            banner = Panel(text, box=box.HEAVY, style="bold white on dark_green")
            height -= len(console.render_lines(banner, options))
            yield banner
        if self.view is None:
            yield self._headline()
        elif width >= 100 and height >= 32:
            yield from self._wide(self.view, width, height)
        else:
            yield from self._narrow(self.view, width, height)

    def _narrow(self, view: SessionView, width: int, height: int) -> list[Text]:
        roomy, stages, loss = height >= 20, stage_lines(view), self._loss(view, width)
        top = [self._headline(), *(stages if roomy else stages[view.stage - 1 : view.stage])]
        top.append(evidence_line(view, 20 if width >= 60 else 8))
        top += [_title("Bits per byte: start, now, change", width), *loss] if roomy else loss[:4]
        bottom = [self._activity(width), self._budget(view, width)]
        bottom = [_title("Now", width), *bottom] if roomy else bottom
        free = height - len(top) - len(bottom) - 2 * roomy
        tree = display.heat_lines(view.rows, max(1, free - 3))
        verdicts = self._verdicts(width, free - len(tree))
        if roomy:
            tree.insert(0, _title(_tree_title(view), width))
            verdicts.insert(0, _title("Verdicts, latest first", width))
            verdicts += [Text("")] * (height - len(top) - len(tree) - len(verdicts) - len(bottom))
        return self._cut([*top, *tree, *verdicts, *bottom], height)

    def _wide(self, view: SessionView, width: int, height: int) -> list[RenderableType]:
        left = 58
        stage = [*stage_lines(view), evidence_line(view)]
        stage.append(Text(f"Cheats: {view.accepted} of {view.attempted} tried succeeded"))
        stage += [Text(line, "dim") for line in bounds_lines(view)]
        tree = [*display.heat_lines(view.rows, height - 19), display.legend()]
        loss = self._loss(view, left - 4)
        tall = min(height - 16, max(len(tree) + 2, len(stage) + len(loss) + 4))
        boxes = Group(
            self._panel("Stages", stage, len(stage) + 2),
            self._panel("Bits per byte: start, now, change", loss, tall - len(stage) - 2),
        )
        grid = Table.grid(expand=True)
        grid.add_column(width=left)
        grid.add_row(boxes, self._panel(_tree_title(view), tree, tall, TREE_COLUMNS))
        rest = height - 1 - tall - 4
        verdicts = self._verdicts(width - 4, rest - 2)
        now = [self._activity(width - 4), self._budget(view, width - 4)]
        return [
            self._headline(), grid,
            self._panel("Verdicts, latest first", verdicts, rest, GLOSSARY),
            self._panel("Now", now, 4),
        ]  # fmt: skip

    def _headline(self) -> Text:
        line = Text("K-1 Phase 2", "bold cyan", no_wrap=True, overflow="ellipsis")
        decision = self.view.decision if self.view else 0
        left = duration(self._ends - self.clock()) if self._ends is not None else ""
        facts = f"  decision {decision}, {duration(self.elapsed)} elapsed"
        facts += f", at most {left} left" if left else ""
        return line.append(facts, "default")

    def _cut(self, lines: Sequence[Text], height: int) -> list[Text]:
        """Keep what fits, each line on one row, in ASCII where the terminal knows no more."""
        ascii_only = self.console.options.ascii_only
        kept = [
            display.ascii_line(line) if ascii_only else line for line in lines[: max(0, height)]
        ]
        for line in kept:
            line.no_wrap, line.overflow = True, "ellipsis" if not ascii_only else "crop"
        return kept

    def _panel(self, title: str, lines: Sequence[Text], height: int, note: str = "") -> Panel:
        return Panel(
            Group(*self._cut(lines, height - 2)), title=title, title_align="left",
            subtitle=Text(note, "dim") if note else None, subtitle_align="right",
            height=max(2, height), border_style="dim",
        )  # fmt: skip

    def _loss(self, view: SessionView, width: int) -> list[Text]:
        brief, longest = width < 54, max((len(d) for d in view.bits), default=6)
        name = max(6, min(longest, width - (27 if brief else 44), 16))
        lines = [loss_line(view, d, name, self.history.get(d, ()), brief=brief) for d in view.bits]
        return lines or [Text("  measured after Phase 1", "dim")]

    def _verdicts(self, width: int, height: int) -> list[Text]:
        lines: list[Text] = []
        for record in reversed(self.records):
            line = Text(f"{record.decision:>4} ", "dim", no_wrap=True, overflow="ellipsis")
            line.append(f"{record.word:<15} ", _WORD_STYLES.get(record.word, "default"))
            line.append(record.name, "bold default")
            if record.times > 1:
                line.append(f" {record.times} times", "default")
            lines.append(line)
            if record.detail:
                detail = Text(record.detail, "dim").wrap(self.console, max(10, width - 5))
                lines += [Text("     ").append_text(part) for part in detail]
            if len(lines) >= height:
                break
        shown = lines[: max(0, height)]
        return shown or [Text("  none yet", "dim")][: max(0, height)]

    def _activity(self, width: int) -> Text:
        line = Text(f"{self.activity} ", no_wrap=True, overflow="ellipsis")
        if self.total and self.done:
            unit = "seeds" if self.activity.startswith("trying") else "steps"
            drawn = display.bar(self.done / self.total, 20 if width >= 60 else 8)
            line.append(f"{drawn} ", "cyan")
            line.append(f"{self.done} of {self.total} {unit} ", "bold")
        return line.append(f"for {duration(self.clock() - self.activity_began)}", "dim")

    def _budget(self, view: SessionView, width: int) -> Text:
        share = display.ratio(view.spent, view.budget)
        line = Text("Budget ", no_wrap=True, overflow="ellipsis")
        line.append(display.bar(share, 20 if width >= 60 else 8), "cyan")
        return line.append(f" {percent(share)} of {view.budget:,} training steps, trials included")


def _tree_title(view: SessionView) -> str:
    return f"Tree: {view.agents} agents, training step {view.step:,}"


def _title(words: str, width: int) -> Text:
    return Text(f"─ {words} ".ljust(max(0, width), "─"), "dim cyan", no_wrap=True, overflow="crop")


def make_display(target: Console | TextIO | None = None) -> Dashboard | PlainLog:
    """Choose a dashboard for a terminal (the standard output by default), else a log."""
    stream = target.file if isinstance(target, Console) else target or sys.stdout
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainLog(stream)  # type: ignore[arg-type]
    return Dashboard(target if isinstance(target, Console) else Console(file=stream))
