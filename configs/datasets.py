"""What each dataset of the training mix is: its task type, and named sets of datasets.

This is the only such table. Names are those of the released Parquet files without the extension; ``*`` matches
anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from f2llm_jax.errors import InputError

Task = Literal["retrieval", "clustering", "classification"]

# Negatives drawn per query, at the same positions for the whole batch. Classification data has only one per query.
NEGATIVES: dict[Task, int] = {"retrieval": 7, "clustering": 9, "classification": 1}

# Maximum queries per source in stage 2. A source is one dataset, unless --source groups several: only with a cap for
# each of the 500 datasets do 18M rows remain.
STAGE_2_CAP = 80_000

_SHOWN = 5  # how many unknown datasets an error names

TASKS: dict[Task, tuple[str, ...]] = {
    "classification": (
        *("amazon_counterfactual", "amazon_polarity", "cola", "imdb", "mela", "toxic_conversations", "waimai"),
        *("nordic_classification_*", "question_classification"),
    ),
    "clustering": (
        *("amazon_reviews", "banking77", "emotion", "mtop_*", "massive_*", "tweet_sentiment_extraction"),
        *("arxiv_clustering_*", "biorxiv_clustering_*", "medrxiv_clustering_*", "reddit_clustering_*"),
        *("stackexchange_clustering_*", "twentynewsgroups", "sib200", "mlsum_clustering_*", "bactrianx_*", "europarl"),
        *("xcodeeval_translation", "tnews", "thucnews", "csl", "cedr", "ru_sentiment", "language_clustering"),
    ),
    "retrieval": (
        # Question answering and search
        *("amazon_qa", "arguana", "bioasq", "cmedqav2", "cmcqa", "coliee", "cord19", "dbpedia", "dureader", "eli5"),
        *("esci", "fever", "fever_nl", "fiqa", "gooaq", "healthcaremagic", "hotpotqa", "hotpotqa_nl", "huatuo_*"),
        *("lawzhidao", "llm_retrieval_data", "mailruqa", "medical_flashcards", "medicalqa_ru", "medmcqa", "medqa_*"),
        *("medquad", "miracl", "miracl_*", "mkqa_*", "mldr_*", "mmarco_*", "mqa_*", "mrtidy", "mrtidy_*", "msmarco"),
        *("multicpr_*", "natural_questions", "nfcorpus", "nordic_retrieval_*", "paq", "paq_part*", "parsquad"),
        *("persian_qa", "pquad", "procqa", "pubmedqa", "qbqtc", "scifact", "squad", "t2ranking", "triviaqa"),
        *("webfaq_*", "webmedqa", "wikiomnia", "xquad_*", "yahoo_answers"),
        # Titles, summaries, citations
        *("cnn_dm", "lcsts", "mlsum_retrieval_*", "s2orc_*", "sentence_compression", "specter", "xsum"),
        # Instructions and their answers
        *("aya", "coig", "infinstruct", "infinstruct_part*", "koalpaca", "koalpaca_realqa", "komagpie", "m2lingual"),
        *("medi2", "medi2_part*", "medical_instruction", "medinstruct", "multialpaca", "muri", "muri_part*"),
        *("natural_reasoning", "natural_reasoning_part*", "oasst2", "openorca", "openorca_part*", "refgpt"),
        *("ru_instruct", "wildchat", "wildchat_part*"),
        # Similarity, paraphrase, inference, duplicates
        *("anli", "bq", "cmnli", "lcqmc", "mnli", "mscinli", "nordic_sts_*", "nordic_text_matching_*", "ocnli"),
        *("pawsx_*", "qqp", "simclue", "snli", "stackexchange", "stackexchange_part*", "stackexchangedupquestions_*"),
        *("stackoverflowdupquestions", "sts12", "sts22", "sts22_multilingual", "stsbenchmark", "xnli_*"),
        # Translation
        *("clirmatrix_*", "paracrawl_*", "siberian_dataset", "tatoeba_*", "unpc_*"),
        # Code
        *("codefeedback_*", "cosqa", "csn_*", "ocgi", "ocgi_part*", "ocr2_*", "stackoverflow_qa"),
        *("synthetic_text2sql", "xcodeeval_code2code_*", "xcodeeval_nl2code_*"),
    ),
}

SETS: dict[str, tuple[str, ...]] = {
    # The seven sources of stage 1 (paper arXiv:2603.19223).
    "stage1": ("csn_*", "ocgi", "ocgi_part*", "webfaq_*", "mmarco_*", "clirmatrix_*", "paracrawl_*"),
    # The card of the released data warns that these overlap MTEB evaluation sets.
    "overlapping": ("mkqa_*", "sib200"),
}


def tasks_of(datasets: Sequence[str], own: Mapping[str, Task] | None = None) -> dict[str, Task]:
    """The task type of each dataset.

    Args:
        datasets: their names.
        own: {glob or set: task}, which takes precedence over the table.

    Raises:
        InputError: some datasets are in neither; the message says what to type.
    """
    tasks = {dataset: _task_of(dataset, own or {}) for dataset in datasets}
    known = {dataset: task for dataset, task in tasks.items() if task is not None}
    unknown = [dataset for dataset in datasets if dataset not in known]
    if unknown:
        raise InputError(_unknown(unknown, globs=unknown if known or len(unknown) == 1 else ["*"]))
    return known


def _unknown(datasets: Sequence[str], globs: Sequence[str]) -> str:
    names = ", ".join(map(repr, datasets[:_SHOWN])) + (", …" if datasets[_SHOWN:] else "")
    subject = f"the dataset {names} is" if len(datasets) == 1 else f"{len(datasets)} datasets, {names}, are"
    options = " ".join(f"--task '{glob}=retrieval'" for glob in globs[:_SHOWN])
    others = " or ".join(task for task in get_args(Task) if task != "retrieval")
    return (
        f"{subject} unknown: say what to train for with {options} (or {others}), add names to TASKS in "
        "configs/datasets.py, or leave datasets out with --exclude"
    )


def _task_of(dataset: str, own: Mapping[str, Task]) -> Task | None:
    for glob, task in own.items():
        if matches(dataset, expand([glob])):
            return task
    return next((task for task, globs in TASKS.items() if matches(dataset, globs)), None)


def matches(dataset: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(dataset, glob) for glob in globs)


def expand(globs: Iterable[str]) -> tuple[str, ...]:
    """The globs, with each ``@NAME`` replaced by the globs of that set.

    Raises:
        InputError: no such set.
    """
    expanded: list[str] = []
    for glob in globs:
        if glob.startswith("@") and glob[1:] not in SETS:
            raise InputError(
                f"there is no set {glob!r} of datasets; there are {', '.join('@' + name for name in SETS)}"
            )
        expanded += SETS[glob[1:]] if glob.startswith("@") else [glob]
    return tuple(expanded)
