"""Turn raw training data into tokenised TensorFlow Datasets.

Reads a folder of .parquet and .jsonl files, one per dataset, with columns (in .jsonl, keys)
  query, passage, negative_1, negative_2, …          the released data
  anchor (or query), positive, negative(_1, _2, …)   sentence-transformers
  query, pos, neg                                    FlagEmbedding: lists of texts
  query, positive_passages, negative_passages        Tevatron: lists of {title, text}
or the columns named by --columns; a row with several positives becomes one row for each. Writes
  OUT/examples/1.0.0   TFDS in ArrayRecord, splits train and validation (99/1): query tokens, numbers of documents
  OUT/documents/1.0.0  TFDS in ArrayRecord: the tokens of every distinct document, once
  OUT/report.md, .json what was read, dropped, capped and kept

A row is dropped if its query, its passage or one of its negatives is empty, or a negative equals the passage. With
--fill-negatives, empty negatives are left out, and the row's others are repeated if they are too few, as is always done
if rows have lists of different lengths; a row without negatives is dropped if other rows have some. A .jsonl line that
is not such a record is an error.

Every text ends with the EOS, even if it is truncated. --stage 1 removes the prefix `Instruct: …\\nQuery: ` from all
texts. --stage 2 keeps texts as they are: queries of the released data carry their instructions; none are added to
documents, as neither the data nor the paper says which tasks are symmetric. --query-prompt is prepended to queries
that begin neither with it nor with Instruct:; models exported by f2llm train have it as their query prompt, unless the
recipe sets another. In bash, write a line break as in --query-prompt $'Instruct: Find the answer.\\nQuery: '.

A dataset's task type comes from the table in configs/datasets.py, or from --task. GLOB is a dataset's name, with * for
anything; @stage1 stands for the sources of stage 1, @overlapping for those that overlap MTEB (mkqa_*, sib200).

OUT appears when it is complete, or not at all; a command that was killed leaves OUT.incomplete, and the same command
resumes from there. The output depends only on the input and these options, not on --workers, --memory or interruptions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from f2llm_jax.commands import add_progress, needs_extra, positive, show_progress
from f2llm_jax.configs.datasets import Task


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--raw", required=True, type=Path, metavar="DIR", help="a folder of .parquet and .jsonl files")
    parser.add_argument("--tokenizer", required=True, metavar="M", help="release folder, converted folder or hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="default: %(default)s")
    parser.add_argument(
        "--cap", type=int, metavar="N", help="queries per source; default: 80000 in stage 2, none (0) in stage 1"
    )
    parser.add_argument(
        "--source", action="append", default=[], metavar="GLOB", help="datasets under one cap, such as 'paracrawl_*'"
    )
    parser.add_argument("--include", action="append", metavar="GLOB", help="take these datasets alone")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave these datasets out")
    parser.add_argument(
        "--task", action="append", default=[], type=_task, metavar="GLOB=TASK", help="task type of datasets of your own"
    )
    parser.add_argument(
        "--columns", type=_columns, metavar="query=NAME,…", help="query=NAME,passage=NAME,negatives=NAME of other files"
    )
    parser.add_argument(
        "--negatives", type=int, default=24, metavar="N", help="keep the first N of a row; default: %(default)s"
    )
    parser.add_argument("--fill-negatives", action="store_true", help="repeat a row's negatives in place of empty ones")
    parser.add_argument("--query-prompt", default="", metavar="TEXT", help="a text to put before queries")
    parser.add_argument(
        "--max-length", type=positive, default=2048, metavar="N", help="cut texts to N tokens; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cap's choice and of the split")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core")
    parser.add_argument(
        "--memory", type=positive, default=512, metavar="MB", help="for finding equal documents; default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, and drop unfinished work")
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    with needs_extra("train"):
        from f2llm_jax.train.prepare import prepare
        from f2llm_jax.train.report import totals

    report = prepare(
        args.raw,
        args.tokenizer,
        args.out,
        stage=args.stage,
        cap=args.cap,
        sources=args.source,
        include=args.include or ("*",),
        exclude=args.exclude,
        tasks=dict(args.task),
        columns=args.columns,
        negatives=args.negatives,
        fill_negatives=args.fill_negatives,
        query_prompt=args.query_prompt,
        max_length=args.max_length,
        seed=args.seed,
        workers=args.workers,
        memory=args.memory << 20,
        force=args.force,
        show_progress=show_progress(args),
    )
    sums = totals(report)
    print(
        f"{args.out}: {sums['train']} + {sums['validation']} examples, {report['documents']} distinct documents; "
        f"{sums['dropped']} rows dropped, {sums['capped']} over the cap"
    )


def _task(text: str) -> tuple[str, str]:
    glob, separator, task = text.rpartition("=")
    if not separator or task not in get_args(Task):
        raise argparse.ArgumentTypeError(f"must be GLOB=TASK with TASK one of {', '.join(get_args(Task))}, not {text}")
    return glob, task


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key and separator and name for key, separator, name in pairs):
        raise argparse.ArgumentTypeError(f"must be query=NAME,passage=NAME,negatives=NAME, not {text}")
    return {key: name for key, _, name in pairs}
