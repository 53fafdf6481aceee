"""Texts to token ids: the release's tokenizer, its EOS appended once, and truncation that keeps it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_jax.config import read_json
from f2llm_jax.errors import InputError, ReleaseError

if TYPE_CHECKING:
    import tokenizers

_TEXTS_AT_ONCE = 64


class Tokenizer:
    """The tokenizer of a release, with what F2LLM adds to it.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` itself.
        eos_id: the id that ends every sequence, and whose state is the embedding.
        pad_id: fills rows after the EOS; nothing depends on its value.
        without_row: {id: token} of the tokens that were added to the tokenizer, but have no row in the model's table.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_id: int, pad_id: int, without_row: Mapping[int, str] | None = None
    ):
        self.backend = backend
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.without_row = without_row or {}

    @classmethod
    def from_release(cls, path: Path) -> Tokenizer:
        """Reads ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``) and ``tokenizer_config.json``.

        The EOS is the token that the tokenizer itself appends to a text, if any; else ``eos_token`` of the settings.
        Qwen3-Embedding needs the first rule: it appends its pad token, while ``eos_token`` names another.

        Raises:
            ReleaseError: a file is missing or damaged, the EOS cannot be determined, or the tokenizer has ids beyond
                the vocabulary of the model next to it.
        """
        settings_file = path / "tokenizer_config.json"
        settings = read_json(settings_file)
        backend = _read_backend(path)
        # Length is handled by this class: a limit or padding stored in the file must not interfere.
        backend.no_truncation()
        backend.no_padding()
        eos_id = _appended_id(backend, path)
        if eos_id is None:
            eos_id = _token_id(backend, settings.get("eos_token"), "eos_token", settings_file)
        pad = settings.get("pad_token")
        pad_id = eos_id if pad is None else _token_id(backend, pad, "pad_token", settings_file)
        return cls(backend, eos_id, pad_id, _without_row(backend, max(eos_id, pad_id), path))

    @functools.cached_property
    def vocabulary(self) -> str:
        """A digest of the tokens that have a row in the model, and of their ids.

        Data tokenised for one model fits any model with the same digest. It is equal for related models whose files
        differ, in a chat template for example.
        """
        tokens = sorted(item for item in self.backend.get_vocab().items() if item[1] not in self.without_row)
        return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[list[np.ndarray], int]:
        """Token ids of every text, EOS last.

        Args:
            texts: the texts, with prompts already prepended. An empty one becomes the EOS alone.
            max_length: a longer text keeps its first ``max_length - 1`` tokens, and the EOS.

        Returns:
            An int32 array per text, and how many texts were truncated.

        Raises:
            InputError: ``max_length`` is below 1, or a text contains a token that the model has no row for.
        """
        if max_length < 1:
            raise InputError(f"max_length must be at least 1 (the EOS), not {max_length}")
        sequences, truncated = [], 0
        for ids in self._ids(list(texts)):
            if self.without_row and (beyond := self.without_row.keys() & ids):
                tokens = ", ".join(self.without_row[token] for token in beyond)
                raise InputError(f"a text holds {tokens}, which the tokenizer knows, but the model has no row for")
            truncated += len(ids) >= max_length
            sequences.append(np.array([*ids[: max_length - 1], self.eos_id], np.int32))
        return sequences, truncated

    def _ids(self, texts: list[str]) -> Iterator[list[int]]:
        """The untruncated ids of each text. A few texts at a time: the tokenizer takes 16 times their bytes."""
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            encodings = self.backend.encode_batch_fast(texts[start : start + _TEXTS_AT_ONCE], add_special_tokens=False)
            yield from (encoding.ids for encoding in encodings)


def truncated(tokens: np.ndarray, max_length: int, eos_id: int) -> np.ndarray:
    """The tokens of a text from ``Tokenizer.encode``, truncated as it would with a lower ``max_length``."""
    return tokens if len(tokens) <= max_length else np.append(tokens[: max_length - 1], np.int32(eos_id))


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = path / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ReleaseError(f"{file} is damaged: {error}") from None
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        import transformers

        try:
            return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True).backend_tokenizer
        except Exception as error:
            raise ReleaseError(f"vocab.json and merges.txt in {path} make no tokenizer: {error}") from error
    raise ReleaseError(f"{path} has no tokenizer.json, and not both of vocab.json and merges.txt")


def _appended_id(backend: tokenizers.Tokenizer, path: Path) -> int | None:
    """The one special token that the tokenizer's post-processor appends to a text, if any."""
    added = backend.encode("", add_special_tokens=True).ids
    if not added:
        return None
    probe = backend.encode("a", add_special_tokens=False).ids
    if len(added) > 1 or backend.encode("a", add_special_tokens=True).ids != probe + added:
        names = ", ".join(repr(backend.id_to_token(token)) for token in added)
        raise ReleaseError(f"{path}: the tokenizer adds {names} around a text; supported is one EOS behind it")
    return added[0]


def _without_row(backend: tokenizers.Tokenizer, largest_needed: int, path: Path) -> dict[int, str]:
    """Added tokens without a row in the model next to the tokenizer: JAX would silently read the last row for them."""
    file = path / "config.json"
    rows = read_json(file).get("vocab_size") if file.exists() else None
    if not isinstance(rows, int):  # a tokenizer without a model
        return {}
    largest = max(backend.get_vocab_size(with_added_tokens=False) - 1, largest_needed)
    if largest >= rows:
        raise ReleaseError(f"{path}: the tokenizer has ids up to {largest}, {file.name} has vocab_size {rows}")
    return {number: token.content for number, token in backend.get_added_tokens_decoder().items() if number >= rows}


def _token_id(backend: tokenizers.Tokenizer, token: Any, name: str, file: Path) -> int:
    """The id of a token given as a string, or as the mapping that transformers 4 wrote for an added token."""
    content = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(content) if isinstance(content, str) else None
    if token_id is None:
        raise ReleaseError(f"{file}: {name} is {content!r}, which is not a token of this tokenizer")
    return token_id
