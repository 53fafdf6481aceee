"""Runs commands as processes of their own, and measures their memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def run(command: list[str]) -> int:
    """Runs a command, discarding its standard output; returns its peak resident memory in bytes.

    The peak is read from /proc until the command ends. ``getrusage`` starts a process at the peak of its parent, and
    reports for children the largest of all so far.
    """
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak


def _high_water(pid: int) -> int:
    """The peak resident memory of a running process so far, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
