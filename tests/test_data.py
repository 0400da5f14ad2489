"""Tokens, pools, folders and the hub."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k1.data import POOLS, BpeTokenizer, ByteTokenizer, DataConfig, TextData, load_data
from k1.data import hub as hub_module
from k1.data.documents import Document, split_documents, total_size
from k1.data.pools import build_pools, carve
from k1.errors import ConfigError, DataError
from tests.helpers import loaded_modules

SPLITS = ("train", "validation", "test")

texts = st.text(max_size=80)
documents = st.builds(
    Document, st.text(st.characters(exclude_categories=["Cs", "Zl", "Cc"]), min_size=1, max_size=60)
)


def story(domain: str, split: str, number: int) -> str:
    """Return a small document unlike any other."""
    lines = [f"{domain} {split} document {number}: the café — {number * k} of {k}" for k in (3, 7)]
    return "\n".join(lines)


def write_folder(folder: Path, counts: tuple[int, int, int] = (60, 12, 9)) -> Path:
    for domain in ("alpha", "beta"):
        (folder / domain).mkdir(parents=True)
        for split, count in zip(SPLITS, counts, strict=True):
            text = "\n\n".join(story(domain, split, number) for number in range(count))
            (folder / domain / f"{split}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    lines = [story("alpha", "train", number) for number in range(50)]
    return BpeTokenizer.train(lines, 400)


def documents_of(data: TextData, domain: str, pool: str) -> list[str]:
    """Cut a pool's tokens at its starts."""
    tokens, starts = data.tokens(domain, pool), data.starts(domain, pool)
    cuts = [*torch.nonzero(starts).flatten().tolist(), len(tokens)]
    return [data.tokenizer.decode(tokens[a:b]) for a, b in pairwise(cuts)]


# --- tokenizers ---------------------------------------------------------------------------


