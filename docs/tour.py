"""The tour, in cells: `python docs/tour.py`; for the tests `--quick FOLDER` trains few steps, and writes there."""
# ruff: noqa: E402, I001

# %% [markdown]
# # An evening with the method
# A label map goes in, a CT slice comes out. This tour opens the networks of the method, trains them, and breaks them.
# Each cell computes something and shows one picture. All of it is phantom or synthetic: no patient's slice is shown.
#
# `python docs/tour.py` takes five minutes on two cores, and writes this page. In VS Code or Jupyter its
# cells run one by one. Another processor changes details. At the end come [six exercises](exercises.md). Equations and
# figures (Eq., Fig.) are the paper's. `covidgan.py` holds the whole method, from top to bottom.
# %%
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps

ROOT = next(p for p in Path(globals().get("__file__", "cell")).resolve().parents if (p / "covidgan.py").exists())
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import covidgan
import eval as evaluation
import infer_onnx
from data import phantom, slices
from tools import Page, bars, blurred, card, curves_of, draw_chests, firing, grey, looks, make, neighbours, tiles

QUICK = "--quick" in sys.argv
WORK = Path(sys.argv[-1]).resolve() / "work" if QUICK else ROOT / "out" / "tour"
shutil.rmtree(WORK, ignore_errors=True)
page = Page(ROOT / "docs/tour.py", WORK.parent if QUICK else ROOT / "docs")

# %% [markdown]
# ## 1. A map is four pictures
# The networks see no colours. `one_hot` gives each label a channel of its own, with a 1 where the label is. The target,
# the training picture that D sees as real, is the lung alone (Fig. 1); the real slice surrounds it later. "Real" means
# the phantom in cells 1 to 7: a drawn chest with vessels, lesions and a scanner's grain. That is weak, 15 to 30 HU.
# %%
names = draw_chests(WORK, patients=12)  # 16 slices of each
slices.write_split(WORK / "split.json", names[:144], names[144:], [], {})  # three patients are held out
knobs = dict(size=96, ngf=16, ndf=16, n_blocks=3, n_local_blocks=2, lr=6e-4, batch=2, epochs=1, interval=10**6)
knobs |= dict(contrast=6.0, ema=0.99, lambda_dfm=3.0, epoch_len=20 if QUICK else 440, dtype="float32", device="cpu")
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
# Alpha weighs G2 against G1 (cell 3), beta D2 against D1 (cell 5). Of one alone alpha is told as 1, beta as 0.


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
# G1 sees the map at half size and far around, so its pixels are coarse. G2 works at full size. DESUM, the dynamic
# element-wise sum, adds not their pictures but their features (Eq. 1): F_out = alpha F_local + (1 - alpha) F_global.
# F_local is G2's, F_global G1's. The second half of G2 then paints F_out. A small network reads one alpha a slice from
# F_local. We may set it by hand: at 0 the picture comes from G1's features alone, at 1 from G2's. Which of them paints
# lesions, which vessels? Here G2's features carry lesions and edges, G1's the spots that stand for vessels. Does alpha
# follow the slice, as "dynamic" promises? Here it is the same for all, and has hardly moved from its start, 0.5. Most
# hidden neurons of the small network do not fire: ReLUs die. Where all have, a bias is left. Alpha has done
# [more on real CT](readings.md#what-alpha-and-beta-did), though not in every run.
# %%
g = trainer.average.g
with torch.no_grad():
    f_global, f_local = g.g1.trunk(onehot[..., ::2, ::2]), g.locals[0].down(onehot)  # [48, 16, 48, 48] each
    f_out, alpha = g.desums[0](f_local, f_global)
    painted = [covidgan.lung_target(g.locals[0].head(g.locals[0].up(f)), labels) for f in (f_global, f_out, f_local)]
titles = ["G1, after g1", "G2, after g2", "joint, alpha 0: G1's", f"alpha {alpha[one]:.2f}, learned", "1: G2's", "real"]
figure, plots = tiles(titles, [*by_stage[:2], *(x[one, 0] for x in painted), real[one, 0]], 6, 1)
above = [750 * (x[labels == 3].mean() - x[labels == 1].mean()) for x in (painted[0], painted[2], real)]  # 750 HU are 1
plots[0].scatter(100 * (labels > 1).sum((1, 2, 3)) / (labels > 0).sum((1, 2, 3)), alpha)
plots[0].set(xlabel="lesion, % of the lung; a dot for each held-out slice", ylabel="alpha", ylim=(0.4, 0.6))
told = "Consolidation is denser than lung by {:.0f} HU of G1's features, {:.0f} of G2's, {:.0f} in real. Alpha is "
told = told.format(*above) + f"{alpha.min():.4f} to {alpha.max():.4f} on held-out slices, where "
page.show("desum", figure, told + f"{firing(g.desums[0].net, f_local):.0f} % of its network's hidden neurons fire.")

