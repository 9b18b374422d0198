"""Turn label maps of chest CT into CT slices and volumes, with an exported generator and ONNX Runtime; no torch.

    python infer_onnx.py maps/                                         # synthetic lungs, 16-bit PNG of HU + 1024
    python infer_onnx.py maps/ --complement images/ --panel            # pasted into the real slices, bit for bit
    python infer_onnx.py maps/ --complement images/ --lesions --paste lesions --variants 4    # new lesions in each
    python infer_onnx.py maps/ --variants 40 --seed 1 --out augmented  # 40 augmented maps of each, and their slices
    python infer_onnx.py maps/ --draws 8 --density -840 --detail 60    # 8 slices; healthy lung's mean and texture, HU
    python infer_onnx.py labels.nii.gz                                 # a label volume: a CT volume on its grid
    python infer_onnx.py labels/ --complement ct/                      # folders of volumes, paired by name
    python infer_onnx.py 'a/*_seg.nii.gz' --complement 'a/*_ct.nii.gz' # or by what one star, in quotes, stands for
    python infer_onnx.py data/phantom --side test                      # a dataset's held-out maps
    python infer_onnx.py maps/ --shard 3/8                             # the third of eight machines
    python infer_onnx.py maps/ --provider cuda --dry-run               # what would be done, and with which options

    OUT/images/P03_S041.png   the slice; with --format png8 through the model's window
    OUT/maps/P03_S041.png     the map it was made from: OUT with png16 is a dataset as covidgan.py --data reads it
    OUT/panels/P03_S041.png   --panel: map, synthesis and, with --complement, completion side by side
    OUT/volumes/NAME.nii.gz   of a label volume, whose labels are in OUT/labels: HU int16, on its grid, as it is stored
    OUT/imagesTr/, labelsTr/  --format nnunet: as nnU-Net v2 reads them, with dataset.json, in place of these
    OUT/run.json              what OUT was made with: another model or format needs another OUT

Maps and label volumes hold 0 background, 1 lung, 2 ground-glass opacity, 3 consolidation, in radiological display.
Outside the lung is the window's floor, or -1024 HU where that is higher; with --complement, the real one to the HU.
Maps without lung are left out and counted; so are faulty ones, with exit status 2. The same command resumes a stopped
run: what is finished, and newer than its map and real slice, is skipped. Variants are named P03_S041v01, ...: what
comes before the last "_" is still the patient. Their real slices go through the same augmentation as their maps.
With --lesions MAPS a variant is no augmentation, but has lesions of another map in its healthy lung, of the train side
where MAPS has a split.json: which and where hangs on name, variant and --seed. Without MAPS they are the phantom's, in
models/lesions. With --paste lesions the real slice stays everywhere else; they are shifted as healthy lungs differ.
Where the model can be steered, a lung has the density and detail given, else with --complement those of its real slice,
else with --draws those of some training slice, else the model's defaults. Draws are named P03_S041d01, ..., of variants
P03_S041v01d01, ...; they hang on name and --seed alone. So does the texture of each slice.
Without --model, generator.onnx is taken, else models/covid-ct-256.onnx beside this file; where there is no folder
maps/, data/phantom/maps or else models/examples beside this file. Research only, not for diagnosis.
"""

import argparse
import contextlib
import ctypes
import glob
import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import lesions, slices
from data.check import check_pair, sided
from data.runtime import ort, ort_state
from data.slices import HELD, Mistake

# shipped with a clone, found from any working directory
SHIPPED = Path(__file__).parent / "models"
SHIPPED_MODEL, EXAMPLES, LESIONS = SHIPPED / "covid-ct-256.onnx", SHIPPED / "examples", SHIPPED / "lesions"

# the contract with export.py
CONTRACTS = "1", "2"
TENSORS = {"input map": "tensor(uint8)", "output ct": "tensor(int16)", "output alpha": "tensor(float)"}
STEERS = {"density": "tensor(float)", "detail": "tensor(float)", "seed": "tensor(int64)"}  # inputs, where it has them
METADATA = ("contract", "labels", "level", "width", "size", "multiple", "precision", "checkpoint_sha256")
REAL = int | float
PARSED = {"labels": list, "level": REAL, "width": REAL, "size": int, "multiple": int}  # JSON
PARSED |= {"trained_labels": list, "drawn": list}
EXTERNAL = b"\n\x08location"  # the key, as protobuf writes it, that places a tensor in another file

NAMES = ("CUDA", "OpenVINO", "CPU")  # ONNX Runtime's; "auto" tries them in this order
PROVIDERS = {name.lower(): f"{name}ExecutionProvider" for name in NAMES}
CUDA, CUDA_BATCH = PROVIDERS["cuda"], 8  # on a CPU batches gain nothing
ORT_ERRORS = (
    *(e for e in vars(ort_state).values() if isinstance(e, type) and issubclass(e, Exception)),
    RuntimeError,  # from a node that runs out of memory
    MemoryError,
)

FOLDERS = {"nnunet": ("labelsTr", "imagesTr"), "volume": ("labels", "volumes")}  # in OUT, by format: maps, images
# the augmentation of covidgan.Config; lengths in pixels of a 512-pixel slice
RESIZE, ROTATE, ELASTIC, ELASTIC_CELL = 1.117, 10.0, 2.0, 24.0


