"""The tour's page has the script's words and today's pictures, and the gallery shows what its script makes."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy import ndimage

from data.slices import read_map

pytestmark = pytest.mark.long
DOCS, WEB = ROOT / "docs", ROOT / "web"


def words(page):
    """A page without its figures."""
    return re.sub(r"-?\d+(\.\d+)?", "0", page)


def pixels(path):
    return np.asarray(Image.open(path).convert("L")).astype(float)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a tour whose trainings have ten steps a stage."""
    folder = tmp_path_factory.mktemp("tour")
    command = [sys.executable, DOCS / "tour.py", "--quick", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_page_has_the_words_of_the_script_and_a_picture_of_each_cell(quick):
    page = (DOCS / "tour.md").read_text()
    assert words((quick / "tour.md").read_text()) == words(page)
    shown = re.findall(r"!\[.*\]\(tour/(.*)\)", page)
    assert len(shown) == page.count("\n## ") == 9 and {*shown} == {path.name for path in (DOCS / "tour").iterdir()}
    for name in shown:
        assert pixels(DOCS / "tour" / name).std() > 20 and pixels(quick / "tour" / name).std() > 20


def test_pictures_that_hang_on_no_training_are_todays(quick):
    for name in ("map.png", "shipped.png", "volume.png"):
        now, then = pixels(quick / "tour" / name), pixels(DOCS / "tour" / name)
        assert now.shape == then.shape and np.abs(now - then).mean() < 1, name


def test_the_gallery_shows_one_lung_that_differs_in_its_lesions_alone(monkeypatch):
    monkeypatch.syspath_prepend(WEB)
    import gallery

    import infer_onnx

    generator = infer_onnx.Generator(*infer_onnx.open_session(infer_onnx.SHIPPED_MODEL, "cpu"))
    path = infer_onnx.EXAMPLES / f"{gallery.SHOWN[0]}.png"
    labels = read_map(path)
    states = gallery.states_of(generator, labels, gallery.body_of(path, labels.shape))
    far, deep = (ndimage.distance_transform_edt(where) > 9 for where in (labels < 2, labels > 1))
    healthy, glass, dense = states
    assert np.abs(glass - healthy)[far].max() == 0 and (healthy[deep].mean() + 60 < glass[deep].mean() < -500)
    assert glass[deep].mean() + 200 < dense[deep].mean()
    for state, hu in zip(gallery.STATES, states, strict=True):
        for window, (level, width) in gallery.WINDOWS.items():
            shown = pixels(WEB / f"gallery/{path.stem}_{state}_{window}.png")
            assert np.abs(shown - gallery.slices.windowed(hu, level, width)).mean() < 0.5


def test_tour_and_gallery_stay_short_and_small():
    lines = {path: (ROOT / path).read_text().count("\n") for path in ("docs/tour.py", "web/gallery.html")}
    assert lines["docs/tour.py"] <= 250 and lines["web/gallery.html"] <= 120
    assert sum(path.stat().st_size for folder in (DOCS / "tour", WEB / "gallery") for path in folder.iterdir()) < 1.5e6
