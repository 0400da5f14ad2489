"""The drill-down, the list of path blocks and their inputs, and a step's records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.attribution import Leaves, Selection, SelectionRules
from k1.levels import LevelIndex


def warps_for(slots: int) -> int:
    """Warps of a program that looks at all slots of a lane."""
    return 1 if slots <= 128 else 4 if slots <= 512 else 16


@triton.jit
def _select(
    responsibility_ptr, last_ptr, step_ptr, uniform_ptr, chain_ptr, depth_ptr, leaf_ptr, looks_ptr,
    top_k_ptr, cooldown_ptr, exploration_ptr, scale_ptr, on_path_ptr, culprit_ptr,
    S, root_scale, min_share,
    SCALES: tl.constexpr, LEVELS: tl.constexpr, MOST: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    inside = s < S
    here = lane * S + s
    leaf = tl.load(leaf_ptr + here, mask=inside, other=0) != 0
    depth = tl.load(depth_ptr + here, mask=inside, other=0)
    age = tl.load(step_ptr + lane) - tl.load(last_ptr + here, mask=inside, other=0)
    top_k = tl.load(top_k_ptr + lane)
    rested = leaf & (age > tl.load(cooldown_ptr + lane))
    oldest = tl.max(tl.where(leaf, age, -1))
    free = tl.where(tl.max(rested.to(tl.int32)) > 0, rested, leaf & (age == oldest))
    explore = tl.load(uniform_ptr + lane * (S + 1)) < tl.load(exploration_ptr + lane)
    scale = tl.zeros((SP,), tl.float32)
    on_path = tl.zeros((SP,), tl.int1)
    used = tl.zeros((), tl.int64)
    looks = tl.load(looks_ptr + lane)
    least = tl.zeros((), tl.float32)
    for look in range(MOST):
        # Walk from the root to a leaf by the largest score of the children with free leaves.
        found = tl.max(free.to(tl.int32)) > 0
        way = free
        for level in tl.static_range(1, LEVELS):
            block = tl.load(chain_ptr + here * LEVELS + level, mask=inside, other=0)
            measured = tl.load(responsibility_ptr + lane * S + block, mask=inside, other=0.0)
            drawn = tl.load(uniform_ptr + lane * (S + 1) + 1 + block, mask=inside, other=0.0)
            score = tl.where(way & (depth > level), tl.where(explore, drawn, measured), -1.0)
            at = tl.argmax(score, 0)
            taken = tl.sum(tl.where(s == at, block, 0))
            # A walk that has ended already has no child to go to, and stays.
            way = tl.where(tl.max(score) < 0, way, way & (block == taken))
        end = tl.argmax(way.to(tl.int32), 0)
        free = free & (s != end)
        length = tl.load(depth_ptr + lane * S + end)
        weight = tl.load(responsibility_ptr + lane * S + end)
        new = tl.zeros((), tl.int64)
        for level in tl.static_range(LEVELS):
            block = tl.load(chain_ptr + (lane * S + end) * LEVELS + level)
            value = _displacement(length - 1 - level, level, look, top_k, root_scale, SCALES)
            before = tl.sum(tl.where(s == block, scale, 0.0))
            if level > 0:
                new += ((level < length) & (before == 0) & (value > 0)).to(tl.int64)
        fits = (used + new <= top_k) & (look < looks) & (weight >= least)
        take = found & (fits | (look == 0))
        for level in tl.static_range(LEVELS):
            block = tl.load(chain_ptr + (lane * S + end) * LEVELS + level)
            value = _displacement(length - 1 - level, level, look, top_k, root_scale, SCALES)
            own = (s == block) & (level < length) & take
            scale = tl.where(own, tl.maximum(scale, value), scale)
            on_path = on_path | own
        least = tl.where(look == 0, min_share * weight, least)
        used += tl.where(take, new, 0)
        tl.store(culprit_ptr + lane * MOST + look, tl.where(take, end, -1).to(tl.int64))
    tl.store(scale_ptr + here, scale, mask=inside)
    tl.store(on_path_ptr + here, on_path, mask=inside)


@triton.jit
def _displacement(above, level, look, top_k, root_scale, SCALES: tl.constexpr):
    """Displacement of the block `above` levels over a culprit, itself on `level`."""
    LAST: tl.constexpr = len(SCALES) - 1
    value = tl.zeros((), tl.float32) + SCALES[LAST]
    for distance in tl.static_range(LAST):
        value = tl.where(above == distance, SCALES[distance], value)
    if level == 0:
        value = tl.zeros((), tl.float32) + root_scale
    else:
        # A first path longer than top_k loses its upper blocks.
        value = tl.where((look == 0) & (above >= top_k), 0.0, value)
    return value


def select_paths_fused(
    responsibility: Tensor,
    last_culprit: Tensor,
    step: Tensor,
    uniform: Tensor,
    leaves: Leaves,
    rules: SelectionRules,
) -> Selection:
    """Choose the paths of one step; arguments as `k1.attribution.select_paths`."""
    lanes, slots = responsibility.shape
    device = responsibility.device
    scale = torch.empty(lanes, slots, device=device)
    on_path = torch.empty(lanes, slots, dtype=torch.bool, device=device)
    culprits = torch.empty(lanes, leaves.most, dtype=torch.int64, device=device)
    tensors = (
        responsibility, last_culprit, step, uniform, leaves.chain, leaves.depth, leaves.is_leaf,
        leaves.looks, rules.top_k, rules.cooldown, rules.exploration,
    )  # fmt: skip
    _select[(lanes,)](
        *[t.contiguous() for t in tensors], scale, on_path, culprits,
        slots, rules.root_scale, rules.min_share,
        SCALES=rules.scales, LEVELS=leaves.chain.shape[2], MOST=leaves.most,
        SP=triton.next_power_of_2(slots), num_warps=warps_for(slots),
    )  # fmt: skip
    return Selection(scale, on_path, culprits)


@dataclass(frozen=True)
class PathTable:
    """Blocks of several lanes level by level: first all of level 0, lane by lane, and so on."""

    row: Tensor
    """int64 [M]: arena row (flattened lanes x slots); the lane's scratch row where padded."""
    place: Tensor
    """int64 [L * S]: where in this table an arena row stands; -1 if nowhere."""
    counts: tuple[int, ...]
    """Rows that each lane has on each level, padding included."""
    lanes: int

    def cut(self, level: int) -> slice:
        """The part of the table that a level takes."""
        first = self.lanes * sum(self.counts[:level])
        return slice(first, first + self.lanes * self.counts[level])

    def norms(self, squares: Tensor) -> Tensor:
        """Take the roots of squared norms [M], and put them where the blocks are: [L, S]."""
        found = squares.sqrt()[self.place.clamp(min=0)]
        return torch.where(self.place >= 0, found, 0.0).view(self.lanes, -1)


