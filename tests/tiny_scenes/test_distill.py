"""Distillation trains the blocks and nothing else, towards the teacher's layers and output."""

import argparse

import pytest
import torch
from tiny_models import awaken, tiny_text_encoder, tiny_unet

from gspn2_diffusers import GSPN2Adapter, apply_gspn2
from gspn2_diffusers.pipelines import load_pipeline
from gspn2_diffusers.tiny_scenes import distill
from gspn2_diffusers.tiny_scenes.models import WEIGHTS

OPTIONS = argparse.Namespace(proxy_ratio=4, parameters_from="tokens")


@pytest.fixture
def distillation():
    torch.manual_seed(0)
    teacher = tiny_unet().requires_grad_(False)
    for name, parameter in teacher.named_parameters():
        if "attn1.to_q" in name:
            parameter.mul_(30)  # random attention is nearly uniform, which new blocks already are
    student, adapter = distill.make_student(teacher, OPTIONS)
    model = distill.Distillation(tiny_text_encoder().requires_grad_(False), teacher, student)
    batch = (torch.randn(4, 4, 8, 8), torch.randint(0, 1000, (4,)), torch.randint(0, 50, (4, 16)))
    return model, adapter, batch


@pytest.mark.parametrize("forced", [True, False])
def test_both_stages_lower_their_loss_and_train_only_the_blocks(distillation, forced):
    model, adapter, batch = distillation
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(*batch, forced)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed and all(".gspn2." in name for name in changed)


def test_teacher_forcing_gives_each_block_its_own_layers_input_and_output(distillation):
    model, _, (noisy, timesteps, ids) = distillation
    awaken(model.student)  # blocks that are far from the teacher do not reach its inputs
    name = model.layers[-1]
    seen = []
    handle = model.teacher.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    text = model.text_encoder(ids)[0]
    model.teacher(noisy, timesteps, text)
    handle.remove()
    with distill._observe(model.student, model.layers) as observed:
        with distill.softmax_attention(model.student):
            model.student.forward(noisy, timesteps, text)
    for found, expected in zip(observed[name], seen[0], strict=True):
        assert torch.equal(found, expected)


def test_a_student_that_equals_its_teacher_has_no_loss(distillation):
    model, _, batch = distillation
    with distill.softmax_attention(model.student):
        assert model(*batch, False) == 0


def test_the_script_writes_weights_that_the_pipeline_takes(tmp_path):
    distill.main(
        f"--output_dir {tmp_path}/run --gspn2_dir {tmp_path}/gspn2 --max_train_steps 2"
        " --resolution 64 --supersample 1 --train_batch_size 2 --pool_size 4 --pool_batch_size 2"
        " --pool_seconds 0 --dataloader_num_workers 0 --eval_scenes 0 --teacher_forcing 0.5"
        " --mixed_precision no --checkpointing_steps 100".split()
    )
    pipe = load_pipeline(WEIGHTS / "pipeline", dtype="float32", device="cpu")
    apply_gspn2(pipe, tmp_path / "gspn2")
    assert len(GSPN2Adapter.of_patched(pipe).blocks) == 13
