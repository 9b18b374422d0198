"""COVID-19 CT image synthesis with a conditional GAN (Jiang, Chen, Loew, Ko), in one file.

A label map of an axial chest CT slice goes in, a CT slice comes out. Research only, not for diagnosis.

    python covidgan.py --stage all                              # phantom data, preset demo: minutes on two CPU cores
    python covidgan.py --stage all --data data/radiopaedia --preset paper --out out/paper
    python covidgan.py --resume --out out/paper                 # go on where a stopped run left off
    torchrun --nproc_per_node=2 covidgan.py --stage all --preset paper
    python covidgan.py -h                                       # every knob

With the paper in hand, from top to bottom:
    §IV-A   setting                     Config                  Eq. 3   L_cGAN          gan_loss_d, gan_loss_g
    Fig. 3  G1                          GlobalGenerator         Eq. 4   L_DFM, beta     Dfm
    Fig. 4  G2                          LocalGenerator          Eq. 2   objective       Covidgan.losses
    Eq. 1   DESUM, alpha                Desum                   Fig. 2  three stages    Covidgan.players
    Fig. 2  G                           Generator               Table I augmentation    augment
    Fig. 5  D1, D2, a PatchGAN each     Discriminators          Fig. 2  completion      evaluate, write_panel
Then come the loop, which trains any Method; pictures and figures; hardware-specific speed-ups; files; command line.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import inspect
import io
import itertools
import json
import math
import os
import pickletools
import re
import signal
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor, nn
from tqdm import tqdm

LABELS = ("background", "lung", "ground-glass opacity", "consolidation")
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0))  # Fig. 1: lung red, GGO blue, consolidation green
HU_OFFSET = 1024  # a stored pixel is HU + 1024, 0..4095
PARENCHYMA = -860  # HU of healthy lung between the vessels
STAGES = ("g1", "g2", "joint")  # §III-A, in order
LOCAL = {"data": "", "out": "", "device": "auto", "resume": False, "overwrite": False}  # of one machine or start
PHANTOM = "data/phantom"  # the built-in data; a missing folder whose name begins like this is generated

# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LoopConfig:
    """How a method is trained: the loop's knobs, whatever the method.

    Defaults are the paper's settings (§IV-A), except for noise, contrast and ema: preset paper has those as published,
    noise at a strength of our choice.
    """

    # run
    stage: str = "all"  # or only one of the method's stages
    preset: str = "demo"  # a named group of overrides of the defaults below, see PRESETS
    data: str = PHANTOM  # folder with images/ and maps/, and optionally split.json
    out: str = "out"  # folder for ckpt.pt, stats.jsonl, split.json, data.txt, panels, curves, results
    resume: bool = False  # go on from OUT/ckpt.pt, with its config except for the options given
    overwrite: bool = False  # discard the run in OUT
    seed: int = 0
    interval: int = 250  # steps between checkpoints, panels and curves
    # data
    size: int = 512  # pixels per side of a slice; slices are resampled to it
    level: float = -600.0  # window level, HU: §IV-A's "[-600, 1500]" read as level and width, since as a range
    width: float = 1500.0  # it would make all healthy lung black. [-1350, 150] HU <-> [-1, 1]
    n_labels: int = 4  # labels in a map, including background
    unchecked: bool = False  # accept images whose lungs do not have the HU of lung, or lie turned
    # augmentation (Table I names the kinds; the ranges are ours); lengths in pixels of a 512-pixel slice
    resize: float = 1.117  # random resize by a factor of 1 to this, then random crop
    rotate: float = 10.0  # random rotation, +- degrees
    elastic: float = 2.0  # standard deviation, in pixels, of the elastic displacements drawn
    elastic_cell: float = 24.0  # spacing of the points they are drawn at; smooth in between
    noise: float = 0.0  # std of Gaussian noise on the image, as a share of the window: no generator can match it
    # what D sees
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
    compile: bool = False  # torch.compile the networks: a minute or more to start; meant for GPUs, never timed there


@dataclass(frozen=True)
class Config(LoopConfig):
    """The paper's method: its own knobs on top of the loop's. Presets override groups of both."""

    # networks
    ngf: int = 64  # channels of G1's first layer (Fig. 3), twice as many with --n-gen 3; G2 has half
    ndf: int = 64  # channels of a discriminator's first layer
    n_blocks: int = 9  # residual blocks of G1
    n_local_blocks: int = 3  # residual blocks of G2
    n_gen: int = 2  # generators: 1 = G1 at full size, 2 = G1 and G2, 3 = one more between (Table V)
    n_dis: int = 2  # discriminators: D1 at full size, D2 at half, D3 at a quarter (Table V)
    upsample: Literal["deconv", "resize"] = "deconv"  # transposed convolution, or nearest resize and convolution
    desum: Literal["learned", "global", "fixed", "sum"] = "learned"  # alpha from F_local | from F_global | 0.5 | F + F
    dfm: Literal["learned", "d2", "fixed", "off"] = "learned"  # beta from D1 | from D2 | --beta | no feature matching
    # losses
    gan: Literal["bce", "lsgan", "hinge"] = "bce"  # Eq. 3 is bce
    lambda_dfm: float = 10.0  # weight of L_DFM in Eq. 2
    beta: float = 0.5  # with --dfm fixed: weight of D2's features in L_DFM; D1's weigh 1 - beta
    beta_policy: Literal["clamp", "entropy", "min", "max"] = "clamp"  # who moves beta, and how far: see Dfm
    beta_margin: float = 0.1  # clamp: beta stays in [margin, 1 - margin]
    beta_entropy: float = 0.1  # entropy: weight of the bonus that keeps beta away from 0 and 1
    # stages
    individual: float = 1.0  # length of stages g1 and g2 relative to the joint one's; 0: no individual training
    fix_global: int = 0  # first epochs of the joint stage, with G1 frozen (pix2pixHD's schedule would be 2 of 20)


BEST: dict[str, Any] = dict(batch=4, dfm="fixed", beta=0.1, lambda_dfm=3.0)  # for real use, see paper/fidelity.md
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(noise=0.01, contrast=0.0, ema=0.0),
    "best": BEST,
    "demo": BEST
    | dict(size=128, ngf=32, ndf=32, n_blocks=6, epochs=2, epoch_len=1900, interval=200)
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


def up(c_in: int, kind: str) -> list[nn.Module]:  # [B, 2c, H, W] -> [B, c, 2H, 2W]
    """Double the size, halve the channels. "resize" avoids the checkerboard of the paper's transposed convolution."""
    c_out = c_in // 2
    if kind == "deconv":
        grow = [nn.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, output_padding=1)]
    else:
        grow = [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(c_in, c_out, 3)]
    return [*grow, *norm_relu(c_out)]


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
        """x plus what the body makes of it."""
        return x + self.body(x)


