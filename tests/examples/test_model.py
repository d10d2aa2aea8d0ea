"""The model against the mathematics of Hugging Face's, written in NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.flax_llama.errors import UserError
from examples.flax_llama.model import MLP, Attention, Embedding, Llama, RMSNorm, apply_rope
from examples.flax_llama.sizes import SIZES, LlamaSize, count_params, get_size

SIZE = LlamaSize(
    vocab_size=97, hidden=32, intermediate=48, layers=3, heads=4, kv_heads=2, max_length=24
)
MULTI_HEAD = dataclasses.replace(SIZE, kv_heads=4)
TIED = dataclasses.replace(SIZE, tied=True, kv_heads=1, rope_theta=500.0, norm_eps=1e-2)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def random_params(size, seed=0, scale=0.3, **kwargs):
    """Parameters large enough that every part of the model matters."""
    model = Llama(size, **kwargs)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype), shapes
    )


def layer_of(params, i):
    return jax.tree.map(lambda leaf: leaf[i], params)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens)


def random_tokens(size, batch=2, length=12, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, size.vocab_size, (batch, length)), jnp.int32)


# --- the reference ------------------------------------------------------------------------------


def np_rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def np_rope(x, theta):
    """x (B, heads, T, K); cos and sin over twice the frequencies, and rotate_half."""
    *_, length, head_dim = x.shape
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(length), frequencies)
    angles = np.concatenate([angles, angles], axis=-1)
    half = head_dim // 2
    rotated = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * np.cos(angles) + rotated * np.sin(angles)


def np_attention(x, p, size):
    batch, length, _ = x.shape

    def heads(name, count):
        projected = x @ p[name]["kernel"]
        return projected.reshape(batch, length, count, size.head_dim).transpose(0, 2, 1, 3)

    q = np_rope(heads("query", size.heads), size.rope_theta)
    k = np_rope(heads("key", size.kv_heads), size.rope_theta)
    v = heads("value", size.kv_heads)
    k, v = (np.repeat(y, size.heads // size.kv_heads, axis=1) for y in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(size.head_dim)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, -1) @ p["out"]["kernel"]


def np_mlp(x, p):
    gate = x @ p["gate"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def np_llama(params, tokens, size):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["embedding"][np.asarray(tokens)]
    for i in range(size.layers):
        layer = layer_of(p["layers"], i)
        normed = np_rms_norm(x, layer["attention_norm"]["scale"], size.norm_eps)
        x = x + np_attention(normed, layer["attention"], size)
        normed = np_rms_norm(x, layer["mlp_norm"]["scale"], size.norm_eps)
        x = x + np_mlp(normed, layer["mlp"])
    x = np_rms_norm(x, p["final_norm"]["scale"], size.norm_eps)
    return x @ (p["embed"]["embedding"].T if size.tied else p["lm_head"]["kernel"])


# --- the parts ----------------------------------------------------------------------------------


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 16)) * 5, rng.normal(size=16)
    y = RMSNorm(eps=1e-2).apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    np.testing.assert_allclose(y, np_rms_norm(x, scale, 1e-2), rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_float32():
    x = jnp.full((1, 4), 1e4, jnp.float16)  # its square overflows float16
    norm = RMSNorm(dtype=jnp.float16, param_dtype=jnp.float16)
    y = norm.apply({"params": {"scale": jnp.ones(4, jnp.float16)}}, x)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, np.ones((1, 4)))


def test_rms_norm_of_zero_is_zero():
    variables = {"params": {"scale": jnp.ones(4)}}
    y, gradient = jax.value_and_grad(lambda x: RMSNorm().apply(variables, x).sum())(jnp.zeros(4))
    assert y == 0
    assert np.isfinite(gradient).all()


def test_rope():
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 8))
    expected = np_rope(x.transpose(0, 2, 1, 3), 100.0).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(apply_rope(jnp.float32(x), 100.0), expected, atol=1e-5)


def test_rope_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8))
    turned_q, turned_k = (apply_rope(jnp.float32(np.tile(x, (1, 9, 1, 1)))) for x in (q, k))
    products = jnp.einsum("btnk,bsnk->ts", turned_q, turned_k)
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(products[0, 0] - products[0, 4]) > 1e-2


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kv_heads):
    size = dataclasses.replace(SIZE, kv_heads=kv_heads)
    _, params = random_params(size)
    layer = layer_of(params["layers"]["attention"], 0)
    x = np.random.default_rng(2).normal(size=(2, 9, 32))
    y = apply(Attention(size), layer, jnp.float32(x))
    expected = np_attention(x, jax.tree.map(lambda w: np.asarray(w, np.float64), layer), size)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_mlp():
    _, params = random_params(SIZE)
    layer = layer_of(params["layers"]["mlp"], 1)
    x = np.random.default_rng(2).normal(size=(2, 9, 32))
    y = apply(MLP(32, 48), layer, jnp.float32(x))
    np.testing.assert_allclose(y, np_mlp(x, layer), rtol=1e-4, atol=1e-4)


def test_padding_takes_no_part():
    hidden, width, padding = 32, 45, 3
    x = jax.random.normal(jax.random.key(1), (2, 9, hidden))

    def found(padding, written):
        """The result and the gradients, after an optimizer has ``written`` to the padding."""
        mlp, wide = MLP(hidden, width, padding=padding), width + padding
        layer = mlp.init(jax.random.key(0), x)
        spare = written * (np.arange(wide) >= width)

        def write(path, kernel):
            down = path[-2].key == "down"
            assert kernel.shape == ((wide, hidden) if down else (hidden, wide))
            return kernel + (spare[:, None] if down else spare[None, :])

        y, back = jax.vjp(mlp.apply, jax.tree.map_with_path(write, layer), x)
        # A mask of every layer would be kept where nothing is computed again.
        assert not any(leaf.dtype == bool for leaf in jax.tree.leaves(back))
        return y, *back(jnp.cos(y))

    y, weights, inputs = found(0, 0.0)
    for written in (0.0, 7.0):
        padded_y, padded_weights, padded_inputs = found(padding, written)
        np.testing.assert_allclose(padded_y, y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(padded_inputs, inputs, rtol=1e-5, atol=1e-6)
        pairs = zip(*map(jax.tree.leaves, (padded_weights, weights)), strict=True)
        for wide, narrow in pairs:
            own = tuple(slice(n) for n in narrow.shape)
            np.testing.assert_allclose(wide[own], narrow, rtol=1e-5, atol=1e-6)
            assert np.count_nonzero(wide) == np.count_nonzero(wide[own])


def test_a_padded_model_is_the_same_model():
    padded = dataclasses.replace(SIZE, padding=16)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, SIZE.vocab_size)
    params = [Llama(size).init(jax.random.key(0), tokens) for size in (SIZE, padded)]
    logits = [Llama(size).apply(p, tokens) for size, p in zip((SIZE, padded), params, strict=True)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)
    assert count_params(padded) == count_params(SIZE)
    assert params[1]["params"]["layers"]["mlp"]["down"]["kernel"].shape == (3, 64, 32)


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, MULTI_HEAD, TIED], ids=["grouped", "multi-head", "tied"])
def test_llama(size):
    model, params = random_params(size)
    tokens = random_tokens(size)
    logits = apply(model, params, tokens)
    expected = np_llama(params, tokens, size)
    assert logits.shape == (2, 12, 97)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("size", [SIZE, TIED], ids=["untied", "tied"])
def test_walking_the_layers_by_hand_equals_the_scan(size):
    model, params = random_params(size)
    tokens = random_tokens(size)
    x = model.apply({"params": params}, tokens, method="embed_tokens")
    for i in range(size.layers):
        x = apply(model.block(), layer_of(params["layers"], i), x)
    logits = model.apply({"params": params}, x, method="head")
    np.testing.assert_allclose(logits, apply(model, params, tokens), atol=1e-4)


def test_remat_changes_nothing_but_memory():
    tokens = random_tokens(SIZE)

    def gradient(remat):
        model, params = random_params(SIZE, remat=remat)
        return jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens).std()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient(False),
        gradient(True),
    )


def test_a_later_token_never_changes_an_earlier_logit():
    model, params = random_params(SIZE)
    tokens = random_tokens(SIZE, batch=1)
    logits = np.asarray(apply(model, params, tokens))
    for position in (1, 5, 11):
        changed = np.array(tokens)
        changed[0, position] = (changed[0, position] + 1) % SIZE.vocab_size
        others = np.asarray(apply(model, params, changed))
        np.testing.assert_array_equal(others[:, :position], logits[:, :position])
        assert (np.abs(others[:, position:] - logits[:, position:]).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(param_dtype):
    tokens = random_tokens(SIZE)
    # jax.nn.dot_product_attention itself is not written for strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        model, params = random_params(SIZE, scale=0.1, dtype=jnp.bfloat16, param_dtype=param_dtype)
        logits = apply(model, params, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    assert logits.dtype == jnp.bfloat16
    expected = np_llama(params, tokens, SIZE)
    np.testing.assert_allclose(
        logits.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max()
    )
    spread = np.std(np.asarray(logits, np.float64) - expected) / np.std(expected)
    assert 1e-4 < spread < 0.02


def test_embedding_gradients_add_up_in_float32():
    embed = Embedding(SIZE, dtype=jnp.bfloat16)
    tokens = jnp.zeros((1, 1000), jnp.int32)

    def total(table):
        vectors = embed.apply({"params": {"embedding": table}}, tokens)
        return vectors.astype(jnp.float32).sum()

    gradient = jax.grad(total)(jnp.ones((97, 32)))
    np.testing.assert_array_equal(gradient[0], np.full(32, 1000.0))


def test_every_parameter_has_a_gradient():
    model, params = random_params(SIZE)
    tokens = jnp.arange(97, dtype=jnp.int32)[None, :24]
    gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens).std()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["layers"]):
        assert (np.abs(leaf).sum(axis=tuple(range(1, leaf.ndim))) > 0).all(), path


def test_parameter_names_and_shapes():
    _, params = random_params(SIZE)
    assert jax.tree.map(jnp.shape, params) == {
        "embed": {"embedding": (97, 32)},
        "layers": {
            "attention_norm": {"scale": (3, 32)},
            "attention": {
                "query": {"kernel": (3, 32, 32)},
                "key": {"kernel": (3, 32, 16)},
                "value": {"kernel": (3, 32, 16)},
                "out": {"kernel": (3, 32, 32)},
            },
            "mlp_norm": {"scale": (3, 32)},
            "mlp": {
                "gate": {"kernel": (3, 32, 48)},
                "up": {"kernel": (3, 32, 48)},
                "down": {"kernel": (3, 48, 32)},
            },
        },
        "final_norm": {"scale": (32,)},
        "lm_head": {"kernel": (32, 97)},
    }
    assert "lm_head" not in random_params(TIED)[1]


def test_initial_values():
    init = jax.jit(Llama(SIZES["tiny"]).init)
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, np.ones(leaf.shape))
        else:
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.02), path
            assert abs(float(leaf.mean())) < 5e-4, path
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    model = Llama(dataclasses.replace(SIZES[name], padding=0))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count_params(SIZES[name])


@pytest.mark.parametrize(
    ("name", "millions"),
    [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08), ("7b", 6738.42)],
)
def test_known_parameter_counts(name, millions):
    assert count_params(SIZES[name]) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("size", [SIZE, TIED], ids=["grouped", "tied"])
def test_parameter_count_of_variants(size):
    _, params = random_params(size)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count_params(size)


# --- bad input ----------------------------------------------------------------------------------


def test_too_long_a_sequence():
    model, params = random_params(SIZE)
    with pytest.raises(ValueError, match=r"\(1, 25\) are longer than .*max_length=24"):
        model.apply({"params": params}, jnp.zeros((1, 25), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"padding": -1}, "padding must not be negative, got -1"),
        ({"heads": 5, "kv_heads": 5}, "heads=5 must divide hidden=32"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"heads": 32, "kv_heads": 32}, "= 1 must be even"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SIZE, **change)


def test_unknown_size():
    with pytest.raises(UserError, match=r"unknown model size '60M'; choose from tiny, 60m"):
        get_size("60M")
    assert get_size("60m") is SIZES["60m"]
