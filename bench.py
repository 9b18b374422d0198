"""How fast is a training step, and a synthesis? Processes that take turns, and the ratios of their times.

    python bench.py --json bench.json                 # minutes on two CPU cores; --quick at reduced sizes
    python bench.py --device cuda --json gpu.json     # an NVIDIA GPU at the paper's size, ten minutes: make gpu

    tests           tests/test_gpu.py, only with --device cuda
    joint, g1, g2   a training step of preset paper; the joint one against the plain one, PlainStep
    synth           slices by PyTorch, and by export.py's files in ONNX Runtime; random weights

Each contender runs in a process of its own, and they take turns: if the machine's speed drifts, it drifts for all. A
ratio is taken round by round: its median, then its least and greatest value. On a GPU one follows the other, as all may
not fit into its memory, of which PyTorch's is told; a round is eight runs and one wait; what fails is told, and stops
no other. "Of peak" is the share of the fastest round of PyTorch's product of two large matrices.

FILE holds a part as soon as it has ended. The same command measures what FILE lacks, if machine, code and setting are
its own, else all; --parts measures what it names, again if need be.
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import covidgan
import export
import infer_onnx
from covidgan import Mistake
from data.runtime import ort

HERE = Path(__file__).resolve().parent
CPU = dict(rounds=5, train_size=256, train_width=64, batch=4, synth_size=512, synth_width=64)
CUDA = CPU | dict(rounds=3, train_size=512, batch=16)
QUICK = dict(rounds=3, train_size=128, train_width=32, batch=4, synth_size=256, synth_width=32)
RUNS = {"cpu": 1, "cuda": 8}  # of a round, and before the first: past the step that records a CUDA graph
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that is a ceiling
KERNELS = {  # what a GPU spends a step on, by words in its kernels' names; the first that fits
    "fused": "triton",
    "copies, casts": "copy|nchwTo|nhwcTo|Memcpy|CatArray",
    "norms, padding": "norm|bn_|pad",
    "convolutions": "conv|gemm|xmma|cutlass|fprop|dgrad|wgrad",
    "elementwise": "elementwise",
}

Work = Callable[[], Any]
Maker = Callable[[], tuple[Work, dict[str, Any]]]  # called in the contender's process: what to time, and facts about it
Rows = dict[str, dict[str, Any]]  # contender -> seconds [rounds], net_bytes and its facts; or why it has failed

held: dict[str, Any] = {}  # in a contender's process: its work


def measure(contenders: dict[str, Maker], rounds: int, title: str, device: str = "cpu") -> Rows:
    """Run each contender in its own process, on a CPU in turn. Of what fails on a GPU why, on a CPU raises Mistake."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory and threads
    rows, pools = {}, {name: ProcessPoolExecutor(1, context) for name in contenders}
    try:
        for pool in pools.values():
            pool.submit(int)  # all import torch at once
        for names in [[*contenders]] if device == "cpu" else [[name] for name in contenders]:
            try:
                for name in names:
                    rows[name] = {"seconds": [], **pools[name].submit(build, contenders[name], device).result()}
                for name in tqdm(names * rounds, desc=title, leave=False):
                    rows[name]["seconds"].append(pools[name].submit(again, device).result())
                if device == "cuda" and "ceiling" not in rows[name]:
                    rows[name] |= pools[name].submit(spent, 0 if "graph" in name else 3).result()
            except Exception as error:  # of any kind: what it told, and the others' figures, are worth having
                if device == "cpu":
                    raise Mistake(f"{name}: {error!r:.400}: if memory is short, try --quick") from error
                rows[name] = {**rows.get(name, {}), "failed": f"{error!r:.400}"}
            for name in names:
                pools[name].shutdown()  # the next may want its memory
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
    return rows


def build(make: Maker, device: str) -> dict[str, Any]:
    """Make a contender, run it to warm it up, and give the facts about it."""
    held["work"], facts = make()
    for _ in range(RUNS[device]):
        held["work"]()
    return facts


