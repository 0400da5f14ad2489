"""PPO around the controller's network: whose logits act, what rewards and ends it learns from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from k1.config import Config
from k1.data import TextData
from k1.errors import ConfigError, K1Error
from k1env.actions import action_table
from k1env.observation import AGENT_FIELDS, observation_space
from k1env.sb3 import SB3VecEnv
from policies.network import NetworkSizes
from policies.ppo import ALGORITHMS, MaskedPolicy, RunningScale, TrainingEnv, make_model
from policies.ppo_settings import PPOSettings
from policies.reference import Reference, train_on_alone
from tests.phase2_helpers import quick

SIZES = NetworkSizes(slot=8, domain=4, whole=16)
SETTINGS = PPOSettings(n_steps=4, minibatches=2, epochs=1)
TABLE = action_table(Config.preset("tiny").model)
LABELS = tuple(action.label for action in TABLE)


def training_env(data: TextData, settings: PPOSettings = SETTINGS, **fields: Any) -> TrainingEnv:
    config = quick(phase1_steps=0, **fields)
    venv = SB3VecEnv(num_envs=2, config=config, data=data, device="cpu")
    return TrainingEnv(venv, settings, TABLE)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_the_networks_logits_are_the_policys(algorithm: str, data: TextData) -> None:
    env = training_env(data)
    model = make_model(algorithm, env, env.settings, LABELS, SIZES, seed=3, device="cpu")
    before = {n: t.clone() for n, t in model.policy.network.state_dict().items()}
    model.learn(8)
    assert model.num_timesteps == 8 and env.counts["decisions"] == 8
    after = model.policy.network.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trained = sum(p.numel() for p in model.policy.parameters())
    assert trained == sum(p.numel() for p in model.policy.network.parameters())
    rows = model.policy.obs_to_tensor(model._last_obs)[0]
    logits, values = model.policy.network(rows)
    inside = model.policy.get_distribution(rows).distribution.logits
    torch.testing.assert_close(inside, torch.log_softmax(logits, -1))
    torch.testing.assert_close(model.policy.predict_values(rows), values)
    if algorithm == "maskable":
        assert env.counts["impossible"] == 0
        masks = np.zeros((2, len(LABELS)), np.int8)
        masks[:, 5] = 1
        chosen, _ = model.policy.predict(model._last_obs, action_masks=masks)
        assert chosen.tolist() == [5, 5]


def test_the_end_of_the_budget_is_an_end_and_episodes_are_recorded(data: TextData) -> None:
    env = training_env(data, replace(SETTINGS, normalise=False), max_decisions=3)
    env.reset()
    sums, still = np.zeros(2), np.zeros(2, dtype=np.int64)
    for turn in range(6):
        _, rewards, ends, infos = env.step(still)
        sums += rewards
        assert ends.tolist() == [turn % 3 == 2] * 2
        assert not any(info["TimeLimit.truncated"] for info in infos)
        if turn == 2:
            assert all("terminal_observation" in info for info in infos)
            assert [e.total for e in env.episodes] == pytest.approx(sums.tolist())
    assert [(e.length, e.stage) for e in env.episodes] == [(3, 1)] * 4
    assert env.counts["noop"] == env.counts["decisions"] == 12


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(data: TextData) -> None:
    plain = training_env(data, replace(SETTINGS, normalise=False), max_decisions=3)
    scaled = training_env(data, replace(SETTINGS, gamma=0.9), max_decisions=3)
    for env in (plain, scaled):
        env.seed(1)
        env.reset()
    returns, seen = np.zeros(2), list[float]()
    for _ in range(7):
        _, raw, ends, _ = plain.step(np.zeros(2, dtype=np.int64))
        _, got, _, _ = scaled.step(np.zeros(2, dtype=np.int64))
        returns = 0.9 * returns + raw
        seen += returns.tolist()
        returns[ends] = 0.0
        np.testing.assert_allclose(got, np.clip(raw / np.std(seen), -10, 10), rtol=1e-4)


def test_the_scale_goes_on_from_its_state() -> None:
    one, other = RunningScale(2), RunningScale(2)
    assert one.deviation == 1.0
    for scale in (one, other):
        scale.update(np.array([1.0, 4.0]), np.array([False, True]), 0.9)
    again = RunningScale(2)
    again.load_state_dict(one.state_dict())
    more = np.array([2.0, -3.0]), np.array([False, False]), 0.9
    assert again.update(*more) == one.update(*more) == other.update(*more)


def test_mistakes(data: TextData) -> None:
    env = training_env(data)
    with pytest.raises(K1Error, match="unknown algorithm 'dqn': choose maskable or plain"):
        make_model("dqn", env, env.settings, LABELS, SIZES, seed=0, device="cpu")
    env.settings = replace(SETTINGS, minibatches=3)
    with pytest.raises(K1Error, match="minibatches = 3 does not cut 8 decisions"):
        make_model("maskable", env, env.settings, LABELS, SIZES, seed=0, device="cpu")
    with pytest.raises(ConfigError, match=r"gamma = 1\.5 is not possible: above 0 and at most 1"):
        PPOSettings(gamma=1.5)


class Weeding(gym.Env[dict[str, np.ndarray], np.int64]):
    """A task of one decision: delete the slot with the least responsibility of those alive."""

    observation_space = observation_space(15, 3)
    action_space = spaces.Discrete(len(LABELS))  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        row = {n: np.zeros(s.shape, np.float32) for n, s in self.observation_space.items()}  # type: ignore[attr-defined]
        agents = row["agents"].reshape(14, len(AGENT_FIELDS))
        alive = self.np_random.permutation(14)[: self.np_random.integers(4, 12)]
        agents[alive, 0] = 1.0
        agents[alive, 3] = self.np_random.uniform(0.3, 1.0, len(alive))
        agents[alive[0], 3] = 0.0
        self.wanted = LABELS.index(f"delete slot {alive[0] + 1}")
        self.alive = {f"delete slot {s + 1}" for s in alive} | {"no-op", "stop"}
        return row, {}

    def action_masks(self) -> np.ndarray:
        return np.array([label in self.alive for label in LABELS])

    def step(self, action: np.int64) -> Any:
        reward = float(action == self.wanted)
        return self.reset()[0], reward, True, False, {}


@pytest.mark.slow
def test_it_learns_to_pick_a_slot_by_what_the_slot_holds() -> None:
    from sb3_contrib import MaskablePPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    sizes = NetworkSizes(noop_bias=0.0, slot_bias=0.0)
    venv = DummyVecEnv([Weeding] * 8)
    model = MaskablePPO(
        MaskedPolicy, venv, n_steps=64, batch_size=128, n_epochs=6, learning_rate=1e-3, seed=0,
        policy_kwargs={"actions": LABELS, "sizes": sizes}, device="cpu",
    )  # fmt: skip

    def share_right() -> float:
        rows = venv.reset()
        hits = 0
        for _ in range(50):
            masks = np.stack(venv.env_method("action_masks"))
            wanted = venv.get_attr("wanted")
            chosen, _ = model.predict(rows, action_masks=masks, deterministic=True)
            hits += int((chosen == wanted).sum())
            rows, _, _, _ = venv.step(chosen)
        return hits / 400

    assert share_right() < 0.5
    model.learn(15_000)
    assert share_right() > 0.9


def test_training_on_alone_gains_nothing_and_all_else_its_difference(data: TextData) -> None:
    """Paired rewards add up to the return less the no-op's, whatever is tried on the way."""
    config = quick(phase1_steps=3, max_decisions=6, budget=30)
    venv = SB3VecEnv(num_envs=2, config=config, data=data, device="cpu", starts=3)
    env = TrainingEnv(venv, replace(SETTINGS, normalise=False), TABLE)
    env.reference = train_on_alone(env.vec_env, range(3))
    assert sorted(env.reference.curves) == [0, 1, 2]
    env.seed(4)  # seeds 4 and 5 stand for 1 and 2
    env.reset()
    while not env.episodes:
        rewards = env.step(np.zeros(2, dtype=np.int64))[1]
        assert np.abs(rewards).max() < 1e-5, "the same bits on a CPU, but for sums of them"
    assert all(abs(episode.gain) < 1e-4 for episode in env.episodes)

    env.episodes.clear()
    actions = [LABELS.index(name) for name in ("tune lr x2", "add under slot 0", "no-op")]
    for turn in range(12):
        env.step(np.full(2, actions[turn % 3]))
    assert env.episodes
    returns = {seed: curve[-1] for seed, curve in env.reference.curves.items()}
    for episode in env.episodes:
        assert episode.gain is not None
        assert any(abs(episode.total - r - episode.gain) < 1e-3 for r in returns.values())


def test_what_is_forgone_by_ending_early_counts() -> None:
    reference = Reference({7: [0.0, 4.0, 6.0, 7.0]})
    assert reference.between(7, 0, 1) == 4.0
    assert reference.between(7, 0.5, 1.5) == 3.0
    assert reference.rest(7, 1) == 3.0
    assert reference.between(7, 3, 9) == 0.0 and reference.rest(7, 5) == 0.0


def test_a_reference_survives_a_save(data: TextData) -> None:
    env = training_env(data, replace(SETTINGS, paired=True))
    env.reference = Reference({3: [0.0, 1.5], 0: [0.0, -2.0]})
    kept = json.loads(json.dumps(env.state_dict()))
    other = training_env(data, replace(SETTINGS, paired=True))
    other.load_state_dict(kept)
    assert other.reference == env.reference
