"""Serve an interactive web page: a row of digits per bit-width from the same noise, with all denoising steps."""

import base64
import io
import os
import random
import re
import socket
import threading
import time
from dataclasses import dataclass, field, fields
from functools import cache
from html import escape
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling.sampler import SEED_LIMIT, denoise, to_uint8
from ddpm_mnist.sampling.solver import SamplerConfig
from eval.features import load_ruler
from eval.models import STUDENTS, Model, load_model
from eval.sample import DrawConfig
from quant.context import plain_torch


@dataclass
class DemoConfig(SamplerConfig):
    students: list[str] = field(
        default_factory=lambda: list(STUDENTS),
        metadata={"help": "What the page lets choose from: released names, run folders or folders of diffusers."},
    )
    teacher: str = "teacher"
    """The model that the students are compared with: the name of a released model, or a diffusers folder."""
    columns: int = 10
    """Images per row, 1 to 50."""
    seed: int = 0
    """Initial seed: column i starts from the noise of seed + i, 0 to 2^31 - columns."""
    runtime: str = "integer"
    """Runtime of the students: "integer", or "simulated" in float."""
    host: str = "127.0.0.1"
    """IPv4 address of this machine to serve the page at. 127.0.0.1: reachable from this machine only; 0.0.0.0: from the
    network."""
    port: int = 7860
    """Port to serve the page at, 0 to 65535. 0: a free port."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.students:
            raise ValueError("students needs at least one model")
        self.students = list(dict.fromkeys(self.students))
        if not 1 <= self.columns <= 50:
            raise ValueError(f"columns must lie in 1…50, not {self.columns}")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must lie in 0…65535, not {self.port}")
        self.drawing(self.seed)  # validates seed and runtime

    def drawing(self, seed: int) -> DrawConfig:
        """Return the config for sampling a row of images."""
        sampler = {field.name: getattr(self, field.name) for field in fields(SamplerConfig)}
        return DrawConfig(**sampler, num_images=self.columns, seed=seed, runtime=self.runtime)


class Film(NamedTuple):
    """A model's images with all states of their denoising."""

    model: Model
    states: Tensor
    """uint8 (T + 1, N, H, W) or (T + 1, N, H, W, C): the noise, then the state after each denoising step."""
    milliseconds: float
    """Time per image, with the row sampled as one batch."""

    @property
    def images(self) -> Tensor:
        """The final images, uint8 (N, H, W) or (N, H, W, C)."""
        return self.states[-1]


@plain_torch()
def film(model: Model, drawing: DrawConfig) -> Film:
    """Sample `drawing.num_images` images in one batch and keep all states."""
    seeds = range(drawing.seed, drawing.seed + drawing.num_images)
    start = time.perf_counter()
    steps = list(denoise(model.denoiser, model.solver(drawing), seeds, model.denoiser.device))
    images = to_uint8(steps[-1].x_next)
    seconds = time.perf_counter() - start
    states = torch.stack([*(to_uint8(step.x) for step in steps), images])
    return Film(model, states, 1000 * seconds / len(images))


class Player:
    """Loads models and renders their images as HTML for the page."""

    def __init__(self, config: DemoConfig):
        self.config = config
        self._load = cache(self.load)

    def load(self, argument: str) -> Model:
        """Load a model and warm it up.

        Raises:
            InputError: the model does not support the config, or its images have another shape than the teacher's.
        """
        model = load_model(argument, self.config.runtime)
        model.check_pictures()
        solver = model.solver(self.config)
        if argument != self.config.teacher and model.shape != (shape := self._load(self.config.teacher).shape):
            raise InputError(f'"{argument}" draws images of {model.shape}, "{self.config.teacher}" of {shape}')
        # Warm-up: the first step allocates memory and selects kernels.
        next(denoise(model.denoiser, solver, range(self.config.columns), model.denoiser.device))
        return model

    def draw(self, students: list[str], seed: str) -> str:
        """Return the HTML of a row of images of the teacher and of each of `students`.

        Raises:
            InputError: `students` is empty, the seed is invalid, or a model cannot be loaded.
        """
        if not students:
            raise InputError("Choose at least one student.")
        drawing = self.config.drawing(parse_seed(seed, self.config.columns))
        models = [self._load(argument) for argument in (self.config.teacher, *students)]
        return rows([film(model, drawing) for model in models])

    def random_seed(self) -> str:
        return str(random.randrange(SEED_LIMIT - self.config.columns + 1))


