"""The units of the first and the last pass over raw data: a dataset to scan, and some of its rows to tokenise.

The passes are described in ``f2llm_jax.train.prepare``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train.raw import INSTRUCTION, RawDataset, digests, faults, read_rows
from f2llm_jax.train.records import SPLITS, Writer
from f2llm_jax.train.units import Worker, new_folder

# Texts are tokenised together up to this many characters: the tokenizer takes about 100 bytes for each.
_TOKENIZER_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Scan:
    """A unit of the first pass: one dataset.

    It writes ``faults.npy`` (uint8 [rows]), ``queries.npy`` (uint64 [rows], digests) and ``documents`` (uint64 [rows,
    1 + negatives, 2], digests, without a header).
    """

    dataset: RawDataset
    strip_instructions: bool
    query_prompt: str
    folder: Path

    @property
    def size(self) -> int:
        return self.dataset.rows

    def run(self, worker: Worker) -> None:
        row_faults = np.zeros(self.dataset.rows, np.uint8)
        queries = np.zeros(self.dataset.rows, "<u8")
        with new_folder(self.folder) as folder:
            with (folder / "documents").open("wb") as stream:
                read = read_rows(
                    self.dataset, strip_instructions=self.strip_instructions, query_prompt=self.query_prompt
                )
                for first, columns in read:
                    part = slice(first, first + len(columns[0]))
                    digests_bc2 = digests(columns)
                    row_faults[part] = faults(columns)
                    queries[part] = digests_bc2[:, 0, 0]
                    stream.write(digests_bc2[:, 1:].tobytes())
                    worker.advance(len(columns[0]))
            np.save(folder / "faults.npy", row_faults)
            np.save(folder / "queries.npy", queries)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A unit of the last pass: of the chosen rows of a dataset, those from ``first`` to ``last`` - 1.

    It writes the shards ``train``, ``validation`` and ``documents``, uint16 ``query_lengths.npy`` and
    ``document_lengths.npy``, and counts in ``done.json``. ``next_document`` is the number of its first new document.
    """

    dataset: RawDataset
    strip_instructions: bool
    query_prompt: str
    chosen: Path
    first: int
    last: int
    next_document: int
    max_length: int
    folder: Path

    @property
    def size(self) -> int:
        return self.last - self.first

    def rows(self) -> np.ndarray:
        return np.load(self.chosen / f"{self.dataset.name}.rows.npy", mmap_mode="r")[self.first : self.last]

    def validation(self) -> np.ndarray:
        return np.load(self.chosen / f"{self.dataset.name}.validation.npy", mmap_mode="r")[self.first : self.last]

    def documents(self) -> np.ndarray:
        """The document numbers: int32 [size, 1 + negatives]."""
        width = 1 + self.dataset.negatives
        file = self.chosen / f"{self.dataset.name}.documents"
        return np.memmap(file, "<i4", "r", offset=self.first * width * 4, shape=(self.size, width))

    def lengths(self, kind: str) -> np.ndarray:
        return np.load(self.folder / f"{kind}_lengths.npy")

    def done(self) -> dict[str, Any]:
        return json.loads((self.folder / "done.json").read_text(encoding="utf-8"))

    def run(self, worker: Worker) -> None:
        query_lengths: list[int] = []
        document_lengths: list[int] = []
        sums = {"truncated_queries": 0, "truncated_documents": 0, "instructed_queries": 0}
        with new_folder(self.folder) as folder:
            writers = {split: Writer(folder / split) for split in SPLITS}
            documents = Writer(folder / "documents")
            for queries, new_texts, numbers, validation in self._read():
                sequences, count = _encode(worker.tokenizer, queries, self.max_length)
                sums["truncated_queries"] += count
                sums["instructed_queries"] += sum(query.startswith(INSTRUCTION) for query in queries)
                query_lengths += map(len, sequences)
                for query, row, is_validation in zip(sequences, numbers, validation, strict=True):
                    writers["validation" if is_validation else "train"].write(
                        {"dataset": self.dataset.name, "query": query, "passage": row[:1], "negatives": row[1:]}
                    )
                sequences, count = _encode(worker.tokenizer, new_texts, self.max_length)
                sums["truncated_documents"] += count
                document_lengths += map(len, sequences)
                for tokens in sequences:
                    documents.write({"tokens": tokens})
                worker.advance(len(queries))
            counts = {}
            for name, writer in (*writers.items(), ("documents", documents)):
                writer.close()
                counts[name] = {"records": writer.records, "bytes": writer.bytes}
            np.save(folder / "query_lengths.npy", np.array(query_lengths, "<u2"))
            np.save(folder / "document_lengths.npy", np.array(document_lengths, "<u2"))
            (folder / "done.json").write_text(json.dumps({**counts, **sums}), encoding="utf-8")

    def _read(self) -> Iterator[tuple[list[str], list[str], np.ndarray, np.ndarray]]:
        """Yields queries, texts of new documents, document numbers int64 [rows, 1 + negatives], validation flags."""
        rows, next_document = np.array(self.rows()), self.next_document
        all_numbers, all_validation = self.documents(), self.validation()
        read = read_rows(
            self.dataset,
            strip_instructions=self.strip_instructions,
            query_prompt=self.query_prompt,
            first=int(rows[0]),
            last=int(rows[-1]) + 1,
        )
        for first, columns in read:
            part = slice(*np.searchsorted(rows, [first, first + len(columns[0])]))
            if part.start == part.stop:
                continue
            places = rows[part] - first
            query, *documents = [column.take(places).to_pylist() for column in columns]
            numbers = np.array(all_numbers[part], np.int64)
            new, occurrence = np.unique(numbers, return_index=True)
            occurrence = occurrence[new >= next_document]
            row, column = np.unravel_index(occurrence, numbers.shape)
            yield query, [documents[c][r] for r, c in zip(row, column, strict=True)], numbers, all_validation[part]
            next_document += len(occurrence)


def _encode(tokenizer: Tokenizer, texts: list[str], max_length: int) -> tuple[list[np.ndarray], int]:
    """``tokenizer.encode``, about ``_TOKENIZER_CHARACTERS`` characters at a time."""
    sequences: list[np.ndarray] = []
    truncated = first = characters = 0
    for last, text in enumerate(texts, start=1):
        characters += len(text)
        if characters >= _TOKENIZER_CHARACTERS or last == len(texts):
            encoded, count = tokenizer.encode(texts[first:last], max_length)
            sequences += encoded
            truncated += count
            first, characters = last, 0
    return sequences, truncated
