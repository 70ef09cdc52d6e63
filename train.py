# SPDX-License-Identifier: MIT
"""Train a VAE, an iVAE or an iDiff model.

    python train.py                                # the recipe: all six factors of 3D Shapes
    python train.py --paper --out runs/paper       # the paper's method at the same size
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
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

import evaluate
from idiff import (DATA_SETS, VPSDE, Config, IDiff, in_one_line, load_checkpoint, load_data,
                   pick_device, read_checkpoint, save_checkpoint, save_grid, script)

EPOCH = 480_000             # draws
SIZES = {"small": {},
         "full": dict(patch=2, width=128, unet_width=128, rec_images=0, ddpm_images=0,
                      batch_size=512, epochs=10.0, precision="bfloat16")}
PAPER = dict(latent_dim=10, prior="full", prior_mean="learned", u="var", kl=5e-4, rec=0.1,
             contrast=0.0, settle=0.0, predict="eps", batch_size=32, rec_images=0,
             ddpm_images=0, lr=2e-4, muon=0.0, schedule="constant")

# Fields of Config that a U-Net shares with the frozen iVAE that it is trained on.
IVAE = ("latent_dim", "latent", "categories", "prior", "prior_mean", "u", "u_scale", "width",
        "patch", "image_size", "image_channels", "n_factors", "n_u")

# The paper's Table 1, and a grid over it. Flags of WHERE do not change what a search finds.
SPACE = {"kl": (1e-5, 0.1), "rec": (0.01, 5.0), "u": ["var", "mean+var"]}
GRID = {"kl": [1e-5, 1e-4, 1e-3, 1e-2, 0.1], "rec": [0.01, 0.1, 1.0, 5.0], "u": SPACE["u"]}
WHERE = ("out", "trials", "storage", "device", "save_every", "log_every")

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
    add("--data", help=f"{', '.join(DATA_SETS)}, .h5 or .npz file, folder (default: shapes3d, or a "
        "frozen iVAE's)")
    add("--factor-sizes", type=sizes, metavar="V,V,...",
        help="numbers of values, where an .npz or .h5 file of a full grid lists no factors")
    add("--size", choices=SIZES, help="widths, batch, length (default: small)")
    add("--paper", action="store_true", help="the paper's method, at the same size")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    add("--out", help="folder of the run (default: a new one, runs/MODEL-sSEED or search-KIND)")
    add("--resume", metavar="CKPT", help="go on with the run of this checkpoint")
    add("--freeze-ivae", metavar="CKPT", help="train a U-Net on its frozen iVAE")
    add("--save-every", type=positive, default=500, metavar="N",
        help="steps per write of ckpt.pt (default: 500)")
    add("--log-every", type=positive, default=20, metavar="N",
        help="steps per line of log.jsonl (default: 20)")

    add = parser.add_argument_group("a search; the same command joins or resumes it").add_argument
    add("--search", choices=("grid", "bayes"), help="over what of kl, rec and u no flag gives")
    add("--over", nargs="+", action="append", default=[], metavar="NAME VALUE",
        help="a flag and its values to search too, as in --over prior known full")
    add("--trials", type=positive,
        help="how many this process runs (default: 30; grid: every cell)")
    add("--objective", choices=("mig", "contrast"), default="mig",
        help="contrast, on draws of a fixed seed, needs no labels (mig)")
    add("--storage", metavar="URL", help="a database in place of the file study.log in --out")

    add = parser.add_argument_group("what changes the numbers; defaults: the recipe").add_argument
    for f in fields(Config):
        if f.metadata["help"]:
            add("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                choices=f.metadata["choices"], help=f"{f.metadata['help']} (default: {f.default})")

    if RANK > 0:                                           # rank 0 tells what is wrong
        parser.error = lambda message: sys.exit(0)
    return parser


def positive(text):
    """The whole number of a text; ValueError unless at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def sizes(text):
    """The whole numbers, at least 1 each, of a text as 4,3,2."""
    return tuple(map(positive, text.split(",")))


