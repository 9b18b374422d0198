"""What a clone comes with: example maps, a trained generator, and what infer_onnx.py takes where nothing is named."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_infer import METADATA, build_generator, direct, draw_map

import infer_onnx
from data import phantom
from data.slices import Mistake, read_image, read_map, write_map

HERE = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((HERE / "models/examples").glob("*.png"))


def shares(labels):
    """Ground glass and consolidation as shares of the lung."""
    counts = np.bincount(labels.ravel(), minlength=4)
    return counts[2:] / counts[1:].sum()


# ------------------------------------------------------------------------------------------------ the examples


def test_the_examples_are_five_maps_of_256_pixels_in_the_formats_palette():
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        labels = read_map(path)
        assert labels.shape == (256, 256) and 4000 < np.count_nonzero(labels) < 30000
        assert Image.open(path).mode == "P" and path.stat().st_size < 2000


def test_the_examples_show_health_glass_consolidation_both_and_a_large_lesion():
    glass, dense = np.array([shares(read_map(path)) for path in EXAMPLES]).T
    healthy, mixed = glass + dense == 0, (glass > 0.05) & (dense > 0.05)
    assert healthy.sum() == 1 and mixed.sum() == 2
    assert ((glass > 0.15) & (dense == 0)).sum() == 1 and ((dense > 0.05) & (glass < 0.02)).sum() == 1
    assert (glass + dense).max() > 0.3


def test_the_examples_are_slices_of_the_phantom():
    for path in EXAMPLES:
        patient, position = (int(part[1:]) for part in path.stem.split("_"))
        level = float(np.linspace(0.96, 0.06, 24)[position - 1])
        _, labels = phantom.draw_slice(phantom.draw_patient(0, patient), level, 256)
        assert (labels != read_map(path)).mean() < 1e-3  # another processor may round a border otherwise


# ------------------------------------------------------------------------------------------------ what is taken


@pytest.fixture
def clone(tmp_path):
    """Of a fresh clone what infer_onnx.py needs, with a stand-in for the trained generator."""
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    shutil.copy(HERE / "infer_onnx.py", folder)
    for name in ("runtime.py", "slices.py"):
        shutil.copy(HERE / "data" / name, folder / "data")
    shutil.copytree(HERE / "models/examples", folder / "models/examples")
    build_generator(folder / "models/covid-ct-256.onnx", metadata={**METADATA, "size": "256"})
    return folder


def script(clone, *options, cwd):
    """Run the clone's script as a user does."""
    command = [sys.executable, clone / "infer_onnx.py", *map(str, options), "--provider", "cpu", "--threads", "1"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_a_fresh_clone_makes_slices_of_its_examples_by_its_model_from_any_folder(clone, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = script(clone, "maps/", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and "%|" not in line]
    model = clone / "models/covid-ct-256.onnx"
    assert told == [
        f"maps is not there: taking {clone / 'models/examples'}",
        f"generator.onnx is not there: taking {model}",
        f"{model} runs on cpu, threads: 1",
    ]
    made = sorted((elsewhere / "synthetic/images").iterdir())
    assert [path.name for path in made] == [path.name for path in EXAMPLES]
    for path, example in zip(made, EXAMPLES, strict=True):
        assert np.array_equal(read_image(path), direct(model, read_map(example)))


def test_without_any_model_it_is_one_line(clone, tmp_path):
    (clone / "models/covid-ct-256.onnx").unlink()
    done = script(clone, clone / "models/examples", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: generator.onnx: no such file: python export.py writes it, or name another\n"
    assert not (tmp_path / "synthetic").exists()


@pytest.mark.parametrize("given, taken", [([], "own"), (["--model", "other.onnx"], "other")])
def test_a_model_of_the_users_goes_before_the_shipped_one(clone, tmp_path, monkeypatch, capfd, given, taken):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer_onnx, "SHIPPED_MODEL", clone / "models/covid-ct-256.onnx")
    for name, path in (("own", "generator.onnx"), ("other", "other.onnx")):
        build_generator(Path(path), metadata={**METADATA, "checkpoint_sha256": name})
    Path("maps").mkdir()
    write_map(Path("maps/P00_S000.png"), draw_map())
    assert infer_onnx.main(["maps", "--provider", "cpu", *given]) == 0
    assert json.loads(Path("synthetic/run.json").read_text())["checkpoint_sha256"] == taken
    assert "taking" not in capfd.readouterr().err


def test_a_model_that_was_named_and_is_not_there_is_not_replaced(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer_onnx, "SHIPPED_MODEL", clone / "models/covid-ct-256.onnx")
    with pytest.raises(Mistake, match=r"^missing\.onnx: no such file"):
        infer_onnx.main([str(clone / "models/examples"), "--model", "missing.onnx"])


def test_maps_are_the_users_else_the_phantoms_else_the_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert infer_onnx.find_maps(Path("maps/")) == {path.stem: path for path in EXAMPLES}
    assert capsys.readouterr().err == f"maps is not there: taking {HERE / 'models/examples'}\n"
    for folder, told in (("data/phantom/maps", "maps is not there: taking data/phantom/maps\n"), ("maps", "")):
        Path(folder).mkdir(parents=True)
        write_map(Path(folder, "P00_S000.png"), draw_map())
        assert infer_onnx.find_maps(Path("maps/")) == {"P00_S000": Path(folder, "P00_S000.png")}
        assert capsys.readouterr().err == told
    with pytest.raises(Mistake, match=r"^other: not there"):
        infer_onnx.find_maps(Path("other"))


# ------------------------------------------------------------------------------------------------ the trained generator


@pytest.mark.skipif(not infer_onnx.SHIPPED_MODEL.exists(), reason="models/covid-ct-256.onnx is not there")
def test_the_trained_generator_is_small_and_draws_lesions_denser_than_lung():
    assert infer_onnx.SHIPPED_MODEL.stat().st_size < 12e6
    session, info = infer_onnx.open_session(infer_onnx.SHIPPED_MODEL, "cpu", threads=1)
    assert info["size"] == 256 and "not for diagnosis" in info["licence"] and "CC BY-NC-SA 4.0" in info["licence"]
    digest = hashlib.sha256(infer_onnx.SHIPPED_MODEL.read_bytes()).hexdigest()
    assert f"| SHA-256 | `{digest}` |" in (HERE / "models/README.md").read_text()
    maps = np.stack([read_map(path) for path in EXAMPLES])
    hu = infer_onnx.Generator(session, info)(maps)
    lung, glass, dense = (hu[maps == label].mean() for label in (1, 2, 3))
    assert -950 < lung < glass - 60 < glass < -500 and -350 < dense < 150
