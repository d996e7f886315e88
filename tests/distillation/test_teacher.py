"""The denoiser is told in training what its pipeline tells it."""

import pytest
import torch
from tiny_teachers import FAMILIES, random_batch, teacher_pipeline, with_text_encoder

from gspn2_diffusers.conditioning import denoiser_inputs, native_resolution, predict, size_step
from gspn2_diffusers.distillation.teacher import TeacherEncoder
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.fingerprint import fingerprint
from gspn2_diffusers.noising import Noising

SIZES = torch.tensor([[40, 36, 2, 0, 32, 32]])


class Told(Exception):
    """Carries what a pipeline's denoiser was called with."""


def told_by_pipeline(pipe, *args, **kwargs):
    """The keyword arguments of the denoiser's first call, without guidance."""

    def stop(module, inputs, keywords):
        raise Told(keywords)

    hook = find_denoiser(pipe).register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Told) as caught:
        pipe(*args, num_inference_steps=1, guidance_scale=1.0, **kwargs)
    hook.remove()
    return caught.value.args[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_tells_the_denoiser_what_the_pipeline_tells_it(family):
    pipe = teacher_pipeline(family)
    if family == "pixart":
        pipe = with_text_encoder(pipe)
    captions = ["a cat"] if family != "dit" else ["dog"]
    rows = TeacherEncoder(pipe).encode_prompts(captions) | {"sizes": SIZES}
    found = denoiser_inputs(find_denoiser(pipe), rows)
    if family == "dit":
        assert found["class_labels"].tolist() == [4]
        return
    size = {"height": 32, "width": 32}
    if family == "pixart":
        size["use_resolution_binning"] = False
    if family == "sdxl":
        size |= {"original_size": (40, 36), "crops_coords_top_left": (2, 0)}
    expected = told_by_pipeline(pipe, captions, **size)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        if expected.get(name) is not None:
            torch.testing.assert_close(found[name], expected[name])
    added = expected.get("added_cond_kwargs") or {}
    for name, value in added.items():
        assert (found["added_cond_kwargs"][name] is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(found["added_cond_kwargs"][name], value)


def test_no_caption_is_what_the_pipeline_makes_of_it_under_guidance():
    encoder = TeacherEncoder(teacher_pipeline("sd"))
    expected = encoder.encode_prompts([""])["prompt_embeds"]
    torch.testing.assert_close(encoder.encode_unconditional()["prompt_embeds"], expected)
    zeros = TeacherEncoder(teacher_pipeline("sdxl")).encode_unconditional()
    assert all((column == 0).all() for column in zeros.values())  # as SDXL is configured
    labels = TeacherEncoder(teacher_pipeline("dit")).encode_unconditional()["class_labels"]
    assert labels.tolist() == [10]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_has_the_shape_of_the_latents_whatever_variances_are_learned(family):
    pipe = teacher_pipeline(family)
    batch = random_batch(family)
    levels = Noising(pipe.scheduler).levels(batch.quantiles)
    denoiser = find_denoiser(pipe)
    inputs = denoiser_inputs(denoiser, batch.rows)
    answer = predict(denoiser, batch.latents, levels.timesteps, inputs)
    assert answer.shape == batch.latents.shape


def test_images_become_the_latents_that_decode_to_them():
    pipe = teacher_pipeline("sd")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    latents = TeacherEncoder(pipe).encode_images(images)
    pixels = pipe.image_processor.preprocess(images / 255)
    expected = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert latents.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("family", ["sd", "dit"])
def test_a_picture_the_teacher_draws_depends_on_its_own_seed_only(family):
    pipe = teacher_pipeline(family)
    # DiT's pipeline guides by class 1000, which the small model does not have.
    encoder = TeacherEncoder(pipe, steps=2, guidance_scale=1.0 if family == "dit" else None)
    captions = ["a", "b"] if family == "sd" else ["3", "4"]
    pair = encoder.generate(captions, [7, 8], 32, 32)
    (second,) = encoder.generate(captions[1:], [8], 32, 32)
    torch.testing.assert_close(pair[1], second, rtol=1e-3, atol=1e-4)
    assert pair.shape == (2, 4, 8, 8)


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="expected a class number or a label .* got 'fish'"):
        TeacherEncoder(teacher_pipeline("dit")).encode_prompts(["fish"])


def test_the_identity_of_a_part_changes_with_its_weights_only():
    pipe = teacher_pipeline("sd")
    before = fingerprint(pipe.vae)
    assert fingerprint(teacher_pipeline("sd").vae) == before
    pipe.vae.encoder.conv_in.bias.data += 1
    assert fingerprint(pipe.vae) != before


def test_sizes_fit_the_denoisers_levels_and_patches():
    assert (native_resolution(teacher_pipeline("sd")), size_step(teacher_pipeline("sd"))) == (32, 8)
    pixart = teacher_pipeline("pixart")
    assert (native_resolution(pixart), size_step(pixart)) == (32, 8)


def test_a_pipeline_without_an_autoencoder_is_refused():
    pipe = teacher_pipeline("sd")
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match="expected a pipeline with a VAE"):
        TeacherEncoder(pipe)
