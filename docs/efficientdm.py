"""EfficientDM (arXiv 2310.03270) in one file: a low-bit student of a diffusion model, distilled without data.

    python docs/efficientdm.py        # under five minutes on two cores; writes efficientdm.png

A small DDPM that draws MNIST digits is the teacher. Its own denoising of pure noise is all the data there is. A student
with 4-bit weights and 4-bit activations learns the teacher's answers along the way. The script prints the share of images
in which a classifier sees the same digit in the student's image as in the teacher's of the same noise, before and after.

Each part stands under its equation of the paper. The package `quant` has the same parts for any UNet of diffusers, with
more bit-widths, calibrated biases and learned normalisations, and runs the result on integers; `finetune` adds rollouts.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import make_image_grid, numpy_to_pil
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "ddpm_mnist" / "pretrained"
CLASSIFIER = ROOT / "eval" / "pretrained" / "features.safetensors"


# 1. Quantization: x̂ = (clamp(round(x / s) + z, qmin, qmax) − z) · s, with codes in [qmin, qmax], step size s, zero point z.
class FakeQuantize(torch.autograd.Function):
    """x̂ of x (C, …), with s and z (C, 1, …). Gradients go straight through the rounding (LSQ, arXiv 1902.08153):

        ∂x̂/∂x = m        ∂x̂/∂s = (x̂ − m·x) / s        ∂x̂/∂z = −s·(1 − m)        m: is x inside the range?
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
        over_channel = tuple(range(1, x.dim()))
        grad_s = ((x_hat - m * x) * grad).sum(over_channel, keepdim=True) / s
        grad_z = -s * (~m * grad).sum(over_channel, keepdim=True)
        return m * grad, grad_s, grad_z, None, None


def fake_quantize(x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int) -> Tensor:
    """x̂ of x (C, …), one step size and one zero point (C,) for each slice of dimension 0."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    return FakeQuantize.apply(x, s.view(shape), z.view(shape), qmin, qmax)


def best_weight_steps(weight: Tensor, bits: int) -> Tensor:
    """The step size of each output channel, (c_out,), that quantizes `weight` with the least squared error."""
    rows, qmin, qmax = weight.flatten(1), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    candidates = torch.linspace(0.2, 1.1, 181)[:, None] * rows.abs().amax(1) / -qmin
    zeros = torch.zeros(len(rows))
    errors = torch.stack([(fake_quantize(rows, s, zeros, qmin, qmax) - rows).square().sum(1) for s in candidates])
    return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def best_act_range(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The step size and the zero point that quantize `values` (M,) to unsigned codes with the least squared error."""
    low, high, qmax = values.min().clamp(max=0), values.max().clamp(min=0), 2**bits - 1
    scales = torch.linspace(0.2, 1.1, 37) * (high - low) / qmax
    best, s, z = math.inf, scales[-1], torch.zeros(())
    for tail in (0, 0.25, 0.5, 0.75, 1):  # how much of the negative part is kept: SiLU's shallow tail is worth little
        zeros = (-low * tail / scales).round().clamp(0, qmax)
        rounded = fake_quantize(values.expand(len(scales), -1), scales, zeros, 0, qmax)
        error, at = (rounded - values).square().sum(1).min(0)
        if error < best:
            best, s, z = error, scales[at], zeros[at]
    return s, z


# 2. QALoRA (eq. 6): y = Q(x; s_x) · Q(W0 + B·A; s_w). The adapters are merged first and the sum is quantized, so that
#    one low-bit weight is all that is kept. 3. TALSQ (eq. 9): s_x is a table with a row for each denoising step.
class Clock:
    """The denoising step of each sample of the running batch, `row` (N,); the student sets it from the timestep."""

    row: Tensor


