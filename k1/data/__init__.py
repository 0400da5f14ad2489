"""Text for K-1: four disjoint pools of whole documents per domain, as tokens.

Importing this package loads neither torch nor the `datasets` and `tokenizers` libraries;
each is imported where it is first needed.
"""

from k1.data.config import POOLS, DataConfig
from k1.data.load import load_data
from k1.data.text import TextData
from k1.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer

__all__ = [
    "POOLS",
    "BpeTokenizer",
    "ByteTokenizer",
    "DataConfig",
    "TextData",
    "Tokenizer",
    "load_data",
]
