"""The AdamW kernel against the plain optimizer."""

import math

import pytest
import torch

from k1.config import OptimizerConfig
from k1.optimizer import Rows, adamw
from tests.kernel_harness import ON_GPU

ROW = torch.tensor([0, 3, 2, 5, 5, 7, 11, 11, 6, 10])
ON = torch.tensor([True, True, False, False, False, True, False, False, True, True])
CONFIGS = {
    "usual": OptimizerConfig(),
    "fast": OptimizerConfig(beta1=0.3, beta2=0.9, weight_decay=0.1),
    "memoryless": OptimizerConfig(beta1=0.0, weight_decay=0.0),
}


def arena(size, generator, rows=14):
    """Rows of a larger arena, the rows of our lanes being those from 1 on to the last but one."""

    def draw():
        return torch.randn(rows, size, generator=generator)

    count = torch.randint(0, 200, (rows,), generator=generator)
    count[1], count[4] = 0, 5_000_000
    return Rows(draw(), draw(), draw().square(), count)


def check_rows(name, size, dtype=torch.float32, device="cpu"):
    from k1.kernels.adamw import adamw_rows

    generator = torch.Generator().manual_seed(size)
    config, before = CONFIGS[name], arena(size, generator)
    grad = torch.randn(len(ROW), size, generator=generator).to(dtype)
    grad[~ON] = math.nan
    rate = torch.rand(len(ROW), generator=generator) * 1e-2
    factor = torch.tensor([0.5, 1.0]).repeat_interleave(5)
    before = Rows(*(value.to(device) for value in vars(before).values()))
    step = [value.to(device) for value in (ROW, grad, rate, ON, factor)]
    row, grad, rate, on, factor = step
    own = row[on]
    picked = Rows(*(value[1:-1][own] for value in vars(before).values()))
    steps = (grad[on].float() * factor[on][:, None], rate[on], on[on], config)
    expected = {key: value.clone() for key, value in vars(before).items()}
    for key, value in vars(adamw(picked, *steps)).items():
        expected[key][1:-1][own] = value
    found = {key: value.clone() for key, value in vars(before).items()}
    adamw_rows(*(value[1:-1] for value in found.values()), *step, config)
    written = torch.zeros(14, dtype=torch.bool)
    written[1:-1][ROW[ON]] = True
    assert torch.equal(found["count"].cpu(), before.count.cpu() + written)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
        still, old = value.cpu()[~written], getattr(before, key).cpu()[~written]
        assert torch.equal(still, old), key
        assert not torch.equal(value.cpu()[written], getattr(before, key).cpu()[written]), key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [40, 2500])
def test_rows_equal_the_plain_optimizer(interpreted, name, size):
    interpreted(check_rows, name, size)


def test_gradients_may_be_bfloat16(interpreted):
    interpreted(check_rows, "usual", 40, torch.bfloat16)


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_rows_equal_the_plain_optimizer(self, name, dtype):
        check_rows(name, 5000, dtype, "cuda")
