"""Where each part of a text went, why, and who is responsible for its error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k1.data.documents import SEPARATOR, split_documents
from k1.data.tokenizer import Tokenizer
from k1.engine import Engine
from k1.errors import DataError
from k1.forward import LN2, Batch
from k1.specialisation.ngrams import path_ratios, reasons
from k1.specialisation.observe import Trace, trace

MOST_BYTES = 100_000
"""Longer texts are refused: each part takes a forward and a backward pass of the whole tree."""


@dataclass(frozen=True)
class Share:
    """A block's share in something."""

    id: int
    name: str
    share: float


@dataclass(frozen=True)
class Why:
    """Bigrams that spoke for the leaf which a part went to most."""

    text: str
    times: int
    nats: float


@dataclass(frozen=True)
class Part:
    """One window of a text, or what is left of a document."""

    document: int
    text: str
    bits_per_byte: float
    went_to: tuple[Share, ...]
    """Leaves by their share in the output, the largest first."""
    why: tuple[Why, ...]
    evidence: float
    """Log-likelihood ratio of all its bigrams for the first of these leaves, in nats; what the
    router has besides are learned logits and priors."""
    evidence_so_far: float
    """The same of the document up to the part's end."""
    responsible: tuple[Share, ...]
    """Blocks, root included, by gradient norm, as shares of the sum of all norms."""


@dataclass(frozen=True)
class Explanation:
    """A text, part by part."""

    parts: tuple[Part, ...]
    bits_per_byte: float
    went_to: tuple[Share, ...]
    """Leaves by their share in the output over the whole text."""
    router: str


def explain(
    engine: Engine, lane: int, tokenizer: Tokenizer, text: str, top: int = 3
) -> Explanation:
    """Explain what a lane made of a text, whose documents are apart by blank lines.

    Args:
        engine: has the lane.
        lane: which.
        tokenizer: the one that the lane was trained with.
        text: any text.
        top: leaves, bigrams and responsible blocks to name for each part.

    Raises:
        DataError: if the text is empty or too long.
    """
    size = len(text.encode())
    if size > MOST_BYTES:
        raise DataError(
            f"the text has {size:,} bytes, and {MOST_BYTES:,} is the most; give an excerpt of it"
        )
    reader = _Reader(engine, lane, tokenizer, top)
    for number, document in enumerate(split_documents(text)):
        reader.read(number, document.text)
    if not reader.parts:
        raise DataError("the text is empty; give a file with something in it")
    return Explanation(
        tuple(reader.parts),
        reader.nats / LN2 / reader.bytes,
        reader.largest(reader.routed / reader.bytes, reader.leaves, len(reader.leaves)),
        engine.arena.config.model.router,
    )


class _Reader:
    """Reads documents window after window."""

    def __init__(self, engine: Engine, lane: int, tokenizer: Tokenizer, top: int) -> None:
        self.engine, self.lane, self.tokenizer, self.top = engine, lane, tokenizer, top
        self.tree = engine.arena.trees[lane]
        self.leaves = [slot for slot in sorted(self.tree.blocks) if self.tree.is_leaf(slot)]
        self.parts: list[Part] = []
        self.nats, self.bytes = 0.0, 0
        self.routed = torch.zeros(engine.arena.scratch + 1, dtype=torch.float64)
        """Each block's share in the output, times bytes."""
        self.so_far: dict[int, float] = {}
        """Evidence for each leaf in the present document."""

    def read(self, number: int, document: str) -> None:
        """Read one document; routers know at each window's start what they had gathered."""
        store, router = self.engine.store, None
        self.so_far = dict.fromkeys(self.leaves, 0.0)
        encoded = self.tokenizer.encode(document + SEPARATOR).astype("int64")
        tokens = torch.from_numpy(encoded).to(store.tokens.device)
        for at in range(0, len(tokens) - 1, store.context):
            stop = min(at + store.context, len(tokens) - 1)
            inputs, targets = tokens[None, None, at:stop], tokens[None, None, at + 1 : stop + 1]
            starts = torch.zeros_like(inputs, dtype=torch.bool)
            starts[..., 0] = at == 0
            batch = Batch(inputs, targets, starts, inputs[..., 0])
            found = trace(self.engine, self.lane, batch, router)
            router = found.router
            shown = self.tokenizer.decode(tokens[at + (at > 0) : stop + 1].cpu())
            self._note(number, shown.removesuffix(SEPARATOR), batch, found)

    def _note(self, document: int, shown: str, batch: Batch, found: Trace) -> None:
        norms, routing = found.responsibility.cpu().double(), found.routing.cpu().double()
        size = int(self.engine.store.bytes_in(batch.targets)[0])
        nats = float(found.nats.double().sum())
        self.nats, self.bytes = self.nats + nats, self.bytes + size
        self.routed += routing * size
        first = max(self.leaves, key=lambda slot: float(routing[slot]))
        spoke = reasons(self.engine.arena, self.lane, first, batch, self.top)
        evidence = {
            leaf: float(path_ratios(self.engine.arena, self.lane, leaf, batch)[0].sum())
            for leaf in self.leaves
        }
        for leaf, value in evidence.items():
            self.so_far[leaf] += value
        self.parts.append(
            Part(
                document,
                shown,
                nats / LN2 / size,
                self.largest(routing, self.leaves, self.top),
                tuple(Why(self.tokenizer.decode(r.tokens), r.times, r.nats) for r in spoke),
                evidence[first],
                self.so_far[first],
                self.largest(norms / norms.sum(), sorted(self.tree.blocks), self.top),
            )
        )

    def largest(self, weight: Tensor, slots: list[int], top: int) -> tuple[Share, ...]:
        """The blocks of the largest weights."""
        best = sorted(slots, key=lambda slot: (-float(weight[slot]), slot))[:top]
        blocks = self.tree.blocks
        return tuple(Share(blocks[s].id, self.tree.name(s), float(weight[s])) for s in best)
