# SPDX-License-Identifier: MIT
"""Categorical latents, and KL's balanced and reversed forms.

    python -m pytest tests/test_latents.py
"""
import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

import evaluate
import interpolate
import train
from idiff import (PRIORS, Categories, Config, Gaussian, IDiff, KnownPrior, balanced_kl, kl_loss,
                   load_checkpoint)

SMALL = dict(width=8, unet_width=8, image_size=16, latent_dim=3, n_factors=2, categories=5)
KINDS = pytest.mark.parametrize("kind", ["gumbel", "st"])


def logits(seed, b=4, d=3, c=5):
    return 2 * torch.randn(b, d, c, generator=torch.Generator().manual_seed(seed))


def test_categorical_kl_is_exact_a_sum_over_latents_and_a_mean_over_the_batch():
    q, p = logits(0), logits(1)
    exact = kl_divergence(Categorical(logits=q), Categorical(logits=p))        # (B, D)
    torch.testing.assert_close(kl_loss(Categories(q), Categories(p)), exact.sum(dim=1).mean())
    assert kl_loss(Categories(q), Categories(q + 3)).abs() < 1e-6


def test_categorical_kl_is_finite_where_a_probability_underflows():
    """Logits end at 40 on either side."""
    q, p = torch.zeros(1, 1, 2), torch.tensor([[[0.0, -200.0]]])
    wanted = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 40)
    assert kl_loss(Categories(q), Categories(p)).item() == pytest.approx(wanted)


def test_log_prob_of_one_hot_codes_is_that_of_their_categories():
    q, index = logits(0), torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Categories(q).log_prob(torch.eye(5)[index]),
                               Categorical(logits=q).log_prob(index))


def test_straight_through_codes_are_one_hot_fall_as_q_says_and_pass_a_gradient_on():
    q = logits(0, b=1, d=1).expand(20_000, -1, -1).clone().requires_grad_()
    torch.manual_seed(0)
    z = Categories(q, 1.0, hard=True).rsample().flatten(1)                     # (20000, 5)
    assert z.unique().tolist() == [0, 1] and (z.sum(dim=1) == 1).all()
    torch.testing.assert_close(z.mean(dim=0), q[0, 0].softmax(0), atol=0.015, rtol=0)
    z[:, 0].sum().backward()
    assert q.grad.abs().sum() > 0


def test_gumbel_codes_sum_to_one_and_sharpen_as_the_temperature_falls():
    sharpness = []
    for temperature in (2.0, 0.5, 0.05):
        torch.manual_seed(0)
        z = Categories(logits(0, b=500), temperature).rsample()                # (500, 3, 5)
        torch.testing.assert_close(z.sum(dim=2), torch.ones(500, 3))
        sharpness.append(z.amax(dim=2).mean().item())
    assert sharpness[0] < sharpness[1] < sharpness[2] and sharpness[2] > 0.95


def test_known_prior_of_categories_has_the_ratios_of_the_density_that_u_names():
    cfg = Config(latent="st", u_scale=0.2, **SMALL)
    log_s, m = torch.tensor([[0.2, 0.7]]).log(), torch.tensor([[-0.4, 0.9]])
    u = torch.cat([1 - 2 * log_s / math.log(0.2), m], dim=1)                   # (1, 4)
    p = KnownPrior(cfg)(u).logits
    grid = torch.linspace(-1, 1, 5)
    for i in range(2):
        wanted = Normal(m[0, i], log_s[0, i].exp()).log_prob(grid)
        torch.testing.assert_close(p[0, i].log_softmax(0), wanted.log_softmax(0))
    torch.testing.assert_close(p[0, 2].softmax(0), torch.full((5,), 0.2))      # no factor's


@KINDS
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("u", ["var", "mean+var"])
def test_encoder_and_prior_give_logits_of_one_shape(kind, prior, u):
    model = IDiff(Config(latent=kind, prior=prior, u=u, **SMALL))
    entries = torch.rand(4, 2 if u == "var" else 4)
    q, p = model.encoder(torch.zeros(4, 3, 16, 16)), model.prior(entries)
    assert q.logits.shape == p.logits.shape == q.rsample().shape == (4, 3, 5)


def test_codes_of_images_are_likeliest_categories_and_decode_as_their_one_hot_codes():
    torch.manual_seed(0)
    model = IDiff(Config(latent="gumbel", **SMALL)).eval()
    x = torch.rand(6, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z, log_other = model.encode(x)
        q = Categorical(logits=model.encoder(x).logits)
        assert torch.equal(z, q.probs.argmax(dim=2).float())
        others = q.probs.sort(dim=2).values[:, :, :-1].sum(dim=2)
        torch.testing.assert_close(log_other.exp(), others, rtol=1e-3, atol=1e-6)
        codes = torch.eye(5)[z.long()].flatten(1)                              # (6, 15)
        assert torch.equal(model.decode(z), model.decoder(codes))
        assert torch.equal(model.decode(z + 0.3), model.decode(z))             # rounds
        assert torch.equal(model.decode(z + 99), model.decode(torch.full_like(z, 4)))


@pytest.mark.usefixtures("pictures")
@KINDS
def test_a_categorical_model_trains_is_scored_and_traversed(tiny_npz, tmp_path, kind):
    train.main(["--data", tiny_npz, "--latent", kind, "--categories", "4", "--steps", "3",
                "--batch-size", "8", "--width", "8", "--unet-width", "8", "--device", "cpu",
                "--out", str(tmp_path)])
    path = str(tmp_path / "ckpt.pt")
    evaluate.main([path, "--no-dci", "--device", "cpu"])
    interpolate.main([path, "--columns", "3", "--steps", "2", "--device", "cpu"])
    model = load_checkpoint(path)
    assert model.cfg.categories == 4 and model.cfg.z_dim == 4 * model.cfg.latent_dim
    assert (tmp_path / "traversal_diffusion.png").is_file()


def gradients(balance):
    """KL, and its gradients for mean and log-variance of q and p, at a share of p's."""
    q, p = ([torch.randn(4, 3, generator=torch.Generator().manual_seed(s)).requires_grad_()
             for s in (2 * i, 2 * i + 1)] for i in range(2))
    kl = balanced_kl(Gaussian(*q), Gaussian(*p), balance)
    kl.backward()
    return kl.detach(), [torch.zeros(4, 3) if h.grad is None else h.grad for h in (*q, *p)]


@pytest.mark.parametrize("balance", [0.0, 0.2, 0.8])
def test_balance_moves_kls_gradient_between_q_and_p_and_not_its_value(balance):
    kl, grads = gradients(balance)
    plain, plain_grads = gradients(0.5)
    torch.testing.assert_close(kl, plain)
    shares = [2 - 2 * balance] * 2 + [2 * balance] * 2
    for grad, plain_grad, share in zip(grads, plain_grads, shares):
        torch.testing.assert_close(grad, share * plain_grad)


def test_reversed_kl_swaps_q_and_p():
    model = IDiff(Config(model="ivae", kl_reverse=1.0, **SMALL)).eval()
    x, u = torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(4, 4)
    terms = model(x, u, torch.zeros(0), torch.zeros(0))
    q, p = model.encoder(x), model.prior(u)
    torch.testing.assert_close(terms["kl_reverse"], kl_loss(p, q))
    torch.testing.assert_close(terms["kl"], kl_loss(q, p))
    assert not torch.isclose(terms["kl_reverse"], terms["kl"])
