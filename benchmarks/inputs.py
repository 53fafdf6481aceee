"""Inputs of the benchmarks: random models of the real shapes, real texts of several lengths, and folders on disk."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS

if TYPE_CHECKING:
    import jax

    from f2llm_jax.model import Params

SIZES = tuple(MODELS)

QUERY_PROMPT = "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Creates a folder for a with block, and deletes it with its contents at the end; refuses an existing folder."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} exists; name one that does not: it is deleted at the end") from None
    try:
        yield
    finally:
        shutil.rmtree(folder)


def write_release(folder: Path, size: str, tokenizer: Path) -> Path:
    """Writes a release of a released size with random bfloat16 weights, unless it exists already."""
    if not folder.exists():
        config = MODELS[size]
        write_params(folder, random_params(config), config, tokenizer, dtype="bfloat16")
    return folder


def random_params(config: ModelConfig) -> Params:
    """Random float32 parameters; norm weights are within 0.5 … 1.5, so that a wrong norm shows in the cosines."""
    import jax
    import jax.numpy as jnp

    from f2llm_jax.model import init_params

    def away_from_one(path: tuple[object, ...], x: jax.Array) -> jax.Array:
        return x * jnp.linspace(0.5, 1.5, x.shape[-1]) if "norm" in str(path) else x

    params = jax.jit(init_params, static_argnames="config")(config, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(away_from_one, params)


def write_params(
    folder: Path,
    params: Params,
    config: ModelConfig,
    tokenizer: Path,
    *,
    dtype: str = "float32",
    query_prompt: str = QUERY_PROMPT,
) -> Path:
    """Writes parameters and a tokenizer as a release in the layout of F2LLM-v2."""
    from f2llm_jax.convert.export import export_release

    with tempfile.TemporaryDirectory() as settings:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, Path(settings, name))
        Path(settings, "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
        prompts = {"query": query_prompt, "document": ""}
        return export_release(params, config, folder, like=settings, dtype=dtype, prompts=prompts)


TEXTS = ("short", "medium", "long", "mix")


def read_texts(kind: str, count: int, data: Path) -> list[str]:
    """``count`` texts that represent their kind: evenly spaced in order of length, then shuffled.

    short: English sentences of Tatoeba with a German translation. medium: English questions of XQuAD after the query
    prompt, as in a search. long: English paragraphs of XQuAD. mix: six sentences, three questions and one paragraph in
    ten texts, in all languages.
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
    """The middles of ``count`` equal parts of the texts sorted by length; texts repeat if there are fewer than that."""
    texts = sorted(dict.fromkeys(texts), key=len)
    return [texts[int((i + 0.5) * len(texts) / count)] for i in range(count)]


def _column(file: Path, column: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=[column])[column].to_pylist()
