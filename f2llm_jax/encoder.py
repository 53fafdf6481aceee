"""The Encoder: texts in, embeddings out."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from f2llm_jax.attention import longest_prefixed_row, resolve_kernel
from f2llm_jax.axes import batch_parts
from f2llm_jax.batching import BATCH_TOKENS, Buckets, Rows, batched
from f2llm_jax.compilation import give_back_memory, use_compilation_cache
from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.dtypes import DTYPES, float_dtype
from f2llm_jax.embedding import AnyBatch, check_dim, embed
from f2llm_jax.errors import InputError, warn, whole_number
from f2llm_jax.layerwise import LONGEST_ROW, Layerwise, bit_views
from f2llm_jax.model import Params, check_layers
from f2llm_jax.packing import Packing, choose_layout, packed
from f2llm_jax.pipeline import lagging
from f2llm_jax.quantization import check_float, check_ranges, output_spec, quantize
from f2llm_jax.release import find_release, pick_prompt, read_release
from f2llm_jax.sharding import make_mesh, padded_config, put_batch, replicated
from f2llm_jax.tokens import Tokenizer

logger = logging.getLogger(__name__)

# Texts per chunk of tokenisation, which runs one chunk ahead of computation.
_CHUNK_TEXTS = 2048

# Batches that a CPU computes concurrently, so that one uses the cores that the other leaves idle. XLA runs the calls of
# a single thread one after another.
_CPU_THREADS = 2

_embed = jax.jit(embed, static_argnames=("config", "dim", "dtype", "kernel"))


class Done(NamedTuple):
    """The progress of a call of ``Encoder.encode``.

    Attributes:
        texts: number of texts embedded so far.
        tokens: number of their tokens.
        truncated: number of texts that were too long, among those tokenised so far.
    """

    texts: int
    tokens: int
    truncated: int


class Encoder:
    """A model and its tokenizer, as returned by ``load``.

    Attributes:
        params: the parameters, a nested dict of arrays for ``f2llm_jax.embed``; read-only.
        config: the sizes.
        tokenizer: ``f2llm_jax.tokens.Tokenizer``.
        prompts: {name: text prepended to every input}.
        default_prompt_name: the prompt that a plain ``encode`` uses, or None.
        max_length: the default limit on the tokens of a text, EOS included.
        dtype: the dtype of the parameters and of the operands of matrix products; ``int8`` is that of the projections
            only, everything else is then bfloat16.
        mesh: the mesh that holds the parameters; None for one device.
        kernel: the attention kernel, one of ``attention.KERNELS``.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        max_length: int | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        kernel: str = "auto",
    ):
        check_layers(params, config)
        self._params = params
        self._platform = next(iter(jax.tree.leaves(params)[0].devices())).platform
        self.config = config
        self.tokenizer = tokenizer
        self.prompts = {"query": "", "document": "", **(prompts or {})}
        self.default_prompt_name = default_prompt_name
        self.max_length = max_length or config.max_position_embeddings
        self.dtype = dtype
        self._compute_dtype = jnp.dtype(float_dtype(dtype))
        self.mesh = mesh
        self._kernel_asked = kernel
        self.kernel = resolve_kernel(kernel, self._platform, self._compute_dtype)
        on_cpu = self._platform == "cpu" and mesh is None
        self._weights = bit_views(params) if on_cpu else params
        self._layerwise = Layerwise(params, config, dtype=self._compute_dtype, kernel=self.kernel) if on_cpu else None
        self._shapes_met: set[tuple[Any, ...]] = set()
        self._compiling = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``copy`` and, without a mesh (whose devices cannot be pickled), ``pickle``.

        Compiled programs, locks and views of the weights are made anew.
        """
        return _unpickle, (functools.partial(self._made_with, mesh=self.mesh), self._params)

    @property
    def params(self) -> Params:
        return self._params

    def copy_to(self, devices: Sequence[jax.Device]) -> Encoder:
        """The same model on other devices of this process, as many as it is on now.

        A corpus is encoded by as many copies as the devices allow.
        """
        mesh = None if self.mesh is None else make_mesh(**self.mesh.shape, devices=devices)

        def copy(x: Any) -> jax.Array:
            return jax.device_put(x, devices[0] if mesh is None else NamedSharding(mesh, x.sharding.spec))

        return self._made_with(jax.tree.map(copy, self._params), mesh=mesh)

    @property
    def _made_with(self) -> Callable[..., Encoder]:
        """Makes the same encoder with other parameters, on another mesh."""
        return functools.partial(
            Encoder,
            config=self.config,
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            max_length=self.max_length,
            dtype=self.dtype,
            kernel=self._kernel_asked,
        )

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Encoder(hidden_size={c.hidden_size}, layers={c.num_hidden_layers}, dtype={self.dtype}, mesh={self.mesh})"
        )

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dim: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        layout: str = "auto",
        output: str = "float32",
        ranges: np.ndarray | None = None,
        show_progress: bool = False,
        on_batch: Callable[[Done], None] | None = None,
    ) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: a list of strings, or one string.
            prompt_name: which of ``prompts`` to prepend to each text; default ``default_prompt_name``.
            prompt: the text to prepend to each; takes precedence over ``prompt_name``.
            dim: Matryoshka size: embeddings are truncated to the first ``dim`` values, then normalised. Default and
                limit: the hidden size. Any size works; ``config.matryoshka_dims`` are those the model is trained at.
            max_length: longer texts are truncated to this many tokens, EOS included, and reported once per call as a
                warning.
            batch_tokens: tokens per batch (rows · length); larger batches take more memory.
            layout: ``bucketed`` (one text per row, rows in length buckets), ``packed`` (many texts per row; a prefix
                common to all texts may be stored once per row), or ``auto`` for what the platform computes faster; the
                embeddings are the same.
            output: ``float32``, ``bfloat16`` or ``float16``; ``int8`` (needs ``ranges``); ``binary`` or ``ubinary``
                (one bit per dimension, packed as in sentence-transformers).
            ranges: float [2, dim] from ``int8_ranges``, for ``output="int8"``.
            show_progress: show a progress bar with texts/s, tokens/s and the share of padding on standard error.
            on_batch: called after every batch; truncated texts are then left to the caller to report, and what it
                raises ends the call.

        Returns:
            [n, dim] unit embeddings in the order of ``texts``; [n, ceil(dim / 8)] for packed bits; [dim] for a string.

        Raises:
            InputError: a text is not a string, or an argument is out of range; the message names it.
        """
        single = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else _as_list(texts)
        for index, text in enumerate(texts):
            _check_text(f"text {index}", text)
        dim = check_dim(dim, self.config)
        columns, dtype = output_spec(output, dim)
        ranges = check_ranges(output, ranges, dim)
        if max_length is not None:
            max_length = whole_number("max_length", max_length, self.config.max_position_embeddings)
        batch_tokens = self._batch_tokens() if batch_tokens is None else whole_number("batch_tokens", batch_tokens)
        prefix = pick_prompt(self.prompts, self.default_prompt_name, prompt_name, prompt)
        _check_text("the prompt", prefix)

        result = np.empty((len(texts), columns), dtype)
        embeddings = self._embeddings(
            texts,
            prefix,
            dim,
            max_length or self.max_length,
            batch_tokens,
            layout,
            show_progress,
            on_batch,
        )
        for rows, embeddings_nd in embeddings:
            result[rows] = quantize(embeddings_nd, output, ranges)
        return result[0] if single else result

    def encode_query(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """``encode`` with the ``query`` prompt, unless ``prompt`` or ``prompt_name`` is given."""
        return self.encode(texts, **self._with_prompt("query", options))

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """``encode`` with the ``document`` prompt, unless ``prompt`` or ``prompt_name`` is given."""
        return self.encode(texts, **self._with_prompt("document", options))

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities of float embeddings: [n, dim] and [m, dim] give float32 [n, m]; a vector counts as n = 1.

        Raises:
            InputError: the embeddings are quantised, so that they have no cosine, or their sizes differ.
        """
        a, b = (np.atleast_2d(check_float(x, "similarity")) for x in (a, b))
        if a.shape[-1] != b.shape[-1]:
            raise InputError(f"similarity compares embeddings of one size, not of {a.shape[-1]} and {b.shape[-1]}")
        a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
        return a @ b.T

    @staticmethod
    def _with_prompt(name: str, options: dict[str, Any]) -> dict[str, Any]:
        given = options.get("prompt") is not None or options.get("prompt_name") is not None
        return options if given else {**options, "prompt_name": name}

    def _batch_tokens(self) -> int:
        devices = 1 if self.mesh is None else self.mesh.size
        return BATCH_TOKENS[self._platform] * devices

    def _embeddings(
        self,
        texts: list[str],
        prefix: str,
        dim: int,
        max_length: int,
        batch_tokens: int,
        layout: str,
        show_progress: bool,
        on_batch: Callable[[Done], None] | None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Indices of texts and their float32 unit embeddings [len, dim], in the order they are computed."""
        from tqdm import tqdm

        truncated = tokens = computed = padding = done = 0

        def sequences() -> Iterator[list[np.ndarray]]:
            nonlocal truncated
            for chunk, count in self._tokenised(texts, prefix, max_length):
                truncated += count
                yield chunk

        layout, batches = self._batches(sequences(), layout, batch_tokens, max_length)
        with (
            ThreadPoolExecutor(1 if self._layerwise is None else _CPU_THREADS, thread_name_prefix="compute") as pool,
            tqdm(total=len(texts), unit="text", disable=not show_progress, smoothing=0) as bar,
        ):

            def say_compiling(shape: int) -> None:
                bar.set_postfix_str(f"compiling shape {shape}")

            started = ((rows, self._start(rows.batch, dim, pool, say_compiling)) for rows in batches)
            for rows, embeddings in lagging(started):
                values_nd = embeddings().reshape(-1, dim)[rows.slots]
                done += len(rows.texts)
                tokens += rows.tokens
                computed += rows.batch.tokens_bt.size
                padding += rows.padding
                if on_batch is not None:
                    on_batch(Done(done, tokens, truncated))
                bar.update(len(rows.texts))
                if elapsed := bar.format_dict["elapsed"]:
                    speed = f"{tokens / elapsed:,.0f} tokens/s"
                    bar.set_postfix_str(f"{speed}, {padding / computed:.1%} padding", refresh=False)
                yield rows.texts, values_nd
        if computed:
            share = 100 * padding / computed
            logger.info("%d texts, %d tokens, rows %s, %.1f%% padding", len(texts), tokens, layout, share)
        if truncated and on_batch is None:
            message = f"{truncated} of {len(texts)} texts were longer than {max_length} tokens and were truncated"
            warn(message, every_time=True)  # each call truncates other texts

    def _batches(
        self, sequences: Iterator[list[np.ndarray]], layout: str, batch_tokens: int, max_length: int
    ) -> tuple[str, Iterator[Rows]]:
        """The layout, chosen from the first chunk, and the batches."""
        multiple = 1 if self.mesh is None else batch_parts(self.mesh)
        buckets = Buckets(batch_tokens, max_length, multiple)
        longest_prefixed = longest_prefixed_row(self.kernel)
        packing = Packing.on(self._platform, batch_tokens, max_length, multiple, longest_prefixed=longest_prefixed)
        first = next(sequences, [])
        sequences = itertools.chain([first], sequences)
        layout = choose_layout(layout, self._platform, first, buckets, packing)
        if layout == "packed":
            return layout, packed(sequences, packing, self.tokenizer.pad_id)
        return layout, batched(sequences, buckets, self.tokenizer.pad_id)

    def _tokenised(self, texts: list[str], prefix: str, max_length: int) -> Iterator[tuple[list[np.ndarray], int]]:
        """Token ids in chunks; the next chunk is tokenised in a thread while the caller works on this one."""

        def tokenise(start: int) -> tuple[list[np.ndarray], int]:
            chunk = texts[start : start + _CHUNK_TEXTS]
            return self.tokenizer.encode([prefix + text for text in chunk] if prefix else chunk, max_length)

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as pool:
            started = (pool.submit(tokenise, start) for start in range(0, len(texts), _CHUNK_TEXTS))
            for chunk in lagging(started, 1):
                yield chunk.result()

    def _start(
        self, batch: AnyBatch, dim: int, pool: ThreadPoolExecutor, say_compiling: Callable[[int], None]
    ) -> Callable[[], np.ndarray]:
        """Starts the computation of a batch; the function returned waits for its result.

        Without a mesh, a thread of the pool does it, where JAX's thread-local settings are the defaults: the caller may
        have set a mesh that this model is not on. On CPUs that thread also waits for the result.
        """
        if self.mesh is not None:
            return functools.partial(np.asarray, self._compiled(self._dispatch, batch, dim, say_compiling))
        if self._layerwise is None:
            promise = pool.submit(self._compiled, self._dispatch, batch, dim, say_compiling)
            return lambda: np.asarray(promise.result())
        compute = self._layerwise if batch.tokens_bt.shape[1] <= LONGEST_ROW else self._dispatch
        return pool.submit(lambda: np.asarray(self._compiled(compute, batch, dim, say_compiling))).result

    def _compiled(
        self,
        compute: Callable[[AnyBatch, int], jax.Array],
        batch: AnyBatch,
        dim: int,
        say_compiling: Callable[[int], None],
    ) -> jax.Array:
        """``compute(batch, dim)``; for the first batch of each shape, by one thread at a time.

        That call compiles the programs or reads them from the cache, which with the 330M takes 200 MB each time;
        ``say_compiling`` gets the number of the shape, from 1. The memory that is freed then goes back to the system.
        """
        shapes = (dim, *(array.shape for array in batch))
        if shapes not in self._shapes_met:
            with self._compiling:
                if shapes not in self._shapes_met:
                    say_compiling(len(self._shapes_met) + 1)
                    embeddings = compute(batch, dim)
                    self._shapes_met.add(shapes)
                    give_back_memory()
                    return embeddings
        return compute(batch, dim)

    def _dispatch(self, batch: AnyBatch, dim: int) -> jax.Array:
        """Dispatches one program for the batch, without waiting for its result."""
        options = {
            "config": padded_config(self.config, self.mesh),
            "dim": dim,
            "dtype": self._compute_dtype,
            "kernel": self.kernel,
        }
        if self.mesh is None:
            return _embed(self._weights, batch, **options)
        with jax.set_mesh(self.mesh):
            embeddings_bd = _embed(self._weights, put_batch(batch, self.mesh), **options)
            if embeddings_bd.is_fully_addressable:
                return embeddings_bd
            return jax.device_put(embeddings_bd, replicated(self.mesh))  # each process has only its own rows, needs all


def _unpickle(make: Callable[[Params], Encoder], params: Params) -> Encoder:
    """Makes the encoder, perhaps in a process that has not loaded a model."""
    use_compilation_cache()
    return make(params)


def _as_list(texts: Any) -> list[str]:
    """The texts of a list or of a column; an InputError for anything that would yield keys or rows instead of texts."""
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping) or getattr(texts, "ndim", 1) != 1:
        kind = type(texts).__name__
        raise InputError(f"texts must be a list of strings or one string, not a {kind}; of a table give one column")
    return list(texts)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} is a {type(text).__name__}, not a string")
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} holds half of a surrogate pair, which is no character") from None


