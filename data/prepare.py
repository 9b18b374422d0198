"""Chest CT volumes with lesion masks (NIfTI) to a dataset of slices, split by patient or by slice.

    python data/prepare.py SRC                           # by patient, into data/radiopaedia
    python data/prepare.py SRC --by slice                # as the paper: neighbouring slices on both sides
    python data/prepare.py SRC --exclude-patient 3 --out data/radiopaedia_without_3

SRC is laid out like the public download, volume N being patient N:

    SRC/rp_im/N.nii.gz          the CT, in HU; a volume stored as grey levels 0..255 is recognised
    SRC/rp_lung_msk/N.nii.gz    0 outside, 1 lung; or 1 and 2, one value a side
    SRC/rp_msk/N.nii.gz         0 none, 1 ground-glass opacity, 2 consolidation, 3 pleural effusion

Every volume is turned, by its affine, to radiological display: row 0 is anterior (the spine is at the
bottom), column 0 is the patient's right. Slice P03_S041 is the 42nd from the feet in the turned volume.
Every volume is read and checked before anything is written. `slices.py` tells the format of the result.
"""

import argparse
import gzip
import json
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ itself is on it
from data.slices import (
    HU_OFFSET,
    LABELS,
    SIDES,
    Mistake,
    OneLineParser,
    exit_on_mistake,
    slice_name,
    write_contact_sheet,
    write_image,
    write_map,
    write_split,
)

IMAGES, LUNG_MASKS, LESION_MASKS = "rp_im", "rp_lung_msk", "rp_msk"
AIR = -HU_OFFSET  # the lowest HU that the format holds

Slice = tuple[int, int]  # (patient, z), z counted upwards from the feet


def find_patients(src: Path, excluded: list[int]) -> list[int]:
    """List the patient numbers in `src`, in numerical order, without those `excluded`.

    Raises Mistake for a missing or empty folder, a volume not named by a number, a volume that lacks a
    mask, and an excluded patient that is not there. A mask without a volume is only warned of.
    """
    if not (src / IMAGES).is_dir():
        raise Mistake(f"{src / IMAGES}: no such folder; SRC must hold {IMAGES}, {LUNG_MASKS} and {LESION_MASKS}")
    names = [path.name.removesuffix(".nii.gz") for path in sorted((src / IMAGES).glob("*.nii.gz"))]
    if not names:
        raise Mistake(f"{src / IMAGES}: holds no volume; put 1.nii.gz, 2.nii.gz, ... there")
    for name in names:
        if not name.isdecimal() or name != str(int(name)):
            raise Mistake(f"{src / IMAGES / name}.nii.gz: not named by a patient number; rename it like 7.nii.gz")
    for absent in sorted(set(excluded) - set(map(int, names))):
        raise Mistake(f"{src / IMAGES / str(absent)}.nii.gz: not there, so patient {absent} cannot be excluded")
    patients = sorted(set(map(int, names)) - set(excluded))
    for folder in (LUNG_MASKS, LESION_MASKS):
        for patient in patients:
            mask = src / folder / f"{patient}.nii.gz"
            if not mask.is_file():
                raise Mistake(f"{mask}: missing; add this mask or give --exclude-patient {patient}")
        for mask in sorted((src / folder).glob("*.nii.gz")):
            if mask.name.removesuffix(".nii.gz") not in names:
                print(f"warning: {mask}: a mask without a volume, ignored", file=sys.stderr)
    return patients