# %% [markdown]
# ## 4. What D1 and D2 see, and what they decide
# Each decision sees a patch of 70 x 70 pixels (the box) of the slice's 96 x 96. D2 sees half the size, so its patches
# reach beyond the slice. D judges pairs of map and image. It sees the lung alone, its HU magnified six times about
# those of healthy lung. Red: taken for real. Blue: taken for synthetic. A good D is red above and blue below; a good G
# makes both pale. Here D1 is near guessing on real slices: much of them is blue, too.
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
told = "On held-out slices D1 is right on {:.0f} % of real patches, D2 on {:.0f}; of synthetic {:.0f} and {:.0f}. "
page.show("decisions", figure, told.format(*right) + "A guess is right on 50.")

# %% [markdown]
# ## 5. The three feature maps that DFM compares
# D's answer is one number for a patch. DFM, dynamic feature matching (Eq. 4), asks for reasons too. It compares what
# D's first three layers make of the real and of the synthetic pair. Their distances are t1 in D1 and t2 in D2:
# L = (1 - beta) t1 + beta t2. The paper trains beta by minimising. So it goes to whichever D is easier to match, until
# its bound stops it, 0.1 or 0.9 (`--beta-margin 0.1`). In cell 2 it runs there in stage g2. In the joint stage it
# turns back, and stays near 0.5. On the way the ReLUs of its network have died, as alpha's; a bias alone moves slowly.
# %%
maps = []
for k, i in np.ndindex(2, 3):
    of_real, of_fake = (features_of[k][i][one] for features_of in judged)  # [channels, h, w] each
    maps.append(torch.stack([x.abs().mean(0) for x in (of_real, of_fake, of_real - of_fake)]))
pictures = [2 * x[row] / x.max() - 1 for row in range(3) for x in maps]
figure, _ = tiles([f"D{k + 1}, map {i + 1}" for k, i in np.ndindex(2, 3)], pictures, 6)
t1, t2 = (covidgan.feature_distance(*both).mean() for both in zip(*judged, strict=True))
told = f"From above: real, synthetic, distance, means over channels. t1 is {t1:.2f}, t2 {t2:.2f}, beta {beta:.2f}."
neurons = firing(trainer.method.dfm.net, judged[0][0][2])
page.show("dfm", figure, f"{told} Of beta's hidden neurons {neurons:.0f} % fire.")

