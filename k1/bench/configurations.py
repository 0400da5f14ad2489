"""What is measured on: sizes, by name."""

from __future__ import annotations

import functools
from typing import Any

from k1.config import Config
from k1.data import DataConfig, TextData
from k1.errors import ConfigError

BASE = Config.preset("paper").replace(data={"max_bytes": 4_000_000})
"""41 blocks, d 128, batch 256 x 64, and a BPE of 10,000 tokens from 4 MB of every domain."""

TIGHT = {"spare": 0.0, "spare_levels": 0}
"""As few free slots as possible: they cost memory, and benchmarks add no agents."""


def _window(context: int) -> Config:
    """The base with longer windows and as many tokens in a batch."""
    tokens = BASE.train.batch * BASE.model.context
    return BASE.replace(model={"context": context}, train={"batch": tokens // context})


CONFIGURATIONS: dict[str, Config] = {
    "tiny": Config.preset("tiny"),
    "cpu": Config.preset("cpu"),
    "default": BASE,
    "thousand": BASE.replace(model={"branching": (9, 10, 10), "max_children": 10, **TIGHT}),
    "100M": BASE.replace(model={"embed": 512, "feed_forward": 1536, "heads": 8, **TIGHT}),
    "1B": BASE.replace(model={"embed": 1408, "feed_forward": 5632, "heads": 11, **TIGHT}),
    "T128": _window(128),
    "T256": _window(256),
    "T512": _window(512),
}
BY_DEVICE = {
    "cpu": ("tiny", "cpu"),
    "cuda": ("default", "thousand", "100M", "1B", "T128", "T256", "T512"),
}
"""What is run if nothing is asked for."""


def configuration(name: str, device: str, router: str | None = None) -> Config:
    """Look a configuration up and fit it to a device: bfloat16 is for CUDA.

    Raises:
        ConfigError: if there is none of this name, or no such router.
    """
    if name not in CONFIGURATIONS:
        known = ", ".join(CONFIGURATIONS)
        raise ConfigError(f"unknown configuration {name!r}: choose from {known}")
    config = CONFIGURATIONS[name]
    changes: dict[str, Any] = {}
    if device == "cpu":
        changes["train"] = {"precision": "float32"}
    if router:
        changes["model"] = {"router": router}
    return config.replace(**changes)


@functools.cache
def text_of(data: DataConfig) -> TextData:
    """Load text once for all configurations that share it."""
    from k1.data import load_data

    return load_data(data)


def block_count(config: Config) -> int:
    """Blocks of the full tree, root included."""
    total, level = 1, 1
    for width in config.model.branching:
        level *= width
        total += level
    return total
