# SPDX-License-Identifier: MIT
"""iDiff: an identifiable VAE joined with a score-based diffusion model, in plain PyTorch.

An encoder q(z|x) turns an image into latents z; a prior p(z|u) ties each latent to what an
auxiliary variable u says of the image's generative factors; a decoder p(x|z) and a VP-SDE
diffusion U-Net, both conditioned on z, turn latents back into images. Read it downwards:

    Config                      what changes a training's numbers, each a flag of train.py
    Encoder, Prior, Decoder     the iVAE of Khemakhem et al. 2020 (a VAE where u says nothing)
    ScoreUNet                   estimates the noise, v or the image; t and z modulate it
    VPSDE, SAMPLERS, invert     the diffusion process of Song et al. 2021 and its solvers
    losses                      the terms of Eq. 2, whose weighted sum train.py minimises; Eq. 3
    IDiff, load_checkpoint      the model: encode, decode, sample
    load_data, Data             3D Shapes, dSprites, your own images; the modulated draw of x and u

Equations are those of Kühne & Zemann (2024); their Eq. 1, MIG, is in evaluate.py. Denoising and
reconstruction losses are means over batch, channels and pixels; KL is a sum over latents, a mean
over the batch. Shape letters: B batch, C image channels, H W pixels, F features, D latents, U
entries of u, E embedding, K factors, N images, S sampler steps. Images lie in [-1, 1].
"""
import json
import math
import os
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CHECKPOINT_FORMAT = 2                                                  # raised when files change

# ---- Configuration ----
def option(default, help, choices=None, least=0, below=math.inf):
    """A dataclass field, also a flag with this help; of choices, or in [least, below)."""
    return field(default=default, metadata={"help": help, "choices": choices,
                                            "least": least, "below": below})

