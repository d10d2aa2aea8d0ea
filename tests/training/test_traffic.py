"""What a program sends: small programs whose traffic is known, and the text of other backends."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from optax_gale.training.traffic import Collective, collectives

ROWS, COLUMNS = 2, 24  # of each device's part
PART = ROWS * COLUMNS
ALL = P(("a", "b"))


def report(f, dtype=jnp.float32):
    """The traffic of a function of each device's part, on a mesh of 2 by 4."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), dtype, sharding=NamedSharding(mesh, ALL))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=ALL, out_specs=ALL, check_vma=False)
    return optax_gale.traffic_report(jax.jit(mapped), x)


SINGLE = {
    "all-reduce": (lambda x: lax.psum(x, "b"), (PART,), 4, 2 * 4 * PART * 3 / 4),
    "all-reduce over both": (
        lambda x: lax.psum(x, ("a", "b")), (PART,), 8, 2 * 4 * PART * 7 / 8,
    ),
    "all-gather": (lambda x: lax.all_gather(x, "b"), (4 * PART,), 4, 4 * PART * 3),
    "all-gather over a": (
        lambda x: lax.all_gather(x, "a", tiled=True), (2 * PART,), 2, 4 * PART,
    ),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True),
        (PART,), 4, 4 * PART * 3 / 4,
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "b", 1, 0, tiled=True), (PART,), 4, 4 * PART * 3 / 4,
    ),
    "collective-permute": (
        lambda x: lax.ppermute(x, "b", [(0, 1), (1, 2)]), (PART,), 8, 4 * PART,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_one_collective(name):
    f, elements, group, sent = SINGLE[name]
    found = report(f)
    (only,) = found.collectives
    moved = 4 * sum(elements)
    assert only == Collective(name.split(" ")[0], elements, moved, group, 1, False)
    assert found.sent == found.sent_at_most == sent
    assert found.largest == sum(elements)


def test_eight_bits():
    (found,) = report(lambda x: lax.all_gather(x, "a"), jnp.int8).collectives
    assert (found.elements, found.size, found.sent) == ((2 * PART,), 2 * PART, PART)


def test_in_a_loop_it_counts_every_turn():
    body = lambda x, _: (lax.psum(x, "a"), None)
    once = lambda x: lax.scan(body, x, None, length=5)[0]
    twice = lambda x: lax.scan(lambda x, _: (once(x), None), x, None, length=3)[0]
    for f, times in ((once, 5), (twice, 15)):
        found = report(f)
        assert [c.times for c in found.collectives] == [times]
        assert found.sent == times * 4 * PART


def test_in_a_branch_it_may_not_run():
    def f(x):
        x = lax.psum(x, "b")
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "a"), lambda x: x, x)

    found = report(f)
    assert [(c.group, c.in_branch) for c in found.collectives] == [(4, False), (2, True)]
    assert found.sent == 6 * PART
    assert found.sent_at_most == 6 * PART + 4 * PART


def test_branches_of_a_switch_and_loops_in_them():
    turns = lambda x: lax.fori_loop(0, 7, lambda _, x: lax.psum(x, "a"), x)
    gather = lambda x: jnp.sum(lax.all_gather(x, "b"), 0)
    choose = lambda x: lax.switch(x[0, 0].astype(int), [turns, gather, lambda x: x], x)
    found = report(choose).collectives
    assert [(c.kind, c.times, c.in_branch) for c in found] == [
        ("all-reduce", 7, True), ("all-gather", 1, True),
    ]  # fmt: skip


def test_the_same_twice_is_one_that_runs_twice():
    found = report(lambda x: lax.psum(jnp.sin(lax.psum(x, "a")), "a"))
    assert [c.times for c in found.collectives] == [2]


def test_one_device_sends_nothing():
    found = optax_gale.traffic_report(jax.jit(jnp.sin), jnp.ones(3))
    assert (found.collectives, found.sent, found.largest) == ((), 0, 0)


def test_compiled_lowered_and_traced_programs():
    traced = jax.jit(jnp.sin).trace(jnp.ones(3))
    lowered = traced.lower()
    for step in (traced, lowered, lowered.compile()):
        assert optax_gale.traffic_report(step).collectives == ()
    with pytest.raises(TypeError, match="jitted or compiled function, got int"):
        optax_gale.traffic_report(3)


# --- What compilers for GPUs write ---

HEAD = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(line):
    """A program of one instruction."""
    return f"{HEAD}\nENTRY %main (p: f32[2,24]) -> f32[2,24] {{\n  {line}\n}}\n"


f32 = functools.partial("f32[{}]{{1,0}}".format)