def read_volume(path: Path, allowed: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI file in radiological display, whatever its storage order.

    Returns the volume [Z, H, W] (z upwards, rows to posterior, columns to the patient's left), any real
    type, and the height and width of a pixel in mm [2]. Raises Mistake for a file that cannot be read or
    is no 3-D volume and, where `allowed` is given, for the first voxel that holds any other value.
    """
    try:
        image = nib.squeeze_image(nib.load(path))  # [X, Y, Z, 1] is a volume too
        with gzip.open(path) as stream:
            while stream.read(2**24):  # to the end, where gzip compares its checksum: nibabel stops before it
                pass
        stored = np.asanyarray(image.dataobj)  # in the file's own axis order
    except (ImageFileError, HeaderDataError) as error:
        raise Mistake(f"{path}: no NIfTI file; put a real .nii.gz there") from error
    except (EOFError, OSError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise Mistake(f"{path}: cut short or damaged ({error}); get the file again") from error
    axes = io_orientation(image.affine)
    if stored.ndim != 3 or stored.dtype.kind not in "iuf" or stored.size == 0 or np.isnan(axes).any():
        raise Mistake(f"{path}: {stored.dtype} {stored.shape} is no 3-D volume of numbers with a usable affine")
    if allowed is not None:
        unknown = ~np.isin(stored, allowed)
        if unknown.any():
            voxel = tuple(int(i) for i in np.unravel_index(unknown.argmax(), stored.shape))
            known = ", ".join(map(str, allowed))
            raise Mistake(f"{path}: unknown label {stored[voxel]:g} at voxel {voxel}; correct it to one of {known}")
    turn = ornt_transform(axes, axcodes2ornt("LPS"))
    volume = apply_orientation(stored, turn).transpose(2, 1, 0)  # [Z, H, W]
    millimetres = nib.affines.voxel_sizes(image.affine)[np.argsort(turn[:, 0])]  # of W, H, Z
    return volume, millimetres[[1, 0]]


def merge_masks(lung: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """Merge a lung mask (0..2) and a lesion mask (0..3), any shape, into labels uint8 0..3.

    Lesion overrides lung. Pleural effusion (3) is no lesion of the lung: it keeps what the lung mask says.
    """
    labels = (lung > 0).astype(np.uint8)  # left and right are one
    labels[lesion == 1] = LABELS.index("ground-glass opacity")
    labels[lesion == 2] = LABELS.index("consolidation")
    return labels


def read_patient(src: Path, patient: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read volume N and its masks: CT [Z, H, W] as stored, labels uint8 [Z, H, W], height and width of a pixel in mm.

    Raises Mistake as `read_volume` does, and where the shapes differ.
    """
    paths = [src / folder / f"{patient}.nii.gz" for folder in (IMAGES, LUNG_MASKS, LESION_MASKS)]
    volume, millimetres = read_volume(paths[0])
    lung, _ = read_volume(paths[1], allowed=(0, 1, 2))
    lesion, _ = read_volume(paths[2], allowed=(0, 1, 2, 3))
    for path, mask in zip(paths[1:], (lung, lesion), strict=True):
        if mask.shape != volume.shape:
            shapes = f"{mask.shape} slices, rows, columns, but its volume {volume.shape}"
            raise Mistake(f"{path}: {shapes}; bring both to one grid")
    return volume, merge_masks(lung, lesion), millimetres


def is_grey(path: Path, volume: np.ndarray) -> bool:
    """Tell grey levels 0..255 from HU, where air is about -1000; raise Mistake for what can be neither."""
    low, high = volume.min(), volume.max()  # nan if any voxel is
    if low >= 0 and 1 < high <= 255:
        return True
    if -np.inf < low < 0 and high < np.inf:
        return False
    raise Mistake(f"{path}: values {low:g} to {high:g} are neither HU nor grey levels 0..255; convert it to HU")


def fit(pixels: np.ndarray, millimetres: np.ndarray, size: int, fill: int) -> np.ndarray:
    """Bring one slice [H, W] to [size, size] of the same type.

    Proportions in mm are kept (unequal pixel sides become equal): the longer side fills the square, and
    what the shorter leaves is `fill`. Labels uint8 take the nearest pixel. HU float32 take Pillow's
    bilinear filter, which widens when it shrinks (anti-aliasing) and never overshoots, as bicubic would.
    """
    extent = pixels.shape * millimetres  # height, width in mm
    height, width = np.maximum(1, np.rint(size * extent / extent.max())).astype(int).tolist()
    filter_ = Image.Resampling.NEAREST if pixels.dtype == np.uint8 else Image.Resampling.BILINEAR
    square = np.full((size, size), fill, pixels.dtype)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = Image.fromarray(pixels).resize((width, height), filter_)
    return square


def survey(src: Path, patients: list[int], size: int) -> tuple[dict[Slice, np.ndarray], list[int]]:
    """Read and check every volume, one at a time; write nothing.

    Returns the pixels of each label [4] in every slice, counted at the size written (so that a lesion
    that shrinking loses is not promised), and the patients whose volume holds grey levels.
    """
    pixels, grey = {}, []
    with tqdm(patients, desc="checking volumes", disable=None) as bar:  # closed before an error is printed
        for patient in bar:
            volume, labels, millimetres = read_patient(src, patient)
            if is_grey(src / IMAGES / f"{patient}.nii.gz", volume):
                grey.append(patient)
            for z, label_map in enumerate(labels):
                pixels[patient, z] = np.bincount(fit(label_map, millimetres, size, fill=0).ravel(), minlength=4)
    return pixels, grey


def split_by_slice(kept: list[Slice], counts: list[int], rng: np.random.Generator) -> list[list[Slice]]:
    """Draw train, test and seg_test slice by slice, in exactly the `counts` asked for; the rest is left out.

    With too few slices for three parts (or a third count of 0) seg_test is test; with too few even for
    train and test, these two share all slices in proportion to their counts.
    """
    train, test, seg_test = counts
    if len(kept) < 2:
        raise Mistake("only one slice is left after selection; add volumes or give --all-slices")
    if len(kept) < train + test:
        train = min(max(round(len(kept) * train / (train + test)), 1), len(kept) - 1)
        test = len(kept) - train
    shuffled = [kept[i] for i in rng.permutation(len(kept))]
    sides = [shuffled[:train], shuffled[train : train + test]]
    two_parts = seg_test == 0 or len(kept) < sum(counts)
    return [*sides, sides[1] if two_parts else shuffled[train + test : sum(counts)]]


def split_by_patient(kept: list[Slice], counts: list[int], rng: np.random.Generator) -> list[list[Slice]]:
    """Draw train, test and seg_test by whole patients; every patient is used.

    The `counts` are targets, first scaled to the number of slices there are; of all ways to share the
    patients out, one with the least sum of deviations is taken, the seed deciding between equals.
    With fewer than three patients (or a third count of 0) seg_test is test.
    """
    sizes = {patient: sum(p == patient for p, _ in kept) for patient, _ in kept}
    if len(sizes) < 2:
        raise Mistake(f"patient {next(iter(sizes))} is the only one with slices to split; give --by slice")
    parts = 3 if len(sizes) > 2 and counts[2] else 2
    targets = [count * len(kept) / sum(counts[:parts]) for count in counts[:parts]]
    # Exact search: ways that fill the parts alike are equally good, so one of them is enough. That leaves
    # at most slices ** 2 / 2 ways instead of 3 ** patients.
    order = rng.permutation(sorted(sizes)).tolist()
    ways = {(0,) * parts: ()}  # slices in each part -> the part of each patient so far
    for patient in order:
        longer = {}
        for filled, chosen in ways.items():
            for part in range(parts):
                after = (*filled[:part], filled[part] + sizes[patient], *filled[part + 1 :])
                longer.setdefault(after, (*chosen, part))
        ways = longer
    best = min(filter(all, ways), key=lambda filled: sum(abs(n - t) for n, t in zip(filled, targets, strict=True)))
    part_of = dict(zip(order, ways[best], strict=True))
    sides = [[key for key in kept if part_of[key[0]] == part] for part in range(parts)]
    return sides if parts == 3 else [*sides, sides[1]]


def make_room(out: Path, split: dict, names: list[str], overwrite: bool) -> None:
    """Make the folders of a dataset, refusing (Mistake) to touch a folder that holds anything else.

    The same set, whole or interrupted, may be written again. With `overwrite` the slices of any other set
    are removed, and nothing but slices. split.json goes first: a set without it counts as unfinished.
    """
    folders = out / "images", out / "maps"
    slices = {folder / f"{name}.png" for folder in folders for name in names}
    ours = slices | {out / "contact_sheet.png"}
    if holds(out / "split.json", split):
        ours.add(out / "split.json")
    for path in sorted(out.rglob("*")):
        if path.is_file() and path not in ours and not path.name.startswith(".") and not overwrite:
            raise Mistake(f"{path}: of another set; give another --out, or --overwrite to replace it")
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"{out}: cannot be made a folder ({error.strerror}); give another --out") from error
    (out / "split.json").unlink(missing_ok=True)
    left_by_a_kill = out.rglob(".*.png.*.tmp")
    for path in {*out.glob("images/P*_S*.png"), *out.glob("maps/P*_S*.png"), *left_by_a_kill} - slices:
        path.unlink()


def holds(path: Path, split: dict) -> bool:
    """Tell whether a file is there and holds exactly this split."""
    try:
        return path.exists() and json.loads(path.read_text()) == split
    except ValueError:  # no JSON
        return False


def write_slices(src: Path, out: Path, chosen: list[Slice], size: int, grey_windows: dict[int, list[float]]) -> None:
    """Write the image and the map of every slice `chosen`, then a contact sheet: each patient's most diseased slice.

    `grey_windows` gives, for a patient whose volume holds grey levels, the HU of levels 0 and 255.
    """
    pairs = []
    with tqdm(total=len(chosen), desc="writing slices", disable=None) as bar:
        for patient in sorted({patient for patient, _ in chosen}):
            volume, labels, millimetres = read_patient(src, patient)
            positions = [z for p, z in chosen if p == patient]
            shown = positions[np.count_nonzero(labels[positions] > 1, axis=(1, 2)).argmax()]
            for z in positions:
                hu = volume[z].astype(np.float32)
                if patient in grey_windows:
                    low, high = grey_windows[patient]
                    hu = low + hu * ((high - low) / 255)
                hu, label_map = fit(hu, millimetres, size, fill=AIR), fit(labels[z], millimetres, size, fill=0)
                write_image(out / "images" / f"{slice_name(patient, z)}.png", hu)
                write_map(out / "maps" / f"{slice_name(patient, z)}.png", label_map)
                if z == shown:
                    pairs.append((hu, label_map))
                bar.update()
    write_contact_sheet(out / "contact_sheet.png", pairs)


def summary(sides: dict[str, list[Slice]], pixels: dict[Slice, np.ndarray]) -> str:
    """Tabulate the patients, slices and pixels of each label on each side."""
    row = "{:8}{:>10}{:>8}{:>15}{:>11}{:>10}{:>18}".format
    lines = [row("side", "patients", "slices", "background px", "lung px", "GGO px", "consolidation px")]
    for side, slices in sides.items():
        patients = {patient for patient, _ in slices}
        lines.append(row(side, len(patients), len(slices), *sum(pixels[key] for key in slices)))
    if sides["seg_test"] == sides["test"]:
        lines.append("seg_test is test: too few for three parts, or none asked for")
    return "\n".join(lines)


def three_counts(text: str) -> list[int]:
    """Parse "300,73,73", or raise Mistake; the last may be 0."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts) or 0 in map(int, parts[:2]):
        raise Mistake(f"--split {text}: give three counts like 300,73,73, of which only the last may be 0")
    return [int(part) for part in parts]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `argv` None means the program's own."""
    parser = OneLineParser(__doc__)
    option = parser.add_argument
    option("src", type=Path, metavar="SRC", help=f"folder that holds {IMAGES}, {LUNG_MASKS} and {LESION_MASKS}")
    option("--out", type=Path, default=Path("data/radiopaedia"), help="folder to write")
    option("--by", choices=("patient", "slice"), default="patient", help="what to draw")
    option("--split", type=three_counts, default="300,73,73", help="slices in train,test,seg_test")
    option("--size", type=int, default=512, help="side of the slices written, in pixels")
    option("--all-slices", action="store_true", help="keep slices without lesion too")
    option("--exclude-patient", type=int, nargs="+", default=[], metavar="N", help="patients to leave out")
    help_ = "HU of levels 0 and 255 where a volume holds grey levels"
    option("--grey-window", type=float, nargs=2, default=[-1250.0, 250.0], metavar=("LOW", "HIGH"), help=help_)
    option("--seed", type=int, default=0, help="seed of the draw")
    option("--overwrite", action="store_true", help="replace another set in --out instead of refusing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Prepare a dataset and print its summary; raises Mistake, before anything is written, for bad input."""
    args = parse_arguments(argv)
    if args.size < 1 or args.seed < 0 or args.grey_window[0] >= args.grey_window[1]:
        raise Mistake("--size must be at least 1, --seed at least 0 and --grey-window LOW below HIGH")
    excluded = sorted(set(args.exclude_patient))
    patients = find_patients(args.src, excluded)
    pixels, grey = survey(args.src, patients, args.size)
    kept = [key for key, counts in pixels.items() if args.all_slices or counts[2:].any()]
    if not kept:
        raise Mistake(f"{args.src}: no slice left after selection; give --all-slices or exclude fewer patients")

    draw = split_by_slice if args.by == "slice" else split_by_patient
    drawn_sides = draw(kept, args.split, np.random.default_rng(args.seed))
    sides = {side: sorted(slices) for side, slices in zip(SIDES, drawn_sides, strict=True)}
    chosen = sorted(set().union(*sides.values()))
    drawn = {"source": args.src.resolve().name, "patients": patients, "excluded": excluded, "grey_volumes": grey}
    drawn |= {key: vars(args)[key] for key in ("grey_window", "by", "split", "size", "all_slices", "seed")}
    split = {side: [slice_name(*key) for key in slices] for side, slices in sides.items()} | {"drawn": drawn}

    make_room(args.out, split, [slice_name(*key) for key in chosen], args.overwrite)
    write_slices(args.src, args.out, chosen, args.size, dict.fromkeys(grey, args.grey_window))
    write_split(args.out / "split.json", **split)  # last: it says that the set is whole

    print(f"{len(patients)} volumes, {len(pixels)} slices: {len(kept)} selected, {len(chosen)} written to {args.out}")
    if grey:
        low, high = args.grey_window
        print(f"grey levels 0..255 mapped back to {low:g}..{high:g} HU in volumes {', '.join(map(str, grey))}")
    print(f"split by {args.by}; slices asked for: {', '.join(map(str, args.split))}")
    print(summary(sides, pixels))


if __name__ == "__main__":
    exit_on_mistake(main)
