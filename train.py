# SPDX-License-Identifier: MIT
"""Train a VAE, an iVAE or an iDiff model.

    python train.py                                # the recipe: all six factors of 3D Shapes
    python train.py --paper --out runs/paper       # the paper's method at the same size
"""

import argparse
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from idiff import (Config, IDiff, load_data, losses, read_checkpoint, save_checkpoint,
                   save_grid, seeded_noise)

EPOCH = 480_000                                    # draws, the size of 3D Shapes
SIZES = {"small": {},
         "full": dict(patch=2, width=128, unet_width=128, batch_size=128, rec_images=0,
                      ddpm_images=0, epochs=10.0, lr=5e-4, ema=0.9995, precision="bfloat16")}
PAPER = dict(latent_dim=10, prior="full", u="var", kl=5e-4, rec=0.1, kl_mean=0.0,
             predict="eps", condition="z", weight="eps", batch_size=32, rec_images=0, lr=2e-4,
             schedule="constant")

def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, usage="python train.py [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_argument_group("the run")
    run.add_argument("--data",
                     help="shapes3d, dsprites, or a path to .h5 or .npz (default: shapes3d)")
    run.add_argument("--size", choices=SIZES, help="widths, batch and length "
                     "(default: full where CUDA is present, else small)")
    run.add_argument("--paper", action="store_true", help="the paper's method, at the same size")
    run.add_argument("--device", help="cpu, cuda or mps (default: cuda where present)")
    run.add_argument("--out", help="folder of the run (default: a new one, runs/MODEL-sSEED)")
    run.add_argument("--resume", metavar="CKPT", help="go on with the run of this checkpoint")
    run.add_argument("--save-every", type=int, default=500, metavar="STEPS",
                     help="steps between writes of ckpt.pt (default: 500)")
    run.add_argument("--log-every", type=int, default=20, metavar="STEPS",
                     help="steps between lines of log.jsonl (default: 20)")
    config = parser.add_argument_group("what changes the numbers; defaults are the recipe's")
    for f in fields(Config):
        if f.metadata["help"]:
            config.add_argument("--" + f.name.replace("_", "-"), type=type(f.default),
                                default=argparse.SUPPRESS, choices=f.metadata["choices"],
                                help=f"{f.metadata['help']} (default: {f.default})")
    return parser

# ---- what to train, and where ----

def pick_device(name):
    """The torch.device of --device; ValueError in one line if it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not one of cpu, cuda, mps")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}. "
                         "Try --device cpu.") from None
    return device

def make_config(args, data):
    """Config of the flags: size gives way to --paper, and both to explicit flags."""
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    values = SIZES[args.size] | (PAPER if args.paper else {}) | given
    channels, height, width = data.image_shape
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}. Crop or resize them.")
    cfg = Config(**values, image_size=height, image_channels=channels,
                 n_factors=sum(size > 1 for size in data.factor_sizes))
    steps = cfg.steps or max(1, round(cfg.epochs * EPOCH / cfg.batch_size))
    return replace(cfg, steps=steps, epochs=steps * cfg.batch_size / EPOCH,
                   ddpm_images=min(cfg.ddpm_images or cfg.batch_size, cfg.batch_size))

def make_folder(args, cfg):
    """The run's folder, made; an explicit --out must not hold a run already."""
    out = args.out or f"runs/{cfg.model}-s{cfg.seed}"
    n = 1
    while os.path.exists(os.path.join(out, "log.jsonl")):
        if args.out:
            raise ValueError(f"'{out}' already holds a run. Pass another --out, delete it, or go "
                             f"on with it: --resume {out}/ckpt.pt")
        n += 1
        out = f"runs/{cfg.model}-s{cfg.seed}-{n}"
    os.makedirs(out, exist_ok=True)
    open(os.path.join(out, "log.jsonl"), "a").close()     # fails now if it cannot be written
    return out

def build(cfg, device):
    """Model, its averaged copy, optimiser and the data's random generator, all seeded."""
    torch.manual_seed(cfg.seed)
    model = IDiff(cfg).to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model)                            # train_step sets its rule, which warms up
    if device.type == "cuda":
        for part in filter(None, (model.encoder, model.decoder, model.unet)):
            part.compile()
        torch._dynamo.config.suppress_errors = True               # no compiler: uncompiled
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.0, fused=True)
    return model, ema, optimizer, torch.Generator(device).manual_seed(cfg.seed + 1)

