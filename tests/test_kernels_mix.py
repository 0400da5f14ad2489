"""The kernels that mix children, against the plain code in float64 and in float32."""

import pytest
import torch

from k1.attribution import index_leaves
from k1.block import block_layout
from k1.config import Config, ModelConfig
from k1.forward import Activations, learned_logits
from k1.mixing import mix, sibling_softmax
from k1.path import _mix_level, index_paths
from tests.kernel_harness import (
    MAX_CHILDREN,
    ON_GPU,
    TOLERANCE,
    Draw,
    device,
    ragged_levels,
    ragged_trees,
    repeats_in_a_graph,
)

ROUTER_PIECES = ("router.weight", "router.bias")
ROUTERS = ["mean", "learned", "evidence"]
EMBED = 12
# Tokens of more than one tile, and of less than one.
LEVELS = [(0, 67), (1, 11), (2, 11)]
# Has what `test_the_cases_have_what_is_hard` asks for.
HARD_SEED = 6


def test_the_trees_are_ragged():
    levels = ragged_levels()
    leaves = [bool((index.is_leaf & index.alive).any()) for index in levels]
    assert leaves == [False, True, True, True]
    assert any(not bool(index.alive.all()) for index in levels[1:])
    gaps = [index.has_child[..., 1:] & ~index.has_child[..., :-1] for index in levels]
    assert any(bool(gap.any()) for gap in gaps)


class FrozenCase:
    """One level with random values."""

    def __init__(self, level, router, tokens, dtype, embed=EMBED):
        draw, self.tokens, self.dtype = Draw(level, dtype), tokens, dtype
        self.parent, self.child = parent, child = ragged_levels()[level : level + 2]
        lanes = parent.alive.shape[0]
        self.y = (draw(lanes, parent.width, tokens, embed) * 3 + 1).to(dtype)
        self.m = draw(lanes, child.width, tokens, embed).to(dtype)
        self.prior = draw(lanes, child.width, tokens if router == "evidence" else 1)
        # Views into rows that hold more, as in the arena.
        rows = draw(lanes, parent.width + 2, 7 + (embed + 1) * MAX_CHILDREN)
        rows = rows[:, : parent.width, 7:] * 4 / embed**0.5
        split = embed * MAX_CHILDREN
        self.weight = rows[..., :split].unflatten(-1, (embed, MAX_CHILDREN))
        self.bias = rows[..., split:]
        if router == "mean":
            self.weight = self.bias = None

    def fused(self):
        from k1.kernels.mix import mix_frozen

        share = torch.zeros_like(self.m[..., 0], dtype=torch.float32)
        state = self.y, self.m, self.prior, self.weight, self.bias, share
        return mix_frozen(*state, self.parent, self.child), share

    def plain(self):
        """What the code that a CPU runs makes of it in float64."""
        y, learned = self.y.double(), None
        if self.weight is not None:
            pieces = {
                "router.weight": self.weight.double().flatten(0, 1),
                "router.bias": self.bias.double().flatten(0, 1),
            }
            learned = learned_logits(pieces, y)
        route = sibling_softmax(self.prior.double(), learned, self.parent, self.child)
        by_child = route.double().expand(-1, -1, self.tokens)
        mixed = mix(self.m.double(), by_child, self.parent, self.child)
        return torch.where(self.parent.is_leaf[..., None, None], y, mixed), by_child


def check_frozen_mix(level, tokens, router, dtype=torch.float32):
    case = FrozenCase(level, router, tokens, dtype)
    mixed, by_child = case.fused()
    expected, expected_share = case.plain()
    parent = case.parent
    assert mixed.dtype == dtype and by_child.dtype == torch.float32 and mixed.isfinite().all()
    alive = parent.alive
    torch.testing.assert_close(mixed[alive].double(), expected[alive], **TOLERANCE[dtype])
    torch.testing.assert_close(by_child.double(), expected_share, **TOLERANCE[dtype])
    assert torch.equal(mixed[parent.is_leaf], case.y[parent.is_leaf])
    assert not by_child[~case.child.alive].any()


