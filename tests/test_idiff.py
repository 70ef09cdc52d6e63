# SPDX-License-Identifier: MIT
"""Models, prior, losses, checkpoints and data of idiff.py against values derived another way.

    python -m pytest tests/test_idiff.py
    python -m pytest tests/test_idiff.py -k draw
"""
import math
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import evaluate
import idiff
import train
from idiff import (PRIORS, VPSDE, Config, Data, Gaussian, IDiff, contrast_loss, kl_loss,
                   seeded_noise)

SMALL = dict(width=8, unet_width=8, batch_size=4, ddpm_images=2, image_size=16, latent_dim=4,
             n_factors=3, prior="known")


def small_model(seed=0, **changes):
    """A tiny IDiff whose weights are all random, so that no block is the identity."""
    torch.manual_seed(seed)
    model = IDiff(Config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


class Call(nn.Module):
    """A function in place of a network."""
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def mean_logvar(distribution):
    return distribution.mean, distribution.variance.log()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n, side=16, channels=3, seed=0):
    return torch.rand(n, channels, side, side, generator=rng(seed)) * 2 - 1


def one_line(error):
    """The message of an error, which must be a single line that says something."""
    text = str(error.value)
    assert len(text) > 10 and "\n" not in text
    return text


# ---- configuration ----


@pytest.mark.parametrize("name, value", [
    ("kl", -1e-3), ("rec", -0.1), ("kl", math.nan), ("lr", math.inf), ("lr", "0.1"),
    ("batch_size", 0), ("batch_size", 1.5), ("latent_dim", 0), ("u_scale", 0.0), ("u_scale", 1.0),
    ("ema", 1.0), ("steps", -1), ("model", "gan"), ("prior", ""), ("predict", "x0"), ("patch", 3),
    ("unet_width", 12), ("image_size", 40), ("seed", True), ("prior", []), ("u", None)])
