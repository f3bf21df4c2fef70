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
    distill = DistillConfig(num_updates=2, batch_size=2, rollout_steps=2)
    sampler, student = SamplerConfig(num_steps=2), QuantConfig(rank=2, search="min-max")
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


@pytest.fixture
def conditioned():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D"] * 2}
    return UNet2DConditionModel(cross_attention_dim=6, attention_head_dim=4, mid_block_type=None, **SMALL, **blocks)


@pytest.mark.filterwarnings("ignore:.*UNet2DConditionModel is not supported on integers")
def test_a_student_of_a_network_with_text_follows_the_text(conditioned):
    text = torch.randn(2, 3, 6)
    student = distill_unet(conditioned, DDIMScheduler(), config=config(), encoder_hidden_states=text)
    x = torch.randn(2, 4, 8, 8)
    first, second = (student(x, 666, encoder_hidden_states=prompts).sample for prompts in (text, text.flip(0)))
    assert first.shape == x.shape and not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*UNet2DConditionModel is not supported on integers")
def test_states_may_be_given_and_conditions_need_a_row_for_each(conditioned):
    text, states = torch.randn(3, 3, 6), {0.5: torch.randn(3, 4, 8, 8), 7.25: torch.randn(3, 4, 8, 8)}
    options = {"config": config(), "states": states}
    student = distill_unet(conditioned, DDIMScheduler(), **options, encoder_hidden_states=text)
    assert student.clock.timesteps == [0.5, 7.25]
    with pytest.raises(ValueError, match="each condition M rows"):
        distill_unet(conditioned, DDIMScheduler(), **options, encoder_hidden_states=text[:2])
