# SPDX-License-Identifier: MIT
"""Train a VAE, an iVAE or an iDiff model.

    python train.py                                # the recipe: all six factors of 3D Shapes
    python train.py --paper --out runs/paper       # the paper's method at the same size
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
import evaluate
from idiff import (Config, IDiff, load_checkpoint, load_data, losses, read_checkpoint,
                   save_checkpoint, save_grid, seeded_noise)

SIZES = {"small": {},
         "full": dict(patch=2, width=128, unet_width=128, batch_size=128, rec_images=0,
                      ddpm_images=0, epochs=10.0, lr=5e-4, ema=0.9995, precision="bfloat16")}
PAPER = dict(latent_dim=10, prior="full", u="var", kl=5e-4, rec=0.1, kl_mean=0.0, predict="eps",
             condition="z", weight="eps", batch_size=32, rec_images=0, ddpm_images=0, lr=2e-4,
             schedule="constant")
IVAE = ("latent_dim latent categories prior u u_scale width patch image_size image_channels "
        "n_factors").split()
SPACE = {"kl": (1e-5, 0.1), "rec": (0.01, 5.0), "u": ["var", "mean+var"]}    # the paper's Table 1
GRID = SPACE | {"kl": [1e-5, 1e-4, 1e-3, 1e-2, 0.1], "rec": [0.01, 0.1, 1.0, 5.0]}
WHERE = "out trials storage device save_every log_every".split()        # not what is searched
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*item)) for item in (     # torchrun sets these
    ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, usage="python train.py [options]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=110))
    add = parser.add_argument_group("the run").add_argument
    add("--data", help="shapes3d (default, if not a frozen iVAE's), dsprites, .h5 or .npz file")
    add("--size", choices=SIZES, help="widths, batch, length (default: full on CUDA, else small)")
    add("--paper", action="store_true", help="the paper's method, at the same size")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    add("--out", help="folder of the run (default: a new one, runs/MODEL-sSEED or search-KIND)")
    add("--resume", metavar="CKPT", help="go on with the run of this checkpoint")
    add("--freeze-ivae", metavar="CKPT", help="train a U-Net on its frozen iVAE")
    add("--save-every", type=int, default=500, metavar="N", help="steps per write of ckpt.pt (500)")
    add("--log-every", type=int, default=20, metavar="N", help="steps per line of log.jsonl (20)")
    add = parser.add_argument_group("a search; the same command joins or resumes it").add_argument
    add("--search", choices=("grid", "bayes"), help="over what of kl, rec and u no flag gives")
    add("--over", nargs="+", action="append", default=[], metavar="NAME VALUE",
        help="a flag and its values to search too, as in --over prior known full")
    add("--trials", type=int, help="how many this process runs (default: 30; grid: every cell)")
    add("--objective", choices=("mig", "elbo"), default="mig", help="elbo needs no labels (mig)")
    add("--storage", metavar="URL", help="a database in place of the file study.log in --out")
    add = parser.add_argument_group("what changes the numbers; defaults: the recipe").add_argument
    for f in fields(Config):
        if f.metadata["help"]:
            add("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                choices=f.metadata["choices"], help=f"{f.metadata['help']} (default: {f.default})")
    parser.error = (lambda message: sys.exit(0)) if RANK else parser.error   # rank 0 tells
    return parser

# ---- what to train, and where ----
def pick_device(name):
    """The torch.device of --device; ValueError in one line if it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).cpu()                       # the only sure way to know
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}. "
                         "Try --device cpu.") from None

