"""The ladder: an ablation study of the techniques and bit-widths, with one teacher and one feature network."""

import dataclasses
import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.locks import locked_folder
from ddpm_mnist.lab.read import read_json, read_state
from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.lab.write import prepare_output, write_bytes, write_json, write_text
from ddpm_mnist.sampling.sampler import to_uint8
from eval import plots
from eval.features import Ruler, load_ruler
from eval.fid import score_images
from eval.grid import fid_label
from eval.metrics import check_score
from eval.models import Model, load_model
from eval.sample import DrawConfig, draw, origin_of, stored_shape
from eval.table import Row, markdown, summarise_scores
from finetune.config import RunConfig, fingerprint
from finetune.make import check_student, distill_from, load_teacher, make_buffer, with_whole_batch
from finetune.run import act_step_sizes
from finetune.trajectories import MAX_SEED, Trajectories, make_trajectories
from quant import QuantizedUNet
from quant.context import plain_torch

Changes = dict[str, Any]
NO_TRAINING: Changes = {"distill.num_updates": 0}
# The paper does not train biases and normalisations.
FIXED: Changes = {"distill.lr_affine": 0.0}
PER_STEP: Changes = {"distill.objective": "per-step", **FIXED}
DENOISING: Changes = {"distill.objective": "denoising"}
# The last shortcut keeps its 8 bits, because the paper's code has all shortcuts in full precision.
PAPER: Changes = {"student.split_skips": False, "student.bias_correction": False}
PLAIN: Changes = {**PAPER, "student.per_step": False}
WEIGHTS: Changes = {"distill.learn": "weights"}


class Rung(NamedTuple):
    """One variant of the ablation: a student to train and score, or another rung's in another number of steps."""

    changes: Mapping[str, Any] = MappingProxyType({})
    """Fields of the base config that the rung changes, and their values."""
    update_factor: int = 1
    """Factor on the base's number of updates."""
    repeated: bool = False
    """Whether the student is distilled several times with different seeds (see `LadderConfig.seeds`)."""
    of: str = ""
    """Name of the rung whose student is scored; empty: the rung's own."""
    num_steps: int = 0
    """Denoising steps of the scored images; 0: the base's."""


def bits(weight_bits: float, act_bits: int) -> Changes:
    """Return the changes for these bit-widths."""
    return {"student.weight_bits": weight_bits, "student.act_bits": act_bits}


# All rungs in the order of the table; the full method is the base config itself.
RUNGS: dict[str, Rung] = {
    # Post-training quantization only; then the paper's three techniques, added one after another.
    "ptq-min-max": Rung({**NO_TRAINING, **PLAIN, "student.search": "min-max"}),
    "ptq-error": Rung({**NO_TRAINING, **PLAIN}),
    "ptq-error-per-step": Rung({**NO_TRAINING, **PAPER}),
    "ptq": Rung(NO_TRAINING),
    "qalora": Rung({**PER_STEP, **PLAIN, "distill.scale_aware": False}, repeated=True),
    "scale-aware": Rung({**PER_STEP, **PLAIN}, repeated=True),
    "talsq": Rung({**PER_STEP, **PAPER}, repeated=True),
    # Objectives, all starting from `ptq`.
    "denoising": Rung({**DENOISING, **FIXED}),
    "in-order": Rung({**PER_STEP, "distill.objective": "per-step-in-order"}),
    "per-step": Rung(PER_STEP, repeated=True),
    "rollout": Rung(FIXED, repeated=True),
    "full": Rung(repeated=True),
    # Each extension of the paper removed from `full`; without trained biases and normalisations it is `rollout`.
    "no-edge-shortcut": Rung({"student.edge_shortcut": False}, repeated=True),
    "no-split-skips": Rung({"student.split_skips": False}, repeated=True),
    "no-bias-correction": Rung({"student.bias_correction": False}, repeated=True),
    # `full` and `w2a4` without TALSQ.
    "one-scale": Rung({"student.per_step": False}, repeated=True),
    "w2a4-one-scale": Rung({**bits(2, 4), "student.per_step": False}, repeated=True),
    # Baselines.
    # Its learning rates are meant for 16,000 updates. Of the factors 0.3, 1, 2, 4 and 10, 2 has the lowest FID.
    "published": Rung({"recipe": "published", "lr_factor": 2.0, **PAPER}),
    "full-fine-tuning": Rung(WEIGHTS),
    "lsq": Rung({**WEIGHTS, **DENOISING}),
    "lsq-x10": Rung({**WEIGHTS, **DENOISING}, update_factor=10),
    # Bit-widths.
    "w8a8": Rung(bits(8, 8)),
    "w6a6": Rung(bits(6, 6)),
    "w4a8": Rung(bits(4, 8)),
    "w3a3": Rung(bits(3, 3)),
    "w2a8": Rung(bits(2, 8)),
    "w2a4": Rung(bits(2, 4), repeated=True),
    "w2a3": Rung(bits(2, 3)),
    "w2a2": Rung(bits(2, 2)),
    "w1.58a4": Rung(bits(1.58, 4)),
    "w1.58a2": Rung(bits(1.58, 2)),
    "w1a4": Rung(bits(1, 4)),
    # Numbers of steps: the student of `full` in fewer and more steps, then students trained for fewer steps.
    "full-10-steps": Rung(of="full", num_steps=10),
    "full-40-steps": Rung(of="full", num_steps=40),
    "for-10-steps": Rung({"sampler.num_steps": 10, "teacher_steps": 2}, num_steps=10),
    "for-5-steps": Rung({"sampler.num_steps": 5, "teacher_steps": 4}, num_steps=5),
}

