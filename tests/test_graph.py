"""A step can be recorded as a CUDA graph: it neither waits nor copies, and what differs by step is fed to it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import covidgan
from covidgan import Covidgan
from paper import segment
from paper.methods import METHODS

SMALL = dict(size=64, batch=2, ngf=4, ndf=4, channels=4, n_blocks=1, n_local_blocks=1, resize=1.1, epochs=1)
STEERED = dict(steer=True, draws=30.0)  # all that a generator may be told
aten = torch.ops.aten
# to look at a value, sizes that hang on values, and constants that come from the host
FORBIDDEN = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.lift_fresh}
FORBIDDEN |= {aten.scalar_tensor, aten.index, aten._pin_memory, aten.unique_dim, aten._unique2}


class Watch(TorchDispatchMode):
    """Notes every operation that would make a GPU wait, or take from the host."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call.overloadpacket in FORBIDDEN:
            self.seen.add(str(call))
        return call(*args, **(kwargs or {}))


@pytest.fixture
def make(toy, tmp_path):
    def trainer(method, kind=covidgan.Trainer, **more):
        small = {name: value for name, value in (SMALL | more).items() if name in method.options.__dataclass_fields__}
        out = str(tmp_path / f"out{len([*tmp_path.iterdir()])}")
        return kind(method, method.options(data=str(toy.folder), out=out, device="cpu", epoch_len=12, **small))

    return trainer


CASES = [(Covidgan, {}), (Covidgan, STEERED), (segment.Segmentation, dict(gamma=0.1, intensity=0.1))]
CASES += [(method, dict(steer=True)) for method in METHODS.values()]


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda one: getattr(one, "name", None) or ",".join(one))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_looks_at_the_device_or_copies_to_it(make, method, options, dtype, monkeypatch):
    trainer = make(method, dtype=dtype, **options)
    for stage in trainer.stages:
        trainer.begin(stage)
        trainer.step()
        trainer.feed()
        with Watch() as watch, monkeypatch.context() as patch:
            for look in ("tolist", "numpy", "cpu"):  # on a CPU no operation
                patch.setattr(torch.Tensor, look, lambda *_, look=look: watch.seen.add(look))
            trainer.work()
        assert watch.seen == set(), stage


class Recording(covidgan.Trainer):
    """Like a graph, its work from a stage's fourth step on is that of the fourth, but for what lies where it lay."""

    def begin(self, stage):
        super().begin(stage)
        self.do_work, self.lay = self.repeat, None

    def repeat(self):
        now, rates = self.step_done, [group["lr"] for one in self.optimizers.values() for group in one.param_groups]
        if now >= 3:
            lies = [x.data_ptr() for x in (*self.fed, *rates, self.fade, *self.method.parameters())]
            self.lay, self.step_done = self.lay or lies, 3
            assert lies == self.lay
        made = self.work()
        self.step_done = now
        return made


@pytest.mark.parametrize(("method", "options"), CASES[:3], ids=["plain", "steered", "U-Net"])
def test_a_step_hangs_on_nothing_but_what_it_is_fed(make, method, options):
    runs = [make(method, kind, **options) for kind in (covidgan.Trainer, Recording)]
    for stage in runs[0].stages:
        for run in runs:
            run.begin(stage)
        for _ in range(6):
            assert runs[0].step() == runs[1].step()
    ours, theirs = (run.average.state_dict() for run in runs)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_figures_are_looked_at_later_and_what_was_not_finite_moves_no_weight(make):
    class Poisoned(Covidgan):
        def losses(self, *batch):
            return {name: loss * self.poison for name, loss in super().losses(*batch).items()}

    trainer = make(Poisoned)
    trainer.method.poison = 1.0
    trainer.update()
    before = {name: weight.clone() for name, weight in trainer.method.state_dict().items()}
    trainer.method.poison = float("inf")
    trainer.update()
    trainer.update()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.method.state_dict().items())
    with pytest.raises(covidgan.Mistake, match="stage g1, step 2: not finite"):
        trainer.look()


def test_looked_at_every_few_steps_a_run_tells_each_of_them(make):
    class Seldom(covidgan.Trainer):
        def __init__(self, *given):
            super().__init__(*given)
            self.look_every = 4

    told = []
    for kind in (covidgan.Trainer, Seldom):
        run = make(Covidgan, kind, interval=5)
        run.out.mkdir()
        run.run()
        told.append((run.out / "stats.jsonl").read_text())
    assert told[0] == told[1] and told[0].count("\n") == 18
