"""Judge a set of slices before anything is trained on it: one table, one picture, a line for each kind of finding.

    python data/check.py data/mine

data/mine is laid out as `slices.py` says. An error must be mended, and makes exit status 2; a note may be right.
contact_sheet.png shows the most diseased slice of each patient under the outlines of its map: look at it.

Each judgement is a small function in JUDGEMENTS that yields its findings: add yours there.
"""

import hashlib
import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ itself is on it
from data import slices
from data.slices import HU_OFFSET, LABELS, Mistake, patient_of, read_image, read_map

LUNG_HU = (-1000, -400)  # must contain the mean HU of healthy lung; covidgan.py, which stands alone, has the same
GLASS_HU = (-720, -300)  # holds the mean of ground glass, the lower end where there is no healthy lung to compare
DENSE_HU = -450  # below the mean HU of consolidation
TWINS = 80  # HU: a patient's two lungs differ by at most 75, ground glass is at least 87 denser than the lung
FEWEST = 50  # pixels of a label that tell a mean
AERATED = -500  # HU: what is lower is lung or air, what is higher is tissue
TURNED = 40  # HU by which a lung that is turned against its CT lies denser: see turned
SHEET, COLUMNS, TILE = 60, 6, (256, 256)  # patients at most on the contact sheet, and in a row; pixels of each


# ---- one slice or volume and its labels
def check_pair(path: Path, hu: np.ndarray, labels: np.ndarray) -> None:
    """Raise Mistake, naming the file, for a real slice or volume that cannot be its map's: see `fault`."""
    if told := fault(hu, labels)[1]:
        raise Mistake(f"{path}: {told}, or overrule by --unchecked")


def fault(hu: np.ndarray, labels: np.ndarray) -> tuple[int, str]:
    """Why a slice or volume cannot be its map's: grey levels, a turn, tissue, densities; 0 and "" where it can be.

    hu int16, labels uint8: [H, W] or [Z, H, W]. The number: the label of wrong density, or 1. A small one is no proof.
    """
    if -HU_OFFSET <= hu.min() < hu.max() <= 255 - HU_OFFSET:
        return 1, f"no value above 255, so grey levels, not HU + {HU_OFFSET}: convert it first"
    measured = measure(hu, labels)
    label, wrong = densities(measured, np.prod(hu.shape[-2:]) / 100, whole=labels.ndim == 3 and len(labels) > 1)
    if (told := turned(hu, lung := labels == 1)) and (label < 2 or turned(hu, labels > 0)):
        return 1, f"its map's lung {told}: turn one of them"
    if not wrong and (hu[lung] > LUNG_HU[1]).sum() > max(lung.sum() / 6, lung.size / 120):  # if right, below an eighth
        return 1, "a sixth of its map's lung is tissue: it is another slice's, or lacks lesions"
    means = means_of(measured)
    if not wrong and (told := sided(labels)) and means[1:3].max() < AERATED:  # of a whole lung as of ground glass
        return 2, f"mean {means[2]:+.0f} HU in {LABELS[2]} (label 2), {means[1]:+.0f} HU (label 1): {told}"
    return label, wrong


def sided(labels: np.ndarray) -> str:
    """A note on two labels, of uint8 [H, W] or [Z, H, W], that look like the two lungs; "" where none do."""
    columns = np.flatnonzero(labels.reshape(-1, labels.shape[-1]).any(0))
    if not columns.size:
        return ""
    middle = (columns[0] + columns[-1] + 1) // 2
    sides = [np.bincount(half.ravel(), minlength=4)[1:4] for half in np.split(labels, [middle], axis=-1)]
    both = sum(sides)
    # Each holds a quarter of all lung or more, and lies on one side.
    here, there = (np.flatnonzero((both > 0.25 * both.sum()) & (side > 0.9 * both)) + 1 for side in sides)
    if not (here.size and there.size):
        return ""
    told = f"labels {here[0]} and {there[0]} lie on one side each, like a left and a right lung"
    return f"{told}: healthy lung is 1, {LABELS[2]} 2, {LABELS[3]} 3"


def no_lung(mean: float) -> str:
    """What a mean HU outside LUNG_HU looks like, in words, and the mend; "" for one inside."""
    low, high = LUNG_HU
    if low <= mean <= high:
        return ""
    looks = "the map of another slice, or a turned one: mend it"
    if mean < low or low <= mean - HU_OFFSET <= high:
        added = f"a CT's intercept, {HU_OFFSET} too much: take it off, or a window's levels: convert them"
        looks = added if mean > low else f"an offset of {HU_OFFSET} lost: add it"
    return f"which has {low} to {high}: it looks like {looks}"


