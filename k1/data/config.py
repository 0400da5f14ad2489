"""What a user can choose about the text."""

from dataclasses import dataclass

from k1.errors import ConfigError

POOLS = ("train", "gate", "validation", "test")
"""Train the model; judge cheats; reward the controller; report at the very end."""

TOKENIZERS = ("bytes", "bpe")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "builtin"
    """ "builtin" (text of this Python installation; "builtin:A,B" for some domains of it), "hub"
    (Hugging Face) or a folder path."""

    tokenizer: str = "bytes"
    """ "bytes", or "bpe": a byte-level BPE trained on the training text."""

    vocab_size: int = 256
    """Vocabulary of the BPE, special to it: bytes always have 256."""

    max_bytes: int = 4_000_000
    """Most bytes of training text (train and gate) kept per domain; others in proportion."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError('data source is empty; give "builtin", "hub" or a folder')
        if self.tokenizer not in TOKENIZERS:
            known = " or ".join(f'"{name}"' for name in TOKENIZERS)
            raise ConfigError(f'unknown tokenizer "{self.tokenizer}"; choose {known}')
        if self.tokenizer == "bpe" and not 256 < self.vocab_size <= 1_000_000:
            raise ConfigError(
                f'vocab_size {self.vocab_size} is out of range for tokenizer "bpe"; '
                "give 257 to 1000000, such as 4096"
            )
        if not self.max_bytes > 0:
            raise ConfigError(f"max_bytes {self.max_bytes} is not positive; give 4000000 or so")
