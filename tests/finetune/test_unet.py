"""One call makes a student of one's own UNet."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from ddpm_mnist.sampling.solver import SamplerConfig
from eval.models import load_model
from finetune.config import RunConfig
from finetune.distill import DistillConfig
from finetune.make import distill_student
from finetune.unet import distill_unet
from quant import QuantConfig

SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def config(**fields):
    distill = DistillConfig(num_updates=2, batch_size=2)
    sampler, student = SamplerConfig(num_steps=3), QuantConfig(rank=2)
    return RunConfig(
        num_trajectories=6, calibration_trajectories=4, distill=distill, sampler=sampler, student=student, **fields
    )


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    return UNet2DModel(in_channels=1, out_channels=1, num_class_embeds=3, **SMALL, **blocks).eval()


def test_it_makes_the_student_of_the_command(unet, tmp_path):
    scheduler = DDIMScheduler()
    unet.save_pretrained(tmp_path / "teacher" / "unet")
    scheduler.save_pretrained(tmp_path / "teacher" / "scheduler")
    called = distill_unet(unet, scheduler, 4, 4, config=config())
    distill_student(config(output=tmp_path / "run", teacher=str(tmp_path / "teacher")))
    made = load_model(str(tmp_path / "run")).denoiser
    assert made.state_dict().keys() == called.state_dict().keys()
    assert all(torch.equal(made.state_dict()[name], x) for name, x in called.state_dict().items())


def test_an_output_is_a_folder_for_the_commands_and_goes_on(unet, tmp_path):
    made = distill_unet(unet, DDIMScheduler(), 2, 4, config=config(), output=tmp_path / "student")
    model = load_model(str(tmp_path / "student"))
    assert model.bits == "W2A4" and model.schedule.num_train_timesteps == 1000
    again = distill_unet(unet, DDIMScheduler(), 2, 4, config=config(), output=tmp_path / "student")
    assert all(torch.equal(again.state_dict()[name], x) for name, x in made.state_dict().items())
    with pytest.raises(ValueError, match=r"was begun with student.weight_bits = 2, now it is 4"):
        distill_unet(unet, DDIMScheduler(), 4, 4, config=config(), output=tmp_path / "student")


def test_text_and_given_states():
    torch.manual_seed(0)
    attention = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    unet = UNet2DConditionModel(cross_attention_dim=6, attention_head_dim=4, **SMALL, **attention)
    text = torch.randn(2, 3, 6)
    student = distill_unet(unet, DDIMScheduler(), config=config(), encoder_hidden_states=text)
    x = torch.randn(2, 4, 8, 8)
    first, second = (student(x, 666, encoder_hidden_states=prompts).sample for prompts in (text, text.flip(0)))
    assert first.shape == x.shape and not torch.equal(first, second)
    states = {0.5: torch.randn(3, 4, 8, 8), 7.25: torch.randn(3, 4, 8, 8)}
    student = distill_unet(unet, DDIMScheduler(), config=config(), states=states, encoder_hidden_states=text[[0, 1, 0]])
    assert student.clock.timesteps == [0.5, 7.25]
    with pytest.raises(ValueError, match="each condition M rows"):
        distill_unet(unet, DDIMScheduler(), config=config(), states=states, encoder_hidden_states=text)
