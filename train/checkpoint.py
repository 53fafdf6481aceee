"""Checkpoints of a run, by Orbax: written while training continues, read onto any mesh.

``DIR/STEP`` holds ``params`` and ``optimizer`` (arrays), ``data`` (the loader's position) and ``config`` (JSON). It
appears when it is complete: what a kill leaves behind has another name, and is removed at the next start. It is not a
model folder, as it lacks the model's config and tokenizer: ``train.average`` makes a release of it, with parameters
read by ``convert.load``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from f2llm_jax.convert.orbax import PARAMS, quiet
from f2llm_jax.train.config import TrainConfig, from_dict, to_dict
from f2llm_jax.train.step import TrainState

OPTIMIZER, DATA, CONFIG = "optimizer", "data", "config"


class Checkpoints:
    """The checkpoints of a run; a context manager that waits for the last one to be written.

    Attributes:
        folder: the folder that holds them.
        best: the step of a checkpoint to keep besides the latest ones; None for none. All processes must set the same
            step. The previous best is removed by the next ``save``, unless it is one of the latest.
    """

    def __init__(self, folder: Path, *, keep: int = 0, read_only: bool = False):
        """Opens the folder, which may be new.

        Args:
            folder: the folder that holds them, on a disk that all processes see.
            keep: number of latest checkpoints to keep; 0 keeps all.
            read_only: change nothing; a run may be writing there.
        """
        self.folder = folder.absolute()
        self.best: int | None = None
        with quiet():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep or None), _Best(self)]),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with quiet():
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, which may still be being written; None if there is none."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, data: Any, config: TrainConfig) -> None:
        """Copies the state and starts writing it; the state may be donated to the next step at once.

        Args:
            step: number of updates made so far.
            state: the state after them.
            data: the loader's position as a JSON value; the same in all processes.
            config: the config of the run.
        """
        if step == self.latest:
            return
        items = {
            PARAMS: ocp.args.PyTreeSave(state.params),
            OPTIMIZER: ocp.args.PyTreeSave({"step": state.step, "state": state.opt_state}),
            DATA: ocp.args.JsonSave(data),
            CONFIG: ocp.args.JsonSave(to_dict(config)),
        }
        with quiet():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Waits until nothing is being written any more."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Any]:
        """Reads a checkpoint, whatever mesh it was saved from.

        Args:
            step: the step of the checkpoint.
            like: ``jax.ShapeDtypeStruct`` leaves with the shardings to read onto. Rows that this mesh adds to the
                vocabulary are zeros.

        Returns:
            The state, and the loader's position.
        """
        trees = {PARAMS: like.params, OPTIMIZER: {"step": like.step, "state": like.opt_state}}
        items: dict[str, Any] = {name: _restore_args(tree) for name, tree in trees.items()}
        with quiet():
            found = self._manager.restore(step, args=ocp.args.Composite(**items, **{DATA: ocp.args.JsonRestore()}))
        optimizer = found[OPTIMIZER]
        return TrainState(optimizer["step"], found[PARAMS], optimizer["state"]), found[DATA]

    def read_config(self, step: int) -> TrainConfig:
        """The config of the run that saved a checkpoint."""
        found = self._manager.restore(step, args=ocp.args.Composite(**{CONFIG: ocp.args.JsonRestore()}))
        return from_dict(found[CONFIG])


class _Best:
    """Preserves ``Checkpoints.best``. Orbax's BestN cannot be used: it needs the metrics at the time of saving."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self._checkpoints.best for checkpoint in checkpoints]


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    def args(x: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=False)

    return ocp.args.PyTreeRestore(item=tree, restore_args=jax.tree.map(args, tree))
