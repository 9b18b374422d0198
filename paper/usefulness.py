"""Do synthetic slices help a segmentation network? U-Nets on real slices and more, tested on patients new to all.

    python -m paper.usefulness --data data/ct256 --reference data/ct128 --out out/useful     # all of the basic rows
    python -m paper.usefulness --data data/ct128 --out out/useful --folds 1 --rows few/real few/pasted
    python -m paper.usefulness --list

Folds of two patients. In each a generator is trained on all others alone, and U-Nets on FEW of these ("few"), on one
slice of each of the FEW ("slices"), and on all others ("many"). Every U-Net sees --unet-samples real slices, and those
of an arm with others besides `dose` times as many of these; "synthetic" sees as many synthetic ones instead. Lesions
come from maps of all the fold's other patients, also for "few": maps without CT are cheap. "cut" has the lesions, and
the CT that they are cut from, of the U-Net's own patients alone. Bodies are always real.

The gate comes first: U-Nets on real slices alone must beat a threshold on smoothed HU, which is given the true lungs,
by GATE points, and many patients must beat few. Where they do not, the bench sees little, and says so.

Dice is a patient's, over all slices as one volume, in %, of a U-Net for each seed and of their averaged probabilities;
by the latter arms are compared, patient by patient. What a U-Net finds is kept in RESULTS/useful/runs. The same command
goes on with a stopped one; after each row RESULTS/usefulness.json, .md and .png say what is known so far.
"""

import argparse
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage, stats

import covidgan
import infer_onnx
from data import slices
from data.lesions import box_of, paste, place, read_donor, stretched
from data.slices import Mistake, patient_of
from eval import LESIONS
from paper import generators, mixes, report, runs, segment

FEW, VARIANTS, GATE = 4, 4, 10  # patients; new maps of each real slice, or more where the dose is; points of Dice
UNET = "--lr 5e-3 --ema 0.99 --gamma 0.1 --intensity 0.03"  # of paper/segment.py, besides size and samples
SETTING = ("ngf", "samples", "channels", "unet_samples", "batch", "seeds")
MEAN, HEADLINE = "mean", "infection"  # the averaged U-Nets, among seeds; the class by which arms are compared
SMOOTH, CUTS = 2.0, range(-800, -200, 25)  # the threshold's: pixels, HU

Record = dict[str, Any]


class Volume(NamedTuple):
    """Slices of a patient: names [D], hu int16 and labels uint8 [D, H, W]."""

    names: list[str]
    hu: np.ndarray
    labels: np.ndarray


Volumes = dict[str, Volume]  # by patient


class Arm(NamedTuple):
    """What U-Nets train on: real slices or none, and for each that is seen `dose` others, or the same again.

    made: by whom and how: a row of paper/generators.py, "means" or "cut", into the real lung or as whole lungs.
    drawn: lesions are of models/lesions, and no patient's.
    """

    about: str
    made: tuple[str, str] | None = None
    dose: int = 1
    real: bool = True
    drawn: bool = False


OURS, THEIRS = "covidgan-best", "SPADE-clean"
ARMS = {
    "real": Arm("real slices alone", dose=0),
    "augmented": Arm("and as many real ones again; like all that is seen, each is augmented anew"),
    "pasted": Arm("and lesions by covidgan, pasted into the real lung", (OURS, "pasted")),
    "lungs": Arm("and whole lungs by covidgan, of the same maps", (OURS, "lungs")),
    "means": Arm("and label means with noise, pasted, of the same maps", ("means", "pasted")),
    "cut": Arm("and lesions cut out of the same real slices, pasted", ("cut", "pasted")),
    "synthetic": Arm("whole lungs by covidgan alone", (OURS, "lungs"), real=False),
    **{f"pasted-x{dose}": Arm(f"as pasted, {dose} for each real one", (OURS, "pasted"), dose) for dose in (2, 4, 8)},
    "drawn": Arm("as pasted, lesions of models/lesions, no patient's", (OURS, "pasted"), drawn=True),
    "SPADE-pasted": Arm("as pasted, by SPADE with the same aids", (THEIRS, "pasted")),
    "SPADE-lungs": Arm("as lungs, by SPADE", (THEIRS, "lungs")),
    "SPADE-synthetic": Arm("as synthetic, by SPADE", (THEIRS, "lungs"), real=False),
}
BASIC = [f"few/{arm}" for arm in [*ARMS][:7]] + [f"many/{arm}" for arm in ("real", "pasted", "means", "synthetic")]
ROWS = [*BASIC, "slices/real", "slices/pasted", *(f"few/{arm}" for arm in [*ARMS][7:])]
CONTRASTS = [("few", "pasted", arm) for arm in ("real", "augmented", "means", "cut")]  # fixed before any was measured
CONTRASTS += [("many", "pasted", arm) for arm in ("real", "means")]
CONTRASTS += [(patients, "synthetic", "real") for patients in ("few", "many")]


