"""CUDA graphs and streams: launching costs the host next to nothing, and idle units find work."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Record what is launched inside, instead of launching it.

    Args:
        graph: what it is recorded in.
        stream: where it is launched. Recordings that share memory have to share that, too.
        pool: memory to share with other graphs.

    Raises:
        torch.OutOfMemoryError: if there is not enough for what is recorded.
    """
    before = torch.cuda.current_stream(stream.device)
    # Workspaces of cuBLAS have to be the graph's own: others may let go of those that exist
    # (torch.compile does), and those that it makes are of no use to others.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # torch leaves it if the end of a recording fails
        # It does fail after any other error, and hides that.
        if isinstance(error.__context__, torch.OutOfMemoryError):
            raise error.__context__ from None
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class StepGraphs:
    """One recorded graph for each shape of a step.

    The first step of a shape runs as it is, which compiles and allocates what it needs; the second
    is recorded and from then on replayed. What varies between steps of a shape has to be in tensors
    that keep their addresses. All graphs share memory, so a result lasts until the next step of any
    shape. Graphs are kept for good: there are as many as shapes that were met.
    """

    def __init__(self, device: torch.device) -> None:
        """Start without graphs; they share one pool of memory."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._met: set[Hashable] = set()
        self._pool: Any = None

    @property
    def shapes(self) -> list[Hashable]:
        """Shapes that have been recorded."""
        return list(self._recorded)

    def run(self, shape: Hashable, work: Callable[[], T]) -> T:
        """Do work, which must not wait for the device, on the device."""
        if shape in self._recorded:
            graph, result = self._recorded[shape]
        elif shape not in self._met:
            self._met.add(shape)
            return work()
        else:
            graph = torch.cuda.CUDAGraph()
            if self._stream is None:
                # What others wait for goes before what runs beside it (`Side`).
                self._stream = torch.cuda.Stream(self._device, priority=-1)
            with recording(graph, self._stream, self._pool):
                result = work()
            self._pool = self._pool or graph.pool()
            self._recorded[shape] = graph, result
        graph.replay()
        typed: T = result
        return typed


class Side:
    """A second stream: what is launched inside runs beside what is launched after it.

    Until `join`, or `wait` for a mark behind it, nothing outside may use what was made inside, nor
    change what is read there. On a CPU, everything runs in order.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[Any] = []
        self._forked = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Launch on the second stream."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._forked = True
        with torch.cuda.stream(self._stream):
            yield

    def keep(self, *made_outside: Any) -> None:
        """Let tensors that are read on the second stream live until it is joined."""
        if self._stream is not None:
            self._kept += made_outside

    def mark(self) -> torch.cuda.Event | None:
        """Mark how far the second stream has come, for `wait`."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let what is launched from here on wait for what was launched before the mark."""
        if self._stream is not None and mark is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)

    def join(self) -> None:
        """Let what is launched from here on wait for the second stream, if it has been forked.

        If not, there is nothing to wait for, and a recording may not wait for it.
        """
        if self._stream is not None and self._forked:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._kept.clear()
            self._forked = False
