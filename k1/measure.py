"""Bits per byte of lanes on given windows."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k1.forward import LN2, Batch, Forest, forward, read_text, token_losses

if TYPE_CHECKING:
    from k1.engine import Engine


@torch.no_grad()
def measure(engine: Engine, start: int, stop: int, batch: Batch) -> Tensor:
    """Bits per byte of lanes start..stop, each on its windows of a batch [L, B, T]: float64 [L]."""
    arena, size = engine.arena, engine.arena.config.train.batch
    forest = arena.forest(start, stop)
    pieces = forest.shared_layout.unpack(forest.shared)
    nats, length = torch.zeros(2, stop - start, dtype=torch.float64, device=arena.device)
    for first in range(0, batch.inputs.shape[1], size):
        part = batch.map(itemgetter((slice(None), slice(first, first + size))))
        output = outputs(engine, forest, part)
        nats += token_losses(pieces, output, part.targets).double().sum(1)
        length += engine.store.bytes_in(part.targets)
    return nats / LN2 / length


def outputs(engine: Engine, forest: Forest, batch: Batch) -> Tensor:
    """The trees' outputs [L, N, d] on a batch."""
    text = read_text(batch, forest.config)
    if engine.backend.fused:
        from k1.kernels.tree import TreePass

        done = TreePass(forest, batch, text, engine.inner_side, shared=False)
        return done.run().values.output
    weights, router = forest.weights(), forest.router
    return forward(weights, router, forest.levels, batch, text, forest.config).output
