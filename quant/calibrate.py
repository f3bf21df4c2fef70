"""Set activation ranges from the float network's activations at each denoising step, then correct biases or weights."""

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.context import plain_torch
from quant.quantizers import ActivationQuantizer, WeightQuantizer, as_number
from quant.reconstruct import reconstruct
from quant.student import QuantizedUNet, require_student

# Activations of each layer that the range search uses, the two extremes and a random sample: per denoising step, or in
# total if all steps share one range.
VALUES = 16_384

# States of each denoising step that bias correction uses.
STATES_PER_STEP = 16


# Students that are being calibrated, in any thread.
_at_work: set[QuantizedUNet] = set()
_at_work_lock = threading.Lock()


@torch.no_grad()
@plain_torch()
def calibrate(model: QuantizedUNet, states: Mapping[Any, Tensor], **conditions: Tensor) -> None:
    """Initialise the activation step sizes and zero points of `model` for each denoising step, then correct its biases.

    Quantization shifts the mean of a layer's output. Bias correction subtracts the shift from the bias (arXiv
    1906.04721, section 4.2), layer by layer, so that a layer's inputs are already corrected. With
    `QuantConfig.reconstruction`, weights are recomputed as well (`quant/reconstruct.py`).

    Activations are not stored: calibration takes little more memory than a forward pass of the states of one timestep.
    Reconstruction takes about twice the memory of a forward pass of eight times as many states, and of at least two
    states of each timestep. If calibration fails, `model` is unchanged.

    Args:
        states: for each of the clock's timesteps t, states x_t float (N, C, H, W).
        conditions: further arguments of the network, with a row for each of the N states, such as class_labels (N,).

    Raises:
        ValueError: the timesteps differ from the clock's, the model was calibrated or frozen before, or a layer does
            not run exactly once in a forward pass.
    """
    require_student(model)
    if model.is_calibrated:
        raise ValueError("this student is calibrated already; quantize its teacher anew")
    by_time = _checked(model, states, conditions)
    with _at_work_lock:
        if model in _at_work:
            raise ValueError("another thread is calibrating this student")
        _at_work.add(model)
    training, before = model.training, copy.deepcopy(model.state_dict())
    try:
        model.eval()
        _set_ranges(model, by_time, conditions)
        if model.quant_config.reconstruction:
            _reconstruct(model, by_time, conditions)
        elif model.quant_config.bias_correction:
            _correct_biases(model, by_time, conditions)
        model.is_calibrated = True
    finally:
        _at_work.discard(model)
        model.train(training)
        if not model.is_calibrated:  # undo a partial calibration
            model.load_state_dict(before)