# ---- Ranks ----

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


# ---- Config, folder and log ----

def given(args):
    """{name: value} of Config's flags that were given."""
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def make_config(args, data, ivae):
    """Config of the flags: size gives way to --paper, both to flags; all must fit a frozen ivae."""
    # what a frozen iVAE leaves no choice of
    fixed = {}
    if ivae is not None:
        fixed = {name: getattr(ivae.cfg, name) for name in IVAE}
        fixed.update(model="idiff", settle=0.0)

    # from the weakest word to the strongest
    values = dict(SIZES[args.size or "small"])
    if args.paper:
        values.update(PAPER)
    if data.u.numel() or not len(data.varied):
        values["u"] = "own"
    values.update(fixed)
    values.update(given(args))
    channels, side, _ = data.image_shape
    if getattr(args, "image_size", side) != side:
        raise ValueError(f"--image-size resizes files; {data.name} has images of {side} pixels.")
    if args.factor_sizes not in (None, data.factor_sizes):
        raise ValueError(f"--factor-sizes {args.factor_sizes} is for .npz and .h5 files without "
                         f"factors; those of {data.name} have {data.factor_sizes or 'no'} values.")
    values.update(image_size=side, image_channels=channels, n_factors=len(data.varied),
                  n_u=data.u.shape[1])
    cfg = Config(**values)

    for name, value in fixed.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"--freeze-ivae {args.freeze_ivae} needs {name} {value}, got "
                             f"{getattr(cfg, name)}.")

    # lengths and counts as they come out
    steps = cfg.steps or max(1, round(cfg.epochs * EPOCH / cfg.batch_size))
    rec_images = min(cfg.rec_images or cfg.batch_size, cfg.batch_size)
    ddpm_images = min(cfg.ddpm_images or cfg.batch_size, cfg.batch_size)
    return replace(cfg, steps=steps, epochs=steps * cfg.batch_size / EPOCH,
                   rec_images=rec_images, ddpm_images=ddpm_images)


def check_fit(cfg, info, data, args):
    """ValueError if a run cannot go on with these data, or ranks cannot share its batches."""
    if info["fingerprint"] != data.fingerprint:
        raise ValueError(f"'{args.resume}' was trained on other data than '{data.name}': on "
                         f"{info['data']}. Pass those by --data, or train anew.")

    shared = (cfg.batch_size, cfg.rec_images, cfg.ddpm_images)
    if any(n % WORLD for n in shared):
        raise ValueError(f"--batch-size, --rec-images and --ddpm-images: {WORLD} ranks share each "
                         f"evenly, got {shared}.")


def claim(folder):
    """Whether the folder, made if need be, is this run's: of two at once one makes its log."""
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(f"{folder}/ckpt.pt"):
        return False
    try:
        open(f"{folder}/log.jsonl", "x").close()
    except FileExistsError:
        return False
    return True


def make_folder(out, cfg):
    """The run's folder, claimed; an explicit --out must not hold a run already."""
    first = f"runs/{cfg.model}-s{cfg.seed}"
    folder = out or first
    n = 1
    while not claim(folder):
        if out:
            raise ValueError(f"'{out}' already holds a run. Pass another --out, delete it, or go "
                             f"on with it: --resume {shlex.quote(out + '/ckpt.pt')}")
        n += 1
        folder = f"{first}-{n}"
    return folder


def provenance(args, data, data_arg, factor_sizes):
    """What a checkpoint says of its origin."""
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, errors="replace",
                            capture_output=True, cwd=Path(__file__).parent)
    return {"data": data.name,
            "data_arg": data_arg if data_arg in DATA_SETS else os.path.abspath(data_arg),
            "fingerprint": data.fingerprint,
            "image_size": data.image_shape[1],
            "factor_sizes": factor_sizes,
            "size": args.size or "small",
            "method": "paper" if args.paper else "recipe",
            "frozen": args.freeze_ivae,
            "commit": commit.stdout.strip() or "unknown",
            "torch": f"{torch.__version__}"}               # a checkpoint takes plain text


