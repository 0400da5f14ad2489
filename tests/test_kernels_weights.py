"""The kernels for the gradients of rows, against autograd through the folding in float64."""

import pytest
import torch

from k1.block import block_layout, fold
from k1.config import ModelConfig
from tests.kernel_harness import ON_GPU, Draw, device, repeats_in_a_graph

# Embed, feed-forward, children, tokens, arena row of each block (4 slots a lane, of which the last
# is scratch), blocks that may route (None: the `mean` router).
CASES = {
    "several-lanes": (64, 128, 8, 100, (0, 4, 3, 6, 7, 2), 3),
    "split": (64, 64, 5, 1100, (2, 1), 1),
    "wide": (128, 256, 8, 130, (1, 0), 2),
    "edge": (128, 192, 20, 70, (5,), 1),
    "narrow": (128, 64, 3, 1030, (0, 3), 1),
    "mean": (64, 64, 8, 64, (1, 2, 0), None),
    "all-leaves": (64, 64, 8, 48, (1, 2), 0),
}
SLOTS = 4


def draw_factors(blocks, tokens, d, f, ranks, dtype):
    from k1.kernels.backward import Factors
    from k1.kernels.block import Kept

    draw = Draw(blocks + tokens + f, dtype)

    def values(width):
        return draw(blocks, tokens, width).to(dtype)

    none = torch.full((blocks, tokens), torch.nan, device=device())
    nothing = torch.full((blocks, tokens, f), torch.nan, dtype=dtype, device=device())
    kept = Kept(values(d), none, values(3 * d), values(d), values(d), none, nothing)
    factors = Factors(values(3 * d), values(d), values(f), values(f))
    return kept, factors, values(d), (values(d), values(ranks)), draw


def expected(rows, layout, kept, factors, dy, router, inner):
    """Autograd through the folding, given products and sums in float64."""

    def product(a, b):
        return torch.bmm(a.double().transpose(1, 2), b.double())

    by_folded = [
        product(kept.normed_1, factors.by_qkv),
        factors.by_qkv.double().sum(1),
        product(kept.attended, factors.by_middle),
        product(kept.normed_2, factors.by_hidden),
        factors.by_hidden.double().sum(1),
        product(factors.act, dy),
        dy.double().sum(1),
    ]
    rows = rows.double().requires_grad_()
    with torch.enable_grad():
        folded = fold(layout.unpack(rows), torch.float64).tensors()
        (by_row,) = torch.autograd.grad(folded, rows, by_folded)
    by_piece = {name: piece.clone() for name, piece in layout.unpack(by_row).items()}
    if router is not None:
        normed, by_logits = (t[:inner] for t in router)
        by_piece["router.weight"][:inner] = product(normed, by_logits)
        by_piece["router.bias"][:inner] = by_logits.double().sum(1)
    return by_piece


def check_row_gradients(case, dtype):
    from k1.kernels.weights import row_gradients

    d, f, ranks, tokens, row, inner = CASES[case]
    layout = block_layout(ModelConfig(embed=d, feed_forward=f, max_children=ranks))
    kept, factors, dy, router, draw = draw_factors(len(row), tokens, d, f, ranks, dtype)
    if inner is None:
        router = None
    elif inner < len(row):
        for values in router:
            values[inner:] = torch.nan  # nobody writes there
    rows = draw(2 * SLOTS, layout.total)
    index = torch.tensor(row, device=device())

    def gradients():
        return row_gradients(kept, factors, dy, router, rows, index, SLOTS, inner or 0, layout)

    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN, where it shows
    try:
        by_row, squares = gradients()
        again = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert by_row.dtype == squares.dtype == torch.float32
    assert by_row.shape == (len(row), layout.total) and squares.shape == (len(row),)
    wanted = expected(rows[index], layout, kept, factors, dy, router, inner or 0)
    live = [at for at, block in enumerate(row) if block % SLOTS != SLOTS - 1]
    for name, piece in layout.unpack(by_row).items():
        for at in live:
            found, want = piece[at].double(), wanted[name][at]
            if not want.any():
                assert not found.any(), name
                continue
            assert float((found - want).norm() / want.norm()) < 1e-4, (name, at)
    for at in live:
        square = float(sum(piece[at].square().sum() for piece in wanted.values()))
        assert float(squares[at]) == pytest.approx(square, rel=1e-4)
    assert torch.equal(again[0][live], by_row[live])
    assert torch.equal(again[1][live], squares[live])


@pytest.mark.parametrize("case", CASES)
def test_row_gradients(interpreted, case):
    interpreted(check_row_gradients, case, torch.float32)


@pytest.mark.parametrize("case", [pytest.param(case, marks=ON_GPU) for case in CASES])
def test_row_gradients_on_a_gpu(case):
    check_row_gradients(case, torch.bfloat16)


@pytest.mark.parametrize("case", [pytest.param("split", marks=ON_GPU)])
def test_row_gradients_repeat_in_a_graph(case):
    from k1.kernels.weights import row_gradients

    d, f, ranks, tokens, row, inner = CASES[case]
    layout = block_layout(ModelConfig(embed=d, feed_forward=f, max_children=ranks))
    kept, factors, dy, router, draw = draw_factors(len(row), tokens, d, f, ranks, torch.bfloat16)
    rest = draw(2 * SLOTS, layout.total), torch.tensor(row, device=device()), SLOTS, inner, layout
    assert repeats_in_a_graph(lambda: list(row_gradients(kept, factors, dy, router, *rest)))


def check_steps():
    from k1.kernels.weights import count_steps

    assert count_steps(18, 1100, 264) == 8  # as in the case "split": three parts
    assert count_steps(32, 16384, 264) == 32  # eight parts, all at once
    assert count_steps(35, 16384, 264) == 40  # seven parts: eight would not go at once
    assert count_steps(10_000, 16384, 264) == 256
    assert count_steps(1, 100, 264) == 2
    assert count_steps(1, 10**6, 264) >= 10**6 / 64 / 32  # a sum has at most 32 parts


def test_programs_fill_the_device_once(interpreted):
    interpreted(check_steps)
