"""infer_onnx.py on label volumes, against its own PNG way and against nibabel's reorientation."""

import os
import sys
import types

import nibabel as nib
import numpy as np
import pytest
from conftest import TURNS, draw_chest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from test_infer import METADATA, build_generator, draw_map, files, script

import infer_onnx
from data.slices import Mistake, read_image, write_map

FLOOR = -1024  # the window's floor, -1350, as the PNG format holds it
RAS = np.array([[0.7, 0, 0, -100], [0, 0.8, 0, -120], [0, 0, 5.0, -300], [0, 0, 0, 1]])


def draw_labels(height=50, width=70, lungless=(0, 3)):
    """Labels [Z, H, W] of five slices in display; some without lung. No two slices, and no two sides, are alike."""
    labels = np.stack([draw_map(height, width, shift=3 * z) for z in range(5)])
    labels[:, :9, :] = 0
    labels[list(lungless)] = 0
    return labels


def test_a_window_whose_floor_no_int16_holds_is_clipped_as_the_format_is(tmp_path):
    info = {"level": -600.0, "width": 70000.0}
    lungless = np.zeros((2, 16, 16), np.uint8)
    hu = infer_onnx.fill_volume(tmp_path / "a.nii", lungless, types.SimpleNamespace(info=info), 1)
    assert hu.dtype == np.int16 and (hu == FLOOR).all()


def draw_ct(labels, seed=0):
    """HU int16 of noise beyond what PNG holds, with lungs that have a lung's mean."""
    hu = np.random.default_rng(seed).integers(-3024, 20000, labels.shape).astype(np.int16)
    hu[labels > 0] = -800
    return hu


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


@pytest.fixture
def infer(tmp_path, capfd):
    """Run the script in this process: options -> exit status, OUT/volumes, stdout, stderr without progress."""
    model = build_generator(tmp_path / "generator.onnx")

    def call(*options, out="out", model=model):
        argv = [*map(str, options), "--model", str(model), "--out", str(tmp_path / out), "--provider", "cpu"]
        try:
            status, told = infer_onnx.main(argv), []
        except Mistake as mistake:
            status, told = 2, [f"error: {mistake}"]
        stdout, stderr = capfd.readouterr()
        lines = [line for line in stderr.replace("\r", "\n").splitlines() if line and "%|" not in line]
        lines = [line for line in lines if " runs on cpu" not in line]
        return status, tmp_path / out / "volumes", stdout, "\n".join(lines + told)

    return call


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SPL", "ILA"])
def test_a_volume_equals_the_png_way_slice_by_slice_and_keeps_grid_and_storage_order(infer, tmp_path, codes):
    labels = draw_labels()
    path = save(tmp_path / "patient.nii.gz", labels, codes)
    (tmp_path / "maps").mkdir()
    for z, one in enumerate(labels):
        write_map(tmp_path / f"maps/P01_S{z:03d}.png", one)
    status, volumes, stdout, _ = infer(path)
    assert (status, stdout.splitlines()[-1]) == (0, f"1 volumes written to {tmp_path / 'out'}")
    _, slices, _, told = infer(tmp_path / "maps", out="slices")
    assert told.endswith("note: 2 slices without lung are left out")

    made, given = nib.load(volumes / "patient.nii.gz"), nib.load(path)
    assert np.array_equal(made.affine, given.affine)
    assert made.shape == given.shape
    assert nib.aff2axcodes(made.affine) == tuple(codes)
    assert made.get_data_dtype() == np.int16
    for z, hu in enumerate(display(volumes / "patient.nii.gz")):
        png = slices.parent / f"images/P01_S{z:03d}.png"
        assert png.exists() == (z not in (0, 3))
        assert np.array_equal(hu, read_image(png) if png.exists() else np.full((50, 70), FLOOR))


