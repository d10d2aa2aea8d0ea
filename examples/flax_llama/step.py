"""The two compiled functions: one optimizer step, and the loss of one validation batch."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_gale
from examples.flax_llama.config import ModelOptions, TrainingOptions
from examples.flax_llama.errors import UserError
from examples.flax_llama.model import Llama, head_loss, next_token_loss, predicted
from examples.flax_llama.optimizers import DATA
from optax_gale.quantization import Quantized

Batch = Mapping[str, Any]  # tokens (B, T) and mask (B, T), of JAX or of NumPy
Metrics = dict[str, jax.Array]

_PIECE = 2**27  # bytes that one program makes of the first state, unless a single array has more


def check_backend(attention: str) -> None:
    """Refuses the fused attention where it cannot run.

    Raises:
      UserError: if there is no NVIDIA GPU.
    """
    if attention == "cudnn" and not _sees_cuda():
        raise UserError(
            "--attention-backend cudnn needs an NVIDIA GPU and a JAX that sees it; leave it out"
        )


def _sees_cuda() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


class TrainState(NamedTuple):
    """What training carries from step to step.

    Attributes:
      step: number of steps taken, int32 scalar.
      params: the weights.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Walk(NamedTuple):
    """How a step goes through the batch and the layers.

    Attributes:
      micro_batches: parts of the batch, one after another.
      layerwise: whether each layer takes its step as soon as its gradient is there.
      clip_norm: global norm to which gradients are clipped in that case; 0: not at all. Otherwise
        the optimizer clips.
      clip: how the norm is known in time; see `optax_gale.layerwise`.
      activations: what the backward pass reads of a layer in that case; see `optax_gale.layerwise`.
      in_8_bits: whether the layers' matrices are kept in 8 bits.
      seed: of the draws with which those are rounded.
      mesh: of devices each of which computes gradients of its own, which the optimizer averages;
        None: the compiler does, whatever devices there are.
    """

    micro_batches: int = 1
    layerwise: bool = False
    clip_norm: float = 0.0
    clip: Literal["hold", "two_pass", "previous"] = "hold"
    activations: Literal["recompute", "keep"] = "recompute"
    in_8_bits: bool = False
    seed: int = 0
    mesh: Mesh | None = None

    @classmethod
    def of(cls, training: TrainingOptions, model: ModelOptions, mesh: Mesh | None = None) -> "Walk":
        """What the options say, on a mesh."""
        return cls(
            training.micro_batches,
            training.layerwise,
            training.clip_norm if training.layerwise else 0.0,
            training.layerwise_clip,
            training.layerwise_activations,
            model.in_8_bits,
            training.seed,
            mesh if training.average == "projections" else None,
        )

    def init(self, tx: optax.GradientTransformation, params: Any) -> Any:
        """The optimizer's state before the first step."""
        params = optax_gale.dequantize_weights(params, jnp.float32)  # of which shapes are read
        if self.layerwise and self.clip_norm and self.clip == "previous":
            return optax_gale.LayerwiseState(tx.init(params), jnp.zeros((), jnp.float32))
        return tx.init(params)

    def store(self, params: Any) -> Any:
        """Weights as they are kept."""
        return optax_gale.quantize_weights(params) if self.in_8_bits else params


WHOLE = Walk()


def trace_init(
    model: Llama, tx: optax.GradientTransformation, seed: int, walk: Walk = WHOLE
) -> "jax.stages.Traced":
    """Traces the making of the first state.

    Its weights depend on the model and the seed only. ``out_info`` of what is returned is the
    state's shapes; ``lower().compile()()`` makes it, in one program. `first_state` needs less
    memory.
    """

    def init() -> TrainState:
        params = walk.store(_initial_weights(model, seed))
        return TrainState(jnp.zeros((), jnp.int32), params, walk.init(tx, params))

    return jax.jit(init).trace()


