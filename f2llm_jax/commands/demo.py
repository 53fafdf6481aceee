"""Train a tiny model for a minute and search across languages with it, or search with a given model.

Without --model it needs no network and no weights: it writes a tiny release folder (tokenizer learnt from the bundled
text, random weights), trains it on 130 sentences in fourteen languages, and searches 30 other sentences and some code,
before and after training. Training needs the packages of f2llm-jax[train].

--folder keeps the model, and the sentences in FOLDER/raw in the format of f2llm prepare. The commands printed at the
end train the model further on them, with the recipe tiny of f2llm train.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_jax.commands import add_progress, needs_extra, positive, show_progress
from f2llm_jax.errors import InputError

if TYPE_CHECKING:
    from f2llm_jax.demo.search import Search

REAL_MODEL = "codefuse-ai/F2LLM-v2-80M"
RAW = "raw"


def declare(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--model", metavar="M", help=f"release folder, converted folder or hub id, for example {REAL_MODEL}"
    )
    group.add_argument("--folder", type=Path, help="a new folder to keep the tiny model in; default: a temporary one")
    parser.add_argument("--steps", type=positive, metavar="N", help="of training; default: about a minute on two cores")
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    if args.model is not None:
        _search(args.model, args)
        return
    if args.folder is not None and args.folder.exists():
        raise InputError(f"{args.folder} exists; the tiny model wants a new folder")
    with tempfile.TemporaryDirectory(prefix="f2llm-demo-") as temporary:
        untrained, trained = Path(temporary) / "untrained", args.folder or Path(temporary) / "trained"
        before = _build(untrained)
        _train(untrained, trained, args)
        after = _search(trained, args)
    print()
    print(f"Right at first rank: {_rate(before)} before training, {_rate(after)} after; by chance {_chance(after)}.")
    print(f"A real model: f2llm demo --model {REAL_MODEL}")
    if args.folder is None:
        print("To keep this one, and the text that it was trained on: f2llm demo --folder tiny")
    else:
        for line in _next_commands(args.folder):
            print(line)


def _next_commands(folder: Path) -> tuple[str, str, str]:
    """The commands that train the kept model further with the recipe ``tiny``."""
    model, data = shlex.quote(str(folder)), shlex.quote(f"{folder}-data")
    return (
        "To train it further:",
        f"f2llm prepare --raw {shlex.quote(str(folder / RAW))} --tokenizer {model} --task '*=retrieval' --out {data}",
        f"f2llm train tiny --set model={model} --set data.path={data} --out {shlex.quote(f'{folder}-run')}",
    )


def _build(folder: Path) -> Search:
    """Writes the tiny release, and searches with its random weights."""
    from f2llm_jax.compilation import use_compilation_cache
    from f2llm_jax.demo.search import search
    from f2llm_jax.demo.tiny import build_release
    from f2llm_jax.encoder import load

    use_compilation_cache()
    start = time.perf_counter()
    build_release(folder)
    print(f"built a tiny release with random weights ({time.perf_counter() - start:.1f} s)")
    result = search(load(folder))
    print(f"untrained, it finds a right text first for {_rate(result)} of queries; chance is {_chance(result)}")
    return result


def _train(untrained: Path, out: Path, args: argparse.Namespace) -> None:
    """Trains the release and writes the result as another release."""
    from f2llm_jax.convert.export import export_release
    from f2llm_jax.demo.texts import HELD_OUT, LANGUAGES, training_sentences
    from f2llm_jax.encoder import load

    with needs_extra("train"):
        from f2llm_jax.demo.training import STEPS, train_tiny, write_raw

    model, texts = load(untrained), training_sentences()
    meanings = len(texts) // len(LANGUAGES)
    print(f"training it on {meanings} sentences in {len(LANGUAGES)} languages; {HELD_OUT} others are for searching ...")
    start = time.perf_counter()
    params = train_tiny(model, texts, steps=args.steps or STEPS, show_progress=show_progress(args))
    export_release(params, model.config, out, like=untrained)
    if args.folder is not None:
        write_raw(texts, out / RAW, prompt=model.prompts["query"])
    print(f"trained ({time.perf_counter() - start:.1f} s)")


def _search(model: str | Path, args: argparse.Namespace) -> Search:
    """Searches with a model and prints the results."""
    from f2llm_jax.demo.search import report, search
    from f2llm_jax.demo.texts import LANGUAGES
    from f2llm_jax.encoder import load
    from f2llm_jax.model import count_parameters

    encoder = load(model)
    print(f"loaded {model}: {count_parameters(encoder.config):,} parameters")
    start = time.perf_counter()
    result = search(encoder, show_progress=show_progress(args))
    print(
        f"embedded {len(result.queries)} queries and {len(result.documents)} texts in {len(LANGUAGES)} languages and "
        f"code ({time.perf_counter() - start:.1f} s)"
    )
    print("Each query is compared with all texts in other languages; * marks those that mean the same.")
    print()
    for line in report(result, shutil.get_terminal_size((100, 24)).columns):
        print(line)
    return result


def _rate(result: Search) -> str:
    return f"{100 * result.hit_rate(result.everybody, max(result.scores)):.1f} %"


def _chance(result: Search) -> str:
    return f"{100 * result.chance(result.everybody):.1f} %"