@triton.jit
def _list_paths(
    on_path_ptr, depth_ptr, row_ptr, place_ptr, S,
    COUNTS: tl.constexpr, SP: tl.constexpr, RP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    s, r = tl.arange(0, SP), tl.arange(0, RP)
    inside = s < S
    on = tl.load(on_path_ptr + lane * S + s, mask=inside, other=0) != 0
    depth = tl.load(depth_ptr + lane * S + s, mask=inside, other=0)
    place = tl.full((SP,), -1, tl.int64)
    start = lane * 0
    for level in tl.static_range(len(COUNTS)):
        first = start + lane * COUNTS[level]
        own = on & (depth == level + 1)
        at = first + tl.cumsum(own.to(tl.int64), 0) - 1
        own = own & (at < first + COUNTS[level])
        tl.store(row_ptr + at, lane * S + s, mask=own)
        place = tl.where(own, at, place)
        filled = tl.sum(own.to(tl.int64))
        padding = (r >= filled) & (r < COUNTS[level])
        tl.store(row_ptr + first + r, lane * S + S - 1 + r * 0, mask=padding)
        start += LANES * COUNTS[level]
    tl.store(place_ptr + lane * S + s, place, mask=inside)


def list_paths(on_path: Tensor, leaves: Leaves, counts: tuple[int, ...]) -> PathTable:
    """List the blocks on the paths.

    Args:
        on_path: bool [L, S], the last slot of a lane being its scratch slot.
        leaves: the trees.
        counts: room for blocks on each level; further ones are left out.
    """
    lanes, slots = on_path.shape
    row = torch.empty(lanes * sum(counts), dtype=torch.int64, device=on_path.device)
    place = torch.empty(lanes * slots, dtype=torch.int64, device=on_path.device)
    _list_paths[(lanes,)](
        on_path.contiguous(), leaves.depth, row, place, slots,
        COUNTS=counts, SP=triton.next_power_of_2(slots),
        RP=triton.next_power_of_2(max(counts)), LANES=lanes,
        num_warps=warps_for(slots),
    )  # fmt: skip
    return PathTable(row, place, counts, lanes)


# Sizes in tuples are special cases to Triton where they are 1 or multiples of 16, whatever it is
# told: compiled again are at most as many as there are rooms of levels.
@triton.jit(do_not_specialize=["entries"])
def _find_inputs(
    row_ptr, source_ptr, target_ptr, sources, leaves, offsets, widths, firsts, entries, slots,
    LEVELS: tl.constexpr, LEAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + entry, mask=entry < entries, other=-1)
    lane, slot = row // slots, row % slots
    source = tl.full((BLOCK,), -1, tl.int64)
    target = tl.full((BLOCK,), -1, tl.int64)
    for level in tl.static_range(LEVELS):
        position = slot - offsets[level]
        own = (row >= 0) & (position >= 0) & (position < widths[level])
        here = lane * widths[level] + position
        source = tl.where(own, tl.load(sources[level] + here, mask=own, other=-1), source)
        if LEAVES:
            leaf = tl.load(leaves[level] + here, mask=own, other=0) != 0
            target = tl.where(leaf, firsts[level] + here, target)
    tl.store(source_ptr + entry, source, mask=entry < entries)
    tl.store(target_ptr + entry, target, mask=entry < entries)


def find_inputs(table: PathTable, levels: list[LevelIndex], leaves: bool) -> tuple[Tensor, Tensor]:
    """Find where a table's blocks have their inputs, and where the leaves have their outputs.

    Args:
        table: the blocks.
        levels: the trees.
        leaves: whether the leaves' outputs are asked for.

    Returns:
        Places in the list that `LevelIndex.first` speaks of, int64 [M] each: of the inputs, -1
        where padded; of the outputs, -1 but for leaves, and throughout if they are not asked for.
    """
    source, target = (torch.empty_like(table.row) for _ in range(2))
    block, entries = 128, len(source)
    _find_inputs[(triton.cdiv(entries, block),)](
        table.row, source, target,
        tuple(index.source for index in levels), tuple(index.is_leaf for index in levels),
        tuple(index.offset for index in levels), tuple(index.width for index in levels),
        tuple(index.first for index in levels),
        entries, len(table.place) // table.lanes, LEVELS=len(levels), LEAVES=leaves, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return source, target


@triton.jit
def _record(
    scale_ptr, culprit_ptr, loss_ptr, fine_ptr,
    updates_ptr, last_update_ptr, visits_ptr, last_culprit_ptr,
    blocks_ptr, mean_ptr, skips_ptr, step_ptr, cursor_ptr,
    S, memory, PICKS: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    inside = s < S
    here = lane * S + s
    step = tl.load(step_ptr + lane)
    fine = tl.load(fine_ptr + lane) != 0
    updated = (tl.load(scale_ptr + here, mask=inside, other=0.0) > 0) & fine
    hit = tl.zeros((SP,), tl.int1)
    for pick in range(PICKS):
        hit = hit | (s == tl.load(culprit_ptr + lane * PICKS + pick))
    hit = hit & fine
    now = step + s.to(tl.int64) * 0
    before = tl.load(updates_ptr + here, mask=inside, other=0)
    tl.store(updates_ptr + here, before + 1, mask=inside & updated)
    tl.store(last_update_ptr + here, now, mask=inside & updated)
    before = tl.load(visits_ptr + here, mask=inside, other=0)
    tl.store(visits_ptr + here, before + 1, mask=inside & hit)
    tl.store(last_culprit_ptr + here, now, mask=inside & hit)
    blocks = tl.sum((updated & (s > 0)).to(tl.int64))
    tl.store(blocks_ptr + lane, tl.load(blocks_ptr + lane) + blocks)
    loss, mean = tl.load(loss_ptr + lane), tl.load(mean_ptr + lane)
    running = tl.where(mean == 0, loss, mean * memory + loss * (1 - memory))
    tl.store(mean_ptr + lane, tl.where(fine, running, mean))
    tl.store(skips_ptr + lane, tl.load(skips_ptr + lane) + (fine == 0).to(tl.int64))
    tl.store(step_ptr + lane, step + 1)
    tl.store(cursor_ptr + lane, tl.load(cursor_ptr + lane) + 1)


def record_step(
    state: dict[str, Tensor], lanes: slice, selection: Selection, loss: Tensor, fine: Tensor,
    memory: float,
) -> None:  # fmt: skip
    """Write a step into the records of its lanes, in place.

    Args:
        state: the arena's tensors.
        lanes: which lanes made the step.
        selection: what was updated.
        loss: float32 [L].
        fine: bool [L]: it was not skipped.
        memory: decay of the running mean of the loss.
    """
    by_block = ("updates", "last_update", "visits", "last_culprit")
    by_lane = ("blocks_updated", "loss", "skipped", "step", "data_cursor")
    slots, picks = selection.scale.shape[1], selection.culprits.shape[1]
    _record[(len(loss),)](
        selection.scale, selection.culprits, loss, fine,
        *[state[name][lanes] for name in (*by_block, *by_lane)],
        slots, memory, PICKS=picks, SP=triton.next_power_of_2(slots),
        num_warps=warps_for(slots),
    )  # fmt: skip
