"""Variants brought to life: objects that make training steps on the same batches."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from k1.arena import Arena, LaneState
from k1.backend import Backend
from k1.bench.stock import StockTrainer, fresh_tree
from k1.bench.variants import Variant
from k1.config import Config
from k1.data import TextData
from k1.engine import Engine
from k1.forward import Batch, Weights, forward, lane_loss, read_text
from k1.graphs import recording
from k1.measure import outputs
from k1.rng import derive_seed
from k1.sampling import TokenStore

SEED = 0


@contextmanager
def determinism(on: bool) -> Iterator[None]:
    """Run with or without torch's deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def variant_config(config: Config, variant: Variant) -> Config:
    """Put a variant's settings into a configuration."""
    return config.replace(
        update={
            "mode": variant.mode,
            "attribution_every": variant.attribution_every,
            "inner_steps": variant.inner_steps,
        }
    )


def make_engine(arena: Arena, store: TokenStore, variant: Variant) -> Engine:
    """Build the engine that a variant asks for; `engine.backend` tells what runs its blocks."""
    return Engine(arena, store, fused=None if variant.fused else False, graph=variant.graph)


class Stream:
    """The batches that the engine of a fresh lane draws, one after another."""

    def __init__(self, store: TokenStore, config: Config) -> None:
        """Start at the first batch."""
        self.store, self.windows = store, config.train.batch
        device, domains = store.tokens.device, len(store.domains)
        self.seed = torch.tensor([derive_seed("data", SEED)], device=device)
        self.mix = torch.full((1, domains), 1.0 / domains, device=device)
        self.cursor = 0

    def next(self) -> Batch:
        """Draw a batch [1, B, T]."""
        counter = torch.tensor([self.cursor], device=self.seed.device)
        self.cursor += 1
        return self.store.sample("train", self.seed, counter, self.mix, self.windows)


class Driver(ABC):
    """Makes steps of one variant."""

    deterministic = False
    backend: Backend | None = None
    """What runs the blocks of K-1's engine; None where it is not the engine that makes the step."""

    def prepare(self, steps: int) -> None:  # noqa: B027 (most have nothing to do)
        """Do what is not measured: draw the batches of the next steps."""

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Make steps without waiting for the device."""

    def run(self, steps: int) -> None:
        """Make steps under the variant's settings."""
        with determinism(self.deterministic):
            self.advance(steps)


class _Drawn(Driver):
    """A driver that is handed its batches; drawing them costs it nothing."""

    def __init__(self, store: TokenStore, config: Config) -> None:
        self.stream = Stream(store, config)
        self.batches: list[Batch] = []

    def prepare(self, steps: int) -> None:
        self.batches = [self.stream.next() for _ in range(steps)]

    def advance(self, steps: int) -> None:
        for batch in self.batches[:steps]:
            self.step(batch)

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """Make one step."""


class StockDriver(_Drawn):
    """Ordinary modules."""

    def __init__(self, config: Config, store: TokenStore, vocab: int, variant: Variant) -> None:
        """Build and initialise them on the device."""
        super().__init__(store, config)
        self.trainer = StockTrainer(
            fresh_tree(config, vocab, store.tokens.device),
            config,
            autocast=variant.autocast,
            compiled=variant.compiled,
            regional=variant.regional,
            toggle=variant.toggle,
        )

    def step(self, batch: Batch) -> None:
        """Make one step."""
        self.trainer.step(batch.inputs[0], batch.targets[0])


class StackedDriver(_Drawn):
    """K-1's own dense forward pass, compiled, with torch's optimizer: the best dense step."""

    def __init__(self, arena: Arena, store: TokenStore, variant: Variant) -> None:
        """Take the parameters out of a fresh arena."""
        config = arena.config
        super().__init__(store, config)
        start = arena.weights(0, 1)
        self.rows = [rows.clone().requires_grad_() for rows in start.levels]
        self.shared = start.shared.clone().requires_grad_()
        router, levels = arena.router(0, 1), arena.index(0, 1)
        block_layout, shared_layout = start.block_layout, start.shared_layout

        def output(rows: list[Tensor], shared: Tensor, batch: Batch) -> Tensor:
            weights = Weights(rows, shared, block_layout, shared_layout)
            text = read_text(batch, config)
            return forward(weights, router, levels, batch, text, config).output

        def loss(rows: list[Tensor], shared: Tensor, batch: Batch) -> Tensor:
            weights = Weights(rows, shared, block_layout, shared_layout)
            return lane_loss(weights, self.output(rows, shared, batch), batch).mean()

        self.compiled = variant.compiled is not None
        self.output: Any = output
        self.loss = loss
        if variant.compiled is not None:
            # Not the loss: it is one product in chunks, and torch 2.11 fails to compile it.
            self.output = torch.compile(output, mode=variant.compiled, dynamic=False)
        self.parameters = [*self.rows, self.shared]
        o = config.optimizer
        self.clip = o.clip
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.train.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True
        )

    def step(self, batch: Batch) -> None:
        """Make one step."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self.loss(self.rows, self.shared, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


class EngineDriver(Driver):
    """K-1's engine, which draws its batches itself."""

    def __init__(self, arena: Arena, store: TokenStore, variant: Variant) -> None:
        """Build the engine on a fresh arena."""
        self.deterministic = variant.deterministic and arena.device.type == "cuda"
        self.engine = make_engine(arena, store, variant)
        self.backend = self.engine.backend

    def advance(self, steps: int) -> None:
        """Make steps."""
        self.engine.train(0, 1, steps)


class FrozenDriver(Driver):
    """The frozen forward pass alone, captured in a CUDA graph where asked for."""

    def __init__(self, arena: Arena, store: TokenStore, variant: Variant) -> None:
        """Capture the pass on a first batch."""
        self.deterministic = variant.deterministic and arena.device.type == "cuda"
        self.engine = make_engine(arena, store, variant)
        self.backend = self.engine.backend
        self.batch = Stream(store, arena.config).next()
        self.graph: torch.cuda.CUDAGraph | None = None
        if variant.graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), determinism(self.deterministic):
                for _ in range(3):
                    self._forward()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with determinism(self.deterministic), recording(self.graph, side):
                self._forward()

    @torch.no_grad()
    def _forward(self) -> None:
        outputs(self.engine, self.engine.arena.forest(0, 1), self.batch)

    def advance(self, steps: int) -> None:
        """Run the pass."""
        for _ in range(steps):
            if self.graph is None:
                self._forward()
            else:
                self.graph.replay()


@functools.lru_cache(maxsize=1)
def _fresh_lane(config: Config, vocab_size: int, domains: int) -> LaneState:
    """Draw a fresh lane once for all variants: a billion numbers take their time."""
    arena = Arena(config, vocab_size, domains, 1)
    arena.reset_lane(0, SEED)
    return arena.read_lane(0)


def build_driver(config: Config, data: TextData, device: torch.device, variant: Variant) -> Driver:
    """Build a variant with fresh weights."""
    start, config = config, variant_config(config, variant)
    store = TokenStore(data, config.model.context, device)
    if variant.kind == "stock":
        return StockDriver(config, store, data.vocab_size, variant)
    arena = Arena(config, data.vocab_size, len(data.domains), 1, device)
    arena.write_lane(0, _fresh_lane(start, data.vocab_size, len(data.domains)))
    if variant.kind == "stacked":
        return StackedDriver(arena, store, variant)
    if variant.kind == "frozen":
        return FrozenDriver(arena, store, variant)
    return EngineDriver(arena, store, variant)
