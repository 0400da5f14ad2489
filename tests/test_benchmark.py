"""The benchmark: its statistics, its bookkeeping, its page, and its command line."""

from __future__ import annotations

import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k1.bench import suite as suite_module
from k1.bench.attribution import agreement, wilson_interval
from k1.bench.configurations import CONFIGURATIONS, block_count, configuration
from k1.bench.drivers import Driver, build_driver, variant_config
from k1.bench.report import COLUMNS, beside_forward_ms, growth, markdown, read_results
from k1.bench.suite import Plan, Suite, formula_flops, parameters
from k1.bench.timing import TooSlowError, at_most, interleave, quartile_range
from k1.bench.variants import VARIANTS, choose
from k1.errors import ConfigError
from tests.phase2_helpers import ROOT, call
from tests.reference import small_config

BENCHMARK = ROOT / "scripts" / "benchmark.py"
CPU = torch.device("cpu")


# -- statistics ---------------------------------------------------------------------------------


def test_quartile_range():
    assert quartile_range([5.0]) == 0
    assert quartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2
    assert quartile_range([4.0, 1.0, 3.0, 2.0]) == 1.5


def test_wilson_interval():
    # Values of the published formula, computed apart.
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson_interval(15, 15) == pytest.approx((0.79612, 1.0), abs=1e-5)
    assert wilson_interval(0, 15) == pytest.approx((0.0, 0.20388), abs=1e-5)


class Sleeper(Driver):
    """Notes when it runs."""

    def __init__(self, name: str, seconds: float = 0.0, log: list[str] | None = None) -> None:
        self.name, self.seconds = name, seconds
        self.log = [] if log is None else log

    def advance(self, steps: int) -> None:
        self.log.append(self.name)
        time.sleep(self.seconds * steps)


def test_variants_take_turns_and_each_round_begins_with_another():
    log: list[str] = []
    drivers: dict[str, Driver] = {name: Sleeper(name, 0.002, log) for name in "abc"}
    for number, times in enumerate(interleave(drivers, dict.fromkeys("abc", 2), 4, CPU), 1):
        assert len(log) == 3 * number
        assert all(len(values) == number and min(values) >= 2 for values in times.values())
    assert "".join(log) == "abcbcacababc"


def test_what_takes_too_long_is_stopped():
    with pytest.raises(TooSlowError, match=r"sleeping took more than 0\.05 s"), \
            at_most(0.05, "sleeping"):  # fmt: skip
        try:
            time.sleep(5)
        except Exception as error:  # as a compiler would
            raise RuntimeError("wrapped") from error
    with pytest.raises(KeyError), at_most(5, "a mistake"):
        raise KeyError
    time.sleep(0.06)  # and no alarm is left over


# -- configurations and variants ----------------------------------------------------------------


def test_configurations_have_the_sizes_that_their_names_say():
    vocab = 10_000
    assert 1e8 <= parameters(CONFIGURATIONS["100M"], vocab) <= 1.3e8
    assert 0.9e9 <= parameters(CONFIGURATIONS["1B"], vocab) <= 1.1e9
    assert block_count(CONFIGURATIONS["thousand"]) == 1000
    assert block_count(CONFIGURATIONS["default"]) == 41
    for name in ("default", "thousand", "100M", "1B", "T128", "T256", "T512"):
        config = CONFIGURATIONS[name]
        assert config.train.batch * config.model.context == 256 * 64
        assert config.train.precision == "bfloat16"
    assert CONFIGURATIONS["T512"].model.context == 512
    assert configuration("default", "cpu").train.precision == "float32"
    assert configuration("default", "cuda", "mean").model.router == "mean"


@pytest.mark.parametrize(
    "wrong", [lambda: configuration("huge", "cpu"), lambda: choose("sparse,magic", "cpu"),
              lambda: choose("dense-graph", "cpu"), lambda: configuration("tiny", "cpu", "magic")]
)  # fmt: skip
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_a_cpu_gets_the_variants_that_mean_something_there():
    names = [variant.name for variant in choose(None, "cpu")]
    assert {"stock-eager", "stock-compiled", "stock-toggle", "dense", "exact", "sparse"} <= {*names}
    assert "dense-graph" not in names
    assert not any(variant.graph or variant.fused for variant in choose(None, "cpu"))
    assert [v.name for v in choose(None, "cuda")] == list(VARIANTS)
    assert VARIANTS["sparse"].graph and VARIANTS["sparse"].fused


