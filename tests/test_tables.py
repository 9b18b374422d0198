"""Table II: what stands in it, what it concludes, and that a part of it can be made alone."""

import argparse
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import scipy.stats
import torch

import covidgan
from data.slices import Mistake, read_image, read_map
from paper import generators, measures, report, rivals, runs, table2, tables
from paper.methods import METHODS

MARKED = "before\n<!-- table 2 -->\nold\n<!-- end of table 2 -->\nafter\n"


def records(method: str, values: list[float], metric: str = "PSNR", region: str = "complete") -> list[dict]:
    """A method's value of each seed."""
    given = {"method": method, "region": region, "metric": metric, "better": table2.BETTER[metric]}
    return [given | {"seed": seed, "value": value} for seed, value in enumerate(values)]


def test_every_row_of_table_2_is_a_command_that_its_training_takes():
    for name, row in generators.ROWS.items():
        method = {"covidgan": covidgan.Covidgan, **METHODS}[row.method]
        c = covidgan.parse_config([*row.options, "--size", "128", "--ngf", "16", "--ndf", "16"], method)
        helped = name.endswith(("-clean", "-best"))
        assert (c.noise == 0, c.contrast > 0, c.ema > 0) == (helped, helped, helped)
    assert {row.method for row in generators.ROWS.values()} == {"covidgan", *rivals.METHODS}


def test_a_row_is_trained_by_the_script_of_its_method():
    program = {name: generators.Row(name, ()).program for name in ("covidgan", "SPADE", "covidgan-study")}
    assert program["covidgan"] == [str(runs.ROOT / "covidgan.py")]
    assert program["SPADE"] == ["-m", "paper.rivals", "SPADE"]
    assert program["covidgan-study"] == ["-m", "paper.study"]


def test_a_row_may_not_set_what_the_table_sets_for_all_rows_alike(tmp_path, monkeypatch, three_sides):
    wide = generators.Row("covidgan", ("--preset", "best", "--ngf", "32", "--batch", "8", "--lr", "1e-3"))
    monkeypatch.setitem(generators.ROWS, "mine", wide)
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    args = tables.parse(["2", "--data", str(three_sides), "--reference", str(three_sides), "--out", str(tmp_path)])
    with pytest.raises(Mistake, match="row mine: --ngf, --batch would be the table's own, the same for all rows"):
        generators.train("mine", "paper", 0, args)
    assert not (tmp_path / "mine_paper_0").exists()


def test_a_clean_row_takes_the_optimiser_of_its_row_as_published_where_there_is_one(monkeypatch):
    monkeypatch.setitem(generators.ROWS, "lone-clean", generators.ROWS["SPADE-clean"])
    assert [generators.published_of(name) for name in ("SPADE", "SPADE-clean")] == ["SPADE", "SPADE"]
    assert generators.published_of("lone-clean") == "lone-clean"


def test_both_optimisers_are_tried_where_authors_and_paper_differ_and_only_there():
    tried = {name: row.optimisers for name, row in generators.ROWS.items()}
    assert tried["SPADE"] == tried["SEAN"] == tried["SEAN-clean"] == ("own", "paper")
    assert tried["pix2pix"] == tried["pix2pixHD"] == tried["covidgan"] == ("paper",)


def test_the_optimiser_kept_is_the_one_with_the_lower_lung_kid_on_the_patients_that_choose(tmp_path, monkeypatch):
    kids, asked = {"own": 0.05, "paper": 0.04}, []

    def measure(out, data, side, features):
        asked.append(side)
        return {"features": {"lung KID 1280": {"value": kids[out.name]}}}

    monkeypatch.setattr(generators, "train", lambda name, optimiser, seed, args: tmp_path / optimiser)
    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "feature_network", lambda folder: folder / "features.onnx")
    args = tables.parse(["2", "--out", str(tmp_path), "--results", str(tmp_path / "results")])
    for name in ("results", "others"):
        (tmp_path / name / "runs").mkdir(parents=True)
        (tmp_path / name / "runs" / "setting.json").write_text("{}")
    assert generators.optimiser_of("SPADE-clean", args) == "paper"
    kids["own"] = 0.03
    assert generators.optimiser_of("SPADE", args) == "paper" and asked == ["test"] * 2  # it is chosen once
    args.results = tmp_path / "others"
    assert generators.optimiser_of("SPADE-clean", args) == "own"
    assert set(asked) == {"test"} and generators.REPORT == "seg_test"
    kids["own"] = None  # eval.py refuses a KID of one slice
    (tmp_path / "others" / "runs" / "optimiser_SPADE.json").unlink()
    with pytest.raises(Mistake, match="too few slices on side test"):
        generators.optimiser_of("SPADE", args)
    assert not (tmp_path / "others" / "runs" / "optimiser_SPADE.json").exists()


