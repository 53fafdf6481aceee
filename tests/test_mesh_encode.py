"""The model on meshes of 8 devices: where parameters lie, and that results are those of one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from releases import TINY, write_release

import f2llm_jax
from f2llm_jax import Batch, InputError, embed, init_params, make_mesh, packing
from f2llm_jax.axes import COMPUTE_RULES, partition_spec
from f2llm_jax.config import ModelConfig
from f2llm_jax.sharding import BATCH_SPEC, param_shardings
from f2llm_jax.vocabulary import lookup

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}

# Every axis divides by 8, and no other dimension is a part of the vocabulary, 8 · 67.
CONFIG = ModelConfig(
    vocab_size=536,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    rope_theta=1e6,
)

# Fewer key/value heads than tensor=8 has devices: every device has both, and uses one.
FEW_KV_HEADS = dataclasses.replace(CONFIG, num_key_value_heads=2)

# (storage spec of every parameter of a scanned model)
SPECS = {
    ("embed_tokens",): ("tensor", "fsdp"),
    ("layers", "attention", "q_proj", "weight"): (None, "tensor", None, "fsdp"),
    ("layers", "attention", "k_proj", "weight"): (None, "tensor", None, "fsdp"),
    ("layers", "attention", "v_proj", "weight"): (None, "tensor", None, "fsdp"),
    ("layers", "attention", "o_proj", "weight"): (None, "fsdp", "tensor", None),
    ("layers", "attention", "q_norm", "weight"): (None, None),
    ("layers", "attention", "k_norm", "weight"): (None, None),
    ("layers", "input_norm", "weight"): (None, "fsdp"),
    ("layers", "mlp", "gate_proj", "weight"): (None, "tensor", "fsdp"),
    ("layers", "mlp", "up_proj", "weight"): (None, "tensor", "fsdp"),
    ("layers", "mlp", "down_proj", "weight"): (None, "fsdp", "tensor"),
    ("layers", "mlp_norm", "weight"): (None, "fsdp"),
    ("norm", "weight"): ("fsdp",),
}


@functools.cache
def case(config):
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens_bt = rng.integers(0, config.vocab_size, (16, 24)).astype(np.int32)
    return params, Batch(tokens_bt, rng.integers(1, 25, 16).astype(np.int32))


def step(params, batch, *, config):
    """The gradient, and the embeddings that a loss is of."""
    target_bd = jax.random.normal(jax.random.key(1), (16, config.hidden_size))

    def loss(params):
        embeddings_bd = embed(params, batch, config=config)
        return jnp.sum(embeddings_bd * target_bd), embeddings_bd

    return jax.grad(loss, has_aux=True)(params)


@functools.cache
def of_one_device(config):
    return jax.jit(functools.partial(step, config=config))(*case(config))


def test_every_parameter_rests_where_the_rules_say():
    def specs(config, mesh):
        leaves = jax.tree_util.tree_leaves_with_path(param_shardings(config, mesh))
        return {tuple(key.key for key in path): tuple(leaf.spec) for path, leaf in leaves}

    assert specs(CONFIG, make_mesh(data=2, fsdp=2, tensor=2)) == SPECS
    everywhere = {path: (None, None, None, "fsdp") for path in SPECS if {"k_proj", "v_proj"} & {*path}}
    assert len(everywhere) == 2
    assert specs(FEW_KV_HEADS, make_mesh(tensor=8)) == {**SPECS, **everywhere}


@pytest.mark.parametrize(
    ("config", "axes"),
    [*((CONFIG, axes) for axes in MESHES.values()), (FEW_KV_HEADS, MESHES["tensor"])],
    ids=[*MESHES, "few key/value heads"],
)
def test_forward_and_gradients_are_those_of_one_device(config, axes):
    params, batch = case(config)
    expected_grads, expected_bd = of_one_device(config)
    mesh = make_mesh(**axes)
    shardings = param_shardings(config, mesh)
    with jax.set_mesh(mesh):
        inputs = (jax.device_put(params, shardings), jax.device_put(batch, jax.NamedSharding(mesh, BATCH_SPEC)))
        run = jax.jit(functools.partial(step, config=config), out_shardings=(shardings, None))
        compiled = run.lower(*inputs).compile()
        grads, embeddings_bd = compiled(*inputs)
    assert np.abs(np.asarray(embeddings_bd) - np.asarray(expected_bd)).max() <= 2e-6
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        expected = expected_grads
        for key in path:
            expected = expected[key.key]
        assert np.abs(np.asarray(grad) - np.asarray(expected)).max() <= 1e-5 * np.abs(expected).max(), path
    # Neither the vocabulary table nor its gradient is ever gathered, over tensor or over fsdp.
    parts = {config.vocab_size // n for n in (1, 2, 4, 8)}
    gathered = [set(map(int, re.findall(r"\d+", shape))) for shape in gathers(compiled.as_text())]
    assert gathered or "fsdp" not in axes  # weights are
    assert not [dims for dims in gathered if dims & parts]


def gathers(hlo: str) -> list[str]:
    """The shapes of the results of all all-gathers of a program."""
    return re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", hlo)


def test_weights_are_gathered_for_use_and_activations_stay_split():
    """ZeRO-3: the compiled program gathers weights over fsdp, and multiplies with whole rows of its own batch part."""
    params, batch = case(CONFIG)
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(embed, static_argnames="config")
            .lower(
                jax.device_put(params, param_shardings(CONFIG, mesh)),
                jax.device_put(batch, jax.NamedSharding(mesh, BATCH_SPEC)),
                config=CONFIG,
            )
            .compile()
        )
    text = compiled.as_text()
    assert "all-gather" in text
    assert f"f32[2,24,{CONFIG.hidden_size}]" in text  # 16 rows over 8 devices
    assert f"f32[16,24,{CONFIG.hidden_size}]" not in text


@pytest.mark.parametrize("name", MESHES)
def test_encode_is_that_of_one_device(tmp_path_factory, monkeypatch, name):
    folder = tmp_path_factory.getbasetemp() / "mesh-release"
    if not folder.exists():
        write_release(folder, CONFIG)
    texts = ["", "fox", "the quick brown fox jumps over the lazy dog " * 9, *(f"dog {n} " * n for n in range(1, 40, 9))]
    expected = f2llm_jax.load(folder).encode(texts, prompt_name="query")
    model = f2llm_jax.load(folder, mesh=make_mesh(**MESHES[name]))
    for layout in ("bucketed", "packed") if name == "mixed" else ("bucketed",):
        got = model.encode(texts, prompt_name="query", batch_tokens=1024, layout=layout)
        assert np.abs(got - expected).max() <= 2e-6, layout
    # The rows of accelerators.
    monkeypatch.setattr(
        packing.Packing, "on", lambda _, *sizes, **options: packing.Packing(*sizes, row_length=256, prefixed_length=128)
    )
    got = model.encode(texts, prompt_name="query", batch_tokens=1024)
    assert np.abs(got - expected).max() <= 2e-6


def test_lookup_and_its_gradient_are_those_of_indexing():
    rng = np.random.default_rng(0)
    table_vd = rng.normal(size=(CONFIG.vocab_size, CONFIG.hidden_size)).astype(np.float32)
    weight_btd = rng.normal(size=(16, 24, CONFIG.hidden_size)).astype(np.float32)
    tokens_bt = rng.integers(0, CONFIG.vocab_size, (16, 24)).astype(np.int32)

    def loss(table_vd, take):
        x_btd = take(table_vd)
        return jnp.sum(x_btd * weight_btd), x_btd

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected_grad, expected_btd = step(table_vd, lambda table_vd: table_vd[tokens_bt])
    np.testing.assert_array_equal(expected_btd, table_vd[tokens_bt])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        sharded_vd = jax.device_put(table_vd, param_shardings(CONFIG, mesh)["embed_tokens"])
        grad, x_btd = step(sharded_vd, lambda table_vd: lookup(table_vd, jnp.asarray(tokens_bt)))
    np.testing.assert_array_equal(x_btd, expected_btd)
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=1e-6)
    assert grad.sharding.is_equivalent_to(sharded_vd.sharding, 2)


def test_on_tpus_the_table_is_not_gathered_either():
    """The real TPU compiler, which needs no TPU; forward and backward of the 80M's table on 16 chips."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = make_mesh(data=2, fsdp=2, tensor=4, devices=chips)

    def abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes)))

    table_vd = abstract((151936, 320), jnp.float32, "tensor", "fsdp")
    tokens_bt = abstract((64, 1024), jnp.int32, ("data", "fsdp"))
    step = jax.jit(lambda table_vd, tokens_bt: jax.grad(lambda x: jnp.sum(lookup(x, tokens_bt) ** 2))(table_vd))
    with jax.set_mesh(mesh):
        compiled = step.lower(table_vd, tokens_bt).compile()
    assert compiled.output_shardings.is_equivalent_to(table_vd.sharding, 2)
    text = compiled.as_text()
    assert "all-to-all" in text
    assert gathers(text) and not [shape for shape in gathers(text) if "151936" in shape or "37984" in shape]


