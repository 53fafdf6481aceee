"""Multilingual text embeddings in JAX: the F2LLM-v2 family.

``load`` a model, ``encode`` texts. Everything else is for those who build on it; see the README.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from f2llm_jax.batching import make_batch
    from f2llm_jax.config import ModelConfig
    from f2llm_jax.corpus import encode_corpus
    from f2llm_jax.embedding import Batch, PackedBatch, embed, eos_states, matryoshka
    from f2llm_jax.encoder import Encoder, load
    from f2llm_jax.errors import F2LLMError, InputError, ReleaseError
    from f2llm_jax.evaluation.mteb_adapter import mteb_model
    from f2llm_jax.model import Backbone, count_parameters, init_params
    from f2llm_jax.quantization import int8_ranges, quantize
    from f2llm_jax.search import nearest
    from f2llm_jax.sharding import make_mesh

__version__ = "0.1.0"

# The module of each public name, imported on first use: `import f2llm_jax` itself costs nothing.
_HOMES = {
    "Backbone": "model",
    "Batch": "embedding",
    "Encoder": "encoder",
    "F2LLMError": "errors",
    "InputError": "errors",
    "ModelConfig": "config",
    "PackedBatch": "embedding",
    "ReleaseError": "errors",
    "count_parameters": "model",
    "embed": "embedding",
    "encode_corpus": "corpus",
    "eos_states": "embedding",
    "init_params": "model",
    "int8_ranges": "quantization",
    "load": "encoder",
    "make_batch": "batching",
    "make_mesh": "sharding",
    "matryoshka": "embedding",
    "mteb_model": "evaluation.mteb_adapter",
    "nearest": "search",
    "quantize": "quantization",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'f2llm_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"f2llm_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
