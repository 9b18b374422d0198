"""COVID-19 CT image synthesis with a conditional GAN (Jiang, Chen, Loew, Ko), in one file.

A label map of an axial chest CT slice goes in, a CT slice comes out. Research only, not for diagnosis.

    python covidgan.py --stage all                              # phantom data, preset demo: minutes on two CPU cores
    python covidgan.py --stage all --data data/radiopaedia --preset paper --out out/paper
    python covidgan.py --resume --out out/paper                 # go on where a stopped run left off
    python covidgan.py -h                                       # every knob

With the paper in hand:
    §IV-A   setting                     Config                  Eq. 3   L_cGAN          gan_losses
    Fig. 3  G1                          GlobalGenerator         Eq. 4   L_DFM, beta     Dfm
    Fig. 4  G2                          LocalGenerator          Eq. 2   objective       Covidgan.losses
    Eq. 1   DESUM, alpha                Desum                   Fig. 2  three stages    Covidgan.players
    Fig. 2  G                           Generator               Table I augmentation    augment
    Fig. 5  D1, D2, a PatchGAN each     Discriminators          Fig. 2  completion      write_panel
    §IV-A   learning rate               lr_at                   Fig. 1  labels, colours LABELS, COLOURS
Then come the data; the loop, which trains any Method; pictures; hardware-specific speed-ups; files; command line.
"""

import argparse
import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints
from unicodedata import normalize

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

# A further label is a name and a colour here and in data/slices.py, denser ones last, and --n-labels 5.
LABELS = ("background", "lung", "ground-glass opacity", "consolidation")
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0))  # Fig. 1: lung red, GGO blue, consolidation green
HU_OFFSET = 1024  # a stored pixel is HU + 1024, 0..4095
PARENCHYMA = -860  # HU of healthy lung between the vessels
LUNG_HU = (-1000, -400)  # must contain the mean of healthy lung
LOCAL = dict(data="", out="", device="auto", resume=False, init="")  # what no checkpoint holds
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
PHANTOM = "data/phantom"  # the built-in data; a missing folder whose name begins like this is generated

# -------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How any method is trained. Defaults are the paper's (§IV-A), but for noise, contrast, ema: see preset paper."""

    # run
    stage: str = "all"  # or only one of the method's stages
    preset: str = "demo"  # named overrides of the defaults below, see PRESETS; a resumed run keeps its own
    data: str = PHANTOM  # folder with images/ and maps/, and optionally split.json
    out: str = "out"  # folder for ckpt.pt, stats.jsonl, split.json, results.json, panels and curves
    resume: bool = False  # go on from OUT/ckpt.pt, with its config except for the options given
    init: str = ""  # start from the networks of this checkpoint, of the same options: smaller slices, or other data
    seed: int = 0
    interval: int = 250  # steps between checkpoints, panels and curves
    # data
    size: int = 512  # pixels per side of a slice; slices are resampled to it
    level: float = -600.0  # window level, HU: §IV-A's "[-600, 1500]" read as level and width, since as a range
    width: float = 1500.0  # it would make all healthy lung black. [-1350, 150] HU <-> [-1, 1]
    n_labels: int = 4  # labels in a map, including background
    unchecked: bool = False  # accept slices whose labels do not have the HU of lung and lesions
    # augmentation (Table I names the kinds; the ranges are ours); lengths in pixels of a 512-pixel slice
    resize: float = 1.117  # random resize by 1 to this, as pix2pix's 286 to 256 pixels, then random crop
    rotate: float = 10.0  # random rotation, +- degrees
    elastic: float = 2.0  # standard deviation, in pixels, of the elastic displacements drawn
    elastic_cell: float = 24.0  # spacing of the points they are drawn at; smooth in between
    noise: float = 0.0  # std of Gaussian noise on the image, as a share of the window: no generator can match it
    # what networks are told besides the map, and D sees
    steer: bool = False  # density and detail of a slice's healthy lung, two numbers: see steering
    contrast: float = 4.0  # only the lung, its HU magnified this many times; 0: whole images, as they are
    # optimisation
    batch: int = 16  # total over all processes
    epochs: int = 20  # per stage; the learning rate is constant for the first half, then falls linearly to 0
    epoch_len: int = 12_000  # augmented samples per epoch: the paper's 40 times 300 slices
    lr: float = 2e-4
    adam_beta1: float = 0.5
    adam_beta2: float = 0.999
    ema: float = 0.998  # decay of the moving average of the generator's weights, used to synthesize; 0: no average
    # system
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where supported natively
    graph: Literal["auto", "on", "off"] = "auto"  # a step as one CUDA graph; auto: on a GPU, in a single process

    @property
    def channels(self) -> int:
        """Channels of what networks are given: the one-hot map, and with --steer two numbers."""
        return self.n_labels + 2 * self.steer


@dataclasses.dataclass(frozen=True)
class Config(LoopConfig):
    """The paper's method: its own knobs on top of the loop's. Presets override groups of both."""

    # networks
    ngf: int = 64  # channels of G1's first layer (Fig. 3), twice as many with --n-gen 3; G2 has half
    ndf: int = 64  # channels of a discriminator's first layer
    n_blocks: int = 9  # residual blocks of G1
    n_local_blocks: int = 3  # residual blocks of G2
    n_gen: Literal[1, 2, 3] = 2  # generators: 1 = G1 at full size, 2 = G1 and G2, 3 = one more between (Table V)
    n_dis: Literal[1, 2, 3] = 2  # discriminators: D1 at full size, D2 at half, D3 at a quarter (Table V)
    draws: float = 0.0  # G takes in noise, so that one map gives many slices; weight of L_redraw, see Covidgan.redrawn
    desum: Literal["learned", "global", "fixed", "sum"] = "learned"  # alpha from F_local | from F_global | 0.5 | F + F
    dfm: Literal["learned", "d2", "fixed", "off"] = "learned"  # beta from D1 | from D2 | --beta | no feature matching
    # losses and stages
    gan: Literal["bce", "lsgan", "hinge"] = "bce"  # Eq. 3 is bce
    lambda_dfm: float = 10.0  # weight of L_DFM in Eq. 2
    beta: float = 0.5  # with --dfm fixed: weight of D2's features in L_DFM; D1's weigh 1 - beta
    beta_margin: float = 0.1  # beta stays in [margin, 1 - margin]
    individual: float = 1.0  # length of stages g1 and g2 relative to the joint one's; 0: no individual training


BEST: dict[str, Any] = dict(batch=4, dfm="fixed", beta=0.1, lambda_dfm=3.0)  # for real use, see paper/fidelity.md
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(noise=0.01, contrast=0.0, ema=0.0),
    "best": BEST,
    "steered": BEST | dict(steer=True, draws=30.0, lr=1e-4),  # from one of best, by --init
    "demo": BEST
    | dict(size=128, ngf=24, ndf=24, n_blocks=4, n_local_blocks=2, epochs=2, epoch_len=1200, interval=150)
    | dict(lr=6e-4, beta=0.5, contrast=6.0),  # to suit its few steps, on the phantom
    "tiny": dict(data=f"{PHANTOM}64", size=64, ngf=8, ndf=8, n_blocks=2, batch=4, epochs=1, epoch_len=80, interval=10),
}


# ------------------------------------------------------------------------------------------------------------ generator


def norm_relu(c: int) -> list[nn.Module]:
    """Instance norm without parameters or running statistics, as in pix2pixHD, then ReLU."""
    return [nn.InstanceNorm2d(c), nn.ReLU()]  # not in place: instance norm returns a view, which would be copied twice


def stem(c_in: int, c_out: int) -> list[nn.Module]:
    """7x7 convolution at full size (Fig. 3: "7x7 ... Conv-64-Relu")."""
    return [nn.ReflectionPad2d(3), nn.Conv2d(c_in, c_out, 7), *norm_relu(c_out)]


def down(c_in: int) -> list[nn.Module]:  # [B, c, H, W] -> [B, 2c, H/2, W/2]
    """Halve the size, double the channels."""
    return [nn.Conv2d(c_in, 2 * c_in, 3, stride=2, padding=1), *norm_relu(2 * c_in)]