# ------------------------------------------------------------------------------------------------ the model


def open_session(
    model: Path,
    provider: str = "auto",
    threads: int | None = None,
    kind: str = "generator",
) -> tuple[ort.InferenceSession, dict[str, Any]]:
    """Open a model on a provider, say on stderr which it is, and return the session and the model's metadata.

    provider: a key of PROVIDERS, or "auto" for the first that really loads.
    threads: on the CPU; by default one for each core that this process may use.
    kind: what the metadata must call the model; a "generator" must keep the contract, see check_model.
    Raises Mistake for a missing, broken or foreign file, and for a provider asked for by name that does not load.
    """
    if not model.is_file():
        raise Mistake(f"{model}: no such file: python export.py writes it, or name another")
    content, threads = model.read_bytes(), threads or usable_cores()
    if EXTERNAL in content:  # ONNX Runtime would read any file of the working directory
        raise Mistake(f"{model}: keeps its tensors in other files: export it again")
    try:
        on_cpu = start(content, "cpu", {}, threads)  # checks the file before anything is compiled for it
    except ORT_ERRORS as error:
        told = f"onnxruntime {ort.__version__} does not read it ({first_line(error)})"
        raise Mistake(f"{model}: {told}: export it again, or pip install -U onnxruntime") from error
    info = check_model(on_cpu, model, kind)
    reasons: dict[str, list[str]] = {}  # why not -> which providers
    for name in PROVIDERS if provider == "auto" else [provider]:
        session = on_cpu
        try:
            narrow = name not in ("cpu", "cuda") and "seed" in info.get("steers", ())
            reason = "may compute noise in 32 bits, not 64" if narrow else obstacle(name)
            if not reason and name != "cpu":
                session = start(content, name, provider_options(name, info), threads)
                if session.get_providers()[0] != PROVIDERS[name]:  # it fell back to the CPU without a word
                    reason = f"did not load{loader_error(name)}"
        except (*ORT_ERRORS, OSError) as error:
            reason = f"did not start ({first_line(error)})"
        if not reason:
            how = f"cpu, threads: {threads}" if name == "cpu" else name
            better = "".join(f"; not {', '.join(names)}: {why}" for why, names in reasons.items())
            print(f"{model} runs on {how}{better}", file=sys.stderr)
            return session, info
        reasons.setdefault(reason, []).append(name)
    raise Mistake(f"--provider {provider}: {reason}: --provider auto takes the best there is")


def find_model(given: Path | None) -> Path:
    """The model given, else generator.onnx, else the one shipped with a clone."""
    own = Path("generator.onnx")
    if given or own.exists() or not SHIPPED_MODEL.exists():
        return given or own
    print(f"{own} is not there: taking {SHIPPED_MODEL}", file=sys.stderr)
    return SHIPPED_MODEL


def check_model(session: ort.InferenceSession, model: Path, kind: str) -> dict[str, Any]:
    """Metadata of a model of a kind. Raises Mistake.

    A generator's is parsed, with "steers": its inputs besides the map.
    """
    info: dict[str, Any] = dict(session.get_modelmeta().custom_metadata_map)
    if (found := info.get("kind", "file of no kind")) != kind:
        raise Mistake(f"{model}: is a {found}, not a {kind}: give one of export.py's")
    if kind != "generator":
        return info
    tensors = {f"input {one.name}": one.type for one in session.get_inputs()}
    tensors |= {f"output {one.name}": one.type for one in session.get_outputs()}
    lacks = [f"metadata {key}" for key in METADATA if key not in info]
    steers = {f"input {name}": type_ for name, type_ in STEERS.items() if f"input {name}" in tensors}
    lacks += [f"{name}, {type_}" for name, type_ in (TENSORS | steers).items() if tensors.get(name) != type_]
    if lacks or info["contract"] not in CONTRACTS:
        what = f"it lacks {'; '.join(lacks)}" if lacks else f"contract {info['contract']}, not {CONTRACTS[-1]}"
        raise Mistake(f"{model}: {what}: export it again")
    info |= {key: parsed(model, info, key) for key in PARSED if key in info}
    return info | {"steers": [name for name in STEERS if f"input {name}" in tensors]}


def parsed(model: Path, info: dict[str, str], key: str) -> Any:
    """An entry of a model's metadata in JSON: a list; size, multiple (pixels); level, width (HU). Raises Mistake."""
    value = None
    with contextlib.suppress(ValueError):
        value = json.loads(info[key])
    if not isinstance(value, PARSED[key]) or (key in ("size", "multiple", "width") and value <= 0):
        raise Mistake(f"{model}: metadata {key} is {info[key]}: export it again")
    return value


