"""A run as lines of text, for pipes and files, and the report at its end."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from k1 import display
from k1.display import number, percent
from k1env.boundary import STAGES
from k1env.outcome import Outcome
from k1env.session import Session
from k1env.view import duration, explain, gain, verdict_word
from k1env.watch import Watch, banner_words

PROGRESS_SECONDS = 10.0
GLOSSARY = "a cheat is what the stage forbids, kept only if a trial on copies shows that it helps"


class PlainLog(Watch):
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
        at, budget = self.view.stage, f"{self.view.budget:,} training steps, copies' included"
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
            if view.skipped:
                parts.append(f"{view.skipped} of {view.step} steps skipped")
        return " | ".join([*parts, duration(self.elapsed)])

    def _announce(self, stage: int) -> None:
        words, frame = banner_words(stage), "=" * 78
        self._say("\n".join([frame, *(f"== {w:^72} ==" for w in words), frame]))

    def _say(self, text: str) -> None:
        if not (getattr(self.stream, "encoding", None) or "utf-8").lower().startswith("utf"):
            text = display.ascii_text(text.replace("±", "+/-"))
        print(text, file=self.stream, flush=True)
        self._quiet_since = self.clock()


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
    came = f"{won} of {tried} succeeded" if tried else "none tried"
    lines.append(f"Cheats           {came}; evidence in this stage {evidence}")
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
    copies = number(summary.get("lane_steps"), ",.0f")
    lines.append(f"Training         {steps} steps, {copies} with all copies, in {seconds}")
    skipped, rollbacks = summary.get("skipped_steps", 0), summary.get("rollbacks", 0)
    if skipped or rollbacks:
        lines.append(f"Divergence       {skipped} steps skipped, {rollbacks} rollbacks")
    lines.append(f"State hash       {str(summary.get('state_hash') or 'n/a')[:16]}")
    folder = run_dir or summary.get("run_dir")
    if folder:
        lines.append(f"Run folder       {folder}")
        lines.append(f"Check it         python scripts/replay.py {folder}")
    return "\n".join(lines)
