"""The loader that a config asks for."""

from __future__ import annotations

from pathlib import Path

import jax

from f2llm_jax.axes import batch_parts
from f2llm_jax.config import ModelConfig
from f2llm_jax.release import find_release
from f2llm_jax.train.config import TrainConfig
from f2llm_jax.train.data import DataLoader, Share, TrainBatches, TrainingData
from f2llm_jax.train.packing import TrainPacking
from f2llm_jax.train.placement import check_batch, make_train_mesh
from f2llm_jax.train.records import Settings
from f2llm_jax.train.teacher import check_tokenizer, open_store


def open_loader(config: TrainConfig) -> DataLoader:
    """Opens the prepared data of a run, for this process's share of every batch.

    Raises:
        InputError: there is no prepared data, it is for another tokenizer, its batches do not divide over the mesh, or
            the teacher's states are not those of this data, teacher and width.
    """
    mesh = make_train_mesh(config.mesh)
    check_batch(config, mesh)
    release = find_release(config.model, weights=False)
    settings = Settings.read(Path(config.data.path))
    check_tokenizer(release, settings, config.data.path)
    max_length = settings.cut_to(config.data.max_length, "data.max_length")
    store = None
    if config.teacher_states is not None:
        store = open_store(
            config.teacher_states,
            data=Path(config.data.path),
            max_length=max_length,
            width=ModelConfig.from_release(release).hidden_size,
            teacher=config.teacher,
        )
    packing = None
    if config.data.packed:
        packing = TrainPacking.on(mesh.devices.flat[0].platform, batch_parts(mesh), config.compute.chunk_rows)
    data = TrainingData(config.data.path, max_length=max_length, teacher=store, packing=packing)
    batches = TrainBatches(
        data,
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        share=Share(jax.process_index(), jax.process_count()),
    )
    return DataLoader(batches, multiple=batch_parts(mesh), workers=config.data.workers)
