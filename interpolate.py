# SPDX-License-Identifier: MIT
"""What each latent does: traversals, edits and interpolations, as labelled PNG grids and a GIF.

    python interpolate.py runs/NAME/ckpt.pt
    python interpolate.py runs/NAME/ckpt.pt --swap 12 photo.png --latents scale "object hue"

IMAGE, A and B are row numbers of the data or paths of pictures. Their latents are the encoder's
means, and diffusion keeps their noise, which the ODE run backwards finds.
"""
import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from evaluate import as_arrays, entropies, match, mutual_information
from idiff import SAMPLERS, invert, load_checkpoint, load_data, save_grid, seeded_noise, time_grid

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, devices = parser.add_argument, ["cuda"] * torch.cuda.is_available() + ["cpu"]
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
    add("--device", choices=devices, default=devices[0], help="(default: cuda where present)")
    return parser

# ---- Images, latents and their names ----
def read_image(name, data):
    """Image (C, H, W) of a row number, or the centre of a picture at the data's size."""
    if name.isdecimal():
        if int(name) >= len(data):
            raise ValueError(f"row {name} is out of range: {data.name} has {len(data)} rows.")
        return data.images(torch.tensor([int(name)], device=data.device))[0]
    channels, *size = data.image_shape                                 # H = W
    try:
        picture = ImageOps.exif_transpose(Image.open(name)).convert("L" if channels == 1 else "RGB")
    except Exception:                                                  # many kinds, as of formats
        raise ValueError(f"'{name}' is neither a row number nor a readable picture.") from None
    x = torch.from_numpy(np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS)))
    return x.view(*size, -1).permute(2, 0, 1).to(data.device) / 127.5 - 1

def read_images(names, model, data, steps):
    """Images (B, C, H, W), latents (B, D), and the noise from which diffusion redraws them."""
    x = torch.stack([read_image(name, data) for name in names])
    z, ts = model.encode(x)[0], time_grid(steps, model.sde).to(x)
    return x, z, invert(model.eps_fn(z), x, ts, model.sde) if model.unet else x    # x: not used

def survey(model, data, seed):
    """2,000 seeded rows (N,), their codes (N, D), and {latent: its name} in the factors' order.

    "z3 · scale" if latent 3 matches a factor, else "z3": pairs have the largest sum of mutual
    information, and each over 10 % of the factor's entropy, where chance gives 1 to 5 %.
    """
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:2000]
    rows = rows.to(data.device)
    codes = torch.cat([model.encode(data.images(part))[0] for part in rows.split(500)])
    _, factors = as_arrays(codes, data.factors(rows))
    mi = mutual_information(codes, factors)                            # (D, K)
    pairs = sorted((k, i) for i, k in zip(*match(mi)) if mi[i, k] > 0.1 * entropies(factors)[k])
    names = {i: f"z{i} · {data.factor_names[k]}" for k, i in pairs}
    return rows, codes, names | {i: f"z{i}" for i in range(len(mi)) if i not in names}

def choose(wanted, names):
    """Those of {latent: name} that are wanted, by number or factor; all for None."""
    known = {key: i for i, name in names.items() for key in (str(i), *name.split(" · "))}
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"no latent is '{name}'. There are: {', '.join(names.values())}.")
    return {known[name]: names[known[name]] for name in wanted} if wanted else names

# ---- From latents to pictures ----
def render(model, z, start, args):
    """{"decoder": images, "diffusion": images}, (B, C, H, W) each, of z (B, D) and start noise."""
    if model.unet is None:
        return {"decoder": model.decode(z)}
    parts, ts = [], time_grid(args.steps, model.sde).to(z)
    batches = list(zip(z.split(10), start.expand(len(z), *start.shape[1:]).split(10)))
    for part, begin in tqdm(batches, "diffusion, 10 images each", disable=None, leave=False):
        noise = seeded_noise([args.seed + 1] * len(part), start.shape[1:], start.device)
        parts.append(SAMPLERS[args.sampler](model.eps_fn(part), begin, ts, model.sde).clamp(-1, 1)
                     if args.inverts else                              # ends where invert began
                     model.sample(part, begin, args.steps, args.sampler, noise))
    return {"decoder": model.decode(z), "diffusion": torch.cat(parts)}

def slerp(a, b, w):
    """Points (S, C, H, W) at shares w (S,) of the way from a to b (1, C, H, W) along the sphere."""
    w, cos = w.view(-1, 1, 1, 1), (a * b).sum() / (a.norm() * b.norm())
    angle = cos.clamp(-1, 1 - 1e-6).acos()                             # 0 would give 0 / 0
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()

