# SPDX-License-Identifier: MIT
"""iDiff: an identifiable VAE joined with a score-based diffusion model, in plain PyTorch.

An encoder q(z|x) turns an image into latents z. A prior p(z|u) ties the latents to an auxiliary
variable u, which says something about the factors that made the image. A decoder p(x|z) and a
VP-SDE diffusion U-Net, both conditioned on z, turn latents back into images. Read it downwards:

    Config                      what changes the numbers of a run; most fields are flags of train.py
    Gaussian, Categories        the two kinds of latents, as torch.distributions
    Encoder, Decoder            the networks of the VAE
    PRIORS                      p(z|u) of the iVAE (Khemakhem et al. 2020)
    ScoreUNet                   a bare network, modulated by t and z
    VPSDE, SAMPLERS, invert     the diffusion process of Song et al. 2021 and its solvers
    PREDICTIONS                 what the U-Net's output means, and its loss (Eq. 3)
    IDiff                       the model: terms of Eq. 2; encode, decode, sample, generate
    open_checkpoint             from a file to a model and its data
    U_KINDS, Data, load_data    the auxiliary variable, the draw of rows, and files
    script, save_grid           what the scripts share: errors in one line, bars, tables, pictures
    load_shapes3d, _dsprites    replicas of two data sets, an appendix

Equations are those of Kühne & Zemann (2024). Eq. 1, MIG, is in evaluate.py; the weighted sum of
Eq. 2 is in train.py. Denoising and reconstruction losses are means over batch, channels and pixels;
KL is a sum over latents and a mean over the batch. Shape letters: B batch, C image channels, H W
pixels, F features, D latents, L categories, U entries of u, E embedding, K factors, V values of a
factor, N images, S sampler steps. Images lie in [-1, 1].
"""
import csv
import hashlib
import json
import math
import os
import sys
import tempfile
import time
import warnings
import zipfile
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical, Distribution, Normal, OneHotCategorical, kl_divergence
from torch.nn import functional as F

CHECKPOINT_FORMAT = 5       # raised whenever the content of a checkpoint changes

# What can be chosen by name. Each entry is added below the definition of its class or function.
PRIORS = {}                 # p(z|u)
PREDICTIONS = {}            # what the U-Net's output means
U_KINDS = {}                # where u comes from
DATA_SETS = {}              # functions device -> Data

