"""From raw files to tokenised training data: check, cap, number distinct documents, tokenise, write.

There are three passes, each in units whose results survive a kill. Before them, files in other layouts than the
released Parquet are converted to it, in temporary files (``f2llm_jax.train.layouts``).

1. *Scan*: every row is read once; its faults and the digests of its texts go to temporary files.
2. *Number*: rows are chosen, and distinct documents are numbered in order of first occurrence.
3. *Tokenise*: the chosen rows are read again, in pieces; each document is tokenised and stored where it first occurs.

The output depends only on the raw files, the tokenizer and the arguments, not on workers, memory or restarts. Memory:
``memory`` for numbering, 17 bytes per raw row of the largest source for choosing rows, and a few hundred rows of text
in each worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_jax.configs.datasets import STAGE_2_CAP, Task, expand, matches, tasks_of
from f2llm_jax.convert.staging import Workplace, output_path
from f2llm_jax.errors import InputError, warn
from f2llm_jax.release import find_release
from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train.dedupe import Digests, number_documents
from f2llm_jax.train.layouts import RELEASED, Conversion, Layout, find_layout, ignored_columns, own_layout
from f2llm_jax.train.prepare_units import Piece, Scan
from f2llm_jax.train.raw import DIGEST_BYTES, REASONS, RawDataset, find_files, open_dataset
from f2llm_jax.train.records import (
    FORMAT,
    SETTINGS_FILE,
    SPLITS,
    Dataset,
    Settings,
    Shard,
    Split,
    assemble,
    lengths_file,
)
from f2llm_jax.train.report import TokenCounts, write_report
from f2llm_jax.train.units import new_folder, run_units, usable_cores

# Rows per unit of tokenising. A unit makes one shard of documents: some GB if all 25 documents per row are new.
PIECE_ROWS = 100_000

# One of this many rows is for validation.
_VALIDATION_SHARE = 100

_INDEX_ROWS = 1 << 16

# A warning is given if a larger share of a dataset's rows is dropped.
_MANY_DROPPED = 0.05


def prepare(
    raw: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    stage: int = 2,
    cap: int | None = None,
    sources: Sequence[str] = (),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    tasks: Mapping[str, Task] | None = None,
    columns: Mapping[str, str] | None = None,
    negatives: int = 24,
    fill_negatives: bool = False,
    query_prompt: str = "",
    max_length: int = 2048,
    seed: int = 0,
    workers: int | None = None,
    memory: int = 1 << 29,
    force: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Writes the training data of a stage, in the format described in ``f2llm_jax.train.records``.

    Args:
        raw: a folder of files, one per dataset: .parquet or .jsonl, in one of the layouts of
            ``f2llm_jax.train.layouts``.
        tokenizer: a release folder or hub id.
        out: the folder to write; it appears when it is complete.
        stage: 1 strips the instructions from all texts; 2 keeps them.
        cap: maximum queries per source; 0 for no cap. Default: 80,000 in stage 2, no cap in stage 1.
        sources: globs; all datasets that match the same glob form one source. Any other is a source of its own.
        include, exclude: globs of datasets to take and to leave out. Here, in ``sources`` and in ``tasks``, ``@NAME``
            stands for the globs of a set in configs/datasets.py.
        tasks: {glob: task type}, which takes precedence over the table of datasets.
        columns: the columns of files in another layout: {``query``, ``passage``, optionally ``negatives``: name}.
        negatives: maximum negatives per example; the first ones are taken.
        fill_negatives: repeat a row's own negatives in place of missing ones, also in the released layout.
        query_prompt: prepended to every query that begins neither with it nor with ``Instruct:`` (after the stripping
            in stage 1).
        max_length: maximum tokens per text, EOS included; longer texts are truncated, and counted.
        seed: determines the choice of rows under a cap, and the split.
        workers: number of processes; default: one per core.
        memory: bytes for numbering documents.
        force: replace what is at ``out``.
        show_progress: show progress bars on standard error.

    Returns:
        The report, as in ``report.json``.

    Raises:
        InputError: ``out`` exists, an argument is out of range, a dataset is unknown, a glob matches no dataset, a file
            is damaged or in no known layout, a dataset without negatives is not for retrieval, or no rows are left.
        ReleaseError: there is no such tokenizer.
    """
    if stage not in (1, 2):
        raise InputError(f"stage must be 1 or 2, not {stage}")
    if not 1 <= max_length <= np.iinfo(np.uint16).max:
        raise InputError(f"max_length must be within 1..{np.iinfo(np.uint16).max}, not {max_length}")
    if cap is not None and cap < 0:
        raise InputError(f"cap must be 0, for none, or more, not {cap}")
    if negatives < 0:
        raise InputError(f"negatives must be 0, for none, or more, not {negatives}")
    place = output_path(out)
    files, excluded = _find(Path(raw).expanduser(), include, exclude, sources, list(tasks or ()))
    sources = expand(sources)
    by_dataset = tasks_of([file.stem for file in files], tasks)
    own = own_layout(columns)
    layouts = _find_layouts(files, own)
    released = {
        file: open_dataset(file, negatives=negatives, fill_negatives=fill_negatives)
        for file, layout in layouts.items()
        if layout is None
    }
    _check_negatives(released.values(), by_dataset)
    release = find_release(tokenizer, weights=False)
    if cap is None:
        cap = STAGE_2_CAP if stage == 2 else 0
    if workers is None:
        workers = usable_cores()
    plan = {
        "format": FORMAT,
        "raw": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "tokenizer": _fingerprint(release),
        "stage": stage,
        "cap": cap,
        "sources": list(sources),
        "columns": dict(columns or {}),
        "negatives": negatives,
        "fill_negatives": fill_negatives,
        "query_prompt": query_prompt,
        "max_length": max_length,
        "seed": seed,
    }
    run = functools.partial(run_units, tokenizer=release, workers=workers, show_progress=show_progress)
    workplace = Workplace(place, plan, marker=SETTINGS_FILE, force=force)
    with contextlib.closing(workplace):
        with _discarded_on_error(workplace):
            found = released | _convert(layouts, negatives, workplace.home / "converted", run)
            if negatives:
                _check_own_negatives(own, layouts, found)
        datasets = [found[file] for file in files]
        _check_negatives(datasets, by_dataset)  # other tasks mend that, and the conversions are resumed with them
        if negatives:
            _warn_of_ignored(layouts, found)
        with _discarded_on_error(workplace):
            work = _Work(
                folder=workplace.home,
                datasets=datasets,
                layouts={file.stem: (layout or RELEASED).name for file, layout in layouts.items()},
                tasks=by_dataset,
                excluded=excluded,
                release=release,
                stage=stage,
                cap=cap,
                sources=sources,
                query_prompt=query_prompt,
                max_length=max_length,
                seed=seed,
            )
            run(work.scans(), label="scan")
            work.number(memory)
            pieces = work.pieces()
            if not pieces:
                largest = max(datasets, key=lambda dataset: dataset.rows)
                raise InputError(f"every row in {raw} is bad: {work.describe_dropped(largest)}")
            for dataset in datasets:
                if sum(work.dropped(dataset).values()) > _MANY_DROPPED * dataset.rows:
                    warn(work.describe_dropped(dataset))
            run(pieces, label="tokenise")
        report = work.assemble(pieces, workplace.folder)
        workplace.commit()
    return report


