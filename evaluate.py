# SPDX-License-Identifier: MIT
"""How disentangled is a code? MIG (Eq. 1), MCC, DCI and modularity, with a report and pictures.

    python evaluate.py runs/NAME/ckpt.pt                 # a report; many: the paper's tables
    python evaluate.py runs/NAME/ckpt.pt --generate 200  # and how good generated images are

A path may also be a metrics.json, which is read as it is, or a codes.npz with codes (N, D),
factors (N, K) and maybe factor_names of somebody else's model. Metrics are functions of codes and
factors; what is undefined is NaN, with a warning. In Python: report(model, data). Sources: Chen
2018 (MIG), Hyvarinen 2016 (MCC), Eastwood 2018 (DCI), Ridgeway 2018 (modularity).
"""
import argparse
import json
import os
import warnings
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

import idiff
from idiff import drawing, in_one_line, progress

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
    add("paths", nargs="+", type=idiff.user_path, help="ckpt.pt, metrics.json or codes.npz")
    add("--out", type=idiff.user_path,
        help="folder of the report, or of many paths' tables (default: theirs)")
    add("--n", type=int, default=N_DCI,
        help="images to encode; up to 15,000, DCI alone takes all (default: 15000)")
    add("--generate", type=int, default=0, metavar="N",
        help="images to generate and to judge (default: 0)")
    add("--n-bins", type=int, default=20,
        help="of latents, and of factors that are numbers (default: 20)")
    add("--no-dci", action="store_true", help="skip DCI, which takes most of the time")
    add("--seed", type=int, default=0, help="of rows, samples and trees (default: 0)")
    add("--data", type=os.path.expanduser,
        help="name or path of the data (default: those the model was trained on)")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    return parser


# ---- Metrics ----

def equal_bins(values, n_bins):
    """The bin of each value, of equal widths between their minimum and maximum."""
    # an outlier squeezes all others; the last bin is closed
    left_edges = np.linspace(values.min(), values.max(), n_bins, endpoint=False)
    return np.digitize(values, left_edges) - 1


def as_numbers(a, name):
    """An array or tensor as float64 (N, columns); ValueError unless its numbers are finite."""
    if torch.is_tensor(a):
        a = a.detach().cpu().double()
    a = np.asarray(a)
    if a.ndim != 2 or 0 in a.shape or len(a) < 2 or a.dtype.kind not in "buif":
        raise ValueError(f"{name} must be numbers, 2 rows or more; got {a.dtype} {a.shape}.")
    a = a.astype(float)
    if not (abs(a) < 1e150).all():               # or squares could overflow
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


# ---- Codes of a model or a file ----

@torch.no_grad()
def encode(model, data, rows, seed):
    """Means of q(z|x) and one sample of each, for the images in rows: (N, D) twice."""
    # so few at a time that memory does not grow with N
    parts = progress(rows.split(500), "encoding, 500 images each")
    means, logvars = zip(*(model.encode(data.images(part)) for part in parts))
    mean = torch.cat(means).cpu().double()       # some devices have no doubles
    std = (0.5 * torch.cat(logvars).cpu().double()).exp()
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean.numpy(), (mean + std * noise).numpy()


def read_codes(path):
    """(codes, factors, names) of a file with the arrays codes, factors and maybe factor_names."""
    try:
        with np.load(path) as file:
            codes, factors = file["codes"], file["factors"]
            codes, _ = as_arrays(codes, factors)
            names = [f"factor {j}" for j in range(factors.shape[1])]
            names = np.array(file.get("factor_names", names), str).tolist()
        if not len(set(names)) == len(names) == factors.shape[1]:
            raise ValueError
    except Exception:                            # zip, numpy and as_arrays raise many kinds
        raise ValueError(f"'{path}' needs the arrays codes and factors, (N, D) and (N, K) of "
                         "finite numbers, N at least 2, and if it has factor_names, K different "
                         "ones. Save it by np.savez.") from None
    return codes, factors, names


# ---- Generated images ----