def test_config_names_the_field_it_rejects(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert name in one_line(error)


def test_config_survives_a_plain_dict():
    cfg = Config(kl=0.125, model="vae", seed=3)
    assert Config(**{f.name: getattr(cfg, f.name) for f in fields(cfg)}) == cfg
    with pytest.raises(AttributeError):
        cfg.kl = 1.0


# ---- networks ----


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("side, channels", [(16, 1), (32, 3)])
def test_every_network_keeps_its_shapes(patch, side, channels):
    model = small_model(patch=patch, image_size=side, image_channels=channels)
    x, t = images(2, side, channels), torch.tensor([0.1, 0.9])
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (2, 4)
    assert model.decode(mean).shape == model.denoise(x, t, mean, x).shape == x.shape


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_outputs_are_float32_also_under_autocast(precision):
    model, x = small_model(), images(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        mean, logvar = model.encode(x)
        mu_p, logvar_p = mean_logvar(model.prior(torch.zeros(2, 6)))
        x_hat, eps_hat = model.decode(mean), model.unet(x, x[:, 0, 0, 0], mean, x)
    outputs = mean, logvar, mu_p, logvar_p, x_hat, eps_hat
    assert {h.dtype for h in outputs} == {torch.float32}


def test_unet_output_depends_on_z_and_on_t():
    model, x = small_model(), images(1)
    t, z = torch.tensor([0.5]), torch.zeros(1, 4)
    base = model.unet(x, t, z, x)
    assert (model.unet(x, t + 0.3, z, x) - base).abs().max() > 1e-3
    for i in range(4):
        moved = z.clone()
        moved[0, i] = 1
        assert (model.unet(x, t, moved, x) - base).abs().max() > 1e-3


@pytest.mark.parametrize("predict, seen", [("eps", False), ("residual", True)])
def test_unet_sees_the_decoders_image_unless_it_predicts_the_noise(predict, seen):
    model, x, t = small_model(predict=predict), images(1), torch.tensor([0.5])
    change = model.unet(x, t, torch.zeros(1, 4), x) - model.unet(x, t, torch.zeros(1, 4), -x)
    assert bool(change.any()) == seen


@pytest.mark.parametrize("condition", ["mean", "sample"])
def test_denoising_loss_leaves_the_decoder_alone(condition):
    model, x = small_model(predict="residual", condition=condition).train(), images(4)
    model(x, torch.rand(4, 6), torch.rand(4), torch.randn_like(x))["ddpm"].backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all((p.grad is None) == (condition == "mean") for p in model.encoder.parameters())


def test_every_parameter_of_every_network_gets_a_gradient():
    model, x = small_model(prior="full"), images(4)
    terms = model.train()(x, torch.rand(4, 6), torch.rand(4), torch.randn_like(x))
    sum(terms.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("predict", ["eps", "residual"])
def test_an_image_alone_equals_that_image_in_a_batch(predict):
    model, x = small_model(predict=predict), images(5)
    mean, logvar = model.encode(x)
    start = seeded_noise(range(5), x.shape[1:], x.device)()
    decoded, sampled = model.decode(mean), model.sample(mean, start, steps=4)
    for k in range(5):
        alone = model.encode(x[k:k + 1])
        one = seeded_noise([k], x.shape[1:], x.device)()
        torch.testing.assert_close(alone[0], mean[k:k + 1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[1], logvar[k:k + 1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.decode(alone[0]), decoded[k:k + 1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.sample(mean[k:k + 1], one, steps=4), sampled[k:k + 1],
                                   atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", sorted(idiff.SAMPLERS))
def test_samples_are_images_and_repeat(sampler):
    model, z = small_model(), torch.randn(3, 4, generator=rng())
    shape = (3, 16, 16)
    first, second = (model.sample(z, seeded_noise([0, 1, 2], shape, "cpu")(), 3, sampler,
                                  seeded_noise([3, 4, 5], shape, "cpu")) for _ in range(2))
    assert first.shape == (3, *shape) and first.abs().max() <= 1
    assert torch.equal(first, second)


def test_a_head_draws_each_feature_where_it_lies():
    """A change at the upper right shows there; so does one of an extra channel."""
    torch.manual_seed(0)
    head = idiff.Head(4, 1, 3, 5, patch=4)
    h, emb, extra = torch.randn(1, 4, 4, 4), torch.randn(1, 5), torch.randn(1, 1, 16, 16)
    changed, other = h.clone(), extra.clone()
    changed[..., 0, 3] += 1
    other[..., 0, 15] += 1
    for inputs, reach in (((changed, emb, extra), 9), ((h, emb, other), 2)):
        shown = (head(*inputs) - head(h, emb, extra))[0].abs().amax(dim=0) > 1e-6      # (16, 16)
        assert shown[0, 15] and not shown[reach:].any() and not shown[:, :16 - reach].any()


@pytest.mark.parametrize("x", [torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 32, 32),
                               torch.zeros(3, 16, 16)])
def test_encode_names_the_shape_it_wants(x):
    with pytest.raises(ValueError) as error:
        small_model().encode(x)
    assert "16" in one_line(error) and str(tuple(x.shape)) in one_line(error)


@pytest.mark.parametrize("kind", ["vae", "ivae"])
def test_models_without_a_unet_decode_and_say_that_they_cannot_sample(kind):
    model, x = small_model(model=kind), images(2)
    mean, _ = model.encode(x)
    assert model.decode(mean).shape == x.shape
    with pytest.raises(ValueError) as error:
        model.sample(mean, torch.randn_like(x))
    assert kind in one_line(error)
    assert "ddpm" not in model(x, torch.zeros(2, 6), torch.rand(2), x)


# ---- p(z|u) ----


def scales_and_centres(u, u_scale, n_factors):
    """s_k and m_k of a "mean+var" u (n, 2 K): log s_k scaled to [-1, 1], then the m_k."""
    middle, half_width = math.log(u_scale) / 2, -math.log(u_scale) / 2
    return (middle + half_width * u[:, :n_factors]).exp(), u[:, n_factors:]


def tiny_data(factors=None, sizes=(5, 1, 3)):
    named = {f"f{k}": size for k, size in enumerate(sizes)}
    return Data("tiny", named, (1, 16, 16), lambda rows: rows, torch.device("cpu"), factors)


@pytest.mark.parametrize("u_scale", [0.1, 0.3, 0.7])
def test_known_prior_reads_mean_and_variance_off_the_drawn_u(u_scale):
    _, u = tiny_data(sizes=(5, 4, 3)).draw(50, rng(), "mean+var", u_scale)
    s, m = scales_and_centres(u, u_scale, 3)
    mu, logvar = mean_logvar(small_model(u_scale=u_scale, latent_dim=3).prior(u))
    torch.testing.assert_close(mu, m)
    torch.testing.assert_close(logvar, 2 * s.log(), atol=1e-5, rtol=1e-5)
    assert s.min() >= u_scale * 0.999 and s.max() <= 1.001


@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("u", ["var", "mean+var"])
def test_known_prior_has_one_latent_per_factor_and_a_standard_normal_for_the_rest(dim, u):
    entries = tiny_data(sizes=(5, 4, 3)).draw(9, rng(), u)[1]
    mu, logvar = mean_logvar(small_model(latent_dim=dim, u=u).prior(entries))
    assert mu.shape == logvar.shape == (9, dim)
    assert logvar[:, :3].abs().min() > 0 and not logvar[:, 3:].any() and not mu[:, 3:].any()
    assert bool(mu[:, :3].any()) == (u == "mean+var")


@pytest.mark.parametrize("prior", PRIORS)
def test_prior_of_a_vae_is_standard_normal_and_ignores_u(prior):
    mu, logvar = mean_logvar(small_model(model="vae", prior=prior).prior(torch.rand(7, 6)))
    assert mu.shape == logvar.shape == (7, 4) and not mu.any() and not logvar.any()


def jacobian(prior, u):
    """Which entries of u (columns) change the mean or log-variance of each latent (rows)."""
    rows = torch.autograd.functional.jacobian(
        lambda u: torch.stack(mean_logvar(prior(u[None])), 2)[0], u)
    return rows.abs().amax(dim=1) > 0                                  # (D, U)


def test_full_prior_shows_every_latent_all_of_u():
    assert jacobian(small_model(prior="full", latent_dim=5).prior, torch.rand(6)).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_mean_is_zero_where_u_modulates_only_the_variance(prior):
    mu, logvar = mean_logvar(small_model(prior=prior, u="var").prior(torch.rand(7, 3) * 2 - 1))
    assert not mu.any() and logvar[:, :3].std(dim=0).min() > 1e-3


# ---- losses ----


def gaussians(b=6, d=4):
    mu_q, logvar_q, mu_p, logvar_p = torch.randn(4, b, d, generator=rng())
    return mu_q, logvar_q, mu_p, logvar_p


def test_kl_is_the_closed_form_of_two_gaussians():
    """0.5 (var_q / var_p + (mu_q - mu_p)^2 / var_p - 1 - log var_q + log var_p), Kingma 2014."""
    mu_q, logvar_q, mu_p, logvar_p = gaussians()
    ratio = (logvar_q - logvar_p).exp() + (mu_q - mu_p).square() / logvar_p.exp()
    exact = 0.5 * (ratio - 1 - logvar_q + logvar_p).sum(dim=1).mean()
    torch.testing.assert_close(kl_loss(Gaussian(mu_q, logvar_q), Gaussian(mu_p, logvar_p)), exact)


def test_kl_of_gaussians_is_finite_where_a_variance_underflows():
    zero = torch.zeros(1, 1)
    for q, p in ((-200, 0), (0, -200), (200, -200)):
        assert kl_loss(Gaussian(zero, zero + q), Gaussian(zero, zero + p)).isfinite()


def test_kl_is_zero_only_for_equal_gaussians():
    mu, logvar, other, _ = gaussians()
    q = Gaussian(mu, logvar)
    assert kl_loss(q, q) == 0
    assert kl_loss(q, Gaussian(other, logvar)) > 0 and kl_loss(q, Gaussian(mu, other)) > 0


def test_kl_is_a_sum_over_latents_and_a_mean_over_the_batch():
    terms = gaussians()

    def kl(*terms):
        return kl_loss(Gaussian(*terms[:2]), Gaussian(*terms[2:]))
    torch.testing.assert_close(kl(*(h.repeat(1, 3) for h in terms)), 3 * kl(*terms))
    torch.testing.assert_close(kl(*(h.repeat(3, 1) for h in terms)), kl(*terms))


def test_kl_without_a_closed_form_is_estimated_by_samples():
    q, p = Gaussian(torch.zeros(20_000, 2), torch.zeros(20_000, 2)), Normal(1.0, 2.0)
    exact = kl_loss(q, p.expand((20_000, 2)))

    class Stranger:
        log_prob = p.log_prob
    torch.manual_seed(0)
    assert kl_loss(q, Stranger()).item() == pytest.approx(exact.item(), rel=0.03)


def some_prior(n=8, d=3, seed=1):
    """p(z|u) of n draws."""
    return Gaussian(*torch.randn(2, n, d, generator=rng(seed)))


def test_contrast_is_zero_for_a_prior_that_ignores_u():
    p = Gaussian(torch.ones(8, 3), torch.full((8, 3), 0.7))
    assert contrast_loss(torch.randn(5, 3, generator=rng()), p).abs() < 1e-5


def test_contrast_is_infonce_with_the_priors_density_as_the_critic():
    """The cross-entropy of picking one's own u among N, less log N, from densities themselves."""
    z, p = torch.randn(5, 3, generator=rng()), some_prior()
    density = torch.stack([Normal(p.mean[b], p.stddev[b]).log_prob(z).sum(dim=1).exp()
                           for b in range(8)], dim=1)          # (5, 8)
    share = density.diagonal() / density.sum(dim=1)
    expected = -(share.log() + math.log(8)).mean()
    torch.testing.assert_close(contrast_loss(z, p), expected)


def test_contrast_reaches_its_bound_where_z_tells_u_apart():
    mean = 100.0 * torch.arange(8)[:, None].expand(8, 3)
    p = Gaussian(mean, torch.zeros(8, 3))
    assert contrast_loss(mean, p).item() == pytest.approx(-math.log(8))
    assert contrast_loss(mean[:4], p).item() == pytest.approx(-math.log(8))


def test_contrast_of_z_independent_of_u_is_no_gain_on_average():
    """-I(z; u) bounds it from below, so that it is 0 or more without information."""
    values = torch.stack([contrast_loss(torch.randn(8, 3, generator=rng(seed)),
                                        some_prior(seed=10_000 + seed)) for seed in range(500)])
    assert values.mean() > 3 * values.std() / math.sqrt(500) > 0


def test_contrast_ignores_a_common_scale_of_z_and_the_prior():
    z, p = torch.randn(5, 3, generator=rng()), some_prior()
    wide = Gaussian(7 * p.mean, p.logvar + 2 * math.log(7))
    torch.testing.assert_close(contrast_loss(7 * z, wide), contrast_loss(z, p))


def test_gradient_of_the_contrast_is_that_of_finite_differences():
    inputs = [torch.randn(*shape, generator=rng(k), dtype=torch.float64).requires_grad_()
              for k, shape in enumerate([(3, 2), (5, 2), (5, 2)])]
    assert torch.autograd.gradcheck(
        lambda z, mean, logvar: contrast_loss(z, Gaussian(mean, logvar)), inputs)


def test_a_learned_prior_starts_with_every_latent_telling_of_u():
    """A map that ignores u would be a saddle: means and log-variances are orthogonal maps of u."""
    torch.manual_seed(0)
    prior = IDiff(Config(prior="full", image_size=16, n_factors=3)).prior
    basis = torch.eye(6)
    mean, logvar = (h - h0 for h, h0 in zip(mean_logvar(prior(basis)),
                                            mean_logvar(prior(torch.zeros(6, 6)))))
    for h in (mean, logvar):
        torch.testing.assert_close(h.T @ h, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prior", ["full"])
@pytest.mark.parametrize("u, prior_mean, zero", [
    ("var", "auto", True), ("var", "learned", False), ("mean+var", "auto", False),
    ("mean+var", "zero", True)])
def test_means_of_a_learned_prior_are_zero_where_asked(prior, u, prior_mean, zero):
    model = small_model(prior=prior, u=u, prior_mean=prior_mean)
    p = model.prior(torch.rand(7, 3 if u == "var" else 6) * 2 - 1)
    assert bool(p.mean.any()) != zero and p.logvar[:, :3].std(dim=0).min() > 1e-3


def stub(unet=lambda x_t, t, z, x_hat: 0 * x_t, decoder=None, **changes):
    """A model with q(z|x) = N(mean of x, 0), p(z|u) = N(u, 1) and these networks."""
    def encoder(x):
        mu = x.mean(dim=(1, 2, 3))[:, None].repeat(1, 3)
        return Gaussian(mu, torch.full_like(mu, -20.0))
    model = IDiff(Config(**{"predict": "eps", **SMALL, **changes}))
    model.encoder = Call(encoder)
    model.prior = Call(lambda u: Gaussian(u, torch.zeros_like(u)))
    model.decoder = Call(decoder or (lambda z: torch.zeros(len(z), 3, 16, 16)))
    model.unet = Call(unet)
    return model


def a_step(b=4):
    """x, u, t, eps of one training step, at times where alpha is not tiny."""
    x = images(b)
    return (x, torch.rand(b, 3, generator=rng(1)), torch.linspace(0.1, 0.8, b),
            torch.randn(x.shape, generator=rng(2)))


def test_losses_are_means_over_batch_channels_and_pixels():
    x, u, t, eps = a_step()
    terms = stub(unet=lambda x_t, t, z, x_hat: torch.full_like(x_t, 0.5))(x, u, t, eps)
    values, ddpm = 4 * 3 * 16 * 16, ((0.5 - eps.numpy()) ** 2).sum()
    assert terms["rec"].item() == pytest.approx((x.numpy() ** 2).sum() / values, rel=1e-5)
    assert terms["ddpm"].item() == pytest.approx(ddpm / values, rel=1e-5)
    mu = x.mean(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0]
    kl = kl_divergence(Normal(mu, math.exp(-10)), Normal(u, 1.0)).sum() / 4
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())


def test_decoder_sees_the_first_images_of_the_batch_and_the_encoder_all():
    x, u, t, eps = a_step()
    terms = stub()(x, u, t, eps, n_rec=2)
    assert terms["rec"].item() == pytest.approx(x[:2].square().mean().item(), rel=1e-5)
    assert terms["kl"] == stub()(x, u, t, eps)["kl"]


@pytest.mark.parametrize("name", ["contrast", "kl_reverse"])
def test_a_term_beyond_the_paper_is_computed_if_it_has_a_weight(name):
    weights = {"contrast": 0.0, "kl_reverse": 0.0}
    assert name in stub(**weights | {name: 0.5})(*a_step())
    assert name not in stub(**weights)(*a_step())


def test_networks_receive_the_noised_images_their_times_and_their_latents():
    x, u, t, eps = a_step()
    integral = 0.1 * t + 0.5 * 19.9 * t ** 2                           # of beta, from 0 to t
    alpha = (-0.5 * integral).exp()[:2, None, None, None]
    seen = []
    stub(unet=lambda *inputs: seen.extend(inputs) or 0 * inputs[0])(x, u, t[:2], eps[:2])
    x_t = alpha * x[:2] + (1 - alpha ** 2).sqrt() * eps[:2]
    torch.testing.assert_close(seen[0], x_t, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen[1], t[:2])
    means = x[:2].mean(dim=(1, 2, 3))[:, None].expand(2, 3)
    torch.testing.assert_close(seen[2][1:], means[1:], atol=1e-6, rtol=0)   # the first is moved


def test_every_fourth_code_is_moved_by_half_of_its_latents_spread():
    """Latents of spread 1 and 100. The others stay, and so does the decoder's image of each."""
    mean = torch.randn(800, 2, generator=rng()) * torch.tensor([1.0, 100.0])
    seen = []
    model = stub(unet=lambda *inputs: seen.extend(inputs) or 0 * inputs[0],
                 decoder=lambda z: z[:, :1, None, None] * torch.ones(3, 16, 16))
    model.encoder = Call(lambda x: Gaussian(mean.clone(), 0 * mean))
    x = torch.zeros(800, 3, 16, 16)
    torch.manual_seed(0)
    model(x, torch.zeros(800, 2), torch.full((800,), 0.5), x)
    _, _, z, x_hat = seen
    moved = (z - mean) / mean.std(dim=0)
    assert moved.any(dim=1).nonzero().flatten().tolist() == list(range(0, 800, 4))
    assert moved[::4].std(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.08)
    assert torch.equal(x_hat[:, 0, 0, 0], mean[:, 0])


def test_latent_is_drawn_with_the_encoders_own_mean_and_variance():
    model = stub(decoder=lambda z: seen.append(z) or torch.zeros(len(z), 3, 16, 16))
    mu, none = torch.full((4, 4000), 2.0), torch.zeros(0)
    model.encoder = Call(lambda x: Gaussian(mu, torch.full_like(mu, math.log(0.25))))
    seen = []
    torch.manual_seed(0)
    model(torch.zeros(4, 3, 16, 16), torch.zeros(4, 4000), none, none)
    assert seen[0].mean().item() == pytest.approx(2, abs=0.03)
    assert seen[0].std().item() == pytest.approx(0.5, abs=0.03)


def noised(x, t, eps):
    """x_t, alpha and sigma, by the sum of squares alpha^2 + sigma^2 = 1."""
    alpha = VPSDE().alpha(t).view(-1, 1, 1, 1)
    sigma = (1 - alpha ** 2).sqrt()
    return alpha * x + sigma * eps, alpha, sigma


def test_an_eps_network_is_itself_the_noise_estimate_and_eq_3_its_squared_error():
    x, u, t, eps = a_step()
    x_t, alpha, sigma = noised(x, t, eps)
    model = stub(unet=lambda *_: eps + 0.1)
    assert model(x, u, t, eps)["ddpm"].item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(model.eps_fn(torch.zeros(4, 4))(x_t, t), eps + 0.1,
                               atol=1e-5, rtol=1e-4)
    x_0 = model.denoise(x_t, t, torch.zeros(4, 4), x)
    torch.testing.assert_close(x_0, (x_t - sigma * (eps + 0.1)) / alpha)


# A residual network's output and the logit of its gate, as one map.


def residual_stub(out, logit):
    """A model whose decoder gives 0 and whose U-Net gives these numbers everywhere."""
    def unet(x_t, t, z, x_hat):
        return torch.cat([torch.full_like(x_t, out), torch.full_like(x_t, logit)], dim=1)
    return stub(unet=unet, predict="residual", typical=0.2)


@pytest.mark.parametrize("error", [0.05, 0.2, 0.6])
def test_a_residual_network_of_the_right_gate_gives_the_posterior_mean(error):
    """x = x_hat + N(0, error^2) and x_t / alpha = x + N(0, s^2): a product of two Gaussians."""
    x, _, t, eps = a_step()
    x_hat = torch.randn(x.shape, generator=rng(3))
    x_t, alpha, sigma = noised(x, t, eps)
    precisions = 1 / error ** 2, (alpha / sigma) ** 2
    wanted = (precisions[0] * x_hat + precisions[1] * x_t / alpha) / sum(precisions)
    model = residual_stub(0.0, 2 * math.log(error / 0.2))
    torch.testing.assert_close(model.denoise(x_t, t, None, x_hat), wanted, atol=1e-4, rtol=1e-4)


def test_a_residual_networks_loss_is_that_of_eps_times_the_variance_seen():
    x, u, t, eps = a_step()
    _, alpha, sigma = noised(x, t, eps)
    model = residual_stub(0.3, 0.1)
    eps_hat = model.eps_fn(torch.zeros(4, 4))(model.sde.add_noise(x, eps, t), t)
    weighed = (eps_hat - eps).square() * (0.2 ** 2 + (sigma / alpha) ** 2)
    assert model(x, u, t, eps)["ddpm"].item() == pytest.approx(weighed.mean().item(), rel=1e-3)


def test_a_residual_network_sees_the_offset_at_unit_size_and_no_unknown_time():
    seen = []
    model = stub(unet=lambda *inputs: seen.append(inputs) or torch.zeros(4, 6, 16, 16),
                 predict="residual", typical=0.2)
    x_hat = torch.randn((4, 3, 16, 16), generator=rng(3))
    x = x_hat + 0.2 * torch.randn(x_hat.shape, generator=rng(4))
    for t in (1e-4, 0.02, 0.3, 1.0):
        t = torch.full((4,), t)
        x_t, *_ = noised(x, t, torch.randn(x.shape, generator=rng(5)))
        model.denoise(x_t, t, None, x_hat)
        offset, told, _, _ = seen[-1]
        assert offset.std().item() == pytest.approx(1, abs=0.05)
        torch.testing.assert_close(told, t.clamp(max=0.4761), atol=1e-4, rtol=1e-3)


def test_a_residual_of_1_is_the_posteriors_standard_deviation():
    """That of x given x_hat and x_t: so the residual that is to be learned has unit size."""
    x, _, t, eps = a_step()
    x_t, alpha, sigma = noised(x, t, eps)
    x_0, more = (residual_stub(out, 0.0).denoise(x_t, t, None, x) for out in (0.0, 1.0))
    wanted = (1 / 0.2 ** 2 + (alpha / sigma) ** 2) ** -0.5
    torch.testing.assert_close(more - x_0, wanted.expand_as(x), atol=1e-5, rtol=1e-4)


def test_a_shut_gate_leaves_the_decoders_image():
    x, _, t, eps = a_step()
    x_t, *_ = noised(x, t, eps)
    x_hat = torch.randn(x.shape, generator=rng(3))
    shut = residual_stub(0.0, -60.0)
    torch.testing.assert_close(shut.denoise(x_t, t, None, x_hat), x_hat)


def test_without_images_for_decoder_and_unet_there_are_no_terms_of_theirs():
    x, u, t, eps = a_step()
    model = stub(decoder=lambda z: 1 / 0)                              # it is not called
    assert set(model(x, u, t[:0], eps[:0], n_rec=0)) == {"kl", "contrast"}


# ---- the point of u: a code that it identifies ----


def mixed_data():
    """16x16 images of two factors that a plain VAE finds rotated by 45 degrees.

    Pixels are smooth functions of the sum and, more weakly, of the difference of the factors.
    """
    weights = torch.randn(2, 256, generator=rng(5)) / 2
    g = torch.linspace(-1, 1, 9)

    def render(rows):
        first, second = g[rows // 9], g[rows % 9]
        mixed = torch.stack([1.0 * (first + second), 0.6 * (first - second)], dim=1)
        return torch.tanh(mixed @ weights).view(-1, 1, 16, 16)
    return Data("mixed", {"a": 9, "b": 9}, (1, 16, 16), render, torch.device("cpu"))


def train_ivae(shuffle=False, steps=150, **changes):
    """Means and samples of z (81, 2) of all mixed images after a short training, and the factors;
    u is shuffled or is not."""
    torch.manual_seed(0)
    data, generator = mixed_data(), rng(1)
    cfg = Config(**{"model": "ivae", "latent_dim": 2, "n_factors": 2, "image_size": 16, "width": 8,
                    "image_channels": 1, "prior": "known", "contrast": 0.0, "kl": 0.02, **changes})
    model = IDiff(cfg)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        rows, u = data.draw(64, generator)
        u = u[torch.randperm(64)] if shuffle else u
        terms = model(data.images(rows), u, torch.zeros(0), torch.zeros(0))
        loss = terms["rec"] + cfg.kl * terms["kl"]
        if cfg.contrast:
            loss = loss + cfg.contrast * terms["contrast"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = torch.arange(81)
    return *evaluate.encode(model, data, rows, 0), data.factors(rows).numpy()


def test_u_makes_the_latents_of_an_ivae_the_factors_and_a_shuffled_u_collapses_them():
    codes, _, factors = train_ivae()
    assert evaluate.mcc(codes, factors) > 0.9 and evaluate.mig(codes, factors) > 0.4
    assert codes.std(axis=0).min() > 0.5
    for latent in range(2):                                            # and not its negative
        assert np.corrcoef(codes[:, latent], factors[:, latent])[0, 1] > 0.9
    codes, sample, _ = train_ivae(shuffle=True)                        # z says nothing, so that
    assert codes.std(axis=0).max() < 0.1                               # MCC of its means is chance
    assert evaluate.mcc(sample, factors) < 0.85 and evaluate.mig(sample, factors) < 0.3


def test_the_contrast_finds_the_factors_of_a_learned_prior_where_the_elbo_does_not():
    learned = dict(prior="full", kl=1e-3, steps=400)
    codes, _, factors = train_ivae(**learned, contrast=1.0)
    assert evaluate.mcc(codes, factors) > 0.9 and evaluate.mig(codes, factors) > 0.4
    codes, _, factors = train_ivae(**learned)
    assert evaluate.mcc(codes, factors) < 0.8 and evaluate.mig(codes, factors) < 0.1


# ---- checkpoints ----


def tensors_of(model):
    return {k: v for k, v in model.state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    """A model, its different average, and the checkpoint of both."""
    model, ema, path = small_model(), small_model(seed=1), tmp_path / "ckpt.pt"
    model.info = {"data": "tiny", "versions": {"torch": "2"}}
    idiff.save_checkpoint(str(path), model, ema, step=7)
    return model, ema, path


def test_checkpoint_gives_back_the_averaged_model_config_and_info(saved):
    model, ema, path = saved
    loaded, x = idiff.load_checkpoint(str(path)), images(2)
    assert loaded.cfg == model.cfg and loaded.info == model.info and not loaded.training
    assert torch.equal(loaded.encode(x)[0], ema.encode(x)[0])
    z, start = torch.ones(2, 4), torch.randn(x.shape, generator=rng())
    assert torch.equal(loaded.decode(z), ema.decode(z))
    assert torch.equal(loaded.sample(z, start, 3), ema.sample(z, start, 3))
    assert not torch.equal(loaded.encode(x)[0], model.encode(x)[0])
    content = idiff.read_checkpoint(str(path))
    assert content["step"] == 7 and all(torch.equal(content["model"][k], v)
                                        for k, v in tensors_of(model).items())


def test_a_failed_save_leaves_the_old_checkpoint(saved):
    model, ema, path = saved
    before = path.read_bytes()
    with pytest.raises(Exception):
        idiff.save_checkpoint(str(path), model, ema, step=lambda: 0)   # cannot be pickled
    assert path.read_bytes() == before
    idiff.load_checkpoint(str(path))


def change(path, **entries):
    content = torch.load(path, weights_only=True)
    torch.save(content | entries, path)


class Code:
    """What unpickling this does is leave a file behind."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def spoil(kind, path, trace):
    """Make of the good checkpoint at path a bad one; trace appears if code in it is run."""
    if kind == "other format":
        change(path, format=999)
    elif kind == "config of another version":
        change(path, config={"no_such_field": 1})
    elif kind == "bad value":
        config = torch.load(path, weights_only=True)["config"]
        change(path, config={**config, "latent_dim": -4})
    elif kind == "other weights":
        change(path, ema=tensors_of(small_model(latent_dim=2)))
    elif kind == "config not a dict":
        change(path, config=3)
    elif kind == "weights not a dict":
        change(path, ema=3)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "foreign":
        torch.save({"state_dict": {}, "epoch": 3}, path)
    elif kind == "only a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello, I am no checkpoint\n")
    elif kind == "pickle with code":
        path.write_bytes(pickle.dumps({"model": Code(str(trace))}))
    elif kind == "torch file with code":
        torch.save({"model": Code(str(trace))}, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", [
    "other format", "config of another version", "bad value", "other weights", "config not a dict",
    "weights not a dict", "truncated", "foreign", "only a tensor", "empty", "text",
    "pickle with code", "torch file with code"])
def test_bad_checkpoint_gives_one_line_and_runs_no_code(saved, kind, tmp_path):
    _, _, path = saved
    spoil(kind, path, tmp_path / "trace")
    with pytest.raises(ValueError) as error:
        idiff.load_checkpoint(str(path))
    assert str(path) in one_line(error)
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_may_hold_whole_numbers(tmp_path, monkeypatch):
    """As those in which BatchNorm counts its batches."""
    class Encoder(idiff.Encoder):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.net.insert(2, nn.BatchNorm2d(cfg.width))
    monkeypatch.setattr(idiff, "Encoder", Encoder)
    model, x = small_model(), images(8)
    model.train().encode(x)
    model.eval()
    idiff.save_checkpoint(str(tmp_path / "ckpt.pt"), model, model)
    loaded = idiff.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert loaded.encoder.net[2].num_batches_tracked == 1
    assert torch.equal(loaded.encode(x)[0], model.encode(x)[0])


def test_missing_checkpoint_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises((FileNotFoundError, ValueError)) as error:
            idiff.load_checkpoint(str(path))
        assert str(path) in one_line(error)


# ---- the modulated draw ----


def probabilities(size, s, m):
    """(n, size): chance of each value of a factor given its scale and centre."""
    g = np.linspace(-1, 1, size)
    p = np.exp(-0.5 * ((g - m[:, None]) / s[:, None]) ** 2)
    return p / p.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def many_draws():
    """Factor values (n, 2) of the two that vary, their scales and centres, of 200,000 draws."""
    data = tiny_data()
    rows, u = data.draw(200_000, rng(), "mean+var", 0.3)
    s, m = scales_and_centres(u, 0.3, 2)
    return data.factors(rows)[:, [0, 2]].numpy(), s.numpy(), m.numpy()


@pytest.mark.parametrize("factor, size", [(0, 5), (1, 3)])
def test_drawn_values_follow_their_scale_and_centre(many_draws, factor, size):
    values, s, m = (h[:, factor] for h in many_draws)
    p = probabilities(size, s.astype(float), m.astype(float))          # (n, size)
    hit = np.eye(size)[values]
    bins = np.digitize(s, [0.4, 0.55, 0.75]) * 4 + np.digitize(m, [-0.5, 0, 0.5])
    for b in range(16):                                                # nearly fixed u
        inside = bins == b
        excess = (hit - p)[inside].sum(axis=0)
        spread = np.sqrt((p * (1 - p))[inside].sum(axis=0))
        assert inside.sum() > 1000 and np.abs(excess / spread).max() < 4.5


def test_u_is_uniform_over_its_range_and_its_entries_are_independent():
    u = tiny_data().draw(100_000, rng(), "mean+var", 0.3)[1].numpy()
    assert u.shape == (100_000, 4) and u.min() >= -1 and u.max() <= 1
    counts = np.stack([np.histogram(column, 10, (-1, 1))[0] for column in u.T])
    assert np.abs(counts - 10_000).max() < 5 * math.sqrt(9_000)
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02


def test_factors_are_drawn_independently(many_draws):
    values, s, m = many_draws
    grids = [np.linspace(-1, 1, size) for size in (5, 3)]
    g = np.stack([grids[k][values[:, k]] for k in range(2)], axis=1)
    surprise = np.stack([g[:, k] - probabilities(n, s[:, k], m[:, k]) @ grids[k]
                         for k, n in enumerate((5, 3))], axis=1)
    assert abs(np.corrcoef(g.T)[0, 1]) < 0.012
    for k in range(2):                                                 # nor of the other's s and m
        other = (m[:, 1 - k], s[:, 1 - k], surprise[:, 1 - k])
        assert max(abs(np.corrcoef(surprise[:, k], h)[0, 1]) for h in other) < 0.012


def test_draw_of_variances_alone_is_centred():
    data = tiny_data(sizes=(5, 3))
    rows, u = data.draw(100_000, rng(), "var", 0.3)
    assert u.shape == (100_000, 2)
    s = np.exp(math.log(0.3) / 2 * (1 - u.numpy()))
    for k, size in enumerate((5, 3)):
        values = data.factors(rows)[:, k].numpy()
        narrow = s[:, k] < 0.45
        p = probabilities(size, s[narrow, k], np.zeros(narrow.sum()))
        spread = np.sqrt((p * (1 - p)).sum(axis=0))
        excess = np.bincount(values[narrow], minlength=size) - p.sum(axis=0)
        assert np.abs(excess / spread).max() < 4.5


def test_draws_repeat_with_their_seed_and_leave_the_global_state_alone(shapes3d):
    state = torch.get_rng_state()
    first, second, other = (shapes3d.draw(64, rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])


# ---- rows and factors ----


@pytest.mark.parametrize("name", ["SHAPES3D", "DSPRITES"])
def test_factors_of_rows_are_row_major(name):
    sizes = getattr(idiff, name)
    data = Data(name, sizes, (1, 16, 16), None, torch.device("cpu"))
    rows = torch.randint(len(data), (1000,), generator=rng())
    expected = np.stack(np.unravel_index(rows.numpy(), tuple(sizes.values())), axis=1)
    assert len(data) == math.prod(sizes.values())
    assert np.array_equal(data.factors(rows).numpy(), expected)


def test_rows_in_any_order_are_drawn_like_the_full_grid():
    """A shuffled table of the full grid: the same draws, seen through the shuffle."""
    grid = tiny_data(sizes=(4, 3, 2))
    order = torch.randperm(24, generator=rng(1))
    table = tiny_data(grid.factors(order), sizes=(4, 3, 2))
    counts = [np.bincount((data.factors(data.draw(60_000, rng(2))[0]).numpy() @ [6, 2, 1]),
                          minlength=24) for data in (grid, table)]
    assert np.abs(counts[0] - counts[1]).max() < 5 * math.sqrt(2 * counts[0].max())


def test_draw_from_an_incomplete_grid_reaches_all_rows_and_only_those():
    whole = np.stack(np.unravel_index(np.arange(24), (4, 3, 2)), axis=1)
    kept = whole[[23, 2, 7, 11, 0, 16, 5]]
    factors = torch.from_numpy(np.concatenate([kept, kept[:2], kept[:1]]))  # with duplicates
    data = tiny_data(factors, sizes=(4, 3, 2))
    rows, u = data.draw(20_000, rng())
    counts = torch.bincount(rows, minlength=len(factors))
    assert len(data) == len(counts) == 10 and counts.min() > 0
    assert torch.equal(data.factors(rows), factors[rows])
    same = counts[[0, 7, 9]].double()                                  # one row three times
    assert (same - same.mean()).abs().max() < 5 * same.mean().sqrt()
    assert u.shape == (20_000, 6)


def test_draw_from_an_incomplete_grid_follows_u_where_it_can():
    """With one varying factor the draw is the full grid's, renormalised over what exists."""
    factors = torch.tensor([[0], [4], [1]])                            # of five values, two missing
    rows, u = tiny_data(factors, sizes=(5,)).draw(100_000, rng())
    s, m = scales_and_centres(u, 0.3, 1)
    p = probabilities(5, s[:, 0].numpy(), m[:, 0].numpy())[:, [0, 4, 1]]
    p /= p.sum(axis=1, keepdims=True)
    excess = np.bincount(rows.numpy(), minlength=3) - p.sum(axis=0)
    assert np.abs(excess / np.sqrt((p * (1 - p)).sum(axis=0))).max() < 4.5


def test_a_draw_from_a_large_grid_with_gaps_is_the_full_grids_where_that_exists():
    """More than 2,000 combinations, in any order: where one is missing, its second factor alone
    takes another value."""
    sizes = (13, 14, 15)
    grid = tiny_data(sizes=sizes)
    kept = grid.factors(torch.randperm(len(grid), generator=rng(1)))
    kept = kept[(kept[:, 0] != 2) | (kept[:, 1] != 3)]
    gaps = tiny_data(kept, sizes=sizes)
    assert len(gaps) == len(gaps.distinct) == 13 * 14 * 15 - 15

    drawn, found = (data.factors(data.draw(20_000, rng(2))[0]) for data in (grid, gaps))
    missing = (drawn[:, 0] == 2) & (drawn[:, 1] == 3)
    assert missing.any() and torch.equal(found[~missing], drawn[~missing])
    assert torch.equal(found[missing][:, [0, 2]], drawn[missing][:, [0, 2]])
    assert (found[missing, 1] != 3).all()


def test_a_factor_of_more_than_1000_values_is_not_modulated():
    for n, varied in ((1000, [0, 1]), (1001, [])):
        assert tiny_data(sizes=(n, 2)).varied.tolist() == varied


# ---- embedded replicas ----


def row(*factors):
    return torch.tensor([np.ravel_multi_index(factors, (10, 10, 10, 8, 4, 15))])


def shown(data, factor, base=(0, 3, 6, 4, 1, 7)):
    """(64, 64) bool: the pixels that a change of this hue changes, where its surface is seen."""
    moved = list(base)
    moved[factor] = (moved[factor] + 5) % 10
    return (data.images(row(*base)) != data.images(row(*moved)))[0].any(dim=0)


def test_shapes3d_images_are_images(shapes3d):
    rows, u = shapes3d.draw(32, rng())
    x = shapes3d.images(rows)
    assert x.shape == (32, 3, 64, 64) and x.dtype == torch.float32 and u.shape == (32, 12)
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.2
    assert len(shapes3d) == 480_000 and "replica" in shapes3d.name
    assert tuple(shapes3d.factor_sizes) == (10, 10, 10, 8, 4, 15)


def test_shapes3d_changes_with_every_value_of_every_factor(shapes3d):
    base = [2, 5, 8, 3, 2, 6]
    for k, size in enumerate(shapes3d.factor_sizes):
        rows = torch.cat([row(*base[:k], v, *base[k + 1:]) for v in range(size)])
        assert len(shapes3d.images(rows).flatten(1).unique(dim=0)) == size


def test_shapes3d_geometries_all_differ(shapes3d):
    x = shapes3d.images(torch.arange(480))
    assert len(x.flatten(1).unique(dim=0)) == 480


def test_shapes3d_hues_colour_the_floor_the_walls_and_the_object_alone(shapes3d):
    floor, wall, thing = (shown(shapes3d, k) for k in range(3))
    assert floor[-1].all() and not floor[:10].any()                    # floor below, walls above
    assert wall[0].all() and not wall[-1].any()
    assert thing[20:50, 24:40].any() and not (thing[0].any() or thing[:, 0].any())
    assert (floor | wall | thing).float().mean() > 0.97
    for a, b in ((floor, wall), (floor, thing), (wall, thing)):        # they meet in edge pixels
        assert (a & b).float().mean() < 0.06


@pytest.mark.parametrize("shape", range(4))
def test_shapes3d_objects_grow_with_scale_and_stay_inside(shapes3d, shape):
    seen = [shown(shapes3d, 2, (0, 3, 6, scale, shape, 7)) for scale in range(8)]
    areas = [h.sum().item() for h in seen]
    assert areas == sorted(areas) and areas[0] > 100 and areas[-1] > 1.5 * areas[0]
    assert not any(h[0].any() or h[-1].any() or h[:, 0].any() or h[:, -1].any() for h in seen)


@pytest.fixture(scope="module")
def dsprites():
    return idiff.load_data("dsprites")


def sprites(data, *factors):
    rows = torch.tensor([np.ravel_multi_index(f, (1, 3, 6, 40, 32, 32)) for f in factors])
    return data.images(rows)


def test_dsprites_images_are_binary(dsprites):
    rows, u = dsprites.draw(64, rng())
    x = dsprites.images(rows)
    assert x.shape == (64, 1, 64, 64) and set(x.unique().tolist()) == {-1.0, 1.0}
    assert u.shape == (64, 10) and len(dsprites) == 737_280 and "replica" in dsprites.name


def test_dsprites_moves_by_whole_pixels(dsprites):
    for shape in range(3):
        x = sprites(dsprites, (0, shape, 3, 5, 10, 20), (0, shape, 3, 5, 11, 20),
                    (0, shape, 3, 5, 10, 21))
        assert torch.equal(x[1], x[0].roll(1, dims=2)) and torch.equal(x[2], x[0].roll(1, dims=1))


def test_dsprites_grow_with_scale_and_turn_once_around(dsprites):
    for shape in range(3):
        areas = [(sprites(dsprites, (0, shape, scale, 3, 16, 16)) > 0).sum() for scale in range(6)]
        assert areas == sorted(areas) and areas[-1] > 2 * areas[0] > 0
        turned = sprites(dsprites, *((0, shape, 5, turn, 16, 16) for turn in range(40)))
        assert torch.equal(turned[0], turned[39]) and not torch.equal(turned[0], turned[3])
        areas = (turned > 0).flatten(1).sum(dim=1).float()
        assert areas.max() < 1.1 * areas.min()


def test_dsprites_never_leave_the_image(dsprites):
    corners = [(0, shape, 5, turn, x, y) for shape in range(3) for turn in range(40)
               for x in (0, 31) for y in (0, 31)]
    x = sprites(dsprites, *corners) > 0
    area = x.flatten(1).sum(dim=1)
    centre = sprites(dsprites, *((0, s, 5, t, 16, 16) for _, s, _, t, _, _ in corners)) > 0
    assert torch.equal(area, centre.flatten(1).sum(dim=1))


# ---- files ----


def numbered_images(n, channels=3, side=16):
    """(n, side, side, channels) uint8, every one different."""
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def check_images(data, images):
    """data.images are these uint8 images, mapped from 0..255 to -1..1, channels first."""
    rows = torch.arange(len(images)).flip(0)
    expected = images[::-1].transpose(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(data.images(rows).numpy(), expected.astype(np.float32),
                               atol=1e-6, rtol=0)
    assert data.image_shape == expected.shape[1:]


def write_h5(path, images, labels):
    import h5py
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, compression="gzip",
                            chunks=(4, *images.shape[1:]))
        file.create_dataset("labels", data=labels)


def test_h5_file_with_the_real_layout(tmp_path):
    """Keys, types, compression and row order of 3dshapes.h5, on a coarser grid of its labels."""
    values = [np.linspace(0, 0.9, 2), np.linspace(0, 0.9, 3), np.linspace(0, 0.9, 2),
              np.linspace(0.75, 1.25, 3), np.arange(4.0), np.linspace(-30, 30, 2)]
    labels = np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, 6)
    images = numbered_images(len(labels))
    write_h5(tmp_path / "3dshapes.h5", images, labels)
    data = idiff.load_data(str(tmp_path / "3dshapes.h5"))
    check_images(data, images)
    assert tuple(data.factor_sizes) == (2, 3, 2, 3, 4, 2) and "replica" not in data.name
    expected = np.stack(np.unravel_index(np.arange(288), (2, 3, 2, 3, 4, 2)), axis=1)
    assert np.array_equal(data.factors(torch.arange(288)).numpy(), expected)
    rows, u = data.draw(5000, rng())
    assert len(rows.unique()) == 288 and u.shape == (5000, 12)


def test_real_3d_shapes_is_recognised_by_its_grid(tmp_path):
    """All 480,000 rows are too many to write here: one row per value of each factor shows it."""
    labels = np.stack([np.arange(15) % n for n in (10, 10, 10, 8, 4, 15)], axis=1).astype(float)
    write_h5(tmp_path / "any name at all", numbered_images(15), labels)
    data = idiff.load_data(str(tmp_path / "any name at all"))
    assert list(data.factor_names) == ["floor hue", "wall hue", "object hue", "scale", "shape",
                                       "orientation"]


def test_npz_file_with_the_layout_of_dsprites(tmp_path):
    classes = np.stack(np.unravel_index(np.arange(72), (1, 3, 2, 3, 2, 2)), axis=1)
    imgs = np.random.default_rng(0).integers(0, 2, (72, 64, 64), dtype=np.uint8)
    np.savez_compressed(tmp_path / "dsprites.npz", imgs=imgs, latents_classes=classes,
                        latents_values=classes.astype(float), metadata=np.zeros(1, np.uint8))
    data = idiff.load_data(str(tmp_path / "dsprites.npz"))
    x = data.images(torch.arange(72))
    assert x.shape == (72, 1, 64, 64) and np.array_equal(x[:, 0].numpy(), imgs * 2.0 - 1)
    assert np.array_equal(data.factors(torch.arange(72)).numpy(), classes)
    assert data.draw(5, rng())[1].shape == (5, 10)                     # colour does not vary


def test_real_dsprites_with_its_pickled_metadata(tmp_path):
    """The published file holds a pickled dict beside the arrays; it must not get in the way."""
    classes = np.stack(np.unravel_index(np.arange(6), (1, 3, 2)), axis=1)
    imgs = np.ones((6, 64, 64), np.uint8)
    np.savez(tmp_path / "d.npz", metadata=np.array({"a": 1}, dtype=object), imgs=imgs,
             latents_classes=classes)
    assert len(idiff.load_data(str(tmp_path / "d.npz"))) == 6


def test_npz_file_of_ones_own_with_an_incomplete_grid(tmp_path):
    factors = np.array([[10, 0], [30, -2], [20, 0], [10, 5], [30, 5]])  # any integers
    images = numbered_images(5, channels=1, side=32)
    np.savez(tmp_path / "own.npz", images=images, factors=factors)
    data = idiff.load_data(str(tmp_path / "own.npz"))
    check_images(data, images)
    assert tuple(data.factor_sizes) == (3, 3) and len(data) == 5
    expected = [[0, 1], [2, 0], [1, 1], [0, 2], [2, 2]]
    assert data.factors(torch.arange(5)).tolist() == expected
    assert data.draw(2000, rng())[0].unique().tolist() == [0, 1, 2, 3, 4]


def test_content_of_a_file_decides_not_its_name(tmp_path):
    images, factors = numbered_images(4), np.arange(4)[:, None]
    np.savez(tmp_path / "a.npz", images=images, factors=factors)
    (tmp_path / "a.npz").rename(tmp_path / "a.h5")
    check_images(idiff.load_data(str(tmp_path / "a.h5")), images)


def test_what_readme_names_goes_before_what_others_call_it(tmp_path):
    """A file of both factors and labels, images and imgs."""
    images, factors = numbered_images(8), np.arange(8)[:, None] // 2
    np.savez(tmp_path / "a.npz", images=images, factors=factors, labels=np.arange(8) % 3,
             imgs=images[:, ::-1])
    data = idiff.load_data(str(tmp_path / "a.npz"))
    check_images(data, images)
    assert data.factor_sizes == (4,)


def write_bad(kind, path):
    images, factors = numbered_images(8), np.arange(8)[:, None]
    good = dict(images=images, factors=factors)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not data")
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, images)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(good))
    elif kind == "h5 folder":                                          # images is no array
        import h5py
        with h5py.File(path, "w") as file:
            file.create_group("images")
            file["labels"] = factors
    elif kind.startswith("h5"):
        write_h5(path, images, factors.astype(float))
        content = bytearray(path.read_bytes())
        if kind == "h5 truncated":
            content = content[:len(content) // 2]
        else:
            middle = len(content) - 2000
            content[middle:middle + 100] = bytes(100)
        path.write_bytes(content)
    else:
        arrays = {
            "no images": dict(factors=factors),
            "negative images": good | dict(images=images / 255.0 - 0.5),
            "bright images": good | dict(images=images * np.uint16(200)),
            "nan images": good | dict(images=np.full((8, 16, 16, 3), np.nan)),
            "flat images": good | dict(images=images.reshape(8, -1)),
            "oblong images": good | dict(images=images[:, :8]),
            "channels first": good | dict(images=images.transpose(0, 3, 1, 2)),
            "two channels": good | dict(images=images[..., :2]),
            "four channels": good | dict(images=images[..., [0, 1, 2, 2]]),
            "names": good | dict(factor_names=["a", "b"]),
            "one name": dict(images=images, factors=np.eye(8), factor_names=["a"] * 8),
            "short u": good | dict(u=np.ones(5)), "nan u": good | dict(u=np.full(8, np.nan)),
            "text u": good | dict(u=np.array(["a"] * 8)),
            "fewer factors": good | dict(factors=factors[:5]),
            "no rows": dict(images=images[:0], factors=factors[:0]),
            "nan factors": good | dict(factors=np.full((8, 1), np.nan)),
            "text factors": good | dict(factors=np.array([["a"]] * 8)),
            "bytes factors": good | dict(factors=np.array([[b"a"]] * 8)),
            "object factors": good | dict(factors=np.array([[None]] * 8)),
        }.get(kind, good)
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)
        content = bytearray(path.read_bytes())
        if kind == "npz truncated":
            content = content[:len(content) // 2]
        if kind == "npz damaged":
            content[2000:2100] = bytes(100)
        path.write_bytes(content)


@pytest.mark.parametrize("kind", [
    "empty", "text", "npy", "pickle", "h5 truncated", "h5 damaged", "npz truncated", "npz damaged",
    "no images", "negative images", "bright images", "nan images", "flat images", "oblong images",
    "channels first", "two channels", "four channels", "names", "one name", "short u", "nan u",
    "text u", "fewer factors", "no rows", "nan factors", "text factors", "bytes factors",
    "object factors", "h5 folder"])
def test_bad_data_file_gives_one_line(tmp_path, kind):
    path = tmp_path / "bad data"
    write_bad(kind, path)
    with pytest.raises(ValueError) as error:
        idiff.load_data(str(path))
    assert str(path) in one_line(error)


def test_a_name_in_another_encoding_is_shown_as_far_as_it_can_be(tmp_path):
    np.savez(tmp_path / "a.npz", images=numbered_images(2), factors=[1, 2],
             factor_names=["größe".encode("latin-1")])
    [name] = idiff.load_data(str(tmp_path / "a.npz")).factor_names
    assert name == "gr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}e"


@pytest.mark.parametrize("arrays, remedy", [
    (dict(images=numbered_images(2).transpose(0, 3, 1, 2)), "images.transpose(0, 2, 3, 1)"),
    (dict(images=numbered_images(2, channels=4)), "images[..., :3]"),
    (dict(images=numbered_images(2), factors=np.array(["a", "b"])), "np.unique"),
    (dict(images=numbered_images(2), factors=[[0], ["a"]]), "np.unique"),
    (dict(images=numbered_images(2), u=["a", "b"]), "u are (2, 1) <U1"),
    (dict(images=numbered_images(2), factors=[1, 2], factor_names=["a", "b"]), "1 different name"),
    (dict(images=numbered_images(2), factors=[[1, 2], [3, 4]], factor_names=3), "2 different"),
    (dict(images=numbered_images(2) - 0.5), "-0.5 to 254.5"),
    (dict(imags=numbered_images(2), u=[1, 2]), "no array images")])
def test_refusal_of_an_array_tells_the_remedy(tmp_path, arrays, remedy):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as error:
        idiff.load_data(str(tmp_path / "a.npz"))
    assert remedy in one_line(error) and "a.npz" in one_line(error)


@pytest.mark.parametrize("name, write", [
    ("a.npy", lambda path: np.save(path, numbered_images(4))),
    ("a.csv", lambda path: path.write_text("file,factor\na.png,1\n")),
    ("a.npz", lambda path: np.savez(path, images=np.array([{}], object))),
    ("b.npz", lambda path: path.write_bytes(b"PK"))])
def test_no_librarys_words_reach_the_user(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(ValueError) as error:
        idiff.load_data(str(tmp_path / name))
    assert "np.savez" in one_line(error) and name in one_line(error)
    assert not any(word in one_line(error) for word in ("allow_pickle", "context manager", "zip"))


@pytest.mark.parametrize("change", [
    lambda images: images / 255, lambda images: images.astype(float),
    lambda images: (images / 255).astype(np.float32), lambda images: images.astype(np.int64),
    lambda images: images.astype(">u2")])
def test_images_of_any_type_are_shown_alike(tmp_path, change):
    images = numbered_images(4)
    images[0, 0, 0] = 255
    np.savez(tmp_path / "a.npz", images=change(images))
    check_images(idiff.load_data(str(tmp_path / "a.npz")), images)


def test_what_is_white_is_seen_from_the_brightest_pixel_and_told(tmp_path):
    images = numbered_images(4) % 2
    for kind in (np.uint8, bool):
        np.savez(tmp_path / "a.npz", images=images.astype(kind))
        data = idiff.load_data(str(tmp_path / "a.npz"))
        check_images(data, images * 255)
        assert "1 is white" in data.note


def test_images_of_other_sizes_are_resized(tmp_path):
    images = np.repeat(np.arange(0, 256, 85, dtype=np.uint8), 28 * 28).reshape(4, 28, 28)
    np.savez(tmp_path / "a.npz", images=images)
    for size, side in ((None, 32), (16, 16), (64, 64)):
        data = idiff.load_data(str(tmp_path / "a.npz"), image_size=size)
        x = data.images(torch.arange(4))
        assert x.shape == (4, 1, side, side) and data.image_shape == x.shape[1:]
        torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([-1, -1 / 3, 1 / 3, 1]))
        assert f"{side} x {side}" in data.note
    board = np.indices((2, 64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255
    np.savez(tmp_path / "a.npz", images=board)
    x = idiff.load_data(str(tmp_path / "a.npz"), image_size=16).images(torch.arange(2))
    assert x.abs().max() < 0.1                                         # grey, no moiré


# ---- u and factors of one's own ----


def test_own_u_is_drawn_with_its_image_and_all_images_alike(tmp_path):
    u = np.random.default_rng(0).normal(3, 5, (7, 2))
    np.savez(tmp_path / "a.npz", images=numbered_images(7), u=u)
    data = idiff.load_data(str(tmp_path / "a.npz"))
    rows, drawn = data.draw(70_000, rng(), "own")
    expected = ((u - u.mean(axis=0)) / u.std(axis=0))[rows]
    torch.testing.assert_close(drawn, torch.from_numpy(expected).float())
    counts = torch.bincount(rows, minlength=7)[data.trained].double()     # not of rows held out
    assert counts.sum() == 70_000 and data.factor_names == ()
    assert (counts - 17_500).abs().max() < 5 * 132


def test_u_of_other_data_means_what_it_meant(tmp_path):
    """A checkpoint keeps mean and scale of u; a test set's own would move and stretch it."""
    rng = np.random.default_rng(0)
    u = rng.normal(3, 5, (60, 2)) * [1, 1e-12]
    u = np.concatenate([u, np.full((60, 1), 0.1)], axis=1)     # the last column never varies
    test = np.array([[3, 0, 0.1], [8, 1e-12, 0.1]])
    for name, rows in {"train": u, "test": test}.items():
        np.savez(tmp_path / f"{name}.npz", images=numbered_images(len(rows)), u=rows)
    data, other = (idiff.load_data(str(tmp_path / f"{name}.npz")) for name in ("train", "test"))
    before = other.u.clone()

    model = idiff.IDiff(train.recipe(data, model="ivae", width=8))
    model.info = train.provenance(data)
    idiff.save_checkpoint(tmp_path / "ckpt.pt", model, model)
    expected = ((test - u.mean(axis=0)) / u.std(axis=0))[:, :2]
    for given in (str(tmp_path / "test.npz"), other):
        with pytest.warns(UserWarning, match="was trained on train.npz"):
            _, found = idiff.open_checkpoint(tmp_path / "ckpt.pt", data=given)
        torch.testing.assert_close(found.u[:, :2], torch.from_numpy(expected).float())
        assert (found.u[:, 2].abs() < 1e-9).all()
        assert found.source["u_mean"] == data.source["u_mean"]
    assert torch.equal(other.u, before)                        # the caller's own stays
    _, same_data = idiff.open_checkpoint(tmp_path / "ckpt.pt")
    assert torch.equal(same_data.u, data.u)


def test_u_of_one_column_or_none_that_varies(tmp_path):
    np.savez(tmp_path / "a.npz", images=numbered_images(4), u=np.ones(4))
    _, u = idiff.load_data(str(tmp_path / "a.npz")).draw(9, rng(), "own")
    assert u.shape == (9, 1) and not u.any()


def test_names_of_factors_are_those_of_the_file(tmp_path):
    import h5py
    arrays = dict(images=numbered_images(4), factors=np.arange(8).reshape(4, 2))
    np.savez(tmp_path / "a.npz", **arrays, factor_names=["größe", "b"])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["factor_names"] = ["größe", "b"]
    for name in ("a.npz", "a.h5"):
        assert idiff.load_data(str(tmp_path / name)).factor_names == ("größe", "b")


def test_a_factor_may_be_a_number_without_end(tmp_path):
    """Then no modulated draw tells of it, and its values are kept for the metrics."""
    factors = np.random.default_rng(0).normal(size=(2000, 9))
    np.savez(tmp_path / "a.npz", images=np.zeros((2000, 16, 16), np.uint8), factors=factors)
    data = idiff.load_data(str(tmp_path / "a.npz"))
    assert data.factor_sizes == (2000,) * 9 and len(data.varied) == 0
    index = data.factors(torch.arange(2000))[:, 4]
    assert np.array_equal(data.values[4][index], factors[:, 4])


# ---- folders of pictures ----


def write_folder(folder, lines, sides=((40, 30),) * 6, mode="RGB"):
    """A folder of pictures 0.png, 1.png … of colour 40 i, 20 i, 0, and a table of these lines."""
    from PIL import Image
    folder.mkdir()
    for i, size in enumerate(sides):
        Image.new("RGB", size, (40 * i, 20 * i, 0)).convert(mode).save(folder / f"{i}.png")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", "utf-8-sig")
    return str(folder)


TABLE = ["shape, file, u:time,größe,u", "1, 0.png,0.5, 10,0", "0,1.png,1,9,0",
         '"2",2.png,1.5,10,1e1', "1,3.png,2,9,-1", "0,5.png,2.5,100,0"]


def test_u_of_half_precision_is_standardised_as_any(tmp_path):
    u = np.arange(-20_000, 20_000, 5_000.0)
    for name, kind in (("half", np.float16), ("full", np.float64)):
        np.savez(tmp_path / f"{name}.npz", images=numbered_images(8), u=u.astype(kind))
    half, full = (idiff.load_data(str(tmp_path / f"{name}.npz")).u for name in ("half", "full"))
    assert torch.allclose(half, full, atol=1e-3) and half.std() > 0.9


def test_without_h5py_a_file_is_not_called_damaged(tmp_path, monkeypatch):
    write_h5(tmp_path / "a.h5", numbered_images(4), np.arange(4.0)[:, None])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="h5py") as error:
        idiff.load_data(str(tmp_path / "a.h5"))
    assert "damaged" not in str(error.value)


def test_folder_of_pictures_and_a_table(tmp_path, monkeypatch):
    """Any order of columns and rows, numbers in order, u and u:NAME apart, a bar while it reads;
    spaces behind commas are nothing."""
    seen = []
    path = write_folder(tmp_path / "pics", TABLE)
    monkeypatch.setattr(idiff, "progress", lambda rows, desc: seen.append(desc) or rows)
    data = idiff.load_data(path)
    assert len(data) == 5 and data.name.startswith("pics ") and len(seen) == 1
    assert data.factor_names == ("shape", "größe") and data.values[1].tolist() == [9, 10, 100]
    assert data.factors(torch.arange(5)).T.tolist() == [[1, 0, 2, 1, 0], [1, 0, 1, 0, 2]]
    u = np.array([[0.5, 0], [1, 0], [1.5, 10], [2, -1], [2.5, 0]])
    expected = (u - u.mean(axis=0)) / u.std(axis=0)
    assert np.allclose(data.u, expected, atol=1e-6)

    colours = torch.tensor([0, 1, 2, 3, 5])[:, None] * torch.tensor([40, 20, 0]) / 127.5 - 1
    x = data.images(torch.arange(5))
    assert x.shape == (5, 3, 64, 64) and data.image_shape == (3, 64, 64)
    assert torch.allclose(x, colours[:, :, None, None].expand_as(x), atol=1e-6)


@pytest.mark.parametrize("mode, size", [("RGB", 32), ("L", None), ("1", None), ("P", None),
                                        ("RGBA", 16)])
def test_pictures_of_a_folder_get_one_size_and_three_channels(tmp_path, mode, size):
    sides = (40, 30), (30, 300), (999, 20), (16, 16), (17, 99), (40, 31)
    path = write_folder(tmp_path / "pics", TABLE, sides, mode)
    data = idiff.load_data(path, image_size=size)
    assert data.image_shape == (3, size or 64, size or 64)


def test_a_folder_may_mix_pictures_of_all_kinds_under_any_names(tmp_path):
    from PIL import Image
    lines = ["file,a"]
    for i, mode in enumerate(("RGB", "L", "LA", "RGBA")):
        picture = Image.new("RGB", (90 + i, 70), (10 * i,) * 3).convert(mode)
        picture.save(tmp_path / f"bild ä{i}.png")
        lines.append(f"bild ä{i}.png,{i}")
    (tmp_path / "table.csv").write_text("\n".join(lines), "utf-8")
    data = idiff.load_data(str(tmp_path))
    i = torch.arange(4)
    grey = (10 * i / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    assert torch.allclose(data.images(i), grey, atol=1e-5) and data.factors(i)[:, 0].equal(i)


def test_a_picture_of_a_folder_that_has_no_one_meaning_is_named(tmp_path):
    from PIL import Image
    Image.new("F", (64, 64)).save(tmp_path / "b.tiff")
    (tmp_path / "table.csv").write_text("file,a\nb.tiff,1\n")
    with pytest.raises(ValueError, match="b.tiff.*PNG"):
        idiff.load_data(str(tmp_path))


def test_a_table_may_have_u_alone_or_nothing(tmp_path):
    data = idiff.load_data(write_folder(tmp_path / "a", ["file,u", "0.png,1", "1.png,2"]))
    assert data.u.tolist() == [[-1], [1]] and data.factor_names == ()
    data = idiff.load_data(write_folder(tmp_path / "b", ["file", "0.png", "1.png"]))
    assert data.u.shape == (2, 0) and len(data) == 2
    data = idiff.load_data(write_folder(tmp_path / "c", ["file,units", "0.png,1", "1.png,2"]))
    assert data.factor_names == ("units",)


def test_fingerprint_of_a_folder_tells_pictures_and_table(tmp_path):
    tables = (TABLE, TABLE, [line.replace("0.5", "0.6") for line in TABLE],
              [line.replace("0.png", "4.png") for line in TABLE])
    seen = set()
    for i, lines in enumerate(tables):
        seen.add(idiff.load_data(write_folder(tmp_path / str(i), lines)).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize("lines, words", [
    ([], ".csv"), (["file,a"], "row for each picture"), (["name,a", "0.png,1"], "file"),
    (["file,a", "0.png,1", "1.png"], "one of them file"),
    (["file,a", "0.png,1", "1.png,"], "np.unique"), ([""], "one of them file"),
    (["file|a", "0.png|1"], "file"), (["file,a", "0.png,1", "7.png,2"], "7.png"),
    (["file,a", "0.png,cube"], "np.unique"), (["file,file", "0.png,1.png"], "one of them file"),
    (["file,a", "0.png,1", "table.csv,2"], "table.csv"), (["file,a", "0.png,nan"], "finite"),
    (["file,a,a", "0.png,1,2"], "different"), (["file,a", "0.png,1", "../pics,2"], "pics")])
def test_a_folder_that_is_no_data_gives_one_line(tmp_path, lines, words):
    path = write_folder(tmp_path / "pics", lines)
    with pytest.raises(ValueError) as error:
        idiff.load_data(path)
    assert words in one_line(error) and path in one_line(error)


@pytest.mark.parametrize("n", [0, 2])
def test_a_folder_has_one_table(tmp_path, n):
    path = write_folder(tmp_path / "pics", TABLE)
    (tmp_path / "pics" / "table.csv").unlink()
    for i in range(n):
        (tmp_path / "pics" / f"{i}.csv").write_text("\n".join(TABLE))
    with pytest.raises(ValueError, match="one .csv"):
        idiff.load_data(path)


# ---- fingerprints ----


def test_fingerprint_tells_any_change_of_what_is_stored(tmp_path):
    good = dict(images=numbered_images(300), factors=np.arange(300)[:, None], u=np.arange(300.0))
    other = numbered_images(300)
    other[299] = 0
    seen = set()
    for change in ({}, {}, dict(images=other), dict(factors=good["factors"][::-1]),
                   dict(u=good["u"] + 1), dict(factors=good["factors"].astype(float)),
                   dict(images=good["images"] / 255)):
        np.savez(tmp_path / "a.npz", **(good | change))
        seen.add(idiff.load_data(str(tmp_path / "a.npz")).fingerprint)
        seen.add(idiff.load_data(str(tmp_path / "a.npz"), image_size=32).fingerprint)
    assert len(seen) == 6


def test_replicas_are_marked_by_name_and_version(shapes3d):
    assert "shapes3d" in shapes3d.fingerprint != idiff.load_data("dsprites").fingerprint


def test_data_larger_than_memory_give_one_line(tmp_path):
    """A file that says it holds 12 TB of images, none of them written."""
    import h5py
    path = tmp_path / "large.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (10**9, 64, 64, 3), np.uint8, chunks=(16, 64, 64, 3))
        file["labels"] = np.zeros((3, 6))
    with pytest.raises(MemoryError) as error:
        idiff.load_data(str(path))
    assert str(path) in one_line(error)


def test_memory_that_numpy_cannot_have_gives_one_line(tmp_path, monkeypatch):
    """Where the system does not tell how much is free, NumPy finds out; its error is its own."""
    import h5py
    path = tmp_path / "larger.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (10**12, 64, 64, 3), np.uint8, chunks=(16, 64, 64, 3))
    monkeypatch.setattr(idiff, "check_memory", lambda *_: None)
    with pytest.raises(MemoryError) as error:
        idiff.load_data(str(path))
    assert str(path) in one_line(error) and "allocate" in str(error.value)


@pytest.mark.parametrize("name", ["no_such.h5", "shapes4d", "."])
def test_missing_data_is_named(name):
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        idiff.load_data(name)
    assert repr(name) in one_line(error)


# ---- the module alone ----


ALONE = """
import sys
for name in ("h5py", "torchvision", "tqdm", "scipy", "sklearn", "matplotlib", "train", "evaluate"):
    sys.modules[name] = None                       # importing any of them now fails
import torch
from idiff import Config, IDiff
cfg = Config(image_size=16, n_factors=2, width=8, unet_width=8)
model = IDiff(cfg)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
x, u, eps = torch.rand(8, 3, 16, 16) * 2 - 1, torch.rand(8, 4) * 2 - 1, torch.randn(8, 3, 16, 16)
for step in range(20):
    terms = model(x, u, torch.linspace(0.1, 1, 8), eps)
    loss = terms["ddpm"] + cfg.rec * terms["rec"] + cfg.kl * terms["kl"]
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item())
print(model.eval().sample(model.encode(x)[0], eps).shape)
"""


def test_idiff_alone_in_a_folder_trains_with_torch_and_numpy_only(tmp_path):
    shutil.copy(Path(idiff.__file__), tmp_path)
    (tmp_path / "script.py").write_text(ALONE)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    *values, shape = done.stdout.splitlines()
    assert float(values[-1]) < float(values[0]) and "8, 3, 16, 16" in shape
