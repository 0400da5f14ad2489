"""The kernels of the evidence router, against the plain code."""

import dataclasses

import pytest
import torch

from k1.evidence import UNIT, add_counts, hash_bigrams, history_mask, levels_evidence
from k1.forward import Batch, read_text
from tests.kernel_harness import ON_GPU, Draw, device, ragged_levels, repeats_in_a_graph
from tests.reference import loop_evidence, small_config

CONFIG = dataclasses.replace(small_config().evidence, tau=0.3, strength=2.5)
TABLE = CONFIG.buckets + CONFIG.context_buckets


class Case:
    """Random counts of one level, a view into those of all levels, and a random text."""

    def __init__(self, level, time, windows=2, seed=0):
        draw = Draw(seed)
        self.parent, self.child = ragged_levels()[level : level + 2]
        self.levels = ragged_levels()[1:]
        width, offset = self.child.width, self.child.offset
        self.lanes = self.child.alive.shape[0]
        self.counts = (draw.uniform(self.lanes, 24, 3, TABLE) ** 3 * 5 * UNIT).long()
        self.below = torch.zeros(24, dtype=torch.bool, device=device())
        for index in self.levels:
            self.below[index.offset : index.offset + index.width] = True
        self.level_counts = self.counts[:, offset : offset + width]
        self.tokens = (draw.uniform(self.lanes, windows, time) * 97).long()
        self.starts = draw.uniform(self.lanes, windows, time) < 0.15
        self.text = read_text(
            Batch(self.tokens, self.tokens, self.starts, self.tokens[..., 0]), small_config()
        )

    def fused(self):
        from k1.kernels.evidence import level_evidence_fused

        return level_evidence_fused(
            self.level_counts,
            self.parent,
            self.child,
            self.text.bigram,
            self.text.context,
            self.starts,
            CONFIG,
        )

    def plain(self):
        (found,) = levels_evidence(
            [self.level_counts],
            [self.child],
            self.text.bigram,
            self.text.context,
            history_mask(self.starts),
            CONFIG,
        )
        return found


def check_evidence(level, time):
    case = Case(level, time)
    found, expected = case.fused(), case.plain()
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[case.child.alive].any() and not found[~case.child.alive].any()


