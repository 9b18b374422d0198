"""The tour, in cells: `python docs/tour.py`; for the tests `--quick FOLDER` trains few steps, and writes there."""
# ruff: noqa: E402, I001

# %% [markdown]
# # An evening with the method
# A label map goes in, a CT slice comes out. This tour opens the networks of the method, trains them, and breaks them.
# Each cell computes something and shows one picture. All of it is phantom or synthetic: no patient's slice is shown.
#
# `python docs/tour.py` takes eight minutes of one core, less on two, and writes this page. In VS Code or Jupyter its
# cells run one by one. Another processor changes details. At the end come [six exercises](exercises.md). Equations and
# figures (Eq., Fig.) are the paper's. `covidgan.py` holds the whole method, from top to bottom.

# %%
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from scipy import ndimage

ROOT = next(p for p in Path(globals().get("__file__", "cell")).resolve().parents if (p / "covidgan.py").exists())
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import covidgan
import eval as evaluation
import infer_onnx
from data import phantom, slices
from tools import Page, bars, curves_of, looks, tiles

QUICK = "--quick" in sys.argv
WORK = Path(sys.argv[-1]).resolve() / "work" if QUICK else ROOT / "out" / "tour"
shutil.rmtree(WORK, ignore_errors=True)
page = Page(ROOT / "docs/tour.py", WORK.parent if QUICK else ROOT / "docs")

# %% [markdown]
# ## 1. A map is four pictures
# The networks see no colours. `one_hot` gives each label a channel of its own, with a 1 where the label is.
# The target is the lung alone (Fig. 1). All else is the window's floor; the real slice fills it in later.
# "Real" means the phantom in cells 1 to 7: a drawn chest with vessels, lesions and a scanner's fine grain.

# %%
(WORK / "maps").mkdir(parents=True)
(WORK / "images").mkdir()
for number in range(1, 13):
    patient = phantom.draw_patient(0, number)
    for k in range(1, 17):
        hu, m = (x[24:120, 24:120] for x in phantom.draw_slice(patient, 0.95 - 0.05 * k, 144))  # about the lungs
        slices.write_image(WORK / "images" / f"{slices.slice_name(number, k)}.png", hu)
        slices.write_map(WORK / "maps" / f"{slices.slice_name(number, k)}.png", m)
names = sorted(path.stem for path in (WORK / "maps").iterdir())
slices.write_split(WORK / "split.json", names[:144], names[144:], [], {})  # three patients are held out
knobs = dict(size=96, ngf=16, ndf=16, n_blocks=3, n_local_blocks=2, lr=6e-4, batch=2, epochs=1, interval=10**6)
knobs |= dict(contrast=6.0, ema=0.99, lambda_dfm=3.0, epoch_len=20 if QUICK else 640, dtype="float32", device="cpu")
c = covidgan.Config(**knobs, data=str(WORK))
train_side, test = (covidgan.load_slices(WORK, side, c) for side in (names[:144], names[144:]))
labels, real = test.labels, covidgan.lung_target(covidgan.window(test.hu, c), test.labels)  # [48, 1, 96, 96]
one, another = covidgan.choose_cases(test)[:2]
onehot, coloured = covidgan.one_hot(labels, c.n_labels), slices.coloured(labels[one, 0].numpy())
titles = ["slice", "map m", "target x", "channel 0: background", "1: lung", "2: ground glass", "3: consolidation"]
figure, _ = tiles(titles, [covidgan.window(test.hu, c)[one, 0], coloured, real[one, 0], *(2 * onehot[one] - 1)], 7)
means = [test.hu[labels == k].float().mean() for k in (1, 2, 3)]
page.show("map", figure, "Mean HU: lung {:.0f}, ground glass {:.0f}, consolidation {:.0f}.".format(*means))

# %% [markdown]
# ## 2. A training of a minute
# D learns to tell real lungs from synthetic ones, G to deceive D. There are three stages (Fig. 2): G1 paints alone at
# half size, then G2 alone at full size, then both together. Watch `d`, the loss of D. A D that only guesses pays ln 2
# for each of its networks: 0.69 in stage g1, 1.39 later. Far below, D has won. At that level it is blind, or G perfect.
# Alpha and beta weigh two things each. Where there is but one, alpha is told as 1, and beta as 0.


