"""The arena: one table of numbers that holds every lane's complete state.

A lane is a row of every tensor in `Arena.state`, plus its `Topology`. Copying a lane is copying
rows; a fork, a snapshot, a rollback, a checkpoint and a state hash are all made of that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k1.attribution import NEVER, Leaves, index_leaves
from k1.block import block_layout, initial_rows, shared_layout
from k1.config import Config
from k1.errors import CheckpointError, ConfigError
from k1.forward import Forest, RouterState, Weights
from k1.rng import derive_seed
from k1.topology import Extent, LevelIndex, Topology, index_levels


@dataclass(frozen=True)
class LaneState:
    """A detached copy of one lane."""

    tensors: dict[str, Tensor]
    tree: Topology

    def to(self, device: torch.device | str) -> LaneState:
        """Return the lane on another device."""
        return LaneState({k: v.to(device) for k, v in self.tensors.items()}, self.tree.copy())


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
        """Allocate `lanes` empty lanes; `reset_lane` or `write_lane` fills them."""
        self.config = config
        self.device = torch.device(device)
        self.lanes = lanes
        self.vocab_size = vocab_size
        self.block_layout = block_layout(config.model)
        self.shared_layout = shared_layout(config.model, vocab_size)
        capacity = config.model.level_capacity
        self.trees = [Topology(capacity, config.model.max_children) for _ in range(lanes)]
        self.scratch = sum(capacity)
        # Indices that keep their shapes and addresses when a tree changes, for recorded steps.
        self.fixed_room = self.device.type == "cuda"
        # What the host has to know without asking the device: kept in step by the methods below.
        self.host_step = [0] * lanes
        self.host_top_k = [1] * lanes
        self._hyper: list[dict[str, float] | None] = [None] * lanes
        self._index: dict[tuple[int, int], list[LevelIndex]] = {}
        self._room: dict[tuple[int, int, Extent], list[LevelIndex]] = {}
        self._leaves: dict[tuple[int, int], Leaves] = {}
        self._leaves_room: dict[tuple[int, int, int, int], Leaves] = {}
        s, p, q = self.scratch + 1, self.block_layout.total, self.shared_layout.total
        ev = config.evidence
        table = ev.buckets + ev.context_buckets if config.model.router == "evidence" else 0
        f32, i64 = torch.float32, torch.int64

        def zeros(*shape: int, dtype: torch.dtype = f32) -> Tensor:
            return torch.zeros(lanes, *shape, dtype=dtype, device=self.device)

        self.state: dict[str, Tensor] = {
            **{name: zeros(s, p) for name in ("weight", "first", "second")},
            **{name: zeros(q) for name in ("shared", "shared_first", "shared_second")},
            "evidence": zeros(s, 3, table, dtype=i64),
            **{n: zeros(s) for n in ("log_prior", "responsibility", "mean_responsibility")},
            **{n: zeros(s, dtype=i64) for n in ("count", "visits", "updates", "born")},
            **{n: zeros(s, dtype=i64) for n in ("last_culprit", "last_update")},
            **{n: zeros(dtype=i64) for n in ("shared_count", "step", "skipped", "blocks_updated")},
            **{n: zeros(dtype=i64) for n in ("data_seed", "data_cursor", "top_k", "cooldown")},
            **{n: zeros() for n in ("lr", "lr_factor", "exploration", "loss")},
            "mix": zeros(domains),
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
        self._hyper[lane] = None
        self.set_tree(lane, tree)

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
            self._forget(lane, self._leaves)

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
            new = index_leaves(self.trees[start:stop], top_k, self.device)
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
        self._forget(lane)

    def _forget(self, lane: int, *caches: dict[tuple[int, int], Any]) -> None:
        """Drop what was derived from a lane's tree and `top_k`, from some caches or from all."""
        for cache in caches or (self._index, self._leaves):
            for start, stop in [key for key in cache if key[0] <= lane < key[1]]:
                del cache[start, stop]

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
        for tensor in self.state.values():
            if side_by_side:  # one copy is quicker than many
                tensor[first : last + 1] = tensor[source]
            else:
                for target in others:
                    tensor[target] = tensor[source]
        for target in others:
            self.host_step[target] = self.host_step[source]
            self.host_top_k[target] = self.host_top_k[source]
            self._hyper[target] = self._hyper[source]
            self.set_tree(target, self.trees[source].copy())

    def read_lane(self, lane: int) -> LaneState:
        """Return a detached copy of a lane."""
        tensors = {name: tensor[lane].clone() for name, tensor in self.state.items()}
        return LaneState(tensors, self.trees[lane].copy())

    def write_lane(self, lane: int, saved: LaneState) -> None:
        """Restore a lane from a copy, which stays independent of it.

        Raises:
            CheckpointError: if the copy comes from an arena of other sizes.
        """
        for name, tensor in self.state.items():
            value = saved.tensors.get(name)
            if value is None or value.shape != tensor.shape[1:] or value.dtype != tensor.dtype:
                raise CheckpointError(
                    f"the saved state does not fit this configuration ({name!r} differs): "
                    "use the configuration it was saved with"
                )
        for name, tensor in self.state.items():
            tensor[lane] = saved.tensors[name].to(self.device)
        self.host_step[lane] = int(saved.tensors["step"])
        self.host_top_k[lane] = int(saved.tensors["top_k"])
        self._hyper[lane] = None
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
