"""Measures what distillation and pruning gain, at a scale for two cores; writes docs/distillation.md and .png.

    python benchmarks/distill.py WORK --data ../shared/data [--minutes 8]

A teacher is trained from scratch, and then smaller students: pruned from it or with random weights, with distillation
from it or without, three seeds each. DATA holds train_raw/, xquad/ and bitext/. WORK keeps finished work: when
--minutes are over, or after a kill, the same command resumes. Everything is what f2llm prepare, prune, teach and train
do at full size, but with few steps, and with rows of two lengths only, so that few programs are compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import pickle
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pyarrow import parquet
from tables import markdown
from tqdm import tqdm

import f2llm_jax
from f2llm_jax.compilation import use_compilation_cache
from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.export import export_release
from f2llm_jax.demo.tiny import learn_tokenizer, write_settings
from f2llm_jax.embedding import Batch
from f2llm_jax.evaluation.metrics import retrieval_scores
from f2llm_jax.evaluation.ranking import cosines
from f2llm_jax.model import Params, count_parameters, init_params
from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train.batch import TrainBatch
from f2llm_jax.train.data import TrainBatches, TrainingData
from f2llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.prune import prune
from f2llm_jax.train.step import ComputeConfig, LossConfig, TrainState, train_step
from f2llm_jax.train.teacher import TeacherStore, teach

DOCS = Path(__file__).resolve().parent.parent / "docs"

TEACHER = ModelConfig(
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e6,
    max_position_embeddings=512,
    dtype="float32",
)
STUDENT = dataclasses.replace(TEACHER, hidden_size=64, intermediate_size=192, num_hidden_layers=1)

BATCH_SIZE = 32
ROW_LENGTHS = (64, 128)
MAX_LENGTH = ROW_LENGTHS[-1]
TEACHER_STEPS, STUDENT_STEPS = 400, 100
# Weights start at about 0.02. A rate of 1e-3 moves them by a twentieth per step, and the ability of random weights to
# match equal words is lost before anything is learnt: after 100 steps of a teacher of three layers, nDCG@10 was 3, and
# with its random weights 14.
TEACHER_RATE, STUDENT_RATE = 3e-4, 3e-4
SEEDS = (0, 1, 2)

# The languages of the translation pairs: the eight of the questions and paragraphs, except English.
PAIRS = ("ara", "cmn", "deu", "hin", "rus", "spa", "tur")

# The questions and the pairs from these indices on were held back from train_raw.
HELD_BACK = {"xquad": 1071, "bitext": 900}

PAGE = """\
# Distillation at a small scale

Written by `python benchmarks/distill.py WORK --data ../shared/data`; do not edit.

Is a small model better cut out of its teacher than begun from random weights, and better distilled than trained alone?
The paper (arXiv:2603.19223) prunes the 0.6B and distils, and reports for the 80M a mean over 350 tasks of 58.04 with
distillation and 53.37 without (Table 4). This page asks the same of models that two CPU cores can train from nothing.

- **Teacher**: {teacher}. Random weights, {teacher_steps} steps.
- **Students**: {student}. {student_steps} steps each, {seeds} seeds: of the order of the data, and of random weights.
- **Data**: questions with their paragraphs in 8 languages (XQuAD), sentences with their English translations in the
  other {pairs} (Tatoeba), {batch} a batch, without instructions; in-batch loss at every Matryoshka size, texts cut to
  {length} tokens of a vocabulary of 8,192 learnt from them; no hard negatives. Peak learning rates {teacher_rate:g}
  and {student_rate:g}.
- **Distillation**: `f2llm teach` once, then the recipe's loss, the mean squared difference of unnormalised states, the
  teacher's cut to the student's width, added to the other. All students see the same number of batches.
- **Scores**: nDCG@10 of the tenth of the questions that was held back, among the 240 paragraphs of their language;
  accuracy of finding the translation among 100 held-back pairs of a language. Means over languages, in %.

{table}

± is the standard deviation over the seeds. Others, once each:

| | nDCG@10 | accuracy |
|---|---:|---:|
{others}

| effect, points | nDCG@10 | accuracy |
|---|---:|---:|
{effects}

{finding}
Students see {examples:,} examples, {share:.0%} of an epoch: this says what distillation does at the very start of
training, and nothing of its end.

