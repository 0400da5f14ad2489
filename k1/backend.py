"""Which implementation of a block runs: Triton kernels or PyTorch."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from k1.block import Folded, block_forward, block_layout, fold, initial_rows
from k1.config import Config, ModelConfig
from k1.errors import ConfigError
from k1.kernels import AVAILABLE

_LOG = logging.getLogger(__name__)
_TOLERANCE = 2e-2
"""Largest relative error of a kernel in bfloat16; a right one has 2e-3."""


@dataclass(frozen=True)
class Backend:
    """What runs the blocks."""

    fused: bool
    """Kernels run the blocks, the mixing and their gradients."""
    kernels: bool
    """Kernels select paths, move rows and count, whatever the sizes of the blocks."""
    reason: str
    """What runs the blocks and why, for people."""


def choose_backend(config: Config, device: torch.device, fused: bool | None = None) -> Backend:
    """Choose kernels where they fit and are seen to compute the right thing, else PyTorch.

    Args:
        config: the sizes of the blocks.
        device: where they run.
        fused: True insists on kernels, False on PyTorch; by default whatever fits.

    Raises:
        ConfigError: if kernels are insisted on and do not fit.
    """
    small = device.type == "cuda" and AVAILABLE
    if fused is False:
        return Backend(False, small, "PyTorch (asked for)")
    reason = _why_not(config, device)
    if fused and device.type == "cpu":  # in Triton's interpreter
        return Backend(True, True, "fused kernels (asked for)")
    if fused and reason:
        raise ConfigError(f"the fused kernels do not fit: {reason}")
    wrong = None if reason else _wrong(config.model, device)
    if fused and wrong:
        raise ConfigError(f"the fused kernels cannot be used: {wrong}")
    if reason or wrong:
        backend = Backend(False, small, f"PyTorch ({reason or wrong})")
    else:
        backend = Backend(True, True, "fused kernels")
    _LOG.log(logging.WARNING if wrong else logging.INFO, "blocks run by %s", backend.reason)
    return backend


def _why_not(config: Config, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no CUDA device"
    if config.train.precision != "bfloat16":
        return f"{config.train.precision} arithmetic"
    if not AVAILABLE:
        return "Triton is not installed"
    from k1.kernels.block import why_not

    m = config.model
    return why_not(m.embed, m.feed_forward, m.heads, m.context)


@functools.cache
def _wrong(m: ModelConfig, device: torch.device) -> str | None:
    """Run the kernels once beside PyTorch: a compiler can be wrong for one size and not another."""
    from k1.kernels.backward import Factors, backward_inputs
    from k1.kernels.block import Kept, run_blocks
    from k1.kernels.weights import row_gradients

    # Enough that a block's tokens are shared out between programs, and not evenly.
    windows, layout = 1 + 1024 // m.context, block_layout(m)
    generator = torch.Generator().manual_seed(0)
    rows = initial_rows(layout, 2, generator)
    rows += torch.randn(rows.shape, generator=generator) * 0.05  # no piece is zero
    rows = rows.to(device)
    folded = fold(layout.unpack(rows), torch.bfloat16)
    folded = Folded(*[t.contiguous() for t in folded.tensors()])
    exact = Folded(*[t.double() for t in folded.tensors()])
    shape = 2, windows * m.context, m.embed

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    x, dy = draw(*shape), draw(*shape)
    router = draw(*shape), draw(*shape[:2], m.max_children)
    # On this thread: that of the backward pass may have no context yet, of which cuBLAS would warn.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        at = x.double().requires_grad_()
        weights = [t.requires_grad_() for t in exact.tensors()]
        want = block_forward(exact, at.view(2, windows, m.context, m.embed), m.heads).view(shape)
        by_input, *by_weight = torch.autograd.grad(want, [at, *weights], dy.double())
        raw = rows.double().requires_grad_()
        refolded = fold(layout.unpack(raw), torch.float64).tensors()
        (by_row,) = torch.autograd.grad(refolded, raw, by_weight)
    wanted = layout.unpack(by_row)
    normed, by_logits = (t.double() for t in router)
    wanted["router.weight"] = torch.bmm(normed.transpose(1, 2), by_logits)
    wanted["router.bias"] = by_logits.sum(1)
    here, sizes = torch.arange(2, device=device), (m.context, m.heads)
    kept = Kept.empty(2, shape[1], m.embed, m.feed_forward, x)
    factors, dx = Factors.empty(kept), torch.empty_like(x)
    plain = run_blocks(folded, x, here, here, *sizes)
    y = run_blocks(folded, x, here, here, *sizes, kept, here)
    backward_inputs(folded, kept, dy, factors, dx, *sizes, (here, 3))
    found, squares = row_gradients(kept, factors, dy, router, rows, here, 3, 2, layout)
    square = layout.pack(wanted).square().sum(1)
    pairs = [(plain, want), (y, want), (dx, by_input), (squares, square)]
    pairs += [(piece, wanted[name]) for name, piece in layout.unpack(found).items()]
    errors = [float((got - w.detach()).norm() / w.detach().norm()) for got, w in pairs]
    wrong = [error for error in errors if not error <= _TOLERANCE]  # NaN is wrong too
    return f"a kernel is off by {wrong[0]:.1e} on this device" if wrong else None
