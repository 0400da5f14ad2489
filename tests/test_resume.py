"""A run that was killed goes on as if nothing had happened, and a ledger proves what it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k1.data import TextData, load_data
from k1.errors import LedgerError
from k1env import runner as runner_module
from k1env.env import Phase2Env
from k1env.ledger import Ledger, read_ledger
from k1env.replay import replay
from k1env.run_folder import RunFolder
from k1env.runner import Runner
from k1env.session import Session
from k1env.settings import Settings
from tests.phase2_helpers import (
    REPLAY,
    ROOT,
    RUN,
    call,
    command,
    environment,
    index_of,
    metrics_of,
    prepare_run,
    quick,
    summary_of,
    write_text,
)

SETTINGS: dict[str, Any] = {"phase1_steps": 40, "max_decisions": 5}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("resume") / "text")


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line that nothing interrupted."""
    path = tmp_path_factory.mktemp("resume") / "whole"
    prepare_run(path, text, **SETTINGS)
    done = call(RUN, "--run-dir", path, "--resume")
    assert done.returncode == 0, done.stderr
    return path


def same_run(one: Path, other: Path) -> None:
    assert (one / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()
    assert metrics_of(one) == metrics_of(other)
    left, right = ({k: v for k, v in summary_of(p).items() if k != "seconds"} for p in (one, other))
    assert left == right


# -- killed from outside ------------------------------------------------------------------------


def kill_when(path: Path, due: Callable[[], bool], seconds: float = 60) -> bool:
    """Go on with a run and SIGKILL it when something is so; returns whether it came to that."""
    process = subprocess.Popen(
        command(RUN, "--run-dir", path, "--resume"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment(),
    )  # fmt: skip
    with process:
        deadline = time.monotonic() + seconds
        while process.poll() is None and not due() and time.monotonic() < deadline:
            time.sleep(0.005)
        killed = process.poll() is None
        process.kill()
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert killed or process.returncode == 0, errors
    return killed


def last_line(path: Path) -> str:
    ledger = path / "ledger.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return lines[-1] if lines else ""


def test_a_run_survives_being_killed_again_and_again(
    text: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    prepare_run(path, text, **SETTINGS)

    def in_phase_1() -> bool:
        return (path / "ledger.jsonl").exists()

    def in_decision_2() -> bool:
        return '"kind":"intent"' in last_line(path) and '"decision":2' in last_line(path)

    def after_decision_3() -> bool:
        return '"kind":"outcome"' in last_line(path) and '"decision":3' in last_line(path)

    assert kill_when(path, in_phase_1)
    assert last_line(path) == "", "it was killed before Phase 2 began"
    assert kill_when(path, in_decision_2)
    assert kill_when(path, after_decision_3)
    assert not (path / "summary.json").exists()
    done = call(RUN, "--run-dir", path, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    same_run(path, whole)
    assert json.loads(done.stdout)["decisions"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "seed"), [("heuristic", 1), ("random", 2), ("random", 3)])
def test_any_moment_will_do(text: Path, tmp_path: Path, policy: str, seed: int) -> None:
    fields = {**SETTINGS, "policy": policy, "seed": seed, "max_decisions": 16}
    whole, path = tmp_path / "whole", tmp_path / "run"
    prepare_run(whole, text, **fields)
    began = time.monotonic()
    assert call(RUN, "--run-dir", whole, "--resume").returncode == 0
    length = time.monotonic() - began
    prepare_run(path, text, **fields)
    rng, kills = np.random.default_rng(seed), 0
    for _ in range(12):
        end = time.monotonic() + float(rng.uniform(0.2, 1.0)) * max(6.0, length / 3)
        if not kill_when(path, lambda end=end: time.monotonic() > end):
            break
        kills += 1
    assert kills >= 2
    assert call(RUN, "--run-dir", path, "--resume").returncode == 0
    same_run(path, whole)
    assert call(REPLAY, path).returncode == 0


@pytest.mark.slow
def test_the_tiny_preset_survives_too(tmp_path: Path) -> None:
    """The real settings and the built-in text, through the options a user has."""
    options = ("--preset", "tiny", "--seed", 7, "--policy", "heuristic", "--device", "cpu")
    assert call(RUN, *options, "--run-dir", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(
        command(RUN, *options, "--run-dir", tmp_path / "run"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment(),
    )  # fmt: skip
    with process:
        time.sleep(15)
        process.kill()
    assert kill_when(tmp_path / "run", lambda: '"decision":20' in last_line(tmp_path / "run"))
    assert call(RUN, "--run-dir", tmp_path / "run", "--resume").returncode == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert call(REPLAY, tmp_path / "run").returncode == 0


# -- crashes at every point, in this process ----------------------------------------------------


class Crash(BaseException):
    """Stands for the end of the process."""


class Script:
    """A controller with a list of actions, and a memory that a resumed run has to get back."""

    reason = "it is written"

    def __init__(self, labels: tuple[str, ...], where: Phase2Env) -> None:
        self.actions, self.done = [index_of(where, label) for label in labels], 0

    def act(self, observation: Any, info: Any) -> int:
        self.done += 1
        return self.actions[self.done - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


LABELS = ("tune lr x0.1", "add under slot 0", "no-op")


def run_once(path: Path, data: TextData, **limits: float) -> None:
    """Run or go on with a run, in this process."""
    if path.exists():
        folder = RunFolder.open(path)
    else:
        folder = RunFolder.create(path, {"arguments": {}, "settings": {}}, ["test"])
    settings = quick(max_decisions=3, phase_decisions=1)
    env = Phase2Env(config=settings, data=data)
    Runner(env, Script(LABELS, env), folder, Silent(), seed=1, **limits).run(resume=True)


@pytest.fixture(scope="module")
def data(text: Path) -> TextData:
    return load_data(text)


@pytest.fixture(scope="module")
def uncut(data: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "uncut"
    run_once(path, data)
    assert [entry.kind for entry in read_ledger(path / "ledger.jsonl")] == [
        "start", *["intent", "outcome"] * 3, "end",
    ]  # fmt: skip
    return path


# Each crash is (what is called, how many calls go well, whether the fatal one still has its effect)
CRASHES = [
    ("append", 0, False),
    ("append", 1, True),
    ("append", 2, True),
    ("append", 4, False),
    ("append", 7, True),
    ("save", 0, False),
    ("save", 1, False),
    ("save", 2, True),
    ("save", 3, False),
    ("summary", 0, False),
]


@pytest.mark.parametrize(("what", "after", "takes_effect"), CRASHES)
def test_a_crash_at_any_point_costs_one_decision_at_most(
    data: TextData, uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, after: int, takes_effect: bool,
) -> None:  # fmt: skip
    owner, name = {
        "append": (Ledger, "append"),
        "save": (runner_module, "save_checkpoint"),
        "summary": (RunFolder, "write_summary"),
    }[what]
    original, calls = getattr(owner, name), 0

    def dying(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            if takes_effect:
                original(*arguments, **more)
            raise Crash
        return original(*arguments, **more)

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Crash):
            run_once(path, data)
    run_once(path, data)
    same_run(path, uncut)


def test_a_run_that_time_paused_goes_on(data: TextData, uncut: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_once(path, data, max_minutes=0.0)
    assert summary_of(path)["stop_reason"] == "time budget spent"
    assert summary_of(path)["decisions"] == 0
    run_once(path, data)
    same_run(path, uncut)


def test_a_torn_ledger_and_torn_metrics_are_mended(
    data: TextData, uncut: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut, path)
    (path / "summary.json").unlink()
    newest = sorted((path / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        blob = (path / name).read_bytes()
        (path / name).write_bytes(blob[:-20])
    run_once(path, data)
    same_run(path, uncut)


def test_a_run_is_held_to_what_it_wrote(
    data: TextData, uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut, path)
    (path / "summary.json").unlink()
    shutil.rmtree(sorted((path / "checkpoints").iterdir())[-1])
    before = (path / "ledger.jsonl").read_bytes()
    monkeypatch.setattr("tests.test_resume.LABELS", ("tune lr x0.1", "add under slot 0", "stop"))
    with pytest.raises(LedgerError, match="does not reproduce entry 5"):
        run_once(path, data)
    assert (path / "ledger.jsonl").read_bytes() == before


# -- replays ------------------------------------------------------------------------------------


def test_a_replay_gives_the_state_hash_again(whole: Path) -> None:
    before = (whole / "ledger.jsonl").read_bytes()
    done = call(REPLAY, whole)
    assert done.returncode == 0, done.stderr
    wanted = summary_of(whole)["state_hash"]
    assert f"5 decisions give the same state hash {wanted[:16]}" in done.stdout
    assert "every hash fits" in done.stdout
    assert (whole / "ledger.jsonl").read_bytes() == before


def forge(whole: Path, path: Path, change: Callable[[str, dict[str, Any]], None]) -> Path:
    """Copy a run, change its entries, and chain them anew, so that every hash fits."""
    shutil.copytree(whole, path)
    entries = read_ledger(path / "ledger.jsonl")
    (path / "ledger.jsonl").unlink()
    ledger = Ledger.create(path / "ledger.jsonl")
    for entry in entries:
        change(entry.kind, entry.data)
        ledger.append(entry.kind, **entry.data)
    folder = RunFolder.open(path)
    folder.write_summary(folder.summary | {"ledger_head": ledger.head})
    return path


def other_action(kind: str, data: dict[str, Any]) -> None:
    if kind == "intent" and data["decision"] == 1:
        data.update(action=0, name="no-op", permitted=True)


def better_verdict(kind: str, data: dict[str, Any]) -> None:
    if kind == "outcome" and data["decision"] == 2:
        data.update(evidence=data["evidence"] * 10)


def other_end(kind: str, data: dict[str, Any]) -> None:
    if kind == "end":
        data.update(state_hash="0" * 64)


def other_start(kind: str, data: dict[str, Any]) -> None:
    if kind == "start":
        data["bits_per_byte"]["alpha"] += 0.1


@pytest.mark.parametrize("change", [other_action, better_verdict, other_end, other_start])
def test_a_forged_ledger_is_found_out(
    whole: Path, data: TextData, tmp_path: Path, change: Callable[..., None]
) -> None:
    forged = forge(whole, tmp_path / "forged", change)
    read_ledger(forged / "ledger.jsonl")
    config = RunFolder.open(forged).config
    settings = Settings.from_dict(config["settings"])
    session = Session(settings, data, seed=config["arguments"]["seed"])
    with pytest.raises(LedgerError, match="does not reproduce entry"):
        replay(session, forged / "ledger.jsonl")


def test_an_end_that_the_run_did_not_come_to_is_found_out(
    whole: Path, data: TextData, tmp_path: Path
) -> None:
    first = read_ledger(whole / "ledger.jsonl")[:3]
    ledger, state = Ledger.create(tmp_path / "ledger.jsonl"), first[2].data["state_hash"]
    for entry in first:
        ledger.append(entry.kind, **entry.data)
    ledger.append("end", reason="stopped", criteria=[], decision=1, state_hash=state)
    session = Session(quick(phase_decisions=3, **SETTINGS), data, seed=0)
    with pytest.raises(LedgerError, match="entry 3"):
        replay(session, tmp_path / "ledger.jsonl")


def test_a_forged_ledger_ends_the_replay_with_status_2(whole: Path, tmp_path: Path) -> None:
    forged = forge(whole, tmp_path / "forged", other_action)
    done = call(REPLAY, forged)
    assert done.returncode == 2 and "chain: " in done.stdout and "not reproduce" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("cut", ["a line", "a letter", "the order", "the end"])
def test_verify_only_finds_a_broken_chain(whole: Path, tmp_path: Path, cut: str) -> None:
    path = tmp_path / "broken"
    shutil.copytree(whole, path)
    lines = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
    if cut == "a line":
        del lines[3]
    elif cut == "a letter":
        lines[3] = lines[3].replace("no", "on", 1)
    elif cut == "the order":
        lines[3], lines[4] = lines[4], lines[3]
    else:
        del lines[-2:]
    (path / "ledger.jsonl").write_text("".join(lines))
    done = call(REPLAY, path, "--verify-only")
    assert done.returncode == 2
    wanted = "does not end as summary.json says" if cut == "the end" else "ledger.jsonl is bad"
    assert wanted in done.stderr and ("line 4 of" in done.stderr) == (cut != "the end")
