"""infer_onnx.py against a stand-in generator built with onnx alone: a colour a label, blurred, so that pixels count."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import nibabel
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import TURNS, draw_chest, draw_map
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import infer_onnx
from data.slices import COLOURS, LABELS, Mistake, coloured, read_image, read_map, windowed, write_image, write_map

HERE = Path(__file__).resolve().parent.parent
CASES = HERE.parent / "shared" / "cases" / "make_cases.py"
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


def build_generator(path, shape=("N", "H", "W"), metadata=METADATA, work=0, ct=TensorProto.INT16, name="map"):
    """A stand-in that keeps the contract. HU is a value for each label, blurred over 5 x 5 pixels; `work` convolutions
    of 32 channels in front of it, whose result counts nothing, make it slow."""

    def constant(name, value):
        return numpy_helper.from_array(np.asarray(value), name)

    weights = [
        constant("one", [1]),
        constant("hu", np.array([-1000, -850, -500, 40], np.float32)),
        constant("blur", np.full((1, 1, 5, 5), 1 / 25, np.float32)),
        constant("floor", np.float32(-1350)),
        constant("half", np.float32(0.5)),
        constant("spread", np.full((32, 1, 3, 3), 1e-9, np.float32)),
        constant("mix", np.full((32, 32, 3, 3), 1e-9, np.float32)),
        constant("gather", np.full((1, 32, 3, 3), 1e-9, np.float32)),
    ]
    nodes = [
        helper.make_node("Cast", [name], ["index"], to=TensorProto.INT32),
        helper.make_node("Gather", ["hu", "index"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "one"], ["image"]),
        helper.make_node("Conv", ["image", "spread"], ["work0"], pads=[1] * 4),
        *(helper.make_node("Conv", [f"work{i}", "mix"], [f"work{i + 1}"], pads=[1] * 4) for i in range(work)),
        helper.make_node("Conv", [f"work{work}", "gather"], ["nothing"], pads=[1] * 4),
        helper.make_node("Conv", ["image", "blur"], ["blurred"], pads=[2] * 4),
        helper.make_node("Add", ["blurred", "nothing"], ["sum"]),
        helper.make_node("Squeeze", ["sum", "one"], ["lung"]),
        helper.make_node("Cast", [name], ["label"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["label", "half"], ["inside"]),
        helper.make_node("Where", ["inside", "lung", "floor"], ["masked"]),
        helper.make_node("Round", ["masked"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["ct"], to=ct),
        helper.make_node("ReduceMean", ["label"], ["alpha"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "stand-in",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("ct", ct, shape),
            helper.make_tensor_value_info("alpha", TensorProto.FLOAT, shape[:1]),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def draw_slice(height=64, width=64, seed=0):
    """A slice of noise of -1024 to 0 HU, int16 [H, W]: whatever is changed shows."""
    return np.random.default_rng(seed).integers(-1024, 1, (height, width)).astype(np.int16)


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


@pytest.fixture
def infer(tmp_path, model, capfd):
    """Run the script in this process: options -> exit status, OUT, all of stderr but the progress bar."""

    def call(*options, out="out", model=model):
        argv = [*map(str, options), "--model", str(model), "--out", str(tmp_path / out), "--provider", "cpu"]
        try:
            status, told = infer_onnx.main(argv), []
        except Mistake as mistake:
            status, told = 2, [f"error: {mistake}"]
        noise = capfd.readouterr().err.replace("\r", "\n").splitlines()
        return status, tmp_path / out, "\n".join(told + [line for line in noise if line and "%|" not in line])

    return call


def script(*argv, **options):
    """Run the script as a user does."""
    command = [sys.executable, HERE / "infer_onnx.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def slices_in(folder):
    """Files without the record of where their maps lie."""
    return {name: content for name, content in files(folder).items() if name != "run.json"}


def direct(model, labels):
    """What the model itself says of one map whose size suits it, as the format holds it."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["ct"], {"map": labels[None]})[0][0].clip(-1024)


# ------------------------------------------------------------------------------------------------ synthesis


def test_a_map_whose_size_suits_the_model_gives_what_the_model_gives(infer, maps, model):
    status, out, _ = infer(maps)
    assert status == 0
    for name in ("P00_S000", "P00_S001", "P01_S002"):
        labels = read_map(maps / f"{name}.png")
        assert np.array_equal(read_image(out / "images" / f"{name}.png"), direct(model, labels))
        assert np.array_equal(read_map(out / "maps" / f"{name}.png"), labels)


def test_a_map_of_any_size_is_padded_with_background_and_cropped_back(infer, maps, model):
    _, out, _ = infer(maps)
    for name, pad in (("P01_S003", ((0, 14), (0, 10))), ("P02_S004", ((0, 15), (0, 0)))):
        labels = read_map(maps / f"{name}.png")
        expected = direct(model, np.pad(labels, pad))[: labels.shape[0], : labels.shape[1]]
        assert np.array_equal(read_image(out / "images" / f"{name}.png"), expected)


def test_the_smallest_map_is_padded_to_two_multiples(model):
    _, info = infer_onnx.open_session(model, "cpu")
    assert infer_onnx.canvas(5, 33, info) == (32, 48)


def test_a_call_leaves_nothing_behind_for_the_next_of_its_shape(model):
    generator = infer_onnx.Generator(*infer_onnx.open_session(model, "cpu"))
    large, small = np.full((2, 64, 64), 3, np.uint8), np.ones((1, 50, 60), np.uint8)
    first = generator(large)
    kept = first.copy()
    again = generator(np.concatenate([small, small]))
    assert np.array_equal(first, kept)
    fresh = infer_onnx.Generator(*infer_onnx.open_session(model, "cpu"))(small)
    assert np.array_equal(again, np.concatenate([fresh, fresh]))


def test_palette_and_rgb_maps_give_the_same_files(infer, tmp_path):
    for name, pixels in (("palette", draw_map()), ("rgb", coloured(draw_map()))):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "P00_S000.png"
        write_map(path, pixels) if name == "palette" else iio.imwrite(path, pixels)
        infer(tmp_path / name, out=f"out_{name}")
    assert slices_in(tmp_path / "out_palette") == slices_in(tmp_path / "out_rgb")


def test_batches_change_nothing(infer, maps):
    outs = [infer(maps, "--batch", n, "--panel", out=f"out{n}")[1] for n in (1, 2, 5)]
    assert files(outs[0]) == files(outs[1]) == files(outs[2])


def test_one_png_may_be_given_instead_of_a_folder(infer, maps):
    _, out, _ = infer(maps / "P00_S001.png")
    assert [path.name for path in (out / "images").iterdir()] == ["P00_S001.png"]


def test_a_model_of_fixed_size_takes_smaller_maps_and_refuses_larger_ones(infer, maps, tmp_path):
    fixed = build_generator(tmp_path / "fixed.onnx", shape=(2, 64, 64))
    status, out, told = infer(maps, model=fixed)
    assert status == 2
    assert sorted(path.stem for path in (out / "images").iterdir()) == ["P00_S000", "P00_S001", "P01_S002"]
    assert np.array_equal(read_image(out / "images/P01_S002.png"), direct_of_batch(fixed, draw_map(shift=2)))
    assert "P01_S003.png: 50 x 70 pixels are more than the model's fixed [64, 64]" in told


def direct_of_batch(model, labels):
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["ct"], {"map": np.stack([labels, 0 * labels])})[0][0].clip(-1024)


# ------------------------------------------------------------------------------------------------ completion and panels


