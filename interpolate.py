# SPDX-License-Identifier: MIT
"""What each latent does: traversals, edits, interpolations, samples: labelled PNG grids, a GIF.

    python interpolate.py runs/NAME/ckpt.pt
    python interpolate.py runs/NAME/ckpt.pt --swap 12 photo.png --latents scale "object hue"

IMAGE, A and B are row numbers of the data or paths of pictures. Their latents are the encoder's
means, and diffusion keeps their noise, which the ODE run backwards finds.
"""
import argparse
import io
import math
import warnings
from pathlib import Path

import numpy as np
import torch

from evaluate import (as_arrays, drawing, entropies, find_data, match, mutual_information, progress,
                      try_folder, warn_of_other_data)
from idiff import (SAMPLERS, invert, load_checkpoint, load_data, pick_device, read_picture,
                   save_grid, script, seeded_noise, time_grid)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="ckpt.pt of a run of train.py")
    add("--image", nargs=1, metavar="IMAGE", help="redraw and traverse this image")
    add("--swap", nargs=2, metavar=("A", "B"), help="put latents of image B into image A")
    add("--between", nargs=2, metavar=("A", "B"), help="interpolate: z linearly, noise on a sphere")
    add("--latents", nargs="+", metavar="NAME",
        help="which to traverse or swap: z3, 3, or its factor (default: all)")
    add("--columns", type=int, default=10, help="images per row (default: 10)")
    add("--steps", type=int, help="sampler steps (default: 20; 50 for given images)")
    add("--sampler", choices=SAMPLERS, default="dpmpp", help="(default: dpmpp)")
    add("--seed", type=int, default=0, help="of rows encoded, base image and noise (default: 0)")
    add("--data", help="name or path of the data (default: those the model was trained on)")
    add("--out", type=Path, help="folder of the pictures (default: the checkpoint's)")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    return parser


# ---- Images, latents and their names ----

def read_image(name, data):
    """Image (C, H, W) of a row number, or the centre of a picture at the data's size."""
    if name.isdecimal():
        if int(name) >= len(data):
            raise ValueError(f"row {name} is out of range: {data.name} has {len(data)} rows.")
        row = torch.tensor([int(name)], device=data.device)
        return data.images(row)[0]
    if not Path(name).exists():
        raise ValueError(f"'{name}' is neither a row number nor the path of a picture.")
    channels, side, _ = data.image_shape
    pixels = torch.from_numpy(read_picture(name, side)).to(data.device)        # (S, S, 3)
    image = pixels.permute(2, 0, 1) / 127.5 - 1
    return image if channels == 3 else image.mean(dim=0, keepdim=True)


def read_images(names, model, data, steps):
    """Images (B, C, H, W), latents (B, D), and the noise from which diffusion redraws them."""
    x = torch.stack([read_image(name, data) for name in names])
    z, _ = model.encode(x)
    if model.unet is None:
        return x, z, x                                         # the last is not used
    ts = time_grid(steps, model.sde).to(x)
    return x, z, invert(model.eps_fn(z), x, ts, model.sde)


def information(z, p):
    """How much each latent tells of u, (D,) in nats: a lower bound on I(z_i; u), log N at most.

    As in contrast_loss, but a latent at a time. z: (N, D), or (N, D, L) categories; p: p(z|u).
    """
    log_p = p.log_prob(z[:, None])                             # (N, N, D)
    own = log_p.diagonal().mT                                  # (N, D)
    any_u = log_p.logsumexp(dim=1) - math.log(len(z))          # (N, D)
    return (own - any_u).mean(dim=0)


def survey(model, data, seed):
    """2,000 seeded rows (N,), their codes (N, D), and {latent: its name} in the factors' order.

    "z3 · scale" if latent 3 matches a factor, else "z3": pairs have the largest sum of mutual
    information, and each over 10 % of the factor's entropy, where chance gives 1 to 5 %. Without
    factors latents are in the order of what they tell of u, if it is the data's own.
    """
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:2000]
    rows = rows.to(data.device)
    codes = torch.cat([model.encode(data.images(part))[0] for part in rows.split(500)])

    # without factors
    if not data.factor_names:
        order = range(codes.shape[1])
        if model.cfg.u == "own" and data.u.shape[1] == model.cfg.n_u:
            part = rows[:1000]
            q = model.encoder(data.images(part))
            told = information(q.mean, model.prior(data.u[part]))
            order = told.argsort(descending=True).tolist()
        return rows, codes, {i: f"z{i}" for i in order}

    # the latents that match a factor, in the factors' order, then all others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                        # evaluate.py tells of the bins
        _, factors = as_arrays(codes, data.factors(rows), n_bins=20)
    mi = mutual_information(codes, factors)                    # (D, K)
    h = entropies(factors)
    names = {}
    for k, i in sorted((k, i) for i, k in zip(*match(mi))):
        if mi[i, k] > 0.1 * h[k]:
            names[i] = f"z{i} · {data.factor_names[k]}"
    for i in range(len(mi)):
        names.setdefault(i, f"z{i}")
    return rows, codes, names


