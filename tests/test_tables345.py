"""Tables III, IV and V and what goes beyond them: what a U-Net trains on, what its figures mean, one row made whole."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import scipy.stats
import torch
from test_tables import welch

import covidgan
import export
from data.slices import Mistake, patient_of, read_image, read_map, read_split
from paper import generators, measures, mixes, runs, table345, tables, weighting
from paper.mixes import Mix, Scores, members

NAMES = [f"P{patient:02d}_S{position:03d}" for patient in (1, 2) for position in range(1, 21)]  # 40
VARIANTS = [f"{name}v{k:02d}" for name in NAMES for k in range(1, mixes.VARIANTS + 1)]


def base(name):
    """The map that a variant was made of."""
    return name[: -len("v01")]


def lung_mean(dataset, name):
    """Mean HU of a slice's lung without lesions."""
    return read_image(dataset / "images" / f"{name}.png")[read_map(dataset / "maps" / f"{name}.png") == 1].mean()


# ---- mixing sets


def test_replacing_keeps_the_number_and_swaps_a_share_for_the_synthetic_slices_of_the_same_maps():
    for share, swapped in ((0.0, 0), (0.1, 4), (0.3, 12), (0.5, 20)):
        found = members(Mix(replaced=share), NAMES, NAMES, [], 0)
        assert (len(found["real"]), len(found["replaced"])) == (40 - swapped, swapped)
        assert sorted(found["real"] + found["replaced"]) == NAMES
        assert found["added"] == found["augmented"] == []


def test_adding_keeps_all_real_slices_and_takes_each_map_once_before_any_a_second_time():
    found = members(Mix(added=0.4), NAMES, [], VARIANTS, 0)
    assert sorted(found["real"]) == NAMES and found["replaced"] == []
    assert len(found["added"]) == len({*map(base, found["added"])}) == 16
    assert {name[-3:] for name in found["added"]} == {"v01"}
    fourfold = members(Mix(added=4), NAMES, [], VARIANTS, 0)["added"]
    assert len(fourfold) == len({*fourfold}) == 160
    assert {[*map(base, fourfold)].count(name) for name in NAMES} == {4}


def test_a_smaller_share_is_part_of_a_larger_and_another_seed_draws_another():
    tenth, half = (members(Mix(replaced=share), NAMES, NAMES, [], 3)["replaced"] for share in (0.1, 0.5))
    assert {*tenth} < {*half}
    assert {*half} != {*members(Mix(replaced=0.5), NAMES, NAMES, [], 4)["replaced"]}


def test_few_real_slices_are_augmented_by_the_same_maps_whether_synthetic_or_not():
    alone, synthetic = (members(mix, NAMES, [], VARIANTS, 1) for mix in (Mix(8), Mix(8, added=4)))
    plain = members(Mix(8, augmented=4), NAMES, [], VARIANTS, 1)
    assert len(alone["real"]) == 8 and alone["real"] == synthetic["real"] == plain["real"]
    assert len(synthetic["added"]) == 32 and synthetic["added"] == plain["augmented"]
    assert {*map(base, synthetic["added"])} == {*alone["real"]}
    assert {*alone["real"]} < {*members(Mix(20), NAMES, [], [], 1)["real"]}


def test_what_has_no_synthetic_slice_stays_real_and_too_few_are_an_error():
    some = NAMES[:10]
    found = members(Mix(replaced=0.2), NAMES, some, [], 0)
    assert len(found["replaced"]) == 8 and {*found["replaced"]} < {*some}
    with pytest.raises(Mistake, match="20 synthetic slices wanted beside 40 real ones, there are 10"):
        members(Mix(replaced=0.5), NAMES, some, [], 0)


def test_more_real_slices_than_there_are_is_refused():
    with pytest.raises(Mistake, match="41 real slices wanted, there are 40"):
        members(Mix(41), NAMES, [], [], 0)


