"""The exported files against their contracts, against PyTorch in float64, and against other people's networks."""

import collections
import copy
import dataclasses
import hashlib
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import test_method
import torch
import torch.nn.functional as F
from torch import nn

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
        self.session = ort.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def run(self, **inputs):
        return self.session.run(None, inputs)


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


def checkpoint_of(**options):
    """A checkpoint as Trainer.state gives it, without a training, and its generator."""
    c = covidgan.Config(**{**SMALL, **options})
    method = covidgan.build(covidgan.Covidgan, c)
    g = randomise(method.g)
    g.locals[-1].head[1].weight.data.mul_(0.5) if c.n_gen > 1 else g.g1.head[1].weight.data.mul_(0.5)
    state = {"method": "covidgan", "config": dataclasses.asdict(c), "stage": "joint"}
    state |= {"networks": method.state_dict(), "average": g.state_dict()}
    return state, c, g.eval()


def export_to(path, arguments):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        export.main([*map(str, arguments), "-o", str(path)])
    return printed.getvalue()


PAIRS = np.random.default_rng(0).normal((-830, 70), (40, 12), (250, 2)).tolist()  # of the training slices, made up


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Make, once each, the variants of a generator's file. An export takes seconds, so "fp16" differs in all else."""
    other = dict(size=64, n_gen=3, n_labels=3, desum="sum", level=40.0, width=400.0)
    variants = {
        "plain": (dict(), []),
        "fp16": (other, ["--fp16"]),
        "one": (dict(n_gen=1), ["--terms", "CC BY 4.0, by allocation"]),
        "cpu": (dict(), ["--target", "cpu"]),
        "packed": (dict(), ["--pack"]),
        "steered": (dict(steer=True, draws=1.0), []),
        "steered fp16": (dict(draws=1.0), ["--fp16"]),
        "steered cpu": (dict(steer=True), ["--target", "cpu"]),
    }
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            options, flags = variants[name]
            checkpoint, c, generator = checkpoint_of(**options)
            if name == "one":  # the others are as checkpoints were before
                checkpoint["trained_labels"] = [1, 2]
            if name == "steered":
                checkpoint["steering"] = PAIRS
            torch.save(checkpoint, folder / "ckpt.pt")
            printed = export_to(folder / "generator.onnx", [folder / "ckpt.pt", *flags])
            made[name] = Exported(folder / "generator.onnx", folder / "ckpt.pt", printed, c, generator)
        return made[name]

    return get


@pytest.fixture
def plain(exported):
    return exported("plain")


def expected_hu(e, maps, density=(-800,), detail=(75,), seed=None):
    """HU by covidgan's own functions: what training drew, through the window's inverse.

    In float64: PyTorch's own norms of a label map are off by 0.2 HU in float32, a hundred times the file's error.
    """
    labels, generator = torch.from_numpy(maps)[:, None], copy.deepcopy(e.generator).double()
    given = covidgan.one_hot(labels, e.c.n_labels).double()
    if e.c.steer:  # 50 and 15 HU are the units of training
        for number in ((np.array(density) + 800) / 50, (np.array(detail) - 75) / 15):
            given = torch.cat([given, torch.from_numpy(number.clip(-3, 3)).view(-1, 1, 1, 1) * (labels > 0)], 1)
    with torch.no_grad():
        image, alpha = generator(given) if seed is None else generator(given, seed=torch.tensor(seed).expand(len(maps)))
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


SHAPES = [(1, 32, 32), (2, 48, 32), (5, 32, 80), (2, 80, 208)]
OFF = {"fp16": (export.MAX_HU["float16"], 5e-3), "packed": (2.6, 1e-3)}  # of HU and alpha, the rounding included


@pytest.mark.parametrize(
    ("variant", "shape"),
    [*[(v, s) for v in ("plain", "cpu") for s in SHAPES], *[(v, (2, 64, 96)) for v in ("one", "fp16", "packed")]],
)
def test_any_batch_height_and_width_agrees_with_training(exported, variant, shape):
    e = exported(variant)
    maps = export.example_map(*shape, e.c.n_labels)
    maps[4:] = 0  # of five, one without lung
    ct, alpha = e.run(map=maps)
    hu, expected_alpha = expected_hu(e, maps)
    hu_off, alpha_off = OFF.get(variant, (0.6, 1e-5))  # half a unit of rounding, and float32
    assert ct.dtype == np.int16 and ct.shape == shape and np.abs(ct - hu).max() < hu_off
    assert alpha.dtype == np.float32 and alpha.shape == shape[:1]
    assert np.abs(alpha - expected_alpha)[:4].max() < alpha_off  # norms of nothing at all magnify rounding
    assert (ct[maps == 0] == e.c.level - e.c.width / 2).all()  # exactly the window's floor
    assert ct[maps > 0].std() > 20 and (variant != "plain" or np.abs(alpha - 0.5).max() > 0.01)  # or all would agree
    assert f"HU (limit {export.MAX_HU[e.metadata['precision']]})" in e.printed and str(e.path) in e.printed