def test_the_formula_knows_what_each_variant_saves():
    config = CONFIGURATIONS["default"]
    names = ("dense", "stock-toggle", "sparse", "path-only", "frozen-forward")
    flops = {name: formula_flops(config, 10_000, VARIANTS[name]) for name in names}
    assert flops["dense"] > flops["stock-toggle"] > flops["sparse"] > flops["path-only"]
    assert flops["path-only"] > flops["frozen-forward"]
    assert formula_flops(config, 10_000, VARIANTS["sparse-inner-2"]) > flops["sparse"]


def test_a_variant_gets_the_engine_that_it_asks_for(data):
    config = small_config()
    variant = VARIANTS["sparse-inner-2"].on("cpu")
    driver = build_driver(config, data, CPU, variant)
    assert driver.engine.arena.config == variant_config(config, variant)
    assert driver.engine.arena.config.update.inner_steps == 2
    assert driver.engine.graphs is None and driver.backend.reason.startswith("PyTorch")
    captured = build_driver(config, data, CPU, replace(variant, graph=True))
    assert captured.engine.graphs is not None
    assert build_driver(config, data, CPU, VARIANTS["stock-eager"]).backend is None


# -- a configuration ----------------------------------------------------------------------------


@pytest.fixture
def crowded(monkeypatch, data):
    """A suite where drivers of total size 3 fit; a variant's `inner_steps` is its size."""
    alive: weakref.WeakSet[Driver] = weakref.WeakSet()
    sizes: weakref.WeakKeyDictionary[Driver, int] = weakref.WeakKeyDictionary()

    def build(config, text, device, variant):
        if sum(sizes[driver] for driver in alive) + variant.inner_steps > 3:
            raise torch.OutOfMemoryError("full")
        driver = Sleeper(variant.name, 0.0005)
        alive.add(driver)
        sizes[driver] = variant.inner_steps
        return driver

    monkeypatch.setattr(suite_module, "build_driver", build)
    monkeypatch.setattr(suite_module, "formula_flops", lambda *sizes: 1e6)
    said: list[str] = []
    plan = Plan(CPU, 1e9, rounds=2, seconds=0.01, say=said.append)
    return Suite(small_config(), data, plan), alive


def sized(name: str, size: int):
    return replace(VARIANTS["dense"], name=name, inner_steps=size)


def test_what_does_not_fit_together_is_measured_in_further_rounds(crowded):
    suite, alive = crowded
    variants = [sized("a", 1), sized("b", 1), sized("c", 2), sized("d", 3), sized("e", 4),
                sized("sparse", 1)]  # fmt: skip
    records = suite.run(variants)
    assert list(records) == ["a", "b", "c", "d", "e", "sparse"]
    states = {name: record["status"] for name, record in records.items()}
    assert states == {**dict.fromkeys(["a", "b", "c", "d", "sparse"], "ok"), "e": "out of memory"}
    with_ratio = {name for name, record in records.items() if record.get("ratio") is not None}
    assert with_ratio == {"a", "b", "c", "sparse"}  # d leaves no room for the reference
    assert records["sparse"]["ratio"] == 1
    assert len(alive) == 0, "dropped variants must not hold their memory"


def test_a_variant_that_fails_is_reported_beside_the_others(crowded, monkeypatch):
    suite, _ = crowded

    def fail(self, steps):
        if self.name == "bad":
            raise ValueError("broken\nsecond line")

    monkeypatch.setattr(Sleeper, "advance", fail)
    records = suite.run([sized("bad", 1), sized("sparse", 1)])
    assert records["bad"]["status"] == "failed"
    assert records["bad"]["reason"] == "ValueError: broken"
    assert records["sparse"]["status"] == "ok"


