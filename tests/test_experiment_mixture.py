"""A flat top-1 mixture of experts, against a loop over tokens and closed forms."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from k1.experiments.learner import Learner
from k1.experiments.mixture import MixtureLearner, places, run_experts, run_stack
from k1.forward import lane_loss, read_text
from tests.experiment_helpers import Build, go, next_batch_of

D, WIDTH, EXPERTS = 6, 5, 3


@pytest.fixture
def learn(data) -> Build:
    return Build(data)


def pieces(lanes: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A block's router and experts, with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "router.weight": (D, EXPERTS), "router.bias": (EXPERTS,),
        "mlp.in": (D, EXPERTS * WIDTH), "mlp.in_bias": (EXPERTS * WIDTH,),
        "mlp.out": (EXPERTS * WIDTH, D),
    }  # fmt: skip
    return {
        name: torch.randn(lanes, *shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def inputs(tokens: int, lanes: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(lanes, tokens, D, generator=generator)


def loop(p: dict[str, torch.Tensor], x: torch.Tensor, seats: int) -> torch.Tensor:
    """The same token by token."""
    out = torch.zeros_like(x)
    for lane in range(len(x)):
        taken = [0] * EXPERTS
        for n, token in enumerate(x[lane]):
            likelihood = torch.softmax(token @ p["router.weight"][lane] + p["router.bias"][lane], 0)
            e = int(likelihood.argmax())
            part = slice(e * WIDTH, (e + 1) * WIDTH)
            taken[e] += 1
            if taken[e] <= seats:
                h = F.gelu(token @ p["mlp.in"][lane][:, part] + p["mlp.in_bias"][lane][part])
                out[lane, n] = likelihood[e] * (h @ p["mlp.out"][lane][part])
    return out


@pytest.mark.parametrize(("capacity", "seats"), [(math.inf, 20), (1.0, 7)])
def test_each_token_gets_what_its_expert_makes_of_it(capacity, seats):
    p, x = pieces(), inputs(20).requires_grad_()
    found, _ = run_experts(p, x, WIDTH, capacity)
    expected = loop(p, x, seats)
    assert torch.allclose(found, expected, atol=1e-4)
    by = inputs(20).flip(1)
    gradients = [torch.autograd.grad((y * by).sum(), [x, *p.values()]) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_token_moves_exactly_one_expert():
    p, x = pieces(), inputs(20)
    found, _ = run_experts(p, x, WIDTH, math.inf)
    experts = set()
    for n in range(20):
        (gradient,) = torch.autograd.grad(found[0, n].sum(), [p["mlp.in"]], retain_graph=True)
        moved = gradient[0].unflatten(1, (EXPERTS, WIDTH)).abs().sum((0, 2)) > 0
        assert int(moved.sum()) == 1 and not gradient[1].any()
        experts.add(int(moved.long().argmax()))
    assert experts == {0, 1, 2}


def test_seats_are_taken_in_order():
    chosen = torch.tensor([[1, 1, 0, 1, 2], [2, 2, 2, 2, 0]])
    seat, token = places(chosen, 3, 2)
    none = 12
    assert seat.tolist() == [2, 3, 0, none, 4, 10, 11, none, none, 6]
    assert token.tolist() == [2, 10, 0, 1, 4, 10, 9, 10, 10, 10, 5, 6]


def test_the_balance_is_one_if_loads_are_even_and_all_if_one_expert_has_them():
    p = {name: t.detach() for name, t in pieces(1).items()}
    p["router.weight"] = torch.zeros(1, D, EXPERTS)
    p["router.weight"][0, :EXPERTS] = 50 * torch.eye(EXPERTS)
    p["router.bias"] = torch.zeros(1, EXPERTS)
    even = torch.eye(EXPERTS, D)[None].repeat(1, 4, 1)
    assert run_experts(p, even, WIDTH, math.inf)[1].item() == pytest.approx(1.0)
    assert run_experts(p, even[:, ::3], WIDTH, math.inf)[1].item() == pytest.approx(EXPERTS)


def test_the_penalty_alone_evens_the_loads_out():
    p, x = pieces(1), inputs(300, 1)
    bias = torch.tensor([[6.0, 0.0, 0.0]], requires_grad=True)
    p = {**p, "router.weight": 0.3 * p["router.weight"].detach(), "router.bias": bias}
    optimizer = torch.optim.SGD([bias], lr=1.0)

    def largest() -> float:
        chosen = (x @ p["router.weight"] + bias[:, None]).argmax(-1)
        return float(F.one_hot(chosen, EXPERTS).float().mean((0, 1)).max())

    assert largest() > 0.95
    for _ in range(200):
        optimizer.zero_grad()
        run_experts(p, x, WIDTH, math.inf)[1].sum().backward()
        optimizer.step()
    assert largest() < 0.45


def test_the_stack_has_the_parameters_of_the_tree_and_pays_for_all_seats(learn):
    learner, dense = learn("mixture"), learn("dense")
    assert isinstance(learner, MixtureLearner)
    a = learner.arena
    experts = a.config.model.max_children
    assert [len(learner.arena.trees[0].blocks), experts] == [3, 4]
    assert learner.parameters(0) == pytest.approx(dense.parameters(0), rel=0.1)
    d, f, context, vocab = 16, 24, a.config.model.context, a.vocab_size
    block = 2 * (4 * d * d + 1.25 * 2 * d * f + d * experts) + 2 * d * context
    tokens = a.config.train.batch * context
    assert learner.step_flops() == pytest.approx(3 * tokens * (3 * block + 2 * d * vocab))
    assert learner.step_flops() < dense.step_flops() / 1.5


def test_a_step_follows_loss_and_penalty_and_reports_the_loss(learn):
    learner = go(learn("mixture", runs=2), 1)
    engine, a = learner.engine, learner.arena
    batch = next_batch_of(learner)
    found = engine._all_gradients(0, 2, batch, read_text(batch, a.config))
    forest = a.forest(0, 2)
    rows = forest.rows.clone().requires_grad_()
    weights = replace(forest, rows=rows).weights()
    output, uneven = run_stack(weights, batch, a.config, learner.width, 1.25)
    loss = lane_loss(weights, output, batch)
    (expected,) = torch.autograd.grad((loss + 0.01 * uneven).sum(), [rows])
    assert torch.allclose(found.loss, loss) and found.loss.min() > 1
    assert torch.allclose(found.by_row[0][1], expected.flatten(0, 1), atol=1e-7)
    assert (uneven >= 3 - 1e-3).all()  # three blocks


def test_experts_share_the_text_and_learn_it(learn):
    learner = learn("mixture")
    learner.begin(0)
    batch = learner.store.spread("validation", "beta", 8)

    def reading() -> float:
        with torch.no_grad():
            return float(learner.reading(0, 1)(batch).mean())

    before = reading()
    learner.train(0, 60, 60)
    assert reading() < before - 1
    forest = learner.arena.forest(0, 1)
    for rows in forest.weights().levels:
        assert (forest.block_layout.unpack(rows[0, 0])["router.weight"] != 0).any()
    with torch.no_grad():
        _, uneven = run_stack(forest.weights(), batch, forest.config, learner.width, math.inf)
    assert float(uneven) < 3 * 1.5


def test_text_is_read_alike_in_whatever_batch_it_comes(learn):
    learner = go(learn("mixture"), 1, steps=8)
    batch = learner.store.spread("validation", "beta", 8)
    with torch.no_grad():
        whole = learner.reading(0, 1)(batch)
        part = learner.reading(0, 1)(batch.head(3))
        torch.testing.assert_close(whole[..., : part.shape[-1]], part, rtol=1e-5, atol=1e-5)
    assert Learner.parameters(learner, 0) == learner.parameters(0)
