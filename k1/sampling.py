"""Windows of text, drawn on the device from tokens that are held there."""

from __future__ import annotations

import torch
from torch import Tensor

from k1.arena import Arena
from k1.config import Config
from k1.data import POOLS, TextData
from k1.forward import Batch, Text, read_text
from k1.rng import STREAM_DATA, STREAM_DOMAIN, random_bits, random_uniform

GOLDEN_RATIO = 0.6180339887498949
"""Multiples of it, modulo 1, spread evenly however many there are."""


class TokenStore:
    """All pools of all domains as one token tensor on the device."""

    def __init__(self, data: TextData, context: int, device: torch.device | str) -> None:
        """Copy the tokens to the device.

        Raises:
            DataError: if a pool of a domain is too short for one window.
        """
        data.require(context + 2)
        self.data, self.domains = data, data.domains
        self.context = context
        tokens, starts, table, position = [], [], [], 0
        for pool in POOLS:
            for domain in data.domains:
                piece = data.tokens(domain, pool)
                tokens.append(piece)
                starts.append(data.starts(domain, pool))
                table.append((position, len(piece)))
                position += len(piece)
        self.tokens = torch.cat(tokens).to(device)
        self.starts = torch.cat(starts).to(device)
        shape = (len(POOLS), len(data.domains), 2)
        self.extent = torch.tensor(table, dtype=torch.int64).view(shape)
        self.extent_on_device = self.extent.to(device)
        self.token_bytes = data.token_bytes.to(device)
        self._mean_token_bytes: float | None = None
        self._spread: dict[tuple[str, str, int], Batch] = {}

    def _windows(self, start: Tensor, domain: Tensor) -> Batch:
        """Cut windows at absolute positions: start, domain int64 [L, B]."""
        offset = torch.arange(self.context + 1, device=start.device)
        index = start[..., None] + offset
        window = self.tokens[index].long()
        return Batch(window[..., :-1], window[..., 1:], self.starts[index[..., :-1]], domain)

    def sample(self, pool: str, seed: Tensor, counter: Tensor, mix: Tensor, windows: int) -> Batch:
        """Draw random windows.

        Args:
            pool: one of `POOLS`.
            seed: int64 [L].
            counter: int64 [L]: the batch's number in the lane's stream.
            mix: float32 [L, domains]: share of each domain (non-negative, sums to 1).
            windows: windows per lane. The domains of any first few are as mixed as those of all.
        """
        u = random_uniform(seed, STREAM_DOMAIN, counter, 1)
        u = (u + torch.arange(windows, device=seed.device) * GOLDEN_RATIO) % 1.0
        # A CPU adds float32 in float64 by itself; so every device finds the same edges.
        edges = mix.double().cumsum(1).float()[:, None, :-1]
        domain = (u[..., None] >= edges).sum(-1)
        extent = self.extent_on_device[POOLS.index(pool)][domain]
        bits = random_bits(seed, STREAM_DATA, counter, windows)
        start = extent[..., 0] + bits % (extent[..., 1] - self.context)
        return self._windows(start, domain)

    def spread(self, pool: str, domain: str, windows: int) -> Batch:
        """Cut evenly spaced windows of one domain: the same ones every time. Shapes [1, B, T]."""
        known = self._spread.get((pool, domain, windows))
        if known is not None:  # cutting them anew would wait for the device
            return known
        d = self.domains.index(domain)
        first, length = self.extent[POOLS.index(pool), d].tolist()
        count = min(windows, (length - 1) // self.context)
        gap = (length - self.context - 1) / max(1, count - 1)
        starts = [first + int(i * gap) for i in range(count)]
        start = torch.tensor([starts], dtype=torch.int64, device=self.tokens.device)
        batch = self._windows(start, torch.full_like(start, d))
        self._spread[pool, domain, windows] = batch
        return batch

    def mean_token_bytes(self) -> float:
        """UTF-8 bytes that a token of the training text stands for, on average."""
        if self._mean_token_bytes is None:
            train = self.extent[POOLS.index("train")]  # the pools lie one after another
            first, last = int(train[0, 0]), int(train[-1].sum())
            size = len(self.token_bytes)
            used = torch.bincount(self.tokens[first:last].long(), minlength=size)
            self._mean_token_bytes = float((used * self.token_bytes).sum() / used.sum())
        return self._mean_token_bytes

    def bytes_in(self, targets: Tensor) -> Tensor:
        """UTF-8 bytes of target tokens [L, B, T]: float64 [L]."""
        return self.token_bytes[targets].double().flatten(1).sum(1)


def draw(
    store: TokenStore, arena: Arena, start: int, stop: int, kernels: bool
) -> tuple[Batch, Text]:
    """Draw the batch that lanes start..stop train on next, and read it for their routers.

    Args:
        store: the text, on the arena's device.
        arena: the lanes.
        start: first lane.
        stop: one past the last lane.
        kernels: whether one kernel does it all.
    """
    seed, cursor, mix = (arena[n][start:stop] for n in ("data_seed", "data_cursor", "mix"))
    return draw_windows(store, arena.config, seed, cursor, mix, arena.config.train.batch, kernels)


def draw_windows(
    store: TokenStore,
    config: Config,
    seed: Tensor,
    cursor: Tensor,
    mix: Tensor,
    windows: int,
    kernels: bool,
) -> tuple[Batch, Text]:
    """Draw windows of training text and read them for the routers.

    Args:
        store: the text.
        config: the routers' settings.
        seed: int64 [L].
        cursor: int64 [L]: the batch's number in the stream of `seed`.
        mix: float32 [L, domains]: share of each domain.
        windows: windows per lane.
        kernels: whether one kernel does it all.
    """
    if kernels:
        from k1.kernels.sample import sample_fused

        return sample_fused(store, "train", seed, cursor, mix, windows, config.evidence)
    batch = store.sample("train", seed, cursor, mix, windows)
    return batch, read_text(batch, config)
