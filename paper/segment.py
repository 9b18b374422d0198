"""The segmentation U-Net of the paper's experiments (§IV-B.2), which synthetic slices are meant to train.

    python -m paper.segment --data data/radiopaedia --size 128 --out out/unet    # preset demo: a quarter of the widths
    python -m paper.segment --data data/radiopaedia --preset paper               # as published, 512 x 512
    python -m paper.segment --resume --out out/unet                              # go on where a stopped run left off
    python export.py out/unet/unet.pt -o unet.onnx                               # for eval.py --unet

Its dataset may hold real and synthetic slices side by side. Loop, augmentation and checkpoints are covidgan.py's;
OUT/unet.pt is the trained network, OUT/panel_whole_*.png has slice | map | what it finds, of the test side.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import covidgan
from data.slices import coloured, png, windowed


class UNet(nn.Module):
    """The segmentation U-Net of §IV-B.2 (ref [55]): four halvings, channels 64 to 1024, concatenated skips.

    Batch norm, and padding that keeps the size, are ours: the original has neither, and the paper names neither.
    From 1 to 4 channels, it has 31,036,676 parameters.
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


def dice_loss(logits: Tensor, onehot: Tensor) -> Tensor:
    """1 minus the labels' mean soft Dice over a batch, logits and one-hot map [B, n_labels, H, W]; 0 is perfect."""
    probability = logits.softmax(1)
    both, sizes = (probability * onehot).sum((0, 2, 3)), (probability + onehot).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (sizes + 1)).mean()  # + 1: a label that is absent, and not found, scores 1


def relit(image: Tensor, c: "UNetConfig") -> Tensor:
    """A slice in [-1, 1] as another scanner might have shown it: gamma, gain and shift, of each slice its own."""
    if not (c.gamma or c.intensity):
        return image
    exponent, gain, shift = 2 * torch.rand(3, len(image), 1, 1, 1, device=image.device) - 1  # the loop has seeded it
    grey = ((image + 1) / 2) ** (c.gamma * exponent).exp()
    return (2 * (grey * (1 + c.intensity * gain) + c.intensity * shift) - 1).clamp(-1, 1)


@dataclass(frozen=True)
class UNetConfig(covidgan.LoopConfig):
    """The U-Net's knobs besides the loop's. The paper does not say how it was trained: these are common values."""

    out: str = "out/unet"
    channels: int = 64  # of the first level; each further one has twice as many
    dice: float = 1.0  # weight of a soft Dice loss added to cross entropy, which alone finds no consolidation
    noise: float = 0.01  # Table I names it, and here nothing has to match it
    intensity: float = 0.0  # random gain, and shift as a share of the window, each by up to this
    gamma: float = 0.0  # random exponent of the grey level, by up to e to this
    lr: float = 1e-3
    adam_beta1: float = 0.9
    ema: float = 0.0


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": dict(size=128, channels=16, batch=4, epochs=2, epoch_len=1600, interval=200),
    "tiny": dict(data=f"{covidgan.PHANTOM}64", size=64, channels=4, batch=4, epochs=1, epoch_len=80, interval=10),
}


class Segmentation(covidgan.Method):
    """The U-Net as a method of covidgan's loop: one player, one stage. Its target is the map, its input the slice."""

    name, options, presets, alone = "unet", UNetConfig, PRESETS, True
    curves = (("loss",),)
    layout = torch.channels_last  # of 8 channels a step takes two thirds of the time

    def __init__(self, c: UNetConfig) -> None:
        super().__init__(c)
        self.unet = UNet(c.n_labels, c.channels)

    @classmethod
    def stages(cls, c: UNetConfig) -> dict[str, float]:
        return {"whole": 1.0}

    @classmethod
    def multiple(cls, c: UNetConfig) -> int:
        return 16

    def players(self, stage: str) -> dict[str, covidgan.Player]:
        return {"unet": covidgan.Player.of(self.c, "loss", [self.unet])}

    def target(self, image: Tensor, labels: Tensor) -> Tensor:
        return image

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """Cross entropy of a step, and soft Dice where wanted, for onehot [B, n_labels, H, W], slice [B, 1, H, W]."""
        logits = self.unet(relit(target, self.c)).float()
        loss = F.cross_entropy(logits, onehot.argmax(1))
        return {"loss": loss + self.c.dice * dice_loss(logits, onehot) if self.c.dice else loss}

    def generator(self) -> nn.Module:
        return self.unet


