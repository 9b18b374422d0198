"""infer_onnx.py against a stand-in generator built with onnx alone: a colour a label, blurred, so that pixels count."""

import dataclasses
import json
import os
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT, draw_chest, draw_map, files
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import infer_onnx
from data.slices import COLOURS, LABELS, coloured, read_image, read_map, windowed, write_image, write_map

METADATA = {
    "kind": "generator",
    "contract": "1",
    "labels": json.dumps(LABELS),
    "colours": json.dumps(COLOURS),
    "level": "-600.0",
    "width": "1500.0",
    "size": "64",
    "multiple": "16",
    "checkpoint_sha256": "0" * 64,
    "licence": "none",
    "precision": "float32",
}


def build_generator(path, metadata=METADATA, ct=TensorProto.INT16, name="map"):
    """A stand-in that keeps the contract. HU is a value for each label, blurred over 5 x 5 pixels."""
    weights = {
        "one": [1],
        "hu": np.array([-1000, -850, -500, 40], np.float32),
        "blur": np.full((1, 1, 5, 5), 1 / 25, np.float32),
        "floor": np.float32(-1350),
        "half": np.float32(0.5),
    }
    nodes = [
        helper.make_node("Cast", [name], ["index"], to=TensorProto.INT32),
        helper.make_node("Gather", ["hu", "index"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "one"], ["image"]),
        helper.make_node("Conv", ["image", "blur"], ["blurred"], pads=[2] * 4),
        helper.make_node("Squeeze", ["blurred", "one"], ["lung"]),
        helper.make_node("Cast", [name], ["label"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["label", "half"], ["inside"]),
        helper.make_node("Where", ["inside", "lung", "floor"], ["masked"]),
        helper.make_node("Round", ["masked"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["ct"], to=ct),
        helper.make_node("ReduceMean", ["label"], ["alpha"], axes=[1, 2], keepdims=0),
    ]
    value, shape = helper.make_tensor_value_info, ["N", "H", "W"]
    outputs = [value("ct", ct, shape), value("alpha", TensorProto.FLOAT, shape[:1])]
    held = [numpy_helper.from_array(np.asarray(array), key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, "stand-in", [value(name, TensorProto.UINT8, shape)], outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


DENSITIES = np.array([40, -850, -600, -50], np.int16)  # HU by label


def draw_slice(labels, seed=0):
    """A slice of its labels' densities in noise of -1024 to 0 HU, int16 [H, W]: whatever is changed shows."""
    noise = np.random.default_rng(seed).integers(-1024, 1, labels.shape)
    return np.where(labels > 0, DENSITIES[labels], noise).astype(np.int16)


@pytest.fixture
def model(tmp_path):
    return build_generator(tmp_path / "generator.onnx")


@pytest.fixture
def maps(tmp_path):
    """Five maps of three sizes, two of them no multiple of 16."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for k, size in enumerate([(64, 64), (64, 64), (64, 64), (50, 70), (33, 80)]):
        write_map(folder / f"P{k // 2:02d}_S{k:03d}.png", draw_map(*size, shift=k))
    return folder


def script(*argv, **options):
    """Run the script as a user does."""
    command = [sys.executable, ROOT / "infer_onnx.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def direct(model, labels):
    """What the model itself says of one map whose size suits it, as the format holds it."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["ct"], {"map": labels[None]})[0][0].clip(-1024)


def test_a_map_whose_size_suits_the_model_gives_what_the_model_gives(infer, maps, model):
    status, out, _ = infer(maps)
    assert status == 0
    for name in ("P00_S000", "P00_S001", "P01_S002"):
        labels = read_map(maps / f"{name}.png")
        assert np.array_equal(read_image(out / "images" / f"{name}.png"), direct(model, labels))
        assert np.array_equal(read_map(out / "maps" / f"{name}.png"), labels)


def test_a_map_of_any_size_is_padded_with_background_to_two_multiples_at_least_and_cropped_back(infer, maps, model):
    write_map(maps / "P03_S005.png", np.ones((5, 33), np.uint8))
    _, out, _ = infer(maps)
    pads = {"P01_S003": ((0, 14), (0, 10)), "P02_S004": ((0, 15), (0, 0)), "P03_S005": ((0, 27), (0, 15))}
    for name, pad in pads.items():
        labels = read_map(maps / f"{name}.png")
        expected = direct(model, np.pad(labels, pad))[: labels.shape[0], : labels.shape[1]]
        assert np.array_equal(read_image(out / "images" / f"{name}.png"), expected)


@pytest.fixture
def images(tmp_path, maps):
    """A real slice for each of the maps."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k, path in enumerate(sorted(maps.iterdir())):
        write_image(folder / path.name, draw_slice(read_map(path), seed=k))
    return folder


def test_completion_keeps_every_pixel_outside_the_lung_and_takes_the_lung_from_the_model(infer, maps, images):
    infer(maps, out="lung")
    status, out, _ = infer(maps, "--complement", images)
    assert status == 0
    for path in maps.iterdir():
        inside = read_map(path) > 0
        completed, real = read_image(out / "images" / path.name), read_image(images / path.name)
        assert np.array_equal(completed[~inside], real[~inside])
        assert np.array_equal(completed[inside], read_image(out.parent / "lung/images" / path.name)[inside])


def test_a_panel_shows_map_synthesis_and_completion(infer, maps, images):
    _, out, _ = infer(maps, "--complement", images, "--panel")
    panel = iio.imread(out / "panels/P01_S003.png")
    completed = windowed(read_image(out / "images/P01_S003.png"))
    assert panel.shape == (50, 3 * 70, 3)
    assert np.array_equal(panel[:, :70], coloured(read_map(maps / "P01_S003.png")))
    assert np.array_equal(panel[:, 140:, 0], completed)
    inside = read_map(maps / "P01_S003.png") > 0
    assert np.array_equal(panel[:, 70:140, 1][inside], completed[inside])
    assert (panel[:, 70:140][~inside] == windowed(np.array(-1024))).all()


# ------------------------------------------------------------------------------------------------ variants


def test_a_variant_s_map_is_the_one_that_its_slice_was_made_from(infer, maps, model):
    _, out, _ = infer(maps, "--variants", 3)
    assert len(list((out / "images").iterdir())) == 15
    for name in ("P00_S000v01", "P00_S000v03", "P01_S002v02"):
        labels = read_map(out / "maps" / f"{name}.png")
        assert np.array_equal(read_image(out / "images" / f"{name}.png"), direct(model, labels))
        assert not np.array_equal(labels, read_map(maps / f"{name[:8]}.png"))


def test_variants_hang_on_the_seed_and_neither_on_batch_nor_shard(infer, maps, tmp_path):
    whole = files(infer(maps, "--variants", 3, "--seed", 5, out="whole")[1])
    assert len(set(whole.values())) == len(whole) == 2 * 15 + 1  # no two alike
    assert whole == files(infer(maps, "--variants", 3, "--seed", 5, "--batch", 4, out="batched")[1])
    for i in (1, 2):
        infer(maps, "--variants", 3, "--seed", 5, "--shard", f"{i}/2", out="sharded")
    assert whole == files(tmp_path / "sharded")
    other = files(infer(maps, "--variants", 3, "--seed", 6, out="other")[1])
    assert whole.keys() == other.keys()
    assert all(whole[name] != other[name] for name in whole)


def test_augmentation_stays_in_the_ranges_of_the_training():
    centre, corner, angle = [], [], []
    for k in range(200):
        rows, columns = infer_onnx.augmentation(128, 128, np.random.default_rng(k))
        centre.append((rows[60:68, 60:68].mean() - 63.5, columns[60:68, 60:68].mean() - 63.5))
        corner.append(np.hypot(rows[0, 127] - rows[127, 0], columns[0, 127] - columns[127, 0]) / np.hypot(127, 127))
        angle.append(np.degrees(np.arctan2(rows[64, 127] - rows[64, 0], columns[64, 127] - columns[64, 0])))
    assert min(angle) < -8 < 8 < max(angle)
    assert np.abs(angle).max() < infer_onnx.ROTATE + 3
    elastic = 4 * 2 / 512 * 128
    assert 4 < np.abs(centre).max() < 128 * (1 - 1 / infer_onnx.RESIZE) / 2 + elastic
    assert abs(np.corrcoef(np.transpose(centre))[0, 1]) < 0.3
    assert 1 / infer_onnx.RESIZE - 0.03 < min(corner) < 0.93 < 0.97 < max(corner) < 1.03


def test_the_augmentation_of_training_and_of_inference_have_the_same_ranges():
    from covidgan import Config

    trained = {field.name: field.default for field in dataclasses.fields(Config)}
    ours = infer_onnx.RESIZE, infer_onnx.ROTATE, infer_onnx.ELASTIC, infer_onnx.ELASTIC_CELL
    assert ours == tuple(trained[name] for name in ("resize", "rotate", "elastic", "elastic_cell"))


def test_sampling_keeps_every_pixel_in_its_place_and_finds_background_beyond_maps_and_the_border_beyond_slices():
    (rows, columns), labels = np.mgrid[:50, :70].astype(float), draw_map(50, 70)
    assert np.array_equal(infer_onnx.sample_nearest(labels, rows, columns), labels)
    assert np.array_equal(infer_onnx.sample_bicubic(draw_slice(labels), rows, columns), draw_slice(labels))
    rows, columns = np.array([[-0.4, -0.6, -9.0], [3.4, 3.6, 99.0]]), np.full((2, 3), 1.0)
    assert infer_onnx.sample_nearest(np.ones((4, 4), np.uint8), rows, columns).tolist() == [[1, 0, 0], [1, 0, 0]]
    hu = np.arange(16, dtype=np.int16).reshape(4, 4) * 10
    assert infer_onnx.sample_bicubic(hu, rows, columns).tolist() == [[10, 10, 10], [130, 130, 130]]


def test_a_slice_is_sampled_exactly_on_ramps_and_sharper_than_linearly_elsewhere_within_its_range():
    ramp = (np.arange(36, dtype=np.int16) * 10).reshape(6, 6)
    assert infer_onnx.sample_bicubic(ramp, np.array([[2.25]]), np.array([[2.5]])).tolist() == [[160]]
    wave = np.rint(1000 * np.sin(np.arange(60) * 2 * np.pi / 5)).astype(np.int16)[None].repeat(8, 0)
    columns = np.arange(10, 50) + 0.5
    rows, truth = np.full((1, 40), 4.0), 1000 * np.sin(columns * 2 * np.pi / 5)
    linear = (wave[4, 10:50].astype(float) + wave[4, 11:51]) / 2
    error = np.abs(infer_onnx.sample_bicubic(wave, rows, columns[None])[0] - truth).max()
    assert error < 0.6 * np.abs(linear - truth).max()
    step = np.where(np.arange(20) < 10, -1000, 400).astype(np.int16)[None].repeat(8, 0)
    mixed = infer_onnx.sample_bicubic(step, rows, np.linspace(5, 15, 40)[None])
    assert mixed.min() == -1000 and mixed.max() == 400


def test_a_real_slice_is_resampled_with_its_variant_s_map(infer, tmp_path):
    """A slice that shows its own map stays, outside the lung and away from its border, what the variant's map says."""
    labels = np.kron(np.random.default_rng(0).integers(0, 2, (6, 6)), np.ones((16, 16))).astype(np.uint8)
    for folder in ("squares", "shown"):
        (tmp_path / folder).mkdir()
    write_map(tmp_path / "squares/P00_S000.png", labels)
    write_image(tmp_path / "shown/P00_S000.png", np.where(labels > 0, -900, 500))
    _, out, _ = infer(tmp_path / "squares", "--variants", 5, "--complement", tmp_path / "shown")
    for k in range(1, 6):
        background = read_map(out / f"maps/P00_S000v0{k}.png") == 0
        inner = background.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                inner &= np.roll(background, step, axis)
        inner[:14], inner[-14:], inner[:, :14], inner[:, -14:] = False, False, False, False
        assert inner.sum() > 100
        assert (read_image(out / f"images/P00_S000v0{k}.png")[inner] == 500).all()


def test_grey_slices_show_the_same_hu_through_the_window(infer, maps, images):
    _, out, _ = infer(maps, "--complement", images)
    _, grey, _ = infer(maps, "--complement", images, "--format", "png8", out="png8")
    for path in maps.iterdir():
        hu = read_image(out / "images" / path.name)
        assert np.array_equal(iio.imread(grey / "images" / path.name), windowed(hu, -600, 1500))


def test_a_second_run_makes_what_is_missing_alone_and_a_panel_asked_for_later(infer, maps):
    _, out, _ = infer(maps)
    before = files(out)
    (out / "images/P00_S001.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert infer(maps)[0] == 0
    assert files(out) == before
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    infer(maps, "--panel")
    assert len(list((out / "panels").iterdir())) == 5
    assert iio.imread(out / "panels/P00_S000.png").shape == (64, 2 * 64, 3)  # no real slice: map and synthesis


@pytest.mark.parametrize("change", ["format", "variants", "complement", "model", "no record", "older record"])
def test_slices_of_two_kinds_do_not_mix_in_one_folder(infer, maps, images, tmp_path, change):
    _, out, _ = infer(maps)
    options = {"format": ["--format", "png8"], "variants": ["--variants", 2], "complement": ["--complement", images]}
    metadata = {**METADATA, "checkpoint_sha256": "1" * 64}
    other = {"model": build_generator(tmp_path / "other.onnx", metadata=metadata)} if change == "model" else {}
    record = out / "run.json"
    if change == "no record":  # of someone else, then
        record.unlink()
    if change == "older record":  # says more, and is gone on with
        record.write_text(json.dumps({**json.loads(record.read_text()), "sources": "a digest"}))
    status, _, told = infer(maps, *options.get(change, []), **other)
    assert status == (0 if change == "older record" else 2) and ("made otherwise" in told) == bool(status)


def test_a_map_that_has_changed_is_made_anew_and_one_that_lost_its_lung_takes_its_slice_along(infer, maps, images):
    _, out, _ = infer(maps, "--complement", images)
    before = files(out)
    write_map(maps / "P00_S000.png", draw_map(shift=20))
    write_map(maps / "P00_S001.png", np.zeros((64, 64), np.uint8))
    write_image(images / "P01_S002.png", draw_slice(draw_map(shift=2), seed=77))
    status, _, told = infer(maps, "--complement", images)
    assert status == 0 and "1 slices without lung are left out" in told
    after = files(out)
    assert np.array_equal(read_map(out / "maps/P00_S000.png"), draw_map(shift=20))
    real = read_image(images / "P01_S002.png")
    assert (read_image(out / "images/P01_S002.png") == real)[draw_map(shift=2) == 0].all()
    assert before.keys() - after.keys() == {"images/P00_S001.png", "maps/P00_S001.png"}
    changed = {"images/P00_S000.png", "maps/P00_S000.png", "images/P01_S002.png"}
    assert {name for name in after if after[name] != before[name]} == changed


@pytest.mark.parametrize("fault", ["turned", "grey levels"])
def test_a_real_slice_that_is_not_its_map_s_is_left_out_as_faulty_unless_overruled(infer, maps, images, fault):
    hu, labels = draw_chest(1)
    write_map(maps / "P00_S000.png", labels[0])
    write_image(images / "P00_S000.png", hu[0])
    assert infer(maps, "--complement", images)[0] == 0
    wrong = hu[0][::-1] if fault == "turned" else windowed(hu[0]).astype(int) - 1024
    write_image(images / "P00_S000.png", wrong)
    status, out, told = infer(maps, "--complement", images, out="wrong")
    assert status == 2 and f"error: {images / 'P00_S000.png'}: " in told and "left out as faulty: 1" in told
    assert len(files(out / "images")) == 4
    assert infer(maps, "--complement", images, "--unchecked", out="wrong")[0] == 0
    assert (read_image(out / "images/P00_S000.png") == wrong)[labels[0] == 0].all()


def test_maps_and_real_slices_in_one_folder_are_paired_by_what_a_star_stands_for(infer, maps, images, tmp_path):
    _, apart, _ = infer(maps, "--complement", images)
    (tmp_path / "a[1]").mkdir()
    for folder, kind in ((maps, "map"), (images, "ct")):
        for path in list(folder.iterdir()):
            path.rename(tmp_path / f"a[1]/{path.stem}_{kind}.png")
    (tmp_path / "a[1]/P07_S001_map.png").symlink_to(tmp_path / "nothing")
    status, out, told = infer(tmp_path / "a[1]/*_map.png", "--complement", tmp_path / "a[1]/*_ct.png", out="together")
    assert status == 2 and f"error: {tmp_path / 'a[1]/P07_S001_map.png'}: " in told  # a link to nothing is told
    assert told.count("error: ") == 1 and files(out) == files(apart)


def test_the_folder_of_the_maps_or_of_their_dataset_is_no_out(infer, maps, images):
    before, folder = files(maps.parent), maps.parent
    for source, out in ((maps, "maps"), (maps, "."), (folder, ".")):
        status, _, told = infer(source, out=out)
        assert status == 2 and "the input stands in it" in told
    assert infer(maps, "--complement", images, out="images")[0] == 2
    assert files(folder) == before


@pytest.mark.parametrize("fault", ["no PNG", "another label", "a label that the model does not know"])
def test_a_bad_map_is_one_line_and_the_others_are_made(infer, maps, tmp_path, fault):
    three = {**METADATA, "labels": json.dumps(LABELS[:3]), "colours": json.dumps(COLOURS[:3])}
    model = build_generator(tmp_path / "few.onnx", metadata=three)
    for path in maps.iterdir():
        write_map(path, read_map(path).clip(0, 2))
    label = {"another label": 7, "a label that the model does not know": 3}.get(fault)
    faulty = maps / "P00_S999.png"
    Image.fromarray(np.full((64, 64), label, np.uint8)).save(faulty) if label else faulty.write_text("no picture")
    status, out, told = infer(maps, "--variants", 2, model=model)
    assert status == 2 and len(list((out / "images").iterdir())) == 10
    (line,) = (line for line in told.splitlines() if line.startswith("error: "))  # one, of both variants
    assert line.startswith(f"error: {faulty}: ") and (f"label {label}" in line or "PNG" in line)


def test_a_missing_and_a_misfit_real_slice_are_told(infer, maps, images):
    (images / "P00_S000.png").unlink()
    write_image(images / "P00_S001.png", draw_slice(draw_map(32, 32)))
    iio.imwrite(images / "P01_S002.png", np.zeros((64, 64), np.uint8))
    status, out, told = infer(maps, "--complement", images)
    assert status == 2 and len(list((out / "images").iterdir())) == 2
    for faulty in (maps / "P00_S000.png", images / "P00_S001.png", images / "P01_S002.png"):
        assert f"error: {faulty}: " in told


def test_one_side_of_a_dataset_is_made_and_no_other_map(infer, maps, tmp_path):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["P00_S000"], "test": ["P00_S001", "P01_S002"]}))
    status, out, _ = infer(tmp_path, "--side", "test")
    assert status == 0 and sorted(path.stem for path in (out / "images").iterdir()) == ["P00_S001", "P01_S002"]
    for test, word in ((["P00_S001", "P07_S000"], "P07_S000"), ([], "no names under test")):
        split.write_text(json.dumps({"train": ["P00_S000"], "test": test}))
        status, out, told = infer(tmp_path, "--side", "test", out="none")
        assert status == 2 and told.startswith(f"error: {split}: ") and word in told and not out.exists()


def test_maps_without_lung_are_left_out_with_a_count_and_where_there_is_no_other_it_is_an_error(infer, maps, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (maps, tmp_path / "empty"):
        write_map(folder / "P09_S007.png", np.zeros((64, 64)))
    status, out, told = infer(maps)
    assert status == 0 and told.endswith("note: 1 slices without lung are left out")
    assert len(list((out / "images").iterdir())) == len(list((out / "maps").iterdir())) == 5
    status, _, told = infer(tmp_path / "empty", out="none")
    assert status == 2 and f"{tmp_path / 'empty'}: no lung" in told


def test_complete_with_a_dataset_s_images_or_the_one_slice_of_the_one_map(infer, maps, images, tmp_path):
    for path in list(images.iterdir()):
        path.rename(path.with_suffix(".PNG"))
    _, whole, _ = infer(maps, "--complement", images)
    _, dataset, _ = infer(tmp_path, "--complement", tmp_path, out="dataset")
    assert files(whole) == files(dataset)
    _, one, _ = infer(maps / "P00_S001.png", "--complement", images / "P00_S001.PNG", out="one")
    assert (one / "images/P00_S001.png").read_bytes() == (whole / "images/P00_S001.png").read_bytes()
    assert "one file for 5 maps" in infer(maps, "--complement", images / "P00_S001.PNG", out="none")[2]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["nowhere"], "nowhere: not there"),
        (["MAPS", "--shard", "3/2"], "--shard 3/2"),
        (["MAPS", "--batch", "0"], "--batch 0"),
        (["MAPS", "--format", "jpeg"], "--format"),
        (["MAPS", "--complement", "nowhere"], "nowhere: not there"),
        (["MAPS", "--frobnicate"], "--frobnicate"),
        (["MAPS", "--side", "test"], "split.json"),
        (["*_map.png"], "*_map.png: no file"),
        (["MAPS", "--density", "880"], "--density 880.0: give -1000 to -400"),
        (["MAPS", "--detail", "nan"], "--detail nan"),
    ],
)
def test_bad_usage_is_one_line(infer, maps, options, word):
    status, out, told = infer(*[option.replace("MAPS", str(maps)) for option in options])
    assert status == 2 and told.startswith("error: ") and word in told
    assert "\n" not in told and not out.exists()


