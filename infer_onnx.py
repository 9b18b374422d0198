"""Label maps of chest-CT slices to CT slices, with an exported generator and ONNX Runtime; no torch.

    python infer_onnx.py maps/                                         # synthetic lungs, 16-bit PNG of HU + 1024
    python infer_onnx.py maps/ --complement images/ --panel            # pasted into the real slices, bit for bit
    python infer_onnx.py maps/ --variants 40 --seed 1 --out augmented  # 40 augmented maps of each, and their slices
    python infer_onnx.py data/phantom --side test                      # a dataset's held-out maps
    python infer_onnx.py maps/ --shard 3/8                             # the third of eight machines
    python infer_onnx.py maps/ --provider openvino --precision bf16    # on CPUs that compute in bfloat16
    python infer_onnx.py maps/ --provider cuda --cuda-graph --dry-run  # what would be done, and with which options

    OUT/images/P03_S041.png   the slice; with --format png8 through the model's window, or .npy, .nii.gz of HU
    OUT/maps/P03_S041.png     the map it was made from: OUT with png16 is a dataset as covidgan.py --data reads it
    OUT/panels/P03_S041.png   --panel: map, synthesis and, with --complement, completion side by side
    OUT/run.json              what OUT was made with: another model or format needs another OUT

Variants are named P03_S041v01, ...: what stands before the last "_" is still the patient. With --complement, the real
slice is resampled (bilinear) by the same crop, rotation and elastic displacement as the map before the lung goes in.
The same command goes on with a stopped run: finished files are skipped. HU below -1024, which the format cannot hold,
are written as -1024; so is everything outside a lung that is not pasted. Research only, not for diagnosis.
"""

import argparse
import contextlib
import ctypes
import gzip
import importlib.util
import io
import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from PIL import Image
from tqdm import tqdm

from data.slices import (
    COLOURS,
    HU_OFFSET,
    PNG_ERRORS,
    Mistake,
    OneLineParser,
    coloured,
    exit_on_mistake,
    png,
    read_image,
    read_map,
    windowed,
    write_bytes,
    write_map,
)