# Seven steps from the teacher to the full method, and their rungs. A step may also change the calibration: step 3
# starts from ranges of minimal error, step 6 from split skips and corrected biases.
STEPS = {
    "step1": "teacher",
    "step2": "ptq-min-max",
    "step3": "qalora",
    "step4": "scale-aware",
    "step5": "talsq",
    "step6": "rollout",
    "step7": "full",
}

# Numbers of steps to score the teacher at, besides the base's.
TEACHER_STEPS = (5, 10, 40, 50)
# File of a rung's images, in the folder of its score.
IMAGES = "images.pt"
# Number of trajectories in the chart of errors.
PATHS = 64
# Number of trajectory buffers (of different seeds and samplers) kept in memory.
KEPT_BUFFERS = 3
# Rungs with figures of their step sizes and of the denoising of a digit.
SHOWN = ("ptq", "full", "w2a4")
# Rungs shown beside the full method in the chart of FID over bits.
BASELINES = ("ptq", "rollout", "published", "full-fine-tuning", "lsq", "lsq-x10")


@dataclass
class LadderConfig:
    output: Path = Path("runs/ladder")
    """Folder for the tables and figures, with a run folder per rung and seed."""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """Rungs (variants) to run, also by the names step1 to step7; "teacher": score the teacher only. Finished rungs are
    not run again."""
    seeds: int = 3
    """Distillations of each rung that has a standard deviation in the table, at least 1; other rungs have one."""
    teacher_steps: tuple[int, ...] = TEACHER_STEPS
    """Numbers of steps to score the teacher at, besides the base's, each at least 1."""
    base: RunConfig = field(default_factory=RunConfig)
    """The full method, which every rung changes in part. Its runtime and grid_columns apply to all rungs."""

    def __post_init__(self) -> None:
        named = self._named()
        unknown = [name for name in named if name not in (*RUNGS, "teacher")]
        if unknown:
            names = (*RUNGS, *STEPS, "teacher")
            near = difflib.get_close_matches(unknown[0], names, n=1)
            raise ValueError(
                f"no rung {unknown[0]}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}")
            )
        if not named or len(set(named)) < len(named):
            raise ValueError(f"rungs must name different rungs, at least one, not {list(self.rungs)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        if len(set(self.teacher_steps)) < len(self.teacher_steps):
            raise ValueError(f"teacher_steps must be different numbers, not {list(self.teacher_steps)}")
        for field_name in ("output", "recipe", "distill.objective", "distill.learn"):
            if attrgetter(field_name)(self.base) != attrgetter(field_name)(RunConfig()):
                raise ValueError(f"base.{field_name} must be left out: each rung has its own")
        # Validate the configs of all rungs before the first one runs.
        for num_steps in self.teacher_steps:
            if num_steps < 1:
                raise ValueError(f"teacher_steps must be at least 1, not {num_steps}")
            _drawing(self.base, num_steps)
        for name in self.students:
            for number in self.distillations(name):
                rung_config(self.base, name, self.output, number)

    def _named(self) -> list[str]:
        return [STEPS.get(name, name) for name in self.rungs]

    @property
    def students(self) -> list[str]:
        """Names of the rungs in `RUNGS`, without the teacher."""
        return [name for name in self._named() if name != "teacher"]

    def distillations(self, name: str) -> range:
        """Return the numbers of the rung's distillations, from 0."""
        return range(self.seeds if RUNGS[name].repeated else 1)


@plain_torch()
def climb(config: LadderConfig) -> Path:
    """Run an ablation study: train and score the student of every rung; write figures and a table, and return its path.

    All rungs have the same number of network evaluations per update. Their images are compared with the teacher's in
    the base's number of steps.

    Several processes sample the teacher's images together, then each trains and scores whole students, with the same
    results as one process. All processes must share the file system of the folder.

    Raises:
        InputError: the teacher does not exist, or a rung's folder belongs to another configuration.
    """
    teacher, ruler = load_teacher(config.base.teacher), load_ruler(config.base.features)
    _check_rungs(config, teacher, ruler)
    prepare_output(config.output / "ladder.json")
    with locked_folder(config.output):
        reference, _ = _images(config.output / "teacher", teacher, _drawing(config.base, 0))
        ladder = _Ladder(config, teacher, ruler, reference)
        if processes.count() > 1:  # `collect` then reads every score from its file
            ladder.share_out()
        return processes.from_main(ladder.collect)


def _check_rungs(config: LadderConfig, teacher: Model, ruler: Ruler) -> None:
    """Raise InputError for settings that a rung would refuse, before the first one runs."""
    base = config.base
    if ruler.reference is None or not ruler.fits(stored_shape(teacher)):
        raise InputError(
            f"the ruler {ruler.digest} has no FID of images of {teacher.shape}: base.features names another"
        )
    for num_steps in (0, *config.teacher_steps):
        teacher.solver(_drawing(base, num_steps))
    for name in config.students:
        check_student(rung_config(base, name, config.output), teacher)
        teacher.solver(_drawing(base, RUNGS[name].num_steps))


class _Ladder:
    """Trains and scores the unfinished rungs of a ladder.

    Args:
        reference: the teacher's images in the base's number of steps, with which all others are compared.
    """

    def __init__(self, config: LadderConfig, teacher: Model, ruler: Ruler, reference: torch.Tensor):
        self.config, self.teacher, self.ruler, self.reference = config, teacher, ruler, reference
        self._buffers: dict[tuple[Any, ...], Trajectories] = {}

    def score_teacher(self, num_steps: int) -> dict[str, Any]:
        """Score the teacher in `num_steps` steps; 0: the base's."""
        name = f"teacher-{num_steps}-steps" if num_steps else "teacher"
        model = dataclasses.replace(self.teacher, name=name)
        return self._score(self.config.output / name, model, num_steps)

    def score_student(self, name: str, number: int) -> dict[str, Any]:
        """Train distillation `number` of the rung's student, unless its folder contains it, and score it."""
        rung, base = RUNGS[name], self.config.base
        made = rung.of or name
        folder = self.config.output / name / str(base.seed + number)
        print(f"Rung {name}, seed {base.seed + number}.")
        config = with_whole_batch(rung_config(base, made, self.config.output / made / folder.name, number))
        if (config.output / "state").exists():
            RunState(config.output, fingerprint(config, self.teacher)).finish()  # raises if the settings differ
        if not (config.output / "config.json").exists():
            _, state = distill_from(self.teacher, config, self._buffer(config))
            state.finish()
        student = dataclasses.replace(load_model(str(config.output), config.runtime), name=name)
        return {**self._score(folder, student, rung.num_steps), "distillation_seed": config.seed}

    def share_out(self) -> None:
        """Distribute the distillations and their scores over the processes."""
        jobs = [[partial(self.score_teacher, num_steps)] for num_steps in (0, *self.config.teacher_steps)]
        for names, number in _students(self.config):
            jobs.append([partial(self.score_student, name, number) for name in names])
        processes.share_out(lambda scores: [score() for score in scores], jobs)

    def collect(self) -> Path:
        """Score all rungs, write the tables and figures, and return the path of the table."""
        config = self.config
        scores = [self.score_teacher(num_steps) for num_steps in (0, *config.teacher_steps)]
        if not config.students:
            _write_tables(config, scores)
        for name in config.students:
            scores += [self.score_student(name, number) for number in config.distillations(name)]
            _write_tables(config, scores)
        _write_pictures(config, self.teacher, scores)
        table = config.output / "ladder.md"
        print(table.read_text("utf-8"))
        return table

    def _score(self, folder: Path, model: Model, num_steps: int) -> dict[str, Any]:
        return _score(folder, model, _drawing(self.config.base, num_steps), self.reference, self.ruler)

    def _buffer(self, config: RunConfig) -> Trajectories:
        """Return the training trajectories of `config`; the last `KEPT_BUFFERS` are cached."""
        key = (*dataclasses.astuple(config.teacher_sampler), config.teacher_steps, config.seed)
        if key not in self._buffers:
            while len(self._buffers) >= KEPT_BUFFERS:
                del self._buffers[next(iter(self._buffers))]
            self._buffers[key] = make_buffer(config, self.teacher)
        return self._buffers[key]


def _students(config: LadderConfig) -> list[tuple[list[str], int]]:
    """Return every distillation of the ladder, the longest first: the rungs that score its student, and its number."""
    students: dict[tuple[str, int], list[str]] = {}
    for name in config.students:
        for number in config.distillations(name):
            students.setdefault((RUNGS[name].of or name, number), []).append(name)

    def work(student: tuple[str, int]) -> int:
        return rung_config(config.base, student[0], config.output).distill.num_updates

    return [(students[student], student[1]) for student in sorted(students, key=work, reverse=True)]


def rung_config(base: RunConfig, name: str, output: Path, number: int = 0) -> RunConfig:
    """Return `base` with the changes of the rung, for its distillation `number`."""
    changes = dict(RUNGS[name].changes)
    if changes.get("distill.objective", "rollout") != "rollout" or "recipe" in changes:
        changes["distill.batch_size"] = base.distill.batch_size * base.distill.rollout_steps
    if "distill.num_updates" not in changes:
        changes["distill.num_updates"] = base.distill.num_updates * RUNGS[name].update_factor
    parts: dict[str, Changes] = {"student": {}, "distill": {}, "sampler": {}}
    own: Changes = {"output": output, "seed": base.seed + number}
    for key, value in changes.items():
        part, _, field_name = key.rpartition(".")
        (parts[part] if part else own)[field_name] = value
    nested = {part: dataclasses.replace(getattr(base, part), **values) for part, values in parts.items()}
    return dataclasses.replace(base, **own, **nested)


def _drawing(base: RunConfig, num_steps: int) -> DrawConfig:
    """Return the config for sampling a rung's images in `num_steps` steps; 0: the base's."""
    sampler = dataclasses.asdict(base.sampler)
    return DrawConfig(
        **{**sampler, "num_steps": num_steps or base.sampler.num_steps},
        num_images=base.num_images,
        seed=base.score_seed,
        batch_size=base.batch_size,
        runtime=base.runtime,
    )


def _images(folder: Path, model: Model, drawing: DrawConfig) -> tuple[torch.Tensor, float]:
    """Return the model's images and the seconds to sample them, from `folder` if they were sampled before."""
    path, origin = folder / IMAGES, origin_of(model, drawing)
    if not processes.from_main(path.exists):
        images, seconds = draw(model, drawing)
        content = io.BytesIO()
        torch.save({"images": images, "seconds": seconds, **origin}, content)
        write_bytes(path, content.getvalue())
    try:
        saved = processes.from_main(lambda: read_state(path))
        then = {name: saved.get(name) for name in origin}
        images, seconds = saved["images"], saved["seconds"]
        if images.dtype != torch.uint8 or images.shape != (drawing.num_images, *stored_shape(model)):
            raise ValueError(f"it holds {images.dtype} {tuple(images.shape)}")
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"they took {seconds} seconds")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no images of a rung: delete it ({error})") from error
    for name, now in origin.items():
        if then[name] != now:
            raise InputError(f"{path} was drawn with {name} = {then[name]}, now it is {now}: delete it")
    return images, seconds


