"""The ledger: every change shows, and a resumed run writes the same bytes."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from k1.errors import LedgerError
from k1env.ledger import GENESIS, Entry, Ledger, read_ledger
from tests import helpers
from tests.helpers import steps_before_a_kill

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
records = st.lists(st.tuples(st.text(), st.dictionaries(st.text(), plain)), max_size=5)

RUN = [
    ("intent", {"action": "add agent", "stage": 1}),
    ("verdict", {"accepted": True, "gains": [0.001, -0.25, 1e-300], "note": "Größe \u2028\n"}),
    ("action", {"id": 41, "parent": None}),
    ("checkpoint", {}),
]


def write(path: Path, run: list[tuple[str, dict[str, Any]]] = RUN) -> Ledger:
    path.unlink(missing_ok=True)
    ledger = Ledger.create(path)
    for kind, data in run:
        ledger.append(kind, **data)
    return ledger


def head_after(path: Path, index: int) -> str:
    return read_ledger(path)[index - 1].hash if index else GENESIS


def refusal(call: Callable[[], object]) -> str:
    return helpers.refusal(call, LedgerError)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_what_is_appended_is_read(path: Path) -> None:
    ledger = write(path)
    entries = read_ledger(path)
    assert [(entry.kind, entry.data) for entry in entries] == RUN
    assert entries == ledger.entries
    assert (ledger.index, ledger.head, ledger.pending) == (4, entries[-1].hash, 0)
    assert ledger.path == path


def test_the_format_is_what_other_programs_can_verify(path: Path) -> None:
    write(path)
    previous = "0" * 64
    for index, line in enumerate(path.read_bytes().splitlines()):
        entry = json.loads(line)
        body = {key: entry[key] for key in ("index", "kind", "data")}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        assert entry["index"] == index
        assert entry["previous"] == previous
        assert entry["hash"] == hashlib.sha256((previous + text).encode()).hexdigest()
        previous = entry["hash"]


def test_an_empty_ledger(path: Path) -> None:
    ledger = Ledger.create(path)
    assert (ledger.index, ledger.head, ledger.entries) == (0, "0" * 64, [])
    assert read_ledger(path) == []
    assert Ledger.resume(path, index=0, head=GENESIS).append("first").previous == GENESIS


def test_the_returned_entry_is_what_a_reader_gets(path: Path) -> None:
    ledger = Ledger.create(path)
    entry = ledger.append("kind", kind="also a name", self=(1, 2), index=7)
    assert entry == read_ledger(path)[0]
    assert entry.data == {"kind": "also a name", "self": [1, 2], "index": 7}
    assert isinstance(entry, Entry)


def test_each_entry_is_on_the_disk_when_append_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.create(path)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    ledger.append("one")
    assert synced == [path.read_bytes()] != [b""]


def test_create_does_not_replace(path: Path, tmp_path: Path) -> None:
    write(path)
    before = path.read_bytes()
    assert "exists" in refusal(lambda: Ledger.create(path))
    assert path.read_bytes() == before
    assert "cannot create" in refusal(lambda: Ledger.create(tmp_path / "nowhere" / "ledger"))
    assert "there is no ledger" in refusal(lambda: read_ledger(tmp_path / "nowhere"))
    assert "cannot read" in refusal(lambda: read_ledger(tmp_path))


@pytest.mark.parametrize("value", [math.nan, -math.inf, b"x", {1: 2}, {"a": [object()]}])
def test_what_json_would_alter_is_refused(path: Path, value: object) -> None:
    ledger = write(path)
    before = path.read_bytes()
    assert "loss" in refusal(lambda: ledger.append("verdict", loss=value))
    assert path.read_bytes() == before
    assert ledger.index == 4


@quick
@given(run=records)
@example(run=[("\ud800", {"\ud800": "\u2028\0"})])
def test_any_plain_data_comes_back(path: Path, run: list[tuple[str, dict[str, Any]]]) -> None:
    ledger = write(path, run)
    entries = read_ledger(path)
    assert entries == ledger.entries
    assert json.dumps([[e.kind, e.data] for e in entries], sort_keys=True) == json.dumps(
        run, sort_keys=True
    )


@quick
@given(run=records.filter(bool), choice=st.data())
def test_any_flipped_byte_is_detected(
    path: Path, run: list[tuple[str, dict[str, Any]]], choice: st.DataObject
) -> None:
    write(path, run)
    content = bytearray(path.read_bytes())
    position = choice.draw(st.integers(0, len(content) - 1))
    content[position] ^= choice.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        read_ledger(path)


def test_every_flipped_bit_of_one_line_is_detected_and_named(path: Path) -> None:
    write(path, RUN[2:] * 2)
    content = path.read_bytes()
    first, second, _ = content.split(b"\n", 2)
    for position in range(len(first) + 1, len(first) + 1 + len(second)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert f"line 2 of {path}" in refusal(lambda: read_ledger(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: [lines[0], *lines[2:]], "line 2 .* its index is 2 instead of 1"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 .* its index is 1"),
        (lambda lines: [lines[0], lines[0], *lines[1:]], "line 2 .* its index is 0"),
        (lambda lines: [lines[0], b"", *lines[1:]], "line 2 .* it is no JSON"),
        (lambda lines: [lines[0], b"\xff", *lines[1:]], "line 2 .* it is no JSON"),
        (lambda lines: [lines[0], b"[" * 100_000, *lines[1:]], "line 2 .* it is no JSON"),
        (lambda lines: [b"[]", *lines[1:]], "line 1 .* it is no ledger entry"),
        (lambda lines: [b"{}", *lines[1:]], "line 1 .* it is no ledger entry"),
        (lambda lines: [b" " + lines[0], *lines[1:]], "line 1 .* not written as"),
        (lambda lines: [lines[0].replace(b":0,", b":0.0,"), *lines[1:]], "line 1 .* its index"),
        (lambda lines: [lines[0].replace(b":0,", b":false,"), *lines[1:]], "line 1 .* its index"),
        (lambda lines: [lines[0].replace(b":1}", b":NaN}"), *lines[1:]], "line 1 .* is nan"),
        (lambda lines: [lines[0].replace(b":1}", b":1e999}"), *lines[1:]], "line 1 .* is inf"),
        (lambda lines: [lines[0].replace(b'"intent"', b"5"), *lines[1:]], "line 1 .* its kind"),
        (lambda lines: [lines[0].replace(b":1}", b":2}"), *lines[1:]], "line 1 .* its hash"),
        (lambda lines: [*lines[:-1], lines[-1].replace(b"{}", b"[]")], "line 4 .* its data"),
    ],
)
def test_a_forged_line_is_named(
    path: Path, change: Callable[[list[bytes]], list[bytes]], reason: str
) -> None:
    write(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))
    with pytest.raises(LedgerError, match=reason):
        read_ledger(path)
    with pytest.raises(LedgerError, match=reason):
        Ledger.resume(path, index=0, head=GENESIS)


def test_a_forged_chain_with_right_hashes_needs_every_later_line(path: Path) -> None:
    write(path, [("intent", {"action": "stop"}), *RUN[1:]])
    forged = path.read_bytes().splitlines()[0]
    write(path)
    path.write_bytes(b"\n".join([forged, *path.read_bytes().splitlines()[1:]]) + b"\n")
    assert f"line 2 of {path} is bad: it does not follow" in refusal(lambda: read_ledger(path))


@pytest.mark.parametrize("index", range(5))
def test_a_resumed_run_has_the_same_bytes(path: Path, index: int) -> None:
    write(path, RUN * 2)
    uninterrupted = path.read_bytes()
    write(path)
    ledger = Ledger.resume(path, index=index, head=head_after(path, index))
    assert (ledger.index, ledger.pending, len(ledger.entries)) == (index, 4 - index, index)
    for number, (kind, data) in enumerate((RUN * 2)[index:], start=index):
        assert ledger.append(kind, **data).index == number
    assert path.read_bytes() == uninterrupted
    assert ledger.entries == read_ledger(path)
    assert ledger.pending == 0


def test_nothing_is_written_while_a_run_catches_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path)
    path.chmod(0o444)
    ledger = Ledger.resume(path, index=1, head=head_after(path, 1))
    monkeypatch.setattr(Ledger, "_write", lambda *_: pytest.fail("written"))
    for kind, data in RUN[1:]:
        ledger.append(kind, **data)


def test_truncation_at_any_byte_of_the_last_line_resumes_right(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    before_last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(before_last, len(whole) + 1):
        for index in (0, 2, 3):
            path.write_bytes(whole)
            head = head_after(path, index)
            path.write_bytes(whole[:length])
            ledger = Ledger.resume(path, index=index, head=head)
            for kind, data in RUN[index:]:
                ledger.append(kind, **data)
            assert path.read_bytes() == whole
        if before_last < length < len(whole):
            path.write_bytes(whole[:length])
            assert f"line 4 of {path} is torn" in refusal(lambda: read_ledger(path))


@pytest.mark.parametrize("rubbish", [b"\0\0\0\0", b"\0\0\n", b"{\n", b"\n", b"\xff\xfe\n"])
def test_a_last_line_that_a_crash_garbled_is_cut_off(path: Path, rubbish: bytes) -> None:
    ledger = write(path)
    whole = path.read_bytes()
    path.write_bytes(whole + rubbish)
    assert "line 5 " in refusal(lambda: read_ledger(path))
    Ledger.resume(path, index=4, head=ledger.head)
    assert path.read_bytes() == whole


def test_a_bad_line_is_only_forgiven_at_the_end(path: Path) -> None:
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:-5] + b"\n", lines[3]]))
    assert "line 3 " in refusal(lambda: Ledger.resume(path, index=0, head=GENESIS))
    path.write_bytes(b"".join(lines[:3]) + lines[3].replace(b"checkpoint", b"checkpoinT"))
    assert "line 4 " in refusal(lambda: Ledger.resume(path, index=0, head=GENESIS))


@pytest.mark.parametrize(
    ("kind", "data", "difference"),
    [
        ("verdict", RUN[1][1] | {"accepted": False}, "accepted differ"),
        ("verdict", RUN[1][1] | {"accepted": 1}, "accepted differ"),
        ("verdict", {"accepted": True}, "gains, note differ"),
        ("verdict", RUN[1][1] | {"more": None}, "more differ"),
        ("action", RUN[1][1], "its kind was 'verdict' and is now 'action'"),
    ],
)
def test_a_resumed_run_that_departs_is_stopped(
    path: Path, kind: str, data: dict[str, Any], difference: str
) -> None:
    write(path)
    before = path.read_bytes()
    ledger = Ledger.resume(path, index=1, head=head_after(path, 1))
    message = refusal(lambda: ledger.append(kind, **data))
    assert "does not reproduce entry 1 " in message
    assert difference in message
    assert path.read_bytes() == before
    assert ledger.append(RUN[1][0], **RUN[1][1]).index == 1, "a refused entry counts for nothing"


def test_a_checkpoint_of_another_run_is_refused(path: Path) -> None:
    other = write(path.with_name("other"), RUN[1:])
    write(path)
    assert "does not belong" in refusal(lambda: Ledger.resume(path, index=3, head=other.head))
    assert "does not belong" in refusal(lambda: Ledger.resume(path, index=0, head="1" * 64))
    head = head_after(path, 4)
    assert "does not belong" in refusal(lambda: Ledger.resume(path, index=3, head=head))
    assert "has 4 whole entries" in refusal(lambda: Ledger.resume(path, index=5, head=head))
    assert "has 4 whole entries" in refusal(lambda: Ledger.resume(path, index=-1, head=head))


def test_a_torn_line_that_the_checkpoint_counted_is_kept_for_inspection(path: Path) -> None:
    ledger = write(path)
    torn = path.read_bytes()[:-3]
    path.write_bytes(torn)
    assert "has 3 whole" in refusal(lambda: Ledger.resume(path, index=4, head=ledger.head))
    assert path.read_bytes() == torn


def test_a_second_writer_is_noticed(path: Path) -> None:
    one = write(path)
    two = Ledger.resume(path, index=one.index, head=one.head)
    two.append("two")
    assert "changed by another process" in refusal(lambda: one.append("one"))
    assert [entry.kind for entry in read_ledger(path)][4:] == ["two"]


def test_a_full_disk_leaves_the_ledger_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = write(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refusal(lambda: ledger.append("lost"))
    assert path.read_bytes() == before
    ledger.append("kept")
    assert read_ledger(path)[-1].kind == "kept"


APPEND_FOREVER = """
import itertools, sys
from pathlib import Path
from k1env.ledger import Ledger
ledger = Ledger.create(Path(sys.argv[1]))
for step in itertools.count():
    ledger.append("step", step=step, text="x" * (step % 97))
    print(step, flush=True)
"""


def test_a_killed_run_loses_no_entry_that_was_confirmed(path: Path) -> None:
    confirmed = steps_before_a_kill(APPEND_FOREVER, path, 30)
    ledger = Ledger.resume(path, index=0, head=GENESIS)
    assert ledger.pending > confirmed
    for step in range(ledger.pending + 5):
        ledger.append("step", step=step, text="x" * (step % 97))
    assert read_ledger(path) == ledger.entries