class GlobalGenerator(nn.Module):
    """Global-information generator G1 (§III-A.1, Fig. 3): three halvings, nine residual blocks, three doublings."""

    def __init__(self, n_labels: int, ngf: int, n_blocks: int, upsample: str) -> None:
        super().__init__()
        layers = stem(n_labels, ngf)
        for k in range(3):
            layers += down(ngf * 2**k)
        layers += [ResidualBlock(ngf * 8) for _ in range(n_blocks)]
        for k in range(3):
            layers += up(ngf * 8 // 2**k, upsample)
        self.trunk = nn.Sequential(*layers)
        self.head = head(ngf)  # of G1 by itself: in the joint stage G2 takes the trunk's features

    def forward(self, onehot: Tensor) -> Tensor:  # [B, n_labels, H, W] -> [B, 1, H, W]
        """Synthesize at G1's own size, as in its individual training."""
        return self.head(self.trunk(onehot))


class LocalGenerator(nn.Module):
    """Local-details generator G2 (§III-A.2, Fig. 4). DESUM sits between its downsampling and its residual blocks.

    It halves the size once, as Fig. 4 shows, and G1's features come in there (§III-A.3), although §III-A.2 has it that
    the size is maintained throughout.
    """

    def __init__(self, n_labels: int, ngf: int, n_blocks: int, upsample: str) -> None:
        super().__init__()
        self.down = nn.Sequential(*stem(n_labels, ngf), *down(ngf))
        self.up = nn.Sequential(*[ResidualBlock(2 * ngf) for _ in range(n_blocks)], *up(2 * ngf, upsample))
        self.head = head(ngf)  # only the finest local generator's is used


class WeightingNet(nn.Module):
    """Three convolutions and two fully connected layers that give one weight in (0, 1) per image (§III-C).

    No norm layers: instance norm before global pooling would remove the very signal to weigh by. The last layer is
    initialised to zero, so that the weight starts at 0.5.
    """

    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        widths = [c_in, c, c, c]
        convs = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)]
        self.convs = nn.Sequential(*[layer for conv in convs for layer in (conv, nn.ReLU(inplace=True))])
        self.fc = nn.Sequential(nn.Linear(c, c // 2), nn.ReLU(inplace=True), nn.Linear(c // 2, 1))
        nn.init.zeros_(self.fc[-1].weight)
        nn.init.zeros_(self.fc[-1].bias)

    def forward(self, features: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B]
        """One weight per image."""
        return self.fc(self.convs(features).mean((2, 3))).float().sigmoid().squeeze(1)


class Desum(nn.Module):
    """Dynamic element-wise sum (Eq. 1): F_out = alpha F_local + (1 - alpha) F_global, one alpha per image.

    alpha is computed from F_local, or with kind "global" from F_global; "fixed" is alpha 0.5, and "sum" is the plain
    sum of "w/o DESUM" (Table V), twice the fixed one.
    """

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
    """Global-local generator G (Fig. 2): G1 at half size and G2 at full size, joined by DESUM.

    n_gen 3 puts one more local generator, with twice the channels, between G1 (then at quarter size) and G2.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        widest = c.ngf * 2 ** max(0, c.n_gen - 2)  # each finer generator has half the channels; G2 has ngf / 2
        widths = [widest // 2**k for k in range(1, c.n_gen)]
        self.g1 = GlobalGenerator(c.n_labels, widest, c.n_blocks, c.upsample)
        self.locals = nn.ModuleList([LocalGenerator(c.n_labels, w, c.n_local_blocks, c.upsample) for w in widths])
        self.desums = nn.ModuleList([Desum(2 * w, c.desum) for w in widths])

    def forward(self, onehot: Tensor, stage: str = "joint") -> tuple[Tensor, Tensor]:
        """One-hot map [B, n_labels, H, W] to an image [B, 1, H, W] in [-1, 1] and alpha [B] of the finest sum, else 1.

        Stage g1: only G1, at its own reduced size. g2: only the local generators, with F_out = F_local; a finer one
        takes in a coarser one's features, through a DESUM that only the joint stage trains. joint: all.
        """
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


# ------------------------------------------------------------------------------------------------------- discriminators


class PatchGAN(nn.Module):
    """Discriminator with a 70 x 70 receptive field per decision (§III-B): 4x4 convolutions, strides 2, 2, 2, 1, 1.

    Padding of 2, and instance norm from the second on, are pix2pixHD's: the paper names neither.
    """

    def __init__(self, c_in: int, ndf: int) -> None:
        super().__init__()
        blocks, channels = [], [c_in, ndf, 2 * ndf, 4 * ndf, 8 * ndf]
        for i, (a, b) in enumerate(pairwise(channels)):
            conv = nn.Conv2d(a, b, 4, stride=2 if i < 3 else 1, padding=2)
            norm = [nn.InstanceNorm2d(b)] if i else []
            blocks.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(8 * ndf, 1, 4, padding=2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Every block's output; the last, [B, 1, h, w], is the matrix of decisions, as logits."""
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features


class Discriminators(nn.Module):
    """Multi-resolution discriminator D (§III-B, Fig. 5): scales[0] is D1 at full size, scales[1] D2 at half."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.scales = nn.ModuleList([PatchGAN(c.n_labels + 1, c.ndf) for _ in range(c.n_dis)])

    def forward(self, onehot: Tensor, image: Tensor, first: int = 0) -> list[list[Tensor]]:
        """Features of each scale from `first` on, for image [B, 1, H, W] and its map [B, n_labels, H, W].

        The first of these sees both as they are, each further one at half the size of the one before (Fig. 5): the
        image averaged, of the map every second pixel, so that it stays a map.
        """
        judged = []
        for scale in self.scales[first:]:
            if judged:
                onehot, image = onehot[..., ::2, ::2], F.avg_pool2d(image, 2)
            judged.append(scale(torch.cat([onehot, image], 1)))
        return judged


# --------------------------------------------------------------------------------------------------------------- losses


def gan_loss_d(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """The discriminator's side of L_cGAN (Eq. 3), from logits, halved as in pix2pix."""
    if kind == "bce":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2  # -log D(m, x) - log(1 - D(m, G(m)))
    if kind == "lsgan":
        return ((real - 1).square().mean() + fake.square().mean()) / 2
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # hinge


def gan_loss_g(fake: Tensor, kind: str) -> Tensor:
    """The generator's side of L_cGAN (Eq. 3), non-saturating, from logits."""
    if kind == "bce":
        return F.softplus(-fake).mean()  # -log D(m, G(m))
    return (fake - 1).square().mean() if kind == "lsgan" else -fake.mean()  # hinge


def gan_losses(real: list[list[Tensor]], fake: list[list[Tensor]], kind: str) -> tuple[Tensor, Tensor]:
    """Both sides of L_cGAN, D's and G's, summed over the discriminators (Eq. 2), from features that end in logits."""
    verdicts = [(r[-1].float(), f[-1].float()) for r, f in zip(real, fake, strict=True)]
    return sum(gan_loss_d(r, f, kind) for r, f in verdicts), sum(gan_loss_g(f, kind) for _, f in verdicts)


class Dfm(nn.Module):
    """Dynamic feature matching (§III-C.2, Eq. 4).

    With t_k the L1 distance between the real and the synthetic pair in scale k's first three feature maps,
        L_DFM = (1 - beta) t_1 + beta t_2,
    where beta is one number per image, computed from D1's third feature map of the real pair ("d2": from D2's,
    "fixed": --beta). With more than two scales, the coarser ones share beta evenly; a single scale has weight 1. In
    stage g1, where two generators have three discriminators, D2 takes D1's place, and D3 takes D2's. "off" leaves L_DFM
    out of G's loss, and its figures are only to look at.

    It moves G, and beta's own network, but not D: Eq. 2 has it under min_G, although §III-B speaks of D's update.

    The paper does not say who moves beta. Eq. 2 puts L_DFM under min_G, but plain minimisation just moves all weight
    to the discriminator that is easier to match. --beta-policy: "clamp" minimises within [margin, 1 - margin], with a
    scaled sigmoid instead of a hard clamp, whose gradient beyond its ends is 0; "entropy" minimises with a bonus
    for staying undecided; "min" and "max" (as if D moved it) do without either, and min is clamp with a margin of 0.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.kind, self.policy, self.margin, self.bonus = c.dfm, c.beta_policy, c.beta_margin, c.beta_entropy
        self.fixed = c.beta
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
            beta = self.net(real[1 if self.kind == "d2" else 0][2].detach())  # D is not to learn what beta needs
            if self.policy == "clamp":
                beta = self.margin + (1 - 2 * self.margin) * beta
        loss_g = weighted_distance(distances, beta.detach())
        loss_beta = weighted_distance(distances.detach(), beta)
        if self.policy == "entropy":
            b = beta.clamp(1e-6, 1 - 1e-6)  # at 0 and 1 the logarithm's slope is infinite
            loss_beta = loss_beta + self.bonus * (b * b.log() + (1 - b) * (1 - b).log()).mean()
        return loss_g, -loss_beta if self.policy == "max" else loss_beta, beta


def feature_distance(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Sum over i = 1..3 of ||D^i(m, x) - D^i(m, G(m))||_1 / N_i (Eq. 4), per image: [B]."""
    pairs = zip(real[:3], fake[:3], strict=True)
    return sum((r.detach() - f).abs().mean((1, 2, 3), dtype=torch.float32) for r, f in pairs)


def weighted_distance(distances: Tensor, beta: Tensor) -> Tensor:
    """Eq. 4 over scales: of distances [scales, B], D1's weighs 1 - beta, the mean of the others beta; batch mean."""
    return ((1 - beta) * distances[0] + beta * distances[1:].mean(0)).mean()


# ------------------------------------------------------------------------------------------ the method: what is trained


@dataclass(frozen=True)
class Player:
    """One side of the game in a stage: the parameters it moves, the loss it minimises, and its Adam settings."""

    loss: str
    parameters: list[nn.Parameter]
    lr: float
    betas: tuple[float, float]
    first_epoch: int = 0  # frozen before it

    @classmethod
    def of(cls, c: LoopConfig, loss: str, modules: list[nn.Module], first_epoch: int = 0) -> "Player":
        """The player that moves all parameters of some modules, with the config's optimiser settings."""
        parameters = [p for module in modules for p in module.parameters()]
        return cls(loss, parameters, c.lr, (c.adam_beta1, c.adam_beta2), first_epoch)


class Method(nn.Module):
    """What the loop (Trainer) trains, whatever it is: networks, stages, players, losses, synthesis.

    Its networks are its child modules. The paper's method follows; a rival subclasses this in a file of its own, and
    its options subclass LoopConfig.
    """

    name: ClassVar[str]  # as checkpoints and tables call it
    options: ClassVar[type[LoopConfig]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    architecture: ClassVar[tuple[str, ...]]  # options that a checkpoint's tensors depend on: fixed on --resume
    curves: ClassVar[tuple[tuple[str, ...], ...]]  # figures of a step to watch, grouped as they are plotted
    alone: ClassVar[bool] = False  # whether a step needs the whole batch in one process, as batch norm does

    def __init__(self, c: LoopConfig) -> None:
        super().__init__()
        self.c = c

    @classmethod
    def stages(cls, c: LoopConfig) -> tuple[str, ...]:
        """The stages of a whole training, in order."""
        raise NotImplementedError

    @classmethod
    def length(cls, c: LoopConfig, stage: str) -> float:
        """Length of a stage, as a multiple of --epochs."""
        return 1.0

    @classmethod
    def multiple(cls, c: LoopConfig) -> int:
        """What height and width of a map must be multiples of."""
        raise NotImplementedError

    @classmethod
    def checks(cls, c: LoopConfig) -> list[tuple[bool, str]]:
        """Checks of its own options: whether each holds, and the complaint where it does not."""
        return []

    @classmethod
    def idle(cls, c: LoopConfig) -> dict[str, str]:
        """Options without effect, and what makes each idle: a command line that gives one is refused."""
        return {} if c.elastic else {"elastic_cell": "--elastic 0"}

    def players(self, stage: str) -> dict[str, Player]:
        """Who moves in a stage. Their losses may share a graph: it is freed after the last one's backward pass."""
        raise NotImplementedError

    def target(self, image: Tensor, labels: Tensor) -> Tensor:
        """The target for `losses`, from augmented slices [B, 1, H, W] in [-1, 1] and their maps: only the lung."""
        return lung_target(image, labels)

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """Scalars of a step, players' losses and other figures, for onehot [B, n_labels, H, W], target [B, 1, H, W]."""
        raise NotImplementedError

    def seen_by_d(self, image: Tensor, onehot: Tensor) -> Tensor:
        """What D sees of an image [B, 1, H, W] in [-1, 1]: with --contrast only its map's lung, magnified about 0.

        Within the lung an image varies by 0.2, within the parenchyma by a few hundredths, while the map's channels are
        0 or 1 and the pleura is a step of almost 1: next to these an early D is all but blind to texture, and G paints
        none. Parenchyma becomes 0, and so does all outside the lung, so that neither D nor G need care about what
        synthesis cuts off anyway. In stage g1, though, target and map are made smaller first: at their border the real
        lung is mixed with the floor outside, and some of it lies outside the smaller map.
        """
        if not self.c.contrast:
            return image
        parenchyma = window(torch.tensor(PARENCHYMA), self.c).item()
        return torch.where(onehot[:, :1] > 0, 0.0, self.c.contrast * (image - parenchyma))

    def generator(self) -> nn.Module:
        """The network to deploy: one-hot map [B, n_labels, H, W] to image [B, 1, H, W] in [-1, 1], and alpha [B]."""
        raise NotImplementedError

    def synthesize(self, onehot: Tensor, stage: str) -> Tensor:
        """The stage's image in [-1, 1] for a one-hot map, possibly smaller by an integer factor."""
        return self.generator()(onehot)[0]


class Covidgan(Method):
    """The paper's method: G1 and G2 joined by DESUM against D1 and D2 with DFM, in three stages (§III, Fig. 2)."""

    name, options, presets = "covidgan", Config, PRESETS
    architecture = (
        "n_labels",
        "ngf",
        "ndf",
        "n_blocks",
        "n_local_blocks",
        "n_gen",
        "n_dis",
        "upsample",
        "desum",
        "dfm",
    )
    curves = (("d", "gan"), ("dfm",), ("alpha", "beta"))

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.g, self.d, self.dfm = Generator(c), Discriminators(c), Dfm(c)
        init_weights(self)

    @classmethod
    def stages(cls, c: Config) -> tuple[str, ...]:
        """G1 alone, G2 alone, both (§III-A); a single generator has only the last."""
        return STAGES if c.n_gen > 1 and c.individual else STAGES[-1:]

    @classmethod
    def length(cls, c: Config, stage: str) -> float:
        """The paper's stages are equally long."""
        return 1.0 if stage == "joint" else c.individual

    @classmethod
    def multiple(cls, c: Config) -> int:
        """G1 halves three times, each finer generator once more; with G1 only, as with two."""
        return 2 ** (3 + max(1, c.n_gen - 1))

    @classmethod
    def checks(cls, c: Config) -> list[tuple[bool, str]]:
        """Rule out numbers that the networks or losses cannot be built with."""
        blocks = (c.n_blocks, c.n_local_blocks)
        return [
            (c.n_gen in (1, 2, 3), f"--n-gen {c.n_gen}: give 1, 2 or 3"),
            (c.n_dis in (1, 2, 3), f"--n-dis {c.n_dis}: give 1, 2 or 3"),
            (min(c.ngf, c.ndf) >= 4 and max(c.ngf, c.ndf) <= 1024, "--ngf, --ndf: give 4 to 1024"),
            (c.ngf % 2 == 0, f"--ngf {c.ngf}: give an even number"),
            (min(blocks) >= 1 and max(blocks) <= 100, "--n-blocks, --n-local-blocks: give 1 to 100"),
            (c.dfm != "d2" or c.n_dis > 1, "--dfm d2: needs --n-dis 2 or more"),
            (c.individual >= 0, f"--individual {c.individual:g}: give 0 or more"),
            (0 <= c.beta <= 1, f"--beta {c.beta:g}: give 0 to 1"),
            (0 <= c.beta_margin < 0.5, f"--beta-margin {c.beta_margin:g}: give 0 to below 0.5"),
            (min(c.lambda_dfm, c.beta_entropy) >= 0, "--lambda-dfm, --beta-entropy: give 0 or more"),
            (0 <= c.fix_global < c.epochs, f"--fix-global {c.fix_global}: give 0 to below --epochs {c.epochs}"),
        ]

    @classmethod
    def idle(cls, c: Config) -> dict[str, str]:
        """Options of parts that are left out."""
        idle, dfm = super().idle(c), f"--dfm {c.dfm} --n-dis {c.n_dis}"
        moved = c.dfm in ("learned", "d2") and c.n_dis > 1  # whether anything moves beta
        if c.dfm == "off":
            idle["lambda_dfm"] = dfm
        elif c.n_dis == 1:  # nothing to weigh
            idle["dfm"] = "--n-dis 1"
        if c.dfm != "fixed" or c.n_dis == 1:
            idle["beta"] = dfm
        for name, policy in {"beta_margin": "clamp", "beta_entropy": "entropy"}.items():
            if c.beta_policy != policy:
                idle[name] = f"--beta-policy {c.beta_policy}"
        if not moved:
            idle |= dict.fromkeys(("beta_policy", "beta_margin", "beta_entropy"), dfm)
        if c.n_gen == 1:
            idle |= dict.fromkeys(("desum", "n_local_blocks", "individual", "fix_global"), "--n-gen 1")
        return idle

    def first_scale(self, stage: str) -> int:
        """Index of a stage's finest discriminator: in g1 the one at G1's reduced size (the paper's D2), or the last."""
        return min(self.c.n_gen, self.c.n_dis) - 1 if stage == "g1" else 0

    def at_stage_size(self, onehot: Tensor, target: Tensor, stage: str) -> tuple[Tensor, Tensor]:
        """Map and target at the size of a stage: g1 works at G1's reduced size."""
        shrink = 2 ** (self.c.n_gen - 1) if stage == "g1" else 1
        return onehot[..., ::shrink, ::shrink], F.avg_pool2d(target, shrink)  # as G1 and D2 take them elsewhere

    def players(self, stage: str) -> dict[str, Player]:
        """D, beta's network, and what the stage trains of G: G1 (g1), the local generators (g2), all (joint)."""
        c, g = self.c, self.g
        players = {
            "d": Player.of(c, "d", [*self.d.scales[self.first_scale(stage) :]]),
            "beta": Player.of(c, "loss_beta", [self.dfm]),
        }
        if stage == "g1":
            return players | {"g1": Player.of(c, "g", [g.g1])}
        if stage == "g2":
            return players | {"g2": Player.of(c, "g", [*g.locals])}
        g1 = g.g1.trunk if len(g.locals) else g.g1  # the head is used only in stage g1
        players["g1"] = Player.of(c, "g", [g1], first_epoch=c.fix_global)
        return players | {"g2": Player.of(c, "g", [*g.locals, *g.desums])}

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """All losses of a step (Eq. 2), from one pass through G and one through D each for the real and synthetic pair.

        Eq. 2 sums L_DFM over D1 and D2, which Eq. 4 has done already: it counts once here.
        onehot [B, n_labels, H, W], target [B, 1, H, W] at full size. The players' losses share the graph: each is
        backpropagated with `inputs=` its own players' parameters, and reaches no others (see Trainer.backward).
        """
        c, first = self.c, self.first_scale(stage)
        image, alpha = self.g(onehot, stage)
        onehot, target = self.at_stage_size(onehot, target, stage)
        real, fake = (self.d(onehot, self.seen_by_d(x, onehot), first) for x in (target, image))
        loss_d, loss_gan = gan_losses(real, fake, c.gan)
        loss_dfm, loss_beta, beta = self.dfm(real, fake)
        return {
            "d": loss_d,
            "g": loss_gan + (c.lambda_dfm * loss_dfm if c.dfm != "off" else 0.0),
            "gan": loss_gan,
            "dfm": loss_dfm,
            "loss_beta": loss_beta,
            "alpha": alpha.mean(),
            "beta": beta.mean(),
        }

    def generator(self) -> Generator:
        """G, whose alpha is DESUM's."""
        return self.g

    def synthesize(self, onehot: Tensor, stage: str) -> Tensor:
        """What G makes in a stage: G1 at its own reduced size in g1, G2 alone in g2."""
        return self.g(onehot, stage)[0]


def init_weights(module: nn.Module) -> None:
    """Convolutions get N(0, 0.02) and zero bias, as in pix2pix; weighting nets keep their own initial values."""
    if isinstance(module, WeightingNet):
        return
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)
    for child in module.children():
        init_weights(child)


def build(method: type[Method], c: LoopConfig) -> Method:
    """A method's networks; the same seed gives the same weights."""
    with seeded(c.seed):
        return method(c)


def outline(method: type[Method], c: LoopConfig) -> Method:
    """A method's networks on PyTorch's meta device: shapes without weights, which take no memory."""
    with torch.device("meta"):
        return method(c)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed PyTorch's global generator, which initial weights and dropout draw from, then restore its state."""
    with torch.random.fork_rng(devices=[device] if device and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------------ data and augmentation


@dataclass
class Slices:
    """One side of a dataset, train or test, in memory: names [N], hu int16 [N, 1, S, S], labels uint8 [N, 1, S, S]."""

    names: list[str]
    hu: Tensor
    labels: Tensor
    stored: int = 0  # pixels per side in the first slice's file

    def with_lung(self) -> "Slices":
        """The slices whose map is not all background."""
        kept = (self.labels > 0).flatten(1).any(1)
        names = [name for name, keep in zip(self.names, kept.tolist(), strict=True) if keep]
        return Slices(names, self.hu[kept], self.labels[kept])

    def __str__(self) -> str:
        return f"{len(self.names)} slices of {len({*map(patient_of, self.names)})} patients"


def window(hu: Tensor, c: LoopConfig) -> Tensor:
    """HU to [-1, 1] through the window: level - width/2 and below is -1, level + width/2 and above is 1."""
    return ((hu.float() - c.level) * (2 / c.width)).clamp(-1, 1)


def lung_target(image: Tensor, labels: Tensor) -> Tensor:
    """The generator's target (Fig. 1, column 2): the lung region (labels above 0), all else at the floor of -1."""
    return torch.where(labels > 0, image, -1.0)


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
    hu: Tensor, labels: Tensor, c: LoopConfig, rng: torch.Generator, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Table I's augmentation on the device: random resize and crop, rotation, elastic transform, Gaussian noise.

    hu [B, 1, H, W] and labels uint8 [B, 1, H, W] are resampled through the same grid, the image bicubic and the map
    nearest, so that they stay aligned and a map stays a map. Given a smaller size, they are downsampled to it last, as
    slices are when read: a real image blurred by the resampling would teach D to like blur. Returns the whole windowed
    image in [-1, 1] and the labels; beyond a slice's border labels are 0 and the image repeats its edge. rng is on the
    device; draws do not depend on how a batch is later divided among processes.
    """
    n, _, height, width = hu.shape
    device = hu.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng, device=device)

    zoom, angle = uniform(1, c.resize), torch.deg2rad(uniform(-c.rotate, c.rotate))
    room = 1 - 1 / zoom  # how far the crop can move before it leaves the slice
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift_x, shift_y = uniform(-1, 1) * room, uniform(-1, 1) * room
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1).view(n, 2, 3)  # from a place in the output
    grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)  # [B, H, W, 2], -1..1
    cells = math.ceil(512 / c.elastic_cell)
    spread = 2 * c.elastic / 512  # in the grid's units, of which a slice is 2 wide
    coarse = torch.randn(n, 2, cells, cells, generator=rng, device=device) * spread
    grid = grid + F.interpolate(coarse, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    image = F.grid_sample(window(hu, c), grid, mode="bicubic", padding_mode="border", align_corners=False)
    labels = F.grid_sample(labels.float(), grid, mode="nearest", align_corners=False).byte()
    image, labels = resample(image, labels, size or height)
    image = image + 2 * c.noise * torch.randn(image.shape, generator=rng, device=device)  # the window is 2 wide
    return image.clamp(-1, 1), labels


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
        self.rank, self.world = rank(), world_size()
        self.device = pick_device(c)
        self.bf16 = uses_bf16(c, self.device)
        self.stop_signal = 0  # the one that this process got, if any
        self.all_stop = False  # whether several processes have agreed to stop
        split = read_split(Path(c.data), c.seed)
        self.train = load_slices(Path(c.data), split["train"], c, room=2)
        self.test = load_slices(Path(c.data), split["test"], c)
        self.method = on_device(build(method, c), self.device, self.bf16)
        if c.compile:
            for net in self.method.children():
                net.compile(dynamic=False)
        self.rng = torch.Generator(self.device)
        self.all_stages = method.stages(c)
        self.stages = self.all_stages if c.stage == "all" else (c.stage,)
        self.epoch_steps = c.epoch_len // c.batch
        self.begin(self.stages[0])

    def begin(self, stage: str) -> None:
        """Start a stage: networks are kept, optimisers start anew, over only the stage's parameters."""
        self.stage, self.step_done = stage, 0
        self.steps = max(1, round(self.c.epochs * self.epoch_steps * self.method.length(self.c, stage)))
        weights = self.method.generator().state_dict() if self.c.ema else {}
        self.average = {name: weight.clone() for name, weight in weights.items()}
        self.players = {name: player for name, player in self.method.players(stage).items() if player.parameters}
        self.optimizers = {
            name: torch.optim.Adam(player.parameters, player.lr, tuple(map(float, player.betas)), fused=True)
            for name, player in self.players.items()
        }

    def batch(self) -> tuple[Tensor, Tensor, list[str]]:
        """This process's share of the step's batch, target and labels [b, 1, S, S], and the whole batch's names."""
        epoch, i = divmod(self.step_done, self.epoch_steps)
        seed = [self.c.seed, self.all_stages.index(self.stage), epoch]
        order = sample_order(len(self.train.names), self.c.epoch_len, seed)
        chosen = torch.from_numpy(order[i * self.c.batch : (i + 1) * self.c.batch])
        hu, labels = self.train.hu[chosen].to(self.device), self.train.labels[chosen].to(self.device)
        self.rng.manual_seed(self.step_seed())
        image, labels = augment(hu, labels, self.c, self.rng, self.c.size)  # every process draws for the whole batch
        target = self.method.target(image, labels)
        return target[self.rank :: self.world], labels[self.rank :: self.world], [self.train.names[k] for k in chosen]

    def step_seed(self, *more: int) -> int:
        """Seed of a step's draws, a pure function of the step: a resumed run has nothing to restore, on any device."""
        numbers = [self.c.seed, self.all_stages.index(self.stage), self.step_done, *more]
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

    def step(self) -> dict[str, float]:
        """One update of every player of the stage; returns its rates and figures. Raises Mistake for a non-finite one.

        The order is pix2pixHD's: all losses from one forward pass, then all players move.
        """
        rates = self.set_learning_rates()
        target, labels, names = self.batch()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        # from 1: a 0 at its end changes no seed, and the draws would be the augmentation's
        with seeded(self.step_seed(1 + self.rank), self.device), autocast:
            losses = self.method.losses(one_hot(labels, self.c.n_labels), target, self.stage)
        values = torch.stack([*losses.values()]).tolist()  # one transfer from the device for all
        figures = self.mean_over_processes(dict(zip(losses, values, strict=True)))
        if not all(map(math.isfinite, figures.values())):
            bad = ", ".join(f"{name} {value}" for name, value in figures.items() if not math.isfinite(value))
            where = f"stage {self.stage}, step {self.step_done + 1}"
            raise Mistake(f"{where}: {bad}; stopped before any weight moved; batch: {' '.join(names)}")
        self.backward(losses)
        self.average_gradients()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()  # here, not before the backward pass: the forward pass needs the memory
        self.update_average()
        self.step_done += 1
        return {**rates, **figures}

    def set_learning_rates(self) -> dict[str, float]:
        """Set each player's learning rate for this step, 0 while it is frozen; returns them as lr_PLAYER."""
        rates = {}
        for name, player in self.players.items():
            still = self.step_done < player.first_epoch * self.epoch_steps
            rate = 0.0 if still else lr_at(self.step_done, self.steps, player.lr)
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate
            rates[f"lr_{name}"] = rate
        return rates

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Fill the gradients of each loss's players and of no others, which `inputs=` ensures in a shared graph."""
        moved: dict[str, list[nn.Parameter]] = {}
        for player in self.players.values():
            moved.setdefault(player.loss, []).extend(player.parameters)
        for k, (loss, parameters) in enumerate(moved.items(), start=1):
            if losses[loss].requires_grad:  # not beta's where a stage has one discriminator, nothing to weigh
                losses[loss].backward(inputs=parameters, retain_graph=k < len(moved))

    def update_average(self) -> None:
        """Update the moving average of the generator's weights; the decay grows, so that the start soon fades."""
        decay = min(self.c.ema, (1 + self.step_done) / (10 + self.step_done))
        weights = self.method.generator().state_dict()
        for name, mean in self.average.items():
            if mean.is_floating_point():
                mean.lerp_(weights[name], 1 - decay)
            else:  # a counter
                mean.copy_(weights[name])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the generator's average weights, where there are any, then swap its own back in."""
        if not self.average:
            yield
            return
        generator = self.method.generator()
        own = {name: weight.clone() for name, weight in generator.state_dict().items()}
        generator.load_state_dict(self.average)
        try:
            yield
        finally:
            generator.load_state_dict(own)

    def mean_over_processes(self, figures: dict[str, float]) -> dict[str, float]:
        """Mean of each figure over the processes, which also agree here whether to stop after this step."""
        if self.world == 1:
            return figures
        row = torch.tensor([*figures.values(), float(self.stop_signal)], device=self.device)
        with together():
            dist.all_reduce(row)
        *shared, stopping = (row / self.world).tolist()
        self.all_stop = stopping > 0
        return dict(zip(figures, shared, strict=True))

    def average_gradients(self) -> None:
        """Data parallelism: one all-reduce of all gradients; shares being equal, this is the batch's gradient."""
        if self.world == 1:
            return
        moved = [p for player in self.players.values() for p in player.parameters]
        grads = [p.grad for p in moved if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        with together():
            dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / self.world).split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))

    def state(self) -> dict[str, Any]:
        """The checkpoint: plain numbers and tensors, enough to go on bit for bit; no path, so that it can be shared."""
        return {
            "method": self.method.name,
            "config": {**dataclasses.asdict(self.c), **LOCAL},
            "stage": self.stage,
            "step": self.step_done,
            "steps": self.steps,
            "processes": self.world,
            "networks": self.method.state_dict(),
            "average": self.average,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def save(self) -> None:
        """Write OUT/ckpt.pt (rank 0)."""
        if self.rank == 0:
            write_atomically(self.out / "ckpt.pt", lambda path: torch.save(self.state(), path))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises Mistake where its stages, slices or tensors are not this run's."""
        checkpoint = read_checkpoint(path, type(self.method))
        self.check_held_out()
        try:
            self.check_stage(path, checkpoint)
            self.method.load_state_dict(checkpoint["networks"])
            self.begin(checkpoint["stage"])
            if self.average:  # none with --ema 0
                for name, mean in checkpoint["average"].items():
                    self.average[name].copy_(mean)
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][name])
                for group in optimizer.param_groups:  # replaced as well, but this start's options count
                    group["betas"] = optimizer.defaults["betas"]
                # Fused, Adam walks through memory: moments must lie there as their weight does on this device.
                for weight, moments in optimizer.state.items():
                    for key in ("exp_avg", "exp_avg_sq"):
                        moments[key] = torch.empty_like(weight).copy_(moments[key])
            self.step_done = checkpoint["step"]
            if not all(isinstance(checkpoint[name], int) for name in ("step", "steps")):
                raise TypeError("steps are whole numbers")
            if self.stage in self.stages:
                self.check_length(path, checkpoint["steps"])
        except (AttributeError, KeyError, RuntimeError, ValueError, TypeError) as error:
            raise Mistake(f"{path}: its tensors do not fit its config ({type(error).__name__}): train anew") from error
        if self.rank == 0:
            self.cut_stats()
        if (before := checkpoint.get("processes", self.world)) != self.world and self.rank == 0:
            told = f"{path}: trained by {before} processes, going on with {self.world}"
            print(f"note: {told}: each draws dropout and noise of its own, and sums are rounded otherwise", flush=True)

    def cut_stats(self) -> None:
        """Remove from OUT/stats.jsonl what a killed run wrote past its checkpoint; its last line may be incomplete."""
        stats, order, kept = self.out / "stats.jsonl", self.all_stages.index, []
        if not stats.exists():
            return
        for line in stats.read_text().splitlines():
            with contextlib.suppress(KeyError, TypeError, ValueError):  # for a line that is not a step's
                step = json.loads(line)
                if (order(step["stage"]), step["step"]) <= (order(self.stage), self.step_done):
                    kept.append(line + "\n")
        write_atomically(stats, lambda path: path.write_text("".join(kept)))

    def check_stage(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Raise Mistake where --stage would train a stage again, or leave one unfinished; note where it skips one."""
        stage, wanted = checkpoint["stage"], self.stages[-1]
        before = self.method.stages(type(self.c)(**checkpoint["config"]))
        if before != self.all_stages:
            told = f"trained in {' '.join(before)}, with these options in {' '.join(self.all_stages)}"
            raise Mistake(f"{path}: {told}: leave them out")
        ahead = self.all_stages.index(wanted) - self.all_stages.index(stage)
        if ahead < 0:
            raise Mistake(f"{path}: in stage {stage}, and {wanted} lies behind it: leave --stage out")
        if stage not in self.stages and checkpoint["step"] < checkpoint["steps"]:
            done = f"step {checkpoint['step']} of {checkpoint['steps']}"
            raise Mistake(f"{path}: stage {stage} is at {done}: end it first, by --stage {stage} or all")
        if stage not in self.stages and ahead > 1 and self.rank == 0:
            print(f"note: {path}: from stage {stage} straight to {wanted}", flush=True)

    def check_held_out(self) -> None:
        """Raise Mistake where a slice to be tested now was trained on before, according to OUT/split.json."""
        if not (path := self.out / "split.json").exists():
            return
        seen = {*read_sides(path)["train"]}
        if again := [name for name in self.test.names if name in seen]:
            told = f"{len(again)} slices to test were trained on before the stop, {again[0]} first"
            raise Mistake(f"{self.c.data}: {told}: give the split of {path}")

    def check_length(self, path: Path, before: int) -> None:
        """Print a note where the stage's number of steps differs from before the stop; Mistake if it would be over."""
        if before == self.steps or self.step_done >= max(before, self.steps):
            return
        told = f"{path}: stage {self.stage}, at step {self.step_done}, had {before} steps and would have {self.steps}"
        if self.step_done >= self.steps:
            raise Mistake(f"{told}: give the --batch, --epochs and --epoch-len of before, or longer ones")
        if self.rank == 0:
            print(f"note: {told}: the learning rate goes on with these", flush=True)

    def check_alike(self) -> None:
        """Raise Mistake where the processes are not at the same step, or have not read the same slices."""
        if self.world == 1:
            return
        mine = [self.all_stages.index(self.stage), self.step_done, len(self.train.names), int(self.train.hu.sum())]
        ends = torch.tensor([*mine, *(-number for number in mine)], device=self.device)
        with together():
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        if any(ends[: len(mine)] + ends[len(mine) :]):
            raise Mistake(f"{self.c.data}, {self.out}: not the same on all machines: give folders that they share")

    def stopping(self) -> bool:
        """Whether to stop after this step; all processes give the same answer, whenever each gets its signal."""
        return bool(self.stop_signal) if self.world == 1 else self.all_stop

    def run(self) -> None:
        """Train every stage asked for from the current state on, with bar, stats, checkpoints, panels and curves."""
        first = self.stages.index(self.stage) if self.stage in self.stages else 0
        with self.heeding_signals():
            for stage in self.stages[first:]:
                if stage != self.stage:
                    self.begin(stage)
                try:
                    self.run_stage()
                except OSError as error:
                    raise unwritable(self.out / "stats.jsonl", error) from error

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Defer SIGTERM and SIGINT to the end of a step."""

        def heed(received: int, _: Any) -> None:
            self.stop_signal = received

        before = {signum: signal.signal(signum, heed) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def run_stage(self) -> None:
        """Train the stage to its end. On SIGTERM or SIGINT finish the step, write the checkpoint and leave."""
        done, total = self.step_done * self.c.batch, self.steps * self.c.batch
        if self.rank == 0 and self.at_interval():
            self.draw()  # the run may have been killed between this checkpoint and its pictures
        with (
            open(self.out / "stats.jsonl" if self.rank == 0 else os.devnull, "a") as stats,
            tqdm(desc=self.stage, initial=done, total=total, unit=" samples", disable=self.rank > 0) as bar,
        ):
            while self.step_done < self.steps:
                figures = self.step()
                stats.write(json.dumps({"stage": self.stage, "step": self.step_done, **figures}) + "\n")
                bar.update(self.c.batch)
                watched = itertools.chain(*self.method.curves)
                bar.set_postfix({name: f"{figures[name]:.3f}" for name in watched}, refresh=False)
                stop = self.stopping()
                if stop or self.at_interval():
                    stats.flush()
                    self.save()
                    if self.rank == 0 and self.at_interval():
                        self.draw()
                if stop and self.step_done < self.steps:
                    raise Stopped(f"stopped at stage {self.stage}, step {self.step_done}: --resume goes on from there")

    def at_interval(self) -> bool:
        """Whether to write a checkpoint and pictures after this step."""
        return self.step_done > 0 and (self.step_done % self.c.interval == 0 or self.step_done == self.steps)

    @torch.no_grad()
    def synthesize(self, labels: Tensor) -> Tensor:
        """Lung images in [-1, 1] for labels [N, 1, S, S], floor outside the lung, at the stage's size, on the CPU."""
        self.method.eval()
        images = []
        with self.averaged():
            for part in labels.split(self.c.batch):
                part = part.to(self.device)
                image = self.method.synthesize(one_hot(part, self.c.n_labels), self.stage)
                shrink = part.shape[-1] // image.shape[-1]
                images.append(lung_target(image, part[..., ::shrink, ::shrink]).cpu())
        self.method.train()
        return torch.cat(images)

    def draw(self) -> None:
        """Write the panel of fixed held-out cases and the curves."""
        cases = choose_cases(self.test)
        labels, real = self.test.labels[cases], window(self.test.hu[cases], self.c)
        write_panel(self.out / f"panel_{self.stage}_{self.step_done:06d}.png", labels, real, self.synthesize(labels))
        write_curves(self.out / "curves.png", self.out / "stats.jsonl", self.method.curves)

    def write_split(self) -> None:
        """Write OUT/split.json, all slices ever trained on and those held out, and OUT/data.txt, their folder."""
        write_atomically(self.out / "data.txt", lambda path: path.write_bytes(os.fsencode(f"{self.c.data}\n")))
        path, own, train = self.out / "split.json", Path(self.c.data) / "split.json", {*self.train.names}
        if own.exists() and path.exists() and own.samefile(path):  # OUT is the data folder
            return
        if self.c.resume and path.exists():
            train |= {*read_sides(path)["train"]}
        sides = {"train": sorted(train), "test": self.test.names}
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(sides, indent=1) + "\n"))
        if not own.exists():
            test, rest = ({*map(patient_of, side.names)} for side in (self.test, self.train))
            told = ", ".join(sorted(test - rest)) or "the last fifth of the slices"
            print(f"no split.json in {self.c.data}: held out {told}; copy {path} there for --side")

    def report(self) -> None:
        """Print the table of results on the test side and write it as OUT/results.json."""
        c, n = self.c, len(self.test.with_lung().names)
        without_lung, (size, results) = len(self.test.names) - n, evaluate(self)
        head = {"stage": self.stage, "n": n, "without_lung": without_lung, "size": size}
        text = json.dumps({**head, **results}, indent=1)
        write_atomically(self.out / "results.json", lambda path: path.write_text(text + "\n"))
        left_out = f" ({without_lung} without lung left out)" if without_lung else ""
        print(f"\n{n} test slices of {c.data}{left_out}, at {size} x {size} pixels:\n{table(results)}\n")
        print(f"wrote {c.out}/: ckpt.pt, results.json, stats.jsonl, curves.png and panels")


