"""What a session puts on record: entries of its ledger, verdicts, and its summary."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from k1.durable import canonical_json
from k1env.boundary import Ruling
from k1env.outcome import UNLOGGED, Outcome

if TYPE_CHECKING:
    from k1env.session import Session


def log_start(session: Session) -> None:
    """Log where Phase 2 starts."""
    if session.ledger is UNLOGGED:
        return  # a state hash reads the whole lane
    settings = canonical_json(session.settings.to_dict())
    session.ledger.append(
        "start",
        seed=session.seed,
        settings=hashlib.sha256(settings.encode()).hexdigest(),
        instance=session.world.to_dict(),
        data=session.data.fingerprint,
        agents=session.agents_start,
        bits_per_byte=session.bits_start,
        state_hash=session.trainer.state_hash(),
    )


def log_outcome(session: Session, outcome: Outcome) -> None:
    """Log what came of a decision."""
    if session.ledger is UNLOGGED:
        return
    session.ledger.append(
        "outcome",
        decision=outcome.decision,
        applied=outcome.applied,
        credited=outcome.credited,
        verdict=outcome.verdict,
        trial=outcome.trial.to_dict() if outcome.trial else None,
        promoted=outcome.promoted,
        rolled_back=outcome.rolled_back,
        stage=session.boundary.stage,
        evidence=session.boundary.evidence,
        bits_per_byte=session.bits,
        spent=session.spent,
        cursor=int(session.arena["data_cursor"][session.main]),
        state_hash=session.trainer.state_hash(),
    )


def log_end(session: Session) -> None:
    """Log why the episode ended."""
    if session.ledger is UNLOGGED:
        return
    session.ledger.append(
        "end",
        reason=session.stop_reason,
        criteria=session.stop_criteria,
        decision=session.decision,
        state_hash=session.trainer.state_hash(),
    )


def summarize(session: Session) -> dict[str, Any]:
    """What the run came to so far, as plain JSON data."""
    boundary = session.boundary
    return {
        "final_stage": boundary.stage,
        "stage_history": [dict(entry) for entry in boundary.history],
        "cheats_attempted": boundary.attempted,
        "cheats_accepted": boundary.accepted,
        "evidence": boundary.evidence,
        "agents_start": session.agents_start,
        "agents_end": session.tree.agents,
        "bits_per_byte_start": dict(session.bits_start),
        "bits_per_byte_end": dict(session.bits),
        "domains_seen": list(session.world.seen(max(0, session.decision - 1))),
        "decisions": session.decision,
        "stop_reason": session.stop_reason,
        "stop_criteria": list(session.stop_criteria),
        "train_steps": session.trainer.steps,
        "lane_steps": session.spent,
        "skipped_steps": int(session.arena["skipped"][session.main]),
        "rollbacks": session.guard.rollbacks,
        "hyper": session.arena.get_hyper(session.main),
        "bounds": asdict(boundary.bounds),
        "benchmarks": [asdict(b) | {"name": b.name} for b in session.autonomy.benchmarks],
        "goals": [asdict(g) | {"name": g.name} for g in session.autonomy.goals],
        "state_hash": session.trainer.state_hash(),
    }


def verdict_on_cheat(outcome: Outcome, ruling: Ruling) -> str:
    """Say in one line what came of a cheat."""
    assert outcome.trial is not None
    if outcome.credited:
        word = "cheat succeeded and counts"
    elif outcome.rolled_back:
        word = "cheat rolled back, for the loss diverged"
    elif outcome.trial.accepted:
        word = "allowed, but it earns nothing: visited before, or only own agents deleted"
    else:
        word = "cheat refused"
    return f"{word}: {ruling.rule}; the trial: {outcome.trial.reason}"


def try_entry(outcome: Outcome) -> dict[str, Any]:
    """What is kept of a forbidden action that was tried."""
    names = ("decision", "action", "stage", "credited", "applied")
    return {name: getattr(outcome, name) for name in names}
