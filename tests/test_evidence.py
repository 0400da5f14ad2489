"""Evidence routing: the counts, what they say, and that they add up."""

import dataclasses
import itertools

import pytest
import torch

from k1.evidence import (
    CURRENT,
    OLD,
    PREVIOUS,
    UNIT,
    add_counts,
    hash_bigrams,
    history_mask,
    levels_evidence,
    rotate,
)
from k1.forward import Batch, read_text
from k1.levels import index_levels
from k1.topology import Topology
from tests.reference import bucket_of, count_text, loop_evidence, next_batch, small_config

CONFIG = small_config().evidence
TABLE = CONFIG.buckets + CONFIG.context_buckets


def family(children=3):
    tree = Topology((1, children), children)
    for _ in range(children):
        tree.insert(0)
    return index_levels([tree], torch.device("cpu"))


def evidence(counts, tokens, starts=None, config=CONFIG):
    """Evidence [child, B, T] of the root's children, by the code under test."""
    starts = torch.zeros_like(tokens, dtype=torch.bool) if starts is None else starts
    _, kids = family(counts.shape[0])
    bigram, context = hash_bigrams(tokens[None], config)
    mask = history_mask(starts[None])
    (found,) = levels_evidence([counts[None]], [kids], bigram, context, mask, config)
    return found[0].view(counts.shape[0], *tokens.shape)


def random_case(seed, children=3, windows=4, time=12):
    g = torch.Generator().manual_seed(seed)
    counts = (torch.rand(children, 3, TABLE, generator=g) ** 3 * 5 * UNIT).long()
    tokens = torch.randint(0, 256, (windows, time), generator=g)
    starts = torch.rand(windows, time, generator=g) < 0.15
    return counts, tokens, starts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tau", "strength"), [(1.0, 16.0), (0.3, 2.5)])
def test_evidence_equals_explicit_loops(seed, tau, strength):
    config = dataclasses.replace(CONFIG, tau=tau, strength=strength)
    counts, tokens, starts = random_case(seed)
    found = evidence(counts, tokens, starts, config)
    tables = (counts.sum(1).double() / UNIT).tolist()
    for window in range(len(tokens)):
        rows = loop_evidence(tables, tokens[window].tolist(), starts[window].tolist(), config)
        torch.testing.assert_close(found[:, window], torch.tensor(rows), rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 1 * tau


def test_two_families_are_pooled_apart():
    tree = Topology((1, 2, 4), 2)
    for parent in (0, 0, 1, 1, 2, 2):
        tree.insert(parent)
    levels = index_levels([tree], torch.device("cpu"))
    counts, tokens, starts = random_case(9, children=4)
    bigram, context = hash_bigrams(tokens[None], CONFIG)
    mask = history_mask(starts[None])
    found = levels_evidence([counts[None]], levels[2:], bigram, context, mask, CONFIG)[0][0]
    for pair in ((0, 1), (2, 3)):
        alone = evidence(counts[list(pair)], tokens, starts).flatten(1)
        torch.testing.assert_close(found[list(pair)], alone, rtol=1e-4, atol=1e-4)


def test_hash_is_the_documented_one():
    tokens = torch.randint(0, 50_000, (1, 2, 9))
    bigram, context = hash_bigrams(tokens, CONFIG)
    for window in range(2):
        row = tokens[0, window].tolist()
        for t, (before, token) in enumerate(itertools.pairwise(row), start=1):
            assert int(bigram[0, window, t]) == bucket_of(before, token, CONFIG.buckets)
            assert int(context[0, window, t]) == before % CONFIG.context_buckets


def test_a_child_without_a_history_gets_zero_evidence():
    counts, tokens, starts = random_case(1)
    counts[1] = 0
    found = evidence(counts, tokens, starts)
    assert not found[1].any()
    assert found[0].abs().max() > 0.1


def test_children_with_equal_counts_get_equal_evidence():
    counts, tokens, starts = random_case(2)
    counts[2] = counts[0]
    found = evidence(counts, tokens, starts)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    same = evidence(counts[[0, 0]], tokens, starts)
    assert torch.equal(same[0], same[1])


def test_only_the_sum_over_ages_matters():
    counts, tokens, starts = random_case(3)
    moved = counts.flip(1)
    assert torch.equal(evidence(counts, tokens, starts), evidence(moved, tokens, starts))
    rotated = counts.clone()
    rotate(rotated)
    assert torch.equal(evidence(counts, tokens, starts), evidence(rotated, tokens, starts))


def test_evidence_is_causal_and_starts_anew_with_a_document():
    counts, tokens, _ = random_case(4, windows=1)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, 6] = True
    before = evidence(counts, tokens, starts)
    changed = tokens.clone()
    changed[0, 4] += 1
    after = evidence(counts, changed, starts)
    torch.testing.assert_close(after[..., :4], before[..., :4])
    torch.testing.assert_close(after[..., 6:], before[..., 6:])
    assert (after[..., 4:6] - before[..., 4:6]).abs().max() > 1e-3
    assert not before[..., [0, 6]].any()  # the first token of a window or document says nothing
    assert before[..., 7].any()


