"""Changes of a lane's tree: add, delete and prune agents, with what they do to numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from k1.arena import Arena
from k1.attribution import NEVER
from k1.block import initial_rows
from k1.errors import TopologyError
from k1.evidence import CURRENT, OLD, PREVIOUS, UNIT
from k1.rng import derive_seed
from k1.topology import ROOT_SLOT, Topology

_ROW_STATE = ("weight", "first", "second", "count")
_INHERITED = (*_ROW_STATE, "log_prior", "responsibility", "mean_responsibility")
_RECORDS = ("responsibility", "mean_responsibility", "visits", "updates")


def split_candidate(
    arena: Arena, lane: int, parent: int, mean: Sequence[float] | None = None
) -> int | None:
    """The child that an add under `parent` splits (largest running responsibility), if any.

    Args:
        arena: the lanes.
        lane: the lane.
        parent: slot of the parent.
        mean: running responsibilities by slot, if they have been read already.
    """
    children = arena.trees[lane].children(parent)
    if not children:
        return None
    if mean is None:
        own = arena["mean_responsibility"][lane, children].tolist()
    else:
        own = [mean[child] for child in children]
    return children[max(range(len(children)), key=own.__getitem__)]


def depends_on_split(tree: Topology, parent: int) -> bool:
    """Whether an agent can be added or not by which child of a block would be split."""
    if tree.why_not_add(parent):
        return False
    fits = [tree.room_for_copy(child) for child in tree.children(parent)]
    return any(fits) and not all(fits)


def why_not_add(
    arena: Arena, lane: int, parent: int, mean: Sequence[float] | None = None
) -> str | None:
    """Say why no agent can be added under a slot, or None if one can.

    Args:
        arena: the lanes.
        lane: the lane.
        parent: slot of the parent.
        mean: running responsibilities by slot, if they have been read already.
    """
    tree = arena.trees[lane]
    reason = tree.why_not_add(parent)
    if reason:
        return reason
    if all(tree.room_for_copy(child) for child in tree.children(parent)):
        return None  # without asking the device which one it would be
    source = split_candidate(arena, lane, parent, mean)
    if source is not None and not tree.room_for_copy(source):
        return f"the subtree of {tree.name(source)} does not fit into the free slots (model.spare)"
    return None


def add_agent(arena: Arena, lane: int, parent: int) -> int:
    """Add an agent under the block in slot `parent`; returns the new block's slot.

    Under an internal block the child with the largest recent responsibility is split: the new
    agent is a copy of its subtree and both take half of its routing weight, so the function is
    kept (but for evidence, which moves with the counts). Under a leaf the new block's output
    projections are zero, so it passes its input on. The counts of a split child are divided by
    recency: the new agent takes the recent ones.

    Raises:
        TopologyError: if there is no room; then nothing is changed.
    """
    reason = why_not_add(arena, lane, parent)
    tree = arena.trees[lane].copy()
    if reason:
        where = tree.name(parent) if parent in tree.blocks else f"slot {parent}"
        raise TopologyError(f"cannot add an agent under {where}: {reason}")
    source = split_candidate(arena, lane, parent)
    if source is None:
        new = tree.insert(parent)
        _make_identity(arena, lane, new)
        made = {new: new}
    else:
        made = tree.copy_subtree(source)
        new = made[source]
        for old, fresh in made.items():
            clear(arena, lane, [fresh])
            for name in _INHERITED:
                arena[name][lane, fresh] = arena[name][lane, old]
            evidence = arena["evidence"][lane]
            for age in (PREVIOUS, CURRENT):
                evidence[fresh, age] = evidence[old, age]
                evidence[old, age] = 0
        # Half of the routing weight each: the same logits, less log 2.
        arena["log_prior"][lane, [source, new]] -= math.log(2)
        router = arena.block_layout.unpack(arena["weight"][lane, parent])
        old_rank, new_rank = tree.blocks[source].rank, tree.blocks[new].rank
        router["router.weight"][:, new_rank] = router["router.weight"][:, old_rank]
        router["router.bias"][new_rank] = router["router.bias"][old_rank]
        for moment in ("first", "second"):
            piece = arena.block_layout.unpack(arena[moment][lane, parent])
            piece["router.weight"][:, new_rank] = piece["router.weight"][:, old_rank]
            piece["router.bias"][new_rank] = piece["router.bias"][old_rank]
    arena["born"][lane, list(made.values())] = arena.host_step[lane]
    arena.set_tree(lane, tree)
    return new


def _make_identity(arena: Arena, lane: int, slot: int) -> None:
    """Fill a slot with a fresh block that hands its input on unchanged."""
    clear(arena, lane, [slot])
    seed = derive_seed("block", int(arena["data_seed"][lane]), arena.trees[lane].next_id)
    generator = torch.Generator().manual_seed(seed)
    row = initial_rows(arena.block_layout, 1, generator)[0]
    pieces = arena.block_layout.unpack(row)
    pieces["attention.out"].zero_()
    pieces["mlp.out"].zero_()
    arena["weight"][lane, slot] = row.to(arena.device)


def clear(arena: Arena, lane: int, slots: list[int]) -> None:
    """Leave nothing of blocks in their slots."""
    for name in (*_ROW_STATE, *_RECORDS, "log_prior", "evidence", "born"):
        arena[name][lane, slots] = 0
    arena["last_culprit"][lane, slots] = NEVER
    arena["last_update"][lane, slots] = NEVER


def heir(arena: Arena, lane: int, slot: int) -> int | None:
    """The sibling that would get a block's text next, by its counts; None without siblings."""
    tree = arena.trees[lane]
    siblings = [s for s in tree.children(tree.blocks[slot].parent) if s != slot]
    if not siblings:
        return None
    buckets = arena.config.evidence.buckets
    counts = arena["evidence"][lane].sum(1).double() / UNIT
    if counts.shape[-1] == 0:
        return siblings[0]
    table = counts[[slot, *siblings], :buckets]
    pooled = table.sum(0)
    pooled = (pooled + 1) / (pooled + 1).sum()
    strength = arena.config.evidence.strength
    own = table[1:] + strength * pooled
    likelihood = (table[0] * (own / own.sum(1, keepdim=True)).log()).sum(1)
    return siblings[int(likelihood.argmax())]


