"""What a run shows while it goes on: a dashboard in a terminal, a log everywhere else.

Both have one interface (`start`, `event`, `outcome`, `promotion`, `finish`), and both copy what
they show in the calling thread, so a refresh never touches the device.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from k1 import display
from k1.display import number, percent
from k1env import render
from k1env.boundary import STAGES
from k1env.gate import GateConfig
from k1env.outcome import Outcome
from k1env.render import SessionView, duration, explain, gain, verdict_word
from k1env.session import Session

BANNER_SECONDS = 12.0
PROGRESS_SECONDS = 10.0
GLOSSARY = "a cheat is what the stage forbids, kept only if a trial on copies shows that it helps"
TREE_COLUMNS = "mean gradient norm, steps updated, leaves"
_WORD_STYLES = {"cheat succeeded": "bold green", "cheat refused": "red", "impossible": "yellow"}


@dataclass
class _Record:
    """One decision, or several alike in a row."""

    decision: int
    name: str
    word: str
    detail: str
    times: int = 1


class _Watch(AbstractContextManager):
    """What both displays remember of a run."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self.console, self.clock = console, clock
        self.view: SessionView | None = None
        self.history: dict[str, list[float]] = {}
        self.records: list[_Record] = []
        self.gate = GateConfig()
        self.activity, self.done, self.total = "starting", 0, 0
        self.began = self.activity_began = clock()
        self._session: Session | None = None
        self._announced = 1
        self._baseline: tuple[float, int, int] | None = None
        self._ends: float | None = None

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""

    def start(self, session: Session) -> None:
        """Show a session that begins or goes on, and listen to its events."""
        self._session, self.gate = session, session.settings.gate
        self.began = self.activity_began = self.clock()
        self._announced = session.boundary.stage
        session.notify = self.event
        self._look()

    def event(self, kind: str, done: int = 0, total: int = 0, **_: Any) -> None:
        """Show that long work goes on ("phase1", "train" or "trial")."""
        self._look()
        activity = self._describe(kind)
        if activity != self.activity:
            self.activity, self.activity_began = activity, self.clock()
        self.done, self.total = done, total
        if kind != "phase1" and self._baseline is None and self.view is not None:
            self._baseline = (self.clock(), self.view.spent, self.view.decision)

    def outcome(self, outcome: Outcome) -> None:
        """Show what came of a decision."""
        view = self._look()
        for domain, value in (view.bits if view else {}).items():
            self.history.setdefault(domain, []).append(value)
        self._record(outcome)
        self._ends = self._estimate()
        self.activity, self.done, self.total = "deciding", 0, 0
        self.activity_began = self.clock()
        self._tell(outcome)
        if outcome.promoted and view is not None:
            self.promotion(view.stage)

    def promotion(self, stage: int) -> None:
        """Announce that a stage opened, once."""
        if stage > self._announced:
            self._announced = stage
            self._look()
            self._announce(stage)

    def _announce(self, stage: int) -> None:
        """Make a new stage impossible to miss."""

    def _tell(self, outcome: Outcome) -> None:
        """Print a decision, where decisions are printed."""

    def _look(self) -> SessionView | None:
        if self._session is not None:
            self.view = render.look(self._session)
            for domain, value in self.view.bits_start.items():
                self.history.setdefault(domain, [value])
        return self.view

    def _describe(self, kind: str) -> str:
        tried = _pending(self._session)
        words = {"phase1": "Phase 1: training with fixed settings"}
        words["train"] = f"training ({tried})" if tried else "training"
        words["trial"] = f"trying on copies: {tried or 'a cheat'}"
        return words.get(kind, kind)

    def _record(self, outcome: Outcome) -> None:
        detail = "" if verdict_word(outcome) == "permitted" else explain(outcome, self.gate)
        if outcome.rolled_back:
            detail = "ROLLED BACK to the best state: the loss diverged. " + detail
        new = _Record(outcome.decision, outcome.name, verdict_word(outcome), detail)
        last = self.records[-1] if self.records else None
        if last and not detail and (last.name, last.word, last.detail) == (new.name, new.word, ""):
            last.decision, last.times = new.decision, last.times + 1
        else:
            self.records = [*self.records[-19:], new]

    def _estimate(self) -> float | None:
        """Tell when the budget or the decisions will be used up at the latest."""
        view, now = self.view, self.clock()
        if view is None or self._baseline is None or view.decision <= self._baseline[2]:
            return None
        began, spent, decision = self._baseline
        share = (view.budget - view.spent) / max(1, view.spent - spent)
        share = min(share, (view.max_decisions - view.decision) / (view.decision - decision))
        return now + (now - began) * max(0.0, share)

    @property
    def elapsed(self) -> float:
        """Seconds since `start`."""
        return self.clock() - self.began


