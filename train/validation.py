"""What a model makes of held-back batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import unit
from f2llm_jax.model import Params
from f2llm_jax.train.batch import AnyTrainBatch
from f2llm_jax.train.config import TrainConfig
from f2llm_jax.train.loader import Loader
from f2llm_jax.train.meter import LOSSES, by_dataset
from f2llm_jax.train.placement import everywhere, global_batch
from f2llm_jax.train.step import ComputeConfig, LossConfig, batch_states, loss_terms, split_states

# Batches dispatched before the results of an older one are fetched.
_IN_FLIGHT = 2


def validation_step(
    params: Params,
    batch: AnyTrainBatch,
    *,
    config: ModelConfig,
    loss: LossConfig,
    compute: ComputeConfig,
    in_batch: bool,
) -> dict[str, jax.Array]:
    """Losses of a batch at the full size, as the reference validates, and how often the positive wins.

    Args:
        params: the parameters.
        batch: the global batch.
        config, loss, compute, in_batch: as for ``train_step``.

    Returns:
        float32 scalars: ``loss_hard`` and ``accuracy`` (the share of queries that are nearer to their passage than to
        all of their negatives), if there are negatives; ``loss_in_batch``, for retrieval.
    """
    states = batch_states(params, batch, config, compute)
    terms = loss_terms(states, batch, dataclasses.replace(loss, mrl_dims=()), in_batch=in_batch)
    values = {LOSSES["in_batch"]: terms["in_batch"]} if in_batch else {}
    query_bd, passage_bd, negatives_bnd = split_states(states)
    if negatives_bnd is None:
        return values
    score_b = jnp.einsum("bd,bd->b", unit(query_bd), unit(passage_bd), precision="highest")
    score_bn = jnp.einsum("bd,bnd->bn", unit(query_bd), unit(negatives_bnd), precision="highest")
    accuracy = jnp.mean(score_b > jnp.max(score_bn, axis=1), dtype=jnp.float32)
    return {LOSSES["hard"]: terms["hard"], "accuracy": accuracy, **values}


def make_evaluate(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """``validation_step``, compiled, its results on every device."""
    step = functools.partial(validation_step, config=model, loss=config.loss, compute=config.compute)
    return jax.jit(step, static_argnames="in_batch", out_shardings=everywhere(mesh))


def validate(
    params: Params, loader: Loader, evaluate: Callable[..., dict[str, jax.Array]], mesh: Mesh
) -> dict[str, float]:
    """The means of ``validation_step`` over the batches of each dataset, and their averages over tasks, by name."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for item in itertools.chain.from_iterable(loader.validation().values()):
        values = results[item.task, item.dataset]
        values.append(evaluate(params, global_batch(item.batch, mesh), in_batch=item.task == "retrieval"))
        if len(values) > _IN_FLIGHT:
            values[-1 - _IN_FLIGHT] = jax.device_get(values[-1 - _IN_FLIGHT])
    return by_dataset("valid", jax.device_get(dict(results)))
