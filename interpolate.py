# SPDX-License-Identifier: MIT
"""Show what each latent does: traversals, edits, interpolations, samples, as PNG grids and a GIF.

    python interpolate.py runs/NAME/ckpt.pt
    python interpolate.py runs/NAME/ckpt.pt --sample 10 --set scale=3 "object hue"=0.5
    python interpolate.py runs/NAME/ckpt.pt --swap 12 photo.png --latents scale "object hue"

IMAGE, A and B are row numbers of the data or paths of pictures. Their latents are the encoder's
means. Diffusion keeps their noise, which is found by running the ODE backwards. In Python: sample,
swap and between return images with labels, (images, rows, columns), for idiff.save_grid; traverse
returns these for each network.
"""
import argparse
import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch

import idiff
from evaluate import (as_arrays, codes_of_values, different, entropies, information, match,
                      mutual_information, render)
from idiff import drawing


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=idiff.user_path, help="ckpt.pt of a run of train.py")
    add("--sample", type=int, metavar="N", help="draw N new images, beside real ones; each also "
        "goes into the folder sample-N, and all with their z and u into sample-N.npz")
    add("--from", dest="how", choices=("shuffled", "u"), help="what new images are made from: "
        "latents, each from another image (shuffled, the default), or z drawn from p(z|u)")
    add("--like", type=int, metavar="ROW", help="draw new images from the data's own u of this row")
    add("--set", nargs="+", type=assignment, metavar="NAME=VALUE",
        help="give new images, or --image, these values of factors, in the data's own units")
    add("--image", metavar="IMAGE", help="redraw and traverse this image")
    add("--swap", nargs=2, metavar=("A", "B"), help="put latents of image B into image A")
    add("--between", nargs=2, metavar=("A", "B"), help="interpolate: z linearly, noise on a sphere")
    add("--latents", nargs="+", metavar="NAME",
        help="latents to traverse or swap, by name, number or factor: z3, 3, scale (default: all)")
    add("--columns", type=int, default=10, help="images per row (default: 10)")
    add("--steps", type=int, help="number of sampler steps (default: 20; 50 for given images)")
    add("--sampler", choices=idiff.SAMPLERS, default="dpmpp", help="sampler (default: dpmpp)")
    add("--seed", type=int, default=0,
        help="seed of the rows encoded, the base image and the noise (default: 0)")
    add("--data", type=os.path.expanduser,
        help="name or path of the data (default: the data that the model was trained on)")
    add("--out", type=idiff.user_path, help="folder for the pictures (default: the checkpoint's)")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    return parser


def assignment(text):
    """(name, number) of a text such as scale=3; ValueError if the text is not like this."""
    name, _, value = text.rpartition("=")
    return name, float(value)


# ---- Images, latents and their names ----

def read_image(name, data):
    """The image (C, H, W) of a row number, or the centre of a picture at the data's size.

    name: a text, or an image (C, H, W), which is returned as it is.
    """
    if torch.is_tensor(name):
        return name
    name = str(name)
    if name.isdecimal():
        if int(name) >= len(data):
            raise ValueError(f"row {name} is out of range: {data.name} has {len(data)} rows.")
        row = torch.tensor([int(name)], device=data.device)
        return data.images(row)[0]
    if not Path(name).exists():
        raise ValueError(f"'{name}' is neither a row number nor the path of a picture.")
    channels, side, _ = data.image_shape
    pixels = torch.from_numpy(idiff.read_picture(name, side)).to(data.device)  # (S, S, 3)
    image = pixels.permute(2, 0, 1) / 127.5 - 1
    return image if channels == 3 else image.mean(dim=0, keepdim=True)


