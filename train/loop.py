"""The training loop: from a config and batches to checkpoints, scalars and a release."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from f2llm_jax.compilation import use_compilation_cache
from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.export import export_release
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.convert.table import tensor_table
from f2llm_jax.errors import F2LLMError, InputError, ReleaseError, warn
from f2llm_jax.files import local_path, take_lock
from f2llm_jax.model import Params, count_parameters
from f2llm_jax.pipeline import IN_FLIGHT
from f2llm_jax.release import Release, find_release, read_release
from f2llm_jax.sharding import padded_config, replicated
from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train.checkpoint import Checkpoints
from f2llm_jax.train.config import TrainConfig, check_values, differences
from f2llm_jax.train.loader import Loader
from f2llm_jax.train.meter import LOSSES, Meter, Step, Work
from f2llm_jax.train.optimizer import make_optimizer, make_schedule
from f2llm_jax.train.placement import (
    abstract_state,
    check_batch,
    global_batch,
    make_train_mesh,
    shardings_of,
)
from f2llm_jax.train.preemption import Preemption
from f2llm_jax.train.scalars import Scalars
from f2llm_jax.train.source import with_query_prompt
from f2llm_jax.train.step import Teacher, TrainState, train_step
from f2llm_jax.train.teacher import check_width, find_teacher
from f2llm_jax.train.validation import make_evaluate, validate

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# Otherwise, the TPU compiler turns a large product and its reduce-scatter into a loop of small products and permutes: a
# step of the 8B on fsdp=16 then has 1.2 times the FLOPs and twice the memory traffic.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class TrainingError(F2LLMError):
    """Training cannot continue; the message names the step, the dataset and the last good checkpoint."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: number of updates made.
        total: number of updates planned; fewer were made if a SIGTERM was received.
        checkpoint: the last checkpoint.
        finished: whether all updates were made, and the last validation completed.
    """

    step: int
    total: int
    checkpoint: Path
    finished: bool


def train(
    config: TrainConfig,
    loader: Loader,
    out: str | Path,
    *,
    resume: bool = False,
    export: str | Path | None = None,
    show_progress: bool = False,
    on_scalars: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Outcome:
    """Trains a model.

    Losses are read two steps late, so that the device never waits for the host. On SIGTERM, a checkpoint is saved and
    training stops, also during a validation, which a resumed run repeats. The first process logs, at level INFO of the
    logger ``f2llm_jax``, what it starts with, a line every ``every.log`` steps, and the averages of each validation.

    Args:
        config: the config of the run. If its ``query_prompt`` is empty, checkpoints and the export have the prompt that
            the loader's data was prepared with; a warning says so if the export's prompt is not that of the queries.
        loader: the batches, from ``train.source.open_loader``.
        out: the run's folder, for ``checkpoints/``, ``tensorboard/`` and ``scalars.jsonl``; visible to all processes.
        resume: continue from the last checkpoint in ``out``, if there is one.
        export: a folder to write the trained model to, as a release.
        show_progress: show a progress bar on standard error.
        on_scalars: called in the first process with a step and the values just written for it to ``scalars.jsonl``, by
            name; for example, to pass them on to Weights & Biases. A resumed run repeats the steps after its last
            checkpoint.

    Raises:
        TrainingError: a loss or a gradient is not finite.
        InputError: ``out`` holds a run and ``resume`` is off, or a run with other data, with a model of other sizes,
            with more steps or still in progress; ``export`` exists, or one of the two is a URL; or the config does not
            fit the model or the devices.
    """
    from tqdm import tqdm

    check_values(config)
    config = with_query_prompt(config, loader.settings)
    out = local_path(out)
    if export is not None and local_path(export).exists():
        raise InputError(f"{export} exists")
    use_compilation_cache()
    mesh = make_train_mesh(config.mesh)
    check_batch(config, mesh)
    release = read_release(find_release(config.model))
    check_dims(config, release.config)
    teacher = load_teacher(config, release, mesh)
    model = padded_config(release.config, mesh)

    total = min(config.max_steps or loader.steps, loader.steps)
    optimizer, schedule = make_optimizer(config.optim, total), make_schedule(config.optim, total)
    like = abstract_state(model, optimizer, config.params_dtype, mesh)
    update = make_update(config, model, teacher, optimizer, like)
    evaluate = make_evaluate(config, model, mesh)

    with _claimed(out), jax.set_mesh(mesh), Checkpoints(out / "checkpoints", keep=config.every.keep) as checkpoints:
        step = _first_step(config, release, checkpoints, total, resume=resume)
        _log(_introduction(config, release.config, mesh, step, total))
        if step:
            state, position = checkpoints.restore(step, like)
            loader.set_state(position)
        else:
            state = initial_state(config, release, optimizer, like, mesh)
        distilled = teacher is not None or config.teacher_states is not None
        meter = Meter(release.config, None if teacher is None else teacher.config, distilled=distilled)
        bar = tqdm(total=total, initial=step, unit="step", disable=not show_progress)
        with Scalars(out, step, on_scalars) as scalars, Preemption() as preemption, bar:
            under_way = _UnderWay(config, total, schedule, checkpoints, meter, scalars, bar)
            validations = _validations(config.every.validation, total) - ({step} if scalars.validated else set())

            def save() -> None:
                under_way.settle()  # a state is saved only if all losses up to it are finite
                with meter.paused():
                    checkpoints.save(step, state, loader.get_state(), config)

            def note_best() -> None:
                if config.every.keep_best is not None:
                    checkpoints.best = scalars.best_step(config.every.keep_best, checkpoints.steps)

            def write_validation() -> None:
                under_way.settle()
                with meter.paused():
                    values = validate(
                        state.params, loader, evaluate, mesh, stop=preemption.reached, show_progress=show_progress
                    )
                if values is not None:
                    scalars.write(step, values)
                    validations.remove(step)
                    note_best()
                    _log(f"step {step}/{total}: validation: {_averages(values)}")

            note_best()
            if step in validations:  # an earlier start was stopped before or during it
                write_validation()
            items, first = iter(loader), step + 1
            while step < total and not preemption.reached():
                item = next(items)
                batch = global_batch(item.batch, mesh)
                begin = time.perf_counter()
                state, metrics = update(state, batch, teacher and teacher.params, in_batch=item.task == "retrieval")
                step += 1
                if step == first:
                    _log(f"step {step}/{total}: compiled in {time.perf_counter() - begin:.1f} s")
                has_negatives, work = item.batch.has_negatives, Work.of(item.batch)
                under_way.add(Step(step, item.dataset, item.task, has_negatives, work, metrics))
                validates = step in validations and step < total
                if config.every.checkpoint and (step % config.every.checkpoint == 0 or validates):
                    save()  # also before a validation, since a kill during it would lose the steps
                if validates:
                    write_validation()
            save()
            checkpoints.wait()
            if step == total and step in validations:
                write_validation()
        finished = step == total and step not in validations
        if finished and export is not None:
            export_run(state.params, config, release, export)
        return Outcome(step, total, checkpoints.path(step), finished)


def _log(message: str) -> None:
    """Logs a line, in the first process only."""
    if jax.process_index() == 0:
        logger.info(message)


def _introduction(config: TrainConfig, model: ModelConfig, mesh: Mesh, step: int, total: int) -> str:
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    from_step = f", going on from step {step:,}" if 0 < step < total else ", which are all done" if step else ""
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}, processes: {jax.process_count()}"
    return (
        f"training {config.model}, {count_parameters(model):,} parameters, on {sizes} ({devices}): {total:,} steps of "
        f"{config.data.batch_size:,} queries{from_step}"
    )


def _averages(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name.startswith("Avg/"))


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder: the first process locks it, and tells the others whether it could."""
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(take_lock(out / ".lock", out))
                except OSError as caught:  # a file system without locks, as on some clusters
                    warn(f"{caught}: nothing keeps a second run out of {out}")
            except Exception as caught:
                error = caught
        if multihost_utils.broadcast_one_to_all(np.array(error is not None)):
            raise error or InputError(f"{out} cannot be written; the first process says why")
        yield