class PathCase:
    """One level of paths with random values, for the plain code and for the kernels."""

    def __init__(self, level, router, seed, tokens=11, dtype=torch.float32, embed=EMBED):
        from k1.kernels.select import list_paths

        draw, self.levels, self.level = Draw(seed, dtype), ragged_levels(), level
        self.parent, self.child = self.levels[level : level + 2]
        lanes, slots = len(self.child.alive), 24
        on_path = self.choose(draw, lanes, slots).to(device())
        self.paths = index_paths(on_path, self.levels, 9, slots - 1)
        leaves = index_leaves(ragged_trees(), [3] * lanes, device())
        self.table = list_paths(on_path, leaves, tuple(p.slot.shape[1] for p in self.paths))
        model = ModelConfig(
            router=router, embed=embed, heads=2, feed_forward=8, max_children=MAX_CHILDREN
        )
        self.config, self.layout = Config(model=model), block_layout(model)
        self.y = draw(lanes, self.parent.width, tokens, embed).to(dtype)
        self.mixed = draw(lanes, self.child.width, tokens, embed).to(dtype)
        self.prior = draw(lanes, self.child.width, tokens if router == "evidence" else 1)
        self.rows = draw(lanes * slots, self.layout.total) * 2 / embed**0.5
        self.grad = draw(len(self.table.row), tokens, embed).to(dtype)
        self.router = router

    def choose(self, draw, lanes, slots):
        """Draw blocks of which all ancestors are on the path too."""
        on_path = torch.zeros(lanes, slots, dtype=torch.bool)
        chosen = draw.uniform(lanes, slots).cpu() < 0.5
        for index in reversed(self.levels):
            cut = slice(index.offset, index.offset + index.width)
            on_path[:, cut] |= chosen[:, cut] | (index.level == 0)
            on_path[:, cut] &= index.alive.cpu()
        for below, index in zip(self.levels[:0:-1], self.levels[-2::-1], strict=True):
            for lane, position in (on_path[:, below.offset :][:, : below.width]).nonzero():
                on_path[lane, index.offset + int(below.parent[lane, position])] = True
        return on_path

    def of_level(self, values, level):
        """Rows of the table [M, ...] that a level has: [L, R, ...]."""
        return values[self.table.cut(level)].unflatten(0, (self.table.lanes, -1))

    def at_path(self, values, level):
        """Values [L, W, ...] of a level's path blocks: [L, R, ...]."""
        index = self.paths[level].position
        index = index.view(*index.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))

    def plain(self):
        """Gradients by autograd in float64: of outputs, of values below, of weight and bias."""
        y, below = (
            self.at_path(values.double(), self.level + rank).requires_grad_()
            for rank, values in enumerate((self.y, self.mixed))
        )
        own = self.rows[self.table.row[self.table.cut(self.level)]].double()
        unpacked = self.layout.unpack(own)
        pieces = {name: unpacked[name].clone().requires_grad_() for name in ROUTER_PIECES}
        lead = [None] * self.level
        frozen = Activations(
            [], [*lead, None, self.mixed.double()], [*lead, None, self.prior.double()], []
        )
        out = _mix_level(
            [*lead, y], below, [*lead, pieces], frozen, self.paths, self.levels, self.level,
            self.config,
        )  # fmt: skip
        valid = self.paths[self.level].valid[..., None, None]
        grad = torch.where(valid, self.of_level(self.grad.double(), self.level), 0)
        leaves = [y, below, *pieces.values()]
        return torch.autograd.grad(
            (out * grad).sum(), leaves, allow_unused=True, materialize_grads=True
        )

    def fused(self):
        """The same by the kernel; NaN where it has written nothing."""
        from k1.kernels.path import mix_backward

        grad = torch.full_like(self.grad, torch.nan)
        cut = self.table.cut(self.level)
        grad[cut] = self.grad[cut]
        router = None
        if self.router != "mean":
            router = torch.zeros_like(grad), grad.new_zeros(*grad.shape[:2], MAX_CHILDREN)
        mix_backward(
            self.table, grad, self.y, self.mixed, self.prior, self.rows, self.layout, router,
            self.parent, self.child,
        )  # fmt: skip
        found = [self.of_level(grad, level) for level in (self.level, self.level + 1)]
        if router is None:
            return found
        normed, by_logits = (t[cut].double() for t in router)
        return [*found, normed.transpose(1, 2) @ by_logits, by_logits.sum(1)]


def check_path_mix(level, tokens, router, dtype=torch.float32, embed=EMBED):
    case = PathCase(level, router, HARD_SEED, tokens, dtype, embed)
    path, under = case.paths[level : level + 2]
    keep = [path.valid, under.valid, *[path.valid.flatten()] * 2]
    names = ("y", "below", "weight", "bias")
    for name, mask, grad, wanted in zip(names, keep, case.fused(), case.plain(), strict=False):
        grad, wanted = grad[mask].double(), wanted[mask]
        assert wanted.any(), name
        error = torch.linalg.vector_norm(grad - wanted)
        assert error <= TOLERANCE[dtype]["rtol"] * torch.linalg.vector_norm(wanted), name


def check_what_is_hard():
    """Siblings both on the path, path leaves beside path parents, and padding."""
    case = PathCase(1, "evidence", HARD_SEED)
    path, under = case.paths[1:3]
    on_path = under.in_parent.sum(1)
    exists = case.at_path(case.parent.has_child, 1).sum(-1)
    assert bool((on_path > 1).any()) and bool((exists > on_path).any())
    assert bool((case.at_path(case.parent.is_leaf, 1) & path.valid).any())
    assert not bool(path.valid.all()) and not bool(under.valid.all())


