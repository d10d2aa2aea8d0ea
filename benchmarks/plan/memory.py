"""Memory of a step on each device.

What a device holds is exact. What else is alive depends on the moment, and the model has four: the
head's backward pass, a layer's, the embedding's, and the optimizer's. The step needs as much as the
moment that needs most.
"""

from typing import NamedTuple

from benchmarks.plan.setups import Held, Setup, held, kernels_serve, matrices

LAYER_WORK = 1.6
"""What a layer's backward pass has in flight, in multiples of what the layer keeps for it: fitted
to the peaks of one GPU (`checks.fitted`)."""

SCORE_BYTES = 6
"""Bytes of an attention score that XLA's attention keeps, once in float32 and once in bfloat16.
cuDNN's keeps none."""


class Memory(NamedTuple):
    """Bytes of a device when the step needs most.

    Attributes:
      held: weights, moments, projectors.
      gradients: its part of the gradients.
      activations: what the forward pass has kept.
      work: all else: the layer that is computed, weights that are gathered for it, whole gradients
        that are about to be added up, logits.
      moment: which moment that is.
    """

    held: Held
    gradients: float
    activations: float
    work: float
    moment: str

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self.held) + self.temporaries

    @property
    def temporaries(self) -> float:
        """What only the step needs."""
        return self.gradients + self.activations + self.work


def kept(setup: Setup) -> float:
    """Bytes that a layer keeps of a token for its backward pass, on each device.

    Of the residual stream, which devices along tensor each have whole: six arrays in float32 around
    the norms, and the inputs of the two halves. Of the rest, which they share: queries, keys,
    values, what attention makes of them, and six arrays of the MLP's width.
    """
    llama, tensor = setup.llama, setup.axes[2]
    stream = (6 * 4 + 2 * setup.compute) * llama.hidden
    heads = 2 * llama.hidden + 2 * llama.kv_heads * llama.head_dim
    inner: float = setup.compute * (heads + 6 * llama.padded_intermediate)
    if setup.attention == "xla":
        inner += SCORE_BYTES * llama.heads * setup.length
    return stream + inner / tensor


def memory(setup: Setup, layer_work: float = LAYER_WORK) -> Memory:
    """Predicts the memory of a step.

    Args:
      setup: the step.
      layer_work: see `LAYER_WORK`.
    """
    llama, holds, tokens = setup.llama, held(setup), setup.tokens
    _, fsdp, tensor = setup.axes
    size = setup.weight_bytes
    table = llama.vocab_size * llama.hidden / tensor  # of the head too
    layer = sum(m.numbers for m in matrices(llama)) / tensor
    shard = table / fsdp * size
    of_layers = layer * llama.layers / fsdp * size
    # Whole for a moment: weights that are gathered, and their gradients before they are added up.
    whole = 2 * size if fsdp > 1 else 0
    between = setup.compute * llama.hidden if setup.remat else kept(setup)
    activations = llama.layers * between * tokens
    logits = 2 * setup.compute * tokens * llama.vocab_size / (tensor * setup.chunks)
    moments = {
        "head": (shard, activations, logits + whole * table),
        "layer": (
            shard + of_layers,
            activations,
            layer_work * kept(setup) * tokens + whole * layer,
        ),
        "embedding": (shard + of_layers, 0.0, _of_the_embedding(setup)),
        "optimizer": (holds.weights, 0.0, _largest_update(setup)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    return Memory(holds, *moments[moment], moment)


def looks_up_in_place(setup: Setup) -> bool:
    """Whether devices look all tokens up in their own rows of the table, or gather the table.

    XLA decides by what is larger. Where tensor shares the rows too, it changes its mind somewhere
    between one and two tables' worth of tokens.
    """
    data, fsdp, tensor = setup.axes
    tables = setup.tokens * data * fsdp / setup.llama.vocab_size
    return fsdp * tensor > 1 and (fsdp == 1 or tables <= (1 if tensor == 1 else 1.5))


def adds_up_whole_tables(setup: Setup) -> bool:
    """Whether devices along fsdp add up gradients of the whole table, each of its own tokens."""
    data, fsdp, _ = setup.axes
    return fsdp > 1 and setup.tokens * data * fsdp > setup.llama.vocab_size


def _of_the_embedding(setup: Setup) -> float:
    """Its gradient in float32, and what is gathered for it."""
    _, fsdp, tensor = setup.axes
    table = 4 * setup.llama.vocab_size * setup.llama.hidden / tensor
    if adds_up_whole_tables(setup):
        return table
    stream = 4 * fsdp * setup.tokens * setup.llama.hidden if fsdp > 1 else 0
    return table / fsdp + stream


def _largest_update(setup: Setup) -> float:
    """The update of the largest stack of projected matrices, which XLA writes down."""
    if not setup.optimizer.rank or kernels_serve(setup):
        return 0.0
    _, fsdp, tensor = setup.axes
    largest = max(m.numbers for m in matrices(setup.llama))
    return setup.llama.layers * largest * setup.weight_bytes / (fsdp * tensor)
