"""A sparse step's passes by the kernels: all blocks forward, the chosen paths backward.

The forward pass keeps, for the blocks on the paths alone, what their gradients need; so nothing is
computed twice and nothing else is kept. The backward pass is that of `k1.path.path_loss`, written
out: down the tree through the mixing, then up the paths through the blocks.

Shapes: L lanes, S rows of a lane's arena, N tokens, d = embed, R path rows of a level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from k1.block import Folded, fold, unfold
from k1.forward import (
    Activations,
    Batch,
    Forest,
    Text,
    arithmetic,
    embed,
    lane_loss,
    learned_logits,
    priors,
)
from k1.kernels.block import Kept, run_backward, run_blocks
from k1.kernels.mix import mix_frozen
from k1.kernels.path_mix import own_rows, path_mix_backward
from k1.mixing import flat_index
from k1.path import PathIndex, as_leaf
from k1.topology import LevelIndex

_ROUTER = ("router.weight", "router.bias")


@dataclass(frozen=True)
class TreePass:
    """A forward pass that the paths' gradients can be had from."""

    time: int
    """Tokens in a window."""
    x: Tensor
    """The root's input [L, N, d]."""
    activations: Activations
    chosen: Tensor
    """int64: the path blocks' rows in the flattened arena, level by level."""
    folded: Folded
    """Weights of the path blocks, level by level."""
    pieces: dict[str, Tensor]
    """Parameters of the path blocks, level by level."""
    kept: Kept
    """Values of the path blocks, level by level."""


