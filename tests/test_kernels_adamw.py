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


def check_rows(name, size, dtype=torch.float32, device="cpu", some=True):
    from k1.kernels.adamw import Moves, move_rows

    generator = torch.Generator().manual_seed(size)
    config, before = CONFIGS[name], arena(size, generator)
    row, on = (ROW, ON) if some else (torch.arange(12), torch.arange(12) % 3 > 0)
    grad = torch.randn(len(row), size, generator=generator).to(dtype)
    grad[~on] = math.nan
    rate = torch.rand(len(row), generator=generator) * 1e-2
    factor = torch.linspace(0.5, 1.0, len(row))
    own = row[on]
    picked = Rows(*(value[1:-1][own] for value in vars(before).values()))
    wanted = adamw(picked, grad[on].float() * factor[on][:, None], rate[on], on[on], config)
    moves = Moves(torch.zeros(12, dtype=torch.bool), torch.full((12, 4), math.nan))
    moves.on[own] = True
    count = wanted.count.double()
    corrections = [1 - beta**count for beta in (config.beta1, config.beta2)]
    moves.terms[own] = torch.stack([rate[on], factor[on], *corrections], dim=1).float()
    moves = Moves(moves.on.to(device), moves.terms.to(device))
    found = [value.clone().to(device) for value in (before.weight, before.first, before.second)]
    move_rows(
        *(value[1:-1] for value in found), row.to(device) if some else None, grad.to(device),
        moves, config,
    )  # fmt: skip
    still = torch.ones(14, dtype=torch.bool)
    still[1:-1][own] = False
    for key, value in zip(("weight", "first", "second"), found, strict=True):
        old, value = getattr(before, key), value.cpu()
        torch.testing.assert_close(
            value[1:-1][own],
            getattr(wanted, key),
            rtol=1e-6,
            atol=1e-7 if device == "cpu" else 5e-7,
        )
        assert torch.equal(value[still], old[still]), key
        assert not torch.equal(value[~still], old[~still]), key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [40, 2500])
def test_rows_equal_the_plain_optimizer(interpreted, name, size):
    interpreted(check_rows, name, size)


def test_all_rows_in_order(interpreted):
    interpreted(check_rows, "usual", 40, torch.float32, "cpu", False)


def test_gradients_may_be_bfloat16(interpreted):
    interpreted(check_rows, "usual", 40, torch.bfloat16)


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_rows_equal_the_plain_optimizer(self, name, dtype):
        check_rows(name, 5000, dtype, "cuda")

    def test_all_rows_in_order(self):
        check_rows("usual", 5000, torch.float32, "cuda", False)
