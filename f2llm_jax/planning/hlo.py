"""Counts what a compiled program does from its HLO text: products, memory traffic and collectives, loops included.

The compiler's own ``cost_analysis`` counts the body of a loop once, whatever its trip count, and does not report the
traffic of collectives. Here every instruction counts as often as it runs. A Pallas kernel is one opaque instruction:
its operands and results count, its arithmetic does not.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_NUMBER = re.compile(r"\d+")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")

# Opcodes that neither read nor write memory; most only name values of other instructions.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


class Shape(NamedTuple):
    """An array of a program: its dimensions, its bytes, and whether it is in HBM or in memory on the core."""

    dims: tuple[int, ...]
    nbytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of ``name=value``, up to the next comma outside of braces, brackets and parentheses."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        if found is None:
            return None
        depth, start = 0, found.end()
        for end in range(start, len(self.rest)):
            character = self.rest[end]
            depth += (character in "{[(") - (character in "}])")
            if depth < 0 or (depth == 0 and character == ","):
                return self.rest[start:end].strip()
        return self.rest[start:].strip()


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
        kind: one of ``COLLECTIVES``.
        dims: dimensions of the array that is gathered, reduced or exchanged: the larger of operand and result.
        nbytes: bytes of that array.
        groups: partition ids [groups, members] of the devices that communicate.
        times: how often it runs.
        source: the operation in the model that it comes from.
    """

    kind: str
    dims: tuple[int, ...]
    nbytes: int
    groups: np.ndarray
    times: int
    source: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device receives (and sends) in all runs together, with the usual ring algorithms."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return float(self.nbytes * self.times)
        return (2 if self.kind == "all-reduce" else 1) * (n - 1) / n * self.nbytes * self.times


@dataclasses.dataclass
class Program:
    """What one device does in a run of a program.

    Attributes:
        flops: FLOPs of its matrix products, 2 per multiply-add, outside of Pallas kernels.
        flops_once: the same with every loop body counted once, as in the compiler's ``cost_analysis``.
        hbm_bytes: bytes read from and written to HBM.
        collectives: the collectives in order of appearance.
        kernels: {name of a custom call: how often it runs}; Pallas kernels are ``tpu_custom_call``.
        unknown_loops: loops whose trip count could not be read; they count once.
    """

    flops: float = 0.0
    flops_once: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)


