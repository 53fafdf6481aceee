"""A release folder on disk: its files, and what each of them states.

The layout is that of sentence-transformers: ``config.json`` and ``modules.json`` at the top, the pooling in its own
folder, prompts in ``config_sentence_transformers.json``. Weights are handled by ``f2llm_jax.convert``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from f2llm_jax.config import ModelConfig, read_json
from f2llm_jax.errors import InputError, ReleaseError, warn, whole_number

# The files of a hub repository that a model needs: no other frameworks' weights, no images, and no pickles except the
# two factors of ML-Embed's embedding table, which are opened only if the table itself is missing.
SETTINGS_PATTERNS = ["*.json", "*/config.json", "merges.txt"]
WEIGHT_PATTERNS = ["*.safetensors", "params/**", "[UV].pth"]


@dataclasses.dataclass(frozen=True)
class Release:
    """The contents of a release folder, except for its weights.

    Attributes:
        path: the folder.
        config: the sizes of the backbone.
        prompts: {name: text prepended to every input}; ``query`` and ``document`` are always there, empty if not given.
        default_prompt_name: the prompt of a plain ``encode``, or None.
        max_length: the maximum number of tokens of a text, EOS included.
    """

    path: Path
    config: ModelConfig
    prompts: dict[str, str]
    default_prompt_name: str | None
    max_length: int


def find_release(model: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model: itself if it is one, else a hub repository, downloaded into huggingface_hub's cache.

    ``HF_HOME``, ``HF_HUB_OFFLINE`` and a login are honoured, as by huggingface_hub itself.

    Args:
        model: a folder, or a hub id such as ``codefuse-ai/F2LLM-v2-80M``.
        revision: branch, tag or commit; for a hub id only.
        weights: download the weights of a hub repository too.

    Raises:
        ReleaseError: there is no such folder, repository or revision, or it is neither cached nor reachable.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ReleaseError(f"{path} is a local folder; a revision ({revision!r}) belongs to a hub id")
        return path
    name = str(model)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise ReleaseError(f"{name} is neither a folder nor a hub id of the form owner/name")
    return _download(name, revision, SETTINGS_PATTERNS + WEIGHT_PATTERNS if weights else SETTINGS_PATTERNS)


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except RevisionNotFoundError:
        raise ReleaseError(f"the hub repository {repo_id} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ReleaseError(
            f"there is no hub repository {repo_id} (or it is private and you are not logged in), and no such folder"
        ) from None
    except LocalEntryNotFoundError:
        raise ReleaseError(
            f"{repo_id} is not in the local hub cache, and the hub is out of reach or HF_HUB_OFFLINE is set: "
            "give a folder, or download it where there is a network"
        ) from None
    except Exception as error:  # also those of its HTTP client, which have no type in common
        raise ReleaseError(
            f"downloading {repo_id} failed: {type(error).__name__}: {error}; what was downloaded is kept"
        ) from error
    return Path(folder)


def read_release(path: Path) -> Release:
    """Reads everything but the weights, and checks that this package supports the model.

    Raises:
        ReleaseError: a file is missing or damaged, or requests another pooling, architecture or module; or the folder
            is of a training run.
    """
    _refuse_training_run(path)
    config = ModelConfig.from_release(path)
    _check_modules(path, config)
    prompts, default_prompt_name = _read_prompts(path)
    return Release(path, config, prompts, default_prompt_name, _read_max_length(path, config))


def pick_prompt(prompts: dict[str, str], default_name: str | None, name: str | None, prompt: str | None) -> str:
    """The text to prepend to every input: ``prompt``, else the one called ``name``, else the default one, else none.

    Raises:
        InputError: there is no prompt of that name.
    """
    if prompt is not None:
        return prompt
    name = default_name if name is None else name
    if name is None:
        return ""
    if name not in prompts:
        raise InputError(f"no prompt named {name!r}; there are {', '.join(map(repr, prompts))}")
    return prompts[name]


def _refuse_training_run(path: Path) -> None:
    """A run's folder, or one of its checkpoints, has no config.json; it takes f2llm average to make a model of them."""
    if (path / "config.json").exists():
        return
    if (path / "params").is_dir() and (path / "optimizer").is_dir():
        run = path.absolute().parent.parent
        raise ReleaseError(
            f"{path} is a checkpoint of a training run, no model: f2llm average {run} OUT --steps {path.name} makes "
            "one of it"
        )
    if (path / "checkpoints").is_dir():
        raise ReleaseError(f"{path} is a training run, no model: f2llm average {path} OUT makes one of it")


def _check_modules(path: Path, config: ModelConfig) -> None:
    """Checks that the modules are Transformer, Pooling by last token, Normalize, as in F2LLM and Qwen3-Embedding.

    A folder without ``modules.json`` (a bare transformers checkpoint) is assumed to mean these.
    """
    file = path / "modules.json"
    if not file.exists():
        return
    try:
        modules: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        # sentence-transformers has moved its modules between releases; the class name has stayed.
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ReleaseError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ReleaseError(f"{file}: modules {', '.join(kinds)}; supported is Transformer, Pooling, Normalize")
    if modules[0].get("path"):
        raise ReleaseError(f"{file}: the Transformer lies in {modules[0]['path']!r}; supported is the top folder")
    if kinds[2:] == []:
        warn(f"{file} has no Normalize; embeddings are normalised all the same")
    _check_pooling(path / modules[1].get("path", "1_Pooling") / "config.json", config)


def _check_pooling(file: Path, config: ModelConfig) -> None:
    pooling = read_json(file)
    if "pooling_mode" in pooling:
        modes = pooling["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
    else:
        modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True and "_mode_" in name]
    if modes != ["lasttoken"]:
        raise ReleaseError(f"{file}: pooling by {', '.join(modes) or 'nothing'}; only lasttoken is supported")
    stated = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension", config.hidden_size))
    if stated != config.hidden_size:
        # As in the released 4B-Preview, which states 1024 for a hidden size of 2560.
        warn(f"{file} states {stated} dimensions, the backbone has {config.hidden_size}: the backbone decides")


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    file = path / "config_sentence_transformers.json"
    values = read_json(file) if file.exists() else {}
    given = values.get("prompts") or {}
    if not isinstance(given, dict):
        raise ReleaseError(f"{file}: prompts must be a JSON object of strings, not {given!r}")
    prompts = {name: "" if text is None else text for name, text in {"query": "", "document": "", **given}.items()}
    for name, text in prompts.items():
        if not isinstance(text, str):
            raise ReleaseError(f"{file}: the prompt {name!r} must be a string, not {text!r}")
    default = values.get("default_prompt_name")
    if default is not None and default not in list(prompts):  # a list: the default may not be hashable
        raise ReleaseError(f"{file}: default_prompt_name {default!r} is not among the prompts {', '.join(prompts)}")
    return prompts, default


def _read_max_length(path: Path, config: ModelConfig) -> int:
    """The smallest of the limits of the tokenizer, the backbone and sentence-transformers' own settings."""
    limits = [config.max_position_embeddings]
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        file = path / name
        limit = read_json(file).get(key) if file.exists() else None
        if limit is None:
            continue
        if isinstance(limit, float) and limit.is_integer():
            limit = int(limit)  # transformers has written 1e30 for no limit
        try:
            limits.append(whole_number(key, limit))
        except InputError as error:
            raise ReleaseError(f"{file}: {error}") from None
    return min(limits)