def test_every_row_of_every_table_has_a_folder_of_its_own_and_the_same_mix_the_same():
    for study in table345.EXPERIMENTS.values():
        names = [mix.name for mix in study.rows.values()]
        assert len({*names}) == len(names) and not any(name.count("/") for name in names)
    assert table345.ROWS_3["0%"].name == table345.ROWS_4["0%"].name
    assert table345.ROWS_3["50%"].name == table345.ROWS_5["ours"].name


def test_the_rows_are_those_of_the_paper_and_the_shares_are_what_they_say():
    rows = table345.ROWS_3
    assert [rows[f"{k}0%"].replaced if k else rows["0%"].replaced for k in range(6)] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert {rows[f"50% {name}"].generator for name in generators.RIVALS} == {*generators.RIVALS}
    assert [table345.ROWS_4[f"{k}0%"].added for k in range(1, 6)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [*table345.ROWS_3][:10] == [*table345.PAPER_3] and [*table345.ROWS_4][:6] == [*table345.PAPER_4]
    assert [*table345.ROWS_5] == [*table345.PAPER_5] and len(table345.ROWS_5) == 11


def test_few_compares_synthetic_slices_with_real_ones_alone_and_with_plain_augmentation():
    assert table345.few_against("20 + covidgan") == ["20 real", "20 + augmented"]
    assert table345.few_against("20 + augmented") == ["20 real"] and table345.few_against("all real") == []
    assert table345.EXPERIMENTS["few"].sides == ("seg_test",)


def test_a_set_without_a_side_to_train_or_to_test_on_is_one_line(tmp_path):
    args = SimpleNamespace(reference=tmp_path)
    for split in ({"train": ["P01_S001"], "test": []}, {"train": [], "test": ["P02_S001"], "seg_test": []}):
        (tmp_path / "split.json").write_text(json.dumps(split))
        with pytest.raises(Mistake, match="test trains a U-Net, train and seg_test test it"):
            mixes.split_of(args)


# ---- Table V


def test_each_row_of_table_5_is_ours_but_for_its_switch():
    ours = dataclasses.asdict(covidgan.parse_config([*generators.row_of("covidgan").options, "--size", "128"]))
    changed = {}
    for name in table345.ROWS_5:
        generator = table345.ROWS_5[name].generator
        c = covidgan.parse_config([*generators.row_of(generator).options, "--size", "128"])
        changed[name] = {key: value for key, value in dataclasses.asdict(c).items() if value != ours[key]}
    assert changed == {
        "ours": {},
        "without-DESUM": {"desum": "sum"},
        "F_global": {"desum": "global"},
        "alpha-0.5": {"desum": "fixed"},
        "without-DFM": {"dfm": "off"},
        "D2-feature": {"dfm": "d2"},
        "beta-0.5": {"dfm": "fixed"},  # 0.5 is the default
        "D=1": {"n_dis": 1},
        "D=3": {"n_dis": 3},
        "G=1": {"n_gen": 1},
        "G=3": {"n_gen": 3},
    }
    assert (ours["desum"], ours["dfm"], ours["beta"], ours["n_gen"], ours["n_dis"]) == ("learned", "learned", 0.5, 2, 2)


def test_the_policies_for_beta_are_commands_that_training_takes():
    for name, row in generators.POLICIES.items():
        c = covidgan.parse_config([*row.options, "--size", "128"])
        assert name in (f"beta-{c.beta_policy}", f"beta-{c.beta:g}") and (c.dfm == "fixed") == name[-1].isdecimal()


# ---- the paper's figures


def test_the_papers_tables_3_and_4_are_typed_in_as_printed():
    three, four = (table345.paper_records(table345.EXPERIMENTS[key]) for key in ("3", "4"))
    assert (len(three), len(four)) == (10 * 9, 6 * 9)
    # sums over the printed tables, intervals without the epsilons
    assert sum(one["mean"] for one in three) == pytest.approx(8043.29)
    assert sum(one["mean"] for one in four) == pytest.approx(4951.38)
    assert sum(one["ci95"] for one in three if one["ci95"] > 1e-4) == pytest.approx(19.00)
    assert sum(one["ci95"] for one in four if one["ci95"] > 1e-4) == pytest.approx(11.29)
    held = {(one["row"], one["class"], one["metric"]): one["mean"] for one in three}
    assert held["30%", "consolidation", "sensitivity"] == 87.14 and held["50% pix2pix", "GGO", "Dice"] == 75.33
    dice = {one["row"]: one["mean"] for one in four if (one["class"], one["metric"]) == ("infection", "Dice")}
    assert max(dice, key=dice.get) == "40%"  # "The best performance is obtained when adding 40%"


def test_the_papers_table_5_repeats_the_dice_of_half_its_slices_swapped():
    five = {(one["row"], one["metric"]): one["mean"] for one in table345.paper_records(table345.EXPERIMENTS["5"])}
    three = table345.paper_records(table345.EXPERIMENTS["3"])
    swapped = next(o for o in three if (o["row"], o["class"], o["metric"]) == ("50%", "infection", "Dice"))
    assert five["ours", "Dice"] == swapped["mean"] == 89.19 and len(five) == 33
    assert sum(value for (_, metric), value in five.items() if metric == "FID") == pytest.approx(0.442)
    assert sum(value for (_, metric), value in five.items() if metric == "PSNR") == pytest.approx(293.66)
    assert min((v, row) for (row, metric), v in five.items() if metric == "FID") == (0.0325, "G=3")


# ---- folds and intervals


def test_the_test_slices_fall_into_ten_folds_each_once():
    parts = table345.folds(97)
    assert sorted(np.concatenate(parts).tolist()) == list(range(97))
    assert {len(part) for part in parts} == {9, 10} and len(parts) == 10
    assert all((a == b).all() for a, b in zip(parts, table345.folds(97), strict=True))
    assert [len(part) for part in table345.folds(4)] == [1] * 4


def test_the_interval_over_folds_is_students_of_their_means(monkeypatch):
    values = np.random.default_rng(0).normal(80, 5, 120)
    means = [values[part].mean() for part in table345.folds(120)]
    low, high = scipy.stats.t.interval(0.95, 9, np.mean(means), scipy.stats.sem(means))
    mean, half = table345.over_folds(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-4)
    assert mean == pytest.approx(values.mean())
    values[table345.folds(120)[3]] = np.nan  # a fold without the lesion
    mean, half = table345.over_folds(values)
    kept = [one for k, one in enumerate(means) if k != 3]
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 8) * scipy.stats.sem(kept), rel=1e-3)