def world_size() -> int:
    """Number of processes under torchrun, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank under torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


# ------------------------------------------------------------------------------------------------- pictures and figures


def choose_cases(side: Slices, n: int = 4) -> list[int]:
    """Indices of up to n telling slices: from each patient in turn, the one with most of the scarcer lesion."""
    ggo, consolidation = ((side.labels == label).sum((1, 2, 3)) for label in (2, 3))  # [N]
    worth = (torch.minimum(ggo, consolidation) + 1e-3 * (ggo + consolidation)).tolist()
    ranked = sorted(range(len(side.names)), key=lambda i: -worth[i])
    seen: Counter[str] = Counter()
    turn = {}  # 0 for each patient's best slice, 1 for the second, ...
    for i in ranked:
        patient = patient_of(side.names[i])
        turn[i] = seen[patient]
        seen[patient] += 1
    return sorted(ranked, key=turn.get)[:n]


def write_panel(path: Path, labels: Tensor, real: Tensor, lung: Tensor) -> None:
    """Draw one row per case: map | real lung | synthetic lung | real slice | completed slice.

    labels [N, 1, S, S]; real windowed slices and synthetic lungs in [-1, 1], the latter possibly at G1's smaller size.
    """
    lung = F.interpolate(lung, labels.shape[-2:], mode="nearest")
    completed = torch.where(labels > 0, lung, real)
    greys = [lung_target(real, labels), lung, real, completed]
    grey = ((torch.cat(greys, 3) + 1) * 127.5).round().byte().numpy()[:, 0]  # [N, S, 4 S]
    maps = np.array(COLOURS, np.uint8)[labels[:, 0].numpy()]  # [N, S, S, 3]
    rows = np.concatenate([maps, np.stack([grey] * 3, -1)], 2).reshape(-1, 5 * labels.shape[-1], 3)
    enlarge = max(1, 256 // labels.shape[-1])
    titles = ("label map", "real lung", "synthetic lung", "real slice", "completed slice")
    picture = under_titles(rows.repeat(enlarge, 0).repeat(enlarge, 1), titles)
    write_atomically(path, lambda temporary: iio.imwrite(temporary, picture, extension=".png"))


def under_titles(columns: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """A picture uint8 [H, W, 3] of columns of equal width, below a strip with their titles."""
    strip = Image.new("RGB", (columns.shape[1], 16))
    for k, title in enumerate(titles):
        ImageDraw.Draw(strip).text((k * columns.shape[1] // len(titles) + 4, 2), title, fill="white")
    return np.concatenate([np.asarray(strip), columns])


def write_curves(path: Path, stats: Path, curves: tuple[tuple[str, ...], ...]) -> None:
    """Plot groups of figures against the step, one stage after the other, from stats.jsonl."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    names = ("step", *itertools.chain(*curves))
    with open(stats) as lines:  # one after the other, keeping only numbers: there may be a million
        steps = np.fromiter(([json.loads(line)[n] for n in names] for line in lines), np.dtype((float, len(names))))
    if not len(steps):  # someone has removed them
        return
    points = np.array_split(steps, min(len(steps), 200))
    ends = np.cumsum([len(point) for point in points])
    figure = Figure(figsize=(10, 6), layout="tight")
    for axes, group in zip(figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0], curves, strict=True):
        for name in group:
            axes.plot(ends, [point[:, names.index(name)].mean() for point in points], label=name)
        for before in np.flatnonzero(np.diff(steps[:, 0]) <= 0):  # a stage begins
            axes.axvline(before + 1, color="grey", lw=0.5)
        axes.legend(loc="upper right")
    axes.set_xlabel("step, the stages in a row")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [N] of a and b [N, 1, H, W] in 0..1: Gaussian window of 11, sigma 1.5, K 0.01 and 0.03."""
    x = torch.arange(-5, 6, dtype=a.dtype)
    g = torch.exp(-x.square() / (2 * 1.5**2))
    g = (g / g.sum()).view(1, 1, 1, -1)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, g), g.mT)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))


def quality(real: Tensor, synthetic: Tensor) -> dict[str, float]:
    """Means of PSNR (dB, peak 1, at most 100), SSIM, RMSE, and RMSE over the real image's RMS (Table II's scale).

    Both are [N, 1, S, S] in [-1, 1] and are measured as 0..1 in float64.
    """
    a, b = (real.double() + 1) / 2, (synthetic.double() + 1) / 2
    mse = (a - b).square().mean((1, 2, 3))
    rms = a.square().mean((1, 2, 3)).sqrt().clamp_min(1e-12)
    psnr = -10 * mse.clamp_min(1e-10).log10()
    figures = {"psnr": psnr, "ssim": ssim(a, b), "rmse": mse.sqrt(), "nrmse": mse.sqrt() / rms}
    return {name: value.mean().item() for name, value in figures.items()}


def mean_paint(train: Slices, labels: Tensor, c: LoopConfig) -> Tensor:
    """A floor to beat: every label painted with its mean over the training slices, for labels [N, 1, S, S]."""
    image = lung_target(window(train.hu, c), train.labels)
    means = [image[train.labels == k].mean() if (train.labels == k).any() else -1.0 for k in range(c.n_labels)]
    return torch.tensor(means)[labels.long()]


def nearest_copy(train: Slices, labels: Tensor, c: LoopConfig) -> Tensor:
    """The other floor: the lung of the training slice whose map overlaps most, cut to labels [N, 1, S, S].

    Overlap is the share of equal labels in the union of the two lungs, on maps of 64 pixels.
    """
    ours, theirs = (F.interpolate(x.float(), (64, 64), mode="nearest").flatten(1) for x in (labels, train.labels))
    nearest = []
    for one in ours:
        lung = (one > 0) | (theirs > 0)
        overlap = ((one == theirs) & lung).sum(1) / lung.sum(1).clamp_min(1)
        nearest.append(int(overlap.argmax()))
    image, own_labels = resample(window(train.hu[nearest], c), train.labels[nearest], labels.shape[-1])
    return lung_target(lung_target(image.clamp(-1, 1), own_labels), labels)


def evaluate(trainer: Trainer) -> tuple[int, dict[str, dict[str, dict[str, float]]]]:
    """Quality of our images and of the two floors on the test side, each complete and lung-only (Table II's columns).

    Slices without lung, where there is nothing to synthesize, are left out. All is measured at the stage's size, in g1
    G1's reduced one, which is returned before the figures.
    """
    c, test, train = trainer.c, trainer.test.with_lung(), trainer.train
    ours = trainer.method.name
    images = {ours: trainer.synthesize(test.labels)}
    size = images[ours].shape[-1]
    shrink = c.size // size
    images["mean HU per label"] = mean_paint(train, test.labels, c)[..., ::shrink, ::shrink]
    images["nearest training case"] = nearest_copy(train, test.labels, c)[..., ::shrink, ::shrink]
    labels, real = test.labels[..., ::shrink, ::shrink], F.avg_pool2d(window(test.hu, c), shrink)
    return size, {
        name: {
            "complete": quality(real, torch.where(labels > 0, image, real)),
            "lung only": quality(lung_target(real, labels), image),
        }
        for name, image in images.items()
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Results as an aligned table, one row per method."""
    columns = f"{'PSNR dB':>9}{'SSIM':>8}{'RMSE':>8}{'NRMSE':>8}"
    lines = [f"{'':24}{'complete':>33}{'lung only':>33}", f"{'':24}{columns}{columns}"]
    form = "{psnr:9.2f}{ssim:8.4f}{rmse:8.4f}{nrmse:8.4f}"
    lines += [f"{name:24}" + "".join(form.format(**figures) for figures in r.values()) for name, r in results.items()]
    return "\n".join(lines)


# ----------------------------------------------------- hardware-specific speed-ups, which are not part of the method


# Gains are those of a joint step in bfloat16, two cores with AVX-512: at full widths and 256 pixels, and at the demo's.


def pick_device(c: LoopConfig) -> torch.device:
    """--device, or the best one available; one GPU per process."""
    name = c.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def uses_bf16(c: LoopConfig, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: as --dtype says, or with auto where the device supports it natively."""
    if c.dtype != "auto":
        return c.dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with_onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return with_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def memory_layout(device: torch.device, bf16: bool) -> torch.memory_format:
    """Layout of the convolutions' weights: channels last gains 8 % and 6 %, but a CPU in fp32 loses 5 %."""
    return torch.contiguous_format if device.type == "cpu" and not bf16 else torch.channels_last


class ChannelsLastNorm(nn.Module):
    """Instance norm for a CPU in bfloat16, which gains 17 % and 11 %.

    PyTorch's converts channels_last features to the other layout, and the next convolution converts them back. Batch
    norm of one image is the same arithmetic and keeps the layout. It sums all H * W numbers in one go, though, which
    costs fp32 some HU on label maps; bfloat16 is coarser than that anyway.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, c, H, W]
        """Zero mean and unit variance for each image and channel."""
        if x.dtype != torch.bfloat16:
            return F.instance_norm(x)
        return torch.cat([F.batch_norm(image, None, None, training=True) for image in x.split(1)])


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace every module of a kind below `module` by what `make` makes of it."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            replace(child, kind, make)


def on_device(method: Method, device: torch.device, bf16: bool) -> Method:
    """Move a method to a device, in the form that runs fastest there; the state dict stays as it is."""
    if device.type == "cpu" and bf16:
        replace(method, nn.InstanceNorm2d, lambda norm: norm if norm.affine else ChannelsLastNorm())
    return method.to(device, memory_format=memory_layout(device, bf16))


def keep_freed_memory() -> None:
    """Let glibc keep memory that tensors free, not return it page by page to ask for it again. Gains 17 % and 14 %.

    Other C libraries have no such setting, and are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
            libc.mallopt(parameter, 2**31 - 1)


# ----------------------------------------------------------------------------------------------------- files in and out

LARGEST = 4096  # pixels per side of a slice: a header that claims more is refused before memory is allocated
LARGEST_FILE = 2**28  # bytes of a slice, map or split
LUNG_HU = (-1000, -400)  # must contain a patient's mean HU over lung without lesions
AERATED = -500  # HU: what is lower is lung or air, what is higher is tissue
TURNS = ("as they lie", "rows reversed", "columns reversed", "both reversed", "rows and columns exchanged")
TURNED = 40  # HU of tissue that turning takes from lungs that lie wrong: 54 or more of 14 patients', 22 if right
NEARLY = 120  # of 442 from black to white: a colour as near as this to one of COLOURS means it
PNG_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error)  # from Pillow
PICKLED = r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage"  # of tensors
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # errors of a filesystem without locks


class Mistake(Exception):
    """A mistake of the user's: one line that names the file or option and the remedy; exit status 2."""

    def __str__(self) -> str:
        """On one line of readable length: a name's line breaks and control characters are escaped."""
        text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in super().__str__())
        return text if len(text) <= 900 else f"{text[:500]} ... {text[-300:]}"