class QuantLayer(nn.Module):
    """A convolution or linear layer `layer` with adapters of `rank`, and a table of `num_steps` activation ranges."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int, rank: int, num_steps: int, clock: Clock):
        super().__init__()
        self.layer, self.bits, self.clock = layer.requires_grad_(False), bits, clock
        c_out, fan_in = layer.weight.flatten(1).shape
        self.lora_a = nn.Parameter(torch.empty(rank, fan_in))
        self.lora_b = nn.Parameter(torch.zeros(c_out, rank))  # zero: the adapters begin with no effect
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.s_w = nn.Parameter(best_weight_steps(layer.weight, bits))
        self.s_x = nn.Parameter(torch.ones(num_steps))
        self.z_x = nn.Parameter(torch.zeros(num_steps))
        self.calibrating = False

    def merged_weight(self) -> Tensor:
        """W0 + B·A."""
        return self.layer.weight + (self.lora_b @ self.lora_a).view_as(self.layer.weight)

    def quantized_weight(self) -> Tensor:
        """Q(W0 + B·A; s_w)."""
        half = 2 ** (self.bits - 1)
        return fake_quantize(self.merged_weight(), self.s_w, torch.zeros_like(self.s_w), -half, half - 1)

    def forward(self, x: Tensor) -> Tensor:
        row = self.clock.row
        if self.calibrating:  # the float layer, which sees the inputs of one denoising step
            values = x.flatten()[torch.randint(x.numel(), (16_384,))]
            values = torch.cat([values, torch.stack(x.aminmax())])
            self.s_x.data[row[0]], self.z_x.data[row[0]] = best_act_range(values, self.bits)
            return self.layer(x)
        x = fake_quantize(x, self.s_x[row], self.z_x[row], 0, 2**self.bits - 1)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.quantized_weight(), self.layer.bias)
        return self.layer._conv_forward(x, self.quantized_weight(), self.layer.bias)


class Student(nn.Module):
    """A quantized copy of `teacher`, called as it is: `student(x_t, t).sample`.

    Every convolution and linear layer has `bits` for weights and activations, but for 8 bits where the image enters and
    leaves: the first and the last convolution, the shortcut that leads the noisy image past the network, and the time.
    """

    def __init__(self, teacher: UNet2DModel, timesteps: Tensor, bits: int, rank: int = 16):
        super().__init__()
        self.unet = copy.deepcopy(teacher).requires_grad_(False)
        self.timesteps, self.clock = timesteps, Clock()
        edges = ("conv_in", "conv_out", "time_embedding", "up_blocks.2.resnets.1.conv_shortcut")
        for name, module in list(self.unet.named_modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                width = 8 if name.startswith(edges) else bits
                self.unet.set_submodule(name, QuantLayer(module, width, rank, len(timesteps), self.clock))

    def forward(self, x: Tensor, t: Tensor):
        self.clock.row = (t.reshape(-1, 1) == self.timesteps).int().argmax(1).expand(len(x))
        return self.unet(x, t)

    def layers(self) -> list[QuantLayer]:
        return [module for module in self.modules() if isinstance(module, QuantLayer)]

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set each layer's range for each step from the float network's own inputs; x (N, T, C, H, W) are states."""
        for calibrating in (True, False):
            for layer in self.layers():
                layer.calibrating = calibrating
            for step, t in enumerate(self.timesteps if calibrating else ()):
                self(x[:, step], t)


