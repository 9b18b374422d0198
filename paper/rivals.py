"""The four methods that the paper compares with (§IV-B, Tables II and III), in covidgan.py's loop.

    python -m paper.rivals pix2pix --data data/radiopaedia --size 128           # or pix2pixHD, SPADE, SEAN; preset demo
    python -m paper.rivals SPADE --data data/radiopaedia --preset paper --out out/SPADE
    python export.py out/SPADE                                                  # and everything else as for covidgan

Theirs are the networks, losses and optimiser settings, from their papers and public code, written anew:
    pix2pix     Isola, Zhu, Zhou, Efros, CVPR 2017              UNet; L1
    pix2pixHD   Wang et al., CVPR 2018                          HDGenerator; LSGAN on two scales, feature matching
    SPADE       Park, Liu, Wang, Zhu, CVPR 2019                 SpadeGenerator, SpadeNorm; hinge
    SEAN        Zhu, Abdal, Qin, Wonka, CVPR 2020               SeanGenerator, AceNorm, StyleEncoder
Data, augmentation, what D sees (--contrast), schedule, average of the weights, checkpoints and pictures are the
loop's. So is its order: one synthesis per step, from which all losses are computed before any player moves.

The VGG loss of pix2pixHD, SPADE and SEAN is left out: its network is a download, knows no CT, and would help three
methods alone. So are instance edges, since a label map has no instances. With --steer all networks see the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import covidgan
from covidgan import Mistake, Player, ResidualBlock, down, gan_losses, head, stem, up

Adam = tuple[float, tuple[float, float]]  # learning rate, betas
Normed = Callable[[nn.Conv2d], list[nn.Module]]  # a convolution to itself, possibly changed, and a norm


@dataclass(frozen=True)
class RivalConfig(covidgan.LoopConfig):
    """A rival's knobs besides the loop's; defaults are as published. Divide both widths alike to shrink a rival."""

    ngf: int = 64  # channels of the generator's finest layer; all its other widths are multiples of it
    ndf: int = 64  # channels of a discriminator's first layer
    optimiser: Literal["own", "paper"] = "own"  # Adam as its authors set it | as the paper: --lr, --adam-beta1, -beta2


@dataclass(frozen=True)
class MatchingConfig(RivalConfig):
    """Knobs of the rivals whose G matches D's features, all of them as published."""

    lambda_fm: float = 10.0  # weight of D's feature matching


PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(noise=0.01, contrast=0.0, ema=0.0, optimiser="paper"),
    "demo": dict(size=128, ngf=16, ndf=16, batch=4, epochs=2, epoch_len=1600, interval=200),
    "tiny": dict(data=f"{covidgan.PHANTOM}64", size=64, ngf=8, ndf=8, batch=4, epochs=1, epoch_len=80, interval=10),
}


class Rival(covidgan.Method):
    """A generator `g` against a discriminator `d` in one stage; see the subclasses for what they are."""

    presets = PRESETS
    own: ClassVar[dict[str, Adam]]  # its authors' Adam for each player
    curves = (("d", "gan"), ("fm",))
    factor: ClassVar[int]  # what sides of a map must be multiples of
    g: nn.Module
    d: nn.Module

    @classmethod
    def stages(cls, c: RivalConfig) -> dict[str, float]:
        return {"whole": 1.0}

    @classmethod
    def multiple(cls, c: RivalConfig) -> int:
        return cls.factor

    def players(self, stage: str) -> dict[str, Player]:
        """G and D, each with its authors' Adam or the paper's."""
        players = {"d": Player.of(self.c, "d", [self.d]), "g": Player.of(self.c, "g", [self.g])}
        if self.c.optimiser == "own":
            for name, (lr, betas) in self.own.items():
                players[name] = players[name]._replace(lr=lr, betas=betas)
        return players

    def generator(self) -> nn.Module:
        return self.g  # which has no alpha and returns 1


def no_alpha(onehot: Tensor) -> Tensor:
    """The alpha [B] of a generator without DESUM: 1."""
    return onehot.new_ones(onehot.shape[:1], dtype=torch.float32)


