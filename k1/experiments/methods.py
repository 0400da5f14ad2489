"""The methods that experiments compare, as data; `k1.experiments.learner` carries them out.

To add one: a `Method` here, and, if settings do not express it, a `Learner` of its own in a file of
its own, which it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from k1.bench.methods import NEVER_AGAIN
from k1.config import Config
from k1.errors import ConfigError
from k1.experiments.constrained import AGemLearner, EwcLearner, SiLearner
from k1.experiments.guarded import GuardedLearner
from k1.experiments.learner import Learner
from k1.experiments.mixture import MixtureLearner
from k1.experiments.packed import PackNetLearner
from k1.experiments.progressive import ProgressiveLearner
from k1.experiments.tree_learners import (
    FixedLeafLearner,
    GrownLearner,
    OneCounterLearner,
    SeparateLearner,
)
from k1.experiments.versions import VersionsLearner

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


def _sections(*parts: Fields) -> Fields:
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
FROZEN = _sections(NO_ROOT, NO_SHARED)
ALL_OPEN: Fields = {"update": {"min_share": 1e-6}}
"""Whoever may be found is a culprit, however little its share."""
UNTRACED: Fields = {"update": {"attribution_every": NEVER_AGAIN}}


def _router(name: str) -> Fields:
    return {"model": {"router": name}}


def _k1(router: str) -> Fields:
    return _sections(PATH, _router(router))


SHARP: Fields = {"evidence": {"tau": 1.0}}
"""Evidence that a few tokens decide by."""
FULL = _sections(_k1("evidence"), WHOLE, SHARP)
"""Full paths, and such evidence."""
SOFT: Fields = {"evidence": {"tau": 0.05}}

BASELINES = (
    Method("dense", "all blocks, one domain after another", DENSE),
    Method("dense-low-lr", "dense with a tenth of the learning rate after the first domain", DENSE,
           options={"later_lr": 0.1}),
    Method("dense-frozen-shared", "dense, the shared part frozen after the first domain", DENSE,
           later=NO_SHARED),
    Method("joint", "dense on all domains at once: a bound", DENSE, joint=True),
    Method("separate", "a dense tree for each domain, told which: a bound", DENSE,
           learner=SeparateLearner),
    Method("replay-1", "dense, 1 % of the windows from earlier domains", DENSE, replay=0.01),
    Method("replay-5", "dense, 5 % of the windows from earlier domains", DENSE, replay=0.05),
    Method("ewc", "dense with elastic weight consolidation, per-sequence Fisher", DENSE,
           learner=EwcLearner, strengths=(1e3, 1e4, 1e5)),
    Method("si", "dense with synaptic intelligence", DENSE,
           learner=SiLearner, strengths=(0.1, 1.0, 10.0)),
    Method("a-gem", "dense, gradients projected so that earlier text does not lose", DENSE,
           learner=AGemLearner),
    Method("packnet", "dense; each domain keeps weights of its own, found again by the loss so far",
           DENSE, learner=PackNetLearner),
    Method("progressive",
           "a dense tree for each domain, fed by earlier ones, found again by the loss so far",
           DENSE, learner=ProgressiveLearner),
    Method("dense-versions", "dense; a version of all for each domain, found again by bigrams",
           _sections(DENSE, SHARP), learner=VersionsLearner),
    Method("separate-versions", "a fresh dense tree for each domain, found again by bigrams",
           _sections(DENSE, SHARP), learner=VersionsLearner, options={"fresh": True}),
    Method("mixture",
           "a flat top-1 mixture of experts of as many parameters; three times the steps at most",
           DENSE, learner=MixtureLearner),
    Method("random-path", "a random path, every block of it in full",
           _sections(_k1("learned"), WHOLE, UNTRACED, {"train": {"exploration": 1.0}})),
    Method("round-robin", "the path updated longest ago, every block of it in full",
           _sections(_k1("learned"), WHOLE, UNTRACED, {"train": {"cooldown": NEVER_AGAIN}})),
    Method("fixed-leaf", "the path to one random leaf for each domain, every block of it in full",
           _sections(_k1("learned"), WHOLE, UNTRACED), learner=FixedLeafLearner),
)  # fmt: skip

TRACED = (
    *(
        Method(f"k1-{router}", f"traced path in percentages, {router} routing", _k1(router))
        for router in ("mean", "learned", "evidence")
    ),
    *(
        Method(f"k1-{router}-grow", f"k1-{router}, and a node grows for a domain",
               _k1(router), learner=GrownLearner)
        for router in ("mean", "learned", "evidence")
    ),
    Method("k1-full-path", "traced path by evidence with tau 1, every block of it in full", FULL),
    Method("k1-full-path-grow", "k1-full-path, and a node grows for a domain", FULL,
           learner=GrownLearner),
    Method("k1-frozen", "k1-full-path; root and shared part frozen after the first domain", FULL,
           later=FROZEN),
    Method("k1-frozen-grow", "k1-frozen, and a node grows for a domain", FULL,
           later=FROZEN, learner=GrownLearner),
    Method("k1-own-grow", "k1-frozen-grow where only the new node moves, all of it", FULL,
           later=_sections(FROZEN, ALL_OPEN), learner=GrownLearner, options={"own_only": True}),
    Method("k1-own-grow-soft", "k1-own-grow with tau 0.05", _sections(FULL, SOFT),
           later=_sections(FROZEN, ALL_OPEN), learner=GrownLearner, options={"own_only": True}),
    Method("k1-versions",
           "k1-full-path, later domains on one traced path; what each moves is kept apart as a "
           "version, found again by bigrams",
           FULL, learner=VersionsLearner, options={"traced": 16}),
    Method("k1-versions-free", "k1-versions where every step finds its path", FULL,
           learner=VersionsLearner),
    Method("k1-versions-loss", "k1-versions, found again by the loss so far", FULL,
           learner=VersionsLearner, options={"traced": 16, "by_loss": True}),
    Method("k1-guarded-grow",
           "k1-own-grow where root and shared part move too, tied by importance", FULL,
           later=ALL_OPEN, learner=GuardedLearner, strengths=(1e1, 1e2, 1e3)),
    Method("k1-guarded-shared-grow", "k1-guarded-grow with the root frozen", FULL,
           later=_sections(NO_ROOT, ALL_OPEN), learner=GuardedLearner, strengths=(1e1, 1e2, 1e3)),
    Method("k1-top-9", "k1-full-path with several culprits at once",
           _sections(FULL, {"train": {"top_k": 9}})),
    Method("k1-top-9-no-threshold", "k1-top-9 without the culprit threshold",
           _sections(FULL, {"train": {"top_k": 9}, "update": {"min_share": 0.0}})),
    Method("k1-one-counter", "k1-full-path with one Adam counter for all blocks", FULL,
           learner=OneCounterLearner),
    Method("k1-explore", "k1-full-path, one path in ten random",
           _sections(FULL, {"train": {"exploration": 0.1}})),
)  # fmt: skip

METHODS = {method.name: method for method in (*BASELINES, *TRACED)}


def choose_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Return methods by their names.

    Raises:
        ConfigError: for an unknown name.
    """
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"no method {name!r}: choose from {', '.join(METHODS)}")
    return tuple(METHODS[name] for name in dict.fromkeys(names))
