"""Variations of versions, one thing at a time, as data: what each part does."""

from __future__ import annotations

from typing import Any

from k1.experiments.method import FULL, Fields, Method, sections
from k1.experiments.versions import VersionsLearner

TREES: dict[str, tuple[int, ...]] = {
    "depth-2": (40,),
    "depth-3": (8, 4),
    "depth-5": (2, 2, 2, 3),
    "branching-3": (3, 3, 3),
    "branching-4": (4, 4, 1),
}
"""Trees of as nearly as many blocks as the default one (41, depth 4, branching 4, 3 and 2)."""


def _varied(name: str, what: str, fields: Fields, **options: Any) -> Method:
    """Vary `k1-versions` (traced paths) or, with `traced=0`, `k1-versions-free`."""
    base = "k1-versions" if options.setdefault("traced", 16) else "k1-versions-free"
    full = f"{base}, {what}"
    return Method(
        f"vary-{name}", full, sections(FULL, fields), learner=VersionsLearner, options=options
    )


def _tree(name: str, branching: tuple[int, ...]) -> Method:
    model = {"branching": branching, "max_children": max(branching)}
    room = {"spare": 0.0, "spare_levels": 0}
    shape = " x ".join(map(str, branching))
    return _varied(name, f"a tree of {shape}", {"model": {**model, **room}})


ABLATIONS = (
    *(
        _varied(f"top-k-{n}", f"top_k {n}", {"train": {"top_k": n}}, traced=0)
        for n in (1, 5, 10, 40)
    ),
    _varied("percentages", "in percentages (100, 15, 5 and 5 %)",
            {"update": {"scales": (1.0, 0.15, 0.05), "root_scale": 0.05}}),
    *(
        _varied(f"cooldown-{n}", f"cooldown {n}", {"train": {"cooldown": n}}, traced=0)
        for n in (5, 50)
    ),
    _varied("random", "each path random", {"train": {"exploration": 1.0}}, traced=0),
    _varied("full-attribution", "attribution by the whole batch at every step",
            {"update": {"attribution_every": 1, "probe_fraction": 1.0}}, traced=0),
    *(
        _varied(f"inner-{n}", f"{n} inner steps", {"update": {"inner_steps": n}})
        for n in (2, 4)
    ),
    *(_varied(f"tau-{x:g}", f"tau {x:g}", {"evidence": {"tau": x}}) for x in (0.05, 0.2, 2.0)),
    _varied("unigrams", "found again by unigrams", {}, ngrams=1),
    _varied("trigrams", "found again by trigrams", {}, ngrams=3),
    _varied("counted-16", "16 batches counted for a version", {}, counted=16),
    _varied("traced-1", "a path traced by one batch", {}, traced=1),
    *(_tree(name, branching) for name, branching in TREES.items()),
)  # fmt: skip
