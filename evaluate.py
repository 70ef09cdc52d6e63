# SPDX-License-Identifier: MIT
"""How disentangled is a code? MIG (Eq. 1), MCC, DCI and modularity, with a report and pictures.

    python evaluate.py runs/NAME/ckpt.pt                 # a report; many: the paper's tables
    python evaluate.py runs/NAME/ckpt.pt --generate 200  # and how good generated images are

A path may also be a metrics.json, which is read as it is, or a codes.npz with codes (N, D),
factors (N, K) and maybe factor_names of somebody else's model. Metrics are functions of codes and
factors; what is undefined is NaN, with a warning. Sources: Chen 2018 (MIG), Hyvarinen 2016 (MCC),
Eastwood 2018 (DCI), Ridgeway 2018 (modularity).
"""
import argparse
import json
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from idiff import (DATA_SETS, Config, Encoder, fingerprint, in_one_line, load_checkpoint,
                   load_data, pick_device, script, seeded_noise, x0_from_eps)

N_SCORES = 10_000           # rows of the standard, of all metrics but DCI
N_DCI = 15_000              # two thirds of them train the trees

NAMES = {"mig": "discrete MIG",
         "mcc": "Spearman MCC",
         "disentanglement": "disentanglement",
         "modularity": "modularity",
         "completeness": "completeness",
         "informativeness": "informativeness"}
FOUR = ("mig", "mcc", "disentanglement", "modularity")         # the paper's, in its order
MODELS = {"vae": "VAE", "ivae": "iVAE", "idiff": "iVAE + DDPM", "codes": "codes"}
PAPER = {                                                      # Tables 2 and 3: mean ± std / max
    "VAE": "0.06 ± 0.04 / 0.14, 0.20 ± 0.13 / 0.49, 0.09 ± 0.09 / 0.26, 0.51 ± 0.25 / 0.87",
    "iVAE": "0.19 ± 0.07 / 0.34, 0.19 ± 0.09 / 0.39, 0.11 ± 0.10 / 0.30, 0.41 ± 0.12 / 0.63",
    "iVAE + DDPM": "0.16 ± 0.10 / 0.39, 0.23 ± 0.14 / 0.51, 0.13 ± 0.11 / 0.39, 0.45 ± 0.23 / 0.77",
    "all seeds": "0.26 ± 0.09 / 0.34, 0.11 ± 0.08 / 0.21, 0.13 ± 0.11 / 0.25, 0.35 ± 0.11 / 0.47",
    "best": "0.39, 0.21, 0.21, 0.39"}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="ckpt.pt, metrics.json or codes.npz")
    add("--out", type=Path, help="folder of the report, or of many paths' tables (default: theirs)")
    add("--n", type=int, default=N_DCI,
        help="images to encode; up to 15,000, DCI alone takes all (default: 15000)")
    add("--generate", type=int, default=0, metavar="N",
        help="images to generate and to judge (default: 0)")
    add("--n-bins", type=int, default=20,
        help="of latents, and of factors that are numbers (default: 20)")
    add("--no-dci", action="store_true", help="skip DCI, which takes most of the time")
    add("--seed", type=int, default=0, help="of rows, samples and trees (default: 0)")
    add("--data", help="name or path of the data (default: those the model was trained on)")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    return parser


# ---- What all scripts share ----

class Lines:
    """What tqdm writes, as plain lines for a file."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)


def progress(iterable, desc=None, **options):
    """tqdm's bar in a terminal; elsewhere a plain line every half minute."""
    if not sys.stderr.isatty():
        options.update(file=Lines(), mininterval=30, miniters=1, delay=30,
                       bar_format="{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}")
    return tqdm(iterable, desc, **options)


def try_folder(folder):
    """Make a folder; OSError if it, or a file in it, cannot be made."""
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def drawing(path):
    """Around the drawing of a picture: if it fails, a line says that path is missing, no more."""
    try:
        yield path
    except Exception as error:                   # many kinds, as of full disks
        path.unlink(missing_ok=True)             # a part of it, or an older one
        print(f"{path} is missing: {in_one_line(error)}", file=sys.stderr)


# ---- Metrics ----

def equal_bins(values, n_bins):
    """The bin of each value, of equal widths between their minimum and maximum."""
    # an outlier squeezes all others; the last bin is closed
    left_edges = np.linspace(values.min(), values.max(), n_bins, endpoint=False)
    return np.digitize(values, left_edges) - 1


