"""The chunked linear cross-entropy against whole logits in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import k1.head
from k1.head import cross_entropy_gradients, mean_cross_entropy, token_cross_entropy

NAMES = ("loss", "d_hidden", "d_head")
INCOMING = torch.tensor([1.0, -2.5, 0.25])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(lanes=3, tokens=37, d=12, vocab=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(lanes, tokens, d, generator=generator),
        torch.randn(lanes, d, vocab, generator=generator) / math.sqrt(d) * 2,
        torch.randint(vocab, (lanes, tokens), generator=generator),
    )


def whole_losses(hidden, head, targets):
    """Loss of every token from all logits."""
    logits = hidden @ head
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def whole_mean(*values):
    return whole_losses(*values).mean(1)


def derive(function, values, dtype=torch.float64):
    """Losses and gradients for incoming gradients that differ by lane."""
    *parameters, targets = values
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in parameters]
    loss = function(*leaves, targets)
    incoming = INCOMING[: len(loss)].to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


def fit_tokens(monkeypatch, tokens, vocab, itemsize=4):
    """Make chunks of so many tokens."""
    size = tokens * vocab * itemsize
    monkeypatch.setattr(k1.head, "_CHUNK_BYTES", {"cpu": size, "cuda": size})


@pytest.mark.parametrize("tokens", [1, 8, 36, 37, 74, 500])
def test_loss_and_gradients_equal_those_of_whole_logits(monkeypatch, tokens):
    fit_tokens(monkeypatch, tokens, 61)
    values = draw()
    found = derive(mean_cross_entropy, values, torch.float32)
    for name, ours, exact in zip(NAMES, found, derive(whole_mean, values), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.double(), exact, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_gradients_are_those_of_finite_differences(monkeypatch):
    fit_tokens(monkeypatch, 2, 7, itemsize=8)
    *parameters, targets = draw(2, 5, 3, 7)
    leaves = [value.double().requires_grad_() for value in parameters]
    assert torch.autograd.gradcheck(lambda *p: mean_cross_entropy(*p, targets), leaves)


@pytest.mark.parametrize("tokens", [5, 40, 500])
def test_token_losses_equal_those_of_whole_logits(monkeypatch, tokens):
    fit_tokens(monkeypatch, tokens, 61)
    hidden, head, targets = draw()
    found = token_cross_entropy(hidden.requires_grad_(), head, targets)
    exact = whole_losses(hidden.double(), head.double(), targets)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and not found.requires_grad
    with torch.no_grad():
        assert torch.equal(mean_cross_entropy(hidden, head, targets), found.mean(1))


def check_scaled(dtype, device, tokens=37, d=12, vocab=61):
    """A factor is in the gradients and not in the losses, and the head's go where they are told."""
    hidden, head, targets = (v.to(device) for v in draw(tokens=tokens, d=d, vocab=vocab))
    hidden, scale = hidden.to(dtype), 1 / tokens
    losses, *plain = cross_entropy_gradients(hidden, head, targets)
    shared = torch.full((3, 40 + d * vocab), math.nan, device=device)
    place = shared[:, 8:-32].unflatten(1, (d, vocab))
    same, *scaled = cross_entropy_gradients(hidden, head, targets, scale=scale, by_head=place)
    assert torch.equal(same, losses) and scaled[1] is place
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, want in zip(scaled, plain, strict=True):
        assert found.dtype == want.dtype
        assert float((found.double() / scale - want).norm() / want.norm()) < tolerance
    assert bool(shared[:, :8].isnan().all()) and bool(shared[:, -32:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [10, 60, 500])
def test_gradients_can_be_scaled_and_placed(monkeypatch, tokens, dtype):
    fit_tokens(monkeypatch, tokens, 61, dtype.itemsize)
    check_scaled(dtype, "cpu")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("chunk", [100, 500, 5000])
def test_gradients_can_be_scaled_and_placed_on_a_gpu(monkeypatch, chunk):
    fit_tokens(monkeypatch, chunk, 512, 2)
    check_scaled(torch.bfloat16, "cuda", 300, 64, 512)


def test_no_chunk_is_larger_than_allowed(monkeypatch):
    fit_tokens(monkeypatch, 10, 61)
    sizes, product = [], torch.bmm

    def record(*args, **options):
        out = product(*args, **options)
        if out.shape[-1] == 61:
            sizes.append(out.shape[0] * out.shape[1])
        return out

    monkeypatch.setattr(torch, "bmm", record)
    derive(mean_cross_entropy, draw(), torch.float32)
    assert max(sizes) <= 10 and sum(sizes) == 3 * 37


def test_large_and_hopeless_losses_are_exact():
    hidden = torch.ones(1, 2, 1)
    head = torch.tensor([[[0.0, 300.0, 20.0]]])
    targets = torch.tensor([[0, 1]])
    values = (hidden, head, targets)
    assert token_cross_entropy(*values).tolist() == [[300.0, 0.0]]
    assert derive(mean_cross_entropy, values, torch.float32)[0].tolist() == [150.0]


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_only_what_is_wanted_is_derived(monkeypatch, wanted):
    fit_tokens(monkeypatch, 10, 61)
    *parameters, targets = draw()
    expected = derive(mean_cross_entropy, (*parameters, targets), torch.float32)[1:]
    for index in wanted:
        parameters[index].requires_grad_()
    loss = mean_cross_entropy(*parameters, targets)
    kept = [tensor is not None for tensor in loss.grad_fn.saved_tensors]
    assert kept == [index in wanted for index in range(2)]
    loss.backward(INCOMING)
    for index in wanted:
        torch.testing.assert_close(parameters[index].grad, expected[index])


@pytest.mark.parametrize("tokens", [10, 60, 500])
def test_a_nan_stays_in_its_lane(monkeypatch, tokens):
    fit_tokens(monkeypatch, tokens, 61)
    values = draw()
    clean = derive(mean_cross_entropy, values, torch.float32)
    values[0][1, 3, 2] = math.nan
    dirty = derive(mean_cross_entropy, values, torch.float32)
    for before, after in zip(clean, dirty, strict=True):
        assert after[1].isnan().any()
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("tokens", [10, 500])
def test_a_lane_does_not_depend_on_its_neighbours(monkeypatch, tokens):
    fit_tokens(monkeypatch, tokens, 61)
    values = draw()
    together = derive(mean_cross_entropy, values, torch.float32)
    alone = derive(mean_cross_entropy, [value[:1] for value in values], torch.float32)
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(one, many[:1], rtol=1e-6, atol=1e-7)


def relative_errors(values, dtype, device):
    """How far loss and gradients are from exact ones, by norm."""
    hidden, head, targets = (value.to(device) for value in values)
    hidden = hidden.to(dtype)
    exact = derive(whole_mean, (hidden, head, targets))
    leaves = [value.clone().requires_grad_() for value in (hidden, head)]
    loss = mean_cross_entropy(*leaves, targets)
    grads = torch.autograd.grad(loss, leaves, INCOMING[: len(loss)].to(device))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]
    return {
        name: float((ours.double() - true).norm() / true.norm())
        for name, ours, true in zip(NAMES, (loss.detach(), *grads), exact, strict=True)
    }


