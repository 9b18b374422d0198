"""Generators, discriminators and weighting nets: the paper's sizes, Eq. 1 by hand, steering and noise."""

import numpy as np
import pytest
import torch
from torch import nn

import covidgan
from covidgan import Covidgan


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def maps_of(toy, n):
    """One-hot maps [n, 4, S, S] of the toy's first slices that have lesions."""
    names = [name for name in toy.train if not name.endswith("S001")][:n]
    return covidgan.one_hot(torch.from_numpy(np.stack([toy.labels[name] for name in names]))[:, None], 4)


def off_its_start(net):
    """Take a weighting net off its start, as training would."""
    torch.manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


def without_memory(**given):
    """Networks of the paper's widths, on a device where they take no memory."""
    with torch.device("meta"):
        return Covidgan(covidgan.Config(**given))


@pytest.fixture
def nets(tiny):
    """Small networks whose alpha is off its start."""
    made = covidgan.build(Covidgan, tiny())
    off_its_start(made.g.desums[0].net)
    return made


# ---- the paper's widths


def test_parameter_counts_and_shapes_are_those_of_the_published_widths():
    published = without_memory()
    g1, g2 = published.g.g1, published.g.locals
    assert (count(g1), count(g1.trunk, g2)) == (45_590_209, 45_853_473)
    assert (count(published.g.desums), count(published.dfm)) == (112_897, 223_489)
    assert [count(scale) for scale in published.d.scales] == [2_766_785] * 2
    onehot, image = torch.empty(1, 4, 512, 512, device="meta"), torch.empty(1, 1, 512, 512, device="meta")
    assert published.g(onehot, "joint")[0].shape == (1, 1, 512, 512)
    assert published.g(onehot, "g1")[0].shape == (1, 1, 256, 256)
    d1, d2 = published.d(onehot, image)
    assert [f.shape[1] for f in d1] == [64, 128, 256, 512, 1]
    assert (d1[-1].shape, d2[-1].shape) == ((1, 1, 67, 67), (1, 1, 35, 35))
    g = without_memory(n_gen=3).g  # a third generator lies between, with twice the channels of G2
    assert [local.down[1].out_channels for local in g.locals] == [64, 32] and g.g1.trunk[1].out_channels == 128


# ---- variants


VARIANTS = [
    dict(n_gen=1, n_dis=1, gan="hinge"),
    dict(n_gen=3, n_dis=3, dfm="d2", steer=True, draws=1.0),
    dict(desum="global", gan="lsgan", n_dis=1),
    dict(desum="fixed", dfm="fixed", n_labels=6),
    dict(desum="sum", dfm="off"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_trains_a_step_in_each_of_its_stages(tiny, variant):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, **variant))
    for stage in trainer.stages:
        trainer.begin(stage)
        assert all(np.isfinite(value) for value in trainer.step().values())


@pytest.mark.parametrize(("n_gen", "side"), [(1, 64), (2, 32), (3, 16)])
def test_each_more_generator_halves_the_size_of_g1_and_images_are_of_minus_1_to_1(tiny, toy, n_gen, side):
    net = covidgan.Generator(tiny(n_gen=n_gen))
    for stage, wanted in (("g1", side), ("g2", 64), ("joint", 64)):
        image, alpha = net(maps_of(toy, 2), stage)
        assert (image.shape, image.dtype, alpha.shape) == ((2, 1, wanted, wanted), torch.float32, (2,))
        assert image.abs().max() <= 1


def test_g1_at_reduced_size_sees_a_map_of_labels(nets, toy):
    seen = []
    nets.g.g1.trunk.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    nets.g(maps_of(toy, 2), "joint")
    assert {*seen[0].unique().tolist()} == {0.0, 1.0} and (seen[0].sum(1) == 1).all()


# ---- steering


