"""What a training step takes: the texts of one global batch, all of one dataset."""

from __future__ import annotations

from typing import NamedTuple

import jax

from f2llm_jax.embedding import Batch, PackedBatch


class TeacherStates(NamedTuple):
    """A teacher's unnormalised EOS states of a batch, at least as wide as the student: float [rows, hidden] each."""

    query_bd: jax.Array
    passage_bd: jax.Array
    negatives_md: jax.Array | None


class TrainBatch(NamedTuple):
    """Queries with their passages and hard negatives, each text in a row of its own (the layout ``bucketed``).

    Attributes:
        query: [batch] rows.
        passage: [batch] rows, the positive of each query.
        negatives: [batch · count] rows, those of the first query first; None for a dataset without any.
        passage_ids_b: int32 [batch], equal where two passages are the same document.
        teacher: states computed beforehand, for distillation; None where there are none.
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
    """The same with all texts in the same rows (the layout ``packed``). A slot is row · slots of a row + slot in it.

    Attributes:
        rows: of all texts, queries beside passages and negatives.
        query_slots_b: int32 [batch], where each query is.
        passage_slots_b: int32 [batch], where the positive of each query is.
        negative_slots_m: int32 [batch · count], those of the first query first; None for a dataset without any.
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
