"""Faults to plant in the code, each a promise broken on purpose, and a play that meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import k1env.env
import k1env.gate
import k1env.session
from k1.data import TextData
from k1.topology import Topology
from k1env import boundary
from k1env.boundary import Boundary, Bounds
from k1env.env import Phase2Env
from k1env.gate import CHEAT, CONTROL, SHADOW, Gate
from k1env.guard import DivergenceGuard
from k1env.ledger import Ledger
from k1env.moves import Moves
from k1env.session import Session
from tests.phase2_helpers import index_of, smallest
from tests.stateful_machines import GATES, boundary_of
from tests.stateful_player import Auditor

Patch = pytest.MonkeyPatch


def around(patch: Patch, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Replace a function by one that gets the original first."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: wrap(original, *a, **k))


def after_trial(patch: Patch, change: Callable[[Gate, Any], None]) -> None:
    """Do something to the gate when a trial is over."""

    def trial(original: Any, gate: Gate, *rest: Any, **more: Any) -> Any:
        result = yield from original(gate, *rest, **more)
        change(gate, result)
        return result

    around(patch, Gate, "trial", trial)


# -- the faults ----------------------------------------------------------------------------------


def refusal_keeps_the_cheat(patch: Patch) -> None:
    after_trial(patch, lambda gate, result: gate.adopted.update({CONTROL: gate.adopted[CHEAT]}))


def refusal_leaves_the_shadow_behind(patch: Patch) -> None:
    after_trial(patch, lambda gate, result: gate.adopted.pop(SHADOW, None))


def trial_writes_into_its_parent(patch: Patch) -> None:
    def train(original: Any, gate: Gate, *rest: Any, **more: Any) -> Any:
        gate.engine.arena["weight"][0] *= 1.001
        return original(gate, *rest, **more)

    around(patch, Gate, "_train", train)


def trial_draws_from_a_global_generator(patch: Patch) -> None:
    after_trial(patch, lambda gate, result: torch.rand(1))


def every_comparison_passes(patch: Patch) -> None:
    def compare(original: Any, *rest: Any, **more: Any) -> Any:
        return replace(original(*rest, **more), passed=True)

    around(patch, k1env.gate, "compare", compare)


def failure_is_evidence(patch: Patch) -> None:
    patch.setattr(boundary, "FAILURE_FACTOR", 10.0)


def stage_jumps_by_two(patch: Patch) -> None:
    def record(original: Any, self: Boundary, *rest: Any) -> bool:
        promoted = original(self, *rest)
        self.stage += promoted
        return bool(promoted)

    around(patch, Boundary, "record", record)


def stage_opens_without_evidence(patch: Patch) -> None:
    patch.setattr(boundary, "EVIDENCE_TO_ADVANCE", 0.0)


def refusals_are_credited(patch: Patch) -> None:
    around(patch, Boundary, "record", lambda original, self, _, *rest: original(self, True, *rest))


def visited_states_are_credited(patch: Patch) -> None:
    around(patch, Moves, "signature", lambda original, *_: str(np.random.default_rng().random()))


def bounds_widen_past_the_hard_limits(patch: Patch) -> None:
    def widen(original: Any, self: Boundary, request: Any) -> None:
        original(self, request)
        self.bounds = self.bounds.with_range("lr", (1e-4, 1.0))

    around(patch, Boundary, "_widen", widen)


def hard_limits_are_not_asked(patch: Patch) -> None:
    patch.setattr(Bounds, "holds", lambda *_: True)


def tree_may_be_cut_down_to_nothing(patch: Patch) -> None:
    patch.setattr(boundary, "HARD_MIN_AGENTS", 0)


def stage_1_permits_deletion(patch: Patch) -> None:
    def rule(original: Any, self: Boundary, request: Any) -> Any:
        return replace(original(self, request), permitted=True)

    around(patch, Boundary, "rule", rule)


def mask_is_wrong_by_one_action(patch: Patch) -> None:
    def masks(original: Any, moves: Moves, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        possible, permitted = original(moves, *arguments)
        possible[[action.label for action in moves.table].index("delete slot 3")] ^= 1
        return possible, permitted

    around(patch, Moves, "masks", masks)


def masks_contradict_each_other(patch: Patch) -> None:
    def masks(original: Any, env: Phase2Env) -> np.ndarray:
        mask: np.ndarray = original(env)
        mask[index_of(env, "delete slot 3")] ^= 1
        return mask

    around(patch, Phase2Env, "action_masks", masks)


def deletion_orphans_children(patch: Patch) -> None:
    def remove(original: Any, tree: Topology, slot: int) -> list[int]:
        del tree.blocks[slot]
        tree._by_parent = None
        return [slot]

    around(patch, Topology, "remove", remove)


def siblings_share_a_router_column(patch: Patch) -> None:
    def insert(original: Any, tree: Topology, parent: int) -> int:
        slot: int = original(tree, parent)
        tree.blocks[slot] = replace(tree.blocks[slot], rank=0)
        return slot

    around(patch, Topology, "insert", insert)


def not_a_number_gets_in(patch: Patch) -> None:
    def train(original: Any, self: Session, outcome: Any) -> Any:
        yield from original(self, outcome)
        self.arena["mean_responsibility"][self.main, 1] = torch.nan

    around(patch, Session, "_train", train)


def impossible_actions_are_not_idle(patch: Patch) -> None:
    def train(original: Any, self: Session, outcome: Any) -> Any:
        yield from original(self, outcome)
        if outcome.impossible:
            yield from original(self, outcome)

    around(patch, Session, "_train", train)


def observations_share_their_arrays(patch: Patch) -> None:
    kept: dict[str, np.ndarray] = {}

    def observe(original: Any, *rest: Any) -> dict[str, np.ndarray]:
        for name, row in original(*rest).items():
            kept.setdefault(name, row)[:] = row
        return dict(kept)

    around(patch, k1env.env, "observe", observe)


def outcome_is_not_logged(patch: Patch) -> None:
    patch.setattr(k1env.session, "log_outcome", lambda *_: None)


def ledger_is_rewritten(patch: Patch) -> None:
    def write(original: Any, self: Ledger, line: bytes) -> None:
        original(self, line.replace(b'"decision":0', b'"decision":9'))

    around(patch, Ledger, "_write", write)


def restore_forgets_the_guard(patch: Patch) -> None:
    patch.setattr(DivergenceGuard, "load", lambda self, *_: None)


def restore_forgets_the_optimizer(patch: Patch) -> None:
    def restore(original: Any, session: Session, *rest: Any) -> None:
        original(session, *rest)
        session.arena["second"][session.main] = 0

    around(patch, k1env.session, "restore_snapshot", restore)


def undo_forgets_the_attempt(patch: Patch) -> None:
    def undo(original: Any, env: Phase2Env) -> Any:
        env.session.last = None
        return original(env)

    around(patch, Phase2Env, "undo", undo)


def peek_is_counted(patch: Patch) -> None:
    def fork(original: Any, env: Phase2Env) -> Phase2Env:
        twin: Phase2Env = original(env)
        twin.session.boundary = env.session.boundary
        return twin

    around(patch, Phase2Env, "fork", fork)


def rollback_keeps_the_moments(patch: Patch) -> None:
    def check(original: Any, guard: DivergenceGuard, *rest: Any) -> bool:
        moments = guard.arena["first"][guard.lane].clone()
        went_back: bool = original(guard, *rest)
        guard.arena["first"][guard.lane] = moments
        return went_back

    around(patch, DivergenceGuard, "check", check)


def rollback_meets_the_same_data(patch: Patch) -> None:
    def check(original: Any, guard: DivergenceGuard, *rest: Any) -> bool:
        went_back: bool = original(guard, *rest)
        if went_back and guard.best is not None:
            guard.arena["data_cursor"][guard.lane] = guard.best.tensors["data_cursor"]
        return went_back

    around(patch, DivergenceGuard, "check", check)


def fractions_pass_for_integers(patch: Patch) -> None:
    patch.setattr(Moves, "look_up", lambda self, index: self.table[int(index)])


def errors_leave_a_trace(patch: Patch) -> None:
    def look_up(original: Any, moves: Moves, index: Any) -> Any:
        moves.arena["data_cursor"][moves.lane] += 1
        return original(moves, index)

    around(patch, Moves, "look_up", look_up)


# -- a play for each -----------------------------------------------------------------------------

TRY, ADD, OWN = "tune lr x0.1", "add under slot 0", "tune lr x0.5"


@dataclass(frozen=True)
class Fault:
    """A fault, the promises that it breaks, and a short play in which it shows."""

    plant: Callable[[Patch], None]
    breaks: str
    """The name of the check that has to find it first."""
    script: tuple[str, ...]
    """Labels of actions; `peek`, `reload`, `undo`, `harm` and `offer` as in `perform`."""
    gate: str = "strict"
    stage: int = 1
    successes: int = 0
    evidence: float = 1.0


FAULTS = (
    Fault(refusal_keeps_the_cheat, "refusal", (TRY,)),
    Fault(refusal_leaves_the_shadow_behind, "refusal", (ADD, TRY)),
    Fault(trial_writes_into_its_parent, "trials", (TRY,)),
    Fault(trial_draws_from_a_global_generator, "generators", (TRY,)),
    Fault(every_comparison_passes, "verdict", (TRY, OWN, "prune 10%")),
    Fault(failure_is_evidence, "evidence", (TRY,)),
    Fault(stage_jumps_by_two, "stage", (TRY,), "lenient", 1, 2, 10.0),
    Fault(stage_opens_without_evidence, "stage", (TRY,), "lenient", 1, 2, 1e-3),
    Fault(refusals_are_credited, "credits", (TRY,)),
    Fault(visited_states_are_credited, "credits", (OWN, "tune lr x2"), "lenient"),
    Fault(bounds_widen_past_the_hard_limits, "bounds", (TRY,), "lenient"),
    Fault(hard_limits_are_not_asked, "mask", ("no-op", *["tune lr x10"] * 3), stage=4),
    Fault(tree_may_be_cut_down_to_nothing, "hard limits", ("no-op",)),
    Fault(stage_1_permits_deletion, "mask", ("delete slot 5",)),
    Fault(mask_is_wrong_by_one_action, "mask", ("no-op",)),
    Fault(masks_contradict_each_other, "mask", ("no-op",)),
    Fault(deletion_orphans_children, "mask", ("no-op",), stage=4),
    Fault(siblings_share_a_router_column, "tree", ("no-op",)),
    Fault(not_a_number_gets_in, "finite", ("no-op",)),
    Fault(impossible_actions_are_not_idle, "replay", ("delete slot 3",)),
    Fault(observations_share_their_arrays, "arrays", ("no-op", "no-op")),
    Fault(outcome_is_not_logged, "records", ("no-op",)),
    Fault(ledger_is_rewritten, "hash chain", ("no-op",)),
    Fault(restore_forgets_the_guard, "restore", ("no-op", "reload no-op")),
    Fault(restore_forgets_the_optimizer, "restore", ("no-op", "reload no-op")),
    Fault(undo_forgets_the_attempt, "evidence", (TRY, "undo")),
    Fault(peek_is_counted, "peek", (f"peek {TRY}",)),
    Fault(rollback_keeps_the_moments, "rollback", ("no-op", "harm", "no-op")),
    Fault(rollback_meets_the_same_data, "rollback", ("no-op", "harm", "no-op")),
    Fault(fractions_pass_for_integers, "any object", ("offer",)),
    Fault(errors_leave_a_trace, "any object", ("offer",)),
)


def perform(fault: Fault, data: TextData, folder: Path) -> Auditor:
    """Play a fault's script under all checks; whether the fault is planted is up to the caller."""
    start = boundary_of(fault.stage, fault.successes, fault.evidence)
    env = Phase2Env(config=smallest(GATES[fault.gate]), data=data)
    play = Auditor(env, folder, boundary=start)
    for line in fault.script:
        verb, _, label = line.partition(" ")
        if verb == "undo":
            play.undo()
        elif verb == "offer":
            play.offer(0.9)
        elif verb == "harm":  # enough for the guard to step in
            play.env.session.arena["shared"][0] *= -20.0
        elif verb in ("peek", "reload"):
            getattr(play, verb)(index_of(play.env, label))
        else:
            play.step(index_of(play.env, line))
    play.close()
    return play