# %%
def train(name: str, **broken: float) -> tuple[covidgan.Trainer, list[torch.Tensor], dict[str, np.ndarray]]:
    """Train covidgan; returns the trainer, the held-out maps' lungs at each stage's end, and smoothed curves."""
    trainer = covidgan.Trainer(covidgan.Covidgan, covidgan.Config(**vars(c) | broken | {"out": str(WORK / name)}))
    trainer.out.mkdir()
    trainer.open_out()
    lungs = []
    for stage in trainer.stages:
        trainer.begin(stage)
        trainer.run_stage()
        lungs.append(trainer.synthesize(labels, real))  # [48, 1, 96, 96], half of it in g1
    return trainer, lungs, curves_of(trainer.out / "stats.jsonl")


trainer, lungs, curves = train("as it is")
by_stage = [lung[one, 0] for lung in lungs]
titles = ["map", "real", "G1, after g1", "G2, after g2", "both, after joint"]
figure, plots = tiles(titles, [coloured, real[one, 0], *by_stage], 5, 3)
for axes, group in zip(plots, (("d", "gan"), ("dfm",), ("alpha", "beta")), strict=True):
    axes.plot(np.stack([curves[name] for name in group], 1), label=group)
    axes.legend()
    axes.set_xlabel("step; each stage a third")
d, alpha, beta = (curves[name][-1] for name in ("d", "alpha", "beta"))
page.show("training", figure, f"At the end d is {d:.2f}, alpha {alpha:.2f}, beta {beta:.2f}.")

# %% [markdown]
# ## 3. What G1 and G2 make, and what DESUM joins
# G1 sees the map at half size and far around. It places things, but its pixels are coarse. G2 works at full size.
# DESUM adds not their pictures but their features (Eq. 1): F_out = alpha F_local + (1 - alpha) F_global. F_local is
# G2's, F_global G1's. The second half of G2 then paints F_out. A small network reads one alpha a slice from F_local.
# We may set it by hand: at 0 the picture comes from G1's features alone, at 1 from G2's. Which of them paints lesions?
# Below, alpha by slice: does it do what its name promises? [Readings](readings.md#what-alpha-and-beta-did) has more.

# %%
g = trainer.average.g
with torch.no_grad():
    f_global, f_local = g.g1.trunk(onehot[..., ::2, ::2]), g.locals[0].down(onehot)  # [48, 16, 48, 48] each
    f_out, alpha = g.desums[0](f_local, f_global)
    painted = [covidgan.lung_target(g.locals[0].head(g.locals[0].up(f)), labels) for f in (f_global, f_out, f_local)]
titles = ["G1, after g1", "G2, after g2", "joint, alpha 0: G1's", f"alpha {alpha[one]:.2f}, learned", "1: G2's", "real"]
figure, plots = tiles(titles, [*by_stage[:2], *(x[one, 0] for x in painted), real[one, 0]], 6, 1)
lesion = (labels > 1).sum((1, 2, 3)) / (labels > 0).sum((1, 2, 3))
plots[0].scatter(100 * lesion, alpha)
plots[0].set(xlabel="lesion, % of the lung; a dot for each held-out slice", ylabel="alpha", ylim=(0.4, 0.6))
page.show("desum", figure, f"On held-out slices alpha is {alpha.min():.5f} to {alpha.max():.5f}.")

# %% [markdown]
# ## 4. What D1 and D2 see, and what they decide
# Each decision sees a patch of 70 x 70 pixels (the box). D2 sees half the size, so its patches reach twice as far. D
# judges pairs of map and image. It sees the lung alone, its HU magnified six times about those of healthy lung. Red:
# taken for real. Blue: taken for synthetic. A good D is red above and blue below; a good G makes both pale.

# %%
with torch.no_grad():
    fake = trainer.method.synthesize(onehot, "joint")  # not averaged, as D knows it
    seen = [trainer.method.seen_by_d(x, onehot) for x in (real, fake)]
    judged = [trainer.method.d(onehot, x) for x in seen]  # of real and synthetic: features in D1 and D2
pictures, right = [], []
for x, features_of in zip(seen, judged, strict=True):
    for full, (*_, logits) in zip((x, torch.nn.functional.avg_pool2d(x, 2)), features_of, strict=True):
        pictures += [full[one, 0].clone(), colormaps["coolwarm"](logits[one, 0].sigmoid().numpy())]
        right.append(100 * ((logits > 0) == (x is seen[0])).float().mean())
    pictures[-4][[13, 82], 13:83] = pictures[-4][13:83, [13, 82]] = 1  # the box