# ---- one step ----

def kl_weight(cfg, step):
    """lambda_KL at a step: geometrically from max(kl_start, kl) to kl over 60 % of the steps."""
    if cfg.kl_start <= cfg.kl or cfg.kl == 0:
        return cfg.kl
    return cfg.kl * (cfg.kl_start / cfg.kl) ** max(0.0, 1 - step / (0.6 * cfg.steps))

def learning_rate(cfg, step):
    """Linear warm-up over 100 steps, then constant, or half a cosine down to 0."""
    decay = 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps) if cfg.schedule == "cosine" else 1.0
    return cfg.lr * decay * min(1.0, (step + 1) / 100)

def draw_batch(cfg, data, generator):
    """x, u, t, eps of one step; t is stratified over (0, 1] (Kingma et al. 2021)."""
    rows, u = data.draw(cfg.batch_size, generator, cfg.u, cfg.u_scale)
    x = data.images(rows).contiguous(memory_format=torch.channels_last)   # (B, C, H, W)
    b, device = cfg.ddpm_images, x.device
    offset = torch.rand(b, generator=generator, device=device)
    t = ((torch.arange(b, device=device) + offset) / b).clamp(min=1e-5)   # (b,)
    eps = torch.empty_like(x[:b]).normal_(generator=generator)            # (b, C, H, W)
    return x, u, t, eps

def train_step(cfg, model, ema, optimizer, batch, step):
    """One optimiser step on Eq. 2 (and kl_mean); returns the terms and the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
        terms = losses(model, *batch)
    loss = (terms.get("ddpm", 0) + cfg.rec * terms["rec"] + kl_weight(cfg, step) * terms["kl"]
            + cfg.kl_mean * terms["kl_mean"])
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    ema.multi_avg_fn = get_ema_multi_avg_fn(min(cfg.ema, (step + 1) / (step + 10)))   # warm-up
    ema.update_parameters(model)
    return {**{name: term.detach() for name, term in terms.items()}, "gradient norm": norm}

# ---- the run ----

def state_of(optimizer, ema, generator, step):
    """What a resumed run needs beside the weights."""
    random = {"torch": torch.get_rng_state(), "data": generator.get_state()}
    if generator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(generator.device)
    return {"optimizer": optimizer.state_dict(), "n_averaged": ema.n_averaged, "step": step,
            "random": random}

def restore(content, model, ema, optimizer, generator):
    """Put a checkpoint's content back; returns the step to go on from."""
    model.load_state_dict(content["model"])
    ema.module.load_state_dict(content["ema"])
    ema.n_averaged.copy_(content["n_averaged"])
    optimizer.load_state_dict({"state": content["optimizer"]["state"],
                               "param_groups": optimizer.state_dict()["param_groups"]})
    for p, state in optimizer.state.items():                    # fails if they are not like p
        optimizer.state[p] = {k: state[k].view(p.shape if k != "step" else ())
                              for k in ("step", "exp_avg", "exp_avg_sq")}
    torch.set_rng_state(content["random"]["torch"].cpu())
    generator.set_state(content["random"]["data"].cpu())
    if "cuda" in content["random"]:
        torch.cuda.set_rng_state(content["random"]["cuda"].cpu(), generator.device)
    return range(model.cfg.steps + 1).index(content["step"])

def checked(record):
    """The record of numbers, or ValueError naming the first that is not finite."""
    for name, value in record.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} at step {record['step']}. The last good "
                             "checkpoint is kept; try a smaller --lr, or --precision float32.")
    return record

def train(cfg, data, out, args, parts, first_step):
    """Train from first_step to cfg.steps, logging and saving into the folder out."""
    model, ema, optimizer, generator = parts
    path, started, stop = os.path.join(out, "ckpt.pt"), time.time(), []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))    # Ctrl-C ends after a whole step
    bar = tqdm(total=cfg.steps * cfg.batch_size, initial=first_step * cfg.batch_size,
               unit=" images", unit_scale=True)
    with bar, open(os.path.join(out, "log.jsonl"), "a") as log:
        for step in range(first_step, cfg.steps):
            batch = draw_batch(cfg, data, generator)
            numbers = train_step(cfg, model, ema, optimizer, batch, step)
            bar.update(cfg.batch_size)
            done = step + 1
            saving = done % args.save_every == 0 or done == cfg.steps or stop
            if done % args.log_every == 0 or saving:              # the only wait for the device
                record = checked({"step": done, **{k: float(v) for k, v in numbers.items()}})
                bar.set_postfix({k: f"{record[k]:.3g}" for k in ("ddpm", "rec", "kl")
                                 if k in record})
                log.write(json.dumps({**record, "kl weight": kl_weight(cfg, step),
                                      "seconds": round(time.time() - started, 2)}) + "\n")
                log.flush()
            if saving:
                save_checkpoint(path, model, ema.module,
                                **state_of(optimizer, ema, generator, done))
            if stop:
                bar.close()
                sys.exit(f"stopped and saved. Go on with: python train.py --resume {path}")
    signal.signal(signal.SIGINT, signal.default_int_handler)

