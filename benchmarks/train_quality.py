"""Trains a small model from random weights on real text, and measures what it learns: writes docs/training.md.

    python benchmarks/train_quality.py --data ../shared/data --work DIR

DATA holds train_raw/*.parquet in the released layout, xquad/ and bitext/ (the last 10 % of the questions, and the pairs
after the first 900, are in no training file), and qwen3-tokenizer/. Two runs, with and without Matryoshka losses but
otherwise equal, start from the same weights and see the same batches. DIR keeps finished work: after a kill, the same
command resumes. The time of a process that a SIGTERM stopped is counted, that of one killed outright is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import jax
import pyarrow
from inputs import write_params
from pyarrow import parquet
from tables import markdown

import f2llm_jax
from f2llm_jax.config import ModelConfig
from f2llm_jax.evaluation.embedders import Embedder, F2LLMEmbedder
from f2llm_jax.evaluation.own_data import evaluate_bitext, evaluate_retrieval
from f2llm_jax.model import count_parameters, init_params
from f2llm_jax.train.average import average_run
from f2llm_jax.train.config import DataConfig, IntervalConfig, TrainConfig
from f2llm_jax.train.loop import train
from f2llm_jax.train.optimizer import OptimizerConfig
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.source import open_loader
from f2llm_jax.train.step import ComputeConfig, LossConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"

CONFIG = ModelConfig(
    vocab_size=151936,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=1e6,
    max_position_embeddings=512,
    dtype="float32",
)
# Enough for most paragraphs as a whole; with 64 tokens, most of the answers would be cut off.
MAX_LENGTH = 192
BATCH_SIZE = 32
# Embedding values start at about 0.02, and AdamW moves them by up to the learning rate in each step. At 2e-3, words
# that a question shares with its paragraph soon no longer match, and nothing as good is learnt instead.
LEARNING_RATE = 5e-4
DIMS = (None, 64, 32, 16)
MRL_DIMS = (8, 16, 32, 64)
RUNS = {"with Matryoshka": MRL_DIMS, "without": ()}

# Held back from training: the pairs of each language from this index on, and the questions after this share of them.
HELD_BACK_PAIRS = 900
TRAINED_QUESTIONS = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the prepared data, the runs and scores")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder of training.md and training.png")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start = build_release(args.data / "qwen3-tokenizer", args.work / "start")
    scores = {"before": measured(start, args.data, args.work / "before.json")}
    for name, mrl_dims in RUNS.items():
        folder = args.work / name.replace(" ", "-")
        trained = train_one(start, args.data, args.work, folder, mrl_dims, args.epochs)
        scores[name] = measured(trained, args.data, folder / "scores.json")
    args.out.mkdir(exist_ok=True)
    runs = [json.loads((args.work / name.replace(" ", "-") / "figures.json").read_text()) for name in RUNS]
    plot(scores, args.out / "training.png")
    (args.out / "training.md").write_text(page(scores, runs, args.epochs), encoding="utf-8")
    print((args.out / "training.md").read_text(encoding="utf-8"))


def build_release(tokenizer: Path, folder: Path) -> Path:
    """A release with random weights around the real tokenizer."""
    if folder.exists():
        return folder
    params = jax.jit(init_params, static_argnames="config")(CONFIG, jax.random.key(0))
    return write_params(folder, params, CONFIG, tokenizer, query_prompt="")


def train_one(start: Path, data: Path, work: Path, folder: Path, mrl_dims: tuple[int, ...], epochs: int) -> Path:
    """A run, from the prepared data to a release; resumes where it stopped."""
    prepared, trained = work / "prepared", folder / "release"
    if trained.exists():
        return trained
    if not prepared.exists():
        # Without instructions, as in stage 1: to random weights, texts with a common beginning look the same.
        raw = write_raw(data / "train_raw", work / "raw")
        prepare(raw, start, prepared, stage=1, max_length=MAX_LENGTH, show_progress=True)
    config = TrainConfig(
        model=str(start),
        epochs=epochs,
        data=DataConfig(path=str(prepared), batch_size=BATCH_SIZE, max_length=MAX_LENGTH),
        loss=LossConfig(mrl_dims=mrl_dims),
        optim=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=100),
        compute=ComputeConfig(dtype="float32", remat="none"),
        every=IntervalConfig(log=50, validation=0, checkpoint=400, keep=1),
    )
    file = folder / "figures.json"
    earlier = json.loads(file.read_text()) if file.exists() else {"seconds": 0, "processor_seconds": 0}
    begun, processor = time.perf_counter(), time.process_time()
    with contextlib.closing(open_loader(config)) as loader:
        outcome = train(config, loader, folder, resume=True, show_progress=True)
    figures = {
        "steps": outcome.total,
        "seconds": earlier["seconds"] + time.perf_counter() - begun,
        "processor_seconds": earlier["processor_seconds"] + time.process_time() - processor,
    }
    file.write_text(json.dumps(figures))
    if not outcome.finished:
        raise SystemExit(f"stopped after step {outcome.step} of {outcome.total}; the same command goes on")
    average_run(folder, trained, last=1)  # the last checkpoint alone
    return trained


def write_raw(files: Path, folder: Path) -> Path:
    """Writes the training files with one negative per query: the first of its 24 that is another query's passage.

    Other negatives may be held-back paragraphs and sentences; a model would learn that these are never the answer.
    """
    folder.mkdir(exist_ok=True)
    for file in [*files.glob("xquad_*.parquet"), *files.glob("tatoeba_*.parquet")]:
        rows = parquet.read_table(file).to_pylist()
        passages = {row["passage"] for row in rows}
        kept = [{**row, "negative_1": other} for row in rows if (other := trained_negative(row, passages))]
        columns = ("query", "passage", "negative_1")
        parquet.write_table(pyarrow.Table.from_pylist(kept).select(columns), folder / file.name)
    return folder


def trained_negative(row: dict[str, str], passages: set[str]) -> str | None:
    negatives = (text for name, text in row.items() if name.startswith("negative_"))
    return next((text for text in negatives if text in passages and text != row["passage"]), None)


def measured(release: Path, data: Path, file: Path) -> dict[str, dict[str, float]]:
    """``score`` of a release, cached in a file."""
    if not file.exists():
        found = score(release, data)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def score(release: Path, data: Path) -> dict[str, dict[str, float]]:
    """{metric, "ndcg@10" or "accuracy": {size: mean over languages}}."""
    model = F2LLMEmbedder(release.name, f2llm_jax.load(release), max_length=MAX_LENGTH)
    model.prompts["bitext"] = ""
    languages = sorted(file.stem.removesuffix("_queries") for file in data.glob("xquad/*_queries.parquet"))
    retrieval = [ndcg(model, data / "xquad", language) for language in languages]
    files = sorted(file for file in data.glob("bitext/*.parquet") if (data / f"train_raw/tatoeba_{file.name}").exists())
    bitext = [accuracy(model, file) for file in files]
    return {"ndcg@10": mean(retrieval), "accuracy": mean(bitext)}


def ndcg(model: Embedder, xquad: Path, language: str) -> dict[int, float]:
    """nDCG@10 of the held-back questions of a language against all its paragraphs, {size: score}."""
    corpus = parquet.read_table(xquad / f"{language}_corpus.parquet").to_pylist()
    questions = parquet.read_table(xquad / f"{language}_queries.parquet").to_pylist()
    held_back = list(enumerate(questions))[round(TRAINED_QUESTIONS * len(questions)) :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lines(folder / "corpus.jsonl", ({"_id": str(row["id"]), "text": row["text"]} for row in corpus))
        write_lines(folder / "queries.jsonl", ({"_id": str(n), "text": row["query"]} for n, row in held_back))
        (folder / "qrels").mkdir()
        lines = ["query-id\tcorpus-id\tscore", *(f"{n}\t{row['corpus_id']}\t1" for n, row in held_back)]
        (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        report = evaluate_retrieval([model], folder, dims=DIMS)
    return {row.dim: row.scores["ndcg@10"] for row in report.rows}


def accuracy(model: Embedder, file: Path) -> dict[int, float]:
    """How often a held-back sentence finds its English translation among those of its language, {size: share}."""
    pairs = parquet.read_table(file).slice(HELD_BACK_PAIRS).to_pylist()
    with tempfile.TemporaryDirectory() as name:
        held_back = Path(name, "pairs.jsonl")
        write_lines(held_back, ({"text": row["text"], "english": row["english"]} for row in pairs))
        report = evaluate_bitext([model], held_back, columns=("text", "english"), dims=DIMS)
    return {row.dim: row.scores["accuracy"] for row in report.rows}


def write_lines(file: Path, rows: Iterator[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def mean(of: list[dict[int, float]]) -> dict[str, float]:
    return {str(dim): fmean(scores[dim] for scores in of) for dim in of[0]}


PAGE = """\
# What training learns