def up(c_in: int) -> list[nn.Module]:  # [B, 2c, H, W] -> [B, c, 2H, 2W]
    """Double the size, halve the channels."""
    grow = nn.ConvTranspose2d(c_in, c_in // 2, 3, stride=2, padding=1, output_padding=1)
    return [grow, *norm_relu(c_in // 2)]


def head(c_in: int) -> nn.Sequential:  # [B, c, H, W] -> [B, 1, H, W]
    """7x7 convolution to one channel and tanh."""
    return nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(c_in, 1, 7), nn.Tanh())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm, added to the input; nothing after the sum."""

    def __init__(self, c: int) -> None:
        super().__init__()
        first = [nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), *norm_relu(c)]
        self.body = nn.Sequential(*first, nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), nn.InstanceNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:  # [B, c, H, W]
        return x + self.body(x)


class GlobalGenerator(nn.Module):
    """Global-information generator G1 (§III-A.1, Fig. 3): three halvings, nine residual blocks, three doublings."""

    def __init__(self, c_in: int, ngf: int, n_blocks: int) -> None:
        super().__init__()
        layers = stem(c_in, ngf)
        for k in range(3):
            layers += down(ngf * 2**k)
        layers += [ResidualBlock(ngf * 8) for _ in range(n_blocks)]
        for k in range(3):
            layers += up(ngf * 8 // 2**k)
        self.trunk = nn.Sequential(*layers)
        self.head = head(ngf)  # of G1 by itself: in the joint stage G2 takes the trunk's features

    def forward(self, onehot: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B, 1, H, W]
        return self.head(self.trunk(onehot))


class LocalGenerator(nn.Module):
    """Local-details generator G2 (§III-A.2). It halves the size once (Fig. 4): there DESUM brings in G1's features."""

    def __init__(self, c_in: int, ngf: int, n_blocks: int) -> None:
        super().__init__()
        self.down = nn.Sequential(*stem(c_in, ngf), *down(ngf))
        self.up = nn.Sequential(*[ResidualBlock(2 * ngf) for _ in range(n_blocks)], *up(2 * ngf))
        self.head = head(ngf)  # only the finest local generator's is used


class WeightingNet(nn.Module):
    """Three convolutions, two fully connected layers: one weight in (0, 1) per image (§III-C), which starts at 0.5."""

    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        widths = [c_in, c, c, c]
        convs = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)]
        self.convs = nn.Sequential(*[layer for conv in convs for layer in (conv, nn.ReLU(inplace=True))])
        self.fc = nn.Sequential(nn.Linear(c, c // 2), nn.ReLU(inplace=True), nn.Linear(c // 2, 1))
        nn.init.zeros_(self.fc[-1].weight)
        nn.init.zeros_(self.fc[-1].bias)

    def forward(self, features: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B]
        return self.fc(self.convs(features).mean((2, 3))).float().sigmoid().squeeze(1)


class Desum(nn.Module):
    """Dynamic element-wise sum (Eq. 1): F_out = alpha F_local + (1 - alpha) F_global, one alpha per image."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.net = WeightingNet(channels, channels) if kind in ("learned", "global") else None

    def forward(self, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:  # [B, c, H, W] each
        """Return F_out [B, c, H, W] and alpha [B]."""
        if self.net is None:
            alpha = local.new_full(local.shape[:1], 0.5, dtype=torch.float32)
            return (local + global_) * (1.0 if self.kind == "sum" else 0.5), alpha
        alpha = self.net(global_ if self.kind == "global" else local)
        a = alpha.view(-1, 1, 1, 1).to(local.dtype)
        return a * local + (1 - a) * global_, alpha


class Generator(nn.Module):
    """Global-local generator G (Fig. 2): G1 at half size, or a quarter with --n-gen 3, G2 at full size, and DESUM."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        widest = c.ngf * 2 ** max(0, c.n_gen - 2)  # each finer generator has half the channels; G2 has ngf / 2
        widths = [widest // 2**k for k in range(1, c.n_gen)]
        self.draws, c_in = c.draws, c.channels + bool(c.draws)
        self.g1 = GlobalGenerator(c_in, widest, c.n_blocks)
        self.locals = nn.ModuleList([LocalGenerator(c_in, w, c.n_local_blocks) for w in widths])
        self.desums = nn.ModuleList([Desum(2 * w, c.desum) for w in widths])

    def forward(self, onehot: Tensor, stage: str = "joint", seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is given [B, channels, H, W] to an image [B, 1, H, W] in [-1, 1] and the finest sum's alpha [B], else 1.

        Stage g1: only G1, at its own reduced size. g2: only the local generators, with F_out = F_local. joint: all.
        seed int64 [B], or [B, W] by column: with --draws, of each slice's noise; without one it is 0.
        """
        if self.draws:
            seed = onehot.new_zeros(len(onehot), dtype=torch.long) if seed is None else seed
            onehot = torch.cat([onehot, noise_of(seed, onehot)], 1)
        finest = len(self.locals)
        reduced = onehot[..., :: 2**finest, :: 2**finest]  # nearest, so that G1 sees a label map in every stage
        alpha = onehot.new_ones(onehot.shape[:1])
        if stage == "g1" or finest == 0:
            return self.g1(reduced).float(), alpha
        features = self.g1.trunk(reduced) if stage == "joint" else None  # of the coarsest size
        for level, (local, desum) in enumerate(zip(self.locals, self.desums, strict=True), start=1):
            stride = 2 ** (finest - level)
            summed = local.down(onehot[..., ::stride, ::stride])
            if features is not None:
                summed, alpha = desum(summed, features)
            features = local.up(summed)
        return self.locals[-1].head(features).float(), alpha


def noise_of(seed: Tensor, like: Tensor) -> Tensor:  # int64 [B] or [B, W], [B, c, H, W] -> [B, 1, H, W]
    """Noise in [-2, 2] of seed and place, by whole numbers: the same in any runtime."""
    prime, drawn = 2**31 - 1, seed.view(len(seed), 1, 1, -1)
    rows, columns = (torch.arange(side, device=seed.device) for side in like.shape[-2:])
    for place in (0, rows.view(-1, 1), columns):
        x = (drawn + place + 195_912_037) % prime
        square = x * x % prime
        drawn = square * square % prime * x % prime  # x^5 permutes the numbers modulo this prime
    return (drawn.float() * (4 / prime) - 2).to(like.dtype)


# -------------------------------------------------------------------------------------------- discriminators and losses


class PatchGAN(nn.Module):
    """Discriminator with a 70 x 70 receptive field per decision (§III-B). Padding and norms are pix2pixHD's."""

    def __init__(self, c_in: int, ndf: int) -> None:
        super().__init__()
        blocks, channels = [], [c_in, ndf, 2 * ndf, 4 * ndf, 8 * ndf]
        for i, (a, b) in enumerate(itertools.pairwise(channels)):
            conv = nn.Conv2d(a, b, 4, stride=2 if i < 3 else 1, padding=2)
            norm = [nn.InstanceNorm2d(b)] if i else []
            blocks.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(8 * ndf, 1, 4, padding=2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Every block's output; the last, [B, 1, h, w], holds the decisions as logits."""
        return [x := block(x) for block in self.blocks]


class Discriminators(nn.Module):
    """Multi-resolution discriminator D (§III-B, Fig. 5): scales[0] is D1 at full size, scales[1] D2 at half."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.scales = nn.ModuleList([PatchGAN(c.channels + 1, c.ndf) for _ in range(c.n_dis)])

    def forward(self, onehot: Tensor, image: Tensor, first: int = 0) -> list[list[Tensor]]:
        """Features of each scale from `first` on, for image [B, 1, H, W] and its map [B, channels, H, W]."""
        judged = []
        for scale in self.scales[first:]:
            if judged:  # each further one sees half the size (Fig. 5), and of the map every second pixel: still a map
                onehot, image = onehot[..., ::2, ::2], F.avg_pool2d(image, 2)
            judged.append(scale(torch.cat([onehot, image], 1)))
        return judged


def gan_losses(real: list[list[Tensor]], fake: list[list[Tensor]], kind: str) -> tuple[Tensor, Tensor]:
    """L_cGAN (Eq. 3), D's side, halved as in pix2pix, and G's, which does not saturate; summed over scales (Eq. 2)."""
    hit, miss = {  # what it costs D that it takes a real pair for synthetic, and a synthetic one for real
        "bce": (lambda x: F.softplus(-x), F.softplus),  # -log D(m, x), -log(1 - D(m, G(m)))
        "lsgan": (lambda x: (x - 1).square(), torch.square),
        "hinge": (lambda x: F.relu(1 - x), lambda x: F.relu(1 + x)),
    }[kind]
    pairs = [(r[-1].float(), f[-1].float()) for r, f in zip(real, fake, strict=True)]
    d = sum((hit(r).mean() + miss(f).mean()) / 2 for r, f in pairs)
    g = sum(-f.mean() if kind == "hinge" else hit(f).mean() for _, f in pairs)  # bce: -log D(m, G(m))
    return d, g


class Dfm(nn.Module):
    """Dynamic feature matching (§III-C.2, Eq. 4).

    With t_k the L1 distance between the real and the synthetic pair in scale k's first three feature maps,
        L_DFM = (1 - beta) t_1 + beta t_2,
    where beta is one number per image, computed from D1's third feature map of the real pair ("d2": from D2's,
    "fixed": --beta). With more than two scales the coarser share beta; a single one has all weight, beta is 0.

    It moves G and beta's own network, but not D: Eq. 2 has it under min_G. Minimised, beta would move all weight to
    the discriminator that is easier to match: it stays in [margin, 1 - margin].
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.kind, self.fixed, self.margin = c.dfm, c.beta, c.beta_margin
        learned = c.dfm in ("learned", "d2") and c.n_dis > 1
        self.net = WeightingNet(4 * c.ndf, c.ndf) if learned else None

    def forward(self, real: list[list[Tensor]], fake: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return L_DFM for G, the loss for beta's own network, and beta [B]."""
        n = len(real[0][0])
        distances = torch.stack([feature_distance(r, f) for r, f in zip(real, fake, strict=True)])  # [scales, B]
        if len(real) == 1:
            return distances.mean(), distances.new_zeros(()), distances.new_zeros(n)
        if self.net is None:
            beta = distances.new_full((n,), self.fixed)
        else:
            features = real[1 if self.kind == "d2" else 0][2].detach()  # D is not to learn what beta needs
            beta = self.margin + (1 - 2 * self.margin) * self.net(features)

        def weighted(t: Tensor, beta: Tensor) -> Tensor:
            return ((1 - beta) * t[0] + beta * t[1:].mean(0)).mean()

        return weighted(distances, beta.detach()), weighted(distances.detach(), beta), beta


def feature_distance(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Sum over i = 1..3 of ||D^i(m, x) - D^i(m, G(m))||_1 / N_i (Eq. 4), per image: [B]."""
    pairs = zip(real[:3], fake[:3], strict=True)
    return sum((r.detach() - f).abs().mean((1, 2, 3), dtype=torch.float32) for r, f in pairs)


# ------------------------------------------------------------------------------------------ the method: what is trained


class Player(NamedTuple):
    """One side of the game in a stage: the parameters it moves, the loss it minimises, and its Adam settings."""

    loss: str
    parameters: list[nn.Parameter]
    lr: float
    betas: tuple[float, float]

    @classmethod
    def of(cls, c: LoopConfig, loss: str, modules: list[nn.Module]) -> "Player":
        """The player that moves all parameters of some modules, with the config's optimiser settings."""
        return cls(loss, [p for module in modules for p in module.parameters()], c.lr, (c.adam_beta1, c.adam_beta2))


class Method(nn.Module):
    """What the loop trains. Another method subclasses it and LoopConfig, and defines what has no body here."""

    name: ClassVar[str]  # as checkpoints and tables call it
    options: ClassVar[type[LoopConfig]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    curves: ClassVar[tuple[tuple[str, ...], ...]]  # figures of a step to watch, grouped as they are plotted
    alone: ClassVar[bool] = False  # whether a step needs the whole batch in one process, as batch norm does
    layout: ClassVar[torch.memory_format] = torch.contiguous_format  # in float32 on a CPU: channels last loses 5 %

    def __init__(self, c: LoopConfig) -> None:
        super().__init__()
        self.c = c

    @classmethod
    def stages(cls, c: LoopConfig) -> dict[str, float]:
        """The stages of a whole training, in order, and the length of each as a multiple of --epochs."""

    @classmethod
    def multiple(cls, c: LoopConfig) -> int:
        """What height and width of a map must be multiples of."""

    def players(self, stage: str) -> dict[str, Player]:
        """Who moves in a stage. Their losses may share a graph: it is freed after the last one's backward pass."""

    def target(self, image: Tensor, labels: Tensor) -> Tensor:
        """The target for `losses`, from augmented slices [B, 1, H, W] in [-1, 1] and their maps: only the lung."""
        return lung_target(image, labels)

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """Scalars of a step, players' losses and other figures, for onehot [B, channels, H, W], target [B, 1, H, W]."""

    def seen_by_d(self, image: Tensor, onehot: Tensor) -> Tensor:
        """What D sees of an image [B, 1, H, W] in [-1, 1]: with --contrast only the lung, magnified, parenchyma at 0.

        Texture varies by hundredths, a map by 1, the pleura by almost 1: an early D is blind to it, and G paints none.
        """
        if not self.c.contrast:
            return image
        parenchyma = window(image.new_full((), PARENCHYMA), self.c)
        return (self.c.contrast * (image - parenchyma)).masked_fill(onehot[:, :1] > 0, 0.0)

    def generator(self) -> nn.Module:
        """The network to deploy: one-hot map [B, channels, H, W] to image [B, 1, H, W] in [-1, 1], and alpha [B]."""

    def synthesize(self, onehot: Tensor, stage: str) -> Tensor:
        """The stage's image in [-1, 1] for a one-hot map, possibly smaller by an integer factor."""
        return self.generator()(onehot)[0]


class Covidgan(Method):
    """The paper's method: G1 and G2 joined by DESUM against D1 and D2 with DFM, in three stages (§III, Fig. 2)."""

    name, options, presets = "covidgan", Config, PRESETS
    curves = (("d", "gan"), ("dfm",), ("alpha", "beta"))

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.g, self.d, self.dfm = Generator(c), Discriminators(c), Dfm(c)
        for part in (self.g.g1, self.g.locals, self.d):  # weighting nets keep PyTorch's own initial values
            part.apply(init_weights)

    @classmethod
    def stages(cls, c: Config) -> dict[str, float]:
        """G1 alone, G2 alone, both (§III-A); a single generator has only the last."""
        alone = {"g1": c.individual, "g2": c.individual} if c.n_gen > 1 and c.individual else {}
        return alone | {"joint": 1.0}

    @classmethod
    def multiple(cls, c: Config) -> int:
        """G1 halves three times, each finer generator once more; with G1 only, as with two."""
        return 2 ** (3 + max(1, c.n_gen - 1))

    def first_scale(self, stage: str) -> int:
        """Index of a stage's finest discriminator: in g1 the one at G1's reduced size (the paper's D2), or the last."""
        return min(self.c.n_gen, self.c.n_dis) - 1 if stage == "g1" else 0

    def players(self, stage: str) -> dict[str, Player]:
        """D, beta's network, and what the stage trains of G: G1 (g1), the local generators (g2), all (joint)."""
        c, g = self.c, self.g
        g1 = g.g1.trunk if len(g.locals) else g.g1  # the head is used only in stage g1
        trained = {"g1": [g.g1], "g2": [*g.locals], "joint": [g1, *g.locals, *g.desums]}
        return {
            "d": Player.of(c, "d", [*self.d.scales[self.first_scale(stage) :]]),
            "beta": Player.of(c, "loss_beta", [self.dfm]),
            "g": Player.of(c, "g", trained[stage]),
        }

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """All losses of a step (Eq. 2), from one pass through G, and two through D: of a real and of a fake pair."""
        c, first = self.c, self.first_scale(stage)
        shrink = 2 ** (c.n_gen - 1) if stage == "g1" else 1  # g1 works at G1's reduced size
        seed = torch.randint(2**31, (len(onehot),), device=onehot.device) if c.draws else None
        image, alpha = self.g(onehot, stage, seed)
        redrawn = self.redrawn(onehot[:1], image[:1], seed[:1]) if c.draws and stage == "joint" else alpha.new_zeros(())
        onehot, target = onehot[..., ::shrink, ::shrink], F.avg_pool2d(target, shrink)
        real, fake = (self.d(onehot, self.seen_by_d(x, onehot), first) for x in (target, image))
        loss_d, loss_gan = gan_losses(real, fake, c.gan)
        loss_dfm, loss_beta, beta = self.dfm(real, fake)  # Eq. 2 sums it over D1 and D2, as Eq. 4 has done: once here
        loss_g = loss_gan + (c.lambda_dfm * loss_dfm if c.dfm != "off" else 0.0) + c.draws * redrawn
        watched = {"gan": loss_gan, "dfm": loss_dfm, "redraw": redrawn, "alpha": alpha.mean(), "beta": beta.mean()}
        return {"d": loss_d, "g": loss_g, "loss_beta": loss_beta, **watched}

    def redrawn(self, onehot: Tensor, image: Tensor, seed: Tensor) -> Tensor:
        """L_redraw: draw one lung of an image [1, 1, H, W], one half of it, anew, with a lesion more. It is the other's
        mean absolute change, and what the redrawn one's, its lesion left out, falls short of 0.06 (45 HU of 1500).
        """
        side, across, down, radius, kind = torch.rand(5, device=seed.device)
        y, x = (torch.arange(n, device=seed.device) * (2 / n) - 1 for n in onehot.shape[-2:])
        x = x * (0.5 - side).sign()  # the lung to draw anew is where this is above 0
        away = torch.hypot(x - 0.1 - 0.8 * across, y.view(-1, 1) + 0.6 - 1.2 * down) - 0.05 - 0.25 * radius
        n_labels, lung = self.c.n_labels, onehot[:, :1] == 0
        lesion = torch.arange(n_labels, device=seed.device).view(1, -1, 1, 1) == 2 + (kind * (n_labels - 2)).long()
        painted = onehot.clone()
        painted[:, :n_labels] = torch.where(lung & (away < 0) & (x > 0), lesion.to(onehot.dtype), onehot[:, :n_labels])
        anew = torch.where(x > 0, seed + 1 + (side * 2**31).long(), seed).view(1, -1)
        change = (self.g(painted, "joint", anew)[0] - image.detach()).abs()
        other, this = lung & (x < -0.1), (onehot[:, 1:2] == 1) & (x > 0.1) & (away > 0.15)  # the lesion's rim apart
        moved, changed = ((change * where).sum() / where.sum().clamp(min=1) for where in (other, this))
        return moved + F.relu(0.06 - changed)

    def generator(self) -> Generator:
        return self.g

    def synthesize(self, onehot: Tensor, stage: str) -> Tensor:
        return self.g(onehot, stage)[0]


def init_weights(module: nn.Module) -> None:
    """Convolutions get N(0, 0.02) and zero bias, as in pix2pix; for nn.Module.apply."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


def build(method: type[Method], c: LoopConfig) -> Method:
    """A method's networks; the same seed gives the same weights."""
    torch.manual_seed(c.seed)
    return method(c)


# ------------------------------------------------------------------------------------------------ data and augmentation


class Slices(NamedTuple):
    """One side of a dataset, train or test, in memory: names [N], hu int16 [N, 1, S, S], labels uint8 [N, 1, S, S]."""

    names: list[str]
    hu: Tensor
    labels: Tensor


def window(hu: Tensor, c: LoopConfig) -> Tensor:
    """HU to [-1, 1] through the window: level - width/2 and below is -1, level + width/2 and above is 1."""
    return ((hu.float() - c.level) * (2 / c.width)).clamp(-1, 1)


def lung_target(image: Tensor, labels: Tensor) -> Tensor:
    """The generator's target (Fig. 1, column 2): the lung region (labels above 0), all else at the floor of -1."""
    return image.masked_fill(labels == 0, -1.0)


TYPICAL = ((-800.0, 50.0), (75.0, 15.0))  # HU, of density and of detail: middle and spread among patients


def steering(image: Tensor, labels: Tensor, c: LoopConfig) -> Tensor:  # [B, 1, H, W] each -> [B, 2]
    """Density and detail of healthy lung, HU: mean, and deviation of what is finer than 3 pixels. NaN where none is."""
    hu, healthy = image * (c.width / 2) + c.level, (labels == 1).float()
    inner = 1 - F.max_pool2d(1 - healthy, 3, 1, 1)  # all of whose neighbours are healthy
    fine = hu - F.avg_pool2d(hu, 3, 1, 1, count_include_pad=False)
    pairs = (hu, healthy), (fine.square(), inner)
    density, variance = ((x * where).sum((1, 2, 3)) / where.sum((1, 2, 3)) for x, where in pairs)
    return torch.stack([density, variance.sqrt()], 1)


def told(numbers: Tensor, labels: Tensor) -> Tensor:  # [B, 2], HU, and [B, 1, H, W] -> [B, 2, H, W]
    """Density and detail as networks take them: -3 to 3, constant within the lung, 0 outside and for NaN."""
    scaled = [(numbers[:, k] - middle) / spread for k, (middle, spread) in enumerate(TYPICAL)]
    return torch.stack(scaled, 1).nan_to_num().clamp(-3, 3).view(-1, 2, 1, 1) * (labels > 0)


def encode(labels: Tensor, image: Tensor, c: LoopConfig) -> Tensor:
    """What networks are given, [B, channels, H, W]: the one-hot map, and with --steer density and detail."""
    onehot = one_hot(labels, c.n_labels)
    return torch.cat([onehot, told(steering(image, labels, c), labels)], 1) if c.steer else onehot


def one_hot(labels: Tensor, n_labels: int) -> Tensor:
    """Label map [B, 1, H, W] to one-hot float [B, n_labels, H, W]."""
    return (labels == torch.arange(n_labels, device=labels.device).view(1, -1, 1, 1)).float()


def resample(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Resample [B, 1, H, W] to a size: the image bicubic and anti-aliased, with possible overshoot, labels nearest."""
    if image.shape[-1] == size:
        return image, labels
    image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return image, F.interpolate(labels.float(), (size, size), mode="nearest-exact").byte()


def augment(
    hu: Tensor, labels: Tensor, c: LoopConfig, rng: torch.Generator, size: int = 0, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor]:
    """Table I's augmentation on the device: random resize and crop, rotation, elastic transform, Gaussian noise.

    hu int16, labels uint8 [B, 1, H, W] are resampled through one grid, the map nearest, so that it stays a map. Given
    a smaller size, they are downsampled to it last: a real image blurred by resampling would teach D to like blur.
    Returns the image in [-1, 1] and the labels, 0 beyond a slice's border, of a process's share of the whole batch.
    """
    device, (height, width), n = hu.device, hu.shape[2:], len(hu) * world
    share = slice(rank, None, world)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng, device=device)

    zoom, angle = uniform(1, c.resize), torch.deg2rad(uniform(-c.rotate, c.rotate))
    room = 1 - 1 / zoom  # how far the crop can move before it leaves the slice
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift_x, shift_y = uniform(-1, 1) * room, uniform(-1, 1) * room
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1).view(n, 2, 3)[share]  # output to slice
    cells = math.ceil(512 / c.elastic_cell)
    spread = 2 * c.elastic / 512  # in the grid's units, of which a slice is 2 wide
    coarse = torch.randn(n, 2, cells, cells, generator=rng, device=device)[share] * spread
    grid = F.affine_grid(theta, [len(theta), 1, height, width], align_corners=False)  # [B, H, W, 2], -1..1
    grid = grid + F.interpolate(coarse, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    image = F.grid_sample(window(hu, c), grid, mode="bicubic", padding_mode="border", align_corners=False)
    labels = F.grid_sample(labels.float(), grid, mode="nearest", align_corners=False).byte()
    image, labels = resample(image, labels, size or height)
    if c.noise:
        noise = torch.randn(n, *image.shape[1:], generator=rng, device=device)
        image = image + 2 * c.noise * noise[share]  # the window is 2 wide
    return image.clamp(-1, 1), labels


def patient_of(name: str) -> str:
    """The patient of a slice: what comes before the last "_" in its name."""
    return name.rpartition("_")[0]


def list_pngs(folder: Path) -> dict[str, Path]:
    """PNGs of a folder by name without suffix, whatever its Unicode form. data/check.py judges a set thoroughly."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png" and path.name[0] != ".")
    if not files:
        raise Mistake(f"{folder}: no PNG in it: give slices and maps as PNG (JPEG changes grey levels and labels)")
    return {normalize("NFC", path.stem): path for path in files}


def read_split(folder: Path, seed: int) -> dict[str, list[str]]:
    """Names of the train and test slices: from split.json, else a fifth is held out, of patients if there are more."""
    images, maps, path = list_pngs(folder / "images"), list_pngs(folder / "maps"), folder / "split.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text(encoding="utf-8-sig")).items()
            listed = [(side, names) for side, names in listed if isinstance(names, list)]
            sides = {side: [normalize("NFC", name).removesuffix(".png") for name in names] for side, names in listed}
            split = {side: sides[side] for side in ("train", "test")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{path}: no JSON with lists of names under train and test ({error!r})") from error
    elif (folder / ".unfinished").exists():
        raise Mistake(f"{folder}: its making was cut off: run the command that makes it again")
    else:
        names = sorted(images.keys() & maps.keys())
        patients = sorted({*map(patient_of, names)})
        held_out = np.random.default_rng(seed).permutation(patients)[: max(1, len(patients) // 5)].tolist()
        by_patient = [name for name in names if patient_of(name) in held_out]
        test = by_patient if len(patients) > 1 else names[-max(1, len(names) // 5) :]
        sides = split = {"train": [name for name in names if name not in test], "test": test}
    if unused := sorted((images.keys() | maps.keys()) - {*itertools.chain(*sides.values())}):
        print(f"note: {folder}: {len(unused)} slices without map, image or side, {unused[0]} first", flush=True)
    for name in [*split["train"], *split["test"]]:
        if name not in images or name not in maps:
            part = "maps" if name in images else "images"
            raise Mistake(f"{folder / part / name}.png: missing: each slice has an image and a map of one name")
    if both := {*split["train"]} & {*split["test"]}:
        raise Mistake(f"{path}: {min(both)} is under train and test: take it out of one")
    if not split["train"] or not split["test"]:
        raise Mistake(f"{folder}: {len(split['train'])} slices to train, {len(split['test'])} to test: both need one")
    return split


def read_png(path: Path) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Pillow's name of the mode, the pixels, and the palette [n, 3] of an indexed PNG."""
    try:
        with Image.open(path) as picture:
            pixels, palette = np.asarray(picture), picture.getpalette("RGB")
            return picture.mode, pixels, None if palette is None else np.reshape(palette, (-1, 3))
    except (OSError, SyntaxError, ValueError) as error:  # as Pillow has it for a file that is cut short or broken
        raise Mistake(f"{path}: not a readable PNG ({error})") from error


def read_image(path: Path) -> np.ndarray:
    """Read a 16-bit grey PNG of HU + 1024 as HU, int32 [H, W]. Raises Mistake for any other kind of PNG."""
    mode, stored, _ = read_png(path)
    if not mode.startswith("I"):  # I;16, or I before Pillow 10.3
        raise Mistake(f"{path}: a PNG of mode {mode} is no slice: give 16-bit grey PNG of HU + {HU_OFFSET}")
    return stored.astype(np.int32) - HU_OFFSET


def read_map(path: Path, n_labels: int) -> np.ndarray:
    """Read a label map, uint8 [H, W]: grey PNG of label values, or RGB or palette in exactly the paper's COLOURS."""
    mode, pixels, palette = read_png(path)
    if mode not in ("L", "P", "RGB", "RGBA"):
        raise Mistake(f"{path}: a PNG of mode {mode} is no label map: give 8-bit grey, palette or RGB")
    empty = palette is not None and np.ptp(pixels) == 0 and not palette[pixels[0, 0]].any()  # whatever index black has
    # Paint programs order palettes as they like: where one holds the paper's colours, colour decides.
    if empty or (palette is not None and {*COLOURS[1:]} & {*map(tuple, palette.tolist())}):
        pixels = palette[pixels]
    if mode == "RGBA":
        pixels = np.where(pixels[..., 3:] > 0, pixels[..., :3], 0)  # an eraser leaves the colour underneath
    labels = pixels
    if pixels.ndim == 3:
        matches = [(pixels == colour).all(-1) for colour in COLOURS[:n_labels]]
        labels = np.where(np.any(matches, axis=0), np.argmax(matches, axis=0), n_labels)
    if labels.max() >= n_labels:
        y, x = np.argwhere(labels >= n_labels)[0]
        told = f"{pixels[y, x].tolist()} at row {y}, column {x}"
        raise Mistake(f"{path}: {told} is no label below {n_labels}, nor a colour of {COLOURS[:n_labels]}")
    return labels.astype(np.uint8)


def load_slices(folder: Path, names: list[str], c: LoopConfig, room: int = 1) -> Slices:
    """Read every slice of a side, resampled to c.size, or to `room` times that where the files are that large."""
    images, maps = list_pngs(folder / "images"), list_pngs(folder / "maps")
    stored = len(read_image(images[names[0]]))
    side = c.size * (room if stored >= c.size * room else 1)

    def load(name: str) -> tuple[Tensor, Tensor, np.ndarray]:
        hu, labels = read_image(images[name]), read_map(maps[name], c.n_labels)
        for path, pixels in {images[name]: hu, maps[name]: labels}.items():
            if pixels.shape != (stored, stored):
                told = f"{pixels.shape[0]} x {pixels.shape[1]} pixels, not {stored} x {stored} as {names[0]}"
                raise Mistake(f"{path}: {told}: bring all images and maps to one size, and square")
        sums = [np.bincount(labels.ravel(), weights, c.n_labels) for weights in (None, hu.ravel())]
        # Clipped to the window first, so that what resampling mixes is what is seen (§IV-A: grey images).
        seen = torch.from_numpy(hu)[None, None].float().clamp(c.level - c.width / 2, c.level + c.width / 2)
        x, y = resample(seen, torch.from_numpy(labels)[None, None], side)
        return x.round().clamp(-HU_OFFSET, 4095 - HU_OFFSET).short(), y, np.stack(sums)

    with ThreadPoolExecutor() as pool:
        hu, labels, sums = zip(*pool.map(load, names), strict=True)
    check_hu(f"{folder}, {len(names)} slices of {stored} pixels", *np.sum(sums, 0), c)
    return Slices(names, torch.cat(hu), torch.cat(labels))


def check_hu(what: str, pixels: np.ndarray, sums: np.ndarray, c: LoopConfig) -> None:
    """Print the mean HU of each label, from its number of pixels and their sum. Raises Mistake where it cannot be."""
    means = {LABELS[k]: sums[k] / pixels[k] for k in range(1, c.n_labels) if pixels[k]}
    told = ", ".join(f"{one} {means[one]:.0f}" if one in means else f"no {one}" for one in LABELS[1 : c.n_labels])
    values = [*means.values()]
    grey = len(values) > 1 and max(values) <= 255 - HU_OFFSET  # levels of 0..255, taken for HU + 1024
    right = values == sorted(values) and LUNG_HU[0] <= means.get("lung", -700) <= LUNG_HU[1] and not grey
    if not c.unchecked and not (values and right):
        wanted = f"lung has {LUNG_HU[0]} to {LUNG_HU[1]}, labels are denser in their order, no grey levels of 0..255"
        raise Mistake(f"{what}: {told} HU; {wanted}: see python data/check.py, or give --unchecked")
    print(f"{what}: {told} HU", flush=True)


# ------------------------------------------------------------------------------------ the loop: how a method is trained


def lr_at(step: int, steps: int, base: float) -> float:
    """Learning rate of a step (§IV-A): constant for the first half of a stage's steps, then linearly to 0."""
    return base * min(1.0, 2 * (1 - step / steps))


def sample_order(n: int, length: int, seed: list[int]) -> np.ndarray:
    """Indices [length] of an epoch's samples: whole shuffles of the n slices, a pure function of the seed."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(n) for _ in range(math.ceil(length / n))])[:length]


class Trainer:
    """The loop with its state: a method's networks, its players' optimisers, stage and step."""

    def __init__(self, method: type[Method], c: LoopConfig) -> None:
        self.c, self.out = c, Path(c.out)
        self.device = pick_device(c)
        self.bf16 = uses_bf16(c, self.device)
        self.look_every = 10 if self.device.type == "cuda" else 1  # steps: to look makes a GPU wait
        self.asked_to_stop = False  # a signal came: save after this step, then stop
        split = read_split(Path(c.data), c.seed)
        self.train = near(self.device, once_a_machine(lambda: load_slices(Path(c.data), split["train"], c, room=2)))
        self.test = load_slices(Path(c.data), split["test"], c)
        layout = method.layout if self.device.type == "cpu" and not self.bf16 else torch.channels_last  # gains 6 to 8 %
        self.method = build(method, c).to(self.device, memory_format=layout)
        self.average = copy.deepcopy(self.method)  # its generator's weights are moving averages, used to synthesize
        self.steering = []  # density and detail of each training slice
        for hu, labels in zip(self.train.hu.split(16), self.train.labels.split(16), strict=True) if c.steer else ():
            image, labels = resample(window(hu, c), labels, c.size)
            self.steering += steering(image.clamp(-1, 1), labels, c).tolist()
        self.rng = torch.Generator(self.device)
        self.fed = [part.new_empty(c.batch // WORLD, *part.shape[1:], device=self.device) for part in self.train[1:]]
        self.stages = method.stages(c)
        self.epoch_steps = c.epoch_len // c.batch
        self.begin(next(iter(self.stages)) if c.stage == "all" else c.stage)

    def begin(self, stage: str) -> None:
        """Start a stage: networks are kept, averages and optimisers start anew, over only the stage's parameters."""
        self.stage, self.number, self.step_done = stage, [*self.stages].index(stage), 0
        self.steps = max(1, round(self.c.epochs * self.epoch_steps * self.stages[stage]))
        self.average.load_state_dict(self.method.state_dict())
        self.players = {name: player for name, player in self.method.players(stage).items() if player.parameters}
        self.rates = {name: torch.zeros((), device=self.device) for name in self.players}
        self.fade = torch.zeros((), device=self.device)  # 1 less the average's decay
        self.optimizers, how = {}, dict(fused=True, capturable=self.device.type == "cuda")
        for name, player in self.players.items():
            betas = tuple(map(float, player.betas))
            self.optimizers[name] = torch.optim.Adam(player.parameters, self.rates[name], betas, **how)
        self.unseen: list[Tensor] = []  # figures of the last steps, still on the device
        graphed = self.device.type == "cuda" and self.c.graph != "off" and (self.c.graph == "on" or WORLD == 1)
        self.do_work, self.until_graph = self.work, 3 if graphed else -1  # steps before a step becomes one CUDA graph

    def run(self) -> None:
        """Train every stage asked for, from the current state on. Told to stop, the first process saves, then stops."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN if RANK else lambda *_: setattr(self, "asked_to_stop", True))
        stages = [*self.stages] if self.c.stage == "all" else [self.c.stage]  # may follow the one resumed from
        for stage in stages[stages.index(self.stage) if self.stage in stages else 0 :]:
            if stage != self.stage:
                self.begin(stage)
            self.run_stage()

    def run_stage(self) -> None:
        """Train the stage to its end, with bar, stats, checkpoints and pictures."""
        with (
            open(self.out / "stats.jsonl" if RANK == 0 else os.devnull, "a") as stats,
            tqdm(desc=self.stage, total=self.steps * self.c.batch, unit=" samples", disable=RANK > 0) as bar,
        ):
            bar.update(self.step_done * self.c.batch)
            while self.step_done < self.steps:
                self.update()
                bar.update(self.c.batch)
                due = self.step_done % self.c.interval == 0 or self.step_done == self.steps
                if due or self.asked_to_stop or len(self.unseen) == self.look_every:
                    for figures in self.look():
                        stats.write(json.dumps({"stage": self.stage, **figures}) + "\n")
                    watched = itertools.chain(*self.method.curves)
                    bar.set_postfix({name: f"{figures[name]:.3f}" for name in watched}, refresh=False)
                if RANK == 0 and (due or self.asked_to_stop):
                    stats.flush()
                    if due:  # before the checkpoint: a run killed in between draws again
                        self.draw()
                    write_atomically(self.out / "ckpt.pt", lambda path: torch.save(self.state(), path))
                if self.asked_to_stop and self.step_done < self.steps:
                    where = f"stage {self.stage}, step {self.step_done}"
                    raise KeyboardInterrupt(f"stopped at {where}: --resume goes on from there")

    def step(self) -> dict[str, float]:
        """One update of every player of the stage; returns its learning rates and figures."""
        self.update()
        return self.look()[-1]

    def update(self) -> None:
        """One update of every player of the stage. Nothing here waits for the device: `look` does, later."""
        if self.until_graph == 0:
            self.do_work = recorded(self.work, self.rng)
        self.feed()
        self.unseen.append(self.do_work().clone())
        self.until_graph -= 1
        self.step_done += 1

    def look(self) -> list[dict[str, float]]:
        """Learning rates and figures of the steps since the last look. Raises Mistake where one was not finite."""
        seen, self.unseen, told = torch.stack(self.unseen).tolist(), [], []
        for step, values in enumerate(seen, self.step_done - len(seen)):
            rates = {f"lr_{name}": lr_at(step, self.steps, player.lr) for name, player in self.players.items()}
            told.append({"step": step + 1, **rates, **dict(zip(self.names, values, strict=True))})
            if not all(map(math.isfinite, values)):
                raise Mistake(f"stage {self.stage}, step {step + 1}: not finite, try a lower --lr: {told[-1]}")
        return told

    def feed(self) -> None:
        """Put to where `work` finds it on the device all that differs from step to step: rates, seeds, the batch."""
        for name, player in self.players.items():
            self.rates[name].fill_(lr_at(self.step_done, self.steps, player.lr))
        self.fade.fill_(1 - min(self.c.ema, (1 + self.step_done) / (10 + self.step_done)))  # the start soon fades
        self.rng.manual_seed(self.step_seed())
        torch.manual_seed(self.step_seed(1 + RANK))  # for --draws, dropout; from 1: else augmentation's again
        epoch, i = divmod(self.step_done, self.epoch_steps)
        order = sample_order(len(self.train.names), self.c.epoch_len, [self.c.seed, self.number, epoch])
        chosen = torch.from_numpy(order[i * self.c.batch : (i + 1) * self.c.batch][RANK::WORLD])
        for fed, held in zip(self.fed, self.train[1:], strict=True):
            part = held[chosen.to(held.device, non_blocking=True)]
            fed.copy_(part.pin_memory() if fed.is_cuda and not held.is_cuda else part, non_blocking=True)

    def work(self) -> Tensor:
        """A step's work on the device, for what `feed` has put there; returns its figures, still there.

        All losses come from one forward pass, then all players move, as in pix2pixHD; not where one is not finite.
        """
        target, labels = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.method.losses(encode(labels, target, self.c), target, self.stage)
        self.backward(losses)
        self.names = [*losses]
        figures = self.mean_over_processes(torch.stack([loss.detach().float() for loss in losses.values()]))
        not_finite = (~figures.isfinite()).any().float()
        for optimizer in self.optimizers.values():
            optimizer.found_inf = not_finite  # as torch.amp.GradScaler has it: where this is 1, nothing moves
            optimizer.step()
            optimizer.zero_grad()  # here, not before the backward pass: the forward pass needs the memory
        weights = self.method.generator().state_dict()
        for name, mean in self.average.generator().state_dict().items():  # a counter is copied
            mean.lerp_(weights[name], self.fade) if mean.is_floating_point() else mean.copy_(weights[name])
        return figures

    def batch(self) -> tuple[Tensor, Tensor]:
        """This process's share of the step's batch, as fed: target and labels [b, 1, S, S]."""
        image, labels = augment(*self.fed, self.c, self.rng, self.c.size, RANK, WORLD)
        return self.method.target(image, labels), labels

    def step_seed(self, *more: int) -> int:
        """Seed of a step's draws, a pure function of the step: a resumed run has nothing to restore, on any device."""
        numbers = [self.c.seed, self.number, self.step_done, *more]
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Fill the gradients of each loss's players and of no others, which `inputs=` ensures in a shared graph."""
        moved: dict[str, list[nn.Parameter]] = {}
        for player in self.players.values():
            moved.setdefault(player.loss, []).extend(player.parameters)
        for k, (loss, parameters) in enumerate(moved.items(), start=1):
            if losses[loss].requires_grad:  # not beta's where a stage has one discriminator, nothing to weigh
                losses[loss].backward(inputs=parameters, retain_graph=k < len(moved))

    def mean_over_processes(self, figures: Tensor) -> Tensor:
        """Data parallelism: gradients and figures become their means over the processes."""
        if WORLD == 1:
            return figures
        moved = [p.grad for player in self.players.values() for p in player.parameters if p.grad is not None]
        flat = torch.cat([figures, *(g.flatten() for g in moved)])
        dist.all_reduce(flat)
        figures, *means = (flat / WORLD).split([len(figures), *(g.numel() for g in moved)])
        for g, mean in zip(moved, means, strict=True):
            g.copy_(mean.view_as(g))
        return figures

    def state(self) -> dict[str, Any]:
        """The checkpoint: plain numbers and tensors, enough to go on bit for bit; no path, so that it can be shared."""
        return {
            "method": self.method.name,
            "config": {**dataclasses.asdict(self.c), **LOCAL},
            "trained_labels": [k for k in range(1, self.c.n_labels) if (self.train.labels == k).any()],
            "steering": self.steering,
            "stage": self.stage,
            "step": self.step_done,
            "stats": (self.out / "stats.jsonl").stat().st_size,
            "networks": self.method.state_dict(),
            "average": self.average.generator().state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, bit for bit as if never stopped."""
        checkpoint = read_checkpoint(path)
        self.method.load_state_dict(checkpoint["networks"])  # a RuntimeError names what other options have changed
        self.begin(checkpoint["stage"])
        self.average.generator().load_state_dict(checkpoint["average"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizers"][name]["state"]})
            optimizer.param_groups[0]["lr"] = self.rates[name]  # the very tensor that `feed` fills
            for weight, moments in optimizer.state.items():  # fused, Adam walks through memory: they must lie alike
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[key] = torch.empty_like(weight).copy_(moments[key])
        self.step_done = checkpoint["step"]
        if RANK == 0:
            os.truncate(self.out / "stats.jsonl", checkpoint["stats"])  # what a killed run wrote past its checkpoint
            print(f"{path}: going on from stage {self.stage}, step {self.step_done} of {self.steps}", flush=True)

    @torch.no_grad()
    def synthesize(self, labels: Tensor, real: Tensor) -> Tensor:
        """Lung images in [-1, 1], on the CPU, for a few maps and their real slices, whose numbers --steer tells."""
        given = encode(labels.to(self.device), real.to(self.device), self.c)
        image = self.average.eval().synthesize(given, self.stage).cpu()
        shrink = labels.shape[-1] // image.shape[-1]
        return lung_target(image, labels[..., ::shrink, ::shrink])

    def draw(self) -> None:
        """Write the panel of fixed held-out cases and the curves."""
        cases = choose_cases(self.test)
        labels, real = self.test.labels[cases], window(self.test.hu[cases], self.c)
        path = self.out / f"panel_{self.stage}_{self.step_done:06d}.png"
        write_panel(path, labels, real, self.synthesize(labels, real))
        write_curves(self.out / "curves.png", self.out / "stats.jsonl", self.method.curves)

    def open_out(self) -> None:
        """Write OUT/split.json: the data, all slices ever trained on, and those held out."""
        path, train = self.out / "split.json", {*self.train.names}
        if self.c.resume or self.c.init:
            before = path if self.c.resume else Path(self.c.init).with_name("split.json")
            train |= {*json.loads(before.read_text())["train"]} if before.exists() else set()
        if not self.c.resume:
            (self.out / "stats.jsonl").write_text("")
        if again := sorted(train & {*self.test.names}):
            raise Mistake(f"{self.c.data}: {again[0]}, held out, was trained on before: give the split of {path}")
        sides = {"data": os.path.abspath(self.c.data), "train": sorted(train), "test": self.test.names}
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(sides, indent=1) + "\n"))

    def report(self) -> None:
        """Write OUT/results.json: what was trained, and on how much. eval.py measures what it is worth."""
        parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in self.method.named_children()}
        results = {"stage": self.stage, "steps": self.steps, "slices": len(self.train.names), "parameters": parameters}
        write_atomically(self.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
        print(f"wrote {self.out}/: ckpt.pt, results.json, stats.jsonl, curves.png and panels")


def choose_cases(side: Slices, n: int = 4) -> list[int]:
    """Indices of up to n telling slices: of each patient the one with most of the scarcer lesion, then any others."""
    lesions = torch.stack([(side.labels == label).sum((1, 2, 3)) for label in (2, 3)])  # [2, N]
    ranked = (lesions.amin(0) + 1e-3 * lesions.sum(0)).argsort(descending=True, stable=True).tolist()
    best = {patient_of(side.names[i]): i for i in reversed(ranked)}.values()
    return sorted(ranked, key=lambda i: i not in best)[:n]


def write_panel(path: Path, labels: Tensor, real: Tensor, lung: Tensor) -> None:
    """Draw one row per case: map | real lung | synthetic lung | real slice | completed slice (Fig. 1, Fig. 2)."""
    lung = F.interpolate(lung, labels.shape[-2:], mode="nearest")
    greys = [lung_target(real, labels), lung, real, torch.where(labels > 0, lung, real)]
    grey = ((torch.cat(greys, 3) + 1) * 127.5).round().byte().numpy()[:, 0]  # [N, S, 4 S]
    maps = np.array(COLOURS, np.uint8)[labels[:, 0].numpy()]  # [N, S, S, 3]
    rows = np.concatenate([maps, np.stack([grey] * 3, -1)], 2).reshape(-1, 5 * labels.shape[-1], 3)
    enlarge = max(1, 256 // labels.shape[-1])
    picture = Image.fromarray(rows.repeat(enlarge, 0).repeat(enlarge, 1))
    for k, title in enumerate(("label map", "real lung", "synthetic lung", "real slice", "completed slice")):
        ImageDraw.Draw(picture).text((k * picture.width // 5 + 4, 2), title, fill="white")
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))


def write_curves(path: Path, stats: Path, curves: tuple[tuple[str, ...], ...]) -> None:
    """Plot groups of figures against the step, the stages in a row, from stats.jsonl, smoothed."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    names = [*itertools.chain(*curves)]
    with open(stats) as lines:  # keeping only numbers: there may be a million lines
        steps = np.array([[step[name] for name in names] for step in map(json.loads, lines)], np.float32)
    mean = max(1, len(steps) // 200)  # of so many steps each
    means = steps[: len(steps) // mean * mean].reshape(-1, mean, len(names)).mean(1)
    figure = Figure(figsize=(10, 6), layout="tight")
    for axes, group in zip(figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0], curves, strict=True):
        for name in group:
            axes.plot(mean * np.arange(1, len(means) + 1), means[:, names.index(name)], label=name)
        axes.legend(loc="upper right")
    axes.set_xlabel("step, the stages in a row")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


# ----------------------------------------------------- hardware-specific speed-ups, which are not part of the method


def pick_device(c: LoopConfig) -> torch.device:
    """--device, or the best one available; with CUDA this process's own GPU, shared where there are fewer."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = best if c.device == "auto" else c.device
    own = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
    return torch.device(f"cuda:{own}" if name == "cuda" else name)


def uses_bf16(c: LoopConfig, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: as --dtype says, or with auto where the device supports it natively."""
    if c.dtype != "auto":
        return c.dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def once_a_machine(load: Callable[[], Slices]) -> Slices:
    """What load() reads: one process of a machine does, and all share its memory, a file, which is gone at once."""
    if WORLD == 1:
        return load()
    path = Path(tempfile.gettempdir(), f"covidgan_{os.environ['MASTER_PORT']}.pt")
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(tuple(load()), path)
    dist.barrier()
    side = Slices(*torch.load(path, mmap=True, weights_only=True))
    dist.barrier()
    path.unlink(missing_ok=True)
    return side


def near(device: torch.device, side: Slices) -> Slices:
    """A side's slices on the GPU, if they take up at most half of what is free there; else where they are."""
    fits = device.type == "cuda" and sum(part.nbytes for part in side[1:]) < torch.cuda.mem_get_info(device)[0] / 2
    return Slices(side.names, *(part.to(device) for part in side[1:])) if fits else side


def recorded(work: Callable[[], Tensor], rng: torch.Generator) -> Callable[[], Tensor]:
    """Record work as one CUDA graph, so that small kernels need not wait for Python; returns what replays it.

    It may not look at the device, copy to it, or draw but from `rng` or the default generator. It must have run before.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        made = work()
    return lambda: (graph.replay(), made)[1]


# --------------------------------------------------------------------------------------- files in and out, command line


class Mistake(Exception):
    """A mistake of the user's: one line that names the file or option and the remedy; exit status 2."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write(temporary path) make a file that appears under its own name only when complete."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # else the name may survive a crash of the machine, and the content not
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise Mistake(f"{path}: cannot be written ({str(error).partition(chr(10))[0]})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: one plain dict of tensors and numbers (see Trainer.state). No code from the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint | {"config": checkpoint["config"]}  # a KeyError for a file of another kind
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise Mistake(f"{path}: not a checkpoint that can be read ({type(error).__name__})") from error


def restore(checkpoint: dict[str, Any], method: type[Method]) -> tuple[Method, LoopConfig]:
    """A method as its checkpoint left it, on the CPU, its generator with the average weights."""
    c = method.options(**checkpoint["config"])
    restored = method(c)
    restored.load_state_dict(checkpoint["networks"])
    restored.generator().load_state_dict(checkpoint["average"])
    return restored.eval(), c


def widened(old: Method, new: Method) -> dict[str, Tensor]:
    """Weights of `old` for `new`, which is told more: that comes after all `old` is told, at first weighed by 0."""
    weights, wanted, told = old.state_dict(), new.state_dict(), old.c.channels
    for name, weight in weights.items():
        if weight.ndim == 4 and (more := wanted.get(name, weight).shape[1] - weight.shape[1]) > 0:
            weights[name] = torch.cat([F.pad(weight[:, :told], (0, 0, 0, 0, 0, more)), weight[:, told:]], 1)
    return weights


def parse_config(argv: list[str], method: type[Method] = Covidgan) -> LoopConfig:
    """Command line to a method's options: defaults < preset < (on --resume) the checkpoint's < the options given."""
    usage = "%(prog)s [--key value ...], say epoch_len as --epoch-len 1900; -h lists all"
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    kinds = get_type_hints(method.options)
    for field in dataclasses.fields(method.options):
        choices = [*method.presets] if field.name == "preset" else get_args(kinds[field.name]) or None
        how = {"type": type(field.default), "choices": choices}
        how = {"action": argparse.BooleanOptionalAction} if kinds[field.name] is bool else how
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if given.pop("help"):
        blocks = [kind for kind in reversed(method.options.mro()) if dataclasses.is_dataclass(kind)]
        presets = f"PRESETS = {json.dumps(method.presets, indent=4)}"
        print(inspect.getmodule(method).__doc__, *map(inspect.getsource, blocks), presets, sep="\n")
        sys.exit(0)
    base = {"preset": (preset := given.pop("preset", method.options.preset))} | method.presets[preset]
    if given.get("resume"):
        out = Path(given.get("out", method.options.out))
        base = read_checkpoint(out / "ckpt.pt")["config"] | LOCAL | {"out": str(out)}
        if "data" not in given:
            base["data"] = json.loads((out / "split.json").read_text())["data"]
    c = method.options(**{**base, **given})
    check_config(c, method)
    return c


def check_config(c: LoopConfig, method: type[Method]) -> None:
    """Raise Mistake, before any work, where values cannot work together."""
    stages, multiple = ("all", *method.stages(c)), method.multiple(c)
    for holds, complaint in [
        (c.stage in stages, f"--stage {c.stage}: give one of {', '.join(stages)}"),
        (c.size % multiple == 0 and c.size >= 2 * multiple, f"--size {c.size}: give a multiple of {multiple}, or more"),
        (c.epoch_len >= c.batch, f"--epoch-len {c.epoch_len}: give the batch of {c.batch} or more"),
        (c.batch % WORLD == 0, f"--batch {c.batch}: give a multiple of the {WORLD} processes"),
        (not method.alone or WORLD == 1, f"torchrun: {method.name} trains in one process, start it without"),
    ]:
        if not holds:
            raise Mistake(complaint)


def make_phantom(c: LoopConfig) -> None:
    """Make the built-in data, at the size to train at, where it is asked for and missing."""
    script, data = Path(__file__).parent / "data" / "phantom.py", Path(c.data)
    if c.data.startswith(PHANTOM) and (not data.exists() or (data / ".unfinished").exists()):
        print(f"{data} is not there: making the built-in phantom data", flush=True)
        if subprocess.run([sys.executable, script, "--out", data, "--size", str(c.size)]).returncode:
            raise Mistake(f"{data}: could not be made, see above")


def check_out(c: LoopConfig) -> None:
    """Make OUT. Raises Mistake, before slices are read, where it holds those of a dataset, or another run."""
    (out := Path(c.out)).mkdir(parents=True, exist_ok=True)
    if (out / "maps").exists():
        raise Mistake(f"{out}: holds the slices of a dataset: give another --out")
    if (out / "ckpt.pt").exists() and not c.resume:
        raise Mistake(f"{out}: holds another run: give --resume to go on, another --out, or delete it")


def main(argv: list[str], method: type[Method] = Covidgan, trainer_of: type[Trainer] = Trainer) -> None:
    """Train a method as the command line says, with this kind of Trainer, then print and write the results."""
    c = parse_config(argv, method)
    if RANK == 0:
        check_out(c)
        make_phantom(c)
    if WORLD > 1:
        if (device := pick_device(c)).type == "cuda":
            torch.cuda.set_device(device)
        shared = device.type == "cpu" or int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
        dist.init_process_group("gloo" if shared else "nccl")  # NCCL wants a GPU each; waits for the first, above
    trainer = trainer_of(method, c)
    if c.resume:
        trainer.load(trainer.out / "ckpt.pt")
    elif c.init:
        restored, was = restore(read_checkpoint(Path(c.init)), method)
        if (was.level, was.width) != (c.level, c.width):
            raise Mistake(f"--init {c.init}: of another --level or --width: give the same")
        trainer.method.load_state_dict(widened(restored, trainer.method))
        trainer.begin(trainer.stage)
    if RANK == 0:
        trainer.open_out()
        print(f"training on {trainer.device} in {'bfloat16' if trainer.bf16 else 'float32'}", flush=True)
    trainer.run()
    if RANK == 0:
        trainer.report()
    if WORLD > 1:
        dist.destroy_process_group()


def exit_on_mistake(program: Callable[[list[str]], None]) -> None:
    """Run a program on the command line's arguments; a mistake of the user's becomes one line and exit status 2."""
    try:
        program(sys.argv[1:])
    except (Mistake, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    exit_on_mistake(main)
