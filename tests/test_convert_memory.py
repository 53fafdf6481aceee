"""The memory of a conversion does not grow with the model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import write_random_release
from releases import TINY

from f2llm_jax.convert.table import tensor_table

MEASURED = """
import sys
from f2llm_jax.convert.conversion import convert_release

source, flax, back = sys.argv[1:]
convert_release(source, flax, to="flax")
convert_release(flax, back, to="hf")
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_peak_does_not_depend_on_the_number_of_layers(tmp_path: Path) -> None:
    """Both ways, 4 layers and 32: the peaks differ by less than one stacked tensor."""
    peaks = []
    for layers in (4, 32):
        config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers)
        folder = tmp_path / str(layers)
        release = write_random_release(folder / "r", config)
        command = [sys.executable, "-c", MEASURED, str(release), str(folder / "flax"), str(folder / "back")]
        peaks.append(1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    stacked = 2 * max(tensor.size for tensor in tensor_table(config) if tensor.stacked)
    assert stacked == 32 * 256 * 1024 * 2
    assert peaks[1] - peaks[0] < stacked
