"""Floating-point operations of a training step, by formula (a multiply-add counts as two)."""

from __future__ import annotations

from k1.config import Config


def block_flops_per_token(config: Config) -> float:
    """Forward operations of one block for one token: projections, attention, feed-forward."""
    d, f, t = config.model.embed, config.model.feed_forward, config.model.context
    return 2.0 * (4 * d * d + 2 * d * f) + 2.0 * d * t


def step_flops(config: Config, vocab_size: int, blocks: int, updated: float) -> float:
    """Operations of one training step, as PyTorch does it without kernels.

    A backward pass costs twice its forward pass. Sparse mode runs every block forward; the updated
    ones and the head forward and backward, in each inner step anew; and a full pass on the probe.
    What kernels spare of this is left out, so that a price on compute is the same on every device.

    Args:
        config: sizes and mode.
        vocab_size: width of the head.
        blocks: living blocks, root included.
        updated: blocks that a step updates, root included (not used in dense and exact mode).
    """
    tokens = config.train.batch * config.model.context
    block = block_flops_per_token(config) * tokens
    head = 3 * 2.0 * config.model.embed * vocab_size * tokens
    full = 3 * blocks * block + head
    if config.update.mode != "sparse":
        return full
    probe = config.update.probe_fraction / config.update.attribution_every
    paths = config.update.inner_steps * (3 * updated * block + head)
    return blocks * block + paths + probe * full


def measuring_flops(config: Config, vocab_size: int, blocks: int, windows: int) -> float:
    """Operations of measuring a tree's loss on windows of text: all blocks and the head, forward.

    Args:
        config: sizes.
        vocab_size: width of the head.
        blocks: living blocks, root included.
        windows: how many windows of `model.context` tokens.
    """
    head = 2.0 * config.model.embed * vocab_size
    return windows * config.model.context * (blocks * block_flops_per_token(config) + head)
