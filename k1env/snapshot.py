"""Snapshots of sessions and environments: what undo, forks and checkpoints are made of."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from k1.arena import LaneState
from k1.config import read_dataclass
from k1.errors import CheckpointError, ConfigError
from k1env.autonomy import Autonomy
from k1env.boundary import Boundary
from k1env.guard import GuardRecord
from k1env.instances import Instance
from k1env.outcome import Outcome
from k1env.settings import DEFAULT_INSTANCE

if TYPE_CHECKING:
    from k1env.env import Phase2Env
    from k1env.session import Session


@dataclass
class _Records:
    """What a session keeps as plain data, under its names."""

    decision: int
    spent: int
    first_own: int
    shadow_diverged: bool
    bits: dict[str, float]
    bits_start: dict[str, float]
    agents_start: int
    reference_flops: float
    stop_reason: str | None
    stop_criteria: list[str]
    visited: list[str]
    tries: list[dict[str, Any]]

    def __post_init__(self) -> None:
        """Refuse what no session comes to."""
        counts = (self.decision, self.spent, self.first_own, self.agents_start)
        if min(counts) < 0 or not self.reference_flops > 0:
            raise ConfigError("state: a count is below zero")


_PLAIN = tuple(field.name for field in fields(_Records))
_OTHER = "the checkpoint is of another version of K-1 ({}): resume with that one"


def take_snapshot(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything that `restore_snapshot` needs: tensors and plain JSON data."""
    lanes = {"main": session.arena.read_lane(session.main)}
    if session.shadow_diverged:
        lanes["shadow"] = session.arena.read_lane(session.shadow)
    if session.guard.best is not None:
        lanes["best"] = session.guard.best.own()
    tensors = {f"{k}.{n}": t for k, lane in lanes.items() for n, t in lane.tensors.items()}
    state = {
        "trees": {key: lane.tree.to_dict() for key, lane in lanes.items()},
        "boundary": session.boundary.to_dict(),
        "autonomy": session.autonomy.to_dict(),
        **{name: deepcopy(getattr(session, name)) for name in _PLAIN},
        "guard": session.guard.to_dict(),
        "last": asdict(session.last) if session.last else None,
    }
    return tensors, state


def restore_snapshot(session: Session, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Bring a session back to a snapshot.

    Raises:
        CheckpointError: if it belongs to another configuration.
    """
    lanes: dict[str, LaneState] = {}
    try:
        for key, tree in state["trees"].items():
            topology = session.tree.copy()
            topology.load_dict(tree)
            own = {n: t for n, t in tensors.items() if n.startswith(f"{key}.")}
            lanes[key] = LaneState({n.split(".", 1)[1]: t for n, t in own.items()}, topology)
            session.arena.check(lanes[key])
        plain = {name: state[name] for name in _PLAIN}
        records = read_dataclass(_Records, plain, "state", whole=True)
        boundary = Boundary.from_dict(state["boundary"])
        autonomy = Autonomy.from_dict(state["autonomy"])
        last = None if state["last"] is None else Outcome.from_dict(state["last"])
        guard = GuardRecord.from_dict(state["guard"])
        known = {*_PLAIN, "trees", "boundary", "autonomy", "guard", "last"}
        if state.keys() != known or not lanes.keys() <= {"main", "shadow", "best"}:
            raise CheckpointError(_OTHER.format("it has parts that a session has not"))
        needed = {"main", *(["shadow"] if records.shadow_diverged else [])}
        for bits in (records.bits, records.bits_start):
            if bits and bits.keys() != set(session.world.domains):
                raise CheckpointError(_OTHER.format("it is of other domains"))
        if not needed <= lanes.keys() or boundary.hard != session.boundary.hard:
            raise CheckpointError(_OTHER.format("its lanes or hard limits differ"))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_OTHER.format(error)) from None
    # Only now, so that a state that is refused changes nothing.
    session.arena.write_lane(session.main, lanes["main"])
    if "shadow" in lanes:
        session.arena.write_lane(session.shadow, lanes["shadow"])
    session.boundary, session.autonomy, session.last = boundary, autonomy, last
    for name in _PLAIN:
        setattr(session, name, deepcopy(getattr(records, name)))
    best = lanes["best"].to(session.arena.device) if "best" in lanes else None
    session.guard.load(guard, best)


def take_vector_snapshot(
    envs: Sequence[Phase2Env], ended: np.ndarray
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything that `restore_vector_snapshot` needs: tensors and plain JSON data.

    Args:
        envs: environments that live side by side.
        ended: which of them wait for a reset, bool [environments].
    """
    tensors: dict[str, Tensor] = {}
    states = []
    for number, env in enumerate(envs):
        own, session = env.session.snapshot()
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        world = env.session.world.instance
        states.append(
            {
                "seed": env.session.seed,
                "instance": None if world is None else asdict(world),
                "session": session,
                "generator": env.np_random.bit_generator.state,
                "ended": bool(ended[number]),
            }
        )
    return tensors, {"environments": states}


def restore_vector_snapshot(
    envs: Sequence[Phase2Env], tensors: dict[str, Tensor], state: dict[str, Any]
) -> np.ndarray:
    """Bring environments back to a snapshot; returns which of them wait for a reset.

    Raises:
        CheckpointError: if it belongs to another configuration, or to more or fewer environments.
    """
    own: list[dict[str, Tensor]] = [{} for _ in envs]
    try:
        states = state["environments"]
        if len(states) != len(envs):
            raise CheckpointError(
                f"the checkpoint is of {len(states)} environments, not {len(envs)}: make as many"
            )
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            own[int(number)][rest] = tensor
        for env, mine, saved in zip(envs, own, states, strict=True):
            entry = saved["instance"]
            world = None if entry is None else read_dataclass(Instance, entry, "instance")
            env.session.rebind(saved["seed"], DEFAULT_INSTANCE if world is None else world)
            env.session.restore(mine, saved["session"])
            env.np_random.bit_generator.state = saved["generator"]
        return np.array([saved["ended"] for saved in states], dtype=np.bool_)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(_OTHER.format(error)) from None
