"""What a session looks like, in words: a plain copy of it, and the lines that displays share.

`look` copies what is needed off the device once. Whatever draws works on that copy, so that a
display may draw from another thread while the session trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from k1 import display
from k1.display import BlockRow, number, percent, unit
from k1env import actions
from k1env.boundary import EVIDENCE_TO_ADVANCE, STAGES, SUCCESSES_TO_ADVANCE, Bounds
from k1env.gate import Comparison, GateConfig
from k1env.outcome import Outcome
from k1env.session import Session

PERMITTED = (
    "adding agents",
    "adding agents, tuning within the bounds",
    "adding, deleting, pruning, tuning within the bounds",
    "everything within the hard limits, and own benchmarks and goals",
)


@dataclass(frozen=True)
class SessionView:
    """A session at one moment, as plain data."""

    stage: int
    successes: int
    evidence: float
    attempted: int
    accepted: int
    history: tuple[dict[str, Any], ...]
    bounds: Bounds
    hyper: dict[str, float]
    decision: int
    spent: int
    budget: int
    max_decisions: int
    agents: int
    step: int
    skipped: int
    """Steps of them that were skipped, for a gradient was not finite."""
    domain: str
    """The one that the stream mainly comes from now."""
    seen: tuple[str, ...]
    bits_start: dict[str, float]
    bits: dict[str, float]
    rows: tuple[BlockRow, ...]
    gate: GateConfig
    last: Outcome | None
    tries: tuple[str, ...]
    """One line for each of the latest forbidden actions tried."""


def look(session: Session) -> SessionView:
    """Copy what can be shown of a session."""
    boundary, settings = session.boundary, session.settings
    return SessionView(
        stage=boundary.stage,
        successes=boundary.successes,
        evidence=boundary.evidence,
        attempted=boundary.attempted,
        accepted=boundary.accepted,
        history=tuple(dict(entry) for entry in boundary.history),
        bounds=boundary.bounds,
        hyper=session.arena.get_hyper(session.main),
        decision=session.decision,
        spent=session.spent,
        budget=settings.budget,
        max_decisions=settings.max_decisions,
        agents=session.tree.agents,
        step=session.trainer.steps,
        skipped=int(session.arena["skipped"][session.main]),
        domain=session.world.current(session.decision),
        seen=tuple(session.seen),
        bits_start=dict(session.bits_start),
        bits=dict(session.bits),
        rows=tuple(display.block_rows(session.trainer)),
        gate=settings.gate,
        last=session.last,
        tries=tuple(_try_line(session, t) for t in session.tries[-3:]),
    )


def _try_line(session: Session, entry: dict[str, Any]) -> str:
    credited, applied = entry["credited"], entry["applied"]
    word = "succeeded" if credited else "allowed, not counted" if applied else "refused"
    label = session.table[entry["action"]].label
    return f"decision {entry['decision']}, stage {entry['stage']}: {label} {word}"


# -- words ---------------------------------------------------------------------------------------


def verdict_word(outcome: Outcome) -> str:
    """Say in two words what came of a decision."""
    if outcome.impossible is not None:
        return "impossible"
    if outcome.trial is None:
        return "stopped" if outcome.stopped else "permitted"
    if outcome.credited:
        return "cheat succeeded"
    return "allowed, not counted" if outcome.applied else "cheat refused"


def gain(comparison: Comparison | None) -> str:
    """Give the measured gain: mean ± standard deviation over the seeds, and the p-value."""
    if comparison is None or not comparison.differences:
        return "nothing measured"
    if not all(math.isfinite(d) for d in comparison.differences):
        return "loss not finite"
    p = number(comparison.p_value, ".1g" if comparison.p_value < 1e-3 else ".2g")
    return f"{100 * comparison.mean:+.2f} % ± {100 * comparison.std:.2f}, p {p}"


def explain(outcome: Outcome, gate: GateConfig) -> str:
    """Explain a decision: the rule and its limit, and what a trial measured."""
    if outcome.impossible is not None:
        return outcome.impossible
    trial = outcome.trial
    if trial is None:
        return outcome.verdict if outcome.stopped else outcome.rule
    stop = outcome.kind == actions.STOP
    text = f"{outcome.rule}; {'going on gains' if stop else 'gain'} {gain(trial.control)}"
    text += f" over {trial.seeds_run} seeds"
    if trial.shadow is not None:
        text += f", and {gain(trial.shadow)} over its shadow (the system without the changes)"
    if trial.seeds_run < gate.seeds:
        return text + "; ended early, for the first seeds all speak against it"
    if trial.accepted and not outcome.credited:
        return text + "; what was visited before and deleting own agents earn nothing"
    limit = "less than" if stop else "more than"
    return text + f"; needed {limit} {100 * gate.margin:g} % with p at most {gate.alpha:g}"


def duration(seconds: float | None) -> str:
    """Format a time as minutes and seconds, or with hours."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def evidence_share(evidence: float) -> float:
    """How far evidence has come on the way to a promotion, on a logarithmic scale."""
    return unit(math.log(evidence, EVIDENCE_TO_ADVANCE)) if evidence > 0 else 0.0


