"""A method of one's own in sixty lines: the same loop trains, stops, resumes and draws it, and export.py exports it.

`python -c "import covidgan, mine; covidgan.exit_on_mistake(lambda argv: covidgan.main(argv, mine.Small))"` trains one
that stands in mine.py, and `export.py ckpt.pt --method mine.py` exports it.
"""

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import differing
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import covidgan


@dataclass(frozen=True)
class SmallConfig(covidgan.LoopConfig):
    """Knobs of its own, and other Adam settings than the paper's."""

    hidden: int = 8  # channels between the two convolutions
    lambda_l1: float = 100.0
    lr: float = 4e-4
    adam_beta1: float = 0.0
    adam_beta2: float = 0.9


class SmallGenerator(nn.Module):
    """Two convolutions with dropout between them."""

    def __init__(self, c):
        super().__init__()
        layers = [nn.Conv2d(c.n_labels, c.hidden, 3, padding=1), nn.ReLU(), nn.Dropout(0.5)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c.hidden, 1, 3, padding=1), nn.Tanh())

    def forward(self, onehot):  # [B, n_labels, H, W] -> image [B, 1, H, W] in [-1, 1], alpha [B], here 1
        return self.layers(onehot).float(), onehot.new_ones(onehot.shape[:1])


class Small(covidgan.Method):
    """One generator, one discriminator with spectral norm, one stage, hinge and L1; D four times as fast as G."""

    name, options = "small", SmallConfig
    presets: ClassVar = {"demo": dict(size=64, batch=2, epochs=1, epoch_len=16, interval=3)}
    curves = (("d", "g"), ("l1",))

    def __init__(self, c):
        super().__init__(c)
        self.g = SmallGenerator(c)
        self.d = spectral_norm(nn.Conv2d(c.n_labels + 1, 1, 4, 2))

    @classmethod
    def stages(cls, c):
        return {"whole": 1.0}

    @classmethod
    def multiple(cls, c):
        return 4

    def players(self, stage):
        fast = covidgan.Player.of(self.c, "d", [self.d])._replace(lr=4 * self.c.lr)
        return {"d": fast, "g": covidgan.Player.of(self.c, "g", [self.g])}

    def losses(self, onehot, target, stage):
        image, _ = self.g(onehot)
        real, fake = ([[self.d(torch.cat([onehot, x], 1))]] for x in (target, image))
        d, g = covidgan.gan_losses(real, fake, "hinge")
        l1 = F.l1_loss(image, target)
        return {"d": d, "g": g + self.c.lambda_l1 * l1, "l1": l1}

    def generator(self):
        return self.g


# ---- its tests


@pytest.fixture
def small(toy, tmp_path):
    """Options of a run of eight steps, and its folder."""
    out = tmp_path / "out"
    return ["--data", str(toy.folder), "--out", str(out), "--device", "cpu", "--dtype", "float32"], out


def test_it_trains_by_its_own_settings_draws_its_panels_and_reports(small):
    arguments, out = small
    covidgan.main([*arguments, "--epochs", "12", "--interval", "50"], Small)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert (checkpoint["method"], checkpoint["stage"], checkpoint["step"]) == ("small", "whole", 96)
    groups = {name: state["param_groups"][0] for name, state in checkpoint["optimizers"].items()}
    assert {name: group["betas"] for name, group in groups.items()} == {"d": (0.0, 0.9), "g": (0.0, 0.9)}
    steps = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert (steps[0]["lr_d"], steps[0]["lr_g"]) == pytest.approx((16e-4, 4e-4))
    assert np.mean([s["l1"] for s in steps[-10:]]) < 0.85 * np.mean([s["l1"] for s in steps[:5]])
    assert (out / "panel_whole_000096.png").stat().st_size > 1000 and (out / "curves.png").exists()
    assert {*json.loads((out / "results.json").read_text())["parameters"]} == {"g", "d"}


def test_stopped_it_goes_on_bit_for_bit_its_dropout_and_power_iteration_too(small, stop_after):
    arguments, out = small
    covidgan.main(arguments, Small)
    whole = torch.load(out / "ckpt.pt", weights_only=True)
    shutil.rmtree(out)
    stop_after(4, arguments, Small)
    torch.manual_seed(99)  # whatever the process drew meanwhile
    covidgan.main(["--resume", "--out", str(out)], Small)
    assert differing(torch.load(out / "ckpt.pt", weights_only=True), whole) == []
