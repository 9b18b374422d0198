"""Lesions of other maps in real lungs: data/lesions.py by hand-made truth, then infer_onnx.py as a user runs it."""

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, files
from scipy import ndimage
from skimage import io
from test_infer import draw_slice, model  # noqa: F401
from test_infer_volumes import display, save

from data.lesions import paste, place, place_one_of, read_donor
from data.slices import Mistake, read_image, read_map, write_image, write_map

LIBRARY = sorted((ROOT / "models/lesions").glob("*.png"))


def lungs(size=64, low=8, high=56):
    """Two lungs, rectangles in a box of low..high, uint8 [size, size]."""
    labels = np.zeros((size, size), np.uint8)
    middle, gap = (low + high) // 2, (high - low) // 12
    labels[low:high, low : middle - gap], labels[low:high, middle + gap : high] = 1, 1
    return labels


def drawn(seed=0):
    return np.random.default_rng(seed)


def test_a_lesion_lies_in_the_host_s_lungs_where_it_lay_in_the_donor_s_mirrored_or_not():
    donor = lungs(128, 20, 116)  # twice the size, elsewhere
    donor[30:50, 22:42], donor[34:42, 26:34] = 2, 3
    wanted = lungs()
    wanted[13:23, 9:19], wanted[15:19, 11:15] = 2, 3
    wanted[12:24, 8] = 2  # no dark strip of lung is left at the pleura
    found = [place(lungs(), donor, drawn(seed)) for seed in range(20)]
    ways = [sum(np.array_equal(one, way) for one in found) for way in (wanted, wanted[:, ::-1])]
    assert sum(ways) == 20 and min(ways) > 3


def test_only_healthy_lung_changes_and_without_any_or_without_lesion_nothing_does():
    host, donor, rng = lungs(), lungs(), drawn()
    host[20:40, 10:20] = rng.integers(1, 4, (20, 10))
    donor[8:56, 8:56] = rng.integers(1, 4, (48, 48))
    labels = place(host, donor, rng)
    assert np.array_equal(labels[host != 1], host[host != 1])
    assert (labels != host).sum() > 200 and labels.dtype == np.uint8
    for host, ill in ((lungs(), lungs()), (lungs() * 2, donor)):
        assert np.array_equal(place(host, ill, rng), host)


def test_a_volume_s_lesion_is_one_body_across_more_slices_than_the_donor_has():
    donor = np.stack([lungs()] * 6)
    donor[2:4, 25:35, 13:23] = 2
    labels = place(np.stack([lungs()] * 24), donor, drawn())
    assert ndimage.label(labels == 2)[1] == 1
    assert np.flatnonzero((labels == 2).any((1, 2))).tolist() == [*range(8, 16)]  # a third of the height, in the middle


@pytest.fixture
def ill():
    """Real HU, synthetic HU, host, labels: a new lesion at the pleura beside one of the host's own."""
    host = lungs()
    host[8:16, 40:48] = 3
    labels = host.copy()
    labels[16:24, 40:56] = 2
    return draw_slice(host), np.where(labels > 1, -500, -900).astype(np.int16), host, labels


def test_a_new_lesion_has_the_patient_s_density_and_mixes_with_healthy_lung_and_all_else_is_real_bit_for_bit(ill):
    real, _, host, labels = ill
    before, pasted = real.copy(), paste(*ill)
    assert np.array_equal(pasted[labels == host], real[labels == host]) and pasted.dtype == real.dtype
    assert np.array_equal(real, before)
    assert (pasted[18:22, 42:55] == -450).all()  # -500, in lungs of -850, not of -900
    assert (pasted[17:22, 55] == -450).all() and (pasted[16, 44:47] == -450).all()  # at the pleura, at another lesion
    assert (pasted[23, 42:55] == (-450 - 850) / 2).all() and (pasted[18:22, 40] == (-450 - 850) / 2).all()


def test_a_volume_is_pasted_as_its_slices_are_in_one_density(ill):
    real, synthetic, host, labels = (np.stack([part, part]) for part in ill)
    assert np.array_equal(paste(real, synthetic, host, labels)[1], paste(*ill))
    real[1][host[1] == 1] -= 40  # another density in one slice: the median of both is told
    assert (paste(real, synthetic, host, labels)[0][18:22, 42:55] == -470).all()


