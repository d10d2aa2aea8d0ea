"""On sharded weights, nothing of a weight's size travels between devices."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale.pallas.project_update import xla

LAYERS, SHORT, LONG, RANK = 4, 64, 160, 8


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compilation):
    """Who holds what is decided before the optimisations."""


LAYOUTS = {
    "FSDP": (P("data", None), (SHORT, LONG)),
    "FSDP, the longer side": (P(None, "data"), (SHORT, LONG)),
    "tensor": (P(None, "model"), (SHORT, LONG)),
    "both": (P("data", "model"), (SHORT, LONG)),
    "both, tall": (P("data", "model"), (LONG, SHORT)),
    "stacked, FSDP over layers": (P("data", None, "model"), (LAYERS, SHORT, LONG)),
    "stacked, both": (P(None, "data", "model"), (LAYERS, SHORT, LONG)),
}
OPTIMIZERS = {
    "adamw": optax_gale.gale_adamw(1e-2, RANK),
    "muon": optax_gale.gale_muon(1e-2, RANK),
    "8 bits": optax_gale.gale_adamw(1e-2, RANK, state_dtype="int8", projector_dtype="int8"),
}


def traffic(tx, spec, shape, kind, refresh):
    auto = kind != "Explicit"
    axis_type = AxisType.Auto if auto else AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
    weight, specs = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"kernel": spec}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, weight)
        shared = mesh if kind == "Auto, shared" else None
        of_state = optax_gale.state_partition_specs(tx, weight, specs, shared)
        weight, state = (jax.tree.map(place, *x) for x in ((weight, specs), (state, of_state)))
        step = lambda g, s, w: optax_gale.update_and_apply(tx, g, s, w, refresh=refresh)
        shardings = jax.tree.map(lambda x: x.sharding, (weight, state))
        options = {"out_shardings": shardings} if auto else {}
        step = jax.jit(step, donate_argnums=(1, 2), **options)
        return optax_gale.traffic_report(step, weight, state, weight)


def check(tx, layout, kind, refresh):
    spec, shape = LAYOUTS[layout]
    report = traffic(tx, spec, shape, kind, refresh)
    # The projections of all layers, or what a sketch has of them.
    assert report.largest <= math.prod(shape[:-2]) * RANK * LONG
    return report


@pytest.mark.parametrize("refresh", [False, True], ids=["between refreshes", "refresh"])
@pytest.mark.parametrize("kind", ["Auto", "Auto, shared", "Explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_collective_has_a_weights_size(layout, kind, refresh):
    report = check(OPTIMIZERS["adamw"], layout, kind, refresh)
    assert refresh <= bool(report.collectives)


@pytest.mark.parametrize("refresh", [False, True], ids=["between refreshes", "refresh"])
@pytest.mark.parametrize("kind", ["Auto", "Auto, shared"])
@pytest.mark.parametrize("name", ["muon", "8 bits"])
def test_whatever_runs_inside(name, kind, refresh):
    check(OPTIMIZERS[name], "both", kind, refresh)


def test_where_the_projected_side_is_whole_nothing_is_sent_between_refreshes():
    for layout in ("FSDP, the longer side", "tensor", "stacked, FSDP over layers"):
        spec, shape = LAYOUTS[layout]
        assert not traffic(OPTIMIZERS["adamw"], spec, shape, "Auto", False).collectives


@pytest.mark.parametrize("told", [False, True])
def test_of_a_shared_projection_each_device_reads_its_part_only(told, monkeypatch):
    """One slice of a sum makes it a scattered one on GPUs; a slice for every reader does not."""
    if not told:
        monkeypatch.setattr(xla, "divided_once", lambda x: x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P("data"))
    place = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    def step(p, g, mu, nu):
        r = xla.project(g, p, rows=True)
        return 0.9 * mu + 0.1 * r, 0.99 * nu + 0.01 * r**2

    with jax.set_mesh(mesh):
        step = jax.jit(step, out_shardings=(where, where))
        moment = place(RANK, LONG)
        program = step.lower(place(SHORT, RANK), place(SHORT, LONG), moment, moment).compile()
    whole = re.findall(rf"= f32\[{RANK},{LONG}\]\S* multiply", program.as_text())
    assert bool(whole) != told


def test_the_check_can_fail():
    spec, shape = LAYOUTS["both"]
    svd = optax_gale.gale_adamw(1e-2, RANK, range_finder="svd")
    assert traffic(svd, spec, shape, "Auto", True).largest >= SHORT * LONG
