"""The trees in ordinary modules compute what K-1 computes, and their steps do what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from k1.bench.drivers import StackedDriver, Stream
from k1.bench.stock import StockTrainer, Tree, children_of, fresh_tree, named_as_modules
from k1.bench.variants import VARIANTS
from k1.forward import Batch, read_text
from k1.trainer import Trainer
from tests.reference import make_ragged, next_batch, shake, small_config


def gradients_by_name(trainer: Trainer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """K-1's loss, and its gradients under the names of `Trainer.state_dict`."""
    arena = trainer.arena
    loss, levels, shared, _ = trainer.engine.gradients(
        0, 1, batch, read_text(batch, trainer.config)
    )
    named = {f"shared.{k}": v for k, v in arena.shared_layout.unpack(shared[0]).items()}
    for index, rows in zip(arena.index(0, 1), levels, strict=True):
        for slot, block in trainer.tree.blocks.items():
            if block.level == index.level:
                pieces = arena.block_layout.unpack(rows[0, slot - index.offset])
                named |= {f"block.{block.id}.{k}": v for k, v in pieces.items()}
    return loss[0], named


@pytest.mark.parametrize("router", ["learned", "mean"])
@pytest.mark.parametrize("ragged", [False, True])
def test_ordinary_modules_compute_the_same_loss_and_gradients(make, router, ragged):
    trainer = make(small_config(model={"router": router}))
    shake(make_ragged(trainer) if ragged else trainer)
    trainer.arena["log_prior"].zero_()  # counts of recency, which ordinary modules don't have
    batch = next_batch(trainer)
    loss, grads = gradients_by_name(trainer, batch)
    model = Tree(trainer.config, trainer.data.vocab_size, children_of(trainer.tree))
    wanted = set(model.state_dict())
    named = named_as_modules(trainer.state_dict(), trainer.tree)
    model.load_state_dict({name: value for name, value in named.items() if name in wanted})
    assert len(model.blocks) == len(trainer.tree.blocks)
    assert any("router" in name for name in wanted) == (router == "learned")

    own = model(batch.inputs[0], batch.targets[0])
    own.backward()

    torch.testing.assert_close(own, loss, rtol=1e-4, atol=1e-4)
    expected = named_as_modules(grads, trainer.tree)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        lone_child = "router" in name and len(parameter) == 1  # its weight is 1, whatever it says
        assert lone_child or parameter.grad.abs().max() > 1e-5, name


def test_all_variants_see_the_batches_that_the_engine_draws(make):
    trainer = make(seed=0)
    stream = Stream(trainer.store, trainer.config)
    for _ in range(3):
        drawn, own = stream.next(), next_batch(trainer)
        assert torch.equal(drawn.inputs, own.inputs) and torch.equal(drawn.targets, own.targets)
        trainer.step()


def test_the_stacked_driver_starts_from_the_engines_loss_and_lowers_it(make):
    trainer = make(small_config(model={"router": "learned"}, train={"lr": 3e-3}), seed=0)
    loss, _ = gradients_by_name(trainer, next_batch(trainer))
    driver = StackedDriver(trainer.arena, trainer.store, VARIANTS["dense-compiled"].plain)
    driver.prepare(1)
    batch = driver.batches[0]
    before = driver.loss(driver.rows, driver.shared, batch).detach()
    torch.testing.assert_close(before, loss)
    for _ in range(5):
        driver.run(1)
    assert driver.loss(driver.rows, driver.shared, batch) < before - 0.01


def stock(make, **options) -> tuple[StockTrainer, Batch]:
    trainer = make(small_config(train=options.pop("train", {})))
    model = fresh_tree(trainer.config, trainer.data.vocab_size, torch.device("cpu"))
    return StockTrainer(model, trainer.config, **options), next_batch(trainer)


def test_toggling_moves_one_path_and_the_shared_part(make):
    trainer, batch = stock(make, toggle=True)
    for leaf in (3, 4):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.step(batch.inputs[0], batch.targets[0])
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        blocks = {int(name.split(".")[1]) for name in moved if name.startswith("blocks.")}
        assert blocks == {0, 1, leaf}
        assert {"embedding.weight", "head.weight", "position", "norm.weight"} <= moved


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("toggle", [False, True])
def test_bfloat16_keeps_float32_masters(make, autocast, toggle):
    # A rate so small that bfloat16 weights of size 1 would not move by it.
    half = {"precision": "bfloat16", "lr": 1e-4}
    trainer, batch = stock(make, autocast=autocast, toggle=toggle, train=half)
    before = [m.detach().clone() for m in trainer.masters]
    losses = [float(trainer.step(batch.inputs[0], batch.targets[0])) for _ in range(8)]
    assert losses[-1] < losses[0]
    norm = next(i for i, m in enumerate(before) if torch.equal(m, torch.ones_like(m)))
    assert trainer.masters[norm].dtype == torch.float32
    assert not torch.equal(trainer.masters[norm], before[norm])
    assert all(p.dtype == (torch.float32 if autocast else torch.bfloat16)
               for p in trainer.model.parameters())  # fmt: skip
    for parameter, master in zip(trainer.parameters, trainer.masters, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype))
