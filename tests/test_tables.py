"""Table II: what stands in it, what it concludes, and two of its rows made by its command."""

import argparse
import dataclasses
import functools
import json

import numpy as np
import pytest
import scipy.stats

import covidgan
from data.slices import Mistake, read_image, read_map
from paper import generators, report, rivals, runs, table2, tables
from paper.generators import DIGITS, REGIONS


def records(method, values, metric="PSNR", region="complete"):
    """A method's value of each seed."""
    given = {"method": method, "region": region, "metric": metric}
    return [given | {"seed": seed, "value": value} for seed, value in enumerate(values)]


def welch(a, b):
    """Half the 95 % interval of the difference of two means, of unequal spreads (Welch 1947), written out."""
    of_a, of_b = (np.var(values, ddof=1) / len(values) for values in (a, b))
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return scipy.stats.t.ppf(0.975, freedom) * np.sqrt(of_a + of_b)


def test_every_row_of_table_2_is_a_command_that_its_training_takes():
    for name, row in generators.ROWS.items():
        c = covidgan.parse_config([*row.options, "--size", "128", "--ngf", "16", "--ndf", "16"], row.kind)
        helped = name.endswith(("-clean", "-best"))
        assert (c.noise == 0, c.contrast > 0, c.ema > 0) == (helped, helped, helped)
    assert {row.kind.name for row in generators.ROWS.values()} == {"covidgan", *rivals.METHODS}
    assert generators.ROWS["SPADE-clean"].program == ("-m", "paper.rivals", "SPADE")


def test_a_comparison_is_clear_beyond_welchs_interval_of_the_difference():
    ours, theirs, lungs = [27.0, 27.2, 27.4], [26.5, 26.6, 26.7], functools.partial(records, region="lung")
    found = table2.comparison(lungs("covidgan", ours) + lungs("SPADE", theirs), "covidgan", "")
    assert found["each"][0]["lead"] == pytest.approx(0.6)
    assert found["each"][0]["ci95"] == pytest.approx(welch(ours, theirs), rel=1e-6)
    assert (found["compared"], found["ahead"], found["clearly ahead"], found["clearly behind"]) == (1, 1, 1, 0)
    near = table2.comparison(lungs("covidgan", [26.0, 26.7, 27.4]) + lungs("SPADE", theirs), "covidgan", "")
    assert (near["ahead"], near["clearly ahead"], near["clearly behind"]) == (1, 0, 0)
    assert report.apart([0.0], theirs) == (pytest.approx(-26.6), None)


def test_where_lower_is_better_the_lower_is_ahead_and_one_seed_is_never_clear():
    found = records("covidgan-best", [0.04], "KID 1280") + records("SEAN-clean", [0.05], "KID 1280")
    told = table2.comparison(found, "covidgan-best", "-clean")
    assert (told["ahead"], told["clearly ahead"], told["each"][0]["lead"]) == (1, 0, pytest.approx(0.01))
    assert "one seed, no verdict" in table2.verdicts({"comparisons": [told]})[-1]


def test_of_a_full_table_20_comparisons_are_made_of_fid_kid_and_one_error_of_pixels():
    methods = [*enumerate(["covidgan", *generators.RIVALS])]
    full = [one for k, name in methods for m in DIGITS for r in REGIONS for one in records(name, [k, k + 1.0], m, r)]
    told = table2.comparison(full, "covidgan", "")
    assert told["compared"] == 20 and {one["metric"] for one in told["each"]} == {"FID 24", "KID 1280", "PSNR"}
    assert told["ahead"] == 16  # the lowest FID and KID, and the lowest PSNR
    assert table2.comparison(full, "covidgan", "-clean")["compared"] == 0


def test_the_papers_figures_are_those_of_its_tables():
    """Sums over the printed tables, intervals without those less than 1e-5."""
    two = {method: [*map(float, figures.split())] for method, figures in report.PAPER["2"].items()}
    assert two["covidgan"][0] == 0.0327 and two["covidgan"][7] == 0.2747 and two["pix2pix"][5] == 26.56
    for table, rows, means, halves in (("3", 10, 8043.29, 19.00), ("4", 6, 4951.38, 11.29)):
        cells = [cell.split("±") for figures in report.PAPER[table].values() for cell in figures.split()]
        assert len(cells) == 9 * rows and sum(float(mean) for mean, _ in cells) == pytest.approx(means)
        assert sum(float(half) for _, half in cells if half != "e") == pytest.approx(halves)
    five = [figures.partition("±")[0].split() for figures in report.PAPER["5"].values()]
    assert np.array(five, float).sum(0)[:2] == pytest.approx([0.442, 293.66]) and five[0][2] == "89.19"


