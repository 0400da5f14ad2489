"""Gradients of the chosen paths on a CPU, written out: there, torch's graph costs what blocks do.

The same as `k1.path`. The path blocks run first and keep what their gradients need, so the frozen
forward pass leaves them out; its values then hold for the paths, too, and the backward pass reads
the mixing from them.

Shapes: L lanes, R path blocks of a level in each, K ranks of children, M path blocks in all, level
by level, N tokens, d = embed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k1.block import Folded, fold, go_back, norm_back, norm_keeping, run_keeping
from k1.forward import Activations, Batch, Forest, Text, arithmetic, embed, forward
from k1.frozen import Known
from k1.head import cross_entropy_gradients
from k1.levels import LevelIndex
from k1.mixing import flat_index
from k1.path import Gradients, PathIndex, PathPass, own_children


@dataclass(frozen=True)
class _Run:
    """The path blocks, forward, with what their gradients need."""

    pieces: dict[str, Tensor]
    """Their parameters by name, each [M, ...]."""
    folded: Folded
    cuts: list[tuple[int, int]]
    """Where each level's blocks lie among the M."""
    inputs: list[Tensor]
    """Inputs [L, R, B, T, d] of each level."""
    kept: list[list[Tensor]]
    """Of each level, what `run_keeping` returned."""
    ys: list[Tensor]
    """Outputs [L, R, N, d] of each level."""