class Patches(nn.Module):
    """PatchGAN: 4x4 convolutions, the last of which outputs a matrix of decisions.

    The first and the last have a bias and no norm; `normed` gives the layers, norm included, for each one in between.
    """

    def __init__(self, c_in: int, ndf: int, strides: tuple[int, ...], padding: int, normed: Normed) -> None:
        super().__init__()
        channels = [c_in, *[ndf * 2**k for k in range(len(strides))]]
        blocks = []
        for k, ((a, b), stride) in enumerate(zip(pairwise(channels), strides, strict=True)):
            conv = nn.Conv2d(a, b, 4, stride, padding, bias=k == 0)
            blocks.append(nn.Sequential(*(normed(conv) if k else [conv]), nn.LeakyReLU(0.2)))
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(channels[-1], 1, 4, 1, padding)])

    def forward(self, x: Tensor) -> list[Tensor]:  # [B, c_in, H, W]
        """Every block's output; the last, [B, 1, h, w], is the matrix of decisions, as logits."""
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features


class Scales(nn.Module):
    """Discriminators of one kind, each at half the size of the one before (pix2pixHD §3.2)."""

    def __init__(self, scales: list[nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scales)

    def forward(self, onehot: Tensor, image: Tensor) -> list[list[Tensor]]:
        """Features of each scale for image [B, 1, H, W] and its map [B, channels, H, W]."""
        pair, judged = torch.cat([onehot, image], 1), []
        for scale in self.scales:
            judged.append(scale(pair))
            pair = F.avg_pool2d(pair, 3, 2, 1, count_include_pad=False)
        return judged


def feature_matching(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Mean L1 distance of each feature map but the last, summed over the maps, averaged over the scales."""
    pairs = [pair for r, f in zip(real, fake, strict=True) for pair in zip(r[:-1], f[:-1], strict=True)]
    return sum((r.detach() - f).abs().mean(dtype=torch.float32) for r, f in pairs) / len(real)


@torch.no_grad()
def start(layer: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Draw a layer's weight and set its bias to zero, for nn.Module.apply; not under spectral norm: see `spectral`."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and not parametrize.is_parametrized(layer):
        draw(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


normal = partial(nn.init.normal_, mean=0.0, std=0.02)  # pix2pix, pix2pixHD
xavier = partial(nn.init.xavier_normal_, gain=0.02)  # SPADE, SEAN


@dataclass(frozen=True)
class Pix2pixConfig(RivalConfig):
    """pix2pix. Its U-Net's halvings follow from --size: see Pix2pix.levels."""

    lambda_l1: float = 100.0


class OneImageNorm(nn.InstanceNorm2d):
    """Batch norm as pix2pix's authors train and test it, on batches of one: each image by its own statistics."""

    def __init__(self, c: int) -> None:
        super().__init__(c, affine=True)
        nn.init.normal_(self.weight, 1.0, 0.02)


class UNet(nn.Module):
    """The generator `unet_256`, every skip concatenated. Dropout is off in synthesis, where its authors keep it on."""

    def __init__(self, channels: int, ngf: int, levels: int) -> None:
        super().__init__()
        widths = [ngf * min(2**k, 8) for k in range(levels)]  # 64, 128, 256, 512, 512, ...
        self.downs = nn.ModuleList([nn.Conv2d(channels, ngf, 4, 2, 1, bias=False)])
        for k, (a, b) in enumerate(pairwise(widths), start=2):
            norm = [OneImageNorm(b)] if k < levels else []
            self.downs.append(nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(a, b, 4, 2, 1, bias=False), *norm))
        self.ups = nn.ModuleList()
        for k, (b, a) in enumerate(pairwise(widths[::-1])):
            grow = nn.ConvTranspose2d(2 * b if k else b, a, 4, 2, 1, bias=False)
            dropout = [nn.Dropout(0.5)] if k and a == 8 * ngf else []  # as in the public PyTorch code
            self.ups.append(nn.Sequential(nn.ReLU(), grow, OneImageNorm(a), *dropout))
        self.head = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * ngf, 1, 4, 2, 1), nn.Tanh())

    def forward(self, onehot: Tensor) -> tuple[Tensor, Tensor]:  # [B, channels, H, W]
        """Image [B, 1, H, W] in [-1, 1], and alpha [B]; H and W are multiples of 2^levels."""
        skips = [onehot]
        for layer in self.downs:
            skips.append(layer(skips[-1]))
        x = skips.pop()
        for layer in self.ups:
            x = torch.cat([skips.pop(), layer(x)], 1)
        return self.head(x).float(), no_alpha(onehot)