def first_state(
    model: Llama,
    tx: optax.GradientTransformation,
    seed: int,
    walk: Walk = WHOLE,
    shardings: tuple[Any, Any, Any] | None = None,
) -> TrainState:
    """Makes the state that `trace_init` describes, a few arrays at a time.

    Its numbers do not depend on ``shardings``, which say where they lie.

    What a program needs besides its results, it needs on top of all of them: random bits take 32
    bits a number, also for weights of 16. Made in pieces, the first state needs no more memory than
    the steps that follow.
    """
    of_step, of_params, of_state = shardings or (None, None, None)
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=of_step)()
    params = _in_pieces(lambda: walk.store(_initial_weights(model, seed)), of_params)
    opt_state = _in_pieces(functools.partial(walk.init, tx), of_state, params)
    return TrainState(step, params, opt_state)


def _initial_weights(model: Llama, seed: int) -> Any:
    # One sequence cannot be spread over devices.
    return model.clone(stream=None).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]


def _in_pieces(make: Callable[..., Any], shardings: Any, *arguments: Any) -> Any:
    """What ``make`` returns, by several programs that make a part of it each."""
    paths, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(make, *arguments))
    where = [None] * len(paths) if shardings is None else jax.tree.leaves(shardings)
    made: dict[int, jax.Array] = {}
    for numbers in _pieces(paths):

        def piece(*arguments: Any, numbers: list[int] = numbers) -> list[jax.Array]:
            leaves = jax.tree.leaves(make(*arguments))
            return [leaves[i] for i in numbers]

        here = [where[i] for i in numbers]
        made |= zip(numbers, jax.jit(piece, out_shardings=here)(*arguments), strict=True)
    return jax.tree.unflatten(structure, [made[i] for i in range(len(paths))])


def _pieces(paths: Iterable[tuple[Any, jax.ShapeDtypeStruct]]) -> list[list[int]]:
    """Numbers of the arrays that are made together.

    Those that need most besides themselves come first, while little is there: the embedding and the
    head, which are drawn at once, and not layer by layer.
    """

    def key(numbered: tuple[int, tuple[Any, jax.ShapeDtypeStruct]]) -> bool:
        return any(getattr(k, "key", None) == "layers" for k in numbered[1][0])

    pieces: list[list[int]] = []
    room = 0
    for i, (_, x) in sorted(enumerate(paths), key=key):
        if not pieces or _bytes(x) > room:
            pieces.append([])
            room = _PIECE
        pieces[-1].append(i)
        room -= _bytes(x)
    return pieces


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


def make_train_step(
    model: Llama,
    tx: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    loss_chunks: int = 1,
    walk: Walk = WHOLE,
    shardings: tuple[Any, Any] | None = None,
) -> jax.stages.Wrapped:
    """Builds ``step(state, batch, refresh=None) -> (state, metrics)``, jitted, state donated.

    With ``shardings``, of the state and of the metrics, results lie there.

    The metrics are scalars that stay on the device: the loss before the update, the gradients' norm
    before clipping, and the learning rate. ``refresh`` is static: True and False are one executable
    each.
    """
    if walk.layerwise:
        take = _layerwise(model, tx, loss_chunks, walk)
    else:
        where = None
        if shardings is not None and walk.mesh is None and _mesh(shardings).size > 1:
            where = shardings[0]
        take = _whole(model, tx, loss_chunks, walk, where)
    if walk.mesh is not None:
        take = _each_on_its_own(take, walk.mesh)
    elif shardings is not None:
        take = _on_mesh(take, _mesh(shardings))

    def train_step(
        state: TrainState, batch: Batch, refresh: bool | None = None
    ) -> tuple[TrainState, Metrics]:
        count = jnp.sum(predicted(batch["mask"]))
        batch = {**batch, "weight": walk.micro_batches / jnp.maximum(count, 1.0)}
        extra: dict[str, Any] = {} if refresh is None else {"refresh": refresh}
        if walk.in_8_bits:
            extra["key"] = jax.random.fold_in(jax.random.key(walk.seed), state.step)
        params, opt_state, loss, norm = take(state.params, state.opt_state, batch, extra)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, static_argnames="refresh", donate_argnums=0, out_shardings=shardings)


