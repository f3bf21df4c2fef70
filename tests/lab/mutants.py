"""Files that lie: mutants of every file that is read back, and what becomes of each.

A mutant must be refused in one line (`InputError`, or exit code 2 with one line on stderr), or be read because what it
says is still right; nothing else may come of it: no other exception, no crash, no code of its own, and not more than
twice the memory that the honest file takes. test_files.py beside this one tries a few hundred; `python
tests/lab/mutants.py --count 20000` tries as many as you like, in processes of their own, and prints what became of
them.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from ddpm_mnist.data import load_images
from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.run_state import RunState, read_log
from ddpm_mnist.sampling.sampler import sample
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.train import TeacherConfig, train_teacher
from ddpm_mnist.unet import UNetConfig, make_unet, save_teacher
from eval import features
from eval.bench.memory import peak_memory
from eval.grid import recorded_fid
from eval.models import load_model
from eval.sample import DrawConfig
from finetune import ladder
from finetune.config import RunConfig
from finetune.distill import DistillConfig, distill
from finetune.trajectories import make_trajectories
from quant import QuantConfig, calibrate, freeze, quantize

TINY = UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
CANARY = "EFFICIENTDM_CANARY"  # the file that hostile code would make
SLACK = 24.0  # MiB: what the allocator and Python's own caches may take beside

# What stands in the place of an honest value. The texts of the second half are JSON as it is.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    99,
    255,
    10**6,
    10**9,
    10**12,
    2**63,
    -(10**12),
    0.5,
    -0.5,
    1e-30,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "..",
    "../../../../etc/passwd",
    "/dev/zero",
    "a\nb",
    "a\0b",
    "\x1b[2J",
    "x" * 3000,
    "teacher",
    "ddim",
    [],
    {},
    [1],
    [10**12],
    [10**6, 10**6],
    [0, 10**12],
    [-1, -1],
    ["a"],
    [[1]],
    {"a": 1},
    {"..": {}},
    [1] * 2000,
    {"class_path": "this.Foo", "init_args": {}},
]
RAW = [
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "1e999",
    "[" * 4000 + "]" * 4000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "NaN",
    "-Infinity",
]


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of nested dicts and lists in which one value is another, missing, or under another name."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(["..", "../x", "", "x" * 500, "a.b", "class_path", "quantization_config"])] = holder[key]
        case 2:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name]) if other is not holder else rng.choice(VALUES)
        case 3 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice([-1, 2, 10, 1000]) + rng.choice([0, 1, -1])
        case _:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any) -> Any:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def mutate_json(rng: random.Random, text: str) -> str:
    tree = json.loads(text)
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, text.encode()).decode(errors="surrogateescape")
    text = json.dumps(mutate_tree(rng, tree), indent=2)
    if kind == 1:  # what json.dumps does not write
        lines = text.splitlines()
        at = [i for i, line in enumerate(lines) if ": " in line]
        if at:
            row = rng.choice(at)
            name, _, _ = lines[row].partition(": ")
            lines[row] = (
                f"{lines[row].rstrip(',')},\n{lines[row]}" if rng.random() < 0.3 else f"{name}: {rng.choice(RAW)},"
            )
            text = "\n".join(lines)
    return text


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 8, 100])
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.choice([b"\0", b"\xff"]) * length
            case 2:
                del data[at:]
            case 3:
                data += rng.randbytes(length)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[max(0, at - length) : at]
            case _:
                data[at : at + length] = rng.randbytes(length)
    return bytes(data)


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    size = struct.unpack("<Q", content[:8])[0]
    header, payload = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    start, end = header[name]["data_offsets"]
    kind = rng.randrange(6)
    if kind == 0:
        header[name]["dtype"] = rng.choice(
            ["F64", "F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "X"]
        )
    elif kind == 1:
        header[name]["shape"] = rng.choice([[], [0], [10**12], [0, 10**12], [1] * 70, [-1], [2**62, 4], [end - start]])
    elif kind == 2:
        header[rng.choice(["..", "../../x", "a\nb", "x" * 1000])] = header.pop(name)
    elif kind == 3:
        header = mutate_tree(rng, header)
    else:
        width = {"F16": 2, "F32": 4, "F64": 8, "I64": 8}.get(header[name]["dtype"], 1)
        form = {2: "<e", 4: "<f", 8: "<d"}.get(width, "<b")
        value = (
            rng.choice([float("nan"), float("inf"), 0.0, -1.0, 6e4, 1e-7]) if width > 1 else rng.choice([-128, 127, -1])
        )
        at = start + width * rng.randrange(max(1, (end - start) // width))
        payload[at : at + width] = struct.pack(form, value)
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + bytes(payload)


class _Hostile:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ.get(CANARY, '/nonexistent/canary')}",)


def mutate_state(rng: random.Random, content: bytes) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, content)
    if kind == 1:
        return pickle.dumps(_Hostile())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    if kind in (2, 3):  # sums are right, what they stand for is not
        name = rng.choice([name for name in records if name.endswith(".pkl")] if kind == 2 else list(records))
        records[name] = pickle.dumps(_Hostile()) if rng.random() < 0.1 else mutate_bytes(rng, records[name])
        if rng.random() < 0.2:
            records[f"{name}/../../x"] = records.pop(rng.choice(list(records)))
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
        return whole.getvalue()
    tree = torch.load(io.BytesIO(content), weights_only=True)
    places = [place for place in _places(tree) if isinstance(place[0][place[1]], torch.Tensor)]
    if kind == 4 and places:
        holder, key = rng.choice(places)
        x = holder[key]
        holder[key] = rng.choice(
            [
                x * float("nan"),
                x.double(),
                x.flatten()[:1],
                x.new_zeros(1).expand(10**12),
                x.reshape(-1, 1),
                x.to("meta"),
                x.to_sparse() if x.dim() else x,
                nn.Parameter(x.float()),
                x.bool(),
                x.new_zeros(0),
                x.new_zeros((0, 10**9)),
            ]
        )
    else:
        tree = mutate_tree(rng, tree)
    whole = io.BytesIO()
    torch.save(tree, whole)
    return whole.getvalue()


def mutate_yaml(rng: random.Random, text: str) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, text.encode()).decode(errors="surrogateescape")
    if kind == 1:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"b{i}: &b{i} [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 9)}]\n" for i in range(9)
        )
        hostile = [
            bomb,
            "seed: 1\nseed: 2\n",
            "student: &s {rank: *s}\n",
            "a: " + "[" * 3000,
            "? [a]\n: 1\n",
            "- 1\n",
            "\t",
            "",
            f"teacher: !!python/object/apply:os.system ['touch {os.environ.get(CANARY)}']\n",
            "config: x.yaml\n",
            "student: !!set {a}\n",
            "student.rank: 4\n",
            "seed: 2001-01-01\n",
            "sampler: {num_steps: '&a [*a]'}\n",
        ]
        return rng.choice(hostile) + (text if rng.random() < 0.5 else "")
    return yaml.safe_dump(mutate_tree(rng, yaml.safe_load(text)))


def mutate_npy(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    body = content[10 + struct.unpack("<H", content[8:10])[0] :]
    shape = rng.choice(
        [
            "(10000000000000, 28, 28)",
            "(-1, 28, 28)",
            "(4, 28, 28)",
            "(4, 28)",
            "()",
            "(0, 28, 28)",
            "(2**70,)",
            "(4, 28, 28, 1)",
            "(4, 28, 28, 3)",
            "(True, 28, 28)",
            "(4.0, 28, 28)",
            "'abc'",
            "(" * 200 + ")" * 200,
        ]
    )
    descr = rng.choice(
        ["'|u1'", "'|u1'", "'<f8'", "'|O'", "'<U9999999'", "[('a', '|u1')]", "('|u1', (1000000000,))", "'m8[ns]'", "1"]
    )
    head = f"{{'descr': {descr}, 'fortran_order': {rng.choice(['False', 'True', '0'])}, 'shape': {shape}, }}".encode()
    body = rng.choice([body, pickle.dumps([_Hostile()]), b""])
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n" + body


def redigest(folder: Path) -> None:
    """Give a student's files the digest that they would have if they were honest."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        config = json.loads((folder / "config.json").read_text(errors="surrogateescape"))
        rest = {key: value for key, value in config.items() if key != "sha256"}
        weights = (folder / "model.safetensors").read_bytes()
        config["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode() + weights).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))


def redigest_ruler(folder: Path) -> None:
    """Give a ruler's statistics the digests of the networks that lie beside them."""
    for part in (folder, folder / "second"):
        with contextlib.suppress(ValueError, KeyError, TypeError, struct.error):
            content = (part / "reference.safetensors").read_bytes()
            size = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + size])
            digest = hashlib.sha256((part / "features.safetensors").read_bytes()).hexdigest()[:12]
            header["__metadata__"]["features"] = digest
            head = json.dumps(header).encode()
            (part / "reference.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])


class Target(NamedTuple):
    """A kind of folder that is read back."""

    files: dict[str, Callable[[random.Random, Any], Any]]
    """Which of its files are mutated, by which function; one that takes text is for JSON and YAML."""
    read: Callable[[Path], Any]
    share: int
    """Of how many mutants in all targets' sum."""
    after: Callable[[Path], None] = lambda folder: None
    """What is done to the folder after some of the mutations."""


def _student(unet: Any, solver: Solver) -> Any:
    buffer = make_trajectories(unet, solver, count=8, seed=0)
    student = quantize(unet, QuantConfig(rank=2), solver.timesteps.tolist())
    calibrate(student, {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps.tolist())})
    return student, buffer


