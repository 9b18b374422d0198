"""How good are synthetic CT slices? Compares them with real ones, pair by pair and as a set. No training framework.

    python eval.py REAL FAKE                                # PSNR, SSIM, RMSE, NRMSE (Table II)
    python eval.py REAL FAKE --maps MAPS                    # for the complete image and for the lung alone
    python eval.py data/phantom synthetic                   # datasets: their images/, and FAKE's or REAL's maps/
    python eval.py REAL FAKE --features features.onnx       # FID, KID, precision, recall, density, coverage
    python eval.py REAL FAKE --maps MAPS --unet unet.onnx   # Dice, sensitivity, specificity (section IV-B.2)
    python eval.py REAL FAKE --maps MAPS --train data/ct    # does the generator copy its training images?

REAL and FAKE hold 16-bit PNG of HU + 1024, paired by file name. With maps, the complete image is the synthesis inside
the lung (label above 0) and the real slice elsewhere, bit for bit, and the lung alone is black elsewhere; without
maps FAKE is taken as it is. Slices without lung are left out, and counted. Images are measured through the lung
window, as 0..1. Floors are what one half of the real slices scores against the other half. A summary is
printed; --json has every figure in every dimension.
OUT/eval_cases.png: the best, median and worst case by SSIM, as map | real | synthetic | difference.
OUT/eval_texture.png: texture or blur? With maps: power spectra inside the lung, HU histograms of the labels.
OUT/eval_memorisation.png: the synthetic lungs that are nearest to a training image, each beside it. Research only,
not for diagnosis.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from data.runtime import ort
from data.slices import (
    COLOURS,
    HU_OFFSET,
    LABELS,
    LEVEL,
    WIDTH,
    Mistake,
    OneLineParser,
    check_finished,
    check_hu,
    coloured,
    exit_on_mistake,
    held,
    list_pngs,
    no_lungs_mean,
    patient_of,
    read_image,
    read_map,
    read_split,
    windowed,
    write_bytes,
)
from infer_onnx import ORT_ERRORS, PROVIDERS, ahead, first_line, open_session, parsed, usable_cores

CASES, SUSPECTS, TEXTURE = "eval_cases.png", "eval_memorisation.png", "eval_texture.png"  # in OUT
SIDES = ("fake", "real")
LESIONS = {"GGO": (2,), "consolidation": (3,), "infection": (2, 3)}  # labels of each
THUMBNAIL = 64  # pixels per side at which lungs are compared for memorisation
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
MANIFOLD = ("precision", "recall", "density", "coverage")
NEAREST = 5  # k of these figures' nearest neighbours
RINGS, FINE = 16, 8  # of equal width, up to 0.5 cycles per pixel; fine texture is in those from 0.25 on
FREQUENCIES = (np.arange(RINGS) + 0.5) / (2 * RINGS)  # of the rings' middles, cycles per pixel
MARGIN, TAPER = 2, 4  # pixels along a label's edge that a spectrum leaves out, and over which it fades in
QUIETEST = 1 / 12  # HU^2: the power spectrum of rounding to whole HU, below which nothing can be told apart
SSIM_WINDOW = 11
SEED = 0  # of the floor's halves and of KID's subsets
COLUMNS = 100  # printed at most

Rows = dict[str, dict[str, Any]]  # of a table: row -> column -> value


# ------------------------------------------------------------------------------------------------ pairs


class Pair(NamedTuple):
    """The files of one case."""

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
    check_finished(folder)
    return list_pngs(folder / part if (folder / part).is_dir() else folder, part)


def find_pairs(real: Path, fake: Path, maps: Path | None = None, strict: bool = False) -> list[Pair]:
    """Pairs by file name; names found on one side only are counted on stderr, or a Mistake if strict.

    maps None: those of the dataset FAKE or REAL, where it is one. Raises Mistake for no pair and for a missing map.
    """
    reals, fakes = pngs(real, "images"), pngs(fake, "images")
    both, single = sorted(reals.keys() & fakes.keys()), sorted(reals.keys() ^ fakes.keys())
    if not both:
        raise Mistake(f"{fake}: {min(fakes)} and all others are not in {real}: name each slice as its real one")
    if single:
        line = f"{len(reals) - len(both)} names are in {real} only, {len(fakes) - len(both)} in {fake} only"
        if strict:
            raise Mistake(f"{line}, {single[0]} first: without --strict they are left out")
        print(f"note: {line}: left out", file=sys.stderr)
    maps = maps or next((dataset / "maps" for dataset in (fake, real) if (dataset / "maps").is_dir()), None)
    if real != fake:
        tell_training(real, both)
    labels = pngs(maps, "maps") if maps else {}
    missing = [name for name in both if maps and name not in labels]
    if missing:
        raise Mistake(f"{maps}: the maps of {len(missing)} pairs are missing, {missing[0]}.png first: add them")
    return [Pair(name, reals[name], fakes[name], labels.get(name)) for name in both]


def tell_training(real: Path, names: list[str]) -> None:
    """Say on stderr how many names are from the training side of the dataset REAL: their figures tell little."""
    if (split := real / "split.json").is_file():
        seen = {*read_split(split).get("train", [])} & {*names}
        if seen:
            line = f"{len(seen)} of {len(names)} pairs are of the training side ({split})"
            print(f"note: {line}: synthesize --side test alone for figures of new patients", file=sys.stderr)


def check_sizes(path: Path, array: np.ndarray, other_path: Path, other: np.ndarray) -> None:
    """Raise Mistake where two images that belong together differ in size."""
    if array.shape != other.shape:
        raise Mistake(f"{path}: {array.shape} pixels, {other_path} has {other.shape}: bring both to one size")


def read_lung(image: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """A slice, HU int16 [H, W], and its map, uint8 [H, W]. Raises Mistake for a bad file and sizes that differ."""
    hu, drawn = read_image(image), read_map(labels)
    check_sizes(labels, drawn, image, hu)
    return hu, drawn


def read_pair(pair: Pair) -> Batch:
    """A pair as a batch of one. Raises Mistake for a bad file and sizes that differ."""
    real = read_image(pair.real)
    if min(real.shape) < SSIM_WINDOW:
        raise Mistake(f"{pair.real}: {real.shape} pixels: SSIM needs {SSIM_WINDOW} each way")
    if pair.labels:
        fake, labels = read_lung(pair.fake, pair.labels)
    else:
        fake, labels = read_image(pair.fake), np.ones_like(real, np.uint8)
    check_sizes(pair.fake, fake, pair.real, real)
    if labels.any():  # a slice above the lung may be of air alone, and is left out anyway
        check_hu(pair.real, real)
    return Batch(real[None], np.where(labels > 0, fake, real)[None], labels[None])


def batches(pairs: list[Pair], size: int) -> Iterator[tuple[list[Pair], Batch]]:
    """Batches of pairs with lung, in order: neighbours of equal size, at most `size` of them; a few are read ahead."""
    held: list[tuple[Pair, Batch]] = []

    def joined() -> tuple[list[Pair], Batch]:
        members, ones = zip(*held, strict=True)
        return list(members), Batch(*(np.concatenate(arrays) for arrays in zip(*ones, strict=True)))

    with ThreadPoolExecutor(usable_cores()) as pool:
        read = tqdm(ahead(pool, read_pair, pairs, 4 * usable_cores()), "pairs", len(pairs), delay=1)
        for pair, one in zip(pairs, read, strict=True):
            if not one.labels.any():
                continue
            if held and (len(held) == size or one.real.shape != held[0][1].real.shape):
                yield joined()
                held.clear()
            held.append((pair, one))
    if held:
        yield joined()


class Window:
    """HU to grey levels by a lookup table, since the format has only 4,096 values of HU."""

    def __init__(self, level: float = LEVEL, width: float = WIDTH) -> None:
        self.level, self.width = level, width
        self.grey = windowed(np.arange(4096) - HU_OFFSET, level, width)

    def __call__(self, hu: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Grey levels uint8 of HU int16 of any shape; 0 outside the lung where labels are given."""
        grey = self.grey[hu + HU_OFFSET]
        return grey if labels is None else grey * (labels > 0)


