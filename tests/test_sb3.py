"""The vector environment behind Stable-Baselines3's interface, held against its DummyVecEnv."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from k1.data import TextData
from k1.errors import K1Error
from k1env.env import Phase2Env
from k1env.instances import Instance
from k1env.observation import SYSTEM_FIELDS
from k1env.vector import Phase2VectorEnv
from tests.phase2_helpers import ROOT, environment, quick
from tests.vector_helpers import same, scripted, varied

pytest.importorskip("stable_baselines3")


def test_it_does_what_a_dummy_over_single_environments_does(data: TextData) -> None:
    from gymnasium.wrappers import TimeLimit
    from stable_baselines3.common.vec_env import DummyVecEnv

    from k1env import SB3VecEnv

    settings = varied()
    settings[2] = quick(budget=5)  # the budget ends it; `stop`, in stage 4, the next
    dummy = DummyVecEnv([lambda s=s: Phase2Env(config=s, data=data) for s in settings])
    ours = SB3VecEnv(Phase2VectorEnv(3, config=settings, data=data, device="cpu"))
    assert ours.observation_space == dummy.observation_space
    assert ours.action_space == dummy.action_space and ours.metadata == dummy.metadata
    assert ours.seed(4) == dummy.seed(4) == [4, 5, 6]
    assert same(dict(dummy.reset()), ours.reset())
    assert same(dummy.reset_infos, ours.reset_infos)
    ends = []
    for turn in range(6):
        if turn == 3:
            for venv in (dummy, ours):
                venv.get_attr("session")[0].boundary.stage = 4
        assert same(dummy.env_method("action_masks"), ours.env_method("action_masks"))
        actions = np.array(scripted(ours.vec_env.envs[0], turn))
        if turn == 3:
            actions[0] = ours.vec_env.actions.index("stop")
        one, other = dummy.step(actions), ours.step(actions)
        assert same((dict(one[0]), *one[1:]), other)
        assert same(dummy.reset_infos, ours.reset_infos)
        ends += [info["TimeLimit.truncated"] for info in other[3] if "terminal_observation" in info]
    assert sorted(set(ends)) == [False, True], "some stopped, some ran out of budget"
    assert ours.env_is_wrapped(TimeLimit) == dummy.env_is_wrapped(TimeLimit) == [False] * 3
    assert same(
        ours.env_method("action_masks", indices=1), dummy.env_method("action_masks", indices=1)
    )
    ours.set_attr("mark", 5, indices=[0, 2])
    assert ours.get_attr("mark", [0, 2]) == [5, 5] and not ours.has_attr("mark")
    assert ours.has_attr("action_masks") and ours.get_attr("render_mode") == [None] * 3
    ours.close()
    assert ours.vec_env.closed


def test_options_name_worlds(data: TextData) -> None:
    from stable_baselines3.common.vec_env import DummyVecEnv

    from k1env import SB3VecEnv

    world = Instance(
        name="own", domains=("gamma",), shifts=(), branching=(3, 2), lr=3e-3, cooldown=7, top_k=2,
        exploration=0.25, pretrained=False, budget=90, seed=11,
    )  # fmt: skip
    other = replace(world, domains=("alpha",), branching=(2, 2, 2))
    fields = {"config": quick(), "data": data, "instance": world}
    dummy = DummyVecEnv([lambda: Phase2Env(**fields)] * 2)
    ours = SB3VecEnv(num_envs=2, device="cpu", **fields)
    for venv in (dummy, ours):
        venv.seed(1)
    for _ in range(2):
        assert same(dict(dummy.reset()), ours.reset())
        assert same(dummy.reset_infos, ours.reset_infos)
        for venv in (dummy, ours):
            venv.seed(3)
            venv.set_options([{}, {"instance": other}])


def test_it_makes_its_environment_itself(data: TextData) -> None:
    from k1env import SB3VecEnv

    made = SB3VecEnv(num_envs=2, config=quick(phase1_steps=0), data=data, device="cpu")
    assert made.num_envs == 2 and made.reset()["system"].shape == (2, len(SYSTEM_FIELDS))
    with pytest.raises(K1Error, match="preset come too late"):
        SB3VecEnv(made.vec_env, preset="tiny")
    late = Phase2VectorEnv(2, config=quick(), data=data, device="cpu", autoreset_mode="NextStep")
    with pytest.raises(K1Error, match="SAME_STEP"):
        SB3VecEnv(late)


def test_it_learns(data: TextData) -> None:
    from stable_baselines3 import PPO

    from k1env import SB3VecEnv

    env = SB3VecEnv(num_envs=2, config=quick(phase1_steps=0), data=data, device="cpu")
    model = PPO("MultiInputPolicy", env, n_steps=2, batch_size=4, n_epochs=1, device="cpu", seed=0)
    model.learn(4)
    assert model.num_timesteps == 4


def test_stable_baselines_is_loaded_only_when_it_is_used() -> None:
    code = "import sys, k1env.vector; assert 'stable_baselines3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment())
