"""The benchmarks run, and refuse to time what is wrong."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from gspn2_diffusers import gspn2_scan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gate(monkeypatch):
    """The module `gate`, imported as the benchmarks import it: from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gate

    return gate


@pytest.fixture
def denoiser(gate):
    """The module `denoiser`, imported in the same way."""
    import denoiser

    return denoiser


def test_denoiser_times_every_variant_and_writes_what_a_reader_needs(tmp_path):
    output = tmp_path / "result.json"
    options = ["--latents", "8", "4x12", "--repeats", "1", "--warmup", "0", "--threads", "1"]
    command = [sys.executable, "denoiser.py", *options, "--device", "cpu", "--output", output]
    done = subprocess.run(
        command, cwd=BENCHMARKS, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("softmax", "gspn2", "removed", "4x12"))

    result = json.loads(output.read_text())
    rows = result["rows"]
    assert [(row["latent"], row["variant"]) for row in rows] == [
        (latent, variant)
        for latent in ([8, 8], [4, 12])
        for variant in ("softmax", "gspn2", "removed")
    ]
    for row in rows:
        assert row["ms"] > 0
        assert row["speedup"] == pytest.approx(
            rows[3 * (row["latent"] == [4, 12])]["ms"] / row["ms"]
        )
        assert row["tokens"] == row["latent"][0] * row["latent"][1]
    assert result["environment"].keys() >= {"device", "threads", "torch", "date", "commit"}
    assert result["arguments"]["model"] == "tiny"


def test_the_model_is_unchanged_after_every_variant(denoiser):
    unet = denoiser.build("tiny", torch.device("cpu"), torch.float32)
    inputs = denoiser.random_inputs(unet, 1, 8, 8)
    adapter = denoiser.random_adapter(unet, denoiser.GSPN2Config())
    with torch.no_grad():
        before = unet(**inputs).sample
        for variant in (denoiser.gspn2_blocks(unet, adapter), denoiser.no_self_attention(unet)):
            with variant:
                assert not torch.equal(unet(**inputs).sample, before)
            assert torch.equal(unet(**inputs).sample, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gate_lets_the_operator_pass(gate, dtype):
    gate.check_operator(torch.device("cpu"), dtype)


def _directions_swapped(x, logits, lam, u, skip):
    return gspn2_scan(x, logits.flip(1), lam.flip(1), u.flip(1), skip.flip(1))


def _chunked(*inputs):
    return gspn2_scan(*inputs, chunk_size=4)


def _not_finite(*inputs):
    return torch.full_like(inputs[0], torch.nan)


@pytest.mark.parametrize("wrong", [_directions_swapped, _chunked, _not_finite])
def test_the_gate_refuses_a_wrong_operator(gate, wrong):
    with pytest.raises(gate.GateError, match="nothing was timed: expected a relative error"):
        gate.check_operator(torch.device("cpu"), torch.float32, wrong)


def test_nothing_is_timed_or_written_behind_a_closed_gate(denoiser, monkeypatch, tmp_path):
    closed = partial(denoiser.check_operator, scan=_chunked)
    monkeypatch.setattr(denoiser, "check_operator", closed)
    monkeypatch.setattr(denoiser, "measure", lambda *_: pytest.fail("timed a wrong operator"))
    with pytest.raises(denoiser.GateError):
        denoiser.main(["--device", "cpu", "--output", str(tmp_path / "result.json")])
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_finite_are_refused(gate):
    with pytest.raises(gate.GateError, match="gspn2 at 8x8: expected finite outputs"):
        gate.check_finite("gspn2 at 8x8", torch.tensor([1.0, torch.inf]))
