"""EfficientDM (arXiv 2310.03270) in one file: distil a low-bit student of a diffusion model without any data.

    python docs/efficientdm.py        # about four minutes on two cores; writes efficientdm.png

The teacher is a small DDPM that draws MNIST digits. Its own denoising of noise is the training set. The student has
4-bit weights and activations and learns to answer as the teacher does. The script prints in how many images a
classifier sees the digit that it sees in the teacher's image of the same noise, before and after distillation.

Each part stands under its equation in the paper. The package `quant` has these parts for any UNet of diffusers, adds
bias correction and other bit-widths, and runs the student on integers; `finetune` adds a loss over several steps.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import make_image_grid, numpy_to_pil
from safetensors.torch import load_file  # a dependency of diffusers
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "ddpm_mnist" / "pretrained"
CLASSIFIER = ROOT / "eval" / "pretrained" / "features.safetensors"


# 1. Quantization: x̂ = (clamp(round(x / s) + z, qmin, qmax) − z) · s with step size s and zero point z.
class FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize x (C, …) with s and z (C, 1, …); gradients of LSQ (arXiv 1902.08153):

    ∂x̂/∂x = m        ∂x̂/∂s = (x̂ − m·x) / s        ∂x̂/∂z = −s·(1 − m)        m = 1 inside [qmin, qmax], else 0
    """

    @staticmethod
    def forward(ctx, x, s, z, qmin, qmax):
        z = z.round().clamp(qmin, qmax)
        codes = (x * s.reciprocal()).round() + z
        x_hat = (codes.clamp(qmin, qmax) - z) * s
        ctx.save_for_backward(x, s, x_hat, (codes >= qmin) & (codes <= qmax))
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        x, s, x_hat, m = ctx.saved_tensors
        grad_s = ((x_hat - m * x) * grad).flatten(1).sum(1).view_as(s) / s
        grad_z = -s * (~m * grad).flatten(1).sum(1).view_as(s)
        return m * grad, grad_s, grad_z, None, None


def fake_quantize(x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int) -> Tensor:
    """Quantize and dequantize x (C, …), each slice of dimension 0 with its own s and z (C,)."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    return FakeQuantize.apply(x, s.view(shape), z.view(shape), qmin, qmax)


def best_weight_steps(weight: Tensor, bits: int) -> Tensor:
    """Find the step size (c_out,) of each output channel with the least squared error."""
    rows, qmin, qmax = weight.flatten(1), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    candidates = torch.linspace(0.2, 1.1, 181)[:, None] * (rows.abs().amax(1) / -qmin)
    zeros = torch.zeros(len(rows))
    errors = torch.stack([(fake_quantize(rows, s, zeros, qmin, qmax) - rows).square().sum(1) for s in candidates])
    return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def best_act_range(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find the step size and zero point for unsigned codes of `values` (M,) with the least squared error."""
    low, high, qmax = values.min().clamp(max=0), values.max().clamp(min=0), 2**bits - 1
    scales = torch.linspace(0.2, 1.1, 37) * ((high - low) / qmax)
    best, s, z = math.inf, scales[-1], torch.zeros(())
    for tail in (0, 0.25, 0.5, 0.75, 1):  # the share of the negative range to keep: SiLU's shallow tail is often cut
        zeros = (-low * tail / scales).round().clamp(0, qmax)
        rounded = fake_quantize(values.expand(len(scales), -1), scales, zeros, 0, qmax)
        error, at = (rounded - values).square().sum(1).min(0)
        if error < best:
            best, s, z = error, scales[at], zeros[at]
    return s, z


# 2. QALoRA (eq. 6): y = Q(x; s_x) · Q(W0 + B·A; s_w). The adapters are merged before quantization, so that the finished
#    layer has low-bit weights alone. 3. TALSQ (eq. 9): s_x has one value for each denoising step.
class Clock:
    """What all layers need to know: the denoising step of each sample of the batch, `step` (N,)."""

    is_calibrating = False


