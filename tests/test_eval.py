"""`eval.py` against scikit-image, scipy, closed forms and figures worked out by hand."""

import json
import os
import subprocess
import sys
from itertools import product

import imageio.v3 as iio
import numpy as np
import onnx
import pytest
import scipy.linalg
from conftest import ROOT
from onnx import TensorProto, helper
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

import eval as evaluation
from data.slices import Mistake, read_image, read_map, write_image, write_map

HEIGHT, WIDTH = 48, 64
HU_OF_LABEL = np.array([-1000, -850, -550, 20])


def lungs(height=HEIGHT, width=WIDTH, shift=0):
    """A label map uint8 of two lungs; ground glass in the left one, consolidation in the right."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    labels = np.zeros((height, width), np.uint8)
    for x0, lesion in ((0.3, 2), (0.7, 3)):
        labels[((x - x0) / 0.15) ** 2 + ((y - 0.5 - 0.01 * shift) / 0.35) ** 2 < 1] = 1
        labels[((x - x0) / 0.06) ** 2 + ((y - 0.5) / 0.1) ** 2 < 1] = lesion
    return labels


def slice_of(labels, rng, noise=20):
    return (HU_OF_LABEL[labels] + rng.normal(0, noise, labels.shape)).clip(-1024, 3071).astype(np.int16)


@pytest.fixture
def sets(tmp_path, rng):
    """Folders of 9 slices of 3 patients: real (a dataset with maps), fake (lung alone), train (a dataset with maps)."""
    for folder in ("real/images", "real/maps", "fake", "train/images", "train/maps"):
        (tmp_path / folder).mkdir(parents=True)
    for k in range(9):
        name, labels = f"P{k // 3:02d}_S{k:03d}.png", lungs(shift=k)
        real = slice_of(labels, rng)
        write_map(tmp_path / "real/maps" / name, labels)
        write_image(tmp_path / "real/images" / name, real)
        write_image(tmp_path / "fake" / name, np.where(labels > 0, real + rng.normal(0, 5 + 10 * k, real.shape), -1024))
        labels = lungs(shift=-3 * k)
        write_map(tmp_path / "train/maps" / f"P90_S{k:03d}.png", labels)
        write_image(tmp_path / "train/images" / f"P90_S{k:03d}.png", slice_of(labels, rng))
    return tmp_path


def save_model(path, nodes, inputs, outputs, **metadata):
    graph = helper.make_graph(
        nodes,
        "mock",
        [helper.make_tensor_value_info(name, kind, ["N", "H", "W"]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def save_features(path, grids):
    """A feature network: dimension -> height and width of the parts whose mean grey levels are its features."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Unsqueeze", ["float", "one"], ["channel"]),
    ]
    for d, part in grids.items():
        nodes.append(helper.make_node("AveragePool", ["channel"], [f"means{d}"], kernel_shape=part, strides=part))
        nodes.append(helper.make_node("Flatten", [f"means{d}"], [d]))
    outputs = {d: (TensorProto.FLOAT, ["N", None]) for d in grids}
    return save_model(path, nodes, {"image": TensorProto.UINT8}, outputs, kind="features", name="grid means")


@pytest.fixture
def features(tmp_path):
    return save_features(tmp_path / "features.onnx", {"2": (48, 32), "16": (12, 16)})


