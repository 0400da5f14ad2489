"""A method at work: runs of it that are lanes of one arena, and go through the stream together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from k1.arena import Arena
from k1.config import Config
from k1.engine import Engine
from k1.experiments.reading import read_passages
from k1.experiments.stream import Order, Views
from k1.flops import step_flops
from k1.sampling import TokenStore

if TYPE_CHECKING:
    from k1.experiments.method import Method

RISE = 0.05
"""Share of a phase in which the learning rate rises."""
LOWEST = 0.1
"""Where the learning rate ends, as a share of its height."""
VIEWS = ("windows", "passages")


@dataclass(frozen=True)
class Run:
    """One run of a method."""

    method: str
    order: Order
    seed: int
    lr: float
    strength: float = 0.0
    """Of a penalty, for methods that have one."""


class Learner:
    """Runs of one method on one arena.

    A method that settings do not express overrides some of: `configure`, `make_engine`, `begin`,
    `end`, `train`, `measure`, and says what it costs by `overhead` or `step_flops`, `parameters`
    and `moving`.
    """

    longest = math.inf
    """Steps of a phase at most, as a multiple of a dense run's, where equal FLOPs would be more."""

    def __init__(
        self,
        method: Method,
        config: Config,
        store: TokenStore,
        vocab_size: int,
        runs: Sequence[Run],
        device: torch.device | str,
        later_lr: float = 1.0,
    ) -> None:
        """Fill an arena with fresh systems.

        Args:
            method: what to do.
            config: the experiment's settings; the method sets its own in them.
            store: the text.
            vocab_size: number of token ids.
            runs: a lane for each.
            device: where all is held.
            later_lr: factor of the learning rate from the second domain on.
        """
        self.method, self.base, self.store, self.runs = method, config, store, tuple(runs)
        self.later_lr = later_lr
        self.phase = 0
        self.lanes = len(self.runs)
        self.arena = Arena(self.configure(0), vocab_size, len(store.domains), self.lanes, device)
        for lane in range(self.lanes):
            self.fresh(lane)
        self.engine = self.make_engine()
        self.flops = [0.0] * self.lanes
        """Executed floating-point operations of each run, by formula."""
        self._moved = [0.0] * self.lanes
        self._lived = [0.0] * self.lanes

    def configure(self, phase: int) -> Config:
        """Return the settings of a phase; sizes are the same in all."""
        return self.method.configure(self.base, phase)

    def fresh(self, lane: int) -> None:
        """Fill a lane with a fresh system of its run."""
        run = self.runs[lane]
        self.arena.reset_lane(lane, run.seed)
        self.arena.set_hyper(lane, "lr", run.lr)

    @property
    def chunk(self) -> int | None:
        """Lanes of an engine's pass: one on a CPU, where a run then ends as it would alone."""
        return 1 if self.arena.device.type == "cpu" else None

    def make_engine(self) -> Engine:
        """Build the engine of a phase."""
        return Engine(self.arena, self.store, self.chunk)

    def domain(self, lane: int, phase: int | None = None) -> str:
        """The domain of a run in a phase, by default the present one."""
        return self.runs[lane].order[self.phase if phase is None else phase]

    def begin(self, phase: int) -> None:
        """Meet the next domain of each run."""
        self.phase = phase
        if phase:
            self.arena.configure(self.configure(phase))
        for lane, run in enumerate(self.runs):
            for name in ("top_k", "cooldown", "exploration"):
                self.arena.set_hyper(lane, name, getattr(self.arena.config.train, name))
            self.arena.set_hyper(lane, "lr", run.lr * (self.later_lr if phase else 1.0))
            shares = self.mix(run.order)
            row = [shares.get(domain, 0.0) for domain in self.store.domains]
            self.arena.set_mix(lane, tuple(row))
        if phase:  # a recorded step has the last phase's settings in it
            self.engine = self.make_engine()

    def mix(self, order: Order) -> dict[str, float]:
        """Share of each domain in a run's training stream in the present phase."""
        if self.method.joint:
            return dict.fromkeys(order, 1 / len(order))
        shares = {order[self.phase]: 1.0}
        if self.phase and self.method.replay:
            past = dict.fromkeys(order[: self.phase], self.method.replay / self.phase)
            shares = {order[self.phase]: 1 - self.method.replay, **past}
        return shares

    def end(self) -> None:
        """Take leave of the present domain."""

    @property
    def overhead(self) -> float:
        """Compute of a step, as a multiple of what the formula says of an ordinary one."""
        return 1.0

    def step_flops(self, lane: int = 0, updated: float | None = None) -> float:
        """Operations of a training step, by formula.

        Args:
            lane: whose tree.
            updated: blocks that are updated, root included; by default what `top_k` allows.
        """
        a = self.arena
        blocks = len(a.trees[lane].blocks)
        if updated is None:
            updated = min(a.host_top_k[lane] + 1, blocks)
        return self.overhead * step_flops(a.config, a.vocab_size, blocks, updated)

    def train(self, done: int, steps: int, total: int) -> None:
        """Make the steps done + 1 .. done + steps of a phase that has `total`."""
        a, before = self.arena, self._counters()
        self.engine.train(0, self.lanes, steps, lambda i: height((done + i + 0.5) / total))
        changes = zip(before, self._counters(), strict=True)
        agents, blocks, shared = ([y - x for x, y in zip(*c, strict=True)] for c in changes)
        for lane in range(self.lanes):
            # The root is on every path.
            self.flops[lane] += steps * self.step_flops(lane, agents[lane] / steps + 1)
            moved = blocks[lane] * a.block_layout.total + shared[lane] * a.shared_layout.total
            self._moved[lane] += moved * self.moving(lane)
            self._lived[lane] += steps * Learner.parameters(self, lane)

    def moving(self, lane: int) -> float:
        """Share of the parameters of those blocks that move which do so themselves."""
        return 1.0

    def _counters(self) -> list[list[int]]:
        """Blocks that steps have moved, without and with the root, and shared parts: by lane."""
        a = self.arena
        return [
            a["blocks_updated"].tolist(),
            a["updates"].sum(1).tolist(),
            a["shared_count"].tolist(),
        ]

    @property
    def moved(self) -> list[float]:
        """Share of the living parameters that a step has moved, on average, of each run."""
        return [moved / lived for moved, lived in zip(self._moved, self._lived, strict=True)]

    def measure(self, views: Views, view: str) -> list[list[float]]:
        """Bits per byte of each run's domains, in the order of its stream: [lanes][domains]."""
        by_domain: dict[str, list[float]] = {}
        for domain in self.store.domains:
            if view == "windows":
                bits = self.engine.bits_per_byte(0, self.lanes, views.windows[domain]).tolist()
            else:
                bits = read_passages(self.engine, views.passages[domain])
            by_domain[domain] = bits
        return self.in_order(by_domain)

    def in_order(self, by_domain: Mapping[str, Sequence[float]]) -> list[list[float]]:
        """Turn figures of domains, by lane, into those of each run in the order of its stream."""
        return [
            [by_domain[domain][lane] for domain in run.order] for lane, run in enumerate(self.runs)
        ]

    def parameters(self, lane: int) -> int:
        """Living parameters of a run's system."""
        a = self.arena
        return len(a.trees[lane].blocks) * a.block_layout.total + a.shared_layout.total

    def remarks(self, lane: int) -> dict[str, Any]:
        """Figures of the method's own that a run's row has besides, as plain JSON data."""
        return {}


def height(done: float) -> float:
    """Learning rate at a share of a phase that is done: a linear rise, then half a cosine."""
    fall = LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2
    return min(1.0, done / RISE) * fall
