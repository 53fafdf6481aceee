"""Adapts an Encoder to MTEB 2, and runs MTEB tasks with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.digest import model_digest
from f2llm_jax.convert.load import params_bytes
from f2llm_jax.encoder import Encoder, load
from f2llm_jax.errors import InputError
from f2llm_jax.evaluation import optional
from f2llm_jax.evaluation.ranking import cosines, unit
from f2llm_jax.evaluation.registry import instructions, registered
from f2llm_jax.model import count_parameters
from f2llm_jax.release import find_release

optional("mteb")

import mteb  # noqa: E402 - if it is not installed, the line above raises an error that says so
import torch  # noqa: E402 - mteb's similarities are torch tensors
from mteb.models.abs_encoder import AbsEncoder, PromptSource  # noqa: E402
from mteb.models.model_meta import ModelMeta, ScoringFunction  # noqa: E402
from mteb.types import OutputDType, PromptType  # noqa: E402

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.results import ModelResult
    from mteb.types import Array, BatchedInput
    from torch.utils.data import DataLoader

# The settings with which the released models were evaluated; a registry entry may state another length.
DTYPE = "bfloat16"
MAX_LENGTH = 8192

_OUTPUT_DTYPES = {"int8": OutputDType.BF16, "bfloat16": OutputDType.BF16, "float32": OutputDType.FLOAT32}


class MTEBEncoder(AbsEncoder):
    """An ``Encoder`` with mteb's EncoderProtocol, as returned by ``mteb_model``.

    Instructions are chosen and formatted by mteb's own code (``AbsEncoder``), from the arguments in its registry entry
    for the model.

    Attributes:
        model: the ``Encoder``.
        mteb_model_meta: mteb's metadata of the model.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        encoder: Encoder,
        meta: ModelMeta,
        loader_kwargs: Mapping[str, Any],
        *,
        dim: int | None,
        max_length: int,
        batch_tokens: int | None,
    ):
        self.model = encoder
        self.mteb_model_meta = meta
        self.instruction_template = loader_kwargs["instruction_template"]
        self.prompts_dict = loader_kwargs["prompts_dict"]
        if loader_kwargs.get("prompt_priority") is not None:
            self.prompt_priority = [PromptSource.from_str(source) for source in loader_kwargs["prompt_priority"]]
        self._instruct_documents = loader_kwargs.get("apply_instruction_to_passages", True)
        self._dim = dim
        self._max_length = max_length
        self._batch_tokens = batch_tokens

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeds the texts of a task.

        Args:
            inputs: batches with a ``text`` column. Their size does not matter: texts are batched by length here.
            task_metadata, prompt_type: select the instruction; documents get none if the registry says so.
            hf_split, hf_subset: unused.
            **kwargs: ``show_progress_bar``; ``batch_size`` is ignored.

        Returns:
            Unit embeddings, float32 [n, dim], in the order of ``inputs``.

        Raises:
            InputError: ``precision`` is not float32.
        """
        if kwargs.get("precision", "float32") != "float32":
            raise InputError(f"mteb's precision {kwargs['precision']!r} is not supported; embeddings are float32")
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self.get_task_instruction(task_metadata, prompt_type)
        if prompt_type == PromptType.document and not self._instruct_documents:
            prompt = ""
        return self.model.encode(
            texts,
            prompt=prompt,
            dim=self._dim,
            max_length=self._max_length,
            batch_tokens=self._batch_tokens,
            show_progress=kwargs.get("show_progress_bar", False),
        )

    def similarity(self, embeddings1: Array, embeddings2: Array) -> torch.Tensor:
        """Cosines float32 [n, m], independent of the blocks in which they are computed."""
        return torch.from_numpy(cosines(np.atleast_2d(embeddings1), np.atleast_2d(embeddings2)))

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> torch.Tensor:
        """Cosines float32 [n] of corresponding rows."""
        product_nd = unit(np.atleast_2d(embeddings1)) * unit(np.atleast_2d(embeddings2))
        return torch.from_numpy(product_nd.sum(axis=1).astype(np.float32))


def mteb_model(
    model: str | Path,
    *,
    dtype: str = DTYPE,
    dim: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    instructions_of: str | None = None,
) -> MTEBEncoder:
    """Loads a model for ``mteb.evaluate``, with the instructions from the registry of the installed mteb.

    Args:
        model: release folder, converted folder or hub id.
        dtype, mesh, revision: as for ``load``; the released models were evaluated in bfloat16.
        dim: Matryoshka size; default: the full size.
        max_length: longer texts are truncated to this many tokens; default: the registry's 8,192. Limited to the
            number of positions of the model.
        batch_tokens: as for ``Encoder.encode``.
        instructions_of: the model in the registry whose instructions to use; default: ``model`` itself if it is
            registered, else an F2LLM-v2 (all sizes share their instructions).

    Returns:
        A model for mteb. Results with settings other than the defaults are kept in a separate folder (mteb's
        ``experiments``).

    Raises:
        ReleaseError: the model cannot be loaded.
        InputError: an argument is out of range, the registry lacks the instructions, or mteb is not installed.
    """
    loader_kwargs = instructions(str(model), instructions_of)
    folder = find_release(model, revision)
    encoder = load(folder, dtype=dtype, mesh=mesh)
    config = encoder.config
    if dim is not None and dim not in range(1, config.hidden_size + 1):
        raise InputError(f"dim must be within 1..{config.hidden_size}, not {dim}")
    given = {"embed_dim": dim, "max_length": max_length, "instructions_of": instructions_of}
    settings = {name: value for name, value in given.items() if value is not None}
    if dtype != DTYPE:
        settings["dtype"] = dtype
    meta = _model_meta(model, folder, config, dtype=dtype, dim=dim, settings=settings)
    limit = min(max_length or loader_kwargs.get("max_seq_length", MAX_LENGTH), config.max_position_embeddings)
    return MTEBEncoder(encoder, meta, loader_kwargs, dim=dim, max_length=limit, batch_tokens=batch_tokens)


def evaluate_mteb(
    model: MTEBEncoder,
    tasks: Sequence[AbsTask],
    results: str | Path,
    *,
    show_progress: bool = False,
) -> ModelResult:
    """Runs MTEB tasks; existing results are kept.

    Args:
        model: from ``mteb_model``.
        tasks: from ``mteb_tasks``, or defined by the caller.
        results: a folder, which gets ``results/MODEL/REVISION/TASK.json`` in mteb's layout. A run that was stopped can
            be resumed: splits and subsets that have results are not computed again.
        show_progress: show progress bars on standard error.
    """
    return mteb.evaluate(
        model,
        tasks,
        cache=mteb.ResultCache(results),
        encode_kwargs={"show_progress_bar": show_progress},
        overwrite_strategy="only-missing",
        show_progress_bar=show_progress,
    )


def mteb_tasks(names: Sequence[str] = (), benchmark: str | None = None) -> list[AbsTask]:
    """The tasks with these names, and those of a benchmark such as ``MTEB(eng, v2)``.

    Raises:
        InputError: the installed mteb has no task or benchmark of that name; the message suggests the nearest.
    """
    try:
        tasks = [mteb.get_task(name) for name in names]
        return tasks + (list(mteb.get_benchmark(benchmark).tasks) if benchmark is not None else [])
    except KeyError as error:
        raise InputError(f"mteb {mteb.__version__}: {error.args[0].removeprefix('KeyError: ')}") from None


def mteb_table(results: ModelResult) -> str:
    """The main score of every task, one line each."""
    lines = [(result.task_name, f"{result.get_score():.4f}") for result in results.task_results]
    columns = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:{columns}}  {score}" for name, score in lines)


def _model_meta(
    model: str | Path,
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str,
    dim: int | None,
    settings: dict[str, Any],
) -> ModelMeta:
    """The model's registry entry with what differs here; for a model not in the registry, what the release states."""
    parameters = count_parameters(config)
    here: dict[str, Any] = {
        "loader": partial(_load_for_mteb, model=str(model)),
        "loader_kwargs": {name: value for name, value in settings.items() if name != "embed_dim"},
        "revision": _revision(folder),
        "framework": ["JAX"],
        "n_parameters": parameters,
        "n_embedding_parameters": config.vocab_size * config.hidden_size,
        "memory_usage_mb": math.ceil(params_bytes(config, dtype) / 2**20),
        "max_tokens": config.max_position_embeddings,
        "embed_dim": dim or list(config.matryoshka_dims),
        "experiment_kwargs": settings or None,
        "output_dtypes": _OUTPUT_DTYPES[dtype],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
    }
    entry = registered(str(model))
    if entry is not None:
        return entry.model_copy(update=here, deep=True)
    name = str(model) if not Path(model).is_dir() else f"local/{Path(model).resolve().name}"
    return ModelMeta(
        name=name,
        release_date=None,
        languages=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        training_datasets=None,
        **here,
    )


def _load_for_mteb(
    name: str, *, model: str, revision: str | None = None, embed_dim: int | None = None, **settings: Any
) -> MTEBEncoder:
    """Called by ``ModelMeta.load_model``; ``name`` is only for tables, and ``revision`` is ignored for a folder."""
    return mteb_model(model, dim=embed_dim, revision=None if Path(model).is_dir() else revision, **settings)


def _revision(folder: Path) -> str:
    """The commit of a hub snapshot; for any other folder, a digest.

    Results are kept by revision: new weights under an old name must not get the old results.
    """
    return folder.name if folder.parent.name == "snapshots" else model_digest(folder)[:40]
