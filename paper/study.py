"""Who moves beta, and how far? The paper does not say; covidgan.py minimises L_DFM within a clamp. Other policies:

    python -m paper.study --beta-policy entropy --data data/ct --size 128 --batch 4 --out out/entropy

trains as covidgan.py does, with its options and those of StudyConfig, and `python -m paper.tables beta` compares them.
paper/fidelity.md has what else was tried: it did not win, and went.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import covidgan


@dataclass(frozen=True)
class StudyConfig(covidgan.Config):
    """Beta's policies, besides covidgan's options."""

    beta_policy: Literal["clamp", "entropy", "min", "max"] = "clamp"  # who moves beta, and how far: see PolicyDfm
    beta_entropy: float = 0.1  # entropy: weight of the bonus that keeps beta away from 0 and 1


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
    """The paper's method with another policy for beta."""

    name, options = "covidgan-study", StudyConfig

    def __init__(self, c: StudyConfig) -> None:
        super().__init__(c)
        if c.beta_policy != "clamp":
            self.dfm = PolicyDfm(c)


if __name__ == "__main__":
    covidgan.exit_on_mistake(lambda argv: covidgan.main(argv, Study))
