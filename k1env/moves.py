"""What each action means in the present state: what it asks for, whether it can be, doing it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from k1 import edits
from k1.arena import Arena
from k1.topology import ROOT_SLOT, Topology
from k1env import actions
from k1env.actions import Action, ActionError, action_table, tuned_value
from k1env.boundary import Boundary, Request


@dataclass(frozen=True)
class _Masks:
    """The latest masks, and what they depend on."""

    tree: Topology
    rest: Any
    step: int | None
    """Training step, where it matters which child is the most responsible."""
    possible: np.ndarray
    permitted: np.ndarray


def _quote(thing: object) -> str:
    """Show any object in one short line."""
    try:
        text = repr(thing)
    except Exception:  # an object of someone's own, or a number of thousands of digits
        text = f"of type {type(thing).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


class Moves:
    """The action table, bound to the lane that it is about."""

    def __init__(self, arena: Arena, lane: int) -> None:
        """Lay the table out for an arena's configuration."""
        self.arena, self.lane = arena, lane
        self.table = action_table(arena.config.model)
        self._known: _Masks | None = None

    @property
    def _tree(self) -> Topology:
        return self.arena.trees[self.lane]

    def look_up(self, index: SupportsIndex) -> Action:
        """Find an action by its index, an integer of any kind.

        Raises:
            ActionError: if there is none.
        """
        last = len(self.table) - 1
        try:
            number = operator.index(index)  # 0.9 must not pass for 0
        except Exception:  # it is anyone's object, and may raise anything
            raise ActionError(f"action {_quote(index)} is no integer: choose 0 to {last}") from None
        if not 0 <= number <= last:
            raise ActionError(f"action {_quote(number)} is not in the table: choose 0 to {last}")
        return self.table[number]

    def name(self, action: Action) -> str:
        """Name an action for people, with the block that it means now."""
        if action.slot in self._tree.blocks:
            verb = "add under" if action.kind == actions.ADD else "delete"
            return f"{verb} {self._tree.name(action.slot)}"
        return action.label

    def request(self, action: Action) -> Request:
        """Work out what an action asks for."""
        agents = self._tree.agents
        if action.kind == actions.TUNE:
            return Request(action, self._tuned(action, self.lane), agents)
        if action.kind == actions.PRUNE:
            return Request(action, None, agents - max(1, math.floor(action.value * agents)))
        if action.kind == actions.DELETE and action.slot in self._tree.blocks:
            return Request(action, None, agents - len(self._tree.subtree(action.slot)))
        return Request(action, None, agents)

    def _tuned(self, action: Action, lane: int) -> float:
        now = self.arena.get_hyper(lane)[action.parameter]
        return tuned_value(action.parameter, now, action.value)

    def why_impossible(
        self, action: Action, boundary: Boundary, mean: Sequence[float] | None = None
    ) -> str | None:
        """Say why an action cannot be done at all, whatever is permitted; None if it can.

        Args:
            action: the action.
            boundary: the limits.
            mean: running responsibilities by slot, if they have been read already.
        """
        if action.kind == actions.ADD:
            return edits.why_not_add(self.arena, self.lane, action.slot, mean)
        if action.kind == actions.DELETE and action.slot not in self._tree.blocks:
            return f"slot {action.slot} holds no block"
        hard, request = boundary.hard, self.request(action)
        fewest = hard.min_agents
        if action.kind in (actions.DELETE, actions.PRUNE) and request.agents_after < fewest:
            return f"the hard limit keeps at least {fewest} agents"
        if action.kind == actions.TUNE:
            assert request.value is not None
            low, high = hard.range(action.parameter)
            if not hard.holds(action.parameter, request.value):
                return f"the hard limit holds {action.parameter} in [{low:g}, {high:g}]"
        if action.kind in (actions.BENCHMARK, actions.GOAL) and boundary.stage < 4:
            return "own benchmarks and goals exist in stage 4 only"
        return None

    def masks(
        self, boundary: Boundary, mean: Sequence[float] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which actions are possible, and which of these the stage permits: int8 [actions] each.

        Args:
            boundary: stage, bounds and limits.
            mean: running responsibilities by slot, if they have been read already.
        """
        tree, step = self._tree, self.arena.host_step[self.lane]
        rest = self.arena.get_hyper(self.lane), boundary.stage, boundary.bounds, boundary.hard
        known = self._known
        if (
            known is None
            or known.tree is not tree
            or known.rest != rest
            or known.step not in (None, step)
        ):
            fixed = not any(edits.depends_on_split(tree, slot) for slot in tree.blocks)
            possible = np.array(
                [self.why_impossible(a, boundary, mean) is None for a in self.table], dtype=np.int8
            )
            permitted = possible.copy()
            for index in np.flatnonzero(possible):
                permitted[index] = boundary.rule(self.request(self.table[index])).permitted
            self._known = known = _Masks(tree, rest, None if fixed else step, possible, permitted)
        return known.possible.copy(), known.permitted.copy()

    def change(self, action: Action, lane: int) -> None:
        """Make an action's change in a lane (nothing for those that change no lane)."""
        if action.kind == actions.ADD:
            edits.add_agent(self.arena, lane, action.slot)
        elif action.kind == actions.DELETE and action.slot != ROOT_SLOT:
            edits.delete_agent(self.arena, lane, action.slot)
        elif action.kind == actions.PRUNE:
            edits.prune(self.arena, lane, action.value)
        elif action.kind == actions.TUNE:
            self.arena.set_hyper(lane, action.parameter, self._tuned(action, lane))

    def follow(self, action: Action, lane: int, was: Topology, fewest: int) -> None:
        """Let another lane have what an action has come to in this one, as far as it can.

        A hyper-parameter takes the value that it has here. An agent is deleted if it is there too:
        another in its slot stays.

        Args:
            action: what was done here.
            lane: the other lane.
            was: the tree here before that.
            fewest: agents that have to be left there.
        """
        tree = self.arena.trees[lane]
        if action.kind == actions.TUNE:
            value = self.arena.get_hyper(self.lane)[action.parameter]
            self.arena.set_hyper(lane, action.parameter, value)
        elif action.kind == actions.PRUNE:
            if tree.agents - max(1, math.floor(action.value * tree.agents)) >= fewest:
                edits.prune(self.arena, lane, action.value)
        elif action.kind == actions.DELETE and action.slot in tree.blocks:
            if tree.blocks[action.slot].id != was.blocks[action.slot].id:
                return
            left = tree.copy()
            left.remove(action.slot)
            if left.agents >= fewest:
                edits.delete_agent(self.arena, lane, action.slot)

    def is_news(self, action: Action, visited: Sequence[str], before: Topology, first: int) -> bool:
        """Whether what an action has come to can earn anything.

        Args:
            action: what was done.
            visited: signatures of configurations that were there before.
            before: the tree without the action.
            first: ids from this on are those of agents that the controller has added; to delete
                nothing but these only takes back what it did.
        """
        if action.kind == actions.STOP:
            return True
        gone = {b.id for b in before.blocks.values()} - {b.id for b in self._tree.blocks.values()}
        return self.signature(self.lane) not in visited and (not gone or min(gone) < first)

    def signature(self, lane: int) -> str:
        """Identify a lane's configuration: its tree and hyper-parameters."""
        hyper = self.arena.get_hyper(lane)
        return f"{self.arena.trees[lane].signature()}|{sorted(hyper.items())}"
