# SPDX-License-Identifier: MIT
"""Speed of training: against other U-Nets of equal size, the data's share, start-up, levers.

    pip install diffusers denoising_diffusion_pytorch    # the other U-Nets; each may be missing
    python tests/bench_train.py                   # one table, some 6 minutes on two CPU cores
    python tests/bench_train.py --quick           # the same of fewer and smaller steps
    python tests/bench_train.py --curve           # instead: denoising loss by images seen, hours
    python tests/bench_train.py --gpu             # instead: steps of both sizes against the limit
    python tests/bench_train.py --load            # instead: steps beside busy programs

Every step is train.py's own build, draw_batch and train_step with the same iVAE and the same draws;
only the U-Net differs, and it sees every image. The other U-Nets get what ours gets: z by our
Fourier features and two layers, added to their embedding of t, and the decoder's image as three
more input channels. Cases take turns within a round and a ratio is the median of the rounds' own
ratios, so that a busy machine troubles all alike.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import idiff  # noqa: E402
import train  # noqa: E402
from idiff import Config, IDiff, ScoreUNet, fourier, load_data  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = "bfloat16" if DEVICE.type == "cuda" else "float32"
MARKS = (500, 1000, 2000, 3000)                                # images seen, of --curve
RECIPES = {"default: predicts the residual": {},
           "plain: predicts eps, z alone": dict(predict="eps")}
COLUMNS = ("measured", "case", "median", "least to most", "ratio", "M params", "peak MiB")

# ---- the U-Nets, each made of a config and a width ----

class TimeAndLatent(nn.Module):
    """A U-Net's embedding of t, given t and a further embedding to add."""
    def __init__(self, time):
        super().__init__()
        self.time = time

    def forward(self, pair):
        return self.time(pair[0]) + pair[1]

def diffusers_net(c_in, c_out, width, **kinds):
    """UNet2DModel shaped as its defaults, scaled: widths 1, 2, 3, 4, attention but at the finest.
    Beside it the size of its embedding, and how it is called."""
    from diffusers import UNet2DModel
    widths = [8 * max(1, round(width * k / 8)) for k in (1, 2, 3, 4)]
    net = UNet2DModel(in_channels=c_in, out_channels=c_out, block_out_channels=widths,
                      norm_num_groups=8, class_embed_type="identity", **kinds)
    return net, 4 * widths[0], lambda net, x, t, emb: net(x, t, class_labels=emb).sample

def lucidrains_net(c_in, c_out, width):
    """The same of denoising_diffusion_pytorch's Unet by its defaults: widths 1, 2, 4, 8."""
    from denoising_diffusion_pytorch import Unet
    net = Unet(2 * width, channels=c_in, out_dim=c_out)
    net.time_mlp = TimeAndLatent(net.time_mlp)
    return net, 8 * width, lambda net, x, t, emb: net(x, (t, emb))

class Peer(nn.Module):
    """Another library's U-Net, called as ScoreUNet."""
    def __init__(self, make, cfg, width):
        super().__init__()
        self.sees_x_hat = cfg.predict != "eps"
        c = cfg.image_channels
        c = 2 * c if self.sees_x_hat else c
        self.net, c_emb, self.call = make(c, c, width)
        self.latent = nn.Sequential(nn.Linear(11 * cfg.latent_dim, c_emb), nn.SiLU(),
                                    nn.Linear(c_emb, c_emb))

    def forward(self, x_t, t, z, x_hat):
        seen = torch.cat([x_t, x_hat], 1) if self.sees_x_hat else x_t
        return self.call(self.net, seen, 1000 * t, self.latent(fourier(z))).float()

def ours(patch, cfg, width):
    return ScoreUNet(replace(cfg, patch=patch, unet_width=8 * width))

NO_ATTENTION = dict(down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4,
                    add_attention=False)
CASES = {"ours, patch 4": partial(ours, 4), "ours, patch 2": partial(ours, 2),
         "diffusers UNet2DModel": partial(Peer, diffusers_net),
         "the same without attention": partial(Peer, partial(diffusers_net, **NO_ATTENTION)),
         "denoising_diffusion_pytorch Unet": partial(Peer, lucidrains_net)}