def test_slices_without_lung_are_the_floor_of_the_model_s_own_window(infer, tmp_path):
    bone = build_generator(tmp_path / "bone.onnx", metadata={**METADATA, "level": "0", "width": "2000"})
    _, volumes, _, _ = infer(save(tmp_path / "one.nii", draw_labels()), model=bone)
    assert (display(volumes / "one.nii.gz")[[0, 3]] == -1000).all()


def test_batches_change_nothing(infer, tmp_path):
    path = save(tmp_path / "one.nii.gz", draw_labels())
    made = [display(infer(path, "--batch", n, out=f"out{n}")[1] / "one.nii.gz") for n in (1, 2, 8)]
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


@pytest.mark.parametrize("codes", ["RAS", "LPI", "AIR"])
def test_completion_keeps_every_voxel_outside_the_lung_and_takes_the_lung_from_the_model(infer, tmp_path, codes):
    labels = draw_labels()
    ct = draw_ct(labels)
    mask, real = save(tmp_path / "mask.nii.gz", labels), save(tmp_path / "ct.nii.gz", ct, codes)
    _, plain, _, _ = infer(mask, out="plain")
    status, volumes, _, told = infer(mask, "--complement", real)
    assert (status, told.count("rounded")) == (0, 0)
    completed = display(volumes / "mask.nii.gz")
    assert np.array_equal(completed[labels == 0], ct[labels == 0])
    assert np.array_equal(completed[labels > 0], display(plain / "mask.nii.gz")[labels > 0])
    assert np.array_equal(nib.load(volumes / "mask.nii.gz").affine, nib.load(real).affine)


def test_a_mask_saved_with_an_identity_affine_is_laid_on_its_ct_with_a_warning(infer, tmp_path):
    labels = draw_labels()
    mask, real = (save(tmp_path / f"{n}.nii.gz", a, "LAS") for n, a in (("mask", labels), ("ct", draw_ct(labels))))
    _, volumes, _, _ = infer(mask, "--complement", real)
    bare = tmp_path / "bare/mask.nii.gz"
    bare.parent.mkdir()
    nib.save(nib.Nifti1Image(np.asanyarray(nib.load(mask).dataobj), np.eye(4)), bare)
    status, bare_out, _, told = infer(bare, "--complement", real, out="bare_out")
    assert status == 0
    assert f"warning: {bare}: its affine does not put it on its CT's grid" in told
    assert np.array_equal(display(bare_out / "mask.nii.gz"), display(volumes / "mask.nii.gz"))


def test_a_ct_of_another_type_counts_by_its_values(infer, tmp_path):
    labels = draw_labels()
    hu = draw_ct(labels)
    mask, out = save(tmp_path / "mask.nii.gz", labels), {}
    save(tmp_path / "float.nii.gz", hu, dtype=np.float32)
    save(tmp_path / "fractions.nii.gz", hu + np.where(hu < 0, 0.3, -0.3))
    image = nib.load(save(tmp_path / "offset.nii.gz", hu.astype(np.int32) + 3024, dtype=np.uint16))
    image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    image.header.set_slope_inter(1, -3024)
    nib.save(image, tmp_path / "offset.nii.gz")
    for name in ("float", "offset", "fractions"):
        status, volumes, _, told = infer(mask, "--complement", tmp_path / f"{name}.nii.gz", out=name)
        assert status == 0
        assert told.count("fractions of a HU are rounded") == (name == "fractions")
        out[name] = display(volumes / "mask.nii.gz")
        assert np.array_equal(out[name][labels == 0], hu[labels == 0])


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path):
    """Three label volumes of different sizes and endings, and what is no data."""
    for k, name in enumerate(["a.nii.gz", "b.nii", "c.NII.GZ"]):
        save(tmp_path / "labels" / name.lower(), draw_labels(40 + 16 * k, 64))
    (tmp_path / "labels/c.nii.gz").rename(tmp_path / "labels/c.NII.GZ")
    (tmp_path / "labels/._a.nii.gz").write_bytes(b"\0\5\26\7")
    (tmp_path / "labels/notes.txt").write_text("not data")
    return tmp_path / "labels"