STEERED = [
    dict(density=[-800], detail=[75], seed=[0]),
    dict(density=[-900, -800, -650], detail=[20, 75, 130], seed=[1, 0, 2**31 - 1]),
    dict(density=[-900], detail=[20, 75, 130], seed=[7]),  # one for all, or one each
]


@pytest.mark.parametrize("told", STEERED)
@pytest.mark.parametrize("variant", ["steered", "steered fp16", "steered cpu"])
def test_what_steers_a_generator_does_so_in_its_file_as_in_training(exported, variant, told):
    e, maps = exported(variant), export.example_map(3, 48, 64, 4)
    inputs = [one.name for one in e.session.get_inputs()][1:]
    assert (
        inputs == ["density", "detail"] * e.c.steer + ["seed"] * bool(e.c.draws)
        and list(json.loads(e.metadata["steering"])) == inputs
    )
    told = {name: told[name] for name in inputs}
    kinds = {"density": np.float32, "detail": np.float32, "seed": np.int64}
    ct, alpha = e.run(map=maps, **{name: kinds[name](numbers) for name, numbers in told.items()})
    hu, expected_alpha = expected_hu(e, maps, **told)
    assert np.abs(ct - hu).max() < (export.MAX_HU["float16"] if "fp16" in variant else 0.6)
    assert np.abs(alpha - expected_alpha).max() < 5e-3
    for name in inputs:  # each of them counts
        other = expected_hu(e, maps, **{**told, name: [number + 40 for number in told[name]]})[0]
        assert np.abs(other - hu)[maps > 0].max() > 20


def test_numbers_that_are_nan_are_the_median_of_the_training_slices(exported):
    e, maps = exported("steered"), export.example_map(2, 32, 48, 4)
    nan, zero, middle = np.float32([np.nan]), np.array([0]), np.median(PAIRS, 0).round()
    ct, _ = e.run(map=maps, density=nan, detail=nan, seed=zero)
    assert np.abs(ct - expected_hu(e, maps, [middle[0]], [middle[1]], [0])[0]).max() < 0.6
    mixed, _ = e.run(map=maps, density=np.float32([np.nan, -700]), detail=nan, seed=zero)
    assert (mixed[0] == ct[0]).all() and (mixed[1] != ct[1]).any()


def test_metadata_tells_defaults_ranges_and_evenly_spread_pairs_of_the_training_slices(exported):
    m = exported("steered").metadata
    steering, drawn = json.loads(m["steering"]), json.loads(m["drawn"])
    for k, name in enumerate(("density", "detail")):
        ordered = sorted(pair[k] for pair in PAIRS)
        for key, share in (("default", 0.5), ("low", 0.05), ("high", 0.95)):
            assert abs(steering[name][key] - ordered[round(249 * share)]) < 3
    assert steering["seed"] == {"default": 0}
    assert len(drawn) == 100 and {*map(tuple, drawn)} <= {(round(a), round(b)) for a, b in PAIRS}
    assert abs(np.mean(drawn, 0) - np.mean(PAIRS, 0)).max() < 2
    assert json.loads(exported("steered cpu").metadata["drawn"])  # of an older checkpoint: typical ones
    assert (exported("plain").metadata["steering"], exported("plain").metadata["drawn"]) == ("{}", "[]")


def test_a_norm_of_half_features_does_not_overflow():
    x = torch.tensor([400.0, -400.0]).expand(1, 8, 2, 2).half()  # whose squares are beyond 65,504
    assert torch.allclose(export.InFloat32(nn.InstanceNorm2d(8))(x), x.sign(), atol=1e-3)


