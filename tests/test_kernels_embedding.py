"""The kernels for the embedding and for sums over rows, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernel_harness import ON_GPU, Draw, device, repeats_in_a_graph

# Lanes, windows, tokens in each, context, vocabulary, embed.
SIZES = [
    (1, 5, 16, 16, 300, 64),
    (3, 7, 16, 24, 50, 64),  # shorter than the context; groups end within lanes
    (2, 3, 64, 64, 9, 128),
    (2, 1, 32, 40, 5000, 64),  # most ids do not occur
]
LARGE = [(1, 256, 64, 64, 10_000, 128), (2, 37, 128, 128, 50_257, 256), (64, 16, 64, 64, 256, 64)]


def draw_tokens(size):
    """Half of the tokens of the first lane are one; windows are a part of longer ones."""
    lanes, windows, time, _, vocab, _ = size
    generator = torch.Generator().manual_seed(vocab)
    tokens = torch.randint(vocab, (lanes, windows + 2, time + 1), generator=generator)
    often = torch.rand(windows + 2, time + 1, generator=generator) < 0.5
    tokens[0][often] = vocab // 2
    tokens[-1, 0, 0], tokens[-1, 0, 1] = 0, vocab - 1
    return tokens.to(device())[:, :windows, :time]


def views(shared, size):
    """Table, positions and what lies before them and behind them in the shared rows."""
    _, _, _, context, vocab, d = size
    before, table, position, behind = shared.split([16, vocab * d, context * d, 32], dim=1)
    return table.unflatten(1, (vocab, d)), position.unflatten(1, (context, d)), before, behind


def check_embedding(size, dtype):
    from k1.kernels.embedding import embed_tokens, embedding_gradient, order_tokens
    from k1.kernels.sums import sum_rows

    lanes, windows, time, context, vocab, d = size
    draw, inputs = Draw(0), draw_tokens(size)
    assert not inputs.is_contiguous()
    shared = draw(lanes, 48 + (vocab + context) * d)
    table, position, *_ = views(shared, size)
    flow = torch.full((lanes + 1, windows * time, d), 7.0, device=device(), dtype=dtype)
    embed_tokens(table, position, inputs, flow[:lanes])
    places = position[:, None, :time]
    plain = torch.stack([F.embedding(i, t) for i, t in zip(inputs, table, strict=True)]) + places
    assert torch.equal(flow[:lanes], plain.to(dtype).flatten(1, 2))
    assert bool((flow[lanes] == 7).all())

    grad = draw(lanes + 1, windows * time, d).to(dtype)
    order = order_tokens(inputs, vocab)
    by_shared = torch.full_like(shared, torch.nan)

    def derive():
        by_table, by_position, *_ = views(by_shared, size)
        embedding_gradient(order, grad[:lanes], by_table)
        sum_rows(grad[:lanes].view(lanes, windows, -1), by_position.flatten(1))
        return [by_table, by_position]

    leaves = [t.double().requires_grad_() for t in (table, position)]
    exact = torch.stack([F.embedding(i, t) for i, t in zip(inputs, leaves[0], strict=True)])
    exact = (exact + leaves[1][:, None, :time]).flatten(1, 2)
    wanted = torch.autograd.grad(exact, leaves, grad[:lanes].double())
    # Tensor cores round each of the partial sums of thousands of numbers towards zero.
    error = 1e-4 if dtype == torch.float32 else 1e-2
    for found, want in zip(derive(), wanted, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=error)
        assert bool((found[want == 0] == 0).all())
    before, behind = views(by_shared, size)[2:]
    assert bool(before.isnan().all()) and bool(behind.isnan().all())
    if inputs.is_cuda:
        assert repeats_in_a_graph(derive)
        assert repeats_in_a_graph(lambda: list(vars(order_tokens(inputs, vocab)).values())[:3])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_embedding(interpreted, size):
    interpreted(check_embedding, size, torch.float32)


@pytest.mark.parametrize("size", [pytest.param(s, marks=ON_GPU) for s in [*SIZES, *LARGE]], ids=str)
def test_embedding_on_a_gpu(size):
    check_embedding(size, torch.bfloat16)


def check_order(size):
    from k1.kernels.embedding import order_tokens

    vocab, inputs = size[4], draw_tokens(size)
    order = order_tokens(inputs, vocab)
    key = inputs.flatten(1) + torch.arange(len(inputs), device=device())[:, None] * vocab
    assert torch.equal(order.key.long(), key.flatten()[order.place])
    again = order.key[1:] == order.key[:-1]
    assert bool((order.key.diff() >= 0).all()) and bool((order.place.diff()[again] > 0).all())
    assert 1 <= order.ids <= 16
    first = torch.arange(0, vocab, order.ids, device=device())
    bounds = torch.cat([first + lane * vocab for lane in range(len(inputs))])
    wanted = (order.key[:, None] < bounds).sum(0)
    assert torch.equal(order.start.long(), F.pad(wanted, (0, 1), value=key.numel()))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_order(kernels, size):
    kernels(check_order, size)


def check_neighbours(size):
    """A lane's NaN is its own, and its bits are those that it has alone."""
    from k1.kernels.embedding import embedding_gradient, order_tokens

    lanes, windows, time, _, vocab, d = size
    draw, inputs = Draw(1), draw_tokens(size)
    grad = draw(lanes, windows * time, d)
    found = [torch.full((lanes, vocab, d), torch.nan, device=device()) for _ in range(2)]
    for out in found:
        embedding_gradient(order_tokens(inputs, vocab), grad, out)
        grad[1, 2] = torch.nan
    assert found[1][1].isnan().any() and not found[0].isnan().any()
    others = [lane for lane in range(lanes) if lane != 1]
    assert torch.equal(found[0][others], found[1][others])
    alone = torch.full((1, vocab, d), torch.nan, device=device())
    embedding_gradient(order_tokens(inputs[2:], vocab), grad[2:], alone)
    assert torch.equal(alone[0], found[0][2])


def test_a_lane_does_not_depend_on_its_neighbours(kernels):
    kernels(check_neighbours, SIZES[1])