class _UnderWay:
    """The dispatched steps: the device always has its next one while the host processes the results of an older one."""

    def __init__(
        self,
        config: TrainConfig,
        total: int,
        schedule: optax.Schedule,
        checkpoints: Checkpoints,
        meter: Meter,
        scalars: Scalars,
        bar: tqdm,
    ):
        self._config, self._total, self._schedule = config, total, schedule
        self._checkpoints, self._meter, self._scalars, self._bar = checkpoints, meter, scalars, bar
        self._steps: deque[Step] = deque()

    def add(self, step: Step) -> None:
        self._steps.append(step)
        self.settle(IN_FLIGHT)

    def settle(self, left: int = 0) -> None:
        """Waits until all but ``left`` steps are done, and processes their metrics."""
        while len(self._steps) > left:
            done = self._steps.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
            check_finite(done, metrics, self._checkpoints)
            self._meter.add(done, metrics)
            rate = f"loss {metrics['loss']:.3f}, {self._meter.examples_per_second:,.0f} examples/s"
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update()
            if self._config.every.log and done.number % self._config.every.log == 0:
                losses = self._meter.losses()
                values = {"lr": float(self._schedule(done.number - 1)), **self._meter.scalars()}
                self._scalars.write(done.number, values)
                _log(self._line(done.number, losses, values))

    def _line(self, step: int, losses: dict[str, float], values: dict[str, float]) -> str:
        loss, *terms = (f"{name} {value:.4f}" for name, value in losses.items())
        rate = values["throughput/examples_per_second"]
        left = self._bar.format_interval((self._total - step) * self._config.data.batch_size / rate)
        return (
            f"step {step}/{self._total}: {loss} ({', '.join(terms)}), grad_norm {values['grad_norm']:.3g}, "
            f"lr {values['lr']:.3g}, {rate:,.1f} examples/s, {values['throughput/tokens_per_second']:,.0f} tokens/s, "
            f"ETA {left}"
        )