def welch(a, b):
    """Half the 95 % interval of the difference of two means, of unequal spreads (Welch 1947), written out."""
    of_a, of_b = (np.var(values, ddof=1) / len(values) for values in (a, b))
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return scipy.stats.t.ppf(0.975, freedom) * np.sqrt(of_a + of_b)


def test_a_comparison_is_clear_beyond_welchs_interval_of_the_difference():
    ours, theirs = [27.0, 27.2, 27.4], [26.5, 26.6, 26.7]
    found = table2.comparison(records("covidgan", ours) + records("SPADE", theirs), "covidgan", "")
    assert found["each"][0]["lead"] == pytest.approx(0.6)
    assert found["each"][0]["ci95"] == pytest.approx(welch(ours, theirs), rel=1e-6)
    assert (found["compared"], found["ahead"], found["clearly ahead"], found["clearly behind"]) == (1, 1, 1, 0)
    two = table2.comparison(records("covidgan", [26.8, 27.2]) + records("SPADE", [26.3, 26.5]), "covidgan", "")
    assert two["each"][0]["lead"] > 2 * np.sqrt(0.08 / 2 + 0.02 / 2) and two["clearly ahead"] == 0  # two seeds are few
    near = table2.comparison(records("covidgan", [26.0, 26.7, 27.4]) + records("SPADE", theirs), "covidgan", "")
    assert (near["ahead"], near["clearly ahead"], near["clearly behind"]) == (1, 0, 0)


def test_of_unequal_numbers_of_seeds_the_interval_is_that_of_the_less_certain_mean():
    difference, half = report.apart([0.0, 2.0], [5.0, 5.1, 5.2])
    assert difference == pytest.approx(-4.1) and half == pytest.approx(welch([0.0, 2.0], [5.0, 5.1, 5.2]), rel=1e-6)
    assert 12 < half < 13  # one degree of freedom
    assert report.apart([0.0], [5.0, 5.1, 5.2]) == (pytest.approx(-5.1), None)


def test_a_verdict_tells_of_how_many_comparisons_seeds_can_tell():
    seeds = records("covidgan", [27.0, 27.2, 27.4]) + records("SPADE", [26.5, 26.6, 26.7]) + records("SEAN", [27.5])
    made = {"comparisons": [table2.comparison(seeds, "covidgan", "")], "progress": {}}
    lines = [line for line in table2.verdicts(made) if line.startswith("- ")]
    told = "ahead in 1 of 2; of the 1 with several seeds clearly ahead in 1, clearly behind in 0"
    assert lines == [f"- covidgan against the rivals as published: {told}"]
    made["comparisons"] = [table2.comparison(records("covidgan", [27.0]) + seeds[3:], "covidgan", "")]
    assert table2.verdicts(made)[2].endswith("ahead in 1 of 2; one seed, no verdict")


def test_where_lower_is_better_the_lower_is_ahead_and_one_seed_is_never_clear():
    found = records("covidgan-best", [0.04], "NRMSE") + records("SEAN-clean", [0.05], "NRMSE")
    told = table2.comparison(found, "covidgan-best", "-clean")
    assert (told["rivals"], told["ahead"], told["clearly ahead"]) == ("clean", 1, 0)
    assert told["each"][0]["lead"] == pytest.approx(0.01) and told["each"][0]["ci95"] is None