@given(texts)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tobytes() == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(text=texts)
def test_bpe_round_trip_and_token_bytes(bpe: BpeTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert [part.tolist() for part in bpe.encode_all([text, text])] == [ids.tolist()] * 2


def test_bpe_merges_and_is_deterministic(bpe: BpeTokenizer) -> None:
    again = BpeTokenizer.train([story("alpha", "train", number) for number in range(50)], 400)
    assert again.identity == bpe.identity
    assert 256 < bpe.vocab_size <= 400
    assert len(bpe.token_bytes) == bpe.vocab_size
    assert bpe.token_bytes.min() == 1
    text = story("alpha", "train", 1)
    assert len(bpe.encode(text)) < len(text.encode()) / 2


def test_bytes_that_are_no_text_decode_to_a_replacement() -> None:
    assert ByteTokenizer().decode([0xFF, 65]) == "\ufffdA"
    assert ByteTokenizer().decode(torch.tensor([72, 105])) == "Hi"


# --- documents and pools ------------------------------------------------------------------


def test_blank_lines_separate_documents() -> None:
    text = "\r\n a b \r\nc\n \t\n\n\nd\x0cd\n"
    assert [document.text for document in split_documents(text)] == [" a b\nc", "d\x0cd"]


def test_key_ignores_case_and_white_space() -> None:
    assert Document("A b\nc").key == Document("a  B C").key != Document("a b d").key


@settings(deadline=None)
@given(st.lists(documents, min_size=2, max_size=30, unique_by=lambda d: d.key), st.integers(0, 900))
def test_carve_parts_whole_documents_whatever_their_order(
    given_documents: list[Document], target: int
) -> None:
    rest, parted = carve(given_documents, target)
    assert rest
    assert parted
    assert sorted(d.key for d in rest + parted) == sorted(d.key for d in given_documents)
    assert len(parted) == 1 or total_size(parted) <= 1.5 * target
    again = carve(given_documents[::-1], target)[1]
    assert {d.key for d in again} == {d.key for d in parted}


@settings(deadline=None)
@given(st.data(), st.integers(200, 3000))
def test_pools_are_disjoint_within_budget_and_independent_of_order(
    data: st.DataObject, max_bytes: int
) -> None:
    splits = {
        split: data.draw(st.lists(documents, min_size=n, max_size=40))
        for split, n in (("train", 4), ("validation", 1), ("test", 1))
    }
    try:
        pools = build_pools({"d": splits}, max_bytes)["d"]
    except DataError as error:
        assert "document" in str(error)
        return
    keys = [document.key for pool in POOLS for document in pools[pool]]
    assert len(keys) == len(set(keys))
    assert total_size(pools["train"] + pools["gate"]) <= max_bytes
    assert all(pools[pool] for pool in POOLS)
    shuffled = {split: documents[::-1] for split, documents in splits.items()}
    again = build_pools({"d": shuffled}, max_bytes)["d"]
    assert {d.key for d in again["gate"]} == {d.key for d in pools["gate"]}


def test_duplicates_stay_in_the_held_out_split() -> None:
    filler = [Document(f"filler {number}") for number in range(5)]
    splits = {
        "train": [Document("Same  text"), Document("t"), *filler],
        "validation": [Document("same text"), Document("v")],
        "test": [Document("SAME TEXT")],
    }
    pools = build_pools({"d": splits}, 10_000)["d"]
    assert [d.text for d in pools["test"]] == ["SAME TEXT"]
    assert [d.text for d in pools["validation"]] == ["v"]
    assert "Same  text" not in [d.text for d in pools["train"] + pools["gate"]]


# --- TextData from a folder ---------------------------------------------------------------


@pytest.mark.parametrize("settings_", [{}, {"tokenizer": "bpe", "vocab_size": 500}])
def test_folder_becomes_tokens(folder: Path, settings_: dict) -> None:
    data = load_data(folder, **settings_)
    assert data.domains == ("alpha", "beta")
    assert data.vocab_size == data.tokenizer.vocab_size == len(data.token_bytes)
    assert data.token_bytes.dtype == torch.int32
    for domain in data.domains:
        seen: dict[str, str] = {}
        for pool in POOLS:
            tokens, starts = data.tokens(domain, pool), data.starts(domain, pool)
            assert tokens.dtype == (torch.int32 if settings_ else torch.uint8)
            assert starts.dtype == torch.bool
            assert starts.shape == tokens.shape
            assert starts[0]
            found = documents_of(data, domain, pool)
            assert all(text.endswith("\n\n") for text in found[:-1])
            assert not found[-1].endswith("\n")
            size = data.token_bytes[tokens.long()].sum().item()
            assert size == sum(len(text.encode()) for text in found)
            seen |= {text.strip(): pool for text in found}
        for split, count in zip(SPLITS, (60, 12, 9), strict=True):
            expected = {"train", "gate"} if split == "train" else {split}
            assert {seen[story(domain, split, n)] for n in range(count)} == expected


def test_same_text_gives_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    first = load_data(folder).fingerprint
    assert load_data(DataConfig(source=str(folder))).fingerprint == first
    assert load_data(folder, tokenizer="bpe", vocab_size=300).fingerprint != first
    with (folder / "beta" / "test.txt").open("a", encoding="utf-8") as file:
        file.write("!")
    assert load_data(folder).fingerprint != first


def test_bpe_learns_from_training_text_only(folder: Path) -> None:
    first = load_data(folder, tokenizer="bpe", vocab_size=500).tokenizer.identity
    for split in ("validation", "test"):
        with (folder / "beta" / f"{split}.txt").open("a", encoding="utf-8") as file:
            file.write("\n\n" + "zebra quagga " * 50)
    assert load_data(folder, tokenizer="bpe", vocab_size=500).tokenizer.identity == first


def test_max_bytes_keeps_a_part(folder: Path) -> None:
    data = load_data(folder, max_bytes=1500)
    for domain in data.domains:
        size = len(data.tokens(domain, "train")) + len(data.tokens(domain, "gate"))
        assert 1000 < size <= 1500


def test_require_names_what_is_missing(folder: Path) -> None:
    data = load_data(folder)
    data.require(10)
    with pytest.raises(DataError, match=r'domain "alpha", pool "gate" has \d+ tokens but 1000'):
        data.require(1000)


def test_describe_and_unknown_names(folder: Path) -> None:
    data = load_data(folder)
    lines = data.describe().splitlines()
    assert len(lines) == 3
    assert "validation" in lines[1]
    assert "12 documents" in lines[1]
    with pytest.raises(DataError, match="there are alpha, beta"):
        data.tokens("gamma", "train")
    with pytest.raises(DataError, match="there are train, gate"):
        data.starts("alpha", "dev")


def test_byte_order_mark_and_crlf_do_not_matter(folder: Path) -> None:
    first = load_data(folder).fingerprint
    for path in folder.rglob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_data(folder).fingerprint == first


# --- mistakes -----------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_misspelt_source() -> None:
    with pytest.raises(DataError) as error:
        load_data("bulitin")
    assert 'neither "builtin", "hub" nor an existing folder' in one_line(error)


def test_folder_mistakes(folder: Path, tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(DataError) as error:
            load_data(folder)
        return one_line(error)

    path = folder / "beta" / "test.txt"
    good = path.read_bytes()
    path.write_bytes(b"abc\xff")
    assert "not UTF-8 (byte 3)" in message()
    path.write_bytes(b" \n\n\t\n")
    assert "is empty" in message()
    path.unlink()
    assert "is missing" in message()
    path.mkdir()
    assert "is a folder" in message()
    path.rmdir()
    path.write_bytes((folder / "alpha" / "test.txt").read_bytes())
    assert 'domain "beta"' in message()
    path.write_bytes(good)
    (folder / "beta" / "train.txt").write_text("one document only", encoding="utf-8")
    assert "blank line" in message()

    with pytest.raises(DataError) as error:
        load_data(path)
    assert "is a file" in one_line(error)
    with pytest.raises(DataError) as error:
        load_data(folder / "alpha")
    assert "no domain folders" in one_line(error)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokenizer": "words"},
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "vocab_size": 100},
        {"max_bytes": 0},
        {"max_bytes": float("nan")},
        {"colour": "red"},
    ],
)
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        load_data(DataConfig(), **wrong)


