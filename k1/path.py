"""Gradients of the chosen paths alone, with every other block frozen.

The frozen forward pass has left every block's output and mixed value. The blocks on the paths are
run again with a graph and mixed back in. What hangs beside the paths enters as its frozen value,
with the identity for its derivative: that of its residual connections. The gradient is exact for a
culprit leaf, for all routers on the path and for the head; for the culprit's ancestors and the
embedding it leaves out what the attention and feed-forward branches beside the path add.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from k1.config import Config
from k1.forward import (
    Activations,
    Batch,
    Forest,
    Text,
    Weights,
    embed,
    forward,
    lane_loss,
    learned_logits,
    run_level,
)
from k1.mixing import flat_index
from k1.topology import LevelIndex


@dataclass(frozen=True)
class PathIndex:
    """The path blocks of one level: R rows per lane, padded."""

    slot: Tensor
    """int64 [L, R]: slot in the arena; the scratch slot where padded."""
    position: Tensor
    """int64 [L, R]: position in the level (0 where padded)."""
    valid: Tensor
    """bool [L, R]."""
    in_parent: Tensor
    """float32 [L, R, R_above]: one-hot, which row of the level above is the parent."""


def index_paths(
    on_path: Tensor, levels: list[LevelIndex], limit: int, scratch: int
) -> list[PathIndex]:
    """List the path blocks of each level.

    Args:
        on_path: bool [L, S].
        levels: the trees.
        limit: most paths of a lane.
        scratch: slot that padding points to.
    """
    paths: list[PathIndex] = []
    for index in levels:
        mask = on_path[:, index.offset : index.offset + index.width]
        rows = 1 if index.level == 0 else min(limit, index.width)
        if not mask.is_cuda:  # a look at the values is free here, and saves the padding
            rows = max(1, int(mask.sum(1).max()))
        order = torch.sort(mask.long(), dim=1, descending=True, stable=True).indices[:, :rows]
        valid = mask.gather(1, order)
        position = torch.where(valid, order, 0)
        slot = torch.where(valid, order + index.offset, scratch)
        if index.level == 0:
            link = torch.zeros(*slot.shape, 1, device=mask.device)
        else:
            above = paths[-1]
            parent = index.parent.gather(1, position)
            link = (parent[..., None] == above.position[:, None]) & above.valid[:, None]
            link = (link & valid[..., None]).float()
        paths.append(PathIndex(slot, position, valid, link))
    return paths


class PathPass:
    """All blocks forward, once; then the gradients of the path blocks."""

    def __init__(self, forest: Forest, batch: Batch, text: Text, paths: list[PathIndex]) -> None:
        """Run the trees on a batch without a graph."""
        self.forest, self.batch, self.paths = forest, batch, paths
        with torch.no_grad():
            self.values = forward(
                forest.weights(), forest.router, forest.levels, batch, text, forest.config
            )

    @cached_property
    def row(self) -> Tensor:
        """Arena rows of the path blocks: int64 [M], scratch rows where padded."""
        lanes, slots, _ = self.forest.rows.shape
        lane = torch.arange(lanes, device=self.forest.rows.device)[:, None] * slots
        return torch.cat([(path.slot + lane).flatten() for path in self.paths])

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [L], gradients [M, P] of the path blocks and [L, Q] of the shared part.

        Of the weights as they are now: between calls, culprits may change, and nothing else.
        """
        forest = self.forest
        lane = torch.arange(len(forest.rows), device=forest.rows.device)[:, None]
        rows = [forest.rows[lane, path.slot].requires_grad_() for path in self.paths]
        shared = as_leaf(forest.shared)
        weights = replace(forest.weights(), shared=shared)
        loss = path_loss(
            rows, weights, self.values, self.paths, forest.levels, self.batch, forest.config
        )
        *by_level, by_shared = torch.autograd.grad(
            loss.sum(), [*rows, shared], allow_unused=True, materialize_grads=True
        )
        return loss.detach(), torch.cat([g.flatten(0, 1) for g in by_level]), by_shared