def test_the_interval_over_patients_is_students_of_their_means_and_wider_for_like_slices():
    rng = np.random.default_rng(1)
    levels = {f"P{k:02d}": rng.normal(80, 5) for k in range(1, 9)}
    names = [f"{patient}_S{k:03d}" for patient in levels for k in range(20)]
    values = np.array([levels[patient_of(name)] for name in names]) + rng.normal(0, 1, len(names))
    means = [values[20 * k : 20 * k + 20].mean() for k in range(8)]
    mean, half = table345.over_patients(values, names)
    assert mean == pytest.approx(np.mean(means))
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 7) * scipy.stats.sem(means), rel=1e-3)
    assert half > 2 * table345.over_folds(values)[1]


def test_a_record_averages_the_seeds_and_gives_their_spread():
    one = table345.record({"row": "x"}, [0, 1], [(80.0, 1.0, 70.0, None), (84.0, 3.0, 72.0, None)])
    assert (one["mean"], one["ci95"], one["mean_patients"], one["ci95_patients"]) == (82.0, 2.0, 71.0, None)
    assert one["seeds"] == [0, 1]
    assert one["sd_seeds"] == pytest.approx(np.std([80, 84], ddof=1))
    assert table345.record({}, [0], [(80.0, 1.0, 70.0, 2.0)])["sd_seeds"] is None


