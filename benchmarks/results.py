"""Writes docs/results.md: what an evaluation measures here, and what the paper publishes.

    python benchmarks/results.py --data ../shared/data

Uses no released weights: the models are made here, and the page describes them. --data is a folder with
xquad/LANGUAGE_corpus.parquet and _queries.parquet, bitext/LANGUAGE.parquet and qwen3-tokenizer/.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pyarrow
from pyarrow import parquet
from tables import markdown

from f2llm_jax.config import ModelConfig
from f2llm_jax.encoder import Encoder
from f2llm_jax.evaluation.embedders import F2LLMEmbedder
from f2llm_jax.evaluation.own_data import Report, Row, evaluate_bitext, evaluate_retrieval
from f2llm_jax.evaluation.ranking import OUTPUTS
from f2llm_jax.evaluation.report import plot
from f2llm_jax.model import init_params
from f2llm_jax.tokens import Tokenizer

DOCS = Path(__file__).resolve().parent.parent / "docs"

# As wide as the released 80M, with one layer that only averages.
CONFIG = ModelConfig(
    vocab_size=151936,
    hidden_size=320,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=320,
    rope_theta=1e6,
    max_position_embeddings=8192,
    dtype="float32",
)

# arXiv:2603.19223, Table 4: mean over 350 tasks, trained with and without distillation.
PUBLISHED = {
    "80M": (58.04, 53.37),
    "160M": (60.53, 56.27),
    "330M": (64.55, 62.77),
    "0.6B": (66.72, 65.87),
    "1.7B": (69.13, 68.58),
}

PAGE = """\
# Results

Written by `python benchmarks/results.py --data ../shared/data`; do not edit.

## Measured here

With f2llm_jax {f2llm_jax}, jax {jax}, pytrec-eval-terrier {metrics}, on the CPU ({machine}). **No released F2LLM-v2
weights were at hand**, so these are not their scores. Two models were made for this page, both with the real Qwen3
tokenizer, {dim} dimensions (as the released 80M has) and no prompts:

- **bag of words**: one layer whose attention averages random vectors of the tokens, weighted by how rare each is in
  Tatoeba's sentences. Nothing is trained. It finds documents that share words with a question, so a cut dimension
  costs it something, as it costs a trained model, though not the same: a Matryoshka-trained model puts more into its
  first dimensions, random vectors spread evenly.
- **random**: the same shape with random weights.

### Retrieval: XQuAD, 240 paragraphs and 1,190 questions a language

{languages}

### What a cut dimension costs

nDCG@10 of the bag of words, mean over the 8 languages, by what is stored of a document:

{dims}

Bytes per vector: 4 a dimension as float32, 1 as int8, 1/8 as binary and rescored. *rescored* searches by Hamming
distance and orders the best 400 (here: all 240) by the float query and the documents' bits.

![score against dimension and bytes, English](results.png)

### Bitext: Tatoeba, {languages_of_bitext} languages to English and back, {pairs} pairs

Mean over languages. xsim is an error rate.

{bitext}

## Published, not measured here

Of the paper (arXiv:2603.19223), Table 4: mean over 350 tasks of MTEB's benchmarks, with and without distillation.

{published}

