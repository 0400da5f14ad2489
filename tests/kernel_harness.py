"""Triton kernels on a machine without a GPU: functions run in a process that interprets them.

Triton decides when it is imported whether it compiles or interprets, so the interpreter has a
process of its own and the tests' process stays as it is. Its `tl.dot` is wrong for bfloat16.
"""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch


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