@pytest.fixture
def images(tmp_path, maps):
    """A real slice for each of the maps."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k, path in enumerate(sorted(maps.iterdir())):
        write_image(folder / path.name, draw_slice(*read_map(path).shape, seed=k))
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


def test_a_panel_without_a_real_slice_shows_map_and_synthesis(infer, maps):
    _, out, _ = infer(maps, "--panel")
    assert iio.imread(out / "panels/P00_S000.png").shape == (64, 2 * 64, 3)


# ------------------------------------------------------------------------------------------------ variants


def test_a_variant_s_map_is_the_one_that_its_slice_was_made_from(infer, maps, model):
    _, out, _ = infer(maps, "--variants", 3)
    assert len(list((out / "images").iterdir())) == 15
    for name in ("P00_S000v01", "P00_S000v03", "P01_S002v02"):
        labels = read_map(out / "maps" / f"{name}.png")
        assert np.array_equal(read_image(out / "images" / f"{name}.png"), direct(model, labels))
        assert not np.array_equal(labels, read_map(maps / f"{name[:8]}.png"))


def test_variants_keep_the_patient_before_the_last_underscore(infer, maps):
    _, out, _ = infer(maps, "--variants", 2)
    assert {path.stem.rpartition("_")[0] for path in (out / "maps").iterdir()} == {"P00", "P01", "P02"}


def test_variants_hang_on_the_seed_and_neither_on_batch_nor_shard(infer, maps, tmp_path):
    whole = files(infer(maps, "--variants", 3, "--seed", 5, out="whole")[1])
    assert whole == files(infer(maps, "--variants", 3, "--seed", 5, "--batch", 4, out="batched")[1])
    for i in (1, 2):
        infer(maps, "--variants", 3, "--seed", 5, "--shard", f"{i}/2", out="sharded")
    assert whole == files(tmp_path / "sharded")
    other = files(infer(maps, "--variants", 3, "--seed", 6, out="other")[1])
    assert whole.keys() == other.keys()
    assert all(whole[name] != other[name] for name in whole)


def test_variants_of_a_map_differ_from_one_another(infer, maps):
    _, out, _ = infer(maps, "--variants", 4)
    assert len({path.read_bytes() for path in (out / "maps").glob("P00_S000*")}) == 4


def test_augmentation_stays_in_the_ranges_of_the_training():
    centre, corner, angle, bent, swayed = [], [], [], [], []
    y, x = np.mgrid[:128, :128]
    plane = np.stack([y.ravel(), x.ravel(), np.ones(y.size)], 1)
    for k in range(200):
        rows, columns = infer_onnx.augmentation(128, 128, np.random.default_rng(k))
        centre.append((rows[60:68, 60:68].mean() - 63.5, columns[60:68, 60:68].mean() - 63.5))
        fitted = plane @ np.linalg.lstsq(plane, rows.ravel(), rcond=None)[0]  # what zoom, crop and rotation do
        bent.append((rows.ravel() - fitted).std())
        along = columns.ravel() - plane @ np.linalg.lstsq(plane, columns.ravel(), rcond=None)[0]
        swayed.append((along.std(), np.corrcoef(along, rows.ravel() - fitted)[0, 1]))
        corner.append(np.hypot(rows[0, 127] - rows[127, 0], columns[0, 127] - columns[127, 0]) / np.hypot(127, 127))
        angle.append(np.degrees(np.arctan2(rows[64, 127] - rows[64, 0], columns[64, 127] - columns[64, 0])))
    assert min(angle) < -8 < 8 < max(angle)
    assert np.abs(angle).max() < infer_onnx.ROTATE + 3
    elastic = 4 * 2 / 512 * 128
    assert 4 < np.abs(centre).max() < 128 * (1 - 1 / infer_onnx.RESIZE) / 2 + elastic
    assert 0.6 * elastic / 4 < np.mean(bent) < 1.1 * elastic / 4  # smoother between the points drawn
    assert np.mean(swayed, 0) == pytest.approx([np.mean(bent), 0], abs=0.1 * elastic / 4)  # each axis by itself
    assert abs(np.corrcoef(np.transpose(centre))[0, 1]) < 0.3
    assert 1 / infer_onnx.RESIZE - 0.03 < min(corner) < 0.93 < 0.97 < max(corner) < 1.03


def test_the_augmentation_of_training_and_of_inference_have_the_same_ranges():
    source = (HERE / "covidgan.py").read_text()
    for name, value in (
        ("resize", infer_onnx.RESIZE),
        ("rotate", infer_onnx.ROTATE),
        ("elastic", infer_onnx.ELASTIC),
        ("elastic_cell", infer_onnx.ELASTIC_CELL),
    ):
        assert f"    {name}: float = {value} " in source


def test_sampling_at_every_pixel_s_own_place_changes_nothing():
    rows, columns = np.mgrid[:50, :70].astype(float)
    assert np.array_equal(infer_onnx.sample_nearest(draw_map(50, 70), rows, columns), draw_map(50, 70))
    assert np.array_equal(infer_onnx.sample_bicubic(draw_slice(50, 70), rows, columns), draw_slice(50, 70))


def test_sampling_beyond_the_border_finds_background_in_maps_and_the_border_in_slices():
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


# ------------------------------------------------------------------------------------------------ formats


def test_every_format_holds_the_same_hu(infer, maps, images):
    read = {
        "png16": lambda stem: read_image(stem.with_suffix(".png")),
        "npy": lambda stem: np.load(stem.with_suffix(".npy")),
        "nifti": lambda stem: np.asarray(nibabel.load(stem.with_suffix(".nii.gz")).dataobj)[..., 0].T,
    }
    hu = {}
    for form, reader in read.items():
        _, out, _ = infer(maps, "--complement", images, "--format", form, out=form)
        hu[form] = {path.stem: reader(out / "images" / path.stem) for path in maps.iterdir()}
    _, out, _ = infer(maps, "--complement", images, "--format", "png8", out="png8")
    for name, expected in hu["png16"].items():
        for form in ("npy", "nifti"):
            assert hu[form][name].dtype == np.int16
            assert np.array_equal(hu[form][name], expected)
        assert np.array_equal(iio.imread(out / "images" / f"{name}.png"), windowed(expected, -600, 1500))


def test_a_nifti_slice_is_read_in_display_as_it_was(infer, maps):
    from data.volumes import read_volume

    _, out, _ = infer(maps, "--format", "nifti")
    volume = read_volume(out / "images/P01_S003.nii.gz").voxels
    _, out, _ = infer(maps, out="png16")
    assert np.array_equal(volume[0], read_image(out / "images/P01_S003.png"))


def test_png8_goes_through_the_model_s_own_window(infer, maps, tmp_path):
    bone = build_generator(tmp_path / "bone.onnx", metadata={**METADATA, "level": "0", "width": "2000"})
    _, out, _ = infer(maps, "--format", "png8", model=bone)
    grey = iio.imread(out / "images/P00_S000.png")
    assert np.array_equal(grey, windowed(direct(bone, read_map(maps / "P00_S000.png")), 0, 2000))


def test_nifti_without_nibabel_is_one_line(infer, maps, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert infer(maps, "--format", "nifti")[2] == "error: --format nifti: nibabel is missing: pip install nibabel"


# ------------------------------------------------------------------------------------------------ shards and restarts


def test_shards_are_disjoint_and_complete(infer, maps, tmp_path):
    whole = files(infer(maps, out="whole")[1])
    names = []
    for i in (1, 2, 3):
        _, out, _ = infer(maps, "--shard", f"{i}/3", out=f"part{i}")
        names += [path.name for path in (out / "images").iterdir()]
        infer(maps, "--shard", f"{i}/3", out="together")
    assert sorted(names) == sorted(path.name for path in maps.iterdir())
    assert files(tmp_path / "together") == whole


def test_a_second_run_leaves_finished_files_alone_and_makes_the_missing_ones(infer, maps):
    _, out, _ = infer(maps)
    before = files(out)
    missing = out / "images/P00_S001.png"
    missing.unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert infer(maps)[0] == 0
    assert files(out) == before
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_a_panel_asked_for_later_is_still_made(infer, maps):
    infer(maps)
    _, out, _ = infer(maps, "--panel")
    assert len(list((out / "panels").iterdir())) == 5


@pytest.mark.parametrize("change", [["--format", "npy"], ["--variants", "2"], ["--complement"], ["--model"]])
def test_slices_of_two_kinds_do_not_mix_in_one_folder(infer, maps, images, tmp_path, change):
    infer(maps)
    metadata = {**METADATA, "checkpoint_sha256": "1" * 64}
    other = {"model": build_generator(tmp_path / "other.onnx", metadata=metadata)} if change == ["--model"] else {}
    options = [] if other else change if len(change) == 2 else [*change, images]
    status, out, told = infer(maps, *options, **other)
    assert status == 2
    assert told.startswith(f"error: {out}: its slices were made otherwise")


def test_two_real_slices_given_in_turn_for_one_map_do_not_mix_in_one_folder(infer, maps, tmp_path):
    for k, name in enumerate(("soft", "sharp")):
        write_image(tmp_path / f"{name}.png", draw_slice(64, 64, seed=k))
    map_of_one = maps / "P00_S000.png"
    assert infer(map_of_one, "--complement", tmp_path / "soft.png")[0] == 0
    status, out, told = infer(map_of_one, "--complement", tmp_path / "sharp.png")
    assert status == 2 and told.startswith(f"error: {out}: its slices were made otherwise")
    assert infer(map_of_one, "--complement", tmp_path / "soft.png")[0] == 0


def test_slices_in_bfloat16_are_not_taken_for_those_of_the_file_s_own_precision(tmp_path):
    args = infer_onnx.parse([str(tmp_path), "--out", str(tmp_path / "out"), "--provider", "openvino"])
    info = {"checkpoint_sha256": "1", "precision": "float32"}
    with infer_onnx.claimed(args, info, ["images"], "here"):
        (tmp_path / "out/images/a.png").touch()
    args.precision = "bf16"
    with pytest.raises(Mistake, match="its slices were made otherwise"), infer_onnx.claimed(args, info, [], "here"):
        pass


def test_a_link_to_a_map_that_is_gone_is_left_out_as_faulty_and_the_others_are_made(infer, maps, tmp_path):
    (maps / "P00_S000.png").rename(tmp_path / "away.png")
    (maps / "P00_S000.png").symlink_to(tmp_path / "gone.png")
    status, out, told = infer(maps)
    assert status == 2 and f"error: {maps / 'P00_S000.png'}: " in told and "left out as faulty: 1" in told
    assert len(list((out / "images").iterdir())) == 4


def test_what_a_failed_start_left_is_gone_on_with_and_slices_of_others_are_not_taken_for_finished(infer, maps):
    _, out, _ = infer(maps)
    images = files(out / "images")
    for path in (out / "images").iterdir():
        path.unlink()
    (out / "images/.P00_S000.png.7.tmp").write_bytes(b"")
    (out / "run.json").write_text("{}")
    assert infer(maps)[0] == 0
    assert files(out / "images").items() > images.items()
    (out / "run.json").unlink()
    status, _, told = infer(maps)
    assert status == 2 and told.startswith(f"error: {out}: its slices were made otherwise")


def test_the_shell_sees_status_2_where_a_map_was_left_out(maps, model, tmp_path):
    (maps / "P00_S999.png").write_bytes(b"no PNG")
    done = script(maps, "--model", model, "--out", tmp_path / "out", "--provider", "cpu", "--threads", "1")
    assert done.returncode == 2 and len(list((tmp_path / "out/images").iterdir())) == 5


def test_a_map_that_has_changed_is_made_anew_and_one_that_lost_its_lung_takes_its_slice_along(infer, maps, model):
    _, out, _ = infer(maps)
    before = files(out)
    write_map(maps / "P00_S000.png", draw_map(shift=20))
    write_map(maps / "P00_S001.png", np.zeros((64, 64), np.uint8))
    status, _, told = infer(maps)
    assert status == 0 and "1 slices without lung are left out" in told
    after = files(out)
    assert np.array_equal(read_image(out / "images/P00_S000.png"), direct(model, draw_map(shift=20)))
    assert np.array_equal(read_map(out / "maps/P00_S000.png"), draw_map(shift=20))
    assert before.keys() - after.keys() == {"images/P00_S001.png", "maps/P00_S001.png"}
    assert {name for name in after if after[name] != before[name]} == {"images/P00_S000.png", "maps/P00_S000.png"}


def test_a_map_that_comes_with_an_older_date_is_made_anew(infer, maps, model, tmp_path):
    _, out, _ = infer(maps)
    other = tmp_path / "other.png"
    write_map(other, draw_map(shift=20))
    os.utime(other, (10**9, 10**9))
    shutil.copy2(other, maps / "P00_S000.png")  # keeps the date, as archives and rsync do
    infer(maps)
    assert np.array_equal(read_image(out / "images/P00_S000.png"), direct(model, draw_map(shift=20)))


def test_a_real_slice_that_has_changed_is_pasted_into_anew(infer, maps, images):
    _, out, _ = infer(maps, "--complement", images)
    write_image(images / "P00_S000.png", draw_slice(seed=77))
    infer(maps, "--complement", images)
    labels, made = read_map(maps / "P00_S000.png"), read_image(out / "images/P00_S000.png")
    assert np.array_equal(made[labels == 0], draw_slice(seed=77)[labels == 0])


def test_slices_of_another_set_are_not_taken_for_finished_though_names_are_the_same(infer, maps, images, tmp_path):
    _, out, _ = infer(maps, "--complement", images)
    for change in (["maps"], ["images"]):
        others = [tmp_path / "other" if path.name in change else path for path in (maps, images)]
        shutil.copytree(maps if "maps" in change else images, tmp_path / "other")
        before = files(out)
        status, _, told = infer(others[0], "--complement", others[1])
        assert status == 2 and told.startswith(f"error: {out}: its slices were made otherwise")
        assert files(out) == before
        shutil.rmtree(tmp_path / "other")


def test_slices_are_there_until_a_panel_asked_for_later_is_made(infer, maps, monkeypatch):
    _, out, _ = infer(maps)
    before = slices_in(out)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer_onnx, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        infer(maps, "--panel")
    assert slices_in(out) == before


def test_slices_of_a_version_that_kept_no_place_are_gone_on_with(infer, maps):
    _, out, _ = infer(maps)
    record, before = out / "run.json", files(out)
    held = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in held.items() if key != "sources"}, indent=1))
    assert infer(maps)[0] == 0 and files(out) == before


def test_a_set_moved_with_its_slices_is_gone_on_with(infer, maps, tmp_path):
    _, out, _ = infer(maps)
    before = files(out)
    (tmp_path / "moved").mkdir()
    for folder in (maps, out):
        folder.rename(tmp_path / "moved" / folder.name)
    assert infer(tmp_path / "moved" / "maps", out="moved/out")[0] == 0
    assert files(tmp_path / "moved" / "out") == before


@pytest.mark.parametrize("what", ["grey levels", "HU without an offset"])
def test_real_slices_that_hold_no_hu_are_left_out_as_faulty(infer, maps, images, what):
    real, labels = images / "P00_S000.png", read_map(maps / "P00_S000.png")
    hu = np.where(labels > 0, -850, 700)  # bone all about
    stored = np.clip((hu + 1350) / 1500 * 255, 0, 255) if what == "grey levels" else np.maximum(hu, 0)
    iio.imwrite(real, stored.astype(np.uint16))
    status, out, told = infer(maps, "--complement", images)
    assert status == 2 and f"error: {real}: " in told and "left out as faulty: 1" in told
    assert ("grey levels" in told) == (what == "grey levels")
    assert not (out / "images/P00_S000.png").exists() and len(files(out / "images")) == 4
    status, out, told = infer(maps, "--complement", images, "--unchecked")
    assert status == 0 and (read_image(out / "images/P00_S000.png") == read_image(real))[labels == 0].all()


@pytest.mark.parametrize("turn", TURNS)
def test_a_real_slice_turned_against_its_map_is_left_out_as_faulty_unless_overruled(infer, maps, images, turn):
    hu, labels = draw_chest(1)
    write_map(maps / "P00_S000.png", labels[0])
    write_image(images / "P00_S000.png", hu[0])
    assert infer(maps, "--complement", images)[0] == 0
    write_image(images / "P00_S000.png", TURNS[turn](hu[0]))
    status, out, told = infer(maps, "--complement", images, out="turned")
    assert status == 2 and ("it is turned against its CT" in told or "in healthy lung, which has HU" in told)
    assert len(files(out / "images")) == 4
    assert infer(maps, "--complement", images, "--unchecked", out="turned")[0] == 0


def test_the_folder_of_the_maps_is_no_out_since_the_next_run_would_take_what_lies_in_it(infer, maps, images):
    for options in ([maps], [maps.parent / "." / "maps"], [images, "--complement", maps]):
        assert infer(*options, out="maps")[::2] == (2, f"error: {maps}: the input stands in it: give another --out")
    assert not (maps / "maps").exists()


def test_slices_in_out_that_are_of_no_map_given_are_told(infer, maps):
    assert "of no map given" not in infer(maps, "--variants", 2)[2]
    assert "of no map given" not in infer(maps, "--variants", 2, "--shard", "1/2")[2]
    _, out, told = infer(maps, "--variants", 1)
    assert f"note: {out}/images: 5 slices in it are of no map given now" in told
    (maps / "P00_S000.png").unlink()
    assert "2 slices in it are of no map given now" in infer(maps, "--variants", 2)[2]


def test_a_set_whose_making_was_cut_off_is_refused(infer, maps):
    (maps.parent / ".unfinished").touch()
    line = f"error: {maps.parent}: its making was cut off: run the command that makes it again"
    for place in (maps.parent, maps):
        assert infer(place)[::2] == (2, line)
    (maps.parent / "split.json").write_text('{"train": [], "test": []}')
    assert infer(maps.parent)[0] == 0


def test_a_killed_run_leaves_nothing_half_written_and_is_gone_on_with(infer, maps, tmp_path):
    slow = build_generator(tmp_path / "slow.onnx", work=6)
    for k in range(30):
        write_map(maps / f"P09_S{k:03d}.png", draw_map(256, 256, shift=k))
    out = tmp_path / "out"
    argv = [sys.executable, HERE / "infer_onnx.py", maps, "--model", slow, "--out", out, "--threads", "1"]
    run = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while len(list(out.glob("images/*.png"))) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done = list(out.glob("images/*.png"))
    assert 8 <= len(done) < 35
    for path in done:
        assert read_image(path).shape == read_map(out / "maps" / path.name).shape
    assert infer(maps, model=slow)[0] == 0
    assert len(list(out.glob("images/*.png"))) == 35


# ------------------------------------------------------------------------------------------------ bad input


def write_truncated(path):
    write_map(path, draw_map())
    path.write_bytes(path.read_bytes()[:-40])


def write_unknown_label(path):
    Image.fromarray(np.where(draw_map() == 3, 7, draw_map()).astype(np.uint8)).save(path)


def write_unknown_colour(path):
    pixels = coloured(draw_map())
    pixels[10, 20] = 255, 0, 255
    iio.imwrite(path, pixels)


def write_float(path):
    Image.fromarray(draw_map().astype(np.float32)).save(path, format="TIFF")


BAD_MAPS = {
    "unknown label": (write_unknown_label, "label 7 at row"),
    "unknown colour": (write_unknown_colour, "colour [255, 0, 255] at row 10, column 20"),
    "truncated": (write_truncated, "not a readable PNG"),
    "text": (lambda path: path.write_text("no picture"), "not a readable PNG"),
    "16-bit": (lambda path: iio.imwrite(path, draw_map().astype(np.uint16)), "mode I;16 is no label map"),
    "float": (write_float, "not a readable PNG"),  # it is a TIFF
}


@pytest.mark.parametrize("kind", BAD_MAPS)
def test_a_bad_map_is_one_line_and_the_others_are_made(infer, maps, kind):
    write, complaint = BAD_MAPS[kind]
    write(maps / "P00_S999.png")
    status, out, told = infer(maps, "--variants", 2)
    assert status == 2
    assert len(list((out / "images").iterdir())) == 10
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {maps / 'P00_S999.png'}: ")
    assert complaint in errors[0]
    assert told.splitlines()[-1] == "left out as faulty: 1, see the errors above"


def test_a_label_that_the_model_does_not_know_is_refused(infer, maps, tmp_path):
    metadata = {**METADATA, "labels": json.dumps(LABELS[:3]), "colours": json.dumps(COLOURS[:3])}
    status, _, told = infer(maps, model=build_generator(tmp_path / "three.onnx", metadata=metadata))
    assert status == 2
    assert f"{maps / 'P00_S000.png'}: label 3: the model's labels are 0..2" in told


@pytest.mark.parametrize("name", ["P00_S000.PNG", "p00_s000.png"])
def test_two_maps_whose_slices_would_be_one_file_are_refused(infer, maps, name):
    write_map(maps / name, draw_map(shift=9))
    status, out, told = infer(maps)
    assert (status, told.count("\n")) == (2, 0)
    assert name in told and "P00_S000.png" in told
    assert not out.exists()


def test_a_missing_and_a_misfit_real_slice_are_told(infer, maps, images):
    (images / "P00_S000.png").unlink()
    write_image(images / "P00_S001.png", draw_slice(32, 32))
    iio.imwrite(images / "P01_S002.png", np.zeros((64, 64), np.uint8))
    status, out, told = infer(maps, "--complement", images)
    assert status == 2
    assert f"{maps / 'P00_S000.png'}: P00_S000 is missing from --complement" in told
    assert f"{images / 'P00_S001.png'}: (32, 32) pixels, but its map has (64, 64)" in told
    assert f"error: {images / 'P01_S002.png'}: " in told
    assert len(list((out / "images").iterdir())) == 2


def test_a_map_with_a_broken_header_is_left_out_and_named(infer, maps):
    broken = maps / "P00_S001.png"
    content = bytearray(broken.read_bytes())
    content[11] = 4  # the header's length
    broken.write_bytes(content)
    status, out, told = infer(maps)
    assert status == 2
    assert f"error: {broken}: not a readable PNG" in told
    assert len(list((out / "images").iterdir())) == 4


def test_a_folder_without_png_is_named(infer, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, told = infer(tmp_path / "empty")
    assert (status, told.count("\n")) == (2, 0)
    assert f"{tmp_path / 'empty'}: no PNG in it" in told


def test_one_side_of_a_dataset_is_made_and_no_other_map(infer, maps, tmp_path):
    held_out = sorted(path.stem for path in maps.iterdir())[1:3]
    (tmp_path / "split.json").write_text(json.dumps({"train": ["P09_S009"], "test": held_out}))
    status, out, _ = infer(tmp_path, "--side", "test")
    assert status == 0
    assert sorted(path.stem for path in (out / "images").iterdir()) == held_out


def test_names_of_a_split_may_end_in_png_and_a_byte_order_mark_is_no_mistake(infer, maps, tmp_path):
    split = json.dumps({"train": [], "test": ["P00_S001.png", "P02_S004.png"]})
    (tmp_path / "split.json").write_text("\ufeff" + split, encoding="utf-8")
    for source, out in ((tmp_path, "a"), (maps, "b")):
        status, made, _ = infer(source, "--side", "test", out=out)
        assert status == 0
        assert sorted(path.stem for path in (made / "images").iterdir()) == ["P00_S001", "P02_S004"]


@pytest.mark.parametrize(
    "test, complaint",
    [
        (["P00_S001", "P07_S000", "P08_S000"], "names P07_S000 under test, but there is no such map"),
        ([], "no names under test"),
    ],
)
def test_names_without_map_and_a_side_without_names_are_errors(infer, maps, tmp_path, test, complaint):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["P00_S000"], "test": test}))
    status, out, told = infer(tmp_path, "--side", "test")
    assert status == 2
    assert told.startswith(f"error: {tmp_path / 'split.json'}: {complaint}")
    assert "\n" not in told and not out.exists()


def test_maps_without_lung_are_left_out_with_a_count_again_and_again(infer, maps):
    for k in (7, 8):
        write_map(maps / f"P09_S00{k}.png", np.zeros((64, 64)))
    for _ in range(2):
        status, out, told = infer(maps)
        assert status == 0
        assert told.splitlines()[-1] == "note: 2 slices without lung are left out"
        assert len(list((out / "images").iterdir())) == len(list((out / "maps").iterdir())) == 5


def test_variants_that_crop_their_lung_away_are_left_out_with_a_count(infer, tmp_path):
    (tmp_path / "corner").mkdir()
    labels = np.zeros((64, 64), np.uint8)
    labels[:2, :2] = 1
    write_map(tmp_path / "corner/P00_S000.png", labels)
    status, out, told = infer(tmp_path / "corner", "--variants", 20)
    made = len(list((out / "images").iterdir()))
    assert 0 < made < 20
    assert status == 0 and told.endswith(f"note: {20 - made} slices without lung are left out")


def test_maps_that_are_all_without_lung_are_an_error(infer, maps, tmp_path):
    (tmp_path / "empty").mkdir()
    write_map(tmp_path / "empty/P00_S000.png", np.zeros((64, 64)))
    status, _, told = infer(tmp_path / "empty")
    assert status == 2
    assert told.splitlines()[-1].startswith("error: ") or told.startswith("error: ")
    assert f"{tmp_path / 'empty'}: no lung in any of the 1 slices" in told


def test_a_shard_that_is_empty_and_a_run_that_is_finished_are_fine(infer, maps):
    status, _, told = infer(maps, "--shard", "7/7")
    assert status == 0 and "note: shard 7/7 is empty: there are only 5 to make" in told
    assert infer(maps)[0] == infer(maps)[0] == 0


def test_complete_with_a_dataset_s_images_or_the_one_slice_of_the_one_map(infer, maps, images, tmp_path):
    for path in list(images.iterdir()):
        path.rename(path.with_suffix(".PNG"))
    _, whole, _ = infer(maps, "--complement", images)
    _, dataset, _ = infer(tmp_path, "--complement", tmp_path, out="dataset")
    assert files(whole) == files(dataset)
    _, one, _ = infer(maps / "P00_S001.png", "--complement", images / "P00_S001.PNG", out="one")
    assert (one / "images/P00_S001.png").read_bytes() == (whole / "images/P00_S001.png").read_bytes()
    assert "one file for 5 maps" in infer(maps, "--complement", images / "P00_S001.PNG", out="none")[2]


def test_a_header_that_claims_a_giant_picture_is_one_line_and_the_others_are_made(infer, maps):
    content = bytearray((maps / "P00_S001.png").read_bytes())
    for side in (60000, 10000):  # Pillow's error, and its warning, if it were asked
        content[16:24] = side.to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        (maps / "P00_S001.png").write_bytes(content)
        status, out, told = infer(maps, out=str(side))
        (line,) = (line for line in told.splitlines() if line.startswith("error: "))
        assert status == 2 and line.startswith(f"error: {maps / 'P00_S001.png'}: {side} x {side} pixels: ")
        assert len(files(out)) == 2 * 4 + 1  # run.json


# ------------------------------------------------------------------------------------------------ real files


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    if not CASES.exists():
        pytest.skip("shared/cases is not here")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, CASES, folder], check=True, timeout=60)
    return folder / "slices"


@pytest.mark.parametrize("case", ["upper_case", "indexed_colours"])
def test_endings_and_palettes_as_people_have_them_give_the_same_slices(infer, cases, case):
    outs = [infer(cases / c, "--complement", cases / c, out=c)[1] for c in ("base", case)]
    assert len(slices_in(outs[0])) == 2 * 18
    assert slices_in(outs[0]) == slices_in(outs[1])


def test_jpeg_maps_are_one_line(infer, cases):
    status, out, told = infer(cases / "jpeg_maps")
    assert (status, told.count("\n")) == (2, 0)
    assert told.startswith(f"error: {cases / 'jpeg_maps/maps'}: JPEG, which changes grey levels and labels")
    assert not out.exists()


def test_slices_without_lung_are_left_out_of_a_real_dataset(infer, cases):
    whole, (status, out, told) = infer(cases / "base", out="whole")[1], infer(cases / "no_lung_in_some")
    assert status == 0 and told.endswith("note: 5 slices without lung are left out")
    made = files(out / "images")
    assert len(made) == 13 and made.items() <= files(whole / "images").items()


def test_the_sides_of_a_split_with_endings_are_the_whole(infer, cases):
    whole = slices_in(infer(cases / "base", out="whole")[1])
    for side in ("train", "test"):
        status, out, _ = infer(cases / "split_with_endings", "--side", side, out="sides")
        assert status == 0
    assert slices_in(out) == whole
    assert "no names under seg_test" in infer(cases / "split_with_endings", "--side", "seg_test", out="none")[2]


def test_sides_that_are_no_multiple_of_16_are_padded_and_cropped(infer, cases, model):
    status, out, _ = infer(cases / "size_620x460")
    assert status == 0
    labels = read_map(cases / "size_620x460/maps/P02_S003.png")
    expected = direct(model, np.pad(labels, ((0, 4), (0, 4))))[:460, :620]
    assert labels.shape == (460, 620)
    assert np.array_equal(read_image(out / "images/P02_S003.png"), expected)


# ------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["nowhere"], "nowhere: not there"),
        (["MAPS", "--shard", "3/2"], "--shard 3/2: give I/N"),
        (["MAPS", "--shard", "0/2"], "--shard 0/2: give I/N"),
        (["MAPS", "--shard", "half"], "--shard half: give I/N"),
        (["MAPS", "--batch", "0"], "--batch 0: give 1 to 9999"),
        (["MAPS", "--seed", "-1"], "--seed -1: give 0 to"),
        (["MAPS", "--threads", "10000"], "--threads 10000: give 1 to"),
        (["MAPS", "--format", "jpeg"], "argument --format: invalid choice"),
        (["MAPS", "--complement", "nowhere"], "nowhere: not there"),
        (["MAPS", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["MAPS", "--side", "test"], "no JSON with lists of names"),
        (["MAPS/P00_S000.png", "--side", "test"], "--side test: goes with the folder of a dataset"),
        (["SCRIPT"], "neither PNG nor NIfTI"),
    ],
)
def test_bad_usage_is_one_line(infer, maps, options, complaint):
    status, _, told = infer(*[option.replace("MAPS", str(maps)).replace("SCRIPT", __file__) for option in options])
    assert status == 2
    assert told.startswith("error: ")
    assert complaint in told
    assert "\n" not in told


def test_a_dataset_cannot_be_its_own_output(infer, maps, tmp_path):
    before = files(maps)
    status, _, told = infer(maps, out=".")
    assert status == 2
    assert "the input stands in it" in told
    assert "the input stands in it" in infer(maps.parent, out=".")[2]
    assert files(maps) == before


# ------------------------------------------------------------------------------------------------ model files


FOREIGN = {
    "bare": ({"metadata": {}}, "lacks metadata kind; metadata contract"),
    "lacking": (
        {"metadata": {key: METADATA[key] for key in METADATA if key not in ("multiple", "licence")}},
        "lacks metadata multiple; metadata licence",
    ),
    "input": ({"name": "x"}, "lacks input map, tensor(uint8)"),
    "output": ({"ct": TensorProto.FLOAT}, "lacks output ct, tensor(int16)"),
    "kind": ({"metadata": {**METADATA, "kind": "unet"}}, "is a unet, not a generator"),
    "contract": ({"metadata": {**METADATA, "contract": "2"}}, "contract 2"),
    "garbled": ({"metadata": {**METADATA, "size": "?"}}, "metadata size is"),
    "colours": ({"metadata": {**METADATA, "colours": "[[1, 2, 3]]"}}, "metadata colours is"),
    "window": ({"metadata": {**METADATA, "level": "10000", "width": "45536"}}, "level 10000 and width 45536 HU"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_model_is_refused_by_name_and_by_what_it_lacks(infer, maps, tmp_path, kind):
    change, complaint = FOREIGN[kind]
    path = build_generator(tmp_path / "foreign.onnx", **change)
    status, out, told = infer(maps, model=path)
    assert status == 2
    assert told.startswith(f"error: {path}: ")
    assert complaint in told
    assert "\n" not in told
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"not a model", "cut"])
def test_a_broken_model_is_refused_by_name_without_noise(infer, maps, model, tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(model.read_bytes()[:700] if content == "cut" else content)
    status, _, told = infer(maps, model=path)
    assert status == 2
    assert told.startswith(f"error: {path}: not a usable ONNX file (")
    assert "\n" not in told


@pytest.mark.parametrize("version", ["ir", "opset"])
def test_a_file_that_is_too_new_is_told_with_the_command_that_helps(infer, maps, model, version):
    newer = onnx.load(model)
    newer.ir_version = 99 if version == "ir" else 8
    newer.opset_import[0].version = 99 if version == "opset" else 18
    onnx.save(newer, model)
    status, _, told = infer(maps)
    assert status == 2
    assert told.startswith(f"error: {model}: too new for onnxruntime {ort.__version__}: pip install -U onnxruntime")
    assert "\n" not in told and "export it again" not in told


def test_a_folder_is_no_model(infer, maps, tmp_path):
    status, _, told = infer(maps, model=tmp_path)
    assert (status, told) == (2, f"error: {tmp_path}: a folder: name the .onnx file in it")


def test_a_missing_model_is_told_with_the_command_that_makes_one(infer, maps, tmp_path):
    status, _, told = infer(maps, model=tmp_path / "missing.onnx")
    assert status == 2
    assert told.startswith(f"error: {tmp_path / 'missing.onnx'}: no such file: python export.py")


def test_other_kinds_of_model_need_their_kind_alone(tmp_path):
    path = build_generator(tmp_path / "features.onnx", metadata={"kind": "features"})
    session, info = infer_onnx.open_session(path, "cpu", kind="features")
    assert session.get_inputs()[0].name == "map"
    assert info == {"kind": "features"}
    with pytest.raises(Mistake, match="is a features, not a unet"):
        infer_onnx.open_session(path, "cpu", kind="unet")
    with pytest.raises(Mistake, match="it lacks metadata kind"):
        infer_onnx.open_session(build_generator(tmp_path / "bare.onnx", metadata={}), "cpu", kind="features")


def test_a_quiet_session_says_nothing(model, capfd):
    session, _ = infer_onnx.open_session(model, quiet=True)
    assert session.get_providers()[-1] == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ providers

on_cpu = pytest.mark.skipif(infer_onnx.nvidia_driver() is not None, reason="this machine has an NVIDIA driver")


@on_cpu
@pytest.mark.parametrize("provider", ["tensorrt", "cuda", "openvino", "coreml", "dml"])
def test_a_named_provider_that_does_not_load_is_one_line_and_no_silent_cpu_run(maps, model, tmp_path, provider):
    if not infer_onnx.obstacle(provider):
        pytest.skip("it is here")
    done = script(maps, "--model", model, "--out", tmp_path / "out", "--provider", provider)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: --provider {provider}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@on_cpu
@pytest.mark.skipif(not infer_onnx.obstacle("openvino"), reason="OpenVINO is here, and taken")
def test_auto_says_what_it_took_and_why_nothing_better_and_there_is_no_other_noise(maps, model, tmp_path):
    done = script(maps, "--model", model, "--out", tmp_path / "out", "--threads", "1")
    assert done.returncode == 0
    first, *rest = [line for line in done.stderr.replace("\r", "\n").splitlines() if "%|" not in line and line]
    assert first.startswith(f"{model} runs on cpu, threads: 1; not tensorrt, cuda: no NVIDIA driver here; not openvino")
    assert rest == ["note: not all maps are 64 x 64, the size the model was trained at"]
    assert done.stdout.splitlines() == [
        "5 maps: 0 slices finished, 5 to make in 5 batches of up to 1",
        f"5 slices written to {tmp_path / 'out'}",
    ]


@on_cpu
@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime without CUDA")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_driver_without_the_libraries_is_told_by_the_library_that_is_missing(model, monkeypatch, capfd, provider):
    monkeypatch.setattr(infer_onnx, "nvidia_driver", lambda: object())
    with pytest.raises(Mistake, match=rf"--provider {provider}: did not load \(lib.*: cannot open shared object"):
        infer_onnx.open_session(model, provider)
    assert capfd.readouterr() == ("", "")
    session, _ = infer_onnx.open_session(model)
    assert session.get_providers() == ["CPUExecutionProvider"]
    told = capfd.readouterr().err
    assert "not tensorrt: on request only" in told
    assert "not cuda: did not load (libcu" in told
    assert told.count("\n") == 1


def test_a_better_provider_that_fails_to_start_is_told_and_the_next_is_taken(model, monkeypatch, capfd):
    start = infer_onnx.start

    def failing(model, name, options, threads):
        if name == "openvino":
            raise infer_onnx.ORT_ERRORS[0]("no such device\nand a stack")
        return start(model, name, options, threads)

    monkeypatch.setattr(infer_onnx, "start", failing)
    monkeypatch.setattr(infer_onnx, "obstacle", lambda name: "" if name in ("openvino", "cpu") else "not here")
    session, _ = infer_onnx.open_session(model)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert "; not openvino: did not start (no such device)" in capfd.readouterr().err
    with pytest.raises(Mistake, match=r"^--provider openvino: did not start \(no such device\)"):
        infer_onnx.open_session(model, "openvino")


def test_a_dry_run_says_what_would_be_done_and_does_nothing(maps, model, tmp_path, capsys):
    argv = [str(maps), "--model", str(model), "--out", str(tmp_path / "out"), "--batch", "2"]
    assert infer_onnx.main([*argv, "--provider", "cpu", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(
        "5 maps: 0 slices finished, 5 to make in 4 batches of up to 2\nprovider options: {"
    )
    assert not (tmp_path / "out").exists()


@on_cpu
@pytest.mark.parametrize(
    "provider, word", [("cuda", "'use_tf32': '0'"), ("tensorrt", "'trt_timing_cache_enable': '1'")]
)
def test_a_dry_run_tells_the_options_of_a_card_that_is_not_here(maps, model, tmp_path, capsys, provider, word):
    argv = [str(maps), "--model", str(model), "--out", str(tmp_path / "out"), "--provider", provider, "--dry-run"]
    assert infer_onnx.main(argv) == 0
    told = capsys.readouterr()
    assert f"note: --provider {provider}: no NVIDIA driver here" in told.err
    assert word in told.out and f"batches of up to {infer_onnx.NVIDIA_BATCH}" in told.out
    assert told.out.endswith("CUDA graphs: no\nbatch shapes: 1x48x80, 1x64x80, 3x64x64\n")
    assert not (tmp_path / "out").exists()


@on_cpu
def test_with_cuda_graphs_there_is_one_shape_a_size(maps, model, tmp_path, capsys):
    argv = [str(maps), "--model", str(model), "--provider", "cuda", "--cuda-graph", "--batch", "2", "--dry-run"]
    assert infer_onnx.main([*argv, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "'enable_cuda_graph': '1'" in told
    assert told.endswith("CUDA graphs: yes\nbatch shapes: 2x48x80, 2x64x64, 2x64x80\n")


def test_a_dry_run_passes_over_maps_too_large_for_a_model_of_fixed_size(maps, tmp_path, capsys):
    fixed = build_generator(tmp_path / "fixed.onnx", shape=(2, 64, 64))
    argv = [str(maps), "--model", str(fixed), "--out", str(tmp_path / "out"), "--provider", "cpu", "--dry-run"]
    assert infer_onnx.main(argv) == 0
    assert capsys.readouterr().out.endswith("batch shapes: 2x64x64\n")


@pytest.mark.parametrize(
    "options", [["--cuda-graph"], ["--precision", "bf16"], ["--cuda-graph", "--provider", "tensorrt"]]
)
def test_graphs_and_bfloat16_go_with_their_providers_alone(maps, model, tmp_path, options):
    done = script(maps, "--model", model, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and "alone" in done.stderr and done.stderr.count("\n") == 1


def test_memory_of_the_device_and_filled_up_batches_give_the_same_slices(model):
    """The path of CUDA graphs, run on the CPU: two sizes in turn, batches of 3 and 1 filled up to 3."""
    session, info = infer_onnx.open_session(model, "cpu")
    plain, bound = infer_onnx.Generator(session, info), infer_onnx.Generator(session, info, graph_batch=3)
    rng = np.random.default_rng(0)
    for n, height, width in ((3, 64, 64), (1, 64, 64), (2, 40, 96), (3, 64, 64)):
        maps = rng.integers(0, 4, (n, height, width), np.uint8)
        np.testing.assert_array_equal(bound(maps), plain(maps))
    assert sorted(bound.bound) == [(3, 48, 96), (3, 64, 64)]
    ids = [binding.options.get_run_config_entry("gpu_graph_id") for binding in bound.bound.values()]
    assert ids == ["1", "2"]


@pytest.mark.parametrize("precision, hint", [("model", "f32"), ("bf16", "bf16")])
def test_openvino_s_cpu_is_told_its_precision(precision, hint):
    options = infer_onnx.provider_options("openvino", INFO, precision=precision)
    assert json.loads(options["load_config"])["CPU"]["INFERENCE_PRECISION_HINT"] == hint


@pytest.mark.parametrize("precision", ["model", "bf16"])
def test_openvino_gives_the_slices_of_the_cpu(model, precision):
    if reason := infer_onnx.obstacle("openvino"):
        pytest.skip(reason)
    maps, hu = np.stack([draw_map(), draw_map(shift=9)]), {}
    for name, asked in (("cpu", "model"), ("openvino", precision)):
        session, info = infer_onnx.open_session(model, name, precision=asked)
        assert session.get_providers()[0] == infer_onnx.PROVIDERS[name]
        hu[name] = infer_onnx.Generator(session, info)(maps).astype(int)
    assert np.abs(hu["openvino"] - hu["cpu"]).max() <= (1 if precision == "model" else 8)  # bfloat16: 3 digits of 1350


@pytest.mark.parametrize("cpu", ["Intel's", "another's"])
def test_the_plugin_of_openvino_runs_by_its_cpu_and_says_where_it_finds_none(monkeypatch, cpu):
    """A stand-in for the package and its devices: which are taken, and that the library is registered once."""
    package = SimpleNamespace(get_library_path=lambda: "plugin.so", __spec__="it is there")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", package)
    devices = [
        SimpleNamespace(ep_name=f"{name}ExecutionProvider", ep_metadata=metadata)
        for name, metadata in (("CPU", {}), ("OpenVINO", {"ov_device": "NPU"}), ("OpenVINO", {"ov_device": "CPU"}))
    ]
    registered = []
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda *both: registered.append(both), raising=False
    )
    monkeypatch.setattr(ort, "get_ep_devices", lambda: devices if cpu == "Intel's" else devices[:2], raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(infer_onnx, "openvino_plugin", cache(infer_onnx.openvino_plugin.__wrapped__))
    monkeypatch.setattr(infer_onnx, "openvino_devices", cache(infer_onnx.openvino_devices.__wrapped__))
    reason = infer_onnx.obstacle("openvino")
    assert reason == ("" if cpu == "Intel's" else "onnxruntime-ep-openvino takes no CPU but Intel's")
    assert infer_onnx.openvino_devices() == (devices[2:] if cpu == "Intel's" else [])
    assert registered == [("openvino", "plugin.so")]


def test_threads_are_the_cores_that_this_process_may_use(model, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    session, _ = infer_onnx.open_session(model, "cpu")
    assert session.get_session_options().intra_op_num_threads == 3
    session, _ = infer_onnx.open_session(model, "cpu", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


INFO = {"precision": "float16", "multiple": 16, "fixed": [None, None, None]}


def test_tensorrt_gets_a_cache_half_precision_and_a_profile_of_the_shapes_to_come():
    shapes = [(1, 500, 512), (8, 512, 512), (8, 512, 512), (1, 130, 700)]
    options = infer_onnx.provider_options("tensorrt", INFO, shapes)
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"]
    assert options["trt_profile_min_shapes"] == "map:1x144x512"
    assert options["trt_profile_opt_shapes"] == "map:8x512x512"
    assert options["trt_profile_max_shapes"] == "map:8x512x704"
    full = infer_onnx.provider_options("tensorrt", INFO, [(8, 512, 512)])  # a map without lung leaves a batch of 7
    assert full["trt_profile_min_shapes"] == "map:1x512x512"


def test_tensorrt_needs_no_profile_for_a_fixed_size_and_no_half_precision_for_float32():
    fixed = {**INFO, "precision": "float32", "fixed": [1, 64, 64]}
    options = infer_onnx.provider_options("tensorrt", fixed, [(1, 64, 64)])
    assert options["trt_fp16_enable"] == "0"
    assert not [key for key in options if "profile" in key]


def test_cuda_computes_in_full_float32_and_starts_without_an_exhaustive_search():
    options = infer_onnx.provider_options("cuda", {**INFO, "precision": "float32"})
    assert options == {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "prefer_nhwc": "0"}
    assert infer_onnx.provider_options("cuda", INFO)["prefer_nhwc"] == "1"
    assert infer_onnx.provider_options("cpu", INFO) == {}


# ------------------------------------------------------------------------------------------------ the whole


def test_it_runs_where_torch_cannot_be_imported(maps, model, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    argv = [maps, "--model", model, "--out", tmp_path / "out", "--variants", "1", "--threads", "1"]
    done = script(*argv, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0
    assert len(list((tmp_path / "out/images").iterdir())) == 5


def test_maps_stands_for_the_phantom_s_where_there_is_no_such_folder(maps, model, tmp_path):
    fresh = tmp_path / "clone/data/phantom"
    fresh.mkdir(parents=True)
    maps.rename(fresh / "maps")
    done = script("maps/", "--model", model, "--threads", "1", cwd=tmp_path / "clone")
    assert done.returncode == 0
    assert "maps is not there: taking data/phantom/maps\n" in done.stderr
    assert len(list((tmp_path / "clone/synthetic/images").iterdir())) == 5


def test_reading_and_writing_go_on_while_the_model_runs():
    """Reading, synthesis and writing, each as long, take a third of their sum: two thirds if one did not go on."""
    job, spent = infer_onnx.Job("P00_S000", Path("P00_S000.png"), (64, 64), 0), []

    def work():
        begin = time.perf_counter()
        time.sleep(0.02)  # longer on a busy machine
        spent.append(time.perf_counter() - begin)

    def load(job):
        work()
        return infer_onnx.Slice(job, draw_map(), None)

    def generator(maps):
        work()
        return maps

    def write(made):
        work()
        return 1

    begin = time.perf_counter()
    assert infer_onnx.run([[job]] * 20, generator, load, write) == (20, 0, [])
    assert len(spent) == 60 and time.perf_counter() - begin < 0.55 * sum(spent)


def test_readers_are_never_far_ahead_of_the_model():
    from concurrent.futures import ThreadPoolExecutor

    begun = []
    with ThreadPoolExecutor(1) as pool:
        results = infer_onnx.ahead(pool, begun.append, range(100), 4)
        next(results)
        until = time.monotonic() + 10
        while len(begun) < 5 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(begun) == 5
        assert len(list(results)) == 99
    assert begun == sorted(begun)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_out_that_cannot_be_is_found_out_before_the_model_is_loaded(maps, tmp_path, out):
    (tmp_path / "file").write_text("a file where the folder should be")
    done = script(maps, "--model", tmp_path / "missing.onnx", "--out", tmp_path / out)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / out}: cannot be written to: give another --out\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(infer, maps, model, tmp_path):
    import resource

    def limit():  # of a file's size: like a full disk, it fails in the middle of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

    argv = [maps, "--model", model, "--out", tmp_path / "out", "--provider", "cpu", "--threads", "1"]
    done = script(*argv, preexec_fn=limit)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "out").rglob(".*"))
    assert infer(maps)[0] == 0
    assert files(tmp_path / "out") == files(infer(maps, out="whole")[1])


def test_memory_that_does_not_suffice_is_one_line_with_the_mend(model):
    """In a process of its own, which may grow by 100 MB, with a map that wants more."""
    code = f"""if True:
        import resource, numpy as np, infer_onnx
        from pathlib import Path
        generator = infer_onnx.Generator(*infer_onnx.open_session(Path({str(model)!r}), "cpu", threads=1))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for more in (10, 100):
            resource.setrlimit(resource.RLIMIT_AS, (now + more * 2**20, resource.RLIM_INFINITY))
            try:
                generator(np.ones((1, 4096, 2048), np.uint8))
            except infer_onnx.Mistake as mistake:
                print(mistake)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.endswith("is there memory for (1, 4096, 2048)? try a smaller --batch or smaller maps")


