"""Prunes a model to a smaller one: the first layers, and the channels with the largest activations.

The reference published no code for this. The paper (arXiv:2603.19223) says: hidden and MLP channels by activation norms
on calibration data, the first layers, heads and head_dim unchanged. Here

1. layers are chosen, and the others removed,
2. calibration texts run through the remaining model, and the input of every projection is measured,
3. channels are chosen, hidden ones once for the whole residual stream and MLP ones per layer, and the others removed.

What is cut where follows from the logical axes that ``model.py`` declares: an axis ``embed`` keeps the chosen hidden
channels, ``mlp`` those of its layer, ``layers`` the chosen layers.

Removing a channel that is always zero must not change the result, but RMSNorm divides by a mean over all channels. Let
D channels become d, the others being zero, and let S be the sum of squares. With the stream scaled by c = sqrt(d / D),
and the norm's weights by 1 / c,

    c x / sqrt(c² S / d + eps) · (w / c) = x / sqrt(S / D + eps) · w

which is the norm's previous output, with the same eps. So everything that writes into the stream (the embedding table,
o_proj, down_proj) is scaled by c, the norms over the stream by 1 / c, and whatever reads a norm's output is unchanged.
Scaling the norms alone would require eps · D / d, but config.json has a single eps, which the norms of queries and keys
share.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from f2llm_jax.axes import batch_parts
from f2llm_jax.batching import Buckets, batched
from f2llm_jax.compilation import use_compilation_cache
from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.export import export_release
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.convert.staging import output_path, refuse_to_delete
from f2llm_jax.embedding import Batch
from f2llm_jax.errors import InputError
from f2llm_jax.evaluation import optional
from f2llm_jax.model import Backbone, Block, Params, Projection, abstract_params, apply, count_parameters
from f2llm_jax.release import Release, find_release, read_release
from f2llm_jax.sharding import padded_config, param_shardings
from f2llm_jax.texts import read_texts
from f2llm_jax.tokens import Tokenizer, truncated
from f2llm_jax.train.placement import on_mesh
from f2llm_jax.train.records import Records, Settings
from f2llm_jax.train.teacher import check_tokenizer

IMPORTANCES = ("l2", "mean", "weighted")
LAYERS_BY = ("first", "change")

# The axes that are cut, and the config field that holds the size of each.
_SIZES = {"embed": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers"}

_INTERMEDIATES = "intermediates"
_BATCH_TOKENS = 8192  # computed at a time on each device

Keep = Mapping[str, np.ndarray]
"""{logical axis: the indices to keep, in order}: ``layers`` [n], ``embed`` [d], ``mlp`` [layers, f]."""


class Sums(NamedTuple):
    """Measurements at one site: sums over all real tokens, for every channel.

    Attributes:
        axis: the logical axis of the channels.
        magnitude, square: sums of absolute values and of squares, float64 [channels], or [layers, channels].
    """

    axis: str
    magnitude: np.ndarray
    square: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of calibration.

    Attributes:
        texts, tokens: number of calibration texts and of their tokens.
        sites: {path of a projection: sums of its input}; the empty path is the model's output.
        change: float64 [layers], mean over tokens of 1 - cosine of a layer's input and output.
    """

    texts: int
    tokens: int
    sites: dict[str, Sums]
    change: np.ndarray