def test_at_equal_seconds_all_have_the_same_aids_but_for_what_they_are_told():
    plain = covidgan.parse_config([*generators.ROWS["covidgan-best"].options])
    assert (plain.steer, plain.draws) == (False, 0)
    for name, row in generators.TIMED.items():
        c = covidgan.parse_config([*row.options, "--size", "128"], row.kind)
        assert (c.noise, c.contrast, c.ema) == (0, 4, 0.998)
        assert c.steer == name.endswith(("-steer", "-draws"))
    best, draws = (covidgan.parse_config([*generators.TIMED[name].options]) for name in ("best", "best-draws"))
    assert draws == dataclasses.replace(best, steer=True, draws=covidgan.PRESETS["steered"]["draws"]) != best


def test_a_budget_of_seconds_is_shared_by_all_stages():
    cost = {"g1": 0.01, "g2": 0.05, "joint": 0.1}
    samples = generators.samples_in(600, {"g1": 2, "g2": 2, "joint": 1}, cost)
    assert samples * (2 * 0.01 + 2 * 0.05 + 0.1) == pytest.approx(600, abs=0.3)


def test_the_seconds_of_a_sample_are_the_processs_own_and_measured_once(toy, tmp_path, monkeypatch):
    clock, steps, row = [0.0], [], generators.row_of("best")
    spent = {"g1": 1.0, "g2": 2.0, "joint": 4.0}

    def step(self):
        steps.append(self.stage)
        clock[0] += 100.0 if steps.count(self.stage) <= generators.WARM else spent[self.stage]

    monkeypatch.setattr(covidgan.Trainer, "step", step)
    monkeypatch.setattr(generators.time, "process_time", lambda: clock[0])
    small = ["--data", str(toy.folder), "--size", "64", "--ngf", "4", "--ndf", "4", "--batch", "2", "--n-blocks", "1"]
    c, args = covidgan.parse_config([*row.options, *small]), argparse.Namespace(results=tmp_path)
    for _ in range(2):
        assert generators.cost_of_sample("best", c, args) == {"g1": 0.5, "g2": 1.0, "joint": 2.0}
    assert len(steps) == 3 * (generators.WARM + generators.TIMED_STEPS)
    assert not generators.kept("best", argparse.Namespace(results=tmp_path))


def results_of(value, dice):
    """eval.py's results of slices whose figures are all this value."""
    names = [f"{region} {metric}" for region in REGIONS for metric in DIGITS if metric != generators.DICE]
    found = {f"{side} infection Dice": {"mean": share} for side, share in (("real", 0.8), ("fake", dice))}
    pixels, features = ({name: {key: value} for name in names} for key in ("mean", "value"))
    return {"pixels": pixels, "features": features, "segmentation": found}


def test_who_steers_is_measured_told_and_drawn_and_the_table_keeps_them_apart(tmp_path, monkeypatch):
    args = tables.parse(["2", "--seconds", "1350", "--out", str(tmp_path), "--results", str(tmp_path / "results")])
    assert (args.out, args.results) == (tmp_path / "1350s", tmp_path / "results" / "1350s")
    asked = []

    def measure(run, data, side, unet, kind, *options):
        asked.append((kind, *options))
        return results_of(len(asked), 0.7)

    cost = {"seconds": 1400.0, "samples": 8, "parameters": 9, "commit": "c", "machine": "m"}
    monkeypatch.setattr(generators, "train", lambda name, seed, args: tmp_path / name)
    monkeypatch.setattr(generators, "judge", lambda args: tmp_path / "unet.onnx")
    monkeypatch.setattr(generators, "cost_of", lambda run, method: cost)
    monkeypatch.setattr(generators, "keep_floor", lambda *_: {"figures": generators.figures_of(results_of(0.1, 0.3))})
    monkeypatch.setattr(covidgan, "read_checkpoint", lambda path: path.parent.name)
    restored = lambda name, kind: (None, kind.options(steer=name.endswith("-steer")))  # noqa: E731
    monkeypatch.setattr(covidgan, "restore", restored)
    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "obeys", lambda run, *_: {"other lung, RMS": {"median": 40.0 + len(run.name), "N": 2}})
    for name in ("SPADE-steer", "SPADE-clean"):
        generators.keep(name, 0, args)
    assert asked == [("synthetic", "--complement", args.reference), ("drawn", "--draws", "1"), ("synthetic",)]
    runs.write_json(args.results / "runs" / "setting.json", {"seconds": args.seconds})
    table = tables.table_of(args).collect(args)
    held = {(one["method"], one["metric"]): one["value"] for one in table["records"] if one["region"] == "complete"}
    kid = {method: value for (method, metric), value in held.items() if metric == "KID 1280"}
    assert {method: value for method, value in kid.items() if method not in generators.FLOORS} == {
        "SPADE-steer told": 1,
        "SPADE-steer drawn": 2,
        "SPADE-clean": 3,
    }
    assert held["real slices", "U-Net's Dice"] == pytest.approx(80)  # the ceiling
    assert held["SPADE-clean", "U-Net's Dice"] == pytest.approx(70)
    assert [(one["budget"], one["seconds"]) for one in table["costs"]] == [(1350, 1400)] * 2
    obeyed = {one["method"]: one["value"] for one in table["records"] if one["region"] == "steering"}
    assert obeyed == {"SPADE-steer told": 51, "SPADE-clean": 51}
    text = "\n".join(tables.table_of(args).markdown(table))
    assert "| SPADE-steer drawn | 0 | 2.00 |" in text and "1,350 CPU seconds" in text


