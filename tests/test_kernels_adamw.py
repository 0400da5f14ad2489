"""The AdamW kernel against the plain optimizer."""

import math

import pytest
import torch

from k1.config import OptimizerConfig
from k1.optimizer import Rows, adamw
from tests.kernel_harness import ON_GPU

SLOTS = torch.tensor([[0, 3, 2, 5, 5], [1, 5, 5, 0, 4]])
ON = torch.tensor([[True, True, False, False, False], [True, False, False, True, True]])
CONFIGS = {
    "usual": OptimizerConfig(),
    "fast": OptimizerConfig(beta1=0.3, beta2=0.9, weight_decay=0.1),
    "memoryless": OptimizerConfig(beta1=0.0, weight_decay=0.0),
}


def arena(size, generator, lanes=2, slots=6):
    """Rows of a larger arena: the lanes in its middle."""

    def draw():
        return torch.randn(lanes + 2, slots, size, generator=generator)

    count = torch.randint(0, 200, (lanes + 2, slots), generator=generator)
    count[:, 0] = 0
    count[:, 1] = 5_000_000
    return Rows(draw(), draw(), draw().square(), count)


def expected_rows(before, slots, grad, rate, on, factor, config):
    """What the plain optimizer makes of the same step: gathered, moved, and written back."""
    target = (torch.arange(1, 3, device=slots.device)[:, None], slots)
    values = {name: value.clone() for name, value in vars(before).items()}
    rows = Rows(*(value[target] for value in values.values()))
    moved = adamw(rows, grad.float() * factor[:, None, None], rate, on, config)
    for name, value in values.items():
        own = value[1:3]
        for lane, row in on.nonzero().tolist():
            own[lane, slots[lane, row]] = getattr(moved, name)[lane, row]
    return values


def check_rows(name, size, dtype=torch.float32, device="cpu"):
    from k1.kernels.adamw import adamw_rows

    generator = torch.Generator().manual_seed(size)
    config, before = CONFIGS[name], arena(size, generator)
    grad = torch.randn(2, 5, size, generator=generator)
    grad[~ON] = math.nan
    rate = torch.rand(2, 5, generator=generator) * 1e-2
    before = Rows(*(value.to(device) for value in vars(before).values()))
    step = [SLOTS, grad.to(dtype), rate, ON, torch.tensor([0.5, 1.0])]
    step = [value.to(device) for value in step]
    expected = expected_rows(before, *step, config)
    found = {key: value.clone() for key, value in vars(before).items()}
    adamw_rows(*(value[1:3] for value in found.values()), *step, config)
    written = torch.zeros(4, 6, dtype=torch.bool)
    for lane, row in ON.nonzero().tolist():
        written[lane + 1, SLOTS[lane, row]] = True
    assert torch.equal(found["count"].cpu(), before.count.cpu() + written)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
        still, old = value.cpu()[~written], getattr(before, key).cpu()[~written]
        assert torch.equal(still, old), key
        assert not torch.equal(value.cpu()[written], getattr(before, key).cpu()[written]), key


def check_shared(size, device="cpu"):
    from k1.kernels.adamw import adamw_shared

    generator = torch.Generator().manual_seed(size)
    config = OptimizerConfig()
    rows = [torch.randn(3, size, generator=generator).abs().to(device) for _ in range(3)]
    count = torch.tensor([0, 7, 300], device=device)
    grad = torch.randn(3, size, generator=generator).to(device)
    rate = torch.tensor([1e-3, 2e-3, 3e-3], device=device)
    on = torch.tensor([True, False, True], device=device)
    factor = torch.tensor([1.0, 0.5, 0.25], device=device)
    expected = adamw(Rows(*rows, count), grad * factor[:, None], rate, on, config)
    found = Rows(*(value.clone() for value in rows), count.clone())
    adamw_shared(*vars(found).values(), grad, rate, on, factor, config)
    for key, value in vars(found).items():
        torch.testing.assert_close(value, getattr(expected, key), rtol=1e-6, atol=1e-7)
    assert torch.equal(found.weight[1], rows[0][1])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [40, 2500])
def test_rows_equal_the_plain_optimizer(interpreted, name, size):
    interpreted(check_rows, name, size)


def test_gradients_may_be_bfloat16(interpreted):
    interpreted(check_rows, "usual", 40, torch.bfloat16)


def test_shared_rows_equal_the_plain_optimizer(interpreted):
    interpreted(check_shared, 1500)


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_rows_equal_the_plain_optimizer(self, name, dtype):
        check_rows(name, 5000, dtype, "cuda")

    def test_shared_rows_equal_the_plain_optimizer(self):
        check_shared(5000, "cuda")
