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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k1.block import fold
from k1.chain import run_chain
from k1.config import Config
from k1.forward import (
    Activations,
    Batch,
    Forest,
    Text,
    arithmetic,
    embed,
    forward,
    lane_loss,
    learned_logits,
)
from k1.levels import LevelIndex
from k1.mixing import flat_index

ROUTER = ("router.weight", "router.bias")
"""The pieces of a block that the mixing needs."""


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


@dataclass(frozen=True)
class PathBlocks:
    """The path blocks, run with a graph on each other's outputs."""

    rows: Tensor
    """Their parameters [blocks, P], level by level, lane by lane; a leaf of the graph."""
    shared: Tensor
    """The shared row [L, Q]; a leaf of the graph."""
    routers: list[dict[str, Tensor]]
    """Parameters by name of the routers of each level's path blocks, each [L * R, ...]."""
    ys: list[Tensor]
    """Outputs [L, R, N, d] of each level."""


@dataclass(frozen=True)
class Gradients:
    """What a backward pass over M chosen blocks gives."""

    loss: Tensor
    """float32 [L]: nats per token."""
    by_row: Tensor
    """float32 [M, P]: of the chosen blocks."""
    squares: Tensor
    """float32 [M]: the sum of squares of each of them."""
    by_shared: Tensor
    """float32 [L, Q]: of the shared rows."""


class PathPass:
    """All blocks forward, once; then the gradients of the path blocks, by torch's graph.

    `k1.path_cpu` does the same on a CPU at less cost.
    """

    def __init__(self, forest: Forest, batch: Batch, text: Text, paths: list[PathIndex]) -> None:
        """Run the trees on a batch, the path blocks alone with a graph."""
        self.forest, self.batch, self.paths = forest, batch, paths
        with torch.no_grad():
            self.values = forward(
                forest.weights(),
                forest.router,
                forest.levels,
                batch,
                text,
                forest.config,
            )

    @cached_property
    def row(self) -> Tensor:
        """Arena rows of the path blocks: int64 [M], scratch rows where padded."""
        slots = self.forest.rows.shape[1]
        return torch.cat([flat_index(path.slot, slots) for path in self.paths])

    @cached_property
    def place(self) -> Tensor:
        """Where in `row` an arena row stands: int64 [L * S], -1 if nowhere; scratch anywhere."""
        lanes, slots, _ = self.forest.rows.shape
        nowhere = torch.full((lanes * slots,), -1, dtype=torch.int64, device=self.row.device)
        return nowhere.scatter(0, self.row, torch.arange(len(self.row), device=self.row.device))

    def gradients(self) -> Gradients:
        """Gradients of the path blocks and of the shared part.

        Of the weights as they are now: between calls, culprits may change, and nothing else.
        """
        forest, paths = self.forest, self.paths
        run = run_paths(forest, self.batch, paths)
        mixed = run.ys[-1]
        for level in range(len(paths) - 2, -1, -1):
            mixed = _mix_level(
                run.ys, mixed, run.routers, self.values, paths, forest.levels, level, forest.config
            )
        weights = replace(forest.weights(), shared=run.shared)
        loss = lane_loss(weights, mixed[:, 0], self.batch)
        by_row, by_shared = torch.autograd.grad(
            loss.sum(), [run.rows, run.shared], allow_unused=True, materialize_grads=True
        )
        squares = torch.linalg.vector_norm(by_row, dim=-1).square()
        return Gradients(loss.detach(), by_row, squares, by_shared)


def run_paths(forest: Forest, batch: Batch, paths: list[PathIndex]) -> PathBlocks:
    """Run the path blocks with a graph."""
    config, slots = forest.config, forest.rows.shape[1]
    chosen = torch.cat([flat_index(path.slot, slots) for path in paths])
    rows = forest.rows.flatten(0, 1).index_select(0, chosen).requires_grad_()
    shared = as_leaf(forest.shared)
    pieces = forest.block_layout.unpack(rows)
    folded = fold(pieces, arithmetic(config))
    x = embed(forest.shared_layout.unpack(shared), batch.inputs).to(arithmetic(config))
    links = [path.in_parent for path in paths[1:]]
    ys = [y.flatten(2, 3) for y in run_chain(folded, x, links, config.model.heads)]
    sizes = [path.slot.numel() for path in paths]
    routers = zip(*[pieces[name].split(sizes) for name in ROUTER], strict=True)
    return PathBlocks(rows, shared, [dict(zip(ROUTER, r, strict=True)) for r in routers], ys)


def as_leaf(view: Tensor) -> Tensor:
    """Make an autograd leaf of a part of the arena, without a copy.

    `data`, for `detach` would share the arena's version counter: the update of other lanes, in
    other threads, would then look like a change of this one.
    """
    return view.data.requires_grad_()


def own_children(children: Tensor, exists: Tensor, under: PathIndex) -> Tensor:
    """Find path blocks among path blocks' children.

    Args:
        children: int64 [L, R, K]: positions in the level below.
        exists: bool [L, R, K].
        under: the path blocks of the level below.

    Returns:
        bool [L, R, K, R_below]: rank k of path row r is the path row q below.
    """
    own = (children[..., None] == under.position[:, None, None]) & exists[..., None]
    return own & (under.in_parent.transpose(1, 2)[:, :, None] > 0)


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
    own = own_children(children, exists, under)
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
        ranks = own.shape[2]
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
