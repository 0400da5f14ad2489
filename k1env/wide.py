"""Few wide calls of the engine in place of many narrow ones, for a device that likes them.

On a GPU a step of one lane takes nearly as long as a step of many, and each range of lanes that is
trained is recorded as a graph of its own, which takes as long as hundreds of steps. So the lanes
that wait for the same thing are copied side by side into a work area, whichever they are, and what
they come to is copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from k1.arena import LaneState
from k1.engine import Engine
from k1.errors import K1Error
from k1.forward import Batch
from k1.levels import on_device
from k1.packing import MEASURED, WorkArea, write_rows
from k1env.schedule import Evaluate, Keep, Read, Records, Score, Train, read_records

WIDTHS = (4, 16, 32, 64, 128, 192, 256)
"""Widths of calls. Each has graphs of its own; between two, lanes are trained for nothing. Alone,
a few lanes wait for the end of their trials often enough to be worth the narrowest."""

WIDEST = WIDTHS[-1]
"""Width of the widest call: more lanes take more memory at once, and no less time each."""


def width_for(lanes: int) -> int:
    """Return the width of a call that is about so many lanes, `WIDEST` at most."""
    return next(width for width in WIDTHS if width >= lanes)


def work_room(lanes: int) -> int:
    """Return how many lanes of work area an arena with so many other lanes needs."""
    return width_for(min(lanes, WIDEST))


def _join(batches: Sequence[Batch]) -> Batch:
    """Put the windows of lanes into one batch, lane by lane."""
    names = ("inputs", "targets", "starts", "domain")
    return Batch(*[torch.cat([getattr(batch, name) for batch in batches]) for name in names])


def _calls(numbers: Sequence[int]) -> list[Sequence[int]]:
    """Divide among calls what is about many lanes."""
    return [numbers[first : first + WIDEST] for first in range(0, len(numbers), WIDEST)]


class Wide:
    """Requests become few wide calls. An error of a call ends everything: nobody owns it alone."""

    def __init__(self, engine: Engine, keeps: int, area: int) -> None:
        """Bind the engine, which has to take the lanes of a call in one chunk.

        Args:
            engine: does the work.
            keeps: how many lanes, the first ones, can be kept.
            area: where the work area begins, at the end of the arena: `work_room` lanes.
        """
        self.engine, self._keeps = engine, keeps
        self._area = WorkArea(engine.arena, area)
        self._kept: dict[str, Tensor] = {}

    def train(self, requests: Sequence[Train]) -> list[int | Exception]:
        """Train all requests of a mode by as many steps as the shortest has left."""
        engine, own = self.engine, self.engine.mode
        made: list[int | Exception] = [r.made for r in requests]
        for mode in dict.fromkeys(r.mode for r in requests):
            chosen = [i for i, r in enumerate(requests) if r.mode == mode]
            steps = min(requests[i].steps - requests[i].made for i in chosen)
            engine.mode = mode or own
            try:
                self._train([requests[i] for i in chosen], steps)
            finally:
                engine.mode = own
            for i in chosen:
                made[i] = requests[i].made + steps
        return made

    def _train(self, requests: Sequence[Train], steps: int) -> None:
        # Lanes that lie side by side are copied too: in place, each range would be a graph more.
        owner = {lane: r for r in requests for lane in r.lanes}
        for lanes in _calls(sorted(owner)):
            start, stop = self._area.pack(lanes, width_for(len(lanes)))
            table = self._factors([owner[lane] for lane in lanes], start, stop, steps)
            self.engine.train(start, stop, steps, None if table is None else table.__getitem__)
            self._area.unpack()

    def _factors(self, owners: Sequence[Train], start: int, stop: int, steps: int) -> Tensor | None:
        """Learning-rate factors of packed lanes by step, [steps, lanes]; None if all stay."""
        if not any(r.anneal for r in owners):
            return None
        device, rest = self.engine.arena.device, stop - start - len(owners)
        rows = [[1.0 - (r.made + i) / r.steps for r in owners] + [1.0] * rest for i in range(steps)]
        return torch.where(
            on_device(device, np.array([r.anneal for r in owners] + [False] * rest)),
            on_device(device, np.array(rows, dtype=np.float32)),
            self.engine.arena["lr_factor"][start:stop],
        )

    def evaluate(self, requests: Sequence[Evaluate]) -> list[dict[str, float] | Exception]:
        """Answer each request: first all of them in their first domain, then in their second."""
        store = self.engine.store
        answers: list[dict[str, float] | Exception] = [{} for _ in requests]
        default = self.engine.arena.config.train.eval_windows
        for split, windows in dict.fromkeys((r.split, r.windows) for r in requests):
            chosen = [i for i, r in enumerate(requests) if (r.split, r.windows) == (split, windows)]
            count = default if windows is None else windows
            text = {d: store.spread(split, d, count) for d in store.domains}
            todo = {i: [d for d in store.domains if d in requests[i].domains] for i in chosen}
            # Who has most of them is in front: the calls that come last are about the first lanes.
            order = sorted(chosen, key=lambda i: (-len(todo[i]), requests[i].lane))
            for part in _calls([i for i in order if todo[i]]):
                lanes = [requests[i].lane for i in part]
                self._area.pack(lanes, width_for(len(lanes)), MEASURED)
                found = self._evaluate([todo[i] for i in part], text)
                for i, answer in zip(part, found, strict=True):
                    answers[i] = answer
        return answers

    def _evaluate(self, todo: list[list[str]], text: dict[str, Batch]) -> list[dict[str, float]]:
        """Measure each packed lane on its domains in order, in as few calls as the most of them."""
        found: list[dict[str, float]] = [{} for _ in todo]
        while any(todo):
            # A pool that is too short for all windows has fewer of them.
            size = next(text[domains[0]].inputs.shape[1] for domains in todo if domains)
            now = {
                place: domains[0]
                for place, domains in enumerate(todo)
                if domains and text[domains[0]].inputs.shape[1] == size
            }
            kinds = list(dict.fromkeys(now.values()))
            joined = _join([text[domain] for domain in kinds])
            bits = self._measure(joined, {p: kinds.index(domain) for p, domain in now.items()})
            for place, domain in now.items():
                found[place][domain] = bits[place]
            todo = [d[1:] if place in now else d for place, d in enumerate(todo)]
        return found

    def _measure(self, joined: Batch, rows: dict[int, int]) -> list[float]:
        """Measure packed lanes up to the last of some places, each on its row of a batch."""
        width, start = width_for(max(rows) + 1), self._area.start
        index = [rows.get(place, 0) for place in range(width)]
        batch = joined.map(itemgetter(on_device(self.engine.arena.device, np.array(index))))
        bits: list[float] = self.engine.bits_per_byte(start, start + width, batch).tolist()
        return bits

    def read(self, requests: Sequence[Read]) -> list[Records]:
        """Answer each request."""
        return read_records(self.engine.arena, [r.lane for r in requests])

    def keep(self, requests: Sequence[Keep]) -> list[LaneState]:
        """Answer each request by a row of a store that has one for each system."""
        arena, lanes = self.engine.arena, [r.lane for r in requests]
        if max(lanes) >= self._keeps:
            raise K1Error(f"lane {max(lanes)} has no row in the store of kept states")
        index = on_device(arena.device, np.array(lanes))
        if not self._kept:
            self._kept = {n: torch.empty_like(t[: self._keeps]) for n, t in arena.state.items()}
        rows = [tensor.index_select(0, index) for tensor in arena.state.values()]
        write_rows(self._kept.values(), index, rows)
        return [
            LaneState({n: t[lane] for n, t in self._kept.items()}, arena.trees[lane].copy(), True)
            for lane in lanes
        ]

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Answer each request; those with equally many windows together."""
        answers: list[list[float] | Exception] = [[] for _ in requests]
        for shape in dict.fromkeys(r.batch.inputs.shape[1:] for r in requests):
            chosen = [i for i, r in enumerate(requests) if r.batch.inputs.shape[1:] == shape]
            found = self._score([requests[i] for i in chosen])
            for i in chosen:
                answers[i] = [found[lane] for lane in range(requests[i].start, requests[i].stop)]
        return answers

    def _score(self, requests: Sequence[Score]) -> dict[int, float]:
        row: dict[int, int] = {}
        for request in requests:
            for lane in range(request.start, request.stop):
                row[lane] = len(row)
        joined = _join([request.batch for request in requests])
        found: dict[int, float] = {}
        for lanes in _calls(sorted(row)):
            self._area.pack(lanes, width_for(len(lanes)), MEASURED)
            bits = self._measure(joined, {place: row[lane] for place, lane in enumerate(lanes)})
            found |= dict(zip(lanes, bits, strict=False))  # what fills up the call comes last
        return found
