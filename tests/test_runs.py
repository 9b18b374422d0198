"""Runs of the experiments: trained once, gone on with where they stopped, measured by eval.py."""

import json
import os
import subprocess
import types

import numpy as np
import pytest

from data.slices import Mistake, write_image
from paper import fidelity, runs

PROGRAM = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
with open(out / "calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
sum(k * k for k in range(3_000_000))
if "--fail" in sys.argv:
    (out / "ckpt.pt").write_text("half")
    sys.exit(130)
(out / "results.json").write_text("{}")
"""


@pytest.fixture
def program(tmp_path):
    """A program that trains nothing and notes how it was called."""
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    return [str(path)]


def test_a_run_that_stopped_goes_on_and_one_that_is_whole_is_left_alone(program, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Mistake, match="status 130"):
        runs.train(program, ["--seed", "3", "--fail"], out)
    first = json.loads((out / "seconds.json").read_text())
    runs.train(program, ["--seed", "3", "--fail"], out)
    second = json.loads((out / "seconds.json").read_text())
    runs.train(program, ["--seed", "3", "--fail"], out)
    assert (out / "calls.txt").read_text().splitlines() == [f"--out {out} --seed 3 --fail", f"--out {out} --resume"]
    assert 0 < first < second == json.loads((out / "seconds.json").read_text())


def test_a_run_that_was_begun_by_another_row_is_not_taken_for_this_ones(program, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Mistake, match="status 130"):
        runs.train(program, ["--fail"], out, "--gan lsgan", dtype="float32")
    for _ in range(2):  # where it was stopped, and where it is whole
        with pytest.raises(Mistake, match=f"{out}: trained with '--gan lsgan', its row now has '--gan hinge'"):
            runs.train(program, [], out, "--gan hinge")
        runs.train(program, [], out, "--gan lsgan")
    assert len((out / "calls.txt").read_text().splitlines()) == 2
    (out / "begun.json").unlink()
    with pytest.raises(Mistake, match=r"begun\.json, which tells its row and its machine, is gone"):
        runs.train(program, [], out, "--gan hinge")


def test_what_is_noted_of_a_run_is_of_where_it_began_and_a_gpu_has_no_cpu_seconds(program, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(runs, "machine", lambda: "the first machine")
    with pytest.raises(Mistake, match="status 130"):
        runs.train(program, ["--fail"], out, "--row", dtype="bfloat16")
    assert runs.seconds(out) > 0
    monkeypatch.setattr(runs, "machine", lambda: "the second machine")
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: True)
    runs.train(program, [], out, "--row", dtype="float32")
    told = runs.begun(out)
    assert (told["row"], told["machine"], told["dtype"]) == ("--row", "the first machine", "bfloat16")
    assert told["commit"] == runs.commit() and runs.seconds(out) is None


def test_what_is_older_than_its_checkpoint_is_exported_anew(tmp_path, monkeypatch):
    called = []

    def export(script, source, option, file):
        called.append(source)
        file.write_bytes(source.read_bytes())

    monkeypatch.setattr(runs, "call", export)
    checkpoint, file = tmp_path / "ckpt.pt", tmp_path / "generator.onnx"
    checkpoint.write_bytes(b"half trained")
    assert runs.export(tmp_path) == runs.export(tmp_path) == file and called == [checkpoint]
    checkpoint.write_bytes(b"whole")
    os.utime(checkpoint, ns=(later := file.stat().st_mtime_ns + 1, later))
    assert runs.export(tmp_path).read_bytes() == b"whole" and len(called) == 2
    checkpoint.unlink()  # put away to save room
    assert runs.export(tmp_path) == file and len(called) == 2


def test_what_a_run_cost_is_its_cpu_time_and_not_that_of_others(program, tmp_path):
    before = runs.cpu_seconds()
    runs.train(program, [], tmp_path / "run")
    assert json.loads((tmp_path / "run" / "seconds.json").read_text()) == pytest.approx(runs.cpu_seconds() - before)


def test_a_run_is_found_by_its_seed_and_a_copy_put_aside_is_none(tmp_path):
    for name in ("a_paper_0", "a_paper_10", "a_paper_2", "a_paper_0_old", "a_paper_old_0", "a_paper_", "ab_paper_1"):
        (tmp_path / name).mkdir()
    assert runs.seeded(tmp_path, "a_paper") == {seed: tmp_path / f"a_paper_{seed}" for seed in (0, 2, 10)}
    assert [*runs.seeded(tmp_path, "a_paper")] == [0, 2, 10]


def split_in(folder, **sides):
    """A folder that holds a split alone."""
    folder.mkdir(exist_ok=True)
    (folder / "split.json").write_text(json.dumps(sides))
    return folder


def test_sets_that_would_measure_a_generator_on_what_it_was_trained_on_are_refused(tmp_path):
    good = {"train": ["P1_1", "P1_2"], "test": ["P2_1"], "seg_test": ["P3_1"]}
    data, reference = split_in(tmp_path / "256", **good), split_in(tmp_path / "128", **good)
    runs.check_sides(data, reference)
    split_in(data, **good | {"train": ["P1_1", "P3_1"], "seg_test": ["P1_2"]})
    with pytest.raises(Mistake, match="not the same slices under train: prepare both alike, but for --size"):
        runs.check_sides(data, reference)
    for folder in (data, reference):
        split_in(folder, **good | {"seg_test": ["P2_1"]})
    with pytest.raises(Mistake, match=r"128/split\.json: P2_1 is on two sides"):
        runs.check_sides(data, reference)
    split_in(reference, **good | {"seg_test": []})
    with pytest.raises(Mistake, match=r"128/split\.json: no names under seg_test"):
        runs.check_sides(data, reference)
    split_in(data, **good | {"seg_test": []})
    runs.check_sides(data, reference, ("train", "test"))


@pytest.mark.parametrize("first", ["unet_real_0/ckpt.pt", "label_means/results.json", "unet_real_0/data/split.json"])
def test_a_folder_keeps_the_setting_of_its_runs_and_that_of_the_split(tmp_path, first):
    data, out = split_in(tmp_path / "set", train=["P1_1"], test=["P2_1"]), tmp_path / "out"
    (data / "images").mkdir()
    write_image(data / "images" / "P1_1.png", np.zeros((32, 32)))
    out.mkdir()
    runs.keep_setting(out, data, data, {"unet_samples": 120})  # a slip, stopped before anything was made
    runs.keep_setting(out, data, data, {"unet_samples": 4000})
    (out / first).parent.mkdir(parents=True)
    (out / first).touch()
    data = data.rename(tmp_path / "moved")
    runs.keep_setting(out, data, data, {"unet_samples": 4000})
    with pytest.raises(Mistake, match="out: made with --unet-samples 4000, not 8000: give that, or another --out"):
        runs.keep_setting(out, data, data, {"unet_samples": 8000})
    split_in(data, train=["P2_1"], test=["P1_1"])
    with pytest.raises(Mistake, match="out: made with split of both"):
        runs.keep_setting(out, data, data, {"unet_samples": 4000})
    split_in(data, train=["P1_1"], test=["P2_1"])
    write_image(data / "images" / "P1_1.png", np.zeros((64, 64)))
    with pytest.raises(Mistake, match="out: made with size of the data 32, not 64"):
        runs.keep_setting(out, data, data, {"unet_samples": 4000})


def test_every_row_of_the_study_is_a_command_that_training_takes():
    import covidgan
    from paper.study import Study

    for row, (about, options) in fidelity.ROWS.items():
        c = covidgan.parse_config([*fidelity.SCALE, "--size", "128", *options], Study)
        assert about and (c.size, c.ngf, c.n_blocks, c.noise) == (128, 32, 6, 0.01 if row == "paper" else 0.0)
    base, best = (covidgan.parse_config([*fidelity.SCALE, *fidelity.ROWS[row][1]], Study) for row in ("base", "best"))
    assert (base.lr, base.lambda_dfm, base.dfm, base.contrast) == (2e-4, 10, "learned", 0)
    assert {name: getattr(best, name) for name in covidgan.BEST} == covidgan.BEST and best.contrast == 4


def test_a_study_that_would_lose_runs_of_its_json_is_refused_before_it_trains(three_sides, tmp_path):
    records = [{"row": row, "seed": seed} for row, seed in (("joint", 0), ("flip", 1))]
    (tmp_path / "fidelity-2.json").write_text(content := json.dumps({"records": records}))
    there = tmp_path / "study" / "joint_0"
    there.mkdir(parents=True)
    (there / "results.json").write_text("{}")
    argv = ["--data", three_sides, "--reference", three_sides, "--out", there.parent, "--results", tmp_path]
    with pytest.raises(Mistake, match=r"fidelity-2.json has runs that .*study has not: flip 1: make these too"):
        fidelity.main([*map(str, argv), "--rows", "joint"])
    assert (tmp_path / "fidelity-2.json").read_text() == content and not (there.parent / "setting.json").exists()
    args = fidelity.parse([*map(str, argv), "--rows", "flip", "--seeds", "0", "1"])
    fidelity.check_rows(tmp_path / "fidelity-2.json", args)  # nothing would be lost


def test_the_table_gives_means_over_seeds_and_their_spread():
    values = [{column: k + 0.5 for column in fidelity.FIGURES} | {"seconds": 1000 + k} for k in range(3)]
    lines = fidelity.summary(
        {"cut": [{"test": v, "seg_test": v} for v in values], "one": [{"test": values[0]} | {"seg_test": values[0]}]}
    )
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert len({*map(len, cells)}) == 1
    assert cells[2][:3] == ["cut", "3", f"1.50 +- {np.std([0.5, 1.5, 2.5], ddof=1):.2f}"] and cells[2][-1] == "1001"
    assert cells[3][:3] == ["one", "1", "0.50"]


def test_a_row_trains_exports_synthesizes_and_is_measured_on_both_sides_once(three_sides, tmp_path, monkeypatch):
    tiny = ["--ngf", "8", "--ndf", "8", "--n-blocks", "1", "--n-local-blocks", "1"]
    tiny += ["--batch", "2", "--epochs", "1", "--epoch-len", "4"]
    monkeypatch.setattr(fidelity, "SCALE", tiny)
    monkeypatch.setitem(fidelity.ROWS, "small", ("a start", ["--interval", "9"]))
    args = types.SimpleNamespace(data=three_sides, reference=three_sides, epochs=1, out=tmp_path / "study")
    called = []
    real = runs.call
    monkeypatch.setattr(runs, "call", lambda *arguments, **_: called.append(arguments) or real(*arguments))
    measured = fidelity.run("small", 1, args, 64)
    for side, n in (("test", 6), ("seg_test", 6)):
        results = json.loads((args.out / "small_1" / f"eval_{side}" / "results.json").read_text())
        assert results["run"]["pairs"]["measured"] == n
        assert measured[side]["PSNR"] == results["pixels"]["complete PSNR"]["mean"] > 10
        assert measured[side]["lung FD 24"] is None  # of six slices
        assert measured[side]["lung KID"] == 1000 * results["features"]["lung KID 1280"]["value"]
    assert len(called) == 7  # training, features, export, and of each side synthesis and measurement
    assert fidelity.run("small", 1, args, 64) == measured and len(called) == 7
    told = fidelity.as_json({"small": {1: measured}}, args)
    assert told["setting"]["data"]["test"] == {"slices": 6, "patients": 1} and told["setting"]["commits"]
    assert {"row": "small", "seed": 1, "side": "test", "metric": "PSNR", "value": measured["test"]["PSNR"]} in told[
        "records"
    ]


def test_what_was_kept_of_a_run_and_is_broken_is_one_line(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "setting.json").write_text("{}")
    runs.keep_measures(tmp_path, "covidgan_3", {"seconds": 1.5})
    assert runs.kept_seeds(tmp_path, "covidgan")[3]["seconds"] == 1.5
    assert runs.kept_measures(tmp_path, "covidgan_4") is None
    for broken in ("<<<<<<< ours\n", "[1]", "[" * 10**5):
        (tmp_path / "runs" / "covidgan_3.json").write_text(broken)
        with pytest.raises(Mistake, match=r"runs/covidgan_3.json: not .*: restore it, or delete it"):
            runs.kept_seeds(tmp_path, "covidgan")


def test_the_commit_is_dirty_by_code_and_not_by_what_tables_write(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "paper" / "results").mkdir(parents=True)
    files = [tmp_path / "code.py", tmp_path / "paper" / "results" / "table2.json", tmp_path / "paper" / "README.md"]
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert runs.commit() == "unknown"
    for path in files:
        path.write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    for path in files[1:]:
        path.write_text("2")
    assert len(runs.commit()) == 12
    files[0].write_text("2")
    assert runs.commit().endswith("-dirty") and len(runs.commit()) == 18
