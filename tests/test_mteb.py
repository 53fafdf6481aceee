"""The MTEB adapter against mteb's own wrapper, mteb's mock tasks, and mteb's evaluators on real data."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from pyarrow import parquet
from releases import QWEN_TOKENIZER, SHARED, SMALL, bitext_files, skip_without_shared, write_release

import f2llm_jax as f2llm

mteb = pytest.importorskip("mteb")

from datasets import Dataset  # noqa: E402
from mteb.abstasks import AbsTaskBitextMining, AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel  # noqa: E402
from mteb.types import PromptType  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from f2llm_jax.cli import main  # noqa: E402
from f2llm_jax.evaluation import mteb_adapter, registry  # noqa: E402
from f2llm_jax.evaluation.embedders import load_embedder  # noqa: E402
from f2llm_jax.evaluation.mteb_adapter import MTEBEncoder, evaluate_mteb, mteb_model, mteb_tasks  # noqa: E402
from f2llm_jax.evaluation.own_data import evaluate_bitext, evaluate_retrieval  # noqa: E402

LANGUAGES = ("ar", "de", "en", "es", "hi", "ru", "tr", "zh")

# Real text for a model that costs next to nothing.
FLAT = dataclasses.replace(
    SMALL, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)

TEXTS = [
    "What is the capital of France?",
    "Paris is the capital and largest city of France, on the Seine. " * 8,
    "",
    "Die Katze schläft auf dem Sofa.",
    "猫在沙发上睡觉。",
    "a",
]


@pytest.fixture(scope="module")
def flat_release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    skip_without_shared()
    folder = write_release(tmp_path_factory.mktemp("flat"), FLAT, tokenizer=QWEN_TOKENIZER)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def flat(flat_release: Path) -> MTEBEncoder:
    return mteb_model(flat_release, dtype="float32")


@pytest.fixture(scope="module")
def ours(tiny_release: Path) -> MTEBEncoder:
    return mteb_model(tiny_release, dtype="float32")


@pytest.fixture(scope="module")
def theirs(tiny_release: Path) -> InstructSentenceTransformerModel:
    """mteb's wrapper with the arguments of its own registry; the dtype is that of the random release."""
    arguments = dict(registry.registered(registry.DEFAULT_INSTRUCTIONS).loader_kwargs)
    del arguments["model_kwargs"]
    return InstructSentenceTransformerModel(str(tiny_release), None, device="cpu", **arguments)


def loader(texts: list[str], batch_size: int = 32) -> DataLoader:
    return DataLoader(Dataset.from_dict({"text": texts}), batch_size=batch_size)


def encode(model: Any, task: str, prompt_type: PromptType | None, texts: list[str] = TEXTS, **options: Any):
    metadata = mteb.get_task(task).metadata
    split = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    batch_size = options.pop("batch_size", 32)
    return np.asarray(model.encode(loader(texts, batch_size), prompt_type=prompt_type, **split, **options))


@pytest.mark.parametrize(
    ("task", "prompt_type"),
    [
        ("NFCorpus", PromptType.query),  # an instruction of its own
        ("NFCorpus", PromptType.document),
        ("NQ", PromptType.query),  # that of all queries
        ("NQ", PromptType.document),
        ("STS17", None),
        ("Banking77Classification", None),
        ("TwentyNewsgroupsClustering.v2", None),
        ("BUCC.v2", None),
        ("Tatoeba", None),
    ],
)
def test_same_embeddings_as_mtebs_wrapper(
    ours: MTEBEncoder, theirs: InstructSentenceTransformerModel, task: str, prompt_type: PromptType | None
):
    mine, other = encode(ours, task, prompt_type), encode(theirs, task, prompt_type)
    assert mine.dtype == np.float32 and mine.shape == (len(TEXTS), 96)
    np.testing.assert_allclose(mine, other, rtol=0, atol=5e-6)
    if prompt_type == PromptType.document:
        bare = ours.model.encode(TEXTS)
        np.testing.assert_array_equal(mine, bare)