class Pix2pix(Rival):
    """pix2pix (`--model pix2pix` of its authors): U-Net against one PatchGAN of 70 x 70 pixels; log loss and L1."""

    name, options = "pix2pix", Pix2pixConfig
    own: ClassVar = dict.fromkeys("dg", (2e-4, (0.5, 0.999)))
    curves = (("d", "gan"), ("l1",))

    def __init__(self, c: Pix2pixConfig) -> None:
        super().__init__(c)
        self.g = UNet(c.channels, c.ngf, self.levels(c))
        strides, padding = (2, 2, 2, 1), 1
        patches = Patches(c.channels + 1, c.ndf, strides, padding, lambda conv: [conv, OneImageNorm(conv.out_channels)])
        self.d = Scales([patches])
        self.apply(partial(start, draw=normal))

    @classmethod
    def levels(cls, c: Pix2pixConfig) -> int:
        """Halvings: the published 8 at 512 pixels and one fewer with each halving of --size, down to 2 x 2 pixels."""
        half = c.size // 2
        return min(8, (half & -half).bit_length() - 1)

    @classmethod
    def multiple(cls, c: Pix2pixConfig) -> int:
        """256 at 512 pixels; four levels want 32 at least."""
        return 2 ** max(5, cls.levels(c))

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """D: half of real and fake; G: log loss and 100 L1 of what D sees, with --contrast the lung alone."""
        image, target = (self.seen_by_d(x, onehot) for x in (self.g(onehot)[0], target))
        d, gan = gan_losses(self.d(onehot, target), self.d(onehot, image), "bce")
        l1 = F.l1_loss(image, target) / (self.c.contrast or 1)
        return {"d": d, "g": gan + self.c.lambda_l1 * l1, "gan": gan, "l1": l1}


@dataclass(frozen=True)
class Pix2pixHDConfig(MatchingConfig):
    """pix2pixHD with only its global generator: `--netG global`, trained at one size."""

    n_blocks: int = 9


class HDGenerator(nn.Module):
    """pix2pixHD's G1 (its §3.1) with its option's four halvings; covidgan's G1 has the class default of three."""

    def __init__(self, channels: int, ngf: int, n_blocks: int) -> None:
        super().__init__()
        widths = [ngf * 2**k for k in range(5)]
        layers = stem(channels, ngf)
        for c in widths[:-1]:
            layers += down(c)
        layers += [ResidualBlock(widths[-1]) for _ in range(n_blocks)]
        for c in widths[:0:-1]:
            layers += up(c)
        self.layers = nn.Sequential(*layers, *head(ngf))

    def forward(self, onehot: Tensor) -> tuple[Tensor, Tensor]:  # [B, channels, H, W]
        """Image [B, 1, H, W] in [-1, 1], and alpha [B]; H and W are multiples of 16."""
        return self.layers(onehot).float(), no_alpha(onehot)


class Matching(Rival):
    """A rival whose G matches features of D."""

    def generator_losses(self, gan: Tensor, real: list[list[Tensor]], fake: list[list[Tensor]]) -> dict[str, Tensor]:
        """G's loss and its parts, from its side of the game and D's features."""
        fm = feature_matching(real, fake)
        return {"g": gan + self.c.lambda_fm * fm, "gan": gan, "fm": fm}


class Pix2pixHD(Matching):
    """pix2pixHD: global generator against two scales of covidgan's own PatchGAN; LSGAN and feature matching."""

    name, options = "pix2pixHD", Pix2pixHDConfig
    own: ClassVar = dict.fromkeys("dg", (2e-4, (0.5, 0.999)))
    factor = 16

    def __init__(self, c: Pix2pixHDConfig) -> None:
        super().__init__(c)
        self.g = HDGenerator(c.channels, c.ngf, c.n_blocks)
        self.d = Scales([covidgan.PatchGAN(c.channels + 1, c.ndf) for _ in range(2)])
        self.apply(partial(start, draw=normal))

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """Least squares summed over the scales, D's halved; G's as `generator_losses` has it."""
        image = self.g(onehot)[0]
        real, fake = (self.d(onehot, self.seen_by_d(x, onehot)) for x in (target, image))
        d, gan = gan_losses(real, fake, "lsgan")
        return {"d": d, **self.generator_losses(gan, real, fake)}


