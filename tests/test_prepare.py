"""`data/prepare.py` on small synthetic volumes; the last test looks at real ones where they are at hand."""

import itertools
import json
import os
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, files
from PIL import Image
from test_volumes import stored_as

from data import phantom, prepare
from data.lungs import find_lungs
from data.slices import Mistake

REAL = Path(os.environ.get("COVIDGAN_CT", ROOT.parent / "shared" / "ct"))
SIZE = 24


def save(path, volume, codes="LPS", spacing=(1, 1, 1)):
    """Save [Z, H, W] in display in any storage order; the same voxel is at the same place, whatever the order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(*stored_as(volume, codes, spacing, (0, 0, 0))), path)


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
    """Run the command in this process, to the end without an error; return split.json."""
    assert prepare.main([str(src), "--out", str(out), "--size", str(SIZE), *map(str, options)]) == 0
    return json.loads((out / "split.json").read_text())


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
    lesion[4, 10, 2:5] = 3  # effusion: lung inside the lung mask, background outside
    save(src / "rp_im" / "2.nii.gz", hu, "LAS")
    save(src / "rp_lung_msk" / "2.nii.gz", lung, "SRP")
    save(src / "rp_msk" / "2.nii.gz", lesion, "AIL")
    run(src, out)
    np.testing.assert_array_equal(hu_of(out, "P02_S004"), np.maximum(hu[4], -1024))
    np.testing.assert_array_equal(map_of(out, "P02_S004"), np.where(lesion[4] % 3, lesion[4] + 1, lung[4]))


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


def test_shrinking_averages_hu_within_their_range_and_keeps_labels_whole():
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


@pytest.mark.parametrize("targets", [(200, 40, 45), (150, 100, 35), (12, 260, 13), (95, 95, 95)])
def test_by_patient_the_counts_are_the_nearest_that_whole_patients_allow(targets):
    sizes = (50, 38, 9, 57, 53, 11, 67)  # 285 slices
    kept = [(patient, z) for patient, size in enumerate(sizes) for z in range(size)]
    drawn = prepare.split_by_patient(kept, list(targets), np.random.default_rng(0))
    reached = np.abs(np.subtract([len(side) for side in drawn], targets)).sum()
    ways = (np.bincount(way, sizes, 3) for way in itertools.product(range(3), repeat=len(sizes)) if len(set(way)) == 3)
    assert reached == min(np.abs(counts - targets).sum() for counts in ways)


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


# Running again, and being stopped


def test_another_set_in_out_is_refused_until_overwrite_and_then_leaves_nothing(src, out, tmp_path):
    options = "--by", "slice", "--split", "4,2,2", "--seed"
    run(src, out, *options, 0)
    before = files(out)
    run(src, out, *options, 0)  # the same again
    assert files(out) == before and str(tmp_path).encode() not in before["split.json"]
    with pytest.raises(Mistake, match="--overwrite"):
        run(src, out, *options, 1)
    assert files(out) == before
    run(src, out, *options, 1, "--overwrite")
    run(src, tmp_path / "fresh", *options, 1)
    assert files(out) == files(tmp_path / "fresh")


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


BAD_FILES = {
    "a lesion mask of another shape": ("rp_msk/2.nii.gz", lambda p: change(p, lambda v: v[:, :-4]), "(24, 20, 6)"),
    "lesion label 4": ("rp_msk/3.nii.gz", lambda p: change(p, with_voxel(4)), "label 4 at voxel (5, 7, 3)"),
    "lung label 6": ("rp_lung_msk/1.nii.gz", lambda p: change(p, with_voxel(6)), "label 6"),
    "a truncated volume": ("rp_im/2.nii.gz", lambda p: p.write_bytes(p.read_bytes()[:-400]), ""),
    "no number at all": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v * np.float32(np.nan)), ""),
    "HU + 1024": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v + 1024), "intercept"),
    "the intercept twice": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v - 1024), "lost"),
    "too dense by 500": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v + 500), "mean -35"),
    "lesions like lung": ("rp_msk/2.nii.gz", lambda p: change(p, lambda v: np.roll(v, 3, 1)), "label 2"),
    "HU / 1000": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v / np.float32(1000)), "no HU"),
    "z-scores": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: (v + 500) / np.float32(450)), "no HU"),
    "columns reversed": ("rp_im/2.nii.gz", lambda p: change(p, lambda v: v[::-1]), "turned"),
}


@pytest.mark.parametrize(("file", "spoil", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_in_one_line_before_anything_is_written(src, out, file, spoil, complaint):
    spoil(src / file)
    with pytest.raises(Mistake) as error:
        run(src, out)
    (message,) = error.value.args
    assert message.startswith(f"{src / file}: ")
    assert complaint in message
    assert "\n" not in message
    assert not out.exists()


BAD_CALLS = {
    "one patient to split by patient": (["--patient", "()"], "--patient"),
    "two counts": (["--split", "300,73"], "--split 300,73"),
    "no slice for training": (["--split", "0,73,73"], "--split 0,73,73"),
    "a window upside down": (["--grey-window", 250, -1250], "--grey-window"),
    "a window that is no number": (["--grey-window", "nan", 250], "--grey-window"),
    "an abbreviation": (["--over"], "--over"),
}


@pytest.mark.parametrize(("options", "complaint"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_mistaken_option_is_told_in_one_line(src, out, options, complaint):
    with pytest.raises(Mistake, match=complaint) as error:
        run(src, out, *options)
    assert "\n" not in error.value.args[0]
    assert not out.exists()


# What the numbers of a CT mean


def test_what_is_judged_can_be_overruled_and_is_told_at_the_end(src, out, capsys):
    hu, lung, lesion = body()
    put_patient(src, 2, (hu, lung[:, :, ::-1], lesion[:, :, ::-1]))
    run(src, out, "--unchecked")
    assert "error: " in capsys.readouterr().out and (out / "split.json").exists()


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_padding_is_air_and_does_not_darken_its_neighbours_when_resized(src, out, padding):
    hu, lung, lesion = body()
    rows = []
    for value in (padding, -1024):
        hu[:, :2] = value
        put_patient(src, 2, (hu, lung, lesion))
        prepare.main([str(src), "--out", str(out), "--size", str(2 * SIZE), "--overwrite"])
        rows.append(hu_of(out, "P02_S001"))
    assert (rows[0][:3, 10:-10] == -1024).all() and rows[0][4, 24] > -850  # the body's first row, blended with air
    assert np.array_equal(*rows)


# Other public sets


def put_named(folder, names, ending="{}.nii.gz", **volumes):
    for number, name in enumerate(names):
        for part, volume in zip(("ct", "lung", "lesion"), volumes.get(name) or body(seed=number), strict=True):
            save(folder / part / ending.format(name), volume)


def run_named(folder, out, *options, lungs=True):
    prepare.main(
        ["--images", str(folder / "ct"), "--lesions", str(folder / "lesion"), "--out", str(out), "--size", str(SIZE)]
        + (["--lungs", str(folder / "lung")] if lungs else [])
        + [str(option) for option in options]
    )
    return json.loads((out / "split.json").read_text())


PARTS = {"images": "ct", "lungs": "lung", "lesions": "lesion"}
PUBLIC = [
    "coronacases_001", "coronacases_002", "radiopaedia_10_85902_1", "radiopaedia_10_85902_3",
    "radiopaedia_29_86490_1", "radiopaedia_29_86491_1", "radiopaedia_4_85506_1",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_scans_of_one_patient_are_one_patient_and_never_on_two_sides(tmp_path, out, seed):
    put_named(tmp_path, PUBLIC)
    split = run_named(tmp_path, out, "--seed", seed)
    assert split["drawn"]["patients"] == {
        "1": PUBLIC[:1], "2": PUBLIC[1:2], "3": PUBLIC[2:4], "4": PUBLIC[4:6], "5": PUBLIC[6:]
    }  # fmt: skip
    sides = [{name.split("_")[0] for name in split[side]} for side in ("train", "test", "seg_test")]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 5
    assert len(list((out / "images").iterdir())) == 7 * 6
    second = body(seed=3)[0]
    for z in range(6):  # the second scan goes on where the first ended
        np.testing.assert_array_equal(hu_of(out, f"P03_S{6 + z:03d}"), second[z].clip(-1024))


def test_the_part_of_a_name_that_tells_the_patient_is_an_option(tmp_path, out):
    put_named(tmp_path, ["a-before-x", "b-before", "a-after-x", "c-before"])
    split = run_named(tmp_path, out, "--patient", "([a-z])-")
    assert split["drawn"]["patients"] == {"1": ["a-after-x", "a-before-x"], "2": ["b-before"], "3": ["c-before"]}
    with pytest.raises(Mistake, match=r"--patient \(\[a-b\]\)-: does not match c-before"):
        run_named(tmp_path, out, "--patient", "([a-b])-")
    stars = [f"--{what}={tmp_path}/{part}/*-before.nii.gz" for what, part in PARTS.items()]
    assert run_named(tmp_path, out, *stars, "--overwrite")["drawn"]["patients"] == {"1": ["b"], "2": ["c"]}


def test_volumes_without_masks_can_be_left_out_with_a_word(tmp_path, out, capsys):
    put_named(tmp_path, ["a", "b_1", "c", "d"])
    (tmp_path / "lesion" / "b_1.nii.gz").unlink()
    split = run_named(tmp_path, out, "--masked-only")
    assert [*split["drawn"]["patients"].values()] == [["a"], ["c"], ["d"]]
    assert "3 of 4 volumes have masks" in capsys.readouterr().out


def test_one_volume_that_stacks_slices_is_split_by_slice_alone(tmp_path, out):
    put_named(tmp_path, ["tr"], tr=body(depth=10))
    with pytest.raises(Mistake, match=r"patient 1 .* --by slice"):
        run_named(tmp_path, out)
    split = run_named(tmp_path, out, "--by", "slice", "--split", "6,2,2")
    sides = [{*split[side]} for side in ("train", "test", "seg_test")]
    assert [len(side) for side in sides] == [6, 2, 2] and len(set.union(*sides)) == 10


def put_masks(folder, of):
    """Masks made of those of lungs and of lesions, in folder/wrong."""
    for path in (folder / "lung").iterdir():
        lung, lesion = (nib.load(folder / part / path.name) for part in ("lung", "lesion"))
        masks = of(np.asanyarray(lung.dataobj), np.asanyarray(lesion.dataobj)).astype(np.uint8)
        (folder / "mine").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(masks, lung.affine), folder / "mine" / path.name)
    return str(folder / "mine")


LUNGS = {
    "255": lambda lung, _: lung * 255,
    "two": lambda lung, _: lung * (1 + (np.arange(SIZE) > 11)[:, None, None]),
    "lobes": lambda lung, _: lung * 5,
}


@pytest.mark.parametrize("kind", [*LUNGS, "labels 0 to 3"])
def test_lungs_of_any_number_and_labels_in_one_mask_give_the_same_slices(tmp_path, out, kind):
    put_named(tmp_path, ["a", "b", "c"])
    run_named(tmp_path, tmp_path / "usual")
    if kind in LUNGS:
        run_named(tmp_path, out, "--lungs", put_masks(tmp_path, LUNGS[kind]), lungs=False)
    else:
        labels = put_masks(tmp_path, lambda lung, lesion: np.where(lesion, lesion + 1, lung))
        prepare.main(["--images", f"{tmp_path}/ct", "--labels", labels, "--out", str(out), "--size", str(SIZE)])
        assert json.loads((out / "split.json").read_text())["drawn"]["labels"] == "mine"
        with pytest.raises(Mistake, match="--labels"):
            run_named(tmp_path, out, "--labels", labels)
    assert pictures(out) == pictures(tmp_path / "usual")


def binary(seed):
    """A body whose lesion mask holds 0 and 1, and what is consolidation in truth."""
    hu, lung, lesion = body(seed=seed)
    dense = lesion == 2
    dense[:, 8:15, 15:19] = True
    hu[dense] = 20
    return (hu, lung, ((lesion > 0) | dense).astype(np.uint8)), dense


def test_masks_that_tell_no_consolidation_need_a_word(tmp_path, out, capsys):
    names = ["a", "b", "c"]
    put_named(tmp_path, names, **{name: binary(i)[0] for i, name in enumerate(names)})
    with pytest.raises(Mistake, match=r"lesion/a\.nii\.gz: mean -\d+ HU.*--binary"):
        run_named(tmp_path, out)
    with pytest.raises(Mistake, match=r"lesion: no mask holds a 2.*--binary.*--no-binary"):
        run_named(tmp_path, out, "--unchecked")
    split = run_named(tmp_path, out, "--no-binary", "--unchecked")
    assert set(np.unique(map_of(out, "P01_S000"))) == {0, 1, 2}
    assert split["drawn"]["consolidation_above"] is None
    run_named(tmp_path, out, "--binary", "--overwrite")
    assert "consolidation is above -400 HU" in capsys.readouterr().out
    (_, _, lesion), dense = binary(0)
    parted = map_of(out, "P01_S000")
    assert set(parted[lesion[0] > 0]) == {2, 3}
    assert (parted[9:14, 16:18] == 3).all() and (parted[7:10, 4:7] == 2).all() and dense[0, 9:14, 16:18].all()
    split = run_named(tmp_path, out, "--binary", "--consolidation-above", 200, "--overwrite", "--unchecked")
    assert 3 not in map_of(out, "P01_S000") and split["drawn"]["consolidation_above"] == 200


# Lungs found in the CT


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def chest():
    """A whole chest with air around it: HU [Z, H, W], labels, 1.4 mm a pixel."""
    patient = phantom.draw_patient(0, 1)
    planes = [phantom.draw_slice(patient, level, 256) for level in np.linspace(0.9, 0.1, 10)]
    hu, labels = (np.stack(each) for each in zip(*planes, strict=True))
    return hu.clip(-1024).astype(np.int16), labels, np.array([1.4, 1.4])


@pytest.mark.parametrize("padding", [-1024, -2000, -3024])
@pytest.mark.parametrize("fill", [None, -1000, -1024])
def test_the_lungs_are_found_in_a_round_field_and_in_a_crop_that_is_filled(chest, padding, fill):
    hu, labels, millimetres = chest
    y, x = np.mgrid[:256, :256] - 127.5
    if fill is not None:  # all but the box of the lungs
        rows, columns = (np.flatnonzero((labels > 0).any(axes)) for axes in ((0, 2), (0, 1)))
        crop = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        box = np.full_like(hu, fill)
        box[crop] = hu[crop]
        hu = box
    hu = np.where(np.hypot(x, y) < 127, hu, padding)
    assert dice(find_lungs(hu, labels > 1, millimetres), labels > 0) > 0.95


def test_table_windpipe_and_stomach_gas_are_no_lung(chest):
    hu, labels, millimetres = (each.copy() for each in chest)
    hu[:, 235:245, 40:220], hu[:, [234, 245], 40:220] = -950, 100  # foam in a thin shell
    air = hu < -900
    lungs = find_lungs(hu, labels > 1, millimetres)
    assert not lungs[:, 230:].any()
    assert np.mean(lungs[air & (labels == 0)]) < 0.02
    assert dice(lungs, labels > 0) > 0.97


def test_lungs_auto_is_said_and_recorded(tmp_path, out, chest, capsys):
    hu, labels, _ = chest
    for name, planes in {"a": np.s_[:5], "b": np.s_[5:]}.items():
        save(tmp_path / "ct" / f"{name}.nii.gz", hu[planes], spacing=(1.4, 1.4, 5))
        save(tmp_path / "lesion" / f"{name}.nii.gz", (labels[planes].clip(1) - 1), spacing=(1.4, 1.4, 5))
    split = run_named(tmp_path, out, "--lungs", "auto", "--size", 256, lungs=False)
    assert split["drawn"]["lungs"] == "auto"
    written = np.stack([map_of(out, path.stem) for path in sorted((out / "maps").iterdir())])
    kept = labels[(labels > 1).any((1, 2))]
    assert dice(written > 0, kept > 0) > 0.97
    np.testing.assert_array_equal(written > 1, kept > 1)


# Real volumes


def pictures(out):
    return {name: content for name, content in files(out).items() if name.endswith(".png")}


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real CT in {REAL}; COVIDGAN_CT names another folder")
@pytest.mark.parametrize("volume", ["3", "11", "12"])  # much consolidation, grey levels, much ground glass
def test_the_lungs_found_in_real_crops_are_those_that_radiologists_drew(volume):
    args = prepare.parse_arguments([str(REAL)])
    scan = prepare.Scan(
        volume, 1, *(REAL / folder / f"{volume}.nii.gz" for folder in ("rp_im", "rp_lung_msk", "rp_msk"))
    )
    hu, labels, millimetres, _ = prepare.read_scan(scan, args, note=str)
    assert dice(find_lungs(hu, labels > 1, millimetres), labels > 0) > 0.97
