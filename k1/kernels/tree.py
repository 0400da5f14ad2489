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
from k1.block import Folded
from k1.forward import Activations, Batch, Forest, Text, arithmetic, priors
from k1.graphs import Side
from k1.head import cross_entropy_gradients
from k1.kernels.backward import Factors, backward_inputs
from k1.kernels.block import Kept, run_blocks
from k1.kernels.embedding import embed_tokens, embedding_gradient, order_tokens
from k1.kernels.fold import fold_fused
from k1.kernels.mix import mix_frozen
from k1.kernels.norm import norm_backward, norm_forward
from k1.kernels.path import add_children, mix_backward
from k1.kernels.select import PathTable, find_inputs, list_paths
from k1.kernels.sums import sum_rows
from k1.kernels.weights import row_gradients
from k1.path import Gradients

_MANY = 25
"""So many blocks for each chosen one take as much longer, when they look whether they are to keep
their values, as it takes to run the chosen one again."""


class TreePass:
    """A forward pass through all trees, and as many backward passes as are asked for."""

    def __init__(
        self, forest: Forest, batch: Batch, text: Text, side: Side, shared: bool = True
    ) -> None:
        """Make ready what does not depend on the blocks to be chosen.

        Args:
            forest: the trees.
            batch: the windows.
            text: the same as the routers see them.
            side: a stream that is free; small things run there, beside large ones.
            shared: whether gradients of the shared part will be asked for.
        """
        self.forest, self.batch, self._side = forest, batch, side
        self._table: PathTable | None = None
        self.has_run = False
        lanes, last, kind = len(forest.rows), forest.levels[-1], arithmetic(forest.config)
        tokens, self._time = batch.inputs[0].numel(), batch.inputs.shape[2]
        pieces = forest.shared_layout.unpack(forest.shared)
        with side.fork():
            self._prior = priors(forest.router, forest.levels, text, forest.config, fused=True)
            self._head = pieces["head"].to(kind)
            self._targets = batch.targets.flatten(1).contiguous()
            self._share = torch.zeros(
                len(last.source) + last.first, tokens, device=forest.rows.device
            )
            self._ready = side.mark()
            vocab = forest.shared_layout.shapes[0][0]
            self._order = order_tokens(batch.inputs, vocab) if shared else None
        self._rows, self._depth = forest.rows.flatten(0, 1), forest.depth.flatten()
        self._folded = fold_fused(self._rows, forest.block_layout, kind, depth=self._depth)
        # All inputs and outputs in one tensor: the roots' inputs, then level by level.
        self._flow = torch.empty(
            last.first + lanes * last.width, tokens, forest.config.model.embed,
            dtype=kind, device=self._rows.device,
        )  # fmt: skip
        embed_tokens(pieces["embedding"], pieces["position"], batch.inputs, self._flow[:lanes])

    def run(self, table: PathTable | None = None) -> TreePass:
        """Run the trees.

        Args:
            table: the blocks whose gradients will be wanted, if they are known yet; else `choose`
                them afterwards.
        """
        kept = keep = None
        again = table is not None and len(self._flow) >= _MANY * len(table.row)
        if table is not None and not again:
            kept, keep = self._make_room(table), table.place
        ys = []
        for index in self.forest.levels:
            part = self._flow[index.first : index.first + len(index.source)]
            self._run(self._folded, index.source, index.row, part, None, kept, keep)
            ys.append(part.view(*index.alive.shape, *part.shape[1:]))
        self._side.wait(self._ready)
        mark = None
        if table is not None and again:
            room = self._make_room(table)
            with self._side.fork():  # the mixing waits for memory, these for their products
                self._run_chosen(self._folded, table.row, room, table.place, store=False)
                mark = self._side.mark()
        self.values = self._mix_up(ys, self._prior)
        self._side.wait(mark)
        self.has_run = self._fresh = True
        return self

    def choose(self, table: PathTable) -> TreePass:
        """Say which blocks' gradients will be wanted, after all have run: they run once more."""
        kept = self._make_room(table)
        self._run_chosen(self._folded, table.row, kept, table.place, store=False)
        return self

    def _make_room(self, table: PathTable) -> Kept:
        """Fold the chosen blocks' weights, and make room for what they keep."""
        self._table, self._weights = table, self._fold_chosen(table)
        model, tokens = self.forest.config.model, self._flow.shape[1]
        self._kept = Kept.empty(len(table.row), tokens, model.embed, model.feed_forward, self._flow)
        return self._kept

    @property
    def row(self) -> Tensor:
        """Arena rows of the chosen blocks: int64 [M], scratch rows where padded."""
        return self._known().row

    @property
    def place(self) -> Tensor:
        """Where in `row` an arena row stands: int64 [L * S], -1 if nowhere."""
        return self._known().place

    def _fold_chosen(self, table: PathTable) -> Folded:
        layout, kind = self.forest.block_layout, self._flow.dtype
        return fold_fused(self._rows, layout, kind, table.row, self._depth)

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

    def _run_chosen(
        self, folded: Folded, weight: Tensor, kept: Kept, keep: Tensor, store: bool
    ) -> None:
        """Run the chosen blocks once more, all at once, on the inputs that they had."""
        # Of outputs the leaves' alone: what others read in this launch has to stay as it is.
        source, target = find_inputs(self._known(), self.forest.levels, leaves=store)
        self._run(folded, source, weight, self._flow, target, kept, keep)

    def _mix_up(self, ys: list[Tensor], prior: list[Tensor]) -> Activations:
        forest = self.forest
        lanes, slots, _ = forest.rows.shape
        pieces = forest.block_layout.unpack(self._rows)
        m: list[Tensor] = [ys[-1]]
        share: list[Tensor] = []
        for parent, child in reversed(list(pairwise(forest.levels))):
            weight = bias = None
            if forest.config.model.router != "mean":
                cut = slice(parent.offset, parent.offset + parent.width)
                weight = pieces["router.weight"].unflatten(0, (lanes, slots))[:, cut]
                bias = pieces["router.bias"].unflatten(0, (lanes, slots))[:, cut]
            part = self._share[child.first : child.first + len(child.source)]
            part = part.view(lanes, child.width, -1)
            below = prior[child.level]
            mixed = mix_frozen(ys[parent.level], m[0], below, weight, bias, part, parent, child)
            m.insert(0, mixed)
            share.insert(0, part)
        return Activations(ys, m, prior, [prior[0], *share])

    def gradients(self) -> Gradients:
        """Gradients of the chosen blocks and of the shared part.

        Of the weights as they are now: between calls, culprits may change, and nothing else.
        Padded rows have anything for a gradient.
        """
        if not self._fresh:
            table = self._known()
            self._weights = self._fold_chosen(table)
            here = torch.arange(len(table.row), device=table.row.device)
            self._run_chosen(self._weights, here, self._kept, here, store=True)
            self.values = self._mix_up(self.values.y, self._prior)
        self._fresh = False
        layout, by_shared = self.forest.shared_layout, torch.empty_like(self.forest.shared)
        into = layout.unpack(by_shared)
        losses, grad, parts = self._at_roots(into["head"])
        self._side.keep(losses, parts)
        with self._side.fork():
            loss = losses.mean(1)
            at = layout.starts[layout.names.index("norm.weight")]  # the shift lies behind the gain
            sum_rows(parts, by_shared[:, at : at + parts.shape[2]])
        dx, factors, router = self._down_the_paths(grad)
        assert self._order is not None, "a pass with shared=False has no gradient of that part"
        self._side.keep(dx)
        with self._side.fork():
            by_input = dx[: len(losses)]
            embedding_gradient(self._order, by_input, into["embedding"])
            windows = by_input.view(*self.batch.inputs.shape[:2], -1)
            sum_rows(windows, into["position"].flatten(1))
        by_row, squares = self._by_row(factors, grad, router)
        self._side.join()
        return Gradients(loss, by_row, squares, by_shared)

    def squares(self) -> Tensor:
        """Squared norms [M] of the chosen blocks' gradients, and nothing else: once, after a run.

        Padded rows have anything.
        """
        _, grad, _ = self._at_roots(None)
        _, factors, router = self._down_the_paths(grad)
        return self._by_row(factors, grad, router)[1]

    def _known(self) -> PathTable:
        assert self._table is not None
        return self._table

    def _at_roots(self, by_head: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the tokens, gradients by the roots' values, parts of those of the norm.

        Args:
            by_head: where the head's gradient goes, if it is wanted.

        Returns:
            float32 [L, N]; [M, N, d], of which the first L are written; [L, programs, 2 * d].
        """
        lanes, tokens = len(self.forest.rows), self._flow.shape[1]
        grad = self._flow.new_empty(len(self.row), *self._flow.shape[1:])
        pieces = self.forest.shared_layout.unpack(self.forest.shared)
        gain, shift = pieces["norm.weight"], pieces["norm.bias"]
        hidden, normed, inverse = norm_forward(self.values.output.contiguous(), gain, shift)
        losses, by_hidden, _ = cross_entropy_gradients(
            hidden, self._head, self._targets, True, by_head is not None, 1 / tokens, by_head
        )
        assert by_hidden is not None
        return losses, grad, norm_backward(by_hidden, normed, inverse, gain, grad[:lanes])

    def _down_the_paths(self, grad: Tensor) -> tuple[Tensor, Factors, tuple[Tensor, Tensor] | None]:
        """From the roots' gradients, in `grad` [M, N, d], to those of all chosen blocks.

        Returns:
            Gradients of the blocks' inputs [M, N, d], and what those of their weights and of their
            routers are products of. Gradients of the blocks' own outputs are left in `grad`.
        """
        table, forest, config = self._known(), self.forest, self.forest.config
        router = None
        if config.model.router != "mean":
            by_logits = grad.new_empty(*grad.shape[:2], config.model.max_children)
            router = torch.empty_like(grad), by_logits
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
                (table.row[cut], slots),
            )
        return dx, factors, router

    def _by_row(
        self, factors: Factors, grad: Tensor, router: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the chosen blocks' rows [M, P], and the squared norm of each [M]."""
        table, forest = self._known(), self.forest
        inner = table.cut(len(forest.levels) - 1).start
        return row_gradients(
            self._kept, factors, grad, router, self._rows, table.row, forest.rows.shape[1], inner,
            forest.block_layout,
        )  # fmt: skip


def all_blocks(forest: Forest, leaves: Leaves) -> PathTable:
    """List every living block."""
    return list_paths(leaves.depth > 0, leaves, tuple(index.width for index in forest.levels))


def chosen_blocks(forest: Forest, leaves: Leaves, on_path: Tensor) -> PathTable:
    """List the blocks on the paths (bool [L, S]): at most one path for each leaf looked at."""
    counts = (min(leaves.most, index.width) for index in forest.levels)
    return list_paths(on_path, leaves, (1, *list(counts)[1:]))
