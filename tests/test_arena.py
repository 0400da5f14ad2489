"""Rows of the arena: what the host remembers of them is true, and copies share nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from k1.arena import Arena, LaneState, copy_all
from tests.reference import make_ragged, same_bits, small_config

MIXES = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.1, 0.2, 0.7))


def filled(lanes: int) -> Arena:
    """Lanes that differ in every number and in their trees."""
    arena = Arena(small_config(), 64, 3, lanes)
    for lane in range(lanes):
        arena.reset_lane(lane, lane, (1 + lane % 3, 2))
        generator = torch.Generator().manual_seed(lane)
        for name, tensor in arena.state.items():
            if name not in ("step", "top_k"):
                tensor[lane] = torch.randint(1, 99, tensor.shape[1:], generator=generator)
        arena["step"][lane] = arena.host_step[lane] = lane + 3
        arena.set_hyper(lane, "top_k", lane + 2)
    return arena


def check_host(arena: Arena) -> None:
    """See that nothing that the host remembers differs from what the lanes hold."""
    for lane in range(arena.lanes):
        assert arena.host_step[lane] == int(arena["step"][lane])
        assert arena.host_top_k[lane] == int(arena["top_k"][lane])
        for name, value in arena.get_hyper(lane).items():
            assert value == arena[name][lane].item()
        known = arena._mix[lane]
        assert known is None or same_bits(torch.tensor(known), arena["mix"][lane])


@pytest.mark.parametrize("seed", range(8))
def test_a_mix_is_what_was_set_last(seed: int) -> None:
    """Whatever came in between: lanes that were reset, copied, read, written, or copied a mix."""
    rng, arena = np.random.default_rng(seed), Arena(small_config(), 64, 3, 4)
    for lane in range(4):
        arena.reset_lane(lane, lane)
    wanted = [torch.full((3,), 1 / 3) for _ in range(4)]
    saved: list[tuple[LaneState, torch.Tensor]] = []
    done = set()
    for _ in range(120):
        lane, other = (int(n) for n in rng.choice(4, 2, replace=False))
        kind = str(rng.choice(["set", "set", "mix", "reset", "copy", "read", "write", "hyper"]))
        if kind == "set":
            shares = MIXES[int(rng.integers(3))]
            arena.set_mix(lane, shares)
            wanted[lane] = torch.tensor(shares)
        elif kind == "mix":
            arena.copy_mix(other, lane)
            wanted[lane] = wanted[other].clone()
        elif kind == "reset":
            arena.reset_lane(lane, 7)
            wanted[lane] = torch.full((3,), 1 / 3)
        elif kind == "copy":
            arena.copy_lane(other, lane)
            wanted[lane] = wanted[other].clone()
        elif kind == "read":
            saved.append((arena.read_lane(lane), wanted[lane].clone()))
        elif kind == "write" and saved:
            state, mix = saved[int(rng.integers(len(saved)))]
            arena.write_lane(lane, state)
            wanted[lane] = mix.clone()
        elif kind == "hyper":
            arena.set_hyper(lane, "lr", float(rng.random()))
        done.add(kind)
        assert all(same_bits(arena["mix"][i], wanted[i]) for i in range(4)), kind
        check_host(arena)
    assert len(done) == 7


def test_a_mix_that_is_there_is_not_written_again() -> None:
    """A write waits for the device, and decisions set the mix again and again."""
    arena = filled(2)
    arena.set_mix(0, MIXES[2])
    arena.copy_mix(0, 1)
    before = arena["mix"]._version
    arena.set_mix(0, MIXES[2])
    arena.set_mix(1, MIXES[2])
    arena.copy_mix(0, 1)
    assert arena["mix"]._version == before
    arena.set_mix(1, MIXES[0])
    assert arena["mix"]._version > before
    assert same_bits(arena["mix"], torch.tensor([MIXES[2], MIXES[0]]))


def test_tensors_of_all_kinds_are_copied_together() -> None:
    kinds = (torch.float32, torch.int64, torch.bool, torch.float64)
    sources = [torch.arange(6).view(2, 3).to(kind) for kind in kinds for _ in range(2)]
    sources += [torch.tensor(5.0), torch.zeros(0, 3), torch.arange(3.0).expand(2, 3)]
    targets = [torch.ones(s.shape, dtype=s.dtype) for s in sources]
    where = [t.data_ptr() for t in targets]
    copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert where == [t.data_ptr() for t in targets]
    targets[0].fill_(9)
    assert not (sources[0] == 9).any()
    with pytest.raises(ValueError, match=r"shorter|longer"):
        copy_all(targets, sources[1:])


@pytest.mark.parametrize(
    ("source", "targets"),
    [(0, (1, 2, 3)), (2, (3, 4)), (2, (0, 1)), (2, (1, 3)), (0, (4, 2)), (1, (0, 1, 2)), (3, (3,))],
)
def test_a_copy_goes_where_it_should_and_shares_nothing(
    source: int, targets: tuple[int, ...]
) -> None:
    arena = filled(5)
    before = [arena.hash_lane(lane) for lane in range(5)]
    assert len(set(before)) == 5
    arena.copy_lane(source, *targets)
    wanted = [before[source] if lane in targets else before[lane] for lane in range(5)]
    assert [arena.hash_lane(lane) for lane in range(5)] == wanted
    check_host(arena)
    for changed in sorted({source, *targets}):
        change(arena, changed)
        others = [lane for lane in range(5) if lane != changed]
        assert [arena.hash_lane(lane) for lane in others] == [wanted[lane] for lane in others]
        wanted[changed] = arena.hash_lane(changed)
        assert wanted[changed] not in before
        check_host(arena)


def change(arena: Arena, lane: int) -> None:
    """Change all numbers of a lane, and its tree in place."""
    for name, tensor in arena.state.items():
        if name not in ("step", "top_k"):
            tensor[lane] += lane + 1
    arena["step"][lane] += lane + 1
    arena.host_step[lane] += lane + 1
    arena.set_hyper(lane, "top_k", lane + 11)
    arena._mix[lane] = None
    tree = arena.trees[lane]
    tree.remove(1)
    arena.set_tree(lane, tree)


def test_a_lane_that_was_read_or_written_shares_nothing() -> None:
    arena = filled(3)
    arena.set_mix(0, MIXES[1])
    wanted, saved = arena.hash_lane(0), arena.read_lane(0)
    change(arena, 0)
    arena.write_lane(1, saved)
    assert arena.hash_lane(1) == wanted
    change(arena, 1)
    arena.write_lane(2, saved)
    assert arena.hash_lane(2) == wanted, "neither lane reached the copy"
    for tensor in saved.tensors.values():
        tensor.zero_()
    saved.tree.remove(1)
    assert arena.hash_lane(2) == wanted, "nor the copy the lane"
    arena.set_mix(2, MIXES[1])
    check_host(arena)


def test_a_state_of_ones_own_is_not_cloned_but_a_lent_one_is() -> None:
    arena = filled(2)
    own = arena.read_lane(0)
    assert own.own() is own
    lent = LaneState({n: t[0] for n, t in arena.state.items()}, arena.trees[0].copy(), lent=True)
    kept, wanted = lent.own(), arena.hash_lane(0)
    assert not kept.lent and kept.own() is kept
    assert lent.to("cpu").lent, "on the same device it still is somebody else's"
    change(arena, 0)
    lent.tree.remove(1)
    arena.write_lane(1, kept)
    assert arena.hash_lane(1) == wanted


def test_a_fork_with_its_mix_in_mind_is_no_fork_of_its_mix(make: Any) -> None:
    """A trainer, its fork and a lane beside it set mixes in turns."""
    trainer = make_ragged(make())
    trainer.set_mix({"alpha": 1.0})
    fork = trainer.fork()
    fork.set_mix({"beta": 1.0})
    trainer.set_mix({"alpha": 1.0})
    assert trainer.arena["mix"][0].tolist() == [1, 0, 0]
    assert fork.arena["mix"][0].tolist() == [0, 1, 0]
    state = trainer.arena.read_lane(0)
    trainer.set_mix({"gamma": 1.0})
    trainer.arena.write_lane(0, state)
    assert trainer.arena["mix"][0].tolist() == [1, 0, 0]
    trainer.set_mix({"gamma": 1.0})
    assert trainer.arena["mix"][0].tolist() == [0, 0, 1]
