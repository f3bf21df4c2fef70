import contextlib
import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.sampler import SEED_LIMIT
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.unet import save_teacher
from finetune.distill import (
    DistillConfig,
    cosine_decay,
    distill,
    distillation_loss,
    draw_batch,
    parameter_groups,
)
from finetune.trajectories import make_trajectories


@pytest.fixture(scope="module")
def made_once(make_models):
    return make_models(8)


class FloatStudent:
    """A student that is its own teacher."""

    def __init__(self, unet):
        self.unet = unet
        self.shared_weights = contextlib.nullcontext

    def __call__(self, x, t):
        return self.unet(x, t)


@pytest.mark.parametrize("solver_name", ["ddim", "dpm++"])
def test_a_student_that_is_the_teacher_has_no_loss(unet, solver_name):
    solver = Solver(SamplerConfig(solver_name, 4))
    buffer = make_trajectories(unet, solver, count=4, seed=1)
    for objective, steps in (("per-step", 1), ("per-step-in-order", 1), ("rollout", 1), ("rollout", 3), ("rollout", 4)):
        config = DistillConfig(objective, batch_size=16, rollout_steps=steps)
        assert distillation_loss(FloatStudent(unet), solver, buffer, config, seed=0, update=3).item() < 1e-8


def test_rollouts_see_every_step_equally_often(buffer):
    config = DistillConfig(batch_size=4000, rollout_steps=3)
    _, start = draw_batch(config, buffer, seed=0, update=0)
    steps, counts = torch.cat([start, start + 1, start + 2]).unique(return_counts=True)
    assert steps.tolist() == list(range(6))
    assert counts.max() < 1.8 * counts.min()


def test_in_order_an_update_sees_one_timestep_and_the_next_the_next(buffer):
    config = DistillConfig("per-step-in-order", batch_size=5)
    steps = [draw_batch(config, buffer, seed=0, update=update)[1].tolist() for update in range(7)]
    assert steps == [[step] * 5 for step in (0, 1, 2, 3, 4, 5, 0)]


def test_what_an_update_draws_is_a_function_of_the_seed_and_its_number(buffer):
    def draw(seed, update):
        return torch.stack(draw_batch(DistillConfig("per-step", batch_size=40), buffer, seed, update))

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3))
    assert not torch.equal(draw(1, 2), draw(2, 2))


def test_a_quantized_student_has_a_loss_and_longer_rollouts_have_more(student, solver, buffer):
    losses = [
        distillation_loss(student, solver, buffer, DistillConfig(batch_size=32, rollout_steps=k), 0, 0).item()
        for k in (1, 5)
    ]
    assert 1e-6 < losses[0] < losses[1]


def test_the_buffers_noise_is_never_scored(unet, solver):
    scored = draw_noise(image_generators(range(8)), (1, 8, 8))
    starts = [make_trajectories(unet, solver, count=8, seed=seed).x[:, 0] for seed in (0, 1)]
    noises = torch.cat([scored, *starts]).flatten(1)
    assert len(noises.unique(dim=0)) == 24
    assert torch.equal(
        starts[1], draw_noise(image_generators(range(SEED_LIMIT + 2**18, SEED_LIMIT + 2**18 + 8)), (1, 8, 8))
    )


def test_adapters_learn_in_proportion_to_their_layers_mean_weight_step_size(student):
    config = DistillConfig(lr_adapters=0.5)
    groups = {group["name"]: group for group in parameter_groups(student, config)}
    rates = []
    for name, layer in student.layers():
        group = groups[f"{name}.lora"]
        assert {id(p) for p in group["params"]} == {id(layer.lora_a), id(layer.lora_b)}
        assert group["peak_lr"] == pytest.approx(0.5 * layer.weight_quantizer.scale.mean().item())
        rates.append(group["peak_lr"])
    assert max(rates) > 1.5 * min(rates)


def test_the_first_update_moves_b_by_its_layers_learning_rate(student, solver, buffer, tmp_path):
    """Adam's first update is its learning rate, whatever the gradient: what eq. 8 asks for, seen in the weights."""
    config = DistillConfig("per-step", num_updates=1, warmup_updates=0, lr_adapters=0.5)
    rates = {g["name"]: g["peak_lr"] for g in parameter_groups(student, config)}
    distill(student, solver, buffer, config, RunState(tmp_path, {}), seed=0)
    for name, layer in student.layers():
        assert layer.lora_b.abs().max().item() == pytest.approx(rates[f"{name}.lora"], rel=1e-2)


@pytest.mark.parametrize(("objective", "lr_affine"), [("per-step", 1e-3), ("rollout", 1e-3), ("rollout", 0)])
def test_what_is_learned_changes_and_nothing_else_does(student, solver, buffer, tmp_path, objective, lr_affine):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    config = DistillConfig(
        objective, num_updates=4, batch_size=24, rollout_steps=3, lr_affine=lr_affine, warmup_updates=1
    )
    distill(student, solver, buffer, config, RunState(tmp_path, {}), seed=0)
    norms = [f"{name}." for name, module in student.named_modules() if isinstance(module, nn.GroupNorm)]
    learned = (
        *(("bias", *(f"{norm}weight" for norm in norms)) if lr_affine else ()),
        "lora_a",
        "lora_b",
        "weight_quantizer.scale",
        "act_quantizer.scale",
        "act_quantizer.zero_point",
    )
    # Where nothing is cut off, as among codes of 16 bits, a zero point has no gradient.
    fine = {f"unet.{name}.act_quantizer.zero_point" for name, x in student.layers() if x.act_quantizer.qmax > 255}
    for name, tensor in student.state_dict().items():
        if name.endswith("act_quantizer.scale"):
            assert (tensor != before[name]).all(), f"{name}: the step size of every timestep is learned"
        elif name.endswith(learned):
            assert torch.equal(tensor, before[name]) == (name in fine), name
        else:
            assert torch.equal(tensor, before[name]), name
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all(name.endswith(learned) for name in trainable)


