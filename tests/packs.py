"""Training batches of one text a row, put into packed rows."""

from __future__ import annotations

import numpy as np

from f2llm_jax.train.batch import PackedTrainBatch, TrainBatch
from f2llm_jax.train.packing import TrainPacking, pack


def as_packed(batch: TrainBatch, *, fitted: bool = True, **options: int) -> PackedTrainBatch:
    """The same texts in the rows that ``TrainPacking`` chooses."""
    kinds = [kind for kind in (batch.query, batch.passage, batch.negatives) if kind is not None]
    texts = [tokens[:length] for kind in kinds for tokens, length in zip(*kind, strict=True)]
    lengths = np.array([len(tokens) for tokens in texts])
    plan = TrainPacking(fitted=fitted, **options).plan([lengths])
    rows, slots = pack(plan, 0, texts, pad_id=0)
    count = len(batch.passage_ids_b)
    negatives = None if batch.negatives is None else slots[2 * count :]
    return PackedTrainBatch(
        rows, slots[:count], slots[count : 2 * count], negatives, batch.passage_ids_b, batch.teacher
    )
