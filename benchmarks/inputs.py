"""What the benchmarks run on: random models of the real shapes, real texts of several lengths, and room on the disk."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS

SIZES = tuple(MODELS)

QUERY_PROMPT = "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder for a with block, and deletes it with all that it then holds; one that exists is refused."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} exists; name one that does not: it is deleted at the end") from None
    try:
        yield
    finally:
        shutil.rmtree(folder)


def write_release(folder: Path, size: str, tokenizer: Path) -> Path:
    """A release folder as F2LLM-v2's are laid out, with random bfloat16 weights; kept if it is there already.

    Norm weights lie within 0.5 … 1.5, so that a wrong norm shows in the cosines.
    """
    if (folder / "modules.json").exists():
        return folder
    import torch
    import transformers

    config = MODELS[size]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Qwen3Model(transformers.Qwen3Config(**config.to_hf()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_around(folder, config, tokenizer)
    return folder


def write_around(folder: Path, config: ModelConfig, tokenizer: Path) -> None:
    """All of a release but config.json and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(tokenizer, folder)
    _write_json(folder / "1_Pooling" / "config.json", _pooling(config))
    (folder / "2_Normalize").mkdir(exist_ok=True)
    prompts = {"query": QUERY_PROMPT, "document": ""}
    _write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})
    # Last: a folder that has it is complete.
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", modules)


def _pooling(config: ModelConfig) -> dict[str, object]:
    others = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    return {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_lasttoken": True,
        **{f"pooling_mode_{name}": False for name in others},
        "include_prompt": True,
    }


def _write_tokenizer(source: Path, folder: Path) -> None:
    """A copy that appends the EOS to every text itself, which sentence-transformers relies on."""
    import tokenizers

    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    eos = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
    )
    backend.save(str(folder / "tokenizer.json"))


def _write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


TEXTS = ("short", "medium", "long", "mix")


def read_texts(kind: str, count: int, data: Path) -> list[str]:
    """``count`` texts that stand for all of their kind: evenly spaced in order of length, then shuffled.

    short: English sentences of Tatoeba, those with a German one. medium: English questions of XQuAD behind the query
    prompt, as a search sends them. long: English paragraphs of XQuAD. mix: of ten texts six sentences, three questions
    and a paragraph, in all languages.
    """
    if kind == "short":
        texts = _spaced(_column(data / "bitext" / "deu.parquet", "english"), count)
    elif kind == "medium":
        questions = _column(data / "xquad" / "en_queries.parquet", "query")
        texts = [QUERY_PROMPT + text for text in _spaced(questions, count)]
    elif kind == "long":
        texts = _spaced(_column(data / "xquad" / "en_corpus.parquet", "text"), count)
    else:
        questions = [t for f in sorted(data.glob("xquad/*_queries.parquet")) for t in _column(f, "query")]
        paragraphs = [t for f in sorted(data.glob("xquad/*_corpus.parquet")) for t in _column(f, "text")]
        few, some = max(count // 10, 1), max(3 * count // 10, 1)
        texts = _spaced(paragraphs, few) + _spaced(questions, some)
        sentences = [t for f in sorted(data.glob("bitext/*.parquet")) for t in _column(f, "text")]
        texts += _spaced(sentences, count - few - some)
    np.random.default_rng(0).shuffle(texts)
    return texts


def _spaced(texts: list[str], count: int) -> list[str]:
    """Sorted by length; the middles of ``count`` equal parts, repeated where there are fewer texts than that."""
    texts = sorted(dict.fromkeys(texts), key=len)
    return [texts[int((i + 0.5) * len(texts) / count)] for i in range(count)]


def _column(file: Path, column: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=[column])[column].to_pylist()
