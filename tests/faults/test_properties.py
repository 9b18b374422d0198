"""What holds for every input, where that says more than examples: drawn by hypothesis."""

import math

import nibabel as nib
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from test_infer import build_generator

import covidgan
import eval as evaluation
import export
import infer_onnx
from covidgan import Covidgan
from data import slices, volumes

SIDES = array_shapes(min_dims=2, max_dims=2, max_side=24)
MAPS = arrays(np.uint8, SIDES, elements=st.integers(0, 3))
HU = st.integers(-1024, 3071)
AFFINES = st.builds(
    lambda axes, signs, sizes, origin, tilt: affine(axes, signs, sizes, origin, tilt),
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from((-1, 1))] * 3),
    st.tuples(*[st.floats(0.1, 9)] * 3),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.floats(0, 0.6),
)


def affine(axes, signs, sizes, origin, tilt):
    """Axes in some order, of some signs and sizes, tilted about x by up to 34 degrees."""
    matrix = np.eye(4)
    turn = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    matrix[:3, :3] = turn @ (np.eye(3)[axes] * signs) * sizes
    matrix[:3, 3] = origin
    return matrix


@pytest.fixture
def many(tries):
    """Run a property on as many examples as the run is long."""

    def run(strategy, check, short=40):
        n = tries(short, 2_000)
        silent = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        settings(max_examples=n, deadline=None, derandomize=n == short, database=None, suppress_health_check=silent)(
            given(strategy)(lambda drawn: check(drawn))
        )()

    return run


# ------------------------------------------------------------------------------------------------ files


def test_every_map_is_read_as_it_was_written_by_both_readers(many, tmp_path):
    def check(labels):
        slices.write_map(tmp_path / "a.png", labels)
        assert np.array_equal(slices.read_map(tmp_path / "a.png"), labels)
        assert np.array_equal(covidgan.read_map(tmp_path / "a.png", 4), labels)

    many(MAPS, check)


def test_every_slice_is_read_as_it_was_written_by_both_readers(many, tmp_path):
    def check(hu):
        slices.write_image(tmp_path / "a.png", hu)
        assert np.array_equal(slices.read_image(tmp_path / "a.png"), hu)
        assert np.array_equal(covidgan.read_image(tmp_path / "a.png"), hu)

    many(arrays(np.int16, SIDES, elements=HU), check)


def test_every_split_of_names_is_read_as_it_was_written(many, tmp_path):
    names = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters='/\\:.<>"|?*'), min_size=1)

    def check(sides):
        slices.write_split(tmp_path / "split.json", *sides, {"seed": 1})
        expected = dict(zip(slices.SIDES, sides, strict=True))
        assert slices.read_split(tmp_path / "split.json") == expected

    many(st.tuples(*[st.lists(names.map(lambda name: name[:80]), max_size=4, unique=True)] * 3), check)


def test_every_volume_lies_where_its_model_lay_whatever_its_affine_and_type(many, tmp_path):
    kinds = st.sampled_from((np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64))
    shapes = array_shapes(min_dims=3, max_dims=3, max_side=5)

    def check(drawn):
        where, kind, shape, ending = drawn
        numbers = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        nib.save(nib.Nifti1Image(numbers.astype(kind), where), tmp_path / f"a{ending}")
        read = volumes.read_volume(tmp_path / f"a{ending}", note=str)
        volumes.write_volume(tmp_path / f"b{ending}", read, read.voxels)
        written = nib.load(tmp_path / f"b{ending}")
        assert np.array_equal(np.asanyarray(written.dataobj), numbers)
        assert np.array_equal(written.affine, nib.load(tmp_path / f"a{ending}").affine)
        again = volumes.read_volume(tmp_path / f"b{ending}", note=str)
        assert np.array_equal(again.voxels, read.voxels)

    many(st.tuples(AFFINES, kinds, shapes, st.sampled_from((".nii", ".nii.gz"))), check)


def test_a_checkpoint_is_read_as_it_was_written(many, tmp_path, tiny):
    method = covidgan.build(Covidgan, tiny(ngf=4, ndf=4))
    state = {name: x.clone() for name, x in method.state_dict().items()}
    words = st.text(st.characters(exclude_categories=("C", "Z")), max_size=20)

    def check(drawn):
        seed, lr, data = drawn
        config = vars(tiny(ngf=4, ndf=4, seed=seed, lr=lr, data=data))
        held = {"method": "covidgan", "config": config, "stage": "g1", "step": seed, "networks": state, "average": {}}
        torch.save(held, tmp_path / "ckpt.pt")
        read = covidgan.read_checkpoint(tmp_path / "ckpt.pt", Covidgan)
        assert read["config"] == config and read["step"] == seed
        assert all(torch.equal(read["networks"][name], x) for name, x in state.items())

    many(st.tuples(st.integers(0, 2**63 - 1), st.floats(1e-9, 1), words), check, short=10)


# ------------------------------------------------------------------------------------------------ synthesis


def test_augmentation_invents_no_label_in_training_or_in_variants(many):
    c = covidgan.Config(rotate=45, elastic=20, resize=2)

    def check(drawn):
        labels, known, seed = drawn
        labels = np.array(known, np.uint8)[labels % len(known)]
        height, width = labels.shape
        rows, columns = infer_onnx.augmentation(height, width, np.random.default_rng(seed))
        drawn = torch.from_numpy(labels)[None, None]
        _, trained = covidgan.augment(torch.zeros(1, 1, height, width), drawn, c, torch.Generator().manual_seed(seed))
        varied = infer_onnx.sample_nearest(labels, rows, columns)
        for made in (varied, trained.numpy()):
            assert {*np.unique(made)} <= {0, *known}

    known = st.lists(st.integers(0, 255), min_size=1, max_size=6)
    many(st.tuples(MAPS, known, st.integers(0, 2**31)), check)


