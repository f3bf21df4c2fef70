"""Models of other schedules, sizes, channels and classes, from the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from ddpm_mnist.lab.command import run_command
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.sampler import LARGEST_TIME, choose_conditions, denoise
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.export import ExportConfig, export
from eval.fid import FidConfig, print_fid
from eval.grid import GridConfig, draw_models
from eval.models import load_model
from eval.sample import SampleConfig, write_samples
from finetune.config import RunConfig
from finetune.make import distill_student
from finetune.run import run
from quant import calibrate
from quant.integer.model import MAX_NUMBER

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def make_folder(folder, scheduler=None, **options):
    torch.manual_seed(0)
    options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, **SMALL, **BLOCKS, **options}
    DDPMPipeline(UNet2DModel(**options), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def draw(folder, tmp_path, *arguments):
    words = ["--model", str(folder), "--num-images", "4", "--output", str(tmp_path / "o.npy"), *arguments]
    run_command("prog", write_samples, SampleConfig, words)
    return np.load(tmp_path / "o.npy")


def refusal(capsys, function, config, *arguments):
    with pytest.raises(SystemExit) as caught:
        run_command("prog", function, config, list(arguments))
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        DDPMScheduler(num_train_timesteps=200, prediction_type="sample"),
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
    ],
)
def test_a_folder_is_sampled_as_its_own_pipeline_does(scheduler, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", scheduler)
    ours = draw(folder, tmp_path, "--solver", "ddim", "--num_steps", "10", "--seed", "3")
    noise = draw_noise(image_generators(range(3, 7)), (1, 8, 8))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise)
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, num_inference_steps=10, use_clipped_model_output=True, output_type="np").images[..., 0]
    assert np.abs(ours.astype(int) - (theirs * 255).round()).max() <= 1


@pytest.mark.parametrize(
    ("options", "scheduler", "shape"),
    [
        (
            {"sample_size": [8, 12], "in_channels": 3, "out_channels": 3},
            DDPMScheduler(prediction_type="v_prediction"),
            (8, 12, 3),
        ),
        ({"sample_size": 28, "num_class_embeds": 4}, DDPMScheduler(beta_schedule="scaled_linear"), (28, 28)),
    ],
)
def test_the_whole_of_it_for_another_model(options, scheduler, shape, tmp_path, capsys):
    teacher, student = make_folder(tmp_path / "teacher", scheduler, **options), tmp_path / "student"
    small = {
        "num_trajectories": 4, "calibration_trajectories": 4, "distill.num_updates": 1, "distill.batch_size": 3,
        "num_images": 12, "sampler.num_steps": 3, "distill.rollout_steps": 2, "student.rank": 2,
        "student.weight_bits": 8, "student.act_bits": 8, "student.search": "min-max",
    }  # fmt: skip
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    run_command("prog", run, RunConfig, ["--teacher", str(teacher), "--output", str(student), *words])
    scores = json.loads((student / "metrics.json").read_text())
    assert scores[2]["mse_to_teacher"] < 0.01
    assert (scores[2]["fid"] is None) == (shape != (28, 28))
    assert (student / "report.html").stat().st_size > 10_000
    images, of_teacher = (draw(folder, tmp_path, "--num_steps", "3") for folder in (student, teacher))
    assert images.shape == (4, *shape)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - of_teacher).mean() < 10
    assert load_model(str(student)).schedule.prediction_type == load_model(str(teacher)).schedule.prediction_type
    grid = ["--models", str(teacher), str(student), "--columns", "3", "--num_steps", "3"]
    run_command("prog", draw_models, GridConfig, [*grid, "--output", str(tmp_path / "grid.png")])
    fid = ["--model", str(student), "--teacher", str(teacher), "--num-images", "4", "--num_steps", "3"]
    run_command("prog", print_fid, FidConfig, [*fid, "--output", str(tmp_path / "fid.json")])
    assert json.loads((tmp_path / "fid.json").read_text())["features"] == (
        "none" if shape != (28, 28) else scores[0]["features"]
    )
    words = ["--model", str(student), "--format", "packed", "--output", str(tmp_path / "packed")]
    run_command("prog", export, ExportConfig, words)
    assert refusal(capsys, print_fid, FidConfig, "--model", str(student), "--num-images", "4", "--labels", "[77]")


def test_classes_and_guidance(tmp_path, capsys):
    folder = make_folder(tmp_path / "model", num_class_embeds=4)
    denoiser = load_model(str(folder)).denoiser
    assert choose_conditions(denoiser, SamplerConfig(), range(6))["class_labels"].tolist() == [0, 1, 2, 3, 0, 1]
    without_null = choose_conditions(denoiser, SamplerConfig(null_class=3), range(2, 6))
    assert without_null["class_labels"].tolist() == [2, 0, 1, 2]
    threes = draw(folder, tmp_path, "--num_steps", "3", "--labels", "[3]")
    all_four = draw(folder, tmp_path, "--num_steps", "3")
    assert np.abs(threes[3].astype(int) - all_four[3]).max() <= 1
    assert (threes[0] != all_four[0]).any()

    config = SamplerConfig("dpm++", 3, labels=(1,), guidance_scale=3.0, null_class=0)
    x, t, (one, null) = torch.randn(2, 1, 8, 8), torch.tensor([666, 666]), torch.tensor([[1, 1], [0, 0]])
    with torch.no_grad():
        conditional, unconditional = (denoiser(x, t, labels).sample for labels in (one, null))
        solver = Solver(config, load_model(str(folder)).schedule)
        at = solver.timesteps.tolist()
        guided = solver.model_output(denoiser, torch.tensor([1, 1]), x, {"class_labels": one})
        conditional, unconditional = (denoiser(x, torch.full((2,), at[1]), labels).sample for labels in (one, null))
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    *_, last = denoise(denoiser, solver, range(2))
    assert last.x_next.isfinite().all()

    for words, message in (
        (["--labels", "[4]"], "it has the classes 0…3"),
        (["--null_class", "-1"], "it has the classes 0…3"),
        (["--guidance_scale", "2"], "guidance_scale needs null_class"),
    ):
        assert message in refusal(capsys, write_samples, SampleConfig, "--model", str(folder), *words)
    assert "it has no classes" in refusal(capsys, write_samples, SampleConfig, "--labels", "[1]")


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({"class_embed_type": "timestep"}, ["--labels", "[1048577]"], "(class_embed_type) 0…1048576: labels and"),
        ({"class_embed_type": "timestep"}, [], "(class_embed_type) 0…1048576: labels must name those to draw"),
        (
            {"class_embed_type": "timestep"},
            ["--labels", "[5]", "--null_class", "1048577", "--guidance_scale", "2"],
            "0…1048576: labels and null_class must lie there",
        ),
        (
            {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
            ["--labels", "[0]"],
            "it has the times as classes (class_embed_type) 1…1048576: labels and null_class must lie there",
        ),
        (
            {"class_embed_type": "timestep", "time_embedding_type": "learned", "num_train_timesteps": 1000},
            ["--labels", "[1000]"],
            "(class_embed_type) 0…999: labels and",
        ),
        ({"num_class_embeds": 1}, ["--null_class", "0"], "it has the classes 0…0: labels must name those to draw"),
    ],
)
def test_classes_that_a_network_does_not_take_are_refused(options, words, message, tmp_path, capsys):
    folder = make_folder(tmp_path / "model", **options)
    words = ["--model", str(folder), "--num_steps", "3", "--output", str(tmp_path / "x.npy"), *words]
    assert message in refusal(capsys, write_samples, SampleConfig, *words)
    assert not (tmp_path / "x.npy").exists()


def test_the_last_of_the_times_that_are_classes_is_drawn(tmp_path):
    assert LARGEST_TIME == MAX_NUMBER  # what the sampler lets through integers take
    options = {"class_embed_type": "timestep", "time_embedding_type": "learned", "num_train_timesteps": 1000}
    folder = make_folder(tmp_path / "model", **options)
    assert draw(folder, tmp_path, "--num_steps", "2", "--labels", "[999]").shape == (4, 8, 8)


def test_the_published_recipe_says_which_solver_it_needs(tmp_path, capsys):
    folder = make_folder(tmp_path / "teacher")  # where DDIM and DPM-Solver++ space their steps differently
    words = ["--teacher", str(folder), "--output", str(tmp_path / "run"), "--recipe", "published"]
    message = 'recipe "published" has DDIM\'s timesteps, which are others: take sampler.solver "ddim"'
    assert message in refusal(capsys, run, RunConfig, *words)
    assert not (tmp_path / "run").exists()


def test_guidance_is_calibrated_on_both_of_its_classes(tmp_path, monkeypatch):
    folder, seen = make_folder(tmp_path / "teacher", num_class_embeds=4), []

    def spy(student, states, class_labels):
        seen.append((next(iter(states.values())), class_labels.tolist()))
        calibrate(student, states, class_labels=class_labels)

    monkeypatch.setattr("finetune.make.calibrate", spy)
    config = RunConfig(tmp_path / "run", str(folder), num_trajectories=4, calibration_trajectories=3)
    config.distill.num_updates, config.student.rank, config.student.search = 0, 2, "min-max"
    config.sampler = SamplerConfig(num_steps=2, labels=(1, 2), null_class=0, guidance_scale=2.0)
    distill_student(config)
    (states, labels), *_ = seen
    assert labels == [1, 2, 1, 0, 0, 0]
    assert torch.equal(states[:3], states[3:])


def test_a_grid_that_cannot_be_measured_is_refused_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "model", sample_size=32)
    monkeypatch.setattr("eval.grid.draw", None)
    words = ["--models", str(folder), "--num_images", "2", "--output", str(tmp_path / "x.png")]
    message = "num_images must be 0: the ruler "
    assert message in refusal(capsys, draw_models, GridConfig, *words)


def test_a_unet_without_a_scheduler_gets_a_word(tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    with_scheduler = draw(folder, tmp_path, "--num_steps", "3")
    assert "no scheduler" not in capsys.readouterr().out
    draw(folder / "unet", tmp_path, "--num_steps", "3")
    assert "no scheduler" not in capsys.readouterr().out, "that of the pipeline around it counts"
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(SystemExit):
        draw(folder, tmp_path, "--num_steps", "3")
    assert "its pipeline names the scheduler DDPMScheduler, but has no" in capsys.readouterr().err
    (folder / "model_index.json").unlink()
    other = draw(folder, tmp_path, "--num_steps", "3")
    assert (
        "model/unet has no scheduler: DDPM's 1000 linear steps and ε are taken for granted" in capsys.readouterr().out
    )
    assert (other != with_scheduler).any(), "the spacing is the house's then"
    (folder / "unet" / "scheduler_config.json").write_text(DDPMScheduler().to_json_string())
    assert np.array_equal(draw(folder, tmp_path, "--num_steps", "3"), with_scheduler), "as older folders have it"


def test_an_average_of_diffusers_beside_its_network_is_read_with_its_scheduler(tmp_path, capsys):
    """`unet_ema` as diffusers' trainings leave it in a checkpoint."""
    folder = make_folder(tmp_path / "model", DDPMScheduler(prediction_type="v_prediction"))
    torch.manual_seed(1)
    other = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **SMALL, **BLOCKS)
    EMAModel(other.parameters(), model_cls=UNet2DModel, model_config=other.config).save_pretrained(folder / "unet_ema")
    model = load_model(str(folder / "unet_ema"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert (
        "decay, inv_gamma, min_decay, optimization_step, power, update_after_step, use_ema_warmup are ignored" in said
    )
    assert model.schedule.prediction_type == "v_prediction"
    assert all(map(torch.equal, model.denoiser.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("target", ["unet", "weights"])
def test_a_linked_network_has_the_scheduler_that_lies_beside_the_link(target, tmp_path):
    store = make_folder(tmp_path / "store")
    folder = make_folder(tmp_path / "model", DDPMScheduler(prediction_type="v_prediction"))
    (store / "unet").rename(store / target)
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(store / target)
    assert load_model(str(folder)).schedule.prediction_type == "v_prediction"
    assert load_model(str(folder / "unet")).schedule.prediction_type == "v_prediction"
    (tmp_path / "link").symlink_to(folder)
    assert load_model(str(tmp_path / "link")).schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("leave", [Path.unlink, lambda path: path.rename(path.with_name("config.json"))])
def test_a_scheduler_that_is_missing_where_it_should_be_is_not_guessed(leave, tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    (folder / "model_index.json").unlink()
    leave(folder / "scheduler" / "scheduler_config.json")
    err = refusal(capsys, write_samples, SampleConfig, "--model", str(folder))
    assert "scheduler_config.json is missing, where its scheduler should be" in err


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_codes_are_not_taken_for_weights(dtype, kind, tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "conv_in.bias": (100 * weights["conv_in.bias"]).to(dtype)}, path)
    err = refusal(capsys, write_samples, SampleConfig, "--model", str(folder))
    assert f"conv_in.bias in diffusion_pytorch_model.safetensors is of {kind}, not of floats" in err


def test_adapters_beside_a_network_are_said_to_be_ignored(tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    load_model(str(folder))
    assert "has pytorch_lora_weights.safetensors beside the network: it is ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"_class_name": None}, "its config has no _class_name, which must be UNet2DModel or"),
        ("scheduler/scheduler_config.json", {"clip_sample": "false"}, "clip_sample = 'false', which must be true or"),
        ("scheduler/scheduler_config.json", {"steps_offset": 1.5}, "steps_offset = 1.5, which is not a whole number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": True}, "num_train_timesteps must be a number from"),
        ("unet/config.json", {"new_norm": "rms"}, "UNet2DModel has new_norm = rms, which is not known here"),
        ("unet/config.json", {"_class_name": "UNet2DTomorrow"}, "a UNet2DTomorrow is not supported"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel needs text"),
        ("unet/config.json", {"sample_size": None}, "its config has no sample_size"),
        ("unet/config.json", {"sample_size": 15}, "its sample_size (15, 15) cannot be halved 1 times"),
        ("unet/config.json", {"sample_size": [16]}, "sample_size = [16], which is neither a number of pixels nor two"),
        ("unet/config.json", {"sample_size": -16}, "sample_size = -16, which is neither"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "its pipeline has a vqvae beside the network"),
        ("scheduler/scheduler_config.json", {"churn": 1}, "its scheduler has churn = 1, which is not known here"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, has no noise"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding = True, which is not supported"),
    ],
)
def test_what_a_folder_says_and_is_not_understood_is_refused(file, changes, message, tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for function, config, option in ((write_samples, SampleConfig, "--model"), (run, RunConfig, "--teacher")):
        err = refusal(capsys, function, config, option, str(folder), "--output", str(tmp_path / "out.npy"))
        assert f'model "{folder}" cannot be loaded' in err
        assert message in err
    assert not (tmp_path / "out.npy").exists()


def test_a_name_on_the_hub_is_looked_up_there(tmp_path, monkeypatch, capsys):
    folder, asked = make_folder(tmp_path / "model"), []

    def snapshot(name, allow_patterns):
        asked.append(name)
        assert all(pattern.endswith((".json", ".safetensors")) for pattern in allow_patterns), "no pickle is fetched"
        if name != "google/ddpm":
            raise OSError("no such repository\nand more")
        return str(folder)

    monkeypatch.setattr("eval.models.snapshot_download", snapshot)
    assert load_model("google/ddpm").folder == folder
    err = refusal(capsys, write_samples, SampleConfig, "--model", "google/other")
    assert 'no model "google/other", neither here nor on the Hugging Face hub (no such repository)' in err
    assert asked == ["google/ddpm", "google/other"]
    assert "no model" in refusal(capsys, write_samples, SampleConfig, "--model", "a/b/c")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("options", "scheduler", "message"),
    [
        ({"time_embedding_type": "learned", "num_train_timesteps": 100}, None, "it has learned 100 timesteps, and its"),
        (
            {"time_embedding_type": "fourier"},
            None,
            "it takes the logarithm of its timesteps, and its scheduler asks for 0",
        ),
    ],
)
def test_timesteps_that_the_network_does_not_take_are_refused(options, scheduler, message, tmp_path, capsys):
    folder = make_folder(tmp_path / "model", scheduler, **options)
    words = ["--model", str(folder), "--solver", "ddim", "--num_steps", "5"]
    assert message in refusal(capsys, write_samples, SampleConfig, *words)


def test_numbers_that_are_none_and_channels_that_are_no_picture(tmp_path, capsys):
    folder = make_folder(tmp_path / "model", in_channels=2, out_channels=2)
    words = ["--model", str(folder), "--output", str(tmp_path / "o.png")]
    assert "has images of 2 channels: a picture has 1 or 3" in refusal(capsys, write_samples, SampleConfig, *words)
    assert "a picture has 1 or 3" in refusal(capsys, draw_models, GridConfig, "--models", str(folder))
    assert draw(folder, tmp_path, "--num_steps", "2").shape == (4, 8, 8, 2)
    unet = UNet2DModel.from_pretrained(folder / "unet")
    unet.conv_out.bias.data[0] = torch.nan
    unet.save_pretrained(folder / "unet")
    assert "its weights contain a value that is not finite" in refusal(capsys, write_samples, SampleConfig, *words)


def test_half_precision_folders_are_read_and_other_formats_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    expected = draw(folder, tmp_path, "--num_steps", "2")
    unet = UNet2DModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "weights in other formats are not read" in refusal(
        capsys, write_samples, SampleConfig, "--model", str(folder)
    )
    for size in ("100GB", "20KB"):  # whole, and in several files
        shutil.rmtree(folder / "unet")
        unet.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size=size)
        assert (len(list((folder / "unet").glob("*.safetensors"))) > 1) == (size == "20KB")
        assert np.abs(draw(folder, tmp_path, "--num_steps", "2").astype(int) - expected).max() <= 2


def test_a_student_keeps_its_teachers_scheduler(tmp_path):
    scheduler = DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", steps_offset=1)
    folder = make_folder(tmp_path / "teacher", scheduler)
    words = ["--num_trajectories=2", "--calibration_trajectories=2", "--distill.num_updates=0", "--sampler.num_steps=3"]
    words += ["--distill.rollout_steps=2", "--teacher", str(folder), "--output", str(tmp_path / "student")]
    run_command("prog", distill_student, RunConfig, words)
    teacher, student = (load_model(str(path)).schedule for path in (folder, tmp_path / "student"))
    assert student.config == teacher.config
    assert student.clip_range("ddim") is student.clip_range("dpm++") is None
