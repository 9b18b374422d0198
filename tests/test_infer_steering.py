"""What infer_onnx.py tells a model besides the map, read back from a stand-in that paints what it is told."""

import json

import numpy as np
import onnx
import pytest
from conftest import draw_map, files
from onnx import TensorProto, helper, numpy_helper
from scipy import ndimage
from test_infer import METADATA, draw_slice, maps  # noqa: F401
from test_infer_volumes import display, draw_ct, save

import infer_onnx
from data.slices import read_image, read_map, write_image, write_map

DRAWN = [[-900.0, 40.0], [-850.0, 60.0], [-750.0, 90.0], [-700.0, 110.0]]
KINDS = {"density": TensorProto.FLOAT, "detail": TensorProto.FLOAT, "seed": TensorProto.INT64}
DEFAULTS = {"density": -800, "detail": 75, "seed": 0}


def build_steered(path, inputs=("density", "detail", "seed"), metadata=METADATA):
    """A stand-in that paints lung in the density, ground glass in the detail, consolidation in seed mod 1000, in HU."""
    value, outputs = helper.make_tensor_value_info, ["map"]
    held = {"column": np.array([-1, 1, 1]), "thousand": np.int64(1000), "floor": np.float32(-1350)}
    nodes = [helper.make_node("Cast", ["map"], ["labels"], to=TensorProto.FLOAT)]
    painted = "floor"
    for label, name in enumerate(KINDS, start=1):
        held |= {f"label{label}": np.float32(label), f"default_{name}": np.float32([DEFAULTS[name]])}
        number = f"default_{name}"
        if name == "seed" and name in inputs:
            nodes += [helper.make_node("Mod", ["seed", "thousand"], ["rest"])]
            nodes += [helper.make_node("Cast", ["rest"], ["paint"], to=TensorProto.FLOAT)]
            number = "paint"
        elif name in inputs:
            nodes += [helper.make_node("IsNaN", [name], [f"no_{name}"])]
            nodes += [helper.make_node("Where", [f"no_{name}", number, name], [f"told_{name}"])]
            number = f"told_{name}"
        nodes += [helper.make_node("Reshape", [number, "column"], [f"column_{name}"])]
        nodes += [helper.make_node("Equal", ["labels", f"label{label}"], [f"is{label}"])]
        nodes += [helper.make_node("Where", [f"is{label}", f"column_{name}", painted], [f"painted{label}"])]
        painted = f"painted{label}"
    nodes += [helper.make_node("Cast", [painted], ["ct"], to=TensorProto.INT16)]
    nodes += [helper.make_node("ReduceMean", ["labels"], ["alpha"], axes=[1, 2], keepdims=0)]
    given = [value("map", TensorProto.UINT8, "NHW"), *(value(name, KINDS[name], [None]) for name in inputs)]
    outputs = [value("ct", TensorProto.INT16, "NHW"), value("alpha", TensorProto.FLOAT, "N")]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "steered", given, outputs, held),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    steering = {name: {"default": DEFAULTS[name]} for name in inputs}
    more = {"contract": "2", "steering": json.dumps(steering), "drawn": json.dumps(DRAWN)}
    helper.set_model_props(model, metadata | more)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path):
    return build_steered(tmp_path / "generator.onnx")


def told(path):
    """Density, detail and seed mod 1000 that a slice of draw_map or of a variant of it was made with."""
    hu, labels = read_image(path), read_map(path.parents[1] / "maps" / path.name)
    return [int(hu[labels == label][0]) if (labels == label).any() else None for label in (1, 2, 3)]


@pytest.fixture
def one(tmp_path):
    """One map of 64 x 64 pixels."""
    (tmp_path / "one").mkdir()
    write_map(tmp_path / "one/P01_S001.png", draw_map())
    return tmp_path / "one"


def truth(hu, labels):
    """Density and detail by scipy, windowed to -1350..150 HU."""
    hu, healthy = np.clip(hu, -1350, 150).astype(float), labels == 1
    inner = ndimage.binary_erosion(healthy, np.ones((3, 3)))
    return hu[healthy].mean(), (hu - ndimage.uniform_filter(hu, 3))[inner].std()


