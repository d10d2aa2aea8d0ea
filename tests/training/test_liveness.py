"""The fullest moment of programs written by hand, and reading what XLA writes."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from optax_gale.training import programs, wire
from optax_gale.training.liveness import Fullest, fullest
from optax_gale.training.programs import Buffer, Computation, Instruction, Program

FORWARD, BACKWARD, OPTIMIZER = "jit(f)/jvp(g)/dot", "jit(f)/transpose(jvp(g))/dot", "jit(f)/add"


class Builder:
    """Writes a program down; every array has its own place unless it is put on another's."""

    def __init__(self):
        self.ids = itertools.count()
        self.computations, self.buffers, self.defined = {}, {}, {}
        self.end = 0

    def op(self, opcode="fusion", name="", operands=(), size=0, at=None, called=(), number=0):
        made = []
        for i, n in enumerate(size if isinstance(size, tuple) else (size,)):
            if n:
                offset = self.end if at is None else at
                self.end = max(self.end, offset + n)
                buffer = len(self.buffers)
                self.buffers[buffer] = Buffer(7, offset, n)
                made.append(((i,) if isinstance(size, tuple) else (), buffer))
        instruction = Instruction(
            next(self.ids), opcode, name, tuple(o.id for o in operands), tuple(called), number
        )
        self.defined[instruction.id] = tuple(made)
        return instruction

    def computation(self, *instructions):
        self.computations[len(self.computations)] = Computation(instructions, instructions[-1].id)
        return len(self.computations) - 1

    def fullest(self, entry):
        return fullest(Program(self.computations, entry, self.buffers, self.defined))


def test_what_is_alive_together():
    b = Builder()
    x = b.op("parameter", "x")
    h = b.op(name=FORWARD, operands=[x], size=100)
    loss = b.op(name=FORWARD, operands=[h], size=30)
    g = b.op(name=BACKWARD, operands=[h], size=70)
    # The result lies in a donated argument.
    new = b.op(name=OPTIMIZER, operands=[x, g])
    main = b.computation(x, h, loss, g, new)
    assert b.fullest(main) == Fullest(gradients=70, activations=100, work=0)


def test_arrays_that_lie_on_each_other_count_once():
    b = Builder()
    h = b.op(name=FORWARD, size=100)
    inside = b.op(name=FORWARD, operands=[h], size=60, at=20)
    beside = b.op(name=FORWARD, operands=[h], size=60, at=70)
    end = b.op(name=OPTIMIZER, operands=[h, inside, beside])
    assert b.fullest(b.computation(h, inside, beside, end)) == Fullest(0, 130, 0)


def test_scratch_memory_and_gradients_on_their_way_are_work():
    b = Builder()
    h = b.op("custom-call", FORWARD, size=(100, 40))
    out = b.op("get-tuple-element", operands=[h], number=0)
    cotangent = b.op(name=BACKWARD, operands=[out], size=50)
    g = b.op(name=BACKWARD, operands=[cotangent, out], size=70)
    new = b.op(name=OPTIMIZER, operands=[g])
    assert b.fullest(b.computation(h, out, cotangent, g, new)) == Fullest(70, 100, 50)


def test_copies_and_zeros_without_a_name_are_what_they_become():
    b = Builder()
    zeros = b.op("broadcast", size=70)
    copy = b.op("copy", operands=[zeros], size=70)
    h = b.op(name=FORWARD, size=10)
    copied = b.op("copy", operands=[h], size=10)
    g = b.op(name=BACKWARD, operands=[copy, zeros, copied], at=70, size=70)
    new = b.op(name=OPTIMIZER, operands=[g, copy])
    # `zeros` itself is never what the optimizer reads.
    found = b.fullest(b.computation(zeros, copy, h, copied, g, new))
    assert found == Fullest(gradients=70, activations=20, work=70)


@pytest.mark.parametrize("opcode", ["while", "call", "conditional"])
def test_what_a_computation_holds_is_alive_beside_its_callers(opcode):
    b = Builder()
    parameter = b.op("parameter")
    inner = b.op(name=FORWARD, operands=[parameter], size=200)
    root = b.op(name=FORWARD, operands=[inner])
    body = b.computation(parameter, inner, root)
    kept = b.op(name=FORWARD, size=100)
    gone = b.op(name=FORWARD, size=150)
    x = b.op(name=FORWARD, operands=[gone], size=10)
    run = b.op(opcode, FORWARD, [x, x] if opcode == "conditional" else [x], called=[body])
    end = b.op(name=OPTIMIZER, operands=[run, kept])
    assert b.fullest(b.computation(kept, gone, x, run, end)) == Fullest(0, 310, 0)


