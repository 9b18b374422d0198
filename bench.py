"""How fast, how lean, and how close to what this machine can do: ratios from interleaved runs, and their spread.

    python bench.py --json bench.json       # all parts at full widths: half an hour on two CPU cores
    python bench.py --quick                 # the same at a reduced size: under five minutes
    python bench.py --parts train synth     # some parts alone
    python bench.py --parts scaling         # time and memory as the work grows, drawn as OUT/scaling.png
    python bench.py --checkpoint out/ckpt.pt --parts synth      # a trained generator's speed and accuracy

Parts, and the figures that come of them:
    ceilings  matrix product in fp32 and bf16, memory copy
    train     a step of each stage against the plain step (PlainStep)          train_step_ratio, train_memory_ratio
    synth     each file and provider against PyTorch eager fp32                synth_fp32_ratio, synth_bf16_ratio
    infer     infer_onnx.py, PNG and all, against its bare model               infer_efficiency, infer_whole
    eval      eval.py against scikit-image and torch-fidelity's Inception      eval_ratio, eval_pixels_ratio
    augment   covidgan.augment against the same transforms by scipy.ndimage    augment_ratio
    scaling   size, batch, slices, processes

Each contender stands in a process of its own, with its own memory peak, threads and allocator, and they take turns: a
machine whose speed drifts drifts for all. A ratio is taken round by round; its median is given, and its least and
greatest value as the spread. Memory is the process's peak less what it held before any network was built. Arithmetic is
counted by PyTorch's FlopCounterMode, 2 for a multiplication with its addition; a product that Winograd's convolutions
spare still counts, so that fractions of the ceiling can be compared. fraction_of_fp32_peak is that of generator.onnx,
which spares none.

On a GPU (--device cuda, --provider cuda) the same runs are timed by CUDA events; shapes are fixed and warm. No GPU was
at hand: that path was never run.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import covidgan
import eval as evaluation
import export
import infer_onnx
from covidgan import Mistake
from data.slices import read_image, read_map, windowed, write_image

HERE = Path(__file__).resolve().parent
GOALS = {  # what each figure should be
    "train_step_ratio": "at most 0.4",
    "train_memory_ratio": "at most 0.6",
    "synth_fp32_ratio": "at least 1.9",
    "synth_bf16_ratio": "at least 3.5",
    "infer_efficiency": "at least 0.9",
    "eval_ratio": "at least 5",
}
MORE_FIGURES = ("infer_whole", "eval_pixels_ratio", "augment_ratio", "fraction_of_fp32_peak")
PRODUCT = 2048  # rows and columns of the ceilings' matrices
EVALUATED = 1000  # pairs that eval_ratio speaks of

Work = Callable[[], Any]
Contenders = dict[str, tuple[Callable[..., tuple[Work, dict]], dict[str, Any]]]  # name -> maker, its options
Rows = dict[str, dict[str, Any]]  # name -> seconds [rounds], peak_bytes, net_bytes and the maker's facts, or missing


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes in pixels a side, widths as --ngf and --ndf."""

    rounds: int = 5
    train_size: int = 256
    train_width: int = 64
    train_batch: int = 4
    synth_size: int = 512
    synth_width: int = 64
    infer_slices: int = 32
    eval_pairs: int = 9
    stages: tuple[str, ...] = covidgan.STAGES


FULL = Setting()
QUICK = Setting(3, 128, 32, 4, 256, 32, 100, 3, ("joint",))


class Missing(Exception):
    """A contender that cannot be had here; its text tells why."""


# ------------------------------------------------------------------------------------------------ taking turns


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most so far. 0 where the system does not tell (not Linux)."""
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
    start_time = time.perf_counter()
    work()
    return time.perf_counter() - start_time


def serve(pipe: Connection, make: Callable[..., tuple[Work, dict]], options: dict, device: str, warm: int) -> None:
    """A contender's process: build it, tell its facts, run once for every word from the pipe, tell its memory."""
    before = memory("VmRSS")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            work, facts = make(**options)
            for _ in range(warm):
                work()
            pipe.send(facts)
            while pipe.recv():
                pipe.send(timed(work, device))
    except (Missing, Mistake, infer_onnx.Mistake) as reason:
        pipe.send({"missing": str(reason)})
        return
    except Exception as error:  # whatever it is, the process that waits must hear of it
        pipe.send({"failed": f"{type(error).__name__}: {error}"})
        raise
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM")
    pipe.send({"peak_bytes": peak, "net_bytes": peak if device == "cuda" else peak - before})


def interleave(contenders: Contenders, rounds: int, title: str, device: str = "cpu", warm: int = 1) -> Rows:
    """Run every contender once a round, in turn. Raises Mistake where one dies."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory and threads
    rows, pipes, processes = {}, {}, []
    with tqdm(total=len(contenders) * (rounds + 1), desc=title, leave=False) as bar:
        try:
            for name, (make, options) in contenders.items():
                pipes[name], theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, make, options, device, warm), daemon=True)
                processes.append(process)
                process.start()
                theirs.close()
                rows[name] = {"seconds": [], **heard(pipes[name], name)}
                bar.update()
            present = [name for name in contenders if "missing" not in rows[name]]
            for _ in range(rounds):
                for name in present:
                    pipes[name].send(True)
                    rows[name]["seconds"].append(heard(pipes[name], name))
                    bar.update()
            for name in present:
                pipes[name].send(False)
                rows[name] |= heard(pipes[name], name)
            for process in processes:
                process.join()
        except BaseException:
            for process in processes:
                process.kill()
            raise
    return rows


def heard(pipe: Connection, name: str) -> Any:
    """What a contender tells. Raises Mistake where it failed or died."""
    try:
        told = pipe.recv()
    except EOFError as error:
        raise Mistake(f"{name}: died, out of memory perhaps: try --quick") from error
    if isinstance(told, dict) and "failed" in told:
        raise Mistake(f"{name}: {told['failed']}")
    return told


def seconds(row: dict[str, Any]) -> float:
    """Median of a row's runs, of which there is one at least."""
    return statistics.median(row["seconds"])


