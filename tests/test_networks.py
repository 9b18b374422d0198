"""Generators, discriminators and weighting nets against the paper's sizes and float64 references."""

import numpy as np
import pytest
import torch
from torch import nn

import covidgan
from covidgan import Covidgan


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def maps_of(toy, n, n_labels=4):
    """One-hot maps [n, n_labels, S, S] of the toy's first slices that have lesions."""
    names = [name for name in toy.train if not name.endswith("S001")][:n]
    labels = torch.from_numpy(np.stack([toy.labels[name] for name in names]))[:, None]
    return covidgan.one_hot(labels, n_labels)


@pytest.fixture(scope="module")
def paper_size():
    """The networks of the paper's widths, without memory."""
    with torch.device("meta"):
        return covidgan.build(Covidgan, covidgan.Config())


@pytest.fixture
def nets(tiny):
    return covidgan.build(Covidgan, tiny())


def train_mock(net):
    """Take a weighting net off its start, as training would."""
    torch.manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


@pytest.fixture
def trained(nets):
    """Networks whose weighting nets are off their start."""
    train_mock(nets.g.desums[0].net)
    return nets


# ---- the paper's widths


def test_parameter_counts_are_those_of_the_papers_widths(paper_size):
    g1, g2 = paper_size.g.g1, paper_size.g.locals
    assert count(g1) == 45_590_209
    assert count(g1.trunk, g2) == 45_853_473
    assert count(paper_size.g.desums) == 112_897
    assert count(paper_size.dfm) == 223_489
    assert [count(scale) for scale in paper_size.d.scales] == [2_766_785] * 2


@pytest.mark.parametrize(("side", "decisions"), [(512, 67), (256, 35)])
def test_discriminator_decides_on_a_matrix_of_patches(paper_size, side, decisions):
    pair = torch.empty(1, 5, side, side, device="meta")
    features = paper_size.d.scales[0](pair)
    assert features[-1].shape == (1, 1, decisions, decisions)
    assert [f.shape[1] for f in features] == [64, 128, 256, 512, 1]


def test_generator_gives_512_pixels_and_g1_alone_256_at_the_papers_size(paper_size):
    onehot = torch.empty(1, 4, 512, 512, device="meta")
    assert paper_size.g(onehot, "joint")[0].shape == (1, 1, 512, 512)
    assert paper_size.g(onehot, "g1")[0].shape == (1, 1, 256, 256)


def test_discriminators_second_scale_sees_half_the_size(paper_size):
    onehot, image = torch.empty(1, 4, 512, 512, device="meta"), torch.empty(1, 1, 512, 512, device="meta")
    judged = paper_size.d(onehot, image)
    assert [features[-1].shape[-1] for features in judged] == [67, 35]


def test_one_decision_sees_70_by_70_pixels():
    torch.manual_seed(0)
    net = covidgan.PatchGAN(5, 4).double()
    for block in net.blocks[:-1]:  # instance norm sees the whole image: leave it out
        for k, layer in enumerate(block):
            if isinstance(layer, nn.InstanceNorm2d):
                block[k] = nn.Identity()
    pair = torch.randn(1, 5, 200, 200, dtype=torch.float64, requires_grad=True)
    decisions = net(pair)[-1]
    middle = decisions.shape[-1] // 2
    decisions[0, 0, middle, middle].backward()
    seen = pair.grad.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70
    assert columns[-1] - columns[0] + 1 == 70
    assert seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


# ---- shapes and variants


@pytest.mark.parametrize(("stage", "side"), [("g1", 32), ("g2", 64), ("joint", 64)])
def test_image_of_each_stage_has_its_size_and_range(nets, toy, stage, side):
    image, alpha = nets.g(maps_of(toy, 3), stage)
    assert image.shape == (3, 1, side, side)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    assert alpha.shape == (3,)


VARIANTS = [
    dict(n_gen=1),
    dict(n_gen=3),
    dict(n_dis=1),
    dict(n_dis=3),
    dict(upsample="resize"),
    dict(n_gen=3, n_dis=3, dfm="d2"),
    dict(n_gen=1, n_dis=1, gan="hinge"),
    dict(desum="global", beta_policy="entropy", gan="lsgan"),
    dict(desum="fixed", dfm="fixed"),
    dict(desum="sum", dfm="off"),
    dict(n_labels=6),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_trains_a_step_in_each_of_its_stages(tiny, variant):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, **variant))
    for stage in trainer.stages:
        trainer.begin(stage)
        moving = [p for player in trainer.players.values() if player.loss == "g" for p in player.parameters]
        before = [p.detach().clone() for p in moving]
        figures = trainer.step()
        assert all(np.isfinite(value) for value in figures.values())
        assert any(not torch.equal(b, a) for b, a in zip(before, moving, strict=True))


