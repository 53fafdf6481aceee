"""Plans how a model would run on a TPU slice, without having one.

The real program is built with abstract, sharded arguments and compiled by the TPU compiler (libtpu) for a slice that is
not there. The compiler's memory figures are exact. The time is a roofline estimate: the longest of the times that
arithmetic, memory traffic and communication between chips would take at the rates of the data sheet. Real steps take
longer, but which of the three is the bottleneck, and what a mesh costs, carries over.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from f2llm_jax.errors import InputError
from f2llm_jax.planning.chips import Topology, topology_devices
from f2llm_jax.planning.counts import Axes, Estimate
from f2llm_jax.planning.hlo import Collective, Program, read_program
from f2llm_jax.planning.jobs import Job, divisors
from f2llm_jax.planning.programs import AbstractProgram
from f2llm_jax.sharding import make_mesh, padded_config, param_shardings

# Candidates to compile before giving up; a compilation takes from about ten seconds to two minutes.
TRIES = 4

# A larger tensor axis only adds communication: no model of the family needs more to fit.
MOST_TENSOR = 16


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        state: {"parameters": …, "optimizer": …, "teacher": …}, from their shapes.
        arguments: all arguments of the program, with the compiler's padding; includes ``state``.
        temporaries: activations, gradients, and weights gathered for use.
        results: results that do not overwrite donated arguments.
        code: the program itself.
        limit: the memory that a program may use.
        refused: bytes that the program would need, if the compiler refused it; None if it did not.
    """

    state: dict[str, int]
    arguments: int
    temporaries: int
    results: int
    code: int
    limit: int
    refused: int | None = None

    @property
    def total(self) -> int:
        return self.refused or self.arguments + self.temporaries + self.results + self.code

    @property
    def fits(self) -> bool:
        return self.refused is None and self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step on one device, counted twice: from the model's sizes, and in the compiled program.

    Attributes:
        flops: counted from the sizes, with only the causal half of attention.
        attention_flops: the part of ``flops`` in attention, without a last layer that has only a few queries.
        program_flops: matrix products in the program, with loops multiplied by their trip counts; no Pallas kernels.
        program_flops_once: the same with every loop body counted once.
        compiler_flops: from the compiler's ``cost_analysis``, which counts every loop body once.
        hbm_bytes: HBM traffic estimated from the sizes.
        program_hbm_bytes: HBM traffic of the program's instructions.
        ici_bytes: bytes received from other devices in the program's collectives.
        kernels: {custom call: how often it runs}.
        unknown_loops: loops of the program whose trip count could not be read; they count once.
    """

    flops: float
    attention_flops: float
    program_flops: float
    program_flops_once: float
    compiler_flops: float
    hbm_bytes: float
    program_hbm_bytes: float
    ici_bytes: float
    kernels: dict[str, int]
    unknown_loops: list[str]

    @property
    def kernel_flops(self) -> float:
        """The part of ``flops`` that is computed in Pallas kernels, which the program's count cannot see."""
        return self.attention_flops if "tpu_custom_call" in self.kernels else 0.0

    @property
    def flops_ratio(self) -> float:
        """FLOPs counted in the program over FLOPs from the sizes, outside of Pallas kernels."""
        return self.program_flops / (self.flops - self.kernel_flops)

    @property
    def compiler_ratio(self) -> float:
        """FLOPs counted in the program over FLOPs from the compiler, both with loop bodies counted once."""
        return self.program_flops_once / self.compiler_flops

    @property
    def hbm_ratio(self) -> float:
        return self.program_hbm_bytes / self.hbm_bytes


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A compilation: the mesh, the tokens computed at a time, and the memory that the program needs."""

    mesh: Axes
    batch_tokens: int
    memory_bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a slice would run a job. All bytes and seconds are per device and step.

    Attributes:
        job, topology: what was asked for.
        mesh: the mesh asked for, or the best found.
        batch_tokens: tokens computed at a time, on all devices together.
        texts: texts per step, on all devices together.
        memory: see ``Memory``.
        work: see ``Work``; None if there is no program to count in, as it does not fit or libtpu does not dump it.
        collectives: the collectives of the program.
        seconds: estimates, {"compute": …, "hbm": …, "ici": …}.
        tried: all compilations that were tried.
    """

    job: Job
    topology: Topology
    mesh: Axes
    batch_tokens: int
    texts: int
    memory: Memory
    work: Work | None
    collectives: Sequence[Collective]
    seconds: dict[str, float]
    tried: Sequence[Attempt]

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def bound(self) -> str:
        """Which of compute, hbm and ici takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """The roofline: an estimate of the least time that a step takes."""
        return self.seconds[self.bound]

    @property
    def texts_per_second(self) -> float:
        return self.texts / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.texts_per_second * self.job.length


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, the rows computed at a time on it, and the estimated cost."""

    mesh: Axes
    rows_at_once: int
    estimate: Estimate


