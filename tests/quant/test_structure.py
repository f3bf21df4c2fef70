"""What a student would lose without a word is refused by name: whatever the network's class does not make itself."""

import copy
import inspect
import json

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.training_utils import EMAModel
from torch import nn

from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize
from quant.structure import CLASSES, EMA_FIELDS, FIELDS, check_config, check_structure


class Scaled(UNet2DModel):
    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return super().forward(sample / 3, timestep, class_labels, return_dict)


class OtherProcessor(AttnProcessor):
    pass


def put(path, value):
    """Exchange a part, or an attribute of one, by hand."""

    def change(unet):
        *parts, name = path.split(".")
        for part in parts:
            unet = unet[int(part)] if part.isdigit() else getattr(unet, part)
        setattr(unet, name, value)

    return change


def prepared(unet, **options):
    """What a training with accelerate's mixed precision hands back."""
    AcceleratorState._reset_state()  # the process has one, which the tests of trainings have set otherwise
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        return accelerator.unwrap_model(accelerator.prepare(unet), **options)
    finally:
        AcceleratorState._reset_state()


def each_attention(unet, action):
    for module in unet.modules():
        if isinstance(module, Attention):
            action(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda unet: Scaled.from_config(unet.config), "a Scaled is not supported, only UNet2DModel"),
        (torch.compile, "a OptimizedModule is not supported"),
        (nn.DataParallel, "a DataParallel is not supported"),
        (put("forward", lambda *_: None), "UNet2DModel: its forward was replaced$"),
        (prepared, r"its forward was replaced by accelerate: take .*unwrap_model\(unet, keep_fp32_wrapper=False\)"),
        (cpu_offload, r"conv_in\.weight: it is on the meta device, without values"),
        (put("conv_in._conv_forward", lambda *_: None), "conv_in: its _conv_forward was replaced"),
        (put("conv_norm_out", nn.Identity()), "conv_norm_out: a Identity is there, its class makes a GroupNorm"),
        (put("conv_act", nn.ReLU()), "conv_act: a ReLU is there, its class makes a SiLU"),
        (put("conv_out", nn.Sequential(nn.Conv2d(8, 1, 3, padding=1))), "conv_out: a Sequential is there"),
        (put("down_blocks.0.resnets.0.nonlinearity", nn.GELU()), r"down_blocks\.0\.resnets\.0\.nonlinearity: a GELU"),
        (put("mid_block", None), "mid_block: a UNetMidBlock2D of UNet2DModel is missing"),
        (put("mid_block", nn.Identity()), "mid_block: a Identity is there"),
        (put("conv_in", nn.Conv2d(1, 8, 5, padding=2)), "conv_in: its tensors are weight 8×1×5×5, bias 8, its config"),
        (put("conv_in", nn.Conv2d(1, 8, 3, padding=1, bias=False)), "conv_in: its tensors are weight 8×1×3×3, its"),
        (put("conv_in", nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular")), "conv_in: padding_mode is circular"),
        (put("conv_in.stride", (2, 2)), r"conv_in: stride is \[2, 2\]"),
        (put("time_proj.scale", 2.0), "time_proj: scale is 2.0"),
        (put("conv_norm_out.eps", 0.1), "conv_norm_out: eps is 0.1"),
        (put("down_blocks.0.resnets.0.output_scale_factor", 2.0), "output_scale_factor is 2.0"),
        (put("extra", nn.Linear(3, 3)), "extra: a Linear is there that UNet2DModel does not make from its config"),
        (lambda unet: unet.conv_in.register_forward_hook(lambda *_: None) and None, "conv_in: it has hooks"),
        (lambda unet: unet.register_forward_pre_hook(lambda *_: None) and None, "UNet2DModel: it has hooks"),
        (lambda unet: nn.utils.parametrizations.weight_norm(unet.conv_in) and None, "conv_in: a ParametrizedConv2d"),
        (lambda unet: each_attention(unet, Attention.fuse_projections), r"attentions\.0: fused_projections is True"),
        (
            lambda unet: each_attention(unet, lambda attention: attention.set_processor(OtherProcessor())),
            "the attention processor OtherProcessor is not supported",
        ),
        (
            lambda unet: unet.register_to_config(new_norm="rms"),
            "UNet2DModel has new_norm = rms, which is not known here",
        ),
        (lambda unet: quantize(unet, QuantConfig(rank=2), [3]).unet, "conv_in: a QuantConv2d is there"),
        (lambda unet: quantize(unet, QuantConfig(rank=2), [3]), "a QuantizedUNet is not supported"),
        (lambda unet: nn.Sequential(nn.Conv2d(1, 1, 3)), "a Sequential is not supported"),
    ],
)
def test_what_the_class_does_not_make_is_refused_by_name(unet, change, message):
    changed = copy.deepcopy(unet)
    result = change(changed)
    changed = result if isinstance(result, nn.Module) else changed
    with pytest.raises(ValueError, match=message):
        quantize(changed, QuantConfig(rank=2), [999, 499])


