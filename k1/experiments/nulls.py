"""Text on which agents can specialise for phases alone: one domain, three times.

Agents that are trained on one domain after another may differ by when they were trained and not by
what on. So the same runs are made on text whose domains are parts of a single one: what the
measures of `k1.specialisation` then say is what they say about nothing.
"""

from __future__ import annotations

from k1.data import POOLS, TextData
from k1.data.documents import SEPARATOR, Document, Splits


def same_domain(data: TextData, domain: str, parts: int = 3) -> TextData:
    """Deal the documents of a domain out to several that differ by nothing but their names.

    Raises:
        DataError: if there is no such domain.
    """
    dealt: dict[str, Splits] = {f"{domain} {part + 1}": {} for part in range(parts)}
    for pool in POOLS:
        documents = documents_of(data, domain, pool)
        for part, splits in enumerate(dealt.values()):
            splits[pool] = documents[part::parts]
    return TextData(dealt, data.tokenizer)


def documents_of(data: TextData, domain: str, pool: str) -> list[Document]:
    """Read the documents of a pool back from its tokens."""
    tokens = data.tokens(domain, pool)
    begins = data.starts(domain, pool).nonzero()[:, 0].tolist()
    ends = [*begins[1:], len(tokens)]
    return [
        Document(data.tokenizer.decode(tokens[begin:end]).removesuffix(SEPARATOR))
        for begin, end in zip(begins, ends, strict=True)
    ]
