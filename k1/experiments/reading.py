"""Bits per byte of documents that are read from their start on, window after window.

A window on its own has to find out what kind of text it is from its own tokens. Whoever reads a
document knows that from all of it so far, and a router that keeps statistics can know it too: its
evidence at the end of a window is where the next one begins. So a passage is read with the evidence
carried over; attention still sees one window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k1.arena import Arena
from k1.data import POOLS
from k1.engine import Engine
from k1.forward import LN2, Batch, Forest, RouterState, forward, read_text, token_losses
from k1.sampling import TokenStore
from k1.topology import index_levels


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


@torch.no_grad()
def read_passages(engine: Engine, lane: int, passages: Passages) -> float:
    """Bits per byte of a lane on passages: each is a lane of the forward pass, with its own prior.

    Args:
        engine: whose arena holds the lane.
        lane: the lane.
        passages: what to read.
    """
    arena, size = engine.arena, engine.arena.config.train.batch
    nats = length = 0.0
    for first in range(0, len(passages.inputs), size):
        part = slice(first, first + size)
        count = len(passages.inputs[part])
        forest = _repeated(arena, lane, count)
        router = forest.router
        pieces = forest.shared_layout.unpack(forest.shared)
        for window in range(passages.inputs.shape[1]):
            cut = part, slice(window, window + 1)
            counts = passages.counts[cut].flatten(1)
            if not bool(counts.any()):
                break
            inputs, targets = passages.inputs[cut], passages.targets[cut]
            batch = Batch(inputs, targets, passages.starts[cut], inputs[..., 0])
            text = read_text(batch, forest.config)
            weights, levels = forest.weights(), forest.levels
            done = forward(weights, router, levels, batch, text, forest.config)
            losses = token_losses(pieces, done.output, targets).double()
            nats += float((losses * counts).sum())
            length += float((engine.store.token_bytes[targets].flatten(1) * counts).sum())
            router = RouterState([prior[..., -1] for prior in done.prior], router.counts)
    return nats / LN2 / length


def _repeated(arena: Arena, lane: int, count: int) -> Forest:
    """View a lane as so many lanes with the same numbers."""
    levels = index_levels([arena.trees[lane]] * count, arena.device)

    def spread(name: str) -> Tensor:
        return arena[name][lane].expand(count, *arena[name].shape[1:])

    def cut(tensor: Tensor) -> list[Tensor]:
        return [tensor[:, i.offset : i.offset + i.width] for i in levels]

    return Forest(
        spread("weight"),
        spread("shared"),
        arena.block_layout,
        arena.shared_layout,
        levels,
        RouterState(cut(spread("log_prior")), cut(spread("evidence"))),
        arena.config,
    )