def test_metadata_is_complete_and_can_be_parsed(plain, exported):
    m = plain.metadata
    keys = "kind contract method labels colours level width size multiple precision target checkpoint_sha256 licence"
    assert [entry.key for entry in plain.model.metadata_props] == [*keys.split(), "steering", "drawn"]
    assert (m["kind"], m["contract"], m["precision"]) == ("generator", "2", "float32")
    assert m["target"] == "any" and exported("cpu").metadata["target"] == "cpu"
    assert json.loads(m["labels"]) == list(covidgan.LABELS)
    assert json.loads(m["colours"]) == [list(colour) for colour in covidgan.COLOURS]
    assert (float(m["level"]), float(m["width"]), int(m["size"]), int(m["multiple"])) == (-600, 1500, 32, 16)
    assert m["checkpoint_sha256"] == hashlib.sha256(plain.source.read_bytes()).hexdigest()
    assert m["licence"] == f"Network: MIT. Weights: {export.TERMS}. Research only, not for diagnosis."
    m = exported("one").metadata
    assert "Weights: CC BY 4.0, by allocation. Research only" in m["licence"]
    assert json.loads(m["trained_labels"]) == [1, 2]
    m = exported("fp16").metadata
    assert json.loads(m["labels"]) == list(covidgan.LABELS[:3]) and len(json.loads(m["colours"])) == 3
    assert (float(m["level"]), float(m["width"]), int(m["multiple"])) == (40, 400, 32)


@pytest.mark.parametrize(("variant", "bytes_each"), [("plain", 4), ("fp16", 2), ("one", 4), ("cpu", 4), ("packed", 0)])
def test_generators_file_is_valid_private_and_holds_each_used_parameter_once(exported, variant, bytes_each):
    """No biases before norms, no head of G1 that is not drawn on, 16 kernels of the last convolution."""
    e = exported(variant)
    check_cleanness(e.path)
    export.rewrite(generator := covidgan.Generator(e.c), fp16=variant == "fp16", target="any")
    if e.c.n_gen > 1:
        del generator.g1.head
    used = sum(p.numel() for p in generator.parameters())
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    stored = sum(np.prod(t.dims) for t in e.model.graph.initializer if t.data_type in floats)
    constants = 36 * (2 * e.c.n_blocks * 36 + 9 + 16) if variant == "cpu" else 0  # Winograd's matrices
    assert used + constants <= stored < used + constants + 1000  # and in fp16 ones and zeros for the norms
    if bytes_each:
        assert used * bytes_each < e.path.stat().st_size < used * bytes_each + 100_000


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


BROKEN = """
import covidgan

class Broken(covidgan.Covidgan):
    name = "broken"

    def __init__(self, c):
        super().__init__(c)
        self.g.fold = lambda replace: self.g.{weights}.data.{change}
"""


@pytest.mark.parametrize(
    ("weights", "change", "word"),
    [
        ("locals[0].head[1].weight", "neg_()", "HU"),
        pytest.param("desums[0].net.fc[2].bias", "add_(1)", "alpha", marks=pytest.mark.long),
        pytest.param("desums[0].net.fc[2].bias", "fill_(float('nan'))", "nan", marks=pytest.mark.long),
    ],
)
def test_a_file_that_differs_from_pytorch_is_not_written(plain, tmp_path, weights, change, word):
    (tmp_path / "broken.py").write_text(BROKEN.format(weights=weights, change=change))
    torch.save(torch.load(plain.source, weights_only=True) | {"method": "broken"}, tmp_path / "ckpt.pt")
    with pytest.raises(Mistake, match=f"not written.*{word}"):
        export.main(f"{tmp_path}/ckpt.pt --method {tmp_path}/broken.py -o {tmp_path}/g.onnx".split())
    assert {path.name for path in tmp_path.iterdir()} <= {"broken.py", "ckpt.pt", "__pycache__"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stage": "g1"}, "stopped in stage g1"),  # as drawn at the start, in PyTorch as well: no comparison would tell
        ({"stage": "g2"}, "stopped in stage g2"),
        ({"networks": {}}, "does not fit"),
        ({"config": {"option": "of another version"}}, "does not fit"),
    ],
)
def test_a_checkpoint_that_is_no_whole_generator_is_refused(plain, tmp_path, changes, word):
    torch.save(torch.load(plain.source, weights_only=True) | changes, tmp_path / "ckpt.pt")
    with pytest.raises(Mistake, match=rf"g\.onnx.*{word}"):
        export.main([str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "g.onnx")])
    assert not (tmp_path / "g.onnx").exists()


def test_weights_that_are_no_numbers_are_refused_though_both_sides_make_the_same_of_them(tmp_path, unet):
    checkpoint = torch.load(unet.source, weights_only=True)
    next(iter(checkpoint["unet"].values()))[:] = torch.nan
    torch.save(checkpoint, tmp_path / "unet.pt")
    with pytest.raises(Mistake, match=r"file\.onnx: not written: .* is not finite"):
        export.main([str(tmp_path / "unet.pt"), "-o", str(tmp_path / "file.onnx")])
    assert not (tmp_path / "file.onnx").exists()