def list_pngs(folder: Path) -> dict[str, Path]:
    """PNGs of a folder, also .PNG, by name without suffix; no dotfiles. Mistake for none, or two of a name."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found: dict[str, Path] = {}
    for path in files:
        if path.suffix.lower() == ".png" and found.setdefault(path.stem, path) is not path:
            raise Mistake(f"{path}: {found[path.stem].name} has the same name: rename one")
    if not found and any(path.suffix.lower() in (".jpg", ".jpeg") for path in files):
        raise Mistake(f"{folder}: JPEG, which changes grey levels and labels: give PNG")
    if not found:
        raise Mistake(f"{folder}: no PNG in it: each slice has one in images/ and one in maps/")
    return found


def read_small(path: Path) -> bytes:
    """The bytes of a file. Raises Mistake for one above LARGEST_FILE, and for no regular file, which may never end."""
    if path.exists() and not path.is_file():
        raise Mistake(f"{path}: no regular file: put the file itself there")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise Mistake(f"{path}: {size:,} bytes: no slice, map or split has above {LARGEST_FILE:,}")
    return path.read_bytes()


def read_png(path: Path) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Pillow's name of the mode, the pixels, and the palette [256, 3] if there is one, black where it is transparent.

    Raises Mistake for a file that is cut short, broken or not a PNG, and, before decoding, for one that is too large.
    """
    try:
        content = io.BytesIO(read_small(path))  # where a chunk that claims gigabytes does not get them
        with PngImageFile(content) as picture:  # Image.open would take any format, and warn about some sizes
            if not 1 <= min(picture.size) <= max(picture.size) <= LARGEST:
                raise Mistake(f"{path}: {picture.width} x {picture.height} pixels: give 1 to {LARGEST} a side")
            clear = picture.info.get("transparency", b"")  # for a palette: one index, or opacities of the first entries
            pixels, palette = np.asarray(picture), picture.getpalette("RGB")
    except PNG_ERRORS as error:
        raise Mistake(f"{path}: not a readable PNG ({error}): write it again") from error
    if palette is None:
        return picture.mode, pixels, None
    colours = np.array([*palette, *bytes(768 - len(palette))], np.uint8).reshape(256, 3)
    clear = [clear] if isinstance(clear, int) else [i for i, opacity in enumerate(clear) if opacity == 0]
    colours[[i for i in clear if i < 256]] = 0
    return picture.mode, pixels, colours


