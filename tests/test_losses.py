"""Eq. 2, 3 and 4 against numbers worked out by hand, and whom each gradient reaches."""

import dataclasses
from math import exp, log
from statistics import fmean

import numpy as np
import pytest
import torch
from conftest import batch_of
from torch import nn

import covidgan
from covidgan import Covidgan

NDF = 2  # so that beta's net takes features of 8 channels


# ---- Eq. 3


def gan_losses(real, fake, kind="bce"):
    """D's loss and G's, of decisions at either of two scales alike, whose losses are summed."""
    d, g = covidgan.gan_losses(2 * [[torch.tensor(real)]], 2 * [[torch.tensor(fake)]], kind)
    return d.item() / 2, g.item() / 2


def test_bce_is_the_log_loss_halved_for_d_and_does_not_saturate_for_g():
    sure, fooled = ([1 / (1 + exp(-x)) for x in logits] for logits in ((2.0, -1.0), (0.5, -3.0)))
    of_d = (fmean(-log(p) for p in sure) + fmean(-log(1 - p) for p in fooled)) / 2
    of_g = fmean(-log(p) for p in fooled)
    assert gan_losses([2.0, -1.0], [0.5, -3.0]) == pytest.approx((of_d, of_g))
    assert gan_losses([0.0], [0.0]) == pytest.approx((log(2), log(2)))  # undecided
    lost = torch.tensor([-30.0], requires_grad=True)
    covidgan.gan_losses([[lost]], [[lost]], "bce")[1].backward()
    assert lost.grad.item() == pytest.approx(-1.0)


def test_lsgan_is_the_squared_distance_from_1_and_0_and_hinge_stops_counting_beyond_the_margin():
    lsgan = (fmean([1, 1]) + fmean([9, 1])) / 2, fmean([4, 0])
    assert gan_losses([2.0, 0.0], [3.0, 1.0], "lsgan") == pytest.approx(lsgan)
    hinge = (fmean([0, 0.75]) + fmean([0, 1.5])) / 2, -fmean([-3.0, 0.5])
    assert gan_losses([2.0, 0.25], [-3.0, 0.5], "hinge") == pytest.approx(hinge)


# ---- Eq. 4


def scale(values):
    """Features of one scale for two images: three constant maps that are matched, two more that are not."""
    levels = [torch.as_tensor(value, dtype=torch.float32).expand(2).view(2, 1, 1, 1) for value in (*values, 50.0, 90.0)]
    return [level.expand(2, 4 * NDF, 16, 16).clone() for level in levels]


def features(*scales):
    return [scale(values) for values in scales]


def make_dfm(beta=None, **given):
    """Dfm; with beta, its net is set to give that."""
    dfm = covidgan.Dfm(covidgan.Config(ndf=NDF, **given))
    if beta is not None:
        inner = (beta - dfm.margin) / (1 - 2 * dfm.margin)
        nn.init.constant_(dfm.net.fc[-1].bias, log(inner / (1 - inner)))
    return dfm


ZERO = (0.0, 0.0, 0.0)
NEAR, FAR = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)  # distances 0.6 and 6 from zero


def test_distance_is_the_mean_l1_of_the_first_three_features():
    shapes = [(2, 4, 9, 9), (2, 8, 5, 5), (2, 16, 3, 3), (2, 32, 4, 4), (2, 1, 5, 5)]
    real, fake = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    pairs = [*zip(real, fake, strict=True)][:3]
    by_hand = [sum(np.abs((r[n] - f[n]).double().numpy()).sum() / r[n].numel() for r, f in pairs) for n in range(2)]
    assert covidgan.feature_distance(real, fake).tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_fixed_beta_weighs_d2_and_its_rest_d1(beta):
    dfm = covidgan.Dfm(covidgan.Config(ndf=NDF, dfm="fixed", beta=beta))
    loss, loss_beta, told = dfm(features(ZERO, ZERO), features(NEAR, FAR))
    assert loss.item() == pytest.approx((1 - beta) * 0.6 + beta * 6.0) and told.tolist() == pytest.approx([beta] * 2)
    assert not loss_beta.requires_grad