PROVIDERS = {  # ONNX Runtime's names; "auto" tries them in this order
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
NVIDIA, NVIDIA_BATCH = ("tensorrt", "cuda"), 8  # on a CPU batches gain nothing
CACHE = str(Path.home() / ".cache" / "covidgan")  # engines fit one GPU, driver and TensorRT: never copy them
ORT_ERRORS = tuple(e for e in vars(ort_state).values() if isinstance(e, type) and issubclass(e, Exception))

# the contract with export.py
CONTRACT = "1"
TENSORS = {"input map": "tensor(uint8)", "output ct": "tensor(int16)", "output alpha": "tensor(float)"}
PARSED = ("labels", "colours", "level", "width", "size", "multiple")  # metadata that is JSON
METADATA = ("contract", *PARSED, "precision", "checkpoint_sha256", "licence")

# the augmentation of covidgan.Config; lengths in pixels of a 512-pixel slice
RESIZE, ROTATE, ELASTIC, ELASTIC_CELL = 1.117, 10.0, 2.0, 24.0

ENDINGS = {"png16": ".png", "png8": ".png", "nifti": ".nii.gz", "npy": ".npy"}

Shape = tuple[int, int, int]  # N, H, W of a batch


# ------------------------------------------------------------------------------------------------ model and provider


def open_session(
    model: Path,
    provider: str = "auto",
    threads: int | None = None,
    kind: str = "generator",
    shapes: Sequence[Shape] = (),
    precision: str = "model",
    graphs: bool = False,
    quiet: bool = False,
) -> tuple[ort.InferenceSession, dict[str, Any]]:
    """Open a model on a provider, say on stderr which it is, and return the session and the model's metadata.

    provider: a key of PROVIDERS, or "auto" for the first that really loads, TensorRT aside.
    threads: on the CPU; by default one for each core that this process may use.
    kind: what the metadata must call the model; a "generator" is held to the whole contract, and labels, colours,
    level and width (HU), size and multiple (pixels) of its metadata come parsed.
    shapes: the batches to come, for TensorRT.
    precision, graphs: see provider_options.
    quiet: say nothing, for a graph that the caller built and no user knows of.
    Raises Mistake for a missing, broken or foreign file, and for a provider, asked for by name, that does not load.
    """
    if not model.is_file():
        raise Mistake(f"{model}: no such file: python export.py CKPT writes it, or name another by --model")
    threads = threads or usable_cores()
    try:
        session = start(model, "cpu", {}, threads)  # reads and checks the file before anything is compiled for it
    except ORT_ERRORS as error:
        raise Mistake(f"{model}: not a usable ONNX file ({first_line(error)}): export it again") from error
    info = check_model(session, model, kind)
    reasons: dict[str, list[str]] = {}  # why not, and which providers
    for name in PROVIDERS if provider == "auto" else [provider]:
        reason = obstacle(name)
        if not reason and provider == "auto" and name == "tensorrt":
            reason = "on request only, it builds an engine for minutes"
        if not reason and name != "cpu":
            try:
                session = start(model, name, provider_options(name, info, shapes, precision, graphs), threads)
                if session.get_providers()[0] != PROVIDERS[name]:  # trap: ONNX Runtime falls back without a word
                    reason = f"did not load{loader_error(name)}"
            except ORT_ERRORS as error:
                reason = f"did not start ({first_line(error)})"
        if not reason:
            cpu = f", threads: {threads}" if name == "cpu" else ""
            better = "".join(f"; not {', '.join(names)}: {why}" for why, names in reasons.items())
            if not quiet:
                print(f"{model} runs on {name}{cpu}{better}", file=sys.stderr)
            return session, info
        reasons.setdefault(reason, []).append(name)
    raise Mistake(f"--provider {provider}: {reason}: --provider auto takes the best there is")


def start(model: Path, name: str, options: dict[str, str], threads: int) -> ort.InferenceSession:
    """A session that tries a provider first; may raise ORT_ERRORS, may silently be on the CPU."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.enable_mem_pattern = name != "dml"  # DirectML refuses it
    chain: list[Any] = [(PROVIDERS[name], options)]
    if name == "openvino" and (devices := openvino_devices()):  # a plugin is not known by name, but by its devices
        settings.add_provider_for_devices(devices, options)
        chain = []
    elif name == "tensorrt":  # it has no int16: the last node is CUDA's
        chain.append((PROVIDERS["cuda"], provider_options("cuda", {})))
    if chain and name != "cpu":
        chain.append(PROVIDERS["cpu"])
    ort.set_default_logger_severity(4)  # what does not load is told in one line, ours
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # trap: some of their errors are plain prints
            if name in NVIDIA:
                Path(CACHE).mkdir(parents=True, exist_ok=True)
                ort.preload_dlls()  # CUDA out of NVIDIA's Python packages
            return ort.InferenceSession(model, settings, providers=chain)
    finally:
        ort.set_default_logger_severity(2)


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its stack."""
    return str(error).partition("\n")[0]


def check_model(session: ort.InferenceSession, model: Path, kind: str) -> dict[str, Any]:
    """Metadata of a model of this kind, with "fixed", its input's N, H, W, None where free. Raises Mistake by lack."""
    info: dict[str, Any] = dict(session.get_modelmeta().custom_metadata_map)
    if info.get("kind", kind) != kind:
        raise Mistake(f"{model}: is a {info['kind']}, not a {kind}: give the other file")
    lacks = ["metadata kind"] if "kind" not in info else []
    if kind == "generator":
        tensors = {f"input {value.name}": value.type for value in session.get_inputs()}
        tensors |= {f"output {value.name}": value.type for value in session.get_outputs()}
        lacks += [f"metadata {key}" for key in METADATA if key not in info]
        lacks += [f"{name}, {type_}" for name, type_ in TENSORS.items() if tensors.get(name) != type_]
    if lacks:
        raise Mistake(f"{model}: not a {kind} that export.py wrote: it lacks {'; '.join(lacks)}")
    if kind != "generator":
        return info
    if info["contract"] != CONTRACT:
        raise Mistake(f"{model}: contract {info['contract']}, this file speaks {CONTRACT}: export it again")
    try:
        info |= {key: json.loads(info[key]) for key in PARSED}
    except ValueError as error:
        raise Mistake(f"{model}: unreadable metadata ({error}): export it again") from error
    if info["colours"] != [list(colour) for colour in COLOURS[: len(info["labels"])]]:
        raise Mistake(f"{model}: colours {info['colours']} are not those of the maps, {COLOURS}: export it again")
    fixed = [side if isinstance(side, int) else None for side in session.get_inputs()[0].shape]
    return info | {"fixed": fixed}


def provider_options(
    name: str, info: dict[str, Any], shapes: Sequence[Shape] = (), precision: str = "model", graphs: bool = False
) -> dict[str, str]:
    """Options of a provider for a model's metadata and the batches to come.

    precision: "bf16" lets OpenVINO compute in bfloat16, with "model" it computes in fp32.
    graphs: capture CUDA graphs, see DeviceBinding; CUDA alone.
    Written after the providers' documents. OpenVINO was run, on a CPU without bfloat16; no GPU or CoreML was at hand.
    """
    half = str(int(info.get("precision") == "float16"))
    if name == "cuda":  # an exhaustive search would start anew for every size; tf32 would cost three digits
        options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "prefer_nhwc": half}
        return options | ({"enable_cuda_graph": "1"} if graphs else {})
    if name == "tensorrt":
        options = {"trt_fp16_enable": half, "trt_engine_cache_enable": "1", "trt_engine_cache_path": CACHE}
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": CACHE}
        if shapes and not any(info["fixed"]):
            shapes = [(n, *canvas(height, width, info)) for n, height, width in shapes]
            axes = list(zip(*shapes, strict=True))
            profile = {"min": map(min, axes), "opt": Counter(shapes).most_common(1)[0][0], "max": map(max, axes)}
            options |= {f"trt_profile_{k}_shapes": f"map:{'x'.join(map(str, v))}" for k, v in profile.items()}
        return options
    if name == "openvino":  # trap: a CPU without bfloat16 computes in fp32 whatever is asked, and says nothing
        cpu = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "CACHE_DIR": CACHE}
        # traps: "AUTO:GPU,CPU" does not start where there is no GPU, and "AUTO" passes over load_config
        return {"device_type": "CPU", "load_config": json.dumps({"CPU": cpu})}
    if name == "coreml":
        return {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"}
    return {}


def obstacle(name: str) -> str:
    """Why a provider cannot load here; empty where it may."""
    if name in NVIDIA and not nvidia_driver():
        return "no NVIDIA driver here"
    if name == "openvino" and openvino_plugin():
        try:
            return "" if openvino_devices() else "onnxruntime-ep-openvino takes no CPU but Intel's"
        except ORT_ERRORS as error:
            return f"onnxruntime-ep-openvino does not load ({first_line(error)})"
    return "" if PROVIDERS[name] in ort.get_available_providers() else "not in the installed onnxruntime"


@cache
def openvino_plugin() -> bool:
    """Whether OpenVINO comes as the package onnxruntime-ep-openvino, and not within onnxruntime.

    Cached: once registered, the plugin too is among the available providers.
    """
    built_in = PROVIDERS["openvino"] in ort.get_available_providers()
    return not built_in and importlib.util.find_spec("onnxruntime_ep_openvino") is not None


@cache
def openvino_devices() -> list[Any]:
    """The CPU as OpenVINO's plugin offers it; none without the plugin, or where the CPU is not Intel's.

    Raises ORT_ERRORS where the plugin does not load. Cached: a process may register a library only once.
    """
    if not openvino_plugin():
        return []
    import onnxruntime_ep_openvino  # wanted here alone

    ort.register_execution_provider_library("openvino", onnxruntime_ep_openvino.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDERS["openvino"]]
    return [device for device in found if device.ep_metadata.get("ov_device") == "CPU"]


def nvidia_driver() -> ctypes.CDLL | None:
    """The driver's library, where there is one."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def loader_error(name: str) -> str:
    """The dynamic loader's words on a provider's library, such as which part of CUDA is missing."""
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    try:
        if library.exists():
            ctypes.CDLL(str(library))
    except OSError as error:
        return f" ({error})"
    return ""


def usable_cores() -> int:
    """Cores this process may run on; ONNX Runtime itself would count the whole machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def canvas(height: int, width: int, info: dict[str, Any]) -> tuple[int, int]:
    """Height and width that the model takes a map in. Raises Mistake where it is of fixed size and the map larger.

    Two multiples at least: layers deep inside reflect at the border, and a single pixel has no neighbour to reflect.
    """
    sides = []
    for side, fixed in zip((height, width), info["fixed"][1:], strict=True):
        sides.append(fixed or max(2, math.ceil(side / info["multiple"])) * info["multiple"])
        if side > sides[-1]:
            raise Mistake(f"{height} x {width} pixels are more than the model's fixed {info['fixed'][1:]}: shrink it")
    return sides[0], sides[1]


class HostBinding:
    """The model for one shape, bound to arrays of this computer, page-locked for the copies to and from a card."""

    def __init__(self, session: ort.InferenceSession, shape: Shape, lock: bool) -> None:
        self.session, self.binding = session, session.io_binding()
        self.maps, self.ct = np.zeros(shape, np.uint8), np.zeros(shape, np.int16)
        if lock and (driver := nvidia_driver()):
            for array in (self.maps, self.ct):  # 1: for all contexts; a refusal costs speed, no more
                driver.cuMemHostRegister_v2(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), 1)
        self.binding.bind_output("ct", "cpu", 0, np.int16, shape, self.ct.ctypes.data)

    def run(self, maps: np.ndarray) -> np.ndarray:
        """Labels uint8 [N, H, W] of the shape to HU int16 [N, H, W], overwritten by the next run."""
        self.maps[:] = maps
        self.binding.bind_cpu_input("map", self.maps)  # every time: this is what copies to a card
        self.session.run_with_iobinding(self.binding)
        return self.ct


