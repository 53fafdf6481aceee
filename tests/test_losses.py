"""The losses against values and gradients that the reference repository's own functions gave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import SHARED

from f2llm_jax import InputError, losses

ORACLE = SHARED / "reference_losses.npz"
CASES = ("retrieval_small", "retrieval_mrl", "clustering_mrl", "classification_mrl", "no_negatives_mrl")
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason="shared/data/reference_losses.npz is not here")


def load_case(case: str) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    with np.load(ORACLE) as data:
        values = {name.removeprefix(f"{case}/"): data[name] for name in data.files if name.startswith(f"{case}/")}
    hidden = values["query"].shape[-1]
    return values, tuple(2**n for n in range(3, 15) if 2**n < hidden) if values["mrl"] else ()


def distillation(student: dict[str, jax.Array], values: dict[str, np.ndarray]) -> jax.Array:
    pairs = [(name, f"teacher_{name}") for name in ("query", "passage", "negatives")]
    terms = [losses.distillation_loss(student[own], values[its]) for own, its in pairs if its in values]
    return sum(terms, jnp.float32(0))


@needs_oracle
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_references(case):
    values, mrl_dims = load_case(case)
    features = {name: jnp.asarray(values[name]) for name in ("query", "passage", "negatives") if name in values}

    def terms(features):
        negatives = features.get("negatives")
        hard = losses.hard_negative_loss(features["query"], features["passage"], negatives, mrl_dims=mrl_dims)
        in_batch = losses.in_batch_loss(features["query"], features["passage"], mrl_dims=mrl_dims)
        return {"hard_loss": hard, "inbatch_loss": in_batch, "distill_loss": distillation(features, values)}

    def total(features):
        found = terms(features)
        return sum(found.values()), found

    grads, found = jax.jit(jax.grad(total, has_aux=True))(features)
    for name, value in found.items():
        np.testing.assert_allclose(value, values[name], rtol=1e-5, err_msg=name)
    for name, grad in grads.items():
        expected = values[f"grad_{name}"]
        assert np.abs(grad - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_matryoshka_weights_fall_with_rank_and_size():
    weights = losses.matryoshka_weights(64, (8, 16, 32))
    assert list(weights) == [64, 32, 16, 8]
    np.testing.assert_allclose(list(weights.values()), [1, 1 / (2 * 2**0.5), 1 / (3 * 2), 1 / (4 * 8**0.5)])


def test_matryoshka_size_beyond_hidden_is_an_error():
    x = jnp.ones((2, 16))
    with pytest.raises(InputError, match=r"within 1..16, not 32"):
        losses.in_batch_loss(x, x, mrl_dims=(32,))


def test_duplicate_passages_are_left_out_of_the_denominator():
    query, passage = jax.random.normal(jax.random.key(0), (2, 4, 16))
    passage = passage.at[3].set(passage[1])
    ids = jnp.array([10, 11, 12, 11])
    masked = losses.in_batch_loss(query, passage, passage_ids_c=ids)
    alone = losses.in_batch_loss(query, passage)
    assert masked < alone
    logits = np.asarray(losses.matryoshka(query, (16,))[16] @ losses.matryoshka(passage, (16,))[16].T / 0.05)
    expected = []
    for row in range(4):
        columns = [c for c in range(4) if c == row or ids[c] != ids[row]]
        expected.append(np.log(np.exp(logits[row, columns]).sum()) - logits[row, row])
    np.testing.assert_allclose(masked, np.mean(expected), rtol=1e-4)


def test_stopped_gradient_trains_queries_alone():
    query, passage = jax.random.normal(jax.random.key(0), (2, 4, 16))
    grads = jax.grad(lambda q, p: losses.in_batch_loss(q, p, stop_passage_gradient=True), (0, 1))(query, passage)
    full = jax.grad(lambda q, p: losses.in_batch_loss(q, p), (0, 1))(query, passage)
    assert np.abs(full[1]).max() > 0
    assert np.all(grads[1] == 0)
    np.testing.assert_allclose(grads[0], full[0], rtol=1e-6)


def test_a_student_wider_than_its_teacher_is_an_error():
    with pytest.raises(InputError, match="student of 96 dimensions cannot be distilled from a teacher of 64"):
        losses.distillation_loss(jnp.ones((2, 96)), jnp.ones((2, 64)))


def test_no_gradient_reaches_the_teacher():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 4, 16))
    assert np.all(jax.grad(losses.distillation_loss, argnums=1)(student, teacher) == 0)
