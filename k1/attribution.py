"""Tracing an error to blocks: responsibilities, and the drill-down that picks the paths to update.

Everything here works on tensors over lanes, without a look at their values, so that the choice of
path stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from k1.levels import LevelIndex, on_device
from k1.topology import Topology

NEVER = -(1 << 40)
"""A step so early that no cooldown reaches back to it."""


@dataclass(frozen=True)
class Selection:
    """The blocks that a step updates."""

    scale: Tensor
    """float32 [L, S]: displacement scale of each slot, 0 off the paths."""
    on_path: Tensor
    """bool [L, S]: on a path from the root to a culprit, updated or not (`top_k` may cut it)."""
    culprits: Tensor
    """int64 [L, picks]: slots of the culprits in the order of choice, -1 where there is none."""


@dataclass(frozen=True)
class Leaves:
    """Where the drill-down can end, and by which way it gets there. D = levels."""

    chain: Tensor
    """int64 [L, S, D]: slots from the root to each living block; the scratch slot beyond it."""
    depth: Tensor
    """int64 [L, S]: blocks on that way, root and block included; 0 where there is no block."""
    is_leaf: Tensor
    """bool [L, S]."""
    looks: Tensor
    """int64 [L]: how many leaves are looked at; a lane's own number, so that its choice does not
    depend on its neighbours."""
    most: int
    """The largest of them or more, known to the host."""

    def copy_(self, other: Leaves) -> None:
        """Take over others of the same shape in place, which keeps the addresses."""
        for name in ("chain", "depth", "is_leaf", "looks"):
            getattr(self, name).copy_(getattr(other, name))


def index_leaves(
    trees: list[Topology],
    top_k: list[int],
    device: torch.device,
    room: Callable[[int], int] | None = None,
) -> Leaves:
    """List the leaves of several trees.

    The first path takes at least as many of a lane's `top_k` as its shallowest leaf is deep, and
    every further one takes at least one: so many leaves are worth a look.

    Args:
        trees: one for each lane.
        top_k: most agents that a step updates, for each lane.
        device: where the result is held.
        room: for how many looks room is made where the given number is the most that a lane needs;
            with it, there is room for trees of any depth too. By default there is none to spare.
    """
    tables = [tree.table for tree in trees]
    levels = len(trees[0].capacity) if room else int(max(t.depth.max() for t in tables))
    looks = [max(1, k - t.shallowest + 1) for k, t in zip(top_k, tables, strict=True)]
    most = room(max(looks)) if room else max(looks)
    chain = np.stack([t.chain[:, :levels] for t in tables])
    depth, is_leaf = np.stack([t.depth for t in tables]), np.stack([t.is_leaf for t in tables])
    return Leaves(
        on_device(device, chain),
        on_device(device, depth),
        on_device(device, is_leaf),
        on_device(device, np.array(looks)),
        most,
    )


@dataclass(frozen=True)
class SelectionRules:
    """Settings of the drill-down, one per lane where they are tensors."""

    top_k: Tensor
    """int64 [L]."""
    cooldown: Tensor
    """int64 [L]."""
    exploration: Tensor
    """float32 [L]."""
    scales: tuple[float, ...]
    root_scale: float
    min_share: float


def responsibilities(level_grads: list[Tensor], levels: list[LevelIndex], slots: int) -> Tensor:
    """Gradient norm over each block's own parameters.

    Args:
        level_grads: gradients [L, W, P] of each level.
        levels: where the levels lie.
        slots: width of the result.

    Returns:
        float32 [L, slots], zero where there is no block.
    """
    lanes = level_grads[0].shape[0]
    out = torch.zeros(lanes, slots, device=level_grads[0].device)
    for grad, index in zip(level_grads, levels, strict=True):
        norm = torch.linalg.vector_norm(grad.float(), dim=-1)
        out[:, index.offset : index.offset + index.width] = norm * index.alive
    return out


def _walk(score: Tensor, open_: Tensor, leaves: Leaves) -> Tensor:
    """Walk down from the root to a leaf by the largest score of the children with open leaves.

    Args:
        score: float32 [L, S].
        open_: bool [L, S]: leaves that the walk may end at.
        leaves: the ways.

    Returns:
        int64 [L]: the leaf reached (anything if none is open).
    """
    lanes, slots, levels = leaves.chain.shape
    by_level = score.gather(1, leaves.chain.flatten(1)).view(lanes, slots, levels)
    for level in range(1, levels):
        reaches = open_ & (leaves.depth > level)
        best, at = by_level[..., level].masked_fill(~reaches, -1.0).max(1, keepdim=True)
        here = leaves.chain[..., level]
        # A walk that has ended already has no child to go to, and stays.
        open_ = open_ & ((here == here.gather(1, at)) | (best < 0))
    return open_.float().argmax(1)


def select_paths(
    responsibility: Tensor,
    last_culprit: Tensor,
    step: Tensor,
    uniform: Tensor,
    leaves: Leaves,
    rules: SelectionRules,
) -> Selection:
    """Choose the paths of one step by drilling down again and again.

    The first path always counts. A further culprit counts if its path fits into `top_k` together
    with what is already chosen and its responsibility is at least `min_share` of the first's. A
    culprit of the last `cooldown` steps is not eligible; if no leaf is, the one that was culprit
    longest ago is taken. If even one path is longer than `top_k`, its upper blocks are not updated.

    Args:
        responsibility: float32 [L, S].
        last_culprit: int64 [L, S], `NEVER` for a leaf that was none yet.
        step: int64 [L], the current step.
        uniform: float32 [L, 1 + S] in [0, 1): whether to explore, then a random score per slot.
        leaves: the trees. A leaf that is looked at and does not fit is passed over.
        rules: settings.
    """
    lanes, slots = responsibility.shape
    device = responsibility.device
    age = step[:, None] - last_culprit
    rested = leaves.is_leaf & (age > rules.cooldown[:, None])
    oldest = age.masked_fill(~leaves.is_leaf, -1)
    longest_ago = leaves.is_leaf & (oldest == oldest.amax(1, keepdim=True))
    open_ = torch.where(rested.any(1, keepdim=True), rested, longest_ago)
    explore = uniform[:, 0] < rules.exploration
    score = torch.where(explore[:, None], uniform[:, 1:], responsibility)

    scale = torch.zeros(lanes, slots, device=device)
    on_path = torch.zeros(lanes, slots, dtype=torch.bool, device=device)
    used = torch.zeros(lanes, dtype=torch.int64, device=device)
    level = torch.arange(leaves.chain.shape[2], device=device)
    slot = torch.arange(slots, device=device)
    culprits: list[Tensor] = []
    first: Tensor | None = None
    for look in range(leaves.most):
        found = open_.any(1)
        leaf = _walk(score, open_, leaves)[:, None]
        open_ = open_ & (slot != leaf)
        chain = leaves.chain.gather(1, leaf[..., None].expand(-1, -1, len(level)))[:, 0]
        above = leaves.depth.gather(1, leaf) - 1 - level  # how far each block is above the leaf
        on = above >= 0
        value = torch.full_like(above, rules.scales[-1], dtype=scale.dtype)
        for distance, s in enumerate(rules.scales[:-1]):
            value = value.masked_fill(above == distance, s)
        value = value.masked_fill(level == 0, rules.root_scale)
        if first is None:  # a path longer than top_k loses its upper blocks
            value = value.masked_fill((level > 0) & (above >= rules.top_k[:, None]), 0.0)
        value = value.masked_fill(~on, 0.0)
        before = scale.gather(1, chain)
        new = ((before == 0) & (value > 0) & (level > 0)).sum(1)
        weight = responsibility.gather(1, leaf)[:, 0]
        if first is None:
            first, take = weight, found
        else:
            fits = (used + new <= rules.top_k) & (look < leaves.looks)
            take = found & fits & (weight >= rules.min_share * first)
        taken = take[:, None]
        scale = scale.scatter(1, chain, torch.where(taken, torch.maximum(before, value), before))
        on_path = on_path.scatter(1, chain, on_path.gather(1, chain) | (on & taken))
        used = used + torch.where(take, new, 0)
        culprits.append(torch.where(take, leaf[:, 0], -1))
    return Selection(scale, on_path, torch.stack(culprits, 1))
