"""How fast, how lean, how close to what this machine can do: ratios of processes that take turns, and their spread.

    python bench.py --json bench.json       # all parts at full widths: minutes on two CPU cores
    python bench.py --quick                 # the same at reduced sizes, fewer rounds

    train     a joint step against the plain step (PlainStep)           train_step_ratio, train_memory_ratio
    synth     export.py's files, random weights, against PyTorch        synth_fp32_ratio, synth_threads_ratio
    infer     infer_onnx.py, PNG and all, against its bare model        infer_efficiency, infer_whole

Each contender runs in a process of its own, and they take turns: if the machine's speed drifts, it drifts for all. A
ratio is taken round by round: its median, then its least and greatest value. Memory is the process's peak less what it
held before any network was built; with --device cuda it is PyTorch's alone.

Two ceilings take turns with them: PyTorch's product of large matrices, and a copy in memory. "of peak" is the share of
the product's fastest round in the same precision; --target cpu does less arithmetic (Winograd), and so has no share.
"""

import argparse
import json
import multiprocessing
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import covidgan
import export
import infer_onnx
from covidgan import Mistake
from data.runtime import ort

HERE = Path(__file__).resolve().parent
GOALS = {"train_step_ratio": "at most 0.4", "train_memory_ratio": "at most 0.6"}
GOALS |= {"synth_fp32_ratio": "at least 1.9", "infer_efficiency": "at least 0.9"}
FULL = dict(rounds=5, train_size=256, train_width=64, batch=4, synth_size=512, synth_width=64, slices=33)
QUICK = dict(rounds=3, train_size=128, train_width=32, batch=4, synth_size=256, synth_width=32, slices=60)
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that is a ceiling
COPIED = 2**28  # bytes of the copy that is one
PRODUCTS = 4  # in a row: a single short run is no ceiling, its caches are cold
PAUSE = 0.2  # seconds between runs: threads of the previous one spin for a moment, and would get in the way
COLUMNS = 100  # printed at most

Work = Callable[[], Any]
Maker = Callable[[], tuple[Work, dict[str, Any]]]  # called in the contender's process: what to time, and facts about it
Rows = dict[str, dict[str, Any]]  # contender -> seconds [rounds], net_bytes and its facts


# ------------------------------------------------------------------------------------------------ taking turns

held: dict[str, Any] = {}  # in a contender's process: its work, and bytes before it


def interleave(contenders: dict[str, Maker], rounds: int, title: str, device: str = "cpu") -> Rows:
    """Run every contender in a process of its own, once per round, in turn. Raises Mistake where one dies."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory and threads
    rows, pools = {}, {name: ProcessPoolExecutor(1, context) for name in contenders}
    try:
        for name, make in contenders.items():
            rows[name] = {"seconds": [], **pools[name].submit(build, make).result()}
        for name in tqdm([*contenders] * rounds, desc=title, leave=False):
            time.sleep(PAUSE)
            rows[name]["seconds"].append(pools[name].submit(again, device).result())
        for name in contenders:
            rows[name]["net_bytes"] = pools[name].submit(peak, device).result()
    except BrokenProcessPool as error:
        raise Mistake(f"{name}: died, out of memory perhaps: try --quick") from error
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
    return rows


def build(make: Maker) -> dict[str, Any]:
    """Make a contender, run it once to warm it up, and give the facts about it."""
    held["before"] = memory("VmRSS")
    held["work"], facts = make()
    held["work"]()
    return facts


def again(device: str) -> float:
    """Seconds of one more run."""
    begun = time.perf_counter()
    held["work"]()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak(device: str) -> int:
    """Most bytes that the contender has held."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM") - held["before"]


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" the peak so far. 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def ratio(over: ArrayLike, under: ArrayLike) -> dict[str, float]:
    """Median, least and greatest of the rounds' ratios."""
    values = np.divide(over, under)
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def ceilings(device: str) -> dict[str, Maker]:
    """What the other contenders of a rotation are compared with."""
    makers = {"copy": partial(make_copy, device), "product": partial(make_product, "float32", device)}
    if covidgan.uses_bf16(covidgan.Config(), torch.device(device)):
        makers["product, bf16"] = partial(make_product, "bfloat16", device)
    return makers