def as_numbers(a, name):
    """An array or tensor as float64 (N, columns); ValueError unless it is one of finite numbers."""
    if torch.is_tensor(a):
        a = a.detach().cpu().double()
    a = np.asarray(a)
    if a.ndim != 2 or 0 in a.shape or len(a) < 2 or a.dtype.kind not in "buif":
        raise ValueError(f"{name} must be numbers, 2 rows or more; got {a.dtype} {a.shape}.")
    a = a.astype(float)
    if not (abs(a) < 1e150).all():               # lest squares overflow
        raise ValueError(f"{name} hold NaN, inf or numbers beyond 1e150.")
    return a


def as_arrays(codes, factors, n_bins=None):
    """codes as float64 (N, D), factors as int64 (N, K) re-indexed to 0, 1, ...; or ValueError.

    Given n_bins, a factor of more values than these, and than 256 or a quarter of the rows, is a
    number and not a class: its labels are equal bins, with a warning.
    """
    codes = as_numbers(codes, "codes")
    factors = as_numbers(factors, "factors")

    # a row of each for every image
    if len(codes) != len(factors):
        raise ValueError(f"{len(codes)} rows of codes, but {len(factors)} of factors.")

    # labels may be any numbers
    labels = np.zeros(factors.shape, np.int64)
    for j, column in enumerate(factors.T):
        values, labels[:, j] = np.unique(column, return_inverse=True)
        if n_bins and len(values) > max(n_bins, min(len(column) / 4, 256)):
            labels[:, j] = equal_bins(column, n_bins)
            warnings.warn(f"factor {j} is a number, not a class: put into {n_bins} equal bins, but "
                          "for MCC.")
    return codes, labels


def varying(factors):
    """Which factors take more than one value, (K,) bool; warns of each that does not."""
    varies = np.ptp(factors, axis=0) > 0
    for j in np.flatnonzero(~varies):
        warnings.warn(f"factor {j} is constant: left out of every mean.")
    return varies


def mean_of(values, metric, wanted="a varying factor"):
    """Mean of the values that are not NaN; NaN and a warning if there are none."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    if not len(values):
        warnings.warn(f"{metric} is undefined: it needs {wanted}.")
        return np.nan
    return float(values.mean())


def entropies(factors):
    """H of each column of whole numbers from 0 on, (K,), in nats."""
    from scipy.stats import entropy
    return np.array([entropy(np.bincount(column)) for column in factors.T])


def mutual_information(codes, factors, n_bins=20):
    """I(z_i; y_j) in nats, (D, K), each latent in equal bins between its minimum and maximum."""
    from sklearn.metrics import mutual_info_score
    codes, factors = as_arrays(codes, factors, n_bins)
    mi = []
    for z in codes.T:
        bins = equal_bins(z, n_bins)
        mi.append([mutual_info_score(bins, y) for y in factors.T])
    mi = np.array(mi)
    return mi * (mi > 1e-12)                     # rounding residue of a dead latent is no score


def known_share(codes, factors, n_bins=20):
    """I(z_i; y_j) / H(y_j), (D, K): the share of a factor that a latent knows; NaN of constants."""
    codes, factors = as_arrays(codes, factors, n_bins)
    h = np.where(varying(factors), entropies(factors), np.nan)
    return mutual_information(codes, factors, n_bins) / h


def mig_per_factor(codes, factors, n_bins=20):
    """(I_1 - I_2) / H of each factor's two best latents, (K,), Eq. 1; I_2 = 0 if there is one."""
    ranked = np.sort(known_share(codes, factors, n_bins), axis=0)
    if len(ranked) == 1:                         # no second latent
        return ranked[0]
    return ranked[-1] - ranked[-2]


def mig(codes, factors, n_bins=20):
    """Discrete mutual information gap, the mean of mig_per_factor, in [0, 1]."""
    return mean_of(mig_per_factor(codes, factors, n_bins), "MIG")


def correlation(codes, factors):
    """|Spearman's rho|, (D, K), with average ranks for ties; 0 with a constant column."""
    from scipy.stats import rankdata
    codes, factors = as_arrays(codes, factors)
    ranks = rankdata(np.hstack([codes, factors]), axis=0)
    with np.errstate(invalid="ignore"):          # a constant column: 0 / 0
        rho = np.corrcoef(ranks, rowvar=False)
    d = codes.shape[1]
    return abs(np.nan_to_num(rho[:d, d:]))