class DeviceBinding:
    """The model for one shape, bound to memory of the device at fixed addresses, as a CUDA graph wants it.

    The first run captures the graph under the shape's own number, later ones replay it: one launch instead of hundreds.
    Run here on a CPU alone, where the same memory is the computer's and there is nothing to capture.
    """

    def __init__(self, session: ort.InferenceSession, shape: Shape, device: str, number: int) -> None:
        self.session, self.binding, self.options = session, session.io_binding(), ort.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", str(number))
        self.maps = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.uint8), device, 0)
        self.ct = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.int16, device, 0)
        self.binding.bind_ortvalue_input("map", self.maps)
        self.binding.bind_ortvalue_output("ct", self.ct)

    def run(self, maps: np.ndarray) -> np.ndarray:
        """Labels uint8 [N, H, W] of the shape to HU int16 [N, H, W], overwritten by the next run."""
        self.maps.update_inplace(maps)
        self.session.run_with_iobinding(self.binding, self.options)
        return self.ct.numpy()


class Generator:
    """The model as a function of maps of any size: uint8 [N, H, W], labels -> int16 [N, H, W], HU.

    graph_batch: capture CUDA graphs, for batches filled up to this many maps, so that each size has a single shape.
    """

    def __init__(self, session: ort.InferenceSession, info: dict[str, Any], graph_batch: int | None = None) -> None:
        self.session, self.info, self.graph_batch = session, info, graph_batch
        self.on_nvidia = session.get_providers()[0] in [PROVIDERS[name] for name in NVIDIA]
        self.bound: dict[Shape, HostBinding | DeviceBinding] = {}

    def __call__(self, maps: np.ndarray) -> np.ndarray:
        """Pad with background on the right and at the bottom, synthesize, crop.

        Raises Mistake where ONNX Runtime fails, or the maps are larger than a model of fixed size.
        """
        n, height, width = maps.shape
        shape = (self.info["fixed"][0] or self.graph_batch or n, *canvas(height, width, self.info))
        padded = np.zeros(shape, np.uint8)
        padded[:n, :height, :width] = maps
        try:
            if shape not in self.bound:
                self.bound[shape] = self.bind(shape)
            ct = self.bound[shape].run(padded)
        except ORT_ERRORS as error:
            raise Mistake(f"{first_line(error)}: is there memory for {shape}? try a smaller --batch") from error
        return ct[:n, :height, :width].copy()  # the next batch goes to the same place

    def bind(self, shape: Shape) -> HostBinding | DeviceBinding:
        """A binding for one shape."""
        if self.graph_batch:
            return DeviceBinding(self.session, shape, "cuda" if self.on_nvidia else "cpu", len(self.bound) + 1)
        return HostBinding(self.session, shape, lock=self.on_nvidia)


