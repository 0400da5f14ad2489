"""The kernels that mix children, against the plain code in float64 and in float32."""

import pytest
import torch

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
    repeats_in_a_graph,
)

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

        return mix_frozen(
            self.y, self.m, self.prior, self.weight, self.bias, self.parent, self.child
        )

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
    """One level of paths with random values, for the plain code and for the kernel."""

    def __init__(self, level, router, seed, tokens=11, dtype=torch.float32, embed=EMBED):
        levels = ragged_levels()
        draw, child = Draw(seed, dtype), levels[level + 1]
        on_path = torch.zeros(child.alive.shape[0], 23, dtype=torch.bool)
        chosen = draw.uniform(*on_path.shape).cpu() < 0.5
        for index in reversed(levels):  # a path block's parent is on the path
            cut = slice(index.offset, index.offset + index.width)
            on_path[:, cut] |= chosen[:, cut] | (index.level == 0)
            on_path[:, cut] &= index.alive.cpu()
        for below, index in zip(levels[:0:-1], levels[-2::-1], strict=True):
            for lane, position in (on_path[:, below.offset :][:, : below.width]).nonzero():
                on_path[lane, index.offset + int(below.parent[lane, position])] = True
        self.paths = index_paths(on_path.to(device()), levels, 9, 23)
        self.level, self.levels = level, levels
        path, under = self.paths[level : level + 2]
        (lanes, rows), below_rows = path.slot.shape, under.slot.shape[1]
        self.config = Config(model=ModelConfig(router=router, max_children=MAX_CHILDREN))
        self.y = draw(lanes, rows, tokens, embed)
        self.below = draw(lanes, below_rows, tokens, embed)
        self.constant = draw(lanes, child.width, tokens, embed)
        self.prior = draw(lanes, child.width, tokens if router == "evidence" else 1)
        self.weight = draw(lanes * rows, embed, MAX_CHILDREN) * 2 / embed**0.5
        self.bias = draw(lanes * rows, MAX_CHILDREN)
        self.grad = draw(lanes, rows, tokens, embed) * path.valid[..., None, None]
        self.router = router

    def leaves(self, dtype):
        """The four tensors that get a gradient; the router's parameters stay float32 or wider."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = (self.y.to(dtype), self.below.to(dtype), self.weight.to(wide), self.bias.to(wide))
        return [t.detach().clone().requires_grad_() for t in tensors]

    def plain(self, dtype):
        """Output and gradients of the code that a CPU runs."""
        y, below, weight, bias = leaves = self.leaves(dtype)
        prior, constant = self.prior.to(bias.dtype), self.constant.to(dtype)
        empty = [None] * (self.level + 1)
        frozen = Activations([], [*empty, constant], [*empty, prior], [])
        pieces = {"router.weight": weight, "router.bias": bias}
        lead = empty[1:]
        out = _mix_level(
            [*lead, y], below, [*lead, pieces], frozen, self.paths, self.levels, self.level,
            self.config,
        )  # fmt: skip
        return out.detach(), self.gradients(out, leaves)

    def gradients(self, out, leaves):
        return torch.autograd.grad(
            (out * self.grad.to(out.dtype)).sum(), leaves, allow_unused=True, materialize_grads=True
        )

    def at_path(self, values):
        index = self.paths[self.level].position
        return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(
            *index.shape, *values.shape[2:]
        ))  # fmt: skip

    def fused(self, dtype):
        """Output and gradients of the kernels."""
        from k1.kernels.path_mix import own_rows, path_mix

        y, below, weight, bias = leaves = self.leaves(dtype)
        index, under = self.levels[self.level], self.paths[self.level + 1]
        learned = None
        if self.router != "mean":
            learned = learned_logits({"router.weight": weight, "router.bias": bias}, y.float())
        children, exists = self.at_path(index.children), self.at_path(index.has_child)
        own = own_rows(children, exists, under.position, under.in_parent)
        out = path_mix(
            y, below, learned, self.prior, self.constant.to(dtype), children, exists, own,
            self.at_path(index.is_leaf),
        )  # fmt: skip
        return out.detach(), self.gradients(out, leaves)


def check_path_mix(level, tokens, router, dtype=torch.float32):
    case = PathCase(level, router, HARD_SEED, tokens, dtype)
    out, grads = case.fused(dtype)
    expected, expected_grads = case.plain(torch.float64)
    valid = case.paths[level].valid
    assert out.dtype == dtype
    torch.testing.assert_close(out[valid].double(), expected[valid], **TOLERANCE[dtype])
    names = ("y", "below", "weight", "bias")
    for name, grad, wanted in zip(names, grads, expected_grads, strict=True):
        assert bool(wanted.any()) == (router != "mean" or name in ("y", "below")), name
        error = torch.linalg.vector_norm(grad.double() - wanted)
        assert error <= TOLERANCE[dtype]["rtol"] * torch.linalg.vector_norm(wanted), name


def check_what_is_hard():
    from k1.kernels.path_mix import own_rows

    case = PathCase(1, "evidence", HARD_SEED)
    path, under = case.paths[1], case.paths[2]
    index = case.levels[1]
    children, exists = case.at_path(index.children), case.at_path(index.has_child)
    own = own_rows(children, exists, under.position, under.in_parent)
    on_path = (own >= 0).sum(-1)
    assert bool((on_path > 1).any()) and bool((exists.sum(-1) > on_path).any())
    assert bool((case.at_path(index.is_leaf) & path.valid).any())
    assert not bool(path.valid.all()) and not bool(under.valid.all())
    assert not bool((own >= 0)[~path.valid].any())


def check_own_rows():
    from k1.kernels.path_mix import own_rows

    for seed in range(4):
        case = PathCase(1, "mean", seed)
        path, under = case.paths[1], case.paths[2]
        children = case.at_path(case.levels[1].children)
        exists = case.at_path(case.levels[1].has_child)
        own = own_rows(children, exists, under.position, under.in_parent)
        expected = torch.full_like(own, -1)
        for lane, row, rank in exists.nonzero().tolist():
            for q in range(under.slot.shape[1]):
                if (
                    path.valid[lane, row]
                    and under.valid[lane, q]
                    and under.position[lane, q] == children[lane, row, rank]
                ):
                    expected[lane, row, rank] = q
        assert torch.equal(own, expected)


def check_padding(router):
    case = PathCase(1, router, HARD_SEED)
    grad = case.fused(torch.float32)[1][1]
    valid = case.paths[2].valid
    assert not grad[~valid].any() and grad[valid].flatten(1).any(1).all()


def check_a_value_that_is_not_finite():
    case = PathCase(0, "evidence", HARD_SEED)
    case.y[1] = torch.nan
    out, grads = case.fused(torch.float32)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
    assert grads[1][1][case.paths[1].valid[1]].isnan().all()


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


def test_own_rows_by_loops(kernels):
    kernels(check_own_rows)


@pytest.mark.parametrize("router", ["mean", "evidence"])
def test_rows_that_nobody_owns_get_no_gradient(kernels, router):
    kernels(check_padding, router)


def test_a_value_that_is_not_finite_stays_in_its_lane_and_shows(kernels):
    kernels(check_a_value_that_is_not_finite)


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
        paths = PathCase(1, router, HARD_SEED, 1000, dtype, embed=128)
        (out, grads), (expected, wanted) = paths.fused(dtype), paths.plain(torch.float64)
        valid = paths.paths[1].valid
        pairs = [(out[valid], expected[valid]), *zip(grads, wanted, strict=True)]
        for found, right in pairs:
            error = torch.linalg.vector_norm(found.double() - right)
            assert error <= TOLERANCE[dtype]["rtol"] * torch.linalg.vector_norm(right)

    def test_in_a_graph_the_bits_are_the_same(self, dtype, router):
        frozen = FrozenCase(1, router, 300, dtype, embed=128)
        assert repeats_in_a_graph(frozen.fused)
        paths = PathCase(1, router, HARD_SEED, 300, dtype, embed=128)

        def both_ways():
            out, grads = paths.fused(dtype)
            return [out, *grads]

        assert repeats_in_a_graph(both_ways)
