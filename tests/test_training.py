"""The loop from its schedule to resume, bit for bit; its pictures, command line, folder OUT and checkpoints."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import batch_of

import covidgan
from covidgan import Covidgan
from data import slices

STAGES = ("g1", "g2", "joint")


def flatten(tree, path=""):
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(tree, dict | list | tuple):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, sub in parts for k, v in flatten(sub, f"{path}/{key}").items()}
    return {path: tree}


def differing(a, b):
    """Paths of the leaves in which two checkpoints differ, bit by bit; their configs are left out."""
    a, b = ({k: v for k, v in flatten(x).items() if not k.startswith("/config")} for x in (a, b))
    assert a.keys() == b.keys()
    return [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]


def load(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def stats_of(out):
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


# ---- schedule and draws


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (5, 1), (10, 1), (15, 0.5), (19, 0.1), (20, 0)])
def test_learning_rate_is_constant_for_ten_epochs_and_falls_to_zero_in_ten_more(epoch, share):
    assert covidgan.lr_at(epoch * 750, 20 * 750, 2e-4) == pytest.approx(share * 2e-4, abs=1e-12)


def test_an_epoch_shows_every_slice_equally_often_in_whole_shuffles():
    order, again, other = (covidgan.sample_order(300, 12_000, seed) for seed in ([0, 1, 2], [0, 1, 2], [0, 1, 3]))
    assert (np.sort(order.reshape(40, 300)) == np.arange(300)).all()
    assert (order == again).all() and (order != other).any()
    assert {*np.bincount(covidgan.sample_order(7, 17, [0]), minlength=7)} == {2, 3}


def test_every_step_draws_its_own_and_every_epoch_and_stage_has_its_own_order(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=12, resize=1, rotate=0, elastic=0))
    seeds, orders = [], []
    for stage in STAGES:
        trainer.begin(stage)
        for trainer.step_done in range(12):
            seeds += [trainer.step_seed(*more) for more in ((), (1,), (2,))]
            orders += [*batch_of(trainer)[1]] if trainer.step_done % 6 == 0 else []
    assert len({*seeds}) == len(seeds) and len({order.numpy().tobytes() for order in orders}) > 6


def test_a_whole_run_has_its_steps_and_the_scheduled_rates(whole_run):
    lines = stats_of(whole_run[0])
    assert [(line["stage"], line["step"]) for line in lines] == [(s, k) for s in STAGES for k in range(1, 11)]
    assert [line["lr_d"] / 2e-4 for line in lines] == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2] * 3)


def test_optimisers_take_the_rate_of_their_step(tiny):
    """A first step of Adam is the rate itself, whatever the gradient; at the stage's end it has fallen."""
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=20))
    for trainer.step_done, rate in ((0, 2e-4), (19, 2e-5)):
        trainer.optimizers["g"].state.clear()
        before = [p.detach().clone() for p in trainer.method.g.g1.parameters()]
        assert trainer.step()["lr_g"] == pytest.approx(rate)
        moves = [(a - b).abs().max() for a, b in zip(trainer.method.g.g1.parameters(), before, strict=True)]
        assert max(moves).item() == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize(("individual", "steps"), [(1.0, [6, 6, 6]), (0.5, [3, 3, 6]), (0.0, [6])])
def test_individual_training_takes_its_share_or_none(tiny, individual, steps):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=6, individual=individual))
    assert [*trainer.stages] == [*STAGES[-len(steps) :]]
    assert [trainer.begin(stage) or trainer.steps for stage in trainer.stages] == steps


# ---- what training does


def test_training_on_one_slice_learns_it(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=1, lr=2e-3, epochs=2, epoch_len=40, resize=1, rotate=0, elastic=0))
    trainer.train = covidgan.Slices(*(part[3:4] for part in trainer.train))
    real = covidgan.window(trainer.train.hu, trainer.c)[..., ::2, ::2]
    lung = trainer.train.labels[..., ::2, ::2] > 0

    def likeness():
        return np.corrcoef(real[lung], trainer.synthesize(trainer.train.labels, real)[lung])[0, 1]

    assert abs(likeness()) < 0.15
    for _ in range(40):
        trainer.step()
    assert likeness() > 0.3


