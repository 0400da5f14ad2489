"""The one way to get text: `load_data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from k1.data.config import DataConfig
from k1.data.documents import Splits
from k1.data.pools import build_pools
from k1.data.text import TextData
from k1.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from k1.errors import ConfigError


def load_data(source: str | Path | DataConfig = "builtin", **overrides: Any) -> TextData:
    """Read text and turn it into tokens.

    Args:
        source: "builtin" (text of this Python installation, no network needed), or
            "builtin:A,B" for the domains A and B of it (see `k1.data.builtin`), "hub"
            (WikiText, Python code and arXiv abstracts from the Hugging Face hub), a folder
            with `<domain>/{train,validation,test}.txt`, or a whole `DataConfig`.
        **overrides: Fields of `DataConfig` to set.

    Returns:
        The tokens of all domains in four disjoint pools.

    Raises:
        DataError: The text cannot be had or is not as it should be.
        ConfigError: A setting is unknown or out of range.
    """
    known = [field.name for field in dataclasses.fields(DataConfig)]
    for name in overrides:
        if name not in known:
            raise ConfigError(f'unknown data setting "{name}"; there are {", ".join(known)}')
    if isinstance(source, DataConfig):
        config = dataclasses.replace(source, **overrides)
    else:
        config = DataConfig(**{"source": str(source), **overrides})
    pools = build_pools(_read(config), config.max_bytes)
    return TextData(pools, _tokenizer(config, pools))


def _read(config: DataConfig) -> dict[str, Splits]:
    if config.source.partition(":")[0] == "builtin":
        from k1.data.builtin import named_domains, read_builtin

        return read_builtin(config.max_bytes, named_domains(config.source))
    if config.source == "hub":
        from k1.data.hub import read_hub

        return read_hub(config.max_bytes)
    from k1.data.folder import read_folder

    return read_folder(Path(config.source))


def _tokenizer(config: DataConfig, pools: dict[str, Splits]) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    training_text = [document.text for by_pool in pools.values() for document in by_pool["train"]]
    return BpeTokenizer.train(training_text, config.vocab_size)