def test_a_loop_carries_arrays_through():
    b = Builder()
    carried = b.op("parameter")
    first = b.op("get-tuple-element", operands=[carried], number=0)
    second = b.op("get-tuple-element", operands=[carried], number=1)
    updated = b.op(name=BACKWARD, operands=[first], size=100, at=0)
    root = b.op("tuple", operands=[updated, second])
    body = b.computation(carried, first, second, updated, root)
    zeros = b.op("broadcast", size=100, at=0)
    h = b.op(name=FORWARD, size=30)
    start = b.op("tuple", operands=[zeros, h])
    loop = b.op("while", BACKWARD, [start], called=[body])
    gradient = b.op("get-tuple-element", operands=[loop], number=0)
    later = b.op(name=OPTIMIZER, size=40)
    new = b.op(name=OPTIMIZER, operands=[gradient, later])
    main = b.computation(zeros, h, start, loop, gradient, later, new)
    # The loop is followed by the moment of `later`, when only the gradients are still needed.
    assert b.fullest(main) == Fullest(gradients=100, activations=0, work=40)


def test_a_call_returns_what_it_made():
    b = Builder()
    made = b.op(name=FORWARD, size=100)
    callee = b.computation(made)
    run = b.op("call", FORWARD, called=[callee])
    other = b.op(name=FORWARD, size=50)
    end = b.op(name=OPTIMIZER, operands=[run, other])
    assert b.fullest(b.computation(run, other, end)) == Fullest(0, 150, 0)


def test_what_runs_beside_the_program_holds_its_operands():
    b = Builder()
    x = b.op(name=FORWARD, size=100)
    start = b.op("all-reduce-start", FORWARD, [x])
    other = b.op(name=FORWARD, size=50)
    done = b.op("all-reduce-done", FORWARD, [start])
    end = b.op(name=OPTIMIZER, operands=[done, other])
    assert b.fullest(b.computation(x, start, other, done, end)) == Fullest(0, 150, 0)


def test_names_of_operations():
    b = Builder()
    again = b.op(name="jit(f)/transpose(jvp(g))/rematted_computation/dot", size=10)
    sums = b.op(name="jit(f)/gradients/while/body/add", size=20)
    other = b.op(name="jit(f)/gradients_of_mine/add", size=40)
    end = b.op(name=OPTIMIZER, operands=[again, sums, other])
    assert b.fullest(b.computation(again, sums, other, end)) == Fullest(20, 10, 40)


def test_a_program_without_temporaries():
    b = Builder()
    assert b.fullest(b.computation(b.op("parameter"))) == Fullest(0, 0, 0)


def test_reads_what_xla_writes():
    def f(ws, x):
        step = lambda h, w: (jax.lax.cond(w[0, 0] > 0, jnp.tanh, jnp.sin, h @ w), None)
        return jax.grad(lambda ws: jnp.sum(jax.lax.scan(step, x, ws)[0] ** 2))(ws)

    compiled = jax.jit(f).lower(jnp.ones((4, 64, 64)), jnp.ones((128, 64))).compile()
    program = programs.read(compiled)
    opcodes = {i.opcode for c in program.computations.values() for i in c.instructions}
    assert {"while", "conditional", "parameter"} <= opcodes
    known = {i.id for c in program.computations.values() for i in c.instructions}
    assert known >= program.defined.keys() - {i for i, d in program.defined.items() if not d}
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert 0.8 * temporaries <= fullest(program).total <= temporaries
    assert max(b.offset + b.size for b in program.buffers.values()) <= temporaries


def test_what_cannot_be_read_is_not():
    assert programs.read(object()) is None
    with pytest.raises(ValueError, match="no order of execution"):
        programs.parse(b"", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05ab", "longer than its message"),
        (b"\x08\xff", "cut off"),
        (b"\x0b", "wire type 3"),
    ],
)
def test_what_is_no_message_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        wire.Message(data)


def test_fields_of_a_message():
    data = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1a\x03\x01\x96\x01" + b"\x22\x02\x08\x07"
    message = wire.Message(data + b"\x29" + bytes(8) + b"\x35" + bytes(4) + b"\x18\x05")
    assert message.number(1) == 150 and message.number(99) == 0
    assert message.text(2) == "abc" and message.text(99) == ""
    assert message.numbers(3) == [1, 150, 5]
    assert message.message(4).number(1) == 7 and message.messages(99) == []
    with pytest.raises(ValueError, match="not a number"):
        message.number(2)
    with pytest.raises(ValueError, match="where a message should be"):
        message.text(1)
