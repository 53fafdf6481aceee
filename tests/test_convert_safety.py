"""Outputs appear whole or not at all: kills, full disks, second processes, folders that are in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conversions import Sums, tensor_sums, write_random_release
from deadly import convert_and_die
from releases import write_release

import f2llm_jax
from f2llm_jax.configs.models import MODELS
from f2llm_jax.convert import conversion, staging
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.convert.staging import Staging, Workplace
from f2llm_jax.errors import F2LLMError, InputError, ReleaseError

# A server that has JAX imported forks the processes to be killed.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["f2llm_jax.convert.conversion"])

# Where SIGKILL strikes: when this function is called for the nth time.
MOMENTS = {
    "before anything": ("f2llm_jax.convert.staging.Staging._start", 1),
    "before the plan": ("f2llm_jax.convert.staging.new_file", 1),
    "while files are created": ("f2llm_jax.convert.orbax.write_text", 5),
    "at the first tensor": ("f2llm_jax.convert.conversion.write_part", 1),
    "in the middle": ("f2llm_jax.convert.conversion.write_part", 20),
    "when a tensor is noted": ("f2llm_jax.convert.staging.Staging.finish", 30),
    "while the files around are written": ("f2llm_jax.convert.release_files.write_text", 2),
    "before the rename": ("f2llm_jax.convert.staging.Staging.commit", 1),
    "after the rename": ("f2llm_jax.convert.staging.Staging.discard", 1),
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "r")


@pytest.fixture(scope="module")
def sums(release: Path) -> Sums:
    return tensor_sums(release)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(release: Path, sums: Sums, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    killed(release, out, "flax", *MOMENTS[moment])
    if moment == "after the rename":
        assert same(out, sums, tmp_path)
        out = convert_release(release, out, to="flax", force=True)
    else:
        assert not out.exists()
        assert says_incomplete(tmp_path / "out.incomplete")
        out = convert_release(release, out, to="flax")
    assert same(out, sums, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "back"}


def test_all_is_on_disk_before_it_is_in_its_place_and_then_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace(tmp_path / "out", {}, marker="config.json")
    (place.folder / "inside").mkdir()
    (place.folder / "inside" / "file").touch()
    made = {path.stat().st_ino for path in (place.folder, *place.folder.rglob("*"))}
    done: list[object] = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", lambda path, target: (done.append("rename"), rename(path, target)))
    place.commit()
    assert set(done[:3]) == made and len(made) == 3
    assert done[3:] == ["rename", tmp_path.stat().st_ino]


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_while_replacing(release: Path, sums: Sums, tmp_path: Path, renames: int) -> None:
    """The old folder is there or gone, never half of it, and the new one appears on the next try."""
    out = convert_release(release, tmp_path / "out", to="hf", dtype="bfloat16")
    killed(release, out, "hf", "pathlib.Path.rename", renames)
    assert out.exists() == (renames == 1)
    convert_release(release, out, to="hf", force=renames == 1)
    assert tensor_sums(out) == sums
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """From outside, again and again, while a larger model is converted."""
    release = write_random_release(tmp_path / "r", MODELS["80M"])
    expected, out, rng = tensor_sums(release), tmp_path / "out", random.Random(0)
    progress = []
    for attempt in range(6):
        process = PROCESSES.Process(target=convert_and_die, args=(release, out, "hf"))
        process.start()
        while process.is_alive() and not (tmp_path / "out.incomplete").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1) * attempt)
        process.kill()
        process.join()
        if out.exists():
            break
        if (tmp_path / "out.incomplete").exists():
            progress.append(len(finished(tmp_path / "out.incomplete")))
    assert progress and progress == sorted(progress)
    convert_release(release, out, to="hf", force=out.exists())
    assert tensor_sums(out) == expected


def test_finished_tensors_are_not_copied_again(
    release: Path, sums: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(20, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert_release(release, tmp_path / "out", to="hf")
    monkeypatch.undo()
    done = finished(tmp_path / "out.incomplete")
    assert len(done) >= 19
    copied, original = [], conversion._copy_tensor
    monkeypatch.setattr(conversion, "_copy_tensor", lambda *args: (copied.append(args[1]), original(*args)))
    out = convert_release(release, tmp_path / "out", to="hf")
    assert sorted([*copied, *done]) == sorted(sums)
    assert tensor_sums(out) == sums


def test_resumed_more_than_once(release: Path, sums: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process goes on with all that went before, also after a note that was cut off."""
    for tensors in (5, 10):
        interrupt_after(tensors, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            convert_release(release, tmp_path / "out", to="hf")
        monkeypatch.undo()
        assert len(finished(tmp_path / "out.incomplete")) == tensors
        with (tmp_path / "out.incomplete" / "finished").open("a") as journal:
            journal.write("layers.0.mlp.up_proj.we")
    assert tensor_sums(convert_release(release, tmp_path / "out", to="hf")) == sums


def test_other_arguments_do_not_resume(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(20, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert_release(release, tmp_path / "out", to="hf")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"unfinished work with another dtype: repeat that command .* or give --force"):
        convert_release(release, tmp_path / "out", to="hf", dtype="bfloat16")
    with pytest.raises(InputError, match="unfinished work with another to"):
        convert_release(release, tmp_path / "out", to="flax")
    assert finished(tmp_path / "out.incomplete")
    os.utime(release / "model.safetensors")
    with pytest.raises(InputError, match="unfinished work with another source files"):
        convert_release(release, tmp_path / "out", to="hf")
    out = convert_release(release, tmp_path / "out", to="hf", dtype="bfloat16", force=True)
    assert {dtype for dtype, _, _ in tensor_sums(out).values()} == {"torch.bfloat16"}


def test_nothing_is_trusted_after_a_restart_of_the_machine(
    release: Path, sums: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(20, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert_release(release, tmp_path / "out", to="hf")
    monkeypatch.undo()
    monkeypatch.setattr(staging, "_boot_id", lambda: "another")
    for file in (tmp_path / "out.incomplete" / "release").glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)  # what a machine that lost its power may leave of it
    assert tensor_sums(convert_release(release, tmp_path / "out", to="hf")) == sums


def test_unfinished_folders_do_not_load(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to in ("hf", "flax"):
        interrupt_after(30, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            convert_release(release, tmp_path / to, to=to)
        monkeypatch.undo()
        for folder in (tmp_path / f"{to}.incomplete", tmp_path / f"{to}.incomplete" / "release"):
            with pytest.raises(ReleaseError, match=r"config.json does not exist"):
                f2llm_jax.load(folder)


def test_existing_output_is_refused(release: Path, sums: Sums, tmp_path: Path) -> None:
    out = convert_release(release, tmp_path / "out", to="flax")
    with pytest.raises(InputError, match="out exists; --force replaces it"):
        convert_release(release, out, to="hf")
    assert not list(out.glob("*.safetensors"))
    assert tensor_sums(convert_release(release, out, to="hf", force=True)) == sums
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_output_that_appears_meanwhile_is_refused(release: Path, sums: Sums, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = r"out exists; --force .*; what was made is whole, in .*out\.incomplete"
    with pytest.raises(InputError, match=message), staging.staged(out, {"what": "work"}, needed=0) as work:
        (work.folder / "config.json").write_text("{}")
        work.finish("config.json")
        shutil.copytree(release, out)
    assert tensor_sums(out) == sums
    with staging.staged(out, {"what": "work"}, needed=0, force=True) as work:
        assert work.finished == {"config.json"}
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("content", ["", '{"what":', "[]"])
def test_damaged_plan_is_no_plan(tmp_path: Path, content: str) -> None:
    """What a machine that lost its power may leave of it."""
    begun = Staging(tmp_path / "out", {"what": "work"})
    begun.finish("tensor")
    begun.close()
    (begun.home / "plan.json").write_text(content)
    again = Staging(tmp_path / "out", {"what": "work"})
    assert not again.finished
    again.discard()


def test_force_replaces_model_folders_only(release: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is no model folder"):
        convert_release(release, precious, to="flax", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is no folder"):
        convert_release(release, tmp_path / "file", to="flax", force=True)
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(InputError, match="is no folder"):
        convert_release(release, tmp_path / "link", to="flax", force=True)
    (tmp_path / "new.incomplete").mkdir()
    (tmp_path / "new.incomplete" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds thesis.tex"):
        convert_release(release, tmp_path / "new", to="flax", force=True)
    with pytest.raises(InputError, match="name a folder"):
        convert_release(release, "/", to="flax", force=True)
    with pytest.raises(InputError, match="gs://bucket/m is a URL; mount the bucket, and give a folder"):
        convert_release(release, "gs://bucket/m", to="flax", force=True)
    assert (precious / "thesis.tex").exists()


@pytest.mark.parametrize("below", ["", "flax"])
def test_model_is_not_converted_onto_itself(release: Path, tmp_path: Path, below: str) -> None:
    """Nor onto a folder that it lies in, be it by way of a link, nor beside one that is made there first."""
    out = Path(shutil.copytree(release, tmp_path / "out.incomplete"))
    source = Path(shutil.copytree(release, out / below, dirs_exist_ok=True))
    (tmp_path / "link").symlink_to(source)
    for name in (source, tmp_path / "link"):
        for place in (out, str(out).removesuffix(".incomplete")):
            with pytest.raises(InputError, match=r"is, or holds, the model .* and would replace it"):
                convert_release(name, place, to="hf", force=True)
    assert tensor_sums(source)


def test_one_process_at_a_time(release: Path, tmp_path: Path) -> None:
    other = Staging(tmp_path / "out", {"what": "something"})
    with pytest.raises(InputError, match="is being written by another process"):
        convert_release(release, tmp_path / "out", to="flax", force=True)
    other.discard()
    convert_release(release, tmp_path / "out", to="flax")


def test_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot be locked: No locks available: .*\.lock"):
        Staging(tmp_path / "out", {"what": "something"})


def test_too_small_a_disk_is_told_before(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_free", lambda out: 1000)
    needed = sum(value.nbytes for value in conversion.open_checkpoint(release).tensors.values())
    with pytest.raises(F2LLMError, match=rf"\({needed} bytes\), its disk has .* \(1000 bytes\)"):
        convert_release(release, tmp_path / "out", to="flax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up(
    release: Path, sums: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original, calls = conversion.write_part, 0

    def write(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 25:
            raise OSError(code, os.strerror(code))
        original(*args)

    monkeypatch.setattr(conversion, "write_part", write)
    with pytest.raises(F2LLMError, match=r"disk of .* is full: .* GB are needed .* GB are free now; .* goes on"):
        convert_release(release, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert tensor_sums(convert_release(release, tmp_path / "out", to="hf")) == sums


def test_really_full_disk(tmp_path: Path) -> None:
    """A file system of its own, where the machine lets us mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with pytest.raises(F2LLMError, match=r"needs 0\.00 GB .* its disk has"):
            convert_release(write_release(tmp_path / "r"), mount / "out", to="flax")
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_source_that_changes_meanwhile(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is cut while it is read."""
    source = write_release(tmp_path / "r")
    original = conversion._copy_tensor

    def copy(checkpoint: object, name: str, *rest: object) -> None:
        if name == "norm.weight":
            os.truncate(source / "model.safetensors", 5000)
        original(checkpoint, name, *rest)

    monkeypatch.setattr(conversion, "_copy_tensor", copy)
    with pytest.raises(ReleaseError, match=r"model.safetensors ended at byte"):
        convert_release(source, tmp_path / "out", to="flax")
    assert {path.name for path in tmp_path.iterdir()} == {"r"}


def test_progress_goes_to_standard_error(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_release(release, tmp_path / "out", to="flax", show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "out: 100%" in captured.err and "B/s]" in captured.err


def killed(source: Path, out: Path, to: str, where: str, count: int) -> None:
    """Converts, with --force, in a process that is killed with SIGKILL at the given moment."""
    process = PROCESSES.Process(target=convert_and_die, args=(source, out, to, where, count))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def interrupt_after(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when so many tensors are finished."""
    original = Staging.finish

    def finish(self: Staging, name: str) -> None:
        original(self, name)
        if len(finished(self.folder.parent)) >= tensors:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "finish", finish)


def finished(home: Path) -> list[str]:
    file = home / "finished"
    return file.read_text().split() if file.exists() else []


def says_incomplete(home: Path) -> bool:
    """By its name from the first moment on, in words from when the plan is there."""
    plan = home / "plan.json"
    return home.is_dir() and (not plan.exists() or "incomplete" in json.loads(plan.read_text())["note"])


def same(out: Path, sums: Sums, tmp_path: Path) -> bool:
    return tensor_sums(convert_release(out, tmp_path / "back", to="hf", force=True)) == sums
