import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ddpm_mnist import InputError
from ddpm_mnist.train import TeacherConfig, draw_batch, learning_rate, loss_weight, train_teacher
from ddpm_mnist.unet import UNetConfig, load_teacher, make_noise_schedule

RUN = """
import os, signal, sys
from pathlib import Path
import torch
import ddpm_mnist.train as train
from ddpm_mnist.runs import RunState
from ddpm_mnist.unet import UNetConfig

images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
train.load_mnist = lambda split: (images, None)
folder, killed_at = Path(sys.argv[1]), int(sys.argv[2])
log = RunState.log
def log_or_die(self, **row):
    log(self, **row)
    if row["update"] == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
RunState.log = log_or_die
train.train_teacher(train.TeacherConfig(
    output=folder, unet=UNetConfig((8, 16), norm_num_groups=4, attention_head_dim=8), total_updates=6,
    batch_size=4, warmup_updates=2, log_every=1, save_every=2, grid_every=6))
"""


def train_in_a_process(folder, killed_at=0):
    return subprocess.run([sys.executable, "-c", RUN, str(folder), str(killed_at)], capture_output=True).returncode


def without_seconds(path):
    return [line.split('"seconds"')[0] for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    assert train_in_a_process(tmp_path / "whole") == 0
    assert train_in_a_process(tmp_path / "killed", killed_at=5) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "unet").exists()
    assert train_in_a_process(tmp_path / "killed") == 0
    weights = [load_file(tmp_path / f / "unet" / "diffusion_pytorch_model.safetensors") for f in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [without_seconds(tmp_path / f / "log.jsonl") for f in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6
    assert (tmp_path / "killed" / "samples" / "000006.png").exists()
    assert not load_teacher(tmp_path / "whole").training


def tiny(folder, **options):
    unet = UNetConfig((8,), norm_num_groups=4, attention_head_dim=8)
    return TeacherConfig(output=folder, unet=unet, total_updates=1, batch_size=2, grid_every=5, **options)


def test_a_folder_of_another_configuration_is_refused(tmp_path, monkeypatch):
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr("ddpm_mnist.train.load_mnist", lambda split: (images, None))
    train_teacher(tiny(tmp_path))
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(InputError, match=r"was begun with learning_rate = 0\.002, now it is 0\.1"):
        train_teacher(tiny(tmp_path, learning_rate=0.1))
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_truncated_state_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_mnist.train.load_mnist", lambda split: (torch.zeros(4, 28, 28, dtype=torch.uint8), None))
    train_teacher(tiny(tmp_path))
    state = tmp_path / "state" / "latest.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"latest\.pt cannot be read"):
        train_teacher(tiny(tmp_path))


def test_the_learning_rate_is_a_trapezoid():
    config = TeacherConfig(total_updates=100, warmup_updates=10, decay_fraction=0.5, learning_rate=2.0)
    rates = [learning_rate(config, update) for update in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:51] == pytest.approx([2.0] * 42)
    assert rates[75] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.04)


def test_min_snr_weight_caps_the_loss_on_x0():
    """The squared error in x0 is that in ε over SNR: the weight min(SNR, γ)/SNR of one is min(SNR, γ) of the other."""
    alphas_cumprod = make_noise_schedule().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = loss_weight(alphas_cumprod, 5.0)
    torch.testing.assert_close(weight * snr, snr.clamp(max=5.0))
    assert (loss_weight(alphas_cumprod, None) == 1).all()


def test_a_batch_depends_on_seed_update_and_process():
    images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8)
    first = draw_batch(images, 8, seed=0, update=3, rank=0)
    again = draw_batch(images, 8, seed=0, update=3, rank=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].min() >= -1
    assert first[0].max() <= 1
    for other in ((1, 3, 0), (0, 4, 0), (0, 3, 1)):
        assert not torch.equal(first[1], draw_batch(images, 8, *other)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_updates": 0}, "total_updates must be positive, not 0"),
        ({"decay_fraction": 2}, "decay_fraction must lie in"),
        ({"mixed_precision": "int4"}, 'mixed_precision must be "no" or "bf16", not "int4"'),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**options)
