"""The three stages: schedule, who moves when, checkpoints, stopping and going on, processes."""

import itertools
import json
import os
import random
import re
import signal
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

import covidgan
from covidgan import Covidgan
from data import slices


def flatten(tree, path=""):
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(tree, dict):
        return {k: v for key, sub in tree.items() for k, v in flatten(sub, f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for key, sub in enumerate(tree) for k, v in flatten(sub, f"{path}/{key}").items()}
    return {path: tree}


def leaves(path):
    return flatten(torch.load(path, weights_only=True))


def differing(a, b):
    """Paths of the leaves in which two checkpoints differ, their configs left out."""
    a, b = ({k: v for k, v in flatten(x).items() if not k.startswith("/config")} for x in (a, b))
    assert a.keys() == b.keys()
    return [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]


def stats_of(out):
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def test_every_step_and_every_process_draws_its_own(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=1, epoch_len=48))
    seeds, batches = [], []
    for stage in covidgan.STAGES:
        trainer.begin(stage)
        for step in range(6):
            trainer.step_done = step
            seeds += [trainer.step_seed(*more) for more in ((), (1,), (2,))]
            batches.append(trainer.batch()[0])
    assert len({*seeds}) == len(seeds) == 3 * 6 * 3
    trainer.train.names, trainer.train.hu, trainer.train.labels = (
        part[:1] for part in (trainer.train.names, trainer.train.hu, trainer.train.labels)
    )
    alike = []  # one slice alone: only the draws differ
    for step in range(4):
        trainer.step_done = step
        alike.append(trainer.batch()[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(alike, 2))


def test_every_epoch_and_every_stage_has_its_own_order(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=12))  # half of the 24 slices
    orders = []
    for stage in covidgan.STAGES:
        trainer.begin(stage)
        for epoch in range(2):
            drawn = []
            for step in range(6):
                trainer.step_done = 6 * epoch + step
                drawn += trainer.batch()[2]
            assert len({*drawn}) == 12  # none twice before all have had a turn
            orders.append(tuple(drawn))
    assert len({*orders}) == 6


EVERY_STEP = [(stage, step) for stage in covidgan.STAGES for step in range(1, 11)]


def steps_of(out):
    return [(line["stage"], line["step"]) for line in stats_of(out)]


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module, before):
    """Names of the parameters that moved."""
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


# ---- schedule


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (5, 1), (10, 1), (15, 0.5), (19, 0.1), (20, 0)])
def test_learning_rate_is_constant_for_ten_epochs_and_falls_to_zero_in_ten_more(epoch, share):
    assert covidgan.lr_at(epoch * 750, 20 * 750, 2e-4) == pytest.approx(share * 2e-4, abs=1e-12)


def test_the_papers_setting_has_750_steps_an_epoch():
    c = covidgan.Config()
    assert (c.epoch_len // c.batch, c.epochs, c.lr, c.adam_beta1, c.adam_beta2) == (750, 20, 2e-4, 0.5, 0.999)


def test_an_epoch_shows_every_slice_equally_often():
    order = covidgan.sample_order(300, 12_000, [0, 1, 2])
    assert np.bincount(order).tolist() == [40] * 300
    for k in range(40):  # and once before any comes again
        assert len(set(order[300 * k : 300 * (k + 1)].tolist())) == 300


def test_a_ragged_epoch_shows_no_slice_twice_more_than_another():
    counts = np.bincount(covidgan.sample_order(7, 17, [0]), minlength=7)
    assert counts.sum() == 17
    assert set(counts.tolist()) == {2, 3}


def test_order_of_samples_is_a_function_of_its_seed():
    a, b, d = (covidgan.sample_order(50, 50, seed) for seed in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    assert (a == b).all()
    assert (a != d).any()


def test_optimisers_get_the_scheduled_learning_rate(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=4))  # four steps a stage
    for step, share in enumerate((1, 1, 1, 0.5)):
        trainer.step_done = step
        assert trainer.step()["lr_g1"] == pytest.approx(share * 2e-4)
        groups = [group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups]
        assert [group["lr"] for group in groups] == pytest.approx([share * 2e-4] * len(groups))
        assert all(group["betas"] == (0.5, 0.999) for group in groups)


def test_stats_tell_the_learning_rate_of_every_step(whole_run):
    rates = [line["lr_d"] / 2e-4 for line in stats_of(whole_run[0])]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2] * 3)


