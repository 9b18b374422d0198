"""What only an NVIDIA GPU can show: training and synthesis on it agree with the CPU. Skipped where there is none."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, draw_map
from torch import nn

import covidgan
import export
import infer_onnx
from data.slices import read_image, write_map
from paper import segment
from paper.methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
needs_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="ONNX Runtime without CUDA"
)


ALL = {"covidgan": covidgan.Covidgan, **METHODS, "unet": segment.Segmentation}


@pytest.fixture
def full_precision(monkeypatch):
    """float32 in all its digits: convolutions take TF32 by default, which has three."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def make(toy, tmp_path):
    """A small Trainer: make(method, device, dtype)."""

    def trainer(method, device, dtype="float32", **more):
        small = {"ngf": 8, "ndf": 8, "channels": 8, "n_blocks": 1, "n_local_blocks": 1, "contrast": 0.0} | more
        fields = method.options.__dataclass_fields__
        small = {name: value for name, value in small.items() if name in fields}
        common = dict(data=str(toy.folder), out=str(tmp_path / "out"), size=64, batch=4, epochs=1, epoch_len=40)
        return covidgan.Trainer(method, method.options(**common, **small, device=device, dtype=dtype))

    return trainer


def without_dropout(method):
    """Set dropout aside: each device draws its own."""
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def figures_and_gradients(trainer, batch):
    """Losses of a step on a batch, and the gradient of each player, flattened, on the CPU."""
    without_dropout(trainer.method)
    target, labels = (part.to(trainer.device) for part in batch)
    onehot = covidgan.one_hot(labels, trainer.c.n_labels)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
        losses = trainer.method.losses(onehot, target, trainer.stage)
    trainer.backward(losses)
    drawn = {p for name, p in trainer.method.named_parameters() if name.endswith("noise")}  # SEAN's: each device's own
    gradients = {}
    for name, player in trainer.players.items():
        moved = [p.grad.flatten().cpu() for p in player.parameters if p.grad is not None and p not in drawn]
        gradients |= {name: torch.cat(moved)} if moved else {}
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("name", ALL)
def test_a_step_has_the_losses_and_gradients_of_the_cpu(name, make, full_precision):
    method, found = ALL[name], []
    stage = {"stage": "joint"} if "joint" in method.stages(method.options()) else {}
    batch = make(method, "cpu", **stage).batch()[:2]
    for device in ("cpu", "cuda"):
        found.append(figures_and_gradients(make(method, device, **stage), batch))
    (losses, gradients), (losses_gpu, gradients_gpu) = found
    assert losses_gpu == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert gradients.keys() == gradients_gpu.keys() and gradients
    for player, gradient in gradients.items():
        assert (gradients_gpu[player] - gradient).norm() <= 1e-2 * gradient.norm(), player


@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_bfloat16_on_the_gpu_is_near_float32(stage, make):
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not compute in bfloat16")
    batch = make(covidgan.Covidgan, "cpu", stage=stage).batch()[:2]
    exact, _ = figures_and_gradients(make(covidgan.Covidgan, "cuda", stage=stage), batch)
    trainer = make(covidgan.Covidgan, "cuda", "auto", stage=stage)
    assert trainer.bf16
    assert figures_and_gradients(trainer, batch)[0] == pytest.approx(exact, rel=0.05, abs=0.02)


def test_augmentation_on_the_gpu_keeps_image_and_map_aligned(make):
    """HU over lung without lesions stay those of lung, and no label is invented."""
    trainer = make(covidgan.Covidgan, "cuda")
    target, labels, _ = trainer.batch()
    assert target.is_cuda and labels.dtype == torch.uint8
    assert {*labels.unique().tolist()} <= {0, 1, 2, 3}
    hu = (target + 1) / 2 * trainer.c.width + trainer.c.level - trainer.c.width / 2
    assert float(hu[labels == 1].mean()) == pytest.approx(-850, abs=30)  # what the toy's lungs are drawn with
    assert float(target[labels == 0].max()) == -1


def test_a_run_on_the_gpu_goes_on_where_it_stopped(toy, tmp_path, stop_after, cli):
    """Same steps, same batches, same draws: the loss of every step is that of an unstopped run, but for rounding."""
    options = ["--preset", "tiny", "--device", "cuda", "--dtype", "float32", "--n-blocks", "1", "--batch", "4"]
    options += ["--epochs", "1", "--epoch-len", "24", "--interval", "2", "--data", str(toy.folder), "--out"]
    covidgan.main([*options, str(tmp_path / "whole")])
    stop_after(4, [*options, str(tmp_path / "stopped")], covidgan.Covidgan)
    covidgan.main(["--resume", "--out", str(tmp_path / "stopped"), "--device", "cuda"])
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / out / "stats.jsonl").read_text().splitlines()]
        for out in ("whole", "stopped")
    )
    assert [(line["stage"], line["step"]) for line in whole] == [(line["stage"], line["step"]) for line in stopped]
    for one, other in zip(whole, stopped, strict=True):
        assert other["g"] == pytest.approx(one["g"], rel=0.02), one["step"]