def scores(shift, seeds=(0, 1), noise=0.0):
    """What is kept of scores of six patients whose infection Dice is `shift` above 0.5."""
    names = [f"P{k:02d}_S{i:03d}" for k in range(1, 7) for i in range(5)]
    draw = [np.random.default_rng(seed).normal(0, noise, 30) if noise else np.zeros(30) for seed in seeds]
    level = np.repeat(np.linspace(0, 0.3, 6), 5)  # patients differ more than rows do
    return {seed: kept(names, {"infection Dice": 0.5 + level + shift + d}) for seed, d in zip(seeds, draw, strict=True)}


def kept(names, figures):
    """What is kept of a U-Net's scores, tested on the side "train" alone."""
    every = {name: figures.get(name, np.ones(len(names))) for name in table345.FIGURES}
    return {"sides": {"train": table345.summary(Scores(names, every))}}


def test_a_difference_is_paired_by_patient_so_that_patients_who_differ_hide_nothing():
    told = table345.difference("a", "b", "train", scores(0.02, noise=0.005), scores(0.0))
    assert told["difference"] == pytest.approx(2, abs=0.3) and told["clear"] and len(told["of seeds"]) == 2
    assert told["seeds"] == [0, 1] and told["over folds"] == pytest.approx(2, abs=0.3)
    assert told["ci95_patients"] < 1


def test_a_difference_is_not_clear_within_its_interval_nor_where_seeds_disagree():
    assert not table345.difference("a", "b", "train", scores(0.001, noise=0.05), scores(0.0))["clear"]
    ours = {0: scores(0.1)[0], 1: scores(-0.01)[1]}
    told = table345.difference("a", "b", "train", ours, scores(0.0, noise=1e-4))
    assert told["difference"] == pytest.approx(4.5, abs=0.1) and not told["clear"]
    ours = {0: scores(0.01, (0,))[0], 1: scores(0.01, (1,))[1], 2: scores(0.09, (2,))[2]}  # of one sign, but far apart
    told = table345.difference("a", "b", "train", ours, scores(0.0, (0, 1, 2)))
    means = [1.0, 1.0, 9.0]
    assert told["of seeds"] == pytest.approx(means) and told["ci95_patients"] < told["difference"] and not told["clear"]
    assert told["ci95_seeds"] == pytest.approx(scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(means), rel=1e-3)
    assert table345.difference("a", "b", "train", scores(0, (0,)), scores(0, (1,))) is None


def test_of_one_seed_no_difference_is_clear_however_large():
    told = table345.difference("a", "b", "train", scores(0.2, (0,), noise=0.005), scores(0.0, (0,)))
    assert told["difference"] > 10 * told["ci95_patients"] and not told["clear"]
    assert table345.told_apart(told).endswith("one seed, no verdict)")


def test_a_rivals_row_is_compared_with_ours_that_swap_as_much():
    against = table345.EXPERIMENTS["3"].against
    assert against("50% SEAN") == ["0%", "50%", "50% covidgan-best"]
    assert (against("0%"), against("50%"), against("50% covidgan-best")) == ([], ["0%"], ["0%"])
    assert table345.EXPERIMENTS["4"].against("50%") == ["0%"]


def test_figures_of_images_are_told_apart_by_welchs_t_over_the_seeds():
    values = {("ours", "FID 24"): [1.1, 1.2, 1.3], ("a", "FID 24"): [1.5, 1.6, 1.9], ("b", "FID 24"): [1.0]}
    values |= {("ours", "PSNR"): [None], ("a", "PSNR"): [25.0]}
    told = {"class": "complete"}
    of = [told | {"row": row, "metric": m, "of seeds": v, "seeds": [*range(len(v))]} for (row, m), v in values.items()]
    found = table345.image_differences(of, lambda row: [] if row == "ours" else ["ours"])
    assert [(one["row"], one["metric"]) for one in found] == [("a", "FID 24"), ("b", "FID 24")]  # refused: no PSNR
    assert found[0]["difference"] == pytest.approx(7 / 15)
    assert found[0]["ci95"] == pytest.approx(welch([1.5, 1.6, 1.9], [1.1, 1.2, 1.3]), rel=1e-6)
    assert table345.images_apart(found) == [
        "- a (seeds 0, 1, 2) against ours (0, 1, 2): FID 24 +0.4667 ± 0.4348 clear",
        "- b (seeds 0) against ours (0, 1, 2): FID 24 -0.2000, one seed, no verdict",
    ]


