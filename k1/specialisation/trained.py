"""Systems trained by an experiment's methods in several situations, and studied: a row for each.

A specialist for a domain is no proof that domains make specialists: agents may differ by when they
were trained, or because they began differently. So the same method is trained three times over: on
the domains one after another, on one domain dealt out to as many, and on all domains at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from k1.data import TextData
from k1.errors import ConfigError, K1Error
from k1.experiments.learner import VIEWS, Learner, Run
from k1.experiments.method import Method
from k1.experiments.methods import METHODS, choose_methods
from k1.experiments.mixture import MixtureLearner
from k1.experiments.nulls import same_domain
from k1.experiments.packed import PackNetLearner
from k1.experiments.plans import Experiment
from k1.experiments.progressive import ProgressiveLearner
from k1.experiments.runner import (
    Conditions,
    OutOfTime,
    advance,
    as_row,
    check_methods,
    identity,
    phase_steps,
)
from k1.experiments.stream import orders_of, stream_domains, views
from k1.experiments.tree_learners import SeparateLearner
from k1.row_file import Row, RowFile, read_rows
from k1.sampling import TokenStore
from k1.specialisation.ablation import bits
from k1.specialisation.agents import Agent, Study, study
from k1.specialisation.information import Information
from k1.specialisation.sparing import CALM, sparing

KIND = "specialists"
THREE, SAME, JOINT = "three", "same", "joint"
SITUATIONS = (THREE, SAME, JOINT)
"""The domains one after another; one domain dealt out to as many; all domains at once."""
KEY = ("method", "situation", "seed", "view")
REPORTED = ("order", "information", "accuracy", "specialists")
"""What tables need of a row, besides its key."""
TRUST_STEPS = 100
"""Steps that trust is measured over, at most; a phase's, if it has fewer."""
MATTERS = 0.1
"""A leaf that has less than this share of the responsibility of the leaf that has most is nobody's
top specialist: what hardly moves anything may be of one domain by chance."""
_SEVERAL = (SeparateLearner, PackNetLearner, ProgressiveLearner, MixtureLearner)
"""Learners whose systems are not one tree in a lane."""


@dataclass(frozen=True)
class Asked:
    """What is to be trained and studied."""

    experiment: Experiment
    """Its last learning rate is taken, and the last strength of a method that has some."""
    situations: tuple[str, ...]
    same: str
    """The domain that is dealt out."""

    def head(self, conditions: Conditions) -> Row:
        """What all rows have in common, as plain data."""
        return {
            "kind": KIND,
            "settings": self.experiment.settings(),
            "lr": self.experiment.rates[-1],
            "orders": self.experiment.orders,
            "config": self.experiment.config("builtin").to_dict(),
            "data": conditions.data.fingerprint,
            "same": self.same,
            "trust": {"steps": TRUST_STEPS, "height": CALM},
            "pool": conditions.pool,
            "device": conditions.device,
        }

    def runs(self, method: Method, text: TextData) -> list[Run]:
        """The runs of a method on a text, one for each seed."""
        experiment = replace(self.experiment, rates=self.experiment.rates[-1:])
        orders = orders_of(stream_domains(text), experiment.orders)
        return experiment.runs(replace(method, strengths=method.strengths[-1:]), orders)

    def text(self, situation: str, data: TextData) -> TextData:
        """The text of a situation."""
        if situation != SAME:
            return data
        return same_domain(data, self.same, len(data.domains))


def ask(
    experiment: Experiment, situations: Sequence[str], data: TextData, same: str | None = None
) -> Asked:
    """Check what is asked for.

    Args:
        experiment: its methods, sizes, steps and seeds.
        situations: some of `SITUATIONS`.
        data: the text.
        same: the domain that is dealt out; by default the first of the stream.

    Raises:
        ConfigError: for unknown methods, situations or domains, or methods whose system a study
            cannot look at.
    """
    for situation in situations:
        if situation not in SITUATIONS:
            raise ConfigError(f"no situation {situation!r}: choose from {', '.join(SITUATIONS)}")
    for method in choose_methods(experiment.methods):
        if not has_one_tree(method):
            others = ", ".join(name for name, m in METHODS.items() if has_one_tree(m))
            raise ConfigError(f"{method.name} has no single tree to study: choose from {others}")
    same = stream_domains(data)[0] if same is None else same
    if same not in data.domains:
        raise ConfigError(f"no domain {same!r}: choose from {', '.join(data.domains)}")
    return Asked(experiment, tuple(dict.fromkeys(situations)), same)


def has_one_tree(method: Method) -> bool:
    """Whether a method's system is one tree; of versions of one, the last is taken for it."""
    learner = method.learner
    several = isinstance(learner, type) and issubclass(learner, _SEVERAL)
    return not several and not method.options.get("fresh", False)


def open_rows(asked: Asked, conditions: Conditions, path: Path | None) -> RowFile:
    """Open the results file of what is asked for.

    Raises:
        K1Error: if it holds results of something else, or of methods that were other ones.
    """
    file = RowFile(path, asked.head(conditions), KEY)
    check_methods(file)
    return file


def read_studies(path: Path) -> tuple[Row, list[Row]]:
    """Read the head and the rows of a results file, whatever was asked for in it.

    Raises:
        K1Error: if it cannot be read, or holds no studies.
    """
    head, rows = read_rows(path, KIND, KEY)
    if not all(name in row for row in rows for name in REPORTED):
        raise K1Error(f"{path} holds studies that lack something: name another file")
    return head, rows


