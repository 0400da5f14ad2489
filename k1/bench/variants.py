"""What is compared: ways to make a training step, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from k1.errors import ConfigError

REFERENCE = "sparse"
"""Ratios are against this variant."""
NEVER_AGAIN = 1 << 40
"""An `attribution_every` that lets only step 0 attribute."""


@dataclass(frozen=True)
class Variant:
    """One way to make a training step."""

    name: str
    about: str
    """What it is, for the page."""
    kind: str
    """Who makes the step: "stock" (ordinary modules), "stacked" (K-1's forward pass with torch's
    optimizer), "engine" (K-1's engine) or "frozen" (K-1's forward pass alone)."""
    mode: str = "dense"
    """`update.mode` of an engine."""
    compiled: str | None = None
    """Mode for `torch.compile`; None is eager."""
    regional: bool = False
    """Each block is compiled by itself: one compilation serves all."""
    autocast: bool = False
    toggle: bool = False
    """Only one path's modules require gradients."""
    graph: bool = False
    """The step is captured in a CUDA graph; on a CPU it is not."""
    fused: bool = False
    """Fused Triton kernels where they fit; on a CPU there are none."""
    inner_steps: int = 1
    attribution_every: int = 4
    deterministic: bool = False
    """Torch's deterministic algorithms, as K-1 runs on CUDA. Nobody else is slowed by them."""
    cuda_only: bool = False
    """Has no meaning, or nothing of its own, on a CPU."""

    @property
    def plain(self) -> Variant:
        """The same step without compilers, graphs and kernels of our own."""
        return replace(self, compiled=None, regional=False, graph=False, fused=False)

    @property
    def captured(self) -> bool:
        """Whether its memory is taken while it warms up, and then kept."""
        return self.graph or self.compiled == "reduce-overhead"

    def on(self, device: str) -> Variant:
        """The variant as it is on `cpu` or `cuda`."""
        return self if device == "cuda" else replace(self, graph=False, fused=False)


def _sparse(name: str, about: str, *, inner: int = 1, every: int = 4) -> Variant:
    return Variant(
        name,
        about,
        "engine",
        "sparse",
        graph=True,
        fused=True,
        inner_steps=inner,
        attribution_every=every,
        deterministic=True,
    )


_ALL = (
    Variant(
        "stock-eager", "ordinary modules, dense; on CUDA bfloat16 with float32 masters", "stock"
    ),
    Variant(
        "stock-autocast", "stock-eager under autocast", "stock", autocast=True, cuda_only=True
    ),
    Variant("stock-compiled", "ordinary modules, torch.compile", "stock", compiled="default"),
    Variant(
        "stock-regional", "ordinary modules, torch.compile of each block", "stock",
        compiled="default", regional=True,
    ),
    Variant(
        "stock-compiled-autocast", "stock-compiled under autocast", "stock", compiled="default",
        autocast=True, cuda_only=True,
    ),
    Variant(
        "stock-autotune", "torch.compile, max-autotune-no-cudagraphs", "stock",
        compiled="max-autotune-no-cudagraphs", cuda_only=True,
    ),
    Variant(
        "stock-graphs", "torch.compile, reduce-overhead (CUDA graphs)", "stock",
        compiled="reduce-overhead", cuda_only=True,
    ),
    Variant(
        "stock-toggle", "requires_grad for one path of modules, the leaves in turn", "stock",
        toggle=True,
    ),
    Variant("dense", "K-1 dense, eager", "engine", deterministic=True),
    Variant(
        "dense-compiled", "K-1's forward pass, torch.compile; fused AdamW", "stacked",
        compiled="default",
    ),
    Variant(
        "dense-autotune", "dense-compiled, max-autotune-no-cudagraphs", "stacked",
        compiled="max-autotune-no-cudagraphs", cuda_only=True,
    ),
    Variant(
        "dense-graph", "K-1 dense in a CUDA graph", "engine", graph=True, fused=True,
        deterministic=True, cuda_only=True,
    ),
    Variant(
        "exact", "full backward pass, path update", "engine", "exact", graph=True, fused=True,
        deterministic=True,
    ),
    Variant(
        "sparse-eager", "sparse without graph and kernels", "engine", "sparse",
        deterministic=True, cuda_only=True,
    ),
    _sparse("sparse", "probe attribution every 4 steps"),
    _sparse("sparse-inner-2", "sparse, 2 inner steps on a batch", inner=2),
    _sparse("sparse-inner-4", "sparse, 4 inner steps on a batch", inner=4),
    _sparse("sparse-inner-8", "sparse, 8 inner steps on a batch", inner=8),
    _sparse("path-only", "sparse, no attribution due", every=NEVER_AGAIN),
    Variant(
        "frozen-forward", "the frozen forward pass alone, no head", "frozen", "sparse",
        graph=True, fused=True, deterministic=True,
    ),
)  # fmt: skip
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}


def choose(names: str | None, device: str) -> list[Variant]:
    """Look variants up, apart by commas; by default all that have a meaning on the device.

    Raises:
        ConfigError: for an unknown name, or one that needs CUDA on a CPU.
    """
    if names is None:
        return [v.on(device) for v in _ALL if device == "cuda" or not v.cuda_only]
    chosen = []
    for name in names.split(","):
        if name not in VARIANTS:
            raise ConfigError(f"unknown variant {name!r}: choose from {', '.join(VARIANTS)}")
        if VARIANTS[name].cuda_only and device != "cuda":
            raise ConfigError(f"variant {name!r} needs --device cuda")
        chosen.append(VARIANTS[name].on(device))
    return chosen