def _score(folder: Path, model: Model, drawing: DrawConfig, reference: torch.Tensor, ruler: Ruler) -> dict[str, Any]:
    """Return the model's score against the teacher's images `reference`, from `folder` if it was computed before."""
    path, origin = folder / "metrics.json", origin_of(model, drawing)
    if not path.exists():
        images, seconds = _images(folder, model, drawing)
        score = dataclasses.asdict(score_images(model, images, seconds, reference, drawing, ruler))
        write_json(path, {**score, **origin})
    try:
        score = read_json(path)
        check_score(score)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no score: delete it ({error})") from error
    second = ruler.second.digest if ruler.second else "none"
    for name, now in {"features": ruler.digest, "features_second": second, **origin}.items():
        if (then := score.get(name)) != now:
            raise InputError(f"{path} has {name} = {then}, now it is {now}: delete it to score anew")
    return score


def _write_tables(config: LadderConfig, scores: list[dict[str, Any]]) -> None:
    base = config.base
    write_json(config.output / "ladder.json", scores)
    steps = {rung: step for step, rung in STEPS.items()}
    factor = "" if scores[0]["eps_scale"] == 1 else f", ε × {scores[0]['eps_scale']:g}"
    solver = base.sampler.solver + factor
    text = markdown(summarise_scores(scores), base.num_images, base.score_seed, solver, steps)
    write_text(config.output / "ladder.md", text)