@torch.no_grad()
def survey(model, data, seed=0):
    """2,000 seeded rows (N,), their codes (N, D), and {latent: its name} in the factors' order.

    A name is "z3 · scale" if latent 3 matches a factor, else "z3". The matched pairs have the
    largest sum of mutual information, and each has over 10 % of the factor's entropy, where chance
    gives 1 to 5 %. If the data have no factors but a u of their own, the latents that tell most
    about u come first.
    """
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:2000]
    rows = rows.to(data.device)
    codes = torch.cat([model.encode(data.images(part))[0] for part in rows.split(500)])

    order = range(codes.shape[1])
    names = {}
    if data.factor_names:
        # first the latents that match a factor, in the factors' order
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                    # evaluate.py warns of the bins
            _, factors = as_arrays(codes, data.factors(rows), n_bins=20)
        mi = mutual_information(codes, factors)                # (D, K)
        h = entropies(factors)
        for k, i in zip(*match(mi.T)):
            if mi[i, k] > 0.1 * h[k]:
                names[i] = f"z{i} · {data.factor_names[k]}"
    elif model.cfg.u == "own" and data.u.shape[1] == model.cfg.n_u:
        part = rows[:1000]
        q = model.encoder(data.images(part))
        told, _ = information(q.mean, model.prior(data.u[part]))
        order = told[:-1].argsort(descending=True).tolist()
    for i in order:
        names.setdefault(i, f"z{i}")
    return rows, codes, names


def choose(wanted, names):
    """The entries of {latent: name} that are wanted, by number or factor; all if wanted is None."""
    if not wanted:
        return names
    # "3", "z3" and "scale" all mean "z3 · scale"
    known = {str(i): i for i in names}
    for i, name in names.items():
        known.update(dict.fromkeys(name.split(" · "), i))      # a factor may be called "3", too

    # in the order in which they are asked for
    chosen = {}
    for name in wanted:
        i = known.get(str(name))
        if i is None:
            raise ValueError(f"no latent is '{name}'. There are: {', '.join(names.values())}.")
        chosen[i] = names[i]
    return chosen


def with_values(z, values, data, known):
    """(z (n, D), rows): z with factors set to values, and the surveyed rows nearest to these.

    A latent that matches a factor gets the median code of the rows that have the value; a value
    between two others gets a code between theirs. values: {factor, or its latent: value, as in
    data.values}. ValueError for a latent without a factor, or a value that is out of range.
    """
    rows, codes, names = known
    z = z.clone()
    miss = np.zeros(len(rows))
    for name, value in values.items():
        chosen = choose([name], names)
        [(i, label)] = chosen.items()
        factor = label.split(" · ")[-1]
        another = name in data.factor_names and name != factor
        if another or factor not in data.factor_names:
            raise ValueError(f"'{name}' names no latent that matches a factor, so none of its "
                             "codes has a value.")
        k = data.factor_names.index(factor)
        index = data.factors(rows)[:, k].cpu()
        seen = data.values[k][index]                           # (N,)
        if not seen.min() <= value <= seen.max():
            raise ValueError(f"{factor} goes from {seen.min()} to {seen.max()}, got {value}.")
        of_latent = codes[:, i].cpu().numpy()
        z[:, i] = float(codes_of_values(value, of_latent, seen))
        miss += abs(seen - value)
    return z, rows[np.flatnonzero(miss == miss.min())]


# ---- From latents to images ----

@torch.no_grad()
def invert(model, data, names, steps):
    """The images (B, C, H, W) of names (see read_image), their latents (B, D), and the noise from
    which diffusion redraws them."""
    x = torch.stack([read_image(name, data) for name in names])
    z, _ = model.encode(x)
    if model.unet is None:
        return x, z, x                                         # the last one is not used
    ts = idiff.time_grid(steps, model.sde).to(x)
    return x, z, idiff.invert(model.eps_fn(z), x, ts, model.sde)


def slerp(a, b, w):
    """Points (S, C, H, W) at shares w (S,) of the way from a to b (1, C, H, W) along the sphere."""
    # shares of the angle between a and b
    w = w.view(-1, 1, 1, 1)
    cos = (a * b).sum() / (a.norm() * b.norm())
    angle = cos.clamp(-1, 1 - 1e-6).acos()                     # an angle of 0 would give 0 / 0
    to_a = ((1 - w) * angle).sin()
    to_b = (w * angle).sin()
    return (to_a * a + to_b * b) / angle.sin()


