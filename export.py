"""A trained checkpoint to one ONNX file that needs no framework: label map in, HU out.

    python export.py ckpt.pt                        # generator.onnx
    python export.py ckpt.pt --fp16                 # half the size, for GPUs; norms stay in fp32
    python export.py unet.pt                        # unet.onnx, for eval.py --unet

The file is written only when it passes: onnx.checker, then PyTorch against ONNX Runtime at batch 1 and 3 and two sizes.

The generator's contract, all that a client in any language needs:
    input   map    uint8   [N, H, W]   labels 0..3; N, H, W are free, H and W multiples of the metadata's `multiple`
    output  ct     int16   [N, H, W]   HU; the window's floor outside the lung
    output  alpha  float32 [N]         what DESUM weighed G2's features with (Eq. 1)
    metadata, strings: kind, contract, labels, colours, level, width, size, multiple, precision, checkpoint_sha256,
    licence
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import warnings
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


def replace_norms(module: nn.Module, norm: type[nn.Module]) -> None:
    """Put `norm` in the place of every covidgan.InstanceNorm below a module."""
    for name, child in module.named_children():
        if isinstance(child, covidgan.InstanceNorm):
            setattr(module, name, norm())
        else:
            replace_norms(child, norm)


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


# ------------------------------------------------------------------------------------------------ export


def to_onnx(module: nn.Module, example: Tensor, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """Trace a module of one input [N, H, W] into an ONNX model with N, H and W free, without paths of this machine."""
    axes = {axis: torch.export.Dim.DYNAMIC for axis in range(3)}
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


def generator_difference(
    model: onnx.ModelProto, generator: covidgan.Generator, c: covidgan.Config
) -> tuple[int, float]:
    """Largest difference of ONNX Runtime from PyTorch over batches 1 and 3 at two sizes: in HU, and in alpha.

    `generator` is the one that was trained, in fp32 and with its own norms.
    """
    reference, session, worst_hu, worst_alpha = DeployedGenerator(generator, c).eval(), session_of(model), 0, 0.0
    multiple = covidgan.size_multiple(c)
    for n in (1, 3):
        for height, width in ((c.size, c.size), (c.size + multiple, 2 * multiple)):
            maps = example_map(n, height, width, c.n_labels)
            with torch.no_grad():
                hu, alpha = reference(torch.from_numpy(maps))
            ours_hu, ours_alpha = session.run(["ct", "alpha"], {"map": maps})
            worst_hu = max(worst_hu, int(np.abs(ours_hu.astype(int) - hu.numpy()).max()))
            worst_alpha = max(worst_alpha, float(np.abs(ours_alpha - alpha.numpy()).max()))
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


def save_checked(model: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    """Add the metadata, check the model, and write it so that it is either whole or absent."""
    onnx.helper.set_model_props(model, metadata)
    model.producer_name = "covidgan"
    onnx.checker.check_model(model, full_check=True)
    covidgan.write_atomically(path, lambda temporary: onnx.save(model, temporary))


def export_generator(checkpoint: dict, digest: str, path: Path, fp16: bool) -> str:
    """Write the generator of a checkpoint; returns a line on the file. Raises Mistake when it differs from PyTorch."""
    c = covidgan.Config(**checkpoint["config"])
    generators = [covidgan.build_networks(c)["g"].eval() for _ in range(2)]  # one to trace, one to compare with
    for generator in generators:
        generator.load_state_dict(checkpoint["g"])
    traced, reference = generators
    if len(traced.locals):
        del traced.g1.head  # drawn on in stage g1 alone
    replace_norms(traced, NativeNorm if fp16 else TwoStageNorm)
    deployed = DeployedGenerator(traced.half() if fp16 else traced, c)
    example = torch.from_numpy(example_map(2, c.size, c.size, c.n_labels))
    model = to_onnx(deployed, example, ["map"], ["ct", "alpha"])
    metadata = {
        "kind": "generator",
        "contract": CONTRACT,
        "labels": json.dumps(covidgan.LABELS[: c.n_labels]),
        "colours": json.dumps(covidgan.COLOURS[: c.n_labels]),
        "level": str(c.level),
        "width": str(c.width),
        "size": str(c.size),
        "multiple": str(covidgan.size_multiple(c)),
        "precision": "float16" if fp16 else "float32",
        "checkpoint_sha256": digest,
        "licence": LICENCE,
    }
    hu, alpha = generator_difference(model, reference, c)
    limit = MAX_HU_FP16 if fp16 else MAX_HU
    if hu > limit:
        raise Mistake(f"{path}: not written: ONNX Runtime differs from PyTorch by {hu} HU, more than {limit}")
    save_checked(model, path, metadata)
    return f"at most {hu} HU (limit {limit}) and {alpha:.1e} in alpha from PyTorch, batch 1 and 3, two sizes"


def export_unet(checkpoint: dict, digest: str, path: Path) -> str:
    """Write a U-Net's checkpoint {"kind": "unet", "config": {n_labels, width, level, window}, "unet": weights}."""
    config = checkpoint["config"]
    unet = UNet(config["n_labels"], config["width"])
    unet.load_state_dict(checkpoint["unet"])
    deployed = DeployedUNet(unet, config["level"], config["window"]).eval()
    model = to_onnx(deployed, torch.zeros(2, 64, 64, dtype=torch.int16), ["ct"], ["map"])
    differ = unet_difference(model, deployed, multiple=16)
    if differ > 1e-3:
        raise Mistake(f"{path}: not written: ONNX Runtime labels {differ:.2%} of the pixels otherwise than PyTorch")
    labels = json.dumps(covidgan.LABELS[: config["n_labels"]])
    metadata = {"kind": "unet", "contract": CONTRACT, "labels": labels, "multiple": "16", "licence": LICENCE}
    save_checked(model, path, {**metadata, "checkpoint_sha256": digest})
    return f"{differ:.4%} of the pixels labelled otherwise than by PyTorch, batch 1 and 3, two sizes"


# ------------------------------------------------------------------------------------------------ main


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant: a file, a run's folder, or a name that stands in the default run's folder, `out`."""
    for candidate in (path, path / "ckpt.pt", Path(covidgan.Config.out) / path):
        if candidate.is_file():
            return candidate
    raise Mistake(f"{path}: no such checkpoint: python covidgan.py --stage all writes {covidgan.Config.out}/ckpt.pt")


def main(argv: list[str]) -> None:
    """Export what the command line names."""
    parser = covidgan.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt of covidgan.py, its folder, or a U-Net's checkpoint")
    parser.add_argument("-o", "--out", type=Path, help="file to write: generator.onnx or unet.onnx by default")
    parser.add_argument("--fp16", action="store_true", help="16-bit weights and features, for GPUs")
    args = parser.parse_args(argv)
    source = find_checkpoint(args.checkpoint)
    checkpoint, digest = covidgan.read_weights(source), hashlib.sha256(source.read_bytes()).hexdigest()
    if checkpoint.get("kind") == "unet":
        path = args.out or Path("unet.onnx")
        line = export_unet(checkpoint, digest, path)
    else:
        path = args.out or Path("generator.onnx")
        line = export_generator(covidgan.read_checkpoint(source), digest, path, args.fp16)
    print(f"{source} -> {path}, {path.stat().st_size / 1e6:.1f} MB: {line}")


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
