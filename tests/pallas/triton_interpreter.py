"""Runs the Triton kernels on a CPU: Triton's interpreter in the place of jax-triton.

The interpreter is made for torch's tensors and for functions at the top level of a module. What
follows hands it addresses instead, and lets it run nested functions as Python has them.
"""

import operator
import sys
import threading
import types

import jax
import numpy as np

# The interpreter keeps the number of the program in a variable of its module.
_ONE_AT_A_TIME = threading.Lock()


class _Address:
    """An array as Triton takes it: with an address, and a dtype that is called like torch's."""

    def __init__(self, array):
        self._array = array
        self.dtype = f"torch.{array.dtype.name}"

    def data_ptr(self):
        return self._array.ctypes.data


def _triton_call(
    *arrays, kernel, out_shape, grid, name, num_warps, num_stages, input_output_aliases
):
    """`jax_triton.triton_call`; results start as NaN, so that what is not written shows."""
    del name, num_warps, num_stages
    overwritten = {result: given for given, result in input_output_aliases.items()}

    def on_host(*arrays):
        with _ONE_AT_A_TIME:
            return run(*arrays)

    def run(*arrays):
        given = [np.array(x) for x in arrays]
        results = [
            given[overwritten[i]] if i in overwritten else np.full(x.shape, np.nan, x.dtype)
            for i, x in enumerate(out_shape)
        ]
        kernel[grid](*map(_Address, given), *map(_Address, results))
        return results

    return jax.pure_callback(on_host, list(out_shape), *arrays)


def install(monkeypatch):
    """Puts the interpreter in jax-triton's place until the patches are undone."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where Triton is imported first
    import triton.language as tl
    from triton.runtime import interpreter

    def as_it_is(self):
        return self.fn

    def patch_language(function):
        del function  # which may have the language as a variable of its surroundings
        scope = interpreter._LangPatchScope()
        for module in (tl, tl.core):
            interpreter._patch_builtin(module, interpreter.interpreter_builder, scope)
            interpreter._patch_builtin(module.tensor, interpreter.interpreter_builder, scope)
            interpreter._patch_lang_tensor(module.tensor, scope)
            interpreter._patch_lang_core(module, scope)
        interpreter._patch_builtin(tl.math, interpreter.interpreter_builder, scope)
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        return scope

    monkeypatch.setattr(interpreter.FunctionRewriter, "rewrite_ast", as_it_is)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_language)
    executor = interpreter.GridExecutor
    monkeypatch.setattr(executor, "_init_args_hst", lambda _, args, kwargs: (list(args), kwargs))
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    for name in ("add", "sub", "mul", "floordiv", "mod", "lt", "gt", "le", "ge"):
        monkeypatch.setattr(tl.constexpr, f"__{name}__", _with_tensors(tl, name))
    fake = types.ModuleType("jax_triton")
    fake.triton_call = _triton_call
    monkeypatch.setitem(sys.modules, "jax_triton", fake)


def _with_tensors(tl, name):
    """A constant's operator, which the interpreter lacks where the other operand is a tensor."""
    plain = getattr(tl.constexpr, f"__{name}__")

    def apply(self, other):
        if isinstance(other, tl.tensor):
            return getattr(operator, name)(self.value, other)
        return plain(self, other)

    return apply
