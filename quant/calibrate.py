"""Activation ranges from the float network's own activations, one denoising step at a time."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from quant.convert import QuantizedUNet
from quant.quantizers import ActivationQuantizer, WeightQuantizer

# Values of each layer and denoising step that the search for a range looks at.
VALUES_PER_STEP = 16_384

Values = dict[ActivationQuantizer, list[Tensor]]


@torch.no_grad()
def calibrate(model: QuantizedUNet, states: Mapping[int, Tensor]) -> None:
    """Initialise every activation step size and zero point of `model` from that step's own activations.

    Args:
        states: for each of the clock's timesteps t, states x_t float (N, C, H, W).

    Raises:
        ValueError: the timesteps are not exactly the clock's.
    """
    if sorted(states) != sorted(model.clock.timesteps):
        raise ValueError(f"calibration needs states at {model.clock.timesteps}, not at {list(states)}")
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    values: Values = {q: [] for q in quantizers if isinstance(q, ActivationQuantizer)}
    # A hook that returns something replaces the module's output: with these the network runs in float.
    hooks = [quantizer.register_forward_hook(partial(_record, values)) for quantizer in quantizers]
    try:
        for t in model.clock.timesteps:
            model(states[t], t)
    finally:
        for hook in hooks:
            hook.remove()
    for quantizer, rows in values.items():
        quantizer.initialise(torch.stack(rows))


def _record(values: Values, quantizer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    (x,) = inputs
    if isinstance(quantizer, ActivationQuantizer):
        flat = x.flatten()
        index = torch.randint(flat.numel(), (VALUES_PER_STEP,), generator=torch.Generator().manual_seed(0))
        values[quantizer].append(flat[index.to(flat.device)])
    return x