def test_the_markdown_gives_both_intervals_the_verdict_and_the_papers_row():
    study = table345.EXPERIMENTS["3"]
    found = [
        {"row": "50%", "class": lesion, "metric": metric, "side": "train", "mean": 70.5, "ci95": 0.5}
        | {"mean_patients": 68.5, "ci95_patients": 4.25, "seeds": [0, 1], "sd_seeds": 1.0}
        for lesion in ("GGO", "consolidation", "infection")
        for metric in table345.METRICS
    ]
    differing = {"row": "50%", "against": "0%", "side": "train", "metric": "infection Dice", "difference": -1.5}
    differing |= {"ci95_patients": 2.0, "ci95_seeds": 6.35, "over folds": -1.25, "of seeds": [-1.0, -2.0]}
    differing |= {"seeds": [0, 1], "seeds over folds": [0, 1], "clear": False}
    counts = {"real": 49, "replaced": 49, "added": 0, "augmented": 0}
    text = table345.markdown(
        study,
        {
            "setting": {"U-Net tested on": {"train": "seen"}, "slices": {"50%": counts}}
            | {"slices without": {"train": {"GGO": 0, "consolidation": 18, "infection": 0}}},
            "records": found,
            "differences": [differing],
        }
        | {"paper": table345.paper_records(study)},
    )
    assert "| 50% | 49 real + 49 synthetic | 0, 1 | 70.50 ± 0.50 (68.50 ± 4.25) [1.00] |" in text
    assert "Slices 18 without consolidation: their Dice is 100 where none is found, else 0." in text
    told = "-1.50 ± 2.00 (over folds -1.25; seeds -1.00, -2.00, ± 6.35): cannot be told from noise"
    assert f"- 50% against 0%: {told}" in text
    assert "| 50% SEAN | 85.23 ± 0.40 | 84.99 ± 0.31 |" in text


def test_slices_without_a_lesion_are_those_of_which_no_sensitivity_is_defined():
    figures = {
        "GGO sensitivity": [0.5, 0.0],
        "consolidation sensitivity": [np.nan, 0.0],
        "infection sensitivity": [1, 1],
    }
    found = kept(["P01_S001", "P02_S001"], {row: np.array(v) for row, v in figures.items()})
    assert found["sides"]["train"]["slices without"] == {"GGO": 0, "consolidation": 1, "infection": 0}


def test_an_unknown_row_is_one_line_and_the_default_is_all_rows():
    with pytest.raises(Mistake, match="--rows 60%: give of 0%, 10%"):
        tables.parse(["4", "--rows", "60%"])
    assert tables.parse(["5"]).rows == [*table345.ROWS_5] and tables.parse(["5", "--rows"]).rows == []


# ---- one row, made whole


