"""Models of int8: whole numbers are multiplied exactly, and the embeddings stay near those of float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import bitext, xquad

import f2llm_jax
from f2llm_jax import InputError, make_mesh
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.convert.load import load_params, open_checkpoint, params_bytes
from f2llm_jax.dtypes import DTYPES
from f2llm_jax.evaluation.embedders import load_embedder
from f2llm_jax.evaluation.mteb_adapter import mteb_model
from f2llm_jax.layerwise import LONGEST_ROW
from f2llm_jax.planning.jobs import EncodeJob
from f2llm_jax.products import int8_product, int8_rows


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b.astype(np.float64)).sum(axis=1)


def test_rows_are_rounded_to_the_nearest_of_their_levels():
    x = np.random.default_rng(0).standard_normal((6, 4, 32), np.float32) * 10.0 ** np.arange(-3, 3)[:, None, None]
    x[2, 1] = 0
    levels, scale = int8_rows(jnp.asarray(x), 1)
    assert levels.dtype == jnp.int8 and scale.shape == (6, 4)
    assert set(np.abs(np.asarray(levels)).max(axis=-1).ravel()) == {0, 127}  # all of the range is used
    rebuilt = np.asarray(levels, np.float64) * np.asarray(scale, np.float64)[..., None]
    assert np.all(np.abs(rebuilt - x) <= 0.5001 * np.asarray(scale)[..., None])
    of_matrices, one_scale = int8_rows(jnp.asarray(x), 2)
    assert one_scale.shape == (6,)
    np.testing.assert_array_equal(np.abs(np.asarray(of_matrices)).max(axis=(1, 2)), 127)


def test_the_product_is_that_of_the_rounded_numbers():
    random = np.random.default_rng(1)
    x = random.standard_normal((5, 300), np.float32)
    weight, scale_o = int8_rows(jnp.asarray(random.standard_normal((7, 300), np.float32)), 1)
    levels, scale_m = (np.asarray(part, np.float64) for part in int8_rows(jnp.asarray(x), 1))
    expected = levels @ np.asarray(weight, np.float64).T * scale_m[:, None] * np.asarray(scale_o, np.float64)
    np.testing.assert_allclose(int8_product(jnp.asarray(x), weight, scale_o), expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def models(real_release):
    return {dtype: f2llm_jax.load(real_release, dtype=dtype) for dtype in ("float32", "bfloat16", "int8")}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    questions, paragraphs = xquad(1)
    return questions[:8] + paragraphs[:2] + bitext(1)[:22]


def test_embeddings_are_near_those_of_float32(models, texts):
    exact, rounded = (models[dtype].encode(texts) for dtype in ("float32", "int8"))
    assert cosines(exact, rounded).min() > 0.999
    assert cosines(exact, rounded).max() < 0.999999  # something was rounded
    # Neighbours stay neighbours: of the six nearest of 31 texts, nine tenths.
    nearest = [np.argsort(-(e @ e.T), axis=1)[:, 1:7] for e in (exact, rounded)]
    kept = np.mean([len(set(a) & set(b)) / 6 for a, b in zip(*nearest, strict=True)])
    assert kept > 0.9


def test_layers_take_a_byte_for_each_weight(models):
    def bytes_of(dtype: str) -> int:
        layers = models[dtype].params["layers"]
        return sum(leaf.nbytes for leaf in jax.tree.leaves((layers["attention"], layers["mlp"])))

    assert bytes_of("int8") < 0.56 * bytes_of("bfloat16")
    assert models["int8"].params["embed_tokens"].dtype == jnp.bfloat16
    assert models["int8"].params["layers"]["mlp"]["down_proj"]["weight"].dtype == jnp.int8


def test_a_text_does_not_depend_on_its_neighbours(models, texts):
    together = models["int8"].encode(texts)
    alone = np.stack([models["int8"].encode(text) for text in texts[:3]])
    bucketed = models["int8"].encode(texts, layout="bucketed")
    assert cosines(together[:3], alone).min() > 0.9999
    assert cosines(together, bucketed).min() > 0.9999


def test_one_program_computes_what_one_for_each_layer_does(models, texts):
    """Rows of more than 256 tokens are computed by the first, shorter ones by the second."""
    model = models["int8"]
    ids = model.tokenizer.encode([" ".join(texts)], 500)[0]
    assert len(ids[0]) > LONGEST_ROW
    batch = f2llm_jax.Batch(np.asarray(ids[0], np.int32)[None], np.array([len(ids[0])], np.int32))
    one = f2llm_jax.embed(model.params, batch, config=model.config, dtype=jnp.bfloat16)
    each = model._layerwise(batch, model.config.hidden_size)
    assert cosines(np.asarray(one), np.asarray(each)).min() > 0.9999


def test_on_a_mesh(models, real_release, texts):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = f2llm_jax.load(real_release, dtype="int8", mesh=mesh)
    one = models["int8"].params["layers"]
    for name, projection in {**model.params["layers"]["attention"], **model.params["layers"]["mlp"]}.items():
        own = {**one["attention"], **one["mlp"]}[name]
        for part, value in projection.items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(own[part]), err_msg=f"{name}.{part}")
        if "scale" in projection:  # lies where the rows of the weight lie
            spec = projection["weight"].sharding.spec
            assert tuple(projection["scale"].sharding.spec) == tuple(spec[: projection["scale"].ndim])
    assert cosines(model.encode(texts), models["int8"].encode(texts)).min() > 0.999
    copied = model.copy_to(jax.devices()[::-1])
    np.testing.assert_array_equal(copied.encode(texts[:8]), model.encode(texts[:8]))


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_model_loads_whatever_mesh_is_set(models, real_release, axes):
    mesh = None if axes is None else make_mesh(**axes)
    with jax.set_mesh(make_mesh(tensor=2, devices=jax.devices()[:2])):
        params = load_params(
            open_checkpoint(real_release), models["int8"].config, dtype="bfloat16", int8=True, mesh=mesh
        )
    jax.tree.map(np.testing.assert_array_equal, params["layers"], models["int8"].params["layers"])


def test_what_an_evaluation_says_of_it(models, real_release, texts):
    embedder = load_embedder(str(real_release), dtype="int8")
    np.testing.assert_array_equal(embedder.encode(texts[:4], "document"), models["int8"].encode_document(texts[:4]))
    params = models["int8"].params
    meta = mteb_model(str(real_release), dtype="int8").mteb_model_meta
    assert meta.experiment_kwargs == {"dtype": "int8"}
    measured = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
    assert measured <= meta.memory_usage_mb < measured + 1


def test_a_converted_folder_gives_the_same(models, real_release, texts, tmp_path):
    convert_release(real_release, tmp_path / "flax", to="flax")
    converted = f2llm_jax.load(tmp_path / "flax", dtype="int8")
    np.testing.assert_array_equal(converted.encode(texts[:20]), models["int8"].encode(texts[:20]))


def test_int8_is_of_weights_alone(tiny, tiny_release):
    batch = f2llm_jax.Batch(np.zeros((1, 4), np.int32), np.ones(1, np.int32))
    with pytest.raises(InputError, match="with int8 projections, bfloat16"):
        f2llm_jax.embed(tiny.params, batch, config=tiny.config, dtype="int8")
    with pytest.raises(InputError, match="float32, bfloat16, not 'int8'"):
        load_params(open_checkpoint(tiny_release), tiny.config, dtype="int8")
    with pytest.raises(InputError, match="float32, bfloat16, int8, not 'int4'"):
        EncodeJob(config=tiny.config, dtype="int4")


def test_no_other_dtype_is_taken(real_release):
    with pytest.raises(InputError, match="float32, bfloat16, int8, not 'int4'"):
        f2llm_jax.load(real_release, dtype="int4")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_counted_without_loading(models, dtype):
    assert params_bytes(models[dtype].config, dtype) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(models[dtype].params)
    )
