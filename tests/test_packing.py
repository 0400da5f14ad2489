"""Lanes that are copied side by side, trained there and copied back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k1.engine import Engine
from k1.errors import K1Error
from k1.packing import MEASURED, WorkArea, write_rows
from k1.trainer import Trainer
from k1env.schedule import Evaluate, Score, Separate, Train
from k1env.vector import Phase2VectorEnv
from k1env.wide import WIDEST, WIDTHS, width_for, work_room
from tests.conftest import DOMAINS
from tests.phase2_helpers import quick
from tests.wide_helpers import lanes_of_all_kinds, wide


class Spans:
    """Notes ranges that reach the engine, and trains nothing."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[int, int]] = []
        self.measured: list[tuple[int, int]] = []
        self.engine = engine
        monkeypatch.setattr(engine, "train", self.train)
        monkeypatch.setattr(engine, "bits_per_byte", self.measure)

    def train(self, start: int, stop: int, steps: int, factor: Any) -> None:
        self.trained.append((start, stop))
        self.engine.arena["step"][start:stop] += steps
        for lane in range(start, stop):
            self.engine.arena.host_step[lane] += steps

    def measure(self, start: int, stop: int, batch: Any) -> torch.Tensor:
        self.measured.append((start, stop))
        return torch.arange(start, stop, dtype=torch.float64)


@pytest.fixture(scope="module")
def crowd(data: Any) -> Trainer:
    """Very many very small lanes."""
    config = quick().system.replace(model={"branching": (1,)}, train={"top_k": 1})
    trainer = Trainer(config, data, seed=0, lanes=300 + work_room(300))
    trainer.arena.copy_lane(0, *range(1, 300))
    return trainer


def test_a_work_area_is_as_wide_as_its_widest_call() -> None:
    assert [width_for(n) for n in (1, 4, 5, 64, 65, 129, 256)] == [4, 4, 16, 64, 128, 192, 256]
    assert [work_room(n) for n in (1, 20, 256, 9999)] == [4, 32, 256, WIDEST]


