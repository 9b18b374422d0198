"""Another method of another kind goes through the same loop, export and pictures as the paper's."""

import dataclasses
import json
import signal
import sys
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import covidgan
import export
from paper.methods import METHODS


@dataclasses.dataclass(frozen=True)
class SmallConfig(covidgan.LoopConfig):
    """A knob of its own, and other Adam settings than the paper's."""

    hidden: int = 8
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

    def forward(self, onehot):
        return self.layers(onehot).float(), onehot.new_ones(onehot.shape[:1])


class Small(covidgan.Method):
    """One generator, one discriminator with spectral norm, one stage, hinge and L1; D four times as fast as G."""

    name, options = "small", SmallConfig
    presets: ClassVar = {"demo": dict(size=64, batch=2, epochs=1, epoch_len=16, interval=3)}
    architecture = ("hidden",)
    curves = (("d", "g"), ("l1",))

    def __init__(self, c):
        super().__init__(c)
        self.g = SmallGenerator(c)
        self.d = spectral_norm(nn.Conv2d(c.n_labels + 1, 1, 4, 2))

    @classmethod
    def stages(cls, c):
        return ("whole",)

    @classmethod
    def multiple(cls, c):
        return 4

    @classmethod
    def checks(cls, c):
        return [(c.hidden > 0, f"--hidden {c.hidden}: give 1 or more")]

    def players(self, stage):
        fast = dataclasses.replace(covidgan.Player.of(self.c, "d", [self.d]), lr=4 * self.c.lr)
        return {"d": fast, "g": covidgan.Player.of(self.c, "g", [self.g])}

    def losses(self, onehot, target, stage):
        image, _ = self.g(onehot)
        real, fake = (self.d(torch.cat([onehot, x], 1)).float() for x in (target, image))
        l1 = F.l1_loss(image, target)
        d = covidgan.gan_loss_d(real, fake, "hinge")
        return {"d": d, "g": covidgan.gan_loss_g(fake, "hinge") + self.c.lambda_l1 * l1, "l1": l1}

    def generator(self):
        return self.g


@pytest.fixture
def small(toy, tmp_path):
    """Options of a run of eight steps, and its folder."""
    out = tmp_path / "out"
    return ["--data", str(toy.folder), "--out", str(out), "--device", "cpu", "--dtype", "float32"], out


@pytest.fixture(autouse=True)
def signals():
    """The loop takes over the signals of its process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def leaves(tree):
    """Every tensor and number of a checkpoint, its options left out."""
    if isinstance(tree, dict):
        return [
            leaf
            for key in sorted(map(str, tree))
            if key != "config"
            for leaf in leaves({str(k): v for k, v in tree.items()}[key])
        ]
    if isinstance(tree, list | tuple):
        return [leaf for sub in tree for leaf in leaves(sub)]
    return [tree.tolist() if torch.is_tensor(tree) else tree]


def test_another_method_trains_by_its_own_settings_draws_its_panels_and_reports(small, capsys):
    arguments, out = small
    covidgan.main([*arguments, "--epochs", "12", "--interval", "50"], Small)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert checkpoint["method"] == "small" and checkpoint["stage"] == "whole" and checkpoint["step"] == 96
    assert set(checkpoint["optimizers"]) == {"d", "g"}
    assert all(state["param_groups"][0]["betas"] == (0.0, 0.9) for state in checkpoint["optimizers"].values())
    steps = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert np.mean([s["l1"] for s in steps[-10:]]) < 0.85 * np.mean([s["l1"] for s in steps[:5]])
    assert (out / "panel_whole_000096.png").stat().st_size > 1000 and (out / "curves.png").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["small"]["complete"]["psnr"] > 10
    assert "small " in capsys.readouterr().out


def test_its_players_move_at_their_own_rates(small):
    trainer = covidgan.Trainer(Small, covidgan.parse_config(small[0], Small))
    trainer.step()
    assert trainer.optimizers["d"].param_groups[0]["lr"] == pytest.approx(16e-4)
    assert trainer.optimizers["g"].param_groups[0]["lr"] == pytest.approx(4e-4)


def test_stopped_it_goes_on_bit_for_bit_its_dropout_and_power_iteration_too(small, stop_after):
    arguments, out = small
    covidgan.main(arguments, Small)
    whole = torch.load(out / "ckpt.pt", weights_only=True)
    stop_after(4, [*arguments, "--overwrite"], Small)
    torch.manual_seed(99)  # whatever the process drew meanwhile
    covidgan.main(["--resume", "--out", str(out)], Small)
    assert leaves(torch.load(out / "ckpt.pt", weights_only=True)) == leaves(whole)


def test_its_checkpoint_exports_through_the_same_contract(small, tmp_path, monkeypatch, capsys):
    arguments, out = small
    covidgan.main(arguments, Small)
    monkeypatch.setitem(METHODS, "small", Small)
    export.main([str(out / "ckpt.pt"), "-o", str(tmp_path / "small.onnx")])
    assert "at most" in capsys.readouterr().out
    session = ort.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["method"] == "small"
    maps = export.example_map(2, 36, 44, 4)
    ct, alpha = session.run(["ct", "alpha"], {"map": maps})
    generator = export.load_method(torch.load(out / "ckpt.pt", weights_only=True), Small).generator()
    labels = torch.from_numpy(maps)[:, None]
    with torch.no_grad():
        image = covidgan.lung_target(generator(covidgan.one_hot(labels, 4))[0], labels)
    assert np.abs(ct - (image[:, 0] * 750 - 600).numpy()).max() <= 0.51
    assert alpha.tolist() == [1, 1]


def test_a_checkpoint_of_an_unknown_method_is_told_in_one_line(small, tmp_path):
    arguments, out = small
    covidgan.main(arguments, Small)
    with pytest.raises(covidgan.Mistake, match="a checkpoint of 'small', which is none of covidgan"):
        export.main([str(out / "ckpt.pt"), "-o", str(tmp_path / "small.onnx")])


def test_a_run_of_one_method_is_not_taken_up_by_another(small):
    arguments, out = small
    covidgan.main(arguments, Small)
    with pytest.raises(covidgan.Mistake, match="of 'small', not of covidgan"):
        covidgan.main(["--resume", "--out", str(out)])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--hidden", "0"], "--hidden 0"),
        (["--ngf", "8"], "--ngf"),
        (["--stage", "g1"], "whole"),
        (["--size", "30"], "multiple of 4"),
    ],
)
def test_options_are_checked_against_the_methods_own(small, options, word):
    with pytest.raises(covidgan.Mistake, match=word):
        covidgan.parse_config([*small[0], *options], Small)


def test_export_of_covidgan_brings_in_nothing_of_the_papers_experiments(cli):
    code = "import sys, covidgan, export; export.method_of({'method': 'covidgan'}, None); print('paper' in sys.modules)"
    done = cli("-c", code, script=None)
    assert done.status == 0 and done.stdout.strip() == "False", done.stderr
    assert "paper" in sys.modules  # as in this process, where the test asked for it