def prune(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str | Path,
    hidden: int | None = None,
    mlp: int | None = None,
    layers: int | None = None,
    importance: str = "l2",
    layers_by: str = "first",
    texts: int = 1024,
    max_length: int = 512,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    force: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Writes a smaller model as a release, with ``pruning.json`` and ``pruning.png`` in it.

    Memory: the parameters in float32, and those of the smaller model.

    Args:
        model: release folder, converted folder or hub id.
        out: the folder to write; it appears when it is complete.
        calibration: a file of texts (txt, jsonl, csv, parquet), or a folder written by ``f2llm prepare``, from whose
            training examples queries and passages are taken.
        hidden, mlp, layers: sizes of the smaller model; None for those of ``model``.
        importance: how a channel is scored where a projection reads it: ``mean``, mean absolute value; ``l2``, root
            mean square; ``weighted``, root mean square times the norm of the projection's weights for the channel.
        layers_by: ``first`` keeps the first layers; ``change`` keeps those that rotate their input most.
        texts: number of calibration texts, drawn at random if there are more.
        max_length: maximum tokens per text; longer texts are truncated.
        mesh: from ``make_mesh``; None for one device.
        dtype: dtype of the written weights; default: that of ``model``.
        force: replace ``out`` if it is a model folder.
        show_progress: show a progress bar on standard error.

    Returns:
        The report, as in ``pruning.json``.

    Raises:
        InputError: a size is out of range or does not divide over the mesh, an argument is none of those above,
            ``calibration`` cannot be used, or ``out`` exists or holds ``model``.
        ReleaseError: the model cannot be used.
    """
    _check_arguments(importance, layers_by, out, force)
    use_compilation_cache()
    release = read_release(find_release(model))
    refuse_to_delete(release.path, output_path(out))
    target = smaller_config(release.config, hidden=hidden, mlp=mlp, layers=layers)
    param_shardings(padded_config(target, mesh), mesh)  # rejects sizes that do not divide before any work is done
    sequences = _sequences(calibration, release, texts, max_length)
    params = load_params(open_checkpoint(release.path), release.config, mesh=mesh)
    look = functools.partial(measure, sequences=sequences, mesh=mesh, show_progress=show_progress)

    change = look(params, release.config).change if layers_by == "change" else None
    count = target.num_hidden_layers
    kept_layers = np.arange(count) if change is None else largest(change, count)
    params, config = smaller_params(params, release.config, {"layers": kept_layers}, mesh)

    measured = look(params, config)
    weights = weight_norms(params, config, measured) if importance == "weighted" else None
    scores = {axis: channel_scores(measured, axis, importance, weights) for axis in ("embed", "mlp")}
    keep = {axis: largest(score, getattr(target, _SIZES[axis])) for axis, score in scores.items()}
    keep["embed"] = in_place(keep["embed"])
    params, config = smaller_params(params, config, keep, mesh)

    report = {
        "from": {"model": str(model), **_about(release.config)},
        "to": _about(config),
        "importance": importance,
        "layers_by": layers_by,
        "calibration": {"source": str(calibration), "texts": measured.texts, "tokens": measured.tokens},
        "energy_kept": energy_kept(measured, keep),
        "change": None if change is None else change.tolist(),
        "layers": kept_layers.tolist(),
        "hidden_channels": keep["embed"].tolist(),
        "mlp_channels": keep["mlp"].tolist(),
    }
    files = {
        "pruning.json": (json.dumps(report, indent=1) + "\n").encode(),
        "pruning.png": picture(report, scores),
    }
    export_release(
        params, config, out, like=release.path, dtype=dtype or release.config.dtype, files=files, force=force
    )
    return report


def _check_arguments(importance: str, layers_by: str, out: str | Path, force: bool) -> None:
    """Raises errors that are better found before the work than after it."""
    for name, value, known in (("importance", importance, IMPORTANCES), ("layers_by", layers_by, LAYERS_BY)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    optional("matplotlib")
    if output_path(out).exists() and not force:
        raise InputError(f"{out} exists; --force replaces it")


def smaller_config(config: ModelConfig, *, hidden: int | None, mlp: int | None, layers: int | None) -> ModelConfig:
    """The config with other sizes, None for unchanged; heads and head_dim stay the same.

    Raises:
        InputError: a size is not between 1 and that of ``config``.
    """
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    wanted: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    for name, size in wanted.items():
        if not 1 <= size <= getattr(config, name):
            raise InputError(f"{name} can be cut to 1..{getattr(config, name)}, not to {size}")
    return dataclasses.replace(config, **wanted)


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the largest scores along the last axis, ascending; the first of equal scores win."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def in_place(kept: np.ndarray) -> np.ndarray:
    """Reorders indices: each one below ``len(kept)`` goes to the position equal to itself, the others fill the gaps.

    Distillation and the Matryoshka sizes go by position: the student's channel j is compared with the teacher's channel
    j. The order of hidden channels is free, so channels that both have are placed where they are compared.
    """
    placed = np.full(len(kept), -1)
    own = kept[kept < len(kept)]
    placed[own] = own
    placed[placed < 0] = kept[kept >= len(kept)]
    return placed


# --- measuring


def measure(
    params: Params,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    *,
    mesh: Mesh | None = None,
    show_progress: bool = False,
) -> Measured:
    """Runs texts through a model in float32, and sums up the inputs of its projections.

    Args:
        params: the parameters, on ``mesh``.
        config: their sizes.
        sequences: int32 token ids of every text, EOS included.
        mesh: the mesh; None for one device.
        show_progress: show a progress bar on standard error.
    """
    from tqdm import tqdm

    devices = 1 if mesh is None else mesh.size
    parts = 1 if mesh is None else batch_parts(mesh)
    longest = max(map(len, sequences))
    buckets = Buckets(_BATCH_TOKENS * devices, longest, parts)
    step = jax.jit(functools.partial(_sums, config=padded_config(config, mesh)))
    total: Any = None
    with tqdm(total=len(sequences), desc="calibration", unit="text", disable=not show_progress) as bar:
        for rows in batched([list(sequences)], buckets, pad_id=0):
            assert isinstance(rows.batch, Batch)
            tokens_bt, lengths_b = rows.batch.tokens_bt, np.array(rows.batch.lengths_b)
            lengths_b[len(rows.texts) :] = 0  # rows that only fill the batch hold no text
            sums = jax.device_get(on_mesh(step, params, Batch(tokens_bt, lengths_b), mesh))
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            bar.update(len(rows.texts))
    tokens = sum(map(len, sequences))
    flat = flax.traverse_util.flatten_dict(total, sep=".")
    places = {name.rpartition(".")[0] for name in flat if name.endswith("square")}
    axes = _input_axes(config)
    sites = {
        path: Sums(axes[path], *(flat[f"{path}.{name}".removeprefix(".")] for name in ("magnitude", "square")))
        for path in sorted(places)
    }
    return Measured(len(sequences), tokens, sites, flat["layers.change"] / tokens)


def _sums(params: Params, batch: Batch, *, config: ModelConfig) -> dict[str, Any]:
    """The sums that modules record for a batch, in a tree like that of the parameters; padding is not counted."""
    tokens_bt = batch.tokens_bt
    real_bt = jnp.arange(tokens_bt.shape[1]) < jnp.asarray(batch.lengths_b)[:, None]

    def note(module: nn.Module, **values_bt: jax.Array) -> None:
        for name, x in values_bt.items():
            real = real_bt.reshape(*real_bt.shape, *[1] * (x.ndim - 2))
            total = jnp.sum(jnp.where(real, x, 0), axis=(0, 1), dtype=jnp.float32)
            module.sow(_INTERMEDIATES, name, total, init_fn=lambda: None, reduce_fn=lambda _, value: value)

    def note_channels(module: nn.Module, x_btc: jax.Array) -> None:
        note(module, magnitude=jnp.abs(x_btc), square=jnp.square(x_btc))

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if context.method_name != "__call__":
            return result
        module = context.module
        if isinstance(module, Projection) and _reads(module.axes) in ("embed", "mlp"):
            note_channels(module, args[0])
        elif isinstance(module, Block):
            note(module, change=1 - _cosine(args[0], result))
        elif isinstance(module, Backbone):
            note_channels(module, result)
        return result

    with nn.intercept_methods(intercept):
        _, noted = apply(Backbone(config), params, tokens_bt, mutable=[_INTERMEDIATES])
    return noted[_INTERMEDIATES]


def _reads(axes: tuple[str, ...]) -> str:
    """The last of a projection's axes, which is that of its input."""
    return axes[-1]


def _cosine(x_btd: jax.Array, y_btd: jax.Array) -> jax.Array:
    norms_bt = jnp.linalg.norm(x_btd, axis=-1) * jnp.linalg.norm(y_btd, axis=-1)
    return jnp.sum(x_btd * y_btd, axis=-1) / jnp.maximum(norms_bt, 1e-30)


def _input_axes(config: ModelConfig) -> dict[str, str]:
    """{path of a module with a weight: the last logical axis of the weight}; the output has the empty path."""
    return {"": "embed", **{path.removesuffix(".weight"): _reads(box.names) for path, box in _boxes(config).items()}}


def _boxes(config: ModelConfig) -> dict[str, Any]:
    """{path of a parameter: its box, with shape and logical axes}."""
    return flax.traverse_util.flatten_dict(abstract_params(config), sep=".")


# --- choosing


def weight_norms(params: Params, config: ModelConfig, measured: Measured) -> dict[str, np.ndarray]:
    """{site: L2 norm of the weights that read each channel there}, float64 [layers, channels]; the output has none."""
    flat, boxes = flax.traverse_util.flatten_dict(params, sep="."), _boxes(config)

    def norms(path: str) -> np.ndarray:
        outputs = tuple(range(1, len(boxes[path].names) - 1))
        return np.asarray(jnp.sqrt(jnp.sum(jnp.square(flat[path]), axis=outputs)), np.float64)

    return {path: norms(f"{path}.weight") for path in measured.sites if path}


def channel_scores(
    measured: Measured, axis: str, importance: str, weights: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """The importance of each channel: the mean of its share over all sites where it is read.

    Args:
        measured: the result of calibration.
        axis: ``embed``, which is chosen once, or ``mlp``, which is chosen per layer.
        importance: one of ``IMPORTANCES``.
        weights: from ``weight_norms``, for ``weighted``.

    Returns:
        float64 [channels] or [layers, channels]; the sum over channels is 1.
    """
    shares = []
    for path, sums in measured.sites.items():
        if sums.axis != axis:
            continue
        score = sums.magnitude if importance == "mean" else np.sqrt(sums.square)
        if importance == "weighted" and path:
            assert weights is not None
            score = score * weights[path]
        shares.append(np.atleast_2d(score / score.sum(axis=-1, keepdims=True)))
    return np.concatenate(shares).mean(axis=0) if axis == "embed" else np.mean(shares, axis=0)


def energy_kept(measured: Measured, keep: Keep) -> dict[str, list[float]]:
    """{reader and its channels: the share of the sum of squares in the kept channels, for each layer}."""
    energy = {}
    for path, sums in measured.sites.items():
        square = np.atleast_2d(sums.square)
        kept = np.take_along_axis(square, np.broadcast_to(keep[sums.axis], (len(square), keep[sums.axis].shape[-1])), 1)
        # The projections of a block that read the same input have the same share.
        name = (
            f"{path.rpartition('.')[0].rpartition('.')[2] or 'output'}: {'hidden' if sums.axis == 'embed' else 'mlp'}"
        )
        energy[name] = (kept.sum(axis=1) / square.sum(axis=1)).tolist()
    return energy


# --- cutting


def smaller_params(params: Params, config: ModelConfig, keep: Keep, mesh: Mesh | None) -> tuple[Params, ModelConfig]:
    """The parameters with only the kept indices of some axes, and their config. Scales: see the module docstring.

    Args:
        params: the parameters on ``mesh``; returned as they are if nothing is removed.
        config: the sizes.
        keep: indices to keep; axes that are not named stay whole.
        mesh: the mesh; None for one device.

    Raises:
        InputError: the smaller sizes do not divide over the mesh.
    """
    sizes: dict[str, Any] = {_SIZES[axis]: index.shape[-1] for axis, index in keep.items()}
    smaller = dataclasses.replace(config, **sizes)
    if smaller == config:
        return params, config
    shrink = math.sqrt(smaller.hidden_size / config.hidden_size)

    def take(box: nn.LogicallyPartitioned, x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        scale, axes = _scale(box.names, shrink), [axis for axis in box.names if axis in keep]
        if scale == 1 and not axes:
            return x
        return jax.jit(lambda x: _take(x, box.names, keep) * scale, out_shardings=sharding)(x)

    shardings = param_shardings(padded_config(smaller, mesh), mesh)
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(take, abstract_params(config), params, shardings, is_leaf=is_box), smaller


def _take(x: jax.Array, axes: Sequence[str], keep: Keep) -> jax.Array:
    for position, axis in enumerate(axes):
        index = keep.get(axis)
        if index is None:
            continue
        if index.ndim == 1:
            x = jnp.take(x, index, axis=position)
        else:  # one choice per layer
            x = jax.vmap(functools.partial(jnp.take, axis=position - 1))(x, index)
    return x


def _scale(axes: Sequence[str], shrink: float) -> float:
    """The factor of a parameter when the residual stream is multiplied by ``shrink``."""
    axes = [axis for axis in axes if axis != "layers"]
    if axes == ["embed"]:  # a norm over the stream
        return 1 / shrink
    # Rows of the table and outputs of projections onto the stream are scaled; a projection's output axes come first.
    return shrink if axes[0] in ("vocab", "embed") else 1.0


# --- texts and report


def _sequences(source: str | Path, release: Release, count: int, max_length: int) -> list[np.ndarray]:
    """Token ids of ``count`` texts drawn at random, or of all texts if there are fewer."""
    rng = np.random.default_rng(0)
    source = Path(source).expanduser()
    if source.is_dir():
        prepared = Settings.read(source)
        check_tokenizer(release.path, prepared, source)
        return _prepared_sequences(source, count, max_length, prepared.eos_id, rng)
    texts = read_texts(source).texts
    if not texts:
        raise InputError(f"{source} holds no texts to calibrate with")
    chosen = np.sort(rng.permutation(len(texts))[:count])
    tokenizer = Tokenizer.from_release(release.path)
    return tokenizer.encode([texts[number] for number in chosen], min(max_length, release.max_length))[0]


def _prepared_sequences(
    folder: Path, count: int, max_length: int, eos_id: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Token ids of queries, with their instructions, and of their passages, half of ``count`` each."""
    examples = Records(folder, "examples", "train")
    chosen = examples.read(rng.permutation(len(examples))[: -(-count // 2)])
    passages = Records(folder, "documents", "train").read([example["passage"] for example in chosen])
    texts = [example["query"] for example in chosen] + [passage["tokens"] for passage in passages]
    return [truncated(text, max_length, eos_id) for text in texts]


def _about(config: ModelConfig) -> dict[str, int]:
    return {**{name: getattr(config, name) for name in _SIZES.values()}, "parameters": count_parameters(config)}


def picture(report: Mapping[str, Any], scores: Mapping[str, np.ndarray]) -> bytes:
    """A PNG: the energy kept per layer, and the importance of channels in descending order, with the cut-off."""
    optional("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, energy in report["energy_kept"].items():
        if len(energy) == len(report["layers"]):
            left.plot(report["layers"], energy, marker="o", label=f"read by {name}")
        else:
            left.axhline(energy[0], color="black", linestyle=":", label=name)
    left.set(xlabel="layer", ylabel="share of the sum of squares kept", ylim=(0, 1.05))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    for axis, score in scores.items():
        falling = -np.sort(-np.atleast_2d(score), axis=-1) * score.shape[-1]
        (line,) = right.plot(falling.mean(axis=0), label=f"{axis}: {report['importance']}")
        right.axvline(report["to"][_SIZES[axis]], color=line.get_color(), linestyle="--")
    right.set(xlabel="channel, by importance", ylabel="importance, 1 on average", yscale="log")
    right.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
