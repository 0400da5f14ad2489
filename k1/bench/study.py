"""Time to loss: what each method of training reaches for the compute and the time that it uses.

Every method is tuned over its own learning rates on one seed, by the gate pool, and then run on
other seeds, which are lanes of one arena. The time of a step is measured apart, for one lane alone:
several lanes side by side take less time each, which no single system would see.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from k1.arena import Arena, LaneState
from k1.attribution import NEVER
from k1.bench.counters import flops_per_step, updated_per_step, visit_spread
from k1.bench.methods import METHODS, CoordinateEngine, Method
from k1.config import Config
from k1.data import TextData
from k1.engine import Engine
from k1.errors import ConfigError
from k1.sampling import TokenStore

SITUATIONS = ("scratch", "new-domain")
TUNE_SHARE = 0.5
"""Tuning runs are shorter than the runs that they choose a learning rate for, by this factor."""
MOST_TRIALS = 5
"""Learning rates tried at most: while the best lies at an edge, one beyond it follows."""
GRID_RATIO = 2.5
"""Between a trial beyond the edge and the edge."""
LONGEST = 6.0
"""A cheap method runs until it has used what dense uses, but at most so many times its steps."""
POINTS_PER_OCTAVE = 2
"""Evaluations per doubling of the steps."""
OCTAVES = 4
"""The first evaluation after the start is at steps / 2**OCTAVES."""
STRETCH = 40
"""Steps between looks at the clock."""
TIMED = 5
"""Timed stretches; one more before them warms up."""
TIMED_STEPS = 20
"""Steps of a timed stretch, at least."""

_RECORDS = ("count", "visits", "updates", "responsibility", "mean_responsibility", "shared_count",
            "step", "skipped", "blocks_updated", "loss", "first", "second", "shared_first",
            "shared_second")  # fmt: skip


class OutOfTime(Exception):
    """The study's time is used up."""


@dataclass(frozen=True)
class Plan:
    """What to compare, and how long."""

    steps: int
    """Steps of a dense run; other methods run until they have used as much as dense does."""
    seeds: tuple[int, ...]
    """Seeds of the runs that are compared."""
    tune_seed: int
    """Seed that learning rates are chosen on."""
    methods: tuple[Method, ...]
    situations: tuple[str, ...] = SITUATIONS
    old: str = "code"
    """Domain that the trained tree of `new-domain` knows."""
    new: str = "wikitext"
    """Domain that it meets."""
    seconds: float = math.inf
    """The study stops after this time."""


@dataclass(frozen=True)
class Situation:
    """Where a run starts and what it is judged by."""

    name: str
    mix: tuple[float, ...]
    """Share of each domain in the training stream."""
    target: tuple[str, ...]
    """The domains whose mean bits per byte is the result."""
    start: dict[int, LaneState]
    """Trained systems by seed; empty for fresh ones."""