def test_the_library_has_hundreds_of_slices_of_all_sizes_at_the_pleura_and_deep_of_both_kinds():
    shares, depths, dense = [], [], []
    for path in LIBRARY:
        assert read_map(path).shape == (32 * 128, 128)
        for labels in read_donor(path, 4):
            pieces, count = ndimage.label(labels > 1)
            inside, sizes = ndimage.distance_transform_edt(labels > 0), np.bincount(pieces.ravel())[1:]
            shares += (sizes / max(1, np.count_nonzero(labels))).tolist()
            depths += ndimage.minimum(inside, pieces, range(1, count + 1)).tolist() if count else []
            dense += ndimage.maximum(labels, pieces, range(1, count + 1)).tolist() if count else []
    assert len(shares) > 1000 and sum(path.stat().st_size for path in LIBRARY) < 500_000
    assert np.percentile(shares, 25) < 0.005 and np.percentile(shares, 90) > 0.08
    assert np.mean(np.array(depths) < 2) > 0.2 and np.mean(np.array(depths) > 6) > 0.1
    assert 0.2 < np.mean(np.array(dense) == 3) < 0.8


@pytest.fixture
def donors(tmp_path):
    """A folder of three maps with lesions and one without."""
    (tmp_path / "donors").mkdir()
    for k in range(4):
        labels = lungs()
        if k < 3:
            labels[12 + 8 * k : 20 + 8 * k, 12:22], labels[14 + 8 * k : 18 + 8 * k, 14:18] = 2, 3
        write_map(tmp_path / f"donors/D0{k}_S001.png", labels)
    return tmp_path / "donors"


def test_files_without_lesion_are_passed_over_and_the_host_comes_back_where_there_is_no_room(donors):
    paths, full = sorted(donors.iterdir()), lungs() * 2
    assert all((place_one_of(lungs(), paths, 4, drawn(seed)) > 1).any() for seed in range(8))
    assert place_one_of(full, paths, 4, drawn()) is full
    with pytest.raises(Mistake, match=f"{paths[0]}: label 3"):
        place_one_of(lungs(), paths[:1], 3, drawn())


# ---- the command


@pytest.fixture
def mine(tmp_path):
    """A set of two patients, four slices and a split; the first slice is healthy."""
    names = ["P01_S001", "P01_S002", "P02_S001", "P02_S002"]
    for part in ("maps", "images"):
        (tmp_path / "mine" / part).mkdir(parents=True)
    for k, name in enumerate(names):
        labels = lungs()
        labels[20:30, 44:50] = 2 if k else 1
        write_map(tmp_path / f"mine/maps/{name}.png", labels)
        write_image(tmp_path / f"mine/images/{name}.png", draw_slice(labels, seed=k))
    (tmp_path / "mine/split.json").write_text(json.dumps({"train": names[:2], "test": names[2:]}))
    return tmp_path / "mine"


@pytest.fixture
def more(infer, mine, donors):
    """Run --lesions with --paste lesions: options -> status, OUT, stderr."""
    fixed = [mine, "--complement", mine / "images", "--lesions", donors, "--paste", "lesions", "--variants", 2]
    return lambda *options, **named: infer(*fixed, *options, **named)


def test_new_lesions_come_into_every_slice_all_else_is_the_real_one_and_the_set_is_split_as_its_source(more, mine):
    status, out, _ = more()
    assert status == 0 and len(list((out / "maps").iterdir())) == 8
    for path in (out / "maps").iterdir():
        host, real = (read(mine / f"{part}/{path.stem[:8]}.png") for part, read in READERS.items())
        labels, hu = (read(out / f"{part}/{path.name}") for part, read in READERS.items())
        assert (labels != host).sum() > 20 and np.array_equal(labels[host != 1], host[host != 1])
        assert np.array_equal(hu[labels == host], real[labels == host]) and hu[labels != host].mean() > -750
    names = {side: [f"P0{p}_S00{s}v0{v}" for s in (1, 2) for v in (1, 2)] for p, side in ((1, "train"), (2, "test"))}
    assert json.loads((out / "split.json").read_text()) == names


READERS = {"maps": read_map, "images": read_image}


def test_who_is_held_out_lends_no_lesion(infer, mine):
    write_map(mine / "maps/P02_S001.png", lungs() * 3)
    _, out, _ = infer(mine, "--side", "train", "--lesions", mine / "maps", "--variants", 4)
    assert {*map(int, np.unique([read_map(path) for path in (out / "maps").iterdir()]))} == {0, 1, 2}


def test_lesions_hang_on_name_variant_and_seed_alone_and_a_run_goes_on(more, tmp_path):
    whole = files(more(out="whole")[1])
    for part in ("2/2", "1/2"):
        _, out, _ = more("--shard", part, out="sharded")
    (out / "images/P02_S001v01.png").unlink()
    assert more("--shard", "1/2", out="sharded")[0] == 0 and files(out) == whole
    other = files(more("--seed", 1, out="other")[1])
    assert other.keys() == whole.keys()
    assert sum(other[name] != whole[name] for name in whole if name.startswith("maps")) > 3
    write_map(tmp_path / "donors/D01_S001.png", lungs())
    assert "made otherwise" in more(out="sharded")[2]


