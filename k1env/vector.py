"""Many environments at once, each a lane of one arena: `gymnasium.make_vec("k1env/Phase2-v0")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from torch import Tensor

from k1.data import TextData
from k1.errors import K1Error
from k1env.env import Observation, Trained
from k1env.instances import Choice
from k1env.outcome import UNLOGGED, LedgerLike
from k1env.schedule import T, Task
from k1env.seating import check_alike, seat
from k1env.settings import Settings
from k1env.setup import set_up, settle
from k1env.snapshot import restore_vector_snapshot, take_vector_snapshot

VectorStep = tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


@dataclass(frozen=True)
class Stepped:
    """What one environment's step came to, with the observation to act on next."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    final: tuple[Observation, dict[str, Any]] | None = None
    """The end of the episode, if observation and info are of the next one already."""


class Phase2VectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Environments `k1env/Phase2-v0` side by side, as lanes of one arena.

    Each environment goes its own way: its instance, tree, hyper-parameters, stage and end are its
    own, and it has the episodes that `k1env.env.Phase2Env` has with the same settings and seed.
    What they train and measure at the same time is done together, and trials of all of them share
    the spare lanes.

    ## Arguments
    `preset`, `data`, `start` and `device` are those of `Phase2Env`. `config` is one
    `k1env.Settings` or one for each environment; these may differ in everything but the system, of
    which `train.lr`, `train.top_k`, `train.cooldown` and `train.exploration` may differ too.
    `instance` is that of `Phase2Env` or one for each environment: all of them of the same text, and
    none of them the default world beside others.
    `autoreset_mode` is one of `gymnasium.vector.AutoresetMode`. `ledgers` log each environment's
    decisions; by default nothing is logged, which spares a hash of the state at every step.
    `spare_lanes` is how many lanes trials share; a trial that finds no room waits. `wide` lets many
    lanes go through the engine as one batch (`k1env.wide`), as is the default on a GPU; it pads
    all trees to the widest, and equals a single environment to rounding, not to the last bit.
    With `starts`, there are only so many seeds (0, 1, ..., for which others stand in turn), and
    Phase 1 is run once for each, before the first of them: it takes longer than many steps of all
    environments, and they would wait for each that begins anew. Environments then have one `config`
    and one `instance`.

    ## Versus one environment
    There is no rendering and no `undo`. `envs` has the single environments, for `fork` and `peek`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        preset: str = "cpu",
        *,
        data: TextData | str | Path | None = None,
        config: Settings | Sequence[Settings] | None = None,
        start: str | Path | None = None,
        device: str = "auto",
        ledgers: Sequence[LedgerLike] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        spare_lanes: int | None = None,
        wide: bool | None = None,
        render_mode: None = None,
        instance: Choice | Sequence[Choice] | None = None,
        starts: int | None = None,
    ) -> None:
        """Load the text and lay out the lanes; nothing is trained before `reset`.

        Raises:
            K1Error: for arguments that do not go together, or text that cannot be had.
        """
        if num_envs < 1:
            raise K1Error(f"num_envs = {num_envs}: use 1 or more")
        if starts is not None and starts < 1:
            raise K1Error(f"starts = {starts}: use 1 or more, or None for all seeds there are")
        if render_mode is not None:
            raise K1Error("vector environments are not rendered: leave render_mode out")
        configs, choices = _each("config", config, num_envs), _each("instance", instance, num_envs)
        ledgers = _each("ledgers", ledgers if ledgers is not None else UNLOGGED, num_envs)
        first = set_up(
            preset, data=data, config=configs[0], start=start, device=device, instance=choices[0]
        )
        setups = []
        for own, choice in zip(configs, choices, strict=True):
            settings, chosen = settle(first.settings if own is None else own, choice)
            setups.append(replace(first, settings=settings, instance=chosen))
        check_alike(setups, data, starts)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        wide = wide if wide is not None else first.device.type != "cpu"
        self.envs = seat(setups, ledgers, spare_lanes, wide)
        self._scheduler = self.envs[0].session.scheduler
        self._unprepared = range(0 if starts is None else starts)
        if starts is not None:
            trained: Trained = {}
            for env in self.envs:
                env.share_starts(trained, starts)
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observations: list[Observation | None] = [None] * num_envs
        self._ended = np.zeros(num_envs, dtype=np.bool_)

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions, by index."""
        return self.envs[0].actions

    def action_masks(self) -> np.ndarray:
        """Which actions are possible: int8 [environments, actions]."""
        return np.stack([env.action_masks() for env in self.envs])

    def run(self, tasks: Sequence[Task[T]]) -> list[T]:
        """Run tasks side by side to their ends, such as episodes of the single environments.

        A task uses `reset_task` and `step_task` of environments in `envs`, each environment in one
        task at most; `reset` and `step` of this environment know nothing of such episodes.
        """
        return self._scheduler.run(tasks)

    # -- each environment ------------------------------------------------------------------------

    def reset_each(
        self,
        seeds: Sequence[int | None],
        chosen: Sequence[int] | None = None,
        instance: Choice | Sequence[Choice | None] | None = None,
    ) -> dict[int, tuple[Observation, dict[str, Any]]]:
        """Start episodes; returns each environment's observation and info, by its number.

        Args:
            seeds: one for each environment; None draws one from the environment's generator.
            chosen: which environments; all by default.
            instance: the world of these episodes, or one for each environment, in place of the
                environments' own.

        Raises:
            K1Error: if an instance does not exist or does not fit, or they are too many or few.
        """
        worlds = _each("instance", instance, self.num_envs)
        numbers = list(range(self.num_envs) if chosen is None else chosen)
        self.prepare()
        for i in numbers:
            self._observations[i] = None
        tasks = [self.envs[i].reset_task(seeds[i], {"instance": worlds[i]}) for i in numbers]
        done = dict(zip(numbers, self._scheduler.run(tasks), strict=True))
        for i, (observation, _) in done.items():
            self._observations[i], self._ended[i] = observation, False
        return done

    def prepare(self) -> None:
        """Run Phase 1 for all starts, before anything else: so it comes to the same every time."""
        while self._unprepared:
            now = self._unprepared[: self.num_envs]
            self._scheduler.run([e.start_task(s) for e, s in zip(self.envs, now, strict=False)])
            self._unprepared = self._unprepared[self.num_envs :]

    def step_each(self, actions: Any) -> list[Stepped]:
        """Step every environment; returns each one's result.

        Raises:
            ActionError: if an action is no integer or not in the table; then nothing has happened.
            K1Error: if there are more or fewer actions than environments, or if an episode is over
                and the autoreset mode starts none.
        """
        chosen = list(actions)
        if len(chosen) != self.num_envs:
            raise K1Error(f"{len(chosen)} actions for {self.num_envs} environments")
        if any(observation is None for observation in self._observations):
            raise ResetNeeded("call reset() before step()")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            over = np.flatnonzero(self._ended).tolist()
            raise K1Error(f"the episodes of environments {over} are over: reset them (reset_mask)")
        for i, action in enumerate(chosen):
            if not self._ended[i]:
                self.envs[i].session.moves.look_up(action)
        tasks = [self._turn(i, action) for i, action in enumerate(chosen)]
        self._observations = [None] * self.num_envs  # an error on the way calls for a reset
        results = self._scheduler.run(tasks)
        for i, result in enumerate(results):
            self._observations[i] = result.observation
            self._ended[i] = result.final is None and (result.terminated or result.truncated)
        return results

    def _turn(self, number: int, action: Any) -> Task[Stepped]:
        env = self.envs[number]
        if self._ended[number]:  # the mode is NEXT_STEP
            observation, info = yield from env.reset_task()
            return Stepped(observation, 0.0, False, False, info)
        observation, reward, terminated, truncated, info = yield from env.step_task(action)
        env.session.gate.adopted = {}  # copies of lanes that nobody needs any more
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP
        if not (same_step and (terminated or truncated)):
            return Stepped(observation, reward, terminated, truncated, info)
        final = observation, info
        observation, info = yield from env.reset_task()
        return Stepped(observation, reward, terminated, truncated, info, final)

    # -- states ----------------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a later `restore` needs: tensors and plain JSON data."""
        return take_vector_snapshot(self.envs, self._ended)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a snapshot of as many environments with the same settings and text.

        Raises:
            CheckpointError: if it belongs to others.
        """
        self.prepare()
        self._observations = [None] * self.num_envs
        self._ended = restore_vector_snapshot(self.envs, tensors, state)
        self._observations = [env.observe()[0] for env in self.envs]

    # -- Gymnasium -------------------------------------------------------------------------------

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start episodes in all environments, or where `options["reset_mask"]` is True.

        Args:
            seed: one for each environment, or the first one's, which the others count up from.
                None draws a seed from each environment's generator.
            options: `reset_mask` is a boolean array, one entry for each environment; `instance`
                is the world of these episodes, or one for each environment.

        Raises:
            TypeError: if the mask is no boolean array.
            ValueError: if mask or seeds are not as many as environments, or the mask is all False.
        """
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        mask = (options or {}).get("reset_mask")
        if mask is not None:
            mask = _checked_mask(mask, self.num_envs)
        chosen = range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist()
        left = [i for i in range(self.num_envs) if i not in chosen and not self._begun(i)]
        if left:
            raise ResetNeeded(f"environments {left} had no reset yet: reset all of them first")
        infos: dict[str, Any] = {}
        worlds = (options or {}).get("instance")
        for i, (_, info) in self.reset_each(seeds, chosen, worlds).items():
            infos = self._add_info(infos, info, i)
        return self.observations(), infos

    def _begun(self, number: int) -> bool:
        return self._observations[number] is not None

    def step(self, actions: Any) -> VectorStep:
        """Carry out an action in every environment; `step_each` says what it raises."""
        infos: dict[str, Any] = {}
        results = self.step_each(actions)
        for i, result in enumerate(results):
            if result.final is not None:
                observation, info = result.final
                final = {"final_obs": observation, "final_info": info}
                infos = self._add_info(infos, final, i)
            infos = self._add_info(infos, result.info, i)
        rewards = np.array([r.reward for r in results], dtype=np.float64)
        terminated = np.array([r.terminated for r in results], dtype=np.bool_)
        truncated = np.array([r.truncated for r in results], dtype=np.bool_)
        return self.observations(), rewards, terminated, truncated, infos

    def observations(self) -> Observation:
        """Stack the present observations into arrays of their own."""
        space, rows = self.single_observation_space, cast(list[Observation], self._observations)
        empty = cast(Observation, create_empty_array(space, n=self.num_envs, fn=np.zeros))
        return cast(Observation, concatenate(space, rows, empty))

    def render(self) -> None:
        """Draw nothing: vector environments are not rendered."""

    @property
    def np_random_seed(self) -> Any:
        """Seeds of the environments' generators."""
        return tuple(env.np_random_seed for env in self.envs)

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The environments' generators."""
        return tuple(env.np_random for env in self.envs)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all environments, or one for each.

    Raises:
        K1Error: if there are more or fewer than environments.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise K1Error(f"{name} has {len(value)} entries for {count} environments")
    return [*value]


def _checked_mask(mask: Any, count: int) -> np.ndarray:
    """Check a reset mask as Gymnasium's vector environments do.

    Raises:
        TypeError: if it is no boolean array.
        ValueError: if it has not one entry for each environment, or is all False.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must be a boolean numpy array, not {mask!r}")
    if mask.shape != (count,):
        raise ValueError(f"options['reset_mask'] must have shape ({count},), not {mask.shape}")
    if not mask.any():
        raise ValueError("options['reset_mask'] must be True somewhere")
    return mask