class QuantLayer(nn.Module):
    """A convolution or linear layer with adapters B·A and `num_steps` activation ranges."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int, rank: int, num_steps: int, clock: Clock):
        super().__init__()
        self.layer, self.bits, self.clock = layer, bits, clock
        c_out, fan_in = layer.weight.flatten(1).shape
        self.lora_a = nn.Parameter(torch.empty(rank, fan_in))
        self.lora_b = nn.Parameter(torch.zeros(c_out, rank))  # zeros: at first B·A changes nothing
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.s_w = nn.Parameter(best_weight_steps(layer.weight, bits))
        self.s_x = nn.Parameter(torch.ones(num_steps))
        self.z_x = nn.Parameter(torch.zeros(num_steps))

    def quantized_weight(self) -> Tensor:
        """Q(W0 + B·A; s_w)."""
        merged = self.layer.weight + (self.lora_b @ self.lora_a).view_as(self.layer.weight)
        half = 2 ** (self.bits - 1)
        return fake_quantize(merged, self.s_w, torch.zeros_like(self.s_w), -half, half - 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.clock.is_calibrating:  # compute in float; the whole batch is at one denoising step
            values = x.flatten()[torch.randint(x.numel(), (16_384,))]
            step = self.clock.step[0]
            self.s_x.data[step], self.z_x.data[step] = best_act_range(values, self.bits)
            return self.layer(x)
        x = fake_quantize(x, self.s_x[self.clock.step], self.z_x[self.clock.step], 0, 2**self.bits - 1)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.quantized_weight(), self.layer.bias)
        return F.conv2d(x, self.quantized_weight(), self.layer.bias, self.layer.stride, self.layer.padding)


class Student(nn.Module):
    """A quantized copy of `teacher`, called in the same way: `student(x_t, t).sample`.

    All convolutions and linear layers have `bits` for weights and activations, but 8 where the noisy image enters and
    leaves: the first and the last convolution, the shortcut over the last skip connection, and the time embedding.
    """

    def __init__(self, teacher: UNet2DModel, timesteps: Tensor, bits: int, rank: int = 16):
        super().__init__()
        self.unet = copy.deepcopy(teacher).requires_grad_(False)
        self.timesteps, self.clock = timesteps, Clock()
        edges = ("conv_in", "conv_out", "time_embedding", "up_blocks.2.resnets.1.conv_shortcut")
        for name, module in list(self.unet.named_modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                layer_bits = 8 if name.startswith(edges) else bits
                self.unet.set_submodule(name, QuantLayer(module, layer_bits, rank, len(timesteps), self.clock))

    def forward(self, x: Tensor, t: Tensor):
        self.clock.step = (t.reshape(-1, 1) == self.timesteps).int().argmax(1).expand(len(x))
        return self.unet(x, t)

    def layers(self) -> list[QuantLayer]:
        return [module for module in self.modules() if isinstance(module, QuantLayer)]

    @torch.no_grad()
    def calibrate(self, states: Tensor) -> None:
        """Set the activation ranges of each denoising step from the teacher's states (N, T, C, H, W)."""
        self.clock.is_calibrating = True
        for step, t in enumerate(self.timesteps):
            self(states[:, step], t)
        self.clock.is_calibrating = False