def test_of_a_full_table_32_comparisons_are_made():
    full = [
        record
        for k, method in enumerate(["covidgan", *generators.RIVALS])
        for metric in table2.BETTER
        for region in table2.REGIONS
        for record in records(method, [k, k + 1.0], metric, region)
    ]
    assert table2.comparison(full, "covidgan", "")["compared"] == 32
    assert table2.comparison(full, "covidgan", "-clean")["compared"] == 0


def test_time_to_quality_is_the_first_moment_at_what_pix2pixHD_ends_with():
    points = {
        "pix2pixHD": [(100, 0.09), (200, 0.05)],
        "covidgan": [(50, 0.08), (80, 0.05), (110, 0.06)],
        "SPADE": [(300, 0.06)],
    }
    courses = {name: [{"seconds": s, "KID": kid} for s, kid in path] for name, path in points.items()}
    progress = {name: {"machine": "a", "course": course} for name, course in courses.items()}
    assert table2.time_to(progress, "") == {"covidgan": 80, "pix2pixHD": 200, "SPADE": None}
    assert table2.time_to(progress, "-clean") == {}
    progress["covidgan"]["machine"] = "b"  # whose seconds are others
    assert table2.time_to(progress, "") == {"pix2pixHD": 200, "SPADE": None}


def test_quality_along_a_run_is_that_of_its_kept_checkpoints_of_the_whole_generator(tmp_path, monkeypatch):
    for seconds, stage in [("000500", "g1"), ("001000", "joint"), ("002000", "joint")]:
        (tmp_path / "kept" / seconds).mkdir(parents=True)
        torch.save({"stage": stage}, tmp_path / "kept" / seconds / "ckpt.pt")
    kids = {"001000": 0.08, "002000": 0.04}
    told = {name: {"features": {"lung KID 1280": {"value": kid}}} for name, kid in kids.items()}
    monkeypatch.setattr(generators, "measured", lambda run, _: told[run.name])
    points = measures.progress_of(tmp_path, argparse.Namespace())
    assert points == [{"seconds": 1000, "KID": 0.08}, {"seconds": 2000, "KID": 0.04}]


def test_the_papers_figures_are_those_of_its_table():
    paper = {(r["method"], r["region"], r["metric"]): r["value"] for r in table2.paper_records()}
    assert len(paper) == 5 * 8
    assert paper["covidgan", "complete", "FID"] == 0.0327 and paper["covidgan", "lung", "RMSE"] == 0.2747
    assert paper["SEAN", "lung", "FID"] == 0.3575 and paper["pix2pix", "lung", "PSNR"] == 26.56


def test_a_table_is_put_between_its_marks_and_nothing_else_is_touched(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(MARKED)
    report.write_readme(path, "table 2", "new")
    assert path.read_text() == MARKED.replace("old", "\nnew\n")
    path.write_text("no marks\n")
    report.write_readme(path, "table 2", "new")
    assert path.read_text() == "no marks\n"
    assert "README.md: left as it is: without <!-- table 2 -->" in capsys.readouterr().out
    report.write_readme(tmp_path / "not_there.md", "table 2", "new")
    assert not (tmp_path / "not_there.md").exists()


def test_the_picture_zooms_on_the_rarer_lesion_and_stays_within_the_slice():
    labels = np.ones((100, 100), np.uint8)
    labels[60:80, 10:40] = 2
    labels[90:99, 0:5] = 3
    rows, columns = table2.lesion_window(labels)
    assert (rows, columns) == (slice(60, 100), slice(0, 40)) and (labels[rows, columns] == 3).sum() == 45


def test_the_markdown_has_every_method_with_its_spread_and_the_papers_rows():
    found = [
        r for metric in table2.BETTER for region in table2.REGIONS for r in records("SPADE", [1, 2], metric, region)
    ]
    cost = {"method": "SPADE", "seed": 0, "seconds": 1200.4, "samples": 12000, "parameters": 92088385}
    cost |= {"synthesis": 0.5, "d_at_end": 1.516, "machine": "a CPU"}
    elsewhere = cost | {"seed": 1, "seconds": None, "synthesis": 0.1, "d_at_end": 1.716, "machine": "a GPU"}
    text = table2.markdown(
        {"setting": {"size": 128}, "records": found, "costs": [cost, elsewhere], "progress": {}}
        | {"comparisons": [table2.comparison(found, "covidgan", "")]}
    )
    assert "| SPADE | 2 | 1.50 +- 0.71 | 1.5000 +- 0.7071 |" in text
    assert "| SPADE | 1,200 | 12,000 | 92,088,385 | 0.500 | 1.62 |" in text
    assert "| SEAN | 0.0341 | 26.69 | 0.8922 | 0.0837 | 0.3575 | 28.02 | 0.8952 | 0.2795 |" in text


def test_ds_loss_at_the_end_is_of_the_last_tenth_of_the_last_stage(tmp_path):
    steps = [("g2", 9.0)] * 5 + [("joint", 3.0)] * 18 + [("joint", 1.0), ("joint", 2.0)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps({"stage": s, "d": d}) + "\n" for s, d in steps))
    assert measures.loss_of_d(tmp_path) == 1.5


