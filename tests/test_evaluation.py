"""Whole comparisons: the same rows again, resumed, over the command line, drawn."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k1.data import TextData
from k1.errors import K1Error
from k1.figures import check_plot
from k1env.instances import Instance
from policies import evaluation
from policies.comparison import compare_all
from policies.evaluation import Plan, evaluate
from policies.grid import choose, settings_of
from policies.plot import plot
from tests.evaluation_helpers import record, short_world
from tests.phase2_helpers import EVALUATE, call, quick, write_text

NAMES = ("noop", "random", "lookahead", "pbt")


@pytest.fixture(autouse=True)
def short_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three worlds in each set, of few decisions."""

    def drawn(domains: Any) -> dict[str, tuple[Instance, ...]]:
        rows = {"seed": 7}, {"seed": 8, "lr": 1e-2}, {"seed": 9, "branching": (4,)}
        worlds = [short_world(name=f"test/{i}", **row) for i, row in enumerate(rows)]
        return {"test": tuple(worlds), "train": tuple(replace(w, name="train/0") for w in worlds)}

    monkeypatch.setattr(evaluation, "instances_over", drawn)


@pytest.fixture
def plan(data: TextData) -> Plan:
    return Plan(
        policies=NAMES, worlds=("test/0", "test/1"), seeds=1, preset="tiny", data=data,
        config=quick(), device="cpu", num_envs=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "records.jsonl"


def test_the_same_seed_gives_the_same_rows_and_a_resumed_evaluation_too(
    plan: Plan, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    whole = evaluate(plan, kept, progress=lambda *at: steps.append(at))
    assert (whole.planned, whole.played, len(whole.records)) == (8, 8, 8)
    assert steps[-1] == (8, 8)
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 9

    # A crash in the middle of the fourth record; other company, one at a time.
    torn = kept.with_name("torn.jsonl")
    torn.write_text("".join(lines[:4]) + lines[4][:50])
    resumed = evaluate(replace(plan, num_envs=1), torn)
    assert resumed.played == 5
    assert resumed.records == whole.records
    assert sorted(torn.read_text().splitlines()) == sorted(kept.read_text().splitlines())

    monkeypatch.setattr(evaluation, "play", None)  # nothing is played any more
    again = evaluate(replace(plan, policies=("noop", "pbt")), kept)
    assert (again.planned, again.played) == (4, 0)
    assert again.records == [r for r in whole.records if r["policy"] in ("noop", "pbt")]


def test_time_that_is_up_leaves_what_is_finished(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    found = evaluate(plan, file, max_seconds=0.0)
    assert (found.records, found.played, found.planned) == ([], 0, 8)
    assert len(file.read_text().splitlines()) == 1


def test_by_default_worlds_bring_the_builtin_text_of_their_set(plan: Plan) -> None:
    asked = replace(plan, data=None, worlds=("test",), policies=("noop",), num_envs=1)
    found = evaluate(asked, max_seconds=0.0)
    assert found.planned == 24
    assert found.head["settings"]["instance"] == "test"
    named = evaluate(replace(asked, data="builtin", worlds=("test/3",)), max_seconds=0.0)
    assert (named.planned, named.head) == (1, found.head)


def test_grid_search_chooses_the_setting_with_the_lowest_loss() -> None:
    settings = settings_of({"lr": (0.01, 0.001), "top_k": (3,), "cooldown": (0, 5)})
    assert list(settings) == [
        "static:0.01:3:0", "static:0.01:3:5", "static:0.001:3:0", "static:0.001:3:5",
    ]  # fmt: skip
    rows = [record(n, w, 0, 3.0 - (n == "static:0.001:3:0")) for n in settings for w in "ab"]
    found = choose(rows, settings)
    assert found["best"] == {"lr": 0.001, "top_k": 3, "cooldown": 0}
    assert found["episodes"] == 2
    assert choose(rows[:-1], settings)["episodes"] == 1, "worlds that not all finished don't count"
    assert choose(rows[:2], settings) is None


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"worlds": ("test/0", "train/0")}, "name worlds of one set"),
        ({"worlds": ("test/99",)}, "choose test/0 to test/23"),
        ({"worlds": ("nope",)}, "choose train, validation or test"),
        ({"seeds": 0}, "one seed"),
        ({"policies": ("noop", "nope")}, "unknown policy 'nope'"),
        ({"policies": ("static",), "preset": "paper"}, "grid_search.py --preset paper"),
    ],
)
def test_mistakes_are_told_before_anything_is_played(
    plan: Plan, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "records.jsonl"
    with pytest.raises(K1Error, match=words) as error:
        evaluate(replace(plan, **change), file)
    assert "\n" not in str(error.value)
    assert not file.exists()


def test_records_of_something_else_are_not_gone_on_with(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    evaluate(plan, file, max_seconds=0.0)
    with pytest.raises(K1Error, match="other settings: name another file"):
        evaluate(replace(plan, config=quick(interval=3)), file)
    head = file.read_text().splitlines()[0]
    file.write_text('{"format": 99}\n')
    with pytest.raises(K1Error, match="no records of this version"):
        evaluate(plan, file)
    for text, why in (
        ("no JSON\n", "cannot be read"),
        ("precious", "no records of this version"),
        (f"{head}\n[1]\n", "a line that is no record"),
        (f'{head}\n{{"policy": "noop"}}\n', "a line that is no record"),
    ):
        file.write_text(text)
        with pytest.raises(K1Error, match=why):
            evaluate(plan, file)
        assert file.read_text() == text
    file.write_text(head[:30])  # a crash cut it off
    evaluate(plan, file, max_seconds=0.0)
    assert file.read_text() == f"{head}\n"


def test_what_comes_from_files_is_read_once_and_known_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    before = evaluation.make_contestant

    def count(policy: str, *arguments: Any, **options: Any) -> Any:
        made.append(policy)
        return before(policy, *arguments, **options)

    monkeypatch.setattr(evaluation, "make_contestant", count)
    plan, file = replace(plan, policies=("noop", "static:0.01:3:0")), tmp_path / "records"
    evaluate(plan, file)
    assert made.count("noop") == 3 and made.count("static:0.01:3:0") == 1
    file.write_text(file.read_text().replace('"made_by":"0.01:3:0"', '"made_by":"0.02:3:0"'))
    with pytest.raises(K1Error, match="episodes of another static:"):
        evaluate(plan, file)


# -- command line --------------------------------------------------------------------------------


def test_the_command_line_compares_and_goes_on(tmp_path: Path) -> None:
    text, records = write_text(tmp_path / "text"), tmp_path / "records.jsonl"
    options = [
        "--worlds", smallest_world(), "--preset", "tiny", "--data", text, "--device", "cpu",
        "--records", records, "--reference", "noop", "--json", tmp_path / "out.json",
    ]  # fmt: skip
    done = call(EVALUATE, *options, "--policies", "noop")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 episodes" in done.stderr
    first = json.loads((tmp_path / "out.json").read_text())
    assert first["policies"]["noop"]["compute"] == pytest.approx(1.0)
    assert any("1 episodes took" in line for line in first["about"])

    (_, row) = records.read_text().splitlines()
    with records.open("a") as file:  # as if it had been played too
        file.write(row.replace('"policy":"noop"', '"policy":"cosine"') + "\n")
    options += ["--markdown", tmp_path / "out.md"]
    again = call(EVALUATE, *options, "--policies", "noop,cosine")
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["records"][0] == first["records"][0]
    assert found["policies"]["noop"] == first["policies"]["noop"]
    assert not any("took" in line for line in found["about"]), "nothing was played"
    assert "minus noop" in again.stdout
    assert "| cosine* | +0.0000 |" in (tmp_path / "out.md").read_text()


def smallest_world() -> str:
    """The test world over the small text that takes the least training."""
    from k1env.instances import instances_over
    from tests.conftest import DOMAINS

    worlds = instances_over(DOMAINS)["test"]
    best = min(worlds, key=lambda w: (w.budget, w.pretrained, sum(w.branching)))
    return best.name


# -- pictures ------------------------------------------------------------------------------------


def test_a_picture_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [record(p, w, 0, 1.0 + i) for i, p in enumerate("ab") for w in ("u", "v")]
    plot(compare_all(rows, "a"), tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(K1Error, match="end the name in one of"):
        check_plot(tmp_path / "curves.nope")


def test_without_matplotlib_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(K1Error, match="viz"):
        check_plot(Path("curves.png"))
