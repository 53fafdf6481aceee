"""Measures the memory of ``f2llm encode --corpus``: the same for a few shards and for a million rows.

    python benchmarks/corpus.py FOLDER --rows 1000000

writes Parquet files of short texts (Tatoeba sentences, numbered to make them distinct) and a tiny model with the real
tokenizer to FOLDER, encodes a few shards of rows, then all rows, each in its own process, and prints the peak resident
memory above that of a process that has just loaded the model. A tiny model shows the memory of the command itself;
every model adds its weights and the activations of one batch. FOLDER is deleted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import processes
import pyarrow
from inputs import new_folder, read_texts, write_params
from pyarrow import parquet

import f2llm_jax
from f2llm_jax.configs.models import MODELS

FILES = 8

LOAD = "import sys, f2llm_jax, f2llm_jax.cli; f2llm_jax.load(sys.argv[1])"


def main() -> None:
    data = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for texts and embeddings; it is made, and deleted at the end")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=262_144, help="rows of the run to compare with")
    parser.add_argument("--data", type=Path, default=data, help="the folder with tokenizer and texts")
    args = parser.parse_args()
    with new_folder(args.folder):
        model = write_model(args.folder / "model", args.data / "qwen3-tokenizer")
        loaded = processes.run([sys.executable, "-c", LOAD, str(model)])
        print(f"model loaded: {loaded / 1e6:.0f} MB resident")
        print("| rows | seconds | peak above the loaded model, MB | output, MB |")
        print("|---|---|---|---|")
        for rows in (args.few, args.rows):
            docs, out = args.folder / f"docs-{rows}", args.folder / f"out-{rows}"
            write_texts(docs, rows, args.data)
            command = [sys.executable, "-m", "f2llm_jax.cli", "encode", "--model", str(model), "--progress"]
            start = time.perf_counter()
            peak = processes.run([*command, "--corpus", f"{docs}/*.parquet", "--out", str(out)])
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in out.rglob("*.parquet"))
            print(f"| {rows:,} | {seconds:.1f} | {(peak - loaded) / 1e6:.0f} | {size / 1e6:.0f} |", flush=True)


def write_model(folder: Path, tokenizer: Path) -> Path:
    """A random model with one narrow layer and the real vocabulary."""
    config = dataclasses.replace(
        MODELS["80M"], hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return write_params(folder, f2llm_jax.init_params(config, jax.random.key(0)), config, tokenizer)


def write_texts(folder: Path, rows: int, data: Path) -> None:
    sentences = read_texts("short", 10_000, data)
    folder.mkdir()
    for number in range(FILES):
        numbers = range(number * rows // FILES, (number + 1) * rows // FILES)
        texts = [f"{sentences[n % len(sentences)]} {n}" for n in numbers]
        parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")


if __name__ == "__main__":
    main()
