"""Few wide calls in place of many: kept states, evaluations of all at once, records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k1.arena import LaneState
from k1.errors import K1Error
from k1.sampling import TokenStore
from k1.trainer import Trainer
from k1env.schedule import (
    RECORDS,
    Claim,
    Evaluate,
    Keep,
    Read,
    Records,
    Scheduler,
    Score,
    Separate,
    Task,
    Train,
    read_records,
)
from k1env.vector import Phase2VectorEnv
from tests.conftest import DOMAINS
from tests.phase2_helpers import quick
from tests.wide_helpers import lanes_of_all_kinds, wide

# -- kept states --------------------------------------------------------------------------------


def same_state(state: LaneState, arena: Any, lane: int) -> bool:
    tensors = {name: tensor[lane] for name, tensor in arena.state.items()}
    equal = all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())
    return state.tree.to_dict() == arena.trees[lane].to_dict() and equal


def test_a_kept_state_lasts_until_the_same_lane_is_kept_again(make: Any) -> None:
    trainer = lanes_of_all_kinds(make)
    arena, calls = trainer.arena, wide(trainer, keeps=4)
    hashes = [arena.hash_lane(lane) for lane in range(6)]
    three, one = calls.keep([Keep(3), Keep(1)])
    assert three.lent and same_state(three, arena, 3) and same_state(one, arena, 1)
    snapshot = three.own()
    trainer.engine.train(0, 6, 2)
    trainer.add_agent(1)
    arena.write_lane(5, three)
    assert arena.hash_lane(5) == hashes[3], "training does not reach it"
    trained = arena.hash_lane(3)
    (again,) = calls.keep([Keep(3)])
    assert same_state(again, arena, 3) and not same_state(snapshot, arena, 3)
    arena.write_lane(5, again)
    assert arena.hash_lane(5) == trained != hashes[3]
    arena.write_lane(5, snapshot)
    assert arena.hash_lane(5) == hashes[3], "what was taken before is not overwritten"
    arena.write_lane(5, one)
    assert arena.hash_lane(5) == hashes[1], "nor another lane's"
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, three.tensors[name]), "the first answer shows the second"
    with pytest.raises(K1Error, match="lane 4 has no row in the store of kept states"):
        calls.keep([Keep(0), Keep(4)])
    (apart,) = Separate(trainer.engine).keep([Keep(4)])
    assert not apart.lent and same_state(apart, arena, 4)


def test_a_snapshot_holds_its_best_state(data: Any) -> None:
    """Wide calls lend the best state; a snapshot is nobody else's."""
    envs = Phase2VectorEnv(2, config=quick(), data=data, device="cpu", wide=True)
    envs.reset(seed=0)
    sessions = [env.session for env in envs.envs]
    assert all(s.guard.best is not None and s.guard.best.lent for s in sessions)
    tensors, _ = envs.snapshot()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert any(".best." in name for name in before)
    envs.reset(seed=[5, 6])
    envs.step([0, 0])
    assert all(torch.equal(tensors[name], wanted) for name, wanted in before.items())


# -- evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(make: Any) -> Trainer:
    trainer = lanes_of_all_kinds(make)
    short = list(trainer.data.domains)[1]
    whole = trainer.store.extent.clone()
    # One domain's pool is too short for all windows, so that it has fewer of them.
    at = trainer.store.domains.index(short)
    whole[..., at, 1] = torch.minimum(whole[..., at, 1], torch.tensor(3 * 16 + 5))
    trainer.store.extent = whole
    return trainer


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 5),
        st.tuples(
            st.sets(st.sampled_from(DOMAINS)).map(sorted),
            st.sampled_from(["validation", "test"]),
            st.sampled_from([None, 1, 6]),
            st.booleans(),
        ),
        min_size=1,
    )
)
def test_evaluations_together_are_those_apart(
    measured: Trainer, asked: dict[int, tuple[list[str], str, int | None, bool]]
) -> None:
    requests = [
        Evaluate(lane, split, tuple(reversed(domains) if turned else domains), windows)
        for lane, (domains, split, windows, turned) in asked.items()
    ]
    wanted = Separate(measured.engine).evaluate(requests)
    found = wide(measured).evaluate(requests)
    for request, one, other in zip(requests, wanted, found, strict=True):
        assert isinstance(one, dict) and isinstance(other, dict)
        order = [d for d in measured.store.domains if d in request.domains]
        assert list(one) == list(other) == order
        assert other == pytest.approx(one, rel=1e-5)