def test_networks_are_told_them_within_the_lung_alone_and_nothing_where_there_is_no_healthy_lung(tiny):
    labels = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    labels[0, :, 4:12, 4:12], labels[1, :, 4:12, 4:12] = 1, 3
    given = covidgan.encode(labels, torch.full((2, 1, 16, 16), -300 / 750), tiny(steer=True))  # all at -900 HU
    assert given.shape == (2, 6, 16, 16) and torch.equal(given[:, :4], covidgan.one_hot(labels, 4))
    assert given[0, 4, 4:12, 4:12].numpy() == pytest.approx(-2, abs=1e-4)  # two spreads of 50 HU below -800
    assert given[0, 5, 6, 6] == -3 and given[0, 4:].sum((0, 1))[0].sum() == 0
    assert not given[1, 4:].any()
    assert covidgan.encode(labels, torch.zeros(2, 1, 16, 16), tiny()).shape == (2, 4, 16, 16)


def test_noise_is_a_function_of_seed_and_place_uniform_and_without_pattern():
    like, seeds = torch.zeros(3, 1, 256, 256), torch.tensor([0, 1, 2**31 - 2])
    noise = covidgan.noise_of(seeds, like)
    assert torch.equal(noise[1:2, :, :64, :96], covidgan.noise_of(seeds[1:2], like[:1, :, :64, :96]))
    prime, x = 2**31 - 1, 1  # by Python's own whole numbers, seed 1, row 5, column 7
    for place in (0, 5, 7):
        x = pow(x + place + 195_912_037, 5, prime)
    assert noise[1, 0, 5, 7].item() == pytest.approx(4 * x / prime - 2, abs=1e-6)
    flat = noise.flatten(1).numpy()
    assert np.histogram(flat, 16, (-2, 2))[0] == pytest.approx(flat.size / 16, rel=0.03)
    assert np.corrcoef(flat) == pytest.approx(np.eye(3), abs=0.02)
    power = np.abs(np.fft.fft2(noise[0, 0].numpy()))[1:] ** 2 / (65536 * 16 / 12)
    assert power.max() < 20  # of white noise, exponentially distributed about 1


def test_another_seed_is_another_slice_of_the_same_map_and_none_is_seed_0(tiny, toy):
    g, onehot = covidgan.Generator(tiny(draws=True)), maps_of(toy, 1)
    one, again, other = (g(onehot, "joint", torch.tensor([seed]))[0] for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(g(onehot)[0], g(onehot, "joint", torch.tensor([0]))[0])


def test_columns_may_have_seeds_of_their_own():
    like = torch.zeros(1, 1, 8, 6)
    noise = covidgan.noise_of(torch.tensor([[3, 3, 3, 8, 8, 8]]), like)
    three, eight = (covidgan.noise_of(torch.tensor([seed]), like) for seed in (3, 8))
    assert torch.equal(noise[..., :3], three[..., :3]) and torch.equal(noise[..., 3:], eight[..., 3:])


class Stand(nn.Module):
    """A generator that paints each label's number of hundredths, and noise."""

    def __init__(self, noise, leak):
        super().__init__()
        self.noise, self.leak = noise, leak

    def forward(self, onehot, stage, seed):
        image = 0.01 * onehot.argmax(1, keepdim=True) + self.noise * covidgan.noise_of(seed, onehot)
        return image + self.leak * (onehot[:, 2:4] > 0).float().mean(), None


@pytest.mark.parametrize(
    ("noise", "leak", "low", "high"),
    [(0.0, 0.0, 0.06, 0.06), (0.1, 0.0, 0, 0), (0.1, 100.0, 0.01, 99), (0.03, 0, 0.015, 0.025)],
)
def test_a_lung_redrawn_costs_where_the_other_moves_and_where_noise_changes_nothing(tiny, noise, leak, low, high):
    """Two uniform noises in +-2 a differ by 4/3 a in the mean."""
    method, labels = covidgan.Covidgan(tiny(draws=1.0)), torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    labels[..., 4:60, 4:60] = 1  # lungs that meet: the lesion keeps to one
    method.g, seed = Stand(noise, leak), torch.tensor([5])
    onehot = covidgan.one_hot(labels, 4)
    for draw in range(80):
        torch.manual_seed(draw)
        loss = method.redrawn(onehot, method.g(onehot, "joint", seed)[0], seed).item()
        assert low - 1e-6 <= loss <= high + 1e-6


def test_initial_weights_are_normal_with_deviation_0_02_and_zero_bias(tiny):
    nets = covidgan.build(Covidgan, tiny(ngf=16, ndf=16))
    big = []
    for name, weight in nets.named_parameters():
        if ".net." in name:  # weighting nets have PyTorch's own start
            continue
        assert weight.dim() == 4 or not weight.any(), name
        big += [weight.flatten()] if weight.numel() > 30_000 else []
    assert len(big) > 5
    for weight in big:
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weight.mean().item()) < 4 * 0.02 / len(weight) ** 0.5
        assert (weight.abs() < 0.02).float().mean().item() == pytest.approx(0.6827, abs=0.015)


