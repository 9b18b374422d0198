"""infer_onnx.py on label volumes, against its own PNG way and against nibabel's reorientation."""

import os

import nibabel as nib
import numpy as np
import pytest
from conftest import draw_map, files
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from test_infer import DENSITIES, METADATA, build_generator, model  # noqa: F401

from data.slices import read_image, write_map

FLOOR = -1024  # the window's floor, -1350, as the PNG format holds it
RAS = np.array([[0.7, 0, 0, -100], [0, 0.8, 0, -120], [0, 0, 5.0, -300], [0, 0, 0, 1]])


def draw_labels(height=50, width=70, lungless=(0, 3)):
    """Labels [Z, H, W] of five slices in display; some without lung. No two slices, and no two sides, are alike."""
    labels = np.stack([draw_map(height, width, shift=3 * z) for z in range(5)])
    labels[:, :9, :] = 0
    labels[list(lungless)] = 0
    return labels


def draw_ct(labels, seed=0):
    """HU int16 of noise beyond what PNG holds, with lungs and lesions of their densities."""
    hu = np.random.default_rng(seed).integers(-3024, 20000, labels.shape).astype(np.int16)
    return np.where(labels > 0, DENSITIES[labels], hu)


def save(path, display, codes="RAS", dtype=None, affine=RAS):
    """Save an array [Z, H, W] in display as a NIfTI of a storage order, by nibabel alone."""
    stored = np.ascontiguousarray(display.transpose(2, 1, 0)[::-1, ::-1])  # display has left and back last: RAS
    image = nib.Nifti1Image(stored if dtype is None else stored.astype(dtype), affine)
    path.parent.mkdir(exist_ok=True)
    nib.save(image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes))), path)
    return path


def display(path):
    """[Z, H, W] in display of a NIfTI in any storage order, by nibabel alone."""
    return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj)[::-1, ::-1].transpose(2, 1, 0)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SPL", "ILA"])
def test_a_volume_equals_the_png_way_slice_by_slice_and_keeps_grid_and_storage_order(infer, tmp_path, codes):
    labels = draw_labels()
    path = save(tmp_path / "patient.nii.gz", labels, codes)
    (tmp_path / "maps").mkdir()
    for z, one in enumerate(labels):
        write_map(tmp_path / f"maps/P01_S{z:03d}.png", one)
    status, out, _ = infer(path)
    assert status == 0
    _, slices, told = infer(tmp_path / "maps", out="slices")
    assert told.endswith("note: 2 slices without lung are left out")

    made, given = nib.load(out / "volumes/patient.nii.gz"), nib.load(path)
    assert np.array_equal(made.affine, given.affine)
    assert made.shape == given.shape
    assert nib.aff2axcodes(made.affine) == tuple(codes)
    assert made.get_data_dtype() == np.int16
    for z, hu in enumerate(display(out / "volumes/patient.nii.gz")):
        png = slices / f"images/P01_S{z:03d}.png"
        assert png.exists() == (z not in (0, 3))
        assert np.array_equal(hu, read_image(png) if png.exists() else np.full((50, 70), FLOOR))


@pytest.mark.parametrize("level, width, floor", [(0, 2000, -1000), (-600, 70000, FLOOR)])
def test_slices_without_lung_are_the_floor_of_the_model_s_own_window(infer, tmp_path, level, width, floor):
    own = build_generator(tmp_path / "own.onnx", metadata={**METADATA, "level": str(level), "width": str(width)})
    _, out, _ = infer(save(tmp_path / "one.nii", draw_labels()), model=own)
    assert (display(out / "volumes/one.nii.gz")[[0, 3]] == floor).all()


@pytest.mark.parametrize("codes", ["RAS", "LPI", "AIR"])
def test_completion_keeps_every_voxel_outside_the_lung_and_takes_the_lung_from_the_model(infer, tmp_path, codes):
    labels = draw_labels()
    ct = draw_ct(labels)
    mask, real = save(tmp_path / "mask.nii.gz", labels), save(tmp_path / "ct.nii.gz", ct, codes)
    _, plain, _ = infer(mask, out="plain")
    status, out, _ = infer(mask, "--complement", real)
    assert status == 0
    completed = display(out / "volumes/mask.nii.gz")
    assert np.array_equal(completed[labels == 0], ct[labels == 0])
    assert np.array_equal(completed[labels > 0], display(plain / "volumes/mask.nii.gz")[labels > 0])
    assert np.array_equal(nib.load(out / "volumes/mask.nii.gz").affine, nib.load(real).affine)


