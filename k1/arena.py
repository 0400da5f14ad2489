"""The arena: one table of numbers that holds every lane's complete state.

A lane is a row of every tensor in `Arena.state`, plus its `Topology`. Copying a lane is copying
rows; a fork, a snapshot, a rollback, a checkpoint and a state hash are all made of that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k1.attribution import NEVER, Leaves, index_leaves
from k1.block import block_layout, initial_rows, shared_layout
from k1.config import MOST_SLOTS, Config
from k1.errors import CheckpointError, ConfigError
from k1.forward import Forest, RouterState, Weights
from k1.levels import Extent, LevelIndex, index_levels
from k1.rng import derive_seed
from k1.topology import Topology

_FEW_LOOKS = 12
"""Leaves that a step of a roomy arena can look at without a new shape."""


def _room_for_looks(looks: int) -> int:
    """Round the leaves that a step looks at up to one of a few numbers."""
    room = _FEW_LOOKS
    while room < looks:
        room *= 2
    return room


@dataclass(frozen=True)
class LaneState:
    """A detached copy of one lane."""

    tensors: dict[str, Tensor]
    tree: Topology
    lent: bool = False
    """Whether the tensors are somebody else's, who will write over them."""

    def own(self) -> LaneState:
        """Return the lane in tensors that nobody else writes to."""
        if not self.lent:
            return self
        return LaneState({k: v.clone() for k, v in self.tensors.items()}, self.tree.copy())

    def to(self, device: torch.device | str) -> LaneState:
        """Return the lane on a device; where it is there already, its tensors are the same."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        same = any(moved[name] is tensor for name, tensor in self.tensors.items())
        return LaneState(moved, self.tree.copy(), self.lent and same)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors onto others pair by pair, in as few launches as torch can."""
    for kind in {tensor.dtype for tensor in targets}:  # those of one type go together
        pairs = [p for p in zip(targets, sources, strict=True) if p[0].dtype == kind]
        torch._foreach_copy_([p[0] for p in pairs], [p[1] for p in pairs])


MOST_FLOAT, MOST_COUNT = 3e38, 2**62
"""Beyond these, numbers of steps and settings overflow."""
LaneLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def lane_layout(config: Config, vocab_size: int, domains: int) -> LaneLayout:
    """Tell the shape and type of each tensor of a lane, by name."""
    s, p = sum(config.model.level_capacity) + 1, block_layout(config.model).total
    q, ev = shared_layout(config.model, vocab_size).total, config.evidence
    table = ev.buckets + ev.context_buckets if config.model.router == "evidence" else 0
    f32, i64 = torch.float32, torch.int64
    return {
        **{name: ((s, p), f32) for name in ("weight", "first", "second")},
        **{name: ((q,), f32) for name in ("shared", "shared_first", "shared_second")},
        "evidence": ((s, 3, table), i64),
        **{n: ((s,), f32) for n in ("log_prior", "responsibility", "mean_responsibility")},
        **{n: ((s,), i64) for n in ("count", "visits", "updates", "born")},
        **{n: ((s,), i64) for n in ("last_culprit", "last_update")},
        **{n: ((), i64) for n in ("shared_count", "step", "skipped", "blocks_updated")},
        **{n: ((), i64) for n in ("data_seed", "data_cursor", "top_k", "cooldown")},
        **{n: ((), f32) for n in ("lr", "lr_factor", "exploration", "loss")},
        "mix": ((domains,), f32),
    }