def _checked(model: QuantizedUNet, states: Mapping[Any, Tensor], conditions: dict[str, Tensor]) -> dict[float, Tensor]:
    """Return the states in float32, with numbers as keys; raise ValueError if the states or conditions are invalid."""
    by_time = {as_number(t): x for t, x in states.items()}
    if sorted(by_time) != sorted(model.clock.timesteps):
        raise ValueError(f"calibration needs states at {model.clock.timesteps}, not at {list(by_time)}")
    first, channels = by_time[model.clock.timesteps[0]], model.config.in_channels
    shape: tuple[int, ...] = tuple(getattr(first, "shape", ()))
    for t, x in by_time.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"the states at {t} must be a tensor of floats")
        if x.dim() != 4 or x.shape[1] != channels or not x.numel() or x.shape != shape:
            raise ValueError(
                f"the states at {t} must be (N, {channels}, H, W), alike at all timesteps, not {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(f"the states at {t} contain a value that is not finite")
    for name, values in conditions.items():
        if not isinstance(values, Tensor) or values.dim() < 1 or len(values) != shape[0]:
            raise ValueError(f"{name} must be a tensor with a row for each of {shape[0]} states")
        if not values.isfinite().all():
            raise ValueError(f"{name} contains a value that is not finite")
    return {t: x.float() for t, x in by_time.items()}


def _set_ranges(model: QuantizedUNet, states: dict[float, Tensor], conditions: dict[str, Tensor]) -> None:
    quantizers = [layer.act_quantizer for _, layer in model.layers()]
    per_step, search = model.quant_config.per_step, model.quant_config.search
    count = VALUES if per_step else max(math.ceil(VALUES / len(states)), 3)
    of_all_steps: dict[Any, Tensor] = {}
    if not per_step:  # allocated first, because small tensors between large ones would fragment the memory
        of_all_steps = {quantizer: quantizer.scale.new_empty(len(states), count) for quantizer in quantizers}

    calls: Counter[Any] = Counter()

    def look(row: int, quantizer: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        calls[quantizer] += 1
        flat = inputs[0].flatten()
        index = torch.randint(flat.numel(), (count - 2,), generator=torch.Generator().manual_seed(0))
        values = torch.cat([flat[index.to(flat.device)], torch.stack(flat.aminmax())])
        if per_step:
            quantizer.initialise(values, search, row)
        else:
            of_all_steps[quantizer][row] = values

    with _in_float(model):
        for row, t in enumerate(model.clock.timesteps):
            with _hooks(quantizers, partial(look, row)):
                model(states[t], t, **conditions)
            for name, layer in model.layers():
                if (times := calls.pop(layer.act_quantizer, 0)) != 1:
                    raise ValueError(
                        f"{name} runs {times} times in a forward pass, not once: turn chunked feed-forward off, and "
                        "pass all inputs of the network"
                    )
    for quantizer, values in of_all_steps.items():
        quantizer.initialise(values.flatten(), search)


def _correct_biases(model: QuantizedUNet, states: dict[float, Tensor], conditions: dict[str, Tensor]) -> None:
    """Correct each bias by the mean shift over several batches, which mix the denoising steps."""
    size = len(next(iter(states.values())))
    places = [(t, i) for t, x in states.items() for i in range(min(len(x), STATES_PER_STEP))]
    num_batches = math.ceil(len(places) / size)
    layers = [layer for _, layer in model.layers()]
    means = {layer: layer.bias.new_empty(num_batches, len(layer.bias)) for layer in layers}

    def remember(number: int, layer: Any, _: tuple[Tensor], output: Tensor) -> None:
        means[layer][number] = _channel_means(output)

    def correct(number: int, layer: Any, _: tuple[Tensor], output: Tensor) -> Tensor:
        shift = (means[layer][number] - _channel_means(output)) / (number + 1)  # a running mean over the batches
        layer.bias += shift
        return output + (shift[:, None, None] if output.dim() == 4 else shift)

    def run(number: int) -> None:
        batch = places[number::num_batches]
        x = torch.stack([states[t][i] for t, i in batch])
        rows = {name: values[[i for _, i in batch]] for name, values in conditions.items()}
        model(x, torch.tensor([t for t, _ in batch], device=x.device), **rows)

    with _in_float(model):
        for number in range(num_batches):
            with _hooks(layers, partial(remember, number)):
                run(number)
    for number in range(num_batches):
        with _hooks(layers, partial(correct, number)):
            run(number)


def _reconstruct(model: QuantizedUNet, states: dict[float, Tensor], conditions: dict[str, Tensor]) -> None:
    """Reconstruct all layers in one forward pass. Its batch has four times as many states as a denoising step, at least
    one from each step; each state is in it twice, as `reconstruct` expects."""
    size = len(next(iter(states.values())))
    each = math.ceil(4 * size / len(states))  # states per step; the indices continue from step to step
    places = [(t, (row * each + i) % size) for row, t in enumerate(states) for i in range(each)] * 2
    x = torch.stack([states[t][i] for t, i in places])
    rows = {name: values[[i for _, i in places]] for name, values in conditions.items()}
    with _hooks((layer for _, layer in model.layers()), partial(reconstruct, model.quant_config.search)):
        model(x, torch.tensor([t for t, _ in places], device=x.device), **rows)


def _channel_means(x: Tensor) -> Tensor:
    """Return the mean of each channel, (C,), of images (N, C, H, W) or features (N, …, C)."""
    return x.mean((0, 2, 3)) if x.dim() == 4 else x.flatten(0, -2).mean(0)


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """Register `hook` as a forward hook of `modules` inside the context, for this thread: others may run the model."""
    thread = threading.get_ident()

    def here(*call: Any) -> Any:
        return hook(*call) if threading.get_ident() == thread else None

    handles = [module.register_forward_hook(here) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_float(model: QuantizedUNet) -> AbstractContextManager[None]:
    """Disable the quantizers of `model` inside the context, by hooks that replace their outputs by their inputs."""
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    return _hooks(quantizers, lambda quantizer, inputs, output: inputs[0])
