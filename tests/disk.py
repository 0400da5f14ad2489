"""A disk that can be watched, fill up, or lose what was not forced to it.

All that K-1 does to files goes through a few calls; here they are counted, recorded, and made to
fail.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest

from k1 import checkpoint


class Crash(BaseException):
    """Stands for the end of the process: no handler of ordinary errors may stop it."""


Operation = tuple[Any, ...]
_ALLOCATE = {"create", "write", "mkdir", "fsync"}
"""What a full disk refuses."""


@dataclass
class Disk:
    """Watches the calls; `fail` is asked before each."""

    fail: Callable[[int, str], str | None] = lambda number, kind: None
    """Given the number and the kind of a call: None, "crash" or "full"."""
    trace: list[Operation] = field(default_factory=list)
    calls: int = 0

    def meet(self, kind: str) -> str | None:
        self.calls += 1
        return self.fail(self.calls, kind)

    def check(self, kind: str) -> None:
        verdict = self.meet(kind)
        if verdict == "crash":
            raise Crash
        if verdict == "full":
            raise OSError(ENOSPC, "No space left on device")


class _File:
    """A file open for writing."""

    def __init__(self, disk: Disk, file: Any, path: str) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, content: Any) -> Any:
        verdict = self._disk.meet("write")
        if verdict is None:
            self._disk.trace.append(("write", self._path, bytes(content)))
            return self._file.write(content)
        # What goes wrong in the middle of a write has written a part.
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        raise Crash if verdict == "crash" else OSError(ENOSPC, "No space left on device")

    def truncate(self, size: int) -> Any:
        self._disk.check("truncate")
        self._disk.trace.append(("truncate", self._path, size))
        return self._file.truncate(size)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _place(path: Any, folder: int | None = None) -> str:
    """The absolute path of what a call is about."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.abspath(os.path.join(base, os.fspath(path)))


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Let a disk stand between K-1 and the real one."""
    with pytest.MonkeyPatch.context() as patch:
        real_open, real_io = os.open, io.open

        def opened(
            path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **more: Any
        ) -> int:
            place = None if isinstance(path, int) else _place(path, dir_fd)
            if flags & os.O_CREAT and place and not os.path.lexists(place):
                disk.check("create")
                disk.trace.append(("create", place))
            return real_open(path, flags, *rest, dir_fd=dir_fd, **more)

        def io_opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wxa+"):
                return real_io(path, mode, *rest, **more)
            place = _place(path)
            new = not os.path.lexists(place)
            disk.check("create" if new else "open")
            file = real_io(path, mode, *rest, **more)
            if new:
                disk.trace.append(("create", place))
            elif "w" in mode:
                disk.trace.append(("truncate", place, 0))
            return _File(disk, file, place)

        def plain(kind: str, real: Callable[..., Any], describe: Callable[..., Operation]) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                disk.check(kind)
                operation = describe(*args, **kwargs)
                result = real(*args, **kwargs)
                disk.trace.append(operation)
                return result

            return call

        def stored(tensors: Any, path: Any) -> None:
            verdict = disk.meet("write")
            real_save(tensors, path)
            content = Path(path).read_bytes()
            if verdict is not None:
                Path(path).write_bytes(content[: len(content) // 2])
                raise Crash if verdict == "crash" else OSError(ENOSPC, "No space left on device")
            disk.trace.extend([("create", _place(path)), ("write", _place(path), content)])

        def one(kind: str) -> Callable[..., Operation]:
            return lambda path, *_, dir_fd=None, **__: (kind, _place(path, dir_fd))

        real_save = checkpoint.save_file
        patch.setattr(checkpoint, "save_file", stored)
        patch.setattr(os, "open", opened)
        patch.setattr(io, "open", io_opened)
        patch.setattr(builtins, "open", io_opened)
        patch.setattr(os, "fsync", plain("fsync", os.fsync, one("fsync")))
        for name in ("mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, plain(name, getattr(os, name), one(name)))
        patch.setattr(
            os,
            "rename",
            plain("rename", os.rename, lambda a, b: ("rename", _place(a), _place(b))),
        )
        yield disk


def crash_at(number: int) -> Callable[[int, str], str | None]:
    """The process ends at a call; nothing is done after it."""
    return lambda at, kind: "crash" if at >= number else None


def full_from(number: int) -> Callable[[int, str], str | None]:
    """The disk has no room from a call on."""
    return lambda at, kind: "full" if at >= number and kind in _ALLOCATE else None


# -- loss of power -------------------------------------------------------------------------------


@dataclass
class _Node:
    """A file's contents or a folder's names: what is sure, and what came after."""

    folder: bool
    sure: Any
    now: Any
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Of a folder, since it was forced to the disk: names and what they stand for then."""