def test_stats_tell_of_each_player_its_own_learning_rate(tiny):
    """G1 stands still in the joint stage's first epochs with --fix-global; a rival's D may be faster than its G."""
    trainer = covidgan.Trainer(Covidgan, tiny(stage="joint", batch=2, epochs=2, epoch_len=4, fix_global=1))
    told = [{name: rate for name, rate in trainer.step().items() if name.startswith("lr_")} for _ in range(3)]
    assert {*told[0]} == {"lr_d", "lr_beta", "lr_g1", "lr_g2"}
    assert [rates["lr_g1"] for rates in told] == [0, 0, pytest.approx(2e-4)]
    assert [rates["lr_g2"] for rates in told] == pytest.approx([2e-4] * 3)


# ---- who moves in which stage


@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_a_stage_moves_its_own_parameters_and_no_others(tiny, stage):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2))
    g, (d1, d2), dfm = trainer.method.g, trainer.method.d.scales, trainer.method.dfm
    parts = {
        "G1 trunk": g.g1.trunk,
        "G1 head": g.g1.head,
        "G2": g.locals,
        "alpha": g.desums,
        "D1": d1,
        "D2": d2,
        "beta": dfm,
    }
    trainer.begin(stage)
    before = {name: snapshot(part) for name, part in parts.items()}
    for _ in range(2):
        trainer.step()
    wanted = {
        "g1": {"G1 trunk", "G1 head", "D2"},
        "g2": {"G2", "D1", "D2", "beta"},
        "joint": {"G1 trunk", "G2", "alpha", "D1", "D2", "beta"},
    }[stage]
    assert {name for name, part in parts.items() if moved(part, before[name])} == wanted
    for name in wanted - {"alpha", "beta"}:  # these start at zero, behind which nothing moves at first
        part = parts[name]
        weights = {key for key, p in part.named_parameters() if p.dim() == 4}
        assert weights <= moved(part, before[name]), name


def test_g1_stands_still_for_the_epochs_that_fix_it_and_then_moves(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=4, fix_global=1))
    trainer.begin("joint")
    g = trainer.method.g
    trunk, local, alpha = snapshot(g.g1), snapshot(g.locals), snapshot(g.desums)
    for _ in range(2):
        trainer.step()
    assert not moved(g.g1, trunk)
    assert moved(g.locals, local)
    assert moved(g.desums, alpha)
    trainer.step()
    assert moved(g.g1.trunk, snapshot(g.g1.trunk) | {k[6:]: v for k, v in trunk.items() if k.startswith("trunk.")})


def test_g1_is_fixed_in_the_joint_stage_alone(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, fix_global=1))
    trunk = snapshot(trainer.method.g.g1.trunk)
    trainer.step()
    assert moved(trainer.method.g.g1.trunk, trunk)


def test_networks_carry_over_between_stages_and_optimisers_start_anew(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2))
    for stage in ("g2", "joint"):
        trainer.step()
        before = snapshot(trainer.method)
        trainer.begin(stage)
        assert not moved(trainer.method, before)
        assert not any(optimizer.state for optimizer in trainer.optimizers.values())
        assert trainer.step_done == 0


def test_stages_one_by_one_are_the_same_as_all_at_once(whole_run, toy, small_run, here, tmp_path):
    """Each stage begins with the networks that the one before left, discriminators among them."""
    for k, stage in enumerate(covidgan.STAGES):
        more = ["--resume"] if k else []
        done = here("--stage", stage, "--data", toy.folder, "--out", tmp_path, *small_run, "--interval", 99, *more)
        assert done.status == 0, done.stderr
    assert differing(torch.load(tmp_path / "ckpt.pt"), torch.load(whole_run[0] / "ckpt.pt")) == []
    assert steps_of(tmp_path) == EVERY_STEP


def test_a_stage_that_lies_behind_the_checkpoint_is_not_trained_again(whole_run, here, copy):
    out = copy(whole_run[0])
    before = contents(out)
    done = here("--resume", "--out", out, "--stage", "g1")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "in stage joint, and g1 lies behind it: leave --stage out" in done.stderr
    assert contents(out) == before


