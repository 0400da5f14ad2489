"""Methods of continual learning on the kernels, against the same by plain PyTorch."""

import pytest
import torch

import k1.engine
from k1.backend import Backend
from k1.data import TextData
from k1.experiments.learner import Learner
from k1.experiments.stream import views
from tests.experiment_helpers import Build

SIZES = {
    "model": {"embed": 64, "feed_forward": 64, "heads": 2, "context": 16, "spare": 2.0},
    "train": {"batch": 2, "top_k": 3},
}
METHODS = (
    "ewc", "si", "a-gem", "fixed-leaf", "k1-one-counter", "k1-own-grow", "k1-guarded-grow",
    "k1-versions",
)  # fmt: skip


def go(data: TextData, name: str) -> Learner:
    learner = Build(data)(name, strength=10.0, **SIZES)
    if hasattr(learner, "sequences"):
        learner.sequences = 2
    if hasattr(learner, "counted"):
        learner.counted = 2
    learner.arena.fixed_room = learner.engine.backend.fused  # as on a GPU
    for phase in range(2):
        learner.begin(phase)
        learner.train(0, 2, 2)
        learner.end()
    return learner


def check_method(data: TextData, name: str) -> None:
    torch.set_num_threads(1)
    plain = go(data, name)
    choose = k1.engine.choose_backend
    k1.engine.choose_backend = lambda *_: Backend(True, True, "test")
    try:
        fused = go(data, name)
    finally:
        k1.engine.choose_backend = choose
    assert fused.engine.backend.fused and not plain.engine.backend.fused
    for key, wanted in plain.arena.state.items():
        found = fused.arena[key]
        if wanted.dtype.is_floating_point:
            # Adam turns rounding into steps where a gradient is about zero.
            assert float((found - wanted).norm() / wanted.norm().clamp(min=1e-9)) < 1e-3, key
        else:
            assert torch.equal(found, wanted), key
    seen = views(plain.store, "validation", 4, 2)
    for view in ("windows", "passages"):
        bits = [torch.tensor(one.measure(seen, view)) for one in (plain, fused)]
        torch.testing.assert_close(bits[1], bits[0], rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_plain_pytorch(interpreted, data, name):
    interpreted(check_method, data, name)
