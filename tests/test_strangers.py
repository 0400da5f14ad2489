"""Files from strangers: whatever was done to them, they are refused or taken at their word.

Damage is done to files as they lie; forgeries are given the hashes that fit them. Every trial has
to end in a `K1Error`, or in exactly what the file says.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k1 import checkpoint
from k1.checkpoint import load_checkpoint, save_checkpoint
from k1.data import TextData
from k1.durable import digest_of
from k1.errors import K1Error
from k1.trainer import Trainer
from k1env.ledger import Ledger, read_ledger
from k1env.run_folder import RunFolder
from k1env.runner import RunArguments, Runner
from k1env.settings import Settings
from policies import make_policy
from policies.learned import load_controller, save_controller
from policies.network import Layout
from tests.mutations import (
    Harm,
    files_of,
    harm_bytes,
    harm_json,
    harm_tensors,
    harm_value,
    hostile_files,
    replace_file,
    replace_folder,
    swap_files,
)
from tests.phase2_helpers import prepare_run, write_text
from tests.test_learned import LABELS, Silent, controller

SLOWEST = 20.0
"""Seconds that no refusal may take; a hang would take for ever."""
Read = Callable[[Path], Any]


def fingerprint(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as something that `==` compares bit by bit."""
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).tolist())
        if t.numel()
        else (str(t.dtype), tuple(t.shape))
        for name, t in tensors.items()
    }


def of_checkpoint(folder: Path, kind: str) -> Any:
    tensors, state = load_checkpoint(folder, kind=kind)
    return fingerprint(tensors), state


def of_controller(folder: Path) -> Any:
    found = load_controller(folder)
    weights = found.network(Layout.of(LABELS)).state_dict()
    return found.sizes, found.about, fingerprint(dict(weights))


def of_ledger(folder: Path) -> Any:
    return read_ledger(folder / "ledger.jsonl")


def of_run(folder: Path) -> Any:
    """All that a run folder says; every checkpoint that it had must still be there."""
    run = RunFolder.open(folder)
    steps = [folder / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]
    summary = {name: value for name, value in run.summary.items() if name != "seconds"}
    return (
        (RunArguments.of(run), Settings.from_dict(run.config["settings"]), run.command),
        (run.versions, summary, read_ledger(run.ledger_path)),
        [of_checkpoint(step, "phase2") for step in steps],
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("strangers") / "text")