def ratio(over: dict[str, Any], under: dict[str, Any]) -> dict[str, float] | None:
    """Median, least and greatest of the ratio of two rows' times, round by round; None where one is missing."""
    if "missing" in over or "missing" in under:
        return None
    return summary(np.divide(over["seconds"], under["seconds"]))


def summary(values: np.ndarray) -> dict[str, float]:
    """Median and spread of the rounds' values."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


# ------------------------------------------------------------------------------------------------ ceilings


def has_bf16(device: str) -> bool:
    """Whether a device computes in bfloat16."""
    return covidgan.uses_bf16(covidgan.Config(), torch.device(device))


def make_product(library: str, device: str = "cpu") -> tuple[Work, dict]:
    """A square matrix product: "numpy", "torch" in fp32, or "bf16"."""
    if library == "bf16" and not has_bf16(device):
        raise Missing("this processor does not compute in bfloat16")
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16 if library == "bf16" else torch.float32)
    a = a.numpy() if library == "numpy" else a
    return (lambda: a @ a), {"flop": 2 * PRODUCT**3}


def make_copy(device: str = "cpu") -> tuple[Work, dict]:
    """A copy of 256 MiB; bytes read and written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), {"bytes": 2 * source.nbytes}


def products(device: str) -> Contenders:
    """The fp32 products, the ceiling of a rotation."""
    on_cpu = {"fp32 product, numpy": (make_product, {"library": "numpy"})} if device == "cpu" else {}
    return on_cpu | {"fp32 product, torch": (make_product, {"library": "torch", "device": device})}


def with_fractions(rows: Rows) -> Rows:
    """Add FLOP a second, and its fraction of the same rotation's ceiling, the fastest round of the fp32 products."""
    for row in rows.values():
        if "flop" in row:
            row["flop_per_second"] = row["flop"] / seconds(row)
    peak = max(row["flop"] / min(row["seconds"]) for name, row in rows.items() if name.startswith("fp32 product"))
    for row in rows.values():
        if "flop" in row:
            row["fraction_of_fp32_peak"] = row["flop_per_second"] / peak
    return rows