Written by `python benchmarks/train_quality.py --data ../shared/data --work DIR`; do not edit.

A model of {parameters:,} parameters ({hidden} hidden, {layers} layers, the real Qwen3 tokenizer) starts from random
weights and trains {steps:,} steps of {batch_size} queries (epochs: {epochs}, learning rate {learning_rate}) on 26,568
questions (XQuAD, 8 languages) and translations (Tatoeba, 20 languages into English), each with one negative, which is
another query's passage: once with Matryoshka losses at 8, 16, 32, 64 and the full size, once at the full size alone;
all else is the same. Texts are cut to {max_length} tokens, also for the scores. The two runs took {processor} minutes
of processor time ({minutes} minutes on the clock) on the CPU ({machine}), with f2llm_jax {version} and jax {jax}. No
pretrained weights take part: the scores say what so short a training does, not how good a released model is.

nDCG@10 of 952 held-back XQuAD questions, each against the 240 paragraphs of its language; mean over 8 languages:

{ndcg}

Accuracy of 2,000 held-back Tatoeba sentences, each against the 100 English sentences of its language; mean over 20:

{accuracy}

![both scores against the dimension](training.png)

{finding}
"""


def page(scores: dict[str, dict[str, dict[str, float]]], runs: list[dict[str, float]], epochs: int) -> str:
    return PAGE.format(
        parameters=count_parameters(CONFIG),
        hidden=CONFIG.hidden_size,
        layers=CONFIG.num_hidden_layers,
        epochs=epochs,
        max_length=MAX_LENGTH,
        steps=runs[0]["steps"],
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        minutes=" and ".join(str(round(run["seconds"] / 60)) for run in runs),
        processor=" and ".join(str(round(run["processor_seconds"] / 60)) for run in runs),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        version=version("f2llm-jax"),
        jax=version("jax"),
        ndcg=table(scores, "ndcg@10"),
        accuracy=table(scores, "accuracy"),
        finding=finding(scores),
    )


def finding(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """A summary of the results, whichever way they turn out."""
    full, matryoshka, without = str(CONFIG.hidden_size), scores["with Matryoshka"], scores["without"]
    return "\n".join(
        f"{title}, with Matryoshka: {scores['before'][metric][full]:.3f} before and {matryoshka[metric][full]:.3f} "
        f"after at the full size,\n{scores['before'][metric]['16']:.3f} and {matryoshka[metric]['16']:.3f} at 16 "
        f"dimensions; after training without: {without[metric][full]:.3f} and {without[metric]['16']:.3f}.\n"
        for metric, title in (("ndcg@10", "nDCG@10"), ("accuracy", "Bitext accuracy"))
    )


def table(scores: dict[str, dict[str, dict[str, float]]], metric: str) -> str:
    dims = list(scores["before"][metric])[::-1]
    rows = [[name, *(f"{of[metric][dim]:.3f}" for dim in dims)] for name, of in scores.items()]
    return markdown(["", *dims], rows, text=1)


def plot(scores: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    titles = {"ndcg@10": "nDCG@10, XQuAD", "accuracy": "accuracy, Tatoeba"}
    for axes, (metric, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, of in scores.items():
            axes.plot([int(dim) for dim in of[metric]], list(of[metric].values()), "o-", label=name)
        axes.set(title=title, xlabel="dimension", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims := [int(dim) for dim in scores["before"][metric]], map(str, dims))
        axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
