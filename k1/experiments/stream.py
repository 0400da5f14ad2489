"""The stream: which domains come in which order, and the windows that they are measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

from k1.data import TextData
from k1.errors import ConfigError
from k1.experiments.reading import Passages, cut_passages
from k1.forward import Batch
from k1.sampling import TokenStore

STREAMS = (
    ("wikitext", "code", "scientific"),
    ("wikitext", "code", "arxiv"),
    ("prose", "code", "science"),
)
"""Domains of a folder, of the hub and of the built-in text, in the order of the first stream."""

Order = tuple[str, ...]


def stream_domains(data: TextData) -> Order:
    """The domains of a text in the order of the first stream; a text of others keeps its own."""
    for stream in STREAMS:
        if set(stream) == set(data.domains):
            return stream
    return data.domains


def orders_of(domains: Order, wanted: str) -> tuple[Order, ...]:
    """Choose orders: `all`, or their numbers from 1, apart by commas.

    Raises:
        ConfigError: if there is no such order, or a single domain.
    """
    every = tuple(permutations(domains))
    if len(every) < 2:
        raise ConfigError("a stream needs two domains or more: give text of several")
    if wanted == "all":
        return every
    try:
        numbers = [int(number) for number in wanted.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= len(every) for number in numbers):
        raise ConfigError(f"no orders {wanted!r}: give all, or numbers from 1 to {len(every)}")
    return tuple(every[number - 1] for number in dict.fromkeys(numbers))


@dataclass(frozen=True)
class Views:
    """What a domain's pool is measured on, in two ways."""

    windows: dict[str, Batch]
    """Evenly spaced windows, which begin anywhere in a document, by domain."""
    passages: dict[str, Passages]
    """Documents from their starts on, window after window, as text is read."""


def views(store: TokenStore, pool: str, windows: int, length: int) -> Views:
    """Cut the windows of a pool that every run is measured on.

    Args:
        store: the text.
        pool: validation, or test.
        windows: windows per domain, and about as many in passages.
        length: windows that a passage has at most.
    """
    passages = math.ceil(windows / length)
    return Views(
        {domain: store.spread(pool, domain, windows) for domain in store.domains},
        {domain: cut_passages(store, pool, domain, passages, length) for domain in store.domains},
    )
