"""The input of a training step: the texts of one global batch, all from one dataset."""

from __future__ import annotations

from typing import NamedTuple

import jax

from f2llm_jax.embedding import Batch, PackedBatch


class TeacherStates(NamedTuple):
    """A teacher's unnormalised EOS states of a batch, at least as wide as the student's: float [rows, hidden] each."""

    query_bd: jax.Array
    passage_bd: jax.Array
    negatives_md: jax.Array | None


class TrainBatch(NamedTuple):
    """Queries with their passages and hard negatives, one text per row (the layout ``bucketed``).

    Attributes:
        query: [batch] rows.
        passage: [batch] rows, the positive of each query.
        negatives: [batch · count] rows, starting with those of the first query; None for a dataset without negatives.
        passage_ids_b: int32 [batch], equal for passages that are the same document.
        teacher: precomputed states for distillation; None if there are none.
    """

    query: Batch
    passage: Batch
    negatives: Batch | None
    passage_ids_b: jax.Array
    teacher: TeacherStates | None = None

    @property
    def has_negatives(self) -> bool:
        return self.negatives is not None


class PackedTrainBatch(NamedTuple):
    """The same with texts packed into rows (the layout ``packed``). A slot is row · slots per row + slot in the row.

    Attributes:
        rows: the rows of all texts; queries, passages and negatives share rows.
        query_slots_b: int32 [batch], the slot of each query.
        passage_slots_b: int32 [batch], the slot of the positive of each query.
        negative_slots_m: int32 [batch · count], starting with those of the first query; None for a dataset without
            negatives.
        passage_ids_b, teacher: as in ``TrainBatch``.
    """

    rows: PackedBatch
    query_slots_b: jax.Array
    passage_slots_b: jax.Array
    negative_slots_m: jax.Array | None
    passage_ids_b: jax.Array
    teacher: TeacherStates | None = None

    @property
    def has_negatives(self) -> bool:
        return self.negative_slots_m is not None


AnyTrainBatch = TrainBatch | PackedTrainBatch
