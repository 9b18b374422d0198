"""The command line: every knob shown, every mistake one line."""

import dataclasses
import pickle
import typing

import numpy as np
import pytest
import torch

import covidgan
from covidgan import Covidgan
from data import slices


def is_one_line(done):
    """Exit status 2 and nothing but one line "error: ..."."""
    assert done.status == 2, done
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    return done.stderr


# ---- the knobs


def test_help_shows_every_knob_with_its_default(cli):
    done = cli("-h")
    assert done.status == 0
    assert done.stderr == ""
    for knob in dataclasses.fields(covidgan.Config):
        lines = [line for line in done.stdout.splitlines() if line.strip().startswith(f"{knob.name}: ")]
        assert len(lines) == 1, knob.name
        assert " = " in lines[0]


@pytest.mark.parametrize("name", covidgan.PRESETS)
def test_preset_names_fields_with_values_of_their_type_and_works(name):
    preset, hints = covidgan.PRESETS[name], typing.get_type_hints(covidgan.Config)
    assert preset.keys() <= hints.keys()
    for key, value in preset.items():
        allowed = typing.get_args(hints[key])  # of a choice
        assert value in allowed if allowed else isinstance(value, hints[key]), key
    covidgan.check_config(covidgan.Config(**preset), covidgan.Covidgan)


def test_the_default_preset_exists():
    assert covidgan.Config.preset in covidgan.PRESETS


def test_defaults_are_the_papers_setting():
    c = covidgan.parse_config(["--preset", "paper"])
    default = covidgan.Config()
    beside_the_method = {name: getattr(default, name) for name in ("preset", "noise", "contrast", "ema")}
    assert dataclasses.replace(c, **beside_the_method) == default
    assert (c.noise, c.contrast, c.ema) == (0.01, 0.0, 0.0)
    assert (c.size, c.ngf, c.n_blocks, c.n_gen, c.n_dis, c.lambda_dfm, c.batch, c.gan) == (
        512,
        64,
        9,
        2,
        2,
        10,
        16,
        "bce",
    )
    assert (c.level - c.width / 2, c.level + c.width / 2) == (-1350, 150)


def test_an_option_overrides_the_preset_and_the_preset_the_default():
    c = covidgan.parse_config(["--preset", "tiny", "--ngf", "12", "--elastic-cell", "32.5", "--desum", "sum"])
    assert (c.ngf, c.elastic_cell, c.desum) == (12, 32.5, "sum")
    assert (c.size, c.preset) == (64, "tiny")
    assert c.n_gen == 2


def test_no_options_are_the_demo():
    c = covidgan.parse_config([])
    assert c == covidgan.Config(**covidgan.PRESETS["demo"])


def test_on_resume_the_checkpoints_config_stands_behind_the_options_given(whole_run):
    out = str(whole_run[0])
    c = covidgan.parse_config(["--resume", "--out", out, "--interval", "7"])
    assert (c.ngf, c.n_blocks, c.size, c.batch, c.stage) == (8, 1, 64, 2, "all")
    assert (c.interval, c.resume) == (7, True)


def test_a_device_is_of_one_machine_and_not_resumed(whole_run, tmp_path):
    checkpoint = torch.load(whole_run[0] / "ckpt.pt", weights_only=True)
    assert checkpoint["config"]["device"] == "auto"
    checkpoint["config"]["device"] = "cuda"  # as earlier versions kept it
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    (tmp_path / "data.txt").write_bytes((whole_run[0] / "data.txt").read_bytes())
    assert covidgan.parse_config(["--resume", "--out", str(tmp_path)]).device == "auto"


def test_what_a_checkpoint_depends_on_are_fields_of_the_config():
    assert set(covidgan.Covidgan.architecture) <= {knob.name for knob in dataclasses.fields(covidgan.Config)}


# ---- mistakes

