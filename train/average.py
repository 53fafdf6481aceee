"""The mean of a run's last checkpoints, as a release."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.errors import InputError
from f2llm_jax.model import Params
from f2llm_jax.release import find_release, read_release
from f2llm_jax.train.checkpoint import Checkpoints
from f2llm_jax.train.loop import export_run


def average_run(
    run: Path, out: str | Path, *, last: int = 3, dtype: str | None = None, force: bool = False
) -> list[int]:
    """Averages checkpoints in float32 and writes the result as a release.

    Memory: twice the parameters.

    Args:
        run: the folder of a run, which may still be going on.
        out: the folder to write.
        last: how many checkpoints, counted from the last.
        dtype: to write; default that of the release that training began with.
        force: replace ``out`` if it is a model folder.

    Returns:
        The steps that went into it.

    Raises:
        InputError: there are not as many checkpoints, or ``out`` exists.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{run} holds no run: there is no {folder}")
    with Checkpoints(folder, read_only=True) as checkpoints:
        steps = checkpoints.steps[-last:]
        if len(steps) < last:
            raise InputError(f"{folder} holds {len(steps)} checkpoints, not {last}")
        config = checkpoints.read_config(steps[-1])
        release = read_release(find_release(config.model, weights=False))
        mean = mean_params((checkpoints.path(step) for step in steps), release.config)
    export_run(mean, config, release, out, dtype=dtype, force=force)
    return steps


def mean_params(folders: Iterable[Path], config: ModelConfig) -> Params:
    """The float32 mean of the parameters of step folders, of which there is at least one."""
    add = jax.jit(lambda total, params: jax.tree.map(jax.numpy.add, total, params), donate_argnums=0)
    first, *others = folders
    total = load_params(open_checkpoint(first), config)
    for folder in others:
        total = add(total, load_params(open_checkpoint(folder), config))
    return jax.tree.map(lambda x: x / (1 + len(others)), total)