def make_config(args, data, ivae):
    """Config of the flags: size gives way to --paper, both to flags; all must fit a frozen ivae."""
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    fixed = {"model": "idiff", **{k: getattr(ivae.cfg, k) for k in IVAE}} if ivae else {}
    values = SIZES[args.size] | (PAPER if args.paper else {}) | fixed | given
    c, h, w = data.image_shape
    if h != w:
        raise ValueError(f"images must be square, got {h} x {w}. Crop or resize them.")
    cfg = Config(**values | dict(image_size=h, image_channels=c, n_factors=len(data.varied)))
    if wrong := [f"{k} {v}" for k, v in fixed.items() if getattr(cfg, k) != v]:
        raise ValueError(f"--freeze-ivae {args.freeze_ivae} needs {', '.join(wrong)}.")
    steps = cfg.steps or max(1, round(cfg.epochs * 480_000 / cfg.batch_size))
    return replace(cfg, steps=steps, epochs=steps * cfg.batch_size / 480_000,
                   ddpm_images=min(cfg.ddpm_images or cfg.batch_size, cfg.batch_size))

def make_folder(args, cfg):
    """The run's folder, made; an explicit --out must not hold a run already."""
    out, n, files = args.out or f"runs/{cfg.model}-s{cfg.seed}", 1, ("log.jsonl", "ckpt.pt")
    while (taken := any(os.path.exists(f"{out}/{file}") for file in files)) and not args.out:
        n, out = n + 1, f"runs/{cfg.model}-s{cfg.seed}-{n + 1}"
    if taken:
        raise ValueError(f"'{out}' already holds a run. Pass another --out, delete it, or go "
                         f"on with it: --resume {out}/ckpt.pt")
    os.makedirs(out, exist_ok=True)
    return out

def build(cfg, device, ivae=None):
    """Model, its averaged copy and optimiser, seeded. All but the U-Net are those of the model
    ivae, for good: without a gradient they never change."""
    torch.manual_seed(cfg.seed)
    model = IDiff(cfg).to(device, memory_format=torch.channels_last)
    for name in ("encoder", "prior", "decoder") if ivae else ():
        getattr(model, name).requires_grad_(False).load_state_dict(getattr(ivae, name).state_dict())
    ema = AveragedModel(model)                            # train_step sets its rule, which warms up
    if device.type == "cuda":
        for part in filter(None, (model.encoder, model.decoder, model.unet)):
            part.compile()
        torch._dynamo.config.suppress_errors = True               # no compiler: uncompiled
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.0, fused=True)
    model.cfg = replace(cfg, rec_images=cfg.rec_images // WORLD)  # what this rank's losses sees
    return model, ema, optimizer

# ---- one step ----
def kl_weight(cfg, step):
    """lambda_KL at a step: geometrically from max(kl_start, kl) to kl over 60 % of the steps."""
    rise = max(cfg.kl_start, cfg.kl) / cfg.kl if cfg.kl else 1
    return cfg.kl * rise ** max(0.0, 1 - step / (0.6 * cfg.steps))

def learning_rate(cfg, step):
    """Linear warm-up over 100 steps, then constant, or half a cosine down to 0."""
    decay = 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps) if cfg.schedule == "cosine" else 1.0
    return cfg.lr * decay * min(1.0, (step + 1) / 100)

def draw_batch(cfg, data, step):
    """x, u, t, eps of one step, drawn from seed and step alone; t is stratified over (0, 1] (Kingma
    et al. 2021). Ranks draw the same and keep each WORLD-th row: their mean is one process's, but
    for z's noise, which each draws itself."""
    generator = torch.Generator(data.device).manual_seed(hash((cfg.seed, step)))
    torch.manual_seed(hash((cfg.seed, step, RANK)))               # for z's noise
    rows, u = data.draw(cfg.batch_size, generator, cfg.u, cfg.u_scale)
    x, b, device = data.images(rows), cfg.ddpm_images, data.device        # (B, C, H, W)
    t = torch.arange(b, device=device) + torch.rand(b, generator=generator, device=device)
    eps = torch.randn(x[:b].shape, generator=generator, device=device)    # (b, C, H, W)
    x, eps = (h.contiguous(memory_format=torch.channels_last) for h in (x, eps))
    return [whole[RANK::WORLD] for whole in (x, u, (t / b).clamp(min=1e-5), eps)]

