"""The same seed on the same machine gives the same bytes, script by script."""

import json
import time

import pytest
import torch
from conftest import ROOT
from test_infer import build_generator, draw_map
from test_prepare import put_patient
from test_training import differing
from whole import files_of

import eval as evaluation
import infer_onnx
from data import phantom, prepare
from data.slices import write_map


def contents(folder):
    return {name: path.read_bytes() for name, path in files_of(folder).items()}


@pytest.fixture
def twice(tmp_path):
    """What a program leaves in tmp_path/out, run twice: twice(lambda out, turn: ...)."""

    def run(program):
        left = []
        for turn in (0, 1):
            out = tmp_path / "out"
            out.mkdir()
            program(str(out), turn)
            left.append(contents(out))
            out.rename(tmp_path / f"was{turn}")
        assert left[0]
        return left

    return run


def test_the_phantom_by_however_many_workers(twice):
    size = ["--size", "64", "--patients", "3", "--slices", "2"]
    first, second = twice(lambda out, turn: phantom.main(["--out", out, *size, "--workers", str(turn + 1)]))
    assert first == second


def test_a_prepared_set(twice, tmp_path):
    for number in (1, 2, 3):
        put_patient(tmp_path / "src", number)
    first, second = twice(lambda out, _: prepare.main([str(tmp_path / "src"), "--out", out, "--size", "24"]))
    assert first == second


def test_a_training_and_its_pictures(whole_run, toy, small_run, here, tmp_path):
    """In this process after others, against one of its own; bytes but for the folder's name in the checkpoint."""
    out = tmp_path / "out"
    done = here("--stage", "all", "--data", toy.folder, "--out", out, *small_run, "--interval", 5)
    assert done.status == 0, done.stderr
    ours, theirs = contents(out), contents(whole_run[0])
    both = [torch.load(folder / "ckpt.pt", weights_only=True) for folder in (out, whole_run[0])]
    assert differing(*both) == []
    assert {name: one for name, one in ours.items() if name != "ckpt.pt"} == {
        name: one for name, one in theirs.items() if name != "ckpt.pt"
    }


def test_an_exported_generator_whatever_seed_python_hashes_by(whole_run, twice, cli):
    def run(out, turn):
        command = [whole_run[0] / "ckpt.pt", "-o", f"{out}/g.onnx"]
        done = cli(*command, script=ROOT / "export.py", env={"PYTHONHASHSEED": str(2 * turn + 1)}, timeout=600)
        assert done.status == 0, done.stderr

    first, second = twice(run)
    assert first == second


def test_synthesized_slices_and_what_is_measured_of_them(twice, toy, tmp_path):
    model = build_generator(tmp_path / "model.onnx")

    def synthesize_and_measure(out, _):
        infer = ["--model", str(model), "--out", out, "--provider", "cpu", "--threads", "1"]
        assert infer_onnx.main([str(toy.folder), "--side", "test", "--panel", *infer]) == 0
        evaluation.main([str(toy.folder), out, "--out", f"{out}/eval", "--json", f"{out}/eval.json"])

    first, second = twice(synthesize_and_measure)
    assert first == second
    assert json.loads(first["eval.json"])["pixels"]


@pytest.mark.parametrize("form", ["png16", "png8", "npy", "nifti"])
def test_variants_of_a_seed_in_every_format_at_whatever_hour(form, twice, tmp_path, monkeypatch):
    (tmp_path / "maps").mkdir()
    for k in range(3):
        write_map(tmp_path / "maps" / f"P01_S{k:03d}.png", draw_map(64, 64, shift=k))
    model = build_generator(tmp_path / "model.onnx")
    argv = [str(tmp_path / "maps"), "--model", str(model), "--provider", "cpu", "--variants", "3", "--seed", "5"]

    def run(out, turn):
        monkeypatch.setattr(time, "time", lambda: 1e9 * (1 + turn))
        infer_onnx.main([*argv, "--format", form, "--out", out])

    first, second = twice(run)
    assert first == second
