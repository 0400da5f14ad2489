"""The front door: one K-1 system that trains, evaluates, changes its tree, forks and is saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k1 import edits, merging
from k1.arena import Arena, LaneState, check_fit, lane_layout
from k1.checkpoint import load_checkpoint, save_checkpoint
from k1.config import Config, read_dataclass
from k1.data import TextData
from k1.engine import Engine
from k1.errors import CheckpointError, ConfigError, DeviceError
from k1.forward import Batch, forward, logits, read_text
from k1.records import StepResult
from k1.sampling import TokenStore
from k1.topology import Topology

CHECKPOINT_KIND = "trainer"


@dataclass(frozen=True)
class StepReport:
    """What one training step did. Blocks are named by their ids."""

    step: int
    """Number of the step, from 0."""
    loss: float
    """Nats per token before the update."""
    path: tuple[tuple[int, ...], ...]
    """Each path from the root to a culprit (empty in dense mode)."""
    scales: dict[int, float]
    """Displacement scale of every updated block."""
    responsibility: dict[int, float]
    """Last measured gradient norm of every block."""
    updated_fraction: float
    """Share of all living parameters, shared part included, that the step updated."""
    agents_updated: int
    """Updated blocks without the root."""
    agents: int
    """Living blocks without the root."""
    skipped: bool
    """Whether the step was skipped because a gradient was not finite."""


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device.

    Raises:
        DeviceError: for CUDA where there is none, or an unknown name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available: use --device cpu or auto")
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"unknown device {name!r}: use auto, cpu or cuda")
    return torch.device(name)


@dataclass
class _Saved:
    """What a checkpoint holds besides tensors."""

    config: dict[str, Any]
    seed: int
    data: str
    tree: dict[str, Any]


class Trainer:
    """A K-1 system on its text.

    One lane of the arena (0, unless `at` chose another) is the system itself; further lanes are
    room for trials, or other systems.
    """

    def __init__(
        self,
        config: Config,
        data: TextData,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        lanes: int = 1,
    ) -> None:
        """Build a fresh system.

        Args:
            config: sizes and settings.
            data: the text.
            seed: decides weights and batches.
            device: where everything is held.
            lanes: rows of the arena.

        Raises:
            DataError: if a pool of a domain is too short for one window.
        """
        self.config, self.data, self.seed = config, data, seed
        self.device, self.lane = torch.device(device), 0
        self.store = TokenStore(data, config.model.context, self.device)
        self.arena = Arena(config, data.vocab_size, len(data.domains), lanes, self.device)
        self.engine = Engine(self.arena, self.store)
        self.arena.reset_lane(0, seed)

    def at(self, lane: int) -> Trainer:
        """Return the system in another lane of the same arena."""
        other = Trainer.__new__(Trainer)
        other.__dict__.update(self.__dict__)
        other.lane = lane
        return other

    @property
    def tree(self) -> Topology:
        """The tree of the system."""
        return self.arena.trees[self.lane]

    @property
    def steps(self) -> int:
        """Training steps made."""
        return self.arena.host_step[self.lane]

    def step(self) -> StepReport:
        """Make one training step and report it."""
        return self.report(self.engine.step(self.lane, self.lane + 1))

    def train(self, steps: int) -> None:
        """Make training steps without reports, which spares the device a wait per step."""
        self.engine.train(self.lane, self.lane + 1, steps)

    def report(self, result: StepResult) -> StepReport:
        """Describe a step's result for people."""
        tree, arena = self.tree, self.arena
        scale = result.selection.scale[0].tolist()
        measured = arena["responsibility"][self.lane].tolist()
        culprits = [s for s in result.selection.culprits[0].tolist() if s >= 0]
        skipped = bool(result.skipped[0])
        updated = {} if skipped else {s: scale[s] for s in sorted(tree.blocks) if scale[s] > 0}
        size, shared = arena.block_layout.total, arena.shared_layout.total
        moved_shared = shared if self.config.update.shared_scale > 0 and not skipped else 0
        return StepReport(
            step=self.steps - 1,
            loss=float(result.loss[0]),
            path=tuple(tuple(tree.blocks[s].id for s in tree.path(c)) for c in culprits),
            scales={tree.blocks[s].id: value for s, value in updated.items()},
            responsibility={b.id: measured[s] for s, b in sorted(tree.blocks.items())},
            updated_fraction=(len(updated) * size + moved_shared)
            / (len(tree.blocks) * size + shared),
            agents_updated=sum(1 for s in updated if s != 0),
            agents=tree.agents,
            skipped=skipped,
        )

    def set_mix(self, shares: dict[str, float]) -> None:
        """Choose the share of each domain in the training stream.

        Raises:
            ConfigError: for an unknown domain or shares that do not add up to something positive.
        """
        unknown = set(shares) - set(self.data.domains)
        total = sum(shares.values())
        if unknown or not total > 0 or min(shares.values()) < 0:
            raise ConfigError(f"impossible mix {shares}: domains are {self.data.domains}")
        row = tuple(shares.get(domain, 0.0) / total for domain in self.data.domains)
        self.arena.set_mix(self.lane, row)

    def evaluate(
        self, split: str = "validation", domains: tuple[str, ...] | None = None
    ) -> dict[str, float]:
        """Bits per byte on evenly spaced windows of a pool, by domain (all if none are named)."""
        result = {}
        for domain in domains or self.data.domains:
            batch = self.store.spread(split, domain, self.config.train.eval_windows)
            bits = self.engine.bits_per_byte(self.lane, self.lane + 1, batch)
            result[domain] = float(bits[0])
        return result

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [B, T, vocabulary] of token windows int64 [B, T]."""
        inputs = tokens.to(self.device)[None]
        batch = Batch(inputs, inputs, torch.zeros_like(inputs, dtype=torch.bool), inputs[..., 0])
        start, stop = self.lane, self.lane + 1
        weights, text = self.arena.weights(start, stop), read_text(batch, self.config)
        router, levels = self.arena.router(start, stop), self.arena.index(start, stop)
        done = forward(weights, router, levels, batch, text, self.config)
        return logits(weights, done.output.float())[0].view(*tokens.shape, -1)

    def add_agent(self, parent: int) -> int:
        """Add an agent under the block with id `parent`; returns the new block's id.

        Raises:
            TopologyError: if there is no such block or no room.
        """
        slot = edits.add_agent(self.arena, self.lane, self.tree.slot_of(parent))
        return self.tree.blocks[slot].id

    def delete_agent(self, block_id: int) -> None:
        """Delete the block with this id, and its subtree.

        Raises:
            TopologyError: for the root or an unknown id.
        """
        edits.delete_agent(self.arena, self.lane, self.tree.slot_of(block_id))

    def merge_agents(self, kept: int, gone: int) -> None:
        """Merge the block with id `gone` into its sibling `kept`, with their subtrees.

        Raises:
            TopologyError: if they are no siblings, or differ in shape.
        """
        kept, gone = (self.tree.slot_of(block) for block in (kept, gone))
        merging.merge_agents(self.arena, self.lane, kept, gone)

    def prune(self, fraction: float) -> list[int]:
        """Delete a fraction of the agents, least responsible first; returns their ids."""
        return edits.prune(self.arena, self.lane, fraction)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters: `block.<id>.<name>` and `shared.<name>`."""
        result = {}
        for slot, block in sorted(self.tree.blocks.items()):
            row = self.arena["weight"][self.lane, slot]
            for name, piece in self.arena.block_layout.unpack(row).items():
                result[f"block.{block.id}.{name}"] = piece.clone()
        for name, piece in self.arena.shared_layout.unpack(self.arena["shared"][self.lane]).items():
            result[f"shared.{name}"] = piece.clone()
        return result

    def state_hash(self) -> str:
        """SHA-256 of everything that the system consists of."""
        return self.arena.hash_lane(self.lane)

    def fork(self) -> Trainer:
        """Return an independent copy."""
        twin = Trainer.__new__(Trainer)
        twin.__dict__.update(self.__dict__)
        twin.arena = Arena(
            self.config, self.data.vocab_size, len(self.data.domains), 1, self.device
        )
        twin.lane = 0
        twin.arena.write_lane(0, self.arena.read_lane(self.lane))
        twin.engine = Engine(twin.arena, self.store)
        return twin

    def save(self, folder: str | Path) -> Path:
        """Save the complete state as a checkpoint folder."""
        lane = self.arena.read_lane(self.lane)
        return save_checkpoint(Path(folder), lane.tensors, self.describe(), kind=CHECKPOINT_KIND)

    def describe(self) -> dict[str, Any]:
        """The part of the state that is not tensors, as plain JSON data."""
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "data": self.data.fingerprint,
            "tree": self.tree.to_dict(),
        }

    @classmethod
    def load(
        cls,
        folder: str | Path,
        data: TextData | str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        lanes: int = 1,
    ) -> Trainer:
        """Load a checkpoint.

        Args:
            folder: the checkpoint.
            data: its text, or where that is now; by default, where it was.
            device: where everything is held.
            lanes: rows of the arena.

        Raises:
            CheckpointError: if it is missing, damaged, or belongs to other text.
        """
        from k1.data import load_data

        tensors, state = load_checkpoint(Path(folder), kind=CHECKPOINT_KIND)
        saved = read_dataclass(_Saved, state, str(folder), whole=True)
        config = Config.from_dict(saved.config)
        if not isinstance(data, TextData):
            source = config.data.source if data is None else str(data)
            data = load_data(dataclasses.replace(config.data, source=source))
        if data.fingerprint != saved.data:
            raise CheckpointError(
                f"{folder} was trained on other text than what was loaded: "
                "give the same --data and --preset"
            )
        # Before anything is made by its sizes, which the tensors have to bear out.
        check_fit(tensors, lane_layout(config, data.vocab_size, len(data.domains)))
        tree = Topology(config.model.level_capacity, config.model.max_children)
        tree.load_dict(saved.tree)
        lane = LaneState(tensors, tree)
        trainer = cls(config, data, seed=saved.seed, device=device, lanes=lanes)
        trainer.arena.check(lane)
        trainer.arena.write_lane(0, lane)
        return trainer
