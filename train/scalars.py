"""The scalars of a run, for TensorBoard and as JSON Lines."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from f2llm_jax.files import new_file


class Scalars:
    """Writes ``tensorboard/`` and ``scalars.jsonl`` in a run's folder, from the first process only.

    Scalars that an earlier start of the run wrote for steps after the one being resumed from are removed.

    Args:
        folder: the folder of the run.
        step: number of updates made before.
        on_scalars: called in the first process with every step and the values that were written for it.

    Attributes:
        validated: whether an earlier start already ran the validation of ``step``; the same in every process.
    """

    def __init__(self, folder: Path, step: int, on_scalars: Callable[[int, Mapping[str, float]], None] | None = None):
        self._folder, self._on_scalars = folder, on_scalars
        self._close = contextlib.ExitStack()
        self._first = jax.process_index() == 0
        validated = False
        if self._first:
            from tensorboardX import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            self._close.callback(self._events.close)
            file, kept = folder / "scalars.jsonl", [line for line in read_scalars(folder) if line["step"] <= step]
            with new_file(file) as stream:
                stream.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self._lines = self._close.enter_context(file.open("a", encoding="utf-8"))
            # Only lines of training have a learning rate.
            validated = any(line["step"] == step and "lr" not in line for line in kept)
        self.validated = bool(multihost_utils.broadcast_one_to_all(np.array(validated)))

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes values by name; they are flushed to their files before this returns."""
        if not self._first:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        if self._on_scalars is not None:
            self._on_scalars(step, values)

    def best_step(self, name: str, steps: Collection[int]) -> int | None:
        """``best_step`` of what was written so far. All processes must call it, and get the same result."""
        best = best_step(self._folder, name, steps) if self._first else None
        found = int(multihost_utils.broadcast_one_to_all(np.array(-1 if best is None else best)))
        return None if found < 0 else found


def best_step(folder: Path, name: str, steps: Collection[int]) -> int | None:
    """The step with the best value of a validation scalar.

    Args:
        folder: the folder of the run.
        name: the name of the scalar, as ``DATASET/valid_loss``; the highest value is the best, or the lowest if "loss"
            is in the part after the last slash.
        steps: the steps to choose from.

    Returns:
        The first of the best steps; None if none has a finite value.
    """
    lines = [line for line in read_scalars(folder) if line["step"] in steps and math.isfinite(line.get(name, math.nan))]
    values = {int(line["step"]): line[name] for line in lines}
    return (min if "loss" in name.rpartition("/")[2] else max)(values, key=values.__getitem__, default=None)


def read_scalars(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's ``scalars.jsonl``, without a last line that was cut short by a kill.

    Other damaged lines, as a machine failure may leave them, are skipped with a warning.
    """
    file = folder / "scalars.jsonl"
    scalars = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else [], start=1):
        try:
            scalars.append(json.loads(line))
        except ValueError:
            warnings.warn(f"{file}: line {number} is damaged, and left out", stacklevel=2)
    return scalars
