"""A small model of stacked blocks with everything that a real one has."""

import jax
import jax.numpy as jnp

import optax_gale

LAYERS, WIDTH, VOCABULARY = 3, 16, 40


def block(p, x, batch, layer):
    del batch, layer
    h = x * p["norm"]["scale"]
    return x + jnp.tanh(h @ p["mlp"]["up"]["kernel"]) @ p["mlp"]["down"]["kernel"]


def embed(rest, batch):
    return rest["embed"]["embedding"][batch["tokens"]]


def head(rest, x, batch):
    logits = (x * rest["final_norm"]["scale"]) @ rest["lm_head"]["kernel"]
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], -1))


def tied_head(rest, x, batch):
    table = rest["embed"]["embedding"].T
    return head({**rest, "lm_head": {"kernel": table}}, x, batch)


MODEL = optax_gale.LayeredModel(embed, block, head)


def make_params(dtype=jnp.float32, layers=LAYERS, *, tied=False):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return (0.3 * jax.random.normal(next(keys), shape)).astype(dtype)

    params = {
        "embed": {"embedding": normal(VOCABULARY, WIDTH)},
        "layers": {
            "mlp": {
                "up": {"kernel": normal(layers, WIDTH, 24)},
                "down": {"kernel": normal(layers, 24, WIDTH)},
            },
            "norm": {"scale": jnp.ones((layers, WIDTH), dtype)},
        },
        "final_norm": {"scale": jnp.ones(WIDTH, dtype)},
        "lm_head": {"kernel": normal(WIDTH, VOCABULARY)},
    }
    if tied:
        del params["lm_head"]
    return params


def make_batch(step, size=4):
    tokens = jax.random.randint(jax.random.key(100 + step), (size, 6), 0, VOCABULARY)
    return {"tokens": tokens}
