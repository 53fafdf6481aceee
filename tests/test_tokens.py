"""Token ids against transformers' AutoTokenizer, and the EOS at the end of every sequence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from releases import (
    QUERY_PROMPT,
    QWEN_TOKENIZER,
    SHARED,
    copy_tokenizer,
    edit_json,
    set_appended_token,
    skip_without_shared,
    write_json,
    write_tiny_tokenizer,
)

from f2llm_jax.errors import InputError, ReleaseError
from f2llm_jax.tokens import Tokenizer

END, PAD = "<|im_end|>", "<|endoftext|>"

TRICKY = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\t",
    "naïve ﬁ Å Å 한국어 한국어",  # composed and decomposed
    "<|im_end|>",
    "a<|im_end|>b<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u200f\ufeff",
    "\x00\x01\x7f\x85\u2028",
    "1234567890" * 20,
    "é" * 500,
    "def f(x):\n    return x ** 2  # हिन्दी العربية",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Folders of the real tokenizer: as it is, and with its EOS appended by tokenizer.json."""
    skip_without_shared()
    folders = {}
    for append_eos in (False, True):
        folders[append_eos] = tmp_path_factory.mktemp("tokenizer")
        copy_tokenizer(QWEN_TOKENIZER, folders[append_eos], append_eos=append_eos)
    return folders


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory):
    folders = {}
    for append_eos in (False, True):
        folders[append_eos] = tmp_path_factory.mktemp("tokenizer")
        write_tiny_tokenizer(folders[append_eos], append_eos=append_eos)
    return folders


def id_of(folder: Path, token: str) -> int:
    """As the tokenizer's own file states it."""
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return next(entry["id"] for entry in added if entry["content"] == token)


def check_eos_and_pad(tokenizer: Tokenizer, folder: Path, eos: str = END, pad: str = PAD) -> None:
    assert (tokenizer.eos_id, tokenizer.pad_id) == (id_of(folder, eos), id_of(folder, pad))
    assert our_ids(tokenizer, [""]) == [[id_of(folder, eos)]]


def auto_ids(folder: Path, texts: list[str], **options: object) -> list[list[int]]:
    """What transformers makes of the texts, with what tokenizer.json appends."""
    return transformers.AutoTokenizer.from_pretrained(folder)(texts, **options)["input_ids"]


def our_ids(tokenizer: Tokenizer, texts: list[str], max_length: int = 10**6) -> list[list[int]]:
    sequences, _ = tokenizer.encode(texts, max_length)
    assert all(ids.dtype == np.int32 and ids.ndim == 1 for ids in sequences)
    return [ids.tolist() for ids in sequences]


def shared_texts() -> list[str]:
    """All sentences in 106 languages, all questions and paragraphs in 8, and the training mix's queries, each once."""
    from pyarrow import parquet

    skip_without_shared()
    texts: dict[str, None] = {}
    for file in sorted(SHARED.rglob("*.parquet")):
        table = parquet.read_table(file)
        for name in table.column_names:
            if name in ("text", "query", "english", "passage"):
                texts |= dict.fromkeys(table[name].to_pylist())
    return list(texts)


def test_shared_texts_equal_transformers(real):
    """A third of them, which is some of every language."""
    texts = shared_texts()[::3]
    assert len(texts) > 30_000
    expected = auto_ids(real[True], texts, return_attention_mask=False)
    got = our_ids(Tokenizer.from_release(real[False]), texts)
    assert [index for index, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b] == []
    assert {ids[-1] for ids in got} == {id_of(real[False], END)}


def test_tricky_texts_equal_transformers(real):
    texts = [*TRICKY, *(QUERY_PROMPT + text for text in TRICKY)]
    expected = auto_ids(real[True], texts)
    assert our_ids(Tokenizer.from_release(real[False]), texts) == expected
    assert our_ids(Tokenizer.from_release(real[True]), texts) == expected
    assert auto_ids(real[False], texts) == [ids[:-1] for ids in expected]  # it does not append by itself


def test_eos_and_pad_are_f2llms(real):
    for folder in real.values():
        check_eos_and_pad(Tokenizer.from_release(folder), folder)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=8), max_length=st.integers(1, 24))
@example(texts=TRICKY, max_length=7)
def test_any_text_equals_transformers(tiny_folders, texts, max_length):
    auto = transformers_of(tiny_folders[True])
    expected = auto(texts, truncation=True, max_length=max_length)["input_ids"]
    lengths = [len(ids) for ids in auto(texts)["input_ids"]]
    for folder in tiny_folders.values():
        tokenizer = tokenizer_of(folder)
        sequences, truncated = tokenizer.encode(texts, max_length)
        assert [ids.tolist() for ids in sequences] == expected
        assert truncated == sum(length > max_length for length in lengths)
        assert all(ids[-1] == tokenizer.eos_id and 1 <= len(ids) <= max_length for ids in sequences)


_LOADED: dict[tuple[str, Path], object] = {}


def transformers_of(folder: Path):
    key = ("transformers", folder)
    return _LOADED.get(key) or _LOADED.setdefault(key, transformers.AutoTokenizer.from_pretrained(folder))


