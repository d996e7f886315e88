"""The benchmarks run, and refuse to time what is wrong."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from tiny_models import tiny_unet, tiny_vae
from torch.nn.functional import elu

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Config,
    gspn2_scan,
    gspn2_sites,
    softmax_attention,
)
from gspn2_diffusers.pipelines.loading import load_pipeline
from gspn2_diffusers.shipped import shipped_folder
from gspn2_diffusers.tiny_scenes.models import WEIGHTS, assemble_pipeline, build_pixart, build_unet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks as they import each other: from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def gate(load):
    return load("gate")


@pytest.fixture
def unet(load):
    return load("unet")


@pytest.fixture
def results_of(load, tmp_path, capsys):
    """What one quick run of a benchmark writes, and what it prints."""

    def results_of(script: str, *options: object) -> tuple[dict, str]:
        output = tmp_path / "result.json"
        quick = ("--repeats", 1, "--warmup", 0, "--device", "cpu", "--output", output)
        load(script).main([str(option) for option in (*quick, *options)])
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 100
        results = json.loads(output.read_text())
        expected = {"device", "driver", "torch", "cupy", "date", "commit"}
        assert results["environment"].keys() >= expected
        assert results["arguments"]["dtype"] == "float32"
        return results, printed

    return results_of


def test_unet_times_every_variant_and_writes_what_a_reader_needs(results_of):
    results, printed = results_of("unet", "--sizes", 64, "32x96")
    assert all(word in printed for word in ("softmax", "gspn2", "removed", "32x96"))

    rows = results["rows"]
    assert [(row["image"], row["variant"]) for row in rows] == [
        (image, variant)
        for image in ([64, 64], [32, 96])
        for variant in ("softmax", "gspn2", "gspn2, fused", "removed")
    ]
    for row in rows:
        assert row["ms"] == sorted(row["rounds_ms"])[1] > 0
        assert row["speedup"] == pytest.approx(
            rows[4 * (row["image"] == [32, 96])]["ms"] / row["ms"]
        )
        assert 64 * row["tokens"] == row["image"][0] * row["image"][1]
    assert results["arguments"]["model"] == "tiny"


def test_unet_leaves_softmax_out_above_the_size_it_is_told(results_of):
    options = ("--sizes", 32, 64, "--softmax-max", 32, "--variants", "softmax", "gspn2")
    results, _ = results_of("unet", *options)
    found = [(row["image"][0], row["variant"], row["speedup"] is None) for row in results["rows"]]
    assert found == [(32, "softmax", False), (32, "gspn2", False), (64, "gspn2", True)]


def test_the_model_is_unchanged_after_every_variant(unet):
    model = unet.build("tiny", CPU, torch.float32)
    inputs = unet.random_inputs(model, 1, 8, 8)
    adapter = unet.random_adapter(model, unet.GSPN2Config())
    with torch.no_grad():
        before = model(**inputs).sample
        for variant in (
            unet.gspn2_blocks(model, adapter),
            unet.gspn2_blocks(model, adapter, fused=True),
            unet.no_self_attention(model),
        ):
            with variant:
                assert not torch.equal(model(**inputs).sample, before)
            assert torch.equal(model(**inputs).sample, before)


def test_layer_times_every_layer(results_of):
    options = ("--channels", 64, "--grids", 8, "6x12", "--softmax-max", 64)
    results, _ = results_of("layer", *options)
    others = ("gspn2", "gspn2, fused", "linear attention", "one linear map")
    assert [(row["tokens"], row["layer"]) for row in results["rows"]] == [
        (64, "softmax"),
        *((64, name) for name in others),
        *((72, name) for name in others),
    ]
    assert all(row["ms"] > 0 for row in results["rows"])


def test_a_wrong_layer_is_refused(load):
    layer, gate = load("layer"), load("gate")
    layers = layer.build_layers(64, layer.GSPN2Config(), CPU, torch.float32)
    layer.check_layers(layers, CPU, torch.float32)

    class Unnormalised(layer.LinearAttention):
        def forward(self, tokens):
            return 1.5 * super().forward(tokens)

    layers["linear attention"].__class__ = Unnormalised
    with pytest.raises(gate.GateError, match="linear attention is wrong"):
        layer.check_layers(layers, CPU, torch.float32)


@pytest.mark.parametrize("layout", ["lines", "channels-last", "tokens", "planar"])
def test_scan_times_every_pass_in_every_layout(layout, results_of):
    shapes = ("--shapes", "2x4x9x5/2", "1x3x1x7/3")
    options = ("--backend", "torch", "--layout", layout, *shapes)
    results, _ = results_of("scan", *options)
    rows = results["rows"]
    assert [(row["shape"], row["skip"], row["pass"]) for row in rows] == [
        (shape, skip, name)
        for shape in ("2x4x9x5", "1x3x1x7")
        for skip in (False, True)
        for name in ("forward", "backward", "backward-stored")
    ]
    for row in rows:
        bandwidth = row["floor_of_copy"] * results["copy_gb_per_s"]
        assert row["floor_gb_per_s"] == pytest.approx(bandwidth)
        assert row["ns_per_line"] * max(row["size"][2:]) == pytest.approx(1e6 * row["ms"])


def test_bytes_are_those_of_the_formulas(load):
    cases = load("cases")
    case = cases.Case(2, 24, 5, 7, 3)  # weights shared by 8 channels
    maps = 2 * 24 * 5 * 7 * 2  # bytes of a bfloat16 map with all channels
    assert case.floor_bytes(False, False, 2) == (2 + 8 + 12 / 8) * maps
    assert case.floor_bytes(True, False, 2) == (2 + 8 + 4 + 12 / 8) * maps
    assert case.floor_bytes(True, True, 2) == (3 + 2 * (8 + 4 + 12 / 8)) * maps
    assert case.moved_bytes(True, 2) == (4 + 8 + 4 + 12 / 8 + 9) * maps
    operands = cases.Operands.random(case, "channels-last", True, CPU, torch.bfloat16)
    assert operands.nbytes == case.floor_bytes(True, False, 2) - maps


def test_gradients_of_lines_are_those_of_the_maps_in_them(load):
    cases = load("cases")
    case = cases.Case(2, 6, 5, 7, 3)
    lines = cases.Operands.random(case, "lines", True, CPU, torch.float64).leaves()
    maps = lines.maps().leaves()
    grad_y = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    found = torch.autograd.grad(lines.scan(), list(lines.tensors().values()), grad_y)
    found = lines.gradients_of_maps(dict(zip(lines.tensors(), found, strict=True)))
    expected = torch.autograd.grad(maps.scan(), list(maps.tensors().values()), grad_y)
    for name, gradient in zip(maps.tensors(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_a_graph_is_refused_without_a_gpu(load):
    with pytest.raises(ValueError, match="--graph: expected a CUDA device, got 'cpu'"):
        load("unet").main(["--graph", "--device", "cpu"])


@pytest.mark.parametrize("layout", ["channels-last", "tokens"])
def test_channels_of_a_position_are_neighbours_in_memory(layout, load):
    cases = load("cases")
    operands = cases.Operands.random(cases.Case(2, 8, 5, 7, 4), layout, True, CPU, torch.float32)
    assert operands.x.stride(1) == 1
    assert all(gate.stride(2) == 1 for gate in (operands.lam, operands.u, operands.skip))
    assert operands.logits.stride()[2:4] == (3, 1)


@pytest.mark.parametrize("option", ["--backend=cuda", "--ladder", "--experiments"])
def test_scan_says_that_the_kernels_cannot_run(option, load, tmp_path):
    with pytest.raises(ValueError, match="the CUDA kernels cannot run here: "):
        load("scan").main([option, "--device", "cpu", "--output", str(tmp_path / "result.json")])
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line():
    command = [sys.executable, "scan.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the CUDA kernels cannot run here: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "scan", "layer", "unet", "distillation", "sizes", "training_speed", "highres",
        "plans", "figures",
    ],  # fmt: skip
)
def test_every_script_explains_its_options(script, load, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(script).main(["--help"])
    assert f"benchmarks/{script}.py" in capsys.readouterr().out


def test_sizes_compares_blocks_that_scale_lam_with_those_that_do_not(load, tmp_path, monkeypatch):
    sizes = load("sizes")
    monkeypatch.setattr(sizes, "native_resolution", lambda pipe: 64)  # of the pictures only
    output = tmp_path / "sizes.json"
    weights = str(shipped_folder("gspn2"))
    options = ["--device", "cpu", "--threads", "1", "--scenes", "2", "--factors", "1", "4"]
    sizes.main(["--weights", weights, *options, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["size"], row["lam_scaled"]) for row in rows] == [
        (64, True), (64, False), (256, True), (256, False)
    ]  # fmt: skip
    # At 256 pixels, the native size, there is nothing to scale; a quarter of it needs it.
    assert rows[2]["layer_error"] == rows[3]["layer_error"] < 0.1
    assert rows[0]["layer_error"] != rows[1]["layer_error"]


def test_the_ladder_is_held_to_the_operator(load):
    cases, ladder = load("cases"), load("ladder")
    problem = ladder.Problem.random(cases.Case(2, 4, 6, 9, 2), CPU)
    x, logits, lam, u = (tensor.double() for tensor in vars(problem).values())
    first_only = torch.eye(4, dtype=torch.float64)[0].view(1, 4, 1, 1, 1)
    y = gspn2_scan(
        x,
        logits[:, None].expand(-1, 4, -1, -1, -1, -1),
        lam[:, None] * first_only,
        u[:, None] * first_only,
        backend="torch",
    )
    torch.testing.assert_close(ladder.reference(problem, torch.float64), y)
    torch.testing.assert_close(ladder.reference(problem.across(), torch.float64), y)


def test_the_ladder_includes_nothing_and_has_the_kernels_that_are_launched(load):
    ladder = load("ladder")
    source = ladder.SOURCE.read_text()
    assert "#include" not in source
    defined = set(re.findall(r'extern "C" __global__ void (\w+)\(', source))
    launched = re.findall(
        r'"(one_\w+|all_\w+|state_\w+|shared_\w+)"', Path(ladder.__file__).read_text()
    )
    assert defined == set(launched)


@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_the_ladder_compiles_without_a_warning(architecture, load):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    source = load("ladder").SOURCE.read_text().encode()
    _, program = nvrtc.nvrtcCreateProgram(source, b"ladder.cu", 0, [], [])
    options = [b"-std=c++17", b"-arch=sm_%d" % architecture]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    # Longer than one byte: NVRTC writes into it, and Python has only one b" " for everybody.
    log = b" " * (1 + nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert not log.strip(b"\0 \n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gate_lets_the_operator_pass(gate, dtype):
    gate.check_operator(CPU, dtype)


def _directions_swapped(x, logits, lam, u, skip):
    return gspn2_scan(x, logits.flip(1), lam.flip(1), u.flip(1), skip.flip(1))


def _chunked(*inputs):
    return gspn2_scan(*inputs, chunk_size=4)


def _not_finite(*inputs):
    return torch.full_like(inputs[0], torch.nan)


@pytest.mark.parametrize("wrong", [_directions_swapped, _chunked, _not_finite])
def test_the_gate_refuses_a_wrong_operator(gate, wrong):
    with pytest.raises(gate.GateError, match="not timed: expected a relative error"):
        gate.check_operator(CPU, torch.float32, wrong)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (-1, -1, -1, -1), (1, 3, 2, 2)])
def test_the_gate_notices_one_element_that_was_not_written(gate, load, place):
    cases = load("cases")
    case = cases.Case(3, 16, 5, 7, 2)
    operands = cases.Operands.random(case, "tokens", True, CPU, torch.float32)
    y = operands.scan(backend="torch")
    gate.check_result("a map", operands, y)
    y[place] = torch.nan
    with pytest.raises(gate.GateError):
        gate.check_result("a map", operands, y)


@pytest.mark.parametrize("name", ["x", "logits", "lam", "u", "skip"])
def test_the_gate_refuses_a_wrong_gradient(gate, load, name):
    cases = load("cases")
    operands = cases.Operands.random(cases.Case(2, 6, 5, 7, 2), "planar", True, CPU, torch.float32)
    leaves = operands.leaves()
    wanted, y = leaves.tensors(), leaves.scan(backend="torch")
    found = torch.autograd.grad(y, list(wanted.values()), y.detach())
    gradients = dict(zip(wanted, found, strict=True))
    gate.check_gradients("a map", operands, y.detach(), gradients)
    gradients[name] = 1.01 * gradients[name]
    with pytest.raises(gate.GateError, match=f"gradient of {name} is wrong"):
        gate.check_gradients("a map", operands, y.detach(), gradients)


def test_nothing_is_timed_or_written_behind_a_closed_gate(unet, gate, monkeypatch, tmp_path):
    closed = partial(unet.check_operator, scan=_chunked)
    monkeypatch.setattr(unet, "check_operator", closed)
    monkeypatch.setattr(unet, "measure", lambda *_: pytest.fail("timed a wrong operator"))
    with pytest.raises(gate.GateError):
        unet.main(["--device", "cpu", "--output", str(tmp_path / "result.json")])
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_finite_are_refused(gate):
    with pytest.raises(gate.GateError, match="gspn2 at 8x8: expected finite outputs"):
        gate.check_finite("gspn2 at 8x8", torch.tensor([1.0, torch.inf]))


def test_slow_runs_are_repeated_less(load, monkeypatch):
    measuring = load("measuring")
    for ms, expected in ((measuring.SLOW_MS + 1, 4), (1.0, 13)):
        calls = []
        monkeypatch.setattr(measuring, "_time_by_clock", lambda run, ms=ms: run() or ms)
        measuring.Timer(CPU, repeats=10, warmup=3).median_ms(lambda calls=calls: calls.append(1))
        assert len(calls) == expected


@pytest.mark.parametrize(
    ("value", "cell"),
    [(None, "-"), (0.0123, "0.012"), (1.5, "1.50"), (33.24, "33.2"), (4123.4, "4123")],
)
def test_numbers_keep_three_digits_in_a_table(load, value, cell):
    assert load("report").number(value) == cell


def test_figures_need_results(load, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="expected one of unet-sdxl-cuda.json"):
        load("figures").main(["--results", str(tmp_path)])


def test_figures_are_drawn_from_results(load, tmp_path):
    pytest.importorskip("matplotlib")
    figures = load("figures")
    rows = [
        {"channels": 640, "tokens": tokens, "layer": layer, "ms": tokens / 1000}
        for tokens in (4096, 16384)
        for layer in ("softmax", "gspn2")
    ]
    about = {"device": "GPU", "torch": "2", "date": "2026-01-02T03:04:05"}
    results = {"environment": about, "arguments": {"dtype": "bfloat16"}, "rows": rows}
    (tmp_path / "layer-cuda.json").write_text(json.dumps(results))
    figures.main(["--results", str(tmp_path), "--images", str(tmp_path / "images")])
    assert (tmp_path / "images" / "layer.png").stat().st_size > 1000


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(query_dim=24, heads=3, dim_head=8, bias=True).double()


def test_linear_attention_is_the_formula_with_the_weights_of_the_layer(load, attention):
    tokens = torch.randn(2, 35, 24, dtype=torch.float64)
    mixer = load("mixers").LinearAttention(attention)
    q, k, v = (
        project(tokens).unflatten(-1, (3, 8)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    affinity = (elu(q) + 1) @ (elu(k) + 1).mT
    mixed = affinity / affinity.sum(-1, keepdim=True) @ v
    expected = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(tokens), expected)
    with torch.no_grad():
        mixer.to_q.weight.zero_()
    assert attention.to_q.weight.abs().max() > 0  # a copy


def test_mean_only_is_the_layer_where_its_attention_is_uniform(load, attention):
    tokens = torch.randn(2, 35, 24, dtype=torch.float64)
    torch.nn.init.zeros_(attention.to_q.weight)
    torch.nn.init.zeros_(attention.to_q.bias)
    # The block computes in float32 what it inherits.
    found = load("mixers").MeanOnly(attention).double()(tokens)
    torch.testing.assert_close(found, attention(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "per_layer"), [("linear attention", 8), ("mean only", 2)])
def test_only_mixers_are_trained_and_all_of_them(name, per_layer, load):
    mixers = load("mixers")
    model = tiny_unet().requires_grad_(False)
    own = mixers.put_mixers(model, mixers.MIXERS[name])
    assert len(own) == len(gspn2_sites(model)) == len(mixers.patched_layers(model))
    inputs = load("models").random_inputs(model, 2, 8, 8)
    model(**inputs).sample.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for mixer in own for p in mixer.parameters()}
    # A self-attention of diffusers has no biases at its inputs.
    assert len(trained) == len(own) * (per_layer - 3 if name == "linear attention" else per_layer)
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


def test_dropped_layers_write_zeros_and_may_let_gradients_pass(load, unet):
    mixers = load("mixers")
    model = tiny_unet().requires_grad_(False)
    inputs = load("models").random_inputs(model, 1, 8, 12)
    with unet.no_self_attention(model):
        expected = model(**inputs).sample
    dropped = mixers.put_mixers(model, mixers.Dropped)
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(model(**inputs).sample, expected)
    biased = [mixers.Dropped(layer, bias=True) for layer in mixers.patched_layers(model)]
    with mixers.swapped(model, biased):
        output = model(**inputs).sample
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(mixer.bias.grad is not None for mixer in biased)
    assert [layer.gspn2 for layer in mixers.patched_layers(model)] == dropped


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    """The shipped pipeline for pictures of 64 x 64."""
    folder = tmp_path_factory.mktemp("teacher")
    pipe = load_pipeline(WEIGHTS / "pipeline", dtype="float32", device="cpu")
    unet = build_unet(64)
    unet.load_state_dict(pipe.unet.state_dict())
    assemble_pipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, unet).save_pretrained(folder)
    return folder


QUICK = ("--scenes", 8, "--batch_size", 2)
QUICK_RUNS = (
    "--teacher_forcing_steps", 2, "--end_to_end_steps", 2, "--validation_steps", 2,
    "--held_out", 2, "--num_inference_steps", 2, "--layer_channels", 64, "--layer_grid", 6,
)  # fmt: skip


def test_distillation_measures_every_run_of_the_table(small_teacher, results_of, tmp_path):
    folders = ("--teacher", small_teacher, "--cache", tmp_path / "cache")
    options = (*folders, *QUICK, *QUICK_RUNS, "--score_scenes", 2)
    results, printed = results_of("distillation", *options)
    rows = {row["run"]: row for row in results["rows"]}
    names = ["teacher", "gspn2", "gspn2 hybrid", "linear attention", "dropped", "mean only"]
    assert list(rows) == names
    assert results["arguments"]["teacher"] == small_teacher.name  # not where it lies
    for name, row in rows.items():
        assert "error" not in row and f"table, {name}: output error" in printed
        assert row["scores"].keys() == {"64", "128"}
        assert all(found["scenes"] == 2 for found in row["scores"].values())
    for name in ("gspn2", "gspn2 hybrid", "linear attention", "mean only"):
        course = rows[name]["curve"]
        assert [(point["step"], point["stage"]) for point in course] == [
            (0, "teacher_forcing"), (2, "teacher_forcing"), (4, "end_to_end")
        ]  # fmt: skip
        assert 0 < course[1]["seconds"] < course[2]["seconds"] == rows[name]["seconds"]
        assert course[2]["output_error"] == rows[name]["output_error"] > 0
    assert rows["gspn2 hybrid"]["replaced_layers"] < rows["gspn2"]["replaced_layers"] == 13
    assert rows["dropped"]["trained_parameters"] == 0


def test_what_failed_or_is_missing_runs_again_on_resume(small_teacher, load, results_of, tmp_path):
    distillation = load("distillation")
    folders = ("--teacher", small_teacher, "--cache", tmp_path / "cache")
    options = (*folders, *QUICK, *QUICK_RUNS, "--score_scenes", 0, "--experiment", "losses")
    with pytest.MonkeyPatch.context() as patch:
        train, failing = distillation.Course._train, distillation.LossWeights(layer=0, block=0)

        def fail(self):
            if self.recipe.weights == failing:
                raise RuntimeError("out of memory")
            return train(self)

        patch.setattr(distillation.Course, "_train", fail)
        names = ("--runs", "output", "output + layer")
        results, printed = results_of("distillation", *options, *names)
    found = {row["run"]: row.get("error") for row in results["rows"]}
    assert found == {"output": "RuntimeError: out of memory", "output + layer": None}
    assert "losses, output: RuntimeError: out of memory" in printed

    resumed, printed = results_of("distillation", *options, "--runs", "output", "--resume")
    assert [row["run"] for row in resumed["rows"]] == ["output", "output + layer"]
    assert resumed["rows"][1] == results["rows"][1] and "error" not in resumed["rows"][0]
    assert "losses, output + layer:" not in printed
    with pytest.raises(ValueError, match="--resume: expected the settings of result.json"):
        results_of("distillation", *options, "--resume", "--learning_rate", 1e-2)


def test_equal_runs_of_several_experiments_are_trained_once_and_stages_take_equal_time(load):
    distillation = load("distillation")
    plans = {name: distillation.plan(name, (100, 200), 4.0) for name in distillation.EXPERIMENTS}
    default = plans["table"]["gspn2"]
    same = {"ratio": "C/P = 4", "start": "inherited", "stages": "both"}
    same["losses"] = "output + layer + block"
    assert all(plans[experiment][name] == default for experiment, name in same.items())
    steps = {name: recipe.steps for name, recipe in plans["stages"].items()}
    assert steps == {"both": (100, 200), "teacher forcing": (900, 0), "end to end": (0, 225)}


def test_a_hybrid_keeps_the_lowest_resolution_or_every_fourth_layer(load):
    kept_layers = load("distillation").kept_layers
    unet, pixart = build_unet(64), build_pixart(64)
    assert {site.grid for site in gspn2_sites(unet) if site.name in kept_layers(unet)} == {(2, 2)}
    assert kept_layers(pixart) == [f"transformer_blocks.{i}.attn1" for i in (3, 7)]


def test_training_speed_compares_steps_with_the_floor(results_of):
    results, _ = results_of("training_speed", "--model", "tiny", "--size", 64)
    assert [(row["step"], row["checkpointing"]) for row in results["rows"]] == [
        (step, checkpointing)
        for checkpointing in (False, True)
        for step in ("end to end", "teacher forcing", "floor")
    ]
    for row, floor in zip(results["rows"], [2, 2, 2, 5, 5, 5], strict=True):
        assert row["over_floor"] == pytest.approx(row["ms"] / results["rows"][floor]["ms"])


def test_training_speed_counts_images_of_both_stages(small_teacher, results_of, tmp_path):
    folders = ("--tiny", small_teacher, "--cache", tmp_path / "cache")
    results, _ = results_of("training_speed", *folders, *QUICK, "--steps", 20)
    assert [row["stage"] for row in results["rows"]] == ["teacher_forcing", "end_to_end"]
    assert all(row["images_per_second"] > 0 and row["images"] == 2 for row in results["rows"])


def test_figures_of_distillation_are_drawn_for_every_teacher(load, tmp_path):
    pytest.importorskip("matplotlib")
    figures, distillation = load("figures"), load("distillation")
    about = {"device": "GPU", "torch": "2", "date": "2026-01-02T03:04:05"}
    arguments = {"dtype": "bfloat16", "layer_channels": 640, "layer_grid": 128}
    course = [{"step": s, "seconds": s / 10, "output_error": 1 / s, "layer_error": 2 / s}
              for s in (1, 2)]  # fmt: skip
    for teacher in ("unet", "pixart"):
        rows = [
            distillation.make_row(experiment, name, recipe, {
                "curve": course, "output_error": 0.5, "scores": {"256": {"mean_accuracy": 0.9}},
            }, {recipe.block: 1.0})
            for experiment in distillation.EXPERIMENTS
            for name, recipe in distillation.plan(experiment, (1, 1), 1.0).items()
        ]  # fmt: skip
        rows.append({"experiment": "start", "run": "failed", "error": "out of memory"})
        results = {"environment": about, "arguments": arguments, "rows": rows}
        file = tmp_path / f"distillation-{teacher}-table-ratio-cuda.json"
        file.write_text(json.dumps(results, default=str))
    figures.main(["--results", str(tmp_path), "--images", str(tmp_path / "images")])
    assert {path.stem for path in (tmp_path / "images").iterdir()} == {"ratio", "stages", "start"}


QUICK_PICTURES = ("--steps", 2, "--threads", 1)


def test_highres_times_pictures_from_prompt_to_file(small_teacher, load, results_of):
    highres = load("highres")
    own = highres.running.decode_bands, highres.running.GuidedDenoiser
    options = ("--teacher", small_teacher, *QUICK_PICTURES, "--sizes", 64, "128x96", "--vram", 2)
    results, printed = results_of("highres", *options, "--native", "--native-steps", 3)
    assert (highres.running.decode_bands, highres.running.GuidedDenoiser) == own
    assert [row["size"] for row in results["rows"]] == [[64, 64], [128, 96]]
    assert results["arguments"]["model"] == "tiny" and results["arguments"]["weights"] == "gspn2"
    for row in results["rows"]:
        assert "error" not in row
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()))
        *stages, vae = row["phases"]
        assert [phase["what"] for phase in stages] == [f"stage {n}" for n in range(len(stages))]
        assert stages[-1]["size"] == row["size"] and vae["what"] == "VAE"
        denoising = sum(phase["seconds"] for phase in stages)
        assert row["parts"]["denoiser"] == pytest.approx(denoising)
        assert all(phase["seconds"] > 0 for phase in row["phases"])
        assert row["parts"]["VAE"] == vae["seconds"] and row["parts"]["rest"] > 0
        highest = max(phase["predicted_gib"] for phase in row["phases"])
        assert 2 > row["predicted_gib"] >= highest > 0.5  # the context alone is half a GiB
        assert row["peak_gib"] is None and row["file_mib"] > 0
        native = row["native"]
        assert native["seconds"] == pytest.approx(3 * native["step_seconds"])
    assert len(results["rows"][0]["phases"]) == 2 < len(results["rows"][1]["phases"])
    assert "Prompt to file: tiny" in printed and "speed, 128x96: " in printed


@pytest.mark.parametrize(("upsample", "encoded"), [("pixel", 1), ("latent", 0)])
def test_highres_counts_the_vae_where_it_runs(
    upsample, encoded, small_teacher, load, results_of, monkeypatch
):
    running, calls = load("highres").running, []
    encode = running.encode_tiled
    monkeypatch.setattr(
        running, "encode_tiled", lambda *args, **kw: calls.append(args) or encode(*args, **kw)
    )
    options = ("--teacher", small_teacher, *QUICK_PICTURES, "--sizes", 128, "--native-max", 64)
    results, _ = results_of("highres", *options, "--upsample", upsample, "--native")
    assert len(calls) == encoded
    (row,) = results["rows"]
    assert row["parts"]["VAE"] > 0 and row["predicted_gib"] is None  # there is no GPU to plan for
    assert row["native"] is None  # more pixels than --native-max


def test_highres_keeps_finished_rows_on_resume(small_teacher, load, results_of):
    highres = load("highres")
    options = ("--teacher", small_teacher, *QUICK_PICTURES)
    with pytest.MonkeyPatch.context() as patch:
        run = highres.SpeedBench.run

        def fail(self, size):
            if size == (32, 64):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(self, size)

        patch.setattr(highres.SpeedBench, "run", fail)
        results, printed = results_of("highres", *options, "--sizes", "32x64", 64)
    failed, kept = results["rows"]
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory"
    assert "speed, 32x64: OutOfMemoryError: CUDA out of memory" in printed and "failed" in printed

    again, printed = results_of("highres", *options, "--sizes", 96, "32x64", 64, "--resume")
    assert [row["size"] for row in again["rows"]] == [[96, 96], [32, 64], [64, 64]]
    assert again["rows"][2] == kept and "error" not in again["rows"][1]
    assert "speed, 64x64:" not in printed
    with pytest.raises(ValueError, match="--resume: expected the settings of result.json, got --s"):
        results_of("highres", *options, "--resume", "--steps", 3)


def test_highres_writes_every_row_at_once(small_teacher, load, tmp_path, monkeypatch):
    highres = load("highres")
    measure, output = highres.SpeedBench.measure, tmp_path / "result.json"

    def kill(self, size):
        if size == (32, 64):
            raise KeyboardInterrupt
        return measure(self, size)

    monkeypatch.setattr(highres.SpeedBench, "measure", kill)
    options = ("--device", "cpu", "--teacher", small_teacher, "--warmup", 0, *QUICK_PICTURES)
    sizes = ("--sizes", 64, "32x64", "--output", output)
    with pytest.raises(KeyboardInterrupt):
        highres.main([str(option) for option in (*options, *sizes)])
    assert [row["size"] for row in json.loads(output.read_text())["rows"]] == [[64, 64]]
    assert list(tmp_path.iterdir()) == [output]


class FakeMemory:
    """What torch tells of a device's memory, in bytes that a test sets."""

    def __init__(self, monkeypatch, free=700, total=1000):
        self.held = self.peak = self.reserved = 0
        self.shares = []
        for name, answer in {
            "max_memory_allocated": lambda: self.peak,
            "max_memory_reserved": lambda: self.reserved,
            "memory_reserved": lambda: self.reserved,
            "reset_peak_memory_stats": self._reset,
            "mem_get_info": lambda: (free, total),
            "set_per_process_memory_fraction": self.shares.append,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def hold(self, count):
        self.held = count
        self.peak = max(self.peak, count)

    def _reset(self):
        self.peak = self.held


def test_peaks_belong_to_the_part_that_ran(small_teacher, load, monkeypatch):
    highres = load("highres")
    memory = FakeMemory(monkeypatch)
    needs = {"denoise": iter((10, 30, 20)), "encode": iter((50,)), "decode": iter((40, 45))}
    running = highres.running

    def needing(name, run):
        def wrapped(*args, **kwargs):
            memory.hold(next(needs[name]))
            memory.hold(5)
            return run(*args, **kwargs)

        return wrapped

    class Needing(running.GuidedDenoiser):
        __call__ = needing("denoise", running.GuidedDenoiser.__call__)

    monkeypatch.setattr(running, "GuidedDenoiser", Needing)
    monkeypatch.setattr(running, "encode_tiled", needing("encode", running.encode_tiled))
    decode = running.decode_bands

    def decode_bands(*args, **kwargs):
        memory.hold(next(needs["decode"]))
        memory.hold(5)
        yield from decode(*args, **kwargs)
        memory.hold(7)  # while nothing else is going on

    monkeypatch.setattr(running, "decode_bands", decode_bands)
    pipe = highres.HighResPipeline(load_pipeline(small_teacher, dtype="float32", device="cpu"))
    stages = [highres.Stage(64, 64, 1), highres.Stage(128, 128, 2, 0.5, 1.0)]
    memory.hold(90)  # before it, which does not count
    memory.hold(5)
    watch = highres.Watch(pipe, torch.device("cuda"))
    with watch:
        pipe("a cube", stages=stages, progress=highres.ignore)
        memory.hold(60)
        memory.hold(5)
    assert watch.peaks == {"rest": 60, "stage 0": 10, "stage 1": 30, "VAE": 50}
    assert watch.seconds.keys() == {"stage 0", "stage 1", "VAE"}


def test_memory_is_limited_to_that_of_the_smaller_card(load, monkeypatch):
    highres, cuda = load("highres"), torch.device("cuda")
    memory = FakeMemory(monkeypatch, free=60 * 2**30, total=80 * 2**30)
    memory.reserved = 19 * 2**30  # so that 1 GiB is outside of torch
    with highres.memory_limit(cuda, 25):
        assert memory.shares == [pytest.approx(24 / 80)]
    with highres.memory_limit(cuda, None), highres.memory_limit(CPU, 25):
        pass
    assert memory.shares[1:] == [1.0]


def test_highres_says_which_goals_are_met(load):
    highres = load("highres")
    options = ["--model", "sdxl", "--sizes", "4096", "16384", "2160x3840"]
    plain = highres.parse_args(options)
    assert [highres.goals(plain, size) for size in plain.sizes] == [
        (8, None), (60, None), (None, None)
    ]  # fmt: skip
    for vram, expected in ((24, (180, 24)), (10, (180, 24)), (40, (None, None))):
        lean = highres.parse_args([*options, "--vram", str(vram)])
        assert highres.goals(lean, (16384, 16384)) == expected
    assert highres.goals(highres.parse_args(["--model", "tiny"]), (4096, 4096)) == (None, None)

    row = {"size": [16384, 16384], "seconds": 170.0, "goal_seconds": 180, "goal_gib": 24}
    row |= {"peak_gib": 20.0, "reserved_gib": 24.5, "predicted_gib": 22.0, "native": None}
    cells = [next(iter(column.cells)) for column in highres.speed_table("", [row]).columns]
    assert cells == [
        "16384x16384", "170", "180 met", "20.0", "24 missed", "24.5", "22.0", "1.10", "-", "-"
    ]  # fmt: skip


def test_highres_needs_torchao_for_8_bits(load, monkeypatch, tmp_path):
    highres = load("highres")
    options = ["--fp8", "--device", "cpu", "--output", str(tmp_path / "result.json")]
    monkeypatch.setattr(highres.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--fp8: expected torchao: pip install torchao"):
        highres.main(options)
    monkeypatch.setattr(highres.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="--fp8: expected a CUDA device, got 'cpu'"):
        highres.main(options)
    assert not list(tmp_path.iterdir())


def test_highres_compiles_the_denoiser_that_runs_before_it_is_timed(
    small_teacher, load, results_of, monkeypatch
):
    highres, calls = load("highres"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **kw: calls.append(kw))
    run = highres.SpeedBench.run
    monkeypatch.setattr(
        highres.SpeedBench, "run", lambda self, size: calls.append("run") or run(self, size)
    )
    drawn = highres.HighResPipeline.__call__

    def draw(self, *args, stages, **options):
        calls.append([stage.steps for stage in stages])
        return drawn(self, *args, stages=stages, **options)

    monkeypatch.setattr(highres.HighResPipeline, "__call__", draw)
    options = ("--teacher", small_teacher, *QUICK_PICTURES, "--sizes", 128, "--compile")
    results_of("highres", *options)
    assert calls == [{"dynamic": False}, [1, 1], "run", [2, 3]]


def test_the_parts_of_sdxl_have_its_published_sizes(load):
    sdxl = load("sdxl")
    tokenizer = sdxl._build_tokenizer()
    with torch.device("meta"):
        encoders = sdxl.build_text_encoders()
        parts = {
            "unet": sdxl.build_sdxl_unet(),
            "vae": sdxl.build_sdxl_vae(),
            "text_encoder": encoders[0],
            "text_encoder_2": encoders[1],
        }
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert found == {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }  # fmt: skip
    ids = tokenizer(load("highres").PROMPT, padding="max_length").input_ids
    assert len(ids) == 77 and max(ids) < parts["text_encoder"].config.vocab_size
    assert max(tokenizer.all_special_ids) < parts["text_encoder"].config.vocab_size


def test_random_blocks_add_something_and_know_the_models_own_size(load):
    sdxl = load("sdxl")
    model = tiny_unet()
    inputs = load("models").random_inputs(model, 1, 8, 8)
    with torch.no_grad():
        before = model(**inputs).sample
        sdxl.put_random_blocks(model, GSPN2Config(proxy_ratio=4))
        after = model(**inputs).sample
        with softmax_attention(model):
            assert torch.equal(model(**inputs).sample, before)
    assert torch.isfinite(after).all() and not torch.allclose(after, before)
    blocks = GSPN2Adapter.of_patched(model).blocks
    assert {block.native_grid for block in blocks} == {site.grid for site in gspn2_sites(model)}


class FakeRenderer:
    """Draws noise, quickly."""

    def __init__(self, resolution, device):
        self.resolution = resolution

    def __call__(self, scenes):
        generator = torch.Generator().manual_seed(self.resolution)
        return torch.rand(len(scenes), 3, *[self.resolution] * 2, generator=generator)


@pytest.fixture
def noise_for_renders(load, monkeypatch):
    for module in ("gspn2_diffusers.tiny_scenes.score", "highres_quality"):
        monkeypatch.setattr(load(module), "Renderer", FakeRenderer)


QUALITY = ("--experiment", "quality", *QUICK_PICTURES, "--scenes", 2, "--scales", 2)
CONTESTANTS = ["base, Lanczos", "cascade, GSPN-2", "cascade, GSPN-2, dilated", "cascade, softmax",
               "direct, GSPN-2", "direct, softmax"]  # fmt: skip


def test_highres_judges_every_contestant(small_teacher, noise_for_renders, results_of, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    options = ("--teacher", small_teacher, *QUALITY, "--detail-renders", 1, "--sheet", sheet)
    results, printed = results_of("highres", *options)
    base, *rows = results["rows"]
    assert (base["contestant"], base["size"], base["detail"]) == ("base", [64, 64], None)
    assert [row["contestant"] for row in rows] == CONTESTANTS
    for row in results["rows"]:
        assert "error" not in row and row["seconds"] > 0
        assert row["scores"]["scenes"] == 2 and "seconds" not in row["scores"]
        assert "all_right" in row["scores"] and row["contestant"] in printed
    details = {row["contestant"]: row["detail"] for row in rows}
    assert details["base, Lanczos"] < details["direct, softmax"] < 1  # renders are noise here
    # All cascades begin with what the base is.
    assert all(row["stages"][0] == base["stages"][0] for row in rows[:4])
    assert [stage["dilated_steps"] for stage in rows[2]["stages"]] == [0, 1]
    assert rows[2]["stages"][1]["dilation"] == 2
    assert results["arguments"]["sheet"] == "sheet.png"
    with Image.open(sheet) as picture:
        assert picture.width % 7 == 0 and sheet.stat().st_size <= 400_000


@pytest.fixture
def contest(small_teacher, noise_for_renders, load):
    quality = load("highres_quality")
    args = load("highres").parse_args([str(o) for o in (*QUALITY, "--teacher", small_teacher)])
    args.dtype = "float32"
    pipe = quality.load_teacher(small_teacher, CPU)
    quality.apply_gspn2(pipe, shipped_folder("gspn2"))
    exam = quality.prepare_exam(CPU, 2, 0)
    return quality.Contest(args, quality.HighResPipeline(pipe), exam)


def test_contestants_draw_the_same_captions_from_the_same_seeds(contest, load):
    quality = load("highres_quality")
    base = contest.draw(contest.all[1, "base"])[0]
    enlarged = contest.draw(contest.all[2, "base, Lanczos"])[0]
    assert torch.equal(enlarged, quality.enlarged(base, 128))
    cascade = contest.all[2, "cascade, GSPN-2"]
    first = contest.draw(replace(cascade, stages=cascade.stages[:1], side=64))[0]
    assert torch.equal(first, base)
    drawn = {name: contest.draw(contest.all[2, name])[0] for name in CONTESTANTS[1:]}
    assert all(images.shape == (2, 3, 128, 128) for images in drawn.values())
    assert len({images.numpy().tobytes() for images in drawn.values()}) == len(drawn)
    contest.args.batch_size = 1  # pictures do not depend on those beside them
    alone = contest.draw(cascade)[0].int()
    assert (alone - drawn[cascade.name].int()).abs().max() <= 1


def test_a_transformer_has_no_dilated_contestant(contest, load):
    args, quality = contest.args, load("highres_quality")
    pipe = load_pipeline(WEIGHTS / "pixart", dtype="float32", device="cpu")
    found = quality.contestants_at(args, quality.HighResPipeline(pipe), 2)
    assert [one.name for one in found] == [name for name in CONTESTANTS if "dilated" not in name]
    assert [one.side for one in found] == 5 * [512]


def test_fine_energy_is_that_above_the_limit(load):
    fine_energy = load("highres_quality").fine_energy
    place = torch.arange(64) + 0.5
    for cycles, expected in ((0.1, 0.0), (0.2, 0.0), (0.3, 0.5), (0.45, 0.5)):
        wave = torch.cos(2 * torch.pi * cycles * place) + 3
        for images in (wave.expand(1, 3, 64, 64), wave[:, None].expand(1, 3, 64, 64)):
            assert fine_energy(images, 0.25) == pytest.approx(expected, abs=0.02)


def test_figures_of_highres_show_goals_native_times_and_predictions(load, tmp_path):
    pytest.importorskip("matplotlib")
    figures = load("figures")
    about = {"device": "GPU", "torch": "2", "date": "2026-01-02T03:04:05"}
    rows = [
        {
            "experiment": "speed", "size": [side, side], "seconds": side / 500,
            "goal_seconds": side / 400, "goal_gib": None,
            "native": {"seconds": side**2 / 1e5, "steps": 50} if side < 8000 else None,
            "peak_gib": 20.0, "predicted_gib": 21.0,
            "phases": [{"what": "stage 0", "peak_gib": 9.0, "predicted_gib": 9.5}],
        }
        for side in (4096, 8192)
    ]  # fmt: skip
    rows.append({"experiment": "speed", "size": [64, 64], "error": "out of memory"})
    rows.append({"experiment": "quality", "size": [64, 64]})
    for name, vram, reuse in (("sdxl", None, 1), ("sdxl-24gib", 24.0, 1), ("sdxl-deep", None, 3)):
        arguments = {
            "dtype": "bfloat16", "model": "sdxl", "vram": vram, "reuse": reuse,
            "upsample": "pixel", "compile": False, "fp8": False, "channels_last": False,
        }  # fmt: skip
        results = {"environment": about, "arguments": arguments, "rows": rows}
        (tmp_path / f"highres-{name}-cuda.json").write_text(json.dumps(results))
    plans = {"environment": about, "arguments": {"upsample": "pixel"}, "rows": [{"card": "GPU"}]}
    (tmp_path / "highres-plans-cpu.json").write_text(json.dumps(plans))
    labels = [found["label"] for found in figures.find_highres(tmp_path)]
    assert labels == ["all memory, GPU", "24 GiB, GPU"]
    figures.main(["--results", str(tmp_path), "--images", str(tmp_path / "images")])
    drawn = {path.stem: path.stat().st_size for path in (tmp_path / "images").iterdir()}
    assert drawn.keys() == {"highres-time", "highres-memory"} and min(drawn.values()) > 5000


def test_plans_say_how_and_what_would_fit(load, results_of, monkeypatch):
    plans = load("plans")
    unet = tiny_unet(sample_size=32)
    monkeypatch.setattr(plans, "sdxl_parts", lambda: plans.Parts(unet, tiny_vae()))
    options = ("--sizes", 64, 2048, "--cards", "H100:2", "RTX 4090:0.8")
    results, printed = results_of("plans", *options)
    fits, _, _, refused = results["rows"]
    assert fits["size"] == [64, 64] and 0.5 < fits["peak_gib"] < 2 and fits["seconds"] > 0
    assert refused["how"] is None and refused["needed_gib"] > 0.8
    assert "would fit" in printed and "RTX 4090" in printed


def test_plans_refuse_cards_that_they_do_not_know(load):
    with pytest.raises(SystemExit, match="got 'abacus:3'"):
        find = partial(load("plans").find_plans, [(64, 64)], ["abacus:3"], "pixel")
        load("options").run_script(find)
