"""Compares the speed of training steps, ours and PyTorch's, in one run.

    python benchmarks/train_speed.py --data ../shared/data
    python benchmarks/train_speed.py --data ../shared/data --device gpu --size 0.6B --queries 4

Both sides use the same batches of real text (DATA/train_raw, the Qwen3 tokenizer), weights, losses, optimizer and
schedule: hard-negative and in-batch losses at every Matryoshka size, AdamW, clipping. PyTorch's side is the reference's
loop, as its repository describes it, around transformers' Qwen3Model: rows padded to the longest of the batch, EOS
pooling. Our side is what training does by default, with the texts of a batch in packed rows; --layout bucketed gives it
PyTorch's rows. In float32, both sides are float32 throughout. In bfloat16, PyTorch trains bfloat16 weights, as the
reference does; our weights are float32, with bfloat16 products.

The two sides take turns of two steps, of which the second is timed: during the first, the kernel hands one side the
pages that the other had, which costs ours up to 2 s and PyTorch's up to 1 s. The ratio is the median of the ratios of
neighbouring turns, so that whatever slows the machine for a while slows both sides. They are not slowed equally,
though: when another process takes a core, PyTorch's step takes several times the processor time, and ours does not. On
a machine that was not idle, two runs of the same row gave 0.70 and 3.59. Needs the ``train`` and ``test`` extras.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from encode import machine
from inputs import write_release

import f2llm_jax
from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS
from f2llm_jax.embedding import Batch
from f2llm_jax.losses import TEMPERATURE, matryoshka_weights
from f2llm_jax.train.batch import AnyTrainBatch, TrainBatch
from f2llm_jax.train.data import TrainBatches, TrainingData
from f2llm_jax.train.meter import Work
from f2llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.train.packing import TrainPacking
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.step import ComputeConfig, LossConfig, TrainState, batch_rows, train_step

DATASETS = {"paragraphs": "xquad_en", "sentences": "tatoeba_deu"}

# Queries per batch; each has a passage and 7 negatives.
QUERIES = {"cpu": {"paragraphs": 2, "sentences": 16}, "gpu": {"paragraphs": 16, "sentences": 128}}

# GPUs have practically no matrix units for float32.
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",)}
OPTIMIZER = OptimizerConfig(learning_rate=4e-5)
TOTAL_STEPS = 1000

MAX_LENGTH = 256

Step = Callable[[Any], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", choices=QUERIES, default="cpu")
    parser.add_argument("--size", choices=MODELS, default="80M", help="of the model; default: %(default)s")
    parser.add_argument("--batches", nargs="+", choices=DATASETS, default=list(DATASETS), help="which; default: both")
    parser.add_argument("--queries", type=int, help="a batch; default: what suits the 80M and the device")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; default: %(default)s")
    parser.add_argument("--layout", choices=("packed", "bucketed"), default="packed", help="ours; default: %(default)s")
    parser.add_argument("--remat", default="dots", help="our rematerialisation policy; default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory on the same card
    if jax.default_backend() != args.device:
        raise SystemExit(f"JAX sees no {args.device}, but {jax.devices()}; JAX_PLATFORMS and its extras say which")
    print(f"{args.size} shape, {machine(args.device, 'jax', 'torch', 'transformers')}\n")
    print("| batches | dtype | our rows | PyTorch's rows | ours, examples/s | PyTorch, examples/s | ratio | losses |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        release = write_release(Path(folder, "release"), args.size, args.data / "qwen3-tokenizer")
        for kind in args.batches:
            prepared = Path(folder, kind)
            prepare(args.data / "train_raw", release, prepared, include=(DATASETS[kind],), max_length=MAX_LENGTH)
            queries = QUERIES[args.device][kind] if args.queries is None else args.queries
            batches = first_batch(prepared, queries, args.layout)
            for dtype in DTYPES[args.device]:
                ours, theirs = our_step(release, dtype, args.remat), torch_step(release, dtype, args.device)
                print(row(kind, dtype, batches, list(timed(ours, theirs, batches, args.rounds))), flush=True)
                del ours, theirs


def first_batch(prepared: Path, size: int, layout: str) -> tuple[AnyTrainBatch, TrainBatch]:
    """The first batch, in our layout and in that of PyTorch's side."""
    packing = TrainPacking.on(jax.default_backend())
    packed, padded = (
        TrainBatches(TrainingData(prepared, packing=option), batch_size=size)[0].batch for option in (packing, None)
    )
    assert isinstance(padded, TrainBatch)
    padded = own_length(padded)
    return packed if layout == "packed" else padded, padded