def again(device: str) -> float:
    """Seconds of a run, one of a round's."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    time.sleep(0.2)  # threads of who ran before spin for a moment, and would get in the way
    wait()
    begun = time.perf_counter()
    for _ in range(RUNS[device]):
        held["work"]()
    wait()
    return (time.perf_counter() - begun) / RUNS[device]


def spent(runs: int) -> dict[str, Any]:
    """Bytes that PyTorch has held of a GPU at most; ms of a run in each of KERNELS, and by kernel; else by operator."""
    net_bytes = torch.cuda.max_memory_allocated() if (on_gpu := torch.cuda.is_available()) else 0
    if not runs:
        return {"net_bytes": net_bytes}
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            held["work"]()  # the profiler's end waits for the device
    groups, alone = dict.fromkeys([*KERNELS, "others"], 0.0), {}
    for event in profiler.key_averages():
        if (event.device_type != DeviceType.CPU) == on_gpu:  # on a GPU not what launches kernels
            alone[event.key] = (event.self_device_time_total + event.self_cpu_time_total) / 1000 / runs
            group = next((name for name, words in KERNELS.items() if re.search(words, event.key)), "others")
            groups[group] += alone[event.key]
    dearest = sorted(alone, key=alone.get, reverse=True)[:15]
    return {"net_bytes": net_bytes, "kernels": groups, "dearest": {name[:100]: alone[name] for name in dearest}}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds' ratios."""
    values = np.divide(over, under)
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def make_product(dtype: str, device: str) -> tuple[Work, dict]:
    """Products of two large matrices."""
    n, kind = MATRIX[device], torch.bfloat16 if dtype == "bfloat16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    # four in a row: a single short run is no ceiling, its caches are cold
    return (lambda: [a @ b for _ in range(4)]), {"flop": 4 * 2 * n**3, "dtype": dtype, "ceiling": True}


def with_shares(rows: Rows, base: str = "") -> Rows:
    """Add to rows FLOP per second, their share of the ceiling in that precision, and the speed-up over row `base`."""
    ran = [row for row in rows.values() if "failed" not in row]
    peaks = {row["dtype"]: row["flop"] / min(row["seconds"]) for row in ran if "ceiling" in row}
    for row in ran:
        if "flop" in row:
            row["flop_per_second"] = row["flop"] / float(np.median(row["seconds"]))
            row["share"] = row["flop_per_second"] / peaks.get(row["dtype"], np.nan)
        if rows.get(base) in ran and "ceiling" not in row:
            row["speedup"] = ratio(rows[base]["seconds"], row["seconds"])
    return rows


def counted(work: Work) -> int:
    """Floating-point operations of one run, counting 2 for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# -------------------------------------------------------------------------------------------- what is measured


class PlainStep:
    """The yardstick: a joint step of the same networks and losses, written the way pix2pixHD writes it.

    fp32 in the contiguous layout, activations in place, unfused Adam, three passes of the discriminators: the synthesis
    detached, the real image, the synthesis for the generator; and gradients also of D from G's loss, thrown away.
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


def make_training(kind: str, options: dict[str, Any]) -> tuple[Work, dict]:
    """A training step: "plain", else with its augmentation, as covidgan.py runs it, by words: "graph", "compiled"."""
    c = covidgan.Config(**options, graph="on" if "graph" in kind else "off")
    trainer, full = covidgan.Trainer(covidgan.Covidgan, c), "tf32" if c.device == "cuda" else "float32"
    if kind == "plain":
        trainer.feed()
        target, labels = trainer.batch()
        step, trainer = partial(PlainStep(c), covidgan.one_hot(labels, c.n_labels), target), None  # memory is told
        return step, {"dtype": full, "flop": counted(step)}
    facts = {"dtype": "bfloat16" if trainer.bf16 else full, "flop": counted(trainer.update)}
    if "compiled" in kind:  # each network: of all losses in one, a player would compute the gradients of all players
        torch._functorch.config.donated_buffer = False  # D's graph is gone through by both players
        for network in trainer.method.children():
            network.compile()
    return trainer.update, facts


def steps(stage: str, args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Maker]]:
    """A stage's step: ours, the joint one after the plain one; on a GPU also as one CUDA graph, compiled, and both."""
    size, width, kinds = args.train_size, args.train_width, ["ours", *["graph"] * (args.device == "cuda")]
    if stage == "joint":
        kinds = ["plain", *kinds, *[f"{kind}, compiled" for kind in kinds if args.device == "cuda"]]
    options = dict(size=size, ngf=width, ndf=width, batch=args.batch, stage=stage, device=args.device)
    options |= covidgan.PRESETS["paper"] | {"data": str(make_phantom(folder, size))}
    makers = {kind: partial(make_training, kind, options) for kind in kinds}
    return f"{args.batch} x {size} x {size}, widths of {width}", makers


