"""Commands run as processes of their own, and the memory they had."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def run(command: list[str]) -> int:
    """Runs a command, without what it prints; returns the most memory that it had resident, in bytes.

    Looked up in /proc until it ends. What ``getrusage`` says of a process begins at what its parent had, and of the
    children at the largest of all so far.
    """
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak


def _high_water(pid: int) -> int:
    """The most memory that a running process has had resident so far, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
