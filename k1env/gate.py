"""The gate: does a change really make learning better?

For each of several seeds, twins are forked from the present state: a control as it is and a cheat
with the change. Both train on identical batches for a horizon, then both anneal their learning
rate linearly to zero (without that, a lower learning rate looks better than it is), and both are
scored on the same fresh windows of the gate pool. A one-sided t-test on the relative differences
decides, with a margin. The state that the trial starts from is never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats

from k1.arena import LaneState
from k1.config import read_dataclass
from k1.engine import Engine
from k1.errors import ConfigError
from k1.rng import derive_seed
from k1env.schedule import Scheduler, Score, Separate, Task, Train

CONTROL, CHEAT, SHADOW = "control", "cheat", "shadow"
MAIN, SHADOW_LANE, FIRST_TRIAL_LANE = 0, 1, 2
"""Lanes of a session by itself: the system, its shadow, and the first of those for trials."""
Scores = dict[str, list[float]]
Change = Callable[[int], None]
"""Changes a lane."""


@dataclass(frozen=True)
class GateConfig:
    """Settings of a trial. The error rates are part of K-1's promise: don't loosen them."""

    seeds: int = 8
    """Twins in a full trial."""
    horizon: int = 60
    """Training steps before annealing."""
    anneal: int = 30
    """Steps over which the scoring copies' learning rate falls to zero."""
    early: int = 2
    """A trial ends after this many seeds if none of them shows a gain, and later as soon as the
    mean gain is not above the margin. Ending early can only refuse, so it costs no error."""
    group: int = 2
    """Seeds trained at once after that; more need more memory."""
    windows: int = 64
    """Gate-pool windows that each twin is scored on."""
    margin: float = 0.001
    """Relative gain that the mean has to exceed."""
    alpha: float = 0.01
    """Largest p-value that counts as a success."""
    compute_price: float = 0.01
    """Bits per byte added to the loss for a step's compute, relative to the starting tree's."""

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the field."""
        for name, least in (("seeds", 1), ("horizon", 1), ("anneal", 1), ("early", 1),
                            ("group", 1), ("windows", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"gate.{name} = {getattr(self, name)}: use {least} or more")
        if not (0 < self.alpha < 1 and math.isfinite(self.margin) and self.compute_price >= 0):
            raise ConfigError("gate: use 0 < alpha < 1, a finite margin, compute_price >= 0")


@dataclass(frozen=True)
class Comparison:
    """Relative differences (other - cheat) / other over the seeds, tested against the margin."""

    differences: tuple[float, ...]
    mean: float
    std: float
    p_value: float
    passed: bool


NOT_FINITE = Comparison((), 0.0, 0.0, 1.0, False)
"""A comparison with a loss that was not finite."""


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured."""

    accepted: bool
    reason: str
    control: Comparison | None
    shadow: Comparison | None
    """Against the shadow; None if there was none."""
    seeds_run: int
    lane_steps: int
    """Training steps spent, over all lanes."""
    stream_digests: tuple[str, ...] = ()
    """One for each seed, over what decides the training batches of its twins."""
    window_digests: tuple[str, ...] = ()
    """One for each seed, over the gate windows that its twins were scored on."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrialResult:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: if it is no such result.
        """
        return read_dataclass(cls, data, "trial", whole=True)


def differences(
    other: Sequence[float], cheat: Sequence[float], *, stop: bool = False
) -> list[float]:
    """Gains of one arm over the other, seed by seed, as shares of the loss."""
    if stop:
        return [(c - o) / c for o, c in zip(other, cheat, strict=True)]
    return [(o - c) / o for o, c in zip(other, cheat, strict=True)]


def compare(
    other: Sequence[float], cheat: Sequence[float], config: GateConfig, *, stop: bool = False
) -> Comparison:
    """Test whether `cheat` has the lower loss by more than the margin.

    With `stop`, the question is turned round: `other` is the system that trained on, `cheat` the
    one that stopped, and the test is passed if training on gains less than the margin.
    """
    return judge(differences(other, cheat, stop=stop), config, stop=stop)


def judge(pairs: Sequence[float], config: GateConfig, *, stop: bool = False) -> Comparison:
    """Do what `compare` does, on the differences themselves."""
    if not all(math.isfinite(d) for d in pairs):
        return NOT_FINITE
    mean = math.fsum(pairs) / len(pairs)
    std, p = 0.0, 1.0
    if len(pairs) > 1:
        std = math.sqrt(math.fsum((d - mean) ** 2 for d in pairs) / (len(pairs) - 1))
    if std > 0:
        side = "less" if stop else "greater"
        p = float(stats.ttest_1samp(pairs, popmean=config.margin, alternative=side).pvalue)
    passed = len(pairs) == config.seeds and std > 0 and p <= config.alpha
    return Comparison(tuple(pairs), mean, std, p, passed)