def average(tensors):
    """The tensors, each made its mean over the ranks in place, by one all_reduce."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / WORLD
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))
    return tensors

def train_step(cfg, model, ema, optimizer, batch, step):
    """One optimiser step on Eq. 2 (and kl_mean); returns weighed terms, gradient norm."""
    optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
    model.temperature = 0.3 ** (step / cfg.steps)         # from 1 down to 0.3, for --latent gumbel
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
        terms = losses(model, *batch)
    kl = kl_weight(cfg, step)
    weights = {"ddpm": 1, "rec": cfg.rec, "kl": kl, "kl_reverse": kl * cfg.kl_reverse,
               "kl_mean": cfg.kl_mean}                    # never annealed
    loss = sum((w * terms[k] for k, w in weights.items() if w and k in terms), 0 * terms["rec"])
    optimizer.zero_grad()
    loss.backward()
    terms = {k: term.detach() for k, term in terms.items() if weights[k]}   # others may be inf
    average([p.grad for p in model.parameters() if p.grad is not None] + list(terms.values()))
    norm = clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    ema.multi_avg_fn = get_ema_multi_avg_fn(min(cfg.ema, (step + 1) / (step + 10)))   # warm-up
    ema.update_parameters(model)
    return {**terms, "gradient norm": norm}

# ---- the run ----
def restore(content, model, ema, optimizer):
    """Put a checkpoint's content back; returns the step to go on from."""
    [content["info"][k] for k in ("data_arg", "size", "method", "frozen")]   # fails if one is not
    model.load_state_dict(content["model"])
    ema.module.load_state_dict(content["ema"])
    ema.n_averaged.copy_(content["n_averaged"])
    optimizer.load_state_dict(content["optimizer"])
    for p, state in optimizer.state.items():
        state["exp_avg"].view_as(p), state["exp_avg_sq"].view_as(p)   # fails if they are not like p
    return range(ema.module.cfg.steps + 1).index(content["step"])

def train(cfg, data, out, args, parts, first_step):
    """Train from first_step to cfg.steps, logging and saving into the folder out."""
    model, ema, optimizer = parts
    path, started, stop = os.path.join(out, "ckpt.pt"), time.time(), []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))    # Ctrl-C ends after a whole step
    bar = tqdm(total=cfg.steps * cfg.batch_size, initial=first_step * cfg.batch_size,
               unit=" images", unit_scale=True, disable=RANK > 0)
    with bar, open(os.path.join(out, "log.jsonl") if RANK == 0 else os.devnull, "a", 1) as log:
        for step in range(first_step, cfg.steps):
            numbers = train_step(cfg, model, ema, optimizer, draw_batch(cfg, data, step), step)
            bar.update(cfg.batch_size)
            done = step + 1
            stopping, = average([torch.tensor(float(len(stop)))])  # all ranks at the same step
            saving = done % args.save_every == 0 or done == cfg.steps or stopping
            if done % args.log_every == 0 or saving:              # the only wait for the device
                record = {"step": done, **{k: float(v) for k, v in numbers.items()}}
                if not math.isfinite(sum(record.values())):
                    raise ValueError(f"not finite: {record}. The last good checkpoint is kept; try "
                                     "a smaller --lr, or --precision float32.")
                bar.set_postfix({k: record[k] for k in ("ddpm", "rec", "kl") if k in record})
                log.write(json.dumps({**record, "kl weight": kl_weight(cfg, step),
                                      "seconds": round(time.time() - started, 2)}) + "\n")
            if saving and RANK == 0:
                save_checkpoint(path, model, ema.module, config=asdict(cfg), step=done,
                                n_averaged=ema.n_averaged, optimizer=optimizer.state_dict())
            if stopping and average([torch.zeros(1)]):            # rank 0 has saved: all end
                sys.exit(0 if RANK else f"saved. Go on with: python train.py --resume {path}")
    signal.signal(signal.SIGINT, signal.default_int_handler)

