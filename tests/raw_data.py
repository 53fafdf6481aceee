"""Raw training data for tests, in the released layout, and what is prepared of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import tensorflow_datasets as tfds
from pyarrow import parquet

from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.records import Settings

TEXT = "quick brown fox jumps over the lazy dog retrieves a passage about meshes and 東京 in größter Eile"


def rows(
    count: int,
    *,
    negatives: int = 24,
    seed: int = 0,
    words: int = 12,
    shared: int = 150,
    prefix: str = "Instruct: X\nQuery: ",
) -> list[dict[str, Any]]:
    """Rows whose queries differ, and whose documents are drawn from ``shared`` that also other seeds draw from."""
    rng = random.Random(seed)
    vocabulary = TEXT.split()
    documents = [" ".join(random.Random(n).choices(vocabulary, k=1 + n % words)) + f" {n}" for n in range(shared + 30)]
    table = []
    for row in range(count):
        passage, *others = rng.sample(documents, 1 + negatives)
        query = f"{prefix}{seed} {row} {' '.join(rng.choices(vocabulary, k=rng.randrange(1, words)))}"
        texts = {f"negative_{n}": text for n, text in enumerate(others, start=1)}
        table.append({"query": query, "passage": passage, **texts})
    return table


def write_raw(folder: Path, datasets: Mapping[str, list[dict[str, Any]]]) -> Path:
    """A Parquet file of one row group for each dataset; other files in the folder are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.parquet"):
        file.unlink()
    for name, table in datasets.items():
        schema = pyarrow.schema([(column, pyarrow.string()) for column in table[0]])
        parquet.write_table(pyarrow.Table.from_pylist(table, schema), folder / f"{name}.parquet")
    return folder


def run(raw: Path, release: Path, out: Path, **options):
    return prepare(raw, release, out, **{"workers": 1, **options})


def source(out: Path, kind: str, split: str = "train"):
    return tfds.builder_from_directory(out / kind / "1.0.0").as_data_source(split)


def written(out: Path) -> list[dict]:
    """Every example as token lists, of both splits, documents looked up."""
    documents = [record["tokens"].tolist() for record in source(out, "documents")]
    settings = Settings.read(out)
    return [
        {
            "dataset": record["dataset"].decode(),
            "query": record["query"].tolist(),
            "documents": [documents[number] for number in (record["passage"], *record["negatives"])],
        }
        for split in ("train", "validation")
        if any(dataset.examples[split] for dataset in settings.datasets)
        for record in source(out, "examples", split)
    ]
