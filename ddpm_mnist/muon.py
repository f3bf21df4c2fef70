"""Muon: the momentum of every weight matrix, made orthogonal (https://kellerjordan.github.io/posts/muon, 2024).

torch.optim.Muon does the same for parameters of two dimensions, in bfloat16, which on a processor without such units
costs as much as the rest of an update. This one takes convolutions too and works in float32.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Newton–Schulz: five of these odd polynomials bring singular values from (0, 1] into about 0.7…1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of the singular value decomposition U·S·Vᵀ of `matrix` (m, n)."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum, orthogonalised; the root mean square of an update is about 0.2 · lr, as Adam's is.

    Args:
        params: of two dimensions or more; all but the first are taken as one.
        lr: learning rate, on the scale of Adam's (arXiv 2502.16982, section 2.2).
        momentum: share of the old mean that each update keeps.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(mean, group["momentum"]).flatten(1))
                factor = 0.2 * max(update.shape) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"] * factor)