def _write_pictures(config: LadderConfig, teacher: Model, measured: list[dict[str, Any]]) -> None:
    """Write the figures, which show the first distillation of every rung."""
    base, folder, rows = config.base, config.output, summarise_scores(measured)

    def place(row: Row) -> Path:
        return folder / row.name if row.bits == "32" else folder / row.name / str(base.seed)

    grid, widths, paths, digit = [], [], {}, []
    for row in rows:
        rung = RUNGS.get(row.name, Rung())
        made = folder / (rung.of or row.name) / str(base.seed)
        model = teacher if row.bits == "32" else load_model(str(made), base.runtime)
        images, _ = _images(place(row), model, _drawing(base, row.num_steps))
        steps = "" if row.num_steps == base.sampler.num_steps else f", {row.num_steps} steps"
        mean = "mean " if row.count > 1 else ""
        scores = fid_label(row.fid, base.num_images, None if row.bits == "32" else row.same_digit)
        grid.append((f"{row.name} · {row.bits}{steps}\n{mean}{scores}", images[: base.grid_columns]))
        if row.name == "teacher" or (plots.is_whole(row) and not steps):
            widths.append((f"{'teacher' if row.bits == '32' else row.bits}\n{scores}", images[: base.grid_columns]))
        if row.num_steps == base.sampler.num_steps:
            # MAX_SEED: noise that neither scoring nor, with any other seed, distillation uses.
            solver, at = teacher.solver(base.sampler), model.denoiser.device
            trajectories = make_trajectories(model.denoiser, solver, PATHS, MAX_SEED, device=at)
            label = f"{row.name} · {row.bits}"
            paths[label] = trajectories.x.cpu()
            if row.bits == "32" or row.name in SHOWN:
                digit.append((label, to_uint8(paths[label][0])))
    figures = {
        "grid": plots.image_grid(grid),
        "widths": plots.image_grid(widths),
        "rungs": plots.rungs_chart(rows),
        "cost": plots.cost_chart(rows),
        "digit": plots.image_grid(digit),
    }
    if config.students:
        figures |= {"bits": plots.bits_chart(rows, BASELINES), "errors": plots.errors_chart(paths)}
    for row in rows:
        if row.name in SHOWN:
            student = QuantizedUNet.from_pretrained(place(row))
            figures[f"step_sizes_{row.name}"] = plots.step_sizes(*act_step_sizes(student))
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.png", plots.to_png(figure))
