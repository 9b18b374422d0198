"""Turn chest CT volumes with lesion masks (NIfTI) into a dataset of slices, split by patient or by slice.

    python data/prepare.py SRC                                   # by patient, into data/radiopaedia
    python data/prepare.py SRC --by slice                        # as in the paper: neighbouring slices on both sides

SRC is laid out like the public download, with volume N being patient N:

    SRC/rp_im/N.nii.gz          the CT, in HU; a volume stored as grey levels 0..255 is recognised
    SRC/rp_lung_msk/N.nii.gz    0 outside, 1 lung; or 255, or a value per side or lobe
    SRC/rp_msk/N.nii.gz         0 none, 1 ground-glass opacity, 2 consolidation, 3 pleural effusion

docs/data.md has the commands for other public sets, whose names pair the files.

Every volume is turned, by its affine, to radiological display: row 0 is anterior (the spine is at the
bottom), column 0 is the patient's right. Slice P03_S041 is the 42nd from the feet in the turned volume;
what comes before the last "_" is the patient, and a second scan of a patient goes on where the first ended.
`slices.py` gives the format of the result, and `check.py` the judgements that come before anything is written.
"""

import argparse
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ itself is on it
from data import check, slices
from data.lungs import find_lungs
from data.slices import HELD, LARGEST, SIDES, Mistake, slice_name
from data.volumes import Note, Volume, list_volumes, read_labels, read_volume, warn

IMAGES, LUNG_MASKS, LESION_MASKS = "rp_im", "rp_lung_msk", "rp_msk"
# A public case of Radiopaedia is a patient, with one or more studies and scans: radiopaedia_CASE_STUDY_SCAN.
PATIENT = r"radiopaedia_\d+(?=_)|.+"
WAYS = 40_000_000  # of distributing patients are followed, over the square of their number: all for 14 of 600 slices

Slice = tuple[int, int]  # (patient, position), counted upwards from the feet
Places = dict[Slice, tuple["Scan", int]]  # where each slice comes from: its scan, and which of its slices


class Scan(NamedTuple):
    """The files of one scan; `lung` is None with --labels, and where the lungs must be found in the CT."""

    name: str
    patient: int
    ct: Path
    lung: Path | None
    lesion: Path


def find_scans(args: argparse.Namespace) -> list[Scan]:
    """List the scans by patient number and name. Raises Mistake for what is missing; a mask alone gives a warning."""
    lungs, lesions = None if args.labels or args.lungs == "auto" else args.lungs, args.labels or args.lesions
    images, masks = list_volumes(args.images), {each: list_volumes(each) for each in (lungs, lesions) if each}
    patients = {name: patient_by(name, args.patient) for name in images}
    if args.masked_only:
        masked = {name: patients[name] for name in images if all(name in files for files in masks.values())}
        print(f"{len(masked)} of {len(images)} volumes have masks")
        patients = masked or patients  # if none have, the first is reported below
    for where, files in masks.items():
        if lonely := [name for name in patients if name not in files]:
            mend = "add this mask, or leave the volume out by --masked-only"
            if not files.keys() & images.keys():
                mend = "names pair the files; where they differ, give a pattern such as 'DIR/*_mask.nii.gz'"
            raise Mistake(f"{where}: the mask of {lonely[0]} is missing: {mend}")
        for name in sorted(files.keys() - images.keys()):
            warn(f"{files[name]}: a mask without a volume, ignored")
    numbers = number_patients({*patients.values()})
    lung, lesion = masks.get(lungs), masks[lesions]
    scans = [Scan(name, numbers[patients[name]], images[name], lung and lung[name], lesion[name]) for name in patients]
    return sorted(scans, key=lambda scan: (scan.patient, scan.name))


def patient_by(name: str, pattern: str) -> str:
    """The part of a name that identifies the patient: the pattern's first group, or all that it matches."""
    match = re.match(pattern, name)
    if not match or not match[0]:
        raise Mistake(f"--patient {pattern}: does not match {name}; give a pattern for the part that names the patient")
    return (match[1] if match.re.groups else None) or match[0]


def number_patients(patients: set[str]) -> dict[str, int]:
    """Patient N is number N where all names are plain numbers; else they are numbered in the order of their names."""
    if all(patient.isdecimal() and patient == str(int(patient)) for patient in patients):
        return {patient: int(patient) for patient in patients}
    return {patient: number for number, patient in enumerate(sorted(patients), start=1)}


