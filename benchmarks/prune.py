"""Checks the three pruned sizes of the 0.6B at their real shapes: parameters, and equal embeddings in all libraries.

    python benchmarks/prune.py FOLDER --tokenizer ../shared/data/qwen3-tokenizer

writes a float32 0.6B release with random weights to FOLDER, prunes it with f2llm prune, and compares embeddings with
those of sentence-transformers and of transformers alone. FOLDER is deleted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import processes
from inputs import new_folder, random_params, write_params

from f2llm_jax.configs.models import MODELS

TEXTS = [
    "How do trees drink?",
    "나무는 뿌리로 물을 마신다.",
    "الخبز يُخبز في الفرن.",
    "def f(x):\n    return x",
    "",
    "東京",
]
SIZES = ("80M", "160M", "330M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="it is made, and deleted at the end")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    args = parser.parse_args()
    source, pruned, texts = (args.folder / name for name in ("0.6B", "pruned", "texts.txt"))
    with new_folder(args.folder):
        texts.write_text("\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8")
        print("| size | parameters | published | largest difference | seconds to prune | peak resident, GB |")
        print("|---|---|---|---|---|---|")
        config = dataclasses.replace(MODELS["0.6B"], dtype="float32")
        write_params(source, random_params(config), config, args.tokenizer)
        for size in args.sizes:
            start = time.perf_counter()
            command = [sys.executable, "-m", "f2llm_jax.cli", "prune", str(source), str(pruned), "--to", size]
            peak = processes.run([*command, "--calibration", str(texts), "--force"]) / 1e9
            seconds = time.perf_counter() - start
            found, difference = compare(pruned)
            published = {"80M": 80_084_288, "160M": 159_185_024, "330M": 334_349_184}[size]
            print(f"| {size} | {found:,} | {published:,} | {difference:.1e} | {seconds:.0f} | {peak:.1f} |", flush=True)


def compare(folder: Path) -> tuple[int, float]:
    """Number of parameters in PyTorch, and the largest difference of an embedding element from either reference."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import Qwen3Model

    import f2llm_jax

    model = f2llm_jax.load(folder)
    ours = model.encode(TEXTS)
    reference = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    found = sum(parameter.numel() for parameter in reference.parameters())
    theirs = reference.encode(TEXTS)
    del reference
    backbone = Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = [
            backbone(torch.tensor(ids[None])).last_hidden_state[0, -1] for ids in model.tokenizer.encode(TEXTS, 64)[0]
        ]
    alone = torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()
    return found, float(max(np.abs(ours - theirs).max(), np.abs(ours - alone).max()))


if __name__ == "__main__":
    main()
