"""Files that survive a crash, and the one JSON dialect that K-1 writes.

Nothing here imports torch, so tools that only read a run's records start at once.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fsync_file(path: Path) -> None:
    """Forces a file's contents to the disk.

    Raises:
        OSError: The file cannot be opened or the disk reports a failure.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Forces a folder's list of names to the disk, without which a rename may be lost.

    Raises:
        OSError: The folder cannot be opened or the disk reports a failure.
    """
    fsync_file(path)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file in place and forces its contents to the disk.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that readers and crashes see the old or the new one, never a part.

    Raises:
        OSError: The file cannot be written; the old one, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        write_durably(temporary, content)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def read_ordinary(path: Path, most: int | None = None) -> bytes:
    """Reads a whole file; what is no ordinary one, such as a pipe, might never end and is refused.

    Args:
        path: The file, or a link to it.
        most: Bytes beyond which it cannot be what it is taken for.

    Raises:
        OSError: The file is missing, cannot be read, is not ordinary or too large.
    """
    # A pipe without a writer would hold an ordinary open up for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def digest_of(value: Mapping[str, object]) -> str:
    """Hashes a table of plain data (SHA-256), its own entry `digest` left out.

    Raises:
        ValueError: Something in it is not finite plain data.
    """
    body = {key: item for key, item in value.items() if key != "digest"}
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def canonical_json(value: object, where: str = "value") -> str:
    """Renders plain data in the only way that K-1 hashes it: sorted keys, no spaces, ASCII.

    What it accepts comes back from JSON as it went in, but for tuples as lists. The `json` module
    alone turns an integer key into a string and writes NaN as something that is no JSON, both
    silently; a resumed run would then differ from an uninterrupted one.

    Args:
        value: What is to be written.
        where: What to call it in an error's message.

    Raises:
        ValueError: Something in it is not finite plain data; the message says where and what.
    """
    try:
        _check_plain(value, where)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply or contains itself") from error


def _check_plain(value: object, where: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, which is not a string")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    else:
        raise ValueError(f"{where} is of type {type(value).__name__}, which is not plain data")


def parse_json(content: bytes) -> Any:
    """Reads JSON and reports every way of being unreadable as one kind of error.

    Raises:
        ValueError: The content is not UTF-8, not JSON, or nested beyond reason.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
