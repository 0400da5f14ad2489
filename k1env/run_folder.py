"""The folder that everything about a run is kept in and that everything people see derives from."""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from k1.durable import (
    canonical_json,
    digest_of,
    fsync_folder,
    parse_json,
    read_ordinary,
    write_atomically,
)
from k1.errors import K1Error

FORMAT_VERSION = 1

_CONFIG = "config.json"
_README = "README.txt"
_LEDGER = "ledger.jsonl"
_METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
_SUMMARY = "summary.json"
_LOCK = "run.lock"
_MOST_JSON = 2**26
"""Bytes beyond which a file holds no settings and no results."""
_PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib", "k1")

_README_TEXT = f"""\
This folder holds one run of K-1. Each file, in the order in which a run writes them:

{_CONFIG:<15} the settings, the exact command, and the versions that the run was started with
{_LEDGER:<15} every decision and its outcome, one JSON object a line; each carries the hash
                of the line before, so a later change shows
{_METRICS:<15} the course of the training, one JSON object a line; null stands for a number
                that was not finite
{_CHECKPOINTS + "/":<15} the states to continue from: tensors, plain JSON, and their SHA-256
{_SUMMARY:<15} the results so far, written when the run ends or pauses
{_LOCK:<15} marks a run in progress; it may stay behind and does no harm

A run that was interrupted continues when its command is given again with --resume.
"""