class Fold(NamedTuple):
    """Patients that are tested, and all others, of whom the first FEW are "few"."""

    number: int
    tested: list[str]
    others: list[str]


def folds(patients: list[str]) -> list[Fold]:
    """All patients in pairs. In turn each is tested once, and about as often as any other among the FEW."""
    order, pairs = [patients[k] for k in np.random.default_rng(0).permutation(len(patients))], []
    for start in range(0, len(order), 2):
        tested, after, before = order[start : start + 2], order[start + 2 :], order[:start]
        pairs.append(Fold(len(pairs) + 1, tested, after + before))
    return pairs


def read_volumes(data: Path) -> Volumes:
    """All slices of a dataset that have a map, by patient. Raises Mistake where the patients are too few."""
    images, maps, names = slices.list_pngs(data / "images", "images"), slices.list_pngs(data / "maps", "maps"), {}
    for name in sorted(images.keys() & maps.keys()):
        names.setdefault(patient_of(name), []).append(name)
    if len(names) < FEW:
        raise Mistake(f"{data}: {len(names)} patients, fewer than {FEW}: what comes before the last _ is the patient")
    hu = [np.stack([slices.read_image(images[name]) for name in of]) for of in names.values()]
    labels = [np.stack([slices.read_map(maps[name]) for name in of]) for of in names.values()]
    return {one: Volume(names[one], *of) for one, *of in zip(names, hu, labels, strict=True)}


def trained_on(patients: str, fold: Fold, volumes: Volumes) -> Volumes:
    """The volumes of a fold whose slices are annotated for U-Nets of "few", "many" or "slices"."""
    chosen = {one: volumes[one] for one in (fold.others if patients == "many" else fold.others[:FEW])}
    for one, (names, *pixels) in chosen.items() if patients == "slices" else ():  # of each the one with most lesion
        k = int((pixels[1] > 1).sum((1, 2)).argmax())
        chosen[one] = Volume([names[k]], *(of[k, None] for of in pixels))
    return chosen


def make_slices(arm: Arm, patients: str, fold: Fold, volumes: Volumes, args: argparse.Namespace) -> tuple[Path, int]:
    """The dataset of an arm's other slices, made if it is not there yet, and how many there are of each real one."""
    (painter, way), several = arm.made, max(VARIANTS, arm.dose)
    out = args.out / f"fold_{fold.number}" / patients / f"{painter}_{way}_{several}{'_drawn' * arm.drawn}"
    if (out / "split.json").exists():
        return out, several
    for part in ("images", "maps"):
        (out / part).mkdir(parents=True, exist_ok=True)
    hosts, names = trained_on(patients, fold, volumes), []
    donors = hosts if painter == "cut" else {one: volumes[one] for one in fold.others}
    if arm.drawn:
        shapes = slices.list_pngs(runs.ROOT / "models" / "lesions", "lesions")
        donors = {one: Volume([], np.empty(0), read_donor(path, len(slices.LABELS))) for one, path in shapes.items()}
    paint = painter_of(painter, hosts, fold, args)
    for patient, variant in ((patient, variant) for patient in hosts for variant in range(1, several + 1)):
        host, rng = hosts[patient], np.random.default_rng([fold.number, variant, *os.fsencode(patient)])
        donor = donors[str(rng.choice([one for one in donors if one != patient]))]
        again = copy.deepcopy(rng)  # what `place` draws next
        labels = place(host.labels, donor.labels, rng)
        made = cut(host, donor, again) if painter == "cut" else paint(labels, rng)
        hu = paste(host.hu, made, host.labels, labels) if way == "pasted" else np.where(labels > 0, made, host.hu)
        for name, image, map_ in zip(host.names, hu, labels, strict=True):
            names.append(f"{name}v{variant:02d}")
            slices.write_image(out / "images" / f"{names[-1]}.png", image)
            slices.write_map(out / "maps" / f"{names[-1]}.png", map_)
    slices.write_split(out / "split.json", names, [], [], {})
    return out, several


Paint = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # labels [D, H, W], rng -> HU int [D, H, W]