figure, _ = tiles(["real, as D1 sees it", "D1 decides", "as D2 sees it", "D2 decides", "synthetic"], pictures, 4)
told = "On held-out slices D1 is right on {:.0f} % of real patches, D2 on {:.0f}; of synthetic {:.0f} and {:.0f}."
page.show("decisions", figure, told.format(*right))

# %% [markdown]
# ## 5. The three feature maps that DFM compares
# D's answer is one number for a patch. DFM (Eq. 4) asks for reasons too. It compares what D's first three layers make
# of the real and of the synthetic pair. Their distances are t1 in D1 and t2 in D2: L = (1 - beta) t1 + beta t2.
# The paper trains beta by minimising. So beta goes to whichever D is easier to match, until its clamp stops it.

# %%
maps = []
for k, i in np.ndindex(2, 3):
    of_real, of_fake = (features_of[k][i][one] for features_of in judged)  # [channels, h, w] each
    maps.append(torch.stack([x.abs().mean(0) for x in (of_real, of_fake, of_real - of_fake)]))
pictures = [2 * x[row] / x.max() - 1 for row in range(3) for x in maps]
figure, _ = tiles([f"D{k + 1}, map {i + 1}" for k, i in np.ndindex(2, 3)], pictures, 6)
t1, t2 = (covidgan.feature_distance(*both).mean() for both in zip(*judged, strict=True))
told = f"From above: real, synthetic, distance, means over channels. t1 is {t1:.2f}, t2 {t2:.2f}, beta {beta:.2f}."
page.show("dfm", figure, told)

# %% [markdown]
# ## 6. The same, broken on purpose
# Three mistakes, one at a time, of the same seed, about as long. Look at D's loss, at vessels, at grain and at edges.
# - **Noise on the target**, as the paper's Table I has it, but stronger. D sees it in every real slice. G has no dice:
#   for a map it has one slice, and grain in one fixed pattern, where vessels drown. So our D is shown no such noise.
# - **D sees whole images**, unmagnified. Texture is hundredths beside the lung's edge and the map's 0 and 1. So D wins
#   by edges, is blind to texture, and teaches none.
# - **No second generator**: G1 alone, at full size.