def test_a_method_without_a_discriminator_has_no_loss_of_d(tmp_path):
    (tmp_path / "stats.jsonl").write_text('{"stage": "whole", "l1": 0.5}\n')
    assert measures.loss_of_d(tmp_path) is None
    cost = {"method": "mine", "machine": "", "seconds": None, "samples": 1, "parameters": 2, "synthesis": 0.1}
    assert table2.costs([cost | {"d_at_end": None}])[2] == "| mine | - | 1 | 2 | 0.100 | - |"


def test_checkpoints_are_kept_as_they_come_with_the_cpu_seconds_behind_them(tmp_path):
    """Of a script that computes two seconds, sleeps two, writes and ends, and went on with a run of 100 seconds."""
    (tmp_path / "kept" / "000100").mkdir(parents=True)
    (tmp_path / "kept" / "000100" / "ckpt.pt").write_text("of the part before the stop")
    (tmp_path / "ckpt.pt").write_text("of the part before the stop")
    work = "import time\nwhile time.process_time() < 2: pass\ntime.sleep(2); open('done', 'w')"
    script = subprocess.Popen([sys.executable, "-c", work], cwd=tmp_path)
    with runs.keeping(tmp_path, script.pid):
        while not (tmp_path / "done").exists():
            time.sleep(0.01)
        (tmp_path / "new").write_text("later")
        (tmp_path / "new").replace(tmp_path / "ckpt.pt")
        script.wait()
    first, second = runs.kept_seconds(tmp_path)
    assert first == "000100" and int(second) == 102
    assert (tmp_path / "kept" / second / "ckpt.pt").read_text() == "later"
    assert not any(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def test_a_course_that_a_full_disk_broke_is_told_and_not_kept_with_holes(tmp_path, monkeypatch):
    (tmp_path / "kept" / "000100").mkdir(parents=True)
    (tmp_path / "kept" / "000100" / "ckpt.pt").write_text("whole")
    (tmp_path / "kept" / "000100" / ".ckpt.pt.tmp").write_text("of a kill")

    def full(path, content):
        raise Mistake(f"{path}: cannot be written")

    monkeypatch.setattr(runs, "write_bytes", full)
    with pytest.raises(Mistake, match=r"ckpt.pt: cannot be written"), runs.keeping(tmp_path, 0):
        assert [path.name for path in (tmp_path / "kept" / "000100").iterdir()] == ["ckpt.pt"]
        (tmp_path / "ckpt.pt").write_text("new")
    assert not (tmp_path / "kept").exists()


def test_an_unknown_row_is_one_line(tmp_path):
    with pytest.raises(Mistake, match="--rows cyclegan: give of covidgan, covidgan-best, pix2pix"):
        tables.main(["2", "--rows", "cyclegan"])
    with pytest.raises(Mistake, match="--seeds -1: give 0 or more"):
        tables.main(["2", "--seeds", "0", "-1"])


@pytest.fixture(scope="module")
def made(table_command):
    """Table II of two rows at toy size, made by its command; its args."""
    argv = table_command("2", MARKED, "--samples", "32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "KEPT", 1)
        patch.setitem(generators.ROWS, "covidgan", generators.Row("covidgan", ("--preset", "paper", "--n-blocks", "1")))
        patch.setitem(generators.ROWS, "SEAN", generators.Row("SEAN", ("--preset", "paper")))
        tables.main([*argv, "--rows", "covidgan", "SEAN"])
        yield tables.parse(argv)


def test_the_command_makes_the_table_of_the_rows_asked_for_and_both_floors(made):
    table = json.loads((made.results / "table2.json").read_text())
    methods = {record["method"] for record in table["records"]}
    assert methods == {"covidgan", "SEAN", "SEAN-self", "label means", "nearest training case"}
    found = {(r["method"], r["region"], r["metric"]): r for r in table["records"]}
    assert found["SEAN", "lung", "PSNR"]["better"] == "higher" and found["SEAN", "lung", "PSNR"]["seed"] == 0
    results = json.loads((made.out / "covidgan_paper_0" / "eval_seg_test" / "results.json").read_text())
    assert found["covidgan", "lung", "KID 1280"]["value"] == results["features"]["lung KID 1280"]["value"]
    assert found["covidgan", "complete", "SSIM"]["value"] == results["pixels"]["complete SSIM"]["mean"]
    assert table["setting"]["size"] == 64 and table["setting"]["optimisers"] == {"covidgan": "paper", "SEAN": "paper"}
    assert "| SEAN-self | 1 |" in (made.results.parent / "README.md").read_text()


def test_runs_of_another_setting_are_not_taken_for_this_ones(made):
    places = [
        str(word) for name in ("data", "reference", "out", "results") for word in (f"--{name}", getattr(made, name))
    ]
    before = (made.results / "table2.json").read_bytes()
    other = ["2", *places, "--rows", "--ngf", "4", "--samples", "64"]
    with pytest.raises(
        Mistake, match=rf"{made.results}/runs: made with --samples 32, not 64: .*, or another --results"
    ):
        tables.main(other)
    elsewhere = ["--results", str(made.results.parent / "others")]
    with pytest.raises(Mistake, match=rf"{made.out}: made with --samples 32, not 64: give that, or another --out"):
        tables.main([*other, *elsewhere])
    assert (made.results / "table2.json").read_bytes() == before


def test_what_a_run_cost_stands_beside_it(made):
    costs = {cost["method"]: cost for cost in json.loads((made.results / "table2.json").read_text())["costs"]}
    assert costs["covidgan"]["samples"] == costs["SEAN"]["samples"] == 32
    steps = [json.loads(line)["stage"] for line in (made.out / "covidgan_paper_0" / "stats.jsonl").open()]
    assert [steps.count(stage) for stage in ("g1", "g2", "joint")] == [4, 4, 4]  # of four samples each
    network = covidgan.build(rivals.Sean, rivals.MatchingConfig(size=64, ngf=4, ndf=4)).g
    assert costs["SEAN"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert all(0 < cost["d_at_end"] < 10 for cost in costs.values())
    assert 0 < costs["SEAN"]["synthesis"] < 5 and costs["covidgan"]["seconds"] > 1


def test_lung_kid_is_followed_along_a_run_once_a_whole_generator_is_there(made):
    progress = json.loads((made.results / "table2.json").read_text())["progress"]
    assert all(len(progress[name]["course"]) >= 1 for name in ("covidgan", "SEAN"))
    table = json.loads((made.results / "table2.json").read_text())
    end = next(r for r in table["records"] if (r["method"], r["region"], r["metric"]) == ("SEAN", "lung", "KID 1280"))
    assert progress["SEAN"]["course"][-1]["KID"] == end["value"]


def test_the_floor_of_label_means_has_one_value_a_label(made):
    names = sorted(path.stem for path in (made.out / "label_means" / "images").glob("*.png"))
    assert len(names) == 6
    values = {label: set() for label in (1, 2, 3)}
    for name in names:
        hu = read_image(made.out / "label_means" / "images" / f"{name}.png")
        labels = read_map(made.reference / "maps" / f"{name}.png")
        for label in values:
            values[label] |= set(hu[labels == label].tolist())
    assert len(values[1]) == 1 and all(len(found) <= 1 for found in values.values())
    trained = json.loads((made.reference / "split.json").read_text())["train"]
    lungs = [
        read_image(made.reference / "images" / f"{name}.png")[read_map(made.reference / "maps" / f"{name}.png") == 1]
        for name in trained
    ]
    assert values[1].pop() == pytest.approx(np.concatenate(lungs).clip(-1350, 150).mean(), abs=1)


def test_the_same_command_goes_on_without_training_anything_again(made, monkeypatch):
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    assert json.loads((made.results / "table2.json").read_text())["records"] == table2.collect(made)["records"]


def copied(made, tmp_path, **names):
    """The table's args in another place, with the measurements alone: file names in `names` are changed, inside too."""
    args = argparse.Namespace(**{**vars(made), "out": tmp_path / "out", "results": tmp_path / "results"})
    (args.results / "runs").mkdir(parents=True)
    for path in (made.results / "runs").iterdir():
        name = names.get(path.stem, path.stem)
        content = path.read_text().replace(f'"run": "{path.stem}"', f'"run": "{name}"')
        (args.results / "runs" / f"{name}.json").write_text(content)
    return args


def test_what_was_measured_elsewhere_stands_beside_what_is_trained_here(made, monkeypatch, tmp_path):
    """From another machine come the measurements alone, of another seed; nothing of its run is needed."""
    args = copied(made, tmp_path, SEAN_0="SEAN_7")
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    ours, theirs = table2.collect(made), table2.collect(args)
    assert theirs["setting"]["seeds"] == {"covidgan": [0], "SEAN": [7]}
    assert [r | {"seed": 7} if "SEAN" in r["method"] else r for r in ours["records"]] == theirs["records"]
    assert (ours["costs"], ours["progress"]) == (theirs["costs"], theirs["progress"])


def test_measurements_of_another_run_setting_or_training_are_refused(made, monkeypatch, tmp_path):
    args = copied(made, tmp_path)
    kept, setting = (args.results / "runs" / name for name in ("SEAN_0.json", "setting.json"))
    (twice := kept.with_name("SEAN_1.json")).write_bytes(kept.read_bytes())  # it would count as a second seed
    with pytest.raises(Mistake, match=r"SEAN_1.json: of another run"):
        table2.collect(args)
    twice.unlink()
    monkeypatch.setitem(generators.ROWS, "SEAN", generators.Row("SEAN", ("--preset", "paper", "--noise", "0")))
    with pytest.raises(Mistake, match=r"SEAN_0.json: trained with '--preset paper', its row now has .*--noise 0"):
        table2.collect(args)
    setting.write_text(setting.read_text().replace('"samples": 32', '"samples": 64'))
    with pytest.raises(Mistake, match=r"label_means.json: of another run, or of another setting than .*setting"):
        table2.collect(args)


def test_a_row_that_only_the_table_knows_is_not_lost_without_a_word(made, monkeypatch, tmp_path):
    args = copied(made, tmp_path)
    (args.results / "table2.json").write_bytes((made.results / "table2.json").read_bytes())
    before = (args.results / "table2.json").read_bytes()
    (args.results / "runs" / "SEAN_0.json").unlink()
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    places = [
        str(word) for name in ("data", "reference", "out", "results") for word in (f"--{name}", getattr(args, name))
    ]
    with pytest.raises(
        Mistake, match=r"table2.json has rows of which .*runs has nothing: SEAN: name these with --rows"
    ):
        tables.main(["2", *places, "--rows", "--ngf", "4", "--samples", "32"])
    assert (args.results / "table2.json").read_bytes() == before