def read_image(path: Path) -> np.ndarray:
    """Read a 16-bit grey PNG of HU + 1024 as HU, int16 [H, W]. Raises Mistake for anything else."""
    mode, stored, _ = read_png(path)
    if stored.dtype != np.uint16 or stored.ndim != 2:
        raise Mistake(f"{path}: a PNG of mode {mode} is no slice: give 16-bit grey PNG of HU + {HU_OFFSET}")
    if stored.max() > 4095:
        raise Mistake(f"{path}: value {stored.max()} is above 4095: store HU + {HU_OFFSET}, clipped to 0..4095")
    return stored.astype(np.int16) - HU_OFFSET


def read_map(path: Path, n_labels: int) -> np.ndarray:
    """Read a label map, uint8 [H, W]: grey PNG of label values, or RGB or palette in exactly the paper's COLOURS.

    Where a palette holds the paper's colours, colour decides: paint programs order palettes as they like. A palette
    without them only decorates label values, unless it nearly holds them. Transparent pixels are background. Raises a
    Mistake that names the file, the value or colour and the pixel.
    """
    mode, pixels, palette = read_png(path)
    if mode not in ("P", "L", "RGB", "RGBA"):
        raise Mistake(f"{path}: a PNG of mode {mode} is no label map: give 8-bit palette, or RGB in {COLOURS}")
    if palette is not None:
        empty = np.ptp(pixels) == 0 and not palette[pixels[0, 0]].any()  # all black: no lung, whatever index black has
        if empty or {*COLOURS[1:]} & {*map(tuple, palette.tolist())} or contradicts(palette, pixels):
            pixels = palette[pixels]
    if mode == "RGBA":
        pixels = np.where(pixels[..., 3:] > 0, pixels, 0)  # an eraser leaves the colour underneath
    if pixels.ndim == 2 and pixels.max() >= n_labels:
        y, x = np.argwhere(pixels >= n_labels)[0]
        raise Mistake(f"{path}: label {pixels[y, x]} at row {y}, column {x}: the model's labels are 0..{n_labels - 1}")
    if pixels.ndim == 2:
        return pixels
    matches = [(pixels[..., :3] == colour).all(-1) for colour in COLOURS[:n_labels]]
    unknown = ~np.logical_or.reduce(matches)
    if unknown.any():
        y, x = np.argwhere(unknown)[0]
        raise Mistake(f"{path}: colour {pixels[y, x].tolist()} at row {y}, column {x} is none of {COLOURS[:n_labels]}")
    return np.argmax(matches, axis=0).astype(np.uint8)


