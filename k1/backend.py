"""Which implementation of a block runs: Triton kernels or PyTorch."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from k1.block import Folded, block_forward, block_layout, fold, initial_rows
from k1.config import Config
from k1.errors import ConfigError

_LOG = logging.getLogger(__name__)
_TOLERANCE = 2e-2
"""Largest relative error of a kernel in bfloat16; a right one has 2e-3."""


@dataclass(frozen=True)
class Backend:
    """What runs the blocks."""

    frozen: bool
    """Kernels run blocks without gradients."""
    trained: bool
    """Kernels run blocks with gradients too."""
    reason: str
    """Why, for people."""


def choose_backend(config: Config, device: torch.device, fused: bool | None = None) -> Backend:
    """Choose kernels where they fit and are seen to compute the right thing, else PyTorch.

    Args:
        config: the sizes of the blocks.
        device: where they run.
        fused: True insists on kernels, False on PyTorch; by default whatever fits.

    Raises:
        ConfigError: if kernels are insisted on and do not fit.
    """
    if fused is False:
        return Backend(False, False, "PyTorch: asked for")
    reason = _why_not(config, device)
    if fused:
        if reason and device.type == "cuda":
            raise ConfigError(f"the fused kernels do not fit: {reason}")
        return Backend(True, True, "fused kernels: asked for")
    if reason:
        return _logged(Backend(False, False, f"PyTorch: {reason}"))
    from k1.kernels.block import why_not_trained

    m = config.model
    no_gradient = why_not_trained(m.embed, m.feed_forward, m.heads, m.context)
    wrong = _wrong(config, device, trained=no_gradient is None)
    if wrong:
        return _logged(Backend(False, False, f"PyTorch: {wrong}"))
    text = f"PyTorch with gradients ({no_gradient})" if no_gradient else "with gradients too"
    return _logged(Backend(True, no_gradient is None, f"fused kernels, {text}"))


def _why_not(config: Config, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no CUDA device"
    if config.train.precision != "bfloat16":
        return f"{config.train.precision} arithmetic"
    try:
        from k1.kernels.block import why_not_frozen
    except ImportError:
        return "Triton is not installed"
    m = config.model
    return why_not_frozen(m.embed, m.feed_forward, m.heads, m.context)


def _wrong(config: Config, device: torch.device, trained: bool) -> str | None:
    """Run the kernels once beside PyTorch: a compiler can be wrong for one size and not another."""
    from k1.kernels.block import Kept, run_backward, run_blocks

    m, windows = config.model, 3
    generator = torch.Generator().manual_seed(0)
    rows = initial_rows(block_layout(m), 2, generator)
    rows += torch.randn(rows.shape, generator=generator) * 0.05  # no piece is zero
    folded = fold(block_layout(m).unpack(rows.to(device)), torch.bfloat16)
    exact = Folded(*[t.double() for t in folded.tensors()])
    shape = 2, windows * m.context, m.embed
    x, dy = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    here = torch.arange(2, device=device)
    kept = Kept.empty(2, shape[1], m.embed, m.feed_forward, x)
    with torch.enable_grad():
        at = x.double().requires_grad_()
        weights = [t.requires_grad_() for t in exact.tensors()]
        want = block_forward(exact, at.view(2, windows, m.context, m.embed), m.heads).view(shape)
        wanted = torch.autograd.grad(want, [at, *weights], dy.double())
    pairs = [
        (run_blocks(folded, x, here, here, m.context, m.heads), want),
        (run_blocks(folded, x, here, here, m.context, m.heads, kept, here), want),
    ]
    if trained:
        dx, by_weight = run_backward(folded, kept, dy, m.context, m.heads)
        pairs += zip((dx, *by_weight.tensors()), wanted, strict=True)
    error = max(float((got - w.detach()).norm() / w.detach().norm()) for got, w in pairs)
    # Written so that NaN counts as wrong.
    return None if error <= _TOLERANCE else f"a kernel is off by {error:.1e} on this device"


def _logged(backend: Backend) -> Backend:
    _LOG.info("blocks: %s", backend.reason)
    return backend