def cases():
    """CASES without those whose library is missing, each named in one line."""
    found = {}
    for name, make in CASES.items():
        try:
            parameters(make, Config(), 4)
            found[name] = make
        except ImportError as error:
            print(f"left out, not installed: {name} ({error})\n")
    return found

def parameters(make, cfg, width):
    """How many parameters a U-Net has, in millions, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(cfg, width).parameters()) / 1e6

def fit(make, cfg, target):
    """The width whose parameter count is nearest to target, in millions, and that count."""
    count = partial(parameters, make, cfg)
    width = bisect_left(range(200), target, lo=2, key=count)
    return min(((w, count(w)) for w in (width - 1, width)), key=lambda pair: abs(pair[1] - target))

# ---- one step ----

def config(batch, **changes):
    """Config of `batch` images a step, all seen by decoder and U-Net."""
    return replace(Config(), steps=10_000, batch_size=batch, ddpm_images=batch, rec_images=batch,
                   settle=0.0, unet_share=0.0, precision=PRECISION, **changes)

def sized(size, batch):
    """Config of a size at this batch; decoder and U-Net see the same share as in its own, and learn
    at once, so that a step holds all parts."""
    cfg = replace(Config(), **train.SIZES[size])
    return replace(cfg, steps=10_000, batch_size=batch, precision=PRECISION, unet_share=0.0,
                   rec_images=cfg.rec_images * batch // cfg.batch_size or batch,
                   ddpm_images=cfg.ddpm_images * batch // cfg.batch_size or batch)

def build(cfg, make=None, width=0):
    """train.build, with another U-Net if one is given; the iVAE's weights are the same for all."""
    def model(cfg):
        result = IDiff(cfg)
        if make:
            result.unet = make(cfg, width)
        return result
    with mock.patch.object(idiff, "IDiff", model):
        return train.build(cfg, DEVICE)

def step_s(cfg, data, parts, contiguous=False):
    """Seconds of one training step, draw included."""
    step = cfg.settle_steps                    # from which on all parts learn
    start = time.perf_counter()
    batch = train.draw_batch(parts[0], data, step)
    if contiguous:
        batch = [tensor.contiguous() for tensor in batch]
    float(train.train_step(cfg, *parts, batch, step)["gradient norm"])     # waits
    return time.perf_counter() - start

def draw_s(cfg, data, n=10):
    """Seconds of draw_batch alone, mean of n."""
    model = IDiff(cfg)
    start = time.perf_counter()
    for _ in range(n):
        x = train.draw_batch(model, data, cfg.settle_steps)[0]
    float(x[0, 0, 0, 0])
    return (time.perf_counter() - start) / n

def in_turn(runs, rounds):
    """{name: seconds of each round} of functions that return seconds; one more round warms up."""
    times = [{name: run() for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: [t[name] for t in times] for name in runs}

def ratio(a, b):
    """Median over the rounds of a / b."""
    return median(x / y for x, y in zip(a, b))

def peak_mib(make, cfg, width):
    """MiB that the model and one training step add, inf if too many for the device.
    To be called in a process of its own, for a peak belongs to a process."""
    b, n_u = cfg.batch_size, 2 * cfg.n_factors
    batch = [torch.rand(b, 3, 64, 64), torch.rand(b, n_u), torch.rand(b), torch.rand(b, 3, 64, 64)]
    before = 0 if DEVICE.type == "cuda" else status_mib("VmRSS")
    model, ema, optimizers = build(cfg, make, width)
    try:
        train.train_step(cfg, model, ema, optimizers, [v.to(DEVICE) for v in batch], 0)
    except torch.OutOfMemoryError:
        return np.inf
    return most_mib() - before

def most_mib():
    """The most memory so far, in MiB: of the GPU, or of this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return status_mib("VmHWM")

def status_mib(key):
    """A field of Linux's /proc/self/status in MiB, NaN elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(key)), np.nan)

def peak(make, width, batch):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_mib, make, config(batch), width).result()

