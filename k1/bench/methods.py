"""The methods that the study of time to loss compares, and the engines that some of them need.

Block-coordinate descent follows Luo, Yu and Li, "BAdam: a memory efficient full parameter
optimization method for large language models", NeurIPS 2024: blocks take turns in an order that is
permuted anew for every epoch, a turn is some Adam steps on one block from zero moments, and all
other blocks stand still. A block of the tree is a block of the method; the shared part (embedding,
positions, final norm, head) is one more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection
from k1.config import Config
from k1.engine import Engine
from k1.errors import ConfigError
from k1.forward import Activations, Batch, Text, read_text
from k1.records import StepResult, record
from k1.rng import derive_seed
from k1.sampling import TokenStore, draw
from k1.topology import ROOT_SLOT

GRID = (4e-4, 1e-3, 2.5e-3)
"""Learning rates that every method is tuned over, unless it says otherwise."""
NEVER_AGAIN = 1 << 30
"""So many steps that an attribution is done once only, or that a cooldown outlasts any run."""


class VisitEngine(Engine):
    """Divides a block's responsibility by the root of 1 + its updates before the drill-down.

    Updates, not visits: a visit counts for the culprit alone, and its ancestors compete too.
    """

    def _select(self, start: int, stop: int, measured: Tensor) -> Selection:
        updates = self.arena["updates"][start:stop]
        return super()._select(start, stop, measured / (1 + updates).sqrt())


class CoordinateEngine(Engine):
    """Block-coordinate descent: one block at a time, `inner` Adam steps from zero moments.

    No text statistics are gathered: nothing is held responsible for the text.
    """

    def __init__(
        self,
        arena: Arena,
        store: TokenStore,
        lane_chunk: int | None = None,
        *,
        inner: int,
        shared_in_turn: bool,
        whole_subtree: bool,
    ) -> None:
        """Bind an arena whose lanes are filled already.

        Args:
            arena: the lanes.
            store: the text.
            lane_chunk: as for `Engine`.
            inner: steps of a turn.
            shared_in_turn: the shared part has a turn of its own; otherwise it is always trained.
            whole_subtree: give the active block its exact gradient, by a backward pass through
                everything below it; otherwise the path from the root to the block is all that has
                a graph, as in sparse mode.
        """
        super().__init__(arena, store, lane_chunk)
        self.inner, self.whole_subtree = inner, whole_subtree
        self.shared_in_turn = shared_in_turn
        shape, device = arena["weight"].shape[:2], arena.device
        self.scale = torch.zeros(shape, device=device)
        self.on_path = torch.zeros(shape, dtype=torch.bool, device=device)
        self.culprit = torch.full((shape[0], 1), -1, dtype=torch.int64, device=device)
        self.shared_on = torch.full((shape[0],), not shared_in_turn, device=device)
        self.seeds = arena["data_seed"].tolist()
        self.first_step = list(arena.host_step)
        self.path_blocks = [0] * shape[0]
        """Path blocks of a step, summed over each lane's steps."""
        self._on_path_now = [0] * shape[0]
        widest = max(index.width for index in arena.index(0, arena.lanes))
        depth = len(arena.index(0, arena.lanes)) - 1
        for lane in range(arena.lanes):  # sizes the engine's list of path blocks
            arena.set_hyper(lane, "top_k", widest + depth - 1 if whole_subtree else depth)

    def turn(self, lane: int, number: int) -> int | None:
        """Return the slot whose turn it is, or None for the shared part."""
        parts: list[int | None] = [*sorted(self.arena.trees[lane].blocks)]
        if self.shared_in_turn:
            parts.append(None)
        epoch, place = divmod(number, len(parts))
        seed = derive_seed("coordinate", self.seeds[lane], epoch)
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
        return parts[order[place]]

    def _begin(self, lane: int, number: int) -> None:
        """Give the next part of a lane its turn."""
        a, tree = self.arena, self.arena.trees[lane]
        slot = self.turn(lane, number)
        self.scale[lane], self.on_path[lane] = 0.0, False
        self.culprit[lane] = -1 if slot is None else slot
        if self.shared_in_turn:
            self.shared_on[lane] = slot is None
        if slot is None:
            for name in ("shared_first", "shared_second", "shared_count"):
                a[name][lane] = 0
        else:
            self.scale[lane, slot] = 1.0
            for name in ("first", "second", "count"):
                a[name][lane, slot] = 0
        top = ROOT_SLOT if slot is None else slot
        path = {*tree.path(top), *(tree.subtree(top) if self.whole_subtree else ())}
        self.on_path[lane, sorted(path)] = True
        self._on_path_now[lane] = len(path)

    def step(self, start: int, stop: int, batch: Batch | None = None) -> StepResult:
        """Make one step of each lane's active part, on the next batch of its stream."""
        a = self.arena
        for lane in range(start, stop):
            number, within = divmod(a.host_step[lane] - self.first_step[lane], self.inner)
            if within == 0:
                self._begin(lane, number)
            self.path_blocks[lane] += self._on_path_now[lane]
        return super().step(start, stop, batch)

    @torch.enable_grad()
    def _step(self, start: int, stop: int, due: bool, batch: Batch | None) -> StepResult:
        lanes = slice(start, stop)
        if batch is None:
            batch, text = draw(self.store, self.arena, start, stop, self.backend.kernels)
        else:
            text = read_text(batch, self.arena.config)
        selection = Selection(self.scale[lanes], self.on_path[lanes], self.culprit[lanes])
        result = self.path_step(start, stop, batch, text, selection)
        record(self.arena, start, stop, result, self.backend.kernels)
        return result

    def _sharers(self, start: int, stop: int) -> Tensor:
        return self.shared_on[start:stop]

    def _count(
        self,
        start: int,
        stop: int,
        selection: Selection,
        done: Activations,
        text: Text,
        fine: Tensor,
        row: Tensor | None = None,
    ) -> None:
        pass


