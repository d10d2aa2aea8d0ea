"""The AdamW of galore-torch, from the paper's equations, on torch tensors or NumPy arrays.

For W ``(m, n)`` with ``m < n`` the rows are projected, else the columns; P holds the leading
singular vectors of the gradient at the last refresh, and with rows projected::

    R <- P^T G                                     # every step
    M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R^2
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale P (M / (sqrt(V) + eps))
    W <- W - lr decay W

References:
  Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
"""

import importlib.util
import statistics
import time
from typing import Any, NamedTuple

import numpy as np


class Settings(NamedTuple):
    """The hyperparameters."""

    rank: int
    learning_rate: float
    weight_decay: float
    scale: float
    gap: int
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6


class NumpyOps:
    """What the method does to arrays, on NumPy's."""

    @staticmethod
    def blend(old: Any, new: Any, decay: float) -> None:
        """``old <- decay old + (1 - decay) new``."""
        old *= decay
        old += (1 - decay) * new

    @staticmethod
    def blend_square(old: Any, new: Any, decay: float) -> None:
        """``old <- decay old + (1 - decay) new^2``."""
        old *= decay
        old += (1 - decay) * new**2

    @staticmethod
    def add(y: Any, x: Any, factor: float) -> None:
        """``y <- y + factor x``."""
        y += factor * x

    @staticmethod
    def normalized(m: Any, v: Any, eps: float) -> Any:
        """``m / (sqrt(v) + eps)``."""
        return m / (np.sqrt(v) + eps)

    @staticmethod
    def zeros_like(x: Any) -> Any:
        """Zeros."""
        return np.zeros_like(x)

    @staticmethod
    def leading(g: Any, rank: int, rows: bool) -> Any:
        """The first singular vectors, ``(m, r)`` of the rows or ``(n, r)`` of the columns."""
        u, _, vh = np.linalg.svd(g, full_matrices=False)
        return u[:, :rank] if rows else vh[:rank].T


class TorchOps:
    """What the method does to arrays, on torch's, in place as an optimizer of torch does it."""

    @staticmethod
    def blend(old: Any, new: Any, decay: float) -> None:
        """``old <- decay old + (1 - decay) new``."""
        old.mul_(decay).add_(new, alpha=1 - decay)

    @staticmethod
    def blend_square(old: Any, new: Any, decay: float) -> None:
        """``old <- decay old + (1 - decay) new^2``."""
        old.mul_(decay).addcmul_(new, new, value=1 - decay)

    @staticmethod
    def add(y: Any, x: Any, factor: float) -> None:
        """``y <- y + factor x``."""
        y.add_(x, alpha=factor)

    @staticmethod
    def normalized(m: Any, v: Any, eps: float) -> Any:
        """``m / (sqrt(v) + eps)``."""
        return m / v.sqrt().add_(eps)

    @staticmethod
    def zeros_like(x: Any) -> Any:
        """Zeros."""
        import torch

        return torch.zeros_like(x)

    @staticmethod
    def leading(g: Any, rank: int, rows: bool) -> Any:
        """The first singular vectors, ``(m, r)`` of the rows or ``(n, r)`` of the columns."""
        import torch

        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
        return (u[:, :rank] if rows else vh[:rank].T).to(g.dtype)


class GaloreAdamW:
    """The optimizer of one matrix; moments and projector have the gradient's dtype."""

    def __init__(self, settings: Settings, ops: Any):
        """Starts before the first step."""
        self.settings, self.ops = settings, ops
        self.steps = 0
        self.projector: Any = None
        self.m: Any = None
        self.v: Any = None

    def step(self, w: Any, g: Any) -> None:
        """Changes ``w`` in place."""
        s, ops = self.settings, self.ops
        rows = g.shape[0] < g.shape[1]
        if self.steps % s.gap == 0:
            self.projector = ops.leading(g, s.rank, rows)
        p = self.projector
        r = p.T @ g if rows else g @ p
        if self.m is None:
            self.m, self.v = ops.zeros_like(r), ops.zeros_like(r)
        self.steps += 1
        ops.blend(self.m, r, s.b1)
        ops.blend_square(self.v, r, s.b2)
        n = ops.normalized(self.m, self.v, s.eps)
        size = s.learning_rate * (1 - s.b2**self.steps) ** 0.5 / (1 - s.b1**self.steps)
        ops.add(w, p @ n if rows else n @ p.T, -size * s.scale)
        ops.add(w, w, -s.learning_rate * s.weight_decay)


def has_torch() -> bool:
    """Whether torch is installed and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def ordinary_times(
    params: Any, grads: Any, settings: Settings, *, seconds: float = 1.0, device: str = "cuda"
) -> tuple[list[float], int]:
    """Times steps that keep their projectors, as torch runs them: matrix by matrix, eagerly.

    Args:
      params: a list of JAX arrays ``(..., m, n)``; their matrices are copied.
      grads: the gradients, which torch reads where they are.
      settings: the hyperparameters.
      seconds: about how long to measure.
      device: where to.

    Returns:
      Seconds of every block's step, and the bytes that torch and the gradients need at once.
    """
    import torch

    def all_matrices(arrays: Any, copy: bool) -> list[Any]:
        tensors = [torch.from_dlpack(x) for x in arrays]
        tensors = [x.clone() if copy else x for x in tensors]
        return [matrix for x in tensors for matrix in x.reshape(-1, *x.shape[-2:])]

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        weights, gradients = all_matrices(params, True), all_matrices(grads, False)
        optimizers = [_in_mid_training(g, settings) for g in gradients]

        def step() -> None:
            for optimizer, w, g in zip(optimizers, weights, gradients, strict=True):
                optimizer.step(w, g)

        step()
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        once = time.perf_counter() - start
        count = max(1, round(seconds / 10 / once))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize()
            times.append((time.perf_counter() - start) / count)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return times, peak + sum(g.numel() * g.element_size() for g in gradients)


def _in_mid_training(g: Any, settings: Settings) -> GaloreAdamW:
    """An optimizer with random state, one step after a refresh that never comes again."""
    optimizer = GaloreAdamW(settings._replace(gap=2**62), TorchOps)
    rows = g.shape[0] < g.shape[1]
    side, other = (g.shape[0], g.shape[1]) if rows else (g.shape[1], g.shape[0])
    shape = (settings.rank, other) if rows else (other, settings.rank)
    optimizer.projector = g.new_empty(side, settings.rank).normal_().mul_(side**-0.5)
    optimizer.m = g.new_empty(shape).normal_()
    optimizer.v = g.new_empty(shape).uniform_(0.1, 1.0)
    optimizer.steps = 1
    return optimizer


def svd_seconds(g: Any, repeats: int) -> float:
    """Median seconds of torch's SVD of one matrix, a JAX array."""
    import torch

    x = torch.from_dlpack(g)
    small = x[:64, :64].float()
    torch.linalg.svd(small)  # the library's own start
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.linalg.svd(x.float(), full_matrices=False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