@pytest.mark.parametrize(("n_gen", "side"), [(1, 64), (2, 32), (3, 16)])
def test_each_more_generator_halves_the_size_of_g1(tiny, toy, n_gen, side):
    net = covidgan.Generator(tiny(n_gen=n_gen))
    assert net(maps_of(toy, 1), "g1")[0].shape[-1] == side
    assert net(maps_of(toy, 1), "joint")[0].shape[-1] == 64


def test_g1_at_reduced_size_sees_a_map_of_labels(nets, toy):
    seen = []
    nets.g.g1.trunk.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    for stage in ("g1", "joint"):
        nets.g(maps_of(toy, 2), stage)
    assert torch.equal(seen[0], seen[1])
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}
    assert (seen[0].sum(1) == 1).all()


def test_one_hot_marks_each_pixels_label():
    labels = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8)
    assert torch.equal(covidgan.one_hot(labels, 4).flatten(2)[0], torch.eye(4))


# ---- norm and start


def reference_norm(x):
    x = x.astype(np.float64)
    centred = x - x.mean((2, 3), keepdims=True)
    return centred / np.sqrt(x.var((2, 3), keepdims=True) + 1e-5)


def test_instance_norm_agrees_with_float64():
    torch.manual_seed(1)
    x = torch.randn(3, 5, 17, 13) * torch.tensor([0.01, 1.0, 30.0]).view(3, 1, 1, 1) + 2
    got = covidgan.ChannelsLastNorm()(x).numpy()
    assert np.abs(got - reference_norm(x.numpy())).max() < 2e-4


def test_instance_norm_keeps_fp32_accurate_where_a_map_makes_features_constant():
    x = torch.full((1, 1, 512, 512), 0.7321)  # sums of equal numbers round all to one side
    x[..., 200:260, 200:260] = 1.9
    got = covidgan.ChannelsLastNorm()(x).numpy()
    assert np.abs(got - reference_norm(x.numpy())).max() < 1e-4


def test_instance_norm_in_bfloat16_keeps_values_gradients_and_layout():
    torch.manual_seed(1)
    x = (3 * torch.randn(3, 32, 17, 13) + 1).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    y = covidgan.ChannelsLastNorm()(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(y.detach().double().numpy() - reference_norm(x.detach().double().numpy())).max() < 0.03
    weights = torch.randn(y.shape)
    (y.float() * weights).sum().backward()
    exact = x.detach().double().requires_grad_()
    (torch.nn.functional.instance_norm(exact) * weights).sum().backward()
    assert (x.grad.double() - exact.grad).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_treats_each_image_alone(dtype):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8).to(dtype)
    together = covidgan.ChannelsLastNorm()(x)
    assert torch.equal(together[2:3], covidgan.ChannelsLastNorm()(x[2:3]))
    assert torch.equal(covidgan.ChannelsLastNorm().eval()(x), together)


def test_instance_norm_of_a_flat_image_is_zero():
    x = torch.tensor([-1.0, 0.0, 0.3]).view(1, 3, 1, 1).expand(1, 3, 16, 16).clone().requires_grad_()
    y = covidgan.ChannelsLastNorm()(x)
    y.square().sum().backward()
    assert y.abs().max() < 1e-3
    assert x.grad.isfinite().all()


def test_initial_weights_are_normal_with_deviation_0_02_and_zero_bias(tiny):
    nets = covidgan.build(Covidgan, tiny(ngf=16, ndf=16, n_blocks=2))
    for name in ("g", "d"):
        plain = [m for m in getattr(nets, name).modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        weighting = [
            m for net in getattr(nets, name).modules() if isinstance(net, covidgan.WeightingNet) for m in net.modules()
        ]
        plain = [m for m in plain if not any(m is other for other in weighting)]
        assert all((m.bias == 0).all() for m in plain)
        big = [m.weight.flatten() for m in plain if m.weight.numel() > 30_000]
        assert big
        for weight in big:
            assert weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert abs(weight.mean().item()) < 4 * 0.02 / len(weight) ** 0.5
            assert (weight.abs() < 0.02).float().mean().item() == pytest.approx(0.6827, abs=0.015)


def test_the_same_seed_gives_the_same_weights(tiny):
    a, b, c = (covidgan.build(Covidgan, tiny(seed=seed)).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[key], b[key]) for key in a)
    weights = [key for key in a if a[key].dim() == 4]
    assert not any(torch.equal(a[key], c[key]) for key in weights)