def _mesh(shardings: Any) -> Mesh:
    mesh: Mesh = jax.tree.leaves(shardings)[0].mesh
    return mesh


# A part of the loss: the sum over a part of the batch, times the batch's ``weight``. The mean over
# parts is the mean over tokens, however uneven they are.
_Take = Callable[[Any, Any, Batch, dict[str, Any]], tuple[Any, Any, jax.Array, jax.Array]]


def _whole(
    model: Llama,
    tx: optax.GradientTransformationExtraArgs,
    loss_chunks: int,
    walk: Walk,
    where: TrainState | None,
) -> _Take:
    """Gradients of the whole model, of one part of the batch after another."""
    micro_batches = walk.micro_batches
    update: Callable[..., Any] = functools.partial(optax_gale.update_and_apply, tx)
    if where is not None:
        update = _where_all_lies(update, tx, where)

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        return next_token_loss(model, params, batch, chunks=loss_chunks)[0] * batch["weight"]

    def one(params: Any, opt_state: Any, batch: Batch, extra: dict[str, Any]) -> Any:
        own = params
        if walk.mesh is not None:  # or JAX would average the gradients, all of them
            own = jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to="varying"), params)
        loss, grads = jax.value_and_grad(loss_fn)(own, batch)
        norm = optax.tree.norm(grads)
        if walk.mesh is not None:
            loss = jax.lax.pmean(loss, DATA)
            norm = jnp.sqrt(jax.lax.pmean(jnp.square(norm), DATA))
        params, opt_state = update(grads, opt_state, params, **extra)
        return params, opt_state, loss, norm

    def take(params: Any, opt_state: Any, batch: Batch, extra: dict[str, Any]) -> Any:
        def part(carried: Any, i: jax.Array) -> Any:
            params, opt_state = carried
            mine = {name: x if name == "weight" else split(x)[:, i] for name, x in batch.items()}
            params, opt_state, loss, norm = one(params, opt_state, mine, extra)
            return (params, opt_state), (loss, norm)

        split = lambda x: jnp.reshape(x, (-1, micro_batches, *jnp.shape(x)[1:]))
        carried, (loss, norm) = jax.lax.scan(part, (params, opt_state), jnp.arange(micro_batches))
        return *carried, jnp.mean(loss), jnp.mean(norm)

    return one if micro_batches == 1 else take


def _where_all_lies(
    update: Callable[..., Any], tx: optax.GradientTransformation, where: TrainState
) -> Callable[..., Any]:
    """Tells the optimizer what each device has, so that kernels can serve.

    Of a refresh it is told for the step that follows: factorisations the compiler spreads better
    by itself. Nothing is told where devices share what types cannot say, see
    `optax_gale.state_partition_specs`.
    """
    apart = getattr(tx, "refreshed", None) is not None
    weights = [x.spec for x in jax.tree.leaves(where.params)]

    def there(grads: Any, opt_state: Any, params: Any, **extra: Any) -> Any:
        refresh = extra.get("refresh")
        if refresh is None or (refresh and not apart):
            return update(grads, opt_state, params, **extra)
        of_params = jax.tree.unflatten(jax.tree.structure(params), weights)
        by_types = optax_gale.state_partition_specs(tx, params, of_params)
        if not _lies(opt_state, where.opt_state, by_types):
            return update(grads, opt_state, params, **extra)
        del extra["refresh"]
        if refresh:
            opt_state = optax_gale.refresh_projectors(tx, grads, opt_state, params, **extra)
        run = jax.sharding.explicit_axes(
            functools.partial(update, refresh=False, **extra),
            in_sharding=(of_params, by_types, of_params),
        )
        return run(grads, opt_state, params)

    return there


def _lies(tree: Any, where: Any, specs: Any) -> bool:
    """Whether arrays lie where specs say."""
    told = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    every = zip(jax.tree.leaves(tree), jax.tree.leaves(where), told, strict=True)
    return all(
        sharding.is_equivalent_to(NamedSharding(sharding.mesh, spec), x.ndim)
        for x, sharding, spec in every
    )


