"""The same seed on the same machine gives the same bytes, script by script."""

import json
import time

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from test_eval_texture import save_features
from test_infer import build_generator, draw_map
from test_prepare import put_patient
from whole import files_of, with_long_alone

import covidgan
import eval as evaluation
import export
import infer_onnx
from data import phantom, prepare
from data.slices import write_map
from paper import rivals, segment


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
    """In this process after others, against one of its own."""
    out = tmp_path / "out"
    done = here("--stage", "all", "--data", toy.folder, "--out", out, *small_run, "--interval", 5)
    assert done.status == 0, done.stderr
    assert contents(out) == contents(whole_run[0])


@pytest.mark.parametrize("name", ["pix2pix", "SEAN", "U-Net"])
def test_a_rivals_training_and_a_unets_and_what_is_exported_of_them(name, twice, toy, monkeypatch, tries):
    if name != "U-Net":
        with_long_alone(tries)
    monkeypatch.setattr(covidgan.signal, "signal", lambda *_: None)  # the loop takes over its process's
    program = segment.main if name == "U-Net" else lambda argv: rivals.main([name, *argv])
    small = ["--preset", "tiny", "--data", str(toy.folder), "--epoch-len", "8", "--device", "cpu", "--overwrite"]

    def run(out, _):
        program([*small, "--out", out])
        export.main([out, "-o", f"{out}/g.onnx"])

    first, second = twice(run)
    assert first == second


@pytest.mark.parametrize("options", [[], ["--fp16"], ["--target", "cpu"], ["--pack"]])
def test_an_exported_generator_whatever_seed_python_hashes_by(whole_run, twice, cli, tries, options):
    if options:
        with_long_alone(tries)

    def run(out, turn):
        command = [whole_run[0] / "ckpt.pt", "-o", f"{out}/g.onnx", *options]
        done = cli(*command, script=ROOT / "export.py", env={"PYTHONHASHSEED": str(2 * turn + 1)}, timeout=600)
        assert done.status == 0, done.stderr

    first, second = twice(run)
    assert first == second


def test_synthesized_slices_and_what_is_measured_of_them(twice, toy, tmp_path):
    model, features = build_generator(tmp_path / "model.onnx"), tmp_path / "features.onnx"
    save_features(features)

    def synthesize_and_measure(out, _):
        infer = ["--model", str(model), "--out", out, "--provider", "cpu", "--threads", "1"]
        assert infer_onnx.main([str(toy.folder), "--side", "test", "--panel", *infer]) == 0
        judges = ["--features", str(features), "--train", str(toy.folder)]
        evaluation.main([str(toy.folder), out, *judges, "--out", f"{out}/eval", "--json", f"{out}/eval.json"])

    first, second = twice(synthesize_and_measure)
    assert first == second
    assert {"pixels", "features", "memorisation"} <= json.loads(first["eval.json"]).keys()


def test_volumes_at_whatever_hour(twice, tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    labels = np.stack([draw_map(32, 32, shift=z) for z in range(3)]).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([-1.0, -1, 5, 1])), tmp_path / "labels" / "a.nii.gz")
    model = build_generator(tmp_path / "model.onnx")

    def run(out, turn):
        monkeypatch.setattr(time, "time", lambda: 1e9 * (1 + turn))
        infer_onnx.main([str(tmp_path / "labels"), "--model", str(model), "--provider", "cpu", "--out", out])

    first, second = twice(run)
    assert first == second and "volumes/a.nii.gz" in first


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
