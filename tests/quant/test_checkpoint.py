import errno
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize


@pytest.fixture
def folder(student, tmp_path):
    freeze(student).save_pretrained(tmp_path)
    return tmp_path


def write_honestly(folder, config):
    """Write config.json with the digest of what it says and of the weights."""
    said = {key: value for key, value in config.items() if key != "sha256"}
    content = json.dumps(said, sort_keys=True).encode() + (folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_text(json.dumps({**said, "sha256": hashlib.sha256(content).hexdigest()}))


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 2), (1.58, 4), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8)])
def test_a_student_comes_back_bit_for_bit_in_its_real_bits(unet, solver, buffer, tmp_path, weight_bits, act_bits):
    timesteps = solver.timesteps[:2].tolist()
    student = quantize(unet, QuantConfig(weight_bits, act_bits, rank=2, search="min-max"), timesteps)
    calibrate(student, {t: buffer.x[:, step] for step, t in enumerate(timesteps)})
    nn.init.normal_(next(student.layers())[1].lora_b)
    frozen = freeze(student)
    frozen.save_pretrained(tmp_path)
    loaded = QuantizedUNet.from_pretrained(tmp_path)
    x, t = buffer.x[:, 2], torch.tensor([*timesteps, 500, 3] * 2)
    with torch.no_grad():
        assert torch.equal(loaded(x, t).sample, frozen(x, t).sample)
    saved = load_file(tmp_path / "model.safetensors")
    for name, layer in frozen.layers():
        width = {1.58: 1.6}.get(layer.weight_quantizer.bits, layer.weight_quantizer.bits)
        assert saved[f"{name}.codes"].numel() == math.ceil(layer.codes.numel() * width / 8), name
        assert set(layer.codes.unique().tolist()) <= set(layer.weight_quantizer.codes), name
    assert loaded.quant_config == student.quant_config
    assert not any("lora" in name or name.endswith("conv1.weight") for name in saved)


def test_freezing_changes_only_what_half_precision_takes(student, buffer):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.half())
        x, t = buffer.x[:, 2], student.clock.timesteps[2]
        assert torch.equal(freeze(student)(x, t).sample, student(x, t).sample)


def test_the_student_that_was_frozen_can_still_learn(student):
    freeze(student)
    assert all(layer.codes is None and layer.weight is not None for _, layer in student.layers())


def test_only_a_frozen_student_is_saved(student, tmp_path):
    with pytest.raises(ValueError, match=r"call quant\.freeze first"):
        student.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated or altered"):
        QuantizedUNet.from_pretrained(folder)


def test_an_altered_byte_is_refused(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or altered"):
        QuantizedUNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"config\.json is of format 2, this version reads format 3"),
        ({"timesteps": [999, 500]}, "truncated or altered"),
        ({"quantization": {"weight_bits": 4, "act_bits": 8}}, "truncated or altered"),
    ],
)
def test_an_altered_config_is_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        QuantizedUNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [999, 500]}, r"do not fit each other: size mismatch for .*act_quantizer"),
        ({"unet": {"in_channels": 1}}, "do not fit each other"),
        ({"timesteps": None}, "do not fit each other"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    write_honestly(folder, config)
    with pytest.raises(ValueError, match=message):
        QuantizedUNet.from_pretrained(folder)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(folder, student, monkeypatch):
    def write(path, content):
        if "config" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, content)

    before, whole = {path: path.read_bytes() for path in folder.iterdir()}, Path.write_bytes
    other = freeze(student)
    other.unet.conv_out.bias.data += 1
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", write)
        other.save_pretrained(folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("step", [None, 1])
def test_codes_that_are_not_mid_rise_are_not_read_as_if_they_were(unet, solver, tmp_path, step):
    """Two bits were −2, −1, 0, 1 once; nor does it matter whether the file says so: older ones do not."""
    student = quantize(unet, QuantConfig(2, rank=2), solver.timesteps.tolist())
    student.unet.conv_in.act_quantizer.scale.data.fill_(0.1)
    freeze(student).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for code in config["codes"].values():
        assert code.pop("step") == (2 if code["bits"] == 2 else 1)
        code |= {} if step is None else {"step": step}
    write_honestly(tmp_path, config)
    with pytest.raises(ValueError, match=r"\.codes: this version reads no codes of 2 bits that are 1 apart"):
        QuantizedUNet.from_pretrained(tmp_path)


def test_a_dead_input_keeps_a_step_size_that_half_precision_holds(student, buffer):
    layer = dict(student.layers())["conv_out"]
    with torch.no_grad():
        for row in range(6):
            layer.act_quantizer.initialise(torch.zeros(100), row=row)
        layer.weight_quantizer.initialise(torch.zeros(layer.weight_shape))
    frozen = freeze(freeze(student))
    with torch.no_grad():
        assert frozen(buffer.x[:, 0], 999).sample.isfinite().all()
