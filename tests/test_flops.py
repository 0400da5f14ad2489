"""The formula for a step's operations against PyTorch's own counter, on the plain engine."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from k1.bench.timing import PRODUCTS
from k1.flops import block_flops_per_token, measuring_flops, step_flops
from tests.reference import small_config

BLOCKS, PATH, VOCAB = 7, 3, 256
NEVER_AGAIN = 1 << 40


def sizes(**update):
    """Windows so short that attention, which the counter takes in full, hardly counts."""
    model = {"embed": 32, "feed_forward": 64, "context": 8, "router": "mean"}
    return small_config(model=model, train={"batch": 8, "top_k": 2}, update=update)


def counted(make, config, steps=4):
    """Operations of a step, on average over some steps after the first ones."""
    engine = make(config).engine
    engine.train(0, 1, steps)
    # The counter does not know the fused attention of a CPU.
    counter = FlopCounterMode(display=False, custom_mapping=PRODUCTS)
    with sdpa_kernel(SDPBackend.MATH), counter:
        engine.train(0, 1, steps)
    return counter.get_total_flops() / steps


@pytest.mark.parametrize(
    "update",
    [
        {"mode": "dense"},
        {"mode": "exact"},
        {"mode": "sparse", "attribution_every": NEVER_AGAIN},
        {"mode": "sparse", "attribution_every": 2, "probe_fraction": 0.25},
        {"mode": "sparse", "attribution_every": NEVER_AGAIN, "inner_steps": 2},
        {"mode": "sparse", "attribution_every": 4, "inner_steps": 4},
    ],
    ids=lambda update: "-".join(str(value) for value in update.values()),
)
def test_the_formula_agrees_with_the_counter(make, update):
    config = sizes(**update)
    formula = step_flops(config, VOCAB, BLOCKS, PATH)
    if update["mode"] == "sparse":
        # The formula is the same for every device; on a CPU path blocks need not run twice.
        tokens = config.train.batch * config.model.context
        formula -= PATH * block_flops_per_token(config) * tokens
    assert 1 <= counted(make, config) / formula < 1.06


def test_the_formula_of_measuring_agrees_with_the_counter(make):
    trainer = make(sizes(mode="dense"))
    batch = trainer.engine.store.spread("validation", trainer.data.domains[0], 8)
    counter = FlopCounterMode(display=False, custom_mapping=PRODUCTS)
    with sdpa_kernel(SDPBackend.MATH), counter:
        trainer.engine.bits_per_byte(0, 1, batch)
    formula = measuring_flops(trainer.config, trainer.data.vocab_size, BLOCKS, 8)
    assert 1 <= counter.get_total_flops() / formula < 1.06