def test_building_networks_leaves_the_global_generator_alone(tiny):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    covidgan.build(Covidgan, tiny())
    assert torch.equal(before, torch.get_rng_state())


# ---- DESUM


def test_alpha_and_beta_start_at_a_half_for_every_image(nets, toy):
    _, alpha = nets.g(maps_of(toy, 4), "joint")
    assert alpha.tolist() == [0.5] * 4
    weight = nets.dfm.net(torch.randn(3, 32, 9, 9))
    assert weight.tolist() == [0.5] * 3


def test_alpha_is_one_number_an_image_between_0_and_1(trained, toy):
    _, alpha = trained.g(maps_of(toy, 5), "joint")
    assert alpha.shape == (5,)
    assert ((alpha > 0) & (alpha < 1)).all()
    assert len(set(alpha.tolist())) == 5


def test_desum_weighs_local_by_alpha_and_global_by_the_rest():
    sum_ = covidgan.Desum(2, "learned")
    nn.init.constant_(sum_.net.fc[-1].bias, np.log(0.8 / 0.2))  # sigmoid of it is 0.8
    out, alpha = sum_(torch.full((1, 2, 8, 8), 3.0), torch.full((1, 2, 8, 8), -2.0))
    assert alpha.item() == pytest.approx(0.8)
    assert out.mean().item() == pytest.approx(0.8 * 3 + 0.2 * -2, rel=1e-6)


def test_with_alpha_1_the_joint_image_is_g2s_own(trained, toy):
    onehot = maps_of(toy, 2)
    nn.init.constant_(trained.g.desums[0].net.fc[-1].bias, 1e4)
    joint, alpha = trained.g(onehot, "joint")
    assert alpha.tolist() == [1.0, 1.0]
    assert torch.equal(joint, trained.g(onehot, "g2")[0])


def test_with_alpha_0_the_joint_image_rests_on_g1(trained, toy):
    onehot = maps_of(toy, 2)
    nn.init.constant_(trained.g.desums[0].net.fc[-1].bias, -1e4)
    before, _ = trained.g(onehot, "joint")
    nn.init.normal_(trained.g.locals[0].down[1].weight)  # G2's way down no longer counts
    assert torch.equal(before, trained.g(onehot, "joint")[0])


def test_plain_sum_is_twice_the_fixed_one():
    torch.manual_seed(2)
    local, global_ = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    fixed, alpha = covidgan.Desum(3, "fixed")(local, global_)
    assert torch.equal(covidgan.Desum(3, "sum")(local, global_)[0], 2 * fixed)
    assert torch.allclose(fixed, local / 2 + global_ / 2)
    assert alpha.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("kind", "decides"), [("learned", "local"), ("global", "global")])
def test_alpha_is_drawn_from_the_features_its_kind_names(kind, decides):
    torch.manual_seed(2)
    desum = covidgan.Desum(8, kind)
    train_mock(desum.net)
    local, global_ = torch.randn(2, 8, 16, 16, requires_grad=True), torch.randn(2, 8, 16, 16, requires_grad=True)
    _, alpha = desum(local, global_)
    of_local, of_global = torch.autograd.grad(alpha.sum(), (local, global_), allow_unused=True)
    assert (of_local is not None and of_local.abs().sum() > 0) == (decides == "local")
    assert (of_global is not None and of_global.abs().sum() > 0) == (decides == "global")


def test_weighting_net_sees_the_strength_of_features():
    """A norm layer before the pooling would give both images one weight."""
    net = train_mock(covidgan.WeightingNet(8, 8))
    features = torch.randn(1, 8, 32, 32)
    weak, strong = net(torch.cat([features, 5 * features + 1])).tolist()
    assert abs(weak - strong) > 0.02


def test_weighting_net_has_three_convolutions_and_two_connected_layers_and_no_norm():
    kinds = [type(m) for m in covidgan.WeightingNet(64, 64).modules()]
    assert kinds.count(nn.Conv2d) == 3
    assert kinds.count(nn.Linear) == 2
    assert set(kinds) == {covidgan.WeightingNet, nn.Sequential, nn.Conv2d, nn.ReLU, nn.Linear}


def test_residual_block_adds_its_input():
    block = covidgan.ResidualBlock(4)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_a_third_generator_lies_between_with_twice_the_channels_of_g2(tiny):
    g = covidgan.outline(Covidgan, covidgan.Config(n_gen=3)).g
    assert [local.down[1].out_channels for local in g.locals] == [64, 32]
    assert g.g1.trunk[1].out_channels == 128
    two = covidgan.outline(Covidgan, covidgan.Config()).g
    assert ([local.down[1].out_channels for local in two.locals], two.g1.trunk[1].out_channels) == ([32], 64)