# 4. Trajectories: DPM-Solver++ of diffusers from noise to image. They are the training set, and they are how to sample.
@torch.no_grad()
def denoise(model: nn.Module, noise: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Denoise `noise` (N, C, H, W); return states (N, T + 1, …), answers ε (N, T, …) and timesteps (T,)."""
    config = DPMSolverMultistepScheduler.load_config(TEACHER, subfolder="scheduler")
    eps_scale = config.pop("eps_scale")  # the teacher's ε is multiplied by it
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    states, answers = [noise], []
    for t in scheduler.timesteps:
        answers.append(model(states[-1], t).sample)
        states.append(scheduler.step(eps_scale * answers[-1], t, states[-1]).prev_sample)
    return torch.stack(states, 1), torch.stack(answers, 1), scheduler.timesteps


# 5. Distillation (eq. 7): L = ‖ε_θ(x_t, t) − ε̂_θ(x_t, t)‖² at states x_t of the teacher's own trajectories.
def distillation_loss(student: nn.Module, x: Tensor, t: Tensor, answer: Tensor) -> Tensor:
    """Compare the student's answer at x (N, C, H, W) and t (N,) with the teacher's: mean squared difference."""
    return (student(x, t).sample - answer).square().mean()


# 6. Scale-aware optimisation (eq. 8): the update of B·A is kept in proportion to the layer's mean step size s_w. Adam
#    cancels a factor on the gradient, so the factor is on the learning rate of each layer.
def parameter_groups(student: Student) -> list[dict]:
    """Give each layer's parameters their peak learning rates."""
    groups = []
    for layer in student.layers():
        s_w, s_x = layer.s_w.mean().item(), layer.s_x.mean().item()
        groups += [
            {"params": [layer.lora_a, layer.lora_b], "peak_lr": 3e-2 * s_w},
            {"params": [layer.s_w], "peak_lr": 1e-3 * s_w},
            {"params": [layer.s_x], "peak_lr": 5e-3 * s_x},
            {"params": [layer.z_x], "peak_lr": 1e-2},
        ]
    return groups


def distil(student: Student, states: Tensor, answers: Tensor, num_updates: int, batch_size: int = 64) -> None:
    """Train adapters, step sizes and zero points; each minibatch mixes trajectories and denoising steps."""
    optimizer = torch.optim.Adam(parameter_groups(student), lr=0.0)
    for update in range(num_updates):
        who, step = torch.randint(len(answers), (batch_size,)), torch.randint(answers.shape[1], (batch_size,))
        loss = distillation_loss(student, states[who, step], student.timesteps[step], answers[who, step])
        optimizer.zero_grad()
        loss.backward()
        factor = min((update + 1) / 20, 1) * (1 + math.cos(math.pi * update / num_updates)) / 2
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        optimizer.step()
        if update % 50 == 0:
            print(f"update {update:4}  loss {loss.item():.5f}")


# 7. Evaluation: the digits that a small classifier of MNIST sees.
def digits(images: Tensor) -> Tensor:
    """Classify images (N, 1, 28, 28) in [-1, 1] with the released classifier: digits (N,)."""
    w = load_file(CLASSIFIER)
    x = ((images.clamp(-1, 1) + 1) * 127.5).round() / 255
    for conv, norm, stride in ((0, 1, 1), (3, 4, 2), (6, 7, 1), (9, 10, 2)):
        x = F.conv2d(x, w[f"trunk.{conv}.weight"], stride=stride, padding=1)
        statistics = (w[f"trunk.{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics).relu()
    x = F.linear(x.flatten(1), w["trunk.13.weight"], w["trunk.13.bias"]).relu()
    return F.linear(x, w["classifier.weight"], w["classifier.bias"]).argmax(1)


def main(bits: int, num_steps: int, trajectories: int, updates: int, images: int, output: Path) -> None:
    """Run all of it and print the shares of same digits."""
    start = time.monotonic()
    torch.manual_seed(0)
    teacher = UNet2DModel.from_pretrained(TEACHER, subfolder="unet").eval()
    states, answers, timesteps = denoise(teacher, torch.randn(trajectories, 1, 28, 28), num_steps)
    student = Student(teacher, timesteps, bits)
    student.calibrate(states[:64])
    noise = torch.randn(images, 1, 28, 28)  # not the noise of the training set
    before = denoise(student, noise, num_steps)[0][:, -1]
    distil(student, states, answers, updates)
    rows = [denoise(teacher, noise, num_steps)[0][:, -1], before, denoise(student, noise, num_steps)[0][:, -1]]
    expected, *seen = map(digits, rows)
    before, after = (f"{(expected == other).float().mean():.1%}" for other in seen)
    print(f"same digit as the teacher: {before} calibrated, {after} distilled ({time.monotonic() - start:.0f} s)")
    cells = torch.cat([row[:16] for row in rows]).clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()
    make_image_grid(numpy_to_pil(cells), rows=3, cols=min(images, 16), resize=56).save(output)
    print(f"{output}: the teacher, the calibrated student, the distilled student")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations, 3 to 8")
    parser.add_argument("--num-steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--trajectories", type=int, default=512, help="of the teacher, to learn from")
    parser.add_argument("--updates", type=int, default=300, help="of the student")
    parser.add_argument("--images", type=int, default=256, help="to compare")
    parser.add_argument("--output", type=Path, default=Path("efficientdm.png"))
    main(**vars(parser.parse_args()))
