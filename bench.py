"""How fast, how lean, how close to what this machine can do: ratios of processes that take turns, and their spread.

    python bench.py --json bench.json                       # all parts at full widths: ten minutes on two CPU cores
    python bench.py --quick                                 # the same at reduced sizes, fewer rounds
    python bench.py --parts synth --checkpoint out/ckpt.pt  # trained weights: what a file's speed costs in HU
    python bench.py --parts synth --with-openvino           # also OpenVINO, fetched into a throw-away folder

    ceilings  the fastest matrix product or convolution of each library
    train     a step of each stage against the plain step (PlainStep)    train_step_ratio, train_memory_ratio
    synth     each file, and PyTorch in bf16, against PyTorch in fp32    synth_fp32_ratio, synth_bf16_ratio
    infer     infer_onnx.py, PNG and all, against its bare model         infer_efficiency, infer_whole
    eval      eval.py's pixel metrics against scikit-image's             eval_pixels_ratio

Each contender runs in a process of its own, with its own threads, allocator and memory peak, and they take turns: if
the machine's speed drifts, it drifts for all. A ratio is taken round by round: its median, then its least and greatest
value. Memory is the process's peak less what it held before any network was built.

The ceiling is the fastest round of the fastest library, in the same precision (on a GPU fp32 has PyTorch's default,
TF32 in convolutions) and taking turns with what is compared with it. Arithmetic is what FlopCounterMode counts in
PyTorch, and only what really does that much gets a fraction of the ceiling: --target cpu does less (Winograd), and
what OpenVINO does is not known. A fraction above 1 would mean that the ceiling is not one: that is an error, in the
JSON too, and exit status 1. fraction_of_fp32_peak is generator.onnx's, fraction_of_bf16_peak the last stage's training
step's, where it computes in bfloat16.

--device cuda is timed by CUDA events, and memory is PyTorch's only. Of it ceilings, train and infer were run on an
H100, see docs/speed.md; synth never ran to its end on a GPU.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import covidgan
import eval as evaluation
import export
import infer_onnx
from covidgan import Mistake
from data.runtime import ort
from data.slices import LEVEL, WIDTH, read_image, read_map

HERE = Path(__file__).resolve().parent
GOALS = {"train_step_ratio": "at most 0.4", "train_memory_ratio": "at most 0.6", "synth_fp32_ratio": "at least 1.9"}
GOALS |= {"synth_bf16_ratio": "at least 3.5", "infer_efficiency": "at least 0.9"}
SIZES = {  # option -> full, quick; sizes in pixels per side, widths as --ngf and --ndf
    "rounds": (5, 3),
    "train_size": (256, 128),
    "train_width": (64, 32),
    "batch": (4, 4),
    "synth_size": (512, 256),
    "synth_width": (64, 32),
    "slices": (33, 60),
}
OPENVINO = "onnxruntime-openvino==1.24.1"
HINDRANCES = ("ATEN_", "BLIS_", "DNNL_", "GOMP_", "GOTO_", "KMP_", "MKL_", "NVPL_", "OMP_", "ONEDNN_", "OPENBLAS_")
MATRICES = {"cpu": (1024, 2048), "cuda": (2048, 8192)}  # rows and columns of the ceilings' products
BLOCKS = ((512, 32), (512, 64), (64, 256))  # channels and side of residual blocks: G1's, also at 1024 pixels, and G2's
CEILING_SECONDS = 0.5  # per run of a ceiling
PAUSE = 0.2  # seconds between runs: threads of the previous one spin for a moment, and would get in the way
COLUMNS = 100  # printed at most

Work = Callable[[], Any]
Maker = Callable[[], tuple[Work, dict[str, Any]]]  # called in the contender's process: what to time, and facts about it
Rows = dict[str, dict[str, Any]]  # contender -> seconds [rounds], net_bytes and its facts, or missing


class Missing(Exception):
    """A contender that is not available here; its text says why."""


# ------------------------------------------------------------------------------------------------ taking turns


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" the peak so far. 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def timed(work: Work, device: str) -> float:
    """Seconds of one run."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@contextlib.contextmanager