MISTAKES = {
    "size no multiple": (["--size", 72], "--size 72"),
    "size of three generators": (["--size", 80, "--n-gen", 3], "multiple of 32"),
    "size too small": (["--size", 16], "--size 16"),
    "unknown stage": (["--stage", "g3"], "g3"),
    "unknown option": (["--epoch-length", 5], "--epoch-length"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "value of another type": (["--batch", "many"], "many"),
    "four discriminators": (["--n-dis", 4], "--n-dis 4"),
    "no generator": (["--n-gen", 0], "--n-gen 0"),
    "one generator has no stages": (["--n-gen", 1, "--stage", "g1"], "--stage 'g1'"),
    "epoch below the batch": (["--epoch-len", 3, "--batch", 4], "--epoch-len 3"),
    "no batch": (["--batch", 0], "--batch"),
    "resume and overwrite": (["--resume", "--overwrite"], "--overwrite"),
    "d2 of one discriminator": (["--dfm", "d2", "--n-dis", 1], "--dfm d2"),
    "margin": (["--beta-margin", 0.5], "--beta-margin"),
    "beta": (["--beta", 1.5], "--beta 1.5"),
    "learning rate": (["--lr", 0], "--lr"),
    "learning rate no number": (["--lr", "nan"], "--lr"),
    "window": (["--width", 0], "--width"),
    "weight of feature matching": (["--lambda-dfm", -1], "--lambda-dfm"),
    "beta that nothing moves": (["--dfm", "fixed", "--beta-policy", "max"], "--beta-policy: has no effect with --dfm"),
    "beta that moves": (["--dfm", "learned", "--beta", 0.3], "--beta: has no effect with --dfm learned --n-dis 2"),
    "G1 that never moves": (["--fix-global", 1], "--fix-global 1"),
    "interval": (["--interval", 0], "--interval"),
    "epochs": (["--epochs", 0], "--epochs"),
    "average": (["--ema", 1.5], "--ema 1.5"),
    "contrast": (["--contrast", -1], "--contrast"),
    "individual": (["--individual", -1], "--individual"),
    "one label": (["--n-labels", 1], "--n-labels"),
    "labels without a name": (["--n-labels", 5], "--n-labels 5: give 2 to 4"),
    "odd width": (["--ngf", 9], "--ngf"),
    "window beyond int16": (["--level", 0, "--width", 65535], "--level 0 --width 65535"),
    "no window": (["--width", 0], "--width 0"),
    "resize below 1": (["--resize", 0.5], "--resize"),
    "adam": (["--adam-beta1", 1.5], "--adam-beta1"),
    "seed": (["--seed", -1], "--seed"),
    "missing data": (["--data", "no/such/folder"], "no/such/folder"),
    "cuda": (["--device", "cuda"], "--device cuda"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(here, toy, tmp_path, kind):
    if kind == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    options, named = MISTAKES[kind]
    done = here("--preset", "tiny", "--data", toy.folder, "--out", tmp_path / "out", *options)
    assert named in is_one_line(done)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_of_the_real_program_too(cli, tmp_path):
    done = cli("--preset", "tiny", "--data", "no/such/folder", "--out", tmp_path / "out")
    assert "no/such/folder" in is_one_line(done)
    assert not (tmp_path / "out").exists()


def test_more_labels_in_a_map_than_the_model_has_are_named(here, toy, tmp_path):
    done = here("--preset", "tiny", "--data", toy.folder, "--out", tmp_path / "out", "--n-labels", 3)
    line = is_one_line(done)
    assert str(toy.folder / "maps") in line
    assert "colour [0, 255, 0] at row" in line
    assert not (tmp_path / "out").exists()


def test_a_broken_file_stops_before_any_work(here, own_toy, tmp_path):
    bad = own_toy.folder / "maps" / f"{own_toy.test[-1]}.png"
    bad.write_bytes(bad.read_bytes()[:100])
    done = here("--preset", "tiny", "--data", own_toy.folder, "--out", tmp_path / "out")
    assert str(bad) in is_one_line(done)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_grey_levels_stops_before_any_work(here, own_toy, tmp_path):
    for name, hu in own_toy.hu.items():
        slices.write_image(own_toy.folder / "images" / f"{name}.png", slices.windowed(hu).astype(np.int16) - 1024)
    done = here("--preset", "tiny", "--data", own_toy.folder, "--out", tmp_path / "out")
    assert "grey levels" in is_one_line(done)


def test_out_that_is_a_file_is_named(here, toy, tmp_path):
    (tmp_path / "out").write_text("something of the user's")
    done = here("--preset", "tiny", "--data", toy.folder, "--out", tmp_path / "out")
    assert str(tmp_path / "out") in is_one_line(done)
    assert (tmp_path / "out").read_text() == "something of the user's"


VALUES = {"beta": (0.2, 0.7), "lambda_dfm": (1.0, 5.0), "beta_margin": (0.1, 0.3), "beta_entropy": (0.1, 0.5)}
VALUES |= {"beta_policy": ("min", "clamp"), "desum": ("learned", "sum"), "n_local_blocks": (1, 2)}
SETTINGS = [dict(dfm=dfm, n_dis=n) for dfm in ("learned", "fixed", "off") for n in (1, 2)]
SETTINGS += [dict(dfm="learned", beta_policy=policy) for policy in ("entropy", "min")]
SETTINGS += [dict(n_gen=1, dfm=dfm) for dfm in ("learned", "fixed")]


def what_moves(c):
    """The gradients of a joint step, each loss's in one number."""
    method = covidgan.build(covidgan.Covidgan, c)
    for net in method.modules():
        if isinstance(net, covidgan.WeightingNet):  # they start at 0.5, which a margin does not move
            torch.nn.init.constant_(net.fc[-1].bias, 0.5)
            torch.nn.init.constant_(net.fc[-1].weight, 0.01)
    labels = (torch.arange(64 * 64) // 700 % 4).view(1, 1, 64, 64)
    losses = method.losses(covidgan.one_hot(labels, 4), torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64), "joint")
    moved = {}
    for player in method.players("joint").values():
        if player.parameters and losses[player.loss].requires_grad:
            gradients = torch.autograd.grad(losses[player.loss], player.parameters, retain_graph=True)
            moved[player.loss] = moved.get(player.loss, 0.0) + sum(g.abs().sum().item() for g in gradients)
    return moved


def test_a_default_spelled_out_is_no_mistake():
    spelled = ["--dfm", "fixed", "--beta-policy", "clamp", "--n-gen", "1", "--fix-global", "0"]
    assert covidgan.parse_config(spelled) == covidgan.parse_config(["--dfm", "fixed", "--n-gen", "1"])


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: " ".join(f"{k}={v}" for k, v in setting.items()))
def test_options_called_idle_move_nothing_and_all_others_something(tiny, setting):
    idle = Covidgan.idle(tiny(**setting))
    for name, values in VALUES.items():
        if name not in setting:
            one, other = (what_moves(tiny(**{**setting, name: value})) for value in values)
            assert (one == other) == (name in idle), name


# ---- files that are no checkpoint


class Trap:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def a_config(**given):
    return dataclasses.asdict(covidgan.Config(**{**covidgan.PRESETS["tiny"], "n_blocks": 1, **given}))


NO_CHECKPOINTS = {
    "text": lambda path: path.write_text("not a checkpoint\n" * 50),
    "empty": lambda path: path.write_bytes(b""),
    "zip of nothing": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "list": lambda path: torch.save([1, 2], path),
    "other dict": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "config of another version": lambda path: torch.save({"config": {**a_config(), "old_knob": 1}}, path),
    "config that is a number": lambda path: torch.save({"config": 3}, path),
    "config alone": lambda path: torch.save({"config": a_config()}, path),
    "code": lambda path: torch.save({"config": Trap(path.with_name("sprung"))}, path),
    "code in a plain pickle": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("sprung")), protocol=2)),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_and_runs_no_code(here, toy, tmp_path, kind):
    path = tmp_path / "ckpt.pt"
    NO_CHECKPOINTS[kind](path)
    before = path.read_bytes()
    done = here("--resume", "--preset", "tiny", "--data", toy.folder, "--out", tmp_path)
    assert str(path) in is_one_line(done)
    assert not (tmp_path / "sprung").exists()
    assert path.read_bytes() == before


