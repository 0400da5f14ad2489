"""Many environments acting at random for long: nothing breaks, and memory does not grow."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k1.data import TextData
from k1env.vector import Phase2VectorEnv
from tests.phase2_helpers import smallest
from tests.stateful_checks import check_bounds, check_lane, check_tree, hold

SAMPLES = 100
"""How often memory is looked at; the first tenth of them counts as starting up."""


def resident_bytes() -> int:
    """Memory of this process that is in RAM and in use; the allocator gives the rest back first."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the most so far


def soak(data: TextData, lanes: int, steps: int, device: str) -> dict[str, Any]:
    """Let random policies act in `lanes` environments, at least `steps` decisions in all."""
    config = smallest(max_decisions=40)
    envs = Phase2VectorEnv(lanes, config=config, data=data, device=device, wide=True)
    envs.reset(seed=0)
    draws, turns = np.random.default_rng(0), math.ceil(steps / lanes)
    found: dict[str, Any] = {"episodes": 0, "tried": 0, "credited": 0, "stages": set()}
    began, memory = time.monotonic(), []
    for turn in range(turns):
        masks = envs.action_masks()
        actions = [int(draws.choice(np.flatnonzero(mask))) for mask in masks]
        for result in envs.step_each(actions):
            _, info = result.final if result.final is not None else (None, result.info)
            found["episodes"] += result.final is not None
            found["tried"] += info["tried"]
            found["credited"] += info["credited"]
            found["stages"].add(info["stage"])
            hold("finite", np.isfinite(result.reward), result.reward)
            hold("observation", envs.single_observation_space.contains(result.observation))
        if turn % max(1, turns // SAMPLES) == 0:
            memory.append(resident_bytes())
    for env in envs.envs:
        check_tree(env.session.tree)
        check_lane(env, env.session.main)
        check_bounds(env.session.boundary.bounds, env.session.arena.scratch - 1)
    found["megabytes"] = [round(sample / 1e6) for sample in memory]
    settled = memory[len(memory) // 10 :]
    fifth = max(1, len(settled) // 5)
    found["growth"] = statistics.median(settled[-fifth:]) / statistics.median(settled[:fifth]) - 1
    found["decisions"], found["seconds"] = turns * lanes, time.monotonic() - began
    print(found)
    return found


def test_a_short_soak(data: TextData) -> None:
    found = soak(data, lanes=4, steps=80, device="cpu")
    assert found["decisions"] == 80 and found["tried"] > 0


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_ten_thousand_steps_of_few(data: TextData) -> None:
    found = soak(data, lanes=4, steps=40_000, device="cpu")
    assert found["decisions"] == 40_000 and found["growth"] < 0.01


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_a_hundred_thousand_decisions(data: TextData) -> None:
    found = soak(data, lanes=64, steps=100_000, device="cpu")
    assert found["decisions"] >= 100_000 and found["tried"] > 1_000
    assert found["growth"] < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.torture
@pytest.mark.timeout(0)
def test_a_hundred_thousand_decisions_on_a_gpu(data: TextData) -> None:
    found = soak(data, lanes=64, steps=100_000, device="cuda")
    assert found["decisions"] >= 100_000 and found["growth"] < 0.01