def make_product(dtype: str, device: str) -> tuple[Work, dict]:
    """Products of two large matrices."""
    n = MATRIX[device]
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return (lambda: [a @ b for _ in range(PRODUCTS)]), {"flop": PRODUCTS * 2 * n**3, "dtype": dtype, "ceiling": True}


def make_copy(device: str) -> tuple[Work, dict]:
    """A copy that fits no cache: each byte is read and written."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source), {"bytes": 2 * COPIED}


def with_shares(rows: Rows) -> Rows:
    """Add to rows whose arithmetic is known FLOP per second, and their share of the ceiling in the same precision."""
    computing = [row for row in rows.values() if "flop" in row]
    peaks = {row["dtype"]: row["flop"] / min(row["seconds"]) for row in computing if "ceiling" in row}
    for row in computing:
        row["flop_per_second"] = row["flop"] / float(np.median(row["seconds"]))
        row["share"] = row["flop_per_second"] / peaks[row["dtype"]]
    return rows


def counted(work: Work) -> int:
    """Floating-point operations of one run, counting 2 for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------ training


class PlainStep:
    """The yardstick: a joint step of the same networks and losses, written the way pix2pixHD writes it.

    fp32 in the contiguous layout, activations in place, unfused Adam, and three passes of the discriminators: the
    synthesis detached from the generator, the real image, and the synthesis again, for the generator. Each player's
    backward pass fills all gradients that it reaches, also D's from the generator's loss, which are then thrown away.
    """

    def __init__(self, c: covidgan.Config) -> None:
        self.c, self.method = c, covidgan.build(covidgan.Covidgan, c).to(c.device)
        for module in self.method.modules():
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                module.inplace = True
        players = self.method.players("joint")
        settings = dict(lr=c.lr, betas=(c.adam_beta1, c.adam_beta2))
        self.opt_d = torch.optim.Adam(players.pop("d").parameters, **settings)
        self.opt_g = torch.optim.Adam([p for player in players.values() for p in player.parameters], **settings)

    def __call__(self, onehot: Tensor, target: Tensor) -> dict[str, float]:
        """Update both players from onehot [B, n_labels, H, W] and target [B, 1, H, W]; returns losses d and g."""
        c, judge = self.c, self.method.d
        image, _ = self.method.g(onehot)
        image, target = (self.method.seen_by_d(x, onehot) for x in (image, target))
        apart, real, fake = judge(onehot, image.detach()), judge(onehot, target), judge(onehot, image)
        loss_d, _ = covidgan.gan_losses(real, apart, c.gan)
        _, loss_gan = covidgan.gan_losses(real, fake, c.gan)
        loss_dfm, loss_beta, _ = self.method.dfm(real, fake)
        loss_g = loss_gan + c.lambda_dfm * loss_dfm
        self.opt_g.zero_grad()
        (loss_g + loss_beta).backward()
        self.opt_g.step()
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()
        return {"d": loss_d.item(), "g": loss_g.item()}


def make_training(kind: str, c: covidgan.Config) -> tuple[Work, dict]:
    """A training step: "ours" with its augmentation, as covidgan.py runs it, or "plain" without."""
    if kind == "ours":
        step = covidgan.Trainer(covidgan.Covidgan, c).step
        bf16 = covidgan.uses_bf16(c, torch.device(c.device))
        return step, {"dtype": "bfloat16" if bf16 else "float32", "flop": counted(step)}
    names = covidgan.read_split(Path(c.data), 0)["train"]
    side = covidgan.load_slices(Path(c.data), [names[k % len(names)] for k in range(c.batch)], c)
    target = covidgan.lung_target(covidgan.window(side.hu, c), side.labels).to(c.device)
    onehot = covidgan.one_hot(side.labels.to(c.device), c.n_labels)
    step = partial(PlainStep(c), onehot, target)
    return step, {"dtype": "float32", "flop": counted(step)}