def _validations(interval: int, total: int) -> set[int]:
    """The steps after which to validate: every ``interval`` steps, and the last; none if it is 0."""
    return {total, *range(interval, total, interval)} if interval else set()


def check_dims(config: TrainConfig, model: ModelConfig) -> None:
    """Raises an InputError if a Matryoshka size is out of the model's range."""
    if not all(1 <= dim <= model.hidden_size for dim in config.loss.mrl_dims):
        mend = ",".join(map(str, model.matryoshka_dims[:-1]))
        raise InputError(
            f"loss.mrl_dims={','.join(map(str, config.loss.mrl_dims))} must be within 1..{model.hidden_size}, the "
            f"hidden size of model={config.model}: --set loss.mrl_dims={mend}"
        )


def load_teacher(config: TrainConfig, student: Release, mesh: Mesh) -> Teacher | None:
    """The teacher, in the dtype that it computes in; None if there is none or its states are read from disk.

    Raises:
        InputError: the student is wider than its teacher, or their tokenizers differ.
    """
    if config.teacher is None or config.teacher_states is not None:
        return None
    release = read_release(find_teacher(config.teacher, "trains without a teacher"))
    check_width(student.config.hidden_size, release.config.hidden_size, f"the states of {config.teacher}")
    own, its = (Tokenizer.from_release(path) for path in (student.path, release.path))
    if (own.eos_id, own.vocabulary) != (its.eos_id, its.vocabulary):
        raise InputError(
            f"{config.model} (EOS: token {own.eos_id}) and its teacher {config.teacher} (EOS: token {its.eos_id}) do "
            "not share tokens and ids: they have different tokenizers"
        )
    params = load_params(open_checkpoint(release.path), release.config, dtype=config.compute.dtype, mesh=mesh)
    return Teacher(params, padded_config(release.config, mesh))


