# SPDX-License-Identifier: MIT
"""Samplers against data whose exact score is known: a Gaussian, a point and a mixture of three."""

import math

import pytest
import torch

from idiff import SAMPLERS, VPSDE, invert, sample_ddim, sample_dpmpp, sample_em, sample_heun
from idiff import sample_pc, seeded_noise, time_grid

SDE = VPSDE()
MEAN, STD = 0.3, 0.5                                            # Gaussian data
MEANS = torch.tensor([-0.8, 0.1, 0.7], dtype=torch.float64)     # mixture
STDS = torch.tensor([0.1, 0.1, 0.05], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
STOCHASTIC = {"em": {}, "pc": {}, "ddim": {"eta": 1.0}}         # name: options


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def marginal(t, mean=MEAN, std=STD):
    """Mean and standard deviation of x_t for data N(mean, std^2)."""
    return SDE.alpha(t) * mean, (SDE.alpha(t)**2 * std**2 + SDE.sigma(t)**2).sqrt()


def gaussian_eps(x, t):
    mean, std = marginal(t.view(-1, 1, 1, 1))
    return SDE.sigma(t).view(-1, 1, 1, 1) * (x - mean) / std**2


def gaussian_flow(x, t, t_next):
    """The probability-flow ODE keeps the distance from the mean in standard deviations."""
    (mean, std), (mean_next, std_next) = marginal(t), marginal(t_next)
    return mean_next + std_next / std * (x - mean)


def mixture_eps(x, t):
    mean, std = marginal(t, MEANS[:, None], STDS[:, None])          # (3, B) each
    mean, std, weight = (v.view(3, -1, 1, 1, 1) for v in (mean, std, WEIGHTS))
    distance = (x - mean) / std                                     # (3, B, C, H, W)
    share = (weight.log() - std.log() - 0.5 * distance**2).softmax(dim=0)
    return SDE.sigma(t).view(-1, 1, 1, 1) * (share * distance / std).sum(dim=0)


def mixture_images(n):
    """(n, 1, 16, 16) with independent pixels from the mixture."""
    k = torch.multinomial(WEIGHTS, n * 256, replacement=True)
    return (MEANS[k] + STDS[k] * torch.randn(n * 256)).view(n, 1, 16, 16)


def grid(steps, kind):
    """steps + 1 times from 1 to 1e-3, uniform in t or in the logarithm of signal to noise."""
    if kind == "uniform":
        return torch.linspace(1, 1e-3, steps + 1)
    return time_grid(steps, SDE)


def affine_moments(sampler, steps, kind, **options):
    """Exact mean and std at the end of an affine stochastic sampler started from N(0, 1).

    x_end = B + A x_start + sum_i c_i xi_i. Row 0 of one batch starts at 0 without noise and gives
    B, row 1 starts at 1 and gives A + B, row 2 + i has xi_i = 1 and gives c_i + B.
    """
    draws = iter(torch.eye(steps + 2).view(steps + 2, -1, 1, 1, 1))
    next(draws)
    start = next(draws)
    end = sampler(gaussian_eps, start, grid(steps, kind), SDE, lambda: next(draws),
                  **options)
    assert next(draws, None) is None                        # one draw a step
    return end[0].squeeze(), (end[1:] - end[0]).norm()


def order(errors, refinement):
    return math.log(errors[0] / errors[1]) / math.log(refinement)


def test_sde_coefficients_satisfy_its_moment_equations():
    t = torch.linspace(1e-5, 1, 1000, requires_grad=True)
    torch.testing.assert_close(SDE.alpha(t)**2 + SDE.sigma(t)**2, torch.ones(1000))
    rate, = torch.autograd.grad(SDE.log_alpha(t).sum(), t)  # d mean/dt = -beta mean/2
    torch.testing.assert_close(rate, -SDE.beta(t) / 2)
    rate, = torch.autograd.grad((SDE.sigma(t)**2).sum(), t)     # d var/dt = beta (1 - var)
    torch.testing.assert_close(rate, SDE.beta(t) * SDE.alpha(t)**2)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_t_of_lam_inverts_lam(dtype, rtol):
    t = torch.logspace(-5, 0, 200, dtype=dtype)
    torch.testing.assert_close(SDE.t_of_lam(SDE.lam(t)), t, rtol=rtol, atol=0)
    torch.testing.assert_close(SDE.t_of_lam(SDE.lam(t[50])), t[50], rtol=rtol, atol=0)


def test_lam_is_half_the_log_snr():
    t = torch.linspace(1e-3, 1, 50)
    torch.testing.assert_close((2 * SDE.lam(t)).exp(), SDE.alpha(t)**2 / (1 - SDE.alpha(t)**2))


def test_add_noise_uses_each_image_s_own_time():
    t, x, eps = torch.tensor([0.1, 0.9]), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    both = SDE.add_noise(x, eps, t)
    for k in range(2):
        torch.testing.assert_close(both[k], SDE.alpha(t[k]) * x[k] + SDE.sigma(t[k]) * eps[k])


@pytest.mark.parametrize("kind, coordinate", [("uniform", lambda t: t), ("logsnr", SDE.lam)])
def test_grid_is_even_in_its_coordinate(kind, coordinate):
    ts = grid(40, kind)
    assert ts.shape == (41,) and ts[0] == 1 and ts[-1] == 1e-3
    steps = coordinate(ts).diff()
    torch.testing.assert_close(steps, steps.mean().expand(40))


@pytest.mark.parametrize("way", ["decode", "encode"])
@pytest.mark.parametrize("sampler, kind, at_least", [
    (sample_ddim, "uniform", 0.9), (sample_ddim, "logsnr", 0.9),
    (sample_heun, "uniform", 1.9), (sample_heun, "logsnr", 1.9), (sample_dpmpp, "logsnr", 1.9)])
def test_ode_sampler_has_its_order(sampler, kind, at_least, way):
    x, errors = torch.linspace(-3, 3, 32).view(2, 1, 4, 4), []
    for steps in (160, 640):
        ts = grid(steps, kind)
        ts = ts if way == "decode" else ts.flip(0)
        error = sampler(gaussian_eps, x, ts, SDE) - gaussian_flow(x, ts[0], ts[-1])
        errors.append(error.abs().mean().item())
    assert order(errors, 4) >= at_least


@pytest.mark.parametrize("sampler, at_least", [
    (sample_ddim, 0.9), (sample_heun, 2.9), (sample_dpmpp, 1.9)])
def test_round_trip_has_its_order(sampler, at_least):
    x, errors = torch.linspace(-3, 3, 32).view(2, 1, 4, 4), []
    for steps in (160, 640):
        ts = time_grid(steps, SDE)
        back = sampler(gaussian_eps, sampler(gaussian_eps, x, ts.flip(0), SDE), ts, SDE)
        errors.append((back - x).abs().mean().item())
    assert order(errors, 4) >= at_least


@pytest.mark.parametrize("kind", ["uniform", "logsnr"])
@pytest.mark.parametrize("sampler, options, at_least", [
    (sample_em, {}, 0.9), (sample_ddim, {"eta": 1.0}, 0.85)])
def test_std_of_stochastic_sampler_has_order_one(sampler, options, at_least, kind):
    _, std = marginal(torch.tensor(1e-3))
    errors = [(affine_moments(sampler, steps, kind, **options)[1] - std).abs().item()
              for steps in (100, 200, 400)]
    assert order(errors[:2], 2) >= at_least and order(errors[1:], 2) >= at_least


def test_means_of_stochastic_samplers():
    mean, _ = marginal(torch.tensor(1e-3))
    em = [(affine_moments(sample_em, steps, "logsnr")[0] - mean).abs() for steps in (100, 400)]
    assert order(em, 4) >= 0.9
    ancestral, _ = affine_moments(sample_ddim, 50, "logsnr", eta=1.0)
    assert (ancestral - mean).abs() < 1e-5                  # exact but for the start's mean of 0


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpmpp])
@pytest.mark.parametrize("t, t_next", [(1.0, 1e-3), (0.7, 0.2), (0.2, 0.7)])
def test_one_step_is_exact_for_a_single_data_point(sampler, t, t_next):
    ts, x, eps = torch.tensor([t, t_next]), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    x_t, x_next = (SDE.add_noise(x, eps, u) for u in ts)
    torch.testing.assert_close(sampler(lambda x_t, t: eps, x_t, ts, SDE), x_next)