@torch.no_grad()
def validate(cfg, model, data, n=4096, size=256):
    """ELBO in nats per image, higher is better, on n modulated draws of a fixed seed; its terms.
    -(values / 2) log(2 pi e MSE) - KL, a Gaussian decoder of the best variance: no lambda in it."""
    generator, sums = torch.Generator(data.device).manual_seed(1_000_003), {"rec": 0.0, "kl": 0.0}
    torch.manual_seed(0)
    for _ in range(n // size):
        rows, u = data.draw(size, generator, cfg.u, cfg.u_scale)
        x = data.images(rows)
        terms = losses(model, x, u, t=x[:0, 0, 0, 0], eps=x[:0])
        sums = {k: sums[k] + float(terms[k]) * size / n for k in sums}
    nats = -math.prod(data.image_shape) / 2 * math.log(2 * math.pi * math.e * sums["rec"])
    return {"elbo": nats - sums["kl"], **sums}

def describe(cfg, data, device, model):
    """The first line: what runs, on what, and how much of it."""
    info, millions = model.info, sum(p.numel() for p in model.parameters()) / 1e6
    frozen = f", frozen iVAE of {info['frozen']}" * bool(info["frozen"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{device.type}, {torch.get_num_threads()} threads")
    return (f"{where}, ranks {WORLD}, size {info['size']}, method {info['method']}{frozen}: "
            f"{cfg.model}, prior {model.prior.kind}, u {cfg.u}; {data.name}; {millions:.2f} M "
            f"parameters; {cfg.steps} steps of {cfg.batch_size} images, {cfg.epochs:.2g} epochs")

def provenance(args, data):
    """What a checkpoint says of its origin."""
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, text=True,
                            capture_output=True, cwd=os.path.dirname(__file__)).stdout.strip()
    return {"data": data.name, "data_arg": args.data, "size": args.size, "frozen": args.freeze_ivae,
            "method": "paper" if args.paper else "recipe", "commit": commit or "unknown",
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)}}

@torch.no_grad()
def draw(out, model, data, n=10):
    """losses.png: each term by step. samples.png: images, redrawn by decoder and diffusion."""
    from matplotlib.figure import Figure
    records = list(map(json.loads, Path(out, "log.jsonl").read_text().splitlines()))
    figure = Figure((13, 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, 4), ("ddpm", "rec", "kl", "kl_mean")):
        axis.plot(*zip(*((r["step"], r[name]) for r in records if name in r)), lw=0.8)
        axis.set(title=name, xlabel="step", yscale="log")
    figure.savefig(os.path.join(out, "losses.png"), dpi=150)
    x = data.images(torch.arange(n, device=data.device) * 7919 * 31 % len(data))    # a mixture
    z = model.encode(x)[0]
    rows = {"image": x, "decoder": model.decode(z)}
    if model.unet is not None:
        rows["diffusion"] = model.sample(z, seeded_noise(range(n), x.shape[1:], x.device)())
    save_grid(f"{out}/samples.png", torch.cat(list(rows.values())), list(rows), [""] * n)

def finish(cfg, data, out, ema):
    """Validation ELBO, pictures and the two commands that come next."""
    model = ema.module.eval()
    model.cfg = replace(cfg, rec_images=0)                        # every image counts
    result = validate(cfg, model, data)
    with open(os.path.join(out, "log.jsonl"), "a") as log:
        log.write(json.dumps({"validation": result}) + "\n")
    print(f"ELBO {result['elbo']:.0f} nats per image (mean squared error {result['rec']:.5f}, "
          f"KL {result['kl']:.1f} nats), averaged weights, 4,096 modulated draws")
    draw(out, model, data)
    print(f"Next:\n  python evaluate.py {out}/ckpt.pt\n  python interpolate.py {out}/ckpt.pt")
    return result["elbo"]

