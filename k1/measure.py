"""Bits per byte of lanes on given windows."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k1.forward import LN2, Batch, Forest, forward, read_text, token_losses

if TYPE_CHECKING:
    from k1.engine import Engine


def measure(engine: Engine, start: int, stop: int, batch: Batch) -> Tensor:
    """Bits per byte of lanes start..stop, each on its windows of a batch [L, B, T]: float64 [L]."""
    if engine.graphs is None:
        return _measure(engine, start, stop, batch)
    arena = engine.arena
    levels = tuple((i.width, i.children.shape[-1]) for i in arena.index(start, stop))
    windows, most = tuple(batch.inputs.shape[1:]), arena.leaves(start, stop).most
    shape = ("measure", start, stop, windows, levels, most)
    if shape not in engine.measured:
        engine.measured[shape] = batch.map(_fresh)
    held = engine.measured[shape]
    for name in ("inputs", "targets", "starts", "domain"):
        getattr(held, name).copy_(getattr(batch, name))
    return engine.graphs.run(shape, partial(_measure, engine, start, stop, held)).clone()


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _measure(engine: Engine, start: int, stop: int, batch: Batch) -> Tensor:
    return forest_bits(engine, engine.arena.forest(start, stop), batch)


@torch.no_grad()
def forest_bits(engine: Engine, forest: Forest, batch: Batch) -> Tensor:
    """Bits per byte of trees, whoever's they are, on windows [L, B, T]: float64 [L]."""
    size = forest.config.train.batch
    pieces = forest.shared_layout.unpack(forest.shared)
    nats, length = torch.zeros(
        2, *forest.shared.shape[:1], dtype=torch.float64, device=batch.inputs.device
    )
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
