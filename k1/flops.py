"""Floating-point operations of a training step, by formula (a multiply-add counts as two)."""

from __future__ import annotations

from k1.config import Config


def block_flops_per_token(config: Config) -> float:
    """Forward operations of one block for one token: projections, attention, feed-forward."""
    d, f, t = config.model.embed, config.model.feed_forward, config.model.context
    return 2.0 * (4 * d * d + 2 * d * f) + 2.0 * d * t


def step_flops(
    config: Config, vocab_size: int, blocks: int, updated: float, *, fused: bool = False
) -> float:
    """Operations of one training step.

    A backward pass costs twice its forward pass. Sparse mode runs every block forward, the updated
    ones backward, and a full pass on the probe. Without kernels the updated blocks run forward once
    more, for the first pass keeps nothing for their gradients.

    Each inner step beyond the first runs the head forward and backward to its input, and the
    culprits forward and backward; without kernels, the culprits' ancestors run forward too. There
    is taken to be one culprit for every whole path among the updated blocks, and at least one.

    Args:
        config: sizes and mode.
        vocab_size: width of the head.
        blocks: living blocks, root included.
        updated: blocks that a step updates, root included (not used in dense and exact mode).
        fused: whether kernels run the blocks with gradients too. What has to be the same on every
            device, such as a price on compute, leaves it False.
    """
    tokens = config.train.batch * config.model.context
    block = block_flops_per_token(config) * tokens
    head = 2.0 * config.model.embed * vocab_size * tokens
    full = 3 * blocks * block + 3 * head
    if config.update.mode != "sparse":
        return full
    probe = config.update.probe_fraction / config.update.attribution_every
    culprits = max(1.0, (updated - 1) / max(1, len(config.model.branching)))
    again, culprits_again = (0.0, culprits) if fused else (updated, updated)
    first = (blocks + again + 2 * updated) * block + 3 * head
    further = (culprits_again + 2 * culprits) * block + 2 * head
    return first + (config.update.inner_steps - 1) * further + probe * full