INSTRUCTIONS = {
    "gathered while other work goes on": (
        f"%s = ({f32('2,24')}, {f32('8,24')}) all-gather-start(%p), channel_id=1, "
        "replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true",
        Collective("all-gather", (8 * 24,), 4 * 8 * 24, 4, 1, False),
    ),
    "several gathered together": (
        f"%s = (({f32('2,24')}, s8[6]{{0}}), ({f32('8,24')}, s8[24]{{0}})) all-gather-start(%p, "
        "%q), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
        Collective("all-gather", (8 * 24, 24), 4 * 8 * 24 + 24, 2, 1, False),
    ),
    "summed while other work goes on": (
        f"%s = {f32('2,24')} all-reduce-start(%p), channel_id=2, "
        "replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.clone",
        Collective("all-reduce", (48,), 192, 4, 1, False),
    ),
    "summed while other work goes on, its operand kept": (
        f"%s = (({f32('2,24')}), {f32('2,24')}) all-reduce-start(%p), channel_id=1, "
        "replica_groups=mesh['axis_0'=2] {'axis_0'}, to_apply=%add.clone",
        Collective("all-reduce", (48,), 192, 2, 1, False),
    ),
    "several summed while other work goes on, their operands kept": (
        f"%s = (({f32('2,24')}, bf16[8]{{0}}), ({f32('2,24')}, bf16[8]{{0}})) "
        "all-reduce-start(%p, %q), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add.clone",
        Collective("all-reduce", (48, 8), 192 + 16, 8, 1, False),
    ),
    "several summed together, in half precision": (
        "%s = (bf16[2,24]{1,0:T(8,128)}, bf16[], /*index=2*/f8e4m3fn[3]{0}) all-reduce-start(%p, "
        "%q, /*index=2*/%r), channel_id=2, replica_groups={}, to_apply=%add.clone",
        Collective("all-reduce", (48, 1, 3), 2 * 49 + 3, 8, 1, False),
    ),
    "several summed together": (
        f"%s = ({f32('2,24')}, f32[5]{{0}}) all-reduce(%p, %q), channel_id=2, "
        "replica_groups=[1,8]<=[8], to_apply=%add.clone",
        Collective("all-reduce", (48, 5), 4 * 53, 8, 1, False),
    ),
    "passed on": (
        f"%s = ({f32('2,24')}, {f32('2,24')}, u32[], u32[]) collective-permute-start(%p), "
        "channel_id=3, source_target_pairs={{0,1},{1,0}}",
        Collective("collective-permute", (48,), 192, 8, 1, False),
    ),
    "scattered while other work goes on": (
        f"%s = (({f32('8,24')}), {f32('2,24')}) reduce-scatter-start(%p), channel_id=4, "
        "replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add.clone",
        Collective("reduce-scatter", (8 * 24,), 4 * 8 * 24, 4, 1, False),
    ),
    "exchanged in parts": (
        f"%s = ({f32('2,6')}, {f32('2,6')}) all-to-all(%p, %q), channel_id=5, "
        "replica_groups=[4,2]<=[8]",
        Collective("all-to-all", (24,), 96, 2, 1, False),
    ),
    "among devices of an axis": (
        f"%s = {f32('2,24')} all-reduce(%p), channel_id=6, "
        "replica_groups=mesh['a'=2,'b'=4], device_ids=(1,0,2,3,4,5,6,7) {'b'}, to_apply=%add.clone",
        Collective("all-reduce", (48,), 192, 4, 1, False),
    ),
    "among devices of two axes": (
        f"%s = {f32('2,24')} all-reduce(%p), replica_groups=mesh['a.x'=2,'b y'=2,'c'=2] "
        "{'a.x','b y'}, use_global_device_ids=true, to_apply=%add.clone",
        Collective("all-reduce", (48,), 192, 4, 1, False),
    ),
    "among devices of a part of an axis": (
        f"%s = {f32('2,24')} all-gather(%p), replica_groups=mesh['a'=8,'b'=3] {{'a':(4)2,'b'}}, "
        "dimensions={0}",
        Collective("all-gather", (48,), 192, 6, 1, False),
    ),
    "codes of 4 bits": (
        "%s = s4[2,24]{1,0:E(4)} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add.clone",
        Collective("all-reduce", (48,), 24, 2, 1, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_text(name):
    line, wanted = INSTRUCTIONS[name]
    assert collectives(program(line)) == [wanted]


@pytest.mark.parametrize("groups", ["<2x4>", 'mesh["a"=8] {"a"}', "mesh['a'=8] {'b'}"])
def test_groups_written_in_an_unknown_way_are_not_guessed(groups):
    line = f"%s = {f32('2,24')} all-reduce(%p), replica_groups={groups}, to_apply=%add.clone"
    with pytest.raises(
        NotImplementedError, match="cannot read which devices.*" + re.escape(groups)
    ):
        collectives(program(line))


def test_awaiting_sends_nothing():
    line = "ROOT %d = f32[2,24]{1,0} all-gather-done(%s)"
    assert collectives(program(line)) == []


@pytest.mark.parametrize("named_again", ["", ", calls=%wrapped"])
def test_inside_an_asynchronous_computation(named_again):
    text = (
        HEAD
        + f"""
%wrapped (p: f32[8,24]) -> f32[2,24] {{
  %p = f32[8,24]{{1,0}} parameter(0)
  ROOT %rs = f32[2,24]{{1,0}} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add.clone
}}

ENTRY %main (x: f32[8,24]) -> f32[2,24] {{
  %x = f32[8,24]{{1,0}} parameter(0)
  %s = ((f32[8,24]{{1,0}}), f32[2,24]{{1,0}}, u32[]) async-start(%x), calls=%wrapped
  ROOT %d = f32[2,24]{{1,0}} async-done(%s){named_again}
}}
"""
    )
    wanted = Collective("reduce-scatter", (8 * 24,), 4 * 8 * 24, 4, 1, False)
    assert collectives(text) == [wanted]