# %%
mistakes = {"noise": dict(noise=0.05), "whole images": dict(contrast=0.0)}
mistakes |= {"one generator": dict(n_gen=1, epoch_len=c.epoch_len * 3 // 2)}  # about as long as three stages take
runs = {"as it is": (trainer, lungs, curves)} | {name: train(name, **how) for name, how in mistakes.items()}
made = {name: lungs[-1] for name, (_, lungs, _) in runs.items()}
figure, plots = tiles(["real", *made], [x[k, 0] for k in (one, another) for x in (real, *made.values())], 5, 2)
for name, (_, _, curves) in runs.items():
    plots[0].plot(np.linspace(0, 3, len(curves["d"])), curves["d"], label=name)
plots[0].legend(fontsize=7)
plots[0].set(xlabel="stage", ylabel="d")
kid = {name: evaluation.kid(looks(real), looks(lung)) for name, lung in made.items()}
bars(plots[1], kid, "KID of lungs: 0 is best")
page.show("broken", figure, "KID: " + ", ".join(f"{name} {kid[name]:.3f}" for name in kid) + ".")

# %% [markdown]
# ## 7. Which figure to trust
# Pixel figures ask: is each pixel as it was? A map does not say where vessels run, so nobody can answer that. The
# safest answer is a mean, paint without texture. KID asks: do the two sets look alike? So another patient's real lungs
# must score well in it, since they are real. For looks trust KID, beside its floor. For the place and density of
# lesions trust pixel figures. Look at the pictures in any case. The features are ImageNet's (efficientnet-lite0):
# KIDs of other features cannot be compared with these.

# %%
others = covidgan.lung_target(covidgan.window(train_side.hu, c), train_side.labels)[:48]  # at the same heights
mean_hu = covidgan.lung_target(sum(real[labels == k].mean() * (labels == k) for k in (1, 2, 3)), labels)
inside = (labels > 0).float()
values, weights = (torch.from_numpy(ndimage.gaussian_filter(x, (0, 0, 1, 1))) for x in (real * inside, inside))
blurred = covidgan.lung_target(values / weights.clip(1e-6), labels)
sets = {"mean HU of labels": mean_hu, "blurred": blurred, "another patient": others, "covidgan": made["as it is"]}
figure, plots = tiles(["real", *sets], [lung[one, 0] for lung in (real, *sets.values())], 5, 2)
psnr = {name: -10 * ((lung - real) / 2).square().mean((1, 2, 3)).log10().mean() for name, lung in sets.items()}
kid = {name: evaluation.kid(looks(real), looks(lung)) for name, lung in sets.items()}
bars(plots[0], psnr, "PSNR, dB: more is better")
bars(plots[1], kid, "KID: less is better")
floor = evaluation.kid(*(looks(real[half]) for half in evaluation.halves(len(real))))
told = ", ".join(f"{name} {psnr[name]:.1f} dB and {kid[name]:.3f}" for name in sets)
page.show("figures", figure, f"PSNR and KID: {told}. KID's floor, real half against real half: {floor:.3f}.")

# %% [markdown]
# ## 8. Where the shipped generator is still told from real
# `models/covid-ct-256.onnx` was trained on real CT. A map moved by one pixel should give its slice moved by one pixel.
# Ground glass painted in one lung should leave the other alone. But instance norm takes its mean from the whole slice.
# So vessels are repainted everywhere. They are short, ground glass is blotchy, and fissures are missing: no map has
# them. What only real CT can tell stands in [its card](../models/README.md).

# %%
shipped = infer_onnx.Generator(*infer_onnx.open_session(infer_onnx.SHIPPED_MODEL, "cpu"))
chest = slices.read_map(infer_onnx.EXAMPLES / "P02_S015.png")
ill_map, other_lung = evaluation.paint(chest, 4)
plain, moved, ill = (shipped(m[None])[0].astype(float) for m in (chest, np.roll(chest, 1, 1), ill_map))
moved, frame, near = np.roll(moved, -1, 1), np.s_[56:218, 30:226], np.s_[88:169, 36:134]
a, b, e = (slices.windowed(x) / 127.5 - 1 for x in (plain, moved, ill))
pictures = [a[near], a[frame], b[frame], ((moved - plain) / 400)[frame]]
pictures += [e[near], slices.coloured(ill_map)[frame], e[frame], ((ill - plain) / 400)[frame]]
titles = ["near", "slice", "map moved by a pixel", "what changed", "near", "a lesion", "slice", "what changed"]
figure, _ = tiles(titles, pictures, 4, shape=162 / 196)
card = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", (ROOT / "models/README.md").read_text(), re.M))
change = [evaluation.rms(x) for x in ((moved - plain)[chest == 1], (ill - plain)[other_lung])]
told = "A pixel's move changes healthy lung by {:.0f} HU RMS, ground glass in the one lung the other by {:.0f}."
power = card["fine texture, share of the real power"].replace(" |", ", real halves")
page.show("shipped", figure, f"{told.format(*change)} Power of fine texture against real CT, by the card: {power}.")

# %% [markdown]
# ## 9. In a volume
# Each slice is made by itself, from a map that hardly changes. So vessels run straight through: streaks. A real vessel
# branches, and grain is new in every slice. A figure for it: how alike are neighbours in fine detail? Beside the tour,
# teachers of radiology find one lung with and without lesions under a slider: [web/gallery.html](../web/gallery.html).

# %%
patient = phantom.draw_patient(0, 2)
hu, maps = zip(*[phantom.draw_slice(patient, z / phantom.HEIGHT, 256) for z in np.arange(100, 160, 2.5)], strict=True)
volumes = [np.where(m > 0, x, -1350) for x, m in zip(hu, maps, strict=True)], [shipped(m[None])[0] for m in maps]
pictures, detail = [slices.windowed(np.stack(v)[:, 150, 20:236]) / 127.5 - 1 for v in volumes], []
for v in volumes:
    pairs = [evaluation.likeness(*np.float64(v[k : k + 2]), (maps[k] == 1) & (maps[k + 1] == 1)) for k in range(23)]
    detail.append(np.mean([pair["detail"] for pair in pairs]))
figure, _ = tiles(["phantom, from the front", "shipped generator"], pictures, 2, shape=0.5)
told = "Correlation of neighbours' detail: phantom {:.2f}, shipped {:.2f}. On real CT, by the card: shipped {}, {}."
on_ct = card["correlation of their detail finer than 3 pixels"].split(" | ")
page.show("volume", figure, told.format(*detail, *on_ct))

# %%
page.write()
