"""`eval.py` on generators whose answers are known, and on neighbouring slices, against loops and closed forms."""

import json

import numpy as np
import onnx
import pytest
import scipy.signal
from onnx import TensorProto, helper, numpy_helper

import eval as evaluation
from data.slices import LABELS, Mistake, write_image, write_map

SIZE = 64
HU_OF_LABEL = np.array([-1350, -850, -550, 20])
Y, X = np.mgrid[:SIZE, :SIZE]
CHECKS = (-1.0) ** (X + Y)
NUMBERS = {
    "density": {"default": -800, "low": -890, "high": -710},
    "detail": {"default": 64, "low": 40, "high": 96},
    "seed": {"default": 0},
}


def lungs(right=14, lesion=0):
    """Labels of a lung of 20 x 40 pixels and of one `right` pixels wide, with `lesion` rows of ground glass in both."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[10:50, 6:26] = labels[10:50, 36 : 36 + right] = 1
    labels[10 : 10 + lesion][labels[10 : 10 + lesion] > 0] = 2
    return labels


def save_generator(path, mean=0.0, slope=0.0, obeys=1.0, seeds=0.0, inputs=(), **metadata):
    """A generator that is nothing but this arithmetic, in HU: the label's HU, less `mean` of the picture's mean, plus
    `slope` a column; in the lung `obeys` of a density told, less -850, checks of a detail told, and `seeds` a seed."""
    nodes, constants = [], {"hu": HU_OF_LABEL.astype(np.float32), "one": np.uint8(1)}

    def add(operator, *names, **attributes):
        nodes.append(helper.make_node(operator, [*names], [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def constant(name, array):
        constants[name] = np.asarray(array, np.float32)
        return name

    def spread(name, factor):  # an input [N] over the picture, times a factor [H, W]
        constants["axes"] = np.array([1, 2])
        told = add("Unsqueeze", add("Cast", name, to=TensorProto.FLOAT), "axes")
        return add("Mul", add("Mul", told, constant(f"of {name}", factor)), healthy)

    healthy = add("Cast", add("Equal", "map", "one"), to=TensorProto.FLOAT)
    ct = add("Gather", "hu", add("Cast", "map", to=TensorProto.INT64))
    share = add("Mul", add("ReduceMean", ct, axes=[1, 2]), constant("mean", mean))
    ct = add("Add", add("Sub", ct, share), constant("slope", slope * X))
    if "density" in inputs:
        ct = add("Add", ct, spread("density", np.full((SIZE, SIZE), obeys)))
        ct = add("Add", ct, add("Mul", healthy, constant("already", 850 * obeys)))
    if "detail" in inputs:  # checks of 1 deviate from their 3 x 3 mean, of 5 and 4, by 8/9
        ct = add("Add", ct, spread("detail", CHECKS * 9 / 8))
    if "seed" in inputs:
        ct = add("Add", ct, spread("seed", np.full((SIZE, SIZE), seeds)))
    nodes.append(helper.make_node("Cast", [add("Round", ct)], ["ct"], to=TensorProto.INT16))
    nodes.append(helper.make_node("ReduceMean", [healthy], ["alpha"], axes=[1, 2], keepdims=0))
    kinds = {"density": TensorProto.FLOAT, "detail": TensorProto.FLOAT, "seed": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "known",
        [helper.make_tensor_value_info("map", TensorProto.UINT8, ["N", "H", "W"])]
        + [helper.make_tensor_value_info(name, kinds[name], ["N"]) for name in inputs],
        [
            helper.make_tensor_value_info("ct", TensorProto.INT16, ["N", "H", "W"]),
            helper.make_tensor_value_info("alpha", TensorProto.FLOAT, ["N"]),
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    told = {"labels": [*LABELS], "level": -600, "width": 1500, "size": SIZE, "multiple": 16}
    told |= {"steering": {name: NUMBERS[name] for name in inputs}, **metadata}
    about = {"kind": "generator", "contract": "1", "precision": "float32", "checkpoint_sha256": "0"}
    helper.set_model_props(model, about | {name: json.dumps(value) for name, value in told.items()})
    onnx.save(model, path)
    return path


def write_maps(folder, *maps):
    folder.mkdir(parents=True)
    for k, labels in enumerate(maps):
        write_map(folder / f"P01_S{k:03d}.png", labels)
    return folder


def evaluate(folder, *arguments):
    """Run the command line; returns the JSON."""
    fixed = ["--json", str(folder / "results.json"), "--out", str(folder / "out"), "--provider", "cpu"]
    evaluation.main([*map(str, arguments), *fixed])
    return json.loads((folder / "results.json").read_text())


def steering(folder, *maps, **generator):
    model = save_generator(folder / "generator.onnx", **generator)
    return evaluate(folder, write_maps(folder / "maps", *maps or [lungs()]), model)["steering"]


# ------------------------------------------------------------------------------------------------ steering


def test_a_generator_of_single_pixels_leaves_the_other_lung_and_moves_with_its_map(tmp_path):
    rows = steering(tmp_path, lungs(), lungs(20))
    assert set(rows) == {"other lung, mean", "other lung, RMS", "moved, RMS"}  # it has no numbers and no seed
    assert all(row == {"median": 0, "mean": 0, "N": 2} for row in rows.values())


def test_what_the_mean_of_the_picture_carries_over_is_the_other_lungs_change(tmp_path):
    row = steering(tmp_path, lungs(), mean=40.0)
    painted = round(0.08 * (20 + 14) * 40)  # pixels, each 300 HU denser
    assert row["other lung, mean"]["median"] == pytest.approx(40 * 300 * painted / SIZE**2, abs=1)  # of rounding to HU
    assert row["other lung, RMS"]["median"] == pytest.approx(row["other lung, mean"]["median"], abs=1)
    assert row["moved, RMS"]["median"] == 0


def test_figures_are_the_median_and_the_mean_of_sizes_over_maps(tmp_path):
    maps = [lungs(10), lungs(11), lungs(20)]
    row = steering(tmp_path, *maps, mean=40.0)["other lung, mean"]
    changes = [40 * 300 * round(0.08 * (labels > 0).sum()) / SIZE**2 for labels in maps]
    assert (row["median"], row["mean"]) == pytest.approx((np.median(changes), np.mean(changes)), abs=1)


def test_texture_that_sticks_to_the_grid_is_told_by_moving_the_map(tmp_path):
    rows = steering(tmp_path, slope=7.0)  # HU a column
    assert rows["moved, RMS"]["median"] == 7
    assert rows["other lung, RMS"]["median"] == 0


def test_a_map_at_the_pictures_edge_moves_as_any_other(tmp_path):
    assert steering(tmp_path, np.roll(lungs(20), 8, 1))["moved, RMS"]["median"] == 0


def test_numbers_that_are_obeyed_are_got_and_no_number_moves_another(tmp_path):
    rows = steering(tmp_path, inputs=("density", "detail"))
    for name in ("density", "detail"):
        for level in ("low", "default", "high"):
            row = rows[f"{name} {level}"]
            assert (row["told"], row["got"]) == (NUMBERS[name][level], pytest.approx(NUMBERS[name][level], abs=0.6))
            assert row["mean"] == pytest.approx(0, abs=0.6)
    assert "draws, RMS" not in rows


def test_a_density_that_is_half_obeyed_is_half_missed(tmp_path):
    rows = steering(tmp_path, lungs(), lungs(20), obeys=0.5, inputs=("density",))
    for level, told in NUMBERS["density"].items():
        row = rows[f"density {level}"]
        assert (row["mean"], row["got"]) == pytest.approx((abs(told + 850) / 2, -850 + (told + 850) / 2), abs=0.6)
    assert "detail low" not in rows


def test_draws_differ_by_their_seeds_and_the_real_neighbours_stand_beside_them(tmp_path, rng):
    model = save_generator(tmp_path / "generator.onnx", seeds=30.0, inputs=("seed",))
    write_maps(tmp_path / "set/maps", *[lungs()] * 5)
    (tmp_path / "set/images").mkdir()
    real = [(-850 + 10 * k) * np.ones((SIZE, SIZE)) for k in range(5)]
    for k in (0, 1, 3, 4):
        write_image(tmp_path / f"set/images/P01_S{k:03d}.png", real[k])
    results = evaluate(tmp_path, tmp_path / "set", model)
    assert results["steering"]["draws, RMS"]["median"] == 30
    row = results["neighbours"]["real change"]
    assert (row["mean"], row["n"]) == (10, 2)  # 0 and 1, 3 and 4
    assert not (tmp_path / "out").exists()


def test_the_disc_lies_in_the_middle_of_the_larger_lung_and_has_8_percent_of_both():
    labels = lungs(14)
    painted, other = evaluation.paint(labels, 4)
    y, x = np.nonzero(painted != labels)
    assert (painted[y, x] == 2).all()
    assert len(y) == round(0.08 * (800 + 560))
    assert (y.mean(), x.mean()) == pytest.approx((29.5, 15.5), abs=0.3)
    assert np.hypot(y - 29.5, x - 15.5).max() < 1.1 * np.sqrt(len(y) / np.pi)
    assert (other == ((labels > 0) & (X > 30))).all()


def test_only_healthy_lung_is_painted():
    labels = lungs(14, lesion=25)
    painted, _ = evaluation.paint(labels, 4)
    assert (labels[painted != labels] == 1).all()
    assert (painted != labels).sum() == round(0.08 * (800 + 560))


@pytest.mark.parametrize(
    "labels, n_labels",
    [
        (np.zeros((SIZE, SIZE), np.uint8), 4),
        (lungs(0), 4),
        (lungs(9), 4),  # not half of the other
        (lungs(14, lesion=36), 4),  # hardly healthy lung
        (lungs(14), 2),  # the generator knows no ground glass
        (np.maximum(lungs(14), 3 * (Y < 12) * (lungs(14) > 0)).astype(np.uint8), 3),  # nor consolidation
    ],
)
def test_maps_without_two_lungs_to_paint_in_are_left_out(labels, n_labels):
    assert evaluation.paint(labels, n_labels) is None


def test_24_maps_are_spread_over_the_names_that_have_two_lungs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "steer", lambda *given: seen.append(given[2]) or {"row": (None, 0.0)})
    maps = [lungs(0) if k % 3 == 2 else lungs(10 + k // 10) for k in range(90)]
    assert steering(tmp_path, *maps)["row"]["N"] == len(seen) == 24
    widths = [int(labels[20, 30:].sum()) for labels in seen]
    assert widths == sorted(widths) and np.bincount(widths)[10:].tolist() == pytest.approx([24 / 9] * 9, abs=1)


def test_mistakes_about_a_generator_are_told(tmp_path):
    model = save_generator(tmp_path / "generator.onnx")
    with pytest.raises(Mistake, match="two lungs"):
        evaluate(tmp_path, write_maps(tmp_path / "one", lungs(0)), model)
    maps = write_maps(tmp_path / "two", lungs())
    with pytest.raises(Mistake, match=r"generator\.onnx.*steered alone"):
        evaluate(tmp_path, maps, model, "--unpaired")
    with pytest.raises(Mistake, match=r"none\.onnx"):
        evaluate(tmp_path, maps, tmp_path / "none.onnx")


# ------------------------------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize(
    "name, other, follow",
    [
        ("P01_S007", "P01_S008", True),
        ("P01_S099", "P01_S100", True),
        ("case_a_9", "case_a_10", True),
        ("P01_S007", "P01_S009", False),
        ("P01_S007", "P02_S008", False),
        ("P01_S008", "P01_S007", False),
        ("P01_S007v01", "P01_S007v02", False),  # variants, and draws, of one map
        ("P01_S007", "P01_T008", False),
        ("P01_lung", "P01_S001", False),
        ("7", "8", False),
    ],
)
def test_a_slice_follows_another_by_patient_and_number(name, other, follow):
    assert evaluation.follows(name, other) == follow


def neighbours(folder, real, fake, maps, names):
    for part in ("real/images", "real/maps", "fake"):
        (folder / part).mkdir(parents=True)
    for name, one, other, labels in zip(names, real, fake, maps, strict=True):
        write_image(folder / "real/images" / f"{name}.png", one)
        write_image(folder / "fake" / f"{name}.png", other)
        write_map(folder / "real/maps" / f"{name}.png", labels)
    return evaluate(folder, folder / "real", folder / "fake", "--unchecked").get("neighbours")


def test_change_and_detail_of_neighbours_are_those_of_a_loop_over_their_pixels(tmp_path, rng):
    names = ["P01_S001", "P01_S002", "P01_S004", "P01_S005", "P02_S006", "P02_S007"]
    maps = [lungs(k + 12, lesion=3 * k) for k in range(6)]
    shared = rng.normal(0, 60, (SIZE, SIZE))
    real, fake = ([np.round(-850 + shared * part + rng.normal(0, 60, X.shape)) for _ in names] for part in (0.5, 2))
    real[0][20, 10] = fake[0][20, 10] = 900  # through the window 150
    rows = neighbours(tmp_path, real, fake, maps, names)
    for side, hu in (("real", real), ("fake", fake)):
        changes, details = [], []
        for k in (0, 2, 4):
            one, other = (hu[j].clip(-1024, 150) for j in (k, k + 1))  # what a PNG holds, and the window shows
            both = (maps[k] == 1) & (maps[k + 1] == 1)
            changes.append(np.sqrt(((one - other)[both] ** 2).mean()))
            deep = scipy.signal.convolve2d(both, np.ones((3, 3)), "same") == 9
            fine = [of - scipy.signal.convolve2d(of, np.ones((3, 3)) / 9, "same") for of in (one, other)]
            details.append(np.corrcoef(*(of[deep] for of in fine))[0, 1])
        for figure, values in (("change", changes), ("detail", details)):
            row = rows[f"{side} {figure}"]
            assert (row["mean"], row["n"], row["patients_n"]) == (pytest.approx(np.mean(values), rel=1e-9), 3, 2)


def test_a_flat_painting_has_a_change_and_no_correlation(tmp_path, rng):
    grain = rng.normal(-850, 40, (2, SIZE, SIZE))
    flat = np.stack([np.full((SIZE, SIZE), hu) for hu in (-849, -836)])
    rows = neighbours(tmp_path, grain, flat, [lungs()] * 2, ["P01_S001", "P01_S002"])
    assert (rows["fake change"]["mean"], rows["fake detail"]["mean"]) == (13, None)


def test_single_slices_have_no_neighbours(tmp_path, rng):
    grain = rng.normal(-850, 40, (3, SIZE, SIZE))
    assert neighbours(tmp_path, grain, grain, [lungs()] * 3, ["P01_S001", "P02_S002", "P03_S003"]) is None


def test_neighbours_of_other_sizes_or_without_common_lung_are_not_measured(tmp_path, rng):
    halves = [np.where(Y < 30, lungs(), 0), np.where(Y >= 30, lungs(), 0), lungs()[:48]]
    real = [rng.normal(-850, 40, labels.shape) for labels in halves]
    rows = neighbours(tmp_path, real, real, halves, ["P01_S001", "P01_S002", "P01_S003"])
    assert all((row["mean"], row["n"]) == (None, 0) for row in rows.values())