def load(
    model: str | Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    kernel: str = "auto",
    revision: str | None = None,
) -> Encoder:
    """Loads a model for encoding.

    Args:
        model: a release folder, a converted one, or a hub id such as ``codefuse-ai/F2LLM-v2-80M`` (through
            huggingface_hub: its cache, its login, ``HF_HUB_OFFLINE``).
        dtype: ``float32``; ``bfloat16``: parameters and operands of matrix products in bfloat16, everything in between
            in float32; or ``int8``: weights of projections in int8 with one scale per output, their inputs in int8 with
            one scale per token, everything else as with bfloat16. int8 halves the memory of the layers, for a little
            accuracy; on CPUs it is faster than bfloat16 with the 0.6B, slower for batches of the 80M
            (docs/performance.md). It is unrelated to ``encode(output="int8")``, which rounds embeddings.
        mesh: a mesh from ``make_mesh`` to spread the model over; None for one device.
        kernel: the attention kernel: ``auto`` for the platform's, or one of ``attention.KERNELS``.
        revision: branch, tag or commit of a hub id.

    Raises:
        ReleaseError: the folder or repository cannot be used; the message says what is wrong with which file.
        InputError: the dtype or the kernel is unknown, or the model does not divide over the mesh.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    use_compilation_cache()
    release = read_release(find_release(model, revision))
    tokenizer = Tokenizer.from_release(release.path)
    params = load_params(
        open_checkpoint(release.path), release.config, dtype=float_dtype(dtype), int8=dtype == "int8", mesh=mesh
    )
    return Encoder(
        params,
        release.config,
        tokenizer,
        prompts=release.prompts,
        default_prompt_name=release.default_prompt_name,
        max_length=release.max_length,
        dtype=dtype,
        mesh=mesh,
        kernel=kernel,
    )
