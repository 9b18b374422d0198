"""bench.py: its yardstick does the same work as ours, and its ratios, fractions, contenders and judges are right."""

import json
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench
import covidgan
import eval as evaluation
from covidgan import Mistake


def test_a_file_of_figures_that_cannot_be_written_is_told_before_any_work(tmp_path):
    with pytest.raises(Mistake, match="is a folder: give the name of a file"):
        bench.parse(["--json", str(tmp_path)])


# ---- the yardstick


@pytest.fixture
def both(tiny):
    """Our trainer and the plain step of a stage, with a batch for both: (trainer, plain, onehot, target)."""

    def make(stage, batch):
        c = tiny(stage=stage, batch=batch)
        trainer, plain = covidgan.Trainer(covidgan.Covidgan, c), bench.PlainStep(c, stage)
        target, labels, names = trainer.batch()
        trainer.batch = lambda: (target, labels, names)
        trainer.set_learning_rates = lambda: {}  # which they have from the start
        return trainer, plain, covidgan.one_hot(labels, c.n_labels), target

    return make


@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_the_plain_step_has_our_losses_and_our_updates(both, stage):
    """Three passes of the discriminators and gradients thrown away, or one pass and none: the same step."""
    trainer, plain, onehot, target = both(stage, batch=2)
    start = {name: weight.clone() for name, weight in trainer.method.state_dict().items()}
    for step in range(3):
        ours, theirs = trainer.step(), plain(onehot, target)
        for loss in ("d", "g"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=1e-5 if step == 0 else 1e-3)
    moved, weights = 0, plain.method.state_dict()
    for name, a in trainer.method.state_dict().items():
        if a.dim() == 4 and not torch.equal(a, start[name]):
            assert (a - weights[name]).norm() < 0.05 * (a - start[name]).norm(), (
                name
            )  # Adam makes steps of rounding, too
            moved += 1
        elif a.dim() == 4:
            assert torch.equal(weights[name], start[name]), name
    assert moved > 10


def test_the_plain_step_spends_two_passes_of_the_discriminators_more(both):
    """The third pass forward, and the generator's gradient of D's weights; all else is the same arithmetic."""
    trainer, plain, onehot, target = both("joint", batch=1)
    one_pass = bench.counted(lambda: trainer.method.d(onehot, target))
    ours, theirs = bench.counted(trainer.step), bench.counted(lambda: plain(onehot, target))
    assert theirs - ours == pytest.approx(2 * one_pass, rel=0.001)


def test_arithmetic_of_the_papers_generator_is_the_published_count():
    """70.5 GMAC at 512 x 512 by an independent implementation, without the weighting net."""
    with torch.device("meta"):
        generator = covidgan.Generator(covidgan.Config(desum="fixed"))
        onehot = torch.zeros(1, 4, 512, 512)
    assert bench.counted(lambda: generator(onehot)) / 2e9 == pytest.approx(70.5, abs=0.1)


# ---- taking turns: makers are called in processes of their own


def make_hoard():
    held = np.ones(200 * 2**17)  # 200 MiB for good, and once more while it runs
    return (lambda: held + 1), {"environment": dict(os.environ)}


def make_guest(packages):
    import guest  # from a folder that this process looks into first

    return (lambda: None), {"name": guest.NAME, "same": sys.path[0] == str(packages)}


def make_absent():
    raise bench.Missing("not in this house")


def make_broken():
    raise ZeroDivisionError("a bug\nand its stack")


def make_killed():
    return (lambda: os._exit(9)), {}


def make_late():
    runs = iter([None])
    return (lambda: next(runs)), {}


def test_contenders_tell_their_own_memory_run_unhindered_and_an_absent_one_says_why(monkeypatch, tmp_path):
    (tmp_path / "guest.py").write_text("NAME = 'told'")
    for name in ("OPENBLAS_CORETYPE", "NVPL_BLAS_DEBUG_CPU_TYPE", "HARMLESS"):
        monkeypatch.setenv(name, "1")
    makers = {"hoard": make_hoard, "absent": make_absent, "guest": partial(make_guest, packages=tmp_path)}
    rows = bench.interleave(makers, 2, "test")
    assert len(rows["hoard"]["seconds"]) == 2
    assert 399 * 2**20 < rows["hoard"]["net_bytes"] < 430 * 2**20
    found = rows["hoard"]["environment"].keys() - {"OMP_NUM_THREADS"}  # which conftest sets again
    assert "HARMLESS" in found and not any(name.startswith(bench.HINDRANCES) for name in found)
    assert os.environ["OPENBLAS_CORETYPE"] == "1" and str(tmp_path) not in sys.path
    assert rows["guest"]["name"] == "told" and rows["guest"]["same"]
    assert rows["absent"] == {"seconds": [], "missing": "not in this house"}
    assert any("not in this house" in line for line in bench.table(rows))


