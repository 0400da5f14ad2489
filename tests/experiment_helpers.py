"""What tests of methods of continual learning share: learners on a small text."""

from __future__ import annotations

from typing import Any

import torch

from k1.data import TextData
from k1.experiments.learner import Learner, Run
from k1.experiments.methods import METHODS
from k1.forward import Batch
from k1.sampling import TokenStore
from tests.reference import small_config

ORDER = ("beta", "alpha", "gamma")
SPARE = {"model": {"spare": 2.0}}


class Build:
    """Build a learner of a method: `learn(name, runs=2, strength=0, **sections)`."""

    def __init__(self, data: TextData, device: str = "cpu") -> None:
        self.data, self.device = data, device

    def __call__(self, name: str, runs: int = 1, strength: float = 0.0, **sections: Any) -> Learner:
        config = small_config(**{**SPARE, **sections})
        store = TokenStore(self.data, config.model.context, self.device)
        method, vocab = METHODS[name], self.data.vocab_size
        lanes = [Run(name, ORDER, seed, 3e-3, strength) for seed in range(1, runs + 1)]
        return method.learner(method, config, store, vocab, lanes, self.device, **method.options)


def go(learner: Learner, phases: int, steps: int = 4) -> Learner:
    """Take a learner through the first phases of its stream."""
    for phase in range(phases):
        learner.begin(phase)
        learner.train(0, steps, steps)
        learner.end()
    return learner


def next_batch_of(learner: Learner, windows: int = 4) -> Batch:
    """The windows that a learner's next step will see."""
    a = learner.arena
    return learner.store.sample("train", a["data_seed"], a["data_cursor"], a["mix"], windows)


def rows_of(learner: Learner) -> dict[int, torch.Tensor]:
    """Copies of the parameters of the blocks in lane 0, by slot."""
    return {
        slot: learner.arena["weight"][0, slot].clone() for slot in learner.arena.trees[0].blocks
    }
