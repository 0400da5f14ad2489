"""The methods that experiments compare, as data; `k1.experiments.learner` carries them out.

To add one: a `Method` here, and, if settings do not express it, a `Learner` of its own in a file of
its own, which it names. Methods that need an environment are in `policies/continual.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from k1.bench.methods import NEVER_AGAIN
from k1.errors import ConfigError
from k1.experiments.ablations import ABLATIONS
from k1.experiments.constrained import AGemLearner, EwcLearner, SiLearner
from k1.experiments.guarded import GuardedLearner
from k1.experiments.method import (
    ALL_OPEN,
    DENSE,
    FROZEN,
    FULL,
    NO_ROOT,
    NO_SHARED,
    SHARP,
    SOFT,
    UNTRACED,
    WHOLE,
    Method,
    sections,
    traced_by,
)
from k1.experiments.mixture import MixtureLearner
from k1.experiments.packed import PackNetLearner
from k1.experiments.progressive import ProgressiveLearner
from k1.experiments.tree_learners import (
    FixedLeafLearner,
    GrownLearner,
    OneCounterLearner,
    SeparateLearner,
)
from k1.experiments.versions import VersionsLearner

BASELINES = (
    Method("dense", "all blocks, one domain after another", DENSE),
    Method("dense-low-lr", "dense with a tenth of the learning rate after the first domain", DENSE,
           options={"later_lr": 0.1}),
    Method("dense-frozen-shared", "dense, the shared part frozen after the first domain", DENSE,
           later=NO_SHARED),
    Method("joint", "dense on all domains at once: a bound", DENSE, joint=True),
    Method("separate", "a dense tree for each domain, told which: a bound", DENSE,
           learner=SeparateLearner),
    Method("replay-1", "dense, 1 % of the windows from earlier domains", DENSE, replay=0.01),
    Method("replay-5", "dense, 5 % of the windows from earlier domains", DENSE, replay=0.05),
    Method("ewc", "dense with elastic weight consolidation, per-sequence Fisher", DENSE,
           learner=EwcLearner, strengths=(1e2, 1e3, 1e4, 1e5)),
    Method("si", "dense with synaptic intelligence", DENSE,
           learner=SiLearner, strengths=(0.01, 0.1, 1.0, 10.0)),
    Method("a-gem", "dense, gradients projected so that earlier text does not lose", DENSE,
           learner=AGemLearner),
    Method("packnet", "dense; each domain keeps weights of its own, found again by the loss so far",
           DENSE, learner=PackNetLearner),
    Method("progressive",
           "a dense tree for each domain, fed by earlier ones, found again by the loss so far",
           DENSE, learner=ProgressiveLearner),
    Method("dense-versions", "dense; a version of all for each domain, found again by bigrams",
           sections(DENSE, SHARP), learner=VersionsLearner),
    Method("separate-versions", "a fresh dense tree for each domain, found again by bigrams",
           sections(DENSE, SHARP), learner=VersionsLearner, options={"fresh": True}),
    Method("chain-versions",
           "dense-versions of a tree that is but one path; equal FLOPs are many more steps",
           sections(DENSE, SHARP), learner=VersionsLearner, options={"chain": True}),
    Method("mixture",
           "a flat top-1 mixture of experts of as many parameters; three times the steps at most",
           DENSE, learner=MixtureLearner),
    Method("random-path", "a random path, every block of it in full",
           sections(traced_by("learned"), WHOLE, UNTRACED, {"train": {"exploration": 1.0}})),
    Method("round-robin", "the path updated longest ago, every block of it in full",
           sections(traced_by("learned"), WHOLE, UNTRACED, {"train": {"cooldown": NEVER_AGAIN}})),
    Method("fixed-leaf", "the path to one random leaf for each domain, every block of it in full",
           sections(traced_by("learned"), WHOLE, UNTRACED), learner=FixedLeafLearner),
)  # fmt: skip

TRACED = (
    *(
        Method(f"k1-{router}", f"traced path in percentages, {router} routing", traced_by(router))
        for router in ("mean", "learned", "evidence")
    ),
    *(
        Method(f"k1-{router}-grow", f"k1-{router}, and a node grows for a domain",
               traced_by(router), learner=GrownLearner)
        for router in ("mean", "learned", "evidence")
    ),
    Method("k1-full-path", "traced path by evidence with tau 1, every block of it in full", FULL),
    Method("k1-full-path-grow", "k1-full-path, and a node grows for a domain", FULL,
           learner=GrownLearner),
    Method("k1-frozen", "k1-full-path; root and shared part frozen after the first domain", FULL,
           later=FROZEN),
    Method("k1-frozen-grow", "k1-frozen, and a node grows for a domain", FULL,
           later=FROZEN, learner=GrownLearner),
    Method("k1-own-grow", "k1-frozen-grow where only the new node moves, all of it", FULL,
           later=sections(FROZEN, ALL_OPEN), learner=GrownLearner, options={"own_only": True}),
    Method("k1-own-grow-soft", "k1-own-grow with tau 0.05", sections(FULL, SOFT),
           later=sections(FROZEN, ALL_OPEN), learner=GrownLearner, options={"own_only": True}),
    Method("k1-versions",
           "k1-full-path, later domains on one traced path; what each moves is kept apart as a "
           "version, found again by bigrams",
           FULL, learner=VersionsLearner, options={"traced": 16}),
    Method("k1-versions-free", "k1-versions where every step finds its path", FULL,
           learner=VersionsLearner),
    Method("k1-versions-loss", "k1-versions, found again by the loss so far", FULL,
           learner=VersionsLearner, options={"traced": 16, "by_loss": True}),
    Method("k1-guarded-grow",
           "k1-own-grow where root and shared part move too, tied by importance", FULL,
           later=ALL_OPEN, learner=GuardedLearner, strengths=(1e1, 1e2, 1e3)),
    Method("k1-guarded-shared-grow", "k1-guarded-grow with the root frozen", FULL,
           later=sections(NO_ROOT, ALL_OPEN), learner=GuardedLearner,
           strengths=(1e1, 1e2, 1e3, 1e4)),
    Method("k1-top-9", "k1-full-path with several culprits at once",
           sections(FULL, {"train": {"top_k": 9}})),
    Method("k1-top-9-no-threshold", "k1-top-9 without the culprit threshold",
           sections(FULL, {"train": {"top_k": 9}, "update": {"min_share": 0.0}})),
    Method("k1-one-counter", "k1-full-path with one Adam counter for all blocks", FULL,
           learner=OneCounterLearner),
    Method("k1-explore", "k1-full-path, one path in ten random",
           sections(FULL, {"train": {"exploration": 0.1}})),
)  # fmt: skip

METHODS = {method.name: method for method in (*BASELINES, *TRACED, *ABLATIONS)}


def choose_methods(
    names: Sequence[str], known: Mapping[str, Method] = METHODS
) -> tuple[Method, ...]:
    """Return methods by their names.

    Args:
        names: which.
        known: the methods that there are, by name.

    Raises:
        ConfigError: for an unknown name.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"no method {name!r}: choose from {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))