def stopped_in_g1(toy, small_run, out, *more):
    """A run stopped after step 5 of 10 of its first stage."""
    run = ["--data", toy.folder, "--out", out, *small_run, "--interval", 99, *more]
    trainer = covidgan.Trainer(Covidgan, covidgan.parse_config([str(word) for word in run]))
    trainer.write_split()
    for _ in range(5):
        trainer.step()
    trainer.save()


def test_a_stage_that_is_not_at_its_end_is_not_left_behind(toy, small_run, here, tmp_path):
    stopped_in_g1(toy, small_run, tmp_path)
    done = here("--resume", "--out", tmp_path, "--stage", "g2")
    assert done.status == 2 and "stage g1 is at step 5 of 10: end it first" in done.stderr
    done = here("--resume", "--out", tmp_path, "--individual", 0)
    assert done.status == 2 and "trained in g1 g2 joint, with these options in joint" in done.stderr


def test_a_stage_left_out_on_resume_is_told(toy, small_run, here, tmp_path):
    assert here("--stage", "g1", "--data", toy.folder, "--out", tmp_path, *small_run, "--interval", 99).status == 0
    done = here("--resume", "--out", tmp_path, "--stage", "joint")
    assert done.status == 0 and "from stage g1 straight to joint" in done.stdout


def test_another_length_on_resume_is_told_and_one_that_would_end_the_stage_refused(toy, small_run, here, tmp_path):
    stopped_in_g1(toy, small_run, tmp_path)
    done = here("--resume", "--out", tmp_path, "--stage", "g1", "--batch", 5)  # 4 steps
    assert done.status == 2 and "stage g1, at step 5, had 10 steps and would have 4" in done.stderr
    done = here("--resume", "--out", tmp_path, "--stage", "g1", "--epochs", 3)
    assert done.status == 0 and "stage g1, at step 5, had 10 steps and would have 15: the learning" in done.stdout
    assert steps_of(tmp_path)[-1] == ("g1", 15)


def test_a_stage_that_is_done_may_be_followed_by_a_shorter_one(toy, small_run, here, tmp_path):
    assert here("--stage", "g1", "--data", toy.folder, "--out", tmp_path, *small_run, "--interval", 99).status == 0
    done = here("--resume", "--out", tmp_path, "--stage", "g2", "--epochs", 1)
    assert done.status == 0 and "had" not in done.stdout
    assert steps_of(tmp_path)[-1] == ("g2", 5)


def test_a_run_into_its_datas_folder_leaves_their_split(own_toy, small_run, here):
    before = (own_toy.folder / "split.json").read_bytes()
    run = ["--stage", "g1", "--data", own_toy.folder, "--out", own_toy.folder, *small_run, "--interval", 99]
    assert here(*run).status == 0
    assert (own_toy.folder / "split.json").read_bytes() == before


