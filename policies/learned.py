"""The learned controller: weights in a folder, and a policy that acts by them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k1.checkpoint import checkpoint_exists, load_checkpoint, save_checkpoint
from k1.config import read_dataclass
from k1.errors import CheckpointError
from policies.base import Observation
from policies.network import WHOLE_ACTIONS, ControllerNetwork, Layout, NetworkSizes

KIND = "controller"
"""Kind of the checkpoints that hold a controller's weights."""
BEST, LAST = "best", "last"
"""Names of such checkpoints in a run folder."""
SHIPPED = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class Controller:
    """Weights, and what fits them."""

    sizes: NetworkSizes
    weights: dict[str, Tensor]
    about: dict[str, Any]
    """How they came about, as plain JSON data."""

    def network(self, layout: Layout) -> ControllerNetwork:
        """Build the network for a table of actions.

        Raises:
            CheckpointError: if the weights are of another network.
        """
        self.check()
        network = ControllerNetwork(layout, self.sizes)
        network.load_state_dict(self.weights)
        return network

    def check(self) -> None:
        """See that the weights are those of such a network, before one of its sizes is made.

        Raises:
            CheckpointError: if not.
        """
        layout = Layout.of(WHOLE_ACTIONS)  # weights are the same for every layout
        with torch.device("meta"):  # shapes without memory
            wanted = ControllerNetwork(layout, self.sizes).state_dict()
        check_weights(self.weights, wanted)


def check_weights(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """See that weights are finite, and of the names, shapes and types of others.

    Raises:
        CheckpointError: if not.
    """
    reason = ""
    if weights.keys() != wanted.keys():
        names = sorted(weights.keys() ^ wanted.keys())
        reason = f"{len(names)} names differ, such as {names[0]!r:.80}"
    for name, tensor in weights.items() if not reason else ():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            reason = f"{name} is {tensor.dtype} {list(tensor.shape)}"
        elif not bool(torch.isfinite(tensor).all()):
            reason = f"{name} is not finite"
    if reason:
        raise CheckpointError(
            f"the controller's weights do not fit its sizes ({reason}): train it anew"
        )


@dataclass
class _Saved:
    """What a checkpoint of a controller holds besides weights."""

    sizes: NetworkSizes
    actions: list[str]
    about: dict[str, Any]


def save_controller(folder: Path, controller: Controller) -> None:
    """Write weights, complete or not at all.

    Raises:
        CheckpointError: if the disk refuses, or the folder holds something else.
    """
    saved = _Saved(controller.sizes, list(WHOLE_ACTIONS), controller.about)
    save_checkpoint(folder, controller.weights, asdict(saved), kind=KIND)


def load_controller(folder: Path) -> Controller:
    """Read the weights of a run (the best ones, if there are), or of a checkpoint.

    Raises:
        CheckpointError: if there are none, or they are damaged or of another version.
    """
    inside = folder / "checkpoints"
    if inside.is_dir():
        folder = inside / (BEST if checkpoint_exists(inside / BEST) else LAST)
    weights, state = load_checkpoint(folder, kind=KIND)
    saved = read_dataclass(_Saved, state, str(folder), whole=True)
    if saved.actions != list(WHOLE_ACTIONS):
        raise CheckpointError(
            f"the controller in {folder} knows other actions than this version of K-1: "
            "train it anew"
        )
    return Controller(saved.sizes, weights, saved.about)


def load_shipped() -> Controller:
    """Read the weights that come with K-1.

    Raises:
        CheckpointError: if none do.
    """
    if not SHIPPED.is_dir():
        raise CheckpointError(
            "this K-1 comes without a trained controller: train one by scripts/train_ppo.py "
            "and name its run folder"
        )
    return load_controller(SHIPPED)


class NetworkPolicy:
    """Does what a network holds to be best among what is possible."""

    def __init__(self, network: ControllerNetwork) -> None:
        """Bind the network."""
        self.network = network
        self.reason = ""

    def act(self, observation: Observation, info: Mapping[str, Any]) -> int:
        """Choose the possible action with the largest logit."""
        device = self.network.actor.root.device
        tensors = {
            name: torch.as_tensor(row, dtype=torch.float32, device=device)[None]
            for name, row in observation.items()
        }
        with torch.no_grad():
            logits = self.network.actor(tensors)[0].cpu()
        possible = torch.as_tensor(np.asarray(info["action_mask"], dtype=np.bool_))
        logits = logits.masked_fill(~possible, float("-inf"))
        best = int(logits.argmax())
        self.reason = f"learned: probability {float(torch.softmax(logits, 0)[best]):.2f}"
        return best


class LearnedPolicy(NetworkPolicy):
    """A trained controller; a run that it drives resumes with the same weights only."""

    def __init__(self, actions: Sequence[str], controller: Controller) -> None:
        """Fit a controller to a table of actions.

        Raises:
            K1Error: if it does not fit.
        """
        super().__init__(controller.network(Layout.of(actions)))
        digest = hashlib.sha256()
        for name, tensor in sorted(controller.weights.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        self._fingerprint = digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights' SHA-256: there is no other memory."""
        return {"weights": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See that the weights are those that the run began with.

        Raises:
            CheckpointError: if not.
        """
        if state.get("weights") != self._fingerprint:
            raise CheckpointError(
                "the controller has other weights than when this run began: name the checkpoint "
                "that it began with, or start a new run"
            )
