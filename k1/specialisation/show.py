"""Studies and explanations for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from k1.display import percent
from k1.specialisation.agents import MEASURES, Agent, Study
from k1.specialisation.explain import Explanation, Part, Share
from k1.specialisation.information import Information
from k1.specialisation.names import readable

MOST_PARTS = 40
"""Parts that are shown; JSON has all of them."""
_SNIPPET = 48
"""Characters of a part that are shown."""


def show_study(study: Study) -> RenderableType:
    """A table of agents, and whether they tell domains apart."""
    table = Table(
        "agent", "mostly responsible for", *study.domains, "share", title="Who does what",
        caption=(
            "By domain: share of the agent's responsibility, and bits per byte lost without it. "
            "Share: its part in the responsibility of its level."
        ),
    )  # fmt: skip
    for agent in study.agents:
        cells = [
            f"{percent(agent.shares['responsibility'][d])}  {agent.harm[d]:+.3f}"
            for d in study.domains
        ]
        share = percent(agent.weight["responsibility"])
        table.add_row(Text(_label(agent)), Text(agent.nickname.name), *cells, share)
    lines = [_sentence(study, name) for name in MEASURES]
    told = study.accuracy
    lines.append(
        f"The domain of a window is told right by its leaf: {percent(told['routing'])} by routing, "
        f"{percent(told['responsibility'])} by responsibility; by bigrams alone: "
        f"{percent(told['bigrams'])}; by chance: {percent(told['chance'])}."
    )
    return Group(table, *(Text(line) for line in lines))


def _label(agent: Agent) -> str:
    """Indented by level."""
    *above, own = agent.name.split(" / ")
    return "  " * len(above) + own


def _sentence(study: Study, measure: str) -> str:
    """What one measure says about the leaves."""
    found: Information = study.information[measure]
    names = {agent.id: agent.name for agent in study.agents}
    top = names[study.leaves[found.top_agent]]
    bits, share = found.bits, found.top_share
    return (
        f"By {measure}, the leaf that a window goes to tells {bits.value:.3f} bits about its "
        f"domain (labels permuted: {bits.null_mean:.3f}, at most {bits.null_high:.3f} in 99 of "
        f"100; p {bits.p:.3f}). Most specialised: {top}, {percent(share.value)} "
        f"{study.domains[found.top_domain]} (permuted: {percent(share.null_mean)}, "
        f"p {share.p:.3f})."
    )


def show_explanation(explanation: Explanation) -> RenderableType:
    """A table of parts, and where the text went as a whole."""
    counted = explanation.router == "evidence"
    table = Table("text", "went to", "because of", "bits per byte", "responsible for the error")
    for part in explanation.parts[:MOST_PARTS]:
        table.add_row(
            Text(_snippet(part.text), overflow="fold"),
            _shares(part.went_to),
            Text(_why(part) if counted else "no statistics"),
            f"{part.bits_per_byte:.2f}",
            _shares(part.responsible),
        )
    whole = ", ".join(f"{s.name} {percent(s.share)}" for s in explanation.went_to)
    lines = [
        f"In all: {explanation.bits_per_byte:.3f} bits per byte; went to {whole}.",
        "Went to: leaves by their share in the output. Because of: bigrams, times seen, and by how "
        "many nats they speak for the first leaf against its siblings, path and all; then the same "
        "of all bigrams here and in the document so far (if that is little or below 0, learned "
        "weights and priors decided). Responsible: blocks by gradient norm, as shares of the sum.",
    ]
    left = len(explanation.parts) - MOST_PARTS
    if left > 0:
        lines.insert(0, f"... and {left} more parts: --json has them all.")
    return Group(table, *(Text(line) for line in lines))


def _snippet(text: str) -> str:
    shown = readable(text).replace("·", " ")
    return shown if len(shown) <= _SNIPPET else shown[: _SNIPPET - 1] + "…"


def _shares(shares: tuple[Share, ...]) -> Text:
    rows = [f"{share.name.split(' / ')[-1]} {percent(share.share)}" for share in shares]
    return Text("\n".join(rows))


def _why(part: Part) -> str:
    rows = [f"{readable(why.text)!r} x{why.times} {why.nats:+.2f}" for why in part.why]
    return "\n".join([*rows, f"all {part.evidence:+.1f}, so far {part.evidence_so_far:+.1f}"])