class PowerLoss:
    """Carries a trace out and tells what a disk may hold if power is lost at its end.

    What was forced to the disk stays. Of a folder's changes since then any may be lost, each by
    itself; of a file's, all, the second half, or none.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.top = _Node(True, {}, {})

    def _find(self, path: str) -> _Node | None:
        node: Any = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.now.get(part) if node is not None else None
        return node

    def _set(self, path: str, node: _Node | None) -> None:
        place = Path(path)
        parent = self._find(str(place.parent))
        assert parent is not None
        self._change(parent, {place.name: node})

    def _change(self, folder: _Node, change: dict[str, Any]) -> None:
        folder.changes.append(change)
        folder.now = {n: v for n, v in {**folder.now, **change}.items() if v is not None}

    def apply(self, operation: Operation) -> None:
        """Do what the trace says next."""
        kind, path, *rest = operation
        if not path.startswith(self.root + "/") and path != self.root:
            return
        if kind in ("create", "mkdir"):
            folder = kind == "mkdir"
            empty: Any = {} if folder else b""
            self._set(path, _Node(folder, empty, empty))
        elif kind in ("unlink", "rmdir"):
            self._set(path, None)
        elif kind == "rename":
            source, target = Path(path), Path(rest[0])
            parent, moved = self._find(str(source.parent)), self._find(path)
            assert parent is not None and source.parent == target.parent
            self._change(parent, {source.name: None, target.name: moved})
        elif (node := self._find(path)) is None:
            return
        elif kind == "fsync":
            node.sure, node.changes = node.now, []
        elif kind == "write":
            node.now += rest[0]
        elif kind == "truncate":
            node.now = node.now[: rest[0]]

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """Every disk that there may be: paths with their contents, None for folders."""
        loose = [change for node in self._all(self.top) for change in node.changes]
        for kept in _choices(len(loose)):
            chosen = {id(change) for change, keep in zip(loose, kept, strict=True) if keep}
            for part in (0.0, 0.5, 1.0):
                found: dict[str, bytes | None] = {}
                self._collect(self.top, "", chosen, part, found)
                yield found

    def _all(self, node: _Node) -> Iterator[_Node]:
        if node.folder:
            yield node
            held = {**node.sure, **node.now}
            for change in node.changes:
                held |= {n: v for n, v in change.items() if v is not None}
            for child in held.values():
                yield from self._all(child)

    def _collect(
        self, node: _Node, path: str, chosen: set[int], part: float, found: dict[str, Any]
    ) -> None:
        names = dict(node.sure)
        for change in node.changes:
            if id(change) in chosen:
                names |= change
        for name, child in names.items():
            if child is None:
                continue
            place = f"{path}{name}"
            if child.folder:
                found[place] = None
                self._collect(child, place + "/", chosen, part, found)
            elif child.now.startswith(child.sure):
                added = len(child.now) - len(child.sure)
                found[place] = child.now[: len(child.sure) + int(part * added)]
            else:
                found[place] = child.sure if part < 1 else child.now


def _choices(count: int) -> Iterator[tuple[bool, ...]]:
    """Which of so many changes survive: every choice of a few, else every beginning and every one
    alone that is lost or kept."""
    if count <= 6:
        for number in range(2**count):
            yield tuple(bool(number >> i & 1) for i in range(count))
        return
    for cut in range(count + 1):
        yield tuple(i < cut for i in range(count))
        yield tuple(i != cut for i in range(count))
        yield tuple(i == cut for i in range(count))