class Generator:
    """The model as a function of maps of any size: uint8 [N, H, W], labels -> int16 [N, H, W], HU."""

    def __init__(self, session: ort.InferenceSession, info: dict[str, Any]) -> None:
        self.session, self.info = session, info

    def __call__(self, maps: np.ndarray, told: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Pad with background, synthesize, crop. Raises Mistake where ONNX Runtime fails.

        At least two multiples a side: layers deep inside reflect at the border, and a single pixel has no neighbour.
        told: [N] of each of STEERS that the model has; without, its defaults.
        """
        n, height, width = maps.shape
        multiple = self.info["multiple"]
        padded = [max(2, math.ceil(side / multiple)) * multiple for side in (height, width)]
        try:
            given = {"map": np.zeros((n, *padded), np.uint8)}
            given["map"][:, :height, :width] = maps
            for name in self.info["steers"]:
                default = np.int64(0) if name == "seed" else np.float32(np.nan)
                given[name] = np.full(n, default if told is None else told[name], default.dtype)
            (ct,) = self.session.run(["ct"], given)
        except ORT_ERRORS as error:
            raise Mistake(f"{first_line(error)}: is there memory for {(n, *padded)}? Try a smaller --batch") from error
        return ct[:, :height, :width]


# ------------------------------------------------------------------------------------------------ maps in


class Job(NamedTuple):
    """A slice or volume to make: its name, its map's file and name, which variant and draw: 1, 2, ...; 0 for none."""

    name: str
    path: Path
    source: str
    variant: int
    draw: int = 0


class Case(NamedTuple):
    """A slice [H, W] or volume [Z, H, W] in the making: labels uint8, and for --complement the real one's HU int16."""

    job: Job
    labels: np.ndarray
    real: np.ndarray | None
    grid: Any = None  # the data.volumes.Volume that says how the result is stored
    host: np.ndarray | None = None  # the labels before lesions of another map were placed
    told: dict[str, np.ndarray] | None = None  # what steers it, see tell


def find_maps(source: Path, side: str | None = None) -> dict[str, Path]:
    """Label maps by name, see find_files.

    side: of the dataset's split.json. Raises Mistake where there is none, or a name of the split has no map.
    """
    stand_ins = [place for place in (Path("data/phantom/maps"), EXAMPLES) if place.exists()]
    if source == Path("maps") and not source.exists() and stand_ins:
        source = stand_ins[0]
        print(f"maps is not there: taking {source}", file=sys.stderr)
    found = find_files(source, "maps")
    if not side:
        return found
    split = next(iter(found.values())).parent.parent / "split.json"
    names = slices.read_split(split).get(side)
    if not names:
        raise Mistake(f"{split}: no names under {side}: leave out --side, or name another")
    if lacking := [name for name in names if name not in found]:
        raise Mistake(f"{split}: names {lacking[0]} under {side}, but there is no such map: prepare the dataset again")
    return {name: found[name] for name in names}


def find_reals(source: Path, maps: dict[str, Path]) -> dict[str, Path]:
    """The real slices or volumes by name, see find_files; one file is that of the one map, whatever its name."""
    found = find_files(source, "images")
    if not source.is_file():
        numbered = {name: found[f"{name}_0000"] for name in maps if f"{name}_0000" in found}  # nnU-Net's names
        return numbered | found
    if len(maps) > 1:
        raise Mistake(f"{source}: one file for {len(maps)} maps: --complement wants the folder of the real slices")
    return dict.fromkeys(maps, source)


def find_files(source: Path, what: str) -> dict[str, Path]:
    """Volumes, else PNGs, by name: of a folder, or of the folder `what` of a dataset; or the one file given.

    Of a pattern such as DIR/*_ct.nii.gz or DIR/*/ct.nii.gz the name is what its star stands for. Names are in
    slices.same_form. A link to nothing is found: reading it is told. Raises Mistake where there is no such file.
    """
    slices.check_finished(source)
    folder = source / what if (source / what).is_dir() else source
    before, star, after = str(source).partition("*")
    if star:
        paths = sorted(glob.glob(f"{glob.escape(before)}*{glob.escape(after)}")) if after else []  # else a name has two
        found = {path[len(before) : len(path) - len(after)]: Path(path) for path in paths}
    elif not source.exists():
        raise Mistake(f"{source}: not there: give the folder of the {what}")
    elif any(map(is_volume, folder.iterdir() if folder.is_dir() else [folder])):
        from data.volumes import list_volumes, volume_name  # needs nibabel

        found = list_volumes(folder) if folder.is_dir() else {volume_name(folder): folder}
    else:
        found = slices.list_pngs(folder, what) if folder.is_dir() else {folder.stem: folder}
    if not found:
        raise Mistake(f"{source}: no file is called so: give it in quotes, with one star for the name, and its ending")
    return {slices.same_form(name): path for name, path in found.items()}


def is_volume(path: Path) -> bool:
    """Whether a file is a volume, by its name."""
    return path.name.lower().endswith(slices.NIFTI)


def plan(maps: dict[str, Path], variants: int, draws: int = 0) -> list[Job]:
    """What to make of maps: of each a slice or volume, or its variants 1, 2, ...; of these one, or draws 1, 2, ..."""
    every = [range(1, k + 1) if k else [0] for k in (variants, draws)]
    jobs = ((name, path, v, d) for name, path in maps.items() for v in every[0] for d in every[1])
    return [Job(name + f"v{v:02d}" * (v > 0) + f"d{d:02d}" * (d > 0), path, name, v, d) for name, path, v, d in jobs]


def load(
    job: Job,
    n_labels: int,
    reals: dict[str, Path] | None,
    seed: int,
    unchecked: bool = False,
    donors: Sequence[Path] = (),
) -> Case | None:
    """Read the map of a job, and the real one where `reals` are given; augment both for a variant.

    unchecked: do not judge whether the real one holds HU and lies as its map does.
    donors: maps, of which a variant gets lesions instead.
    Returns None where there is no lung, or no room for lesions. Raises Mistake for a bad map, and for a real one that
    is missing or does not fit.
    """
    real_path = (reals or {}).get(job.source)
    labels, real, grid = (read_volumes if is_volume(job.path) else read_slices)(job.path, real_path, n_labels)
    if not labels.any():
        return None
    if reals is not None and not real_path:
        raise Mistake(f"{job.path}: none of its name in --complement: add it, or pair by patterns: 'DIR/*_ct.nii.gz'")
    if real_path and not unchecked:
        check_pair(real_path, real, labels)
    rng = np.random.default_rng([seed, job.variant, *os.fsencode(job.source)])  # the same in any batch or shard
    if donors:
        placed = lesions.place_one_of(labels, donors, n_labels, rng)
        return None if placed is labels else Case(job, placed, real, grid, host=labels)
    if job.variant:
        rows, columns = augmentation(*labels.shape, rng)
        labels = sample_nearest(labels, rows, columns)
        real = None if real is None else sample_bicubic(real, rows, columns)
    return Case(job, labels, real, grid) if labels.any() else None  # a variant may crop its lung away


def read_slices(path: Path, real_path: Path | None, n_labels: int) -> tuple[np.ndarray, np.ndarray | None, None]:
    """Labels uint8 and, where given and there is lung, the real slice's HU int16, both [H, W]. Raises Mistake."""
    labels = slices.read_map(path)
    if labels.max() >= n_labels:
        raise Mistake(f"{path}: label {labels.max()}: the model's labels are 0..{n_labels - 1}")
    if not real_path or not labels.any():
        return labels, None, None
    real = slices.read_image(real_path)
    if real.shape != labels.shape:
        raise Mistake(f"{real_path}: {real.shape} pixels, but its map has {labels.shape}: bring both to one size")
    return labels, real, None


def read_volumes(path: Path, real_path: Path | None, n_labels: int) -> tuple[np.ndarray, np.ndarray | None, Any]:
    """Labels uint8 and, where given, the CT's HU int16, both [Z, H, W]; and the grid of the result. Raises Mistake."""
    from data import volumes  # needs nibabel

    if not real_path:
        grid, labels = volumes.read_label_volume(path, tuple(range(n_labels)))
        return labels, None, grid
    ct = volumes.read_volume(real_path)
    labels = volumes.read_labels(path, tuple(range(n_labels)), like=ct)
    low, high, limits = ct.voxels.min(), ct.voxels.max(), np.iinfo(np.int16)
    if not (limits.min <= low and high <= limits.max):  # nan neither
        raise Mistake(f"{real_path}: values {low:g} to {high:g} are no HU: write HU, and -1000 where there is none")
    return labels, np.rint(ct.voxels).astype(np.int16), ct


def augmentation(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random resize and crop, rotation and elastic displacement, as in training (Table I).

    Returns the row and the column, both float [H, W] in pixels, that each pixel is taken from.
    """
    zoom, angle = rng.uniform(1, RESIZE), math.radians(rng.uniform(-ROTATE, ROTATE))
    shift_y, shift_x = rng.uniform(-1, 1, 2) * (1 - 1 / zoom) / 2  # share of the side: how far a crop can move
    cells = math.ceil(512 / ELASTIC_CELL)
    coarse = rng.normal(0, ELASTIC / 512, (2, cells, cells)).astype(np.float32)  # share of the side
    dy, dx = (np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    y = np.arange(height)[:, None] - (height - 1) / 2  # [H, 1], from the centre
    x = np.arange(width) - (width - 1) / 2  # [W]
    rows = (height - 1) / 2 + cos * y + sin * x + (shift_y + dy) * height
    columns = (width - 1) / 2 - sin * y + cos * x + (shift_x + dx) * width
    return rows, columns


def sample_nearest(labels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Labels [H, W] taken from rows and columns, background beyond the border: no label arises that was not there."""
    y, x = np.rint(rows).astype(int) + 1, np.rint(columns).astype(int) + 1
    framed = np.pad(labels, 1)
    return framed[y.clip(0, labels.shape[0] + 1), x.clip(0, labels.shape[1] + 1)]


def sample_bicubic(hu: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """HU int16 [H, W] taken from rows and columns by cubic convolution, within its own range; its border goes on."""
    framed = np.pad(hu.astype(np.float32), 2, mode="edge")
    rows, columns = rows.clip(0, hu.shape[0] - 1), columns.clip(0, hu.shape[1] - 1)
    y, x = rows.astype(int), columns.astype(int)
    # linear interpolation would blur what others train on as real
    down, across = cubic_weights(rows - y), cubic_weights(columns - x)
    lines = (sum(across[j] * framed[y + 1 + i, x + 1 + j] for j in range(4)) for i in range(4))
    mixed = sum(weight * line for weight, line in zip(down, lines, strict=True))
    return np.rint(mixed.clip(hu.min(), hu.max())).astype(np.int16)


def cubic_weights(t: np.ndarray) -> list[np.ndarray]:
    """Weights of the pixels at -1, 0, 1 and 2 for a place t in 0..1: Keys's cubic convolution, exact on ramps."""
    near = [1.5 * d**3 - 2.5 * d**2 + 1 for d in (t, 1 - t)]
    far = [-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 for d in (1 + t, 2 - t)]
    return [far[0], *near, far[1]]


# ------------------------------------------------------------------------------------------------ what steers it


def tell(case: Case, info: dict[str, Any], args: argparse.Namespace) -> Case:
    """The case with what steers its slices: [Z] of each input that the model has, Z being 1 or a volume's."""
    labels = case.labels.reshape(-1, *case.labels.shape[-2:])
    rng = np.random.default_rng([args.seed, case.job.variant, case.job.draw, *os.fsencode(case.job.source)])
    seeds, numbers = rng.integers(2**31, size=len(labels)), np.full((len(labels), 2), np.nan)  # nan: the default
    if case.real is not None and "density" in info["steers"]:
        pairs = zip(case.real.reshape(labels.shape), labels, strict=True)
        numbers = np.stack([steering_of(*pair, info["level"], info["width"]) for pair in pairs])
    elif case.job.draw and info.get("drawn"):
        numbers[:] = rng.choice(info["drawn"])  # of a volume one pair, as it is one patient
    given = [np.nan if number is None else number for number in (args.density, args.detail)]
    density, detail = np.where(np.isnan(given), numbers, given).astype(np.float32).T
    told = {"density": density, "detail": detail, "seed": seeds}  # else vessels would run straight through a patient
    return case._replace(told={name: told[name] for name in info["steers"]})


def steering_of(hu: np.ndarray, labels: np.ndarray, level: float, width: float) -> tuple[float, float]:
    """Density and detail of a slice, both [H, W], through its window, HU: as covidgan.steering, nan where it has none.

    They are the mean of healthy lung, and the deviation from the mean of 3 x 3 pixels where these are all healthy.
    """

    def around(x: np.ndarray) -> np.ndarray:  # the sum of 3 x 3 pixels, nothing beyond the border
        return np.lib.stride_tricks.sliding_window_view(np.pad(x.astype(float), 1), (3, 3)).sum((2, 3))

    def mean(x: np.ndarray) -> float:
        return x.mean() if x.size else np.nan

    hu, healthy, there = hu.clip(level - width / 2, level + width / 2), labels == 1, around(np.ones(hu.shape))
    fine = hu - around(hu) / there
    return mean(hu[healthy]), np.sqrt(mean(np.square(fine[around(healthy) == there])))


# ------------------------------------------------------------------------------------------------ from map to CT


def run(
    jobs: list[Job],
    generator: Generator,
    n: int,
    reader: Callable[[Job], Case | str | None],
    writer: Callable[[Case, np.ndarray], None],
) -> tuple[int, int, list[str]]:
    """Make slices or volumes, reading and writing in other threads while the model runs in this one.

    n: slices at a time, neighbours of equal size; volumes are made one by one, to save memory.
    reader: gives a case, None where there is no lung, or a line about what is faulty.
    Returns how many were written, how many have no lung, and the lines about the faulty ones.
    """
    without, faults = 0, []
    volumes = any(is_volume(job.path) for job in jobs)
    workers = min(8, max(2, usable_cores()))  # more would need more memory, and no model outruns eight
    depth = 0 if volumes else 2 * workers * n

    def fail(line: str) -> None:
        if line not in faults:  # the variants of a map share its line
            faults.append(line)
            bar.write(f"error: {line}", file=sys.stderr)

    def sound(found: Iterable[Case | str | None]) -> Iterator[Case]:
        nonlocal without
        for case in found:
            if isinstance(case, Case):
                yield case
            elif case is None:
                without += 1
            else:
                fail(case)

    def synthesized(cases: Iterable[Case]) -> Iterator[tuple[Case, np.ndarray]]:
        for _, group in groupby(cases, lambda case: case.labels.shape):
            while batch := list(islice(group, 1 if volumes else n)):
                try:
                    yield from synthesize(batch, generator, n, bar)
                except Mistake as mistake:
                    for case in batch:
                        fail(f"{case.job.path}: {mistake}")

    with tqdm(total=None if volumes else len(jobs), unit=" slices") as bar, ThreadPoolExecutor(workers) as pool:
        cases = sound(ahead(pool, reader, jobs, depth))
        written = sum(1 for _ in ahead(pool, lambda made: writer(*made), synthesized(cases), depth))
    return written, without, faults


def synthesize(batch: list[Case], generator: Generator, n: int, bar: tqdm) -> list[tuple[Case, np.ndarray]]:
    """Slices of one size, or one volume, each with its synthetic lung: HU int16 of its labels' shape, clipped to HELD.

    A volume's slices without lung hold the window's floor. Raises Mistake as the generator does.
    """
    stack = batch[0].labels.ndim == 3  # a volume
    labels = batch[0].labels if stack else np.stack([case.labels for case in batch])  # [N, H, W]
    floor = np.clip(round(generator.info["level"] - generator.info["width"] / 2), *HELD)
    hu, told = np.full(labels.shape, floor, np.int16), {}
    for name in generator.info["steers"]:
        told[name] = np.concatenate([case.told[name] for case in batch])  # [N]
    with_lung = np.flatnonzero(labels.any((1, 2)))
    for z in (with_lung[i : i + n] for i in range(0, len(with_lung), n)):
        hu[z] = generator(labels[z], {name: numbers[z] for name, numbers in told.items()}).clip(*HELD)
        bar.update(len(z))
    return list(zip(batch, [hu] if stack else hu, strict=True))


def remarks(case: Case, info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a user should know of a map that is no fault: for each, what it has in common with others, and a line."""
    (*_, height, width), size = case.labels.shape, info["size"]
    if (height, width) != (size, size):
        yield f"{height} x {width}", f"{height} x {width} pixels, but the model was trained at {size} x {size}"
    trained = info.get("trained_labels", range(len(info["labels"])))  # older models do not say
    for label, name in enumerate(info["labels"]):
        if label not in (0, *trained) and (case.labels == label).any():
            yield name, f"holds {name} (label {label}), which no map did that the model was trained on"
    if case.real is None and (told := sided(case.labels)):
        yield "sides", told


def ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """map() by a pool that stays at most `depth` items ahead of whoever takes the results."""
    under_way: deque[Future] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def targets(job: Job, args: argparse.Namespace) -> list[Path]:
    """The files of a job: map, image and, if wanted, panel."""
    ending, number = (
        ".nii.gz" if is_volume(job.path) else ".png",
        "_0000" * (args.format == "nnunet"),
    )  # nnU-Net's, of an image's channel
    maps, images = FOLDERS.get(args.format, ("maps", "images"))
    files = [args.out / maps / f"{job.name}{ending}", args.out / images / f"{job.name}{number}{ending}"]
    return [*files, args.out / "panels" / f"{job.name}.png"] if args.panel else files


def is_made(files: list[Path], sources: Iterable[Path | None]) -> bool:
    """Whether all files exist, and none is older than one of the sources that it is made of."""
    newest = max((path.stat().st_mtime_ns for path in sources if path and path.exists()), default=0)
    return all(path.exists() and path.stat().st_mtime_ns >= newest for path in files)


def write(case: Case, lung: np.ndarray, args: argparse.Namespace, info: dict[str, Any]) -> None:
    """Write a slice or volume of a synthetic lung, HU int16, pasted into the real one where there is one."""
    map_path, image_path, *panel_path = targets(case.job, args)
    completed = lung if case.real is None else np.where(case.labels > 0, lung, case.real)
    if args.paste == "lesions":
        completed = lesions.paste(case.real, lung, case.host, case.labels)
    if case.grid:
        from data.volumes import write_volume  # needs nibabel

        write_volume(map_path, case.grid, case.labels)
        return write_volume(image_path, case.grid, completed)
    if args.format == "nnunet":  # which would read a palette as colours
        slices.write_bytes(map_path, slices.png(case.labels))
    else:
        slices.write_map(map_path, case.labels)
    for path in panel_path:
        shown = [lung] if case.real is None else [lung, completed]
        greys = [slices.windowed(hu, info["level"], info["width"])[..., None].repeat(3, 2) for hu in shown]
        slices.write_bytes(path, slices.png(np.concatenate([slices.coloured(case.labels), *greys], 1)))
    stored = (completed + slices.HU_OFFSET).astype(np.uint16)
    if args.format == "png8":
        stored = slices.windowed(completed, info["level"], info["width"])
    slices.write_bytes(image_path, slices.png(stored))


def complete(jobs: list[Job], args: argparse.Namespace, names: Sequence[str]) -> None:
    """Write what else makes OUT a set: nnU-Net's dataset.json, or the sides of new slices by those of their maps.

    names: of the labels. It tells of what all shards have made so far: the last to end writes the whole.
    """
    made = [job for job in jobs if all(path.exists() for path in targets(job, args))]
    if args.format == "nnunet":
        told = {"channel_names": {"0": "CT"}, "labels": {name: label for label, name in enumerate(names)}}
        told |= {"numTraining": len(made), "file_ending": targets(jobs[0], args)[0].name.removeprefix(jobs[0].name)}
        write_json(args.out / "dataset.json", told, args.part)
    drawn = jobs[0].path.parent.parent / "split.json"
    if args.format == "png16" and args.lesions and drawn.exists():
        split = slices.read_split(drawn)
        sides = {side: [job.name for job in made if job.source in split[side]] for side in split}
        if all(sides.get(side) for side in ("train", "test")):  # else it could not be trained on
            write_json(args.out / "split.json", sides, args.part)


def start(content: bytes, name: str, options: dict[str, str], threads: int) -> ort.InferenceSession:
    """A session of a model's bytes that tries a provider first; may raise ORT_ERRORS, may silently be on the CPU."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    chain: list[Any] = [(PROVIDERS[name], options), *([PROVIDERS["cpu"]] if name != "cpu" else [])]
    ort.set_default_logger_severity(4)  # what does not load is reported in one line of our own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # providers print some of their errors
            if name == "cuda" and hasattr(ort, "preload_dlls"):  # from 1.21 on
                ort.preload_dlls()  # CUDA from NVIDIA's Python packages
            return ort.InferenceSession(content, settings, providers=chain)
    finally:
        ort.set_default_logger_severity(2)


def provider_options(name: str, info: dict[str, Any]) -> dict[str, str]:
    """Options of a provider for a model's metadata. CUDA was run on an H100, OpenVINO on a CPU."""
    if name == "cuda":  # an exhaustive search would start anew for every size; tf32 would cost three digits
        nhwc = str(int(info["precision"] == "float16"))
        return {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "prefer_nhwc": nhwc}
    if name == "openvino":  # which computes in bfloat16 where it can, a hundred HU off, unless told
        # "AUTO:GPU,CPU" does not start where there is no GPU, and "AUTO" ignores load_config
        return {"device_type": "CPU", "load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "f32"}})}
    return {}


def obstacle(name: str) -> str:
    """Why a provider cannot load here; empty where it may."""
    if name == "cuda" and not nvidia_driver():
        return "no NVIDIA driver here"
    return "" if PROVIDERS[name] in ort.get_available_providers() else "not in the installed onnxruntime"


def nvidia_driver() -> ctypes.CDLL | None:
    """The driver's library, where there is one."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def loader_error(name: str) -> str:
    """What the dynamic loader says about a provider's library, such as which part of CUDA is missing."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"))
    except OSError as error:
        return f" ({error})"
    return ""


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its stack trace."""
    return str(error).partition("\n")[0][:500]


def usable_cores() -> int:
    """Cores this process may run on, at most OMP_NUM_THREADS; ONNX Runtime itself would take the whole machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(asked))) if asked.isdecimal() else cores


# ------------------------------------------------------------------------------------------------ command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = slices.OneLineParser(__doc__)
    option = parser.add_argument
    option("maps", type=Path, help="a folder of label maps, 'DIR/*_seg.png', or one: palette or RGB PNG, or NIfTI")
    option("--side", choices=slices.SIDES, help="only that side of a dataset's split")
    option("--model", type=Path, help="what export.py wrote (default: generator.onnx, else the one shipped)")
    option("--out", type=Path, default=Path("synthetic"), help="folder to write to")
    option("--format", choices=("png16", "png8", "nnunet"), help="of what is made (default: png16)")
    option("--complement", type=Path, metavar="IMAGES", help="their real slices or CTs, given alike, to paste into")
    option("--paste", choices=("lung", "lesions"), help="what of the real slice is replaced (default: lung)")
    help_ = "maps whose lesions each variant gets, in place of augmentation; without MAPS those in models/lesions"
    option("--lesions", type=Path, nargs="?", const=LESIONS, metavar="MAPS", help=help_)
    option("--variants", type=int, default=0, metavar="K", help="make K augmentations of each map instead of it")
    option("--draws", type=int, default=0, metavar="K", help="make K slices of each map, or of each variant")
    option("--density", type=float, metavar="HU", help="mean of healthy lung; see above what it is without")
    option("--detail", type=float, metavar="HU", help="deviation in healthy lung of what is finer than 3 pixels")
    option("--seed", type=int, default=0, help="seed of variants, draws and texture")
    option("--unchecked", action="store_true", help="accept real slices and CTs that do not look like their map's")
    option("--panel", action="store_true", help="write pictures of map, synthesis and completion")
    option("--batch", type=int, metavar="N", help="slices at a time; by default 8 on NVIDIA GPUs, else 1")
    option("--provider", choices=("auto", *PROVIDERS), default="auto", help="what the model runs on")
    option("--threads", type=int, metavar="N", help="threads on the CPU; by default OMP_NUM_THREADS, or one a core")
    option("--shard", default="1/1", metavar="I/N", help="make the I-th of N equal parts, I = 1..N")
    option("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args(argv)
    most = max(16, os.cpu_count() or 1)  # threads: ONNX Runtime waits for ever where the system refuses it one
    slices.check_ranges(args, variants=(0, 9999), draws=(0, 9999), density=(-1000, -400), detail=(0, 500))
    slices.check_ranges(args, seed=(0, 2**63), batch=(1, 9999), threads=(1, most))
    part, _, parts = args.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise Mistake(f"--shard {args.shard}: give I/N with I from 1 to N, like 1/4")
    args.part, args.parts = int(part), int(parts)
    if args.paste and not (args.complement and (args.lesions or args.paste == "lung")):
        raise Mistake(f"--paste {args.paste}: needs --complement, and for lesions --lesions: give it, or leave it out")
    args.variants = args.variants or int(bool(args.lesions))  # new names: real slice and new one may share a folder
    return args


def check_steering(args: argparse.Namespace, steers: list[str], model: Path) -> None:
    """Raise Mistake for options that the model has no inputs for."""
    wanted = {name: name in steers or getattr(args, name) is None for name in ("density", "detail")}
    wanted["draws"] = not args.draws or "seed" in steers or ("density" in steers and not args.complement)
    if refused := [f"--{name}" for name, can in wanted.items() if not can]:
        mend = "leave it out, or train with --steer (density, detail) and --draws (another slice of a map)"
        raise Mistake(f"{' '.join(refused)}: {model} has no input for it: {mend}")


def claim(args: argparse.Namespace, info: dict[str, Any], folders: Iterable[Path], donors: Sequence[Path]) -> None:
    """Make OUT's folders and its run.json. Raises Mistake where it holds slices of another model or other settings."""
    made_with = {
        "checkpoint_sha256": info["checkpoint_sha256"],
        "precision": info["precision"],
        "format": args.format,
        "completed": bool(args.complement),
        "lesions": lesions.digest_of(donors) if donors else None,
        "paste": args.paste if args.paste == "lesions" else None,
        "seed": args.seed if args.variants or args.draws or "seed" in info["steers"] else None,
        "draws": bool(args.draws) or None,  # None, as what older runs do not tell
        "density": args.density,
        "detail": args.detail,
    }
    record = args.out / "run.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    made = [path for kind in ("images", "imagesTr", "volumes") for path in (args.out / kind).glob("[!.]*")]
    if made and made_with != {key: known.get(key) for key in made_with}:
        raise Mistake(f"{args.out}: its slices were made otherwise (see run.json): give another --out")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(record, made_with, args.part)


def write_json(path: Path, told: dict[str, Any], part: int) -> None:
    """Write a file whole, under a name of the shard's own at first: all shards may start, or end, at once."""
    unfinished = path.with_name(f".{path.name}.{part}.tmp")
    unfinished.write_text(json.dumps(told, indent=1) + "\n")
    unfinished.replace(path)


def main(argv: list[str]) -> int:
    """Do what the command line says. Returns the exit status: 2 where maps were left out as faulty. Raises Mistake."""
    args = parse(argv)
    maps = find_maps(args.maps, args.side)
    reals = find_reals(args.complement, maps) if args.complement else None
    what = "volumes" if is_volume(next(iter(maps.values()))) else "slices"
    augmented = args.variants and not args.lesions
    if what == "volumes" and (args.format not in (None, "nnunet") or augmented or args.panel):
        raise Mistake(f"{args.maps}: of volumes: PNG, augmentation and --panel go with PNG maps: leave them out")
    args.format = args.format or ("volume" if what == "volumes" else "png16")
    of = args.lesions and (args.lesions.parent if args.lesions.name == "maps" else args.lesions) / "split.json"
    donors = [*find_maps(args.lesions, "train" if of.exists() else None).values()] if args.lesions else []
    jobs = plan(maps, args.variants, args.draws)
    folders = {path.parent for path in targets(jobs[0], args)}
    inputs = {path.parent.resolve() for path in (*maps.values(), *(reals or {}).values(), *donors)}
    given = {path.resolve() for path in (args.maps, args.complement, args.lesions) if path}
    if args.out.resolve() in given or inputs & {folder.resolve() for folder in folders}:
        raise Mistake(f"{args.out}: the input stands in it: give another --out")

    model = find_model(args.model)
    session, info = open_session(model, args.provider, args.threads)
    check_steering(args, info["steers"], model)
    n = args.batch or (CUDA_BATCH if session.get_providers()[0] == CUDA else 1)
    generator = Generator(session, info)

    noted: dict[str, dict[Path, str]] = {}  # of a kind of remark: map -> line

    def reader(job: Job) -> Case | str | None:
        try:
            case = load(job, len(info["labels"]), reals, args.seed, args.unchecked, donors)
            case = case and tell(case, info, args)
        except Mistake as mistake:
            return str(mistake)
        for path in targets(job, args) if case is None else ():  # of a map that had lung before
            path.unlink(missing_ok=True)
        for kind, line in remarks(case, info) if case else ():
            noted.setdefault(kind, {})[job.path] = line
        return case

    mine = jobs[args.part - 1 :: args.parts]
    todo = [job for job in mine if not is_made(targets(job, args), (job.path, (reals or {}).get(job.source)))]
    print(f"{len(jobs)} {what}: {len(mine) - len(todo)} finished, {len(todo)} to make, {n} slices at a time")
    if args.dry_run:
        print(f"provider options: {session.get_provider_options()[session.get_providers()[0]]}")
        return 0
    with slices.held(args.out, f".{args.part}-of-{args.parts}.lock"):
        claim(args, info, folders, donors)
        written, without, faults = run(todo, generator, n, reader, partial(write, args=args, info=info))
        complete(jobs, args, info["labels"])
    lacking = "lung, or room for lesions," if donors else "lung"
    if without == len(jobs):
        raise Mistake(f"{args.maps}: no {lacking} in any of the {len(jobs)} {what}: give maps with labels above 0")
    print(f"{written} {what} written to {args.out}")
    for _, lines in sorted(noted.items()):
        print(f"note: {min(lines)}: {lines[min(lines)]} (maps like this: {len(lines)})", file=sys.stderr)
    if without:
        print(f"note: {without} {what} without {lacking} are left out", file=sys.stderr)
    if faults:
        print(f"left out as faulty: {len(faults)}, see the errors above", file=sys.stderr)
    return 2 if faults else 0


if __name__ == "__main__":
    slices.exit_on_mistake(main, "stopped: the same command goes on from here", (ModuleNotFoundError,))  # nibabel, say
