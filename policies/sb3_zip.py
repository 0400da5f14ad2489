"""Weights out of a Stable-Baselines3 zip, without running anything that is in it.

`model.save("x.zip")` of an algorithm that `policies.ppo.make_model` built writes such a file. Most
of what it holds is pickled; to load it by Stable-Baselines3 is to run whatever its author liked.
Here one file of it is read, `policy.pth`, and of that tensors alone (`weights_only=True`); they go
into a network that is built here, if they are that network's.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k1.errors import CheckpointError
from policies.learned import Controller
from policies.network import MOST_WIDTH, NetworkSizes

MOST_BYTES = 2**26
"""Of the weights. A zip of 195 KB can inflate to 200 MB, so sizes are asked before."""
MOST_PARTS = 1_000
"""Of an archive."""
_INSIDE, _PREFIX = "policy.pth", "mlp_extractor.network."


def load_sb3_zip(path: Path) -> Controller:
    """Read a controller from a zip of Stable-Baselines3 or sb3-contrib.

    Raises:
        CheckpointError: if it is no such zip, is too large, or holds anything but finite weights of
            a controller's network.
    """
    try:
        weights = _tensors(_policy_file(path))
    except CheckpointError:
        raise
    # These libraries raise whatever comes up where a file was not written by them.
    except Exception as error:
        raise _unfit(path, f"{type(error).__name__}: {str(error) or 'no reason given'}") from error
    own = {n.removeprefix(_PREFIX): t for n, t in weights.items() if n.startswith(_PREFIX)}
    if not own or len(own) != len(weights):
        raise _unfit(path, "its policy has another network than a controller of K-1")
    controller = Controller(_sizes(path, own), own, {"imported": path.name})
    controller.check()
    own = {name: tensor.contiguous().clone() for name, tensor in own.items()}
    return Controller(controller.sizes, own, controller.about)


def _policy_file(path: Path) -> bytes:
    if not path.is_file():
        raise _unfit(path, "it is no ordinary file")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if len(parts) > MOST_PARTS or [p.filename for p in parts].count(_INSIDE) != 1:
            raise _unfit(path, f"it has no {_INSIDE}, or several, or too many parts")
        if archive.getinfo(_INSIDE).file_size > MOST_BYTES:
            raise _unfit(path, f"{_INSIDE} would take more than {MOST_BYTES:,} bytes")
        with archive.open(_INSIDE) as part:
            content = part.read(MOST_BYTES + 1)  # whatever the zip says of the size
    if len(content) > MOST_BYTES:
        raise _unfit(path, f"{_INSIDE} takes more than {MOST_BYTES:,} bytes")
    # A zip itself; torch would inflate what in it is deflated, and reads older files in other ways.
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        parts = inner.infolist()
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or len(parts) > MOST_PARTS or sum(p.file_size for p in parts) > MOST_BYTES:
            raise _unfit(path, f"{_INSIDE} is not written as torch writes")
    return content


def _tensors(content: bytes) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stranger's file has no say in what is shown
        found: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise CheckpointError(f"{_INSIDE} holds no weights: name another file")
    for name, value in found.items():
        dense = type(name) is str and isinstance(value, Tensor) and value.layout is torch.strided
        if not dense or value.is_quantized or value.is_meta:
            raise CheckpointError(f"{_INSIDE} holds more than weights: name another file")
    return {name: value.detach() for name, value in found.items()}


def _sizes(path: Path, weights: dict[str, Tensor]) -> NetworkSizes:
    """Tell the widths of the network from its weights; `Controller.check` sees to the rest."""
    rows = {
        "slot": "actor.encoder.slot.0.weight",
        "domain": "actor.encoder.domain.0.weight",
        "whole": "actor.encoder.whole.0.weight",
    }
    widths = {}
    for name, place in rows.items():
        weight = weights.get(place)
        if weight is None or weight.dim() != 2 or not 1 <= weight.shape[0] <= MOST_WIDTH:
            raise _unfit(path, f"its policy has no {place} of a controller of K-1")
        widths[name] = int(weight.shape[0])
    return NetworkSizes(**widths)


def _unfit(path: Path, reason: str) -> CheckpointError:
    reason = " ".join(reason.split())
    return CheckpointError(
        f"{path} cannot be imported ({reason:.300}): give the folder of a training by "
        "train_ppo.py, or a zip that was saved by the PPO of K-1's own policy"
    )
