"""Where each part of a text went and why: as a function, and through the real entry point."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from k1.config import Config
from k1.data import load_data
from k1.data.documents import SEPARATOR
from k1.errors import DataError
from k1.experiments.nulls import documents_of
from k1.experiments.reading import cut_passages, read_passages
from k1.specialisation import explain as module
from k1.specialisation.explain import explain
from k1.specialisation.show import MOST_PARTS, show_explanation
from k1.trainer import Trainer
from tests.phase2_helpers import EXPLAIN, call
from tests.reference import shake
from tests.test_specialisation import taught


@pytest.fixture
def system(make):
    return taught(make)


def explained(trainer, text, **options):
    return explain(trainer.engine, 0, trainer.data.tokenizer, text, **options)


def test_the_parts_are_the_text(system):
    text = "abcdefghijklabcdefghijkl\nabc\n\n\nlkj\n \nbcdbcd\n"
    found = explained(system, text)
    assert [part.document for part in found.parts] == [0, 0, 1, 2]
    assert found.parts[3].evidence_so_far == found.parts[3].evidence, "a document begins anew"
    by_document = ["".join(p.text for p in found.parts if p.document == d) for d in range(3)]
    assert by_document == ["abcdefghijklabcdefghijkl\nabc", "lkj", "bcdbcd"]
    for part in found.parts:
        assert math.isfinite(part.bits_per_byte)
        assert len(part.went_to) == len(part.responsible) == 3
        assert sum(share.share for share in part.went_to) == pytest.approx(1, abs=1e-5)
    assert sum(s.share for s in found.went_to) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("router", ["learned", "evidence"])
def test_a_document_is_read_with_the_evidence_so_far(make, data, router):
    trainer = shake(make(model={"router": router}))
    passage = cut_passages(trainer.store, "validation", "beta", 1, 40)
    (bits,) = read_passages(trainer.engine, passage)
    found = explained(trainer, documents_of(data, "beta", "validation")[0].text)
    assert len(found.parts) == math.ceil((len("".join(p.text for p in found.parts)) + 1) / 16)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_text_goes_where_its_bigrams_were_counted(system, data):
    for number, domain in enumerate(data.domains):
        text = documents_of(data, domain, "validation")[1].text
        found = explained(system, text)
        assert found.went_to[0].name == f"Node {number + 1}" and found.went_to[0].share > 0.8
        right = [p for p in found.parts if p.went_to[0].id == number + 1]
        assert len(right) > 0.8 * len(found.parts)
        last = found.parts[-2]
        assert last.evidence > 0 and last.why[0].nats > 0
        assert found.parts[0].evidence_so_far == found.parts[0].evidence
        assert last.evidence_so_far > 5 * last.evidence
        assert all(why.text in text + SEPARATOR for why in last.why)


def test_the_responsible_have_the_largest_gradients(system):
    before = system.state_hash()
    (part,) = explained(system, "abcabcabcabc", top=9).parts
    assert system.state_hash() == before
    shares = [share.share for share in part.responsible]
    assert len(shares) == 4 and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    trace = module.trace
    tokens = torch.tensor([[list(b"abcabcabcabc\n\n")]])
    starts = torch.zeros_like(tokens[..., :-1], dtype=torch.bool)
    starts[..., 0] = True
    batch = module.Batch(tokens[..., :-1], tokens[..., 1:], starts, starts[..., 0].long())
    norms = trace(system.engine, 0, batch).responsibility
    assert part.responsible[0].id == system.tree.blocks[int(norms.argmax())].id


@pytest.mark.parametrize("text", ["", "\n \n", "a" * (module.MOST_BYTES + 1)])
def test_texts_that_cannot_be_explained(system, text):
    with pytest.raises(DataError, match="give"):
        explained(system, text)


def test_what_people_see_is_short_and_says_what_is_left_out(system):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show_explanation(explained(system, "abcdefghijklmnop" * (MOST_PARTS + 3))))
    shown = console.export_text()
    assert (
        "and 4 more parts" in shown and "so far" in shown and "Node 1" in shown and "nats" in shown
    )


# -- through the entry point ----------------------------------------------------------------------

PROSE = "The church was restored in 1872, after a fire had destroyed most of the roof. "
CODE = "def read(self, path):\n    self.path = path\n    return self.lines[0]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of a system that has learnt text with words, and a text."""
    here = tmp_path_factory.mktemp("explain")
    for domain, line in (("code", CODE), ("prose", PROSE)):
        (here / "text" / domain).mkdir(parents=True)
        for split, size in (("train", 60), ("validation", 30), ("test", 30)):
            rows = (f"{line}{split} {i} {domain[i % 4 :]}" for i in range(size))
            (here / "text" / domain / f"{split}.txt").write_text("\n\n".join(rows))
    data = load_data(here / "text")
    config = Config.preset("tiny").replace(data={"source": str(here / "text")})
    trainer = Trainer(config.replace(train={"lr": 5e-3}), data)
    trainer.train(60)
    trainer.save(here / "run")
    (here / "mixed.txt").write_text(PROSE + "\n\n" + CODE)
    return here / "run"


def test_a_text_through_the_entry_point(run):
    done = call(EXPLAIN, run, "--text", run.parent / "mixed.txt", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    words = "".join(part["text"] for part in found["parts"])
    assert "restored in 1872" in words and "return self.lines[0]" in words
    assert {part["document"] for part in found["parts"]} == {0, 1}
    assert found["router"] == "evidence" and len(found["went_to"]) == 4


def test_people_see_where_a_text_went(run):
    done = call(EXPLAIN, run, "--text", run.parent / "mixed.txt")
    assert done.returncode == 0 and done.stderr == ""
    for words in ("went to", "responsible", "bits per byte", "The church", "Agent", "Root"):
        assert words in " ".join(done.stdout.split()), words


def test_people_see_who_the_agents_are(run):
    done = call(EXPLAIN, run)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shown = " ".join(done.stdout.split())
    for words in ("Who does what", "Agent 4", "bits about its domain", "bigrams alone: 100 %"):
        assert words in shown, words
