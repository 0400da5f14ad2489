"""Random numbers as a function of seed and counter, and the windows drawn with them."""

import hashlib

import pytest
import torch
from scipy import stats

from k1.data import POOLS
from k1.rng import derive_seed, random_bits, random_uniform
from k1.sampling import TokenStore


def seeds(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_numbers_do_not_depend_on_the_company():
    seed, counter = seeds(3, -9, 2**61, 5), seeds(0, 7, 123456789, 2**40)
    together = random_bits(seed, 2, counter, 9)
    for lane in range(4):
        alone = random_bits(seed[lane : lane + 1], 2, counter[lane : lane + 1], 9)
        assert torch.equal(alone[0], together[lane])
        assert torch.equal(random_bits(seed, 2, counter, 4)[lane], together[lane, :4])
    order = [2, 0, 3, 1]
    assert torch.equal(random_bits(seed[order], 2, counter[order], 9), together[order])
    uniform = random_uniform(seed, 2, counter, 9)
    assert torch.equal(random_uniform(seed[1:3], 2, counter[1:3], 9), uniform[1:3])


def finalise(x):
    """SplitMix64's finaliser, in Python's own integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_numbers_are_the_same_on_every_machine():
    golden = 0x9E3779B97F4A7C15
    base = finalise(finalise(3 * golden + 1) + 5 * golden)
    expected = [finalise(base + i * golden) >> 2 for i in (1, 2)]
    assert random_bits(seeds(3), 1, seeds(5), 2).tolist() == [expected]
    uniform = [(bits >> 38) / 2**24 for bits in expected]
    assert random_uniform(seeds(3), 1, seeds(5), 2).tolist() == [uniform]
    digest = hashlib.sha256(b"data/0").digest()
    assert derive_seed("data", 0) == int.from_bytes(digest[:8], "big") >> 2


def test_seed_stream_and_counter_all_matter():
    base = random_bits(seeds(1), 1, seeds(1), 64)
    for seed, stream, counter in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        other = random_bits(seeds(seed), stream, seeds(counter), 64)
        assert not (other == base).any()
    assert derive_seed("a", 1) != derive_seed("a", 2) != derive_seed("b", 2)


@pytest.mark.parametrize("by", ["seed", "counter", "width"])
def test_uniform_numbers_are_uniform(by):
    n = 40_000
    if by == "width":
        u = random_uniform(seeds(11), 1, seeds(5), n)[0]
    else:
        many, one = torch.arange(n), torch.full((n,), 4)
        pair = (many, one) if by == "seed" else (one, many)
        u = random_uniform(pair[0], 1, pair[1], 1)[:, 0]
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    pairs = (u[0::2] * 8).long() * 8 + (u[1::2] * 8).long()  # neighbours are independent
    assert stats.chisquare(torch.bincount(pairs, minlength=64).numpy()).pvalue > 1e-4


def test_bits_are_balanced():
    bits = random_bits(torch.arange(500), 3, torch.zeros(500, dtype=torch.int64), 20).flatten()
    assert bits.min() >= 0 and bits.max() < 2**62
    for position in range(62):
        share = float(((bits >> position) & 1).float().mean())
        assert abs(share - 0.5) < 0.02, position


@pytest.fixture(scope="module")
def store(data):
    return TokenStore(data, 16, "cpu")


def draw(store, pool, mix, windows=64, seed=5, counter=0):
    row = torch.tensor([mix])
    return store.sample(pool, seeds(seed), seeds(counter), row, windows)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("domain", range(3))
def test_windows_lie_in_the_pool_and_domain_asked_for(data, pool, domain):
    store = TokenStore(data, 60, "cpu")  # long enough to occur once
    mix = [float(d == domain) for d in range(3)]
    text = bytes(data.tokens(data.domains[domain], pool).tolist())
    others = [
        bytes(data.tokens(d, p).tolist())
        for d in data.domains
        for p in POOLS
        if (d, p) != (data.domains[domain], pool)
    ]
    for batch in (draw(store, pool, mix), store.spread(pool, data.domains[domain], 64)):
        assert (batch.domain == domain).all()
        windows = torch.cat([batch.inputs, batch.targets[..., -1:]], -1)[0]
        for window in windows.tolist():
            assert bytes(window) in text
            assert not any(bytes(window) in other for other in others)


def test_first_and_last_window_of_a_pool_can_be_drawn(data):
    short = min(len(data.tokens(d, p)) for d in data.domains for p in POOLS)
    store = TokenStore(data, short - 2, "cpu")
    domain, pool = next(
        (d, p) for d in data.domains for p in POOLS if len(data.tokens(d, p)) == short
    )
    mix = [float(d == domain) for d in data.domains]
    batch = draw(store, pool, mix, windows=64)
    text = data.tokens(domain, pool).long()
    found = {tuple(w) for w in torch.cat([batch.inputs, batch.targets[..., -1:]], -1)[0].tolist()}
    assert found == {tuple(text[:-1].tolist()), tuple(text[1:].tolist())}


def test_windows_are_spread_over_the_pool(store, data):
    length = len(data.tokens("alpha", "train"))
    text = bytes(data.tokens("alpha", "train").tolist())
    batch = draw(store, "train", [1.0, 0.0, 0.0], windows=2000)
    where = [text.find(bytes(w)) for w in batch.inputs[0].tolist()]
    counts = torch.histc(torch.tensor(where).float(), 20, 0, length)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("mix", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.3, 0.0), (0.1, 0.0, 0.9)])
@pytest.mark.parametrize("windows", [4, 8])
def test_the_mix_is_followed_in_the_long_run_and_in_every_batch(store, mix, windows):
    total = torch.zeros(3)
    for counter in range(300):
        batch = draw(store, "train", list(mix), windows, counter=counter)
        counts = torch.bincount(batch.domain[0], minlength=3)
        total += counts
        for count, share in zip(counts.tolist(), mix, strict=True):
            assert abs(count - share * windows) < 2.5
            assert share > 0 or count == 0
    assert (total / total.sum()).tolist() == pytest.approx(list(mix), abs=0.02)


def test_batches_belong_to_seed_and_counter_alone(store):
    mix = torch.full((3, 3), 1 / 3)
    together = store.sample("train", seeds(1, 2, 1), seeds(0, 0, 1), mix, 4)
    for lane, (seed, counter) in enumerate(((1, 0), (2, 0), (1, 1))):
        alone = draw(store, "train", [1 / 3] * 3, 4, seed, counter)
        assert torch.equal(alone.inputs[0], together.inputs[lane])
    a, b, c = together.inputs
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_training_reads_the_next_batch_at_every_step(make):
    trainer = make()
    assert int(trainer.arena["data_cursor"][0]) == 0
    trainer.train(3)
    assert int(trainer.arena["data_cursor"][0]) == 3
    trainer.set_mix({"gamma": 2.0, "alpha": 2.0})
    assert trainer.arena["mix"][0].tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("pool", POOLS)
def test_evaluation_windows_are_fixed_and_do_not_overlap(store, pool):
    a, b = store.spread(pool, "beta", 40), store.spread(pool, "beta", 40)
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
    assert a.inputs.shape == (1, 40, 16)
    assert len({tuple(w) for w in a.inputs[0].tolist()}) == 40


def test_spread_takes_what_fits(store, data):
    length = len(data.tokens("beta", "gate"))
    batch = store.spread("gate", "beta", 10**6)
    assert batch.inputs.shape[1] == (length - 1) // 16
    text = data.tokens("beta", "gate").long()
    assert torch.equal(batch.inputs[0, 0], text[:16])
    assert torch.equal(batch.targets[0, -1], text[-16:])
    assert store.spread("gate", "beta", 1).inputs.shape[1] == 1


def test_pools_are_disjoint(data):
    documents = {}
    for domain in data.domains:
        for pool in POOLS:
            tokens = bytes(data.tokens(domain, pool).tolist())
            documents[domain, pool] = {text.strip() for text in tokens.split(b"\n\n")}
            assert len(documents[domain, pool]) >= 5
    keys = list(documents)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            assert not documents[a] & documents[b], (a, b)
