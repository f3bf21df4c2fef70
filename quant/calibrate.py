"""Activation ranges from the float network's own activations, one denoising step at a time; then the biases."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.convert import QuantizedUNet
from quant.quantizers import ActivationQuantizer, WeightQuantizer

# Values of each layer and denoising step that the search for a range looks at: the extremes, and a random sample.
VALUES_PER_STEP = 16_384

# States of each denoising step that the correction of the biases looks at; all steps go through together.
STATES_PER_STEP = 16


@torch.no_grad()
def calibrate(model: QuantizedUNet, states: Mapping[int, Tensor]) -> None:
    """Initialise `model`'s activation step sizes and zero points from each step's own activations; correct its biases.

    Quantization shifts the mean of a layer's output. Each bias takes the shift back (arXiv 1906.04721, section
    4.2), layer after layer, so that a layer sees inputs that are corrected already. To be called once: a second call
    would take the corrected biases for the float network's.

    Args:
        states: for each of the clock's timesteps t, states x_t float (N, C, H, W).

    Raises:
        ValueError: the timesteps are not exactly the clock's.
    """
    if sorted(states) != sorted(model.clock.timesteps):
        raise ValueError(f"calibration needs states at {model.clock.timesteps}, not at {list(states)}")
    values: dict[Any, list[Tensor]] = {layer.act_quantizer: [] for _, layer in model.layers()}

    def collect(quantizer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        flat = inputs[0].flatten()
        index = torch.randint(flat.numel(), (VALUES_PER_STEP - 2,), generator=torch.Generator().manual_seed(0))
        values[quantizer].append(torch.cat([flat[index.to(flat.device)], torch.stack(flat.aminmax())]))

    with _in_float(model), _hooks(values, collect):
        for t in model.clock.timesteps:
            model(states[t], t)
    for quantizer, rows in values.items():
        quantizer.initialise(torch.stack(rows), model.quant_config.search)
    if model.quant_config.bias_correction:
        _correct_biases(model, states)


def _correct_biases(model: QuantizedUNet, states: Mapping[int, Tensor]) -> None:
    some = {t: x[:STATES_PER_STEP] for t, x in states.items()}
    x = torch.cat(list(some.values()))
    t = torch.cat([torch.full((len(x_t),), t, device=x.device) for t, x_t in some.items()])
    layers = [layer for _, layer in model.layers()]
    means: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        means[layer] = _channel_means(output)

    def correct(layer: Any, _: tuple[Tensor], output: Tensor) -> Tensor:
        shift = means[layer] - _channel_means(output)
        layer.bias += shift
        return output + (shift[:, None, None] if output.dim() == 4 else shift)

    with _in_float(model), _hooks(layers, remember):
        model(x, t)
    with _hooks(layers, correct):
        model(x, t)


def _channel_means(x: Tensor) -> Tensor:
    """The mean of each channel, (C,): of images (N, C, H, W), or of features (N, …, C)."""
    return x.mean((0, 2, 3)) if x.dim() == 4 else x.flatten(0, -2).mean(0)


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_float(model: QuantizedUNet) -> AbstractContextManager[None]:
    """Inside, quantizers hand on what they get: a hook that returns something replaces its module's output."""
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    return _hooks(quantizers, lambda quantizer, inputs, output: inputs[0])