class FusedPathPass:
    """What `k1.path.PathPass` is, by the kernels."""

    def __init__(self, forest: Forest, batch: Batch, text: Text, paths: list[PathIndex]) -> None:
        """Run the trees on a batch without a graph."""
        self.forest, self.batch, self.paths = forest, batch, paths
        with torch.no_grad():
            self.values, self._pass = forward_frozen(forest, batch, text, paths)
        self._fresh = True

    def gradients(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Loss [L], gradients [L, R, P] of each level's path blocks, the shared gradient [L, Q]."""
        forest, batch = self.forest, self.batch
        assert self._pass is not None
        with torch.no_grad():
            if not self._fresh:
                self._pass = refresh_culprits(forest, self._pass, self.paths)
        self._fresh = False
        hidden = self._pass.activations.output.requires_grad_()
        shared = as_leaf(forest.shared)
        weights = replace(forest.weights(), shared=shared)
        with torch.enable_grad():
            loss = lane_loss(weights, hidden, batch)
        by_hidden, by_shared = torch.autograd.grad(loss.sum(), [hidden, shared])
        with torch.no_grad():
            by_level, dx = backward_path(forest, self._pass, self.paths, by_hidden)
            self._add_embedding(forest.shared_layout.unpack(by_shared), dx.float())
        return loss.detach(), by_level, by_shared

    def _add_embedding(self, by_shared: dict[str, Tensor], dx: Tensor) -> None:
        """Add the gradients of embedding and positions, given that of the root's input."""
        lanes, vocab, d = by_shared["embedding"].shape
        inputs = self.batch.inputs
        by_position = dx.view(lanes, *inputs.shape[1:], d).sum(1)
        by_shared["position"][:, : inputs.shape[2]] += by_position
        index = inputs.flatten(1) + torch.arange(lanes, device=dx.device)[:, None] * vocab
        by_token = torch.ops.aten.embedding_dense_backward(
            dx.flatten(0, 1), index.flatten(), lanes * vocab, -1, False
        )
        by_shared["embedding"] += by_token.view(lanes, vocab, d)


def _blocks(forest: Forest, rows: Tensor) -> tuple[dict[str, Tensor], Folded]:
    """Pieces and folded weights of flattened arena rows [blocks, P]."""
    pieces = forest.block_layout.unpack(rows)
    folded = fold(pieces, arithmetic(forest.config))
    return pieces, Folded(*[t.contiguous() for t in folded.tensors()])


def forward_frozen(
    forest: Forest, batch: Batch, text: Text, paths: list[PathIndex] | None = None
) -> tuple[Activations, TreePass | None]:
    """Run whole trees without a graph.

    Args:
        forest: the trees.
        batch: the windows.
        text: the same as the routers see them.
        paths: the blocks whose gradients will be wanted.

    Returns:
        All values, and what `backward_path` needs if there are paths.
    """
    config, heads = forest.config, forest.config.model.heads
    lanes, slots, _ = forest.rows.shape
    time = batch.inputs.shape[2]
    tokens, d = batch.inputs[0].numel(), config.model.embed
    pieces, folded = _blocks(forest, forest.rows.flatten(0, 1))
    shared = forest.shared_layout.unpack(forest.shared)
    start = embed(shared, batch.inputs).to(arithmetic(config)).view(lanes, tokens, d)
    kept = keep = chosen = None
    if paths is not None:
        chosen, keep = _keep(paths, lanes, slots)
        kept = Kept.empty(len(chosen), tokens, d, config.model.feed_forward, start)
    x, ys = start, []
    for index in forest.levels:
        x = run_blocks(folded, x, index.source, index.row, time, heads, kept, keep)
        ys.append(x.view(lanes, index.width, tokens, d))
    prior = priors(forest.router, forest.levels, text, config, fused=True)
    values = _mix_up(forest, pieces, ys, prior)
    if kept is None or chosen is None:
        return values, None
    own_pieces, own = _blocks(forest, forest.rows.flatten(0, 1).index_select(0, chosen))
    return values, TreePass(time, start, values, chosen, own, own_pieces, kept)


def _mix_up(
    forest: Forest, pieces: dict[str, Tensor], ys: list[Tensor], prior: list[Tensor]
) -> Activations:
    lanes, slots, _ = forest.rows.shape
    m: list[Tensor] = [ys[-1]]
    share: list[Tensor] = []
    for parent, child in reversed(list(pairwise(forest.levels))):
        weight = bias = None
        if forest.config.model.router != "mean":
            cut = slice(parent.offset, parent.offset + parent.width)
            weight = pieces["router.weight"].unflatten(0, (lanes, slots))[:, cut]
            bias = pieces["router.bias"].unflatten(0, (lanes, slots))[:, cut]
        below = prior[child.level]
        mixed, part = mix_frozen(ys[parent.level], m[0], below, weight, bias, parent, child)
        m.insert(0, mixed)
        share.insert(0, part)
    return Activations(ys, m, prior, [prior[0], *share])


def refresh_culprits(forest: Forest, done: TreePass, paths: list[PathIndex]) -> TreePass:
    """Run the path blocks again, on the inputs that they had, after their leaves have changed.

    Exact as long as no block changed but culprits: nothing else depends on them. The values of
    `done` are overwritten.
    """
    flat = forest.rows.flatten(0, 1)
    own_pieces, own = _blocks(forest, flat.index_select(0, done.chosen))
    ys, x, first = done.activations.y, done.x, 0
    for index, path, y in zip(forest.levels, paths, ys, strict=True):
        at = flat_index(path.position, index.width)
        valid = path.valid.flatten()
        place = torch.arange(first, first + len(at), device=at.device)
        run_blocks(
            own,
            x,
            torch.where(valid, index.source[at], -1),
            place,
            done.time,
            forest.config.model.heads,
            done.kept,
            torch.arange(len(done.chosen), device=at.device),
            out=y.flatten(0, 1),
            target=torch.where(valid, at, -1),
        )
        x, first = y.flatten(0, 1), first + len(at)
    values = _mix_up(forest, forest.block_layout.unpack(flat), ys, done.activations.prior)
    return TreePass(done.time, done.x, values, done.chosen, own, own_pieces, done.kept)


def _keep(paths: list[PathIndex], lanes: int, slots: int) -> tuple[Tensor, Tensor]:
    """List the path blocks' arena rows, level by level, and each arena row's place in that list."""
    lane = torch.arange(lanes, device=paths[0].slot.device)[:, None] * slots
    chosen = torch.cat([(path.slot + lane).flatten() for path in paths])
    place = torch.full((lanes * slots,), -1, dtype=torch.int64, device=chosen.device)
    # Padding points to the scratch row, which no level runs: whatever is written there is unused.
    return chosen, place.scatter_(0, chosen, torch.arange(len(chosen), device=chosen.device))


def backward_path(
    forest: Forest, done: TreePass, paths: list[PathIndex], grad: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the path blocks from that of the trees' outputs.

    Args:
        forest: the trees.
        done: from `forward_frozen` or `refresh_culprits`.
        paths: the path blocks.
        grad: gradient of the loss by the outputs [L, N, d].

    Returns:
        float32 gradients [L, R, P] of each level's path blocks (anything where padded), and the
        gradient of the root's input [L, N, d].
    """
    config, levels = forest.config, forest.levels
    lanes, tokens, d = grad.shape
    learned = config.model.router != "mean"
    by_router = [torch.zeros_like(done.pieces[name]) for name in _ROUTER]
    by_output: list[Tensor] = []
    mixed, first = grad[:, None].contiguous(), 0
    for level in range(len(paths) - 1):
        count = lanes * paths[level].slot.shape[1]
        cut = slice(first, first + count)
        router = {name: done.pieces[name][cut] for name in _ROUTER}
        by_y, mixed, grads = _mix_backward(
            done.activations, paths, levels, level, mixed, router if learned else None
        )
        by_output.append(by_y)
        for target, value in zip(by_router, grads, strict=False):
            target[cut] = value
        first += count
    by_output.append(mixed)
    blocks: list[Folded] = []
    dx = grad
    for level in reversed(range(len(paths))):
        path = paths[level]
        count = lanes * path.slot.shape[1]
        stop = sum(lanes * p.slot.shape[1] for p in paths[: level + 1])
        cut = slice(stop - count, stop)
        folded = Folded(*[t[cut] for t in done.folded.tensors()])
        kept = done.kept.rows(cut.start, cut.stop)
        below, by_weight = run_backward(
            folded, kept, by_output[level].flatten(0, 1), done.time, config.model.heads
        )
        blocks.insert(0, by_weight)
        below = below.view(lanes, -1, tokens, d)
        if level:
            # A padded row has kept nothing, so what comes of it may be anything: leave it out.
            below = torch.where(path.valid[..., None, None], below, 0)
            to_parent = path.in_parent.transpose(1, 2).to(below.dtype)
            above = by_output[level - 1]
            by_output[level - 1] = torch.baddbmm(
                above.flatten(2), to_parent, below.flatten(2)
            ).view_as(above)
        else:
            dx = below[:, 0]
    joined = Folded(
        *[torch.cat(parts) for parts in zip(*[b.tensors() for b in blocks], strict=True)]
    )
    by_piece = {**unfold(done.pieces, joined), **dict(zip(_ROUTER, by_router, strict=True))}
    parts = forest.block_layout.pack(by_piece).split([lanes * path.slot.shape[1] for path in paths])
    return [part.unflatten(0, (lanes, -1)) for part in parts], dx


def _mix_backward(
    values: Activations,
    paths: list[PathIndex],
    levels: list[LevelIndex],
    level: int,
    grad: Tensor,
    router: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Take the gradient of a level's mixed values [L, R, N, d] apart.

    Returns:
        Gradients of the path blocks' own outputs [L, R, N, d], of the mixed values of the path
        blocks below [L, Q, N, d], and of the routers (none without routers).
    """
    index, path, under = levels[level], paths[level], paths[level + 1]
    lanes, rows = path.position.shape
    at = flat_index(path.position, index.width)

    def at_path(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1).index_select(0, at).view(lanes, rows, *tensor.shape[2:])

    children, exists = at_path(index.children), at_path(index.has_child)
    own = own_rows(children, exists, under.position, under.in_parent)
    y = at_path(values.y[level])
    logits, leaves = None, {}
    if router is not None:
        leaves = {"y": y.requires_grad_(), **{n: t.detach() for n, t in router.items()}}
        for leaf in leaves.values():
            leaf.requires_grad_()
        with torch.enable_grad():
            logits = learned_logits(leaves, leaves["y"])
    by_y, below, by_logits = path_mix_backward(
        grad,
        under.slot.shape[1],
        None if logits is None else logits.detach(),
        values.prior[level + 1],
        values.m[level + 1],
        children,
        exists,
        own,
        at_path(index.is_leaf),
    )
    if logits is None:
        return by_y, below, ()
    through, *by_router = torch.autograd.grad(logits, list(leaves.values()), by_logits)
    return by_y + through, below, tuple(by_router)