# After warm-up, the learning rate as a share of its peak, by the share of a stage's steps done.
SCHEDULES = {"constant": lambda done: 1.0,
             "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done)}


# ---- Configuration ----

def option(default, help, choices=None, least=0, below=1e15):
    """A dataclass field that is also a flag with this help: one of choices or in [least, below)."""
    metadata = {"help": help, "choices": choices, "least": least, "below": below}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """What changes the numbers: shape of the data, model, SDE, loss weights, optimiser, seed."""
    model: str = option("idiff", "vae: plain VAE; ivae: VAE with prior p(z|u); idiff: ivae and "
                        "a U-Net", ("vae", "ivae", "idiff"))
    latent_dim: int = option(6, "number of latents D; the number of factors is best", least=1)
    latent: str = option("gaussian", "kind of latents; gumbel and st are categorical",
                         ("gaussian", "gumbel", "st"))
    categories: int = option(16, "number of categories L of each categorical latent", least=2)
    prior: str = option("full", "p(z|u): one network reads all of u (full), or u names it (known)",
                        PRIORS)
    prior_mean: str = option("auto", "means of p(z|u); auto: zero with --u var, learned otherwise",
                             ("auto", "learned", "zero"))
    u: str = option("mean+var", "what u tells: the factors' scales (try --contrast 1 --rec 1 "
                    "--kl 1e-3), their centres too, or what the data's own u tells", U_KINDS)
    u_scale: float = option(0.3, "smallest scale that u gives a factor; a smaller one tells more",
                            least=1e-3, below=1)
    kl: float = option(1e-5, "lambda_KL, weight of KL(q(z|x) || p(z|u)); more widens q(z|x)")
    rec: float = option(0.25, "lambda_rec, weight of the decoder's error; more sharpens images")
    contrast: float = option(0.3, "weight of the contrast between z and u, which makes z tell u")
    kl_balance: float = option(0.5, "share of the KL's gradient that goes to p(z|u)", below=1)
    kl_reverse: float = option(0.0, "weight of KL(p(z|u) || q(z|x)), as a multiple of --kl")
    predict: str = option("residual", "what the U-Net predicts: the noise (eps), or what the "
                          "decoder's image lacks", PREDICTIONS)
    typical: float = option(0.1, "expected size of the decoder's error, in pixel values",
                            least=1e-3)
    condition: str = option("mean", "what the U-Net is given from q(z|x): its mean or a sample",
                            ("mean", "sample"))
    settle: float = option(0.6, "share of the iVAE's steps in which encoder and prior learn alone",
                           below=1)
    unet_share: float = option(0.25, "share of all steps, at the end, in which the U-Net "
                               "learns alone", below=1)
    unmix: int = option(1, "how often z is unmixed during settling, the last time at its end",
                        below=10)
    width: int = option(32, "channels of encoder and decoder at their finest level", least=1)
    unet_width: int = option(32, "channels of the U-Net at its finest level", least=8)
    patch: int = option(4, "side in pixels of the space-to-depth stem; smaller is finer, slower",
                        (1, 2, 4))
    batch_size: int = option(128, "images per step, all of which are encoded", least=1)
    rec_images: int = option(32, "images of each batch that are decoded; 0 for all")
    ddpm_images: int = option(24, "images of each batch that the U-Net sees; 0 for all")
    epochs: float = option(1.5, "length of the iVAE's training, in epochs of 480,000 draws")
    steps: int = option(0, "number of optimiser steps in all; 0: set by --epochs")
    lr: float = option(2e-3, "peak learning rate of AdamW")
    muon: float = option(0.03, "learning rate of Muon, for matrices of decoder and U-Net; 0: AdamW")
    schedule: str = option("cosine", "how the learning rate goes on after warm-up", SCHEDULES)
    clip: float = option(1.0, "largest norm of the gradient", least=1e-6)
    ema: float = option(0.998, "decay per step of the averaged weights", below=1)
    precision: str = option("float32", "arithmetic of the networks; bfloat16 is for GPUs",
                            ("float32", "bfloat16"))
    seed: int = option(0, "seed of weights, data and noise", below=2**62)

    # These are read off the data. Only the size is a flag: stored pictures are resized to it.
    image_size: int = option(64, "side in pixels to which pictures are resized; a file's, "
                             "if not given, to the next multiple of 16", least=16, below=65536)
    image_channels: int = option(3, "", least=1)
    n_factors: int = option(6, "")
    n_u: int = option(0, "")

    def __post_init__(self):
        # each value has its field's type, and is among its choices or within its range
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            least, below = f.metadata["least"], f.metadata["below"]

            kinds = (int, float) if f.type is float else (f.type,)
            fits = type(value) in kinds                        # True does not pass for an int
            if choices:
                fits = fits and value in choices
                wanted = f"one of {', '.join(map(str, choices))}"
            else:
                fits = fits and least <= value < below
                wanted = f"{f.type.__name__} in [{least}, {below})"
            if not fits:
                raise ValueError(f"{f.name} must be {wanted}, got {value!r}.")

        # what the shapes of the networks, and the sum of losses, require
        if self.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {self.image_size}.")
        if self.unet_width % 8:
            raise ValueError(f"unet_width must be a multiple of 8, got {self.unet_width}.")
        if self.contrast and self.model != "vae" and self.batch_size == 1:
            raise ValueError("one image has nothing to be contrasted with: batch_size must be 2 or "
                             "more, or contrast must be 0.")
        unet_helps = self.model == "idiff" and self.unet_share == 0
        if self.rec == self.kl == self.contrast == 0 and not unet_helps:
            raise ValueError("rec, kl and contrast are all 0: nothing would be learned.")

        # a prior needs a u that it can read
        if self.u_dim == 0 and (self.model != "vae" or self.u != "own"):
            raise ValueError(f"u '{self.u}' has nothing to tell: the data have {self.n_factors} "
                             f"factors of 2 to 1,000 values and {self.n_u} columns of u.")
        if self.prior == "known":
            self.kind_of_u.unpack(torch.zeros(1, self.u_dim))

    @property
    def z_dim(self):
        """How many numbers of z the decoder and the U-Net see: D, or D L one-hot entries."""
        if self.latent == "gaussian":
            return self.latent_dim
        return self.latent_dim * self.categories

    @property
    def kind_of_u(self):
        """An object of a class in U_KINDS: the width of u, how it is drawn, what it tells."""
        return U_KINDS[self.u](self.n_factors, self.n_u, self.u_scale)

    @property
    def u_dim(self):
        """How many entries u has."""
        return self.kind_of_u.width

    @property
    def zero_means(self):
        """Whether p(z|u) has means of 0. (A learned mean lets a latent fold and tell only |g|.)"""
        return self.prior_mean == "zero" or (self.prior_mean == "auto" and self.u == "var")

    @property
    def settles(self):
        """Whether encoder and prior first learn alone; only the contrast can teach them then."""
        return self.model != "vae" and self.contrast > 0 and self.settle > 0

    @property
    def ivae_steps(self):
        """For how many steps the iVAE learns, at first; the U-Net learns alone in the others."""
        alone = self.unet_share if self.model == "idiff" else 0
        return self.steps - round(alone * self.steps)

    @property
    def settle_steps(self):
        """For how many steps encoder and prior learn alone."""
        return round(self.settle * self.ivae_steps) if self.settles else 0

    @property
    def unet_from(self):
        """The first step at which the U-Net learns."""
        return self.settle_steps if self.ivae_steps == self.steps else self.ivae_steps

    @property
    def unmix_steps(self):
        """The steps before which z is unmixed: evenly spread, the last where settling ends."""
        times = self.unmix if self.settle_steps and self.latent == "gaussian" else 0
        return [max(1, round(self.settle_steps * (k + 1) / times)) for k in range(times)]

    @property
    def halvings(self):
        """How often the networks halve the stem's resolution, down to image_size / 16."""
        return int(math.log2(16 // self.patch))


# ---- Latents ----

class Gaussian(Normal):
    """Independent Gaussian latents with a mean and a log-variance (natural log), (B, D) each.

    Log-variances are clamped to [-20, 20], so that no ratio of variances leaves float32. Arguments
    are not validated, because that would make the host wait for the device at every step.
    """

    def __init__(self, mean, logvar):
        self.logvar = logvar.clamp(-20, 20)
        super().__init__(mean, (0.5 * self.logvar).exp(), validate_args=False)

    def detach(self):
        return Gaussian(self.mean.detach(), self.logvar.detach())

    def code(self):
        """What IDiff.encode returns: mean and log-variance, (B, D) each."""
        return self.mean, self.logvar


class Categories(OneHotCategorical):
    """Independent categorical latents with logits (B, D, L); codes z are (B, D, L), soft one-hot.

    hard: whether codes are one-hot, with the gradient of the soft ones ("st", straight-through).
    Source: Jang et al. 2017 (Gumbel-softmax), Bengio et al. 2013 (straight-through).
    """

    def __init__(self, logits, temperature=1.0, hard=False):
        # as OneHotCategorical does it, but without validation, which would make the host wait
        logits = logits.clamp(-40, 40)                         # or a probability could underflow
        self._categorical = Categorical(logits=logits, validate_args=False)
        Distribution.__init__(self, logits.shape[:-1], logits.shape[-1:], validate_args=False)
        self.temperature = temperature
        self.hard = hard

    def detach(self):
        return Categories(self.logits.detach(), self.temperature, self.hard)

    def rsample(self):
        return F.gumbel_softmax(self.logits, self.temperature, self.hard)

    def log_prob(self, z):
        """The log-likelihood of each latent, (B, D); codes may lie between the categories."""
        return (z * self.logits).sum(dim=-1)

    def code(self):
        """Index of the likeliest category, and log of the chance of another, (B, D) each."""
        chance, index = self.probs.max(dim=-1)
        return index.to(chance), (1 - chance).clamp(min=1e-6).log()


def kl_loss(q, p):
    """KL(q || p) in nats: sum over D, mean over B. Returns shape (). Source: L_KL of Eq. 2.

    q, p: distributions over (B, D) latents. If torch knows no closed form, the KL is estimated from
    one sample of q.
    """
    try:
        each = kl_divergence(q, p)                             # (B, D)
    except NotImplementedError:
        z = q.rsample()
        each = q.log_prob(z) - p.log_prob(z)
    return each.sum(dim=1).mean()


def balanced_kl(q, p, share):
    """KL(q || p) that gives p this share of its gradient, and q the rest; 0.5 is the plain KL.

    Source: KL balancing, Hafner et al. 2022.
    """
    if share == 0.5:
        return kl_loss(q, p)
    value = kl_loss(q.detach(), p.detach())
    to_p = kl_loss(q.detach(), p)
    to_q = kl_loss(q, p.detach())
    return 2 * share * to_p + 2 * (1 - share) * to_q - value


def contrast_loss(z, p):
    """-E[log p(z_a|u_a) - log mean_b p(z_a|u_b)] in nats: InfoNCE of z and u, the prior as critic.

    z: (B, D), or (B, D, L) categories; p: p(z|u) of N >= B draws, over (N, D), the first B those of
    z. The loss is at least -log N; it is 0 where p does not depend on u, and 0 or more on average
    where z does not. Returns shape (). Source: van den Oord et al. 2018; Hyvarinen et al. 2019.
    """
    # how likely each z is under the u of each draw of the batch
    log_p = p.log_prob(z[:, None]).sum(dim=2)                  # (B, N)
    own = log_p.diagonal()                                     # (B,)
    any_u = log_p.logsumexp(dim=1) - math.log(log_p.shape[1])  # (B,)
    return (any_u - own).mean()


# ---- Encoder and decoder ----

def like_weights(x, module):
    """x in the precision of the module's weights."""
    return x.to(next(module.parameters()).dtype)


def widened(h):
    """h in float32 if it is in half precision, too coarse for sums and exponentials; else h."""
    return h.float() if h.dtype in (torch.float16, torch.bfloat16) else h


def mlp(*widths):
    """Linear layers from each width to the next, with SiLU between them."""
    layers = []
    for c_in, c_out in pairwise(widths):
        layers += [nn.Linear(c_in, c_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q(z|x): images (B, C, H, W) -> a distribution of z, over (B, D). It never sees u."""

    LOGVAR_AT_START = -8.0

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.temperature = 0.3                                 # of Gumbel-softmax; it ends at 0.3
        side = cfg.image_size // 16

        # a space-to-depth stem, then halvings
        c_in = cfg.image_channels * cfg.patch**2
        layers = [nn.PixelUnshuffle(cfg.patch),
                  nn.Conv2d(c_in, cfg.width, 3, padding=1),
                  nn.SiLU()]
        c_in, c_out = cfg.width, 2 * cfg.width
        for _ in range(cfg.halvings):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                       nn.SiLU()]
            c_in = c_out

        # the features that are left become the numbers of each latent
        last = mlp(c_in * side**2, 256, cfg.latent_dim * numbers_per_latent(cfg))
        self.net = nn.Sequential(*layers, nn.Flatten(), *last)

    @property
    def last(self):
        """The last nn.Linear if it gives D means, then D log-variances; else None."""
        last = None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                last = layer
        fits = last and self.cfg.latent == "gaussian"
        return last if fits and last.out_features == 2 * self.cfg.latent_dim else None

    @torch.no_grad()
    def turn(self, w, b):
        """Turn the means into w mean + b, with w (D, D) and b (D,), by changing the last layer."""
        d = len(b)
        self.last.weight[:d] = w @ self.last.weight[:d]
        self.last.bias[:d] = w @ self.last.bias[:d] + b

    def forward(self, x):
        h = widened(self.net(like_weights(x, self)))           # (B, 2 D) or (B, D L)

        if self.cfg.latent == "gaussian":
            mean, logvar = h.chunk(2, dim=1)
            return Gaussian(mean, 4 - F.softplus(4 - logvar))  # softly below 4

        logits = h.unflatten(1, (self.cfg.latent_dim, -1))     # (B, D, L)
        return Categories(logits, self.temperature, hard=self.cfg.latent == "st")


OCTAVES = 5


def fourier(z):
    """z (B, D), then its sines and cosines of 0.15, 0.3, ... 2.4 periods per unit: (B, 11 D)."""
    octave = torch.arange(OCTAVES, device=z.device)
    angle = (z[:, :, None] * 0.3 * math.pi * 2**octave).flatten(1)     # (B, 5 D)
    return torch.cat([z, angle.sin(), angle.cos()], dim=1)


class Head(nn.Module):
    """Features (B, F, H / patch, W / patch), emb (B, E) and extra channels -> (B, C, H, W).

    emb sets the weights that mix full-resolution channels: a colour multiplies a shading.
    """

    def __init__(self, c_in, c_extra, c_out, c_emb, patch):
        super().__init__()
        self.patch = patch
        c_full = 8 + c_extra                                   # channels at full resolution
        self.conv = nn.Conv2d(c_in, 8 * patch**2, 3, padding=1)
        self.full = nn.Sequential(                             # blurs the borders of patches
            nn.Conv2d(c_full, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, c_full, 1))
        self.mix = nn.Linear(c_emb, c_out * c_full)

    def forward(self, h, emb, *extra):
        h = F.silu(F.pixel_shuffle(self.conv(h), self.patch))  # (B, 8, H, W)
        h = torch.cat([h, *extra], dim=1)                      # (B, 8 + extra, H, W)
        h = h + self.full(h)

        # mix the channels of each pixel, which in training lie side by side in memory
        weight = self.mix(emb).unflatten(1, (-1, h.shape[1]))  # (B, C, 8 + extra)
        by_pixel = h.permute(0, 2, 3, 1).flatten(1, 2)         # (B, H W, 8 + extra)
        pixels = torch.bmm(by_pixel, weight.mT).mT             # (B, C, H W)
        return widened(pixels.unflatten(2, h.shape[2:]))


class Decoder(nn.Module):
    """p(x|z): z (B, D), or one-hot codes (B, D L), -> reconstruction (B, C, H, W)."""

    def __init__(self, cfg):
        super().__init__()
        w = cfg.width
        side = cfg.image_size // 16
        c_emb = 4 * w
        self.latent = nn.Sequential(mlp((1 + 2 * OCTAVES) * cfg.z_dim, c_emb, c_emb), nn.SiLU())

        # from a coarse picture up to the stem's resolution
        c_in = 2 * w
        layers = [nn.Linear(c_emb, c_in * side**2),
                  nn.SiLU(),
                  nn.Unflatten(1, (c_in, side, side))]
        for _ in range(cfg.halvings):
            layers += [nn.Upsample(scale_factor=2),
                       nn.Conv2d(c_in, w, 3, padding=1),
                       nn.SiLU()]
            c_in = w
        self.net = nn.Sequential(*layers)
        self.head = Head(c_in, 0, cfg.image_channels, c_emb, cfg.patch)

    def forward(self, z):
        emb = self.latent(like_weights(fourier(z), self))      # (B, E)
        return self.head(self.net(emb), emb)


# ---- Priors p(z|u) ----

def numbers_per_latent(cfg):
    """How many numbers describe a latent: mean and log-variance, or L logits."""
    return 2 if cfg.latent == "gaussian" else cfg.categories


def prior_distribution(cfg, h):
    """p(z|u) of numbers h (B, n, 2 or L), n <= D; latents beyond n are N(0, 1), or uniform."""
    spare = cfg.latent_dim - h.shape[1]
    h = F.pad(widened(h), (0, 0, 0, spare))                    # (B, D, 2 or L)
    if cfg.latent != "gaussian":
        return Categories(h)
    mean, logvar = h.unbind(dim=2)
    if cfg.zero_means:
        mean = torch.zeros_like(mean)
    return Gaussian(mean, logvar)


class Prior(nn.Module):
    """p(z|u): u (B, U) -> a distribution over (B, D).

    Here it is N(0, 1) for every latent, or equal chances, whatever u is: the prior of a plain VAE.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg

    def forward(self, u):
        # no numbers: every latent is spare
        nothing = u.new_zeros(len(u), 0, numbers_per_latent(self.cfg))
        return prior_distribution(self.cfg, nothing)


class KnownPrior(Prior):
    """z_i ~ N(m_i, s_i^2), with centre and scale of factor i read off u. Nothing is learned.

    Categories get that density at L places over [-1, 1]. Latents without a factor have N(0, 1).
    """

    def forward(self, u):
        # n of D latents have a factor
        told = self.cfg.kind_of_u.unpack(widened(u))
        log_s = told["log_scale"][:, :self.cfg.latent_dim, None]       # (B, n, 1)
        m = told["centre"][:, :self.cfg.latent_dim, None]

        if self.cfg.latent == "gaussian":
            h = torch.cat([m, 2 * log_s], dim=2)               # (B, n, 2)
        else:
            place = torch.linspace(-1, 1, self.cfg.categories, device=u.device)
            h = -0.5 * ((place - m) / log_s.exp()).square()    # (B, n, L)
        return prior_distribution(self.cfg, h)


class FullPrior(Prior):
    """One network over all of u gives the means and log-variances of all latents, as in the paper.

    It is a linear map of u plus a small network that starts at 0. The map is random and orthogonal,
    because a prior that starts independent of u is at a saddle of the loss and stays there.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        numbers = numbers_per_latent(cfg)
        self.linear = nn.Linear(cfg.u_dim, cfg.latent_dim * numbers)
        self.net = mlp(cfg.u_dim, 128, 128, cfg.latent_dim * numbers)

        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        nn.init.zeros_(self.linear.bias)
        weight = self.linear.weight.unflatten(0, (-1, numbers))        # (D, 2 or L, U)
        for k in range(numbers):                               # one map for means, one for scales
            nn.init.orthogonal_(weight[:, k])

    def forward(self, u):
        u = like_weights(u, self)
        h = self.linear(u) + self.net(u)                       # (B, D * (2 or L))
        h = h.unflatten(1, (self.cfg.latent_dim, -1))
        return prior_distribution(self.cfg, h)


PRIORS.update(full=FullPrior, known=KnownPrior)


# ---- Score U-Net ----

class ResBlock(nn.Module):
    """Residual block whose second group norm is scaled and shifted by the embedding of t and z."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.mod = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                      # it starts near its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))                  # (B, F, H, W)
        scale, shift = self.mod(emb)[..., None, None].chunk(2, dim=1)  # (B, F, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class ScoreUNet(nn.Module):
    """A bare network: x_t (B, C, H, W), t (B,), z (B, D), x_hat -> (B, n C, H, W).

    A U-Net on a space-to-depth stem, halved down to image_size / 16; t and z (the one-hot codes
    (B, D L) of categories) modulate every block. A class in PREDICTIONS decides whether it sees the
    decoder's image x_hat beside x_t, how many maps n it gives, and what they mean.
    """

    def __init__(self, cfg):
        super().__init__()
        f = cfg.unet_width
        c_emb = 4 * f
        prediction = PREDICTIONS[cfg.predict]
        self.sees_x_hat = prediction.sees_x_hat
        self.patch = cfg.patch
        self.n_freq = f // 2
        self.time = mlp(f, c_emb, c_emb)
        self.latent = mlp((1 + 2 * OCTAVES) * cfg.z_dim, c_emb, c_emb)

        # the stem
        c_seen = cfg.image_channels * (2 if self.sees_x_hat else 1)
        self.conv_in = nn.Conv2d(c_seen * cfg.patch**2, f, 3, padding=1)

        # down and halve run from the stem inwards, grow and up back out
        self.down = nn.ModuleList()
        self.halve = nn.ModuleList()
        self.grow = nn.ModuleList()
        self.up = nn.ModuleList()
        widths = [f] + [2 * f] * cfg.halvings
        for w, w_next in pairwise(widths):
            self.down.append(ResBlock(w, w, c_emb))
            self.halve.append(nn.Conv2d(w, w_next, 3, stride=2, padding=1))
            self.grow.insert(0, nn.Conv2d(w_next, w, 3, padding=1))
            self.up.insert(0, ResBlock(2 * w, w, c_emb))

        # the coarsest level
        w = widths[-1]
        self.middle = nn.ModuleList(ResBlock(w, w, c_emb) for _ in range(2))
        self.start = nn.Linear(c_emb, w * (cfg.image_size // 16)**2)   # a coarse picture of z

        # the maps, which start at 0
        c_out = cfg.image_channels * prediction.n_maps
        self.norm = nn.GroupNorm(8, f)
        self.head = Head(f, c_seen, c_out, c_emb, cfg.patch)
        nn.init.zeros_(self.head.mix.weight)
        nn.init.zeros_(self.head.mix.bias)

    def forward(self, x_t, t, z, x_hat):
        # embedding of t and z
        freq = 1e-4 ** (torch.arange(self.n_freq, device=t.device) / self.n_freq)
        angle = 1000 * widened(t)[:, None] * freq              # (B, F / 2)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)    # (B, F)
        of_t = self.time(like_weights(wave, self))
        of_z = self.latent(like_weights(fourier(z), self))
        emb = F.silu(of_t + of_z)                              # (B, E)

        # down, keeping the features of each level
        seen = torch.cat([x_t, x_hat], dim=1) if self.sees_x_hat else x_t
        seen = like_weights(seen, self)
        h = self.conv_in(F.pixel_unshuffle(seen, self.patch))
        skips = []
        for block, halve in zip(self.down, self.halve):
            h = block(h, emb)
            skips.append(h)
            h = halve(h)

        # the coarsest level
        h = h + self.start(emb).view(h.shape)
        for block in self.middle:
            h = block(h, emb)

        # up, beside the features of the way down
        for grow, block in zip(self.grow, self.up):
            h = grow(F.interpolate(h, scale_factor=2))
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.head(F.silu(self.norm(h)), emb, seen)      # (B, n C, H, W)


# ---- VP-SDE and samplers ----

class VPSDE:
    """Variance-preserving SDE, dx = -beta x/2 dt + sqrt(beta) dw, with beta linear in t in (0, 1].

    Its marginal is x_t = alpha x + sigma eps with alpha^2 + sigma^2 = 1 and eps ~ N(0, I). Methods
    take t of any shape and return that shape. Source: Song et al. 2021, Eq. 11.
    """

    beta_min = 0.1                                             # beta(0)
    beta_rise = 19.9                                           # beta(1) - beta(0)

    def beta(self, t):
        return self.beta_min + self.beta_rise * t

    def log_alpha(self, t):
        return -0.25 * self.beta_rise * t**2 - 0.5 * self.beta_min * t

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def sigma(self, t):
        # 1 - alpha^2 would round near t = 0
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lam(self, t):
        """log(alpha / sigma), half the log signal-to-noise ratio; falls as t rises."""
        return self.log_alpha(t) - self.sigma(t).log()

    def t_of_lam(self, lam):
        """The t at which lam(t) is lam."""
        q = 2 * self.beta_rise * F.softplus(-2 * lam)
        return q / ((self.beta_min**2 + q).sqrt() + self.beta_min) / self.beta_rise

    def alpha_ratio(self, t):
        """alpha and sigma / alpha at times (B,), each (B, 1, 1, 1): x_t / alpha = x + ratio eps."""
        t = t.view(-1, 1, 1, 1)
        alpha = self.alpha(t)
        return alpha, self.sigma(t) / alpha

    def add_noise(self, x, eps, t):
        """x_t of clean x. x, eps: (B, C, H, W); t: (B,)."""
        t = t.view(-1, 1, 1, 1)
        return self.alpha(t) * x + self.sigma(t) * eps


def time_grid(steps, sde):
    """(steps + 1,) times from 1 down to 1e-3, uniform in sde.lam, half the log of signal to noise.

    Samplers take any other grid, too, such as torch.linspace(1, 1e-3, steps + 1).
    """
    ends = torch.tensor([1, 1e-3])
    ts = sde.t_of_lam(torch.linspace(*sde.lam(ends), steps + 1))
    ts[[0, -1]] = ends                                         # free of rounding
    return ts


def seeded_noise(seeds, shape, device):
    """A function that gives (B, *shape) noise on device; row k depends on seeds[k] alone."""
    # drawn on the CPU, so that every device gets the same
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# Samplers take x (B, C, H, W) along the times ts (S + 1,), which are on its device; eps_fn(x, t)
# takes t (B,); noise() gives the next draw.

def check_stochastic(noise, ts):
    """ValueError unless there is noise and ts decreases: only an ODE runs from image to noise."""
    if noise is None or ts[0] < ts[-1]:
        raise ValueError("a stochastic sampler needs noise=seeded_noise(seeds, shape, device) and "
                         "decreasing ts; samplers of an ODE need neither.")


def x0_from_eps(x, eps_hat, t, sde):
    """The clean image that eps_hat implies, E[x_0 | x_t] for the best eps_hat. t: ()."""
    return (x - sde.sigma(t) * eps_hat) / sde.alpha(t)


@torch.no_grad()
def sample_em(eps_fn, x, ts, sde, noise=None):
    """Reverse SDE by Euler-Maruyama; calls eps_fn S times. Source: Song et al. 2021, Eq. 6."""
    check_stochastic(noise, ts)
    for t, t_next in pairwise(ts):
        score = -eps_fn(x, t.expand(len(x))) / sde.sigma(t)
        g2h = sde.beta(t) * (t - t_next)
        x = x + g2h * (0.5 * x + score) + g2h.sqrt() * noise()
    return x


@torch.no_grad()
def sample_pc(eps_fn, x, ts, sde, noise=None, *, snr=0.16):
    """Reverse SDE with one Langevin step at t before each Euler-Maruyama step; 2S calls of eps_fn.

    Langevin's own error, up to snr^2 / 2 of the standard deviation, does not fall with S. Source:
    Song et al. 2021, Alg. 3 and 5, but with each image's norms, not their means over the batch.
    """
    check_stochastic(noise, ts)
    for t, t_next in pairwise(ts):
        # corrector: a step whose score and noise have the ratio snr
        score = -eps_fn(x, t.expand(len(x))) / sde.sigma(t)
        eps = noise()
        ratio = eps.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)      # (B,)
        e = 2 * (1 - sde.beta(t) / 1000) * (snr * ratio).square().view(-1, 1, 1, 1)
        x = x + e * score + (2 * e).sqrt() * eps

        # predictor
        x = sample_em(eps_fn, x, torch.stack([t, t_next]), sde, noise)
    return x


@torch.no_grad()
def sample_ddim(eps_fn, x, ts, sde, noise=None, *, eta=0.0):
    """DDIM, an ODE for eta = 0 and the ancestral sampler of DDPM for eta = 1; S calls of eps_fn.

    Source: Song, Meng and Ermon 2021, Eq. 12 and 16.
    """
    if eta > 0:
        check_stochastic(noise, ts)
    for t, t_next in pairwise(ts):
        eps_hat = eps_fn(x, t.expand(len(x)))

        # how much of the noise at t_next is drawn anew
        fresh = -torch.expm1(2 * (sde.log_alpha(t) - sde.log_alpha(t_next)))
        var = (eta * sde.sigma(t_next) / sde.sigma(t))**2 * fresh

        x = (sde.alpha(t_next) * x0_from_eps(x, eps_hat, t, sde)
             + (sde.sigma(t_next)**2 - var).sqrt() * eps_hat)
        if eta > 0:
            x = x + var.sqrt() * noise()
    return x


@torch.no_grad()
def sample_heun(eps_fn, x, ts, sde, noise=None):
    """Probability-flow ODE by Heun's method, order 2; calls eps_fn 2S times. noise is not used.

    Source: Song et al. 2021, Eq. 13, for the VP-SDE.
    """
    def slope(x, t):
        return -0.5 * sde.beta(t) * (x - eps_fn(x, t.expand(len(x))) / sde.sigma(t))

    for t, t_next in pairwise(ts):
        first = slope(x, t)
        second = slope(x + (t_next - t) * first, t_next)
        x = x + (t_next - t) * 0.5 * (first + second)
    return x


@torch.no_grad()
def sample_dpmpp(eps_fn, x, ts, sde, noise=None):
    """Probability-flow ODE by DPM-Solver++(2M), order 2 on time_grid's times; S calls of eps_fn.

    Its first step is DDIM. noise is not used. Source: Lu et al. 2022 (2211.01095), Alg. 2.
    """
    x0_prev = h_prev = None
    for t, t_next in pairwise(ts):
        x0 = x0_from_eps(x, eps_fn(x, t.expand(len(x))), t, sde)
        h = sde.lam(t_next) - sde.lam(t)

        # extrapolate the clean image, on a line through the last two, to the middle of the step
        ahead = x0 if x0_prev is None else x0 + 0.5 * h / h_prev * (x0 - x0_prev)
        x = sde.sigma(t_next) / sde.sigma(t) * x - sde.alpha(t_next) * torch.expm1(-h) * ahead
        x0_prev, h_prev = x0, h
    return x


SAMPLERS = {"em": sample_em, "pc": sample_pc, "ddim": sample_ddim, "heun": sample_heun,
            "dpmpp": sample_dpmpp}


def invert(eps_fn, x, ts, sde):
    """The noise (B, C, H, W) at max(ts) that the probability-flow ODE maps to x; S calls.

    ts may be in either order; sample_dpmpp on the same grid leads back to x. The other ODE samplers
    invert when they are given ts.flip(0).
    """
    return sample_dpmpp(eps_fn, x, ts.sort().values, sde)


# ---- Parametrisations: what the U-Net's output means ----

class PredictEps:
    """The network gives the noise of x_t, as in the paper, and does not see the decoder's image.

    A parametrisation decides what the network sees (sees_x_hat: also the decoder's image), how many
    maps (B, C, H, W) it gives, what clean image follows from them, the loss, and the times to train
    at. To add another, enter a subclass in PREDICTIONS.
    """

    sees_x_hat = False
    n_maps = 1

    def __init__(self, cfg, sde):
        self.cfg = cfg
        self.sde = sde

    def times(self, share):
        """Times (b,) in (0, 1] to train at, from shares uniform in [0, 1)."""
        return share.clamp(min=1e-5)

    def maps(self, unet, x_t, t, z, x_hat):
        """The network's output, (B, n_maps C, H, W); ValueError for another shape."""
        out = unet(x_t, t, z, x_hat)
        wanted = (len(x_t), self.n_maps * x_t.shape[1], *x_t.shape[2:])
        if out.shape != wanted:
            raise ValueError(f"the U-Net must give {wanted} for predict {self.cfg.predict!r}, got "
                             f"{tuple(out.shape)}.")
        return out

    def denoise(self, unet, x_t, t, z, x_hat):
        """The clean image (B, C, H, W) that the network believes in; arguments as IDiff.denoise."""
        alpha, ratio = self.sde.alpha_ratio(t)
        return x_t / alpha - ratio * self.maps(unet, x_t, t, z, x_hat)

    def error(self, x_0, x, t):
        """The error whose mean square is the loss: here that of the noise estimate (Eq. 3 with
        lambda(t) = sigma^2), given the clean image x and the network's x_0."""
        _, ratio = self.sde.alpha_ratio(t)
        return (x_0 - x) / ratio


class PredictResidual(PredictEps):
    """The network gives what the decoder's image lacks, and a gate that lets x_t through.

    It is EDM's preconditioning (Karras et al. 2022, Table 1), centred on the decoder's image
    (Pandey et al. 2022). The network sees x_t / alpha - x_hat: the decoder's error, of typical size
    r, plus noise of size s = sigma / alpha. At first the gate is r^2 / (r^2 + s^2), as in EDM; the
    network learns to change it, for instance to close it where the decoder is right.
    """

    sees_x_hat = True
    n_maps = 2
    RATIOS = (0.01, 3.0)                                       # s on which the network is trained

    def times(self, share):
        # uniform in the logarithm of the ratio
        low, high = self.RATIOS
        share = share.clamp(min=1e-5)
        log_ratio = math.log(low) + share * math.log(high / low)
        return self.sde.t_of_lam(-log_ratio)

    def scale(self, ratio):
        """The typical size of the decoder's error plus noise of this ratio."""
        return (self.cfg.typical**2 + ratio.square()).sqrt()

    def denoise(self, unet, x_t, t, z, x_hat):
        alpha, ratio = self.sde.alpha_ratio(t)
        offset = x_t / alpha - x_hat

        # samplers start with more noise than in training: the network is told the most it knows
        told = ratio.clamp(max=self.RATIOS[1])
        t = self.sde.t_of_lam(-told.log()).flatten()
        out, logit = self.maps(unet, offset / self.scale(ratio), t, z, x_hat).chunk(2, dim=1)

        # the decoder's image, the share of the offset that the gate lets through, and the residual
        typical = self.cfg.typical
        gate = torch.sigmoid(logit + 2 * (typical / ratio).log())
        return x_hat + gate * offset + typical * ratio / self.scale(ratio) * out

    def error(self, x_0, x, t):
        """The noise estimate's error times (r^2 + s^2)^0.5, so that it has a pixel error's size."""
        _, ratio = self.sde.alpha_ratio(t)
        return (x_0 - x) / ratio * self.scale(ratio)


PREDICTIONS.update(residual=PredictResidual, eps=PredictEps)


# ---- The model ----

class IDiff(nn.Module):
    """The joint model of Eq. 2. cfg.model "vae" and "ivae" have no U-Net: unet is None."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.info = {}                                         # where a checkpoint comes from
        self.sde = VPSDE()
        self.prediction = PREDICTIONS[cfg.predict](cfg, self.sde)
        self.encoder = Encoder(cfg)
        last = self.encoder.last

        # start q narrow if the decoder comes late: else it would first see little but noise
        if cfg.settles and last is not None:
            nn.init.constant_(last.bias[cfg.latent_dim:], Encoder.LOGVAR_AT_START)
        self.prior = Prior(cfg) if cfg.model == "vae" else PRIORS[cfg.prior](cfg)
        self.decoder = Decoder(cfg)
        self.unet = ScoreUNet(cfg) if cfg.model == "idiff" else None

    def weights(self, settling=False):
        """Weights of forward's terms in Eq. 2, by name; a term of weight 0 is left out.

        settling: encoder and prior learn alone. Without a decoder nothing would keep q(z|x) narrow
        against the KL, so the KL waits.
        """
        kl = 0.0 if settling else self.cfg.kl
        return {"ddpm": 1.0,
                "rec": self.cfg.rec,
                "kl": kl,
                "kl_reverse": kl * self.cfg.kl_reverse,
                "contrast": self.cfg.contrast}

    def forward(self, x, u, t, eps, n_rec=None):
        """The unweighted terms of Eq. 2 and those beyond it, a dict of scalars.

        x: (B, C, H, W); u: (N, U), N >= B, the first B those of x, or None, to leave out the
        terms of the latents; t: (b,) and eps: (b, C, H, W) with b <= B. The encoder sees all B
        images, the decoder the first n_rec (None: all), the U-Net the first b.

        kl: KL(q(z|x) || p(z|u)). rec: the decoder's mean squared error, absent without images for
        it. ddpm: Eq. 3, the mean square of prediction.error, absent without a U-Net or t. For the
        others see latent_terms.
        """
        n_rec = len(x) if n_rec is None else n_rec
        n_ddpm = len(t)

        # every image is encoded
        q = self.encoder(x)                                    # over (B, D)
        z = q.rsample().flatten(1)                             # (B, D) or (B, D L)
        terms = {} if u is None else self.latent_terms(q, z, u)

        # the first ones are decoded from samples of q
        sampled = self.cfg.condition == "sample" or self.cfg.latent != "gaussian"
        n_decoded = max(n_rec, n_ddpm) if sampled else n_rec
        if n_decoded:
            x_hat = self.decoder(z[:n_decoded])
        if n_rec:
            error = x_hat[:n_rec] - x[:n_rec]
            terms["rec"] = error.square().mean()

        # diffusion is given what it gets in use: q's mean and the decoder's image of it; or, as in
        # the paper, a sample, through which the encoder learns, too. The decoder never learns here.
        if self.unet is not None and n_ddpm:
            if sampled:
                z = z[:n_ddpm]
                x_hat = x_hat[:n_ddpm].detach()
            else:
                z = q.mean[:n_ddpm].detach().clone()
                with torch.no_grad():
                    x_hat = self.decoder(z)

                # a traversal leaves the codes of images, and there the U-Net should trust x_hat:
                # so every fourth z is moved away from its code, while x_hat stays
                spread = z.std(dim=0, correction=0)
                z[::4] += 0.5 * spread * torch.randn_like(z[::4])
            x = x[:n_ddpm]
            x_t = self.sde.add_noise(x, eps, t)
            x_0 = self.denoise(x_t, t, z, x_hat)
            terms["ddpm"] = self.prediction.error(x_0, x, t).square().mean()
        return terms

    def latent_terms(self, q, z, u):
        """The terms that compare q(z|x) with p(z|u), a dict of scalars.

        q: over (B, D); z: a sample of it, (B, D) or (B, D L); u: (N, U), the first B those of q.
        It always has kl. Beyond the paper it has kl_reverse, KL(p || q), and contrast if their
        weights are not 0; eval mode always gives contrast.
        """
        cfg = self.cfg
        p = self.prior(u[:len(z)])
        terms = {"kl": balanced_kl(q, p, cfg.kl_balance)}
        if cfg.kl_reverse:
            terms["kl_reverse"] = balanced_kl(p, q, 1 - cfg.kl_balance)
        if cfg.contrast or not self.training:
            terms["contrast"] = contrast_loss(q.mean, self.prior(u))
        return terms

    def denoise(self, x_t, t, z, x_hat):
        """The clean image (B, C, H, W) that the U-Net believes in, E[x | x_t, z] for the best one.

        x_t: (B, C, H, W); t: (B,); z: (B, D), or one-hot codes; x_hat: the decoder's image of z.
        """
        return self.prediction.denoise(self.unet, x_t, t, z, x_hat)

    def encode(self, x):
        """Mean and log-variance of q(z|x), (B, D) each, of images x (B, C, H, W) in [-1, 1].

        For categorical latents: index of the likeliest category, and log of the chance of another.
        """
        cfg = self.cfg
        wanted = (cfg.image_channels, cfg.image_size, cfg.image_size)
        if x.shape[1:] != wanted:
            raise ValueError(f"images must be (B, {', '.join(map(str, wanted))}), got "
                             f"{tuple(x.shape)}. Resize them to what the model was trained on.")
        return self.encoder(x).code()

    def embed(self, z):
        """What the networks see of codes z (B, D): z itself, or the one-hot codes of categories."""
        if self.cfg.latent == "gaussian":
            return z
        index = z.round().long().clamp(0, self.cfg.categories - 1)
        return F.one_hot(index, self.cfg.categories).flatten(1).to(z)

    def decode(self, z):
        """The decoder's images (B, C, H, W) of latents z (B, D)."""
        if z.shape[1:] != (self.cfg.latent_dim,):
            raise ValueError(f"z must be (B, {self.cfg.latent_dim}), got {tuple(z.shape)}.")
        return self.decoder(self.embed(z))

    def sample_prior(self, u):
        """z (B, D) drawn from p(z|u) of u (B, U); for categories z holds the indices."""
        if u.shape[1:] != (self.cfg.u_dim,):
            raise ValueError(f"u must be (B, {self.cfg.u_dim}), got {tuple(u.shape)}.")
        z = self.prior(u).sample()                             # (B, D) or (B, D, L)
        return z.argmax(dim=2).to(u) if z.dim() == 3 else z

    def eps_fn(self, z):
        """The noise estimate eps_fn(x, t) given latents z (B, D), for samplers and invert."""
        if self.unet is None:
            raise ValueError(f"model {self.cfg.model!r} has no diffusion U-Net to sample from. "
                             "Use decode, or train with --model idiff.")
        # what does not change from step to step
        x_hat = self.decode(z)
        z = self.embed(z)

        def eps_fn(x_t, t):
            alpha, ratio = self.sde.alpha_ratio(t)
            x_0 = self.denoise(x_t, t, z, x_hat)
            return (x_t / alpha - x_0) / ratio
        return eps_fn

    @torch.no_grad()
    def sample(self, z, start, steps=20, sampler="dpmpp", noise=None, last=True):
        """Images (B, C, H, W) in [-1, 1] from latents z (B, D) and start, the noise at t = 1.

        steps: how many, uniform in log-SNR; noise: for stochastic samplers, see seeded_noise; last:
        whether to remove the noise that is left at the end. Pass False if invert found start.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}.")
        eps_fn = self.eps_fn(z)
        size = self.cfg.image_size
        wanted = (len(z), self.cfg.image_channels, size, size)
        if start.shape != wanted or steps < 1:
            raise ValueError(f"start must be {wanted} and steps at least 1, got "
                             f"{tuple(start.shape)} and {steps}.")

        # along the grid of times
        ts = time_grid(steps, self.sde).to(start)
        x = SAMPLERS[sampler](eps_fn, start, ts, self.sde, noise)

        # the samplers end at t = 1e-3, where 1 % of the noise is left
        if last:
            eps_hat = eps_fn(x, ts[-1].expand(len(x)))
            x = x0_from_eps(x, eps_hat, ts[-1], self.sde)
        return x.clamp(-1, 1)

    @torch.no_grad()
    def generate(self, u, start, steps=20, sampler="dpmpp", noise=None):
        """New images (B, C, H, W) in [-1, 1] for u (B, U): z is drawn from p(z|u), then see sample.

        Without a U-Net the decoder draws them, and the arguments after u are not used.
        """
        z = self.sample_prior(u)
        if self.unet is None:
            return self.decode(z).clamp(-1, 1)
        return self.sample(z, start, steps, sampler, noise)


# ---- Checkpoints and devices ----

def save_checkpoint(path, model, ema, **state):
    """Write config, weights, averaged weights (module ema) and state to path, or nothing."""
    content = {"format": CHECKPOINT_FORMAT, "config": asdict(model.cfg), "info": model.info,
               "model": model.state_dict(), "ema": ema.state_dict(), **state}
    # into another file first, so that a crash or a full disk leaves the old checkpoint whole
    partial_path = Path(f"{path}.partial")
    try:
        torch.save(content, partial_path)
        os.replace(partial_path, path)
    except (OSError, RuntimeError) as error:                   # torch raises RuntimeErrors
        partial_path.unlink(missing_ok=True)
        raise OSError(f"'{path}' was not written, and what it held is kept: "
                      f"{error.__context__ or error}")


def read_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote; FileNotFoundError or ValueError if there is none."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint not found: '{path}'. Train one with \"python "
                                "train.py\", or pass the path it printed at its end.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)     # runs no code
        if content.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {content.get('format')}, not {CHECKPOINT_FORMAT}")
        json.dumps({**content["info"]})                        # a TypeError if not plain values

        with torch.device("meta"):                             # takes no memory
            model = IDiff(Config(**content["config"]))
        for weights in (content["model"], content["ema"]):
            # strict: every name and shape; dict(): torch writes into the argument with assign=True
            model.load_state_dict(dict(weights), assign=True)
    except Exception as error:         # whatever torch raises, the file is at fault
        reason = f"{type(error).__name__}, {in_one_line(error)}".split(". ")[0]
        raise ValueError(f"'{path}' is not an iDiff checkpoint of this version, or is damaged. If "
                         "a file of your own changes idiff, run it through that file; else train "
                         f"it again, or pass another ({reason}).") from None
    return content


def load_checkpoint(path, device="cpu"):
    """The IDiff model, with model.cfg and model.info, in eval mode with averaged (EMA) weights."""
    # the averaged weights: training goes on from others
    content = read_checkpoint(path, device)
    model = IDiff(Config(**content["config"])).to(device)
    model.load_state_dict(content["ema"])
    model.info = content["info"]
    return model.eval().requires_grad_(False)


def data_of(info, path, device="cpu", data=None, load=None):
    """The Data named in a checkpoint's info, found where they were or beside it; or data, if given.

    data: a Data, a name or a path. load: load_data, or a function like it that caches its results.
    """
    if data is None:
        name = str(info.get("data_arg", "unknown"))
        beside = str(Path(path).parent / Path(name).name)      # a folder may have moved with them
        places = [place for place in (name, beside) if place in DATA_SETS or os.path.exists(place)]
        if not places:
            raise FileNotFoundError(f"data of '{path}' not found: neither '{name}' nor '{beside}'. "
                                    "Pass --data and their path.")
        data = places[0]

    # resized as they were then
    load = load or load_data
    try:
        if not isinstance(data, Data):
            data = load(data, device, info.get("image_size"), info.get("factor_sizes"))
        return standardised_as(info, data)
    except (TypeError, ValueError) as error:                   # what info says may be damaged
        raise ValueError(f"data of '{path}': {error}") from None


def standardised_as(info, data):
    """Data whose own u is standardised by the mean and scale of the data that a model learned from.

    info: a checkpoint's. So another file's u, such as that of a test set, means what it meant.
    """
    names = "u_mean", "u_std"
    theirs, own = ([source.get(name) for name in names] for source in (info, data.source))
    if theirs == own or None in theirs + own or len(theirs[0]) != len(own[0]):
        return data
    (mean, std), (mean_then, std_then) = np.array([own, theirs])
    u = data.u.double().cpu().numpy() * std + mean             # as it is stored

    data = copy(data)
    data.u = torch.tensor((u - mean_then) / std_then).to(data.u)
    data.source = {**data.source, **dict(zip(names, theirs))}
    return data


def open_checkpoint(path, device="cpu", data=None, load=None):
    """(model, data): load_checkpoint's model and its data, see data_of. Warns if those differ."""
    model = load_checkpoint(path, device)
    data = data_of(model.info, path, device, data, load)
    if model.info.get("fingerprint", data.fingerprint) != data.fingerprint:
        warnings.warn(f"'{path}' was trained on {model.info['data']}, not on {data.name}.")
    return model, data


def pick_device(name=None, index=None):
    """The torch.device of a name, by default cuda where present; ValueError if that is unusable."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name, index) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).cpu()                    # the only sure way to know
        return device
    except Exception as error:         # torch raises many kinds here
        raise ValueError(f"--device {name} cannot be used: {in_one_line(error)}. Try --device "
                         "cpu.") from None


def read_number(path, word=None):
    """The whole number that follows a word in a file of the system; inf if there is none."""
    try:
        after = Path(path).read_text().split(word, 1)[-1]
        return int(after.split()[0])
    except (OSError, ValueError, IndexError):
        return math.inf


def check_memory(need, device):
    """MemoryError if need bytes do not fit on the device, as far as the system tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = 1024 * read_number("/proc/meminfo", "MemAvailable:")            # it counts in kB

        # the limit of a container, from cgroups of version 2 or 1; cached files do not count
        for limit, used in (("/sys/fs/cgroup/memory.max", "anon"),
                            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "total_rss")):
            in_use = read_number(Path(limit).with_name("memory.stat"), used)
            free = min(free, read_number(limit) - in_use)      # not where that is inf - inf
    if need > 0.9 * free:
        raise MemoryError(f"it needs {need / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB "
                          f"are free on {device}. Free some, or take less.")


# ---- Kinds of u, and the modulated draw ----

class ScalesU:
    """u of a modulated draw that tells the scale of each factor (--u var).

    Every draw and factor has a scale s, log-uniform in [u_scale, 1], and a centre m, here 0. A
    value g of the factor then has probability ∝ exp(-((g - m) / s)^2 / 2). To add a kind
    of u, enter a subclass in U_KINDS. n_factors: how many factors vary; n_u: how many columns the
    data's own u has.
    """

    tells_centres = False

    def __init__(self, n_factors, n_u, u_scale):
        self.n_factors = n_factors
        self.n_u = n_u
        self.u_scale = u_scale

    @property
    def width(self):
        """How many entries U a u has."""
        return 2 * self.n_factors if self.tells_centres else self.n_factors

    def draw(self, data, n, generator):
        """Rows (n,) and their u (n, U): log-scales, mapped to [-1, 1], then any centres."""
        of_s, of_m = torch.rand(2, n, len(data.sizes), generator=generator, device=data.device)
        log_s = of_s * math.log(self.u_scale)                                  # (n, K)
        m = 2 * of_m - 1 if self.tells_centres else torch.zeros_like(of_m)
        rows = data.modulate(log_s.exp(), m, generator)

        return rows, self.pack(log_s[:, data.varied], m[:, data.varied])

    def draw_held_out(self, data, n, generator):
        """The same for rows that training never sees, if this kind of u holds some out."""
        return self.draw(data, n, generator)

    def pack(self, log_scale, centre):
        """u (B, U) of log-scales, in [log u_scale, 0], and centres, (B, K) each.

        K: the factors that vary, in the order of data.varied. It inverts unpack: pack(**told)
        gives u again if told is unpack(u); a centre in told may be changed before.
        """
        scales = 1 - 2 * log_scale / math.log(self.u_scale)
        return torch.cat([scales, centre], dim=1) if self.tells_centres else scales

    def unpack(self, u):
        """{"log_scale": log s, "centre": m}, (B, K) each, of u (B, U)."""
        if type(self).draw is not ScalesU.draw:
            raise ValueError(f"prior 'known' cannot read u of {type(self).__name__}, whose draw is "
                             "its own: give it an unpack, or choose prior 'full'.")
        scales = u[:, :self.n_factors]
        centres = u[:, self.n_factors:] if self.tells_centres else torch.zeros_like(scales)
        return {"log_scale": 0.5 * (1 - scales) * math.log(self.u_scale), "centre": centres}


class CentresU(ScalesU):
    """u that also tells the centres, uniform in [-1, 1] (--u mean+var)."""

    tells_centres = True


class OwnU(ScalesU):
    """The data's own u: all rows but those held out are equally likely (--u own)."""

    @property
    def width(self):
        return self.n_u

    def draw(self, data, n, generator):
        return self.choose(data, data.trained, n, generator)

    def draw_held_out(self, data, n, generator):
        return self.choose(data, data.held_out, n, generator)

    def choose(self, data, rows, n, generator):
        """n of the rows, drawn with replacement, and their u."""
        chosen = torch.randint(len(rows), (n,), generator=generator, device=data.device)
        rows = rows[chosen]
        return rows, data.u[rows]


U_KINDS.update({"var": ScalesU, "mean+var": CentresU, "own": OwnU})


class Data:
    """Images on a device, by row, with their factors and u; it also draws rows for training.

    sizes: {factor's name: how many values, or these values, rising}; image_shape: (C, S, S), S a
    multiple of 16; images: function rows (B,) -> (B, C, S, S) in [-1, 1]; factors: (N, K) int64,
    the index of each image's values, or None for the full factor grid, row-major; u: (N, U), the
    data's own, or None; note: how the images were read. A Data can be pickled if images can.
    """

    def __init__(self, name, sizes, image_shape, images, device, factors=None, u=None,
                 fingerprint=None, note=""):
        self.name = name
        self.factor_names = tuple(sizes)
        self.values = [np.arange(v) if isinstance(v, int) else v for v in sizes.values()]
        self.factor_sizes = tuple(map(len, self.values))
        self.image_shape = image_shape
        self.images = images
        self.device = torch.device(device)
        self.fingerprint = fingerprint or f"{name} 1"          # raised when a replica changes
        self.note = note
        self.source = {}                                       # what load_data was given

        _, height, width = image_shape
        if height != width or height % 16 or not 0 < height < 65536:
            raise ValueError(f"images of {name} are {height} x {width} pixels; they must be "
                             "squares with a side that is a multiple of 16, below 65536.")

        # a row of the full grid has the number sum of index * stride
        self.sizes = torch.tensor(self.factor_sizes, dtype=torch.int64, device=device)
        self.strides = self.sizes.flip(0).cumprod(0).flip(0) // self.sizes
        self.varied = (self.sizes > 1).nonzero().flatten()     # the factors that u tells of
        most = max(self.factor_sizes, default=1)
        if most > 1000 or math.prod(self.factor_sizes) >= 2**63:
            self.varied = self.varied[:0]                      # too many values to modulate

        # the values of each factor, spread over [-1, 1]; V is the largest number of values
        value = torch.arange(most, device=device)                              # (V,)
        last = self.sizes[:, None] - 1                                         # (K, 1)
        self.grid = 2 * value / last.clamp(min=1) - 1                          # (K, V)
        self.grid[value > last] = math.inf                                     # absent values

        # rows, sorted by their number; a grid with gaps lacks some of these
        self.table = None
        if factors is None and u is not None and not sizes:
            factors = torch.zeros(len(u), 0, dtype=torch.int64)
        if factors is None:
            self.numbers = self.order = torch.arange(math.prod(self.factor_sizes), device=device)
        else:
            self.table = torch.as_tensor(factors, device=device)
            self.numbers, self.order = (self.table * self.strides).sum(dim=1).sort()
        u = torch.zeros(len(self), 0) if u is None else u
        self.u = torch.as_tensor(u, dtype=torch.float32, device=device)

        # rows that training by the data's own u never sees: 5 %, the same for every run
        n = len(self)
        order = torch.from_numpy(np.random.default_rng(0).permutation(n)).to(device)
        self.held_out, self.trained = order.tensor_split([min(max(n // 20, 64), 5000, n // 2)])

    def __len__(self):
        return len(self.order)

    def factors(self, rows):
        """(B, K) int64, the index of each factor's value, for rows (B,)."""
        if self.table is None:
            return rows[:, None] // self.strides % self.sizes
        return self.table[rows]

    def draw(self, n, generator, u="mean+var", u_scale=0.3, held_out=False):
        """Rows (n,) and their u (n, U), drawn as a kind of u says, see U_KINDS."""
        kind = U_KINDS[u](len(self.varied), self.u.shape[1], u_scale)
        draw = kind.draw_held_out if held_out else kind.draw
        rows, drawn = draw(self, n, generator)
        if drawn.shape != (n, kind.width):
            raise ValueError(f"u '{u}' has width {kind.width}, but its draw gave "
                             f"{tuple(drawn.shape)} for {n} rows.")
        return rows, drawn

    def modulate(self, s, m, generator):
        """Rows (n,) drawn with probability ∝ exp(-sum_k ((g_k - m_k) / s_k)^2 / 2); s, m: (n, K).

        That is the probability of a combination of values; its rows are equally likely. On the full
        grid every combination exists, and each factor is drawn by itself. On a grid with gaps the
        draw is exact for up to 2,000 combinations, each of which is weighed. If there are more,
        each factor in turn, in the columns' order, takes one of the values left: once the first
        factors have values, the rows left are those whose numbers lie in one interval [low, low +
        stride). Each value of the next factor is a part of that interval, and exists if two binary
        searches in the sorted numbers find a row in it. So a draw costs K rounds of searches, not N
        comparisons.
        """
        if self.table is not None and len(self.distinct) <= 2000:
            return self.modulate_at_once(s, m, generator)

        # the largest of logits plus Gumbel noise is a draw from their softmax
        distance = (self.grid - m[:, :, None]) / s[:, :, None]                 # (n, K, V)
        exponential = torch.empty_like(distance).exponential_(generator=generator)
        scores = -0.5 * distance.square() - exponential.log()
        if self.table is None:
            return (scores.argmax(dim=2) * self.strides).sum(dim=1)

        low = torch.zeros(len(scores), dtype=torch.int64, device=self.device)
        for k, size in enumerate(self.factor_sizes):
            # the edges of this factor's values within the interval, and how many rows lie between
            value = torch.arange(size + 1, device=self.device)
            edges = low[:, None] + self.strides[k] * value                     # (n, size + 1)
            n_rows = torch.searchsorted(self.numbers, edges).diff(dim=1)       # (n, size)

            left = scores[:, k, :size].masked_fill(n_rows == 0, -math.inf)
            low = low + left.argmax(dim=1) * self.strides[k]
        return self.rows_of(low, generator)

    @cached_property
    def distinct(self):
        """The numbers (G,) of the combinations of values that exist."""
        return self.numbers.unique()

    def modulate_at_once(self, s, m, generator):
        """The same, by the probability of each combination that exists."""
        index = self.distinct[:, None] // self.strides % self.sizes            # (G, K)
        g = self.grid.gather(1, index.T)                                       # (K, G)
        logits = (m / s**2) @ g - 0.5 * s**-2 @ g.square()                     # up to a constant
        edges = logits.softmax(dim=1).cumsum(dim=1)                            # (n, G)
        share = torch.rand(len(s), 1, generator=generator, device=self.device)
        chosen = torch.searchsorted(edges, share * edges[:, -1:])              # (n, 1)
        return self.rows_of(self.distinct[chosen[:, 0]], generator)

    def rows_of(self, numbers, generator):
        """One row for each number, (n,) both; all rows of a number are equally likely."""
        first = torch.searchsorted(self.numbers, numbers)
        last = torch.searchsorted(self.numbers, numbers + 1)
        share = torch.rand(len(numbers), generator=generator, device=self.device)
        chosen = first + (share * (last - first)).long()
        return self.order[chosen.minimum(last - 1)]            # share may round up to 1


# ---- Data: files ----

# The keys of a file, and what they hold; if several hold the same, the last one counts.
KEYS = {"imgs": "images",
        "images": "images",
        "latents_classes": "factors",
        "labels": "factors",
        "factors": "factors",
        "u": "u",
        "factor_names": "factor_names"}


def load_data(name="shapes3d", device="cpu", image_size=None, factor_sizes=None):
    """The Data of a name in DATA_SETS, or of a file, whose images are resized to image_size.

    image_size: if None, a file's images are resized to the next multiple of 16, a folder's pictures
    to 64. factor_sizes: how many values each factor has, if an .npz or .h5 file lists no factors
    but is their full grid, the last factor changing fastest. A file is the real 3dshapes.h5, the
    real dSprites .npz, or an .npz or .h5 of one's own (see check_arrays); a folder also works (see
    read_folder). Raises OSError, ValueError, MemoryError.
    """
    device = torch.device(device)
    if name in DATA_SETS:
        data = DATA_SETS[name](device)
    else:
        if not os.path.exists(name):
            raise FileNotFoundError(f"data not found: '{name}'. Pass {', '.join(DATA_SETS)}, or "
                                    "the path of an .h5 or .npz file, or of a folder of pictures.")
        if os.path.isdir(name):
            arrays = read_folder(name, device, image_size or 64)
        else:
            arrays = read_file(name, device)
            if factor_sizes:
                n = math.prod(factor_sizes)
                if arrays["images"].shape[:1] != (n,):
                    raise ValueError(f"'{name}': --factor-sizes {factor_sizes} are of {n} images, "
                                     f"but images are {arrays['images'].shape}. Pass sizes whose "
                                     "product is the number of images, the last changing fastest.")
                arrays.setdefault("factors", np.argwhere(np.ones(factor_sizes)))
        data = check_arrays(arrays, name, device, image_size)
        name = os.path.abspath(name)

    data.source.update(data_arg=name, image_size=data.image_shape[1],
                       factor_sizes=tuple(factor_sizes) if factor_sizes else None)
    return data


def read_file(path, device):
    """{what KEYS name: array} of an .h5 or .npz file. Raises OSError, ValueError, MemoryError."""
    open(path, "rb").close()                                   # an OSError says what forbids it
    try:
        if zipfile.is_zipfile(path):                           # the content decides, not the name
            file = np.load(path, allow_pickle=False)
            sizes = [entry.file_size for entry in file.zip.infolist()]
        else:
            import h5py
            file = h5py.File(path)
            sizes = [getattr(entry, "nbytes", 0) for entry in file.values()]

        arrays = {}
        with file:
            check_memory(sum(sizes), device)                   # before anything large is read
            held = ", ".join(file)
            for key, name in KEYS.items():
                if key in file:
                    arrays[name] = np.asarray(file[key])
    except ImportError as error:
        raise ImportError(f"'{path}' cannot be used as data: {error}") from None
    except MemoryError as error:       # NumPy's own kind takes other arguments
        raise MemoryError(f"'{path}' cannot be used as data: {in_one_line(error)}") from None
    except Exception:                  # zip, h5 and numpy raise many kinds
        raise ValueError(f"'{path}' cannot be used as data: it is not an .npz or .h5 file of "
                         "arrays of numbers, or is damaged. Save it with np.savez.") from None
    if "images" not in arrays:
        raise ValueError(f"'{path}' has no array images, but {held or 'nothing'}. Save what it has "
                         "under the names images, factors, factor_names and u with np.savez.")
    return arrays


def read_folder(folder, device, side):
    """{what KEYS name: array} of a folder: one .csv, and the pictures that its column file names.

    The other columns are numbers: u and u:NAME are u, all others are factors. Otherwise ValueError.
    """
    tables = list(Path(folder).glob("[!.]*.csv"))              # hidden files are not tables
    if len(tables) != 1:
        raise ValueError(f"'{folder}' cannot be used as data: a folder must hold one .csv, but "
                         f"here are {len(tables)}.")
    names, files, numbers = read_table(tables[0])
    if len(set(files)) < len(files):
        warnings.warn(f"'{tables[0]}' lists {len(files)} pictures, of which only {len(set(files))} "
                      "differ.")
    check_memory(6 * len(files) * side**2, device)
    images = [read_picture(Path(folder, name), side)
              for name in progress(files, "reading pictures")]

    is_u = np.array([name.split(":")[0] == "u" for name in names], bool)
    return {"images": np.stack(images),
            "factors": numbers[:, ~is_u],
            "factor_names": np.array(names, str)[~is_u],
            "u": numbers[:, is_u]}


def read_table(path):
    """Names of a .csv's columns but file (C,), its files (N,), and its numbers (N, C), an array.

    The file is as Excel saves it: cells are separated by commas, tabs or semicolons, and in the
    last case numbers have decimal commas; the text is UTF-8, UTF-16 or cp1252. ValueError, with the
    line that is wrong.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith(b"\xff\xfe") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")

    lines = text.splitlines() or [""]
    separator = max(",;\t", key=lines[0].count)
    decimal = "," if separator == ";" else "."
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    rows = filter(any, reader)                                 # skip empty rows
    files, numbers = [], []
    try:
        names = next(rows, [])
        column = names.index("file")
        if "" in names:
            raise ValueError("a column has no name: in pandas save by to_csv(..., index=False)")
        for row in rows:
            if len(row) != len(names):
                raise ValueError(f"it has {len(row)} cells, not {len(names)}")
            files.append(row.pop(column))
            numbers.append([float(cell.replace(decimal, ".")) for cell in row])
        if not files:
            raise ValueError("no other line follows")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"'{path}', line {reader.line_num}: {error}. The file needs the columns' "
                         "names, one of them file, then a row for each picture: its file, and "
                         "finite numbers. For words write np.unique(words, return_inverse=True)"
                         "[1].") from None
    names.remove("file")
    return names, files, np.array(numbers)


def read_picture(path, side):
    """The middle square of a picture, (side, side, 3) uint8; ValueError if it cannot be read."""
    from PIL import Image, ImageOps
    try:
        file = Image.open(path)
        animated = getattr(file, "is_animated", False) and file.format != "MPO"
        picture = ImageOps.exif_transpose(file)                # turned the way the camera was held
    except Exception as error:         # each format raises kinds of its own
        raise ValueError(f"'{path}' is not a picture that can be read: {error}.") from None
    if animated or picture.mode in ("I", "F"):
        raise ValueError(f"'{path}' has several frames, or 32 bits a pixel; it must be one frame "
                         "of 8 or 16 bits. Save it as a PNG.")

    # reduce 16 bits to 8, and put what is transparent on white
    if "16" in picture.mode:
        picture = Image.fromarray((np.array(picture) // 257).astype(np.uint8))
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.array(ImageOps.fit(picture.convert("RGB"), (side, side)))


def look_up(rows, pixels, white, side):
    """Images (B, C, side, side) in [-1, 1] of stored pixels (N, H, W, C) in [0, white]."""
    x = pixels[rows].permute(0, 3, 1, 2).float() * (2 / white) - 1
    if x.shape[-1] != side:
        x = F.interpolate(x, side, mode="bilinear", antialias=True)
    return x


def check_arrays(arrays, path, device, image_size):
    """The Data of stored arrays; ValueError, with a remedy, if they are not as they should be.

    images: (N, H, W), or (N, H, W, C) with 1 or 3 channels, in 0..255 or 0..1; the others may be
    absent: factors (N, K), any numbers; factor_names (K,); u (N, U), one's own.
    """
    images = arrays["images"]
    found = f"images are {images.shape} {images.dtype}"
    if images.ndim == 3:
        images = images[..., None]
    fits = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] in (1, 3)
    if not fits or not images.size or images.dtype.kind not in "buif":
        raise ValueError(f"'{path}': {found}; they must be numbers, (N, H, H) or (N, H, H, C) with "
                         "1 or 3 channels. Crop them, or drop channels: images[..., :3]; or put "
                         "channels last: images.transpose(0, 2, 3, 1).")

    # pixels as they are stored; the brightest tells what is white
    low, high = images.min(), images.max()
    if not 0 <= low <= high <= 255:                            # False for NaN, too
        raise ValueError(f"'{path}': {found}, from {low} to {high}; they must be in 0 to 1 or 0 to "
                         "255. Scale them.")
    white = 1 if high <= 1 else 255
    kind = np.float32 if images.dtype.kind == "f" else np.uint8
    pixels = torch.from_numpy(images.astype(kind, copy=False)).to(device)

    n, height, _, channels = images.shape
    side = image_size or -height // 16 * -16                   # the next multiple of 16
    note = f"{found}, from {low} to {high}, {white} is white; used at {side} x {side}"

    # any numbers become the indices 0, 1, ... of a factor's values
    table = check_table(arrays, "factors", n, path)
    values = []
    factors = np.zeros(table.shape, np.int64)
    for k, column in enumerate(table.T):
        distinct, factors[:, k] = np.unique(column, return_inverse=True)
        values.append(distinct)

    # a known data set is recognised by its sizes
    names = [f"factor {k}" for k in range(len(values))]
    for known in (SHAPES3D, DSPRITES):
        if list(known.values()) == list(map(len, values)):
            names = list(known)
    if "factor_names" in arrays:
        names = [text.decode(errors="replace") if isinstance(text, bytes) else str(text)
                 for text in arrays["factor_names"].flat]
    named = dict(zip(names, values))
    if not len(named) == len(names) == len(values):
        raise ValueError(f"'{path}': factor_names are {names}; they must be {len(values)} "
                         "different names.")

    warn_of_factors(named, factors)

    own_u = check_table(arrays, "u", n, path)
    u = own_u.astype(float)                                    # half precision would overflow
    mean = u.mean(axis=0)
    std = u.std(axis=0)
    std[std <= 1e-9 * abs(u).max(axis=0)] = 1                  # a column that does not vary
    mark = fingerprint(images[::max(1, n // 256)], table, own_u)
    data = Data(f"{Path(path).resolve().name} {mark[:8]}", named, (channels, side, side),
                partial(look_up, pixels=pixels, white=white, side=side), device,
                factors, (u - mean) / std, mark, note)
    data.source.update(u_mean=mean.tolist(), u_std=std.tolist())
    return data


def warn_of_factors(named, factors):
    """Warn about factors {name: values} that look like identifiers, or whose columns of indices
    (N, K) are copies."""
    n = len(factors)
    for k, (name, values) in enumerate(named.items()):
        whole = (values % 1 == 0).all()                        # a measurement has fractions
        if whole and len(values) > min(0.9 * n, 1000):
            warnings.warn(f"factor '{name}' has {len(values):,} values in {n:,} rows: leave it out "
                          "if it is an identifier.")
        first = (factors == factors[:, [k]]).all(axis=0).argmax()              # first equal column
        if first < k and len(values) > 1:
            warnings.warn(f"factor '{name}' is a copy of factor '{list(named)[first]}': leave one "
                          "out.")


def check_table(arrays, name, n, path):
    """A stored array as (N, columns), 0 columns if absent; ValueError if not finite numbers."""
    table = arrays.get(name, np.zeros((n, 0)))
    if table.ndim == 1:
        table = table[:, None]
    fits = table.ndim == 2 and len(table) == n and table.dtype.kind in "buif"
    if not fits:
        raise ValueError(f"'{path}': {name} are {table.shape} {table.dtype}; wanted is a row of "
                         f"numbers for each of {n} images. For words write "
                         "np.unique(words, return_inverse=True)[1].")
    for row, column in np.argwhere(~np.isfinite(table))[:1]:   # the first that is not
        raise ValueError(f"'{path}': {name}[{row}, {column}] is {table[row, column]}; wanted are "
                         "finite numbers. Leave that row out of all arrays.")
    return table


def fingerprint(*arrays):
    """SHA-256 of arrays: their shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


# ---- Scripts: errors, bars, folders, tables and pictures ----

def in_one_line(error):
    """What an error says, in at most 400 characters; if that is nothing, its kind."""
    text = " ".join(str(error).split())[:400]
    if isinstance(error, KeyboardInterrupt):
        return text or "stopped"
    return text or type(error).__name__


@contextmanager
def script(name, less):
    """A context for a script's main: wrong input, Ctrl-C and full memory end it in one line.

    Warnings become plain lines, each told once. less: the flag that asks for less memory.
    """
    told = set()

    def tell(message, *_, **__):
        text = in_one_line(message)
        if text not in told:
            print(f"warning: {text}", file=sys.stderr)
        told.add(text)

    if hasattr(sys.stdout, "reconfigure"):                     # notebooks have one of their own
        sys.stdout.reconfigure(errors="replace")               # a terminal may lack "²"
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        try:
            yield
        except (KeyboardInterrupt, ImportError, OSError, ValueError, MemoryError,
                RuntimeError) as error:
            text = in_one_line(error)
            if "allocate" in text or text == "MemoryError":    # torch and NumPy say allocate
                text = f"out of memory: {text}. Free some, or try a smaller {less}."
            elif isinstance(error, RuntimeError) or sys.flags.dev_mode:
                raise                                          # python -X dev: with a traceback
            if isinstance(error, ImportError):
                text += ". Try: pip install -r requirements.txt"
            sys.exit(f"{name}: {text}")


def use_free_cores():
    """Let torch have as many threads as cores are free, unless OMP_NUM_THREADS says how many.

    Threads wait for each other: one that shares its core with another program slows all of them.
    """
    if "OMP_NUM_THREADS" in os.environ or not os.path.exists("/proc/stat"):
        return

    def ticks():
        # user, nice, system, idle, waiting, ... of all cores, since they started
        counts = Path("/proc/stat").read_text().split()[1:9]
        return np.array(counts, int)

    before = ticks()
    time.sleep(0.3)
    passed = ticks() - before
    free = passed[3:5].sum() / max(1, passed.sum())

    usual = torch.get_num_threads()
    threads = min(usual, max(1, round(free * os.cpu_count())))
    if threads < usual:
        torch.set_num_threads(threads)
        print(f"Other programs are busy, so torch uses {threads} of {usual} threads. Set "
              "OMP_NUM_THREADS to change this.", file=sys.stderr)


def user_path(text):
    """The Path of a flag's text, with ~ expanded, which the shell leaves as it is in --out=~/x."""
    return Path(text).expanduser()


class Lines:
    """A file for tqdm that prints what it is given as plain lines."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)


def progress(iterable, desc=None, **options):
    """tqdm's bar in a terminal; elsewhere a plain line every half minute. Rank 0 alone shows it."""
    from tqdm import tqdm
    options["disable"] = os.environ.get("RANK", "0") != "0"
    if not sys.stderr.isatty():
        options.update(file=Lines(), mininterval=30, miniters=1, delay=30,
                       bar_format="{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}")
    return tqdm(iterable, desc, **options)


def try_folder(folder):
    """Make a folder; OSError if it, or a file in it, cannot be made."""
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def table(columns):
    """A Markdown table, padded to be readable as it is; floats have three digits, None is "-"."""
    def text(value):
        if isinstance(value, float):
            return f"{value:.3f}"
        return "-" if value is None else str(value)

    padded = []
    for column in columns:
        texts = list(map(text, column))
        width = max(map(len, texts))
        texts.insert(1, "-" * width)                           # below the title
        padded.append([text.ljust(width) for text in texts])
    rows = [f"| {' | '.join(row)} |\n" for row in zip(*padded)]
    return "".join(rows)


@contextmanager
def drawing(path):
    """A context for drawing a picture: if that fails, a line says that path is missing, no more."""
    path = Path(path)
    try:
        yield path
    except Exception as error:         # a full disk, or whatever matplotlib raises
        path.unlink(missing_ok=True)                           # a part of it, or an older one
        print(f"{path} is missing: {in_one_line(error)}", file=sys.stderr)


def panels(items, size=(6, 1.6)):
    """A figure, and (item, its axis) for each item; axes of this size in inches form a column."""
    from matplotlib.figure import Figure
    n = len(items)
    width, height = size
    figure = Figure((width, n * height), dpi=150, layout="constrained")
    axes = figure.subplots(n, squeeze=False)[:, 0]
    return figure, list(zip(items, axes))


def to_pixels(images):
    """Pixels (N, H, W, C) uint8, an array, of images (N, C, H, W) in [-1, 1]."""
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_grid(file, images, rows, columns):
    """Write images (N, C, H, W) in [-1, 1] as a PNG grid with these labels of rows, columns."""
    from matplotlib.figure import Figure
    try:
        from torchvision.utils import make_grid
    except (ImportError, RuntimeError) as error:               # it was built for another torch
        raise ImportError(f"torchvision does not fit torch {torch.__version__}: {error}. Try: pip "
                          "install -r requirements.txt") from None
    n_rows = len(rows)
    n_columns = len(columns)
    padded = F.pad(images, [1] * 4, value=1)                   # half a white gap around each
    [grid] = to_pixels(make_grid(padded, n_columns, padding=0)[None])          # (.., .., 3)

    # zoom by a whole number, so that all pixels are shown equally large
    zoom = max(1, round(128 / images.shape[-1]))
    height, width, _ = grid.shape
    figure = Figure((zoom * width / 100, zoom * height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1), frame_on=False)
    axis.imshow(grid, interpolation="nearest", extent=(0, n_columns, n_rows, 0))

    # a label at the middle of each row and column
    axis.set_xticks(np.arange(n_columns) + 0.5, columns, fontsize=12)
    axis.set_yticks(np.arange(n_rows) + 0.5, rows, fontsize=12)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    figure.savefig(file, bbox_inches="tight")


# ---- Appendix: a replica of 3D Shapes ----

SHAPES3D = {"floor hue": 10, "wall hue": 10, "object hue": 10, "scale": 8, "shape": 4,
            "orientation": 15}

# Cube, cylinder, sphere, capsule: within radius of a core. (half width, half height, radius)
SHAPES = ((0.46, 0.46, 0.03),
          (0.46, 0.46, 0.03),
          (0.0, 0.0, 0.56),
          (0.0, 0.24, 0.40))
LIGHT = torch.tensor([-0.34, -0.49, 0.80])[:, None]            # unit vector towards the light


def grid_factors(rows, sizes):
    """(B, K), the index of each factor's value in rows (B,) of a full grid {name: size}."""
    # divide by plain numbers: a tensor made here would be copied to the device at every step
    stride = math.prod(sizes.values())
    columns = []
    for size in sizes.values():
        stride //= size
        columns.append(rows // stride % size)
    return torch.stack(columns, dim=1)


def load_shapes3d(device):
    """The embedded replica of 3D Shapes (Burgess & Kim 2018): 480,000 images, none stored."""
    planes = render_shapes3d(device)                    # (480, 4, 64, 64) uint8

    # ten hues, HSV to RGB
    hue = 0.6 * torch.arange(10)[:, None]                      # (10, 1), in sixths of the circle
    distance = (hue + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3   # of red, green and blue, (10, 3)
    palette = (distance.abs() - 1).clamp(0.04, 1).to(device)

    compose = partial(compose_shapes3d, planes=planes, palette=palette)
    return Data("shapes3d replica", SHAPES3D, (3, 64, 64), compose, device)


def compose_shapes3d(rows, planes, palette):
    """Images (B, 3, 64, 64) of rows (B,) of the grid: shadings of three parts times their hues."""
    hues = grid_factors(rows, SHAPES3D)[:, :3]
    colours = palette[hues]                                    # (B, 3, 3): floor, wall, object
    shading = planes[rows % 480].flatten(2).float() / 255                      # (B, 4, H W)
    x = torch.bmm(colours.transpose(1, 2), shading[:, :3])                     # (B, 3, H W)
    x = (x + shading[:, 3:]).clamp(0, 1) * 2 - 1                               # white highlights
    return x.unflatten(2, planes.shape[2:])


def render_shapes3d(device):
    """Shade of floor, walls and object, and white light, (480, 4, 64, 64) uint8.

    480 geometries: 8 scales, 4 shapes, 15 orientations, row-major. Sphere tracing (Hart 1996) at
    twice the size, with A = 15 angles and P rays per image. The unit is nearly an object's height.
    """
    # the empty room
    angles = torch.linspace(-30, 30, 15).deg2rad()
    eyes, rays = camera_rays(angles, 128)                      # (3, A, 1), (3, A, P)
    point, on_floor, room = render_room(eyes, rays)
    dark = torch.zeros_like(room)
    empty = torch.stack([room * on_floor, room * ~on_floor, dark, dark])       # (4, A, P)

    # the camera moves instead of the object: it is seen at one size from 8 distances
    scale = torch.linspace(0.75, 1.25, 8)[:, None, None]
    ray = rays[:, None].expand(-1, 8, -1, -1)                  # (3, 8, A, P)
    planes = []
    for shape, (_, height, radius) in enumerate(SHAPES):
        centre = torch.tensor([0, 0, height + radius])[:, None, None, None]
        p = point[:, None] / scale - centre
        eye = eyes[:, None] / scale - centre
        image = empty[:, None].repeat(1, 8, 1, 1)              # (4, 8, A, P)

        # its shadow, where the floor is near
        near = on_floor & ((p * p).sum(dim=0) < 2.2 ** 2)
        image[0, near] *= floor_light(p[:, near], shape)

        # the object, where rays pass near its centre
        along = (eye * ray).sum(dim=0)
        squared_miss = (eye * eye).sum(dim=0) - along ** 2
        near = squared_miss < 0.85 ** 2
        eye = eye.expand_as(ray)
        hit, shade, shine = render_object(eye[:, near], ray[:, near], shape)
        dark = torch.zeros_like(shade)
        front = torch.stack([dark, dark, shade, shine])
        image[:, near] = torch.where(hit, front, image[:, near])

        # average four rays per pixel
        image = image.permute(1, 2, 0, 3).unflatten(3, (128, 128))             # (8, A, 4, ...)
        image = F.avg_pool2d(image.flatten(0, 1), 2)                           # (8 A, 4, ...)
        image = image.clamp(0, 1).mul(255).round().byte()
        planes.append(image.unflatten(0, (8, 15)))
    return torch.stack(planes, dim=1).flatten(0, 2).to(device)


def camera_rays(angles, side):
    """Eyes (3, A, 1) and unit rays (3, A, side²) of cameras around the object at A angles."""
    radius, height, pitch = 2.5, 1.62, 0.41
    view = 0.53                                                # tangent of half the field of view
    sin = angles.sin()[:, None]
    cos = angles.cos()[:, None]

    grid = ((torch.arange(side) + 0.5) / side * 2 - 1) * view
    down, right = torch.cartesian_prod(grid, grid).T
    ahead = math.cos(pitch) - down * math.sin(pitch)           # along the floor
    up = -math.sin(pitch) - down * math.cos(pitch)

    rays = torch.stack([right * cos - ahead * sin,
                        right * sin + ahead * cos,
                        up.expand(len(angles), -1)])
    eyes = torch.stack([radius * sin,
                        -radius * cos,
                        torch.full_like(sin, height)])
    return eyes, rays / length(rays)


def render_room(eyes, rays):
    """Points (3, A, P) where rays meet the empty room, whether on the floor, and their shade."""
    half = 2.7                                                 # half the room's width

    # how far along each ray the walls and the floor are
    wall = half * rays[:2].sign()                              # the walls ahead of the ray
    t_wall, axis = ((wall - eyes[:2]) / rays[:2]).min(dim=0)
    t_floor = torch.where(rays[2] < 0, -eyes[2] / rays[2], math.inf)
    point = eyes + rays * torch.minimum(t_wall, t_floor)
    on_floor = t_floor < t_wall

    side = torch.where(rays[0] > 0, 0.74, 0.60)                # the right wall is lit, the left not
    shade = torch.where(axis == 1, 0.86, side)
    shade = torch.where(on_floor, 0.90, shade)

    gaps = torch.cat([half - point[:2].abs(), point[2:]])      # to walls and floor
    second = gaps.sort(dim=0).values[1]                        # 0 where two planes meet: darker
    return point, on_floor, shade * (1 - 0.22 * (-second / 0.35).exp())


def floor_light(p, shape):
    """Share of light (M) that reaches floor points p (3, M): soft shadow times contact."""
    seen = torch.ones(p.shape[1])
    for t in torch.linspace(0.05, 2.0, 12):
        distance, _ = shape_distance(p + t * LIGHT, shape)
        seen = torch.minimum(seen, distance / (0.3 * t))
    seen = seen.clamp(min=0)
    smooth = seen * seen * (3 - 2 * seen)

    distance, _ = shape_distance(p, shape)
    contact = (distance / 0.45).clamp(0, 1)
    return (0.55 + 0.45 * smooth) * (0.75 + 0.25 * contact.sqrt())


def render_object(eye, ray, shape):
    """Whether rays (3, M) from eye (3, M) meet the shape, its shade and its highlight (M)."""
    p = eye - ray * ((eye * ray).sum(dim=0) + 0.85)            # enter the bounding sphere
    for _ in range(28):
        distance, _ = shape_distance(p, shape)
        p = p + ray * distance
    gap, normal = shape_distance(p, shape)
    normal = normal / length(normal)

    diffuse = (normal * LIGHT).sum(dim=0).clamp(min=0)
    shade = 0.42 + 0.52 * diffuse + 0.10 * normal[2]
    half = (LIGHT - ray) / length(LIGHT - ray)                 # Blinn's half vector
    shine = (normal * half).sum(dim=0).clamp(min=0) ** 60
    return gap < 0.01, shade, 0.55 * shine


def shape_distance(p, shape):
    """Signed distance (...) of points p (3, ...) to the shape, and a vector along its normal."""
    width, height, radius = SHAPES[shape]
    flat = p[:2]
    if shape == 0:                                             # a cube's core is square
        core = flat.clamp(-width, width)
    else:
        shrink = width / length(flat).clamp(min=1e-6)
        core = flat * shrink.clamp(max=1)
    offset = p - torch.cat([core, p[2:].clamp(-height, height)])
    return length(offset) - radius, offset


def length(v):
    """Lengths (...) of vectors (3, ...)."""
    return (v * v).sum(dim=0).sqrt()


# ---- Appendix: a replica of dSprites ----

DSPRITES = {"colour": 1, "shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}

# Half width, half height, and the bend, which pulls an ellipse's sides up to make a heart.
SPRITES = ((9.5, 9.5, 0.0),
           (12.0, 7.0, 0.0),
           (11.0, 9.0, 0.7))


def load_dsprites(device):
    """The embedded replica of dSprites (Matthey et al. 2017): 737,280 images, only -1 and 1.

    Shapes are square, ellipse and heart; orientation 39 equals 0; no sprite leaves the image.
    """
    compose = partial(compose_dsprites, sprites=torch.tensor(SPRITES, device=device))
    return Data("dsprites replica", DSPRITES, (1, 64, 64), compose, device)


def compose_dsprites(rows, sprites):
    """Images (B, 1, 64, 64) of rows (B,) of the grid: pixels in a moved, turned, grown sprite."""
    pixel = torch.arange(64, device=rows.device)
    factors = grid_factors(rows, DSPRITES)[:, :, None, None]   # (B, 6, 1, 1)
    _, shape, scale, turn, x, y = factors.unbind(dim=1)
    width, height, bend = sprites[shape].unbind(dim=-1)
    grow = 0.5 + scale / 10
    angle = turn % 39 * (2 * math.pi / 39)
    cos = angle.cos() / grow
    sin = angle.sin() / grow

    # pixels from the sprite's centre, then along its own axes
    right = pixel - 16 - x
    up = 16 + y - pixel[:, None]
    a = right * (cos / width) + up * (sin / width)         # (B, 64, 64)
    b = up * (cos / height) - right * (sin / height)

    square = torch.maximum(a.abs(), b.abs())
    heart = b - bend * (a.abs() - 0.16)
    inside = torch.where(shape == 0, square, a * a + heart * heart) < 1
    return inside[:, None].float() * 2 - 1


DATA_SETS.update(shapes3d=load_shapes3d, dsprites=load_dsprites)