def test_without_scale_awareness_all_layers_have_one_learning_rate(student):
    groups = parameter_groups(student, DistillConfig(lr_adapters=0.5, scale_aware=False))
    rates = {group["peak_lr"] for group in groups if group["name"].endswith(".lora")}
    scales = [layer.weight_quantizer.scale.mean().item() for _, layer in student.layers()]
    assert len(rates) == 1
    assert rates.pop() == pytest.approx(0.5 * sum(scales) / len(scales))


def test_biases_and_normalisations_move_in_proportion_to_the_activations_step_sizes(student):
    def rates():
        groups = {group["name"]: group["peak_lr"] for group in parameter_groups(student, DistillConfig(lr_affine=0.5))}
        return [groups["norms"], *(groups[f"{name}.bias"] for name, _ in student.layers())]

    scales = [layer.act_quantizer.scale.mean().item() for _, layer in student.layers()]
    before = rates()
    assert before == pytest.approx([0.5 * sum(scales) / len(scales), *(0.5 * scale for scale in scales)])
    for _, layer in student.layers():
        layer.act_quantizer.scale.data /= 16  # four bits more
    assert rates() == pytest.approx([rate / 16 for rate in before])


@pytest.mark.parametrize(("objective", "updates"), [("per-step", 60), ("rollout", 20)])
def test_distillation_lowers_the_loss(student, solver, buffer, tmp_path, objective, updates):
    config = DistillConfig(
        objective, num_updates=updates, batch_size=16, rollout_steps=3, warmup_updates=5,
        lr_adapters=0.1, lr_weight_scales=5e-3, lr_act_scales=5e-2, lr_zero_points=0.1,
    )  # fmt: skip

    def loss():
        with torch.no_grad():
            probe = DistillConfig(objective, batch_size=64, rollout_steps=3)
            return distillation_loss(student, solver, buffer, probe, seed=9, update=0).item()

    start = loss()
    distill(student, solver, buffer, config, RunState(tmp_path, {}), seed=0)
    assert loss() < 0.9 * start


def test_a_step_size_stays_positive(student, solver, buffer, tmp_path):
    config = DistillConfig(
        "per-step", num_updates=8, batch_size=4, lr_weight_scales=3.0, lr_act_scales=3.0, warmup_updates=0
    )
    distill(student, solver, buffer, config, RunState(tmp_path, {}), seed=0)
    for _, layer in student.layers():
        assert (layer.weight_quantizer.scale > 0).all()
        assert (layer.act_quantizer.scale > 0).all()


def test_a_learning_rate_of_zero_freezes(student):
    groups = parameter_groups(student, DistillConfig(lr_act_scales=0, lr_zero_points=0))
    assert {group["name"].rsplit(".", 1)[-1] for group in groups} == {"lora", "bias", "weight_scale", "norms"}
    assert not any(layer.act_quantizer.scale.requires_grad for _, layer in student.layers())
    groups = parameter_groups(student, DistillConfig(lr_affine=0))
    assert not {group["name"].rsplit(".", 1)[-1] for group in groups} & {"bias", "norms"}
    assert not any(layer.bias.requires_grad for _, layer in student.layers())


def test_the_schedule_rises_and_falls_along_a_cosine():
    config = DistillConfig(num_updates=100, warmup_updates=10)
    factors = [cosine_decay(config, update) for update in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[50] == pytest.approx(0.5)
    assert factors[99] < 0.001


RUN = """
import os, signal, sys
from pathlib import Path
from ddpm_mnist.lab.run_state import RunState
from finetune.distill import DistillConfig
from finetune.config import RunConfig
from finetune.make import distill_student
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.sampler import SEED_LIMIT
from ddpm_mnist.sampling.solver import SamplerConfig
from quant import QuantConfig

teacher, folder, killed_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
log = RunState.log
def log_or_die(self, **row):
    log(self, **row)
    if row["update"] == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
RunState.log = log_or_die
distill_student(RunConfig(
    output=folder, teacher=teacher, sampler=SamplerConfig(num_steps=4), student=QuantConfig(rank=2, search="min-max"),
    num_trajectories=8, calibration_trajectories=8,
    distill=DistillConfig(num_updates=6, batch_size=4, rollout_steps=2, log_every=2, save_every=3)))
"""


@pytest.mark.slow
def test_a_killed_distillation_goes_on_as_if_nothing_had_happened(unet, tmp_path):
    save_teacher(unet, tmp_path / "teacher")

    def process(folder, killed_at=0):
        command = [
            sys.executable,
            "-c",
            RUN,
            str(tmp_path / "teacher"),
            str(tmp_path / folder),
            str(killed_at),
        ]
        return subprocess.run(command, capture_output=True).returncode

    assert process("whole") == 0
    assert process("killed", killed_at=4) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert process("killed") == 0
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [(tmp_path / folder / "log.jsonl").read_text().splitlines() for folder in ("whole", "killed")]
    losses = [[line.split('"seconds"')[0] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert [json.loads(line)["update"] for line in logs[0]] == [2, 3, 4, 6]