def run_studies(asked: Asked, conditions: Conditions, file: RowFile) -> list[Row]:
    """Train and study what is not in the file yet, as long as there is time.

    Returns:
        The rows that were asked for, as far as there are any.

    Raises:
        K1Error: if a run diverges, the text is too short, or the file cannot be written.
    """
    config = asked.experiment.config(conditions.source)
    planned: list[Row] = []
    with file.lock():
        for situation in asked.situations:
            text = asked.text(situation, conditions.data)
            store = TokenStore(text, config.model.context, conditions.device)
            for method in choose_methods(asked.experiment.methods):
                runs = asked.runs(method, text)
                own = {run: asked_rows(run, situation) for run in runs}
                planned += [row for rows in own.values() for row in rows]
                missing = [
                    run
                    for run, rows in own.items()
                    if any(file.key(row) not in file.rows for row in rows)
                ]
                if not missing:
                    continue
                trained = replace(method, joint=True) if situation == JOINT else method
                make = partial(method.learner, trained, config, store, text.vocab_size, missing)
                try:
                    rows = train_and_study(
                        make(conditions.device, **method.options),
                        asked.experiment,
                        text,
                        conditions,
                    )
                except OutOfTime:
                    conditions.say(f"{method.name}, {situation}: out of time")
                    continue
                for row in rows:
                    row |= {"situation": situation, "identity": identity(method)}
                    if file.key(row) not in file.rows:  # it may have stopped between two views
                        file.add(row)
                conditions.say(
                    f"{method.name}, {situation}: {len(missing)} runs, {rows[0]['seconds']:.0f} s"
                )
    keys = [file.key(row) for row in planned]
    return [file.rows[key] for key in keys if key in file.rows]


def asked_rows(run: Run, situation: str) -> list[Row]:
    """The parts of a run's rows that tell which they are: a row for each view."""
    return [{**as_row(run), "situation": situation, "view": view} for view in VIEWS]


def train_and_study(
    learner: Learner, experiment: Experiment, text: TextData, conditions: Conditions
) -> list[Row]:
    """Take a method's runs through their streams and study each; returns a row for each and view.

    Raises:
        OutOfTime: if the time is used up before all are trained.
        K1Error: if a run diverges.
    """
    began, steps = time.monotonic(), []
    for phase in range(len(learner.runs[0].order)):
        learner.begin(phase)
        total = phase_steps(learner, experiment)
        advance(learner, 0, total, total, conditions.deadline)
        learner.end()
        steps.append(total)
    trained = time.monotonic() - began
    engine, count = learner.engine, learner.base.train.eval_windows
    seen = views(learner.store, conditions.pool, count, experiment.passage)
    rows = []
    for lane, run in enumerate(learner.runs):
        for view, texts in (("windows", seen.windows), ("passages", seen.passages)):
            loss = bits(engine, engine.arena.forest(lane, lane + 1), texts)
            if not all(map(math.isfinite, loss.values())):
                raise K1Error(
                    f"{run.method} has diverged with seed {run.seed}: leave the method out, or "
                    "choose an experiment with a lower learning rate"
                )
            found = as_data(study(engine, lane, texts, text.tokenizer))
            if view == "windows":
                spared = sparing(engine, lane, seen.windows, min(TRUST_STEPS, steps[-1]))
                found["spared"] = [asdict(leaf) for leaf in spared]
            rows.append({**as_row(run), "view": view, "steps": steps, "loss": loss, **found})
    seconds = {"seconds": time.monotonic() - began, "seconds_trained": trained}
    return [{**row, **seconds, "lanes": learner.lanes} for row in rows]


def as_data(found: Study) -> Row:
    """A study as plain data, with the top specialist of each domain."""
    names = {agent.id: agent.name for agent in found.agents}

    def tested(one: Information) -> Row:
        return {
            "bits": asdict(one.bits),
            "share": asdict(one.top_share),
            "leaf": names[found.leaves[one.top_agent]],
            "domain": found.domains[one.top_domain],
        }

    return {
        "windows": found.windows,
        "information": {name: tested(one) for name, one in found.information.items()},
        "accuracy": found.accuracy,
        "specialists": top_specialists(found),
        "agents": [_agent(agent) for agent in found.agents],
    }


def top_specialists(found: Study) -> dict[str, dict[str, Any]]:
    """For each domain the leaf with the largest share of it, of all leaves that matter."""
    leaves = [agent for agent in found.agents if agent.is_leaf]
    most = max(agent.weight["responsibility"] for agent in leaves)
    heavy = [agent for agent in leaves if agent.weight["responsibility"] >= MATTERS * most]
    tops = {
        domain: max(heavy, key=lambda agent: agent.shares["responsibility"][domain])
        for domain in found.domains
    }
    return {
        domain: {
            "leaf": agent.name,
            "nickname": agent.nickname.name,
            "share": agent.shares["responsibility"][domain],
            "weight": agent.weight["responsibility"],
            "harm": agent.harm,
            "hurts_own_most": hurts_most(agent.harm, domain),
        }
        for domain, agent in tops.items()
    }


def hurts_most(harm: dict[str, float], domain: str) -> bool:
    """Whether a domain loses something, and more than any other."""
    others = [lost for name, lost in harm.items() if name != domain]
    return harm[domain] > max(0.0, *others)


def _agent(agent: Agent) -> Row:
    """An agent as plain data; of its nickname the name alone."""
    return {**asdict(agent), "nickname": agent.nickname.name}
