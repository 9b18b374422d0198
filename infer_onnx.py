"""Turn label maps of chest CT into CT slices and volumes, with an exported generator and ONNX Runtime; no torch.

    python infer_onnx.py maps/                                         # synthetic lungs, 16-bit PNG of HU + 1024
    python infer_onnx.py maps/ --complement images/ --panel            # pasted into the real slices, bit for bit
    python infer_onnx.py maps/ --variants 40 --seed 1 --out augmented  # 40 augmented maps of each, and their slices
    python infer_onnx.py labels.nii.gz                                 # a label volume: a CT volume on its grid
    python infer_onnx.py labels/ --complement ct/                      # folders of volumes, paired by name
    python infer_onnx.py data/phantom --side test                      # a dataset's held-out maps
    python infer_onnx.py maps/ --shard 3/8                             # the third of eight machines
    python infer_onnx.py maps/ --provider openvino --precision bf16    # on CPUs that compute in bfloat16
    python infer_onnx.py maps/ --provider cuda --cuda-graph --dry-run  # what would be done, and with which options

    OUT/images/P03_S041.png   the slice; with --format png8 through the model's window, or .npy, .nii.gz of HU
    OUT/maps/P03_S041.png     the map it was made from: OUT with png16 is a dataset as covidgan.py --data reads it
    OUT/panels/P03_S041.png   --panel: map, synthesis and, with --complement, completion side by side
    OUT/volumes/NAME.nii.gz   of a label volume NAME.nii or .nii.gz: HU int16 on its grid, in its storage order
    OUT/run.json              what OUT was made with: other folders, model or format need another OUT

Variants are named P03_S041v01, ...: what comes before the last "_" is still the patient. With --complement, the real
slice is resampled (bicubic) by the same crop, rotation and elastic displacement as the map before the lung goes in.
Label volumes, like maps, hold 0 background, 1 lung, 2 ground-glass opacity, 3 consolidation. They go through the model
slice by slice in radiological display, as data/prepare.py writes slices. With --complement the result lies on the CT's
grid, and every voxel outside the lung is the CT's own, to the HU; fractions of a HU are rounded, with a note. Maps and
volumes without lung are left out and counted; slices without lung within a volume are background, or the real slice.
The same command resumes a stopped run: finished files are skipped, unless a map or a real slice is newer. HU below
-1024, which the 16-bit format cannot hold, are written as -1024 in all. What is outside a lung and not pasted is the
window's floor, or -1024 where that is higher.
Without --model, generator.onnx is taken if it exists, else the trained models/covid-ct-256.onnx beside this file; where
there is no folder maps/, data/phantom/maps takes its place, else models/examples beside this file. Research only, not
for diagnosis.
"""

import argparse
import contextlib
import ctypes
import gzip
import hashlib
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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.runtime import ort, ort_state
from data.slices import (
    AIR_HU,
    COLOURS,
    HELD,
    HU_OFFSET,
    LABELS,
    LARGEST,
    NIFTI,
    SIDES,
    Mistake,
    OneLineParser,
    check_finished,
    check_hu,
    check_ranges,
    coloured,
    exit_on_mistake,
    held,
    list_pngs,
    no_lungs_mean,
    open_png,
    png,
    printable,
    read_image,
    read_map,
    read_split,
    turned,
    windowed,
    write_bytes,
    write_map,
)

if TYPE_CHECKING:  # data.volumes needs nibabel, which PNG does not
    from data.volumes import Volume

