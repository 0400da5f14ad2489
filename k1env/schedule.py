"""Cooperative tasks: sessions say what they need, and what can be done together is done together.

A session never calls the engine. It is a task, a generator that yields a request and is resumed
with the answer. A scheduler runs one task or a thousand. Lanes share nothing, so a task's answers
do not depend on its company: how a session goes is written once, and goes the same among others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from k1.arena import Arena, LaneState
from k1.chunks import runs
from k1.engine import Engine, Factor, Stretch
from k1.errors import K1Error
from k1.forward import Batch

T = TypeVar("T")
RECORDS = ("loss", "skipped", "born", "mean_responsibility", "updates", "last_update")
"""State of an arena that observations are made of."""


@dataclass(frozen=True)
class Train:
    """Train lanes; those that lie side by side may be trained as one range. The answer is None."""

    lanes: tuple[int, ...]
    """In ascending order."""
    steps: int
    anneal: bool = False
    """Let the learning rate fall linearly to zero."""
    mode: str | None = None
    """Mode of the update; the configuration's own by default."""
    made: int = 0
    """Steps that have been made already."""

    @property
    def factor(self) -> Factor | None:
        """Learning-rate factor of each step that is left."""
        return (lambda i: 1.0 - (self.made + i) / self.steps) if self.anneal else None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The lanes as ranges start..stop."""
        return runs(self.lanes)


@dataclass(frozen=True)
class Evaluate:
    """Measure a lane on evenly spaced windows of a pool. The answer: bits per byte by domain."""

    lane: int
    split: str
    domains: tuple[str, ...]
    """Domains to measure on; the answer has them in the data's order."""
    windows: int | None = None
    """Windows of each domain; the configuration's own number by default."""


@dataclass(frozen=True)
class Score:
    """Measure lanes start..stop, each on its windows. The answer: bits per byte of each lane."""

    start: int
    stop: int
    batch: Batch


@dataclass(frozen=True)
class Claim:
    """Wait for spare lanes, one beside the other. The answer is a `Room`."""

    lanes: int


@dataclass(frozen=True)
class Read:
    """Read the records of a lane's training. The answer: `Records`."""

    lane: int


@dataclass(frozen=True)
class Keep:
    """Copy a lane's state. The answer is a `LaneState`, good until the same lane is kept again."""

    lane: int


Request = Train | Evaluate | Score | Claim | Read | Keep
Records = dict[str, np.ndarray]
"""What `RECORDS` names, of one lane: numbers as arrays without axes, or one number for a slot."""
Task = Generator[Request, Any, T]


def read_records(arena: Arena, lanes: Sequence[int]) -> list[Records]:
    """Read the records of lanes, all at once: each look at the device is a wait for it."""
    low, high = min(lanes), max(lanes) + 1
    table = {name: arena[name][low:high].cpu().numpy().copy() for name in RECORDS}
    return [{name: rows[lane - low] for name, rows in table.items()} for lane in lanes]


class Room:
    """Spare lanes that a task holds."""

    def __init__(self, holder: list[bool], place: slice, start: int) -> None:
        """Take the lanes; `start` is the first one's number in the arena."""
        self._holder, self._place, self.start = holder, place, start
        self._mark(True)

    def _mark(self, held: bool) -> None:
        self._holder[self._place] = [held] * (self._place.stop - self._place.start)

    def release(self) -> None:
        """Give the lanes back."""
        self._mark(False)