@pytest.mark.parametrize("t, t_next", [(1.0, 1e-3), (0.7, 0.2), (0.21, 0.2)])
def test_ancestral_step_is_the_posterior_of_the_forward_process(t, t_next):
    """x_next given x_t and x_0 is Gaussian; cov(x_next, x_t | x_0) = alpha/alpha_next var_next."""
    ts, x, eps, xi = torch.tensor([t, t_next]), *torch.randn(3, 2, 1, 4, 4)
    (alpha, alpha_next), (var, var_next) = SDE.alpha(ts), SDE.sigma(ts)**2
    cov = alpha / alpha_next * var_next
    expected = alpha_next * x + cov / var.sqrt() * eps + (var_next - cov**2 / var).sqrt() * xi
    x_t = SDE.add_noise(x, eps, ts[0])
    torch.testing.assert_close(
        sample_ddim(lambda x_t, t: eps, x_t, ts, SDE, lambda: xi, eta=1.0), expected)


def test_first_order_dpmpp_is_ddim():
    ts, x = time_grid(10, SDE), torch.randn(4, 1, 8, 8)
    for pair in [*ts.unfold(0, 2, 1), *ts.flip(0).unfold(0, 2, 1)]:
        torch.testing.assert_close(sample_dpmpp(mixture_eps, x, pair, SDE),
                                   sample_ddim(mixture_eps, x, pair, SDE))


