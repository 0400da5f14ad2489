"""A whole configuration: build its variants, measure them side by side, record what came out."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from k1.bench.configurations import block_count
from k1.bench.drivers import Driver, build_driver, variant_config
from k1.bench.timing import (
    TooSlowError,
    at_most,
    counted_flops,
    elapsed_ms,
    interleave,
    kernels_per_step,
    quartile_range,
    wait_for,
)
from k1.bench.variants import REFERENCE, Variant
from k1.block import block_layout, shared_layout
from k1.config import Config
from k1.data import TextData
from k1.flops import block_flops_per_token, step_flops

PERIOD = 4
"""Steps are measured in multiples of this, so that attributions are evenly spread."""
PERIODS_PROFILED = 4
"""Periods over which the times of kernels are averaged."""
SPARE_MEMORY = 0.92
"""Share of the device's memory that variants fill before the rest waits for the next group."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    device: torch.device
    peak_flops: float
    """Operations per second that the device reaches at best."""
    rounds: int = 5
    seconds: float = 3.0
    """Time that a variant is measured for, over all rounds."""
    patience: float = 120.0
    """Longest time for a variant to be built, compiled and warmed up, and for one round."""
    say: Callable[[str], None] = print


@dataclass
class _Live:
    """A built variant."""

    driver: Driver
    record: Record
    steps: int
    resident: int
    peak: int


def parameters(config: Config, vocab_size: int) -> int:
    """Parameters of the full tree, shared part included."""
    block, shared = block_layout(config.model), shared_layout(config.model, vocab_size)
    return block_count(config) * block.total + shared.total


def formula_flops(config: Config, vocab_size: int, variant: Variant) -> float:
    """Operations of one step of a variant, by formula."""
    config, blocks = variant_config(config, variant), block_count(config)
    tokens = config.train.batch * config.model.context
    block = block_flops_per_token(config) * tokens
    depth = len(config.model.branching) + 1
    if variant.kind == "frozen":
        return blocks * block
    if variant.toggle:
        # The root and the embedding are always trained, so the gradient passes through all
        # blocks; what the others are spared is the gradient of their weights.
        d, f, t = config.model.embed, config.model.feed_forward, config.model.context
        products, attention = 2.0 * (4 * d * d + 2 * d * f), 2.0 * d * t
        trained = (2 * blocks + depth) * products + 3 * blocks * attention
        return tokens * (trained + 3 * 2.0 * d * vocab_size)
    updated = min(config.train.top_k, blocks - 1) + 1
    return step_flops(config, vocab_size, blocks, updated)


def free_memory(device: torch.device) -> None:
    """Give back what dropped variants held on a GPU; a CPU's memory is not that scarce."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _failure(error: Exception) -> Record:
    """Say in a record why a variant has no figures."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    if isinstance(error, TooSlowError):
        return {"status": "too slow", "reason": str(error)}
    lines = str(error).strip().splitlines() or [""]
    return {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}"}


