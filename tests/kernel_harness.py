"""Where the tests of Triton kernels run: in Triton's interpreter on the CPU, or on a GPU.

Triton decides when it is imported whether it compiles or interprets, so the interpreter has a
process of its own and the tests' process stays as it is. Its `tl.dot` is wrong for bfloat16.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from k1.levels import LevelIndex, index_levels
from k1.topology import Topology

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}
MAX_CHILDREN = 5


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


class Interpreter:
    """Calls functions of test modules in a process where kernels are interpreted."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)

    def __call__(self, check: Callable[..., None], *args: Any) -> None:
        """Run `check(*args)` there; what it raises is raised here.

        The function stands at the top of its module and imports kernels itself.
        """
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed, so there is nothing to interpret kernels with")
        self._pool.submit(check, *args).result()

    def close(self) -> None:
        self._pool.shutdown()


def device() -> torch.device:
    """Return where kernels run in this process: on the CPU in that of the interpreter."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if torch.cuda.is_available() and not interprets else "cpu")


def ragged(*removed: int) -> Topology:
    """Make a tree with leaves on levels 1, 2 and 3; removing blocks leaves gaps."""
    tree = Topology((1, 5, 9, 8), MAX_CHILDREN)
    for parent in (0, 0, 0, 1, 1, 2, 2, 2, 6, 6, 7, 9):
        tree.insert(parent)
    for slot in removed:
        tree.remove(slot)
    return tree


@functools.cache
def ragged_trees() -> list[Topology]:
    """Make four lanes; the third is a root with one child, without any block below."""
    small = Topology((1, 5, 9, 8), MAX_CHILDREN)
    small.insert(0)
    return [ragged(1), ragged(9), small, ragged(7, 3)]


@functools.cache
def ragged_levels() -> list[LevelIndex]:
    """Lay out those four lanes."""
    return index_levels(ragged_trees(), device())


class Draw:
    """Random normal tensors on the device, with values that `dtype` can hold."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator)
        return drawn.to(self.dtype).float().to(device())

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator).to(device())


def repeats_in_a_graph(function: Callable[[], list[torch.Tensor]]) -> bool:
    """Whether a call recorded in a CUDA graph gives the same bits as an ordinary one, twice."""
    expected = [t.clone() for t in function()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    for _ in range(2):
        for tensor in found:
            tensor.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
            return False
    return True
