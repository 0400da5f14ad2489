"""Tracing an error to blocks: responsibilities, and the drill-down that picks the paths to update.

Everything here works on tensors over lanes, without a look at their values, so that the choice of
path stays on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k1.topology import LevelIndex

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
class Looks:
    """How many leaves the drill-down looks at."""

    by_lane: Tensor
    """int64 [L]: a lane's own number, so that its choice does not depend on its neighbours."""
    most: int
    """The largest of them, known to the host."""


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


def _subtree_any(flag: list[Tensor], levels: list[LevelIndex]) -> list[Tensor]:
    """Whether any leaf below (or the block itself, if a leaf) has the flag, per level."""
    result = list(flag)
    for level in range(len(levels) - 2, -1, -1):
        index = levels[level]
        below = result[level + 1].gather(1, index.children.flatten(1)).view_as(index.has_child)
        inner = (below & index.has_child).any(-1)
        result[level] = torch.where(index.is_leaf, flag[level], inner)
    return result


def _descend(score: list[Tensor], open_: list[Tensor], levels: list[LevelIndex]) -> list[Tensor]:
    """Walk down from the root to a leaf by the largest score among open children.

    Returns:
        For each level the position taken [L], or -1 below the leaf that was reached.
    """
    lanes = score[0].shape[0]
    lane = torch.arange(lanes, device=score[0].device)
    here = torch.zeros(lanes, dtype=torch.int64, device=score[0].device)
    walk = [here]
    for level in range(1, len(levels)):
        above = levels[level - 1]
        stopped = (walk[-1] < 0) | above.is_leaf[lane, here]
        children = above.children[lane, here]
        allowed = above.has_child[lane, here] & open_[level].gather(1, children)
        value = score[level].gather(1, children).masked_fill(~allowed, -1.0)
        best = children.gather(1, value.argmax(1, keepdim=True))[:, 0]
        walk.append(torch.where(stopped, -1, best))
        here = torch.where(stopped, 0, best)
    return walk


def select_paths(
    responsibility: Tensor,
    last_culprit: Tensor,
    step: Tensor,
    uniform: Tensor,
    levels: list[LevelIndex],
    rules: SelectionRules,
    looks: Looks,
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
        levels: the trees.
        rules: settings.
        looks: how many leaves are looked at. A leaf that does not fit is passed over.
    """
    lanes, slots = responsibility.shape
    device = responsibility.device

    def cut(values: Tensor) -> list[Tensor]:
        return [values[:, i.offset : i.offset + i.width] for i in levels]

    alive_leaf = [i.alive & i.is_leaf for i in levels]
    age = step[:, None] - last_culprit
    rested = [a > rules.cooldown[:, None] for a in cut(age)]
    eligible = [leaf & r for leaf, r in zip(alive_leaf, rested, strict=True)]
    none = ~torch.stack([e.any(1) for e in eligible]).any(0)
    oldest = torch.stack(
        [a.masked_fill(~leaf, -1).amax(1) for a, leaf in zip(cut(age), alive_leaf, strict=True)]
    ).amax(0)
    longest_ago = [
        leaf & (a == oldest[:, None]) for a, leaf in zip(cut(age), alive_leaf, strict=True)
    ]
    eligible = [
        torch.where(none[:, None], o, e) for e, o in zip(eligible, longest_ago, strict=True)
    ]
    explore = uniform[:, 0] < rules.exploration
    score = torch.where(explore[:, None], uniform[:, 1 : slots + 1], responsibility)

    scale = torch.zeros(lanes, slots, device=device)
    on_path = torch.zeros(lanes, slots, dtype=torch.bool, device=device)
    culprits = []
    first: Tensor | None = None
    lane = torch.arange(lanes, device=device)
    used = torch.zeros(lanes, dtype=torch.int64, device=device)
    for look in range(looks.most):
        open_ = _subtree_any(eligible, levels)
        walk = _descend(cut(score), open_, levels)
        found = open_[0][:, 0]
        place = [
            torch.where(w >= 0, w + i.offset, slots) for w, i in zip(walk, levels, strict=True)
        ]
        depth = torch.stack([w >= 0 for w in walk]).sum(0)  # blocks on the path, root included
        leaf_slot = torch.stack(place).gather(0, (depth - 1)[None])[0]
        path = torch.zeros(lanes, slots + 1, dtype=torch.bool, device=device)
        wanted = torch.zeros(lanes, slots + 1, device=device)
        for level, slot in enumerate(place):
            path[lane, slot] = True
            distance = depth - 1 - level
            value = torch.full_like(wanted[:, 0], rules.scales[-1])
            for above, s in enumerate(rules.scales):
                value = torch.where(distance == above, s, value)
            if level == 0:
                value = torch.full_like(value, rules.root_scale)
            elif first is None:  # a path longer than top_k loses its upper blocks
                value = torch.where(distance < rules.top_k, value, 0.0)
            wanted[lane, slot] = value
        path[:, slots], wanted[:, slots] = False, 0.0
        path, wanted = path[:, :-1], wanted[:, :-1]
        weight = responsibility.gather(1, leaf_slot[:, None])[:, 0]
        new = (path & (scale == 0) & (wanted > 0))[:, 1:].sum(1)
        if first is None:
            first, take = weight, found
        else:
            fits = used + new <= rules.top_k
            take = found & fits & (weight >= rules.min_share * first) & (look < looks.by_lane)
        taken = take[:, None]
        on_path |= path & taken
        scale = torch.where(taken, torch.maximum(scale, wanted), scale)
        used = used + torch.where(take, new, 0)
        culprits.append(torch.where(take, leaf_slot, -1))
        passed = torch.zeros(lanes, slots + 1, dtype=torch.bool, device=device)
        passed[lane, leaf_slot] = True
        eligible = [e & ~p for e, p in zip(eligible, cut(passed[:, :-1]), strict=True)]
    return Selection(scale, on_path, torch.stack(culprits, 1))
