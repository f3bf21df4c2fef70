"""Check that a UNet has exactly the structure that its diffusers class creates from its config.

A student is saved as config and parameters, and integer inference follows the structure of the config. Any other change
to a network would be lost silently, so it is rejected, and the error names the part.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import attention_processor
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

CLASSES: dict[str, Any] = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}

# Supported config fields of each class. Fields that a later version of diffusers adds are rejected until tested.
_COMMON = {
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block",
    "downsample_padding", "mid_block_scale_factor", "dropout", "act_fn", "norm_num_groups", "norm_eps",
    "attention_head_dim", "resnet_time_scale_shift", "time_embedding_type", "time_embedding_dim", "class_embed_type",
    "num_class_embeds",
}  # fmt: skip
FIELDS = {
    "UNet2DModel": _COMMON
    | {"downsample_type", "upsample_type", "attn_norm_num_groups", "add_attention", "num_train_timesteps"},
    "UNet2DConditionModel": _COMMON
    | {
        "only_cross_attention", "cross_attention_dim", "transformer_layers_per_block",
        "reverse_transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads",
        "dual_cross_attention", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
        "upcast_attention", "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_act_fn",
        "timestep_post_act", "time_cond_proj_dim", "conv_in_kernel", "conv_out_kernel",
        "projection_class_embeddings_input_dim", "attention_type", "class_embeddings_concat",
        "mid_block_only_cross_attention", "cross_attention_norm", "addition_embed_type_num_heads",
    },
}  # fmt: skip

# Limits on the numbers and list lengths in a config, far above those of known networks: without them, a malformed
# config could exhaust memory or take hours.
MOST, MOST_ENTRIES = 1 << 20, 32
MOST_OF = {"layers_per_block": 32, "transformer_layers_per_block": 32, "sample_size": 4096, "downsample_padding": 2}

# Fields that diffusers' `EMAModel.save_pretrained` adds to a network's config.
EMA_FIELDS = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
}  # fmt: skip

# Attention processors of diffusers that differ in implementation only.
SAME_ATTENTION = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")

# Attributes that may differ from a new network's without changing its output.
_FREE = {"training", "gradient_checkpointing", "processor", "forward"}


# Functions that libraries set as attributes without changing a network's output.
_CALLABLES = {"_compiled_call_impl", "_gradient_checkpointing_func", "forward"}  # `_check_forward` checks forward


def is_of_ema(config: Mapping[str, Any]) -> bool:
    """Return whether diffusers' `EMAModel` wrote this config."""
    return config.keys() >= EMA_FIELDS


def own_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a network's `config` without the internal ones of diffusers and those of its `EMAModel`."""
    others = EMA_FIELDS if is_of_ema(config) else ()
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in others}