class CpuPathPass(PathPass):
    """All blocks forward, once; then the gradients of the path blocks."""

    def __init__(self, forest: Forest, batch: Batch, text: Text, paths: list[PathIndex]) -> None:
        """Run the trees on a batch."""
        self.forest, self.batch, self.paths = forest, batch, paths
        self._run: _Run | None = None
        with torch.inference_mode():  # leaner than `no_grad`, which keeps track of views
            self._run = self._run_paths()
            levels = zip(self._run.ys, forest.levels, paths, strict=True)
            known = [_known(*level) for level in levels]
            weights, router, levels_ = forest.weights(), forest.router, forest.levels
            self.values = forward(weights, router, levels_, batch, text, forest.config, known=known)

    @torch.inference_mode()
    def gradients(self) -> Gradients:
        """Gradients of the path blocks and of the shared part.

        Of the weights as they are now: between calls, culprits may change, and nothing else.
        """
        forest, run = self.forest, self._run
        if run is None:
            run = self._run_paths()
            _mix_again(self.values, run.ys, self.paths, forest.levels)
        self._run = None
        by_row = run.pieces["norm1.weight"].new_empty(run.cuts[-1][1], forest.block_layout.total)
        by_shared = torch.empty_like(forest.shared)
        by_piece = forest.block_layout.unpack(by_row)
        by_shared_piece = forest.shared_layout.unpack(by_shared)
        loss, dm = self._head_back(by_shared_piece)
        by_y = self._mix_back(run, dm, by_piece)
        dx = self._chain_back(run, by_y, by_piece)
        self._embed_back(dx.float(), by_shared_piece)
        squares = torch.linalg.vector_norm(by_row, dim=-1).square()
        return Gradients(loss, by_row, squares, by_shared)

    def _run_paths(self) -> _Run:
        """Run the path blocks on each other's outputs."""
        forest, config = self.forest, self.forest.config
        pieces = forest.block_layout.unpack(forest.rows.flatten(0, 1).index_select(0, self.row))
        folded = fold(pieces, arithmetic(config))
        shared = forest.shared_layout.unpack(forest.shared)
        x = embed(shared, self.batch.inputs).to(arithmetic(config))[:, None]
        run = _Run(pieces, folded, [], [], [], [])
        stop = 0
        for path in self.paths:
            start, stop = stop, stop + path.slot.numel()
            if start:
                x = _hand_down(path.in_parent, run.ys[-1]).unflatten(2, x.shape[2:4])
            y, flat = torch.empty_like(x), x.flatten(0, 1)
            run.kept.append(run_keeping(folded.cut(start, stop), flat, config.model.heads, y))
            run.inputs.append(x)
            run.ys.append(y.flatten(2, 3))
            run.cuts.append((start, stop))
        return run

    def _head_back(self, by: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Go through the head: loss [L], gradient of the roots' mixed values [L, 1, N, d]."""
        pieces, hidden = self.forest.shared_layout.unpack(self.forest.shared), self.values.output
        gain, shift = (pieces[f"norm.{n}"][:, None].to(hidden.dtype) for n in ("weight", "bias"))
        normed, *moments = norm_keeping(hidden)
        losses, by_out, _ = cross_entropy_gradients(
            torch.addcmul(shift, normed, gain),
            pieces["head"],
            self.batch.targets.flatten(1),
            scale=1 / hidden.shape[1],
            by_head=by["head"],
        )
        assert by_out is not None
        by["norm.weight"].copy_((by_out * normed).sum(1))
        by["norm.bias"].copy_(by_out.sum(1))
        return losses.mean(1), norm_back(by_out * gain, hidden, *moments)[:, None]

    def _mix_back(self, run: _Run, dm: Tensor, by: dict[str, Tensor]) -> list[Tensor]:
        """Go down through the mixing: gradients [L, R, N, d] of each level's outputs.

        Args:
            run: the path blocks.
            dm: the gradient of the roots' mixed values.
            by: where the gradients of the routers go.
        """
        values, levels, paths = self.values, self.forest.levels, self.paths
        learned = self.forest.config.model.router != "mean"
        by["router.weight"].zero_()
        by["router.bias"].zero_()
        by_y = []
        for level, under in enumerate(paths[1:]):
            path, index, y = paths[level], levels[level], run.ys[level]
            children, exists, is_leaf = _children(path, index)
            own = own_children(children, exists, under).any(-1)
            share = values.share[level + 1].to(y.dtype)
            weight = _at(share, children).masked_fill_(~exists[..., None], 0)
            through = dm.masked_fill(is_leaf[..., None, None], 0) if index.any_leaf else dm
            # Beside the path the residual connections still carry the input on: a gradient that
            # knows this (and takes only the frozen branches for constant) points the ancestors the
            # right way.
            dy = through * weight.masked_fill(own[..., None], 0).sum(2)[..., None]
            if index.any_leaf:
                dy = torch.where(is_leaf[..., None, None], dm, dy)
            if learned:
                by_weight = (_at(values.m[level + 1], children) * through[:, :, None]).sum(-1)
                by_logits = torch._softmax_backward_data(
                    by_weight.float(), weight.float(), 2, torch.float32
                )
                dy += _router_back(run, level, by_logits.flatten(0, 1), by).view_as(dy)
            by_y.append(dy)
            passed = _hand_down(under.in_parent, through)
            dm = passed.mul_(_at(share, under.position)[..., None])
        return [*by_y, dm]

    def _chain_back(self, run: _Run, by_y: list[Tensor], by: dict[str, Tensor]) -> Tensor:
        """Go up through the path blocks: the gradient of the roots' inputs [L, B, T, d].

        Args:
            run: the path blocks.
            by_y: what the mixing says of the gradients of their outputs.
            by: where the gradients of their weights go.
        """
        heads = self.forest.config.model.heads
        by_folded = Folded(*[torch.empty_like(t) for t in run.folded.tensors()])
        dx: Tensor | None = None
        for level in range(len(by_y) - 1, -1, -1):
            x, cut, dy = run.inputs[level], run.cuts[level], by_y[level]
            if dx is not None:
                dy = dy + _hand_down(self.paths[level + 1].in_parent.transpose(1, 2), dx)
            dx = go_back(
                run.folded.cut(*cut),
                x.flatten(0, 1),
                run.kept[level],
                heads,
                dy.view_as(x).flatten(0, 1),
                by_folded.cut(*cut),
            ).view_as(dy)
        assert dx is not None
        _fold_back(run.pieces, by_folded, by)
        return dx[:, 0].view_as(run.inputs[0][:, 0])

    def _embed_back(self, dx: Tensor, by: dict[str, Tensor]) -> None:
        """Go through the embedding, from the gradient [L, B, T, d] of what it gives."""
        inputs, table = self.batch.inputs, by["embedding"]
        lanes, vocab, _ = table.shape
        index = inputs + torch.arange(lanes).view(-1, 1, 1) * vocab
        found = torch.ops.aten.embedding_dense_backward(dx, index, lanes * vocab, -1, False)
        table.copy_(found.view_as(table))
        by["position"][:, : dx.shape[2]] = dx.sum(1)
        by["position"][:, dx.shape[2] :] = 0


def _known(y: Tensor, index: LevelIndex, path: PathIndex) -> Known:
    at, valid = flat_index(path.position, index.width), path.valid.flatten()
    return Known(at[valid], y.flatten(0, 1)[valid])


def _hand_down(link: Tensor, above: Tensor) -> Tensor:
    """Take values [L, R_above, ...] over a link [L, R, R_above]: [L, R, ...]."""
    shape = *link.shape[:2], *above.shape[2:]
    return torch.bmm(link.to(above.dtype), above.flatten(2)).view(shape)


def _at(values: Tensor, position: Tensor) -> Tensor:
    """Pick values [L, W, ...] at positions [L, ...] of a level."""
    picked = values.flatten(0, 1).index_select(0, flat_index(position, values.shape[1]))
    return picked.view(*position.shape, *values.shape[2:])


def _children(path: PathIndex, index: LevelIndex) -> tuple[Tensor, Tensor, Tensor]:
    """Children of path blocks: positions and existence [L, R, K], and who is a leaf [L, R]."""
    at = (_at(t, path.position) for t in (index.children, index.has_child, index.is_leaf))
    children, exists, is_leaf = at
    return children, exists, is_leaf


def _mix_again(
    values: Activations, ys: list[Tensor], paths: list[PathIndex], levels: list[LevelIndex]
) -> None:
    """Bring the mixed values up to date: culprits have moved, which leaves the routing alone."""
    for level in range(len(paths) - 1, -1, -1):
        path, index, mixed = paths[level], levels[level], ys[level]
        if level + 1 < len(paths):
            children, exists, is_leaf = _children(path, index)
            share = values.share[level + 1].to(mixed.dtype)
            weight = _at(share, children).masked_fill_(~exists[..., None], 0)
            of_children = _at(values.m[level + 1], children)
            total = torch.zeros_like(mixed)
            for k in range(children.shape[-1]):
                total.addcmul_(of_children[:, :, k], weight[:, :, k, :, None])
            mixed = torch.where(is_leaf[..., None, None], mixed, total)
        new = _known(mixed, index, path)
        values.m[level].flatten(0, 1).index_copy_(0, new.at, new.y)


def _router_back(run: _Run, level: int, by_logits: Tensor, by: dict[str, Tensor]) -> Tensor:
    """Go through the routers of a level's path blocks: the gradient of their outputs.

    Args:
        run: the path blocks.
        level: the level.
        by_logits: gradient of the routing logits [L * R, K, N].
        by: where the gradients of the routers go.

    Returns:
        [L * R, N, d].
    """
    y, cut, ranks = run.ys[level].flatten(0, 1), slice(*run.cuts[level]), by_logits.shape[1]
    normed, *moments = norm_keeping(y)
    by_logits_t = by_logits.to(y.dtype).transpose(1, 2)
    weight = run.pieces["router.weight"][cut, :, :ranks].to(y.dtype)
    by["router.weight"][cut, :, :ranks] = torch.bmm(normed.transpose(1, 2), by_logits_t)
    by["router.bias"][cut, :ranks] = by_logits.sum(2)
    return norm_back(torch.bmm(by_logits_t, weight.transpose(1, 2)), y, *moments)


def _fold_back(p: dict[str, Tensor], by_folded: Folded, by: dict[str, Tensor]) -> None:
    """Write gradients of blocks' pieces, given those of the folded weights."""
    f = Folded(*[t.float() for t in by_folded.tensors()])
    by["attention.out"].copy_(f.out)
    by["mlp.in_bias"].copy_(f.mlp_in_bias)
    by["mlp.out"].copy_(f.mlp_out)
    by["mlp.out_bias"].copy_(f.mlp_out_bias)
    folds = (
        ("norm1", "attention.qkv", f.qkv, f.qkv_bias),
        ("norm2", "mlp.in", f.mlp_in, f.mlp_in_bias),
    )
    for norm, name, by_product, by_bias in folds:
        gain, shift, weight = p[f"{norm}.weight"][..., None], p[f"{norm}.bias"], p[name]
        torch.sum(by_product * weight, -1, out=by[f"{norm}.weight"])
        torch.bmm(by_bias[:, None], weight.transpose(1, 2), out=by[f"{norm}.bias"][:, None])
        torch.mul(by_product, gain, out=by[name]).add_(
            torch.bmm(shift[..., None], by_bias[:, None])
        )