def match(corr):
    """Row and column indices of the one-to-one pairs with the largest sum of corr (D, K)."""
    from scipy.optimize import linear_sum_assignment
    return linear_sum_assignment(corr, maximize=True)


def mcc(codes, factors):
    """Spearman's mean correlation coefficient, in [0, 1]; low for a cyclic or unordered factor."""
    codes, factors = as_arrays(codes, factors)
    corr = correlation(codes, factors)[:, varying(factors)]
    if not corr.size:
        return mean_of([], "MCC")
    # factors without a latent count as 0; iVAE's code divides by min(D, K) and forgets them
    return float(corr[match(corr)].sum() / corr.shape[1])


def modularity_of_information(mi):
    """Modularity of a matrix (D, K) of mutual information. A latent that knows nothing scores 0."""
    n_factors = mi.shape[1]
    if n_factors < 2:
        return mean_of([], "modularity", "two varying factors")
    most = mi.max(axis=1)
    share = mi / most.clip(1e-12)[:, None]
    others = np.square(share).sum(axis=1) - 1
    scores = (most > 0) * (1 - others / (n_factors - 1))
    return float(scores.mean())


def modularity(codes, factors, n_bins=20):
    """How far each latent knows one factor only, in [0, 1]; dead ones 0, pure noise up to 0.7."""
    codes, factors = as_arrays(codes, factors, n_bins)
    mi = mutual_information(codes, factors, n_bins)
    return modularity_of_information(mi[:, varying(factors)])


def order_of_rows(importance, metric, wanted):
    """1 less the entropy of each row, by its length, weighed by the row's share of the whole."""
    from scipy import stats
    if importance.shape[1] < 2 or not importance.size:
        return mean_of([], metric, wanted)
    p = importance + 1e-11                       # as disentanglement_lib, for rows of zeros
    order = 1 - stats.entropy(p, base=p.shape[1], axis=1)
    weight = importance.sum(axis=1) / (importance.sum() or 1)
    return float(weight @ order)


def dci_of_importance(importance):
    """Disentanglement and completeness of an importance matrix (D, K), a dict; 0 for all zeros."""
    disentanglement = order_of_rows(importance, "disentanglement", "two varying factors")
    completeness = order_of_rows(importance.T, "completeness", "two latents")
    return {"disentanglement": disentanglement, "completeness": completeness}


def dci(codes, factors, seed=0, n_bins=20):
    """Disentanglement, completeness and informativeness (mean test accuracy), a dict.

    Boosted trees tell each varying factor from the codes: two thirds of the rows, drawn with seed,
    train them, the others test them.
    """
    from joblib import Parallel, delayed
    from sklearn.ensemble import GradientBoostingClassifier
    codes, factors = as_arrays(codes, factors, n_bins)
    order = np.random.default_rng(seed).permutation(len(codes))
    codes, factors = codes[order], factors[order]
    split = 2 * len(codes) // 3
    factors = factors[:, varying(factors[:split])]

    def fit(j):                                  # scikit-learn's defaults: 100 rounds, depth 3
        trees = GradientBoostingClassifier(random_state=seed)
        trees.fit(codes[:split], factors[:split, j])
        accuracy = trees.score(codes[split:], factors[split:, j])
        return trees.feature_importances_, accuracy

    # factors in parallel, those of many values first, for they take longest
    jobs = [delayed(fit)(j) for j in np.argsort(-factors.max(axis=0))]
    fits = Parallel(-1, return_as="generator", prefer="threads")(jobs)
    importance = np.zeros((codes.shape[1], len(jobs)))
    accuracies = np.zeros(len(jobs))
    for j, result in enumerate(progress(fits, "DCI", total=len(jobs))):
        importance[:, j], accuracies[j] = result

    scores = dci_of_importance(importance)       # in whatever order factors come
    scores["informativeness"] = mean_of(accuracies, "informativeness")
    return scores


# ---- Codes of a checkpoint or a file ----

def find_data(info, checkpoint):
    """Name or path of the data that a checkpoint's info tells of: where they were, or beside it."""
    # a run's folder may have moved, and the data with it
    name = str(info.get("data_arg", "unknown"))
    beside = str(Path(checkpoint).parent / Path(name).name)
    for place in (name, beside):
        if place in DATA_SETS or os.path.exists(place):
            return place
    raise FileNotFoundError(f"data of '{checkpoint}' not found: neither '{name}' nor '{beside}'. "
                            "Pass --data and their path.")