PROVIDERS = {  # ONNX Runtime's names; "auto" tries them in this order
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
NVIDIA, NVIDIA_BATCH = ("tensorrt", "cuda"), 8  # on a CPU batches gain nothing
CACHED = ("tensorrt", "openvino")  # these compile the model, and keep the result in cache_folder()
ORT_ERRORS = (
    *(e for e in vars(ort_state).values() if isinstance(e, type) and issubclass(e, Exception)),
    RuntimeError,  # from a node that runs out of memory
    MemoryError,
)
ELSEWHERE = b"location"  # the protobuf key that places tensors in other files, at any path
ORT_FORMAT = b"ORTM"  # marks a file that is not ONNX, and that ONNX Runtime checks less
TOO_OLD = ("IR version", "opset versions", "model file format version")  # ONNX Runtime's words on too new a file

# shipped with a clone, found from any working directory
SHIPPED = Path(__file__).parent / "models"
SHIPPED_MODEL, EXAMPLES = SHIPPED / "covid-ct-256.onnx", SHIPPED / "examples"

# the contract with export.py
CONTRACT = "1"
TENSORS = {"input map": "tensor(uint8)", "output ct": "tensor(int16)", "output alpha": "tensor(float)"}
PARSED = {  # metadata in JSON, and the check that each must pass
    "labels": lambda value: type(value) is list and {*map(type, value)} == {str} and len(value) <= len(COLOURS),
    "colours": lambda value: value in [[list(colour) for colour in COLOURS[:n]] for n in range(1, len(COLOURS) + 1)],
    "level": lambda value: type(value) in (int, float) and abs(value) < 2**15,
    "width": lambda value: type(value) in (int, float) and 0 < value < 2**16,
    "size": lambda value: type(value) is int and 1 <= value <= LARGEST,
    "multiple": lambda value: type(value) is int and 1 <= value <= LARGEST // 2,
}
LONGEST = 1000  # characters of an entry
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

    provider: a key of PROVIDERS, or "auto" for the first that really loads, except TensorRT.
    threads: on the CPU; by default one for each core that this process may use.
    kind: what the metadata must call the model; a "generator" must meet the whole contract, and labels, colours,
    level and width (HU), size and multiple (pixels) of its metadata are parsed.
    shapes: the batches to come, for TensorRT.
    precision, graphs: see provider_options.
    quiet: say nothing, for a graph that the caller built and no user knows about.
    Raises Mistake for a missing, broken or foreign file, and for a provider asked for by name that does not load.
    """
    if model.is_dir():
        raise Mistake(f"{model}: a folder: name the .onnx file in it")
    if not model.is_file():
        raise Mistake(f"{model}: no such file: python export.py writes it, or name another")
    check_file(model)
    threads = threads or usable_cores()
    try:
        on_cpu = start(model, "cpu", {}, threads)  # reads and checks the file before anything is compiled for it
        info = check_model(on_cpu, model, kind)
    except (*ORT_ERRORS, UnicodeDecodeError) as error:  # the last for names that are not text
        raise Mistake(f"{model}: {refusal(error)}") from error
    reasons: dict[str, list[str]] = {}  # why not -> which providers
    for name in PROVIDERS if provider == "auto" else [provider]:
        reason = obstacle(name)
        if not reason and provider == "auto" and name == "tensorrt":
            reason = "on request only, it builds an engine for minutes"
        session = on_cpu
        if not reason and name != "cpu":
            options = provider_options(name, info, shapes, precision, graphs)
            session, reason = try_provider(model, name, options, threads)
        if not reason:
            how = f", threads: {threads}" if name == "cpu" else ""
            how += ", compiled anew in every run: no cache can be made" if name in CACHED and not cache_folder() else ""
            better = "".join(f"; not {', '.join(names)}: {why}" for why, names in reasons.items())
            if not quiet:
                print(f"{model} runs on {name}{how}{better}", file=sys.stderr)
            return session, info
        reasons.setdefault(reason, []).append(name)
    raise Mistake(f"--provider {provider}: {reason}: --provider auto takes the best there is")


def try_provider(
    model: Path, name: str, options: dict[str, Any], threads: int
) -> tuple[ort.InferenceSession | None, str]:
    """A session on a provider, or None and why there is none: ONNX Runtime falls back to the CPU without a word."""
    try:
        session = start(model, name, options, threads)
    except (*ORT_ERRORS, OSError) as error:
        return None, f"did not start ({first_line(error)})"
    loaded = session.get_providers()[0] == PROVIDERS[name]
    return (session, "") if loaded else (None, f"did not load{loader_error(name)}")


def check_file(model: Path) -> None:
    """Raise Mistake for a model that is not one ONNX file: ONNX Runtime would read any file on disk that it names."""
    if (size := model.stat().st_size) >= 2**31:
        raise Mistake(f"{model}: {size:,} bytes: an ONNX file has less than 2 GiB: export it again")
    content = model.read_bytes()
    if content[4:8] == ORT_FORMAT or ELSEWHERE in content:
        raise Mistake(f"{model}: no ONNX file that has its tensors within: export it again")


def find_model(given: Path | None) -> Path:
    """The model given, else generator.onnx, else the one shipped with a clone."""
    own = Path("generator.onnx")
    if given or own.exists() or not SHIPPED_MODEL.exists():
        return given or own
    print(f"{own} is not there: taking {SHIPPED_MODEL}", file=sys.stderr)
    return SHIPPED_MODEL


def start(model: Path, name: str, options: dict[str, str], threads: int) -> ort.InferenceSession:
    """A session that tries a provider first; may raise ORT_ERRORS, may silently be on the CPU."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.enable_mem_pattern = name != "dml"  # DirectML refuses it
    chain: list[Any] = [(PROVIDERS[name], options)]
    if name == "openvino" and (devices := openvino_devices()):  # a plugin is addressed by its devices, not by name
        settings.add_provider_for_devices(devices, options)
        chain = []
    elif name == "tensorrt":  # it has no int16: the last node runs on CUDA
        chain.append((PROVIDERS["cuda"], provider_options("cuda", {})))
    if chain and name != "cpu":
        chain.append(PROVIDERS["cpu"])
    ort.set_default_logger_severity(4)  # what does not load is reported in one line of our own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # providers print some of their errors
            if name in CACHED and (folder := cache_folder()):
                Path(folder).mkdir(parents=True, exist_ok=True)
            if name in NVIDIA and hasattr(ort, "preload_dlls"):  # from 1.21 on
                ort.preload_dlls()  # CUDA from NVIDIA's Python packages
            return ort.InferenceSession(readable(model), settings, providers=chain)
    finally:
        ort.set_default_logger_severity(2)


def readable(model: Path) -> str | bytes:
    """A model as ONNX Runtime opens it: by its path in UTF-8, whatever the locale; where it has none, its content."""
    try:
        return os.fsencode(model).decode()  # a str, which it needs before 1.17
    except UnicodeDecodeError:
        return model.read_bytes()


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its stack trace, and printable: names from a file may hold anything."""
    return printable(str(error).partition("\n")[0][:500])


def refusal(error: Exception) -> str:
    """Why ONNX Runtime does not load a file, and the remedy."""
    if any(words in str(error) for words in TOO_OLD):
        mend = "pip install -U onnxruntime (export.py's files need 1.15 or newer)"
        return f"too new for onnxruntime {ort.__version__}: {mend}"
    if isinstance(error, MemoryError):
        return "not enough memory to load it: end other programs"
    return f"not a usable ONNX file ({first_line(error)}): export it again"


def cache_folder() -> str | None:
    """Where compiled engines are kept; each fits only one GPU, driver and TensorRT: never copy them. None: nowhere."""
    try:
        folder = Path.home() / ".cache" / "covidgan"
    except RuntimeError:  # a user without a home
        return None
    return str(folder) if writable(folder) else None


def writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def check_model(session: ort.InferenceSession, model: Path, kind: str) -> dict[str, Any]:
    """Metadata of a model of this kind, with "fixed": its input's N, H, W, None where free. Raises Mistake if not."""
    info: dict[str, Any] = dict(session.get_modelmeta().custom_metadata_map)
    for key, value in info.items():
        if not (key + value).isprintable() or len(key + value) > LONGEST:
            raise Mistake(f"{model}: metadata {key!r:.80} is no plain line: export it again")
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
    info |= {key: parsed(model, info, key) for key in PARSED}
    if len(info["colours"]) != len(info["labels"]):
        raise Mistake(f"{model}: {len(info['colours'])} colours of {len(info['labels'])} labels: export it again")
    if abs(info["level"]) + info["width"] / 2 > 2**15 - 1:
        told = f"a window of level {info['level']:g} and width {info['width']:g} HU, which its output cannot hold"
        raise Mistake(f"{model}: {told}: export it again")
    fixed = [side if isinstance(side, int) else None for side in session.get_inputs()[0].shape]
    if len(fixed) != 3 or any(side is not None and not 1 <= side <= LARGEST for side in fixed):
        raise Mistake(f"{model}: its map is of shape {fixed!s:.80}, not [N, H, W]: export it again")
    return info | {"fixed": fixed}


def parsed(model: Path, info: dict[str, str], key: str) -> Any:
    """An entry of a model's metadata, parsed from JSON. Raises Mistake where it fails its check in PARSED."""
    try:
        value = json.loads(info[key])
    except (ValueError, RecursionError):
        value = None
    if not PARSED[key](value):
        raise Mistake(f"{model}: metadata {key} is {info[key]!r:.80}: export it again")
    return value


def provider_options(
    name: str, info: dict[str, Any], shapes: Sequence[Shape] = (), precision: str = "model", graphs: bool = False
) -> dict[str, str]:
    """Options of a provider for a model's metadata and the batches to come.

    precision: "bf16" lets OpenVINO compute in bfloat16, with "model" it computes in fp32.
    graphs: capture CUDA graphs, see DeviceBinding; only for CUDA.
    Written from the providers' documents. CUDA was run on an H100, OpenVINO on a CPU without
    bfloat16, the others never.
    """
    half = str(int(info.get("precision") == "float16"))
    if name == "cuda":  # an exhaustive search would start anew for every size; tf32 would cost three digits
        options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "prefer_nhwc": half}
        return options | ({"enable_cuda_graph": "1"} if graphs else {})
    if name == "tensorrt":
        options = {"trt_fp16_enable": half}
        if folder := cache_folder():
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
            options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
        if shapes and not any(info["fixed"]):
            shapes = [(n, *canvas(height, width, info)) for n, height, width in shapes]
            axes = list(zip(*shapes, strict=True))
            least = (1, *map(min, axes[1:]))  # maps without lung leave their batch, and a shard's last one is smaller
            profile = {"min": least, "opt": Counter(shapes).most_common(1)[0][0], "max": map(max, axes)}
            options |= {f"trt_profile_{k}_shapes": f"map:{'x'.join(map(str, v))}" for k, v in profile.items()}
        return options
    if name == "openvino":  # a CPU without bfloat16 silently computes in fp32 whatever is asked
        cpu = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
        if folder := cache_folder():
            cpu["CACHE_DIR"] = folder
        # "AUTO:GPU,CPU" does not start where there is no GPU, and "AUTO" ignores load_config
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
    """Whether OpenVINO comes as the package onnxruntime-ep-openvino, not built into onnxruntime.

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
    import onnxruntime_ep_openvino  # only needed here

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
    """What the dynamic loader says about a provider's library, such as which part of CUDA is missing."""
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
    """Height and width to pad a map to for the model. Raises Mistake where its size is fixed and the map larger.

    At least two multiples: layers deep inside reflect at the border, and a single pixel has no neighbour to reflect.
    """
    sides = []
    for side, fixed in zip((height, width), info["fixed"][1:], strict=True):
        sides.append(fixed or max(2, math.ceil(side / info["multiple"])) * info["multiple"])
        if side > sides[-1]:
            raise Mistake(f"{height} x {width} pixels are more than the model's fixed {info['fixed'][1:]}: shrink it")
    return sides[0], sides[1]