![scores of every seed, and the loss in training](distillation.png)

Of the teacher's {from_hidden} hidden channels the pruned model keeps {hidden}, {in_place} of them
at the places where distillation compares them. Energy kept: {energy}.

{minutes:.0f} minutes of training on {machine}, jax {jax}, waiting for other work on the same machine included.
"""

OTHERS = {
    "the teacher": "teacher",
    "the teacher's random weights, before its training": "untrained",
    "the pruned model, before its training": "pruned",
}

COMPUTE = ComputeConfig(dtype="float32", remat="none")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make a student."""

    pruned: bool
    distilled: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{'pruned' if self.pruned else 'random'}-{'distilled' if self.distilled else 'alone'}-{self.seed}"


ARMS = [Arm(*choice) for choice in itertools.product((True, False), (True, False), SEEDS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=600, help="stop after the piece of work that exceeds them")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder of distillation.md and .png")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    use_compilation_cache()
    study = Study(args.work.resolve(), args.data, time.monotonic() + 60 * args.minutes)
    try:
        study.run_pieces()
    except StoppedError:
        print("to be continued")
        return
    study.write_page(args.out)
    print(args.out / "distillation.md")


class StoppedError(Exception):
    """The time is up; finished work is kept."""


class Study:
    """The pieces of work; each leaves its result in the folder, and is skipped if the result is there."""

    def __init__(self, work: Path, source: Path, deadline: float):
        self.work, self.source, self.deadline = work, source, deadline
        self.base, self.teacher, self.pruned = (work / name for name in ("random", "teacher", "pruned"))
        self.data, self.states = work / "data", work / "states"

    def run_pieces(self) -> None:
        """Does the remaining work; several processes can share the students."""
        with self.claimed("teacher", wait=True):
            for piece in (self.prepare, self.score_random, self.train_teacher, self.prune_and_teach, self.score_pruned):
                piece()
        for arm in ARMS:
            with self.claimed(arm.name) as mine:
                if mine:
                    self.train_student(arm)
        if not all((self.work / f"{arm.name}.json").exists() for arm in ARMS):
            raise StoppedError

    @contextlib.contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Claims a piece of work; yields whether this process has it to itself."""
        with (self.work / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.work / f"{name}.json").read_text())

    def write_result(self, name: str, **values: Any) -> None:
        new = self.work / f"{name}.new"
        new.write_text(json.dumps(values, indent=1))
        new.rename(self.work / f"{name}.json")
        print(name, {key: value for key, value in values.items() if not isinstance(value, list)}, flush=True)

    def prepare(self) -> None:
        """Makes the tokenizer, a random model and the training data: questions and pairs, without hard negatives."""
        if self.data.exists():
            return
        raw = self.work / "raw"
        raw.mkdir(exist_ok=True)
        texts: list[str] = []
        pairs = [self.source / f"train_raw/tatoeba_{name}.parquet" for name in PAIRS]
        for file in [*sorted(self.source.glob("train_raw/xquad_*")), *pairs]:
            table = parquet.read_table(file, columns=["query", "passage"])
            parquet.write_table(table, raw / file.name)
            texts += [text for column in table.columns for text in column.to_pylist()]
        tokenizer = learn_tokenizer(texts, TEACHER.vocab_size - 64)
        with tempfile.TemporaryDirectory() as settings:
            write_settings(Path(settings), tokenizer, TEACHER)
            params = init_params(TEACHER, jax.random.key(0))
            export_release(params, TEACHER, self.base, like=settings, prompts={"query": "", "document": ""}, force=True)
        # Without instructions, as in stage 1: to random weights, texts with a common beginning look the same.
        prepare(raw, self.base, self.data, stage=1, workers=1, max_length=MAX_LENGTH)

    def batches(self, seed: int, store: TeacherStore | None = None) -> TrainBatches:
        data = TrainingData(self.data, max_length=MAX_LENGTH, teacher=store)
        return TrainBatches(data, batch_size=BATCH_SIZE, epochs=100, seed=seed)

    def train_teacher(self) -> None:
        if (self.work / "teacher.json").exists():
            return
        params = f2llm_jax.load(self.base).params
        params, values = self.run("teacher", params, TEACHER, self.batches(100), TEACHER_STEPS, TEACHER_RATE)
        export_release(params, TEACHER, self.teacher, like=self.base, force=True)
        self.write_result("teacher", **values, **self.score(params, TEACHER))

    def prune_and_teach(self) -> None:
        """Makes the weights of the pruned student, and the teacher's states."""
        if self.states.exists():
            return
        prune(
            self.teacher,
            self.pruned,
            calibration=self.data,
            hidden=STUDENT.hidden_size,
            mlp=STUDENT.intermediate_size,
            layers=STUDENT.num_hidden_layers,
            texts=1024,
            max_length=MAX_LENGTH,
            force=True,
        )
        teach(self.data, self.teacher, self.states, dtype="float32", max_length=MAX_LENGTH, dim=STUDENT.hidden_size)

    def score_random(self) -> None:
        """Scores random weights: a study whose teacher is no better says nothing."""
        if not (self.work / "untrained.json").exists():
            self.write_result("untrained", **self.score(f2llm_jax.load(self.base).params, TEACHER))

    def score_pruned(self) -> None:
        if not (self.work / "pruned.json").exists():
            self.write_result("pruned", **self.score(f2llm_jax.load(self.pruned).params, STUDENT))

    def train_student(self, arm: Arm) -> None:
        if (self.work / f"{arm.name}.json").exists():
            return
        params = init_params(STUDENT, jax.random.key(arm.seed))
        if arm.pruned:
            params = f2llm_jax.load(self.pruned).params
        batches = self.batches(arm.seed, TeacherStore(self.states) if arm.distilled else None)
        params, values = self.run(arm.name, params, STUDENT, batches, STUDENT_STEPS, STUDENT_RATE)
        self.write_result(arm.name, **values, **self.score(params, STUDENT))

    def run(
        self, name: str, params: Params, config: ModelConfig, batches: TrainBatches, steps: int, rate: float
    ) -> tuple[Params, dict[str, Any]]:
        """Trains; at the end and when the time is up, the state is saved for the next start."""
        optimizer = make_optimizer(OptimizerConfig(learning_rate=rate, warmup_steps=steps // 10), steps)
        step = jax.jit(
            functools.partial(
                train_step,
                config=config,
                loss=LossConfig(mrl_dims=config.matryoshka_dims[:-1]),
                compute=COMPUTE,
                optimizer=optimizer,
                in_batch=True,
            ),
            donate_argnums=0,
        )
        params = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        kept = self.work / f"{name}.state"
        log: list[dict[str, float]] = []
        seconds = 0.0
        if kept.exists():
            leaves, log, seconds = pickle.loads(kept.read_bytes())
            state = jax.tree.unflatten(jax.tree.structure(state), map(jnp.asarray, leaves))
        start = time.monotonic() - seconds
        for number in tqdm(range(int(state.step), steps), desc=name, mininterval=20):
            state, metrics = step(state, padded(batches[number].batch))
            if number % 5 == 4:
                log.append({key: float(metrics[key]) for key in ("in_batch", "distill")})
            done = number + 1 == steps
            if done or time.monotonic() > self.deadline:
                work = jax.tree.leaves(jax.device_get(state)), log, time.monotonic() - start
                kept.with_suffix(".new").write_bytes(pickle.dumps(work))
                kept.with_suffix(".new").rename(kept)
                if not done:
                    raise StoppedError
        return state.params, {"minutes": (time.monotonic() - start) / 60, "log": log}

    def score(self, params: Params, config: ModelConfig) -> dict[str, float]:
        """nDCG@10 of the held-back questions and accuracy of the held-back pairs, as means over languages."""
        tokenizer = Tokenizer.from_release(self.base)
        embed = functools.partial(embeddings, params, config, tokenizer)
        ndcg, accuracy = [], []
        for file in sorted(self.source.glob("xquad/*_queries.parquet")):
            language = file.name.removesuffix("_queries.parquet")
            queries = parquet.read_table(file)[HELD_BACK["xquad"] :].to_pylist()
            corpus = parquet.read_table(file.with_name(f"{language}_corpus.parquet")).to_pylist()
            scores_qn = cosines(embed([row["query"] for row in queries]), embed([row["text"] for row in corpus]))
            qrels = {str(number): {str(row["corpus_id"]): 1} for number, row in enumerate(queries)}
            found = {
                str(number): dict(zip((str(row["id"]) for row in corpus), map(float, scores), strict=True))
                for number, scores in enumerate(scores_qn)
            }
            ndcg.append(retrieval_scores(qrels, found)["ndcg@10"])
        for name in PAIRS:
            pairs = parquet.read_table(self.source / "bitext" / f"{name}.parquet")[HELD_BACK["bitext"] :].to_pylist()
            scores_nn = cosines(embed([row["text"] for row in pairs]), embed([row["english"] for row in pairs]))
            accuracy.append(float((scores_nn.argmax(axis=1) == np.arange(len(pairs))).mean()))
        return {"ndcg@10": float(np.mean(ndcg)), "accuracy": float(np.mean(accuracy))}

    def write_page(self, out: Path) -> None:
        arms = {
            (pruned, distilled): [self.result(Arm(pruned, distilled, seed).name) for seed in SEEDS]
            for pruned, distilled in itertools.product((True, False), (True, False))
        }
        rows = []
        for (cut, distilled), results in arms.items():
            cells = ["cut out of the teacher" if cut else "random", "yes" if distilled else "no"]
            for metric in ("ndcg@10", "accuracy"):
                values = [100 * result[metric] for result in results]
                cells.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
                cells.append(", ".join(f"{value:.1f}" for value in values))
            rows.append(cells)
        teacher = self.result("teacher")
        report = json.loads((self.pruned / "pruning.json").read_text())
        others = []
        for title, name in OTHERS.items():
            result = self.result(name)
            others.append(f"| {title} | {100 * result['ndcg@10']:.1f} | {100 * result['accuracy']:.1f} |")
        per_epoch = self.batches(0).steps_per_epoch
        text = PAGE.format(
            finding=finding(arms),
            examples=STUDENT_STEPS * BATCH_SIZE,
            share=STUDENT_STEPS / per_epoch,
            table=markdown(
                ["begins with weights", "distilled", "nDCG@10", "of each seed", "accuracy", "of each seed"],
                rows,
                text=2,
            ),
            others="\n".join(others),
            effects=effects(arms),
            seeds=len(SEEDS),
            from_hidden=TEACHER.hidden_size,
            teacher=sizes(TEACHER),
            student=sizes(STUDENT),
            in_place=sum(channel == place for place, channel in enumerate(report["hidden_channels"])),
            hidden=STUDENT.hidden_size,
            energy="; ".join(f"{name} {min(e):.0%} or more" for name, e in report["energy_kept"].items()),
            teacher_steps=TEACHER_STEPS,
            student_steps=STUDENT_STEPS,
            batch=BATCH_SIZE,
            length=MAX_LENGTH,
            pairs=len(PAIRS),
            teacher_rate=TEACHER_RATE,
            student_rate=STUDENT_RATE,
            minutes=sum(self.result(name)["minutes"] for name in ("teacher", *(arm.name for arm in ARMS))),
            machine=platform.machine(),
            jax=jax.__version__,
        )
        out.mkdir(exist_ok=True)
        (out / "distillation.md").write_text(text, encoding="utf-8")
        plot(arms, teacher, self.result("untrained"), out / "distillation.png")


def padded(batch: TrainBatch) -> TrainBatch:
    """The batch with rows padded to ``ROW_LENGTHS``."""

    def pad(rows: Batch) -> Batch:
        length = row_length(rows.tokens_bt.shape[1])
        return Batch(np.pad(rows.tokens_bt, ((0, 0), (0, length - rows.tokens_bt.shape[1]))), rows.lengths_b)

    return batch._replace(query=pad(batch.query), passage=pad(batch.passage))


def row_length(tokens: int) -> int:
    return next(length for length in ROW_LENGTHS if length >= tokens)


_embed = jax.jit(f2llm_jax.embed, static_argnames="config")


def embeddings(params: Params, config: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """float32 [n, hidden], in batches of ``BATCH_SIZE`` texts of about the same length."""
    sequences, _ = tokenizer.encode(texts, MAX_LENGTH)
    out_nd = np.zeros((len(texts), config.hidden_size), np.float32)
    order = sorted(range(len(texts)), key=lambda number: len(sequences[number]))
    for first in range(0, len(order), BATCH_SIZE):
        numbers = order[first : first + BATCH_SIZE]
        tokens_bt = np.full((BATCH_SIZE, row_length(len(sequences[numbers[-1]]))), tokenizer.pad_id, np.int32)
        lengths_b = np.ones(BATCH_SIZE, np.int32)
        for row, number in enumerate(numbers):
            lengths_b[row] = len(sequences[number])
            tokens_bt[row, : lengths_b[row]] = sequences[number]
        out_nd[numbers] = _embed(params, Batch(tokens_bt, lengths_b), config=config)[: len(numbers)]
    return out_nd


def means(arms: Mapping[tuple[bool, bool], list[dict[str, Any]]]) -> dict[tuple[bool, bool], np.ndarray]:
    """Means over the seeds of (nDCG@10, accuracy), in points."""
    return {
        arm: np.array([[100 * result[metric] for metric in ("ndcg@10", "accuracy")] for result in results]).mean(axis=0)
        for arm, results in arms.items()
    }


def effects(arms: Mapping[tuple[bool, bool], list[dict[str, Any]]]) -> str:
    """What each choice gains, in points: differences of the means over seeds."""
    mean = means(arms)
    lines = {
        "distilling a pruned student": mean[True, True] - mean[True, False],
        "distilling a random student": mean[False, True] - mean[False, False],
        "pruned instead of random, distilled": mean[True, True] - mean[False, True],
        "pruned instead of random, alone": mean[True, False] - mean[False, False],
    }
    return "\n".join(f"| {name} | {ndcg:+.1f} | {accuracy:+.1f} |" for name, (ndcg, accuracy) in lines.items())


def finding(arms: Mapping[tuple[bool, bool], list[dict[str, Any]]]) -> str:
    """A summary of the results, whichever way they turn out."""
    mean = means(arms)
    gain_ndcg, gain_accuracy = mean[True, True] - mean[True, False]
    agrees = gain_ndcg > 0 and gain_accuracy > 0
    return (
        f"Distilling the pruned student changes nDCG@10 by {gain_ndcg:+.1f} and accuracy by {gain_accuracy:+.1f}: "
        f"{'as' if agrees else 'not as'} in the paper."
    )


def sizes(config: ModelConfig) -> str:
    inner = count_parameters(config) - config.vocab_size * config.hidden_size
    layers = "1 layer" if config.num_hidden_layers == 1 else f"{config.num_hidden_layers} layers"
    return (
        f"{layers}, {config.hidden_size} hidden and {config.intermediate_size} MLP channels: "
        f"{count_parameters(config):,} parameters, {inner:,} without the embedding table"
    )


def plot(
    arms: Mapping[tuple[bool, bool], list[dict[str, Any]]],
    teacher: dict[str, Any],
    untrained: dict[str, Any],
    file: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    labels = [f"{'pruned' if p else 'random'}\n{'distilled' if d else 'alone'}" for p, d in arms]
    names = [label.replace("\n", ", ") for label in labels]
    for axes, metric in zip(panels, ("ndcg@10", "accuracy"), strict=False):
        for place, results in enumerate(arms.values()):
            values = [100 * result[metric] for result in results]
            axes.bar(place, np.mean(values), color=f"C{place}", alpha=0.5)
            axes.plot([place] * len(values), values, "o", color=f"C{place}")
        axes.axhline(100 * teacher[metric], linestyle="--", color="black", label="teacher")
        axes.axhline(100 * untrained[metric], linestyle=":", color="black", label="the same, untrained")
        axes.set_ylim(0, 1.3 * 100 * teacher[metric])  # room for the legend
        axes.set_xticks(range(len(labels)), labels)
        axes.set_title({"ndcg@10": "XQuAD, nDCG@10", "accuracy": "Tatoeba, accuracy"}[metric])
        axes.legend()
    for place, (name, results) in enumerate(zip(names, arms.values(), strict=True)):
        # Means over ten logged steps: batches of two kinds follow each other at random.
        loss = np.mean([[entry["in_batch"] for entry in result["log"]] for result in results], axis=0)
        smooth = np.convolve(loss, np.ones(10) / 10, "valid")
        panels[2].plot(5 * np.arange(10, 10 + len(smooth)), smooth, color=f"C{place}", label=name)
    panels[2].set(title="in-batch loss in training", xlabel="step")
    panels[2].legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