def test_a_folder_of_volumes_is_made_with_the_cts_of_the_same_names(infer, folder, tmp_path):
    for k, name in enumerate("abc"):
        labels = draw_labels(40 + 16 * k, 64)
        save(tmp_path / f"ct/{name}.nii.gz", draw_ct(labels, seed=k))
    status, volumes, _, _ = infer(folder, "--complement", tmp_path / "ct")
    assert status == 0
    assert sorted(os.listdir(volumes)) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    for k, name in enumerate("abc"):
        labels = draw_labels(40 + 16 * k, 64)
        made = display(volumes / f"{name}.nii.gz")
        assert np.array_equal(made[labels == 0], draw_ct(labels, seed=k)[labels == 0])


def test_a_second_run_leaves_finished_volumes_alone(infer, folder):
    _, volumes, _, _ = infer(folder)
    before = files(volumes)
    (volumes / "b.nii.gz").unlink()
    times = {path: path.stat().st_mtime_ns for path in volumes.iterdir()}
    status, _, stdout, _ = infer(folder)
    assert (status, stdout.splitlines()[0]) == (0, "3 volumes: 2 finished, 1 to make, 1 slices at a time")
    assert files(volumes) == before
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_shards_are_disjoint_and_complete_and_one_may_be_empty(infer, folder):
    names = []
    for i in (1, 2, 3, 4):
        status, volumes, _, told = infer(folder, "--shard", f"{i}/4", out=f"part{i}")
        assert status == 0
        names += os.listdir(volumes)
        assert ("shard 4/4 is empty: there are only 3 to make" in told) == (i == 4)
    assert sorted(names) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_a_dry_run_tells_the_batches_and_makes_nothing(infer, folder):
    _, volumes, stdout, _ = infer(folder, "--batch", 2, "--dry-run")
    assert stdout.endswith("batch shapes: 1x48x64, 1x64x64, 1x80x64, 2x48x64, 2x64x64, 2x80x64\n")
    assert not volumes.parent.exists()


