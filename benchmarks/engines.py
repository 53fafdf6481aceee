"""The engines that encode.py compares: each computes the same embeddings from the same texts, in its own process.

Every engine is used as an experienced user would: with its own fast tokenizer, texts of similar length in a batch, rows
padded on the right to the longest in their batch, all cores, and the batch size that was fastest for these texts.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from f2llm_jax.config import ModelConfig

THREADS = len(os.sched_getaffinity(0))
DEVICES = ("cpu", "gpu")

# A setting is tuned for a kind of texts: {name: value}, passed to ``encode``. A ladder lists settings from small to
# large batches; an engine has ladders for each device that it is compared on.
Setting = dict[str, Any]
Ladders = dict[str, list[list[Setting]]]

_BATCH_ROWS = {"cpu": (4, 8, 16, 32, 64, 128), "gpu": (64, 256, 1024)}
_BATCH_TOKENS = (256, 512, 1024, 2048, 4096)


class Torch:
    """sentence-transformers on PyTorch, attention by ``scaled_dot_product_attention``; it sorts texts itself."""

    usual: ClassVar[dict[str, Setting]] = {"cpu": {"batch_size": 32}, "gpu": {"batch_size": 64}}
    ladders: ClassVar[Ladders] = {
        device: [[{"batch_size": rows} for rows in ladder]] for device, ladder in _BATCH_ROWS.items()
    }

    def __init__(self, release: Path, dtype: str, device: str):
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(THREADS)
        options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        where = {"cpu": "cpu", "gpu": "cuda"}[device]
        self.model = SentenceTransformer(str(release), device=where, model_kwargs=options)

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        return self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    def peak_bytes(self) -> int:
        """Peak memory of the GPU."""
        import torch

        return torch.cuda.max_memory_allocated()


class F2LLM:
    """f2llm_jax as a user calls it; it has nothing to tune."""

    usual: ClassVar[dict[str, Setting]] = {device: {} for device in DEVICES}
    ladders: ClassVar[Ladders] = {device: [] for device in DEVICES}

    def __init__(self, release: Path, dtype: str, device: str):
        import jax

        import f2llm_jax

        if jax.default_backend() != device:
            raise SystemExit(f"JAX sees no {device}, but {jax.devices()}")
        self.model = f2llm_jax.load(release, dtype=dtype)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.model.encode(texts)

    def computed_tokens(self, texts: list[str]) -> int:
        """Tokens computed for the texts, without padding; a common prefix counts once per row."""
        ids, _ = self.model.tokenizer.encode(texts, self.model.max_length)
        _, batches = self.model._batches(iter([ids]), "auto", self.model._batch_tokens(), self.model.max_length)
        return sum(rows.batch.tokens_bt.size - rows.padding for rows in batches)

    def peak_bytes(self) -> int:
        """Peak memory of the GPU."""
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


class OnnxRuntime:
    """ONNX Runtime, float32."""

    usual: ClassVar[dict[str, Setting]] = {"cpu": {"batch_tokens": 512}}
    ladders: ClassVar[Ladders] = {"cpu": [[{"batch_tokens": tokens} for tokens in _BATCH_TOKENS]]}

    def __init__(self, release: Path, dtype: str, device: str):
        import onnxruntime

        assert (dtype, device) == ("float32", "cpu")
        self.tokenizer = _tokenizer(release)
        self.hidden_size = ModelConfig.from_release(release).hidden_size
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = onnxruntime.InferenceSession(release / EXPORT, options, providers=["CPUExecutionProvider"])

    def encode(self, texts: list[str], batch_tokens: int) -> np.ndarray:
        results = np.empty((len(texts), self.hidden_size), np.float32)
        for rows, inputs in _batches(self.tokenizer, texts, batch_tokens):
            results[rows] = self.session.run(None, inputs)[0]
        return results


class OpenVino:
    """OpenVINO, float32 or bfloat16; its hint selects between all cores for one batch and one batch per core."""

    usual: ClassVar[dict[str, Setting]] = {"cpu": {"hint": "LATENCY", "batch_tokens": 512}}
    ladders: ClassVar[Ladders] = {
        "cpu": [
            [{"hint": hint, "batch_tokens": tokens} for tokens in _BATCH_TOKENS] for hint in ("LATENCY", "THROUGHPUT")
        ]
    }

    def __init__(self, release: Path, dtype: str, device: str):
        assert device == "cpu"
        self.tokenizer = _tokenizer(release)
        self.hidden_size = ModelConfig.from_release(release).hidden_size
        self.graph = release / EXPORT
        self.precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        self.hint: str | None = None

    def encode(self, texts: list[str], hint: str, batch_tokens: int) -> np.ndarray:
        if hint != self.hint:
            self._compile(hint)
        results = np.empty((len(texts), self.hidden_size), np.float32)
        pending: deque[tuple[Any, list[int]]] = deque()

        def store() -> Any:
            request, rows = pending.popleft()
            request.wait()
            results[rows] = request.get_output_tensor(0).data
            return request

        for rows, inputs in _batches(self.tokenizer, texts, batch_tokens):
            request = self.requests[len(pending)] if len(pending) < len(self.requests) else store()
            request.start_async(inputs)
            pending.append((request, rows))
        while pending:
            store()
        return results

    def _compile(self, hint: str) -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": hint,
            "INFERENCE_NUM_THREADS": THREADS,
        }
        self.requests: list[Any] = []  # frees the previous model
        model = openvino.Core().compile_model(self.graph, "CPU", settings)
        at_a_time = model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.requests = [model.create_infer_request() for _ in range(at_a_time)]
        self.hint = hint


def _tokenizer(release: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(release / "tokenizer.json"))


def _batches(tokenizer: Any, texts: list[str], batch_tokens: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(texts, inputs of the exported graph), longest texts first, with at most ``batch_tokens`` per batch."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    order = sorted(range(len(ids)), key=lambda text: -len(ids[text]))
    first = 0
    while first < len(order):
        length = len(ids[order[first]])
        rows = order[first : first + max(batch_tokens // length, 1)]
        first += len(rows)
        tokens_bt = np.zeros((len(rows), length), np.int64)
        for row, text in enumerate(rows):
            tokens_bt[row, : len(ids[text])] = ids[text]
        yield (
            rows,
            {
                "tokens": tokens_bt,
                "positions": np.arange(length, dtype=np.int64)[None],
                "mask": _causal_mask(length),
                "last": np.array([len(ids[text]) - 1 for text in rows], np.int64),
            },
        )


@functools.lru_cache(maxsize=64)
def _causal_mask(length: int) -> np.ndarray:
    """Additive float32 [1, 1, length, length]. Padding comes after the EOS, so the causal mask hides it too."""
    return np.triu(np.full((length, length), np.finfo(np.float32).min, np.float32), 1)[None, None]


# The file that ``export`` writes to the release folder.
EXPORT = "onnx/model.onnx"


def export(release: Path) -> None:
    """Writes transformers' Qwen3Model with EOS pooling and normalisation as an ONNX graph, in float32.

    The mask is an input: transformers creates its own with value-dependent operations, which cannot be traced. Of the
    exporters (TorchScript, dynamo) and attentions (eager, sdpa), TorchScript's graph with eager attention ran fastest:
    15 % faster than dynamo's in ONNX Runtime, 5 % faster than OpenVINO's own conversion in OpenVINO.
    """
    import torch
    import transformers

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = transformers.Qwen3Model.from_pretrained(
                release, dtype=torch.float32, attn_implementation="eager"
            )

        def forward(self, tokens: Any, positions: Any, mask: Any, last: Any) -> Any:
            states = self.backbone(
                input_ids=tokens, position_ids=positions, attention_mask={"full_attention": mask}, use_cache=False
            ).last_hidden_state
            states = states[torch.arange(states.shape[0]), last]
            return torch.nn.functional.normalize(states, dim=-1)

    rows, length = 3, 7
    example = {
        "tokens": torch.randint(0, 1000, (rows, length)),
        "positions": torch.arange(length)[None],
        "mask": torch.from_numpy(_causal_mask(length)),
        "last": torch.tensor([6, 3, 2]),
    }
    file = release / EXPORT
    file.parent.mkdir(exist_ok=True)
    with torch.no_grad():
        torch.onnx.export(
            Pooled().eval(),
            tuple(example.values()),
            str(file),
            dynamo=False,
            opset_version=17,
            input_names=list(example),
            output_names=["embedding"],
            dynamic_axes={
                "tokens": {0: "b", 1: "t"},
                "positions": {1: "t"},
                "mask": {2: "t", 3: "t"},
                "last": {0: "b"},
            },
        )


class Ceiling:
    """The rate of this machine's matrix products in JAX, which no engine on JAX can exceed.

    On a CPU, it is measured at the model's own shapes: with weights of a layer separate and joined (query, key and
    value; gate and up), in both orientations, and with several numbers of rows; the fastest counts. On a GPU, it is the
    rate of one large bfloat16 product, the figure that cards are advertised with.
    """

    ROWS = (512, 1024, 2048)
    SQUARE = 8192

    def __init__(self, release: Path, dtype: str, device: str):
        from f2llm_jax.compilation import use_compilation_cache

        use_compilation_cache()
        if device == "gpu":
            shape = (self.SQUARE, self.SQUARE)
            self.parts = (((shape,),),)
            self.dtypes = ("bfloat16",)
            self.fastest = {(shape, "bfloat16"): _Product(self.SQUARE, shape, "bfloat16", False, out="bfloat16")}
            return
        c = ModelConfig.from_release(release)
        d, f = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        # For each part of a layer, the ways to compute it, as (inputs, outputs) of the products.
        self.parts = (
            (((d, q), (d, kv), (d, kv)), ((d, q + 2 * kv),)),
            (((q, d),),),
            (((d, f), (d, f)), ((d, 2 * f),)),
            (((f, d),),),
        )
        self.dtypes = ("float32", "bfloat16")
        self.fastest = {
            (shape, dtype): min(self._products(shape, dtype), key=lambda product: product.seconds_per_row(3))
            for dtype in self.dtypes
            for shape in {shape for ways in self.parts for way in ways for shape in way}
        }

    def encode(self) -> dict[str, float]:
        """FLOP/s of the products of a whole layer, by dtype of the operands; results are float32."""
        flops = 2 * sum(math.prod(shape) for ways in self.parts for shape in ways[0])
        rates = {}
        for dtype in self.dtypes:
            seconds = {
                shape: product.seconds_per_row(5) for (shape, of), product in self.fastest.items() if of == dtype
            }
            rates[dtype] = flops / sum(min(sum(seconds[shape] for shape in way) for way in ways) for ways in self.parts)
        return rates

    def _products(self, shape: tuple[int, int], dtype: str) -> Iterator[_Product]:
        for rows in self.ROWS:
            for transposed in (False, True):
                yield _Product(rows, shape, dtype, transposed)


class _Product:
    """y = x W in JAX: operands in ``dtype``, result in ``out``."""

    def __init__(self, rows: int, shape: tuple[int, int], dtype: str, transposed: bool, out: str = "float32"):
        import jax
        import jax.numpy as jnp

        inputs, outputs = shape
        random = np.random.default_rng(0)
        self.rows = rows
        self.x = jnp.asarray(random.standard_normal((rows, inputs), np.float32), dtype)
        weights = random.standard_normal((outputs, inputs) if transposed else (inputs, outputs), np.float32)
        self.w = jnp.asarray(weights, dtype)
        self.multiply = jax.jit(
            functools.partial(
                jnp.einsum,
                "mi,oi->mo" if transposed else "mi,io->mo",
                precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
                preferred_element_type=out,
            )
        )
        self.multiply(self.x, self.w).block_until_ready()

    def seconds_per_row(self, calls: int) -> float:
        """The minimum over a few calls, divided by the rows of the product."""
        return min(self._call() for _ in range(calls)) / self.rows

    def _call(self) -> float:
        start = time.perf_counter()
        self.multiply(self.x, self.w).block_until_ready()
        return time.perf_counter() - start


class Engine(NamedTuple):
    """An engine.

    Attributes:
        kind: its class.
        dtype: the dtype of the engines that it is compared with.
        weights: the dtype that it loads, if another.
    """

    kind: Any
    dtype: str
    weights: str | None = None


ENGINES = {
    "torch-fp32": Engine(Torch, "float32"),
    "onnxruntime-fp32": Engine(OnnxRuntime, "float32"),
    "openvino-fp32": Engine(OpenVino, "float32"),
    "f2llm-fp32": Engine(F2LLM, "float32"),
    "torch-bf16": Engine(Torch, "bfloat16"),
    "openvino-bf16": Engine(OpenVino, "bfloat16"),
    "f2llm-bf16": Engine(F2LLM, "bfloat16"),
    "f2llm-int8": Engine(F2LLM, "bfloat16", "int8"),
    "ceiling": Engine(Ceiling, "float32"),
}


def serve(connection: Any, name: str, release: Path, device: str) -> None:
    """A worker process: loads an engine, then answers requests of ``Worker`` in encode.py until it receives None.

    A request is (method, texts, setting). ``encode`` returns the result; ``time`` the wall seconds, the CPU seconds of
    all threads, and the result; ``computed`` the tokens that f2llm computes; ``peak`` the peak memory so far in bytes:
    resident memory of the process, or memory of the GPU.
    """
    engine = ENGINES[name].kind(release, ENGINES[name].weights or ENGINES[name].dtype, device)
    for method, texts, setting in iter(functools.partial(_receive, connection), None):
        arguments = () if texts is None else (texts,)
        if method == "encode":
            connection.send(engine.encode(*arguments, **setting))
        elif method == "computed":
            connection.send(engine.computed_tokens(*arguments))
        elif method == "time":
            start, cpu_start = time.perf_counter(), time.process_time()
            result = engine.encode(*arguments, **setting)
            connection.send((time.perf_counter() - start, time.process_time() - cpu_start, result))
        else:
            connection.send(engine.peak_bytes() if device == "gpu" else _peak_bytes())


def _receive(connection: Any) -> Any:
    """The next request; also None if the parent process has gone."""
    try:
        return connection.recv()
    except EOFError:
        return None


def _peak_bytes() -> int:
    """Peak resident memory. getrusage would start at the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
