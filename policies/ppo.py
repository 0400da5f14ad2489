"""PPO on the vector environment: Stable-Baselines3's algorithms around the controller's network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor, nn

from k1.errors import K1Error
from k1env.actions import Action
from k1env.sb3 import SB3VecEnv
from policies.network import ControllerNetwork, Layout, NetworkSizes
from policies.ppo_settings import PPOSettings
from policies.reference import Reference

ALGORITHMS = {"maskable": MaskablePPO, "plain": PPO}
Arrays = dict[str, np.ndarray]


class _AsItIs(BaseFeaturesExtractor):
    """Hands the observation's vectors on to the network."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, features_dim=1)

    def forward(self, observations: dict[str, Tensor]) -> dict[str, Tensor]:
        return observations


class _Heads(nn.Module):
    """The network under the names that Stable-Baselines3 calls its parts by."""

    def __init__(self, network: ControllerNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, values = self.network(observation)
        return logits, values

    def forward_actor(self, observation: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.network.actor(observation)
        return logits

    def forward_critic(self, observation: dict[str, Tensor]) -> Tensor:
        values: Tensor = self.network.critic(observation)
        return values


class _WithNetwork:
    """Makes a policy's logits and values come from the network, with no layers behind it."""

    mlp_extractor: Any
    action_net: Any
    value_net: Any
    optimizer: Any

    def __init__(
        self, *args: Any, actions: Sequence[str], sizes: NetworkSizes, **options: Any
    ) -> None:
        self.layout, self.sizes = Layout.of(actions), sizes
        super().__init__(*args, **options, **{"features_extractor_class": _AsItIs})

    def _build(self, lr_schedule: Any) -> None:
        self.mlp_extractor = _Heads(ControllerNetwork(self.layout, self.sizes))
        self.action_net, self.value_net = nn.Identity(), nn.Identity()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr_schedule(1), eps=1e-5)

    @property
    def network(self) -> ControllerNetwork:
        """The controller's network."""
        network: ControllerNetwork = self.mlp_extractor.network
        return network


class MaskedPolicy(_WithNetwork, MaskableActorCriticPolicy):
    """For `MaskablePPO`."""


class PlainPolicy(_WithNetwork, ActorCriticPolicy):
    """For `PPO`, which may choose impossible actions: they cost and do nothing."""


class TrainingEnv(VecEnvWrapper):
    """The vector environment as PPO is to see it, with a record of what happens in it.

    Rewards are those of the environment, or less what a reference says that training on alone had.
    They are divided by the running standard deviation of the discounted return. The end of the
    budget counts as an end: the observation tells what is left of it, nothing can be had after it,
    and a value that were put in its place would stem from states that are never learned from.
    """

    def __init__(self, venv: SB3VecEnv, settings: PPOSettings, table: Sequence[Action]) -> None:
        """Wrap an environment."""
        super().__init__(venv)
        self.vec_env = venv.vec_env
        self.settings, self._kinds = settings, [action.kind for action in table]
        self.scale = RunningScale(venv.num_envs)
        self._return = np.zeros(venv.num_envs)
        self._length = np.zeros(venv.num_envs, dtype=np.int64)
        self._gain = np.zeros(venv.num_envs)
        self._chosen: Any = None
        self._begun: list[tuple[int, float]] = []
        self.reference: Reference | None = None
        """What rewards are compared with, if they are."""
        self.episodes: list[Episode] = []
        """Those that have ended; whoever reads them clears the list."""
        self.counts: Counter[str] = Counter()
        """Decisions by kind, and by what became of them; cleared by the reader too."""

    def reset(self) -> Arrays:
        """Start episodes."""
        self._return[:], self._length[:], self._gain[:] = 0.0, 0, 0.0
        self.scale.discounted[:] = 0.0
        return cast(Arrays, self.venv.reset())

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions."""
        self._chosen = actions
        sessions = [env.session for env in self.vec_env.envs]
        self._begun = [(s.seed, s.spent / s.settings.interval) for s in sessions]
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[Arrays, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Carry the actions out; keep the record; scale the rewards."""
        observations, rewards, ends, infos = self.venv.step_wait()
        self._return += rewards
        self._length += 1
        if self.reference is not None:
            rewards = rewards - self._expected(self.reference, ends, infos)
            self._gain += rewards
        for number, info in enumerate(infos):
            self._count(int(self._chosen[number]), info)
            info["TimeLimit.truncated"] = False
            if ends[number]:
                total, length = float(self._return[number]), int(self._length[number])
                gain = None if self.reference is None else float(self._gain[number])
                self.episodes.append(Episode(total, length, info["stage"], gain))
        self._return[ends], self._length[ends], self._gain[ends] = 0.0, 0, 0.0
        if self.settings.normalise:
            divisor = self.scale.update(rewards, ends, self.settings.gamma)
            limit = self.settings.reward_limit
            rewards = np.clip(rewards / divisor, -limit, limit).astype(np.float32)
        return cast(Arrays, observations), rewards.astype(np.float32), ends, infos

    def _expected(
        self, reference: Reference, ends: np.ndarray, infos: list[dict[str, Any]]
    ) -> np.ndarray:
        """What training on alone would have earned for the compute of this step.

        An episode that ends before its budget is spent forgoes what was left.
        """
        found = []
        for (seed, begun), ended, info in zip(self._begun, ends, infos, strict=True):
            if ended:
                found.append(reference.rest(seed, begun))
            else:
                found.append(reference.between(seed, begun, info["intervals"]))
        return np.array(found)

    def _count(self, action: int, info: dict[str, Any]) -> None:
        self.counts["decisions"] += 1
        self.counts[self._kinds[action]] += 1
        self.counts["tried"] += info["tried"]
        self.counts["credited"] += info["credited"]
        self.counts["impossible"] += int(info["cost_components"]["impossible"])

    def state_dict(self) -> dict[str, Any]:
        """Return what the episodes under way have come to, as plain JSON data."""
        return {
            "scale": self.scale.state_dict(),
            "return": self._return.tolist(),
            "length": self._length.tolist(),
            "gain": self._gain.tolist(),
            "reference": None if self.reference is None else self.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        self.scale.load_state_dict(state["scale"])
        self._return[:], self._length[:] = state["return"], state["length"]
        self._gain[:] = state["gain"]
        curves = state["reference"]
        if (curves is not None) != self.settings.paired:
            raise ValueError("rewards are paired in one of plan and state only")
        if curves is not None:
            self.reference = Reference.from_state(curves)


@dataclass(frozen=True)
class Episode:
    """What an episode came to."""

    total: float
    """Sum of its rewards, as the environment gives them."""
    length: int
    """Decisions."""
    stage: int
    """Stage that it ended in."""
    gain: float | None = None
    """Its return less that of training on alone from the same start, if they are compared."""


class RunningScale:
    """The running standard deviation of discounted returns."""

    def __init__(self, environments: int) -> None:
        """Begin with nothing seen."""
        self.discounted = np.zeros(environments)
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation so far; 1 before two returns have been seen, and at least 1e-4."""
        return max(1e-4, (self._squares / self._count) ** 0.5) if self._count > 1 else 1.0

    def update(self, rewards: np.ndarray, ends: np.ndarray, gamma: float) -> float:
        """Take a step's rewards in; returns the deviation."""
        self.discounted = self.discounted * gamma + rewards
        for value in self.discounted.tolist():
            self._count += 1
            before = value - self._mean
            self._mean += before / self._count
            self._squares += before * (value - self._mean)
        self.discounted[ends] = 0.0
        return self.deviation

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON data."""
        moments = {"count": self._count, "mean": self._mean, "squares": self._squares}
        return {**moments, "discounted": self.discounted.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        self._count, self._mean = state["count"], state["mean"]
        self._squares = state["squares"]
        self.discounted[:] = state["discounted"]


def make_model(
    algorithm: str,
    env: VecEnv,
    settings: PPOSettings,
    actions: Sequence[str],
    sizes: NetworkSizes,
    *,
    seed: int,
    device: str,
) -> Any:
    """Build the algorithm; it draws from torch's and numpy's global generators, which it seeds.

    Args:
        algorithm: a name in `ALGORITHMS`.
        env: what it learns from.
        settings: how it learns.
        actions: labels of the actions, by index.
        sizes: of the network.
        seed: of the weights, of the actions drawn and of the environments.
        device: cpu or cuda.

    Raises:
        K1Error: if there is no such algorithm, or the decisions cannot be cut into equal parts.
    """
    if algorithm not in ALGORITHMS:
        raise K1Error(f"unknown algorithm {algorithm!r}: choose maskable or plain")
    collected = settings.n_steps * env.num_envs
    batch, left = divmod(collected, settings.minibatches)
    if left or batch < 2:  # advantages are divided by their deviation in each part
        raise K1Error(
            f"minibatches = {settings.minibatches} does not cut {collected} decisions of an update "
            "(n_steps for each environment) into equal parts of 2 or more: choose another number"
        )
    return ALGORITHMS[algorithm](
        MaskedPolicy if algorithm == "maskable" else PlainPolicy,
        env,
        learning_rate=settings.learning_rate,
        n_steps=settings.n_steps,
        batch_size=batch,
        n_epochs=settings.epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip,
        ent_coef=settings.entropy,
        vf_coef=settings.value,
        max_grad_norm=settings.max_grad_norm,
        target_kl=settings.target_kl,
        policy_kwargs={"actions": tuple(actions), "sizes": sizes},
        seed=seed,
        device=device,
    )