def test_whoever_keeps_the_records_sees_every_variant_and_round(crowded):
    suite, _ = crowded
    seen: list[dict] = []
    variants = [sized("sparse", 1), sized("b", 1)]
    records = suite.run(variants, lambda now: seen.append(json.loads(json.dumps(now))))
    assert seen[-1] == records
    states = [{name: record["status"] for name, record in now.items()} for now in seen]
    assert states[0] == dict.fromkeys(("sparse", "b"), "unfinished")
    ready = next(i for i, now in enumerate(seen) if "first_ms" in now["sparse"])
    assert "first_ms" not in seen[ready]["b"] and states[ready]["sparse"] == "unfinished"
    rounds = [len(now["b"].get("rounds_ms", [])) for now in seen]
    assert rounds == sorted(rounds) and {*rounds} == {0, 1, 2}


def test_what_is_compiled_comes_last_with_the_reference_again(crowded):
    suite, _ = crowded
    slow = replace(sized("slow", 1), compiled="default")
    seen: list[dict] = []
    records = suite.run(
        [slow, sized("sparse", 1), sized("b", 1)],
        lambda now: seen.append({name: record["status"] for name, record in now.items()}),
    )
    assert {"slow": "unfinished", "sparse": "ok", "b": "ok"} in seen
    assert list(records) == ["slow", "sparse", "b"]
    assert all(record["status"] == "ok" and record["ratio"] for record in records.values())


# -- attribution --------------------------------------------------------------------------------


def test_a_probe_of_the_whole_batch_always_agrees(data):
    config = small_config(update={"probe_fraction": 1.0}, train={"lr": 1e-2})
    found = agreement(config, data, CPU, 10, 6)
    assert found["same_leaf"] == found["same_branch"] == 1
    assert found["same_leaf_interval"] == wilson_interval(6, 6)
    assert found["probe_windows"] == found["windows"] == 4


def test_a_probe_that_sees_less_may_disagree(data):
    config = small_config(update={"probe_fraction": 0.1}, train={"batch": 8})
    found = agreement(config, data, CPU, 2, 20)
    assert found["probe_windows"] == 1
    assert found["same_leaf"] < 1 and found["same_leaf"] <= found["same_branch"]


# -- the page -----------------------------------------------------------------------------------


def record(ms: float, **fields):
    return {
        "status": "ok", "median_ms": ms, "iqr_ms": 0.5, "rounds_ms": [ms], "steps_per_round": 4,
        "ratio": ms / 2, "build_seconds": 1.0, "peak_bytes": ms * 1e9, "kernels": 12.0,
        "flops_counted": 3e9, "flops_formula": 2e9, "floor_share": 0.25, "about": "a step",
        "backend": "kernels, of course", "first_ms": ms,
        **fields,
    }  # fmt: skip


def recorded(scale: float = 1.0) -> dict:
    variants = {
        "stock-eager": record(30 * scale), "stock-compiled": record(10 * scale),
        "stock-toggle": record(1 * scale), "dense": record(8 * scale),
        "dense-graph": {"status": "out of memory", "about": "a graph", "flops_counted": None,
                        "flops_formula": 2e9},
        "sparse": record(2 * scale),
    }  # fmt: skip
    config = configuration("default", "cuda").to_dict()
    found = {
        "train_steps": 9, "batches": 20, "probe_windows": 2, "windows": 16,
        "same_leaf": 0.95, "same_leaf_interval": [0.76, 0.99],
        "same_branch": 1.0, "same_branch_interval": [0.84, 1.0],
        "commonest_leaf": 0.5, "distinct_leaves": 4,
    }  # fmt: skip
    return {"config": config, "blocks": 41, "parameters": 5_000_000, "text": "some",
            "variants": variants, "attribution_overhead": 0.125, "agreement": found}  # fmt: skip


def with_kernels(case: dict, step: dict, frozen: dict, name: str = "sparse") -> dict:
    case["variants"][name]["kernel_ms"] = step
    case["variants"]["frozen-forward"] = record(0.9, kernel_ms=frozen)
    return case


def result(**cases) -> dict:
    return {"command": "python scripts/benchmark.py --rounds 7", "rounds": 7, "complete": True,
            "versions": {"torch": "9.9", "cuda": None},
            "device": {"type": "cuda", "name": "Some GPU", "matmul_flops": 7e14},
            "configurations": cases}  # fmt: skip


