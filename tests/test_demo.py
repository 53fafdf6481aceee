"""The embedded demo, and how its tables stay straight in every script."""

from __future__ import annotations

import contextlib
import re
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import f2llm_jax as f2llm
from f2llm_jax.cli import main
from f2llm_jax.demo import tiny, training
from f2llm_jax.demo.search import CODE_SEARCH, SHOWN, TOP, Search, report, search
from f2llm_jax.demo.texts import (
    HELD_OUT,
    LANGUAGES,
    descriptions,
    held_out_sentences,
    programs,
    sentences,
    training_sentences,
)
from f2llm_jax.display import isolate, one_line, shorten, width
from f2llm_jax.train.config import load_recipe, override
from f2llm_jax.train.source import open_loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_release(tmp_path_factory.mktemp("demo") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> f2llm.Encoder:
    return f2llm.load(folder)


@pytest.fixture(scope="module")
def result(model: f2llm.Encoder) -> Search:
    return search(model)


@pytest.fixture(scope="module")
def vectors(model: f2llm.Encoder, result: Search) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the queries and of the documents."""
    queries, documents = ([text.text for text in texts] for texts in (result.queries, result.documents))
    return model.encode_query(queries), model.encode_document(documents)


# --- texts


def test_every_sentence_is_there_in_every_language():
    texts = sentences()
    assert len(LANGUAGES) == 14
    assert len(texts) == 14 * 160
    assert len({(text.meaning, text.language) for text in texts}) == len(texts)
    assert all(text.text.strip() == text.text != "" for text in texts)


@pytest.mark.parametrize(
    ("language", "script"),
    [
        ("Korean", "HANGUL"),
        ("Arabic", "ARABIC"),
        ("Japanese", "HIRAGANA"),
        ("Hindi", "DEVANAGARI"),
        ("Thai", "THAI"),
        ("Hebrew", "HEBREW"),
        ("Greek", "GREEK"),
        ("Russian", "CYRILLIC"),
        ("Chinese", "CJK"),
    ],
)
def test_languages_are_in_their_scripts(language, script):
    for text in sentences():
        if text.language == language:
            assert script in " ".join(unicodedata.name(char, "") for char in text.text), text


def test_programs_and_descriptions_belong_together():
    assert [text.meaning for text in programs()] == [text.meaning for text in descriptions()]
    assert not {text.meaning for text in programs()} & {text.meaning for text in sentences()}


# --- the tiny release


def test_the_tiny_release_is_made_as_f2llm_is(folder, model):
    assert model.config == tiny.CONFIG
    assert model.prompts == {"query": tiny.QUERY_PROMPT, "document": ""}
    backend = model.tokenizer.backend
    assert backend.id_to_token(model.tokenizer.eos_id) == "<|im_end|>"
    assert backend.id_to_token(model.tokenizer.pad_id) == "<|endoftext|>"
    assert backend.get_vocab_size() <= tiny.CONFIG.vocab_size


def test_the_tiny_tokenizer_knows_all_languages(model):
    texts = [text.text for text in (*sentences(), *programs())]
    ids, _ = model.tokenizer.encode(texts, 10_000)
    assert model.tokenizer.backend.decode_batch([row[:-1].tolist() for row in ids]) == [
        unicodedata.normalize("NFC", text) for text in texts
    ]
    # It has learnt words: bytes alone would be one token each.
    assert sum(map(len, ids)) < sum(len(text.encode()) for text in texts) / 3
    # Digits stand alone, as in Qwen3's.
    assert len(backend_tokens(model, "2026")) == 4


def backend_tokens(model: f2llm.Encoder, text: str) -> list[int]:
    return model.tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_sentence_transformers_embeds_as_we_do_from_the_tiny_release(folder, result, vectors):
    from sentence_transformers import SentenceTransformer

    texts = [text.text for text in result.queries[::15]]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, prompt_name="query")
    np.testing.assert_allclose(vectors[0][::15], theirs, atol=5e-6)


def test_the_tiny_release_is_the_same_every_time(folder, tmp_path):
    again = tiny.build_release(tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


# --- the search


def test_candidates_are_the_texts_in_other_languages(result):
    scores = result.scores[8]
    for group, queries in result.groups.items():
        language = "English" if group == CODE_SEARCH else group
        for query in queries[:3]:
            candidates = {
                text.language for text, score in zip(result.documents, scores[query], strict=True) if score > -2
            }
            assert candidates == {*LANGUAGES.values(), "code"} - {language}
            right = [text for text, is_right in zip(result.documents, result.right_qn[query], strict=True) if is_right]
            assert {text.meaning for text in right} == {result.queries[query].meaning}
            assert len(right) == (1 if group == CODE_SEARCH else 13)


def test_hit_rate_and_rank_equal_a_plain_count(result):
    for group in ("Korean", CODE_SEARCH):
        queries = result.groups[group]
        for dim, scores in result.scores.items():
            hits = 0
            for query in queries:
                order = np.argsort(-scores[query], kind="stable")
                hits += bool(result.right_qn[query, order[0]])
                rank = 1 + next(n for n, number in enumerate(order) if result.right_qn[query, number])
                assert result.first_right(query, dim) == rank
            assert result.hit_rate(queries, dim) == pytest.approx(hits / len(queries))
    assert result.chance(result.groups["Korean"]) == pytest.approx(13 / (13 * HELD_OUT + 24))
    assert result.chance(result.groups[CODE_SEARCH]) == pytest.approx(1 / (13 * HELD_OUT + 24))


def test_scores_are_those_of_embeddings_cut_and_normalised(result, vectors):
    query, document = 5, 234
    for dim, scores in result.scores.items():
        a, b = vectors[0][query, :dim], vectors[1][document, :dim]
        assert scores[query, document] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_an_oracle_is_always_right(model):
    """A model that embeds the meaning: whatever the search says of it is known."""

    class Oracle:
        config = model.config

        def encode_query(self, texts: list[str], **options: object) -> np.ndarray:
            return self._embed([*held_out_sentences(), *descriptions()])

        def encode_document(self, texts: list[str], **options: object) -> np.ndarray:
            return self._embed([*held_out_sentences(), *programs()])

        def _embed(self, texts: list) -> np.ndarray:
            meanings = {text.meaning: None for text in (*sentences(), *programs())}
            vectors = np.random.default_rng(0).normal(size=(len(meanings), model.config.hidden_size))
            rows = dict(zip(meanings, vectors.astype(np.float32), strict=True))
            return np.stack([rows[text.meaning] for text in texts])

    found = search(Oracle())
    assert [found.hit_rate(found.everybody, dim) for dim in (16, 128)] == [1, 1]
    assert found.first_right(0, 128) == 1


# --- training


def test_what_is_searched_was_not_trained_on():
    trained, searched = ({text.meaning for text in texts} for texts in (training_sentences(), held_out_sentences()))
    assert len(trained) == 160 - HELD_OUT and len(searched) == HELD_OUT
    assert not trained & searched


def test_batches_pair_translations(model):
    texts = training_sentences()
    meanings = {unicodedata.normalize("NFC", text.text): (text.meaning, text.language) for text in texts}
    batches = list(training.batches(model, texts, 8))
    decode = model.tokenizer.backend.decode_batch

    def find(rows) -> list[tuple[str, str] | None]:
        tokens = [row[: length - 1].tolist() for row, length in zip(rows.tokens_bt, rows.lengths_b, strict=True)]
        return [meanings.get(text.removeprefix(tiny.QUERY_PROMPT)) for text in decode(tokens)]

    for batch in batches:
        assert len(set(batch.passage_ids_b.tolist())) == len(batch.passage_ids_b) == training.BATCH_SIZE
        pairs = [pair for pair in zip(find(batch.query), find(batch.passage), strict=True) if None not in pair]
        assert len(pairs) > training.BATCH_SIZE / 2  # some texts are cut
        assert all(query[0] == passage[0] and query[1] != passage[1] for query, passage in pairs)
    # The prompt comes before none of the queries at first, before all at last.
    prompt = model.tokenizer.backend.encode(tiny.QUERY_PROMPT, add_special_tokens=False).ids[:4]
    shares = [np.mean([row[:4].tolist() == prompt for row in batch.query.tokens_bt]) for batch in batches]
    assert shares[:2] == [0, 0] and 0 < shares[4] < 1 and shares[-2:] == [1, 1]


# --- the command


def test_demo_trains_and_prints_every_language_and_every_dim(capsys, tmp_path, model):
    assert main(["demo", "--steps", "3", "--folder", str(tmp_path / "tiny")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.split("\n")
    dims = tiny.CONFIG.matryoshka_dims
    header = next(n for n, line in enumerate(lines) if line.startswith("query "))
    assert lines[header].split() == ["query", *map(str, dims), "chance"]
    table = [re.fullmatch(r"([A-Za-z ]+?)((?: +\d+\.\d+)+)", line) for line in lines[header + 1 : header + 17]]
    assert [row[1].strip() for row in table] == [*LANGUAGES.values(), CODE_SEARCH, "all"]
    assert all(len(row[2].split()) == len(dims) + 1 for row in table)

    queries = {(text.meaning, text.language): text.text for text in sentences()}
    queries |= {(text.meaning, CODE_SEARCH): text.text for text in descriptions()}
    for shown in SHOWN:
        start = lines.index(f"{shown[1]}: {isolate(queries[shown])}")
        found = [line.split()[:3] for line in lines[start + 2 : start + 2 + TOP]]
        assert [row[0].lstrip("*") or row[1] for row in found] == ["1", "2", "3"]
        assert re.findall(r"(\d+) at (\d+)", lines[start + 2 + TOP])[-1][1] == str(dims[-1])
        assert len(re.findall(r"\d+ at \d+", lines[start + 2 + TOP])) == len(dims)

    rates = re.search(r"([0-9.]+) % before training, ([0-9.]+) % after; by chance ([0-9.]+) %", captured.out)
    assert table[-1][2].split()[-2] == rates[2]
    assert table[-1][2].split()[-1] == f"{100 * (420 * 13 + 24) / (13 * HELD_OUT + 24) / 444:.2f}"
    assert "--model codefuse-ai/F2LLM-v2-80M" in captured.out
    (prepare, train) = (shlex.split(line)[1:] for line in lines[-3:-1])
    assert main([*prepare, "--workers", "1"]) == 0
    _, recipe, _, its_model, _, its_data, _, out = train
    with contextlib.closing(open_loader(override(load_recipe(recipe), [its_model, its_data]))) as loader:
        assert loader.steps == 13 * 4 and next(loader).examples <= 32 and out == str(tmp_path / "tiny-run")
    trained = f2llm.load(tmp_path / "tiny")
    assert trained.config == model.config and trained.prompts == model.prompts
    assert np.abs(trained.params["embed_tokens"] - model.params["embed_tokens"]).max() > 1e-5


def test_demo_with_a_model_uses_that_model(folder, result, capsys):
    assert main(["demo", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"loaded {folder}" in out
    assert "untrained" not in out
    assert f"{100 * result.hit_rate(result.everybody, 128):.1f}" in out.rstrip().splitlines()[-1].split()


def test_demo_refuses_a_folder_that_exists(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["demo", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"f2llm: error: {tmp_path} exists; the tiny model wants a new folder\n"


def test_no_line_of_the_report_is_wider_than_the_terminal(result):
    for columns in (60, 80, 200):
        lines = list(report(result, columns))
        tables = [line for line in lines if re.match(r"[ *] +[1-3] ", line)]
        assert len(tables) == TOP * len(SHOWN)
        assert max(map(width, tables)) <= columns
        # Scores and languages stand in the same columns whatever the script of the text behind them.
        assert all(re.match(r"[ *]    [1-3] {2,3}-?\d\.\d{3}  \S+ +", line) for line in tables)
        assert {len(re.match(r".{16}[A-Za-z]+ *", line)[0]) for line in tables} == {26}


# --- text in columns


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("abc", 3),
        ("한국어", 6),
        ("日本語", 6),
        ("ｆｕｌｌ", 8),
        ("ｱｲｳ", 3),
        ("e\u0301", 1),  # a letter and its accent
        ("हिन्दी", 5),  # two vowel signs take a column of their own, the virama none
        ("ที่", 1),  # a Thai consonant with vowel and tone above it
        ("שָׁלוֹם", 4),
        ("a\u200bb", 2),
    ],
)
def test_width(text, columns):
    assert width(text) == columns


def test_shorten_keeps_what_fits_and_whole_characters():
    assert shorten("日本語", 6) == "日本語"
    assert shorten("日本語", 5) == "日本…"
    assert shorten("日本語", 4) == "日…"  # half a character is none
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("ที่นี่ดี", 2) == "ที่…"
    for text in ("할머니는 차를", "תשרב جدتي", "मेरी दादी"):
        for columns in range(1, 20):
            assert width(shorten(text, columns)) <= columns


def test_one_line_has_no_breaks_and_no_control_characters():
    assert one_line(" a\n\tb\r\n c\u2028d ") == "a b c d"
    assert one_line("\x1b[31mred\x07\u202ereversed\u2066") == "[31mredreversed"
    assert one_line("नमस्\u200dते") == "नमस्\u200dते"  # a joiner belongs to the spelling


def test_right_to_left_text_is_isolated_and_other_text_is_left_alone():
    assert isolate("שלום") == "\u2068שלום\u2069"
    assert isolate("room 7: جدتي") == "\u2068room 7: جدتي\u2069"
    assert isolate("한국어, deutsch") == "한국어, deutsch"
    assert width(isolate("שלום")) == 4
