"""What every display of a run does: keep records, and say what is going on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from k1env.boundary import STAGES
from k1env.gate import GateConfig
from k1env.outcome import Outcome
from k1env.session import Session
from k1env.view import PERMITTED, SessionView, explain, look, verdict_word


@dataclass
class Record:
    """One decision, or several alike in a row."""

    decision: int
    name: str
    word: str
    detail: str
    times: int = 1


class Watch(AbstractContextManager):
    """What both displays remember of a run."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self.console, self.clock = console, clock
        self.view: SessionView | None = None
        self.history: dict[str, list[float]] = {}
        self.records: list[Record] = []
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
            self.view = look(self._session)
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
        new = Record(outcome.decision, outcome.name, verdict_word(outcome), detail)
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


def banner_words(stage: int) -> tuple[str, str]:
    """Announce a stage in two lines."""
    title = f"STAGE {stage} OF {len(STAGES)} REACHED: {STAGES[stage - 1].upper()}"
    return title, f"now permitted: {PERMITTED[stage - 1]}"
