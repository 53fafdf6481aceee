"""Raw training data for tests, in the released layout."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

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