@lru_cache
def train_reader(data, seed, steps=600):
    """A classifier: its network, a function images -> values (B, K) of the factors that vary, and
    whether it is right on images that it was not trained on, (B, K) bool.

    It is like Encoder, and trained on images of data with faint noise.
    """
    torch.manual_seed(seed)
    k = len(data.varied)
    v = data.sizes[data.varied].max().item()
    channels, side, _ = data.image_shape
    cfg = idiff.Config(image_channels=channels, image_size=side, latent_dim=(k * v + 1) // 2)
    net = idiff.Encoder(cfg).net.to(data.device)       # k v outputs, or one more
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
    return net, read, right


def laplacian(x):
    """Mean squared Laplacian of images, (B,): small where they are blurred, large where grainy."""
    kernel = x.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    channels = x.flatten(0, 1)[:, None]                        # (B C, 1, H, W)
    return squares(F.conv2d(channels, kernel[None, None]).view(len(x), -1))


def nearest_error(images, data, y):
    """Least squared error (B,) to any image of the data near those with the values y (B, K).

    Near are 480 rows, in 3D Shapes those of all geometries in the same hues: an image of another
    geometry than asked for is not punished, a blurred or a grainy one is.
    """
    errors = []
    for image, place in zip(images, (y * data.strides[data.varied]).sum(dim=1)):
        # on a grid with gaps, the place among the combinations that exist
        if data.table is not None:
            place = torch.searchsorted(data.numbers, place)
        first = min(place.item(), len(data) - 1) // 480 * 480
        block = torch.arange(first, min(first + 480, len(data)), device=data.device)
        if data.table is not None:
            block = data.order[block]
        errors.append(squares(data.images(block) - image).min())
    return torch.stack(errors)


def squares(x):
    """Mean square of each image, (B,)."""
    return x.square().flatten(1).mean(dim=1)


def looks(x, y, data):
    """How images x (B, C, H, W) look that show the values y (B, K), {name: number}.

    Values, pairs: the shares of all values, and of all pairs of values of two factors, that occur.
    """
    sizes = data.sizes[data.varied]
    value = torch.cat([F.one_hot(*each) for each in zip(y.T, sizes)], dim=1)   # (B, sum of V)
    met = (value.T.float() @ value.float() > 0).sum()
    n_values = value.any(dim=0).sum()
    n_pairs = sizes.sum()**2 - sizes.square().sum()
    nearest = nearest_error(x, data, y)
    return {"nearest, median": nearest.median(), "nearest, 90 %": nearest.quantile(0.9),
            "Laplacian": laplacian(x).mean(), "values": n_values / sizes.sum(),
            "pairs": (met - n_values) / n_pairs.clamp(min=1)}


def features(net, x):
    """What the last linear layer of a network sees of images x (B, C, H, W), (B, F)."""
    *_, last = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    seen = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in x.split(500):
        net(part)
    hook.remove()
    return torch.cat(seen).double()


def frechet(a, b):
    """Frechet distance of Gaussians of features (N, F) and (M, F), as a share of b's variance.

    It is FID's formula, but not FID, whose features are another network's. Source: Heusel et al.
    2017.
    """
    gap = a.mean(dim=0) - b.mean(dim=0)
    a, b = ((each - each.mean(dim=0)) / (len(each) - 1)**0.5 for each in (a, b))
    # the trace of the root of the product of the covariances a'a and b'b; R of QR has them, too
    r_a, r_b = (torch.linalg.qr(each, mode="r").R for each in (a, b))
    shared = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = gap.square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    return distance / b.square().sum()


def chances_given_u(data, log_scale, centre):
    """How likely each value is in a modulated draw from a full grid, a Categorical over (B, K, V).

    log_scale, centre: (B, K), of the factors that vary.
    """
    distance = (data.grid[data.varied] - centre[:, :, None]) / log_scale.exp()[:, :, None]
    return Categorical(logits=-0.5 * distance.square(), validate_args=False)


def codes_of_values(wanted, codes, values):
    """The median code (n,) of rows with the values wanted; between two values, between their codes.

    codes, values: (N,), a latent and a factor of the same rows.
    """
    found = np.unique(values)
    medians = [np.median(codes[values == value]) for value in found]
    return np.interp(wanted, found, medians)


def recombined(codes, y, n, seed):
    """Codes of new combinations, {kind: (n, D)}, and the values (n, K) that they are to show.

    codes: (N, D); y: (N, K), their factors. Shuffled: each latent is that of another row. Set: each
    that matches a factor is at the median code of the rows with that row's value. A factor that no
    latent matches has -1.
    """
    index = np.random.default_rng(seed).integers(len(codes), size=(n, codes.shape[1]))
    kinds = {"shuffled": np.take_along_axis(codes, index, axis=0)}
    wanted = np.full((n, y.shape[1]), -1)
    if y.size:
        kinds["set"] = kinds["shuffled"].copy()
        for i, k in zip(*match(mutual_information(codes, y))):
            wanted[:, k] = y[index[:, i], k]
            kinds["set"][:, i] = codes_of_values(wanted[:, k], codes[:, i], y[:, k])
    return kinds, wanted


@torch.no_grad()
def render(model, z, start, steps=20, sampler="dpmpp", seed=0, keeps_noise=False):
    """{"decoder": images, "diffusion": images}, (B, C, H, W) each, of z (B, D) and start noise.

    start: one noise for all, or one each; seed: of the noise that a stochastic sampler draws;
    keeps_noise: diffusion ends where invert began, without the last step of model.sample.
    """
    pictures = {"decoder": model.decode(z)}
    if model.unet is None:
        return pictures
    if keeps_noise and sampler in ("em", "pc"):
        raise ValueError(f"--sampler {sampler} adds noise and so cannot keep an image's own.")

    # ten at a time
    ts = idiff.time_grid(steps, model.sde).to(z)
    start = start.expand(len(z), *start.shape[1:])
    batches = list(zip(z.split(10), start.split(10)))
    parts = []
    for part, begin in progress(batches, "diffusion, 10 images each"):
        if keeps_noise:
            solve = idiff.SAMPLERS[sampler]
            x = solve(model.eps_fn(part), begin, ts, model.sde).clamp(-1, 1)
        else:
            seeds = [seed + 1] * len(part)                     # the same for every image
            noise = idiff.seeded_noise(seeds, begin.shape[1:], begin.device)
            x = model.sample(part, begin, steps, sampler, noise)
        parts.append(x)
    pictures["diffusion"] = torch.cat(parts)
    return pictures


def shares(hits, names):
    """{name: share of hits}, of each factor and of all at once; hits: (B, K) bool."""
    hits = hits.double()
    return dict(zip(names, [*hits.mean(dim=0), hits.amin(dim=1).mean()]))


def generation(model, data, rows, codes, n, seed):
    """How good new images are: {table's title, with n: {row's name: {column's name: number}}}.

    codes: (N, D), those of rows (N,). n images each are drawn of codes as they are (redrawn),
    recombined (shuffled, set) and of p(z|u); beside them stand real ones that are drawn alike.
    Frechet is the distance from other real ones. Without factors no values can be read.
    """
    cfg = model.cfg
    n = min(n, len(rows))
    y = data.factors(rows)[:, data.varied].cpu()               # (N, K)
    recombinations, wanted = recombined(codes, y.numpy(), n, seed)
    wanted = {"redrawn": y[:n], **dict.fromkeys(recombinations, torch.from_numpy(wanted))}
    kinds = {"redrawn": codes[:n], **recombinations}
    kinds = {kind: torch.from_numpy(z).float().to(data.device) for kind, z in kinds.items()}

    # z of p(z|u), unless the data are not the model's
    generator = torch.Generator(data.device).manual_seed(seed)
    torch.manual_seed(seed)
    start = idiff.seeded_noise(range(seed, seed + n), data.image_shape, data.device)()
    others = torch.randint(len(data), (n,), generator=generator, device=data.device)
    drawn, u = data.draw(2 * n, generator, cfg.u, cfg.u_scale)
    if u.shape[1] == cfg.u_dim:
        kinds["p(z|u)"] = model.sample_prior(u[:n])

    # a classifier reads values; a u that training makes tells how likely each is
    names = [*(data.factor_names[k] for k in data.varied), "all at once"]
    net = model.encoder
    right, log_p, quality = {}, {}, {}
    if y.numel():
        net, read, hits = train_reader(data, seed)
        right["classifier"] = shares(hits, names)
        if "p(z|u)" in kinds and cfg.u != "own":
            chances = chances_given_u(data, **cfg.kind_of_u.unpack(u[:n]))
            log_p["expectation"] = dict(zip(names, -chances.entropy().mean(dim=0)))

    for kind, z in kinds.items():
        of_u = kind == "p(z|u)"
        alike, reference = drawn.split(n) if of_u else (rows[:n], others)
        x = data.images(alike)
        reference = features(net, data.images(reference))
        made = render(model, z, start, seed=seed)
        images = {f"{network}, {kind}": image.clamp(-1, 1) for network, image in made.items()}
        images["real, of u" if of_u else "real"] = x
        for name, image in images.items():
            if name in quality:                                # the same real ones
                continue
            error = squares(image - x).mean() if kind == "redrawn" else None
            quality[name] = {"Frechet": frechet(features(net, image), reference), "error": error}
            if not y.numel():
                continue
            seen = read(image)                                 # (n, K)
            quality[name].update(looks(image, seen, data))
            if not of_u:
                right[name] = shares(seen.cpu() == wanted[kind], names)
            elif log_p:
                log_p[name] = dict(zip(names, chances.log_prob(seen).mean(dim=0)))
    found = {"read as asked": right, "log P(value|u), nats": log_p, "images": quality}
    return {f"{title}, n = {n}": rows for title, rows in found.items() if rows}


def format_generation(tables):
    """The tables of generation, for people."""
    text = ""
    for title, rows in tables.items():
        lines = [[title, *[*rows.values()][-1]]]
        for name, row in rows.items():
            texts = ["-" if value is None else f"{value:#.3g}" for value in row.values()]
            lines.append([name, *texts])
        text += idiff.table(zip(*lines)) + "\n"
    return text


# ---- The report ----

# It is a dict: "metrics" and, for comparison, "noise_floor" and "..._on_draws", each with
# the names of NAMES as keys; "per_factor"; what a checkpoint says of itself; "generation". Its
# "arrays" are what pictures show; they stay out of metrics.json.

def report(model, data, n=N_DCI, seed=0, n_bins=20, trees=True, generate=0, name="model"):
    """The report of a model on its data, a dict, see above. ValueError for data without factors.

    n: how many random images to encode; n_bins: of latents, and of factors that are numbers; trees:
    whether to fit DCI's, which takes most of the time; generate: how many images to generate and
    judge; name: what the report calls the model.
    """
    check_counts(n, generate, n_bins)
    cfg = model.cfg
    if not data.factor_names or (generate and not len(data.varied)):
        raise ValueError(f"'{name}': MIG, MCC, DCI and modularity need factors, --generate those "
                         f"of 2 to 1,000 values, and {data.name} has none. Pass others by --data; "
                         "interpolate.py needs none.")

    # random images of the grid, then as many modulated draws; the data's own u draws all rows
    # alike, which needs no second look
    n = min(n, len(data))
    generator = torch.Generator(data.device).manual_seed(seed)
    rows = torch.randperm(len(data), generator=generator, device=data.device)[:n]
    drawn_by = cfg.u if len(data.varied) else "own"
    n_drawn = 0 if drawn_by == "own" else min(n, N_SCORES)
    drawn, u = data.draw(n_drawn, generator, drawn_by, cfg.u_scale)
    codes, samples = encode(model, data, torch.cat([rows, drawn]), seed)
    factors = data.factors(rows).cpu().numpy()
    factors_drawn = data.factors(drawn).cpu().numpy()

    # u as if it were a code: its centres, or else its scales, which come before
    draws = {}
    if n_drawn:
        u = u[:, -len(data.varied):].cpu().numpy()
        draws = {"encoder_on_draws": (codes[n:], factors_drawn), "u_on_draws": (u, factors_drawn)}

    kind = "means" if cfg.latent == "gaussian" else "modes"
    result = {"file": name, "data": data.name, "fingerprint": data.fingerprint, "model": cfg.model,
              "codes": f"{kind} of q(z|x), averaged weights", "config": vars(cfg),
              "training": model.info}
    if generate:
        result["generation"] = generation(model, data, rows, codes[:n], generate, seed)
    result.update(measure(codes[:n], factors, data.factor_names, draws, seed, n_bins, trees))
    return finished(result, codes[:n], samples[:n], factors, factors_drawn, n_bins)


def report_of_codes(codes, factors, names, n=N_DCI, seed=0, n_bins=20, trees=True, name="codes"):
    """The same for codes (N, D) and factors (N, K) of somebody else's model."""
    check_counts(n, 0, n_bins)
    data = f"factors of {Path(name).name} {idiff.fingerprint(factors)[:8]}"
    result = {"file": name, "data": data, "model": "codes", "codes": "as they are", "config": {}}
    rows = np.random.default_rng(seed).permutation(len(codes))[:n]
    codes, factors = codes[rows], factors[rows]
    result.update(measure(codes, factors, names, {}, seed, n_bins, trees))
    return finished(result, codes, codes, factors, factors[:0], n_bins)


def check_counts(n, generate, n_bins):
    """ValueError unless these can be."""
    if n < 3 or generate < 0 or not 2 <= n_bins <= 1000:
        raise ValueError("--n must be at least 3, --generate 0, --n-bins 2 to 1,000: got "
                         f"{n}, {generate} and {n_bins}.")


def fast_metrics(codes, factors, n_bins):
    """The paper's metrics but DCI's, which needs trees, a dict."""
    return {"mig": mig(codes, factors, n_bins),
            "mcc": mcc(codes, factors),
            "modularity": modularity(codes, factors, n_bins)}


def measure(codes, factors, names, draws, seed, n_bins, trees):
    """The numbers of a report, a dict. draws: {name: (codes, factors)} to compare with."""
    std = codes.std(axis=0)

    # DCI takes up to 15,000 rows
    scores = dict.fromkeys(NAMES, np.nan)
    if trees:
        scores.update(dci(codes[:N_DCI], factors[:N_DCI], seed, n_bins))

    # the others take 10,000, also with codes shuffled among images: the floor of noise
    noise = np.random.default_rng(seed).permutation(codes)
    if len(codes) <= N_DCI:
        codes, noise, factors = codes[:N_SCORES], noise[:N_SCORES], factors[:N_SCORES]
    scores.update(fast_metrics(codes, factors, n_bins))

    # which latent knows which factor
    share = known_share(codes, factors, n_bins)
    gap = mig_per_factor(codes, factors, n_bins)
    corr = correlation(codes, factors)
    matched = {j: i for i, j in zip(*match(corr))}
    per_factor = {}
    for j, name in enumerate(names):
        best = share[:, j].argmax()
        per_factor[name] = {"latent": best, "mi_over_h": share[best, j], "gap": gap[j],
                            "rho": corr[best, j], "mcc_latent": matched.get(j)}

    return {"metrics": scores,
            "noise_floor": fast_metrics(noise, factors, n_bins),
            **{name: fast_metrics(*pair, n_bins) for name, pair in draws.items()},
            "per_factor": per_factor, "n": len(codes),
            "n_active": (std >= 0.05 * std.max()).sum(), "latent_std": std, "mi_over_h": share,
            "seed": seed, "n_bins": n_bins,
            "scikit-learn": version("scikit-learn")}           # whose trees are DCI's


def finished(result, codes, samples, factors, drawn, n_bins):
    """A report in plain numbers, None for NaN, with the arrays that its pictures show."""
    text = json.dumps(result, default=lambda a: a.tolist())
    result = json.loads(text, parse_constant=lambda nan: None)

    # pictures show classes, in modulated draws the same ones
    every = np.vstack([factors, drawn])
    _, every = as_arrays(every, every, n_bins)
    n = len(factors)
    result["arrays"] = {"codes": codes, "samples": samples, "factors": every[:n],
                        "drawn": every[n:]}
    return result


def write_report(result, folder):
    """Write metrics.json and pictures into a folder."""
    folder = Path(folder)
    numbers = {name: value for name, value in result.items() if name != "arrays"}
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    pictures = {"latents": draw_latents, "factors": draw_factors, "information": draw_information}
    for name, draw in pictures.items():
        with drawing(folder / f"{name}.png") as picture:
            draw(result).savefig(picture, dpi=150)


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
    text += idiff.table(columns) + "\n"

    # which latent found which factor
    rows = [["factor", "latent", "MI/H", "gap", "|rho|", "MCC's latent"]]
    for name, row in r["per_factor"].items():
        rows.append([name, *row.values()])
    text += idiff.table(zip(*rows)) + "\n"

    if "generation" in r:
        text += format_generation(r["generation"])
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
    return f"{title}\n\n{idiff.table(rows)}\n"


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

def draw_latents(r):
    """Histograms of samples of the 40 most informative latents at most, coloured by the factor
    that each knows most of."""
    from matplotlib import colormaps
    share = np.nan_to_num(np.array(r["mi_over_h"], float))     # None is NaN
    shown = np.sort(share.max(axis=1).argsort()[::-1][:40])
    figure, axes = idiff.panels(len(shown))
    names = list(r["per_factor"])
    arrays = r["arrays"]
    for i, ax in zip(shown, axes):
        j = share[i].argmax()
        name = names[j]
        z = arrays["samples"][:, i]
        y = arrays["factors"][:, j]
        n_values = y.max() + 1

        # stacked by value: a latent that found the factor shows a mode a colour
        by_value = [z[y == value] for value in range(n_values)]
        scheme = "hsv" if "hue" in name else "viridis"
        colours = colormaps[scheme](np.arange(n_values) / n_values)
        bins = np.linspace(z.min(), z.max() + 1e-6, 61)
        ax.hist(by_value, bins, stacked=True, histtype="stepfilled", color=colours)
        ax.set(yticks=[], xlabel=f"z{i}; {name}: MI/H {share[i, j]:.2f}")
    return figure


def draw_factors(r):
    """Share of each value of each factor, among the rows and in modulated draws."""
    names = list(r["per_factor"])
    arrays = r["arrays"]
    figure, axes = idiff.panels(len(names))
    for j, ax in enumerate(axes):
        shown = {"rows as they are": arrays["factors"][:, j]}
        if len(arrays["drawn"]):
            shown["modulated draws"] = arrays["drawn"][:, j]
        last = max(column.max() for column in shown.values())
        edges = np.arange(last + 2) - 0.5
        ax.hist(list(shown.values()), edges, density=True, label=list(shown))
        ax.set(xlabel=f"share of each {names[j]}, by index", xticks=edges[1::2] - 0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center")
    return figure


def draw_information(r):
    """The matrix MI/H."""
    share = np.array(r["mi_over_h"], float)
    names = list(r["per_factor"])
    figure, [ax] = idiff.panels(1, (1.6 + 0.9 * len(names), 4.5))
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")   # pale, for black digits
    for (i, j), value in np.ndenumerate(share):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set(yticks=range(len(share)), ylabel="latent", title="mutual information / entropy")
    return figure


# ---- The command line ----

def holds(path):
    """Whether a path is a "report", "codes" or a "checkpoint", by its content, whole or damaged."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(99)                # an archive begins with the name of its first file
    if start.startswith(b"{"):
        return "report"
    return "codes" if b".npy" in start else "checkpoint"


def read_report(path):
    """A metrics.json as it is; ValueError if it is damaged."""
    try:
        result = json.loads(path.read_text("utf-8"))
        format_report(result)
    except Exception as error:                   # json, or whatever is missing
        reason = f"{type(error).__name__}, {in_one_line(error)}"
        raise ValueError(f"'{path}' is no report of evaluate.py, or is damaged: {reason}. Make it "
                         "again from the checkpoint.") from None
    return result


def report_of_path(path, args, load):
    """The report of one path; only a computed one has arrays."""
    kind = holds(path)
    how = dict(n=args.n, seed=args.seed, n_bins=args.n_bins, trees=not args.no_dci, name=str(path))
    if kind == "report":
        plain = build_parser().parse_args(["-"])
        plain.paths, plain.out = args.paths, args.out
        if args != plain:
            raise ValueError(f"'{path}' is a report already: --n, --generate, --n-bins, --no-dci, "
                             "--seed, --data and --device need the checkpoint.")
        return read_report(path)

    check_counts(args.n, args.generate, args.n_bins)
    if kind == "codes":
        if args.generate or args.data:
            raise ValueError(f"'{path}' holds codes: --generate and --data need a checkpoint.")
        return report_of_codes(*read_codes(path), **how)

    device = idiff.pick_device(args.device)
    model, data = idiff.open_checkpoint(path, device, args.data, load)
    return report(model, data, generate=args.generate, **how)


def start(args):
    """Report on one path, or tables over many; returns the reports."""
    load = lru_cache(maxsize=1)(idiff.load_data)     # one load for many checkpoints
    many = len(args.paths) > 1
    measured = [path for path in args.paths if path.exists() and holds(path) != "report"]
    if len({path.resolve().parent for path in measured}) < len(measured):
        raise ValueError("two of the paths lie in one folder, which holds one report. Pass them "
                         "one by one, each with --out, then their metrics.json.")
    results = []
    for path in args.paths:
        folder = path.parent if many else args.out or path.parent
        if path in measured:
            idiff.try_folder(folder)
        result = report_of_path(path, args, load)
        results.append(result)
        if not many:
            print(format_report(result), flush=True)
        if "arrays" in result:                   # pictures last: the numbers are out
            write_report(result, folder)
            print(f"metrics.json and pictures are in {folder}")

    if many:
        text = format_tables(results)
        print(text)
        parents = [path.resolve().parent for path in args.paths]
        folder = args.out or Path(os.path.commonpath(parents))
        idiff.try_folder(folder)
        (folder / "tables.md").write_text(text, "utf-8", "replace")
    return results


def main(argv=None):
    """Run the command line. Returns the reports, a list of dicts."""
    with idiff.script("evaluate.py", "--n"):
        return start(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