def test_density_and_detail_of_a_slice_are_those_of_scipy_and_of_training():
    torch = pytest.importorskip("torch")
    import covidgan

    c, rng = covidgan.Config(), np.random.default_rng(0)
    for k in range(4):
        labels = np.roll(draw_map(), 20 * k, 1)  # from the second on lungs touch the border, where scipy reflects
        hu = rng.normal(-800, 30 + 20 * k, labels.shape).round().astype(np.int16)
        hu[:, :8] = 400  # above the window
        found = infer_onnx.steering_of(hu, labels, c.level, c.width)
        if not k:
            np.testing.assert_allclose(found, truth(hu, labels), atol=0.5)  # a mean of fine texture is not quite 0
        image = covidgan.window(torch.from_numpy(hu)[None, None], c)
        theirs = covidgan.steering(image, torch.from_numpy(labels)[None, None], c)
        np.testing.assert_allclose(found, theirs[0].numpy(), rtol=1e-4)


def test_a_slice_without_healthy_lung_has_no_numbers_and_one_of_single_pixels_no_detail():
    hu, labels = np.full((16, 16), -700, np.int16), np.zeros((16, 16), np.uint8)
    assert np.isnan(infer_onnx.steering_of(hu, labels, -600, 1500)).all()
    labels[4:6] = 1
    assert infer_onnx.steering_of(hu, labels, -600, 1500)[0] == -700
    assert np.isnan(infer_onnx.steering_of(hu, labels, -600, 1500)[1])


def test_without_options_a_slice_has_the_model_s_defaults_and_with_them_the_user_s_numbers(infer, one):
    *numbers, seed = told(infer(one)[1] / "images/P01_S001.png")
    assert numbers == [-800, 75] and seed  # of its own: else all slices of a patient have the same vessels
    assert told(infer(one, "--density", -880, out="a")[1] / "images/P01_S001.png") == [-880, 75, seed]
    assert told(infer(one, "--density", -880, "--detail", 50, out="b")[1] / "images/P01_S001.png") == [-880, 50, seed]
    assert told(infer(one, "--seed", 1, out="c")[1] / "images/P01_S001.png") != [-800, 75, seed]


@pytest.fixture
def real(tmp_path, one):
    """The map's real slice, of -900 HU with a detail of about 30."""
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).normal(0, 30, (64, 64))
    hu = draw_slice(draw_map()) + np.where(draw_map() == 1, noise - 50, 0)
    write_image(tmp_path / "images/P01_S001.png", hu)
    return tmp_path / "images"


def test_a_completed_lung_has_the_numbers_of_its_real_slice_unless_given(infer, one, real):
    hu = read_image(real / "P01_S001.png")
    expected = truth(hu, draw_map())
    _, out, _ = infer(one, "--complement", real)
    np.testing.assert_allclose(told(out / "images/P01_S001.png")[:2], expected, atol=1.5)
    assert expected[0] < -890 and 20 < expected[1] < 40
    _, out, _ = infer(one, "--complement", real, "--detail", 99, out="given")
    density, detail, _ = told(out / "images/P01_S001.png")
    assert detail == 99 and abs(density - expected[0]) < 1.5


def test_a_completed_variant_has_the_numbers_of_its_augmented_real_slice(infer, one, real):
    _, out, _ = infer(one, "--complement", real, "--variants", 3)
    jobs = infer_onnx.plan({"P01_S001": one / "P01_S001.png"}, 3)
    found = []
    for job in jobs:
        case = infer_onnx.load(job, 4, {"P01_S001": real / "P01_S001.png"}, seed=0)
        hu = read_image(out / f"images/{job.name}.png")
        found.append([hu[case.labels == 1][0], hu[case.labels == 2][0]])
        np.testing.assert_allclose(found[-1], truth(case.real, case.labels), atol=1.5)
    assert len({detail for _, detail in found}) > 1  # resampling blurs each otherwise


