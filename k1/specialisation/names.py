"""Names for agents from what they are responsible for, with the words that they rest on.

Each window counts for an agent by the agent's weight in it. A word is typical of an agent if it is
more frequent in what the agent is responsible for than in the rest, by the log odds ratio with a
prior from all text and its standard error (Monroe, Colaresi and Quinn, "Fightin' words", 2008).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from k1.specialisation.information import Weights

WORDS = re.compile(r"\n[ \t]+|\w+|[^\w\s]+")
"""Words, runs of signs, and indentation."""
KINDS = (
    ("indented lines", re.compile(r"\n[ \t]+")),
    ("numbers", re.compile(r"\d+")),
    ("names with underscores", re.compile(r"(?=.*[A-Za-z])\w*_\w*")),
    ("brackets and operators", re.compile(r"[^\w\s]*[()\[\]{}=<>+*/\\|&%$#@^~_][^\w\s]*")),
    ("punctuation", re.compile(r"[^\w\s]+")),
    ("capitalised words", re.compile(r"[A-Z]\w*")),
    ("short words", re.compile(r"\w{1,3}")),
    ("long words", re.compile(r"\w{8,}")),
    ("words", re.compile(r"\w+")),
)
"""Classes of words; a word is of the first that matches all of it."""
LEAST_Z, LEAST_RATIO = 4.0, 1.25
"""A word or class is typical if it is so many standard errors from common, and so much more
frequent."""
NOTHING = "nothing of its own"


@dataclass(frozen=True)
class Typical:
    """A word or a class of words that is typical of an agent."""

    word: str
    ratio: float
    """Its frequency in the agent's text, divided by that in the rest."""
    z: float


@dataclass(frozen=True)
class Nickname:
    """What an agent may be called, and why."""

    name: str
    kinds: tuple[Typical, ...]
    words: tuple[Typical, ...]


def kind_of(word: str) -> str:
    """The class of a word."""
    return next(name for name, pattern in KINDS if pattern.fullmatch(word))


def typical(
    own: Counter[str], rest: Counter[str], most: int, strength: float = 100.0
) -> tuple[Typical, ...]:
    """Words that are more frequent in one text than in another, the surest first.

    Args:
        own: how often each word is in the one, not necessarily a whole number.
        rest: the same of the other.
        most: how many to return.
        strength: words that the prior counts for.
    """
    if len(own.keys() | rest.keys()) < 2:  # a word with no other has no odds
        return ()
    total_own, total_rest = sum(own.values()), sum(rest.values())
    total = total_own + total_rest
    found = []
    for word in own:
        prior = strength * (own[word] + rest[word]) / total
        a, b = own[word] + prior, rest[word] + prior
        odds = a / (total_own + strength - a), b / (total_rest + strength - b)
        z = math.log(odds[0] / odds[1]) / math.sqrt(1 / a + 1 / b)
        share = a / (total_own + strength), b / (total_rest + strength)
        found.append(Typical(word, share[0] / share[1], z))
    sure = [t for t in found if t.z >= LEAST_Z and t.ratio >= LEAST_RATIO]
    return tuple(sorted(sure, key=lambda t: (-t.z, t.word))[:most])


def nicknames(texts: Sequence[str], weight: Weights) -> list[Nickname]:
    """Name agents by the windows that they are responsible for.

    Args:
        texts: of the windows.
        weight: [windows, agents]: each agent's share of each window, at most 1.
    """
    words = [Counter(WORDS.findall(text)) for text in texts]
    kinds = [_by_kind(count) for count in words]
    return [
        _nickname(_divide(kinds, column), _divide(words, column)) for column in weight.T.tolist()
    ]


def _by_kind(words: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for word, times in words.items():
        found[kind_of(word)] += times
    return found


def _divide(
    counts: Sequence[Counter[str]], shares: Sequence[float]
) -> tuple[Counter[str], Counter[str]]:
    """Divide what was counted between an agent and all others."""
    own: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for count, share in zip(counts, shares, strict=True):
        for word, times in count.items():
            own[word] += times * share  # type: ignore[assignment]
            rest[word] += times * (1 - share)  # type: ignore[assignment]
    return own, rest


def _nickname(
    kinds: tuple[Counter[str], Counter[str]], words: tuple[Counter[str], Counter[str]]
) -> Nickname:
    own_kinds, own_words = typical(*kinds, most=2), typical(*words, most=6)
    named = ", ".join(kind.word for kind in own_kinds)
    shown = " ".join(readable(word.word) for word in own_words[:3])
    return Nickname(" | ".join(filter(None, (named, shown))) or NOTHING, own_kinds, own_words)


def readable(text: str) -> str:
    """Write white space so that it can be seen."""
    return text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