@torch.no_grad()
def validate(cfg, model, data, n=4096, size=256):
    """ELBO in nats per image, higher is better, on n modulated draws of a fixed seed; its terms.

    -(values / 2) log(2 pi e MSE) - KL: a Gaussian decoder whose variance is the best one, the mean
    squared error itself, so that no lambda enters.
    """
    generator, sums = torch.Generator(data.device).manual_seed(1_000_003), {"rec": 0.0, "kl": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(n // size):
            rows, u = data.draw(size, generator, cfg.u, cfg.u_scale)
            x = data.images(rows)
            terms = losses(model, x, u, t=x[:0, 0, 0, 0], eps=x[:0])
            sums = {k: sums[k] + float(terms[k]) * size / n for k in sums}
    nats = -math.prod(data.image_shape) / 2 * math.log(2 * math.pi * math.e * sums["rec"])
    return {"elbo": nats - sums["kl"], **sums}

def describe(cfg, args, data, device, model, seconds):
    """The first line: what runs, on what, and what it will cost."""
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6
              for name, part in model.named_children()}
    method = "paper" if args.paper else "recipe"
    where = (torch.cuda.get_device_name(device) if device.type == "cuda"
             else f"{device.type} ({torch.get_num_threads()} threads)")
    return (f"{where}, size {args.size}, method {method}: {cfg.model} with {cfg.prior} prior, "
            f"u {cfg.u}; {data.name}; {sum(counts.values()):.2f} M parameters "
            f"({', '.join(f'{k} {v:.2f}' for k, v in counts.items())}); {cfg.steps} steps of "
            f"{cfg.batch_size} images, some {max(1, round(seconds / 60))} min")

def step_seconds(cfg, data, device):
    """Seconds of one training step, the median of five after one unmeasured, on a throwaway."""
    parts, times = build(cfg, device), []
    model, ema, optimizer, generator = parts
    for i in range(6):
        start = time.perf_counter()
        numbers = train_step(cfg, model, ema, optimizer, draw_batch(cfg, data, generator), i)
        float(numbers["rec"])                                     # waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]

def provenance(args, data):
    """What a checkpoint says of its origin."""
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, text=True,
                            capture_output=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    return {"data": data.name, "data_arg": args.data, "commit": commit.stdout.strip() or "unknown",
            "size": args.size, "method": "paper" if args.paper else "recipe",
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "numpy": np.__version__}}

