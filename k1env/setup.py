"""What environments are made of: their arguments, loaded and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from k1.arena import LaneState
from k1.config import ModelConfig
from k1.data import TextData, load_data
from k1.errors import CheckpointError
from k1.trainer import Trainer, pick_device
from k1env.settings import Settings


@dataclass(frozen=True)
class Setup:
    """Everything that an environment needs but its seed."""

    settings: Settings
    data: TextData
    device: torch.device
    start: LaneState | None
    """A trained system to start from, in place of Phase 1."""


def set_up(
    preset: str,
    *,
    data: TextData | str | Path | None,
    config: Settings | None,
    start: str | Path | None,
    device: str,
) -> Setup:
    """Load what the arguments of an environment name (see `k1env.env.Phase2Env`).

    Raises:
        K1Error: for an unknown preset or device, or text or a checkpoint that cannot be had.
    """
    settings = config if config is not None else Settings.preset(preset)
    if not isinstance(data, TextData):
        fields = settings.system.data
        data = load_data(
            data if data is not None else fields.source,
            tokenizer=fields.tokenizer,
            vocab_size=fields.vocab_size,
            max_bytes=fields.max_bytes,
        )
    where, lane = pick_device(device), None
    if start is not None:
        trainer = Trainer.load(start, data)
        if config is None:  # a preset leaves open how siblings are mixed
            router = trainer.config.model.router
            settings = replace(settings, system=settings.system.replace(model={"router": router}))
        _check_fit(start, trainer.config.model, settings.system.model)
        lane = trainer.arena.read_lane(0)
    return Setup(settings, data, where, lane)


def _check_fit(folder: str | Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """See that a checkpoint is of the model that the settings describe.

    Raises:
        CheckpointError: if not.
    """
    for name, value in asdict(ours).items():
        if getattr(theirs, name) != value:
            raise CheckpointError(
                f"{folder} does not fit: its model.{name} is {getattr(theirs, name)}, "
                f"not {value}; use the preset that it was made with"
            )
