"""How good are synthetic CT slices? Compares them with real ones, pair by pair and as a set. No training framework.

    python eval.py REAL FAKE --maps MAPS                    # PSNR, SSIM, RMSE, NRMSE (Table II), and the lung's
    python eval.py data/phantom synthetic                   # datasets: their images/, and FAKE's or REAL's maps/
    python eval.py REAL FAKE --features features.onnx       # FID, KID, precision, recall
    python eval.py REAL FAKE --maps MAPS --unet unet.onnx   # Dice, sensitivity, specificity (section IV-B.2)
    python eval.py REAL FAKE --maps MAPS --train data/ct    # does the generator copy its training images?
    python eval.py data/ct augmented --unpaired             # sets of any sizes and names, without figures of pairs
    python eval.py MAPS generator.onnx                      # can the generator be steered? No real slices needed

REAL and FAKE hold 16-bit PNG of HU + 1024, paired by file name, and are measured through the lung window, as 0..1. With
maps, the complete image is the synthesis inside the lung (label above 0) and the real slice elsewhere, bit for bit; the
lung alone is black elsewhere. Slices without lung are left out. A floor is what one half of the real slices scores
against the other, an interval half of the mean's 95 % interval. Fine texture below 1 is blur, above noise. Slices of a
patient that follow each other are neighbours: a change below the real one's is streaks, above it flicker. Steering has
HU: how the other lung changes where one is painted in, and the lung where its map moves by a pixel; numbers told and
got; two draws. --json has more than is printed, by the same names. Research only, not for diagnosis.

    OUT/eval_cases.png         the best, median and worst case by SSIM: map | real | synthetic | difference
    OUT/eval_memorisation.png  --train: the synthetic lungs nearest to a training image, each beside it
"""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, groupby, islice, pairwise, product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, special
from tqdm import tqdm

from data import slices
from data.check import check_pair
from data.runtime import ort
from data.slices import HU_OFFSET, LABELS, LEVEL, WIDTH, Mistake, read_image, read_map
from infer_onnx import ORT_ERRORS, PROVIDERS, Generator, ahead, open_session, steering_of, usable_cores

CASES, SUSPECTS = "eval_cases.png", "eval_memorisation.png"  # in OUT
SIDES = ("fake", "real")
GIVE_MAPS = "give --maps, or with --unpaired a maps/ beside each images/"
LESIONS = {"GGO": (2,), "consolidation": (3,), "infection": (2, 3)}  # labels of each
THUMBNAIL, MOST = 64, 4  # memorisation: pixels per side at which lungs are compared, suspects that are shown
MANIFOLD, NEAREST = ("precision", "recall"), 5  # k of their nearest neighbours
RINGS, FINE = 16, 8  # of equal width, up to 0.5 cycles per pixel; fine texture is in those from 0.25 on
FREQUENCIES = (np.arange(RINGS) + 0.5) / (2 * RINGS)  # of the rings' middles, cycles per pixel
MARGIN, TAPER = 2, 4  # pixels along a label's edge that a spectrum leaves out, and over which it fades in
STEERED, DISC = 24, 0.08  # maps at most that a generator is steered on; part of both lungs that is painted
QUIETEST = 1 / 12  # HU^2: the power spectrum of rounding to whole HU, below which nothing can be told apart
SSIM_WINDOW, SEED = 11, 0  # the seed draws the floors' halves

Rows = dict[str, dict[str, Any]]  # of a table: row -> column -> value
Groups = dict[tuple[str, ...], list["Pair"]]  # sides -> pairs: both sides at once, or one after the other
Pool = tuple[np.ndarray, np.ndarray]  # of slices: spectrum, HU^2 [RINGS]; share of each step of HU [labels, 256]


# ---- pairs and their means
class Pair(NamedTuple):
    """The files of one case; a slice of an unpaired set is a pair with itself."""

    name: str
    real: Path
    fake: Path
    labels: Path | None


class Batch(NamedTuple):
    """Cases of one size."""

    real: np.ndarray  # int16 [N, H, W], HU
    fake: np.ndarray  # int16 [N, H, W], HU, completed: equal to real outside the lung
    labels: np.ndarray  # uint8 [N, H, W], 1 everywhere where there are no maps


def pngs(folder: Path, part: str) -> dict[str, Path]:
    """PNGs of a folder by name; of a dataset, those of its part "images" or "maps". Raises Mistake if there is none."""
    slices.check_finished(folder)
    return slices.list_pngs(folder / part if (folder / part).is_dir() else folder, part)


def dataset(folder: Path) -> Path:
    """The dataset that a folder is, or whose images/ it is."""
    return folder.parent if folder.name == "images" else folder


def join(names: list[str], reals: dict[str, Path], fakes: dict[str, Path], maps: Path | None) -> list[Pair]:
    """Pairs of these names, with their maps where there are any. Raises Mistake for a missing map."""
    labels = pngs(maps, "maps") if maps else {}
    if missing := [name for name in names if maps and name not in labels]:
        raise Mistake(f"{maps}: the maps of {len(missing)} images are missing, {missing[0]}.png first: add them")
    return [Pair(name, reals[name], fakes[name], labels.get(name)) for name in names]


def find_sets(real: Path, fake: Path) -> Groups:
    """All slices of each side, with its own maps where both sides have maps. Raises Mistake for a missing map."""
    found, with_maps = {}, all((dataset(folder) / "maps").is_dir() for folder in (real, fake))
    for side, folder in (("real", real), ("fake", fake)):
        images = pngs(folder, "images")
        found[side,] = join([*images], images, images, dataset(folder) / "maps" if with_maps else None)
    return found


