"""The jobs that are planned for a slice: encoding a batch of texts, or a step of a training recipe."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from f2llm_jax.batching import BATCH_TOKENS, Buckets
from f2llm_jax.config import ModelConfig
from f2llm_jax.dtypes import DTYPES
from f2llm_jax.errors import InputError
from f2llm_jax.packing import Packing, row_slots
from f2llm_jax.planning.counts import ATTENTION_BACKWARD, Axes, Estimate, TrainWork, estimate_encode, estimate_train
from f2llm_jax.planning.programs import AbstractProgram, encode_program, train_program

if TYPE_CHECKING:
    from f2llm_jax.train.config import TrainConfig
    from f2llm_jax.train.packing import TrainPacking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """What encoding and training have in common: rows of texts of equal length.

    Attributes:
        config: the model's sizes.
        length: tokens per text.
        batch_tokens: tokens computed at a time, on all devices together; None for the default of encoding, or for as
            many as fit in training.
    """

    do: ClassVar[str]
    config: ModelConfig
    length: int = 1024
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.length <= self.config.max_position_embeddings:
            raise InputError(f"length must be within 1..{self.config.max_position_embeddings}, not {self.length}")

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The sizes of all models that the job runs."""
        return (self.config,)

    @property
    @abstractmethod
    def itemsize(self) -> int:
        """Bytes per operand of projections."""

    @property
    @abstractmethod
    def packed(self) -> bool:
        """Whether rows are packed, with as many texts as fit."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Tokens per row."""

    @property
    def texts_per_row(self) -> int:
        return self.row_length // self.length if self.packed else 1

    @property
    def padding(self) -> float:
        """The share of padding in a row."""
        return 1 - self.texts_per_row * self.length / self.row_length

    @property
    def slots(self) -> int:
        """Text slots per row."""
        return row_slots(self.row_length, self.texts_per_row, short=False) if self.packed else 1

    @abstractmethod
    def rows_at_once(self, axes: Axes) -> Iterator[int]:
        """How many rows to compute at a time: the number asked for, or all that divide over the mesh, largest first."""

    @abstractmethod
    def texts(self, rows_at_once: int) -> int:
        """Texts per step, on all devices together."""

    @abstractmethod
    def nothing_divides(self, over: object) -> str:
        """The error message if there are no ``rows_at_once``."""

    @abstractmethod
    def estimate(self, axes: Axes, rows_at_once: int) -> Estimate:
        """The cost of a step, estimated from the sizes."""

    @abstractmethod
    def program(self, mesh: jax.sharding.Mesh, rows_at_once: int) -> AbstractProgram:
        """The program, on a mesh of compile-only devices."""

    @property
    def _asked(self) -> str:
        return "" if self.batch_tokens is None else f" with --batch-tokens {self.batch_tokens}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeJob(Job):
    """A batch of texts, in rows as an ``Encoder`` lays them out by default.

    Attributes:
        dtype: as for ``load``.
    """

    do = "encode"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def packed(self) -> bool:
        """Whether packing computes no more tokens than one text per row."""
        row_length, bucket_length = self._lengths
        return row_length <= bucket_length * (row_length // self.length)

    @property
    def row_length(self) -> int:
        return self._lengths[0 if self.packed else 1]

    @property
    def _lengths(self) -> tuple[int, int]:
        """Tokens of a packed row, and of a row with one text."""
        longest = self.config.max_position_embeddings
        packed = next(length for length in Packing.on("tpu", 1, longest).lengths if length >= self.length)
        return packed, Buckets(1, longest).full(self.length).length

    def rows_at_once(self, axes: Axes) -> Iterator[int]:
        batch_tokens = self.batch_tokens or BATCH_TOKENS["tpu"] * axes.size
        yield Packing.on("tpu", batch_tokens, self.length, axes.batch_parts).rows(self.row_length)

    def texts(self, rows_at_once: int) -> int:
        return rows_at_once * self.texts_per_row

    def nothing_divides(self, over: object) -> str:
        return f"texts of {self.length} tokens{self._asked} do not divide over {over}"

    def estimate(self, axes: Axes, rows_at_once: int) -> Estimate:
        return estimate_encode(
            self.config, axes, rows=rows_at_once, length=self.row_length, slots=self.slots, itemsize=self.itemsize
        )

    def program(self, mesh: jax.sharding.Mesh, rows_at_once: int) -> AbstractProgram:
        slots = self.slots if self.packed else None
        return encode_program(
            self.config, mesh, rows=rows_at_once, length=self.row_length, slots=slots, dtype=self.dtype
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """A step of a recipe on a retrieval batch.

    Attributes:
        recipe: the recipe.
        teacher: the sizes of the recipe's teacher; None without a teacher, or if its states are read from disk.
        negatives: negatives per query.
    """

    do = "train"
    recipe: TrainConfig
    teacher: ModelConfig | None = None
    negatives: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe.compute.kernel not in ("auto", *ATTENTION_BACKWARD):
            raise InputError(
                f"the recipe's compute.kernel is {self.recipe.compute.kernel!r}, which TPUs do not have; take auto"
            )
        longest = self.recipe.data.max_length
        if self.length > longest:
            raise InputError(f"length must be within 1..{longest}, the recipe's data.max_length, not {self.length}")

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        return (self.config,) if self.teacher is None else (self.config, self.teacher)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.recipe.compute.dtype).itemsize

    @property
    def packed(self) -> bool:
        return self.recipe.data.packed

    @property
    def row_length(self) -> int:
        return self._packing(1).lengths(self.length)[-1] if self.packed else self.length

    def _packing(self, multiple: int) -> TrainPacking:
        """The shapes of the recipe's batches, with the number of rows a multiple of ``multiple``."""
        from f2llm_jax.train.packing import TrainPacking

        return TrainPacking.on("tpu", multiple, self.recipe.compute.chunk_rows)

    def _runs(self, axes: Axes) -> tuple[int, ...]:
        """Rows in each run of the model: all texts packed, or queries and documents."""
        if self.packed:
            rows = math.ceil(self._texts / self.texts_per_row)
            return (self._packing(axes.batch_parts).rows(rows),)
        queries = self.recipe.data.batch_size
        return queries, queries * (1 + self.negatives)

    def rows_at_once(self, axes: Axes) -> Iterator[int]:
        parts = axes.batch_parts
        if self.recipe.data.batch_size % parts:
            return
        runs = self._runs(axes)
        if self.batch_tokens is not None:
            wanted = self.batch_tokens // self.row_length
            if wanted >= sum(runs):
                yield sum(runs)
            elif wanted >= parts and not wanted % parts and not any(rows % min(wanted, rows) for rows in runs):
                yield wanted  # with any other number, training pads a packed batch with rows
        elif self.recipe.compute.chunk_rows:
            yield max(size for _, size in _chunk_shapes(runs, self.recipe.compute.chunk_rows, parts))
        else:
            yield sum(runs)
            yield from (rows for rows in reversed(divisors(min(runs))) if rows % parts == 0 and rows < sum(runs))

    def texts(self, rows_at_once: int) -> int:
        return self._texts

    @property
    def _texts(self) -> int:
        """Queries, passages and negatives of a step, independent of the rows computed at a time."""
        return self.recipe.data.batch_size * (2 + self.negatives)

    def nothing_divides(self, over: object) -> str:
        return f"a batch of {self.recipe.data.batch_size} queries{self._asked} does not divide over {over}"

    def _work(self, axes: Axes, rows_at_once: int) -> TrainWork:
        compute, runs, chunk_rows = self.recipe.compute, self._runs(axes), 0
        if rows_at_once < sum(runs) or (compute.chunk_rows and self.batch_tokens is None):
            chunk_rows = rows_at_once
            runs = tuple(chunks * size for chunks, size in _chunk_shapes(runs, chunk_rows, axes.batch_parts))
        return TrainWork(
            queries=self.recipe.data.batch_size,
            negatives=self.negatives,
            runs=runs,
            length=self.row_length,
            slots=self.slots,
            chunk_rows=chunk_rows,
            remat=compute.remat,
            kernel="splash" if compute.kernel == "auto" else compute.kernel,
            mrl_dims=self.recipe.loss.mrl_dims,
            itemsize=self.itemsize,
            param_itemsize=jnp.dtype(self.recipe.params_dtype).itemsize,
        )

    def estimate(self, axes: Axes, rows_at_once: int) -> Estimate:
        return estimate_train(self.config, axes, self._work(axes, rows_at_once), self.teacher)

    def program(self, mesh: jax.sharding.Mesh, rows_at_once: int) -> AbstractProgram:
        axes = Axes(**mesh.shape)
        work = self._work(axes, rows_at_once)
        compute = dataclasses.replace(self.recipe.compute, chunk_rows=work.chunk_rows)
        return train_program(
            dataclasses.replace(self.recipe, compute=compute),
            self.config,
            mesh,
            length=self.length,
            negatives=self.negatives,
            packed=(sum(self._runs(axes)), self.row_length, work.slots) if self.packed else None,
            teacher=self.teacher,
        )


def _chunk_shapes(runs: tuple[int, ...], chunk_rows: int, parts: int) -> list[tuple[int, int]]:
    from f2llm_jax.train.step import chunk_shape

    return [chunk_shape(rows, chunk_rows, parts) for rows in runs]


def divisors(n: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]
