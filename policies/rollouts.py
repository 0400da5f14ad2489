"""Rollouts in which no environment waits for another.

Stable-Baselines3 steps all environments together. A decision that is tried on copies takes ten
times as long as one that is not, so nearly every such step would take as long as a trial. What is
learned from is the same: so many decisions of each environment by one policy, in the order in which
they were made there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k1.rng import derive_seed
from k1env.env import Observation
from policies.network import ControllerNetwork
from policies.ppo import Arrays, Begun, TrainingEnv

IMPOSSIBLE = -1e8
"""Logit of an impossible action, as where the policy learns from it."""


@dataclass(frozen=True)
class Choice:
    """What a policy chose, and what it knew."""

    observation: Observation
    mask: np.ndarray
    begun: Begun
    action: int
    value: float
    log_prob: float


class Chooser:
    """Draws actions from a network on the CPU, for it sees one observation at a time."""

    def __init__(
        self, network: ControllerNetwork, env: TrainingEnv, masked: bool, seed: int
    ) -> None:
        """Take a copy of the network.

        Args:
            network: whose logits and values count.
            env: whose environments they are about.
            masked: whether impossible actions are left out.
            seed: decides the draws of each environment, however they are interleaved.
        """
        self._network = copy.deepcopy(network).cpu()
        self._env, self._masked = env, masked
        numbers = range(env.num_envs)
        self._draws = [torch.Generator().manual_seed(derive_seed("act", seed, n)) for n in numbers]
        self.made: list[list[Choice]] = [[] for _ in numbers]
        """The choices of each environment."""

    @torch.no_grad()
    def choose(self, number: int, observation: Observation) -> int:
        """Choose an environment's action."""
        batch = {name: torch.from_numpy(array)[None] for name, array in observation.items()}
        logits, value = self._network(batch)
        mask = self._env.vec_env.envs[number].action_masks()
        if self._masked:
            logits = logits.masked_fill(torch.from_numpy(mask == 0), IMPOSSIBLE)
        logs = torch.log_softmax(logits[0], dim=-1)
        action = int(torch.multinomial(logs.exp(), 1, generator=self._draws[number]))
        begun = self._env.begun(number)
        choice = Choice(observation, mask, begun, action, float(value), float(logs[action]))
        self.made[number].append(choice)
        return action


def collect(
    model: Any, env: TrainingEnv, *, masked: bool, seed: int, progress: Callable[[int], None]
) -> None:
    """Fill a model's buffer with `n_steps` decisions of every environment.

    It stands for the `collect_rollouts` of Stable-Baselines3's algorithms.

    Args:
        model: the algorithm; its environments have begun their episodes.
        env: its environment.
        masked: whether it learns with masks.
        seed: decides the actions, together with how many decisions were made before.
        progress: called with how many decisions are made, as they are.
    """
    model.policy.set_training_mode(False)
    buffer, steps = model.rollout_buffer, model.n_steps
    buffer.reset()
    chooser = Chooser(
        model.policy.network, env, masked, derive_seed("rollout", seed, model.num_timesteps)
    )

    def choose(number: int, observation: Observation) -> int:
        progress(1)
        return chooser.choose(number, observation)

    results = env.vec_env.play_each(choose, steps)
    starts, ends = model._last_episode_starts, np.zeros(env.num_envs, dtype=np.bool_)
    for step in range(steps):
        choices = [made[step] for made in chooser.made]
        found = [made[step] for made in results]
        actions = np.array([choice.action for choice in choices])
        ends = np.array([r.terminated or r.truncated for r in found])
        rewards = env.take_in(
            actions,
            [choice.begun for choice in choices],
            np.array([r.reward for r in found], dtype=np.float32),
            ends,
            [r.info if r.final is None else r.final[1] for r in found],
        )
        buffer.add(
            _stack([choice.observation for choice in choices]),
            actions[:, None],
            rewards,
            starts,
            torch.tensor([choice.value for choice in choices]),
            torch.tensor([choice.log_prob for choice in choices]),
            **({"action_masks": np.stack([choice.mask for choice in choices])} if masked else {}),
        )
        starts = ends
    model.num_timesteps += steps * env.num_envs
    model._last_obs, model._last_episode_starts = env.vec_env.observations(), ends
    buffer.compute_returns_and_advantage(_values(model, model._last_obs), ends)


def _stack(observations: list[Observation]) -> Arrays:
    return {name: np.stack([one[name] for one in observations]) for name in observations[0]}


@torch.no_grad()
def _values(model: Any, observations: Arrays) -> Tensor:
    values: Tensor = model.policy.predict_values(model.policy.obs_to_tensor(observations)[0])
    return values