def as_leaf(view: Tensor) -> Tensor:
    """Make an autograd leaf of a part of the arena, without a copy.

    `data`, for `detach` would share the arena's version counter: the update of other lanes, in
    other threads, would then look like a change of this one.
    """
    return view.data.requires_grad_()


def path_loss(
    rows: list[Tensor],
    weights: Weights,
    frozen: Activations,
    paths: list[PathIndex],
    levels: list[LevelIndex],
    batch: Batch,
    config: Config,
) -> Tensor:
    """Loss per lane [L] as a function of the path blocks' rows and the shared row.

    Args:
        rows: parameters [L, R, P] of the path blocks of each level, requiring gradients.
        weights: the shared row (requiring gradients) and the layouts; its levels are not used.
        frozen: what the frozen forward pass left.
        paths: from `index_paths`.
        levels: the trees.
        batch: the windows that `frozen` was computed on.
        config: the configuration.
    """
    _, b, t = batch.inputs.shape
    dtype = frozen.y[0].dtype
    x = embed(weights.shared_layout.unpack(weights.shared), batch.inputs).to(dtype)[:, None]
    ys: list[Tensor] = []
    pieces: list[dict[str, Tensor]] = []
    for level, path in enumerate(paths):
        if level:
            x = (path.in_parent.to(dtype) @ ys[-1].flatten(2)).unflatten(2, (b, t, -1))
        own = weights.block_layout.unpack(rows[level].flatten(0, 1))
        pieces.append(own)
        ys.append(run_level(own, x, config))
    mixed = ys[-1]
    for level in range(len(paths) - 2, -1, -1):
        mixed = _mix_level(ys, mixed, pieces, frozen, paths, levels, level, config)
    return lane_loss(weights, mixed[:, 0], batch)


def _mix_level(
    ys: list[Tensor],
    below: Tensor,
    pieces: list[dict[str, Tensor]],
    frozen: Activations,
    paths: list[PathIndex],
    levels: list[LevelIndex],
    level: int,
    config: Config,
) -> Tensor:
    """Mix a level's path blocks: recomputed children with a graph, the others frozen."""
    index, path, under = levels[level], paths[level], paths[level + 1]
    lanes, rows, tokens, d = ys[level].shape
    width_below = levels[level + 1].width

    def at_path(values: Tensor) -> Tensor:
        lead = values.shape[2:]
        flat = flat_index(path.position, index.width)
        return values.flatten(0, 1).index_select(0, flat).view(lanes, rows, *lead)

    children, exists = at_path(index.children), at_path(index.has_child)
    ranks = children.shape[-1]
    flat = flat_index(children.flatten(1), width_below)
    prior = frozen.prior[level + 1].flatten(0, 1).index_select(0, flat)
    route = prior.view(lanes, rows, ranks, -1)
    if config.model.router != "mean":
        route = route + learned_logits(pieces[level], ys[level])[:, :, :ranks]
    lowest = torch.finfo(route.dtype).min
    weight = torch.softmax(route.masked_fill(~exists[..., None], lowest), dim=2)
    # [L, R, K, R_below]: rank k of path row r is the path row q below.
    same = children[..., None] == under.position[:, None, None]
    same = (same & exists[..., None]).to(weight.dtype) * under.in_parent.transpose(1, 2)[:, :, None]
    beside = exists & (same.sum(-1) == 0)
    constant = frozen.m[level + 1].flatten(0, 1).index_select(0, flat)
    constant = constant.view(lanes, rows, ranks, tokens, d)
    out = (constant * (weight * beside[..., None]).to(below.dtype)[..., None]).sum(2)
    # Beside the path the residual connections still carry the input on: a gradient that knows this
    # (and takes only the frozen branches for constant) points the ancestors the right way.
    residual = (weight * beside[..., None]).sum(2).to(below.dtype)[..., None]
    out = out + residual.detach() * (ys[level] - ys[level].detach())
    own_weight = torch.einsum("lrkn,lrkq->lqn", weight, same)
    own = below * own_weight[..., None].to(below.dtype)
    out = out + (under.in_parent.transpose(1, 2).to(own.dtype) @ own.flatten(2)).view_as(out)
    return torch.where(at_path(index.is_leaf)[..., None, None], ys[level], out)
