"""Exports checkpoints of a run as a release: one of them, or the mean of several."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import jax

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.errors import InputError
from f2llm_jax.model import Params
from f2llm_jax.release import find_release, read_release
from f2llm_jax.train.checkpoint import Checkpoints
from f2llm_jax.train.loop import export_run
from f2llm_jax.train.scalars import best_step


def average_run(
    run: str | Path,
    out: str | Path,
    *,
    last: int = 3,
    steps: Collection[int] | None = None,
    best: bool = False,
    dtype: str | None = None,
    force: bool = False,
) -> list[int]:
    """Averages checkpoints in float32 and writes the result as a release.

    Memory: twice the parameters.

    Args:
        run: the folder of a run, which may still be in progress; ``~`` is the home folder.
        out: the folder to write.
        last: average this many of the latest checkpoints, of which a run keeps ``every.keep``. An older one, kept as
            the best, is not among them.
        steps: take the checkpoints of these steps instead.
        best: take the best checkpoint by the run's ``every.keep_best`` instead.
        dtype: dtype of the written weights; default: that of the release that training started from.
        force: replace ``out`` if it is a model folder.

    Returns:
        The steps of the averaged checkpoints.

    Raises:
        InputError: there are fewer checkpoints than that, none of such a step or no best one, or ``out`` exists.
    """
    run = Path(run).expanduser()
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{run} holds no run: there is no {folder}")
    with Checkpoints(folder, read_only=True) as checkpoints:
        if not checkpoints.steps:
            raise InputError(f"{folder} holds no checkpoint yet")
        if best:
            chosen = [_best(checkpoints, run)]
        elif steps is not None:
            chosen = sorted(set(steps))
        else:
            latest = _latest(checkpoints)
            chosen = latest[-last:]
            if len(chosen) < last:
                best_too = " besides the best" if len(latest) < len(checkpoints.steps) else ""
                raise InputError(f"{folder} holds {len(chosen)} checkpoints{best_too}, not {last}")
        if missing := [step for step in chosen if step not in checkpoints.steps]:
            raise InputError(f"{folder} has no checkpoint of {_listed(missing)}, but of {_listed(checkpoints.steps)}")
        config = checkpoints.read_config(chosen[-1])
        release = read_release(find_release(config.model, weights=False))
        mean = mean_params((checkpoints.path(step) for step in chosen), release.config)
    export_run(mean, config, release, out, dtype=dtype, force=force)
    return chosen


def _latest(checkpoints: Checkpoints) -> list[int]:
    """The steps of the latest checkpoints, as many as a run keeps; an older one is there because it is the best."""
    every = checkpoints.read_config(checkpoints.steps[-1]).every
    return checkpoints.steps if every.keep_best is None else checkpoints.steps[-every.keep :]


def _best(checkpoints: Checkpoints, run: Path) -> int:
    """The step of the checkpoint that ``every.keep_best`` keeps."""
    steps = checkpoints.steps
    name = checkpoints.read_config(steps[-1]).every.keep_best
    if name is None:
        raise InputError(
            f"{run} was trained with every.keep_best=none, which says nothing of the best: --steps takes some of "
            f"{_listed(steps)}"
        )
    best = best_step(run, name, steps)
    if best is None:
        raise InputError(f"{run} has no checkpoint yet that was validated: --steps takes some of {_listed(steps)}")
    return best


def _listed(steps: Collection[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def mean_params(folders: Iterable[Path], config: ModelConfig) -> Params:
    """The float32 mean of the parameters in the folders of at least one checkpoint."""
    add = jax.jit(lambda total, params: jax.tree.map(jax.numpy.add, total, params), donate_argnums=0)
    first, *others = folders
    total = load_params(open_checkpoint(first), config)
    for folder in others:
        total = add(total, load_params(open_checkpoint(folder), config))
    return jax.tree.map(lambda x: x / (1 + len(others)), total)