def read_scan(scan: Scan, args: argparse.Namespace, note: Note) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Read and check a scan: HU [Z, H, W], labels uint8 [Z, H, W], pixel height and width in mm, was it grey."""
    volume = read_volume(scan.ct, note)
    hu, grey = to_hu(scan.ct, volume.voxels, args.grey_window)
    nowhere = ~np.isfinite(hu)
    if nowhere.any():
        note(f"{scan.ct}: {nowhere.sum()} values are no number; taken as air")
        hu[nowhere] = HELD[0]
    labels = read_scan_labels(scan, args, volume, hu, note)
    if not args.unchecked:
        if not labels.any():
            raise Mistake(f"{scan.lung or scan.ct}: no lung in it: give a lung mask, or --unchecked to go on")
        label, told = check.fault(hu, labels)
        if label > 1:
            mend = "give lesions alone as --lesions, with --binary where 1 is any lesion, or lung and both as --labels"
            raise Mistake(f"{scan.lesion}: {told}: {mend}, or overrule by --unchecked")
        if told:
            raise Mistake(f"{scan.ct}: {told}, or overrule by --unchecked")
    return hu.clip(*HELD), labels, volume.millimetres, grey  # before resizing, which would mix in padding of -3024


def read_scan_labels(scan: Scan, args: argparse.Namespace, ct: Volume, hu: np.ndarray, note: Note) -> np.ndarray:
    """Labels 0..3, uint8 [Z, H, W], of a scan: from one mask, or merged from those of lungs and lesions."""
    lesion = read_labels(scan.lesion, (0, 1) if args.binary else (0, 1, 2, 3), ct, note)
    if args.labels:
        return lesion
    diseased = (lesion == 1) | (lesion == 2)  # an effusion is beside the lung
    if scan.lung:
        lung = read_labels(scan.lung, (*range(6), 255), ct, note) > 0  # sides, lobes or 255: all mean lung
    else:
        lung = find_lungs(hu, diseased, ct.millimetres)
    if args.binary:  # smoothed by 1 mm: noise divides nothing
        smooth = ndimage.gaussian_filter(hu.clip(*HELD).astype(np.float32), (0, *(1 / ct.millimetres)))
        lesion = lesion * (1 + (smooth > args.consolidation_above))
    return np.where(diseased, lesion + 1, lung).astype(np.uint8)


def to_hu(path: Path, voxels: np.ndarray, window: Sequence[float]) -> tuple[np.ndarray, bool]:
    """HU of a volume, and whether it held grey levels 0..255, which the window maps back; NaN stays."""
    finite = voxels[np.isfinite(voxels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    if float(high) - float(low) < 20:  # HU / 1000, or standardised
        raise Mistake(f"{path}: values {low:.3g} to {high:.3g} are no HU: give the CT as it was before scaling")
    if low >= -64 and 1 < high <= 320:  # spline resampling goes a little beyond 0 and 255
        bottom, top = window
        return bottom + np.clip(voxels, 0, 255).astype(np.float32) * ((top - bottom) / 255), True
    return voxels.astype(np.promote_types(voxels.dtype, np.int16)), False  # a copy, which may be corrected


def fit(pixels: np.ndarray, millimetres: np.ndarray, size: int, fill: int) -> np.ndarray:
    """Bring one slice [H, W] to [size, size] of the same type.

    Proportions in mm are kept: the longer side fills the square, and what the shorter leaves is `fill`. Labels uint8
    take the nearest pixel, so that none is mixed. HU float32 go through Pillow's bicubic filter, which widens when
    downsampling; it overshoots at edges, so they are clipped to the slice's own range.
    """
    extent = pixels.shape * millimetres  # height, width in mm
    height, width = np.maximum(1, np.rint(size * extent / extent.max())).astype(int).tolist()
    filter_ = Image.Resampling.NEAREST if pixels.dtype == np.uint8 else Image.Resampling.BICUBIC
    square = np.full((size, size), fill, pixels.dtype)
    top, left = (size - height) // 2, (size - width) // 2
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), filter_))
    square[top : top + height, left : left + width] = resized.clip(pixels.min(), pixels.max())
    return square


def survey(scans: list[Scan], args: argparse.Namespace) -> tuple[dict[Slice, np.ndarray], Places, list[str]]:
    """Read and check every scan, one at a time; write nothing.

    Returns the pixels of each label [4] in every slice, at the size written, where each slice comes from, and the
    names of the scans of grey levels.
    """
    pixels, places, grey = {}, {}, []
    with tqdm(scans, desc="checking volumes", disable=None) as bar:  # closed before an error is printed
        for scan in bar:
            _, labels, millimetres, is_grey = read_scan(scan, args, note=warn)
            grey += [scan.name] if is_grey else []
            start = sum(patient == scan.patient for patient, _ in pixels)  # after the patient's other scans
            for z, label_map in enumerate(labels):
                key = scan.patient, start + z
                pixels[key] = np.bincount(fit(label_map, millimetres, args.size, fill=0).ravel(), minlength=4)
                places[key] = scan, z
    return pixels, places, grey


def split_by_slice(kept: list[Slice], counts: list[int], rng: np.random.Generator) -> list[list[Slice]]:
    """Draw train, test and seg_test slice by slice, in exactly the `counts` asked for; the rest is left out.

    With too few slices for three parts seg_test is test; with too few for two, these share all in proportion.
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

    The `counts` are targets, scaled to the slices there are; of all ways to distribute the patients, one with the
    smallest sum of deviations is taken, the seed deciding ties. With fewer than three patients seg_test is test.
    """
    sizes = Counter(patient for patient, _ in kept)
    if len(sizes) < 2:
        raise Mistake(f"patient {next(iter(sizes))} is the only one with slices to split; give --by slice")
    parts = 3 if len(sizes) > 2 and counts[2] else 2
    targets = [count * len(kept) / sum(counts[:parts]) for count in counts[:parts]]

    def deviation(filled: Sequence[int], done: float = 1) -> float:
        return sum(abs(count - target * done) for count, target in zip(filled, targets, strict=True))

    # Exact search: ways that give the parts the same sizes are equally good, so one is enough. That leaves at
    # most slices ** 2 / 2 ways instead of 3 ** patients. For a large set, only the most even are followed.
    order = rng.permutation(sorted(sizes)).tolist()
    ways = {(0,) * parts: ()}  # slices in each part -> the part of each patient so far
    for patient in order:
        longer = {}
        for filled, chosen in ways.items():
            for part in range(parts):
                after = (*filled[:part], filled[part] + sizes[patient], *filled[part + 1 :])
                longer.setdefault(after, (*chosen, part))
        if len(longer) > (limit := max(1, WAYS // len(order) ** 2)):
            even = partial(deviation, done=sum(next(iter(longer))) / len(kept))
            longer = {filled: longer[filled] for filled in nsmallest(limit, longer, key=even)}
        ways = longer
    best = min(filter(all, ways), key=deviation)
    part_of = dict(zip(order, ways[best], strict=True))
    sides = [[key for key in kept if part_of[key[0]] == part] for part in range(parts)]
    return sides if parts == 3 else [*sides, sides[1]]


def write_slices(args: argparse.Namespace, chosen: list[Slice], places: Places) -> None:
    """Write the image and the map of every slice `chosen`."""
    with tqdm(total=len(chosen), desc="writing slices", disable=None) as bar:
        for scan, keys in itertools.groupby(chosen, key=lambda key: places[key][0]):
            hu, labels, millimetres, _ = read_scan(scan, args, note=lambda _: None)  # noted when it was checked
            for key in keys:
                z, name = places[key][1], f"{slice_name(*key)}.png"
                pixels_hu = fit(hu[z].astype(np.float32), millimetres, args.size, fill=HELD[0])
                slices.write_image(args.out / "images" / name, pixels_hu)
                slices.write_map(args.out / "maps" / name, fit(labels[z], millimetres, args.size, fill=0))
                bar.update()


def three_counts(text: str) -> list[int]:
    """Parse "300,73,73", or raise Mistake; the last may be 0."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts) or 0 in map(int, parts[:2]):
        raise Mistake(f"--split {text}: give three counts like 300,73,73, of which only the last may be 0")
    return [int(part) for part in parts]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `argv` None means the program's own. SRC stands in for any of the three not given."""
    parser = slices.OneLineParser(__doc__)
    option = parser.add_argument
    option("src", nargs="?", metavar="SRC", help=f"folder that holds {IMAGES}, {LUNG_MASKS} and {LESION_MASKS}")
    option("--images", metavar="CT", help="folder of the CTs, or a quoted pattern such as 'DIR/*_ct.nii.gz'")
    option("--lungs", metavar="MASKS", help="the same for the lung masks, or auto: find the lungs in the CT")
    option("--lesions", metavar="MASKS", help="the same for the lesion masks")
    help_ = "in place of both, masks of our own labels: 1 healthy lung, 2 ground glass, 3 consolidation"
    option("--labels", metavar="MASKS", help=help_)
    help_ = "lesion masks hold 0 and 1 for any lesion, divided by density; --no-binary: 1 is only ground glass"
    option("--binary", action=argparse.BooleanOptionalAction, help=help_)
    option("--consolidation-above", type=float, default=-400.0, metavar="HU", help="where --binary divides lesions")
    option("--masked-only", action="store_true", help="leave out volumes without masks instead of refusing")
    option("--patient", default=PATIENT, metavar="REGEX", help="the part of a name that is the patient")
    option("--out", type=Path, default=Path("data/radiopaedia"), help="folder to write")
    option("--by", choices=("patient", "slice"), default="patient", help="what to draw")
    option("--split", type=three_counts, default="300,73,73", help="slices in train,test,seg_test")
    option("--size", type=int, default=512, help="side of the slices written, in pixels")
    option("--all-slices", action="store_true", help="also keep slices without lesion")
    help_ = "HU of levels 0 and 255 where a volume holds grey levels"
    option("--grey-window", type=float, nargs=2, default=[-1250.0, 250.0], metavar=("LOW", "HIGH"), help=help_)
    option("--unchecked", action="store_true", help="accept a CT whose lung or tissue has a density that no chest has")
    option("--seed", type=int, default=0, help="seed of the draw")
    option("--overwrite", action="store_true", help="replace another set in --out instead of refusing")
    args = parser.parse_args(argv)
    if args.labels and (args.lungs or args.lesions or args.binary):
        raise Mistake("--labels: it stands in place of --lungs, --lesions and --binary: give it without them")
    folders = {"images": IMAGES} if args.labels else {"images": IMAGES, "lungs": LUNG_MASKS, "lesions": LESION_MASKS}
    for name, folder in folders.items():
        if getattr(args, name) is None and args.src is None:
            raise Mistake(f"--{name}: missing; give it, or SRC with {IMAGES}, {LUNG_MASKS} and {LESION_MASKS} in it")
        setattr(args, name, getattr(args, name) or str(Path(args.src) / folder))
    if not 1 <= args.size <= LARGEST or args.seed < 0 or not -math.inf < args.grey_window[0] < args.grey_window[1]:
        raise Mistake(f"--size must be 1 to {LARGEST}, --seed at least 0 and --grey-window LOW below HIGH")
    return args