def check_the_longest_window():
    from k1.evidence import LONGEST_FUSED

    case = Case(0, LONGEST_FUSED, windows=1)
    case.starts &= (
        torch.arange(LONGEST_FUSED, device=device()) < 20
    )  # one document of over 200 tokens
    found = case.fused()
    for lane in (0, 3):
        slots = case.parent.children[lane, 0][case.parent.has_child[lane, 0]]
        tables = (case.level_counts[lane, slots].sum(1).double() / UNIT).tolist()
        rows = loop_evidence(
            tables, case.tokens[lane, 0].tolist(), case.starts[lane, 0].tolist(), CONFIG
        )
        expected = torch.tensor(rows, device=device())
        torch.testing.assert_close(found[lane, slots], expected, rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 5


def check_special_children():
    case = Case(0, 16)
    parent, lane = case.parent, 3
    first, second = parent.children[lane, 0][parent.has_child[lane, 0]].tolist()[:2]
    case.level_counts[lane, first] = 0
    case.level_counts[1, 1] = case.level_counts[1, 0]
    found = case.fused()
    assert not found[lane, first].any() and found[lane, second].any()
    assert torch.equal(found[1, 0], found[1, 1]) and not torch.equal(found[1, 0], found[1, 2])


def check_first_tokens():
    case = Case(0, 16)
    first = case.starts | (torch.arange(16, device=device()) == 0)
    found = case.fused()[:, 0].view(case.lanes, 2, 16)
    assert case.starts.any() and not found[first].any()


def counted(case):
    """Shares [L, W, N] of the levels below the root, scales [L, S] and which lanes are fine."""
    draw, tokens = Draw(5), case.tokens[0].numel()
    shares = [draw.uniform(case.lanes, index.width, tokens) for index in case.levels]
    for share in shares:
        # Many halfway between two integers.
        share[:, 0] = (share[:, 0] * 2 * UNIT).floor() / 2 / UNIT
        share[0, 0, :5] = 0
    scale = (draw.uniform(case.lanes, 24) - 0.4).clamp(min=0)
    scale[:, -1] = 0
    return shares, scale, torch.arange(case.lanes, device=device()) != 2


def plain_counts(case, counts, shares, scale, fine):
    for index, share in zip(case.levels, shares, strict=True):
        slots = index.offset + torch.arange(index.width, device=device()).expand(case.lanes, -1)
        on = (scale.gather(1, slots) > 0) & fine[:, None]
        share = torch.where(on[..., None], share, 0.0)
        add_counts(
            counts, slots, share, case.text.bigram, case.text.context, case.text.valid, CONFIG
        )


def check_counts(windows):
    from k1.kernels.evidence import count_fused

    case = Case(0, 16, windows)
    shares, scale, fine = counted(case)
    expected, found, before = (case.counts.clone() for _ in range(3))
    plain_counts(case, expected, shares, scale, fine)
    # A block that counts nothing may have any share.
    for share in shares:
        share[2] = torch.nan
    shares[0][0][scale[0, 1 : 1 + shares[0].shape[1]] == 0] = torch.nan
    count_fused(found, case.levels, shares, scale, fine, case.text, CONFIG)
    assert torch.equal(found, expected)
    changed = (found != before).flatten(2).any(2)
    assert torch.equal(changed, (scale > 0) & fine[:, None] & case.below)
    assert shares[0].isnan().any() and changed.sum() > 10


def check_counts_in_a_view():
    from k1.kernels.evidence import count_fused

    case = Case(0, 16)
    shares, scale, fine = counted(case)
    shares[0] = shares[0][..., :1].expand_as(shares[0])
    wide = torch.zeros(case.lanes, 30, 3, TABLE, dtype=torch.int64, device=device())
    count_fused(wide[:, 2:26], case.levels, shares, scale, fine, case.text, CONFIG)
    expected = torch.zeros_like(wide)
    view = expected[:, 2:26].clone()
    plain_counts(case, view, shares, scale, fine)
    expected[:, 2:26] = view
    assert torch.equal(wide, expected) and wide.any()


@pytest.mark.parametrize(("level", "time"), [(0, 2), (0, 128), (1, 16), (2, 8)])
def test_evidence_equals_the_plain_code(kernels, level, time):
    kernels(check_evidence, level, time)


def test_evidence_at_the_longest_window_equals_loops(kernels):
    kernels(check_the_longest_window)


def test_a_child_without_a_history_gets_exactly_zero_and_twins_the_same(kernels):
    kernels(check_special_children)


def test_the_first_token_of_a_document_says_nothing(kernels):
    kernels(check_first_tokens)


@pytest.mark.parametrize("windows", [2, 20])
def test_counts_equal_the_plain_code(kernels, windows):
    kernels(check_counts, windows)


def test_counts_go_into_a_view_with_strides(kernels):
    kernels(check_counts_in_a_view)


class TestOnGpu:
    pytestmark = ON_GPU

    def test_in_a_graph_the_bits_are_the_same(self):
        from k1.kernels.evidence import count_fused

        case = Case(1, 64, windows=9)
        shares, scale, fine = counted(case)

        def both():
            counts = torch.zeros_like(case.counts)
            count_fused(counts, case.levels, shares, scale, fine, case.text, CONFIG)
            return [case.fused(), counts]

        assert repeats_in_a_graph(both)

    def test_with_the_default_settings(self):
        case = Case(1, 64, windows=33)
        bigram, context = hash_bigrams(case.tokens, CONFIG)
        torch.testing.assert_close(case.fused(), case.plain(), rtol=1e-4, atol=1e-5)
        assert torch.equal(bigram, case.text.bigram) and torch.equal(context, case.text.context)
