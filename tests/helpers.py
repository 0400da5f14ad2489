"""What tests of several modules share: refusals, checkpoints, text that reads like documents."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from k1.checkpoint import load_checkpoint, save_checkpoint
from k1.errors import K1Error
from k1.topology import Topology

ROOT = Path(__file__).parent.parent
CHECKPOINT_FILES = ("tensors.safetensors", "state.json", "manifest.json")


def refusal(call: Callable[[], object], kind: type[K1Error] = K1Error) -> str:
    """Message of the error that a call ends in."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "a message has a cause and a remedy"
    return message


def save_step(parent: Path, step: int, value: float | None = None) -> Path:
    """Save a small checkpoint of kind "test" whose tensor is the step or a value throughout."""
    tensors = {"weight": torch.full((64,), float(step if value is None else value))}
    return save_checkpoint(parent / f"step-{step:08d}", tensors, {"step": step}, kind="test")


def value_of(folder: Path) -> float:
    """The value that `save_step` saved."""
    tensors, _ = load_checkpoint(folder, kind="test")
    assert len(set(tensors["weight"].tolist())) == 1
    return tensors["weight"][0].item()


def steps_before_a_kill(code: str, target: Path, steps: int, delay: float = 0.0) -> int:
    """Run code on a path that prints its steps for ever, kill it, and return a confirmed step."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    with process:
        confirmed = [int(process.stdout.readline()) for _ in range(steps)][-1]
        time.sleep(delay)
        process.kill()
    return confirmed


def loaded_modules(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of these modules code imports, run in a Python of its own."""
    code = f"import sys; {code}; print(*[m for m in {names!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def write_two_domains(folder: Path) -> Path:
    """Write a little text of two domains, prose and code, with words in it."""
    for number, domain in enumerate(("prose", "code")):
        (folder / domain).mkdir(parents=True)
        for split, size in (("train", 120), ("validation", 60), ("test", 60)):
            documents = (
                f"{domain} {split} document {i}: " + f"word{(i * 7 + number) % 23} and more. " * 12
                for i in range(size)
            )
            (folder / domain / f"{split}.txt").write_text("\n\n".join(documents))
    return folder


def random_tree(generator: torch.Generator, grow: int) -> Topology:
    """Grow a tree of at most 14 blocks on four levels, with holes."""
    tree = Topology((1, 4, 6, 4), 3)
    for i in range(grow):
        blocks = sorted(tree.blocks)
        pick = blocks[int(torch.randint(len(blocks), (), generator=generator))]
        if i % 5 == 4 and pick and len(blocks) > 4:
            tree.remove(pick)
        elif tree.why_not_add(pick) is None:
            tree.insert(pick)
    return tree