def test_what_does_not_divide_is_an_error_with_the_numbers():
    with pytest.raises(InputError, match="4 heads do not divide over tensor=8; tensor can be a divisor of 4"):
        param_shardings(TINY, make_mesh(tensor=8))
    with pytest.raises(InputError, match="a mesh data=3 fsdp=1 tensor=1 takes 3 devices, not 8"):
        make_mesh(data=3)
    spec = functools.partial(partition_spec, rules=COMPUTE_RULES, mesh_shape={"data": 2, "fsdp": 2, "tensor": 16})
    with pytest.raises(InputError, match="6 rows do not divide over data=2 · fsdp=2; the rows can be a mult"):
        spec((6,), ("batch",))
    with pytest.raises(
        InputError, match=r"6 kv_heads do not divide over tensor=16; .* divisor of 6 or a multiple of it"
    ):
        spec((6,), ("kv_heads",))
    # The family's 8 key/value heads: on tensor=16 they are everywhere.
    assert spec((40, 8), ("layers", "kv_heads")) == jax.P(None, None)
    with pytest.raises(InputError, match="40 heads do not divide over tensor=16"):  # the 14B's
        spec((40, 40), ("layers", "heads"))


def test_a_model_on_one_device_encodes_whatever_mesh_is_set(tiny, monkeypatch):
    """As on accelerators, too: by one program that the host does not wait for."""
    texts = ["a", "bc", "d e f"]
    expected = tiny.encode(texts)
    with jax.set_mesh(make_mesh(data=8)):
        np.testing.assert_array_equal(tiny.encode(texts), expected)
        monkeypatch.setattr(tiny, "_layerwise", None)
        np.testing.assert_array_equal(tiny.encode(texts), expected)


def test_a_mesh_of_other_axes_is_refused(tiny, tiny_release):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    message = "the mesh has axes data, tensor; make_mesh makes one of data, fsdp, tensor"
    refused = pytest.raises(InputError, match=message)
    with refused:
        f2llm_jax.load(tiny_release, mesh=mesh)
    with jax.set_mesh(mesh), refused:
        f2llm_jax.init_params(tiny.config, jax.random.key(0))
    batch = Batch(np.zeros((4, 8), np.int32), np.full(4, 8))
    with jax.set_mesh(mesh), refused:
        f2llm_jax.embed(tiny.params, batch, config=tiny.config)
