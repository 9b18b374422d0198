"""Runs of the experiments: trained once, gone on with where they stopped."""

import json

import numpy as np
import pytest

from data.slices import Mistake, write_image
from paper import runs

PROGRAM = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
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
    out, before = tmp_path / "run", runs.cpu_seconds()
    with pytest.raises(Mistake, match="status 130"):
        runs.train(program, ["--seed", "3", "--fail"], out, "--row")
    part = runs.begun(out)["seconds"]
    for _ in range(2):
        runs.train(program, ["--seed", "3", "--fail"], out, "--row")
    assert (out / "calls.txt").read_text().splitlines() == [f"--out {out} --seed 3 --fail", f"--out {out} --resume"]
    assert 0 < part < runs.begun(out)["seconds"] <= runs.cpu_seconds() - before  # of both parts


def test_of_a_run_that_was_killed_no_seconds_are_told(program, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "call", lambda *_: (tmp_path / "ckpt.pt").write_text("half"))
    runs.train(program, [], tmp_path)
    runs.write_json(tmp_path / "begun.json", runs.begun(tmp_path) | {"seconds": None})  # as it was while it ran
    runs.train(program, [], tmp_path)
    assert runs.begun(tmp_path)["seconds"] is None


def test_a_draw_is_found_under_its_maps_name(tmp_path):
    (tmp_path / "drawn_test" / "images").mkdir(parents=True)
    for name in ("P1_d01d01", "P1_2d01", "P1_2d02"):
        (tmp_path / "drawn_test" / "images" / f"{name}.png").write_text(name)
    for _ in range(2):
        links = runs.first_draws(tmp_path / "drawn_test")
    assert {path.name: path.read_text() for path in links.iterdir()} == {
        "P1_d01.png": "P1_d01d01",
        "P1_2.png": "P1_2d01",
    }


def test_what_a_run_cost_is_noted_and_one_that_was_begun_by_another_row_is_not_taken(program, tmp_path):
    before = runs.cpu_seconds()
    runs.train(program, [], tmp_path / "run", "--gan lsgan")
    told = runs.begun(tmp_path / "run")
    assert 0 < told["seconds"] <= runs.cpu_seconds() - before and told["machine"] == runs.machine()
    with pytest.raises(Mistake, match=r"lsgan.*hinge"):
        runs.train(program, [], tmp_path / "run", "--gan hinge")


def test_what_a_run_has_measured_is_kept_by_seed_and_a_copy_put_aside_is_none(tmp_path):
    for name in ("a_10", "a_2", "a_2_old", "a_old_0", "ab_1"):
        runs.keep(tmp_path, name, lambda: {"options": "--row", "seconds": 1.5})
    assert runs.keep(tmp_path, "a_2", lambda: pytest.fail("is kept")) == {"options": "--row", "seconds": 1.5}
    assert [*runs.kept(tmp_path, "a", "options", "--row")] == [2, 10]
    with pytest.raises(Mistake, match=r"a_2\.json"):
        runs.kept(tmp_path, "a", "options", "--other")
    (tmp_path / "runs" / "a_10.json").write_text("<<<<<<< ours\n")
    with pytest.raises(Mistake, match=r"a_10\.json"):
        runs.kept(tmp_path, "a", "options", "--row")


def split_in(folder, **sides):
    """A folder that holds a split and one image of 32 pixels."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_image(folder / "images" / "P1_1.png", np.zeros((32, 32)))
    (folder / "split.json").write_text(json.dumps(sides))
    return folder


GOOD = {"train": ["P1_1", "P1_2"], "test": ["P2_1"], "seg_test": ["P3_1"]}


def test_sets_that_would_measure_a_generator_on_what_it_was_trained_on_are_refused(tmp_path):
    data, reference = split_in(tmp_path / "256", **GOOD), split_in(tmp_path / "128", **GOOD)
    runs.check_sides(data, reference)
    split_in(data, **GOOD | {"train": ["P1_1", "P3_1"], "seg_test": ["P1_2"]})
    with pytest.raises(Mistake, match="train"):
        runs.check_sides(data, reference)
    split_in(reference, **GOOD | {"seg_test": []})
    with pytest.raises(Mistake, match=r"128/split\.json.*seg_test"):
        runs.check_sides(split_in(data, **GOOD), reference)


def test_a_folder_keeps_the_setting_of_its_runs(tmp_path):
    data = split_in(tmp_path / "set", **GOOD)
    parser = runs.parser("about", "out", [0])
    args = parser.parse_args(["--data", str(data), "--reference", str(data)])
    for _ in range(2):
        runs.keep_setting(tmp_path / "out", args, "seeds")
    args.seeds = [1]
    with pytest.raises(Mistake, match=r"out/setting\.json.*seeds"):
        runs.keep_setting(tmp_path / "out", args, "seeds")
    args.seeds = [0]
    split_in(data, **GOOD | {"test": ["P4_1"]})
    with pytest.raises(Mistake, match="split"):
        runs.keep_setting(tmp_path / "out", args, "seeds")
