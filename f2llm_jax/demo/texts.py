"""The bundled texts, written for this project."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, NamedTuple

LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "ru": "Russian",
    "tr": "Turkish",
    "ar": "Arabic",
    "he": "Hebrew",
    "hi": "Hindi",
    "th": "Thai",
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "el": "Greek",
}


# This many sentences, the last of the bundle, are for the search; the others are for training.
HELD_OUT = 30


class Text(NamedTuple):
    """A text. Texts with the same ``meaning`` are translations of each other, or code and its description.

    Attributes:
        meaning: id of the sentence or program.
        language: its name, such as ``German``, or ``code``.
        text: the text.
    """

    meaning: str
    language: str
    text: str


def sentences() -> list[Text]:
    """Every sentence in every language of ``LANGUAGES``."""
    rows = _read("parallel.jsonl")
    return [Text(row["id"], name, row[key]) for row in rows for key, name in LANGUAGES.items()]


def training_sentences() -> list[Text]:
    """The sentences to train on: all but the held-out ones."""
    return sentences()[: -HELD_OUT * len(LANGUAGES)]


def held_out_sentences() -> list[Text]:
    """The last ``HELD_OUT`` sentences in every language."""
    return sentences()[-HELD_OUT * len(LANGUAGES) :]


def programs() -> list[Text]:
    """Short programs."""
    return [Text(row["id"], "code", row["code"]) for row in _read("code.jsonl")]


def descriptions() -> list[Text]:
    """What the programs do, in English."""
    return [Text(row["id"], "English", row["description"]) for row in _read("code.jsonl")]


def _read(name: str) -> list[dict[str, Any]]:
    lines = resources.files("f2llm_jax.demo").joinpath(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