def log(out, record):
    """The one place where numbers leave, of rank 0 alone: a line of log.jsonl in the folder out.

    record: {"config": dict} first; {"step": int, a float per term, ...}; last the validation's.
    """
    with open(f"{out}/log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


# ---- Model and optimisers ----

class Muon(torch.optim.Optimizer):
    """Steps of one size along every singular vector of the momentum, for weights seen as matrices.

    The momentum is 0.9. A kernel (O, I, h, w) is a matrix (O, I h w). Weights of a group have one
    shape, and step at once: on a GPU the host's calls take most of the time. Source: Jordan et al.
    2024.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]       # that learn yet
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
    """Matrices m (N, R, C), their singular values moved to about 1: five Newton-Schulz steps."""
    if m.shape[1] > m.shape[2]:
        return orthogonalise(m.mT).mT
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = m @ m.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        m = torch.baddbmm(m, polynomial, m, beta=3.4445)
    return m


def build(cfg, device, ivae=None):
    """Model, its averaged copy and optimisers, seeded.

    Given a model ivae, all but the U-Net are its own, for good: they get no gradient.
    """
    torch.manual_seed(cfg.seed)
    model = IDiff(cfg)

    # a frozen iVAE
    if ivae is not None:
        for name in ("encoder", "prior", "decoder"):
            setattr(model, name, getattr(ivae, name))      # in eval mode: BatchNorm is as it was
    model.to(device, memory_format=torch.channels_last)
    ema = deepcopy(model)

    # networks only: distributions are built outside of compiled parts
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True        # without a compiler: uncompiled
        for part in (model.encoder.net, model.decoder, model.unet):
            if part is not None:
                part.compile()

    # the matrices of what draws images go to Muon, all else to AdamW
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


def restore(content, model, ema, optimizers):
    """Put a checkpoint's content back; returns the step to go on from. Many errors, if it fails."""
    model.load_state_dict(content["model"])
    ema.load_state_dict(content["ema"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
        for p, state in optimizer.state.items():
            shapes = {moment.shape for name, moment in state.items() if name != "step"}
            if shapes - {p.shape}:                         # torch would crash
                raise ValueError(f"moments of a {p.shape} weight are {shapes}")
    return int(content["step"])


# ---- One step ----

def warmth(cfg, step):
    """Share of the peak learning rates: up over 100 steps, then 1, or half a cosine down to 0."""
    share = min(1.0, (step + 1) / 100)
    if cfg.schedule == "cosine":
        share *= 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)
    return share


def draw_batch(cfg, data, step):
    """x, u, t, eps of one step, drawn from seed and step alone; t is stratified.

    x: (B, C, H, W); u: (B, U); t: (b,), eps: (b, C, H, W) for the b images of the U-Net. Ranks draw
    the same and keep each WORLD-th row, of u all, their own first: their mean is one process's, but
    for z's noise, which each draws itself. Source of the strata: Kingma et al. 2021.
    """
    # all random numbers of the step, whatever was drawn before: a resumed run draws the same
    device = data.device
    generator = torch.Generator(device).manual_seed(hash((cfg.seed, step)))
    torch.manual_seed(hash((cfg.seed, step, RANK)))        # for z's noise
    rows, u = data.draw(cfg.batch_size, generator, cfg.u, cfg.u_scale)
    x = data.images(rows)

    # for the U-Net's images one time in each of b equal parts of (0, 1], or of what stands for it
    b = 0 if step < cfg.settle_steps else cfg.ddpm_images
    stratum = torch.arange(b, device=device)
    t = (stratum + torch.rand(b, generator=generator, device=device)) / max(b, 1)
    t = t.clamp(min=1e-5)
    if cfg.predict == "residual":
        low, high = IDiff.RATIOS
        log_ratio = math.log(low) + t * math.log(high / low)
        t = VPSDE().t_of_lam(-log_ratio)
    eps = torch.randn(x[:b].shape, generator=generator, device=device)

    # the layout that the networks' convolutions are fast in
    x = x.contiguous(memory_format=torch.channels_last)
    u = torch.cat([u[(RANK + i) % WORLD::WORLD] for i in range(WORLD)])
    return x[RANK::WORLD], u, t[RANK::WORLD], eps[RANK::WORLD]


def total_loss(cfg, terms, step):
    """Eq. 2: L = L_DDPM + lambda_rec L_rec + lambda_KL L_KL, and what goes beyond the paper.

    Returns the sum and the terms in it.
    """
    # as long as no decoder learns, nothing would hold q(z|x) narrow
    kl = 0.0 if step < cfg.settle_steps else cfg.kl
    weights = {"ddpm": 1.0,
               "rec": cfg.rec,
               "kl": kl,
               "kl_reverse": kl * cfg.kl_reverse,
               "contrast": cfg.contrast}

    # a term of weight 0 may overflow, and 0 * inf is no number
    used = {name: term for name, term in terms.items() if weights[name]}
    loss = sum(weights[name] * term for name, term in used.items())
    return loss, used


def average(ema, model, decay):
    """Move the weights of ema towards the model's; what is no weight, as BatchNorm's, is copied.

    Unlike torch's AveragedModel it lets the host run ahead of the device.
    """
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
    for old, new in zip(ema.buffers(), model.buffers()):
        old.copy_(new)


def train_step(cfg, model, ema, optimizers, batch, step):
    """One step; returns the terms that have a weight and the gradient's norm."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * warmth(cfg, step)

    # at first encoder and prior learn alone
    n_rec = 0 if step < cfg.settle_steps else cfg.rec_images
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
        terms = model(*batch, n_rec=n_rec // WORLD)
    loss, used = total_loss(cfg, terms, step)

    # descend, with the gradient's norm bounded, and average the weights
    model.zero_grad()
    loss.backward()
    gradient_norm = clip_grad_norm_(model.parameters(), cfg.clip)
    for optimizer in optimizers:
        optimizer.step()
    average(ema, model, min(cfg.ema, (step + 1) / (step + 10)))                # warm-up
    return {**used, "gradient norm": gradient_norm}


# ---- The run ----

@contextmanager
def stop_signals():
    """A list, empty until Ctrl-C or SIGTERM; these do no more, for a run ends after a whole step.

    What they did before they do again afterwards: a notebook may have handlers of its own.
    """
    stop = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # only it may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(cfg, data, out, args, parts, first_step):
    """Train from first_step to cfg.steps, logging and saving into the folder out."""
    model, ema, optimizers = parts
    path = f"{out}/ckpt.pt"
    started = time.time()

    ranked = model
    if WORLD > 1:                                          # unused: frozen, or of no weight
        ranked = DistributedDataParallel(model, find_unused_parameters=True)

    steps = range(first_step, cfg.steps)
    bar = evaluate.progress(steps, "step", initial=first_step, total=cfg.steps, disable=RANK > 0)
    with stop_signals() as stop, bar:
        for step in bar:
            model.encoder.temperature = 0.3 ** (step / cfg.steps)      # of Gumbel-softmax
            batch = draw_batch(cfg, data, step)
            numbers = train_step(cfg, ranked, ema, optimizers, batch, step)
            done = step + 1

            stopping = torch.tensor(len(stop))             # of any rank
            if WORLD > 1:
                dist.all_reduce(stopping)
            saving = done % args.save_every == 0 or done == cfg.steps or stopping
            if done % args.log_every == 0 or saving:       # the only wait for the device
                record = mean_over_ranks(numbers)
                if not all(map(math.isfinite, record.values())):
                    raise ValueError(f"not finite at step {done}: {record}. The last good "
                                     "checkpoint is kept; try a smaller --lr, or --precision "
                                     "float32.")
                if RANK == 0:
                    log(out, {"step": done, **record, "seconds": round(time.time() - started)})
                bar.set_postfix(record, refresh=False)

            if saving and RANK == 0:
                save_checkpoint(path, model, ema, step=done,
                                log_size=os.path.getsize(f"{out}/log.jsonl"),
                                optimizers=[each.state_dict() for each in optimizers])
            if stopping:
                barrier()                                  # rank 0 has saved: all end
                sys.exit(0 if RANK else
                         f"saved. Go on with: {command('train')} --resume {shlex.quote(path)}")


@torch.no_grad()
def validate(cfg, model, data, n=4096):
    """ELBO in nats per image, higher is better, on n modulated draws of a fixed seed; its terms.

    -(values / 2) log(2 pi e MSE) - KL, a Gaussian decoder of the best variance: no lambda in it.
    """
    generator = torch.Generator(data.device).manual_seed(1_000_003)
    torch.manual_seed(0)                                   # of z's noise
    values = []
    for _ in range(n // 256):
        rows, u = data.draw(256, generator, cfg.u, cfg.u_scale)
        x = data.images(rows)
        terms = model(x, u, t=x[:0, 0, 0, 0], eps=x[:0])   # no images for the U-Net
        values.append(torch.stack(list(terms.values())))
    means = dict(zip(terms, torch.stack(values).mean(0).tolist()))

    # the best variance of a Gaussian decoder is its mean squared error
    entropy = math.prod(data.image_shape) / 2 * math.log(2 * math.pi * math.e * means["rec"])
    return {"elbo": -entropy - means["kl"], **means}


def describe(cfg, data, model):
    """The first lines: what runs, on what, and how much of it; what the data hold."""
    frozen = f", frozen iVAE of {model.info['frozen']}" if model.info["frozen"] else ""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    prior = "N(0, 1)" if cfg.model == "vae" else cfg.prior
    factors = [f"{name} {len(values)} ({values[0]} to {values[-1]})"
               for name, values in zip(data.factor_names, data.values)]
    return (f"{data.device}, {torch.get_num_threads()} threads, ranks {WORLD}, size "
            f"{model.info['size']}, method {model.info['method']}{frozen}: {cfg.model}, prior "
            f"{prior}, u {cfg.u}; {data.name}; {millions:.2f} M parameters; {cfg.steps} steps of "
            f"{cfg.batch_size} images, {cfg.epochs:.2g} epochs\n"
            f"{len(data):,} images {data.image_shape}; own u: "
            f"{(data.u.abs().amax(dim=0) > 0.5).sum() or 'no'} varying columns; "
            f"factors: {', '.join(factors) or 'none'}\n{data.note}")


def draw_losses(path, out):
    """losses.png: each term, and the gradient's norm, by step."""
    records = [json.loads(line) for line in Path(f"{out}/log.jsonl").read_text().splitlines()]
    names = list(records[-2])[1:-1]                        # but "step" and "seconds"
    figure, axes = evaluate.panels(len(names), (8, 2.2))
    for axis, name in zip(axes, names):
        points = [(r["step"], r[name]) for r in records if name in r]
        axis.plot(*zip(*points))
        axis.set(title=f"{name} by step", xmargin=0, xlim=(0, None),
                 yscale="linear" if name == "contrast" else "log")
    figure.savefig(path, dpi=150)


@torch.no_grad()
def draw_samples(path, model, data):
    """samples.png: ten of the data's images, and as decoder and diffusion redraw them."""
    rows = torch.arange(10, device=data.device) * 245489 % len(data)           # far apart
    x = data.images(rows)
    z, _ = model.encode(x)
    pictures = {"image": x, "decoder": model.decode(z)}
    if model.unet is not None:
        pictures["diffusion"] = model.sample(z, torch.randn_like(x))
    save_grid(path, torch.cat(list(pictures.values())), list(pictures), [""] * 10)


def command(name):
    """How to call a script: through the user's own file, if it stands here and started this run."""
    own = Path(sys.argv[0]).resolve()
    here = Path(__file__).resolve()
    if own != here and own.parent == here.parent:
        return f"python {shlex.quote(own.name)} {name}"
    return f"python {name}.py"


def finish(cfg, data, out, model):
    """Validation ELBO, pictures and the two commands that come next; returns the first."""
    result = validate(cfg, model, data)
    log(out, {"step": cfg.steps, "validation": result})
    print(f"ELBO {result['elbo']:.0f} nats per image (mean squared error {result['rec']:.5f}, "
          f"KL {result['kl']:.1f} nats), averaged weights, 4,096 draws")
    with evaluate.drawing(Path(f"{out}/losses.png")) as path:
        draw_losses(path, out)
    with evaluate.drawing(Path(f"{out}/samples.png")) as path:
        draw_samples(path, model, data)
    path = shlex.quote(f"{out}/ckpt.pt")
    print(f"Next:\n  {command('evaluate')} {path}\n  {command('interpolate')} {path}")
    return result


def prepare(args):
    """What a run is made of: content of --resume, a frozen iVAE, data, config and provenance.

    ValueError, OSError or ImportError where the input is wrong; nothing is made yet.
    """
    device = pick_device(args.device, LOCAL_RANK)

    # what goes before: the run's own checkpoint, or another's iVAE that stays as it is
    content = ivae = None
    before = {"data_arg": "shapes3d"}
    origin = args.resume or args.freeze_ivae
    if args.resume:
        content = read_checkpoint(args.resume, device)
        before = content["info"]
        changes = (args.out, args.paper, args.size, args.freeze_ivae, args.factor_sizes,
                   given(args))
        if any(changes):
            raise ValueError("--resume goes on with the run as it was, without flags that change "
                             "it.")
    if args.freeze_ivae or before.get("frozen"):
        ivae = load_checkpoint(origin, device)
        before = ivae.info
        if ivae.cfg.model == "vae":
            raise ValueError(f"'{origin}' is a VAE: there is no p(z|u) to freeze.")

    # data
    data_arg = args.data or evaluate.find_data(before, origin or "")
    side = getattr(args, "image_size", before.get("image_size"))
    factor_sizes = args.factor_sizes or before.get("factor_sizes")
    data = load_data(data_arg, device, partial(evaluate.progress, disable=RANK > 0), side,
                     factor_sizes)

    # config
    info = provenance(args, data, data_arg, factor_sizes)
    if content:
        cfg = Config(**content["config"])
        info.update(content["info"], data_arg=info["data_arg"])    # it may have moved
    else:
        cfg = make_config(args, data, ivae)
        evaluate.warn_of_other_data(data, before, origin)
    check_fit(cfg, info, data, args)
    return content, ivae, data, cfg, info


def run(args):
    """One run, from its first line to its last; its validation on rank 0."""
    content, ivae, data, cfg, info = prepare(args)

    # model
    device = data.device
    model, ema, optimizers = build(cfg, device, ivae)
    model.info = info
    first_step = 0
    if content:
        try:
            first_step = restore(content, model, ema, optimizers)
            log_size = int(content["log_size"])
        except Exception as error:                         # of torch: many
            raise ValueError(f"'{args.resume}' holds no state to resume from: "
                             f"{type(error).__name__}, {in_one_line(error)}")

    # folder, once nothing can be wrong, and loop
    out = os.path.dirname(args.resume or "") or "."
    if RANK == 0:                                          # no other writes
        if content:
            with open(f"{out}/log.jsonl", "a") as file:    # the steps since then are run again
                file.truncate(min(file.tell(), log_size))
        else:
            out = make_folder(args.out, cfg)
            log(out, {"config": asdict(cfg)})
        print(describe(cfg, data, model), flush=True)
    barrier()                                              # rank 0 has claimed the folder
    train(cfg, data, out, args, (model, ema, optimizers), first_step)
    if RANK == 0:
        return finish(cfg, data, out, ema.eval())


# ---- The search ----

def search_space(args, cfg):
    """{name: its values, or (low, high)}: the paper's Table 1 less what flags give, and --over.

    Nor is u searched where it is the data's own.
    """
    kinds = {f.name: f.type for f in fields(Config) if f.metadata["help"]}
    usual = GRID if args.search == "grid" else SPACE
    space = {name: values for name, values in usual.items() if not hasattr(args, name)}
    if cfg.u == "own":
        space.pop("u", None)
    for name, *values in args.over:
        name = name.replace("-", "_")
        if name not in kinds or not values:
            raise ValueError(f"--over needs a flag and its values, got: {name} {' '.join(values)}.")
        space[name] = [kinds[name](value) for value in values]
    if not space:
        raise ValueError("nothing to search: flags give kl, rec and u. Add --over NAME VALUES.")
    return space


def open_study(args, out):
    """The Optuna study of these flags, in the folder out or in --storage."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")     # of what is experimental there
    logging.getLogger("optuna.storages").setLevel("WARNING")   # who waits for a lock says so

    # a study's name tells its flags; a folder holds the trials of one
    same = [item for item in sorted(vars(args).items()) if item[0] not in WHERE]
    name = f"{args.search} {hashlib.sha256(str(same).encode()).hexdigest()}"
    begun = any(Path(out).glob("trial-*"))

    storage = args.storage
    try:
        if storage:                                        # there, a killed trial runs again
            storage = optuna.storages.RDBStorage(
                storage, heartbeat_interval=60,
                failed_trial_callback=lambda study, trial: study.enqueue_trial(trial.params))
        else:
            journal = optuna.storages.journal
            path = f"{out}/study.log"
            # locked by a file, where a link may dangle
            file = journal.JournalFileBackend(path, journal.JournalFileOpenLock(path))
            storage = optuna.storages.JournalStorage(file)
        names = optuna.get_all_study_names(storage)
    except Exception as error:                             # of databases: many
        raise ValueError(f"'{args.storage or out}' holds no studies: {in_one_line(error)}")
    if begun and name not in names:
        raise ValueError(f"'{out}' holds a search by other flags. Pass another --out.")
    direction = "maximize" if args.objective == "mig" else "minimize"
    return optuna.create_study(storage=storage, study_name=name, direction=direction,
                               load_if_exists=True)


def search(args):
    """Trials until none is left; workers started alike, at once or later, share the study."""
    if not args.search or args.resume or WORLD > 1:
        raise ValueError("--over, --trials, --objective and --storage need --search; and that goes "
                         "without --resume and torchrun: its own command resumes it.")
    import optuna

    # what would fail in every trial fails before the first; of a range both ends are tried
    _, ivae, data, cfg, _ = prepare(args)
    space = search_space(args, cfg)
    if args.objective == "mig" and not data.factor_names:
        raise ValueError(f"MIG needs factors, which {data.name} lacks. Pass --objective contrast.")
    cells = list(product(*space.values()))
    for cell in cells:
        make_config(argparse.Namespace(**vars(args) | dict(zip(space, cell))), data, ivae)
    del data                                               # each trial loads its own
    out = args.out or f"runs/search-{args.search}"
    evaluate.try_folder(out)

    # the study, shared with other workers
    study = open_study(args, out)
    grid = args.search == "grid"
    if grid:
        study.sampler = optuna.samplers.GridSampler(space, seed=0)
    else:
        study.sampler = optuna.samplers.TPESampler(constant_liar=True)
    n_trials = args.trials or (len(cells) if grid else 30)

    # one trial at a time, so that the table is always up to date
    for _ in range(n_trials):
        waiting = study.get_trials(states=(optuna.trial.TrialState.WAITING,))
        if grid and not waiting and study.sampler.is_exhausted(study):
            break
        study.optimize(lambda trial: run_trial(trial, args, out, space), 1)
        write_trials(study, args, out, space)
    print(write_trials(study, args, out, space))
    if all(trial.value is None for trial in study.trials):
        raise ValueError("no trial was completed.")


def run_trial(trial, args, out, space):
    """The objective: a run of its own in its own folder, and what evaluate.py says of it."""
    folder = f"{out}/trial-{trial.number:03d}"
    chosen = {}
    for name, values in space.items():
        if isinstance(values, list):
            chosen[name] = trial.suggest_categorical(name, values)
        else:
            chosen[name] = trial.suggest_float(name, *values, log=name == "kl")
    try:
        result = run(argparse.Namespace(**{**vars(args), **chosen, "out": folder}))
        if args.objective == "contrast":
            return result["contrast"]
        argv = ["--no-dci", "--n", "10000", "--", f"{folder}/ckpt.pt"]
        flags = evaluate.build_parser().parse_args(argv)
        flags.device = args.device
        report, parts = evaluate.report(flags.paths[0], flags)
        evaluate.write_report(report, parts, Path(folder))
        return report["metrics"]["mig"]
    except (ValueError, MemoryError, RuntimeError) as error:   # the trial's own
        trial.set_user_attr("failed", in_one_line(error))
        return math.nan                                    # to Optuna a failed trial
    except BaseException as error:                         # it runs again
        trial.study.enqueue_trial(trial.params)
        if isinstance(error, Exception):
            raise
        raise KeyboardInterrupt("stopped. Go on by the same command.") from None


def write_trials(study, args, out, space):
    """Write trials.md and search.png; returns the text: every trial, and the paper's Table 1."""
    rows = [["trial", *space, args.objective]]
    for trial in study.trials:
        result = trial.value
        if result is None:
            result = trial.user_attrs.get("failed", trial.state.name.lower())
        rows.append([trial.number, *(f"{trial.params.get(k)}" for k in space), result])
    text = evaluate.table(zip(*rows))

    # what was best, beside the paper's Table 1
    done = [trial for trial in study.trials if trial.value is not None]
    if done:
        best = study.best_trial
        rows = [["hyperparameter", "search space", "best value", "the paper's best"]]
        for k, values in space.items():
            rows.append([k, values, f"{best.params[k]}", f"{PAPER.get(k)}"])
        text += f"\nBest: {out}/trial-{best.number:03d}/ckpt.pt\n\n{evaluate.table(zip(*rows))}"

        with evaluate.drawing(Path(f"{out}/search.png")) as path:
            figure, axes = evaluate.panels(len(space), (6, 2.5))
            for axis, k in zip(axes, space):
                axis.scatter([trial.params[k] for trial in done], [trial.value for trial in done])
                axis.set(xlabel=k, ylabel=args.objective)
                if k == "kl":
                    axis.set_xscale("log")
            figure.savefig(path, dpi=150)
    Path(f"{out}/trials.md").write_text(text, "utf-8", "replace")
    return text


def main(argv=None):
    with script("train.py", "--batch-size"):
        args = build_parser().parse_args(argv)
        try:
            if WORLD > 1:
                dist.init_process_group()                  # gloo on CPUs, nccl on GPUs
            if (args.search or args.over or args.trials or args.storage
                    or args.objective != "mig"):
                search(args)
            else:
                run(args)
        except (Exception, KeyboardInterrupt):
            if RANK > 0:
                time.sleep(10)  # if rank 0 met it too it tells, and torchrun ends us before
            raise
        if WORLD > 1:
            barrier()                                      # all ranks end together
            sys.stdout.flush()
            os._exit(0)     # at once: gloo's threads now and then abort Python's own exit


if __name__ == "__main__":
    main()
