"""Named experiments, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from k1.config import Config
from k1.errors import ConfigError
from k1.experiments.ablations import ABLATIONS
from k1.experiments.learner import Run
from k1.experiments.method import Fields, Method
from k1.experiments.methods import BASELINES, TRACED
from k1.experiments.stream import Order

RATES = (4e-4, 1e-3, 2.5e-3)


@dataclass(frozen=True)
class Experiment:
    """What is compared, and for how long."""

    name: str
    what: str
    methods: tuple[str, ...]
    preset: str = "gpu"
    sections: Fields = field(default_factory=dict)
    """What it changes in the preset."""
    steps: int = 1500
    """Steps of a dense run in each phase."""
    equal_flops: bool = True
    """Other methods run until they have used what dense does; else as many steps."""
    rates: tuple[float, ...] = RATES
    """Learning rates that every method is swept over."""
    seeds: int = 3
    """Runs of each method and learning rate."""
    orders: str = "all"
    """Orders of the domains, by number; seed s has the s-th of them, and so on in turn."""
    checks: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Shares of a phase at which all domains are measured, besides its end."""
    passage: int = 8
    """Windows that a passage has at most."""

    def config(self, source: str) -> Config:
        """Return the settings that its methods share, on a text."""
        config = Config.preset(self.preset).replace(**self.sections)
        return config.replace(data={"source": source})

    def settings(self) -> dict[str, Any]:
        """All that a row depends on besides its key, its method and its text."""
        told = asdict(self)
        for name in ("name", "what", "methods", "rates", "seeds", "orders"):
            del told[name]
        return told

    def runs(self, method: Method, orders: Sequence[Order]) -> list[Run]:
        """All runs of a method, seed by seed."""
        return [
            Run(method.name, orders[(seed - 1) % len(orders)], seed, lr, strength)
            for seed in range(1, self.seeds + 1)
            for lr in self.rates
            for strength in method.strengths
        ]


_GROWABLE: Fields = {"model": {"spare": 1.0}}
_SMALL: Fields = {
    "model": {"branching": (3, 2), "embed": 32, "feed_forward": 64, "heads": 2, "spare": 1.0},
    "optimizer": {"warmup": 1},
    "train": {"batch": 16, "eval_windows": 96},
    "data": {"max_bytes": 4_000_000},
}
_BIG: Fields = {**_GROWABLE, "optimizer": {"warmup": 1}}

EXPERIMENTS = (
    Experiment(
        "ci",
        "seconds: every kind of method, on a tiny tree",
        ("dense", "separate", "replay-5", "ewc", "packnet", "progressive", "mixture", "k1-evidence",
         "k1-own-grow"),
        preset="tiny",
        sections={**_GROWABLE, "train": {"eval_windows": 8}},
        steps=24,
        rates=(2e-3,),
        seeds=2,
        checks=(0.25,),
        passage=3,
    ),
    Experiment(
        "pilot",
        "minutes on two cores: the main methods on a small tree, one order",
        ("dense", "dense-low-lr", "dense-frozen-shared", "joint", "separate", "replay-1",
         "replay-5", "random-path", "fixed-leaf", "k1-evidence", "k1-full-path", "k1-frozen",
         "k1-frozen-grow", "k1-own-grow", "k1-guarded-grow"),
        preset="cpu",
        sections=_SMALL,
        steps=400,
        rates=(2.5e-3,),
        seeds=1,
        orders="1",
    ),
    Experiment(
        "main",
        "all but ablations and controllers, orders in turn, swept over learning rates; for a GPU",
        tuple(method.name for method in (*BASELINES, *TRACED)),
        sections=_BIG,
        seeds=10,
    ),
    Experiment(
        "baselines",
        "methods that trace nothing, at their own strengths; for a GPU",
        tuple(method.name for method in BASELINES),
        sections=_BIG,
        seeds=3,
    ),
    Experiment(
        "parts",
        "what each part of K-1 does: percentages, freezing, growth, threshold, counters; for a GPU",
        ("dense", *(method.name for method in TRACED)),
        sections=_BIG,
        seeds=3,
    ),
    Experiment(
        "growth",
        "growth by a fixed rule, by controllers of Phase 2, and none; for a GPU",
        ("dense", "k1-full-path", "k1-full-path-grow", "k1-noop", "k1-heuristic", "k1-ppo"),
        sections=_BIG,
        seeds=3,
    ),
    Experiment(
        "ablations",
        "versions with one thing changed: top_k, trees, percentages, evidence, paths; for a GPU",
        ("k1-versions", "k1-versions-free", *(method.name for method in ABLATIONS)),
        sections=_BIG,
        rates=(2.5e-3,),
        seeds=3,
    ),
)  # fmt: skip
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def choose_experiment(name: str, **changes: Any) -> Experiment:
    """Return a named experiment with some fields changed; None leaves a field as it is.

    Raises:
        ConfigError: if there is none of that name, or a figure is impossible.
    """
    if name not in BY_NAME:
        raise ConfigError(f"no experiment {name!r}: choose from {', '.join(BY_NAME)}")
    given = {key: value for key, value in changes.items() if value is not None}
    chosen = replace(BY_NAME[name], **given)
    if chosen.steps < 1 or chosen.seeds < 1:
        raise ConfigError("an experiment takes a step and a seed at least: give 1 or more")
    if not chosen.rates or not all(0 < rate < float("inf") for rate in chosen.rates):
        raise ConfigError(f"learning rates {chosen.rates} are not possible: give some above 0")
    return chosen
