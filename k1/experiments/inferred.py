"""Several readers of a text, of whom the one that has predicted it best so far is believed.

Methods that keep something apart for each domain (a mask, a column) need to know at the end which
one a text is for. Nobody tells them here: all of them read the text, and each token is predicted by
the one whose summed loss on the earlier tokens of the document, as far as it has been read, is the
least. So the choice is causal; before anything is known, it is the reader of the first domain.
Reading costs a forward pass for each reader.

Shapes: R readers, L lanes, D texts, K windows of each, T tokens in a window, N = windows * T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k1.chunks import cut
from k1.engine import Engine
from k1.experiments.learner import Learner
from k1.experiments.reading import Passages
from k1.experiments.stream import Views
from k1.forward import LN2, Batch, Forest, token_losses
from k1.measure import outputs

Believer = Callable[[Tensor, Passages], Tensor]
"""Losses [L, D, N] of what is believed in the end, of those of all readers [R, L, D, N]."""
Reading = Callable[[Batch], Tensor]
"""Losses in nats of all tokens of a batch [L, B, T], reader by reader: [R, L, N]."""


def believed(nats: Tensor, starts: Tensor) -> Tensor:
    """Losses of the readers that are believed.

    Args:
        nats: float [R, L, D, N]: loss of each reader on each token's target.
        starts: bool [D, N]: a document begins at this token; one begins at the first anyway.

    Returns:
        float64 [L, D, N].
    """
    nats = nats.double()
    before = nats.cumsum(-1) - nats
    at = torch.arange(starts.shape[-1], device=starts.device)
    begun = torch.where(starts, at, 0).cummax(-1).values.expand(nats.shape)
    choice = (before - before.gather(-1, begun)).argmin(0, keepdim=True)
    return nats.gather(0, choice)[0]


def reading_of(engine: Engine, forests: Sequence[Forest]) -> Reading:
    """Read with several trees of the same lanes."""
    heads = [forest.shared_layout.unpack(forest.shared) for forest in forests]

    def read(batch: Batch) -> Tensor:
        found = [
            token_losses(head, outputs(engine, forest, batch), batch.targets)
            for forest, head in zip(forests, heads, strict=True)
        ]
        return torch.stack(found)

    return read


def texts(views: Views, view: str, domain: str) -> Passages:
    """What a domain is measured on, in either view: windows are passages of one window."""
    if view == "passages":
        return views.passages[domain]
    batch = views.windows[domain]
    inputs, targets, starts = (t[0, :, None] for t in (batch.inputs, batch.targets, batch.starts))
    return Passages(inputs, targets, starts, torch.ones_like(starts))


class InferringLearner(Learner, ABC):
    """A learner that has several readers, or one whose forward pass is its own."""

    @abstractmethod
    def reading(self, start: int, stop: int) -> Reading:
        """What the readers of lanes start..stop make of a text."""

    @torch.no_grad()
    def measure(self, views: Views, view: str) -> list[list[float]]:
        """Bits per byte of whoever is believed: [lanes][domains]."""
        by_domain: dict[str, list[float]] = {domain: [] for domain in self.store.domains}
        for start, stop in cut(0, self.lanes, self.engine.chunk):
            for domain, bits in by_domain.items():
                bits += self._bits(start, stop, texts(views, view, domain))
        return self.in_order(by_domain)

    def believer(self, start: int, stop: int) -> Believer:
        """Who is believed in lanes start..stop: by default whoever has the least loss so far."""
        return lambda nats, passages: believed(nats, passages.starts.flatten(1).cpu())

    def _bits(self, start: int, stop: int, passages: Passages) -> list[float]:
        read, lanes = self.reading(start, stop), stop - start
        size, time = self.arena.config.train.batch, passages.inputs.shape[-1]
        windows = [t.flatten(0, 1) for t in (passages.inputs, passages.targets, passages.starts)]
        parts = []
        for first in range(0, len(windows[0]), size):
            piece = (t[first : first + size].expand(lanes, -1, -1) for t in windows)
            inputs, targets, starts = piece
            parts.append(read(Batch(inputs, targets, starts, inputs[..., 0])))
        # On a CPU, for running sums are not reproducible elsewhere.
        shape = passages.inputs.shape[0], passages.inputs.shape[1] * time
        nats = torch.cat(parts, 2).cpu().unflatten(2, shape)
        counts = passages.counts.flatten(1).cpu()
        loss = (self.believer(start, stop)(nats, passages) * counts).sum((1, 2))
        length = (self.store.token_bytes[passages.targets].flatten(1).cpu() * counts).sum()
        return (loss / LN2 / length).tolist()