def find_pairs(real: Path, fake: Path, maps: Path | None = None) -> Groups:
    """Pairs by file name; maps None: FAKE's or REAL's own. Raises Mistake where there is none."""
    reals, fakes = pngs(real, "images"), pngs(fake, "images")
    both, single = sorted(reals.keys() & fakes.keys()), sorted(reals.keys() ^ fakes.keys())
    if not both:
        raise Mistake(f"{fake}: {min(fakes)} and all others are not in {real}: name each slice as its real one")
    if single:
        line = f"{len(reals) - len(both)} names are in {real} only, {len(fakes) - len(both)} in {fake} only"
        print(f"note: {line}, {single[0]} first: left out", file=sys.stderr)
    split = dataset(real) / "split.json"
    if real != fake and split.is_file() and (trained := {*slices.read_split(split).get("train", [])} & {*both}):
        line = f"{len(trained)} of {len(both)} pairs are of the training side ({split})"
        print(f"note: {line}: synthesize --side test alone for figures of new patients", file=sys.stderr)
    beside = (dataset(folder) / "maps" for folder in (fake, real))
    return {SIDES: join(both, reals, fakes, maps or next((folder for folder in beside if folder.is_dir()), None))}


def is_lung_alone(path: Path, labels: Path) -> bool:
    """Whether a slice is one value outside its map's lung."""
    hu, outside = read_image(path), read_map(labels) == 0
    return outside.shape == hu.shape and outside.any() and bool((hu[outside] == hu[0, 0]).all())