class HostBinding:
    """The model for one shape, bound to arrays on the host, page-locked for the copies to and from a GPU."""

    def __init__(self, session: ort.InferenceSession, shape: Shape, lock: bool) -> None:
        self.session, self.binding = session, session.io_binding()
        self.maps, self.ct = np.zeros(shape, np.uint8), np.zeros(shape, np.int16)
        if lock and (driver := nvidia_driver()):
            for array in (self.maps, self.ct):  # 1: for all contexts; a refusal only costs speed
                driver.cuMemHostRegister_v2(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), 1)
        self.binding.bind_output("ct", "cpu", 0, np.int16, shape, self.ct.ctypes.data)

    def run(self, maps: np.ndarray) -> np.ndarray:
        """Labels uint8 [N, H, W] of the shape to HU int16 [N, H, W], overwritten by the next run."""
        self.maps[:] = maps
        self.binding.bind_cpu_input("map", self.maps)  # every time: this is what copies to a GPU
        self.session.run_with_iobinding(self.binding)
        return self.ct


class DeviceBinding:
    """The model for one shape, bound to memory of the device at fixed addresses, as a CUDA graph wants it.

    The first run captures the graph under the shape's own number, later ones replay it: one launch instead of hundreds.
    Run here only on a CPU, where this memory is the host's and there is nothing to capture.
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

    graph_batch: capture CUDA graphs, with batches padded to this many maps, so that each size has a single shape.
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
        try:
            padded = np.zeros(shape, np.uint8)
            padded[:n, :height, :width] = maps
            if shape not in self.bound:
                self.bound[shape] = self.bind(shape)
            ct = self.bound[shape].run(padded)
        except ORT_ERRORS as error:
            mend = "try a smaller --batch or smaller maps"
            raise Mistake(f"{first_line(error)}: is there memory for {shape}? {mend}") from error
        return ct[:n, :height, :width].copy()  # the next batch overwrites it

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


def find_maps(source: Path, side: str | None = None) -> dict[str, Path]:
    """Label maps by name: the PNGs or the volumes of a folder or of a dataset's maps/, or the one file given.

    side: of the dataset's split.json, to which the maps are limited.
    Raises Mistake where there is none, a name of the split has no map, or two would give files of the same name.
    """
    stand_ins = [place for place in (Path("data/phantom/maps"), EXAMPLES) if place.exists()]
    if source == Path("maps") and not source.exists() and stand_ins:
        source = stand_ins[0]
        print(f"maps is not there: taking {source}", file=sys.stderr)
    if not source.exists():
        raise Mistake(f"{source}: not there: give a folder of label maps")
    check_finished(source)
    folder = source / "maps" if (source / "maps").is_dir() else source
    found = find_files(folder, "maps")
    owners: dict[str, Path] = {}
    for name, path in found.items():  # lower: on many disks a.png and A.png are one file
        if (owner := owners.setdefault(name.lower(), path)) is not path:
            raise Mistake(f"{path}: its slice would have the name of {owner}'s: rename one")
    if not side:
        return found
    if folder.is_file() or any(map(is_volume, found.values())):
        raise Mistake(f"--side {side}: goes with the folder of a dataset of slices, which {source} is not")
    return of_side(found, folder.parent / "split.json", side)


def find_files(source: Path, what: str) -> dict[str, Path]:
    """PNGs or volumes of a folder by name, or the one file given. Raises Mistake where there is none, or both."""
    paths = [path for path in source.iterdir() if path.name[0] != "."] if source.is_dir() else [source]
    volumes, pngs = any(map(is_volume, paths)), any(path.suffix.lower() == ".png" for path in paths)
    if volumes and pngs:
        raise Mistake(f"{source}: holds both PNG and NIfTI: give a folder of either")
    if volumes:
        need_nibabel(source)
        from data.volumes import list_volumes, volume_name

        return list_volumes(source) if source.is_dir() else {volume_name(source): source}
    if source.is_dir():
        return list_pngs(source, what)
    if not pngs:
        raise Mistake(f"{source}: neither PNG nor NIfTI: give .png, .nii or .nii.gz, or a folder of them")
    return {source.stem: source}


def of_side(maps: dict[str, Path], split: Path, side: str) -> dict[str, Path]:
    """The maps of one side of a dataset's split. Raises Mistake for a side without names, a name without map."""
    names = read_split(split).get(side)
    if not names:
        raise Mistake(f"{split}: no names under {side}: leave out --side, or name another")
    for name in names:
        if name not in maps:
            raise Mistake(f"{split}: names {name} under {side}, but there is no such map: prepare the dataset again")
    return {name: maps[name] for name in names}


