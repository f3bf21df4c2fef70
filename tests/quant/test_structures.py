"""What diffusers' UNets can be, each through the whole path; docs/structures.md is the table that comes out.

`EFFICIENTDM_WRITE_DOCS=1 pytest tests/quant/test_structures.py` tries all of it and writes the table anew, in some ten
minutes; without that, ONNX, whose export takes most of the time, is tried for those of `EXPORTED`.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from finetune.distill import DistillConfig, parameter_groups
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize, to_integer
from quant.export import export_onnx

DOCS = Path(__file__).parents[2] / "docs" / "structures.md"
PLAIN = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
DOWN, UP = "DownBlock2D", "UpBlock2D"
ATTN_DOWN, ATTN_UP = "AttnDownBlock2D", "AttnUpBlock2D"


def two(down=(DOWN, ATTN_DOWN), up=(ATTN_UP, UP), **options):
    blocks = {"down_block_types": down, "up_block_types": up}
    return UNet2DModel(**{"sample_size": 16, "in_channels": 1, "out_channels": 1, **PLAIN, **blocks, **options})


def four(down, up, **options):
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (16, 16, 32, 32)}
    return UNet2DModel(**{**PLAIN, "sample_size": 16, **blocks, **options})


# What stands in the table → the network. Channels are scaled down, weights random.
STRUCTURES = {
    "this project's teacher": lambda: two(sample_size=28),
    "Diffusion Course, unit 1 (butterflies)": lambda: four(
        (DOWN, DOWN, ATTN_DOWN, ATTN_DOWN), (ATTN_UP, ATTN_UP, UP, UP), layers_per_block=2
    ),
    "Diffusion Course, unit 2 (classes as channels)": lambda: two(in_channels=5, layers_per_block=2),
    "google/ddpm-cifar10-32": lambda: four(
        (DOWN, ATTN_DOWN, DOWN, DOWN), (UP, UP, ATTN_UP, UP), layers_per_block=2, attention_head_dim=None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    ),
    "google/ddpm-celebahq-256": lambda: four(
        (DOWN, DOWN, ATTN_DOWN, DOWN), (UP, ATTN_UP, UP, UP), layers_per_block=2, attention_head_dim=None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    ),
    "openai/diffusers-cd_imagenet64 (consistency model)": lambda: two(
        down=("ResnetDownsampleBlock2D", ATTN_DOWN), up=(ATTN_UP, "ResnetUpsampleBlock2D"), in_channels=3,
        out_channels=3, resnet_time_scale_shift="scale_shift", num_class_embeds=10, downsample_type="resnet",
        upsample_type="resnet", attn_norm_num_groups=8,
    ),
    "google/ncsnpp-celebahq-256 (Skip blocks, Fourier times)": lambda: two(
        ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D"), in_channels=3,
        out_channels=3, block_out_channels=(32, 64), time_embedding_type="fourier", mid_block_scale_factor=2**0.5,
        norm_eps=1e-6,
    ),
    "Fourier times": lambda: two(time_embedding_type="fourier"),
    "learned times": lambda: two(time_embedding_type="learned", num_train_timesteps=1000),
    "time_embedding_dim": lambda: two(time_embedding_dim=48),
    "scale_shift": lambda: two(resnet_time_scale_shift="scale_shift"),
    "Resnet sampling blocks": lambda: two(("ResnetDownsampleBlock2D", ATTN_DOWN), (ATTN_UP, "ResnetUpsampleBlock2D")),
    "resampling in the residual blocks (downsample_type, upsample_type)": lambda: two(
        (ATTN_DOWN, DOWN), (UP, ATTN_UP), downsample_type="resnet", upsample_type="resnet"
    ),
    "K blocks": lambda: two(("KDownBlock2D",) * 2, ("KUpBlock2D",) * 2, block_out_channels=(32, 64)),
    "classes (num_class_embeds)": lambda: two(num_class_embeds=5),
    "classes as times (class_embed_type timestep)": lambda: two(class_embed_type="timestep"),
    "classes as embeddings (class_embed_type identity)": lambda: two(class_embed_type="identity"),
    "GELU": lambda: two(act_fn="gelu"),
    "ReLU": lambda: two(act_fn="relu"),
    "Mish": lambda: two(act_fn="mish"),
    "center_input_sample": lambda: two(center_input_sample=True),
    "mid_block_scale_factor": lambda: two(mid_block_scale_factor=1.7),
    "no attention (add_attention)": lambda: two((DOWN, DOWN), (UP, UP), add_attention=False),
    "no middle block": lambda: two(mid_block_type=None),
    "dropout": lambda: two(dropout=0.3),
    "not square, three channels": lambda: two(sample_size=[12, 20], in_channels=3, out_channels=3),
    "no sample_size": lambda: two(sample_size=None),
    "heads of three channels": lambda: two(block_out_channels=(24, 48), attention_head_dim=3),
    "tiny Stable Diffusion (UNet2DConditionModel)": lambda: UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", DOWN),
        up_block_types=(UP, "CrossAttnUpBlock2D"),
    ),
    "the same with linear projections": lambda: UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", DOWN), use_linear_projection=True,
        up_block_types=(UP, "CrossAttnUpBlock2D"), transformer_layers_per_block=2,
    ),
}  # fmt: skip

EXPORTED = (
    "openai/diffusers-cd_imagenet64 (consistency model)",
    "google/ncsnpp-celebahq-256 (Skip blocks, Fourier times)",
    "tiny Stable Diffusion (UNet2DConditionModel)",
)
WRITES = bool(os.environ.get("EFFICIENTDM_WRITE_DOCS"))
BITS = QuantConfig(weight_bits=4, act_bits=8, rank=2)


def given(unet):
    """Timesteps, states at each, and what else the network asks for."""
    config, count = unet.config, 4
    size = config.sample_size or 8
    height, width = (size, size) if isinstance(size, int) else size
    fourier = config.time_embedding_type == "fourier"
    timesteps = [80.0, 20.5, 3.25, 0.7] if fourier else [999, 600, 300, 30]
    states = {t: torch.randn(count, config.in_channels, height, width) for t in timesteps}
    conditions = {}
    if isinstance(unet, UNet2DConditionModel):
        conditions["encoder_hidden_states"] = torch.randn(count, 7, config.cross_attention_dim)
    if config.num_class_embeds or config.class_embed_type == "timestep":
        conditions["class_labels"] = torch.arange(count)
    elif config.class_embed_type == "identity":
        conditions["class_labels"] = torch.randn(count, unet.time_embedding.linear_2.out_features)
    return timesteps, states, conditions


def rms(x):
    return x.square().mean().sqrt().item()


def path(unet, folder, exported):
    """What becomes of `unet` on integers and, if it is `exported`, in ONNX: "yes", or what it was refused with."""
    timesteps, states, conditions = given(unet)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student = quantize(unet, BITS, timesteps)
        said = [str(w.message) for w in caught if "but:" in str(w.message)]
    calibrate(student, states, **conditions)
    groups = parameter_groups(student, DistillConfig())
    learned = {parameter for group in groups for parameter in group["params"]}
    norms = [module for module in student.modules() if type(module).__name__.endswith("Norm")]
    assert learned.issuperset(parameter for norm in norms for parameter in norm.parameters(recurse=False))
    optimizer = torch.optim.Adam([{**group, "lr": group["peak_lr"]} for group in groups])
    before = student.unet.conv_in.lora_b.clone()
    x, t = torch.cat(list(states.values())), torch.tensor(timesteps).repeat_interleave(4)
    rows = {name: torch.cat([values] * len(timesteps)) for name, values in conditions.items()}
    with torch.no_grad():
        target = unet(x, t, **rows).sample
    (student(x, t, **rows).sample - target).square().mean().backward()
    optimizer.step()
    assert not torch.equal(student.unet.conv_in.lora_b, before)
    frozen = freeze(student)
    frozen.save_pretrained(folder)
    loaded = QuantizedUNet.from_pretrained(folder)
    with torch.no_grad():
        simulated = frozen(x, t, **rows).sample
        assert torch.equal(loaded(x, t, **rows).sample, simulated)
    error = rms(simulated - target)
    assert 0 < error < 0.3 * rms(target)

    try:
        integer = to_integer(loaded)
    except ValueError as refusal:
        integers = str(refusal)
        assert said == [f"this student can be simulated and exported, but: {refusal}"]
    else:
        assert not said
        assert rms(integer(x, t, **rows).sample - simulated) < 0.5 * error
        integers = "yes"

    if not exported:
        return (integers,)
    try:
        export_onnx(loaded, folder / "model.onnx")
    except ValueError as refusal:
        return integers, str(refusal)
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        kinds = {entry.name: types[entry.type] for entry in session.get_inputs()}
        for number, (step, x_t) in enumerate(states.items()):
            inputs = {"sample": x_t, "timestep": torch.tensor(step), **conditions}
            (ours,) = session.run(None, {name: np.asarray(inputs[name], kind) for name, kind in kinds.items()})
            part = simulated[4 * number : 4 * number + 4]
            assert rms(torch.from_numpy(ours) - part) < 0.5 * rms(part - target[4 * number : 4 * number + 4])
    return integers, "yes"


def table():
    """The rows of docs/structures.md that stand there."""
    lines = DOCS.read_text().splitlines() if DOCS.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def written():
    rows = {}
    yield rows
    if WRITES:
        head, *_ = DOCS.read_text().partition("| structure |")
        lines = ["| structure | simulated | integers | ONNX |", "|---|---|---|---|"]
        lines += [f"| {name} | yes | {' | '.join(cells)} |" for name, cells in rows.items()]
        DOCS.write_text(head + "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_does_what_the_table_says(name, tmp_path, written):
    torch.manual_seed(0)
    unet = STRUCTURES[name]().eval()
    for module in unet.modules():  # a new network ends in zeros here and there
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    written[name] = path(unet, tmp_path, WRITES or name in EXPORTED)
    if not WRITES:
        assert ["yes", *written[name]] == table()[name][: 1 + len(written[name])]


def test_the_table_has_no_other_rows():
    assert table().keys() == {"structure", *STRUCTURES}