def _convert(
    layouts: Mapping[Path, Layout | None], negatives: int, folder: Path, run: Callable[..., None]
) -> dict[Path, RawDataset]:
    """Converts the files in other layouts to the released one."""
    conversions = [
        Conversion(file, layout, negatives, folder / file.stem)
        for file, layout in layouts.items()
        if layout is not None
    ]
    run(conversions, label="convert", unit="B")
    return {conversion.file: conversion.dataset() for conversion in conversions}


@contextlib.contextmanager
def _discarded_on_error(workplace: Workplace) -> Iterator[None]:
    """For errors in the raw data: once they are fixed, unfinished work cannot be resumed."""
    try:
        yield
    except InputError:
        workplace.discard()
        raise


def _find(
    raw: Path, include: Sequence[str], exclude: Sequence[str], sources: Sequence[str], tasks: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """The files to take, and the names of the datasets left out."""
    found = find_files(raw)
    for option, globs in {"include": include, "exclude": exclude, "source": sources, "task": tasks}.items():
        for glob in globs:
            if option == "exclude" and glob.startswith("@"):  # a set may be excluded where none of it is present
                continue
            if not any(matches(file.stem, expand([glob])) for file in found):
                raise InputError(f"--{option} {glob} matches none of the {len(found)} datasets in {raw}")
    include, exclude = expand(include), expand(exclude)
    files = [file for file in found if matches(file.stem, include) and not matches(file.stem, exclude)]
    if not files:
        raise InputError(f"none of the {len(found)} datasets in {raw} is left after --include and --exclude")
    return files, [file.stem for file in found if file not in files]


def _find_layouts(files: Sequence[Path], own: Layout | None) -> dict[Path, Layout | None]:
    """The layout of each file; None for Parquet in the released layout."""
    layouts = {file: find_layout(file, own) for file in files}
    if own is not None and own not in layouts.values():
        raise InputError(f"no file of {files[0].parent} has the columns {own} of --columns")
    return layouts


def _check_own_negatives(
    own: Layout | None, layouts: Mapping[Path, Layout | None], datasets: Mapping[Path, RawDataset]
) -> None:
    """Raises an InputError if no file has the negatives that --columns names."""
    files = [file for file, layout in layouts.items() if layout is not None and layout == own]
    if own is not None and own.negatives and not any(datasets[file].negatives for file in files):
        has = ", ".join(own.used([]) + ignored_columns(files[0], own))
        raise InputError(f"{files[0]} has no negatives in a column {own.negatives!r}, as --columns says; it has {has}")


def _warn_of_ignored(layouts: Mapping[Path, Layout | None], datasets: Mapping[Path, RawDataset]) -> None:
    """Warns of files without negatives that have other columns, which may be those of the negatives."""
    for file, layout in layouts.items():
        if not datasets[file].negatives and (ignored := ignored_columns(file, layout or RELEASED)):
            warn(
                f"{file} gives no negatives; ignored columns: {', '.join(ignored)}. If one of them holds negatives, "
                "--columns query=NAME,passage=NAME,negatives=NAME takes it; --negatives 0 asks for none"
            )


def _check_negatives(datasets: Iterable[RawDataset], tasks: Mapping[str, Task]) -> None:
    """Raises an InputError if no loss applies to a dataset: without negatives, only retrieval has one (in-batch)."""
    for dataset in datasets:
        if not dataset.negatives and (task := tasks[dataset.name]) != "retrieval":
            raise InputError(
                f"the dataset {dataset.name!r} is for {task}, which trains with hard negatives alone, and has none: "
                f"add negatives, leave it out with --exclude '{dataset.name}', or say --task '{dataset.name}=retrieval'"
            )


def _fingerprint(release: Path) -> str:
    """A digest of the files that define a tokenizer, with or without a tokenizer.json."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (release / name).exists():
            digest.update(name.encode() + (release / name).read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Work:
    """The passes over all datasets; ``folder`` holds the temporary files."""

    folder: Path
    datasets: list[RawDataset]
    layouts: dict[str, str]
    tasks: dict[str, Task]
    excluded: list[str]
    release: Path
    stage: int
    cap: int
    sources: tuple[str, ...]
    query_prompt: str
    max_length: int
    seed: int

    def scans(self) -> list[Scan]:
        strip = self.stage == 1
        return [Scan(dataset, strip, self.query_prompt, self._scan(dataset)) for dataset in self.datasets]

    def dropped(self, dataset: RawDataset) -> dict[str, int]:
        """{reason: number of rows that the scan found bad}."""
        faults = np.load(self._scan(dataset) / "faults.npy")
        return dict(zip(REASONS, np.bincount(faults, minlength=1 + len(REASONS)).tolist()[1:], strict=True))

    def describe_dropped(self, dataset: RawDataset) -> str:
        """How many rows of a dataset are dropped, the main reason, and a remedy."""
        dropped = self.dropped(dataset)
        total, (reason, count) = sum(dropped.values()), max(dropped.items(), key=lambda item: item[1])
        if reason == "empty_negative" and dataset.negatives > 1 and not dataset.fill_negatives:
            advice = "--fill-negatives repeats a row's other negatives in place of missing ones"
        elif reason == "empty_negative":
            advice = "they have no negative at all; --negatives 0 trains without any"
        elif reason == "negative_is_positive":
            advice = "take a row's passage out of its negatives; --negatives 0 trains without any"
        else:
            advice = "the text is missing or blank; --columns query=NAME,passage=NAME takes it from other columns"
        share = f"{total / max(dataset.rows, 1):.1%}"
        return (
            f"{dataset.name}: {total:,} of {dataset.rows:,} rows ({share}) are dropped, above all as {reason} "
            f"({count:,}): {advice}"
        )

    def _scan(self, dataset: RawDataset) -> Path:
        return self.folder / "scan" / dataset.name

    @property
    def _chosen(self) -> Path:
        return self.folder / "chosen"

    def number(self, memory: int) -> None:
        """Chooses rows, splits them, and numbers their documents."""
        if self._chosen.exists():
            return
        with new_folder(self._chosen) as folder:
            for source in self._by_source():
                for dataset, rows in zip(source, self._choose(source), strict=True):
                    np.save(folder / f"{dataset.name}.rows.npy", rows)
                    queries = np.load(self._scan(dataset) / "queries.npy", mmap_mode="r")[rows]
                    validation = split_off(queries, _key(self.seed, dataset.name, "validation"))
                    np.save(folder / f"{dataset.name}.validation.npy", validation)
            (folder / "buckets").mkdir()
            starts = number_documents(
                [self._digests(dataset, folder) for dataset in self.datasets],
                [folder / f"{dataset.name}.documents" for dataset in self.datasets],
                folder / "buckets",
                memory=memory,
            )
            for file in (folder / "buckets").iterdir():
                file.unlink()
            (folder / "starts.json").write_text(json.dumps(starts), encoding="utf-8")

    def _by_source(self) -> Iterator[list[RawDataset]]:
        left = self.datasets
        for glob in self.sources:
            if source := [dataset for dataset in left if fnmatchcase(dataset.name, glob)]:
                yield source
            left = [dataset for dataset in left if dataset not in source]
        yield from ([dataset] for dataset in left)

    def _choose(self, source: list[RawDataset]) -> list[np.ndarray]:
        """The numbers of the rows to keep of each dataset of a source, ascending: at most ``cap`` in total."""
        good = [np.flatnonzero(np.load(self._scan(dataset) / "faults.npy") == 0) for dataset in source]
        total = sum(map(len, good))
        if not self.cap or total <= self.cap:
            return good
        ranks = np.concatenate(
            [
                mix(rows.astype(np.uint64) + _key(self.seed, dataset.name, "cap"))
                for dataset, rows in zip(source, good, strict=True)
            ]
        )
        kept = np.zeros(total, bool)
        kept[np.argsort(ranks, kind="stable")[: self.cap]] = True
        masks = np.split(kept, np.cumsum([len(rows) for rows in good])[:-1])
        return [rows[mask] for rows, mask in zip(good, masks, strict=True)]

    def _digests(self, dataset: RawDataset, chosen: Path) -> Digests:
        rows = np.load(chosen / f"{dataset.name}.rows.npy", mmap_mode="r")
        file, shape = self._scan(dataset) / "documents", (dataset.rows, 1 + dataset.negatives, 2)

        def read(first: int, count: int) -> np.ndarray:
            # Mapped again for each read, so that pages read earlier do not count towards this process's memory.
            return np.memmap(file, "<u8", "r", shape=shape)[rows[first : first + count]]

        return Digests(len(rows), 1 + dataset.negatives, read)

    def pieces(self) -> list[Piece]:
        starts = json.loads((self._chosen / "starts.json").read_text())
        pieces = []
        for dataset, start in zip(self.datasets, starts, strict=False):
            rows = len(np.load(self._chosen / f"{dataset.name}.rows.npy", mmap_mode="r"))
            for first in range(0, rows, PIECE_ROWS):
                last = min(first + PIECE_ROWS, rows)
                piece = Piece(
                    dataset=dataset,
                    strip_instructions=self.stage == 1,
                    query_prompt=self.query_prompt,
                    chosen=self._chosen,
                    first=first,
                    last=last,
                    next_document=start,
                    max_length=self.max_length,
                    folder=self.folder / "pieces" / f"{dataset.name}.{first // PIECE_ROWS:05d}",
                )
                pieces.append(piece)
                start = max(start, int(piece.documents().max()) + 1)
        return pieces

    def assemble(self, pieces: list[Piece], result: Path) -> dict[str, Any]:
        """Assembles the pieces in ``result``; returns the report."""
        datasets = self._datasets(pieces)
        splits: dict[Split, list[Shard]] = {split: shards for split in SPLITS if (shards := _shards(pieces, split))}
        documents = _shards(pieces, "documents")
        tokenizer = Tokenizer.from_release(self.release)
        queries = sum(piece.size for piece in pieces)
        settings = Settings(
            stage=self.stage,
            seed=self.seed,
            max_length=self.max_length,
            vocabulary=tokenizer.vocabulary,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            documents=sum(shard.records for shard in documents),
            content=self._content(pieces),
            datasets=datasets,
            query_prompt=self.query_prompt or None,
            instructed=sum(piece.done()["instructed_queries"] for piece in pieces) / queries,
        )
        self._write_lengths(pieces, settings, result)
        report = self._report(pieces, settings)
        write_report(report, result)
        assemble(result, "examples", splits, "Tokenised queries, and the numbers of their documents.")
        assemble(result, "documents", {"train": documents}, "Tokens of every distinct document, at its number.")
        settings.write(result)
        return report

    def _datasets(self, pieces: list[Piece]) -> list[Dataset]:
        datasets = []
        ends: dict[str, int] = dict.fromkeys(SPLITS, 0)
        for dataset in self.datasets:
            own = [piece.done() for piece in pieces if piece.dataset == dataset]
            examples: dict[str, int] = {split: sum(done[split]["records"] for done in own) for split in SPLITS}
            datasets.append(Dataset(dataset.name, self.tasks[dataset.name], dataset.negatives, ends, examples))
            ends = {split: ends[split] + examples[split] for split in SPLITS}
        return datasets

    def _content(self, pieces: list[Piece]) -> str:
        """A digest of the texts of every example, and of the numbers that its documents got."""
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for piece in pieces:
            rows, numbers = piece.rows(), piece.documents()
            queries = np.load(self._scan(piece.dataset) / "queries.npy", mmap_mode="r")
            documents = self._digests(piece.dataset, self._chosen)
            for first in range(0, piece.size, _INDEX_ROWS):
                part = slice(first, min(first + _INDEX_ROWS, piece.size))
                texts = documents.read(piece.first + first, part.stop - first).reshape(part.stop - first, -1)
                digest.update(np.column_stack([queries[rows[part]], texts, numbers[part].astype("<u8")]).tobytes())
        return digest.hexdigest()

    def _write_lengths(self, pieces: list[Piece], settings: Settings, result: Path) -> None:
        """Writes the index: the tokens per text of every example, which give a batch's shape without reading it."""
        all_documents = self.folder / "document_lengths"
        with all_documents.open("wb") as stream:
            for piece in pieces:
                stream.write(piece.lengths("document").tobytes())
        document_lengths = np.memmap(all_documents, np.uint16, "r")
        width = 2 + max(dataset.negatives for dataset in settings.datasets)
        outputs = {}
        for split in SPLITS:
            lengths_file(result, split).parent.mkdir(exist_ok=True)
            examples = sum(dataset.examples[split] for dataset in settings.datasets)
            outputs[split] = lengths_file(result, split).open("wb")
            np.lib.format.write_array_header_1_0(
                outputs[split], {"descr": "<u2", "fortran_order": False, "shape": (examples, width)}
            )
        for piece in pieces:
            queries, validation, documents = piece.lengths("query"), piece.validation(), piece.documents()
            for first in range(0, len(queries), _INDEX_ROWS):
                part = slice(first, first + _INDEX_ROWS)
                rows = np.zeros((len(queries[part]), width), "<u2")
                rows[:, 0] = queries[part]
                rows[:, 1 : 1 + documents.shape[1]] = document_lengths[documents[part]]
                outputs["train"].write(rows[~validation[part]].tobytes())
                outputs["validation"].write(rows[validation[part]].tobytes())
        for stream in outputs.values():
            stream.close()

    def _report(self, pieces: list[Piece], settings: Settings) -> dict[str, Any]:
        datasets = [
            self._report_dataset(raw, prepared, [piece for piece in pieces if piece.dataset == raw])
            for raw, prepared in zip(self.datasets, settings.datasets, strict=True)
        ]
        source_of = {d.name: "+".join(e.name for e in source) for source in self._by_source() for d in source}
        return {
            "stage": self.stage,
            "cap": self.cap or None,
            "seed": self.seed,
            "max_length": self.max_length,
            "documents": settings.documents,
            "grouped_sources": sorted({name for name in source_of.values() if "+" in name}),
            "excluded": self.excluded,
            "datasets": datasets,
        }

    def _report_dataset(self, raw: RawDataset, prepared: Dataset, pieces: list[Piece]) -> dict[str, Any]:
        dropped = self.dropped(raw)
        done = [piece.done() for piece in pieces]
        kept = sum(prepared.examples.values())
        queries, documents = TokenCounts(), TokenCounts()
        for piece in pieces:
            queries.add(piece.lengths("query"))
            documents.add(piece.lengths("document"))
        return {
            "name": raw.name,
            "layout": self.layouts[raw.name],
            "task": prepared.task,
            "read": raw.rows,
            "dropped": dropped,
            "capped": raw.rows - sum(dropped.values()) - kept,
            "kept": kept,
            **prepared.examples,
            "negatives": raw.negatives,
            "new_documents": documents.texts,
            "query_tokens": queries.summary(),
            "document_tokens": documents.summary(),
            "truncated_queries": sum(piece["truncated_queries"] for piece in done),
            "truncated_documents": sum(piece["truncated_documents"] for piece in done),
        }


def _shards(pieces: list[Piece], kind: str) -> list[Shard]:
    done = [(piece.folder / kind, piece.done()[kind]) for piece in pieces]
    return [Shard(file, **counts) for file, counts in done if counts["records"]]


def split_off(queries: np.ndarray, key: np.uint64) -> np.ndarray:
    """Which rows are for validation: at most one in a hundred, rounded up; rows with equal queries stay together.

    Args:
        queries: uint64 [rows], digests of the queries.
        key: determines the choice.

    Returns:
        bool [rows]; all False if there is only one row.
    """
    limit = math.ceil(len(queries) / _VALIDATION_SHARE) if len(queries) > 1 else 0
    _, query, rows = np.unique(mix(queries ^ key), return_inverse=True, return_counts=True)
    taken = np.zeros(len(rows), bool)
    fits = np.flatnonzero(rows <= limit)
    taken[fits[np.cumsum(rows[fits]) <= limit]] = True
    return taken[query]


def _key(seed: int, dataset: str, purpose: str) -> np.uint64:
    digest = hashlib.blake2b(f"{seed}\n{purpose}\n{dataset}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u8")[0]


def mix(values: np.ndarray) -> np.ndarray:
    """Pseudo-random uint64 values, each a function of its input value alone (splitmix64)."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
