"""TPU chips and slices of them, without having any: what libtpu compiles for, and how fast it is on paper.

Peak rates, HBM and ICI bandwidth, and the shapes that numbers of cores stand for, are those of Google's pages on each
chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). The bandwidth of one ICI link, which is what it carries
of its nominal rate, and the v5p's rate for int8 are those of "How to Scale Your Model",
jax-ml.github.io/scaling-book/tpus. The HBM a program may use is what libtpu 0.0.42.1 says when it refuses one that is
too large: it keeps a part of the chip's memory for itself.
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
        name: as in a topology's name.
        kind: what JAX calls its devices.
        hbm_bytes: what a program may use of a device's memory.
        flops: bfloat16 FLOP/s at peak, of a device.
        int8: how many times as fast products of int8 are; 1 where no rate for them is stated.
        hbm_bandwidth: bytes/s, of a device.
        link_bandwidth: bytes/s that one ICI link carries in one direction.
        ring: an axis of the slice that is a multiple of this many chips is closed to a ring; of slices with three axes
            only if all of them are such multiples, since it is the faces of whole cubes that are linked.
        devices: JAX devices of a chip. Those of TPU7x are its two halves.
        config: libtpu's name for the way its cores are used; None for the default.
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
        """FLOP/s at peak of products of operands of so many bytes.

        Those of float32 are computed in ``Precision.HIGHEST``: on TPUs in 6 bfloat16 passes (``jax.lax.Precision``).
        """
        return {1: self.int8 * self.flops, 2: self.flops, 4: self.flops / 6}[itemsize]


CHIPS = {
    chip.name: chip
    for chip in (
        # By default libtpu makes a device of each of a v4's two cores; Cloud TPU runs them as one.
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
    "v5p": ("v5p", {**_CUBES, 8192: "16x16x16", 12288: "16x16x24"}),
    "v6e": ("v6e", _SQUARES),
}
"""{gcloud's name: (chip, {number in the name: the shape that it stands for})}. The number is of TensorCores, of which a
v4 and a v5p have two."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: so many chips along each axis.

    Attributes:
        chip: which.
        shape: chips along x, y (and z).
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """JAX devices."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Of each axis, whether its two ends are linked."""
        multiples = tuple(size % self.chip.ring == 0 for size in self.shape)
        return multiples if len(self.shape) == 2 else (all(multiples),) * len(self.shape)

    def ici_bandwidth(self, coordinates: Iterable[tuple[int, ...]]) -> float:
        """Bytes/s at which a device of a group takes in what the others of the group hold.

        Along an axis of the slice that the group reaches over, data comes from one side, or from both if the axis is
        closed to a ring and the group goes all around it. The two devices of one chip meet at the rate of a link.

        Args:
            coordinates: where the group's chips are.
        """
        links = 0
        # The devices of a flat slice have a third coordinate, too, which is 0.
        for size, ring, places in zip(self.shape, self.rings, zip(*coordinates, strict=True), strict=False):
            if (reached := len(set(places))) > 1:
                links += 2 if ring and reached == size else 1
        return self.chip.link_bandwidth * max(links, 1)


def parse_topology(text: str) -> Topology:
    """``v5e:4x4``, or ``v5litepod-16`` as gcloud names it, as a Topology.

    Raises:
        InputError: no such chip, or not a shape of two axes (v5e, v6e) or three; or no such accelerator type.
    """
    if "-" in text:
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
    """``v5litepod-16`` as ``v5e:4x4``."""
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


# Else libtpu waits for the metadata server of a TPU machine, complains that it is on none, and refuses a second process
# that only compiles. Which machine it takes this for changes nothing.
_LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, to compile for; there is nothing behind them.

    Raises:
        F2LLMError: libtpu is not installed.
        InputError: libtpu knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise F2LLMError("compiling for a TPU needs libtpu, which is not installed: pip install 'f2llm-jax[tpu]'")
    for name, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    # Up to four chips a host, or what there is of a smaller slice. Which chips share a host changes no program.
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