class Targets:
    """The honest folders, made once below `root`, and how each is read."""

    def __init__(self, root: Path):
        self.root = root
        torch.manual_seed(0)
        unet, self.solver = make_unet(TINY).eval().requires_grad_(False), Solver(SamplerConfig(num_steps=3))
        save_teacher(unet, root / "teacher")
        unet.save_pretrained(root / "shards", max_shard_size="60KB")
        shards = [path.name for path in sorted((root / "shards").glob("*.safetensors"))]
        self.student, self.buffer = _student(unet, self.solver)
        freeze(self.student).save_pretrained(root / "student")
        shutil.copytree(root / "teacher" / "scheduler", root / "student" / "scheduler")
        self.distilling = DistillConfig(num_updates=1, batch_size=2)
        self.teacher = load_model(str(root / "teacher"))
        self._read_state(root / "state")
        (root / "log").mkdir()
        shutil.copy(root / "state" / "log.jsonl", root / "log")
        for folder in ("config", "npy", "picture"):
            (root / folder).mkdir()
        for name in ("quick", "ladder", "teacher"):
            shutil.copy(Path(__file__).parents[2] / "configs" / f"{name}.yaml", root / "config")
        shutil.copytree(features.PRETRAINED, root / "ruler")
        images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
        np.save(root / "npy" / "a.npy", images)
        for name in ("a.png", "a.bmp", "a.jpg"):
            Image.fromarray(images[0]).save(root / "picture" / name)
        self._read_rung(root / "rung")
        self._read_training(root / "training")
        self.all = {
            "student": Target(
                {
                    "config.json": mutate_json,
                    "model.safetensors": mutate_safetensors,
                    "scheduler/scheduler_config.json": mutate_json,
                },
                self._read_model,
                30,
                redigest,
            ),
            "teacher": Target(
                {
                    "unet/config.json": mutate_json,
                    "unet/diffusion_pytorch_model.safetensors": mutate_safetensors,
                    "scheduler/scheduler_config.json": mutate_json,
                    "model_index.json": mutate_json,
                },
                self._read_model,
                20,
            ),
            "shards": Target(
                {
                    "diffusion_pytorch_model.safetensors.index.json": mutate_json,
                    **dict.fromkeys(shards, mutate_safetensors),
                },
                self._read_model,
                5,
            ),
            "state": Target({"state/latest.pt": mutate_state, "log.jsonl": mutate_json_lines}, self._read_state, 12),
            "log": Target({"log.jsonl": mutate_json_lines}, lambda folder: read_log(folder / "log.jsonl"), 5),
            "config": Target(
                dict.fromkeys(("quick.yaml", "ladder.yaml", "teacher.yaml"), mutate_yaml), self._read_config, 4
            ),
            "ruler": Target(
                {
                    "features.safetensors": mutate_safetensors,
                    "reference.safetensors": mutate_safetensors,
                    "features.json": mutate_json,
                    "second/features.safetensors": mutate_safetensors,
                    "second/reference.safetensors": mutate_safetensors,
                },
                self._read_ruler,
                5,
                redigest_ruler,
            ),
            "training": Target(
                {"state/latest.pt": mutate_state, "log.jsonl": mutate_json_lines}, self._read_training, 4
            ),
            "rung": Target({"images.pt": mutate_state, "metrics.json": mutate_json}, self._read_rung, 10),
            "npy": Target({"a.npy": mutate_npy}, lambda folder: load_images(str(folder / "a.npy")), 10),
            "picture": Target(
                dict.fromkeys(("a.png", "a.bmp", "a.jpg"), mutate_bytes), lambda folder: load_images(str(folder)), 4
            ),
        }

    def _read_model(self, folder: Path) -> None:
        model = load_model(str(folder), "integer")
        solver = model.solver(DrawConfig(num_steps=3))
        if model.shape[1] * model.shape[2] <= 28 * 28:  # a larger image takes more, and rightly
            sample(model.denoiser, solver, 1)

    def _read_state(self, folder: Path) -> None:
        distill(
            copy.deepcopy(self.student),
            self.solver,
            self.buffer,
            self.distilling,
            RunState(folder, {"a": 1, "b": {"c": (1, 2)}}),
            0,
        )

    def _read_config(self, folder: Path) -> None:
        for name, config in {"quick": RunConfig, "ladder": ladder.LadderConfig, "teacher": TeacherConfig}.items():
            run_command("prog", lambda config: config, config, ["--config", str(folder / f"{name}.yaml")])

    def _read_training(self, folder: Path) -> None:
        data = str(self.root / "npy" / "a.npy")
        train_teacher(TeacherConfig(output=folder, data=data, unet=TINY, total_updates=1, batch_size=2))

    def _read_ruler(self, folder: Path) -> None:
        for cached in (features.features_digest, features.load_features, features.load_reference, features.load_ruler):
            cached.cache_clear()
        features.load_ruler(folder).extract(torch.zeros(2, 28, 28, dtype=torch.uint8))

    def _read_rung(self, folder: Path) -> None:
        drawing, ruler = DrawConfig(num_images=4, num_steps=2), features.load_ruler()
        images, _ = ladder._images(folder, self.teacher, drawing)
        score = ladder._score(folder, self.teacher, drawing, images, ruler)
        ladder.markdown(ladder.summarise_scores([score]), 4, 0, "dpm++")
        recorded_fid(dataclasses.replace(self.teacher, folder=folder), drawing)