def provenance(args: argparse.Namespace, places: Places, grey: list[str]) -> dict:
    """How a set is drawn, for split.json; "patients" lists the scans of each patient number."""
    patients = {}
    for (patient, _), (scan, _) in places.items():
        patients.setdefault(str(patient), {})[scan.name] = None
    return {
        "source": Path(args.src or args.images).resolve().name,
        "patients": {patient: [*names] for patient, names in patients.items()},
        "grey_volumes": grey,
        **{each: Path(vars(args)[each]).name for each in ("lungs", "lesions", "labels") if vars(args)[each]},
        "consolidation_above": args.consolidation_above if args.binary else None,
        **{key: vars(args)[key] for key in ("by", "grey_window", "split", "size", "all_slices", "unchecked", "seed")},
    }


def remarks(args: argparse.Namespace, split: dict) -> Iterator[str]:
    """Lines about what was not in the files but assumed or derived."""
    drawn = split["drawn"]
    if drawn["grey_volumes"]:
        low, high = args.grey_window
        yield f"grey levels 0..255 mapped back to {low:g}..{high:g} HU in volumes {', '.join(drawn['grey_volumes'])}"
    if args.binary:
        yield f"lesions parted by density: consolidation is above {args.consolidation_above:g} HU, smoothed by 1 mm"
    if any([number] != names for number, names in drawn["patients"].items()):
        yield "patients are numbered in the order of their names; split.json lists them"
    if split["seg_test"] == split["test"]:
        yield "seg_test is test: too few for three parts, or none asked for"
    yield f"split by {drawn['by']}; slices asked for: {', '.join(map(str, args.split))}"