def restored(checkpoint: dict[str, Any]) -> UNet:
    """The network of an OUT/unet.pt: {"kind": "unet", "config": {n_labels, width, level, window}, "unet": weights}."""
    unet = UNet(checkpoint["config"]["n_labels"], checkpoint["config"]["width"])
    unet.load_state_dict(checkpoint["unet"])
    return unet.eval()


@torch.no_grad()
def probabilities(trained: Path, hu: np.ndarray) -> np.ndarray:
    """Of each label at each pixel, float32 [N, n_labels, H, W], by an OUT/unet.pt, of slices in HU [N, H, W]."""
    made = torch.load(trained, weights_only=True)
    unet, config = restored(made), made["config"]
    c = covidgan.LoopConfig(level=config["level"], width=config["window"])
    slices = covidgan.window(torch.from_numpy(hu)[:, None], c)
    return torch.cat([unet(part).softmax(1) for part in slices.split(8)]).numpy()


class SegmentationTrainer(covidgan.Trainer):
    """The loop, for a network that makes a map from a slice; panels show that map."""

    @torch.no_grad()
    def segment(self, hu: Tensor) -> Tensor:
        """Labels uint8 of slices in HU, both [N, 1, S, S], on the CPU."""
        self.average.eval()
        parts = [covidgan.window(part.to(self.device), self.c) for part in hu.split(self.c.batch)]
        return torch.cat([self.average.unet(part).argmax(1, keepdim=True).cpu() for part in parts]).byte()

    def draw(self) -> None:
        """Write the panel of fixed held-out cases, one row each: slice | map | what is found; and the curves."""
        cases = covidgan.choose_cases(self.test)
        hu, labels = self.test.hu[cases], self.test.labels[cases]
        rows = []
        for one, truth, found in zip(hu[:, 0], labels[:, 0], self.segment(hu)[:, 0], strict=True):
            grey = windowed(one.numpy(), self.c.level, self.c.width)
            tiles = [np.stack([grey] * 3, 2), coloured(truth.numpy()), coloured(found.numpy())]
            rows.append(np.concatenate(tiles, 1))
        path = self.out / f"panel_{self.stage}_{self.step_done:06d}.png"
        covidgan.write_atomically(path, lambda temporary: temporary.write_bytes(png(np.concatenate(rows))))
        covidgan.write_curves(self.out / "curves.png", self.out / "stats.jsonl", self.method.curves)

    def report(self) -> None:
        """Write OUT/unet.pt, of which export.py makes unet.onnx, and OUT/results.json."""
        c, weights = self.c, {name: weight.cpu() for name, weight in self.average.unet.state_dict().items()}
        config = {"n_labels": c.n_labels, "width": c.channels, "level": c.level, "window": c.width}
        made = {"kind": "unet", "config": config, "unet": weights}
        covidgan.write_atomically(self.out / "unet.pt", lambda path: torch.save(made, path))
        parameters = sum(p.numel() for p in self.method.parameters())
        results = {"parameters": parameters, "samples": self.steps * c.batch, "slices": len(self.train.names)}
        text = json.dumps(results | {"config": {**dataclasses.asdict(c), **covidgan.LOCAL}}, indent=1) + "\n"
        covidgan.write_atomically(self.out / "results.json", lambda path: path.write_text(text))
        print(f"wrote {self.out}/: unet.pt, ckpt.pt, stats.jsonl, curves.png and panels")


def main(argv: list[str]) -> None:
    """Train the U-Net as the command line says, and write OUT/unet.pt and OUT/results.json. Raises Mistake."""
    covidgan.main(argv, Segmentation, SegmentationTrainer)


if __name__ == "__main__":
    covidgan.exit_on_mistake(main)