def turned(hu: np.ndarray, lung: np.ndarray) -> str | None:
    """How a healthy lung, bool [H, W] or [Z, H, W], is turned against its CT's HU, in words; None where it lies right.

    It then lies on more tissue than when it is turned back, by 47 HU or more; one that lies right by its vessels alone,
    30 HU in 13 patients. All that is aerated counts alike, as the air around the body. A small lung tells nothing.
    """
    if lung.ndim == 3:  # of a volume, fewer pixels tell as much
        step = max(1, lung.shape[2] // 128)
        hu, lung = hu[:, ::step, ::step], lung[:, ::step, ::step]
    if np.count_nonzero(lung) < (0.05 if lung.ndim == 2 else 0.01) * lung.size:
        return None
    hu = hu.clip(AERATED, 0)
    if lung.ndim == 3:  # reversed within its own bounds: above it there may be more, or fewer, slices than below
        with_lung = np.flatnonzero(lung.any((1, 2)))
        hu, lung = (part[with_lung[0] : with_lung[-1] + 1] for part in (hu, lung))
    found, names = {}, ("slices", "rows", "columns")[-lung.ndim :]
    for flips in itertools.product((False, True), repeat=lung.ndim):
        axes = tuple(np.flatnonzero(flips).tolist())
        called = " and ".join(names[axis] for axis in axes)
        found[f"{called} reversed"] = hu[np.flip(lung, axes)].mean(dtype=float)
    if lung.shape[-1] == lung.shape[-2]:
        found["rows and columns exchanged"] = hu.swapaxes(-1, -2)[lung].mean(dtype=float)
    mean, best = hu[lung].mean(dtype=float), min(found, key=found.get)
    if not found[best] < mean - TURNED:
        return None
    return f"lies on more tissue than with {best}: it is turned against its CT"


# ---- a patient
def measure(hu: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By label, float [2 + n, n]: pixels, the sum of their HU, and how often each label is a neighbour in a row."""
    n = len(LABELS)
    pairs = np.bincount((n * labels[..., :-1] + labels[..., 1:]).ravel(), minlength=n * n).reshape(n, n)
    sums = np.bincount(labels.ravel(), hu.ravel(), n)
    return np.stack([np.bincount(labels.ravel(), minlength=n), sums, *(pairs + pairs.T)])


def means_of(measured: np.ndarray, fewest: float = FEWEST) -> np.ndarray:
    """Mean HU by label [n] of what `measure` gave; NaN where there are too few pixels to tell."""
    pixels, sums = measured[:2]
    return np.where(pixels >= fewest, sums / np.maximum(pixels, 1), np.nan)


def densities(measured: np.ndarray, fewest: float = FEWEST, whole: bool = False) -> tuple[int, str]:
    """What is wrong with the densities of labels: the label, and its mean HU with what it looks like.

    Healthy lung lies within LUNG_HU, ground glass is denser, and consolidation is denser still. On 14 real patients
    lung had -889 to -717 HU, ground glass -708 to -508, and consolidation -283 to -6. 0 and "" where nothing is wrong.
    fewest: pixels of a label that are judged; less than a hundredth of all lung never is. whole: a volume, which has
    some healthy lung.
    """
    means, neighbours = means_of(measured, max(fewest, FEWEST, measured[0, 1:].sum() / 100)), measured[2:]
    there = [label for label in (1, 2, 3) if not np.isnan(means[label])]
    figures = {label: f"{means[label]:+.0f} HU in {LABELS[label]} (label {label})" for label in there}
    order = "it looks like labels in another order"
    if 1 in there and means[1] == np.nanmin(means[1:]) and (told := no_lung(means[1])):
        return 1, f"mean {figures[1]}, {told}"
    for less, more in itertools.pairwise(there):
        step = means[more] - means[less]
        border = neighbours[more].sum() - neighbours[more, more]
        apart = neighbours[more, less] < 0.1 * border  # a lesion lies in lung, the other lung lies beside it
        if step > 0 and not (apart and step < TWINS):
            continue
        looks = f"{order}, or the map of another slice"
        if apart and abs(step) < TWINS:
            looks = "it looks like a left and a right lung taken for two labels"
        return more, f"mean {figures[more]}, {figures[less]}: {looks}"
    if 2 in there and 1 not in there and (whole or means[2] < GLASS_HU[0]):
        return 2, f"mean {figures[2]}, and no healthy lung (label 1): it looks like lung taken for a lesion"
    if 3 in there and means[3] < DENSE_HU:
        return 3, f"mean {figures[3]}, which is denser: {order}"
    if 2 in there and means[2] > GLASS_HU[1]:
        return 2, f"mean {figures[2]}, which is less dense: {order}"
    return 0, ""


# ---- a set
class Slice(NamedTuple):
    """What is kept of an image and its map."""

    image: Path
    map: Path
    sides: list[str]  # of the split that list it
    shape: tuple[int, ...]
    measured: np.ndarray  # see measure
    fault: str
    digest: bytes  # of the image's pixels


class Set(NamedTuple):
    """A set of slices as it was found."""

    folder: Path
    images: dict[str, Path]
    maps: dict[str, Path]
    split: dict[str, list[str]]  # no sides where there is no split.json
    slices: list[Slice]  # those that have both and can be read
    patients: dict[str, list[Slice]]  # the same by patient
    broken: list[str]  # what is wrong with the others, and with split.json


Finding = tuple[str, object, str]  # "error" or "note"; the file or what else it is about; what it is, and the mend


def read_slice(image: Path, map_: Path, sides: list[str]) -> Slice:
    """Read an image and its map. Raises Mistake where one is no such file, and where their sizes differ."""
    hu, labels = read_image(image), read_map(map_)
    if hu.shape != labels.shape:
        raise Mistake(f"{map_}: {labels.shape} pixels, its image has {hu.shape}: bring both to one size")
    digest = hashlib.sha256(hu).digest()
    return Slice(image, map_, sides, hu.shape, measure(hu, labels), fault(hu, labels)[1], digest)


def read_set(folder: Path) -> Set:
    """Read a set. Raises Mistake where there are no images or maps, and where its making was cut off."""
    slices.check_finished(folder)
    images, maps = (slices.list_pngs(folder / part, part) for part in ("images", "maps"))
    found = Set(folder, images, maps, {}, [], defaultdict(list), [])
    try:
        if (folder / "split.json").exists():
            found.split.update(slices.read_split(folder / "split.json"))
    except Mistake as mistake:
        found.broken.append(str(mistake))
    for name in tqdm(sorted(images.keys() & maps.keys()), desc="checking slices", disable=None):
        try:
            sides = [side for side, names in found.split.items() if name in names]
            found.slices.append(read_slice(images[name], maps[name], sides))
            found.patients[patient_of(name)].append(found.slices[-1])
        except Mistake as mistake:
            found.broken.append(str(mistake))
    return found


def judge_files(found: Set) -> Iterator[Finding]:
    """Files that cannot be read, and files without a partner."""
    for told in found.broken:
        where, _, what = told.partition(": ")
        yield "error", where, what
    for name in found.maps.keys() - found.images.keys():
        yield "error", found.maps[name], "no image of this name: add it, or take the map away"
    for name in found.images.keys() - found.maps.keys():
        yield "note", found.images[name], "no map of this name, so it is not used"


def judge_split(found: Set) -> Iterator[Finding]:
    """Names without files or without a side, and what is to be tested though it was trained on."""
    if not found.split:
        return
    path, pairs = found.folder / "split.json", found.images.keys() & found.maps.keys()
    train, listed = {*found.split.get("train", [])}, {*itertools.chain(*found.split.values())}
    for name in listed - pairs:
        yield "error", name, f"listed in {path}, without image and map: add them, or take the name out"
    for name in pairs - listed:
        yield "note", name, f"on no side in {path}, so it is not used"
    tested = {*itertools.chain(*(found.split[side] for side in found.split if side != "train"))}
    for name in train & tested:
        yield "error", name, f"trained on and tested in {path}: take it out of one side"
    by_slice = slices.held_split(found.folder).get("drawn", {}).get("by") == "slice"  # as asked for
    for patient in {*map(patient_of, train)} & {*map(patient_of, tested)}:
        told = f"trained on and tested in {path}, where neighbouring slices nearly repeat"
        yield "note" if by_slice else "error", f"patient {patient}", f"{told}: split by patient"


def judge_sizes(found: Set) -> Iterator[Finding]:
    """Slices that are not square, and those that do not have the size that most have."""
    most = Counter(one.shape for one in found.slices).most_common(1)
    for one in found.slices:
        told = f"{one.shape[0]} x {one.shape[1]} pixels"
        if one.shape[0] != one.shape[1]:
            yield "error", one.image, f"{told}, not square: crop or pad image and map"
        elif one.shape != most[0][0]:
            yield "error", one.image, f"{told}, unlike most: bring all to one size"


def judge_densities(found: Set) -> Iterator[Finding]:
    """Labels whose densities a patient cannot have."""
    for patient, its in found.patients.items():
        label, told = densities(sum(one.measured for one in its))
        if label:
            yield "error", f"{found.folder}: patient {patient}", told


def judge_slices(found: Set) -> Iterator[Finding]:
    """Grey levels, maps of other slices, and maps turned or empty."""
    full = any(one.measured[0, 1:].any() for one in found.slices)
    for one in found.slices:
        if one.fault:
            yield "error", one.image, one.fault
        if not one.measured[0, 1:].any():
            yield "note" if full else "error", one.map, "no lung in it: figures leave it out"


def judge_doubles(found: Set) -> Iterator[Finding]:
    """The same image under two names."""
    before: dict[bytes, Slice] = {}
    for one in found.slices:
        double = before.setdefault(one.digest, one)
        if double is not one and one.measured[0, 1:].any():  # pure air may be alike
            sides = {*one.sides, *double.sides}
            kind = "error" if "train" in sides and len(sides) > 1 else "note"
            yield kind, one.image, f"the same image as {double.image.name}: keep one"


JUDGEMENTS = (judge_files, judge_split, judge_sizes, judge_densities, judge_slices, judge_doubles)


# ---- table and picture
def tabulate(found: Set) -> str:
    """A row for each patient, then one for each side: slices, and of each label the pixels and their mean HU."""
    row = "{:14}{:15}{:>7}{:>12}{:>6}{:>13}{:>6}{:>17}{:>6}".format
    lines = [row("patient", "side", "slices", "lung px", "HU", "GGO px", "HU", "consolid. px", "HU")]
    groups = []
    for patient, its in found.patients.items():
        groups.append((patient, "+".join(side for side in found.split if any(side in one.sides for one in its)), its))
    for side, names in found.split.items():
        its = [one for one in found.slices if side in one.sides]
        groups.append((f"{len({*map(patient_of, names)})} patients", side, its))
    for patient, side, its in groups:
        measured = sum((one.measured for one in its), np.zeros((2 + len(LABELS), len(LABELS))))
        means = ["-" if np.isnan(mean) else f"{mean:.0f}" for mean in means_of(measured)]
        cells = zip(measured[0].astype(int).tolist(), means, strict=True)
        lines.append(row(patient[-13:], side, len(its), *[*itertools.chain(*cells)][2:8]))
    return "\n".join(lines)


def tile(image: Path, map_: Path) -> np.ndarray:
    """A slice in the lung window with the outlines of its map, RGB uint8 [256, 256, 3]."""
    grey = np.asarray(ImageOps.pad(Image.fromarray(slices.windowed(read_image(image))), TILE))
    labels = np.asarray(ImageOps.pad(Image.fromarray(read_map(map_)), TILE, Image.Resampling.NEAREST))
    edge = np.zeros(labels.shape, bool)
    for axis, shift in itertools.product((0, 1), (1, -1)):
        edge |= np.roll(labels, shift, axis) < labels
    picture = Image.fromarray(np.where(edge[..., None], slices.coloured(labels), grey[..., None]))
    ImageDraw.Draw(picture).text((4, 2), image.stem, fill=(255, 255, 0))
    return np.asarray(picture)


def check_set(folder: Path) -> int:
    """Print the table and the findings of a set, and write its contact sheet; status 2 where there is an error."""
    found = read_set(folder)
    if found.slices:
        most = [max(its, key=lambda one: one.measured[0, 2:].sum()) for its in found.patients.values()]
        tiles = [tile(one.image, one.map) for one in most[:SHEET]]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
        rows = [np.concatenate(tiles[i : i + COLUMNS], 1) for i in range(0, len(tiles), COLUMNS)]
        slices.write_bytes(folder / "contact_sheet.png", slices.png(np.concatenate(rows)))
        print(tabulate(found))
    alike = defaultdict(list)  # findings that differ in names and figures alone
    for kind, where, what in itertools.chain(*(judge(found) for judge in JUDGEMENTS)):
        alike[kind, re.sub(r"\w*\d\w*", "", what)].append(f"{where}: {what}")
    for (kind, _), lines in sorted(alike.items()):
        print(f"{kind}: {min(lines)}" + (f" ({len(lines) - 1} more like this)" if len(lines) > 1 else ""))
    errors = sum(len(lines) for (kind, _), lines in alike.items() if kind == "error")
    print(f"{folder}: {len(found.slices)} slices, {errors} errors; look at {folder / 'contact_sheet.png'}")
    return 2 if errors else 0


def main(argv: list[str] | None = None) -> int:
    """Check the folder of the command line; `argv` None means the program's own."""
    parser = slices.OneLineParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with images/, maps/ and perhaps split.json")
    return check_set(parser.parse_args(argv).folder)


if __name__ == "__main__":
    slices.exit_on_mistake(main)
