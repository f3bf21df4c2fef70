import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

import quant

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_own_unet_is_distilled_and_runs_on_integers(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    torch.manual_seed(0)
    own = UNet2DModel(
        32, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda name: own)
    monkeypatch.setattr(DDIMScheduler, "from_pretrained", lambda name: DDIMScheduler())
    monkeypatch.chdir(tmp_path)
    for large, small in (("set_timesteps(20)", "set_timesteps(3)"), ("range(500)", "range(12)"), ("64", "8")):
        assert large in code
        code = code.replace(large, small)
    result: dict = {}
    exec(code, result)
    t, x = min(result["states"].items())
    frozen, integer = result["frozen"](x, t).sample, result["integer"](x, t).sample
    assert torch.equal(quant.QuantizedUNet.from_pretrained(tmp_path / "my-student")(x, t).sample, frozen)
    error = (integer - frozen).square().mean() / frozen.square().mean()
    assert error < 0.01
    assert result["loss"] < frozen.square().mean() / 4