def make_plan(
    job: Job, topology: Topology, mesh: Axes | None = None, *, on_try: Callable[[Candidate], None] | None = None
) -> Plan:
    """Compiles the job for a slice.

    Without a mesh, all meshes that the sizes divide over are ranked by the estimates of ``counts`` (those expected to
    fit first, by the sum of the three times), and at most ``TRIES`` are compiled in that order until one fits.

    Args:
        job: the job.
        topology: the slice.
        mesh: the mesh; None for the best.
        on_try: called before every compilation.

    Returns:
        The plan of the first candidate that fits; if none does, of the one that needs the least memory.

    Raises:
        F2LLMError: libtpu is not installed.
        InputError: libtpu does not know the slice, the mesh has another size, or the job does not divide over it.
    """
    devices = topology_devices(topology)
    if mesh is not None:
        _check_divides(job, mesh, make_mesh(*mesh, devices=devices))
    plans: list[Plan] = []
    for candidate in _ranked(job, topology, mesh, devices)[:TRIES]:
        if on_try is not None:
            on_try(candidate)
        plan = _compile(job, topology, candidate, devices)
        plans.append(plan)
        if plan.fits:
            break
    tried = [Attempt(plan.mesh, plan.batch_tokens, plan.memory.total, plan.fits) for plan in plans]
    best = min(plans, key=lambda plan: (not plan.fits, plan.memory.total))
    return dataclasses.replace(best, tried=tried)


def _ranked(job: Job, topology: Topology, mesh: Axes | None, devices: list[Any]) -> list[Candidate]:
    """Meshes and batches to try, the most promising first."""
    limit = topology.chip.hbm_bytes
    candidates = [
        Candidate(axes, rows, job.estimate(axes, rows))
        for axes in ([mesh] if mesh else _meshes(job, topology.size, devices))
        for rows in job.rows_at_once(axes)
    ]
    if not candidates:
        raise InputError(job.nothing_divides(topology))

    def cost(candidate: Candidate) -> tuple[bool, float]:
        memory = candidate.estimate.memory_bytes
        fits = memory < 0.85 * limit
        return not fits, sum(candidate.estimate.seconds(topology, job.itemsize)) if fits else memory

    return sorted(candidates, key=cost)


