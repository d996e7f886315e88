"""Noise and targets are those of diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from gspn2_diffusers.noising import Noising

LATENTS, NOISE = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
QUANTILES = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
ZERO_SNR = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("extra", [{}, ZERO_SNR])
def test_diffusion_noise_and_targets_are_the_schedulers(prediction, extra):
    scheduler = DDPMScheduler(prediction_type=prediction, **extra)
    noising = Noising(DDIMScheduler(prediction_type=prediction, **extra))
    levels = noising.levels(QUANTILES)
    assert levels.timesteps.tolist() == [0, 100, 500, 900, 999]
    expected = scheduler.add_noise(LATENTS, NOISE, levels.timesteps)
    torch.testing.assert_close(noising.mix(LATENTS, NOISE, levels), expected)
    targets = {
        "epsilon": NOISE,
        "sample": LATENTS,
        "v_prediction": scheduler.get_velocity(LATENTS, NOISE, levels.timesteps),
    }
    target = noising.target(LATENTS, NOISE, levels)
    torch.testing.assert_close(target, targets[prediction])


def test_flow_matching_goes_straight_from_noise_to_latents_with_the_schedulers_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising = Noising(scheduler)
    levels = noising.levels(QUANTILES)
    expected = scheduler.scale_noise(LATENTS, levels.timesteps, NOISE)
    torch.testing.assert_close(noising.mix(LATENTS, NOISE, levels), expected)
    noisy = noising.mix(LATENTS, NOISE, levels)
    velocity = noising.target(LATENTS, NOISE, levels)
    cleaned = noisy - levels.noise[:, None, None, None] * velocity
    torch.testing.assert_close(cleaned, LATENTS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_errors_of_the_clean_latents_alike_for_every_prediction(prediction):
    noising = Noising(DDPMScheduler(prediction_type=prediction))
    levels = noising.levels(torch.tensor([0.05, 0.3, 0.7]))
    snr = (levels.signal / levels.noise) ** 2
    of_clean = {
        "epsilon": (levels.noise / levels.signal) ** 2,
        "v_prediction": levels.noise**2,
        "sample": torch.ones(3),
    }
    expected = snr.clamp(max=5.0) * of_clean[prediction]
    torch.testing.assert_close(noising.min_snr_weights(levels, 5.0), expected)


def test_min_snr_is_finite_where_nothing_of_the_latents_is_left():
    noising = Noising(DDPMScheduler(prediction_type="epsilon", **ZERO_SNR))
    assert noising.min_snr_weights(noising.levels(torch.ones(1)), 5.0).isfinite().all()


def test_an_unknown_prediction_type_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="expected a scheduler .* got 'score'"):
        Noising(scheduler)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_clean_latents_are_read_from_an_answer_and_changed_in_it(kind):
    flow = kind == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(prediction_type=kind)
    noising = Noising(scheduler)
    levels = noising.levels(torch.tensor([0.05, 0.3, 0.5, 0.7, 0.9]))
    noisy, answer = (f(LATENTS, NOISE, levels) for f in (noising.mix, noising.target))
    torch.testing.assert_close(noising.clean(noisy, answer, levels), LATENTS, rtol=1e-3, atol=1e-4)
    change = 0.1 * NOISE.flip(0)
    moved = noising.moved(answer, change, levels)
    expected = LATENTS + change
    torch.testing.assert_close(noising.clean(noisy, moved, levels), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flow", [False, True])
def test_levels_between_the_timesteps_of_training_are_interpolated(flow):
    noising = Noising(FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler())
    middle = (noising.timesteps[400] + noising.timesteps[401]) / 2
    level = noising.level_at(middle)
    for found, table in ((level.signal, noising.signal), (level.noise, noising.noise)):
        assert found.item() == pytest.approx(table[400:402].mean().item(), rel=1e-6)
    exact = noising.level_at(noising.timesteps[7])
    assert exact.noise.item() == pytest.approx(noising.noise[7].item(), rel=1e-6)
    assert noising.level_at(torch.tensor(5000.0)).noise.item() == noising.noise[-1].item()
