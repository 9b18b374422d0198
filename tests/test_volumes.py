"""`data/volumes.py` on files written by nibabel, whose every voxel is told by its number."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from data import volumes
from data.slices import Mistake

STORAGE_ORDERS = [
    "".join(signs) for axes in itertools.permutations(("LR", "PA", "SI")) for signs in itertools.product(*axes)
]
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(80)
OBLIQUE = np.array([[-0.6, 0.1, 0.2, 90], [-0.1, -0.7, 0.5, 80], [0.1, -0.2, 4.9, -300], [0, 0, 0, 1]])


def numbered(shape=(3, 4, 5)):
    """A volume [Z, H, W] in display, no two voxels alike."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def stored_as(volume, codes, spacing=(0.5, 0.7, 5.0), origin=(-100.0, -80.0, 30.0)):
    """A display volume [Z, H, W] in a storage order: array and affine, each voxel at its place in the world.

    The voxel at column w, row h, slice z of the display lies at (-w, -h, z) * spacing + origin.
    """
    order, columns, first = [], [], [0, 0, 0]
    for code in codes:
        axis = next(i for i, pair in enumerate(("LR", "PA", "SI")) if code in pair)
        order.append(axis)
        forwards = code in "LPS"
        if not forwards:
            first[axis] = volume.shape[2 - axis] - 1
        columns.append(np.eye(3)[axis] * spacing[axis] * (1 if axis == 2 else -1) * (1 if forwards else -1))
    array = volume.transpose(2, 1, 0).transpose(order)
    array = np.flip(array, [i for i, code in enumerate(codes) if code in "RAI"])
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = np.array(first) * spacing * np.array([-1, -1, 1]) + origin
    return np.ascontiguousarray(array), affine


def save(path, array, affine, sform=1, qform=0, **fields):
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    for field, value in fields.items():
        image.header[field] = value
    nib.save(image, path)
    return path


@pytest.fixture
def ct(tmp_path):
    """A CT stored as LAS."""
    return volumes.read_volume(save(tmp_path / "ct.nii.gz", *stored_as(numbered(), "LAS")))


# Reading


@pytest.mark.parametrize("codes", STORAGE_ORDERS)
def test_every_storage_order_comes_out_in_radiological_display(tmp_path, codes):
    volume = volumes.read_volume(save(tmp_path / "1.nii.gz", *stored_as(numbered(), codes)))
    np.testing.assert_array_equal(volume.voxels, numbered())
    np.testing.assert_allclose(volume.millimetres, (0.7, 0.5))


def as_nifti_2(path):
    image = nib.load(path)
    nib.save(nib.Nifti2Image(np.asanyarray(image.dataobj), image.affine), path)


def as_big_endian(path):
    image = nib.load(path)
    header = image.header.as_byteswapped(">")
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj).astype(">i2"), image.affine, header), path)


def in_two_streams(path):
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))


def with_a_last_axis_of_one(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[..., None], image.affine), path)


AS_PEOPLE_HAVE_THEM = {
    "not compressed": lambda path: path.write_bytes(gzip.decompress(path.read_bytes())),
    "compressed twice as long": in_two_streams,
    "zeros behind the stream": lambda path: path.write_bytes(path.read_bytes() + bytes(700)),
    "NIfTI-2": as_nifti_2,
    "big-endian": as_big_endian,
    "a last axis of one": with_a_last_axis_of_one,
}


@pytest.mark.parametrize("change", AS_PEOPLE_HAVE_THEM.values(), ids=AS_PEOPLE_HAVE_THEM)
def test_a_file_as_people_have_them_is_read(tmp_path, change):
    path = save(tmp_path / "1.nii.gz", *stored_as(numbered(), "RAS"))
    change(path)
    volume = volumes.read_volume(path)
    np.testing.assert_array_equal(volume.voxels, numbered())
    assert volume.voxels.dtype.isnative
    np.testing.assert_allclose(volume.millimetres, (0.7, 0.5))
    path = path.rename(tmp_path / "2.nii")  # whatever it is called
    np.testing.assert_array_equal(volumes.read_volume(path).voxels, numbered())


