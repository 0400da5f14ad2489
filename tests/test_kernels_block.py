"""The kernels that run blocks, against the plain code in float64."""

import pytest
import torch

from k1.block import Folded, block_forward, block_layout, fold, initial_rows
from k1.config import ModelConfig
from tests.kernel_harness import ON_GPU, device

# Windows, tokens in each, embed, heads, feed-forward: several windows to a program, one, and one
# in parts; the last tokens of the first fill no program.
SIZES = [
    (3, 32, 64, 4, 64),
    (3, 64, 64, 2, 192),
    (1, 128, 64, 4, 128),
    (1, 256, 64, 2, 64),
    (2, 16, 128, 4, 64),
]
LARGE = [
    (5, 64, 128, 4, 256),
    (2, 128, 128, 8, 192),
    (3, 32, 256, 4, 512),
    (2, 64, 256, 8, 512),
    (1, 256, 256, 4, 512),
]
SOURCE = [1, -1, 0]
WEIGHT = [2, 0, 1]


def close(found, wanted, dtype):
    error = float((found.double() - wanted.detach()).norm() / wanted.detach().norm())
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2)


def draw_blocks(blocks, embed, heads, feed_forward, dtype, generator):
    layout = block_layout(ModelConfig(embed=embed, feed_forward=feed_forward, heads=heads))
    rows = initial_rows(layout, blocks, generator)
    rows += torch.randn(rows.shape, generator=generator) * 0.1
    return rows.to(device()), layout, fold(layout.unpack(rows.to(device())), dtype)


def check_blocks(size, dtype):
    from k1.kernels.backward import Factors, backward_inputs
    from k1.kernels.block import Kept, run_blocks
    from k1.kernels.weights import row_gradients

    windows, time, d, heads, f = size
    generator = torch.Generator().manual_seed(time)
    rows, layout, folded = draw_blocks(3, d, heads, f, dtype, generator)
    folded = Folded(*[t.contiguous() for t in folded.tensors()])
    tokens = windows * time
    x = torch.randn(2, tokens, d, generator=generator).to(device(), dtype)
    source, weight = torch.tensor(SOURCE, device=device()), torch.tensor(WEIGHT, device=device())
    target = torch.tensor([0, 3, 1], device=device())
    out = torch.full((4, tokens, d), 7.0, device=device(), dtype=dtype)

    exact = Folded(*[t.double().requires_grad_() for t in folded.tensors()])
    own = Folded(*[t[weight] for t in exact.tensors()])
    inputs = x[source.clamp(min=0)].double().requires_grad_()
    wanted = block_forward(own, inputs.view(3, windows, time, d), heads).view(3, tokens, d)

    run_blocks(folded, x, source, weight, time, heads, out=out, target=target)
    close(out[0], wanted[0], dtype)
    assert not out[3].any()  # a dead one
    close(out[1], wanted[2], dtype)
    assert bool((out[2] == 7).all())  # nobody's

    # Kept values go by weights: blocks 0 and 2 have weights 2 and 1.
    kept = Kept.empty(2, tokens, d, f, x)
    keep = torch.tensor([-1, 1, 0], device=device())
    again = run_blocks(folded, x, source, weight, time, heads, kept, keep)
    close(again[0], wanted[0], dtype)
    dy = torch.randn(2, tokens, d, generator=generator).to(device(), dtype)
    room, dx = Factors.empty(Kept.empty(3, tokens, d, f, x)), torch.empty_like(out[:3])
    beyond = [dx[2], *(t[2] for t in vars(room).values())]
    for value in beyond:
        value.fill_(7)
    factors, dx = room.rows(0, 2), dx[:2]
    chosen = Folded(*[t[[2, 1]] for t in folded.tensors()])
    of_kept = torch.tensor([2, 1], device=device())
    backward_inputs(chosen, kept, dy, factors, dx, time, heads, (of_kept, 4))
    assert all(bool((value == 7).all()) for value in beyond)
    found, _ = row_gradients(kept, factors, dy, None, rows, of_kept, 4, 0, layout)
    up = torch.zeros_like(wanted)
    up[0], up[2] = dy[0].double(), dy[1].double()
    by_input, *by_weight = torch.autograd.grad(wanted, [inputs, *exact.tensors()], up)
    close(dx, by_input[[0, 2]], dtype)
    raw = rows.double().requires_grad_()
    refolded = fold(layout.unpack(raw), torch.float64).tensors()
    (by_row,) = torch.autograd.grad(refolded, raw, by_weight)
    for value, want in zip(
        found.split(layout.sizes, 1), by_row.split(layout.sizes, 1), strict=True
    ):
        if want.any():
            close(value, want[[2, 1]], dtype)
        else:
            assert not value.any()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"T{size[1]}-d{size[2]}-h{size[3]}")