def test_only_the_file_for_cpus_multiplies_matrices_and_it_is_no_larger(plain, exported):
    cpu = exported("cpu")
    assert operators(plain.model)["MatMul"] == 0
    assert operators(cpu.model)["MatMul"] == 2 * 2 * cpu.c.n_blocks  # kernels and tiles, two convolutions a block
    assert operators(cpu.model)["Conv"] == operators(plain.model)["Conv"] + 2 * cpu.c.n_blocks  # two for each of them
    assert cpu.path.stat().st_size < 1.05 * plain.path.stat().st_size


@pytest.mark.parametrize(("height", "width"), [(460, 620), (128, 128), (200, 72)])
def test_all_files_of_a_checkpoint_give_one_slice_at_any_size(plain, exported, height, width):
    """As infer_onnx.py runs them: padding is seen by every norm, so that all must pad alike."""
    maps = export.example_map(1, height, width, 4)
    slices = [Generator(*open_session(e.path, "cpu"))(maps).astype(int) for e in (plain, exported("cpu"))]
    assert plain.metadata["checkpoint_sha256"] == exported("cpu").metadata["checkpoint_sha256"]
    assert slices[0].shape == (1, height, width) and slices[0][maps > 0].std() > 20
    assert np.abs(slices[0] - slices[1]).max() <= 1


def test_a_packed_file_holds_large_weights_in_16_bits_and_widens_them_once_at_load(plain, exported, tmp_path):
    e, settings = exported("packed"), ort.SessionOptions()
    assert (e.metadata["precision"], e.metadata["target"]) == ("packed", "any")
    large = [weight.numel() for weight in plain.generator.g1.trunk.parameters() if weight.numel() >= export.LARGE]
    saved = plain.path.stat().st_size - e.path.stat().st_size
    assert len(large) == 4 and 2 * sum(large) - 2000 < saved < 2 * sum(large)
    settings.optimized_model_filepath, settings.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(e.path, settings, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    for graph, nodes in ((e.model.graph, 4), (optimized, 0)):  # that compute from weights alone
        constants = {tensor.name for tensor in graph.initializer}
        assert sum(constants.issuperset(node.input) for node in graph.node) == nodes
    assert len(optimized.node) > 30


# ---- a method of one's own


def test_a_method_of_ones_own_is_exported_from_the_file_that_defines_it(tmp_path):
    c = test_method.SmallConfig(size=64)
    method = covidgan.build(test_method.Small, c)
    randomise(method.g)
    checkpoint = {"method": "small", "config": dataclasses.asdict(c), "networks": method.state_dict()}
    torch.save(checkpoint | {"average": method.g.state_dict()}, tmp_path / "ckpt.pt")
    with pytest.raises(Mistake, match=r"g\.onnx: a checkpoint of 'small'.*--method"):
        export.main([str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "g.onnx")])
    export_to(tmp_path / "g.onnx", [tmp_path / "ckpt.pt", "--method", test_method.__file__])
    made = Exported(tmp_path / "g.onnx", tmp_path / "ckpt.pt", "", c, method.g.eval())
    assert made.metadata["method"] == "small" and made.metadata["multiple"] == "4"
    maps = export.example_map(2, 36, 44, 4)
    ct, alpha = made.run(map=maps)
    assert np.abs(ct - expected_hu(made, maps)[0]).max() < 0.6 and ct[maps > 0].std() > 50
    assert alpha.tolist() == [1, 1]


# ---- the command line


@pytest.mark.parametrize("name", ["out/ckpt.pt", "ckpt.pt", "out", "other.pt"])
def test_a_checkpoint_is_found_by_path_folder_or_name_in_out(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    for target in ("ckpt.pt", "other.pt"):
        Path("out", target).touch()
    assert export.find_checkpoint(Path(name)) == Path("out", "other.pt" if "other" in name else "ckpt.pt")


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nowhere.pt",
        "ckpt.pt --features inception",
        "ckpt.pt --fp16 --target cpu",
        "ckpt.pt --tar cpu",
        "--features inception",
        "ckpt.pt -o no/folder/g.onnx",
        "ckpt.pt -o ckpt.pt",
        "ckpt.pt --terms " + "x" * 901,
    ],
)
def test_options_that_cannot_go_together_end_with_status_2_before_any_work(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments.split()])
    Path("ckpt.pt").write_bytes(b"untouched")
    with pytest.raises(SystemExit) as ended:
        covidgan.exit_on_mistake(export.main)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("ckpt.pt", b"untouched")]


