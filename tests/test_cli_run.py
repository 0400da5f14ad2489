"""What all command lines share, without a process for each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from k1.cli import run

ERRORS = {
    "CUDA out of memory. Tried to allocate 3.41 GiB": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 3.41 GiB. GPU 0 has a total capacity of 139 GiB."
    ),
    "out of memory": MemoryError(),
    "[enforce fail at x] data. DefaultCPUAllocator: can't allocate memory": RuntimeError(
        "[enforce fail at x] data. DefaultCPUAllocator: can't allocate memory. Error code 12"
    ),
}


@dataclass(frozen=True)
class Nothing:
    """Take no options."""


@pytest.mark.parametrize("told", ERRORS)
def test_too_little_memory_is_one_line(
    told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Nothing) -> int:
        raise ERRORS[told]

    monkeypatch.setattr("sys.argv", ["it"])
    with pytest.raises(SystemExit, match="2"):
        run(Nothing, main)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}; take a smaller") and said.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: Nothing) -> int:
        raise RuntimeError("something else")

    monkeypatch.setattr("sys.argv", ["it"])
    with pytest.raises(RuntimeError, match="something else"):
        run(Nothing, main)
