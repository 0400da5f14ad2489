"""The observation: flat float32 boxes, normalised with fixed bounds, always finite.

Nothing here is computed from the gate pool.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from gymnasium import spaces

from k1env.boundary import EVIDENCE_TO_ADVANCE
from k1env.outcome import Outcome
from k1env.schedule import Records
from k1env.session import Session

MOST_BITS = 8.0
"""Bits per byte that count as 1: what knowing nothing costs."""
LOG_MOST_INTERVALS = math.log1p(10_000)
"""Log of a budget, in intervals, that counts as 1: what a trial costs is a share of no budget."""
SYSTEM_FIELDS = (
    "training loss",
    "mean validation loss",
    "last fall",
    "share of skipped steps",
    "budget spent",
    "log of intervals left",
    "decisions made",
    "decisions into the phase",
    "agents alive",
)
HYPER_FIELDS = ("lr", "cooldown", "top_k")
BOUNDARY_FIELDS = (
    "stage 1",
    "stage 2",
    "stage 3",
    "stage 4",
    "successes",
    "evidence",
    "attempts",
    "last tried",
    "last credited",
    "shadow diverged",
)
AGENT_FIELDS = (
    "alive",
    "level",
    "age",
    "responsibility",
    "update share",
    "steps since update",
    "is leaf",
)
DOMAIN_FIELDS = ("share of the stream", "seen", "loss", "fall since Phase 2 began")


def observation_space(slots: int, domains: int) -> spaces.Space[dict[str, np.ndarray]]:
    """The space for a lane of `slots` slots (root included) and a number of domains."""

    def box(*shape: int) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (math.prod(shape),), np.float32)

    space = spaces.Dict(
        {
            "system": box(len(SYSTEM_FIELDS)),
            "hyper": box(2 * len(HYPER_FIELDS)),
            "boundary": box(len(BOUNDARY_FIELDS)),
            "agents": box(slots - 1, len(AGENT_FIELDS)),
            "domains": box(domains, len(DOMAIN_FIELDS)),
        }
    )
    return cast(spaces.Space[dict[str, np.ndarray]], space)


def observe(session: Session, last: Outcome | None, records: Records) -> dict[str, np.ndarray]:
    """Describe a session after its last decision, with the records of its lane."""
    rows = {
        "system": _system(session, last, records),
        "hyper": _hyper(session),
        "boundary": _boundary(session, last),
        "agents": _agents(session, records),
        "domains": _domains(session),
    }
    return {name: _box(values) for name, values in rows.items()}


def _box(values: Any) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    array[np.isnan(array)] = 1.0
    return np.clip(array, -1.0, 1.0).astype(np.float32).reshape(-1)


def _system(session: Session, last: Outcome | None, records: Records) -> list[float]:
    arena, settings = session.arena, session.settings
    step = max(1, session.trainer.steps)
    seen = [session.bits[d] for d in session.seen]
    return [
        float(records["loss"]) / math.log(2) / session.bytes_per_token / MOST_BITS,
        sum(seen) / len(seen) / MOST_BITS,
        math.tanh(10 * last.fall) if last else 0.0,
        float(records["skipped"]) / step,
        session.spent / settings.budget,
        math.log1p(max(0, settings.budget - session.spent) / settings.interval)
        / LOG_MOST_INTERVALS,
        session.decision / settings.max_decisions,
        session.world.into_phase(session.decision) / settings.phase_decisions,
        session.tree.agents / (arena.scratch - 1),
    ]


def _hyper(session: Session) -> list[float]:
    """Each hyper-parameter's place within the present bounds, then within the hard limits."""
    values = session.arena.get_hyper(session.main)
    places = []
    for bounds in (session.boundary.bounds, session.boundary.hard):
        for name in HYPER_FIELDS:
            low, high = (math.log(max(x, 0.5) if name != "lr" else x) for x in bounds.range(name))
            value = math.log(max(values[name], 0.5) if name != "lr" else values[name])
            places.append(2 * (value - low) / max(high - low, 1e-9) - 1)
    return places


def _boundary(session: Session, last: Outcome | None) -> list[float]:
    boundary = session.boundary
    tried = last is not None and last.trial is not None
    return [
        *[float(boundary.stage == stage) for stage in (1, 2, 3, 4)],
        boundary.successes / boundary.needed if boundary.needed else 1.0,
        math.log(boundary.evidence) / math.log(EVIDENCE_TO_ADVANCE),
        math.tanh(boundary.attempted / 50),
        float(tried),
        float(last is not None and last.credited),
        float(session.shadow_diverged),
    ]


def _agents(session: Session, records: Records) -> np.ndarray:
    arena, tree = session.arena, session.tree
    table = np.zeros((arena.scratch - 1, len(AGENT_FIELDS)))
    step = max(1, session.trainer.steps)
    names = ("born", "mean_responsibility", "updates", "last_update")
    born, mean, updates, last = (records[name] for name in names)
    most = max((float(mean[s]) for s in tree.blocks if s), default=0.0) or 1.0
    deepest = max(1, len(tree.capacity) - 1)
    parents = {block.parent for block in tree.blocks.values()}
    for slot, block in tree.blocks.items():
        if slot:
            age = step - int(born[slot])
            idle = step - int(last[slot]) if updates[slot] else age
            table[slot - 1] = (
                1.0,
                block.level / deepest,
                math.tanh(age / 1000),
                float(mean[slot]) / most,
                int(updates[slot]) / max(1, age),
                math.tanh(idle / 200),
                float(slot not in parents),
            )
    return table


def _domains(session: Session) -> list[float]:
    mix, seen, row = session.world.mix(session.decision), session.seen, []
    for domain in session.world.shown(session.decision):
        now, start = session.bits[domain], session.bits_start[domain]
        row += [mix.get(domain, 0.0), float(domain in seen), now / MOST_BITS]
        row.append(math.tanh((start - now) if domain in seen else 0.0))
    return row + [0.0] * (len(DOMAIN_FIELDS) * session.worlds.rows - len(row))
