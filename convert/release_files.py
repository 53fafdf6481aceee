"""Everything in a release folder but its weights: written anew if this package interprets it, otherwise copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from f2llm_jax.config import ModelConfig, read_json
from f2llm_jax.convert.staging import write_text
from f2llm_jax.release import read_release
from f2llm_jax.tokens import Tokenizer

# Files that are copied: the settings of sentence_bert_config.json, the licence, and what a tokenizer may have besides
# tokenizer.json, which is complete: older readers need the other files.
_COPIED = (
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "sentence_bert_config.json",
    "LICENSE",
)

# Keys of config.json that servers read and this package does not: it takes special ids from the tokenizer, and
# truncates embeddings to any size.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "is_matryoshka")

_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))

_POOLING_MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


def write_release_files(
    folder: Path, config: ModelConfig, *, like: Path, prompts: Mapping[str, str] | None = None
) -> None:
    """Writes ``config.json``, sentence-transformers' module files, prompts, the tokenizer and a model card.

    ``config.json`` is written last: without it, no library takes the folder for a model.

    Args:
        folder: an existing folder to write to.
        config: the sizes, and the dtype of the weights.
        like: a release to take the tokenizer, prompts and settings from.
        prompts: {name: text}, replaces the prompts of ``like``.

    Raises:
        ReleaseError: ``like`` lacks something, or has something that this package does not support.
    """
    release = read_release(like)
    for name in _COPIED:
        if (like / name).exists():
            shutil.copyfile(like / name, folder / name)
    _write_tokenizer(folder / "tokenizer.json", like)
    _write_json(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(_MODULES)
        ],
    )
    modes = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in _POOLING_MODES}
    pooling = {"word_embedding_dimension": config.hidden_size, **modes, "include_prompt": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    file = like / "config_sentence_transformers.json"
    prompts = dict(release.prompts if prompts is None else prompts)
    settings = {
        "similarity_fn_name": "cosine",
        **(read_json(file) if file.exists() else {}),
        "prompts": prompts,
        "default_prompt_name": release.default_prompt_name if release.default_prompt_name in prompts else None,
    }
    _write_json(folder / "config_sentence_transformers.json", settings)
    write_text(folder / "README.md", _model_card(config))
    stated = read_json(like / "config.json")
    kept = {name: stated[name] for name in _KEPT if name in stated}
    _write_json(folder / "config.json", {**kept, **config.to_hf()})


def _write_tokenizer(file: Path, like: Path) -> None:
    """Writes the tokenizer with the EOS in its own post-processing: sentence-transformers does not append one."""
    tokenizer = Tokenizer.from_release(like)
    source = like / "tokenizer.json"
    if source.exists() and _appends_eos(tokenizer):
        shutil.copyfile(source, file)
        return
    backend = tokenizer.backend
    values = json.loads(backend.to_str())
    eos = {"SpecialToken": {"id": backend.id_to_token(tokenizer.eos_id), "type_id": 0}}
    text = {name: {"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1))}
    token = backend.id_to_token(tokenizer.eos_id)
    template = {
        "type": "TemplateProcessing",
        "single": [text["A"], eos],
        "pair": [text["A"], eos, text["B"], {"SpecialToken": {"id": token, "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [tokenizer.eos_id], "tokens": [token]}},
    }
    before = values.get("post_processor")
    values["post_processor"] = {"type": "Sequence", "processors": [before, template]} if before else template
    write_text(file, json.dumps(values, ensure_ascii=False, indent=2))


def _appends_eos(tokenizer: Tokenizer) -> bool:
    return tokenizer.backend.encode("", add_special_tokens=True).ids == [tokenizer.eos_id]


def _model_card(config: ModelConfig) -> str:
    dims = ", ".join(map(str, config.matryoshka_dims))
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
---

# Text embedding model

A Qwen3 decoder for text embeddings: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, weights in
{config.dtype}. The embedding is the final state of the EOS token, normalised. Matryoshka sizes: {dims}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode(["How do trees drink?"], prompt_name="query")
documents = model.encode(["Roots take up water from the soil."])
print(model.similarity(queries, documents))
```

With f2llm_jax: `f2llm_jax.load("path/to/this/folder").encode(texts)`.
"""


def _write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