@pytest.fixture(scope="module")
def made(table_command):
    """A table of one row, half its slices swapped and some added, at toy size by its command; its args."""
    readme = "<!-- table 3 -->\n<!-- end of table 3 -->\n"
    argv = table_command("3", readme, "--samples", "16", "--channels", "4", "--unet-samples", "64")
    rows = {"mixed": Mix(replaced=0.5, added=0.25)}
    study = dataclasses.replace(table345.EXPERIMENTS["3"], rows=rows, against=lambda row: [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "KEPT", 1)
        patch.setattr(mixes, "VARIANTS", 2)
        patch.setitem(generators.ROWS, "covidgan", generators.Row("covidgan", ("--preset", "paper", "--n-blocks", "1")))
        patch.setitem(tables.TABLES, "3", table345.table(study))
        tables.main([*argv, "--rows", "mixed"])
        args = tables.parse(argv)
        split, unet = read_split(args.data / "split.json"), args.out / "unet_real-replaced50-added25-covidgan_0"
        yield SimpleNamespace(args=args, split=split, data=args.data, unet=unet, study=study)


def test_the_mix_on_disk_is_real_slices_synthetic_ones_of_their_maps_and_of_augmented_maps(made):
    held = json.loads((made.unet / "data" / "split.json").read_text())
    drawn, side = held["drawn"], {*made.split["test"]}
    assert [len(drawn[kind]) for kind in ("real", "replaced", "added", "augmented")] == [3, 3, 2, 0]
    assert {*drawn["real"], *drawn["replaced"]} == side and {*map(base, drawn["added"])} <= side
    assert sorted(held["train"]) == sorted(drawn["real"] + drawn["replaced"] + drawn["added"])
    for name in drawn["real"] + drawn["replaced"]:
        ours, theirs = (read_image(folder / "images" / f"{name}.png") for folder in (made.unet / "data", made.data))
        labels = read_map(made.unet / "data" / "maps" / f"{name}.png")
        assert (labels == read_map(made.data / "maps" / f"{name}.png")).all()
        assert (ours[labels == 0] == theirs[labels == 0]).all()
        assert (ours == theirs).all() == (name in drawn["real"])


def test_plain_augmentation_is_that_of_the_synthetic_slices_with_the_real_lung(made):
    plain = mixes.augmented_slices(0, made.args)
    synthetic = made.args.out / "covidgan_paper_0" / "variants_test"
    names = mixes.names_in(plain)
    assert names == mixes.names_in(synthetic) and len(names) == 2 * 6
    for name in names:
        labels = read_map(plain / "maps" / f"{name}.png")
        assert (labels == read_map(synthetic / "maps" / f"{name}.png")).all()
        real, fake = (read_image(folder / "images" / f"{name}.png") for folder in (plain, synthetic))
        assert (real[labels == 0] == fake[labels == 0]).all() and (real != fake)[labels > 0].mean() > 0.9
        own, painted = lung_mean(plain, name), lung_mean(synthetic, name)
        original = lung_mean(made.data, base(name))
        assert abs(own - original) < 100 < abs(painted - original)


def test_the_tables_figures_are_those_of_the_exported_unet_on_real_slices_of_both_sides(made):
    table = json.loads((made.args.results / "table3.json").read_text())
    held = {(one["side"], one["class"], one["metric"]): one for one in table["records"]}
    assert len(held) == 2 * 9 and {one["row"] for one in table["records"]} == {"mixed"}
    session = ort.InferenceSession(made.unet / "unet.onnx", providers=["CPUExecutionProvider"])
    for side in ("train", "seg_test"):
        dice = []
        for name in made.split[side]:
            hu, labels = read_image(made.data / "images" / f"{name}.png"), read_map(made.data / "maps" / f"{name}.png")
            (found,) = session.run(["map"], {"ct": hu[None]})
            a, b = found[0] >= 2, labels >= 2
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0)
        means = [np.mean(np.array(dice)[part]) for part in table345.folds(len(dice))]
        assert held[side, "infection", "Dice"]["mean"] == pytest.approx(100 * np.mean(means), abs=1e-6)
    assert held["train", "infection", "Dice"]["ci95_patients"] is not None
    assert held["seg_test", "infection", "Dice"]["ci95_patients"] is None  # of one patient
    assert table["setting"]["slices"] == {"mixed": {"real": 3, "replaced": 3, "added": 2, "augmented": 0}}
    assert table["setting"]["U-Net"]["parameters"] == [
        json.loads((made.unet / "results.json").read_text())["parameters"]
    ]
    assert "| mixed | 3 real + 5 synthetic | 0 |" in (made.args.results.parent / "README.md").read_text()


