"""Few wide calls of the engine in place of many narrow ones, for a device that likes them.

On a GPU a step of one lane takes nearly as long as a step of `CALL` lanes, and each range of lanes
that is trained is recorded as a graph of its own, which takes as long as hundreds of steps. So the
lanes that wait for the same thing are covered with few aligned ranges, and the lanes in between are
trained along and come back as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter

import torch
from torch import Tensor

from k1.arena import Arena, LaneState
from k1.engine import Engine
from k1.errors import K1Error
from k1.forward import Batch
from k1env.schedule import Evaluate, Keep, Read, Records, Score, Train, read_records

CALL = 64
"""Lanes that a call costs besides those that it is about, and the width of the narrowest call."""

WIDEST = 256
"""Width of the widest call: more lanes take more memory at once, and no less time each."""


def cover(lanes: Sequence[int], total: int) -> list[tuple[int, int]]:
    """Cover lanes with ranges, each 2^k lanes wide from a multiple of that, at the least cost.

    Args:
        lanes: which lanes to cover.
        total: lanes of the arena: no range goes beyond.
    """
    wanted = set(lanes)

    def best(low: int, width: int) -> tuple[int, list[tuple[int, int]]]:
        high = min(low + width, total)
        if not any(lane in wanted for lane in range(low, high)):
            return 0, []
        whole = CALL + high - low
        if width <= CALL:
            return whole, [(low, high)]
        left, right = best(low, width // 2), best(low + width // 2, width // 2)
        apart = left[0] + right[0]
        if apart < whole or width > WIDEST:
            return apart, left[1] + right[1]
        return whole, [(low, high)]

    width = CALL
    while width < total:
        width *= 2
    return best(0, width)[1]


@contextmanager
def untouched(arena: Arena, lanes: Sequence[int]) -> Iterator[None]:
    """Let lanes come out as they went in; their trees must not be changed inside."""
    if not lanes:
        yield
        return
    index = torch.tensor(lanes, device=arena.device)
    kept = {name: tensor.index_select(0, index) for name, tensor in arena.state.items()}
    steps = [arena.host_step[lane] for lane in lanes]
    try:
        yield
    finally:
        for name, tensor in arena.state.items():
            tensor.index_copy_(0, index, kept[name])
        for lane, step in zip(lanes, steps, strict=True):
            arena.host_step[lane] = step


def _join(batches: Sequence[Batch]) -> Batch:
    """Put the windows of lanes into one batch, lane by lane."""
    names = ("inputs", "targets", "starts", "domain")
    return Batch(*[torch.cat([getattr(batch, name) for batch in batches]) for name in names])


class Wide:
    """Requests become few wide calls. An error of a call ends everything: nobody owns it alone."""

    def __init__(self, engine: Engine, keeps: int) -> None:
        """Bind the engine, which has to take all lanes in one chunk.

        Args:
            engine: does the work.
            keeps: how many lanes, the first ones, can be kept.
        """
        self.engine, self._keeps = engine, keeps
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
        arena = self.engine.arena
        owner = {lane: r for r in requests for lane in r.lanes}
        for low, high in cover(list(owner), arena.lanes):
            gaps = [lane for lane in range(low, high) if lane not in owner]
            table = self._factors(owner, low, high, steps)
            guide = next(lane for lane in range(low, high) if lane in owner)
            with untouched(arena, gaps):
                for lane in gaps:  # or they would ask for probes at steps of their own
                    arena.host_step[lane] = arena.host_step[guide]
                self.engine.train(low, high, steps, None if table is None else table.__getitem__)

    def _factors(self, owner: dict[int, Train], low: int, high: int, steps: int) -> Tensor | None:
        """Learning-rate factors of lanes low..high by step, [steps, lanes]; None if all stay."""
        annealed = {n: r for n, r in owner.items() if low <= n < high and r.anneal}
        if not annealed:
            return None
        arena = self.engine.arena
        rows = [[1.0 - (r.made + i) / r.steps for r in annealed.values()] for i in range(steps)]
        table = arena["lr_factor"][low:high].expand(steps, -1).clone()
        where = torch.tensor([lane - low for lane in annealed], device=arena.device)
        return table.index_copy_(1, where, torch.tensor(rows, device=arena.device))

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
            todo = {i: domains for i, domains in todo.items() if domains}
            while todo:
                # A pool that is too short for all windows has fewer of them.
                width = text[next(iter(todo.values()))[0]].inputs.shape[1]
                now = {i: d for i, (d, *_) in todo.items() if text[d].inputs.shape[1] == width}
                found = self._evaluate({requests[i].lane: text[d] for i, d in now.items()})
                for i, domain in now.items():
                    answer = answers[i]
                    assert isinstance(answer, dict)
                    answer[domain] = found[requests[i].lane]
                    todo[i] = todo[i][1:]
                todo = {i: left for i, left in todo.items() if left}
        return answers

    def _evaluate(self, text: dict[int, Batch]) -> dict[int, float]:
        """Measure each lane on its windows [1, B, T], as many for one as for the other."""
        engine, found = self.engine, dict[int, float]()
        kinds = {id(batch): batch for batch in text.values()}
        row = {key: i for i, key in enumerate(kinds)}
        joined = _join(list(kinds.values()))
        for low, high in cover(list(text), engine.arena.lanes):
            rows = [row[id(text[lane])] if lane in text else 0 for lane in range(low, high)]
            index = torch.tensor(rows, device=engine.arena.device)
            bits = engine.bits_per_byte(low, high, joined.map(itemgetter(index))).tolist()
            found |= {lane: bits[lane - low] for lane in range(low, high) if lane in text}
        return found

    def read(self, requests: Sequence[Read]) -> list[Records]:
        """Answer each request."""
        return read_records(self.engine.arena, [r.lane for r in requests])

    def keep(self, requests: Sequence[Keep]) -> list[LaneState]:
        """Answer each request by a row of a store that has one for each system."""
        arena, lanes = self.engine.arena, [r.lane for r in requests]
        if max(lanes) >= self._keeps:
            raise K1Error(f"lane {max(lanes)} has no row in the store of kept states")
        index = torch.tensor(lanes, device=arena.device)
        for name, tensor in arena.state.items():
            if name not in self._kept:
                self._kept[name] = torch.empty_like(tensor[: self._keeps])
            self._kept[name].index_copy_(0, index, tensor.index_select(0, index))
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
        engine = self.engine
        row: dict[int, int] = {}
        for request in requests:
            for lane in range(request.start, request.stop):
                row[lane] = len(row)
        joined = _join([request.batch for request in requests])
        found: dict[int, float] = {}
        for low, high in cover(list(row), engine.arena.lanes):
            index = torch.tensor([row.get(lane, 0) for lane in range(low, high)])
            index = index.to(engine.arena.device)
            batch = joined.map(itemgetter(index))
            bits = engine.bits_per_byte(low, high, batch).tolist()
            found |= {lane: bits[lane - low] for lane in range(low, high) if lane in row}
        return found
