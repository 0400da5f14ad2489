"""What all command lines share, without a process for each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from k1.cli import run


def test_a_device_without_memory_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Nothing:
        """Take no options."""

    def main(_: Nothing) -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 3.41 GiB. GPU 0 has a total capacity of 139 GiB."
        )

    monkeypatch.setattr("sys.argv", ["it"])
    with pytest.raises(SystemExit, match="2"):
        run(Nothing, main)
    said = capsys.readouterr().err
    assert said.startswith("error: CUDA out of memory. Tried to allocate 3.41 GiB; take a smaller")
    assert said.count("\n") == 1
