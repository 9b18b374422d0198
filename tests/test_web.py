"""The page in a real browser against infer_onnx.py and data/slices.py, with a small generator of random weights.

Wants Debian's package chromium, or a Chrome, and what `make runtime` fetches; without them the tests are skipped.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import os
import re
import shutil
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from faults import readers
from PIL import Image

import covidgan
import export
import infer_onnx
from data.slices import COLOURS, LABELS, Mistake, coloured, read_image, read_map, windowed, write_image, write_map

ROOT = Path(__file__).resolve().parents[1]
WEB, VENDOR = ROOT / "web", ROOT / "web" / "vendor"
SHIPPED = "**/models/covid-ct-256.onnx"
CDN = "https://cdn.jsdelivr.net/**"
SIZE = 64  # the generator's
SECONDS = 60_000  # in ms, for what takes one or two


# ------------------------------------------------------------------------------------------------ browser and page


def runtime():
    """The files of the runtime, by name, with the hashes that paint.js pins them to."""
    return dict(re.findall(r'"(ort[\w.-]+)": "(sha384-[^"]+)"', (WEB / "paint.js").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def launch():
    """Start a browser, with these options on its command line."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no browser here: apt-get install chromium")
    if not all((VENDOR / name).exists() for name in runtime()):
        pytest.skip("no ONNX Runtime Web here: make runtime")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        yield lambda *options: playwright.chromium.launch(executable_path=found[0], args=[*root, *options])


@pytest.fixture(scope="module")
def browser(launch):
    return launch()


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
    checkpoint = {"config": dataclasses.asdict(c), "networks": method.state_dict()}
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

    def line(self, error=False):
        """The line on top; wait for one that is an error, or none."""
        found = self.tab.locator("#message.error" if error else "#message:not(.error)")
        found.wait_for()
        return found.inner_text()

    def pick(self, what, path):
        self.tab.set_input_files(f"#{what}-file", path)

    def refused(self, what, path):
        """The line by which the page refuses a file."""
        self.pick(what, path)
        return self.line(error=True)

    def choose(self, *names):
        for name in names:
            self.tab.get_by_role("radio", name=name, exact=True).check(force=True)

    def point(self, x, y):
        """Where a pixel of the map is on the screen."""
        self.tab.locator("#map").scroll_into_view_if_needed()
        box = self.tab.locator("#map").bounding_box()
        width, height = self.tab.evaluate("[$('map').width, $('map').height]")
        return box["x"] + (x + 0.5) * box["width"] / width, box["y"] + (y + 0.5) * box["height"] / height

    def stroke(self, *points):
        self.tab.mouse.move(*self.point(*points[0]))
        self.tab.mouse.down()
        for point in points[1:]:
            self.tab.mouse.move(*self.point(*point), steps=4)
        self.tab.mouse.up()

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
    line = page.refused(what, path)
    assert line.startswith(path.name) and words in line and "\n" not in line


@pytest.fixture
def new_page(browser, generator, tmp_path):
    """Make a page that finds our generator where the repository's own would be; options are the browser's."""
    contexts = []

    def make(routes=None, browser=browser, **options):
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
def page(new_page, site):
    """The page with a generator, at the slice of the map that it starts with; it must not throw."""
    page = new_page().open(site).with_slice()
    yield page
    assert not page.faults


@pytest.fixture
def two_lungs():
    """Labels uint8 [SIZE, SIZE] with all labels in them."""
    return export.example_map(1, SIZE, SIZE, len(LABELS))[0]


def not_there(route):
    route.fulfill(status=404)


def of_scripts(model, labels):
    """HU of a map by infer_onnx.py, as its PNG holds them."""
    call = infer_onnx.Generator(*infer_onnx.open_session(model, "cpu", 1))
    return call(labels[None])[0].clip(-1024)


# ------------------------------------------------------------------------------------------------ the slice


def test_a_painted_lesion_gives_the_hu_of_infer_onnx_to_1_hu(page, generator):
    page.choose("Ground glass")
    page.set("size", 6)
    page.stroke((15, 30), (20, 40))
    page.choose("Consolidation")
    page.stroke((48, 44), (50, 40))
    labels, hu = page.with_slice().save("map"), page.save("ct")
    assert set(np.unique(labels)) == {0, 1, 2, 3} and labels.shape == (SIZE, SIZE)
    expected = of_scripts(generator, labels)
    assert np.ptp(expected[labels > 0]) > 100  # else any slice would do
    assert np.abs(hu.astype(int) - expected).max() <= 1