@settings(max_examples=30, deadline=None)
@example([(set(range(300)), 2, False), (set(range(20, 290)), 1, True)])
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 299), min_size=1), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_is_asked_for_the_engine_meets_few_ranges(
    crowd: Trainer, rounds: list[tuple[set[int], int, bool]]
) -> None:
    """Thus few graphs: one range for each width, whichever lanes and however many."""
    arena = crowd.arena
    with pytest.MonkeyPatch.context() as patch:
        spans, calls = Spans(crowd.engine, patch), wide(crowd, 300)
        for some, steps, measured in rounds:
            before, host = arena["step"][:300].clone(), arena.host_step[:300]
            if measured:
                calls.evaluate([Evaluate(lane, "validation", DOMAINS) for lane in some])
                calls.score([Score(lane, lane + 1, crowd.engine.store.spread("gate", DOMAINS[0], 1))
                             for lane in some])  # fmt: skip
            else:
                calls.train([Train((lane,), steps) for lane in some])
            own = torch.tensor([lane in some and not measured for lane in range(300)])
            assert torch.equal(arena["step"][:300], before + steps * own)
            assert arena.host_step[:300] == [
                h + steps * int(o) for h, o in zip(host, own, strict=True)
            ]
    every = {*spans.trained, *spans.measured}
    assert every <= {(300, 300 + width) for width in WIDTHS}
    for some, _, measured in rounds:
        calls_for = -(-len(some) // WIDEST)
        assert not measured or len(spans.measured) >= calls_for * (len(DOMAINS) + 1)
    assert len(spans.trained) == sum(-(-len(r[0]) // WIDEST) for r in rounds if not r[2])


def prepared(make: Any, mode: str, every: int) -> Trainer:
    """Lanes of all kinds with settings of their own."""
    trainer = lanes_of_all_kinds(make, update={"mode": mode, "attribution_every": every})
    for lane in range(6):
        trainer.arena.set_hyper(lane, "lr", 0.001 * (1 + lane))
        trainer.arena.set_hyper(lane, "top_k", 1 + lane)
        trainer.arena.set_hyper(lane, "cooldown", lane)
    return trainer


@pytest.mark.parametrize(
    ("mode", "every"), [("sparse", 1), ("sparse", 3), ("exact", 1), ("dense", 1)]
)
def test_packed_lanes_are_trained_as_alone(make: Any, mode: str, every: int) -> None:
    """Trees, settings, streams and steps differ; lanes that no call is about keep every bit."""
    together, alone = prepared(make, mode, every), prepared(make, mode, every)
    steps = together.arena.host_step[:6]
    assert len({step % 3 for step in steps}) > 1, "probes are due at different steps"
    before = [together.arena.hash_lane(lane) for lane in range(6)]
    requests = [Train((5,), 4), Train((0, 2), 4, anneal=True), Train((3,), 4)]
    assert wide(together).train(requests) == [4, 4, 4]
    Separate(alone.engine).train(requests)
    assert together.arena.host_step[:6] == alone.arena.host_step[:6]
    for lane in range(6):
        if lane in (1, 4):
            assert together.arena.hash_lane(lane) == before[lane]
        else:
            assert together.arena.hash_lane(lane) != before[lane]
        for name, tensor in together.arena.state.items():
            wanted = alone.arena[name][lane]
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor[lane], wanted, rtol=1e-3, atol=1e-5, msg=name)
            elif name != "evidence":  # it counts shares, which are rounded
                assert torch.equal(tensor[lane], wanted), name


def test_a_lane_does_not_depend_on_its_company(make: Any) -> None:
    """The same shapes give the same bits, whoever is beside and whatever fills up the call."""
    hashes = []
    for beside in ((0, 3, 5), (1, 5, 4), (5,)):
        trainer = prepared(make, "sparse", 1)
        for lane in range(6):  # one tree for all, for on a CPU shapes follow trees
            trainer.arena.reset_lane(lane, lane)
        if beside == (5,):
            trainer.arena["weight"][6:] = torch.nan  # what was left there reaches nobody
            trainer.arena["evidence"][6:] = 7
        wide(trainer).train([Train((lane,), 3) for lane in beside])
        hashes.append(trainer.arena.hash_lane(5))
    assert len(set(hashes)) == 1


def test_training_on_begins_with_what_came_back(make: Any) -> None:
    """The work area keeps nothing: lanes changed in between come as they are, trees too."""
    one, other = prepared(make, "sparse", 1), prepared(make, "sparse", 1)
    request = [Train((2,), 2), Train((4,), 2)]
    calls = wide(one)
    for trainer, train in ((one, calls.train), (other, Separate(other.engine).train)):
        for _ in range(2):
            train(request)
            trainer.at(2).add_agent(1)
            trainer.arena.set_hyper(4, "lr", 0.03)
            trainer.arena.copy_lane(4, 5)
    first, second = (t.arena for t in (one, other))
    for lane in (2, 4, 5):
        assert first.trees[lane].to_dict() == second.trees[lane].to_dict()
        torch.testing.assert_close(
            first["weight"][lane], second["weight"][lane], rtol=1e-3, atol=1e-5
        )
    asked = [Evaluate(2, "validation", DOMAINS)]
    for edited in (False, True):
        if edited:
            one.at(2).add_agent(1)
        (found,) = calls.evaluate(asked)
        assert found == pytest.approx(Separate(one.engine).evaluate(asked)[0], rel=1e-5)


def test_an_error_on_the_way_leaves_lanes_as_they_were(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = lanes_of_all_kinds(make)
    before = [trainer.arena.hash_lane(lane) for lane in range(6)]
    host, step, made = list(trainer.arena.host_step), trainer.engine.step, []

    def dying(start: int, stop: int) -> Any:
        made.append(step(start, stop))
        if len(made) == 2:
            raise RuntimeError("dead")

    monkeypatch.setattr(trainer.engine, "step", dying)
    with pytest.raises(RuntimeError, match="dead"):
        wide(trainer).train([Train((1, 2), 3)])
    assert [trainer.arena.hash_lane(lane) for lane in range(6)] == before
    assert trainer.arena.host_step[:6] == host[:6] and len(made) == 2


def test_a_packed_range_holds_copies_and_copies_of_the_first(make: Any) -> None:
    arena = prepared(make, "sparse", 1).arena
    area, before = WorkArea(arena, 6), [arena.hash_lane(lane) for lane in range(6)]
    arena.set_hyper(8, "lr", 0.5)
    assert arena.get_hyper(8)["lr"] == 0.5
    assert area.pack([4, 1], 4) == (6, 10)
    for copy, lane in zip(range(6, 10), (4, 1, 4, 4), strict=True):
        assert arena.hash_lane(copy) == before[lane]
        assert arena.host_step[copy] == arena.host_step[lane]
        assert arena.host_top_k[copy] == arena.host_top_k[lane] == 1 + lane
        assert arena.get_hyper(copy) == arena.get_hyper(lane)
    area.unpack()
    assert [arena.hash_lane(lane) for lane in range(6)] == before


@pytest.mark.parametrize("lanes", [[6], [0, 22], [-1], [1, 1], []])
def test_only_lanes_before_the_work_area_are_packed(make: Any, lanes: list[int]) -> None:
    area = WorkArea(lanes_of_all_kinds(make).arena, 6)
    with pytest.raises(K1Error, match="work area"):
        area.pack(lanes, 4)
    with pytest.raises(K1Error, match="no room in the work area"):
        area.pack([0, 1, 2], 2)
    with pytest.raises(K1Error, match="no room in the work area"):
        area.pack([0], 17)
    area.pack([0, 3], 4, MEASURED)
    with pytest.raises(K1Error, match="packed whole"):
        area.unpack()


@pytest.mark.parametrize("told", [False, True])
def test_rows_are_written_whatever_torch_was_told(told: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(told)
    try:
        target = torch.zeros(4, 2)
        write_rows([target], torch.tensor([2, 0]), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
        assert target.tolist() == [[3, 4], [0, 0], [1, 2], [0, 0]]
        with pytest.raises(IndexError):
            write_rows([target], torch.tensor([4]), [torch.ones(1, 2)])
        assert torch.are_deterministic_algorithms_enabled() == told
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("wide_calls", [False, True])
def test_nobody_is_given_lanes_of_the_work_area(data: Any, wide_calls: bool) -> None:
    envs = Phase2VectorEnv(2, config=quick(), data=data, device="cpu", wide=wide_calls)
    session = envs.envs[0].session
    others = 4 + len(session.scheduler.spare)
    area = work_room(others) if wide_calls else 0
    assert session.scheduler.spare == range(4, others)
    assert session.arena.lanes == others + area
