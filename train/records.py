"""Prepared training data on disk: two TensorFlow Datasets in ArrayRecord, and an index. TensorFlow is not needed.

::

    prepared.json                 description: datasets and the positions of their examples, tokenizer, settings
    examples/1.0.0/               splits train and validation: dataset, query tokens, document numbers
    documents/1.0.0/              split train: the tokens of every distinct document; the index is its number
    index/SPLIT.lengths.npy       uint16 [examples, 2 + negatives]: tokens of query, passage and negatives; 0 for none
    report.json  report.md        what was read, kept, dropped and capped

The examples of a dataset are contiguous within a split. ``tfds.builder_from_directory(OUT / "examples" / "1.0.0")
.as_data_source("train")`` reads them; documents are read likewise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from f2llm_jax.configs.datasets import Task
from f2llm_jax.errors import InputError, warn

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

FORMAT = 2
SETTINGS_FILE = "prepared.json"
_VERSION = "1.0.0"

# Grain and ArrayRecord's own data source want one record per group, so that each can be read without its neighbours.
_WRITER_OPTIONS = "group_size:1"


def features(kind: str) -> Any:
    """The TFDS features of ``examples`` or ``documents``."""
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    if kind == "documents":
        return tfds.features.FeaturesDict({"tokens": tokens})
    return tfds.features.FeaturesDict(
        {
            "dataset": tfds.features.Text(),
            "query": tokens,
            "passage": tfds.features.Scalar(np.int64),
            "negatives": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        }
    )


class Writer:
    """Writes records to a file, which is created with the first record.

    Attributes:
        records: number of records.
        bytes: size of all records, before compression.
    """

    def __init__(self, file: Path):
        self.records = 0
        self.bytes = 0
        self._file = file
        self._writer: Any = None

    def write(self, record: dict[str, np.ndarray | str]) -> None:
        """Appends a record: a string or an array of integers for each feature."""
        if self._writer is None:
            self._writer = array_record_module.ArrayRecordWriter(str(self._file), _WRITER_OPTIONS)
        data = _serialize(record)
        self._writer.write(data)
        self.records += 1
        self.bytes += len(data)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _serialize(record: dict[str, np.ndarray | str]) -> bytes:
    """Serialises a ``tf.train.Example`` to the same bytes in every process; TFDS writes features in arbitrary order."""
    feature = {name: _feature(value) for name, value in record.items()}
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    return example.SerializeToString(deterministic=True)


def _feature(value: np.ndarray | str) -> Any:
    if isinstance(value, str):
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value.encode()]))
    return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=value.tolist()))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of records, with their number and size in bytes."""

    file: Path
    records: int
    bytes: int


def builder_folder(folder: Path, kind: str) -> Path:
    return folder / kind / _VERSION


def assemble(folder: Path, kind: str, splits: dict[Split, list[Shard]], description: str) -> None:
    """Moves shards to where TFDS looks for them, and writes its metadata.

    Shards that are already there, because an earlier process was killed at this point, are kept.
    """
    home = builder_folder(folder, kind)
    home.mkdir(parents=True, exist_ok=True)
    identity = tfds.core.DatasetIdentity(
        name=kind, version=tfds.core.Version(_VERSION), data_dir=str(home), module_name="f2llm_jax"
    )
    infos = []
    for split, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=home, dataset_name=kind, split=split, filetype_suffix="array_record"
        )
        for number, shard in enumerate(shards):
            target = Path(template.sharded_filepath(shard_index=number, num_shards=len(shards)))
            if not target.exists():
                shard.file.rename(target)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.records for shard in shards],
                num_bytes=sum(shard.bytes for shard in shards),
                filename_template=template,
            )
        )
    info = tfds.core.DatasetInfo(builder=identity, description=description, features=features(kind))
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(home)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of the prepared data.

    Attributes:
        name, task: its name and task type.
        negatives: number of negatives per example.
        first: {split: index of its first example in that split}.
        examples: {split: number of its examples in that split}.
    """

    name: str
    task: Task
    negatives: int
    first: dict[str, int]
    examples: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The contents of ``prepared.json``.

    Attributes:
        stage, seed, max_length: the arguments of ``prepare``.
        vocabulary, eos_id, pad_id: properties of the tokenizer.
        documents: number of distinct documents.
        content: a digest of all texts and of which documents belong to which query.
        datasets: the datasets in the order of their examples.
        query_prompt: the prompt that ``f2llm prepare --query-prompt`` prepended to queries; None if there was none.
        instructed: share of queries that begin with ``Instruct:``.
    """

    stage: int
    seed: int
    max_length: int
    vocabulary: str
    eos_id: int
    pad_id: int
    documents: int
    content: str
    datasets: list[Dataset]
    query_prompt: str | None
    instructed: float

    def cut_to(self, max_length: int, key: str = "max_length") -> int:
        """The limit on tokens per text that takes effect; warns if the data was prepared with a lower one."""
        if max_length > self.max_length:
            warn(
                f"{key}={max_length}, but the data was prepared with texts cut to {self.max_length} tokens, and they "
                f"stay so: set {self.max_length}, or prepare it anew with --max-length {max_length}"
            )
        return min(max_length, self.max_length)

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Reads ``prepared.json`` from a folder.

        Raises:
            InputError: the folder holds no prepared data, or data of another format version.
        """
        file = folder / SETTINGS_FILE
        if not file.exists():
            raise InputError(f"{folder} holds no prepared data (no {SETTINGS_FILE}); make it with f2llm prepare")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if (found := values.pop("format")) != FORMAT:
                raise InputError(f"{file} has format {found}, this version reads {FORMAT}; prepare the data again")
            datasets = [Dataset(**dataset) for dataset in values.pop("datasets")]
            return cls(**values, datasets=datasets)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is damaged: {type(error).__name__}: {error}") from None


def lengths_file(folder: Path, split: Split) -> Path:
    return folder / "index" / f"{split}.lengths.npy"


class Records:
    """Random access to the records of a split, decoded by TFDS. Thread-safe, and can be pickled."""

    def __init__(self, folder: Path, kind: str, split: Split):
        _allow_open_files()
        self._source = tfds.builder_from_directory(builder_folder(folder, kind)).as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The records with these numbers; a number that occurs several times is read once."""
        distinct, inverse = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        records = self._source.__getitems__(distinct.tolist())
        return [records[place] for place in inverse.tolist()]


def _allow_open_files() -> None:
    """Raises the limit on open files. Each shard is one: for some 500 datasets, more than the usual limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def data_digest(folder: Path) -> str:
    """A digest of prepared data: of its settings, whose ``content`` covers all texts."""
    return hashlib.blake2b((folder / SETTINGS_FILE).read_bytes(), digest_size=16).hexdigest()