def make_update(
    config: TrainConfig,
    model: ModelConfig,
    teacher: Teacher | None,
    optimizer: optax.GradientTransformation,
    like: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """``train_step``, compiled: the state is donated and keeps its shardings, the metrics are on every device."""
    step = functools.partial(
        train_step,
        config=model,
        loss=config.loss,
        compute=config.compute,
        optimizer=optimizer,
        teacher_config=teacher and teacher.config,
    )
    shardings = shardings_of(like)
    out_shardings = (shardings, replicated(shardings.step.mesh))
    on_tpu = shardings.step.mesh.devices.flat[0].platform == "tpu"
    return jax.jit(
        step,
        static_argnames="in_batch",
        donate_argnums=0,
        out_shardings=out_shardings,
        compiler_options=_TPU_OPTIONS if on_tpu else None,
    )


def initial_state(
    config: TrainConfig,
    release: Release,
    optimizer: optax.GradientTransformation,
    like: TrainState,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, with the release's weights."""
    params = load_params(open_checkpoint(release.path), release.config, dtype=config.params_dtype, mesh=mesh)
    shardings = shardings_of(like)
    init = jax.jit(
        lambda params: (jnp.int32(0), optimizer.init(params)), out_shardings=(shardings.step, shardings.opt_state)
    )
    step, opt_state = init(params)
    return TrainState(step, params, opt_state)


def check_finite(step: Step, metrics: Mapping[str, float], checkpoints: Checkpoints) -> None:
    """Raises a TrainingError if a loss or the gradient is not finite.

    A checkpoint counts as good if a step from it succeeded: that of the step right before may contain the cause.
    """
    wrong = [f"{name} is {metrics[name]}" for name in (*LOSSES, "grad_norm") if not math.isfinite(metrics[name])]
    if not wrong:
        return
    checkpoints.wait()
    good = [number for number in checkpoints.steps if number < step.number - 1]
    advice = f"the last good checkpoint is {checkpoints.path(good[-1])}" if good else "there is no good checkpoint yet"
    raise TrainingError(f"step {step.number}, a batch of {step.dataset}: {', '.join(wrong)}; {advice}")


def export_run(
    params: Params,
    config: TrainConfig,
    release: Release,
    out: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Writes trained parameters as a release, by default in the dtype of the release that training started from.

    It states the Matryoshka sizes of the training or, without any, those of the release that training started from.
    """
    model = release.config
    if config.loss.mrl_dims:
        model = dataclasses.replace(model, matryoshka_dimensions=(*config.loss.mrl_dims, model.hidden_size))
    prompts = None if config.query_prompt == "" else {"query": config.query_prompt or "", "document": ""}
    return export_release(
        params,
        model,
        out,
        like=release.path,
        dtype=dtype or release.config.dtype,
        prompts=prompts,
        force=force,
    )


def _first_step(config: TrainConfig, release: Release, checkpoints: Checkpoints, total: int, *, resume: bool) -> int:
    """The step to resume from; 0 for a new run."""
    step = checkpoints.latest
    if step is None:
        return 0
    held = f"{checkpoints.folder} holds a run up to step {step}"
    if not resume:
        raise InputError(f"{held}; --resume auto goes on from there")
    if step > total:
        raise InputError(
            f"{held}; this config ends at step {total} (max_steps={config.max_steps}, epochs={config.epochs}, "
            f"data.batch_size={config.data.batch_size}, data.path={config.data.path})"
        )
    if changed := differences(checkpoints.read_config(step), config):
        warnings.warn(f"going on from step {step} with another config: {', '.join(changed)}", stacklevel=3)
    checkpoint = open_checkpoint(checkpoints.path(step))
    try:  # Orbax would truncate or pad arrays of other sizes
        checkpoint.check(tensor_table(release.config))
    except ReleaseError as error:
        raise InputError(
            f"model={config.model} is not of the size of the run in {checkpoints.folder}: {error}"
        ) from None
    return step
