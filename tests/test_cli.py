"""The command lines, through their real entry points: help, mistakes, results, interruption."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from k1.checkpoint import load_checkpoint
from k1.data import load_data
from k1.trainer import Trainer
from k1env.run_folder import RunFolder
from policies.training import TrainingFolder
from tests.phase2_helpers import (
    EVALUATE,
    EXPLAIN,
    GRID,
    MEASURE,
    PHASE_1,
    PPO,
    REPLAY,
    ROOT,
    RUN,
    SPECIALISTS,
    call,
    command,
    environment,
    prepare_run,
    quick,
    summary_of,
    write_text,
)

SUMMARY_KEYS = {
    "final_stage", "stage_history", "cheats_attempted", "cheats_accepted", "evidence",
    "agents_start", "agents_end", "bits_per_byte_start", "bits_per_byte_end", "stop_reason",
    "stop_criteria", "train_steps", "seconds", "state_hash",
}  # fmt: skip
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

HELP = """
import resource, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = sorted({"torch", "gymnasium", "scipy", "datasets"} & set(sys.modules))
    print("", end.code, used.ru_utime + used.ru_stime, heavy, sep="|")
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_comes_at_once(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, script],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    text, code, seconds, heavy = done.stdout.rsplit("|", 3)
    assert code == "0" and heavy.strip() == "[]", done.stderr
    assert float(seconds) < 1.0
    assert "usage:" in text and done.stderr == ""


def test_the_help_names_the_designs_options() -> None:
    text = call(RUN, "--help").stdout
    for option in ("policy", "data", "preset", "seed", "device", "run-dir", "resume", "max-minutes",
                   "json", "start"):  # fmt: skip
        assert f"--{option}" in text, option


# -- mistakes -----------------------------------------------------------------------------------

# Loads what is heavy once, then forks for each command line and runs the script's own main there.
SERVER = """
import json, os, runpy, sys, traceback
import torch, k1.data, k1env.dashboard, k1env.replay, k1env.runner, policies.training, tyro
torch.set_num_threads(1)
results = {}
for name, words in json.load(sys.stdin).items():
    pid = os.fork()
    if not pid:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{kind}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = words
        code = 1
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    results[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(results))
"""


def flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(bytes(blob))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a finished run, an unfinished one, damaged ones, and a checkpoint."""
    here = tmp_path_factory.mktemp("cli")
    text = write_text(here / "text")
    for domain in ("one", "two"):
        (here / "small" / domain).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (here / "small" / domain / f"{split}.txt").write_text(f"{domain} {split} a\n\nb c d\n")
    (here / "empty").mkdir()
    prepare_run(here / "done", text, max_decisions=3)
    done = call(RUN, "--run-dir", here / "done", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    (here / "json").write_text(done.stdout)
    shutil.copytree(here / "done", here / "open")
    (here / "open" / "summary.json").unlink()
    for name in ("bad checkpoint", "bad ledger"):
        shutil.copytree(here / "open", here / name)
    for damaged in (here / "bad checkpoint" / "checkpoints").iterdir():
        flip(damaged / "tensors.safetensors")
    flip(here / "bad ledger" / "ledger.jsonl")
    torch.set_num_threads(1)
    Trainer(quick().system, load_data(text), seed=0).save(here / "start")
    one = call(PHASE_1, "--preset", "tiny", "--data", text, "--steps", 4, "--every", 2,
               "--run-dir", here / "one")  # fmt: skip
    assert one.returncode == 0, one.stderr
    shutil.copytree(here / "start", here / "bad start")
    flip(here / "bad start" / "tensors.safetensors")
    TrainingFolder.create(here / "ppo", {"plan": {}, "tensorboard": False}, command(PPO))
    (here / "bytes").write_bytes(b"\xff\xfe")
    (here / "blank").write_text("\n")
    (here / "used").mkdir()
    (here / "used" / "thesis.txt").write_text("years of work")
    return here


def fresh(place: str = "text", **options: str) -> list[str]:
    """A new run with `tiny` on a folder; `options` replace or add."""
    words = {"preset": "tiny", "data": f"{{}}/{place}", "run-dir": "{}/new", **options}
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def compared(**options: str) -> list[str]:
    """A comparison with `tiny` on a folder, in one world."""
    words = {"preset": "tiny", "data": "{}/text", "worlds": "test/0", "device": "cpu", **options}
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def again(run: str, *more: str) -> list[str]:
    return ["--run-dir", f"{{}}/{run}", "--resume", *more]


MISTAKES: dict[str, tuple[Path, list[str], str]] = {
    "policy": (RUN, fresh(policy="magic"), "choose one of heuristic, random, random-legal"),
    "preset": (RUN, fresh(preset="huge"), "choose one of tiny, cpu, small, gpu, paper"),
    "seed": (RUN, fresh(seed="-1"), "0 or more"),
    "no time": (RUN, fresh(**{"max-minutes": "0"}), "give a number above 0"),
    "nan time": (RUN, fresh(**{"max-minutes": "nan"}), "give a number above 0"),
    "device": (RUN, fresh(device="abacus"), "use auto, cpu or cuda"),
    "cuda": (RUN, fresh(device="cuda"), "use --device cpu or auto"),
    "no data": (RUN, fresh("nowhere"), "check its spelling"),
    "empty data": (RUN, fresh("empty"), "has no domain folders"),
    "small data": (RUN, fresh("small"), "one"),
    "no start": (RUN, fresh(start="{}/nowhere"), "there is no checkpoint"),
    "bad start": (RUN, fresh(start="{}/bad start"), "tensors.safetensors"),
    "other start": (RUN, fresh(start="{}/start", preset="cpu"), "does not fit"),
    "used folder": (RUN, fresh(**{"run-dir": "{}/used"}), "--run-dir"),
    "used run": (RUN, fresh(**{"run-dir": "{}/open"}), "--resume"),
    "no run": (RUN, again("nowhere"), "check the path"),
    "bad checkpoint": (RUN, again("bad checkpoint"), "tensors.safetensors"),
    "bad ledger": (RUN, again("bad ledger"), "ledger.jsonl is bad"),
    "other seed": (RUN, again("open", "--seed", "5"), "was made with --seed 0, not 5"),
    "other preset": (RUN, again("open", "--preset", "cpu"), "was made with --preset tiny"),
    "other policy": (RUN, again("open", "--policy", "noop"), "was made with --policy heuristic"),
    "no replay": (REPLAY, ["{}/nowhere"], "there is no run folder"),
    "replay of text": (REPLAY, ["{}/text"], "config.json"),
    "replay bad ledger": (REPLAY, ["{}/bad ledger"], "ledger.jsonl is bad"),
    "verify bad ledger": (REPLAY, ["{}/bad ledger", "--verify-only"], "ledger.jsonl is bad"),
    "phase 1 steps": (PHASE_1, fresh(steps="0"), "1 or more"),
    "phase 1 preset": (PHASE_1, fresh(preset="huge"), "choose one of tiny"),
    "phase 1 mode": (PHASE_1, fresh(mode="lazy"), "update.mode"),
    "phase 1 domain": (PHASE_1, fresh(domains="nope"), "impossible mix"),
    "phase 1 resume": (PHASE_1, [*fresh(), "--resume"], "leave --resume out to start"),
    "phase 1 no run": (PHASE_1, ["--resume"], "name it by --run-dir"),
    "phase 1 other lr": (
        PHASE_1,
        again("one", "--preset", "tiny", "--data", "{}/text", "--lr", "0.5"),
        "was made with train.lr 0.001, not 0.5",
    ),
    "phase 1 other domains": (
        PHASE_1,
        again("one", "--preset", "tiny", "--data", "{}/text", "--domains", "beta"),
        "was made with --domains alpha,beta,gamma, not beta: give the same options again",
    ),
    "evaluate policy": (EVALUATE, compared(policies="noop,nope"), "unknown policy 'nope'"),
    "evaluate world": (EVALUATE, compared(worlds="test/99"), "no instance 'test/99'"),
    "evaluate minutes": (EVALUATE, compared(**{"max-minutes": "-1"}), "is not possible"),
    "evaluate folder": (EVALUATE, compared(json="{}/nowhere/out.json"), "does not exist"),
    "grid search numbers": (GRID, ["--preset", "tiny", "--lr", "1,x"], "give numbers"),
    "grid search worlds": (GRID, ["--worlds", "test/0"], "on train worlds only"),
    "ppo gamma": (PPO, ["--gamma", "1.5"], "gamma = 1.5 is not possible: above 0 and at most 1"),
    "ppo clip": (PPO, ["--clip", "2"], "clip = 2.0 is not possible: above 0 and below 1"),
    "ppo n-steps": (PPO, ["--n-steps", "0"], "n_steps = 0 is not possible: 1 or more"),
    "ppo rate": (PPO, ["--learning-rate", "nan"], "learning_rate = nan is not possible: a finite"),
    "ppo seed": (PPO, ["--seed", "4294967296"], "is not possible: 0 to 4294967295"),
    "ppo of a run": (PPO, again("done"), "is no folder of train_ppo.py: it was made by run_phase2"),
    "run of ppo": (RUN, again("ppo"), "is no folder of run_phase2.py: it was made by train_ppo.py"),
    "replay of ppo": (REPLAY, ["{}/ppo"], "is no folder of run_phase2.py"),
    "measure of ppo": (MEASURE, ["{}/ppo"], "is no folder of run_phase2.py: it was made by train"),
    "measure other data": (MEASURE, ["{}/done", "--data", "{}/small"], "one"),
    "explain no run": (EXPLAIN, ["{}/nowhere"], "there is no checkpoint"),
    "explain no text": (EXPLAIN, ["{}/one", "--text", "{}/nowhere"], "name a text file"),
    "explain a folder": (EXPLAIN, ["{}/one", "--text", "{}/text"], "name a text file"),
    "explain bytes": (EXPLAIN, ["{}/one", "--text", "{}/bytes"], "is not UTF-8"),
    "explain nothing": (EXPLAIN, ["{}/one", "--text", "{}/blank"], "give a file with something"),
    "specialists experiment": (SPECIALISTS, ["--experiment", "nothing"], "no experiment 'nothing'"),
    "specialists data": (SPECIALISTS, ["--data", "{}/nowhere"], "check its spelling"),
    "specialists method": (SPECIALISTS, ["--methods", "mixture"], "mixture has no single tree to"),
    "specialists situation": (SPECIALISTS, ["--situations", "four"], "no situation 'four'"),
    "specialists domain": (SPECIALISTS, ["--same", "delta"], "no domain 'delta': choose from"),
    "specialists seeds": (SPECIALISTS, ["--seeds", "0"], "a step and a seed at least"),
    "specialists minutes": (SPECIALISTS, ["--max-minutes", "0"], "--max-minutes is more than 0"),
    "specialists results": (SPECIALISTS, ["--results", "{}/nowhere/rows"], "does not exist"),
    "phase 1 used": (PHASE_1, fresh(**{"run-dir": "{}/used"}), "not empty"),
}


def contents(place: Path) -> dict[str, bytes]:
    files = (path for path in place.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def answers(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exit status, standard output and standard error of every mistake, and what was changed."""
    out = tmp_path_factory.mktemp("answers")
    before = contents(place)
    asked = {
        name: [str(script), *(word.replace("{}", str(place)) for word in words)]
        for name, (script, words, _) in MISTAKES.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(out)],
        input=json.dumps(asked), capture_output=True, text=True, timeout=240,
        env=environment(CUDA_VISIBLE_DEVICES=""), cwd=ROOT,
    )  # fmt: skip
    codes = json.loads(done.stdout)
    return {
        "changed": {name for name in before if contents(place).get(name) != before[name]},
        **{
            name: (code, (out / f"{name}.out").read_text(), (out / f"{name}.err").read_text())
            for name, code in codes.items()
        },
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(answers: dict[str, Any], name: str) -> None:
    code, _, stderr = answers[name]
    assert code == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert MISTAKES[name][2] in stderr and "Traceback" not in stderr


def test_mistakes_overwrite_nothing(answers: dict[str, Any], place: Path) -> None:
    assert answers["changed"] == set()
    assert not (place / "new" / "ledger.jsonl").exists()


def test_a_mistake_through_the_shell(place: Path) -> None:
    done = call(RUN, "--policy", "magic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown policy 'magic': choose one of heuristic, ran")
    done = call(RUN, "--nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_the_hub_without_a_network_is_a_mistake_too(tmp_path: Path) -> None:
    began = time.monotonic()
    try:
        done = subprocess.run(
            command(RUN, "--preset", "tiny", "--data", "hub", "--run-dir", tmp_path / "run"),
            capture_output=True, text=True, cwd=ROOT, timeout=20,
            env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip("it takes long here to find that there is no network")
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr and "Traceback" not in done.stderr
    assert "--data builtin" in done.stderr or "pip install" in done.stderr
    assert not (tmp_path / "run").exists() and time.monotonic() - began < 20


# -- what runs --------------------------------------------------------------------------------


def test_json_is_all_that_is_on_standard_output(place: Path) -> None:
    summary = json.loads((place / "json").read_text())
    assert summary == summary_of(place / "done")
    assert summary.keys() >= SUMMARY_KEYS
    assert set(summary["bits_per_byte_end"]) == {"alpha", "beta", "gamma"}
    assert summary["decisions"] == 3 and summary["stop_reason"] == "all decisions made"
    last = json.loads((place / "done" / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "end" and last["data"]["state_hash"] == summary["state_hash"]


def test_a_finished_run_says_so(place: Path) -> None:
    before = contents(place / "done")
    done = call(RUN, "--run-dir", place / "done", "--resume", "--json")
    assert done.returncode == 0 and "is finished already" in done.stderr
    assert json.loads(done.stdout) == summary_of(place / "done")
    assert contents(place / "done") == before


def test_a_time_limit_ends_a_run(place: Path, tmp_path: Path) -> None:
    # Seconds enough for a decision on a busy machine, and far too few for all of them anywhere.
    prepare_run(tmp_path / "run", place / "text", policy="noop", max_decisions=40_000, budget=10**6)
    done = call(RUN, "--run-dir", tmp_path / "run", "--resume", "--max-minutes", "0.05", "--json")
    summary = json.loads(done.stdout)
    assert summary["stop_reason"] == "time budget spent" and 1 <= summary["decisions"] < 40_000
    assert call(REPLAY, tmp_path / "run").returncode == 0


def test_ctrl_c_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare_run(run, place / "text", policy="noop", max_decisions=4_000, budget=10**6)
    process = subprocess.Popen(
        command(RUN, "--run-dir", run, "--resume", "--json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
        # A shell that starts the tests in the background makes all below it ignore Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == "", "with --json, standard output is for JSON"
    assert "Interrupted" in err and f"--run-dir {run} --resume" in err
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("router", ["learned", "evidence"])
def test_phase_1_prints_the_command_that_starts_phase_2(
    place: Path, tmp_path: Path, router: str
) -> None:
    text = tmp_path / "some text"
    text.symlink_to(place / "text")
    done = call(PHASE_1, "--steps", 4, "--every", 2, "--preset", "tiny", "--data", "some text",
                "--router", router, "--run-dir", "phase one", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1].partition("python scripts/")[2])
    assert words[0] == RUN.name and words[words.index("--data") + 1] == str(text)
    more = ("--policy", "noop", "--json", "--max-minutes", 1e-5, "--run-dir", "two")
    done = call(RUN, *words[1:], *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train_steps"] >= 4
    settings = RunFolder.open(tmp_path / "two").config["settings"]
    assert settings["system"]["model"]["router"] == router


def test_a_run_that_was_given_relative_paths_works_from_anywhere(
    place: Path, tmp_path: Path
) -> None:
    options = ("--preset", "tiny", "--policy", "noop", "--max-minutes", 1e-5)
    done = call(RUN, *options, "--data", "text", "--start", "one/checkpoints/step-00000004",
                "--run-dir", tmp_path / "run", cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = RunFolder.open(tmp_path / "run").config["arguments"]
    assert stored["data"] == str(place / "text")
    assert stored["start"] == str(place / "one" / "checkpoints" / "step-00000004")
    assert call(REPLAY, tmp_path / "run", cwd=tmp_path).returncode == 0
    more = ("--run-dir", tmp_path / "run", "--resume", "--max-minutes", 1e-5)
    assert call(RUN, *more, "--data", "../text", cwd=place / "one").returncode == 0
    done = call(MEASURE, tmp_path / "run", "--json", cwd=tmp_path)
    assert set(json.loads(done.stdout)["bits_per_byte"]) == {"alpha", "beta", "gamma"}
    (tmp_path / "some.txt").write_text("abc\n")
    done = call(EXPLAIN, tmp_path / "run", "--text", "some.txt", "--json", cwd=tmp_path)
    assert [part["text"] for part in json.loads(done.stdout)["parts"]] == ["abc"]


# -- phase 1 ------------------------------------------------------------------------------------


def phase_1(place: Path, run: Path, steps: int, *more: object) -> Any:
    return call(PHASE_1, "--steps", steps, "--every", 2, "--preset", "tiny", "--data",
                place / "text", "--run-dir", run, *more)  # fmt: skip


def phase_1_metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "milliseconds"} for row in rows]


def test_a_killed_phase_1_goes_on_as_if_nothing_had_happened(place: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--domains", "alpha,gamma")
    assert phase_1(place, whole, 8, *options).returncode == 0
    assert phase_1(place, parts, 6, *options).returncode == 0
    # As a kill leaves it: metrics beyond the newest checkpoint, the last line torn.
    shutil.rmtree(parts / "checkpoints" / "step-00000006")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    done = phase_1(place, parts, 8, *options, "--resume")
    assert done.returncode == 0 and "goes on from step 4" in done.stdout, done.stderr
    assert phase_1_metrics(parts) == phase_1_metrics(whole)
    assert [row["step"] for row in phase_1_metrics(parts)] == [2, 4, 6, 8]
    ends = [load_checkpoint(run / "checkpoints" / "step-00000008", kind="trainer")[0]
            for run in (whole, parts)]  # fmt: skip
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_phase_1_killed_before_its_first_checkpoint_starts_over(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.lock").write_text("1\n")
    assert "continue its run with --resume" in phase_1(place, tmp_path, 2).stderr
    done = phase_1(place, tmp_path, 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in phase_1_metrics(tmp_path)] == [2]


def test_two_cannot_write_one_phase_1(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "one")
    with RunFolder(tmp_path / "one", {}).lock():
        done = phase_1(place, tmp_path / "one", 6, "--resume")
    assert done.returncode == 2
    assert f"is being written by process {os.getpid()}" in done.stderr
