"""The text that every Python installation has."""

import math
import re
from collections import Counter

import pytest

from k1.cli import absolute_source
from k1.data import POOLS, TextData, builtin, load_data
from k1.data.builtin import read_builtin
from k1.data.prose import Prose
from k1.data.python_source import read_python
from k1.errors import DataError
from tests.helpers import loaded_modules

SMALL = 150_000


@pytest.fixture(scope="module")
def data() -> TextData:
    return load_data("builtin", max_bytes=SMALL)


@pytest.fixture(scope="module")
def more() -> TextData:
    return load_data("builtin:" + ",".join(builtin.MORE_DOMAINS), max_bytes=SMALL)


def text_of(data: TextData, domain: str, pool: str) -> str:
    return data.tokenizer.decode(data.tokens(domain, pool))


def test_three_domains_with_all_pools(data: TextData) -> None:
    assert data.domains == ("code", "prose", "science")
    for domain in data.domains:
        kept = sum(len(data.tokens(domain, pool)) for pool in ("train", "gate"))
        assert 0.8 * SMALL < kept <= SMALL
        for pool in POOLS:
            assert len(data.tokens(domain, pool)) > 7_000


def test_no_document_is_in_two_pools(data: TextData, more: TextData) -> None:
    seen: set[str] = set()
    for text in (data, more):
        for domain in text.domains:
            for pool in POOLS:
                for document in text_of(text, domain, pool).split("\n\n"):
                    key = "".join(document.casefold().split())
                    assert key not in seen
                    seen.add(key)


def test_reading_again_gives_the_same(data: TextData) -> None:
    builtin._read_cached.cache_clear()
    assert load_data("builtin", max_bytes=SMALL).fingerprint == data.fingerprint


def test_domains_read_differently(data: TextData) -> None:
    right, wrong = named_right(data)
    assert right > 0.85 * (right + wrong)


def named_right(data: TextData) -> tuple[int, int]:
    """How often a byte-bigram model of training text names the domain of held-out text."""
    models = {domain: Counter(bigrams(text_of(data, domain, "train"))) for domain in data.domains}
    totals = {domain: sum(model.values()) for domain, model in models.items()}

    def score(domain: str, window: str) -> float:
        model, total = models[domain], totals[domain] + 65536
        return sum(math.log((model[pair] + 1) / total) for pair in bigrams(window))

    right = wrong = 0
    for domain in data.domains:
        text = text_of(data, domain, "test")
        for start in range(0, len(text) - 256, 256):
            window = text[start : start + 256]
            best = max(data.domains, key=lambda name: score(name, window))
            right, wrong = right + (best == domain), wrong + (best != domain)
    return right, wrong


def bigrams(text: str) -> list[str]:
    return [text[i : i + 2] for i in range(len(text) - 1)]


def test_more_domains_read_differently_from_each_other(more: TextData) -> None:
    assert more.domains == builtin.MORE_DOMAINS
    right, wrong = named_right(more)
    assert right > 0.85 * (right + wrong)


def test_a_domain_is_the_same_whatever_is_read_with_it(data: TextData, more: TextData) -> None:
    few = load_data("builtin:stubs,code", max_bytes=SMALL)
    assert few.domains == ("stubs", "code")
    for pool in POOLS:
        assert text_of(few, "code", pool) == text_of(data, "code", pool)
        assert text_of(few, "stubs", pool) == text_of(more, "stubs", pool)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:code,poems", '"poems" is none .* there are code, prose'),
        ("builtin:", 'domain "" is none'),
        ("builtin:code,stubs,code", '"code" is named twice'),
    ],
)
def test_a_wrong_name_is_an_error_that_lists_the_domains(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(source, max_bytes=SMALL)


@pytest.mark.parametrize("source", ["builtin", "builtin:code,stubs", "hub", ""])
def test_a_named_source_is_no_path(source: str) -> None:
    assert absolute_source(source) == source


def test_headers_lose_their_licence_but_no_code() -> None:
    for comment in ("// Copyright\n//\n  // more", "/* Copyright\n * more */", "\n// one"):
        source = f"{comment}\n#pragma once\n// stays\nint f();"
        assert builtin._LICENCE_HEADER.sub("", source, count=1).strip() == (
            "#pragma once\n// stays\nint f();"
        )
    assert builtin._LICENCE_HEADER.sub("", "int x; /* stays */") == "int x; /* stays */"


def test_nothing_is_imported_to_be_read() -> None:
    code = "from k1.data.builtin import read_builtin; read_builtin(100_000)"
    assert loaded_modules(code, ("torch", "scipy", "sympy", "datasets")) == []


def test_too_little_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_package_files", lambda packages: {})
    builtin._read_cached.cache_clear()
    with pytest.raises(DataError, match=r'"science" .* has only 0 bytes .* pass a folder'):
        read_builtin(SMALL)
    builtin._read_cached.cache_clear()


def test_python_source_is_parted() -> None:
    source = b'''#!/usr/bin/env python
# Copyright: somebody.

"""What the module does."""
# A comment.
import os

class Thing:
    """What it is.

    More.
    """

    def act(self):  # why
        """What it does."""
        return """no docstring"""

class Error(Exception):
    """Stays."""

def short(): "stays too"; return 1
'''
    parted = read_python(source)
    assert parted is not None
    assert parted.docstrings == ("What the module does.", "What it is.\n\nMore.", "What it does.")
    assert parted.code.startswith("import os")
    for kept in ("# why", "no docstring", "Stays.", "stays too"):
        assert kept in parted.code
    assert not re.search("Copyright|What", parted.code)
    compile(parted.code, "parted", "exec")


@pytest.mark.parametrize("source", [b"def f(:", b"\xff = 1", b"x = 1\0", b"(" * 5000])
def test_files_that_cannot_be_read_are_skipped(source: bytes) -> None:
    assert read_python(source) is None


def test_docstring_that_is_no_text_is_left_out() -> None:
    parted = read_python(b'"""\\ud800"""\nx = 1\n')
    assert parted is not None
    assert parted.docstrings == ()


def test_prose_picks_sentences_once() -> None:
    sentence = "The quick brown fox jumps over the lazy dog, and then it goes home again."
    texts = [
        f"Title\n=====\n\n{sentence[:30]}\n  {sentence[30:]}\n\n>>> f(1)\n2\n",
        "x : int, y : array of shape (3, 4), z = [1, 2, 3], w -> {4: 5}, v = 6, and more of it.",
        sentence.upper(),
    ]
    assert Prose().of(texts) == " ".join(f"{sentence[:30]}\n  {sentence[30:]}".split())


@pytest.mark.slow
def test_a_megabyte_for_training_in_each_domain() -> None:
    data = load_data()
    for domain in data.domains:
        assert len(data.tokens(domain, "train")) > 1_000_000
        for pool in POOLS:
            assert len(data.tokens(domain, pool)) > 64 * 1024
