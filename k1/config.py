"""The configuration of a K-1 system: sections beside their owners, presets, and plain-JSON form."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from k1.data import DataConfig
from k1.errors import ConfigError

T = TypeVar("T")

MOST_SLOTS = 10_000
"""Slots of a lane in all: the host keeps trees as lists, and larger ones would take minutes."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the tree and of its blocks."""

    branching: tuple[int, ...] = (4, 3, 2)
    """Children per block, level by level: root -> nodes -> agents -> sub-agents."""
    embed: int = 128
    """Width of the residual stream."""
    feed_forward: int = 256
    """Width of a block's hidden layer."""
    heads: int = 4
    """Attention heads of a block; divides `embed`."""
    context: int = 64
    """Tokens in a training window."""
    router: str = "evidence"
    """How siblings are mixed: "mean", "learned" or "evidence"."""
    spare: float = 0.5
    """Free slots per level, as a share of the blocks that the level starts with (2 at least)."""
    spare_levels: int = 1
    """Levels below the deepest one that the tree may still grow into."""
    max_children: int = 8
    """Most children of one block; sizes the routers."""

    @property
    def level_capacity(self) -> tuple[int, ...]:
        """Slots per level, root first."""
        sizes, count = [1], 1
        for width in self.branching:
            count *= width
            sizes.append(count + max(2, math.ceil(self.spare * count)))
        return (*sizes, *[max(4, sizes[-1] // 8)] * self.spare_levels)


@dataclass(frozen=True)
class EvidenceConfig:
    """Bigram statistics behind the `evidence` router."""

    buckets: int = 4096
    """Hash buckets for token bigrams; a power of two."""
    context_buckets: int = 256
    """Hash buckets for the token that a bigram starts with; a power of two."""
    tau: float = 0.05
    """Weight of the log-likelihood ratio in the routing logits."""
    strength: float = 64.0
    """Pseudo-counts per context that pull a child's statistics to those of all its siblings."""
    window: int = 64
    """Steps that a half of the recent window spans; a new agent inherits the recent counts."""


@dataclass(frozen=True)
class UpdateConfig:
    """Which blocks a step updates, and how far (design: attribution and the update)."""

    mode: str = "sparse"
    """"dense" (everything), "exact" (full backward, path update) or "sparse" (probe, path)."""
    scales: tuple[float, ...] = (1.0, 0.15, 0.05)
    """Displacement of culprit, parent and every further ancestor below the root."""
    root_scale: float = 0.05
    """Displacement of the root."""
    shared_scale: float = 1.0
    """Displacement of embedding, positions, final norm and head."""
    min_share: float = 0.1
    """A further culprit needs this share of the first culprit's responsibility."""
    probe_fraction: float = 0.125
    """Share of the batch that attribution is done on in sparse mode."""
    attribution_every: int = 4
    """Steps between attributions in sparse mode."""
    inner_steps: int = 1
    """Updates that a culprit makes on each batch in sparse mode; all else makes one."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, per block."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on what is updated only."""
    clip: float = 1.0
    """Largest global gradient norm of what is updated; 0 turns clipping off."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly from zero."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: sizes and the starting hyper-parameters that Phase 2 may tune."""

    batch: int = 8
    """Windows per step."""
    lr: float = 1e-3
    """Learning rate at displacement scale 1."""
    top_k: int = 3
    """Most non-root blocks that one step updates."""
    cooldown: int = 5
    """Steps for which a culprit is not eligible again."""
    exploration: float = 0.0
    """Probability of a random eligible leaf in place of the attributed one."""
    eval_windows: int = 64
    """Windows per domain in an evaluation."""
    precision: str = "float32"
    """Arithmetic of the blocks: "float32" or "bfloat16" (weights stay float32)."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a K-1 system but its data and its seed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the field."""
        m, t, u, e = self.model, self.train, self.update, self.evidence
        _check("model.branching", len(m.branching) >= 1 and min(m.branching) >= 1, m.branching)
        _check("model.spare", 0 <= m.spare <= MOST_SLOTS, m.spare)
        _check("model.spare_levels", 0 <= m.spare_levels <= MOST_SLOTS, m.spare_levels)
        _check("model.branching", sum(m.level_capacity) <= MOST_SLOTS, m.branching)
        _check("model.max_children", m.max_children >= max(m.branching), m.max_children)
        _check("model.heads", m.heads >= 1, m.heads)
        _check("model.embed", m.embed >= 1 and m.embed % m.heads == 0, m.embed)
        _check("model.feed_forward", m.feed_forward >= 1, m.feed_forward)
        _check("model.context", m.context >= 2, m.context)
        _check("model.router", m.router in ("mean", "learned", "evidence"), m.router)
        _check("update.mode", u.mode in ("dense", "exact", "sparse"), u.mode)
        _check("update.probe_fraction", 0 < u.probe_fraction <= 1, u.probe_fraction)
        _check("update.attribution_every", u.attribution_every >= 1, u.attribution_every)
        _check("update.inner_steps", u.inner_steps >= 1, u.inner_steps)
        _check("update.scales", len(u.scales) >= 1 and u.scales[0] > 0, u.scales)
        _check("train.batch", t.batch >= 1, t.batch)
        _check("train.eval_windows", t.eval_windows >= 1, t.eval_windows)
        _check("train.lr", 0 < t.lr < math.inf, t.lr)
        _check("train.top_k", 1 <= t.top_k <= MOST_SLOTS, t.top_k)
        _check("train.cooldown", t.cooldown >= 0, t.cooldown)
        _check("train.exploration", 0 <= t.exploration <= 1, t.exploration)
        _check("train.precision", t.precision in ("float32", "bfloat16"), t.precision)
        for name, value in (("buckets", e.buckets), ("context_buckets", e.context_buckets)):
            _check(f"evidence.{name}", value >= 2 and value & (value - 1) == 0, value)
        _check("evidence.window", e.window >= 1, e.window)

    @staticmethod
    def preset(name: str) -> Config:
        """Return the preset `tiny`, `cpu`, `small`, `gpu` or `paper`.

        Raises:
            ConfigError: if there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def replace(self, **sections: dict[str, Any]) -> Config:
        """Return a copy with some fields changed: `config.replace(train={"lr": 3e-3})`."""
        changed = {
            name: dataclasses.replace(getattr(self, name), **fields)
            for name, fields in sections.items()
        }
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Config:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: for an unknown field or an impossible value.
        """
        return read_dataclass(Config, data, "config")


def _check(name: str, ok: bool, value: object) -> None:
    if not ok:
        raise ConfigError(
            f"{name} = {value!r:.200} is not possible: see k1/config.py for its meaning"
        )


def read_dataclass(cls: type[T], data: Any, where: str, *, whole: bool = False) -> T:
    """Build a (nested) dataclass from plain JSON data, lists becoming tuples where it has those.

    Args:
        cls: the dataclass.
        data: a table of its fields.
        where: what to call it in an error's message.
        whole: refuse a table that lacks a field, though the dataclass has a default for it.

    Raises:
        ConfigError: for an unknown field, a value of another type or an impossible one.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is not a table of fields: {data!r:.80}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(
                f"{where} has no field {key!r:.80}: was it written by another version?"
            )
        values[key] = _read(hints[key], value, f"{where}.{key}", whole)
    missing = hints.keys() - values.keys()
    if whole and missing:
        raise ConfigError(
            f"{where} lacks {', '.join(sorted(missing))}: was it written by another version?"
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where} does not fit {cls.__name__}: {error}") from error


def _read(hint: Any, value: Any, where: str, whole: bool) -> Any:
    """Read a value as what a field's type says; numbers stay as they are spelled."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), value, where, whole=whole)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        (hint,) = (option for option in inner if option is not type(None))
        return _read(hint, value, where, whole)
    if origin is tuple and isinstance(value, list | tuple):
        each = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(each) == len(value):
            pairs = enumerate(zip(each, value, strict=True))
            return tuple(_read(h, v, f"{where}[{i}]", whole) for i, (h, v) in pairs)
    if origin is list and isinstance(value, list | tuple):
        return [_read(inner[0], v, f"{where}[{i}]", whole) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(inner[1], v, f"{where}.{key}", whole) for key, v in value.items()}
    integer = type(value) is int and -(2**63) <= value < 2**63  # what tensors hold
    fits = {
        bool: isinstance(value, bool),
        int: integer,
        float: integer or isinstance(value, float),
        str: isinstance(value, str),
        Any: True,
    }
    if not fits.get(hint, False):
        raise ConfigError(f"{where} = {value!r:.80} is not possible: it is of another type")
    return value


PRESETS: dict[str, Config] = {
    # Seconds on any machine: for tests and a first look.
    "tiny": Config(
        model=ModelConfig(branching=(2, 2), embed=16, feed_forward=32, heads=2, context=32),
        evidence=EvidenceConfig(buckets=512, context_buckets=64, window=16),
        optimizer=OptimizerConfig(warmup=10),
        train=TrainConfig(batch=4, eval_windows=8),
        data=DataConfig(max_bytes=300_000),
    ),
    # Minutes on two cores: the default tree of 41 blocks, narrow.
    "cpu": Config(
        model=ModelConfig(embed=32, feed_forward=64, heads=2),
        train=TrainConfig(batch=8, lr=2.5e-4),
    ),
    # Hundreds of systems side by side on a GPU: the smallest blocks that its kernels take.
    "small": Config(
        model=ModelConfig(embed=64, feed_forward=128, heads=4),
        evidence=EvidenceConfig(buckets=1024, context_buckets=128, window=16),
        optimizer=OptimizerConfig(warmup=10),
        train=TrainConfig(batch=4, eval_windows=8, precision="bfloat16"),
        data=DataConfig(max_bytes=1_000_000),
    ),
    "gpu": Config(
        model=ModelConfig(context=128),
        evidence=EvidenceConfig(buckets=16384),
        train=TrainConfig(batch=32, lr=2.5e-4, eval_windows=256, precision="bfloat16"),
        data=DataConfig(max_bytes=16_000_000),
    ),
    # The sizes that the design's figures were measured at.
    "paper": Config(
        model=ModelConfig(context=64),
        evidence=EvidenceConfig(buckets=16384, context_buckets=4096),
        train=TrainConfig(batch=256, eval_windows=512, precision="bfloat16"),
        data=DataConfig(tokenizer="bpe", vocab_size=10_000, max_bytes=16_000_000),
    ),
}
