"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter on the CPU.

Import this module before anything that imports triton: the interpreter replaces the compiler only
if its variable is set by then.
"""

import os

import pytest
import torch

from k1.topology import Topology, index_levels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device"),
]
# The interpreter multiplies bfloat16 wrongly, so there it is float32 alone.
DTYPES = [
    torch.float32,
    pytest.param(torch.float32, marks=ON_GPU, id="gpu-float32"),
    pytest.param(torch.bfloat16, marks=ON_GPU, id="gpu-bfloat16"),
]
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}
MAX_CHILDREN = 5


def ragged(*removed):
    """Make a tree with leaves on levels 1, 2 and 3; removing blocks leaves gaps."""
    tree = Topology((1, 5, 9, 8), MAX_CHILDREN)
    for parent in (0, 0, 0, 1, 1, 2, 2, 2, 6, 6, 7, 9):
        tree.insert(parent)
    for slot in removed:
        tree.remove(slot)
    return tree


def ragged_levels():
    """Lay out four lanes; the third is a root with one child, without any block below."""
    small = Topology((1, 5, 9, 8), MAX_CHILDREN)
    small.insert(0)
    return index_levels([ragged(1), ragged(9), small, ragged(7, 3)], DEVICE)


class Draw:
    """Random normal tensors on the device, with values that `dtype` can hold."""

    def __init__(self, seed, dtype=torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape):
        drawn = torch.randn(*shape, generator=self.generator)
        return drawn.to(self.dtype).float().to(DEVICE)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator).to(DEVICE)


def repeats_in_a_graph(function):
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
