"""Starts of a vector environment: Phase 1 once for each, and episodes as by themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from k1.data import TextData
from k1.errors import K1Error
from k1env.env import Phase2Env
from k1env.instances import SPLITS, InstanceSet, instances_over
from k1env.outcome import MemoryLedger
from k1env.session import Session
from k1env.settings import Settings
from k1env.vector import Phase2VectorEnv
from tests.phase2_helpers import index_of, kinds, smallest
from tests.vector_helpers import same

SETTINGS: dict[str, Any] = {"max_decisions": 2, "phase1_steps": 3}
LABELS = ("add under slot 0", "tune lr x2", "no-op", "delete slot 3", "no-op", "tune top_k x2")


@pytest.fixture
def phase1(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How often Phase 1 was run from each seed."""
    counts: Counter[int] = Counter()
    begin = Session.begin_task

    def counted(self: Session) -> Any:
        counts[self.seed] += self.start is None
        return begin(self)

    monkeypatch.setattr(Session, "begin_task", counted)
    yield counts


def vector(data: TextData, count: int, starts: int | None, **fields: Any) -> Phase2VectorEnv:
    fields = {"config": smallest(**SETTINGS), "data": data, "device": "cpu", **fields}
    return Phase2VectorEnv(count, starts=starts, **fields)


def turn_of(envs: Phase2VectorEnv, turn: int) -> list[int]:
    return [
        index_of(envs.envs[0], LABELS[(turn + number) % len(LABELS)])
        for number in range(envs.num_envs)
    ]


@pytest.mark.parametrize(("count", "starts"), [(3, 2), (2, 5), (2, 1)])
def test_phase_1_runs_once_for_each_start(
    data: TextData, phase1: Counter[int], count: int, starts: int
) -> None:
    envs = vector(data, count, starts)
    assert not phase1, "nothing is trained before the first reset"
    envs.reset()
    met = Counter(env.session.seed for env in envs.envs)
    assert phase1 == {seed: 1 for seed in range(starts)}
    for turn in range(8):
        envs.step(turn_of(envs, turn))
        met.update(env.session.seed for env in envs.envs)
    assert set(met) <= set(range(starts)) and (len(met) == starts or starts > 4)
    assert +phase1 == {seed: 1 for seed in range(starts)}
    envs.reset(seed=[77 + i for i in range(count)])
    folded = [(77 + i) % starts for i in range(count)]
    assert [env.session.seed for env in envs.envs] == folded, "others stand for them in turn"
    for turn in range(4):
        envs.step(turn_of(envs, turn))
    assert +phase1 == {seed: 1 for seed in range(starts)}, "and no start is driven out"


