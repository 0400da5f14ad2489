"""Whole steps by the kernels, against the same steps by plain PyTorch."""

import pytest
import torch

from k1 import edits
from k1.config import Config
from k1.data import TextData
from k1.engine import Engine
from k1.forward import read_text
from k1.trainer import Trainer

# Router, top_k, mode and inner steps.
CASES = [
    ("evidence", 3, "sparse", 1),
    ("mean", 5, "sparse", 1),
    ("learned", 6, "sparse", 2),
    ("learned", 2, "dense", 1),
]


def config_of(base: Config, router: str, top_k: int, mode: str, inner: int) -> Config:
    return base.replace(
        model={"router": router, "branching": (2, 2), "embed": 64, "feed_forward": 64, "heads": 2,
               "context": 16},
        train={"batch": 2, "top_k": top_k},
        update={"mode": mode, "inner_steps": inner},
    )  # fmt: skip


def build(config: Config, data: TextData, fused: bool) -> Engine:
    """Two lanes; the second lacks a leaf, and a whole subtree too."""
    trainer = Trainer(config, data, seed=3, lanes=2)
    trainer.arena.reset_lane(1, 7)
    for block in (3, 2):
        edits.delete_agent(trainer.arena, 1, trainer.arena.trees[1].slot_of(block))
    trainer.arena.fixed_room = fused  # as on a GPU
    return Engine(trainer.arena, trainer.store, lane_chunk=2, fused=fused)


def check_steps(config: Config, data: TextData) -> None:
    torch.set_num_threads(1)
    plain, fused = (build(config, data, fused) for fused in (False, True))
    assert fused.backend.fused and not plain.backend.fused
    for engine in (plain, fused):
        for _ in range(2):
            engine.step(0, 2)
        parent = engine.arena.trees[0].slot_of(1)
        edits.add_agent(engine.arena, 0, parent)  # what was made room for is not enough any more
        engine.step(0, 2)
    for name, wanted in plain.arena.state.items():
        found = fused.arena[name]
        if wanted.dtype.is_floating_point:
            # Adam turns rounding into steps where a gradient is about zero.
            assert float((found - wanted).norm() / wanted.norm().clamp(min=1e-9)) < 1e-4, name
        else:
            assert torch.equal(found, wanted), name
    batch = plain.store.spread("validation", data.domains[0], 4)
    scores = [engine.bits_per_byte(0, 2, batch) for engine in (plain, fused)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_steps_are_those_of_plain_pytorch(interpreted, make, data, case):
    interpreted(check_steps, config_of(make().config, *case), data)


def check_shared_gradient(config: Config, data: TextData) -> None:
    """Its every piece is written, and is that of plain PyTorch."""
    from k1.kernels.tree import TreePass, all_blocks

    torch.set_num_threads(1)
    engine = build(config, data, fused=True)
    engine.step(0, 2)  # gains and shifts begin as ones and zeros
    arena = engine.arena
    counter = torch.zeros(2, dtype=torch.int64)
    batch = engine.store.sample("train", counter, counter, arena["mix"], 3).head(2)
    text, forest = read_text(batch, config), arena.forest(0, 2)
    table = all_blocks(forest, arena.leaves(0, 2))
    done = TreePass(forest, batch, text, engine.inner_side).run(table)
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        found = done.gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    wanted_loss, _, wanted, _ = engine.gradients(0, 2, batch, text)
    torch.testing.assert_close(found.loss, wanted_loss)
    pieces = zip(
        arena.shared_layout.unpack(found.by_shared).items(),
        arena.shared_layout.unpack(wanted).values(),
        strict=True,
    )
    for (name, value), want in pieces:
        assert float((value - want).norm() / want.norm()) < 1e-5, name


@pytest.mark.parametrize("router", ["mean", "learned"])
def test_the_shared_gradient_is_complete(interpreted, make, data, router):
    interpreted(check_shared_gradient, config_of(make().config, router, 3, "dense", 1), data)