def test_langevin_alone_reaches_the_marginal():
    """Steps of no length leave the corrector alone; from a wrong start it finds p_t.

    Its std is high by snr^2 / 2, to first order, and known to 0.28 % from 65,536 pixels.
    """
    noise = seeded_noise(range(16), (1, 64, 64), "cpu")
    x = sample_pc(gaussian_eps, 2 + noise(), torch.full((201,), 0.3), SDE, noise)
    mean, std = marginal(torch.tensor(0.3))
    assert (x.mean() - mean).abs() < 0.015 * std
    assert abs(x.std() / std - 1 - 0.16**2 / 2) < 0.008


def test_pc_without_langevin_is_em():
    ts, x, draws = time_grid(20, SDE), torch.randn(2, 1, 4, 4), torch.randn(20, 2, 1, 4, 4)
    twice, once = iter(draws.repeat_interleave(2, dim=0)), iter(draws)
    torch.testing.assert_close(
        sample_pc(mixture_eps, x, ts, SDE, lambda: next(twice), snr=0.0),
        sample_em(mixture_eps, x, ts, SDE, lambda: next(once)))


@pytest.mark.parametrize("name, steps, kind, options", [
    ("em", 400, "uniform", {}), ("pc", 200, "uniform", {}), ("ddim", 300, "logsnr", {}),
    ("ddim", 400, "logsnr", {"eta": 1.0}), ("heun", 25, "logsnr", {}), ("dpmpp", 30, "logsnr", {})])
def test_mixture_moments_and_weights(name, steps, kind, options):
    """16,384 independent pixels: every bound is the sampling error's 4 standard deviations."""
    noise = seeded_noise(range(16), (1, 32, 32), "cpu")
    x = SAMPLERS[name](mixture_eps, noise(), grid(steps, kind), SDE, noise, **options)
    mean, std = marginal(torch.tensor(1e-3), MEANS, STDS)
    true_mean = WEIGHTS @ mean
    spread = mean - true_mean
    true_var = WEIGHTS @ (std**2 + spread**2)
    fourth = WEIGHTS @ (spread**4 + 6 * spread**2 * std**2 + 3 * std**4)
    bound = 4 / x.numel()**0.5
    assert (x.mean() - true_mean).abs() < bound * true_var.sqrt()
    assert (x.var() - true_var).abs() < bound * (fourth - true_var**2).sqrt()
    part = torch.bucketize(x, torch.tensor([-0.35, 0.45]))  # the gaps between the three
    for k in range(3):
        share = (part == k).double().mean()
        assert (share - WEIGHTS[k]).abs() < bound * (WEIGHTS[k] * (1 - WEIGHTS[k])).sqrt()
        if k < 2:    # the third, narrow one is still 5 to 10 % too wide after em's and pc's steps
            assert (x[part == k].std() / std[k] - 1).abs() < bound / (2 * WEIGHTS[k])**0.5


def test_inversion_returns_at_50_evaluations():
    x, ts = mixture_images(8), time_grid(50, SDE)
    start = invert(mixture_eps, x, ts, SDE)
    assert (sample_dpmpp(mixture_eps, start, ts, SDE) - x).abs().mean() < 1e-3
    torch.testing.assert_close(invert(mixture_eps, x, ts.flip(0), SDE), start)
    assert start.mean().abs() < 0.1 and abs(start.std() - 1) < 0.06     # noise N(0, 1)


@pytest.mark.parametrize("name, options", [("ddim", {"eta": 1.0}), *((n, {}) for n in SAMPLERS)])
def test_sample_does_not_depend_on_its_batch(name, options):
    def run(seeds):
        noise = seeded_noise(seeds, (3, 8, 8), "cpu")
        return SAMPLERS[name](mixture_eps, noise(), time_grid(15, SDE), SDE, noise, **options)

    batch = run([3, 7, 11])
    torch.testing.assert_close(run([7]), batch[1:2])
    torch.testing.assert_close(run([11, 3]), batch[[2, 0]])
    assert (batch[0] - batch[1]).abs().mean() > 0.1


@pytest.mark.parametrize("name, per_step", [("em", 1), ("pc", 2), ("ddim", 1), ("heun", 2),
                                            ("dpmpp", 1)])
def test_eps_fn_gets_one_time_per_image_and_is_called_as_documented(name, per_step):
    seen = []

    def eps_fn(x, t):
        seen.append((t.shape, t.dtype))
        return gaussian_eps(x, t)

    noise = seeded_noise([1, 2], (1, 4, 4), "cpu")
    x = SAMPLERS[name](eps_fn, noise().float(), time_grid(6, SDE).float(), SDE,
                       lambda: noise().float())
    assert seen == [((2,), torch.float32)] * 6 * per_step
    assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize("name, options", STOCHASTIC.items())
def test_stochastic_sampler_needs_noise_and_a_decreasing_grid(name, options):
    x, ts = torch.zeros(1, 1, 2, 2), time_grid(4, SDE)
    with pytest.raises(ValueError, match="needs noise"):
        SAMPLERS[name](gaussian_eps, x, ts, SDE, **options)
    with pytest.raises(ValueError, match="decreasing ts"):
        SAMPLERS[name](gaussian_eps, x, ts.flip(0), SDE, lambda: x, **options)