# ---- DESUM


def test_alpha_is_one_number_an_image_and_starts_at_a_half_as_beta_does(tiny, nets, toy):
    alpha = nets.g(maps_of(toy, 5), "joint")[1].tolist()
    assert len({*alpha}) == 5 and all(0 < a < 1 for a in alpha)
    fresh = covidgan.build(Covidgan, tiny())
    assert fresh.g(maps_of(toy, 4), "joint")[1].tolist() == [0.5] * 4
    assert fresh.dfm.net(torch.randn(3, 32, 9, 9)).tolist() == [0.5] * 3


def test_desum_is_eq_1():
    desum = covidgan.Desum(2, "learned")
    nn.init.constant_(desum.net.fc[-1].bias, np.log(0.8 / 0.2))  # sigmoid of it is 0.8
    out, alpha = desum(torch.full((1, 2, 8, 8), 3.0), torch.full((1, 2, 8, 8), -2.0))
    assert alpha.item() == pytest.approx(0.8)
    assert out.flatten().tolist() == pytest.approx([0.8 * 3 + 0.2 * -2] * 128)


def test_with_alpha_1_the_joint_image_is_g2s_own_and_with_0_it_rests_on_g1(nets, toy):
    onehot, bias = maps_of(toy, 2), nets.g.desums[0].net.fc[-1].bias
    nn.init.constant_(bias, 1e4)
    assert torch.equal(nets.g(onehot, "joint")[0], nets.g(onehot, "g2")[0])
    nn.init.constant_(bias, -1e4)
    before, _ = nets.g(onehot, "joint")
    nn.init.normal_(nets.g.locals[0].down[1].weight)  # G2's way down no longer counts
    assert torch.equal(before, nets.g(onehot, "joint")[0])


def test_plain_sum_is_twice_the_fixed_one():
    local, global_ = torch.randn(2, 2, 3, 4, 4)
    fixed, alpha = covidgan.Desum(3, "fixed")(local, global_)
    assert torch.allclose(fixed, local / 2 + global_ / 2) and alpha.tolist() == [0.5, 0.5]
    assert torch.equal(covidgan.Desum(3, "sum")(local, global_)[0], 2 * fixed)


@pytest.mark.parametrize(("kind", "decides"), [("learned", 0), ("global", 1)])
def test_alpha_is_drawn_from_the_features_its_kind_names(kind, decides):
    desum = covidgan.Desum(8, kind)
    off_its_start(desum.net)
    features = [torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2)]  # local, global
    reached = torch.autograd.grad(desum(*features)[1].sum(), features, allow_unused=True)
    assert reached[decides].any() and reached[1 - decides] is None


def test_weighting_net_has_three_convolutions_and_two_connected_layers_and_sees_the_strength_of_features():
    """A norm layer before the pooling would give both images one weight."""
    net = off_its_start(covidgan.WeightingNet(8, 8))
    kinds = [type(module) for module in net.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.Linear)) == (3, 2)
    features = torch.randn(1, 8, 32, 32)
    weak, strong = net(torch.cat([features, 5 * features + 1])).tolist()
    assert abs(weak - strong) > 0.02