# ------------------------------------------------------------------------------------------------ maps in


class Job(NamedTuple):
    """A slice to make: its name, its map's file, the map's H, W, and the variant from 1 on, 0 for the map as it is."""

    name: str
    path: Path
    size: tuple[int, int]
    variant: int


class Slice(NamedTuple):
    """A slice in the making: labels uint8 [H, W], and the real slice int16 [H, W] in HU for --complement."""

    job: Job
    labels: np.ndarray
    real: np.ndarray | None


def find_maps(folder: Path, side: str | None = None) -> list[Path]:
    """The PNGs of a folder or of a dataset's maps/, or the one PNG given; of one side of its split.json if named.

    Raises Mistake where there is none.
    """
    if folder == Path("maps") and not folder.exists() and Path("data/phantom/maps").exists():
        folder = Path("data/phantom/maps")
        print(f"maps is not there: taking {folder}", file=sys.stderr)
    if not folder.exists():
        raise Mistake(f"{folder}: not there: give a folder of label maps")
    folder = folder / "maps" if (folder / "maps").is_dir() else folder
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".png") if folder.is_dir() else [folder]
    if not paths:
        raise Mistake(f"{folder}: no PNG in it: give the folder that holds the label maps themselves")
    if side is None:
        return paths
    split = folder.parent / "split.json"
    try:
        names = set(json.loads(split.read_text())[side])
    except (OSError, ValueError, KeyError) as error:
        raise Mistake(f"{split}: no list of names under {side} ({error!r}): leave out --side") from error
    return [path for path in paths if path.stem in names]


