"""What environments are made of: their arguments, loaded and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from k1.arena import LaneState
from k1.config import ModelConfig
from k1.data import TextData, load_data
from k1.errors import CheckpointError, K1Error
from k1.trainer import Trainer, pick_device
from k1env.instances import Choice
from k1env.settings import DEFAULT_INSTANCE, Settings
from k1env.world import text_of, with_room


@dataclass(frozen=True)
class Setup:
    """Everything that an environment needs but its seed."""

    settings: Settings
    data: TextData
    device: torch.device
    start: LaneState | None
    """A trained system to start from, in place of Phase 1."""
    instance: Choice
    """The worlds of its episodes: an instance, its name, a set or "default"."""


def set_up(
    preset: str,
    *,
    data: TextData | str | Path | None,
    config: Settings | None,
    start: str | Path | None,
    device: str,
    instance: Choice | None = None,
) -> Setup:
    """Load what the arguments of an environment name (see `k1env.env.Phase2Env`).

    Raises:
        K1Error: for an unknown preset, device or instance, or text or a checkpoint that cannot be
            had.
    """
    settings = config if config is not None else Settings.preset(preset)
    settings, chosen = settle(settings, instance)
    if start is not None and chosen != DEFAULT_INSTANCE:
        raise K1Error("an instance starts with a tree of its own: give start or instance")
    if not isinstance(data, TextData):
        fields = settings.system.data
        data = load_data(
            data if data is not None else text_of(chosen, settings),
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
    return Setup(settings, data, where, lane, chosen)


def settle(settings: Settings, choice: Choice | None) -> tuple[Settings, Choice]:
    """Return settings that suit a choice of worlds, and the choice itself: by default theirs."""
    if isinstance(choice, str):
        settings = replace(settings, instance=choice)
    chosen = settings.instance if choice is None else choice
    return settings if chosen == DEFAULT_INSTANCE else with_room(settings), chosen


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
