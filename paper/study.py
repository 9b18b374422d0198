"""What makes training paint believable lungs: switches that the paper does not have, tried in paper/fidelity.md.

    python -m paper.study --spectral --data data/ct --size 128 --batch 4 --epochs 2 --epoch-len 4200 --out out/spectral

trains as covidgan.py does, with its options and those of StudyConfig. What won is in covidgan.py itself; what is here
has not won, or has not been fully tried yet.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import covidgan


@dataclass(frozen=True)
class StudyConfig(covidgan.Config):
    """The switches under study, all off, besides covidgan's."""

    spectral: bool = False  # spectral norm on D's convolutions (Miyato et al., 2018)
    r1: float = 0.0  # weight of the gradient penalty on real slices (Mescheder et al., 2018), every R1_EVERY steps
    noise_inputs: int = 0  # channels of Gaussian noise that G sees besides the map; zero in synthesis
    position: bool = False  # two more channels for G: where in the slice a pixel lies, -1..1 across and down
    beta_policy: Literal["clamp", "entropy", "min", "max"] = "clamp"  # who moves beta, and how far: see PolicyDfm
    beta_entropy: float = 0.1  # entropy: weight of the bonus that keeps beta away from 0 and 1
    flip: bool = False  # mirror half of the samples left to right, though no heart is on the right


R1_EVERY = 16  # steps: lazy regularisation, its weight multiplied by this (Karras et al., 2020)


class WidenedGenerator(covidgan.Generator):
    """G with more input channels than labels: position, and noise in training."""

    def __init__(self, c: StudyConfig) -> None:
        super().__init__(dataclasses.replace(c, n_labels=c.n_labels + 2 * c.position + c.noise_inputs))
        self.position, self.noise_inputs = c.position, c.noise_inputs

    def forward(self, onehot: Tensor, stage: str = "joint") -> tuple[Tensor, Tensor]:
        inputs, empty = [onehot], torch.zeros_like(onehot[:, :1])
        if self.position:  # by cumulative sums, since the exported graph takes maps of any size
            counts = [(empty + 1).cumsum(axis) - 1 for axis in (2, 3)]
            inputs += [2 * count / count.amax((2, 3), keepdim=True) - 1 for count in counts]
        inputs += [torch.randn_like(empty) if self.training else empty for _ in range(self.noise_inputs)]
        return super().forward(torch.cat(inputs, 1), stage)


class PolicyDfm(covidgan.Dfm):
    """DFM whose beta may reach 0 and 1: "min" minimises L_DFM, "max" is as if D moved it.

    "entropy" minimises with a bonus for staying undecided.
    """

    def __init__(self, c: StudyConfig) -> None:
        super().__init__(dataclasses.replace(c, beta_margin=0.0))
        self.policy, self.bonus = c.beta_policy, c.beta_entropy

    def forward(self, real: list[list[Tensor]], fake: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        loss_g, loss_beta, beta = super().forward(real, fake)
        if self.policy == "entropy":
            b = beta.clamp(1e-6, 1 - 1e-6)  # at 0 and 1 the logarithm's slope is infinite
            loss_beta = loss_beta + self.bonus * (b * b.log() + (1 - b) * (1 - b).log()).mean()
        return loss_g, -loss_beta if self.policy == "max" else loss_beta, beta


class Study(covidgan.Covidgan):
    """The paper's method with the switches under study."""

    name, options = "covidgan-study", StudyConfig

    def __init__(self, c: StudyConfig) -> None:
        super().__init__(c)
        if c.position or c.noise_inputs:
            self.g = WidenedGenerator(c)
            covidgan.init_weights(self.g)
        if c.beta_policy != "clamp":
            self.dfm = PolicyDfm(c)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # in the checkpoint: R1 keeps its turns
        if c.spectral:  # after initialisation, which could no longer reach the weights
            for layer in [*self.d.modules()]:
                if isinstance(layer, nn.Conv2d):
                    spectral_norm(layer)

    def losses(self, onehot: Tensor, target: Tensor, stage: str) -> dict[str, Tensor]:
        """As the paper's, with some samples mirrored if asked for, and R1 in its turn."""
        if self.c.flip:
            mirrored = (torch.rand(len(onehot), device=onehot.device) < 0.5).view(-1, 1, 1, 1)
            onehot, target = (torch.where(mirrored, x.flip(3), x) for x in (onehot, target))
        losses = super().losses(onehot, target, stage)
        self.steps += 1
        if self.c.r1 and self.steps % R1_EVERY == 0:
            losses["d"] = losses["d"] + R1_EVERY * self.c.r1 / 2 * self.slope(onehot, target, stage)
        return losses

    def slope(self, onehot: Tensor, target: Tensor, stage: str) -> Tensor:
        """Mean over the batch of the squared gradient of D's mean verdicts with respect to the real slice."""
        shrink = 2 ** (self.c.n_gen - 1) if stage == "g1" else 1  # as in Covidgan.losses
        onehot, target = onehot[..., ::shrink, ::shrink], F.avg_pool2d(target, shrink)
        real = self.seen_by_d(target, onehot).requires_grad_()
        judged = self.d(onehot, real, self.first_scale(stage))
        verdicts = sum(features[-1].float().mean((1, 2, 3)).sum() for features in judged)
        (gradient,) = torch.autograd.grad(verdicts, real, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()


if __name__ == "__main__":
    covidgan.exit_on_mistake(lambda argv: covidgan.main(argv, Study))
