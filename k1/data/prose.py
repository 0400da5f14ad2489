"""Running English out of documentation, package descriptions and licences."""

import ast
import re
from collections.abc import Callable, Iterable
from email.parser import BytesParser
from functools import partial
from pathlib import Path

MIN_WORDS = 12
MAX_OTHER = 0.08
"""Largest share of digits, operators and the like among the characters of prose."""
MAX_NON_WORDS = 0.25
"""Largest share of words of prose that begin with something else than a letter."""

_OTHER = re.compile(r"""[^ ,.;:'"()`?!A-Za-z-]""")
_NOT_A_WORD = re.compile(r"(?:^| )[^A-Za-z]")
_RULE = re.compile(r"(.)\1\1\1")
"""Four equal characters in a row: a heading's underline, or the frame of a table."""

Units = dict[str, Callable[[], Iterable[str]]]
"""Named places to read prose from."""


class Prose:
    """Picks the paragraphs that read as English, each of them once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def of(self, texts: Iterable[str]) -> str:
        """Return the new paragraphs of running English in some texts, one per line."""
        found = []
        for text in texts:
            for paragraph in _paragraphs(text):
                key = paragraph.casefold()
                if key not in self._seen and _is_prose(paragraph):
                    # The same licence comes with many packages.
                    self._seen.add(key)
                    found.append(paragraph)
        return "\n".join(found)


def _paragraphs(text: str) -> Iterable[str]:
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line.strip())
        elif lines:
            yield " ".join(" ".join(lines).split())
            lines = []


def _is_prose(paragraph: str) -> bool:
    words = paragraph.count(" ") + 1  # the paragraph's white space is normalised
    return (
        words >= MIN_WORDS
        and paragraph.endswith((".", ":", "!", "?"))
        and not any(mark in paragraph for mark in (">>>", "://"))
        and not _RULE.search(paragraph)
        and len(_OTHER.findall(paragraph)) <= MAX_OTHER * len(paragraph)
        and len(_NOT_A_WORD.findall(paragraph)) <= MAX_NON_WORDS * words
    )


def reference_topics(standard_library: Path) -> Units:
    """Return the topics of the language reference that `help()` shows."""
    path = standard_library / "pydoc_data" / "topics.py"
    try:
        module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    units: Units = {}
    for table in ast.walk(module):
        if isinstance(table, ast.Dict):
            for key, value in zip(table.keys, table.values, strict=True):
                match key, value:
                    case ast.Constant(str(topic)), ast.Constant(str(text)):
                        units[f"topics/{topic}"] = partial(tuple, [text])
    return units


def package_texts(site_folder: Path, packages: Iterable[str]) -> Units:
    """Return the descriptions and licences of installed packages."""
    units: Units = {}
    for package in packages:
        for info in sorted(site_folder.glob(f"{package}-*.dist-info")):
            units[f"description/{package}"] = partial(_description, info / "METADATA")
            for path in sorted(info.rglob("*")):
                if path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                    name = path.relative_to(info).as_posix()
                    units[f"licence/{package}/{name}"] = partial(_plain_text, path)
    return units


def _description(path: Path) -> tuple[str, ...]:
    try:
        message = BytesParser().parsebytes(path.read_bytes())
        payload = message.get_payload(decode=True)
        return (payload.decode(),) if isinstance(payload, bytes) else ()
    except (OSError, ValueError):
        return ()


def _plain_text(path: Path) -> tuple[str, ...]:
    try:
        return (path.read_bytes().decode(),) if path.is_file() else ()
    except (OSError, ValueError):
        return ()