def find_reals(source: Path, maps: dict[str, Path]) -> dict[str, Path]:
    """The real slices or volumes by name, of a folder or of a dataset's images/; or the one file for the one map given.

    Raises Mistake where there is none, one file for many maps, or they are not of the maps' kind.
    """
    check_finished(source)
    found = find_files(source / "images" if (source / "images").is_dir() else source, "real slices")
    kinds = {is_volume(path) for path in (*maps.values(), *found.values())}
    if len(kinds) > 1:
        raise Mistake(f"{source}: --complement wants volumes for label volumes, and PNG for PNG")
    if source.is_dir():
        numbered = {name: f"{name}_0000" for name in maps if name not in found}  # nnU-Net's names of images
        return found | {name: found[other] for name, other in numbered.items() if other in found}
    if len(maps) > 1:
        raise Mistake(f"{source}: one file for {len(maps)} maps: --complement wants the folder of the real slices")
    return dict.fromkeys(maps, source)


def real_of(path: Path, name: str, reals: dict[str, Path]) -> Path:
    """The real slice or volume of a map. Raises Mistake where there is none of its name."""
    if name not in reals:
        raise Mistake(f"{path}: {name} is missing from --complement, which needs the real one of every map")
    return reals[name]


def is_volume(path: Path) -> bool:
    """Whether a file is a volume, by its name."""
    return path.name.lower().endswith(NIFTI)


def need_nibabel(asker: Any) -> None:
    """Raise Mistake where nibabel, which volumes need and PNG does not, is not there."""
    if not importlib.util.find_spec("nibabel"):
        raise Mistake(f"{asker}: nibabel is missing: pip install nibabel")


def plan(maps: dict[str, Path], variants: int) -> list[Job]:
    """The slices to make from maps."""
    jobs = []
    for name, path in maps.items():
        size = header_size(path)
        for k in range(1, variants + 1) if variants else [0]:
            jobs.append(Job(f"{name}v{k:02d}" if k else name, path, size, k))
    return jobs


def header_size(path: Path) -> tuple[int, int]:
    """Height and width from a PNG's header alone; 0, 0 where it cannot be read, and `load` will say why."""
    try:
        with open_png(path) as picture:
            return picture.height, picture.width
    except Mistake:
        return 0, 0


def in_batches(jobs: list[Job], n: int) -> list[list[Job]]:
    """Jobs of equal size together, n at a time."""
    groups = [list(group) for _, group in groupby(sorted(jobs, key=lambda job: job.size), lambda job: job.size)]
    return [group[i : i + n] for group in groups for i in range(0, len(group), n)]


def batch_shapes(batches: Iterable[Shape], graph_batch: int | None, info: dict[str, Any]) -> list[str]:
    """The shapes NxHxW that the model would get, each once; without those of maps too large for a fixed size."""
    shapes = set()
    for n, *size in batches:
        with contextlib.suppress(Mistake):  # a run leaves these maps out, and says so
            shapes.add((info["fixed"][0] or graph_batch or n, *canvas(*size, info)))
    return ["x".join(map(str, shape)) for shape in sorted(shapes)]


def shapes_of(batches: list[list[Job]]) -> list[Shape]:
    """Shapes of batches of slices, except those of files that cannot be read."""
    return [(len(batch), *batch[0].size) for batch in batches if all(batch[0].size)]


def load(job: Job, n_labels: int, reals: dict[str, Path] | None, seed: int, unchecked: bool = False) -> Slice | None:
    """Read the map of a job, and the real slice where `reals` are given; augment both for a variant.

    unchecked: accept a real slice whose lung does not have the HU of lung. Returns None where the map has no lung.
    Raises Mistake for a bad map, and for a real slice that is missing, bad or of another size.
    """
    labels, real = read_map(job.path), None
    if labels.max() >= n_labels:
        raise Mistake(f"{job.path}: label {labels.max()}: the model's labels are 0..{n_labels - 1}")
    if not labels.any():
        return None
    if reals is not None:
        path = real_of(job.path, job.path.stem, reals)
        real = read_image(path)
        if real.shape != labels.shape:
            raise Mistake(f"{path}: {real.shape} pixels, but its map has {labels.shape}: bring both to one size")
        if not unchecked:
            check_hu(path, real, labels)
    if job.variant:
        rng = np.random.default_rng([seed, job.variant, *os.fsencode(job.path.stem)])  # the same in any batch or shard
        rows, columns = augmentation(*labels.shape, rng)
        labels = sample_nearest(labels, rows, columns)
        real = None if real is None else sample_bicubic(real, rows, columns)
    return Slice(job, labels, real) if labels.any() else None  # a variant may crop its lung away