def parse_seed(text: str, num_images: int) -> int:
    """Parse a seed; raise InputError unless it and the seeds of the images that follow are valid."""
    last = SEED_LIMIT - num_images
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or int(text) > last:
        raise InputError(f"The seed must be a whole number from 0 to {last}, not “{text.strip()}”.")
    return int(text)


def rows(films: list[Film]) -> str:
    """Return the films as rows of HTML, the teacher's first; frame images whose digit differs from the teacher's."""
    ruler, teacher = load_ruler(), films[0]
    fits = ruler.fits(teacher.images.shape[1:])
    seen = [ruler.extract(film.images)[1].argmax(1).tolist() for film in films] if fits else []
    steps, count = len(teacher.states) - 1, len(teacher.images)
    parts = [
        f'<div class="controls"><button type="button" class="play">Play</button>'
        f'<input type="range" min="0" max="{steps}" value="{steps}" aria-label="Denoising step">'
        f"<output>Step {steps} of {steps}</output></div>"
    ]
    for row, film in enumerate(films):
        facts, marks, name = [f"{film.milliseconds:.1f} ms per image"], "", escape(film.model.title)
        if seen and row > 0:
            pairs = list(zip(seen[0], seen[row], strict=True))
            facts.append(f"same digit {sum(a == b for a, b in pairs) / count:.0%}")
            marks = "".join(
                f'<i style="--column:{i}" title="{a} for the teacher, here {b}"></i>'
                for i, (a, b) in enumerate(pairs)
                if a != b
            )
        parts.append(
            f"<figure><figcaption><b>{name}</b> <span>{film.model.bits}</span>"
            f"{''.join(f'<small>{fact}</small>' for fact in facts)}</figcaption>"
            f'<div class="film"><img src="{_sprite(film.states)}" alt="{count} images of {name}">{marks}</div></figure>'
        )
    height, width = teacher.images.shape[1:3]
    style = f"--step:{steps}; --states:{steps + 1}; --columns:{count}; --ratio:{count * width / height}"
    return f'<section style="{style}">{"".join(parts)}</section>'


def _sprite(states: Tensor) -> str:
    """Return states uint8 (T + 1, N, H, W) or (…, C) as the data URL of one PNG image with a row of images per step."""
    picture = io.BytesIO()
    Image.fromarray(rearrange(states.numpy(), "t n h w ... -> (t h) (n w) ...")).save(picture, "png")
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


CSS = """
.controls { display: flex; gap: .8rem; align-items: center; margin: .4rem 0 1rem; }
.controls input { flex: 1; min-width: 0; max-width: 32rem; height: 2rem; accent-color: var(--color-accent); }
.controls output { font-variant-numeric: tabular-nums; white-space: nowrap; }
.play { min-width: 4.5rem; padding: .35rem .9rem; border: 1px solid var(--border-color-primary); border-radius: .4rem; }
.play:hover { background: var(--background-fill-secondary); }
figure { display: grid; grid-template-columns: 11rem 1fr; gap: .2rem 1rem; align-items: center; margin: 0 0 .8rem; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption small { flex-basis: 100%; font-size: .85rem; opacity: .8; }
.film { position: relative; overflow: hidden; aspect-ratio: var(--ratio); background: black; }
.film img { display: block; width: 100%; max-width: none; image-rendering: pixelated;
  transform: translateY(calc(-100% * var(--step) / var(--states))); }
.film i { position: absolute; top: 0; bottom: 0; width: calc(100% / var(--columns));
  left: calc(100% * var(--column) / var(--columns)); border: 2px solid #f0a020; }
@media (max-width: 640px) { figure { grid-template-columns: 1fr; } figcaption small { flex-basis: auto; } }
"""