# 4. Sampling: DPM-Solver++ of diffusers, as the teacher's own scheduler says; ε is multiplied by its factor.
@torch.no_grad()
def denoise(model: nn.Module, noise: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Denoise `noise` (N, C, H, W): the states (N, T + 1, …), the model's answers ε (N, T, …) and the timesteps (T,)."""
    fields = json.loads((TEACHER / "scheduler" / "scheduler_config.json").read_text())
    eps_scale = fields.pop("eps_scale")
    scheduler = DPMSolverMultistepScheduler.from_config(fields)
    scheduler.set_timesteps(num_steps)
    states, answers = [noise], []
    for t in scheduler.timesteps:
        answers.append(model(states[-1], t).sample)
        states.append(scheduler.step(eps_scale * answers[-1], t, states[-1]).prev_sample)
    return torch.stack(states, 1), torch.stack(answers, 1), scheduler.timesteps


# 5. Distillation (eq. 7): L = ‖ε_θ(x_t, t) − ε̂_θ(x_t, t)‖², over states x_t that the teacher itself reached from noise.
def distillation_loss(student, x: Tensor, t: Tensor, answer: Tensor) -> Tensor:
    """The mean squared difference of the student's answer at x (N, C, H, W), t (N,), from the teacher's `answer`."""
    return (student(x, t).sample - answer).square().mean()


# 6. Scale-aware optimisation (eq. 8): the update of B·A stays in proportion to the layer's mean step size s̄_w. Under Adam
#    a factor on the gradient changes nothing, so each layer has a learning rate of its own.
def parameter_groups(student: Student) -> list[dict]:
    groups = []
    for layer in student.layers():
        s_w, s_x = layer.s_w.mean().item(), layer.s_x.mean().item()
        groups += [
            {"params": [layer.lora_a, layer.lora_b], "peak": 3e-2 * s_w},
            {"params": [layer.s_w], "peak": 1e-3 * s_w},
            {"params": [layer.s_x], "peak": 5e-3 * s_x},
            {"params": [layer.z_x], "peak": 1e-2},
        ]
    return groups


def distil(student: Student, states: Tensor, answers: Tensor, num_updates: int, batch_size: int = 64) -> None:
    """Train the adapters, step sizes and zero points on minibatches that mix trajectories and denoising steps."""
    optimizer = torch.optim.Adam(parameter_groups(student), lr=0.0)
    for update in range(num_updates):
        who, step = torch.randint(len(answers), (batch_size,)), torch.randint(answers.shape[1], (batch_size,))
        loss = distillation_loss(student, states[who, step], student.timesteps[step], answers[who, step])
        optimizer.zero_grad()
        loss.backward()
        factor = min((update + 1) / 20, 1) * (1 + math.cos(math.pi * update / num_updates)) / 2
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.step()
        with torch.no_grad():
            for layer in student.layers():
                layer.s_w.clamp_(min=1e-6)  # beyond zero codes would change their sign
                layer.s_x.clamp_(min=1e-6)
        if update % 50 == 0:
            print(f"update {update:4}  loss {loss.item():.5f}")


# 7. Measuring: in how many images does a classifier see the digit that it sees in the teacher's?
def digits(images: Tensor) -> Tensor:
    """The digit that the released classifier sees in each of `images` (N, 1, 28, 28) in [-1, 1], (N,)."""
    w = load_file(CLASSIFIER)
    x = ((images.clamp(-1, 1) + 1) * 127.5).round() / 255
    for conv, norm, stride in ((0, 1, 1), (3, 4, 2), (6, 7, 1), (9, 10, 2)):
        x = F.conv2d(x, w[f"trunk.{conv}.weight"], stride=stride, padding=1)
        statistics = (w[f"trunk.{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics).relu()
    x = F.linear(x.flatten(1), w["trunk.13.weight"], w["trunk.13.bias"]).relu()
    return F.linear(x, w["classifier.weight"], w["classifier.bias"]).argmax(1)


def main(bits: int, num_steps: int, trajectories: int, updates: int, images: int, output: Path) -> list[float]:
    """Run all of it; the shares of same digits before and after the distillation."""
    start = time.monotonic()
    torch.manual_seed(0)
    teacher = UNet2DModel.from_pretrained(TEACHER, subfolder="unet").eval().requires_grad_(False)
    states, answers, timesteps = denoise(teacher, torch.randn(trajectories, 1, 28, 28), num_steps)
    student = Student(teacher, timesteps, bits)
    student.calibrate(states[:64])

    noise = torch.randn(images, 1, 28, 28)  # other noises than those of the trajectories
    drawn = [denoise(teacher, noise, num_steps)[0][:, -1], denoise(student, noise, num_steps)[0][:, -1]]
    distil(student, states, answers, updates)
    drawn.append(denoise(student, noise, num_steps)[0][:, -1])
    expected, before, after = map(digits, drawn)
    shares = [(seen == expected).float().mean().item() for seen in (before, after)]
    print(f"same digit: {shares[0]:.3f} calibrated, {shares[1]:.3f} distilled ({time.monotonic() - start:.0f} s)")
    cells = torch.cat([row[:16] for row in drawn]).clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()
    make_image_grid(numpy_to_pil(cells), rows=3, cols=min(images, 16), resize=56).save(output)
    print(f"rows of {output}: the teacher, the calibrated student, the distilled student")
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations, 3 to 8")
    parser.add_argument("--num-steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--trajectories", type=int, default=512, help="of the teacher, to learn from")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--images", type=int, default=256, help="to compare")
    parser.add_argument("--output", type=Path, default=Path("efficientdm.png"))
    main(**vars(parser.parse_args()))