def load_batch(batch: list[Job], reader: Callable[[Job], Slice | None]) -> tuple[list[Slice | None], list[str]]:
    """Read what can be read of a batch; returns the slices, None without lung, and a line about each faulty one."""
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
    """HU int16 [H, W] taken from rows and columns by cubic convolution, the border's value beyond the border.

    Linear interpolation would blur what others will train on as real. Overshoot at edges is clipped to the slice's own
    range.
    """
    framed = np.pad(hu.astype(np.float32), 2, mode="edge")
    rows, columns = rows.clip(0, hu.shape[0] - 1), columns.clip(0, hu.shape[1] - 1)
    y, x = rows.astype(int), columns.astype(int)
    down, across = cubic_weights(rows - y), cubic_weights(columns - x)
    lines = (sum(across[j] * framed[y + 1 + i, x + 1 + j] for j in range(4)) for i in range(4))
    mixed = sum(weight * line for weight, line in zip(down, lines, strict=True))
    return np.rint(mixed.clip(hu.min(), hu.max())).astype(np.int16)


def cubic_weights(t: np.ndarray) -> list[np.ndarray]:
    """Weights of the pixels at -1, 0, 1 and 2 for a place t in 0..1: Keys's cubic convolution, exact on ramps."""
    near = [1.5 * d**3 - 2.5 * d**2 + 1 for d in (t, 1 - t)]
    far = [-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 for d in (1 + t, 2 - t)]
    return [far[0], *near, far[1]]


# ------------------------------------------------------------------------------------------------ slices out


def encode(hu: np.ndarray, form: str, info: dict[str, Any]) -> bytes:
    """HU int16 [H, W] as a file of a format.

    NIfTI is a volume [W, H, 1] in LPS axes: columns go to the patient's left, rows to the back, as data/prepare.py
    reads it; a pixel counts as 1 mm, since a PNG does not say.
    """
    if form == "png16":
        return png((hu + HU_OFFSET).astype(np.uint16))
    if form == "png8":
        return png(windowed(hu, info["level"], info["width"]))
    if form == "nifti":
        import nibabel  # only needed here

        content = nibabel.Nifti1Image(hu.T[..., None], np.diag([-1.0, -1.0, 1.0, 1.0])).to_bytes()
        return gzip.compress(content, 1, mtime=0)  # without the time of writing
    buffer = io.BytesIO()
    np.save(buffer, hu)
    return buffer.getvalue()


def targets(job: Job, args: argparse.Namespace) -> list[Path]:
    """The files of one slice: map, image and, if wanted, panel."""
    files = [args.out / "maps" / f"{job.name}.png", args.out / "images" / f"{job.name}{ENDINGS[args.format]}"]
    return [*files, args.out / "panels" / f"{job.name}.png"] if args.panel else files


def sources(path: Path, name: str, reals: dict[str, Path] | None) -> list[Path]:
    """The files that a slice or volume is made of: its map and, where `reals` are given, the real one."""
    return [path, *filter(None, [(reals or {}).get(name)])]


def outdated(made: list[Path], of: list[Path]) -> list[Path]:
    """The files `made` that exist but are older than one of those they were made of."""
    newest = max((came(path) for path in of if path.exists()), default=0)  # dangling: told when it is read
    return [path for path in made if path.exists() and came(path) < newest]


def came(path: Path) -> int:
    """When a file came to its place or was changed there, in ns; archives and `cp -p` give it the date of another."""
    content = path.stat()
    return max(content.st_mtime_ns, content.st_ctime_ns, path.lstat().st_ctime_ns)  # the last of a link itself


def is_made(made: list[Path], of: list[Path]) -> bool:
    """Whether all files `made` exist and none is outdated."""
    return all(path.exists() for path in made) and not outdated(made, of)


def others_made(args: argparse.Namespace, jobs: list[Job]) -> int:
    """Number of slices in OUT that are not of these jobs: of another side, more variants, or maps since removed."""
    wanted = {targets(job, args)[1].name for job in jobs}
    return len({path.name for path in (args.out / "images").glob("[!.]*")} - wanted)


def write(made: tuple[list[Slice], np.ndarray], args: argparse.Namespace, info: dict[str, Any]) -> int:
    """Write slices with their synthetic lungs, HU int16 [N, H, W]; returns their number."""
    slices, lungs = made
    for (job, labels, real), lung in zip(slices, lungs.clip(*HELD), strict=True):
        completed = lung if real is None else np.where(labels > 0, lung, real)
        map_path, image_path, *panel_path = targets(job, args)
        write_map(map_path, labels)
        for path in panel_path:
            greys = [windowed(hu, info["level"], info["width"]) for hu in (lung, completed)]
            tiles = [coloured(labels), *(np.repeat(grey[..., None], 3, 2) for grey in greys)]
            write_bytes(path, png(np.concatenate(tiles if args.complement else tiles[:2], 1)))
        write_bytes(image_path, encode(completed, args.format, info))
    return len(slices)


@contextlib.contextmanager
def claimed(args: argparse.Namespace, info: dict[str, Any], kinds: Sequence[str], place: str) -> Iterator[None]:
    """Lock the shard of OUT that is to be made, and make its folders `kinds`; in a dry run only check.

    So every file has one writer, and shards of one set run side by side. place: of maps and real slices, see `whence`.
    Raises Mistake where the shard is being made already, or OUT in another number of shards or with other settings.
    """
    made_with = {"checkpoint_sha256": info["checkpoint_sha256"], "precision": info["precision"], "format": args.format}
    if args.precision != "model":  # tens of HU from what the file itself gives
        made_with["precision"] += f" in {args.precision}"
    made_with |= {"completed": bool(args.complement), "seed": args.seed if args.variants else None}
    before = dict(made_with)  # what records held before they had sources
    made_with["sources"] = place
    record, content = args.out / "run.json", (json.dumps(made_with, indent=1) + "\n").encode()

    def check(at_work: bool) -> None:
        made = [path for kind in ("images", "volumes") for path in (args.out / kind).glob("[!.]*")]
        known = recorded(record)
        if known not in (made_with, before) and (made or (known and at_work)):
            raise Mistake(f"{args.out}: its slices were made otherwise (see run.json): give another --out")

    if args.dry_run:
        check(at_work=False)
        yield
        return
    with contextlib.ExitStack() as shard:
        with held(args.out, ".run.json.lock", wait=True):  # shared by all shards: none begins meanwhile
            shard.enter_context(held(args.out, f".{args.part}-of-{args.parts}.lock"))
            check(others_at_work(args))
            for kind in kinds:
                (args.out / kind).mkdir(parents=True, exist_ok=True)
            if not (record.exists() and record.read_bytes() == content):
                write_bytes(record, content)
        yield