def find_regions(args: argparse.Namespace, groups: Groups) -> list[str]:
    """What to measure: without maps complete images, of lungs alone these, else both. Says what looks exchanged."""
    middle = [pairs[len(pairs) // 2] for pairs in groups.values()]
    real, fake = middle[0], middle[-1]  # one of each side; the same where they are paired
    if not real.labels:
        return ["complete"]
    alone = is_lung_alone(real.real, real.labels), is_lung_alone(fake.fake, fake.labels)
    if (dataset(args.real) / "run.json").is_file() or alone == (True, False):
        print(f"note: {args.real}: synthetic (a run.json, or lungs alone)? Give the real slices first", file=sys.stderr)
    return ["lung"] if args.unpaired and any(alone) else ["complete", "lung"]


def read_pair(pair: Pair, unchecked: bool = False) -> Batch:
    """A pair as a batch of one. Raises Mistake for a bad file, sizes that differ, and a map that is not its slice's."""
    real, fake = read_image(pair.real), read_image(pair.fake)
    labels = read_map(pair.labels) if pair.labels else np.ones(real.shape, np.uint8)
    for path, array in ((pair.fake, fake), (pair.labels, labels)):
        if array.shape != real.shape:
            raise Mistake(f"{path}: {array.shape} pixels, {pair.real} has {real.shape}: bring both to one size")
    if labels.any() and not unchecked:  # without maps grey levels alone can be told
        check_pair(pair.real, real, labels if pair.labels else np.zeros_like(labels))
    return Batch(real[None], np.where(labels > 0, fake, real)[None], labels[None])


def batches(pairs: list[Pair], size: int, unchecked: bool = False) -> Iterator[tuple[list[Pair], Batch]]:
    """Batches of pairs with lung, in order: neighbours of equal size, at most `size` of them; a few are read ahead."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        read = ahead(pool, partial(read_pair, unchecked=unchecked), pairs, 4 * usable_cores())
        read = zip(pairs, tqdm(read, "pairs", len(pairs), delay=1), strict=True)
        with_lung = ((pair, one) for pair, one in read if one.labels.any())
        for _, alike in groupby(with_lung, lambda both: both[1].real.shape):
            while members := list(islice(alike, size)):
                together, ones = zip(*members, strict=True)
                yield list(together), Batch(*map(np.concatenate, zip(*ones, strict=True)))


class Window(NamedTuple):
    """HU to grey levels."""

    level: float = LEVEL  # HU
    width: float = WIDTH  # HU

    def __call__(self, hu: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Grey levels uint8 of HU int16 of any shape; 0 outside the lung where labels are given."""
        grey = slices.windowed(hu, self.level, self.width)
        return grey if labels is None else grey * (labels > 0)

    def clip(self, hu: np.ndarray) -> np.ndarray:
        """HU that the window shows, float64 of any shape."""
        return hu.astype(np.float64).clip(self.level - self.width / 2, self.level + self.width / 2)


def interval(values: list[float]) -> tuple[float | None, float | None, int]:
    """Mean of values, half the width of its 95 % interval (Student's t), and n; None where there are too few."""
    n = len(values)
    half = float(special.stdtrit(n - 1, 0.975) * np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return float(np.mean(values)) if n else None, half, n


def estimate(values: np.ndarray, names: list[str]) -> dict[str, float | None]:
    """Mean, half its 95 % interval and n of values [n], NaN left out: over slices, and over the patients' means.

    Slices of one patient are alike, so that the interval over slices is too narrow for new patients.
    """
    patients = defaultdict(list)
    for name, value in zip(names, values, strict=True):
        if not math.isnan(value):
            patients[slices.patient_of(name)].append(float(value))
    columns = ("mean", "interval", "n", "patients_mean", "patients_interval", "patients_n")
    of_patients = interval([float(np.mean(group)) for group in patients.values()])
    return dict(zip(columns, interval([*chain(*patients.values())]) + of_patients, strict=True))


def halves(n: int) -> list[np.ndarray]:
    """Indices of two random halves of n slices, each [n // 2], the same each time: floors are one against the other."""
    return np.array_split(np.random.default_rng(SEED).permutation(n // 2 * 2), 2)


# ---- pixel metrics
def blur(image: np.ndarray) -> np.ndarray:
    """Means [N, H - 10, W - 10] of an image [N, H, W] under the Gaussian window of SSIM, where it fits in."""
    edge = SSIM_WINDOW // 2
    return ndimage.gaussian_filter(image, (0, 1.5, 1.5), truncate=edge / 1.5)[:, edge:-edge, edge:-edge]


def ssim(image: np.ndarray, d: np.ndarray) -> np.ndarray:
    """SSIM [N] of an image and of image + d, float64 [N, H, W] in 0..1; K 0.01 and 0.03, population covariance.

    By the difference, so that rounding matters only where images differ: SSIM of equal images is 1 to the last bit.
    """
    mean, mean_d = blur(image), blur(d)
    variance, covariance = blur(image * image) - mean * mean, blur(image * d) - mean * mean_d
    squared_d = mean_d * mean_d
    luminance = 2 * mean * (mean + mean_d) + 0.01**2  # 2 mean(real) mean(fake) + C1
    structure = 2 * (variance + covariance) + 0.03**2  # 2 cov(real, fake) + C2
    score = luminance * structure / ((luminance + squared_d) * (structure + blur(d * d) - squared_d))
    return score.mean((1, 2))


def run(model: Path, session: ort.InferenceSession, outputs: list[str], **inputs: np.ndarray) -> list[np.ndarray]:
    """Run a model for the outputs named. Raises Mistake, naming the model, where ONNX Runtime fails."""
    try:
        return session.run(outputs, inputs)
    except (*ORT_ERRORS, ValueError) as error:  # ValueError: another input's name
        raise Mistake(f"{model}: {error!r:.300}: if memory is short, give a smaller --batch") from error


class PixelMetrics:
    """PSNR, SSIM, RMSE and NRMSE of every pair (Table II).

    PSNR in dB has peak 1 and is at most 100; NRMSE is RMSE over the real image's root mean square, as in Table II, and
    NaN where that is black. The lung's PSNR and RMSE are the complete image's: differences are 0 outside the lung.
    """

    def __init__(self, window: Window, regions: list[str]) -> None:
        self.window, self.regions = window, regions
        self.found: dict[str, list[np.ndarray]] = defaultdict(list)  # row -> [N] of each batch

    def update(self, batch: Batch, sides: tuple[str, ...] = SIDES) -> None:
        """Measure a batch of pairs."""
        real, fake = ((self.window.clip(hu) - self.window.level) / self.window.width + 0.5 for hu in batch[:2])
        d = fake - real  # 0 outside the lung
        mse = (d * d).mean((1, 2))
        for region in self.regions:
            image = real * (batch.labels > 0) if region == "lung" else real
            scale = np.sqrt((image * image).mean((1, 2)))
            scale[scale == 0] = np.nan
            self.found[f"{region} PSNR"].append(-10 * np.log10(mse.clip(1e-10)))
            self.found[f"{region} SSIM"].append(ssim(image, d))
            self.found[f"{region} RMSE"].append(np.sqrt(mse))
            self.found[f"{region} NRMSE"].append(np.sqrt(mse) / scale)

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Tables "pixels" and, by SSIM, "cases"."""
        found = {row: np.concatenate(parts) for row, parts in self.found.items()}
        order = found["complete SSIM"].argsort(kind="stable")[::-1]
        shown = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        cases: Rows = {case: {"name": names[k], "SSIM": found["complete SSIM"][k]} for case, k in shown.items()}
        return {"pixels": {row: estimate(values, names) for row, values in found.items()}, "cases": cases}


# ---- FID and KID
def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of the normal distributions of features x [n, d] and y [m, d], n and m above 1; float64.

    |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2. The last trace is the sum of the singular values of
    R_x R_y^T, with S = R^T R by QR of the centred features: it is never complex, and n may be below d.
    """
    mu_x, mu_y = (features.mean(0, dtype=np.float64) for features in (x, y))
    r_x, r_y = (np.linalg.qr(f - mu, mode="r") / math.sqrt(len(f) - 1) for f, mu in ((x, mu_x), (y, mu_y)))
    cross = np.linalg.svd(r_x @ r_y.T, compute_uv=False).sum()
    return max(0.0, float(((mu_x - mu_y) ** 2).sum() + (r_x**2).sum() + (r_y**2).sum() - 2 * cross))


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel Inception Distance of features x [n, d] and y [m, d], n and m above 1, of all of them at once.

    Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3.
    """
    x, y, d = x.astype(np.float64), y.astype(np.float64), x.shape[1]

    def total(a: np.ndarray, b: np.ndarray) -> float:  # of the kernel over all pairs, some thousand rows at a time
        return sum(float(((part @ b.T / d + 1) ** 3).sum()) for part in np.array_split(a, len(a) // 1000 + 1))

    def within(f: np.ndarray) -> float:  # its mean without each one's pair with itself
        return (total(f, f) - (((f * f).sum(1) / d + 1) ** 3).sum()) / (len(f) * (len(f) - 1))

    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))


def manifold(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Precision and recall of features real [n, d] and fake [m, d], n and m above NEAREST.

    A set's manifold: balls about its features that reach to their k-th nearest neighbours, k = 5. Precision: share of
    the synthetic in the real one. Recall: the reverse (Kynkaanniemi et al. 2019).
    """

    def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # of the distances, [len(a), len(b)]
        return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clip(0)

    def reach(a: np.ndarray) -> np.ndarray:  # each feature is its own first neighbour
        return np.partition(squares(a, a), NEAREST, 1)[:, NEAREST]

    centre = real.mean(0, dtype=np.float64)  # far from the origin, squares would lose the digits that count
    real, fake = real - centre, fake - centre
    between = squares(real, fake)
    shares = (between < reach(real)[:, None]).any(0).mean(), (between < reach(fake)).any(1).mean()
    return dict(zip(MANIFOLD, map(float, shares), strict=True))


def score(real: np.ndarray, fake: np.ndarray) -> Rows:
    """Value and N of FID, KID and MANIFOLD of features [n, d] and [m, d]; None, with a note, of too few."""
    n, d = min(len(real), len(fake)), real.shape[1]
    needs = {"FID": d + 1, "KID": 2} | dict.fromkeys(MANIFOLD, NEAREST + 1)
    found = {"FID": frechet(real, fake)} if n > d else {}
    found |= {"KID": kid(real, fake)} if n > 1 else {}
    found |= manifold(real, fake) if n > NEAREST else {}
    rows: Rows = {figure: {"value": found.get(figure), "N": n} for figure in needs}
    for figure in needs.keys() - found.keys():
        rows[figure]["note"] = f"{figure} needs {needs[figure]} images in {d} dimensions, not {n}"
    return rows


class Features:
    """FID, KID and MANIFOLD of the complete images and of the lungs alone, in each dimension of a feature network."""

    def __init__(self, model: Path, provider: str, window: Window, regions: list[str]) -> None:
        self.model, self.window, self.regions = model, window, regions
        self.session, info = open_session(model, provider, kind="features")
        self.name, self.dimensions = info.get("name", model.stem), [one.name for one in self.session.get_outputs()]
        self.found: dict[tuple[str, str, str], list[np.ndarray]] = defaultdict(list)  # [N, d] of each batch

    def update(self, batch: Batch, sides: tuple[str, ...] = SIDES) -> None:
        """Compute the features of a batch."""
        for region in self.regions:
            for side in sides:
                image = self.window(getattr(batch, side), batch.labels if region == "lung" else None)
                features = run(self.model, self.session, self.dimensions, image=image)
                for dimension, of_batch in zip(self.dimensions, features, strict=True):
                    self.found[dimension, region, side].append(of_batch)

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "features"; the floor is one random half of the real images against the other."""
        rows = {}
        for dimension, region in tqdm([*product(self.dimensions, self.regions)], "features", delay=1):
            fake, real = (np.concatenate(self.found[dimension, region, side]) for side in SIDES)
            half, other = halves(len(real))
            about = {"features": self.name, "dimension": real.shape[1]}
            floors = score(real[half], real[other])
            for figure, found in score(real, fake).items():
                floor = {f"floor_{key}": value for key, value in floors[figure].items()}
                rows[f"{region} {figure} {dimension}"] = about | found | floor
        return {"features": rows}


# ---- texture
def interior(labels: np.ndarray) -> np.ndarray:
    """Weight 0..1 of each pixel in the spectrum, float32 [H, W], from labels [H, W]; background has none.

    0 on MARGIN pixels along each label's edges, whose step would drown all texture, then a sine squared over TAPER.
    """
    depth = np.zeros(labels.shape, np.intp)
    for label in range(1, len(LABELS)):
        steps = ndimage.distance_transform_cdt(np.pad(labels == label, 1), "taxicab")[1:-1, 1:-1]
        depth += (steps - 1).clip(0, MARGIN + TAPER)
    ramp = (np.arange(MARGIN + TAPER + 1) - MARGIN).clip(0) / TAPER
    return (np.sin(ramp * math.pi / 2) ** 2).astype(np.float32)[depth]


def energy(hu: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean |Fourier transform|^2 in each ring, float64 [RINGS], of HU [H, W] less each label's own mean.

    How dense a label is, the histograms show. Divided by the sum of the weights' squares this is the power spectrum,
    HU^2: white noise of standard deviation s has s^2 in every ring, at any size and shape.
    """
    total, weighed = (np.bincount(labels.ravel(), of.ravel(), len(LABELS)) for of in (weight, weight * hu))
    means = (weighed / total.clip(1e-9)).astype(np.float32)
    height, width = (-(-side // 64) * 64 for side in hu.shape)  # zero-padded, so that no ring is empty
    power = np.abs(np.fft.rfft2(weight * (hu - means[labels]), (height, width))) ** 2
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    ring = (np.hypot(y, x) * 2 * RINGS).astype(np.intp)
    counted = (ring < RINGS) & ((x > 0) | (y > 0))  # without the mean, and complex conjugates of others
    return np.bincount(ring[counted], power[counted]) / np.bincount(ring[counted])


class Texture:
    """Texture or blur? Power spectrum inside the lung and HU histogram of each label, beside the real slices' own.

    Spectra are means over all directions (Durall et al., CVPR 2020). HU are clipped to the window and its 256 steps.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.areas: dict[str, list[float]] = defaultdict(list)  # side -> sum of the weights' squares of each slice
        self.energies: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> [RINGS] of each slice
        self.counts: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> pixels [labels, 256] of each slice

    def update(self, batch: Batch, sides: tuple[str, ...] = SIDES) -> None:
        """Measure a batch."""
        for k, labels in enumerate(batch.labels):
            rows, columns = (np.flatnonzero(labels.any(axis)) for axis in (1, 0))
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # the rest does not count
            labels, weight = labels[box].astype(np.intp), interior(labels[box])
            for side in sides:
                hu = getattr(batch, side)[k][box]
                self.areas[side].append(float((weight**2).sum()))
                self.energies[side].append(energy(self.window.clip(hu).astype(np.float32), labels, weight))
                counts = np.bincount((labels * 256 + self.window(hu)).ravel(), minlength=len(LABELS) * 256)
                self.counts[side].append(counts[256:].reshape(-1, 256).astype(np.uint32))

    def pools(self) -> list[Pool]:
        """All real slices, all synthetic ones, and the real ones' halves; NaN where there is no pixel to measure."""
        everyone, found = {side: range(len(areas)) for side, areas in self.areas.items()}, []
        half, other = halves(len(everyone["real"]))
        for side, chosen in (("real", everyone["real"]), ("fake", everyone["fake"]), ("real", half), ("real", other)):
            area = sum(self.areas[side][k] for k in chosen)
            power = sum((self.energies[side][k] for k in chosen), np.zeros(RINGS))
            pixels = sum((self.counts[side][k] for k in chosen), np.zeros((len(LABELS) - 1, 256)))
            with np.errstate(invalid="ignore"):  # 0 / 0 is meant to be NaN
                found.append((np.maximum(power / area, QUIETEST), pixels / pixels.sum(1, keepdims=True)))
        return found

    def differences(self, real: Pool, fake: Pool) -> dict[str, float]:
        """Figures of one set of slices against another, by name.

        spectrum: mean distance in dB over the rings. fine texture: power of the fine rings over the real power there;
        less than 1 is blur, more is noise. HU of a label: Wasserstein-1 distance of its pixels, HU.
        """
        fine_real, fine_fake = ((power * FREQUENCIES)[FINE:].sum() for power, _ in (real, fake))  # far rings hold more
        figures = {"spectrum": np.abs(10 * np.log10(fake[0] / real[0])).mean(), "fine texture": fine_fake / fine_real}
        distances = np.abs((fake[1] - real[1]).cumsum(1)).sum(1) * (self.window.width / 255)
        return figures | {f"HU of {label}": value for label, value in zip(LABELS[1:], distances, strict=True)}

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "texture" (frequency: cycles per pixel; real, fake: HU^2); None for what has no pixel."""

        def known(value: Any) -> Any:
            return np.where(np.isnan(value), None, value).tolist()

        real, fake, half, other = self.pools()
        found, floors = self.differences(real, fake), self.differences(half, other)
        about = {"N": min(map(len, self.areas.values())), "floor_N": len(self.areas["real"]) // 2}
        rows: Rows = {name: {"value": known(value)} | about for name, value in found.items()}
        for name, floor in floors.items():
            rows[name]["floor_value"] = known(floor)
        rows["spectrum"] |= {"frequency": FREQUENCIES.tolist(), "real": known(real[0]), "fake": known(fake[0])}
        return {"texture": rows}


# ---- neighbouring slices
def follows(name: str, other: str) -> bool:
    """Whether a slice is its patient's next: P01_S008 follows P01_S007."""
    first, second = (re.fullmatch(r"(.*_\D*)(\d+)", one) for one in (name, other))
    return bool(first and second and first[1] == second[1] and int(second[2]) - int(first[2]) == 1)


def rms(values: np.ndarray) -> float:
    """Root mean square of values of any shape; NaN of none."""
    return math.sqrt(np.mean(values**2)) if values.size else math.nan


def inner(healthy: np.ndarray) -> np.ndarray:
    """Healthy pixels, bool [H, W], all of whose neighbours are healthy."""
    return ndimage.binary_erosion(healthy, np.ones((3, 3)))


def fine(hu: np.ndarray, healthy: np.ndarray) -> np.ndarray:
    """Detail finer than 3 pixels, HU [n], of HU float [H, W] in the inner healthy pixels, bool [H, W]."""
    return (hu - ndimage.uniform_filter(hu, 3))[inner(healthy)]


def likeness(hu: np.ndarray, other: np.ndarray, healthy: np.ndarray) -> dict[str, float]:
    """Figures of two slices, HU [H, W], where both are healthy, bool [H, W]; NaN where there is none."""
    one, another = fine(hu, healthy), fine(other, healthy)
    textured = one.size and min(np.std(one), np.std(another)) > 1e-6  # HU: more than rounding
    correlation = float(np.corrcoef(one, another)[0, 1]) if textured else math.nan
    return {"change": rms((hu - other)[healthy]), "detail": correlation}


class Neighbours:
    """Streaks or flicker? Slices of a patient that follow each other, compared where both have healthy lung.

    change: RMS of their difference, HU; streaks along the volume make it smaller than the real one, flicker larger.
    detail: correlation of what is finer than 3 pixels; vessels that run straight through the slices raise it.
    """

    def __init__(self, window: Window) -> None:
        self.window, self.last = window, Batch(*np.zeros((3, 0, 0), np.uint8))
        self.found: dict[str, list[float]] = defaultdict(list)  # row -> of each slice against the one before it

    def update(self, batch: Batch, sides: tuple[str, ...] = SIDES) -> None:
        """Compare each slice of a batch with the one before it, whosever that is: names are known at the end."""
        for one in map(Batch, *batch):
            alike = one.labels.shape == self.last.labels.shape
            last = self.last if alike else one
            for side in sides:
                two = (self.window.clip(getattr(of, side)) for of in (one, last))
                for figure, value in likeness(*two, (one.labels == 1) & (last.labels == 1) & alike).items():
                    self.found[f"{side} {figure}"].append(value)
            self.last = one

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "neighbours"; none where no slice is the next of another."""
        next_ = np.array([False, *(follows(*two) for two in pairwise(names))])
        rows = {row: estimate(np.where(next_, values, np.nan), names) for row, values in self.found.items()}
        return {"neighbours": rows} if next_.any() else {}


# ---- lesions and copies
def overlap(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Dice (1 if both are empty), sensitivity and specificity (NaN if undefined) [N] of masks, bool [N, H, W]."""
    both = (predicted & truth).sum((1, 2))
    found, true, frame = predicted.sum((1, 2)), truth.sum((1, 2)), truth[0].size
    neither = frame - found - true + both
    with np.errstate(invalid="ignore"):  # 0 / 0 is meant to be NaN
        dice = np.where(found + true > 0, 2 * both / (found + true), 1.0)
        return {"Dice": dice, "sensitivity": both / true, "specificity": neither / (frame - true)}


class Segmentation:
    """Lesions that a U-Net finds in the complete images, synthetic and, as the ceiling, real, against the maps."""

    def __init__(self, model: Path, provider: str) -> None:
        self.model, (self.session, info) = model, open_session(model, provider, kind="unet")
        labels = json.loads(info.get("labels", json.dumps(LABELS)))
        if labels != [*LABELS[: len(labels)]]:
            raise Mistake(f"{model}: finds {', '.join(labels):.80}: give one that finds {', '.join(LABELS)}")
        self.lesions = {lesion: of for lesion, of in LESIONS.items() if max(of) < len(labels)}
        self.found: dict[str, list[np.ndarray]] = defaultdict(list)  # row -> [N] of each batch
        self.multiple, self.empty = int(info.get("multiple", 16)), Counter()  # pixels; row -> slices without the lesion

    def update(self, batch: Batch, sides: tuple[str, ...] = SIDES) -> None:
        """Segment a batch, padded with air to what the U-Net takes, and compare it with its maps."""
        _, height, width = batch.real.shape
        padding = (0, 0), (0, -height % self.multiple), (0, -width % self.multiple)
        for side in sides:
            padded = np.pad(getattr(batch, side), padding, constant_values=-HU_OFFSET)
            (segmented,) = run(self.model, self.session, ["map"], ct=padded)
            for lesion, labels in self.lesions.items():
                predicted, truth = np.isin(segmented[:, :height, :width], labels), np.isin(batch.labels, labels)
                for figure, values in overlap(predicted, truth).items():
                    self.found[f"{side} {lesion} {figure}"].append(values)
                self.empty[f"{side} {lesion} Dice"] += int((~(predicted | truth).any((1, 2))).sum())

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "segmentation"; empty: slices whose Dice is 1 because neither the map nor the U-Net has the lesion."""
        rows: Rows = {row: estimate(np.concatenate(parts), names) for row, parts in self.found.items()}
        for row, count in self.empty.items():
            rows[row]["empty"] = count
        return {"segmentation": rows} if rows else {}


def thumbnails(grey: np.ndarray) -> np.ndarray:
    """Grey levels uint8 [N, H, W] to float32 [N, THUMBNAIL * THUMBNAIL] in 0..1: means of equal parts."""

    def means(size: int) -> np.ndarray:  # matrix [THUMBNAIL, size]
        edges = np.arange(THUMBNAIL + 1)[:, None] * size / THUMBNAIL
        covered = np.minimum(edges[1:], np.arange(size) + 1) - np.maximum(edges[:-1], np.arange(size))
        return (covered.clip(0) * THUMBNAIL / size).astype(np.float32)

    return (means(grey.shape[1]) @ (grey / np.float32(255)) @ means(grey.shape[2]).T).reshape(len(grey), -1)


class Memorisation:
    """The nearest training lung of each synthetic lung, and of each real test lung as the yardstick for near.

    Lungs are compared as thumbnails of 64 x 64, black outside, by the RMS of their difference. A generator that
    copies patients has distances far below the real lungs'; a little below is usual, since syntheses are smoother.
    """

    def __init__(self, train: Path, window: Window, paired: bool = True) -> None:
        images, maps, split = pngs(train, "images"), pngs(train / "maps", "maps"), train / "split.json"
        names = slices.read_split(split).get("train", []) if split.is_file() else images  # the training side
        self.window, self.paired, self.files = window, paired, {name: (images[name], maps[name]) for name in names}
        with ThreadPoolExecutor(usable_cores()) as pool:
            thumbs = tqdm(pool.map(self.read, self.files.values()), "training lungs", len(names))
            lungs = {name: lung for name, lung in zip(names, thumbs, strict=True) if lung is not None}
        if not lungs:
            raise Mistake(f"{train}: no lung in its training maps: give the set that the generator was trained on")
        self.trained, self.lungs = [*lungs], np.stack([*lungs.values()])  # names, and [n_train, THUMBNAIL^2]
        self.squares = (self.lungs**2).sum(1)  # [n_train]
        self.nearest: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> index [N] of each batch
        self.distance: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> RMS [N] of each batch

    def read(self, files: tuple[Path, Path]) -> np.ndarray | None:
        """The thumbnail [THUMBNAIL^2] of a training lung; None for a slice without lung."""
        hu, labels = read_image(files[0]), read_map(files[1])
        return thumbnails(self.window(hu, labels)[None])[0] if labels.any() else None

    def update(self, batch: Batch, sides: tuple[str, ...] = SIDES) -> None:
        """Find the training lungs nearest to a batch."""
        for side in sides:
            lungs = thumbnails(self.window(getattr(batch, side), batch.labels))
            nearest = (self.squares - 2 * lungs @ self.lungs.T).argmin(1)
            self.nearest[side].append(nearest)
            # anew, not from the squares, whose difference has lost its digits near 0, where it matters
            self.distance[side].append(np.sqrt(((lungs - self.lungs[nearest]) ** 2).mean(1)))

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Tables "memorisation" and "suspects".

        ratio: the synthetic lungs' median over the real ones'. share: of the synthetic lungs, those nearer than the
        5th percentile of the real ones. Pairs whose real lung was trained on are counted, not measured.
        """
        fake, real = (np.concatenate(self.distance[side]).astype(np.float64) for side in SIDES)
        nearest, first = np.concatenate(self.nearest["fake"]), fake.argsort(kind="stable")[:MOST]
        suspects: Rows = {names[k]: {"nearest": self.trained[nearest[k]], "distance": fake[k]} for k in first}
        unseen = real[real > 1e-6]
        fake = fake[real > 1e-6] if self.paired and len(unseen) else fake
        rows: Rows = {
            "training": {"lungs": len(self.lungs), "without_lung": len(self.files) - len(self.lungs)},
            "fake": {"lungs": len(fake), "median": np.median(fake), "minimum": fake.min()},
            "real": {"lungs": len(unseen)},
        }
        if len(unseen):
            rows["real"] |= {"median": np.median(unseen), "minimum": unseen.min()}
            rows["fake"]["ratio"] = np.median(fake) / np.median(unseen)
            rows["fake"]["share"] = (fake < np.percentile(unseen, 5)).mean()
        if len(unseen) < len(real):
            rows["real, in training"] = {"lungs": len(real) - len(unseen)}
        return {"memorisation": rows, "suspects": suspects}


# ---- steering
def paint(labels: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A map with a disc of ground glass in the larger lung, and where the other lung is, [H, W].

    The disc has DISC of both lungs' area: the healthy pixels nearest to the middle of them, but those at an edge. None
    where there are not two lungs of similar size, they are too ill for it, or labels are beyond the generator's.
    """
    parts, _ = ndimage.label(labels > 0)
    sizes = np.bincount(parts.ravel(), minlength=3)[1:]
    one, other = sizes.argsort(kind="stable")[:-3:-1]
    y, x = np.nonzero(inner(labels == 1) & (parts == one + 1))
    area = round(DISC * (sizes[one] + sizes[other]))
    if 2 * sizes[other] < sizes[one] or len(y) <= area or max(2, labels.max()) >= n_labels:
        return None
    disc = ((y - y.mean()) ** 2 + (x - x.mean()) ** 2).argsort(kind="stable")[:area]
    painted = labels.copy()
    painted[y[disc], x[disc]] = 2
    return painted, parts == other + 1


def steer(generator: Generator, labels: np.ndarray, painted: np.ndarray, other: np.ndarray) -> dict[str, tuple]:
    """What a generator makes of a map [H, W], see paint and steering: row -> what it was told, or None, what it has."""
    info, inputs = generator.info, generator.info["steering"]

    def make(of_map: np.ndarray, **told: float) -> np.ndarray:  # HU [H, W]; of what is not told, the default
        given = {name: np.array([told.get(name, row["default"])]) for name, row in inputs.items()}
        return generator(of_map[None], given)[0].astype(np.float64)

    plain, healthy = make(labels), labels == 1
    change, moved = make(painted) - plain, make(np.pad(labels, ((0, 0), (1, 0)))[:, :-1])
    found = {"other lung, mean": (None, change[other].mean()), "other lung, RMS": (None, rms(change[other]))}
    found["moved, RMS"] = None, rms((moved[:, 1:] - plain[:, :-1])[healthy[:, :-1]])
    for (k, name), level in product(enumerate(("density", "detail")), ("low", "default", "high")):
        if name in inputs:
            hu = make(labels, **{name: (told := inputs[name][level])})
            found[f"{name} {level}"] = told, steering_of(hu, labels, info["level"], info["width"])[k]
    if "seed" in inputs:
        found["draws, RMS"] = None, rms((make(labels, seed=1) - make(labels, seed=2))[healthy])
    return found


def steering(args: argparse.Namespace) -> dict[str, Rows]:
    """Table "steering": median and mean over maps of sizes, HU. Raises Mistake where no map has two lungs.

    other lung: how it changes when ground glass is painted in the one. moved: a map moved by one pixel, its slice moved
    back. density, detail: got less told, the 5th, 50th and 95th percentile of the training slices. draws: two slices of
    a map; of a dataset's images, table "neighbours" has how real slices differ that follow each other.
    """

    def spread(items: list[Any]) -> list[Any]:  # at most STEERED of them
        return [items[k] for k in np.linspace(0, len(items) - 1, min(len(items), STEERED)).round().astype(int)]

    maps, (session, info) = pngs(args.maps or args.real, "maps"), open_session(args.fake, args.provider)
    info["steering"] = json.loads(info.get("steering", "{}"))  # input -> default and, of numbers, low and high
    generator, n_labels, rows = Generator(session, info), len(info["labels"]), {}
    two_lungs = [name for name, path in tqdm(maps.items(), "maps", delay=1) if paint(read_map(path), n_labels)]
    if not two_lungs:
        raise Mistake(f"{args.real}: no map has two lungs of similar size and labels that {args.fake} knows")
    labels = tqdm([read_map(maps[name]) for name in spread(two_lungs)], "steering", delay=1)
    found = [steer(generator, of_map, *paint(of_map, n_labels)) for of_map in labels]
    for row, (told, _) in found[0].items():
        got = np.array([of_map[row][1] for of_map in found])
        off = np.abs(got - (told or 0))
        rows[row] = {"median": np.median(off), "mean": off.mean(), "N": len(off)}
        rows[row] |= {"told": told, "got": got.mean()} if told is not None else {}
    images = pngs(args.real, "images") if (args.real / "images").is_dir() else {}
    pairs = [two for two in pairwise(two_lungs) if follows(*two) and images.keys() >= {*two}]
    real, names = Neighbours(Window(args.level, args.width)), [*chain(*spread(pairs))]
    for name in names:
        real.update(read_pair(Pair(name, images[name], images[name], maps[name]), unchecked=True), ("real",))
    return {"steering": rows} | real.result(names)


# ---- report and main
def report(results: dict[str, Rows]) -> str:
    """The results as text, "-" where there is none; FID and its like in the largest dimension that they have."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    blocks = []
    for title, rows in results.items():
        if title == "features":
            given = sorted((row["dimension"], name) for name, row in rows.items() if row["value"] is not None)
            rows = {name: rows[name] for name in {name.rpartition(" ")[0]: name for _, name in given}.values()}
        shown = [key for row in rows.values() for key, value in row.items() if not isinstance(value, list)]
        columns = [key for key in dict.fromkeys(shown) if key not in ("features", "dimension", "note", "floor_note")]
        grid = [[*line] for line in zip_longest([title], *(key.split("_") for key in columns), fillvalue="")]
        grid += [[name, *(cell(row.get(key)) for key in columns)] for name, row in rows.items()]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        blocks.append("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in grid))
    lacking = sorted((row["dimension"], row["note"]) for row in results.get("features", {}).values() if "note" in row)
    notes = {note.split()[0]: f"note: {note}" for _, note in reversed(lacking)}  # of the smallest such dimension
    return "\n\n".join([*blocks, "\n".join(notes.values())]).rstrip()


def sheet(rows: list[list[np.ndarray]]) -> bytes:
    """PNG of rows of tiles, uint8 [H, W] or [H, W, 3], each on black of the largest one's size."""
    height, width = (max(tile.shape[axis] for row in rows for tile in row) for axis in (0, 1))
    canvas = np.zeros((len(rows), height, len(rows[0]), width, 3), np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i, : tile.shape[0], j, : tile.shape[1]] = tile if tile.ndim == 3 else tile[..., None]
    return slices.png(canvas.reshape(len(rows) * height, -1, 3))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = slices.OneLineParser(__doc__)
    option = parser.add_argument
    option("real", type=Path, help="folder of real slices, or a dataset")
    option("fake", type=Path, help="folder of synthetic slices, complete or lung alone, or a dataset; a generator")
    option("--maps", type=Path, help="folder of label maps; those of the dataset FAKE or REAL by default")
    option("--unpaired", action="store_true", help="sets of any sizes and names, each side with its own maps/")
    option("--unchecked", action="store_true", help="take real slices whose lung does not look like their map's")
    option("--features", type=Path, metavar="FILE", help="feature network, ONNX: FID and KID")
    option("--unet", type=Path, metavar="FILE", help="segmentation U-Net, ONNX: Dice, sensitivity, specificity")
    option("--train", type=Path, metavar="DIR", help="dataset that the generator was trained on: memorisation")
    option("--level", type=float, default=LEVEL, help="level of the window, HU")
    option("--width", type=float, default=WIDTH, help="width of the window, HU")
    option("--json", type=Path, metavar="FILE", help="write all results there")
    option("--out", type=Path, default=Path("eval"), help="folder of the pictures")
    option("--batch", type=int, default=1, metavar="N", help="slices at a time; more only pays on a GPU")
    option("--provider", choices=("auto", *PROVIDERS), default="auto", help="what graphs and models run on")
    args = parser.parse_args(argv)
    if args.fake.suffix == ".onnx" and (args.features or args.unet or args.train or args.unpaired):
        raise Mistake(f"{args.fake}: a generator is steered alone: for all else give slices, of infer_onnx.py")
    slices.check_ranges(args, batch=(1, slices.LARGEST), level=slices.HELD, width=(1, 2**16))
    if args.unpaired and (args.maps or args.unet):
        raise Mistake("--unpaired: goes without --maps and --unet, and takes REAL/maps and FAKE/maps")
    return args


def make_meters(args: argparse.Namespace, regions: list[str]) -> dict[str, Any]:
    """The meters, each by the name of its table in the results. Raises Mistake for a file that is no such model."""
    with_maps, window = "lung" in regions, Window(args.level, args.width)
    if not with_maps and (args.unet or args.train or (args.unpaired and not args.features)):
        raise Mistake(f"{args.unet or args.train or args.fake}: without label maps only --features goes: {GIVE_MAPS}")
    meters: dict[str, Any] = {} if args.unpaired else {"pixels": PixelMetrics(window, regions)}
    if args.features:
        meters["features"] = Features(args.features, args.provider, window, regions)
    if with_maps:
        meters["texture"] = Texture(window)
    if with_maps and not args.unpaired:
        meters["neighbours"] = Neighbours(window)
    if args.unet:
        meters["segmentation"] = Segmentation(args.unet, args.provider)
    if args.train:
        meters["memorisation"] = Memorisation(args.train, window, paired=not args.unpaired)
    return meters


def draw(args: argparse.Namespace, meters: dict[str, Any], kept: list[Pair], results: dict[str, Rows]) -> None:
    """Write the pictures into OUT: where they were measured cases, curves and suspects."""
    pairs, window, out = {pair.name: pair for pair in kept}, Window(args.level, args.width), args.out
    out.mkdir(parents=True, exist_ok=True)
    for name in (CASES, SUSPECTS):
        (out / name).unlink(missing_ok=True)  # a previous evaluation's would pass for this one's
    rows = []
    for case in results.get("cases", {}).values():
        pair = pairs[case["name"]]
        one = read_pair(pair, unchecked=True)
        real, fake = window(one.real[0]), window(one.fake[0])
        maps = [slices.coloured(one.labels[0])] if pair.labels else []
        rows.append([*maps, real, fake, np.abs(real.astype(np.int16) - fake).astype(np.uint8)])
    if rows:
        slices.write_bytes(out / CASES, sheet(rows))
    if "memorisation" in meters:
        rows, trained = [], meters["memorisation"].files
        for name, row in results["suspects"].items():
            files = (pairs[name].fake, pairs[name].labels), trained[row["nearest"]]
            rows.append([window(read_image(image), read_map(labels)) for image, labels in files])
        slices.write_bytes(out / SUSPECTS, sheet(rows))


def compare(args: argparse.Namespace) -> dict[str, Rows]:
    """All tables of real slices and synthetic ones; draws the pictures. Raises Mistake."""
    folders = args.real, args.fake
    groups = find_sets(*folders) if args.unpaired else find_pairs(*folders, args.maps)
    meters = make_meters(args, find_regions(args, groups))
    results: dict[str, Rows] = {"run": {"window, HU": {"level": args.level, "width": args.width}}}
    for sides, pairs in groups.items():
        kept: list[Pair] = []
        for members, batch in batches(pairs, args.batch, args.unchecked or sides == ("fake",)):
            for meter in meters.values():
                meter.update(batch, sides)
            kept += members
        if not kept:
            raise Mistake(f"{pairs[0].labels} and the maps of all {len(pairs)} slices: no lung in them: give others")
        patients = {slices.patient_of(pair.name) for pair in kept}
        counts = {"measured": len(kept), "without_lung": len(pairs) - len(kept), "patients": len(patients)}
        results["run"]["pairs" if sides == SIDES else sides[0]] = counts
    for meter in meters.values():
        results |= meter.result([pair.name for pair in kept])
    draw(args, meters, kept, results)
    return results


def main(argv: list[str]) -> None:
    """Evaluate what the command line names: print the report, write pictures and JSON. Raises Mistake."""
    args = parse(argv)
    results = steering(args) if args.fake.suffix == ".onnx" else compare(args)
    print(report(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        slices.write_bytes(args.json, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    slices.exit_on_mistake(main)
