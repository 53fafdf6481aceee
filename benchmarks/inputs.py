"""What the benchmarks run on: random models of the real shapes, real texts of several lengths, and room on the disk."""

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
    """A release of a released size with random bfloat16 weights; kept if it is there already."""
    if not folder.exists():
        config = MODELS[size]
        write_params(folder, random_params(config), config, tokenizer, dtype="bfloat16")
    return folder


def random_params(config: ModelConfig) -> Params:
    """Float32; norm weights lie within 0.5 … 1.5, so that a wrong norm shows in the cosines."""
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
    """Parameters as a release, laid out as F2LLM-v2's are, around a tokenizer."""
    from f2llm_jax.convert.export import export_release

    with tempfile.TemporaryDirectory() as settings:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, Path(settings, name))
        Path(settings, "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
        prompts = {"query": query_prompt, "document": ""}
        return export_release(params, config, folder, like=settings, dtype=dtype, prompts=prompts)


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
