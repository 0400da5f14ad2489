"""Tokens by domain and pool, ready for training."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from k1.data.config import POOLS
from k1.data.documents import SEPARATOR, Document, Splits, total_size
from k1.data.tokenizer import Tokenizer
from k1.errors import DataError

if TYPE_CHECKING:
    import torch

REMEDY = "give more text, or ask for a smaller batch, context or vocabulary"


class TextData:
    """The text of all domains as tokens, in four pools that share no document."""

    domains: tuple[str, ...]
    """Names of the domains, in the order in which they were given."""

    vocab_size: int
    """Number of token ids."""

    tokenizer: Tokenizer
    """Made the tokens, and turns them back into text."""

    token_bytes: torch.Tensor
    """UTF-8 bytes that each token stands for: int32 [vocab_size]."""

    fingerprint: str
    """SHA-256 over the tokenizer, the domains, and all tokens and document starts."""

    def __init__(self, pools: dict[str, Splits], tokenizer: Tokenizer) -> None:
        """Encode documents.

        Args:
            pools: For each domain the documents of each pool.
            tokenizer: Encodes them.
        """
        import torch

        self.domains = tuple(pools)
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes)
        self._tokens: dict[tuple[str, str], torch.Tensor] = {}
        self._starts: dict[tuple[str, str], torch.Tensor] = {}
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        digest = hashlib.sha256(tokenizer.identity.encode())
        for domain, by_pool in pools.items():
            for pool in POOLS:
                documents = by_pool[pool]
                tokens, starts = _encode(documents, tokenizer)
                digest.update(f"\0{domain}\0{pool}\0{len(tokens)}\0".encode())
                digest.update(tokens.astype(tokens.dtype.newbyteorder("<")).tobytes())
                digest.update(np.packbits(starts).tobytes())
                self._tokens[domain, pool] = torch.from_numpy(tokens)
                self._starts[domain, pool] = torch.from_numpy(starts)
                size = total_size(documents) - len(SEPARATOR)
                self._sizes[domain, pool] = (size, len(documents))
        self.fingerprint = digest.hexdigest()

    def tokens(self, domain: str, pool: str) -> torch.Tensor:
        """Return the token ids of a pool: 1-D on the CPU, uint8 for bytes, else int32."""
        return self._tokens[self._known(domain, pool)]

    def starts(self, domain: str, pool: str) -> torch.Tensor:
        """Return which tokens begin a document: 1-D bool, as long as the tokens."""
        return self._starts[self._known(domain, pool)]

    def require(self, min_tokens: int) -> None:
        """Raise DataError unless every pool of every domain has at least `min_tokens`."""
        for (domain, pool), tokens in self._tokens.items():
            if len(tokens) < min_tokens:
                raise DataError(
                    f'domain "{domain}", pool "{pool}" has {len(tokens)} tokens '
                    f"but {min_tokens} are needed; {REMEDY}"
                )

    def describe(self) -> str:
        """Return a few lines for people: bytes and documents of each domain and pool."""
        lines = [f"{self.vocab_size} token ids ({self.tokenizer.identity.split(':')[0]})"]
        for domain in self.domains:
            parts = []
            for pool in POOLS:
                size, count = self._sizes[domain, pool]
                noun = "document" if count == 1 else "documents"
                parts.append(f"{pool} {size:,} bytes in {count:,} {noun}")
            lines.append(f"{domain}: " + ", ".join(parts))
        return "\n".join(lines)

    def _known(self, domain: str, pool: str) -> tuple[str, str]:
        if pool not in POOLS:
            raise DataError(f'no pool "{pool}"; there are {", ".join(POOLS)}')
        if domain not in self.domains:
            raise DataError(f'no domain "{domain}"; there are {", ".join(self.domains)}')
        return domain, pool


def _encode(
    documents: list[Document], tokenizer: Tokenizer
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Encode documents one after another, each but the last followed by the separator."""
    texts = [document.text + SEPARATOR for document in documents]
    texts[-1] = documents[-1].text
    # Each document is encoded by itself, so that no token lies across a boundary.
    parts = list(tokenizer.encode_all(texts))
    lengths = np.array([len(part) for part in parts])
    starts = np.zeros(lengths.sum(), dtype=np.bool_)
    starts[np.cumsum(lengths) - lengths] = True
    return np.concatenate(parts), starts