def read_program(text: str) -> Program:
    """Analyses a compiled module.

    Args:
        text: the optimised HLO, as returned by ``compiled.as_text()``.

    Raises:
        ValueError: there is no entry computation.
    """
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self.program = Program()
        self.seen: set[tuple[str | None, str, Shape]] = set()

    def read(self) -> Program:
        self._visit(self.entry, 1)
        return self.program

    def _visit(self, computation: str, times: int) -> None:
        """Counts an unfused computation that runs ``times`` times."""
        instructions = self.computations[computation]
        for instruction in instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = self._trips(instruction, instructions)
                if trips is None:
                    self.program.unknown_loops.append(instruction.name)
                self._visit(_called(instruction, "body"), times * (1 if trips is None else trips))
            elif opcode == "call":
                self._visit(_called(instruction, "to_apply"), times)
            elif opcode == "conditional":
                for branch in _branches(instruction):
                    self._visit(branch, times)
            else:
                self._count(instruction, instructions, times)
                self.program.hbm_bytes += times * self._traffic(instruction, instructions)

    def _count(
        self, instruction: Instruction, instructions: dict[str, Instruction], times: int, is_fused: bool = False
    ) -> None:
        """Counts the products, collectives and kernels of an instruction, including those fused into it."""
        opcode = instruction.opcode
        if opcode in ("fusion", "async-start"):
            fused = self.computations[_called(instruction, "calls")]
            scatters = "reduce-scatter" in instruction.name or "reduce-scatter" in _called(instruction, "calls")
            for inner in fused.values():
                if scatters and inner.opcode == "all-reduce":  # how the TPU compiler writes a reduce-scatter
                    inner = inner._replace(opcode="reduce-scatter")
                self._count(inner, fused, times, is_fused=True)
        elif opcode in ("dot", "convolution"):
            lhs, rhs = (instructions[name].shapes[0].dims for name in instruction.operands[:2])
            flops = (dot_flops if opcode == "dot" else convolution_flops)(instruction, lhs, rhs)
            self.program.flops += times * flops
            self.program.flops_once += flops
        elif opcode.removesuffix("-start") in COLLECTIVES:
            self._collective(instruction, instructions, times, is_fused)
        elif opcode == "custom-call":
            target = (instruction.attribute("custom_call_target") or "").strip('"')
            self.program.kernels[target] = self.program.kernels.get(target, 0) + times

    def _collective(
        self, instruction: Instruction, instructions: dict[str, Instruction], times: int, is_fused: bool
    ) -> None:
        operands = [instructions[name].shapes[0] for name in instruction.operands]
        if len(operands) > 1:  # several arrays in one collective
            shape = Shape((), sum(x.nbytes for x in operands), False)
            results = Shape((), sum(x.nbytes for x in instruction.shapes), False)
            shape = max(shape, results, key=lambda x: x.nbytes)
        else:
            shape = max((*operands, *instruction.shapes), key=lambda x: x.nbytes)
        # A collective that overlaps with other work appears in each of the fusions that it overlaps with.
        key = (instruction.attribute("channel_id"), instruction.opcode, shape)
        if is_fused and key in self.seen:
            return
        self.seen.add(key)
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        self.program.collectives.append(
            Collective(
                kind=instruction.opcode.removesuffix("-start"),
                dims=shape.dims,
                nbytes=shape.nbytes,
                groups=_groups(instruction),
                times=times,
                source=source[1] if source else instruction.name,
            )
        )

    def _traffic(self, instruction: Instruction, instructions: dict[str, Instruction]) -> float:
        """Bytes that an instruction reads from and writes to HBM."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        operands = [instructions[name].shapes for name in instruction.operands]
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        if opcode == "async-start":
            root = next(x for x in self.computations[_called(instruction, "calls")].values() if x.is_root)
            return _hbm(root.shapes) + sum(map(_hbm, operands))
        results = instruction.shapes
        if opcode.endswith("-start"):  # (source, destination, …) or (destination, source, …): each counts once
            size = min((x.nbytes for x in results[:2]), default=0)
            return sum(size for x in results[:2] if x.in_hbm)
        if opcode == "dynamic-slice":
            return sum(results[0].nbytes for x in (results[0], operands[0][0]) if x.in_hbm)
        if opcode == "dynamic-update-slice":
            return sum(operands[1][0].nbytes for x in (results[0], operands[1][0]) if x.in_hbm)
        return _hbm(results) + sum(map(_hbm, operands))

    def _fusion_traffic(self, fusion: Instruction, operands: Sequence[Sequence[Shape]]) -> float:
        """HBM bytes of a fusion's operands and results; if it reads or writes only slices, only these count.

        Values that are only passed through to an overlapping collective do not count.
        """
        fused = self.computations[_called(fusion, "calls")]
        users: dict[str, list[Instruction]] = {}
        for instruction in fused.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        total = 0.0
        for instruction in fused.values():
            if instruction.opcode == "parameter":
                shapes = operands[int(instruction.rest)]
                total += sum(self._read(instruction.name, x, users, fused) for x in shapes if x.in_hbm)
        root = next(x for x in fused.values() if x.is_root)
        parts = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for part, shape in zip(parts, fusion.shapes, strict=False):
            if shape.in_hbm and part.opcode != "parameter" and part.opcode not in COLLECTIVES:
                updates = part.opcode == "dynamic-update-slice"
                total += fused[part.operands[1]].shapes[0].nbytes if updates else shape.nbytes
        return total

    def _read(
        self, name: str, shape: Shape, users: dict[str, list[Instruction]], fused: dict[str, Instruction]
    ) -> float:
        """Bytes that a fusion reads from one of its operands."""
        total = 0.0
        for user in users.get(name, ()):
            if user.opcode == "tuple" or user.opcode in COLLECTIVES:
                continue
            if user.opcode == "bitcast":
                total += self._read(user.name, shape, users, fused)
            elif user.opcode == "dynamic-slice" and user.operands[0] == name:
                total += user.shapes[0].nbytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            else:
                return shape.nbytes
        return min(total, shape.nbytes)

    def _trips(self, loop: Instruction, instructions: dict[str, Instruction]) -> int | None:
        """Trip count of a loop: from the initial value of its counter to the constant in its condition."""
        known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations[_called(loop, "condition")]
        compare = next((x for x in condition.values() if x.is_root), None)
        if compare is None or compare.attribute("direction") != "LT":
            return None
        counter, limit = (condition[name] for name in compare.operands)
        index = counter.attribute("index")
        if limit.opcode != "constant" or index is None:
            return None
        initial = instructions[loop.operands[0]]
        while initial.opcode in ("copy", "bitcast"):
            initial = instructions[initial.operands[0]]
        first = instructions[initial.operands[int(index)]] if initial.opcode == "tuple" else None
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = instructions[first.operands[0]]
        if first is None or first.opcode != "constant":
            return None
        return max(0, int(limit.rest) - int(first.rest))


def dot_flops(instruction: Instruction, lhs: Sequence[int], rhs: Sequence[int]) -> float:
    """FLOPs of a dot, 2 per multiply-add: elements of the result times the contracted sizes."""
    contracted = _numbers(instruction.attribute("lhs_contracting_dims") or "")
    return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(lhs[i] for i in contracted)


def convolution_flops(instruction: Instruction, lhs: Sequence[int], rhs: Sequence[int]) -> float:
    """FLOPs of a convolution, 2 per multiply-add, without those on padding.

    The TPU compiler writes matrix products as convolutions; a batch of products becomes a window that is dilated and
    padded so that it covers one entry at a time. So positions are counted one by one, as in XLA's HloCostAnalysis.
    """
    labels = instruction.attribute("dim_labels") or ""
    lhs_labels, rhs_labels, _ = re.split(r"_|->", labels)
    window = instruction.attribute("window") or ""
    options = dict(part.split("=") for part in window.strip("{}").split() if "=" in part)
    flops = 2.0 * lhs[lhs_labels.index("b")] * rhs[rhs_labels.index("o")] * rhs[rhs_labels.index("i")]
    flops /= int(instruction.attribute("batch_group_count") or 1)
    sizes = _sizes(options.get("size", ""))

    def each(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * len(sizes)

    for axis, (size, stride, pad, lhs_dilate, rhs_dilate) in enumerate(
        zip(
            sizes,
            each("stride", "1"),
            each("pad", "0_0"),
            each("lhs_dilate", "1"),
            each("rhs_dilate", "1"),
            strict=True,
        )
    ):
        length = lhs[lhs_labels.index(str(axis))]
        low, high = map(int, pad.split("_"))
        flops *= _valid_positions(length, size, int(stride), low, high, int(lhs_dilate), int(rhs_dilate))
    return flops


@functools.cache
def _valid_positions(
    length: int, window: int, stride: int, low: int, high: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs (output, window position) along an axis that fall on an entry of lhs, not on padding or a dilation gap."""
    dilated = (length - 1) * lhs_dilate + 1
    outputs = (dilated + low + high - ((window - 1) * rhs_dilate + 1)) // stride + 1
    position = np.arange(outputs)[:, None] * stride + np.arange(window)[None, :] * rhs_dilate - low
    return int(np.sum((position >= 0) & (position < dilated) & (position % lhs_dilate == 0)))


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: instruction}}, and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line[:1] not in (" ", "}", ""):
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("  ") and current is not None:
            instruction = _parse_instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the program has no ENTRY")
    return computations, entry


