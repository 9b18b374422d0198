"""The page in a real browser against infer_onnx.py and data/slices.py, with a small generator of random weights.

Wants Debian's package chromium, or a Chrome, and what `make runtime` fetches; without them the tests are skipped.
"""

import base64
import dataclasses
import functools
import http.server
import json
import os
import re
import shutil
import threading

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from scipy import ndimage
from test_data import MAPS, palette

import covidgan
import export
import infer_onnx
from data.slices import COLOURS, LABELS, coloured, read_image, read_map, windowed, write_image, write_map
from data.volumes import read_volume

pytestmark = pytest.mark.long

WEB, VENDOR = ROOT / "web", ROOT / "web" / "vendor"
SHIPPED = "**/models/covid-ct-256.onnx"
START = "P01_S008"  # the example that the page starts with
CDN = "https://cdn.jsdelivr.net/**"
SIZE = 64  # the generator's
SECONDS = 60_000  # in ms, for what takes one or two


# ------------------------------------------------------------------------------------------------ browser and page


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no browser here: apt-get install chromium")
    if not any(VENDOR.glob("*.wasm")):
        pytest.skip("no ONNX Runtime Web here: make runtime")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found[0], args=root)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """The address of the page, as `make web` serves it."""
    handler = functools.partial(Quiet, directory=ROOT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/web/"
        server.shutdown()


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A generator's file as export.py writes it."""
    torch.manual_seed(0)
    c = covidgan.Config(size=SIZE, ngf=16, ndf=8, n_blocks=1, n_local_blocks=1)
    method = covidgan.build(covidgan.Covidgan, c)
    for weights in method.g.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=(1.5 / weights[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("web") / "generator.onnx"
    checkpoint = {"config": dataclasses.asdict(c), "networks": method.state_dict(), "average": method.g.state_dict()}
    export.export_generator(checkpoint, "0" * 64, path)
    return path


class Page:
    """The page in a tab of its own, and what a user does there."""

    def __init__(self, tab, folder):
        self.tab, self.folder, self.saved = tab, folder, 0
        self.requests, self.faults = [], []
        tab.on("request", lambda request: self.requests.append(request))
        tab.on("pageerror", lambda fault: self.faults.append(fault))

    def open(self, address):
        self.tab.goto(address)
        return self

    def with_slice(self):
        """Wait until the slice of the map as it is can be saved."""
        self.tab.locator("#save-ct:enabled").wait_for()
        return self

    def wait_for(self, text):
        self.tab.get_by_text(text).first.wait_for()

    def line(self, error=False):
        """The line on top; wait for one that is an error, or none."""
        found = self.tab.locator("#message.error" if error else "#message:not(.error)")
        found.wait_for()
        return found.inner_text()

    def pick(self, what, *paths):
        self.tab.set_input_files(f"#{what}-file", paths)

    def choose(self, *names):
        for name in names:
            self.tab.get_by_role("radio", name=name, exact=True).check(force=True)

    def point(self, x, y):
        """Where a pixel of the map is on the screen."""
        canvas = self.tab.locator("#map")
        canvas.scroll_into_view_if_needed()
        box, (width, height) = canvas.bounding_box(), canvas.evaluate("(map) => [map.width, map.height]")
        return box["x"] + (x + 0.5) * box["width"] / width, box["y"] + (y + 0.5) * box["height"] / height

    def stroke(self, *points):
        self.tab.mouse.move(*self.point(*points[0]))
        self.tab.mouse.down()
        for point in points[1:]:
            self.tab.mouse.move(*self.point(*point), steps=4)
        self.tab.mouse.up()

    def press(self, *keys):
        self.tab.focus("#map")
        for key in keys:
            self.tab.keyboard.press(key)

    def set(self, slider, value):
        self.tab.locator(f"#{slider}").fill(str(value))

    def save(self, what):
        """Save the map or the CT, and read it as the scripts do."""
        with self.tab.expect_download() as download:
            self.tab.click(f"#save-{what}")
        self.saved += 1
        path = self.folder / f"{self.saved}" / download.value.suggested_filename
        download.value.save_as(path)
        return read_map(path) if what == "map" else read_image(path)


def refuses(page, what, path, words):
    """The page refuses a file in one line that names it, and says these words."""
    page.tab.evaluate("say('')")
    page.pick(what, path)
    line = page.line(error=True)
    assert line.startswith(path.name) and words in line and "\n" not in line


@pytest.fixture
def new_page(browser, generator, tmp_path):
    """Make a page that finds our generator where the repository's own would be; options are the browser's."""
    contexts = []

    def make(routes=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        context.set_default_timeout(SECONDS)
        tab = context.new_page()
        for pattern, action in {SHIPPED: lambda route: route.fulfill(path=generator), **(routes or {})}.items():
            tab.route(pattern, action)
        return Page(tab, tmp_path)

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page, site, tmp_path):
    """The page with a generator and a map of two lungs, at its slice; it must not throw."""
    page = new_page().open(site)
    page.wait_for(f"{START}, {SIZE} x {SIZE}")
    write_map(tmp_path / "lungs.png", draw_lungs() > 0)
    page.pick("map", tmp_path / "lungs.png")
    page.wait_for(f"lungs, {SIZE} x {SIZE}")
    yield page.with_slice()
    assert not page.faults


def draw_lungs(size=SIZE):
    """Two lungs with all labels in them, uint8 [size, size]."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    labels = np.zeros((size, size), np.uint8)
    for label, radius in ((1, 0.8), (2, 0.4), (3, 0.25)):
        labels[((abs(x) - 0.45) / 0.4) ** 2 + (y - 0.1 * label) ** 2 < radius**2] = label
    return labels


def not_there(route):
    route.fulfill(status=404)


def other_generator(generator, path, **metadata):
    """Write a generator with other metadata; those that are None are left out."""
    model = onnx.load(generator)
    entries = {entry.key: entry.value for entry in model.metadata_props} | metadata
    onnx.helper.set_model_props(model, {key: value for key, value in entries.items() if value is not None})
    onnx.save(model, path)
    return path


def as_scripts_have_it(page, model):
    """Save map and CT: lungs must be what infer_onnx.py makes of the map, to 1 HU. Returns labels and HU."""
    labels, hu = page.with_slice().save("map"), page.save("ct")
    expected = synthesized(labels, model)[labels > 0].clip(-1024)
    assert hu.shape == labels.shape
    assert np.ptp(expected) > 100  # else any slice would do
    assert np.abs(hu[labels > 0] - expected).max() <= 1
    return labels, hu


def synthesized(labels, model):
    """HU int [H, W] as infer_onnx.py makes them."""
    return infer_onnx.Generator(*infer_onnx.open_session(model, "cpu", 1))(labels[None])[0].astype(int)


# ------------------------------------------------------------------------------------------------ the slice


def test_a_painted_lesion_gives_the_hu_of_infer_onnx_to_1_hu(page, generator):
    page.choose("Ground glass")
    page.set("size", 6)
    page.stroke((15, 30), (20, 40))
    page.choose("Consolidation")
    for x in range(40, 56, 2):  # faster than slices are made
        page.stroke((x, 44), (x + 2, 40))
    labels, _ = as_scripts_have_it(page, generator)
    assert set(np.unique(labels)) == {0, 1, 2, 3} and labels.shape == (SIZE, SIZE)


def test_a_map_of_any_size_is_padded_and_cropped_as_infer_onnx_does(page, generator, tmp_path):
    write_map(tmp_path / "P01_S001.png", draw_lungs()[:50, :41])
    page.pick("map", tmp_path / "P01_S001.png")
    page.wait_for(f"41 x 50 pixels. The generator was trained at {SIZE} x {SIZE}")
    labels, _ = as_scripts_have_it(page, generator)
    assert labels.shape == (50, 41)


def test_every_example_is_a_map_of_the_repository_and_opens_at_the_generators_size(new_page, site):
    page = new_page().open(site)
    page.wait_for(f"{START}, {SIZE} x {SIZE}")
    names = page.tab.locator("#start option:not([disabled])").evaluate_all("(all) => all.map((one) => one.value)")
    examples = {path.stem: read_map(path) for path in sorted((ROOT / "models" / "examples").glob("*.png"))}
    assert names == [*examples] and {2, 3} <= {*np.unique(examples[START])}
    for name in (START, names[-1]):
        page.tab.select_option("#start", name)
        page.wait_for(f"{name}, {SIZE} x {SIZE}")
        assert np.array_equal(page.with_slice().save("map"), examples[name][2::4, 2::4])


def test_lungs_lie_in_a_body_that_closes_around_any_map(page, generator, tmp_path):
    for name, labels in {"both": draw_lungs(), "one": draw_lungs() * (np.arange(SIZE) < SIZE // 2)}.items():
        write_map(tmp_path / f"{name}.png", labels)
        page.pick("map", tmp_path / f"{name}.png")
        page.wait_for(f"{name}, {SIZE} x {SIZE}")
        _, hu = as_scripts_have_it(page, generator)
        beside = ndimage.binary_dilation(labels > 0) & (labels == 0)
        assert hu[beside].min() > -150  # flesh, no air
        assert hu[0, 0] < -950 and hu[-1, -1] < -950
    page.tab.click("#clear")
    assert page.with_slice().save("ct").max() < -1000


def test_the_sliders_show_the_slice_through_the_window_of_data_slices(page):
    hu = page.save("ct")
    lung = hu > -1024  # below it the file is clipped, the page not
    for level, width in ((-600, 1500), (-800, 300)):
        page.set("level", level)
        page.set("width", width)
        drawn = page.tab.locator("#ct").evaluate(
            "(ct) => [...ct.getContext('2d').getImageData(0, 0, ct.width, ct.height).data]"
        )
        rgba = np.array(drawn, np.uint8).reshape(*hu.shape, 4)
        assert np.array_equal(rgba[lung][:, 0], windowed(hu, level, width)[lung])
        assert (rgba[..., :3] == rgba[..., :1]).all() and (rgba[..., 3] == 255).all()
    page.tab.click("#reset")
    assert [page.tab.locator(f"#{slider}").input_value() for slider in ("level", "width")] == ["-600", "1500"]


def test_the_line_below_tells_of_the_map_and_the_slice_as_they_are(page):
    told, hu = page.tab.locator("#readout"), page.save("ct")
    page.press("3", "ArrowRight")
    row, column = map(int, re.findall(r"\d+", told.inner_text())[:2])
    assert told.inner_text().endswith(f", {hu[row, column]} HU")
    page.tab.uncheck("#inside")
    page.press("Space")
    hu = page.with_slice().save("ct")
    assert told.inner_text() == f"Row {row}, column {column}: consolidation, {hu[row, column]} HU"
    page.tab.click("#undo")
    page.with_slice()
    assert "consolidation" not in told.inner_text()


# ------------------------------------------------------------------------------------------------ painting


def test_leaving_asks_first_where_a_drawing_would_be_lost(page):
    asked = []
    page.tab.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.stroke((15, 30), (20, 40))
    page.save("map")
    page.tab.reload()
    assert asked == []  # it was saved
    page.with_slice().tab.select_option("#start", START)
    page.tab.reload()
    assert asked == []  # nothing was drawn
    page.with_slice().stroke((15, 30), (20, 40))
    page.tab.reload()
    assert asked == ["beforeunload"]


def test_undo_redo_and_clear_go_through_the_steps(page):
    maps = [page.save("map")]
    page.choose("Consolidation")
    page.stroke((15, 30), (20, 40))
    maps.append(page.save("map"))
    page.tab.click("#clear")
    maps.append(page.save("map"))
    assert (maps[1] == 3).any() and not maps[2].any()
    for action, step in (("#undo", 1), ("Control+z", 0), ("#redo", 1), ("Control+Shift+z", 2), ("Control+z", 1)):
        page.tab.click(action) if action[0] == "#" else page.tab.keyboard.press(action)
        assert np.array_equal(page.save("map"), maps[step]), action
    page.stroke((3, 3))  # changes nothing, and is no step
    assert page.tab.locator("#redo").is_enabled()
    page.stroke((40, 30), (44, 40))  # a new step, and there is no other to redo
    assert page.tab.locator("#redo").is_disabled()


def test_fill_paints_what_hangs_together_and_no_more(page):
    lungs = (draw_lungs() > 0).astype(np.uint8)
    page.choose("Fill", "Ground glass")
    y, x = np.argwhere(lungs[:, : SIZE // 2])[0]
    page.stroke((x, y))
    expected = lungs.copy()
    expected[:, : SIZE // 2] *= 2
    assert np.array_equal(page.save("map"), expected)
    page.stroke((0, 0))  # outside the lung, where no lesion may be
    assert np.array_equal(page.save("map"), expected)


def test_lesions_stay_inside_the_lung_unless_told_otherwise(page):
    before = page.save("map")
    page.choose("Consolidation")
    page.set("size", 20)
    page.stroke((3, 3))
    page.wait_for("Lesions stay inside the lung")
    page.stroke((SIZE // 2, 40), (10, 40))
    inside = page.save("map")
    assert (inside == 3).any() and np.array_equal(inside > 0, before > 0)
    page.tab.uncheck("#inside")
    page.stroke((3, 3))
    assert page.save("map")[3, 3] == 3


def test_a_brush_of_one_pixel_paints_that_pixel_and_a_fast_stroke_has_no_gaps(page):
    page.choose("Lung")
    page.tab.click("#clear")
    page.set("size", 1)
    page.stroke((7, 9))
    assert np.argwhere(page.save("map")).tolist() == [[9, 7]]
    page.tab.click("#clear")
    page.tab.mouse.move(*page.point(2, 2))
    page.tab.mouse.down()
    page.tab.mouse.move(*page.point(60, 30))  # in one go
    page.tab.mouse.up()
    assert page.save("map").any(0)[2:61].all()


def test_the_keyboard_alone_paints(page):
    page.tab.click("#clear")
    page.press("[", *["Shift+ArrowRight"] * 2, *["Shift+ArrowDown"] * 3, "ArrowLeft", "1", "Space")
    labels = page.save("map")
    assert labels[30, 19] == 1 and np.count_nonzero(labels) == pytest.approx(np.pi * 7**2, rel=0.1)
    page.press("f", "0", "Space")
    assert not page.save("map").any()


def test_a_finger_paints_on_a_phone_that_need_not_scroll_sideways(new_page, site):
    phone = new_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, device_scale_factor=2)
    phone.open(site)
    phone.wait_for(f"{START}, {SIZE} x {SIZE}")
    assert phone.tab.evaluate("document.documentElement.scrollWidth") <= 360
    phone.choose("Erase")
    before = phone.save("map")
    phone.tab.touchscreen.tap(*phone.point(16, 40))
    erased = (before > 0) & (phone.save("map") == 0)
    assert erased[40, 16] and erased.sum() < 300


# ------------------------------------------------------------------------------------------------ maps in


PAINTED = [COLOURS[label] for label in (2, 0, 3, 1)]  # a paint program's order
ORDER = np.array((1, 3, 0, 2), np.uint8)  # a label's place in it
FORMS = MAPS | {
    "palette of 256": lambda labels: palette(ORDER[labels], PAINTED + [(9, 9, 9)] * 252),
    "palette, background clear": lambda labels: palette(ORDER[labels], [PAINTED[0], (9, 9, 9), *PAINTED[2:]]),
}


def test_a_map_of_ones_own_loads_as_the_scripts_read_it_in_whatever_form(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 4, (41, 50), np.uint8)  # has PNG use all its ways of filtering rows
    maps = {"lungs": draw_lungs(), "noise": noise}
    for name, form, labels in [(f"{name} {k}", form, maps[name]) for name in maps for k, form in enumerate(FORMS)]:
        path = tmp_path / f"{name}.png"
        FORMS[form](labels).save(path, **({"transparency": 1} if "clear" in form else {}))
        assert np.array_equal(read_map(path), labels), name
        page.pick("map", path)
        page.wait_for(f"{name}: ")
        assert np.array_equal(page.save("map"), labels), (name, form)


def test_what_is_no_label_map_is_refused_in_one_line_and_the_map_stays(page, tmp_path):
    labels, good = draw_lungs(), tmp_path / "good.png"
    write_map(good, labels)
    pink, five = coloured(labels), labels.copy()
    pink[7, 5], five[7, 5] = (255, 0, 255), 5
    Image.fromarray(pink).save(tmp_path / "pink.png")
    Image.fromarray(five).save(tmp_path / "five.png")
    Image.fromarray(np.full((SIZE, SIZE), 4096, np.uint16)).save(tmp_path / "ct.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "map.jpg").write_bytes(b"")
    before = page.save("map")
    for name, words in {
        "pink.png": "colour 255,0,255 at row 7, column 5",
        "five.png": "label 5 at row 7, column 5",
        "ct.png": "no slice",
        "cut.png": "not a readable PNG",
        "map.jpg": "not a readable PNG",
    }.items():
        refuses(page, "map", tmp_path / name, words)
    assert np.array_equal(page.save("map"), before)


# ------------------------------------------------------------------------------------------------ generators in


def test_a_file_that_is_no_generator_is_refused_in_one_line_and_the_one_before_stays(page, generator, tmp_path):
    whole = generator.read_bytes()
    (tmp_path / "noise.onnx").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    for name in ("noise", "cut"):
        refuses(page, "generator", tmp_path / f"{name}.onnx", "not a generator")
    for key, value, words in (
        ("kind", "unet", "is a unet, not a generator"),
        ("kind", None, "not a generator"),
        ("contract", "3", "contract 3"),
    ):
        refuses(page, "generator", other_generator(generator, tmp_path / f"{key} {value}.onnx", **{key: value}), words)
    page.stroke((15, 30), (20, 40))
    as_scripts_have_it(page, generator)


def test_a_label_that_the_generator_does_not_know_gets_no_slice_until_it_is_erased(page, generator, tmp_path):
    page.pick("generator", other_generator(generator, tmp_path / "two.onnx", labels='["background", "lung"]'))
    page.wait_for("two.onnx, trained at")
    page.choose("Consolidation")
    page.stroke((15, 30), (20, 40))
    assert "knows only background, lung" in page.line(error=True)
    assert page.tab.locator("#save-ct").is_disabled()
    page.tab.click("#undo")
    as_scripts_have_it(page, generator)


def test_a_label_that_no_training_map_held_is_told(page, generator, tmp_path):
    about = page.tab.locator("#about")
    assert "never saw" not in about.inner_text()  # of a file that does not tell
    page.pick("generator", other_generator(generator, tmp_path / "glass.onnx", trained_labels="[1, 2]"))
    page.wait_for("glass.onnx, trained at")
    assert "never saw consolidation:" in about.inner_text()


def test_without_the_shipped_generator_the_page_says_so_and_takes_one_that_is_dropped(new_page, site, generator):
    page = new_page({SHIPPED: not_there}).open(site)
    assert "covid-ct-256.onnx: cannot be read" in page.line(error=True)
    page.choose("Ground glass")
    page.stroke((100, 120), (110, 130))  # painting goes on without
    assert page.save("map").shape == (256, 256)
    page.tab.evaluate(
        """(text) => {
            const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt());
            transfer.items.add(new File([bytes], "generator.onnx"));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
        }""",
        base64.b64encode(generator.read_bytes()).decode(),
    )
    labels, _ = as_scripts_have_it(page, generator)
    assert (labels == 2).any()


# ------------------------------------------------------------------------------------------------ a slice of one's own


def draw_pair(folder, labels, name="P07_S001"):
    """Write a slice of noise and its map. Returns HU int16 [H, W] and the two paths, slice first."""
    noise = np.random.default_rng(0).normal(0, 60, labels.shape)
    hu = (np.choose(labels, (40, -850, -500, 0)) + noise).clip(-1024).astype(np.int16)
    hu[5, ::3] = 1400  # bone
    paths = folder / "images" / f"{name}.png", folder / "maps" / f"{name}.png"
    for path, write, pixels in zip(paths, (write_image, write_map), (hu, labels), strict=True):
        path.parent.mkdir(exist_ok=True)
        write(path, pixels)
    return hu, *paths


ORDERS = {  # in which a slice and its map are opened
    "together": lambda page, hu, labels: page.pick("map", hu, labels),
    "slice first": lambda page, hu, labels: (page.pick("map", hu), page.wait_for("Now open"), page.pick("map", labels)),
    "map first": lambda page, hu, labels: (page.pick("map", labels), page.wait_for("P07_S001: "), page.pick("map", hu)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_painted_appears_in_the_slice_opened_and_all_else_in_it_stays(page, generator, tmp_path, order):
    labels = draw_lungs()
    real, *paths = draw_pair(tmp_path, labels)
    page.tab.select_option("#start", START)
    page.wait_for(f"{START}, ")
    ORDERS[order](page, *paths)
    page.wait_for("lesions that you paint appear in this slice")
    assert np.array_equal(page.with_slice().save("ct"), real)
    page.choose("Consolidation")
    page.set("size", 6)
    page.stroke((12, 22), (12, 40))  # at the lung's border
    page.choose("Erase")
    page.stroke((46, 30))
    painted, hu = page.with_slice().save("map"), page.save("ct")
    new = (painted != labels) & (painted > 0)
    share = np.clip(1 - ndimage.distance_transform_cdt(~new, "chessboard") / 3, 0, 1)  # an edge of two pixels,
    share[painted == 0] = 0  # inside the lung
    assert new.sum() > 50 and (painted < labels).any()
    expected = real + share * (synthesized(painted, generator) - real)
    assert np.abs(hu - expected.clip(-1024)).max() <= 1.5
    assert np.array_equal(hu[share == 0], real[share == 0])


def test_a_slice_goes_with_its_own_map_alone(page, tmp_path):
    _, image, path = draw_pair(tmp_path, draw_lungs())
    page.pick("map", image, path)
    page.wait_for("lesions that you paint")
    _, other, _ = draw_pair(tmp_path, draw_lungs(32), "P08_S001")
    page.pick("map", other)
    page.wait_for("P08_S001: 32 x 32 pixels. Now open its label map")
    page.pick("map", path)  # of another size
    page.wait_for(f"P07_S001: {SIZE} x {SIZE} pixels.")
    assert page.with_slice().save("ct")[0, 0] < -950  # the body's air
    page.tab.select_option("#start", START)
    page.wait_for(f"{START}, ")
    page.pick("map", image)  # of the example's size
    page.wait_for("P07_S001: 64 x 64 pixels. Now open")


def write_nifti(path, voxels, axes, kind, shift=0, height=0):
    """A volume [Z, H, W] in display, feet first, as a NIfTI file whose axes run so, with values stored less a shift."""
    affine = np.array([[-0.7, 0, 0, 0], [0, -0.7, 0, 0], [0, 0, 5, height], [0, 0, 0, 1]])
    given = nib.Nifti1Image((voxels.transpose(2, 1, 0) - shift).astype(float), affine)
    image = given.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(axes)))
    image.set_data_dtype(kind)
    image.header.set_slope_inter(1, shift)
    image.to_filename(path)


@pytest.mark.parametrize(("axes", "kind"), [("LPS", np.int16), ("RAS", np.float32), ("SPL", np.uint16), ("AIR", float)])
def test_a_slice_of_a_nifti_volume_and_its_map_are_those_that_prepare_reads(page, tmp_path, axes, kind):
    labels = draw_lungs()
    hu, maps = (np.stack([of, of[::-1], of[:, ::-1]])[:, 4:] for of in (draw_pair(tmp_path, labels)[0], labels))
    write_nifti(tmp_path / "ct.nii.gz", hu, axes, kind, -1024 * (kind == np.uint16))
    write_nifti(tmp_path / "mask.nii", maps, axes, np.uint8)
    for name, of in (("ct.nii.gz", hu), ("mask.nii", maps)):  # what the other programs here make of it
        assert np.array_equal(read_volume(tmp_path / name).voxels, of)
    asked = []
    page.tab.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept("2")))
    page.pick("map", tmp_path / "ct.nii.gz", tmp_path / "mask.nii")
    page.wait_for("ct_S002: lesions that you paint appear in this slice")
    assert len(asked) == 1 and "1 to 3" in asked[0]
    assert np.array_equal(page.with_slice().save("ct"), hu[1]) and np.array_equal(page.save("map"), maps[1])


def test_a_nifti_file_that_would_be_read_wrong_is_told(page, tmp_path):
    path, volume = tmp_path / "ct.nii", np.full((1, SIZE, SIZE), -700)
    write_nifti(path, volume, "LPS", np.int16)
    good = path.read_bytes()
    write_nifti(path, volume / 1000, "LPS", float)  # of -1 to 1
    refuses(page, "map", path, "neither labels 0 to 3 nor HU")
    for broken, words in ((good[:8000], "cut short"), (good[:254] + bytes(2) + good[256:], "sform"), (b"", "NIfTI-1")):
        path.write_bytes(broken)
        refuses(page, "map", path, words)


def test_a_map_that_is_not_the_slice_s_is_told(page, tmp_path):
    labels, ct, far, map_ = draw_lungs(), tmp_path / "ct.nii", tmp_path / "far.nii", tmp_path / "map.png"
    hu, image, own = draw_pair(tmp_path, labels)
    write_nifti(ct, hu[None], "LPS", np.int16)
    write_nifti(far, labels[None], "LPS", np.uint8, height=20)
    write_map(map_, np.array([0, 2, 1, 3], np.uint8)[labels])
    order = f"means of {hu[labels == 2].mean():.0f}, "
    pairs = {"different places": (ct, far), order: (image, map_), "a second map": (map_, own)}
    for words, pair in pairs.items():
        page.tab.evaluate("say('')")
        page.pick("map", *pair)
        assert words in page.line(error=True)


# ------------------------------------------------------------------------------------------------ what steers

# Of contract 2; what it draws tells what it was given.
STEERED = """
<ir_version: 8, opset_import: ["" : 18]>
steered (uint8[n, h, w] map, float[n] density, float[n] detail, int64[n] seed) => (int16[n, h, w] ct) {
    label = Cast <to = 1> (map)
    draw = Cast <to = 1> (seed)
    hundred = Constant <value_float = 100.0> ()
    labels = Mul (label, hundred)
    draws = Mul (draw, hundred)
    numbers = Add (density, detail)
    told = Add (numbers, draws)
    hu = Add (labels, told)
    ct = Cast <to = 5> (hu)
}"""
RANGES = {"density": {"default": -800, "low": -850, "high": -700}, "detail": {"default": 70, "low": 50, "high": 90}}


@pytest.fixture
def steered(page, generator, tmp_path):
    """The page with the generator above."""
    model = onnx.parser.parse_model(STEERED)
    entries = {entry.key: entry.value for entry in onnx.load(generator).metadata_props}
    steering = json.dumps(RANGES | {"seed": {"default": 0}})
    onnx.helper.set_model_props(model, entries | {"contract": "2", "steering": steering})
    onnx.save(model, tmp_path / "steered.onnx")
    page.pick("generator", tmp_path / "steered.onnx")
    page.wait_for("steered.onnx, trained at")
    return page


def test_sliders_and_draws_are_what_the_generator_is_told(steered):
    def lung():
        return np.unique(steered.with_slice().save("ct")[draw_lungs() > 0]).tolist()

    assert lung() == [-800 + 70 + 100]
    steered.set("density", -830)
    steered.set("detail", 55)
    assert lung() == [-830 + 55 + 100]
    steered.tab.click("#draw")
    steered.tab.keyboard.press("d")
    assert lung() == [-830 + 55 + 100 + 200]
    for name, told in RANGES.items():
        low, high = (float(steered.tab.get_attribute(f"#{name}", end)) for end in ("min", "max"))
        assert told["low"] - 40 < low < told["low"] and told["high"] < high < told["high"] + 40


def test_a_generator_without_them_has_no_sliders(page):
    for control in ("density", "detail", "draw"):
        assert page.tab.locator(f"#{control}").is_hidden()
    slice_before = page.save("ct")
    page.press("d")
    assert np.array_equal(page.with_slice().save("ct"), slice_before)


def test_the_slice_opened_sets_density_and_detail_as_training_measures_them(steered, tmp_path):
    labels = draw_lungs()
    labels[20:40, :9] = 1  # lung at the picture's border
    hu, *paths = draw_pair(tmp_path, labels)
    hu[20:40, 6:14:2] += 1000  # in part above the window
    write_image(paths[0], hu)
    steered.pick("map", *paths)
    steered.wait_for("lesions that you paint")
    image = ((torch.tensor(hu) + 600) / 750).clamp(-1, 1)[None, None]
    expected = covidgan.steering(image, torch.tensor(labels)[None, None], covidgan.Config(size=SIZE))[0].tolist()
    measured = steered.tab.evaluate("measure(state.map, state.map.scan, state.map.opened, state.generator)")
    assert [measured["density"], measured["detail"]] == pytest.approx(expected, abs=0.1)
    shown = [float(steered.tab.locator(f"#{name}").input_value()) for name in RANGES]
    assert shown == [round(number) for number in expected] and shown[1] > 100  # beyond what was usual in training
    steered.pick("map", *draw_pair(tmp_path, labels * (labels > 1), "P09_S001")[1:])  # no healthy lung
    steered.wait_for("P09_S001: lesions that you paint")
    assert [float(steered.tab.locator(f"#{name}").input_value()) for name in RANGES] == [-800, 70]


# ------------------------------------------------------------------------------------------------ the runtime


def public_copy(spoil=b""):
    """What the public copy of the package would answer."""

    def answer(route):
        body = (VENDOR / route.request.url.rpartition("/")[2]).read_bytes() + spoil
        route.fulfill(body=body, headers={"Access-Control-Allow-Origin": "*"})

    return answer


def test_a_runtime_that_was_tampered_with_is_not_run(new_page, site):
    page = new_page({"**/vendor/*.mjs": not_there, CDN: public_copy(spoil=b"\n")}).open(site)
    assert "ONNX Runtime cannot be had" in page.line(error=True)


def test_opened_from_disk_the_page_takes_the_runtime_from_its_public_copy_and_files_picked(
    new_page, generator, tmp_path
):
    no_help = {SHIPPED: lambda route: route.continue_()}  # which the browser refuses
    page = new_page({CDN: public_copy(), **no_help}).open((WEB / "index.html").as_uri())
    assert "cannot be read from here" in page.line(error=True)
    write_map(tmp_path / "lungs.png", draw_lungs())
    page.pick("map", tmp_path / "lungs.png")
    page.pick("generator", generator)
    as_scripts_have_it(page, generator)
    assert not page.faults


def test_nothing_is_sent_anywhere(page, site):
    page.stroke((15, 30), (20, 40))
    page.with_slice().save("ct")
    kept = [request for request in page.requests if not request.url.startswith(("blob:", "data:"))]
    assert kept and all(request.method == "GET" and request.url.startswith(site[:-4]) for request in kept)
    refused = "fetch('https://example.org/', { method: 'POST', body: 'x' }).then(() => false, () => true)"
    assert page.tab.evaluate(refused)  # by the page's own policy


def test_labels_and_colours_are_those_of_the_scripts(page):
    assert page.tab.evaluate("[LABELS, COLOURS]") == [list(LABELS), [list(colour) for colour in COLOURS]]
