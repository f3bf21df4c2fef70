"""UNets of diffusers in few channels with random weights: the rows of docs/structures.md, and some combinations."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

PLAIN = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
ATTENTION = ("AttnDownBlock2D",) * 2, ("AttnUpBlock2D",) * 2
RESNET = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
BOTH = ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
NO_ATTENTION = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
K = ("KDownBlock2D",) * 2, ("KUpBlock2D",) * 2
# Blocks of NCSN++ choose their groups by themselves, and want 32 channels.
SKIP = ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D")
SOME_SKIP = (
    ("SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"), ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
)  # fmt: skip
BUTTERFLIES = (
    ("DownBlock2D",) * 2 + ("AttnDownBlock2D",) * 2, ("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
)  # fmt: skip
CIFAR = (
    ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
CELEBA = (
    ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
)
CROSS = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
FOUR = {"sample_size": (8, 16), "block_out_channels": (8, 8, 16, 16), "layers_per_block": 2}
GOOGLE = {
    **FOUR, "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "norm_eps": 1e-6,
}  # fmt: skip
TEXT = {"cross_attention_dim": 12, "attention_head_dim": 4, "in_channels": 4, "out_channels": 4}

# What stands in the table → its blocks, and the options that differ from `make`'s.
STRUCTURES = {
    "this project's teacher": (PLAIN, {"sample_size": 8, "in_channels": 1, "out_channels": 1}),
    "Diffusion Course, unit 1 (butterflies)": (BUTTERFLIES, FOUR),
    "Diffusion Course, unit 2 (classes as channels)": (
        PLAIN, {"in_channels": 5, "out_channels": 1, "layers_per_block": 2},
    ),
    "google/ddpm-cifar10-32": (CIFAR, GOOGLE),
    "google/ddpm-celebahq-256": (CELEBA, GOOGLE),
    "openai/diffusers-cd_imagenet64 (consistency model)": (
        BOTH, {
            "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 10, "downsample_type": "resnet",
            "upsample_type": "resnet", "attn_norm_num_groups": 2,
        },
    ),
    "google/ncsnpp-celebahq-256 (Skip blocks, Fourier times)": (
        SKIP, {
            "block_out_channels": (32, 32), "time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5,
            "norm_eps": 1e-6,
        },
    ),
    "Fourier times": (PLAIN, {"time_embedding_type": "fourier", "flip_sin_to_cos": False}),
    "learned times": (PLAIN, {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
    "time_embedding_dim": (PLAIN, {"time_embedding_dim": 21, "num_class_embeds": 4}),
    "scale_shift": (PLAIN, {"resnet_time_scale_shift": "scale_shift"}),
    "Resnet sampling blocks": (RESNET, {}),
    "resampling in the residual blocks (downsample_type, upsample_type)": (
        ATTENTION, {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
    ),
    "K blocks": (K, {"block_out_channels": (32, 64), "layers_per_block": 2, "act_fn": "gelu"}),
    "classes (num_class_embeds)": (PLAIN, {"num_class_embeds": 5}),
    "classes as times (class_embed_type timestep)": (PLAIN, {"class_embed_type": "timestep"}),
    "classes as embeddings (class_embed_type identity)": (PLAIN, {"class_embed_type": "identity"}),
    "GELU": (PLAIN, {"act_fn": "gelu"}),
    "ReLU": (PLAIN, {"act_fn": "relu"}),
    "Mish": (RESNET, {"act_fn": "mish", "layers_per_block": 2}),
    "center_input_sample": (PLAIN, {"center_input_sample": True}),
    "mid_block_scale_factor": (PLAIN, {"mid_block_scale_factor": 1.7}),
    "no attention (add_attention)": (NO_ATTENTION, {"add_attention": False}),
    "no middle block": (PLAIN, {"mid_block_type": None, "norm_eps": 0.1}),
    "dropout": (PLAIN, {"dropout": 0.3}),
    "not square, three channels": (PLAIN, {"sample_size": [6, 10]}),
    "no sample_size": (PLAIN, {"sample_size": None}),
    "heads of three channels": (PLAIN, {"block_out_channels": (12, 24), "attention_head_dim": 3}),
    "tiny Stable Diffusion (UNet2DConditionModel)": (CROSS, TEXT),
    "the same with linear projections": (
        CROSS, {**TEXT, "use_linear_projection": True, "transformer_layers_per_block": 2},
    ),
}  # fmt: skip
# Parts that meet in a way of their own.
COMBINATIONS = {
    "odd channels": (
        PLAIN, {"block_out_channels": (9, 15), "norm_num_groups": 3, "attention_head_dim": 3, "sample_size": (6, 12)},
    ),
    "heads that leave channels out": (PLAIN, {"attention_head_dim": 5, "downsample_padding": 0}),
    "Fourier times, classes as times": (PLAIN, {"time_embedding_type": "fourier", "class_embed_type": "timestep"}),
    "learned times, classes as times": (
        PLAIN, {"time_embedding_type": "learned", "num_train_timesteps": 1000, "class_embed_type": "timestep"},
    ),
    "some Skip blocks": (
        SOME_SKIP, {
            "block_out_channels": (32, 32, 32), "resnet_time_scale_shift": "scale_shift", "layers_per_block": 2,
        },
    ),
    "Skip blocks up alone": ((NO_ATTENTION[0], SKIP[1]), {"block_out_channels": (32, 32), "center_input_sample": True}),
}  # fmt: skip


def make(name):
    """The network of an entry; also what a new network leaves at zero or one is random."""
    torch.manual_seed(0)
    (down, up), options = (STRUCTURES | COMBINATIONS)[name]
    kind = UNet2DConditionModel if options.get("cross_attention_dim") else UNet2DModel
    defaults = {
        "sample_size": (8, 12), "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
    }  # fmt: skip
    unet = kind(**{**defaults, "down_block_types": down, "up_block_types": up, **options}).eval()
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    for module in unet.modules():
        if type(module).__name__.endswith("Norm"):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                nn.init.normal_(parameter, mean=float(parameter_name == "weight"), std=0.3)
    return unet


def size_of(unet):
    """Height and width of its images."""
    size = unet.config.sample_size or (8, 12)
    return (size, size) if isinstance(size, int) else tuple(size)


def conditions_of(unet, count):
    """What the network asks for beside states and times, with a row for each of `count` states; classes are 1 and 2."""
    config, conditions = unet.config, {}
    if isinstance(unet, UNet2DConditionModel):
        conditions["encoder_hidden_states"] = torch.randn(count, 7, config.cross_attention_dim)
    if config.class_embed_type == "identity":
        conditions["class_labels"] = torch.randn(count, unet.time_embedding.linear_2.out_features)
    elif unet.class_embedding is not None:
        conditions["class_labels"] = torch.arange(count) % 2 + 1
    return conditions