def prepare(args):
    """Everything that reads the user's input: config, data, folder, model, first step."""
    if min(args.save_every, args.log_every) < 1:
        raise ValueError("--save-every and --log-every must be at least 1.")
    device = pick_device(args.device)
    content = read_checkpoint(args.resume, device) if args.resume else None
    if content and (any(hasattr(args, f.name) for f in fields(Config)) or any(
            (args.out, args.paper, args.size, args.freeze_ivae))):
        raise ValueError("--resume goes on with the run as it was, without flags that change it.")
    args.freeze_ivae = content["info"].get("frozen") if content else args.freeze_ivae
    args.size = args.size or ("full" if device.type == "cuda" else "small")
    ivae = load_checkpoint(args.resume or args.freeze_ivae, device) if args.freeze_ivae else None
    info = content["info"] if content else ivae.info if ivae else {}
    args.data = args.data or str(info.get("data_arg", "shapes3d"))
    data = load_data(args.data, device, lambda rows, **bar: tqdm(rows, disable=RANK > 0, **bar))
    cfg = Config(**content["config"]) if content else make_config(args, data, ivae)
    if (*data.image_shape, len(data.varied)) != (
            cfg.image_channels, cfg.image_size, cfg.image_size, cfg.n_factors):
        raise ValueError(f"'{args.resume}' was trained on other data than '{args.data}'.")
    if any(n % WORLD for n in (cfg.batch_size, cfg.rec_images, cfg.ddpm_images)):
        raise ValueError(f"--batch-size, --rec-images and --ddpm-images: {WORLD} ranks share each "
                         f"evenly, got {cfg.batch_size}, {cfg.rec_images} and {cfg.ddpm_images}.")
    out = (os.path.dirname(args.resume) or ".") if content else make_folder(args, cfg)
    parts = build(cfg, device, ivae)
    parts[0].info = content["info"] if content else provenance(args, data)
    try:
        first_step = restore(content, *parts) if content else 0
    except Exception as error:                                        # of torch: many
        raise ValueError(f"'{args.resume}' holds no state to resume from: {error}") from None
    if average([torch.zeros(1)]) and RANK == 0:    # when all ranks have found the folder free
        trim_log(out, first_step, cfg)
        print(describe(cfg, data, device, parts[0]), flush=True)
    return cfg, data, out, parts, first_step

def trim_log(out, first_step, cfg):
    """Keep of log.jsonl the config and the whole lines up to first_step."""
    path, kept = Path(out, "log.jsonl"), [json.dumps({"config": asdict(cfg)})]
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(Exception):                                 # cut short, or damaged
            if json.loads(line)["step"] <= first_step:
                kept.append(line)
    path.write_text("\n".join(kept) + "\n")

def run(args):
    """One run, from its first line to its last; its ELBO on rank 0."""
    cfg, data, out, parts, first_step = prepare(args)
    train(cfg, data, out, args, parts, first_step)
    return finish(cfg, data, out, parts[1]) if RANK == 0 else None

# ---- the search ----
def search(args):
    """Trials until none is left; workers started alike, at once or later, share the study."""
    import optuna
    args.out, grid = args.out or f"runs/search-{args.search}", args.search == "grid"
    if not args.search or args.resume or WORLD > 1:
        raise ValueError("--over, --trials and --storage need --search; and that goes without "
                         "--resume and torchrun: its own command resumes it.")
    kinds, over = Config.__annotations__, {k.replace("-", "_"): v for k, *v in args.over}
    space = {k: v for k, v in (GRID if grid else SPACE).items() if not hasattr(args, k)} | over
    if not space or not all(over.values()) or over.keys() - kinds.keys():
        raise ValueError(f"nothing to search, or not flags and their values: --over {over}.")
    space |= {k: [kinds[k](v) for v in values] for k, values in over.items()}
    name = str([(k, v) for k, v in sorted(vars(args).items()) if k not in WHERE])[-500:]
    os.makedirs(args.out, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = args.storage or optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(f"{args.out}/study.log"))
    if {*optuna.get_all_study_names(storage)} - {name}:
        raise ValueError(f"'{args.storage or args.out}' holds a search by other flags.")
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize",
                                load_if_exists=True)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        log = f"{args.out}/trial-{trial.number:03d}/log.jsonl"
        seen = os.path.getmtime(log) if os.path.exists(log) else trial.datetime_start.timestamp()
        if time.time() - seen > 900:                              # silent: its worker was killed
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    study.sampler = optuna.samplers.GridSampler(space, seed=0) if grid else (
        optuna.samplers.TPESampler(constant_liar=True))           # after tell, which grids forbid
    for _ in range(args.trials or (math.prod(map(len, space.values())) if grid else 30)):
        if not grid or study.get_trials(states=(optuna.trial.TrialState.WAITING,)) or (
                not study.sampler.is_exhausted(study)):
            study.optimize(lambda trial: run_trial(trial, args, space), 1, catch=Exception)
            write_trials(study, args, space)
    print(write_trials(study, args, space))

