"""The model on meshes of 8 devices: where parameters lie, and that results are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import TINY, write_release

import f2llm_jax
from f2llm_jax import Batch, InputError, embed, init_params, make_mesh
from f2llm_jax.config import ModelConfig
from f2llm_jax.sharding import BATCH_SPEC, param_shardings

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}

# Every axis divides by 8.
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    rope_theta=1e6,
)

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


@pytest.fixture(scope="module")
def case():
    params = init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens_bt = rng.integers(0, CONFIG.vocab_size, (16, 24)).astype(np.int32)
    return params, Batch(tokens_bt, rng.integers(1, 25, 16).astype(np.int32))


def test_every_parameter_rests_where_the_rules_say():
    shardings = param_shardings(CONFIG, make_mesh(data=2, fsdp=2, tensor=2))
    flat = {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}
    assert {path: tuple(leaf.spec) for path, leaf in flat.items()} == SPECS


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_forward_and_gradients_are_those_of_one_device(case, axes):
    params, batch = case
    target_bd = jax.random.normal(jax.random.key(1), (16, CONFIG.hidden_size))

    def loss(params, batch):
        embeddings_bd = embed(params, batch, config=CONFIG)
        return jnp.sum(embeddings_bd * target_bd), embeddings_bd

    step = jax.value_and_grad(loss, has_aux=True)
    (_, expected_bd), expected_grads = jax.jit(step)(params, batch)

    mesh = make_mesh(**axes)
    shardings = param_shardings(CONFIG, mesh)
    with jax.set_mesh(mesh):
        (_, embeddings_bd), grads = jax.jit(step, out_shardings=(None, shardings))(
            jax.device_put(params, shardings), jax.device_put(batch, jax.NamedSharding(mesh, BATCH_SPEC))
        )
    assert np.abs(np.asarray(embeddings_bd) - np.asarray(expected_bd)).max() <= 2e-6
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        expected = expected_grads
        for key in path:
            expected = expected[key.key]
        assert np.abs(np.asarray(grad) - np.asarray(expected)).max() <= 1e-5 * np.abs(expected).max(), path


def test_weights_are_gathered_for_use_and_activations_stay_split(case):
    """ZeRO-3: the compiled program gathers weights over fsdp, and multiplies with whole rows of its own batch part."""
    params, batch = case
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


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_encode_is_that_of_one_device(tmp_path_factory, axes):
    folder = tmp_path_factory.getbasetemp() / "mesh-release"
    if not folder.exists():
        write_release(folder, CONFIG)
    texts = ["", "fox", "the quick brown fox jumps over the lazy dog " * 9, *(f"dog {n} " * n for n in range(1, 40))]
    expected = f2llm_jax.load(folder).encode(texts, prompt_name="query")
    got = f2llm_jax.load(folder, mesh=make_mesh(**axes)).encode(texts, prompt_name="query", batch_tokens=1024)
    assert np.abs(got - expected).max() <= 2e-6


def test_what_does_not_divide_is_an_error_with_the_numbers():
    with pytest.raises(InputError, match="2 kv_heads do not divide over tensor=8; tensor can be a divisor of 2"):
        param_shardings(TINY, make_mesh(tensor=8))
    with pytest.raises(InputError, match="a mesh data=3 fsdp=1 tensor=1 takes 3 devices, not 8"):
        make_mesh(data=3)