def bench_train(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The joint step: ours and the plain one."""
    size, width, data = args.train_size, args.train_width, str(make_phantom(folder, args.train_size))
    options = dict(size=size, ngf=width, ndf=width, batch=args.batch, stage="joint", data=data, device=args.device)
    makers = {kind: partial(make_training, kind, covidgan.Config(**options)) for kind in ("plain", "ours")}
    rows = with_shares(interleave(ceilings(args.device) | makers, args.rounds, "train", args.device))
    plain, ours = rows["plain"], rows["ours"]
    figures = {"train_step_ratio": ratio(ours["seconds"], plain["seconds"])}
    if plain["net_bytes"]:
        figures["train_memory_ratio"] = ours["net_bytes"] / plain["net_bytes"]
    about = f"{size} x {size}, batch {args.batch}, widths of {width}, ours in {ours['dtype']}"
    return {"about": about, "rows": rows, "figures": figures}


# -------------------------------------------------------------------------------- synthesis, by file and by script


def exported(c: covidgan.Config, folder: Path, fp16: bool = False, target: str = "any") -> Path:
    """The file of a generator with untrained weights: the arithmetic is the same."""
    method = covidgan.build(covidgan.Covidgan, c)
    untrained = {"config": vars(c), "networks": method.state_dict(), "average": method.g.state_dict()}
    path = folder / f"{target}{'_fp16' * fp16}.onnx"
    if not path.exists():  # the part before may have made it
        export.export_generator(untrained, "0" * 64, path, fp16, target)
    return path


def make_torch(c: covidgan.Config, maps: np.ndarray) -> tuple[Work, dict]:
    """The generator in PyTorch and fp32, labels in and HU out."""
    torch.backends.cudnn.allow_tf32 = False  # which has three digits: what others are compared with has seven
    generator, labels = covidgan.build(covidgan.Covidgan, c).generator(), torch.from_numpy(maps)
    deployed = export.DeployedGenerator(generator, c).eval().to(c.device)
    work = torch.inference_mode()(lambda: deployed(labels.to(c.device))[0].cpu())
    return work, {"dtype": "float32", "flop": counted(work)}


def make_onnx(model: Path, maps: np.ndarray, provider: str, threads: int | None = None) -> tuple[Work, dict]:
    """An exported file in ONNX Runtime, as infer_onnx.py runs it; threads: None for one of each core."""
    return partial(infer_onnx.Generator(*infer_onnx.open_session(model, provider, threads)), maps), {}


def bench_synth(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One slice by PyTorch and by every file."""
    size, width, device = args.synth_size, args.synth_width, args.device
    c = covidgan.Config(size=size, ngf=width, ndf=width, device=device)
    maps, plain = export.example_map(1, size, size, c.n_labels), exported(c, folder)
    makers = {
        "PyTorch": partial(make_torch, c, maps),
        "generator.onnx": partial(make_onnx, plain, maps, device),
        "--target cpu": partial(make_onnx, exported(c, folder, target="cpu"), maps, device),
        "--fp16": partial(make_onnx, exported(c, folder, fp16=True), maps, device),
        "one CPU thread": partial(make_onnx, plain, maps, "cpu", 1),
    }
    rows = interleave(ceilings(device) | makers, args.rounds, "synth", device)
    seconds = {name: rows[name]["seconds"] for name in makers}
    for name in makers:
        rows[name]["speedup"] = ratio(seconds["PyTorch"], seconds[name])
    rows["generator.onnx"] |= {"flop": rows["PyTorch"]["flop"], "dtype": "float32"}
    best = max((rows[name]["speedup"] for name in ("generator.onnx", "--target cpu")), key=lambda one: one["median"])
    figures = {"synth_fp32_ratio": best}
    figures["synth_threads_ratio"] = ratio(seconds["one CPU thread"], seconds["generator.onnx"])
    return {"about": f"{size} x {size}, widths of {width}", "rows": with_shares(rows), "figures": figures}


def run(*command: Any) -> None:
    """Run a command quietly. Raises Mistake with its last line where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise Mistake(f"{' '.join(map(str, command))}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def make_phantom(folder: Path, size: int, slices: int = 24) -> Path:
    """Built-in data: slices of three patients."""
    out = folder / f"phantom_{size}_{slices}"
    run(
        sys.executable, HERE / "data/phantom.py", "--size", size, "--patients", 3, "--slices", slices // 3, "--out", out
    )
    return out


def make_infer(options: list[Any], out: Path) -> tuple[Work, dict]:
    """infer_onnx.py as a whole process, each time into a new folder in `out`."""
    return (lambda: run(sys.executable, HERE / "infer_onnx.py", *options, "--out", out / str(time.time_ns()))), {}


def bench_infer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """infer_onnx.py on many maps, less a run on one, against its model alone; infer_whole is with the start-up."""
    size, width, maps = args.synth_size, args.synth_width, make_phantom(folder, args.synth_size, args.slices) / "maps"
    n, first = len([*maps.iterdir()]), min(maps.iterdir())
    model = exported(covidgan.Config(size=size, ngf=width, ndf=width), folder)
    options = ["--model", model, "--provider", args.device]
    makers = {
        "model alone": partial(make_onnx, model, export.example_map(1, size, size, len(covidgan.LABELS)), args.device),
        "infer_onnx.py": partial(make_infer, [maps, *options], folder / "all"),
        "on one map": partial(make_infer, [first, *options], folder / "one"),
    }
    rows = interleave(makers, max(2, args.rounds // 2), "infer")
    rows["infer_onnx.py"]["net_bytes"] = rows["on one map"]["net_bytes"] = None  # of processes not visible from here
    alone, whole, one = (np.array(rows[name]["seconds"]) for name in makers)
    figures = {"infer_efficiency": ratio((n - 1) * alone, whole - one), "infer_whole": ratio(n * alone, whole)}
    return {"about": f"{n} maps of {size} x {size}, widths of {width}", "rows": rows, "figures": figures}


PARTS = {"train": bench_train, "synth": bench_synth, "infer": bench_infer}


def machine(device: str) -> str:
    """The machine that this ran on."""
    info = Path("/proc/cpuinfo")  # of Linux
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    words = [named[1] if named else platform.processor(), f"{infer_onnx.usable_cores()} cores"]
    words += [torch.cuda.get_device_name()] if device == "cuda" else []
    words += ["bfloat16"] if covidgan.uses_bf16(covidgan.Config(), torch.device(device)) else []
    return ", ".join([*words, f"torch {torch.__version__}", f"onnxruntime {ort.__version__}"])


def shown(value: Any) -> str:
    """A ratio, for people to read."""
    whole = "{median:.2f} ({min:.2f}..{max:.2f})"
    return whole.format(**value) if isinstance(value, dict) else f"{value:.2f}"


def report(part: str, found: dict[str, Any]) -> str:
    """A part's table, then its figures beside their goals."""
    lines = ["", f"{part}: {found['about']}", f"{'':15}{'ms':>24}{'MB':>7}{'GFLOP/s':>9}{'of peak':>9}"]
    for name, row in found["rows"].items():
        ms = 1000 * np.array(row["seconds"])
        line = f"{name:15}{f'{np.median(ms):.0f} ({ms.min():.0f}..{ms.max():.0f})':>24}"
        line += f"{row['net_bytes'] / 1e6:7.0f}" if row.get("net_bytes") is not None else " " * 7
        line += f"{row['flop_per_second'] / 1e9:9.0f}{row['share']:9.2f}" if "share" in row else " " * 18
        line += f"  {row['bytes'] / min(row['seconds']) / 1e9:.1f} GB/s" if "bytes" in row else ""
        line += f"  {shown(row['speedup'])} x" if "speedup" in row else ""
        lines.append(line.rstrip())
    for key, value in found["figures"].items():
        lines.append(f"{key:22} {shown(value):20} {GOALS.get(key, '')}".rstrip())
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    option = parser.add_argument
    option("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="run only these")
    option("--quick", action="store_true", help="reduced sizes, fewer rounds")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="device of PyTorch and ONNX Runtime")
    option("--json", type=Path, metavar="FILE", help="write all figures there")
    for name in FULL:
        key = "--" + name.replace("_", "-")
        option(key, type=int, default=argparse.SUPPRESS, help=f"{FULL[name]}, with --quick {QUICK[name]}")
    given = vars(parser.parse_args(argv))
    return argparse.Namespace(**(QUICK if given["quick"] else FULL) | given)


def main(argv: list[str]) -> None:
    """Run the parts, print the tables, write the JSON."""
    args = parse(argv)
    results = {"machine": machine(args.device), "setting": {name: vars(args)[name] for name in FULL}, "parts": {}}
    print(textwrap.fill(results["machine"], COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            found = results["parts"][part] = PARTS[part](args, Path(folder))
            print(report(part, found), flush=True)
            results |= {key: one["median"] if isinstance(one, dict) else one for key, one in found["figures"].items()}
            if args.json:  # after each part, lest a later one's fault lose it
                text = json.dumps(results, indent=1) + "\n"
                covidgan.write_atomically(args.json, lambda unfinished, text=text: unfinished.write_text(text))


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