BROKEN = {
    "AppleDouble": lambda whole: APPLE_DOUBLE,
    "nothing": lambda whole: b"",
    "a header alone": lambda whole: gzip.decompress(whole)[:352],
    "cut short": lambda whole: whole[:-30],
    "of a petabyte, says its header": lambda whole: gzip.decompress(whole).replace(b"\5\0\4\0\3\0", b"\xff\x7f" * 3, 1),
    "of colours": lambda whole: nib.Nifti1Image(np.zeros((5, 4, 3), [(c, "u1") for c in "RGB"]), np.eye(4)).to_bytes(),
    "a series in time": lambda whole: nib.Nifti1Image(np.zeros((5, 4, 3, 2), np.int16), np.eye(4)).to_bytes(),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path, change):
    path = save(tmp_path / "1.nii.gz", *stored_as(numbered(), "LPS"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Mistake) as error:
        volumes.read_volume(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [lambda affine: affine * [[0], [1], [1], [1]], lambda affine: affine * np.nan])
def test_a_volume_without_a_usable_affine_is_refused(tmp_path, spoil):
    array, affine = stored_as(numbered(), "LPS")
    path = save(tmp_path / "1.nii.gz", array, affine)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[280:328] = spoil(affine)[:3].astype("<f4").tobytes()
    path.write_bytes(content)
    with pytest.raises(Mistake, match="no usable affine"):
        volumes.read_volume(path)


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([0.7, 0.7, 5, 1]), None])
def test_a_volume_that_does_not_say_how_the_patient_lies_is_warned_of(tmp_path, capsys, affine):
    array = stored_as(numbered(), "LPS")[0]
    save(tmp_path / "1.nii.gz", array, np.eye(4) if affine is None else affine, sform=0 if affine is None else 1)
    volumes.read_volume(tmp_path / "1.nii.gz")
    warning = capsys.readouterr().err
    assert "1.nii.gz" in warning and "how the patient lies" in warning and warning.count("\n") == 1


@pytest.mark.parametrize(
    ("sizes", "tilt", "told"),
    [
        ((0.7, 0.7, 5), 0, ""),
        ((0.7, 0.7, 0.7), 30, ""),  # a gantry's
        ((0.7, 5, 0.7), 0, "pixels of 5 x 0.7 mm"),  # coronal slices
        ((5, 0.7, 0.7), 0, "pixels of 0.7 x 5 mm"),  # sagittal ones
        ((0.7, 0.7, 5), 40, "slices tilted by 40 degrees"),
    ],
)
@pytest.mark.parametrize("codes", ["LPS", "SRA"])
def test_slices_unlike_axial_ones_are_told(tmp_path, capsys, sizes, tilt, told, codes):
    turn = np.deg2rad(tilt)
    about_x = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = about_x @ np.diag(sizes), (-90, -80, -300)
    image = nib.Nifti1Image(numbered(), affine)
    path = tmp_path / "scan.nii.gz"
    nib.save(image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes))), path)
    volumes.read_volume(path)
    said = capsys.readouterr().err
    assert (said.startswith(f"warning: {path}: ") and told in said) if told else said == ""


@pytest.mark.parametrize(("unit", "per"), [(1, 0.001), (2, 1), (3, 1000)])
def test_metres_and_micrometres_are_told_by_the_header(tmp_path, unit, per):
    array, affine = stored_as(numbered(), "LPS")
    path = save(tmp_path / "1.nii.gz", array, np.diag([per, per, per, 1]) @ affine, xyzt_units=unit)
    np.testing.assert_allclose(volumes.read_volume(path).millimetres, (0.7, 0.5), rtol=1e-5)


def test_pixels_that_no_ct_has_are_told(tmp_path, capsys):
    array, affine = stored_as(numbered(), "LPS")
    volumes.read_volume(save(tmp_path / "1.nii.gz", array, np.diag([0.001, 0.001, 0.001, 1]) @ affine))
    assert "1.nii.gz: pixels of 0.0007 x 0.0005 mm" in capsys.readouterr().err


def test_an_array_saved_in_the_order_z_y_x_is_refused(tmp_path):
    path = save(tmp_path / "1.nii.gz", numbered((3, 16, 16)), np.eye(4))
    with pytest.raises(Mistake, match=r"1\.nii\.gz: .*axes"):
        volumes.read_volume(path, note=str)


# Masks


