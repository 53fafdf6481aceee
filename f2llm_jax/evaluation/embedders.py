"""One interface for the models to be compared, each with its own prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from f2llm_jax.dtypes import float_dtype
from f2llm_jax.encoder import Encoder, load
from f2llm_jax.errors import ReleaseError
from f2llm_jax.evaluation import optional
from f2llm_jax.evaluation.registry import bitext_prompt, instructions, registered, states_instructions
from f2llm_jax.release import find_release, read_release

Role = Literal["query", "document", "bitext"]

# Prefix for the name of a model that sentence-transformers is to load.
SENTENCE_TRANSFORMERS = "st:"


class Embedder(Protocol):
    """What an evaluation needs from a model.

    Attributes:
        name: its name in tables.
        dtype: the dtype that it computes in.
        dim: the size of its full embeddings.
        prompts: {role: text prepended to every input}; that of ``bitext`` may be set only by the first ``encode``.
    """

    name: str
    dtype: str
    dim: int
    prompts: dict[Role, str]

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        """Unit embeddings, float32 [n, dim]."""
        ...


class F2LLMEmbedder:
    """An ``Encoder`` with its own prompts, and ``translation_prompt`` for bitext."""

    def __init__(self, name: str, encoder: Encoder, *, instructions_of: str | None = None, **options: Any):
        self.name = name
        self.dtype = encoder.dtype
        self.dim = encoder.config.hidden_size
        self._encoder = encoder
        self._options = options
        self._instructions_of = instructions_of
        self.prompts: dict[Role, str] = {role: encoder.prompts[role] for role in ("query", "document")}

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        if role == "bitext" and role not in self.prompts:
            self.prompts[role] = translation_prompt(self.name, self._encoder.prompts, self._instructions_of)
        return self._encoder.encode(texts, prompt=self.prompts[role], **self._options)


class SentenceTransformersEmbedder:
    """Any sentence-transformers model, with the prompts that the same model would have as an ``Encoder``.

    A model that is not instructed (``is_instructed``) has a prompt for translations only if one was saved with it.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str = "float32",
        revision: str | None = None,
        instructions_of: str | None = None,
        max_length: int | None = None,
        **options: Any,
    ):
        sentence_transformers = optional("sentence_transformers")
        self.name = SENTENCE_TRANSFORMERS + name
        name = os.path.expanduser(name)  # sentence-transformers would look for ~ on the hub
        self._release, self._revision = name, revision
        self._instructions_of = instructions_of
        self._options = options
        self._model = sentence_transformers.SentenceTransformer(name, revision=revision, model_kwargs={"dtype": dtype})
        if max_length is not None:
            self._model.max_seq_length = min(max_length, self._model.max_seq_length or max_length)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.dim = self._model.get_embedding_dimension()
        self.prompts = role_prompts(name, self._model.prompts)

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        if role == "bitext" and role not in self.prompts:
            self.prompts[role] = self._translation_prompt()
        # A model with separate parts for queries and documents selects the part by the method that is called.
        encode = {"query": self._model.encode_query, "document": self._model.encode_document}.get(
            role, self._model.encode
        )
        embeddings_nd = encode(list(texts), prompt=self.prompts[role], normalize_embeddings=True, **self._options)
        return np.asarray(embeddings_nd, np.float32)

    def _translation_prompt(self) -> str:
        saved = self._model.prompts
        given = self._instructions_of is not None or saved.get("BitextMining")
        if not given and not is_instructed(self._release, self._revision):
            return ""
        return translation_prompt(self._release, saved, self._instructions_of)


def find_embedder(model: str, revision: str | None = None) -> None:
    """Checks that a model exists, without reading or downloading its weights.

    Raises:
        ReleaseError: there is no such folder or hub repository, or it is not a model for ``load``. For models that
            sentence-transformers loads, which has its own cache and names, only folders are checked.
    """
    name = model.removeprefix(SENTENCE_TRANSFORMERS)
    if name == model:
        read_release(find_release(name, revision, weights=False))
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise ReleaseError(f"there is no folder {name}")


def load_embedder(
    model: str,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    revision: str | None = None,
    instructions_of: str | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    show_progress: bool = False,
) -> Embedder:
    """Loads a model for evaluation.

    Args:
        model: release folder, converted folder or hub id; after ``st:``, anything that sentence-transformers loads.
        dtype: as for ``load``; for ``int8``, which sentence-transformers does not support, it uses bfloat16.
        mesh, revision: as for ``load``.
        instructions_of: the model in MTEB's registry whose instruction for translations to use, see
            ``translation_prompt``.
        max_length, batch_tokens, show_progress: as for ``Encoder.encode``; sentence-transformers does not use
            ``batch_tokens``.

    Raises:
        ReleaseError: the model cannot be loaded.
        InputError: an argument is out of range, or sentence-transformers is not installed.
    """
    if model.startswith(SENTENCE_TRANSFORMERS):
        name = model.removeprefix(SENTENCE_TRANSFORMERS)
        return SentenceTransformersEmbedder(
            name,
            dtype=float_dtype(dtype),
            revision=revision,
            instructions_of=instructions_of,
            max_length=max_length,
            show_progress_bar=show_progress,
        )
    encoder = load(model, dtype=dtype, mesh=mesh, revision=revision)
    return F2LLMEmbedder(
        model,
        encoder,
        instructions_of=instructions_of,
        max_length=max_length,
        batch_tokens=batch_tokens,
        show_progress=show_progress,
    )


def role_prompts(name: str, saved: Mapping[str, str | None]) -> dict[Role, str]:
    """Prompts as in sentence-transformers' ``encode_query`` and ``encode_document``, or else from MTEB's registry.

    Args:
        name: the name of the model.
        saved: ``SentenceTransformer.prompts``.
    """
    prompts = saved
    if not any(saved.values()) and (entry := registered(name)) is not None:
        # multilingual-e5 was saved without the prompts "query: " and "passage: " that it was trained with.
        prompts = entry.loader_kwargs.get("model_prompts") or {}
    names: dict[Role, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
    return {role: next((prompts[key] or "" for key in names[role] if key in prompts), "") for role in names}


def translation_prompt(name: str, saved: Mapping[str, str | None], instructions_of: str | None = None) -> str:
    """The prompt for translations: from ``instructions_of``, else saved as BitextMining, else from ``instructions``.

    Args:
        name, saved: as for ``role_prompts``.
        instructions_of: a model in MTEB's registry.

    Raises:
        InputError: as for ``instructions``.
    """
    if instructions_of is None and (prompt := saved.get("BitextMining")):
        return prompt
    return bitext_prompt(instructions(name, instructions_of))


def is_instructed(name: str, revision: str | None = None) -> bool:
    """Whether MTEB's registry has instructions for a model; if the model is not registered, whether ``load`` reads it.

    ``instructions`` falls back to those of F2LLM-v2 for unregistered models, which is wrong for other kinds of models.
    """
    entry = registered(name)
    if entry is not None:
        return states_instructions(entry)
    try:
        read_release(find_release(name, revision, weights=False))
    except ReleaseError:
        return False
    return True