def test_a_truncated_checkpoint_is_named(here, toy, whole_run, tmp_path):
    whole = (whole_run[0] / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    done = here("--resume", "--data", toy.folder, "--out", tmp_path)
    assert str(tmp_path / "ckpt.pt") in is_one_line(done)


def test_a_checkpoint_whose_weights_do_not_fit_its_config_is_named(here, toy, whole_run, tmp_path):
    checkpoint = torch.load(whole_run[0] / "ckpt.pt", weights_only=True)
    checkpoint["config"]["ngf"] = 16
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    done = here("--resume", "--data", toy.folder, "--out", tmp_path)
    assert str(tmp_path / "ckpt.pt") in is_one_line(done)


OTHER = {"--ngf": 16, "--ndf": 16, "--n-blocks": 3, "--n-local-blocks": 2, "--n-gen": 3, "--n-dis": 3, "--n-labels": 3}
OTHER |= {"--desum": "sum", "--upsample": "resize", "--dfm": "fixed"}


def test_resume_with_another_preset_is_refused_since_nothing_of_it_would_be_taken_over(whole_run):
    with pytest.raises(covidgan.Mistake, match=r"ckpt\.pt has preset tiny, not best: leave the option out"):
        covidgan.parse_config(["--resume", "--out", str(whole_run[0]), "--preset", "best"])
    assert covidgan.parse_config(["--resume", "--out", str(whole_run[0]), "--preset", "tiny"]).preset == "tiny"


@pytest.mark.parametrize(("option", "value"), OTHER.items())
def test_resume_with_another_architecture_is_refused_by_name(whole_run, option, value):
    name = option[2:].replace("-", "_")
    with pytest.raises(covidgan.Mistake, match=rf"ckpt\.pt has {name} \w+, not {value}"):
        covidgan.parse_config(["--resume", "--out", str(whole_run[0]), option, str(value)])


def test_a_checkpoint_of_a_config_with_a_missing_knob_is_named(tmp_path):
    config = a_config()
    del config["seed"]
    torch.save({"config": config}, tmp_path / "ckpt.pt")
    with pytest.raises(covidgan.Mistake, match="seed"):
        covidgan.read_checkpoint(tmp_path / "ckpt.pt", covidgan.Covidgan)


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert covidgan.parse_config(["--device", "cuda"]).device == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(covidgan.Mistake, match="torchrun: 2 GPUs here, one for each process: give --nproc_per_node 2"):
        covidgan.parse_config([])
