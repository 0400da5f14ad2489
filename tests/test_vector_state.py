"""Snapshots of many environments, and sets of own worlds that they draw from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from k1.data import TextData
from k1.errors import CheckpointError
from k1.topology import Topology
from k1env.instances import InstanceSet, instances, instances_over, sample_instance
from k1env.settings import Settings
from k1env.vector import Phase2VectorEnv
from k1env.world import Worlds, text_of
from tests.phase2_helpers import quick
from tests.vector_helpers import same, scripted, varied


def scripted_steps(envs: Phase2VectorEnv, turns: range) -> list[Any]:
    return [envs.step(scripted(envs.envs[0], turn)) for turn in turns]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_environments_go_on_from_a_snapshot(mode: str, data: TextData) -> None:
    fields: dict[str, Any] = {
        "config": varied(), "data": data, "device": "cpu", "autoreset_mode": mode,
    }  # fmt: skip
    envs = Phase2VectorEnv(3, **fields)
    envs.reset(seed=4)
    scripted_steps(envs, range(2))
    ended = [env.session.finished for env in envs.envs]
    assert ended == [False, mode == "NextStep", False]
    assert [env.session.shadow_diverged for env in envs.envs].count(True) >= 1
    tensors, state = envs.snapshot()
    state = json.loads(json.dumps(state))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    wanted = scripted_steps(envs, range(2, 4))
    again = envs if mode == "NextStep" else Phase2VectorEnv(3, **fields)
    again.restore(tensors, state)
    assert same(wanted, scripted_steps(again, range(2, 4)))


def test_a_snapshot_of_others_is_refused(data: TextData) -> None:
    fields: dict[str, Any] = {"config": quick(phase1_steps=0), "data": data, "device": "cpu"}
    two, three = Phase2VectorEnv(2, **fields), Phase2VectorEnv(3, **fields)
    two.reset(seed=0)
    tensors, state = two.snapshot()
    with pytest.raises(CheckpointError, match="is of 2 environments, not 3"):
        three.restore(tensors, state)
    without = {"environments": [{**entry, "seed": None} for entry in state["environments"]]}
    for entry in without["environments"]:
        del entry["generator"]
    with pytest.raises(CheckpointError, match="another version of K-1"):
        two.restore(tensors, without)


def test_a_wide_course_depends_on_nothing_but_the_snapshot(data: TextData) -> None:
    """To the last bit: what lies in lanes that nobody uses is not even near those that train."""
    one, two = (
        Phase2VectorEnv(3, config=quick(), data=data, device="cpu", wide=True) for _ in range(2)
    )
    one.reset(seed=0)
    two.reset(seed=5)
    delete = [name.startswith("delete") for name in one.actions].index(True)
    grow = one.actions.index("add under slot 0")
    one.step([grow, 0, delete])
    two.step([0, delete, grow])
    two.restore(*one.snapshot())
    used = {env.session.main for env in two.envs} | {
        env.session.shadow for env in two.envs if env.session.shadow_diverged
    }
    arena = two.envs[0].session.arena
    assert len(used) == 4, "a shadow is in use"
    for lane in set(range(arena.lanes)) - used:
        arena["weight"][lane] = torch.nan
        arena.set_tree(lane, Topology.full((1,), arena.trees[0].capacity, 4))
    for actions in ([0, grow, delete], [delete, 0, 0], [0, 0, 0]):
        first, second = one.step(actions), two.step(actions)
        assert np.array_equal(first[1], second[1])
        for name in first[0]:
            assert np.array_equal(first[0][name], second[0][name])
    lanes = [env.session.main for env in one.envs]
    hashes = [[e.envs[0].session.arena.hash_lane(lane) for lane in lanes] for e in (one, two)]
    assert hashes[0] == hashes[1]


def test_worlds_are_drawn_from_an_own_set(data: TextData) -> None:
    assert InstanceSet("train", instances("train")).draw(7) == sample_instance("train", 7)
    own = InstanceSet("own", instances_over(data.domains)["train"])
    assert len({own.draw(seed).name for seed in range(60)}) > 20
    worlds = Worlds(quick(), data.domains, own)
    assert worlds.rows == 4
    envs = Phase2VectorEnv(2, config=quick(), data=data, device="cpu", instance=own)
    envs.reset(seed=3)
    drawn = [env.session.world.instance for env in envs.envs]
    assert drawn == [own.draw(3), own.draw(4)]
    used = text_of(InstanceSet("two", instances("train")[:2]), Settings.preset("tiny"))
    domains = {domain for world in instances("train")[:2] for domain in world.domains}
    assert set(used.removeprefix("builtin:").split(",")) == domains