def traverse(model, data, image=None, latents=None, columns=10, steps=20, sampler="dpmpp", seed=0):
    """{network: (images, rows, columns)}: each latent over its range, the others as they are.

    image: an image (see read_image) whose latents and noise are kept, or None for the first
    surveyed row and new noise; latents: which ones, by number or name. All cells have the same
    noise, so that only the latent changes.
    """
    _, codes, names = survey(model, data, seed)
    names = choose(latents, names)
    latents = list(names)
    if image is None:
        z = codes[:1]
        start = idiff.seeded_noise([seed], data.image_shape, data.device)()
    else:
        _, z, start = invert(model, data, [image], steps)

    # a row for each latent, which runs over the middle 96 % of its codes; the rest of z stays
    quantiles = codes.new_tensor([0.02, 0.98])
    low, high = torch.quantile(codes[:, latents], quantiles, dim=0)            # (L,) each
    varied = z.repeat(len(latents), columns, 1)                # (L, n, D)
    share = torch.linspace(0, 1, columns).to(z)
    for row, i, a, b in zip(varied, latents, low, high):
        row[:, i] = a + (b - a) * share

    # drawn by each network, labelled with the range
    keeps_noise = image is not None
    pictures = render(model, varied.flatten(0, 1), start, steps, sampler, seed, keeps_noise)
    rows = [f"{name}\n{a:.2f} to {b:.2f}" for name, a, b in zip(names.values(), low, high)]
    titles = [""] * columns
    titles[0] = "2 % quantile"
    titles[-1] = "98 % quantile"
    return {network: (images, rows, titles) for network, images in pictures.items()}


def beside(model, x, z, noise, titles, steps, sampler):
    """(images, rows, columns): a row per network, which draws latents z (n, D) with noise, between
    the given images x: A, and perhaps B."""
    pictures = render(model, z, noise, steps, sampler, keeps_noise=True)
    images = []
    for row in pictures.values():
        images += [x[:1], row, x[1:]]
    titles = ["A", *titles, *["B"][:len(x) - 1]]
    return torch.cat(images), list(pictures), titles


def redraw(model, data, image, steps=50, sampler="dpmpp", values=None, seed=0):
    """(images, rows, columns): an image (see read_image) and how each network redraws it.

    values: see with_values; if any are given, a last column shows the image with them.
    """
    x, z, noise = invert(model, data, [image], steps)
    titles = ["redrawn"]
    if values:
        edited, _ = with_values(z, values, data, survey(model, data, seed))
        z = torch.cat([z, edited])
        titles.append("\n".join(f"{name} = {value:g}" for name, value in values.items()))
    return beside(model, x, z, noise, titles, steps, sampler)


def swap(model, data, a, b, latents=None, steps=50, sampler="dpmpp", seed=0):
    """(images, rows, columns): image a with each of b's latents, then with all of them.

    a, b: see read_image; latents: which ones, by number or name. The noise stays a's.
    """
    x, z, noise = invert(model, data, [a, b], steps)
    names = choose(latents, survey(model, data, seed)[2])
    edits = {f"{name}\nof B".replace(" · ", "\n"): [i] for i, name in names.items()}
    if len(names) > 1:
        edits["all these\nof B"] = list(names)

    # first a as it is, then with what each edit takes from b
    edited = z[:1].repeat(1 + len(edits), 1)
    for row, taken in zip(edited[1:], edits.values()):
        row[taken] = z[1, taken]
    return beside(model, x, edited, noise[:1], ["redrawn", *edits], steps, sampler)


def between(model, data, a, b, columns=10, steps=50, sampler="dpmpp"):
    """(images, rows, columns): from image a to b, with z on a line and the noise on a sphere.

    a, b: see read_image.
    """
    x, z, noise = invert(model, data, [a, b], steps)
    w = torch.linspace(0, 1, columns).to(z)
    z = torch.lerp(z[:1], z[1:], w[:, None])
    noise = slerp(noise[:1], noise[1:], w)
    return beside(model, x, z, noise, [f"{share:.2f}" for share in w], steps, sampler)


