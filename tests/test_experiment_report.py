"""What rows of experiments say: which runs are compared, tables, the page, and how it was made."""

import json
import math
from pathlib import Path

import pytest

from k1.errors import K1Error
from k1.experiments import report
from k1.experiments.methods import METHODS
from k1.experiments.page import (
    Results,
    check_reference,
    check_sweep,
    how_made,
    markdown,
    read_results,
)
from k1.experiments.plans import choose_experiment


def row(method, seed, lr, matrix, **more):
    bits = {view: matrix for view in ("windows", "passages")}
    return {
        "method": method, "order": ["a", "b"], "seed": seed, "lr": lr, "strength": 0.0,
        "bits": bits, "curve": [[0, matrix[1]], [1, matrix[2]]], "steps": [4, 4], "flops": 2.0,
        "parameters": 3, "moved": 0.5, "seconds": 6.0, "lanes": 2, "memory": None, **more,
    }  # fmt: skip


ROWS = [
    *(row("dense", s, 1e-3, [[8, 8], [2, 7], [4 + s, 2]]) for s in (1, 2)),
    *(row("dense", s, 3e-3, [[8, 8], [2, 7], [7, 1.9]]) for s in (1, 2)),
    *(row("calm", s, 1e-3, [[8, 8], [2, 7], [2.1 + s / 10, 2.1]], flops=1.0) for s in (1, 2)),
]


def test_the_best_setting_has_the_least_mean_at_the_end():
    assert report.best_settings(ROWS) == {"dense": (1e-3, 0.0), "calm": (1e-3, 0.0)}
    diverged = [row("dense", 1, 1.0, [[8, 8], [2, 7], [None, 0.1]]), *ROWS]
    assert report.best_settings(diverged)["dense"] == (1e-3, 0.0)


def test_tables_say_who_forgets_and_at_what_price():
    main = {line[0]: line for line in report.main_table(ROWS, "windows").rows}
    assert main["dense"][1:3] == ["0.001", "2"] and main["dense"][5].startswith("3.500")
    who = {line[0]: line for line in report.domain_table(ROWS, "windows").rows}
    assert who["dense"][1] == "2.000 -> 5.500 (+175.0 %)"
    cost = {line[0]: line for line in report.cost_table(ROWS, "dense").rows}
    assert cost["calm"] == ["calm", "4 4", "0.50", "1.00", "50.0%", "3.0", "-"]
    counted = [{**line, "memory": 3 * 2**31} for line in ROWS]
    assert {line[-1] for line in report.cost_table(counted, "dense").rows} == {"3,072"}
    line = {r[0]: r for r in report.frontier_table(ROWS, "dense", "windows").rows}
    assert line["dense"][1:4] == ["2", "2", "+0.0 %"]
    read = [float(cell) for cell in line["dense"][4:]]
    assert read == pytest.approx([250.0, 221.5, 178.75, 175.0], abs=0.051)
    assert line["calm"][1:6] == ["1", "2", "+10.5 %", "-", "-"]
    tests = {r[0]: r for r in report.test_table(ROWS, "dense", "windows").rows}
    assert list(tests) == ["calm"]
    assert tests["calm"][3].startswith("+0.100") and tests["calm"][5].startswith("-162.5")


def test_frontiers_compare_the_same_orders_and_seeds():
    # The second seed is harder for all; a method that only had the first is not better for it.
    rows = [
        *(row("dense", s, 1e-3, [[8, 8], [2, 7], [4, 1.0 + s]]) for s in (1, 2)),
        row("same", 1, 1e-3, [[8, 8], [2, 7], [3, 2.0]]),
        row("elsewhere", 9, 1e-3, [[8, 8], [2, 7], [3, 0.1]]),
    ]
    line = {r[0]: r for r in report.frontier_table(rows, "dense", "windows").rows}
    assert line["same"][1:5] == ["1", "1", "+0.0 %", "50.0"]
    assert "elsewhere" not in line


def test_the_first_table_has_what_matters_most():
    first = report.tables(ROWS, "dense")[0]
    lines = {line[0]: line for line in first.rows}
    assert lines["dense"][4] == "+0.0 ± 0.0"
    assert lines["calm"][1] == "2" and lines["calm"][4].startswith("+5.0")
    assert lines["calm"][5] == "+0.0 ± 0.0" and lines["calm"][7:] == ["1.00", "50%", "0.50"]


HEAD = {
    "kind": "experiment", "pool": "validation", "device": "cpu",
    "settings": json.loads(json.dumps(choose_experiment("ci", steps=7).settings())),
}  # fmt: skip