def bytes_of(layout: LaneLayout) -> int:
    """Memory of a lane."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _check_room(needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ConfigError(
            f"the lanes need {needed / 2**30:,.1f} GiB, but there are {there / 2**30:,.1f}: "
            "choose smaller sizes or fewer lanes"
        )


def check_fit(tensors: Mapping[str, Tensor], layout: LaneLayout) -> None:
    """See that tensors have the shapes and types of a lane.

    Raises:
        CheckpointError: if not.
    """
    for name, (shape, dtype) in layout.items():
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype != dtype:
            raise CheckpointError(
                f"the saved state does not fit this configuration ({name!r} differs): "
                "use the configuration it was saved with"
            )


def check_settings(tensors: Mapping[str, Tensor]) -> None:
    """See that what a lane is steered by is possible; weights may be anything, and training sees.

    Args:
        tensors: those of a lane, of the right shapes and types.

    Raises:
        CheckpointError: if not.
    """
    most = {"lr": MOST_FLOAT, "lr_factor": MOST_FLOAT, "exploration": 1.0, "top_k": MOST_SLOTS}
    counts = ("step", "data_cursor", "cooldown", "count", "shared_count", "evidence")
    for name in (*most, *counts, "mix"):
        value = tensors[name]
        if not bool(((value >= 0) & (value <= most.get(name, MOST_COUNT))).all()):  # NaN neither
            raise CheckpointError(
                f"the saved state has an impossible {name}: go back to an earlier checkpoint"
            )
    if not min(float(tensors[name].sum()) for name in ("top_k", "lr", "mix")) > 0:
        raise CheckpointError(
            "the saved state has no top_k, lr or text: go back to an earlier checkpoint"
        )


class Arena:
    """All lanes' numbers. S counts slots and one scratch row that padding points to.

    `state` holds, by name:

    * `weight`, `first`, `second` [L, S, P] and `shared`, `shared_first`, `shared_second` [L, Q]:
      parameters and moments; `count` [L, S] and `shared_count` [L]: own optimizer steps;
    * `evidence` [L, S, 3, H] and `log_prior` [L, S]: routing statistics;
    * `responsibility` (last measured), `mean_responsibility` (running), `visits`, `updates`,
      `last_culprit`, `last_update`, `born` [L, S]: records of each block;
    * `step`, `skipped`, `blocks_updated`, `loss` (running) [L]: records of the lane;
    * `data_seed`, `data_cursor` [L] and `mix` [L, domains]: its stream of text;
    * `lr`, `lr_factor`, `top_k`, `cooldown`, `exploration` [L]: its hyper-parameters.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        domains: int,
        lanes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate `lanes` empty lanes; `reset_lane` or `write_lane` fills them.

        Raises:
            ConfigError: if they need more memory than the device has.
        """
        self.config = config
        self.device = torch.device(device)
        self._layout = lane_layout(config, vocab_size, domains)
        _check_room(lanes * bytes_of(self._layout), self.device)
        self.lanes = lanes
        self.vocab_size = vocab_size
        self.block_layout = block_layout(config.model)
        self.shared_layout = shared_layout(config.model, vocab_size)
        capacity = config.model.level_capacity
        self.trees = [Topology(capacity, config.model.max_children) for _ in range(lanes)]
        self.scratch = sum(capacity)
        # Indices that keep their shapes and addresses when a tree changes, for recorded steps.
        self.fixed_room = self.device.type == "cuda"
        self.roomy = False
        """Whether those indices have room for any tree, so that there is one shape of them."""
        # What the host has to know without asking the device: kept in step by the methods below.
        self.host_step = [0] * lanes
        self.host_top_k = [1] * lanes
        self._hyper: list[dict[str, float] | None] = [None] * lanes
        self._mix: list[tuple[float, ...] | None] = [None] * lanes
        self._index: dict[tuple[int, int], list[LevelIndex]] = {}
        self._room: dict[tuple[int, int, Extent], list[LevelIndex]] = {}
        self._leaves: dict[tuple[int, int], Leaves] = {}
        self._leaves_room: dict[tuple[int, int, int, int], Leaves] = {}
        self.state: dict[str, Tensor] = {
            name: torch.zeros(lanes, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in self._layout.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return a state tensor of all lanes."""
        return self.state[name]

    def reset_lane(self, lane: int, seed: int, branching: tuple[int, ...] | None = None) -> None:
        """Fill a lane with a fresh tree, drawn from `seed`.

        Args:
            lane: the lane.
            seed: decides the weights and the stream of text.
            branching: children per block, level by level, if not the configuration's.

        Raises:
            TopologyError: if a tree of this branching has no room.
        """
        train = self.config.train
        tree = Topology.full(
            branching or self.config.model.branching,
            self.config.model.level_capacity,
            self.config.model.max_children,
        )
        generator = torch.Generator().manual_seed(derive_seed("weights", seed))
        slots = sorted(tree.blocks)
        rows = initial_rows(self.block_layout, len(slots), generator)
        for tensor in self.state.values():
            tensor[lane] = 0
        self["weight"][lane, slots] = rows.to(self.device)
        shared = initial_rows(self.shared_layout, 1, generator)[0]
        self["shared"][lane] = shared.to(self.device)
        self["last_culprit"][lane] = NEVER
        self["last_update"][lane] = NEVER
        self["data_seed"][lane] = derive_seed("data", seed)
        for name in ("lr", "top_k", "cooldown", "exploration"):
            self[name][lane] = getattr(train, name)
        self["lr_factor"][lane] = 1.0
        self["mix"][lane] = 1.0 / self["mix"].shape[1]
        self.host_step[lane], self.host_top_k[lane] = 0, train.top_k
        self._hyper[lane] = self._mix[lane] = None
        self.set_tree(lane, tree)

    def set_mix(self, lane: int, shares: tuple[float, ...]) -> None:
        """Set the share of each domain in a lane's stream of text."""
        if self._mix[lane] != shares:  # to write is to wait for the device
            self["mix"][lane] = torch.tensor(shares, device=self.device)
            self._mix[lane] = shares

    def copy_mix(self, source: int, target: int) -> None:
        """Give a lane another's share of each domain."""
        if self._mix[source] is None or self._mix[source] != self._mix[target]:
            self["mix"][target] = self["mix"][source]
            self._mix[target] = self._mix[source]

    def configure(self, config: Config) -> None:
        """Take other settings; the sizes stay. What was recorded before still has the old ones.

        Raises:
            ConfigError: if sizes differ.
        """
        old, ev = self.config, config.evidence
        tables = (ev.buckets, ev.context_buckets)
        if config.model != old.model or tables != (
            old.evidence.buckets,
            old.evidence.context_buckets,
        ):
            raise ConfigError("an arena keeps its sizes: build another for a model of other sizes")
        self.config = config

    def set_hyper(self, lane: int, name: str, value: float) -> None:
        """Set `lr`, `top_k`, `cooldown` or `exploration` of a lane."""
        self[name][lane] = value
        self._hyper[lane] = None
        if name == "top_k":
            self.host_top_k[lane] = int(value)
            self._forget(lane, lane + 1, self._leaves)

    def get_hyper(self, lane: int) -> dict[str, float]:
        """Read the hyper-parameters of a lane."""
        known = self._hyper[lane]
        if known is None:  # the device is asked once for each change
            names = ("lr", "top_k", "cooldown", "exploration")
            known = self._hyper[lane] = {name: self[name][lane].item() for name in names}
        return dict(known)

    def leaves(self, start: int, stop: int) -> Leaves:
        """Return where the drill-down of lanes start..stop can end."""
        if (start, stop) not in self._leaves:
            top_k = self.host_top_k[start:stop]
            room = _room_for_looks if self.fixed_room and self.roomy else None
            new = index_leaves(self.trees[start:stop], top_k, self.device, room)
            if self.fixed_room:
                key = start, stop, new.chain.shape[2], new.most
                held = self._leaves_room.setdefault(key, new)
                if held is not new:
                    held.copy_(new)
                new = held
            self._leaves[start, stop] = new
        return self._leaves[start, stop]

    def set_tree(self, lane: int, tree: Topology) -> None:
        """Give a lane its tree (after an edit too: the device index follows)."""
        self.trees[lane] = tree
        self._forget(lane, lane + 1)

    def follow(self, sources: Sequence[int], start: int) -> None:
        """Know of lanes start, start + 1, ... what is known of those whose state they are given.

        They share their sources' trees, so that nobody may edit them.
        """
        stop = start + len(sources)
        steps: list[list[Any]] = [self.host_step, self.host_top_k]
        for known in (*steps, self.trees, self._hyper, self._mix):
            known[start:stop] = [known[source] for source in sources]
        self._forget(start, stop)

    def _forget(self, start: int, stop: int, *caches: dict[tuple[int, int], Any]) -> None:
        """Drop what was derived from lanes' trees and `top_k`, from some caches or from all."""
        for cache in caches or (self._index, self._leaves):
            for key in [(low, high) for low, high in cache if low < stop and start < high]:
                del cache[key]

    def prepare(self, ranges: list[tuple[int, int]]) -> None:
        """Derive what ranges of lanes need, before threads ask for it."""
        for start, stop in ranges:
            self.index(start, stop)
            self.leaves(start, stop)

    def index(self, start: int, stop: int) -> list[LevelIndex]:
        """Return the level index of lanes start..stop."""
        if (start, stop) not in self._index:
            trees = self.trees[start:stop]
            if self.fixed_room:
                levels = self._index_in_place(start, stop, trees)
            else:
                levels = index_levels(trees, self.device)
            self._index[start, stop] = levels
        return self._index[start, stop]

    def _index_in_place(self, start: int, stop: int, trees: list[Topology]) -> list[LevelIndex]:
        """Index trees in the room that earlier trees of the same extent had.

        A CUDA graph keeps addresses, so one that was recorded for a tree serves the next one too.
        """
        if self.roomy:
            extent = Extent.full(trees[0])
        else:
            extent = Extent.of(trees).rounded_up(self.config.model.branching, trees)
        levels = index_levels(trees, self.device, extent)
        held = self._room.setdefault((start, stop, extent), levels)
        for old, new in zip(held, levels, strict=True):
            if old is not new:
                old.copy_(new)
        return held

    def forest(self, start: int, stop: int) -> Forest:
        """View lanes start..stop, with all that a pass through their trees needs."""
        return Forest(
            self["weight"][start:stop],
            self["shared"][start:stop],
            self.block_layout,
            self.shared_layout,
            self.index(start, stop),
            self.router(start, stop),
            self.config,
            self.leaves(start, stop).depth,
        )

    def weights(self, start: int, stop: int) -> Weights:
        """View the parameters of lanes start..stop, cut to the width of each level in use."""
        return self.forest(start, stop).weights()

    def router(self, start: int, stop: int) -> RouterState:
        """View what routing needs of lanes start..stop."""
        prior, counts = self["log_prior"][start:stop], self["evidence"][start:stop]
        cuts = [slice(i.offset, i.offset + i.width) for i in self.index(start, stop)]
        return RouterState([prior[:, c] for c in cuts], [counts[:, c] for c in cuts])

    def copy_lane(self, source: int, *targets: int) -> None:
        """Copy a lane onto others: a fork shares nothing with its parent."""
        others = [target for target in targets if target != source]
        if not others:
            return
        first, last = others[0], others[-1]
        side_by_side = others == list(range(first, last + 1))
        tensors = list(self.state.values())
        if side_by_side:  # one copy is quicker than many
            room = [tensor[first : last + 1] for tensor in tensors]
            copy_all(room, [t[source].expand_as(r) for t, r in zip(tensors, room, strict=True)])
        else:
            for target in others:
                copy_all([t[target] for t in tensors], [t[source] for t in tensors])
        for target in others:
            self.follow([source], target)
            self.set_tree(target, self.trees[source].copy())

    def read_lane(self, lane: int) -> LaneState:
        """Return a detached copy of a lane."""
        rows = {name: tensor[lane] for name, tensor in self.state.items()}
        tensors = {name: torch.empty_like(row) for name, row in rows.items()}
        copy_all(list(tensors.values()), list(rows.values()))
        return LaneState(tensors, self.trees[lane].copy())

    def check(self, saved: LaneState) -> None:
        """See that a lane could be restored from a copy that comes from a file.

        Raises:
            CheckpointError: if not.
        """
        check_fit(saved.tensors, self._layout)
        check_settings(saved.tensors)

    def write_lane(self, lane: int, saved: LaneState) -> None:
        """Restore a lane from a copy, which stays independent of it.

        Raises:
            CheckpointError: if the copy comes from an arena of other sizes.
        """
        check_fit(saved.tensors, self._layout)
        rows = [(tensor[lane], saved.tensors[name]) for name, tensor in self.state.items()]
        near = [(row, kept) for row, kept in rows if kept.device == row.device]
        copy_all([row for row, _ in near], [kept for _, kept in near])
        for row, kept in rows:
            if kept.device != row.device:  # one by one, for the device may hold no second lane
                row.copy_(kept)
        self.host_step[lane] = int(saved.tensors["step"])
        self.host_top_k[lane] = int(saved.tensors["top_k"])
        self._hyper[lane] = self._mix[lane] = None
        self.set_tree(lane, saved.tree.copy())

    def hash_lane(self, lane: int) -> str:
        """Hash everything that a lane consists of (SHA-256)."""
        digest = hashlib.sha256()
        for name in sorted(self.state):
            digest.update(name.encode())
            digest.update(self.state[name][lane].cpu().contiguous().numpy().tobytes())
        tree: dict[str, Any] = self.trees[lane].to_dict()
        digest.update(json.dumps(tree, sort_keys=True).encode())
        return digest.hexdigest()