def mutate_json_lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines() or ["{}"]
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, lines[at]).replace("\n", " ")
    return "\n".join(lines) + "\n"


class Verdict(NamedTuple):
    outcome: str
    """ "refused", "read", or what is wrong."""
    message: str
    mebibytes: float


def judge(read: Callable[[Path], Any], folder: Path) -> Verdict:
    """What becomes of reading a mutant."""
    said, outcome, message = io.StringIO(), "read", ""

    def step() -> None:
        nonlocal outcome, message
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                read(folder)
        except InputError as error:
            outcome, message = "refused", str(error)
        except SystemExit as error:
            outcome, message = (
                ("refused" if error.code == 2 else f"exit {error.code}"),
                said.getvalue().removesuffix("\n"),
            )
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, message = type(error).__name__, str(error)

    taken = peak_memory(step) or 0.0
    if outcome == "refused" and (not message or len(message.splitlines()) > 1 or len(message) > 1200):
        outcome = "not one line"
    return Verdict(outcome, message, taken)


def try_mutants(targets: Targets, names: list[str], seed: int, numbers: range) -> list[tuple[str, int, str, Verdict]]:
    """Each mutant of these numbers: its target, number, file and verdict."""
    weights, verdicts, honest = [targets.all[name].share for name in names], [], {}
    canary = Path(os.environ[CANARY])
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        name = rng.choices(names, weights)[0]
        target = targets.all[name]
        folder = targets.root / "mutant"
        if name not in honest:  # twice: the first reading fills caches
            honest[name] = [judge(target.read, _fresh(targets.root / name, folder)) for _ in range(2)][1]
            if honest[name].outcome != "read":
                raise AssertionError(f"the honest {name} is not read: {honest[name]}")
        _fresh(targets.root / name, folder)
        file = rng.choice(list(target.files))
        mutate, content = target.files[file], (folder / file).read_bytes()
        if mutate in (mutate_json, mutate_json_lines, mutate_yaml):
            content = mutate(rng, content.decode()).encode(errors="surrogateescape")
        else:
            content = mutate(rng, content)
        (folder / file).write_bytes(content)
        if rng.random() < 0.7:
            target.after(folder)
        verdict = judge(target.read, folder)
        if canary.exists():
            verdict = verdict._replace(outcome="ran code")
            canary.unlink()
        elif verdict.outcome in ("read", "refused") and verdict.mebibytes > 2 * honest[name].mebibytes + SLACK:
            verdict = verdict._replace(outcome=f"took {verdict.mebibytes} MiB, the honest one {honest[name].mebibytes}")
        verdicts.append((name, number, file, verdict))
    return verdicts


