"""Runs under crashes: at every call, on a full disk, without power, killed at random."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from k1.checkpoint import (
    load_checkpoint,
    newest_intact_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from k1.data import load_data
from k1.errors import CheckpointError, K1Error
from k1env.env import Phase2Env
from k1env.gate import Gate
from k1env.ledger import GENESIS, Ledger, read_ledger
from k1env.run_folder import RunFolder
from k1env.runner import Runner
from tests.disk import Crash, Disk, PowerLoss, crash_at, full_from, watched
from tests.helpers import save_step, value_of
from tests.phase2_helpers import ROOT, environment, prepare_run, quick, write_text
from tests.test_resume import Script, Silent, same_run

LABELS = ("tune lr x0.1", "add under slot 0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("crash") / "text")


@pytest.fixture(scope="module")
def env(text: Path) -> Phase2Env:
    settings = quick(max_decisions=len(LABELS), phase_decisions=1)
    return Phase2Env(config=settings, data=load_data(text))


def run_on(path: Path, env: Phase2Env) -> None:
    """Start a run, or go on with it, in this process."""
    if (path / "config.json").exists():
        folder = RunFolder.open(path)
    else:
        folder = RunFolder.create(path, {"arguments": {}, "settings": {}}, ["test"])
    Runner(env, Script(LABELS, env), folder, Silent(), seed=1).run(resume=True)


@pytest.fixture(scope="module")
def uncut(env: Phase2Env, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nothing happened to, and how many calls it made."""
    path = tmp_path_factory.mktemp("crash") / "uncut"
    with watched(Disk()) as disk:
        run_on(path, env)
    return path, disk.calls


def acknowledged(path: Path) -> bytes:
    """What of the ledger was on the disk: whole lines."""
    ledger = path / "ledger.jsonl"
    content = ledger.read_bytes() if ledger.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def end_at(numbers: Sequence[int], env: Phase2Env, uncut: tuple[Path, int], base: Path) -> int:
    """End the process at calls, one in each trial, and go on."""
    for number in numbers:
        path = base / str(number)
        with watched(Disk(crash_at(number))), pytest.raises(Crash):
            run_on(path, env)
        before = acknowledged(path)
        run_on(path, env)
        same_run(path, uncut[0])
        assert acknowledged(path).startswith(before), number
        shutil.rmtree(path)
    return len(numbers)


def fill_at(numbers: Sequence[int], env: Phase2Env, uncut: tuple[Path, int], base: Path) -> int:
    """Let the disk be full from a call on, then free it, and go on."""
    refused = 0
    for number in numbers:
        path = base / str(number)
        with watched(Disk(full_from(number))):
            try:
                run_on(path, env)
            except K1Error as error:
                assert "No space left on device" in str(error), number
                refused += 1
        before = acknowledged(path)
        run_on(path, env)
        same_run(path, uncut[0])
        assert acknowledged(path).startswith(before), number
        shutil.rmtree(path)
    return refused


