"""A tiny release folder in the layout of F2LLM-v2, built from nothing but the bundled text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.export import export_release
from f2llm_jax.demo.texts import descriptions, programs, sentences
from f2llm_jax.model import init_params

EOS, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", EOS)  # in Qwen3's order and, as there, after the learnt tokens

# In the form of the released models' prompts.
QUERY_PROMPT = "Instruct: Find the same meaning.\nQuery: "

# How Qwen3's tokenizer.json splits text into words before BPE.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=1e6,
    max_position_embeddings=512,
    dtype="float32",
)


def build_release(folder: Path) -> Path:
    """Writes the tiny model: random weights, and a tokenizer learnt from the bundled text. Returns the new folder."""
    params = jax.jit(init_params, static_argnames="config")(CONFIG, jax.random.key(0))
    with tempfile.TemporaryDirectory() as settings:
        texts = [text.text for text in (*sentences(), *programs(), *descriptions())]
        # The prompt is repeated often enough for each of its words to become a token: every query contains them.
        tokenizer = learn_tokenizer([*texts, *[QUERY_PROMPT] * 100])
        write_settings(Path(settings), tokenizer, CONFIG)
        return export_release(params, CONFIG, folder, like=settings, prompts={"query": QUERY_PROMPT, "document": ""})


def learn_tokenizer(texts: Iterable[str], size: int = CONFIG.vocab_size - 64) -> tokenizers.Tokenizer:
    """Learns a byte-level BPE tokenizer built like Qwen3's, with at most ``size`` tokens besides the special ones.

    By default, some rows of the embedding table stay unused, as in the released models.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_settings(folder: Path, tokenizer: tokenizers.Tokenizer, config: ModelConfig) -> None:
    """Writes everything of a release but the weights: sizes and tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": config.max_position_embeddings,
    }
    for name, values in (("config.json", config.to_hf()), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
