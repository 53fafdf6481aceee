"""Batches of prepared data: the examples of a step are a function of (seed, step).

An epoch is planned as a whole. Every dataset contributes ⌈examples / batch size⌉ batches of its examples in random
order, and each step draws its dataset among those not yet exhausted, in proportion to these numbers. Any step can be
computed without those before it, so a loader resumes at once, also with another number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from f2llm_jax.batching import make_batch
from f2llm_jax.configs.datasets import NEGATIVES, Task
from f2llm_jax.errors import InputError
from f2llm_jax.tokens import truncated
from f2llm_jax.train.batch import AnyTrainBatch, PackedTrainBatch, TeacherStates, TrainBatch
from f2llm_jax.train.packing import PackPlan, TrainPacking, pack
from f2llm_jax.train.records import SPLITS, Dataset, Records, Settings, Split, data_digest, lengths_file
from f2llm_jax.train.teacher import TeacherStore
from f2llm_jax.train.units import exit_with_parent


@dataclasses.dataclass(frozen=True)
class Item:
    """A batch and where it comes from.

    Attributes:
        dataset, task: the dataset that all its examples belong to, and its task type.
        batch: this process's share of the global batch, as NumPy arrays.
        epoch: counted from 0.
        examples: number of examples, the first of the global batch, that are new in this epoch; the rest repeat
            examples of the dataset to fill its last batch.
    """

    dataset: str
    task: Task
    batch: AnyTrainBatch
    epoch: int
    examples: int


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of a global batch belong to this process: each gets an equal run of rows, in process order."""

    process: int = 0
    processes: int = 1

    def rows(self, size: int) -> slice:
        count = size // self.processes
        return slice(self.process * count, (self.process + 1) * count)