def test_a_ct_of_another_type_counts_by_its_values_to_the_hu(infer, tmp_path):
    labels = draw_labels()
    hu = draw_ct(labels)
    mask = save(tmp_path / "mask.nii.gz", labels)
    save(tmp_path / "fractions.nii.gz", hu + np.where(hu < 0, 0.3, -0.3))
    image = nib.load(save(tmp_path / "offset.nii.gz", hu.astype(np.int32) + 3024, dtype=np.uint16))
    image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    image.header.set_slope_inter(1, -3024)
    nib.save(image, tmp_path / "offset.nii.gz")
    for name in ("offset", "fractions"):
        status, out, _ = infer(mask, "--complement", tmp_path / f"{name}.nii.gz", out=name)
        assert status == 0
        assert np.array_equal(display(out / "volumes/mask.nii.gz")[labels == 0], hu[labels == 0])


@pytest.fixture
def folder(tmp_path):
    """Three label volumes of different sizes and endings, and what is no data."""
    for k, name in enumerate(["a.nii.gz", "b.nii", "c.NII.GZ"]):
        save(tmp_path / "labels" / name.lower(), draw_labels(40 + 16 * k, 64))
    (tmp_path / "labels/c.nii.gz").rename(tmp_path / "labels/c.NII.GZ")
    (tmp_path / "labels/._a.nii.gz").write_bytes(b"\0\5\26\7")
    (tmp_path / "labels/notes.txt").write_text("not data")
    return tmp_path / "labels"


def test_a_second_run_leaves_finished_volumes_alone_and_shards_are_the_whole(infer, folder):
    _, out, _ = infer(folder)
    before = files(out / "volumes")
    assert sorted(before) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    (out / "volumes/b.nii.gz").unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "volumes").iterdir()}
    assert infer(folder)[0] == 0 and files(out / "volumes") == before
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    for part in ("1/2", "2/2"):
        _, sharded, _ = infer(folder, "--shard", part, out="sharded")
    assert files(sharded / "volumes") == before


def test_a_bad_volume_is_one_line_and_the_others_are_made(infer, folder):
    labels = draw_labels()
    labels[1, 20, 30] = 4
    save(folder / "four.nii.gz", labels)
    (folder / "text.nii.gz").write_text("no volume")
    status, out, told = infer(folder)
    assert status == 2
    assert sorted(os.listdir(out / "volumes")) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert [line.split(".nii.gz: ")[0] for line in errors] == [f"error: {folder / name}" for name in ("four", "text")]


def test_a_volume_without_lung_is_left_out_and_none_with_a_lung_is_an_error(infer, folder, tmp_path):
    empty = save(folder / "empty.nii.gz", np.zeros((2, 32, 32), np.uint8))
    status, out, told = infer(folder)
    assert status == 0 and told.endswith("note: 1 volumes without lung are left out")
    assert not (out / "volumes/empty.nii.gz").exists()
    status, _, told = infer(empty, out="none")
    assert status == 2 and f"error: {empty}: no lung" in told


BAD_CTS = {
    "without intercept": lambda hu: hu + 1024,
    "fractions of one": lambda hu: hu / 4096,
    "nan": lambda hu: np.where(hu == hu.max(), np.nan, hu),
    "beyond int16": lambda hu: hu * 4.0,
    "another shape": lambda hu: hu[:, :-1],
}


@pytest.mark.parametrize("kind", BAD_CTS)
def test_a_ct_that_does_not_fit_is_one_line_and_nothing_is_written(infer, tmp_path, kind):
    labels = draw_labels()
    mask = save(tmp_path / "mask.nii.gz", labels)
    real = save(tmp_path / "ct.nii.gz", BAD_CTS[kind](draw_ct(labels).astype(np.float64)))
    status, out, told = infer(mask, "--complement", real)
    faulty = mask if kind == "another shape" else real
    assert status == 2 and f"error: {faulty}: " in told and told.count("error: ") == 1
    assert not list((out / "volumes").iterdir())


@pytest.mark.parametrize("name", ["case_001.nii.gz", "case_001_0000.nii.gz"])  # the last is nnU-Net's
def test_cts_are_found_by_their_names_and_one_that_is_missing_is_told(infer, tmp_path, name):
    labels = draw_labels()
    for one in ("case_001", "case_002"):
        save(tmp_path / f"labels/{one}.nii.gz", labels)
    save(tmp_path / "images" / name, draw_ct(labels))
    status, out, told = infer(tmp_path / "labels", "--complement", tmp_path / "images")
    assert (display(out / "volumes/case_001.nii.gz") == draw_ct(labels))[labels == 0].all()
    assert status == 2 and f"error: {tmp_path / 'labels/case_002.nii.gz'}: " in told


def test_what_goes_with_slices_alone_is_refused(infer, folder, tmp_path):
    one = save(tmp_path / "one.nii.gz", draw_labels())
    slices_alone = (["--format", "png16"], ["--variants", 2], ["--panel"], ["--side", "test"])
    for options in (*slices_alone, ["--complement", one]):
        status, out, told = infer(folder, *options)
        assert status == 2 and told.startswith("error: ") and "\n" not in told
        assert not out.exists()