def test_a_run_into_the_folder_of_another_set_is_refused_and_leaves_it_as_it_is(toy, own_toy, small_run, here):
    before = {path: path.read_bytes() for path in own_toy.folder.rglob("*") if path.is_file()}
    done = here("--data", toy.folder, "--out", own_toy.folder, *small_run)
    assert done.status == 2 and f"{own_toy.folder}: holds the slices of another set" in done.stderr
    assert {path: path.read_bytes() for path in own_toy.folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_alone_goes_on_with_the_data_given_and_not_without(toy, small_run, here, tmp_path):
    """It names no folder; data.txt beside it does, and a --data that is refused does not change that."""
    stopped_in_g1(toy, small_run, tmp_path)
    told = (tmp_path / "data.txt").read_text()
    done = here("--resume", "--out", tmp_path, "--data", tmp_path)
    assert done.status == 2 and (tmp_path / "data.txt").read_text() == told == f"{toy.folder}\n"
    (tmp_path / "data.txt").unlink()
    done = here("--resume", "--out", tmp_path, "--stage", "g1")
    assert done.status == 2 and "data.txt: not there, and tells what was trained on: give --data" in done.stderr
    assert here("--resume", "--out", tmp_path, "--stage", "g1", "--data", toy.folder).status == 0
    assert steps_of(tmp_path)[-1] == ("g1", 10) and (tmp_path / "data.txt").read_text() == told


def test_slices_that_were_trained_on_are_not_tested_after_a_resume(own_toy, small_run, here, tmp_path):
    out = tmp_path / "out"
    run = ["--stage", "g1", "--data", own_toy.folder, "--out", out, *small_run, "--interval", 99]
    assert here(*run).status == 0
    moved = own_toy.train[0]
    slices.write_split(own_toy.folder / "split.json", own_toy.train[1:], [*own_toy.test, moved], [], {})
    done = here("--resume", "--out", out)
    assert done.status == 2 and f"1 slices to test were trained on before the stop, {moved} first" in done.stderr
    slices.write_split(own_toy.folder / "split.json", own_toy.train[1:], own_toy.test, [], {})
    assert here("--resume", "--out", out).status == 0
    assert moved in json.loads((out / "split.json").read_text())["train"]  # it was seen, and stays so


def test_an_average_may_begin_on_resume(toy, small_run, here, tmp_path):
    stopped_in_g1(toy, small_run, tmp_path, "--ema", 0)
    done = here("--resume", "--out", tmp_path, "--stage", "g1", "--ema", 0.5)
    assert done.status == 0, done.stderr
    assert torch.load(tmp_path / "ckpt.pt")["average"]


# ---- a run and its checkpoint


def test_a_run_leaves_what_it_promises(whole_run):
    out, done = whole_run
    names = {path.name for path in out.iterdir()}
    assert {"ckpt.pt", "stats.jsonl", "curves.png", "results.json"} <= names
    assert {f"panel_{stage}_{step:06d}.png" for stage in covidgan.STAGES for step in (5, 10)} <= names
    assert not [name for name in names if "tmp" in name]
    assert steps_of(out) == EVERY_STEP
    assert "Traceback" not in done.stderr
    results = json.loads((out / "results.json").read_text())
    assert (results["stage"], results["n"], results["size"]) == ("joint", 6, 64)
    for line in done.stdout.splitlines():
        if line.startswith("covidgan "):
            assert f"{results['covidgan']['complete']['psnr']:.2f}" in line
            break
    else:
        pytest.fail("no table")


def test_checkpoint_is_a_plain_dict_of_tensors_and_numbers(whole_run):
    checkpoint = torch.load(whole_run[0] / "ckpt.pt", weights_only=True)
    assert type(checkpoint) is dict
    kinds = {type(leaf) for leaf in flatten(checkpoint).values()}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
    assert {"method", "networks", "optimizers", "config", "stage", "step"} <= checkpoint.keys()
    assert (checkpoint["stage"], checkpoint["step"]) == ("joint", 10)
    assert checkpoint["config"]["ngf"] == 8


def likeness(trainer):
    """Correlation of G1's synthetic lung of the training slices with the real one."""
    labels, real = trainer.train.labels[..., ::2, ::2], covidgan.window(trainer.train.hu, trainer.c)
    real, synthetic = torch.nn.functional.avg_pool2d(real, 2), trainer.synthesize(trainer.train.labels)
    return torch.corrcoef(torch.stack([real[labels > 0], synthetic[labels > 0]]))[0, 1].item()


def test_training_on_one_slice_learns_it(tiny):
    still = dict(resize=1.0, rotate=0.0, elastic=0.0, noise=0.0)
    trainer = covidgan.Trainer(Covidgan, tiny(batch=1, lr=2e-3, epochs=2, epoch_len=40, **still))
    train = trainer.train
    trainer.train = covidgan.Slices(train.names[3:4], train.hu[3:4], train.labels[3:4])
    assert abs(likeness(trainer)) < 0.15
    for _ in range(40):
        trainer.step()
    assert likeness(trainer) > 0.3


def test_the_same_seed_trains_the_same_and_another_does_not(tiny):
    ends = []
    for seed in (0, 0, 1):
        trainer = covidgan.Trainer(Covidgan, tiny(batch=2, seed=seed))
        trainer.begin("joint")
        ends.append([trainer.step()["g"] for _ in range(3)])
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


def test_bfloat16_trains_close_to_float32(tiny):
    figures = []
    for dtype in ("float32", "bfloat16"):
        trainer = covidgan.Trainer(Covidgan, tiny(batch=2, dtype=dtype))
        trainer.begin("joint")
        kinds = []
        trainer.method.g.g1.trunk[1].register_forward_hook(lambda _m, _x, y, kinds=kinds: kinds.append(y.dtype))
        figures.append(trainer.step())
        assert {*kinds} == {getattr(torch, dtype)}
        assert all(p.dtype == torch.float32 for p in trainer.method.parameters())
    for name in ("d", "gan", "dfm"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=0.05)


# ---- stopping and going on


@pytest.mark.parametrize("stage", covidgan.STAGES)
@pytest.mark.parametrize("soft", [True, False], ids=["asked to stop", "killed"])
def test_stopped_anywhere_in_a_stage_a_run_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch, stage, soft):
    """Asked, it stops after its step; killed, it has written steps to stats.jsonl that its checkpoint knows not."""
    monkeypatch.setattr(covidgan.Trainer, "draw", lambda self: None)
    options = dict(batch=2, epoch_len=16, interval=3)  # eight steps
    straight = covidgan.Trainer(Covidgan, tiny(out=str(tmp_path), **options))
    straight.begin(stage)
    for _ in range(8):
        straight.step()

    at = random.choice((5, 6))  # beyond the checkpoint of step 3
    first = covidgan.Trainer(Covidgan, tiny(out=str(tmp_path), **options))
    first.begin(stage)
    step = first.step

    def interrupted():
        if first.step_done == at - 1:
            if not soft:
                raise KeyError("killed")
            first.stop_signal = signal.SIGTERM
        return step()

    first.step = interrupted
    with pytest.raises(covidgan.Stopped if soft else KeyError):
        first.run_stage()
    c = tiny(out=str(tmp_path), resume=True, **options)
    covidgan.prepare_out(c)
    second = covidgan.Trainer(Covidgan, c)
    second.load(tmp_path / "ckpt.pt")
    assert (second.stage, second.step_done) == (stage, at if soft else (at - 1) // 3 * 3)
    second.run_stage()
    assert differing(second.state(), straight.state()) == []
    assert steps_of(tmp_path) == [(stage, k) for k in range(1, 9)]


def wait_for(process, stats, lines):
    """Wait until a run has a checkpoint and so many lines of stats.jsonl, then give it a moment within a step."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if stats.with_name("ckpt.pt").exists() and stats.read_text().count("\n") >= lines:
            time.sleep(random.uniform(0, 0.1))
            return
        if process.poll() is not None:
            pytest.fail(f"ended too early: {process.communicate()}")
        time.sleep(0.002)
    pytest.fail("did not come so far")


def test_killed_in_every_stage_a_run_goes_on_bit_for_bit(whole_run, toy, small_run, cli, here, tmp_path):
    """SIGKILL in g1, SIGTERM in g2, SIGINT in joint, each followed by --resume, give the uninterrupted run's end."""
    out = tmp_path / "out"
    command = ["--stage", "all", "--data", toy.folder, "--out", out, *small_run]
    for k, signum in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)):
        process = cli.start(*command, *(["--resume"] if k else []))
        wait_for(process, out / "stats.jsonl", 10 * k + 4)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
        assert "Traceback" not in stderr
        if signum == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert re.search(r"stopped at stage \w+, step \d+: --resume", stderr)
        assert out.joinpath("stats.jsonl").read_text().count("\n") < 30
    done = here(*command, "--resume")
    assert done.status == 0, done.stderr
    assert differing(torch.load(out / "ckpt.pt"), torch.load(whole_run[0] / "ckpt.pt")) == []
    assert steps_of(out) == EVERY_STEP
    assert stats_of(out) == stats_of(whole_run[0])
    assert (out / "results.json").read_text() == (whole_run[0] / "results.json").read_text()