def save_unet(path, labels=("background", "lung", "ground-glass opacity", "consolidation")):
    """A segmentation by thresholds half-way between HU_OF_LABEL that, like a U-Net, wants multiples of 16."""
    nodes = [
        helper.make_node("Cast", ["ct"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["blocks"], value_ints=[0, -1, 256]),
        helper.make_node("Reshape", ["pixels", "blocks"], ["checked"]),  # fails on other sizes
        helper.make_node("Shape", ["pixels"], ["shape"]),
        helper.make_node("Reshape", ["checked", "shape"], ["float"]),
        helper.make_node("Constant", [], ["count0"], value_float=0.0),
    ]
    for k, threshold in enumerate((-925.0, -700.0, -265.0)[: len(labels) - 1]):
        nodes += [
            helper.make_node("Constant", [], [f"threshold{k}"], value_float=threshold),
            helper.make_node("Greater", ["float", f"threshold{k}"], [f"above{k}"]),
            helper.make_node("Cast", [f"above{k}"], [f"one{k}"], to=TensorProto.FLOAT),
            helper.make_node("Add", [f"count{k}", f"one{k}"], [f"count{k + 1}"]),
        ]
    nodes.append(helper.make_node("Cast", [f"count{len(labels) - 1}"], ["map"], to=TensorProto.UINT8))
    told, outputs = {"kind": "unet", "labels": json.dumps(labels)}, {"map": (TensorProto.UINT8, ["N", "H", "W"])}
    return save_model(path, nodes, {"ct": TensorProto.INT16}, outputs, **told)


@pytest.fixture
def unet(tmp_path):
    return save_unet(tmp_path / "unet.onnx")


def pixel_rows(real, fake, labels):
    """The pixel metrics of one pair, by row."""
    metrics = evaluation.PixelMetrics(evaluation.Window(), ["complete", "lung"])
    fake = np.where(labels > 0, fake, real)
    metrics.update(evaluation.Batch(*(a[None] for a in (real, fake, labels))))
    return {row: values[0][0] for row, values in metrics.found.items()}


def evaluate(sets, *options, fake="fake"):
    """Run the command line on the sets; returns the JSON."""
    path = sets / "results.json"
    fixed = ["--json", str(path), "--out", str(sets / "out"), "--provider", "cpu"]
    evaluation.main([str(sets / "real"), str(sets / fake), *fixed, *map(str, options)])
    return json.loads(path.read_text())


@pytest.mark.parametrize("size", [(128, 144), (61, 75), (13, 26)])
@pytest.mark.parametrize("kind", ["noise", "flat", "nearly equal and bright", "like ct"])
def test_pixel_metrics_agree_with_scikit_image(kind, size, rng):
    labels = lungs(*size)
    if kind == "noise":
        real, fake = rng.integers(-1024, 3071, (2, *size)).astype(np.int16)
    elif kind == "like ct":
        real, fake = slice_of(labels, rng), slice_of(labels, rng)
    else:
        inside, step = (-850, 20) if kind == "flat" else (140, 9)
        real = np.where(labels > 0, inside, 60).astype(np.int16)
        fake = np.where(labels > 0, inside + step, 60).astype(np.int16)
    rows = pixel_rows(real, fake, labels)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for region in ("complete", "lung"):
        a, b = (((np.where(labels > 0, hu, real) + 1350) / 1500).clip(0, 1) for hu in (real, fake))
        if region == "lung":
            a, b = a * (labels > 0), b * (labels > 0)
        assert rows[f"{region} PSNR"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-5)
        assert rows[f"{region} SSIM"] == pytest.approx(structural_similarity(a, b, data_range=1, **window), abs=1e-5)
        assert rows[f"{region} NRMSE"] == pytest.approx(normalized_root_mse(a, b), abs=1e-5)
        assert rows[f"{region} RMSE"] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), abs=1e-7)


@pytest.mark.parametrize("width", [WIDTH, 100, 620])
def test_identical_images_have_100_db_and_an_ssim_of_exactly_1(width, rng):
    labels = lungs(HEIGHT, width)
    real = slice_of(labels, rng)
    rows = pixel_rows(real, real, labels)
    assert rows["complete PSNR"] == rows["lung PSNR"] == 100
    assert rows["complete SSIM"] == rows["lung SSIM"] == 1
    assert rows["complete RMSE"] == rows["lung NRMSE"] == 0


def test_a_synthesis_of_the_lung_alone_measures_as_its_completion(sets):
    (sets / "completed").mkdir()
    for path in (sets / "fake").iterdir():
        real, labels = read_image(sets / "real/images" / path.name), read_map(sets / "real/maps" / path.name)
        write_image(sets / "completed" / path.name, np.where(labels > 0, read_image(path), real))
    alone = evaluate(sets)["pixels"]
    assert alone == evaluate(sets, fake="completed")["pixels"]
    assert alone["lung PSNR"] == alone["complete PSNR"]
    assert alone["lung NRMSE"]["mean"] > alone["complete NRMSE"]["mean"]


