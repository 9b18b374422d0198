"""What only an NVIDIA GPU can show: training and synthesis on it agree with the CPU. Skipped where there is none."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, draw_map
from test_training import stats_of
from torch import nn

import covidgan
import infer_onnx
from covidgan import Covidgan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
needs_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="ONNX Runtime without CUDA"
)
SMALL = dict(size=64, batch=4, ngf=8, ndf=8, channels=8, n_blocks=1, n_local_blocks=1, contrast=0.0)
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def make(toy, tmp_path, monkeypatch):
    """A small Trainer: make(method, device, ...). float32 has all its digits: TF32, the default, has three."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def trainer(method=Covidgan, device="cuda", dtype="float32", **more):
        small = {name: value for name, value in SMALL.items() if name in method.options.__dataclass_fields__}
        common = dict(data=str(toy.folder), out=str(tmp_path / "out"), device=device, dtype=dtype)
        return covidgan.Trainer(method, method.options(**common, **small, **more))

    return trainer


def figures_and_gradients(trainer, batch):
    """Losses of a step on a batch, and the gradient of each player, flattened, on the CPU."""
    for module in trainer.method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each device draws its own
    target, labels = (part.to(trainer.device) for part in batch)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
        losses = trainer.method.losses(covidgan.one_hot(labels, 4), target, trainer.stage)
    trainer.backward(losses)
    drawn = {p for name, p in trainer.method.named_parameters() if name.endswith("noise")}  # SEAN's: each device's own
    gradients = {}
    for name, player in trainer.players.items():
        moved = [p.grad.flatten().cpu() for p in player.parameters if p.grad is not None and p not in drawn]
        gradients |= {name: torch.cat(moved)} if moved else {}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def test_a_step_of_each_method_has_the_losses_and_gradients_of_the_cpu(make):
    from paper import segment
    from paper.methods import METHODS

    for method in (Covidgan, *METHODS.values(), segment.Segmentation):
        stage = {"stage": "joint"} if "joint" in method.stages(method.options()) else {}
        cpu = make(method, "cpu", **stage)
        batch = cpu.batch()
        losses, gradients = figures_and_gradients(cpu, batch)
        losses_gpu, gradients_gpu = figures_and_gradients(make(method, **stage), batch)
        assert losses_gpu == pytest.approx(losses, rel=1e-4, abs=1e-5), method.name
        assert gradients.keys() == gradients_gpu.keys() and gradients
        for player, gradient in gradients.items():
            assert (gradients_gpu[player] - gradient).norm() <= 1e-2 * gradient.norm(), (method.name, player)


@pytest.mark.parametrize("stage", ["g1", "g2", "joint"])
def test_bfloat16_is_near_plain_float32(stage, make):
    plain, fast = make(stage=stage), make(stage=stage, dtype="auto")
    batch = plain.batch()
    exact, near = figures_and_gradients(plain, batch)[0], figures_and_gradients(fast, batch)[0]
    assert near == (pytest.approx(exact, rel=0.05, abs=0.02) if fast.bf16 else pytest.approx(exact, rel=1e-3, abs=1e-4))


def test_a_figure_that_is_not_finite_moves_no_weight(make):
    class Poisoned(Covidgan):
        def losses(self, *batch):
            return super().losses(*batch) | {"alpha": torch.tensor(float("nan"), device="cuda")}

    trainer = make(Poisoned)
    before = {name: weight.clone() for name, weight in trainer.method.state_dict().items()}
    with pytest.raises(covidgan.Mistake, match="not finite"):
        trainer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.method.state_dict().items())


def test_a_run_goes_on_where_it_stopped_and_its_checkpoint_on_a_cpu(toy, small_run, tmp_path, stop_after, cli):
    """The loss of every step is that of an unstopped run, but for rounding."""
    run = [*small_run, "--device", "cuda", "--data", toy.folder, "--out"]
    assert cli(*run, tmp_path / "whole").status == 0
    stop_after(4, [*run, tmp_path / "stopped"])
    assert cli("--resume", "--out", tmp_path / "stopped", "--device", "cuda").status == 0
    for one, other in zip(*(stats_of(tmp_path / out) for out in ("whole", "stopped")), strict=True):
        assert (one["stage"], one["step"], one["g"]) == (other["stage"], other["step"], pytest.approx(other["g"], 0.02))
    done = cli("--resume", "--epochs", 3, "--out", tmp_path / "whole", env=NO_GPU)
    assert done.status == 0, done.stderr


# ---- ONNX Runtime


@needs_provider
@pytest.mark.parametrize(("half", "off"), [(False, 1), (True, 12)])
def test_slices_of_the_cuda_provider_are_those_of_the_cpu_one_size_after_another(half, off, whole_run, tmp_path, cli):
    model = tmp_path / "generator.onnx"
    options = [whole_run[0] / "ckpt.pt", "-o", model, *["--fp16"] * half]
    assert cli(*options, script=ROOT / "export.py", env=NO_GPU).status == 0
    cpu = infer_onnx.Generator(*infer_onnx.open_session(model, "cpu"))
    session, info = infer_onnx.open_session(model)
    assert session.get_providers()[0] == "CUDAExecutionProvider"  # where nothing is said
    gpu = infer_onnx.Generator(session, info)
    for k, (height, width) in enumerate(((128, 128), (64, 64), (128, 128), (100, 140), (64, 64))):
        labels = np.stack([draw_map(height, width, shift=k)])
        assert np.abs(gpu(labels).astype(int) - cpu(labels).astype(int)).max() <= off