class Suite:
    """Measures the variants of one configuration."""

    def __init__(self, config: Config, data: TextData, plan: Plan) -> None:
        """Take what is to be measured."""
        self.config, self.data, self.plan = config, data, plan
        self.records: dict[str, Record] = {}
        self._keep: Callable[[dict[str, Record]], None] = _forget

    def run(
        self, variants: list[Variant], keep: Callable[[dict[str, Record]], None] | None = None
    ) -> dict[str, Record]:
        """Measure variants.

        All that fit in memory are measured in the same rounds. What does not fit waits for further
        rounds, and so does each that has to be compiled, for compiled code shares caches and
        memory with what else is compiled. The reference takes part in all rounds: every ratio is
        within its own.

        Args:
            variants: what to measure.
            keep: is given the records whenever one has changed; a variant's status is
                "unfinished" until its first round is over.

        Returns:
            A record for each variant, by name, in their order.
        """
        self._keep = keep or _forget
        self.records = {v.name: {"status": "unfinished", "about": v.about} for v in variants}
        self._count(variants)
        reference = next((v for v in variants if v.name == REFERENCE), None)
        plain = [v for v in variants if v.compiled is None]
        for waiting in [plain, *([v] for v in variants if v.compiled is not None)]:
            while waiting:
                group: dict[str, _Live] = {}
                if reference is not None and waiting[0] is not reference:
                    self._try(reference, group)
                self._fill(waiting, group)
                self._measure(group)
                group.clear()
                if waiting is not plain:
                    torch._dynamo.reset()  # it holds what it compiled
                free_memory(self.plan.device)
        return self.records

    def _note(self, name: str, found: Record) -> None:
        """Put what was found into a variant's record."""
        record = self.records[name]
        record.update(found)
        if record["status"] == "ok":
            floor_ms = record["flops_formula"] / self.plan.peak_flops * 1000
            record["floor_share"] = floor_ms / record["median_ms"]
        self._keep(self.records)

    def _fill(self, waiting: list[Variant], group: dict[str, _Live]) -> None:
        """Move variants into a group until memory is full."""
        tried = 0
        while waiting:
            variant, alone = waiting[0], False
            if variant.name not in group and not self._try(variant, group):
                if tried:
                    return  # there may be room when the others are gone
                alone = bool(group)
                if alone:  # only the reference is in its way
                    group.clear()
                    free_memory(self.plan.device)
                    self._try(variant, group)
            waiting.pop(0)
            tried += 1
            if alone:
                return

    # -- operations ------------------------------------------------------------------------------

    def _count(self, variants: list[Variant]) -> None:
        """Count the operations of each distinct plain step, by the counter and by formula."""
        counted: dict[tuple, float | None] = {}
        for variant in variants:
            plain = variant.plain
            key = (plain.kind, plain.mode, plain.toggle, plain.inner_steps, plain.attribution_every)
            if key not in counted:
                counted[key] = self._count_one(plain)
            formula = formula_flops(self.config, self.data.vocab_size, plain)
            self._note(variant.name, {"flops_counted": counted[key], "flops_formula": formula})

    def _count_one(self, plain: Variant) -> float | None:
        try:
            with at_most(self.plan.patience, "counting operations"):
                return self._run_counted(plain)
        except Exception as error:
            why = _failure(error)
            self.plan.say(f"  {plain.name}: operations not counted: {why}")
            return None
        finally:
            free_memory(self.plan.device)

    def _run_counted(self, plain: Variant) -> float:
        driver = build_driver(self.config, self.data, self.plan.device, plain)
        driver.prepare(PERIOD)
        driver.run(PERIOD)  # an attribution that is due in step 0 only is then over
        return counted_flops(driver, PERIOD, self.plan.device)

    # -- building --------------------------------------------------------------------------------

    def _try(self, variant: Variant, group: dict[str, _Live]) -> bool:
        """Build a variant into a group; False if memory is what it lacks."""
        failure: Record = {}
        try:
            with at_most(self.plan.patience, "building and warming up"):
                live: _Live | None = self._build(variant)
        except Exception as error:
            failure = _failure(error)
            live = None
        free_memory(self.plan.device)
        if live is not None and group and not self._fits([*group.values(), live]):
            live, failure = None, {"status": "out of memory"}
            free_memory(self.plan.device)
        again = self.records[variant.name]["status"] == "ok"  # the reference, once more
        if live is None:
            self.plan.say(f"  {variant.name}: {failure['status']} {failure.get('reason', '')}")
            if not again:
                self._note(variant.name, failure)
            return failure["status"] != "out of memory"
        seconds, first = live.record["build_seconds"], live.record["first_ms"]
        self.plan.say(f"  {variant.name}: ready in {seconds:.1f} s, some {first:.3g} ms a step")
        if not again:
            self._note(variant.name, {"status": "unfinished", **live.record})
        group[variant.name] = live
        return True

    def _build(self, variant: Variant) -> _Live:
        record: Record = {}
        device, cuda = self.plan.device, self.plan.device.type == "cuda"
        allocated, reserved = self._memory()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        driver = build_driver(self.config, self.data, device, variant)
        for _ in range(2):  # compilers and graphs are done after the first few steps
            driver.prepare(PERIOD)
            driver.run(PERIOD)
        wait_for(device)
        record["build_seconds"] = time.perf_counter() - began
        if cuda and not variant.captured:
            torch.cuda.reset_peak_memory_stats(device)
        step_ms = record["first_ms"] = elapsed_ms(driver, PERIOD, device)
        if driver.backend is not None:
            record["backend"] = driver.backend.reason
        kernels = kernels_per_step(driver, PERIODS_PROFILED * PERIOD, device)
        record["kernels"] = record["kernel_ms"] = None
        if kernels is not None:
            record["kernels"] = sum(kernel.count for kernel in kernels.values())
            record["kernel_ms"] = {name: kernel.ms for name, kernel in kernels.items()}
        peak = 0
        record["peak_bytes"] = None
        if cuda:
            peak = torch.cuda.max_memory_allocated(device) - allocated
            record["peak_bytes"] = peak
            torch.cuda.empty_cache()
        share = self.plan.seconds / self.plan.rounds * 1000 / step_ms
        steps = PERIOD * max(1, math.floor(share / PERIOD))
        if steps * step_ms / 1000 > self.plan.patience:
            raise TooSlowError(f"{steps} steps take {steps * step_ms / 1000:.0f} s")
        resident = self._memory()[1] - reserved
        return _Live(driver, record, steps, resident, peak)

    def _memory(self) -> tuple[int, int]:
        """Bytes allocated and reserved on the device."""
        device = self.plan.device
        if device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def _fits(self, lives: list[_Live]) -> bool:
        """Whether the variants can take turns without running out of memory."""
        if self.plan.device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(self.plan.device).total_memory
        transient = max(max(0, live.peak - live.resident) for live in lives)
        return sum(live.resident for live in lives) + transient <= SPARE_MEMORY * total

    # -- rounds ----------------------------------------------------------------------------------

    def _measure(self, group: dict[str, _Live]) -> None:
        """Time a group in rounds; what has figures from an earlier group keeps them."""
        if not group:
            return
        drivers = {name: live.driver for name, live in group.items()}
        steps = {name: live.steps for name, live in group.items()}
        fresh = [name for name in group if self.records[name]["status"] != "ok"]
        for number, times in enumerate(
            interleave(drivers, steps, self.plan.rounds, self.plan.device), 1
        ):
            beside = statistics.median(times[REFERENCE]) if REFERENCE in times else None
            for name in fresh:
                median = statistics.median(times[name])
                found = {
                    "status": "ok",
                    "median_ms": median,
                    "iqr_ms": quartile_range(times[name]),
                    "rounds_ms": list(times[name]),
                    "steps_per_round": steps[name],
                    "ratio": None if beside is None else median / beside,
                }
                self._note(name, found)
            self.plan.say(
                f"  round {number} of {self.plan.rounds}: "
                + ", ".join(f"{name} {times[name][-1]:.3g}" for name in fresh)
            )


def _forget(records: dict[str, Record]) -> None:
    """Keep nothing of what has changed."""