def hopeless(gains: Sequence[float], config: GateConfig, *, stop: bool = False) -> bool:
    """Whether the differences of the seeds so far speak against the cheat, so that a trial ends."""
    if not all(math.isfinite(gain) for gain in gains):
        return True
    mean = math.fsum(gains) / len(gains)
    if len(gains) <= config.early:
        limit = config.margin if stop else 0.0
        return all(not (d < limit if stop else d > limit) for d in gains)
    return not mean < config.margin if stop else not mean > config.margin


class Gate:
    """Runs trials in spare lanes of an arena: lanes `first`, `first` + 1, ..."""

    def __init__(self, engine: Engine, first: int, config: GateConfig) -> None:
        """Bind the gate to its lanes."""
        self.engine, self.first, self.config = engine, first, config
        self.adopted: dict[str, LaneState] = {}

    @staticmethod
    def lanes_needed(config: GateConfig, arms: int = 3) -> int:
        """Lanes that a trial uses at once: one with a shadow has three arms, else there are two."""
        return arms * max(config.early, config.group)

    def run(self, main: int, shadow: int | None, change: Change, **more: Any) -> TrialResult:
        """Try a change at once, in lanes `first`, `first` + 1, ...; see `trial`."""
        scheduler = Scheduler(Separate(self.engine), range(0))
        return scheduler.run([self.trial(main, shadow, change, **more)])[0]

    def trial(
        self,
        main: int,
        shadow: int | None,
        change: Change,
        *,
        seed: int,
        mix: Sequence[float],
        price: Callable[[int], float],
        stop: bool = False,
        own_stream: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Task[TrialResult]:
        """Try a change in lanes `first`, ...; lanes `main` and `shadow` are left as they are.

        The first seed's twins go on with the main lane's own stream of batches. Their states after
        the horizon, before annealing, are kept in `adopted`, so that the caller can go on from
        there: a trial costs the main lane no time.

        Args:
            main: lane to fork.
            shadow: lane that a cheat must beat too, or None.
            change: makes the change in a lane.
            seed: of this trial; all batches but the first seed's follow from it.
            mix: share of each domain in the score.
            price: compute price of a lane in bits per byte.
            stop: test stopping: the cheat skips the horizon.
            own_stream: let the first seed go on with the main lane's stream; else it is fresh too.
            progress: called with (seeds done, seeds) as the trial goes on.
        """
        config, arena = self.config, self.engine.arena
        # The cheat comes last if it stops, so that those that train lie side by side.
        others = [CONTROL] + ([SHADOW] if shadow is not None else [])
        arms = [*others, CHEAT] if stop else [CONTROL, CHEAT, *others[1:]]
        scores: Scores = {arm: [] for arm in arms}
        streams: list[str] = []
        windows: list[str] = []
        lane_steps, done = 0, 0
        self.adopted = {}
        if progress:
            progress(0, config.seeds)
        while done < config.seeds:
            size = min(config.group if done else config.early, config.seeds - done)
            lanes = {arm: self.first + i * size for i, arm in enumerate(arms)}
            for arm in arms:
                source = shadow if arm == SHADOW and shadow is not None else main
                arena.copy_lane(source, *range(lanes[arm], lanes[arm] + size))
            for i in range(size):
                for arm in arms:
                    if done + i or not own_stream:
                        fresh = derive_seed("trial", seed, done + i)
                        arena["data_seed"][lanes[arm] + i] = fresh
                change(lanes[CHEAT] + i)
            streams += self._stream_digests(lanes, size)
            lane_steps += yield from self._train(arms, lanes, size, keep=done == 0, stop=stop)
            scoring = self._score(arms, lanes, size, done, seed, mix, price)
            group_windows, group_scores = yield from scoring
            windows += group_windows
            for arm in arms:
                scores[arm] += group_scores[arm]
            done += size
            if progress:
                progress(done, config.seeds)
            if self._hopeless(scores, stop):
                break
        return self._judge(scores, streams, windows, done, lane_steps, stop)

    def _stream_digests(self, arms: dict[str, int], size: int) -> list[str]:
        """Hash what each seed's training batches follow from, which is one thing for all its arms.

        Args:
            arms: first lane of each arm.
            size: seeds, and so lanes of each arm.

        Raises:
            AssertionError: if twins are to meet different batches: luck would pass for improvement.
        """
        low, high = min(arms.values()), max(arms.values()) + size
        digests = [hashlib.sha256() for _ in range(size)]
        for name in ("data_seed", "data_cursor", "mix"):
            rows = self.engine.arena[name][low:high].cpu().numpy()
            for i, digest in enumerate(digests):
                parts = {rows[first + i - low].tobytes() for first in arms.values()}
                assert len(parts) == 1, f"twins differ in {name}"
                digest.update(parts.pop())
        return [digest.hexdigest() for digest in digests]

    def _train(
        self, arms: list[str], lanes: dict[str, int], size: int, *, keep: bool, stop: bool
    ) -> Task[int]:
        """Train all arms of a group; returns the lane steps spent."""
        config, arena = self.config, self.engine.arena
        low, high = self.first, self.first + len(arms) * size
        trained = high - low - size if stop else high - low  # what stops skips the horizon
        yield Train(tuple(range(low, low + trained)), config.horizon)
        if keep:
            self.adopted = {arm: arena.read_lane(lanes[arm]) for arm in arms}
        yield Train(tuple(range(low, high)), config.anneal, anneal=True)
        return trained * config.horizon + (high - low) * config.anneal

    def _score(
        self,
        arms: list[str],
        lanes: dict[str, int],
        size: int,
        done: int,
        seed: int,
        mix: Sequence[float],
        price: Callable[[int], float],
    ) -> Task[tuple[list[str], Scores]]:
        """Score all arms of a group on fresh windows, the same ones for each seed's arms.

        Returns:
            A digest of each seed's windows, and the scores.
        """
        config, engine = self.config, self.engine
        seeds = [derive_seed("gate", seed, done + i) for i in range(size)]
        device = engine.arena.device
        row = torch.tensor(mix, dtype=torch.float32, device=device).expand(size, -1)
        batch = engine.store.sample(
            "gate",
            torch.tensor(seeds, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
            row,
            config.windows,
        )
        inputs = batch.inputs.cpu().numpy()
        digests = [hashlib.sha256(own.tobytes()).hexdigest() for own in inputs]
        every_arm = batch.map(lambda t: t.repeat(len(arms), *[1] * (t.dim() - 1)))
        stop = self.first + len(arms) * size
        bits = yield Score(self.first, stop, every_arm)
        loss = [x + price(self.first + i) for i, x in enumerate(bits)]
        scores = {arm: loss[i * size : (i + 1) * size] for i, arm in enumerate(arms)}
        return digests, scores

    def _hopeless(self, scores: Scores, stop: bool) -> bool:
        """Whether the seeds so far speak against the cheat, over control or shadow."""
        return any(
            hopeless(differences(scores[arm], scores[CHEAT], stop=stop), self.config, stop=stop)
            for arm in scores
            if arm != CHEAT
        )

    def _judge(
        self,
        scores: Scores,
        streams: list[str],
        windows: list[str],
        done: int,
        lane_steps: int,
        stop: bool,
    ) -> TrialResult:
        config = self.config
        control = compare(scores[CONTROL], scores[CHEAT], config, stop=stop)
        shadow = None
        if SHADOW in scores:
            shadow = compare(scores[SHADOW], scores[CHEAT], config, stop=stop)
        # Each by itself: fresh windows don't make up for batches met twice, nor the reverse.
        same_stream = len(set(streams)) < len(streams)
        same_windows = len(set(windows)) < len(windows)
        distinct = not (same_stream or same_windows)
        accepted = distinct and control.passed and (shadow is None or shadow.passed)
        if accepted:
            reason = "improves" if not stop else "going on gains less than the margin"
        elif same_stream:
            reason = "two seeds were trained on the same batches"
        elif same_windows:
            reason = "two seeds were scored on the same windows"
        elif NOT_FINITE in (control, shadow):
            reason = "a loss was not finite"
        elif done < config.seeds:
            reason = f"no sufficient gain in the first {done} seeds"
        elif not control.passed:
            reason = f"not shown: p = {control.p_value:.3g} against the control"
        else:
            assert shadow is not None
            reason = f"beats the control but not the shadow (p = {shadow.p_value:.3g})"
        return TrialResult(
            accepted, reason, control, shadow, done, lane_steps, tuple(streams), tuple(windows)
        )
