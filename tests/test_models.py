"""What a clone comes with: example maps, a trained generator, and what infer_onnx.py takes where nothing is named."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, draw_map
from PIL import Image
from test_infer_steering import build_steered

import eval as evaluation
import infer_onnx
from data import phantom
from data.slices import read_image, read_map, windowed

SHIPPED = ROOT / "models/covid-ct-256.onnx"
EXAMPLES = sorted((ROOT / "models/examples").glob("*.png"))


def test_the_examples_are_five_maps_of_256_pixels_in_the_formats_palette():
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        labels = read_map(path)
        assert labels.shape == (256, 256) and 4000 < np.count_nonzero(labels) < 30000
        assert Image.open(path).mode == "P" and path.stat().st_size < 2000


def test_the_examples_show_health_glass_consolidation_both_and_a_large_lesion():
    counts = np.array([np.bincount(read_map(path).ravel(), minlength=4) for path in EXAMPLES])
    glass, dense = (counts[:, 2:] / counts[:, 1:].sum(1, keepdims=True)).T  # shares of the lung
    assert (glass + dense == 0).sum() == 1 and ((glass > 0.05) & (dense > 0.05)).sum() == 2
    assert ((glass > 0.15) & (dense == 0)).sum() == 1 and ((dense > 0.05) & (glass < 0.02)).sum() == 1
    assert (glass + dense).max() > 0.3


def test_the_examples_are_slices_of_the_phantom():
    for path in EXAMPLES:
        patient, position = (int(part[1:]) for part in path.stem.split("_"))
        level = float(np.linspace(0.96, 0.06, 24)[position - 1])
        _, labels = phantom.draw_slice(phantom.draw_patient(0, patient), level, 256)
        assert (labels != read_map(path)).mean() < 1e-3  # another processor may round a border otherwise


def test_the_trained_generator_is_small_and_draws_lesions_denser_than_lung():
    assert SHIPPED.stat().st_size < 17e6
    session, info = infer_onnx.open_session(SHIPPED, "cpu", threads=1)
    assert info["size"] == 256 and "not for diagnosis" in info["licence"] and "CC BY-NC-SA 4.0" in info["licence"]
    digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert f"| SHA-256 | `{digest}` |" in (ROOT / "models/README.md").read_text()
    hu = infer_onnx.Generator(session, info)(np.stack([read_map(path) for path in EXAMPLES]))
    lung, glass, dense = (hu[np.stack([read_map(path) for path in EXAMPLES]) == label].mean() for label in (1, 2, 3))
    assert -950 < lung < glass - 60 < glass < -500 and -350 < dense < 150


def test_it_is_steered_lesions_stay_local_density_is_obeyed_and_draws_differ(tmp_path):
    evaluation.main([str(EXAMPLES[0].parent), str(SHIPPED), "--json", str(tmp_path / "r.json"), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "r.json").read_text())["steering"]
    assert rows["other lung, mean"]["median"] < 10
    assert rows["density low"]["got"] + 20 < rows["density default"]["got"]
    assert rows["draws, RMS"]["median"] > 80


# ---- what is taken where nothing is named


def script(*options, cwd):
    """Run the script as a user does, from another folder."""
    command = [sys.executable, ROOT / "infer_onnx.py", *map(str, options), "--provider", "cpu", "--threads", "1"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_examples_and_the_shipped_model_are_taken_from_any_folder(tmp_path):
    done = script("maps/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for taken in (ROOT / "models/examples", SHIPPED):
        assert f"taking {taken}" in done.stderr
    made = sorted((tmp_path / "synthetic/images").iterdir())
    assert [path.name for path in made] == [path.name for path in EXAMPLES]
    generator = infer_onnx.Generator(*infer_onnx.open_session(SHIPPED, "cpu", threads=1))
    for path, example in zip(made, EXAMPLES, strict=True):
        hu, labels = read_image(path), read_map(example)
        wanted = generator(labels[None])[0]
        assert (hu[labels == 0] == np.maximum(wanted[labels == 0], -1024)).all()  # what files hold
        assert abs(hu[labels == 1].mean() - wanted[labels == 1].mean()) < 20  # another draw of the same density


def test_a_model_and_maps_of_the_users_go_before_the_shipped_ones(tmp_path):
    shutil.copy(SHIPPED, tmp_path / "generator.onnx")
    (tmp_path / "maps").mkdir()
    shutil.copy(EXAMPLES[0], tmp_path / "maps/P01_S001.png")
    done = script("maps/", cwd=tmp_path)
    assert done.returncode == 0 and "taking" not in done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "synthetic/images").iterdir()] == ["P01_S001.png"]


def test_a_model_that_was_named_and_is_not_there_is_not_replaced(tmp_path):
    done = script(ROOT / "models/examples", "--model", "missing.onnx", cwd=tmp_path)
    assert done.returncode == 2 and "missing.onnx" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "synthetic").exists()


# ---- the example client in JavaScript


@pytest.mark.long
def test_the_client_in_javascript_makes_the_slice_of_infer_onnx_to_1_hu(tmp_path):
    if not (npm := shutil.which("npm")):
        pytest.skip("no npm here: apt-get install npm")
    shutil.copy(ROOT / "docs/client.mjs", tmp_path)
    package = re.search(r"onnxruntime-node@[\d.]+", (tmp_path / "client.mjs").read_text())[0]
    install = [npm, "install", "--prefix", tmp_path, "--ignore-scripts", "--fetch-retries", "0", package]
    if (done := subprocess.run(install, capture_output=True, text=True, timeout=500)).returncode:
        pytest.skip(f"npm does not get {package}: {done.stderr[-200:]}")
    session, info = infer_onnx.open_session(SHIPPED, "cpu", threads=1)
    for part in (np.s_[:], np.s_[40:241, 6:], np.s_[118:138]):  # whole, of no multiple, and of less than two
        labels = read_map(EXAMPLES[-1])[part]
        labels.tofile(tmp_path / "map.raw")
        command = ["node", "client.mjs", SHIPPED, "map.raw", *map(str, labels.shape)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        hu = np.fromfile(tmp_path / "ct.raw", "<i2").reshape(labels.shape)
        assert np.abs(hu - infer_onnx.Generator(session, info)(labels[None])[0]).max() <= 1 and np.ptp(hu) > 500
        off = np.asarray(Image.open(tmp_path / "ct.pgm")) - windowed(hu, info["level"], info["width"]).astype(int)
        assert np.abs(off).max() <= 1  # halves are rounded otherwise
    build_steered(tmp_path / "steered.onnx")  # paints lung in the density, ground glass in the detail, and the seed
    for told, painted in (([], [-800, 75, 0]), ([-880, "nan", 7], [-880, 75, 7]), ([-880, 60], [-880, 60, 0])):
        draw_map().tofile(tmp_path / "map.raw")
        command = ["node", "client.mjs", "steered.onnx", "map.raw", "64", "64", *map(str, told)]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
        hu = np.fromfile(tmp_path / "ct.raw", "<i2").reshape(64, 64)
        assert [int(hu[draw_map() == label][0]) for label in (1, 2, 3)] == painted
    build_steered(tmp_path / "plain.onnx", ())
    command = ["node", "client.mjs", "plain.onnx", "map.raw", "64", "64", "-880"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode and "has no input that steers" in done.stderr
    shutil.rmtree(tmp_path / "node_modules")  # 291 MB


@pytest.mark.long
def test_the_training_script_goes_from_a_download_to_a_judged_generator(tmp_path):
    """At 64 pixels, from 32, by a few samples; slices of the phantom stand for those that were prepared before."""
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for size in (64, 128):
        made = ["--size", str(size), "--patients", "3", "--slices", "6", "--out", tmp_path / f"data/ct{size}"]
        subprocess.run([sys.executable, ROOT / "data/phantom.py", *made], check=True, capture_output=True)
    small = dict(FIRST="32", SAMPLES="8", STEERED="8", WIDTH="8", PYTHON=sys.executable)
    command = ["sh", tmp_path / "models/train.sh", tmp_path, "64"]
    done = subprocess.run(command, env=os.environ | small, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    info = infer_onnx.open_session(tmp_path / "out/ct64/generator.onnx", "cpu")[1]
    assert info["steers"] and info["size"] == 64
    for name in ("results", "steering"):
        assert json.loads((tmp_path / f"out/ct64/eval/{name}.json").read_text())
    steps = [(tmp_path / f"out/{run}/stats.jsonl").read_text().count("\n") for run in ("best32", "best64", "ct64")]
    assert steps == [6, 2, 2]
