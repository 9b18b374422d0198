"""Table II: what stands in it, what it concludes, and two of its rows made by its command."""

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
    ours, theirs = [27.0, 27.2, 27.4], [26.5, 26.6, 26.7]
    found = table2.comparison(records("covidgan", ours) + records("SPADE", theirs), "covidgan", "")
    assert found["each"][0]["lead"] == pytest.approx(0.6)
    assert found["each"][0]["ci95"] == pytest.approx(welch(ours, theirs), rel=1e-6)
    assert (found["compared"], found["ahead"], found["clearly ahead"], found["clearly behind"]) == (1, 1, 1, 0)
    near = table2.comparison(records("covidgan", [26.0, 26.7, 27.4]) + records("SPADE", theirs), "covidgan", "")
    assert (near["ahead"], near["clearly ahead"], near["clearly behind"]) == (1, 0, 0)
    assert report.apart([0.0], theirs) == (pytest.approx(-26.6), None)


def test_where_lower_is_better_the_lower_is_ahead_and_one_seed_is_never_clear():
    found = records("covidgan-best", [0.04], "NRMSE") + records("SEAN-clean", [0.05], "NRMSE")
    told = table2.comparison(found, "covidgan-best", "-clean")
    assert (told["ahead"], told["clearly ahead"], told["each"][0]["lead"]) == (1, 0, pytest.approx(0.01))
    assert "one seed, no verdict" in table2.verdicts({"comparisons": [told]})[-1]


def test_of_a_full_table_32_comparisons_are_made():
    methods = [*enumerate(["covidgan", *generators.RIVALS])]
    full = [one for k, name in methods for m in DIGITS for r in REGIONS for one in records(name, [k, k + 1.0], m, r)]
    assert table2.comparison(full, "covidgan", "")["compared"] == 32
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


def test_the_picture_zooms_on_the_rarer_lesion_and_stays_within_the_slice():
    labels = np.ones((100, 100), np.uint8)
    labels[60:80, 10:40], labels[90:99, 0:5] = 2, 3
    assert table2.lesion_window(labels) == (slice(60, 100), slice(0, 40))


def test_ds_loss_at_the_end_is_of_the_last_tenth_of_the_last_stage(tmp_path):
    steps = [("g2", 9.0)] * 5 + [("joint", 3.0)] * 18 + [("joint", 1.0), ("joint", 2.0)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps({"stage": s, "d": d}) + "\n" for s, d in steps))
    assert generators.loss_of_d(tmp_path) == 1.5


def test_an_unknown_row_is_one_line():
    with pytest.raises(Mistake, match="cyclegan"):
        tables.main(["2", "--rows", "cyclegan"])


@pytest.mark.long
def test_two_rows_are_made_by_the_tables_command_and_once(table_command, monkeypatch, capsys):
    argv = table_command("2", "", "--samples", "32", "--rows", "covidgan", "SEAN")
    args = tables.parse(argv)
    monkeypatch.setitem(generators.ROWS, "covidgan", generators.ours("--n-blocks 1"))
    tables.main(argv)
    table = json.loads((args.results / "table2.json").read_text())
    for name in ("covidgan", "SEAN"):
        results = json.loads((args.out / f"{name}_0" / "eval_seg_test" / "results.json").read_text())
        held = {f"{one['region']} {one['metric']}": one["value"] for one in table["records"] if one["method"] == name}
        assert held["lung PSNR"] == results["pixels"]["lung PSNR"]["mean"] > 5
        assert held["lung KID 1280"] == results["features"]["lung KID 1280"]["value"] and "lung FID 24" not in held
    assert [cost["samples"] for cost in table["costs"]] == [32, 32] and (args.out / "table2.png").exists()
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