def test_draws_have_seeds_of_their_own_and_numbers_of_training_slices_and_resume(infer, one):
    _, out, _ = infer(one, "--draws", 12)
    names = [f"P01_S001d{k:02d}.png" for k in range(1, 13)]
    assert sorted(path.name for path in (out / "images").iterdir()) == names
    every = [told(out / "images" / name) for name in names]
    assert len({seed for *_, seed in every}) > 9
    assert {(density, detail) for density, detail, _ in every} <= {(int(a), int(b)) for a, b in DRAWN}
    assert len({density for density, *_ in every}) > 1
    before = files(out)
    (out / "images" / names[3]).unlink()
    assert infer(one, "--draws", 12)[0] == 0 and files(out) == before
    _, fewer, _ = infer(one, "--draws", 2, "--density", -888, "--batch", 2, out="fewer")
    for name, expected in zip(names[:2], every, strict=False):
        assert told(fewer / "images" / name) == [-888, *expected[1:]]  # a number given changes no other


def test_draws_hang_on_name_and_seed_and_neither_on_shard_nor_batch(infer, maps, tmp_path):  # noqa: F811
    whole = files(infer(maps, "--draws", 2, "--variants", 2, out="whole")[1])
    assert len(whole) == 2 * 5 * 4 + 1  # of each a map and an image, and run.json
    for i in (1, 2, 3):
        infer(maps, "--draws", 2, "--variants", 2, "--shard", f"{i}/3", "--batch", 3, out="together")
    assert files(tmp_path / "together") == whole
    other = files(infer(maps, "--draws", 2, "--variants", 2, "--seed", 1, out="other")[1])
    assert other["images/P00_S000v01d01.png"] != whole["images/P00_S000v01d01.png"]
    assert whole["maps/P00_S000v01d01.png"] == whole["maps/P00_S000v01d02.png"]  # one variant, two slices


@pytest.mark.parametrize(
    ("inputs", "options", "refused"),
    [
        ((), ["--density", -800], "--density"),
        (("seed",), ["--density", -800, "--detail", 50, "--draws", 2], "--density --detail"),
        ((), ["--draws", 2], "--draws"),
        (("density", "detail"), ["--draws", 2, "--complement", "IMAGES"], "--draws"),  # all would be alike
        (("density", "detail"), ["--draws", 2], ""),
        (("seed",), ["--draws", 2], ""),
    ],
)
def test_what_the_model_has_no_input_for_is_one_line(infer, one, real, tmp_path, inputs, options, refused):
    model = build_steered(tmp_path / "other.onnx", inputs)
    status, out, said = infer(one, *[real if option == "IMAGES" else option for option in options], model=model)
    if refused:
        assert status == 2 and said.startswith(f"error: {refused}: {model} has no input")
        assert not out.exists()
    else:
        slices = {read_image(path).tobytes() for path in (out / "images").iterdir()}
        assert status == 0 and len(slices) == 2


def test_each_slice_of_a_volume_has_a_seed_of_its_own_and_the_numbers_of_its_ct(infer, tmp_path):
    labels = np.stack([draw_map()] * 4)
    labels[2] = 0
    hu = draw_ct(labels)
    hu[3][labels[3] == 1] -= 40
    save(tmp_path / "labels/a.nii.gz", labels)
    save(tmp_path / "ct/a.nii.gz", hu)
    _, out, _ = infer(tmp_path / "labels", "--complement", tmp_path / "ct", "--unchecked", "--batch", 2)
    made = display(out / "volumes/a.nii.gz")
    for z in (0, 1, 3):
        density, detail = truth(hu[z], labels[z])
        assert abs(made[z][labels[z] == 1][0] - density) < 1.5 and abs(made[z][labels[z] == 2][0] - detail) < 1.5
    assert len({int(made[z][labels[z] == 3][0]) for z in (0, 1, 3)}) == 3
    assert (made[2] == hu[2]).all()


def test_draws_of_a_volume_are_volumes_of_one_patient_each(infer, tmp_path):
    labels = np.stack([draw_map()] * 3)
    save(tmp_path / "labels/a.nii.gz", labels)
    _, out, _ = infer(tmp_path / "labels", "--draws", 5)
    volumes = [display(path) for path in sorted((out / "volumes").glob("ad0?.nii.gz"))]
    densities = [np.unique(volume[labels == 1]) for volume in volumes]
    assert len(volumes) == 5 and all(len(one) == 1 for one in densities) and len({int(one[0]) for one in densities}) > 1
    assert len({int(slice_[20:][labels[0][20:] == 3][0]) for volume in volumes for slice_ in volume}) > 10
