"""The training step: forward, attribution, and an update of the chosen paths only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k1 import records
from k1.arena import Arena
from k1.attribution import Selection, SelectionRules, responsibilities, select_paths
from k1.backend import choose_backend
from k1.chunks import cut, run_pieces, runs
from k1.evidence import rotate
from k1.forward import (
    Activations,
    Batch,
    RouterState,
    Text,
    forward,
    lane_loss,
    read_text,
)
from k1.graphs import Side, StepGraphs
from k1.measure import measure
from k1.path import Gradients, PathPass, as_leaf, index_paths
from k1.path_cpu import CpuPathPass
from k1.records import FullGradients, StepResult
from k1.rng import STREAM_EXPLORE, random_uniform
from k1.sampling import TokenStore, draw
from k1.update import Update

if TYPE_CHECKING:
    from k1.kernels.tree import TreePass
    from k1.kernels.update import FusedUpdate

Factor = Callable[[int], float | Tensor]
Stretch = tuple[int, int, int, Factor | None]
"""Lanes start..stop, steps, and the learning-rate factor of each step."""
RangeWork = Callable[[int, int], None]


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
        self._side, self._forward_side, self.inner_side = (Side(arena.device) for _ in range(3))
        recorded = on_gpu and self.backend.kernels if graph is None else graph
        self.graphs = StepGraphs(arena.device) if recorded else None
        self.measured: dict[Hashable, Batch] = {}
        """Room for the windows that recorded measurements read, by shape."""

    def _run(self, jobs: Sequence[tuple[int, int, RangeWork]]) -> list[Exception | None]:
        """Do each job's work on its lanes start..stop, chunk by chunk; returns the jobs' errors.

        On a CPU all chunks run side by side, a thread each: lanes share nothing, so the result
        does not depend on their timing, and two threads that work alone are much faster than two
        that meet at every small product. (`k1.cli.prepare_torch` gives each product one thread.)
        """
        chunks = [cut(start, stop, self.chunk) for start, stop, _ in jobs]
        threads = self.arena.device.type == "cpu"
        if threads and sum(map(len, chunks)) > 1:
            self.arena.prepare([chunk for row in chunks for chunk in row])
        pieces = [
            [partial(work, low, high) for low, high in row]
            for row, (_, _, work) in zip(chunks, jobs, strict=True)
        ]
        return run_pieces(pieces, threads=threads)

    def train(
        self,
        start: int,
        stop: int,
        steps: int,
        factor: Factor | None = None,
    ) -> None:
        """Train lanes start..stop for `steps` steps each.

        Args:
            start: first lane.
            stop: one past the last lane.
            steps: how many steps.
            factor: learning-rate factor of step 0, 1, ... for all lanes, or, if they are trained in
                one chunk, for each of them; kept as it is by default.
        """
        (error,) = self.train_all([(start, stop, steps, factor)])
        if error is not None:
            raise error

    def train_all(self, stretches: Sequence[Stretch]) -> list[Exception | None]:
        """Train ranges that share no lane, each as `train` does, side by side on a CPU.

        Args:
            stretches: what `train` takes, for each range.

        Returns:
            For each range, the error that ended it, or None.
        """
        jobs: list[tuple[int, int, RangeWork]] = []
        for start, stop, steps, factor in stretches:

            def work(
                low: int, high: int, steps: int = steps, factor: Factor | None = factor
            ) -> None:
                for i in range(steps):
                    if factor is not None:
                        self.arena["lr_factor"][low:high] = factor(i)
                    self.step(low, high)

            jobs.append((start, stop, work))
        return self._run(jobs)

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
        window = config.evidence.window
        full = [n for n in range(start, stop) if a.host_step[n] and a.host_step[n] % window == 0]
        for low, high in runs(full):
            rotate(a["evidence"][low:high])
        every = config.update.attribution_every
        due = any(a.host_step[lane] % every == 0 for lane in range(start, stop))
        work = partial(self._step, start, stop, due, batch)
        # Read here, for a change of the tree is written when it is asked for: before any fork.
        index, most = a.index(start, stop), a.leaves(start, stop).most
        if self.graphs is None or batch is not None:
            result = work()
        else:
            shape = tuple((i.width, i.children.shape[-1]) for i in index)
            result = self.graphs.run((self.mode, start, stop, due, shape, most), work)
        for lane in range(start, stop):
            a.host_step[lane] += 1
        return result

    @torch.enable_grad()
    def _step(self, start: int, stop: int, due: bool, batch: Batch | None) -> StepResult:
        """Do a step on the device, without waiting for it."""
        if batch is None:
            batch, text = draw(self.store, self.arena, start, stop, self.backend.kernels)
        else:
            text = read_text(batch, self.arena.config)
        if self.mode == "sparse":
            result = self._sparse(start, stop, batch, text, due)
        else:
            result = self._full(start, stop, batch, text)
        records.record(self.arena, start, stop, result, self.backend.kernels)
        return result

    def gradients(
        self,
        start: int,
        stop: int,
        batch: Batch,
        text: Text,
        router: RouterState | None = None,
        shared: bool = True,
    ) -> tuple[Tensor, list[Tensor], Tensor, Activations]:
        """Run a full backward pass: loss [L], gradients [L, W, P] by level and [L, Q], values.

        The routing is that of a document's beginning, or begins with a given state. Without
        `shared`, the gradient of the shared part is left out: zeros.
        """
        a = self.arena
        weights = a.weights(start, stop)
        weights = replace(
            weights,
            levels=[as_leaf(w) for w in weights.levels],
            # No view either way: its version would count other lanes' updates (see `as_leaf`).
            shared=as_leaf(weights.shared) if shared else weights.shared.data,
        )
        levels, router = a.index(start, stop), router or a.router(start, stop)
        done = forward(weights, router, levels, batch, text, a.config)
        loss = lane_loss(weights, done.output, batch)
        wanted = [*weights.levels, weights.shared] if shared else weights.levels
        grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True, materialize_grads=True)
        by_shared = grads[-1] if shared else torch.zeros_like(weights.shared)
        return loss.detach(), list(grads[: len(levels)]), by_shared, done

    def _all_gradients(self, start: int, stop: int, batch: Batch, text: Text) -> FullGradients:
        """Run a full backward pass."""
        a = self.arena
        # The exact mode is the reference, and stays with PyTorch.
        if self.backend.fused and self.mode != "exact":
            from k1.kernels.tree import TreePass, all_blocks

            forest = a.forest(start, stop)
            table = all_blocks(forest, a.leaves(start, stop))
            done = TreePass(forest, batch, text, self.inner_side).run(table)
            found = done.gradients()
            measured = table.norms(found.squares)
            by_row = [(table.row, found.by_row)]
            return FullGradients(found.loss, measured, by_row, found.by_shared, done.values)
        loss, grads, shared_grad, values = self.gradients(start, stop, batch, text)
        levels = a.index(start, stop)
        measured = responsibilities(grads, levels, a.scratch + 1)
        parts = [(i.row, g.flatten(0, 1)) for i, g in zip(levels, grads, strict=True)]
        return FullGradients(loss, measured, parts, shared_grad, values)

    def _probe(self, start: int, stop: int, batch: Batch, text: Text) -> Tensor:
        """Measure each block's responsibility: [L, S]."""
        if not self.backend.fused:
            grads = self.gradients(start, stop, batch, text, shared=False)[1]
            return responsibilities(grads, self.arena.index(start, stop), self.arena.scratch + 1)
        from k1.kernels.tree import TreePass, all_blocks

        forest = self.arena.forest(start, stop)
        table = all_blocks(forest, self.arena.leaves(start, stop))
        done = TreePass(forest, batch, text, self.inner_side, shared=False).run(table)
        return table.norms(done.squares())

    def _full(self, start: int, stop: int, batch: Batch, text: Text) -> StepResult:
        """Dense or exact: every block's gradient is computed."""
        a = self.arena
        full = self._all_gradients(start, stop, batch, text)
        records.remember(self.arena, start, stop, full.measured)
        if self.mode == "dense":
            alive = a.leaves(start, stop).depth > 0
            none = torch.full_like(alive[:, :1], -1, dtype=torch.int64)
            selection = Selection(alive.float(), alive, none)
        else:
            selection = self._select(start, stop, full.measured)
        fine = self._update(start, stop, selection).full(full)
        if a.config.model.router == "evidence" and self.mode != "dense":
            self._count(start, stop, selection, full.values, text, fine)
        self._forward_side.join()
        return StepResult(full.loss, selection, fine)

    def _sparse(self, start: int, stop: int, batch: Batch, text: Text, due: bool) -> StepResult:
        """Attribution on a probe now and then; gradients for the chosen paths only."""
        a, update = self.arena, self.arena.config.update
        with self._side.fork():
            if due:
                windows = max(1, round(batch.inputs.shape[1] * update.probe_fraction))
                measured = self._probe(start, stop, batch.head(windows), text.head(windows))
                on_time = a["step"][start:stop] % update.attribution_every == 0
                records.remember(self.arena, start, stop, measured, on_time)
            selection = self._select(start, stop, a["responsibility"][start:stop])
        forward = None
        if self.backend.fused:
            from k1.kernels.tree import TreePass

            forward = TreePass(a.forest(start, stop), batch, text, self._forward_side)
            if due:  # The forward pass needs no selection, so it runs beside the probe.
                forward.run()
        self._side.join()
        return self.path_step(start, stop, batch, text, selection, forward)

    def path_pass(
        self,
        start: int,
        stop: int,
        batch: Batch,
        text: Text,
        selection: Selection,
        forward: TreePass | None = None,
    ) -> PathPass | TreePass:
        """Run everything forward, unless that is done; the result has the paths' gradients."""
        a = self.arena
        forest, leaves = a.forest(start, stop), a.leaves(start, stop)
        if self.backend.fused:
            from k1.kernels.tree import TreePass, chosen_blocks

            table = chosen_blocks(forest, leaves, selection.on_path)
            done = forward or TreePass(forest, batch, text, self._forward_side)
            return done.choose(table) if done.has_run else done.run(table)
        paths = index_paths(selection.on_path, forest.levels, leaves.most, a.scratch)
        on_cpu = a.device.type == "cpu"
        return (CpuPathPass if on_cpu else PathPass)(forest, batch, text, paths)

    def path_step(
        self,
        start: int,
        stop: int,
        batch: Batch,
        text: Text,
        selection: Selection,
        forward: TreePass | None = None,
    ) -> StepResult:
        """Update the selected paths from their own gradients.

        With `inner_steps`, the culprits move several times on the batch, and all else with the last
        of these. That is exact for the culprits: nothing but the mixing depends on a leaf.
        """
        config = self.arena.config
        done = self.path_pass(start, stop, batch, text, selection, forward)
        update = self._update(start, stop, selection)
        first_loss: Tensor | None = None
        for turn in range(config.update.inner_steps):
            found = self._path_gradients(start, stop, done)
            first_loss = found.loss if first_loss is None else first_loss
            last = turn == config.update.inner_steps - 1
            fine = update.path(done, found, last)
        assert first_loss is not None
        if config.model.router == "evidence":
            self._count(start, stop, selection, done.values, text, fine, done.row)
        self._forward_side.join()
        return StepResult(first_loss, selection, fine)

    def _path_gradients(self, start: int, stop: int, done: PathPass | TreePass) -> Gradients:
        """Gradients of what a pass has chosen, as the update takes them."""
        return done.gradients()

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
        select = select_paths
        if self.backend.kernels:
            from k1.kernels.select import select_paths_fused as select
        return select(measured, last, step, uniform, a.leaves(start, stop), rules)

    def _update(self, start: int, stop: int, selection: Selection) -> Update | FusedUpdate:
        """Begin the update of what is selected."""
        sharers = self._sharers(start, stop)
        if not self.backend.kernels:
            return Update(self.arena, start, stop, selection, sharers)
        from k1.kernels.update import FusedUpdate

        return FusedUpdate(self.arena, start, stop, selection, sharers, self._forward_side)

    def _sharers(self, start: int, stop: int) -> Tensor | None:
        """Lanes whose shared part is updated: bool [L], or None for all."""
        return None

    def _count(
        self,
        start: int,
        stop: int,
        selection: Selection,
        done: Activations,
        text: Text,
        fine: Tensor,
        row: Tensor | None = None,
    ) -> None:
        """Add the batch's bigrams to the updated blocks; if `row` is given, all are in there."""
        kernels = self.backend.kernels
        records.count_text(self.arena, start, stop, selection, done, text, fine, kernels, row)

    def bits_per_byte(self, start: int, stop: int, batch: Batch) -> Tensor:
        """Bits per byte of lanes start..stop on a batch [L or 1, B, T]: float64 [L]."""
        (result,) = self.bits_per_byte_all([(start, stop, batch)])
        if isinstance(result, Tensor):
            return result
        raise result

    def bits_per_byte_all(
        self, ranges: Sequence[tuple[int, int, Batch]]
    ) -> list[Tensor | Exception]:
        """Measure ranges of lanes, each as `bits_per_byte` does, side by side on a CPU.

        Returns:
            For each range, its bits per byte, or the error that came instead.
        """
        found: list[Tensor | Exception] = []
        jobs: list[tuple[int, int, RangeWork]] = []
        for start, stop, batch in ranges:
            out = torch.zeros(stop - start, dtype=torch.float64, device=self.arena.device)

            def work(
                low: int, high: int, start: int = start, batch: Batch = batch, out: Tensor = out
            ) -> None:
                part = slice(low - start, high - start)
                shared = batch.inputs.shape[0] == 1
                own = batch.map(partial(_repeat, lanes=high - low) if shared else itemgetter(part))
                out[part] = measure(self, low, high, own)

            found.append(out)
            jobs.append((start, stop, work))
        errors = self._run(jobs)
        return [out if error is None else error for out, error in zip(found, errors, strict=True)]


def _repeat(tensor: Tensor, lanes: int) -> Tensor:
    return tensor.expand(lanes, *tensor.shape[1:])
