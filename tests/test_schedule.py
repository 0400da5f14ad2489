"""Tasks side by side: who waits for what, whose error is whose, and few wide calls for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from k1.arena import LaneState
from k1.engine import Engine
from k1.errors import K1Error
from k1.trainer import Trainer
from k1env.schedule import (
    Claim,
    Evaluate,
    Keep,
    Read,
    Records,
    Room,
    Scheduler,
    Score,
    Separate,
    Task,
    Train,
)
from k1env.wide import Wide, work_room
from tests.conftest import DOMAINS

# -- the scheduler ------------------------------------------------------------------------------


class Notes:
    """Calls that only take notes: what was asked together."""

    def __init__(self, fails: int = -1) -> None:
        self.asked: list[tuple[str, list[Any]]] = []
        self.fails = fails

    def train(self, requests: Sequence[Train]) -> list[int | Exception]:
        self.asked.append(("train", [r.lanes[0] for r in requests]))
        steps = min(r.steps - r.made for r in requests)
        made: list[int | Exception] = [r.made + steps for r in requests]
        return [
            RuntimeError("dead") if r.lanes[0] == self.fails else m
            for r, m in zip(requests, made, strict=True)
        ]

    def evaluate(self, requests: Sequence[Evaluate]) -> list[dict[str, float] | Exception]:
        self.asked.append(("evaluate", [r.lane for r in requests]))
        return [{"alpha": float(r.lane)} for r in requests]

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        raise NotImplementedError

    def read(self, requests: Sequence[Read]) -> list[Records]:
        raise NotImplementedError

    def keep(self, requests: Sequence[Keep]) -> list[LaneState]:
        raise NotImplementedError


def test_what_waits_for_the_same_is_asked_together() -> None:
    def task(lane: int, steps: int) -> Task[float]:
        yield Train((lane,), steps)
        bits = yield Evaluate(lane, "validation", DOMAINS)
        yield Train((lane,), 1)
        return float(bits["alpha"])

    notes = Notes()
    done = Scheduler(notes, range(0)).run([task(5, 2), task(6, 3), task(7, 2)])
    assert done == [5.0, 6.0, 7.0]
    assert notes.asked == [
        ("train", [5, 6, 7]),
        ("evaluate", [5, 7]),
        ("train", [5, 6, 7]),
        ("evaluate", [6]),
        ("train", [6]),
    ]


def test_room_is_given_in_order_and_comes_back() -> None:
    starts: dict[int, int] = {}

    def task(number: int, lanes: int, fails: bool = False) -> Task[int]:
        room = yield Claim(lanes)
        try:
            starts[number] = room.start
            yield Train((number,), 1)
            if fails:
                raise ValueError("on the way")
        finally:
            room.release()
        return number

    notes = Notes()
    scheduler = Scheduler(notes, range(10, 16))
    assert scheduler.run([task(0, 4), task(1, 4), task(2, 2), task(3, 2)]) == [0, 1, 2, 3]
    assert starts == {0: 10, 1: 10, 2: 14, 3: 10}, "no one is overtaken, and no lane held twice"
    assert notes.asked == [("train", [0]), ("train", [1, 2]), ("train", [3])]
    with pytest.raises(ValueError, match="on the way"):
        scheduler.run([task(0, 4), task(1, 2, fails=True)])
    assert scheduler.run([task(0, 6)]) == [0], "all lanes came back"

    def breaks_at_once() -> Task[int]:
        (yield Claim(2)).release()
        raise ValueError("before the others have their room")

    with pytest.raises(ValueError, match="before the others"):
        scheduler.run([breaks_at_once(), task(1, 4)])
    assert scheduler.run([task(0, 6)]) == [0], "room that nobody took came back"
    with pytest.raises(K1Error, match="6 spare lanes are too few"):
        scheduler.run([task(0, 7)])


def test_an_error_is_raised_in_the_task_that_asked() -> None:
    def task(lane: int) -> Task[str]:
        try:
            yield Train((lane,), 2)
        except RuntimeError as error:
            return str(error)
        return "fine"

    def helpless(lane: int) -> Task[str]:
        yield Train((lane,), 2)
        return "fine"

    scheduler = Scheduler(Notes(fails=1), range(0))
    assert scheduler.run([task(0), task(1), task(2)]) == ["fine", "dead", "fine"]
    closed = task(0)
    with pytest.raises(RuntimeError, match="dead"):
        scheduler.run([closed, helpless(1)])
    with pytest.raises(StopIteration):
        next(closed)


def test_a_room_covers_what_it_says() -> None:
    held = [False] * 5
    room = Room(held, slice(1, 4), 11)
    assert held == [False, True, True, True, False] and room.start == 11
    room.release()
    assert held == [False] * 5


def test_one_lane_that_fails_harms_no_other(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(lanes=6)
    trainer.arena.copy_lane(0, *range(1, 6))
    step = trainer.engine.step

    def dying(start: int, stop: int, *rest: Any) -> Any:
        if start <= 3 < stop:
            raise RuntimeError("dead")
        return step(start, stop, *rest)

    monkeypatch.setattr(trainer.engine, "step", dying)
    requests = [Train((0, 1), 2), Train((2, 3), 2), Train((5,), 4, anneal=True)]
    made = Separate(trainer.engine).train(requests)
    assert made[0] == 2 and isinstance(made[1], RuntimeError) and made[2] == 4
    assert trainer.arena.host_step == [2, 2, 0, 0, 0, 4]
    assert float(trainer.arena["lr_factor"][5]) == 0.25


# -- wide calls ---------------------------------------------------------------------------------


def wide_engine(make: Any, lanes: int) -> Trainer:
    trainer: Trainer = make(lanes=lanes + work_room(lanes), update={"attribution_every": 3})
    trainer.arena.copy_lane(0, *range(1, lanes))
    for lane in range(lanes):
        trainer.arena["data_seed"][lane] += lane
    trainer.engine = Engine(trainer.arena, trainer.store, lane_chunk=work_room(lanes))
    return trainer


def test_lanes_in_between_stay_as_they_are(make: Any) -> None:
    trainer = wide_engine(make, 6)
    before = [trainer.arena.hash_lane(lane) for lane in range(6)]
    requests = [Train((1,), 4), Train((3, 4), 2, anneal=True)]
    assert Wide(trainer.engine, 0, 6).train(requests) == [2, 2], "as far as the shortest goes"
    after = [trainer.arena.hash_lane(lane) for lane in range(6)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [1, 0, 1, 0, 0, 1]
    assert trainer.arena.host_step[:6] == [0, 2, 0, 2, 2, 0]
    assert trainer.arena["lr_factor"][:6].tolist() == [1, 1, 1, 0.5, 0.5, 1]


def test_wide_calls_come_to_the_same_as_separate_ones(make: Any) -> None:
    found = []
    for wide in (False, True):
        trainer = wide_engine(make, 6)
        calls = Wide(trainer.engine, 0, 6) if wide else Separate(trainer.engine)
        batch = trainer.store.sample(
            "gate", torch.arange(2), torch.zeros(2, dtype=torch.int64), trainer.arena["mix"][:2], 4
        )
        few = batch.head(2)

        def task(
            lanes: tuple[int, ...], own: Any, steps: int, mode: str | None = None
        ) -> Task[list[Any]]:
            yield Train(lanes, steps, mode=mode)
            yield Train(lanes, 4, anneal=True)
            bits = yield Evaluate(lanes[0], "validation", DOMAINS)
            scores = yield Score(lanes[0], lanes[0] + 2, own)
            return [*bits.values(), *scores]

        tasks = [task((0, 1), batch, 3), task((2, 3), few, 5), task((4, 5), batch, 2, "dense")]
        found.append(Scheduler(calls, range(0)).run(tasks))
        assert trainer.arena.host_step[:6] == [7, 7, 9, 9, 6, 6]
        assert trainer.engine.mode == trainer.config.update.mode
    assert len(found[0][0]) == 5
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
