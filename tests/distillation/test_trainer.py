"""The loop stops when it should, keeps whole checkpoints only, and loses nothing by resuming."""

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from tiny_teachers import patched_pipeline, random_batch

from gspn2_diffusers.distillation.checkpoints import (
    choose_checkpoint,
    find_checkpoints,
    write_checkpoint,
)
from gspn2_diffusers.distillation.losses import Distillation
from gspn2_diffusers.distillation.trainer import DivergedError, Trainer, TrainingOptions
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising


class Fresh:
    """Batches of noise, as many micro-batches per step as asked for, of one global batch."""

    def __init__(self, micro_steps=1, size=8):
        self.micro_steps, self.size = micro_steps, size
        self.order = self
        self.batch_size = 4

    def of_step(self, step):
        whole = random_batch(n=4, size=self.size, seed=step)
        for micro in range(self.micro_steps):
            places = slice(micro, None, self.micro_steps)
            cut = [
                {name: column[places] for name, column in field.items()}
                if isinstance(field, dict)
                else field[places]
                for field in whole
            ]
            yield type(whole)(*cut)


def build(folder, batches=None, **options):
    pipe, adapter = patched_pipeline()
    distillation = Distillation(find_denoiser(pipe), Noising(pipe.scheduler))
    settings = {
        "stage_steps": {"teacher_forcing": 4, "end_to_end": 2},
        "lr_warmup_steps": 1,
        "logging_steps": 1,
        "checkpointing_steps": None,
    }
    hooks = {name: options.pop(name) for name in list(options) if name in HOOKS}
    options = TrainingOptions(folder, **(settings | options))
    batches = batches or Fresh(options.gradient_accumulation_steps)
    every = dict.fromkeys(options.stage_steps, batches)
    trainer = Trainer(options, Accelerator(cpu=True), distillation, every, **hooks)
    return trainer, adapter


HOOKS = ("validate", "before_stage", "after_stage")


def weights(adapter):
    return torch.cat([p.detach().flatten() for p in adapter.parameters()])


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_stages_run_in_turn_and_callbacks_see_their_ends(tmp_path):
    seen = []
    trainer, _ = build(
        tmp_path,
        before_stage=lambda stage, anew: seen.append(("before", stage, anew)),
        after_stage=lambda stage: seen.append(("after", stage)),
        validate=lambda step, stage: seen.append(("validate", step)) or {"x": 1.0},
        validation_steps=3,
    )
    assert trainer.run()
    assert seen == [
        ("before", "teacher_forcing", True),
        ("validate", 3),
        ("validate", 4),
        ("after", "teacher_forcing"),
        ("before", "end_to_end", True),
        ("validate", 6),
        ("after", "end_to_end"),
    ]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path, stop, ema_decay):
    options = {"ema_decay": ema_decay, "checkpointing_steps": stop, "checkpoints_total_limit": 9}
    whole, expected = build(tmp_path / "whole", **options)
    whole.run()

    class Killed(Exception):
        pass

    def die(step, stage):
        if step > stop:
            raise Killed
        return {}

    first, _ = build(tmp_path / "cut", validate=die, validation_steps=1, **options)
    with pytest.raises(Killed):
        first.run()
    second, found = build(tmp_path / "cut", **options)
    assert second.run("latest")
    assert torch.equal(weights(found), weights(expected))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path):
    first, expected = build(tmp_path, ema_decay=0.9, logging_steps=4)
    first.run()
    lines = (tmp_path / "log.jsonl").read_text()
    again, found = build(tmp_path, ema_decay=0.9, logging_steps=4)
    assert again.run("latest")
    assert (tmp_path / "log.jsonl").read_text() == lines and '"step": 6' in lines
    assert torch.equal(weights(found), weights(expected))


def test_sigterm_saves_a_checkpoint_and_ends(tmp_path):
    def ask(step, stage):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    trainer, _ = build(tmp_path, validate=ask, validation_steps=1)
    assert not trainer.run()
    assert signal.getsignal(signal.SIGTERM) == before
    (checkpoint,) = find_checkpoints(tmp_path)
    assert checkpoint.name == f"checkpoint-{trainer.step}" and trainer.step in (2, 3)
    resumed, _ = build(tmp_path)
    assert resumed.run("latest") and resumed.step == 6


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_a_loss_or_weight_that_is_no_number_stops_and_leaves_the_last_good_checkpoint(
    tmp_path, broken
):
    trainer, adapter = build(tmp_path, checkpointing_steps=1)
    forward = trainer._module._teacher_forcing

    def breaks(batch):
        result = forward(batch)
        if trainer.step == 2 and broken == "loss":
            result["loss"] = result["loss"] * float("nan")
        if trainer.step == 2 and broken == "weights":
            torch.nn.init.constant_(adapter.blocks[0].up.bias, float("inf"))
        return result

    trainer._module._teacher_forcing = breaks
    with pytest.raises(DivergedError, match="step 3.*expected finite|step 3.*a finite loss"):
        trainer.run()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert max(losses(tmp_path)) <= 3


def test_accumulated_micro_batches_are_the_batch_they_make_up(tmp_path):
    one, expected = build(tmp_path / "one")
    one.run()
    many, found = build(tmp_path / "many", gradient_accumulation_steps=4)
    many.run()
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=1e-5)
    for step, loss in losses(tmp_path / "one").items():
        assert losses(tmp_path / "many")[step] == pytest.approx(loss, rel=1e-4)


def test_a_checkpoint_holds_what_is_trained_and_not_the_model(tmp_path):
    trainer, adapter = build(tmp_path)
    trainer.run()
    (folder,) = find_checkpoints(tmp_path)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    trained = 4 * weights(adapter).numel()
    assert trained < sizes["trained.safetensors"] < trained + 20_000
    assert sum(sizes.values()) < 4 * trained + 60_000


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer, _ = build(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    trainer.run()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_that_was_cut_off_is_never_found(tmp_path):
    def save(folder):
        folder.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 3, save, wait=lambda: None, is_main=True, limit=1)
    assert find_checkpoints(tmp_path) == [] and choose_checkpoint(tmp_path, "latest") is None
    trainer, _ = build(tmp_path)
    trainer.run("latest")
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-6"]


def test_weights_of_other_blocks_are_refused(tmp_path):
    build(tmp_path)[0].run()
    other, _ = build(tmp_path)
    other._named.popitem()
    with pytest.raises(ValueError, match="expected weights of this run's blocks"):
        other.run("latest")


def test_a_checkpoint_that_does_not_exist_is_an_error(tmp_path):
    trainer, _ = build(tmp_path)
    with pytest.raises(ValueError, match="expected 'latest' or the folder of a checkpoint"):
        trainer.run("checkpoint-77")


def test_the_average_is_what_is_validated_and_left_in_the_model(tmp_path):
    seen = []
    trainer, adapter = build(
        tmp_path, ema_decay=0.5, validate=lambda s, _: seen.append(weights(adapter)) or {}
    )
    trainer.run()
    assert torch.equal(seen[-1], weights(adapter))
    shadow = torch.cat([p.flatten() for p in trainer.ema.shadow_params])
    assert torch.equal(shadow, weights(adapter))


@pytest.mark.parametrize("steps", [{}, {"teacher_forcing": 0}, {"finetuning": 3}])
def test_stages_that_mean_nothing_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match="expected"):
        TrainingOptions(tmp_path, steps)