@pytest.mark.parametrize("codes", STORAGE_ORDERS)
def test_a_mask_stored_in_another_order_lies_on_its_ct_without_a_word(tmp_path, ct, capsys, codes):
    path = save(tmp_path / "mask.nii.gz", *stored_as((numbered() % 3).astype(np.uint8), codes))
    labels = volumes.read_labels(path, (0, 1, 2), ct)
    np.testing.assert_array_equal(labels, ct.voxels % 3)
    assert labels.dtype == np.uint8 and capsys.readouterr().err == ""


def lost_affine(affine, kind):
    return {
        "identity": np.eye(4),
        "an axis of other sign": affine @ np.diag([-1, 1, 1, 1]),
        "another origin": affine + np.outer([1, 0, 0, 0], [0, 0, 0, 40]),
        "spacing of one": np.diag([-1.0, 1, 1, 1]),
    }[kind]


@pytest.mark.parametrize("kind", ["identity", "an axis of other sign", "another origin", "spacing of one"])
def test_a_mask_with_a_lost_affine_is_taken_as_its_ct_is_stored_with_a_warning(tmp_path, ct, capsys, kind):
    array, affine = stored_as((numbered() % 3).astype(np.uint8), "LAS")
    path = save(tmp_path / "mask.nii.gz", array, lost_affine(affine, kind))
    np.testing.assert_array_equal(volumes.read_labels(path, (0, 1, 2), ct), ct.voxels % 3)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {path}: ") and warning.count("\n") == 1


def test_a_mask_without_any_affine_is_taken_as_its_ct_is_stored(tmp_path, capsys):
    """Even where the affine that nibabel makes up would put it, turned, on the CT's grid."""
    array, affine = (numbered() % 3).astype(np.uint8).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = [2, 1.5, -1]  # centred, as what nibabel makes up, but for the sign of y
    ct = volumes.read_volume(save(tmp_path / "ct.nii.gz", array, affine))
    path = save(tmp_path / "mask.nii.gz", array, affine, sform=0)
    np.testing.assert_array_equal(volumes.read_labels(path, (0, 1, 2), ct), ct.voxels)
    assert "mask.nii.gz" in capsys.readouterr().err


def test_a_mask_of_neither_grid_nor_shape_is_refused(tmp_path, ct):
    array, affine = stored_as(numbered((3, 4, 4)) % 2, "LAS")
    with pytest.raises(Mistake, match=r"mask\.nii: .*\(4, 4, 3\).*\(5, 4, 3\)"):
        volumes.read_labels(save(tmp_path / "mask.nii", array, affine), (0, 1), ct)


def test_values_a_little_off_a_label_are_that_label(tmp_path, ct):
    array, affine = stored_as(numbered() % 3, "LAS")
    offset = np.where(array % 2, 0.009, -0.009)
    path = save(tmp_path / "mask.nii.gz", array + offset, affine)
    np.testing.assert_array_equal(volumes.read_labels(path, (0, 1, 2), ct), ct.voxels % 3)


@pytest.mark.parametrize(
    ("value", "told"), [(1.5, "1.5"), (0.98, "0.98"), (1.0123, "1.0123"), (3, "3"), (-1, "-1"), (np.nan, "nan")]
)
def test_any_other_value_is_named_with_its_voxel(tmp_path, ct, value, told):
    array, affine = stored_as(numbered() % 3, "LAS")
    array = array.astype(np.float64)
    array[4, 2, 1] = value
    with pytest.raises(Mistake, match=rf"mask\.nii: unknown label {told} at voxel \(4, 2, 1\)"):
        volumes.read_labels(save(tmp_path / "mask.nii", array, affine), (0, 1, 2), ct)


# Writing


@pytest.mark.parametrize("codes", STORAGE_ORDERS)
def test_what_is_written_lies_where_its_model_lies(tmp_path, codes):
    ending = ".nii" if codes.endswith("S") else ".nii.gz"
    model = save(tmp_path / f"model{ending}", *stored_as(numbered(), codes), sform=2, descrip=b"SECRET^NAME")
    volumes.write_volume(tmp_path / f"new{ending}", volumes.read_volume(model), -numbered())
    old, new = nib.load(model), nib.load(tmp_path / f"new{ending}")
    np.testing.assert_array_equal(new.affine, old.affine)
    np.testing.assert_array_equal(np.asanyarray(new.dataobj), -np.asanyarray(old.dataobj))
    assert (new.get_data_dtype(), new.header["sform_code"], new.header["qform_code"]) == (np.int16, 2, 0)
    content = (tmp_path / f"new{ending}").read_bytes()
    assert b"SECRET" not in (gzip.decompress(content) if ending == ".nii.gz" else content)


