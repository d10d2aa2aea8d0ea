"""The Triton kernels compiled for a GPU, on a machine without one."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# Compiles the launches of leaves of several shapes, in the place of running them, and prints what
# functions each of them has. A process of its own: others run Triton's interpreter.
PROGRAM = """
import json, sys, types
import jax, jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optax_gale.pallas import dispatch
from optax_gale.pallas.back_project_apply import triton as back_project_apply
from optax_gale.pallas.project_update import triton as project_update
from tests.pallas.problems import SCALARS, adam
from tests.pallas.test_kernels import mixed

dispatch.capability = lambda: "9.0"
sources = {}

def triton_call(*arrays, kernel, out_shape, name, num_warps, num_stages, **_):
    types = {"float32": "*fp32", "bfloat16": "*bf16"}
    signature = dict(zip(kernel.arg_names, [types[x.dtype.name] for x in (*arrays, *out_shape)]))
    source = ASTSource(fn=kernel, signature=signature)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    sources[name] = made.asm["source"]
    return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

sys.modules["jax_triton"] = types.ModuleType("jax_triton")
sys.modules["jax_triton"].triton_call = triton_call
x, rows = mixed(jnp.bfloat16)
one = jnp.float32(1)
back_project_apply.back_project_apply(
    x["weights"], x["projectors"], x["updates"], [[one, one]], rows=rows
)
scalars = [[jnp.float32(s) for s in SCALARS.values()]]
project_update.project_update(
    x["gradients"], x["projectors"], x["moments"], scalars, adam(), rows=rows,
    update_dtype=jnp.bfloat16,
)
print(json.dumps(sources))
"""


@pytest.mark.slow
def test_every_shape_of_a_launch_has_functions_of_its_own():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    sources = json.loads(done.stdout.splitlines()[-1])
    expected = {
        "back_project_apply": {"one_tile": 3, "store_weight": 3},
        "project_update": {"project_rows": 2, "project_columns": 1, "finish_parts": 3},
    }
    assert sources.keys() == expected.keys()
    for name, counts in expected.items():
        defined = re.findall(r"tt\.func [^@]*@([\"\w.<>]+)", sources[name].replace('"', ""))
        for function, count in counts.items():
            assert sum(f".{function}_" in d for d in defined) == count, (function, defined)