class Calls(Protocol):
    """How requests become calls of the engine."""

    def train(self, requests: Sequence[Train]) -> list[int | Exception]:
        """Train; returns how many steps each request has come to."""

    def evaluate(self, requests: Sequence[Evaluate]) -> list[dict[str, float] | Exception]:
        """Answer each request."""

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Answer each request."""

    def read(self, requests: Sequence[Read]) -> list[Records]:
        """Answer each request."""

    def keep(self, requests: Sequence[Keep]) -> list[LaneState]:
        """Answer each request."""


class Separate:
    """Each request's lanes go through the engine as they would alone, side by side in threads."""

    def __init__(self, engine: Engine) -> None:
        """Bind the engine."""
        self.engine = engine

    def train(self, requests: Sequence[Train]) -> list[int | Exception]:
        """Train all requests to their ends."""
        engine, own = self.engine, self.engine.mode
        made: list[int | Exception] = [r.steps for r in requests]
        for mode in dict.fromkeys(r.mode for r in requests):
            chosen = [i for i, r in enumerate(requests) if r.mode == mode]
            engine.mode = mode or own
            try:
                errors = self._train([requests[i] for i in chosen])
            finally:
                engine.mode = own
            for i, error in zip(chosen, errors, strict=True):
                made[i] = made[i] if error is None else error
        return made

    def _train(self, requests: Sequence[Train]) -> list[Exception | None]:
        jobs = [(i, span) for i, request in enumerate(requests) for span in request.ranges]
        stretches = [(*span, requests[i].steps, requests[i].factor) for i, span in jobs]
        errors: list[Exception | None] = [None] * len(requests)
        for (i, _), error in zip(jobs, self._train_ranges(stretches), strict=True):
            errors[i] = errors[i] or error
        return errors

    def _train_ranges(self, stretches: list[Stretch]) -> list[Exception | None]:
        if len(stretches) > 1:
            return self.engine.train_all(stretches)
        (only,) = stretches
        try:
            self.engine.train(*only)
        except Exception as error:
            return [error]
        return [None]

    def evaluate(self, requests: Sequence[Evaluate]) -> list[dict[str, float] | Exception]:
        """Answer each request, domain by domain."""
        answers: list[dict[str, float] | Exception] = [{} for _ in requests]
        store, windows = self.engine.store, self.engine.arena.config.train.eval_windows
        for split, own in dict.fromkeys((r.split, r.windows) for r in requests):
            alike = [i for i, r in enumerate(requests) if (r.split, r.windows) == (split, own)]
            for domain in store.domains:
                chosen = [i for i in alike if domain in requests[i].domains]
                if not chosen:
                    continue
                batch = store.spread(split, domain, windows if own is None else own)
                lanes = [requests[i].lane for i in chosen]
                found = self._measure([(lane, lane + 1, batch) for lane in lanes])
                for i, bits in zip(chosen, found, strict=True):
                    answer = answers[i]
                    if isinstance(bits, Exception):
                        answers[i] = bits
                    elif isinstance(answer, dict):
                        answer[domain] = float(bits[0])
        return answers

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Answer each request."""
        found = self._measure([(r.start, r.stop, r.batch) for r in requests])
        return [bits if isinstance(bits, Exception) else bits.tolist() for bits in found]

    def read(self, requests: Sequence[Read]) -> list[Records]:
        """Answer each request."""
        return read_records(self.engine.arena, [r.lane for r in requests])

    def keep(self, requests: Sequence[Keep]) -> list[LaneState]:
        """Answer each request."""
        return [self.engine.arena.read_lane(r.lane) for r in requests]

    def _measure(self, ranges: list[tuple[int, int, Batch]]) -> list[Tensor | Exception]:
        if len(ranges) > 1:
            return self.engine.bits_per_byte_all(ranges)
        try:
            return [self.engine.bits_per_byte(*ranges[0])]
        except Exception as error:
            return [error]


class Scheduler:
    """Runs tasks to their ends and keeps the spare lanes."""

    def __init__(self, calls: Calls, spare: range) -> None:
        """Bind what does the work.

        Args:
            calls: how requests become calls of the engine.
            spare: lanes that tasks can claim.
        """
        self.calls, self.spare = calls, spare
        self._ends: list[tuple[type, Callable[[list[Any]], Sequence[Any]]]] = [
            (Evaluate, calls.evaluate),
            (Read, calls.read),
            (Keep, calls.keep),
        ]
        self._held = [False] * len(spare)

    def run(self, tasks: Sequence[Task[T]]) -> list[T]:
        """Run tasks side by side; returns their results.

        An error of a request is raised in the task that made it. An error that a task does not
        handle ends all tasks.
        """
        results: dict[int, T] = {}
        waiting: dict[int, Request] = {}

        def resume(number: int, answer: Any) -> None:
            waiting.pop(number, None)
            try:
                if isinstance(answer, Exception):
                    waiting[number] = tasks[number].throw(answer)
                else:
                    waiting[number] = tasks[number].send(answer)
            except StopIteration as end:
                results[number] = end.value

        answers: dict[int, Any] = {}
        try:
            for number in range(len(tasks)):
                resume(number, None)
            while waiting:
                answers = self._answer(waiting)
                for number in list(answers):
                    resume(number, answers.pop(number))
        finally:
            for task in tasks:
                task.close()
            for answer in answers.values():  # an error came before they were handed over
                if isinstance(answer, Room):
                    answer.release()
        return [results[number] for number in range(len(tasks))]

    def _answer(self, waiting: dict[int, Request]) -> dict[int, Any]:
        """Answer some of the requests.

        Training comes after what leads to more of it, so that as many lanes as possible are
        trained together. What comes at the end of a decision waits until half of all are there.
        """
        asked = dict(sorted(waiting.items()))
        claims = self._admit({n: r.lanes for n, r in asked.items() if isinstance(r, Claim)})
        if claims:
            return claims
        scores = {n: r for n, r in asked.items() if isinstance(r, Score)}
        if scores:
            return dict(zip(scores, self.calls.score(list(scores.values())), strict=True))
        trains = {n: r for n, r in asked.items() if isinstance(r, Train)}
        if 2 * len(trains) > len(asked):
            return self._train(trains, waiting)
        for kind, answer in self._ends:
            alike = {n: r for n, r in asked.items() if isinstance(r, kind)}
            if alike:
                return dict(zip(alike, answer(list(alike.values())), strict=True))
        if trains:
            return self._train(trains, waiting)
        raise K1Error(f"{len(self.spare)} spare lanes are too few for a trial: give more")

    def _train(self, trains: Mapping[int, Train], waiting: dict[int, Request]) -> dict[int, Any]:
        """Train, and say who is done; the others wait for the steps that are left."""
        ended: dict[int, Any] = {}
        made = self.calls.train(list(trains.values()))
        for (number, request), steps in zip(trains.items(), made, strict=True):
            if isinstance(steps, Exception):
                ended[number] = steps
            elif steps == request.steps:
                ended[number] = None
            else:
                waiting[number] = replace(request, made=steps)
        return ended

    def _admit(self, claims: Mapping[int, int]) -> dict[int, Room]:
        """Give room to claims in order, each at the first place where it fits, while there is."""
        rooms: dict[int, Room] = {}
        for number, lanes in claims.items():
            last = len(self._held) - lanes
            fits = (i for i in range(last + 1) if not any(self._held[i : i + lanes]))
            first = next(fits, None)
            if first is None:
                break
            place = slice(first, first + lanes)
            rooms[number] = Room(self._held, place, self.spare.start + first)
        return rooms