def test_resume_of_a_finished_run_trains_no_more(whole_run, toy, small_run, here, copy):
    out = copy(whole_run[0])
    done = here("--stage", "all", "--data", toy.folder, "--out", out, *small_run, "--resume")
    assert done.status == 0, done.stderr
    assert differing(torch.load(out / "ckpt.pt"), torch.load(whole_run[0] / "ckpt.pt")) == []
    assert steps_of(out) == EVERY_STEP


def test_resume_takes_its_options_from_the_checkpoint(whole_run, here, copy):
    out = copy(whole_run[0])
    done = here("--resume", "--out", out)
    assert done.status == 0, done.stderr
    assert "at 64 pixels" in done.stdout
    assert differing(torch.load(out / "ckpt.pt"), torch.load(whole_run[0] / "ckpt.pt")) == []


def test_adams_betas_given_on_resume_count_at_once(tiny, tmp_path, whole_run, copy):
    out = copy(whole_run[0])
    trainer = covidgan.Trainer(Covidgan, tiny(out=str(out), resume=True, adam_beta1=0.25))
    trainer.load(out / "ckpt.pt")
    assert {group["betas"] for optimizer in trainer.optimizers.values() for group in optimizer.param_groups} == {
        (0.25, covidgan.Config.adam_beta2)
    }


