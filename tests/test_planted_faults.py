"""The checks of `tests/stateful_checks.py` can fail: each planted fault is found, by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from k1.data import TextData
from k1.errors import TopologyError
from k1.topology import Block, Topology
from k1env.boundary import Bounds
from k1env.env import Phase2Env
from tests.planted_faults import FAULTS, Fault, Patch, around, perform
from tests.stateful_checks import Broken, check_tree
from tests.stateful_machines import CI, MANY, BoundaryMachine, PlayMachine, play_twice


def names(fault: Fault) -> str:
    return fault.plant.__name__


@pytest.mark.parametrize("fault", FAULTS, ids=names)
def test_a_planted_fault_is_found(
    fault: Fault, data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.plant(monkeypatch)
    with pytest.raises(Broken) as found:
        perform(fault, data, tmp_path)
    assert found.value.promise == fault.breaks


def test_without_a_fault_nothing_is_found(data: TextData, tmp_path: Path) -> None:
    """The same plays: what is found above is the fault, and nothing else."""
    for number, fault in enumerate(FAULTS):
        (tmp_path / str(number)).mkdir()
        perform(fault, data, tmp_path / str(number))


ROWS = [[0, 0, -1, 0, 0, 1], [1, 1, 0, 0, 1, 1], [2, 2, 0, 1, 1, 2], [4, 3, 1, 0, 2, 1]]
"""Slot, id, parent's slot, rank, level and ordinal of four blocks; capacity 1, 3, 4."""


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [(0, 2, 1), (1, 2, 4), (1, 2, 3), (3, 2, 0), (3, 2, 3), (2, 3, 0), (2, 3, 8), (2, 3, -1),
     (3, 0, 8), (3, 0, 3), (3, 1, 1), (3, 1, 4)],
)  # fmt: skip
def test_a_tree_that_is_none_is_found(row: int, column: int, value: int) -> None:
    """Among them a cycle, blocks cut off, beyond capacity, on the wrong level, twice the same."""
    tree = Topology((1, 3, 4), 8)
    rows = [list(r) for r in ROWS]
    tree.load_dict({"blocks": rows, "next_id": 4, "born": [1, 2, 1]})
    check_tree(tree)
    rows[row][column] = value
    with pytest.raises(TopologyError, match="is no tree"):
        tree.load_dict({"blocks": rows, "next_id": 4, "born": [1, 2, 1]})
    tree.blocks = {r[0]: Block(*r) for r in rows}
    with pytest.raises(Broken, match="tree"):
        check_tree(tree)


def test_a_bound_that_lets_nan_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def holds(self: Bounds, parameter: str, value: float) -> bool:
        low, high = self.range(parameter)
        return not (value < low or value > high)

    monkeypatch.setattr(Bounds, "holds", holds)
    with pytest.raises(Broken) as found:
        run_state_machine_as_test(BoundaryMachine, settings=MANY)
    assert found.value.promise == "mask"


def test_a_world_that_follows_no_seed_is_found(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reset(original: object, env: Phase2Env, *rest: object, **more: object) -> object:
        result = original(env, *rest, **more)  # type: ignore[operator]
        env.session.arena["weight"][0] *= 1 + 1e-3 * torch.rand(())
        return result

    around(monkeypatch, Phase2Env, "reset", reset)
    with pytest.raises(Broken) as found:
        play_twice(data, 3)
    assert found.value.promise == "same seed"


@pytest.mark.torture
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("fault", FAULTS, ids=names)
def test_a_planted_fault_is_found_by_chance(
    fault: Fault, data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a script that leads to it."""
    PlayMachine.data = data
    fault.plant(monkeypatch)
    once = settings(CI, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(Broken):
        run_state_machine_as_test(PlayMachine, settings=once)


def test_names_of_faults_are_unique(monkeypatch: Patch) -> None:
    assert len({names(fault) for fault in FAULTS}) == len(FAULTS) >= 10
