# SPDX-License-Identifier: MIT
"""Train a VAE, an iVAE or an iDiff model.

    python train.py                                # the recipe, on all six factors of 3D Shapes
    python train.py --paper --out runs/paper       # the paper's method at the same size

In Python: run(recipe(data), data, "runs/mine") returns the trained model.
"""
import argparse
import hashlib
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import count, product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

import idiff
from idiff import drawing, in_one_line, progress

DRAWS_PER_EPOCH = 480_000   # as many as 3D Shapes has images, for any data
SIZES = {"small": {},
         "full": dict(patch=2, width=128, unet_width=128, rec_images=0, ddpm_images=0,
                      batch_size=512, epochs=10.0, precision="bfloat16")}
PAPER = dict(latent_dim=10, prior="full", prior_mean="learned", u="var", kl=5e-4, rec=0.1,
             contrast=0.0, settle=0.0, predict="eps", condition="sample", unet_share=0.0,
             batch_size=32, rec_images=0,
             ddpm_images=0, lr=2e-4, muon=0.0, schedule="constant")

# Fields of Config that a U-Net shares with the frozen iVAE that it is trained on.
IVAE = ("latent_dim", "latent", "categories", "prior", "prior_mean", "u", "u_scale", "width",
        "patch", "image_size", "image_channels", "n_factors", "n_u")

# The paper's Table 1, and a grid over it.
SPACE = {"kl": (1e-5, 0.1), "rec": (0.01, 5.0), "u": ["var", "mean+var"]}
GRID = {"kl": [1e-5, 1e-4, 1e-3, 1e-2, 0.1], "rec": [0.01, 0.1, 1.0, 5.0], "u": SPACE["u"]}

