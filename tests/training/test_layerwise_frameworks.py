"""Layer by layer with Flax's boxes, and with arrays spread over devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_gale

from .models import MODEL, make_batch, make_params
from .test_layerwise import adamw, assert_same, ordinary, run


def test_boxed_parameters():
    """``nn.Partitioned`` as ``nn.scan`` makes it: the name of the axis of layers comes first."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel = nn.with_partitioning(nn.initializers.normal(0.3), (None, "model"))
            x = x + jnp.tanh(x @ self.param("kernel", kernel, (16, 16)))
            return x, None

    scanned = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    rest = make_params()
    init = jax.jit(functools.partial(scanned().init, jax.random.key(1)))
    layers = init(jnp.ones((2, 16)), None)["params"]
    params = {**rest, "layers": layers}
    assert layers["kernel"].names == ("layers", None, "model")
    seen = []

    def block(p, x, batch, layer):
        seen.append(p["kernel"].names)
        return Block().apply({"params": p}, x, None)[0]

    model = optax_gale.LayeredModel(MODEL.embed, block, MODEL.head)
    tx = adamw()
    got = run(optax_gale.layerwise(model, tx).step, params, tx.init(params), 6)
    jax.eval_shape(model.loss, params, make_batch(0))
    assert set(seen) == {(None, "model")}
    assert got[0]["layers"]["kernel"].names == ("layers", None, "model")

    def unboxed_block(p, x, batch, layer):
        return x + jnp.tanh(x @ p["kernel"])

    plain = {**rest, "layers": nn.meta.unbox(layers)}
    wanted = run(
        ordinary(tx, optax_gale.LayeredModel(MODEL.embed, unboxed_block, MODEL.head)),
        plain,
        tx.init(plain),
        6,
    )
    np.testing.assert_allclose(
        got[0]["layers"]["kernel"].value, wanted[0]["layers"]["kernel"], atol=2e-5
    )


SPECS = {
    "embed": {"embedding": PartitionSpec(None, "fsdp")},
    "layers": {
        "mlp": {
            "up": {"kernel": PartitionSpec(None, "fsdp", "tensor")},
            "down": {"kernel": PartitionSpec(None, "tensor", "fsdp")},
        },
        "norm": {"scale": PartitionSpec(None, None)},
    },
    "final_norm": {"scale": PartitionSpec(None)},
    "lm_head": {"kernel": PartitionSpec("fsdp", None)},
}


@pytest.mark.parametrize(
    ("range_finder", "options"), [("gale", {}), ("svd", {"micro_batches": 2, "clip_norm": 0.5})]
)
@pytest.mark.quick("svd-options1")
def test_sharded_weights(range_finder, options):
    """FSDP and tensor parallel at once: the numbers of one device, and the shardings kept."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = lambda tree, specs: jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    tx, params = adamw(range_finder), make_params()
    train = optax_gale.layerwise(MODEL, tx, **options)
    wanted = run(train.step, params, train.init(params), 6)
    specs = optax_gale.state_partition_specs(tx, params, SPECS)
    sharded, state = place(params, SPECS), place(tx.init(params), specs)
    with jax.set_mesh(mesh):
        step = jax.jit(train.step, donate_argnums=(0, 1))
        history = []
        for i in range(6):
            batch = place(make_batch(i), {"tokens": PartitionSpec("fsdp")})
            sharded, state, metrics = step(sharded, state, batch)
            history.append(metrics)
    metrics = jax.tree.map(lambda *xs: np.stack(xs), *history)
    assert_same(jax.device_get((sharded, state, metrics)), jax.device_get(wanted), atol=5e-5)
    kernel = sharded["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 8, 12)


def test_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    params = {
        "scale": jnp.ones(16),
        "layers": {"kernel": 0.3 * jax.random.normal(jax.random.key(0), (3, 16, 16))},
    }

    def block(p, x, batch, layer):
        spec = jax.typeof(x).sharding.spec
        out = None if jax.typeof(x).sharding.mesh.empty else PartitionSpec(*spec)
        return x + jnp.tanh(jnp.einsum("bd,de->be", x, p["kernel"], out_sharding=out))

    model = optax_gale.LayeredModel(
        lambda rest, batch: batch["x"] * rest["scale"],
        block,
        lambda rest, x, batch: jnp.mean(x**2),
    )
    tx = optax_gale.gale_adamw(1e-2, 4, update_proj_gap=2)
    step = optax_gale.layerwise(model, tx).step
    x = jax.random.normal(jax.random.key(1), (4, 16))
    plain = params, tx.init(params)
    for _ in range(3):
        *plain, metrics = jax.jit(step)(*plain, {"x": x})
    with jax.set_mesh(mesh):
        put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        params = {
            "scale": put(params["scale"]),
            "layers": {"kernel": put(params["layers"]["kernel"], None, None, "tensor")},
        }
        state = tx.init(params)
        for _ in range(3):
            params, state, got = jax.jit(step)(params, state, {"x": put(x, "fsdp")})
        assert jax.typeof(params["layers"]["kernel"]).sharding.spec == PartitionSpec(
            None, None, "tensor"
        )
    np.testing.assert_allclose(got.loss, metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(params["layers"]["kernel"], plain[0]["layers"]["kernel"], atol=2e-5)