def test_batches_and_changes_of_size_between_pairs_change_nothing(sets, rng):
    labels = lungs(40, 90)
    for folder in ("real/images", "fake"):
        write_image(sets / folder / "P01_S004.png", slice_of(labels, rng))
    write_map(sets / "real/maps/P01_S004.png", labels)
    one, four = evaluate(sets)["pixels"], evaluate(sets, "--batch", 4)["pixels"]
    for row, columns in one.items():
        assert four[row] == pytest.approx(columns, rel=1e-6)


def test_the_interval_over_patients_is_that_of_their_means():
    row = evaluation.estimate(np.array([1.0, 3.0, 10.0, np.nan]), ["P01_S000", "P01_S001", "P02_S000", "P03_S000"])
    assert (row["mean"], row["n"]) == (pytest.approx(14 / 3), 3)
    assert (row["patients_mean"], row["patients_n"]) == (6, 2)  # of 2 and 10
    assert (evaluation.interval([4.0]), evaluation.interval([])) == ((4, None, 1), (None, None, 0))
    assert row["patients_interval"] == pytest.approx(12.706205 * np.sqrt(32) / np.sqrt(2))


def fid_of(x, y):
    """Frechet distance as its definition has it, with a root of a product."""
    (mu_x, s_x), (mu_y, s_y) = ((of.mean(0), np.cov(of, rowvar=False)) for of in (x, y))
    return ((mu_x - mu_y) ** 2).sum() + np.trace(s_x + s_y - 2 * scipy.linalg.sqrtm(s_x @ s_y).real)


