"""TPU chips and slices, without having any: the targets that libtpu compiles for, and their data-sheet speeds.

Peak rates, HBM and ICI bandwidth, and the shapes that belong to numbers of cores are from Google's pages on each chip
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). The effective bandwidth of one ICI link (less than its
nominal rate) and the v5p's int8 rate are from "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus. The HBM
that a program may use is what libtpu 0.0.42.1 states when it refuses a program that is too large: it reserves a part of
the chip's memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from f2llm_jax.errors import F2LLMError, InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        name: as in topology names.
        kind: JAX's ``device_kind``.
        hbm_bytes: memory of a device that a program may use.
        flops: peak bfloat16 FLOP/s of a device.
        int8: speed of int8 products relative to bfloat16; 1 if no int8 rate is published.
        hbm_bandwidth: bytes/s of a device.
        link_bandwidth: bytes/s of one ICI link in one direction.
        ring: an axis of the slice whose size is a multiple of this is a ring; with three axes only if all of them are
            such multiples, as wrap-around links join the faces of whole cubes.
        devices: JAX devices per chip. A TPU7x has two, its halves.
        config: libtpu's name for how the cores of a chip are used; None for the default.
        example: a topology.
    """

    name: str
    kind: str
    hbm_bytes: float
    flops: float
    int8: int
    hbm_bandwidth: float
    link_bandwidth: float
    ring: int
    devices: int
    config: str | None
    example: str

    def rate(self, itemsize: int) -> float:
        """Peak FLOP/s of products whose operands have ``itemsize`` bytes.

        float32 products are computed with ``Precision.HIGHEST``: on TPUs in 6 bfloat16 passes (``jax.lax.Precision``).
        """
        return {1: self.int8 * self.flops, 2: self.flops, 4: self.flops / 6}[itemsize]


CHIPS = {
    chip.name: chip
    for chip in (
        # By default libtpu makes each of a v4's two cores a device; Cloud TPU runs both cores as one device.
        Chip("v4", "TPU v4", 30.75 * GIB, 275e12, 1, 1228e9, 4.5e10, 4, 1, "megacore", "v4:2x2x4"),
        Chip("v5e", "TPU v5 lite", 15.75 * GIB, 197e12, 2, 819e9, 4.5e10, 16, 1, None, "v5e:4x4"),
        Chip("v5p", "TPU v5", 95.73 * GIB, 459e12, 2, 2765e9, 9e10, 4, 1, None, "v5p:2x2x4"),
        Chip("v6e", "TPU v6 lite", 31.24 * GIB, 918e12, 2, 1638e9, 9e10, 16, 1, None, "v6e:4x4"),
        Chip("tpu7x", "TPU7x", 94.74 * GIB, 2307e12 / 2, 1, 7380e9 / 2, 9e10, 4, 2, None, "tpu7x:2x2x4"),
    )
}

_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"},
    **{1024: "8x8x8", 2048: "8x8x16", 4096: "8x16x16"},
}

ACCELERATOR_TYPES = {
    "v4": ("v4", _CUBES),
    "v5litepod": ("v5e", _SQUARES),
    "v5e": ("v5e", _SQUARES),
    "v5p": ("v5p", {**_CUBES, 8192: "16x16x16", 12288: "16x16x24"}),
    "v6e": ("v6e", _SQUARES),
}
"""{gcloud's name, and v5e for v5litepod: (chip, {number in the name: shape})}. The number counts TensorCores, of which
a v4 and a v5p have two per chip."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips.

    Attributes:
        chip: the kind of chip.
        shape: numbers of chips along x, y (and z).
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each axis, whether its two ends are linked."""
        multiples = tuple(size % self.chip.ring == 0 for size in self.shape)
        return multiples if len(self.shape) == 2 else (all(multiples),) * len(self.shape)

    def ici_bandwidth(self, coordinates: Iterable[tuple[int, ...]]) -> float:
        """Bytes/s at which a device of a group receives data from the rest of the group.

        Along each axis of the slice that the group extends over, data arrives over one link, or over two if the axis is
        a ring and the group spans all of it. The two devices of one chip communicate at the rate of one link.

        Args:
            coordinates: the coordinates of the group's chips.
        """
        links = 0
        # Devices of a two-dimensional slice also have a third coordinate, which is 0.
        for size, ring, places in zip(self.shape, self.rings, zip(*coordinates, strict=True), strict=False):
            if (reached := len(set(places))) > 1:
                links += 2 if ring and reached == size else 1
        return self.chip.link_bandwidth * max(links, 1)


def parse_topology(text: str) -> Topology:
    """Parses ``v5e:4x4``, or ``v5litepod-16`` as gcloud names it.

    Raises:
        InputError: the chip or accelerator type is unknown, or the shape does not have two axes (v5e, v6e) or three.
    """
    if "-" in text and ":" not in text:
        text = _shape_of(text)
    name, _, shape = text.partition(":")
    examples = ", ".join(chip.example for chip in CHIPS.values())
    if name not in CHIPS:
        raise InputError(
            f"--topology {text}: no chip {name!r} is known; there are {', '.join(CHIPS)}, as in {examples}"
        )
    chip = CHIPS[name]
    axes = chip.example.count("x", len(name)) + 1
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise InputError(f"--topology {text}: the shape of a {name} slice is {axes} numbers, as in {chip.example}")
    return Topology(chip, tuple(map(int, shape.split("x"))))


def _shape_of(accelerator_type: str) -> str:
    """Translates ``v5litepod-16`` to ``v5e:4x4``."""
    kind, _, number = accelerator_type.partition("-")
    if kind not in ACCELERATOR_TYPES:
        raise InputError(
            f"--topology {accelerator_type}: no accelerator type {kind}-N is known; there are "
            f"{', '.join(f'{name}-N' for name in ACCELERATOR_TYPES)}, and shapes, as in {CHIPS['v5e'].example}"
        )
    name, shapes = ACCELERATOR_TYPES[kind]
    if number not in map(str, shapes):
        raise InputError(
            f"--topology {accelerator_type}: the shape of {number!r} is not known, only of {kind}-"
            f"{', '.join(map(str, shapes))}; others are written as in {CHIPS[name].example}"
        )
    return f"{name}:{shapes[int(number)]}"


# Without these, libtpu waits for the metadata server of a TPU machine, complains that this is not one, and refuses a
# second process that only compiles. The machine that it is told makes no difference.
_LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(topology: Topology) -> list[Any]:
    """Compile-only devices of a slice.

    Raises:
        F2LLMError: libtpu is not installed.
        InputError: libtpu does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise F2LLMError("compiling for a TPU needs libtpu, which is not installed: pip install 'f2llm-jax[tpu]'")
    for name, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    # Up to four chips per host, fewer in a smaller slice. Which chips share a host does not affect programs.
    x, y = topology.shape[:2]
    options: dict[str, Any] = {"chips_per_host_bounds": [min(x, 2), min(y, 2), 1]}
    if topology.chip.config:
        options["chip_config_name"] = topology.chip.config
    try:
        description = topologies.get_topology_desc(topology.name, "tpu", **options)
    except JaxRuntimeError as error:
        raise InputError(f"--topology {topology.name}: {str(error).partition(':')[2].strip()}") from None
    devices = list(description.devices)
    assert len(devices) == topology.size, (topology, len(devices))
    return devices