def others_at_work(args: argparse.Namespace) -> bool:
    """Whether other shards of OUT are being made. Raises Mistake where they are of another number of shards."""
    at_work = False
    for lock in {*args.out.glob(".*-of-*.lock")} - {args.out / f".{args.part}-of-{args.parts}.lock"}:
        try:
            with held(args.out, lock.name):
                pass  # left by a killed run
        except Mistake:
            if not lock.name.endswith(f"-of-{args.parts}.lock"):
                raise
            at_work = True
    return at_work


def recorded(path: Path) -> Any:
    """What a run.json holds; None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def whence(out: Path, maps: dict[str, Path], reals: dict[str, Path] | None) -> str:
    """A digest of where maps and real slices lie relative to OUT: those of another set may have the same names."""
    places = []
    for files in filter(None, (maps, reals)):
        name, path = next(iter(files.items()))
        folder = path.parent.resolve()
        if path.name.removeprefix(name).lower() not in (".png", *NIFTI):  # one real file, given beside one map
            folder /= path.name
        try:
            places.append(os.path.relpath(folder, out.resolve()))
        except ValueError:  # on another Windows drive
            places.append(str(folder))
    return hashlib.sha256(os.fsencode("\n".join(places))).hexdigest()[:16]


def check_out(out: Path, inputs: Iterable[Path], sources: Iterable[Path]) -> None:
    """Raise Mistake where OUT cannot be written to, or holds the input itself.

    sources: the folders of slices given. One with maps/ in it is taken for a dataset next time: OUT is none of them.
    """
    folders = [out / kind for kind in ("images", "maps", "panels", "volumes")]
    for folder in (out, *folders):
        if not writable(folder):
            raise Mistake(f"{folder}: cannot be written to: give another --out")
    made = {folder.resolve() for folder in folders}
    if out.resolve() in {source.resolve() for source in sources} or made & {
        folder.resolve() for folder in {path.parent for path in inputs}
    }:
        raise Mistake(f"{out}: the input stands in it: give another --out")


# ------------------------------------------------------------------------------------------------ run


class Tally(NamedTuple):
    """What became of the slices or volumes to make: how many were written, how many hold no lung, what was faulty."""

    written: int
    without_lung: int
    problems: list[str]


def ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """map() by a pool that stays at most `depth` items ahead of whoever takes the results."""
    under_way: deque[Future] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def run(
    batches: list[list[Job]], generator: Generator, reader: Callable[[Job], Slice | None], writer: Callable[[Any], int]
) -> Tally:
    """Make the slices, reading and writing in other threads while the model runs in this one."""
    problems: list[str] = []
    without = 0
    bar = tqdm(total=sum(map(len, batches)), unit=" slices")

    def synthesized(loaded: Iterable[tuple[list[Any], list[str]]]) -> Iterator[tuple[list[Slice], np.ndarray]]:
        nonlocal without
        for read, lines in loaded:
            slices = [one for one in read if one]
            without += len(read) - len(slices)
            try:
                if slices:
                    yield slices, generator(np.stack([one.labels for one in slices]))
            except Mistake as mistake:
                lines += [f"{one.job.path}: {mistake}" for one in slices]
            for line in lines:
                if line not in problems:  # the variants of a map share its line
                    problems.append(line)
                    bar.write(f"error: {line}", file=sys.stderr)

    workers = min(8, max(2, usable_cores()))  # more would need more memory, and no model outruns eight
    with bar, ThreadPoolExecutor(workers) as pool:
        loaded = ahead(pool, partial(load_batch, reader=reader), batches, 2 * workers)
        for n in ahead(pool, writer, synthesized(loaded), 2 * workers):
            bar.update(n)
    return Tally(bar.n, without, problems)


# ------------------------------------------------------------------------------------------------ volumes


def load_volume(
    path: Path, real: Path | None, n_labels: int, unchecked: bool = False
) -> tuple["Volume", np.ndarray, np.ndarray | None]:
    """Read a label volume, and the CT to paste into where `real` is given.

    Returns the volume whose grid the result takes, labels uint8 and the CT's HU int16, both [Z, H, W] in display.
    Raises Mistake for a bad volume, an unknown label, a CT on another grid and one that does not hold HU.
    """
    from data import volumes  # needs nibabel

    allowed = tuple(range(n_labels))
    if real is None:
        return *volumes.read_label_volume(path, allowed), None
    ct = volumes.read_volume(real)
    labels = volumes.read_labels(path, allowed, like=ct)
    return ct, labels, whole_hu(real, ct.voxels, labels, unchecked)


def whole_hu(path: Path, voxels: np.ndarray, labels: np.ndarray, unchecked: bool) -> np.ndarray:
    """The voxels of a CT as HU int16, fractions rounded. Raises Mistake where they cannot be HU.

    unchecked: accept any mean of its lung, and volumes without air, which is about -1000 HU.
    """
    low, high, limits = voxels.min(), voxels.max(), np.iinfo(np.int16)
    if np.isnan(low):
        raise Mistake(f"{path}: {np.isnan(voxels).sum():,} voxels are nan: write air as -1000 HU there")
    told = f"values {low:g} to {high:g} are no HU"
    if not (limits.min <= low and high <= limits.max):
        raise Mistake(f"{path}: {told}: write them as HU again")
    lung = labels == 1
    if not unchecked and lung.any() and (wrong := no_lungs_mean(voxels[lung].mean(dtype=float))):
        raise Mistake(f"{path}: {wrong}: convert it to HU")
    if not unchecked and (wrong := turned(voxels, lung)):
        raise Mistake(f"{path}: its map's lung {wrong}: turn one of them, or overrule by --unchecked")
    if not unchecked and low > AIR_HU:
        raise Mistake(f"{path}: {told}, in which air is about -1000: convert it, or overrule by --unchecked")
    hu = voxels.astype(np.int16) if voxels.dtype.kind in "iu" else np.rint(voxels).astype(np.int16)
    if (hu != voxels).any():
        print(f"note: {path}: fractions of a HU are rounded", file=sys.stderr)
    return hu


def fill_volume(path: Path, labels: np.ndarray, generator: Generator, n: int) -> np.ndarray:
    """HU int16 of labels uint8, both [Z, H, W], n slices at a time; slices without lung hold the window's floor.

    Raises Mistake that names `path`, as the generator does.
    """
    floor = int(np.clip(round(generator.info["level"] - generator.info["width"] / 2), *HELD))
    hu = np.full(labels.shape, floor, np.int16)
    with_lung = np.flatnonzero(labels.any((1, 2)))
    try:
        with tqdm(total=len(with_lung), desc=path.name, unit=" slices") as bar:
            for z in (with_lung[i : i + n] for i in range(0, len(with_lung), n)):
                hu[z] = generator(labels[z])
                bar.update(len(z))
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from mistake
    return hu.clip(*HELD)


def make_volume(
    path: Path, real: Path | None, generator: Generator, n: int, unchecked: bool
) -> tuple["Volume", np.ndarray] | None:
    """The CT volume of a label volume: the Volume whose grid it takes, and HU int16 [Z, H, W]; None without lung."""
    grid, labels, ct = load_volume(path, real, len(generator.info["labels"]), unchecked)
    if not labels.any():
        return None
    if labels.shape[1:] != (side := generator.info["size"], side):
        height, width = labels.shape[1:]
        print(f"note: {path}: {height} x {width}, the model was trained at {side} x {side}", file=sys.stderr)
    hu = fill_volume(path, labels, generator, n)
    return grid, hu if ct is None else np.where(labels > 0, hu, ct)


def run_volumes(
    volumes: dict[str, Path],
    reals: dict[str, Path] | None,
    out: Path,
    generator: Generator,
    n: int,
    unchecked: bool = False,
) -> Tally:
    """Make the volumes one at a time. Raises Mistake, at once, where one cannot be written."""
    from data.volumes import write_volume  # needs nibabel

    written, without, problems = 0, 0, []
    for name, path in volumes.items():
        made = None  # frees the last one: memory may hold only one volume
        try:
            made = make_volume(path, real_of(path, name, reals) if reals else None, generator, n, unchecked)
        except Mistake as mistake:
            problems.append(str(mistake))
            print(f"error: {mistake}", file=sys.stderr)
            continue
        if made:
            write_volume(volume_file(out, name), *made)
            written += 1
        else:
            without += 1
    return Tally(written, without, problems)


def volume_file(out: Path, name: str) -> Path:
    """The file of one volume."""
    return out / "volumes" / f"{name}.nii.gz"


def survey(volumes: dict[str, Path], reals: dict[str, Path] | None) -> list[Shape]:
    """Number of slices with lung, height and width of each volume that can be read; reads them all."""
    shapes = []
    for name, path in volumes.items():
        with contextlib.suppress(Mistake):  # the run will say so
            labels = load_volume(path, real_of(path, name, reals) if reals else None, len(LABELS))[1]
            shapes.append((np.count_nonzero(labels.any((1, 2))), *labels.shape[1:]))
    return shapes


def in_parts(shapes: list[Shape], n: int) -> list[Shape]:
    """Shapes of stacks of slices [N, H, W], as those of batches of up to n."""
    return [(min(n, count - i), *size) for count, *size in shapes for i in range(0, count, n)]


# ------------------------------------------------------------------------------------------------ command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = OneLineParser(__doc__)
    option = parser.add_argument
    option("maps", type=Path, help="folder of label maps, or one: palette PNG, RGB in the paper's colours, or NIfTI")
    option("--side", choices=SIDES, help="only that side of a dataset's split")
    option("--model", type=Path, help="what export.py wrote (default: generator.onnx, else the one shipped)")
    option("--out", type=Path, default=Path("synthetic"), help="folder to write to")
    option("--format", choices=ENDINGS, help="file format of the slices (default: png16)")
    option("--complement", type=Path, metavar="IMAGES", help="folder of the real slices, or CT volumes, to paste into")
    option("--variants", type=int, default=0, metavar="K", help="make K augmentations of each map instead of it")
    option("--seed", type=int, default=0, help="seed of the variants")
    option(
        "--unchecked",
        action="store_true",
        help="accept real slices and CTs whose lung lacks the HU of lung, or is turned",
    )
    option("--panel", action="store_true", help="write pictures of map, synthesis and completion")
    option("--batch", type=int, metavar="N", help="slices at a time; by default 8 on NVIDIA GPUs, else 1")
    option("--provider", choices=("auto", *PROVIDERS), default="auto", help="what the model runs on")
    option("--precision", choices=("model", "bf16"), default="model", help="bf16: with --provider openvino")
    option("--cuda-graph", action="store_true", help="with --provider cuda: one launch per batch")
    option("--threads", type=int, metavar="N", help="threads of the model on the CPU")
    option("--shard", default="1/1", metavar="I/N", help="make the I-th of N equal parts, I = 1..N")
    option("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args(argv)
    most_threads = max(16, os.cpu_count() or 1)  # ONNX Runtime waits for ever where the system refuses it one
    check_ranges(args, variants=(0, 9999), seed=(0, 2**63), batch=(1, 9999), threads=(1, most_threads))
    part, _, parts = args.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise Mistake(f"--shard {args.shard}: give I/N with I from 1 to N, like 1/4")
    args.part, args.parts = int(part), int(parts)
    if args.complement and not args.complement.exists():
        raise Mistake(f"{args.complement}: not there: --complement wants the folder of the real slices")
    if args.precision == "bf16" and args.provider != "openvino":
        raise Mistake("--precision bf16: goes with --provider openvino alone")
    if args.cuda_graph and args.provider != "cuda":  # TensorRT only captures whole models, and has no int16
        raise Mistake("--cuda-graph: goes with --provider cuda alone")
    if args.format == "nifti":
        need_nibabel("--format nifti")
    return args


def open_for(args: argparse.Namespace, shapes: list[Shape]) -> tuple[ort.InferenceSession, dict[str, Any], str, int]:
    """The session, the model's metadata, the provider's name and the batch; a dry run may fall back to the CPU."""
    model = find_model(args.model)
    try:
        wanted = {"shapes": shapes, "precision": args.precision, "graphs": args.cuda_graph}
        session, info = open_session(model, args.provider, args.threads, **wanted)
    except Mistake as mistake:
        if not args.dry_run:
            raise
        session, info = open_session(model, "cpu", args.threads)  # which repeats what is wrong with the file
        print(f"note: {mistake}", file=sys.stderr)
    name = next(k for k, v in PROVIDERS.items() if v == session.get_providers()[0])
    name = name if args.provider == "auto" else args.provider  # which a dry run may lack
    return session, info, name, info["fixed"][0] or args.batch or (NVIDIA_BATCH if name in NVIDIA else 1)


def describe(
    args: argparse.Namespace, info: dict[str, Any], name: str, n: int, to_come: list[Shape], todo: list[Shape]
) -> None:
    """Print what a dry run is for: the provider's options for the batches to come, and the shapes still to do."""
    options = provider_options(name, info, to_come, args.precision, args.cuda_graph)
    print(f"provider options: {options}\n{name}, CUDA graphs: {'yes' if args.cuda_graph else 'no'}")
    print(f"batch shapes: {', '.join(batch_shapes(todo, n if args.cuda_graph else None, info)) or 'none'}")