def test_other_stages_on_resume_are_refused_before_the_stats_of_the_old_ones_go(whole_run, here, copy):
    out = copy(whole_run[0])
    done = here("--resume", "--out", out, "--individual", 0)
    assert done.status == 2 and "trained in g1 g2 joint, with these options in joint: leave them out" in done.stderr
    assert steps_of(out) == EVERY_STEP


def test_where_weights_lie_otherwise_in_memory_a_resumed_run_takes_adams_steps(tiny, tmp_path):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, dtype="bfloat16", out=str(tmp_path)))  # channels last
    trainer.write_split()
    for _ in range(3):
        trainer.step()
    trainer.save()
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, dtype="float32", out=str(tmp_path), resume=True))
    trainer.load(tmp_path / "ckpt.pt")
    moments = {name: o.state_dict()["state"] for name, o in trainer.optimizers.items()}
    before = [
        (name, p, p.detach().clone(), *(moments[name][i][key].clone() for key in ("exp_avg", "exp_avg_sq")))
        for name in trainer.optimizers
        for i, p in enumerate(trainer.players[name].parameters)
        if i in moments[name]
    ]
    trainer.step()
    (b1, b2), lr = (0.5, 0.999), trainer.c.lr
    for name, p, weight, mean, square in before:  # Adam (Kingma and Ba), element by element
        after = trainer.optimizers[name].state[p]
        gradient = (after["exp_avg"] - b1 * mean) / (1 - b1)
        assert torch.allclose(after["exp_avg_sq"], b2 * square + (1 - b2) * gradient**2, rtol=1e-3, atol=1e-12)
        step = lr * after["exp_avg"] / (1 - b1**4) / ((after["exp_avg_sq"] / (1 - b2**4)).sqrt() + 1e-8)
        assert torch.allclose(p, weight - step, rtol=1e-5, atol=lr / 1000)
    assert len(before) > 20


def test_figures_of_g1_alone_tell_the_size_they_were_measured_at(toy, small_run, here, tmp_path):
    done = here("--stage", "g1", "--data", toy.folder, "--out", tmp_path, *small_run)
    assert done.status == 0, done.stderr
    assert "at 32 x 32 pixels" in done.stdout and json.loads((tmp_path / "results.json").read_text())["size"] == 32


def test_a_start_clears_what_a_killed_run_left_and_no_other_hidden_file(whole_run, here, copy):
    out = copy(whole_run[0])
    left = [out / f".{name}.tmp" for name in ("ckpt.pt", "stats.jsonl", "panel_g1_000004.png")]
    for path in [*left, out / ".mine.tmp"]:
        path.write_text("")
    assert here("--resume", "--out", out).status == 0
    assert [path.name for path in out.glob(".*.tmp")] == [".mine.tmp"]


def test_stats_beyond_the_checkpoint_and_cut_lines_are_dropped_on_resume(tiny, tmp_path, whole_run, copy):
    out = copy(whole_run[0])
    with open(out / "stats.jsonl", "a") as stats:
        stats.write(
            '{"stage": "joint", "step": 11, "g": 1.0}\n{"stage": "whole", "step": 1}\n[1]\n{"stage": "joint", "ste'
        )
    covidgan.Trainer(Covidgan, tiny(out=str(out), resume=True)).load(out / "ckpt.pt")
    assert steps_of(out) == EVERY_STEP