class TrainingData:
    """A folder that ``f2llm prepare`` wrote, open for reading. Thread-safe, and can be pickled.

    ArrayRecord keeps the positions of its records in memory: about 90 bytes for each example and each document.

    Attributes:
        settings: the contents of ``prepared.json``.
        max_length: maximum tokens per text; longer texts are truncated, and still end with the EOS.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_length: int = 1024,
        teacher: TeacherStore | None = None,
        packing: TrainPacking | None = None,
    ):
        """Opens the folder.

        Args:
            folder: the folder.
            max_length: maximum tokens per text; warns if the data was prepared with a lower maximum.
            teacher: states for every training batch, from ``open_store``.
            packing: the shapes of packed batches; None for rows of one text each.

        Raises:
            InputError: the folder holds no prepared data.
        """
        self.folder = Path(folder)
        self.settings = Settings.read(self.folder)
        self.max_length = self.settings.cut_to(max_length)
        self._query_lengths = row_lengths(self.max_length, steps=1)
        self._document_lengths = row_lengths(self.max_length, steps=2)
        self._teacher = teacher
        self._packing = packing
        self._documents = Records(self.folder, "documents", "train")
        self._examples = {split: Records(self.folder, "examples", split) for split in SPLITS if self._count(split)}
        self._lengths = {split: np.load(lengths_file(self.folder, split), mmap_mode="r") for split in self._examples}

    def _count(self, split: Split) -> int:
        return sum(dataset.examples[split] for dataset in self.settings.datasets)

    def __getstate__(self) -> dict[str, Any]:
        options = {"max_length": self.max_length, "teacher": self._teacher, "packing": self._packing}
        return {"folder": self.folder, **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("folder"), **state)  # type: ignore[misc]

    def batch(
        self, dataset: Dataset, split: Split, examples: np.ndarray, negatives: np.ndarray, share: Share
    ) -> AnyTrainBatch:
        """A process's share of a global batch.

        Args:
            dataset, split: where the examples come from.
            examples: [batch] indices of the examples, counted from 0 within the dataset and split.
            negatives: [count] positions of the negatives to take from every example.
            share: which of the examples to read. Shapes follow from the global batch, so every process gets the same.

        Returns:
            NumPy arrays for [batch / processes] examples; slots of packed rows are numbered within this share.
        """
        lengths = self.text_lengths(dataset, split, examples, negatives)
        own = dataset.first[split] + examples[share.rows(len(examples))]
        records = self._examples[split].read(own)
        passages = np.array([record["passage"] for record in records], np.int64)
        hard = np.array([record["negatives"][negatives] for record in records], np.int64).reshape(-1)
        documents = self._documents.read(np.concatenate([passages, hard]))
        texts = [*(record["query"] for record in records), *(document["tokens"] for document in documents)]
        texts = [truncated(tokens, self.max_length, self.settings.eos_id) for tokens in texts]
        layout: Any = self._bucketed if self._packing is None else self._packed
        return layout(
            texts,
            lengths,
            share,
            passage_ids_b=passages.astype(np.int32),
            teacher=self._teacher_states(own, passages, hard) if split == "train" else None,
        )

    def text_lengths(self, dataset: Dataset, split: Split, examples: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        """The tokens per text of a batch, [batch, 2 + count]: each example's query, passage and negatives."""
        columns = np.array([0, 1, *(2 + negatives)])
        return np.minimum(self._lengths[split][(dataset.first[split] + examples)[:, None], columns], self.max_length)

    def pack_plan(self, lengths: np.ndarray, processes: int) -> PackPlan:
        """The packed rows of a global batch with texts of these lengths."""
        assert self._packing is not None
        return self._packing.plan([_in_order(part) for part in np.split(lengths, processes)])

    def _bucketed(self, texts: list[np.ndarray], lengths: np.ndarray, share: Share, **rest: Any) -> TrainBatch:
        query_length = _round_up(lengths[:, 0].max(), self._query_lengths)
        document_length = _round_up(lengths[:, 1:].max(), self._document_lengths)
        query, passage, negatives = _by_kind(texts, len(lengths) // share.processes)
        rows = functools.partial(make_batch, pad_id=self.settings.pad_id)
        return TrainBatch(
            query=rows(query, query_length),
            passage=rows(passage, document_length),
            negatives=rows(negatives, document_length) if len(negatives) else None,
            **rest,
        )

    def _packed(self, texts: list[np.ndarray], lengths: np.ndarray, share: Share, **rest: Any) -> PackedTrainBatch:
        plan = self.pack_plan(lengths, share.processes)
        rows, slots = pack(plan, share.process, texts, self.settings.pad_id)
        query, passage, negatives = _by_kind(slots, len(lengths) // share.processes)
        return PackedTrainBatch(rows, query, passage, negatives if len(negatives) else None, **rest)

    def _teacher_states(self, examples: np.ndarray, passages: np.ndarray, negatives: np.ndarray) -> Any:
        if self._teacher is None:
            return None
        documents_md = self._teacher.read("documents", np.concatenate([passages, negatives]))
        count = len(passages)
        return TeacherStates(
            query_bd=self._teacher.read("queries", examples),  # type: ignore[arg-type]
            passage_bd=documents_md[:count],  # type: ignore[arg-type]
            negatives_md=documents_md[count:] if len(negatives) else None,  # type: ignore[arg-type]
        )


def _by_kind(texts: Any, examples: int) -> tuple[Any, Any, Any]:
    """Splits a sequence of all texts into queries, passages and negatives."""
    return texts[:examples], texts[examples : 2 * examples], texts[2 * examples :]


def _in_order(lengths: np.ndarray) -> np.ndarray:
    """Flattens lengths [examples, 2 + negatives] into the order of a batch: queries, passages, negatives."""
    return np.concatenate([lengths[:, 0], lengths[:, 1], lengths[:, 2:].reshape(-1)])


def row_lengths(max_length: int, *, steps: int) -> np.ndarray:
    """The possible row lengths of a training batch: ``steps`` per doubling from 32 tokens on, up to ``max_length``.

    A program is compiled for each pair of query length and document length. With one step for queries, which are a
    small part of a batch's tokens, and two for documents, there are 66 pairs up to 1,024 tokens.
    """
    lengths = [
        start + step * start // steps
        for start in (2**n for n in range(5, max_length.bit_length()))
        for step in range(steps)
    ]
    return np.array([*(length for length in lengths if length < max_length), max_length])


def _round_up(tokens: int, lengths: np.ndarray) -> int:
    return int(lengths[np.searchsorted(lengths, tokens)])


def _kill_processes_soon() -> None:
    """Makes Grain kill its processes one second after telling them to stop, instead of 25.

    A process whose next batch fills the pipe waits until the batch is taken, and by then nobody takes it. The processes
    only read, so nothing is lost. Grain has no setting for this; its internal module is imported only for workers.
    """
    from grain._src.python.dataset.transformations import process_prefetch

    process_prefetch._PROCESS_KILL_TIMEOUT_S = 1


def _parse_no_flags() -> None:
    """Marks absl flags as parsed: Grain's processes read them, an error if no command line was parsed for absl."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_reader(worker: int, workers: int) -> None:
    """Makes a reader ignore SIGTERM, which all processes of a job get: training saves a checkpoint, then closes it.

    A reader exits by itself when its training process is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


class TrainBatches:
    """All steps of a training run, for random access: ``batches[step]`` is an ``Item``.

    Attributes:
        datasets: the datasets that have examples to train on.
        steps_per_epoch: number of batches of all datasets together.
    """

    def __init__(
        self, data: TrainingData, *, batch_size: int, epochs: int = 1, seed: int = 0, share: Share | None = None
    ):
        """Plans a run.

        Args:
            data: the data.
            batch_size: examples per global batch.
            epochs: passes over all examples.
            seed: determines the order, the datasets and the negatives.
            share: the share of this process; default: everything, for a single process.

        Raises:
            InputError: the batch does not divide over the processes, or there are no examples.
        """
        self.data = data
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.share = share or Share()
        _check_batch_size(batch_size, self.share.processes, "processes")
        self.datasets = [dataset for dataset in data.settings.datasets if dataset.examples["train"]]
        if not self.datasets:
            raise InputError(f"{data.folder} has no examples to train on")
        self._batches = [-(-dataset.examples["train"] // batch_size) for dataset in self.datasets]
        self.steps_per_epoch = sum(self._batches)
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Item:
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn, number = self._plan(epoch)
        dataset, first = self.datasets[drawn[place]], int(number[place]) * self.batch_size
        count = dataset.examples["train"]
        order = grain.MapDataset.range(count).shuffle(seed=_seed(self.seed, epoch, dataset.name))
        examples = np.array([order[row % count] for row in range(first, first + self.batch_size)])
        negatives = _draw_negatives(dataset, np.random.default_rng([self.seed, step]))
        return Item(
            dataset=dataset.name,
            task=dataset.task,
            batch=self.data.batch(dataset, "train", examples, negatives, self.share),
            epoch=epoch,
            examples=min(self.batch_size, count - first),
        )

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._plans:
            # Prefetching threads may be in two epochs at the same time.
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = draw_datasets(self._batches, np.random.default_rng([self.seed, epoch, 1]))
        return self._plans[epoch]


def draw_datasets(batches: list[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The datasets of an epoch: each step draws one, in proportion to its number of batches, until it has none left.

    Args:
        batches: the number of batches of each dataset.
        rng: the random generator.

    Returns:
        For every step, the index of the dataset and the number of the batch within it.
    """
    # Events of Poisson processes, one per dataset: the next event comes from a dataset in proportion to its rate.
    times = [np.cumsum(rng.standard_exponential(count)) / count for count in batches]
    order = np.argsort(np.concatenate(times), kind="stable")
    number = np.concatenate([np.arange(count) for count in batches])
    return np.repeat(np.arange(len(batches)), batches)[order], number[order]


def _draw_negatives(dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
    """Positions of negatives, the same for a whole batch as in the reference; all of them if the dataset has fewer."""
    return rng.permutation(dataset.negatives)[: NEGATIVES[dataset.task]]


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def _check_batch_size(batch_size: int, divisor: int, of: str) -> None:
    if batch_size < 1 or batch_size % divisor:
        raise InputError(f"a batch of {batch_size} cannot be shared by {divisor} {of}")


class ValidationBatches:
    """The validation examples of a dataset in order, for random access: ``batches[number]`` is an ``Item``."""

    def __init__(
        self,
        data: TrainingData,
        dataset: str,
        *,
        batch_size: int,
        multiple: int = 1,
        seed: int = 0,
        share: Share | None = None,
    ):
        """Plans a pass.

        Args:
            data: the data.
            dataset: the name of one of its datasets.
            batch_size: examples per global batch. The last batch may be smaller: a power of two times ``multiple``.
            multiple: the size of every batch is a multiple of this; at least the number of processes.
            seed: determines the negatives.
            share: the share of this process; default: everything, for a single process.

        Raises:
            InputError: there is no such dataset, or a size does not divide.
        """
        self.data = data
        self.share = share or Share()
        self.batch_size = batch_size
        self.multiple = multiple = max(multiple, self.share.processes)
        self.seed = seed
        _check_batch_size(multiple, self.share.processes, "processes")
        _check_batch_size(batch_size, multiple, "devices or processes")
        named = {known.name: known for known in data.settings.datasets}
        if dataset not in named:
            raise InputError(f"{data.folder} has no dataset {dataset!r}")
        self.dataset = named[dataset]

    def __len__(self) -> int:
        return -(-self.dataset.examples["validation"] // self.batch_size)

    def __getitem__(self, number: int) -> Item:
        first, count = number * self.batch_size, self.dataset.examples["validation"]
        examples = min(self.batch_size, count - first)
        rows = self.multiple
        while rows < examples:
            rows = min(2 * rows, self.batch_size)
        negatives = _draw_negatives(self.dataset, np.random.default_rng([self.seed, number, _seed(self.dataset.name)]))
        numbers = np.arange(first, first + rows) % count
        return Item(
            dataset=self.dataset.name,
            task=self.dataset.task,
            batch=self.data.batch(self.dataset, "validation", numbers, negatives, self.share),
            epoch=0,
            examples=examples,
        )


class DataLoader(grain.DatasetIterator):
    """The steps of a run in order, prefetched by Grain: a ``Loader`` for the training loop.

    The state is the number of the next step and a digest of the data, the same on every process; Orbax can save it like
    that of any Grain iterator.
    """

    def __init__(self, batches: TrainBatches, *, multiple: int = 1, threads: int = 2, ahead: int = 4, workers: int = 0):
        """Starts at step 0; nothing is read before the first ``next``.

        Args:
            batches: the steps.
            multiple: number of devices that share a batch; the size of validation batches is a multiple of it.
            threads: number of reader threads, in this process or in each worker.
            ahead: number of batches to prefetch.
            workers: number of reader processes; 0 reads in this one. They take seconds to start, and pay off if a step
                takes less time than reading a batch.
        """
        super().__init__()
        self._batches = batches
        self._digest = data_digest(batches.data.folder)
        self._multiple = multiple
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        self._workers = workers
        self._step = 0
        self._iterator: Iterator[Item] | None = None

    @property
    def settings(self) -> Settings:
        """The settings of the prepared data."""
        return self._batches.data.settings

    @property
    def steps(self) -> int:
        """The number of batches of all epochs."""
        return len(self._batches)

    def __next__(self) -> Item:
        if self._step >= self.steps:
            raise StopIteration
        if self._iterator is None:
            steps = grain.MapDataset.source(self._batches)[self._step :].to_iter_dataset(self._options)
            if self._workers:
                _parse_no_flags()
                _kill_processes_soon()
                steps = steps.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers), _start_reader)
            self._iterator = iter(steps)
        item = next(self._iterator)
        self._step += 1
        return item

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, "data": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a step.

        Raises:
            InputError: there is no such step, or the state belongs to other data.
        """
        if state["data"] != self._digest:
            raise InputError(
                f"{self._batches.data.folder} holds other data than the run began with: set data.path to that, or "
                "begin a run in another --out"
            )
        if not 0 <= state["step"] <= self.steps:
            raise InputError(f"there is no step {state['step']}: the run has {self.steps}")
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Stops prefetching; the next call of ``next`` continues."""
        if self._iterator is not None:
            self._iterator.close()  # type: ignore[attr-defined]
        self._iterator = None

    @property
    def validation_batches(self) -> int:
        """The number of validation batches of all datasets together."""
        return sum(map(len, self._validation().values()))

    def validation(self) -> dict[str, Iterable[Item]]:
        """The validation batches of each dataset that has any, prefetched; every iteration is a pass over them."""
        return {
            name: grain.MapDataset.source(batches).to_iter_dataset(self._options)
            for name, batches in self._validation().items()
        }

    def _validation(self) -> dict[str, ValidationBatches]:
        run = self._batches
        return {
            dataset.name: ValidationBatches(
                run.data,
                dataset.name,
                batch_size=run.batch_size,
                multiple=self._multiple,
                seed=run.seed,
                share=run.share,
            )
            for dataset in run.data.settings.datasets
            if dataset.examples["validation"]
        }
