"""The planned update against the plain one: which rows move, how far, which stay as they are."""

import math
from dataclasses import dataclass

import pytest
import torch

from k1.arena import Arena
from k1.attribution import Selection
from k1.graphs import Side
from k1.path import Gradients
from k1.records import FullGradients
from k1.update import ROWS, SHARED_ROWS, Update
from tests.kernel_harness import Draw, device
from tests.reference import small_config

LANES, FIRST = 3, 1
"""Lanes that are updated, and how many others stand before them."""
CASES = {
    "usual": {"optimizer": {"warmup": 10}},
    "without clipping": {"optimizer": {"clip": 0.0, "beta1": 0.0}},
    "a high limit": {"optimizer": {"clip": 1e6}},
    "without warm-up": {"optimizer": {"warmup": 0}},
    "without the shared part": {"update": {"shared_scale": 0.0}},
    "another scale": {"optimizer": {"beta1": 0.3, "beta2": 0.7}, "update": {"shared_scale": 0.3}},
    "a not-finite block": {"bad": "block"},
    "an infinite block": {"bad": "block", "value": math.inf},
    "not finite in the last turn": {"bad": "block", "turn": 2},
    "a not-finite shared part": {"bad": "shared"},
    "a shared part that does not matter": {"bad": "shared", "update": {"shared_scale": 0.0}},
    "some share": {"sharers": True},
    "not finite where not shared": {"sharers": True, "bad": "shared"},
}  # fmt: skip
ONE_TURN = [name for name, case in CASES.items() if "turn" not in case]
MANY_TURNS = [
    "usual", "without clipping", "without the shared part", "a not-finite block",
    "not finite in the last turn", "some share",
]  # fmt: skip
BAD_LANE = 1


@dataclass
class Done:
    """What an update reads of a pass."""

    row: torch.Tensor
    place: torch.Tensor


def make_arena(config):
    """An arena whose lanes are at different steps, with rows of any age."""
    arena = Arena(config, 90, 2, FIRST + LANES + 1, device())
    draw = Draw(3)
    for name in (*ROWS, *SHARED_ROWS):
        value = arena[name]
        if value.is_floating_point():
            value[:] = draw(*value.shape)
        else:
            value[:] = (draw.uniform(*value.shape) * 90).long()
    for name in ("second", "shared_second"):
        arena[name].square_()
    arena["count"][FIRST, 0], arena["count"][FIRST + 2, 1] = 0, 5_000_000
    arena["shared_count"][FIRST] = 0
    arena["lr"][:] = 0.01 * (1 + draw.uniform(arena.lanes))
    arena["lr_factor"][:] = draw.uniform(arena.lanes)
    arena["step"][:] = torch.tensor([7, 0, 20, 500, 2], device=device())
    return arena


def make_selection(slots):
    """The root and some others; two culprits in the first lane, one in the others."""
    scale = torch.zeros(LANES, slots)
    scale[:, 0] = 0.05
    scale[0, [2, 3, 5, 6]] = torch.tensor([0.15, 0.15, 1.0, 1.0])
    scale[1, [1, 4]] = torch.tensor([0.15, 1.0])
    scale[2, 1] = 1.0
    culprits = torch.tensor([[5, 6], [4, -1], [1, -1]])
    scale = scale.to(device())
    return Selection(scale, scale > 0, culprits.to(device()))


def path_rows(selection):
    """Rows of the blocks in no order, one more that does not move, and two that pad."""
    slots = selection.scale.shape[1]
    on = selection.scale.cpu().flatten().nonzero().flatten()
    still, padding = torch.tensor([slots + 2]), torch.tensor([slots - 1, 2 * slots - 1])
    row = torch.cat([on, still, padding])
    row = row[torch.randperm(len(row), generator=torch.Generator().manual_seed(1))]
    place = torch.full((LANES * slots,), -1)
    for at, r in enumerate(row.tolist()):
        if r not in padding:
            place[r] = at
    return Done(row.to(device()), place.to(device()))