def test_pictures_that_a_kill_came_before_are_made_on_resume(toy, small_run, here, tmp_path, whole_run):
    """The checkpoint of step 5 of g1 is there, its panel is not: in the middle of a stage, too, it is made up for."""
    run = ["--stage", "g1", "--data", toy.folder, "--out", tmp_path, *small_run, "--interval", 5]
    trainer = covidgan.Trainer(Covidgan, covidgan.parse_config([str(word) for word in run]))
    trainer.write_split()
    for _ in range(5):
        trainer.step()
    trainer.save()
    assert not list(tmp_path.glob("panel_*"))
    done = here("--resume", "--out", tmp_path)
    assert done.status == 0, done.stderr
    panel = "panel_g1_000005.png"
    assert (tmp_path / panel).read_bytes() == (whole_run[0] / panel).read_bytes()


def test_the_built_in_data_is_made_at_the_size_it_is_trained_at_and_once(tiny, tmp_path, monkeypatch):
    asked, statuses, c = [], [0, 2], tiny(data="data/phantom64")

    def run(command):
        asked.append([*map(str, command)])
        return types.SimpleNamespace(returncode=statuses.pop(0))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(covidgan.subprocess, "run", run)
    covidgan.make_phantom(c)
    assert asked[0][1:] == [str(ROOT / "data/phantom.py"), "--out", "data/phantom64", "--size", "64"]
    with pytest.raises(covidgan.Mistake, match="could not be made"):
        covidgan.make_phantom(c)
    (tmp_path / "data/phantom64").mkdir(parents=True)
    (tmp_path / "data/phantom64/split.json").touch()
    covidgan.make_phantom(c)
    assert len(asked) == 2


def test_a_split_that_was_drawn_is_written_beside_the_checkpoint(own_toy, small_run, here, tmp_path):
    (own_toy.folder / "split.json").unlink()
    run = ["--stage", "g1", "--data", own_toy.folder, "--out", tmp_path / "out", *small_run]
    done = here(*run)
    assert done.status == 0, done.stderr
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert split == covidgan.read_split(own_toy.folder, covidgan.Config.seed)
    (patient,) = {name[:3] for name in split["test"]}
    assert f"no split.json in {own_toy.folder}: held out {patient}; copy" in done.stdout


def test_curves_removed_with_their_stats_stop_no_resume(whole_run, here, copy):
    out = copy(whole_run[0])
    (out / "stats.jsonl").unlink()
    done = here("--resume", "--out", out)
    assert done.status == 0, done.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of a run's folder to write in."""

    def make(out):
        new = tmp_path / "copy"
        new.mkdir()
        for path in out.iterdir():
            (new / path.name).write_bytes(path.read_bytes())
        return new

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(whole_run, toy, small_run, here):
    before = contents(whole_run[0])
    done = here("--stage", "all", "--data", toy.folder, "--out", whole_run[0], *small_run)
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert str(whole_run[0]) in done.stderr
    assert "--overwrite" in done.stderr
    assert contents(whole_run[0]) == before


def test_overwrite_discards_the_run_that_stood_there(whole_run, toy, small_run, here, copy):
    out = copy(whole_run[0])
    done = here("--stage", "g1", "--data", toy.folder, "--out", out, *small_run, "--interval", 99, "--overwrite")
    assert done.status == 0, done.stderr
    assert steps_of(out) == EVERY_STEP[:10]
    assert {path.name for path in out.glob("panel_*")} == {"panel_g1_000010.png"}
    fresh, old = stats_of(out), stats_of(whole_run[0])[:10]
    assert fresh == old  # from the seed's weights again, not from the old checkpoint's


def test_a_checkpoint_without_its_stats_is_not_taken_up_unasked(whole_run, toy, small_run, here, copy):
    out = copy(whole_run[0])
    (out / "stats.jsonl").unlink()
    before = (out / "ckpt.pt").read_bytes()
    done = here("--stage", "all", "--data", toy.folder, "--out", out, *small_run)
    assert done.status == 2
    assert (out / "ckpt.pt").read_bytes() == before


def test_resume_of_another_architecture_is_refused(whole_run, here):
    before = contents(whole_run[0])
    done = here("--resume", "--out", whole_run[0], "--ngf", 16)
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert "ngf 8" in done.stderr
    assert contents(whole_run[0]) == before


