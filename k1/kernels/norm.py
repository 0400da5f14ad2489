"""The final layer norm with its gain and shift, forward and backward, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


@triton.jit
def _forward(
    x_ptr, gain_ptr, shift_ptr, h_ptr, normed_ptr, inverse_ptr, N, gain_step,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    lane, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    d, inside = tl.arange(0, D), (n < N)[:, None]
    at = (lane * N + n)[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centred = x - (tl.sum(x, 1) / D)[:, None]
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-5)
    normed = centred * inverse[:, None]
    gain = tl.load(gain_ptr + lane * gain_step + d)[None, :]
    h = normed * gain + tl.load(shift_ptr + lane * gain_step + d)[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + lane * N + n, inverse, mask=n < N)


@triton.jit
def _backward(
    dh_ptr, normed_ptr, inverse_ptr, gain_ptr, dx_ptr, part_ptr, N, gain_step,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    lane, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    d, inside = tl.arange(0, D), (n < N)[:, None]
    at = (lane * N + n)[:, None] * D + d[None, :]
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + lane * N + n, mask=n < N, other=0.0)
    part = part_ptr + ((lane * tl.num_programs(0) + tl.program_id(0)) * 2) * D + d
    tl.store(part, tl.sum(dh * normed, 0))
    tl.store(part + D, tl.sum(dh, 0))
    dn = dh * tl.load(gain_ptr + lane * gain_step + d)[None, :]
    dn -= (tl.sum(dn, 1) / D)[:, None] + normed * (tl.sum(dn * normed, 1) / D)[:, None]
    tl.store(dx_ptr + at, (inverse[:, None] * dn).to(dx_ptr.dtype.element_ty), mask=inside)


def norm_forward(x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x [L, N, d] with gain and shift float32 [L, d], views of the same rows.

    Returns:
        `n(x) * gain + shift` and `n(x)`, both like x, and 1 / standard deviation float32 [L, N].
    """
    lanes, tokens, d = x.shape
    h, normed = torch.empty_like(x), torch.empty_like(x)
    inverse = torch.empty(lanes, tokens, device=x.device)
    _forward[(triton.cdiv(tokens, _ROWS), lanes)](
        x, gain, shift, h, normed, inverse, tokens, gain.stride(0), D=d, R=_ROWS
    )
    return h, normed, inverse


def norm_backward(dh: Tensor, normed: Tensor, inverse: Tensor, gain: Tensor, out: Tensor) -> Tensor:
    """Gradients through `norm_forward`.

    Args:
        dh: [L, N, d], contiguous.
        normed: from `norm_forward`.
        inverse: from `norm_forward`.
        gain: as given to it.
        out: [L, N, d], contiguous; the gradient of x is written there.

    Returns:
        float32 [L, parts, 2 * d]: parts of the gradients of the gain and, behind it, of the shift;
        what is wanted is their sum.
    """
    lanes, tokens, d = dh.shape
    blocks = triton.cdiv(tokens, _ROWS)
    part = torch.empty(lanes, blocks, 2 * d, device=dh.device)
    _backward[(blocks, lanes)](
        dh, normed, inverse, gain, out, part, tokens, gain.stride(0), D=d, R=_ROWS
    )
    return part
