"""bench.py: its yardstick does the same work as ours, and its arithmetic, memory and judges are right."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench
import covidgan
import eval as evaluation
import export
from covidgan import Mistake

# ---- the yardstick


@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_the_plain_step_has_our_losses_and_our_updates(tiny, monkeypatch, stage):
    """Three discriminator passes, all features kept and gradients thrown away, or one pass and none: the same step."""
    c = tiny(stage=stage, batch=2)
    trainer, plain = covidgan.Trainer(c), bench.PlainStep(c, stage)
    target, labels, names = trainer.batch()
    monkeypatch.setattr(trainer, "batch", lambda: (target, labels, names))
    start = {name: weight.clone() for name, weight in trainer.nets.state_dict().items()}
    for step in range(3):
        monkeypatch.setattr(trainer, "set_learning_rate", lambda: c.lr)  # which it has from the start
        ours, theirs = trainer.step(), plain(covidgan.one_hot(labels, c.n_labels), target)
        for loss in ("d", "g"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=1e-5 if step == 0 else 1e-3)
    moved = 0
    for (name, a), b in zip(trainer.nets.state_dict().items(), plain.nets.state_dict().values(), strict=True):
        if a.dim() == 4 and not torch.equal(a, start[name]):
            assert (a - b).norm() < 0.05 * (a - start[name]).norm(), name  # Adam makes steps of rounding, too
            moved += 1
        elif a.dim() == 4:
            assert torch.equal(b, start[name]), name
    assert moved > 10


def test_the_plain_step_spends_two_passes_of_the_discriminators_more_and_no_convolution_is_recomputed(tiny):
    """The third pass forward, and the generator's gradient of D's weights; all else is the same arithmetic."""
    c = tiny(stage="joint", batch=1)
    trainer, plain = covidgan.Trainer(c), bench.PlainStep(c, "joint")
    target, labels, _ = trainer.batch()
    onehot = covidgan.one_hot(labels, c.n_labels)
    one_pass = bench.counted(lambda: covidgan.judge(list(trainer.nets["d"].scales), onehot, target))
    ours, theirs = bench.counted(trainer.step), bench.counted(lambda: plain(onehot, target))
    assert theirs - ours == pytest.approx(2 * one_pass, rel=0.001)


def test_arithmetic_of_the_papers_generator_is_the_published_count():
    """70.5 GMAC at 512 x 512 by an independent implementation, without the weighting net."""
    with torch.device("meta"):
        generator = covidgan.Generator(covidgan.Config(desum="fixed"))
        onehot = torch.zeros(1, 4, 512, 512)
    assert bench.counted(lambda: generator(onehot)) / 2e9 == pytest.approx(70.5, abs=0.1)


# ---- taking turns


def make_hoard(megabytes):
    """A contender that holds so much for good, and once more while it runs."""
    held = np.ones(megabytes * 2**17)
    return (lambda: held + 1), {"flop": 8}


def make_absent():
    raise bench.Missing("not in this house")


def make_broken():
    raise ZeroDivisionError("a bug")


def test_a_contenders_memory_is_its_own_peak_and_an_absent_one_is_told():
    rows = bench.interleave({"hoard": (make_hoard, {"megabytes": 200}), "absent": (make_absent, {})}, 2, "test")
    assert len(rows["hoard"]["seconds"]) == 2
    assert 399 * 2**20 < rows["hoard"]["net_bytes"] < 430 * 2**20
    assert rows["absent"] == {"seconds": [], "missing": "not in this house"}
    assert bench.ratio(rows["hoard"], rows["absent"]) is None
    assert any("not in this house" in line for line in bench.row_lines(rows))


def test_a_contender_that_fails_is_named_with_its_error():
    with pytest.raises(Mistake, match="broken: ZeroDivisionError: a bug"):
        bench.interleave({"broken": (make_broken, {})}, 1, "test")


def test_a_ratio_is_taken_round_by_round():
    over, under = {"seconds": [2.0, 4.0, 9.0]}, {"seconds": [1.0, 4.0, 3.0]}
    assert bench.ratio(over, under) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_fractions_are_of_the_fastest_product_s_fastest_round():
    rows = {
        "fp32 product, a": {"flop": 100, "seconds": [1.0]},
        "fp32 product, b": {"flop": 200, "seconds": [3.0, 1.0, 2.0]},
        "model": {"flop": 300, "seconds": [3.0, 2.0, 9.0]},
        "copy": {"bytes": 1, "seconds": [1.0]},
    }
    assert bench.with_fractions(rows)["model"]["fraction_of_fp32_peak"] == 0.5
    assert "fraction_of_fp32_peak" not in rows["copy"]


# ---- judges


def test_judges_and_eval_come_to_the_same_figures(tmp_path):
    pytest.importorskip("skimage", reason="pip install scikit-image==0.26.0")
    real, fake = bench.make_pairs(tmp_path, 64, 6)

    def features(image):  # uint8 [n, 3, H, W] -> float32 [n, 2]
        return (torch.stack([image[:, 0].float().mean((1, 2)), image[:, 0].float().std((1, 2))], 1),)

    judged = bench.judged(real, fake, features)
    evaluation.main([str(real), str(fake), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")])
    pixels = json.loads((tmp_path / "out.json").read_text())["pixels"]
    rows = [f"{region} {figure}" for region in ("complete", "lung") for figure in ("PSNR", "RMSE", "NRMSE", "SSIM")]
    assert judged["figures"] == pytest.approx([pixels[row]["mean"] for row in rows], rel=1e-4)
    assert len(judged["frechet"]) == 2 and min(judged["frechet"]) > 0


def test_scipys_augmentation_without_change_is_the_lung_target(toy):
    c = covidgan.Config(size=64, resize=1.0, rotate=0.0, elastic=0.0, noise=0.0)
    side = covidgan.load_slices(toy.folder, toy.train[:2], c)
    ours, _ = covidgan.augment(side.hu, side.labels, c, torch.Generator().manual_seed(0))
    for k in range(2):
        theirs = bench.scipy_augment(side.hu[k, 0].numpy(), side.labels[k, 0].numpy(), c, np.random.default_rng(0))
        np.testing.assert_allclose(theirs, ours[k, 0].numpy(), atol=1e-5)


# ---- the whole


def test_parts_give_a_table_and_the_keys_of_their_figures(cli, tmp_path):
    small = "--quick --rounds 1 --train-size 64 --train-width 8 --train-batch 1 --parts train augment"
    done = cli(*small.split(), "--json", tmp_path / "b.json", timeout=300, script=ROOT / "bench.py")
    assert done.status == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert 0.1 < found["train_step_ratio"] < 3
    assert found["train_memory_ratio"] > 0 and found["augment_ratio"] > 0
    rows = found["parts"]["train"]["stages"]["joint"]["rows"]
    assert found["train_step_ratio"] == pytest.approx(rows["ours"]["seconds"][0] / rows["plain"]["seconds"][0])
    assert "train_step_ratio" in done.stdout and "goal: at most 0.4" in done.stdout


def test_pytorch_and_the_exported_file_are_given_the_same_work(tmp_path):
    checkpoint, maps = bench.random_checkpoint(64, 8), export.example_map(1, 64, 64, 4)
    _, eager = bench.make_torch("eager", checkpoint, maps, "cpu")
    _, onnx = bench.make_onnx(bench.exported(checkpoint, tmp_path), maps, "cpu")
    assert np.abs(eager["hu"].astype(int) - onnx["hu"]).max() <= export.MAX_HU
    assert eager["flop"] > 1e7


@pytest.mark.parametrize(
    "options, word",
    [
        (["--rounds", "0"], "1 or more"),
        (["--parts", "nothing"], "invalid choice"),
        (["--checkpoint", "nowhere.pt"], "no such checkpoint"),
        (["--eval-pairs", "4"], "multiple of 3"),
    ],
)
def test_bad_usage_is_one_line(options, word):
    with pytest.raises(Mistake, match=word):
        bench.parse(options)