def test_a_map_of_any_size_is_padded_and_cropped_as_infer_onnx_does(page, generator, tmp_path, two_lungs):
    labels = two_lungs[:50, :41]
    write_map(tmp_path / "P01_S001.png", labels)
    page.pick("map", tmp_path / "P01_S001.png")
    page.tab.get_by_text(f"41 x 50 pixels. The generator was trained at {SIZE} x {SIZE}").wait_for()
    hu = page.with_slice().save("ct")
    assert hu.shape == labels.shape
    assert np.abs(hu.astype(int) - of_scripts(generator, labels)).max() <= 1


def test_the_built_in_map_takes_the_generators_size_until_it_is_touched(page, generator, tmp_path):
    assert page.save("map").shape == (SIZE, SIZE)
    page.stroke((5, 5), (9, 9))
    model = onnx.load(generator)
    next(entry for entry in model.metadata_props if entry.key == "size").value = "32"
    onnx.save(model, tmp_path / "small.onnx")
    page.pick("generator", tmp_path / "small.onnx")
    page.tab.get_by_text("small.onnx, trained at 32 x 32 pixels").wait_for()
    assert page.save("map").shape == (SIZE, SIZE)


def test_every_example_is_a_map_of_the_repository_and_opens_as_its_file_has_it(page):
    names = page.tab.evaluate("[...$('start').options].filter((o) => !o.disabled).map((o) => o.value).filter(Boolean)")
    examples = {path.stem: path for path in sorted((ROOT / "models" / "examples").glob("*.png"))}
    assert names == [*examples]
    for name in (names[0], names[-1]):
        page.tab.select_option("#start", name)
        page.tab.get_by_text(f"{name}.png: 256 x 256 pixels").wait_for()
        assert np.array_equal(page.with_slice().save("map"), read_map(examples[name]))


def test_the_sliders_show_the_slice_through_the_window_of_data_slices(page):
    hu = page.save("ct")
    for level, width in ((-600, 1500), (-800, 300)):
        page.set("level", level)
        page.set("width", width)
        drawn = page.tab.evaluate(
            "[...$('ct').getContext('2d').getImageData(0, 0, $('ct').width, $('ct').height).data]"
        )
        rgba = np.array(drawn, np.uint8).reshape(*hu.shape, 4)
        lung = hu > -1024  # below it the file is clipped, the page not
        assert np.array_equal(rgba[lung][:, 0], windowed(hu, level, width)[lung])
        assert (
            (rgba[..., 0] == rgba[..., 1]).all()
            and (rgba[..., 0] == rgba[..., 2]).all()
            and (rgba[..., 3] == 255).all()
        )
    page.tab.click("#reset")
    assert page.tab.evaluate("[$('level').value, $('width').value]") == ["-600", "1500"]


def test_while_a_slice_is_made_the_newest_map_waits_and_older_ones_are_dropped(page):
    page.tab.evaluate(
        """() => {
            window.asked = [];
            worker.ask = (task, map) => new Promise((resolve) => {
                const hu = new Int16Array(map.labels);
                asked.push(() => resolve({ ...map, hu, seconds: 0 }));
            });
        }"""
    )
    for x in (10, 20, 30):
        page.stroke((x, 3), (x + 2, 3))
    assert page.tab.evaluate("asked.length") == 1
    assert page.tab.locator("#save-ct").is_disabled()
    page.tab.evaluate("asked[0]()")
    page.tab.evaluate("new Promise((resolve) => setTimeout(resolve))")
    assert page.tab.evaluate("asked.length") == 2
    page.tab.evaluate("asked[1]()")
    shown = page.with_slice().save("ct")
    assert np.array_equal(shown, page.save("map")) and page.tab.evaluate("asked.length") == 2


def test_the_line_below_tells_of_the_map_and_the_slice_as_they_are(page):
    page.with_slice()
    told = page.tab.locator("#readout")
    hu = page.save("ct")
    page.tab.locator("#map").focus()
    page.tab.keyboard.press("3")
    page.tab.keyboard.press("ArrowRight")
    row, column = map(int, re.findall(r"\d+", told.inner_text())[:2])
    assert told.inner_text().endswith(f", {hu[row, column]} HU")
    page.tab.locator("#inside").uncheck()
    page.tab.locator("#map").focus()
    page.tab.keyboard.press(" ")
    page.with_slice()
    hu = page.save("ct")
    assert told.inner_text() == f"Row {row}, column {column}: consolidation, {hu[row, column]} HU"
    page.tab.locator("#undo").click()
    page.with_slice()
    assert "consolidation" not in told.inner_text()