# ---- the table's parts ----

def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)

def print_header(columns):
    print_row(*columns)
    print_row(*["---"] * len(columns))

def print_times(measured, case, values, unit, note="", *rest):
    """A row of the median of values and their range."""
    print_row(measured, case, f"{median(values):.3g} {unit}",
              f"{min(values):.3g} to {max(values):.3g}", note, *rest, *[""] * (2 - len(rest)))

def bench_nets(args, data):
    """Training steps with each U-Net, and the memory they take."""
    cfg, batches = config(args.batch), (4,) if args.quick else (32,)
    if DEVICE.type == "cuda":
        batches += (512,)
    made = {name: (make, *fit(make, cfg, args.params)) for name, make in cases().items()}
    print_header(COLUMNS)
    times = in_turn({name: partial(step_s, cfg, data, build(cfg, make, width))
                     for name, (make, width, _) in made.items()}, args.rounds)
    for name, (make, width, count) in made.items():
        note = ", ".join(f"{ratio(times[name], times[f'ours, patch {p}']):.2f} x patch {p}'s time"
                         for p in (4, 2))
        mib = [(b, peak(make, width, b)) for b in batches]
        print_times(f"step of {args.batch} images", name, [args.batch / s for s in times[name]],
                    "images/s", note, f"{count:.2f}",
                    ", ".join(f"{m:.0f} at {b}" for b, m in mib))