def test_the_page_says_what_was_recorded():
    page = markdown([result(default=recorded())])
    assert "```bash\npython scripts/benchmark.py --rounds 7\n```" in page
    assert "## Some GPU" in page and "torch 9.9" in page and "cuda None" not in page
    assert "| sparse | 2 | 0.5 | 1.00 | 1.0 | 2.00 | 12 | 3 | 2 | 25.0 |" in page
    assert "| dense-graph | out of memory | - | - | - | - | - | - | 2 | - |" in page
    assert ("`sparse` is 5.00x as fast as the best dense step in ordinary modules "
            "(`stock-compiled`), with 0.20x its peak memory.") in page  # fmt: skip
    assert "`sparse` is 4.00x as fast as K-1's best dense step (`dense`), with 0.25x" in page
    assert "Attribution takes 12.5 % of the `sparse` step." in page
    assert "`dense`, `sparse`: kernels, of course." in page
    assert "95.0 % of 20 batches (95 % interval 76.0-99.0 %)" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {len(COLUMNS) + 1}


def test_the_page_of_a_run_that_was_stopped_says_so():
    case = recorded()
    case["variants"]["exact"] = {"status": "unfinished", "about": "a step"}
    case["variants"]["path-only"] = {"status": "unfinished", "about": "a step", "first_ms": 7.0}
    page = markdown([{**result(default=case), "complete": False}])
    assert "stopped before its end" in page
    assert "stopped before its end" not in markdown([result(default=recorded())])
    assert "| exact | unfinished | -" in page
    assert "`path-only`: unfinished; a step took some 7 ms at first." in page
    assert "`exact`: unfinished;" not in page


FROZEN = {"_forward": 0.7, "_fold": 0.02, "_mix_frozen": 0.1, "hash": 0.01}
SPARSE = {"_forward": 0.8, "_fold": 0.03, "_mix_frozen": 0.5, "_products": 0.3, "adamw": 0.07}


def test_what_a_step_takes_beside_the_forward_pass():
    def beside(step, frozen):
        return beside_forward_ms(with_kernels(recorded(), step, frozen)["variants"], "sparse")

    # Its own kernels, and what more the blocks' take; not what more waits beside the blocks.
    assert beside(SPARSE, FROZEN) == pytest.approx(0.3 + 0.07 + 0.1 + 0.01)
    assert beside(SPARSE, None) is None and beside(None, FROZEN) is None
    assert beside({"gemm": 3.0, "adamw": 0.1}, {"gemm": 1.0}) is None
    assert beside_forward_ms(recorded()["variants"], "sparse") is None
    assert beside_forward_ms(recorded()["variants"], "path-only") is None
    page = markdown([result(default=with_kernels(recorded(), SPARSE, FROZEN))])
    assert "- Kernels of `sparse` beside the frozen forward pass: 0.48 ms." in page
    assert "Kernels of `path-only`" not in page


def test_growth_needs_both_sizes():
    small = with_kernels(recorded(), SPARSE, FROZEN)
    assert growth(result(default=small)) == []
    many = {name: 20 * ms for name, ms in FROZEN.items()}
    step = {**SPARSE, "_forward": 14.15, "_fold": 0.41, "_mix_frozen": 3.0, "_products": 0.49}
    large = {**with_kernels(recorded(1.5), step, many), "blocks": 1000}
    large["variants"]["frozen-forward"]["median_ms"] = 18.0
    forward = "From 41 to 1,000 blocks, the frozen forward pass takes 20.0x."
    assert growth(result(default=small, thousand=large)) == [
        "From 41 to 1,000 blocks, the time of kernels of `sparse` beside the frozen forward pass "
        "grows +50.0 %, from 0.48 to 0.72 ms.",
        forward,
    ]


def test_files_from_before_kernels_were_timed_say_nothing_of_them(tmp_path):
    cases = {"default": recorded(), "thousand": {**recorded(1.5), "blocks": 1000}}
    for case in cases.values():
        case["variants"]["frozen-forward"] = record(0.9)
        case["backward_ms"] = {"sparse": 1.1, "path-only": None}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(result(**cases)))
    page = markdown([read_results(old)])
    assert "| frozen-forward | 0.9 |" in page and "`sparse` beside" not in page
    assert "time of kernels" not in page.partition("### Growth")[2]


