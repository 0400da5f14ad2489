"""The state of a controller's training: all that it takes to go on to the same learning curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k1.config import read_dataclass
from k1.errors import CheckpointError
from k1.rng import derive_seed
from policies.learned import check_weights
from policies.ppo import TrainingEnv

KIND = "controller training"
"""Kind of the checkpoint that a training is resumed from."""
_NUMPY_KEYS = 624


@dataclass
class _Counts:
    timesteps: int
    updates: int


def take_state(
    model: Any, env: TrainingEnv, environments: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and plain JSON data of a training between two updates.

    Args:
        model: the algorithm of Stable-Baselines3.
        env: its environment.
        environments: whether the episodes under way are part of it.
    """
    tensors: dict[str, Tensor] = {}
    episodes: dict[str, Any] | None = None
    if environments:
        kept, episodes = env.vec_env.snapshot()
        tensors = {f"environment.{name}": tensor for name, tensor in kept.items()}
        tensors["episode_starts"] = torch.from_numpy(np.asarray(model._last_episode_starts))
    for name, tensor in model.policy.network.state_dict().items():
        tensors[f"network.{name}"] = tensor
    for number, moments in model.policy.optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            tensors[f"optimizer.{number}.{name}"] = tensor
    tensors["random.torch"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(model.device)
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    keys = numpy_state["state"]["key"]
    tensors["random.numpy"] = torch.from_numpy(keys.astype(np.int64))
    return tensors, {
        "environments": episodes,
        "rewards": env.state_dict(),
        "numpy": {**numpy_state, "state": {"pos": int(numpy_state["state"]["pos"])}},
        "timesteps": model.num_timesteps,
        "updates": model._n_updates,
    }


def restore_state(
    model: Any, env: TrainingEnv, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Bring a training back to a state.

    Raises:
        CheckpointError: if it is of another training or another version.
    """
    try:
        network = model.policy.network
        check_weights(_under("network.", tensors), network.state_dict())
        env.load_state_dict(state["rewards"])
        if state["environments"] is None:
            # Not the episodes that it began with.
            env.seed(derive_seed("resume", model.seed, state["timesteps"]) % (1 << 31))
            observations, starts = env.reset(), torch.ones(env.num_envs, dtype=torch.bool)
        else:
            env.vec_env.restore(_under("environment.", tensors), state["environments"])
            observations = env.vec_env.observations()
            starts = tensors["episode_starts"]
        network.load_state_dict(_under("network.", tensors))
        _load_moments(model.policy.optimizer, _under("optimizer.", tensors))
        torch.set_rng_state(tensors["random.torch"])
        if model.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], model.device)
        keys = tensors["random.numpy"].numpy().astype(np.uint32)
        numpy_state = state["numpy"]
        if (
            numpy_state["state"].keys() != {"pos"}
            or not 0 <= numpy_state["state"]["pos"] <= _NUMPY_KEYS
        ):
            raise ValueError("NumPy's generator is at no place of its keys")  # it does not look
        np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": keys}})
        counts = read_dataclass(
            _Counts, {name: state[name] for name in ("timesteps", "updates")}, "training"
        )
        model.num_timesteps, model._n_updates = counts.timesteps, counts.updates
        model._last_obs = observations
        if starts.shape != (env.num_envs,) or starts.dtype not in (torch.bool, torch.float32):
            raise ValueError("episode_starts are of other environments")
        model._last_episode_starts = starts.numpy()
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        RuntimeError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the state is of another training or another version of K-1 ({reason}): "
            "resume with the one that wrote it"
        ) from None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        number, _, name = place.partition(".")
        moments.setdefault(int(number), {})[name] = tensor
    (group,) = optimizer.param_groups
    for index, parts in moments.items():
        weight = group["params"][index]
        _check_moment(parts["exp_avg"], weight, least=-torch.inf)
        _check_moment(parts["exp_avg_sq"], weight, least=0.0)
        _check_moment(parts["step"], torch.ones(()), least=0.0)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _check_moment(moment: Tensor, wanted: Tensor, least: float) -> None:
    fits = moment.shape == wanted.shape and moment.dtype == torch.float32
    if not fits or not bool((torch.isfinite(moment) & (moment >= least)).all()):
        raise ValueError("the optimizer's moments are not possible")