def main(argv: list[str] | None = None) -> int:
    """Prepare a dataset and check it; raises Mistake, before anything is written, for bad input."""
    args = parse_arguments(argv)
    scans = find_scans(args)
    pixels, places, grey = survey(scans, args)
    kept = [key for key, counts in pixels.items() if args.all_slices or counts[2:].any()]
    if not kept:
        where = args.src or args.images
        raise Mistake(f"{where}: no slice left after selection; give --all-slices")

    _, _, glass, dense = sum(pixels.values())
    if args.binary is None and not args.labels and glass and not dense:
        mend = "--binary if 1 is any lesion, to be parted by density, or --no-binary if 1 is ground glass alone"
        raise Mistake(f"{args.lesions}: no mask holds a 2, consolidation: give {mend}")

    draw = split_by_slice if args.by == "slice" else split_by_patient
    sides = dict(zip(SIDES, map(sorted, draw(kept, args.split, np.random.default_rng(args.seed))), strict=True))
    chosen = sorted(set().union(*sides.values()))
    split = {side: [slice_name(*key) for key in keys] for side, keys in sides.items()}
    split["drawn"] = provenance(args, places, grey)

    with slices.held(args.out):
        slices.make_room(args.out, args.overwrite, same=slices.held_split(args.out) == split)
        write_slices(args, chosen, places)
        slices.write_split(args.out / "split.json", **split)  # last: it marks the set as complete
        print(f"{len(scans)} volumes, {len(pixels)} slices: {len(kept)} selected, {len(chosen)} written to {args.out}")
        print("\n".join(remarks(args, split)))
        status = check.check_set(args.out)
    return 0 if args.unchecked else status


if __name__ == "__main__":
    slices.exit_on_mistake(main)