def check_update(name, full, inner=1):
    from k1.kernels.update import FusedUpdate

    case = dict(CASES[name])
    bad, value, when = case.pop("bad", None), case.pop("value", math.nan), case.pop("turn", 0)
    sharers = torch.tensor([True, False, True], device=device()) if case.pop("sharers", 0) else None
    config = small_config().replace(**case)
    plain, fused, before = (make_arena(config) for _ in range(3))
    slots, size = plain["weight"].shape[1:]
    selection = make_selection(slots)
    draw = Draw(8)
    side = Side(device())
    updates = [
        Update(plain, FIRST, FIRST + LANES, selection, sharers),
        FusedUpdate(fused, FIRST, FIRST + LANES, selection, sharers, side),
    ]
    for turn in range(inner):
        by_shared = draw(LANES, plain["shared"].shape[1])
        if bad == "shared" and turn == when:
            by_shared[BAD_LANE, 4] = value
        if full:
            row = torch.arange(LANES * slots, device=device())
            grad = draw(LANES * slots, size)
            norms = torch.linalg.vector_norm(grad, dim=-1)
            norms[selection.scale.flatten() == 0] = math.nan  # of no concern
            if bad == "block":
                norms[BAD_LANE * slots + 4] = value
            parts = [(row[:7], grad[:7]), (row[7:], grad[7:])]
            given = FullGradients(None, norms.view(LANES, slots), parts, by_shared, None)
            fine = [update.full(given) for update in updates]
        else:
            done = path_rows(selection)
            grad = draw(len(done.row), size)
            grad[done.row % slots == slots - 1] = math.nan  # padding
            if bad == "block" and turn == when:
                grad[done.place[BAD_LANE * slots + 4], 3] = value
            squares = torch.linalg.vector_norm(grad, dim=-1).square()
            found = Gradients(by_shared.new_zeros(LANES), grad, squares, by_shared)
            fine = [update.path(done, found, turn == inner - 1) for update in updates]
    side.join()
    assert torch.equal(*fine)
    matters = bad == "block" or (config.update.shared_scale > 0 and sharers is None)
    assert fine[0].tolist() == [True, not (bad and matters), True]
    compare(plain, fused, before)
    if bad and matters and when == 0:
        lane = FIRST + BAD_LANE
        assert all(torch.equal(fused[n][lane], before[n][lane]) for n in (*ROWS, *SHARED_ROWS))


def compare(plain, fused, before):
    """The same counts, close numbers, and the same bits in rows that did not move."""
    for names in (ROWS, SHARED_ROWS):
        count = names[-1]
        assert torch.equal(fused[count], plain[count])
        moved = plain[count] != before[count]
        assert moved.any() or (names is SHARED_ROWS and plain.config.update.shared_scale == 0)
        for name in names[:3]:
            # Roots and quotients are rounded otherwise on a GPU.
            atol = 2e-7 if fused[name].device.type == "cpu" else 1e-6
            torch.testing.assert_close(fused[name], plain[name], rtol=2e-6, atol=atol)
            assert torch.equal(fused[name][~moved], before[name][~moved])
            rows = fused[name][moved] != before[name][moved]
            assert rows.any(-1).all()


def check_sums():
    from k1.kernels.update import square_parts

    for size in (1, 4096, 10_001):
        grad = Draw(size)(3, size + 5)[:, :size]
        grad[1, -1] = math.nan
        found = square_parts(grad).sum(1)
        assert found[1].isnan()
        wanted = grad.double().square().sum(1).float()
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-6, atol=0)


def check_many_parts():
    from k1.kernels import update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "_BLOCK", 4)
        assert update.square_parts(torch.ones(1, 3000, device=device())).shape == (1, 750)
        check_update("another scale", False)


@pytest.mark.parametrize("name", ONE_TURN)
def test_paths_move_as_by_plain_pytorch(kernels, name):
    kernels(check_update, name, False)


@pytest.mark.parametrize("name", ONE_TURN)
def test_all_blocks_move_as_by_plain_pytorch(kernels, name):
    kernels(check_update, name, True)


@pytest.mark.parametrize("name", MANY_TURNS)
def test_inner_steps_move_culprits_as_by_plain_pytorch(kernels, name):
    kernels(check_update, name, False, 3)


def test_a_large_shared_part_has_many_sums(kernels):
    kernels(check_many_parts)


def test_squares_are_summed(kernels):
    kernels(check_sums)