# Gradio's layout: a readable width, no padding around plain HTML, and line breaks in long paths.
FRAME_CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
label, label span { min-width: 0; overflow-wrap: anywhere; }
"""

# The page holds all states of the images, so playing them needs no request to the server.
SCRIPT = """
let timer;
const find = (selector) => element.querySelector(selector);
const show = (step) => {
  const slider = find("input");
  slider.value = step;
  find("section").style.setProperty("--step", slider.value);
  find("output").textContent = `Step ${slider.value} of ${slider.max}`;
};
const stop = () => { timer = clearInterval(timer); find(".play").textContent = "Play"; };
const advance = () => {
  const slider = find("input");
  if (slider.value === slider.max) stop(); else show(Number(slider.value) + 1);
};
element.addEventListener("input", (event) => { stop(); show(event.target.value); });
element.addEventListener("click", (event) => {
  if (!event.target.closest(".play")) return;
  if (timer) return stop();
  const slider = find("input");
  if (slider.value === slider.max) show(0);
  event.target.textContent = "Stop";
  timer = setInterval(advance, 150);
});
"""

EXPLANATION = """# Digits at every bit-width

A teacher in full precision and its low-bit students draw from the same noise, column by column. Move the slider to see
them come out of it. A framed image shows another digit than the teacher's, to the eye of a classifier.
"""


def make_page(config: DemoConfig) -> Any:
    """Return the page, a `gradio.Blocks`; raise InputError if gradio is not installed."""
    try:
        import gradio as gr
    except ImportError as error:
        raise InputError("the page needs gradio: pip install 'efficientdm[demo]'") from error
    player = Player(config)

    def draw(students: list[str], seed: str) -> tuple[Any, Any]:
        try:
            return gr.HTML(visible=False), player.draw(students, seed)
        except InputError as error:
            return gr.HTML(f'<p role="alert">{escape(str(error))}</p>', visible=True), gr.skip()

    def draw_new(students: list[str]) -> tuple[Any, Any, Any]:
        seed = player.random_seed()
        return seed, *draw(students, seed)

    with gr.Blocks(title="Digits at every bit-width", analytics_enabled=False) as page:
        gr.Markdown(EXPLANATION)
        with gr.Row(equal_height=True):
            students = gr.CheckboxGroup(config.students, value=config.students, label="Students", scale=3)
            seed = gr.Textbox(str(config.seed), label="Seed", max_lines=1, max_length=20, min_width=120)
        with gr.Row():
            button = gr.Button("Draw", variant="primary", min_width=120)
            new = gr.Button("New noise", min_width=120)
        message = gr.HTML(visible=False, css_template="p { color: var(--error-text-color); font-weight: 600; }")
        pictures = gr.HTML(css_template=CSS, js_on_load=SCRIPT)
        # One request at a time: concurrent ones would share the processor and distort the timings.
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "draw"}
        gr.on([page.load, button.click, seed.submit], draw, [students, seed], [message, pictures], **options)
        new.click(draw_new, [students], [seed, message, pictures], **options)
    return page


def launch(page: Any, config: DemoConfig) -> str:
    """Serve `page` in the background and return its URL; raise InputError if host and port cannot be used."""
    import gradio as gr

    try:
        with socket.create_server((config.host, config.port)) as server:
            port = server.getsockname()[1]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the page cannot be served at {config.host}, port {config.port}: {reason}") from error
    # Gradio requests the page once to check that it is reachable; this must not go through a proxy.
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), config.host]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, direct))
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=config.host, server_port=port, theme=theme, css=FRAME_CSS,
        share=False, ssr_mode=False, run_history=False, enable_monitoring=False, footer_links=[], quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    return address


def serve(config: DemoConfig) -> None:
    """Serve a page that draws digits with teacher and students, until Ctrl-C."""
    page, player = make_page(config), Player(config)
    for argument in config.students:
        player.load(argument)  # raises for an invalid model before the page is served
    print(f"{launch(page, config)} shows the page; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
