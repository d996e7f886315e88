"""The losses teach each block its own layer, train nothing else, and leave the teacher alone."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import awaken
from tiny_teachers import FAMILIES, patched_pipeline, random_batch

from gspn2_diffusers import checkpoint_with_grid, softmax_attention
from gspn2_diffusers.conditioning import denoiser_inputs, predict
from gspn2_diffusers.distillation.lora import add_lora, lora_layers
from gspn2_diffusers.distillation.losses import Distillation, LossWeights
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising


def build(family="sd", **weights):
    pipe, adapter = patched_pipeline(family)
    noising = Noising(pipe.scheduler)
    return Distillation(find_denoiser(pipe), noising, LossWeights(**weights)), adapter


def train(distillation, parameters, stage, steps=30, batch=None):
    batch = batch or random_batch()
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = distillation(batch, stage)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["teacher_forcing", "end_to_end"])
def test_both_stages_lower_their_loss_and_train_only_the_blocks(family, stage):
    distillation, adapter = build(family)
    before = {name: value.clone() for name, value in distillation.state_dict().items()}
    batch = random_batch(family)
    distillation.calibrate([batch])
    before |= {n: v.clone() for n, v in distillation.named_buffers()}
    losses = train(distillation, adapter.parameters(), stage, batch=batch)
    assert losses[-1] < 0.9 * losses[0]
    after = distillation.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(".gspn2." in name for name in changed)


def test_teacher_forcing_gives_each_block_its_own_layers_input_and_output():
    distillation, adapter = build()
    awaken(distillation.model)  # blocks that are far from the teacher do not reach its inputs
    batch = random_batch()
    levels = distillation.noising.levels(batch.quantiles)
    noisy = distillation.noising.mix(batch.latents, batch.noise, levels)
    inputs = denoiser_inputs(distillation.model, batch.rows)
    errors = {}

    def compare(name):
        def hook(layer, given, output):
            errors[name] = F.mse_loss(layer.gspn2(given[0]), output)

        return hook

    model = distillation.model
    hooks = [model.get_submodule(n).register_forward_hook(compare(n)) for n in distillation.layers]
    with torch.no_grad(), softmax_attention(model):
        predict(model, noisy, levels.timesteps, inputs)
    for hook in hooks:
        hook.remove()
    expected = torch.stack([errors[name] for name in distillation.layers])
    torch.testing.assert_close(distillation(batch, "teacher_forcing")["layers"], expected)


def test_a_student_that_equals_its_teacher_has_no_loss():
    distillation, _ = build(guided=1.0)
    batch = random_batch()
    distillation.calibrate([batch])
    with softmax_attention(distillation.model):
        losses = distillation(batch, "end_to_end")
        assert losses["loss"] == 0 and distillation.output_error(batch) == 0
    assert distillation.output_error(batch) > 0


def test_calibrated_errors_are_relative_to_the_teachers_variance():
    distillation, _ = build()
    batches = [random_batch(seed=seed) for seed in range(3)]
    distillation.calibrate(batches)
    name = distillation.layers[0]
    seen = []
    hook = distillation.model.get_submodule(name).register_forward_hook(
        lambda layer, given, output: seen.append(output)
    )
    with torch.no_grad():
        for batch in batches:
            distillation._teach(*distillation._question(batch))
    hook.remove()
    expected = torch.stack(seen).var(correction=0)
    torch.testing.assert_close(distillation.layer_variance[0], expected, rtol=1e-4, atol=0)


def test_every_weighted_term_is_part_of_the_loss_and_the_others_are_not():
    weights = {"output": 0.5, "layer": 0.25, "block": 2.0, "base": 0.125, "guided": 0.0625}
    distillation, _ = build(**weights)
    losses = distillation(random_batch(), "end_to_end")
    total = sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss"].detach(), total)
    only, _ = build(output=1.0, layer=0.0, block=0.0)
    losses = only(random_batch(), "end_to_end")
    assert losses["loss"] == losses["output"] and "guided" not in losses


def test_the_base_loss_is_the_error_against_the_true_target():
    distillation, _ = build(output=0.0, layer=0.0, block=0.0, base=1.0)
    batch = random_batch()
    levels = distillation.noising.levels(batch.quantiles)
    noisy = distillation.noising.mix(batch.latents, batch.noise, levels)
    inputs = denoiser_inputs(distillation.model, batch.rows)
    output = predict(distillation.model, noisy, levels.timesteps, inputs)
    expected = F.mse_loss(output, batch.noise)
    torch.testing.assert_close(distillation(batch, "end_to_end")["loss"], expected)


def test_the_guided_loss_sees_errors_that_guidance_would_enlarge():
    distillation, _ = build(guided=1.0, guidance_scale=3.0)
    awaken(distillation.model)
    batch = random_batch()
    losses = distillation(batch, "end_to_end")
    answers = {}
    levels = distillation.noising.levels(batch.quantiles)
    noisy = distillation.noising.mix(batch.latents, batch.noise, levels)
    for rows, name in ((batch.rows, "told"), (batch.unconditional, "untold")):
        inputs = denoiser_inputs(distillation.model, rows)
        answers[f"student {name}"] = predict(distillation.model, noisy, levels.timesteps, inputs)
        with softmax_attention(distillation.model):
            answers[f"teacher {name}"] = predict(
                distillation.model, noisy, levels.timesteps, inputs
            )
    guided = {
        who: answers[f"{who} untold"] + 3.0 * (answers[f"{who} told"] - answers[f"{who} untold"])
        for who in ("student", "teacher")
    }
    expected = F.mse_loss(guided["student"], guided["teacher"])
    torch.testing.assert_close(losses["guided"], expected.detach(), rtol=1e-4, atol=1e-6)


def test_the_curriculum_follows_the_smaller_student_and_lowers_its_loss():
    distillation, adapter = build(base=0.0)
    awaken(distillation.model)
    with pytest.raises(ValueError, match="expected a call of follow"):
        distillation(random_batch(size=16), "curriculum")
    distillation.follow(distillation.trained())
    batch = random_batch(size=16)
    losses = train(distillation, adapter.parameters(), "curriculum", 20, batch)
    assert losses[-1] < 0.9 * losses[0]


def test_the_curriculums_frozen_student_keeps_its_weights_and_shares_the_teachers():
    distillation, adapter = build()
    distillation.follow(distillation.trained())
    frozen = distillation._previous.student
    start = [p.clone() for p in frozen.parameters()]
    train(distillation, adapter.parameters(), "curriculum", 3, random_batch(size=16))
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), start, strict=True))
    shared = {id(p) for p in distillation.model.parameters() if not p.requires_grad}
    own = [n for n, p in frozen.named_parameters() if id(p) not in shared]
    assert own and all(".gspn2." in name for name in own)


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_lora_trains_beside_the_blocks_and_is_no_part_of_the_teacher(family):
    pytest.importorskip("peft")
    pipe, adapter = patched_pipeline(family)
    denoiser = find_denoiser(pipe)
    plain = Distillation(denoiser, Noising(pipe.scheduler))
    batch = random_batch(family)
    expected = plain._teach(*plain._question(batch))
    add_lora(denoiser, 2)
    distillation = Distillation(denoiser, Noising(pipe.scheduler))
    trained = [name for name in distillation.trained() if "lora_" in name]
    assert trained and not any("attn1" in name for name in trained)
    for layer in lora_layers(denoiser):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    found = distillation._teach(*distillation._question(batch))
    torch.testing.assert_close(found, expected)
    distillation(batch, "end_to_end")["loss"].backward()
    assert all(p.grad is not None for n, p in denoiser.named_parameters() if "lora_" in n)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        distillation, adapter = build()
        awaken(distillation.model)
        if checkpointing:
            distillation.model.enable_gradient_checkpointing(
                gradient_checkpointing_func=checkpoint_with_grid
            )
        distillation(random_batch(), "end_to_end")["loss"].backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stage", ["teacher_forcing", "end_to_end"])
def test_a_compiled_model_gives_the_same_losses(stage):
    batch = random_batch()
    plain, _ = build()
    compiled, _ = build()
    compiled.model.compile(backend="aot_eager")
    for _ in range(2):
        expected, found = plain(batch, stage), compiled(batch, stage)
        torch.testing.assert_close(found["layers"], expected["layers"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "weights", [{"output": -1.0}, dict.fromkeys(("output", "layer", "block"), 0.0)]
)
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="expected"):
        LossWeights(**weights)