def plan(paths: list[Path], variants: int) -> tuple[list[Job], list[str]]:
    """The slices to make from maps, and a line on each map whose slice would have another's name."""
    jobs, problems, owners = [], [], {}
    for path in paths:
        owner = owners.setdefault(path.stem.lower(), path)  # lower: on many disks a.png and A.png are one file
        if owner is not path:
            problems.append(f"{path}: its slice would have the name of {owner}'s: rename one")
            continue
        try:
            with Image.open(path) as picture:  # reads the header alone
                size = picture.height, picture.width
        except PNG_ERRORS:
            size = 0, 0  # load will tell why
        for k in range(1, variants + 1) if variants else [0]:
            jobs.append(Job(f"{path.stem}v{k:02d}" if k else path.stem, path, size, k))
    return jobs, problems


def in_batches(jobs: list[Job], n: int) -> list[list[Job]]:
    """Jobs of equal size together, n at a time."""
    groups = [list(group) for _, group in groupby(sorted(jobs, key=lambda job: job.size), lambda job: job.size)]
    return [group[i : i + n] for group in groups for i in range(0, len(group), n)]


def batch_shapes(batches: list[list[Job]], graph_batch: int | None, info: dict[str, Any]) -> list[str]:
    """The shapes NxHxW that the model would get, each once; without those of maps too large for a fixed size."""
    shapes = set()
    for batch in (batch for batch in batches if all(batch[0].size)):  # 0, 0: a file that cannot be read
        with contextlib.suppress(Mistake):  # a run leaves these maps out, and says so
            shapes.add((info["fixed"][0] or graph_batch or len(batch), *canvas(*batch[0].size, info)))
    return ["x".join(map(str, shape)) for shape in sorted(shapes)]


