"""Losses and gradients against numbers worked out by hand."""

from math import exp, log, log1p

import numpy as np
import pytest
import torch
from torch import nn

import covidgan
from covidgan import Covidgan

NDF = 2  # so that beta's net takes features of 8 channels


def constant(value, n=2, channels=4 * NDF, side=16):
    value = torch.as_tensor(value, dtype=torch.float32).expand(n)
    return value.view(n, 1, 1, 1).expand(n, channels, side, side).clone()


def scale(values, n=2):
    """Features of one scale: three constant maps that are matched, a fourth and the decisions that are not."""
    first, second, third = values
    return [constant(first, n), constant(second, n), constant(third, n), constant(50.0, n), constant(90.0, n, 1)]


def features(*scales, n=2):
    return [scale(values, n) for values in scales]


def make_dfm(**given):
    return covidgan.Dfm(covidgan.Config(ndf=NDF, **given))


def bias_for(beta):
    return log(beta / (1 - beta))


def set_beta(dfm, beta):
    nn.init.constant_(dfm.net.fc[-1].bias, bias_for(beta))


ZERO = (0.0, 0.0, 0.0)
NEAR, FAR = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)  # distances 0.6 and 6 from zero


# ---- Eq. 3


def softplus(x):
    return log1p(exp(x))


def mean(*values):
    return sum(values) / len(values)


def test_bce_of_the_discriminator_is_the_log_loss_halved():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    sure = [1 / (1 + exp(-x)) for x in (2.0, -1.0)]
    fooled = [1 / (1 + exp(-x)) for x in (0.5, -3.0)]
    by_hand = (mean(*(-log(p) for p in sure)) + mean(*(-log(1 - p) for p in fooled))) / 2
    assert covidgan.gan_loss_d(real, fake, "bce").item() == pytest.approx(by_hand, rel=1e-6)


def test_bce_of_the_generator_is_non_saturating():
    fake = torch.tensor([0.5, -3.0])
    by_hand = mean(-log(1 / (1 + exp(-0.5))), -log(1 / (1 + exp(3.0))))
    assert covidgan.gan_loss_g(fake, "bce").item() == pytest.approx(by_hand, rel=1e-6)
    lost = torch.tensor([-30.0], requires_grad=True)
    covidgan.gan_loss_g(lost, "bce").backward()
    assert lost.grad.item() == pytest.approx(-1.0)


def test_an_undecided_discriminator_pays_log_2():
    zero = torch.zeros(4)
    assert covidgan.gan_loss_d(zero, zero, "bce").item() == pytest.approx(log(2))
    assert covidgan.gan_loss_g(zero, "bce").item() == pytest.approx(log(2))


def test_lsgan_is_the_squared_distance_from_1_and_0():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0])
    assert covidgan.gan_loss_d(real, fake, "lsgan").item() == pytest.approx((mean(1, 1) + mean(9, 1)) / 2)
    assert covidgan.gan_loss_g(fake, "lsgan").item() == pytest.approx(mean(4, 0))


def test_hinge_stops_counting_beyond_the_margin():
    real, fake = torch.tensor([2.0, 0.25]), torch.tensor([-3.0, 0.5])
    assert covidgan.gan_loss_d(real, fake, "hinge").item() == pytest.approx((mean(0, 0.75) + mean(0, 1.5)) / 2)
    assert covidgan.gan_loss_g(fake, "hinge").item() == pytest.approx(-mean(-3.0, 0.5))


@pytest.mark.parametrize("kind", ["bce", "lsgan", "hinge"])
def test_players_pull_in_opposite_directions(kind):
    real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    on_real, on_fake = torch.autograd.grad(covidgan.gan_loss_d(real, fake, kind), (real, fake))
    (of_g,) = torch.autograd.grad(covidgan.gan_loss_g(fake, kind), (fake,))
    assert on_real < 0
    assert on_fake.item() >= 0 if kind == "lsgan" else on_fake > 0
    assert of_g < 0


# ---- Eq. 4