def tokenizer_of(folder: Path) -> Tokenizer:
    key = ("ours", folder)
    return _LOADED.get(key) or _LOADED.setdefault(key, Tokenizer.from_release(folder))


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("max_length", [1, 2, 3, 16, 1024])
def test_eos_is_last_around_max_length(tiny_folders, append_eos, max_length):
    tokenizer = Tokenizer.from_release(tiny_folders[append_eos])
    # A letter that the tiny vocabulary merges with nothing is a token each.
    texts = ["Z" * (count - 1) for count in (max_length - 1, max_length, max_length + 1, 3 * max_length) if count]
    texts.append("")
    sequences, truncated = tokenizer.encode(texts, max_length)
    expected = transformers_of(tiny_folders[True])(texts, truncation=True, max_length=max_length)["input_ids"]
    assert [ids.tolist() for ids in sequences] == expected
    assert truncated == 2
    for text, ids in zip(texts, sequences, strict=True):
        assert len(ids) == min(len(text) + 1, max_length)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]


def test_max_length_below_the_eos_is_refused(tiny_folders):
    with pytest.raises(InputError, match="at least 1"):
        Tokenizer.from_release(tiny_folders[True]).encode(["a"], 0)


def test_another_appended_token_wins_over_eos_token(real, tmp_path):
    """Qwen3-Embedding appends its pad token; its eos_token is another."""
    folder = Path(shutil.copytree(real[False], tmp_path / "tokenizer"))
    set_appended_token(folder, PAD)
    tokenizer = Tokenizer.from_release(folder)
    check_eos_and_pad(tokenizer, folder, eos=PAD)
    assert our_ids(tokenizer, TRICKY, 9) == auto_ids(folder, TRICKY, truncation=True, max_length=9)


def test_add_eos_token_in_the_settings_changes_nothing(real, tmp_path):
    folder = Path(shutil.copytree(real[False], tmp_path / "tokenizer"))
    expected = our_ids(Tokenizer.from_release(folder), TRICKY)
    for value in (True, False):
        edit_json(folder / "tokenizer_config.json", add_eos_token=value)
        assert our_ids(Tokenizer.from_release(folder), TRICKY) == expected


def test_eos_token_as_a_mapping(real, tmp_path):
    """transformers 4 wrote added tokens so."""
    folder = Path(shutil.copytree(real[False], tmp_path / "tokenizer"))
    for name, content in (("eos_token", END), ("pad_token", PAD)):
        token = {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": False, "special": True}
        edit_json(folder / "tokenizer_config.json", **{name: token})
    check_eos_and_pad(Tokenizer.from_release(folder), folder)


def test_vocabulary_and_merges_without_tokenizer_json(real, tmp_path):
    saved = json.loads((real[False] / "tokenizer.json").read_text())
    write_json(tmp_path / "vocab.json", saved["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    shutil.copy(real[False] / "tokenizer_config.json", tmp_path)
    added = {str(token.pop("id")): token for token in saved["added_tokens"]}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = Tokenizer.from_release(tmp_path)
    check_eos_and_pad(tokenizer, real[False])
    assert our_ids(tokenizer, TRICKY) == auto_ids(real[True], TRICKY)
    with (tmp_path / "vocab.json").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ReleaseError, match=f"vocab.json and merges.txt in {tmp_path} make no tokenizer"):
        Tokenizer.from_release(tmp_path)


def test_limits_stored_in_tokenizer_json_do_not_act(tiny_folders, tmp_path):
    folder = Path(shutil.copytree(tiny_folders[True], tmp_path / "tokenizer"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert [len(ids) for ids in our_ids(Tokenizer.from_release(folder), ["Z" * 9, ""])] == [10, 1]


def test_no_pad_token_is_no_matter(tiny_folders, tmp_path):
    folder = Path(shutil.copytree(tiny_folders[True], tmp_path / "tokenizer"))
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = Tokenizer.from_release(folder)
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json does not exist"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not valid JSON"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=None), "eos_token is None"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", eos_token="<end>"), "eos_token is '<end>'"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", eos_token={}), "eos_token is None"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=7), "eos_token"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", pad_token="<pad>"), "pad_token is '<pad>'"),
    ],
)
def test_damaged_tokenizers_are_named(tiny_folders, tmp_path, damage, message):
    folder = Path(shutil.copytree(tiny_folders[False], tmp_path / "tokenizer"))
    damage(folder)
    with pytest.raises(ReleaseError, match=message) as error:
        Tokenizer.from_release(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("template", ["<|im_end|> $A", "$A <|im_end|> <|im_end|>", "<|endoftext|> $A <|im_end|>"])
def test_other_additions_than_one_eos_are_refused(tiny_folders, tmp_path, template):
    folder = Path(shutil.copytree(tiny_folders[False], tmp_path / "tokenizer"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(name, backend.token_to_id(name)) for name in (END, PAD)]
    )
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ReleaseError, match="one EOS"):
        Tokenizer.from_release(folder)


def test_the_vocabulary_is_that_of_the_models_rows(tiny_folders):
    plain, appending = (Tokenizer.from_release(folder) for folder in tiny_folders.values())
    assert plain.vocabulary == appending.vocabulary  # of files that differ
    backend = Tokenizer.from_release(tiny_folders[False]).backend
    backend.add_tokens(["<new>"])
    assert Tokenizer(backend, 1, 0).vocabulary != plain.vocabulary
    assert Tokenizer(backend, 1, 0, {backend.token_to_id("<new>"): "<new>"}).vocabulary == plain.vocabulary
