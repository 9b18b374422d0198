"""NIfTI volumes, in one place: reading to radiological display, placing masks on their CT's grid, writing back.

In radiological display a volume is [Z, H, W]: slices upwards from the feet, rows to the back (the spine is at the
bottom), columns to the patient's left. `.nii` and `.nii.gz` are told apart by their bytes, not by their names.
"""

import glob
import gzip
import itertools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from tqdm import tqdm

from data.slices import NIFTI, Mistake, same_form, write_bytes

DISPLAY = axcodes2ornt("LPS")  # columns to the left, rows to the back, slices upwards
GZIP = b"\x1f\x8b"  # the first two bytes of a gzip file
BROKEN = (OSError, EOFError, ValueError, MemoryError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
Note = Callable[[str], None]  # is given what the user should know
UNEQUAL, TILT = 1.5, 35  # sides of a pixel, as a ratio, and degrees, beyond which slices are hardly axial ones
# The fields of a header that say where the voxels lie. The rest is not passed on: free text may name a patient.
GRID_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


class Volume(NamedTuple):
    """A volume in radiological display, and the header that says how it was stored."""

    voxels: np.ndarray  # [Z, H, W], any real type
    header: nib.Nifti1Header

    @property
    def affine(self) -> np.ndarray:
        """From the file's own voxel indices to world millimetres (x to the right, y to the front, z up) [4, 4]."""
        return in_millimetres(self.header)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file's own axis order [3]."""
        return self.header.get_data_shape()[:3]

    @property
    def turn(self) -> np.ndarray:
        """nibabel's orientation array [3, 2] from the file's own axes to [W, H, Z] in display."""
        return ornt_transform(io_orientation(self.affine), DISPLAY)

    @property
    def millimetres(self) -> np.ndarray:
        """Height and width of a pixel [2]."""
        return nib.affines.voxel_sizes(self.affine)[np.argsort(self.turn[:, 0])][[1, 0]]  # of W, H, Z


def in_millimetres(header: nib.Nifti1Header) -> np.ndarray:
    """A header's affine [4, 4], which may be in metres or micrometres, in millimetres."""
    unit = {1: 1000, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1)
    return np.diag([unit, unit, unit, 1]) @ header.get_best_affine()


def warn(text: str) -> None:
    """Say something that the user should know on stderr, without breaking a progress bar; the run goes on."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def list_volumes(where: str | Path) -> dict[str, Path]:
    """NIfTI files by name, sorted: of a folder, without .nii or .nii.gz; of a pattern, what its one star stands for.

    DIR/*_ct.nii.gz and DIR/*/ct.nii.gz are patterns; dotfiles are ignored. Raises Mistake for a missing folder, for one
    without a volume, and for two files of the same name. A link to nothing is listed: whoever reads it is told.
    """
    before, star, after = str(where).partition("*")
    if "*" in after:
        raise Mistake(f"{where}: more than one star: give the one that stands for the name")
    if not star and not Path(where).is_dir():
        raise Mistake(f"{where}: no such folder: give one of .nii or .nii.gz files")
    if star:
        files = glob.glob(f"{glob.escape(before)}*{glob.escape(after)}")
        names = {Path(file): file[len(before) : len(file) - len(after)] for file in files}
    else:
        files = [path for path in Path(where).iterdir() if not (path.name.startswith(".") or path.is_dir())]
        names = {path: volume_name(path) for path in files if path.name.lower().endswith(NIFTI)}
    found: dict[str, Path] = {}
    for path in sorted(names):
        if (other := found.setdefault(same_form(names[path]), path)) is not path:
            raise Mistake(f"{path}: {other.name} has the same name: remove one of them")
    if not found:
        raise Mistake(f"{where}: holds no volume: put .nii or .nii.gz files there, a pattern into quotes")
    return dict(sorted(found.items()))


def volume_name(path: Path) -> str:
    """File name without .nii or .nii.gz, in any case."""
    return path.name[: -len(".nii.gz" if path.name.lower().endswith(".gz") else ".nii")]


def read_volume(path: Path, note: Note = warn) -> Volume:
    """Read a volume of any real type, whatever its storage order; `note` is told how it may lie wrong.

    Raises Mistake for a file that is missing, not NIfTI, damaged, not a 3-D volume or without a usable affine.
    """
    header, stored = read_stored(path)
    return placed(path, header, stored, note)


def read_label_volume(path: Path, allowed: tuple[int, ...], note: Note = warn) -> tuple[Volume, np.ndarray]:
    """Read a label volume without its CT: the Volume, and its labels uint8 [Z, H, W] in display.

    Values within 0.01 of an `allowed` label are that label. Raises Mistake as `read_volume` does, and for any other.
    """
    header, stored = read_stored(path)
    volume = placed(path, header, whole_labels(path, stored, allowed), note)
    return volume, volume.voxels


def read_labels(path: Path, allowed: tuple[int, ...], like: Volume, note: Note = warn) -> np.ndarray:
    """Read the mask of a CT, laid on the CT's grid: uint8 [Z, H, W] in display; values as in `read_label_volume`.

    The mask's own affine is used if it puts the voxels where the CT's are, in whatever storage order. If it does not
    (as in masks saved from an array, with an identity affine), a mask of the CT's stored shape is taken voxel by voxel
    and a `note` says so. Raises Mistake as the other readers do, and where neither grid nor shape fits the CT.
    """
    header, stored = read_stored(path)
    labels = whole_labels(path, stored, allowed)
    affine = in_millimetres(header)
    laid = lay_on_grid(labels, affine, like) if is_usable(affine) else None
    if laid is not None and (header["sform_code"] or header["qform_code"] or np.array_equal(laid, labels)):
        return to_display(laid, like)
    if labels.shape != like.shape:
        raise Mistake(f"{path}: {labels.shape} voxels elsewhere than its CT's {like.shape}: bring both to one grid")
    note(f"{path}: its affine does not put it on its CT's grid; taken voxel by voxel as the CT is stored")
    return to_display(labels, like)


def write_volume(path: Path, like: Volume, voxels: np.ndarray) -> None:
    """Write HU int16 or labels uint8 [Z, H, W] in display, as .nii or .nii.gz on the grid, in the order, of `like`."""
    if not path.name.lower().endswith(NIFTI):
        raise Mistake(f"{path}: volumes are written as .nii or .nii.gz")
    to_file = ornt_transform(DISPLAY, io_orientation(like.affine))
    stored = apply_orientation(voxels.transpose(2, 1, 0), to_file)
    image = nib.Nifti1Image(stored, like.header.get_best_affine())
    for field in GRID_FIELDS:
        image.header[field] = like.header[field]
    image.header.set_slope_inter(1, 0)
    content = image.to_bytes()
    write_bytes(path, gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content)


def read_stored(path: Path) -> tuple[nib.Nifti1Header, np.ndarray]:
    """Header, and voxels [3 axes] in the file's own order. Raises Mistake as `read_volume` does."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        kind = nib.Nifti2Image if nib.Nifti2Header.may_contain_header(content) else nib.Nifti1Image
        image = kind.from_bytes(content)
        stored = np.asanyarray(image.dataobj)
    except BROKEN as error:
        told = " ".join(str(error).split())
        raise Mistake(f"{path}: no NIfTI file that can be read ({told}): get it again") from error
    told = f"{stored.dtype} {stored.shape}"
    while stored.ndim > 3 and stored.shape[-1] == 1:
        stored = stored[..., 0]
    if stored.ndim != 3 or not stored.size or stored.dtype.kind not in "iuf":
        raise Mistake(f"{path}: {told} is no 3-D volume of numbers: give one value a voxel, one scan")
    return image.header, stored.astype(stored.dtype.newbyteorder("="), copy=False)


def placed(path: Path, header: nib.Nifti1Header, stored: np.ndarray, note: Note) -> Volume:
    """Turn a stored array to display by its own header. Raises Mistake where the affine is not usable."""
    volume = Volume(stored, header)
    if not is_usable(volume.affine):
        raise Mistake(f"{path}: no usable affine: save it again with a program that knows the scan's geometry")
    spacing_alone = np.array_equal(volume.affine, np.diag(np.abs(volume.affine.diagonal())))  # of no scanner: no origin
    made_up = not header["sform_code"] and not header["qform_code"]  # by nibabel
    if made_up or spacing_alone:
        axes = "".join(nib.aff2axcodes(volume.affine))
        note(f"{path}: does not say how the patient lies; taken as {axes}: see that the spine comes out at the bottom")
    width, height, _ = np.take(volume.shape, np.argsort(volume.turn[:, 0]))
    if 3 * min(width, height) < max(width, height):  # an array [Z, Y, X] saved without an affine
        raise Mistake(f"{path}: slices of {height} x {width} pixels: its axes seem exchanged: save it with its affine")
    height, width = volume.millimetres
    tilt = np.degrees(nib.affines.obliquity(volume.affine)).max()  # of a gantry up to 30
    lie = f"pixels of {height:.3g} x {width:.3g} mm, slices tilted by {tilt:.0f} degrees"
    if not 0.2 <= min(height, width) <= max(height, width) <= 5:
        note(f"{path}: {lie}: no CT has such pixels: correct the spacing in the header, or its unit")
    elif tilt > TILT or max(height, width) > UNEQUAL * min(height, width):  # coronal or sagittal slices, for one
        note(f"{path}: {lie}: networks here see axial slices of square pixels; resample it to such, or look closely")
    return volume._replace(voxels=to_display(stored, volume))


def is_usable(affine: np.ndarray) -> bool:
    """Whether an affine [4, 4] gives every axis of a volume a direction."""
    finite = np.isfinite(affine).all()
    return bool(finite and np.linalg.det(affine) != 0 and not np.isnan(io_orientation(affine)).any())


def whole_labels(path: Path, stored: np.ndarray, allowed: tuple[int, ...]) -> np.ndarray:
    """Labels uint8 of values that are each within 0.01 of one allowed. Raises Mistake at the first that is not."""
    nearest = np.rint(stored)
    known = np.isin(nearest, allowed) & (np.abs(stored - nearest) <= 0.01)  # scaled headers give 0.9999999997
    if not known.all():
        voxel = tuple(int(i) for i in np.unravel_index(known.argmin(), stored.shape))
        labels = ", ".join(map(str, allowed))
        raise Mistake(f"{path}: unknown label {stored[voxel]:.6g} at voxel {voxel}: correct it to one of {labels}")
    return nearest.astype(np.uint8)


def lay_on_grid(stored: np.ndarray, affine: np.ndarray, like: Volume) -> np.ndarray | None:
    """Turn a stored array to the stored order of `like` by its affine; None where its voxels lie elsewhere."""
    to_index = np.linalg.inv(like.affine) @ affine  # from the array's own indices to those of `like`
    axes = io_orientation(to_index)
    turned = apply_orientation(stored, axes)
    if turned.shape != like.shape:
        return None
    after = to_index @ inv_ornt_aff(axes, stored.shape)  # the identity, if the grids are the same
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in like.shape))])  # [8, 4]
    return turned if np.abs(corners @ after.T - corners).max() < 0.5 else None  # half a voxel off is another grid


def to_display(stored: np.ndarray, like: Volume) -> np.ndarray:
    """Turn an array in the stored order of `like` to [Z, H, W] in display."""
    return apply_orientation(stored, like.turn).transpose(2, 1, 0)