def test_distance_is_the_mean_l1_of_the_first_three_features():
    torch.manual_seed(0)
    shapes = [(2, 4, 9, 9), (2, 8, 5, 5), (2, 16, 3, 3), (2, 32, 4, 4), (2, 1, 5, 5)]
    real, fake = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    pairs = list(zip(real, fake, strict=True))[:3]
    by_hand = [sum(np.abs((r[n] - f[n]).double().numpy()).sum() / r[n].numel() for r, f in pairs) for n in range(2)]
    assert covidgan.feature_distance(real, fake).tolist() == pytest.approx(by_hand, rel=1e-6)


def test_fixed_beta_averages_the_two_scales_or_weighs_them_as_told():
    loss, loss_beta, beta = make_dfm(dfm="fixed")(features(ZERO, ZERO), features(NEAR, FAR))
    assert loss.item() == pytest.approx((0.6 + 6.0) / 2)
    assert beta.tolist() == [0.5, 0.5]
    assert not loss_beta.requires_grad
    loss, _, beta = make_dfm(dfm="fixed", beta=0.1)(features(ZERO, ZERO), features(NEAR, FAR))
    assert (loss.item(), beta.tolist()) == (pytest.approx(0.9 * 0.6 + 0.1 * 6.0), pytest.approx([0.1, 0.1]))


def test_beta_weighs_d2_and_its_rest_d1():
    dfm = make_dfm(beta_policy="min")
    set_beta(dfm, 0.8)
    loss, _, beta = dfm(features(ZERO, ZERO), features(NEAR, FAR))
    assert beta.tolist() == pytest.approx([0.8, 0.8])
    assert loss.item() == pytest.approx(0.2 * 0.6 + 0.8 * 6.0, rel=1e-5)


def test_each_image_has_its_own_distance_and_the_batch_its_mean():
    dfm = make_dfm(beta_policy="min")
    set_beta(dfm, 0.25)
    per_image = torch.tensor([1.0, 3.0])
    fake = [scale((per_image, 0.0, 0.0)), scale((2 * per_image, 0.0, 0.0))]
    loss, _, beta = dfm(features(ZERO, ZERO), fake)
    assert beta.shape == (2,)
    assert loss.item() == pytest.approx(mean(0.75 * 1 + 0.25 * 2, 0.75 * 3 + 0.25 * 6), rel=1e-5)


@pytest.mark.parametrize("dfm", ["learned", "fixed"])
def test_a_single_scale_has_weight_1(dfm):
    loss, loss_beta, beta = make_dfm(dfm=dfm)(features(ZERO), features(NEAR))
    assert loss.item() == pytest.approx(0.6)
    assert loss_beta.item() == 0
    assert beta.shape == (2,)


def test_three_scales_share_beta():
    dfm = make_dfm(n_dis=3, beta_policy="min")
    set_beta(dfm, 0.8)
    loss, _, _ = dfm(features(ZERO, ZERO, ZERO), features((1.0, 0, 0), (2.0, 0, 0), (6.0, 0, 0)))
    assert loss.item() == pytest.approx(0.2 * 1 + 0.4 * 2 + 0.4 * 6, rel=1e-5)


