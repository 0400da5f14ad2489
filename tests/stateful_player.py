"""Plays an environment and checks every promise at every step."""

from __future__ import annotations

import copy
import itertools
import json
import math
import operator
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from k1.arena import LaneState
from k1.checkpoint import load_checkpoint, save_checkpoint
from k1.errors import K1Error, TopologyError
from k1env.actions import ActionError
from k1env.boundary import Boundary, Bounds
from k1env.env import Phase2Env
from k1env.ledger import GENESIS, Ledger, read_ledger
from k1env.outcome import Outcome
from tests.stateful_checks import (
    FEWEST,
    HARD,
    Broken,
    Count,
    check_bounds,
    check_lane,
    check_verdict,
    fingerprint,
    freeze,
    generators,
    hold,
    permits,
    recount,
)

COUNTS: Counter[str] = Counter()
"""What has been played in this process, and held."""
SPARE = 2
"""First of the lanes that are free between decisions."""
LATELY = 8
"""Returned values that are looked at again at each step; at the end all are."""


@dataclass
class Moment:
    """What a check needs to know of the time before a decision."""

    main: LaneState
    shadow: LaneState | None
    best: LaneState | None
    bounds: Bounds
    stage: int
    count: int
    """Entries in the ledger."""
    possible: np.ndarray
    permitted: np.ndarray
    blob: Any
    visited: set[str]