def test_a_file_that_comes_late_gives_way_to_the_one_asked_for_last(page):
    page.with_slice()
    before = page.tab.evaluate("state.generator.name")
    late = """async () => {
        let come;
        const slow = openMap("slow.png", new Promise((resolve) => { come = resolve; }));
        await openMap("fast.png", mapPng(drawLungs(64)).then((file) => file.arrayBuffer()));
        come(await (await mapPng(drawLungs(32))).arrayBuffer());
        await slow;
        let load;
        const shipped = openGenerator("slow.onnx", new Promise((resolve) => { load = resolve; }));
        await openGenerator("fast.onnx", get(GENERATOR, ""));
        load(await get(GENERATOR, ""));
        await shipped;
        return [state.map.name, state.map.width, state.generator.name];
    }"""
    assert page.tab.evaluate(late) == ["fast", 64, "fast.onnx"]
    assert before != "fast.onnx"


def test_a_map_that_comes_in_the_middle_of_a_stroke_is_another_step(page):
    page.with_slice()
    drawn = page.tab.evaluate(
        """() => {
            const lungs = state.map, steps = state.past.length;
            stroke = { before: lungs, x: 1.5, y: 1.5 };
            state.map = { ...lungs, labels: lungs.labels.slice() };
            state.map.labels[0] = 1;
            replaceMap({ ...drawLungs(32), name: "new" });
            finishStroke();
            const [before, painted] = state.past.slice(-2);
            return [state.map.name, state.past.length - steps, before === lungs, painted.labels[0], stroke];
        }"""
    )
    assert drawn == ["new", 2, True, 1, None]


def test_a_window_beyond_the_sliders_is_shown_as_it_is(page):
    page.with_slice()
    shown = """([level, width]) => {
        Object.assign(state.generator, { level, width });
        resetWindow();
        return [Number($("level").value), Number($("width").value)];
    }"""
    for window in ([-625, 4000], [900.5, 7.25], [-600, 1500]):
        assert page.tab.evaluate(shown, window) == window


# ------------------------------------------------------------------------------------------------ painting


def test_leaving_asks_first_where_a_drawing_would_be_lost(page):
    asked = []
    page.tab.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.stroke((15, 30), (20, 40))
    page.save("map")
    page.tab.reload()
    assert asked == []  # it was saved
    page.with_slice().tab.select_option("#start", label="Two lungs")
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
    page.stroke((40, 30), (44, 40))  # a new step, and there is no other to redo
    assert page.tab.locator("#redo").is_disabled()


