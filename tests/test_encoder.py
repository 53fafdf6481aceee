"""What ``Encoder.encode`` promises: order, shapes, prompts, outputs, one warning, few compilations, a warm start."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import psutil
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import QUERY_PROMPT, TINY, edit_json, write_release
from sentence_transformers.util import quantize_embeddings

import f2llm_jax
from f2llm_jax import Batch, Encoder, compilation, encoder
from f2llm_jax.batching import Buckets
from f2llm_jax.errors import InputError, ReleaseError, warn
from f2llm_jax.packing import Packing

SAME_COSINE = 0.999999

WORDS = ["the", "quick", "brown fox", "dog", "한국어", "العربية", "हिन्दी", "日本語", "naïve", "👩‍🚀", "x=1;", "\n"]


def random_texts(count: int, words: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(0, words + 1))) for _ in range(count)]


# Of 1 to 125 tokens: a few batches, each of another shape, which is a program to compile.
TEXTS = random_texts(20, 12)


@pytest.fixture(scope="module")
def expected(tiny) -> np.ndarray:
    return tiny.encode(TEXTS)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to what another shape of the batch changes."""
    assert got.shape == expected.shape
    assert np.min(np.sum(got * expected, axis=-1)) >= SAME_COSINE
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_unit_rows_in_input_order(tiny, expected):
    assert expected.shape == (20, 96) and expected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-6)
    same(tiny.encode(TEXTS[::-1]), expected[::-1])
    order = np.random.default_rng(0).permutation(20)
    same(tiny.encode([TEXTS[i] for i in order]), expected[order])
    assert len(np.unique(expected.round(4), axis=0)) == len(set(TEXTS))


def test_one_text_alone_and_in_any_batch(tiny, expected):
    for text, row in zip(TEXTS[::2], expected[::2], strict=True):
        same(tiny.encode([text]), row[None])


@pytest.mark.parametrize("batch_tokens", [1, 50, 333, 100_000])
def test_batch_size_does_not_matter(tiny, expected, batch_tokens):
    same(tiny.encode(TEXTS, batch_tokens=batch_tokens), expected)


def test_buckets_do_not_matter(tiny, expected):
    """Another limit on the length makes other buckets."""
    for max_length in (400, 777, 2048):
        with no_warnings():
            same(tiny.encode(TEXTS, max_length=max_length), expected)


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=12), batch_tokens=st.sampled_from([8, 64, 2048]), data=st.data())
def test_any_texts_in_any_order(tiny, texts, batch_tokens, data):
    order = data.draw(st.permutations(range(len(texts))))
    straight = tiny.encode(texts, batch_tokens=2048)
    shuffled = tiny.encode([texts[i] for i in order], batch_tokens=batch_tokens)
    assert straight.shape == (len(texts), 96)
    if texts:
        same(shuffled, straight[list(order)])


def test_no_texts(tiny):
    for dim in (1, 8, 96):
        assert tiny.encode([], dim=dim).shape == (0, dim)
    assert tiny.encode([]).dtype == np.float32
    assert tiny.encode([], output="binary", dim=9).shape == (0, 2)
    assert tiny.encode_query(()).shape == (0, 96)


def test_one_string(tiny, expected):
    for index in (0, 1, 2):
        got = tiny.encode(TEXTS[index])
        assert got.shape == (96,)
        same(got, expected[index])
    assert tiny.encode("a", dim=8).shape == (8,)
    assert tiny.encode("a", output="ubinary", dim=17).shape == (3,)
    same(tiny.encode_query("a"), tiny.encode_query(["a"])[0])


def test_empty_strings(tiny):
    got = tiny.encode(["", "a", ""])
    same(got[0], got[2])
    same(tiny.encode(""), got[0])
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)


def test_any_sequence_of_strings(tiny, expected):
    same(tiny.encode(tuple(TEXTS)), expected)
    same(tiny.encode(np.array(TEXTS)), expected)
    same(tiny.encode(text for text in TEXTS), expected)


