"""What a method is: settings, a learner, and names for the settings that many share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k1.bench.methods import NEVER_AGAIN
from k1.config import Config
from k1.experiments.learner import Learner

Fields = dict[str, dict[str, Any]]
"""Fields of a configuration's sections that are set."""


@dataclass(frozen=True)
class Method:
    """One way to learn domains one after another."""

    name: str
    what: str
    """One line for the report."""
    always: Fields = field(default_factory=dict)
    """What it sets in the configuration."""
    later: Fields = field(default_factory=dict)
    """What it sets besides from the second domain on."""
    joint: bool = False
    """All domains at once, in every phase."""
    replay: float = 0.0
    """Share of the training windows that come from earlier domains, all of whose text is kept."""
    strengths: tuple[float, ...] = (0.0,)
    """Strengths of its penalty that are tried."""
    learner: Callable[..., Learner] = Learner
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the learner."""

    def configure(self, config: Config, phase: int) -> Config:
        """Return an experiment's configuration with this method's settings in a phase."""
        config = config.replace(**self.always)
        return config.replace(**self.later) if phase else config


def sections(*parts: Fields) -> Fields:
    """Lay settings over each other, section by section."""
    result: Fields = {}
    for part in parts:
        for section, fields in part.items():
            result[section] = {**result.get(section, {}), **fields}
    return result


DENSE: Fields = {"update": {"mode": "dense"}, "model": {"router": "learned"}}
PATH: Fields = {"update": {"mode": "sparse"}, "train": {"cooldown": 0}}
WHOLE: Fields = {"update": {"scales": (1.0,), "root_scale": 1.0}}
"""Every block of the path moves in full."""
NO_ROOT: Fields = {"update": {"root_scale": 0.0}}
NO_SHARED: Fields = {"update": {"shared_scale": 0.0}}
FROZEN = sections(NO_ROOT, NO_SHARED)
ALL_OPEN: Fields = {"update": {"min_share": 1e-6}}
"""Whoever may be found is a culprit, however little its share."""
UNTRACED: Fields = {"update": {"attribution_every": NEVER_AGAIN}}


def router_is(name: str) -> Fields:
    """Choose a router."""
    return {"model": {"router": name}}


def traced_by(router: str) -> Fields:
    """Move traced paths, behind a router."""
    return sections(PATH, router_is(router))


SHARP: Fields = {"evidence": {"tau": 1.0}}
"""Evidence that a few tokens decide by."""
FULL = sections(traced_by("evidence"), WHOLE, SHARP)
"""Full paths, and such evidence."""
SOFT: Fields = {"evidence": {"tau": 0.05}}
