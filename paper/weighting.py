"""What do the weighting networks learn? alpha of DESUM (Eq. 1) and beta of DFM (Eq. 4), along training and by slice.

    python -m paper.weighting out/tables/covidgan_0 out/tables/covidgan_1 --data data/ct128 --results out/results

For each run of covidgan.py: the course of both, and alpha of every slice of a side, beside the share of lesion in its
lung. The paper says that alpha adapts to the slice: their correlation is given over all slices, and within patients.
Written as RESULTS/weighting.json, .md and .png; what was there goes.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import infer_onnx
from data.slices import SIDES, Mistake, OneLineParser, exit_on_mistake, patient_of, read_map
from paper import report, runs
from paper.report import grid, interval

POINTS = 200  # per curve
FEWEST = 4  # slices for a correlation: Fisher's interval needs more than three
CLOSE = 0.02  # a weight this near to its end value has settled

Course = list[dict[str, Any]]  # "step" from the run's start, "stage", "alpha", "beta"; means of some steps each


def course(run: Path) -> Course:
    """alpha and beta along a run of covidgan.py, in about POINTS means. Raises Mistake where the run has none."""
    path = run / "stats.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines or not {"alpha", "beta"} <= lines[0].keys():
        raise Mistake(f"{path}: has no alpha and beta: give the folder of a run of covidgan.py")
    stride, points = math.ceil(len(lines) / POINTS), []
    for stage, group in itertools.groupby(enumerate(lines, 1), key=lambda one: one[1]["stage"]):
        steps = [*group]
        for part in (steps[k : k + stride] for k in range(0, len(steps), stride)):
            means = {name: float(np.mean([line[name] for _, line in part])) for name in ("alpha", "beta")}
            points.append({"step": part[-1][0], "stage": stage, **means})
    return points


def settled(points: Course, name: str, still: float) -> dict[str, dict[str, float]]:
    """Where a weight ends in each stage that moves it, after how many of its steps it stays there, and its range.

    still: its value in a stage that has nothing to weigh.
    """
    found, before = {}, 0
    for stage, group in itertools.groupby(points, key=lambda point: point["stage"]):
        steps, values = zip(*[(point["step"], point[name]) for point in group], strict=True)
        if {*values} != {still}:
            away = [step for step, value in zip(steps, values, strict=True) if abs(value - values[-1]) > CLOSE]
            after = max(away, default=before) - before
            found[stage] = {"end": values[-1], "after": after, "min": min(values), "max": max(values)}
        before = steps[-1]
    return found


def alphas(run: Path, data: Path, side: str) -> dict[str, tuple[float, float]]:
    """Slice -> alpha of a run's generator, told its defaults, and share of lesion, for a side's slices with lung."""
    session, info = infer_onnx.open_session(runs.exported(run / "generator.onnx", run / "ckpt.pt"), "auto")
    found, told = {}, {name: np.int64([0]) if name == "seed" else np.float32([np.nan]) for name in info["steers"]}
    for name, path in infer_onnx.find_maps(data, side).items():
        labels = read_map(path)
        if labels.any():
            (alpha,) = session.run(["alpha"], {"map": labels[None], **told})
            found[name] = float(alpha[0]), float((labels > 1).sum() / (labels > 0).sum())
    return found


def correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float] | None:
    """Pearson's r of x and y [n] with its 95 % interval by Fisher's z; None of few slices, or where one is constant."""
    if len(x) < FEWEST or np.ptp(x) < 1e-6 or np.ptp(y) == 0:
        return None
    found = stats.pearsonr(x, y)
    low, high = found.confidence_interval(0.95)
    return {"r": float(found.statistic), "low": float(low), "high": float(high), "n": len(x)}


def within_patients(x: np.ndarray, y: np.ndarray, names: list[str]) -> dict[str, float | None] | None:
    """Mean of the patients' own correlations, by Fisher's z, with its 95 % interval over patients; None without any."""
    patients = np.array([*map(patient_of, names)])
    found = [correlation(x[patients == one], y[patients == one]) for one in dict.fromkeys(patients.tolist())]
    own = [math.atanh(one["r"]) for one in found if one]
    if not own:
        return None
    mean, half = interval(own)
    low, high = (None, None) if half is None else (math.tanh(mean - half), math.tanh(mean + half))
    return {"r": math.tanh(mean), "low": low, "high": high, "n": len(own)}


def of_run(run: Path, data: Path, side: str) -> dict[str, Any]:
    """All that is known about a run."""
    points, found = course(run), alphas(run, data, side)
    alpha, share = np.array([*found.values()]).T
    return {
        "run": run.name,
        "alpha": {"mean": alpha.mean(), "sd": alpha.std(), "min": alpha.min(), "max": alpha.max()},
        "correlation": correlation(alpha, share),
        "within patients": within_patients(alpha, share, [*found]),
        "settled": {"alpha": settled(points, "alpha", still=1.0), "beta": settled(points, "beta", still=0.0)},
        "course": points,
        "slices": {"alpha": alpha.tolist(), "lesion": share.tolist()},
    }


def with_interval(found: dict[str, Any] | None) -> str:
    """r and its interval, as far as known."""
    if found is None or found["low"] is None:
        return f"{found['r']:+.2f}" if found else "-"
    return f"{found['r']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def markdown(studies: list[dict[str, Any]]) -> list[str]:
    """One row per run: beta in each stage, alpha over the slices, and whether it follows the lesion."""
    stages = [*dict.fromkeys(stage for one in studies for stage in one["settled"]["beta"])]
    told = "end (after steps; between)"
    head = ["run", *(f"beta in {stage}: {told}" for stage in stages), "alpha", "smallest and largest"]
    head += ["r with share of lesion", "r within patients", "patients"]
    form, lines = "{end:.2f} ({after}; {min:.2f} and {max:.2f})", []
    for one in studies:
        ends = [one["settled"]["beta"].get(stage) for stage in stages]
        alpha, within = one["alpha"], one["within patients"]
        cells = ["-" if end is None else form.format(**end) for end in ends]
        cells += [f"{alpha['mean']:.3f} +- {alpha['sd']:.3f}", f"{alpha['min']:.3f}, {alpha['max']:.3f}"]
        cells += [with_interval(one["correlation"]), with_interval(within), within["n"] if within else "-"]
        lines.append([one["run"], *cells])
    return grid(head, lines)


def draw(studies: list[dict[str, Any]], path: Path) -> None:
    """Draw alpha and beta along training, and alpha of each slice against its share of lesion."""
    figure = Figure(figsize=(12, 4), layout="tight")
    axes = figure.subplots(1, 3)
    for one in studies:
        for panel, name in zip(axes[:2], ("alpha", "beta"), strict=True):
            panel.plot(*zip(*[(point["step"], point[name]) for point in one["course"]], strict=True), label=one["run"])
            panel.set(xlabel="step, the stages in a row", ylabel=name, ylim=(0, 1))
        axes[2].scatter(one["slices"]["lesion"], one["slices"]["alpha"], s=6)
    axes[2].set(xlabel="share of lesion in the lung", ylabel="alpha of a slice")
    axes[0].legend()
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Study the runs and write what is found. Raises Mistake."""
    parser = OneLineParser(__doc__)
    option = parser.add_argument
    option("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs of covidgan.py")
    option("--data", type=Path, default=Path("data/ct128"), help="dataset whose maps are used, of the runs' size")
    option("--side", choices=SIDES, default="seg_test", help="side of its split")
    option("--results", type=Path, default=runs.ROOT / "paper" / "results", help="folder of weighting.json")
    args = parser.parse_args(argv)
    studies = [of_run(run, args.data, args.side) for run in args.runs]
    setting = {
        "data": f"side {args.side}, {len(studies[0]['slices']['alpha'])} slices, {runs.size_of(args.data)} pixels",
        "commits": {run.name: runs.begun(run)["commit"] for run in args.runs if (run / "begun.json").exists()},
    }
    report.write(args.results, "weighting", {"setting": setting, "records": studies}, markdown(studies))
    draw(studies, args.results / "weighting.png")


if __name__ == "__main__":
    exit_on_mistake(main)
