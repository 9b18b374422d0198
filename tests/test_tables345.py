"""Tables III, IV and V and what goes beyond them: what a U-Net trains on, what its figures mean, one row made whole."""

import dataclasses
import json

import numpy as np
import onnxruntime as ort
import pytest
import scipy.stats
from test_tables import welch

import covidgan
from data.slices import Mistake, patient_of, read_image, read_map, read_split
from paper import generators, mixes, runs, table345, tables
from paper.mixes import Mix, members

NAMES = [f"P{patient:02d}_S{position:03d}" for patient in (1, 2) for position in range(1, 21)]  # 40
VARIANTS = [f"{name}v{k:02d}" for name in NAMES for k in range(1, mixes.VARIANTS + 1)]


def test_replacing_swaps_a_share_for_the_synthetic_slices_of_the_same_maps():
    for share, swapped in ((0.0, 0), (0.1, 4), (0.5, 20)):
        found = members(Mix(replaced=share), NAMES, NAMES, [], 3)
        assert (len(found["real"]), len(found["replaced"])) == (40 - swapped, swapped)
        assert sorted(found["real"] + found["replaced"]) == NAMES
    tenth, half, other = (
        {*members(Mix(replaced=share), NAMES, NAMES, [], seed)["replaced"]}
        for share, seed in ((0.1, 3), (0.5, 3), (0.5, 4))
    )
    assert tenth < half != other


def test_adding_keeps_all_real_slices_and_takes_each_map_once_before_any_a_second_time():
    found = members(Mix(added=0.4), NAMES, [], VARIANTS, 0)
    assert sorted(found["real"]) == NAMES and len(found["added"]) == 16
    assert {name[-3:] for name in found["added"]} == {"v01"}
    twofold = members(Mix(added=2), NAMES, [], VARIANTS, 0)["added"]
    assert len({*twofold}) == 80 and {[name[:-3] for name in twofold].count(name) for name in NAMES} == {2}


@pytest.mark.parametrize("mix", [Mix(replaced=0.5), Mix(added=2.5)])
def test_too_few_slices_for_a_row_are_an_error(mix):
    with pytest.raises(Mistake, match=mix.name):
        members(mix, NAMES, NAMES[:10], [], 0)


def test_the_rows_are_those_of_the_paper_and_each_has_a_name_of_its_own():
    for table in table345.TABLES.values():
        assert len({mix.name for mix in table.rows.values()}) == len(table.rows)
        assert [*table.rows][: len(table.paper)] == [*table.paper]
    assert table345.ROWS_3["50%"].name == table345.ROWS_5["ours"].name and len(table345.ROWS_5) == 11
    against = table345.TABLES["3"].against
    assert against("50% SEAN") == ["0%", "50%", "50% covidgan-best"] and against("0%") == []


def test_each_row_of_table_5_is_ours_but_for_one_switch():
    ours = dataclasses.asdict(covidgan.parse_config(["--preset", "paper", "--size", "128"]))
    for name, row in generators.ABLATIONS.items():
        c = dataclasses.asdict(covidgan.parse_config([*row.options, "--size", "128"]))
        ((key, value),) = ((key, value) for key, value in c.items() if value != ours[key])
        assert f"--{key.replace('_', '-')} {value}" in generators.options_of(name)


def test_overlap_is_that_counted_by_hand():
    truth, found = np.zeros((2, 10, 10), bool)
    truth[:4], found[2:6, :5] = True, True
    assert mixes.overlap(found, truth) == {
        "Dice": pytest.approx(100 * 20 / 60),
        "sensitivity": pytest.approx(25),
        "specificity": pytest.approx(100 * 50 / 60),
    }
    nothing = np.zeros((10, 10), bool)
    assert mixes.overlap(nothing, nothing)["Dice"] == 100 and np.isnan(mixes.overlap(found, nothing)["sensitivity"])


def test_intervals_over_folds_and_patients_are_students_of_their_means():
    rng = np.random.default_rng(1)
    names = [f"P{patient:02d}_S{k:03d}" for patient in range(1, 9) for k in range(12)]
    values = np.repeat(rng.normal(80, 5, 8), 12) + rng.normal(0, 1, 96)
    values[3] = np.nan
    kept = table345.summary(names, dict.fromkeys(table345.FIGURES, values))["figures"]["GGO Dice"]
    assert sorted(np.concatenate(table345.folds(96)).tolist()) == list(range(96)) and len(table345.folds(96)) == 10
    folds = [np.nanmean(values[part]) for part in table345.folds(96)]
    patients = [np.nanmean(values[12 * k : 12 * k + 12]) for k in range(8)]
    for mean, half, of in (("mean", "ci95", folds), ("mean_patients", "ci95_patients", patients)):
        low, high = scipy.stats.t.interval(0.95, len(of) - 1, np.mean(of), scipy.stats.sem(of))
        assert (kept[mean] - kept[half], kept[mean] + kept[half]) == pytest.approx((low, high))


