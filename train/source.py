"""The loader and the query prompt that a config specifies for its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from f2llm_jax.axes import batch_parts
from f2llm_jax.config import ModelConfig
from f2llm_jax.errors import InputError, warn
from f2llm_jax.release import find_release, read_release
from f2llm_jax.train.config import TrainConfig
from f2llm_jax.train.data import DataLoader, Share, TrainBatches, TrainingData
from f2llm_jax.train.packing import TrainPacking
from f2llm_jax.train.placement import check_batch, make_train_mesh
from f2llm_jax.train.records import Settings
from f2llm_jax.train.teacher import check_tokenizer, open_store
from f2llm_jax.train.validation import scalar_names

# Queries count as having no instructions if a smaller share of them begins with one.
_FEW = 0.01


def open_loader(config: TrainConfig) -> DataLoader:
    """Opens the prepared data of a run, for this process's share of every batch.

    Raises:
        InputError: there is no prepared data, it is for another tokenizer, its batches do not divide over the mesh, its
            validation does not give the scalar ``every.keep_best``, or the teacher's states are of other data, of
            another teacher or narrower than the student.
    """
    mesh = make_train_mesh(config.mesh)
    check_batch(config, mesh)
    release = find_release(config.model, weights=False)
    folder = Path(config.data.path).expanduser()
    settings = Settings.read(folder)
    check_tokenizer(release, settings, folder)
    check_keep_best(config, settings)
    max_length = settings.cut_to(config.data.max_length, "data.max_length")
    store = None
    if config.teacher_states is not None:
        store = open_store(
            Path(config.teacher_states).expanduser(),
            data=folder,
            max_length=max_length,
            width=ModelConfig.from_release(release).hidden_size,
            teacher=config.teacher,
        )
    packing = None
    if config.data.packed:
        packing = TrainPacking.on(mesh.devices.flat[0].platform, batch_parts(mesh), config.compute.chunk_rows)
    data = TrainingData(folder, max_length=max_length, teacher=store, packing=packing)
    batches = TrainBatches(
        data,
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        share=Share(jax.process_index(), jax.process_count()),
    )
    return DataLoader(batches, multiple=batch_parts(mesh), workers=config.data.workers)


def check_keep_best(config: TrainConfig, settings: Settings) -> None:
    """Raises an InputError if validation on the prepared data does not give the scalar ``every.keep_best``."""
    name, names = config.every.keep_best, scalar_names(settings.datasets)
    if name is None or name in names:
        return
    if not names:
        raise InputError(
            f"every.keep_best={name}, but {config.data.path} has no examples for validation (f2llm prepare holds back "
            "one of 100): --set every.keep_best=none"
        )
    averages = ", ".join(name for name in names if name.startswith("Avg/"))
    raise InputError(
        f"every.keep_best={name} is no scalar of the validation on {config.data.path}, which gives {averages}, and the "
        "same for each dataset, by its name instead of Avg/TASK"
    )


def with_query_prompt(config: TrainConfig, settings: Settings) -> TrainConfig:
    """The config with the query prompt that its data was prepared with, unless it has one of its own.

    Warns if the two differ, or if the queries were prepared without a prompt but the exported model will have one.

    Args:
        config: the config of a run.
        settings: of the prepared data, from ``Loader.settings``.

    Raises:
        ReleaseError: there is no such model.
    """
    recorded = settings.query_prompt
    if recorded is not None and config.query_prompt == "":
        return dataclasses.replace(config, query_prompt=recorded)
    if recorded is not None and config.query_prompt != recorded:
        own = "none" if config.query_prompt is None else repr(config.query_prompt)
        warn(
            f"the exported model will have query_prompt={own}, but the queries in {config.data.path} were prepared "
            f"with --query-prompt {recorded!r}: --set query_prompt= takes that"
        )
    if recorded is None and _without_instructions(settings):
        prompt = config.query_prompt
        if prompt == "":
            prompt = read_release(find_release(config.model, weights=False)).prompts["query"]
        if prompt:
            warn(
                f"the exported model will put {prompt!r} before queries, but only {settings.instructed:.1%} of those "
                f"in {config.data.path} begin with an instruction: prepare them with f2llm prepare --query-prompt "
                "TEXT, or export another prompt with --set query_prompt=TEXT, or none with --set query_prompt=none"
            )
    return config


def _without_instructions(settings: Settings) -> bool:
    """Whether queries lack instructions that they should have: only stage 1, which strips them, trains without."""
    return settings.stage != 1 and settings.instructed < _FEW
