"""The loss against NumPy in float64, and its masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.flax_llama.model import Llama, masked_sum, next_token_loss, token_losses
from examples.flax_llama.sizes import LlamaSize

SIZE = LlamaSize(vocab_size=50, hidden=16, intermediate=24, layers=2, heads=2, kv_heads=1)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


loss_of = jax.jit(next_token_loss, static_argnums=0, static_argnames="chunks")


def np_losses(logits, targets):
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_token_losses(dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 50)) * 4, dtype)
    targets = jnp.asarray(rng.integers(0, 50, (2, 5)), jnp.int32)
    losses = token_losses(logits, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np_losses(logits, targets), rtol=1e-5, atol=1e-5)


def test_token_losses_are_stable():
    logits = jnp.array([[[1e4, 0.0, -1e4], [1e3, 1e3, -1e3], [-jnp.inf, 0.0, 0.0]]])
    losses = token_losses(logits, jnp.array([[1, 0, 1]]))
    np.testing.assert_allclose(losses, [[1e4, np.log(2), np.log(2)]], rtol=1e-4)


def test_gradient_of_token_losses_is_softmax_minus_one_hot():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    targets = jnp.array([[1, 0, 7]])
    gradient = jax.grad(lambda x: token_losses(x, targets).sum())(logits)
    expected = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 8)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_masked_sum_ignores_what_is_masked():
    losses = jnp.array([[1.0, jnp.nan], [jnp.inf, 4.0]])
    total, count = masked_sum(losses, jnp.array([[True, False], [False, True]]))
    assert (float(total), float(count)) == (5.0, 2.0)
    total, count = masked_sum(losses, jnp.zeros((2, 2)))
    assert (float(total), float(count)) == (0.0, 0.0)


@functools.cache
def model_and_batch(length=8, batch=4, vocab_size=50):
    model = Llama(dataclasses.replace(SIZE, vocab_size=vocab_size))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (batch, length)).astype(np.int32)
    lengths = rng.integers(2, length + 1, batch)
    mask = np.arange(length)[None, :] < lengths[:, None]
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape) * 0.3), shapes)
    return model, params, {"tokens": tokens, "mask": mask}


def test_each_token_is_predicted_from_those_before_it():
    model, params, batch = model_and_batch()
    total, count = loss_of(model, params, batch)
    logits = jax.jit(model.apply)({"params": params}, batch["tokens"][:, :-1])
    losses = np_losses(logits, batch["tokens"][:, 1:])
    assert float(count) == batch["mask"][:, 1:].sum()
    assert float(total) == pytest.approx(losses[batch["mask"][:, 1:]].sum(), rel=1e-5)


def test_padding_tokens_do_not_matter():
    model, params, batch = model_and_batch()
    total, _ = loss_of(model, params, batch)
    other = {**batch, "tokens": np.where(batch["mask"], batch["tokens"], 7)}
    assert (other["tokens"] != batch["tokens"]).any()
    assert float(loss_of(model, params, other)[0]) == pytest.approx(float(total), rel=1e-6)


def test_the_mean_over_uneven_batches_is_the_mean_over_all():
    model, params, batch = model_and_batch()
    whole = loss_of(model, params, batch)
    parts = [
        loss_of(model, params, {name: array[rows] for name, array in batch.items()})
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert parts[0][1] != parts[1][1]
    sums = np.sum(np.asarray(parts), axis=0)
    assert sums[0] / sums[1] == pytest.approx(float(whole[0] / whole[1]), rel=1e-6)


def test_chunks_save_memory_and_change_nothing_else():
    model, params, batch = model_and_batch(length=64, vocab_size=2000)
    logits_bytes = 4 * 64 * 2000 * 4

    def compiled(chunks):
        def loss(params):
            total, count = next_token_loss(model, params, batch, chunks=chunks)
            return total / count

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    whole, chunked = compiled(1), compiled(8)
    scratch = [run.memory_analysis().temp_size_in_bytes for run in (whole, chunked)]
    assert scratch[0] > logits_bytes > scratch[1]
    (expected, expected_gradient), (value, gradient) = whole(params), chunked(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient,
        expected_gradient,
    )


def test_bfloat16_gradients():
    model, params, batch = model_and_batch()
    model = model.clone(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.jit(jax.grad(lambda p: next_token_loss(model, p, batch)[0]))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_chunks_must_divide_the_length():
    model, params, batch = model_and_batch()
    with pytest.raises(ValueError, match="chunks=3 must divide the sequence length 8"):
        next_token_loss(model, params, batch, chunks=3)