The paper's Table 2, the scores by benchmark, could not be read where this page was written, and is not quoted from
memory. `f2llm evaluate codefuse-ai/F2LLM-v2-80M --benchmark "MTEB(Multilingual, v2)"` measures a released model, with
the instructions, length and dtype that its authors' entry in MTEB's registry states.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder of results.md and results.png")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_release(args.data / "qwen3-tokenizer")
    words, noise = bag_of_words(tokenizer, args.data / "bitext"), random_model(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        retrieval = {
            language: on_xquad(args.data / "xquad", language, Path(folder), words, noise)
            for language in sorted(
                file.name.removesuffix("_corpus.parquet") for file in args.data.glob("xquad/*_corpus*")
            )
        }
    bitext = [evaluate_bitext([words, noise], file) for file in sorted((args.data / "bitext").glob("*.parquet"))]
    args.out.mkdir(exist_ok=True)
    swept = [row for row in retrieval["en"].rows if row.model == words.name]
    plot(dataclasses.replace(retrieval["en"], data="XQuAD, English", rows=swept), args.out / "results.png")
    (args.out / "results.md").write_text(page(retrieval, bitext, words.name, noise.name), encoding="utf-8")
    print(args.out / "results.md")


def bag_of_words(tokenizer: Tokenizer, bitext: Path) -> F2LLMEmbedder:
    """A model that averages word vectors, weighted by rarity.

    Zero queries make attention uniform; embeddings far below the epsilon of the norms keep their relative lengths.
    """
    texts = [
        text
        for file in sorted(bitext.glob("*.parquet"))
        for column in parquet.read_table(file).columns
        for text in column.to_pylist()
    ]
    sequences, _ = tokenizer.encode(texts, CONFIG.max_position_embeddings)
    seen_v = np.bincount(np.concatenate([np.unique(ids) for ids in sequences]), minlength=CONFIG.vocab_size)
    rarity_v = np.log(len(texts) / (1 + seen_v))
    rarity_v[tokenizer.eos_id] = 0
    table_vd = np.random.default_rng(0).normal(size=(CONFIG.vocab_size, CONFIG.hidden_size)).astype(np.float32)
    params = jax.tree.map(np.zeros_like, jax.device_get(init_params(CONFIG, jax.random.key(0))))
    params["embed_tokens"] = table_vd * (1e-7 * rarity_v[:, None].astype(np.float32))
    one_dd = np.eye(CONFIG.hidden_size, dtype=np.float32)
    attention = params["layers"]["attention"]
    attention["v_proj"]["weight"] = one_dd[None, None]
    attention["o_proj"]["weight"] = one_dd[None, :, None]
    params["layers"]["input_norm"]["weight"] = np.ones((1, CONFIG.hidden_size), np.float32)
    params["norm"]["weight"] = np.ones(CONFIG.hidden_size, np.float32)
    return without_prompts("bag of words", params, tokenizer)


def random_model(tokenizer: Tokenizer) -> F2LLMEmbedder:
    return without_prompts("random", init_params(CONFIG, jax.random.key(1)), tokenizer)


def without_prompts(name: str, params: dict, tokenizer: Tokenizer) -> F2LLMEmbedder:
    embedder = F2LLMEmbedder(name, Encoder(jax.device_put(params), CONFIG, tokenizer))
    embedder.prompts["bitext"] = ""
    return embedder


def on_xquad(source: Path, language: str, folder: Path, words: F2LLMEmbedder, noise: F2LLMEmbedder) -> Report:
    """A report on one language: all sizes and outputs of one model, and the full size of the other."""
    corpus = parquet.read_table(source / f"{language}_corpus.parquet")
    queries = parquet.read_table(source / f"{language}_queries.parquet")
    ids = pyarrow.array([f"q{number}" for number in range(len(queries))])  # distinct from document ids
    beir = folder / language
    (beir / "qrels").mkdir(parents=True)
    parquet.write_table(corpus.rename_columns(["_id", "text"]), beir / "corpus.parquet")
    parquet.write_table(pyarrow.table({"_id": ids, "text": queries["query"]}), beir / "queries.parquet")
    parquet.write_table(
        pyarrow.table({"query-id": ids, "corpus-id": queries["corpus_id"], "score": [1] * len(queries)}),
        beir / "qrels" / "test.parquet",
    )
    report = evaluate_retrieval([words], beir, dims=CONFIG.matryoshka_dims, outputs=OUTPUTS)
    floor = evaluate_retrieval([noise], beir)
    return dataclasses.replace(report, rows=report.rows + floor.rows)


def page(retrieval: dict[str, Report], bitext: Sequence[Report], words: str, noise: str) -> str:
    full = CONFIG.hidden_size

    def of(model: str, output: str = "float32", dim: int = full) -> Callable[[Row], bool]:
        return lambda row: (row.model, row.output, row.dim) == (model, output, dim)

    def score(report: Report, wanted: Callable[[Row], bool], metric: str) -> float:
        return next(row.scores[metric] for row in report.rows if wanted(row))

    def mean(reports: Sequence[Report], wanted: Callable[[Row], bool], metric: str) -> str:
        return f"{np.mean([score(report, wanted, metric) for report in reports]):.4f}"

    metrics = ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100")
    reports = list(retrieval.values())
    by_language = [
        [
            language,
            *(f"{score(report, of(words), metric):.4f}" for metric in metrics),
            f"{score(report, of(noise), 'ndcg@10'):.4f}",
        ]
        for language, report in retrieval.items()
    ]
    by_language.append(
        ["mean", *(mean(reports, of(words), metric) for metric in metrics), mean(reports, of(noise), "ndcg@10")]
    )
    by_dim = [
        [str(dim), *(mean(reports, of(words, output, dim), "ndcg@10") for output in OUTPUTS)]
        for dim in CONFIG.matryoshka_dims
    ]
    by_model = [[model, *(mean(bitext, of(model), metric) for metric in bitext[0].metrics)] for model in (words, noise)]
    return PAGE.format(
        f2llm_jax=version("f2llm-jax"),
        jax=version("jax"),
        metrics=version("pytrec-eval-terrier"),
        machine=platform.machine(),
        dim=full,
        languages=markdown(["language", *metrics, "random: ndcg@10"], by_language, text=1),
        dims=markdown(["dimensions", *OUTPUTS], by_dim, text=1),
        languages_of_bitext=len(bitext),
        pairs=f"{sum(report.sizes['pairs'] for report in bitext):,}",
        bitext=markdown(["model", *bitext[0].metrics], by_model, text=1),
        published=markdown(
            ["size", "with distillation", "without"],
            [[size, *(f"{value:.2f}" for value in values)] for size, values in PUBLISHED.items()],
            text=1,
        ),
    )


if __name__ == "__main__":
    main()