def _pending(session: Session | None) -> str:
    """Name the action that was logged as an intent and has no outcome yet."""
    entries = list(getattr(session.ledger, "entries", ())) if session is not None else []
    last = entries[-1] if entries else ("", {})
    kind, data = last if isinstance(last, tuple) else (last.kind, last.data)
    return str(data.get("name", "")) if kind == "intent" else ""


class Dashboard(_Watch):
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

    def finish(self, summary: Mapping[str, Any], run_dir: str | Path | None = None) -> None:
        """Stop drawing and print the results."""
        self.activity = "finished"
        self._look()
        self._live.stop()
        report = final_report(summary, run_dir)
        if self.console.options.ascii_only:
            report = display.ascii_text(report)
        framed = Panel(Text(report), title="K-1: the run is over", border_style="cyan")
        self.console.print(framed if self.console.width >= 80 else Text(report))

    def _announce(self, stage: int) -> None:
        self._banner = (stage, self.clock() + BANNER_SECONDS)
        at = f" at decision {self.view.decision}" if self.view else ""
        title = f"STAGE {stage} OF {len(STAGES)} REACHED{at}: {STAGES[stage - 1]}"
        self.console.print(Rule(Text(title, "bold green"), style="bold green"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw everything, cut to the terminal's present size."""
        width, height = options.max_width, max(1, console.size.height - 1)
        if self._banner and self.clock() < self._banner[1] and height >= 12:
            text = Text("\n".join(_banner_words(self._banner[0])), justify="center")
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
        roomy, stages, loss = height >= 20, render.stage_lines(view), self._loss(view, width)
        top = [self._headline(), *(stages if roomy else stages[view.stage - 1 : view.stage])]
        top.append(render.evidence_line(view, 20 if width >= 60 else 8))
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
        stage = [*render.stage_lines(view), render.evidence_line(view)]
        stage.append(Text(f"Cheats: {view.accepted} of {view.attempted} tried succeeded"))
        stage += [Text(line, "dim") for line in render.bounds_lines(view)]
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
        lines = [
            render.loss_line(view, d, name, self.history.get(d, ()), brief=brief) for d in view.bits
        ]
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


def _banner_words(stage: int) -> tuple[str, str]:
    title = f"STAGE {stage} OF {len(STAGES)} REACHED: {STAGES[stage - 1].upper()}"
    return title, f"now permitted: {render.PERMITTED[stage - 1]}"


class PlainLog(_Watch):
    """One line for each decision, for pipes, files and CI."""

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to a stream, by default the standard output."""
        super().__init__(Console(file=stream or sys.stdout, width=100), clock)
        self.stream = stream or sys.stdout
        self._quiet_since = clock()

    def start(self, session: Session) -> None:
        """Say what begins or goes on."""
        super().start(session)
        assert self.view is not None
        at, budget = self.view.stage, f"{self.view.budget:,} training steps"
        self._say(f"K-1 Phase 2 | stage {at} of {len(STAGES)}: {STAGES[at - 1]} | {budget}")
        self._say(f"E is the evidence (a stage opens at 100 or more); {GLOSSARY}")

    def event(self, kind: str, done: int = 0, total: int = 0, **_: Any) -> None:
        """Say now and then that long work goes on."""
        super().event(kind, done, total)
        if self.clock() - self._quiet_since >= PROGRESS_SECONDS:
            progress = f" {done}/{total}" if total else ""
            self._say(f"    ... {self.activity}{progress} | {duration(self.elapsed)}")

    def _tell(self, outcome: Outcome) -> None:
        self._say(self.line(outcome))
        if outcome.trial is not None or outcome.impossible or outcome.rolled_back:
            rolled = "rolled back to the best state, for the loss diverged; "
            self._say(f"    why: {rolled * outcome.rolled_back}{explain(outcome, self.gate)}")

    def line(self, outcome: Outcome) -> str:
        """Describe a decision in one line."""
        view, word = self.view, verdict_word(outcome)
        if outcome.trial is not None:
            word += f" ({gain(outcome.trial.control)})"
        parts = [f"decision {outcome.decision}", f"stage {outcome.stage}", outcome.name, word]
        if view is not None:
            # A promotion has reset the evidence; what counted is what it was reached with.
            reset = outcome.promoted and view.history
            evidence = view.history[-1].get("evidence") if reset else view.evidence
            parts.insert(2, f"E {number(evidence)}")
            parts.append(" ".join(f"{d} {number(view.bits.get(d), '.2f')}" for d in view.seen))
            parts.append(f"{percent(display.ratio(view.spent, view.budget))} of budget")
        return " | ".join([*parts, duration(self.elapsed)])

    def finish(self, summary: Mapping[str, Any], run_dir: str | Path | None = None) -> None:
        """Print the results."""
        self._say(final_report(summary, run_dir))

    def _announce(self, stage: int) -> None:
        words, frame = _banner_words(stage), "=" * 78
        self._say("\n".join([frame, *(f"== {w:^72} ==" for w in words), frame]))

    def _say(self, text: str) -> None:
        if not (getattr(self.stream, "encoding", None) or "utf-8").lower().startswith("utf"):
            text = display.ascii_text(text.replace("±", "+/-"))
        print(text, file=self.stream, flush=True)
        self._quiet_since = self.clock()


def make_display(target: Console | TextIO | None = None) -> Dashboard | PlainLog:
    """Choose a dashboard for a terminal (the standard output by default), else a log."""
    stream = target.file if isinstance(target, Console) else target or sys.stdout
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainLog(stream)  # type: ignore[arg-type]
    return Dashboard(target if isinstance(target, Console) else Console(file=stream))


def final_report(summary: Mapping[str, Any], run_dir: str | Path | None = None) -> str:
    """Write what a user reads at the end of a run.

    Args:
        summary: as in `summary.json`; what is missing is left out.
        run_dir: the run folder.
    """
    stage = int(summary.get("final_stage") or 1)
    lines = [f"Stage reached    {stage} of {len(STAGES)}: {STAGES[stage - 1]}"]
    history = [dict(e) for e in summary.get("stage_history") or ()]
    for before, entry in itertools.pairwise(history):
        won = entry.get("accepted", 0) - before.get("accepted", 0)
        tried = entry.get("attempted", 0) - before.get("attempted", 0)
        how = f"{won} of {tried} cheats succeeded, evidence {number(entry.get('evidence'))}"
        lines.append(f"{'':17}stage {entry['stage']} at decision {entry['decision']}: {how}")
    tried, won = summary.get("cheats_attempted", 0), summary.get("cheats_accepted", 0)
    evidence = number(summary.get("evidence"))
    lines.append(f"Cheats           {won} of {tried} succeeded; evidence in this stage {evidence}")
    ends = f"{summary.get('agents_start', 'n/a')} -> {summary.get('agents_end', 'n/a')}"
    lines += [f"Agents           {ends}", "Bits per byte    (validation, lower is better)"]
    start = summary.get("bits_per_byte_start") or {}
    for domain, end in (summary.get("bits_per_byte_end") or {}).items():
        first = start.get(domain)
        known = None not in (first, end) and first and math.isfinite(first)
        change = percent((end - first) / first, "+.1f") if known else "n/a"
        figures = f"{number(first, '.3f')} -> {number(end, '.3f')} ({change})"
        lines.append(f"    {display.fit(domain, 12)} {figures}")
    criteria = ", ".join(summary.get("stop_criteria") or ())
    why = summary.get("stop_reason") or "n/a"
    lines.append(f"Stopped          {why}{f' ({criteria})' if criteria else ''}")
    steps, seconds = number(summary.get("train_steps"), ",.0f"), duration(summary.get("seconds"))
    lines.append(f"Training         {steps} steps in {seconds}")
    lines.append(f"State hash       {str(summary.get('state_hash') or 'n/a')[:16]}")
    folder = run_dir or summary.get("run_dir")
    if folder:
        lines += [f"Run folder       {folder}", f"Read it          {Path(folder) / 'report.html'}"]
        lines.append(f"Check it         python scripts/replay.py {folder}")
    return "\n".join(lines)