@pytest.mark.parametrize(
    ("make", "words"),
    [(make_broken, "it: ZeroDivisionError: a bug$"), (make_killed, "it: died"), (make_late, "it: StopIteration")],
)
def test_a_contender_that_fails_or_dies_is_named_in_one_line(make, words):
    with pytest.raises(Mistake, match=words):
        bench.interleave({"it": make}, 1, "test", warm=int(make is make_late))


def test_a_ratio_is_taken_round_by_round():
    over, under = {"seconds": [2.0, 4.0, 9.0]}, {"seconds": [1.0, 4.0, 3.0]}
    assert bench.ratio(over, under) == {"median": 2.0, "min": 1.0, "max": 3.0}


# ---- ceilings


def row(flop, *seconds, dtype="float32", **more):
    return {"flop": flop, "seconds": [*seconds], "dtype": dtype, "net_bytes": 0, **more}


def test_a_fraction_is_of_the_fastest_round_of_the_fastest_product_in_its_precision():
    rows = {
        "slow": row(100, 1.0, ceiling="matrices"),
        "fast": row(200, 3.0, 1.0, 2.0, ceiling="convolution"),
        "faster in bf16": row(500, 1.0, dtype="bfloat16", ceiling="matrices"),
        "absent": {"seconds": [], "missing": "no"},
        "model": row(300, 3.0, 2.0, 9.0),
        "model in bf16": row(300, 1.0, dtype="bfloat16"),
        "what does less": {"seconds": [0.1]},
    }
    bench.with_fractions(rows)
    assert rows["model"]["fraction"] == 0.5 and rows["model in bf16"]["fraction"] == 0.6
    assert "fraction" not in rows["what does less"] and not any("error" in one for one in rows.values())


def test_a_fraction_above_1_is_an_error_and_no_figure(monkeypatch, tmp_path, capsys):
    rows = {"product": row(100, 1.0, ceiling="matrices"), "model": row(201, 1.0)}
    found = {"about": "", "tables": {"": bench.with_fractions(rows)}, "figures": {"fraction_of_fp32_peak": None}}
    monkeypatch.setattr(bench, "PARTS", {"synth": lambda args, folder: found})
    with pytest.raises(SystemExit) as leave:
        bench.main(["--json", str(tmp_path / "b.json")])
    assert leave.value.code == "error: model: 2.01 times as fast as the ceiling in float32, which is thus none"
    told = json.loads((tmp_path / "b.json").read_text())
    assert told["errors"] == [rows["model"]["error"]] and told["fraction_of_fp32_peak"] is None
    assert "2.01" not in capsys.readouterr().out


