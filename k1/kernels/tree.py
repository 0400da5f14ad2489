"""Passes through whole trees by the kernels: all blocks forward, chosen blocks backward.

The forward pass keeps, for the chosen blocks alone, what their gradients need. The backward pass is
that of `k1.path.PathPass`, written out: down the tree through the mixing, then up the paths
through the blocks. With all blocks chosen it is the full gradient.

Shapes: L lanes, S rows of a lane's arena, N tokens of a batch, T of a window, d = embed, M chosen
blocks, padding included.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from k1.attribution import Leaves
from k1.block import Folded, unfold
from k1.forward import Activations, Batch, Forest, Text, arithmetic, embed, priors
from k1.graphs import Side
from k1.head import cross_entropy_gradients
from k1.kernels.block import Factors, Kept, backward_inputs, backward_weights, run_blocks
from k1.kernels.fold import fold_fused
from k1.kernels.mix import mix_frozen
from k1.kernels.norm import norm_backward, norm_forward
from k1.kernels.path import add_children, mix_backward
from k1.kernels.select import PathTable, list_paths

_ROUTER = ("router.weight", "router.bias")


class TreePass:
    """One forward pass through all trees, and as many backward passes as are asked for."""

    def __init__(
        self,
        forest: Forest,
        batch: Batch,
        text: Text,
        side: Side,
        table: PathTable | None = None,
    ) -> None:
        """Run the trees on a batch.

        Args:
            forest: the trees.
            batch: the windows.
            text: the same as the routers see them.
            side: a stream that is free; small things run there, beside large ones.
            table: the blocks whose gradients will be wanted, if they are known yet and many; else
                `choose` them afterwards.
        """
        self.forest, self.batch, self._side, self._table = forest, batch, side, table
        with side.fork():
            prior = priors(forest.router, forest.levels, text, forest.config, fused=True)
        lanes = len(forest.rows)
        d = forest.config.model.embed
        tokens, self._time = batch.inputs[0].numel(), batch.inputs.shape[2]
        self._rows = forest.rows.flatten(0, 1)
        pieces, folded = self._read(self._rows)
        shared = forest.shared_layout.unpack(forest.shared)
        last = forest.levels[-1]
        # All inputs and outputs in one tensor: the roots' inputs, then level by level.
        self._flow = torch.empty(
            last.first + lanes * last.width, tokens, d,
            dtype=arithmetic(forest.config), device=self._rows.device,
        )  # fmt: skip
        self._flow[:lanes] = embed(shared, batch.inputs).view(lanes, tokens, d)
        self._folded = folded
        kept = None
        if table is not None:
            kept = self._make_room(table)
        ys = []
        for index in forest.levels:
            part = self._flow[index.first : index.first + lanes * index.width]
            keep = None if table is None else table.place
            self._run(folded, index.source, index.row, part, None, kept, keep)
            ys.append(part.view(lanes, index.width, tokens, d))
        side.join()
        self.values = self._mix_up(ys, prior, pieces)
        self._fresh = True

    def choose(self, table: PathTable) -> TreePass:
        """Say which blocks' gradients will be wanted, after all have run."""
        self._table = table
        self._make_room(table)
        self._run_chosen(store=False)
        return self

    def _make_room(self, table: PathTable) -> Kept:
        """Gather the chosen blocks' weights, and make room for what they keep."""
        model, tokens = self.forest.config.model, self._flow.shape[1]
        self._weights = Folded(*[t.index_select(0, table.row) for t in self._folded.tensors()])
        self._kept = Kept.empty(len(table.row), tokens, model.embed, model.feed_forward, self._flow)
        return self._kept

    @property
    def row(self) -> Tensor:
        """Arena rows of the chosen blocks: int64 [M], scratch rows where padded."""
        assert self._table is not None
        return self._table.row

    @property
    def place(self) -> Tensor:
        """Where in `row` an arena row stands: int64 [L * S], -1 if nowhere."""
        assert self._table is not None
        return self._table.place

    def _read(self, rows: Tensor) -> tuple[dict[str, Tensor], Folded]:
        """Pieces and folded weights of flattened arena rows."""
        layout = self.forest.block_layout
        return layout.unpack(rows), fold_fused(rows, layout, arithmetic(self.forest.config))

    def _run(
        self,
        folded: Folded,
        source: Tensor,
        weight: Tensor,
        out: Tensor,
        target: Tensor | None,
        kept: Kept | None,
        keep: Tensor | None,
    ) -> None:
        heads = self.forest.config.model.heads
        run_blocks(folded, self._flow, source, weight, self._time, heads, kept, keep, out, target)

    def _run_chosen(self, store: bool) -> None:
        """Run the chosen blocks once more, all at once, on the inputs that they had."""
        assert self._table is not None
        levels, row = self.forest.levels, self._table.row
        index = torch.cat([i.row for i in levels])
        source = torch.full((len(self._rows),), -1, dtype=torch.int64, device=row.device)
        place = source.scatter(0, index, torch.arange(levels[0].first, len(self._flow),
                                                      device=row.device))  # fmt: skip
        source = source.scatter(0, index, torch.cat([i.source for i in levels]))
        here = torch.arange(len(row), device=row.device)
        target = torch.full_like(row, -1)
        if store:
            # Leaves alone: what others read in this launch has to stay as it is.
            leaf = torch.zeros_like(place, dtype=torch.bool)
            leaf = leaf.scatter(0, index, torch.cat([i.is_leaf.flatten() for i in levels]))
            target = torch.where(leaf[row], place[row], target)
        self._run(self._weights, source[row], here, self._flow, target, self._kept, here)

    def _mix_up(
        self, ys: list[Tensor], prior: list[Tensor], pieces: dict[str, Tensor]
    ) -> Activations:
        forest = self.forest
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

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [L], gradients [M, P] of the chosen blocks and [L, Q] of the shared part.

        Of the weights as they are now: between calls, culprits may change, and nothing else.
        Padded rows have anything for a gradient.
        """
        table, forest = self._table, self.forest
        assert table is not None
        pieces = forest.block_layout.unpack(self._rows.index_select(0, table.row))
        if not self._fresh:
            self._weights = self._read(self._rows.index_select(0, table.row))[1]
            self._run_chosen(store=True)
            all_pieces = forest.block_layout.unpack(self._rows)
            self.values = self._mix_up(self.values.y, self.values.prior, all_pieces)
        self._fresh = False
        lanes, tokens = len(forest.rows), self._flow.shape[1]
        grad = torch.empty(len(table.row), *self._flow.shape[1:], dtype=self._flow.dtype,
                           device=self._flow.device)  # fmt: skip
        shared = forest.shared_layout.unpack(forest.shared)
        gain, shift = shared["norm.weight"], shared["norm.bias"]
        hidden, normed, inverse = norm_forward(self.values.output.contiguous(), gain, shift)
        targets = self.batch.targets.flatten(1)
        losses, by_hidden, by_head = cross_entropy_gradients(hidden, shared["head"], targets)
        assert by_hidden is not None and by_head is not None
        by_gain, by_shift = norm_backward(
            by_hidden, normed, inverse, gain, 1 / tokens, grad[:lanes]
        )
        by_row, by_token, by_position = self._backward(grad, pieces)
        by_shared = {
            "embedding": by_token,
            "position": by_position,
            "norm.weight": by_gain,
            "norm.bias": by_shift,
            "head": by_head.mul_(1 / tokens),
        }
        return losses.mean(1), by_row, forest.shared_layout.pack(by_shared)

    def _backward(self, grad: Tensor, pieces: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """From the roots' gradients, in `grad` [M, N, d], to rows [M, P], tokens and positions."""
        table, forest, config = self._table, self.forest, self.forest.config
        assert table is not None
        tokens = grad.shape[1]
        router = None
        if config.model.router != "mean":
            ranks = config.model.max_children
            router = torch.empty_like(grad), grad.new_empty(len(grad), tokens, ranks)
        for parent, child in pairwise(forest.levels):
            y, m = self.values.y[parent.level], self.values.m[child.level]
            prior = self.values.prior[child.level]
            mix_backward(
                table, grad, y, m, prior, self._rows, forest.block_layout, router, parent, child
            )
        factors, dx = Factors.empty(self._kept), torch.empty_like(grad)
        slots = forest.rows.shape[1]
        for index in reversed(forest.levels):
            cut = table.cut(index.level)
            if index.level + 1 < len(forest.levels):
                add_children(table, grad, dx, slots, index, forest.levels[index.level + 1])
            backward_inputs(
                Folded(*[t[cut] for t in self._weights.tensors()]),
                self._kept.rows(cut.start, cut.stop),
                grad[cut],
                factors.rows(cut.start, cut.stop),
                dx[cut],
                self._time,
                config.model.heads,
            )
        with self._side.fork():
            by_token, by_position = self._by_embedding(dx[: len(forest.rows)].float())
        by_piece = unfold(pieces, backward_weights(self._kept, factors, grad))
        by_piece |= self._by_router(router, pieces)
        by_row = forest.block_layout.pack(by_piece)
        self._side.join()
        return by_row, by_token, by_position

    def _by_router(
        self, router: tuple[Tensor, Tensor] | None, pieces: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients of the chosen blocks' routers; blocks of the last level route nothing."""
        assert self._table is not None
        weight, bias = (torch.zeros_like(pieces[name]) for name in _ROUTER)
        if router is not None and len(self.forest.levels) > 1:
            inner = self._table.cut(len(self.forest.levels) - 1).start
            normed, by_logits = (t[:inner] for t in router)
            weight[:inner] = torch.bmm(normed.transpose(1, 2), by_logits)
            bias[:inner] = by_logits.sum(1, dtype=torch.float32)
        return {"router.weight": weight, "router.bias": bias}

    def _by_embedding(self, by_input: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of embedding [L, V, d] and positions [L, T, d], given the roots' inputs'."""
        lanes, _, d = by_input.shape
        vocab = self.forest.shared_layout.shapes[0][0]
        inputs = self.batch.inputs
        by_position = by_input.view(lanes, *inputs.shape[1:], d).sum(1)
        context = self.forest.config.model.context
        if inputs.shape[2] < context:
            by_position = torch.nn.functional.pad(by_position, (0, 0, 0, context - inputs.shape[2]))
        index = inputs.flatten(1) + torch.arange(lanes, device=by_input.device)[:, None] * vocab
        by_token = torch.ops.aten.embedding_dense_backward(
            by_input.flatten(0, 1), index.flatten(), lanes * vocab, -1, False
        )
        return by_token.view(lanes, vocab, d), by_position


def all_blocks(forest: Forest, leaves: Leaves) -> PathTable:
    """List every living block."""
    return list_paths(leaves.depth > 0, leaves, tuple(index.width for index in forest.levels))


def chosen_blocks(forest: Forest, leaves: Leaves, on_path: Tensor) -> PathTable:
    """List the blocks on the paths (bool [L, S]): at most one path for each leaf looked at."""
    counts = (min(leaves.most, index.width) for index in forest.levels)
    return list_paths(on_path, leaves, (1, *list(counts)[1:]))