def _meshes(job: Job, size: int, devices: list[Any]) -> Iterator[Axes]:
    """All meshes that the sizes divide over."""
    for tensor in divisors(size):
        if tensor > MOST_TENSOR:
            continue
        for fsdp in divisors(size // tensor):
            axes = Axes(size // tensor // fsdp, fsdp, tensor)
            try:
                _check_divides(job, axes, make_mesh(*axes, devices=devices))
            except InputError:
                continue
            yield axes


def _check_divides(job: Job, axes: Axes, mesh: jax.sharding.Mesh) -> None:
    """An InputError with the numbers if parameters or batch do not divide over the mesh."""
    for config in job.models:
        param_shardings(padded_config(config, mesh), mesh)
    if not list(job.rows_at_once(axes)):
        raise InputError(job.nothing_divides(f"data·fsdp={axes.batch_parts}"))


def _compile(job: Job, topology: Topology, candidate: Candidate, devices: list[Any]) -> Plan:
    mesh = make_mesh(*candidate.mesh, devices=devices)
    program = job.program(mesh, candidate.rows_at_once)
    limit = int(topology.chip.hbm_bytes)
    plan = Plan(
        job=job,
        topology=topology,
        mesh=candidate.mesh,
        batch_tokens=candidate.rows_at_once * job.row_length,
        texts=job.texts(candidate.rows_at_once),
        memory=Memory(program.state_bytes(), 0, 0, 0, 0, limit),
        work=None,
        collectives=(),
        seconds=dict(zip(("compute", "hbm", "ici"), candidate.estimate.seconds(topology, job.itemsize), strict=True)),
        tried=(),
    )
    compiled, text = compile_program(program)
    if isinstance(compiled, int):
        return dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, refused=compiled))
    stats = compiled.memory_analysis()
    memory = dataclasses.replace(
        plan.memory,
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    plan = dataclasses.replace(plan, memory=memory)
    if text is None:
        return plan
    counted = read_program(text)
    work = _work(candidate.estimate, counted, compiled)
    return dataclasses.replace(
        plan,
        work=work,
        collectives=counted.collectives,
        seconds={
            "compute": candidate.estimate.flops.seconds(topology.chip, job.itemsize),
            "hbm": work.program_hbm_bytes / topology.chip.hbm_bandwidth,
            "ici": sum(collective_seconds(x, mesh, topology) for x in counted.collectives),
        },
    )


def _work(estimate: Estimate, counted: Program, compiled: Any) -> Work:
    return Work(
        flops=estimate.flops.total,
        attention_flops=estimate.flops.attention,
        program_flops=counted.flops,
        program_flops_once=counted.flops_once,
        compiler_flops=compiled.cost_analysis()["flops"],
        hbm_bytes=estimate.hbm_bytes,
        program_hbm_bytes=counted.hbm_bytes,
        ici_bytes=sum(x.sent_bytes for x in counted.collectives),
        kernels=counted.kernels,
        unknown_loops=counted.unknown_loops,
    )


def compile_program(program: AbstractProgram) -> tuple[Any, str | None]:
    """The compiled program, or the bytes that it would need if the compiler refuses it; and its optimised HLO.

    The HLO is the text that libtpu dumps, or None if it dumps none. ``compiled.as_text()`` fails on programs for v5p
    and v6e, as jaxlib 0.10.2 rejects their async-update instructions.
    """
    from jax.errors import JaxRuntimeError

    # Programs compiled for devices that are not there can be written to JAX's cache, but not read back.
    settings: Any = jax.config  # its attributes are created at run time
    cached = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with tempfile.TemporaryDirectory(prefix="f2llm_plan_") as folder:
            compiled = program.lower().compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            dumped = sorted(Path(folder).glob("*.jit_*.after_codegen.txt"))
            return compiled, dumped[-1].read_text() if dumped else None
    except JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return needed, None
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def needed_bytes(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's message that it does not fit; None for any other message."""
    found = re.search(r"HBM.*?\(([\d.]+)([KMGT]?)\) exceeds available HBM|Used ([\d.]+)([KMGT]?) of .* hbm", message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def collective_seconds(collective: Collective, mesh: jax.sharding.Mesh, topology: Topology) -> float:
    """Estimated seconds: the bytes that a device receives, at the bandwidth of the links to the rest of its group."""
    places = [tuple(device.coords) for device in mesh.devices.flat]
    slowest = min(topology.ici_bandwidth([places[i] for i in group]) for group in collective.groups)
    return collective.sent_bytes / slowest