def test_blocks_forward_and_backward(interpreted, size):
    interpreted(check_blocks, size, torch.float32)


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, marks=ON_GPU) for size in [*SIZES, *LARGE]],
    ids=lambda size: f"T{size[1]}-d{size[2]}-h{size[3]}",
)
def test_blocks_on_a_gpu(size):
    check_blocks(size, torch.bfloat16)


def check_fold(sizes, row, dtype):
    from k1.kernels.fold import fold_fused

    generator = torch.Generator().manual_seed(0)
    rows, layout, _ = draw_blocks(4, *sizes, dtype, generator)
    row = None if row is None else torch.tensor(row, device=device())
    wanted = fold(layout.unpack(rows if row is None else rows[row]), dtype)
    found = fold_fused(rows, layout, dtype, row)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, value, want in zip(vars(found), found.tensors(), wanted.tensors(), strict=True):
        assert value.is_contiguous() and value.dtype == dtype, name
        torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance * 0.1)
    for name in ("out", "mlp_out", "mlp_out_bias"):  # these are rounded, and that is all
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


FOLDED = [((64, 2, 96), None), ((64, 2, 64), [2, 0, 2]), ((128, 4, 256), [3])]


@pytest.mark.parametrize("sizes, row", FOLDED)
def test_fold(interpreted, sizes, row):
    interpreted(check_fold, sizes, row, torch.float32)


@pytest.mark.parametrize(
    "sizes, row", [pytest.param(*case, marks=ON_GPU) for case in [*FOLDED, ((256, 4, 512), None)]]
)
def test_fold_on_a_gpu(sizes, row):
    check_fold(sizes, row, torch.bfloat16)


def check_norm(dtype):
    from k1.kernels.norm import norm_backward, norm_forward
    from k1.kernels.sums import sum_rows

    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 37, 64, generator=generator) * 3 + 1).to(device(), dtype)
    shared = torch.randn(2, 200, generator=generator).to(device())
    gain, shift = shared[:, 10:74], shared[:, 100:164]
    h, normed, inverse = norm_forward(x, gain, shift)
    leaves = [value.double().requires_grad_() for value in (x, gain, shift)]
    wanted = torch.nn.functional.layer_norm(leaves[0], (64,)) * leaves[1][:, None]
    wanted = wanted + leaves[2][:, None]
    close(h, wanted.detach(), dtype)
    dh = torch.randn(2, 37, 64, generator=generator).to(device(), dtype)
    dx = torch.empty_like(x)
    parts = norm_backward(dh, normed, inverse, gain, dx)
    by_shared = torch.full((2, 200), 7.0, device=device())
    sum_rows(parts, by_shared[:, 10:138])
    assert bool((by_shared[:, :10] == 7).all()) and bool((by_shared[:, 138:] == 7).all())
    by_leaf = torch.autograd.grad(wanted, leaves, dh.double())
    for value, want in zip((dx, by_shared[:, 10:74], by_shared[:, 74:138]), by_leaf, strict=True):
        close(value, want, dtype)


def test_final_norm(interpreted):
    interpreted(check_norm, torch.float32)


@pytest.mark.parametrize("check", [pytest.param(c, marks=ON_GPU) for c in (check_norm,)])
def test_final_norm_on_a_gpu(check):
    check(torch.bfloat16)