@dataclass(frozen=True)
class Method:
    """One way to spend compute on a tree."""

    name: str
    what: str
    """One line for the report."""
    update: dict[str, Any] = field(default_factory=dict)
    """Fields of `config.update` that it changes."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of `config.train` that it changes."""
    grid: tuple[float, ...] = GRID
    engine: Callable[[Arena, TokenStore, int | None], Engine] = Engine

    def configure(self, config: Config) -> Config:
        """Return the configuration with the method's own fields."""
        return config.replace(update={"mode": "sparse", **self.update}, train=self.train)


_ONCE = {"attribution_every": NEVER_AGAIN}


def _coordinate(
    name: str, what: str, *, inner: int, shared_in_turn: bool, whole_subtree: bool
) -> Method:
    engine = partial(
        CoordinateEngine, inner=inner, shared_in_turn=shared_in_turn, whole_subtree=whole_subtree
    )
    return Method(name, what, _ONCE, engine=engine)


METHODS = (
    Method("dense", "every block, every step", {"mode": "dense"}),
    Method("sparse", "attribution on a probe, one path"),
    Method(
        "random",
        "a random path, no attribution",
        _ONCE,
        {"exploration": 1.0, "cooldown": 0},
    ),
    Method("round-robin", "the path updated longest ago", _ONCE, {"cooldown": NEVER_AGAIN}),
    _coordinate(
        "bcd",
        "BAdam: 50 steps a block, the shared part in turn",
        inner=50,
        shared_in_turn=True,
        whole_subtree=True,
    ),
    _coordinate(
        "bcd-10",
        "BAdam with 10 steps a block",
        inner=10,
        shared_in_turn=True,
        whole_subtree=True,
    ),
    _coordinate(
        "bcd-10-shared",
        "10 steps a block, the shared part in every step",
        inner=10,
        shared_in_turn=False,
        whole_subtree=True,
    ),
    _coordinate(
        "bcd-10-path",
        "the same with gradients along the path only",
        inner=10,
        shared_in_turn=False,
        whole_subtree=False,
    ),
    Method("top-9", "sparse, top_k 9", train={"top_k": 9}),
    Method("top-20", "sparse, top_k 20", train={"top_k": 20}),
    Method("explore-0.1", "sparse, one path in ten random", train={"exploration": 0.1}),
    Method("explore-0.3", "sparse, three paths in ten random", train={"exploration": 0.3}),
    Method("visits", "sparse, responsibility / sqrt(1 + updates)", engine=VisitEngine),
    Method("shared-0.3", "sparse, shared part at 30 %", {"shared_scale": 0.3}),
    Method("shared-3", "sparse, shared part at 300 %", {"shared_scale": 3.0}),
    Method("inner-2", "sparse, 2 inner steps", {"inner_steps": 2}),
    Method("inner-4", "sparse, 4 inner steps", {"inner_steps": 4}),
    Method(
        "full-path",
        "sparse, every block of the path at 100 %",
        {"scales": (1.0,), "root_scale": 1.0},
    ),
)
"""Those that the issue names first, then what might mend sparse training."""


def choose_methods(names: str) -> tuple[Method, ...]:
    """Return methods by their names, apart by commas, or `all`; dense always leads.

    Raises:
        ConfigError: for an unknown name.
    """
    known = {method.name: method for method in METHODS}
    wanted = list(known) if names == "all" else names.split(",")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown method {name!r}: choose from {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(["dense", *wanted]))
