"""Text to tokens and back: plain bytes, or a byte-level BPE. Both lose nothing."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers
    import torch

    Ids = Iterable[int] | npt.NDArray[Any] | torch.Tensor


class Tokenizer(ABC):
    """A reversible map between text and token ids."""

    vocab_size: int
    """Number of token ids; the ids are 0 to vocab_size - 1."""

    identity: str
    """Names the exact tokenizer: equal identities mean equal tokens for any text."""

    @property
    @abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes that each token stands for."""

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[Any]:
        """Return the token ids of a text."""

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""

    def encode_all(self, texts: Sequence[str]) -> Iterator[npt.NDArray[Any]]:
        """Yield the token ids of each text."""
        return map(self.encode, texts)


class ByteTokenizer(Tokenizer):
    """Each UTF-8 byte is a token."""

    vocab_size = 256
    identity = "bytes"

    @property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """One byte for each token."""
        return np.ones(256, dtype=np.int32)

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """Return the UTF-8 bytes of a text as uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8).copy()

    def decode(self, ids: Ids) -> str:
        """Return the text of UTF-8 bytes."""
        return _as_array(ids).astype(np.uint8).tobytes().decode(errors="replace")


class BpeTokenizer(Tokenizer):
    """A byte-level BPE of the `tokenizers` library, without special tokens."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer of the `tokenizers` library."""
        self._model = model
        self.vocab_size = model.get_vocab_size()
        self.identity = "bpe:" + hashlib.sha256(model.to_str().encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn merges from texts.

        Args:
            texts: Training text.
            vocab_size: Most tokens to learn; little text gives fewer.
        """
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = Model(models.BPE())
        # The decoders and pre-tokenizers are compiled classes that mypy sees only as stubs.
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)

    @property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes that each token stands for."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._model.get_vocab().items():
            # The library writes each byte of a token as one printable character.
            sizes[index] = len(token)
        return sizes

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the token ids of a text as int32."""
        return np.array(self._model.encode(text).ids, dtype=np.int32)

    def encode_all(self, texts: Sequence[str]) -> Iterator[npt.NDArray[Any]]:
        """Yield the token ids of each text, several texts at a time."""
        for start in range(0, len(texts), 64):
            for encoding in self._model.encode_batch_fast(list(texts[start : start + 64])):
                yield np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: Ids) -> str:
        """Return the text of token ids."""
        return self._model.decode(_as_array(ids).tolist(), skip_special_tokens=False)


def _as_array(ids: Ids) -> npt.NDArray[Any]:
    if hasattr(ids, "__array__"):
        return np.asarray(ids)
    return np.array(list(ids), dtype=np.int64)