@pytest.fixture(scope="module")
def runner(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A small run, carried out."""
    from k1env.runner import open_env

    folder = prepare_run(tmp_path_factory.mktemp("strangers") / "run", text, max_decisions=2)
    env = open_env(folder, "cpu")
    made = Runner(env, make_policy("heuristic", env.actions), folder, Silent(), seed=0)
    made.run(resume=True)
    return made


@pytest.fixture(scope="module")
def pristine(
    runner: Runner, data: TextData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Read]]:
    """Folders that are as they were written, and what reads each."""
    base = tmp_path_factory.mktemp("strangers")
    settings = Settings.from_dict(runner.folder.config["settings"])
    trainer = Trainer(settings.system, data, seed=3)
    trainer.train(2)
    trainer.save(base / "system")
    save_controller(base / "controller", controller())
    (base / "ledger").mkdir()
    shutil.copyfile(runner.folder.ledger_path, base / "ledger" / "ledger.jsonl")
    shutil.copytree(runner.folder.path, base / "run")
    return {
        "system": (base / "system", lambda folder: of_checkpoint(folder, "trainer")),
        "controller": (base / "controller", of_controller),
        "ledger": (base / "ledger", of_ledger),
        "run": (base / "run", of_run),
    }


DAMAGE: tuple[Harm, ...] = (
    *(harm_bytes, harm_bytes, harm_bytes, harm_json, harm_json),
    *(replace_file, swap_files, replace_folder),
)  # fmt: skip


def outcome_of(call: Callable[[], Any]) -> tuple[str, Any]:
    """How reading ends: refused, or read."""
    began = time.monotonic()
    try:
        found = call()
    except K1Error as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        return "refused", None
    finally:
        assert time.monotonic() - began < SLOWEST
    return "read", found


def damage(
    name: str, pristine: dict[str, tuple[Path, Read]], tmp_path: Path, seeds: range
) -> Counter[str]:
    """Harm a folder in many ways, one at a time, and read it after each."""
    source, read = pristine[name]
    whole, counts = read(source), Counter[str]()
    outside = tmp_path / "outside"
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        folder = tmp_path / "harmed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        shutil.copytree(source, folder)
        harm = rng.choice(DAMAGE if len(files_of(folder)) > 1 else DAMAGE[:6])
        harm(folder, rng)
        ended, found = outcome_of(lambda folder=folder: read(folder))
        assert ended == "refused" or found == whole, f"{name} {seed} {harm.__name__}"
        counts[ended] += 1
        assert not outside.exists() or outside.read_bytes() == b"a stranger's hands off\n"
    return counts


NAMES = ("system", "controller", "ledger", "run")


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_or_harmless(
    name: str, pristine: dict[str, tuple[Path, Read]], tmp_path: Path
) -> None:
    counts = damage(name, pristine, tmp_path, range(150))
    assert counts["refused"] > 80


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_much_damage_is_refused_or_harmless(
    name: str, pristine: dict[str, tuple[Path, Read]], tmp_path: Path
) -> None:
    counts = damage(name, pristine, tmp_path, range(1000, 4000))
    print(name, dict(counts))
    assert counts["refused"] > 1500


# -- forgeries -----------------------------------------------------------------------------------


def forged(
    source: Path, target: Path, kind: str, rng: random.Random
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Write a checkpoint with one change and hashes that fit; None if it cannot be written."""
    tensors, state = load_checkpoint(source, kind=kind)
    if rng.random() < 0.35:
        tensors = harm_tensors(tensors, rng)
    else:
        state = harm_value(state, rng)
    shutil.rmtree(target, ignore_errors=True)
    try:
        save_checkpoint(target, tensors, state, kind=kind)
    except (K1Error, TypeError, ValueError):
        return None
    return tensors, state


def forge_system(pristine: Any, data: TextData, tmp_path: Path, seed: int) -> str:
    rng = random.Random(f"system {seed}")
    made = forged(pristine["system"][0], tmp_path / "forged", "trainer", rng)
    if made is None:
        return "unwritable"
    ended, found = outcome_of(lambda: Trainer.load(tmp_path / "forged", data))
    if ended == "read":
        described = json.loads(json.dumps(found.describe()))
        assert holds(described, made[1]), seed
        lane = fingerprint(found.arena.read_lane(0).tensors)
        assert lane.items() <= fingerprint(made[0]).items(), seed
        if seed % 4 == 0:
            outcome_of(found.step)
    return ended


def forge_controller(pristine: Any, data: TextData, tmp_path: Path, seed: int) -> str:
    rng = random.Random(f"controller {seed}")
    made = forged(pristine["controller"][0], tmp_path / "forged", "controller", rng)
    if made is None:
        return "unwritable"
    ended, found = outcome_of(lambda: of_controller(tmp_path / "forged"))
    if ended == "read":
        assert dataclasses.asdict(found[0]) == made[1]["sizes"] and found[1] == made[1]["about"]
        assert found[2] == fingerprint(made[0])
    return ended


def forge_settings(pristine: Any, data: TextData, tmp_path: Path, seed: int) -> str:
    """Of a run folder, with a digest that fits."""
    rng = random.Random(f"settings {seed}")
    record = json.loads((pristine["run"][0] / "config.json").read_text())
    record["config"] = harm_value(record["config"], rng)
    (tmp_path / "forged").mkdir(exist_ok=True)
    try:
        record["digest"] = digest_of(record)
        (tmp_path / "forged" / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    except ValueError:
        return "unwritable"

    def read() -> Any:
        run = RunFolder.open(tmp_path / "forged")
        return RunArguments.of(run), Settings.from_dict(run.config["settings"])

    ended, found = outcome_of(read)
    if ended == "read":
        config = record["config"]
        assert dataclasses.asdict(found[0]) == config["arguments"]
        assert holds(json.loads(json.dumps(found[1].to_dict())), config["settings"]), seed
    return ended


def holds(whole: Any, part: Any) -> bool:
    """Whether a table says all that another does; a setting that is left out has its default."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and holds(whole[name], value) for name, value in part.items())
    return bool(whole == part)


def forge_ledger(pristine: Any, data: TextData, tmp_path: Path, seed: int) -> str:
    """With a chain that fits."""
    rng = random.Random(f"ledger {seed}")
    entries = [(e.kind, e.data) for e in read_ledger(pristine["ledger"][0] / "ledger.jsonl")]
    at = rng.randrange(len(entries))
    kind, table = entries[at][0], harm_value(entries[at][1], rng)
    path = tmp_path / "ledger.jsonl"
    path.unlink(missing_ok=True)
    ledger = Ledger.create(path)
    try:
        for number, (name, plain) in enumerate(entries):
            ledger.append(
                *((kind,) if number == at else (name,)), **(table if number == at else plain)
            )
    except (K1Error, TypeError):
        return "unwritable"
    ended, found = outcome_of(lambda: read_ledger(path))
    assert ended == "read" and found[at].data == table
    return ended


FORGERIES = (forge_system, forge_controller, forge_settings, forge_ledger)


@pytest.mark.parametrize("forge", FORGERIES)
def test_forgeries_are_refused_or_taken_at_their_word(
    forge: Callable[..., str], pristine: Any, data: TextData, tmp_path: Path
) -> None:
    counts = Counter(forge(pristine, data, tmp_path, seed) for seed in range(80))
    assert counts["refused"] > 20 or forge is forge_ledger


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("forge", FORGERIES)
def test_many_forgeries_are_refused_or_taken_at_their_word(
    forge: Callable[..., str], pristine: Any, data: TextData, tmp_path: Path
) -> None:
    counts = Counter(forge(pristine, data, tmp_path, seed) for seed in range(1000, 2500))
    print(forge.__name__, dict(counts))
    assert counts["refused"] > 300 or forge is forge_ledger


def go_on(runner: Runner, tmp_path: Path, seeds: range) -> Counter[str]:
    """Resume a run from forged checkpoints; what is accepted has to be observable."""
    source = runner.folder.checkpoints_path / "step-00000002"
    whole, counts = runner.env.session.snapshot(), Counter[str]()
    for seed in seeds:
        rng = random.Random(f"run {seed}")
        made = forged(source, tmp_path / "step-00000002", "phase2", rng)
        if made is None:
            continue
        before = runner.env.session.snapshot()[1]
        ended, _ = outcome_of(lambda: runner._continue(tmp_path / "step-00000002"))
        counts[ended] += 1
        after = json.loads(json.dumps(runner.env.session.snapshot()[1]))
        if ended == "read":
            assert after == made[1]["session"], seed
            observation, info = runner.env.observe()
            runner.controller.act(observation, info)
            runner.env.session.restore(*whole)
        elif not runner.env.session.snapshot()[1]["visited"]:
            runner.env.session.restore(*whole)
        else:
            assert after == json.loads(json.dumps(before)) or ended == "refused"
    return counts


def test_a_run_goes_on_from_no_forged_state_that_is_impossible(
    runner: Runner, tmp_path: Path
) -> None:
    assert go_on(runner, tmp_path, range(120))["refused"] > 40


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_a_run_goes_on_from_none_of_many_impossible_states(runner: Runner, tmp_path: Path) -> None:
    counts = go_on(runner, tmp_path, range(1000, 3500))
    print("run state", dict(counts))
    assert counts["refused"] > 500


def test_a_manifest_that_names_other_files_reads_none_of_them(
    pristine: Any, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = tmp_path / "system"
    shutil.copytree(pristine["system"][0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["files"]
    for name in ("../secret", str(secret)):
        manifest["files"] = {**files, name: files["state.json"]}
        (folder / "manifest.json").write_bytes(checkpoint._render(manifest))
        assert of_checkpoint(folder, "trainer") == of_checkpoint(pristine["system"][0], "trainer")
        manifest["files"] = {name: files["state.json"], "tensors.safetensors": files["state.json"]}
        (folder / "manifest.json").write_bytes(checkpoint._render(manifest))
        with pytest.raises(K1Error, match="is damaged"):
            load_checkpoint(folder, kind="trainer")


@pytest.mark.parametrize(
    "packed", ["pickle", "text pickle", "torch zip", "old torch file", "SB3 zip"]
)
@pytest.mark.parametrize("sealed", [False, True])
def test_hostile_pickles_execute_nothing(
    packed: str, sealed: bool, pristine: Any, data: TextData, tmp_path: Path
) -> None:
    proof = tmp_path / "executed"
    content = hostile_files(proof)[packed]
    for name, (source, read) in pristine.items():
        for file in files_of(source):
            folder = tmp_path / "harmed"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            place = folder / file.relative_to(source)
            place.write_bytes(content)
            manifest = place.parent / "manifest.json"
            if sealed and manifest.exists() and place != manifest:
                table = json.loads(manifest.read_text()) | checkpoint._describe(place.parent, "")
                table["kind"] = json.loads((file.parent / "manifest.json").read_text())["kind"]
                manifest.write_bytes(checkpoint._render(table))
            ended, _ = outcome_of(lambda folder=folder, read=read: read(folder))
            # The readme, the lock and the metrics are not read.
            assert ended == "refused" or file.name in ("README.txt", "run.lock", "metrics.jsonl")
            if name == "system":
                outcome_of(lambda folder=folder: Trainer.load(folder, data))
    assert not proof.exists()
    import pickle

    pickle.loads(hostile_files(proof)["pickle"])
    assert proof.exists(), "the payload is a real one"
