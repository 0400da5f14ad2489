"""Run folders: nothing is mixed up, nothing is written by two, nothing torn is believed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from k1.errors import K1Error
from k1env.run_folder import RunFolder
from tests.helpers import refusal

CONFIG = {
    "arguments": {"seed": 3, "policy": "Größe"},
    "settings": {"branching": [4, 3, 2], "lr": 0.1},
}
COMMAND = ["python", "scripts/run_phase2.py", "--seed", "3"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "one", CONFIG, COMMAND)


def lines_of(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]


def test_a_run_can_be_opened_again(folder: RunFolder) -> None:
    for run in (folder, RunFolder.open(folder.path)):
        assert run.config == CONFIG
        assert run.command == COMMAND
        assert run.versions["torch"] == torch.__version__
        assert run.versions["numpy"] == np.__version__
        assert run.versions["python"] == sys.version.split()[0]
        assert {"gymnasium", "k1", "platform"} <= run.versions.keys()
        assert not run.finished
        assert run.checkpoints_path.is_dir()
        assert run.ledger_path == folder.path / "ledger.jsonl"
        assert run.metrics_path == folder.path / "metrics.jsonl"
        assert run.summary_path == folder.path / "summary.json"


def test_the_readme_explains_each_file(folder: RunFolder) -> None:
    folder.ledger_path.touch()
    folder.append_metrics({})
    folder.write_summary({})
    text = (folder.path / "README.txt").read_text()
    names = {path.name for path in folder.path.iterdir()} - {"README.txt"}
    assert all(name in text for name in names)
    assert max(map(len, text.splitlines())) <= 100


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    (tmp_path / ".config.json.tmp-0123").touch()
    assert RunFolder.create(tmp_path, CONFIG, COMMAND).config == CONFIG


def test_a_folder_with_files_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    before = (folder.path / "config.json").read_bytes()
    message = refusal(lambda: RunFolder.create(folder.path, {}, []))
    assert "--resume" in message
    assert "--run-dir" in message
    assert (folder.path / "config.json").read_bytes() == before
    (tmp_path / "file").touch()
    assert "--run-dir" in refusal(lambda: RunFolder.create(tmp_path / "file", {}, []))
    assert "--run-dir" in refusal(lambda: RunFolder.create(tmp_path / "file" / "run", {}, []))


def test_settings_that_json_would_alter_are_refused(tmp_path: Path) -> None:
    for config in ({"lr": math.nan}, {"path": Path("x")}, {"scales": {1: 0.15}}):
        message = refusal(lambda config=config: RunFolder.create(tmp_path / "run", config, []))
        assert f"settings.config.{next(iter(config))}" in message
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_folder_is_named(folder: RunFolder, tmp_path: Path) -> None:
    assert "there is no run folder" in refusal(lambda: RunFolder.open(tmp_path / "nowhere"))
    assert "no config.json" in refusal(lambda: RunFolder.open(tmp_path))
    file = folder.path / "config.json"
    record = json.loads(file.read_text())
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        file.write_bytes(content)
        assert "cannot read" in refusal(lambda: RunFolder.open(folder.path))
    for change in ({"format_version": 0}, {"config": 1}, {"command": None}, {"versions": []}):
        file.write_text(json.dumps(record | change))
        assert "is damaged" in refusal(lambda: RunFolder.open(folder.path))
    file.write_text("[]")
    assert "is damaged" in refusal(lambda: RunFolder.open(folder.path))
    file.write_text(json.dumps(record | {"format_version": 2}))
    assert "upgrade K-1" in refusal(lambda: RunFolder.open(folder.path))


def test_a_folder_of_another_kind_is_named(folder: RunFolder, tmp_path: Path) -> None:
    class Other(RunFolder):
        script = "other.py"
        fields = ("plan",)

    assert refusal(lambda: Other.open(folder.path)) == (
        f"{folder.path} is no folder of other.py: it was made by run_phase2.py; check the path"
    )
    other = Other.create(tmp_path / "other", {"plan": {}}, ["python", "/a b/other.py", "x.py"])
    assert Other.open(other.path).config == {"plan": {}}
    message = refusal(lambda: RunFolder.open(other.path))
    assert "is no folder of run_phase2.py: it was made by other.py" in message


def test_metrics_are_one_line_each_and_readable_at_once(folder: RunFolder) -> None:
    assert folder.metrics_lines == 0
    for step in range(3):
        folder.append_metrics({"step": step, "text": "a\nb", "loss": 1 / 3})
        assert folder.metrics_lines == step + 1 == RunFolder.open(folder.path).metrics_lines
    folder.sync_metrics()
    assert lines_of(folder) == [{"step": s, "text": "a\nb", "loss": 1 / 3} for s in range(3)]


def test_a_diverged_loss_is_null_and_not_the_end_of_the_run(folder: RunFolder) -> None:
    folder.append_metrics({"loss": math.nan, "losses": [math.inf, 1.0], "by": {"x": -math.inf}})
    assert lines_of(folder) == [{"loss": None, "losses": [None, 1.0], "by": {"x": None}}]
    folder.write_summary({"bits_per_byte_end": {"prose": np.float64("nan"), "code": 1.5}})
    summary = folder.summary
    assert summary == {"bits_per_byte_end": {"prose": None, "code": 1.5}}


def test_what_is_no_plain_data_is_named(folder: RunFolder) -> None:
    assert "metrics.loss" in refusal(lambda: folder.append_metrics({"loss": torch.tensor(1.0)}))
    assert "summary.loss" in refusal(lambda: folder.write_summary({"loss": np.float32(1)}))
    assert folder.metrics_lines == 0
    assert not folder.finished


@pytest.mark.parametrize("torn", [b"", b'{"step":', b'{"step":9}'])
def test_a_resumed_run_continues_the_metrics(folder: RunFolder, torn: bytes) -> None:
    for step in range(5):
        folder.append_metrics({"step": step})
    with folder.metrics_path.open("ab") as file:
        file.write(torn)
    resumed = RunFolder.open(folder.path)
    assert resumed.metrics_lines == 5
    resumed.truncate_metrics(3)
    assert resumed.metrics_lines == 3
    resumed.append_metrics({"step": "new"})
    assert [line["step"] for line in lines_of(folder)] == [0, 1, 2, "new"]


def test_a_torn_line_is_never_continued(folder: RunFolder) -> None:
    folder.append_metrics({"step": 0})
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"step":')
    RunFolder.open(folder.path).append_metrics({"step": 1})
    assert lines_of(folder) == [{"step": 0}, {"step": 1}]


def test_metrics_that_a_checkpoint_counted_must_be_there(folder: RunFolder) -> None:
    folder.truncate_metrics(0)
    folder.append_metrics({"step": 0})
    for lines in (2, -1):
        assert "1 whole lines" in refusal(lambda lines=lines: folder.truncate_metrics(lines))
    assert folder.metrics_lines == 1


def test_the_summary_is_whole_or_absent(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refusal(lambda: folder.write_summary({"n": 1}))
    assert not folder.finished
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]
    folder.write_summary({"n": 2})
    assert RunFolder.open(folder.path).finished
    assert RunFolder.open(folder.path).summary == {"n": 2}


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from k1.errors import K1Error
from k1env.run_folder import RunFolder
with RunFolder.open(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_cannot_write_one_run(folder: RunFolder) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == "locked\n"
        message = refusal(lambda: folder.lock().__enter__())
        assert f"process {other.pid};" in message
        other.kill()
    with folder.lock():
        pass


def test_the_lock_ends_with_its_block(folder: RunFolder) -> None:
    with folder.lock():
        assert f"process {os.getpid()};" in refusal(lambda: folder.lock().__enter__())
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with folder.lock():
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock", "ledger.jsonl", "summary.json"])
def test_nothing_outside_is_written_through_a_link(
    folder: RunFolder, tmp_path: Path, name: str
) -> None:
    """Cutting off, locking and replacing would otherwise happen to the user's own file."""
    outside = tmp_path / "thesis.txt"
    outside.write_text("years of work")
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(outside)
    assert "is a link" in refusal(lambda: RunFolder.open(folder.path))
    assert "is a link" in refusal(lambda: folder.lock().__enter__())
    assert "is a link" in refusal(lambda: RunFolder.create(folder.path, CONFIG, COMMAND))
    assert outside.read_text() == "years of work"