def run_trial(trial, args, space):
    """The objective: a run of its own in its own folder, and what evaluate.py says of it."""
    out = f"{args.out}/trial-{trial.number:03d}"
    chosen = {k: trial.suggest_categorical(k, v) if type(v) is list else
              trial.suggest_float(k, *v, log=k == "kl") for k, v in space.items()}
    try:
        elbo = run(argparse.Namespace(**vars(args) | chosen | {"out": out}))
        flags = evaluate.build_parser().parse_args([f"{out}/ckpt.pt", "--no-dci", "--n", "10000"])
        return elbo if args.objective == "elbo" else (
            evaluate.report(flags.paths[0], flags)["metrics"]["mig"])
    except (SystemExit, KeyboardInterrupt):
        trial.study.enqueue_trial(trial.params)
        raise KeyboardInterrupt("stopped. Go on by the same command.") from None
    except Exception as error:
        trial.set_user_attr("failed", " ".join(str(error).split()))
        raise

def write_trials(study, args, space):
    """Write trials.md and search.png; returns the text: every trial, and the paper's Table 1."""
    rows = [["trial", *space, args.objective]] + [
        [str(t.number), *(f"{t.params.get(k)!s:.9}" for k in space),
         t.user_attrs.get("failed", t.state.name.lower()) if t.value is None else t.value]
        for t in study.trials]
    text = evaluate.table(zip(*rows))
    if done := [t for t in study.trials if t.value is not None]:
        best = study.best_trial
        text += f"\nBest: {args.out}/trial-{best.number:03d}/ckpt.pt\n\n" + evaluate.table(zip(
            ["hyperparameter", "search space", "best value", "the paper's best"],
            *([k, str(v), f"{best.params[k]!s:.9}", str(PAPER.get(k))] for k, v in space.items())))
        figure, axes = evaluate.panels(len(space), (6, 2.5))
        for axis, k in zip(axes, space):
            axis.scatter([t.params[k] for t in done], [t.value for t in done])
            axis.set(xlabel=k, ylabel=args.objective, **{"xscale": "log"} if k == "kl" else {})
        figure.savefig(f"{args.out}/search.png", dpi=150)
    Path(args.out, "trials.md").write_text(text)
    return text

def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        if WORLD > 1:
            dist.init_process_group()                             # gloo on CPUs, nccl on GPUs
        search(args) if args.search or args.over or args.trials or args.storage else run(args)
        if WORLD > 1 and average([torch.zeros(1)]):               # all ranks end together
            sys.stdout.flush()
            os._exit(0)             # at once: gloo's threads now and then abort Python's own exit
    except (KeyboardInterrupt, ImportError, ValueError, OSError, MemoryError,
            torch.OutOfMemoryError) as error:
        time.sleep(10 if RANK else 0)       # torchrun ends us before if rank 0 met it too
        hint = ". Try: pip install -r requirements.txt" if isinstance(error, ImportError) else ""
        sys.exit(f"train.py: {' '.join(str(error).split())[:400] or 'stopped'}{hint}")

if __name__ == "__main__":
    main()
