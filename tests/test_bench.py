"""bench.py: its yardstick does the same work as ours, and its ratios, shares and contenders are right."""

import json
import os

import pytest
import torch
from conftest import ROOT, batch_of

import bench
import covidgan

pytestmark = pytest.mark.long


@pytest.fixture
def both(tiny):
    """Our trainer and the plain step, with a batch for both: (trainer, plain, onehot, target)."""
    c = tiny(stage="joint", batch=2)
    trainer, plain = covidgan.Trainer(covidgan.Covidgan, c), bench.PlainStep(c)
    target, labels = batch_of(trainer)
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


def make_pid():
    return (lambda: None), {"pid": os.getpid()}


def make_broken():
    raise RuntimeError("no room\nin here")


def test_contenders_run_in_processes_of_their_own_and_what_fails_is_told():
    rows = bench.measure({"one": make_pid, "other": make_pid}, 2, "test")
    assert len({os.getpid(), rows["one"]["pid"], rows["other"]["pid"]}) == 3
    assert [len(row["seconds"]) for row in rows.values()] == [2, 2]
    with pytest.raises(covidgan.Mistake, match=r"broken: RuntimeError.*no room"):
        bench.measure({"one": make_pid, "broken": make_broken}, 2, "test")
    rows = bench.with_shares(bench.measure({"broken": make_broken, "one": make_pid}, 2, "test", "cuda"), "one")
    assert "no room" in rows["broken"]["failed"] and "no room" in bench.report("", {"about": "", "rows": rows})
    assert rows["one"]["pid"]  # one alone after the other: it had its turn


def test_what_a_run_spends_its_time_on_is_grouped_by_kernel():
    bench.held["work"] = lambda: torch.conv2d(torch.ones(1, 8, 64, 64), torch.ones(8, 8, 3, 3)).relu()
    _, kernels, dearest = bench.spent(runs=2).values()  # of one measurement: the next may be faster
    assert [*kernels] == [*bench.KERNELS, "others"] and kernels["convolutions"] > 0
    assert sum(kernels.values()) + 1e-9 >= sum(dearest.values()) > 0 and len(dearest) <= 15


def test_a_ratio_is_taken_round_by_round():
    assert bench.ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_share_is_of_the_fastest_round_of_the_product_in_its_precision():
    rows = {
        "product": {"flop": 200, "seconds": [3.0, 1.0, 2.0], "dtype": "float32", "ceiling": True},
        "product, bf16": {"flop": 500, "seconds": [1.0], "dtype": "bfloat16", "ceiling": True},
        "model": {"flop": 300, "seconds": [3.0, 2.0, 9.0], "dtype": "float32"},
        "model in bf16": {"flop": 300, "seconds": [1.0, 1.0, 3.0], "dtype": "bfloat16"},
        "what does less": {"seconds": [0.1, 0.1, 0.1]},
    }
    bench.with_shares(rows, "model")
    assert rows["model"]["share"] == 0.5 and rows["model in bf16"]["share"] == 0.6
    assert rows["model in bf16"]["speedup"] == {"median": 3.0, "min": 2.0, "max": 3.0}
    assert "share" not in rows["what does less"] and "speedup" not in rows["product"]


def test_parts_give_tables_and_what_has_ended_is_not_measured_again(tmp_path, cli):
    small = "--quick --rounds 2 --train-size 64 --train-width 8 --batch 1 --synth-size 64 --synth-width 8"

    def run(*options):
        done = cli(*small.split(), *options, "--json", tmp_path / "b.json", script=ROOT / "bench.py", timeout=900)
        assert done.status == 0, done.stderr
        parts = json.loads((tmp_path / "b.json").read_text())["parts"]
        rows = {part: found["rows"] for part, found in parts.items()}
        return done.stdout, rows, {part: rows[part]["product, float32"]["seconds"] for part in rows}

    told, rows, first = run("--parts", "joint")
    assert [*rows["joint"]][-2:] == ["plain", "ours"] and rows["joint"]["ours"]["speedup"]["median"] > 0
    assert all(name in told and len(row["seconds"]) == 2 for name, row in rows["joint"].items())
    told, rows, second = run()  # all that are missing
    assert "\njoint" not in told and second["joint"] == first["joint"]
    assert [*rows["synth"]][-3:] == ["PyTorch", "generator.onnx", "--fp16"]
    told, _, third = run("--parts", "joint")
    assert "\njoint" in told and third["joint"] != first["joint"] and third["synth"] == second["synth"]
    assert run("--batch", 2, "--parts", "joint")[2].keys() == {"joint"}  # another setting: nothing of this one stays


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_make_gpu_says_so_in_one_line(cli, tmp_path):
    done = cli("--device", "cuda", "--json", tmp_path / "gpu.json", script=ROOT / "bench.py")
    assert (done.status, done.stdout) == (2, "") and not [*tmp_path.iterdir()]
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