def painter_of(name: str, hosts: Volumes, fold: Fold, args: argparse.Namespace) -> Paint | None:
    """Who paints maps: label means with the noise of what is finer than 3 pixels, or a generator; None: nobody."""
    if name == "cut":
        return None
    if name == "means":
        hu, labels = (np.concatenate(part) for part in list(zip(*hosts.values(), strict=True))[1:])
        fine = hu - ndimage.uniform_filter(hu.astype(float), (0, 3, 3))  # all deviation would be salt and pepper
        where = [labels == k if (labels == k).any() else labels > 0 for k in range(4)]
        mean, noise = np.array([(hu[here].mean(), fine[here].std()) for here in where]).T
        return lambda labels, rng: np.rint(rng.normal(mean[labels], noise[labels])).astype(int)
    run = train_generator(name, fold, args)
    model = runs.exported(run / "generator.onnx", run / "ckpt.pt")
    generator = infer_onnx.Generator(*infer_onnx.open_session(model, "auto"))
    return lambda labels, rng: np.concatenate([generator(labels[k : k + 8]) for k in range(0, len(labels), 8)])


def train_generator(name: str, fold: Fold, args: argparse.Namespace) -> Path:
    """Train a row of paper/generators.py on the fold's other patients, or go on with it; returns its folder."""
    folder, maps = args.out / f"fold_{fold.number}", slices.list_pngs(args.data / "maps", "maps")
    sides = [[one for one in maps if patient_of(one) in of] for of in (fold.others, fold.tested)]
    mixes.link(folder / "data", args.data, [*sides[0], *sides[1]])  # those tested for its panels alone
    slices.write_split(folder / "data" / "split.json", *sides, [], {})
    given = {"data": folder / "data", "out": folder, "batch": 4, "seconds": None}
    return generators.train(name, 0, argparse.Namespace(**vars(args) | given))


def cut(host: Volume, donor: Volume, rng: np.random.Generator) -> np.ndarray:
    """The donor's CT, float [D, H, W], fitted to the host's lungs just as `place` fits its lesions with this rng."""
    hu, labels = donor.hu, donor.labels
    if rng.random() < 0.5:
        hu, labels = hu[..., ::-1], labels[..., ::-1]
    fitted, lungs = host.hu.astype(float), box_of(host.labels > 0)
    fitted[lungs] = stretched(hu[box_of(labels > 0)], fitted[lungs].shape)
    return fitted


