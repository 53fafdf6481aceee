"""Long work in units that run in parallel; the result of each is a folder that appears once it is complete.

Units that an earlier process completed are not repeated, so a killed command resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from f2llm_jax.convert.staging import sync
from f2llm_jax.errors import F2LLMError
from f2llm_jax.tokens import Tokenizer

_POLL_SECONDS = 0.3


def usable_cores() -> int:
    """The number of cores that this process may use; on systems that do not tell, such as macOS, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """What is available to a unit while it runs.

    Attributes:
        tokenizer: the release's tokenizer.
        advance: to be called now and then with the number of rows (or whatever ``run_units`` counts) newly done.
    """

    def __init__(self, tokenizer: Tokenizer, advance: Callable[[int], Any]):
        self.tokenizer = tokenizer
        self.advance = advance


class Unit(Protocol):
    """A part of the work.

    Attributes:
        folder: its result.
        size: number of rows, or of whatever ``run_units`` counts, for the progress bar.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def size(self) -> int: ...

    def run(self, worker: Worker) -> None: ...


def run_units(
    units: Sequence[Unit], tokenizer: Path, *, workers: int, label: str, show_progress: bool, unit: str = "row"
) -> None:
    """Runs the units that are not complete, largest first.

    Args:
        units: the units; with several workers they are pickled.
        tokenizer: the release folder.
        workers: number of processes; with 1, the work is done in this one.
        label, show_progress: the label of the progress bar, and whether to show it.
        unit: what ``size`` and ``advance`` count.

    Raises:
        F2LLMError: a unit raised it, or a worker was killed.
    """
    todo = sorted((part for part in units if not part.folder.exists()), key=lambda part: -part.size)
    total = sum(part.size for part in units)
    with tqdm(
        total=total,
        initial=total - sum(part.size for part in todo),
        desc=label,
        unit=unit,
        unit_scale=True,
        disable=not show_progress,
    ) as bar:
        workers = min(workers, len(todo))
        if workers <= 1:
            worker = Worker(Tokenizer.from_release(tokenizer), bar.update)
            for part in todo:
                part.run(worker)
        else:
            _run_in_processes(todo, tokenizer, workers, bar)


def _run_in_processes(units: list[Unit], tokenizer: Path, workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")  # forking a process that has threads can hang
    done = context.Value("q")
    threads = max(usable_cores() // workers, 1)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, done, threads))
    try:
        futures = [pool.submit(_run_unit, unit) for unit in units]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, _POLL_SECONDS, FIRST_EXCEPTION)
            with done.get_lock():
                bar.update(done.value)
                done.value = 0
            for future in finished:
                future.result()
    except BrokenProcessPool:
        raise F2LLMError(
            "a worker was killed, perhaps for want of memory: repeat the command, with fewer --workers; "
            "it goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Worker


def _start_worker(tokenizer: Path, done: Any, threads: int) -> None:
    global _worker
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # for the tokenizer, which by default uses all cores
    threading.Thread(target=exit_with_parent, daemon=True).start()

    def advance(rows: int) -> None:
        with done.get_lock():
            done.value += rows

    _worker = Worker(Tokenizer.from_release(tokenizer), advance)


def exit_with_parent() -> None:
    """Exits once the parent process is gone; a worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_unit(unit: Unit) -> None:
    unit.run(_worker)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder: moved to ``folder`` and synced to disk if the block succeeds, else deleted."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