class RunFolder:
    """The files of one run of Phase 2; use `create` or `open`.

    Phase 1 constructs one directly, without a record, for the lock, metrics and checkpoints.

    Attributes:
        path: The folder.
        readme: What a new folder tells about its files.
        script: The script that makes such folders.
        fields: What the settings of each of them have; `open` refuses a folder that lacks one.
    """

    readme = _README_TEXT
    script = "run_phase2.py"
    fields: tuple[str, ...] = ("arguments", "settings")

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path = path
        self._record = record
        self._metrics_written: int | None = None
        self._metrics_named = False

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], command: Sequence[str]) -> Self:
        """Starts a run in a folder that is new or empty.

        Args:
            path: The folder; its parents are made too.
            config: All settings of the run, as finite plain data.
            command: The exact command, program first.

        Raises:
            K1Error: The folder is in use, has files in it or cannot be written, or the settings
                are not plain data.
        """
        path = Path(path)
        record = {
            "format_version": FORMAT_VERSION,
            "config": config,
            "command": list(command),
            "versions": _versions(),
        }
        try:
            canonical_json(record, "settings")
        except ValueError as error:
            raise K1Error(f"cannot record the run: {error}; use finite plain data") from error
        record["digest"] = digest_of(record)
        folder = cls(path, record)
        try:
            _make_durably(path)
            with folder.lock():
                folder.refuse_to_mix()
                write_atomically(path / _CONFIG, _pretty(record))
                folder.checkpoints_path.mkdir(exist_ok=True)
                write_atomically(path / _README, cls.readme.encode())
        except OSError as error:
            raise K1Error(
                f"cannot start a run in {path}: {error.strerror or error}; choose another --run-dir"
            ) from error
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the folder of an earlier run, to resume, replay or report it.

        Raises:
            K1Error: It is missing, is no run folder or one of another kind, is damaged, has
                another format version, or holds a link.
        """
        path = Path(path)
        if not path.is_dir():
            raise K1Error(f"there is no run folder at {path}; check the path")
        file = path / _CONFIG
        try:
            content = read_ordinary(file, _MOST_JSON)
            record = parse_json(content)
        except FileNotFoundError as error:
            raise K1Error(
                f"{path} is no run folder, for it has no {_CONFIG}; check the path"
            ) from error
        except (OSError, ValueError) as error:
            raise K1Error(
                f"cannot read {file}: {error}; restore it from a copy or start a new run"
            ) from error
        version = record.get("format_version") if isinstance(record, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise K1Error(
                f"{path} has format version {version}, but this K-1 reads up to {FORMAT_VERSION}; "
                "upgrade K-1"
            )
        if version != FORMAT_VERSION or not (
            isinstance(record.get("config"), dict)
            and isinstance(record.get("command"), list)
            and isinstance(record.get("versions"), dict)
            and _is_intact(record, content)
        ):
            raise K1Error(
                f"{file} was not written by K-1 or is damaged; "
                "restore it from a copy or start a new run"
            )
        if not record["config"].keys() >= set(cls.fields):
            scripts = [Path(word).name for word in map(str, record["command"]) if ".py" in word]
            raise K1Error(
                f"{path} is no folder of {cls.script}: it was made by "
                f"{scripts[0] if scripts else 'something else'}; check the path"
            )
        folder = cls(path, record)
        folder.refuse_links()
        return folder

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return dict(self._record["config"])

    @property
    def command(self) -> list[str]:
        """The exact command that started the run."""
        return list(self._record["command"])

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the run was started with; a resume may compare them with its own."""
        return dict(self._record["versions"])

    @property
    def ledger_path(self) -> Path:
        """Where the ledger is."""
        return self.path / _LEDGER

    @property
    def metrics_path(self) -> Path:
        """Where the metrics are."""
        return self.path / _METRICS

    @property
    def checkpoints_path(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / _CHECKPOINTS

    @property
    def summary_path(self) -> Path:
        """Where the results are once the run has finished."""
        return self.path / _SUMMARY

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; the results are written last."""
        return self.summary_path.exists()

    @property
    def summary(self) -> dict[str, Any]:
        """What the run came to.

        Raises:
            K1Error: There is no summary, or it is damaged.
        """
        try:
            content = read_ordinary(self.summary_path, _MOST_JSON)
            summary = parse_json(content)
        except (OSError, ValueError) as error:
            raise K1Error(f"cannot read {self.summary_path}: {error}; resume the run") from error
        if not isinstance(summary, dict) or not _is_intact(summary, content, _timeless(summary)):
            raise K1Error(
                f"{self.summary_path} was not written by K-1 or is damaged; "
                "restore it from a copy, or delete it and resume the run"
            )
        return {name: value for name, value in summary.items() if name != "digest"}

    @property
    def metrics_lines(self) -> int:
        """The number of whole lines of metrics; store it in a checkpoint."""
        if self._metrics_written is None:
            return self._read_metrics().count(b"\n")
        return self._metrics_written

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line of metrics and hands it to the operating system.

        A crash of the process loses nothing; against a loss of power there is `sync_metrics`.

        Args:
            metrics: Plain data; a number that is not finite is written as null.

        Raises:
            K1Error: It is not plain data, or the file cannot be written.
        """
        try:
            line = canonical_json(_without_non_finite(dict(metrics)), "metrics") + "\n"
        except ValueError as error:
            raise K1Error(f"cannot record metrics: {error}; use plain data") from error
        if self._metrics_written is None:
            self.truncate_metrics(self.metrics_lines)
        written = self.metrics_lines
        try:
            with self.metrics_path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            self._metrics_written = None
            raise _cannot_write(self.metrics_path, error) from error
        self._metrics_written = written + 1

    def sync_metrics(self) -> None:
        """Forces the metrics to the disk; call it before a checkpoint that counts on them.

        Raises:
            K1Error: The disk refuses.
        """
        try:
            with self.metrics_path.open("ab") as file:
                os.fsync(file.fileno())
            if not self._metrics_named:
                fsync_folder(self.path)  # the file itself may be new
                self._metrics_named = True
        except OSError as error:
            raise _cannot_write(self.metrics_path, error) from error

    def truncate_metrics(self, lines: int) -> None:
        """Drops what a killed run wrote after its checkpoint, and a line that the crash tore.

        Args:
            lines: How many lines to keep: `metrics_lines` at the time of the checkpoint.

        Raises:
            K1Error: There are fewer whole lines than that, or the file cannot be written.
        """
        content = self._read_metrics()
        whole = content.split(b"\n")[:-1]
        if not 0 <= lines <= len(whole):
            raise K1Error(
                f"{self.metrics_path} has {len(whole)} whole lines, but the checkpoint was taken "
                f"after {lines}; resume from an earlier checkpoint"
            )
        size = sum(len(line) + 1 for line in whole[:lines])
        if size < len(content):
            try:
                with self.metrics_path.open("r+b") as file:
                    file.truncate(size)
                    os.fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(self.metrics_path, error) from error
        self._metrics_written = lines

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the results at once and whole, which marks the run as finished.

        Their `digest` leaves `seconds` out, so that equal runs have equal digests.

        Args:
            summary: Plain data; a number that is not finite is written as null.

        Raises:
            K1Error: It is not plain data, or the file cannot be written.
        """
        plain = _without_non_finite(dict(summary))
        try:
            canonical_json(plain, "summary")
            sealed = {**plain, "digest": digest_of(_timeless(plain))}
            write_atomically(self.summary_path, _pretty(sealed))
        except ValueError as error:
            raise K1Error(f"cannot write the summary: {error}; use plain data") from error
        except OSError as error:
            raise _cannot_write(self.summary_path, error) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing this run; the end of the process ends it too.

        Raises:
            K1Error: Another process has it, the folder cannot be written, or holds a link.
        """
        self.refuse_links()
        path = self.path / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 20).decode(errors="replace").strip()
                raise K1Error(
                    f"{self.path} is being written by process {holder or 'unknown'}; "
                    "wait for it to end or choose another --run-dir"
                ) from error
            except OSError as error:
                raise _cannot_write(path, error) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def refuse_links(self) -> None:
        """Sees that the folder holds ordinary files and folders alone.

        Through a link in somebody else's folder, a run would cut off, replace and delete files that
        are not its own.

        Raises:
            K1Error: There is a link or something else in it.
        """
        for parent, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                try:
                    mode = (Path(parent) / name).lstat().st_mode
                except FileNotFoundError:  # of a run that goes on meanwhile
                    continue
                if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                    raise K1Error(
                        f"{Path(parent) / name} is a link or no ordinary file, which a run would "
                        "write through; put a copy of what it stands for in its place"
                    )

    def refuse_to_mix(self) -> None:
        """Sees that a new run finds an empty folder; call it with the lock.

        Raises:
            K1Error: There are files in it.
        """
        for found in self.path.iterdir():
            # Our own lock, and what a start leaves that was killed before it had a config.json.
            if found.name == _LOCK or found.name.startswith(f".{_CONFIG}.tmp-"):
                continue
            raise K1Error(
                f"{self.path} is not empty; continue its run with --resume "
                "or choose another --run-dir"
            )

    def _read_metrics(self) -> bytes:
        try:
            return read_ordinary(self.metrics_path)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise K1Error(
                f"cannot read {self.metrics_path}: {error.strerror or error}; "
                "make it a readable file"
            ) from error


def _make_durably(path: Path) -> None:
    """Makes a folder and those above it, so that a loss of power takes none of them away."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        fsync_folder(place.parent)


def _is_intact(table: dict[str, Any], content: bytes, sealed: dict[str, Any] | None = None) -> bool:
    """Whether a file is spelled as it was written, and its digest is that of its sealed part.

    Older folders hold no digests; they are read without.
    """
    try:
        if _pretty(table) != content:  # something is said twice, for example
            return False
        right = digest_of(table if sealed is None else sealed)
        return "digest" not in table or bool(table["digest"] == right)
    except (ValueError, RecursionError):
        return False


def _timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "seconds"}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        # From the metadata, for importing torch takes seconds.
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return value


def _cannot_write(path: Path, error: OSError) -> K1Error:
    return K1Error(
        f"cannot write {path}: {error.strerror or error}; free space or make the folder writable"
    )
