import dataclasses
import json
import os
import signal
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.locks import lock_file
from ddpm_mnist.sampling.sampler import sample
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.train import TeacherConfig, train_teacher
from ddpm_mnist.unet import save_teacher
from eval.export import ExportConfig, export
from eval.features import load_ruler
from eval.fid import FidConfig, print_fid
from eval.grid import GridConfig, draw_models, recorded_fid, row_label
from eval.metrics import measure
from eval.models import STUDENTS, Model, load_model
from eval.sample import DrawConfig, SampleConfig, draw, write_samples
from eval.train_features import FeaturesConfig, load_sets, train_features
from quant.integer.binding import VARIABLE


def test_samples_as_array_and_as_picture(teacher_folder, tmp_path):
    options = {"model": teacher_folder, "num_images": 5, "num_steps": 2}
    path = write_samples(SampleConfig(output=tmp_path / "x.npy", **options))
    images = np.load(path)
    assert images.dtype == np.uint8
    assert images.shape == (5, 28, 28)
    picture = matplotlib.image.imread(write_samples(SampleConfig(output=tmp_path / "x.png", **options)))
    assert picture.shape[0] > 2 * 28
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["x.npy", "x.png"]


def test_where_integers_cannot_run_students_alone_are_refused(teacher_folder, student_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mmx")
    options = {"num_images": 2, "num_steps": 1}
    write_samples(SampleConfig(model=teacher_folder, output=tmp_path / "x.npy", **options))
    with pytest.raises(InputError, match=f'model ".*student" .*: {VARIABLE}: this processor has no "mmx"'):
        write_samples(SampleConfig(model=student_folder, output=tmp_path / "y.npy", **options))
    write_samples(SampleConfig(model=student_folder, output=tmp_path / "z.npy", runtime="simulated", **options))
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["x.npy", "z.npy"]


def test_an_array_has_one_process_at_a_time(teacher_folder, tmp_path, monkeypatch):
    config = SampleConfig(model=teacher_folder, num_images=2, num_steps=1, output=tmp_path / "x.npy")

    def meanwhile(*arguments):
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr("eval.sample.sample", sample)
            with pytest.raises(InputError, match="another process is drawing these images"):
                write_samples(config)
            other = np.load(write_samples(dataclasses.replace(config, seed=7)))  # of other settings: into another file
        assert other.shape == (2, 28, 28)
        return sample(*arguments)

    monkeypatch.setattr("eval.sample.sample", meanwhile)
    images = np.load(write_samples(config))
    monkeypatch.undo()
    assert np.array_equal(images, np.load(write_samples(config)))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_array_that_is_taken_away_while_it_is_drawn_is_not_begun_again(teacher_folder, tmp_path, monkeypatch):
    def take_away(*arguments):
        next(tmp_path.glob(".x.npy.*.partial")).unlink()
        return sample(*arguments)

    monkeypatch.setattr("eval.sample.sample", take_away)
    config = SampleConfig(model=teacher_folder, num_images=2, num_steps=1, output=tmp_path / "x.npy")
    with pytest.raises(InputError, match=r"cannot write .*x\.npy: .*partial was deleted"):
        write_samples(config)
    assert not list(tmp_path.glob("*x.npy*"))


def test_an_array_behind_a_link_lies_where_the_link_leads(teacher_folder, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "x.npy").symlink_to(tmp_path / "store" / "y.npy")
    write_samples(SampleConfig(model=teacher_folder, num_images=2, num_steps=1, output=tmp_path / "x.npy"))
    assert (tmp_path / "x.npy").is_symlink()
    assert np.load(tmp_path / "store" / "y.npy").shape == (2, 28, 28)


def test_names_are_no_markup(student_folder, tmp_path, capsys):
    (tmp_path / "[bold]{x}[").symlink_to(student_folder)
    name = str(tmp_path / "[bold]{x}[")
    print_fid(FidConfig(model=name, num_images=12, num_steps=2, output=tmp_path / "fid.json"))
    assert "[bold]{x}[" in capsys.readouterr().out


def test_an_array_that_was_killed_is_gone_on_with(teacher_folder, tmp_path, capsys, monkeypatch):
    options = {"model": teacher_folder, "num_images": 20, "num_steps": 2, "batch_size": 4}
    begun = iter(range(5))

    def draw_or_die(*arguments):
        if next(begun) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(*arguments)

    if (child := os.fork()) == 0:
        monkeypatch.setattr("eval.sample.sample", draw_or_die)
        write_samples(SampleConfig(output=tmp_path / "x.npy", **options))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "x.npy").exists()
    (partial,) = tmp_path.glob(".x.npy.*.partial")
    with partial.open("ab") as file:
        file.truncate(partial.stat().st_size - 100)  # torn in the middle of an image
    (tmp_path / ".x.npy.123456789abc.partial").write_bytes(b"of other settings")

    write_samples(SampleConfig(output=tmp_path / "x.npy", **options))
    assert "Going on from image 8 of 20." in capsys.readouterr().out
    write_samples(SampleConfig(output=tmp_path / "whole.npy", **options))
    assert "Going on" not in capsys.readouterr().out
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    images, _ = draw(load_model(teacher_folder), DrawConfig(**options))
    assert np.array_equal(np.load(tmp_path / "x.npy"), images.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.npy", "x.npy"]


def test_fid_writes_one_object(student_folder, tmp_path, capsys):
    output = tmp_path / "deep" / "fid.json"
    print_fid(FidConfig(model=student_folder, num_images=12, num_steps=2, seed=4, output=output))
    score = json.loads(output.read_text())
    assert (score["weight_bits"], score["act_bits"]) == (4, 4)
    assert (score["num_images"], score["num_steps"], score["seed"]) == (12, 2, 4)
    assert score["fid"] > 0
    assert score["mse_to_teacher"] > 0
    assert "W4A4" in capsys.readouterr().out


@pytest.fixture
def labelled(monkeypatch):
    """In the place of MNIST: bright and dark images of two classes. The arguments of each call."""
    calls = []

    def load(data, split):
        calls.append((data, split))
        labels = torch.arange(256) % 2
        return (labels.view(-1, 1, 1) * 200 + torch.randint(0, 50, (256, 28, 28))).byte(), labels

    monkeypatch.setattr("eval.train_features.load_labelled", load)
    monkeypatch.setattr("eval.train_features.IMAGES_SEEN", 1024)
    return calls


def test_a_classifier_tells_what_the_images_are_worth(labelled, teacher_folder, tmp_path, capsys):
    words = ["--model", teacher_folder, "--teacher", teacher_folder, "--num_images", "128", "--num_steps", "2"]
    words += ["--output", str(tmp_path / "fid.json")]
    run_command("prog", print_fid, FidConfig, words)
    assert json.loads((tmp_path / "fid.json").read_text())["classifier_accuracy"] is None
    assert not labelled, "no data unless it is asked for"
    score = run_command("prog", print_fid, FidConfig, [*words, "--classifier", "true"])
    assert labelled == [("mnist", "train"), ("mnist", "test")]
    assert score.classifier_accuracy_of_real == 1
    assert 0 <= score.classifier_accuracy < 1, "noise teaches nothing"
    assert json.loads((tmp_path / "fid.json").read_text())["classifier_accuracy"] == score.classifier_accuracy
    assert "from real ones" in capsys.readouterr().out


def test_what_the_classifier_lacks_is_said_before_anything_is_drawn(labelled, teacher_folder, monkeypatch, refuse):
    monkeypatch.setattr("eval.fid.draw", lambda *_: pytest.fail("it draws"))
    words = ["--model", teacher_folder, "--teacher", teacher_folder, "--classifier", "true", "--num_images"]

    def no_data(*_):
        raise InputError("MNIST is not available")

    def refusal(count):
        return refuse(print_fid, FidConfig, [*words, count])

    assert refusal("127") == "prog: classifier needs num_images from 128 to 256, not 127\n"
    assert refusal("257") == "prog: classifier needs num_images from 128 to 256, not 257\n"
    monkeypatch.setattr("eval.train_features.load_labelled", no_data)
    assert refusal("128") == "prog: MNIST is not available\n"
    ruler = dataclasses.replace(load_ruler(), shape=(14, 14))
    monkeypatch.setattr("eval.fid.load_ruler", lambda *_: ruler)
    monkeypatch.setattr("eval.fid.load_sets", lambda *_: {"train": (), "test": ()})
    assert refusal("128") == "prog: classifier needs a ruler of images of (1, 28, 28): --features names another\n"


def test_a_classifier_needs_a_ruler_that_learned_from_labels():
    inception = dataclasses.replace(load_ruler(), digest="inception", shape=None)
    with pytest.raises(InputError, match="needs a ruler that learned from labels, not inception"):
        load_sets(inception, 128)


def test_grid_labels_rows_with_recorded_scores(teacher_folder, own_student, tmp_path):
    student_folder = str(own_student)
    (tmp_path / "student" / "metrics.json").write_text(
        json.dumps([{"fid": 7.5, "num_images": 2000, "solver": "dpm++", "num_steps": 2, "eta": 0.0}])
    )
    output = draw_models(
        GridConfig(models=[teacher_folder, student_folder], columns=3, num_steps=2, output=tmp_path / "g.png")
    )
    model = load_model(student_folder)
    assert recorded_fid(model, GridConfig(models=["x"], num_steps=2).drawing) == "FID 7.50 (2,000)"
    assert recorded_fid(model, GridConfig(models=["x"], num_steps=5).drawing) == "", "of another sampler"
    score = {"fid": 7.5, "num_images": 2000, "solver": "dpm++", "num_steps": 2, "eta": 0.0, "same_digit": 0.956}
    (tmp_path / "student" / "metrics.json").write_text(json.dumps(score))
    assert recorded_fid(model, GridConfig(models=["x"], num_steps=2).drawing) == "FID 7.50 (2,000)\nsame digit 96%"
    guided = GridConfig(models=["x"], num_steps=2, guidance_scale=2.0, null_class=0)
    assert recorded_fid(model, guided.drawing) == "", "of other guidance"
    scaled = GridConfig(models=["x"], num_steps=2, eps_scale=1.05)
    assert recorded_fid(model, scaled.drawing) == "", "of another factor on ε"
    picture = matplotlib.image.imread(output)
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("name", "title"),
    [("w4a4", "w4a4"), ("runs/quick", "quick"), ("runs/ladder/w2a4/0", "w2a4/0"), ("7", "7"), ("google/unet", "unet")],
)
def test_a_row_is_called_by_what_tells_models_apart(name, title):
    assert row_label(Model(name, None, None), "").splitlines() == [title, "full precision"]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_released_student_draws_and_brings_its_config_and_score(name):
    model = load_model(name, "integer")
    assert model.bits == name.upper()
    assert "(10,000)" in recorded_fid(model, GridConfig(models=[name]).drawing)
    assert "weight_bits: " + name[1] in (model.folder / "config.yaml").read_text()
    images, _ = draw(model, DrawConfig(num_images=2, num_steps=3))
    assert images.float().std() > 20


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "fid",
            ["--model", "nothing"],
            'no model "nothing": neither released (teacher, w8a8, w4a8, w4a4, w2a4) nor a folder with a config.json',
        ),
        ("fid", ["--num-images", "1"], "num_images must be at least 2, not 1"),
        ("fid", ["--num-images", "many"], "num_images"),
        ("fid", ["--unknown", "3"], "no option --unknown; --help lists them"),
        ("fid", ["--config", "missing.yaml"], "missing.yaml"),
        ("fid", ["--seed", "-1"], "seed must lie in"),
        ("fid", ["--output", "{folder}"], "output must end in .json"),
        ("fid", ["--config", "{broken}"], "broken.yaml cannot be parsed: "),
        ("fid", ["--config", "nothing"], 'no configuration "nothing": neither a file nor one of fashion, '),
        ("teacher", ["--config", "released"], "released.yaml: no option --rungs; "),
        ("fid", ["--num-steps", "61"], "num_steps 61 cannot be spaced"),
        ("sample", ["--output", "x.jpg"], "output must end in .npy or .png, not x.jpg"),
        ("sample", ["--output", "{broken}/x.npy"], "broken.yaml is a file, and no folder"),
        ("teacher", ["--unet.norm_num_groups", "7"], "norm_num_groups 7 does not divide 16 channels"),
        ("teacher", ["--ema_decay", "2"], "ema_decay must lie in [0, 1], not 2"),
        ("features", ["--epochs", "0"], "epochs must be positive, not 0"),
        ("grid", ["--models"], "models"),
        ("grid", ["--models", "teacher", "--seed", "-1"], "seed must lie in"),
        ("grid", ["--models", "teacher", "--output", "x.jpg"], "output must end in .png, not x.jpg"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(module, arguments, message, tmp_path, refuse):
    function, config = {
        "fid": (print_fid, FidConfig),
        "grid": (draw_models, GridConfig),
        "sample": (write_samples, SampleConfig),
        "teacher": (train_teacher, TeacherConfig),
        "features": (train_features, FeaturesConfig),
    }[module]
    broken = tmp_path / "broken.yaml"
    broken.write_text("num_images: [")
    arguments = [argument.format(folder=tmp_path, broken=broken) for argument in arguments]
    assert message in refuse(function, config, arguments)


def test_two_exports_into_one_folder_do_not_mix(student_folder, tmp_path):
    with (tmp_path / ".lock").open("ab") as other:
        assert lock_file(other)
        with pytest.raises(InputError, match=r"is writing into .*: wait for it, or choose another folder"):
            export(ExportConfig(model=student_folder, format="packed", output=tmp_path))
    assert export(ExportConfig(model=student_folder, format="packed", output=tmp_path)).exists()


def test_an_export_that_failed_may_be_tried_again(student_folder, tmp_path, monkeypatch):
    config = ExportConfig(model=student_folder, format="packed", output=tmp_path)

    def fill_the_disk(path, value):
        path.parent.mkdir()
        raise InputError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as full:
        full.setattr("eval.export.write_json", fill_the_disk)
        with pytest.raises(InputError, match="No space left on device"):
            export(config)
    assert export(config).exists()


def test_a_damaged_teacher_gets_one_line(unet, tmp_path, capfd):
    save_teacher(unet, tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.bias"]
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"its weights do not fit its config: conv_out\.bias"):
        load_model(str(tmp_path))
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["truncated", "other shape", "no JSON"])
def test_a_damaged_student_gets_one_line(own_student, damage, tmp_path, refuse):
    weights, config = own_student / "model.safetensors", own_student / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other shape":
        config.write_text(config.read_text().replace('"norm_num_groups": 4', '"norm_num_groups": 3'))
    else:
        config.write_text("{")
    said = refuse(print_fid, FidConfig, ["--model", str(own_student), "--output", str(tmp_path / "f.json")])
    assert f'model "{own_student}" cannot be loaded' in said
    assert not (tmp_path / "f.json").exists()


def test_the_released_teacher_draws_digits():
    images = sample(load_model("teacher").denoiser, Solver(SamplerConfig(num_steps=10)), num_images=64)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert measure(images, noise)["fid"] < 25 < 1000 < measure(noise, images)["fid"]


def test_help_of_the_console_script_is_quick():
    command = [sys.executable, "-X", "importtime", "-c", "from finetune.cli import main; main()", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Start here: efficientdm run\n" in result.stdout
    assert "torch" not in result.stderr, "heavy imports wait until they are needed"


def test_a_reader_that_leaves_ends_it_quietly():
    command = [sys.executable, "-c", "from finetune.cli import main; main()", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, err = process.communicate()
    assert err == ""
    assert process.returncode in (0, -signal.SIGPIPE)


def test_an_unknown_command_gets_one_line():
    command = [sys.executable, "-c", "from finetune.cli import main; main()", "fly"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('efficientdm: no command "fly"; there are run, ')
    assert result.stderr.count("\n") == 1