# ---- trouble


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_with_its_step_and_files_and_keeps_the_checkpoint(
    toy, small_run, here, tmp_path, monkeypatch, value
):
    calls, real_losses = [], Covidgan.losses

    def poisoned(self, onehot, *more):
        calls.append(len(onehot))
        losses = real_losses(self, onehot, *more)
        return losses if len(calls) < 6 else {**losses, "g": losses["g"] * value}

    monkeypatch.setattr(Covidgan, "losses", poisoned)
    names = []
    batch = covidgan.Trainer.batch
    monkeypatch.setattr(covidgan.Trainer, "batch", lambda self: names.append(batch(self)[2]) or batch(self))
    done = here("--stage", "g1", "--data", toy.folder, "--out", tmp_path, *small_run)
    assert done.status == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert re.search(r"stage g1, step [56]\b", error)
    assert f"g {value}" in error
    assert all(name in error for name in names[-1])
    kept = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert (kept["stage"], kept["step"]) == ("g1", 4)
    assert all(leaf.isfinite().all() for leaf in flatten(kept).values() if torch.is_tensor(leaf))
    assert [step for _, step in steps_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_non_finite_loss_moves_no_weight(tiny, monkeypatch):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2))
    before = snapshot(trainer.method)
    real_losses = Covidgan.losses
    monkeypatch.setattr(Covidgan, "losses", lambda *a: {**real_losses(*a), "d": torch.tensor(float("nan"))})
    with pytest.raises(covidgan.Mistake, match="d nan"):
        trainer.step()
    assert not moved(trainer.method, before)


FLAT = {
    "all background": (0, -1000),
    "all lung": (1, -850),
    "one label and one value beyond the window": (3, 3071),
    "below the window": (1, -1024),
}


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_flat_slices_train_without_trouble(tiny, stage, kind):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, noise=0.0))
    label, hu = FLAT[kind]
    trainer.train.labels[:], trainer.train.hu[:] = label, hu
    trainer.begin(stage)
    for _ in range(3):
        trainer.step()
    assert all(p.isfinite().all() for p in trainer.method.parameters())
    if label:  # without lung there is nothing to measure
        trainer.test.labels[:], trainer.test.hu[:] = label, hu
    results = flatten(covidgan.evaluate(trainer)[1])
    assert all(np.isfinite(value) for value in results.values())


# ---- several processes

WORKER = """
import torch, covidgan
save = covidgan.Trainer.save
def save_all(self):
    save(self)
    torch.save(self.state(), self.out / f"rank{self.rank}.pt")
covidgan.Trainer.save = save_all
covidgan.exit_on_mistake(covidgan.main)
"""


def test_two_processes_train_as_one_on_the_joined_batch(toy, small_run, cli, here, tmp_path):
    """Both ranks end with the same weights, and those are the one process's up to rounding."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = ["--stage", "joint", "--data", toy.folder, *small_run, "--batch", 4, "--epochs", 1, "--epoch-len", 12]
    single, double = tmp_path / "single", tmp_path / "double"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "worker.py"]
    done = cli(*torchrun, *command, "--out", double, script=None, env={"PYTHONPATH": os.fspath(ROOT)})
    assert done.status == 0, done.stderr
    assert done.stdout.count("6 test slices of") == 1
    assert here(*command, "--out", single).status == 0
    ranks = [torch.load(double / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert differing(*ranks) == []
    assert differing(ranks[0], torch.load(double / "ckpt.pt", weights_only=True)) == []
    for one, two in zip(stats_of(single), stats_of(double), strict=True):
        assert one["step"] == two["step"]
        for name in ("d", "g", "dfm", "alpha", "beta"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name
    moments = [  # Adam's steps do not tell the gradient's scale, its moments do
        sum(w.norm().item() for path, w in tree.items() if path.endswith("/exp_avg"))
        for tree in (leaves(single / "ckpt.pt"), flatten(ranks[0]))
    ]
    assert moments[1] == pytest.approx(moments[0], rel=0.05)
    start = flatten(covidgan.build(Covidgan, covidgan.Config(**ranks[0]["config"])).state_dict())
    one, two = leaves(single / "ckpt.pt"), flatten(ranks[0])
    for path, w in start.items():  # what was learnt, by the weights: Adam makes steps of rounding in idle biases
        a, b = one[f"/networks{path}"] - w, two[f"/networks{path}"] - w
        if w.dim() == 4 and a.any():
            # the same step in another memory layout, so in another order of summation, comes to 0.026 by itself
            assert (a - b).norm() < 0.04 * a.norm(), path