def test_the_same_command_goes_on_without_training_anything_again(made, monkeypatch):
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    table345.make(made.study, "mixed", 0, made.args)
    table = json.loads((made.args.results / "table3.json").read_text())
    assert table345.collect(made.study, made.args)["records"] == table["records"]


def test_images_of_table_5_are_measured_by_eval_and_one_that_is_refused_has_no_figure(made, monkeypatch):
    pixels = {"mean": 20.0, "interval": 0.5, "patients_mean": 21.0, "patients_interval": None}
    names = [f"{region} {metric}" for region in measures.REGIONS for metric in measures.BETTER]
    features = {name: {"value": None} for name in names} | {"complete KID 1280": {"value": 0.25}}
    results = {"pixels": dict.fromkeys(names, pixels), "features": features}
    monkeypatch.setattr(generators, "measured", lambda run, args: results)
    measures.keep_generator("covidgan", 0, made.args)
    found = {one["metric"]: one for one in table345.image_records("ours", Mix(replaced=0.5), made.args)}
    assert (found["PSNR"]["mean"], found["PSNR"]["ci95"], found["PSNR"]["seeds"]) == (20.0, 0.5, [0])
    kid, fid = found["KID 1280"], found["FID 24"]
    assert kid["mean"] == 0.25 and fid["mean"] is None and fid["side"] == "seg_test"
    assert table345.image_records("G=3", Mix(replaced=0.5, generator="G=3"), made.args) == []


# ---- alpha and beta


def test_correlation_and_its_interval_are_scipys():
    rng = np.random.default_rng(2)
    x = rng.normal(size=60)
    y = 0.4 * x + rng.normal(size=60)
    judge = scipy.stats.pearsonr(x, y)
    low, high = judge.confidence_interval(0.95)
    found = weighting.correlation(x, y)
    assert (found["r"], found["low"], found["high"]) == pytest.approx((judge.statistic, low, high), abs=1e-4)
    assert weighting.correlation(np.full(60, 0.5), y) is None and weighting.correlation(x[:3], y[:3]) is None


def test_within_patients_what_differs_between_them_does_not_count():
    rng = np.random.default_rng(3)
    names, x, y = [], [], []
    for patient in range(1, 7):
        share = rng.uniform(0, 0.1, 15) + 0.1 * patient
        names += [f"P{patient:02d}_S{k:03d}" for k in range(15)]
        y += [*share]
        x += [*(0.2 * patient - (share - share.mean()) + rng.normal(0, 0.02, 15))]
    x, y = np.array(x), np.array(y)
    own = [np.arctanh(scipy.stats.pearsonr(x[k : k + 15], y[k : k + 15]).statistic) for k in range(0, 90, 15)]
    half = scipy.stats.t.ppf(0.975, 5) * scipy.stats.sem(own)
    found = weighting.within_patients(x, y, names)
    expected = np.tanh([np.mean(own), np.mean(own) - half, np.mean(own) + half])
    assert (found["r"], found["low"], found["high"]) == pytest.approx(expected, abs=1e-3) and found["n"] == 6
    assert found["high"] < 0 < weighting.correlation(x, y)["low"]


def test_a_course_has_the_means_of_its_steps_and_says_where_beta_settles(tmp_path):
    lines = []
    for stage, length in (("g2", 300), ("joint", 600)):
        for step in range(1, length + 1):
            beta = 0.5 - 0.4 * min(1, step / 90) if stage == "g2" else 0.1
            lines.append({"stage": stage, "step": step, "alpha": 0.5 if stage == "joint" else 1.0, "beta": beta})
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = weighting.course(tmp_path)
    assert len(points) <= weighting.POINTS + 2 and points[-1]["step"] == 900
    assert points[0]["beta"] == pytest.approx(np.mean([line["beta"] for line in lines[:5]]))
    settled = weighting.settled(points, "beta", "g2")
    assert settled["end"] == pytest.approx(0.1) and settled["after"] == pytest.approx(85, abs=5)
    assert settled["min"] == pytest.approx(0.1) and settled["max"] == pytest.approx(points[0]["beta"])
    assert weighting.settled(points, "beta", "joint")["after"] == 0