def spread(count: int, calls: int) -> list[int]:
    return sorted({1 + i * (calls - 1) // (count - 1) for i in range(count)})


def test_a_run_may_end_at_any_call(env: Phase2Env, uncut: tuple[Path, int], tmp_path: Path) -> None:
    assert uncut[1] > 100
    assert end_at(spread(10, uncut[1]), env, uncut, tmp_path) == 10


def test_a_full_disk_ends_a_run_with_a_word_and_loses_nothing(
    env: Phase2Env, uncut: tuple[Path, int], tmp_path: Path
) -> None:
    assert fill_at(spread(8, uncut[1]), env, uncut, tmp_path) >= 6


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("go", [end_at, fill_at])
def test_every_call_of_a_run(
    go: Callable[..., int], env: Phase2Env, uncut: tuple[Path, int], tmp_path: Path
) -> None:
    tried = go(range(1, uncut[1] + 1), env, uncut, tmp_path)
    print(go.__name__, uncut[1], "calls,", tried)
    assert tried > 100


# -- loss of power -------------------------------------------------------------------------------


def write_records(path: Path, acknowledge: Callable[[str, int], None]) -> None:
    """All that a run does to files, without the training."""
    folder = RunFolder.create(path, {"arguments": {}, "settings": {}}, ["test"])
    acknowledge("folder", 1)
    ledger = Ledger.create(folder.ledger_path)
    for step in (0, 1, 2, 2):  # a run saves its last state twice
        for kind in ("intent", "outcome") if step else ("start",):
            ledger.append(kind, step=step)
            acknowledge("entries", ledger.index)
        folder.append_metrics({"step": step})
        folder.sync_metrics()
        state = {"index": ledger.index, "head": ledger.head, "lines": folder.metrics_lines}
        tensors = {"weight": torch.full((64,), float(step))}
        place = folder.checkpoints_path / f"step-{step:08d}"
        save_checkpoint(place, tensors, {"step": step, **state}, kind="test")
        acknowledge("step", step)
        prune_checkpoints(folder.checkpoints_path, keep=2)
    folder.write_summary({"n": 1})
    acknowledge("summary", 1)


def check_disk(path: Path, sure: dict[str, int]) -> None:
    """See that what was acknowledged is there, and that a run can go on."""
    if "folder" not in sure:
        return
    folder = RunFolder.open(path)
    newest = newest_intact_checkpoint(folder.checkpoints_path)
    index, head, lines = 0, GENESIS, 0
    if "step" in sure:
        assert newest is not None
    if newest is not None:
        state = load_checkpoint(newest, kind="test")[1]
        assert value_of(newest) == state["step"] >= sure.get("step", 0)
        index, head, lines = state["index"], state["head"], state["lines"]
    if "entries" in sure or newest is not None:
        ledger = Ledger.resume(folder.ledger_path, index=index, head=head)
        assert ledger.index + ledger.pending >= sure.get("entries", 0)
    folder.truncate_metrics(lines)
    if "summary" in sure or folder.finished:
        assert folder.summary == {"n": 1}


def lose_power(base: Path) -> int:
    """Try every disk that a loss of power may leave; returns how many there are."""
    root = base / "disk"
    root.mkdir()
    disk = Disk()

    def acknowledge(what: str, count: int) -> None:
        disk.trace.append(("acknowledge", what, count))

    with watched(disk):
        write_records(root / "run", acknowledge)
    power, sure, states = PowerLoss(root), dict[str, int](), {}
    for operation in disk.trace:
        if operation[0] == "acknowledge":
            sure = sure | {operation[1]: operation[2]}
        else:
            power.apply(operation)
        for state in power.states():
            # The same disk has to do for the later acknowledgement.
            states[tuple(sorted(state.items()))] = sure
    chosen = list(states.items())
    for number, (files, promised) in enumerate(chosen):
        place = base / "lost" / str(number)
        place.mkdir(parents=True)
        for name, content in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                (place / name).mkdir(exist_ok=True)
            else:
                (place / name).write_bytes(content)
        check_disk(place / "run", promised)
        shutil.rmtree(place)
    return len(chosen)


def test_a_loss_of_power_takes_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    tried = lose_power(tmp_path)
    print("disks after a loss of power:", tried)
    assert tried > 200


def test_what_is_not_forced_to_the_disk_is_seen_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The enumeration finds a protocol without fsync, so it can fail."""
    monkeypatch.setattr("k1.checkpoint.fsync_file", lambda path: None)
    with pytest.raises((AssertionError, K1Error)):
        lose_power(tmp_path)


# -- damaged checkpoints, unfinished cheats ------------------------------------------------------


def test_recovery_takes_the_newest_whose_hashes_verify(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(3):
        save_step(tmp_path, step)
    assert newest_intact_checkpoint(tmp_path) == tmp_path / "step-00000002" and not caplog.text
    for step, file in ((2, "tensors.safetensors"), (1, "state.json")):
        path = tmp_path / f"step-{step:08d}" / file
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert newest_intact_checkpoint(tmp_path) == tmp_path / f"step-{step - 1:08d}"
        assert f"step-{step:08d}" in caplog.text
    (tmp_path / "step-00000000" / "tensors.safetensors").write_bytes(bytes(328))
    with pytest.raises(CheckpointError):
        newest_intact_checkpoint(tmp_path)
    assert newest_intact_checkpoint(tmp_path / "nowhere") is None


def test_a_run_goes_on_before_a_damaged_checkpoint(
    env: Phase2Env, uncut: tuple[Path, int], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut[0], path)
    (path / "summary.json").unlink()
    newest = path / "checkpoints" / f"step-{len(LABELS):08d}" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 128
    newest.write_bytes(content)
    run_on(path, env)
    same_run(path, uncut[0])


def test_a_cheat_that_a_crash_cut_short_has_the_same_end(
    env: Phase2Env, uncut: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again on the same seeds and counts once, so crashing is no second chance."""
    path, trial = tmp_path / "run", Gate.trial
    for after in (1, 2, 3):

        def cut_short(self: Gate, *arguments: Any, after: int = after, **more: Any) -> Any:
            task = trial(self, *arguments, **more)
            answer = None
            for _ in range(after):
                answer = yield task.send(answer)
            raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(Gate, "trial", cut_short)
            with pytest.raises(Crash):
                run_on(path, env)
        last = read_ledger(path / "ledger.jsonl")[-1]
        assert (last.kind, last.data["permitted"]) == ("intent", False)
        saved = newest_intact_checkpoint(path / "checkpoints")
        assert saved is not None
        state = load_checkpoint(saved, kind="phase2")[1]
        assert state["session"]["boundary"]["attempted"] == 0
    run_on(path, env)
    same_run(path, uncut[0])
    assert json.loads((path / "summary.json").read_text())["cheats_attempted"] == 1


# -- killed from outside -------------------------------------------------------------------------

SERVER = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.path.join(os.getcwd(), "scripts"))
import run_phase2
import k1env.runner, k1env.dashboard, k1env.plain_log, policies.learned, k1.trainer
for line in sys.stdin:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            code = run_phase2.main(run_phase2.Arguments(run_dir=Path(line.strip()), resume=True))
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            code = 70
        os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until it is waited for, its id is its own
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Starts `run_phase2.py --resume` again and again, without the seconds that imports take."""


def kill_often(kills: int, text: Path, base: Path) -> tuple[int, int]:
    """SIGKILL runs at random moments and go on with them; returns kills and runs."""
    fields: dict[str, Any] = {"phase1_steps": 20, "max_decisions": 6}
    whole = base / "whole"
    prepare_run(whole, text, **fields)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    rng, done, runs = random.Random(0), 0, 0

    def go_on(path: Path, delay: float | None) -> int:
        assert server.stdin is not None and server.stdout is not None
        print(path, file=server.stdin, flush=True)
        child = int(server.stdout.readline())
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        print("wait", file=server.stdin, flush=True)
        return int(server.stdout.readline())

    with server:
        began = time.monotonic()
        assert go_on(whole, None) == 0
        length = time.monotonic() - began
        while done < kills:
            path = base / str(runs)
            prepare_run(path, text, **fields)
            code, runs = -signal.SIGKILL, runs + 1
            while code == -signal.SIGKILL:
                code = go_on(path, rng.uniform(0.0, 0.6) * length if done < kills else None)
                before = acknowledged(path)
                done += code == -signal.SIGKILL
                assert (whole / "ledger.jsonl").read_bytes().startswith(before)
            assert code == 0
            length *= 0.9  # it came to its end: kill the next one sooner
            same_run(path, whole)
            shutil.rmtree(path)
        server.stdin.close()
    return done, runs


def test_runs_that_are_killed_at_random_go_on(text: Path, tmp_path: Path) -> None:
    assert kill_often(6, text, tmp_path)[0] == 6


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_a_hundred_kills(text: Path, tmp_path: Path) -> None:
    kills, runs = kill_often(120, text, tmp_path)
    print("kills", kills, "of", runs, "runs")
    assert kills == 120
