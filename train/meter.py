"""Statistics of the training steps between two lines of the log: losses by dataset, throughput, utilisation."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from f2llm_jax.config import ModelConfig
from f2llm_jax.packing import text_lengths
from f2llm_jax.planning.chips import CHIPS
from f2llm_jax.planning.counts import flops_of_lengths
from f2llm_jax.train.batch import AnyTrainBatch, PackedTrainBatch

# JAX names a chip either as libtpu does or by its short name.
PEAK_FLOPS = {kind: chip.flops for chip in CHIPS.values() for kind in (chip.kind, f"TPU {chip.name}")}
"""Dense bfloat16 operations per second of a device, by ``jax.Device.device_kind``."""

# The names of the losses in the log, as in the reference.
LOSSES = {"hard": "loss_hard", "in_batch": "loss_in_batch", "distill": "loss_distill"}


class Work(NamedTuple):
    """The contents of a batch, over all processes.

    Attributes:
        examples: number of queries.
        tokens: number of tokens of queries, passages and negatives.
        computed_tokens: number of tokens with padding.
        squares: sum of the squared lengths of the texts.
    """

    examples: int
    tokens: int
    computed_tokens: int
    squares: int

    @classmethod
    def of(cls, batch: AnyTrainBatch) -> Work:
        """The work of a global batch, estimated from this process's share: the others are assumed to be like it."""
        if isinstance(batch, PackedTrainBatch):
            computed_tokens = batch.rows.tokens_bt.size
            lengths = text_lengths(batch.rows)
        else:
            texts = [rows for rows in (batch.query, batch.passage, batch.negatives) if rows is not None]
            computed_tokens = sum(rows.tokens_bt.size for rows in texts)
            lengths = np.concatenate([np.asarray(rows.lengths_b, np.int64) for rows in texts])
        counts = (len(batch.passage_ids_b), lengths.sum(), computed_tokens, np.square(lengths).sum())
        return cls(*(jax.process_count() * int(count) for count in counts))

    def forward_flops(self, config: ModelConfig) -> float:
        """Operations of a forward pass over the tokens: matrix products, and attention below the diagonal.

        All positions count in every layer, as is usual for MFU, although the last layer may not compute all of them.
        """
        return flops_of_lengths(config, self.tokens, self.squares).total


class Step(NamedTuple):
    """A step in flight.

    Attributes:
        number: the number of the step, counted from 1.
        dataset, task: dataset and task type of its batch.
        has_negatives: whether its examples have hard negatives; without them there is no hard loss.
        work: the work in its batch.
        metrics: the metrics of ``train_step``, possibly not yet computed.
    """

    number: int
    dataset: str
    task: str
    has_negatives: bool
    work: Work
    metrics: dict[str, jax.Array]


class Meter:
    """Accumulates the steps since the last call of ``scalars``.

    Args:
        config: the student's sizes.
        teacher: the teacher's sizes, if it runs within the step.
        distilled: whether there is a distillation loss.
    """

    def __init__(self, config: ModelConfig, teacher: ModelConfig | None, *, distilled: bool):
        self._config, self._teacher, self._distilled = config, teacher, distilled
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        self._terms: dict[str, list[float]] = defaultdict(list)
        self._grad_norms: list[float] = []
        self._work: list[Work] = []
        self._start = time.perf_counter()

    def add(self, step: Step, metrics: Mapping[str, float]) -> None:
        """Adds a step whose metrics have arrived."""
        wanted = {"hard"} if step.has_negatives else set()
        wanted |= {"in_batch"} if step.task == "retrieval" else set()
        wanted |= {"distill"} if self._distilled else set()
        terms = {name: metrics[name] for name in LOSSES if name in wanted}
        self._losses[step.task, step.dataset].append({LOSSES[name]: value for name, value in terms.items()})
        for name, value in {"loss": metrics["loss"], **terms}.items():
            self._terms[name].append(value)
        self._grad_norms.append(metrics["grad_norm"])
        self._work.append(step.work)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block does not count as training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @property
    def examples_per_second(self) -> float:
        return sum(work.examples for work in self._work) / (time.perf_counter() - self._start)

    def losses(self) -> dict[str, float]:
        """The means of ``loss`` and its terms since the last call of ``scalars``, each over the steps that have it."""
        return {name: float(np.mean(values)) for name, values in self._terms.items()}

    def scalars(self) -> dict[str, float]:
        """The means since the last call: losses by dataset and task, named as in the reference, and throughput."""
        examples, tokens, computed_tokens, squares = (sum(counts) for counts in zip(*self._work, strict=True))
        total = Work(examples, tokens, computed_tokens, squares)
        seconds = time.perf_counter() - self._start
        values = by_dataset("training", self._losses)
        values["grad_norm"] = float(np.mean(self._grad_norms))
        values["throughput/examples_per_second"] = total.examples / seconds
        values["throughput/tokens_per_second"] = total.tokens / seconds
        values["throughput/padding_share"] = 1 - total.tokens / total.computed_tokens
        if peak := PEAK_FLOPS.get(jax.devices()[0].device_kind):
            flops = 3 * total.forward_flops(self._config)
            flops += total.forward_flops(self._teacher) if self._teacher is not None else 0.0
            values["throughput/mfu_estimate"] = flops / seconds / (peak * jax.device_count())
        self._reset()
        return values


def by_dataset(phase: str, results: Mapping[tuple[str, str], list[dict[str, Any]]]) -> dict[str, float]:
    """``DATASET/PHASE_NAME``, the means of each dataset, and ``Avg/TASK/PHASE_NAME``, the means over a task's datasets.

    Args:
        phase: ``training`` or ``valid``.
        results: {(task, dataset): values of each batch, by name}.
    """
    values: dict[str, float] = {}
    of_task: dict[str, list[float]] = defaultdict(list)
    for (task, dataset), batches in sorted(results.items()):
        for name in batches[0]:
            mean = float(np.mean([batch[name] for batch in batches]))
            values[f"{dataset}/{phase}_{name}"] = mean
            of_task[f"Avg/{task}/{phase}_{name}"].append(mean)
    return values | {name: float(np.mean(means)) for name, means in of_task.items()}
