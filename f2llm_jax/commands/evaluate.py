"""Evaluate a model on MTEB, or on your own retrieval and translation data.

Needs the extra [eval]: pip install 'f2llm-jax[eval]'.

--mteb and --benchmark run MTEB tasks with the official instructions; results go to RESULTS/results/MODEL/REVISION in
MTEB's layout, and the same command resumes a run that was stopped.

--retrieval takes a folder in BEIR's layout: corpus (_id, title, text), queries (_id, text) and qrels/test (query-id,
corpus-id, score), each as .jsonl, .parquet, .tsv or .csv. If queries are documents of the corpus, as in ArguAna,
--ignore-identical-ids leaves each out of its own ranking. --bitext takes a file with two columns of translations. Both
encode once, and score every size of --dims and every output of --outputs from that:
  float32   cosine similarity
  int8      one byte per dimension for documents
  binary    one bit per dimension for queries and documents, Hamming distance
  rescored  binary search for 400 candidates (--bitext: 16), ordered by the float query and the documents' bits
In the table, dtype is the dtype that the model computes in (--dtype), and output is the one of these that was compared.
M and st:M have the same prompts, those saved with M; for translations the saved BitextMining, or else MTEB's
instruction. If the prompts of models differ, they are printed below the table.
Results are printed as a table and written to RESULTS (--results) as retrieval.json and .png, or bitext.json and .png,
which replace those of an earlier run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_jax.commands import add_mesh, add_progress, mesh_of, positive, show_progress
from f2llm_jax.dtypes import DTYPES
from f2llm_jax.errors import InputError
from f2llm_jax.files import local_path

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from f2llm_jax.evaluation.embedders import Embedder
    from f2llm_jax.evaluation.own_data import Report


# What an option applies to, if not to everything.
USES = {
    **dict.fromkeys(("dims", "outputs", "compare"), ("retrieval", "bitext")),
    **dict.fromkeys(("split", "judged_only", "ignore_identical_ids"), ("retrieval",)),
    "columns": ("bitext",),
    "dim": ("mteb", "benchmark"),
    "instructions_of": ("mteb", "benchmark", "bitext"),
}

# Not given to argparse as defaults, so that an option that was given can be told from its default.
DEFAULTS = {"dims": "full", "outputs": "float32", "split": "test"}


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="release folder, converted folder or hub id")
    what = parser.add_argument_group("what to evaluate on (at least one)")
    what.add_argument("--mteb", nargs="+", default=[], metavar="TASK", help="MTEB tasks")
    what.add_argument("--benchmark", metavar="NAME", help='an MTEB benchmark, such as "MTEB(eng, v2)"')
    what.add_argument("--retrieval", type=Path, metavar="DIR", help="a folder in BEIR's layout")
    what.add_argument("--bitext", type=Path, metavar="FILE", help="a file of translations")
    own = parser.add_argument_group("for --retrieval and --bitext")
    own.add_argument("--dims", metavar="D,D,…", help=f"sizes, such as 8,64,full; default: {DEFAULTS['dims']}")
    own.add_argument("--outputs", metavar="O,O,…", help=f"default: {DEFAULTS['outputs']}")
    own.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="OTHER",
        help="another model, side by side; st:NAME is loaded by sentence-transformers. May be given several times",
    )
    own.add_argument("--split", help=f"which judgements of --retrieval; default: {DEFAULTS['split']}")
    own.add_argument("--judged-only", action="store_true", help="of --retrieval, leave out queries without a judgement")
    own.add_argument(
        "--ignore-identical-ids",
        action="store_true",
        help="of --retrieval, leave a document of a query's own id out of its ranking",
    )
    own.add_argument("--columns", nargs=2, metavar=("A", "B"), help="of --bitext, if it has more than two")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=DTYPES,
        help="of weights and of what they are multiplied with (st: models: bfloat16 for int8); default: %(default)s",
    )
    parser.add_argument("--dim", type=positive, help="for MTEB: the Matryoshka size; default: all")
    parser.add_argument(
        "--max-length", type=positive, metavar="N", help="cut texts to N tokens; default for MTEB: 8192"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens computed at a time (st: models: 32 texts)"
    )
    parser.add_argument(
        "--instructions-of",
        metavar="NAME",
        help="whose instructions in MTEB's registry to use; default: MODEL's own, or F2LLM-v2's if it is not there",
    )
    add_mesh(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    if not (args.mteb or args.benchmark or args.retrieval or args.bitext):
        raise InputError("nothing to evaluate on: give --mteb, --benchmark, --retrieval or --bitext")
    for name, uses in USES.items():
        if getattr(args, name) not in (None, False, []) and not any(getattr(args, use) for use in uses):
            raise InputError(f"--{name.replace('_', '-')} is for {' or '.join(f'--{use}' for use in uses)}")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.results = local_path(args.results)
    # Created once, when the first model that runs on it is loaded: JAX reserves most of a GPU's memory when it starts,
    # and a run with only sentence-transformers models needs that memory itself.
    mesh = functools.cache(lambda: mesh_of(args))
    evaluations = _own_data(args, mesh) if args.retrieval or args.bitext else []
    if args.mteb or args.benchmark:
        _run_mteb(args, mesh)
    for evaluate in evaluations:
        _show(args, evaluate())


def _run_mteb(args: argparse.Namespace, mesh: Callable[[], Mesh | None]) -> None:
    from f2llm_jax.evaluation.mteb_adapter import evaluate_mteb, mteb_model, mteb_table, mteb_tasks

    tasks = mteb_tasks(args.mteb, args.benchmark)
    model = mteb_model(
        args.model,
        dtype=args.dtype,
        dim=args.dim,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        mesh=mesh(),
        revision=args.revision,
        instructions_of=args.instructions_of,
    )
    print(mteb_table(evaluate_mteb(model, tasks, args.results, show_progress=show_progress(args))))


def _own_data(args: argparse.Namespace, mesh: Callable[[], Mesh | None]) -> list[Callable[[], Report]]:
    """The evaluations on your own data; all data is read and all models are found before the first one runs."""
    from f2llm_jax.evaluation import optional
    from f2llm_jax.evaluation.data import read_bitext, read_retrieval
    from f2llm_jax.evaluation.own_data import parse_dims, parse_outputs, score_bitext, score_retrieval

    optional("matplotlib")  # for the plot, at the end of the work
    settings: dict[str, Any] = {"dims": parse_dims(args.dims), "outputs": parse_outputs(args.outputs)}
    evaluations: list[Callable[[], Report]] = []
    if args.retrieval:
        models = _models(args, mesh)
        data = read_retrieval(
            args.retrieval,
            split=args.split,
            judged_only=args.judged_only,
            ignore_identical_ids=args.ignore_identical_ids,
        )
        evaluations.append(functools.partial(score_retrieval, models, str(args.retrieval), data, **settings))
    if args.bitext:
        models = _models(args, mesh)
        pairs = read_bitext(args.bitext, columns=tuple(args.columns) if args.columns else None)
        evaluations.append(functools.partial(score_bitext, models, str(args.bitext), pairs, **settings))
    return evaluations


def _models(args: argparse.Namespace, mesh: Callable[[], Mesh | None]) -> Iterator[Embedder]:
    """MODEL and the models to compare, loaded one after the other; all are found before the first is loaded."""
    from f2llm_jax.evaluation.embedders import SENTENCE_TRANSFORMERS, find_embedder, load_embedder

    # For MODEL and st:MODEL: a comparison of the two libraries needs the same weights and instructions.
    of_model = {"revision": args.revision, "instructions_of": args.instructions_of}
    plain = args.model.removeprefix(SENTENCE_TRANSFORMERS)
    names = dict.fromkeys([args.model, *args.compare])
    options = {name: of_model if name.removeprefix(SENTENCE_TRANSFORMERS) == plain else {} for name in names}
    for name in names:
        find_embedder(name, options[name].get("revision"))
    return (
        load_embedder(
            name,
            dtype=args.dtype,
            mesh=None if name.startswith(SENTENCE_TRANSFORMERS) else mesh(),
            max_length=args.max_length,
            batch_tokens=args.batch_tokens,
            show_progress=show_progress(args),
            **options[name],
        )
        for name in names
    )


def _show(args: argparse.Namespace, report: Report) -> None:
    from f2llm_jax.evaluation.report import plot, table, write_json

    print(table(report))
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(report, args.results / f"{report.task}.json")
    plot(report, args.results / f"{report.task}.png")
    print(f"{args.results / report.task}.json and .png written")
