"""Do synthetic slices help? What U-Nets of each arm train on, that nobody has seen who is tested, and what is told."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from data.slices import Mistake, patient_of, read_image, read_map, read_split
from paper import runs, segment, usefulness
from paper.usefulness import ARMS, MEAN, folds


def test_each_patient_is_tested_once_by_networks_that_have_not_seen_it():
    patients = [f"P{k:02d}" for k in range(1, 15)]
    drawn = folds(patients)
    assert sorted(one for fold in drawn for one in fold.tested) == patients and len(drawn) == 7
    assert all(sorted(fold.tested + fold.others) == patients for fold in drawn)
    few = [one for fold in drawn for one in fold.others[: usefulness.FEW]]
    assert {few.count(one) for one in patients} == {2}
    assert [len(fold.tested) for fold in folds(patients[:5])] == [2, 2, 1]


@pytest.fixture(scope="module")
def places(toy, tmp_path_factory):
    """The command's arguments at toy size, in a folder of their own."""
    out = tmp_path_factory.mktemp("useful")
    size = ["--ngf", "4", "--samples", "8", "--channels", "4", "--unet-samples", "16", "--batch", "4", "--folds", "1"]
    folders = {"data": toy.folder, "out": out / "out", "results": out / "results"}
    return [*size, *(word for name, folder in folders.items() for word in (f"--{name}", str(folder)))]


@pytest.fixture(scope="module")
def made(places):
    """Slices of each kind but the generator's, beside what they were made of: fold, volumes, folder by painter."""
    args = usefulness.parse(places)
    volumes = usefulness.read_volumes(args.reference)
    fold = folds([*volumes])[0]
    kinds = {name: ARMS[name] for name in ("means", "cut")}
    return fold, volumes, {name: usefulness.make_slices(arm, "few", fold, volumes, args) for name, arm in kinds.items()}


def test_pasted_slices_are_the_real_ones_but_for_lesions_of_others_painted_with_label_means(made):
    fold, volumes, kinds = made
    (folder, several), pooled = kinds["means"], [volumes[one] for one in fold.others]
    names, changed = read_split(folder / "split.json")["train"], []
    assert several == usefulness.VARIANTS and {patient_of(name) for name in names} == {*fold.others}
    for name in names:
        of = volumes[patient_of(name)]
        k = of.names.index(name[:-3])
        hu, labels = read_image(folder / "images" / f"{name}.png"), read_map(folder / "maps" / f"{name}.png")
        new = labels != of.labels[k]
        assert (hu[~new] == of.hu[k][~new]).all() and (of.labels[k][new] == 1).all() and (labels[new] > 1).all()
        changed += hu[labels == 2][new[labels == 2]].tolist()
    glass = np.concatenate([of.hu[of.labels == 2] for of in pooled])
    assert np.median(changed) == pytest.approx(glass.mean(), abs=60) and np.std(changed) > 10  # edges are mixed


def test_drawn_lesions_are_those_that_ship_and_no_patients(places, monkeypatch):
    args, donors = usefulness.parse(places), []
    volumes = usefulness.read_volumes(args.reference)
    monkeypatch.setattr(usefulness, "painter_of", lambda *_: lambda labels, rng: np.zeros(labels.shape, int))
    monkeypatch.setattr(usefulness, "place", lambda host, donor, rng: (donors.append(donor), host)[1])
    usefulness.make_slices(ARMS["drawn"], "few", folds([*volumes])[0], volumes, args)
    shipped = [read_map(path) for path in (runs.ROOT / "models" / "lesions").glob("*.png")]
    assert donors and all(any((one.reshape(-1, one.shape[-1]) == of).all() for of in shipped) for one in donors)


def test_cut_out_lesions_have_the_hu_of_the_donors_own(made):
    fold, volumes, _ = made
    host, donor = (volumes[one] for one in fold.others[:2])
    for seed in range(4):  # mirrored and not
        labels = usefulness.place(host.labels, donor.labels, np.random.default_rng(seed))
        hu = usefulness.cut(host, donor, np.random.default_rng(seed))
        new = labels != host.labels
        for label in (2, 3):
            of = donor.hu[donor.labels == label]
            assert np.median(hu[new & (labels == label)]) == pytest.approx(np.median(of), abs=40)


def test_dice_is_that_of_the_volume_and_of_infection_whichever_its_kind():
    labels = np.array([[[1, 2, 3, 0]], [[1, 1, 2, 2]]])
    probability = np.zeros((2, 4, 1, 4))
    probability[:, 1] = 0.4  # lung is likelier than either kind, and than both it is not
    probability[:, 2:, 0, 1:3] = 0.3
    found = usefulness.dice_of(probability, labels)
    assert found == {"GGO": 0, "consolidation": 0, "infection": pytest.approx(200 * 3 / (4 + 5 - 1))}
    assert usefulness.dice_of(probability, np.minimum(labels, 2))["consolidation"] is None


