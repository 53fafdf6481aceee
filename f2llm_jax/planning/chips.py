"""TPU chips and slices of them, without having any: what libtpu compiles for, and how fast it is on paper.

Peak rates, HBM and ICI bandwidth are those of Google's pages on each chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p,
v6e, tpu7x); the bandwidth of one ICI link is that of "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus,
which is what a link carries of its nominal rate. The HBM a program may use is what libtpu 0.0.42.1 says when it refuses
one that is too large: it keeps a part of the chip's memory for itself.
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
        hbm_bandwidth: bytes/s, of a device.
        link_bandwidth: bytes/s that one ICI link carries in one direction.
        ring: an axis of the slice that is a multiple of this many chips is closed to a ring.
        devices: JAX devices of a chip. Those of TPU7x are its two halves.
        config: libtpu's name for the way its cores are used; None for the default.
        example: a topology.
    """

    name: str
    kind: str
    hbm_bytes: float
    flops: float
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
        return self.flops / 6 if itemsize == 4 else self.flops


CHIPS = {
    chip.name: chip
    for chip in (
        # By default libtpu makes a device of each of a v4's two cores; Cloud TPU runs them as one.
        Chip("v4", "TPU v4", 30.75 * GIB, 275e12, 1228e9, 4.5e10, 4, 1, "megacore", "v4:2x2x4"),
        Chip("v5e", "TPU v5 lite", 15.75 * GIB, 197e12, 819e9, 4.5e10, 16, 1, None, "v5e:4x4"),
        Chip("v5p", "TPU v5", 95.73 * GIB, 459e12, 2765e9, 9e10, 4, 1, None, "v5p:2x2x4"),
        Chip("v6e", "TPU v6 lite", 31.24 * GIB, 918e12, 1638e9, 9e10, 16, 1, None, "v6e:4x4"),
        Chip("tpu7x", "TPU7x", 94.74 * GIB, 2307e12 / 2, 7380e9 / 2, 9e10, 4, 2, None, "tpu7x:2x2x4"),
    )
}


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

    def ici_bandwidth(self, coordinates: Iterable[tuple[int, ...]]) -> float:
        """Bytes/s at which a device of a group takes in what the others of the group hold.

        Along an axis of the slice that the group reaches over, data comes from one side, or from both if the axis is
        closed to a ring and the group goes all around it. The two devices of one chip meet at the rate of a link.

        Args:
            coordinates: where the group's chips are.
        """
        links = 0
        for size, places in zip(self.shape, zip(*coordinates, strict=True), strict=False):
            if (reached := len(set(places))) > 1:
                links += 2 if reached == size > 2 and size % self.chip.ring == 0 else 1
        return self.chip.link_bandwidth * max(links, 1)


def parse_topology(text: str) -> Topology:
    """``v5e:4x4`` as a Topology.

    Raises:
        InputError: no such chip, or not a shape of two axes (v5e, v6e) or three.
    """
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