def test_slices_without_lung_train(own_toy, tiny):
    for name in own_toy.train[1:]:  # all but one
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", np.zeros((64, 64), np.uint8))
    trainer = covidgan.Trainer(Covidgan, tiny(data=str(own_toy.folder), batch=2, stage="joint"))
    assert all(np.isfinite([*trainer.step().values()]).all() for _ in range(3))


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_pictures_are_made_by_the_weights_moving_average(tiny, ema):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, ema=ema))
    trainer.begin("joint")
    mean = {name: p.double() for name, p in trainer.method.g.state_dict().items()}
    for step in range(6):
        trainer.step()
        decay = min(ema, (1 + step) / (10 + step))
        now = trainer.method.g.state_dict()
        mean = {name: decay * mean[name] + (1 - decay) * now[name].double() for name in now}
    labels, fresh = trainer.test.labels[1:3], covidgan.Generator(trainer.c)
    fresh.load_state_dict(mean)
    with torch.no_grad():
        wanted, live = (g(covidgan.one_hot(labels, 4))[0] for g in (fresh, trainer.method.g))
    synthesized = trainer.synthesize(labels, torch.zeros_like(labels))
    assert torch.allclose(synthesized, covidgan.lung_target(wanted, labels), atol=1e-4)
    assert torch.allclose(wanted, live, atol=1e-4) == (ema == 0)


def test_bfloat16_trains_close_to_float32(tiny):
    figures = []
    for dtype in ("float32", "bfloat16"):
        trainer = covidgan.Trainer(Covidgan, tiny(batch=2, dtype=dtype, stage="joint"))
        kinds = []
        trainer.method.g.g1.trunk[1].register_forward_hook(lambda _m, _x, y, kinds=kinds: kinds.append(y.dtype))
        figures.append(trainer.step())
        assert {*kinds} == {getattr(torch, dtype)}
        assert all(p.dtype == torch.float32 for p in trainer.method.parameters())
    for name in ("d", "gan", "dfm"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=0.05)