def records(**arms):
    """Records of the averaged U-Nets: few_pasted=[Dice of patients], ..."""
    found = []
    for name, values in arms.items():
        patients, arm = name.split("_")
        told = {"arm": arm, "patients": patients, "class": "infection", "seed": MEAN}
        found += [told | {"patient": k, "dice": value} for k, value in enumerate(values, 1)]
    return found


def test_contrasts_are_paired_by_patient_and_corrected_after_holm():
    a, b = [60.0, 75.0, 50.0, 81.0], [55.0, 72.0, 44.0]
    told = usefulness.contrast(records(few_pasted=a, few_real=b), "few", "pasted", "real")
    test = scipy.stats.ttest_rel(a[:3], b)
    assert told["n"] == 3 and told["p"] == pytest.approx(test.pvalue)
    assert told["ci95"] == pytest.approx([*test.confidence_interval(0.95)])
    several = [{"p": p} for p in (0.04, 0.01, 0.03)]
    usefulness.holm(several)
    assert [one["p_holm"] for one in several] == pytest.approx([0.06, 0.03, 0.06])


def test_the_gate_wants_ten_points_over_the_threshold_and_more_of_many_patients():
    for few, many, passed in ((60, 65, True), (59, 65, False), (60, 60, False)):
        dice = records(few_threshold=[40, 60], few_real=[few, few], many_real=[many, many, 0])
        assert usefulness.gate(dice)["passed"] == passed and usefulness.gate(dice)["n"] == 2
    assert usefulness.gate(records(few_real=[60]))["passed"] is None


def test_an_arm_is_measured_once_and_its_unets_see_as_many_real_slices_as_those_of_real_alone(places, monkeypatch):
    called, command = [], [*places, "--rows", "few/means", "few/real", "few/augmented"]

    def train(program, options, out, row):  # networks as they start: only what they are to see is tested
        called.append((out.parent, int(options[options.index("--epoch-len") + 1]) * 2))
        out.mkdir(parents=True)
        config = {"n_labels": 4, "width": 4, "level": -600.0, "window": 1500.0}
        torch.save({"config": config, "unet": segment.UNet(4, 4).state_dict()}, out / "unet.pt")
        runs.write_json(out / "begun.json", {"row": row, "commit": "c", "machine": "m", "seconds": 1.0})

    monkeypatch.setattr(runs, "train", train)
    usefulness.main(command)
    assert [(arm.name, samples) for arm, samples in called[::2]] == [("real", 16), ("means", 32), ("augmented", 32)]
    assert called[::2] == called[1::2]  # of both seeds
    for arm, share in zip([arm for arm, _ in called[::2]], (1, 0.5, 1), strict=True):
        split = read_split(arm / "data" / "split.json")
        assert np.mean(["v" not in name for name in split["train"]]) == share
        assert not {*map(patient_of, split["train"])} & {*map(patient_of, split["test"])}
    monkeypatch.setattr(runs, "train", None)  # whatever trains breaks
    usefulness.main(command)
    results = usefulness.parse(places).results
    found = {(one["arm"], one["seed"]) for one in json.loads((results / "usefulness.json").read_text())["records"]}
    arms = ("real", "means", "augmented")
    assert found == {("threshold", MEAN), *((arm, seed) for arm in arms for seed in (0, 1, MEAN))}
    text = (results / "usefulness.md").read_text()
    assert "| few/means | 2 |" in text and max(map(len, text.splitlines())) <= 100
    assert (results / "usefulness.png").exists()


@pytest.mark.long
def test_a_generators_arm_is_made_whole(places):
    usefulness.main([*places, "--rows", "few/synthetic"])
    args = usefulness.parse(places)
    out = args.out / "fold_1"
    split = read_split(out / "data" / "split.json")
    assert not {*map(patient_of, split["train"])} & {*map(patient_of, split["test"])}
    for name in read_split(out / "few" / "synthetic" / "data" / "split.json")["train"]:
        labels = read_map(out / "few" / "synthetic" / "data" / "maps" / f"{name}.png")
        hu = read_image(out / "few" / "synthetic" / "data" / "images" / f"{name}.png")
        real = read_image(args.reference / "images" / f"{name[:-3]}.png")
        assert (hu[labels == 0] == real[labels == 0]).all() and (hu != real)[labels > 0].mean() > 0.9


@pytest.mark.parametrize(("wrong", "told"), [(["--rows", "few/magic"], "few/magic"), (["--folds", "9"], "--folds 9")])
def test_what_there_is_not_is_one_line(places, wrong, told):
    with pytest.raises(Mistake, match=told):
        usefulness.main([*places, *wrong])