def draw_curves(out):
    """losses.png from log.jsonl: each term against the step."""
    from matplotlib.figure import Figure
    with open(os.path.join(out, "log.jsonl")) as log:
        records = [r for r in map(json.loads, log) if "rec" in r and "step" in r]
    if not records:
        return                                                    # a finished run without its log
    names = [k for k in ("ddpm", "rec", "kl") if k in records[0]]
    titles = {"ddpm": "denoising loss", "rec": "reconstruction loss", "kl": "KL, nats per image"}
    figure = Figure((3.6 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        axis.plot([r["step"] for r in records], [r[name] for r in records], lw=0.8)
        axis.set(title=titles[name], xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(os.path.join(out, "losses.png"), dpi=150)

@torch.no_grad()
def draw_samples(out, model, data, n=10):
    """samples.png: images, the decoder's reconstructions, diffusion samples given the same z."""
    generator = torch.Generator(data.device).manual_seed(0)
    x = data.images(torch.randint(len(data), (n,), generator=generator, device=data.device))
    z = model.encode(x)[0]
    rows = {"image": x, "decoder": model.decode(z)}
    if model.unet is not None:
        rows["diffusion"] = model.sample(z, seeded_noise(range(n), x.shape[1:], x.device)())
    images = torch.cat(list(rows.values()))
    save_grid(os.path.join(out, "samples.png"), images, list(rows), [""] * n)

def finish(cfg, data, out, ema):
    """Validation ELBO, pictures and the two commands that come next."""
    model = ema.module.eval()
    model.cfg = replace(cfg, rec_images=0)                        # every image counts
    result = validate(cfg, model, data)
    with open(os.path.join(out, "log.jsonl"), "a") as log:
        log.write(json.dumps({"validation": result}) + "\n")
    print(f"ELBO {result['elbo']:.0f} nats per image (mean squared error {result['rec']:.5f}, "
          f"KL {result['kl']:.1f} nats), averaged weights, 4,096 modulated draws")
    draw_curves(out)
    try:
        draw_samples(out, model, data)
    except ImportError as error:
        print(error, file=sys.stderr)
    print(f"Next:\n  python evaluate.py {out}/ckpt.pt\n  python interpolate.py {out}/ckpt.pt")

def resume(args, device):
    """The content of --resume's checkpoint; sets the arguments that the run was started with."""
    content = read_checkpoint(args.resume, device)
    if any(hasattr(args, f.name) for f in fields(Config)) or args.out or args.paper or args.size:
        raise ValueError("--resume goes on with the run as it was: leave out --out, --size, "
                         "--paper and every flag that changes the numbers.")
    if "optimizer" not in content or not {"data_arg", "size", "method"} <= set(content["info"]):
        raise ValueError(f"'{args.resume}' holds a model but no training state to resume.")
    args.data, args.size = args.data or str(content["info"]["data_arg"]), content["info"]["size"]
    args.paper = content["info"]["method"] == "paper"
    return content

def prepare(args):
    """Everything that reads the user's input: config, data, folder, model, first step."""
    if min(args.save_every, args.log_every) < 1:
        raise ValueError(f"--save-every and --log-every must be at least 1, got {args.save_every} "
                         f"and {args.log_every}.")
    device = pick_device(args.device)
    content = resume(args, device) if args.resume else None
    args.data = args.data or "shapes3d"
    args.size = args.size or ("full" if device.type == "cuda" else "small")
    data = load_data(args.data, device, tqdm)
    cfg = Config(**content["config"]) if content else make_config(args, data)
    if (cfg.image_size, cfg.image_channels, cfg.n_factors) != (
            data.image_shape[1], data.image_shape[0], len(data.varied)):
        raise ValueError(f"'{args.resume}' was trained on other data than '{args.data}'.")
    pace = step_seconds(cfg, data, device)
    out = (os.path.dirname(args.resume) or ".") if content else make_folder(args, cfg)
    parts = build(cfg, device)
    parts[0].info = content["info"] if content else provenance(args, data)
    try:
        first_step = restore(content, *parts) if content else 0
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{args.resume}' cannot be resumed on {device.type} ({error}). Pass the "
                         "--device it was trained on, or train anew.") from None
    trim_log(out, first_step, cfg)
    seconds = pace * (cfg.steps - first_step)
    print(describe(cfg, args, data, device, parts[0], seconds), flush=True)
    return cfg, data, out, parts, first_step

def trim_log(out, first_step, cfg):
    """Keep of log.jsonl the config and the whole lines up to first_step."""
    path, text = os.path.join(out, "log.jsonl"), ""
    if os.path.exists(path):
        with open(path, errors="replace") as log:
            text = log.read()
    lines = re.finditer(r'^\{"step": (\d{1,18})(, "[a-z _]+": [-+.\de]+)+\}\n', text, re.MULTILINE)
    with open(f"{path}.partial", "w") as log:
        log.writelines([json.dumps({"config": asdict(cfg)}) + "\n",
                        *(line[0] for line in lines if int(line[1]) <= first_step)])
    os.replace(f"{path}.partial", path)

def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        cfg, data, out, parts, first_step = prepare(args)
        train(cfg, data, out, args, parts, first_step)
        finish(cfg, data, out, parts[1])
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"train.py: {' '.join(str(error).split())}")
    except RuntimeError as error:                                 # CUDA's and the CPU's words
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        sys.exit("train.py: out of memory. Try a smaller --batch-size or --ddpm-images, or "
                 "--precision bfloat16.")

if __name__ == "__main__":
    main()
