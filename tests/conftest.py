"""A small text of three synthetic domains, and trainers on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k1.config import Config
from k1.data import TextData, load_data
from k1.trainer import Trainer
from tests.kernel_harness import ON_GPU, Interpreter
from tests.reference import small_config

torch.set_num_threads(1)

DOMAINS = ("alpha", "beta", "gamma")
LETTERS = "abcdefghijkl"
SIZES = {"train": 48_000, "validation": 20_000, "test": 20_000}


def markov_documents(domain: int, seed: int, size: int) -> str:
    """Write documents of some 400 letters; each domain prefers other pairs of the same letters."""
    n = len(LETTERS)
    table = np.full((n, n), 0.2 / n)
    follow = np.random.default_rng(1000 + domain).permuted(np.tile(np.arange(n), (n, 1)), axis=1)
    for letter in range(n):
        table[letter, follow[letter, :2]] += 0.4
    edges = table.cumsum(1)
    rng = np.random.default_rng([domain, seed])
    draws = rng.random(size)
    here, out = 0, []
    for i, u in enumerate(draws):
        here = min(int(np.searchsorted(edges[here], u * edges[here, -1])), n - 1)
        out.append(LETTERS[here])
        if i % 400 == 399:
            out.append("\n\n")
        elif i % 50 == 49:
            out.append("\n")
    return "".join(out)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    folder: Path = tmp_path_factory.mktemp("text")
    for number, domain in enumerate(DOMAINS):
        (folder / domain).mkdir()
        for seed, (split, size) in enumerate(SIZES.items()):
            (folder / domain / f"{split}.txt").write_text(markov_documents(number, seed, size))
    return load_data(folder)


@pytest.fixture(scope="session")
def make(data: TextData) -> Callable[..., Trainer]:
    """Build a trainer: `make(config or None, seed=0, lanes=1, train={"lr": 1}, ...)`."""

    def build(
        config: Config | None = None, seed: int = 0, lanes: int = 1, **sections: dict[str, Any]
    ) -> Trainer:
        config = (config or small_config()).replace(**sections)
        return Trainer(config, data, seed=seed, lanes=lanes)

    return build


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Run a check of Triton kernels in their interpreter: `interpreted(check, *args)`."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=ON_GPU)])
def kernels(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a check of Triton kernels, interpreted and on a GPU: `kernels(check, *args)`."""
    if request.param == "gpu":
        return lambda check, *args: check(*args)
    run: Interpreter = request.getfixturevalue("interpreted")
    return run