def delete_agent(arena: Arena, lane: int, slot: int) -> list[int]:
    """Remove a block with its subtree; returns the freed slots.

    The siblings' routing renormalises by itself; the block's counts and prior weight go to its
    `heir`. The parent of a last child becomes a leaf.

    Raises:
        TopologyError: for the root or a slot without a block; then nothing is changed.
    """
    tree = arena.trees[lane].copy()
    if slot == ROOT_SLOT or slot not in tree.blocks:
        tree.remove(slot)
    inheriting = heir(arena, lane, slot)
    parent, rank = tree.blocks[slot].parent, tree.blocks[slot].rank
    freed = tree.remove(slot)
    if inheriting is not None:
        evidence = arena["evidence"][lane]
        for age in (OLD, PREVIOUS, CURRENT):
            evidence[inheriting, age] += evidence[slot, age]
        prior = arena["log_prior"][lane]
        prior[inheriting] = torch.logaddexp(prior[inheriting], prior[slot])
    for name in ("weight", "first", "second"):
        piece = arena.block_layout.unpack(arena[name][lane, parent])
        piece["router.weight"][:, rank] = 0
        piece["router.bias"][rank] = 0
    clear(arena, lane, freed)
    arena.set_tree(lane, tree)
    return freed


def prune(arena: Arena, lane: int, fraction: float) -> list[int]:
    """Delete a fraction of the agents, always the leaf with the least running responsibility.

    Args:
        arena: the arena.
        lane: which lane.
        fraction: share of the agents to delete; at least one is.

    Returns:
        The ids of the deleted blocks, in order.
    """
    gone = []
    for _ in range(max(1, math.floor(fraction * arena.trees[lane].agents))):
        tree = arena.trees[lane]
        leaves = [s for s in sorted(tree.blocks) if s != ROOT_SLOT and tree.is_leaf(s)]
        if not leaves:
            break
        weight = arena["mean_responsibility"][lane, leaves].tolist()
        least = leaves[min(range(len(leaves)), key=weight.__getitem__)]
        gone.append(tree.blocks[least].id)
        delete_agent(arena, lane, least)
    return gone