def check_the_table():
    for seed in range(4):
        case = PathCase(1, "mean", seed)
        slots = len(case.table.place) // case.table.lanes
        lane = torch.arange(case.table.lanes, device=device())[:, None] * slots
        for level, path in enumerate(case.paths):
            assert torch.equal(case.of_level(case.table.row, level), path.slot + lane)
        real = case.table.row % slots != slots - 1
        here = torch.arange(len(real), device=device())
        assert torch.equal(case.table.place[case.table.row[real]], here[real])
        assert int((case.table.place >= 0).sum()) == int(real.sum())


def check_padding(router):
    case = PathCase(1, router, HARD_SEED)
    own, below = case.fused()[:2]
    path, under = case.paths[1:3]
    assert torch.equal(own[~path.valid], case.of_level(case.grad, 1)[~path.valid])
    assert below[~under.valid].isnan().all() and below[under.valid].isfinite().all()


def check_groups(router):
    """More children than a program asks for at once, in a last group that is not full."""
    from k1.kernels import path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "_AHEAD", 2)
        assert ragged_levels()[0].children.shape[-1] == 3
        check_path_mix(0, 67, router)


def check_a_value_that_is_not_finite():
    case = PathCase(0, "evidence", HARD_SEED)
    case.y[1] = torch.nan
    own, below = case.fused()[:2]
    assert own[1].isnan().all() and own[[0, 2, 3]].isfinite().all()
    valid = case.paths[1].valid
    assert below[1][valid[1]].isnan().all()
    valid[1] = False
    assert below[valid].isfinite().all()


def check_sums_over_children():
    from k1.kernels.path import add_children

    case = PathCase(1, "mean", HARD_SEED)
    path, under = case.paths[1:3]
    dx = Draw(1)(*case.grad.shape)
    expected = case.of_level(case.grad.clone(), 1)
    for lane, row, up in under.in_parent.nonzero().tolist():
        expected[lane, up] += case.of_level(dx, 2)[lane, row]
    before = case.grad.clone()
    add_children(case.table, case.grad, dx, 24, case.parent, case.child)
    found = case.of_level(case.grad, 1)
    torch.testing.assert_close(found[path.valid], expected[path.valid])
    assert not torch.equal(case.grad, before)
    before[case.table.cut(1)] = case.grad[case.table.cut(1)]
    assert torch.equal(case.grad, before), "other levels stay as they are"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("level", "tokens"), LEVELS)
def test_frozen_mix_equals_softmax_and_mix(kernels, level, tokens, router):
    kernels(check_frozen_mix, level, tokens, router)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("level", "tokens"), LEVELS)
def test_path_mix_equals_autograd(kernels, level, tokens, router):
    kernels(check_path_mix, level, tokens, router)


def test_the_cases_have_siblings_on_the_path_leaves_beside_parents_and_padding(kernels):
    kernels(check_what_is_hard)


def test_the_table_lists_what_index_paths_lists(kernels):
    kernels(check_the_table)


@pytest.mark.parametrize("router", ["mean", "evidence"])
def test_padding_is_left_alone(kernels, router):
    kernels(check_padding, router)


@pytest.mark.parametrize("router", ["learned", "evidence"])
def test_children_in_groups(kernels, router):
    kernels(check_groups, router)


def test_a_value_that_is_not_finite_stays_in_its_lane_and_shows(kernels):
    kernels(check_a_value_that_is_not_finite)


def test_sums_over_children_on_the_path(kernels):
    kernels(check_sums_over_children)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("level", "tokens"), LEVELS)
class TestInBfloat16:
    pytestmark = ON_GPU

    def test_frozen_mix_equals_softmax_and_mix(self, level, tokens, router):
        check_frozen_mix(level, tokens, router, torch.bfloat16)

    def test_path_mix_equals_autograd(self, level, tokens, router):
        check_path_mix(level, tokens, router, torch.bfloat16)


@pytest.mark.parametrize("router", ["mean", "evidence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestOnGpu:
    pytestmark = ON_GPU

    def test_at_full_width_with_many_tokens(self, dtype, router):
        case = FrozenCase(1, router, 1000, dtype, embed=128)
        for found, expected in zip(case.fused(), case.plain(), strict=True):
            keep = slice(None) if found.dim() == 3 else case.parent.alive
            error = torch.linalg.vector_norm(found[keep].double() - expected[keep])
            limit = TOLERANCE[dtype]["rtol"] * torch.linalg.vector_norm(expected[keep])
            assert error <= limit
        check_path_mix(1, 1000, router, dtype, embed=128)

    def test_in_a_graph_the_bits_are_the_same(self, dtype, router):
        frozen = FrozenCase(1, router, 300, dtype, embed=128)
        assert repeats_in_a_graph(frozen.fused)
        paths = PathCase(1, router, HARD_SEED, 300, dtype, embed=128)

        def below():
            return [t.nan_to_num(7.0) for t in paths.fused()]

        assert repeats_in_a_graph(below)
