"""Gradients of the chosen paths alone, with every other block frozen.

The frozen forward pass has left every block's output and mixed value. The blocks on the paths are
run again with a graph and mixed back in. What hangs beside the paths enters as its frozen value,
with the identity for its derivative: that of its residual connections. The gradient is exact for a
culprit leaf, for all routers on the path and for the head; for the culprit's ancestors and the
embedding it leaves out what the attention and feed-forward branches beside the path add.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

    def gradients(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Loss [L], gradients [L, R, P] of each level's path blocks, the shared gradient [L, Q].

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
        return loss.detach(), by_level, by_shared


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
    lanes, rows = path.position.shape
    width_below = levels[level + 1].width

    def at_path(values: Tensor) -> Tensor:
        lead = values.shape[2:]
        flat = flat_index(path.position, index.width)
        return values.flatten(0, 1).index_select(0, flat).view(lanes, rows, *lead)

    children, exists = at_path(index.children), at_path(index.has_child)
    flat = flat_index(children.flatten(1), width_below)

    def of_children(values: Tensor) -> Tensor:
        picked = values.flatten(0, 1).index_select(0, flat)
        return picked.view(lanes, rows, -1, *values.shape[2:])

    route = of_children(frozen.prior[level + 1])
    if config.model.router != "mean":
        route = route + learned_logits(pieces[level], ys[level])[:, :, : children.shape[-1]]
    route = route.masked_fill(~exists[..., None], torch.finfo(route.dtype).min)
    # [L, R, K, R_below]: rank k of path row r is the path row q below.
    own = (children[..., None] == under.position[:, None, None]) & exists[..., None]
    own = own & (under.in_parent.transpose(1, 2)[:, :, None] > 0)
    out: Tensor = _PathMix.apply(
        ys[level],
        below,
        route,
        of_children(frozen.m[level + 1]),
        exists,
        own,
        at_path(index.is_leaf),
    )
    return out


class _PathMix(torch.autograd.Function):
    """Average the children of path blocks, of which some are path blocks too."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        below: Tensor,
        route: Tensor,
        values: Tensor,
        exists: Tensor,
        own: Tensor,
        is_leaf: Tensor,
    ) -> Tensor:
        """Mix; `values` [L, R, K, N, d], the children's, take in those of `below` [L, Q, N, d]."""
        lanes, rows, ranks, _ = own.shape
        weight = torch.softmax(route, dim=2)
        if weight.shape[-1] == 1:
            weight = weight.expand(-1, -1, -1, y.shape[2])
        weight = weight.to(y.dtype)
        mine = own.any(-1)
        row = flat_index(own.long().argmax(-1).flatten(1), below.shape[1])
        again = below.flatten(0, 1).index_select(0, row).view_as(values)
        values = torch.where(mine[..., None, None], again, values)
        out = values[:, :, 0] * weight[:, :, 0, :, None]
        for k in range(1, ranks):
            out.addcmul_(values[:, :, k], weight[:, :, k, :, None])
        leaf = is_leaf[..., None, None]
        ctx.save_for_backward(values, weight, route, exists, own, mine, leaf)
        return torch.where(leaf, y, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, route, exists, own, mine, leaf = ctx.saved_tensors
        through = grad.masked_fill(leaf, 0)
        # Beside the path the residual connections still carry the input on: a gradient that knows
        # this (and takes only the frozen branches for constant) points the ancestors the right way.
        beside = (weight * (exists & ~mine)[..., None]).sum(2)
        by_y = torch.where(leaf, grad, through * beside[..., None])
        to_own = own.to(weight.dtype)
        share = torch.einsum("lrkn,lrkq->lqn", weight, to_own)
        by_below = (to_own.sum(2).transpose(1, 2) @ through.flatten(2)).unflatten(
            2, through.shape[2:]
        ) * share[..., None]
        by_route = None
        if ctx.needs_input_grad[2]:
            by_weight = (values * through[:, :, None]).sum(-1)
            by_route = torch._softmax_backward_data(
                by_weight.to(route.dtype), weight.to(route.dtype), 2, route.dtype
            )
        return by_y, by_below, by_route, None, None, None, None