def share(items: list[Any], args: argparse.Namespace) -> list[Any]:
    """This shard's part of the items."""
    mine = items[args.part - 1 :: args.parts]
    if not mine:
        print(f"note: shard {args.shard} is empty: there are only {len(items)} to make", file=sys.stderr)
    return mine


def make_slices(args: argparse.Namespace, maps: dict[str, Path], reals: dict[str, Path] | None) -> int:
    """Make CT slices of PNG maps. Returns the exit status."""
    args.format = args.format or "png16"
    jobs = plan(maps, args.variants)
    to_come = shapes_of(in_batches(jobs, args.batch or NVIDIA_BATCH))
    session, info, name, n = open_for(args, to_come)
    if any(job.size != (info["size"], info["size"]) for job in jobs):
        side = info["size"]
        print(f"note: not all maps are {side} x {side}, the size the model was trained at", file=sys.stderr)
    mine = share(jobs, args)
    with claimed(args, info, ("images", "maps", *["panels"] * args.panel), whence(args.out, maps, reals)):
        todo = [job for job in mine if not is_made(targets(job, args), sources(job.path, job.path.stem, reals))]
        batches, finished = in_batches(todo, n), len(mine) - len(todo)
        if more := others_made(args, jobs):
            print(f"note: {args.out}/images: {more} slices in it are of no map given now", file=sys.stderr)
        print(
            f"{len(maps)} maps: {finished} slices finished, {len(todo)} to make in {len(batches)} batches of up to {n}"
        )
        if args.dry_run:
            describe(args, info, name, n, to_come, shapes_of(batches))
            return 0
        for job in todo:  # beforehand: a map may have lost its lung since
            for path in outdated(targets(job, args), sources(job.path, job.path.stem, reals)):
                path.unlink()
        generator = Generator(session, info, n if args.cuda_graph else None)
        reader = partial(load, n_labels=len(info["labels"]), reals=reals, seed=args.seed, unchecked=args.unchecked)
        tally = run(batches, generator, reader, partial(write, args=args, info=info))
    return report(args, "slices", tally, len(jobs))