def test_the_heap_stays_flat_over_many_strokes(page, tries, count):
    session = page.tab.context.new_cdp_session(page.tab)
    strokes = tries(150, 1000)

    def heap():
        """MiB that the page holds, what it paints on and keeps to undo included."""
        session.send("HeapProfiler.collectGarbage")
        held = session.send("Runtime.getHeapUsage")
        return (held["usedSize"] + held.get("backingStorageSize", 0)) / 2**20

    held = []
    for k in range(strokes):
        if k % 10 == 0:
            page.choose(("Lung", "Ground glass", "Consolidation", "Erase")[k // 10 % 4])
        page.stroke((k % 60, 7 * k % 60), (11 * k % 60, 13 * k % 60))
        if k >= 100 and k % 10 == 0:  # from here on the history is full
            held.append(heap())
    page.with_slice()
    assert max(held) < 1.1 * held[0] + 1, held
    count("strokes on the page with a flat heap", strokes)


def test_fill_paints_what_hangs_together_and_no_more(page, two_lungs, tmp_path):
    lungs = np.where(two_lungs > 0, 1, 0).astype(np.uint8)
    write_map(tmp_path / "lungs.png", lungs)
    page.pick("map", tmp_path / "lungs.png")
    page.tab.get_by_text(f"lungs, {SIZE} x {SIZE}").wait_for()
    page.with_slice()
    page.choose("Fill", "Ground glass")
    y, x = np.argwhere(lungs[:, : SIZE // 2])[0]
    page.stroke((x, y))
    expected = lungs.copy()
    expected[:, : SIZE // 2] *= 2
    assert np.array_equal(page.save("map"), expected)


def test_lesions_stay_inside_the_lung_unless_told_otherwise(page):
    before = page.save("map")
    page.choose("Consolidation")
    page.set("size", 20)
    page.stroke((3, 3))
    assert "Lesions stay inside the lung" in page.line()
    page.stroke((SIZE // 2, 40), (10, 40))
    inside = page.save("map")
    assert (inside == 3).any() and np.array_equal(inside > 0, before > 0)
    page.tab.uncheck("#inside")
    page.stroke((3, 3))
    assert page.save("map")[3, 3] == 3


def test_a_brush_of_one_pixel_paints_that_pixel_and_a_fast_stroke_has_no_gaps(page):
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

    def press(*keys):
        page.tab.focus("#map")
        for key in keys:
            page.tab.keyboard.press(key)

    press("[", *["Shift+ArrowRight"] * 2, *["Shift+ArrowDown"] * 3, "ArrowLeft", "1", "Space")
    labels = page.save("map")
    assert labels[30, 19] == 1 and np.count_nonzero(labels) == pytest.approx(np.pi * 7**2, rel=0.1)
    press("f", "0", "Space")
    assert not page.save("map").any()


def test_a_finger_paints_on_a_phone_that_need_not_scroll_sideways(new_page, site):
    phone = new_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, device_scale_factor=2)
    phone.open(site).with_slice()
    assert phone.tab.evaluate("document.documentElement.scrollWidth") <= 360
    phone.choose("Erase")
    before = phone.save("map")
    phone.tab.touchscreen.tap(*phone.point(16, 40))
    erased = (before > 0) & (phone.save("map") == 0)
    assert erased[40, 16] and erased.sum() < 300


# ------------------------------------------------------------------------------------------------ maps in


def as_rgba(labels):
    """Colours with an alpha channel, of which the background's colour is left where an eraser went."""
    pixels = np.dstack([coloured(labels), np.where(labels > 0, 255, 0).astype(np.uint8)])
    pixels[labels == 0, :3] = COLOURS[3]
    return Image.fromarray(pixels)


def with_palette(labels, order, palette):
    """A palette PNG whose index for label k is order[k]."""
    picture = Image.fromarray(np.array(order, np.uint8)[labels])
    picture.putpalette(palette)
    return picture


PAINTED = [channel for label in (2, 0, 3, 1) for channel in COLOURS[label]]  # a paint program's order
FORMS = {
    "palette": lambda labels: with_palette(labels, (0, 1, 2, 3), [channel for colour in COLOURS for channel in colour]),
    "palette in another order": lambda labels: with_palette(labels, (1, 3, 0, 2), PAINTED),
    "palette of 256": lambda labels: with_palette(labels, (1, 3, 0, 2), PAINTED + [9] * (768 - len(PAINTED))),
    "palette that dresses values up": lambda labels: with_palette(labels, (0, 1, 2, 3), [9, 9, 9, 80, 0, 0] * 2),
    "RGB": lambda labels: Image.fromarray(coloured(labels)),
    "RGBA, erased": as_rgba,
    "grey": lambda labels: Image.fromarray(labels),
}


def test_a_map_of_ones_own_loads_as_the_scripts_read_it_in_whatever_form(page, two_lungs, tmp_path):
    for k, (form, make) in enumerate(FORMS.items()):
        path = tmp_path / f"{k}.png"
        make(two_lungs).save(path)
        assert np.array_equal(read_map(path), two_lungs), form
        page.pick("map", path)
        page.tab.get_by_text(f"{k}, {SIZE} x {SIZE}").wait_for()
        assert np.array_equal(page.save("map"), two_lungs), form


def test_what_is_no_label_map_is_refused_in_one_line_and_the_map_stays(page, two_lungs, tmp_path):
    good = tmp_path / "good.png"
    write_map(good, two_lungs)
    pink, five = coloured(two_lungs), two_lungs.copy()
    pink[7, 5], five[7, 5] = (255, 0, 255), 5
    Image.fromarray(pink).save(tmp_path / "pink.png")
    Image.fromarray(five).save(tmp_path / "five.png")
    write_image(tmp_path / "ct.png", np.zeros((SIZE, SIZE)))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "none.png").write_bytes(b"no PNG")
    (tmp_path / "map.jpg").write_bytes(b"")
    nearly = [63, 72, 204, 237, 28, 36, 0, 0, 0, 34, 177, 76]  # a paint program's own blue, red and green
    with_palette(two_lungs, (2, 1, 0, 3), nearly).save(tmp_path / "nearly.png")
    before = page.save("map")
    for name, words in {
        "pink.png": "colour 255,0,255 at row 7, column 5",
        "five.png": "label 5 at row 7, column 5",
        "nearly.png": "colour 237,28,36 at row",
        "ct.png": "16-bit grey PNG is no label map",
        "cut.png": "not a readable PNG",
        "none.png": "not a readable PNG",
        "map.jpg": "neither a label map, .png, nor a generator, .onnx",
    }.items():
        refuses(page, "map", tmp_path / name, words)
    assert np.array_equal(page.save("map"), before)


# ------------------------------------------------------------------------------------------------ generators in


def test_a_file_that_is_no_generator_is_refused_in_one_line_and_the_one_before_stays(page, generator, tmp_path):
    model = onnx.load(generator)
    metadata = {entry.key: entry.value for entry in model.metadata_props}

    def write(name, changed=metadata, tensor=None):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        onnx.helper.set_model_props(other, changed)
        if tensor:
            other.graph.input[0].type.tensor_type.elem_type = tensor
        onnx.save(other, tmp_path / name)

    whole = generator.read_bytes()
    (tmp_path / "noise.onnx").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    write("unet.onnx", metadata | {"kind": "unet"})
    write("foreign.onnx", {})
    write("newer.onnx", metadata | {"contract": "2"})
    for name, words in {
        "noise.onnx": "not a usable ONNX file",
        "cut.onnx": "not a usable ONNX file",
        "empty.onnx": "not a usable ONNX file",
        "unet.onnx": "is a unet, not a generator",
        "foreign.onnx": "not a generator that export.py wrote: it lacks metadata kind; metadata contract",
        "newer.onnx": "contract 2, this page speaks 1",
    }.items():
        refuses(page, "generator", tmp_path / name, words)
    page.stroke((15, 30), (20, 40))
    labels, hu = page.with_slice().save("map"), page.save("ct")
    assert np.abs(hu.astype(int) - of_scripts(generator, labels)).max() <= 1


def test_without_the_shipped_generator_the_page_says_so_and_takes_one_that_is_dropped(new_page, site, generator):
    page = new_page({SHIPPED: not_there}).open(site)
    line = page.line(error=True)
    assert "There is no models/covid-ct-256.onnx here" in line and "Open a generator" in line
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
    labels, hu = page.with_slice().save("map"), page.save("ct")
    assert (labels == 2).any() and np.abs(hu.astype(int) - of_scripts(generator, labels)).max() <= 1


def test_where_memory_runs_out_the_page_says_so_and_starts_anew(launch, new_page, site, generator, tmp_path):
    little = launch("--js-flags=--wasm-max-mem-pages=800")  # of 64 KiB
    page = new_page(browser=little).open(site).with_slice()
    write_map(tmp_path / "large.png", export.example_map(1, 1024, 1024, 4)[0])
    line = page.refused("map", tmp_path / "large.png")
    assert "Not enough memory for 1024 x 1024 pixels" in line and "\n" not in line
    assert page.tab.locator("#save-ct").is_disabled()
    page.tab.click("#undo")
    page.pick("generator", generator)
    page.with_slice()


def test_a_browser_without_webassembly_is_told_so_in_one_line(new_page, site):
    page = new_page()
    page.tab.add_init_script("delete window.WebAssembly")
    assert "This browser lacks WebAssembly" in page.open(site).line(error=True)


# ------------------------------------------------------------------------------------------------ files that are wrong


TRY_MAPS = """async (files) => {
    const answers = [];
    for (const file of files) {
        const bytes = Uint8Array.from(atob(file), (sign) => sign.charCodeAt()), started = performance.now();
        const answer = await readMap("a.png", bytes).then((map) => ({ ...map, labels: [...map.labels] }),
                                                          (error) => ({ error: String(error.message) }));
        answers.push({ ...answer, seconds: (performance.now() - started) / 1000 });
    }
    return answers;
}"""
TRY_MODELS = """async (files) => {
    const answers = [];
    for (const file of files) {
        const bytes = Uint8Array.from(atob(file), (sign) => sign.charCodeAt()).buffer, started = performance.now();
        const answer = await worker.ask("open", { name: "a.onnx", bytes }, [bytes]).then(
            ({ level, width, size, multiple }) => ({ numbers: [level, width, size, multiple] }),
            (error) => ({ error: String(error.message), memory: error.memory }));
        answers.push({ ...answer, seconds: (performance.now() - started) / 1000 });
    }
    return answers;
}"""


def tried(page, script, reader, n, part=50):
    """Mutated inputs of a reader of the scripts, and what the page makes of each; every complaint is one line."""
    rng, seeds = np.random.default_rng(2), readers.READERS[reader].seeds()
    inputs = [readers.READERS[reader].mutate(rng, seeds) for _ in range(n)]
    for k in range(0, n, part):
        files = [base64.b64encode(content).decode() for content in inputs[k : k + part]]
        for content, answer in zip(inputs[k : k + part], page.tab.evaluate(script, files), strict=True):
            assert answer["seconds"] < 6 * readers.SECONDS  # by the clock, that other work holds up
            error = answer.get("error")
            assert error is None or ("\n" not in error and len(error) <= readers.LONGEST), error
            assert error is None or answer.get("memory") or error.startswith("a."), error
            yield content, answer


def test_a_mutated_map_is_refused_or_read_as_the_scripts_read_it(page, tmp_path, tries, count):
    n, alike = tries(100, 10_000), 0
    for content, answer in tried(page, TRY_MAPS, "slices_map", n):
        (tmp_path / "a.png").write_bytes(content)
        with contextlib.suppress(Mistake, KeyError):
            labels = np.array(answer["labels"]).reshape(answer["height"], answer["width"])
            assert np.array_equal(labels, read_map(tmp_path / "a.png")), content
            alike += 1
    count("mutated inputs of the page's map reader", n)
    assert alike > n / 5


def test_a_mutated_generator_is_refused_in_one_line_and_the_right_one_opens_after_it(page, generator, tries, count):
    n, opened = tries(60, 10_000), 0
    for _, answer in tried(page, TRY_MODELS, "onnx", n):
        assert "error" in answer or all(isinstance(number, int | float) for number in answer["numbers"])
        opened += "numbers" in answer
    count("mutated inputs of the page's generator reader", n)
    assert 0 < opened < n
    page.pick("generator", generator)
    page.tab.get_by_text(f"generator.onnx, trained at {SIZE} x {SIZE} pixels").wait_for()
    assert page.with_slice().save("ct").shape == (SIZE, SIZE)


def test_a_small_map_that_unpacks_to_a_giant_one_is_refused(page, tmp_path):
    head = (b"IHDR", bytes([0, 0, 0, 4, 0, 0, 0, 4, 8, 0, 0, 0, 0]))
    bomb = (b"IDAT", zlib.compress(bytes(2**28), 1))
    (tmp_path / "bomb.png").write_bytes(readers.png_of([head, bomb, (b"IEND", b"")]))
    refuses(page, "map", tmp_path / "bomb.png", "it holds more than its header says")


def test_a_map_whose_header_claims_more_than_any_has_is_refused_before_it_is_unpacked(page, tmp_path):
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", b"no stream at all"), (b"IEND", b"")]
    (tmp_path / "giant.png").write_bytes(readers.png_of(parts))
    refuses(page, "map", tmp_path / "giant.png", "not 1 to 1024 pixels a side")


@pytest.mark.parametrize("kind", ["tensors elsewhere", "operators of someone"])
def test_a_generator_that_wants_other_files_or_other_operators_is_refused(page, generator, tmp_path, kind):
    model = onnx.load(generator)
    if kind == "tensors elsewhere":
        tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../../etc/passwd")
    else:
        model.graph.node[0].domain, model.graph.node[0].op_type = "of.someone", "Run"
        model.opset_import.append(onnx.helper.make_opsetid("of.someone", 1))
    onnx.save(model, tmp_path / "a.onnx")
    before = len(page.requests)
    refuses(page, "generator", tmp_path / "a.onnx", "a.onnx")
    assert not any("passwd" in request.url for request in page.requests[before:])


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_second_palette_of_opacities_which_readers_take_differently_is_refused(page, tmp_path, place):
    head = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    clear = (b"tRNS", b"\x00")
    pixels = [(b"IDAT", zlib.compress(bytes(4 * 5))), (b"IDAT", b"")]
    pixels.insert({"before": 0, "after": 1}[place], (b"tRNS", b"\xff\x00"))
    parts = [(b"IHDR", head), (b"PLTE", bytes(12)), clear, *pixels, (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(readers.png_of(parts))
    refuses(page, "map", tmp_path / "a.png", "its tRNS stands where none may")


def test_a_part_whose_name_is_no_name_is_refused_in_one_line(page, tmp_path):
    head = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    content = bytearray(readers.png_of([(b"IHDR", head), (b"\r*\x1a\n", b"1234"), (b"IEND", b"")]))
    content[-13] ^= 1  # the sum of that part
    (tmp_path / "a.png").write_bytes(content)
    refuses(page, "map", tmp_path / "a.png", "its part of no known kind is damaged")


def test_a_palette_of_more_colours_than_bytes_is_refused(page, tmp_path):
    parts = [(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 3, 0, 0, 0])), (b"PLTE", bytes(3 * 300))]
    (tmp_path / "a.png").write_bytes(readers.png_of([*parts, (b"IDAT", zlib.compress(bytes(2))), (b"IEND", b"")]))
    refuses(page, "map", tmp_path / "a.png", "its palette has more than 256 colours")


@pytest.mark.parametrize("kind", ["map", "generator"])
def test_a_file_larger_than_any_of_its_kind_is_not_read(page, tmp_path, kind):
    path = tmp_path / {"map": "a.png", "generator": "a.onnx"}[kind]
    with open(path, "wb") as file:
        file.truncate(2**30 + 1)  # takes no room on the disk
    refuses(page, kind, path, f"more than any {kind} has")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("licence", "a" * 2000, "metadata licence is no plain line"),
        ("licence", "a\nb", "metadata licence is no plain line"),
        ("width", "80000", "width 80000 HU"),  # its output is int16
    ],
)
def test_metadata_that_no_export_writes_are_refused(page, generator, tmp_path, key, value, told):
    model = onnx.load(generator)
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    onnx.save(model, tmp_path / "a.onnx")
    refuses(page, "generator", tmp_path / "a.onnx", told)


# ------------------------------------------------------------------------------------------------ the runtime


def public_copy(spoil=b""):
    """What the public copy of the package would answer."""

    def answer(route):
        body = (VENDOR / route.request.url.rpartition("/")[2]).read_bytes() + spoil
        route.fulfill(body=body, headers={"Access-Control-Allow-Origin": "*"})

    return answer


def test_without_vendor_the_runtime_comes_from_its_public_copy(new_page, site):
    page = new_page({"**/vendor/*.mjs": not_there, CDN: public_copy()}).open(site).with_slice()
    assert sum("onnxruntime-web@" in request.url for request in page.requests) == 1


def test_a_runtime_that_was_tampered_with_is_not_run(new_page, site):
    page = new_page({"**/vendor/*.mjs": not_there, CDN: public_copy(spoil=b"\n")}).open(site)
    assert "ONNX Runtime cannot be had" in page.line(error=True)


def test_opened_from_disk_the_page_works_with_a_generator_picked(new_page, generator):
    page = new_page({CDN: public_copy()}).open((WEB / "index.html").as_uri())
    assert "Opened from disk" in page.line(error=True)
    page.pick("generator", generator)
    page.with_slice()
    assert not page.faults


def test_nothing_is_sent_anywhere(page, site):
    page.stroke((15, 30), (20, 40))
    page.with_slice().save("ct")
    kept = [request for request in page.requests if not request.url.startswith(("blob:", "data:"))]
    assert kept and all(request.method == "GET" and request.url.startswith(site[:-4]) for request in kept)
    refused = "fetch('https://example.org/', { method: 'POST', body: 'x' }).then(() => false, () => true)"
    assert page.tab.evaluate(refused)  # by the page's own policy


def test_version_hashes_and_colours_are_the_same_everywhere():
    script, html = ((WEB / name).read_text(encoding="utf-8") for name in ("paint.js", "index.html"))
    assert len({*re.findall(r"onnxruntime-web@[\d.]+", script + html)}) == 1
    assert str([list(colour) for colour in COLOURS]) in script
    assert "[" + ", ".join(f'"{label}"' for label in LABELS) + "]" in script
    for name, pinned in runtime().items():
        if (VENDOR / name).exists():
            digest = hashlib.sha384((VENDOR / name).read_bytes()).digest()
            assert pinned == f"sha384-{base64.b64encode(digest).decode()}"
