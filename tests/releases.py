"""Release folders for tests: random Qwen3 models written by transformers itself, around a real or a tiny tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from f2llm_jax.config import ModelConfig

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
QWEN_TOKENIZER = SHARED / "qwen3-tokenizer"

QUERY_PROMPT = "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e6,
    max_position_embeddings=2048,
    dtype="float32",
)

# Of the real vocabulary, and with a head_dim that is not hidden_size / num_attention_heads.
SMALL = dataclasses.replace(TINY, vocab_size=151936, hidden_size=80, num_hidden_layers=4)


def skip_without_shared() -> None:
    """Skips the test on a machine that has no shared data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data, and there is no {SHARED}")


def bitext_files() -> list[Path]:
    """Tatoeba pairs, a Parquet file for each of 106 languages: columns text and english."""
    skip_without_shared()
    files = sorted((SHARED / "bitext").glob("*.parquet"))
    assert len(files) == 106
    return files


def bitext(per_language: int | None = None) -> list[str]:
    """Sentences of all 106 languages; the first ``per_language`` of each, or all there are."""
    from pyarrow import parquet

    return [
        text for file in bitext_files() for text in parquet.read_table(file)["text"].to_pylist()[slice(per_language)]
    ]


def xquad(per_file: int | None = None) -> tuple[list[str], list[str]]:
    """Questions and paragraphs in 8 languages; the first ``per_file`` of each file, or all there are."""
    from pyarrow import parquet

    skip_without_shared()

    def column(pattern: str, name: str) -> list[str]:
        files = sorted((SHARED / "xquad").glob(pattern))
        assert len(files) == 8
        return [text for file in files for text in parquet.read_table(file)[name].to_pylist()[slice(per_file)]]

    return column("*_queries.parquet", "query"), column("*_corpus.parquet", "text")


def params_of(model: transformers.Qwen3Model, config: ModelConfig) -> dict[str, Any]:
    """The torch model's own weights as our parameters, without going through files."""
    from f2llm_jax.convert.table import tensor_table

    weights = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    flat = {}
    for tensor in tensor_table(config):
        layers = [weights.pop(name).reshape(tensor.layer_shape) for name in tensor.hf_names]
        flat[tensor.path] = jnp.asarray(np.stack(layers) if tensor.stacked else layers[0])
    assert not weights
    return flax.traverse_util.unflatten_dict(flat, sep=".")


def torch_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.Qwen3Model:
    """A random ``transformers.Qwen3Model``, its norms away from one so that a swapped norm shows."""
    torch.manual_seed(seed)
    hf = transformers.Qwen3Config(**config.to_hf(), attn_implementation="eager")
    model = transformers.Qwen3Model(hf).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def write_release(
    folder: Path,
    config: ModelConfig = TINY,
    *,
    tokenizer: Path | None = None,
    append_eos: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    lm_head: bool = False,
) -> Path:
    """Writes a release as F2LLM-v2's are laid out; with ``lm_head`` keys are prefixed and an lm_head is there."""
    model = torch_model(config, seed, dtype)
    if lm_head:
        causal = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**{**config.to_hf(), "tie_word_embeddings": False})
        )
        causal.model = model
        model = causal.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_around(folder, config)
    if tokenizer is None:
        write_tiny_tokenizer(folder, append_eos=append_eos)
    else:
        copy_tokenizer(tokenizer, folder, append_eos=append_eos)
    return folder


def write_around(folder: Path, config: ModelConfig, prompts: dict[str, str] | None = None) -> None:
    """modules.json, pooling and prompts."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_lasttoken": True}
    others = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    write_json(
        folder / "1_Pooling" / "config.json",
        {**pooling, **{f"pooling_mode_{name}": False for name in others}, "include_prompt": True},
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
    prompts = {"query": QUERY_PROMPT, "document": ""} if prompts is None else prompts
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def copy_tokenizer(source: Path, folder: Path, *, append_eos: bool) -> None:
    """Copies a tokenizer; with ``append_eos`` it adds the EOS itself, which sentence-transformers relies on."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    shutil.copy(source / "tokenizer_config.json", folder)
    shutil.copy(source / "tokenizer.json", folder)
    if append_eos:
        set_appended_token(folder, settings["eos_token"])


def set_appended_token(folder: Path, token: str) -> None:
    """Makes tokenizer.json append ``token`` to every text, as the tokenizers of released models do."""
    import tokenizers

    file = str(folder / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {token}", pair=f"$A {token} $B {token}", special_tokens=[(token, backend.token_to_id(token))]
    )
    backend.save(file)


def write_tiny_tokenizer(folder: Path, *, append_eos: bool = True) -> None:
    """A byte-level BPE tokenizer of Qwen3's make, learnt from a few lines; under 512 tokens."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "Instruct: retrieve\nQuery: "] * 8, trainer
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
    }
    write_json(folder / "tokenizer_config.json", settings)
    if append_eos:
        set_appended_token(folder, "<|im_end|>")


def write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


def edit_json(file: Path, **changes: object) -> None:
    """Sets keys of a JSON object in a file; None removes the key."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        values.pop(key, None)
        if value is not None:
            values[key] = value
    write_json(file, values)
