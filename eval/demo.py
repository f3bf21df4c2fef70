"""A page to play with: a row of digits per bit-width from the same noise, and how they come about step by step."""

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
    """The model whose digits the others are compared with: a released name, or a folder of diffusers."""
    columns: int = 10
    """Images per row, 1 to 50."""
    seed: int = 0
    """The first row's: column i starts from the noise of seed + i, 0 to 2^31 - columns."""
    runtime: str = "integer"
    """How a student runs: "integer", or "simulated" in float."""
    host: str = "127.0.0.1"
    """Where the page is served, an IPv4 address of this machine. 127.0.0.1: to this machine alone, 0.0.0.0: to all who
    can reach it."""
    port: int = 7860
    """0 to 65535; 0: a free one."""

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
        """What each model is asked to draw."""
        sampler = {field.name: getattr(self, field.name) for field in fields(SamplerConfig)}
        return DrawConfig(**sampler, num_images=self.columns, seed=seed, runtime=self.runtime)


class Film(NamedTuple):
    """A model's images of one drawing, and how they came about."""

    model: Model
    states: Tensor
    """uint8 (T + 1, N, H, W) or (T + 1, N, H, W, C): the noise, then the state after each denoising step."""
    milliseconds: float
    """Per image, all of the row at once."""

    @property
    def images(self) -> Tensor:
        """uint8 (N, H, W) or (N, H, W, C)."""
        return self.states[-1]


@plain_torch()
def film(model: Model, drawing: DrawConfig) -> Film:
    """Draw `drawing.num_images` images at once and keep every state."""
    seeds = range(drawing.seed, drawing.seed + drawing.num_images)
    start = time.perf_counter()
    steps = list(denoise(model.denoiser, model.solver(drawing), seeds, model.denoiser.device))
    images = to_uint8(steps[-1].x_next)
    seconds = time.perf_counter() - start
    states = torch.stack([*(to_uint8(step.x) for step in steps), images])
    return Film(model, states, 1000 * seconds / len(images))


class Player:
    """What the page asks for, as HTML."""

    def __init__(self, config: DemoConfig):
        self.config = config
        self._load = cache(self.load)

    def load(self, argument: str) -> Model:
        """The model, warmed up; InputError unless it can draw with the config, images of the teacher's shape."""
        model = load_model(argument, self.config.runtime)
        model.check_pictures()
        solver = model.solver(self.config)
        if argument != self.config.teacher and model.shape != (shape := self._load(self.config.teacher).shape):
            raise InputError(f'"{argument}" draws images of {model.shape}, "{self.config.teacher}" of {shape}')
        # The first step allocates and chooses kernels: the others are what is timed.
        next(denoise(model.denoiser, solver, range(self.config.columns), model.denoiser.device))
        return model

    def draw(self, students: list[str], seed: str) -> str:
        """A row of the teacher, and one of each of `students`.

        Raises:
            InputError: no student, no such seed, or a model that cannot be loaded.
        """
        if not students:
            raise InputError("Choose at least one student.")
        drawing = self.config.drawing(parse_seed(seed, self.config.columns))
        models = [self._load(argument) for argument in (self.config.teacher, *students)]
        return rows([film(model, drawing) for model in models])

    def random_seed(self) -> str:
        return str(random.randrange(SEED_LIMIT - self.config.columns + 1))


def parse_seed(text: str, num_images: int) -> int:
    """The seed in `text`; InputError unless it and those of the images after it are seeds."""
    last = SEED_LIMIT - num_images
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or int(text) > last:
        raise InputError(f"The seed must be a whole number from 0 to {last}, not “{text.strip()}”.")
    return int(text)


def rows(films: list[Film]) -> str:
    """The films as HTML, one under the other, the teacher's first; a frame around what shows another digit than its."""
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
    """States uint8 (T + 1, N, H, W) or (…, C) as one picture, a strip of images under the other: a data URL."""
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

# Gradio's own frame: as wide as is read well, no room around what is plain HTML, and the paths of folders break.
FRAME_CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
label, label span { min-width: 0; overflow-wrap: anywhere; }
"""

# Of each drawing the whole film is in the page: nothing is asked of the server while it runs.
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
    """The page, a `gradio.Blocks`; InputError where gradio is not installed."""
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
        # One at a time, whoever asks: two would share the processor, and each other's milliseconds.
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "draw"}
        gr.on([page.load, button.click, seed.submit], draw, [students, seed], [message, pictures], **options)
        new.click(draw_new, [students], [seed, message, pictures], **options)
    return page


def launch(page: Any, config: DemoConfig) -> str:
    """Serve `page` in the background and return its address; InputError where nothing can be served there."""
    import gradio as gr

    try:
        with socket.create_server((config.host, config.port)) as server:
            port = server.getsockname()[1]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the page cannot be served at {config.host}, port {config.port}: {reason}") from error
    # Gradio asks the page once whether it is there; a proxy would not know it.
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
        player.load(argument)  # refuses what is no model, before the page is there
    print(f"{launch(page, config)} shows the page; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