def test_a_seed_that_a_gpu_has_trained_is_marked(tmp_path):
    """By what is kept of it: no CPU seconds, and no processor."""
    gpu, cpu = {"seconds": None, "commit": "c", "machine": "NVIDIA H100"}, {"seconds": 5.0, "commit": "c"}
    killed = {"seconds": None, "commit": "c", "machine": "AMD EPYC, AVX2, threads: 1"}
    figures = {"figures": {"lung PSNR": {"value": 25.0}}}
    found = generators.records_of("SPADE", {seed: one | figures for seed, one in enumerate((gpu, cpu, killed))})
    lines = report.quality(found, "lung", DIGITS)
    assert lines[0] == "| row | seeds | PSNR |" and lines[2].startswith("| SPADE | 0*, 1, 2 | 25.00")
    report.write(tmp_path, "marked", {}, lines)
    report.write(tmp_path, "plain", {}, [line.replace("*", "") for line in lines])
    notes = [report.ON_GPU in (tmp_path / f"{name}.md").read_text() for name in ("marked", "plain")]
    assert notes == [True, False]


@pytest.mark.parametrize("wrong", [["3", "--seconds", "9"], ["2", "--seconds", "-1"]])
def test_seconds_go_with_table_2_alone(wrong):
    with pytest.raises(Mistake, match="--seconds"):
        tables.parse(wrong)


@pytest.mark.long
def test_two_rows_are_made_by_the_tables_command_and_once(table_command, monkeypatch, capsys):
    unet = ["--channels", "4", "--unet-samples", "64"]
    argv = table_command("2", "", "--samples", "32", *unet, "--rows", "covidgan", "SEAN")
    args = tables.parse(argv)
    monkeypatch.setitem(generators.ROWS, "covidgan", generators.ours("--n-blocks 1"))
    tables.main(argv)
    table = json.loads((args.results / "table2.json").read_text())
    for name in ("covidgan", "SEAN"):
        results = json.loads((args.out / f"{name}_0" / "eval_seg_test" / "results.json").read_text())
        held = {f"{one['region']} {one['metric']}": one["value"] for one in table["records"] if one["method"] == name}
        assert held["lung PSNR"] == results["pixels"]["lung PSNR"]["mean"] > 5
        assert held["complete U-Net's Dice"] == 100 * results["segmentation"]["fake infection Dice"]["mean"]
        assert held["lung KID 1280"] == results["features"]["lung KID 1280"]["value"] and "lung FID 24" not in held
    assert [cost["samples"] for cost in table["costs"]] == [32, 32]
    assert "| SEAN | 0 |" in (args.results / "table2.md").read_text()
    painted = {1: set(), 2: set()}  # label means
    for path in (args.out / "label_means" / "images").iterdir():
        hu, labels = read_image(path), read_map(args.reference / "maps" / path.name)
        for label, values in painted.items():
            values |= {*hu[labels == label].tolist()}
    assert [len(values) for values in painted.values()] == [1, 1]
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    tables.main(argv)
    assert json.loads((args.results / "table2.json").read_text()) == table
    with pytest.raises(Mistake, match=r"setting\.json.*ngf"):
        tables.main([*argv, "--ngf", "8"])