@pytest.mark.parametrize("figure", ["g", "d", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_moves_no_weight_and_says_where(tiny, figure, value):
    class Poisoned(Covidgan):
        def losses(self, *batch):
            losses = super().losses(*batch)
            return losses | {figure: losses[figure] * self.poison}

    trainer = covidgan.Trainer(Poisoned, tiny(batch=2, stage="joint"))
    trainer.method.poison = 1.0
    trainer.step()
    before = {name: p.clone() for name, p in trainer.method.state_dict().items()}
    trainer.method.poison = value
    with pytest.raises(covidgan.Mistake, match=rf"stage joint, step 2: .*'{figure}': {value}"):
        trainer.step()
    assert differing(before, trainer.method.state_dict()) == []


# ---- stopping and going on


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_a_stage_a_run_goes_on_bit_for_bit(whole_run, toy, small_run, stop_after, here, tmp_path, stage):
    """By SIGTERM in a step; steps written past the checkpoint, and a line cut by a kill, are dropped on the way."""
    stop_after(6, ["--data", toy.folder, "--out", tmp_path, *small_run, "--interval", 99], stage=stage)
    assert (load(tmp_path)["stage"], load(tmp_path)["step"]) == (stage, 7)
    with open(tmp_path / "stats.jsonl", "a") as stats:
        stats.write('{"stage": "joint", "step": 8, "g": 1.0}\n{"stage": "joint", "ste')
    torch.manual_seed(99)  # whatever the process drew meanwhile
    done = here("--resume", "--out", tmp_path)
    assert done.status == 0, done.stderr
    assert differing(load(tmp_path), load(whole_run[0])) == []
    assert stats_of(tmp_path) == stats_of(whole_run[0])
    done = here("--resume", "--out", tmp_path)  # a finished run trains no more
    assert done.status == 0 and differing(load(tmp_path), load(whole_run[0])) == []


def test_stages_one_by_one_are_the_same_as_all_at_once(whole_run, toy, small_run, here, tmp_path):
    for stage in STAGES:
        run = ["--stage", stage, "--data", toy.folder, "--out", tmp_path, *small_run, "--interval", 99]
        assert here(*run, *["--resume"] * (stage != "g1")).status == 0
    assert differing(load(tmp_path), load(whole_run[0])) == []


def test_where_weights_lie_otherwise_in_memory_a_resumed_runs_moments_lie_as_they_do(tiny, tmp_path):
    """Adam, fused, walks through memory."""
    first = covidgan.Trainer(Covidgan, tiny(dtype="bfloat16", out=str(tmp_path)))  # channels last
    (tmp_path / "stats.jsonl").touch()
    first.step()
    torch.save(first.state(), tmp_path / "ckpt.pt")
    second = covidgan.Trainer(Covidgan, tiny(dtype="float32", adam_beta1=0.6, out=str(tmp_path)))
    second.load(tmp_path / "ckpt.pt")
    second.feed()  # the learning rate
    for weight, moments in second.optimizers["g"].state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == weight.stride()
    assert second.optimizers["g"].param_groups[0]["betas"] == (0.6, 0.999)  # the option given, not the checkpoint's
    assert differing(*(trainer.state()["optimizers"]["g"]["state"] for trainer in (first, second))) == []


def test_slices_that_were_trained_on_are_not_tested_after_a_resume(own_toy, small_run, here, tmp_path):
    assert here("--stage", "g1", "--data", own_toy.folder, "--out", tmp_path, *small_run, "--interval", 99).status == 0
    moved = own_toy.train[0]
    slices.write_split(own_toy.folder / "split.json", own_toy.train[1:], [*own_toy.test, moved], [], {})
    done = here("--resume", "--out", tmp_path)
    assert done.status == 2 and moved in done.stderr
    slices.write_split(own_toy.folder / "split.json", own_toy.train[1:], own_toy.test, [], {})
    assert here("--resume", "--out", tmp_path).status == 0
    assert moved in json.loads((tmp_path / "split.json").read_text())["train"]  # it was seen, and stays so


# ---- pictures


def grey(image):
    return np.repeat(np.rint((image.double().numpy() + 1) * 127.5)[..., None], 3, -1)


@pytest.mark.parametrize("side", [64, 32])
def test_a_panel_shows_map_lungs_and_slices_and_completes_the_real_slice_by_the_synthetic_lung(toy, tmp_path, side):
    labels = torch.from_numpy(np.stack([toy.labels[name] for name in toy.test[:2]]))[:, None]
    real, lung = torch.rand(2, 1, 64, 64) * 2 - 1, torch.rand(2, 1, side, side) * 2 - 1
    covidgan.write_panel(tmp_path / "panel.png", labels, real, lung)
    rows = iio.imread(tmp_path / "panel.png").reshape(2, 64, 4, 5, 64, 4, 3)[:, :, 2, :, :, 2]  # of 4 x 4 pixels each
    columns = rows[:, 4:].transpose(2, 0, 1, 3, 4).astype(float)  # below the titles
    labels, real = labels[:, 0, 4:], real[:, 0, 4:]
    lung = lung.repeat_interleave(64 // side, 2).repeat_interleave(64 // side, 3)[:, 0, 4:]
    wanted = [grey(x) for x in (torch.where(labels > 0, real, -1), lung, real, torch.where(labels > 0, lung, real))]
    assert (columns[0] == np.array(slices.COLOURS)[labels]).all()
    assert all(np.abs(column - image).max() <= 1 for column, image in zip(columns[1:], wanted, strict=True))


def test_a_run_draws_its_panels_and_curves(whole_run):
    names = {path.name for path in whole_run[0].glob("panel_*")}
    assert names == {f"panel_{stage}_{step:06d}.png" for stage in STAGES for step in (5, 10)}
    curves = iio.imread(whole_run[0] / "curves.png")
    assert min(curves.shape[:2]) > 300 and len(np.unique(curves.reshape(-1, curves.shape[-1]), axis=0)) > 10


def test_cases_shown_are_of_different_patients_first_and_those_with_both_lesions():
    names = ["P01_S001", "P01_S002", "P01_S003", "P02_S001", "P02_S002", "P03_S001"]
    lesions = [(50, 50), (60, 60), (200, 0), (5, 5), (9, 9), (0, 0)]  # pixels of ground glass and of consolidation
    labels = torch.ones(6, 1, 16, 16, dtype=torch.uint8)
    for k, (glass, dense) in enumerate(lesions):
        labels[k].view(-1)[: glass + dense] = 3
        labels[k].view(-1)[:glass] = 2
    chosen = covidgan.choose_cases(covidgan.Slices(names, labels, labels))
    assert [names[k] for k in chosen] == ["P01_S002", "P02_S002", "P03_S001", "P01_S001"]
    assert covidgan.choose_cases(covidgan.Slices(names[:2], labels[:2], labels[:2])) == [1, 0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def copied(whole_run, tmp_path):
    """A copy of a run's folder to write in."""
    return shutil.copytree(whole_run[0], tmp_path / "copy")


# ---- options


def test_help_shows_every_option_with_its_default_and_the_presets(here):
    done = here("-h")
    assert (done.status, done.stderr) == (0, "")
    for option in dataclasses.fields(covidgan.Config):
        lines = [line for line in done.stdout.splitlines() if line.strip().startswith(f"{option.name}: ")]
        assert len(lines) == 1 and " = " in lines[0], option.name
    assert all(f'"{preset}"' in done.stdout for preset in covidgan.PRESETS)


def test_preset_paper_is_the_papers_setting_and_options_override_a_preset():
    c = covidgan.parse_config(["--preset", "paper"])
    assert (c.size, c.ngf, c.ndf, c.n_blocks, c.n_gen, c.n_dis, c.gan) == (512, 64, 64, 9, 2, 2, "bce")
    assert (c.lambda_dfm, c.lr, c.adam_beta1, c.adam_beta2) == (10, 2e-4, 0.5, 0.999)
    assert (c.batch, c.epochs, c.epoch_len // c.batch, c.individual) == (16, 20, 750, 1.0)
    assert (c.level - c.width / 2, c.level + c.width / 2) == (-1350, 150)
    assert (c.noise, c.contrast, c.ema) == (0.01, 0.0, 0.0)
    c = covidgan.parse_config(["--preset", "tiny", "--ngf", "12"])  # default < preset < option
    assert (c.n_gen, c.size, c.ngf) == (2, 64, 12)


MISTAKES = ["--size 72", "--size 80 --n-gen 3", "--size 16", "--stage g3", "--stage g1 --n-gen 1", "--n-dis 4"]


@pytest.mark.parametrize("options", [*MISTAKES, "--over"])  # an abbreviation could discard a run
def test_a_mistake_is_told_with_its_option_and_status_2(here, toy, tmp_path, options):
    option, *value = options.split()
    done = here("--preset", "tiny", "--data", toy.folder, "--out", tmp_path / "out", option, *value)
    assert done.status == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert option in done.stderr or value[0] in done.stderr
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_the_built_in_data_is_made_where_it_is_missing_and_a_users_own_left_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/phantom-mine").mkdir(parents=True)
    covidgan.make_phantom(tiny(data="data/phantom-mine"))
    assert [*Path("data/phantom-mine").iterdir()] == []
    with pytest.raises(covidgan.Mistake, match="phantom-new: could not be made"):
        covidgan.make_phantom(tiny(data="data/phantom-new", size=32))  # which phantom.py finds too small


# ---- OUT


def test_a_run_leaves_its_files_and_no_unfinished_ones(whole_run, toy):
    out, done = whole_run
    names = {path.name for path in out.iterdir() if path.name != ".lock" and "panel" not in path.name}
    assert names == {"ckpt.pt", "stats.jsonl", "split.json", "curves.png", "results.json"}
    assert "lung -850" in done.stdout and "Traceback" not in done.stderr
    split = json.loads((out / "split.json").read_text())
    assert (split["train"], split["test"], split["data"]) == (toy.train, toy.test, str(toy.folder))
    results, networks = json.loads((out / "results.json").read_text()), load(out)["networks"]
    assert (results["stage"], results["steps"], results["slices"]) == ("joint", 10, 24)
    assert results["parameters"]["g"] == sum(w.numel() for name, w in networks.items() if name.startswith("g."))


@pytest.mark.parametrize(("held", "mend"), [("run", "--resume"), ("slices", "another --out")])
def test_a_folder_that_holds_a_run_or_slices_is_refused_and_left_as_it_is(whole_run, toy, small_run, here, held, mend):
    out = {"run": whole_run[0], "slices": toy.folder}[held]
    before = contents(out)
    done = here("--data", toy.folder, "--out", out, *small_run)
    assert done.status == 2 and str(out) in done.stderr and mend in done.stderr and contents(out) == before


def test_it_starts_from_the_average_weights_of_another_run_of_other_size(whole_run, toy, small_run, here, tmp_path):
    out, options = tmp_path / "from", ["--stage", "joint", "--init", whole_run[0] / "ckpt.pt", "--size", 96, "--lr", 0]
    done = here("--data", toy.folder, "--out", out, *small_run, *options)
    assert done.status == 0, done.stderr
    started, before = load(out), load(whole_run[0])
    assert differing(started["average"], before["average"]) == [] and started["config"]["size"] == 96
    averaged = {f"g.{name}": weight for name, weight in before["average"].items()}
    assert differing(started["networks"], before["networks"] | averaged) == []


@pytest.mark.parametrize("more", [dict(steer=True), dict(steer=True, draws=1.0), dict(n_labels=5)])
def test_networks_that_are_told_more_start_with_what_those_told_less_have_learned(tiny, more):
    old, new = (covidgan.build(Covidgan, tiny(**told)) for told in (dict(steer="draws" in more), more))
    new.load_state_dict(covidgan.widened(old, new))
    given, image = torch.rand(1, new.c.channels, 64, 64), torch.rand(1, 1, 64, 64)
    less = given[:, : old.c.channels]
    assert torch.allclose(new.g(given)[0], old.g(less)[0], atol=1e-5)
    for ours, theirs in zip(new.d(given, image), old.d(less, image), strict=True):
        assert torch.allclose(ours[-1], theirs[-1], atol=1e-4)


# ---- checkpoints


def test_a_checkpoint_holds_plain_tensors_and_numbers_and_no_path(whole_run):
    checkpoint = load(whole_run[0])
    leaves = flatten(checkpoint)
    assert {type(leaf) for leaf in leaves.values()} <= {torch.Tensor, int, float, str, bool, type(None)}
    assert not [name for name, leaf in leaves.items() if isinstance(leaf, str) and "/" in leaf]
    assert (checkpoint["method"], checkpoint["stage"], checkpoint["step"]) == ("covidgan", "joint", 10)
    assert checkpoint["trained_labels"] == [1, 2, 3]  # those that some training map held
    restored, c = covidgan.restore(covidgan.read_checkpoint(whole_run[0] / "ckpt.pt"), Covidgan)
    assert c.ngf == 8 and not restored.training
    assert all(torch.equal(w, checkpoint["average"][name]) for name, w in restored.generator().state_dict().items())


def test_on_resume_the_checkpoints_options_stand_behind_those_given_but_for_this_machines(copied, toy):
    torch.save(load(copied) | {"config": load(copied)["config"] | {"device": "cuda"}}, copied / "ckpt.pt")
    c = covidgan.parse_config(["--resume", "--out", str(copied), "--interval", "7", "--preset", "best"])
    assert (c.preset, c.ngf, c.size, c.interval, c.device) == ("tiny", 8, 64, 7, "auto")
    assert (c.resume, c.out, c.data) == (True, str(copied), str(toy.folder))


class Trap:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


NO_CHECKPOINTS = {
    "missing": lambda path: path.unlink(),
    "text": lambda path: path.write_text("not a checkpoint\n" * 50),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:9999]),
    "other dict": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "code": lambda path: torch.save({"config": Trap(path.with_name("sprung"))}, path),
    "code in a plain pickle": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("sprung")), protocol=2)),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_and_runs_no_code(copied, here, kind):
    NO_CHECKPOINTS[kind](copied / "ckpt.pt")
    done = here("--resume", "--out", copied)
    assert done.status == 2 and str(copied / "ckpt.pt") in done.stderr and not (copied / "sprung").exists()