def write_file(path, data, n=4096):
    """An .npz of n images of data, as a user's own file."""
    rows = torch.randperm(len(data))[:n].to(data.device)
    images = torch.cat([data.images(part) for part in rows.split(256)])
    np.savez(path, factors=data.factors(rows).cpu().numpy(),
             images=((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())

def bench_data(args, data, file_data):
    """draw_batch of the replica and of a file, as shares of the steps of both sizes."""
    batches = {"small": 128} if args.quick else {"small": 128, "full": 32}
    for size, batch in batches.items():
        cfg, name = sized(size, batch), f"{size} step, batch {batch}"
        parts = build(cfg)
        times = in_turn({"step": partial(step_s, cfg, data, parts),
                         data.name: partial(draw_s, cfg, data),
                         "resident .npz": partial(draw_s, cfg, file_data)},
                        args.rounds if size == "small" else min(args.rounds, 3))
        step = times.pop("step")
        print_times(name, "draw and step", step, "s")
        for case, draws in times.items():
            print_times(name, f"draw_batch, {case}", [1000 * s for s in draws], "ms",
                        f"{100 * ratio(draws, step):.2f} % of the step")

def bench_levers(args, data):
    """What each choice gives at the small size, as time relative to the default's."""
    small = replace(Config(), steps=10_000, unet_share=0.0)
    def default_adamw(cfg):
        model, ema, _ = build(cfg)
        return model, ema, [torch.optim.AdamW(model.parameters(), cfg.lr)]
    def contiguous(cfg):
        parts = build(cfg)
        parts[0].to(memory_format=torch.contiguous_format)
        return parts
    runs = {"default: patch 4, U-Net sees 24 of 128": partial(step_s, small, data, build(small))}
    variants = {"patch 2": dict(patch=2), "patch 1": dict(patch=1),
                "U-Net and decoder see all": dict(ddpm_images=128, rec_images=128)}
    for name, changes in variants.items():
        cfg = replace(small, **changes)
        runs[name] = partial(step_s, cfg, data, build(cfg))
    runs["not channels_last"] = partial(step_s, small, data, contiguous(small), contiguous=True)
    runs["AdamW for all, not fused"] = partial(step_s, small, data, default_adamw(small))
    times = in_turn(runs, args.rounds)
    for name, seconds in times.items():
        print_times("lever, small step", name, [1000 * s for s in seconds], "ms",
                    f"{ratio(seconds, next(iter(times.values()))):.2f} x the default's time")

def command_s(*argv):
    """Seconds that python needs for a command line, in the project's root."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start

def first_step_s(folder):
    """Seconds from the command to the log's first step; the run is then ended."""
    start, log = time.perf_counter(), Path(folder, "run", "log.jsonl")
    argv = [sys.executable, "train.py", "--out", str(log.parent), "--log-every", "1"]
    run = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    run.kill()
    if run.wait() >= 0:
        sys.exit("bench_train.py: train.py ended before its first step.")
    return seconds

def bench_start(args, folder):
    """Start-up of train.py."""
    times = in_turn({"import torch": partial(command_s, "-c", "import torch"),
                     "train.py --help": partial(command_s, "train.py", "--help")}, args.rounds)
    for name, seconds in times.items():
        print_times("start-up", name, seconds, "s")
    print_times("start-up", "--help beyond torch", [b - a for a, b in zip(*times.values())], "s")
    print_times("start-up", "command to first step", [first_step_s(folder)], "s")

# ---- steps against the device's limit ----

PAPER_IMAGES = 4_800_000    # 10 epochs
# size, images a step; on a CPU the first alone
STEPS = (("small", 128), ("full", 128), ("full", 512), ("full", 32))

def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()

def matmul_rate(side, dtype, n=10):
    """FLOP a second of a product of two square matrices of random numbers."""
    a, b = torch.randn(2, side, side, device=DEVICE).to(dtype)
    a @ b
    wait()
    start = time.perf_counter()
    for _ in range(n):
        a @ b
    wait()
    return 2 * side**3 * n / (time.perf_counter() - start)

def several_s(cfg, data, parts, first, n):
    """Seconds of one of n steps from the first on; the host waits once, at the end."""
    start = time.perf_counter()
    for step in range(first, first + n):
        train.train_step(cfg, *parts, train.draw_batch(parts[0], data, step), step)
    wait()
    return (time.perf_counter() - start) / n

def bench_limit(args, data):
    """Both sizes' steps: images a second, share of the device's own matrix product, memory."""
    dtype = getattr(torch, PRECISION)
    peak = matmul_rate(8192 if DEVICE.type == "cuda" else 2048, dtype)
    print(f"a large matrix product: {peak / 1e12:.3g} TFLOP/s in {PRECISION}\n")
    print_header(("size", "batch", "networks", "ms, settling", "ms, after", "images/s, after",
                  "GFLOP", "share of the product's rate", "peak MiB", "hours for 4.8 M images"))

    for size, batch in STEPS if DEVICE.type == "cuda" else STEPS[:1]:
        cfg = sized(size, batch)
        joint = cfg.settle_steps
        parts = train.build(cfg, DEVICE)

        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            several_s(cfg, data, parts, joint, 1)
        flops = counter.get_total_flops()

        stances = {"as they are": "force_eager"}
        if DEVICE.type == "cuda":
            stances["compiled"] = "default"
        for name, stance in stances.items():
            with torch.compiler.set_stance(stance):
                several_s(cfg, data, parts, 0, 3)
                several_s(cfg, data, parts, joint, 3)
                if DEVICE.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                settling = several_s(cfg, data, parts, 0, args.rounds)
                seconds = several_s(cfg, data, parts, joint, args.rounds)
            total = PAPER_IMAGES / batch / 3600 * (cfg.settle * settling
                                                   + (1 - cfg.settle) * seconds)
            print_row(size, str(batch), name, f"{1000 * settling:.1f}", f"{1000 * seconds:.1f}",
                      f"{batch / seconds:.0f}", f"{flops / 1e9:.0f}",
                      f"{flops / seconds / peak:.3f}", f"{most_mib():.0f}", f"{total:.2f}")

# ---- beside busy programs ----

LOADED_STEP = """
import idiff, sys, time, torch, train
if sys.argv[1] == "chosen":
    idiff.use_free_cores()
data = idiff.load_data()
cfg = train.recipe(data)
parts = train.build(cfg, data.device)
for step in range(cfg.settle_steps, cfg.settle_steps + 25):
    if step == cfg.settle_steps + 5:
        start = time.perf_counter()
    train.train_step(cfg, *parts, train.draw_batch(parts[0], data, step), step)
print((time.perf_counter() - start) / 20, torch.get_num_threads())
"""

def loaded_step(threads, busy):
    """Seconds of a step after settling, beside busy processes; threads: a number, or "chosen"."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(busy)]
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    if threads == "chosen":
        del env["OMP_NUM_THREADS"]
    try:
        time.sleep(1)
        out = subprocess.run([sys.executable, "-c", LOADED_STEP, threads], cwd=ROOT, env=env,
                             check=True, capture_output=True, text=True).stdout
    finally:
        for other in others:
            other.kill()
            other.wait()
    seconds, used = out.split()
    return float(seconds), int(used)

def bench_load(args):
    """A step of encoder, prior and decoder: as many threads as cores, one, or as train.py chooses."""
    print_header(("busy programs", "threads", "ms a step: median", "least to most", "used"))
    cases = [(busy, threads) for busy in (0, 1, 2)
             for threads in (str(os.cpu_count()), "1", "chosen")]
    times = {case: [] for case in cases}
    for _ in range(args.rounds):
        for busy, threads in cases:
            times[busy, threads].append(loaded_step(threads, busy))
    for (busy, threads), runs in times.items():
        seconds, used = zip(*runs)
        print_row(str(busy), threads, f"{1000 * median(seconds):.0f}",
                  f"{1000 * min(seconds):.0f} to {1000 * max(seconds):.0f}",
                  " ".join(map(str, used)))

# ---- the curve ----

@torch.no_grad()
def denoising_loss(model, batch):
    """The denoising loss on a fixed draw of images, t, eps and of the noise of z."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(model(*batch)["ddpm"])

def curve(args, recipe, data, make):
    """The denoising loss at each of MARKS, trained on the same draws whatever the U-Net is."""
    cfg = config(10, lr=args.lr, schedule="constant", **recipe)
    held_out = train.draw_batch(IDiff(config(120, seed=1_000_003)), data, 0)
    width, count = fit(make, cfg, args.params)
    model, ema, optimizers = build(cfg, make, width)
    found = []
    for step in range(args.images // 10):
        batch = train.draw_batch(model, data, step)
        train.train_step(cfg, model, ema, optimizers, batch, step)
        if 10 * (step + 1) in MARKS:
            found.append(f"{denoising_loss(model, held_out):.4f}")
    return f"{count:.2f}", *found

def bench_curve(args, data):
    found = cases()
    print_header(("recipe", "U-Net", "M params",
                  *[f"loss at {n} images" for n in MARKS if n <= args.images]))
    for name, recipe in RECIPES.items():
        for case, make in found.items():
            print_row(name, case, *curve(args, recipe, data, make))

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds, 4 images, no full size")
    parser.add_argument("--curve", action="store_true", help="denoising loss by images seen")
    parser.add_argument("--gpu", action="store_true", help="both sizes' steps against the limit")
    parser.add_argument("--load", action="store_true", help="steps beside busy programs")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--batch", type=int, default=16 if DEVICE.type == "cpu" else 128,
                        help="images a step with each U-Net (default: 16, on CUDA 128)")
    parser.add_argument("--params", type=float, default=9.5,
                        help="U-Net parameters in millions, nearly (default: 9.5)")
    parser.add_argument("--images", type=int, default=3000, help="of --curve (default: 3000)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of --curve (default: 5e-4)")
    return parser

def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.load:
        return bench_load(args)
    where = (torch.cuda.get_device_name() if DEVICE.type == "cuda"
             else f"CPU, {torch.get_num_threads()} threads")
    if args.quick:
        args.rounds, args.batch = min(args.rounds, 3), min(args.batch, 4)
    print(f"{where}, torch {torch.__version__}, {PRECISION}\n")
    data = load_data("shapes3d", DEVICE)
    if args.curve:
        return bench_curve(args, data)
    if args.gpu:
        return bench_limit(args, data)
    bench_nets(args, data)
    with tempfile.TemporaryDirectory() as folder:
        write_file(f"{folder}/own.npz", data)
        bench_data(args, data, load_data(f"{folder}/own.npz", DEVICE))
        bench_levers(args, data)
        bench_start(args, folder)

if __name__ == "__main__":
    main()