class Study:
    """Runs methods in situations and records what comes out as plain JSON data."""

    def __init__(
        self,
        config: Config,
        data: TextData,
        device: str,
        plan: Plan,
        say: Callable[[str], None],
    ) -> None:
        """Prepare a study.

        Args:
            config: sizes and settings that all methods share.
            data: the text.
            device: cpu or cuda.
            plan: what to compare.
            say: is told about progress, a line at a time.

        Raises:
            ConfigError: if a domain or a situation is not there.
        """
        for domain in (plan.old, plan.new):
            if "new-domain" in plan.situations and domain not in data.domains:
                raise ConfigError(
                    f"the text has no domain {domain!r}: give --old and --new two of "
                    f"{', '.join(data.domains)}"
                )
        for name in plan.situations:
            if name not in SITUATIONS:
                raise ConfigError(f"unknown situation {name!r}: choose {', '.join(SITUATIONS)}")
        if plan.tune_seed in plan.seeds:
            raise ConfigError("the seed that learning rates are tuned on is one of the others")
        self.config, self.data, self.device, self.plan, self.say = config, data, device, plan, say
        self.store = TokenStore(data, config.model.context, device)
        self.windows = {
            (pool, domain): self.store.spread(pool, domain, config.train.eval_windows)
            for pool in ("gate", "validation")
            for domain in data.domains
        }
        self.deadline = time.monotonic() + plan.seconds
        self.record: dict[str, Any] = {
            "steps": plan.steps,
            "seeds": list(plan.seeds),
            "tune_seed": plan.tune_seed,
            "tune_share": TUNE_SHARE,
            "config": config.to_dict(),
            "domains": list(data.domains),
            "old": plan.old,
            "new": plan.new,
            "situations": {},
            "stopped": None,
        }

    def run(self, save: Callable[[dict[str, Any]], None]) -> None:
        """Run everything; `save` is called with the record after every method."""
        began = time.monotonic()
        try:
            situations = [self._situation(name) for name in self.plan.situations]
            for situation in situations:
                self.record["situations"][situation.name] = {
                    "target": list(situation.target),
                    "methods": {},
                }
            timed = {situation.name: self.time(situation) for situation in situations}
            self.say(f"timed all methods in {time.monotonic() - began:.0f} s")
            for method in self.plan.methods:
                for situation in situations:
                    done = self.record["situations"][situation.name]["methods"]
                    costs = timed[situation.name][method.name]
                    done[method.name] = self._method(method, situation, *costs)
                    self.record["seconds"] = time.monotonic() - began
                    save(self.record)
        except OutOfTime:
            self.record["stopped"] = f"the time was used up after {time.monotonic() - began:.0f} s"
            self.say(self.record["stopped"])
        self.record["seconds"] = time.monotonic() - began
        save(self.record)

    # -- situations ------------------------------------------------------------------------------

    def _situation(self, name: str) -> Situation:
        domains, plan = self.data.domains, self.plan
        if name == "scratch":
            return Situation(name, tuple(1 / len(domains) for _ in domains), domains, {})
        mix = tuple(float(domain == plan.new) for domain in domains)
        return Situation(name, mix, (plan.new,), self._trained_trees())

    def _trained_trees(self) -> dict[int, LaneState]:
        """Train one tree for every seed densely on the old domain; records and moments are new."""
        plan, dense = self.plan, METHODS[0]
        lr = sorted(dense.grid)[len(dense.grid) // 2]
        mix = tuple(float(domain == plan.old) for domain in self.data.domains)
        seeds = (plan.tune_seed, *plan.seeds)
        alone = Situation("before", mix, (plan.old,), {})
        engine = self.engine(dense, alone, [(seed, lr) for seed in seeds])
        self.train(engine, plan.steps)
        bits = self.measure(engine, "validation")
        self.record["before"] = {"lr": lr, "steps": plan.steps, "bits": bits}
        self.say(f"trained on {plan.old}: {_mean(bits[plan.old]):.3f} bits per byte")
        trees = {}
        for lane, seed in enumerate(seeds):
            saved = engine.arena.read_lane(lane)
            for field in _RECORDS:
                saved.tensors[field].zero_()
            for field in ("last_culprit", "last_update"):
                saved.tensors[field].fill_(NEVER)
            trees[seed] = saved
        return trees

    def engine(
        self, method: Method, situation: Situation, lanes: list[tuple[int, float]]
    ) -> Engine:
        """Build an arena whose lanes have the given seeds and learning rates.

        On a CPU each lane is a chunk of its own, so that it ends exactly where it would end alone.
        """
        config = method.configure(self.config)
        count = len(lanes)
        arena = Arena(config, self.data.vocab_size, len(self.data.domains), count, self.device)
        for lane, (seed, lr) in enumerate(lanes):
            arena.reset_lane(lane, seed)
            if situation.start:
                arena.write_lane(lane, situation.start[seed])
            for name in ("top_k", "cooldown", "exploration"):
                arena.set_hyper(lane, name, getattr(config.train, name))
            arena.set_hyper(lane, "lr", lr)
            arena.set_mix(lane, tuple(situation.mix))
        return method.engine(arena, self.store, 1 if self.device == "cpu" else None)

    # -- one method ------------------------------------------------------------------------------

    def _method(
        self, method: Method, situation: Situation, seconds: list[float], flops: float
    ) -> dict[str, Any]:
        """Tune and run one method.

        Args:
            method: the method.
            situation: where it starts.
            seconds: time per step, from `time`.
            flops: FLOPs per step there.
        """
        began = time.monotonic()
        steps = self._steps_needed(situation, flops, statistics.median(seconds))
        lr, trials = self.tune(method, situation, math.ceil(TUNE_SHARE * steps))
        result = self._runs(method, situation, lr, seconds)
        edge = len(trials) > 1 and lr in (min(trials), max(trials))
        self.say(
            f"{situation.name} / {method.name}: lr {lr:g}{' (edge)' if edge else ''}, "
            f"{result['curve']['steps'][-1]} steps, "
            f"{1000 * result['step_seconds']:.2f} ms a step, "
            f"{time.monotonic() - began:.0f} s in all"
        )
        trials_by_name = {f"{rate:g}": _plain(bits) for rate, bits in sorted(trials.items())}
        return {"what": method.what, "lr": lr, "edge": edge, "trials": trials_by_name, **result}

    def _steps_needed(self, situation: Situation, flops: float, seconds: float) -> int:
        """Steps for which this method has used as many FLOPs and as much time as dense."""
        steps = self.plan.steps
        done = self.record["situations"][situation.name]["methods"]
        if "dense" not in done:
            return steps
        dense = done["dense"]
        ratio = max(1.0, dense["step_flops"] / flops, dense["step_seconds"] / seconds)
        return math.ceil(steps * min(LONGEST, ratio))

    def time(self, situation: Situation) -> dict[str, tuple[list[float], float]]:
        """Time one lane of every method alone, the methods in turn, so that all see the same drift.

        Returns:
            By method: seconds per step of each timed stretch, and FLOPs per step in them.
        """
        engines, stretches = {}, {}
        for method in self.plan.methods:
            lr = sorted(method.grid)[len(method.grid) // 2]
            engine = self.engine(method, situation, [(self.plan.tune_seed, lr)])
            if isinstance(engine, CoordinateEngine):
                engine.inner = 1  # a stretch is then one turn of every part, whatever each costs
                stretch = len(engine.arena.trees[0].blocks) + engine.shared_in_turn
            else:  # every stretch with the same number of attributions
                every = min(engine.arena.config.update.attribution_every, TIMED_STEPS)
                stretch = math.ceil(TIMED_STEPS / every) * every
            engines[method.name], stretches[method.name] = engine, stretch
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(TIMED + 1):
            for name, engine in engines.items():
                self._check_time()
                _wait(self.device)
                began = time.perf_counter()
                engine.train(0, 1, stretches[name])
                _wait(self.device)
                seconds[name].append((time.perf_counter() - began) / stretches[name])
        return {name: (seconds[name][1:], flops_per_step(engines[name])) for name in engines}

    def tune(
        self, method: Method, situation: Situation, steps: int
    ) -> tuple[float, dict[float, float]]:
        """Choose the learning rate that does best on the gate pool.

        Returns:
            The choice, and the bits per byte of every trial.
        """
        trials: dict[float, float] = {}
        rates = list(method.grid)
        while rates:
            engine = self.engine(method, situation, [(self.plan.tune_seed, lr) for lr in rates])
            self.train(engine, steps)
            bits = self.target_bits(engine, situation, "gate")
            trials.update(
                (lr, b if math.isfinite(b) else math.inf) for lr, b in zip(rates, bits, strict=True)
            )
            best = min(trials, key=lambda lr: (trials[lr], lr))
            rates = []
            if 1 < len(trials) < MOST_TRIALS:
                if best == max(trials):
                    rates = [best * GRID_RATIO]
                elif best == min(trials):
                    rates = [best / GRID_RATIO]
        return best, trials

    def _runs(
        self, method: Method, situation: Situation, lr: float, timed: list[float]
    ) -> dict[str, Any]:
        """Run all seeds, with evaluations at the schedule that all methods share."""
        engine = self.engine(method, situation, [(seed, lr) for seed in self.plan.seeds])
        seconds = statistics.median(timed)
        steps, curve = [0], [self.measure(engine, "validation")]

        def go_to(step: int) -> None:
            self.train(engine, step - steps[-1])
            steps.append(step)
            curve.append(self.measure(engine, "validation"))

        for step in schedule(self.plan.steps, self.plan.steps):
            go_to(step)
        # What a step costs may change on the way, and with it where the run has to end.
        while (end := self._steps_needed(situation, flops_per_step(engine), seconds)) > steps[-1]:
            go_to(next(s for s in schedule(self.plan.steps, end) if s > steps[-1]))
        quartiles = statistics.quantiles(timed, n=4)
        return {
            "step_seconds": seconds,
            "step_seconds_quartiles": [quartiles[0], quartiles[2]],
            "step_flops": flops_per_step(engine),
            "updated_blocks": updated_per_step(engine),
            "skipped": int(engine.arena["skipped"].sum()),
            "visits": visit_spread(engine),
            "curve": {
                "steps": steps,
                "bits": {
                    d: [[_plain(bits) for bits in point[d]] for point in curve]
                    for d in self.data.domains
                },
            },
        }

    # -- parts -----------------------------------------------------------------------------------

    def train(self, engine: Engine, steps: int) -> None:
        """Train all lanes, with a look at the clock between stretches.

        Raises:
            OutOfTime: if the time is used up.
        """
        while steps > 0:
            self._check_time()
            engine.train(0, engine.arena.lanes, min(steps, STRETCH))
            _wait(self.device)
            steps -= STRETCH

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def measure(self, engine: Engine, pool: str) -> dict[str, list[float]]:
        """Bits per byte by domain, of each lane."""
        lanes = engine.arena.lanes
        return {
            domain: engine.bits_per_byte(0, lanes, self.windows[pool, domain]).tolist()
            for domain in self.data.domains
        }

    def target_bits(self, engine: Engine, situation: Situation, pool: str) -> list[float]:
        """Mean bits per byte over the domains that count, of each lane."""
        bits = self.measure(engine, pool)
        return [_mean(lane) for lane in zip(*(bits[d] for d in situation.target), strict=True)]


def schedule(steps: int, end: int) -> list[int]:
    """Steps at which every method is evaluated, after the start: by equal ratios, and `end`."""
    points, k = {end}, -OCTAVES * POINTS_PER_OCTAVE
    while (point := round(steps * 2 ** (k / POINTS_PER_OCTAVE))) < end:
        points.add(max(1, point))
        k += 1
    return sorted(points)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _plain(value: float) -> float | None:
    """Make a figure that JSON can hold: None for one that is not finite."""
    return value if math.isfinite(value) else None


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
