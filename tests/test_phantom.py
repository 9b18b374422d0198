"""The phantom against what is known of chest CT, and its folder against what the format promises."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data import phantom
from data.slices import Mistake

DATA = Path(__file__).resolve().parents[1] / "data"

LUNG, GLASS, DENSE = 1, 2, 3


def run(*arguments):
    return subprocess.run([sys.executable, DATA / "phantom.py", *map(str, arguments)], capture_output=True, text=True)


def draw_set(out, workers):
    done = run("--out", out, "--size", 64, "--patients", 4, "--slices", 6, "--workers", workers)
    assert done.returncode == 0, done.stderr
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_set(tmp_path_factory.mktemp("phantom") / "set", workers=1)


@pytest.fixture(scope="module")
def stacks():
    """Ten levels of six patients: (level, HU, labels), 128 x 128."""
    patients = [phantom.draw_patient(0, number) for number in range(1, 7)]
    levels = np.linspace(0.05, 0.95, 10)
    return [[(level, *phantom.draw_slice(patient, level, 128)) for level in levels] for patient in patients]


def pixels_of(stacks, label):
    return np.concatenate([hu[labels == label] for stack in stacks for _, hu, labels in stack])


# ---- the pictures


def test_lung_is_as_dense_as_aerated_lung(stacks):
    assert -900 < np.median(pixels_of(stacks, LUNG)) < -780


def test_labels_of_lesions_agree_with_density(stacks):
    assert -700 < np.median(pixels_of(stacks, GLASS)) < -430
    assert -100 < np.median(pixels_of(stacks, DENSE)) < 60
    assert (pixels_of(stacks, GLASS) > -800).mean() > 0.9  # all of it is denser than healthy lung


def test_no_lesion_is_left_unlabelled(stacks):
    healthy = []
    for stack in stacks:
        for _, hu, labels in stack:
            without_vessels = ndimage.median_filter(hu, 7)
            healthy.append(without_vessels[ndimage.binary_erosion(labels > 0, iterations=6) & (labels == LUNG)])
    assert np.mean(np.concatenate(healthy) > -550) < 0.01


def test_the_back_of_the_lung_is_denser_than_the_front():
    hu, labels = phantom.draw_slice(phantom.draw_patient(0, 2)._replace(lesions=[]), 0.5, 128)
    rows, _ = np.nonzero(labels == LUNG)
    front, back = (np.median(hu[labels == LUNG][side]) for side in (rows < np.median(rows), rows > np.median(rows)))
    assert 15 < back - front < 100


def test_vessels_stay_visible_through_ground_glass():
    glass = []
    for number in range(1, 5):
        patient = phantom.draw_patient(0, number)
        pure = patient._replace(lesions=[lesion._replace(core=2) for lesion in patient.lesions])  # no consolidation
        for level in (0.5, 0.65):
            hu, labels = phantom.draw_slice(pure, level, 128)
            ridges = hu - ndimage.median_filter(hu, 7)
            glass.append(ridges[ndimage.binary_erosion(labels == GLASS)])
    dark, bright = np.percentile(np.concatenate(glass), [2, 98])
    assert bright > 1.6 * -dark  # noise and texture alone reach as far down as up


def test_consolidation_hides_vessels_but_shows_air(stacks):
    inside = [hu[ndimage.binary_erosion(labels == DENSE)] for stack in stacks for _, hu, labels in stack]
    inside = np.concatenate(inside)
    below, above = np.median(inside) - np.percentile(inside, 2), np.percentile(inside, 98) - np.median(inside)
    assert below > 1.5 * above


def test_lungs_are_largest_in_the_middle_of_the_stack(stacks):
    for stack in stacks:
        area = [np.count_nonzero(labels) for _, _, labels in stack]
        assert area[0] < 0.6 * max(area)
        assert area[-1] < 0.8 * max(area)
        assert 3 <= int(np.argmax(area)) <= 7


def test_there_are_two_lungs_at_every_level(stacks):
    for stack in stacks:
        for _, _, labels in stack:
            half = labels.shape[1] // 2
            left, right = np.count_nonzero(labels[:, :half]), np.count_nonzero(labels[:, half:])
            assert 0.3 < left / right < 3


def test_spine_is_at_the_bottom(stacks):
    for stack in stacks:
        for _, hu, labels in stack[2:8]:
            rows, _ = np.nonzero(labels)
            middle = hu[:, 54:74] > 250  # bone about the midline: much spine, little sternum
            assert middle[int(rows.mean()) :].sum() > 3 * middle[: int(rows.mean())].sum()


def test_the_heart_lies_to_the_images_right(stacks):
    """So the lung on the image's right, the patient's left, is the smaller one."""
    ratios = []
    for stack in stacks:
        _, _, labels = stack[6]
        ratios.append(np.count_nonzero(labels[:, 64:]) / np.count_nonzero(labels[:, :64]))
    assert np.mean(ratios) < 0.9


def test_the_liver_rises_on_the_images_left_first():
    """Where the right lung is at one level, the liver stands a little further down; the other side is lung still."""
    patient = phantom.draw_patient(0, 1)
    above, below = (phantom.draw_slice(patient, level, 128)[1] > 0 for level in (0.7, 0.8))
    lost = above & ~below
    assert lost[:, :64].sum() > 3 * lost[:, 64:].sum()


def test_the_trachea_is_air_but_no_lung(stacks):
    for stack in stacks:
        _, hu, labels = stack[2]
        rows, _ = np.nonzero(labels)
        air = (hu < -850) & (labels == 0)
        air[:, :50] = air[:, 78:] = False
        assert 10 < air[rows.min() : rows.max()].sum() < 100  # about 2 cm across


def test_outside_the_body_is_air(stacks):
    for stack in stacks:
        for _, hu, _ in stack:
            assert abs(hu[:6].mean() + 1000) < 10


def test_neighbouring_slices_belong_together(stacks):
    def overlap(a, b):
        return 2 * np.count_nonzero((a > 0) & (b > 0)) / (np.count_nonzero(a) + np.count_nonzero(b))

    own = [overlap(stack[k][2], stack[k + 1][2]) for stack in stacks for k in range(2, 6)]
    other = [overlap(stacks[n][k][2], stacks[n - 1][k + 1][2]) for n in range(len(stacks)) for k in range(2, 6)]
    assert np.mean(own) > 0.85
    assert np.mean(own) > np.mean(other) + 0.02  # patients differ


def test_the_size_changes_the_grid_and_not_the_patient():
    patient = phantom.draw_patient(3, 1)
    large, small = (phantom.draw_slice(patient, 0.6, size)[1] for size in (192, 64))
    assert np.mean(large[1::3, 1::3] == small) > 0.97


def test_lesions_prefer_the_back_and_the_periphery():
    rows, depths = {"lung": [], "lesion": []}, {"lung": [], "lesion": []}
    for number in range(1, 11):
        patient = phantom.draw_patient(1, number)
        for level in (0.4, 0.6, 0.75):
            _, labels = phantom.draw_slice(patient, level, 64)
            lungs = labels > 0
            chest = np.maximum.accumulate(lungs, 1) & np.maximum.accumulate(lungs[:, ::-1], 1)[:, ::-1]
            depth = ndimage.distance_transform_edt(chest)  # below the chest wall
            for name, where in (("lung", lungs), ("lesion", labels > 1)):
                rows[name].extend(np.nonzero(where)[0])
                depths[name].extend(depth[where])
    assert np.mean(rows["lesion"]) > np.mean(rows["lung"]) + 3  # of some 30 rows
    assert np.mean(depths["lesion"]) < 0.85 * np.mean(depths["lung"])


def test_most_slices_hold_lesions_and_some_hold_none(stacks):
    kinds = [labels.max() for stack in stacks for _, _, labels in stack]
    assert 0.6 < np.mean(np.array(kinds) >= GLASS) < 0.98
    assert {LUNG, GLASS, DENSE} <= set(kinds)


def test_consolidation_lies_in_ground_glass(stacks):
    ring = np.zeros(4)
    for stack in stacks:
        for _, _, labels in stack:
            dense = labels == DENSE
            ring += np.bincount(labels[ndimage.binary_dilation(dense) & ~dense], minlength=4)
    assert ring[GLASS] > 3 * ring[LUNG]


def test_noise_power_rises_from_low_frequency_peaks_and_falls():
    water = np.zeros((256, 256), np.float32)
    noise = phantom.scan(water, 1.4, 20, np.random.default_rng(0))
    assert abs(noise.std() - 20) < 1
    power = np.abs(np.fft.fft2(noise)) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))  # turns per pixel
    low, middle, high = (power[np.abs(radius - centre) < 0.03].mean() for centre in (0.03, 0.22, 0.47))
    assert low < 0.2 * middle
    assert high < 0.5 * middle


def test_another_seed_or_number_is_another_patient():
    pictures = [phantom.draw_slice(phantom.draw_patient(*key), 0.5, 64)[1] for key in ((0, 1), (1, 1), (0, 2))]
    assert all(np.mean(a != b) > 0.01 for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True))


def test_a_slice_does_not_depend_on_those_drawn_before():
    patient = phantom.draw_patient(0, 3)
    first, _ = phantom.draw_slice(patient, 0.5, 64)
    phantom.draw_slice(patient, 0.7, 64)
    again, _ = phantom.draw_slice(phantom.draw_patient(0, 3), 0.5, 64)
    assert np.array_equal(first, again)


# ---- the folder


def test_the_number_of_workers_does_not_change_a_byte(folder, tmp_path):
    assert contents(draw_set(tmp_path / "two", workers=2)) == contents(folder)


def test_no_slice_and_no_patient_is_on_two_sides(folder):
    split = json.loads((folder / "split.json").read_text())
    sides = [split[side] for side in ("train", "test", "seg_test")]
    patients = [{name.split("_")[0] for name in side} for side in sides]
    assert all(sides)
    assert sum(map(len, patients)) == len(set.union(*patients)) == 4
    written = sorted(path.stem for path in (folder / "images").iterdir())
    assert sorted(name for side in sides for name in side) == written
    assert written == sorted(path.stem for path in (folder / "maps").iterdir())


@pytest.mark.parametrize(("patients", "counts"), [(3, [1, 1, 1]), (10, [8, 1, 1]), (16, [12, 2, 2]), (50, [40, 5, 5])])
def test_about_a_tenth_of_the_patients_is_for_each_test(patients, counts):
    assert [len(part) for part in phantom.split_patients(patients, seed=0).values()] == counts


def test_the_split_tells_how_it_was_drawn(folder):
    drawn = json.loads((folder / "split.json").read_text())["drawn"]
    assert drawn == {"source": "phantom", "by": "patient", "seed": 0, "size": 64, "patients": 4, "slices": 6}


def test_files_hold_hu_plus_1024_and_palette_labels(folder):
    image = iio.imread(folder / "images" / "P01_S003.png")
    assert image.dtype == np.uint16 and image.shape == (64, 64)
    assert abs(image[:3].mean() - 24) < 25  # air
    assert image.max() > 1024 + 200  # bone
    labels = Image.open(folder / "maps" / "P01_S003.png")
    assert labels.mode == "P" and set(np.unique(labels)) <= {0, 1, 2, 3}


def test_slices_are_numbered_from_the_feet(folder):
    first, last = (np.array(Image.open(folder / "maps" / f"P01_S00{k}.png")) for k in (1, 6))
    assert np.ptp(np.nonzero(first)[1]) > 1.3 * np.ptp(np.nonzero(last)[1])  # the apex is narrow


def test_the_summary_counts_every_pixel(tmp_path):
    done = run("--out", tmp_path / "set", "--size", 64, "--patients", 3, "--slices", 2)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["train", "test", "seg_test"]
    for row in rows:
        assert row[1:3] == ["1", "2"]
        assert sum(map(int, row[3:])) == 2 * 64 * 64


def test_a_complete_set_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run("--out", folder, "--size", 64, "--patients", 4, "--slices", 6)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and str(folder) in done.stdout
    assert "train 2, 12; test 1, 6; seg_test 1, 6" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_what_is_gone_from_a_set_or_was_changed_in_it_is_drawn_again(folder, tmp_path, options):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if options:
        (tmp_path / "maps" / "P01_S001.png").write_bytes(b"by hand")
    else:
        shutil.rmtree(tmp_path / "images")
    phantom.main(["--out", str(tmp_path), "--size", "64", "--patients", "4", "--slices", "6", *options])
    assert contents(tmp_path) == contents(folder)


def test_another_set_is_refused_and_kept(folder):
    before = contents(folder)
    with pytest.raises(Mistake, match=f"{folder}.*--overwrite"):
        phantom.main(["--out", str(folder), "--size", "64", "--patients", "4", "--slices", "5"])
    assert contents(folder) == before


def test_slices_that_no_run_of_ours_left_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "P01_S001.png").write_bytes(b"mine")
    with pytest.raises(Mistake, match="--overwrite"):
        phantom.main(["--out", str(tmp_path)])
    assert (tmp_path / "images" / "P01_S001.png").read_bytes() == b"mine"


def test_what_a_run_that_was_cut_off_left_is_replaced_without_a_question(folder, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    options = ["--out", str(tmp_path), "--size", "64", "--patients", "3", "--slices", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phantom, "write_contact_sheet", stop)
        phantom.main(options)
    assert len(list(tmp_path.glob("images/*.png"))) == 6
    draw_set(tmp_path, workers=1)  # another set
    assert contents(tmp_path) == contents(folder)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(Mistake, match=r"P01_S001\.png: cannot be written \(No space left on device\)"):
            phantom.make_patient(1, seed=0, size=64, count=2, out=tmp_path)
    assert contents(tmp_path) == {}


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path, cli):
    options = ["--out", tmp_path, "--size", 64, "--patients", 3, "--slices", 400, "--workers", 2]
    process = cli.start(*options, script=DATA / "phantom.py")
    while not any(tmp_path.glob("images/*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)  # as the kernel does for want of memory
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told == f"error: {tmp_path}: a worker was killed (out of memory?): give fewer --workers\n"
    assert [*tmp_path.rglob("*.tmp")] == []


def test_overwrite_replaces_the_set_and_leaves_no_old_slice(folder, tmp_path):
    for part in ("images", "maps"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "P09_S001.png").write_bytes(b"of another set")
    (tmp_path / "split.json").write_text('{"drawn": {"seed": 9}}')
    done = run("--out", tmp_path, "--size", 64, "--patients", 4, "--slices", 6, "--overwrite")
    assert done.returncode == 0
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--size", 63),
        ("--patients", 2),
        ("--patients", 0),
        ("--slices", 0),
        ("--seed", -1),
        ("--workers", 0),
        ("--patients", 10**12),
    ],
)
def test_bad_arguments_are_mistakes_that_write_nothing(tmp_path, arguments):
    out = tmp_path / "set"
    with pytest.raises(Mistake, match=arguments[0]):
        phantom.main(["--out", str(out), *map(str, arguments)])
    assert not out.exists()


def test_a_mistake_ends_with_status_2_and_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (("--size", 8), ("--out", tmp_path / "file"), ("--out", tmp_path / "file" / "set")):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