def warn_of_other_data(data, info, checkpoint):
    """A line to stderr if the data are not those that a checkpoint's info tells of."""
    if info.get("fingerprint", data.fingerprint) != data.fingerprint:
        print(f"warning: '{checkpoint}' was trained on {info['data']}, not on {data.name}.",
              file=sys.stderr)


@torch.no_grad()
def encode(model, data, rows, seed):
    """Means of q(z|x) and one sample of each, of the images in rows: (N, D) twice."""
    # so few at a time that memory does not grow with N
    parts = progress(rows.split(500), "encoding, 500 images each")
    means, logvars = zip(*(model.encode(data.images(part)) for part in parts))
    mean = torch.cat(means).cpu().double()       # some devices have no doubles
    std = (0.5 * torch.cat(logvars).cpu().double()).exp()
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean.numpy(), (mean + std * noise).numpy()


def of_checkpoint(path, args, load):
    """What a report is made of, a dict.

    Codes, samples and factors of random images; those of modulated draws, and u as their code; what
    the checkpoint says of itself.
    """
    device = pick_device(args.device)
    model = load_checkpoint(path, device)
    cfg = model.cfg
    data = load(args.data or find_data(model.info, path), device, progress, cfg.image_size,
                model.info.get("factor_sizes"))
    warn_of_other_data(data, model.info, path)
    if not data.factor_names or (args.generate and not len(data.varied)):
        raise ValueError(f"'{path}': MIG, MCC, DCI and modularity need factors, --generate those "
                         f"of 2 to 1,000 values, and {data.name} has none. Pass others by --data; "
                         "interpolate.py needs none.")

    # random images of the grid, then as many modulated draws; not by the data's own u, by which
    # all rows are drawn alike
    n = min(args.n, len(data))
    generator = torch.Generator(device).manual_seed(args.seed)
    rows = torch.randperm(len(data), generator=generator, device=device)[:n]
    drawn_by = cfg.u if len(data.varied) else "own"
    n_drawn = 0 if drawn_by == "own" else min(n, N_SCORES)
    drawn, u = data.draw(n_drawn, generator, drawn_by, cfg.u_scale)
    codes, samples = encode(model, data, torch.cat([rows, drawn]), args.seed)
    factors = data.factors(rows).cpu().numpy()
    factors_drawn = data.factors(drawn).cpu().numpy()

    # u as if it were a code: its centres, or else its scales, which come before
    draws = {}
    if n_drawn:
        u = u[:, -len(data.varied):].cpu().numpy()
        draws = {"encoder_on_draws": (codes[n:], factors_drawn), "u_on_draws": (u, factors_drawn)}

    kind = "means" if cfg.latent == "gaussian" else "modes"
    info = {"data": data.name, "fingerprint": data.fingerprint, "model": cfg.model,
            "codes": f"{kind} of q(z|x), averaged weights", "config": vars(cfg),
            "training": model.info}
    if args.generate:
        info["generation"] = generation(model, data, rows, codes[:n], args)
    return {"codes": codes[:n], "samples": samples[:n], "factors": factors,
            "names": data.factor_names, "info": info, "draws": draws, "drawn": factors_drawn}


def of_codes(path, args):
    """The same of a file with the arrays codes (N, D), factors (N, K) and maybe factor_names."""
    try:
        with np.load(path) as file:
            codes, factors = file["codes"], file["factors"]
            codes, _ = as_arrays(codes, factors)
            names = [f"factor {j}" for j in range(factors.shape[1])]
            names = np.array(file.get("factor_names", names), str).tolist()
        if not len(set(names)) == len(names) == factors.shape[1]:
            raise ValueError
    except Exception:                            # of zip, numpy, as_arrays: many
        raise ValueError(f"'{path}' needs the arrays codes and factors, (N, D) and (N, K) of "
                         "finite numbers, N at least 2, and if it has factor_names, K different "
                         "ones. Save it by np.savez.") from None
    if args.generate or args.data:
        raise ValueError(f"'{path}' holds codes: --generate and --data need a checkpoint.")

    rows = np.random.default_rng(args.seed).permutation(len(codes))[:args.n]
    info = {"data": f"factors of {path.name} {fingerprint(factors)[:8]}", "model": "codes",
            "codes": "as they are", "config": {}}
    return {"codes": codes[rows], "samples": codes[rows], "factors": factors[rows],
            "names": names, "info": info, "draws": {}, "drawn": factors[:0]}


# ---- Generated images ----

