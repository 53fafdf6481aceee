"""Trains the tiny model to give translations similar embeddings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from f2llm_jax.batching import make_batch
from f2llm_jax.demo.texts import LANGUAGES, Text
from f2llm_jax.embedding import Batch
from f2llm_jax.encoder import Encoder
from f2llm_jax.model import Params
from f2llm_jax.train.batch import TrainBatch
from f2llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.train.step import ComputeConfig, LossConfig, TrainState, train_step

STEPS = 200
BATCH_SIZE = 64
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=20)

# Tokens per row: 95 of 100 texts fit.
QUERY_LENGTH, PASSAGE_LENGTH = 36, 28


def train_tiny(model: Encoder, texts: Sequence[Text], *, steps: int = STEPS, show_progress: bool = False) -> Params:
    """Trains with the in-batch loss at every Matryoshka size.

    Args:
        model: the model to start from; it is not modified.
        texts: every meaning in every language of ``LANGUAGES``, in that order.
        steps: number of updates.
        show_progress: show a progress bar on standard error.

    Returns:
        The trained float32 parameters.
    """
    from tqdm import tqdm

    optimizer = make_optimizer(OPTIMIZER, steps)
    step = jax.jit(
        functools.partial(
            train_step,
            config=model.config,
            loss=LossConfig(mrl_dims=model.config.matryoshka_dims[:-1]),
            compute=ComputeConfig(dtype="float32", remat="dots"),
            optimizer=optimizer,
            in_batch=True,
        ),
        donate_argnums=0,
    )
    params = jax.tree.map(jnp.copy, model.params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    with tqdm(batches(model, texts, steps), total=steps, unit="step", disable=not show_progress) as bar:
        for batch in bar:
            state, metrics = step(state, batch)
            bar.set_postfix_str(f"loss {metrics['loss']:.2f}", refresh=False)
    return state.params


def write_raw(texts: Sequence[Text], folder: Path, *, prompt: str) -> None:
    """Writes raw data for ``f2llm prepare``: for each language but English, a file that pairs it with English."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    of = {name: [text.text for text in texts if text.language == name] for name in LANGUAGES.values()}
    for key, name in LANGUAGES.items():
        if name != "English":
            table = pyarrow.table({"query": [prompt + text for text in of[name]], "passage": of["English"]})
            parquet.write_table(table, folder / f"{key}_en.parquet")


def batches(model: Encoder, texts: Sequence[Text], steps: int) -> Iterator[TrainBatch]:
    """The batches of a run, the same every time.

    The meanings in a batch are distinct; each is a query in one language and a passage in another, drawn at random. The
    prompt is prepended to none of the queries at first, and to all of them at the end: to a model with random weights,
    texts with a common beginning look the same, and learning to tell them apart takes several times as many steps.
    """
    # The texts without the prompt, followed by the same texts with it.
    queries = jax.tree.map(
        lambda *rows: np.concatenate(rows),
        _rows(model, texts, "", QUERY_LENGTH),
        _rows(model, texts, model.prompts["query"], QUERY_LENGTH),
    )
    passages = _rows(model, texts, model.prompts["document"], PASSAGE_LENGTH)
    languages = len(LANGUAGES)
    rng = np.random.default_rng(0)
    for step in range(steps):
        meaning_b = rng.choice(len(texts) // languages, BATCH_SIZE, replace=False)
        language_b = rng.integers(languages, size=BATCH_SIZE)
        other_b = (language_b + rng.integers(1, languages, size=BATCH_SIZE)) % languages
        prompted_b = rng.random(BATCH_SIZE) < 2 * step / steps - 0.5
        yield TrainBatch(
            query=_take(queries, prompted_b * len(texts) + meaning_b * languages + language_b),
            passage=_take(passages, meaning_b * languages + other_b),
            negatives=None,
            passage_ids_b=jnp.asarray(meaning_b, jnp.int32),
        )


def _take(rows: Batch, numbers: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[numbers], rows)


def _rows(model: Encoder, texts: Sequence[Text], prompt: str, length: int) -> Batch:
    sequences, _ = model.tokenizer.encode([prompt + text.text for text in texts], length)
    return make_batch(sequences, length, pad_id=model.tokenizer.pad_id)