def _on_mesh(take: _Take, mesh: Mesh) -> _Take:
    """The optimizer is told of the mesh, and tells the compiler what not to spread."""

    def there(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return take(*arguments)

    return there


def _each_on_its_own(take: _Take, mesh: Mesh) -> _Take:
    """Each device takes its part of the batch; who averages is ``take``."""

    def everywhere(params: Any, opt_state: Any, batch: Batch, extra: dict[str, Any]) -> Any:
        # The mean over devices of what each makes of its own part is that of the whole batch.
        batch = {**batch, "weight": batch["weight"] * mesh.shape[DATA]}
        own = {name: P() if name == "weight" else P(DATA) for name in batch}
        mapped = jax.shard_map(
            lambda params, opt_state, batch: take(params, opt_state, batch, extra),
            mesh=mesh,
            in_specs=(P(), P(), own),
            out_specs=P(),
        )
        return mapped(params, opt_state, batch)

    return everywhere


def _layerwise(
    model: Llama, tx: optax.GradientTransformationExtraArgs, loss_chunks: int, walk: Walk
) -> _Take:
    """Each layer takes its step in the backward pass."""
    step = optax_gale.layerwise(
        layered(model, loss_chunks),
        tx,
        micro_batches=walk.micro_batches,
        clip_norm=walk.clip_norm or None,
        clip=walk.clip,
        activations=walk.activations,
    ).step

    def take(params: Any, opt_state: Any, batch: Batch, extra: dict[str, Any]) -> Any:
        params, opt_state, metrics = step(params, opt_state, batch, **extra)
        return params, opt_state, *metrics

    return take


def layered(model: Llama, loss_chunks: int = 1) -> optax_gale.LayeredModel:
    """The model in pieces; ``batch["weight"]`` multiplies the sum of the tokens' losses."""
    block = model.block()

    def embed(rest: Any, batch: Batch) -> Any:
        return model.apply({"params": rest}, jnp.asarray(batch["tokens"]), method="embed_tokens")

    def layer(params: Any, x: jax.Array, batch: Batch, number: jax.Array) -> Any:
        del batch, number
        return block.apply({"params": params}, x)

    def head(rest: Any, x: jax.Array, batch: Batch) -> jax.Array:
        return head_loss(model, rest, x, batch, chunks=loss_chunks)[0] * batch["weight"]

    return optax_gale.LayeredModel(embed, layer, head)


class Evaluation(NamedTuple):
    """A validation.

    Attributes:
      loss: mean loss a token, over all tokens that the mask counts.
      tokens: how many those are.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinity where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def make_evaluate(
    model: Llama,
    loss_chunks: int = 1,
    shapes: tuple[Any, Any] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[Any, Iterable[Batch]], Evaluation]:
    """Builds ``evaluate(params, batches)``.

    The mean is over tokens, not over batches: sums and counts are added up before they are divided,
    in double precision, so that it is unbiased however uneven the batches are.

    With the shapes of parameters and of a batch it is compiled here, otherwise at the first batch.
    ``sharding`` is where the sums lie: every process must be able to read them.
    """

    def sums(params: Any, batch: Batch) -> jax.Array:
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
        if not any(isinstance(x, Quantized) for x in leaves):
            return jnp.stack(next_token_loss(model, params, batch, chunks=loss_chunks))
        # Layer by layer: in full they might not fit.
        total = layered(model, loss_chunks).loss(params, {**batch, "weight": jnp.float32(1)})
        return jnp.stack([total, jnp.sum(predicted(batch["mask"]))])

    program = jax.jit(sums, out_shardings=sharding)
    batch_loss: Callable[[Any, Batch], jax.Array] = program
    if shapes is not None:
        batch_loss = program.lower(*shapes).compile()

    def evaluate(params: Any, batches: Iterable[Batch]) -> Evaluation:
        sums = jax.device_get([batch_loss(params, batch) for batch in batches])
        total = math.fsum(float(s[0]) for s in sums)
        count = math.fsum(float(s[1]) for s in sums)
        return Evaluation(total / count if count else math.nan, round(count))

    return evaluate