def test_each_image_has_its_own_distance_and_the_batch_its_mean():
    per_image = torch.tensor([1.0, 3.0])
    fake = [scale((per_image, 0.0, 0.0)), scale((2 * per_image, 0.0, 0.0))]
    loss, loss_beta, beta = make_dfm(0.25)(features(ZERO, ZERO), fake)
    assert loss_beta.requires_grad and not loss.requires_grad  # G's loss does not move beta
    assert beta.tolist() == pytest.approx([0.25, 0.25])
    assert loss.item() == pytest.approx(fmean([0.75 * 1 + 0.25 * 2, 0.75 * 3 + 0.25 * 6]), rel=1e-5)


def test_three_scales_share_beta():
    loss, _, _ = make_dfm(0.8, n_dis=3)(features(ZERO, ZERO, ZERO), features((1.0, 0, 0), (2.0, 0, 0), (6.0, 0, 0)))
    assert loss.item() == pytest.approx(0.2 * 1 + 0.4 * 2 + 0.4 * 6, rel=1e-5)


def test_a_single_scale_has_weight_1():
    loss, loss_beta, _ = make_dfm()(features(ZERO), features(NEAR))
    assert (loss.item(), loss_beta.item()) == (pytest.approx(0.6), 0)


@pytest.mark.parametrize(("kind", "judge"), [("learned", 0), ("d2", 1)])
def test_beta_is_drawn_from_the_third_feature_of_the_real_pair_of_its_scale(kind, judge):
    dfm, seen, real = make_dfm(dfm=kind), [], features((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    dfm.net.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    dfm(real, features(NEAR, FAR))
    assert torch.equal(seen[0], real[judge][2])


@pytest.mark.parametrize("bias", [-200.0, -8.0, 8.0, 200.0])
def test_beta_stays_within_its_margin_and_keeps_its_gradient_there(bias):
    dfm = make_dfm()
    nn.init.constant_(dfm.net.fc[-1].bias, bias)
    _, loss_beta, beta = dfm(features(ZERO, ZERO), features(NEAR, FAR))
    assert beta.tolist() == pytest.approx([0.9 if bias > 0 else 0.1] * 2, abs=1e-3)
    assert beta.min() >= 0.1 - 1e-6 and beta.max() <= 0.9 + 1e-6
    loss_beta.backward()
    by_hand = (6.0 - 0.6) * 0.8 * exp(-abs(bias)) / (1 + exp(-abs(bias))) ** 2  # (t2 - t1) times the sigmoid's slope
    assert dfm.net.fc[-1].bias.grad.item() == pytest.approx(by_hand, rel=1e-2, abs=1e-30)


# ---- whose gradient reaches whom


@pytest.fixture
def trainer(tiny):
    """A trainer at the joint stage, past the first steps, where alpha and beta stand still and gradients are tiny."""
    made = covidgan.Trainer(Covidgan, tiny(batch=2))
    torch.manual_seed(0)
    for net in (made.method.dfm.net, made.method.g.desums[0].net):
        nn.init.normal_(net.fc[-1].weight, 0, 0.5)
    for net in made.method.d.scales:
        nn.init.normal_(net.blocks[-1].weight, 0, 0.3)
    made.begin("joint")
    return made


MOVED = {  # by what names of their parameters begin with
    "g1": ("g.g1.", "d.scales.1."),
    "g2": ("g.locals.", "d.", "dfm."),
    "joint": ("g.g1.trunk.", "g.locals.", "g.desums.", "d.", "dfm."),
}


@pytest.mark.parametrize("stage", MOVED)
def test_a_stage_moves_its_own_parameters_and_no_others(trainer, stage):
    """In g2, G1 stands still; its head is trained in g1 alone."""
    trainer.begin(stage)
    target, labels = batch_of(trainer)
    trainer.backward(trainer.method.losses(covidgan.one_hot(labels, 4), target, stage))
    weights = {name: p for name, p in trainer.method.named_parameters() if p.dim() > 1}
    wanted = {name for name in weights if name.startswith(MOVED[stage])}
    assert {name for name, p in weights.items() if p.grad is not None and p.grad.any()} == wanted
    before = {name: p.detach().clone() for name, p in weights.items()}
    trainer.step()
    assert {name for name, p in weights.items() if not torch.equal(p, before[name])} == wanted


def test_each_player_gets_the_gradient_of_its_own_loss_alone(trainer):
    """Against Eq. 2 anew: D's from a synthesis that is cut off, G's from discriminators that stand still."""
    method, (target, labels) = trainer.method, batch_of(trainer)
    onehot, g, d = covidgan.one_hot(labels, 4), method.g, method.d
    lung = onehot[:, 1:].sum(1, keepdim=True)

    def anew(image):
        real, fake = (d(onehot, 4 * (x + 260 / 750) * lung) for x in (target, image))  # -860 HU becomes 0
        of_d, of_g = covidgan.gan_losses(real, fake, "bce")
        dfm, beta, _ = method.dfm(real, fake)
        return of_d, of_g + trainer.c.lambda_dfm * dfm, beta

    players = {
        "d": [*d.parameters()],
        "g": [*g.g1.trunk.parameters(), *g.locals.parameters(), *g.desums.parameters()],
        "beta": [*method.dfm.parameters()],
    }
    wanted = {"d": torch.autograd.grad(anew(g(onehot)[0].detach())[0], players["d"])}
    wanted["beta"] = torch.autograd.grad(anew(g(onehot)[0].detach())[2], players["beta"])
    d.requires_grad_(False)
    wanted["g"] = torch.autograd.grad(anew(g(onehot)[0])[1], players["g"])
    d.requires_grad_(True)
    losses = method.losses(onehot, target, "joint")
    assert losses["g"].item() == pytest.approx((losses["gan"] + 10 * losses["dfm"]).item())
    plain = Covidgan(dataclasses.replace(trainer.c, dfm="off")).losses(onehot, target, "joint")
    assert plain["g"].item() == plain["gan"].item()
    trainer.backward(losses)
    for name, gradients in wanted.items():
        assert max(gradient.abs().max() for gradient in gradients) > 1e-4, name
        for p, gradient in zip(players[name], gradients, strict=True):
            assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6), name


# ---- what discriminators see


def watched(method):
    """(index of the scale, its input [B, n_labels + 1, H, W]) of each discriminator as it is called."""
    seen = []
    for k, net in enumerate(method.d.scales):
        net.register_forward_pre_hook(lambda _module, inputs, k=k: seen.append((k, inputs[0].detach())))
    return seen


@pytest.mark.parametrize("contrast", [4.0, 0.0])
@pytest.mark.parametrize(("stage", "judges"), [("g1", {1: 32}), ("g2", {0: 64, 1: 32}), ("joint", {0: 64, 1: 32})])
def test_each_stage_is_judged_at_its_size_by_its_discriminators_on_the_magnified_lung(tiny, stage, judges, contrast):
    """Real pairs against numpy: block means of the target, every second label, -860 HU moved to 0."""
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, contrast=contrast))
    seen, (target, labels) = watched(trainer.method), batch_of(trainer)
    trainer.method.losses(covidgan.one_hot(labels, 4), target, stage)
    assert [(k, x.shape[-1]) for k, x in seen] == 2 * [*judges.items()]  # the real pair, then the synthetic
    finest = max(judges.values())

    def blocks(x, side):
        return x.reshape(2, 1, side, x.shape[-1] // side, side, x.shape[-1] // side).mean((3, 5))

    real = blocks(target.double().numpy(), finest)
    lung = labels.numpy()[..., :: 64 // finest, :: 64 // finest] > 0
    real = np.where(lung, 4 * (real + 260 / 750), 0) if contrast else real
    for (k, pair), (_, other) in zip(seen[: len(judges)], seen[len(judges) :], strict=True):
        step = 64 // judges[k]
        assert np.abs(pair[:, 4:].numpy() - blocks(real, judges[k])).max() < 1e-5
        assert torch.equal(pair[:, :4], covidgan.one_hot(labels[..., ::step, ::step], 4))
        assert torch.equal(pair[:, :4], other[:, :4]) and not torch.equal(pair, other)


@pytest.mark.parametrize(
    ("n_gen", "n_dis", "judges"), [(2, 1, {0: 32}), (2, 3, {1: 32, 2: 16}), (3, 2, {1: 16}), (3, 3, {2: 16})]
)
def test_g1_alone_is_judged_by_the_scale_of_its_size_or_the_coarsest_and_the_coarser_ones(tiny, n_gen, n_dis, judges):
    method = covidgan.build(Covidgan, tiny(n_gen=n_gen, n_dis=n_dis))
    seen, labels = watched(method), (torch.arange(64 * 64) // 700 % 4).view(1, 1, 64, 64)
    method.losses(covidgan.one_hot(labels, 4), torch.zeros(1, 1, 64, 64), "g1")
    assert [(k, x.shape[-1]) for k, x in seen] == 2 * [*judges.items()]