class Auditor:
    """Plays an environment and checks every promise at every step."""

    def __init__(
        self, env: Phase2Env, folder: Path, *, seed: int = 0, boundary: Boundary | None = None
    ) -> None:
        """Start an episode; with a boundary, in the stage that it is in."""
        self.env, self.folder, self.seed, self.decisions = env, folder, seed, 0
        self.numbers = itertools.count()
        self.kept: list[tuple[Any, Any]] = []
        self.moment: Moment | None = None
        env.bind_ledger(Ledger.create(folder / "ledger.jsonl"))
        env.reset(seed=seed)
        if boundary is not None:
            env.session.boundary = copy.deepcopy(boundary)
        self.base = Count.of(env.session.boundary)
        self.visited = {self._configuration()}
        self._watch_trials()
        self.check()

    # -- promises at any time --

    def check(self) -> None:
        """See that the state is sound, and what was returned earlier still as it was."""
        env, session = self.env, self.env.session
        check_lane(env, session.main)
        if session.shadow_diverged:
            check_lane(env, session.shadow)
        boundary, capacity = session.boundary, session.arena.scratch - 1
        check_bounds(boundary.bounds, capacity)
        expected = Bounds((1e-6, 0.3), (0, 500), (1, capacity), FEWEST)
        hold("hard limits", boundary.hard == expected, boundary.hard)
        ledger = env.ledger
        assert isinstance(ledger, Ledger)
        counted, own = recount(self.base, ledger.entries), Count.of(boundary)
        for name in ("stage", "accepted", "attempted", "successes", "evidence"):
            promise = {"accepted": "credits", "stage": "stage"}.get(name, "evidence")
            said, is_so = getattr(counted, name), getattr(own, name)
            hold(promise, said == is_so, f"{name}: the ledger says {said}, it is {is_so}")
        observation, info = env.observe()
        hold("finite", env.observation_space.contains(observation), "observation")
        plain = {k: v for k, v in info.items() if not k.endswith("mask")}
        json.dumps(plain, allow_nan=False)
        self._check_kept(self.kept[-LATELY:])
        for value in (observation, info, session.summary()):
            self.kept.append((value, freeze(value)))
        self._check_masks(info)

    def _check_kept(self, kept: list[tuple[Any, Any]]) -> None:
        for value, frozen in kept:
            hold("arrays", freeze(value) == frozen, "something returned earlier has changed")

    def _check_masks(self, info: dict[str, Any]) -> None:
        """Both masks against what happens when each action is done in a spare lane."""
        session, arena = self.env.session, self.env.session.arena
        boundary, capacity = session.boundary, arena.scratch - 1
        lane = SPARE
        for told, asked in (
            ("action", self.env.action_masks),
            ("permitted", self.env.permitted_mask),
        ):
            same = np.array_equal(info[f"{told}_mask"], asked())
            hold("mask", same, f"info and the method for {told} masks differ")
        for action in session.table:
            possible = action.kind not in ("benchmark", "goal") or boundary.stage == 4
            if action.structural:
                arena.copy_lane(session.main, lane)
                try:
                    session.moves.change(action, lane)
                except TopologyError:
                    possible = False
            agents, value = arena.trees[lane].agents, 0.0
            if action.kind in ("delete", "prune"):
                possible = possible and agents >= FEWEST
            if action.kind == "tune":
                value = session.moves.request(action).value
                low, high = {**HARD, "top_k": (1, capacity)}[action.parameter]
                possible = low <= value <= high
            label = action.label
            mask, may = info["action_mask"][action.index], info["permitted_mask"][action.index]
            hold("mask", bool(mask) == possible, f"{label} is {possible}")
            allowed = possible and permits(boundary.stage, boundary.bounds, action, value, agents)
            hold("mask", bool(may) == allowed, f"{label} in stage {boundary.stage} is {allowed}")

    # -- a decision --

    def step(self, action: Any) -> Any:
        """Make a decision, and see that it did what it says and nothing else."""
        env, session = self.env, self.env.session
        if session.finished:
            return self.refuse(action, K1Error)
        moment, before = self._moment(), generators(env)
        self.moment = moment
        result = env.step(action)
        self.decisions += 1
        COUNTS["decisions"] += 1
        hold("generators", generators(env) == before, "a step drew from a global generator")
        ledger, outcome = env.ledger, session.last
        assert isinstance(ledger, Ledger) and outcome is not None
        new = ledger.entries[moment.count :]
        kinds = ["intent", "outcome"] + ["end"] * session.finished
        hold("records", [entry.kind for entry in new] == kinds, [entry.kind for entry in new])
        index = operator.index(action)
        hold("records", new[0].data["action"] == index, new[0].data)
        hold("records", new[1].data["state_hash"] == session.trainer.state_hash(), "state hash")
        self._check_enforcement(index, moment, new[0].data, result)
        check_verdict(new[1].data, session.gate.config, outcome.kind == "stop")
        after, here = session.boundary, self._configuration()
        hold("stage", after.stage - moment.stage in (0, 1), f"{moment.stage} -> {after.stage}")
        hold("stage", (after.stage > moment.stage) == outcome.promoted, "promotion")
        for what in ("refused", "promoted", "credited", "rolled_back"):
            COUNTS[what] += bool(getattr(outcome, what))
        COUNTS["trials"] += outcome.trial is not None
        COUNTS["impossible"] += outcome.impossible is not None
        check_bounds(after.bounds, session.arena.scratch - 1, moment.bounds)
        grown = after.bounds != moment.bounds
        hold("bounds", not grown or outcome.credited, "widened without a success")
        fresh = outcome.kind == "stop" or here not in moment.visited
        hold("credits", not outcome.credited or fresh, "credited for a state visited before")
        self.visited.add(here)
        hold("finite", math.isfinite(result[1]), f"reward {result[1]}")
        check_lane(env, session.main)
        self._check_replay(moment, outcome)
        self.kept.append((result, freeze(result)))
        self.check()
        return result

    def _check_enforcement(
        self, index: int, moment: Moment, intent: dict[str, Any], result: Any
    ) -> None:
        info = result[-1]
        word = info["verdict"]
        possible, permitted = bool(moment.possible[index]), bool(moment.permitted[index])
        hold("mask", (word == "impossible") == (not possible), f"{index} was {word}")
        hold("mask", (word == "permitted") == permitted, f"{index} was {word}")
        hold("mask", intent["permitted"] == permitted, "the ledger says otherwise")
        hold("mask", info["tried"] == (possible and not permitted), "tried")
        costs = word in ("impossible", "refused")
        hold("mask", info["cost"] == float(costs), f"{word} cost {info['cost']}")

    def _check_replay(self, moment: Moment, outcome: Outcome) -> None:
        """Do the decision again in spare lanes: the system has to come out bit for bit."""
        session, arena, first = self.env.session, self.env.session.arena, SPARE
        promise = "refusal" if outcome.refused else "replay"
        if outcome.rolled_back:
            wanted, found = moment.best, arena.read_lane(session.main)
            assert wanted is not None
            same = all(
                torch.equal(tensor, found.tensors[name])
                for name, tensor in wanted.tensors.items()
                if name != "data_cursor"
            )
            hold("rollback", same, "the best state is not back")
            moved = found.tensors["data_cursor"] > moment.main.tensors["data_cursor"]
            hold("rollback", bool(moved), "the data has not moved on")
            return
        action, mix = session.table[outcome.action], arena["mix"][session.main].clone()
        trial = outcome.trial is not None and outcome.trial.seeds_run > 0
        changes = outcome.applied and action.kind in ("add", "delete", "prune", "tune")
        shadow = moment.shadow
        if changes and not trial and shadow is None:
            shadow = moment.main
        # The lanes lie as they lay: a product of other shape adds up in another order.
        lanes = [moment.main] * (2 if trial else 1)
        lanes += [] if shadow is None else [shadow] * (2 if trial else 1)
        for lane, state in enumerate(lanes, start=first):
            arena.write_lane(lane, state)
            arena["mix"][lane] = mix
        changed = range(first, first + (2 if trial else 1)) if changes else range(0)
        for lane in changed:
            session.moves.change(action, lane)
        steps = session.gate.config.horizon if trial else session.settings.interval
        if not outcome.stopped:
            session.engine.train(first, first + len(lanes), steps)
        self._same(promise, first, session.main)
        if session.shadow_diverged:
            place = first + (2 if trial else 1)
            if outcome.applied and trial:  # it outlives a gain that only outweighs earlier harm
                place = first
                arena.write_lane(place, moment.shadow)
                arena["mix"][place] = mix
                fewest = session.boundary.hard.min_agents
                session.moves.follow(action, place, moment.main.tree, fewest)
                session.engine.train(place, place + 1, steps)
            self._same(promise, place, session.shadow)
        if not outcome.applied:
            before = json.dumps(moment.main.tree.to_dict())
            hold(promise, before == json.dumps(session.tree.to_dict()), "the tree has changed")
            for name in ("lr", "top_k", "cooldown", "exploration"):
                kept = moment.main.tensors[name].item() == arena[name][session.main].item()
                hold(promise, kept, f"{name} has changed")

    def _same(self, promise: str, replayed: int, lane: int) -> None:
        arena = self.env.session.arena
        for name, tensor in arena.state.items():
            equal = torch.equal(tensor[replayed], tensor[lane])
            hold(promise, equal, f"{name} is not what came out")
        hold(promise, arena.hash_lane(replayed) == arena.hash_lane(lane), "the tree differs")

    # -- looking ahead, back, and away --

    def refuse(self, action: Any, kind: type[K1Error] = ActionError) -> None:
        """See that something is refused by an error of its kind, and changes nothing."""
        before = fingerprint(self.env)
        try:
            self.env.step(action)
        except kind as error:
            hold("any object", "\n" not in str(error) and len(str(error)) < 400, "the message")
        except Exception as error:
            raise Broken("any object", f"{type(error).__name__}: {error}"[:200]) from error
        else:
            raise Broken("any object", "it was accepted")
        hold("any object", fingerprint(self.env) == before, "an error has changed the state")

    def offer(self, thing: Any) -> None:
        """Offer any object as an action."""
        try:
            index = operator.index(thing)
        except Exception:
            index = -1
        if 0 <= index < len(self.env.session.table):
            self.step(thing)
        else:
            self.refuse(thing, K1Error if self.env.session.finished else ActionError)

    def peek(self, action: int) -> None:
        """Look ahead; what is not tried then comes just so."""
        before = fingerprint(self.env)
        if self.env.session.finished:
            return
        seen = self.env.peek(action)
        COUNTS["looks ahead"] += 1
        hold("peek", fingerprint(self.env) == before, "looking ahead has changed the state")
        done = self.step(action)
        if seen[-1]["verdict"] in ("permitted", "impossible"):
            hold("peek", freeze(seen) == freeze(done), "it came otherwise")

    def undo(self) -> None:
        """Take the last decision back, if there is one."""
        env = self.env
        session = env.session
        if self.moment is None or session.spent >= session.settings.budget:
            before = fingerprint(env)
            try:
                env.undo()
            except K1Error:
                hold("undo", fingerprint(env) == before, "an error has changed the state")
                return
            raise Broken("undo", "there was nothing to undo")
        env.undo()
        main = env.session.arena.read_lane(env.session.main)
        hold("undo", freeze([main.tensors, main.tree.to_dict()]) == self.moment.blob, "weights")
        self.visited, self.moment = self.moment.visited, None
        COUNTS["steps back"] += 1
        self.check()

    def reload(self, action: int) -> None:
        """Save, load in a new environment, make the same decision in both; go on in the new one."""
        env, ledger = self.env, self.env.ledger
        assert isinstance(ledger, Ledger)
        number = next(self.numbers)
        tensors, state = env.session.snapshot()
        folder = self.folder / f"saved-{number}"
        save_checkpoint(folder, tensors, {"session": state}, kind="test")
        path = self.folder / f"ledger-{number}.jsonl"
        path.write_bytes(ledger.path.read_bytes())
        tensors, state = load_checkpoint(folder, kind="test")
        twin = Phase2Env(config=env.settings, data=env.data)
        twin.bind_ledger(Ledger.resume(path, index=ledger.index, head=ledger.head))
        twin.session.rebind(self.seed)
        twin.session.restore(tensors, state["session"])
        twin._np_random = copy.deepcopy(env._np_random)
        hold("restore", fingerprint(twin) == fingerprint(env), "another state was loaded")
        if not env.session.finished:
            done = env.step(action)
            self.env, self.moment = twin, None
            self._watch_trials()
            hold("restore", freeze(self.step(action)) == freeze(done), "it goes on otherwise")
            same = ledger.path.read_bytes() == path.read_bytes()
            hold("restore", same, "the ledgers differ")
            COUNTS["reloads"] += 1

    def close(self) -> None:
        """See that nothing returned has changed, and verify the chain of the whole ledger."""
        self._check_kept(self.kept)
        ledger = self.env.ledger
        assert isinstance(ledger, Ledger)
        try:
            entries = read_ledger(ledger.path)
        except K1Error as error:
            raise Broken("hash chain", error) from error
        links = [GENESIS, *(entry.hash for entry in entries)]
        hold("hash chain", [entry.previous for entry in entries] == links[:-1], "links")
        hold("hash chain", entries == ledger.entries, "the file is not what was logged")

    # -- notes --

    def _configuration(self) -> str:
        session = self.env.session
        ids = sorted(row[1] for row in session.tree.to_dict()["blocks"])
        return json.dumps([ids, session.arena.get_hyper(session.main)])

    def _moment(self) -> Moment:
        session, (_, info) = self.env.session, self.env.observe()
        main = session.arena.read_lane(session.main)
        assert isinstance(self.env.ledger, Ledger)
        return Moment(
            main,
            session.arena.read_lane(session.shadow) if session.shadow_diverged else None,
            session.guard.best,
            session.boundary.bounds,
            session.boundary.stage,
            self.env.ledger.index,
            info["action_mask"],
            info["permitted_mask"],
            freeze([main.tensors, main.tree.to_dict()]),
            set(self.visited),
        )

    def _watch_trials(self) -> None:
        """See at the end of each trial that the lanes it forked are as they were."""
        session = self.env.session
        trial = type(session.gate).trial

        def watched(main: int, shadow: int | None, change: Any, **more: Any) -> Any:
            lanes = [main] if shadow is None else [main, shadow]
            before = [session.arena.hash_lane(lane) for lane in lanes]
            drawn = generators(self.env)
            result = yield from trial(session.gate, main, shadow, change, **more)
            after = [session.arena.hash_lane(lane) for lane in lanes]
            hold("trials", after == before, "a trial has changed what it was forked from")
            hold("generators", generators(self.env) == drawn, "a trial drew from a generator")
            return result

        session.gate.trial = watched  # type: ignore[method-assign]
