"""Specialists over seeds and nulls: what rows hold, what tables make of them, and the command."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from k1.data import TextData
from k1.errors import ConfigError, K1Error
from k1.experiments.learner import VIEWS, Run
from k1.experiments.methods import METHODS
from k1.experiments.plans import Experiment
from k1.experiments.runner import Conditions
from k1.sampling import TokenStore
from k1.specialisation import summary, trained
from k1.specialisation.agents import Agent, Study
from k1.specialisation.names import NOTHING, Nickname
from k1.specialisation.trained import (
    JOINT,
    SAME,
    SITUATIONS,
    THREE,
    ask,
    has_one_tree,
    hurts_most,
    open_rows,
    read_studies,
    run_studies,
    top_specialists,
)
from tests.phase2_helpers import SPECIALISTS, call, write_text

SHORT = Experiment(
    "short",
    "for tests",
    ("k1-full-path",),
    preset="tiny",
    sections={"model": {"spare": 1.0}, "train": {"eval_windows": 4}},
    steps=2,
    rates=(1e-3, 3e-3),
    seeds=2,
    orders="all",
)


@pytest.fixture
def conditions(data: TextData) -> Conditions:
    return Conditions(data, "builtin", "cpu")


def plain(rows):
    clock = ("seconds", "seconds_trained", "lanes")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


# -- who is a domain's top specialist -------------------------------------------------------------


def agent(name, weight, shares, harm, is_leaf=True):
    nickname = Nickname(NOTHING, (), ())
    by_measure = {"responsibility": shares, "routing": dict.fromkeys(shares, 0.5)}
    weights = {"responsibility": weight, "routing": 0.1}
    return Agent(1, name, is_leaf, nickname, weights, by_measure, harm, "removed")


def test_the_top_specialist_is_the_purest_leaf_that_matters():
    none = {"a": 0.0, "b": 0.0}
    leaves = (
        agent("node", 1.0, {"a": 0.99, "b": 0.01}, none, is_leaf=False),
        agent("idle", 0.04, {"a": 0.98, "b": 0.02}, none),
        agent("pure", 0.06, {"a": 0.95, "b": 0.05}, {"a": 0.4, "b": 0.1}),
        agent("mixed", 0.6, {"a": 0.4, "b": 0.6}, {"a": 0.7, "b": 0.2}),
    )
    tops = top_specialists(Study(("a", "b"), 8, leaves, (1, 2, 3), {}, {}))
    assert [tops[domain]["leaf"] for domain in "ab"] == ["pure", "mixed"]
    assert tops["a"]["share"] == 0.95 and tops["a"]["hurts_own_most"]
    assert tops["b"]["harm"] == {"a": 0.7, "b": 0.2} and not tops["b"]["hurts_own_most"]


def test_a_domain_that_gains_without_a_leaf_is_not_hurt_most():
    assert hurts_most({"a": 0.1, "b": -0.1}, "a") and not hurts_most({"a": 0.1, "b": 0.1}, "a")
    assert not hurts_most({"a": -0.1, "b": -0.2}, "a")


# -- what rows say --------------------------------------------------------------------------------


def made(situation, seed, bits, p=0.001):
    """A row of a system whose every domain has a specialist."""
    tested = {"value": bits, "p": p, "null_mean": 0.0, "null_high": 0.1}
    share = {"value": 0.95, "p": p, "null_mean": 0.4, "null_high": 0.5}
    domains = ("a", "b", "c")
    tops = {
        own: {"share": 0.95, "hurts_own_most": True, "harm": {d: float(d == own) for d in domains}}
        for own in domains
    }
    return {
        "method": "m", "situation": situation, "seed": seed, "view": "windows",
        "order": [situation, str(seed)],
        "information": {key: {"bits": tested, "share": share} for key in summary.ORDERED},
        "accuracy": {"routing": 0.9, "bigrams": 0.98},
        "specialists": tops,
    }  # fmt: skip


def rows_of(seeds=4):
    """Systems that do all that is asked for."""
    return [
        made(situation, seed, bits + 0.01 * (seed % 2))
        for situation, bits in ((THREE, 1.2), (SAME, 0.1), (JOINT, 0.5))
        for seed in range(1, seeds + 1)
    ]


def criterion(rows):
    (line,) = summary.criterion_table(rows).rows
    return line[2:]


def test_specialists_that_do_all_that_is_asked_meet_the_criterion():
    rows = deepcopy(rows_of())
    assert criterion(rows) == ["yes", "yes", "yes", "yes", "3 of 3: a, b, c", "yes"]


@pytest.mark.parametrize(
    ("change", "place"),
    [({"share": 0.89}, 4), ({"hurts_own_most": False}, 4)],
    ids=["impure", "hurts another"],
)
def test_one_top_leaf_that_is_none_fails_the_criterion(change, place):
    rows = deepcopy(rows_of())
    rows[1]["specialists"]["b"].update(change)
    found = criterion(rows)
    assert found == ["yes", "yes", "yes", "yes", "2 of 3: a, c", "no"]
    line = next(r for r in summary.specialist_table(rows).rows if r[1:3] == [THREE, "b"])
    pure, hurt, both = line[4:7]
    assert both == "3 of 4" and sorted([pure, hurt]) == ["3 of 4", "4 of 4"]
    assert line[7:] == ["+1.00 ± 0.00", "+0.00 ± 0.00"]


def test_one_system_that_permuted_labels_equal_fails_the_criterion():
    rows = rows_of()
    rows[2] = made(THREE, 3, 1.21, p=0.02)
    assert criterion(rows)[:2] == ["no", "no"] and criterion(rows)[-1] == "no"
    assert summary.information_table(rows).rows[0][2:4] == ["1.205 ± 0.009", "3 of 4"]


def test_a_null_that_tells_as_much_fails_the_criterion():
    rows = [*rows_of()[:8], *(made(JOINT, seed, 1.2 + 0.5 * (seed % 3)) for seed in range(1, 5))]
    assert criterion(rows)[2:4] == ["yes", "no"] and criterion(rows)[-1] == "no"
    more = [*rows_of()[:8], *(made(JOINT, seed, 3.0 + 0.01 * (seed % 3)) for seed in range(1, 5))]
    assert criterion(more)[3] == "no", "surely less is not more"


def test_differences_pair_seeds_that_both_have():
    rows = [*rows_of(), made(THREE, 9, 77.0), made(SAME, 8, -77.0)]
    gap, p = summary.gaps(rows, "responsibility")["m", SAME]
    assert gap == pytest.approx([1.1] * 4) and p < 1e-6
    assert [line[2] for line in summary.null_table(rows).rows] == ["4", "4"]


def test_seeds_of_one_order_count_once():
    rows = [{**row, "order": ["a" if row["seed"] < 3 else "b"]} for row in rows_of()]
    rows[0]["information"] = made(THREE, 1, 2.2)["information"]
    gap, _ = summary.gaps(rows, "responsibility")["m", SAME]
    assert gap == pytest.approx([(2.2 - 0.11 + 1.1) / 2, 1.1])
    assert [line[2] for line in summary.null_table(rows).rows] == ["2", "2"]
    expected = summary.interval([1.7, 1.205]).show()
    assert summary.information_table(rows).rows[0][2] == expected


def test_what_was_not_measured_is_not_known():
    assert criterion(rows_of()[:8])[2:] == ["yes", "-", "3 of 3: a, b, c", "unknown"]
    assert criterion(rows_of(seeds=1))[2:4] == ["-", "-"], "one seed has no p"
    assert summary.tables([]) == []
    page = summary.markdown(rows_of(), ["told"])
    assert page.startswith("# Specialists\n\n- told\n") and page.count("\n|---|") == 4
    assert page.count("Windows: ") == 4


def test_views_are_not_mixed():
    rows = rows_of()
    other = [{**made(row["situation"], row["seed"], 0.0), "view": "passages"} for row in rows]
    found = [table.rows for table in summary.tables([*rows, *other])]
    assert found[:4] == [table.rows for table in summary.tables(rows)]
    assert found[4][0][2] == "0.000 ± 0.000" and found[7][0][-1] == "no"


def leaf(deleted, merged, responsibility, updates, trust):
    signals = {"responsibility": responsibility, "updates": updates, "trust": trust}
    harm = None if merged is None else {"a": merged - 1, "b": merged + 1}
    return {"deleted": {"a": deleted - 1, "b": deleted + 1}, "merged": harm, "signals": signals}


def test_leaves_to_spare_are_those_that_signals_name():
    spared = [leaf(0.3, 0.1, 3, 5, 0.5), leaf(0.2, 0.5, 1, 5, 0.9), leaf(0.7, 0.9, 4, 5, 0.8)]
    row = {**made(THREE, 1, 1.0), "spared": spared}
    table = summary.sparing_table([row, *rows_of()])
    assert [line[2:] for line in table.rows] == [
        ["responsibility", "+1.000", "+0.200", "+0.500"],
        ["updates", "-", "-", "-"],
        ["trust", "-0.500", "+0.300", "+0.100"],
        ["(any)", "-", "+0.400", "+0.500"],
    ]
    spared[1]["merged"] = None
    found = summary.sparing_table([row]).rows
    assert [line[5] for line in found] == ["-", "-", "+0.100", "+0.500"]
    alone = summary.sparing_table([{**row, "spared": []}]).rows
    assert [line[3:] for line in alone] == [["-", "-", "-"]] * 4
    spared[0]["signals"]["trust"] = None
    assert summary.sparing_table([row]).rows[2][2:] == ["trust", "-1.000", "+0.700", "+0.900"]
    assert summary.tables(rows_of()) == summary.tables(rows_of())[:4], "no row says what is spared"


def test_leaves_that_a_signal_does_not_tell_apart_count_alike():
    """Else it would be a matter of their order in the tree."""
    spared = [leaf(0.9, 0.1, 3, 0, 0.5), leaf(0.1, 0.3, 4, 0, 0.5), leaf(0.3, None, 5, 9, 0.8)]
    found = [
        summary.sparing_table([{**made(THREE, 1, 1.0), "spared": turned}]).rows
        for turned in (spared, spared[::-1], [spared[i] for i in (1, 2, 0)])
    ]
    assert found[0] == found[1] == found[2]
    assert [line[4:] for line in found[0][1:3]] == [["+0.500", "+0.200"]] * 2


def test_orders_count_once_and_systems_without_a_figure_not_at_all():
    values = {1: 0.1, 2: 0.3, 3: 0.8}
    rows = [
        {
            **made(THREE, seed, 1.0),
            "order": ["a" if seed < 3 else "b"],
            "spared": [leaf(x, x, 1, 1, 0.5), leaf(x + 1, None, 2, 1 if seed < 3 else 2, 0.6)],
        }
        for seed, x in values.items()
    ]
    lines = {line[2]: line[4:] for line in summary.sparing_table(rows).rows}
    expected = summary.interval([0.2, 0.8]).show(sign=True)
    assert lines["responsibility"] == [expected, expected]
    assert lines["updates"] == ["+0.800 (1 of 3)", "+0.800 (1 of 3)"]


# -- training and studying ------------------------------------------------------------------------


def test_rows_are_whole_and_resumed_without_a_change(conditions: Conditions, tmp_path: Path):
    whole = ask(SHORT, SITUATIONS, conditions.data)
    rows = run_studies(whole, conditions, open_rows(whole, conditions, None))
    assert [(r["situation"], r["seed"], r["view"]) for r in rows] == [
        (situation, seed, view) for situation in SITUATIONS for seed in (1, 2) for view in VIEWS
    ]
    assert {r["lr"] for r in rows} == {3e-3}
    assert [r["order"] for r in rows[:4:2]] == [
        ["alpha", "beta", "gamma"], ["alpha", "gamma", "beta"],
    ]  # fmt: skip
    assert rows[4]["order"] == ["alpha 1", "alpha 2", "alpha 3"]
    for row in rows:
        assert set(row["specialists"]) == set(row["order"])
        assert row["windows"] == 12 if row["view"] == "windows" else 3 <= row["windows"] <= 24
        assert len(row["agents"]) == 6 and all(map(math.isfinite, row["loss"].values()))
        assert len(row["steps"]) == 3 and all(row["steps"])
        leaves = [agent["name"] for agent in row["agents"] if agent["is_leaf"]]
        if row["view"] == "windows":
            assert [leaf["leaf"] for leaf in row["spared"]] == leaves
        else:
            assert "spared" not in row
    assert len(summary.tables(rows)) == 9

    part = ask(replace(SHORT, seeds=1), (SAME,), conditions.data)
    file = tmp_path / "rows"
    run_studies(part, conditions, open_rows(part, conditions, file))
    text = file.read_text()
    file.write_text(text[: text.rfind("\n", 0, -1)] + '\n{"method": "k1')  # a crash between views
    again = run_studies(whole, conditions, open_rows(whole, conditions, file))
    assert len(file.read_text().splitlines()) == 13
    assert plain(again) == plain(rows)
    before = file.read_bytes()
    assert run_studies(whole, conditions, open_rows(whole, conditions, file)) == again
    assert file.read_bytes() == before
    other = ask(SHORT, SITUATIONS, conditions.data, same="beta")
    with pytest.raises(K1Error, match="other same: name another file"):
        open_rows(other, conditions, file)


def test_each_system_is_asked_what_it_can_spare(conditions: Conditions, monkeypatch):
    asked, calls = ask(replace(SHORT, steps=3), (THREE,), conditions.data), []

    def noted(engine, lane, windows, steps):
        calls.append((lane, sorted(windows), steps))
        return ()

    monkeypatch.setattr(trained, "sparing", noted)
    monkeypatch.setattr(trained, "TRUST_STEPS", 4)
    rows = run_studies(asked, conditions, open_rows(asked, conditions, None))
    steps = min(4, rows[0]["steps"][-1])
    assert calls == [(lane, sorted(conditions.data.domains), steps) for lane in (0, 1)]
    assert [row["spared"] for row in rows if row["view"] == "windows"] == [[], []]
    head = asked.head(conditions)
    assert head["trust"] == {"steps": 4, "height": 0.1}


def test_what_is_out_of_time_leaves_no_row(conditions: Conditions):
    asked, said = ask(SHORT, (THREE,), conditions.data), []
    late = replace(conditions, deadline=-1.0, say=said.append)
    assert run_studies(asked, late, open_rows(asked, late, None)) == []
    assert said == ["k1-full-path, three: out of time"]


def test_a_run_that_diverges_is_named(conditions: Conditions):
    asked = ask(replace(SHORT, rates=(1e30,), seeds=1), (THREE,), conditions.data)
    with pytest.raises(K1Error, match="k1-full-path has diverged with seed 1"):
        run_studies(asked, conditions, open_rows(asked, conditions, None))


def test_of_versions_the_last_is_studied(conditions: Conditions):
    plan = replace(SHORT, methods=("k1-versions",), seeds=1)
    asked = ask(plan, (THREE,), conditions.data)
    row, _ = run_studies(asked, conditions, open_rows(asked, conditions, None))
    assert set(row["specialists"]) == set(conditions.data.domains)


def test_systems_that_are_not_one_tree_are_refused(data: TextData):
    refused = {name for name, method in METHODS.items() if not has_one_tree(method)}
    assert refused == {"separate", "packnet", "progressive", "separate-versions", "mixture"}
    for name in refused:
        with pytest.raises(ConfigError, match=f"{name} has no single tree to study: choose .*k1-"):
            ask(replace(SHORT, methods=(name,)), SITUATIONS, data)
    with pytest.raises(ConfigError, match="no method 'x'"):
        ask(replace(SHORT, methods=("x",)), SITUATIONS, data)
    with pytest.raises(ConfigError, match="no situation 'x': choose from three, same, joint"):
        ask(SHORT, ("x",), data)
    with pytest.raises(ConfigError, match="no domain 'x': choose from alpha"):
        ask(SHORT, SITUATIONS, data, "x")


def test_with_all_domains_at_once_a_new_node_counts_all_of_them(data: TextData):
    """Else interleaved training would be told of domains, and were no null."""
    counted = {}
    for joint in (False, True):
        method = replace(METHODS["k1-own-grow"], joint=joint)
        config = SHORT.config("builtin")
        store = TokenStore(data, config.model.context, "cpu")
        runs = [Run(method.name, data.domains, 1, 1e-3)]
        learner = method.learner(
            method, config, store, data.vocab_size, runs, "cpu", **method.options
        )
        learner.begin(0)
        drawn = learner.mix(runs[0].order)
        assert (len(drawn) == 3) == joint
        learner.train(0, 1, 1)
        learner.begin(1)
        counted[joint] = learner.arena["evidence"][0, learner.grown[0]].sum(0).double()
    assert counted[True].sum() == counted[False].sum()
    apart = (counted[True] - counted[False]).abs().sum() / counted[True].sum()
    assert apart > 0.2


# -- the command ----------------------------------------------------------------------------------


def test_the_command_studies_resumes_and_writes_a_page(tmp_path: Path):
    results, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    text = write_text(tmp_path / "text")
    short = ["--experiment", "ci", "--steps", "2", "--device", "cpu", "--data", text,
             "--methods", "k1-evidence", "--results", results]  # fmt: skip
    first = call(SPECIALISTS, *short, "--seeds", "1", "--situations", "three")
    assert first.returncode == 0, first.stderr
    assert len(results.read_text().splitlines()) == 3
    again = call(
        SPECIALISTS, *short, "--seeds", "2", "--situations", "three,same", "--markdown", page
    )
    assert again.returncode == 0, again.stderr
    assert "k1-evidence, three: 1 runs" in again.stdout
    assert "k1-evidence, same: 2 runs" in again.stdout
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert rows[0]["kind"] == "specialists" and len(rows) == 9
    written = page.read_text()
    assert written.startswith("# Specialists") and "three - same" in written
    assert str(tmp_path) not in written and "4 systems trained as in ci" in written
    refused = call(SPECIALISTS, "--from", results, "--results", tmp_path / "other")
    assert refused.returncode == 2 and "leave results out" in refused.stderr
    told = call(SPECIALISTS, "--from", results, "--markdown", page)
    assert told.returncode == 0, told.stderr
    assert page.read_text().split("\n\n", 2)[2] == written.split("\n\n", 2)[2]
    assert "4 systems trained on cpu, 2 steps" in page.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or ends within a line"),
        ('{"format":1,"kind":"experiment"}\n', "holds records of kind 'experiment', not"),
        ('{"format":1,"kind":"specialists"}\n', "has a head and no records"),
        ('{"format":1,"kind":"specialists"}\n{}\n{"a\n{}\n', r"as records \(its line 3: "),
        ('{"format":1,"kind":"specialists"}\n{"method":"m"}\n', "a line that is no record"),
        (
            '{"format":1,"kind":"specialists"}\n'
            '{"method":"m","situation":"three","seed":1,"view":"windows"}\n',
            "holds studies that lack something",
        ),
    ],
)
def test_what_holds_no_studies_is_not_reported(tmp_path: Path, text: str, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(K1Error, match=message):
        read_studies(path)
