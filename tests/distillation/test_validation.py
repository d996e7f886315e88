"""Validation measures the student on its own rows and draws it beside its teacher."""

import pytest
import torch
from accelerate import Accelerator
from tiny_models import awaken
from tiny_teachers import patched_pipeline, random_batch

from gspn2_diffusers.distillation.losses import Distillation
from gspn2_diffusers.distillation.validation import Validation
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising


class Rows:
    def of_step(self, step):
        yield random_batch(seed=step)


def build(folder, family="sd", prompts=()):
    pipe, _ = patched_pipeline(family)
    awaken(find_denoiser(pipe))
    distillation = Distillation(find_denoiser(pipe), Noising(pipe.scheduler))
    accelerator = Accelerator(cpu=True)
    return distillation, Validation(
        accelerator, distillation, Rows(), 3, pipe=pipe, folder=folder, prompts=prompts, steps=1
    )


def test_errors_are_means_over_the_held_out_batches_and_the_same_every_time(tmp_path):
    distillation, validation = build(tmp_path)
    found = validation(10, "end_to_end")
    batches = [random_batch(seed=step) for step in range(3)]
    expected = torch.stack([distillation.output_error(batch) for batch in batches]).mean()
    assert found["output_error"] == pytest.approx(expected.item())
    assert found["layer_error"] == pytest.approx(sum(found["layers"].values()) / 7)
    assert list(found["layers"]) == distillation.layers
    assert validation(20, "end_to_end") == found


def test_the_teacher_is_drawn_once_and_the_student_every_time(tmp_path):
    _, validation = build(tmp_path, prompts=["a cat"])
    drawn = []
    generate = validation._generate
    validation._generate = lambda: drawn.append(1) or generate()
    validation(1, "end_to_end")
    validation(2, "end_to_end")
    assert len(drawn) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "validation-000001.png",
        "validation-000002.png",
    ]


def test_prompts_for_a_pipeline_of_classes_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="expected a pipeline that takes text prompts"):
        build(tmp_path, "dit", ["a cat"])