def _parse_instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line).strip()
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    opcode, inside, rest = rest[:begin], rest[begin + 1 : end], rest[end + 1 :].lstrip(", ")
    if opcode in ("constant", "parameter"):  # the parentheses hold a value or a number, not operands
        inside, rest = "", inside
    return Instruction(name.lstrip("%"), _shapes(shapes), opcode, tuple(_NAME.findall(inside)), rest, is_root)


def _closing(text: str, begin: int) -> int:
    """The position at which the parenthesis at ``begin`` closes."""
    depth = 0
    for index in range(begin, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


@functools.cache
def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*match) for match in _SHAPE.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    sizes = _numbers(dims)
    bits = 8 if dtype == "pred" else next(iter(_numbers(dtype)), 0)
    return Shape(sizes, math.prod(sizes) * bits // 8, "S(" not in layout)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(text)))


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split("x")] if text else []


def _hbm(shapes: Sequence[Shape]) -> int:
    return sum(x.nbytes for x in shapes if x.in_hbm)


def _called(instruction: Instruction, attribute: str) -> str:
    value = instruction.attribute(attribute)
    assert value is not None, (instruction.name, attribute)
    return value.lstrip("%")


def _branches(instruction: Instruction) -> Iterator[str]:
    for attribute in ("true_computation", "false_computation", "branch_computations"):
        yield from _NAME.findall(instruction.attribute(attribute) or "")


def _groups(instruction: Instruction) -> np.ndarray:
    """Partition ids of the devices that communicate, [groups, members], from any of HLO's notations."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs is not None:
        return np.array(_numbers(pairs)).reshape(-1, 2)
    text = instruction.attribute("replica_groups") or ""
    if text.startswith("mesh["):  # mesh['a'=8,'b'=2] {'a'}
        axes = dict(re.findall(r"'([^']+)'=(\d+)", text))
        chosen = re.findall(r"'([^']+)'", text[text.index("]") :])
        ids = np.arange(math.prod(map(int, axes.values()))).reshape([int(size) for size in axes.values()])
        names = list(axes)
        order = [i for i, name in enumerate(names) if name not in chosen] + [names.index(name) for name in chosen]
        return ids.transpose(order).reshape(-1, math.prod(int(axes[name]) for name in chosen))
    if "<=" in text:  # [groups,members]<=[dims]T(permutation)
        shape, dims, permutation = (*re.split(r"<=|T", text), "")[:3]
        ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
        return (ids.transpose(_numbers(permutation)) if permutation else ids).reshape(_numbers(shape))
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(groups) if groups else np.zeros((1, 1), int)


def total_by_kind(collectives: Sequence[Collective]) -> dict[str, tuple[int, float]]:
    """{kind: (number of runs, bytes that a device receives)}."""
    ordered = sorted(collectives, key=lambda x: x.kind)
    grouped = {kind: list(group) for kind, group in itertools.groupby(ordered, key=lambda x: x.kind)}
    return {kind: (sum(x.times for x in xs), sum(x.sent_bytes for x in xs)) for kind, xs in grouped.items()}