def surroundings(packages: Path | None) -> Iterator[None]:
    """Give processes started meanwhile an environment without variables that make libraries slow or spare cores.

    packages: a folder whose packages they import before all others.
    """
    held = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(HINDRANCES)}
    paths = [str(packages)] if packages else []
    sys.path[:0] = paths
    try:
        yield
    finally:
        del sys.path[: len(paths)]
        os.environ.update(held)


def serve(pipe: Connection, make: Maker, device: str, warm: int) -> None:
    """A contender's process: build it, send its facts, run once per message from the pipe, send its memory."""
    before = memory("VmRSS")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        try:
            work, facts = make()
            for _ in range(warm):
                work()
            pipe.send(facts)
            while pipe.recv():
                pipe.send(timed(work, device))
            pipe.send(torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM") - before)
        except Missing as reason:
            pipe.send({"missing": str(reason)})
        except Exception as error:  # whatever it is, the waiting process must hear of it
            pipe.send({"failed": f"{type(error).__name__}: {infer_onnx.first_line(error)}"})


def heard(pipe: Connection, name: str) -> Any:
    """What a contender sends. Raises Mistake where it failed or died."""
    try:
        told = pipe.recv()
    except EOFError as error:
        raise Mistake(f"{name}: died, out of memory perhaps: try --quick") from error
    if isinstance(told, dict) and "failed" in told:
        raise Mistake(f"{name}: {told['failed']}")
    return told


def interleave(contenders: dict[str, Maker], rounds: int, title: str, device: str = "cpu", warm: int = 1) -> Rows:
    """Run every contender once per round, in turn. Raises Mistake where one fails or dies."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory and threads
    rows, pipes, processes = {}, {}, []
    with tqdm(total=len(contenders) * (rounds + 1), desc=title, leave=False) as bar:
        try:
            for name, make in contenders.items():
                pipes[name], theirs = context.Pipe()
                processes.append(context.Process(target=serve, args=(theirs, make, device, warm), daemon=True))
                with surroundings(make.keywords.get("packages") if isinstance(make, partial) else None):
                    processes[-1].start()
                theirs.close()
                rows[name] = {"seconds": [], **heard(pipes[name], name)}
                bar.update()
            present = [name for name in contenders if "missing" not in rows[name]]
            for name in present * rounds:
                time.sleep(PAUSE)
                pipes[name].send(True)
                rows[name]["seconds"].append(heard(pipes[name], name))
                bar.update()
            for name in present:
                pipes[name].send(False)
                rows[name]["net_bytes"] = heard(pipes[name], name)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()  # if all went well, none is left
    return rows


def ratio(over: dict[str, Any], under: dict[str, Any]) -> dict[str, float]:
    """Spread of the ratio of two rows' times, round by round."""
    return spread(np.divide(over["seconds"], under["seconds"]))


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, least and greatest of the rounds' values."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


# ------------------------------------------------------------------------------------------------ ceilings


def has_bf16(device: str) -> bool:
    """Whether a device computes in bfloat16."""
    return covidgan.uses_bf16(covidgan.Config(), torch.device(device))


def need_bf16(device: str) -> None:
    """Raise Missing where a device does not compute in bfloat16."""
    if not has_bf16(device):
        raise Missing("this processor does not compute in bfloat16")


def onnx_product(x: np.ndarray, w: np.ndarray) -> Work:
    """Matrix product, or convolution, by ONNX Runtime."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    node = helper.make_node("MatMul" if x.ndim == 2 else "Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", values[:1], values[1:], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=export.IR_VERSION)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = infer_onnx.usable_cores()
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def products(library: str, dtype: str, device: str) -> Iterator[tuple[str, int, Work]]:
    """Candidates for what a library is fastest at: name, floating-point operations, work."""
    shapes = {f"matrices of {n}": ((n, n), (n, n), 2 * n**3) for n in MATRICES[device]}
    for c, side in BLOCKS if library != "numpy" else ():
        flop = 2 * 9 * (c * side) ** 2
        shapes[f"conv {c} x {side} x {side}"] = ((1, c, side + 2, side + 2), (c, c, 3, 3), flop)
    for name, (*both, flop) in shapes.items():
        x, w = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for shape in both)
        if library == "numpy":
            yield name, flop, partial(np.matmul, x.numpy(), w.numpy())
        elif library == "onnxruntime":
            yield name, flop, onnx_product(x.numpy(), w.numpy())
        elif x.dim() == 2:
            yield name, flop, partial(torch.matmul, x, w)
        else:  # by oneDNN on a CPU
            yield name, flop, partial(F.conv2d, x, w)
            last = (a.to(memory_format=torch.channels_last) for a in (x, w))
            yield f"{name}, channels last", flop, partial(F.conv2d, *last)


def make_ceiling(library: str, dtype: str, device: str) -> tuple[Work, dict]:
    """The product that a library is fastest at."""
    if dtype == "bfloat16":
        need_bf16(device)

    def speed(product: tuple[str, int, Work]) -> float:
        _, flop, work = product
        work()
        return flop / min(timed(work, device) for _ in range(2))

    name, flop, work = max(products(library, dtype, device), key=speed)
    turns = max(1, round(CEILING_SECONDS / timed(work, device)))  # a single short run is no ceiling: caches are cold

    def repeated() -> None:
        for _ in range(turns):
            work()

    return repeated, {"flop": turns * flop, "dtype": dtype, "ceiling": name}


def ceilings(device: str) -> dict[str, Maker]:
    """Ceilings that the other contenders of a rotation are compared with."""
    libraries = {"torch": "float32", "torch bf16": "bfloat16"}
    libraries |= {"numpy": "float32", "onnxruntime": "float32"} if device == "cpu" else {}
    return {name: partial(make_ceiling, name.split()[0], dtype, device) for name, dtype in libraries.items()}


def with_fractions(rows: Rows) -> Rows:
    """Add FLOP per second, and its fraction of the ceiling in the same precision, or an error where that is above 1."""
    computing = {name: row for name, row in rows.items() if "flop" in row}
    peaks: dict[str, float] = {}
    for row in computing.values():
        row["flop_per_second"] = row["flop"] / statistics.median(row["seconds"])
        if "ceiling" in row:
            peaks[row["dtype"]] = max(row["flop"] / min(row["seconds"]), peaks.get(row["dtype"], 0.0))
    for name, row in computing.items():
        fraction = row["flop_per_second"] / peaks[row["dtype"]]
        if fraction > 1:
            row["error"] = f"{name}: {fraction:.2f} times as fast as the ceiling in {row['dtype']}, which is thus none"
        else:
            row["fraction"] = fraction
    return rows


def bench_ceilings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Only the libraries' products."""
    rows = with_fractions(interleave(ceilings(args.device), 2 * args.rounds, "ceilings", args.device))
    return {"about": "what each library is fastest at", "tables": {"": rows}, "figures": {}}


# ------------------------------------------------------------------------------------------------ training


class PlainStep:
    """The yardstick: one step of the same networks and losses, written the way pix2pixHD writes it.

    fp32 in the contiguous layout, activations in place, unfused Adam, and three passes of the discriminators: the
    synthesis detached from the generator, the real image, and the synthesis again, for the generator. Each player's
    backward pass fills all gradients that it reaches, also D's from the generator's loss, which are then thrown away.
    """

    def __init__(self, c: covidgan.Config, stage: str, device: str = "cpu") -> None:
        self.c, self.stage, self.method = c, stage, covidgan.build(covidgan.Covidgan, c).to(device)
        for module in self.method.modules():
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                module.inplace = True
        players = self.method.players(stage)
        settings = dict(lr=c.lr, betas=(c.adam_beta1, c.adam_beta2))
        self.opt_d = torch.optim.Adam(players.pop("d").parameters, **settings)
        self.opt_g = torch.optim.Adam([p for player in players.values() for p in player.parameters], **settings)

    def __call__(self, onehot: Tensor, target: Tensor) -> dict[str, float]:
        """Update both players from onehot [B, n_labels, H, W] and target [B, 1, H, W]; returns losses d and g."""
        c, judge = self.c, partial(self.method.d, first=self.method.first_scale(self.stage))
        image, _ = self.method.g(onehot, self.stage)
        onehot, target = self.method.at_stage_size(onehot, target, self.stage)
        image, target = (self.method.seen_by_d(x, onehot) for x in (image, target))
        apart, real, fake = judge(onehot, image.detach()), judge(onehot, target), judge(onehot, image)
        loss_d = sum(covidgan.gan_loss_d(r[-1], f[-1], c.gan) for r, f in zip(real, apart, strict=True))
        loss_dfm, loss_beta, _ = self.method.dfm(real, fake)
        loss_g = sum(covidgan.gan_loss_g(f[-1], c.gan) for f in fake) + c.lambda_dfm * loss_dfm
        self.opt_g.zero_grad()
        (loss_g + loss_beta).backward()
        self.opt_g.step()
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()
        return {"d": loss_d.item(), "g": loss_g.item()}


def counted(work: Work) -> int:
    """Floating-point operations of one run, counting 2 for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def make_training(kind: str, c: covidgan.Config) -> tuple[Work, dict]:
    """A training step: "ours" with its augmentation, as covidgan.py runs it, or "plain" without."""
    if kind == "ours":
        covidgan.keep_freed_memory()
        trainer = covidgan.Trainer(covidgan.Covidgan, c)
        return trainer.step, {"dtype": "bfloat16" if trainer.bf16 else "float32", "flop": counted(trainer.step)}
    names = covidgan.read_split(Path(c.data), 0)["train"]
    side = covidgan.load_slices(Path(c.data), [names[k % len(names)] for k in range(c.batch)], c)
    target = covidgan.lung_target(covidgan.window(side.hu, c), side.labels).to(c.device)
    onehot = covidgan.one_hot(side.labels.to(c.device), c.n_labels)
    step = partial(PlainStep(c, c.stage, c.device), onehot, target)
    return step, {"dtype": "float32", "flop": counted(step)}


def run(*command: Any) -> None:
    """Run a command quietly. Raises Mistake with its last line where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise Mistake(f"{' '.join(map(str, command))}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def make_phantom(folder: Path, size: int, slices: int = 24, seed: int = 0) -> Path:
    """Built-in data: slices of three patients."""
    out = folder / f"phantom_{size}_{slices}_{seed}"
    if not out.exists():
        options = ["--size", size, "--patients", 3, "--slices", slices // 3, "--seed", seed, "--out", out]
        run(sys.executable, HERE / "data" / "phantom.py", *options)
    return out


def bench_train(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The step of each stage: ours and the plain one."""
    size, width, data, tables = args.train_size, args.train_width, str(make_phantom(folder, args.train_size)), {}
    for stage in args.stages:
        options = dict(size=size, ngf=width, ndf=width, batch=args.batch, stage=stage, data=data, device=args.device)
        makers = {kind: partial(make_training, kind, covidgan.Config(**options)) for kind in ("plain", "ours")}
        rows = interleave(ceilings(args.device) | makers, args.rounds, f"train {stage}", args.device)
        tables[stage], plain, ours = with_fractions(rows), rows["plain"], rows["ours"]
        ours |= {"time": ratio(ours, plain), "arithmetic": ours["flop"] / plain["flop"]}
        ours["memory"] = ours["net_bytes"] / plain["net_bytes"] if plain["net_bytes"] else None
        ours["told"] = f"{shown(ours['time'])} of time, {shown(ours['memory'])} memory, {ours['arithmetic']:.2f} FLOP"
    figures = {"train_step_ratio": ours["time"], "train_memory_ratio": ours["memory"]}
    figures["fraction_of_bf16_peak"] = ours.get("fraction") if ours["dtype"] == "bfloat16" else None
    about = f"{size} x {size}, batch {args.batch}, widths of {width}, ours in {ours['dtype']}"
    return {"about": about, "tables": tables, "figures": figures}


# ------------------------------------------------------------------------------------------------ synthesis


def random_checkpoint(folder: Path, size: int, width: int) -> Path:
    """What export needs of a checkpoint, with untrained weights: the arithmetic is the same."""
    c, path = covidgan.Config(size=size, ngf=width, ndf=width), folder / f"random_{size}_{width}.pt"
    networks = covidgan.build(covidgan.Covidgan, c).state_dict()
    torch.save({"method": covidgan.Covidgan.name, "config": dataclasses.asdict(c), "networks": networks}, path)
    return path


def exported(checkpoint: Path, folder: Path, fp16: bool = False, target: str = "any") -> Path:
    """The generator's file, written when first asked for."""
    path = folder / f"{checkpoint.stem}{'_fp16' * fp16}_{target}.onnx"
    if not path.exists():
        export.export_generator(covidgan.read_weights(checkpoint), "0" * 64, path, fp16, target)
    return path


def make_torch(dtype: str, checkpoint: Path, maps: np.ndarray, device: str) -> tuple[Work, dict]:
    """The generator in PyTorch, labels in and HU out."""
    if bf16 := dtype == "bfloat16":
        need_bf16(device)
    torch.backends.cudnn.allow_tf32 = False  # which has three digits: what others are compared with has seven
    weights = covidgan.read_weights(checkpoint)
    method = export.load_method(weights, export.method_of(weights, checkpoint))
    generator = covidgan.on_device(method, torch.device(device), bf16).generator()
    deployed, labels = export.DeployedGenerator(generator, method.c).eval().to(device), torch.from_numpy(maps)

    def work() -> np.ndarray:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            return deployed(labels.to(device))[0].cpu().numpy()

    return work, {"hu": work(), "dtype": dtype, "flop": counted(work)}


def make_onnx(model: Path, maps: np.ndarray, provider: str, precision: str = "model") -> tuple[Work, dict]:
    """An exported file in ONNX Runtime, as infer_onnx.py runs it."""
    generator = infer_onnx.Generator(*infer_onnx.open_session(model, provider, precision=precision))
    return partial(generator, maps), {"hu": generator(maps)}


def make_openvino(model: Path, maps: np.ndarray, precision: str, *, packages: Path) -> tuple[Work, dict]:
    """The same in OpenVINO's ONNX Runtime, which the process has imported from `packages`, see surroundings."""
    if precision == "bf16":
        need_bf16("cpu")  # else OpenVINO would silently compute in fp32
    os.environ["HOME"] = str(packages)  # where its cache goes, to be thrown away too
    return make_onnx(model, maps, "openvino", precision)


def synthesizers(checkpoint: Path, maps: np.ndarray, args: argparse.Namespace, folder: Path) -> dict[str, Maker]:
    """PyTorch, each file, and OpenVINO if asked for; where it is not available, a line says why."""
    makers: dict[str, Maker] = {}
    for name, dtype in {"PyTorch fp32": "float32", "PyTorch bf16": "bfloat16"}.items():
        makers[name] = partial(make_torch, dtype, checkpoint, maps, args.device)
    files = {"generator.onnx": {}, "--target cpu": {"target": "cpu"}, "--fp16": {"fp16": True}}
    for name, options in files.items():
        makers[name] = partial(make_onnx, exported(checkpoint, folder, **options), maps, args.device)
    if args.with_openvino:
        try:
            packages, model = folder / "openvino", exported(checkpoint, folder)
            run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, OPENVINO)
            for name, precision in {"OpenVINO fp32": "model", "OpenVINO bf16": "bf16"}.items():
                makers[name] = partial(make_openvino, model, maps, precision, packages=packages)
        except Mistake as mistake:
            print(f"note: no OpenVINO here: {mistake}", file=sys.stderr)
    return makers


def bench_synth(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One slice by every file, provider and precision; HU off from PyTorch's in fp32 inside the lung."""
    size, about = args.synth_size, "random weights: how far HU are off, trained ones alone tell (--checkpoint)"
    if args.checkpoint:
        size, about = covidgan.read_weights(args.checkpoint)["config"]["size"], f"trained weights: {args.checkpoint}"
    checkpoint = args.checkpoint or random_checkpoint(folder, size, args.synth_width)
    maps = export.example_map(1, size, size, len(covidgan.LABELS))
    makers = synthesizers(checkpoint, maps, args, folder)
    rows = interleave(ceilings(args.device) | makers, args.rounds, "synthesis", args.device)
    present = {name: rows[name] for name in makers if "missing" not in rows[name]}
    hu, eager = {name: row.pop("hu")[maps > 0].astype(int) for name, row in present.items()}, rows["PyTorch fp32"]
    for name, row in present.items():
        off = np.abs(hu[name] - hu["PyTorch fp32"])
        row |= {"speedup": ratio(eager, row), "hu_off": int(off.max()), "mean_hu_off": float(off.mean())}
        row["told"] = f"{shown(row['speedup'])} x, {row['hu_off']} HU off, mean {row['mean_hu_off']:.1f}"
    rows["generator.onnx"] |= {"flop": eager["flop"], "dtype": "float32"}
    with_fractions(rows)
    figures: dict[str, Any] = {"fraction_of_fp32_peak": rows["generator.onnx"].get("fraction")}
    exact = [name for name in present if "PyTorch" not in name and rows[name]["hu_off"] <= export.MAX_HU]
    for key, names in (("fp32", exact), ("bf16", [name for name in present if "bf16" in name])):
        best = max(names, key=lambda name: rows[name]["speedup"]["median"], default=None)
        told = best and {**rows[best]["speedup"], "by": f"{best}, {rows[best]['hu_off']} HU off"}
        figures[f"synth_{key}_ratio"] = told
    return {"about": f"{size} x {size}, {about}", "tables": {"": rows}, "figures": figures}


# ------------------------------------------------------------------------------------------------ the scripts


def make_infer(options: list[Any], out: Path, again: bool) -> tuple[Work, dict]:
    """infer_onnx.py as a whole process, each time into a new folder in `out`, or again and again into the first."""
    runs = itertools.repeat(0) if again else itertools.count()
    return (lambda: run(sys.executable, HERE / "infer_onnx.py", *options, "--out", out / str(next(runs)))), {}


def bench_infer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """infer_onnx.py on a folder of maps, read, synthesized and written, against its model alone on as many maps.

    The model alone is timed without start-up, so the script is too: a run that finds all slices finished measures its
    start-up. infer_whole is the same with start-up.
    """
    data, n = make_phantom(folder, args.synth_size, args.slices), args.slices
    model = exported(random_checkpoint(folder, args.synth_size, args.synth_width), folder)
    maps = export.example_map(1, args.synth_size, args.synth_size, len(covidgan.LABELS))
    options = [data, "--model", model, "--provider", args.device]
    makers = {
        "model alone": partial(make_onnx, model, maps, args.device),
        "infer_onnx.py": partial(make_infer, options, folder / "made", again=False),
        "all finished": partial(make_infer, options, folder / "made", again=True),
    }
    rows = interleave(makers, max(2, args.rounds // 2), "infer", warm=0)
    del rows["model alone"]["hu"]
    for name in ("infer_onnx.py", "all finished"):
        rows[name]["net_bytes"] = None  # of processes of their own, not visible from here
    alone, whole, start = (np.array(rows[name]["seconds"]) for name in makers)
    figures = {"infer_efficiency": spread(n * alone / (whole - start)), "infer_whole": spread(n * alone / whole)}
    about = f"{n} maps of {args.synth_size} x {args.synth_size}, widths of {args.synth_width}"
    return {"about": about, "tables": {"": rows}, "figures": figures}


def make_evaluation(kind: str, real: Path, fake: Path) -> tuple[Work, dict]:
    """Table II's figures of two datasets, complete and lung, by "eval.py" or by "scikit-image"."""
    ours = partial(evaluation.main, [str(real), str(fake), "--out", str(fake / "figures")])
    return ours if kind == "eval.py" else partial(judged, real, fake), {}


def judged(real: Path, fake: Path) -> np.ndarray:
    """What eval.py gives, from scikit-image in threads: means of PSNR, RMSE, NRMSE, SSIM, complete, then lung: [8]."""
    from skimage import metrics  # the tests' package, only needed here

    def measure(path: Path) -> list[float]:
        labels, a = read_map(fake / "maps" / path.name) > 0, read_image(path)
        b, figures = np.where(labels, read_image(fake / "images" / path.name), a), []
        for mask in (np.ones_like(labels), labels):
            x, y = (np.where(mask, np.clip((hu - LEVEL) / WIDTH + 0.5, 0, 1), 0) for hu in (a, b))
            figures += [metrics.peak_signal_noise_ratio(x, y, data_range=1), metrics.mean_squared_error(x, y) ** 0.5]
            gaussian = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
            figures += [metrics.normalized_root_mse(x, y), metrics.structural_similarity(x, y, **gaussian)]
        return figures

    with ThreadPoolExecutor(infer_onnx.usable_cores()) as pool:
        return np.mean([*pool.map(measure, sorted((real / "images").iterdir()))], 0)


def bench_eval(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """eval.py's PSNR, RMSE, NRMSE and SSIM, with its pictures, against only the figures from scikit-image."""
    real, fake = (make_phantom(folder, args.synth_size, args.slices, seed) for seed in (0, 1))
    makers = {kind: partial(make_evaluation, kind, real, fake) for kind in ("eval.py", "scikit-image")}
    rows = interleave(makers, args.rounds, "eval")
    about = f"{args.slices} pairs of {args.synth_size} x {args.synth_size}, complete and lung alone, without the start"
    figures = {"eval_pixels_ratio": ratio(rows["scikit-image"], rows["eval.py"])}
    return {"about": about, "tables": {"": rows}, "figures": figures}


# ------------------------------------------------------------------------------------------------ report

PARTS = {"ceilings": bench_ceilings, "train": bench_train, "synth": bench_synth, "infer": bench_infer}
PARTS["eval"] = bench_eval


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")  # of Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> str:
    """The machine that this ran on."""
    words = [processor()]
    words += [torch.cuda.get_device_name()] if device == "cuda" else []
    words += [torch.backends.cpu.get_cpu_capability(), f"{infer_onnx.usable_cores()} cores"]
    words += [f"{'with' if has_bf16(device) else 'without'} bfloat16", f"torch {torch.__version__}"]
    return ", ".join([*words, f"onnxruntime {ort.__version__}", f"numpy {np.__version__}"])


def shown(value: Any) -> str:
    """A ratio, for people to read."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"
    return "-" if value is None else f"{value:.2f}"


def table(rows: Rows) -> list[str]:
    """Rows as aligned lines."""
    lines = [f"{'':15}{'ms':>24}{'MB':>7}{'GFLOP/s':>9}{'of peak':>9}"]
    for name, row in rows.items():
        if "missing" in row:
            lines.append(f"{name:15}{row['missing']}")
            continue
        ms = 1000 * np.array(row["seconds"])
        line = f"{name:15}{f'{np.median(ms):.0f} ({ms.min():.0f}..{ms.max():.0f})':>24}"
        for key, unit, digits, width in (
            ("net_bytes", 1e6, 0, 7),
            ("flop_per_second", 1e9, 0, 9),
            ("fraction", 1, 2, 9),
        ):
            line += " " * width if row.get(key) is None else f"{row[key] / unit:{width}.{digits}f}"
        lines.append(f"{line}  {row.get('ceiling', '')}".rstrip())
        if "told" in row:
            lines.append(f"{'':15}  {row['told']}")
    return lines


def report(part: str, found: dict[str, Any]) -> str:
    """A part's tables, then its figures beside their goals."""
    lines = ["", f"{part}: {found['about']}"]
    for title, rows in found["tables"].items():
        lines += [title, *table(rows)] if title else table(rows)
    for key, value in found["figures"].items():
        goal, by = GOALS.get(key, ""), value.get("by", "") if isinstance(value, dict) else ""
        lines.append(f"{key:22} {shown(value):20} {goal:13} {by}".rstrip())
    return "\n".join(line if len(line) <= COLUMNS else textwrap.fill(line, COLUMNS) for line in lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = covidgan.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="run only these")
    option("--quick", action="store_true", help="reduced sizes, fewer rounds, only the joint stage")
    option("--checkpoint", type=Path, help="a trained generator for synth, at its own size, instead of random weights")
    option("--with-openvino", action="store_true", help=f"fetch {OPENVINO} for synth")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="device of PyTorch and ONNX Runtime")
    option("--json", type=Path, metavar="FILE", help="write all figures there")
    for name, (full, quick) in SIZES.items():
        option("--" + name.replace("_", "-"), type=int, metavar="N", help=f"{full}, with --quick {quick}")
    args = parser.parse_args(argv)
    args.stages = covidgan.STAGES[-1:] if args.quick else covidgan.STAGES
    for name, both in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, both[args.quick])
        if getattr(args, name) < 1:
            raise Mistake(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    if args.slices % 3:
        raise Mistake(f"--slices {args.slices}: give a multiple of 3, the phantom's patients")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda: no CUDA device here, leave it out")
    if args.checkpoint:
        path = args.checkpoint = export.find_checkpoint(args.checkpoint)
        covidgan.read_checkpoint(path, export.method_of(covidgan.read_weights(path), path))
    if args.json:  # now, not after ten minutes
        args.json.parent.mkdir(parents=True, exist_ok=True)
        covidgan.check_writable(args.json)
    return args


def errors_of(parts: dict[str, Any]) -> list[str]:
    """What is wrong with the parts' ceilings."""
    rows = [named for found in parts.values() for table in found["tables"].values() for named in table.values()]
    return [row["error"] for row in rows if "error" in row]


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write the results, with every figure's median at the top."""
    figures = results["figures"]
    flat = {key: value["median"] if isinstance(value, dict) else value for key, value in figures.items()}
    text = json.dumps({**flat, **results}, indent=1) + "\n"
    covidgan.write_atomically(path, lambda unfinished: unfinished.write_text(text))


def main(argv: list[str]) -> None:
    """Run the parts, print the tables, write the JSON; exit status 1 where a ceiling turned out not to be one."""
    args = parse(argv)
    results: dict[str, Any] = {"machine": machine(args.device), "setting": {name: vars(args)[name] for name in SIZES}}
    print(textwrap.fill(results["machine"], COLUMNS))
    parts, figures = results.setdefault("parts", {}), {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            parts[part] = PARTS[part](args, Path(folder))
            figures |= parts[part]["figures"]
            print(report(part, parts[part]), flush=True)
            results |= {"figures": figures, "errors": errors_of(parts)}
            if args.json:  # after each part, lest a later one's fault lose it
                write_json(args.json, results)
    if results["errors"]:
        sys.exit(f"error: {'; '.join(results['errors'])}")


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