def test_a_bad_volume_is_one_line_and_the_others_are_made(infer, folder):
    labels = draw_labels()
    labels[1, 20, 30] = 4
    save(folder / "four.nii.gz", labels)
    save(folder / "minus.nii.gz", -labels.astype(np.int16))
    (folder / "text.nii.gz").write_text("no volume")
    (folder / "zcut.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:-100])
    status, volumes, _, told = infer(folder)
    assert status == 2
    assert sorted(os.listdir(volumes)) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    words = {
        "four": "unknown label 4 at voxel",
        "minus": "unknown label -",
        "text": "no NIfTI file",
        "zcut": "cut short",
    }
    assert len(errors) == 4
    for line, (name, word) in zip(errors, words.items(), strict=True):
        assert line.startswith(f"error: {folder / name}.nii.gz: ") and word in line


def test_a_label_that_the_model_does_not_know_is_refused(infer, tmp_path):
    metadata = {**METADATA, "labels": '["background", "lung"]', "colours": "[[0, 0, 0], [255, 0, 0]]"}
    two = build_generator(tmp_path / "two.onnx", metadata=metadata)
    status, _, _, told = infer(save(tmp_path / "one.nii.gz", draw_labels()), model=two)
    assert status == 2 and "unknown label" in told and "correct it to one of 0, 1" in told


def test_labels_may_be_floats_and_a_fourth_axis_of_one(infer, tmp_path):
    labels = draw_labels()
    _, volumes, _, _ = infer(save(tmp_path / "one.nii.gz", labels))
    image = nib.load(save(tmp_path / "odd/one.nii.gz", labels - (labels > 0) * 3e-10, dtype=np.float64))
    nib.save(nib.Nifti1Image(image.get_fdata()[..., None], image.affine), tmp_path / "odd/one.nii.gz")
    _, odd, _, _ = infer(tmp_path / "odd/one.nii.gz", out="odd_out")
    assert np.array_equal(display(odd / "one.nii.gz"), display(volumes / "one.nii.gz"))


def test_a_volume_without_lung_is_left_out_and_none_with_a_lung_is_an_error(infer, folder, tmp_path):
    empty = save(folder / "empty.nii.gz", np.zeros((2, 32, 32), np.uint8))
    status, volumes, _, told = infer(folder)
    assert status == 0 and told.endswith("note: 1 volumes without lung are left out")
    assert not (volumes / "empty.nii.gz").exists()
    status, _, _, told = infer(empty, out="none")
    assert status == 2 and told == f"error: {empty}: no lung in any of the 1 volumes: give maps with labels above 0"


# ------------------------------------------------------------------------------------------------ what is refused


BAD_CTS = {
    "without intercept": (lambda hu: hu + 1024, RAS, "mean +224 in healthy lung"),
    "intercept twice": (lambda hu: hu - 1024, RAS, "mean -1824 in healthy lung"),
    "fractions of one": (lambda hu: hu / 4096, RAS, "mean -0 in healthy lung"),
    "nan": (lambda hu: np.where(hu == hu.max(), np.nan, hu), RAS, " voxels are nan: write air as -1000 HU there"),
    "beyond int16": (lambda hu: hu * 4.0, RAS, "are no HU"),
    "another shape": (lambda hu: hu[:, :-1], RAS, "bring both to one grid"),
}


@pytest.mark.parametrize("kind", BAD_CTS)
def test_a_ct_that_does_not_fit_is_one_line_and_nothing_is_written(infer, tmp_path, kind):
    change, affine, complaint = BAD_CTS[kind]
    labels = draw_labels()
    mask = save(tmp_path / "mask.nii.gz", labels)
    real = save(tmp_path / "ct.nii.gz", change(draw_ct(labels).astype(np.float64)), affine=affine)
    status, volumes, _, told = infer(mask, "--complement", real)
    assert status == 2
    assert complaint in told
    assert not list(volumes.iterdir())


@pytest.mark.parametrize("turn", [*TURNS, "slices reversed"])
def test_a_ct_turned_against_its_map_is_refused_unless_overruled(infer, tmp_path, turn):
    hu, labels = draw_chest()
    mask, real = save(tmp_path / "mask.nii.gz", labels), tmp_path / "ct.nii.gz"
    save(real, hu)
    assert infer(mask, "--complement", real)[0] == 0
    save(real, hu[::-1] if turn == "slices reversed" else TURNS[turn](hu))
    status, volumes, _, told = infer(mask, "--complement", real, out="turned")
    assert status == 2 and ("it is turned against its CT" in told or "in healthy lung, which has HU" in told)
    assert not list(volumes.iterdir())
    assert infer(mask, "--complement", real, "--unchecked", out="turned")[0] == 0


def test_images_with_nnunets_channel_number_are_found(infer, tmp_path):
    labels = draw_labels()
    save(tmp_path / "labels/case_001.nii.gz", labels)
    save(tmp_path / "images/case_001_0000.nii.gz", draw_ct(labels))
    status, volumes, _, _ = infer(tmp_path / "labels", "--complement", tmp_path / "images")
    assert status == 0 and (display(volumes / "case_001.nii.gz") == draw_ct(labels))[labels == 0].all()


@pytest.mark.parametrize("change", [lambda hu: hu + 1024, lambda hu: np.clip((hu + 1350) / 1500, 0, 1) * 255])
def test_where_no_healthy_lung_tells_a_ct_without_air_is_refused_until_overruled(infer, tmp_path, change):
    labels = draw_labels()
    lesions = np.where(labels > 1, labels, 0).astype(np.uint8)
    mask = save(tmp_path / "mask.nii.gz", lesions)
    real = save(tmp_path / "ct.nii.gz", np.rint(change(draw_ct(labels).clip(-1024).astype(np.float64))))
    status, volumes, _, told = infer(mask, "--complement", real)
    assert status == 2 and "in which air is about -1000" in told and not list(volumes.iterdir())
    assert infer(mask, "--complement", real, "--unchecked")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_a_full_disk_stops_the_run_with_one_line_and_the_next_goes_on(infer, folder, tmp_path):
    import resource

    def limit():  # of a file's size: like a full disk, it fails in the middle of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, resource.RLIM_INFINITY))

    argv = ["--model", tmp_path / "generator.onnx", "--out", tmp_path / "out", "--provider", "cpu", "--threads", "1"]
    done = script(folder, *argv, preexec_fn=limit)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and f"{tmp_path / 'out/volumes/a.nii.gz'}: cannot be written" in errors[0]
    assert not list((tmp_path / "out/volumes").iterdir())
    assert infer(folder)[0] == 0
    assert len(list((tmp_path / "out/volumes").iterdir())) == 3


def test_a_ct_that_is_missing_is_told_by_name(infer, folder, tmp_path):
    save(tmp_path / "ct/a.nii.gz", draw_ct(draw_labels(40, 64)))
    status, volumes, _, told = infer(folder, "--complement", tmp_path / "ct")
    assert status == 2 and os.listdir(volumes) == ["a.nii.gz"]
    assert f"error: {folder / 'b.nii'}: b is missing from --complement" in told


def test_what_goes_with_slices_alone_is_refused(infer, folder, tmp_path):
    (tmp_path / "images").mkdir()
    write_map(tmp_path / "images/a.png", draw_map())
    one = save(tmp_path / "one.nii.gz", draw_labels())
    for options, complaint in (
        (["--format", "nifti"], f"{folder}: of volumes, and --format goes with PNG maps alone"),
        (["--variants", 2], "--variants goes with"),
        (["--panel"], "--panel goes with"),
        (["--side", "test"], "--side test: goes with the folder of a dataset of slices"),
        (["--complement", one], "one file for 3 maps"),
        (["--complement", tmp_path / "images"], "--complement wants volumes for label volumes"),
    ):
        status, volumes, _, told = infer(folder, *options)
        assert (status, told.count("\n")) == (2, 0)
        assert complaint in told
        assert not volumes.parent.exists()


def test_png_and_nifti_in_one_folder_are_refused(infer, folder):
    write_map(folder / "P00_S000.png", draw_map())
    status, _, _, told = infer(folder)
    assert status == 2 and told == f"error: {folder}: holds both PNG and NIfTI: give a folder of either"


def test_volumes_and_completed_volumes_do_not_mix_and_input_is_no_output(infer, folder, tmp_path):
    infer(folder)
    save(tmp_path / "ct/a.nii.gz", draw_ct(draw_labels(40, 64)))
    for extra in ((), ("--dry-run",)):
        _, out, _, told = infer(folder, "--complement", tmp_path / "ct", *extra)
        assert told.startswith(f"error: {out.parent}: its slices were made otherwise")
    assert "the input stands in it" in infer(out)[3]


def test_without_nibabel_a_volume_is_one_line_and_png_goes_on(infer, folder, tmp_path):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "maps").mkdir()
    write_map(tmp_path / "maps/P00_S000.png", draw_map())
    (tmp_path / "blocked/sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'nibabel' else find(name, *more)\n"
        "import sys\nsys.modules['nibabel'] = None\n"
    )
    argv = ["--model", tmp_path / "generator.onnx", "--out", tmp_path / "out", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "blocked")}
    done = script(folder, *argv, env=env)
    assert (done.returncode, done.stderr) == (2, f"error: {folder}: nibabel is missing: pip install nibabel\n")
    assert script(tmp_path / "maps", *argv, env=env).returncode == 0
