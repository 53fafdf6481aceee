"""Long work in units that run in parallel and outlive their process: each is a folder that appears when it is complete.

A unit that an earlier process completed is not done again, so a killed command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
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

from f2llm_jax.errors import F2LLMError, InputError
from f2llm_jax.tokens import Tokenizer

_PLAN = "plan.json"
_POLL_SECONDS = 0.3


class Worker:
    """What a unit works with.

    Attributes:
        tokenizer: of the release.
        advance: to be called with the number of rows done, now and then.
    """

    def __init__(self, tokenizer: Tokenizer, advance: Callable[[int], Any]):
        self.tokenizer = tokenizer
        self.advance = advance


class Unit(Protocol):
    """A part of the work.

    Attributes:
        folder: what it makes.
        size: rows of work, for the progress bar.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def size(self) -> int: ...

    def run(self, worker: Worker) -> None: ...


def run_units(units: Sequence[Unit], tokenizer: Path, *, workers: int, label: str, show_progress: bool) -> None:
    """Runs the units that are not complete, the largest first.

    Args:
        units: the units; with several workers they are pickled.
        tokenizer: the release's folder.
        workers: processes; with 1 the work is done in this one.
        label, show_progress: of the bar, which counts rows.

    Raises:
        F2LLMError: what a unit raised, or a worker was killed.
    """
    todo = sorted((unit for unit in units if not unit.folder.exists()), key=lambda unit: -unit.size)
    total = sum(unit.size for unit in units)
    with tqdm(
        total=total,
        initial=total - sum(unit.size for unit in todo),
        desc=label,
        unit="row",
        unit_scale=True,
        disable=not show_progress,
    ) as bar:
        workers = min(workers, len(todo))
        if workers <= 1:
            worker = Worker(Tokenizer.from_release(tokenizer), bar.update)
            for unit in todo:
                unit.run(worker)
        else:
            _run_in_processes(todo, tokenizer, workers, bar)


def _run_in_processes(units: list[Unit], tokenizer: Path, workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")  # forking a process that has threads can hang
    done = context.Value("q")
    threads = max(len(os.sched_getaffinity(0)) // workers, 1)
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
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer; by default every worker would take all cores
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def advance(rows: int) -> None:
        with done.get_lock():
            done.value += rows

    _worker = Worker(Tokenizer.from_release(tokenizer), advance)


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next unit for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_unit(unit: Unit) -> None:
    unit.run(_worker)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes its place, on disk for good, when the block ends well, else vanishes."""
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


def sync(folder: Path) -> None:
    """Brings a folder and all it holds to disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Workplace:
    """A folder beside the output for work on it, claimed for this process.

    It is ``OUT.incomplete``: a plan, the units, and ``result``, which becomes the output. Work goes on only under an
    equal plan.

    Attributes:
        folder: the workplace.
        result: a folder in it, to be filled, then to become the output.
    """

    def __init__(self, out: Path, plan: dict[str, Any], *, marker: str, force: bool):
        """Claims it.

        Args:
            out: where the output is to appear.
            plan: JSON values that say what is made of what.
            marker: a file that every output of this kind has; a folder without it is not replaced.
            force: replace an output, and drop unfinished work under another plan.

        Raises:
            InputError: ``out`` exists, there is unfinished work under another plan, or it is being made right now.
        """
        self.out = out
        self.folder = out.with_name(out.name + ".incomplete")
        self.result = self.folder / "result"
        _refuse_existing(out, marker, force)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder / ".lock", out)
        try:
            self._resume_or_start(json.loads(json.dumps(plan)), force)
        except BaseException:
            self.close()
            raise

    def _resume_or_start(self, plan: dict[str, Any], force: bool) -> None:
        file = self.folder / _PLAN
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if found != plan:
            differing = [key for key in plan if found is not None and found.get(key) != plan[key]]
            if differing and not force:
                raise InputError(
                    f"{self.folder} holds unfinished work with another {', '.join(differing)}: repeat that command to "
                    "finish it, or remove the folder or give --force to start over"
                )
            self._clear()
            file.with_suffix(".new").write_text(json.dumps(plan, indent=1), encoding="utf-8")
            file.with_suffix(".new").rename(file)
        for left in self.folder.rglob(".*/"):  # of units that were cut off
            shutil.rmtree(left, ignore_errors=True)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def commit(self) -> None:
        """Puts the result in its place, and clears away the work."""
        sync(self.result)
        (self.folder / _PLAN).unlink()  # what is left after this is no work to go on with
        if self.out.exists():
            self.out.rename(self.folder / "replaced")
        self.result.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Leaves nothing behind but what stands at ``out``."""
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Lets go of it, so that another process can go on."""
        self._lock.close()


def _refuse_existing(out: Path, marker: str, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"{out} exists and is no folder")
    if not force:
        raise InputError(f"{out} exists; --force replaces it")
    if any(out.iterdir()) and not (out / marker).exists():
        raise InputError(f"{out} exists and has no {marker}, so no such command made it; it is not replaced")


def _take_lock(file: Path, out: Path) -> Any:
    stream = file.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise InputError(f"{out} is being written by another process right now") from None
    return stream