def test_the_instructions_are_the_registrys(ours: MTEBEncoder, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(ours.model, "encode", lambda texts, **options: seen.append(options))
    for task, prompt_type in [("NFCorpus", PromptType.query), ("NFCorpus", PromptType.document), ("STS17", None)]:
        encode(ours, task, prompt_type)
    entry = registry.registered("codefuse-ai/F2LLM-v2-330M").loader_kwargs
    template, prompts = entry["instruction_template"], entry["prompts_dict"]
    expected = [template.format(instruction=prompts[task]) for task in ("NFCorpus", "STS17")]
    assert [options["prompt"] for options in seen] == [expected[0], "", expected[1]]


def test_row_order_and_batch_sizes(ours: MTEBEncoder):
    whole = encode(ours, "NQ", PromptType.query)
    for batch_size in (1, 4):
        np.testing.assert_array_equal(encode(ours, "NQ", PromptType.query, batch_size=batch_size), whole)
    backwards = encode(ours, "NQ", PromptType.query, TEXTS[::-1])
    np.testing.assert_allclose(backwards[::-1], whole, atol=1e-6)


def test_any_mesh(tiny_release: Path, ours: MTEBEncoder):
    mesh = f2llm.make_mesh(data=2, fsdp=2, tensor=2)
    assert len(jax.devices()) == 8
    sharded = mteb_model(tiny_release, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(encode(sharded, "STS17", None), encode(ours, "STS17", None), atol=2e-6)


def test_similarity(ours: MTEBEncoder):
    a, b = np.random.default_rng(0).normal(size=(2, 5, 96)).astype(np.float32)
    expected = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    np.testing.assert_allclose(ours.similarity(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(ours.similarity_pairwise(a, b), np.diag(expected), atol=1e-6)
    np.testing.assert_array_equal(ours.similarity(a[1:3], b[4:]), ours.similarity(a, b)[1:3, 4:])


def test_mock_run_passes_on_all_text_tasks(ours: MTEBEncoder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = mteb.mock_run(ours)
    status = {name: result for name, result in results.items() if result is not None}  # None: pictures or sound
    assert {name: result for name, result in status.items() if not isinstance(result, mteb.TaskResult)} == {}
    assert len(status) > 20


# What mteb is told of a model


def test_model_meta_of_a_local_release(tiny_release: Path):
    meta = mteb_model(tiny_release).mteb_model_meta
    assert isinstance(f2llm.mteb_model(tiny_release), mteb.EncoderProtocol)
    assert meta.framework == ["JAX"]
    assert meta.name == f"local/{tiny_release.name}"
    assert meta.embed_dim == [8, 16, 32, 64, 96]
    assert (meta.max_tokens, meta.experiment_kwargs, meta.use_instructions) == (2048, None, True)
    assert meta.n_parameters == f2llm.count_parameters(f2llm.ModelConfig.from_release(tiny_release))
    assert meta.similarity_fn_name == "cosine" and meta.output_dtypes == "bfloat16"
    json.dumps(meta.to_dict(), default=str)


def test_model_meta_of_a_registered_model(tiny_release: Path, monkeypatch: pytest.MonkeyPatch):
    name = "codefuse-ai/F2LLM-v2-330M"
    monkeypatch.setattr(mteb_adapter, "find_release", lambda *_: tiny_release)
    meta, entry = mteb_model(name).mteb_model_meta, registry.registered(name)
    same = ("name", "languages", "license", "training_datasets", "citation", "reference", "release_date")
    assert [getattr(meta, field) for field in same] == [getattr(entry, field) for field in same]
    assert meta.framework == ["JAX"] and entry.framework != ["JAX"]
    assert isinstance(meta.embed_dim, list) and isinstance(entry.embed_dim, int)


def test_mteb_loads_a_matryoshka_size(ours: MTEBEncoder):
    small = ours.mteb_model_meta.load_model(embed_dim=16)
    heads = f2llm.matryoshka(encode(ours, "STS17", None), dims=(16,))
    np.testing.assert_allclose(encode(small, "STS17", None), heads[16], atol=1e-6)
    assert small.mteb_model_meta.embed_dim == 16
    assert small.mteb_model_meta.experiment_kwargs == {"dtype": "float32", "embed_dim": 16}
    with pytest.raises(ValueError, match="embedding dimension 17 is not in"):
        ours.mteb_model_meta.load_model(embed_dim=17)


def test_new_weights_are_a_new_revision(copied_release: Path):
    before = mteb_model(copied_release).mteb_model_meta.revision
    assert before == mteb_model(copied_release).mteb_model_meta.revision
    file = copied_release / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert mteb_model(copied_release).mteb_model_meta.revision != before


def test_lengths(tiny_release: Path, ours: MTEBEncoder, monkeypatch: pytest.MonkeyPatch):
    seen = []
    for model in (ours, mteb_model(tiny_release, max_length=7)):
        monkeypatch.setattr(model.model, "encode", lambda texts, **options: seen.append(options["max_length"]))
        encode(model, "STS17", None)
    assert seen == [2048, 7]  # the registry's 8,192, or the positions of this model if those are fewer
    assert registry.registered(registry.DEFAULT_INSTRUCTIONS).loader_kwargs["max_seq_length"] == 8192


def test_errors_are_named(tiny_release: Path, ours: MTEBEncoder, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(f2llm.InputError, match=r"dim must be within 1\.\.96, not 97"):
        mteb_model(tiny_release, dim=97)
    with pytest.raises(f2llm.InputError, match=r"knows no model 'a/b' .* mteb 2\.26\.24"):
        mteb_model(tiny_release, instructions_of="a/b")
    with pytest.raises(f2llm.InputError, match="intfloat/multilingual-e5-large states no instructions"):
        mteb_model(tiny_release, instructions_of="intfloat/multilingual-e5-large")
    with pytest.raises(f2llm.InputError, match="precision 'int8' is not supported"):
        encode(ours, "STS17", None, precision="int8")
    with pytest.raises(f2llm.InputError, match="Did you mean: 'STS17'"):
        mteb_tasks(["STS1777"])
    with pytest.raises(f2llm.InputError, match=r"'MTEB\(eng, v9\)' not found"):
        mteb_tasks(benchmark="MTEB(eng, v9)")


# Real tasks


def metadata(name: str, kind: str, subsets: list[str], main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="defined by a test",
        dataset={"path": "local", "revision": "1"},
        type=kind,
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs={subset: ["eng-Latn"] for subset in subsets},
        main_score=main_score,
    )


def columns(file: Path, *names: str) -> list[list]:
    values = parquet.read_table(file)
    return [values[name].to_pylist() for name in names]


class XQuAD(AbsTaskRetrieval):
    """The documents have padded numbers for ids: ties go by id, and must not depend on how ids are written."""

    metadata = metadata("XQuADLocal", "Retrieval", list(LANGUAGES), "ndcg_at_10")
    k_values = (1, 10, 100)

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = {}
        for language in LANGUAGES:
            ids, texts = columns(SHARED / "xquad" / f"{language}_corpus.parquet", "id", "text")
            queries, answers = columns(SHARED / "xquad" / f"{language}_queries.parquet", "query", "corpus_id")
            corpus = [{"id": f"d{i:03}", "title": "", "text": text} for i, text in zip(ids, texts, strict=True)]
            self.dataset[language] = {
                "test": {
                    "corpus": Dataset.from_list(corpus),
                    "queries": Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(queries)]),
                    "relevant_docs": {f"q{i}": {f"d{answer:03}": 1} for i, answer in enumerate(answers)},
                    "top_ranked": None,
                }
            }
        self.data_loaded = True

    def task_specific_scores(self, scores: dict, *args: Any, **kwargs: Any) -> dict[str, float]:
        """mteb rounds its own means to five digits."""
        return {
            f"exact_{name}": float(np.mean([query[key] for query in scores.values()]))
            for name, key in (("ndcg@10", "ndcg_cut_10"), ("recall@1", "recall_1"), ("recall@100", "recall_100"))
        }


BITEXT_FILES = slice(None, None, 8)  # of those of 106 languages


class Tatoeba(AbsTaskBitextMining):
    """The first 100 pairs of every eighth language."""

    metadata = metadata("TatoebaLocal", "BitextMining", [], "f1")
    pairs: int | None = 100

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = {}
        for file in bitext_files()[BITEXT_FILES]:
            first, second = (column[: self.pairs] for column in columns(file, "text", "english"))
            self.dataset[file.stem] = {"test": Dataset.from_dict({"sentence1": first, "sentence2": second})}
        self.hf_subsets = list(self.dataset)
        self.data_loaded = True


def scores_by_subset(model: MTEBEncoder, task: Any) -> dict[str, dict[str, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
    return {scores["hf_subset"]: scores for scores in results.task_results[0].scores["test"]}


def write_beir(folder: Path, split: dict[str, Any]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, key in (("corpus", "corpus"), ("queries", "queries")):
        rows = [{"_id": row["id"], "text": row["text"]} for row in split[key]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = [(query, document) for query, found in split["relevant_docs"].items() for document in found]
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))
    return folder


def test_xquad_scores_are_mtebs(flat: MTEBEncoder, flat_release: Path, tmp_path: Path):
    languages = ["ar"]
    task = XQuAD().filter_languages(None, hf_subsets=languages)
    task.load_data()
    folders = {language: write_beir(tmp_path / language, task.dataset[language]["test"]) for language in languages}
    theirs = scores_by_subset(flat, task)
    model = load_embedder(str(flat_release), dtype="float32")
    assert sorted(theirs) == languages
    for language, folder in folders.items():
        scores = evaluate_retrieval([model], folder).rows[0].scores
        for name in ("ndcg@10", "recall@1", "recall@100"):
            assert scores[name] == pytest.approx(theirs[language][f"exact_{name}"], abs=1e-6), (language, name)
        assert scores["mrr@10"] == pytest.approx(theirs[language]["mrr_at_10"], abs=1e-6), language
        assert 0.01 < scores["ndcg@10"] < 0.9


def test_tatoeba_scores_are_mtebs(flat: MTEBEncoder, flat_release: Path, tmp_path: Path):
    task = Tatoeba()
    task.load_data()
    theirs = scores_by_subset(flat, task)
    model = load_embedder(str(flat_release), dtype="float32")
    files = bitext_files()[BITEXT_FILES]
    assert sorted(theirs) == [file.stem for file in files]
    for file in files:
        part = tmp_path / file.name
        parquet.write_table(parquet.read_table(file).slice(0, task.pairs), part)
        scores = evaluate_bitext([model], part).rows[0].scores
        assert scores["accuracy"] == pytest.approx(theirs[file.stem]["accuracy"], abs=1e-6), file.stem
        assert scores["f1"] == pytest.approx(theirs[file.stem]["f1"], abs=1e-6), file.stem


def test_results_are_kept_and_runs_go_on(flat: MTEBEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = XQuAD().filter_languages(None, hf_subsets=["de", "en"])
    meta = flat.mteb_model_meta
    encoded = []
    encode_texts = flat.model.encode
    fail_after = 2

    def counted(texts: list[str], **options: Any) -> np.ndarray:
        if len(encoded) == fail_after:
            raise KeyboardInterrupt
        encoded.append(len(texts))
        return encode_texts(texts, **options)

    monkeypatch.setattr(flat.model, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_mteb(flat, [task], tmp_path)
    fail_after = -1
    results = evaluate_mteb(flat, [XQuAD().filter_languages(None, hf_subsets=["de", "en"])], tmp_path)
    assert encoded == [1190, 240] * 2  # nothing twice
    assert {scores["hf_subset"] for scores in results.task_results[0].scores["test"]} == {"de", "en"}
    folder = tmp_path / "results" / meta.model_name_as_path() / meta.revision / "experiments" / "dtype_float32"
    assert {file.name for file in folder.iterdir()} >= {"XQuADLocal.json", "model_meta.json"}
    assert json.loads((folder / "model_meta.json").read_text())["framework"] == ["JAX"]
    evaluate_mteb(flat, [XQuAD().filter_languages(None, hf_subsets=["de", "en"])], tmp_path)
    assert len(encoded) == 4


class FewQuestions(AbsTaskRetrieval):
    metadata = metadata("FewQuestions", "Retrieval", ["en"], "ndcg_at_10")

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        texts = [{"id": str(number), "title": "", "text": text} for number, text in enumerate(TEXTS)]
        relevant = {str(number): {str(number): 1} for number in range(len(TEXTS))}
        split = {"corpus": texts, "queries": [{"id": row["id"], "text": row["text"]} for row in texts]}
        split = {name: Dataset.from_list(rows) for name, rows in split.items()}
        self.dataset = {"en": {"test": {**split, "relevant_docs": relevant, "top_ranked": None}}}
        self.data_loaded = True


def test_mteb_command(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []

    def local_tasks(names: list[str], benchmark: str | None) -> list:
        asked.append((names, benchmark))
        return [FewQuestions()]

    monkeypatch.setattr(mteb_adapter, "mteb_tasks", local_tasks)
    arguments = ["--mteb", "FewQuestions", "--benchmark", "MTEB(eng, v2)", "--dim", "8", "--results", str(tmp_path)]
    assert main(["evaluate", str(tiny_release), *arguments]) == 0
    assert asked == [(["FewQuestions"], "MTEB(eng, v2)")]
    file = next(tmp_path.glob("results/*/*/experiments/embed_dim_8/FewQuestions.json"))
    score = json.loads(file.read_text())["scores"]["test"][0]["main_score"]
    assert f"FewQuestions  {score:.4f}" in capsys.readouterr().out


def test_mteb_command_on_a_mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []
    monkeypatch.setattr(mteb_adapter, "mteb_tasks", lambda *_: [])
    monkeypatch.setattr(mteb_adapter, "mteb_model", lambda _, **options: asked.append(options["mesh"]))
    monkeypatch.setattr(mteb_adapter, "evaluate_mteb", lambda *_, **__: None)
    monkeypatch.setattr(mteb_adapter, "mteb_table", lambda _: "")
    assert main(["evaluate", "m", "--mteb", "t", "--results", str(tmp_path), "--mesh", "all"]) == 0
    assert asked == [f2llm.make_mesh(data=8)]