@pytest.mark.parametrize("n, m, d", [(300, 200, 12), (10, 15, 40)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root_also_of_few_images(n, m, d, rng):
    mix = rng.normal(size=(2, d, d))
    x, y = rng.normal(size=(n, d)) @ mix[0], rng.normal(size=(m, d)) @ mix[1] + 0.3
    assert evaluation.frechet(x, y) == pytest.approx(fid_of(x, y), rel=1e-6)


def reference_kid(x, y):
    """KID of all features at once as torch-fidelity defines it (kernel_poly and mmd2, unbiased), one pair at a time."""
    n, m, d = len(x), len(y), x.shape[1]

    def k(a, b):
        return (float(a @ b) * (1 / d) + 1) ** 3

    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_torch_fidelitys_definition(rng):
    x, y = rng.normal(size=(40, 6)), rng.normal(0.2, 1.1, (30, 6))
    assert evaluation.kid(x, y) == pytest.approx(reference_kid(x, y), rel=1e-10)


def test_kid_of_thousands_of_images_is_that_of_all_their_pairs(rng):
    x, y = rng.normal(size=(2300, 6)), rng.normal(0.2, 1.1, (1200, 6))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in ((f @ f.T / 6 + 1) ** 3 for f in (x, y))]
    assert evaluation.kid(x, y) == pytest.approx(sum(within) - 2 * ((x @ y.T / 6 + 1) ** 3).mean(), rel=1e-8)


def test_figures_that_need_more_slices_are_none_and_say_so(sets, features):
    rows = evaluate(sets, "--features", features)["features"]
    assert rows["complete FID 16"]["value"] is None
    assert "17 images" in rows["complete FID 16"]["note"]
    assert rows["lung KID 16"]["value"] is not None
    assert rows["lung recall 2"]["value"] is not None and rows["lung recall 2"]["floor_value"] is None  # of 4 slices
    assert rows["lung FID 2"]["value"] >= 0
    assert [rows["lung FID 2"][key] for key in ("features", "dimension", "N")] == ["grid means", 2, 9]
    assert rows["lung FID 2"]["floor_N"] == rows["lung KID 2"]["floor_N"] == 4


def test_features_see_the_window_and_the_lung_alone(sets, features):
    rows = evaluate(sets, "--features", features)["features"]
    figures = product(("complete", "lung"), ("FID", "KID", "precision", "recall"), ("2", "16"))
    assert set(rows) == set(map(" ".join, figures))
    seen = {(region, side): [] for region in ("lung", "complete") for side in ("real", "fake")}
    for path in sorted((sets / "fake").iterdir()):
        labels, real = read_map(sets / "real/maps" / path.name), read_image(sets / "real/images" / path.name)
        completed = np.where(labels > 0, read_image(path), real)
        for side, hu in (("real", real), ("fake", completed)):
            grey = np.floor(((hu + 1350) / 1500).clip(0, 1) * 255 + 0.5)
            for region, picture in (("complete", grey), ("lung", grey * (labels > 0))):
                seen[region, side].append([picture[:, :32].mean(), picture[:, 32:].mean()])
    for region in ("lung", "complete"):
        real, fake = (np.array(seen[region, side]) for side in ("real", "fake"))
        assert rows[f"{region} FID 2"]["value"] == pytest.approx(evaluation.frechet(real, fake), rel=1e-2)
        assert rows[f"{region} KID 2"]["value"] == pytest.approx(reference_kid(real, fake), rel=1e-3)


def test_dice_sensitivity_and_specificity_are_those_by_hand():
    truth, predicted = np.zeros((2, 1, 4, 5), bool)
    truth[0, 0, :4], predicted[0, 0, 2:5] = True, True  # 2 in common of 4 and 3, in 20
    figures = evaluation.overlap(predicted, truth)
    assert figures["Dice"] == pytest.approx(4 / 7)
    assert figures["sensitivity"] == pytest.approx(2 / 4)
    assert figures["specificity"] == pytest.approx(15 / 16)
    empty = np.zeros((1, 4, 5), bool)
    figures = evaluation.overlap(empty, empty)
    assert (figures["Dice"][0], figures["specificity"][0]) == (1, 1)
    assert np.isnan(figures["sensitivity"][0]) and np.isnan(evaluation.overlap(empty, ~empty)["specificity"][0])


def test_the_unet_finds_the_lesions_of_the_maps_at_any_size(sets, unet, rng):
    for path in [*(sets / "real/images").iterdir(), *(sets / "fake").iterdir()]:
        labels = lungs(HEIGHT + 5, WIDTH + 3)
        labels[labels == 3] = 1  # no consolidation
        write_map(sets / "real/maps" / path.name, labels)
        missed = np.where(labels == 2, 1, labels) if path.parent.name == "fake" else labels
        write_image(path, slice_of(missed, rng, noise=5))
    rows = evaluate(sets, "--unet", unet)["segmentation"]
    assert rows["real GGO Dice"]["mean"] == rows["real infection sensitivity"]["mean"] == 1
    assert rows["fake GGO Dice"]["mean"] == rows["fake GGO sensitivity"]["mean"] == 0
    assert rows["fake GGO specificity"]["mean"] == 1
    assert (rows["real consolidation Dice"]["mean"], rows["real consolidation Dice"]["empty"]) == (1, 9)
    assert (rows["real consolidation sensitivity"]["mean"], rows["real consolidation sensitivity"]["n"]) == (None, 0)


@pytest.mark.parametrize("n, found", [(2, []), (3, ["GGO"]), (4, ["GGO", "consolidation", "infection"])])
def test_of_a_unet_with_fewer_labels_the_lesions_that_it_knows_are_measured(n, found, sets):
    names = ["background", "lung", "ground-glass opacity", "consolidation"][:n]
    rows = evaluate(sets, "--unet", save_unet(sets / "few.onnx", names)).get("segmentation", {})
    assert [*dict.fromkeys(row.split()[1] for row in rows)] == found


def test_a_planted_copy_is_the_first_suspect(sets):
    copied, labels = read_image(sets / "train/images/P90_S007.png"), read_map(sets / "train/maps/P90_S007.png")
    write_image(sets / "fake/P01_S004.png", copied)
    write_map(sets / "real/maps/P01_S004.png", labels)
    results = evaluate(sets, "--train", sets / "train")
    name, first = next(iter(results["suspects"].items()))
    assert (name, first["nearest"]) == ("P01_S004", "P90_S007")
    assert first["distance"] == 0 == results["memorisation"]["fake"]["minimum"]
    assert results["memorisation"]["real"]["minimum"] > 0.001
    assert len(results["suspects"]) == 4
    sheet = iio.imread(sets / "out/eval_memorisation.png")
    assert sheet.shape == (4 * HEIGHT, 2 * WIDTH, 3)
    assert (sheet[:HEIGHT, :WIDTH] == sheet[:HEIGHT, WIDTH:]).all()


def test_ratio_and_share_of_near_lungs_are_those_by_hand(sets):
    memory = evaluation.Memorisation(sets / "train", evaluation.Window())
    names = [f"P{k:02d}_S000" for k in range(22)]
    memory.nearest["fake"] = [np.zeros(22, int)]
    real = np.array([0.0, *np.linspace(0.2, 1.0, 21)])  # one was trained on; of the others 0.24 is the 5th percentile
    fake = np.array([0.01, 0.1, 0.2, 0.23, *[0.3] * 9, *[0.7] * 9])  # the first is of the lung that was trained on
    memory.distance |= {"fake": [fake], "real": [real]}
    found = memory.result(names)
    rows = found["memorisation"]
    assert (rows["fake"]["ratio"], rows["fake"]["share"]) == pytest.approx((0.3 / 0.6, 3 / 21))
    assert (rows["fake"]["lungs"], rows["fake"]["minimum"]) == (21, 0.1)
    assert rows["real, in training"]["lungs"] == 1
    assert next(iter(found["suspects"])) == names[0]


def test_the_distance_is_the_rms_of_the_windowed_difference(tmp_path):
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    lung = np.ones((40, 80), np.uint8)
    write_map(tmp_path / "maps/P00_S000.png", lung)
    write_image(tmp_path / "images/P00_S000.png", np.full(lung.shape, -600))
    memory = evaluation.Memorisation(tmp_path, evaluation.Window())
    near, far = (np.full((1, *lung.shape), hu, np.int16) for hu in (-450, -300))  # 0.1 and 0.2 of the window more
    memory.update(evaluation.Batch(far, near, lung[None]))
    assert memory.distance["fake"][0] == pytest.approx(0.1, abs=1 / 255)
    assert memory.distance["real"][0] == pytest.approx(0.2, abs=1 / 255)


def test_only_the_training_side_of_a_split_counts(sets):
    (sets / "train/split.json").write_text(json.dumps({"train": ["P90_S000", "P90_S001"], "test": ["P90_S002"]}))
    results = evaluate(sets, "--train", sets / "train")
    assert results["memorisation"]["training"]["lungs"] == 2
    assert {row["nearest"] for row in results["suspects"].values()} <= {"P90_S000", "P90_S001"}


def test_thumbnails_are_area_means():
    grey = np.random.default_rng(0).integers(0, 256, (2, 128, 192)).astype(np.uint8)
    expected = grey.reshape(2, 64, 2, 64, 3).mean((2, 4)).reshape(2, -1) / 255
    assert evaluation.thumbnails(grey) == pytest.approx(expected, abs=1e-6)
    odd = evaluation.thumbnails(grey[:, :101, :70])
    assert odd.mean(1) == pytest.approx(grey[:, :101, :70].mean((1, 2)) / 255, abs=1e-5)


def test_pairs_are_by_name_and_the_rest_is_told(sets, capsys):
    (sets / "fake/P00_S001.png").unlink()
    (sets / "fake/P02_S006.png").rename(sets / "fake/P77_S000.png")
    results = evaluate(sets)
    assert results["pixels"]["complete PSNR"]["n"] == 7
    assert f"2 names are in {sets / 'real'} only" in capsys.readouterr().err


def test_pairs_of_the_training_side_are_told(sets, capsys):
    names = [f"P0{k // 3}_S00{k}" for k in range(9)]
    (sets / "real/split.json").write_text(json.dumps({"train": names[:6], "test": names[6:]}))
    evaluate(sets)
    assert "6 of 9 pairs are of the training side" in capsys.readouterr().err


def test_a_real_slice_that_is_not_its_maps_is_refused_unless_unchecked(sets):
    write_image(sets / "real/images/P00_S001.png", np.full((HEIGHT, WIDTH), -124))
    with pytest.raises(Mistake, match=r"real/images/P00_S001\.png"):
        evaluate(sets)
    assert evaluate(sets, "--unchecked")["run"]["pairs"]["measured"] == 9
    for path in (sets / "real/maps").iterdir():
        write_map(path, np.array([0, 2, 3, 1])[read_map(path)])
    with pytest.raises(Mistake, match=r"real/images/P\d+_S\d+\.png: mean [+-]\d+ HU in .*\(label \d\)"):
        evaluate(sets)


def unpair(sets, copies=1, complete=False):
    """Make FAKE a dataset of its own, "free": its slices under other names, some times over, and their maps."""
    for part in ("images", "maps"):
        (sets / "free" / part).mkdir(parents=True)
    for path in (sets / "fake").iterdir():
        labels, hu = read_map(sets / "real/maps" / path.name), read_image(path)
        real = read_image(sets / "real/images" / path.name)
        for k in range(copies):
            write_image(sets / f"free/images/{path.stem}v{k}.png", np.where(labels > 0, hu, real) if complete else hu)
            write_map(sets / f"free/maps/{path.stem}v{k}.png", labels)


def test_complete_unpaired_sets_have_the_figures_of_their_pairs_but_for_those_of_pixels(sets, features):
    options = ["--features", features, "--train", sets / "train"]
    paired = evaluate(sets, *options)
    unpair(sets, complete=True)
    unpaired = evaluate(sets, *options, "--unpaired", fake="free")
    assert set(unpaired) == {"run", "features", "texture", "memorisation", "suspects"}
    for table in ("features", "texture", "memorisation"):
        assert unpaired[table] == paired[table]
    assert [*unpaired["suspects"]] == [f"{name}v0" for name in paired["suspects"]]
    assert [path.name for path in (sets / "out").iterdir()] == ["eval_memorisation.png"]  # no earlier picture stays


def test_unpaired_lungs_of_any_number_and_size_are_compared_as_lungs_alone(sets, features, rng):
    paired = evaluate(sets, "--features", features)
    unpair(sets, copies=2)
    results = evaluate(sets, "--features", features, "--unpaired", fake="free")
    assert results["run"]["real"] == {"measured": 9, "without_lung": 0, "patients": 3}
    assert results["run"]["fake"]["measured"] == 18
    assert {row.split()[0] for row in results["features"]} == {"lung"}
    for figure in ("value", "N", "floor_value"):  # of every slice twice
        assert results["texture"]["fine texture"][figure] == pytest.approx(paired["texture"]["fine texture"][figure])
    means = {}
    for side in ("real", "free"):
        files = [(path, sets / side / "maps" / path.name) for path in sorted((sets / side / "images").iterdir())]
        grey = [evaluation.Window()(read_image(image), read_map(labels)) for image, labels in files]
        means[side] = np.array([[of[:, :32].mean(), of[:, 32:].mean()] for of in grey])
    row = results["features"]["lung FID 2"]
    assert row["value"] == pytest.approx(evaluation.frechet(means["real"], means["free"]), rel=1e-3)
    assert (row["N"], row["floor_N"]) == (9, 4)
    kid = reference_kid(means["real"], means["free"])
    assert results["features"]["lung KID 2"]["value"] == pytest.approx(kid, rel=1e-3)
    write_map(sets / "free/maps/P00_S000v0.png", lungs(70, 90))
    write_image(sets / "free/images/P00_S000v0.png", slice_of(lungs(70, 90), rng))
    other = evaluate(sets, "--unpaired", fake="free")["texture"]["HU of lung"]["value"]  # one has another size
    assert other == pytest.approx(results["texture"]["HU of lung"]["value"], rel=0.1)


def told(sets, real, fake, *options, capsys):
    evaluation.main([str(sets / real), str(sets / fake), "--out", str(sets / "out"), *map(str, options)])
    return capsys.readouterr().err


def test_exchanged_folders_are_told(sets, capsys):
    assert "lungs alone" not in told(sets, "real", "fake", capsys=capsys)
    assert "fake: synthetic (a run.json" in told(sets, "fake", "real", "--unchecked", capsys=capsys)
    (sets / "real/run.json").write_text("{}")
    assert "images: synthetic (a run" in told(sets, "real/images", "fake", "--unchecked", capsys=capsys)


def test_maps_beside_a_folder_images_are_its_maps(sets):
    by_dataset = evaluate(sets)
    path = sets / "results.json"
    evaluation.main([str(sets / "real/images"), str(sets / "fake"), "--json", str(path), "--out", str(sets / "out")])
    assert json.loads(path.read_text()) == by_dataset


def test_without_maps_the_images_are_taken_as_they_are_and_no_earlier_picture_stays(sets):
    evaluate(sets, "--train", sets / "train")
    assert (sets / "out/eval_memorisation.png").exists()
    (sets / "real/maps").rename(sets / "hidden")
    results = evaluate(sets)
    assert [path.name for path in (sets / "out").iterdir()] == ["eval_cases.png"]
    assert set(results) == {"run", "pixels", "cases"}
    assert set(results["pixels"]) == {f"complete {figure}" for figure in ("PSNR", "SSIM", "RMSE", "NRMSE")}
    assert iio.imread(sets / "out/eval_cases.png").shape == (3 * HEIGHT, 3 * WIDTH, 3)
    completed = evaluate(sets, "--maps", sets / "hidden")["pixels"]
    assert completed["complete PSNR"]["mean"] > results["pixels"]["complete PSNR"]["mean"] + 1


def test_the_picture_shows_best_median_and_worst(sets):
    cases = evaluate(sets)["cases"]
    assert [cases[case]["name"] for case in ("best", "median", "worst")] == ["P00_S000", "P01_S004", "P02_S008"]
    sheet = iio.imread(sets / "out/eval_cases.png").reshape(3, HEIGHT, 4, WIDTH, 3)
    real = evaluation.Window()(read_image(sets / "real/images/P02_S008.png"))
    assert (sheet[2, :, 1] == real[..., None]).all()
    difference = np.abs(sheet[2, :, 1].astype(int) - sheet[2, :, 2])
    assert (sheet[2, :, 3] == difference).all()
    assert difference.any()


def remove_lung(*maps):
    for path in maps:
        write_map(path, np.zeros((HEIGHT, WIDTH), np.uint8))


MISTAKES = {  # what to do to the sets, options, and what the line must name
    "grey levels": (lambda s: write_image(s / "real/images/P00_S000.png", lungs() * 9.0 - 1024), [], "grey levels"),
    "cut off": (lambda s: os.truncate(s / "fake/P01_S003.png", 100), [], "fake/P01_S003.png"),
    "size": (lambda s: write_image(s / "real/images/P00_S000.png", np.zeros((40, 40))), [], "one size"),
    "missing map": (lambda s: (s / "real/maps/P01_S003.png").unlink(), [], "P01_S003"),
    "no lung": (lambda s: remove_lung(*(s / "real/maps").iterdir()), [], "no lung"),
    "no lung in training": (lambda s: remove_lung(*(s / "train/maps").iterdir()), ["--train", "train"], "no lung"),
    "names of others": (lambda s: None, ["--maps", "train"], "P00_S000"),
    "U-Net without maps": (lambda s: (s / "real/maps").rename(s / "hidden"), ["--unet", "unet.onnx"], "--maps"),
    "unpaired without maps": (lambda s: (s / "real/maps").rename(s / "hidden"), ["--unpaired"], "maps/ beside"),
    "unpaired with maps": (lambda s: None, ["--unpaired", "--maps", "real/maps"], "--unpaired"),
    "width": (lambda s: None, ["--width", "0"], "--width"),
    "batch": (lambda s: None, ["--batch", "0"], "--batch"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(what, sets, monkeypatch):
    spoil, options, named = MISTAKES[what]
    spoil(sets)
    monkeypatch.chdir(sets)
    with pytest.raises(Mistake, match=named) as mistake:
        evaluate(sets, *options)
    assert "\n" not in str(mistake.value)
    assert not (sets / "out").exists() and not (sets / "results.json").exists()


def test_a_foreign_model_is_refused_by_name(sets, features, unet):
    with pytest.raises(Mistake, match=r"unet\.onnx"):
        evaluate(sets, "--features", unet)
    node = helper.make_node("Identity", ["picture"], ["2"])
    outputs = {"2": (TensorProto.UINT8, ["N", "H", "W"])}
    foreign = save_model(sets / "foreign.onnx", [node], {"picture": TensorProto.UINT8}, outputs, kind="features")
    with pytest.raises(Mistake, match=r"foreign\.onnx: .*picture"):
        evaluate(sets, "--features", foreign)
    with pytest.raises(Mistake, match=r"odd\.onnx.*nodule"):
        evaluate(sets, "--unet", save_unet(sets / "odd.onnx", ["background", "nodule", "lung"]))


def test_pairs_without_lung_count_as_if_they_were_not_there(sets, features, unet):
    names = ["P00_S000.png", "P01_S004.png"]
    options = ["--features", features, "--unet", unet, "--train", sets / "train", "--batch", 4]
    remove_lung(*(sets / "real/maps" / name for name in names))
    write_image(sets / "real/images" / names[0], np.full((HEIGHT, WIDTH), -1024))  # above the patient's head
    left_out = evaluate(sets, *options)
    assert left_out["run"]["pairs"] == {"measured": 7, "without_lung": 2, "patients": 3}
    for name in names:
        (sets / "fake" / name).unlink()
    absent = evaluate(sets, *options)
    assert absent["run"].pop("pairs") == {"measured": 7, "without_lung": 0, "patients": 3}
    del left_out["run"]["pairs"]
    assert left_out == absent


def test_training_slices_without_lung_are_counted_and_no_lung_changes_its_name(sets):
    remove_lung(*(sets / "train/maps" / f"P90_S00{k}.png" for k in (0, 3)))
    write_image(sets / "fake/P01_S004.png", read_image(sets / "train/images/P90_S007.png"))
    write_map(sets / "real/maps/P01_S004.png", read_map(sets / "train/maps/P90_S007.png"))
    results = evaluate(sets, "--unchecked", "--train", sets / "train")
    assert results["memorisation"]["training"] == {"lungs": 7, "without_lung": 2}
    assert results["suspects"]["P01_S004"]["nearest"] == "P90_S007"


def test_the_printed_figures_are_those_of_the_json(sets, features, unet, capsys):
    results = evaluate(sets, "--features", features, "--unet", unet, "--train", sets / "train")
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split("  ", 1)[-1].split() for line in printed.splitlines()}
    for table in ("pixels", "segmentation", "texture", "memorisation", "suspects", "cases"):
        for name, row in results[table].items():
            for key in row.keys() & {"mean", "interval", "patients_interval", "value", "floor_value", "median", "SSIM"}:
                assert ("-" if row[key] is None else f"{row[key]:.4g}") in lines[name]
    assert "complete FID 2" in lines and "complete FID 16" not in lines  # not of 9 slices
    assert "complete KID 16" in lines and "complete KID 2" not in lines  # the largest dimension
    assert printed.count("note: FID needs 17 images") == 1 and max(map(len, printed.splitlines())) <= 100


# ------------------------------------------------------------------------------------------------ the whole program

WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('eval.py', run_name='__main__')"


def program(*arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_without_torch_all_runs_and_writes_all(sets, features, unet):
    out = sets / "out"
    options = ["--features", features, "--unet", unet, "--train", sets / "train", "--json", sets / "all.json"]
    done = program(sets / "real", sets / "fake", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    pictures = ("cases", "memorisation")
    assert sorted(path.name for path in out.iterdir()) == [f"eval_{picture}.png" for picture in pictures]
    results = json.loads((sets / "all.json").read_text())
    meters = {"pixels", "features", "texture", "neighbours", "segmentation", "memorisation"}
    assert set(results) == {"run", *meters, "suspects", "cases"}