def measure(row: str, fold: Fold, volumes: Volumes, args: argparse.Namespace) -> Record:
    """Train the U-Nets of a row in a fold and test them: what is kept of it."""
    patients, name = row.split("/")
    arm, out = ARMS[name], args.out / f"fold_{fold.number}" / patients / name
    hosts = trained_on(patients, fold, volumes)
    real, several, others = [one for of in hosts.values() for one in of.names], 1, []
    if arm.made:
        made, several = make_slices(arm, patients, fold, volumes, args)
        others = mixes.link(out / "data", made, sorted(slices.list_pngs(made / "maps", "maps")))
    repeats = range(several // max(1, arm.dose) * arm.real)  # real ones are seen as often as the dose says
    links = [one for k in repeats for one in mixes.link(out / "data", args.reference, real, f"r{k}")]
    tested = [one for patient in fold.tested for one in volumes[patient].names]
    mixes.link(out / "data", args.reference, tested)
    slices.write_split(out / "data" / "split.json", [*links, *others], tested, [], {})
    samples = args.unet_samples * (arm.real + arm.dose)
    found = {}
    for seed in args.seeds:
        run = generators.train_unet(out / f"unet_{seed}", out / "data", seed, args, UNET, samples, UNET)
        found[seed] = {one: segment.probabilities(run / "unet.pt", volumes[one].hu) for one in fold.tested}
    found[MEAN] = {one: np.mean([of[one] for of in found.values()], 0) for one in fold.tested}
    number = {one: str(k) for k, one in enumerate(volumes, 1)}  # names may be of people
    dice = {of: {number[one]: dice_of(p, volumes[one].labels) for one, p in by.items()} for of, by in found.items()}
    counts = {"real": len(real) * arm.real, "others": len(others)}
    return {"samples": samples, "slices": counts, **runs.begun(run), "dice": dice}


def dice_of(probability: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Dice of each lesion over a volume, %, of probabilities [D, n_labels, H, W]; None where there is none to find."""
    likeliest = probability.argmax(1)
    found = {lesion: np.isin(likeliest, of) for lesion, of in LESIONS.items()}
    found[HEADLINE] = probability[:, 2:].sum(1) > 0.5  # of whichever kind
    return {lesion: overlap(found[lesion], np.isin(labels, of)) for lesion, of in LESIONS.items()}


def overlap(found: np.ndarray, truth: np.ndarray) -> float | None:
    """Dice of masks of any one shape, %; None where the truth is empty."""
    return mixes.overlap(found, truth)["Dice"] if truth.any() else None


def threshold(fold: Fold, volumes: Volumes) -> Record:
    """Dice of smoothed HU above a threshold within the true lungs, which is tuned on the FEW, by tested patient."""
    used, smooth = [*fold.others[:FEW], *fold.tested], {}
    for patient in used:
        lung = (volumes[patient].labels > 0).astype(np.float32)
        share, sums = (ndimage.gaussian_filter(of, (0, SMOOTH, SMOOTH)) for of in (lung, volumes[patient].hu * lung))
        smooth[patient] = np.where(lung > 0, sums / share.clip(1e-3), -np.inf)

    def dice(patient: str, above: int) -> float:
        return overlap(smooth[patient] > above, volumes[patient].labels > 1) or 0.0

    above = max(CUTS, key=lambda above: np.mean([dice(one, above) for one in fold.others[:FEW]]))
    number = {one: str(k) for k, one in enumerate(volumes, 1)}
    return {"HU": above, "dice": {MEAN: {number[one]: {HEADLINE: dice(one, above)} for one in fold.tested}}}


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """All that is known: records of arms and of the threshold, the gate, contrasts after Holm's correction."""
    folder, records = args.results / "useful" / "runs", []
    for path in sorted(folder.glob("fold*.json")):
        _, patients, arm = path.stem.split("_")
        for seed, by_patient in runs.read_json(path)["dice"].items():
            for patient, (lesion, dice) in ((one, of) for one, lesions in by_patient.items() for of in lesions.items()):
                told = {"arm": arm, "patients": patients, "class": lesion, "patient": int(patient)}
                told |= {"seed": seed if seed == MEAN else int(seed), "dice": dice}
                records += [told] if dice is not None else []
    contrasts = [contrast(records, *one) for one in CONTRASTS]
    holm([one for one in contrasts if one["p"] is not None])
    setting = runs.read_json(folder / "setting.json") | {"U-Net": UNET}
    setting |= {"rows": {row: ARMS[row.split("/")[1]].about for row in ROWS}}
    return {"setting": setting, "gate": gate(records), "records": records, "contrasts": contrasts}


def of_patients(records: list[Record], patients: str, arm: str, lesion: str = HEADLINE) -> dict[int, float]:
    """Dice of an arm's averaged U-Nets by patient."""
    key = {"arm": arm, "patients": patients, "class": lesion, "seed": MEAN}
    return {one["patient"]: one["dice"] for one in records if key.items() <= one.items()}


def contrast(records: list[Record], patients: str, a: str, b: str) -> Record:
    """By how much arm a is above arm b over the patients that both have: mean, Student's interval, p of a t test."""
    ours, theirs = (of_patients(records, patients, arm) for arm in (a, b))
    shared = sorted(ours.keys() & theirs.keys())
    each = [ours[one] - theirs[one] for one in shared]
    mean, half = report.interval(each)
    ci95, p = (None, None) if half is None else ([mean - half, mean + half], float(stats.ttest_1samp(each, 0).pvalue))
    p = 1.0 if half == 0 else p  # all equal: no t
    told = {"a": a, "b": b, "patients": patients, "difference": mean, "ci95": ci95, "p": p}
    return told | {"n": len(shared), "p_holm": None}


def holm(contrasts: list[Record]) -> None:
    """Put "p_holm" into contrasts that have a p: Holm's correction over all of them."""
    worst = 0.0
    for k, one in enumerate(sorted(contrasts, key=lambda one: one["p"])):
        worst = max(worst, min(1.0, (len(contrasts) - k) * one["p"]))
        one["p_holm"] = worst


def gate(records: list[Record]) -> dict[str, Any]:
    """Whether the bench can see: Dice of the threshold and of U-Nets on few and many real patients."""
    found = {"threshold": of_patients(records, "few", "threshold")}
    found |= {patients: of_patients(records, patients, "real") for patients in ("few", "many")}
    shared = set.intersection(*map(set, found.values()))
    if not shared:
        return {"n": 0, "passed": None}
    means = {name: float(np.mean([dice[one] for one in shared])) for name, dice in found.items()}
    passed = means["few"] >= means["threshold"] + GATE and means["many"] > means["few"]
    return means | {"n": len(shared), "passed": bool(passed)}


def markdown(table: dict[str, Any], total: int) -> list[str]:
    """The gate, the arms and the contrasts, for people to read."""
    told, lines, rows = table["gate"], [], []
    if told["n"]:
        verdict = "passed" if told["passed"] else "FAILED: what follows says little"
        text = "threshold {threshold:.1f}, few {few:.1f}, many {many:.1f}, over {n} of {total} patients"
        lines = [f"**Gate {verdict}**: {text.format(**told, total=total)}.", ""]
    for row in measured(table):
        dice = [of_patients(table["records"], *row.split("/"), lesion) for lesion in (HEADLINE, "GGO", "consolidation")]
        means = [report.interval([*of.values()]) for of in dice]
        told = ["-" if mean is None else f"{mean:.1f}" + (f" ± {half:.1f}" if half else "") for mean, half in means]
        rows.append([row, len(dice[0]), *told])
    lines += ["Dice of patients as volumes, %, mean ± half of its 95 % interval over patients.", ""]
    lines += report.grid(["row", "patients", HEADLINE, "GGO", "consolidation"], rows)
    for one in (one for one in table["contrasts"] if one["ci95"]):
        head = f"- {one['patients']}, {one['a']} over {one['b']}: {one['difference']:+.1f}"
        low, high = one["ci95"]
        lines += [
            f"{head} ({low:+.1f} to {high:+.1f}), {one['n']} patients, p {one['p']:.3f}, Holm {one['p_holm']:.3f}"
        ]
    return [*lines, "", "Fixed beforehand: infection, paired over patients, 95 % intervals, Holm over all lines."]


def measured(table: dict[str, Any]) -> list[str]:
    """Rows of which something is known, the threshold first."""
    return [row for row in ["few/threshold", *ROWS] if of_patients(table["records"], *row.split("/"))]


def draw(table: dict[str, Any], path: Path) -> None:
    """Draw a line for each arm and on it a dot for each patient, and their mean."""
    rows = measured(table)[::-1]
    figure = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="tight")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        dice = [*of_patients(table["records"], *row.split("/")).values()]
        axes.plot([0, 100], [y, y], color="0.9", zorder=0)
        axes.scatter(dice, [y] * len(dice), s=14, alpha=0.6)
        axes.scatter(np.mean(dice), y, marker="|", s=200, color="black")
    axes.set(yticks=range(len(rows)), yticklabels=rows, xlim=(0, 100), xlabel=f"{HEADLINE} Dice, %; dots: patients")
    figure.savefig(path)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = runs.parser(__doc__, "out/useful", [0, 1])
    option = parser.add_argument
    option("--folds", nargs="+", type=int, metavar="N", help="which, from 1 (default: all)")
    option("--ngf", type=int, default=16, help="channels of a generator's first layers")
    option("--samples", type=int, default=12_000, help="samples that a generator sees at full size")
    option("--channels", type=int, default=8, help="channels of the U-Net's first level")
    option("--unet-samples", type=int, default=6_000, help="real slices that each U-Net sees, with repeats")
    option("--batch", type=int, default=4, help="of the U-Net")
    option("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of training, as in covidgan.py")
    parser.set_defaults(reference=None, rows=BASIC)
    args = parser.parse_args(argv)
    args.reference = args.reference or args.data
    runs.choose_rows(args, ROWS)
    return args


def main(argv: list[str]) -> None:
    """Train and measure what is asked for, fold by fold, and write what is known after each row. Raises Mistake."""
    args = parse(argv)
    if args.list:
        print("\n".join(f"{row:24} {ARMS[row.split('/')[1]].about}" for row in ROWS))
        return
    volumes = read_volumes(args.reference)
    every = folds([*volumes])
    asked = [fold for fold in every if fold.number in (args.folds or [fold.number])]
    if len(asked) < len({*(args.folds or ())}):
        raise Mistake(f"--folds {' '.join(map(str, args.folds))}: give of 1 to {len(every)}")
    useful = args.results / "useful"
    with slices.held(args.out):
        for folder in (useful / "runs", args.out):
            runs.keep_setting(folder, args, *SETTING)
        for fold in asked:
            name = f"fold{fold.number}"
            runs.keep(useful, f"{name}_few_threshold", lambda fold=fold: threshold(fold, volumes))
            for row in sorted(args.rows, key=lambda row: row not in ("few/real", "many/real")):  # the gate's first
                make = lambda fold=fold, row=row: measure(row, fold, volumes, args)  # noqa: E731
                runs.keep(useful, f"{name}_{row.replace('/', '_')}", make)
                table = collect(args)
                report.write(args.results, "usefulness", table, markdown(table, len(volumes)))
                draw(table, args.results / "usefulness.png")


if __name__ == "__main__":
    slices.exit_on_mistake(main, more=(covidgan.Mistake,))
