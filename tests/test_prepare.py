"""`data/prepare.py` on small synthetic volumes; the last test looks at real ones where they are at hand."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from data import prepare
from data.slices import Mistake

REPO = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("COVIDGAN_CT", REPO.parent / "shared" / "ct"))
SIZE = 24


def save(path, volume, codes="LPS", spacing=(1, 1, 1)):
    """Save [Z, H, W] (z to S, rows to P, columns to L) in any storage order, without nibabel's own turning.

    The same voxel is at the same place in the world, whatever the order.
    """
    affine, order = np.zeros((4, 4)), []
    affine[3, 3] = 1
    for column, code in enumerate(codes):
        world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)  # x to R, y to A, z to S
        affine[world, column] = spacing[world] * (1 if code in "RAS" else -1)
        if code in "RAI":  # its first voxel is the last of the display
            affine[world, 3] = (volume.shape[2 - world] - 1) * spacing[world] * (1 if code == "I" else -1)
        order.append(2 - world)
    stored = volume.transpose(order)
    stored = np.flip(stored, [column for column, code in enumerate(codes) if code in "RAI"])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(stored), affine), path)


def body(depth=6, seed=0):
    """CT int16, lung mask and lesion mask uint8 [Z, H, W]: a body with two lungs, lesion in every slice."""
    rng = np.random.default_rng(seed)
    lung, lesion = np.zeros((2, depth, SIZE, SIZE), np.uint8)
    lung[:, 6:18, 3:11] = 1
    lung[:, 6:16, 14:20] = 1
    lesion[:, 7:10, 4:7] = 1
    lesion[:, 12:14, 15:17] = 2
    hu = np.full(lung.shape, -1000, np.int16)
    hu[:, 2:22, 1:23] = 40
    hu[lung == 1], hu[lesion == 1], hu[lesion == 2] = -850, -500, 20
    return (hu + rng.integers(-20, 20, hu.shape)).astype(np.int16), lung, lesion


def put_patient(src, number, volumes=None, codes="LPS", spacing=(1, 1, 1)):
    for folder, volume in zip(("rp_im", "rp_lung_msk", "rp_msk"), volumes or body(seed=number), strict=True):
        save(src / folder / f"{number}.nii.gz", volume, codes, spacing)


def run(src, out, *options):
    """Run the command in this process; return split.json."""
    prepare.main([str(src), "--out", str(out), "--size", str(SIZE), *map(str, options)])
    return json.loads((out / "split.json").read_text())


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hu_of(out, name):
    return iio.imread(out / "images" / f"{name}.png").astype(int) - 1024


def map_of(out, name):
    return np.array(Image.open(out / "maps" / f"{name}.png"))


@pytest.fixture
def src(tmp_path):
    """Four patients, 1, 2, 3 and 10, with 6 slices each."""
    for number in (1, 2, 3, 10):
        put_patient(tmp_path / "ct", number)
    return tmp_path / "ct"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# What comes out


def test_image_and_masks_stored_in_other_orders_meet_in_the_files_written(src, out):
    hu, lung, lesion = body(seed=5)
    lesion[4, 8, 5] = 2
    save(src / "rp_im" / "2.nii.gz", hu, "LAS")
    save(src / "rp_lung_msk" / "2.nii.gz", lung, "SRP")
    save(src / "rp_msk" / "2.nii.gz", lesion, "AIL")
    run(src, out)
    np.testing.assert_array_equal(hu_of(out, "P02_S004"), np.maximum(hu[4], -1024))
    np.testing.assert_array_equal(map_of(out, "P02_S004"), np.where(lesion[4], lesion[4] + 1, lung[4]))


def test_left_and_right_lung_become_one_label(src, out):
    hu, lung, lesion = body()
    sides = lung.copy()
    sides[..., 12:] *= 2
    put_patient(src, 1, (hu, sides, lesion))
    put_patient(src, 2, (hu, lung, lesion))
    run(src, out)
    assert 2 in sides
    np.testing.assert_array_equal(map_of(out, "P01_S000"), map_of(out, "P02_S000"))


def test_effusion_is_lung_inside_the_lung_mask_and_background_outside():
    labels = prepare.merge_masks(np.array([0, 0, 0, 1, 1, 2, 1]), np.array([0, 1, 3, 3, 0, 3, 2]))
    assert labels.tolist() == [0, 2, 0, 1, 1, 1, 3]


def test_a_slice_with_effusion_alone_is_no_slice_with_lesion(src, out):
    hu, lung, lesion = body()
    lesion[2] = np.where(lesion[2] > 0, 3, 0)
    put_patient(src, 1, (hu, lung, lesion))
    run(src, out)
    assert not (out / "images" / "P01_S002.png").exists()
    assert (out / "images" / "P01_S003.png").exists()


def test_all_slices_keeps_slices_without_lesion(src, out):
    hu, lung, lesion = body()
    lesion[:5] = 0
    put_patient(src, 1, (hu, lung, lesion))
    run(src, out)
    assert [p.name for p in (out / "images").glob("P01*")] == ["P01_S005.png"]
    run(src, out, "--all-slices", "--overwrite")
    assert len(list((out / "images").glob("P01*"))) == 6


def test_grey_levels_are_mapped_back_to_hu_and_the_summary_says_so(src, out, capsys):
    hu, lung, lesion = body()
    grey = np.clip(np.rint((hu + 1250.0) * (255 / 1500)), 0, 255).astype(np.uint8)
    put_patient(src, 2, (grey, lung, lesion))
    put_patient(src, 3, (hu, lung, lesion))
    split = run(src, out)
    assert np.abs(hu_of(out, "P02_S001") - hu[1].clip(-1024)).max() <= 4  # one grey level is 5.9 HU
    np.testing.assert_array_equal(hu_of(out, "P03_S001"), hu[1].clip(-1024))
    assert "mapped back to -1250..250 HU in volumes 2\n" in capsys.readouterr().out
    assert split["drawn"]["grey_volumes"] == ["2"]
    run(src, out, "--grey-window", -1024, 1000, "--overwrite", "--unchecked")
    np.testing.assert_array_equal(hu_of(out, "P02_S001"), np.rint(-1024 + grey[1] * (2024 / 255)))


def test_a_volume_with_a_last_axis_of_one_is_read(src, out):
    path = src / "rp_im" / "1.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[..., None], image.affine), path)
    run(src, out)
    np.testing.assert_array_equal(hu_of(out, "P01_S000"), body(seed=1)[0][0].clip(-1024))


def test_shrinking_averages_hu_without_overshoot_and_keeps_labels_whole():
    hu = np.full((96, 96), -1000, np.float32)
    hu[:, ::4] = 0  # finer than the target can show: its mean must stay
    shrunk = prepare.fit(hu, np.ones(2), 24, fill=-1024)
    assert np.abs(shrunk[:, 2:-2] + 750).max() < 10
    step = np.where(np.arange(96) < 50, -1000, 400).astype(np.float32)[None].repeat(96, 0)
    for size in (20, 37, 200):
        assert prepare.fit(step, np.ones(2), size, fill=-1024).min() == -1000
        assert prepare.fit(step, np.ones(2), size, fill=-1024).max() == 400
        labels = prepare.fit(np.where(step > 0, 3, 1).astype(np.uint8), np.ones(2), size, fill=0)
        assert set(np.unique(labels)) == {1, 3}
        assert labels.dtype == np.uint8


def test_slices_that_are_not_square_keep_their_proportions_in_mm():
    labels = np.ones((24, 12), np.uint8)
    padded = prepare.fit(labels, np.ones(2), 24, fill=0)
    assert padded[:, 6:18].all()
    assert padded.sum() == 24 * 12
    assert prepare.fit(labels, np.array([1, 2]), 24, fill=0).all()  # 24 mm x 24 mm


# The split


@pytest.mark.parametrize("seed", range(3))
def test_by_patient_no_patient_stands_on_two_sides(src, out, seed):
    split = run(src, out, "--split", "12,6,6", "--seed", seed)
    sides = [{name.split("_")[0] for name in split[side]} for side in ("train", "test", "seg_test")]
    assert [len(side) for side in sides] == [2, 1, 1]
    assert set.union(*sides) == {"P01", "P02", "P03", "P10"}
    assert [len(split[side]) for side in ("train", "test", "seg_test")] == [12, 6, 6]


@pytest.mark.parametrize("targets", [(200, 40, 45), (150, 100, 35), (12, 260, 13), (95, 95, 95)])
def test_by_patient_the_counts_are_the_nearest_that_whole_patients_allow(targets):
    sizes = (50, 38, 9, 57, 53, 11, 67)  # 285 slices
    kept = [(patient, z) for patient, size in enumerate(sizes) for z in range(size)]
    drawn = prepare.split_by_patient(kept, list(targets), np.random.default_rng(0))
    reached = np.abs(np.subtract([len(side) for side in drawn], targets)).sum()
    ways = (np.bincount(way, sizes, 3) for way in itertools.product(range(3), repeat=len(sizes)) if len(set(way)) == 3)
    assert reached == min(np.abs(counts - targets).sum() for counts in ways)


@pytest.mark.parametrize("seed", range(5))
def test_by_patient_two_parts_have_no_use_for_the_third_count(seed):
    kept = [(1, z) for z in range(5)] + [(2, z) for z in range(10)]
    train, test, seg_test = prepare.split_by_patient(kept, [100, 50, 300], np.random.default_rng(seed))
    assert (len(train), len(test)) == (10, 5)
    assert seg_test == test


def test_by_patient_targets_are_scaled_to_the_slices_there_are(src, out):
    split = run(src, out, "--split", "300,150,150")
    assert [len(split[side]) for side in ("train", "test", "seg_test")] == [12, 6, 6]


def test_by_patient_two_patients_make_seg_test_the_test_set(tmp_path, out, capsys):
    for number in (1, 2):
        put_patient(tmp_path / "ct", number)
    split = run(tmp_path / "ct", out)
    assert split["seg_test"] == split["test"]
    assert len(split["train"]) == len(split["test"]) == 6
    assert "seg_test is test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "counts", "shared"),
    [
        ("10,5,5", (10, 5, 5), False),  # of 24: four are left out
        ("14,5,5", (14, 5, 5), False),
        ("14,5,6", (14, 5, 5), True),  # one too few for three parts
        ("14,10,0", (14, 10, 10), True),
        ("300,100,100", (18, 6, 6), True),  # too few even for two: in proportion
    ],
)
def test_by_slice_counts_are_exact_or_seg_test_is_test(src, out, capsys, asked, counts, shared):
    split = run(src, out, "--by", "slice", "--split", asked)
    sides = [set(split[side]) for side in ("train", "test", "seg_test")]
    assert tuple(map(len, sides)) == counts
    assert not sides[0] & (sides[1] | sides[2])
    assert (sides[1] == sides[2]) == shared
    assert shared or not sides[1] & sides[2]
    assert ("seg_test is test" in capsys.readouterr().out) == shared
    assert {path.stem for path in (out / "images").iterdir()} == set.union(*sides)
    assert {path.stem for path in (out / "maps").iterdir()} == set.union(*sides)


def test_another_seed_draws_other_slices(src, tmp_path):
    options = "--by", "slice", "--split", "10,5,5", "--seed"
    assert run(src, tmp_path / "a", *options, 0)["train"] != run(src, tmp_path / "b", *options, 1)["train"]


def test_an_excluded_patient_is_neither_read_nor_written(src, out):
    (src / "rp_msk" / "3.nii.gz").unlink()
    split = run(src, out, "--exclude-patient", 3)
    assert {name.split("_")[0] for side in ("train", "test", "seg_test") for name in split[side]} == {
        "P01",
        "P02",
        "P10",
    }
    assert split["drawn"]["excluded"] == ["3"]


def test_patient_n_is_number_n_and_they_are_in_numerical_order(src, out):
    split = run(src, out)
    assert split["drawn"]["patients"] == {"1": ["1"], "2": ["2"], "3": ["3"], "10": ["10"]}
    assert list(split["drawn"]["patients"]) == ["1", "2", "3", "10"]


def test_the_summary_counts_patients_slices_and_pixels_of_each_side(src, out, capsys):
    split = run(src, out, "--split", "12,6,6")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for side in ("train", "test", "seg_test"):
        pixels = sum(np.bincount(map_of(out, name).ravel(), minlength=4) for name in split[side])
        patients = {name.split("_")[0] for name in split[side]}
        assert rows[side] == [str(n) for n in (len(patients), len(split[side]), *pixels)]


# Running again, and being stopped


def test_the_same_arguments_give_the_same_bytes(src, out, tmp_path):
    run(src, out)
    first = files(out)
    run(src, out)
    assert files(out) == first
    run(src, tmp_path / "elsewhere")
    assert files(tmp_path / "elsewhere") == first
    assert {"split.json", "contact_sheet.png", "images/P10_S005.png", "maps/P10_S005.png"} <= set(first)
    assert str(tmp_path).encode() not in first["split.json"]


@pytest.mark.parametrize("survived", [0, 7, 48])
def test_an_interrupted_run_leaves_no_half_written_file_and_can_be_run_again(src, out, tmp_path, monkeypatch, survived):
    run(src, tmp_path / "whole")
    whole, write, written = files(tmp_path / "whole"), Path.write_bytes, []

    def stop_halfway(path, content):
        if len(written) == survived:
            write(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        written.append(path)
        return write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", stop_halfway)
        run(src, out)
    left = files(out)
    assert left.pop(".unfinished") == b""
    assert len(left) == survived
    assert "split.json" not in left
    assert left.items() <= whole.items()
    run(src, out)
    assert files(out) == whole


def test_an_interrupted_overwrite_does_not_leave_the_older_split(src, out, monkeypatch):
    run(src, out, "--by", "slice", "--split", "4,2,2")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "write_image", stop)
        run(src, out, "--overwrite")
    assert not (out / "split.json").exists()


def test_what_a_killed_run_left_is_cleared_away(src, out):
    run(src, out)
    whole = files(out)
    (out / "images" / ".P01_S000.png.123.tmp").write_bytes(b"half")
    (out / ".contact_sheet.png.123.tmp").write_bytes(b"half")
    run(src, out)
    assert files(out) == whole


def test_another_set_in_out_is_refused_until_overwrite_and_then_leaves_nothing(src, out, tmp_path):
    options = "--by", "slice", "--split", "4,2,2", "--seed"
    run(src, out, *options, 0)
    before = files(out)
    with pytest.raises(Mistake, match="--overwrite"):
        run(src, out, *options, 1)
    assert files(out) == before
    run(src, out, *options, 1, "--overwrite")
    run(src, tmp_path / "fresh", *options, 1)
    assert files(out) == files(tmp_path / "fresh")


def test_the_same_slices_drawn_otherwise_are_refused(src, out):
    run(src, out)
    with pytest.raises(Mistake, match="of another set"):
        run(src, out, "--all-slices")


def test_a_file_that_is_not_of_the_set_is_refused_and_never_removed(src, out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(Mistake, match=r"notes\.txt"):
        run(src, out)
    run(src, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"


def test_out_that_is_a_file_is_named(src, out):
    out.write_text("mine")
    with pytest.raises(Mistake, match=f"^{out}: "):
        run(src, out)


# Bad input: one clear line each


def change(path, function):
    """Save a volume again with its stored values changed."""
    image = nib.load(path)
    changed = function(np.asanyarray(image.dataobj))
    nib.save(nib.Nifti1Image(changed, image.affine), path)


def with_voxel(value, dtype=np.uint8):
    def function(stored):
        stored = stored.astype(dtype)
        stored[5, 7, 3] = value
        return stored

    return function


def spoil_the_checksum(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 0xFF
    path.write_bytes(content)


def spoil_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 99] = b"\xff" * 99
    path.write_bytes(content)


BAD_FILES = {
    "a missing lung mask": ("rp_lung_msk/2.nii.gz", Path.unlink, "missing"),
    "a missing lesion mask": ("rp_msk/10.nii.gz", Path.unlink, "missing"),
    "a lesion mask of another shape": ("rp_msk/2.nii.gz", lambda p: change(p, lambda v: v[:, :-4]), "(24, 20, 6)"),
    "a lung mask of fewer slices": ("rp_lung_msk/2.nii.gz", lambda p: change(p, lambda v: v[..., 1:]), "(24, 24, 5)"),
    "lesion label 4": ("rp_msk/3.nii.gz", lambda p: change(p, with_voxel(4)), "unknown label 4 at voxel (5, 7, 3)"),
    "lesion label 255": ("rp_msk/3.nii.gz", lambda p: change(p, with_voxel(255)), "unknown label 255"),
    "lesion label -1": ("rp_msk/3.nii.gz", lambda p: change(p, with_voxel(-1, np.int16)), "unknown label -1"),
    "lesion label 0.5": ("rp_msk/3.nii.gz", lambda p: change(p, with_voxel(0.5, np.float32)), "unknown label 0.5"),
    "lung label 3": ("rp_lung_msk/1.nii.gz", lambda p: change(p, with_voxel(3)), "unknown label 3"),
    "a truncated volume": ("rp_im/2.nii.gz", lambda p: p.write_bytes(p.read_bytes()[:-400]), "cut short or damaged"),
    "a truncated mask": ("rp_msk/2.nii.gz", lambda p: p.write_bytes(p.read_bytes()[:-20]), "cut short or damaged"),
    "a damaged volume": ("rp_im/2.nii.gz", spoil_the_middle, "cut short or damaged"),
    "a volume of another checksum": ("rp_im/2.nii.gz", spoil_the_checksum, "cut short or damaged"),
    "an empty file": ("rp_im/2.nii.gz", lambda p: p.write_bytes(b""), "no NIfTI"),
    "a text file": ("rp_im/2.nii.gz", lambda p: p.write_text("hello"), "no NIfTI"),
    "a gzipped text file": ("rp_im/2.nii.gz", lambda p: p.write_bytes(gzip.compress(b"hello" * 999)), "no NIfTI"),
    "a series in time": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: np.stack([v, v], 3)), "no 3-D volume"),
    "a flat picture": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v[..., 0]), "no 3-D volume"),
    "no number in the lung": ("rp_im/2.nii.gz", lambda p: change(p, with_voxel(np.nan, np.float32)), "inside the lung"),
    "infinite values": ("rp_im/2.nii.gz", lambda p: change(p, with_voxel(np.inf, np.float32)), "neither HU"),
    "values above 255 and no air": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v + 1024), "neither HU"),
}


@pytest.mark.parametrize(("file", "spoil", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_in_one_line_before_anything_is_written(src, out, file, spoil, complaint):
    spoil(src / file)
    with pytest.raises(Mistake) as error:
        run(src, out)
    message = str(error.value)
    assert message.startswith(f"{src / file}: ")
    assert complaint in message
    assert "\n" not in message
    assert not out.exists()


BAD_CALLS = {
    "an excluded patient that is not there": (["--exclude-patient", 7], "7.nii.gz: not there"),
    "every patient excluded": (["--exclude-patient", 1, 2, 3, 10], "no slice left"),
    "one patient left to split by patient": (["--exclude-patient", 1, 2, 3], "patient 10 .* --by slice"),
    "two counts": (["--split", "300,73"], "--split 300,73: "),
    "counts that are no numbers": (["--split", "a,b,c"], "--split a,b,c: "),
    "no slice for training": (["--split", "0,73,73"], "--split 0,73,73: "),
    "a window upside down": (["--grey-window", 250, -1250], "--grey-window"),
}


@pytest.mark.parametrize(("options", "complaint"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_mistaken_option_is_told_in_one_line(src, out, options, complaint):
    with pytest.raises(Mistake, match=complaint) as error:
        run(src, out, *options)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_no_slice_left_after_selection_names_the_folder_and_the_option(tmp_path, out):
    hu, lung, lesion = body()
    put_patient(tmp_path / "ct", 1, (hu, lung, lesion * 0))
    with pytest.raises(Mistake, match=f"^{tmp_path / 'ct'}: no slice left .*--all-slices"):
        run(tmp_path / "ct", out)


def test_one_slice_cannot_be_split(tmp_path, out):
    put_patient(tmp_path / "ct", 1, body(depth=1))
    with pytest.raises(Mistake, match="only one slice"):
        run(tmp_path / "ct", out, "--by", "slice")


def test_an_empty_and_a_missing_folder_are_named(tmp_path, out):
    with pytest.raises(Mistake, match=f"^{tmp_path / 'ct' / 'rp_im'}: no such folder"):
        run(tmp_path / "ct", out)
    (tmp_path / "ct" / "rp_im").mkdir(parents=True)
    with pytest.raises(Mistake, match=f"^{tmp_path / 'ct' / 'rp_im'}: holds no volume"):
        run(tmp_path / "ct", out)


def test_a_mask_without_a_volume_is_warned_of(src, out, capsys):
    (src / "rp_im" / "10.nii.gz").unlink()
    run(src, out)
    warnings = capsys.readouterr().err.splitlines()
    assert [
        f"{src / folder / '10.nii.gz'}: " in line
        for folder, line in zip(("rp_lung_msk", "rp_msk"), warnings, strict=True)
    ]


def test_from_the_shell_a_mistake_is_one_line_and_status_2(src, out):
    (src / "rp_msk" / "2.nii.gz").unlink()
    command = [sys.executable, REPO / "data" / "prepare.py", src, "--out", out]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {src / 'rp_msk' / '2.nii.gz'}: missing")
    assert result.stderr.count("\n") == 1


# Real volumes


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real CT in {REAL}; COVIDGAN_CT names another folder")
def test_a_real_volume_stored_upside_down_comes_out_with_the_spine_below_and_the_heart_on_the_right(tmp_path, out):
    for folder in ("rp_im", "rp_lung_msk", "rp_msk"):
        (tmp_path / "ct" / folder).mkdir(parents=True)
        (tmp_path / "ct" / folder / "3.nii.gz").symlink_to(REAL / folder / "3.nii.gz")
    prepare.main([str(tmp_path / "ct"), "--out", str(out), "--by", "slice", "--size", "128", "--split", "30,5,0"])
    names = [path.stem for path in sorted((out / "images").iterdir())]
    hu = np.stack([hu_of(out, name) for name in names])
    lung = np.stack([map_of(out, name) for name in names]) > 0
    bone, inside = hu > 300, np.argwhere(lung).mean(0)
    assert np.argwhere(bone).mean(0)[1] > inside[1] + 5  # rows: the spine lies behind the lungs
    centre = np.argwhere(bone)[:, 2].mean()
    columns = np.arange(128)
    assert (
        lung[..., columns < centre].sum() > 1.1 * lung[..., columns > centre].sum()
    )  # the heart takes room on the left
