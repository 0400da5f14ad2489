"""From the splits of a source to the four pools: disjoint, without duplicates, within budget.

Every choice is made by the hash of a document, so it depends neither on the order of the
documents nor on a random state.
"""

from k1.data.config import POOLS
from k1.data.documents import Document, Splits, total_size
from k1.errors import DataError

HELD_OUT_FLOOR = 64 * 1024
"""Held-out pools are not cut below this size: a smaller one measures little."""

GATE_SHARE = 0.05
GATE_SHARE_WHEN_SMALL = 0.10


def build_pools(domains: dict[str, Splits], max_bytes: int) -> dict[str, Splits]:
    """Turn the train, validation and test documents of each domain into the four pools."""
    unique = drop_duplicates(domains)
    return {domain: _pools_of(domain, unique[domain], max_bytes) for domain in domains}


def drop_duplicates(domains: dict[str, Splits]) -> dict[str, Splits]:
    """Keep each document once; of two copies the one in the held-out split stays."""
    seen: set[bytes] = set()
    kept: dict[str, Splits] = {domain: {} for domain in domains}
    for split in ("test", "validation", "train"):
        for domain, splits in domains.items():
            kept[domain][split] = []
            for document in splits[split]:
                if document.key not in seen:
                    seen.add(document.key)
                    kept[domain][split].append(document)
    return kept


def _pools_of(domain: str, splits: Splits, max_bytes: int) -> Splits:
    for split, documents in splits.items():
        if not documents:
            raise DataError(
                f'domain "{domain}": each document of its {split} text also occurs elsewhere '
                "or it is empty; give it documents of its own"
            )
    train = _within(splits["train"], max_bytes)
    if len(train) < 2:
        raise DataError(
            f'domain "{domain}" has {len(train)} training document(s) within max_bytes '
            f"{max_bytes}, and training and gate need one each; separate documents by a blank "
            "line or raise max_bytes"
        )
    kept_share = min(1.0, max_bytes / total_size(splits["train"]))
    train, gate = carve(train, _gate_target(total_size(train)))
    pools = {"train": train, "gate": gate}
    for split in ("validation", "test"):
        documents = splits[split]
        budget = max(int(kept_share * total_size(documents)), HELD_OUT_FLOOR)
        pools[split] = _reaching(documents, budget)
    return {pool: pools[pool] for pool in POOLS}


def _gate_target(train_size: int) -> int:
    small = min(HELD_OUT_FLOOR, int(GATE_SHARE_WHEN_SMALL * train_size))
    return max(small, int(GATE_SHARE * train_size))


def carve(documents: list[Document], target: int) -> tuple[list[Document], list[Document]]:
    """Part whole documents of about `target` bytes from the rest.

    Args:
        documents: At least two documents, all different.
        target: Bytes to part; documents that would overshoot it by half are passed over.

    Returns:
        The rest and the parted documents, both in their given order and neither empty.
    """
    chosen: set[bytes] = set()
    size = 0
    for document in sorted(documents, key=lambda document: document.key):
        if size >= target or len(chosen) == len(documents) - 1:
            break
        if size + document.size <= 1.5 * target:
            chosen.add(document.key)
            size += document.size
    if not chosen:
        chosen = {_smallest(documents).key}
    rest = [document for document in documents if document.key not in chosen]
    return rest, [document for document in documents if document.key in chosen]


def _within(documents: list[Document], budget: int) -> list[Document]:
    """Return the documents that fit into the budget, taken in the order of their hashes."""
    if total_size(documents) <= budget:
        return documents
    chosen: set[bytes] = set()
    for document in sorted(documents, key=lambda document: document.key):
        if document.size <= budget:
            chosen.add(document.key)
            budget -= document.size
    return [document for document in documents if document.key in chosen]


def _reaching(documents: list[Document], wanted: int) -> list[Document]:
    """Return documents of at least the wanted size (or all), taken in the order of hashes."""
    chosen: set[bytes] = set()
    for document in sorted(documents, key=lambda document: document.key):
        if wanted <= 0:
            break
        chosen.add(document.key)
        wanted -= document.size
    return [document for document in documents if document.key in chosen]


def _smallest(documents: list[Document]) -> Document:
    return min(documents, key=lambda document: (document.size, document.key))
