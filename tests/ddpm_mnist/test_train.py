import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.run_state import RunState, read_log
from ddpm_mnist.scheduler import make_noise_schedule
from ddpm_mnist.train import (
    TeacherConfig,
    draw_examples,
    learning_rate,
    loss_weight,
    make_optimizers,
    train_teacher,
)
from ddpm_mnist.unet import UNetConfig, load_teacher, make_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"

RUN = """
import os, signal, sys
from pathlib import Path
import torch
import ddpm_mnist.train as train
from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.unet import UNetConfig

images = torch.randint(0, 256, (50, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
train.load_images = lambda data, split, size: images
folder, killed_at = Path(sys.argv[1]), int(sys.argv[2])
log = RunState.log
def log_or_die(self, **row):
    log(self, **row)
    if row["update"] == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
RunState.log = log_or_die
train.train_teacher(train.TeacherConfig(
    output=folder, unet=UNetConfig((8, 16), norm_num_groups=4, attention_head_dim=8), total_updates=4,
    restart_updates=2, average_at=(3, 6), batch_size=4, warmup_updates=2, log_every=2, save_every=3, grid_every=6))
"""


def train_in_a_process(folder, killed_at=0):
    return subprocess.run([sys.executable, "-c", RUN, str(folder), str(killed_at)], capture_output=True).returncode


