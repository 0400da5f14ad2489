"""What a report of a bug has to tell about an installation, and what a preset takes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from k1.arena import bytes_of, lane_layout
from k1.backend import choose_backend
from k1.block import block_layout, shared_layout
from k1.cli import prepare_torch
from k1.config import Config
from k1.data import TextData
from k1.data.config import POOLS
from k1.data.documents import Document
from k1.data.tokenizer import ByteTokenizer
from k1.flops import step_flops
from k1.kernels import AVAILABLE
from k1.trainer import Trainer, pick_device
from k1env.gate import FIRST_TRIAL_LANE, Gate
from k1env.settings import Settings

DISTRIBUTION = "k1"
BYTES = 256
"""Vocabulary without a tokenizer to train."""
SMALL_BATCH, MANY_OPERATIONS = 4, 1e10
"""Windows of the step that is timed on a CPU where a whole one would take this much."""
ALWAYS_TOLD = ("matplotlib", "pillow", "sb3-contrib", "tensorboard", "triton")
NOT_INSTALLED = "not installed"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"""extra *== *["'](.+?)["']""")


@dataclass(frozen=True)
class Installation:
    """What is installed, and how it is set up."""

    versions: dict[str, str]
    """Of Python, the platform, and each package that K-1 needs or may use; or "not installed"."""
    device: str
    why: str
    """Why this device."""
    kernels: str
    """What runs the blocks, and why."""
    memory: int
    """Bytes that the machine has."""
    threads: dict[str, int]
    missing: dict[str, list[str]]
    """Packages that are not installed, by the extra that brings them; "" are K-1's own needs."""
    remedies: list[str]
    """Commands that install them."""
    determinism: dict[str, Any]
    """Settings as a run has them, and what the surroundings say."""


@dataclass(frozen=True)
class Estimate:
    """What a preset takes."""

    preset: str
    blocks: int
    parameters: int
    """Of the tree that training starts with, shared part included."""
    lane_bytes: int
    """A system with its moments, statistics and free slots."""
    lanes: int
    """Of a run of Phase 2: the system, its shadow, and room for trials."""
    step_seconds: float
    """A training step of one lane in the preset's own mode."""
    run_seconds: float
    """A run of Phase 2 to the end of its budget."""


def examine(device: str, preset: str) -> Installation:
    """Look at the installation.

    Args:
        device: auto, cpu or cuda.
        preset: decides whether kernels fit.

    Raises:
        K1Error: if there is no such device or preset.
    """
    place, config = pick_device(device), Config.preset(preset)
    prepare_torch(place.type)
    missing = _missing()
    needed = {name for names in _requirements().values() for name in names}
    names = [DISTRIBUTION, *sorted(needed | set(ALWAYS_TOLD))]
    return Installation(
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in names},
        },
        place.type,
        _why(device),
        choose_backend(config, place).reason,
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        {
            "processors": os.cpu_count() or 1,
            "torch": torch.get_num_threads(),
            "lanes side by side": os.cpu_count() or 1,
        },
        missing,
        [f'pip install -e ".[{extra}]"' if extra else "pip install -e ." for extra in missing],
        {
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "float32 products": torch.get_float32_matmul_precision(),
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED"),
        },
    )


def estimate(preset: str, device: str, seconds: float = 2.0) -> Estimate:
    """Work out what a preset takes; a few steps are timed, on random bytes.

    How long a step takes does not depend on what the text says. Where a batch is large and the
    device a CPU, a step of a small one is timed, and the rest is by operations (`k1.flops`).

    Args:
        preset: sizes.
        device: auto, cpu or cuda.
        seconds: how long to time steps for.

    Raises:
        K1Error: if there is no such device or preset.
    """
    settings, place = Settings.preset(preset), pick_device(device)
    config = settings.system
    vocab = BYTES if config.data.tokenizer == "bytes" else config.data.vocab_size
    blocks = _blocks(config)
    per_block = block_layout(config.model).total
    text = _random_text(config)

    def operations(of: Config, width: int, mode: str) -> float:
        moved = min(of.train.top_k, blocks - 1) + 1
        return step_flops(of.replace(update={"mode": mode}), width, blocks, moved)

    mode, timed = config.update.mode, config
    if place.type == "cpu" and operations(config, vocab, mode) > MANY_OPERATIONS:
        timed = config.replace(train={"batch": SMALL_BATCH})
    step = _time_steps(timed, text, place, seconds)
    step *= operations(config, vocab, mode) / operations(timed, BYTES, mode)
    dense = operations(config, vocab, settings.phase1_mode) / operations(config, vocab, mode)
    return Estimate(
        preset,
        blocks,
        blocks * per_block + shared_layout(config.model, vocab).total,
        bytes_of(lane_layout(config, vocab, len(text.domains))),
        FIRST_TRIAL_LANE + Gate.lanes_needed(settings.gate),
        step,
        step * (settings.phase1_steps * dense + settings.budget),
    )