# ------------------------------------------------------------------------------------------------ statistics


def student_t(freedom: int) -> float:
    """The 0.975 quantile of Student's t, to 0.1 %: a table, then from 6 degrees of freedom an expansion about z."""
    if freedom < 6:
        return (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)[freedom - 1]
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def interval(values: list[float]) -> tuple[float | None, float | None, int]:
    """Mean of values, half the width of its 95 % interval, and n; None where there are too few."""
    n = len(values)
    half = student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return float(np.mean(values)) if n else None, half, n


def estimate(values: np.ndarray, names: list[str]) -> dict[str, float | None]:
    """Mean, half its 95 % interval and n of values [n], NaN left out: over slices, and over the patients' means.

    Slices of one patient are alike, so that the interval over slices is too narrow for new patients.
    """
    patients = defaultdict(list)
    for name, value in zip(names, values, strict=True):
        if not math.isnan(value):
            patients[patient_of(name)].append(float(value))
    over_slices = interval([value for group in patients.values() for value in group])
    over_patients = interval([float(np.mean(group)) for group in patients.values()])
    columns = ("mean", "interval", "n", "patients_mean", "patients_interval", "patients_n")
    return dict(zip(columns, over_slices + over_patients, strict=True))


def halves(n: int) -> list[np.ndarray]:
    """Indices of two random halves of n slices, each [n // 2], the same each time: floors are one against the other."""
    return np.array_split(np.random.default_rng(SEED).permutation(n // 2 * 2), 2)


# ------------------------------------------------------------------------------------------------ pixel metrics


class Node:
    """A tensor of an ONNX graph being built: arithmetic on it adds operators to the graph."""

    def __init__(self, name: str, graph: list[onnx.NodeProto]) -> None:
        self.name, self.graph = name, graph

    def then(self, operator: str, *others: Any, **attributes: Any) -> "Node":
        """Apply an ONNX operator to this tensor and others: nodes, arrays, or numbers, which become float32."""
        names = [self.name]
        for other in others:
            if not isinstance(other, Node):
                value = other if isinstance(other, np.ndarray) else np.array(other, np.float32)
                other = self.add("Constant", [], value=numpy_helper.from_array(value))
            names.append(other.name)
        return self.add(operator, names, **attributes)

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> "Node":
        """Add an operator to the graph; returns its output."""
        output = Node(f"t{len(self.graph)}", self.graph)
        self.graph.append(helper.make_node(operator, inputs, [output.name], **attributes))
        return output

    __add__, __sub__ = partialmethod(then, "Add"), partialmethod(then, "Sub")
    __mul__, __truediv__ = partialmethod(then, "Mul"), partialmethod(then, "Div")

    def mean(self, axis: int) -> "Node":
        """Mean over an axis, which is dropped."""
        return self.then("ReduceMean", np.array([axis]), keepdims=0)


def pixel_graph(height: int, width: int, level: float, window: float) -> onnx.ModelProto:
    """The metrics of images of one size as an ONNX graph, so that they run wherever the models do.

    Inputs real and fake (int16 [N, H, W], HU) and labels (uint8 [N, H, W]); outputs float32 [N]: mse, and for the
    complete image and for the lung alone power (the real image's mean square) and ssim (Gaussian window of 11,
    sigma 1.5, K 0.01 and 0.03, population covariance, averaged over where the window fits in).

    All follows from real, lung (real, 0 outside) and d = fake - real, which is 0 outside the lung. So both SSIMs share
    three of their blurs, and rounding matters only where images differ: SSIM of equal images is 1 to the last bit.
    """
    graph: list[onnx.NodeProto] = []
    real, fake, labels = (Node(name, graph).then("Cast", to=TensorProto.FLOAT) for name in Batch._fields)
    floor = level - window / 2
    real, fake = (hu.then("Clip", floor, floor + window) for hu in (real, fake))
    d = (fake - real) / window  # before HU turn into 0..1: differences of whole numbers are exact
    real = (real - floor) / window
    lung = real * labels.then("Min", 1)  # [N, H, W]

    # Convolving one channel is slow, so 16 pixels of a row are computed at once, as 16 channels: kernels of 11 + 15
    # taps, stride 16. The pixels change places, which does not affect a mean; those past the row's end weigh 0.
    block, columns = 16, width - SSIM_WINDOW + 1
    blocks = math.ceil(columns / block)
    gauss = np.exp(-((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) ** 2) / (2 * 1.5**2))
    gauss = (gauss / gauss.sum()).astype(np.float32)
    across = np.stack([np.pad(gauss, (k, block - 1 - k)) for k in range(block)])[:, None, None]  # [16, 1, 1, 26]
    down = np.tile(gauss[:, None], (block, 1, 1, 1))  # [16, 1, 11, 1]
    padding = np.array([0, 0, 0, 0, 0, blocks * block - columns])
    counted = np.arange(blocks) * block + np.arange(block)[:, None] < columns  # [16, blocks]
    weights = (counted / counted.mean())[:, None].astype(np.float32)  # [16, 1, blocks], 1 on average

    def blur(image: Node) -> Node:  # [N, H, W] -> [N, 16, H - 10, blocks]
        row = image.then("Pad", padding).then("Unsqueeze", np.array([1]))
        return row.then("Conv", across, strides=[1, block]).then("Conv", down, group=block)

    mean_d, blurred_product = blur(d), blur(real * d)  # real * d is lung * d
    squared_d = mean_d * mean_d
    variance_d = blur(d * d) - squared_d

    def ssim(image: Node) -> Node:  # [N, H, W] -> [N]
        mean = blur(image)
        variance, covariance = blur(image * image) - mean * mean, blurred_product - mean * mean_d
        luminance = (mean * mean + mean * mean_d) * 2 + 0.01**2  # 2 mean(real) mean(fake) + C1
        structure = (variance + covariance) * 2 + 0.03**2  # 2 cov(real, fake) + C2
        score = luminance * structure / ((luminance + squared_d) * (structure + variance_d))
        return ((score - 1) * weights).mean(3).mean(2).mean(1) + 1  # so the weights' rounding only affects score - 1

    def power(image: Node) -> Node:  # [N, H, W] -> [N]; in two steps: in one, fp32 loses two digits on flat areas
        return (image * image).mean(2).mean(1)

    results = {"mse": power(d)} | {"complete power": power(real), "complete ssim": ssim(real)}
    results |= {"lung power": power(lung), "lung ssim": ssim(lung)}
    graph += [helper.make_node("Identity", [node.name], [name]) for name, node in results.items()]
    types = {"real": TensorProto.INT16, "fake": TensorProto.INT16, "labels": TensorProto.UINT8}
    inputs = [helper.make_tensor_value_info(name, type_, ["N", height, width]) for name, type_ in types.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in results]
    model = helper.make_model(
        helper.make_graph(graph, "pixel_metrics", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,  # of opset 18: what onnx would write by default may be too new for the ONNX Runtime at hand
    )
    helper.set_model_props(model, {"kind": "metrics"})
    return model


def run(model: Path | str, session: ort.InferenceSession, outputs: list[str], **inputs: np.ndarray) -> list[np.ndarray]:
    """Run a model for the outputs named, arrays of numbers.

    Raises Mistake, naming the model, where ONNX Runtime fails, memory is short, or an output is no such array.
    """
    try:
        found = session.run(outputs, inputs)
        if all(isinstance(array, np.ndarray) and array.dtype.kind in "iuf" for array in found):
            return found
        raise Mistake(f"{model}: {', '.join(outputs)} are not all arrays of numbers: export it again")
    except (*ORT_ERRORS, ValueError) as error:  # ValueError: another input's name
        shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
        reason = first_line(error) or type(error).__name__
        raise Mistake(f"{model}: ONNX Runtime on {shapes}: {reason}; if memory is short, a smaller --batch") from error


class PixelMetrics:
    """PSNR, SSIM, RMSE and NRMSE of every pair (Table II).

    PSNR in dB has peak 1 and is at most 100; NRMSE is RMSE over the real image's root mean square, the scale of
    Table II, and NaN where the real image is black. PSNR and RMSE of the lung alone are those of the complete image
    by construction: both differences are 0 outside the lung, and both are means over the full frame.
    """

    def __init__(self, window: Window, provider: str, regions: list[str]) -> None:
        self.window, self.provider, self.regions = window, provider, regions
        self.sessions: dict[tuple[int, int], ort.InferenceSession] = {}
        self.found: dict[str, list[np.ndarray]] = defaultdict(list)  # row -> [N] of each batch

    def session(self, height: int, width: int) -> ort.InferenceSession:
        """The graph for a size, opened when first asked for."""
        if (height, width) not in self.sessions:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"metrics_{height}x{width}.onnx"
                onnx.save(pixel_graph(height, width, self.window.level, self.window.width), path)
                # one thread: the other cores are reading the next pairs' PNGs
                session, _ = open_session(path, self.provider, threads=1, kind="metrics", quiet=True)
                self.sessions[height, width] = session
        return self.sessions[height, width]

    def update(self, batch: Batch) -> None:
        """Measure a batch."""
        session = self.session(*batch.real.shape[1:])
        outputs = [output.name for output in session.get_outputs()]
        found = dict(zip(outputs, run("metrics", session, outputs, **batch._asdict()), strict=True))
        mse = found["mse"].astype(np.float64)
        for region in self.regions:
            rms = np.sqrt(found[f"{region} power"].astype(np.float64))
            rms[rms == 0] = np.nan
            self.found[f"{region} PSNR"].append(-10 * np.log10(mse.clip(1e-10)))
            self.found[f"{region} SSIM"].append(found[f"{region} ssim"])
            self.found[f"{region} RMSE"].append(np.sqrt(mse))
            self.found[f"{region} NRMSE"].append(np.sqrt(mse) / rms)

    def of_pairs(self, row: str) -> np.ndarray:
        """A figure of every pair, float64 [n]."""
        return np.concatenate(self.found[row]).astype(np.float64)

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "pixels"."""
        return {"pixels": {row: estimate(self.of_pairs(row), names) for row in self.found}}


# ------------------------------------------------------------------------------------------------ FID and KID


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of the normal distributions of features x [n, d] and y [m, d], n and m above 1; float64.

    |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2. The last trace is the sum of the singular values of
    R_x R_y^T, with S = R^T R by QR of the centred features: no root is taken of a rounded product, so that none is
    complex, and n may be below d.
    """

    def mean_and_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = features.mean(0, dtype=np.float64)
        return mean, np.linalg.qr(features - mean, mode="r") / math.sqrt(len(features) - 1)

    (mu_x, r_x), (mu_y, r_y) = mean_and_root(x), mean_and_root(y)
    cross = np.linalg.svd(r_x @ r_y.T, compute_uv=False).sum()
    return max(0.0, float(((mu_x - mu_y) ** 2).sum() + (r_x**2).sum() + (r_y**2).sum() - 2 * cross))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of x [n, d] and y [m, d], n and m above 1: kernel (x.y / d + 1)^3."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def kid(x: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    """Kernel Inception Distance of features x [n, d] and y [m, d], n and m above 1: mean and std over subsets.

    Up to 1,000 features are taken all at once, without a std (None); of more, 100 seeded subsets of 1,000, or of all
    of the smaller set.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    if max(len(x), len(y)) <= KID_SUBSET_SIZE:
        return mmd2(x, y), None
    rng, size = np.random.default_rng(SEED), min(KID_SUBSET_SIZE, len(x), len(y))
    draws = [mmd2(rng.permutation(x)[:size], rng.permutation(y)[:size]) for _ in range(KID_SUBSETS)]
    return float(np.mean(draws)), float(np.std(draws))


def manifold(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Precision, recall, density and coverage of features real [n, d] and fake [m, d], n and m above NEAREST.

    A set's manifold consists of balls about its features that reach to their k-th nearest neighbours, k = 5. Precision
    0..1: share of the synthetic in the real manifold. Recall 0..1: share of the real in the synthetic manifold
    (Kynkaanniemi et al. 2019). Density 0..: mean number of real balls that a synthetic feature is in, over k, ideally
    1; coverage 0..1: share of the real balls with a synthetic feature in them (Naeem et al. 2020, whose prdc this is).
    """

    def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # of the distances, [len(a), len(b)]
        return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clip(0)

    def reach(a: np.ndarray) -> np.ndarray:  # each feature is its own first neighbour
        return np.partition(squares(a, a), NEAREST, 1)[:, NEAREST]

    centre = real.mean(0, dtype=np.float64)  # far from the origin, squares would lose the digits that count
    real, fake = real - centre, fake - centre
    between = squares(real, fake)
    in_real, in_fake = between < reach(real)[:, None], between < reach(fake)
    shares = in_real.any(0).mean(), in_fake.any(1).mean(), in_real.sum(0).mean() / NEAREST, in_real.any(1).mean()
    return dict(zip(MANIFOLD, map(float, shares), strict=True))


def score(real: np.ndarray, fake: np.ndarray, force: bool) -> Rows:
    """Value, std and N of FID, KID and the MANIFOLD figures of features real and fake, each [n, d].

    None, with a note, where n is too small; FID is refused where n is not above d, unless forced.
    """
    n, d = real.shape
    found: dict[str, tuple[float | None, float | None]] = {figure: (None, None) for figure in ("FID", "KID", *MANIFOLD)}
    notes = dict.fromkeys(("FID", "KID"), "needs two images") | dict.fromkeys(MANIFOLD, f"needs {NEAREST + 1} images")
    if n > 1:
        found["KID"] = kid(real, fake)
    if n > NEAREST:
        found |= {figure: (value, None) for figure, value in manifold(real, fake).items()}
    if n <= d and not force:
        notes["FID"] = f"refused, N={n} is not above the features' {d} dimensions; read KID, or --force"
    elif n > 1:
        found["FID"] = frechet(real, fake), None
    rows: Rows = {figure: {"value": value, "std": std, "N": n} for figure, (value, std) in found.items()}
    for figure, row in rows.items():
        if row["value"] is None:
            row["note"] = f"{figure}: {notes[figure]}"
    return rows


class Features:
    """FID, KID and MANIFOLD of the complete images and of the lungs alone, in each dimension of a feature network."""

    def __init__(
        self, model: Path, provider: str, dimension: str | None, force: bool, window: Window, regions: list[str]
    ) -> None:
        self.model, (self.session, info) = model, open_session(model, provider, kind="features")
        self.name, self.force, self.window, self.regions = info.get("name", model.stem), force, window, regions
        offered = [output.name for output in self.session.get_outputs()]
        if dimension and dimension not in offered:
            raise Mistake(f"{model}: no features of dimension {dimension}: give --dim one of {', '.join(offered)}")
        self.dimensions = [dimension] if dimension else offered
        self.found: dict[tuple[str, str, str], list[np.ndarray]] = defaultdict(list)  # [N, d] of each batch

    def update(self, batch: Batch) -> None:
        """Compute the features of a batch. Raises Mistake for features that are not vectors of finite numbers."""
        for region in self.regions:
            for side in SIDES:
                image = self.window(getattr(batch, side), batch.labels if region == "lung" else None)
                features = run(self.model, self.session, self.dimensions, image=image)
                for dimension, of_batch in zip(self.dimensions, features, strict=True):
                    if of_batch.shape[:-1] != (len(image),) or not np.isfinite(of_batch).all():
                        raise Mistake(f"{self.model}: {dimension} is not finite, or not [N, d]: export it again")
                    self.found[dimension, region, side].append(of_batch)

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "features"; the floor is one random half of the real images against the other.

        relative: FID of one half's real images and the other half's synthetic ones over the floor, about 1 where
        synthetic images are as real as real ones, None without a floor (the relative Frechet distance of Woodland et
        al., MICCAI 2024, arXiv 2311.13717, here of as many images: the bias of FID falls with N, and of all images the
        ratio would be nearer to a half). No synthetic image meets the real one of its own map.
        """
        half, other = halves(len(names))
        rows: Rows = {}
        all_of_them = [(dimension, region) for dimension in self.dimensions for region in self.regions]
        for dimension, region in tqdm(all_of_them, "features", delay=1):
            fake, real = (np.concatenate(self.found[dimension, region, side]) for side in SIDES)
            floors = score(real[half], real[other], self.force)
            for figure, found in score(real, fake, self.force).items():
                row = {"features": self.name, "dimension": real.shape[1]} | found
                row |= {f"floor_{key}": value for key, value in floors[figure].items()}
                if figure == "FID":
                    floor = row["floor_value"]
                    row["relative"] = frechet(real[half], fake[other]) / floor if floor else None
                rows[f"{region} {figure} {dimension}"] = row
        return {"features": rows}


# ------------------------------------------------------------------------------------------------ texture


def interior(labels: np.ndarray) -> np.ndarray:
    """Weight 0..1 of each pixel in the spectrum, float32 [H, W], from labels [H, W]; background has none.

    0 on MARGIN pixels along each label's edges, where a pixel may be part chest wall or lesion and the step would drown
    all texture; then a quarter sine, squared, over TAPER pixels: abrupt edges spread low frequencies over high ones.
    """
    depth = np.zeros(labels.shape, np.intp)
    for _ in range(MARGIN + TAPER):
        around = np.pad(labels, 1)
        neighbours = around[2:, 1:-1], around[:-2, 1:-1], around[1:-1, 2:], around[1:-1, :-2]
        labels = labels * np.logical_and.reduce([labels == of for of in neighbours])
        depth += labels > 0
    ramp = (np.arange(MARGIN + TAPER + 1) - MARGIN).clip(0) / TAPER
    return (np.sin(ramp * math.pi / 2) ** 2).astype(np.float32)[depth]


@functools.lru_cache(8)
def rings(height: int, width: int) -> np.ndarray:
    """Ring of each frequency of np.fft.rfft2, flat [height * (width // 2 + 1)]; RINGS for those in none.

    Those are frequencies from 0.5 cycles per pixel on, the mean, and the complex conjugates of others.
    """
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    ring = (np.hypot(y, x) * 2 * RINGS).astype(np.intp)
    return np.where((ring < RINGS) & ((x > 0) | (y > 0)), ring, RINGS).ravel()


def energy(hu: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean |Fourier transform|^2 in each ring, float64 [RINGS], of HU [H, W] less each label's own mean.

    How dense a label is, the histograms show. Divided by the sum of the weights' squares this is the power spectrum,
    HU^2: white noise of standard deviation s has s^2 in every ring, at any size and shape.
    """
    total, weighed = (np.bincount(labels.ravel(), of.ravel(), len(LABELS)) for of in (weight, weight * hu))
    means = (weighed / total.clip(1e-9)).astype(np.float32)
    shape = [-(-side // 64) * 64 for side in hu.shape]  # zero-padded: no ring is empty, and shapes are few
    power = np.abs(np.fft.rfft2(weight * (hu - means[labels]), shape)) ** 2
    ring = rings(*shape)
    return (np.bincount(ring, power.ravel()) / np.bincount(ring))[:RINGS]


class Pool(NamedTuple):
    """What the texture of a set of slices is measured by; NaN where there is no pixel to measure."""

    spectrum: np.ndarray  # [RINGS], HU^2, QUIETEST at least
    histograms: np.ndarray  # [labels, 256], the share of each step of the window in each label's pixels


def differences(real: Pool, fake: Pool, step: float) -> dict[str, float]:
    """Figures of one set of slices against another, by name; step: of the window, in HU.

    spectrum: mean distance in dB over the rings. fine texture: power of the fine rings over the real power there,
    0..; less than 1 is blur, more is noise. HU of a label: Wasserstein-1 distance, HU, of all its pixels: the area
    between the cumulative histograms.
    """
    decibels = 10 * np.log10(fake.spectrum / real.spectrum)
    # the farther out a ring, the more frequencies it holds
    fine_real, fine_fake = ((pool.spectrum * FREQUENCIES)[FINE:].sum() for pool in (real, fake))
    distances = np.abs((fake.histograms - real.histograms).cumsum(1)).sum(1) * step
    figures = {"spectrum": np.abs(decibels).mean(), "fine texture": fine_fake / fine_real}
    return figures | {f"HU of {label}": value for label, value in zip(LABELS[1:], distances, strict=True)}


class Texture:
    """Texture or blur? Power spectrum inside the lung and HU histogram of each label, beside the real slices' own.

    Spectra are means over all directions, by which Durall et al. (CVPR 2020) tell synthetic images from real ones.
    Slices are pooled, each weighted by its lung's area. HU are clipped to the window, and for the histograms
    rounded to its 256 steps.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.areas: list[float] = []  # sum of the weights' squares of each slice
        self.energies: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> [RINGS] of each slice
        self.counts: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> label * 256 + step, and pixels, of each

    def update(self, batch: Batch) -> None:
        """Measure a batch."""
        low = self.window.level - self.window.width / 2
        for *images, labels in zip(*batch, strict=True):
            rows, columns = (np.flatnonzero(labels.any(axis)) for axis in (1, 0))
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # the rest does not count
            labels, weight = labels[box].astype(np.intp), interior(labels[box])
            self.areas.append(float((weight**2).sum()))
            for side, hu in zip(("real", "fake"), (image[box] for image in images), strict=True):
                clipped = hu.clip(low, low + self.window.width).astype(np.float32)
                self.energies[side].append(energy(clipped, labels, weight))
                counts = np.bincount((labels * 256 + self.window(hu))[labels > 0])
                found = np.flatnonzero(counts)
                self.counts[side].append(np.array([found, counts[found]], np.uint32))

    def pool(self, side: str, chosen: np.ndarray) -> Pool:
        """The chosen slices of a side."""
        power, area, counts = np.zeros(RINGS), 0.0, np.zeros(len(LABELS) * 256)
        for k in chosen:
            power, area = power + self.energies[side][k], area + self.areas[k]
            step, pixels = self.counts[side][k]
            counts[step] += pixels
        of_labels = counts.reshape(-1, 256)[1:]
        with np.errstate(invalid="ignore"):  # 0 / 0 is meant to be NaN
            return Pool(np.maximum(power / area, QUIETEST), of_labels / of_labels.sum(1, keepdims=True))

    def pools(self) -> list[Pool]:
        """All real slices, all synthetic ones, and the real ones' halves."""
        everyone, (half, other) = np.arange(len(self.areas)), halves(len(self.areas))
        places = (("real", everyone), ("fake", everyone), ("real", half), ("real", other))
        return [self.pool(side, chosen) for side, chosen in places]

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "texture"; None for what has no pixel. The floor is one half of the real slices against the other."""

        def known(value: Any) -> Any:
            return np.where(np.isnan(value), None, value).tolist()

        real, fake, half, other = self.pools()
        step, n = self.window.width / 255, len(names)
        found, floors = differences(real, fake, step), differences(half, other, step)
        rows: Rows = {
            name: {"value": known(value), "N": n, "floor_value": known(floors[name]), "floor_N": n // 2}
            for name, value in found.items()
        }
        rows["spectrum"] |= {"frequency": FREQUENCIES.tolist()}  # cycles per pixel
        rows["spectrum"] |= {"real": known(real.spectrum), "fake": known(fake.spectrum)}  # HU^2
        return {"texture": rows}

    def picture(self) -> bytes | None:
        """PNG of spectra and histograms, real and synthetic, the real halves in thin lines; None without matplotlib."""
        try:
            from matplotlib.figure import Figure  # slow to import, and only needed here
        except ImportError:
            return None
        real, fake, *floor = self.pools()
        figure = Figure(figsize=(10, 4))
        power, density = figure.subplots(1, 2)
        for half in floor:
            power.plot(FREQUENCIES, 10 * np.log10(half.spectrum), color="silver", lw=1)
        hu = self.window.level + ((np.arange(64) + 0.5) / 64 - 0.5) * self.window.width
        for pool, name, style in ((real, "real", "-"), (fake, "synthetic", "--")):
            power.plot(FREQUENCIES, 10 * np.log10(pool.spectrum), style, color="black", label=name)
            bins = 100 * pool.histograms.reshape(-1, 64, 4).sum(2)  # single steps hold 5 or 6 HU and would draw a comb
            for label, colour, shares in zip(LABELS[1:], COLOURS[1:], bins, strict=True):
                density.plot(hu, shares, style, color=np.array(colour) / 255, label=label if pool is real else None)
        power.set(title="power inside the lung; grey: halves of the real", xlabel="cycles a pixel", ylabel="dB of HU²")
        density.set(title="HU of each label; dashed: synthetic", xlabel="HU", ylabel="% of its pixels")
        power.legend()
        density.legend()
        content = io.BytesIO()
        figure.savefig(content, format="png")
        return content.getvalue()


# ------------------------------------------------------------------------------------------------ segmentation


def overlap(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, sensitivity and specificity [N] of masks predicted and truth, bool [N, H, W], over each full frame.

    Dice of two empty masks is 1; sensitivity is NaN where the truth is empty, specificity where it is full.
    """
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
        told = {"multiple": "16", "labels": json.dumps(LABELS)} | info
        self.multiple, labels = (parsed(model, told, key) for key in ("multiple", "labels"))
        if labels not in ([*LABELS[:3]], [*LABELS]):
            raise Mistake(f"{model}: finds {', '.join(labels):.80}: give one that finds {', '.join(LABELS)}")
        self.found: dict[str, list[np.ndarray]] = defaultdict(list)  # row -> [N] of each batch
        self.empty: Counter[str] = Counter()

    def segment(self, hu: np.ndarray) -> np.ndarray:
        """HU int16 [N, H, W] of any H and W to labels uint8 [N, H, W]: pad with air, run, crop. May raise Mistake."""
        _, height, width = hu.shape
        padding = (0, 0), (0, -height % self.multiple), (0, -width % self.multiple)
        padded = np.pad(hu, padding, constant_values=-HU_OFFSET)
        (labels,) = run(self.model, self.session, ["map"], ct=padded)
        if labels.dtype != np.uint8 or labels.shape != padded.shape:
            raise Mistake(f"{self.model}: its map is {labels.dtype} {labels.shape}, not labels of {padded.shape}")
        return labels[:, :height, :width]

    def update(self, batch: Batch) -> None:
        """Segment a batch and compare it with its maps."""
        for side in SIDES:
            segmented = self.segment(getattr(batch, side))
            for lesion, labels in LESIONS.items():
                predicted, truth = np.isin(segmented, labels), np.isin(batch.labels, labels)
                for figure, values in overlap(predicted, truth).items():
                    self.found[f"{side} {lesion} {figure}"].append(values)
                self.empty[f"{side} {lesion} Dice"] += int((~(predicted | truth).any((1, 2))).sum())

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Table "segmentation": means over the slices where the figure is defined (n).

        empty: slices whose Dice is 1 because neither the map nor the U-Net has the lesion.
        """
        rows: Rows = {row: estimate(np.concatenate(parts), names) for row, parts in self.found.items()}
        for row, count in self.empty.items():
            rows[row]["empty"] = count
        return {"segmentation": rows}


# ------------------------------------------------------------------------------------------------ memorisation


def area_means(size: int) -> np.ndarray:
    """Matrix float32 [THUMBNAIL, size] from `size` pixels to the means of THUMBNAIL equal parts of them."""
    edges = np.arange(THUMBNAIL + 1)[:, None] * size / THUMBNAIL
    covered = np.minimum(edges[1:], np.arange(size) + 1) - np.maximum(edges[:-1], np.arange(size))
    return (covered.clip(0) * THUMBNAIL / size).astype(np.float32)


def thumbnails(grey: np.ndarray) -> np.ndarray:
    """Grey levels uint8 [N, H, W] to float32 [N, THUMBNAIL * THUMBNAIL] in 0..1."""
    _, height, width = grey.shape
    small = area_means(height) @ (grey / np.float32(255)) @ area_means(width).T
    return small.reshape(len(grey), -1)


class Memorisation:
    """The nearest training lung of each synthetic lung, and of each real test lung as the yardstick for near.

    Lungs are compared as thumbnails of 64 x 64, black outside, by the RMS of their difference. A generator that
    copies patients has distances far below the real lungs'; a little below is usual, since syntheses are smoother.
    """

    def __init__(self, train: Path, window: Window) -> None:
        self.window, self.files, found = window, {}, training_files(train)  # files of the slices with lung, by name
        self.lungs = np.empty((len(found), THUMBNAIL**2), np.float32)
        with ThreadPoolExecutor(usable_cores()) as pool:
            thumbs = tqdm(ahead(pool, self.read, found.values(), 4 * usable_cores()), "training lungs", len(found))
            for (name, files), lung in zip(found.items(), thumbs, strict=True):
                if lung is not None:
                    self.lungs[len(self.files)] = lung
                    self.files[name] = files
        if not self.files:
            raise Mistake(f"{train}: no lung in any of its {len(found)} training maps: give the set trained on")
        self.lungs, self.without_lung = self.lungs[: len(self.files)], len(found) - len(self.files)
        self.squares = (self.lungs**2).sum(1)  # [n_train]
        self.nearest: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> index [N] of each batch
        self.distance: dict[str, list[np.ndarray]] = defaultdict(list)  # side -> RMS [N] of each batch

    def read(self, files: tuple[Path, Path]) -> np.ndarray | None:
        """The thumbnail [THUMBNAIL^2] of a training lung; None for a slice without lung."""
        hu, labels = read_lung(*files)
        return thumbnails(self.window(hu, labels)[None])[0] if labels.any() else None

    def update(self, batch: Batch) -> None:
        """Find the training lungs nearest to a batch."""
        for side in SIDES:
            lungs = thumbnails(self.window(getattr(batch, side), batch.labels))
            nearest = (self.squares - 2 * lungs @ self.lungs.T).argmin(1)
            self.nearest[side].append(nearest)
            # anew, not from the squares, whose difference has lost its digits near 0, where it matters
            self.distance[side].append(np.sqrt(((lungs - self.lungs[nearest]) ** 2).mean(1)))

    def suspects(self, names: list[str], most: int = 4) -> Rows:
        """The synthetic lungs with the smallest distances, the training image nearest to each, and how near it is."""
        nearest, distance = np.concatenate(self.nearest["fake"]), np.concatenate(self.distance["fake"])
        trained = list(self.files)
        return {
            names[k]: {"nearest": trained[nearest[k]], "distance": float(distance[k])}
            for k in distance.argsort(kind="stable")[:most]
        }

    def result(self, names: list[str]) -> dict[str, Rows]:
        """Tables "memorisation" and "suspects".

        ratio: the synthetic lungs' median over the real ones'. share: of the synthetic lungs, those nearer than the
        5th percentile of the real ones. Pairs of which the real one is a training lung itself are counted, not
        measured: what is made of a training map is near its lung by the outline alone.
        """
        fake, real = (np.concatenate(self.distance[side]).astype(np.float64) for side in SIDES)
        unseen = real[real > 1e-6]
        fake = fake[real > 1e-6] if len(unseen) else fake
        rows: Rows = {
            "training": {"lungs": len(self.lungs), "without_lung": self.without_lung},
            "fake": {"lungs": len(fake), "median": np.median(fake), "minimum": fake.min()},
            "real": {"lungs": len(unseen)},
        }
        if len(unseen):
            rows["real"] |= {"median": np.median(unseen), "minimum": unseen.min()}
            rows["fake"]["ratio"] = np.median(fake) / np.median(unseen)
            rows["fake"]["share"] = (fake < np.percentile(unseen, 5)).mean()
        if len(unseen) < len(real):
            rows["real, in training"] = {"lungs": len(real) - len(unseen)}
        return {"memorisation": rows, "suspects": self.suspects(names)}


def training_files(train: Path) -> dict[str, tuple[Path, Path]]:
    """Image and map of each training slice by name: those of split.json's "train", all where there is no split.json.

    Raises Mistake where one is missing.
    """
    images, maps, split = pngs(train, "images"), pngs(train / "maps", "maps"), train / "split.json"
    sides = read_split(split) if split.is_file() else {"train": list(images)}
    if not sides.get("train"):
        raise Mistake(f'{split}: no names under "train": prepare the data again')
    missing = [name for name in sides["train"] if name not in images or name not in maps]
    if missing:
        raise Mistake(f"{train}: {missing[0]} and {len(missing) - 1} more lack image or map: prepare the data again")
    return {name: (images[name], maps[name]) for name in sides["train"]}


# ------------------------------------------------------------------------------------------------ pictures


def picture(rows: list[list[np.ndarray]]) -> bytes:
    """PNG of rows of tiles, uint8 [H, W] or [H, W, 3], each on black of the largest one's size."""
    height, width = (max(tile.shape[axis] for row in rows for tile in row) for axis in (0, 1))

    def placed(tile: np.ndarray) -> np.ndarray:
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[: tile.shape[0], : tile.shape[1]] = tile if tile.ndim == 3 else tile[..., None]
        return canvas

    sheet = np.concatenate([np.concatenate([placed(tile) for tile in row], 1) for row in rows], 0)
    return iio.imwrite("<bytes>", sheet, extension=".png")


def tiles(pair: Pair, window: Window) -> list[np.ndarray]:
    """Tiles of a pair: map where there is one, real, synthetic, absolute difference."""
    one = read_pair(pair)
    real, fake = window(one.real[0]), window(one.fake[0])
    difference = np.abs(real.astype(np.int16) - fake).astype(np.uint8)
    maps = [coloured(one.labels[0])] if pair.labels else []
    return [*maps, real, fake, difference]


# ------------------------------------------------------------------------------------------------ printed report


def text(value: Any) -> str:
    """A cell: floats to 4 digits, names cut to 40 columns, "-" for None; escapes for what the output cannot show."""
    if isinstance(value, float):
        return f"{value:.4g}"
    encoding = sys.stdout.encoding or "ascii"
    word = "-" if value is None else str(value).encode(encoding, "backslashreplace").decode(encoding)
    most = 40 if word.isascii() else 20  # other characters may be two columns wide
    return word if len(word) <= most else f"{word[: most // 2 - 1]}..{word[1 - most // 2 :]}"


def aligned(grid: list[list[Any]], *notes: str) -> str:
    """Rows of cells as lines, the first column to the left and the others to the right; below them the notes."""
    cells = [[text(value) for value in row] for row in grid]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join(lines + [textwrap.fill(note, COLUMNS, subsequent_indent="  ") for note in notes])


def means(title: str, rows: Rows, *notes: str) -> str:
    """Rows named "kind figure" with the figures down and the kinds across: mean, and half of its two intervals."""
    kinds, figures = (list(dict.fromkeys(words)) for words in zip(*(row.split(" ", 1) for row in rows), strict=True))
    heads = [("synthetic" if kind == "fake" else kind, "+-slices", "+-patients") for kind in kinds]
    grid = [[title, "n", *(head for three in heads for head in three)]]
    for figure in figures:
        grid.append([figure, rows[f"{kinds[0]} {figure}"]["n"]])
        for row in (rows[f"{kind} {figure}"] for kind in kinds):
            halves = (row["interval"], row["patients_interval"])
            grid[-1] += [row["mean"], *(half and float(f"{half:.2g}") for half in halves)]
    return aligned(grid, *notes)


def distances(rows: Rows) -> str:
    """Figures of features beside their floors, each in the largest dimension it is given in, and what is left out."""
    first, regions = next(iter(rows.values())), list(dict.fromkeys(row.split()[0] for row in rows))
    grid = [[first["features"], "n", *(head for region in regions for head in (region, "floor"))]]
    notes = [f"floor: half of the real slices against the other half, {first['floor_N']} each: FID rises as n falls"]
    groups = {("FID",): "more slices than dimensions", ("KID",): "two slices", MANIFOLD: f"{NEAREST + 1} slices"}
    for figures, need in groups.items():
        for figure in figures:
            found = [row for name, row in rows.items() if name.split()[1] == figure]
            found.sort(key=lambda row: row["dimension"])
            given = [row for row in found if row["value"] is not None][-len(regions) :]
            values = [row[key] for row in given for key in ("value", "floor_value")]
            if given:
                grid.append([f"{figure}, {given[0]['dimension']} dimensions", first["N"], *values])
        group = " to ".join(dict.fromkeys([figures[0], figures[-1]]))  # what one of these lacks, all lack
        if absent := list(dict.fromkeys(str(row["dimension"]) for row in found if row["value"] is None)):
            dimensions = " and ".join(", ".join(absent).rsplit(", ", 1))
            notes.append(f"{group} at {dimensions} left out: {first['N']} slices; it needs {need}")
        if given and values[1] is None:
            notes.append(f"{group}'s floor left out: {first['floor_N']} slices in each half; it needs {need}")
        if given and figures == ("FID",):
            if None not in (relative := [row["relative"] for row in given]):
                grid.append(["relative FID", first["N"], *(value for of in relative for value in (of, 1.0))])
                notes.append("relative FID: of one half's real and the other half's synthetic slices, over the floor")
            if first["N"] <= (dimension := given[0]["dimension"]):
                notes.append(f"FID at {dimension} is forced, and too high: {first['N']} slices; it needs {need}")
    return aligned(grid, *notes)


def textures(rows: Rows) -> str:
    """Texture or blur: spectrum, fine texture and HU beside their floors, and what is left out."""
    shown = {"spectrum": ("spectrum, dB", 1), "fine texture": ("fine texture, % of the real power", 100)}
    grid, absent = [["texture inside the lung", "n", "synthetic", "floor"]], []
    for name, row in rows.items():
        title, unit = shown.get(name, (name, 1))
        if row["value"] is None:
            absent.append(name)
        else:
            values = (row["value"], row["floor_value"])
            grid.append([title, row["N"], *(value if value is None else value * unit for value in values)])
    notes = [
        "fine texture: below 100 % is blur, above is noise; it is what is finer than 4 pixels",
        "spectrum, HU: distance of the power spectra; of a label's densities (Wasserstein)",
    ]
    if absent:
        notes.append(f"left out, without a pixel to tell it by: {', '.join(absent)}")
    return aligned(grid, *notes)


def memories(rows: Rows) -> str:
    """How near synthetic lungs come to training lungs, beside real ones."""
    fake, columns, training = rows["fake"], ("lungs", "median", "minimum"), rows["training"]
    grid = [["nearest training lung", *columns], ["synthetic", *map(fake.get, columns)]]
    grid.append(["real", *map(rows["real"].get, columns)])
    notes = [f"RMS distance to {training['lungs']} training lungs: copies are far nearer than real lungs"]
    if training["without_lung"]:
        notes[0] += f"; {training['without_lung']} without lung left out"
    if "ratio" in fake:
        share = f"{100 * fake['share']:.3g} % nearer than the real 5th percentile (by chance 5 %)"
        notes.append(f"synthetic: median {fake['ratio']:.3g} of the real, {share}")
    if "real, in training" in rows:
        trained = f"{rows['real, in training']['lungs']} real lungs are training lungs themselves"
        notes.append(f"{trained}: {'they and their synthetic ones are' if 'ratio' in fake else ''} not measured")
    return aligned(grid, *notes)


def report(results: dict[str, Rows]) -> str:
    """The part of the results that is printed, COLUMNS wide at most; the rest is only in the JSON."""
    window, pairs = results["run"]["window, HU"], results["run"]["pairs"]
    head = f"pairs: {pairs['measured']}, patients: {pairs['patients']} (by name, up to the last _)"
    head += f", level {window['level']:g}, width {window['width']:g} HU"
    head += f"\n{pairs['without_lung']} pairs without lung left out" if pairs["without_lung"] else ""
    intervals = "+-: half of the mean's 95 % interval over slices; over patients, it holds for new patients too"
    limits = "at best: PSNR 100 dB, SSIM 1, RMSE and NRMSE 0"
    if "lung PSNR" in results["pixels"]:
        limits += "; the lung's PSNR and RMSE are the complete image's"
    blocks = [head, means("pair by pair", results["pixels"], intervals, limits)]
    if "features" in results:
        blocks.append(distances(results["features"]))
    if "texture" in results:
        blocks.append(textures(results["texture"]))
    if "segmentation" in results:
        note = "real is the ceiling; where the map has no lesion, Dice is 1 if none is found, sensitivity is void"
        blocks.append(means("lesions by U-Net", results["segmentation"], note))
    if "memorisation" in results:
        blocks.append(memories(results["memorisation"]))
    for title, picture_name in (("suspects", SUSPECTS), ("cases", CASES)):
        if rows := results.get(title):
            grid = [[name, *row.values()] for name, row in rows.items()]
            blocks.append(aligned([[picture_name, *next(iter(rows.values()))], *grid]))
    return "\n\n".join(blocks)


# ------------------------------------------------------------------------------------------------ main


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write a file into a Mistake that names it, which a full disk's error does not."""
    try:
        yield
    except OSError as error:
        raise Mistake(f"{path}: cannot be written ({error.strerror}): name another place") from error


def check_target(path: Path) -> None:
    """Raise Mistake where a file could not be written, before the long work; leaves nothing behind."""
    with writing(path):
        if path.is_dir():
            raise Mistake(f"{path}: is a folder: name a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # detects a full disk


def save(path: Path, content: bytes) -> None:
    """Write a file and the folders it needs, whole or not at all. Raises Mistake where that fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.parent, f".{path.name}.lock", wait=True):  # two runs may write there, but not to one file
            write_bytes(path, content)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = OneLineParser(__doc__)
    option = parser.add_argument
    option("real", type=Path, help="folder of real slices, or a dataset")
    option("fake", type=Path, help="folder of synthetic slices, complete or lung alone, or a dataset")
    option("--maps", type=Path, help="folder of label maps; those of the dataset FAKE or REAL by default")
    option("--strict", action="store_true", help="refuse names that only one of REAL and FAKE has")
    option("--features", type=Path, metavar="FILE", help="feature network, ONNX: FID and KID")
    option("--dim", metavar="D", help="dimension of the features; all that the file offers by default")
    option("--force", action="store_true", help="give FID even where N is not above the dimension")
    option("--unet", type=Path, metavar="FILE", help="segmentation U-Net, ONNX: Dice, sensitivity, specificity")
    option("--train", type=Path, metavar="DIR", help="dataset that the generator was trained on: memorisation")
    option("--level", type=float, default=LEVEL, help="level of the window, HU")
    option("--width", type=float, default=WIDTH, help="width of the window, HU")
    option("--json", type=Path, metavar="FILE", help="write all results there")
    option("--out", type=Path, default=Path("eval"), help="folder of the pictures")
    option("--batch", type=int, default=1, metavar="N", help="slices at a time; more only pays on a GPU")
    option("--provider", choices=("auto", *PROVIDERS), default="auto", help="what graphs and models run on")
    args = parser.parse_args(argv)
    if args.batch < 1 or not (0 < args.width < math.inf and math.isfinite(args.level)):
        given = f"--batch {args.batch}, --level {args.level:g}, --width {args.width:g}"
        raise Mistake(f"{given}: give a batch of 1 or more, and a width above 0")
    return args


Meter = PixelMetrics | Features | Texture | Segmentation | Memorisation


def check_targets(args: argparse.Namespace, with_maps: bool) -> None:
    """Raise Mistake, before the long work, where what is asked for needs maps, or a file could not be written."""
    for needy in ("unet", "train"):
        if getattr(args, needy) and not with_maps:
            raise Mistake(f"--{needy}: the label maps are missing: give --maps")
    pictures = {CASES: True, SUSPECTS: args.train, TEXTURE: with_maps}
    for path in [*(args.out / name for name, wanted in pictures.items() if wanted), *filter(None, [args.json])]:
        check_target(path)


def make_meters(args: argparse.Namespace, with_maps: bool) -> dict[str, Meter]:
    """The meters, each by the name of its table in the results. Raises Mistake for a file that is no such model."""
    regions, window = ["complete", "lung"] if with_maps else ["complete"], Window(args.level, args.width)
    meters: dict[str, Meter] = {"pixels": PixelMetrics(window, args.provider, regions)}
    if args.features:
        meters["features"] = Features(args.features, args.provider, args.dim, args.force, window, regions)
    if with_maps:
        meters["texture"] = Texture(window)
    if args.unet:
        meters["segmentation"] = Segmentation(args.unet, args.provider)
    if args.train:
        meters["memorisation"] = Memorisation(args.train, window)
    return meters


def measure(pairs: list[Pair], meters: Iterable[Meter], n: int) -> tuple[list[Pair], float | None, int]:
    """Show every meter all pairs with lung, n at a time.

    Returns these, the mean HU of real healthy lung, if any, and the highest HU of a synthetic lung. Raises
    Mistake where no map has lung, and where memory runs out.
    """
    kept: list[Pair] = []
    lung, highest = np.zeros(2), -HU_OFFSET  # sum of real HU, and pixels
    try:
        for members, batch in batches(pairs, n):
            for meter in meters:
                meter.update(batch)
            kept += members
            healthy = batch.real[batch.labels == 1]
            lung += healthy.sum(dtype=float), healthy.size
            highest = max(highest, int(batch.fake[batch.labels > 0].max()))
    except MemoryError as error:
        raise Mistake(f"out of memory ({error}): give a smaller --batch") from error
    if not kept:
        raise Mistake(f"{pairs[0].labels} and all other maps of the {len(pairs)} pairs: no lung in them: give others")
    return kept, lung[0] / lung[1] if lung[1] else None, highest


def write_pictures(
    args: argparse.Namespace, meters: dict[str, Meter], kept: list[Pair], shown: Iterable[int], suspects: Rows
) -> None:
    """Write the cases `shown`, indices of pairs, with the curves and the suspects where they were measured."""
    window = Window(args.level, args.width)
    for name in (SUSPECTS, TEXTURE):
        (args.out / name).unlink(missing_ok=True)  # a previous evaluation's would pass for this one's
    save(args.out / CASES, picture([tiles(kept[k], window) for k in shown]))
    if "texture" in meters and (curves := meters["texture"].picture()):
        save(args.out / TEXTURE, curves)
    elif "texture" in meters:
        print(f"note: {args.out / TEXTURE} left out: it needs matplotlib", file=sys.stderr)
    if "memorisation" in meters:
        fakes, trained = {pair.name: (pair.fake, pair.labels) for pair in kept}, meters["memorisation"].files
        couples = [(fakes[name], trained[row["nearest"]]) for name, row in suspects.items()]
        save(args.out / SUSPECTS, picture([[window(*read_lung(*files)) for files in couple] for couple in couples]))


def main(argv: list[str]) -> None:
    """Evaluate what the command line names: print the report, write pictures and JSON. Raises Mistake."""
    args = parse(argv)
    pairs = find_pairs(args.real, args.fake, args.maps, args.strict)
    with_maps = pairs[0].labels is not None
    check_targets(args, with_maps)
    meters = make_meters(args, with_maps)
    kept, lung_mean, highest = measure(pairs, meters.values(), args.batch)
    if with_maps and lung_mean is not None and (told := no_lungs_mean(lung_mean, "their healthy lung")):
        print(f"note: {args.real}: {told}: are these HU + {HU_OFFSET}, and the maps theirs?", file=sys.stderr)
    if highest <= 255 - HU_OFFSET:
        told = f"no value above 255 in any lung: if these are grey levels, not HU + {HU_OFFSET}, no figure holds"
        print(f"warning: {args.fake}: {told}", file=sys.stderr)

    names, ssim = [pair.name for pair in kept], meters["pixels"].of_pairs("complete SSIM")
    counts = {"measured": len(kept), "without_lung": len(pairs) - len(kept), "patients": len({*map(patient_of, names)})}
    results: dict[str, Rows] = {"run": {"window, HU": {"level": args.level, "width": args.width}, "pairs": counts}}
    for meter in meters.values():
        results |= meter.result(names)
    order = ssim.argsort(kind="stable")[::-1]
    shown = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    results["cases"] = {case: {"name": names[k], "SSIM": ssim[k]} for case, k in shown.items()}
    print(report(results))

    write_pictures(args, meters, kept, shown.values(), results.get("suspects", {}))
    if args.json:
        save(args.json, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    exit_on_mistake(main)
