"""bench.py: its yardstick does the same work as ours, and its ratios, shares and contenders are right."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench
import covidgan

pytestmark = pytest.mark.long


@pytest.fixture
def both(tiny):
    """Our trainer and the plain step, with a batch for both: (trainer, plain, onehot, target)."""
    c = tiny(stage="joint", batch=2)
    trainer, plain = covidgan.Trainer(covidgan.Covidgan, c), bench.PlainStep(c)
    target, labels = trainer.batch()
    trainer.batch = lambda: (target, labels)
    return trainer, plain, covidgan.one_hot(labels, c.n_labels), target


def test_the_plain_step_has_our_losses_and_our_updates(both):
    """Three passes of the discriminators and gradients thrown away, or one pass and none: the same step."""
    trainer, plain, onehot, target = both
    start = {name: weight.clone() for name, weight in trainer.method.state_dict().items()}
    for step in range(3):
        ours, theirs = trainer.step(), plain(onehot, target)
        for loss in ("d", "g"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=1e-5 if step == 0 else 1e-3)
    moved, weights = 0, plain.method.state_dict()
    for name, a in trainer.method.state_dict().items():
        if a.dim() == 4 and not torch.equal(a, start[name]):  # Adam makes steps of rounding, too
            assert (a - weights[name]).norm() < 0.05 * (a - start[name]).norm(), name
            moved += 1
        elif a.dim() == 4:
            assert torch.equal(weights[name], start[name]), name
    assert moved > 10


def test_the_plain_step_spends_two_passes_of_the_discriminators_more(both):
    """The third pass forward, and the generator's gradient of D's weights; all else is the same arithmetic."""
    trainer, plain, onehot, target = both
    one_pass = bench.counted(lambda: trainer.method.d(onehot, target))
    ours, theirs = bench.counted(trainer.step), bench.counted(lambda: plain(onehot, target))
    assert theirs - ours == pytest.approx(2 * one_pass, rel=0.001)


def test_arithmetic_of_the_papers_generator_is_the_published_count():
    """70.5 GMAC at 512 x 512 by an independent implementation, without the weighting net."""
    with torch.device("meta"):
        generator = covidgan.Generator(covidgan.Config(desum="fixed"))
        onehot = torch.zeros(1, 4, 512, 512)
    assert bench.counted(lambda: generator(onehot)) / 2e9 == pytest.approx(70.5, abs=0.1)


def make_hoard():
    held = np.ones(200 * 2**17)  # 200 MiB for good, and once more while it runs
    return (lambda: held + 1), {"pid": os.getpid()}


def test_contenders_run_in_processes_of_their_own_and_tell_their_memory():
    rows = bench.interleave({"hoard": make_hoard, "other": make_hoard}, 2, "test")
    assert len({os.getpid(), rows["hoard"]["pid"], rows["other"]["pid"]}) == 3
    for row in rows.values():
        assert len(row["seconds"]) == 2 and 399 * 2**20 < row["net_bytes"] < 430 * 2**20


def test_a_ratio_is_taken_round_by_round():
    assert bench.ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_share_is_of_the_fastest_round_of_the_product_in_its_precision():
    rows = {
        "product": {"flop": 200, "seconds": [3.0, 1.0, 2.0], "dtype": "float32", "ceiling": True},
        "product, bf16": {"flop": 500, "seconds": [1.0], "dtype": "bfloat16", "ceiling": True},
        "model": {"flop": 300, "seconds": [3.0, 2.0, 9.0], "dtype": "float32"},
        "model in bf16": {"flop": 300, "seconds": [1.0], "dtype": "bfloat16"},
        "what does less": {"seconds": [0.1]},
    }
    bench.with_shares(rows)
    assert rows["model"]["share"] == 0.5 and rows["model in bf16"]["share"] == 0.6
    assert "share" not in rows["what does less"]


@pytest.mark.parametrize("part", bench.PARTS)
def test_a_part_gives_a_table_of_100_columns_and_its_figures(part, tmp_path, cli):
    small = "--quick --rounds 2 --train-size 64 --train-width 8 --batch 1 --synth-size 64 --synth-width 8 --slices 6"
    done = cli(*small.split(), "--parts", part, "--json", tmp_path / "b.json", script=ROOT / "bench.py", timeout=600)
    assert done.status == 0, done.stderr
    found, keys = json.loads((tmp_path / "b.json").read_text()), {"train": "train_step_ratio train_memory_ratio"}
    keys |= {"synth": "synth_fp32_ratio synth_threads_ratio", "infer": "infer_efficiency infer_whole"}
    assert all(key in done.stdout and np.isfinite(found[key]) for key in keys[part].split())
    assert all(len(line) <= bench.COLUMNS for line in done.stdout.splitlines() if "slices:" not in line)
    rows = found["parts"][part]["rows"]
    assert all(name in done.stdout and len(row["seconds"]) == 2 for name, row in rows.items())
