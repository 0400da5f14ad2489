"""What has to hold on a CUDA device too. Run with `pytest -m gpu`."""

import pytest
import torch

from k1.forward import read_text
from k1.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_the_same_seed_gives_the_same_state(make, mode):
    hashes = set()
    for _ in range(2):
        trainer = Trainer(make(update={"mode": mode}).config, make().data, seed=3, device="cuda")
        trainer.train(20)
        hashes.add(trainer.state_hash())
    assert len(hashes) == 1


def test_cuda_computes_what_the_cpu_computes(make, data):
    trainer = make()
    trainer.train(5)
    other = Trainer(trainer.config, trainer.data, seed=3, device="cuda")
    other.arena.write_lane(0, trainer.arena.read_lane(0))
    tokens = data.tokens(data.domains[0], "train")[:16].long()[None]
    torch.testing.assert_close(
        other.logits(tokens).cpu(), trainer.logits(tokens), rtol=1e-3, atol=1e-3
    )


def test_a_path_gradient_is_the_full_gradient_of_the_leaf(make):
    trainer = Trainer(make().config, make().data, seed=3, device="cuda")
    engine, arena = trainer.engine, trainer.arena
    trainer.train(3)
    batch = trainer.store.sample("train", arena["data_seed"], arena["data_cursor"], arena["mix"], 4)
    text = read_text(batch, trainer.config)
    _, full, _, _ = engine.gradients(0, 1, batch, text)
    selection = engine._select(0, 1, arena["responsibility"])
    done = engine.path_pass(0, 1, batch, text, selection)
    leaf = int(selection.culprits[0, 0])
    level = trainer.tree.blocks[leaf].level
    found = done.gradients()[1][done.row.tolist().index(leaf)]
    expected = full[level][0, leaf - trainer.tree.offset[level]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