def test_the_page_has_every_table_and_how_it_was_made():
    results = Results(HEAD, [{**line, "made_on": "Some CPU"} for line in ROWS])
    text = markdown(results, "dense", METHODS)
    assert text.count("| method |") == len(report.tables(ROWS, "dense")) + 1 == 11
    assert "6 runs on the **validation** pool" in text and "Some CPU; 18 s in all" in text
    assert (
        "`python scripts/experiment.py ci --data DIR --device cpu --seeds 2 --orders 1 --steps 7 "
        "--rates 0.001,0.003 --methods dense,calm --results FILE`" in text
    )
    assert report.tables([], "dense") == []
    assert len(report.tables(ROWS[-2:], "dense")) == 4  # without runs of the reference
    test = Results({**HEAD, "pool": "test"}, ROWS[-2:])
    swept = markdown(test, "dense", METHODS, sweep=results)
    assert "--test --tuned SWEEP.jsonl" in swept and "Where the settings were chosen" in swept
    assert swept.count("| method |") == 4 + 2 + 1  # frontiers of the sweep
    assert markdown(Results(HEAD, []), "dense", {}).startswith("# Results")


@pytest.mark.parametrize(
    ("orders", "told"),
    [
        (("prose,code,science", "prose,science,code"), None),
        (("prose,code,science", "prose,code,science"), " --orders 1 "),
        (("science,code,prose", "code,prose,science"), " --orders 6,3 "),
    ],
)
def test_the_command_names_the_orders_that_rows_have(orders, told):
    rows = [
        {**ROWS[seed - 1], "seed": seed, "order": order.split(",")}
        for seed, order in enumerate(orders, 1)
    ]
    text = markdown(Results(HEAD, rows), "dense", METHODS)
    assert told in text if told else "--orders" not in text


# -- which runs are compared ---------------------------------------------------------------------


def test_runs_of_the_same_order_are_no_independent_samples():
    orders = (["a", "b"], ["b", "a"], ["a", "b"], ["a", "b"])
    runs = [{**ROWS[0], "order": order, "seed": seed} for seed, order in enumerate(orders)]
    assert report.by_order(runs, [1.0, 8.0, 2.0, 3.0]) == [2.0, 8.0]
    assert report.by_order(runs[2:], [2.0, 3.0]) == [2.0, 3.0]  # seeds are all that differs
    harms = (3.0, 9.0, 4.0, 5.0)
    rows = [
        row("dense", seed, 1e-3, [[8, 8], [2, 7], [harm, 2]], order=order)
        for seed, (order, harm) in enumerate(zip(orders, harms, strict=True))
    ]
    assert report.spread(rows, "forgetting %", "windows").mean == (100 + 350) / 2
    better = [
        {**line, "method": "calm", "bits": {v: [[8, 8], [2, 7], [2, 2]] for v in line["bits"]}}
        for line in rows
    ]
    (line,) = report.test_table([*rows, *better], "dense", "windows").rows
    gaps = [-100.0, -350.0]
    assert line[5] == report.interval(gaps).show(1, sign=True)
    assert float(line[6]) == pytest.approx(report.paired_p(gaps, [0.0, 0.0]), rel=0.1)


def test_settings_are_compared_over_runs_that_all_of_them_have():
    low, high = [[8, 8], [2, 7], [2, 2]], [[8, 8], [2, 7], [6, 6]]
    rows = [
        row("m", 1, 1e-3, low), row("m", 2, 1e-3, high),  # the second seed is hard for everyone
        row("m", 1, 3e-3, [[8, 8], [2, 7], [3, 3]]),
    ]  # fmt: skip
    assert report.best_settings(rows) == {"m": (1e-3, 0.0)}
    apart = [row("m", 1, 1e-3, high), row("m", 2, 3e-3, low)]
    assert report.best_settings(apart) == {"m": (3e-3, 0.0)}


def test_a_reference_that_diverged_at_one_setting_is_read_at_another():
    diverged = row("dense", 1, 1.0, [[8, 8], [2, 7], [None, None]])
    line = {r[0]: r for r in report.frontier_table([diverged, *ROWS], "dense", "windows").rows}
    assert line["dense"][1:4] == ["2", "2", "+0.0 %"] and line["calm"][3] == "+10.5 %"
    assert math.isfinite(float(line["dense"][4]))