@pytest.mark.parametrize(("wrong", "kind"), [(None, "NoneType"), (3, "int"), (b"a", "bytes"), (["a"], "list")])
def test_what_is_no_string_is_named_by_index(tiny, wrong, kind):
    with pytest.raises(InputError, match=f"text 2 is a {kind}, not a string"):
        tiny.encode(["a", "b", wrong, "c", None])


@pytest.mark.parametrize("texts", ["\ud800", ["\ud800"]])
def test_what_is_no_unicode_is_named_by_index(tiny, texts):
    with pytest.raises(InputError, match="text 0"):
        tiny.encode(texts)


class Frame(list):
    """As pandas' DataFrame: to iterate over it gives the names of its columns."""

    ndim = 2


@pytest.mark.parametrize("wrong", [None, 3, {"a": "b"}, np.array("a"), Frame(["text"])])
def test_what_is_no_list_is_refused(tiny, wrong):
    with pytest.raises(InputError, match=f"not a {type(wrong).__name__}"):
        tiny.encode(wrong)


def test_prompts(tiny, expected):
    with_prompt = tiny.encode([QUERY_PROMPT + text for text in TEXTS])
    assert np.abs(with_prompt - expected).max() > 0.01
    same(tiny.encode(TEXTS, prompt_name="query"), with_prompt)
    same(tiny.encode(TEXTS, prompt=QUERY_PROMPT), with_prompt)
    same(tiny.encode_query(TEXTS), with_prompt)
    same(tiny.encode(TEXTS, prompt_name="document"), expected)
    same(tiny.encode_document(TEXTS), expected)


def test_a_prompt_is_computed_once_a_row(tiny, monkeypatch):
    """Be it given as such or with the texts; also where some are too long for such rows, or begin otherwise."""
    texts = [*random_texts(20, 4, seed=1), "fox " * 200]
    with_prompt = [QUERY_PROMPT + text for text in texts]
    alone = np.stack([tiny.encode(text) for text in with_prompt])
    same(tiny.encode_query(texts), alone)
    same(tiny.encode(with_prompt), alone)
    ids = tiny.tokenizer.encode(with_prompt[:-1], 2048)[0]
    for layout, shared in (("auto", True), ("bucketed", False)):
        batches = tiny._batches(iter([ids]), layout, 512, 2048)[1]
        computed = sum(rows.batch.tokens_bt.size - rows.padding for rows in batches)
        assert computed < 0.75 * sum(map(len, ids)) if shared else computed == sum(map(len, ids))
    monkeypatch.setattr(encoder, "_CHUNK_TEXTS", 12)  # in the second chunk is a text that begins otherwise
    same(tiny.encode([*with_prompt, "fox"])[:-1], alone)


def test_prompt_wins_over_prompt_name(tiny, expected):
    same(tiny.encode(TEXTS, prompt="", prompt_name="query"), expected)
    same(tiny.encode(TEXTS, prompt=QUERY_PROMPT, prompt_name="document"), tiny.encode_query(TEXTS))
    same(tiny.encode(TEXTS, prompt="", prompt_name="no such prompt"), expected)


def test_encode_query_and_document_can_be_told_otherwise(tiny, expected):
    query = tiny.encode_query(TEXTS)
    same(tiny.encode_query(TEXTS, prompt=""), expected)
    same(tiny.encode_query(TEXTS, prompt_name="document"), expected)
    same(tiny.encode_document(TEXTS, prompt_name="query"), query)
    same(tiny.encode_document(TEXTS, prompt=QUERY_PROMPT), query)


def test_unknown_prompt_name_lists_the_known(tiny):
    with pytest.raises(InputError, match="no prompt named 'passage'; there are 'query', 'document'"):
        tiny.encode(["a"], prompt_name="passage")
    with pytest.raises(InputError, match="no prompt named ''"):
        tiny.encode(["a"], prompt_name="")