def exported(c: covidgan.Config, folder: Path, fp16: bool = False) -> Path:
    """The file of a generator with untrained weights: the arithmetic is the same."""
    method = covidgan.build(covidgan.Covidgan, c)
    untrained = {"config": vars(c), "networks": method.state_dict(), "average": method.g.state_dict()}
    path = folder / f"{'half' if fp16 else 'full'}.onnx"
    if not path.exists():  # a contender before may have made it
        export.export_generator(untrained, "0" * 64, path, fp16)
    return path


def make_torch(c: covidgan.Config, maps: np.ndarray, bf16: bool = False, compiled: bool = False) -> tuple[Work, dict]:
    """The generator in PyTorch, labels in and HU out."""
    torch.backends.cudnn.allow_tf32 = False  # which has three digits: what others are compared with has seven
    layout = torch.channels_last if bf16 else torch.contiguous_format
    generator, labels = covidgan.build(covidgan.Covidgan, c).generator(), torch.from_numpy(maps)
    deployed = export.DeployedGenerator(generator, c).eval().to(c.device, memory_format=layout)

    @torch.inference_mode()
    @torch.autocast(c.device, torch.bfloat16, enabled=bf16)
    def work() -> Tensor:
        return deployed(labels.to(c.device))[0].cpu()

    facts = {"dtype": "bfloat16" if bf16 else "float32", "flop": counted(work)}
    if compiled:
        deployed.compile()
    return work, facts


def make_onnx(file: Callable[[], Path], maps: np.ndarray, provider: str) -> tuple[Work, dict]:
    """An exported file in ONNX Runtime, as infer_onnx.py runs it."""
    return partial(infer_onnx.Generator(*infer_onnx.open_session(file(), provider)), maps), {}


def make_graph(file: Callable[[], Path], maps: np.ndarray) -> tuple[Work, dict]:
    """The same as one CUDA graph, which wants its memory of the GPU to stay where it is."""
    path = file()
    options = infer_onnx.provider_options("cuda", infer_onnx.open_session(path, "cuda")[1])
    session = infer_onnx.start(path.read_bytes(), "cuda", options | {"enable_cuda_graph": "1"}, 1)
    if session.get_providers()[0] != infer_onnx.CUDA:
        raise Mistake(f"{path}: ONNX Runtime makes no graph of it")
    given = ort.OrtValue.ortvalue_from_numpy(maps, "cuda", 0)
    ct = ort.OrtValue.ortvalue_from_shape_and_type(maps.shape, np.int16, "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("map", given)
    binding.bind_ortvalue_output("ct", ct)

    def work() -> np.ndarray:
        given.update_inplace(maps)
        session.run_with_iobinding(binding)
        return ct.numpy()

    return work, {}


def syntheses(args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Maker]]:
    """Slices by PyTorch and by every file; on a GPU as many at a time as infer_onnx.py gives it."""
    size, width, on_gpu = args.synth_size, args.synth_width, args.device == "cuda"
    c = covidgan.Config(size=size, ngf=width, ndf=width, device=args.device)
    maps = export.example_map(infer_onnx.CUDA_BATCH if on_gpu else 1, size, size, c.n_labels)
    files = {"generator.onnx": partial(exported, c, folder), "--fp16": partial(exported, c, folder, True)}
    kinds = ["PyTorch", *["compiled", "bf16", "bf16, compiled"] * on_gpu]
    makers = {kind: partial(make_torch, c, maps, "bf16" in kind, "compiled" in kind) for kind in kinds}
    makers |= {name: partial(make_onnx, file, maps, args.device) for name, file in files.items()}
    if on_gpu:
        makers |= {f"{name}, graph": partial(make_graph, file, maps) for name, file in files.items()}
    return f"{len(maps)} x {size} x {size}, widths of {width}", makers


def make_phantom(folder: Path, size: int) -> Path:
    """Built-in data: eight slices of each of three patients."""
    out = folder / f"phantom_{size}"
    options = ["--size", str(size), "--patients", "3", "--slices", "8", "--out", str(out)]
    subprocess.run([sys.executable, HERE / "data/phantom.py", *options], check=True, stdout=subprocess.DEVNULL)
    return out


PARTS = {stage: partial(steps, stage) for stage in ("joint", "g1", "g2")} | {"synth": syntheses}