# torchrun sets these for each of its processes, the ranks.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, usage="python train.py [options]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=110))

    add = parser.add_argument_group("the run").add_argument
    path = os.path.expanduser                              # the shell leaves --out=~/x as it is
    add("--data", type=path, help=f"{', '.join(idiff.DATA_SETS)}, an .h5 or .npz file, or a folder "
        "(default: shapes3d, or a frozen iVAE's)")
    add("--factor-sizes", type=sizes, metavar="V,V,...",
        help="how many values each factor has, if an .npz or .h5 file of a full grid lists none")
    add("--size", choices=SIZES, default="small", help="widths, batch and length (default: small)")
    add("--paper", action="store_true", help="the paper's method, at the same size")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    add("--out", type=path,
        help="folder of the run; the same command continues there (default: a new one in runs)")
    add("--resume", type=path, metavar="CKPT",
        help="continue the run of this checkpoint, in its folder or in --out")
    add("--freeze-ivae", type=path, metavar="CKPT",
        help="train a U-Net on the frozen iVAE of this checkpoint")
    add("--save-every", type=positive, default=500, metavar="N",
        help="steps between writes of ckpt.pt (default: 500)")
    add("--log-every", type=positive, default=20, metavar="N",
        help="steps between lines of log.jsonl (default: 20)")

    add = parser.add_argument_group("a search; the same command joins or resumes it").add_argument
    add("--search", choices=("grid", "bayes"),
        help="search over kl, rec and u, unless a flag sets them")
    add("--over", nargs="+", action="append", default=[], metavar="NAME VALUE",
        help="also search over a flag's values, as in --over prior known full")
    add("--trials", type=positive,
        help="how many trials this process runs (default: 30; grid: every cell)")
    add("--objective", choices=("mig", "contrast"), default="mig",
        help="what is optimised; contrast, on fresh draws, needs no labels (default: mig)")

    add = parser.add_argument_group("what changes the numbers; defaults: the recipe").add_argument
    for f in fields(idiff.Config):
        if f.metadata["help"]:
            add("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                choices=f.metadata["choices"], help=f"{f.metadata['help']} (default: {f.default})")

    if RANK > 0:                                           # rank 0 tells what is wrong
        parser.error = lambda message: sys.exit(0)
    return parser


def positive(text):
    """The whole number that a text gives; ValueError unless it is at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def sizes(text):
    """The whole numbers that a text such as 4,3,2 gives; each must be at least 1."""
    return tuple(map(positive, text.split(",")))


# ---- Config, folder and log ----

def shape_of(data):
    """The fields of Config that the data alone decide, a dict."""
    channels, side, _ = data.image_shape
    return dict(image_size=side, image_channels=channels, n_factors=len(data.varied),
                n_u=data.u.shape[1])


def recipe(data, size="small", paper=False, ivae=None, **changes):
    """The Config of a run on data, with its length in steps. ValueError for an impossible one.

    Each of these overrules those before it: size, paper, what the data or a frozen ivae (a model)
    dictate, and changes, which are fields of Config.
    """
    # the paper's method overrules a size
    values = {**SIZES[size], **(PAPER if paper else {})}

    # what the data dictate
    if data.u.numel() or not len(data.varied):
        values["u"] = "own"
    shape = shape_of(data)

    # what a frozen iVAE dictates
    frozen = {}
    if ivae is not None:
        if ivae.cfg.model == "vae":
            raise ValueError("the model to freeze is a VAE: there is no p(z|u) to freeze.")
        frozen = {name: getattr(ivae.cfg, name) for name in IVAE}
        frozen.update(model="idiff", settle=0.0, unet_share=0.0)

    try:
        cfg = idiff.Config(**{**values, **frozen, **shape, **changes})
    except ValueError as error:
        if "nothing to tell" not in str(error):
            raise
        raise ValueError(f"{error} Pass a --u that the data have; if they are a full grid of "
                         "factors without labels, --factor-sizes; a factor may have at most 1,000 "
                         "values. Without u and factors only --model vae --u own can be "
                         "trained.") from None
    for name, value in [*frozen.items(), *shape.items()]:
        if getattr(cfg, name) != value:
            raise ValueError(f"the data, or the frozen iVAE, need {name} {value}, got "
                             f"{getattr(cfg, name)}. Leave it out; --image-size is for files.")

    # lengths and counts in full
    batch = cfg.batch_size
    steps = cfg.epochs * DRAWS_PER_EPOCH / batch
    if cfg.model == "idiff":
        steps /= 1 - cfg.unet_share                            # the U-Net's steps come on top
    cfg = replace(cfg, steps=cfg.steps or max(1, round(steps)),
                  rec_images=min(cfg.rec_images or batch, batch),
                  ddpm_images=min(cfg.ddpm_images or batch, batch))
    return replace(cfg, epochs=cfg.ivae_steps * batch / DRAWS_PER_EPOCH)


def check_fit(cfg, data):
    """ValueError if a Config does not go with the data, or ranks cannot share its batches."""
    values = asdict(cfg)
    shape = shape_of(data)
    counts = "steps", "rec_images", "ddpm_images"          # recipe replaces a 0 by a number
    if {**values, **shape} != values or not all(values[name] for name in counts):
        wanted = {name: values[name] for name in [*shape, *counts]}
        raise ValueError(f"the Config has {wanted}; {data.name} has {shape}, and a run needs a "
                         "step or more, and images for each. Make it by recipe(data).")

    shared = (cfg.batch_size, cfg.rec_images, cfg.ddpm_images)
    if any(n % WORLD for n in shared):
        raise ValueError(f"--batch-size, --rec-images and --ddpm-images: {WORLD} ranks share each "
                         f"evenly, got {shared}.")


def check_same(cfg, data, info, content, path):
    """ValueError, which tells what differs, unless a checkpoint's content is from this very run."""
    held = {**content["info"], **content["config"]}
    if held.get("fingerprint") != data.fingerprint:
        raise ValueError(f"'{path}' was trained on other data than '{data.name}': on "
                         f"{held.get('data', 'unnamed ones')}. Pass those by --data, or train "
                         "anew, in another folder.")
    asked = {**info, **asdict(cfg)}
    other = [f"{name} {held.get(name)}" for name, value in asked.items() if held.get(name) != value]
    if other:
        raise ValueError(f"'{path}' is of another run, with {', '.join(other)}. Pass another "
                         f"--out, delete it, or go on with it: --resume {shlex.quote(path)}")


def make_folder(cfg):
    """A new folder for a run, which no other run has."""
    for n in count(1):
        folder = f"runs/{cfg.model}-s{cfg.seed}" + (f"-{n}" if n > 1 else "")
        with suppress(FileExistsError):
            os.makedirs(folder)                            # if two runs try at once, one gets it
            return folder


def open_log(out, cfg, size):
    """The log in the folder out, cut to size bytes; until it is closed no other run writes there.

    The lock ends with its process, however that ends. Windows and some file systems have no locks.
    """
    os.makedirs(out, exist_ok=True)
    file = open(f"{out}/log.jsonl", "a")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if isinstance(error, BlockingIOError):
            raise ValueError(f"another run is writing into '{out}'. Pass another --out.") from None
    if file.tell() > size == 0:
        print(f"the log in '{out}' has no checkpoint, and begins anew")
    file.truncate(min(file.tell(), size))                  # the steps since then are run again
    if not os.path.getsize(file.name):
        log(out, {"config": asdict(cfg)})
    return file


def provenance(data):
    """What a checkpoint says about its origin, a dict."""
    commit = subprocess.run("git describe --always --dirty", shell=True, errors="replace",
                            capture_output=True, cwd=Path(__file__).parent)
    return {"data": data.name,
            "fingerprint": data.fingerprint,
            **data.source,
            "commit": commit.stdout.strip() or "unknown",
            "torch": f"{torch.__version__}"}               # a checkpoint takes plain text


def log(out, record):
    """The one place where numbers leave: writes a line of log.jsonl in the folder out, on rank 0.

    record: first {"config": dict}, then {"step": int, a float per term, ...}, last the validation.
    """
    with open(f"{out}/log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


# ---- Model and optimisers ----

class Muon(torch.optim.Optimizer):
    """An optimiser that takes steps of one size along every singular vector of the momentum.

    The momentum is 0.9. A kernel (O, I, h, w) counts as a matrix (O, I h w). The weights of a group
    have one shape and are updated together, because on a GPU the host's calls take most of the
    time. Source: Jordan et al. 2024.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # skip parameters without a gradient
            weights = [p for p in group["params"] if p.grad is not None]
            averages = []
            for p in weights:
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 0.1)
                averages.append(average.flatten(1))
            if not weights:
                continue

            steps = orthogonalise(torch.stack(averages))       # (N, R, C)
            _, n_rows, n_columns = steps.shape
            rate = group["lr"] * max(1, n_rows / n_columns) ** 0.5
            for p, step in zip(weights, steps):
                p.sub_(rate * step.view_as(p))


def orthogonalise(m):
    """Matrices m (N, R, C) with singular values moved to about 1, by five Newton-Schulz steps."""
    if m.shape[1] > m.shape[2]:
        return orthogonalise(m.mT).mT
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = m @ m.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        m = torch.baddbmm(m, polynomial, m, beta=3.4445)
    return m


def freeze(model, ivae):
    """Give all parts of a model except its U-Net the weights of another, and freeze them."""
    for name in ("encoder", "prior", "decoder"):
        part = getattr(model, name)
        part.load_state_dict(getattr(ivae, name).state_dict())
        part.eval().requires_grad_(False)                  # in eval mode BatchNorm stays as it is


def build(cfg, device, ivae=None):
    """The model, its averaged copy and the optimisers, seeded.

    Given a model ivae, all parts except the U-Net take its weights and stay frozen.
    """
    torch.manual_seed(cfg.seed)
    model = idiff.IDiff(cfg)

    # what would fail later fails now
    if cfg.unmix_steps and model.encoder.last is None:
        raise ValueError("unmixing needs an encoder whose last nn.Linear gives D means, then D "
                         "log-variances. Change yours, or pass --unmix 0.")

    # a frozen iVAE
    if ivae is not None:
        freeze(model, ivae)
    model.to(device, memory_format=torch.channels_last)
    ema = deepcopy(model).eval()

    # networks only: distributions are built outside of compiled parts
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True        # without a compiler it runs uncompiled
        for part in (model.encoder.net, model.decoder, model.unet):
            if part is not None:
                part.compile()

    # the matrices of decoder and U-Net go to Muon, all else to AdamW
    matrices, others = {}, []
    for name, p in model.named_parameters():
        makes_images = name.startswith(("decoder.", "unet."))
        if makes_images and p.dim() > 1 and cfg.muon:
            matrices.setdefault(p.shape, []).append(p)
        else:
            others.append(p)
    optimizers = [torch.optim.AdamW(others, cfg.lr, weight_decay=0.0, fused=True)]
    if matrices:
        groups = [{"params": weights} for weights in matrices.values()]
        optimizers.append(Muon(groups, cfg.muon))
    return model, ema, optimizers


def restore(content, path, model, ema, optimizers, watch):
    """Restore a checkpoint's content; returns the step to go on from. ValueError if that fails."""
    try:
        model.load_state_dict(content["model"])
        ema.load_state_dict(content["ema"])
        for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for p, state in optimizer.state.items():
                shapes = {moment.shape for name, moment in state.items() if name != "step"}
                if shapes - {p.shape}:                     # torch would crash
                    raise ValueError(f"moments of a {p.shape} weight are {shapes}")

        step = content["step"]
        log_size = content["log_size"]
        whole = type(step) is type(log_size) is int
        if not whole or not 0 < step <= model.cfg.steps or log_size < 0:
            raise ValueError(f"step {step} of {model.cfg.steps}, a log of {log_size} bytes")
        if "watch" in content:                             # older checkpoints have none
            watch.load(content["watch"])
    except Exception as error:         # whatever torch raises, the file is at fault
        raise ValueError(f"'{path}' holds no state to resume from: {type(error).__name__}, "
                         f"{in_one_line(error)}") from None
    return step


# ---- One step ----

def stage(cfg, step, begun=0):
    """The step's number within its stage, the iVAE's or the U-Net's, and that stage's length.

    begun: how many of the iVAE's first steps do not count.
    """
    if step < cfg.ivae_steps or cfg.ivae_steps == cfg.steps:
        return step - begun, cfg.ivae_steps - begun
    return step - cfg.ivae_steps, cfg.steps - cfg.ivae_steps


def rate_share(cfg, step, begun=0):
    """Share of the peak learning rates: 100 steps of warm-up in each stage, times the schedule."""
    k, n = stage(cfg, step, begun)
    return min(1.0, (k + 1) / 100) * idiff.SCHEDULES[cfg.schedule](k / n)


def draw_batch(model, data, step):
    """x, u, t, eps of one step, drawn from seed and step alone; t is stratified.

    x: (B, C, H, W); u: (B, U); t: (b,), eps: (b, C, H, W) for the b images of the U-Net, which are
    all of them when it learns alone. All ranks draw the same and keep every WORLD-th row; of u they
    keep all, their own rows first. So their mean equals that of one process, except for the noise
    of z, which each rank draws by itself. Source of the strata: Kingma et al. 2021.
    """
    # all random numbers of the step, whatever was drawn before: a resumed run draws the same
    cfg = model.cfg
    device = data.device
    generator = torch.Generator(device).manual_seed(hash((cfg.seed, step)))
    torch.manual_seed(hash((cfg.seed, step, RANK)))        # for z's noise
    n = cfg.batch_size if step < cfg.ivae_steps else cfg.ddpm_images
    rows, u = data.draw(n, generator, cfg.u, cfg.u_scale)
    x = data.images(rows)

    # one time in each of b equal parts, for the U-Net's images
    b = 0 if step < cfg.unet_from else cfg.ddpm_images
    stratum = torch.arange(b, device=device)
    share = (stratum + torch.rand(b, generator=generator, device=device)) / max(b, 1)
    t = model.prediction.times(share)
    eps = torch.randn(x[:b].shape, generator=generator, device=device)

    # the layout in which the networks' convolutions are fast
    x = x.contiguous(memory_format=torch.channels_last)
    u = torch.cat([u[(RANK + i) % WORLD::WORLD] for i in range(WORLD)])
    return x[RANK::WORLD], u, t[RANK::WORLD], eps[RANK::WORLD]


def total_loss(terms, weights):
    """Eq. 2: L = L_DDPM + lambda_rec L_rec + lambda_KL L_KL, plus terms beyond the paper.

    terms: from IDiff.forward; weights: from IDiff.weights. Returns the sum and the terms in it.
    """
    unknown = terms.keys() - weights.keys()
    if unknown:
        raise ValueError(f"IDiff.forward gives {', '.join(unknown)}, but IDiff.weights no weight "
                         "for it.")
    # a term of weight 0 may overflow, and 0 * inf is NaN
    used = {name: term for name, term in terms.items() if weights[name]}
    loss = sum(weights[name] * term for name, term in used.items())
    return loss, used


def average(ema, model, decay):
    """Move the weights of ema towards the model's; buffers, such as BatchNorm's, are copied.

    Unlike torch's AveragedModel, this lets the host run ahead of the device.
    """
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
    for old, new in zip(ema.buffers(), model.buffers()):
        old.copy_(new)


def train_step(cfg, model, ema, optimizers, batch, step):
    """Train one step; returns the terms that have a weight, and the gradient's norm.

    model may be wrapped for several ranks; ema, its averaged copy, never is.
    """
    # at first the encoder and the prior learn alone, at the end the U-Net
    x, u, t, eps = batch
    settling = step < cfg.settle_steps
    n_rec = 0 if settling else cfg.rec_images
    if step >= cfg.ivae_steps:
        u, n_rec = None, 0

    # the rate of Muon, whose weights begin to learn after settling, rises then
    begun = 0 if settling else cfg.settle_steps
    for optimizer in optimizers:
        share = rate_share(cfg, step, begun if isinstance(optimizer, Muon) else 0)
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share

    with torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
        terms = model(x, u, t, eps, n_rec // WORLD)
    loss, used = total_loss(terms, ema.weights(settling))

    # descend, with the gradient's norm bounded, and average the weights
    model.zero_grad()
    loss.backward()
    gradient_norm = clip_grad_norm_(model.parameters(), cfg.clip)
    for optimizer in optimizers:
        optimizer.step()
    k, _ = stage(cfg, step, begun)                         # the averages begin anew then, too
    average(ema, model, min(cfg.ema, (k + 1) / (k + 10)))
    return {**used, "gradient norm": gradient_norm}


# ---- Unmixing ----

def likelihood(w, b, prior, z, u, scales=True):
    """log p(Wz + b|u) + log |det W| of codes z (N, D) in nats, (N,); scales: u tells variances."""
    p = prior(u)
    if not scales:
        p = idiff.Gaussian(p.mean, torch.zeros_like(p.mean))
    return p.log_prob(z @ w.T + b).sum(dim=1) + w.slogdet().logabsdet


def minimise(loss, parameters, steps):
    """Move parameters to where the function loss() is least, in at most this many L-BFGS steps."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, history_size=20,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value
    optimizer.step(closure)


def fit_unmixing(prior, z, u, z_held, u_held, mixes=True, scales=True):
    """(W, b, prior) of the greatest likelihood, and the log-likelihood of held-out codes, (M,).

    L-BFGS starts from W = 1, b = 0 and the given prior. mixes: if False, W is diagonal; scales: see
    likelihood.
    """
    prior = deepcopy(prior).requires_grad_(True)
    one = torch.eye(z.shape[1], device=z.device)
    w = one.clone().requires_grad_(True)
    b = torch.zeros(len(w), device=z.device, requires_grad=True)
    mask = torch.ones_like(one) if mixes else one
    minimise(lambda: -likelihood(w * mask, b, prior, z, u, scales).mean(),
             [w, b, *prior.parameters()], steps=80)
    found = (w * mask).detach(), b.detach(), prior.requires_grad_(False)
    return found, likelihood(*found, z_held, u_held, scales)


def unmix(prior, z, u, z_held, u_held):
    """((W, b, prior), a dict for the log): the linear map of z that makes its latents independent.

    Where u moves means, the contrast finds z up to a linear map; the variances that u tells then
    fix the axes. W, the offset b and the prior are fitted to codes z (N, D) and u (N, U). They are
    accepted if they make held-out codes likelier than a fit without mixing does, and than one in
    which u tells no variances and so fixes no axes; each gain must exceed three times its error.
    Otherwise the first item is None.
    Source: Pham & Cardoso 2001; Hyvarinen & Morioka 2016.
    """
    codes = z, u, z_held, u_held
    found, held = fit_unmixing(prior, *codes)
    _, without = fit_unmixing(prior, *codes, mixes=False)
    _, no_scales = fit_unmixing(prior, *codes, scales=False)

    # each gain in units of its error; an image that was drawn twice counts once
    n = len(z_held.unique(dim=0))
    gains = []
    for other in (without, no_scales):
        gain = held - other
        gains.append((gain.mean() / gain.std() * n**0.5).item())
    accepted = all(gain > 3 for gain in gains)             # False if a fit failed and gave NaN
    told = {"from": without.mean().item(), "to": held.mean().item(),
            "gain in errors": min(gains), "accepted": accepted}
    return found if accepted else None, told


@torch.no_grad()
def draw_codes(model, data, n, held_out):
    """The means of q(z|x) (n, D) of n draws with a fixed seed, and their u (n, U)."""
    cfg = model.cfg
    generator = torch.Generator(data.device).manual_seed(1_000_003 + held_out)
    rows, u = data.draw(n, generator, cfg.u, cfg.u_scale, held_out)
    means = [model.encoder(data.images(part)).mean for part in rows.split(500)]
    return torch.cat(means), u


def draw_to_fit(model, data, step, most):
    """z and u of at most this many draws, then of 5,000 at most that are held out, see draw_codes.

    They are no more than the images that training saw: after few steps there is little to fit.
    """
    n_seen = step * model.cfg.batch_size
    trained = draw_codes(model, data, min(n_seen, most), held_out=False)
    held_out = draw_codes(model, data, min(n_seen, 5_000), held_out=True)
    return *trained, *held_out


def held_out_contrast(model, data, n_batches=8):
    """The contrast in nats, in batches as in training, on rows that training never sees if u is the
    data's own, else on fresh draws. Learning by heart lowers only the contrast of training."""
    n = model.cfg.batch_size
    z, u = draw_codes(model, data, n_batches * n, held_out=True)
    with torch.no_grad():
        losses = [idiff.contrast_loss(some, model.prior(their_u))
                  for some, their_u in zip(z.split(n), u.split(n))]
    return torch.stack(losses).mean().item()


def unmix_model(model, ema, optimizer, data, step):
    """Unmix z: the map goes into the encoder's last layer, the new prior into the model.

    Training goes on from the averaged weights, to which the map was fitted. Returns what unmix
    tells.
    """
    z, u, z_held, u_held = draw_to_fit(ema, data, step, most=20_000)
    if not z.isfinite().all():
        raise ValueError("the codes are not finite. Try a smaller --lr, or --precision float32.")
    result = [unmix(ema.prior, z, u, z_held, u_held)]
    if WORLD > 1:                                          # all take rank 0's result
        dist.broadcast_object_list(result)
    [(found, told)] = result

    if found:
        w, b, prior = (each.to(z.device) for each in found)
        ema.encoder.turn(w, b)
        ema.prior.load_state_dict(prior.state_dict())
        go_on_from(ema, model, optimizer)
    return told


def go_on_from(ema, model, optimizer):
    """Give a model the averaged encoder and prior. AdamW's moments, of other weights, go."""
    for name in ("encoder", "prior"):
        getattr(model, name).load_state_dict(getattr(ema, name).state_dict())
    optimizer.state.clear()


# ---- The prior's fit ----

def fit_prior(model, data, step):
    """Fit p(z|u) of a model to its own codes by maximum likelihood; z stays as it is.

    The contrast depends only on ratios of p(z|u) and leaves it 5 to 9 % too wide; beside it the KL
    is too light to correct this. The fit is kept if it makes held-out codes likelier.
    """
    prior = deepcopy(model.prior)
    weights = [p for p in prior.parameters() if p.requires_grad]
    if not model.cfg.contrast or not weights:              # no contrast, or nothing to fit
        return
    z, u, z_held, u_held = draw_to_fit(model, data, step, most=30_000)

    def surprise(prior, z, u):
        return -prior(u).log_prob(z).sum(dim=1).mean()

    # few steps: more of them would fit the noise of the draws
    minimise(lambda: surprise(prior, z, u), weights, steps=15)
    with torch.no_grad():
        if surprise(prior, z_held, u_held) < surprise(model.prior, z_held, u_held):
            model.prior.load_state_dict(prior.state_dict())


# ---- The run ----

def barrier():
    """Wait until all ranks are here."""
    if WORLD > 1:
        dist.barrier()


@torch.no_grad()
def mean_over_ranks(numbers):
    """A dict of scalar tensors as one of floats, each the mean over the ranks."""
    values = torch.stack(list(numbers.values()))
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(numbers, values.tolist()))


@contextmanager
def stop_signals():
    """A list that is empty until a signal to stop comes. Signals only add to the list; the run then
    stops after the current step. A closed terminal sends SIGHUP, and SLURM can send SIGUSR1 as a
    warning.

    Afterwards the former handlers are restored: a notebook may have its own.
    """
    stop = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # only this thread may
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)           # Windows lacks some
            if number is not None:
                before[number] = signal.signal(number, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(cfg, data, out=None, ivae=None, resume=None, info=None, save_every=500, log_every=20):
    """Train; returns the model in eval mode with averaged weights.

    The model's info has "out", the folder, and "validation", the ELBO on fresh draws and its terms.
    cfg: from recipe(data); out: the folder, by default a new one, and if it holds a checkpoint of
    the same run, that run goes on; ivae: a model whose parts, except the U-Net, are taken over and
    stay frozen; resume: path of a checkpoint whose run goes on, in its folder or in out; info: a
    dict that the checkpoint keeps. ValueError if something is impossible or a loss is not finite;
    KeyboardInterrupt after Ctrl-C or SIGTERM, once all is saved.
    """
    # where the run goes on: from the checkpoint that is named, or the one that its folder holds
    info = dict(info or {})
    if ivae is not None:                                   # so that a resumed run freezes it, too
        info.setdefault("frozen", "a model")
    first_step = log_size = 0
    if out and os.path.exists(f"{out}/ckpt.pt"):           # such as a job queued again
        resume = f"{out}/ckpt.pt"
        out = None
    if resume:
        content = idiff.read_checkpoint(resume, data.device)
        check_same(cfg, data, info, content, resume)
        info = {**content["info"], **data.source}          # the data may have moved
        if info.get("frozen"):
            ivae = idiff.load_checkpoint(resume, data.device)
    else:
        info = {**provenance(data), **info}

    # everything that can be wrong is found before a folder is made
    check_fit(cfg, data)
    model, ema, optimizers = build(cfg, data.device, ivae)
    watch = Watch(ema)
    if resume:
        first_step = restore(content, resume, model, ema, optimizers, watch)
        if not out:
            out = os.path.dirname(os.path.realpath(resume))                    # a link stays one
            log_size = content["log_size"]

    # the folder; only rank 0 writes
    model.info = info
    claimed = nullcontext()
    if RANK == 0:
        out = out or make_folder(cfg)
        claimed = open_log(out, cfg, log_size)
        print(describe(data, model), flush=True)
        if resume:
            print(f"goes on with '{resume}' after step {first_step}", flush=True)
    ema.info = {**info, "out": out}

    # train, then look at what came out
    with claimed:
        barrier()                                          # rank 0 has claimed the folder
        loop(model, ema, optimizers, watch, data, out, first_step, save_every, log_every)
        if RANK == 0:
            ema.info["validation"] = finish(ema.eval(), data, out)
    return ema.eval().requires_grad_(False)


class Pace:
    """Tells once if steps take more than twice as long as the fastest in their stage of the run."""

    def __init__(self):
        self.since = None, 0, 0.0                          # stage, step and time of the last look
        self.fastest = {}                                  # seconds of a step, by stage
        self.told = False

    def look(self, stage, step):
        """Call this now and then, with the number of steps done; stage None: between steps."""
        now = time.time()
        before, first, start = self.since
        if stage != before:
            self.since = stage, step, now
        elif now - start >= 2:                             # a shorter time says little
            self.since = stage, step, now
            seconds = (now - start) / (step - first)
            fastest = self.fastest[stage] = min(seconds, self.fastest.get(stage, seconds))
            if seconds > 2 * fastest and not self.told:
                self.told = True
                print(f"A step takes {seconds / fastest:.1f} times as long as before, perhaps "
                      "because other programs are busy. Ctrl-C and --resume choose the number of "
                      "threads anew.", file=sys.stderr)


def tell(out, step, what, told, text):
    """Log what happened before a step, the dict told, and print a text about it, on rank 0."""
    if RANK == 0:
        log(out, {"step": step, what: told})
        print(text, flush=True)


def check_finite(record, step, path):
    """ValueError, which tells of the checkpoint path, unless all numbers of a record are finite."""
    if not all(map(math.isfinite, record.values())):
        kept = "No checkpoint was written yet"
        if os.path.exists(path):
            kept = f"The checkpoint '{path}' is kept"
        raise ValueError(f"not finite at step {step}: {record}. {kept}; try a smaller --lr, or "
                         "--precision float32.")


class Watch:
    """Watches the contrast on rows of own u that training never sees, while encoder and prior
    settle, and keeps the best codes.

    Few images may be learned by heart: z then tells ever more of their u, and less of all others'.
    The decoder, which joins when settling ends, slows that.
    """

    MARGIN = 0.1                                           # nats; a smaller rise may be chance

    def __init__(self, model):
        cfg = self.cfg = model.cfg
        self.on = cfg.u == "own" and cfg.settle_steps > 0 and cfg.rec > 0
        parts = (model.encoder, model.prior) if self.on else ()
        self.best = torch.nn.ModuleList(map(deepcopy, parts))
        self.least = math.inf                              # the best codes' contrast, in nats
        self.step = 0                                      # at which they were
        self.settled = 0                                   # the step that ended settling early

    def config(self):
        """The Config to go on with, whose settling may have ended."""
        if not self.settled:
            return self.cfg
        return replace(self.cfg, settle=self.settled / self.cfg.ivae_steps)

    def worse(self, ema, data, step):
        """Whether the codes are worse than they were, by the margin. Better ones are kept."""
        due = step % max(20, self.cfg.ivae_steps // 40) == 0
        if not self.on or not due or step > self.config().settle_steps:
            return False
        value = torch.tensor(held_out_contrast(ema, data), device=data.device)
        if WORLD > 1:                                      # all take rank 0's result
            dist.broadcast(value, 0)
        if value < self.least:
            self.least, self.step = value.item(), step
            for best, part in zip(self.best, (ema.encoder, ema.prior)):
                best.load_state_dict(part.state_dict())
        return bool(value > self.least + self.MARGIN)

    def go_back(self, model, ema, optimizer, step):
        """Give both models the best codes and end settling. Returns what to log and to print."""
        for best, part in zip(self.best, (ema.encoder, ema.prior)):
            part.load_state_dict(best.state_dict())
        go_on_from(ema, model, optimizer)

        # from the next step on, unmixing first, the decoder learns, too
        self.settled = step
        told = {"back to": self.step, "held-out contrast": self.least}
        return told, (f"images are learned by heart: back to step {self.step}, where the held-out "
                      f"contrast was {self.least:.3f} nats; settling ends")

    def state(self):
        """What a checkpoint keeps, a dict."""
        numbers = [self.least, self.step, self.settled]
        return {"best": self.best.state_dict(), "numbers": numbers}

    def load(self, state):
        """Restore what state gave."""
        self.best.load_state_dict(state["best"])
        self.least, *steps = state["numbers"]
        if not all(type(n) is int and 0 <= n <= self.cfg.steps for n in steps):
            raise ValueError(f"steps {steps} of {self.cfg.steps}")
        self.step, self.settled = steps


def loop(model, ema, optimizers, watch, data, out, first_step, save_every, log_every):
    """Train from first_step to the end, logging and saving into the folder out."""
    cfg = watch.config()
    path = f"{out}/ckpt.pt"
    started = time.time()

    ranked = model
    if WORLD > 1:                                          # some are frozen or have no weight
        ranked = DistributedDataParallel(model, find_unused_parameters=True)

    pace = Pace()
    bar = progress(range(first_step, cfg.steps), "step", initial=first_step, total=cfg.steps)
    with stop_signals() as stop, bar:
        for step in bar:
            # between the stages of the run
            if step in cfg.unmix_steps:
                told = unmix_model(model, ema, optimizers[0], data, step)
                kept = "unmixed" if told["accepted"] else "kept, not surely likelier if unmixed"
                tell(out, step, "unmixing", told, f"latents {kept}: held-out log-likelihood from "
                     f"{told['from']:.3f} to {told['to']:.3f} nats")
            if step == max(cfg.ivae_steps, first_step):    # the U-Net learns alone
                freeze(model, ema)

            learned = step / cfg.ivae_steps if model.encoder.training else 1
            model.encoder.temperature = 0.3 ** learned     # of Gumbel-softmax
            batch = draw_batch(model, data, step)
            numbers = train_step(cfg, ranked, ema, optimizers, batch, step)
            done = step + 1

            # codes that are learned by heart go back to what they were
            if watch.worse(ema, data, done):
                told, text = watch.go_back(model, ema, optimizers[0], done)
                tell(out, done, "learned by heart", told, text)
                cfg = watch.config()
            if done == cfg.ivae_steps:
                fit_prior(ema, data, done)

            stopping = torch.tensor(len(stop))             # on any rank
            if WORLD > 1:
                dist.all_reduce(stopping)
            saving = done % save_every == 0 or done == cfg.steps or stopping
            if done % log_every == 0 or saving:            # the only wait for the device
                record = mean_over_ranks(numbers)
                if saving and cfg.model != "vae" and done <= cfg.ivae_steps and RANK == 0:
                    record["held-out contrast"] = held_out_contrast(ema, data)
                check_finite(record, done, path)
                if RANK == 0:
                    log(out, {"step": done, **record, "seconds": round(time.time() - started)})
                bar.set_postfix(record, refresh=False)
                pace.look((done > cfg.settle_steps, done > cfg.ivae_steps), done)

            if saving and RANK == 0:
                idiff.save_checkpoint(path, model, ema, step=done, watch=watch.state(),
                                      log_size=os.path.getsize(f"{out}/log.jsonl"),
                                      optimizers=[each.state_dict() for each in optimizers])
                pace.look(None, done)                      # time spent saving does not count
            if stopping:
                barrier()                                  # rank 0 has saved, so all end
                go_on = command(ema.info, "train", "--resume", path)
                raise KeyboardInterrupt(f"saved. Go on with: {go_on}")


@torch.no_grad()
def fresh_draws(model, data, n=4096):
    """The ELBO in nats per image (higher is better) on n draws with a fixed seed, and its terms.

    It is -(values / 2) log(2 pi e MSE) - KL, that of a Gaussian decoder with the best variance, so
    no lambda enters it.
    """
    cfg = model.cfg
    generator = torch.Generator(data.device).manual_seed(1_000_003)
    torch.manual_seed(0)                                   # for z's noise
    values = []
    for _ in range(n // 256):
        rows, u = data.draw(256, generator, cfg.u, cfg.u_scale, held_out=True)
        x = data.images(rows)
        terms = model(x, u, t=x[:0, 0, 0, 0], eps=x[:0])   # no images for the U-Net
        values.append(torch.stack(list(terms.values())))
    # means over all draws
    means = dict(zip(terms, torch.stack(values).mean(0).tolist()))

    # the best variance of a Gaussian decoder is its mean squared error
    entropy = math.prod(data.image_shape) / 2 * math.log(2 * math.pi * math.e * means["rec"])
    return {"elbo": -entropy - means["kl"], **means}


def describe(data, model):
    """The first lines that a run prints: what runs, on what, how long; and what the data hold."""
    cfg, info = model.cfg, model.info
    frozen = f", frozen iVAE of {info['frozen']}" if info.get("frozen") else ""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    prior = "N(0, 1)" if cfg.model == "vae" else cfg.prior
    factors = [f"{name} {len(values)} ({values[0]} to {values[-1]})"
               for name, values in zip(data.factor_names, data.values)]
    # of a u of one's own, what varies and what training never sees
    columns = (data.u.abs().amax(dim=0) > 0.5).sum()
    used = f"{len(data.held_out):,} images held out" if cfg.u == "own" else "not used"
    return (f"{data.device}, {torch.get_num_threads()} threads, ranks {WORLD}, size "
            f"{info.get('size', '-')}, method {info.get('method', '-')}{frozen}: {cfg.model}, "
            f"prior {prior}, u {cfg.u}; {data.name}; {millions:.2f} M parameters; {cfg.steps} "
            f"steps of {cfg.batch_size} images, {cfg.epochs:.2g} epochs\n"
            f"{len(data):,} images {data.image_shape}; own u: "
            f"{f'{columns} varying columns, {used}' if columns else 'none'}; "
            f"factors: {', '.join(factors) or 'none'}\n{data.note}")


def command(info, script, *argv):
    """The command line of a script, to be run from the current folder.

    If a file of the user's own beside the scripts started this run by main, which info then tells,
    the command goes through that file, because only it knows what it changed.
    """
    own = Path(sys.argv[0]).resolve()
    here = Path(__file__).resolve().parent
    file = [f"{script}.py"]
    # from a notebook's file the command would run the notebook again
    by_main = "method" in info and own.parent == here
    if by_main and own.stem not in ("train", "evaluate", "interpolate"):
        file = [own.name, script]
    file[0] = os.path.relpath(here / file[0])
    return shlex.join(["python", *file, *argv])


def finish(model, data, out):
    """End a run: fresh draws, pictures, the commands that come next. Returns the fresh draws'."""
    result = fresh_draws(model, data)
    log(out, {"step": model.cfg.steps, "validation": result})
    print(f"ELBO {result['elbo']:.0f} nats per image (mean squared error {result['rec']:.5f}, "
          f"KL {result['kl']:.1f} nats), averaged weights, 4,096 fresh draws")
    with drawing(f"{out}/losses.png") as path:
        draw_losses(path, out)
    with drawing(f"{out}/samples.png") as path:
        draw_samples(path, model, data)

    print("Next:")
    for script in ("evaluate", "interpolate"):
        print(" ", command(model.info, script, f"{out}/ckpt.pt"))
    return result


def draw_losses(path, out):
    """losses.png: each term, and the gradient's norm, by step."""
    curves = defaultdict(list)                             # {name: [(step, value), ...]}
    for line in Path(f"{out}/log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "seconds" in record:
            step = record.pop("step")
            del record["seconds"]
            for name, value in record.items():
                curves[name].append((step, value))
    if not curves:
        raise ValueError("log.jsonl, perhaps not the run's own, holds no steps")

    # a panel for each; all end at the last step
    figure, panels = idiff.panels(curves, (8, 2.2))
    for name, axis in panels:
        steps, values = zip(*curves[name])
        marker = "." if len(steps) < 10 else None          # a single point has no line
        axis.plot(steps, values, marker=marker)
        axis.set(title=f"{name} by step", xmargin=0, xlim=(0, step),
                 yscale="log" if 0 < 10 * min(values) < max(values) else "linear")
    figure.savefig(path)


@torch.no_grad()
def draw_samples(path, model, data):
    """samples.png: ten of the data's images, and as decoder and diffusion redraw them."""
    rows = torch.arange(10, device=data.device) * 245489 % len(data)           # far apart
    x = data.images(rows)
    z, _ = model.encode(x)
    pictures = {"image": x, "decoder": model.decode(z)}
    if model.unet is not None:
        pictures["diffusion"] = model.sample(z, torch.randn_like(x))
    idiff.save_grid(path, torch.cat(list(pictures.values())), list(pictures), [""] * 10)


# ---- The search ----

def search_space(kind, given, over, cfg):
    """{name: its values, or (low, high)}: the paper's Table 1 without what is given, plus --over.

    u is not searched if it is the data's own.
    """
    kinds = {f.name: f.type for f in fields(idiff.Config) if f.metadata["help"]}
    usual = GRID if kind == "grid" else SPACE
    space = {name: values for name, values in usual.items() if name not in given}
    if cfg.u == "own":
        space.pop("u", None)
    for name, *values in over:
        name = name.replace("-", "_")
        if name not in kinds or not values:
            raise ValueError(f"--over needs a flag and its values, got: {name} {' '.join(values)}.")
        space[name] = [kinds[name](value) for value in values]
    if not space:
        raise ValueError("nothing to search: flags give kl, rec and u. Add --over NAME VALUES.")
    return space


def open_study(out, name, direction):
    """The Optuna study of this name in the folder out, which workers on many machines may share."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")     # about experimental features
    logging.getLogger("optuna.storages").setLevel("WARNING")   # it tells who waits for a lock

    # the file is locked by another file, where a link may dangle
    begun = any(Path(out).glob("trial-*"))
    journal = optuna.storages.journal
    path = f"{out}/study.log"
    try:
        file = journal.JournalFileBackend(path, journal.JournalFileOpenLock(path))
        storage = optuna.storages.JournalStorage(file)
        names = optuna.get_all_study_names(storage)
    except Exception as error:         # a damaged file can raise anything
        raise ValueError(f"'{path}' holds no study: {in_one_line(error)}")
    if begun and name not in names:
        raise ValueError(f"'{out}' holds a search with other flags. Pass another --out.")
    return optuna.create_study(storage=storage, study_name=name, direction=direction,
                               load_if_exists=True)


def search(make, data, space, out, kind="bayes", objective="mig", trials=None, **flags):
    """An Optuna study of runs on data; workers started alike, at once or later, share it.

    make: function of fields of Config -> the Config of a trial; space: see search_space; trials:
    how many this process runs, unless none is left before; flags: for run. ValueError if a trial is
    impossible or none was completed.
    """
    import optuna
    cfg = make()
    if objective == "mig" and not data.factor_names:
        raise ValueError(f"MIG needs factors, which {data.name} lacks. Pass --objective contrast.")

    # what would fail in every trial fails before the first; both ends of a range are tried
    cells = list(product(*space.values()))
    for cell in cells:
        make(**dict(zip(space, cell)))
    idiff.try_folder(out)

    # the name of a study identifies its runs, so that a folder holds the trials of one study only
    told = str([kind, objective, space, asdict(cfg), data.fingerprint, flags.get("info")])
    name = f"{kind} {hashlib.sha256(told.encode()).hexdigest()}"
    direction = "maximize" if objective == "mig" else "minimize"
    study = open_study(out, name, direction)
    if kind == "grid":
        study.sampler = optuna.samplers.GridSampler(space, seed=0)
    else:
        # repeatable for a single worker, and different for one that joins
        seed = cfg.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def one(trial):
        chosen = {}
        for name, values in space.items():
            if isinstance(values, list):
                chosen[name] = trial.suggest_categorical(name, values)
            else:
                chosen[name] = trial.suggest_float(name, *values, log=name == "kl")
        return run_trial(trial, partial(make, **chosen), data, f"{out}/trial-{trial.number:03d}",
                         objective, flags)

    # one trial at a time, so that the table is always up to date
    for _ in range(trials or (len(cells) if kind == "grid" else 30)):
        waiting = study.get_trials(states=(optuna.trial.TrialState.WAITING,))
        if kind == "grid" and not waiting and study.sampler.is_exhausted(study):
            break
        study.optimize(one, 1)
        write_trials(study, out, space, objective)
    print(write_trials(study, out, space, objective))
    if all(trial.value is None for trial in study.trials):
        raise ValueError("no trial was completed.")
    return study


def run_trial(trial, make, data, folder, objective, flags):
    """The objective of a trial, measured after a run of its own in its own folder."""
    import evaluate
    try:
        model = run(make(), data, folder, **flags)
        if objective == "contrast":
            return model.info["validation"]["contrast"]
        report = evaluate.report(model, data, n=evaluate.N_SCORES, trees=False)
        evaluate.write_report(report, folder)
        return report["metrics"]["mig"]
    except (ValueError, MemoryError, RuntimeError) as error:   # the trial's own fault
        trial.set_user_attr("failed", in_one_line(error))
        return math.nan                                    # Optuna counts it as failed
    except BaseException as error:                         # a full disk, or a stop: it runs again
        trial.study.enqueue_trial(trial.params)
        if isinstance(error, Exception):
            raise
        raise KeyboardInterrupt("stopped. Go on with the same command.") from None


def write_trials(study, out, space, objective):
    """Write trials.md; returns its text: every trial, and the paper's Table 1."""
    rows = [["trial", *space, objective]]
    for trial in study.trials:
        result = trial.value
        if result is None:
            result = trial.user_attrs.get("failed", trial.state.name.lower())
        rows.append([trial.number, *(f"{trial.params.get(k)}" for k in space), result])
    text = idiff.table(zip(*rows))

    # what was best, beside the paper's Table 1
    if any(trial.value is not None for trial in study.trials):
        best = study.best_trial
        rows = [["hyperparameter", "search space", "best value", "the paper's best"]]
        for k, values in space.items():
            rows.append([k, values, f"{best.params[k]}", f"{PAPER.get(k)}"])
        text += f"\nBest: {out}/trial-{best.number:03d}/ckpt.pt\n\n{idiff.table(zip(*rows))}"
    Path(f"{out}/trials.md").write_text(text, "utf-8", "replace")
    return text


# ---- The command line ----

def prepare(args, given):
    """(make, data, the other arguments of run) by the flags; given: fields of Config among them.

    make: function of changes -> Config.
    """
    device = idiff.pick_device(args.device, LOCAL_RANK)
    flags = {"save_every": args.save_every, "log_every": args.log_every}

    # a run that goes on: everything is as its checkpoint says
    if args.resume:
        if args.paper or args.size != "small" or args.freeze_ivae or args.factor_sizes or given:
            raise ValueError(f"--resume {args.resume} goes on with the run as it was, without "
                             "flags that change it.")
        content = idiff.read_checkpoint(args.resume, device)
        data = idiff.data_of(content["info"], args.resume, device, args.data)
        return partial(idiff.Config, **content["config"]), data, {**flags, "resume": args.resume}

    # a new run, maybe on an iVAE that stays as it is
    ivae = None
    if args.freeze_ivae:
        ivae, data = idiff.open_checkpoint(args.freeze_ivae, device, args.data)
    else:
        data = idiff.load_data(args.data or "shapes3d", device, given.get("image_size"),
                               args.factor_sizes)
    if args.factor_sizes not in (None, data.factor_sizes):
        raise ValueError(f"--factor-sizes {args.factor_sizes} is for .npz and .h5 files without "
                         f"factors; those of {data.name} have {data.factor_sizes or 'no'} values.")
    flags.update(ivae=ivae, info={"size": args.size, "method": "paper" if args.paper else "recipe",
                                  "frozen": args.freeze_ivae})

    def make(**changes):
        try:
            return recipe(data, args.size, args.paper, ivae, **{**given, **changes})
        except ValueError as error:
            raise ValueError(f"--freeze-ivae {args.freeze_ivae}: {error}" if ivae else error) \
                from None
    return make, data, flags


def start(args):
    """Do what the flags ask for; returns the search's folder, or the run's and its validation."""
    idiff.use_free_cores()
    given = {f.name: getattr(args, f.name) for f in fields(idiff.Config) if hasattr(args, f.name)}
    searching = args.search or args.over or args.trials or args.objective != "mig"
    if searching and (not args.search or args.resume or WORLD > 1):
        raise ValueError("--over, --trials and --objective need --search, which takes neither "
                         "--resume nor torchrun: its own command resumes it.")
    make, data, flags = prepare(args, given)

    if args.search:
        space = search_space(args.search, given, args.over, make())
        out = args.out or f"runs/search-{args.search}"
        search(make, data, space, out, args.search, args.objective, args.trials, **flags)
        return {"out": out}
    model = run(make(), data, args.out, **flags)
    return {name: model.info.get(name) for name in ("out", "validation")}


def main(argv=None):
    """Run the command line. Returns {"out": folder, "validation": ELBO and its terms}, and of a
    search {"out": folder}."""
    with idiff.script("train.py", "--batch-size"):
        args = build_parser().parse_args(argv)
        try:
            if WORLD > 1:
                text = (f"rank {RANK} waits at {os.environ.get('MASTER_ADDR')} for all {WORLD} "
                        "ranks. If there are no others, unset RANK and WORLD_SIZE.")
                waiting = threading.Timer(10, warnings.warn, [text])
                waiting.daemon = True                      # it must not keep us from ending
                waiting.start()
                dist.init_process_group()                  # gloo on CPUs, nccl on GPUs
                waiting.cancel()
            result = start(args)
        except KeyboardInterrupt:
            if RANK > 0:                                   # rank 0 has saved, and tells
                sys.exit(0)
            raise
        except Exception:
            if RANK > 0:
                time.sleep(10)  # if rank 0 met it too, it tells, and torchrun ends us
            raise
        if WORLD > 1:
            barrier()                                      # all ranks end together
            sys.stdout.flush()
            os._exit(0)     # at once: gloo's threads now and then abort Python's own exit
        return result


if __name__ == "__main__":
    main()
