"""Scalars of a run, for TensorBoard and as JSON lines."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType

import jax


class Scalars:
    """Writes ``tensorboard/`` and ``scalars.jsonl`` in a run's folder, from the first process only.

    What an earlier start of the run has written after the step that this one goes on from is taken back.

    Args:
        folder: of the run.
        step: updates made before.
    """

    def __init__(self, folder: Path, step: int):
        self._close = contextlib.ExitStack()
        self._first = jax.process_index() == 0
        if not self._first:
            return
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self._close.callback(self._events.close)
        self._lines = self._close.enter_context(_cut(folder / "scalars.jsonl", step).open("a", encoding="utf-8"))

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes values by name; they are on disk when it returns."""
        if not self._first:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()


def read_scalars(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's ``scalars.jsonl``; a last one that was cut off by a kill is left out."""
    file = folder / "scalars.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _cut(file: Path, step: int) -> Path:
    """Takes lines of later steps out of the file."""
    kept = [values for values in read_scalars(file.parent) if values["step"] <= step]
    file.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    return file
