"""What has to hold on a CUDA device too. Run with `pytest -m gpu`."""

import pytest
import torch

from k1 import edits
from k1.engine import Engine
from k1.experiments.runner import measure_memory_anew, peak_memory
from k1.experiments.stream import views
from k1.forward import read_text
from k1.trainer import Trainer
from tests.experiment_helpers import Build, go

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_the_same_seed_gives_the_same_state(make, mode):
    hashes = set()
    for _ in range(2):
        trainer = Trainer(make(update={"mode": mode}).config, make().data, seed=3, device="cuda")
        trainer.train(20)
        hashes.add(trainer.state_hash())
    assert len(hashes) == 1


def test_cuda_computes_what_the_cpu_computes(make, data):
    trainer = make()
    trainer.train(5)
    other = Trainer(trainer.config, trainer.data, seed=3, device="cuda")
    other.arena.write_lane(0, trainer.arena.read_lane(0))
    tokens = data.tokens(data.domains[0], "train")[:16].long()[None]
    torch.testing.assert_close(
        other.logits(tokens).cpu(), trainer.logits(tokens), rtol=1e-3, atol=1e-3
    )


def test_a_lane_from_elsewhere_needs_no_room_of_its_own(make, data):
    kept = make(model={"embed": 128, "feed_forward": 512}).arena.read_lane(0)
    trainer = Trainer(make(model={"embed": 128, "feed_forward": 512}).config, data, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.arena.write_lane(0, kept)
    size = sum(t.numel() * t.element_size() for t in kept.tensors.values())
    assert torch.cuda.max_memory_allocated() - before < 0.1 * size


def test_a_path_gradient_is_the_full_gradient_of_the_leaf(make):
    trainer = Trainer(make().config, make().data, seed=3, device="cuda")
    engine, arena = trainer.engine, trainer.arena
    trainer.train(3)
    batch = trainer.store.sample("train", arena["data_seed"], arena["data_cursor"], arena["mix"], 4)
    text = read_text(batch, trainer.config)
    _, full, _, _ = engine.gradients(0, 1, batch, text)
    selection = engine._select(0, 1, arena["responsibility"])
    done = engine.path_pass(0, 1, batch, text, selection)
    leaf = int(selection.culprits[0, 0])
    level = trainer.tree.blocks[leaf].level
    found = done.gradients().by_row[done.row.tolist().index(leaf)]
    expected = full[level][0, leaf - trainer.tree.offset[level]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


FUSED = {
    "model": {"embed": 64, "feed_forward": 64, "heads": 2, "context": 16},
    "train": {"precision": "bfloat16", "cooldown": 3},
}


def engine_of(make, graph=None, fused=None, lanes=1, **sections):
    trainer = make(**FUSED).config.replace(**sections)
    other = Trainer(trainer, make().data, seed=3, device="cuda", lanes=lanes)
    for lane in range(1, lanes):
        other.arena.reset_lane(lane, lane)
    return Engine(other.arena, other.store, fused=fused, graph=graph)


@pytest.mark.parametrize("router", ["mean", "learned", "evidence"])
@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_a_graph_makes_the_same_bits_as_single_launches(make, router, mode):
    sections = {"model": {"router": router}, "update": {"mode": mode}}
    hashes = set()
    for graph in (False, True):
        engine = engine_of(make, graph=graph, lanes=2, **sections)
        assert engine.backend.fused
        engine.train(0, 2, 12)
        assert int(engine.arena["skipped"].sum()) == 0
        hashes.add(engine.arena.hash_lane(0) + engine.arena.hash_lane(1))
    assert len(hashes) == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_a_frozen_shared_part_can_be_recorded(make, mode, fused):
    update = {"mode": mode, "shared_scale": 0.0}
    engine = engine_of(make, graph=True, fused=fused, update=update)
    before = engine.arena["shared"][0].clone()
    engine.train(0, 1, 12)
    assert engine.graphs is not None and engine.graphs.shapes
    assert torch.equal(engine.arena["shared"][0], before)


def test_recordings_share_memory(make):
    engine = engine_of(make, graph=True, lanes=2)
    engine.train(0, 2, 12)
    first = torch.cuda.memory_reserved()
    for low, high in ((0, 1), (1, 2)):
        engine.train(low, high, 12)
    assert len(engine.graphs.shapes) >= 6
    assert torch.cuda.memory_reserved() < 1.3 * first


@pytest.mark.parametrize("context", [24, 512])
def test_windows_that_no_kernel_takes(make, context):
    sections = {"model": {"router": "evidence", "context": context}, "train": {"batch": 2}}
    engine = engine_of(make, graph=True, fused=False, **sections)
    engine.train(0, 1, 12)
    assert int(engine.arena["skipped"].sum()) == 0


def test_a_graph_reads_and_writes_nothing_that_others_may_have(make):
    hashes = []
    for disturbed in (False, True):
        engine = engine_of(make, graph=True)
        engine.train(0, 1, 6)
        others = []
        if disturbed:  # as torch.compile does
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            others = [torch.full((2**k,), 7.0, device="cuda") for k in range(6, 26)]
        engine.train(0, 1, 6)
        hashes.append(engine.arena.hash_lane(0))
        assert all(bool((other == 7.0).all()) for other in others)
    assert hashes[0] == hashes[1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_step_never_waits_for_the_device(make, mode, fused):
    engine = engine_of(make, graph=False, fused=fused, update={"mode": mode, "inner_steps": 2})
    engine.train(0, 1, 6)  # compiles, and indexes the tree
    try:
        torch.cuda.set_sync_debug_mode("error")
        engine.train(0, 1, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.arena.host_step[0] == 12


def test_a_graph_outlives_changes_of_tree_and_settings(make):
    hashes = []
    for graph in (False, True):
        engine = engine_of(make, graph=graph)
        arena = engine.arena
        engine.train(0, 1, 12)
        recorded = engine.graphs and set(engine.graphs.shapes)
        leaf = max(arena.trees[0].blocks)
        edits.delete_agent(arena, 0, leaf)
        arena.set_hyper(0, "lr", 2e-3)
        arena.set_hyper(0, "cooldown", 1)
        engine.train(0, 1, 8)
        edits.add_agent(arena, 0, arena.trees[0].blocks[leaf - 1].parent)
        engine.train(0, 1, 8)
        if graph:
            assert set(engine.graphs.shapes) == recorded
        hashes.append(arena.hash_lane(0))
    assert hashes[0] == hashes[1]


def test_the_kernels_gradients_are_those_of_plain_pytorch(make):
    plain, fused = (engine_of(make, graph=False, fused=fused) for fused in (False, True))
    found = {}
    for name, engine in (("plain", plain), ("fused", fused)):
        arena = engine.arena
        batch = engine.store.sample(
            "train", arena["data_seed"], arena["data_cursor"], arena["mix"], 4
        )
        text = read_text(batch, arena.config)
        measured = torch.arange(arena.scratch + 1.0, device="cuda")[None]
        selection = engine._select(0, 1, measured)
        done = engine.path_pass(0, 1, batch, text, selection)
        by = done.gradients()
        rows = dict(zip(done.row.tolist(), by.by_row, strict=True))
        rows.pop(arena.scratch, None)
        found[name] = by.loss, rows, by.by_shared
    assert found["plain"][1].keys() == found["fused"][1].keys()
    torch.testing.assert_close(found["fused"][0], found["plain"][0], rtol=1e-3, atol=0)
    pairs = [(found["fused"][1][row], want) for row, want in found["plain"][1].items()]
    for got, want in [*pairs, (found["fused"][2], found["plain"][2])]:
        assert float((got - want).norm() / want.norm()) < 3e-2


def test_a_change_of_mode_reaches_recorded_steps(make):
    hashes = []
    for graph in (False, True):
        engine = engine_of(make, graph=graph)
        for mode in ("dense", "sparse", "dense"):
            engine.mode = mode
            engine.train(0, 1, 9)
        hashes.append(engine.arena.hash_lane(0))
    assert hashes[0] == hashes[1]


def test_inner_steps_and_overlapping_lanes_under_graphs(make):
    hashes = []
    for graph in (False, True):
        engine = engine_of(make, graph=graph, lanes=3, update={"inner_steps": 3})
        for start, stop in ((0, 1), (0, 3), (1, 3), (0, 1), (0, 3)):
            engine.train(start, stop, 6)
        hashes.append([engine.arena.hash_lane(lane) for lane in range(3)])
    assert hashes[0] == hashes[1]


def test_untouched_blocks_keep_their_bits(make):
    engine = engine_of(make)
    arena = engine.arena
    engine.train(0, 1, 9)
    before = {name: arena[name].clone() for name in ("weight", "first", "second", "count")}
    result = engine.step(0, 1)
    still = result.selection.scale[0] == 0
    assert 0 < int((~still).sum()) <= int(arena["top_k"][0]) + 1  # the root does not count
    for name, old in before.items():
        assert torch.equal(arena[name][0, still], old[0, still]), name
        assert not torch.equal(arena[name][0, ~still], old[0, ~still]), name


@pytest.mark.parametrize("router", ["mean", "evidence"])
@pytest.mark.parametrize("roomy", [False, True])
def test_a_recorded_measurement_follows_trees_windows_and_training(make, roomy, router):
    """Plain and recorded, side by side: all that a recording reads has changed in between."""
    sections = {"model": {"router": router}, "train": {"eval_windows": 6}}
    plain, recorded = (engine_of(make, graph=graph, lanes=3, **sections) for graph in (False, True))
    names = plain.store.domains

    def batch_of(engine, turn):
        arena = engine.arena
        cursor = torch.full((3,), turn, dtype=torch.int64, device="cuda")
        return engine.store.sample("gate", arena["data_seed"], cursor, arena["mix"], 6)

    def change(engine, turn):
        arena = engine.arena
        if turn == 1:
            edits.delete_agent(arena, 0, max(arena.trees[0].blocks))
        elif turn == 2:
            edits.add_agent(arena, 1, 0)
        elif turn == 3:
            arena.set_hyper(0, "top_k", 9)
            arena.set_hyper(2, "top_k", 2)
        elif turn == 4:
            arena.copy_lane(1, 2)
            edits.add_agent(arena, 2, max(arena.trees[2].blocks))
        elif turn == 5:
            arena.write_lane(0, arena.read_lane(2))
        elif turn == 6:
            arena.set_hyper(0, "top_k", arena.config.train.top_k)

    for engine in (plain, recorded):
        engine.arena.roomy = roomy
        engine.arena.copy_lane(0, 1, 2)  # what was laid out before is laid out anew
        for lane in range(3):
            engine.arena.reset_lane(lane, lane)
    seen = set()
    for turn in range(8):
        found = []
        for engine in (plain, recorded):
            change(engine, turn)
            rows = []
            for _ in range(2):  # recorded at the second, replayed from then on
                for start, stop in ((0, 3), (1, 2)):
                    own = batch_of(engine, turn).map(lambda t, a=start, b=stop: t[a:b])
                    rows.append(engine.bits_per_byte(start, stop, own))
                shared = engine.store.spread("validation", names[turn % 3], 6)
                rows.append(engine.bits_per_byte(0, 3, shared))
                engine.train(0, 3, 1)
            found.append(rows)
        for one, other in zip(*found, strict=True):
            assert bool(torch.isfinite(one).all()) and torch.equal(one, other), turn
        seen.update(float(value) for row in found[0] for value in row)
        hashes = [[e.arena.hash_lane(lane) for lane in range(3)] for e in (plain, recorded)]
        assert hashes[0] == hashes[1], "and training is not disturbed"
    assert len(seen) > 60, "each measurement was about something else"
    measured = [shape for shape in recorded.graphs.shapes if shape[0] == "measure"]
    assert {shape[1:3] for shape in measured} == {(0, 3), (1, 2)}
    if roomy:
        assert len(measured) == 2, "no tree and no top_k up to the room calls for another"


def test_a_recorded_measurement_is_the_callers_own(make):
    """A result is not overwritten by the next replay, nor the windows that were given."""
    engine = engine_of(make, graph=True, lanes=2)
    batches = [engine.store.spread("validation", name, 6) for name in engine.store.domains[:2]]
    before = [batch.inputs.clone() for batch in batches]
    engine.bits_per_byte(0, 2, batches[0])
    first = engine.bits_per_byte(0, 2, batches[0])
    kept = first.clone()
    other = engine.bits_per_byte(0, 2, batches[1])
    assert torch.equal(first, kept) and not torch.equal(first, other)
    assert all(torch.equal(b.inputs, old) for b, old in zip(batches, before, strict=True))
    assert torch.equal(engine.bits_per_byte(0, 2, batches[0]), kept)


@pytest.mark.parametrize("name", ["packnet", "progressive", "mixture"])
def test_methods_with_passes_of_their_own_run_and_repeat(data, name):
    found = []
    for _ in range(2):
        learner = Build(data, "cuda")(name, runs=2)
        measure_memory_anew(learner.arena.device)
        go(learner, 3, steps=6)
        seen = views(learner.store, "validation", 4, 2)
        bits = [learner.measure(seen, view) for view in ("windows", "passages")]
        found.append((bits, [learner.arena.hash_lane(lane) for lane in range(2)]))
        assert torch.tensor(bits).isfinite().all() and not learner.arena["skipped"].any()
        assert (peak_memory(learner.arena.device) or 0) > 0
    assert found[0] == found[1]