@pytest.mark.parametrize(("kind", "scale_"), [("learned", 0), ("d2", 1)])
def test_beta_is_drawn_from_the_third_feature_of_the_real_pair_of_its_scale(kind, scale_):
    dfm = make_dfm(dfm=kind)
    seen = []
    dfm.net.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    real = features((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    dfm(real, features(NEAR, FAR))
    assert torch.equal(seen[0], real[scale_][2])


@pytest.mark.parametrize("bias", [-200.0, -8.0, 8.0, 200.0])
def test_clamp_holds_beta_between_0_1_and_0_9(bias):
    dfm = make_dfm()
    nn.init.constant_(dfm.net.fc[-1].bias, bias)
    beta = dfm(features(ZERO, ZERO), features(NEAR, FAR))[2]
    assert beta.min() >= 0.1 - 1e-6
    assert beta.max() <= 0.9 + 1e-6
    assert beta.mean().item() == pytest.approx(0.9 if bias > 0 else 0.1, abs=1e-3)


def test_clamp_keeps_its_gradient_where_the_net_saturates():
    dfm = make_dfm()
    nn.init.constant_(dfm.net.fc[-1].bias, 8.0)
    dfm(features(ZERO, ZERO), features(NEAR, FAR))[1].backward()
    by_hand = (6.0 - 0.6) * 0.8 * exp(-8) / (1 + exp(-8)) ** 2  # (t2 - t1) times the slope of 0.1 + 0.8 sigmoid
    assert dfm.net.fc[-1].bias.grad.item() == pytest.approx(by_hand, rel=1e-2)


def moved_beta(dfm, near, far):
    """Beta before and after a small gradient step on its loss."""
    real, fake = features(ZERO, ZERO), features(near, far)
    _, loss, before = dfm(real, fake)
    grads = torch.autograd.grad(loss, [*dfm.net.parameters()])
    with torch.no_grad():
        for p, g in zip(dfm.net.parameters(), grads, strict=True):
            p -= 0.05 * g
    return before.mean().item(), dfm(real, fake)[2].mean().item()


@pytest.mark.parametrize(("policy", "towards"), [("min", "smaller"), ("clamp", "smaller"), ("max", "larger")])
@pytest.mark.parametrize("far_scale", [0, 1])
def test_policy_moves_beta_towards_its_distance(policy, towards, far_scale):
    fake = (FAR, NEAR) if far_scale == 0 else (NEAR, FAR)
    before, after = moved_beta(make_dfm(beta_policy=policy), *fake)
    wants_d2 = (far_scale == 0) == (towards == "smaller")
    assert (after > before + 1e-4) if wants_d2 else (after < before - 1e-4)


@pytest.mark.parametrize("extreme", [0.05, 0.95])
def test_entropy_pulls_beta_back_from_the_ends_where_distances_are_equal(extreme):
    dfm = make_dfm(beta_policy="entropy")
    set_beta(dfm, extreme)
    before, after = moved_beta(dfm, NEAR, NEAR)
    assert abs(after - 0.5) < abs(before - 0.5) - 1e-5


@pytest.mark.parametrize("logit", [-200.0, -90.0, 20.0, 200.0])
def test_entropy_has_a_gradient_where_beta_rounds_to_an_end(logit):
    dfm = make_dfm(beta_policy="entropy")
    torch.nn.init.constant_(dfm.net.fc[-1].bias, logit)
    dfm(features(ZERO, ZERO), features(NEAR, FAR))[1].backward()
    assert all(parameter.grad.isfinite().all() for parameter in dfm.parameters())


def test_entropy_bonus_is_the_entropy_of_beta():
    with_bonus, without = make_dfm(beta_policy="entropy", beta_entropy=0.3), make_dfm(beta_policy="min")
    for dfm in (with_bonus, without):
        set_beta(dfm, 0.2)
    pair = features(ZERO, ZERO), features(NEAR, FAR)
    entropy = -(0.2 * log(0.2) + 0.8 * log(0.8))
    assert (without(*pair)[1] - with_bonus(*pair)[1]).item() == pytest.approx(0.3 * entropy, rel=1e-4)
    assert with_bonus(*pair)[0].item() == pytest.approx(without(*pair)[0].item())


# ---- whose gradient reaches whom


@pytest.fixture
def trainer(tiny):
    """A trainer at the joint stage whose weighting nets are off their start and whose optimisers do not move."""
    made = covidgan.Trainer(Covidgan, tiny(batch=2))
    torch.manual_seed(0)
    for net in (made.method.dfm.net, made.method.g.desums[0].net):
        nn.init.normal_(net.fc[-1].weight, 0, 0.5)
    for net in [*made.method.d.scales]:  # past the first steps, where gradients of both players are tiny
        nn.init.normal_(net.blocks[-1].weight, 0, 0.3)
    made.begin("joint")
    for optimizer in made.optimizers.values():
        optimizer.step = lambda: None
    return made


def losses_of(trainer, target, onehot, image):
    """Eq. 2 anew for a synthesized image, D's view of both enlarged: D's loss, G's loss, beta's loss."""
    d, c = trainer.method.d, trainer.c
    lung = onehot[:, 1:].sum(1, keepdim=True)
    real, fake = (d(onehot, 4 * (x + 260 / 750) * lung) for x in (target, image))  # -860 HU becomes 0
    dfm, beta, _ = trainer.method.dfm(real, fake)
    of_d = sum(covidgan.gan_loss_d(r[-1], f[-1], "bce") for r, f in zip(real, fake, strict=True))
    of_g = sum(covidgan.gan_loss_g(f[-1], "bce") for f in fake)
    return of_d, of_g + c.lambda_dfm * dfm, beta


def test_each_player_gets_the_gradient_of_its_own_loss_alone(trainer, monkeypatch):
    for optimizer in trainer.optimizers.values():
        monkeypatch.setattr(optimizer, "zero_grad", lambda: None)  # the step's end would free what is looked at
    state = trainer.rng.get_state()
    target, labels, _ = trainer.batch()
    trainer.rng.set_state(state)
    trainer.step()
    onehot, g, d = covidgan.one_hot(labels, 4), trainer.method.g, trainer.method.d
    players = {
        "d": [*d.parameters()],
        "g": [*g.g1.trunk.parameters(), *g.locals.parameters(), *g.desums.parameters()],
        "beta": [*trainer.method.dfm.parameters()],
    }
    # the discriminators' from a synthesis that is cut off, the generator's from discriminators that stand still
    of_d = torch.autograd.grad(losses_of(trainer, target, onehot, g(onehot)[0].detach())[0], players["d"])
    d.requires_grad_(False)
    of_g = torch.autograd.grad(losses_of(trainer, target, onehot, g(onehot)[0])[1], players["g"])
    of_beta = torch.autograd.grad(losses_of(trainer, target, onehot, g(onehot)[0].detach())[2], players["beta"])
    for name, wanted in (("d", of_d), ("g", of_g), ("beta", of_beta)):
        got = [p.grad for p in players[name]]
        assert max(x.abs().max().item() for x in wanted) > 1e-4, name
        for x, y in zip(got, wanted, strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-6), name
    assert all(p.grad is None for p in g.g1.head.parameters())


def test_generator_matches_features_without_moving_beta_and_beta_without_moving_others(trainer):
    target, labels, _ = trainer.batch()
    onehot = covidgan.one_hot(labels, 4)
    losses = trainer.method.losses(onehot, target, "joint")
    beta = [*trainer.method.dfm.parameters()]
    others = [*trainer.method.g.parameters(), *trainer.method.d.parameters()]
    reached = torch.autograd.grad(losses["g"], beta, allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in reached)
    reached = torch.autograd.grad(losses["dfm"], beta, allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in reached)
    reached = torch.autograd.grad(losses["loss_beta"], others, allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in reached)
    reached = torch.autograd.grad(losses["loss_beta"], beta)
    assert any(g.any() for g in reached)


@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_discriminators_see_the_lung_alone_and_enlarged_unless_told_not_to(tiny, monkeypatch, stage):
    for contrast in (4.0, 0.0):
        method = covidgan.build(Covidgan, tiny(contrast=contrast))
        seen, judge = [], method.d.forward
        monkeypatch.setattr(method.d, "forward", lambda *a, seen=seen, judge=judge: (seen.append(a[1]), judge(*a))[1])
        labels = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
        labels[:, :, 15:40, 17:48] = 1
        onehot = covidgan.one_hot(labels, 4)
        method.losses(onehot, torch.where(labels > 0, 0.5, -1.0), stage)
        real, fake = seen
        outside = labels[..., :: 64 // fake.shape[-1], :: 64 // fake.shape[-1]] == 0
        nothing = 0 if contrast else -1
        assert (fake[outside] == nothing).all() == bool(contrast)
        assert (real[outside] == nothing).all() == (bool(contrast) or stage != "g1")  # shrinking has blurred the border
        middle = real[0, 0, real.shape[2] * 27 // 64, real.shape[3] // 2].item()  # 0.5 is -225 HU, 635 above parenchyma
        assert middle == pytest.approx(4 * 635 / 750 if contrast else 0.5)
        assert fake[~outside].unique().numel() > 100
        fake.sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method.g.parameters())


def test_generators_loss_is_the_adversarial_one_and_lambda_times_feature_matching(trainer):
    target, labels, _ = trainer.batch()
    losses = trainer.method.losses(covidgan.one_hot(labels, 4), target, "joint")
    assert losses["g"].item() == pytest.approx((losses["gan"] + 10 * losses["dfm"]).item(), rel=1e-6)


def test_without_feature_matching_only_the_adversarial_loss_is_left(tiny, trainer):
    target, labels, _ = trainer.batch()
    c = tiny(dfm="off")
    losses = covidgan.build(Covidgan, c).losses(covidgan.one_hot(labels, 4), target, "joint")
    assert losses["g"].item() == losses["gan"].item()


@pytest.mark.parametrize(("stage", "side", "judges"), [("g1", 32, 1), ("g2", 64, 2), ("joint", 64, 2)])
def test_each_stage_is_judged_at_its_size_by_its_discriminators(trainer, monkeypatch, stage, side, judges):
    seen = []

    def judge(self, onehot, image, first=0, real_judge=covidgan.Discriminators.forward):
        seen.append((self.scales[first:], onehot, image))
        return real_judge(self, onehot, image, first)

    monkeypatch.setattr(covidgan.Discriminators, "forward", judge)
    target, labels, _ = trainer.batch()
    trainer.method.losses(covidgan.one_hot(labels, 4), target, stage)
    d1, d2 = trainer.method.d.scales
    for scales, onehot, image in seen:
        assert [id(s) for s in scales] == [id(s) for s in ([d2] if judges == 1 else [d1, d2])]
        assert image.shape[-1] == onehot.shape[-1] == side
    real = seen[0][2].numpy()
    wanted = target.numpy().reshape(2, 1, side, 64 // side, side, 64 // side).mean((3, 5))
    lung = labels.numpy()[..., :: 64 // side, :: 64 // side] > 0
    assert np.abs(real - np.where(lung, 4 * (wanted + 260 / 750), 0)).max() < 1e-5  # -860 HU becomes 0
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize(
    ("n_gen", "n_dis", "first", "side"), [(2, 1, 0, 32), (2, 2, 1, 32), (2, 3, 1, 32), (3, 2, 1, 16), (3, 3, 2, 16)]
)
def test_g1_alone_is_judged_by_the_scale_of_its_size_and_the_coarser_ones(tiny, monkeypatch, n_gen, n_dis, first, side):
    """With fewer scales than generators, by the coarsest."""
    method, seen = covidgan.build(Covidgan, tiny(n_gen=n_gen, n_dis=n_dis)), []
    judge = covidgan.Discriminators.forward

    def note(self, onehot, image, first=0):
        seen.append((first, image.shape[-1]))
        return judge(self, onehot, image, first)

    monkeypatch.setattr(covidgan.Discriminators, "forward", note)
    labels = (torch.arange(64 * 64) // 700 % 4).view(1, 1, 64, 64)
    method.losses(covidgan.one_hot(labels, 4), torch.zeros(1, 1, 64, 64), "g1")
    assert seen == [(first, side)] * 2
    moved = {id(p) for p in method.players("g1")["d"].parameters}
    assert moved == {id(p) for scale in method.d.scales[first:] for p in scale.parameters()}


def test_half_size_scale_sees_block_means_of_the_image_and_every_second_label():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return [x]

    torch.manual_seed(0)
    onehot, image = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 8, 8)
    d = covidgan.Discriminators(covidgan.Config(ndf=4, n_dis=3))
    d.scales = nn.ModuleList([Spy(), Spy(), Spy()])
    d(onehot, image)
    assert torch.equal(seen[0], torch.cat([onehot, image], 1))
    for k, x in enumerate(seen[1:], start=1):
        n = 8 // 2**k
        blocks = image.double().numpy().reshape(1, 1, n, 2**k, n, 2**k).mean((3, 5))
        assert np.abs(x[:, 4:].numpy() - blocks).max() < 1e-6
        assert torch.equal(x[:, :4], onehot[..., :: 2**k, :: 2**k])
