"""A whole benchmark: every configuration asked for, and all that makes its figures reproducible."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import k1
from k1.bench.attribution import agreement, overhead
from k1.bench.configurations import BY_DEVICE, block_count, configuration, text_of
from k1.bench.suite import Plan, Suite, free_memory, parameters
from k1.bench.timing import matmul_peak
from k1.bench.variants import choose


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    configs: str | None
    """Names apart by commas; None for what suits the device."""
    variants: str | None
    """Names apart by commas; None for all."""
    router: str | None
    rounds: int
    seconds: float
    patience: float
    agreement: int
    agreement_batches: int


def measure(
    request: Request,
    device: torch.device,
    command: list[str],
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        request: what to measure.
        device: on which device.
        command: the command line, for the record.
        say: where progress is told.
        keep: is given everything measured so far whenever a variant has new figures.

    Returns:
        Everything measured, as plain JSON data.

    Raises:
        ConfigError: for an unknown configuration, variant or router.
        DataError: if the text cannot be had.
    """
    names = request.configs.split(",") if request.configs else list(BY_DEVICE[device.type])
    configs = {name: configuration(name, device.type, request.router) for name in names}
    variants = choose(request.variants, device.type)
    plan = Plan(device, matmul_peak(device), request.rounds, request.seconds, request.patience, say)
    cases: dict[str, Any] = {}
    result = {
        "command": _plain(command),
        "complete": False,
        "versions": versions(),
        "device": {**describe(device), "matmul_flops": plan.peak_flops},
        "rounds": request.rounds,
        "configurations": cases,
    }
    for name, config in configs.items():
        data = text_of(config.data)
        count = parameters(config, data.vocab_size)
        say(f"{name}: {block_count(config)} blocks, {count:,} parameters")
        case = cases[name] = {
            "config": config.to_dict(),
            "blocks": block_count(config),
            "parameters": count,
            "text": f"builtin, {config.data.tokenizer}, {data.vocab_size} token ids",
        }

        def keep_case(records: dict[str, Any], case: dict[str, Any] = case) -> None:
            case["variants"] = records
            case["attribution_overhead"] = overhead(records)
            keep(result)

        keep_case(Suite(config, data, plan).run(variants, keep_case))
        if request.agreement:
            say("  agreement of probe and full batch")
            case["agreement"] = agreement(
                config, data, device, request.agreement, request.agreement_batches
            )
            free_memory(device)
            keep(result)
    result["complete"] = True
    keep(result)
    return result


def _plain(command: Sequence[str]) -> str:
    """The command line without places of this machine."""
    told = shlex.join(["python", _short(command[0]), *command[1:]])
    return re.sub(r"--json[ =]\S+", "--json FILE", told)


def _short(script: str) -> str:
    """Name a script as it is called from the repository's root."""
    return "/".join(Path(script).parts[-2:])


def versions() -> dict[str, str | None]:
    """Versions of what decides speed."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "k1": k1.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Name a device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": properties.name, "memory": properties.total_memory}
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """Model name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
