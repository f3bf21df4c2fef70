"""What README.md and docs/ promise: their links lead somewhere, their commands exist, their programs run."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import finetune.unet
import quant
from ddpm_mnist.lab import command
from ddpm_mnist.sampling.solver import SamplerConfig
from eval.exactness import flipped_shares
from eval.models import load_model
from finetune import cli
from finetune.config import RunConfig
from finetune.distill import DistillConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def prose(page):
    return FENCE.sub("", page.read_text())


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]*)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target


def test_every_picture_of_the_pages_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    assert not [path.name for path in (ROOT / "docs").glob("*.png") if f"]({path.name})" not in text]


def tables(page):
    """The head and the rows of each of a page's tables, cell by cell."""
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), flags=re.MULTILINE):
        head, _, *rows = ([cell.strip(" *`") for cell in line.strip("|").split("|")] for line in table.splitlines())
        yield head, rows


@pytest.mark.parametrize(
    ("page", "written", "columns"),
    [
        ("README.md", "released", ("FID", "FID, second network", "same digit", "FID to teacher")),
        ("docs/results.md", "released", ("distillations", "FID", "same digit", "FID to teacher")),
        ("docs/results.md", "ladder", ("FID", "ratio", "FID, second network", "same digit", "FID to teacher")),
        ("docs/experiments/reconstruction.md", "ladder", ("FID", "ratio", "same digit", "FID to teacher")),
    ],
)
def test_scores_are_those_that_the_ladder_wrote(page, written, columns):
    def scores(path):
        found = [table for table in tables(path) if set(columns) <= set(table[0])]
        return {
            row[0].split(" (")[0]: [row[head.index(name)] for name in columns] for head, rows in found for row in rows
        }

    measured = scores(ROOT / "docs" / written / "ladder.md")
    measured["w4a4"] = measured["full"]  # the released one's rung
    told = scores(ROOT / page)
    assert told
    assert not {name: score for name, score in told.items() if score != measured.get(name)}


def test_speeds_are_those_that_the_benchmark_wrote():
    measured, told = [], []
    for page in ("bench.md", "bench-avx2.md"):
        measured += [list(map(float, row[2:-2])) for _, rows in tables(ROOT / "docs" / page) for row in rows]
    for head, rows in tables(ROOT / "docs" / "integers.md"):
        if head[0] == "runtime":
            told += [list(map(float, row[1:])) for row in rows]
    assert told
    assert not [row for row in told if row not in measured]


def commands():
    """The command lines in the pages' sh fences, and those in the midst of a text that begin with a program."""
    found = {}
    for page in PAGES:
        lines = []
        for language, code in FENCE.findall(page.read_text()):
            if language == "sh" and not code.startswith("#!"):
                lines += code.replace("\\\n", " ").splitlines()
        for code in re.findall(r"`([^`]+)`", prose(page)):
            if re.match(r"([A-Z_]+=\S+\s+)*(\S*/)?(efficientdm|python|pip|make) ", code):
                lines.append(code)
        for line in lines:
            if words := shlex.split(line, comments=True):
                found[shlex.join(words)] = words
    return list(found.values())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_a_command_exists_with_its_options(words, monkeypatch, capsys):
    parse = command.run_command
    monkeypatch.setattr(
        command, "run_command", lambda prog, function, *others: parse(prog, lambda config: None, *others)
    )
    monkeypatch.chdir(ROOT)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] in ("accelerate", "torchrun"):  # their own options, then a module or a program
        words = ["python", *words[words.index("-m") :]] if "-m" in words else words[words.index("efficientdm") :]
    if words[0] in ("efficientdm", "python") and not any(word.startswith("--") for word in words):
        words = [*words, "--help"]  # what is no more than a name
    monkeypatch.setattr(sys, "argv", words)
    match Path(words[0]).name, *words[1:]:
        case "efficientdm", *_:
            assert exit_code(cli.main) == 0, capsys.readouterr().err
        case "python", script if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case "python", "-m", module, *arguments:
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            assert exit_code(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)) == 0, (
                capsys.readouterr().err
            )
        case "make", *targets:
            rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert set(targets) <= set(" ".join(rules).split())
        case "pip", "install", *arguments:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            wanted = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[-1])
            assert wanted
            assert wanted[1] is None or wanted[1] in extras
        case _:
            assert words == ["source", ".venv/bin/activate"]


