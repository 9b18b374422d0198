"""The segmentation U-Net of the paper's experiments (§IV-B.2): what synthetic slices are to train."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """The segmentation U-Net of §IV-B.2 (ref [55]): four halvings, channels 64 to 1024, batch norm, concatenated skips.

    1 to 4 channels it has 31,036,676 parameters.
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