# -- the command line ---------------------------------------------------------------------------


def test_the_command_line_measures_and_writes(tmp_path: Path):
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    names = "stock-eager,sparse,path-only,frozen-forward"
    done = call(
        BENCHMARK, "--device", "cpu", "--configs", "tiny", "--rounds", "2", "--seconds", "0.2",
        "--router", "learned", "--agreement", "2", "--agreement-batches", "2", "--threads", "1",
        "--variants", names, "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sparse" in done.stdout and "round 1" not in done.stdout
    assert "  frozen-forward: ready in" in done.stderr and "  round 2 of 2: " in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    found = json.loads(out.read_text())
    assert found["complete"]
    assert "--rounds 2" in found["command"] and found["command"].startswith("python scripts/bench")
    assert found["device"]["type"] == "cpu" and found["device"]["threads"] == 1
    assert found["device"]["matmul_flops"] > 1e8
    assert found["versions"]["torch"] == torch.__version__
    case = found["configurations"]["tiny"]
    assert case["blocks"] == 7 and case["config"]["model"]["router"] == "learned"
    assert list(case["variants"]) == names.split(",")
    for name, measured in case["variants"].items():
        assert measured["status"] == "ok", (name, measured)
        assert len(measured["rounds_ms"]) == 2 and measured["median_ms"] > 0
        assert measured["steps_per_round"] % 4 == 0
        assert measured["peak_bytes"] is None and measured["kernels"] is None
        assert measured["ratio"] == pytest.approx(
            measured["median_ms"] / case["variants"]["sparse"]["median_ms"]
        )
        # The counter takes attention in full, the formula only its causal half; and the formula
        # lets path blocks run twice, which a CPU spares.
        assert 0.75 <= measured["flops_counted"] / measured["flops_formula"] < 1.6, name
    assert case["agreement"]["batches"] == 2
    assert "beside the frozen forward pass" not in done.stdout  # no kernels

    again = call(BENCHMARK, "--from", str(out), "--markdown", str(page))
    assert again.returncode == 0, again.stderr
    # Whose folder the file lay in is nobody's business.
    command = found["command"].replace(str(out), "FILE")
    assert "`frozen-forward`" in page.read_text() and command in page.read_text()
    assert str(out) not in page.read_text()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--configs", "huge", "--device", "cpu"], "choose from tiny"),
        (["--from", "nothing.json"], "--json"),
    ],
)
def test_mistakes_are_told(words, remedy):
    done = call(BENCHMARK, *words)
    assert done.returncode == 2 and remedy in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_and_graphs_on_a_gpu(monkeypatch, data):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda")
    model = {"embed": 64, "feed_forward": 128, "heads": 4, "context": 16}
    config = small_config(model=model, train={"precision": "bfloat16"})
    plan = Plan(device, 1e12, rounds=2, seconds=0.2)
    names = "dense,dense-graph,sparse-eager,sparse,sparse-inner-2,path-only,frozen-forward"
    records = Suite(config, data, plan).run(choose(names, "cuda"))
    for name, found in records.items():
        assert found["status"] == "ok", (name, found)
        fused = VARIANTS[name].fused
        assert found["backend"].startswith("fused kernels" if fused else "PyTorch"), name
    kernels = {name: found["kernels"] for name, found in records.items()}
    assert 0 < kernels["frozen-forward"] < kernels["path-only"] < kernels["sparse"]
    assert kernels["sparse"] < kernels["sparse-eager"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own imports and choices
def test_a_gpu_tells_kernels_and_memory(data):
    device = torch.device("cuda")
    config = small_config(train={"precision": "bfloat16"})
    plan = Plan(device, 1e12, rounds=2, seconds=0.2)
    names = "stock-eager,stock-autocast,stock-compiled,stock-regional,stock-graphs,dense"
    for name, found in Suite(config, data, plan).run(choose(names, "cuda")).items():
        assert found["status"] == "ok", (name, found)
        assert found["kernels"] > 10 and found["peak_bytes"] > 0 and found["flops_counted"] > 0