def bench_ceilings(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Matrix products and memory copy."""
    more = {"bf16 product": (make_product, {"library": "bf16", "device": args.device})}
    more |= {"memory copy": (make_copy, {"device": args.device})}
    rows = interleave(products(args.device) | more, max(5, s.rounds), "ceilings", args.device)
    if "bytes" in rows["memory copy"]:
        rows["memory copy"]["bytes_per_second"] = rows["memory copy"]["bytes"] / seconds(rows["memory copy"])
    return {"rows": with_fractions(rows)}


# ------------------------------------------------------------------------------------------------ training


class PlainBlock(nn.Module):
    """A residual block that keeps all its features for the backward pass."""

    def __init__(self, block: covidgan.ResidualBlock) -> None:
        super().__init__()
        self.body = block.body

    def forward(self, x: Tensor) -> Tensor:  # [B, c, H, W]
        """Add what the body makes of x."""
        return x + self.body(x)


class PlainStep:
    """The yardstick: one step of the same networks and losses, written the way pix2pixHD writes it.

    fp32 in the contiguous layout, activations in place, unfused Adam, and three passes of the discriminators: the
    synthesis cut off from the generator, the real image, and the synthesis again, for the generator. Each player's
    backward pass fills whatever gradients it meets, D's from the generator's loss too, and they are then thrown away.
    """

    def __init__(self, c: covidgan.Config, stage: str, device: str = "cpu") -> None:
        self.c, self.stage, self.nets = c, stage, covidgan.build_networks(c).to(device)
        export.replace(self.nets, covidgan.ResidualBlock, PlainBlock)
        export.replace(self.nets, nn.ReLU, lambda _: nn.ReLU(inplace=True))
        export.replace(self.nets, nn.LeakyReLU, lambda _: nn.LeakyReLU(0.2, inplace=True))
        self.scales = self.nets["d"].of_stage(stage, c.n_gen)
        groups = {**self.nets["g"].trained_in(stage), "beta": [*self.nets["dfm"].parameters()]}
        settings = dict(lr=c.lr, betas=(c.adam_beta1, c.adam_beta2))
        self.opt_g = torch.optim.Adam([p for group in groups.values() for p in group], **settings)
        self.opt_d = torch.optim.Adam([p for scale in self.scales for p in scale.parameters()], **settings)

    def __call__(self, onehot: Tensor, target: Tensor) -> dict[str, float]:
        """Update both players from onehot [B, n_labels, H, W] and target [B, 1, H, W]; returns losses d and g."""
        image, _ = self.nets["g"](onehot, self.stage)
        shrink = target.shape[-1] // image.shape[-1]
        onehot, target = onehot[..., ::shrink, ::shrink], F.avg_pool2d(target, shrink)
        cut = covidgan.judge(self.scales, onehot, image.detach())
        real = covidgan.judge(self.scales, onehot, target)
        fake = covidgan.judge(self.scales, onehot, image)
        kind = self.c.gan
        loss_d = sum(covidgan.gan_loss_d(r[-1], f[-1], kind) for r, f in zip(real, cut, strict=True))
        loss_dfm, loss_beta, _ = self.nets["dfm"](real, fake)
        loss_g = sum(covidgan.gan_loss_g(f[-1], kind) for f in fake) + self.c.lambda_dfm * loss_dfm
        self.opt_g.zero_grad()
        (loss_g + loss_beta).backward()
        self.opt_g.step()
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()
        return {"d": loss_d.item(), "g": loss_g.item()}


def config(size: int, width: int, **more: Any) -> covidgan.Config:
    """The paper's networks at a size and width."""
    return covidgan.Config(**{**dict(size=size, ngf=width, ndf=width), **more})


def counted(work: Work) -> int:
    """Floating-point operations of one run."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def make_training(
    kind: str, stage: str, data: str, size: int, width: int, batch: int, device: str
) -> tuple[Work, dict]:
    """A training step, "ours" with its augmentation as covidgan.py runs it, "compiled" too, or "plain" without."""
    c = config(size, width, data=data, batch=batch, stage=stage, device=device, compile=kind == "compiled")
    start = time.perf_counter()
    if kind == "plain":
        names = covidgan.read_split(Path(data), 0)["train"][:batch]
        names = [names[k % len(names)] for k in range(batch)]
        side, plain = covidgan.load_slices(Path(data), names, c), PlainStep(c, stage, device)
        target = covidgan.lung_target(covidgan.window(side.hu, c), side.labels).to(device)
        onehot = covidgan.one_hot(side.labels.to(device), c.n_labels)

        def work() -> None:
            plain(onehot, target)
    else:
        covidgan.keep_freed_memory()
        trainer = covidgan.Trainer(c)
        work = trainer.step
    dtype = "bfloat16" if kind != "plain" and trainer.bf16 else "float32"
    flop = None if kind == "compiled" else counted(work)  # the counter does not see into compiled code
    work()
    facts = {"dtype": dtype, "images": batch, "start_seconds": time.perf_counter() - start}
    return work, facts | ({"flop": flop} if flop else {})


def make_phantom(folder: Path, size: int, patients: int = 3, slices: int = 8) -> Path:
    """Built-in data of a size."""
    out = folder / f"phantom{size}_{patients * slices}"
    options = ["--size", size, "--patients", patients, "--slices", slices, "--out", out]
    if not out.exists():
        run_script(HERE / "data" / "phantom.py", *options)
    return out


def run_script(*command: Any, **environment: str) -> None:
    """Run a Python script quietly. Raises Mistake with its last line where it fails."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env={**os.environ, **environment})
    if done.returncode:
        raise Mistake(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def bench_train(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The step of each stage, ours and the plain one."""
    common = dict(size=s.train_size, width=s.train_width, batch=s.train_batch, device=args.device)
    common |= dict(data=str(make_phantom(folder, s.train_size)))
    stages, result = {}, {}
    for stage in s.stages:
        kinds = ["plain", "ours", *["compiled"] * args.compile]
        contenders = {kind: (make_training, {"kind": kind, "stage": stage, **common}) for kind in kinds}
        rows = with_fractions(interleave(products(args.device) | contenders, s.rounds, f"train {stage}", args.device))
        over = ratio(rows["ours"], rows["plain"])
        least = rows["ours"]["net_bytes"] / rows["plain"]["net_bytes"] if rows["plain"]["net_bytes"] else None
        stages[stage] = {"rows": rows, "time": over, "memory": least}
        stages[stage]["flop"] = rows["ours"]["flop"] / rows["plain"]["flop"]
        if args.compile:
            stages[stage]["compiled"] = ratio(rows["compiled"], rows["plain"])
    last = stages[s.stages[-1]]
    result["train_step_ratio"], result["train_memory_ratio"] = last["time"], last["memory"]
    return {"stages": stages, **common, **result, "data": "phantom"}


# ------------------------------------------------------------------------------------------------ synthesis


def random_checkpoint(size: int, width: int) -> dict[str, Any]:
    """What export needs of a checkpoint, untrained: the arithmetic is the same."""
    c = config(size, width)
    return {"config": dataclasses.asdict(c), "g": covidgan.build_networks(c)["g"].state_dict()}


def make_torch(kind: str, checkpoint: dict, maps: np.ndarray, device: str) -> tuple[Work, dict]:
    """The generator by PyTorch, labels in and HU out: "eager", "bf16", "compiled" or "compiled bf16"."""
    bf16 = "bf16" in kind
    c = covidgan.Config(**checkpoint["config"])
    if bf16 and not has_bf16(device):
        raise Missing("this processor does not compute in bfloat16")
    generator = covidgan.build_networks(c)["g"]
    generator.load_state_dict(checkpoint["g"])
    layout = covidgan.memory_layout(torch.device(device), bf16)
    deployed = export.DeployedGenerator(generator, c).eval().to(device, memory_format=layout)
    if "compiled" in kind:
        deployed.compile(dynamic=False)
    labels, start = torch.from_numpy(maps), time.perf_counter()

    def work() -> np.ndarray:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            return deployed(labels.to(device))[0].cpu().numpy()

    hu = work()
    facts = {"hu": hu, "start_seconds": time.perf_counter() - start}
    return work, facts | ({"flop": counted(work)} if kind == "eager" else {})


def make_onnx(model: Path, maps: np.ndarray, provider: str, precision: str = "model") -> tuple[Work, dict]:
    """An exported file by ONNX Runtime, as infer_onnx.py runs it."""
    start = time.perf_counter()
    generator = infer_onnx.Generator(*infer_onnx.open_session(model, provider, precision=precision))
    hu = generator(maps)
    return (lambda: generator(maps)), {"hu": hu, "start_seconds": time.perf_counter() - start}


def exported(checkpoint: dict, folder: Path, fp16: bool = False, target: str = "any") -> Path:
    """The generator's file, written when first asked for."""
    c = checkpoint["config"]
    path = folder / f"generator_{c['size']}_{c['ngf']}{'_fp16' * fp16}_{target}.onnx"
    if not path.exists():
        export.export_generator(checkpoint, "0" * 64, path, fp16, target)
    return path


def bench_synth(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One slice through every file, provider and precision."""
    checkpoint = read_generator(args.checkpoint) if args.checkpoint else random_checkpoint(s.synth_size, s.synth_width)
    files = {
        "fp32": exported(checkpoint, folder),
        "fp32 --target cpu": exported(checkpoint, folder, target="cpu"),
        "fp16": exported(checkpoint, folder, fp16=True),
    }
    maps = export.example_map(1, s.synth_size, s.synth_size, checkpoint["config"]["n_labels"])
    kinds = ("eager", "bf16", *["compiled", "compiled bf16"] * args.compile)
    contenders = {
        f"PyTorch {kind}": (make_torch, dict(kind=kind, checkpoint=checkpoint, maps=maps, device=args.device))
        for kind in kinds
    }
    for name, path in files.items():
        contenders[f"{args.provider}, {name}"] = (make_onnx, dict(model=path, maps=maps, provider=args.provider))
    for precision in ("model", "bf16"):
        options = dict(model=files["fp32"], maps=maps, provider="openvino", precision=precision)
        contenders[f"openvino, fp32{', bf16 asked' * (precision == 'bf16')}"] = (make_onnx, options)
    rows = interleave(products(args.device) | contenders, s.rounds, "synthesis", args.device)
    eager = rows["PyTorch eager"]
    for name, row in rows.items():
        if name in contenders and "missing" not in row:
            row["flop"] = eager["flop"]
            row["speedup"] = ratio(eager, row)
            row["hu_difference"] = int(np.abs(row["hu"].astype(int) - eager["hu"]).max())
    for row in rows.values():
        row.pop("hu", None)
    with_fractions(rows)
    accurate = [name for name in contenders if rows[name].get("hu_difference", 2) <= 1 and "PyTorch" not in name]
    bf16 = has_bf16(args.device)  # without it OpenVINO computes in fp32
    halves = [name for name in contenders if bf16 and "bf16" in name and "missing" not in rows[name]]
    best = {
        "synth_fp32_ratio": max(accurate, key=lambda name: rows[name]["speedup"]["median"], default=None),
        "synth_bf16_ratio": max(halves, key=lambda name: rows[name]["speedup"]["median"], default=None),
    }
    result = {key: rows[name]["speedup"] if name else None for key, name in best.items()}
    if not bf16:
        result["synth_bf16_missing"] = "this processor does not compute in bfloat16"
    result["fraction_of_fp32_peak"] = rows[f"{args.provider}, fp32"].get("fraction_of_fp32_peak")
    weights = f"trained, of {args.checkpoint.name}" if args.checkpoint else "untrained"
    return {"rows": rows, "size": s.synth_size, "width": s.synth_width, "weights": weights, "best": best, **result}


def read_generator(path: Path) -> dict[str, Any]:
    """A checkpoint's config and generator."""
    checkpoint = covidgan.read_checkpoint(path)
    return {"config": checkpoint["config"], "g": checkpoint["g"]}


# ------------------------------------------------------------------------------------------------ the scripts


def make_script(script: str, options: list[str], out: str, again: bool = False) -> tuple[Work, dict]:
    """A script as a whole process, each time into a new folder below `out`, or `again` and again into the first."""
    runs = itertools.repeat(0) if again else itertools.count()
    return (lambda: run_script(HERE / script, *options, "--out", f"{out}/{next(runs)}")), {}


def make_maps(folder: Path, size: int, n: int) -> Path:
    """A folder of n maps, copies of the phantom's."""
    out, maps = folder / f"maps{size}_{n}", sorted((make_phantom(folder, size) / "maps").iterdir())
    out.mkdir()
    for k in range(n):
        shutil.copy(maps[k % len(maps)], out / f"P{k:03d}_S000.png")
    return out


def bench_infer(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """infer_onnx.py on a folder of maps, read, synthesized and written, against its model alone on as many maps.

    The model alone is timed without its start, so the script's rate is too: a run that finds all slices finished takes
    the time of the start. infer_whole is the same with the start.
    """
    data = make_maps(folder, s.synth_size, s.infer_slices)
    model = exported(random_checkpoint(s.synth_size, s.synth_width), folder)
    maps = export.example_map(1, s.synth_size, s.synth_size, 4)
    options = dict(script="infer_onnx.py", out=str(folder / "made"))
    options |= dict(options=[str(data), "--model", str(model), "--provider", args.provider])
    contenders = {
        "model alone": (make_onnx, dict(model=model, maps=maps, provider=args.provider)),
        "infer_onnx.py": (make_script, options),
        "all finished": (make_script, {**options, "again": True}),
    }
    rows = interleave(contenders, max(1, s.rounds // 2), "infer", warm=0)
    alone, whole, start = (np.array(rows[name]["seconds"]) for name in contenders)
    result = {"infer_efficiency": summary(s.infer_slices * alone / (whole - start))}
    result["infer_whole"] = summary(s.infer_slices * alone / whole)
    return {"rows": rows, "slices": s.infer_slices, "size": s.synth_size, "width": s.synth_width, **result}


def make_evaluation(kind: str, real: str, fake: str, features: str = "", weights: str = "") -> tuple[Work, dict]:
    """Table II's figures of two datasets, complete and lung, by "ours" or the "judges"; given features, FID as well."""
    if kind == "ours":
        network = ["--features", features, "--dim", "2048", "--force"] if features else []
        return (lambda: evaluation.main([real, fake, *network, "--out", f"{fake}/figures"])), {}
    judge = load_inception(weights) if weights else None
    return (lambda: judged(Path(real), Path(fake), judge)), {}


def load_inception(weights: str) -> nn.Module:
    """torch-fidelity's feature network, whose package is looked past: its own __init__ wants torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise Missing("no torch-fidelity here: pip install --no-deps torch-fidelity==0.4.0")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    return module.FeatureExtractorInceptionV3("judge", ["2048"], feature_extractor_weights_path=weights).eval()


def judged(real: Path, fake: Path, inception: nn.Module | None) -> dict[str, Any]:
    """What eval.py gives, by scikit-image in threads, and by torch-fidelity's features and formula."""
    from skimage import metrics  # the tests' package, wanted here alone

    def measure(path: Path) -> tuple[list[float], np.ndarray]:
        labels, a = read_map(real / "maps" / path.name) > 0, read_image(path)
        b = np.where(labels, read_image(fake / "images" / path.name), a)
        figures, greys = [], []
        for mask in (np.ones_like(labels), labels):
            x, y = (np.where(mask, np.clip((hu + 600) / 1500 + 0.5, 0, 1), 0) for hu in (a, b))
            gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
            figures += [metrics.peak_signal_noise_ratio(x, y, data_range=1), metrics.mean_squared_error(x, y) ** 0.5]
            figures += [
                metrics.normalized_root_mse(x, y),
                metrics.structural_similarity(x, y, data_range=1, **gaussian),
            ]
            greys += [np.where(mask, windowed(hu), 0).astype(np.uint8) for hu in (a, b)]
        return figures, np.stack(greys)  # [8], [4, H, W]

    with ThreadPoolExecutor(infer_onnx.usable_cores()) as pool:
        figures, greys = zip(*pool.map(measure, sorted((real / "images").iterdir())), strict=True)
    if inception is None:
        return {"figures": np.mean(figures, 0)}
    features, distances = [], []
    with torch.no_grad():
        for side in torch.from_numpy(np.stack(greys, 1)):  # [n, H, W] of real and fake, complete and lung
            parts = side[:, None].expand(-1, 3, -1, -1).split(16)
            features.append(torch.cat([inception(part)[0] for part in parts]))
    for x, y in zip(features[::2], features[1::2], strict=True):
        (mu_x, cov_x), (mu_y, cov_y) = ((f.numpy().mean(0), np.cov(f.numpy(), rowvar=False)) for f in (x, y))
        root = np.sqrt(np.linalg.eigvals(cov_x.dot(cov_y)).astype(complex)).real.sum()
        distances.append(((mu_x - mu_y) ** 2).sum() + cov_x.trace() + cov_y.trace() - 2 * root)
    return {"figures": np.mean(figures, 0), "frechet": distances}


def make_pairs(folder: Path, size: int, n: int) -> tuple[Path, Path]:
    """A phantom dataset of n slices, and another whose slices differ by noise of 60 HU."""
    real = make_phantom(folder, size, patients=3, slices=n // 3)
    fake, rng = real.with_name(f"{real.name}_noisy"), np.random.default_rng(0)
    (fake / "images").mkdir(parents=True)
    for path in (real / "images").iterdir():
        hu = read_image(path)
        write_image(fake / "images" / path.name, hu + rng.normal(0, 60, hu.shape))
    return real, fake


def bench_eval(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """eval.py against its judges at two numbers of pairs; the ratio is that of the two lines at 1,000 pairs.

    Once with the Frechet distance, which costs four passes of Inception a pair, and once for the pixels' figures alone.
    """
    torch.save({**export.Inception().state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)},
               folder / "weights.pth")  # fmt: skip
    export.export_features("inception", folder / "weights.pth", folder / "inception.onnx")
    common = dict(features=str(folder / "inception.onnx"), weights=str(folder / "weights.pth"))
    counts, contenders = (s.eval_pairs, 3 * s.eval_pairs), {}
    for n in counts:
        real, fake = make_pairs(folder, s.synth_size, n)
        for kind in ("ours", "judges"):
            options = dict(kind=kind, real=str(real), fake=str(fake))
            contenders[f"{kind}, {n} pairs"] = (make_evaluation, {**options, **common})
            contenders[f"{kind}, {n} pairs, pixels"] = (make_evaluation, options)
    rows, estimate = interleave(contenders, max(1, s.rounds // 2), "eval"), {}
    for kind in ("ours", "judges"):
        for what in ("", ", pixels"):
            few, many = (rows[f"{kind}, {n} pairs{what}"] for n in counts)
            if "missing" not in few:
                each = (seconds(many) - seconds(few)) / (counts[1] - counts[0])
                if each > 0:  # else the rounds are too noisy for a line
                    estimate[kind + what] = seconds(few) + each * (EVALUATED - counts[0])
    result = {}
    for key, what in (("eval_ratio", ""), ("eval_pixels_ratio", ", pixels")):
        both = "judges" + what in estimate and "ours" + what in estimate
        result[key] = estimate["judges" + what] / estimate["ours" + what] if both else None
    return {"rows": rows, "size": s.synth_size, f"seconds_at_{EVALUATED}_pairs": estimate, **result}


# ------------------------------------------------------------------------------------------------ augmentation


def scipy_augment(hu: np.ndarray, labels: np.ndarray, c: covidgan.Config, rng: np.random.Generator) -> np.ndarray:
    """covidgan.augment's transforms of one slice, HU and labels [H, W], by scipy.ndimage; returns the target [H, W]."""
    from scipy import ndimage  # the tests' package, wanted here alone

    size = len(hu)
    zoom, angle = rng.uniform(1, c.resize), np.deg2rad(rng.uniform(-c.rotate, c.rotate))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / zoom
    shift = rng.uniform(-1, 1, 2) * (1 - 1 / zoom) * size / 2
    cells = int(np.ceil(512 / c.elastic_cell))
    coarse = rng.normal(0, c.elastic / 512 * size, (2, cells, cells))
    elastic = np.stack([ndimage.zoom(field, size / cells, order=3) for field in coarse])
    centred = np.mgrid[:size, :size] - (size - 1) / 2
    where = np.tensordot(turn, centred, 1) + (size - 1) / 2 + shift[:, None, None] + elastic
    image = np.clip((hu - c.level) * (2 / c.width), -1, 1).astype(np.float32)
    image = ndimage.map_coordinates(image, where, order=1, mode="nearest")
    labels = ndimage.map_coordinates(labels, where, order=0, mode="constant")
    image = image + rng.normal(0, 2 * c.noise, image.shape)
    return np.where(labels > 0, image.clip(-1, 1), -1).astype(np.float32)


def make_augmentation(kind: str, data: str, size: int, batch: int) -> tuple[Work, dict]:
    """A batch augmented by "covidgan" or, slice by slice, by "scipy.ndimage"."""
    c = config(size, 8, data=data, batch=batch)
    names = covidgan.read_split(Path(data), 0)["train"][:batch]
    side = covidgan.load_slices(Path(data), names, c)
    if kind == "covidgan":
        rng = torch.Generator().manual_seed(0)
        return (lambda: covidgan.augment(side.hu, side.labels, c, rng)), {"images": len(names)}
    slices, numpy_rng = (
        list(zip(side.hu.numpy()[:, 0], side.labels.numpy()[:, 0], strict=True)),
        np.random.default_rng(0),
    )
    return (lambda: [scipy_augment(*one, c, numpy_rng) for one in slices]), {"images": len(names)}


def bench_augment(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A training batch's augmentation."""
    options = dict(data=str(make_phantom(folder, s.train_size)), size=s.train_size, batch=s.train_batch)
    contenders = {kind: (make_augmentation, dict(kind=kind, **options)) for kind in ("covidgan", "scipy.ndimage")}
    rows = interleave(contenders, max(9, s.rounds), "augment")
    return {"rows": rows, **options, "data": "phantom", "augment_ratio": ratio(rows["scipy.ndimage"], rows["covidgan"])}


# ------------------------------------------------------------------------------------------------ scaling


def make_main(script: str, options: list[str], out: str) -> tuple[Work, dict]:
    """A torch-free script's main() in a contender's process, so that its memory is told; a new folder each time."""
    program, runs = {"eval.py": evaluation.main, "infer_onnx.py": infer_onnx.main}[script], itertools.count()
    return (lambda: program([*options, "--out", f"{out}/{next(runs)}"])), {}


def make_shards(n: int, options: list[str], out: str) -> tuple[Work, dict]:
    """infer_onnx.py as n processes at once, each a shard, on one thread."""
    runs = itertools.count()

    def work() -> None:
        shards = [[*options, "--threads", "1", "--shard", f"{i}/{n}"] for i in range(1, n + 1)]
        target = f"{out}/{next(runs)}"
        with ThreadPoolExecutor(n) as pool:
            list(pool.map(lambda o: run_script(HERE / "infer_onnx.py", *o, "--out", f"{target}_{o[-1][0]}"), shards))

    return work, {}


def make_torchrun(n: int, data: str, size: int, out: str) -> tuple[Work, dict]:
    """torchrun of covidgan.py on n processes of one thread each (gloo): 24 joint steps of 4 slices, start and all."""
    runs = itertools.count()
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", HERE / "covidgan.py"]
    command += ["--stage", "joint", "--data", data, "--size", size, "--ngf", 32, "--ndf", 32, "--batch", 4]
    command += ["--epochs", 1, "--epoch-len", 96, "--interval", 1000]
    return (lambda: run_script(*command, "--out", f"{out}/{next(runs)}", OMP_NUM_THREADS="1")), {"images": 96}


def scaling_axes(
    s: Setting, args: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, str, str, list, Contenders]]:
    """Axis, what is measured, the unit of time, its values, and a contender for each value."""
    full = not args.quick
    width, sizes = (64, (128, 256, 512, 1024)) if full else (16, (64, 128, 256))
    model = exported(random_checkpoint(256, width), folder)
    data = {size: str(make_phantom(folder, size)) for size in sizes[:-1]}

    def synthesis(n: int, size: int) -> tuple:
        maps = export.example_map(n, size, size, 4)
        return make_onnx, dict(model=model, maps=maps, provider=args.provider)

    def training(size: int, batch: int) -> tuple:
        options = dict(kind="ours", stage="joint", data=data[size], device=args.device)
        return make_training, dict(size=size, width=width // 2, batch=batch, **options)

    yield "size", f"synthesis, width {width}", "a slice", list(sizes), {str(n): synthesis(1, n) for n in sizes}
    yield (
        "size",
        f"joint step, width {width // 2}",
        "a slice",
        list(sizes[:-1]),
        {str(n): training(n, 1) for n in sizes[:-1]},
    )
    small, counts = sizes[1], (1, 2, 4, 8)
    yield "batch", f"synthesis, {small} px", "a slice", counts, {str(n): synthesis(n, small) for n in counts}
    yield "batch", f"joint step, {small} px", "a slice", counts, {str(n): training(sizes[1], n) for n in counts}
    counts = (9, 90, 900) if full else (6, 60)
    sets = {n: make_pairs(folder, sizes[1], n) for n in counts}
    yield (
        "slices",
        "eval.py, pixels",
        "the whole",
        counts,
        {
            str(n): (make_main, dict(script="eval.py", options=[*map(str, sets[n])], out=str(folder / f"e{n}")))
            for n in counts
        },
    )
    tiny = exported(random_checkpoint(128, 8), folder)
    yield "slices", "infer_onnx.py, width 8", "the whole", counts, {
        str(n): (make_main, dict(script="infer_onnx.py", options=[str(sets[n][0]), "--model", str(tiny)],
                                 out=str(folder / f"i{n}"))) for n in counts
    }  # fmt: skip
    counts, options = (1, 2), [str(sets[counts[1]][0]), "--model", str(model)]
    yield (
        "processes",
        "infer_onnx.py, shards",
        "the whole",
        counts,
        {str(n): (make_shards, dict(n=n, options=options, out=str(folder / f"s{n}"))) for n in counts},
    )
    yield (
        "processes",
        "torchrun, 24 steps",
        "the whole",
        counts,
        {str(n): (make_torchrun, dict(n=n, data=data[small], size=small, out=str(folder / f"t{n}"))) for n in counts},
    )


def bench_scaling(s: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time and memory along each axis.

    exponent: of time as a power of the value, from the value before. Of a side in pixels 2 is linear in pixels; of a
    batch 0, since the time is a slice's; of a number of slices 1; of processes -1.
    """
    lines = []
    for axis, what, unit, values, contenders in scaling_axes(s, args, folder):
        scripts = axis in ("slices", "processes")
        rows = interleave(contenders, 1 if scripts else min(3, s.rounds), what, args.device, warm=0 if scripts else 1)
        for value, row in zip(values, rows.values(), strict=True):
            images = value if axis == "batch" else 1
            line = {"axis": axis, "what": what, "unit": unit, "value": value, "missing": row.get("missing")}
            if "missing" not in row:
                line |= {"seconds": seconds(row) / images, "megabytes": row["net_bytes"] / 1e6}
                before = lines[-1] if lines and lines[-1]["what"] == what and lines[-1]["axis"] == axis else None
                if before and "seconds" in before:
                    growth = np.log(line["seconds"] / before["seconds"]) / np.log(value / before["value"])
                    line["exponent"] = float(growth)
            lines.append(line)
    draw_scaling(lines, args.out / "scaling.png")
    return {"lines": lines, "picture": str(args.out / "scaling.png")}


def draw_scaling(lines: list[dict[str, Any]], path: Path) -> None:
    """A column an axis: time above, memory below."""
    from matplotlib.figure import Figure  # slow to import, and wanted here alone
    from matplotlib.ticker import LogLocator

    axes_of = list(dict.fromkeys(line["axis"] for line in lines))
    figure = Figure(figsize=(14, 6), layout="tight")
    grid = figure.subplots(2, len(axes_of), squeeze=False)
    for k, axis in enumerate(axes_of):
        for what in dict.fromkeys(line["what"] for line in lines if line["axis"] == axis):
            points = [x for x in lines if (x["axis"], x["what"]) == (axis, what) and "seconds" in x]
            for row, field in enumerate(("seconds", "megabytes")):
                told = [(x["value"], x[field]) for x in points if not (field == "megabytes" and axis == "processes")]
                if told:
                    grid[row][k].plot(*zip(*told, strict=True), marker="o", label=f"{what}, {points[0]['unit']}")
        ticks = sorted({line["value"] for line in lines if line["axis"] == axis})
        for row, label in enumerate(("seconds", "MB above the libraries'")):
            panel = grid[row][k]
            if not panel.lines:
                panel.set_axis_off()
                continue
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            panel.legend(fontsize=7)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
    path.parent.mkdir(parents=True, exist_ok=True)
    covidgan.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))


BENCHES = {
    "ceilings": bench_ceilings,
    "train": bench_train,
    "synth": bench_synth,
    "infer": bench_infer,
    "eval": bench_eval,
    "augment": bench_augment,
    "scaling": bench_scaling,
}


# ------------------------------------------------------------------------------------------------ report


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What this ran on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [x.partition(":")[2].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if (
        cpuinfo.exists()) else []  # fmt: skip
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "not tried"
    bf16 = has_bf16(args.device)
    return {
        "processor": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": infer_onnx.usable_cores(),
        "bfloat16": bf16,
        "gpu": gpu,
        "torch": torch.__version__,
        "onnxruntime": infer_onnx.ort.__version__,
        "numpy": np.__version__,
    }


def spread(value: Any) -> str:
    """A ratio for reading."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"
    return "-" if value is None else f"{value:.2f}"


def row_lines(rows: Rows) -> list[str]:
    """Rows as an aligned table; the columns that nobody has are left out."""
    columns: dict[str, Callable[[dict], str]] = {
        "ms": lambda r: f"{1e3 * seconds(r):.0f} ({1e3 * min(r['seconds']):.0f}..{1e3 * max(r['seconds']):.0f})",
        "MB": lambda r: f"{r['net_bytes'] / 1e6:.0f}",
        "GFLOP": lambda r: f"{r['flop'] / 1e9:.1f}",
        "GFLOP/s": lambda r: f"{r['flop_per_second'] / 1e9:.0f}",
        "of fp32 peak": lambda r: f"{r['fraction_of_fp32_peak']:.2f}",
        "GB/s": lambda r: f"{r['bytes_per_second'] / 1e9:.1f}",
        "speed-up": lambda r: spread(r["speedup"]),
        "HU off": lambda r: str(r["hu_difference"]),
        "start s": lambda r: f"{r['start_seconds']:.1f}",
        "not here": lambda r: r["missing"],
    }
    grid = [["", *columns]]
    for name, row in rows.items():
        cells = [name]
        for text in columns.values():
            try:
                cells.append(text(row))
            except (KeyError, statistics.StatisticsError):  # not measured, or not here
                cells.append("")
        grid.append(cells)
    kept = [k for k in range(len(grid[0])) if k == 0 or any(cells[k] for cells in grid[1:])]
    widths = [max(len(cells[k]) for cells in grid) for k in kept]
    return ["  ".join(cells[k].ljust(w) for k, w in zip(kept, widths, strict=True)).rstrip() for cells in grid]


def scaling_lines(lines: list[dict[str, Any]]) -> list[str]:
    """The table of scaling."""
    text = [f"{'axis':10} {'what':24} {'value':>6} {'seconds':>9} {'MB':>7}  exponent"]
    for x in lines:
        if x["missing"]:
            text.append(f"{x['axis']:10} {x['what']:24} {x['value']:>6} not here: {x['missing']}")
            continue
        growth = f"{x['exponent']:8.2f}" if "exponent" in x else ""
        text.append(
            f"{x['axis']:10} {x['what']:24} {x['value']:>6} {x['seconds']:9.3f} {x['megabytes']:7.0f}  {growth}"
        )
    return text


def report(results: dict[str, Any]) -> str:
    """All tables, then the figures beside their goals."""
    text = [", ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    for part, found in results["parts"].items():
        settings = {k: v for k, v in found.items() if isinstance(v, str | int) and k not in GOALS}
        text.append(f"{part}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        if part == "scaling":
            text += scaling_lines(found["lines"])
        elif part == "train":
            for stage, its in found["stages"].items():
                memory_ratio = spread(its["memory"])
                text += [
                    "",
                    f"{stage}: time {spread(its['time'])}, memory {memory_ratio}, arithmetic {its['flop']:.2f}",
                ]
                text += row_lines(its["rows"])
        else:
            text += row_lines(found["rows"])
        text.append("")
    for key in (*GOALS, *MORE_FIGURES):
        if key in results:
            goal = f", goal: {GOALS[key]}" if key in GOALS else ""
            text.append(f"{key:24} {spread(results[key + '_spread'] or results[key]):22}{goal}")
    return "\n".join(text)


def parse(argv: list[str]) -> tuple[argparse.Namespace, Setting]:
    """The command line, checked. Raises Mistake."""
    parser = covidgan.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parts", nargs="+", choices=tuple(BENCHES), help="all by default; with --quick all but scaling")
    option("--quick", action="store_true", help="reduced sizes, fewer rounds")
    option("--compile", action="store_true", help="also torch.compile, which takes minutes to start")
    option("--checkpoint", type=Path, help="a trained generator for synth, instead of random weights")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch")
    option("--provider", choices=tuple(infer_onnx.PROVIDERS), default="cpu", help="of ONNX Runtime")
    option("--json", type=Path, metavar="FILE", help="write all figures there")
    option("--out", type=Path, default=Path("out/bench"), help="folder of the picture")
    for field in dataclasses.fields(Setting):
        if field.type is int:
            option("--" + field.name.replace("_", "-"), type=int, metavar="N", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Setting)}
    given = {name: value for name, value in given.items() if value is not None}
    setting = dataclasses.replace(QUICK if args.quick else FULL, **given)
    if setting.eval_pairs % 3:
        raise Mistake(f"--eval-pairs {setting.eval_pairs}: give a multiple of 3, the phantom's patients")
    if min(v for v in dataclasses.astuple(setting) if isinstance(v, int)) < 1:
        raise Mistake("sizes, widths, rounds: give 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda: no CUDA device here, leave it out")
    if args.checkpoint and not args.checkpoint.is_file():
        raise Mistake(f"{args.checkpoint}: no such checkpoint: python covidgan.py --stage all writes out/ckpt.pt")
    args.parts = args.parts or [part for part in BENCHES if not (args.quick and part == "scaling")]
    return args, setting


def main(argv: list[str]) -> None:
    """Run the parts, print the tables, write the JSON."""
    args, setting = parse(argv)
    results: dict[str, Any] = {"machine": machine(args), "setting": dataclasses.asdict(setting), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            results["parts"][part] = found = BENCHES[part](setting, args, Path(folder))
            for key in (*GOALS, *MORE_FIGURES):
                if key in found:
                    told = isinstance(found[key], dict)
                    results[key] = found[key]["median"] if told else found[key]
                    results[key + "_spread"] = found[key] if told else None
    print(report(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1, default=str) + "\n"
        covidgan.write_atomically(args.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
