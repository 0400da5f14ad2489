"""Settings of PPO. Nothing here imports torch, so that a command line can show them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from k1.errors import ConfigError


@dataclass(frozen=True)
class PPOSettings:
    """How PPO learns."""

    learning_rate: float = 3e-4
    """Adam's learning rate."""
    n_steps: int = 64
    """Decisions of each environment between updates."""
    minibatches: int = 4
    """Parts that each epoch cuts the collected decisions into."""
    epochs: int = 6
    """Passes over the collected decisions; `target_kl` may end them early."""
    gamma: float = 0.997
    """Discount for each decision: an episode has 60 to 240 of them, if no trial cuts it short."""
    gae_lambda: float = 0.95
    """Trade-off of bias and variance in the advantages."""
    clip: float = 0.2
    """How far an update may move the probability of an action, as a share."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    value: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm that gradients are clipped to."""
    target_kl: float = 0.03
    """An update ends at 1.5 times this KL divergence from the policy that collected."""
    paired: bool = False
    """Learn from rewards less those that the no-op would have had from the same start for the same
    compute (`policies/reference.py`); takes a number of starts."""
    normalise: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    reward_limit: float = 10.0
    """Rewards are clipped to this after the division, so that a divergence is no outlier."""

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the field and what it may be."""
        positive = "a finite number above 0"
        for name, ok, allowed in (
            ("learning_rate", 0 < self.learning_rate < math.inf, positive),
            ("n_steps", self.n_steps >= 1, "1 or more"),
            ("minibatches", self.minibatches >= 1, "1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("gae_lambda", 0 <= self.gae_lambda <= 1, "0 to 1"),
            ("clip", 0 < self.clip < 1, "above 0 and below 1"),
            ("entropy", 0 <= self.entropy < math.inf, "a finite number, 0 or more"),
            ("value", 0 < self.value < math.inf, positive),
            ("max_grad_norm", 0 < self.max_grad_norm < math.inf, positive),
            ("target_kl", 0 < self.target_kl < math.inf, positive),
            ("reward_limit", 0 < self.reward_limit < math.inf, positive),
        ):
            if not ok:
                raise ConfigError(f"{name} = {getattr(self, name)!r} is not possible: {allowed}")