def test_empty_source() -> None:
    with pytest.raises(ConfigError, match="empty"):
        load_data("")


def test_import_is_light() -> None:
    assert loaded_modules("import k1.data", ("torch", "datasets", "tokenizers")) == []


# --- hub ----------------------------------------------------------------------------------


def wiki_rows(split: str) -> list[dict]:
    lines = []
    for number in range(40):
        lines += [f" = {split} {number} = \n", "", f" A {number} = b . \n", " = = More = = \n"]
    return [{"text": line} for line in lines]


def fake_load_dataset(path: str, name: str | None, split: str, **settings_: object) -> list[dict]:
    assert settings_["streaming"] is True
    if path == "Salesforce/wikitext":
        return wiki_rows(split)
    if path == "codeparrot/codeparrot-clean-valid":
        return [
            {
                "repo_name": f"r/{n}",
                "content": f"x{n} = {n}\n\n\ny = x{n}\n",
                "license": "mit" if n % 2 else "gpl-3.0",
            }
            for n in range(400)
        ]
    return [{"id": f"0704.{n:04}", "abstract": f"  We show\n{n}.\n"} for n in range(200)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    import datasets

    calls: list[str] = []

    def load_dataset(path: str, *args: object, **settings_: object) -> list[dict]:
        calls.append(path)
        return fake_load_dataset(path, *args, **settings_)  # type: ignore[arg-type]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_module, "_check_connection", lambda: None)
    monkeypatch.setenv("K1_CACHE", str(tmp_path / "cache"))
    return calls


def test_hub_is_streamed_once_and_cached(hub: list[str], tmp_path: Path) -> None:
    data = load_data("hub")
    assert data.domains == ("arxiv", "code", "wikitext")
    assert len(hub) == 5
    assert load_data("hub").fingerprint == data.fingerprint
    assert len(hub) == 5
    (folder,) = (tmp_path / "cache" / "hub").iterdir()
    assert load_data(folder).fingerprint == data.fingerprint

    articles = documents_of(data, "wikitext", "validation")
    assert len(articles) == 40
    assert articles[3] == " = validation 3 =\n A 3 = b .\n = = More = =\n\n"
    code = "".join(documents_of(data, "code", "train"))
    assert "x1 = 1\ny = x1\n\n" in code + "".join(
        text for pool in POOLS for text in documents_of(data, "code", pool)
    )
    assert "x2 = 2\n" not in code
    assert documents_of(data, "arxiv", "train")[0].startswith("We show ")


def test_hub_stops_when_it_has_enough(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "HELD_OUT_FLOOR", 50)
    data = load_data("hub", max_bytes=600)
    for domain in data.domains:
        assert len(data.tokens(domain, "train")) <= 600


def test_failing_stream_leaves_nothing_behind(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    def fail(path: str, *args: object, **settings_: object) -> list[dict]:
        if path == "Salesforce/wikitext":
            return wiki_rows(str(settings_["split"]))
        raise RuntimeError("no such\ndata set")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as error:
        load_data("hub")
    assert one_line(error).endswith("pass --data builtin or a folder")
    assert list((tmp_path / "cache" / "hub").iterdir()) == []


def test_unreachable_network_is_a_quick_data_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("K1_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError) as error:
        load_data("hub")
    assert "pass --data builtin or a folder" in one_line(error)


def test_cache_that_cannot_be_written(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K1_CACHE", "/proc/nowhere")
    with pytest.raises(DataError, match="set K1_CACHE"):
        load_data("hub")