def test_a_domain_that_came_last_has_had_nothing_to_forget_it():
    rows = [
        row("dense", 1, 1e-3, [[8, 8], [2, 7], [4, 2]]),
        row("dense", 2, 1e-3, [[8, 8], [2, 7], [6, 1]], order=["b", "a"]),
        row("same", 1, 1e-3, [[8, 8], [2, 7], [2, 2]]),
    ]
    lines = {line[0]: line for line in report.domain_table(rows, "windows").rows}
    assert lines["dense"][1:] == ["2.000 -> 4.000 (+100.0 %)", "2.000 -> 6.000 (+200.0 %)"]
    assert lines["same"][1:] == ["2.000 -> 2.000 (+0.0 %)", "-"]


# -- results that there are ----------------------------------------------------------------------


def written(path: Path, rows, **head) -> Path:
    lines = [{"format": 1, "data": "x", **HEAD, **head}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_results_are_read_and_left_as_they_are(tmp_path: Path):
    path = written(tmp_path / "rows", ROWS)
    before = path.read_bytes()
    found = read_results(path)
    assert found.rows == ROWS and found.head["pool"] == "validation"
    assert [r["method"] for r in read_results(path, ("calm",)).rows] == ["calm", "calm"]
    path.write_bytes(before[:-9])
    with pytest.raises(K1Error, match="ends within a line: let the command that writes it finish"):
        read_results(path)
    assert path.read_bytes() == before[:-9]


@pytest.mark.parametrize(
    ("rows", "head", "reason"),
    [
        ([{"method": "m"}], {}, "a line that is no record"),
        ([{k: v for k, v in ROWS[0].items() if k != "bits"}], {}, "no results of an experiment"),
        (ROWS, {"kind": "other"}, "holds records of kind 'other', not 'experiment'"),
        ([], {}, "has a head and no records"),
        (ROWS, {"format": 7}, "no records of this version"),
    ],
)
def test_other_files_are_no_results(tmp_path: Path, rows, head, reason):
    with pytest.raises(K1Error, match=reason):
        read_results(written(tmp_path / "rows", rows, **head))


def test_what_is_not_there_is_not_left_out_in_silence(tmp_path: Path):
    path = written(tmp_path / "rows", ROWS)
    with pytest.raises(K1Error, match="no runs of clam: choose from calm, dense"):
        read_results(path, ("calm", "clam"))
    check_reference(read_results(path), "calm")
    with pytest.raises(K1Error, match="no runs of the reference dense: choose from calm"):
        check_reference(read_results(path, ("calm",)), "dense")
    (tmp_path / "empty").touch()
    with pytest.raises(K1Error, match="empty or ends within a line"):
        read_results(tmp_path / "empty")


def test_a_sweep_is_of_the_same_experiment_and_on_validation(tmp_path: Path):
    results = read_results(written(tmp_path / "test", ROWS[:1], pool="test"))
    names = [row["method"] for row in results.rows]
    check_sweep(read_results(written(tmp_path / "rows", ROWS)), results.head, names)
    with pytest.raises(K1Error, match="measured on test: settings are chosen on validation"):
        check_sweep(results, results.head, names)
    with pytest.raises(K1Error, match="the sweep has no runs of dense"):
        check_sweep(read_results(written(tmp_path / "c", ROWS[-1:])), results.head, names)
    with pytest.raises(K1Error, match="other data"):
        check_sweep(read_results(written(tmp_path / "a", ROWS, data="y")), results.head, names)
    other = {**HEAD["settings"], "steps": 9}
    with pytest.raises(K1Error, match="other settings"):
        check_sweep(
            read_results(written(tmp_path / "b", ROWS, settings=other)), results.head, names
        )


def test_a_page_tells_which_settings_are_not_those_of_the_sweep():
    sweep = Results(HEAD, ROWS)
    elsewhere = [row("dense", 1, 7e-3, [[8, 8], [2, 7], [4, 2]]), *ROWS[-2:]]
    page = markdown(Results({**HEAD, "pool": "test"}, elsewhere), "dense", METHODS, sweep)
    assert "- Not at their best settings there: dense." in page
    assert "Not at their best" not in markdown(sweep, "dense", METHODS, sweep)


def test_rows_of_an_experiment_are_told_by_its_name():
    settings = json.loads(json.dumps(choose_experiment("ablations").settings()))
    rows = [{**ROWS[0], "method": "vary-random"}]
    told = how_made(Results({**HEAD, "settings": settings}, rows))[1]
    assert told.startswith("`python scripts/experiment.py ablations ")
    assert "main" in how_made(Results({**HEAD, "settings": settings}, ROWS[:1]))[1]