def as_text(found: Installation, taken: Estimate) -> str:
    """Write both for people."""
    lines = ["K-1"]
    lines += [f"  {name:18} {version}" for name, version in found.versions.items()]
    lines += [
        "device",
        f"  {found.device:18} {found.why}",
        f"  {'blocks run by':18} {found.kernels}",
        f"  {'memory':18} {found.memory / 2**30:.1f} GiB",
        "threads",
        *(f"  {name:18} {count}" for name, count in found.threads.items()),
        "determinism",
        *(f"  {name:25} {value}" for name, value in found.determinism.items()),
        "missing",
    ]
    for (extra, names), remedy in zip(found.missing.items(), found.remedies, strict=True):
        lines.append(f"  {extra or 'K-1 itself':18} {', '.join(names)}: {remedy}")
    if not found.missing:
        lines.append("  nothing")
    total = taken.lanes * taken.lane_bytes
    lines += [
        f"preset {taken.preset}",
        f"  {'blocks':18} {taken.blocks}",
        f"  {'parameters':18} {taken.parameters:,}",
        f"  {'a lane':18} {taken.lane_bytes / 2**20:,.1f} MiB",
        f"  {'a run of Phase 2':18} {taken.lanes} lanes, {total / 2**30:,.2f} GiB",
        f"  {'a training step':18} {1000 * taken.step_seconds:,.1f} ms",
        f"  {'a whole run':18} about {_duration(taken.run_seconds)}, by the budget and that step",
    ]
    return "\n".join(lines)


def as_table(found: Installation, taken: Estimate) -> dict[str, Any]:
    """Write both as plain JSON data."""
    return {**asdict(found), "estimate": asdict(taken)}


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min"


def _blocks(config: Config) -> int:
    total = count = 1
    for children in config.model.branching:
        count *= children
        total += count
    return total


def _random_text(config: Config) -> TextData:
    """One domain of as little text as there may be."""
    rng, length = random.Random(0), 64 * config.model.context
    documents = [Document("".join(rng.choices("abcdefgh ", k=length))) for _ in range(4)]
    return TextData({"random": dict.fromkeys(POOLS, documents)}, ByteTokenizer())


def _time_steps(config: Config, text: TextData, place: torch.device, seconds: float) -> float:
    trainer = Trainer(config, text, device=place)
    # So many that what is made once, such as a recorded step, is made before.
    warm = 2 * config.update.attribution_every

    def steps(count: int) -> float:
        began = time.perf_counter()
        trainer.train(count)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - began

    first = steps(1)
    if first < seconds:
        steps(warm)
    spent, made = 0.0, 0
    while spent < seconds / 2:
        spent += steps(config.update.attribution_every)
        made += config.update.attribution_every
    return spent / made


def _why(asked: str) -> str:
    if asked != "auto":
        return "asked for"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, Triton {'found' if AVAILABLE else 'not found'}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return f"this torch is for CUDA {torch.version.cuda}, but finds no device or driver"


def _requirements() -> dict[str, list[str]]:
    """What K-1 needs (under "") and what its extras bring."""
    found: dict[str, list[str]] = {"": []}
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return {"": [DISTRIBUTION]}
    for line in lines:
        name, extra = _NAME.match(line), _EXTRA.search(line)
        assert name is not None
        found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _missing() -> dict[str, list[str]]:
    absent = {
        extra: [name for name in names if _version(name) == NOT_INSTALLED]
        for extra, names in _requirements().items()
    }
    return {extra: names for extra, names in absent.items() if names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