def traverse(model, codes, z, start, names, args, kind):
    """A grid per network, and a looping GIF: each latent of names over its range, from z (1, D)."""
    latents, n = list(names), args.columns
    low, high = torch.quantile(codes[:, latents], codes.new_tensor([0.02, 0.98]), dim=0)
    varied, shares = z.repeat(len(latents), n, 1), torch.linspace(0, 1, n).to(z)  # (L, n, D), (n,)
    varied[range(len(latents)), :, latents] = torch.lerp(low, high, shares[:, None]).T
    pictures = render(model, varied.flatten(0, 1), start, args)
    rows = [f"{name}\n{a:.2f} to {b:.2f}" for name, a, b in zip(names.values(), low, high)]
    columns = ["2 % quantile", *[""] * (n - 2), "98 % quantile"]
    for network, images in pictures.items():
        save_grid(args.out / f"{kind}_{network}.png", images, rows, columns)
    frames = torch.cat(list(pictures.values())).unflatten(0, (-1, n)).unbind(1)
    titles, pages = [name.replace(" · ", "\n") for name in names.values()], []
    for frame in frames + frames[-2:0:-1]:                             # there and back
        save_grid(page := io.BytesIO(), frame, list(pictures), titles)
        pages.append(Image.open(page).convert("RGB").quantize())
    gif = {"save_all": True, "append_images": pages[1:], "duration": 120, "loop": 0}
    pages[0].save(args.out / f"{kind}.gif", **gif)

def draw_true_factors(data, row, args):
    """true_factors.png: the data's images that differ from one row's in a single factor."""
    factors = data.factors(torch.arange(len(data), device=data.device)).cpu().numpy()
    same, varied = factors == factors[row], data.varied.tolist()
    grid = torch.ones(len(varied), args.columns, *data.image_shape)
    for k, images in zip(varied, grid):
        rows = np.flatnonzero(np.delete(same, k, axis=1).all(axis=1))
        _, first = np.unique(factors[rows, k], return_index=True)
        shown = np.linspace(0, len(first) - 1, min(args.columns, len(first))).round().astype(int)
        images[:len(shown)] = data.images(torch.from_numpy(rows[first[shown]]).to(data.device))
    labels = [f"{data.factor_names[k]}\n{data.factor_sizes[k]} values" for k in varied]
    save_grid(args.out / "true_factors.png", grid.flatten(0, 1), labels, [""] * args.columns)

def edit(kind, model, data, codes, names, args):
    """Picture of --image, --swap or --between: A, a row per network of what becomes of it, B."""
    x, z, noise = read_images(getattr(args, kind), model, data, args.steps)
    titles = ["redrawn"]
    if kind == "image":
        traverse(model, codes, z, noise, names, args, kind)
    elif kind == "swap":
        titles += [f"{name}\nof B".replace(" · ", "\n") for name in (*names.values(), "all these")]
        sets = [(), *((i,) for i in names), *[names] * (len(names) > 1)]
        taken = torch.tensor([[i in s for i in range(z.shape[1])] for s in sets], device=z.device)
        z, noise = torch.where(taken, z[1], z[0]), noise[:1]
    else:
        w = torch.linspace(0, 1, args.columns).to(z)
        z, noise = torch.lerp(z[:1], z[1:], w[:, None]), slerp(noise[:1], noise[1:], w)
        titles = [f"{share:.2f}" for share in w]
    pictures = render(model, z, noise, args)
    titles = ["A", *titles[:len(z)], "B"][:len(x) + len(z)]
    images = torch.cat([torch.cat([x[:1], row, x[1:]]) for row in pictures.values()])
    save_grid(args.out / f"{kind}.png", images, list(pictures), titles)

def run(args):
    """Draw what the flags name; OSError, ValueError or MemoryError in one line if one is wrong."""
    for name, least in (("columns", 2), ("steps", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    model = load_checkpoint(args.checkpoint, args.device)
    args.out = args.out or Path(args.checkpoint).parent
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(args.data or str(model.info.get("data_arg", f"that of {args.checkpoint}")),
                     args.device, tqdm)
    rows, codes, names = survey(model, data, args.seed)
    names = choose(args.latents, names)
    print(f"{', '.join(names.values())}; pictures go to {args.out}", flush=True)
    kinds = [kind for kind in ("image", "swap", "between") if getattr(args, kind)]
    args.steps, args.inverts = args.steps or (50 if kinds else 20), bool(kinds)
    if kinds and model.unet and args.sampler in ("em", "pc"):
        raise ValueError(f"--sampler {args.sampler} adds noise and so cannot keep an image's own.")
    for kind in kinds:
        edit(kind, model, data, codes, names, args)
    if not kinds:
        draw_true_factors(data, rows[0].item(), args)
        start = seeded_noise([args.seed], data.image_shape, args.device)()
        traverse(model, codes, codes[:1], start, names, args, "traversal")

def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"interpolate.py: {' '.join(str(error).split())}") from None

if __name__ == "__main__":
    main()