@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_an_oblique_affine_survives_to_the_last_bit(tmp_path, sform, qform):
    rotation = np.linalg.qr(OBLIQUE[:3, :3])[0]  # a qform cannot shear
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * (0.6, 0.7, 5), OBLIQUE[:3, 3]
    model = save(tmp_path / "model.nii.gz", numbered().astype(np.uint8), affine, sform, qform)
    like = volumes.read_volume(model, note=str)
    volumes.write_volume(tmp_path / "new.nii.gz", like, like.voxels.astype(np.int16) - 1000)
    old, new = nib.load(model), nib.load(tmp_path / "new.nii.gz")
    np.testing.assert_array_equal(new.affine, old.affine)
    np.testing.assert_array_equal(new.header.get_qform(), old.header.get_qform())
    assert [int(new.header[f"{form}_code"]) for form in ("sform", "qform")] == [sform, qform]
    np.testing.assert_array_equal(np.asanyarray(new.dataobj), np.asanyarray(old.dataobj).astype(int) - 1000)


def test_the_header_says_int16_hu_and_holds_no_free_text(tmp_path):
    array, affine = stored_as(numbered(), "RPI")
    text = {"descrip": b"NAME", "aux_file": b"NAME", "db_name": b"NAME", "intent_name": b"NAME"}
    model = save(tmp_path / "model.nii", array / 7, affine, scl_slope=2, scl_inter=3, **text)
    volumes.write_volume(tmp_path / "new.nii", volumes.read_volume(model), numbered())
    content = (tmp_path / "new.nii").read_bytes()
    assert np.frombuffer(content[112:120], "<f4").tolist() == [1, 0]  # scl_slope, scl_inter
    assert b"NAME" not in content
    volumes.write_volume(tmp_path / "again.nii.gz", volumes.read_volume(model), numbered())
    first = (tmp_path / "again.nii.gz").read_bytes()
    volumes.write_volume(tmp_path / "again.nii.gz", volumes.read_volume(model), numbered())
    assert (tmp_path / "again.nii.gz").read_bytes() == first  # no time of day in it


# Folders


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_volumes_are_listed_by_name_and_dot_files_are_no_data(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.b.NII", "c.Nii.Gz", "._b.nii.gz", ".DS_Store", "notes.txt", ".nii")
    (tmp_path / "folder.nii").mkdir()
    listed = volumes.list_volumes(tmp_path)
    assert list(listed) == ["a.b", "b", "c"]
    assert listed["a.b"] == tmp_path / "a.b.NII"


def test_a_star_stands_for_the_name_wherever_it_is(tmp_path):
    for name in ("b", "Mu\u0308ller"):  # an accent apart from its letter, as a Mac stores it
        touch(tmp_path / name, "ct.nii.gz", "mask.nii.gz", "._ct.nii.gz")
    listed = volumes.list_volumes(f"{tmp_path}/*/ct.nii.gz")
    assert listed == {"M\u00fcller": tmp_path / "Mu\u0308ller/ct.nii.gz", "b": tmp_path / "b/ct.nii.gz"}
    assert list(volumes.list_volumes(tmp_path / "b/*k.nii.gz")) == ["mas"]
    for pattern in ("*/*.nii", "*_ct.nii.gz"):
        with pytest.raises(Mistake, match=r"star|no volume"):
            volumes.list_volumes(tmp_path / pattern)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "1.nii.gz").symlink_to("absent.nii.gz")
    for where in (tmp_path, tmp_path / "*.nii.gz"):
        with pytest.raises(Mistake, match=r"1\.nii\.gz: "):
            volumes.read_volume(volumes.list_volumes(where)["1"])


def test_a_folder_that_is_not_there_or_holds_no_volume_is_named(tmp_path):
    with pytest.raises(Mistake, match="absent: no such folder"):
        volumes.list_volumes(tmp_path / "absent")
    touch(tmp_path / "empty", "._1.nii.gz")
    with pytest.raises(Mistake, match="empty: holds no volume"):
        volumes.list_volumes(tmp_path / "empty")