def own_length(batch: TrainBatch) -> TrainBatch:
    """Trims the rows to the longest query and the longest document, so that neither side pads more than the other."""

    def cut(rows: Batch, length: int) -> Batch:
        return Batch(rows.tokens_bt[:, :length], rows.lengths_b)

    assert batch.negatives is not None
    documents = max(batch.passage.lengths_b.max(), batch.negatives.lengths_b.max())
    return batch._replace(
        query=cut(batch.query, batch.query.lengths_b.max()),
        passage=cut(batch.passage, documents),
        negatives=cut(batch.negatives, documents),
    )


def timed(
    ours: Step, theirs: Step, batches: tuple[AnyTrainBatch, TrainBatch], rounds: int
) -> Iterator[tuple[float, float, float, float]]:
    """Seconds and losses of both sides: first of the steps that compile, then of the second step of each round."""
    our_batch, torch_batch = batches
    for number in range(1 + rounds):
        if number:
            ours(our_batch)
        start = time.perf_counter()
        our_loss = ours(our_batch)
        our_seconds = time.perf_counter() - start
        if number:
            theirs(torch_batch)
        start = time.perf_counter()
        torch_loss = theirs(torch_batch)
        yield our_seconds, time.perf_counter() - start, our_loss, torch_loss


def row(
    kind: str,
    dtype: str,
    batches: tuple[AnyTrainBatch, TrainBatch],
    rounds: list[tuple[float, float, float, float]],
) -> str:
    _, _, our_loss, torch_loss = rounds[0]  # the first round compiles, and shows that both sides compute the same
    our_seconds, torch_seconds = (statistics.median(column) for column in list(zip(*rounds[1:], strict=True))[:2])
    ratio = statistics.median(theirs / ours for ours, theirs, _, _ in rounds[1:])
    size = len(batches[1].query.lengths_b)
    cells = [
        kind,
        dtype,
        *map(shape_of, batches),
        f"{size / our_seconds:.2f}",
        f"{size / torch_seconds:.2f}",
        f"{ratio:.2f}",
        f"{our_loss:.4f} / {torch_loss:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def shape_of(batch: AnyTrainBatch) -> str:
    """The shapes of a batch's rows, and the share of padding."""
    work = Work.of(batch)
    runs = " + ".join("{} x {}".format(*rows.tokens_bt.shape) for rows in batch_rows(batch))
    return f"{runs}, {1 - work.tokens / work.computed_tokens:.0%} padding"


def our_step(release: Path, dtype: str, remat: str) -> Step:
    model = f2llm_jax.load(release)
    optimizer = make_optimizer(OPTIMIZER, TOTAL_STEPS)
    update = jax.jit(
        functools.partial(
            train_step,
            config=model.config,
            loss=LossConfig(mrl_dims=model.config.matryoshka_dims[:-1], mask_duplicates=False),
            compute=ComputeConfig(dtype=dtype, remat=remat),
            optimizer=optimizer,
            in_batch=True,
        ),
        donate_argnums=0,
    )
    state = TrainState(np.int32(0), model.params, optimizer.init(model.params))

    def step(batch: AnyTrainBatch) -> float:
        nonlocal state
        state, metrics = update(state, batch)
        return float(metrics["loss"])

    return step


def torch_step(release: Path, dtype: str, device: str) -> Step:
    where = torch.device({"cpu": "cpu", "gpu": "cuda"}[device])
    model = transformers.AutoModel.from_pretrained(release, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.to(where).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.b1, OPTIMIZER.b2),
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, OPTIMIZER.warmup_steps, TOTAL_STEPS)
    weights = matryoshka_weights(model.config.hidden_size, ModelConfig.from_release(release).matryoshka_dims[:-1])

    def states(rows: Batch) -> torch.Tensor:
        tokens_bt, lengths_b = (torch.tensor(x, dtype=torch.long, device=where) for x in rows)
        mask_bt = torch.arange(tokens_bt.shape[1], device=where) < lengths_b[:, None]
        states_btd = model(input_ids=tokens_bt, attention_mask=mask_bt, use_cache=False).last_hidden_state
        return states_btd[torch.arange(len(lengths_b), device=where), lengths_b - 1].float()

    def step(batch: TrainBatch) -> float:
        query_bd, passage_bd, negatives_md = (states(rows) for rows in batch[:3])
        size = len(query_bd)
        documents_bnd = torch.cat([passage_bd[:, None], negatives_md.reshape(size, -1, negatives_md.shape[1])], dim=1)
        own = torch.arange(size, device=where)
        loss: Any = 0.0
        for dim, weight in weights.items():
            query, documents = (torch.nn.functional.normalize(x[..., :dim], dim=-1) for x in (query_bd, documents_bnd))
            hard = torch.nn.functional.cross_entropy(
                torch.einsum("bd,bnd->bn", query, documents) / TEMPERATURE, torch.zeros_like(own)
            )
            in_batch = torch.nn.functional.cross_entropy(query @ documents[:, 0].T / TEMPERATURE, own)
            loss = loss + weight * (hard + in_batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
