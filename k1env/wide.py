"""Few wide calls of the engine in place of many narrow ones, for a device that likes them.

On a GPU a step of one lane takes about as long as a step of `CALL` lanes. So the lanes that wait
for the same thing are covered with aligned ranges, and the lanes in between are trained along and
come back as they were. The ranges are few, for each is recorded as a graph of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter

import torch
from torch import Tensor

from k1.arena import Arena
from k1.engine import Engine
from k1.forward import Batch
from k1env.schedule import Evaluate, Score, Train

CALL = 16
"""Lanes that a call costs besides those that it is about, and the width of the narrowest call."""


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
        return (apart, left[1] + right[1]) if apart < whole else (whole, [(low, high)])

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


class Wide:
    """Requests become few wide calls. An error of a call ends everything: nobody owns it alone."""

    def __init__(self, engine: Engine) -> None:
        """Bind the engine, which has to take all lanes in one chunk."""
        self.engine = engine

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
        """Answer each request, domain by domain."""
        engine, answers = self.engine, [dict[str, float]() for _ in requests]
        windows = engine.arena.config.train.eval_windows
        for split, own in dict.fromkeys((r.split, r.windows) for r in requests):
            alike = {
                r.lane: i for i, r in enumerate(requests) if (r.split, r.windows) == (split, own)
            }
            for domain in engine.store.domains:
                by_lane = {n: i for n, i in alike.items() if domain in requests[i].domains}
                batch = engine.store.spread(split, domain, windows if own is None else own)
                for low, high in cover(list(by_lane), engine.arena.lanes):
                    bits = engine.bits_per_byte(low, high, batch).tolist()
                    for lane in range(low, high):
                        if lane in by_lane:
                            answers[by_lane[lane]][domain] = bits[lane - low]
        return list(answers)

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
        names = ("inputs", "targets", "starts", "domain")
        joined = Batch(*[torch.cat([getattr(r.batch, n) for r in requests]) for n in names])
        found: dict[int, float] = {}
        for low, high in cover(list(row), engine.arena.lanes):
            index = torch.tensor([row.get(lane, 0) for lane in range(low, high)])
            index = index.to(engine.arena.device)
            batch = joined.map(itemgetter(index))
            bits = engine.bits_per_byte(low, high, batch).tolist()
            found |= {lane: bits[lane - low] for lane in range(low, high) if lane in row}
        return found