@lru_cache
def train_reader(data, seed, steps=600):
    """A function images -> values (B, K) of the factors that vary, and its test accuracy (K,).

    A classifier like Encoder, trained on images of data with faint noise and tested on others.
    """
    torch.manual_seed(seed)
    k = len(data.varied)
    v = data.sizes[data.varied].max().item()
    channels, side, _ = data.image_shape
    cfg = Config(image_channels=channels, image_size=side, latent_dim=(k * v + 1) // 2)
    net = Encoder(cfg).net.to(data.device)       # k v outputs, or one more
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)

    def logits(x):
        return net(x)[:, :k * v].view(-1, v, k)                # (B, V values, K)

    rows = torch.randperm(len(data)).to(data.device)
    n_test = min(len(data) // 10 + 1, 2000)
    for _ in progress(range(steps), "training a classifier"):
        batch = rows[torch.randint(n_test, len(data), (128,))]
        x = data.images(batch)
        y = data.factors(batch)[:, data.varied]
        loss = F.cross_entropy(logits(x + 0.1 * torch.randn_like(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)

    def read(x):
        return logits(x).argmax(dim=1)

    # on images that it was not trained on
    test = rows[:n_test]
    right = read(data.images(test)) == data.factors(test)[:, data.varied]
    return read, right.float().mean(0)


def laplacian(x):
    """Mean squared Laplacian of images, (B,): small where they are blurred, large where grainy."""
    kernel = x.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    channels = x.flatten(0, 1)[:, None]                        # (B C, 1, H, W)
    return squares(F.conv2d(channels, kernel[None, None]).view(len(x), -1))


def nearest_error(images, data, rows):
    """Least squared error (B,) to any image of the data near the rows (B,) that images are to show.

    Near are 480 rows, in 3D Shapes those of all geometries in the same hues: an image of another
    geometry than asked for is not punished, a blurred or a grainy one is.
    """
    errors = []
    for image, row in zip(images, rows.tolist()):
        first = row - row % 480
        block = torch.arange(first, min(first + 480, len(data)), device=rows.device)
        errors.append(squares(data.images(block) - image).min())
    return torch.stack(errors)


def squares(x):
    """Mean square of each image, (B,)."""
    return x.square().flatten(1).mean(dim=1)


def draw_images(model, z, x, noise):
    """Images of z (1 + K, B, D) by network; diffusion's errors (B,), z[0] being the code of x."""
    # all codes by the decoder, then by diffusion, the edits of an image from its own noise
    every = z.flatten(0, 1)
    images = {"decoder": model.decode(every).clamp(-1, 1)}
    if model.unet is None:
        return images, {}
    images["diffusion"] = model.sample(every, noise().repeat(len(z), 1, 1, 1))

    # half the squared difference of two samples is their variance
    again = model.sample(z[0], noise())
    errors = {"variance given z": squares(images["diffusion"][:len(x)] - again) / 2}

    # the clean image as the U-Net believes in it, at some ratios of noise to image
    eps_fn = model.eps_fn(z[0])
    for ratio in (0.02, 0.05, 0.1, 0.2, 0.4):
        t = model.sde.t_of_lam(-torch.tensor(ratio).log()).to(x).expand(len(x))
        x_t = model.sde.add_noise(x, noise(), t)
        x_0 = x0_from_eps(x_t, eps_fn(x_t, t), t[0], model.sde)
        errors[f"denoised at {ratio}"] = squares(x_0 - x)
    return images, errors


def generation(model, data, rows, codes, args):
    """How well images made of codes (N, D) of rows (N,) show their factors, a dict.

    Shares (K,) of factors that a classifier reads right, and errors of pixels. Edited: of factor k
    the latent that matches it is the next image's, the noise stays.
    """
    read, limit = train_reader(data, args.seed)
    y = data.factors(rows)[:, data.varied]                     # (N, K)
    pairs = zip(*match(mutual_information(codes, y)))
    y = y[:args.generate]
    y_next = y.roll(-1, 0)

    # codes as they are, then those with one factor's latent of the next image
    z = torch.from_numpy(codes[:len(y)]).float().to(y.device)
    z = z.repeat(1 + y.shape[1], 1, 1)                         # (1 + K, N, D)
    for i, k in pairs:
        z[1 + k, :, i] = z[0, :, i].roll(-1)

    found = defaultdict(list, classifier=[limit[None]])
    batches = torch.arange(len(y)).split(10)
    for ids in progress(batches, "generating, 10 images each"):
        x = data.images(rows[ids])
        noise = seeded_noise([args.seed + i for i in ids.tolist()], x.shape[1:], x.device)
        images, errors = draw_images(model, z[:, ids], x, noise)
        for name, error in errors.items():
            found[name].append(error)

        found["image laplacian"].append(laplacian(x))

        # how sharp images of the codes as they are look, and what all of them show
        for network, image in images.items():
            plain = image[:len(x)]
            found[f"{network} error"].append(squares(plain - x))
            found[f"{network} laplacian"].append(laplacian(plain))
            found[f"{network} nearest"].append(nearest_error(plain, data, rows[ids]))

            seen = read(image).view(len(z), len(x), -1)        # (1 + K, B, K)
            edited = (seen == y_next[ids])[1:]
            found[network].append((seen[0] == y[ids]).float())
            found[f"{network}, edited"].append(edited.diagonal(dim1=0, dim2=2).float())

    # means over images: of factors a row each, of pixels one number
    names = [*(data.factor_names[k] for k in data.varied), "mean"]
    shares, pixels = {}, {}
    for name, parts in found.items():
        mean = torch.cat(parts).mean(dim=0)
        if mean.dim():
            shares[name] = dict(zip(names, [*mean, mean.mean()]))
        else:
            pixels[name] = mean
    return {"n": len(y), "accuracy": shares, "pixels": pixels}


# ---- The report ----

# It is a dict: "metrics" and, for comparison, "noise_floor" and "..._on_draws", each with
# the names of NAMES as keys; "per_factor"; what a checkpoint says of itself; "generation".

def without_trees(codes, factors, n_bins):
    """The paper's metrics but DCI's, a dict."""
    return {"mig": mig(codes, factors, n_bins),
            "mcc": mcc(codes, factors),
            "modularity": modularity(codes, factors, n_bins)}


def measure(s, args):
    """The numbers of the report, a dict, of what of_checkpoint or of_codes gives."""
    codes, factors = s["codes"], s["factors"]
    n_bins = args.n_bins
    std = codes.std(axis=0)

    # DCI takes up to 15,000 rows
    scores = dict.fromkeys(NAMES, np.nan)
    if not args.no_dci:
        scores.update(dci(codes[:N_DCI], factors[:N_DCI], args.seed, n_bins))

    # the others take 10,000, also with codes shuffled among images: the floor of noise
    noise = np.random.default_rng(args.seed).permutation(codes)
    if len(codes) <= N_DCI:
        codes, noise, factors = codes[:N_SCORES], noise[:N_SCORES], factors[:N_SCORES]
    scores.update(without_trees(codes, factors, n_bins))

    # which latent knows which factor
    share = known_share(codes, factors, n_bins)
    gap = mig_per_factor(codes, factors, n_bins)
    corr = correlation(codes, factors)
    matched = {j: i for i, j in zip(*match(corr))}
    per_factor = {}
    for j, name in enumerate(s["names"]):
        best = share[:, j].argmax()
        per_factor[name] = {"latent": best, "mi_over_h": share[best, j], "gap": gap[j],
                            "rho": corr[best, j], "mcc_latent": matched.get(j)}

    return {**s["info"], "metrics": scores,
            "noise_floor": without_trees(noise, factors, n_bins),
            **{name: without_trees(*pair, n_bins) for name, pair in s["draws"].items()},
            "per_factor": per_factor, "n": len(codes),
            "n_active": (std >= 0.05 * std.max()).sum(), "latent_std": std, "mi_over_h": share}


def holds(path):
    """Whether a path is a "report", "codes" or a "checkpoint", by its content, whole or damaged."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(99)                # an archive begins with its first file's name
    if start.startswith(b"{"):
        return "report"
    return "codes" if b".npy" in start else "checkpoint"


def read_report(path, args):
    """A metrics.json as it is; ValueError if it is damaged or a flag asks for more."""
    plain = build_parser().parse_args(["-"])
    plain.paths, plain.out = args.paths, args.out
    if args != plain:
        raise ValueError(f"'{path}' is a report already: --n, --generate, --n-bins, --no-dci, "
                         "--seed, --data and --device need the checkpoint.")
    try:
        result = json.loads(path.read_text("utf-8"))
        format_report(result)
    except Exception as error:                   # of json, or of whatever is missing: many
        reason = f"{type(error).__name__}, {in_one_line(error)}"
        raise ValueError(f"'{path}' is no report of evaluate.py, or is damaged: {reason}. Make it "
                         "again of the checkpoint.") from None
    return result


def report(path, args, load=load_data):
    """The report of one file, a dict, and what it was made of: None if it was read as it is."""
    if args.n < 3 or args.generate < 0 or not 2 <= args.n_bins <= 1000:
        raise ValueError("--n must be at least 3, --generate 0, --n-bins 2 to 1,000: got "
                         f"{args.n}, {args.generate} and {args.n_bins}.")
    kind = holds(path)
    if kind == "report":
        return read_report(path, args), None

    s = of_codes(path, args) if kind == "codes" else of_checkpoint(path, args, load)
    result = measure(s, args)

    # pictures show classes, in modulated draws the same ones
    n = len(s["factors"])
    every = np.vstack([s["factors"], s["drawn"]])
    _, every = as_arrays(every, every, args.n_bins)
    s["factors"] = every[:n]
    s["drawn"] = every[n:]
    result["file"] = str(path)
    result["seed"] = args.seed
    result["n_bins"] = args.n_bins
    result["scikit-learn"] = version("scikit-learn")       # whose trees are DCI's

    # plain numbers; NaN is no JSON
    text = json.dumps(result, default=lambda a: a.tolist())
    return json.loads(text, parse_constant=lambda nan: None), s


def write_report(result, s, folder):
    """metrics.json and pictures, in a folder."""
    (folder / "metrics.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    pictures = {"latents": draw_latents, "factors": draw_factors, "information": draw_information}
    for name, draw in pictures.items():
        with drawing(folder / f"{name}.png") as picture:
            draw(result, s).savefig(picture, dpi=150)


def table(columns):
    """A Markdown table, padded to be read as it is; floats with three digits, - for None."""
    def text(value):
        if isinstance(value, float):
            return f"{value:.3f}"
        return "-" if value is None else str(value)

    padded = []
    for column in columns:
        texts = list(map(text, column))
        width = max(map(len, texts))
        texts.insert(1, "-" * width)             # below the title
        padded.append([text.ljust(width) for text in texts])
    rows = [f"| {' | '.join(row)} |\n" for row in zip(*padded)]
    return "".join(rows)


def format_report(r):
    """A report for people."""
    model = MODELS[r["model"]]
    text = (f"{r['file']}: {model}, {len(r['latent_std'])} latents; {r['data']}\n"
            f"{r['codes']}, n = {r['n']:,}, seed {r['seed']}\n\n")

    # the metrics, and what to compare them with
    titles = {"metrics": "codes", "noise_floor": "noise",
              "encoder_on_draws": "codes, on draws", "u_on_draws": "u alone, on draws"}
    columns = [["metric", *NAMES.values()]]
    for key, title in titles.items():
        if key in r:
            columns.append([title, *(r[key].get(name) for name in NAMES)])
    text += table(columns) + "\n"

    # which latent found which factor
    rows = [["factor", "latent", "MI/H", "gap", "|rho|", "MCC's latent"]]
    for name, row in r["per_factor"].items():
        rows.append([name, *row.values()])
    text += table(zip(*rows)) + "\n"

    # images made of codes, as a classifier reads them
    if "generation" in r:
        made = r["generation"]
        rows = [[f"read right, n = {made['n']}", *made["accuracy"]["classifier"]]]
        for name, row in made["accuracy"].items():
            rows.append([name, *row.values()])
        pixels = [f"{name} {value:.2g}" for name, value in made["pixels"].items()]
        text += f"{table(zip(*rows))}\n{', '.join(pixels)}\n\n"
    widths = " ".join(f"{std:.3f}" for std in r["latent_std"])
    return text + f"{r['n_active']} active latents, std: {widths}"


# ---- The paper's tables ----

def summary(group):
    """A cell for each of the four metrics: mean ± std / max over a group of reports."""
    cells = []
    for name in FOUR:
        values = np.array([r["metrics"][name] for r in group], float)
        if np.isnan(values).any():
            cells.append("-")
        elif len(group) == 1:
            cells.append(f"{values[0]:.2f}")
        else:
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1):.2f} / {values.max():.2f}")
    return cells


def format_table(title, columns):
    """A table of {name: group of reports}, each beside the paper's own figures, if it has any."""
    rows = [["metric", *(NAMES[name] for name in FOUR)]]
    for name, group in columns.items():
        rows.append([f"{name}, n = {len(group)}", *summary(group)])
        if name in PAPER:
            rows.append(["paper", *PAPER[name].split(", ")])
    return f"{title}\n\n{table(rows)}\n"


def format_tables(results):
    """Table 2 (by model) and Table 3 (by configuration, over its seeds), of each data set."""
    by_data, by_config = {}, {}
    for r in results:
        models = by_data.setdefault(r["data"], {})
        models.setdefault(MODELS[r["model"]], []).append(r)
        key = str([r["data"], {**r["config"], "seed": None}])
        by_config.setdefault(key, []).append(r)

    text = ""
    for data, models in by_data.items():
        text += format_table(f"Table 2, mean ± std / max by model; {data}", models)
    for group in by_config.values():
        if len(group) > 1 and group[0]["config"]:
            best = max(group, key=lambda r: r["metrics"]["mig"] or 0)
            title = f"Table 3, mean ± std / max over seeds of {group[0]['file']}"
            text += format_table(title, {"best": [best], "all seeds": group})
    return text


# ---- Pictures ----

def panels(n, size=(6, 1.6)):
    """A figure and its n axes, one above the other, of a size in inches."""
    from matplotlib.figure import Figure
    width, height = size
    figure = Figure((width, n * height), layout="constrained")
    return figure, figure.subplots(n, squeeze=False)[:, 0]


def draw_latents(r, s):
    """Histograms of samples of each latent, coloured by the factor it knows most of."""
    from matplotlib import colormaps
    share = np.nan_to_num(np.array(r["mi_over_h"], float))     # None is NaN
    figure, axes = panels(len(share))
    for i, ax in enumerate(axes):
        j = share[i].argmax()
        name = s["names"][j]
        z = s["samples"][:, i]
        y = s["factors"][:, j]
        n_values = y.max() + 1

        # stacked by value: a latent that found the factor shows a mode a colour
        by_value = [z[y == value] for value in range(n_values)]
        scheme = "hsv" if "hue" in name else "viridis"
        colours = colormaps[scheme](np.arange(n_values) / n_values)
        bins = np.linspace(z.min(), z.max() + 1e-6, 61)
        ax.hist(by_value, bins, stacked=True, histtype="stepfilled", color=colours)
        ax.set(yticks=[], xlabel=f"z{i}; {name}: MI/H {share[i, j]:.2f}")
    return figure


def draw_factors(r, s):
    """Share of each value of each factor, among the rows and in modulated draws."""
    figure, axes = panels(len(s["names"]))
    for j, ax in enumerate(axes):
        shown = {"rows as they are": s["factors"][:, j]}
        if len(s["drawn"]):
            shown["modulated draws"] = s["drawn"][:, j]
        last = max(column.max() for column in shown.values())
        edges = np.arange(last + 2) - 0.5
        ax.hist(list(shown.values()), edges, density=True, label=list(shown))
        ax.set(xlabel=f"share of each {s['names'][j]}, by index", xticks=edges[1::2] - 0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center")
    return figure


def draw_information(r, s):
    """The matrix MI/H."""
    share = np.array(r["mi_over_h"], float)
    names = s["names"]
    figure, [ax] = panels(1, (1.6 + 0.9 * len(names), 4.5))
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")   # pale, for black digits
    for (i, j), value in np.ndenumerate(share):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set(yticks=range(len(share)), ylabel="latent", title="mutual information / entropy")
    return figure


def run(args):
    """Report on one path, or tables over many."""
    load = lru_cache(maxsize=1)(load_data)       # one load for many checkpoints
    many = len(args.paths) > 1
    measured = [path for path in args.paths if path.exists() and holds(path) != "report"]
    if len({path.resolve().parent for path in measured}) < len(measured):
        raise ValueError("two of the paths lie in one folder, which holds one report. Pass them "
                         "one by one, each with --out, then their metrics.json.")
    results = []
    for path in args.paths:
        folder = path.parent if many else args.out or path.parent
        if path in measured:
            try_folder(folder)
        result, s = report(path, args, load)
        results.append(result)
        if not many:
            print(format_report(result), flush=True)
        if s:                                    # pictures last: the numbers are out
            write_report(result, s, folder)
            print(f"metrics.json and pictures are in {folder}")

    if many:
        text = format_tables(results)
        print(text)
        parents = [path.resolve().parent for path in args.paths]
        folder = args.out or Path(os.path.commonpath(parents))
        try_folder(folder)
        (folder / "tables.md").write_text(text, "utf-8", "replace")


def main(argv=None):
    with script("evaluate.py", "--n"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        run(build_parser().parse_args(argv))
    for text in sorted({str(warning.message) for warning in caught}):
        print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