def draw_codes(model, data, n, how="shuffled", like=None, values=None, seed=0):
    """z (n, D) of n new images, their u (n, U) or None, and rows (n,) of real images drawn alike.

    how: with "shuffled" each latent of z comes from another image; with "u" z is drawn from p(z|u),
    and u as in training. like: a row of the data, whose own u all images get; values: see
    with_values. ValueError if the data cannot give this.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    torch.manual_seed(seed)
    u = None
    if like is not None:
        if model.cfg.u != "own" or not like < len(data):
            raise ValueError(f"--like needs a u of the data's own, and a row below {len(data)}: "
                             f"the model's u is '{model.cfg.u}', got row {like}.")
        rows = (data.u == data.u[like]).all(dim=1).nonzero().flatten()
        u = data.u[like].expand(n, -1)
    elif how == "u":
        rows, u = data.draw(n, generator, model.cfg.u, model.cfg.u_scale)
    else:
        rows, codes, _ = survey(model, data, seed)
        shape = n, codes.shape[1]
        index = torch.randint(len(codes), shape, generator=generator, device=data.device)
        z = codes.gather(0, index)

    # z from u; then the values that are asked for
    if u is not None:
        z = model.sample_prior(u)
    if values:
        z, rows = with_values(z, values, data, survey(model, data, seed))

    # real images: row k has the u of image k, else all are used once before any is used again
    if how == "u" and like is None and not values:
        return z, u, rows
    order = torch.randperm(len(rows), generator=generator, device=data.device)
    chosen = order.repeat(n // len(rows) + 1)[:n]
    return z, u, rows[chosen]


def sample(model, data, n, steps=20, sampler="dpmpp", seed=0, **what):
    """(images, rows, columns): n new images by each network, then real images drawn alike.

    what: see draw_codes; how they are drawn: see draw_new.
    """
    z, _, rows = draw_codes(model, data, n, seed=seed, **what)
    return draw_new(model, data, z, rows, steps, sampler, seed)


def draw_new(model, data, z, rows, steps=20, sampler="dpmpp", seed=0):
    """(images, rows, columns): images of z (n, D) by each network, then the real ones of rows (n,).

    Image k has the start noise of seed + k.
    """
    n = len(z)
    start = idiff.seeded_noise(range(seed, seed + n), data.image_shape, data.device)()
    pictures = render(model, z, start, steps, sampler, seed)
    pictures["real"] = data.images(rows)
    return torch.cat(list(pictures.values())), list(pictures), [""] * n


def classes(model, data, columns=10, **how):
    """(images, rows, columns): one row for each different u, with a real image and new ones.

    how: as in sample. Diffusion draws the new ones, or the decoder if there is no U-Net.
    """
    # the first row with each u, in the order of one-hot columns
    _, first = np.unique(data.u.cpu(), axis=0, return_index=True)
    rows = first[::-1].tolist()
    images = []
    for row in rows:
        made, networks, _ = sample(model, data, columns, like=row, **how)
        *_, new, real = made.unflatten(0, (len(networks), -1))
        images += [real[:1], new]
    titles = ["real", "new", *[""] * (columns - 1)]
    return torch.cat(images), [f"u of row {row}" for row in rows], titles


def true_factors(data, row, columns=10):
    """(images, rows, columns): the data's images that differ from a row's in a single factor."""
    # which factors of each image equal the row's
    everything = torch.arange(len(data), device=data.device)
    factors = data.factors(everything).cpu().numpy()
    same = factors == factors[row]
    varied = data.varied.tolist()

    # an image for each value of each factor; a row with fewer values ends in white
    grid = torch.ones(len(varied), columns, *data.image_shape)                 # white
    labels = []
    for k, images in zip(varied, grid):
        rows = np.flatnonzero(np.delete(same, k, axis=1).all(axis=1))          # all others equal
        _, first = np.unique(factors[rows, k], return_index=True)
        shown = np.unique(np.linspace(0, len(first) - 1, columns).round().astype(int))
        chosen = torch.tensor(rows[first[shown]], device=data.device)
        images[:len(shown)] = data.images(chosen)
        part = f"{len(shown)} of " if len(shown) < data.factor_sizes[k] else ""
        labels.append(f"{data.factor_names[k]}\n{part}{data.factor_sizes[k]} values")
    return grid.flatten(0, 1), labels, [""] * columns


# ---- Files ----

def write_gif(file, grids):
    """A looping GIF of what traverse returns, there and back: a row per network, a column per
    latent."""
    from PIL import Image
    _, labels, columns = grids["decoder"]
    titles = [label.split("\n")[0].replace(" · ", "\n") for label in labels]
    images = torch.cat([images for images, _, _ in grids.values()])            # (networks L n, ...)
    frames = images.unflatten(0, (-1, len(columns))).unbind(dim=1)
    pages = []
    for frame in frames + frames[-2:0:-1]:
        page = io.BytesIO()
        idiff.save_grid(page, frame, list(grids), titles)
        pages.append(Image.open(page).convert("RGB").quantize())
    pages[0].save(file, save_all=True, append_images=pages[1:], duration=120, loop=0)


def save_images(folder, grid, z, u):
    """Write what the last network of sample draws as PNGs into a folder; and all of these images,
    with z and, if there is one, u, into an .npz beside it."""
    from PIL import Image
    images, networks, _ = grid
    *_, new, _ = images.unflatten(0, (len(networks), -1))                      # the last are real
    pixels = idiff.to_pixels(new)
    told = {} if u is None else {"u": u.cpu()}
    np.savez(f"{folder}.npz", images=pixels, z=z.cpu(), **told)
    idiff.try_folder(folder)
    for k, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(folder / f"{k:05}.png")


def write_pictures(out, grids, films):
    """Write {name: grid} as PNGs and {file: what traverse returns} as GIFs; returns their paths."""
    # one by one: a picture that cannot be drawn costs no other
    paths = []
    for name, grid in grids.items():
        with drawing(out / f"{name}.png") as path:
            idiff.save_grid(path, *grid)
            paths.append(path)
    for file, traversals in films.items():
        with drawing(out / file) as path:
            write_gif(path, traversals)
            paths.append(path)
    if not paths:
        raise ValueError(f"no picture could be drawn in '{out}'.")
    return paths


def check_flags(args):
    """ValueError if a flag's number is too low, or a flag of new images comes without any."""
    for name, least in (("columns", 2), ("steps", 1), ("seed", 0), ("sample", 1), ("like", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    asked = [args.how, args.like, args.set if not args.image else None]
    if not args.sample and asked != [None] * 3:
        raise ValueError("--from, --like and --set belong to --sample N; --set also to --image.")


def start(args):
    """Draw what the flags name; returns the paths of the pictures."""
    check_flags(args)
    idiff.use_free_cores()
    device = idiff.pick_device(args.device)
    model, data = idiff.open_checkpoint(args.checkpoint, device, args.data)
    out = args.out or Path(args.checkpoint).parent
    idiff.try_folder(out)

    # what the latents are called
    rows, _, names = survey(model, data, args.seed)
    names = choose(args.latents, names)
    print(f"{', '.join(names.values())}; pictures go to {out}", flush=True)

    # given images keep their noise, and finding it takes more steps
    given = args.image or args.swap or args.between
    alone = not given and not args.sample
    how = {"steps": args.steps or (50 if given else 20), "sampler": args.sampler}
    seeded = {**how, "seed": args.seed}
    which = {**seeded, "latents": args.latents}
    values = dict(args.set or {})

    # new images
    grids = {}
    if args.sample:
        what = {"how": args.how,
                "like": args.like,
                "values": values}
        z, u, alike = draw_codes(model, data, args.sample, **what, seed=args.seed)
        grids["sample"] = draw_new(model, data, z, alike, **seeded)
        save_images(out / f"sample-{args.sample}", grids["sample"], z, u)
    elif not given and model.cfg.u == "own" and 1 < len(different(data.u)[0]) <= 20:
        grids["classes"] = classes(model, data, args.columns, **seeded)

    # edits of given images
    if args.image:
        grids["image"] = redraw(model, data, args.image, values=values, **seeded)
    if args.swap:
        grids["swap"] = swap(model, data, *args.swap, **which)
    if args.between:
        grids["between"] = between(model, data, *args.between, args.columns, **how)
    if alone and len(data.varied):
        grids["true_factors"] = true_factors(data, rows[0].item(), args.columns)

    # traversals: a grid per network, and a GIF
    traversals = {}
    kind = "image" if args.image else "traversal"
    if args.image or alone:
        traversals = traverse(model, data, args.image, columns=args.columns, **which)
    grids.update({f"{kind}_{network}": grid for network, grid in traversals.items()})

    return write_pictures(out, grids, {f"{kind}.gif": traversals} if traversals else {})


def main(argv=None):
    """Run the command line. Returns the paths of the pictures."""
    with idiff.script("interpolate.py", "--columns"):
        return start(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