def test_bfloat16_is_near_the_exact_result(monkeypatch):
    fit_tokens(monkeypatch, 10, 61, itemsize=2)
    errors = relative_errors(draw(), torch.bfloat16, "cpu")
    assert max(errors.values()) < 1e-2, errors
    assert max(errors.values()) > 1e-4  # it was bfloat16


def check_rows(vocab, dtype=torch.float32, device="cpu"):
    """The kernel against float64: losses, gradient in place, and nothing written without one."""
    from k1.kernels.softmax import cross_entropy_rows

    lanes, tokens = 2, 3
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(lanes, tokens, vocab, generator=generator) * 3).to(device, dtype)
    targets = torch.randint(vocab, (lanes, tokens), generator=generator)
    targets[0, 0], targets[1, 2] = 0, vocab - 1
    targets = targets.to(device)
    logits[0, 1, 1] = 1000.0
    logits[1, 0, 0] = math.nan
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf.transpose(1, 2), targets, reduction="none")
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    losses = torch.full((lanes, tokens), -1.0, device=device)
    before = logits.clone()
    cross_entropy_rows(logits, targets, losses, gradient=False)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert losses.isnan().sum() == 1
    torch.testing.assert_close(
        losses.double(), exact.detach(), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    losses.fill_(-1.0)
    cross_entropy_rows(logits, targets, losses, gradient=True)
    torch.testing.assert_close(
        losses.double(), exact.detach(), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        logits.double(), slope, rtol=tolerance, atol=tolerance * 0.1, equal_nan=True
    )


@pytest.mark.parametrize("vocab", [2, 61, 128, 4096, 10_000])
def test_the_kernel_equals_the_exact_result(interpreted, vocab):
    interpreted(check_rows, vocab)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 61, 256, 10_000, 50_257])
def test_the_kernel_on_a_gpu(vocab, dtype):
    check_rows(vocab, dtype, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize(("tokens", "vocab"), [(300, 256), (3000, 10_000), (700, 50_257)])
def test_bfloat16_on_a_gpu_is_near_the_exact_result(lanes, tokens, vocab):
    errors = relative_errors(draw(lanes, tokens, 64, vocab), torch.bfloat16, "cuda")
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.gpu
@needs_gpu
def test_memory_on_a_gpu_stays_below_that_of_whole_logits():
    hidden, head, targets = (value.cuda() for value in draw(1, 65_536, 64, 10_000))
    leaves = [value.requires_grad_() for value in (hidden.bfloat16(), head)]
    for _ in range(2):  # the first time, libraries take their workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(mean_cross_entropy(*leaves, targets).sum(), leaves)
        used = torch.cuda.max_memory_allocated() - before
    whole = 2 * 65_536 * 10_000
    assert used < 0.4 * whole, f"{used / 2**20:.0f} MiB of {whole / 2**20:.0f}"


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_can_hold_it():
    hidden, head, targets = (value.cuda() for value in draw(2, 64, 32, 300))
    leaves = [value.requires_grad_() for value in (hidden, head)]

    def step():
        loss = mean_cross_entropy(*leaves, targets)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    for ours, again in zip(captured, step(), strict=True):
        torch.testing.assert_close(ours, again, rtol=1e-5, atol=1e-6)