# ---- the U-Net


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    net = randomise(UNet(4, width=4)).eval()
    config = {"n_labels": 4, "width": 4, "level": -600.0, "window": 1500.0}
    torch.save({"kind": "unet", "config": config, "unet": net.state_dict()}, folder / "unet.pt")
    printed = export_to(folder / "unet.onnx", [folder / "unet.pt"])
    return Exported(folder / "unet.onnx", folder / "unet.pt", printed, generator=net)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 96)])
def test_unet_labels_windowed_hu_as_pytorch_does(unet, shape):
    ct = np.random.default_rng(1).integers(-1024, 400, shape).astype(np.int16)
    (labels,) = unet.run(ct=ct)
    x = covidgan.window(torch.from_numpy(ct)[:, None], covidgan.Config())
    with torch.no_grad():
        logits = unet.generator(x)
    assert values_of(unet.model.graph.input) == {"ct": ("int16", ["N", "H", "W"])}
    assert values_of(unet.model.graph.output)["map"][0] == "uint8"
    assert labels.dtype == np.uint8 and labels.shape == shape and len(np.unique(labels)) > 1
    assert (labels == logits.argmax(1).numpy()).mean() > 0.999


def test_a_unet_of_two_labels_another_window_and_licence_keeps_them(unet, tmp_path):
    net = randomise(UNet(2, width=4), seed=1).eval()
    config = {"n_labels": 2, "width": 4, "level": 40.0, "window": 400.0}
    torch.save({"kind": "unet", "config": config, "unet": net.state_dict()}, tmp_path / "unet.pt")
    export_to(tmp_path / "unet.onnx", [tmp_path / "unet.pt", "--terms", "CC0, made up"])
    made = Exported(tmp_path / "unet.onnx", tmp_path / "unet.pt", "")
    ct = np.random.default_rng(1).integers(-200, 300, (1, 64, 64)).astype(np.int16)
    with torch.no_grad():
        wanted = net(((torch.from_numpy(ct)[:, None].float() - 40) / 200).clamp(-1, 1)).argmax(1).numpy()
    assert (made.run(ct=ct)[0] == wanted).mean() > 0.999 and 0.01 < wanted.mean() < 0.99
    with pytest.raises(Mistake, match="U-Net"):
        export.main([str(unet.source), "--fp16", "-o", str(tmp_path / "half.onnx")])
    for model, n in ((unet, 4), (made, 2)):
        assert model.metadata["kind"] == "unet" and json.loads(model.metadata["labels"]) == list(covidgan.LABELS[:n])
        assert model.metadata["checkpoint_sha256"] == hashlib.sha256(model.source.read_bytes()).hexdigest()
        check_cleanness(model.path)
    assert "CC0, made up" in made.metadata["licence"] and export.TERMS in unet.metadata["licence"]


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
    folder = tmp_path_factory.mktemp("lite0")
    printed = export_to(folder / "features.onnx", ["--features", "efficientnet-lite0"])
    source = features.find_weights("efficientnet-lite0", None)
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


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("kind", "dims", "name", "terms"),
    [
        pytest.param(
            "inception", [64, 192, 768, 2048], "inception, other weights {}", "on their", marks=pytest.mark.long
        ),
        ("lite0", [32, 24, 112, 1280], "efficientnet-lite0 (ImageNet)", "Apache-2.0, of their"),
    ],
)
def test_features_have_the_contracts_names_types_and_metadata(kind, dims, name, terms, request):
    e = request.getfixturevalue(kind)
    assert values_of(e.model.graph.input) == {"image": ("uint8", ["N", "H", "W"])}
    assert values_of(e.model.graph.output) == {str(d): ("float32", ["N", d]) for d in dims}
    assert set(e.metadata) == {"kind", "contract", "name", "dims", "weights_sha256", "licence"}
    assert e.metadata["kind"] == "features" and json.loads(e.metadata["dims"]) == dims
    digest = hashlib.sha256(e.source.read_bytes()).hexdigest()
    assert e.metadata["weights_sha256"] == digest and e.metadata["name"] == name.format(digest[:8])
    assert f"Network: MIT. Weights: {terms} authors" in e.metadata["licence"]
    assert "from PyTorch" in e.printed and e.metadata["name"] in e.printed
    check_cleanness(e.path)
    for shape in [(1, 299, 299), (3, 64, 100)]:
        assert [(x.shape, x.dtype) for x in e.run(image=greys(*shape))] == [((shape[0], d), np.float32) for d in dims]
