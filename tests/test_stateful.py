"""Whatever a controller does, in any order, the promises hold.

`PlayMachine` plays the environment end to end, with real trials: the gate's sizes are the smallest
there are, and in two of its three settings its margin is so low that trials accept much, since
stages are opened by successes alone. `BoundaryMachine` has no trials: there the verdicts are
invented, to reach what real ones reach in days. Which fault each check finds is in
`tests/test_planted_faults.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from k1.data import TextData
from k1.errors import K1Error
from k1env.env import Phase2Env
from tests.phase2_helpers import smallest
from tests.stateful_machines import (
    CI,
    GATES,
    MANY,
    OBJECTS,
    STARTS,
    BoundaryMachine,
    PlayMachine,
    boundary_of,
    play_twice,
)
from tests.stateful_player import COUNTS, Auditor


@pytest.mark.timeout(1_200)
def test_no_sequence_of_actions_breaks_a_promise(data: TextData) -> None:
    PlayMachine.data = data
    before = Counter(COUNTS)
    run_state_machine_as_test(PlayMachine, settings=CI)
    print(dict(COUNTS - before))


@pytest.mark.torture
@pytest.mark.timeout(7_200)
def test_no_long_sequence_of_actions_breaks_a_promise(data: TextData) -> None:
    PlayMachine.data = data
    full = settings(CI, max_examples=300, stateful_step_count=50, derandomize=False)
    before = Counter(COUNTS)
    run_state_machine_as_test(PlayMachine, settings=full)
    print(dict(COUNTS - before))


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("start", sorted(STARTS))
def test_every_stage_and_gate_is_played(
    gate: str, start: str, data: TextData, tmp_path: Path
) -> None:
    """A walk that is sure to try much: what is forbidden, when there is something."""
    rng = np.random.default_rng(len(start))
    env = Phase2Env(config=smallest(GATES[gate]), data=data)
    play = Auditor(env, tmp_path, seed=1, boundary=boundary_of(*STARTS[start]))
    for _ in range(5):
        mask = env.action_masks() - env.permitted_mask()
        choices = np.flatnonzero(mask if mask.any() and rng.random() < 0.7 else env.action_masks())
        play.step(rng.choice(choices))
    play.close()
    attempted = env.session.boundary.attempted - play.base.attempted
    assert play.decisions > 0 and (attempted > 0) == (start != "stage 4")


def test_every_object_as_an_action_works_or_raises(data: TextData, tmp_path: Path) -> None:
    play = Auditor(Phase2Env(config=smallest(), data=data), tmp_path)
    for thing in OBJECTS:
        play.offer(thing)
    assert 0 < play.decisions < len(OBJECTS) / 4
    play.close()


def test_the_same_seed_gives_the_same_hundred_steps(data: TextData) -> None:
    play_twice(data, 100)


def test_a_step_before_the_first_reset_is_an_error(data: TextData) -> None:
    env = Phase2Env(config=smallest(), data=data)
    before = env.session.trainer.state_hash()
    with pytest.raises(K1Error, match=r"no episode has begun: call reset\(\) first"):
        env.step(0)
    assert env.session.trainer.state_hash() == before and not env.ledger.entries


def test_no_sequence_of_verdicts_breaks_the_boundary() -> None:
    run_state_machine_as_test(BoundaryMachine, settings=MANY)


@pytest.mark.torture
@pytest.mark.timeout(7_200)
def test_no_long_sequence_of_verdicts_breaks_the_boundary() -> None:
    many = settings(MANY, max_examples=5_000, stateful_step_count=100, derandomize=False)
    run_state_machine_as_test(BoundaryMachine, settings=many)