def test_history_mask_by_loops():
    starts = torch.zeros(1, 1, 9, dtype=torch.bool)
    starts[0, 0, [3, 7]] = True
    mask = history_mask(starts)[0, 0]
    document = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    for t in range(9):
        for s in range(9):
            same = document[s] == document[t] and s <= t and s not in (0, 3, 7)
            assert float(mask[t, s]) == same


def batch_for_counting(seed=0, picked=2):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (1, 3, 8), generator=g)
    starts = torch.rand(1, 3, 8, generator=g) < 0.2
    share = torch.rand(1, picked, 24, generator=g)
    text = read_text(Batch(tokens, tokens, starts, tokens[..., 0]), small_config())
    return text, share, tokens[0], starts[0]


def test_counts_are_exact_integers_of_the_shares():
    text, share, tokens, starts = batch_for_counting()
    counts = torch.zeros(1, 5, 3, TABLE, dtype=torch.int64)
    args = text.bigram, text.context, text.valid, CONFIG
    add_counts(counts, torch.tensor([[3, 1]]), share, *args)
    expected = torch.zeros(5, 3, TABLE, dtype=torch.int64)
    for row, slot in enumerate((3, 1)):
        for window in range(3):
            for t in range(1, 8):
                if not starts[window, t]:
                    before, token = int(tokens[window, t - 1]), int(tokens[window, t])
                    weight = round(float(share[0, row, window * 8 + t]) * UNIT)
                    at = bucket_of(before, token, CONFIG.buckets)
                    expected[slot, CURRENT, at] += weight
                    at = CONFIG.buckets + before % CONFIG.context_buckets
                    expected[slot, CURRENT, at] += weight
    assert torch.equal(counts[0], expected)
    n = CONFIG.buckets
    assert torch.equal(counts[..., :n].sum(-1), counts[..., n:].sum(-1))


def test_counts_do_not_depend_on_the_order():
    batches = [batch_for_counting(seed) for seed in range(4)]
    results = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        counts = torch.zeros(1, 5, 3, TABLE, dtype=torch.int64)
        for i in order:
            text, share, *_ = batches[i]
            slots = torch.tensor([[2, 4]])
            add_counts(counts, slots, share, text.bigram, text.context, text.valid, CONFIG)
        results.append(counts)
    assert torch.equal(*results) and results[0].any()


def test_rotate_moves_ages_and_conserves_the_sum():
    counts = random_case(5)[0]
    before = counts.clone()
    rotate(counts)
    assert torch.equal(counts.sum(1), before.sum(1))
    assert torch.equal(counts[:, OLD], before[:, OLD] + before[:, PREVIOUS])
    assert torch.equal(counts[:, PREVIOUS], before[:, CURRENT])
    assert not counts[:, CURRENT].any()


def test_ages_follow_the_window_while_training(make):
    trainer = make(evidence={"window": 4})
    ages = trainer.arena["evidence"][0]
    sums = []
    for step in range(12):
        trainer.train(1)
        old, previous, current = ages.sum((0, 2)).tolist()
        assert (previous > 0) == (step >= 4) and (old > 0) == (step >= 8) and current > 0
        sums.append(old + previous + current)
    assert sums == sorted(sums) and ages.min() >= 0


@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_a_step_counts_the_batch_by_the_share_of_routing(make, mode):
    trainer = make(update={"mode": mode}, train={"top_k": 2})
    trainer.train(5)
    batch = next_batch(trainer)
    text = read_text(batch, trainer.config)
    share_of = trainer.engine.gradients(0, 1, batch, text)[3].share
    before = trainer.arena["evidence"][0].clone()
    rotates = trainer.steps % CONFIG.window == 0
    assert not rotates
    report = trainer.step()
    gained = trainer.arena["evidence"][0] - before
    tree = trainer.tree
    on_path = {tree.slot_of(i) for i in report.scales} - {0}
    assert len(on_path) == 2
    for slot, block in tree.blocks.items():
        if slot in on_path:
            share = share_of[block.level][0, slot - tree.offset[block.level]]
            share = share.expand(text.valid.numel())[text.valid.flatten()]
            expected = int((share * UNIT).round().sum())
            n = CONFIG.buckets
            assert abs(int(gained[slot, CURRENT, :n].sum()) - expected) <= 3
            assert gained[slot, CURRENT, :n].sum() == gained[slot, CURRENT, n:].sum()
            assert not gained[slot, [OLD, PREVIOUS]].any()
        else:
            assert not gained[slot].any()


def test_counted_text_routes_unseen_text_of_its_kind(make, data):
    trainer = make()
    evidence = trainer.arena["evidence"][0]
    nodes = trainer.tree.children(0)
    for slot, domain in zip(nodes, ("alpha", "beta"), strict=True):
        evidence[slot] = count_text(data.tokens(domain, "train")[:4000].tolist(), CONFIG)
    for which, domain in enumerate(("alpha", "beta")):
        batch = trainer.store.spread("validation", domain, 32)
        text = read_text(batch, trainer.config)
        weight = trainer.engine.gradients(0, 1, batch, text)[3].share[1][0]
        late = weight.view(2, 32, 16)[:, :, -1]
        assert (late[which] > 0.5).float().mean() > 0.9
        assert late[which].mean() > 0.85
        first = weight.view(2, 32, 16)[:, :, 0]
        torch.testing.assert_close(first, torch.full_like(first, 0.5))