def contradicts(palette: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether the colours used are nearly the paper's, each its own, and mean other labels than their indices."""
    used = np.unique(pixels)
    distances = np.linalg.norm(palette[used][:, None] - np.array(COLOURS, float), axis=2)  # [colours, 4]
    meant = distances.argmin(1)
    apart = len({*meant.tolist()}) == len(used)
    return apart and bool((distances.min(1) <= NEARLY).all() and (meant != used)[meant > 0].any())


def patient_of(name: str) -> str:
    """The patient of a slice: what comes before the last "_" in its name."""
    return name.rpartition("_")[0]


def names_of(side: Any) -> list[str]:
    """The names in a list, without .png.

    Raises ValueError for anything else, for a name that leaves its folder, and for one that is listed twice.
    """
    names = [re.sub(r"(?i)\.png$", "", name) for name in side] if isinstance(side, list) else [""]
    for name in names:
        if PureWindowsPath(name).name != name or name[:1] in ("", ".") or min(name) < " " or len(name) > 255:
            raise ValueError(f"{name!r:.80} is no name")
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise ValueError(f"{name!r:.80} is listed {times} times")
    return names


def read_sides(path: Path) -> dict[str, list[str]]:
    """Names under train and test in a split.json. Raises Mistake for anything else, and for a name under both."""
    try:
        split = json.loads(read_small(path).decode("utf-8-sig"))  # a byte order mark is allowed
        split = {side: names_of(split[side]) for side in ("train", "test")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last for deeply nested lists
        raise Mistake(f"{path}: lists of names under train and test are wanted ({error!r})") from error
    if both := {*split["train"]} & {*split["test"]}:
        raise Mistake(f"{path}: {min(both)} is under train and test: take it out of one")
    return split


def read_split(folder: Path, seed: int) -> dict[str, list[str]]:
    """Names of the train and test slices: from split.json, else about a fifth of the patients held out, drawn by seed.

    Where all slices are of one patient, the last fifth is held out. Raises Mistake for a missing or unusable folder.
    """
    if not (folder / "images").is_dir() or not (folder / "maps").is_dir():
        raise Mistake(f"{folder}: no images/ and maps/ in it: data/prepare.py or data/phantom.py makes such a folder")
    if (folder / ".unfinished").exists() and not (folder / "split.json").exists():
        raise Mistake(f"{folder}: its making was cut off: run the command that makes it again")
    if (path := folder / "split.json").exists():
        split = read_sides(path)
    else:
        names = sorted(list_pngs(folder / "maps"))
        patients = sorted({*map(patient_of, names)})
        held: set[str] = set()
        if len(patients) > 1:
            held = {*np.random.default_rng(seed).permutation(patients)[: max(1, len(patients) // 5)].tolist()}
        cut = len(names) - max(1, len(names) // 5)
        test = [name for i, name in enumerate(names) if (patient_of(name) in held if held else i >= cut)]
        split = {"train": [name for name in names if name not in {*test}], "test": test}
    if not split["train"] or not split["test"]:
        counts = f"{len(split['train'])} slices to train, {len(split['test'])} to test"
        raise Mistake(f"{path if path.exists() else folder}: {counts}: both need one")
    return split


def load_slices(folder: Path, names: list[str], c: LoopConfig, room: int = 1) -> Slices:
    """Read and check every slice of a side, resampled to c.size, or to `room` times that if the first is that large.

    HU are clipped to the window before, so that what resampling mixes is what is seen (§IV-A: grey images). Raises
    Mistake where a file is missing or bad, image and map differ in size, a slice is not square, no map holds lung, or
    the images do not hold HU (see check_hu).
    """
    files = {part: list_pngs(folder / part) for part in ("images", "maps")}

    def find(part: str, name: str) -> Path:
        if name not in files[part]:
            raise Mistake(f"{folder / part / name}.png: missing: each slice has an image and a map of one name")
        return files[part][name]

    stored = len(read_image(find("images", names[0])))
    side = c.size * (room if stored >= c.size * room else 1)

    def load(name: str) -> tuple[Tensor, Tensor, np.ndarray, int]:
        image_path, map_path = find("images", name), find("maps", name)
        hu, labels = read_image(image_path), read_map(map_path, c.n_labels)
        if hu.shape != labels.shape:
            raise Mistake(f"{map_path}: {labels.shape} is not its image's size {hu.shape}")
        if hu.shape[0] != hu.shape[1]:
            raise Mistake(f"{image_path}: {hu.shape} is not square: crop or pad image and map")
        seen = torch.from_numpy(hu)[None, None].float().clamp(c.level - c.width / 2, c.level + c.width / 2)
        x, y = resample(seen, torch.from_numpy(labels.copy())[None, None], side)
        return x.round().clamp(-HU_OFFSET, 4095 - HU_OFFSET).short(), y, lung_sums(hu, labels == 1), hu.max()

    with ThreadPoolExecutor() as pool:
        hu, labels, sums, peaks = zip(*pool.map(load, names), strict=True)
    slices = Slices(names, torch.cat(hu), torch.cat(labels), stored)
    if not slices.labels.any():
        raise Mistake(f"{folder}/maps: no lung in any of {len(names)} maps, {names[0]}.png first: all is background")
    if not c.unchecked:
        check_hu(folder / "images", names, np.array(sums), max(peaks))
    return slices


def lung_sums(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """Pixels of a healthy lung, bool [S, S], the sum of HU below it, and such sums turned as TURNS says; [7].

    Turned, lungs that lie right reach more tissue. In these sums all that is aerated counts alike, as much as the air
    around the body: no turn can take more from such lungs than their vessels.
    """
    if 100 * np.count_nonzero(lung) < lung.size:  # too few to tell anything
        return np.zeros(2 + len(TURNS))
    body = hu.clip(AERATED, 0)
    turned = [body, *(np.flip(body, axes) for axes in (0, 1, (0, 1))), body.T]
    return np.array([np.count_nonzero(lung), *(one[lung].sum(dtype=float) for one in (hu, *turned))])


def check_hu(folder: Path, names: Sequence[str], sums: np.ndarray, peak: int) -> None:
    """Raise Mistake where slices hold grey levels 0..255, or a patient's lungs lack the HU of lung, or are turned.

    sums [N, 7] of each slice, see lung_sums; peak: the largest HU of all. As in the files, not clipped to the window.
    """
    if peak <= 255 - HU_OFFSET:
        raise Mistake(f"{folder}: no value above 255, so grey levels, not HU + {HU_OFFSET}: convert them first")
    patients = np.array([*map(patient_of, names)])
    for patient in dict.fromkeys(patients.tolist()):
        pixels, *below = sums[patients == patient].sum(0)
        if not pixels:
            continue
        first = folder / f"{names[patients.tolist().index(patient)]}.png"
        mean, *means = (total / pixels for total in below)
        if not LUNG_HU[0] <= mean <= LUNG_HU[1]:
            told = f"mean {mean:.0f} HU where the patient's maps say lung, which has {LUNG_HU[0]} to {LUNG_HU[1]}"
            raise Mistake(f"{first}: {told}: store HU + {HU_OFFSET}, mend the maps, or overrule by --unchecked")
        if min(means) < means[0] - TURNED:
            told = f"lie on more tissue than with {TURNS[means.index(min(means))]}: they are turned"
            raise Mistake(f"{first}: the lungs of the patient's maps {told}: mend them, or give --unchecked")


def check_pickle(stream: io.BufferedReader) -> None:
    """Raise ValueError where one of the pickles that a stream begins with calls for more than tensors and plain data.

    Before 1.6, PyTorch wrote five: magic number, version, machine, what was saved, and the keys of its storages.
    """
    for _ in range(5):
        if not stream.peek(1):
            return
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not re.fullmatch(PICKLED, str(argument)):
                raise ValueError(f"calls {argument}")


def check_archive(path: Path) -> None:
    """Raise BadZipFile or ValueError where a torch.save archive unpacks to more, or check_pickle refuses its pickle."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if len({part.filename.lower() for part in parts}) < len(parts):
            raise zipfile.BadZipFile("two parts of one name")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise zipfile.BadZipFile("compressed")
        for part in parts:
            if part.filename.lower().endswith(".pkl"):
                check_pickle(io.BufferedReader(io.BytesIO(archive.read(part))))


def read_weights(path: Path) -> dict[str, Any]:
    """Read a torch.save file that holds one plain dict of tensors and numbers. Raises Mistake for anything else.

    No code from the file is run, and only what makes tensors is called: weights_only by itself would allow
    bytearray(10**11). Nor does unpacking take more memory than disk: torch.save does not compress.
    """
    try:
        with open(path, "rb") as file:
            if file.peek(4).startswith(b"PK\3\4"):  # PyTorch's test; zipfile also takes what merely ends like one
                check_archive(path)
            else:
                check_pickle(file)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a broken file the unpickler may raise anything
        raise Mistake(f"{path}: not a checkpoint that can be read ({type(error).__name__})") from error
    if not isinstance(weights, dict):
        raise Mistake(f"{path}: holds a {type(weights).__name__}, not a checkpoint's dict")
    return weights


def read_checkpoint(path: Path, method: type[Method]) -> dict[str, Any]:
    """Read a method's checkpoint (see Trainer.state). Raises Mistake for anything else, before networks are built."""
    checkpoint, kinds = read_weights(path), get_type_hints(method.options)
    config, name = checkpoint.get("config"), checkpoint.get("method")
    if isinstance(config, dict) and name not in (None, method.name):
        raise Mistake(f"{path}: a checkpoint of {str(name)!r:.80}, not of {method.name}: give another folder")
    if not isinstance(config, dict) or set(config) != set(kinds):
        differing = sorted(map(str, set(kinds) ^ set(config))) if isinstance(config, dict) else "all"
        raise Mistake(f"{path}: no checkpoint of this version of {method.name}, options differ: {differing!s:.200}")
    for option, kind in kinds.items():
        if not is_of(config[option], kind):
            raise Mistake(f"{path}: no checkpoint, its {option} is no value for that option: give another")
    try:
        c = method.options(**config)
        check_values(c, method)
        check_fit(checkpoint, method, c)
    except (Mistake, ValueError) as error:
        raise Mistake(f"{path}: its parts do not fit one another ({error}): train anew") from error
    return checkpoint


def restore(checkpoint: dict[str, Any], method: type[Method]) -> tuple[Method, LoopConfig]:
    """A method as its checkpoint left it, on the CPU, its generator with the average weights where there are any."""
    c = method.options(**checkpoint["config"])
    restored = method(c)
    restored.load_state_dict(checkpoint["networks"])
    if checkpoint.get("average"):
        restored.generator().load_state_dict(checkpoint["average"])
    return restored.eval(), c


def is_of(value: Any, kind: Any) -> bool:
    """Whether an option of this type may have this value; a string must be printable."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    return type(value) in ((int, float) if kind is float else (kind,)) and (kind is not str or value.isprintable())


def check_fit(checkpoint: dict[str, Any], method: type[Method], c: LoopConfig) -> None:
    """Raise ValueError where a checkpoint's stage and step or its tensors do not fit its config."""
    stage, step = checkpoint.get("stage", c.stage), checkpoint.get("step", 0)
    if not isinstance(stage, str) or stage not in ("all", *method.stages(c)) or type(step) is not int or step < 0:
        raise ValueError("its stage or step is none")
    whole = outline(method, c)
    for part, module in {"networks": whole, "average": whole.generator()}.items():
        tensors = checkpoint.get(part)
        if part == "average" and not tensors:  # there is none with --ema 0
            continue
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"its {part} are no tensors")
        found, wanted = (
            {name: (x.shape, x.dtype, x.layout) for name, x in state.items()}
            for state in (tensors, module.state_dict())
        )
        if found != wanted:
            raise ValueError(f"its {part} are of another architecture")


@contextlib.contextmanager
def held(out: Path, name: str = ".lock") -> Iterator[None]:
    """Make a folder and lock it, or the file in it that the lock's name stands for, so that it has one writer.

    The lock is the system's and ends with its process, however that dies and on whatever machine. Raises Mistake where
    another process holds it. On a filesystem without locks, prints a warning and goes on.
    """
    lock = FileLock(out / name, blocking=False, fallback_to_soft=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        what = out if name == ".lock" else out / name.removeprefix(".").removesuffix(".lock")
        raise Mistake(f"{what}: another run is writing to it: wait for its end, or give another --out") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            told = "written to" if out.is_dir() else "made a folder"
            raise Mistake(f"{out}: cannot be {told} ({error.strerror}): give another --out") from error
        print(f"warning: {out}: no locks on this filesystem: let no two runs write there", file=sys.stderr)
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (out / name).unlink()  # while still held: nobody can take a lock without a name
        lock.release()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write(temporary path) make a file that appears under its own name only when complete.

    Raises Mistake where it cannot be written, and leaves nothing behind.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # else the name may survive a crash of the machine, and the content not
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise Mistake, before any work, where a file could not be written."""
    if path.is_dir():
        raise Mistake(f"{path}: is a folder: give the name of a file")
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.touch()
        unfinished.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> Mistake:
    """The complaint that a file cannot be written."""
    return Mistake(f"{path}: cannot be written ({first_line(error)}): make room, or give another place")


def first_line(error: Exception) -> str:
    """An error's own words, without a stack trace."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0]


# --------------------------------------------------------------------------------------------------------- command line


class Stopped(Exception):
    """A signal asked the run to stop, and the checkpoint is written; exit status 130."""


class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line complaints."""

    def error(self, message: str) -> None:
        """Raise instead of printing the usage."""
        raise Mistake(f"{message:.300} (-h lists the options)")


class KnobParser(OneLineParser):
    """One --key value for each of a method's options, None if not given; -h shows their commented source."""

    def __init__(self, method: type[Method]) -> None:
        usage = "%(prog)s [--key value ...], say epoch_len below as --epoch-len 1900, resume as --resume"
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, usage=usage)
        self.method = method
        for name, kind in get_type_hints(method.options).items():
            option = "--" + name.replace("_", "-")
            if kind is bool:
                self.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=argparse.SUPPRESS)
            elif get_origin(kind) is Literal:
                self.add_argument(option, choices=get_args(kind), help=argparse.SUPPRESS)
            else:
                self.add_argument(option, type=kind, help=argparse.SUPPRESS)

    def format_help(self) -> str:
        """Help from the source; reading that takes a fifth of a second, so it happens only on -h."""
        blocks = [kind for kind in reversed(self.method.options.mro()) if dataclasses.is_dataclass(kind)]
        presets = f"PRESETS = {json.dumps(self.method.presets, indent=4)}"
        about = [inspect.getmodule(self.method).__doc__, *map(inspect.getsource, blocks), presets]
        self.description = "\n".join(about)
        return super().format_help()


def parse_config(argv: list[str], method: type[Method] = Covidgan) -> LoopConfig:
    """Command line to a method's options: defaults < preset < (on --resume) the checkpoint's < the options given.

    Raises Mistake for an unknown option or value, for the option of a part that is left out, and for a config that
    cannot work (see check_config).
    """
    options = vars(KnobParser(method).parse_args(argv))
    given = {name: value for name, value in options.items() if value is not None}
    preset = given.get("preset", method.options.preset)
    if preset not in method.presets:
        raise Mistake(f"--preset {preset!r:.80}: give one of {', '.join(method.presets)}")
    base = method.presets[preset]
    if given.get("resume") and given.get("overwrite"):
        raise Mistake("--resume and --overwrite: give one of them")
    if given.get("resume"):
        checkpoint = Path(given.get("out", method.options.out)) / "ckpt.pt"
        if not checkpoint.exists():
            raise Mistake(f"{checkpoint}: not there, so nothing to go on from: mend --out, or leave --resume out")
        base = read_checkpoint(checkpoint, method)["config"] | LOCAL
        base |= {"out": str(checkpoint.parent), "data": read_place(checkpoint.with_name("data.txt"))}
        if not (base["data"] or given.get("data")):
            raise Mistake(f"{checkpoint.parent}/data.txt: not there, and tells what was trained on: give --data")
        for name in ("preset", *method.architecture):  # a preset would have no effect
            if name in given and given[name] != base[name]:
                raise Mistake(f"{checkpoint} has {name} {base[name]}, not {given[name]}: leave the option out")
    config = method.options(**{**base, **given})
    check_config(config, method)
    for name, why in method.idle(config).items():
        if name in given and given[name] != getattr(method.options, name):  # a default spelled out changes nothing
            raise Mistake(f"--{name.replace('_', '-')}: has no effect with {why}: leave it out")
    return config


def read_place(path: Path) -> str:
    """The data folder, which OUT/data.txt names since a checkpoint holds no paths; "" where that file is missing."""
    return os.fsdecode(path.read_bytes()).strip() if path.is_file() else ""


def check_config(c: LoopConfig, method: type[Method]) -> None:
    """Raise Mistake, before any work, where the values cannot work together, or cannot on this machine."""
    check_values(c, method)
    number, gpus = pick_device(c).index or 0, torch.cuda.device_count()
    checks = [
        (not method.alone or world_size() == 1, f"torchrun: {method.name} trains in one process, start it without"),
        (c.batch % world_size() == 0, f"--batch {c.batch}: give a multiple of the {world_size()} processes"),
        (c.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device here, leave it out"),
        (c.device != "mps" or torch.backends.mps.is_available(), "--device mps: no Metal device here, leave it out"),
        (number < max(1, gpus), f"torchrun: {gpus} GPUs here, one for each process: give --nproc_per_node {gpus}"),
    ]
    insist(checks)


def insist(checks: Sequence[tuple[bool, str]]) -> None:
    """Raise Mistake with the complaint of the first check that does not hold."""
    for fine, complaint in checks:
        if not fine:
            raise Mistake(complaint)


def check_values(c: LoopConfig, method: type[Method]) -> None:
    """Raise Mistake where the values cannot work together on any machine."""
    for name, value in vars(c).items():
        if isinstance(value, int | float) and not abs(value) < 2**63:  # nan fails this, too
            raise Mistake(f"--{name.replace('_', '-')} {value:g}: give a number that is finite and below 2**63")
    stages, ranges = ("all", *method.stages(c)), (c.rotate, c.elastic, c.noise)
    checks = [
        *method.checks(c),
        (c.stage in stages, f"--stage {c.stage!r:.80}: give one of {', '.join(stages)}"),
        (c.width >= 0.1, f"--width {c.width:g}: give a window width of 0.1 HU or more"),
        (
            abs(c.level) + c.width / 2 <= 2**15 - 1,
            f"--level {c.level:g} --width {c.width:g}: give a window within 32,767 HU of 0, as files hold no others",
        ),
        (
            2 <= c.n_labels <= len(LABELS),
            f"--n-labels {c.n_labels}: give 2 to {len(LABELS)}, or LABELS and COLOURS more names and colours, in"
            " data/slices.py too",
        ),
        (c.batch >= 1 and c.epochs >= 1 and c.interval >= 1, "--batch, --epochs, --interval: give 1 or more"),
        (c.batch <= c.epoch_len <= 10**7, f"--epoch-len {c.epoch_len}: give the batch of {c.batch} to 10,000,000"),
        (c.lr > 0, f"--lr {c.lr:g}: give a learning rate above 0"),
        (0 <= c.adam_beta1 < 1 and 0 <= c.adam_beta2 < 1, "--adam-beta1, --adam-beta2: give 0 to below 1"),
        (0 <= c.ema < 1, f"--ema {c.ema:g}: give 0 to below 1"),
        (c.seed >= 0, f"--seed {c.seed}: give 0 or more"),
        (c.contrast >= 0, f"--contrast {c.contrast:g}: give 0 or more"),
        (1 <= c.resize <= 100, f"--resize {c.resize:g}: give 1 to 100"),
        (min(ranges) >= 0 and max(ranges) <= 512, "--rotate, --elastic, --noise: give 0 to 512"),
        (c.elastic_cell >= 4, f"--elastic-cell {c.elastic_cell:g}: give 4 pixels or more"),
    ]
    insist(checks)
    multiple = method.multiple(c)
    if c.size % multiple or not 2 * multiple <= c.size <= LARGEST:
        raise Mistake(f"--size {c.size}: give a multiple of {multiple}, from {2 * multiple} to {LARGEST}")


def prepare_out(c: LoopConfig) -> None:
    """Make OUT ready. Raises Mistake where it holds slices or another run.

    Only what has a checkpoint is a run: what a failed start has left behind is overwritten.
    """
    out = Path(c.out)
    running = (out / "ckpt.pt").exists()
    if (out / "maps").exists() and not running and not out.samefile(c.data):  # whose split.json would be overwritten
        raise Mistake(f"{out}: holds the slices of another set: give another --out")
    if running and not (c.resume or c.overwrite):
        raise Mistake(f"{out}: holds another run: give --resume to go on, --overwrite to discard it, or another --out")
    results = ("ckpt.pt", "unet.pt", "results.json", "curves.png", "panel_*.png")  # unet.pt: of paper/segment.py
    for name in (*results, "stats.jsonl", "split.json", "data.txt"):
        for unfinished in out.glob(f".{name}.tmp"):  # left by a killed run
            unfinished.unlink()
    if c.overwrite:
        for old in [path for name in results for path in out.glob(name)]:
            old.unlink()
    if not all((out / name).exists() for name in ("ckpt.pt", "stats.jsonl")):
        write_atomically(out / "stats.jsonl", lambda path: path.write_text(""))


def make_phantom(c: LoopConfig) -> None:
    """Make the built-in data, at the size to train at, where it is asked for and missing."""
    script, data, phantom = Path(__file__).parent / "data" / "phantom.py", Path(c.data), Path(PHANTOM)
    if data.parent == phantom.parent and data.name.startswith(phantom.name) and not Path(c.data, "split.json").exists():
        print(f"{c.data} is not there: making the built-in phantom data", flush=True)
        if subprocess.run([sys.executable, script, "--out", c.data, "--size", str(c.size)]).returncode:
            raise Mistake(f"{c.data}: could not be made, see above")


def on_first_rank(work: Callable[..., None], *arguments: Any) -> None:
    """Do the work once, while the other processes wait for it."""
    if rank() == 0:
        work(*arguments)
    if world_size() > 1:
        with together():
            dist.barrier()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Do what needs all processes. Raises Mistake where one has ended, which backends report as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        told = (
            "another process of this training has ended: see which and why; --resume goes on from the last checkpoint"
        )
        raise Mistake(f"{told} ({first_line(error)})") from error


def first_to_tell() -> bool:
    """Whether no other process has yet told why all of them end: torchrun's processes share its store."""
    if world_size() == 1:
        return True
    place = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"told in start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # the store has gone with the process that held it
        return True


def main(argv: list[str], method: type[Method] = Covidgan, trainer_of: type[Trainer] = Trainer) -> None:
    """Train a method as the command line says, with this kind of Trainer, then print and write the results."""
    c = parse_config(argv, method)
    keep_freed_memory()
    if world_size() > 1:
        device = pick_device(c)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with together():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    on_first_rank(make_phantom, c)
    trainer = trainer_of(method, c)
    with contextlib.ExitStack() as until_the_end:
        on_first_rank(until_the_end.enter_context, held(Path(c.out)))
        on_first_rank(prepare_out, c)
        train(trainer)
    if world_size() > 1:
        dist.destroy_process_group()


def train(trainer: Trainer) -> None:
    """Train to the end, from OUT's checkpoint if there is one, and report."""
    c, checkpoint = trainer.c, trainer.out / "ckpt.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    trainer.check_alike()
    if trainer.rank == 0:
        stored = "" if trainer.train.stored == c.size else f", {trainer.train.stored} in the files"
        print(f"{c.data}: {trainer.train} to train, {trainer.test} to test, at {c.size} pixels{stored}")
        trainer.write_split()
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in trainer.method.named_children()}
        told = ", ".join(f"{name} {n:,}" for name, n in sizes.items())
        print(f"parameters: {told}; {trainer.device}, {'bfloat16' if trainer.bf16 else 'float32'}", flush=True)
    trainer.run()
    if trainer.rank == 0:
        trainer.report()


def exit_on_mistake(program: Callable[[list[str]], None]) -> None:
    """Run a program on the command line's arguments; a mistake of the user's becomes one line and exit status 2."""
    if world_size() == 1:  # with several, one that waits for the others would not react
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: nothing half-written is left
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  to the end
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a character that the terminal lacks stops nothing
    try:
        program(sys.argv[1:])
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
    except (Mistake, OSError) as mistake:
        of_output = isinstance(mistake, OSError) and not mistake.filename and drop_output()
        leave(2, f"error: {'standard output: ' if of_output else ''}{mistake}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        leave(2, f"error: out of memory ({first_line(error)}): less --batch, --size or --ngf needs less")
    except (Stopped, KeyboardInterrupt) as stop:
        sys.unraisablehook = lambda _: None  # objects interrupted while being made complain when deleted
        leave(130, f"\n{str(stop) or 'stopped'}")
    finally:
        drop_output()


def drop_output() -> bool:
    """Whether standard output can't be written to; what is left for it is then dropped, or Python would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def leave(status: int, line: str) -> None:
    """End the process with a line that says why, unless another process has said it already."""
    if world_size() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which has seen one die: not before the line
    if first_to_tell():
        print(line, file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on any device: PyTorch has an exception type of its own only for CUDA."""
    words = ("out of memory", "can't allocate memory", "alloc_cpu")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


if __name__ == "__main__":
    exit_on_mistake(main)
