"""`python data/check.py FOLDER` on sets with one thing wrong, and check_pair on volumes."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TURNS, draw_chest
from PIL import Image

from data import check, slices
from data.slices import Mistake


def change(toy, names, hu=lambda hu: hu, labels=lambda labels: labels):
    for name in names:
        slices.write_image(toy.folder / "images" / f"{name}.png", hu(toy.hu[name]))
        slices.write_map(toy.folder / "maps" / f"{name}.png", labels(toy.labels[name]))


def split(toy, train, test, seg_test=(), **drawn):
    slices.write_split(toy.folder / "split.json", [*train], [*test], [*seg_test], drawn)


def renamed(palette):
    """Give every map the palette, as another program orders its colours."""

    def spoil(toy):
        for name in toy.labels:
            picture = Image.fromarray(toy.labels[name])
            picture.putpalette(bytes(sum(palette, ())))
            picture.save(toy.folder / "maps" / f"{name}.png")

    return spoil


def sides(labels):
    """The two lungs as two labels."""
    return np.where(labels > 0, 1 + (np.arange(64) > 31), 0).astype(np.uint8)


def shifted(toy):
    """The maps of the first patient, each on the slice of another one."""
    for name, other in zip(toy.train[:6], toy.train[6:12], strict=True):
        slices.write_map(toy.folder / "maps" / f"{name}.png", np.roll(toy.labels[other], 20, 1))


BLACK, RED, BLUE, GREEN = slices.COLOURS
P1 = [f"P01_S00{n}" for n in range(1, 7)]  # the first patient, of four to train and one to test


def exchanged(labels):
    return np.array([0, 2, 1, 3], np.uint8)[labels]


def double(toy, name, other):
    toy.hu[other], toy.labels[other] = toy.hu[name], toy.labels[name]
    change(toy, [other])


def without_a_map(toy):
    split(toy, toy.train[1:], toy.test)
    (toy.folder / "maps/P01_S001.png").unlink()


ERRORS = {
    "grey levels": (lambda toy: change(toy, toy.train, lambda hu: slices.windowed(hu) - 1024.0), ["grey levels"]),
    "a lost offset": (lambda toy: change(toy, P1, lambda hu: hu - 1024), ["P01", "label 1", "-1024", "lost"]),
    "an offset twice": (lambda toy: change(toy, P1, lambda hu: hu + 1024), ["P01", "+174", "1024 too much"]),
    "two lungs, two labels": (lambda toy: change(toy, toy.labels, labels=sides), ["P01", "label 2", "a left and a"]),
    "red, green, blue": (renamed((BLACK, RED, GREEN, BLUE)), ["P01", "label 3", "another order"]),
    "1 and 2 exchanged": (lambda toy: change(toy, toy.labels, labels=exchanged), ["label 1", "another order"]),
    "a map on another slice": (shifted, ["P01_S00", "HU"]),
    "ribs in lungs": (lambda toy: change(toy, P1, lambda hu: np.where(np.arange(64) % 5, hu, 0)), ["P01", "a sixth"]),
    "an unreadable image": (lambda toy: (toy.folder / "images/P01_S001.png").write_bytes(b"no"), ["P01_S001.png"]),
    "a colour of no label": (renamed((BLACK, RED, BLUE, (0, 254, 0))), ["P01_S002.png: colour [0, 254, 0]"]),
    "no lung at all": (lambda toy: change(toy, toy.labels, labels=lambda y: y * 0), ["P01_S001.png", "no lung"]),
    "not square": (lambda toy: change(toy, P1[:1], lambda hu: hu[:48], lambda y: y[:48]), ["48 x 64", "P01_S001"]),
    "another size": (lambda toy: change(toy, P1[:1], lambda x: x[:48, :48], lambda y: y[:48, :48]), ["unlike most"]),
    "map of another size": (lambda toy: change(toy, P1[:1], labels=lambda y: y[:48]), ["P01_S001.png: (48, 64)"]),
    "an image taken away": (lambda toy: (toy.folder / "images/P01_S001.png").unlink(), ["P01_S001.png: no image"]),
    "a name without files": (lambda toy: split(toy, [*toy.train, "P09_S001"], toy.test), ["P09_S001"]),
    "a name on two sides": (lambda toy: split(toy, toy.train, toy.test, P1[:1]), ["P01_S001: trained on and tested"]),
    "train and test": (lambda toy: split(toy, toy.train, [*toy.test, "P01_S001"]), ["split.json: P01_S001"]),
    "a patient on two sides": (lambda toy: split(toy, toy.train[1:], [*toy.test, *P1[:1]]), ["patient P01"]),
    "an image on two sides": (lambda toy: double(toy, "P01_S001", "P05_S001"), ["the same image"]),
}
NOTES = {
    "nothing": (lambda toy: None, []),
    "a map taken away": (without_a_map, ["no map"]),
    "names on no side": (lambda toy: split(toy, toy.train[2:], toy.test), ["P01_S001: on no side", "1 more"]),
    "drawn by slice": (lambda toy: split(toy, toy.train[1:], [*toy.test, P1[0]], by="slice"), ["patient P01"]),
    "an empty map": (lambda toy: change(toy, P1[:1], labels=lambda y: y * 0), ["no lung in it"]),
    "a palette of its own": (renamed((BLACK, (9, 0, 0), (0, 9, 0), (0, 0, 9))), []),
    "two alike": (lambda toy: double(toy, "P01_S001", "P01_S002"), ["the same image"]),
}


@pytest.mark.parametrize(("spoil", "told"), [*ERRORS.values(), *NOTES.values()], ids=[*ERRORS, *NOTES])
def test_what_is_wrong_with_a_set_is_told(own_toy, capsys, spoil, told):
    spoil(own_toy)
    status = check.check_set(own_toy.folder)
    out = capsys.readouterr().out
    kind = "error" if (spoil, told) in ERRORS.values() else "note"
    findings = [line for line in out.splitlines() if line.startswith(("error: ", "note: "))]
    assert status == (2 if kind == "error" else 0) and len(findings) < 12
    assert all(any(line.startswith(kind) and word in line for line in findings) for word in told)
    assert told or not findings
    assert all(len(line) <= 100 for line in out.splitlines()[:-1] if line not in findings)


@pytest.mark.parametrize("called", TURNS)
def test_a_map_turned_against_its_image_is_told(own_toy, capsys, called):
    hu, labels = draw_chest()
    for name in P1:
        slices.write_image(own_toy.folder / "images" / f"{name}.png", hu[0])
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", TURNS[called](labels[0]))
    assert check.check_set(own_toy.folder) == 2
    assert f"lies on more tissue than with {called}" in capsys.readouterr().out


def test_the_table_counts_slices_pixels_and_hu_of_patients_and_sides(toy, capsys):
    check.check_set(toy.folder)
    rows = {tuple(line.split()[:2]): line.split() for line in capsys.readouterr().out.splitlines()}
    for row, names in {("P02", "train"): toy.train[6:12], ("4", "patients"): toy.train}.items():
        hu, labels = (np.stack([part[name] for name in names]) for part in (toy.hu, toy.labels))
        wanted = [len(names)]
        for label in (1, 2, 3):
            wanted += [np.count_nonzero(labels == label), np.rint(hu[labels == label]).mean()]
        np.testing.assert_allclose([float(cell) for cell in rows[row][-7:]], wanted, atol=0.6)


def test_the_picture_outlines_the_most_diseased_slice_of_each_patient(own_toy):
    labels = np.zeros((64, 64), np.uint8)
    labels[16:48, 8:56] = 1
    labels[24:40, 16:40] = 2
    for name in P1:
        own_toy.labels[name] = labels if name == "P01_S003" else np.minimum(labels, 1)
    change(own_toy, P1)
    check.check_set(own_toy.folder)
    sheet = np.asarray(Image.open(own_toy.folder / "contact_sheet.png"))
    assert sheet.shape == (256, 6 * 256, 3)
    first = sheet[:, :256]
    for colour, row, column in ((RED, 64, 128), (BLUE, 96, 100), (RED, 128, 32), (BLUE, 120, 64)):
        assert tuple(first[row, column]) == colour
    grey = slices.windowed(own_toy.hu["P01_S003"])
    assert np.ptp(first[110:114, 110:114], axis=2).max() == 0  # inside, nothing is painted over
    assert abs(first[100:150, 70:150].mean() - grey[25:37, 18:37].mean()) < 8
    assert not (sheet[:, 5 * 256 :]).any()  # five patients


def test_from_the_shell(own_toy, tmp_path):
    command = [sys.executable, ROOT / "data" / "check.py"]
    assert subprocess.run([*command, own_toy.folder], capture_output=True).returncode == 0
    (own_toy.folder / "images/P01_S001.png").unlink()
    assert subprocess.run([*command, own_toy.folder], capture_output=True).returncode == 2
    done = subprocess.run([*command, tmp_path / "absent"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("called", TURNS)
@pytest.mark.parametrize("part", [np.s_[:], 0])
def test_a_turned_pair_is_refused_and_a_right_one_is_not(tmp_path, called, part):
    hu, labels = draw_chest()
    check.check_pair(tmp_path / "ct.nii", hu[part], labels[part])
    with pytest.raises(Mistake, match=rf"ct\.nii: .*{called}"):
        check.check_pair(tmp_path / "ct.nii", hu[part], TURNS[called](labels)[part])


WRONG = {  # labels taken for others
    "0, 3, 1, 2": (lambda labels: np.array([0, 3, 1, 2], np.uint8)[labels], r"-850 HU in consolidation \(label 3\)"),
    "0, 1, 3, 2": (lambda labels: np.array([0, 1, 3, 2], np.uint8)[labels], r"-550 HU in consolidation \(label 3\)"),
    "a right and a left lung": (sides, r"\(label 2\).*left and a right"),
    "two lungs and lesions": (lambda labels: np.where(labels > 1, 3, sides(labels)), r"\(label 2\).*left and a right"),
    "lung as ground glass": (lambda labels: 2 * (labels > 0), r"label 2\), and no healthy lung"),
    "ground glass alone, as consolidation": (lambda labels: (labels % 3 > 0) * (2 * labels - 1), r"\(label 3\)"),
    "consolidation alone, as ground glass": (lambda labels: labels * (labels != 2) - (labels == 3), r"\(label 2\)"),
}


@pytest.mark.parametrize("called", WRONG)
@pytest.mark.parametrize("part", [np.s_[:], 0])
def test_labels_taken_for_others_are_told_by_file_label_and_hu(tmp_path, called, part):
    hu, labels = draw_chest()
    labels[:, 24:32, 15:23], labels[:, 36:44, 43:50] = 2, 3
    hu[labels == 2], hu[labels == 3] = -550, 20
    check.check_pair(tmp_path / "ct.nii", hu[part], labels[part])
    change_, told = WRONG[called]
    with pytest.raises(Mistake, match=rf"ct\.nii: mean [-+]\d+ HU.*{told}|ct\.nii: mean {told}"):
        check.check_pair(tmp_path / "ct.nii", hu[part], change_(labels).astype(np.uint8)[part])


def test_two_lungs_under_two_labels_are_told_without_a_ct():
    _, labels = draw_chest()
    assert check.sided(labels) == check.sided(labels[0]) == check.sided(labels * 0) == ""
    assert "1 and 2" in check.sided(sides(labels)) and "2 and 1" in check.sided(sides(labels)[0, :, ::-1])


@pytest.mark.parametrize("shift", [-11, -6, 0, 6, 11])
@pytest.mark.parametrize("noise", [0, 30])
def test_a_body_beside_the_middle_of_its_slice_is_not_called_turned(shift, noise):
    """Where half of what its lungs would be turned onto is the air around it."""
    hu, labels = draw_chest(6)
    small = [
        np.pad(picture[:, ::2, ::2], ((0, 0), (16, 16), (16, 16)), constant_values=air)
        for picture, air in ((hu, -1000), (labels, 0))
    ]
    hu, labels = (np.roll(picture, shift, 1) for picture in small)
    hu = hu + np.random.default_rng(0).normal(0, noise, hu.shape)
    assert check.turned(hu, labels == 1) is None and check.turned(hu[0], labels[0] == 1) is None


def test_one_lung_alone_that_is_denser_than_the_other_is_not_called_turned():
    hu, labels = draw_chest()
    right = (labels == 1) & (np.arange(64) < 32)
    hu[right] = -600
    assert check.turned(hu, right) is None