def test_a_checkpoint_of_the_gpu_is_read_and_exported_on_a_cpu(toy, tmp_path, cli):
    options = ["--preset", "tiny", "--device", "cuda", "--epoch-len", "8", "--n-blocks", "1", "--data", toy.folder]
    assert cli("--stage", "all", *options, "--out", tmp_path / "out").status == 0
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    model = tmp_path / "generator.onnx"
    done = cli(tmp_path / "out" / "ckpt.pt", "-o", model, script=ROOT / "export.py", env=hidden)
    assert done.status == 0, done.stderr  # it has compared the file with PyTorch
    resumed = cli("--resume", "--epochs", "2", "--out", tmp_path / "out", env=hidden)
    assert resumed.status == 0, resumed.stderr


def test_compiled_networks_have_the_losses_of_plain_ones(make, full_precision, request):
    if not request.config.getoption("--long"):
        pytest.skip("compiles for a minute: --long")
    plain = make(covidgan.Covidgan, "cuda", stage="joint")
    batch = make(covidgan.Covidgan, "cpu", stage="joint").batch()[:2]
    compiled = make(covidgan.Covidgan, "cuda", stage="joint", compile=True)
    assert figures_and_gradients(compiled, batch)[0] == pytest.approx(
        figures_and_gradients(plain, batch)[0], rel=1e-3, abs=1e-4
    )


# ---- synthesis


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """The paper's generator at a quarter of its widths, untrained, as files in float32 and float16."""
    folder = tmp_path_factory.mktemp("generators")
    c = covidgan.Config(size=128, ngf=16, ndf=16, n_blocks=2)
    networks = covidgan.build(covidgan.Covidgan, c).state_dict()
    checkpoint = {"method": covidgan.Covidgan.name, "config": vars(c), "networks": networks}
    for name, half in (("float32", False), ("float16", True)):
        export.export_generator(checkpoint, "0" * 64, folder / f"{name}.onnx", half)
    return {name: folder / f"{name}.onnx" for name in ("float32", "float16")}


@pytest.fixture
def maps(tmp_path):
    """Eleven maps of three sizes: more than a batch, and batches that are not full."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for k, size in enumerate([(128, 128)] * 9 + [(100, 140), (66, 160)]):
        write_map(folder / f"P{k:02d}_S001.png", draw_map(*size, shift=k))
    return folder


@needs_provider
@pytest.mark.parametrize(
    ("kind", "options", "off"),
    [("float32", [], 1), ("float32", ["--batch", "3"], 1), ("float32", ["--cuda-graph"], 1), ("float16", [], 12)],
)
def test_slices_of_the_cuda_provider_are_those_of_the_cpu(kind, options, off, generators, maps, tmp_path):
    for provider, more in (("cpu", []), ("cuda", options)):
        out = ["--out", str(tmp_path / provider), "--model", str(generators[kind]), "--provider", provider]
        assert infer_onnx.main([str(maps), *out, *more]) == 0
    names = sorted(path.name for path in (tmp_path / "cpu" / "images").iterdir())
    assert len(names) == 11
    for name in names:
        ours, theirs = (read_image(tmp_path / provider / "images" / name) for provider in ("cuda", "cpu"))
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= off, name


@needs_provider
def test_the_gpu_is_taken_where_nothing_is_said(generators, capfd):
    session, _ = infer_onnx.open_session(generators["float32"])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    assert "runs on cuda" in capfd.readouterr().err


@needs_provider
def test_one_size_after_another_gives_each_its_own_slices(generators):
    """Bindings are kept by shape: a size that comes again must not get what an earlier one left in its memory."""
    maps = [np.stack([draw_map(side, side, shift=k)]) for k, side in enumerate((128, 64, 128, 96, 64))]
    cpu = infer_onnx.Generator(*infer_onnx.open_session(generators["float32"], "cpu"))
    for graph_batch in (None, 2):
        wanted = dict(graphs=graph_batch is not None)
        gpu = infer_onnx.Generator(*infer_onnx.open_session(generators["float32"], "cuda", **wanted), graph_batch)
        for labels in maps:
            assert np.abs(gpu(labels).astype(int) - cpu(labels).astype(int)).max() <= 1


@needs_provider
def test_figures_of_the_cuda_provider_are_those_of_the_cpu(toy, tmp_path, cli):
    found = []
    for provider in ("cpu", "cuda"):
        path = tmp_path / f"{provider}.json"
        options = ["--provider", provider, "--out", tmp_path / provider, "--json", path]
        done = cli(toy.folder, toy.folder, *options, script=ROOT / "eval.py")
        assert done.status == 0, done.stderr
        found.append(json.loads(path.read_text())["pixels"])
    for name, figure in found[0].items():
        assert found[1][name]["mean"] == pytest.approx(figure["mean"], rel=1e-4, abs=1e-6), name


# ---- the benchmark


def test_the_benchmark_runs_on_the_gpu(tmp_path, cli):
    sizes = "--rounds 2 --train-size 64 --train-width 8 --batch 2 --synth-size 64 --synth-width 8 --slices 3"
    parts = ["train", "synth", *["infer"] * ("CUDAExecutionProvider" in ort.get_available_providers())]
    options = [*f"--device cuda --quick {sizes}".split(), "--parts", *parts, "--json", tmp_path / "bench.json"]
    done = cli(*options, script=ROOT / "bench.py", timeout=300)
    assert done.status == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert torch.cuda.get_device_name() in found["machine"]
    assert found["train_step_ratio"] > 0 and found["train_memory_ratio"] > 0
