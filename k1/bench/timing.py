"""How time, memory, kernels and operations are measured."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from k1.bench.drivers import Driver


class TooSlowError(Exception):
    """Something took longer than it may."""


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Stop a piece of Python (a compilation, say) that takes too long; main thread only.

    An exception that the alarm raises may come out wrapped by whatever it interrupted.

    Raises:
        TooSlowError: if it does.
    """
    rang = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rang
        rang = True
        raise TooSlowError(what)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if rang:
            raise TooSlowError(f"{what} took more than {seconds:g} s") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(driver: Driver, steps: int, device: torch.device) -> float:
    """Time of one step in ms, over `steps` steps: by device events on CUDA."""
    driver.prepare(steps)
    wait_for(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        driver.run(steps)
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / steps
    began = time.perf_counter()
    driver.run(steps)
    return (time.perf_counter() - began) / steps * 1000


def interleave(
    drivers: dict[str, Driver], steps: dict[str, int], rounds: int, device: torch.device
) -> Iterator[dict[str, list[float]]]:
    """Time drivers in turn, round after round; each round begins with another one.

    Yields:
        After each round, ms per step of every round so far, by name.
    """
    names = list(drivers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(elapsed_ms(drivers[name], steps[name], device))
        yield times


def quartile_range(values: list[float]) -> float:
    """Distance between the first and the third quartile, 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


@dataclass(frozen=True)
class Kernel:
    """A kernel's part in one step."""

    count: float
    """Times that it runs."""
    ms: float
    """Time that it takes in all, also where others run beside it."""


def kernels_per_step(driver: Driver, steps: int, device: torch.device) -> dict[str, Kernel] | None:
    """Kernels by name that run on the device, those inside graphs too; None on a CPU."""
    if device.type != "cuda":
        return None
    driver.prepare(steps)
    wait_for(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        driver.run(steps)
        wait_for(device)
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        on_device = event.device_type.name == "CUDA" and not event.is_user_annotation
        if on_device and not event.name.startswith(("Memcpy", "Memset")):
            times.setdefault(event.name, []).append(event.device_time / 1000)
    return {name: Kernel(len(found) / steps, sum(found) / steps) for name, found in times.items()}


def counted_flops(driver: Driver, steps: int, device: torch.device) -> float:
    """Operations of one step as PyTorch's own counter sees them: matrix products, attention."""
    driver.prepare(steps)
    # The counter does not know the CPU's fused attention; it knows the products it consists of.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with plain, FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        driver.run(steps)
    return counter.get_total_flops() / steps


def _bmm_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a batched product; torch's own counter fails if the result has a dtype."""
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[-1]


def _baddbmm_flops(_: torch.Size, left: torch.Size, right: torch.Size, *__: Any, **___: Any) -> int:
    return _bmm_flops(left, right)


_ATEN = torch.ops.aten
PRODUCTS: dict[Any, Any] = {
    _ATEN.bmm: _bmm_flops,
    _ATEN.baddbmm: _baddbmm_flops,
    _ATEN.baddbmm_: _baddbmm_flops,
}
"""Operations that torch's own counter does not know, or not in all their forms."""


def matmul_peak(device: torch.device) -> float:
    """Operations per second of a large square product: 8192 bf16 on CUDA, 2048 float32 else."""
    cuda = device.type == "cuda"
    size, repeats = (8192, 10) if cuda else (2048, 1)
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(4):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait_for(device)
        times.append((time.perf_counter() - began) / repeats)
    return 2.0 * size**3 / min(times)