def bench(part: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a part is about, and its rows; of the tests the summary and, where one fails, the last lines."""
    if part == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rs", HERE / "tests/test_gpu.py"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
        lines = (done.stdout + done.stderr).splitlines()
        return {"about": lines[-1], "rows": {"": {"failed": "\n".join(lines[-60:])}} if done.returncode else {}}
    about, makers = PARTS[part](args, folder)
    full = "tf32" if args.device == "cuda" and part != "synth" else "float32"
    kinds = [full, *["bfloat16"] * covidgan.uses_bf16(covidgan.Config(), torch.device(args.device))]
    products = {f"product, {kind}": partial(make_product, kind, args.device) for kind in kinds}
    rows = measure(products | makers, args.rounds, part, args.device)
    return {"about": about, "rows": with_shares(rows, next(iter(makers)))}


def machine(device: str) -> str:
    """The machine that this ran on."""
    info = Path("/proc/cpuinfo")  # of Linux
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    words = [named[1] if named else "unknown processor", f"{infer_onnx.usable_cores()} cores"]
    if device == "cuda":
        ask = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        driver = subprocess.run(ask, shell=True, capture_output=True, text=True).stdout.split()
        words += [torch.cuda.get_device_name(), *[f"driver {one}" for one in driver[:1]], f"CUDA {torch.version.cuda}"]
    return ", ".join([*words, f"torch {torch.__version__}", f"onnxruntime {ort.__version__}"])


def report(part: str, found: dict[str, Any]) -> str:
    """A part's table, for people to read."""
    lines = ["", f"{part}: {found['about']}", f"{'':18}{'ms':>24}{'MB':>7}{'GFLOP/s':>9}{'of peak':>9}"]
    for name, row in found["rows"].items():
        if "failed" in row:
            lines += [f"{name} failed:", *row["failed"].splitlines()]
            continue
        ms = 1000 * np.array(row["seconds"])
        line = f"{name:18}{f'{np.median(ms):.1f} ({ms.min():.1f}..{ms.max():.1f})':>24}"
        line += f"{row['net_bytes'] / 1e6:7.0f}" if row.get("net_bytes") else " " * 7
        line += f"{row['flop_per_second'] / 1e9:9.0f}{row['share']:9.2f}" if "share" in row else " " * 18
        line += "  {median:.2f} ({min:.2f}..{max:.2f}) x".format(**row["speedup"]) if "speedup" in row else ""
        lines.append(line.rstrip())
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Options not given have the device's values, or those of --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parts", nargs="+", choices=("tests", *PARTS), metavar="PART", help="only these")
    option("--quick", action="store_true", help="reduced sizes, fewer rounds")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="device of PyTorch and ONNX Runtime")
    option("--json", type=Path, metavar="FILE", help="write all figures there, or go on with it")
    for name in CPU:
        key, told = name.replace("_", "-"), f"{CPU[name]}, on a GPU {CUDA[name]}, with --quick {QUICK[name]}"
        option(f"--{key}", type=int, default=argparse.SUPPRESS, help=told)
    given = vars(parser.parse_args(argv))
    usual = QUICK if given["quick"] else CUDA if given["device"] == "cuda" else CPU
    return argparse.Namespace(**usual | given)


def main(argv: list[str]) -> None:
    """Run the parts, print the tables, write the JSON. Raises Mistake where there is no such device, or one fails."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Mistake(f"--device cuda: torch {torch.__version__} finds no CUDA device here: run it where there is one")
    code = b"".join((HERE / name).read_bytes() for name in ("covidgan.py", "export.py", "infer_onnx.py"))
    about = {"machine": machine(args.device), "setting": {name: vars(args)[name] for name in CPU}}
    about["code"] = hashlib.sha256(code).hexdigest()[:12]
    before = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    parts = before["parts"] if {**before, **about} == before else {}
    print(about["machine"])
    usual = ["tests", *PARTS] if args.device == "cuda" else ["joint", "synth"]
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts or [part for part in usual if part not in parts]:
            parts[part] = bench(part, args, Path(folder))
            print(report(part, parts[part]), flush=True)
            if args.json:  # after each part, lest a later one's fault lose it
                text = json.dumps({**about, "parts": parts}, indent=1) + "\n"
                covidgan.write_atomically(args.json, lambda unfinished, text=text: unfinished.write_text(text))
    if failed := [part for part, found in parts.items() if any("failed" in row for row in found["rows"].values())]:
        raise Mistake(f"{', '.join(failed)}: not all of it ran, see above or in FILE; --parts runs it again")


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