def choose(wanted, names):
    """Those of {latent: name} that are wanted, by number or factor; all for None."""
    if not wanted:
        return names
    # "3", "z3" and "scale" all mean "z3 · scale"
    known = {}
    for i, name in names.items():
        for key in (str(i), *name.split(" · ")):
            known[key] = i

    # in the order that they are asked for
    chosen = {}
    for name in wanted:
        if name not in known:
            raise ValueError(f"no latent is '{name}'. There are: {', '.join(names.values())}.")
        chosen[known[name]] = names[known[name]]
    return chosen


# ---- From latents to pictures ----

def render(model, z, start, args, keeps_noise=False):
    """{"decoder": images, "diffusion": images}, (B, C, H, W) each, of z (B, D) and start noise.

    keeps_noise: diffusion ends where invert began, without the last step of model.sample.
    """
    pictures = {"decoder": model.decode(z)}
    if model.unet is None:
        return pictures

    # ten at a time, all from one start or each from its own
    ts = time_grid(args.steps, model.sde).to(z)
    start = start.expand(len(z), *start.shape[1:])
    batches = list(zip(z.split(10), start.split(10)))
    parts = []
    for part, begin in progress(batches, "diffusion, 10 images each"):
        if keeps_noise:
            sampler = SAMPLERS[args.sampler]
            x = sampler(model.eps_fn(part), begin, ts, model.sde).clamp(-1, 1)
        else:
            seeds = [args.seed + 1] * len(part)                # the same for every image
            noise = seeded_noise(seeds, begin.shape[1:], begin.device)
            x = model.sample(part, begin, args.steps, args.sampler, noise)
        parts.append(x)
    pictures["diffusion"] = torch.cat(parts)
    return pictures


def slerp(a, b, w):
    """Points (S, C, H, W) at shares w (S,) of the way from a to b (1, C, H, W) along the sphere."""
    # shares of the angle between a and b
    w = w.view(-1, 1, 1, 1)
    cos = (a * b).sum() / (a.norm() * b.norm())
    angle = cos.clamp(-1, 1 - 1e-6).acos()                     # 0 would give 0 / 0
    to_a = ((1 - w) * angle).sin()
    to_b = (w * angle).sin()
    return (to_a * a + to_b * b) / angle.sin()


def traverse(model, codes, z, start, names, args, kind):
    """A grid per network, and a looping GIF: each latent of names over its range, from z (1, D)."""
    latents = list(names)
    n = args.columns

    # a row a latent: z, but for that latent, which runs over the middle 96 % of its codes
    quantiles = codes.new_tensor([0.02, 0.98])
    low, high = torch.quantile(codes[:, latents], quantiles, dim=0)            # (L,) each
    varied = z.repeat(len(latents), n, 1)                      # (L, n, D)
    for row, i in enumerate(latents):
        varied[row, :, i] = low[row] + (high[row] - low[row]) * torch.linspace(0, 1, n).to(z)

    # drawn by each network, labelled with the range
    pictures = render(model, varied.flatten(0, 1), start, args, kind == "image")
    rows = [f"{name}\n{a:.2f} to {b:.2f}" for name, a, b in zip(names.values(), low, high)]
    columns = [""] * n
    columns[0] = "2 % quantile"
    columns[-1] = "98 % quantile"
    for network, images in pictures.items():
        with drawing(args.out / f"{kind}_{network}.png") as file:
            save_grid(file, images, rows, columns)
    with drawing(args.out / f"{kind}.gif") as file:
        write_gif(file, pictures, names, n)


def write_gif(file, pictures, names, n):
    """A looping GIF of n frames and back: a row per network, a column per latent."""
    from PIL import Image
    titles = [name.replace(" · ", "\n") for name in names.values()]
    images = torch.cat(list(pictures.values()))                # (networks * L * n, C, H, W)
    frames = images.unflatten(0, (-1, n)).unbind(dim=1)
    pages = []
    for frame in frames + frames[-2:0:-1]:
        page = io.BytesIO()
        save_grid(page, frame, list(pictures), titles)
        pages.append(Image.open(page).convert("RGB").quantize())
    pages[0].save(file, save_all=True, append_images=pages[1:], duration=120, loop=0)