@dataclass(frozen=True)
class Config:
    """What changes the numbers: data shape, model, SDE, loss weights, optimiser, seed."""
    model: str = option("idiff", "VAE; VAE with p(z|u); that and a U-Net", ("vae", "ivae", "idiff"))
    latent_dim: int = option(6, "number of latents D", least=1)
    latent: str = option("gaussian", "kind of latents; categorical ones by Gumbel-softmax, or "
                         "straight-through", ("gaussian", "gumbel", "st"))
    categories: int = option(16, "categories L of each categorical latent", least=2)
    prior: str = option("known", "p(z|u): read off u; a net per latent; one net of all u",
                        ("known", "diagonal", "full"))
    u: str = option("mean+var", "what u modulates of each factor", ("var", "mean+var"))
    u_scale: float = option(0.3, "smallest scale s_k of a factor", least=1e-3, below=1)
    kl: float = option(1e-4, "lambda_KL, weight of KL(q(z|x) || p(z|u)) in nats per image")
    rec: float = option(0.25, "lambda_rec, weight of the decoder's mean squared error")
    kl_mean: float = option(5e-2, "further weight of KL's mean term, which ties mu_q to mu_p")
    kl_balance: float = option(0.5, "share of KL's gradient that goes to p(z|u)", below=1)
    kl_reverse: float = option(0.0, "weight of KL(p(z|u) || q(z|x)), as a multiple of KL's own")
    kl_start: float = option(0.0, "KL weight at step 0, if above --kl > 0, to which it falls")
    predict: str = option("x", "U-Net's output; v is alpha eps - sigma x", ("eps", "v", "x"))
    condition: str = option("z+decoder", "U-Net sees z, or its image too", ("z", "z+decoder"))
    weight: str = option("x", "whose squared error is the loss; eps in Eq. 3", ("eps", "v", "x"))
    width: int = option(32, "channels of encoder and decoder, finest level", least=1)
    unet_width: int = option(32, "channels of the U-Net, finest level", least=8)
    patch: int = option(4, "side in pixels of the space-to-depth stem", (1, 2, 4))
    batch_size: int = option(64, "images per step", least=1)
    rec_images: int = option(32, "images of each batch in the decoder's loss, 0 for all")
    ddpm_images: int = option(24, "images of each batch that the U-Net sees, 0 for all")
    epochs: float = option(0.4, "length in epochs of 480,000 draws")
    steps: int = option(0, "length in optimiser steps, 0 for what --epochs says")
    lr: float = option(2e-3, "peak learning rate of AdamW")
    schedule: str = option("cosine", "learning rate after warm-up", ("constant", "cosine"))
    clip: float = option(1.0, "largest norm of the gradient", least=1e-6)
    ema: float = option(0.998, "decay per step of the averaged weights", below=1)
    precision: str = option("float32", "arithmetic", ("float32", "bfloat16"))
    seed: int = option(0, "seed of weights, data and noise", below=2**62)
    image_size: int = option(64, "", least=16)
    image_channels: int = option(3, "", least=1)
    n_factors: int = option(6, "", least=1)

    def __post_init__(self):
        for f in fields(self):
            value, (_, choices, least, below) = getattr(self, f.name), f.metadata.values()
            wanted = f"one of {choices}" if choices else f"{f.type.__name__} in [{least}, {below})"
            if type(value) not in ((int, float) if f.type is float else (f.type,)) or not (
                    value in choices if choices else least <= value < below):
                raise ValueError(f"{f.name} must be {wanted}, got {value!r}.")
        if self.unet_width % 8 or self.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {self.image_size}, and "
                             f"unet_width one of 8, got {self.unet_width}.")
    @property
    def z_dim(self):                     # numbers that decoder and U-Net see of z: D, or D L
        return self.latent_dim * (1 if self.latent == "gaussian" else self.categories)
    @property
    def halvings(self):                  # from the stem's resolution to image_size / 16
        return int(math.log2(16 // self.patch))

# ---- iVAE: encoder, conditional prior, decoder ----
class Encoder(nn.Module):
    """q(z|x): (B, C, H, W) -> mean and log-variance of z, (B, D) each, float32; or, if latents are
    categorical, their logits (B, D, L) alone, a tuple as well. Never sees u."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, w, side = cfg, cfg.width, cfg.image_size // 16
        layers = [nn.PixelUnshuffle(cfg.patch),
                  nn.Conv2d(cfg.image_channels * cfg.patch**2, w, 3, padding=1), nn.SiLU()]
        for i in range(cfg.halvings):
            layers += [nn.Conv2d(2 * w if i else w, 2 * w, 3, 2, 1), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * w * side**2, 256), nn.SiLU(),
                                 nn.Linear(256, max(2 * cfg.latent_dim, cfg.z_dim)))  # L >= 2

    def forward(self, x):
        h, d = self.net(x).float(), self.cfg.latent_dim                # h: (B, 2 D) or (B, D L)
        if self.cfg.latent == "gaussian":
            return h[:, :d], 4 - F.softplus(4 - h[:, d:])              # below 4, lest exp overflow
        return h.unflatten(1, (d, -1)),

def fourier(z):
    """z (B, D), its sines and cosines at 1/2, 1 and 2 periods a unit: (B, 7 D). Hues vary fast."""
    angle = (z[:, :, None] * math.pi * 2 ** torch.arange(3, device=z.device)).flatten(1)
    return torch.cat([z, angle.sin(), angle.cos()], dim=1)

class Head(nn.Module):
    """Features (B, F, H / patch, W / patch), emb (B, E) and extra channels -> (B, C, H, W).
    emb sets the weights that mix full-resolution channels: a colour multiplies a shading."""
    def __init__(self, c_in, c_extra, c_out, c_emb, patch):
        super().__init__()
        self.patch, self.conv = patch, nn.Conv2d(c_in, 8 * patch**2, 3, padding=1)
        self.full = nn.Conv2d(8 + c_extra, 8 + c_extra, 3, padding=1)  # so no patch borders show
        self.mix = nn.Linear(c_emb, c_out * (8 + c_extra))

    def forward(self, h, emb, *extra):
        h = torch.cat([F.silu(F.pixel_shuffle(self.conv(h), self.patch)), *extra], 1)
        h = h + self.full(h)                                           # (B, 8 + extra, H, W)
        weight = self.mix(emb).unflatten(1, (-1, h.shape[1]))          # (B, C, 8 + extra)
        return torch.bmm(weight, h.flatten(2)).unflatten(2, h.shape[2:]).float()

class Decoder(nn.Module):
    """p(x|z): z (B, D), or one-hot codes (B, D L), -> reconstruction (B, C, H, W)."""
    def __init__(self, cfg):
        super().__init__()
        w, side = cfg.width, cfg.image_size // 16
        self.latent = nn.Sequential(nn.Linear(7 * cfg.z_dim, 256), nn.SiLU(),
                                    nn.Linear(256, 256), nn.SiLU())
        layers = [nn.Linear(256, 2 * w * side**2), nn.SiLU(), nn.Unflatten(1, (2 * w, side, side))]
        for i in range(cfg.halvings):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(w if i else 2 * w, w, 3, padding=1),
                       nn.SiLU()]
        self.net, self.head = nn.Sequential(*layers), Head(w, 0, cfg.image_channels, 256, cfg.patch)

    def forward(self, z):
        emb = self.latent(fourier(z))                                  # (B, 256)
        return self.head(self.net(emb), emb)

class Prior(nn.Module):
    """p(z|u): u (B, U) -> mean and log-variance of z, or logits of categories, as the encoder.
    known: z_i ~ N(m_i, s_i^2), factor i's own centre and scale read off u, nothing learned; its
    density at L places over [-1, 1] for categories. diagonal: a small network per latent i sees
    u's entries for factor i alone. Under both, latents without a factor, as all of a VAE's, get
    N(0, 1), or equal chances, and means are 0 if u has none. full: one network over all of u, the
    paper's. Source: Khemakhem et al. 2020."""
    def __init__(self, cfg, hidden=64):
        super().__init__()
        self.cfg, self.kind = cfg, "N(0,1)" if cfg.model == "vae" else cfg.prior
        self.n_out = 2 if cfg.latent == "gaussian" else cfg.categories # numbers per latent
        k = {"N(0,1)": 0, "full": cfg.n_factors}.get(self.kind, min(cfg.n_factors, cfg.latent_dim))
        self.n_seen, self.learned = k, self.kind not in ("N(0,1)", "known")   # sees k factors of u
        if self.learned:                                               # networks, latents they tell
            groups, n = {"full": (1, cfg.latent_dim), "diagonal": (k, k)}[self.kind]
            h, n_in = hidden * max(2, groups), k * (1 if cfg.u == "var" else 2)
            self.net = nn.Sequential(nn.Conv1d(n_in, h, 1, groups=groups), nn.SiLU(),
                                     nn.Conv1d(h, h, 1, groups=groups), nn.SiLU(),
                                     nn.Conv1d(h, n * self.n_out, 1, groups=groups))

    def forward(self, u):
        u = u.float().unflatten(1, (-1, self.cfg.n_factors))[:, :, :self.n_seen]  # (B, 1 or 2, n)
        mu = torch.zeros_like(u[:, 0]) if self.cfg.u == "var" else u[:, 1]     # m: (B, n)
        logvar = (1 - u[:, 0]) * math.log(self.cfg.u_scale)            # 2 log s, see Data.draw
        if self.learned:                                               # u sorted by factor, as the
            h = self.net(u.transpose(1, 2).flatten(1).unsqueeze(2))    # groups are: (B, n n_out, 1)
            h = h.float().view(len(u), -1, self.n_out)
        elif self.cfg.latent == "gaussian":
            h = torch.stack([mu, logvar], dim=2)
        else:
            grid = torch.linspace(-1, 1, self.n_out, device=u.device)
            h = -0.5 * (grid - mu[:, :, None]).square() / logvar[:, :, None].exp()
        h = F.pad(h, (0, 0, 0, self.cfg.latent_dim - h.shape[1]))      # (B, D, 2 or L)
        if self.cfg.latent != "gaussian":
            return h,
        mu, logvar = h.unbind(dim=2)                                   # (B, D) each
        fixed = self.cfg.u == "var" and self.kind != "full"            # or z_i learns |g_i| alone
        return torch.zeros_like(mu) if fixed else mu, logvar

# ---- Score U-Net ----
class ResBlock(nn.Module):
    """Residual block whose second group norm is scaled and shifted by the embedding of t and z."""
    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.mod = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                              # starts near its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))                          # (B, F, H, W)
        scale, shift = self.mod(emb)[..., None, None].chunk(2, dim=1)  # (B, F, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))

class ScoreUNet(nn.Module):
    """x_t (B, C, H, W), t (B,), z (B, D), x_hat like x_t -> what cfg.predict names, like x_t,
    float32. A U-Net on a space-to-depth stem, halved down to image_size / 16; z and t enter every
    block, and unless cfg.condition is z, the decoder's x_hat is seen too (Pandey et al. 2022)."""
    def __init__(self, cfg):
        super().__init__()
        f, c = cfg.unet_width, cfg.image_channels
        self.patch, self.n_freq, c_emb, self.sde = cfg.patch, f // 2, 4 * f, VPSDE()
        self.predicts_x, self.sees_x_hat = cfg.predict == "x", cfg.condition == "z+decoder"
        self.time = nn.Sequential(nn.Linear(f, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.latent = nn.Sequential(nn.Linear(7 * cfg.z_dim, c_emb), nn.SiLU(),
                                    nn.Linear(c_emb, c_emb))
        c_seen = 2 * c if self.sees_x_hat else c
        self.conv_in = nn.Conv2d(c_seen * cfg.patch**2, f, 3, padding=1)
        widths = [f] + [2 * f] * cfg.halvings
        self.down, self.halve, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        for w, w_next in zip(widths, widths[1:]):                      # up and grow from the inside
            self.down.append(ResBlock(w, w, c_emb))
            self.halve.append(nn.Conv2d(w, w_next, 3, 2, 1))
            self.grow.insert(0, nn.Conv2d(w_next, w, 3, padding=1))
            self.up.insert(0, ResBlock(2 * w, w, c_emb))
        self.middle = nn.ModuleList(ResBlock(widths[-1], widths[-1], c_emb) for _ in range(2))
        self.start = nn.Linear(c_emb, widths[-1] * (cfg.image_size // 16)**2)  # coarse picture of z
        self.norm, self.head = nn.GroupNorm(8, f), Head(f, c_seen, c, c_emb, cfg.patch)

    def forward(self, x_t, t, z, x_hat):
        freq = 1e-4 ** (torch.arange(self.n_freq, device=t.device) / self.n_freq)
        angle = 1000 * t.float()[:, None] * freq                       # (B, F / 2)
        emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.latent(fourier(z)))
        seen = torch.cat([x_t, x_hat], 1) if self.sees_x_hat else x_t
        h, skips = self.conv_in(F.pixel_unshuffle(seen, self.patch)), []
        for block, halve in zip(self.down, self.halve):
            skips.append(block(h, emb))
            h = halve(skips[-1])
        h = h + self.start(emb).view(h.shape)
        for block in self.middle:
            h = block(h, emb)
        for grow, block in zip(self.grow, self.up):
            h = grow(F.interpolate(h, scale_factor=2))
            h = block(torch.cat([h, skips.pop()], 1), emb)
        h = self.head(F.silu(self.norm(h)), emb, seen)                 # (B, C, H, W)
        keep = 1 / (1 + (self.sde.sigma(t) / 0.02).square()).view(-1, 1, 1, 1)
        return keep * x_t + (1 - keep) * h if self.predicts_x else h       # x_t if noise is faint

# ---- VP-SDE and samplers ----
class VPSDE:
    """Variance-preserving SDE, dx = -beta x/2 dt + sqrt(beta) dw, with beta linear in t in (0, 1].
    Its marginal is x_t = alpha x + sigma eps with alpha^2 + sigma^2 = 1 and eps ~ N(0, I). Methods
    take t of any shape and return that shape. Source: Song et al. 2021, Eq. 11."""
    beta_min, beta_rise = 0.1, 19.9                                    # beta(0), beta(1) - beta(0)

    def beta(self, t):
        return self.beta_min + self.beta_rise * t
    def log_alpha(self, t):
        return -0.25 * self.beta_rise * t**2 - 0.5 * self.beta_min * t
    def alpha(self, t):
        return self.log_alpha(t).exp()
    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()    # 1 - alpha^2 would round near t = 0

    def lam(self, t):
        """log(alpha / sigma), half the log signal-to-noise ratio; falls as t rises."""
        return self.log_alpha(t) - self.sigma(t).log()

    def t_of_lam(self, lam):
        """The t at which lam(t) is lam."""
        q = 2 * self.beta_rise * F.softplus(-2 * lam)
        return q / ((self.beta_min**2 + q).sqrt() + self.beta_min) / self.beta_rise

    def add_noise(self, x, eps, t):
        """x_t of clean x. x, eps: (B, C, H, W); t: (B,)."""
        return self.alpha(t).view(-1, 1, 1, 1) * x + self.sigma(t).view(-1, 1, 1, 1) * eps

def time_grid(steps, sde, kind="logsnr"):
    """(steps + 1,) times from 1 down to 1e-3: "uniform" in t, or "logsnr", uniform in sde.lam."""
    if kind not in ("uniform", "logsnr"):
        raise ValueError(f"unknown time grid {kind!r}: use uniform or logsnr.")
    ts = torch.linspace(1, 1e-3, steps + 1)
    if kind == "logsnr":
        first, last = sde.lam(ts[[0, -1]])
        ts[1:-1] = sde.t_of_lam(torch.linspace(first, last, steps + 1))[1:-1]
    return ts

def seeded_noise(seeds, shape, device):
    """A function giving (B, *shape) noise on device; row k depends on seeds[k] alone."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]   # CPU: same on any device
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

# Samplers take x (B, C, H, W) along ts (S + 1,); eps_fn(x, t) has t (B,); noise(): the next draw.
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
    for t, t_next in zip(ts[:-1], ts[1:]):
        score = -eps_fn(x, t.expand(len(x)).to(x)) / sde.sigma(t)
        g2h = sde.beta(t) * (t - t_next)
        x = x + g2h * (0.5 * x + score) + g2h.sqrt() * noise()
    return x

@torch.no_grad()
def sample_pc(eps_fn, x, ts, sde, noise=None, *, snr=0.16):
    """Before each Euler-Maruyama step one step of Langevin dynamics at t; calls eps_fn 2S times.
    Source: Song et al. 2021, Alg. 3 and 5, with norms of one image, not means over its batch.
    Langevin's own error, up to snr^2 / 2 of the standard deviation, does not fall with S."""
    check_stochastic(noise, ts)
    for t, t_next in zip(ts[:-1], ts[1:]):
        score = -eps_fn(x, t.expand(len(x)).to(x)) / sde.sigma(t)
        eps = noise()
        ratio = eps.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)             # (B,)
        e = 2 * (1 - sde.beta(t) / 1000) * (snr * ratio).square().view(-1, 1, 1, 1)   # step size
        x = x + e * score + (2 * e).sqrt() * eps
        x = sample_em(eps_fn, x, torch.stack([t, t_next]), sde, noise)
    return x

@torch.no_grad()
def sample_ddim(eps_fn, x, ts, sde, noise=None, *, eta=0.0):
    """DDIM, an ODE for eta = 0 and the ancestral sampler of DDPM for eta = 1; S calls of eps_fn.
    Source: Song, Meng and Ermon 2021, Eq. 12 and 16."""
    if eta > 0:
        check_stochastic(noise, ts)
    for t, t_next in zip(ts[:-1], ts[1:]):
        eps_hat = eps_fn(x, t.expand(len(x)).to(x))
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
    Source: Song et al. 2021, Eq. 13, for the VP-SDE."""
    def slope(x, t):
        return -0.5 * sde.beta(t) * (x - eps_fn(x, t.expand(len(x)).to(x)) / sde.sigma(t))
    for t, t_next in zip(ts[:-1], ts[1:]):
        first = slope(x, t)
        second = slope(x + (t_next - t) * first, t_next)
        x = x + (t_next - t) * 0.5 * (first + second)
    return x

@torch.no_grad()
def sample_dpmpp(eps_fn, x, ts, sde, noise=None):
    """Probability-flow ODE by DPM-Solver++(2M), order 2 on "logsnr" grids; S calls of eps_fn.
    Its first step is DDIM. noise is not used. Source: Lu et al. 2022 (2211.01095), Alg. 2."""
    x0_prev = h_prev = None
    for t, t_next in zip(ts[:-1], ts[1:]):
        x0 = x0_from_eps(x, eps_fn(x, t.expand(len(x)).to(x)), t, sde)
        h = sde.lam(t_next) - sde.lam(t)
        ahead = x0 if x0_prev is None else x0 + 0.5 * h / h_prev * (x0 - x0_prev)
        x = sde.sigma(t_next) / sde.sigma(t) * x - sde.alpha(t_next) * torch.expm1(-h) * ahead
        x0_prev, h_prev = x0, h
    return x

SAMPLERS = {"em": sample_em, "pc": sample_pc, "ddim": sample_ddim, "heun": sample_heun,
            "dpmpp": sample_dpmpp}

def invert(eps_fn, x, ts, sde):
    """The noise (B, C, H, W) at max(ts) that the probability-flow ODE maps to x; S calls.
    ts in either order: sample_dpmpp on the same grid returns to x. Others invert by ts.flip(0)."""
    return sample_dpmpp(eps_fn, x, ts.sort().values, sde)

# ---- Losses ----
def kl_loss(mu_q, logvar_q, mu_p, logvar_p):
    """KL(q(z|x) || p(z|u)) of diagonal Gaussians, in nats: sum over D, mean over B.
    All arguments: (B, D); logvar is the natural log of the variance. Returns shape ().
    Source: L_KL of Eq. 2."""
    ratio = (logvar_q - logvar_p).exp() + (mu_q - mu_p).square() * (-logvar_p).exp()
    return 0.5 * (ratio - 1 - logvar_q + logvar_p).sum(dim=1).mean()

def kl_categorical(q, p):
    """KL of independent categorical latents, in nats, as kl_loss, of logits q and p (B, D, L)."""
    q, p = q.log_softmax(dim=2), p.log_softmax(dim=2)
    return (q.exp() * (q - p)).sum(dim=(1, 2)).mean()

def moments(logits):
    """Mean and log-variance of the index (B, D), scaled to [-1, 1], that logits (B, D, L) have."""
    p, grid = logits.softmax(dim=2), torch.linspace(-1, 1, logits.shape[2], device=logits.device)
    mean = p @ grid                                                    # (B, D)
    return mean, (p @ grid.square() - mean.square()).clamp(min=1e-6).log()

def sample_latents(q, kind, temperature):
    """z (B, D) of q's mean and log-variance, or (B, D L) of its logits: relaxed one-hot codes;
    under "st" one-hot codes with the relaxed ones' gradient. Source: Jang et al. 2017."""
    if kind == "gaussian":
        return q[0] + (0.5 * q[1]).exp() * torch.randn_like(q[0])
    return F.gumbel_softmax(*q, temperature, hard=kind == "st").flatten(1)

def kl_terms(cfg, q, p):
    """The terms of KL, a dict, from what encoder and prior return; see losses."""
    def scaled(side, share):                                           # the gradient alone
        return [share * h + (1 - share) * h.detach() for h in side]
    q, p = scaled(q, 2 - 2 * cfg.kl_balance), scaled(p, 2 * cfg.kl_balance)
    (mu_q, _), (mu_p, logvar_p) = (q, p) if cfg.latent == "gaussian" else (moments(*q), moments(*p))
    kl = kl_loss if cfg.latent == "gaussian" else kl_categorical
    return {"kl": kl(*q, *p), "kl_reverse": kl(*p, *q),
            "kl_mean": kl_loss(mu_q, logvar_p, mu_p, logvar_p)}        # the part that means make

def losses(model, x, u, t, eps):
    """The terms of Eq. 2, unweighted, as a dict of float32 scalars: ddpm, rec, kl, and two more.
    x: (B, C, H, W); u: (B, U); t: (b,) and eps: (b, C, H, W) with b <= B. The encoder sees all B
    images, the decoder the first cfg.rec_images, the U-Net the first b. "ddpm" (Eq. 3 with
    lambda(t) = sigma^2) is the mean squared error of the noise estimate, or of what cfg.weight
    names; without a U-Net or without t there is no such term. "kl_mean" is the part of KL that
    means make, half the sum of (mu_q - mu_p)^2 / var_p; "kl_reverse" is KL(p || q)."""
    cfg, b, r = model.cfg, len(t), model.cfg.rec_images or len(x)
    q = model.encoder(x)
    z = sample_latents(q, cfg.latent, model.temperature)               # (B, D) or (B, D L)
    x_hat = model.decoder(z[:max(r, b)])                               # (max(r, b), C, H, W)
    terms = {"rec": (x_hat[:r] - x[:r]).square().mean(), **kl_terms(cfg, q, model.prior(u))}
    if model.unet is not None and b:
        x = x[:b]
        alpha, sigma = (c(t).view(-1, 1, 1, 1) for c in (model.sde.alpha, model.sde.sigma))
        target = {"eps": eps, "v": alpha * eps - sigma * x, "x": x}[cfg.predict]
        x_t = model.sde.add_noise(x, eps, t)
        error = model.unet(x_t, t, z[:b], x_hat[:b].detach()) - target  # (b, C, H, W)
        to_x = {"eps": sigma / alpha, "v": sigma, "x": 1}              # what an error costs x
        terms["ddpm"] = (error * (to_x[cfg.predict] / to_x[cfg.weight])).square().mean()
    return terms

# ---- The model and its checkpoint ----
class IDiff(nn.Module):
    """The joint model of Eq. 2. cfg.model "vae" and "ivae" have no U-Net (unet is None)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.info, self.sde, self.temperature = cfg, {}, VPSDE(), 0.3   # of gumbel
        self.encoder, self.prior, self.decoder = Encoder(cfg), Prior(cfg), Decoder(cfg)
        self.unet = ScoreUNet(cfg) if cfg.model == "idiff" else None

    def encode(self, x):
        """Mean and log-variance of q(z|x), (B, D) each, of images x (B, C, H, W) in [-1, 1].
        Of categorical latents: the likeliest category's index, and the index's log-variance."""
        want = (self.cfg.image_channels, self.cfg.image_size, self.cfg.image_size)
        if x.dim() != 4 or x.shape[1:] != want:
            raise ValueError(f"images must be (B, {', '.join(map(str, want))}), got "
                             f"{tuple(x.shape)}. Resize them to what the model was trained on.")
        if self.cfg.latent == "gaussian":
            return self.encoder(x)
        logits, = self.encoder(x)
        scale = 2 * math.log((self.cfg.categories - 1) / 2)            # from [-1, 1] to indices
        return logits.argmax(dim=2).to(x), moments(logits)[1] + scale

    def one_hot(self, z):
        """What the networks see of z (B, D): z itself, or its categories' one-hot codes."""
        if self.cfg.latent == "gaussian":
            return z
        index = z.round().long().clamp(0, self.cfg.categories - 1)
        return F.one_hot(index, self.cfg.categories).flatten(1).to(z)

    def decode(self, z):
        """The decoder's images (B, C, H, W) of latents z (B, D)."""
        if z.dim() != 2 or z.shape[1] != self.cfg.latent_dim:
            raise ValueError(f"z must be (B, {self.cfg.latent_dim}), got {tuple(z.shape)}.")
        return self.decoder(self.one_hot(z))

    def eps_fn(self, z):
        """The noise estimate eps_fn(x, t) given latents z (B, D), for samplers and invert."""
        if self.unet is None:
            raise ValueError(f"model {self.cfg.model!r} has no diffusion U-Net to sample from. "
                             "Use decode, or train with --model idiff.")
        x_hat, z = self.decode(z), self.one_hot(z)
        def eps_fn(x, t):
            alpha, sigma = (c(t).view(-1, 1, 1, 1) for c in (self.sde.alpha, self.sde.sigma))
            predicted = self.unet(x, t, z, x_hat)
            return {"eps": predicted, "v": sigma * x + alpha * predicted,
                    "x": (x - alpha * predicted) / sigma}[self.cfg.predict]
        return eps_fn

    @torch.no_grad()
    def sample(self, z, start, steps=20, sampler="dpmpp", noise=None):
        """Images (B, C, H, W) in [-1, 1] from latents z (B, D) and start, the noise at t = 1.
        steps: on a grid uniform in log-SNR; noise: for stochastic samplers, see seeded_noise."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}.")
        eps_fn, ts = self.eps_fn(z), time_grid(steps, self.sde).to(start)
        x = SAMPLERS[sampler](eps_fn, start, ts, self.sde, noise)      # then from 1e-3 to 0 by x_0
        return x0_from_eps(x, eps_fn(x, ts[-1].expand(len(x))), ts[-1], self.sde).clamp(-1, 1)

def save_checkpoint(path, model, ema, **state):
    """Write config, weights, averaged weights (module ema) and state to path, or nothing."""
    content = {"format": CHECKPOINT_FORMAT, "config": asdict(model.cfg), "info": model.info,
               "model": model.state_dict(), "ema": ema.state_dict(), **state}
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                           # the latter is torch's
        partial.unlink(missing_ok=True)
        raise OSError(f"'{path}' not written, what it held is kept: {error.__context__ or error}")

def read_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote. FileNotFoundError or ValueError, in one line, if not."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint not found: '{path}'. Train one with \"python "
                                "train.py\", or pass the path it printed at its end.")
    try:
        check_memory(sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()))
        content = torch.load(path, map_location=device, weights_only=True)   # runs no code
        if content["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {content['format']}, not {CHECKPOINT_FORMAT}")
        json.dumps(dict(**content["info"]))                            # fails if not plain values
        with torch.device("meta"):                                     # takes no memory
            wanted = IDiff(Config(**content["config"])).state_dict()
        for weights in (content["model"], content["ema"]):
            for name, p in (wanted | weights).items():
                if (p.shape, p.dtype) != (wanted[name].shape, torch.float32) or (
                        p.nbytes > p.untyped_storage().nbytes() or not p.isfinite().all()):
                    raise ValueError(f"{name} does not fit, or is not finite float32 numbers")
    except Exception as error:                                         # many kinds, none the user's
        reason = " ".join(f"{type(error).__name__}, {error}".split(". ")[0].split())[:200]
        raise ValueError(f"'{path}' is not an iDiff checkpoint of this version, or is damaged: "
                         f"{reason}. Train it again, or pass another.") from None
    return content

def load_checkpoint(path, device="cpu"):
    """The IDiff model, with model.cfg and model.info, in eval mode with averaged (EMA) weights."""
    content = read_checkpoint(path, device)
    model = IDiff(Config(**content["config"])).to(device)
    model.load_state_dict(content["ema"])
    model.info = content["info"]
    return model.eval().requires_grad_(False)

# ---- Data ----
# Cube, cylinder, sphere, capsule: within radius of a core. (half width, half height, radius)
SHAPES = ((0.46, 0.46, 0.03), (0.46, 0.46, 0.03), (0.0, 0.0, 0.56), (0.0, 0.24, 0.40))
LIGHT = torch.tensor([-0.34, -0.49, 0.80])[:, None]          # unit vector towards the light

def length(v):
    return (v * v).sum(dim=0).sqrt()                                   # (3, ...) -> (...)

def shape_distance(p, shape):
    """Signed distance (...) of points p (3, ...) to the shape, and a vector along its normal."""
    width, height, radius = SHAPES[shape]
    xy, z = p[:2], p[2:]
    core = (xy.clamp(-width, width) if shape == 0 else
            xy * (width / length(xy).clamp(min=1e-6)).clamp(max=1))
    offset = p - torch.cat((core, z.clamp(-height, height)))
    return length(offset) - radius, offset

def camera_rays(angles, side):
    """Eyes (3, A, 1) and unit rays (3, A, side²) of cameras around the object at A angles."""
    radius, height, pitch, view = 2.5, 1.62, 0.41, 0.53      # view: tangent of half the field
    sin, cos = angles.sin()[:, None], angles.cos()[:, None]
    grid = ((torch.arange(side) + 0.5) / side * 2 - 1) * view
    right, down = grid.repeat(side), grid.repeat_interleave(side)
    ahead = math.cos(pitch) - down * math.sin(pitch)         # along the floor
    up = (-math.sin(pitch) - down * math.cos(pitch)).expand(len(angles), -1)
    rays = torch.stack((right * cos - ahead * sin, right * sin + ahead * cos, up))
    eyes = torch.stack((radius * sin, -radius * cos, torch.full_like(sin, height)))
    return eyes, rays / length(rays)

def render_room(eyes, rays, half=2.7):
    """Points (3, A, P) where rays leave the empty room, whether on the floor, and shade."""
    t_wall, axis = ((half * rays[:2].sign() - eyes[:2]) / rays[:2]).min(dim=0)
    t_floor = torch.where(rays[2] < 0, -eyes[2] / rays[2], math.inf)
    point = eyes + rays * torch.minimum(t_wall, t_floor)
    side = torch.where(rays[0] > 0, 0.74, 0.60)              # the right wall is lit, the left not
    wall = torch.where(axis == 1, 0.86, side)
    gap = torch.cat((half - point[:2].abs(), point[2:])).sort(dim=0).values[1]
    edge = 1 - 0.22 * (-gap / 0.35).exp()                    # darker where two planes meet
    return point, t_floor < t_wall, torch.where(t_floor < t_wall, 0.90, wall) * edge

def floor_light(p, shape):
    """Share of light (M) that reaches floor points p (3, M): soft shadow times contact."""
    ts = torch.linspace(0.05, 2.0, 12)
    seen = [shape_distance(p + t * LIGHT, shape)[0] / (0.3 * t) for t in ts]
    seen = torch.stack(seen).amin(dim=0).clamp(0, 1)
    contact = (shape_distance(p, shape)[0] / 0.45).clamp(0, 1)
    return (0.55 + 0.45 * seen * seen * (3 - 2 * seen)) * (0.75 + 0.25 * contact.sqrt())

def render_object(eye, ray, shape):
    """Whether rays (3, M) from eye (3, M) meet the shape, its shade and its highlight (M)."""
    p = eye - ray * ((eye * ray).sum(dim=0) + 0.85)          # enter the bounding sphere
    for _ in range(28):
        p = p + ray * shape_distance(p, shape)[0]
    gap, normal = shape_distance(p, shape)
    normal = normal / length(normal)
    shade = 0.42 + 0.52 * (normal * LIGHT).sum(dim=0).clamp(min=0) + 0.10 * normal[2]
    half = (LIGHT - ray) / length(LIGHT - ray)               # Blinn's half vector
    shine = (normal * half).sum(dim=0).clamp(min=0) ** 60
    return gap < 0.01, shade, 0.55 * shine

def render_shapes3d(size=64, device="cpu"):
    """Shade of floor, walls and object, and white light, (480, 4, size, size) uint8.
    480 geometries: 8 scales, 4 shapes, 15 orientations, row-major. Sphere tracing (Hart 1996)."""
    eyes, rays = camera_rays(torch.linspace(-30, 30, 15).deg2rad(), 2 * size)
    point, on_floor, room = render_room(eyes, rays)
    empty = torch.stack((room * on_floor, room * ~on_floor, 0 * room, 0 * room))  # (4, A, P)
    scale = torch.linspace(0.75, 1.25, 8)[:, None, None]
    ray, planes = rays[:, None].expand(-1, 8, -1, -1), []    # (3, 8, A, P)
    for shape, (_, height, radius) in enumerate(SHAPES):
        centre = torch.tensor([0, 0, height + radius])[:, None, None, None]
        p, eye = point[:, None] / scale - centre, eyes[:, None] / scale - centre
        image = empty[:, None].repeat(1, 8, 1, 1)            # (4, 8, A, P)
        near = on_floor & ((p * p).sum(dim=0) < 2.2 ** 2)
        image[0, near] *= floor_light(p[:, near], shape)
        near = (eye * eye).sum(dim=0) - (eye * ray).sum(dim=0) ** 2 < 0.85 ** 2
        hit, shade, shine = render_object(eye.expand_as(ray)[:, near], ray[:, near], shape)
        front = torch.stack((0 * shade, 0 * shade, shade, shine))
        image[:, near] = torch.where(hit, front, image[:, near])
        image = image.permute(1, 2, 0, 3).reshape(-1, 4, 2 * size, 2 * size)
        image = F.avg_pool2d(image, 2).clamp(0, 1).mul(255).round().to(torch.uint8)
        planes.append(image.unflatten(0, (8, 15)))
    return torch.stack(planes, dim=1).flatten(0, 2).to(device)

class Data:
    """Images on a device, by row, and the modulated draw of rows and u. sizes: {factor's name: how
    many values}; images: function rows (B,) -> (B, C, S, S) in [-1, 1], S a multiple of 16;
    factors: (N, K) int64, one row per image, or None for the full factor grid, row-major."""
    def __init__(self, name, sizes, image_shape, images, device, factors=None):
        self.name, self.factor_names, self.factor_sizes = name, tuple(sizes), tuple(sizes.values())
        self.image_shape, self.images, self.device, self.table = image_shape, images, device, None
        if max(self.factor_sizes) > 1000 or math.prod(self.factor_sizes) >= 2**63:
            raise ValueError(f"1,000 values a factor, 2^63 in all at most: {self.factor_sizes}")
        self.sizes = torch.tensor(self.factor_sizes, device=device)
        self.strides = self.sizes.flip(0).cumprod(0).flip(0) // self.sizes
        self.varied = (self.sizes > 1).nonzero().flatten()             # the factors that u tells of
        value = torch.arange(max(self.factor_sizes), device=device)    # (V,)
        self.grid = 2 * value / (self.sizes[:, None] - 1).clamp(min=1) - 1  # (K, V) over [-1, 1]
        self.exists = value < self.sizes[:, None]                      # (K, V)
        if factors is not None:
            self.table = factors.to(device)
            self.numbers, self.order = (self.table * self.strides).sum(1).sort()   # on the grid

    def __len__(self):
        return math.prod(self.factor_sizes) if self.table is None else len(self.table)

    def factors(self, rows):
        """(B, K) int64, the index of each factor's value, of rows (B,)."""
        grid = self.table is None
        return rows[:, None] // self.strides % self.sizes if grid else self.table[rows]

    def draw(self, n, generator, u="mean+var", u_scale=0.3):
        """Rows (n,) of one modulated draw, and u (n, U).
        Each draw and factor has a scale s, log-uniform in [u_scale, 1], and a centre m, 0 or, with
        "mean+var", uniform in [-1, 1]. A value g of the grid has probability ∝ exp(-((g - m) / s)^2
        / 2), in a grid with gaps among the values still left. u: log s scaled to [-1, 1], any m."""
        a, b = torch.rand(2, n, len(self.sizes), generator=generator, device=self.device)
        log_s = a * math.log(u_scale)                                  # (n, K)
        m = 2 * b - 1 if u == "mean+var" else torch.zeros_like(b)
        logits = -0.5 * ((self.grid - m[:, :, None]) / log_s.exp()[:, :, None]).square()
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        rows = self._pick((logits + gumbel).masked_fill(~self.exists, -math.inf), generator)
        entries = [1 - 2 * a, m] if u == "mean+var" else [1 - 2 * a]
        return rows, torch.cat([entry[:, self.varied] for entry in entries], dim=1)

    def _pick(self, scores, generator):
        """Rows (n,): each factor in turn takes its highest score (n, K, V) among rows left."""
        if self.table is None:
            return (scores.argmax(2) * self.strides).sum(1)
        low = torch.zeros(len(scores), dtype=torch.int64, device=self.device)
        for k, size in enumerate(self.factor_sizes):
            edges = low[:, None] + self.strides[k] * torch.arange(size + 1, device=self.device)
            index = torch.searchsorted(self.numbers, edges)            # (n, size + 1)
            exists = index.diff(dim=1) > 0
            value = scores[:, k, :size].masked_fill(~exists, -math.inf).argmax(1)
            low = low + value * self.strides[k]        # numbers in [low, low + stride) are left
        first, last = (torch.searchsorted(self.numbers, low + i) for i in (0, 1))
        step = torch.rand(len(low), generator=generator, device=self.device) * (last - first)
        return self.order[(first + step.long()).minimum(last - 1)]

SHAPES3D = {"floor hue": 10, "wall hue": 10, "object hue": 10, "scale": 8, "shape": 4,
            "orientation": 15}
DSPRITES = {"colour": 1, "shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}

def load_shapes3d(device):
    """The embedded replica of 3D Shapes (Burgess & Kim 2018): 480,000 images, none stored."""
    planes = render_shapes3d(device=device)                            # (480, 4, 64, 64) uint8
    hue = torch.arange(10)[:, None] * 0.6 + torch.tensor([0.0, 4.0, 2.0])  # tenths of the circle
    palette = ((hue % 6 - 3).abs() - 1).clamp(0.04, 1)                 # (10, 3), HSV to RGB
    palette = torch.cat([palette, torch.ones(1, 3)]).to(device)        # white for highlights
    def compose(rows):
        colours = [rows // 48000, rows // 4800 % 10, rows // 480 % 10, torch.full_like(rows, 10)]
        rgb = palette[torch.stack(colours, dim=1)].transpose(1, 2)     # (B, 3, 4)
        x = torch.bmm(rgb, planes[rows % 480].flatten(2).float() / 255)  # (B, 3, H W)
        return (x.clamp(0, 1) * 2 - 1).unflatten(2, planes.shape[2:])
    return Data("shapes3d replica", SHAPES3D, (3, 64, 64), compose, device)

def load_dsprites(device):
    """The embedded replica of dSprites (Matthey et al. 2017): 737,280 images, only -1 and 1.
    Shapes are square, ellipse and heart; orientation 39 equals 0; no sprite leaves the image."""
    # Half width, half height, and bend, which pulls an ellipse's sides up to make a heart.
    sprites = torch.tensor([[9.5, 9.5, 0], [12, 7, 0], [11, 9, 0.7]], device=device)
    pixel = torch.arange(64, device=device)
    def compose(rows):
        _, shape, scale, turn, x, y = data.factors(rows)[..., None, None].unbind(1)  # (B, 1, 1)
        right, up = pixel - 16 - x, 16 + y - pixel[:, None]            # from the sprite's centre
        width, height, bend = sprites[shape].unbind(dim=-1)
        angle, grow = turn % 39 * (2 * math.pi / 39), 0.5 + scale / 10
        cos, sin = angle.cos() / grow, angle.sin() / grow
        a = right * (cos / width) + up * (sin / width)                 # (B, 64, 64), sprite's axes
        b = up * (cos / height) - right * (sin / height)
        heart = b - bend * (a.abs() - 0.16)
        inside = torch.where(shape == 0, torch.maximum(a.abs(), b.abs()), a * a + heart * heart) < 1
        return inside[:, None].float() * 2 - 1
    data = Data("dsprites replica", DSPRITES, (1, 64, 64), compose, device)
    return data

def check_memory(need, device=torch.device("cpu")):
    """MemoryError in one line if need bytes do not fit on the device, where the system tells."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if need > 0.9 * free:
        raise MemoryError(f"it needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
                          f"free on {device}. Free some, or take a smaller file.")

def read_arrays(path, device, progress):
    """images (N, H, W[, C]) uint8 and factors (N, K) of an .h5 or .npz file."""
    with open(path, "rb") as file:
        is_h5 = file.read(8) == b"\x89HDF\r\n\x1a\n"                   # the content decides
    if is_h5:
        import h5py
    with h5py.File(path) if is_h5 else np.load(path, allow_pickle=False) as arrays:
        image_key, key = (next((k for k in known if k in arrays), None) for known in
                          (("images", "imgs"), ("factors", "labels", "latents_classes")))
        if image_key is None or key is None:
            raise ValueError(f"needs the arrays images and factors, has {', '.join(arrays)}")
        check_memory(arrays[image_key].size + arrays[key].nbytes if is_h5 else
                     sum(entry.file_size for entry in arrays.zip.infolist()), device)
        images, factors = arrays[image_key], np.asarray(arrays[key])
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or factors.ndim != 2:
            raise ValueError(f"images must be (N, H, W, C) uint8 and factors (N, K), got "
                             f"{images.shape} {images.dtype} and {factors.shape}")
        if is_h5:
            source, images = images, np.empty(images.shape, np.uint8)
            for i in progress(range(0, len(images), 4096), desc="reading images"):
                source.read_direct(images, np.s_[i:i + 4096], np.s_[i:i + 4096])
    if key == "latents_classes" and images.max(initial=0) <= 1:
        images *= 255                                                  # dSprites stores 0 and 1
    return images, factors

def load_file(path, device, progress):
    """Data of the real 3dshapes.h5, the real dSprites .npz, or a file of one's own."""
    images, labels = read_arrays(path, device, progress)
    images = images.reshape(*images.shape[:3], -1)                     # (N, H, W, C)
    if len(images) != len(labels) or not labels.size or not np.isfinite(labels).all():
        raise ValueError(f"needs a row of finite factors per image: {images.shape}, {labels.shape}")
    values, index = zip(*(np.unique(column, return_inverse=True) for column in labels.T))
    sizes, factors = tuple(map(len, values)), torch.from_numpy(np.stack(index, axis=1))
    names = next((known for known in (SHAPES3D, DSPRITES) if tuple(known.values()) == sizes),
                 {f"factor {k}": size for k, size in enumerate(sizes)})
    pixels = torch.from_numpy(images).to(device)
    return Data(os.path.basename(path), names, (images.shape[3], *images.shape[1:3]),
                lambda rows: pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, device, factors)

def load_data(name="shapes3d", device="cpu", progress=lambda iterable, **kwargs: iterable):
    """The Data of a name ("shapes3d", "dsprites": embedded replicas) or of an .h5 or .npz file.
    Files: the real 3dshapes.h5, the real dSprites .npz, or one's own images (N, H, W, C) uint8 and
    factors (N, K). progress wraps iterables, as tqdm. OSError, ValueError, MemoryError."""
    device, known = torch.device(device), {"shapes3d": load_shapes3d, "dsprites": load_dsprites}
    if name in known:
        return known[name](device)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"data not found: '{name}'. Pass {', '.join(known)}, or the path "
                                "of an .h5 or .npz file.")
    try:
        return load_file(name, device, progress)
    except Exception as error:                                         # of zip, h5, pickle: many
        kind = MemoryError if isinstance(error, MemoryError) else ValueError
        reason = " ".join(str(error).split())[:200]
        raise kind(f"'{name}' cannot be used as data: {reason}") from None

def save_grid(file, images, rows, columns):
    """Write images (N, C, H, W) in [-1, 1] as a PNG; rows and columns: labels, their product N."""
    from matplotlib.figure import Figure
    n, m = len(columns), len(rows)
    grid = F.pad((images.float().cpu() * 127.5 + 127.5).clamp(0, 255), (1, 1, 1, 1), value=255)
    grid = grid.expand(-1, 3, -1, -1).unflatten(0, (m, n)).permute(0, 3, 1, 4, 2)
    grid = grid.flatten(0, 1).flatten(1, 2).round().byte().numpy()     # (height, width, 3)
    size = np.array(grid.shape[1::-1]) * max(1, round(128 / images.shape[-1]))
    axis = Figure(size / 100, dpi=100).add_axes((0, 0, 1, 1), frame_on=False)
    axis.imshow(grid, interpolation="nearest", aspect="auto", extent=(0, n, m, 0))
    axis.set_xticks(np.arange(n) + 0.5, columns, fontsize=12)
    axis.set_yticks(np.arange(m) + 0.5, rows, fontsize=12)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.figure.savefig(file, bbox_inches="tight")
