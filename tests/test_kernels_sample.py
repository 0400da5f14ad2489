"""The kernel that draws and reads a step's windows, against the plain code: the same bits."""

import pytest
import torch

from k1.config import EvidenceConfig
from k1.data import POOLS
from k1.forward import read_text
from k1.rng import STREAM_DOMAIN, random_uniform
from k1.sampling import GOLDEN_RATIO, TokenStore, draw
from tests.kernel_harness import device
from tests.reference import small_config

SEEDS = torch.tensor([5, -77, 1 << 60, 5])
COUNTERS = torch.tensor([0, 3, 99, 1 << 40])
DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class RandomText:
    """Tokens of any type in pools of different lengths, where documents begin often."""

    def __init__(self, seed, dtype, domains):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.domains = tuple(f"domain {i}" for i in range(domains))
        self.most = 256 if dtype == torch.uint8 else 30_000
        self.token_bytes = torch.ones(self.most)
        keys = [(domain, pool) for domain in self.domains for pool in POOLS]
        lengths = torch.randint(300, 900, (len(keys),), generator=self.generator).tolist()
        self.lengths = dict(zip(keys, lengths, strict=True))

    def require(self, tokens):
        assert tokens <= min(self.lengths.values())

    def tokens(self, domain, pool):
        shape = (self.lengths[domain, pool],)
        return torch.randint(self.most, shape, generator=self.generator).to(self.dtype)

    def starts(self, domain, pool):
        return torch.rand(self.lengths[domain, pool], generator=self.generator) < 0.1


def stores(data, context):
    """The same text where kernels run and on the CPU."""
    here = TokenStore(data, context, device())
    plain = TokenStore(data, context, "cpu")
    plain.tokens, plain.starts = here.tokens.cpu(), here.starts.cpu()
    return here, plain


def config_of(context, **evidence):
    return small_config().replace(model={"context": context}, evidence=evidence)


def check_equal(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        for name, tensor in vars(want).items():
            other = getattr(got, name)
            assert other.dtype == tensor.dtype, name
            assert torch.equal(other.cpu(), tensor), name


def check_sample(context, dtype, pool, windows, domains):
    from k1.kernels.sample import sample_fused

    here, plain = stores(RandomText(context, dtype, domains), context)
    generator = torch.Generator().manual_seed(windows)
    mix = torch.rand(len(SEEDS), domains, generator=generator)
    mix[1, 0] = mix[2, -1] = 0.0
    mix[0, domains // 2] = 0.0
    mix /= mix.sum(1, keepdim=True).clamp(min=1e-9)
    config = config_of(context, buckets=1024, context_buckets=128)
    on_device = (t.to(device()) for t in (SEEDS, COUNTERS, mix))
    found = sample_fused(here, pool, *on_device, windows, config.evidence)
    batch = plain.sample(pool, SEEDS, COUNTERS, mix, windows)
    check_equal(found, (batch, read_text(batch, config)))
    assert windows * context < 100 or (batch.starts[..., 0].any() and batch.starts[..., 1:].any())
    assert windows < 5 or len(batch.domain.unique()) == domains


def check_edges():
    """Some window of each lane falls on the edge of a domain, to the last bit or two."""
    from k1.kernels.sample import sample_fused

    lanes, windows, domains, context = 24, 8, 9, 4
    here, plain = stores(RandomText(0, torch.uint8, domains), context)
    seed, counter = torch.arange(lanes) * 7919, torch.arange(lanes) % 13
    window = torch.arange(lanes) % windows
    first = random_uniform(seed, STREAM_DOMAIN, counter, 1)[:, 0]
    u = (first + window * GOLDEN_RATIO) % 1.0
    mix = torch.rand(lanes, domains, generator=torch.Generator().manual_seed(1))
    mix *= (u / mix[:, :-1].sum(1))[:, None]
    edge = mix.cumsum(1)[:, -2]
    assert (edge < u).any() and (edge == u).any() and (edge > u).any()
    # Rounding matters: of the sum of shares, and of a product that is then added to.
    edge_in_float32 = torch.zeros(lanes)
    for share in mix[:, :-1].unbind(1):
        edge_in_float32 += share
    assert ((u >= edge_in_float32) != (u >= edge)).any()
    step = torch.tensor(GOLDEN_RATIO).double()
    u_rounded_once = (first.double() + window * step).float() % 1.0
    assert ((u_rounded_once >= edge) != (u >= edge)).any()
    on_device = (t.to(device()) for t in (seed, counter, mix))
    found, _ = sample_fused(here, "train", *on_device, windows, EvidenceConfig())
    check_equal([found], [plain.sample("train", seed, counter, mix, windows)])


def check_views():
    """Lanes may be any views, such as every second one, or one that stands for all."""
    from k1.kernels.sample import sample_fused

    here, plain = stores(RandomText(3, torch.int32, 2), 16)
    mix = torch.tensor([[0.25, 0.75]])
    state = [t.to(device())[1::2] for t in (SEEDS, COUNTERS)]
    found, _ = sample_fused(
        here, "gate", *state, mix.to(device()).expand(2, -1), 6, EvidenceConfig()
    )
    wanted = plain.sample("gate", SEEDS[1::2], COUNTERS[1::2], mix.expand(2, -1), 6)
    check_equal([found], [wanted])


def check_uniform():
    from k1.kernels.random import random_uniform_fused

    state = SEEDS.to(device()), COUNTERS.to(device())
    for width in (1, 37, 1500):
        found = random_uniform_fused(state[0], 3, state[1], width)
        wanted = random_uniform(SEEDS, 3, COUNTERS, width)
        assert found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted)


def check_step_batch():
    """The lanes' own streams: what a step with kernels reads is what one without reads."""
    from k1.arena import Arena

    config = config_of(16, buckets=256, context_buckets=32)
    here, plain = stores(RandomText(4, torch.uint8, 3), 16)
    arenas = [
        Arena(config, lanes=4, domains=3, vocab_size=256, device=d) for d in (device(), "cpu")
    ]
    for arena in arenas:
        for lane in range(4):
            arena.reset_lane(lane, lane)
            arena["data_cursor"][lane] = 10 * lane
        arena["mix"][2] = torch.tensor([0.0, 0.5, 0.5])
    wanted = draw(plain, arenas[1], 1, 4, kernels=False)
    check_equal(draw(here, arenas[0], 1, 4, kernels=True), wanted)
    assert wanted[0].inputs.shape == (3, config.train.batch, 16)


@pytest.mark.parametrize("context", [2, 16, 48, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_are_those_of_the_plain_code(kernels, context, dtype):
    kernels(check_sample, context, dtype, "train", 7, 3)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("windows", "domains"), [(1, 1), (8, 2), (11, 6)])
def test_every_pool_and_number_of_domains(kernels, pool, windows, domains):
    kernels(check_sample, 24, torch.uint8, pool, windows, domains)


def test_windows_on_the_edge_of_a_domain(kernels):
    kernels(check_edges)


def test_lanes_that_are_views(kernels):
    kernels(check_views)


def test_the_batch_of_a_step(kernels):
    kernels(check_step_batch)


def test_uniform_numbers(kernels):
    kernels(check_uniform)