def test_default_prompt_name(tiny, tiny_release):
    model = f2llm_jax.load(tiny_release)
    model.default_prompt_name = "query"
    query, plain = tiny.encode_query(TEXTS[:3]), tiny.encode(TEXTS[:3])
    same(model.encode(TEXTS[:3]), query)
    same(model.encode(TEXTS[:3], prompt_name="document"), plain)
    same(model.encode(TEXTS[:3], prompt=""), plain)
    same(model.encode_document(TEXTS[:3]), plain)


@pytest.mark.parametrize("dim", [1, 33, 96])
def test_dims_are_cut_then_normalised(tiny, expected, dim):
    got = tiny.encode(TEXTS, dim=dim)
    cut = expected[:, :dim]
    same(got, cut / np.linalg.norm(cut, axis=1, keepdims=True))


@pytest.mark.parametrize("dim", [0, -8, 97, True, 2.5, "8", np.float32(8)])
def test_dim_outside_the_model_lists_advised_sizes(tiny, dim):
    with pytest.raises(InputError, match=r"within 1\.\.96.*advised: 8, 16, 32, 64, 96"):
        tiny.encode(["a"], dim=dim)


@pytest.mark.parametrize("dim", [13])
def test_outputs_equal_sentence_transformers(tiny, dim):
    floats = tiny.encode(TEXTS, dim=dim)
    ranges = f2llm_jax.int8_ranges(floats[:20])
    assert tiny.encode(TEXTS, dim=dim, output="float32").dtype == np.float32
    for output, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        half = tiny.encode(TEXTS, dim=dim, output=output)
        assert half.dtype == dtype
        np.testing.assert_array_equal(half, floats.astype(dtype))
    for output in ("binary", "ubinary"):
        got = tiny.encode(TEXTS, dim=dim, output=output)
        expected = quantize_embeddings(floats, output)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    got = tiny.encode(TEXTS, dim=dim, output="int8", ranges=ranges)
    expected = quantize_embeddings(floats, "int8", calibration_embeddings=floats[:20])
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "float64"}, "output must be one of float32, bfloat16, float16, int8, binary, ubinary"),
        ({"output": "int8"}, "needs ranges"),
        ({"output": "int8", "ranges": np.zeros((2, 95))}, r"\(2, 96\), not \(2, 95\)"),
        ({"output": "binary", "ranges": np.zeros((2, 96))}, "ranges are for output='int8'"),
        ({"max_length": 0}, r"within 1\.\.2048, not 0"),
        ({"output": "int8", "ranges": np.full((2, 96), np.nan)}, "ranges must be finite"),
        ({"output": "int8", "ranges": np.stack([np.ones(96), np.zeros(96)])}, "the least value .* before the largest"),
        ({"max_length": 2049}, r"within 1\.\.2048, not 2049"),
        ({"max_length": 128.5}, r"max_length must be a whole number within 1\.\.2048, not 128\.5"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive whole number"),
        ({"batch_tokens": "512"}, "batch_tokens must be a positive whole number, not '512'"),
        ({"dim": True}, r"dim must be a whole number within 1\.\.96, not True"),
        ({"prompt": "\ud800"}, "the prompt holds half of a surrogate pair"),
        ({"prompt": 3}, "the prompt is a int, not a string"),
    ],
)
def test_wrong_options_are_named(tiny, options, message):
    for texts in (["a"], []):
        with pytest.raises(InputError, match=message):
            tiny.encode(texts, **options)


def test_truncation_is_reported_once_with_the_count(tiny):
    texts = ["Z" * count for count in range(20)] * 250  # a token a letter; more than one chunk of texts
    with pytest.warns(UserWarning) as caught:
        got = tiny.encode(texts, max_length=10)
    assert [str(warning.message) for warning in caught] == [
        "2500 of 5000 texts were longer than 10 tokens and were truncated"
    ]
    assert caught[0].filename == __file__, "the warning points at the caller of encode"
    with no_warnings():
        same(got[:20], np.concatenate([tiny.encode(texts[:10]), tiny.encode(["Z" * 9] * 10)]))