def make_volumes(args: argparse.Namespace, volumes: dict[str, Path], reals: dict[str, Path] | None) -> int:
    """Make CT volumes of label volumes. Returns the exit status."""
    for option in ("format", "variants", "panel"):
        if getattr(args, option):
            raise Mistake(f"{args.maps}: of volumes, and --{option} goes with PNG maps alone: leave it out")
    args.format = "volume"
    mine = share(list(volumes), args)

    def finished(name: str) -> bool:
        return is_made([volume_file(args.out, name)], sources(volumes[name], name, reals))

    todo = {name: volumes[name] for name in mine if not finished(name)}
    sizes = survey(todo, reals) if args.dry_run or args.provider == "tensorrt" else []  # no one else asks beforehand
    to_come = in_parts(sizes, args.batch or NVIDIA_BATCH)
    session, info, name, n = open_for(args, to_come)
    with claimed(args, info, ["volumes"], whence(args.out, volumes, reals)):
        print(f"{len(volumes)} volumes: {len(mine) - len(todo)} finished, {len(todo)} to make, {n} slices at a time")
        if args.dry_run:
            describe(args, info, name, n, to_come, in_parts(sizes, n))
            return 0
        for one, path in todo.items():  # beforehand: a map may have lost its lung since
            for old in outdated([volume_file(args.out, one)], sources(path, one, reals)):
                old.unlink()
        generator = Generator(session, info, n if args.cuda_graph else None)
        tally = run_volumes(todo, reals, args.out, generator, n, args.unchecked)
        return report(args, "volumes", tally, len(volumes))


def report(args: argparse.Namespace, what: str, tally: Tally, total: int) -> int:
    """Say how it went. Returns the exit status, 2 where some were left out as faulty; Mistake where none has a lung."""
    if tally.without_lung == total:
        raise Mistake(f"{args.maps}: no lung in any of the {total} {what}: give maps with labels above 0")
    print(f"{tally.written} {what} written to {args.out}")
    if tally.without_lung:
        print(f"note: {tally.without_lung} {what} without lung are left out", file=sys.stderr)
    if tally.problems:
        print(f"left out as faulty: {len(tally.problems)}, see the errors above", file=sys.stderr)
    return 2 if tally.problems else 0


def main(argv: list[str]) -> int:
    """Do what the command line says. Returns the exit status: 2 where maps were left out as faulty. Raises Mistake."""
    args = parse(argv)
    maps = find_maps(args.maps, args.side)
    reals = find_reals(args.complement, maps) if args.complement else None
    volumes = is_volume(next(iter(maps.values())))
    folders = [] if volumes else [folder for folder in (args.maps, args.complement) if folder]
    check_out(args.out, [*maps.values(), *(reals or {}).values()], folders)
    make = make_volumes if volumes else make_slices
    try:
        return make(args, maps, reals)
    except MemoryError as error:
        raise Mistake(f"not enough memory ({error}): try a smaller --batch or smaller maps") from error


if __name__ == "__main__":
    exit_on_mistake(main, stopped="stopped: the same command goes on from here")
