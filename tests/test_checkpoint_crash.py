"""Checkpoints under crashes: whenever the process ends, a complete one can be loaded."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k1 import checkpoint
from k1.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints
from k1.errors import CheckpointError
from tests.helpers import CHECKPOINT_FILES as FILES
from tests.helpers import save_step, steps_before_a_kill, value_of


class Crash(BaseException):
    """Stands for the end of the process: no handler of ordinary errors may stop it."""


CALLS = ("open", "fsync", "mkdir", "rename", "rmdir", "unlink")


def crash_at(monkeypatch: pytest.MonkeyPatch, countdown: int) -> None:
    """Lets the process end before the n-th call that reaches the disk, clean-up included."""
    left = countdown

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Crash
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(checkpoint, "save_file", dying(checkpoint.save_file))


def test_a_crash_at_any_point_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for countdown in range(1, 200):
        parent = tmp_path / str(countdown)
        save_step(parent, 1, value=1)
        with monkeypatch.context() as patch:
            crash_at(patch, countdown)
            try:
                save_step(parent, 1, value=2)
                finished = True
            except Crash:
                finished = False
        latest = latest_checkpoint(parent)
        assert latest == parent / "step-00000001"
        outcomes.append(value_of(latest))
        save_step(parent, 1, value=3)
        assert value_of(latest) == 3, "the next save recovers"
        prune_checkpoints(parent, keep=1)
        assert list(parent.iterdir()) == [latest]
        if finished:
            break
    else:
        pytest.fail("the save never finished")
    assert outcomes == sorted(outcomes), "once the new one is there it stays"
    assert set(outcomes) == {1.0, 2.0}
    assert len(outcomes) > 10


def test_a_crash_between_the_renames_survives_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_step(tmp_path, 1, value=1)
    folder.rename(tmp_path / ".step-00000001.old")
    assert latest_checkpoint(tmp_path) == folder
    prune_checkpoints(tmp_path, keep=1)
    assert value_of(folder) == 1
    folder.mkdir()
    (folder / "state.json").write_text("torn")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            save_step(tmp_path, 1, value=2)
    assert value_of(folder) == 1, "a torn folder must not push out the complete one"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_all_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(source).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    save_step(tmp_path, 1)
    temporary = events[-2][1]
    assert temporary.startswith(".step-00000001.tmp-")
    assert events == [
        *(("fsync", name) for name in (*FILES, temporary)),
        ("rename", temporary),
        ("fsync", tmp_path.name),
    ]


def test_a_full_disk_is_reported_and_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_step(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device; free space"):
            save_step(tmp_path, 1, value=2)
    assert list(tmp_path.iterdir()) == [folder]
    assert value_of(folder) == 1


SAVE_FOREVER = """
import itertools, sys, torch
from pathlib import Path
from k1.checkpoint import prune_checkpoints, save_checkpoint
parent = Path(sys.argv[1])
for step in itertools.count():
    tensors = {"weight": torch.full((20_000,), float(step))}
    for name in (f"step-{step:08d}", "step-99999999"):
        save_checkpoint(parent / name, tensors, {"step": step}, kind="test")
    prune_checkpoints(parent, keep=3)
    print(step, flush=True)
"""


def test_a_killed_process_leaves_complete_checkpoints(tmp_path: Path) -> None:
    for trial, delay in enumerate((0.0, 0.013, 0.037)):
        parent = tmp_path / str(trial)
        done = steps_before_a_kill(SAVE_FOREVER, parent, 3, delay)
        overwritten = latest_checkpoint(parent)
        assert overwritten == parent / "step-99999999"
        assert value_of(overwritten) >= done
        shutil.rmtree(overwritten, ignore_errors=True)
        shutil.rmtree(parent / ".step-99999999.old", ignore_errors=True)
        newest = latest_checkpoint(parent)
        assert newest is not None
        assert value_of(newest) == load_checkpoint(newest, kind="test")[1]["step"] >= done
