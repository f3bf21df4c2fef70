"""The Muon optimizer: momentum with orthogonalised updates (https://kellerjordan.github.io/posts/muon, 2024).

torch.optim.Muon supports two-dimensional parameters only and uses bfloat16, which on a CPU without bfloat16
instructions takes as long as the rest of an update. This version also supports convolutions and uses float32.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Newton–Schulz iteration: five applications of this odd polynomial map singular values in (0, 1] to about 0.7…1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return approximately U·Vᵀ of the singular value decomposition U·S·Vᵀ of `matrix` (m, n)."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. The root mean square of an update is about 0.2 · lr, as with Adam.

    Args:
        params: parameters of at least two dimensions; all but the first are flattened.
        lr: learning rate, on the scale of Adam's (arXiv 2502.16982, section 2.2).
        momentum: decay of the running mean of the gradients.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(mean, group["momentum"]).flatten(1))
                factor = 0.2 * max(update.shape) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"] * factor)