FOREIGN = {
    "bare": ({"metadata": {}}, "generator"),
    "lacking": ({"metadata": {key: METADATA[key] for key in METADATA if key != "multiple"}}, "metadata multiple"),
    "input": ({"name": "x"}, "input map, tensor(uint8)"),
    "output": ({"ct": TensorProto.FLOAT}, "output ct, tensor(int16)"),
    "kind": ({"metadata": {**METADATA, "kind": "unet"}}, "unet"),
    "contract": ({"metadata": {**METADATA, "contract": "3"}}, "contract 3"),
    "garbled": ({"metadata": {**METADATA, "size": "?"}}, "metadata size"),
    "of another type": ({"metadata": {**METADATA, "trained_labels": "1"}}, "metadata trained_labels"),
    "no width": ({"metadata": {**METADATA, "width": "0"}}, "metadata width"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_model_is_refused_by_name_and_by_what_it_lacks(infer, maps, tmp_path, kind):
    change, word = FOREIGN[kind]
    path = build_generator(tmp_path / "foreign.onnx", **change)
    status, out, told = infer(maps, model=path)
    assert status == 2 and told.startswith(f"error: {path}: ") and word in told
    assert "\n" not in told and not out.exists()


@pytest.mark.parametrize("fault", ["missing", "text", "cut", "too new"])
def test_a_broken_or_missing_model_is_refused_by_name_without_noise(infer, maps, model, tmp_path, fault):
    path, newer = tmp_path / "broken.onnx", onnx.load(model)
    newer.ir_version = 99
    contents = {"text": b"no model", "cut": model.read_bytes()[:700], "too new": newer.SerializeToString()}
    if fault in contents:
        path.write_bytes(contents[fault])
    status, _, told = infer(maps, model=path)
    assert status == 2 and told.startswith(f"error: {path}: ") and "export" in told and "\n" not in told


def test_tensors_in_other_files_are_not_read_and_their_word_is_no_fault(infer, maps, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = onnx.load(model)
    onnx.save(elsewhere, "far.onnx", save_as_external_data=True, location="far.bin", size_threshold=0)
    status, _, told = infer(maps, model=tmp_path / "far.onnx")
    assert status == 2 and told.startswith(f"error: {tmp_path / 'far.onnx'}: ") and "other files" in told
    licence = {**METADATA, "licence": "by the data's allocation; location: here"}
    assert infer(maps, model=build_generator(tmp_path / "near.onnx", metadata=licence))[0] == 0


# ------------------------------------------------------------------------------------------------ providers
on_cpu = pytest.mark.skipif(infer_onnx.nvidia_driver() is not None, reason="this machine has an NVIDIA driver")


@on_cpu
@pytest.mark.parametrize("provider", ["cuda", "openvino"])
def test_a_named_provider_that_does_not_load_is_one_line_and_no_silent_cpu_run(infer, maps, provider):
    if not infer_onnx.obstacle(provider):
        pytest.skip("it is here")
    status, out, told = infer(maps, "--provider", provider)
    assert status == 2 and told.startswith(f"error: --provider {provider}: ")
    assert "\n" not in told and not out.exists()


@on_cpu
@pytest.mark.skipif(not infer_onnx.obstacle("openvino"), reason="OpenVINO is here, and taken")
def test_auto_says_what_it_took_and_why_nothing_better_and_there_is_no_other_noise(maps, model, tmp_path):
    done = script(maps, "--model", model, "--out", tmp_path / "out", "--threads", "1")
    assert done.returncode == 0 and done.stdout.endswith(f"5 slices written to {tmp_path / 'out'}\n")
    told = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines() if "%|" not in line]
    first, *rest = [line for line in told if line]
    assert first.startswith(f"{model} runs on cpu, threads: 1; not cuda: no NVIDIA driver here; not openvino")
    assert [line[:5] for line in rest] == ["note:", "note:"] and "33 x 80" in rest[0] and "50 x 70" in rest[1]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(maps, model, tmp_path, capsys):
    argv = [str(maps), "--model", str(model), "--out", str(tmp_path / "out"), "--provider", "cpu", "--dry-run"]
    assert infer_onnx.main(argv) == 0
    assert capsys.readouterr().out.startswith("5 slices: 0 finished, 5 to make")
    assert not (tmp_path / "out").exists()


def test_threads_are_the_cores_that_this_process_may_use_and_no_more_than_openmp_s(model, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    for asked, threads in (("", 3), ("2", 2), ("9", 3), ("many", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        session, _ = infer_onnx.open_session(model, "cpu")
        assert session.get_session_options().intra_op_num_threads == threads
    session, _ = infer_onnx.open_session(model, "cpu", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


def test_providers_are_told_to_compute_as_precisely_as_the_file():
    cuda = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    assert infer_onnx.provider_options("cuda", {"precision": "float32"}) == {**cuda, "prefer_nhwc": "0"}
    assert infer_onnx.provider_options("cuda", {"precision": "float16"}) == {**cuda, "prefer_nhwc": "1"}
    options = infer_onnx.provider_options("openvino", {})
    assert json.loads(options["load_config"])["CPU"] == {"INFERENCE_PRECISION_HINT": "f32"}


def test_it_runs_where_torch_and_nibabel_cannot_be_imported(maps, model, tmp_path):
    for absent in ("torch", "nibabel"):
        (tmp_path / f"{absent}.py").write_text("raise ImportError")
    argv = [maps, "--model", model, "--out", tmp_path / "out", "--variants", "1", "--threads", "1"]
    done = script(*argv, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0
    assert len(list((tmp_path / "out/images").iterdir())) == 5


@pytest.mark.long
@pytest.mark.parametrize("name", ["infer_onnx.py", "eval.py", "export.py", "bench.py"])
def test_onnx_runtime_keeps_no_records_in_the_users_home(maps, model, tmp_path, name):
    """From 1.29 on it would, as soon as it is imported, and send them, but on build machines, by their variables."""
    home = tmp_path / "home"
    home.mkdir()
    argv = [maps, "--model", model, "--out", tmp_path / "out"] if name == "infer_onnx.py" else ["-h"]
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run([sys.executable, ROOT / name, *map(str, argv)], env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*"))