def test_an_episode_is_that_of_an_environment_by_itself(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, first and later episodes, of worlds that the seed draws, and their logs."""
    monkeypatch.setattr("k1env.instances.BUDGET", (2, 2))
    monkeypatch.setattr("k1env.instances.SHAPES", {split: ((2, 2),) for split in SPLITS})
    monkeypatch.setattr("k1env.world.ROOM", (2, 2))
    own = InstanceSet("own", instances_over(data.domains)["train"])
    for instance in (None, own):
        ledgers = [MemoryLedger() for _ in range(2)]
        envs = vector(data, 2, 2, ledgers=ledgers, instance=instance)
        alone = [
            Phase2Env(config=smallest(**SETTINGS), data=data, device="cpu", instance=instance)
            for _ in range(2)
        ]
        observations, _ = envs.reset(seed=1)
        for i, env in enumerate(alone):
            observation, info = env.reset(seed=(1 + i) % 2)
            assert same(observation, {name: rows[i] for name, rows in observations.items()})
        met = set()
        for turn in range(8):
            actions = turn_of(envs, turn)
            results = envs.step_each(actions)
            for i, (env, result) in enumerate(zip(alone, results, strict=True)):
                *step, info = env.step(actions[i])
                if step[2] or step[3]:
                    assert result.final is not None and same(result.final, (step[0], info))
                    seed = envs.envs[i].session.seed
                    met.add(seed)
                    step[0], info = env.reset(options={}, seed=seed)
                found = result.observation, result.reward, result.terminated, result.truncated
                assert same(found, tuple(step)) and same(result.info, info)
        assert met == {0, 1}, "of both starts"
        for ledger, env in zip(ledgers, alone, strict=True):
            assert isinstance(env.ledger, MemoryLedger) and ledger.entries == env.ledger.entries
        assert kinds(envs.envs[0].session).count("start") >= 3, "of its own episodes alone"


def test_seeds_are_drawn_from_the_environments_generators(data: TextData) -> None:
    """Training the starts leaves generators alone."""
    envs = vector(
        data, 2, 3, config=smallest(**{**SETTINGS, "phase1_steps": 0, "max_decisions": 1})
    )
    for i, env in enumerate(envs.envs):
        env.np_random = np.random.default_rng(50 + i)
    envs.reset()
    drawn = [[env.session.seed for env in envs.envs]]
    for _ in range(5):
        envs.step([0, 0])
        drawn.append([env.session.seed for env in envs.envs])
    generators = [np.random.default_rng(50 + i) for i in range(2)]
    assert drawn == [[int(g.integers(1 << 31)) % 3 for g in generators] for _ in range(6)]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_a_snapshot_goes_on_to_the_same_bits_in_a_fresh_one(
    data: TextData, phase1: Counter[int], mode: str
) -> None:
    settings = [smallest(**{**SETTINGS, "max_decisions": 3})] * 2
    envs = vector(data, 2, 3, config=settings, autoreset_mode=mode)
    envs.reset(seed=8)
    for turn in range(2):
        envs.step(turn_of(envs, turn))
    tensors, state = envs.snapshot()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    state = json.loads(json.dumps(state))
    wanted = [envs.step(turn_of(envs, turn)) for turn in range(2, 8)]
    phase1.clear()
    again = vector(data, 2, 3, config=settings, autoreset_mode=mode)
    again.restore(tensors, state)
    assert same(wanted, [again.step(turn_of(again, turn)) for turn in range(2, 8)])
    hashes = [[env.session.trainer.state_hash() for env in both.envs] for both in (envs, again)]
    assert hashes[0] == hashes[1]
    assert +phase1 == {seed: 1 for seed in range(3)}
    envs.restore(tensors, state)
    assert same(wanted, [envs.step(turn_of(envs, turn)) for turn in range(2, 8)]), "in its own too"


def test_starts_that_make_no_sense(data: TextData) -> None:
    with pytest.raises(K1Error, match="starts = 0: use 1 or more, or None for all seeds"):
        vector(data, 2, 0)
    with pytest.raises(K1Error, match="starts = -3: use 1 or more"):
        vector(data, 2, -3)
    other: list[Settings] = [smallest(**SETTINGS), smallest(**{**SETTINGS, "phase1_steps": 7})]
    worlds = instances_over(data.domains)["train"][:2]
    for fields in ({"config": other}, {"instance": worlds}):
        vector(data, 2, None, **fields)
        with pytest.raises(K1Error, match="give them one config and one instance"):
            vector(data, 2, 2, **fields)
    vector(data, 2, 2, config=[other[0]] * 2, instance=[worlds[0]] * 2)


def test_a_start_that_cannot_be_trained_is_told_of_every_time(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = vector(data, 2, 3)
    engine = envs.envs[0].session.engine

    def dying(*_: Any) -> None:
        raise K1Error("Phase 2 cannot start")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "train_all", dying)
        broken.setattr(engine, "train", dying)
        for _ in range(2):
            with pytest.raises(K1Error, match="cannot start"):
                envs.reset(seed=0)
    envs.reset(seed=0)
    assert len(envs.envs[0]._trained) == 3