def test_numbers_may_be_numpys(tiny):
    options = {"dim": np.int64(8), "max_length": np.int32(10), "batch_tokens": np.int64(64)}
    same(tiny.encode(["a", "bc"], **options), tiny.encode(["a", "bc"], **{name: int(n) for name, n in options.items()}))


def test_every_call_reports_what_it_truncates(tiny, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as Python does, unless told otherwise
        warnings.showwarning = lambda message, *_: print(message)
        for _ in range(3):
            tiny.encode(["Z" * 40], max_length=20)
            warn("something of a file")
    printed = capsys.readouterr().out
    assert printed.count("1 of 1 texts") == 3 and printed.count("something of a file") == 1


def test_a_tokenizer_of_more_tokens_than_the_table_is_refused(copied_release):
    edit_json(copied_release / "config.json", vocab_size=200)
    with pytest.raises(ReleaseError, match=r"the tokenizer has ids up to \d+, config\.json has vocab_size 200"):
        f2llm_jax.load(copied_release)


def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused(copied_release):
    file = str(copied_release / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    backend.add_tokens([f"<{number}>" for number in range(backend.get_vocab_size(), 514)])
    backend.save(file)
    model = f2llm_jax.load(copied_release)
    assert model.encode(["<511>"]).shape == (1, 96)
    with pytest.raises(InputError, match="a text holds <513>, which the tokenizer knows, but the model has no row for"):
        model.encode(["a", "b <513>"])


def test_a_config_of_other_layers_is_refused(tiny):
    for count in (2, 4):
        config = dataclasses.replace(tiny.config, num_hidden_layers=count)
        with pytest.raises(InputError, match=f"the parameters are of 3 layers, the config of {count}"):
            Encoder(tiny.params, config, tiny.tokenizer)
        with pytest.raises(InputError, match=f"the parameters are of 3 layers, the config of {count}"):
            f2llm_jax.embed(tiny.params, Batch(np.ones((1, 4), np.int32), np.array([4])), config=config)


@pytest.mark.parametrize("call", ["encode", "encode_query", "encode_document"])
def test_the_truncation_warning_points_at_the_caller(tiny, call):
    with pytest.warns(UserWarning, match="1 of 2") as caught:
        getattr(tiny, call)(["a", "Z" * 40], max_length=20, prompt="")
    assert [warning.filename for warning in caught] == [__file__]


def test_the_prompt_counts_towards_the_length(tiny):
    with pytest.warns(UserWarning, match="1 of 1"):
        cut = tiny.encode(["abc"], prompt="Z" * 30, max_length=20)
    same(cut, tiny.encode(["Z" * 19]))


def test_nothing_is_truncated_silently_or_reported_wrongly(tiny):
    with no_warnings():
        tiny.encode(["Z" * 9, ""], max_length=10)
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 1 tokens"):
        tiny.encode(["Z", ""], max_length=1)


def test_progress_bar(tiny, capsys, monkeypatch):
    tiny.encode(TEXTS)
    assert capsys.readouterr().err == ""
    tiny.encode(TEXTS, show_progress=True)
    shown = capsys.readouterr().err
    assert "20/20" in shown and "text/s" in shown and "tokens/s" in shown and "% padding" in shown
    assert "compiling" not in shown
    monkeypatch.setattr(tiny, "_shapes_met", set())
    tiny.encode(TEXTS, show_progress=True)
    shown = capsys.readouterr().err
    assert "compiling shape 1" in shown and "compiling shape 2" in shown
    assert "tokens/s" in shown.split("\r")[-1] and "compiling" not in shown.split("\r")[-1]


def test_a_copy_on_another_device_keeps_the_kernel(tiny, tiny_release):
    model = f2llm_jax.load(tiny_release, kernel="reference")
    copy = model.copy_to(jax.devices()[1:2])
    assert copy.kernel == "reference"
    same(copy.encode(TEXTS[:8]), model.encode(TEXTS[:8]))


def test_a_pickled_copy_gives_the_same(tiny, expected, monkeypatch):
    pickled, cached = pickle.dumps(tiny), []
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(encoder, "resolve_kernel", lambda asked, *where: asked)
        elsewhere.setattr(encoder, "use_compilation_cache", lambda: cached.append(True))
        copied = pickle.loads(pickled)
    assert copied.kernel == "auto" and cached == [True]
    copied = pickle.loads(pickled)
    assert not copied._shapes_met  # nothing is compiled where it may be now
    np.testing.assert_array_equal(copied.encode(TEXTS), expected)


def test_packed_rows_give_the_same(tiny, expected, caplog):
    caplog.set_level("INFO", logger="f2llm_jax.encoder")
    same(tiny.encode(TEXTS), expected)
    same(tiny.encode(TEXTS, layout="bucketed"), expected)
    packed, bucketed = (record.getMessage() for record in caplog.records)
    shown = re.fullmatch(r"20 texts, (\d+) tokens, rows packed, (\d+\.\d)% padding", packed)
    assert int(shown[1]) == sum(map(len, tiny.tokenizer.encode(TEXTS, 2048)[0]))
    assert 0 < float(shown[2]) < 15
    assert f"20 texts, {shown[1]} tokens, rows bucketed" in bucketed
    # Texts longer than a row have rows of their own length, which others fill.
    long = [*TEXTS, "the quick brown fox " * 30]
    same(tiny.encode(long, layout="packed"), tiny.encode(long, layout="bucketed"))
    assert tiny.encode([], layout="packed").shape == (0, 96)
    with pytest.raises(InputError, match="no layout 'dense'"):
        tiny.encode(TEXTS, layout="dense")


def test_a_kernel_by_name(tiny, tiny_release, expected):
    assert tiny.kernel == "ragged"
    model = f2llm_jax.load(tiny_release, kernel="splash")
    same(model.encode(TEXTS[:3]), expected[:3])
    same(model.encode_query(TEXTS[:3]), tiny.encode_query(TEXTS[:3]))  # this kernel knows no common prefixes
    with pytest.raises(InputError, match="no attention kernel 'fast'; there are auto, blocked"):
        f2llm_jax.load(tiny_release, kernel="fast")
    with pytest.raises(InputError, match="cudnn kernel computes in bfloat16"):
        f2llm_jax.load(tiny_release, kernel="cudnn")


def test_similarity(tiny, expected):
    got = tiny.similarity(expected[:3], expected)
    assert got.shape == (3, 20) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected[:3].astype(np.float64) @ expected.T, atol=1e-6)
    assert tiny.similarity(expected[0], expected[1]).shape == (1, 1)
    np.testing.assert_allclose(tiny.similarity(expected * 7, expected[:2] / 3), (expected @ expected[:2].T), atol=1e-6)
    half = tiny.encode(TEXTS, output="bfloat16")
    np.testing.assert_allclose(tiny.similarity(half, half), expected @ expected.T, atol=0.02)
    for output in ("int8", "binary", "ubinary"):
        codes = f2llm_jax.quantize(expected, output, f2llm_jax.int8_ranges(expected) if output == "int8" else None)
        for pair in ((codes, codes), (expected, codes)):
            with pytest.raises(InputError, match=f"float embeddings, not {codes.dtype}.*Hamming distance"):
                tiny.similarity(*pair)
    with pytest.raises(InputError, match="of one size, not of 96 and 64"):
        tiny.similarity(expected, expected[:, :64])


def test_attributes(tiny, expected):
    assert tiny.config == TINY
    assert tiny.max_length == 2048
    assert tiny.prompts == {"query": QUERY_PROMPT, "document": ""}
    assert (tiny.dtype, tiny.mesh, tiny.default_prompt_name) == ("float32", None, None)
    assert tiny.tokenizer.eos_id != tiny.tokenizer.pad_id
    assert "hidden_size=96" in repr(tiny)
    sequences, _ = tiny.tokenizer.encode(TEXTS[1:2], 2048)
    batch = f2llm_jax.Batch(sequences[0][None], np.array([len(sequences[0])], np.int32))
    same(np.asarray(f2llm_jax.embed(tiny.params, batch, config=tiny.config)), expected[1:2])


def test_bfloat16(tiny, tiny_release, expected):
    model = f2llm_jax.load(tiny_release, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    got = model.encode(TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    assert (got * expected).sum(axis=1).min() >= 0.9995
    for index in (0, 1, 2):
        assert model.encode([TEXTS[index]])[0] @ got[index] >= 0.99999


def test_several_threads_may_encode(tiny, expected):
    results: dict[int, np.ndarray] = {}

    def encode(start: int) -> None:
        results[start] = tiny.encode(TEXTS[start::3])

    threads = [threading.Thread(target=encode, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, result in results.items():
        same(result, expected[start::3])
    assert len(results) == 3


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Every program that is compiled, or taken from the persistent cache, while the block runs."""
    counted: list[str] = []

    def listen(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> f2llm_jax.Encoder:
    """One narrow layer: as quick as a model can be."""
    from dataclasses import replace

    config = replace(
        TINY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    return f2llm_jax.load(write_release(tmp_path_factory.mktemp("smallest"), config))


def test_few_compilations_for_many_lengths(smallest):
    generator = np.random.default_rng(0)
    texts = ["Z" * int(length) for length in generator.integers(0, 88, size=2500)]
    buckets, packing = Buckets(2048, 88), Packing(2048, 88, short_rows=True)
    # One shape for each length; and the texts that are left at the end fill a few of fewer rows, in short rows of every
    # length one or two. A shape takes a program for the layers, and a small one before and behind them.
    most = {"bucketed": 3 * (len(buckets.lengths) + 4), "packed": 3 * 3 * len(packing.lengths)}
    most_ever = {
        "bucketed": 3 * len(buckets),
        "packed": 3
        * sum(
            len({packing.last_rows(length, rows + 1) for rows in range(packing.rows(length))})
            for length in packing.last_lengths
        ),
    }
    assert all(most[layout] < most_ever[layout] for layout in most)
    for layout in most:
        encode = functools.partial(smallest.encode, max_length=88, batch_tokens=2048, layout=layout)
        with counted_compilations() as counted:
            got = encode(texts)
            assert 0 < len(counted) <= most[layout]
            for start in (0, 1000, 2490):
                encode(texts[start : start + 500])
            in_all = len(counted)
            assert in_all <= most_ever[layout]
            np.testing.assert_array_equal(encode(texts), got)
            assert len(counted) == in_all


COUNT_CACHE_HITS = """
import sys, jax, f2llm_jax
hits, misses = [], []
def listen(event, **_):
    hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    misses.append(event) if event == "/jax/compilation_cache/cache_misses" else None
jax.monitoring.register_event_listener(listen)
f2llm_jax.load(sys.argv[1]).encode(["a", "a longer text " * 9])
print(len(hits), len(misses))
"""


def test_the_second_process_starts_warm(tiny_release, tmp_path):
    def run(**env: str) -> tuple[int, int]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **env}
        command = [sys.executable, "-c", COUNT_CACHE_HITS, str(tiny_release)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hits, misses = map(int, result.stdout.split())
        return hits, misses

    hits, misses = run()
    assert hits == 0 and misses >= 1
    assert run() == (misses, 0)
    assert list((tmp_path / "cache" / "f2llm_jax").iterdir())


@pytest.mark.parametrize("setting", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_jaxs_own_cache_settings_win(tiny_release, tmp_path, setting):
    value = str(tmp_path / "mine") if setting.endswith("DIR") else "false"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), setting: value}
    script = "import sys, f2llm_jax; f2llm_jax.load(sys.argv[1]).encode('a')"
    subprocess.run([sys.executable, "-c", script, str(tiny_release)], env=environment, check=True)
    assert not (tmp_path / "cache").exists()
    assert setting.endswith("CACHE") or any((tmp_path / "mine").iterdir())


def test_the_users_limits_of_what_is_cached_win(monkeypatch):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    try:
        for value, given, expected in ((1.0, None, 0.0), (1.0, "1", 1.0), (7.0, None, 7.0)):
            jax.config.update(name, value)
            with monkeypatch.context() as patched:
                patched.setenv(name.upper(), given) if given else patched.delenv(name.upper(), raising=False)
                compilation.use_compilation_cache()
            assert getattr(jax.config, name) == expected
    finally:
        jax.config.update(name, before)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps it")
def test_freed_memory_goes_back_to_the_system():
    """Blocks too small for a mapping of their own, the last of which lies behind all others and is not freed."""
    resident = psutil.Process().memory_info
    blocks = [bytes(1000) for _ in range(200_000)]
    last = blocks.pop()
    blocks.clear()
    kept = resident().rss
    compilation.give_back_memory()
    assert resident().rss < kept - 150e6
    assert len(last) == 1000


def test_memory_is_given_back_after_batches_of_new_shapes(smallest, monkeypatch):
    times: list[None] = []
    monkeypatch.setattr(encoder, "give_back_memory", lambda: times.append(None))
    monkeypatch.setattr(smallest, "_shapes_met", set())
    for text, dim, count in (("Z" * 91, None, 1), ("X" * 91, None, 1), ("Z" * 91, 4, 2), ("Z" * 99, 4, 3)):
        smallest.encode([text], dim=dim, max_length=100, layout="bucketed")
        assert len(times) == count


def test_one_shape_is_compiled_at_a_time(smallest, monkeypatch):
    """What takes most memory; batches of shapes that were met run beside it."""
    compute, inside, most = smallest._layerwise, [], []

    def watched(batch, dim):
        inside.append(None)
        time.sleep(0.02)  # long enough for another thread to come by
        most.append(len(inside))
        result = compute(batch, dim)
        inside.pop()
        return result

    monkeypatch.setattr(smallest, "_layerwise", watched)
    monkeypatch.setattr(smallest, "_shapes_met", set())
    texts = ["Z" * length for length in range(8, 88, 8)]
    for expected in (1, 2):
        smallest.encode(texts, max_length=88, batch_tokens=8, layout="bucketed")
        assert max(most) == expected
        most.clear()


def test_threads_do_not_trace_at_the_same_time(tiny, monkeypatch):
    """Flax takes fields out of a class while it derives another from it."""
    derive, inside, most = nn.remat, [], []

    def watched(*args, **options):
        inside.append(None)
        time.sleep(0.02)  # long enough for any other thread to come by
        most.append(len(inside))
        try:
            return derive(*args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(nn, "remat", watched)

    def trace(length: int) -> tuple[int, ...]:
        states = functools.partial(f2llm_jax.model.apply, f2llm_jax.Backbone(tiny.config))
        return jax.eval_shape(states, tiny.params, np.zeros((1, length), np.int32)).shape

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(f2llm_jax.model.count_parameters, tiny.config) for _ in range(2)]
        shapes = list(pool.map(trace, range(11, 19)))
        assert len({count.result() for count in counts}) == 1
    assert shapes == [(1, length, tiny.config.hidden_size) for length in range(11, 19)]
    assert most == [1] * 10