def load(job: Job, n_labels: int, images: Path | None, seed: int) -> Slice:
    """Read the map of a job, and the real slice where `images` is given; augment both for a variant.

    Raises Mistake for a bad map, one without lung, and an image that is missing, bad or of another size.
    """
    labels, real = read_map(job.path), None
    if labels.max() >= n_labels:
        raise Mistake(f"{job.path}: label {labels.max()}: the model's labels are 0..{n_labels - 1}")
    if not labels.any():
        raise Mistake(f"{job.path}: no lung in it: leave it out")
    if images:
        path = images / f"{job.path.stem}.png"
        if not path.exists():
            raise Mistake(f"{path}: missing: --complement needs the real slice of every map")
        real = read_image(path)
        if real.shape != labels.shape:
            raise Mistake(f"{path}: {real.shape} pixels, but its map has {labels.shape}: bring both to one size")
    if job.variant:
        rng = np.random.default_rng([seed, job.variant, *job.path.stem.encode()])  # in whichever batch or shard it is
        rows, columns = augmentation(*labels.shape, rng)
        labels = sample_nearest(labels, rows, columns)
        real = None if real is None else sample_bilinear(real, rows, columns)
        if not labels.any():
            raise Mistake(f"{job.path}: variant {job.variant} crops its lung away: leave it out")
    return Slice(job, labels, real)


def load_batch(batch: list[Job], reader: Callable[[Job], Slice]) -> tuple[list[Slice], list[str]]:
    """Read what can be read of a batch; returns the slices, and a line on each that could not be."""
    slices, problems = [], []
    for job in batch:
        try:
            slices.append(reader(job))
        except Mistake as mistake:
            problems.append(str(mistake))
    return slices, problems