def test_checkpoints_of_another_run_are_not_deleted_through_a_link(
    folder: RunFolder, tmp_path: Path
) -> None:
    other = RunFolder.create(tmp_path / "other", CONFIG, COMMAND)
    folder.checkpoints_path.rmdir()
    folder.checkpoints_path.symlink_to(other.checkpoints_path)
    assert "is a link" in refusal(lambda: folder.lock().__enter__())
    folder.checkpoints_path.unlink()
    folder.checkpoints_path.mkdir()
    (folder.checkpoints_path / "step-00000001").symlink_to(other.path)
    assert "is a link" in refusal(lambda: RunFolder.open(folder.path))


def test_the_folder_itself_may_be_reached_by_a_link(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    with RunFolder.open(tmp_path / "link").lock():
        pass


def test_a_pipe_holds_nothing_up(folder: RunFolder) -> None:
    (folder.path / "config.json").unlink()
    os.mkfifo(folder.path / "config.json")
    assert "no ordinary file" in refusal(lambda: RunFolder.open(folder.path))


def test_what_was_changed_in_settings_or_results_is_seen(folder: RunFolder) -> None:
    folder.write_summary({"gain": 0.1, "seconds": 3.0})
    for file in (folder.path / "config.json", folder.summary_path):
        text = file.read_text()
        for old, new in (
            ("0.1", "0.2"),
            (
                '"',
                '"x": 1, "',
            ),
            ("\n", " \n"),
            ("0.1", "1e999"),
        ):
            file.write_text(text.replace(old, new, 1))
            with pytest.raises(K1Error, match=r"is damaged|cannot read"):
                RunFolder.open(folder.path).summary  # noqa: B018
        file.write_text(text)
    folder.summary_path.write_text(folder.summary_path.read_text().replace("3.0", "4.0"))
    assert folder.summary == {"gain": 0.1, "seconds": 4.0}, "times are no part of what is sealed"


def test_a_folder_from_before_there_were_digests_is_read(folder: RunFolder) -> None:
    file = folder.path / "config.json"
    record = json.loads(file.read_text())
    del record["digest"]
    file.write_text(json.dumps(record, indent=2) + "\n")
    assert RunFolder.open(folder.path).config == CONFIG
