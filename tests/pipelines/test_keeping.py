"""Finished stages are found again by the run that they belong to, and by no other."""

import pytest
import torch

from gspn2_diffusers.pipelines.keeping import StageStore

REQUEST = {"prompts": ["a lake"], "seeds": [[1, 2]]}
STAGES = [{"height": 64, "steps": 4}, {"height": 128, "steps": 2}]
LATENTS = torch.arange(8.0).reshape(1, 2, 2, 2)


def test_latents_come_back_as_they_were(tmp_path):
    store = StageStore(tmp_path / "run", REQUEST, STAGES)
    assert store.latest() is None
    store.save(0, LATENTS)
    again = StageStore(tmp_path / "run", REQUEST, STAGES)
    assert again.latest() == 0
    assert torch.equal(again.load(0), LATENTS)
    assert not list((tmp_path / "run").glob(".*")), "an unfinished file was left behind"


def test_a_changed_later_stage_keeps_the_earlier_ones(tmp_path):
    store = StageStore(tmp_path, REQUEST, STAGES)
    store.save(0, LATENTS)
    store.save(1, LATENTS)
    assert StageStore(tmp_path, REQUEST, STAGES).latest() == 1
    changed = [STAGES[0], {**STAGES[1], "steps": 3}]
    assert StageStore(tmp_path, REQUEST, changed).latest() == 0


@pytest.mark.parametrize("change", [{"prompts": ["a hill"]}, {"seeds": [[1, 3]]}])
def test_another_run_does_not_take_them(tmp_path, change):
    StageStore(tmp_path, REQUEST, STAGES).save(0, LATENTS)
    assert StageStore(tmp_path, REQUEST | change, STAGES).latest() is None


def test_a_write_that_fails_leaves_the_old_latents(tmp_path, monkeypatch):
    store = StageStore(tmp_path, REQUEST, STAGES)
    store.save(0, LATENTS)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("gspn2_diffusers.pipelines.keeping.save_file", full)
    with pytest.raises(OSError, match="no space"):
        store.save(0, LATENTS + 1)
    assert torch.equal(store.load(0), LATENTS)