def conv3(c_in: int, c_out: int, **more: Any) -> nn.Conv2d:
    """3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, **more)


class SpectralNorm(nn.Module):
    """A weight over its largest singular value (Miyato et al., ICLR 2018), by one power iteration per pass in training.

    PyTorch's own keeps both singular vectors in the state dict and trusts them. In an average of weights (--ema) they
    are averages too, no longer of unit length nor of that weight, and the norm is off by up to a half (measured). This
    one only starts from them, and iterates further to synthesize.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", torch.randn(len(weight)))
        self.u.copy_(self.vectors(weight)[0])

    @torch.no_grad()
    def vectors(self, weight: Tensor, iterations: int = 15) -> tuple[Tensor, Tensor]:
        """Left and right singular vector of the largest singular value."""
        matrix, u = weight.flatten(1), self.u
        for _ in range(iterations):
            v = F.normalize((matrix.T @ u).to(weight.dtype), dim=0)
            u = F.normalize((matrix @ v).to(weight.dtype), dim=0)
        return u, v

    def forward(self, weight: Tensor) -> Tensor:  # [c_out, c_in, k, k]
        """The weight over its largest singular value."""
        u, v = self.vectors(weight, 1 if self.training else 15)
        if self.training:
            self.u.copy_(u)
        return weight / ((weight.flatten(1) * v).sum(1) * u).sum()  # autocast would round a matrix product to bfloat16


def spectral(conv: nn.Conv2d) -> nn.Conv2d:
    """Spectral norm on a convolution; its weight is drawn here, since it cannot be drawn later (see `start`)."""
    start(conv, xavier)
    parametrize.register_parametrization(conv, "weight", SpectralNorm(conv.weight.detach()))
    return conv


class SpadeNorm(nn.Module):
    """Spatially adaptive normalisation (SPADE Eq. 1, Fig. 2): batch norm whose scale and shift the map paints."""

    def __init__(self, c: int, channels: int, ngf: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c, affine=False)  # in synthesis, with statistics collected in training
        self.shared = nn.Sequential(conv3(channels, 2 * ngf), nn.ReLU())
        self.gamma, self.beta = conv3(2 * ngf, c), conv3(2 * ngf, c)

    def modulation(self, onehot: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor]:  # [B, channels, H, W]
        """Gamma and beta [B, c, H, W] of every pixel; only SEAN uses style codes."""
        hidden = self.shared(onehot)
        return self.gamma(hidden), self.beta(hidden)

    def forward(self, x: Tensor, onehot: Tensor, codes: Tensor | None) -> Tensor:  # [B, c, H, W], [B, channels, H, W]
        """Normalise x and modulate it."""
        gamma, beta = self.modulation(onehot, codes)
        return self.norm(x) * (1 + gamma) + beta


class SpadeBlock(nn.Module):
    """Residual block (SPADE Fig. 4): twice norm, leaky ReLU and convolution; where channels change, a shortcut too."""

    def __init__(self, c_in: int, c_out: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        c = min(c_in, c_out)
        self.norms = nn.ModuleList([norm(c_in), norm(c)])
        self.convs = nn.ModuleList([spectral(conv3(c_in, c)), spectral(conv3(c, c_out))])
        self.changes = c_in != c_out
        if self.changes:
            self.shortcut_norm, self.shortcut = norm(c_in), spectral(nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor, onehot: Tensor, codes: Tensor | None) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H, W]
        """x, or its shortcut, plus what the body makes of it."""
        short = self.shortcut(self.shortcut_norm(x, onehot, codes)) if self.changes else x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(F.leaky_relu(norm(x, onehot, codes), 0.2))
        return short + x