def _fresh(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--chunk", type=int, default=500, help="mutants of one process")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[CANARY] = f"{folder}/canary"
            with contextlib.redirect_stdout(io.StringIO()):
                targets = Targets(Path(folder))
            numbers = range(options.first, options.first + options.count)
            limit = 8 << 30  # a mutant that asks for more gets a MemoryError, not the machine
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            for name, number, file, verdict in try_mutants(
                targets, options.targets or list(targets.all), options.seed, numbers
            ):
                print(json.dumps([name, number, file, *verdict]), flush=True)
        return
    outcomes: Counter[str] = Counter()
    most: dict[str, float] = {}
    for first in range(options.first, options.first + options.count, options.chunk):
        count = min(options.chunk, options.first + options.count - first)
        words = [
            "--child",
            "--first",
            str(first),
            "--count",
            str(count),
            "--seed",
            str(options.seed),
            "--targets",
            *options.targets,
        ]
        child = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
        rows = [json.loads(line) for line in child.stdout.splitlines()]
        for name, number, file, outcome, message, mebibytes in rows:
            outcomes[f"{name}: {outcome if outcome in ('read', 'refused') else 'FAULT'}"] += 1
            most[name] = max(most.get(name, 0.0), mebibytes)
            if outcome not in ("read", "refused"):
                print(
                    f"FAULT seed {options.seed} number {number} {name}/{file}: {outcome}: {message[:300]!r}", flush=True
                )
        if child.returncode:
            print(f"FAULT: the process of {first}… ended with {child.returncode}: {child.stderr[-2000:]}")
        print(f"{outcomes.total():,} of {options.count:,} tried", file=sys.stderr, flush=True)
    for key, number in sorted(outcomes.items()):
        print(f"{key}: {number}")
    print("most memory, MiB:", most)
    total = sum(outcomes.values())
    print(f"{total} mutants, seed {options.seed}, numbers {options.first}…{options.first + options.count - 1}")
    sys.exit(total != options.count or any("FAULT" in key for key in outcomes))


if __name__ == "__main__":
    main()
