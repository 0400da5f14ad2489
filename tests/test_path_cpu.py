"""The written-out gradients of the paths against those of torch's graph."""

import pytest
import torch

from k1.block import causal_mask
from k1.forward import Batch, read_text
from k1.frozen import _ones_and_zeros
from k1.path import PathPass, index_paths
from k1.path_cpu import CpuPathPass
from tests.reference import make_ragged, next_batch, select, shake

ROUTERS = ("mean", "learned", "evidence")


def two_lanes(make, **sections):
    """Two lanes of different trees, a batch of both, and paths to two leaves and to one."""
    trainer = make(lanes=2, **sections)
    arena = trainer.arena
    shake(make_ragged(trainer))
    arena.copy_lane(0, 1)
    arena["weight"][1] *= 0.9
    arena["data_cursor"][1] = 7
    trainer.delete_agent(7)
    one, two = next_batch(trainer), next_batch(trainer, lane=1)
    names = ("inputs", "targets", "starts", "domain")
    batch = Batch(*[torch.cat([getattr(b, name) for b in (one, two)]) for name in names])
    paths = [select(trainer, *culprits).on_path for culprits in ((3, 8), (3,))]
    index = index_paths(torch.cat(paths), arena.index(0, 2), 2, arena.scratch)
    return trainer, arena.forest(0, 2), batch, index


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_as_by_torchs_graph(make, router, precision, bound):
    trainer, forest, batch, paths = two_lanes(
        make, model={"router": router}, train={"precision": precision}
    )
    assert not all(path.valid.all() for path in paths)  # some are padded
    text = read_text(batch, trainer.config)
    done = CpuPathPass(forest, batch, text, paths)
    for _ in range(2):
        want = PathPass(forest, batch, text, paths)
        assert torch.equal(done.row, want.row)
        found, expected = done.gradients(), want.gradients()
        for name, got in vars(found).items():
            wanted = getattr(expected, name)
            assert got.dtype == wanted.dtype
            assert wanted.any()
            error = (got - wanted).norm() / wanted.norm()
            assert error < bound, name
        # The next turn starts from culprits that have moved.
        trainer.arena["weight"][0, trainer.tree.slot_of(8)] *= 1.1
        trainer.arena["weight"][:, trainer.tree.slot_of(3)] *= 0.9


def test_what_is_made_once_is_good_for_gradients():
    with torch.inference_mode():
        made = [causal_mask(5, torch.float32), *_ones_and_zeros(7, torch.float32)]
    assert not any(tensor.is_inference() for tensor in made)