def test_figures_of_a_part_outlive_the_fault_of_a_later_one(monkeypatch, tmp_path):
    def broken(args, folder):
        raise bench.Mistake("no scikit-image")

    found = {"about": "", "tables": {"": {"product": row(100, 1.0)}}, "figures": {"train_step_ratio": 0.5}}
    monkeypatch.setattr(bench, "PARTS", {"train": lambda args, folder: found, "eval": broken})
    with pytest.raises(bench.Mistake):
        bench.main(["--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["train_step_ratio"] == 0.5


@pytest.mark.parametrize("library", ["numpy", "torch", "onnxruntime"])
def test_products_do_the_arithmetic_that_is_counted(monkeypatch, library):
    monkeypatch.setattr(bench, "MATRICES", {"cpu": (48,)})
    monkeypatch.setattr(bench, "BLOCKS", ((16, 12),))
    found = {name: (flop, work()) for name, flop, work in bench.products(library, "float32", "cpu")}
    assert len(found) == {"numpy": 1, "torch": 3, "onnxruntime": 2}[library]
    assert found["matrices of 48"][0] == 2 * 48**3 and np.shape(np.squeeze(found["matrices of 48"][1])) == (48, 48)
    for name in found.keys() - {"matrices of 48"}:
        assert found[name][0] == 2 * 9 * 16 * 16 * 12 * 12 and np.asarray(found[name][1]).size == 16 * 12 * 12
    _, facts = bench.make_ceiling(library, "float32", "cpu")
    assert facts["ceiling"] in found


# ---- what is compared does the same


def test_scikit_image_and_eval_come_to_the_same_figures(tmp_path):
    pytest.importorskip("skimage", reason="pip install scikit-image==0.26.0")
    real, fake = (bench.make_phantom(tmp_path, 64, 6, seed) for seed in (0, 1))
    evaluation.main([str(real), str(fake), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")])
    pixels = json.loads((tmp_path / "out.json").read_text())["pixels"]
    names = [f"{region} {figure}" for region in ("complete", "lung") for figure in ("PSNR", "RMSE", "NRMSE", "SSIM")]
    assert bench.judged(real, fake) == pytest.approx([pixels[name]["mean"] for name in names], rel=1e-4)


def test_where_openvino_cannot_be_had_a_line_says_so(monkeypatch, tmp_path, capsys):
    def refuse(*command):
        raise Mistake("ERROR: No matching distribution found")

    monkeypatch.setattr(bench, "run", refuse)
    monkeypatch.setattr(bench, "exported", lambda *a, **more: tmp_path / "generator.onnx")
    args = bench.parse(["--with-openvino"])
    makers = bench.synthesizers(tmp_path / "ckpt.pt", np.zeros((1, 64, 64), np.uint8), args, tmp_path)
    assert not any("OpenVINO" in name for name in makers) and "generator.onnx" in makers
    assert capsys.readouterr().err == "note: no OpenVINO here: ERROR: No matching distribution found\n"


# ---- the whole


def test_a_part_gives_a_table_and_the_keys_of_its_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ceilings", lambda device: {"numpy": make_fast_ceiling, "numpy bf16": make_fast_bf16})
    small = "--quick --rounds 2 --train-size 64 --train-width 8 --batch 1 --parts train"
    bench.main([*small.split(), "--json", str(tmp_path / "b.json")])
    found, printed = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    rows = found["parts"]["train"]["tables"]["joint"]
    ratios = np.divide(rows["ours"]["seconds"], rows["plain"]["seconds"])
    assert found["train_step_ratio"] == pytest.approx(np.median(ratios))
    assert found["train_memory_ratio"] > 0 and rows["ours"]["fraction"] < 1 and found["errors"] == []
    assert "train_step_ratio" in printed and "at most 0.4" in printed
    assert max(map(len, printed.splitlines())) <= bench.COLUMNS


def make_fast_ceiling():
    return (lambda: None), {"flop": 1e12, "dtype": "float32", "ceiling": "nothing"}


def make_fast_bf16():
    return (lambda: None), {"flop": 1e12, "dtype": "bfloat16", "ceiling": "nothing"}


def test_what_is_printed_fits_100_columns():
    ratio = {"median": 12.34, "min": 11.11, "max": 123.45}
    told = f"{bench.shown(ratio)} of time, {bench.shown(ratio)} memory, 0.90 FLOP"
    name = max(["generator.onnx", "OpenVINO bf16", "infer_onnx.py", "scikit-image"], key=len)
    big = row(1e15, 1000.0, 900.0, 1234.5, ceiling="conv 512 x 64 x 64, channels last", told=told)
    rows = bench.with_fractions({name: {**big, "net_bytes": 99_999e6}})
    figures = {key: {**ratio, "by": f"{name}, 1234 HU off"} for key in bench.GOALS}
    printed = bench.report("synth", {"about": "long " * 40, "tables": {"": rows}, "figures": figures}).splitlines()
    assert max(map(len, printed)) <= bench.COLUMNS
    assert all(line in printed for line in bench.table(rows))  # not one is broken


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--parts", "nothing"], "invalid choice"),
        (["--checkpoint", "nowhere.pt"], "no such checkpoint"),
        (["--slices", "4"], "multiple of 3"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_usage_is_one_line(options, word):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(Mistake, match=word):
        bench.parse(options)


def test_a_mistake_ends_with_status_2(cli):
    done = cli("--rounds", "0", script=ROOT / "bench.py")
    assert (done.status, done.stdout, done.stderr) == (2, "", "error: --rounds 0: give 1 or more\n")