def exit_code(program):
    try:
        program()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_one_call_makes_a_student_of_an_own_unet(tmp_path, monkeypatch):
    (code,) = [code for language, code in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"]
    assert len(code.splitlines()) <= 12
    own = UNet2DModel(8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = DDPMPipeline(own, DDPMScheduler())
    small = RunConfig(
        num_trajectories=2, calibration_trajectories=2, sampler=SamplerConfig(num_steps=2),
        distill=DistillConfig(num_updates=1, batch_size=2, rollout_steps=2),
    )  # fmt: skip
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", lambda name: pipeline)
    monkeypatch.setattr(finetune.unet, "RunConfig", lambda: small)
    monkeypatch.chdir(tmp_path)
    result: dict = {}
    exec(code, result)
    x = torch.randn(2, 3, 8, 8)
    saved = quant.QuantizedUNet.from_pretrained("my-student")
    assert torch.equal(saved(x, 500).sample, result["student"](x, 500).sample)
    assert result["integer"](x, 500).sample.shape == x.shape
    assert load_model("my-student").schedule.num_train_timesteps == 1000


def test_an_own_unet_is_distilled_step_by_step_and_runs_on_integers(tmp_path, monkeypatch):
    before, *_ = (ROOT / "docs" / "own-models.md").read_text().partition("## Its schedule")
    code = "\n".join(code for language, code in FENCE.findall(before) if language == "python")
    torch.manual_seed(0)
    own = UNet2DModel(
        8, block_out_channels=(16,), norm_num_groups=8, layers_per_block=1, mid_block_type=None,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda name: own)
    monkeypatch.setattr(DDIMScheduler, "from_pretrained", lambda name: DDIMScheduler())
    monkeypatch.chdir(tmp_path)
    smaller = {"set_timesteps(20)": "set_timesteps(3)", "range(500)": "range(12)", "64": "8", "3, 32, 32": "3, 8, 8"}
    for large, small in smaller.items():
        assert large in code
        code = code.replace(large, small)
    result: dict = {}
    exec(code, result)
    t, x = min(result["states"].items())
    frozen, integer = result["frozen"](x, t).sample, result["integer"](x, t).sample
    assert torch.equal(quant.QuantizedUNet.from_pretrained(tmp_path / "my-student")(x, t).sample, frozen)
    # An image in which no code falls to the other side of a border is equal but for rounding. In this network, which
    # has learned next to nothing, one code that does moves its whole image by some hundredths; so it is within the
    # simulation, when sums are added in another order. From equal inputs hardly any code does.
    errors = (integer - frozen).square().mean((1, 2, 3)) / frozen.square().mean()
    assert errors.min() < 1e-8
    shares = flipped_shares(result["frozen"], x, t).values()
    assert max(shares) < 1e-3
    assert sum(shares) < 1e-4 * len(shares)
    with torch.no_grad():
        of_quantization = (frozen - own(x, t).sample).square().mean() / frozen.square().mean()
    assert errors.mean() < of_quantization
    assert result["loss"] < frozen.square().mean() / 4


class Fetched(HTMLParser):
    """The addresses that a page fetches when it is looked at; not those that it links to."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        if tag != "a":
            self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_fetches_nothing_from_elsewhere(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) - 1  # one per page of docs/, and that of a missing one
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text())
        assert fetched.addresses
        for address in fetched.addresses:
            assert not re.match(r"(\w+:)?//", address), f"{page.name}: {address}"
