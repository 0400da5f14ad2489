"""Settings of Phase 2, and the presets that fit the presets of `k1.Config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from k1.config import Config, read_dataclass
from k1.errors import ConfigError
from k1env.gate import GateConfig
from k1env.instances import find_instance

DEFAULT_INSTANCE = "default"


@dataclass(frozen=True)
class Settings:
    """Everything that defines a Phase 2 run but its data and its seed."""

    system: Config = field(default_factory=Config)
    """The K-1 system."""
    gate: GateConfig = field(default_factory=GateConfig)
    """How cheats are tried."""
    phase1_steps: int = 300
    """Steps of Phase 1 that come first, unless a checkpoint is given."""
    phase1_mode: str = "dense"
    """Mode of those steps."""
    phase1_lr: float = 1e-3
    """Learning rate of those steps; Phase 2 starts with the system's own (`train.lr`)."""
    interval: int = 60
    """Training steps after each decision."""
    phase_decisions: int = 6
    """Decisions until the stream moves on to the next domain."""
    replay: float = 0.5
    """Share of the stream that keeps coming from the domains seen before."""
    budget: int = 8_000
    """Lane steps, trials included, after which the episode is truncated."""
    max_decisions: int = 400
    """Decisions after which the episode is truncated."""
    instance: str = DEFAULT_INSTANCE
    """"default" (the text in its own order, this configuration's own start), a set of instances to
    draw from by seed ("train", "validation", "test"), or one of them ("train/17")."""
    reward_scale: float = 100.0
    """Reward for a fall by one bit per byte."""
    compute_price: float = 0.01
    """Reward taken for each interval's worth of lane steps spent."""
    divergence: float = 1.2
    """A loss this many times the best of the present domain is a divergence."""
    max_rollbacks: int = 3
    """Rollbacks in a row after which the episode ends."""

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the field."""
        for name in ("interval", "phase_decisions", "budget", "max_decisions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not possible: 1 or more")
        if not 0 <= self.replay < 1:
            raise ConfigError(f"replay = {self.replay} is not possible: 0 <= replay < 1")
        if self.phase1_mode not in ("dense", "exact", "sparse"):
            raise ConfigError(f"phase1_mode {self.phase1_mode!r}: choose dense, exact or sparse")
        if self.instance != DEFAULT_INSTANCE:
            find_instance(self.instance, seed=0)

    @staticmethod
    def preset(name: str) -> Settings:
        """Return the settings of a preset.

        Raises:
            ConfigError: if there is no such preset.
        """
        system = Config.preset(name)
        return replace(_PRESETS.get(name, Settings()), system=system)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Settings:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: for an unknown field or an impossible value.
        """
        return read_dataclass(Settings, data, "settings")


_PRESETS = {
    "tiny": Settings(
        gate=GateConfig(horizon=8, anneal=4, windows=8),
        phase1_steps=60,
        interval=8,
        phase_decisions=6,
        budget=4_000,
        max_decisions=60,
    ),
    "small": Settings(
        gate=GateConfig(horizon=8, anneal=4, group=6, windows=16),
        phase1_steps=60,
        interval=16,
        budget=4_000,
        max_decisions=120,
    ),
    "gpu": Settings(
        gate=GateConfig(group=6, windows=128),
        phase1_steps=1_000,
        interval=60,
        budget=400_000,
    ),
}