def check_config(name: Any, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the class `name` and every field of its `config` are supported."""
    if name is None:
        raise ValueError(f"its config has no _class_name, which must be {' or '.join(CLASSES)}")
    if name not in CLASSES:
        raise ValueError(f"a {name} is not supported, only {' and '.join(CLASSES)}")
    defaults = {key: p.default for key, p in inspect.signature(CLASSES[name].__init__).parameters.items()}
    for key, value in own_fields(config).items():
        if key not in FIELDS[name] and not (key in defaults and value == defaults[key]):
            raise ValueError(f"{name} has {key} = {value}, which is not known here")
        _check_size(key, value)


def _check_size(key: str, value: Any) -> None:
    """Raise ValueError if a number or the length of a list is above its limit."""
    if isinstance(value, list | tuple):
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{key} has {len(value)} entries, more than {MOST_ENTRIES}")
        for part in value:
            _check_size(key, part)
    elif isinstance(value, int | float) and not abs(value) <= (most := MOST_OF.get(key, MOST)):
        raise ValueError(f"{key} = {value} is beyond {most:,}, the most that is understood")


def make(name: str, config: Mapping[str, Any]) -> Any:
    """Return a new network of class `name`; raise ValueError if its config is not supported."""
    check_config(name, config)
    return CLASSES[name].from_config(own_fields(config))


@torch.no_grad()
def check_forward(model: Any) -> None:
    """Run a UNet2DModel, or a student of one, on a small image, to find configs that construct but fail in forward.

    Exceptions of diffusers and torch are passed on.
    """
    config = model.config
    if isinstance(getattr(model, "unet", model), UNet2DConditionModel) or config.class_embed_type == "identity":
        return  # these need further inputs
    side = 2 ** (len(config.down_block_types) + 1)
    x = torch.zeros(1, config.in_channels, side, side, device=model.device)
    t = torch.ones(1, dtype=torch.long, device=model.device)
    has_classes = config.class_embed_type is not None or config.num_class_embeds is not None
    answer = model(x, t, *([t * 0] if has_classes else [])).sample
    if answer.shape[2:] != x.shape[2:]:
        raise ValueError(f"images of {tuple(x.shape[2:])} come out as {tuple(answer.shape[2:])}")


def check_structure(unet: nn.Module) -> None:
    """Raise ValueError naming the first part of `unet` that differs from what its class creates from its config."""
    kind: Any = type(unet)
    if kind not in CLASSES.values():
        raise ValueError(f"a {kind.__name__} is not supported, only {' and '.join(CLASSES)} themselves")
    config: Any = unet.config
    with torch.device("meta"):
        twin = make(kind.__name__, config)
    for name, parameter in unet.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: it is on the meta device, without values (accelerate's offload puts it there)")
        if not parameter.detach().isfinite().all():
            raise ValueError(f"{name}: it contains a value that is not finite")
    ours, theirs = dict(unet.named_modules()), dict(twin.named_modules())
    for name in sorted(ours.keys() | theirs.keys()):
        place = name or kind.__name__
        if name not in theirs:
            raise ValueError(
                f"{place}: {_kind(ours[name])} is there that {kind.__name__} does not make from its config"
            )
        if name not in ours:
            raise ValueError(f"{place}: {_kind(theirs[name])} of {kind.__name__} is missing")
        _compare(place, ours[name], theirs[name])


def _kind(module: nn.Module) -> str:
    return f"a {type(module).__name__}"


def _compare(place: str, ours: nn.Module, theirs: nn.Module) -> None:
    if type(ours) is not type(theirs):
        raise ValueError(f"{place}: {_kind(ours)} is there, its class makes {_kind(theirs)} from its config")
    _check_forward(place, ours)
    for name, value in vars(ours).items():
        if callable(value) and name not in vars(theirs) and name not in _CALLABLES:
            raise ValueError(f"{place}: its {name} was replaced")
    _refuse_hooks(place, ours)
    tensors = [
        {name: x.shape for name, x in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]}
        for m in (ours, theirs)
    ]
    if tensors[0] != tensors[1]:
        raise ValueError(f"{place}: its tensors are {_shapes(tensors[0])}, its config asks for {_shapes(tensors[1])}")
    processor = getattr(ours, "processor", None)
    if processor is not None and not _same_attention(processor, theirs):
        raise ValueError(f"{place}: the attention processor {type(processor).__name__} is not supported")
    options = [{key: _plain(value) for key, value in vars(m).items()} for m in (ours, theirs)]
    for key in sorted(options[0].keys() | options[1].keys()):
        if key.startswith("_") or key in _FREE:
            continue
        then, now = (values.get(key) for values in options)
        if then != now:
            raise ValueError(f"{place}: {key} is {then}, its config asks for {now}")


def refuse_hooks(model: nn.Module) -> None:
    """Raise ValueError naming the first part of `model` with hooks or parametrizations, which a student would lose."""
    for name, module in model.named_modules():
        _refuse_hooks(name or type(model).__name__, module)


def _refuse_hooks(place: str, module: nn.Module) -> None:
    hooks = [key for key, value in vars(module).items() if key.endswith("_hooks") and value and "state_dict" not in key]
    if hooks:
        raise ValueError(f"{place}: it has hooks ({hooks[0].strip('_')}), which a student would not keep")
    if is_parametrized(module):
        raise ValueError(f"{place}: it has parametrizations; torch.nn.utils.parametrize can remove them")


def _check_forward(place: str, module: nn.Module) -> None:
    """Raise ValueError if the forward of `module` is not that of its class."""
    own: Any = type(module).forward
    forward = vars(module).get("forward")
    if forward is None or (getattr(forward, "__self__", None) is module and forward.__func__ in _unwrapped(own)):
        return
    wrapped_by = ""
    if "_original_forward" in vars(module):
        wrapped_by = " by accelerate: take accelerator.unwrap_model(unet, keep_fp32_wrapper=False)"
    elif "_hf_hook" in vars(module):
        wrapped_by = " by a hook of accelerate: accelerate.hooks.remove_hook_from_submodules(unet) takes it off"
    raise ValueError(f"{place}: its forward was replaced{wrapped_by}")


def _unwrapped(function: Any) -> list[Any]:
    """Return `function` and the functions that its decorators wrap."""
    functions = [function]
    while (function := getattr(function, "__wrapped__", None)) is not None:
        functions.append(function)
    return functions


def _same_attention(processor: Any, theirs: Any) -> bool:
    same = [getattr(attention_processor, name, None) for name in SAME_ATTENTION]
    return type(processor) in (*same, type(theirs.processor))


def _shapes(tensors: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in tensors.items()) or "none"


def _plain(value: Any) -> Any:
    """Return an attribute's value in a form that can be compared: functions by name, other objects by class."""
    if isinstance(value, bool | int | float | str | None | torch.dtype):
        return value
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return getattr(value, "__qualname__", type(value).__name__)
