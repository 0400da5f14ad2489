"""Bits per byte of documents that are read from their start on, window after window.

A window on its own has to find out what kind of text it is from its own tokens. Whoever reads a
document knows that from all of it so far, and a router that keeps statistics can know it too: its
evidence at the end of a window is where the next one begins. So a passage is read with the evidence
carried over; attention still sees one window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k1.chunks import cut
from k1.data import POOLS
from k1.engine import Engine
from k1.forward import LN2, Batch, Forest, RouterState, priors, read_text, token_losses
from k1.measure import outputs
from k1.sampling import TokenStore


@dataclass(frozen=True)
class Passages:
    """Passages of one domain. D passages, K windows at most, T tokens in each."""

    inputs: Tensor
    """int64 [D, K, T]."""
    targets: Tensor
    """int64 [D, K, T]."""
    starts: Tensor
    """bool [D, K, T]: True at a passage's first token alone."""
    counts: Tensor
    """bool [D, K, T]: targets that belong to the passage's document, which may end early."""


def cut_passages(store: TokenStore, pool: str, domain: str, passages: int, length: int) -> Passages:
    """Cut passages that begin at documents spread evenly over a pool.

    Args:
        store: the text.
        pool: its pool.
        domain: its domain.
        passages: how many, if there are so many documents of two tokens or more.
        length: windows that a passage has at most.
    """
    first, size = store.extent[POOLS.index(pool), store.domains.index(domain)].tolist()
    begins = store.starts[first : first + size].nonzero()[:, 0].cpu()
    ends = torch.cat([begins[1:], torch.tensor([size])])
    begins, ends = begins[ends - begins > 1], ends[ends - begins > 1]
    pick = torch.linspace(0, len(begins) - 1, min(passages, len(begins))).long().unique()
    begins, ends = begins[pick], ends[pick]
    at = begins[:, None] + torch.arange(length * store.context)
    counts = (at + 1 < ends[:, None]).view(len(pick), length, store.context)
    at = (first + at.clamp(max=size - 2)).to(store.tokens.device)
    starts = torch.zeros_like(counts)
    starts[:, 0, 0] = True
    shape = counts.shape
    tokens = store.tokens
    inputs, targets = tokens[at].long().view(shape), tokens[at + 1].long().view(shape)
    device = tokens.device
    return Passages(inputs, targets, starts.to(device), counts.to(device))


def read_passages(engine: Engine, passages: Passages) -> list[float]:
    """Bits per byte of every lane of an engine's arena on passages."""
    arena = engine.arena
    return [
        bits
        for start, stop in cut(0, arena.lanes, engine.chunk)
        for bits in read_with(engine, arena.forest(start, stop), passages)
    ]


@torch.no_grad()
def read_with(engine: Engine, forest: Forest, passages: Passages) -> list[float]:
    """Bits per byte of every tree of a forest on passages."""
    lanes, size = len(forest.rows), engine.arena.config.train.batch
    pieces = forest.shared_layout.unpack(forest.shared)
    nats, length = torch.zeros(2, lanes, dtype=torch.float64, device=engine.arena.device)
    for first in range(0, len(passages.inputs), size):
        router = forest.router
        for window in range(passages.inputs.shape[1]):
            part = slice(first, first + size), window
            parts = (t[part] for t in (passages.inputs, passages.targets, passages.starts))
            inputs, targets, starts = (t.expand(lanes, *t.shape) for t in parts)
            counts = passages.counts[part].flatten()
            batch = Batch(inputs, targets, starts, inputs[..., 0])
            output = outputs(engine, replace(forest, router=router), batch)
            nats += (token_losses(pieces, output, targets).double() * counts).sum(1)
            length += (engine.store.token_bytes[targets[0]].flatten() * counts).sum()
            router = carry_on(router, forest, batch, engine.backend.kernels)
    return (nats / LN2 / length).tolist()


def carry_on(router: RouterState, forest: Forest, batch: Batch, kernels: bool) -> RouterState:
    """Make what a router has gathered at the end of each window its prior for the next one.

    Args:
        router: the priors that the windows were read with.
        forest: the trees.
        batch: the windows [L, B, T].
        kernels: whether a kernel sums up the evidence.
    """
    text, time = read_text(batch, forest.config), batch.inputs.shape[-1]
    found = priors(router, forest.levels, text, forest.config, kernels)
    last = [
        prior.expand(-1, -1, text.bigram[0].numel()).unflatten(2, (-1, time))[..., -1:]
        for prior in found
    ]
    gathered = [prior.expand(-1, -1, -1, time).flatten(2) for prior in last]
    return RouterState(gathered, router.counts)
