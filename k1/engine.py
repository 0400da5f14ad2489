"""The training step: forward, attribution, and an update of the chosen paths only."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection, SelectionRules, responsibilities, select_paths
from k1.evidence import add_counts, rotate
from k1.forward import LN2, Activations, Batch, Text, forward, lane_loss, read_text, token_losses
from k1.optimizer import Rows, adamw, clip_factor
from k1.path import PathIndex, index_paths, path_loss
from k1.rng import STREAM_EXPLORE, random_uniform
from k1.sampling import TokenStore

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

    def __init__(self, arena: Arena, store: TokenStore, lane_chunk: int | None = None) -> None:
        """Bind an arena to its text.

        Args:
            arena: the lanes.
            store: the text, on the arena's device.
            lane_chunk: lanes per pass: all on a GPU; few on a CPU, whose cache they should fit.
        """
        self.arena = arena
        self.store = store
        self.mode = arena.config.update.mode
        self.chunk = lane_chunk or (arena.lanes if arena.device.type == "cuda" else 2)

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

    @torch.enable_grad()
    def step(self, start: int, stop: int, batch: Batch | None = None) -> StepResult:
        """Make one training step in lanes start..stop, on the next batch of their streams."""
        a, config = self.arena, self.arena.config
        lanes = slice(start, stop)
        for lane in range(start, stop):
            if a.host_step[lane] and a.host_step[lane] % config.evidence.window == 0:
                rotate(a["evidence"][lane])
        if batch is None:
            seed, cursor = a["data_seed"][lanes], a["data_cursor"][lanes]
            batch = self.store.sample("train", seed, cursor, a["mix"][lanes], config.train.batch)
        text = read_text(batch, config)
        run = self._sparse if self.mode == "sparse" else self._full
        result = run(start, stop, batch, text)
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
            levels=[_leaf(w) for w in weights.levels],
            shared=_leaf(weights.shared),
        )
        levels = a.index(start, stop)
        done = forward(weights, a.router(start, stop), levels, batch, text, a.config)
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
        self._remember(start, stop, measured, None)
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
            self._update(
                start, stop, cut, grad * factor[:, None, None], selection.scale[:, cut], fine
            )
        self._update_shared(start, stop, shared_grad * factor[:, None], fine)
        if config.model.router == "evidence" and self.mode != "dense":
            limit = max(a.host_top_k[start:stop]) + len(levels)
            paths = index_paths(selection.on_path, levels, limit, a.scratch)
            self._count(start, stop, paths, selection, done, text, fine)
        return StepResult(loss, selection, ~fine)

    def _sparse(self, start: int, stop: int, batch: Batch, text: Text) -> StepResult:
        """Attribution on a probe now and then; gradients for the chosen paths only."""
        a, config = self.arena, self.arena.config
        levels = a.index(start, stop)
        every = config.update.attribution_every
        due = [a.host_step[lane] % every == 0 for lane in range(start, stop)]
        if any(due):
            probe = batch.head(max(1, round(batch.inputs.shape[1] * config.update.probe_fraction)))
            _, grads, _, _ = self.gradients(start, stop, probe, read_text(probe, config))
            measured = responsibilities(grads, levels, a.scratch + 1)
            self._remember(start, stop, measured, None if all(due) else due)
        selection = self._select(start, stop, a["responsibility"][start:stop])
        return self.path_step(start, stop, batch, text, selection)

    def path_gradients(
        self, start: int, stop: int, batch: Batch, text: Text, selection: Selection
    ) -> tuple[Tensor, list[Tensor], Tensor, list[PathIndex], Activations]:
        """Run everything forward and the selected paths backward.

        Returns:
            Loss [L], gradients [L, R, P] of each level's path blocks, the shared gradient [L, Q],
            the paths, and the frozen activations.
        """
        a = self.arena
        levels = a.index(start, stop)
        with torch.no_grad():
            weights = a.weights(start, stop)
            frozen = forward(weights, a.router(start, stop), levels, batch, text, a.config)
        limit = max(a.host_top_k[start:stop]) + len(levels)
        paths = index_paths(selection.on_path, levels, limit, a.scratch)
        lane = torch.arange(start, stop, device=a.device)[:, None]
        rows = [a["weight"][lane, path.slot].requires_grad_() for path in paths]
        shared = _leaf(a["shared"][start:stop])
        loss = path_loss(
            rows, replace(weights, shared=shared), frozen, paths, levels, batch, a.config
        )
        grads = torch.autograd.grad(
            loss.sum(), [*rows, shared], allow_unused=True, materialize_grads=True
        )
        return loss.detach(), list(grads[:-1]), grads[-1], paths, frozen

    def path_step(
        self, start: int, stop: int, batch: Batch, text: Text, selection: Selection
    ) -> StepResult:
        """Update the selected paths from their own gradients."""
        a = self.arena
        loss, grads, shared_grad, paths, frozen = self.path_gradients(
            start, stop, batch, text, selection
        )
        slots = torch.cat([path.slot for path in paths], dim=1)
        grad = torch.cat(grads, dim=1)
        scale = selection.scale.gather(1, slots) * torch.cat([p.valid for p in paths], dim=1)
        norms = torch.linalg.vector_norm(grad, dim=-1)
        squares = torch.where(scale > 0, norms, 0.0).square().sum(1)
        factor, fine = self._clip(start, stop, squares, shared_grad)
        self._update(start, stop, slots, grad * factor[:, None, None], scale, fine)
        self._update_shared(start, stop, shared_grad * factor[:, None], fine)
        if a.config.model.router == "evidence":
            self._count(start, stop, paths, selection, frozen, text, fine)
        return StepResult(loss, selection, ~fine)

    # -- parts -----------------------------------------------------------------------------------

    def _remember(self, start: int, stop: int, measured: Tensor, due: list[bool] | None) -> None:
        """Store responsibilities (of the lanes that are due)."""
        a = self.arena
        last, mean = a["responsibility"][start:stop], a["mean_responsibility"][start:stop]
        running = torch.where(mean == 0, measured, mean * _MEMORY + measured * (1 - _MEMORY))
        if due is not None:
            on = torch.tensor(due, device=a.device)[:, None]
            measured = torch.where(on, measured, last)
            running = torch.where(on, running, mean)
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
        levels, looks = a.index(start, stop), a.looks(start, stop)
        return select_paths(measured, last, step, uniform, levels, rules, looks)

    def _clip(
        self, start: int, stop: int, squares: Tensor, shared_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Clip factor [L] and whether all gradients that matter are finite [L]."""
        if self.arena.config.update.shared_scale > 0:
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
        fine: Tensor,
    ) -> None:
        """Make the optimizer step of some slots: a slice of them, or int64 [L, R]."""
        a, names = self.arena, ("weight", "first", "second", "count")
        on = (scale > 0) & fine[:, None]
        rate = self._rate(start, stop)[:, None] * scale
        if isinstance(where, slice):
            target: tuple = (slice(start, stop), where)
        else:
            target = (torch.arange(start, stop, device=a.device)[:, None], where)
        rows = Rows(*(a[name][target] for name in names))
        new = adamw(rows, grad, rate, on, a.config.optimizer)
        for name, value in zip(names, (new.weight, new.first, new.second, new.count), strict=True):
            a[name][target] = value

    def _update_shared(self, start: int, stop: int, grad: Tensor, fine: Tensor) -> None:
        a, scale = self.arena, self.arena.config.update.shared_scale
        names = ("shared", "shared_first", "shared_second", "shared_count")
        rows = Rows(*(a[name][start:stop] for name in names))
        on = fine & (scale > 0)
        new = adamw(rows, grad, self._rate(start, stop) * scale, on, a.config.optimizer)
        for name, value in zip(names, (new.weight, new.first, new.second, new.count), strict=True):
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
        for route, path in zip(done.routing, paths[1:], strict=True):
            weight = route.by_child
            index = path.position[..., None].expand(-1, -1, weight.shape[-1])
            share = weight.detach().gather(1, index)
            updated = selection.scale.gather(1, path.slot) > 0
            on = path.valid & updated & fine[:, None]
            tokens = text.bigram[0].numel()
            slots.append(path.slot)
            # Not a product: a share may be NaN in a step that is skipped.
            shares.append(torch.where(on[..., None], share, 0.0).expand(-1, -1, tokens))
        add_counts(
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
        for lane in range(start, stop):
            a.host_step[lane] += 1

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
        levels, router = a.index(start, stop), a.router(start, stop)
        weights = a.weights(start, stop)
        pieces = weights.shared_layout.unpack(weights.shared)
        nats, length = torch.zeros(2, stop - start, dtype=torch.float64, device=a.device)
        for first in range(0, batch.inputs.shape[1], size):
            part = batch.map(itemgetter((slice(None), slice(first, first + size))))
            done = forward(weights, router, levels, part, read_text(part, a.config), a.config)
            nats += token_losses(pieces, done.output, part.targets).double().sum(1)
            length += self.store.bytes_in(part.targets)
        return nats / LN2 / length


def _leaf(view: Tensor) -> Tensor:
    """Make an autograd leaf of a part of the arena, without a copy.

    `data`, for `detach` would share the arena's version counter: the update of other lanes, in
    other threads, would then look like a change of this one.
    """
    return view.data.requires_grad_()


def _repeat(tensor: Tensor, lanes: int) -> Tensor:
    return tensor.expand(lanes, *tensor.shape[1:])
