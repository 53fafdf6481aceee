"""Validation: losses and accuracy of a model on held-back batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import unit
from f2llm_jax.model import Params
from f2llm_jax.pipeline import lagging
from f2llm_jax.sharding import replicated
from f2llm_jax.train.batch import AnyTrainBatch
from f2llm_jax.train.config import TrainConfig
from f2llm_jax.train.loader import Item, Loader
from f2llm_jax.train.meter import LOSSES, by_dataset
from f2llm_jax.train.placement import global_batch, global_rows
from f2llm_jax.train.records import Dataset
from f2llm_jax.train.step import ComputeConfig, LossConfig, batch_states, loss_terms, split_states


def validation_step(
    params: Params,
    batch: AnyTrainBatch,
    example_mask_b: jax.Array,
    *,
    config: ModelConfig,
    loss: LossConfig,
    compute: ComputeConfig,
    in_batch: bool,
) -> dict[str, jax.Array]:
    """The losses of a batch at the full size only, as in the reference's validation, and how often the positive wins.

    Args:
        params: the parameters.
        batch: the global batch.
        example_mask_b: bool [batch]; False for examples that only fill the batch, which nothing depends on.
        config, loss, compute, in_batch: as for ``train_step``.

    Returns:
        float32 scalars: ``loss_hard`` and ``accuracy`` (the share of queries that are closer to their passage than to
        each of their negatives), if there are negatives; ``loss_in_batch``, for retrieval.
    """
    states = batch_states(params, batch, config, compute)
    loss = dataclasses.replace(loss, mrl_dims=())
    terms = loss_terms(states, batch, loss, in_batch=in_batch, example_mask_b=example_mask_b)
    values = {LOSSES["in_batch"]: terms["in_batch"]} if in_batch else {}
    query_bd, passage_bd, negatives_bnd = split_states(states)
    if negatives_bnd is None:
        return values
    score_b = jnp.einsum("bd,bd->b", unit(query_bd), unit(passage_bd), precision="highest")
    score_bn = jnp.einsum("bd,bnd->bn", unit(query_bd), unit(negatives_bnd), precision="highest")
    accuracy = jnp.mean(score_b > jnp.max(score_bn, axis=1), dtype=jnp.float32, where=example_mask_b)
    return {LOSSES["hard"]: terms["hard"], "accuracy": accuracy, **values}


def make_evaluate(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """``validation_step``, compiled; its results are replicated on every device."""
    step = functools.partial(validation_step, config=model, loss=config.loss, compute=config.compute)
    return jax.jit(step, static_argnames="in_batch", out_shardings=replicated(mesh))


def validate(
    params: Params,
    loader: Loader,
    evaluate: Callable[..., dict[str, jax.Array]],
    mesh: Mesh,
    *,
    stop: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> dict[str, float] | None:
    """The means of ``validation_step`` over the examples of each dataset, and their averages over tasks, by name.

    Args:
        params: the parameters.
        loader: provides the batches.
        evaluate: from ``make_evaluate``.
        mesh: the mesh of parameters and batches.
        stop: called before each batch; if it returns True, the validation ends, and the result is None.
        show_progress: show a progress bar on standard error.
    """
    from tqdm import tqdm

    def start(item: Item) -> tuple[Item, dict[str, jax.Array]]:
        rows = len(item.batch.passage_ids_b)
        example_mask_b = global_rows(jax.process_index() * rows + np.arange(rows) < item.examples, mesh)
        batch = global_batch(item.batch, mesh)
        return item, evaluate(params, batch, example_mask_b, in_batch=item.task == "retrieval")

    items = itertools.chain.from_iterable(loader.validation().values())
    started = map(start, itertools.takewhile(lambda item: not stop(), items))
    values: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    examples: dict[tuple[str, str], list[int]] = defaultdict(list)
    with tqdm(
        desc="validation", total=loader.validation_batches, leave=False, unit="batch", disable=not show_progress
    ) as bar:
        for item, means in lagging(started):
            values[item.task, item.dataset].append(jax.device_get(means))
            examples[item.task, item.dataset].append(item.examples)
            bar.update()
    if sum(map(len, values.values())) < loader.validation_batches:
        return None
    return by_dataset("valid", {key: [_mean(values[key], examples[key])] for key in values})


def scalar_names(datasets: Iterable[Dataset]) -> list[str]:
    """The names of the scalars that ``validate`` returns for prepared datasets."""

    def values(dataset: Dataset) -> list[str]:
        hard = [LOSSES["hard"], "accuracy"] if dataset.negatives else []
        return [*hard, *([LOSSES["in_batch"]] if dataset.task == "retrieval" else [])]

    held_back = [dataset for dataset in datasets if dataset.examples["validation"]]
    results: dict[tuple[str, str], list[dict[str, float]]] = {
        (dataset.task, dataset.name): [dict.fromkeys(values(dataset), 0.0)] for dataset in held_back
    }
    return list(by_dataset("valid", results))


def _mean(batches: list[dict[str, Any]], examples: list[int]) -> dict[str, Any]:
    """The mean over all examples, from the mean of each batch and its number of examples."""
    return {name: np.average([values[name] for values in batches], weights=examples) for name in batches[0]}