def draw_true_factors(file, data, row, columns):
    """A grid of the data's images that differ from one row's in a single factor."""
    # which factors of each image are those of the row
    everything = torch.arange(len(data), device=data.device)
    factors = data.factors(everything).cpu().numpy()
    same = factors == factors[row]
    varied = data.varied.tolist()
    if not varied:
        return

    # of each factor an image a value; a row with fewer values ends in white
    grid = torch.ones(len(varied), columns, *data.image_shape)            # white
    for k, images in zip(varied, grid):
        others_same = np.delete(same, k, axis=1).all(axis=1)
        rows = np.flatnonzero(others_same)
        _, first = np.unique(factors[rows, k], return_index=True)
        n = min(columns, len(first))
        shown = np.linspace(0, len(first) - 1, n).round().astype(int)
        chosen = torch.from_numpy(rows[first[shown]])
        images[:n] = data.images(chosen.to(data.device))

    labels = [f"{data.factor_names[k]}\n{data.factor_sizes[k]} values" for k in varied]
    save_grid(file, grid.flatten(0, 1), labels, [""] * columns)


def edit(kind, model, data, codes, names, args):
    """Picture of --image, --swap or --between: A, a row per network of what becomes of it, B."""
    x, z, noise = read_images(getattr(args, kind), model, data, args.steps)
    titles = ["redrawn"]

    if kind == "image":
        traverse(model, codes, z, noise, names, args, kind)

    if kind == "swap":                                         # each latent of B, then all of them
        edited = [z[0]]
        for i, name in names.items():
            one = z[0].clone()
            one[i] = z[1, i]
            edited.append(one)
            titles.append(f"{name}\nof B".replace(" · ", "\n"))
        if len(names) > 1:
            every = z[0].clone()
            every[list(names)] = z[1, list(names)]
            edited.append(every)
            titles.append("all these\nof B")
        z = torch.stack(edited)
        noise = noise[:1]

    if kind == "between":                                      # from A's latents and noise to B's
        w = torch.linspace(0, 1, args.columns).to(z)
        z = torch.lerp(z[:1], z[1:], w[:, None])
        noise = slerp(noise[:1], noise[1:], w)
        titles = [f"{share:.2f}" for share in w]

    # a row per network, between the images as they are
    images = []
    pictures = render(model, z, noise, args, keeps_noise=True)
    for row in pictures.values():
        images += [x[:1], row, x[1:]]
    titles.insert(0, "A")
    if len(x) > 1:
        titles.append("B")
    with drawing(args.out / f"{kind}.png") as file:
        save_grid(file, torch.cat(images), list(pictures), titles)


def run(args):
    """Draw what the flags name; OSError, ValueError or MemoryError in one line if one is wrong."""
    for name, least in (("columns", 2), ("steps", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")

    # model and data
    device = pick_device(args.device)
    model = load_checkpoint(args.checkpoint, device)
    args.out = args.out or Path(args.checkpoint).parent
    try_folder(args.out)
    data_arg = args.data or find_data(model.info, args.checkpoint)
    data = load_data(data_arg, device, progress, model.cfg.image_size,
                     model.info.get("factor_sizes"))
    warn_of_other_data(data, model.info, args.checkpoint)

    # what the latents are called
    rows, codes, names = survey(model, data, args.seed)
    names = choose(args.latents, names)

    # edits of given images, or else the traversals
    kinds = [kind for kind in ("image", "swap", "between") if getattr(args, kind)]
    args.steps = args.steps or (50 if kinds else 20)
    if kinds and model.unet is not None and args.sampler in ("em", "pc"):
        raise ValueError(f"--sampler {args.sampler} adds noise and so cannot keep an image's own.")
    print(f"{', '.join(names.values())}; pictures go to {args.out}", flush=True)
    for kind in kinds:
        edit(kind, model, data, codes, names, args)
    if not kinds:
        with drawing(args.out / "true_factors.png") as file:
            draw_true_factors(file, data, rows[0].item(), args.columns)
        start = seeded_noise([args.seed], data.image_shape, device)()
        traverse(model, codes, codes[:1], start, names, args, "traversal")


def main(argv=None):
    with script("interpolate.py", "--columns"):
        run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