class SpadeGenerator(nn.Module):
    """SPADE's generator `normal`: a map of 1/32 of the size becomes features, which seven blocks bring to full size.

    `norm(c, k)` makes a norm of c channels for block k. The published one always outputs its training size.
    """

    STRIDES = (32, 16, 16, 8, 4, 2, 1)  # the map's size over a block's
    WIDTHS = (16, 16, 16, 16, 8, 4, 2, 1)  # channels between the blocks, over ngf

    def __init__(self, channels: int, ngf: int, norm: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        widths = [ngf * w for w in self.WIDTHS]
        self.first = conv3(channels, widths[0])
        blocks = [SpadeBlock(a, b, partial(norm, k=k)) for k, (a, b) in enumerate(pairwise(widths))]
        self.blocks = nn.ModuleList(blocks)
        self.head = conv3(ngf, 1)

    def forward(self, onehot: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [B, channels, H, W]
        """Image [B, 1, H, W] in [-1, 1], and alpha [B]; H and W are multiples of 32."""
        x, before = self.first(onehot[..., ::32, ::32]), 32
        for stride, block in zip(self.STRIDES, self.blocks, strict=True):
            if stride < before:
                x, before = F.interpolate(x, scale_factor=2), stride
            x = block(x, onehot[..., ::stride, ::stride], codes)
        return self.head(F.leaky_relu(x, 0.2)).tanh().float(), no_alpha(onehot)


def spectral_patches(c_in: int, ndf: int, strides: tuple[int, ...]) -> Scales:
    """SPADE's and SEAN's discriminators on two scales, with both spectral norm and instance norm."""

    def normed(conv: nn.Conv2d) -> list[nn.Module]:
        return [spectral(conv), nn.InstanceNorm2d(conv.out_channels)]

    return Scales([Patches(c_in, ndf, strides, 2, normed) for _ in range(2)])


class Spade(Matching):
    """SPADE without its image encoder; hinge loss and feature matching; D's rate is four times G's."""

    name, options, factor = "SPADE", MatchingConfig, 32
    alone = True  # for its batch norm, and SEAN's codes
    own: ClassVar = {"d": (4e-4, (0.0, 0.9)), "g": (1e-4, (0.0, 0.9))}

    def __init__(self, c: MatchingConfig) -> None:
        super().__init__(c)
        self.g, self.d = self.networks(c)
        self.apply(partial(start, draw=xavier))

    @classmethod
    def networks(cls, c: MatchingConfig) -> tuple[nn.Module, nn.Module]:
        """Generator and discriminators."""
        g = SpadeGenerator(c.channels, c.ngf, lambda width, k: SpadeNorm(width, c.channels, c.ngf))
        return g, spectral_patches(c.channels + 1, c.ndf, (2, 2, 2, 1))

    def image(self, onehot: Tensor, target: Tensor) -> Tensor:
        """The synthesis of a training step [B, 1, H, W]."""
        return self.g(onehot)[0]

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """Hinge averaged over the scales, D's not halved; G's as `generator_losses` has it."""
        image = self.image(onehot, target)
        real, fake = (self.d(onehot, self.seen_by_d(x, onehot)) for x in (target, image))
        d, gan = (loss / len(real) for loss in gan_losses(real, fake, "hinge"))
        return {"d": 2 * d, **self.generator_losses(gan, real, fake)}


class StyleEncoder(nn.Module):
    """Style encoder (SEAN §3.1): features of half the size, whose mean over a region is the region's style code."""

    def __init__(self, ngf: int) -> None:
        super().__init__()

        def block(conv: nn.Module) -> list[nn.Module]:
            return [conv, nn.InstanceNorm2d(conv.out_channels), nn.LeakyReLU(0.2)]

        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            *block(nn.Conv2d(1, ngf // 2, 3)),
            *block(nn.Conv2d(ngf // 2, ngf, 3, 2, 1)),
            *block(nn.Conv2d(ngf, 2 * ngf, 3, 2, 1)),
            *block(nn.ConvTranspose2d(2 * ngf, 4 * ngf, 3, 2, 1, output_padding=1)),
            nn.ReflectionPad2d(1),
            nn.Conv2d(4 * ngf, 8 * ngf, 3),
            nn.Tanh(),
        )

    def forward(self, image: Tensor, onehot: Tensor) -> tuple[Tensor, Tensor]:  # [B, 1, H, W], [B, n_labels, H, W]
        """Style codes [B, n_labels, 8 ngf], zero for regions absent from an image; which are present [B, n_labels]."""
        return region_means(self.layers(image), onehot[..., ::2, ::2])


def region_means(features: Tensor, onehot: Tensor) -> tuple[Tensor, Tensor]:  # [B, c, H, W], [B, n_labels, H, W]
    """Mean of the features over each region, [B, n_labels, c], zero where it is empty; and whether it is present."""
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 cannot count a region's pixels
        area = onehot.sum((2, 3))  # [B, n_labels]
        sums = torch.einsum("bkhw,bchw->bkc", onehot, features.float())
    return sums / area.clamp_min(1).unsqueeze(2), area > 0


class StylePath(nn.Module):
    """Gamma and beta from the regions' style codes: a linear layer of each region's own, and convolutions."""

    def __init__(self, c: int, n_labels: int, ngf: int) -> None:
        super().__init__()
        self.fcs = nn.ModuleList([nn.Linear(8 * ngf, 8 * ngf) for _ in range(n_labels)])
        self.gamma, self.beta = conv3(8 * ngf, c), conv3(8 * ngf, c)

    def kernels(self, codes: Tensor) -> list[Tensor]:  # [n, n_labels, 8 ngf] -> [n, c, n_labels, 3, 3] each
        """Kernels that give on a one-hot map what gamma's and beta's give on the map of its regions' codes.

        The map of codes is the matrix product of the one-hot map with the codes, and a convolution is linear: with the
        product moved into the kernels, what is convolved has 4 channels instead of 512.
        """
        codes = torch.stack([fc(codes[:, k]).relu() for k, fc in enumerate(self.fcs)], 1)
        return [torch.einsum("ocij,nkc->nokij", conv.weight, codes) for conv in (self.gamma, self.beta)]

    def forward(self, onehot: Tensor, codes: Tensor) -> list[Tensor]:  # [B, n_labels, H, W] -> [B, c, H, W] each
        """Gamma and beta of every pixel; codes are [B, n_labels, 8 ngf] or, for all images alike, [1, ...]."""
        n, painted = len(codes), []
        groups = onehot.reshape(-1, n * onehot.shape[1], *onehot.shape[2:])  # a group per image, or one for all
        for kernels, bias in zip(self.kernels(codes), (self.gamma.bias, self.beta.bias), strict=True):
            y = F.conv2d(groups, kernels.flatten(0, 1), bias.repeat(n), padding=1, groups=n)
            painted.append(y.reshape(len(onehot), -1, *y.shape[2:]))
        return painted


class FixedStyle(nn.Module):
    """A style path for one style: two convolutions of the one-hot map, and nothing else."""

    def __init__(self, path: StylePath, codes: Tensor) -> None:  # [1, n_labels, 8 ngf]
        super().__init__()
        self.kernels = nn.ParameterList([kernels[0] for kernels in path.kernels(codes)])
        self.biases = nn.ParameterList([path.gamma.bias, path.beta.bias])

    def forward(self, onehot: Tensor, codes: Tensor) -> list[Tensor]:  # [B, n_labels, H, W] -> [B, c, H, W] each
        """Gamma and beta of every pixel."""
        return [F.conv2d(onehot, k, b, padding=1) for k, b in zip(self.kernels, self.biases, strict=True)]


class AceNorm(SpadeNorm):
    """SEAN's normalisation (its Fig. 3): SPADE's with noise before it, in training, and with styles blended in."""

    def __init__(self, c: int, channels: int, n_labels: int, ngf: int, styled: bool) -> None:
        super().__init__(c, channels, ngf)
        self.noise = nn.Parameter(torch.zeros(c, 1, 1))
        self.styled = styled
        if styled:
            self.style = StylePath(c, n_labels, ngf)
            self.blend = nn.Parameter(torch.zeros(2))  # for gamma and for beta: sigmoid gives 0.5

    def modulation(self, onehot: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:  # [B, channels, H, W]
        """Gamma and beta [B, c, H, W] of every pixel; codes [B or 1, n_labels, 8 ngf]."""
        gamma, beta = super().modulation(onehot, codes)
        if self.styled:
            gamma_s, beta_s = self.style(onehot[:, : codes.shape[1]], codes)  # of labels, not of what else is told
            a, b = self.blend.sigmoid()
            gamma, beta = gamma + a * (gamma_s - gamma), beta + b * (beta_s - beta)
        return gamma, beta

    def forward(self, x: Tensor, onehot: Tensor, codes: Tensor) -> Tensor:  # [B, c, H, W], [B, channels, H, W]
        """Normalise x, in training with noise of one channel, and modulate it."""
        if self.training:
            x = x + torch.randn_like(x[:, :1]) * self.noise.to(x.dtype)  # or autocast would go on in float32
        return super().forward(x, onehot, codes)


class SeanGenerator(nn.Module):
    """SEAN's generator: SPADE's with AceNorm, a style encoder, and the training images' mean style.

    The mean is over the training images that have a region, weighting the latest most, since the encoder still learns.
    It is kept as sums and counts, so that their averages (--ema) still give a mean.
    """

    DECAY = 0.998  # per step

    def __init__(self, c: MatchingConfig) -> None:
        super().__init__()
        last = len(SpadeGenerator.STRIDES) - 1
        self.encoder = StyleEncoder(c.ngf)
        norm = lambda width, k: AceNorm(width, c.channels, c.n_labels, c.ngf, k < last)  # noqa: E731
        self.painter = SpadeGenerator(c.channels, c.ngf, norm)
        self.register_buffer("code_sums", torch.zeros(c.n_labels, 8 * c.ngf))
        self.register_buffer("code_counts", torch.zeros(c.n_labels, 1))

    def forward(self, onehot: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [B, channels, H, W]
        """Image [B, 1, H, W] in [-1, 1], and alpha [B]; codes [B, n_labels, 8 ngf], by default the mean's."""
        return self.painter(onehot, self.mean_codes() if codes is None else codes)

    @torch.no_grad()
    def fold(self, replace: Callable) -> None:
        """Fix the mean style, as export.py asks: a smaller file."""
        replace(self, StylePath, lambda path: FixedStyle(path, self.mean_codes()))

    def mean_codes(self) -> Tensor:
        """The training images' mean style [1, n_labels, 8 ngf], zero for a label that was never seen."""
        return (self.code_sums / self.code_counts.clamp_min(1e-6)).unsqueeze(0)

    @torch.no_grad()
    def remember(self, codes: Tensor, present: Tensor) -> None:  # [B, n_labels, 8 ngf], [B, n_labels]
        """Include the codes of a training step in the mean."""
        self.code_sums.mul_(self.DECAY).add_(codes.sum(0))
        self.code_counts.mul_(self.DECAY).add_(present.sum(0).unsqueeze(1))


class Sean(Spade):
    """SEAN: trained to rebuild a slice from its map and its own style; synthesizes in the training images' mean style.

    Its authors encode the very image to be synthesized, which has then seen the answer.
    """

    name = "SEAN"

    @classmethod
    def networks(cls, c: MatchingConfig) -> tuple[nn.Module, nn.Module]:
        """Generator with its encoder, and discriminators with one layer fewer, for patches of 46 x 46 pixels."""
        return SeanGenerator(c), spectral_patches(c.channels + 1, c.ndf, (2, 2, 2))

    def image(self, onehot: Tensor, target: Tensor) -> Tensor:
        """The synthesis of a training step [B, 1, H, W], in the style of its target."""
        codes, present = self.g.encoder(target, onehot[:, : self.c.n_labels])
        self.g.remember(codes, present)
        return self.g(onehot, codes)[0]


METHODS: dict[str, type[covidgan.Method]] = {method.name: method for method in (Pix2pix, Pix2pixHD, Spade, Sean)}


def main(argv: list[str]) -> None:
    """Train the rival that the first argument names, as the other arguments say."""
    if not argv or argv[0] not in METHODS:
        raise Mistake(f"{argv[0] if argv else 'nothing to train'}: give one of {', '.join(METHODS)} first")
    covidgan.main(argv[1:], METHODS[argv[0]])


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