def test_a_map_that_memory_does_not_hold_is_one_line(infer, maps, monkeypatch):
    def starved(path):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(infer_onnx, "read_map", starved)
    status, _, told = infer(maps)
    assert status == 2
    assert "error: not enough memory (Unable to allocate 9 TiB): try a smaller --batch or smaller maps" in told


def test_a_terminal_that_is_not_utf_8_and_names_that_are_change_nothing(infer, maps, model, tmp_path):
    (maps / "P00_S000.png").rename(maps / "P00_S\u00e4.png")
    whole = files(infer(maps, "--variants", 1, out="whole")[1])
    model.rename(tmp_path / "mod\u00e8le.onnx")
    for k, told in enumerate(({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})):
        env = {**os.environ, "PYTHONUTF8": "0", **told}
        out = tmp_path / f"d\u00e9j\u00e0{k}"
        argv = ["--model", tmp_path / "mod\u00e8le.onnx", "--out", out, "--variants", 1]
        done = script(maps, *argv, "--provider", "cpu", "--threads", "1", env=env)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).isascii()
        assert files(out) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file's name is text")
def test_a_model_whose_name_is_no_utf_8_is_opened(infer, maps, model, tmp_path):
    whole = files(infer(maps)[1])
    odd, out = model.rename(tmp_path / os.fsdecode(b"mod\xe8le.onnx")), tmp_path / "again"
    done = script(maps, "--model", odd, "--out", out, "--provider", "cpu", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert files(out) == whole


@pytest.mark.parametrize("name", ["infer_onnx.py", "eval.py", "export.py", "bench.py"])
def test_onnx_runtime_keeps_no_records_in_the_users_home(maps, model, tmp_path, name):
    """From 1.29 on it would, as soon as it is imported, and send them, but on build machines, by their variables."""
    home = tmp_path / "home"
    home.mkdir()
    argv = [maps, "--model", model, "--out", tmp_path / "out"] if name == "infer_onnx.py" else ["-h"]
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run([sys.executable, HERE / name, *map(str, argv)], env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*"))


def test_all_import_onnx_runtime_from_where_its_records_are_turned_off():
    scripts = [path for folder in (".", "data", "paper") for path in (HERE / folder).glob("*.py")]
    found = [path.name for path in scripts if re.search(r"^\s*(import|from) onnxruntime\b", path.read_text(), re.M)]
    assert len(scripts) > 20 and found == ["runtime.py"]


@pytest.mark.parametrize("home", [None, "/dev/null/nobody"])
def test_auto_needs_no_home(maps, model, tmp_path, home):
    env = {key: value for key, value in os.environ.items() if key != "HOME"} | ({"HOME": home} if home else {})
    code = "import os, pwd, sys; pwd.getpwuid = {}.__getitem__; import runpy; sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, '.'); runpy.run_path('infer_onnx.py', run_name='__main__')"
    argv = ["infer_onnx.py", maps, "--model", model, "--out", tmp_path / "out", "--threads", "1"]
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out/images").iterdir())) == 5


def test_a_compiling_provider_goes_without_a_cache_where_none_can_be_made(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert infer_onnx.provider_options("tensorrt", INFO)["trt_engine_cache_path"].startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())  # options alone make no folder
    (tmp_path / ".cache").write_text("a file")
    assert infer_onnx.provider_options("tensorrt", INFO) == {"trt_fp16_enable": "1"}
    assert "CACHE_DIR" not in infer_onnx.provider_options("openvino", INFO)["load_config"]


def test_png_of_the_fast_level_is_the_format_s(tmp_path):
    hu = draw_slice()
    (tmp_path / "fast.png").write_bytes(infer_onnx.encode(hu, "png16", {}))
    assert np.array_equal(read_image(tmp_path / "fast.png"), hu)
    assert Image.open(io.BytesIO((tmp_path / "fast.png").read_bytes())).mode == "I;16"