def test_a_run_that_has_neither_weight_is_one_line(tmp_path):
    with pytest.raises(Mistake, match=r"stats.jsonl: not there"):
        weighting.course(tmp_path)
    (tmp_path / "stats.jsonl").write_text('{"stage": "whole", "step": 1, "loss": 1.0}\n')
    with pytest.raises(Mistake, match="no alpha and beta"):
        weighting.course(tmp_path)
    (tmp_path / "stats.jsonl").write_text('{"stage": "g2", "step": 1, "alpha": 1, "beta": 0.5}\n{"stage": "g2", "st')
    with pytest.raises(Mistake, match=r"stats.jsonl: not whole .* mended by --resume"):
        weighting.course(tmp_path)


def test_the_study_of_a_run_has_pytorchs_alpha_of_each_slice_and_its_lesion_share(made, monkeypatch):
    run, results = made.args.out / "covidgan_paper_0", made.args.out / "weighting"
    argv = [str(run), "--data", str(made.data), "--side", "test", "--results", str(results)]
    weighting.main([*argv, "--out", str(results / "alpha.png")])
    (one,) = json.loads((results / "weighting.json").read_text())["records"]
    method = export.load_method(covidgan.read_checkpoint(run / "ckpt.pt", covidgan.Covidgan), covidgan.Covidgan)
    maps = [read_map(made.data / "maps" / f"{name}.png") for name in made.split["test"]]
    with torch.no_grad():
        alpha = method.generator()(covidgan.one_hot(torch.from_numpy(np.stack(maps))[:, None], 4))[1]
    assert one["slices"]["alpha"] == pytest.approx(alpha.tolist(), abs=1e-3)
    shares = [np.isin(labels, (2, 3)).sum() / (labels > 0).sum() for labels in maps]
    assert one["slices"]["lesion"] == pytest.approx(shares)
    assert [*one["settled"]["alpha"]] == ["joint"] and [*one["settled"]["beta"]] == ["g2", "joint"]
    assert (results / "alpha.png").stat().st_size > 1000
    run.with_name("other").symlink_to(run)
    with pytest.raises(Mistake, match=r"weighting.json has runs that are not named: covidgan_paper_0: name them, or"):
        weighting.main([str(run.with_name("other")), *argv[1:]])
    with pytest.raises(Mistake, match="give runs of different names"):
        weighting.main([str(run), *argv])
    run.with_name("other").unlink()
    for kind in ("svg", "pdf"):  # which matplotlib dates, and gives random names within
        pictures = [results / f"{n}" / f"alpha.{kind}" for n in (1, 2)]
        with monkeypatch.context() as patch:
            for k, path in enumerate(pictures):
                patch.setenv("SOURCE_DATE_EPOCH", str(10**9 + k))
                weighting.draw([one], path)
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_difference_is_of_the_seeds_whose_patients_are_kept():
    ours, theirs = scores(0.05), scores(0.0)
    del theirs[0]["sides"]["train"]["infection Dice of patients"]
    told = table345.difference("a", "b", "train", ours, theirs)
    assert told["seeds"] == [1] and told["difference"] == pytest.approx(5, abs=0.3)
    assert told["seeds over folds"] == [0, 1] and told["of seeds over folds"] == pytest.approx([5, 5], abs=0.3)
    del ours[1]["sides"]["train"]["infection Dice of patients"]
    told = table345.difference("a", "b", "train", ours, theirs)
    assert told["difference"] is None and not told["clear"] and told["over folds"] == pytest.approx(5, abs=0.3)
    assert table345.told_apart(told).endswith("over patients not known")