@pytest.mark.parametrize(
    "change",
    [
        UNet2DModel.half,
        UNet2DModel.train,
        UNet2DModel.enable_gradient_checkpointing,
        lambda unet: unet.to(memory_format=torch.channels_last),
        lambda unet: unet.requires_grad_(True),
        lambda unet: each_attention(unet, lambda attention: attention.set_processor(AttnProcessor())),
    ],
)
def test_what_changes_nothing_that_is_computed_is_taken(unet, change):
    change(unet)
    check_structure(unet)


def test_the_network_that_accelerate_unwraps_is_taken(unet):
    unwrapped = prepared(copy.deepcopy(unet), keep_fp32_wrapper=False)
    torch.manual_seed(0)
    ours = quantize(unwrapped, QuantConfig(rank=2), [999, 499])
    torch.manual_seed(0)
    expected = quantize(unet, QuantConfig(rank=2), [999, 499])
    assert "forward" not in vars(ours.unet)
    assert all(map(torch.equal, ours.state_dict().values(), expected.state_dict().values()))


def test_an_average_of_diffusers_is_taken_and_its_fields_are_left_out(unet, tmp_path):
    EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config).save_pretrained(tmp_path)
    average = UNet2DModel.from_pretrained(tmp_path)
    assert average.config["decay"] == 0.9999
    check_config("UNet2DModel", average.config)
    student = quantize(average, QuantConfig(rank=2), [999, 499])
    calibrate(student, {t: torch.randn(2, 1, 10, 10) for t in (999, 499)})
    freeze(student).save_pretrained(tmp_path / "student")
    assert not EMA_FIELDS & json.loads((tmp_path / "student" / "config.json").read_text())["unet"].keys()
    with pytest.raises(ValueError, match=r"UNet2DModel has decay = .*, which is not known here"):
        check_config("UNet2DModel", {"decay": 0.9})


def test_the_fields_of_the_installed_diffusers_are_known():
    for name, kind in CLASSES.items():
        assert set(inspect.signature(kind.__init__).parameters) - {"self"} == FIELDS[name]


def test_a_field_of_tomorrow_is_refused_where_a_student_is_loaded(student, tmp_path, monkeypatch):
    frozen = freeze(student)
    frozen.unet.register_to_config(new_norm="rms")
    frozen.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="new_norm = rms, which is not known here"):
        QuantizedUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("downsample_padding", 3, "2"),
        ("layers_per_block", 33, "32"),
        ("sample_size", [28, 5000], "4,096"),
        ("norm_num_groups", 10**12, "1,048,576"),
        ("norm_eps", float("nan"), "1,048,576"),
    ],
)
def test_a_config_that_would_take_hours_is_refused(key, value, most):
    check_config("UNet2DModel", {"downsample_padding": 2, "layers_per_block": 32})
    with pytest.raises(ValueError, match=f"{key} = .* is beyond {most}, the most that is understood"):
        check_config("UNet2DModel", {key: value})


def test_a_list_has_few_entries():
    with pytest.raises(ValueError, match="down_block_types has 33 entries, more than 32"):
        check_config("UNet2DModel", {"down_block_types": ["DownBlock2D"] * 33})