def augmentation(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random resize and crop, rotation and elastic displacement, as in training (Table I).

    Returns the row and the column, both float [H, W] in pixels, that each pixel is taken from.
    """
    zoom, angle = rng.uniform(1, RESIZE), math.radians(rng.uniform(-ROTATE, ROTATE))
    shift_y, shift_x = rng.uniform(-1, 1, 2) * (1 - 1 / zoom) / 2  # of the side: how far a crop can move
    cells = math.ceil(512 / ELASTIC_CELL)
    coarse = rng.normal(0, ELASTIC / 512, (2, cells, cells)).astype(np.float32)  # of the side
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


def sample_bilinear(hu: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """HU int16 [H, W] taken from rows and columns, the border's value beyond the border."""
    framed = np.pad(hu.astype(np.float32), ((0, 1), (0, 1)), mode="edge")
    rows, columns = rows.clip(0, hu.shape[0] - 1), columns.clip(0, hu.shape[1] - 1)
    y, x = rows.astype(int), columns.astype(int)
    v, u = rows - y, columns - x
    above = framed[y, x] * (1 - u) + framed[y, x + 1] * u
    below = framed[y + 1, x] * (1 - u) + framed[y + 1, x + 1] * u
    return np.rint(above * (1 - v) + below * v).astype(np.int16)


# ------------------------------------------------------------------------------------------------ slices out


def encode(hu: np.ndarray, form: str, info: dict[str, Any]) -> bytes:
    """HU int16 [H, W] as a file of a format.

    NIfTI is a volume [W, H, 1] in LPS axes: columns go to the patient's left, rows to the back, as data/prepare.py
    reads it; a pixel counts as 1 mm, since a PNG does not tell.
    """
    if form == "png16":
        return png((hu + HU_OFFSET).astype(np.uint16))
    if form == "png8":
        return png(windowed(hu, info["level"], info["width"]))
    if form == "nifti":
        import nibabel  # wanted here alone

        return gzip.compress(nibabel.Nifti1Image(hu.T[..., None], np.diag([-1.0, -1.0, 1.0, 1.0])).to_bytes(), 1)
    buffer = io.BytesIO()
    np.save(buffer, hu)
    return buffer.getvalue()


def targets(job: Job, args: argparse.Namespace) -> list[Path]:
    """The files of one slice: map, image and, if wanted, panel."""
    files = [args.out / "maps" / f"{job.name}.png", args.out / "images" / f"{job.name}{ENDINGS[args.format]}"]
    return [*files, args.out / "panels" / f"{job.name}.png"] if args.panel else files


def write(made: tuple[list[Slice], np.ndarray], args: argparse.Namespace, info: dict[str, Any]) -> int:
    """Write slices with their synthetic lungs, HU int16 [N, H, W]; returns their number."""
    slices, lungs = made
    for (job, labels, real), lung in zip(slices, lungs.clip(-HU_OFFSET, 4095 - HU_OFFSET), strict=True):
        completed = lung if real is None else np.where(labels > 0, lung, real)
        map_path, image_path, *panel_path = targets(job, args)
        write_map(map_path, labels)
        for path in panel_path:
            greys = [windowed(hu, info["level"], info["width"]) for hu in (lung, completed)]
            tiles = [coloured(labels), *(np.repeat(grey[..., None], 3, 2) for grey in greys)]
            write_bytes(path, png(np.concatenate(tiles if args.complement else tiles[:2], 1)))
        write_bytes(image_path, encode(completed, args.format, info))
    return len(slices)


def claim(args: argparse.Namespace, info: dict[str, Any]) -> None:
    """Make OUT. Raises Mistake where it is the input's own folder, or holds slices that were made otherwise."""
    inputs = [args.maps if args.maps.is_dir() else args.maps.parent, args.complement]
    if {folder.resolve() for folder in inputs if folder} & {(args.out / kind).resolve() for kind in ("maps", "images")}:
        raise Mistake(f"{args.out}: the input stands in it: give another --out")
    made_with = {"checkpoint_sha256": info["checkpoint_sha256"], "precision": info["precision"], "format": args.format}
    made_with |= {"completed": bool(args.complement), "seed": args.seed if args.variants else None}
    record = args.out / "run.json"
    text = json.dumps(made_with, indent=1) + "\n"
    if record.exists() and record.read_text() != text:
        raise Mistake(f"{args.out}: its slices were made otherwise (see run.json): give another --out")
    for kind in ("images", "maps", *["panels"] * args.panel):
        (args.out / kind).mkdir(parents=True, exist_ok=True)
    write_bytes(record, text.encode())


# ------------------------------------------------------------------------------------------------ run


def ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """map() by a pool that is at most `depth` items ahead of whoever takes the results."""
    under_way: deque[Future] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def run(
    batches: list[list[Job]], generator: Generator, reader: Callable[[Job], Slice], writer: Callable[[Any], int]
) -> tuple[int, list[str]]:
    """Make the slices, reading and writing in other threads while the model runs in this one.

    Returns the number of slices written and a line on each map that was left out.
    """
    problems: list[str] = []
    bar = tqdm(total=sum(map(len, batches)), unit=" slices")

    def synthesized(loaded: Iterable[tuple[list[Slice], list[str]]]) -> Iterator[tuple[list[Slice], np.ndarray]]:
        for slices, lines in loaded:
            try:
                if slices:
                    yield slices, generator(np.stack([one.labels for one in slices]))
            except Mistake as mistake:
                lines += [f"{one.job.path}: {mistake}" for one in slices]
            for line in lines:
                if line not in problems:  # the variants of a map share its line
                    problems.append(line)
                    bar.write(f"error: {line}", file=sys.stderr)

    workers = min(8, max(2, usable_cores()))  # more would hold more in memory, and no model waits for eight
    with bar, ThreadPoolExecutor(workers) as pool:
        loaded = ahead(pool, partial(load_batch, reader=reader), batches, 2 * workers)
        for n in ahead(pool, writer, synthesized(loaded), 2 * workers):
            bar.update(n)
    return bar.n, problems


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = OneLineParser(__doc__)
    option = parser.add_argument
    option("maps", type=Path, help="folder of label maps, or one: palette PNG, or RGB in the paper's colours")
    option("--side", choices=("train", "test", "seg_test"), help="that side of a dataset's split alone")
    option("--model", type=Path, default=Path("generator.onnx"), help="what export.py wrote")
    option("--out", type=Path, default=Path("synthetic"), help="folder to write to")
    option("--format", choices=ENDINGS, default="png16", help="of the slices")
    option("--complement", type=Path, metavar="IMAGES", help="folder of the real slices to paste into")
    option("--variants", type=int, default=0, metavar="K", help="make K augmentations of each map, in its place")
    option("--seed", type=int, default=0, help="of the variants")
    option("--panel", action="store_true", help="write pictures of map, synthesis and completion")
    option("--batch", type=int, metavar="N", help="slices at a time; by default 8 on NVIDIA's cards, else 1")
    option("--provider", choices=("auto", *PROVIDERS), default="auto", help="what the model runs on")
    option("--precision", choices=("model", "bf16"), default="model", help="bf16: with --provider openvino")
    option("--cuda-graph", action="store_true", help="with --provider cuda: one launch a batch")
    option("--threads", type=int, metavar="N", help="of the model on the CPU")
    option("--shard", default="1/1", metavar="I/N", help="make the I-th of N equal parts, I = 1..N")
    option("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args(argv)
    for name, least in (("variants", 0), ("seed", 0), ("batch", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise Mistake(f"--{name} {value}: give {least} or more")
    part, _, parts = args.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise Mistake(f"--shard {args.shard}: give I/N with I from 1 to N, like 1/4")
    args.part, args.parts = int(part), int(parts)
    if args.complement and not args.complement.is_dir():
        raise Mistake(f"{args.complement}: not there: --complement wants the folder of the real slices")
    if args.precision == "bf16" and args.provider != "openvino":
        raise Mistake("--precision bf16: goes with --provider openvino alone")
    if args.cuda_graph and args.provider != "cuda":  # TensorRT captures whole models alone, and has no int16
        raise Mistake("--cuda-graph: goes with --provider cuda alone")
    if args.format == "nifti" and not importlib.util.find_spec("nibabel"):
        raise Mistake("--format nifti: nibabel is missing: pip install nibabel")
    return args


def main(argv: list[str]) -> int:
    """Do what the command line says. Returns the exit status: 2 where maps were left out."""
    args = parse(argv)
    paths = find_maps(args.maps, args.side)
    jobs, problems = plan(paths, args.variants)
    shapes = [(len(batch), *batch[0].size) for batch in in_batches(jobs, args.batch or NVIDIA_BATCH)]
    special = {"shapes": shapes, "precision": args.precision, "graphs": args.cuda_graph}
    try:
        session, info = open_session(args.model, args.provider, args.threads, **special)
    except Mistake as mistake:
        if not args.dry_run:
            raise
        session, info = open_session(args.model, "cpu", args.threads)  # which says again what is wrong with the file
        print(f"note: {mistake}", file=sys.stderr)
    side = info["size"]
    if any(job.size != (side, side) for job in jobs):
        print(f"note: not all maps are {side} x {side}, the size the model was trained at", file=sys.stderr)
    mine = jobs[args.part - 1 :: args.parts]
    todo = [job for job in mine if not all(path.exists() for path in targets(job, args))]
    name = next(k for k, v in PROVIDERS.items() if v == session.get_providers()[0])
    name = name if args.provider == "auto" else args.provider  # in a dry run it may not be here
    n = info["fixed"][0] or args.batch or (NVIDIA_BATCH if name in NVIDIA else 1)
    batches = in_batches(todo, n)
    finished = len(mine) - len(todo)
    print(f"{len(paths)} maps: {finished} slices finished, {len(todo)} to make in {len(batches)} batches of up to {n}")
    if args.dry_run:
        options = provider_options(name, info, **special)
        print(f"provider options: {options}\n{name}, CUDA graphs: {'yes' if args.cuda_graph else 'no'}")
        print(f"batch shapes: {', '.join(batch_shapes(batches, n if args.cuda_graph else None, info)) or 'none'}")
        return 0
    generator = Generator(session, info, n if args.cuda_graph else None)
    claim(args, info)
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    reader = partial(load, n_labels=len(info["labels"]), images=args.complement, seed=args.seed)
    written, bad = run(batches, generator, reader, partial(write, args=args, info=info))
    problems += bad
    print(f"{written} slices written to {args.out}")
    if problems:
        print("\n  ".join([f"{len(problems)} left out:", *problems]), file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    exit_on_mistake(main, stopped="stopped: the same command goes on from here")
