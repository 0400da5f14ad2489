"""The training step: forward, attribution, and an update of the chosen paths only."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection, SelectionRules, responsibilities, select_paths
from k1.backend import choose_backend
from k1.evidence import add_counts, rotate
from k1.forward import (
    LN2,
    Activations,
    Batch,
    Forest,
    Text,
    forward,
    lane_loss,
    read_text,
    token_losses,
)
from k1.graphs import StepGraphs
from k1.optimizer import Rows, adamw, clip_factor
from k1.path import PathIndex, PathPass, as_leaf, index_paths
from k1.rng import STREAM_EXPLORE, random_uniform
from k1.sampling import TokenStore

if TYPE_CHECKING:
    from k1.kernels.tree import FusedPathPass

_ROWS = ("weight", "first", "second", "count")
_SHARED_ROWS = ("shared", "shared_first", "shared_second", "shared_count")
_MEMORY = 0.95
"""Decay of the running means of loss and responsibility."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, as tensors over lanes."""

    loss: Tensor
    """float32 [L]: nats per token before the update."""
    selection: Selection
    skipped: Tensor
    """bool [L]: a gradient was not finite, so nothing was updated."""


class Engine:
    """Trains and evaluates ranges of lanes of an arena."""

    def __init__(
        self,
        arena: Arena,
        store: TokenStore,
        lane_chunk: int | None = None,
        *,
        fused: bool | None = None,
        graph: bool | None = None,
    ) -> None:
        """Bind an arena to its text.

        Args:
            arena: the lanes.
            store: the text, on the arena's device.
            lane_chunk: lanes per pass: all on a GPU; few on a CPU, whose cache they should fit.
            fused: whether kernels run the blocks; by default where they fit.
            graph: whether steps are recorded as CUDA graphs; by default on CUDA.
        """
        self.arena = arena
        self.store = store
        self.mode = arena.config.update.mode
        on_gpu = arena.device.type == "cuda"
        self.chunk = lane_chunk or (arena.lanes if on_gpu else 2)
        self.backend = choose_backend(arena.config, arena.device, fused)
        self.graphs = StepGraphs() if (on_gpu if graph is None else graph) else None

    def _each_chunk(self, start: int, stop: int, work: Callable[[int, int], None]) -> None:
        """Do work on lanes start..stop, chunk by chunk.

        On a CPU the chunks run side by side, a thread each: lanes share nothing, so the result
        does not depend on their timing, and two threads that work alone are much faster than two
        that meet at every small product. (`k1.cli.prepare_torch` gives each product one thread.)
        """
        chunks = [(i, min(stop, i + self.chunk)) for i in range(start, stop, self.chunk)]
        if len(chunks) == 1 or self.arena.device.type != "cpu":
            for low, high in chunks:
                work(low, high)
            return
        self.arena.prepare(chunks)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for future in [pool.submit(work, low, high) for low, high in chunks]:
                future.result()

    def train(
        self,
        start: int,
        stop: int,
        steps: int,
        factor: Callable[[int], float] | None = None,
    ) -> None:
        """Train lanes start..stop for `steps` steps each.

        Args:
            start: first lane.
            stop: one past the last lane.
            steps: how many steps.
            factor: learning-rate factor of step 0, 1, ...; kept as it is by default.
        """

        def work(low: int, high: int) -> None:
            for i in range(steps):
                if factor is not None:
                    self.arena["lr_factor"][low:high] = factor(i)
                self.step(low, high)

        self._each_chunk(start, stop, work)

    def step(self, start: int, stop: int, batch: Batch | None = None) -> StepResult:
        """Make one training step in lanes start..stop.

        Args:
            start: first lane.
            stop: one past the last lane.
            batch: the windows; by default the next ones of the lanes' streams.

        Returns:
            What the step did, valid until the next step.
        """
        a, config = self.arena, self.arena.config
        for lane in range(start, stop):
            if a.host_step[lane] and a.host_step[lane] % config.evidence.window == 0:
                rotate(a["evidence"][lane])
        every = config.update.attribution_every
        due = any(a.host_step[lane] % every == 0 for lane in range(start, stop))
        work = partial(self._step, start, stop, due, batch)
        if self.graphs is None or batch is not None:
            result = work()
        else:
            shape = tuple((i.width, i.children.shape[-1]) for i in a.index(start, stop))
            result = self.graphs.run((start, stop, due, shape, a.leaves(start, stop).most), work)
        for lane in range(start, stop):
            a.host_step[lane] += 1
        return result

    @torch.enable_grad()
    def _step(self, start: int, stop: int, due: bool, batch: Batch | None) -> StepResult:
        """Do a step on the device, without waiting for it."""
        a, lanes = self.arena, slice(start, stop)
        if batch is None:
            seed, cursor = a["data_seed"][lanes], a["data_cursor"][lanes]
            windows = a.config.train.batch
            batch = self.store.sample("train", seed, cursor, a["mix"][lanes], windows)
        text = read_text(batch, a.config)
        if self.mode == "sparse":
            result = self._sparse(start, stop, batch, text, due)
        else:
            result = self._full(start, stop, batch, text)
        self._book_keeping(start, stop, result)
        return result

    # -- the three modes -------------------------------------------------------------------------

    def gradients(
        self, start: int, stop: int, batch: Batch, text: Text
    ) -> tuple[Tensor, list[Tensor], Tensor, Activations]:
        """Run a full backward pass: loss [L], gradients [L, W, P] by level and [L, Q], values."""
        a = self.arena
        weights = a.weights(start, stop)
        weights = replace(
            weights,
            levels=[as_leaf(w) for w in weights.levels],
            shared=as_leaf(weights.shared),
        )
        levels, router = a.index(start, stop), a.router(start, stop)
        # The exact mode is the reference, and counts by shares that the kernels leave out.
        fused = self.backend.trained and self.mode != "exact"
        done = forward(weights, router, levels, batch, text, a.config, fused)
        loss = lane_loss(weights, done.output, batch)
        grads = torch.autograd.grad(
            loss.sum(), [*weights.levels, weights.shared], allow_unused=True, materialize_grads=True
        )
        return loss.detach(), list(grads[:-1]), grads[-1], done

    def _full(self, start: int, stop: int, batch: Batch, text: Text) -> StepResult:
        """Dense or exact: every block's gradient is computed."""
        a, config = self.arena, self.arena.config
        levels = a.index(start, stop)
        loss, grads, shared_grad, done = self.gradients(start, stop, batch, text)
        measured = responsibilities(grads, levels, a.scratch + 1)
        self._remember(start, stop, measured)
        if self.mode == "dense":
            alive = torch.zeros_like(measured, dtype=torch.bool)
            for index in levels:
                alive[:, index.offset : index.offset + index.width] = index.alive
            none = torch.full_like(alive[:, :1], -1, dtype=torch.int64)
            selection = Selection(alive.float(), alive, none)
        else:
            selection = self._select(start, stop, measured)
        squares = torch.where(selection.scale > 0, measured, 0.0).square().sum(1)
        factor, fine = self._clip(start, stop, squares, shared_grad)
        for index, grad in zip(levels, grads, strict=True):
            cut = slice(index.offset, index.offset + index.width)
            self._update(start, stop, cut, grad, selection.scale[:, cut], factor, fine)
        self._update_shared(start, stop, shared_grad, factor, fine)
        if config.model.router == "evidence" and self.mode != "dense":
            most = a.leaves(start, stop).most
            paths = index_paths(selection.on_path, levels, most, a.scratch)
            self._count(start, stop, paths, selection, done, text, fine)
        return StepResult(loss, selection, ~fine)

    def _sparse(self, start: int, stop: int, batch: Batch, text: Text, due: bool) -> StepResult:
        """Attribution on a probe now and then; gradients for the chosen paths only."""
        a, config = self.arena, self.arena.config
        if due:
            probe = batch.head(max(1, round(batch.inputs.shape[1] * config.update.probe_fraction)))
            _, grads, _, _ = self.gradients(start, stop, probe, read_text(probe, config))
            measured = responsibilities(grads, a.index(start, stop), a.scratch + 1)
            every = config.update.attribution_every
            self._remember(start, stop, measured, a["step"][start:stop] % every == 0)
        selection = self._select(start, stop, a["responsibility"][start:stop])
        return self.path_step(start, stop, batch, text, selection)

    def path_pass(
        self, start: int, stop: int, batch: Batch, text: Text, selection: Selection
    ) -> PathPass | FusedPathPass:
        """Run everything forward; the result has the gradients of the selected paths."""
        a = self.arena
        forest, most = a.forest(start, stop), a.leaves(start, stop).most
        paths = index_paths(selection.on_path, forest.levels, most, a.scratch)
        if self.backend.trained:
            from k1.kernels.tree import FusedPathPass

            return FusedPathPass(forest, batch, text, paths)
        return PathPass(forest, batch, text, paths)

    def path_step(
        self, start: int, stop: int, batch: Batch, text: Text, selection: Selection
    ) -> StepResult:
        """Update the selected paths from their own gradients.

        With `inner_steps`, the culprits move several times on the batch, and all else with the last
        of these. That is exact for the culprits: nothing but the mixing depends on a leaf.
        """
        config = self.arena.config
        done = self.path_pass(start, stop, batch, text, selection)
        slots = torch.cat([path.slot for path in done.paths], dim=1)
        valid = torch.cat([path.valid for path in done.paths], dim=1)
        scale = selection.scale.gather(1, slots) * valid
        leaf = (slots[..., None] == selection.culprits[:, None]).any(-1)
        loss = all_fine = None
        for turn in range(config.update.inner_steps):
            last = turn == config.update.inner_steps - 1
            now, grads, shared_grad = done.gradients()
            moving = scale if last else torch.where(leaf, scale, 0.0)
            grad = torch.cat(grads, dim=1)
            norms = torch.linalg.vector_norm(grad, dim=-1)
            squares = torch.where(moving > 0, norms, 0.0).square().sum(1)
            factor, fine = self._clip(start, stop, squares, shared_grad if last else None)
            self._update(start, stop, slots, grad, moving, factor, fine)
            if last:
                self._update_shared(start, stop, shared_grad, factor, fine)
            loss = now if loss is None else loss
            all_fine = fine if all_fine is None else all_fine & fine
        assert loss is not None and all_fine is not None
        if config.model.router == "evidence":
            self._count(start, stop, done.paths, selection, done.values, text, all_fine)
        return StepResult(loss, selection, ~all_fine)

    # -- parts -----------------------------------------------------------------------------------

    def _remember(self, start: int, stop: int, measured: Tensor, due: Tensor | None = None) -> None:
        """Store responsibilities (of the lanes that are due, bool [L])."""
        a = self.arena
        last, mean = a["responsibility"][start:stop], a["mean_responsibility"][start:stop]
        running = torch.where(mean == 0, measured, mean * _MEMORY + measured * (1 - _MEMORY))
        if due is not None:
            measured = torch.where(due[:, None], measured, last)
            running = torch.where(due[:, None], running, mean)
        finite = torch.isfinite(measured).all(1, keepdim=True)
        a["responsibility"][start:stop] = torch.where(finite, measured, last)
        a["mean_responsibility"][start:stop] = torch.where(finite, running, mean)

    def _select(self, start: int, stop: int, measured: Tensor) -> Selection:
        a, update = self.arena, self.arena.config.update
        rules = SelectionRules(
            a["top_k"][start:stop],
            a["cooldown"][start:stop],
            a["exploration"][start:stop],
            update.scales,
            update.root_scale,
            update.min_share,
        )
        step = a["step"][start:stop]
        uniform = random_uniform(
            a["data_seed"][start:stop], STREAM_EXPLORE, step, measured.shape[1] + 1
        )
        last = a["last_culprit"][start:stop]
        return select_paths(measured, last, step, uniform, a.leaves(start, stop), rules)

    def _clip(
        self, start: int, stop: int, squares: Tensor, shared_grad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Clip factor [L] and whether all gradients that matter are finite [L]."""
        if shared_grad is not None and self.arena.config.update.shared_scale > 0:
            squares = squares + shared_grad.square().sum(1)
        return clip_factor(squares, self.arena.config.optimizer.clip), torch.isfinite(squares)

    def _rate(self, start: int, stop: int) -> Tensor:
        """Learning rate [L] of this step at displacement scale 1."""
        a, warmup = self.arena, self.arena.config.optimizer.warmup
        rise = ((a["step"][start:stop] + 1) / max(1, warmup)).clamp(max=1.0)
        return a["lr"][start:stop] * a["lr_factor"][start:stop] * rise

    def _update(
        self,
        start: int,
        stop: int,
        where: slice | Tensor,
        grad: Tensor,
        scale: Tensor,
        factor: Tensor,
        fine: Tensor,
    ) -> None:
        """Make the optimizer step of some slots: a slice of them, or int64 [L, R]."""
        a = self.arena
        on = (scale > 0) & fine[:, None]
        rate = self._rate(start, stop)[:, None] * scale
        if self.backend.frozen:
            from k1.kernels.adamw import adamw_rows

            if isinstance(where, slice):
                slots = torch.arange(where.start, where.stop, device=a.device)
                where = slots.expand(stop - start, -1)
            weight, first, second, count = (a[name][start:stop] for name in _ROWS)
            adamw_rows(
                weight, first, second, count, where, grad, rate, on, factor, a.config.optimizer
            )
            return
        if isinstance(where, slice):
            target: tuple = (slice(start, stop), where)
        else:
            target = (torch.arange(start, stop, device=a.device)[:, None], where)
        old = Rows(*(a[name][target] for name in _ROWS))
        new = adamw(old, grad * factor[:, None, None], rate, on, a.config.optimizer)
        for name, value in zip(_ROWS, vars(new).values(), strict=True):
            a[name][target] = value

    def _update_shared(
        self, start: int, stop: int, grad: Tensor, factor: Tensor, fine: Tensor
    ) -> None:
        a, scale = self.arena, self.arena.config.update.shared_scale
        on = fine & (scale > 0)
        rate = self._rate(start, stop) * scale
        weight, first, second, count = (a[name][start:stop] for name in _SHARED_ROWS)
        if self.backend.frozen:
            from k1.kernels.adamw import adamw_shared

            adamw_shared(weight, first, second, count, grad, rate, on, factor, a.config.optimizer)
            return
        old = Rows(weight, first, second, count)
        new = adamw(old, grad * factor[:, None], rate, on, a.config.optimizer)
        for name, value in zip(_SHARED_ROWS, vars(new).values(), strict=True):
            a[name][start:stop] = value

    def _count(
        self,
        start: int,
        stop: int,
        paths: list[PathIndex],
        selection: Selection,
        done: Activations,
        text: Text,
        fine: Tensor,
    ) -> None:
        """Add the batch's bigrams to the path blocks, by their share of the routing."""
        if len(paths) == 1:
            return  # a root without children routes nothing
        slots, shares = [], []
        for weight, path in zip(done.share[1:], paths[1:], strict=True):
            index = path.position[..., None].expand(-1, -1, weight.shape[-1])
            share = weight.detach().gather(1, index)
            updated = selection.scale.gather(1, path.slot) > 0
            on = path.valid & updated & fine[:, None]
            tokens = text.bigram[0].numel()
            slots.append(path.slot)
            # Not a product: a share may be NaN in a step that is skipped.
            shares.append(torch.where(on[..., None], share, 0.0).expand(-1, -1, tokens))
        count = add_counts
        if self.backend.frozen:
            from k1.kernels.evidence import add_counts_fused as count
        count(
            self.arena["evidence"][start:stop],
            torch.cat(slots, 1),
            torch.cat(shares, 1),
            text.bigram,
            text.context,
            text.valid,
            self.arena.config.evidence,
        )

    def _book_keeping(self, start: int, stop: int, result: StepResult) -> None:
        a, lanes = self.arena, slice(start, stop)
        step, fine = a["step"][lanes], ~result.skipped
        updated = (result.selection.scale > 0) & fine[:, None]
        a["updates"][lanes] += updated
        a["last_update"][lanes] = torch.where(updated, step[:, None], a["last_update"][lanes])
        culprits = result.selection.culprits
        slot = torch.where((culprits >= 0) & fine[:, None], culprits, a.scratch)
        hit = torch.zeros_like(updated).scatter_(1, slot, True)
        hit[:, a.scratch] = False
        a["visits"][lanes] += hit
        a["last_culprit"][lanes] = torch.where(hit, step[:, None], a["last_culprit"][lanes])
        a["blocks_updated"][lanes] += updated[:, 1:].sum(1)
        loss = a["loss"][lanes]
        mean = torch.where(loss == 0, result.loss, loss * _MEMORY + result.loss * (1 - _MEMORY))
        a["loss"][lanes] = torch.where(fine, mean, loss)
        a["skipped"][lanes] += result.skipped
        a["step"][lanes] += 1
        a["data_cursor"][lanes] += 1

    # -- evaluation ------------------------------------------------------------------------------

    def bits_per_byte(self, start: int, stop: int, batch: Batch) -> Tensor:
        """Bits per byte of lanes start..stop on a batch [L or 1, B, T]: float64 [L]."""
        out = torch.zeros(stop - start, dtype=torch.float64, device=self.arena.device)

        def work(low: int, high: int) -> None:
            part = slice(low - start, high - start)
            shared = batch.inputs.shape[0] == 1
            own = batch.map(partial(_repeat, lanes=high - low) if shared else itemgetter(part))
            out[part] = self._measure(low, high, own)

        self._each_chunk(start, stop, work)
        return out

    @torch.no_grad()
    def _measure(self, start: int, stop: int, batch: Batch) -> Tensor:
        a, size = self.arena, self.arena.config.train.batch
        forest = a.forest(start, stop)
        pieces = forest.shared_layout.unpack(forest.shared)
        nats, length = torch.zeros(2, stop - start, dtype=torch.float64, device=a.device)
        for first in range(0, batch.inputs.shape[1], size):
            part = batch.map(itemgetter((slice(None), slice(first, first + size))))
            nats += token_losses(pieces, self._output(forest, part), part.targets).double().sum(1)
            length += self.store.bytes_in(part.targets)
        return nats / LN2 / length

    def _output(self, forest: Forest, batch: Batch) -> Tensor:
        """The trees' outputs [L, N, d] on a batch."""
        text = read_text(batch, forest.config)
        if self.backend.frozen:
            from k1.kernels.tree import forward_frozen

            return forward_frozen(forest, batch, text)[0].output
        weights, router = forest.weights(), forest.router
        return forward(weights, router, forest.levels, batch, text, forest.config).output


def _repeat(tensor: Tensor, lanes: int) -> Tensor:
    return tensor.expand(lanes, *tensor.shape[1:])