def test_completion_changes_no_pixel_outside_the_lung(many, tmp_path):
    model = build_generator(tmp_path / "generator.onnx")
    generator = infer_onnx.Generator(*infer_onnx.open_session(model, "cpu", 1))
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "maps").mkdir()
    args = infer_onnx.parse(["maps", "--out", str(tmp_path / "out"), "--format", "png16"])
    args.complement = tmp_path

    def check(drawn):
        labels, seed = drawn
        real = np.random.default_rng(seed).integers(-1024, 3072, labels.shape).astype(np.int16)
        job = infer_onnx.Job("P01_S001", tmp_path / "P01_S001.png", labels.shape, 0)
        infer_onnx.write(([infer_onnx.Slice(job, labels, real)], generator(labels[None])), args, generator.info)
        completed = slices.read_image(tmp_path / "out" / "images" / "P01_S001.png")
        assert np.array_equal(completed[labels == 0], real[labels == 0])

    many(st.tuples(MAPS, st.integers(0, 2**31)), check)


def test_the_exported_graph_is_pytorchs_on_random_maps_of_random_sizes(many, tiny, tmp_path):
    c = tiny(ngf=8, ndf=4)
    method = covidgan.build(Covidgan, c)
    checkpoint = {"config": vars(c), "networks": method.state_dict()}
    export.export_generator(checkpoint, "0" * 64, tmp_path / "g.onnx")
    session = ort.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    reference = export.DeployedGenerator(method.generator(), c).eval()

    def check(drawn):
        n, height, width, seed = drawn
        labels = np.random.default_rng(seed).integers(0, 4, (n, 16 * height, 16 * width)).astype(np.uint8)
        with torch.no_grad():
            hu, alpha = reference(torch.from_numpy(labels))
        ours, our_alpha = session.run(["ct", "alpha"], {"map": labels})
        assert np.abs(ours.astype(int) - hu.numpy()).max() <= 1
        assert np.abs(our_alpha - alpha.numpy()).max() <= 1e-3

    many(st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**31)), check, short=15)


# ------------------------------------------------------------------------------------------------ figures


def test_pixel_figures_are_symmetric_and_in_their_bounds(many):
    """NRMSE aside, which is over the first image's own power."""
    window = evaluation.Window()

    def figures(real, fake):
        metrics = evaluation.PixelMetrics(window, "cpu", ["complete"])
        metrics.sessions = opened
        metrics.update(evaluation.Batch(real[None], fake[None], np.ones_like(real[None], np.uint8)))
        return {row: float(metrics.of_pairs(row)[0]) for row in metrics.found}

    opened = {}

    def check(seed):
        rng = np.random.default_rng(seed)
        real, noise = (rng.integers(-1350, 200, (24, 24)).astype(np.int16).clip(-1024) for _ in range(2))
        fake = np.where(rng.random(real.shape) < rng.random(), noise, real)
        one, other, same = figures(real, fake), figures(fake, real), figures(real, real)
        for figure in ("PSNR", "SSIM", "RMSE"):
            assert one[f"complete {figure}"] == pytest.approx(other[f"complete {figure}"], rel=1e-4, abs=1e-5)
        assert -1 <= one["complete SSIM"] <= 1 and 0 <= one["complete PSNR"] <= 100 and 0 <= one["complete RMSE"] <= 1
        assert (same["complete SSIM"], same["complete PSNR"], same["complete RMSE"]) == (1, 100, 0)

    many(st.integers(0, 2**31), check, short=20)


FEATURES = st.tuples(st.integers(7, 30), st.integers(7, 30), st.integers(1, 12), st.integers(0, 2**31))


def test_frechet_distance_is_symmetric_never_negative_and_0_to_itself(many):
    def check(drawn):
        n, m, d, seed = drawn
        rng = np.random.default_rng(seed)
        x, y = rng.normal(0, 3, (n, d)), rng.normal(rng.normal(), 1, (m, d))
        there, back = evaluation.frechet(x, y), evaluation.frechet(y, x)
        assert there >= 0 and there == pytest.approx(back, rel=1e-6, abs=1e-8)
        assert evaluation.frechet(x, x) == pytest.approx(0, abs=1e-8)
        assert evaluation.frechet(x + 2, x) == pytest.approx(4 * d)  # means alone differ

    many(FEATURES, check)


def test_kid_is_symmetric_and_the_manifolds_shares_are_in_0_to_1_and_exchange_with_the_sides(many):
    def check(drawn):
        n, m, d, seed = drawn
        rng = np.random.default_rng(seed)
        x, y = rng.normal(0, 2, (n, d)), rng.normal(rng.normal(), 1, (m, d))
        assert evaluation.kid(x, y)[0] == pytest.approx(evaluation.kid(y, x)[0], rel=1e-9, abs=1e-9)
        one, other = evaluation.manifold(x, y), evaluation.manifold(y, x)
        assert all(0 <= one[figure] <= 1 for figure in ("precision", "recall", "coverage")) and one["density"] >= 0
        assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])

    many(FEATURES, check)


def test_dice_is_symmetric_in_0_to_1_and_1_for_the_same_mask(many):
    masks = arrays(bool, (2, 1, 6, 7))

    def check(pair):
        a, b = pair
        one, other = evaluation.overlap(a, b), evaluation.overlap(b, a)
        assert one["Dice"] == other["Dice"] and 0 <= one["Dice"][0] <= 1 and evaluation.overlap(a, a)["Dice"] == 1
        for figure in ("sensitivity", "specificity"):
            assert np.isnan(one[figure]).all() or 0 <= one[figure][0] <= 1

    many(masks, check)