# %% [markdown]
# ## 6. The same, broken on purpose
# Three mistakes, one at a time, about as long, from one seed. Look at vessels, grain and edges; then at KID (cell 7).
# - **Noise on the target**, as in the paper's Table I, but strong: 75 HU. The phantom's own grain has 15 to 30. D sees
#   it in every target. G has no dice: for a map it has one slice, and grain in one fixed pattern, where vessels drown.
#   The pictures and KID tell it, D's loss does not. So our D is shown no added noise.
# - **D sees whole images**, unmagnified. Texture is hundredths beside the lung's edge and the map's 0 and 1. So D wins
#   by edges, is blind to texture, and teaches none.
# - **No second generator**: G1 alone, at full size. It has no stages: its curve is drawn over all three.
# %%
single = dict(n_gen=1, epoch_len=c.epoch_len * 3 // 2)  # takes about as long as three stages
mistakes = {"noise": dict(noise=0.05), "whole images": dict(contrast=0.0), "one generator": single}
runs = {"as it is": (trainer, lungs, curves)} | {name: train(name, **how) for name, how in mistakes.items()}
made = {name: lungs[-1] for name, (_, lungs, _) in runs.items()}
figure, plots = tiles(["real", *made], [x[k, 0] for k in (one, another) for x in (real, *made.values())], 5, 2)
for name, (_, _, curves) in runs.items():
    plots[0].plot(np.linspace(0, 3, len(curves["d"])), curves["d"], label=name)
plots[0].legend(fontsize=7)
plots[0].set(xlabel="stage", ylabel="d")
kid = {name: evaluation.kid(looks(real), looks(lung)) for name, lung in made.items()}
bars(plots[1], kid, "KID of lungs: 0 is best")
page.show("broken", figure, "KID, one seed each: " + ", ".join(f"{name} {kid[name]:.3f}" for name in kid) + ".")

# %% [markdown]
# ## 7. Which figure to trust
# Pixel figures ask: is each pixel as it was? A map does not say where vessels run, so nobody can answer that. The
# safest answer is a mean, paint without texture. KID, the kernel inception distance, asks: do two sets look alike? So
# another patient's real lungs must score well in it: they lie at its floor. "Blurred" is the real slice itself, out of
# focus; after a minute's training covidgan is no better by KID. For looks trust KID, beside its floor. For the
# place and density of lesions trust pixel figures. Look at the pictures in any case. KIDs of other features than these
# (efficientnet-lite0, of ImageNet) cannot be compared.
# %%
others = covidgan.lung_target(covidgan.window(train_side.hu, c), train_side.labels)[:48]  # at the same heights
mean_hu = covidgan.lung_target(sum(real[labels == k].mean() * (labels == k) for k in (1, 2, 3)), labels)
sets = {"mean HU of labels": mean_hu, "real, blurred": blurred(real, labels), "another patient": others}
sets["covidgan"] = made["as it is"]
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
# `models/covid-ct-256.onnx` was trained on real CT. A map moved by one pixel should give its slice, moved. It does not:
# layers that halve the size keep every second pixel, and now they keep others. G halves four times, so after 16 pixels
# they keep the same. What changes then comes from the frame's border, and from noise, whose pattern does not move.
# - **Above:** moved by one pixel. The slice is moved back before it is shown and subtracted.
# - **Below:** ground glass in one lung. Is the other one still? Instance norm takes its mean from the whole slice, and
#   so carries a lesion across. A loss of preset `steered` teaches G to keep it still, as far as it goes.
# - **Last,** only where the generator can be steered: another seed, and two densities of healthy lung.
#
# "Near" is a part at twice the size. In "what changed" mid-grey is nothing, black -400 HU, white 400. Compare vessels
# and ground glass with real CT, where there are fissures too. [Its card](../models/README.md) has figures for it.
# %%
shipped = infer_onnx.Generator(*infer_onnx.open_session(infer_onnx.SHIPPED_MODEL, "cpu"))
chest = slices.read_map(infer_onnx.EXAMPLES / "P02_S015.png")
ill_map, other_lung = evaluation.paint(chest, 4)
healthy, frame, near = chest == 1, np.s_[56:218, 30:226], np.s_[88:169, 36:134]
plain, ill = make(shipped, chest), make(shipped, ill_map)
moved, far = (np.roll(make(shipped, np.roll(chest, k, 1)), -k, 1) for k in (1, 16))
pictures = [grey(plain)[near], grey(plain)[frame], grey(moved)[frame], ((moved - plain) / 400)[frame]]
pictures += [grey(ill)[near], slices.coloured(ill_map)[frame], grey(ill)[frame], ((ill - plain) / 400)[frame]]
titles = ["near", "slice", "map moved by a pixel", "what changed", "near", "a lesion", "slice", "what changed"]
cases = (moved, healthy), (far, healthy), (ill, other_lung)
by_1, by_16, by_ill = (evaluation.rms((x - plain)[at]) for x, at in cases)
told = f"Healthy lung changes by {by_1:.0f} HU RMS when the map moves by 1 pixel, by {by_16:.0f} when by 16. "
told += f"Ground glass in the one lung changes the other by {by_ill:.0f} HU RMS."
if shipped.info["steers"]:
    drawn, light, heavy = (make(shipped, chest, *how) for how in ((1,), (0, -840), (0, -720)))
    pictures += [grey(drawn)[frame], ((drawn - plain) / 400)[frame], grey(light)[frame], grey(heavy)[frame]]
    titles += ["seed 1 in place of 0", "what changed", "told -840 HU", "told -720 HU"]
    told += f" Another seed changes healthy lung by {evaluation.rms((drawn - plain)[healthy]):.0f} HU RMS."
    told += f" Told -840 and -720 HU, its mean is {light[healthy].mean():.0f} and {heavy[healthy].mean():.0f}."
figure, _ = tiles(titles, pictures, 4, shape=162 / 196)
page.show("shipped", figure, told)

# %% [markdown]
# ## 9. In a volume
# Each slice is made by itself, from a map that hardly changes. So vessels run straight through: streaks. Noise of each
# slice's own breaks them. Real vessels branch. A figure for it: how alike are neighbours in fine detail?
#
# For teachers of radiology: one lung with and without lesions, under a slider, in [a gallery](../web/gallery.html).
# %%
patient = phantom.draw_patient(0, 2)
hu, maps = zip(*[phantom.draw_slice(patient, z / phantom.HEIGHT, 256) for z in np.arange(100, 160, 2.5)], strict=True)
volumes = [[np.where(m > 0, x, -1350) for x, m in zip(hu, maps, strict=True)], [make(shipped, m) for m in maps]]
volumes += [[make(shipped, m, k) for k, m in enumerate(maps)]]
pictures = [grey(np.stack(v)[:, 150, 20:236]) for v in volumes]
figure, _ = tiles(["phantom, from the front", "one noise", "noise by slice"], pictures, 3, shape=0.5)
by_card, real_ones = card()["correlation of their detail finer than 3 pixels"].split(" | ")
told = "Correlation of neighbours' detail. Phantom maps: phantom {:.2f}, one noise {:.2f}, by slice {:.2f}; real maps: "
told = told.format(*(neighbours(v, maps) for v in volumes)) + f"shipped {by_card}, {real_ones} (models/README.md)."
page.show("volume", figure, told)
page.write()