def test_a_short_pool_has_fewer_windows(measured: Trainer) -> None:
    store = measured.store
    counts = [store.spread("validation", domain, 6).inputs.shape[1] for domain in store.domains]
    assert sorted(counts) == [3, 6, 6], "what the test above is about"


def test_evaluations_take_few_calls(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = lanes_of_all_kinds(make)
    spans: list[tuple[int, int]] = []
    measure = trainer.engine.bits_per_byte

    def counted(start: int, stop: int, batch: Any) -> Any:
        spans.append((start, stop))
        return measure(start, stop, batch)

    monkeypatch.setattr(trainer.engine, "bits_per_byte", counted)
    requests = [Evaluate(lane, "validation", DOMAINS[: 1 + lane % 3]) for lane in range(6)]
    wide(trainer).evaluate(requests)
    # As many as the most domains of one, each no wider than what is left asks for.
    assert spans == [(6, 22), (6, 10), (6, 10)]


def test_windows_that_were_cut_once_are_the_same_again(data: Any) -> None:
    store = TokenStore(data, 16, "cpu")
    for pool in ("validation", "test"):
        for windows in (2, 4):
            for domain in store.domains:
                first = store.spread(pool, domain, windows)
                assert store.spread(pool, domain, windows) is first
                other = TokenStore(data, 16, "cpu").spread(pool, domain, windows)
                assert first.inputs.shape[1] == windows
                assert torch.equal(first.inputs, other.inputs)
                assert torch.equal(first.domain, other.domain)


# -- records ------------------------------------------------------------------------------------


def test_records_are_those_of_direct_reads(make: Any) -> None:
    trainer = lanes_of_all_kinds(make)
    arena = trainer.arena
    for lanes in ([3], [4, 1], [0, 5, 2, 2], range(6)):
        found = wide(trainer).read([Read(lane) for lane in lanes])
        apart = Separate(trainer.engine).read([Read(lane) for lane in lanes])
        for lane, *both in zip(lanes, found, apart, strict=True):
            for records in both:
                assert list(records) == list(RECORDS)
                for name in RECORDS:
                    wanted = arena[name][lane].numpy()
                    assert records[name].dtype == wanted.dtype
                    assert np.array_equal(records[name], wanted)
    (kept,) = read_records(arena, [2])
    before = {name: np.array(values) for name, values in kept.items()}
    trainer.engine.train(0, 6, 3)
    assert all(np.array_equal(kept[name], before[name]) for name in RECORDS)
    assert not np.array_equal(kept["updates"], read_records(arena, [2])[0]["updates"])


# -- who comes first ----------------------------------------------------------------------------


class Notes:
    """Calls that only take notes; training goes as far as the shortest has left."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    def _note(self, kind: str, lanes: list[int], answer: Any) -> list[Any]:
        self.asked.append((kind, lanes))
        return [answer for _ in lanes]

    def train(self, requests: Sequence[Train]) -> list[int | Exception]:
        self.asked.append(("train", [r.lanes[0] for r in requests]))
        steps = min(r.steps - r.made for r in requests)
        return [r.made + steps for r in requests]

    def evaluate(self, requests: Sequence[Evaluate]) -> list[dict[str, float] | Exception]:
        return self._note("evaluate", [r.lane for r in requests], {})

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        return self._note("score", [r.start for r in requests], [])

    def read(self, requests: Sequence[Read]) -> list[Records]:
        return self._note("read", [r.lane for r in requests], {})

    def keep(self, requests: Sequence[Keep]) -> list[LaneState]:
        return self._note("keep", [r.lane for r in requests], None)


def decision(lane: int, steps: int) -> Task[int]:
    """A decision's end: train, then measure, keep and read."""
    yield Train((lane,), steps)
    yield Evaluate(lane, "validation", DOMAINS)
    yield Keep(lane)
    yield Read(lane)
    return lane


def test_ends_of_decisions_wait_until_half_are_there() -> None:
    notes = Notes()
    tasks = [decision(lane, steps) for lane, steps in enumerate((1, 2, 3, 4))]
    assert Scheduler(notes, range(0)).run(tasks) == [0, 1, 2, 3]
    assert notes.asked == [
        ("train", [0, 1, 2, 3]),
        ("train", [1, 2, 3]),  # one of four is there
        ("evaluate", [0, 1]),  # half of them
        ("keep", [0, 1]),
        ("read", [0, 1]),
        ("train", [2, 3]),  # the others are over
        ("evaluate", [2]),
        ("keep", [2]),
        ("read", [2]),
        ("train", [3]),
        ("evaluate", [3]),
        ("keep", [3]),
        ("read", [3]),
    ]


def test_a_trial_goes_before_what_trains() -> None:
    """Room is given first, windows are scored next: both lead to more that trains together."""

    def trial(lane: int) -> Task[int]:
        room = yield Claim(2)
        yield Score(lane, lane + 1, None)  # type: ignore[arg-type]
        yield Train((room.start, room.start + 1), 2)
        room.release()
        yield Train((lane,), 2)
        return room.start  # type: ignore[no-any-return]

    notes = Notes()
    tasks: list[Task[int]] = [decision(0, 2), trial(1), trial(2), decision(3, 1)]
    assert Scheduler(notes, range(10, 12)).run(tasks) == [0, 10, 10, 3]
    # Whoever waits for room counts as there: two of four train, so the end of the other's comes.
    assert notes.asked[:3] == [("score", [1]), ("train", [0, 10, 3]), ("evaluate", [3])]
    assert [kind for kind, _ in notes.asked].count("score") == 2
    held = [lanes for kind, lanes in notes.asked if kind == "train" and 10 in lanes]
    assert all(lanes.count(10) == 1 for lanes in held), "the room is held by one at a time"


KINDS = st.sampled_from(["train", "evaluate", "keep", "read", "score", "claim"])


@given(
    st.lists(
        st.lists(st.tuples(KINDS, st.integers(1, 5)), max_size=8), min_size=1, max_size=7
    ),
    st.integers(5, 9),
)  # fmt: skip
def test_no_task_starves(plans: list[list[tuple[str, int]]], spare: int) -> None:
    """Whatever tasks ask for in whatever order, all come to their ends, and in few calls."""

    def task(lane: int, plan: list[tuple[str, int]]) -> Task[int]:
        room = None
        for kind, number in plan:
            if room is not None:
                room.release()
                room = None
            if kind == "train":
                assert (yield Train((lane,), number)) is None
            elif kind == "evaluate":
                assert (yield Evaluate(lane, "validation", DOMAINS)) == {}
            elif kind == "keep":
                yield Keep(lane)
            elif kind == "read":
                yield Read(lane)
            elif kind == "score":
                yield Score(lane, lane + 1, None)  # type: ignore[arg-type]
            else:
                room = yield Claim(number)
        if room is not None:
            room.release()
        return lane

    notes = Notes()
    scheduler = Scheduler(notes, range(100, 100 + spare))
    assert scheduler.run([task(i, plan) for i, plan in enumerate(plans)]) == [*range(len(plans))]
    asked = [kind for plan in plans for kind, _ in plan if kind != "claim"]
    for kind in ("evaluate", "keep", "read", "score"):
        lanes = [lane for name, group in notes.asked if name == kind for lane in group]
        assert len(lanes) == asked.count(kind), "each is answered once"
    steps = [sum(n for kind, n in plan if kind == "train") for plan in plans]
    for lane, wanted in enumerate(steps):
        assert sum(kind == "train" and lane in group for kind, group in notes.asked) <= wanted
    assert scheduler.run([task(0, [("claim", spare)])]) == [0], "all lanes came back"