def without_seconds(path):
    return [line.split('"seconds"')[0] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    assert train_in_a_process(tmp_path / "whole") == 0
    assert train_in_a_process(tmp_path / "killed", killed_at=4) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "unet").exists()
    assert train_in_a_process(tmp_path / "killed") == 0
    weights = [load_file(tmp_path / f / "unet" / "diffusion_pytorch_model.safetensors") for f in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [without_seconds(tmp_path / f / "log.jsonl") for f in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4  # after 2, 3, 4 and 6 updates
    assert (tmp_path / "killed" / "samples" / "000006.png").exists()
    assert not load_teacher(tmp_path / "whole").training


def tiny(folder, **options):
    unet = UNetConfig((8,), norm_num_groups=4, attention_head_dim=8)
    return TeacherConfig(output=folder, unet=unet, total_updates=1, batch_size=2, grid_every=5, **options)


def draw_black(monkeypatch):
    images = torch.zeros(4, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr("ddpm_mnist.train.load_images", lambda data, split, size: images)


def test_the_tracker_shows_losses_rates_and_samples_and_is_no_part_of_a_run(tmp_path, monkeypatch):
    draw_black(monkeypatch)
    train_teacher(tiny(tmp_path, tracker="tensorboard"))
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (row,) = read_log(tmp_path / "log.jsonl")
    for name in ("loss", "learning_rate"):
        assert [(event.step, event.value) for event in shown.Scalars(name)] == [(1, pytest.approx(row[name]))]
    assert [(event.step, event.height) for event in shown.Images("samples")] == [(1, 82)]
    train_teacher(tiny(tmp_path))


def test_a_state_of_another_optimiser_is_refused(tmp_path, monkeypatch):
    draw_black(monkeypatch)
    train_teacher(tiny(tmp_path))
    path = tmp_path / "state" / "latest.pt"
    saved = torch.load(path, weights_only=True)
    del saved["fingerprint"]["optimizer"]
    torch.save(saved, path)
    with pytest.raises(InputError, match="was begun with optimizer = None, now it is muon"):
        train_teacher(tiny(tmp_path))


def test_muon_has_the_inner_weights_and_adam_all_else():
    unet = make_unet(UNetConfig())
    names = {parameter: name for name, parameter in unet.named_parameters()}
    inner, rest = ({names[p] for group in opt.param_groups for p in group["params"]} for opt in make_optimizers(unet))
    assert inner.isdisjoint(rest)
    assert inner | rest == set(names.values())
    assert {"conv_in.weight", "conv_out.weight", "conv_norm_out.weight", "mid_block.resnets.0.conv1.bias"} <= rest
    assert {"mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= inner
    assert all(name.endswith("weight") and "norm" not in name for name in inner)


def test_a_folder_of_another_configuration_is_refused(tmp_path, monkeypatch):
    draw_black(monkeypatch)
    train_teacher(tiny(tmp_path))
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(InputError, match=r"was begun with learning_rate = 0\.002, now it is 0\.1"):
        train_teacher(tiny(tmp_path, learning_rate=0.1))
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_truncated_state_is_refused(tmp_path, monkeypatch):
    draw_black(monkeypatch)
    train_teacher(tiny(tmp_path))
    state = tmp_path / "state" / "latest.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"latest\.pt cannot be read"):
        train_teacher(tiny(tmp_path))


def test_a_folder_that_is_taken_away_is_not_made_again(tmp_path, monkeypatch):
    draw_black(monkeypatch)
    save = RunState.save

    def take_away(run, state):
        save(run, state)
        run.folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(RunState, "save", take_away)
    with pytest.raises(InputError, match=r"cannot write .*unet: .*run was deleted"):
        train_teacher(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "elsewhere" / "state" / "latest.pt").exists()


def save_images(path, *shape, seed=0):
    np.save(path, np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    return str(path)


@pytest.mark.parametrize(("shape", "channels", "size"), [((3, 8, 12, 3), 3, [8, 12]), ((3, 12, 12), 1, 12)])
def test_the_network_takes_channels_and_size_from_the_data(shape, channels, size, tmp_path):
    unet = UNetConfig((8, 16), norm_num_groups=4, attention_head_dim=8)
    data = save_images(tmp_path / "a.npy", *shape)
    train_teacher(dataclasses.replace(tiny(tmp_path / "run", data=data), unet=unet))
    config = load_teacher(tmp_path / "run").config
    assert (config.in_channels, config.out_channels) == (channels, channels)
    assert config.sample_size == size
    picture = np.asarray(Image.open(tmp_path / "run" / "samples" / "000001.png"))
    height, width = shape[1:3]
    assert picture.shape == (8 * (height + 2) + 2, 8 * (width + 2) + 2, 3)
    assert (picture == picture[..., :1]).all() == (channels == 1), "a grey picture has equal channels, and no other"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == data


def test_the_surroundings_have_no_influence(tmp_path, strange_surroundings):
    data = save_images(tmp_path / "a.npy", 4, 12, 12)
    train_teacher(tiny(tmp_path / "plain", data=data))
    with strange_surroundings():
        train_teacher(tiny(tmp_path / "strange", data=data))
    ours, theirs = (load_file(tmp_path / f / "unet" / WEIGHTS) for f in ("plain", "strange"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_modes_that_the_umask_says(umask, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8), np.uint8))
    unet = UNetConfig((8, 16), norm_num_groups=4, attention_head_dim=8)
    before = os.umask(umask)
    try:
        config = TeacherConfig(tmp_path / "run", str(tmp_path / "a.npy"), unet=unet, total_updates=1, batch_size=2)
        train_teacher(config)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o666 & ~umask for path in files}


def test_images_are_resized_as_the_config_says(tmp_path):
    data = save_images(tmp_path / "a.npy", 3, 28, 30)
    configs = []
    for words in ([], ["--image_size", "12"], ["--image_size", "[8, 12]"]):
        run_command("teacher", configs.append, TeacherConfig, ["--data", data, *words])
    assert [config.image_size for config in configs] == [None, 12, (8, 12)]
    train_teacher(tiny(tmp_path / "run", data=data, image_size=(8, 12)))
    assert load_teacher(tmp_path / "run").config.sample_size == [8, 12]


def test_sizes_that_cannot_be_halved_are_refused(tmp_path):
    unet = UNetConfig((8, 8, 8), norm_num_groups=4, attention_head_dim=8)
    message = r"images of 12×10 pixels cannot be halved 2 times, as 3 block_out_channels ask: .* multiples of 4 "
    with pytest.raises(InputError, match=message):
        make_unet(unet, 3, (12, 10))
    config = tiny(tmp_path / "run", data=save_images(tmp_path / "a.npy", 3, 12, 10))
    with pytest.raises(InputError, match=message):
        train_teacher(dataclasses.replace(config, unet=unet))
    assert not config.output.exists()
    x = torch.zeros(2, 3, 12, 20)
    assert make_unet(unet, 3, (12, 20))(x, 0).sample.shape == x.shape


def test_too_few_images_are_refused(tmp_path):
    data = save_images(tmp_path / "a.npy", 1, 12, 12)
    with pytest.raises(InputError, match=r"a\.npy has 1 images, fewer than a batch of 2: give more, or a smaller"):
        train_teacher(tiny(tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    data = save_images(tmp_path / "a.npy", 3, 12, 12)
    train_teacher(tiny(tmp_path / "run", data=data))
    train_teacher(tiny(tmp_path / "run", data=data))
    save_images(tmp_path / "a.npy", 3, 12, 12, seed=1)
    with pytest.raises(InputError, match=r"run was begun with other images than .*a\.npy holds now"):
        train_teacher(tiny(tmp_path / "run", data=data))


def test_the_learning_rate_is_a_trapezoid():
    config = TeacherConfig(total_updates=100, warmup_updates=10, decay_fraction=0.5, learning_rate=2.0)
    rates = [learning_rate(config, update) for update in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:51] == pytest.approx([2.0] * 42)
    assert rates[75] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.04)


def test_the_learning_rate_begins_again_at_half_after_a_restart():
    config = TeacherConfig(total_updates=100, restart_updates=50, learning_rate=2.0)
    assert learning_rate(config, 99) < 0.06
    assert [learning_rate(config, update) for update in (100, 125, 149)] == pytest.approx([1.0, 0.5, 0.02])


def test_the_teacher_is_the_mean_of_the_weights_that_were_kept(tmp_path, monkeypatch):
    """Against torch's own averaged model, of runs that end where weights are kept."""
    draw_black(monkeypatch)
    options = {"warmup_updates": 0, "decay_fraction": 0.0}
    config = dataclasses.replace(tiny(tmp_path / "3"), total_updates=3, **options)
    train_teacher(dataclasses.replace(config, output=tmp_path / "mean", average_at=(1, 3)))
    models = []
    for count in (1, 3):
        train_teacher(dataclasses.replace(config, output=tmp_path / str(count), total_updates=count))
        models.append(load_teacher(tmp_path / str(count)))
    assert not torch.equal(models[0].conv_in.weight, models[1].conv_in.weight)
    mean = torch.optim.swa_utils.AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    for ours, theirs in zip(load_teacher(tmp_path / "mean").parameters(), mean.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_min_snr_weight_caps_the_loss_on_x0():
    """The squared error in x0 is that in ε over SNR: the weight min(SNR, γ)/SNR of one is min(SNR, γ) of the other."""
    alphas_cumprod = make_noise_schedule().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = loss_weight(alphas_cumprod, 5.0)
    torch.testing.assert_close(weight * snr, snr.clamp(max=5.0))
    assert (loss_weight(alphas_cumprod, None) == 1).all()


@pytest.mark.parametrize("shape", [(50, 28, 28), (50, 8, 12, 3)])
def test_a_batch_depends_on_seed_and_update(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    first = draw_examples(images, 8, seed=0, update=3)
    assert (first[2] // 125).sort().values.tolist() == list(range(8))  # one timestep from each eighth
    again = draw_examples(images, 8, seed=0, update=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (8, 3 if shape[3:] else 1, *shape[1:3])
    assert first[0].min() >= -1
    assert first[0].max() <= 1
    for other in ((1, 3), (0, 4)):
        assert not torch.equal(first[1], draw_examples(images, 8, *other)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_updates": 0}, "total_updates must be positive, not 0"),
        ({"restart_updates": -1}, "restart_updates must not be negative, not -1"),
        ({"decay_fraction": 2}, "decay_fraction must lie in"),
        (
            {"total_updates": 9, "average_at": (3, 10)},
            r"average_at must name updates of 1…9 in their order, not \[3, 10",
        ),
        ({"average_at": (4, 4)}, r"average_at must name updates of 1…20000 in their order, not \[4, 4"),
        ({"image_size": (0, 8)}, r"image_size must be positive, not \(0, 8\)"),
        ({"mixed_precision": "int4"}, 'mixed_precision must be "no" or "bf16", not "int4"'),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**options)
