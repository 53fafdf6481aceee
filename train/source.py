"""The loader that a config asks for."""

from __future__ import annotations

import jax

from f2llm_jax.axes import batch_parts
from f2llm_jax.errors import InputError
from f2llm_jax.release import find_release
from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train.config import TrainConfig
from f2llm_jax.train.data import DataLoader, Share, TrainBatches, TrainingData
from f2llm_jax.train.placement import check_batch, make_train_mesh


def open_loader(config: TrainConfig) -> DataLoader:
    """Opens the prepared data of a run, for this process's share of every batch.

    Raises:
        InputError: there is no prepared data, it is for another tokenizer, or its batches do not divide over the mesh.
    """
    mesh = make_train_mesh(config.mesh)
    check_batch(config, mesh)
    data = TrainingData(config.data.path, max_length=config.data.max_length)
    eos_id = Tokenizer.from_release(find_release(config.model, weights=False)).eos_id
    if eos_id != data.settings.eos_id:
        raise InputError(
            f"{config.data.path} was prepared for models whose EOS is token {data.settings.eos_id}; that of "
            f"{config.model} is {eos_id}: prepare it with --tokenizer {config.model}"
        )
    batches = TrainBatches(
        data,
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        share=Share(jax.process_index(), jax.process_count()),
    )
    return DataLoader(batches, multiple=batch_parts(mesh), workers=config.data.workers)
