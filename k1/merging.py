"""Two siblings made one, and what a change of the tree does to the loss.

A merge undoes a split: siblings that are still copies become the block that they were split from,
with the sum of their counts. Of siblings that have gone different ways, the average of the weights
is a guess, for equal functions have many weights; so measure it (`change`) before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k1.arena import Arena
from k1.edits import clear
from k1.engine import Engine
from k1.errors import TopologyError
from k1.forward import Batch
from k1.topology import ROOT_SLOT, Topology

_ROWS = ("weight", "first", "second")
_SUMMED = ("evidence", "responsibility", "mean_responsibility", "visits", "updates")
_LATER = ("count", "last_culprit", "last_update")


def merge_agents(arena: Arena, lane: int, kept: int, gone: int) -> list[int]:
    """Merge a sibling with its subtree into another of the same shape; returns the freed slots.

    Weights and moments are averaged, block by block, by the optimizer steps that each has made.
    Counts and records add up. The merged block has the routing weight of both: exactly if their
    parent's learned columns agree, and no more than that otherwise, for the column is an average.

    Args:
        arena: has the lane.
        lane: which.
        kept: slot of the agent that stays, with its id and name.
        gone: slot of its sibling.

    Raises:
        TopologyError: if they are no siblings, or differ in shape; then nothing is changed.
    """
    tree = arena.trees[lane].copy()
    pairs = _pair_up(tree, kept, gone)
    _join_columns(arena, lane, tree, kept, gone)
    _join_priors(arena, lane, tree, pairs)
    for into, other in pairs:
        steps = arena["count"][lane, [into, other]].double()
        share = steps[1] / steps.sum() if bool(steps.sum() > 0) else steps.new_tensor(0.5)
        for name in _ROWS:
            rows = arena[name][lane]
            rows[into] = torch.lerp(rows[into], rows[other], share.float())
        for name in _SUMMED:
            arena[name][lane, into] += arena[name][lane, other]
        for name in _LATER:
            values = arena[name][lane]
            values[into] = torch.maximum(values[into], values[other])
        born = arena["born"][lane]
        born[into] = torch.minimum(born[into], born[other])
    freed = tree.remove(gone)
    clear(arena, lane, freed)
    arena.set_tree(lane, tree)
    return freed


def why_not_merge(tree: Topology, kept: int, gone: int) -> str | None:
    """Say why two blocks cannot be merged, or None if they can."""
    for slot in (kept, gone):
        if slot == ROOT_SLOT or slot not in tree.blocks:
            return f"slot {slot} holds no agent"
    if kept == gone or tree.blocks[kept].parent != tree.blocks[gone].parent:
        return f"{tree.name(kept)} and {tree.name(gone)} are no siblings"
    if _shape(tree, kept) != _shape(tree, gone):
        return f"{tree.name(kept)} and {tree.name(gone)} have subtrees of different shapes"
    return None


def _shape(tree: Topology, slot: int) -> dict[int, object]:
    """A subtree by the ranks of its blocks."""
    return {tree.blocks[child].rank: _shape(tree, child) for child in tree.children(slot)}


def _pair_up(tree: Topology, kept: int, gone: int) -> list[tuple[int, int]]:
    """Blocks that become one, ancestors first."""
    reason = why_not_merge(tree, kept, gone)
    if reason:
        raise TopologyError(f"cannot merge: {reason}; choose two siblings of the same shape")
    pairs = [(kept, gone)]
    for into, other in pairs:
        pairs.extend(zip(tree.children(into), tree.children(other), strict=True))
    return pairs


def _join_columns(arena: Arena, lane: int, tree: Topology, kept: int, gone: int) -> None:
    """Average the parent's router columns by the siblings' prior weights, and empty one."""
    parent = tree.blocks[kept].parent
    share = torch.softmax(arena["log_prior"][lane, [kept, gone]], 0)[1]
    into, out = tree.blocks[kept].rank, tree.blocks[gone].rank
    for name in _ROWS:
        pieces = arena.block_layout.unpack(arena[name][lane, parent])
        for column in (pieces["router.weight"], pieces["router.bias"]):
            column[..., into] = torch.lerp(column[..., into], column[..., out], share)
            column[..., out] = 0


def _join_priors(arena: Arena, lane: int, tree: Topology, pairs: list[tuple[int, int]]) -> None:
    """Add up prior weights: the siblings' own, and below them each child's share in both."""
    old = arena["log_prior"][lane].clone()
    (kept, gone), below = pairs[0], pairs[1:]
    arena["log_prior"][lane, kept] = torch.logaddexp(old[kept], old[gone])
    both = torch.log_softmax(old[[kept, gone]], 0)
    mass = {kept: both[0], gone: both[1]}
    for into, other in below:
        for slot in (into, other):
            mass[slot] = mass[tree.blocks[slot].parent] + _log_share(tree, old, slot)
        arena["log_prior"][lane, into] = torch.logaddexp(mass[into], mass[other])


def _log_share(tree: Topology, prior: Tensor, slot: int) -> Tensor:
    """Log of a block's prior weight among its siblings."""
    siblings = tree.children(tree.blocks[slot].parent)
    return prior[slot] - torch.logsumexp(prior[siblings], 0)


@dataclass(frozen=True)
class Change:
    """Bits per byte of each domain before and after a change of a tree."""

    before: dict[str, float]
    after: dict[str, float]

    @property
    def harm(self) -> dict[str, float]:
        """What each domain lost."""
        return {domain: self.after[domain] - bits for domain, bits in self.before.items()}


def copy_of(engine: Engine, lane: int) -> Engine:
    """Copy a lane to an arena of its own, as lane 0."""
    arena = engine.arena
    domains = arena["mix"].shape[1]
    fork = Arena(arena.config, arena.vocab_size, domains, 1, arena.device)
    fork.write_lane(0, arena.read_lane(lane))
    return Engine(fork, engine.store)


def change(
    engine: Engine,
    lane: int,
    edit: Callable[[Arena, int], object],
    windows: Mapping[str, Batch],
    before: dict[str, float] | None = None,
) -> Change:
    """Measure what an edit would do to a lane, on a copy of it.

    Args:
        engine: has the lane, which stays as it is.
        lane: which.
        edit: changes a lane of an arena, such as a merge or a deletion.
        windows: [1, B, T] of each domain.
        before: the lane's `bits_on` these windows, if they are known.

    Raises:
        TopologyError: if the edit does.
    """
    before = bits_on(engine, lane, windows) if before is None else before
    twin = copy_of(engine, lane)
    edit(twin.arena, 0)
    return Change(before, bits_on(twin, 0, windows))


def bits_on(engine: Engine, lane: int, windows: Mapping[str, Batch]) -> dict[str, float]:
    """Bits per byte of a lane on windows [1, B, T] of each domain."""
    return {name: float(engine.bits_per_byte(lane, lane + 1, w)[0]) for name, w in windows.items()}