def test_without_paste_the_lung_is_the_model_s_and_of_one_side_there_is_no_split(infer, mine, donors):
    _, out, _ = infer(mine, "--side", "train", "--complement", mine / "images", "--lesions", donors)
    assert sorted(path.stem for path in (out / "maps").iterdir()) == ["P01_S001v01", "P01_S002v01"]
    labels, hu = (read(out / f"{part}/P01_S001v01.png") for part, read in READERS.items())
    assert (hu[ndimage.binary_erosion(labels == 1, np.ones((5, 5)))] == -850).all()
    assert np.array_equal(hu[labels == 0], read_image(mine / "images/P01_S001.png")[labels == 0])
    assert not (out / "split.json").exists()


def test_maps_full_of_lesions_are_counted_and_paste_wants_what_it_pastes_and_where(more, infer, mine):
    for options in (["--paste", "lesions"], ["--paste", "lung"], ["--lesions", "--paste", "lesions"]):
        status, out, told = infer(mine, *options)
        assert status == 2 and told.startswith("error: --paste") and not out.exists()
    write_map(mine / "maps/P01_S001.png", lungs() * 2)
    write_image(mine / "images/P01_S001.png", np.where(lungs() > 0, -600, 40))
    status, out, told = more()
    assert status == 0 and "2 slices without lung, or room for lesions, are left out" in told
    assert len(list((out / "images").iterdir())) == 6


# ---- nnU-Net


def check_nnunet(folder, ending, names):
    """dataset.json and the names as nnU-Net v2's documentation has them."""
    told = json.loads((folder / "dataset.json").read_text())
    labels = {"background": 0, "lung": 1, "ground-glass opacity": 2, "consolidation": 3}
    channel = {"channel_names": {"0": "CT"}}  # "CT" makes it normalise by the foreground of all cases
    assert told == {**channel, "labels": labels, "numTraining": len(names), "file_ending": ending}
    assert sorted(path.name for path in (folder / "imagesTr").iterdir()) == [f"{name}_0000{ending}" for name in names]
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == [f"{name}{ending}" for name in names]


def test_nnunet_s_folder_of_slices_is_read_back_as_its_own_reader_of_png_does(more):
    (_, plain, _), (_, out, _) = more(out="plain"), more("--format", "nnunet")
    names = [path.stem for path in sorted((plain / "maps").iterdir())]
    check_nnunet(out, ".png", names)
    for name in names:
        image, labels = (io.imread(out / part) for part in (f"imagesTr/{name}_0000.png", f"labelsTr/{name}.png"))
        assert np.array_equal(image.astype(int) - 1024, read_image(plain / f"images/{name}.png"))
        assert np.array_equal(labels, read_map(plain / f"maps/{name}.png"))  # a palette would be read as colours


@pytest.mark.parametrize("library", [False, True])
def test_volumes_get_lesions_as_volumes_on_the_ct_s_grid_for_nnunet_and_for_prepare(infer, tmp_path, library):
    host, donor = np.stack([lungs()] * 12), np.stack([lungs()] * 6)
    donor[1:5, 20:40, 10:24], donor[2:4, 25:35, 13:20] = 2, 3
    ct = draw_slice(host)
    scan, mask = save(tmp_path / "ct/a.nii.gz", ct, "LPS"), save(tmp_path / "labels/a.nii.gz", host)
    save(tmp_path / "donors/b.nii.gz", donor)
    options = [mask.parent, "--complement", scan.parent, "--paste", "lesions", "--lesions"]
    options += [] if library else [tmp_path / "donors"]
    (status, out, _), (_, plain, _) = infer(*options, "--format", "nnunet"), infer(*options, out="plain")
    assert status == 0
    check_nnunet(out, ".nii.gz", ["av01"])
    paths = [out / "imagesTr/av01_0000.nii.gz", out / "labelsTr/av01.nii.gz"]
    hu, labels = map(display, paths)
    assert np.array_equal(labels[host != 1], host[host != 1]) and (hu != ct).any()
    assert np.array_equal(hu[labels == host], ct[labels == host])
    assert library or (ndimage.label(labels > 1)[1] == 1 and (labels > 1).any((1, 2)).sum() == 8)
    image, truth = map(nib.load, paths)
    assert np.array_equal(image.affine, truth.affine) and np.array_equal(image.affine, nib.load(scan).affine)
    assert image.shape == truth.shape and truth.get_data_dtype() == np.uint8
    for path, same in zip(paths, ("volumes/av01.nii.gz", "labels/av01.nii.gz"), strict=True):
        assert path.read_bytes() == (plain / same).read_bytes()


def test_a_slice_s_lesions_do_not_go_into_a_volume(infer, donors, tmp_path):
    mask = save(tmp_path / "labels/a.nii.gz", np.stack([lungs()] * 4))
    status, _, told = infer(mask, "--lesions", donors)
    assert status == 2 and told.count("error: ") == 1 and "one slice" in told
