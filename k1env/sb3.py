"""The vector environment as Stable-Baselines3 wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv

from k1.errors import K1Error
from k1env.env import Observation, Phase2Env
from k1env.vector import Phase2VectorEnv

Indices = int | Iterable[int] | None


class SB3VecEnv(VecEnv):
    """A `Phase2VectorEnv` behind the interface of Stable-Baselines3.

    It behaves as `DummyVecEnv` does over single environments: an environment whose episode ends is
    reset in the same step, its last observation is `info["terminal_observation"]`, and
    `reset_infos` has the infos of the latest resets. Masks come by `env_method("action_masks")`.
    """

    def __init__(self, vec_env: Phase2VectorEnv | None = None, **arguments: Any) -> None:
        """Wrap an environment, or make one from the arguments of `Phase2VectorEnv`.

        Raises:
            K1Error: if its autoreset mode is not SAME_STEP, or if arguments come on top of it.
        """
        if vec_env is not None and arguments:
            raise K1Error(f"the environment is made already: {', '.join(arguments)} come too late")
        self.vec_env = vec_env if vec_env is not None else Phase2VectorEnv(**arguments)
        if self.vec_env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise K1Error("Stable-Baselines3 needs autoreset_mode SAME_STEP: make it with that")
        one = self.vec_env.envs[0]
        super().__init__(self.vec_env.num_envs, one.observation_space, one.action_space)
        self.metadata = one.metadata
        self._actions: Any = None

    def reset(self) -> Observation:
        """Start an episode in every environment, by what `seed` and `set_options` have set."""
        worlds = [options.get("instance") for options in self._options]
        for i, (_, info) in self.vec_env.reset_each(self._seeds, instance=worlds).items():
            self.reset_infos[i] = info
        self._reset_seeds()
        self._reset_options()
        return self.vec_env.observations()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions; `step_wait` carries them out."""
        self._actions = actions

    def step_wait(self) -> tuple[Observation, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Carry the actions out: observations, rewards (float32), ends, infos."""
        results = self.vec_env.step_each(self._actions)
        infos: list[dict[str, Any]] = []
        for i, result in enumerate(results):
            info = result.info
            if result.final is not None:
                observation, info = result.final
                info["terminal_observation"] = observation
                self.reset_infos[i] = result.info
            info["TimeLimit.truncated"] = result.truncated and not result.terminated
            infos.append(info)
        rewards = np.array([r.reward for r in results], dtype=np.float32)
        ends = np.array([r.terminated or r.truncated for r in results], dtype=np.bool_)
        return self.vec_env.observations(), rewards, ends, infos

    def close(self) -> None:
        """Close the environment."""
        self.vec_env.close()

    def _chosen(self, indices: Indices) -> list[Phase2Env]:
        return [self.vec_env.envs[i] for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute of single environments."""
        return [env.get_wrapper_attr(attr_name) for env in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of single environments."""
        for env in self._chosen(indices):
            setattr(env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of single environments."""
        methods = self.get_attr(method_name, indices)
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: Indices = None
    ) -> list[bool]:
        """Say whether single environments are wrapped: they are not."""
        return [is_wrapped(env, wrapper_class) for env in self._chosen(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return no images: vector environments are not rendered."""
        return [None] * self.num_envs