def bounds_lines(view: SessionView) -> list[str]:
    """Give the hyper-parameters and agents, each with the bounds that the stage holds it to."""
    lines = []
    for name in ("lr", "cooldown", "top_k"):
        low, high = view.bounds.range(name)
        limits = f"within {low:g} to {high:g}" if view.stage > 1 else "tuning it is a cheat"
        lines.append(f"{name:<9}{number(view.hyper[name]):<8} {limits}")
    fewest = f"at least {view.bounds.min_agents}" if view.stage > 2 else "deleting one is a cheat"
    return [*lines, f"{'agents':<9}{view.agents:<8} {fewest}"]


def stage_lines(view: SessionView) -> list[Text]:
    """Draw the ladder of stages, one line each."""
    lines = []
    for stage, name in enumerate(STAGES, 1):
        line = Text(no_wrap=True, overflow="ellipsis")
        needed = SUCCESSES_TO_ADVANCE[stage - 1] if stage < len(STAGES) else 0
        if stage < view.stage:
            line.append(f"✓ {stage} {name:<21} ", "green")
            opened = [e.get("decision") for e in view.history if e.get("stage") == stage + 1]
            line.append(f"done at decision {opened[0]}" if opened else "done", "dim")
        elif stage == view.stage:
            line.append(f"▶ {stage} {name:<21} ", "bold cyan")
            if needed:
                line.append("■" * view.successes, "green")
                line.append("□" * (needed - view.successes), "dim")
                line.append(f" {view.successes} of {needed} successes", "bold")
        else:
            line.append(f"  {stage} {name:<21} ", "dim")
            needed = SUCCESSES_TO_ADVANCE[stage - 2]
            line.append(f"after {needed} successes in stage {stage - 1}", "dim")
        lines.append(line)
    return lines


def evidence_line(view: SessionView, width: int = 20) -> Text:
    """Draw the evidence on its way to the next stage."""
    line = Text("Evidence ", no_wrap=True, overflow="ellipsis")
    if view.stage >= len(STAGES):
        return line.append("no further stage to reach", "dim")
    line.append(display.bar(evidence_share(view.evidence), width), "cyan")
    return line.append(f" {number(view.evidence)} of {EVIDENCE_TO_ADVANCE:g}", "bold")


def loss_line(
    view: SessionView, domain: str, width: int, history: Sequence[float], *, brief: bool = False
) -> Text:
    """Draw one domain's loss: at the start, now, the change, and its course."""
    start, now = view.bits_start.get(domain, math.nan), view.bits.get(domain, math.nan)
    change = (now - start) / start if start else math.nan
    style = "green" if change <= 0 else "red" if change > 0 else "dim"
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("▶ " if domain == view.domain else "  ", "cyan")
    line.append(display.fit(domain, width), "" if domain in view.seen else "dim")
    line.append("" if brief else f" {number(start, '6.3f'):>6} →")
    line.append(f" {number(now, '6.3f'):>6}", "bold")
    line.append(f" {percent(change, '+.1f'):>8} ", style)
    return line.append(display.sparkline(history, 8 if brief else 16), style)