def scores(shift, seeds=(0, 1), noise=0.0):
    """What is kept of scores of six patients whose infection Dice is `shift` above 50 %, tested on "train" alone."""
    names = [f"P{k:02d}_S{i:03d}" for k in range(1, 7) for i in range(5)]
    kept = {}
    for seed in seeds:
        dice = 50 + np.repeat(np.linspace(0, 30, 6), 5) + shift + np.random.default_rng(seed).normal(0, noise, 30)
        figures = {name: np.full(30, np.nan) for name in table345.FIGURES} | {"infection Dice": dice}
        kept[seed] = {"sides": {"train": table345.summary(names, figures)}}
    return kept


def test_a_difference_is_paired_by_patient_and_clear_beyond_patients_and_seeds():
    told = table345.difference("a", "b", "train", scores(2, noise=0.5), scores(0))
    assert told["difference"] == pytest.approx(2, abs=0.3) and told["clear"] and told["ci95_patients"] < 1
    apart = {seed: scores(shift, (seed,))[seed] for seed, shift in enumerate((1, 1, 9))}  # of one sign, but far apart
    told = table345.difference("a", "b", "train", apart, scores(0, (0, 1, 2)))
    assert told["of seeds"] == pytest.approx([1, 1, 9]) and not told["clear"]
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem([1, 1, 9])
    assert told["ci95_seeds"] == pytest.approx(half) and f"± {half:.2f}): cannot be told" in table345.told_apart(told)
    one = table345.difference("a", "b", "train", scores(20, (0,), noise=0.5), scores(0, (0,)))
    assert not one["clear"] and "no verdict" in table345.told_apart(one)
    assert table345.difference("a", "b", "train", scores(0, (0,)), scores(0, (1,))) is None


def test_of_seeds_whose_patients_are_not_kept_the_difference_over_folds_is_told():
    ours, theirs = scores(5), scores(0)
    del theirs[0]["sides"]["train"][table345.OF_PATIENTS]
    told = table345.difference("a", "b", "train", ours, theirs)
    assert told["seeds"] == [1] and told["seeds over folds"] == [0, 1]
    assert told["of seeds over folds"] == pytest.approx([5, 5])


def test_figures_of_images_are_told_apart_by_welchs_t_over_the_seeds():
    values = {"ours": [1.1, 1.2, 1.3], "a": [1.5, 1.6, 1.9], "b": [1.0]}
    where = {"region": "complete", "metric": "FID 24"}
    images = [where | {"method": row, "seed": 0, "value": v} for row, several in values.items() for v in several]
    first, second = table345.image_differences(images, lambda row: [] if row == "ours" else ["ours"])
    assert first["ci95"] == pytest.approx(welch(values["a"], values["ours"]), rel=1e-6) and first["clear"]
    assert second["ci95"] is None and not second["clear"]


@pytest.mark.long
def test_a_row_is_made_whole_and_its_figures_are_those_of_its_unet(table_command, monkeypatch):
    """Half of its slices swapped and some added, at toy size."""
    argv = table_command("3", "", "--samples", "16", "--channels", "4", "--unet-samples", "64", "--rows", "mixed")
    table = dataclasses.replace(table345.TABLES["3"], rows={"mixed": Mix(replaced=0.5, added=0.25)})
    monkeypatch.setitem(tables.TABLES, "3", dataclasses.replace(table, against=lambda row: []))
    tables.main(argv)
    args = tables.parse(argv)
    unet, split = args.out / "unet_real-replaced50-added25-covidgan_0", read_split(args.data / "split.json")
    drawn = json.loads((unet / "data" / "split.json").read_text())["drawn"]
    assert [len(drawn[kind]) for kind in ("real", "replaced", "added")] == [3, 3, 2]
    for name in split["test"]:
        ours, theirs = (read_image(folder / "images" / f"{name}.png") for folder in (unet / "data", args.data))
        labels = read_map(args.data / "maps" / f"{name}.png")
        assert (ours[labels == 0] == theirs[labels == 0]).all()
        assert (ours == theirs).all() == (name in drawn["real"])
    records = json.loads((args.results / "table3.json").read_text())["records"]
    held = {(one["side"], one["class"], one["metric"]): one for one in records}
    file = runs.exported(unet / "unet.onnx", unet / "unet.pt")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    dice = {patient_of(name): [] for name in split["train"]}
    for name in split["train"]:
        hu, labels = read_image(args.data / "images" / f"{name}.png"), read_map(args.data / "maps" / f"{name}.png")
        (found,) = session.run(["map"], {"ct": hu[None]})
        a, b = found[0] >= 2, labels >= 2
        dice[patient_of(name)].append(200 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 100)
    expected = np.mean([*map(np.mean, dice.values())])
    assert held["train", "infection", "Dice"]["mean_patients"] == pytest.approx(expected)
    monkeypatch.setattr(runs, "call", None)  # whatever is called breaks
    tables.main(argv)
