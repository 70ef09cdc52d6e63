# SPDX-License-Identifier: MIT
"""How disentangled is a code? MIG (Eq. 1), MCC, DCI and modularity, with a report and pictures.

    python evaluate.py runs/NAME/ckpt.pt                 # write a report
    python evaluate.py runs/NAME/ckpt.pt --generate 200  # also judge generated images
    python evaluate.py runs/A/ckpt.pt runs/B/ckpt.pt     # the paper's tables, and agreement

A path may also be a metrics.json, which is read as it is, or a codes.npz of somebody else's model,
with the arrays codes (N, D), factors (N, K) and perhaps factor_names. Metrics are functions of
codes and factors; a metric that is undefined is NaN, with a warning. Even without factors the
report tells what p(z|u) can identify. In Python: report(model, data), agreement(codes). Sources:
Chen 2018 (MIG), Hyvarinen 2016 (MCC), Eastwood 2018 (DCI), Ridgeway 2018 (modularity), Khemakhem
2020 (what u identifies, agreement).
"""
import argparse
import json
import math
import os
import warnings
from collections import defaultdict
from functools import lru_cache
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

import idiff
from idiff import drawing, in_one_line, progress

N_SCORES = 10_000           # rows that all metrics except DCI use by default
N_DCI = 15_000              # rows that DCI uses at most; two thirds train its trees
N_PAIRS = 1000              # rows used where every row is compared with every other

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
        help="folder for the report, or for the tables of many paths (default: theirs)")
    add("--n", type=int, default=N_DCI,
        help="images to encode; DCI uses 15,000 at most, the others 10,000, or all if there are "
        "more than 15,000 (default: 15000)")
    add("--generate", type=int, default=0, metavar="N",
        help="number of images to generate and judge (default: 0)")
    add("--n-bins", type=int, default=20,
        help="number of bins for latents, and for factors that are numbers (default: 20)")
    add("--no-dci", action="store_true", help="skip DCI, which takes most of the time")
    add("--seed", type=int, default=0, help="seed of rows, samples and trees (default: 0)")
    add("--data", type=os.path.expanduser,
        help="name or path of the data (default: the data that the model was trained on)")
    add("--device", help="cpu, cuda or mps (default: cuda where present)")
    return parser


# ---- Metrics ----

def equal_bins(values, n_bins):
    """The bin of each value; the bins have equal widths between the minimum and the maximum."""
    # an outlier squeezes all other values; the last bin includes its right edge
    left_edges = np.linspace(values.min(), values.max(), n_bins, endpoint=False)
    return np.digitize(values, left_edges) - 1


def array(x):
    """A NumPy array of a tensor on any device."""
    return x.cpu().numpy()


def as_numbers(a, name):
    """An array or tensor as float64 (N, columns); ValueError unless it holds finite numbers."""
    if torch.is_tensor(a):
        a = a.detach().cpu().double()
    a = np.asarray(a)
    if a.ndim != 2 or 0 in a.shape or len(a) < 2 or a.dtype.kind not in "buif":
        raise ValueError(f"{name} must be numbers, 2 rows or more; got {a.dtype} {a.shape}.")
    a = a.astype(float)
    if not (abs(a) < 1e150).all():               # beyond it squares could overflow
        raise ValueError(f"{name} hold NaN, inf or numbers beyond 1e150.")
    return a


def as_arrays(codes, factors, n_bins=None):
    """codes as float64 (N, D), factors as int64 (N, K) re-indexed to 0, 1, ...; or ValueError.

    Given n_bins, a factor counts as a number, not a class, if it has more values than n_bins and
    than 256 or a quarter of the rows, whichever is less: its labels are then equal bins, with a
    warning.
    """
    codes = as_numbers(codes, "codes")
    factors = as_numbers(factors, "factors")

    # every image has a row of codes and a row of factors
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
    """Which factors take more than one value, (K,) bool; warns about each that does not."""
    varies = np.ptp(factors, axis=0) > 0
    for j in np.flatnonzero(~varies):
        warnings.warn(f"factor {j} is constant: left out of every mean.")
    return varies


def mean_of(values, metric, wanted="a varying factor"):
    """Mean of the values that are not NaN; NaN and a warning if there are none."""
    if np.isnan(values).all():                   # this also holds if there are no values
        warnings.warn(f"{metric} is undefined: it needs {wanted}.")
        return np.nan
    return float(np.nanmean(values))


def entropies(factors):
    """Entropy in nats of each column of whole numbers from 0 up, (K,)."""
    from scipy.stats import entropy
    return np.array([entropy(np.bincount(column)) for column in factors.T])


def mutual_information(codes, factors, n_bins=20):
    """I(z_i; y_j) in nats, (D, K); each latent is put into equal bins over its range."""
    from sklearn.metrics import mutual_info_score
    codes, factors = as_arrays(codes, factors, n_bins)
    mi = []
    for z in codes.T:
        bins = equal_bins(z, n_bins)
        mi.append([mutual_info_score(bins, y) for y in factors.T])
    mi = np.array(mi)
    return mi * (mi > 1e-12)                     # a dead latent's rounding residue is no score


def known_share(codes, factors, n_bins=20):
    """I(z_i; y_j) / H(y_j), (D, K): the share of a factor that a latent knows; NaN if constant."""
    codes, factors = as_arrays(codes, factors, n_bins)
    h = np.where(varying(factors), entropies(factors), np.nan)
    return mutual_information(codes, factors, n_bins) / h


def mig_per_factor(codes, factors, n_bins=20):
    """(I_1 - I_2) / H of each factor's two best latents, (K,), Eq. 1; I_2 = 0 if there is one."""
    share = known_share(codes, factors, n_bins)
    *_, second, best = np.sort(np.vstack([share, 0 * share[:1]]), axis=0)      # plus a dead latent
    return best - second


def mig(codes, factors, n_bins=20):
    """Discrete mutual information gap, the mean of mig_per_factor, in [0, 1]."""
    return mean_of(mig_per_factor(codes, factors, n_bins), "MIG")


def correlation(codes, factors):
    """|Spearman's rho|, (D, K), with average ranks for ties; 0 for a constant column."""
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
    """How far each latent knows one factor only, in [0, 1]; dead ones score 0, noise up to 0.7."""
    codes, factors = as_arrays(codes, factors, n_bins)
    mi = mutual_information(codes, factors, n_bins)
    return modularity_of_information(mi[:, varying(factors)])


def order_of_rows(importance, metric, wanted):
    """The mean of 1 - H(row) / log(its length), weighted by each row's share of the total."""
    from scipy import stats
    if importance.shape[1] < 2 or not importance.size:
        return mean_of([], metric, wanted)
    p = importance + 1e-11                       # as in disentanglement_lib, for rows of zeros
    order = 1 - stats.entropy(p, base=p.shape[1], axis=1)
    weight = importance.sum(axis=1) / (importance.sum() or 1)
    return float(weight @ order)


def dci_of_importance(importance):
    """Disentanglement and completeness of an importance matrix (D, K), a dict; 0 for all zeros."""
    return {"disentanglement": order_of_rows(importance, "disentanglement", "two varying factors"),
            "completeness": order_of_rows(importance.T, "completeness", "two latents")}


def dci(codes, factors, seed=0, n_bins=20):
    """Disentanglement, completeness and informativeness (mean test accuracy), a dict.

    Boosted trees predict each varying factor from the codes. Two thirds of the rows, drawn with
    seed, train them; the other rows test them.
    """
    from joblib import Parallel, delayed
    from sklearn.ensemble import GradientBoostingClassifier
    codes, factors = as_arrays(codes, factors, n_bins)
    order = np.random.default_rng(seed).permutation(len(codes))
    codes, factors = codes[order], factors[order]
    split = 2 * len(codes) // 3
    factors = factors[:, varying(factors[:split])]
    n_values = factors.max(axis=0) + 1           # trees in each round

    def fit(j):                                  # scikit-learn's defaults: 100 rounds, depth 3
        def tell(*_):                            # returns None: a true value would end the fit
            bar.update(n_values[j])
        trees = GradientBoostingClassifier(random_state=seed)
        trees.fit(codes[:split], factors[:split, j], monitor=tell)
        accuracy = trees.score(codes[split:], factors[split:, j])
        return trees.feature_importances_, accuracy

    # fit factors in parallel, first those with many values, because they take longest
    jobs = [delayed(fit)(j) for j in np.argsort(-n_values)]
    with progress(None, "DCI, trees", total=100 * n_values.sum()) as bar:
        fits = Parallel(-1, prefer="threads")(jobs)
    importance = np.reshape([row for row, _ in fits], (-1, codes.shape[1])).T

    scores = dci_of_importance(importance)       # the order of factors does not matter
    scores["informativeness"] = mean_of([accuracy for _, accuracy in fits], "informativeness")
    return scores


# ---- Without factors ----

def shared(a, b):
    """What codes a (N, D1) and b (N, D2) of the same rows share, a dict: see agreement."""
    from scipy.linalg import orth, svdvals
    rho = correlation(a, b)
    matched = match(rho)
    per_latent = np.zeros(len(rho))
    per_latent[matched[0]] = rho[matched]

    # cosines between what the columns span; a constant column spans nothing
    cosines = svdvals(orth(a - a.mean(axis=0)).T @ orth(b - b.mean(axis=0)))
    return {"agreement": per_latent.sum() / max(rho.shape),
            "canonical": cosines.sum() / min(rho.shape),
            "per_latent": per_latent, "matched": np.array(matched), "rho": rho}


def agreement(codes, seed=0):
    """How far independent runs find the same latents, a dict. codes: [(N, D1), (N, D2), ...].

    "pairs" has, for every two "runs": "rho" (D1, D2), the |Spearman's rho| of their latents;
    "matched", rows and columns of the one-to-one pairs with the largest sum; "per_latent", the rho
    of each latent of the first run with its match, 0 if it has none; "agreement", their sum /
    max(D1, D2); "canonical", the mean canonical correlation, which is 1 if the codes are the same
    up to a linear map; "floor", the agreement after the second run's rows are shuffled. "mean" has
    the means of the last three over all pairs, "least" the least agreement, "per_latent" the least
    rho of each latent of run 0. ValueError unless all codes have the same number of rows. Sources:
    Khemakhem et al. 2020 (ICE-BeeM), Roeder et al. 2021.
    """
    codes = [as_numbers(z, "codes") for z in codes]
    if len(codes) < 2 or len(set(map(len, codes))) > 1:
        raise ValueError("agreement needs codes of the same rows from two runs or more: got "
                         f"{[z.shape for z in codes]}.")
    rng = np.random.default_rng(seed)
    pairs = []
    for a, b in combinations(range(len(codes)), 2):
        pair = shared(codes[a], codes[b])
        shuffled = shared(codes[a], rng.permutation(codes[b]))
        pairs.append({"runs": [a, b], **pair, "floor": shuffled["agreement"]})

    mean = {}
    for name in ("agreement", "canonical", "floor"):
        mean[name] = np.mean([pair[name] for pair in pairs])
    of_first = [pair["per_latent"] for pair in pairs[:len(codes) - 1]]
    return plain({"n": len(codes[0]), "mean": mean,
                  "least": min(pair["agreement"] for pair in pairs),
                  "per_latent": np.min(of_first, axis=0), "pairs": pairs})


def information(z, p):
    """How much each latent, and last all together, tell about u, and its error: (D + 1,) nats each.

    It is a lower bound on I(z; u), and at most the entropy of u among the N rows. It is computed as
    in contrast_loss, but also for one latent at a time. z: (N, D), or (N, D, L) categories; p:
    p(z|u).
    """
    log_p = p.log_prob(z[:, None])                             # (N, N, D)
    log_p = torch.cat([log_p, log_p.sum(dim=2, keepdim=True)], dim=2)
    own = log_p.diagonal().mT                                  # (N, D + 1)
    any_u = log_p.logsumexp(dim=1) - math.log(len(z))          # (N, D + 1)
    told = own - any_u
    return told.mean(dim=0), told.std(dim=0) / len(z)**0.5


def identifiable(p, zero_means=False):
    """What a Gaussian p(z|u) of M different u, over (M, D), can identify: a dict.

    A latent has k = 2 natural parameters, mean / variance and -1 / (2 variance), or only the
    latter, k = 1, if means are 0. Theory asks that all D k of them, which are "wanted", vary with u
    independently. That takes D k + 1 different u, so M of them are "enough_for" (M - 1) // k
    latents. "rank" is how many singular values exceed 1 % of the largest, after each parameter is
    divided by its standard deviation over u; "condition" is the largest divided by the smallest, or
    NaN if the rank is too low. ValueError if p is not finite. Source: Khemakhem et al. 2020.
    """
    precision = 1 / p.variance.cpu().double()                  # some devices have no doubles
    eta = [precision / -2]
    if not zero_means:
        eta.append(p.mean.cpu() * precision)
    k = len(eta)
    eta = torch.cat(eta, dim=1)                                # (M, D k)
    if not eta.isfinite().all():
        raise ValueError("p(z|u) holds NaN or inf: the model is damaged, or its training diverged.")
    eta = eta - eta.mean(dim=0)
    std = eta.std(dim=0, correction=0).clamp(min=1e-6)         # 0 where u changes nothing
    s = torch.linalg.svdvals(eta / std)

    n, wanted = eta.shape
    rank = (s > 0.01 * s[0]).sum()
    return {"enough_for": (n - 1) // k, "wanted": wanted, "rank": rank,
            "condition": s[0] / s[-1] if rank == wanted else np.nan}


def different(u):
    """The distinct rows (M, U) of u (N, U), to four decimals, and which of them each is, (N,)."""
    # sort by the last column first, so that class k of one-hot columns has the number k; a column
    # of zeros is added because u may have none
    padded = F.pad(u.flip(1), (0, 1)).round(decimals=4)
    values, number = padded.unique(dim=0, return_inverse=True)
    return values[:, :-1].flip(1), number


@torch.no_grad()
def measure_prior(model, data, rows, samples, every_u, own):
    """What can be known without factors, a dict, and the arrays that pictures show of it, a dict.

    rows: (N,); samples: (N, D), one z of each row; every_u: all u that exist; own: (N,), which of
    these are the rows' own.
    """
    # how much the latents tell about u, and how much there is to tell
    values, number = different(every_u)
    number = array(number[own])
    u = every_u[own]
    x = data.images(rows)
    q = model.encoder(x)
    p = model.prior(u)
    told, error = information(q.mean, p)
    x_hat = torch.cat([model.decode(z) for z in q.code()[0].split(100)])
    result = {"n": len(rows), "information": told, "error": error,
              "at_most": entropies(number[:, None])[0], "different_u": len(values),
              "reconstruction_error": squares(x_hat - x).mean()}
    arrays = {"samples": samples, "u": array(u), "number": number}

    # how well p(z|u) fits, and what it can identify
    if model.cfg.latent == "gaussian":
        fit = (samples - array(p.mean)) / array(p.stddev)
        arrays["fit"] = fit
        result.update(fit_mean=fit.mean(axis=0), fit_std=fit.std(axis=0),
                      **identifiable(model.prior(values), model.cfg.zero_means))
    return result, arrays


# ---- Codes of a model or a file ----

@torch.no_grad()
def encode(model, data, rows, seed):
    """Means of q(z|x) and one sample of each, for the images in rows: (N, D) each."""
    # a few at a time, so that memory does not grow with N
    parts = progress(rows.split(500), "encoding, 500 images each")
    codes = [torch.stack(model.encode(data.images(part))) for part in parts]
    mean, logvar = torch.cat(codes, dim=1).cpu().double()      # some devices have no doubles
    std = (0.5 * logvar).exp()
    if model.cfg.latent != "gaussian":
        std.zero_()                              # the index of a category has no noise
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
                         "finite numbers with N at least 2, and K different factor_names if it "
                         "has any. Save it with np.savez.") from None
    return codes, factors, names


# ---- Generated images ----

@lru_cache
def train_reader(data, seed, steps=600):
    """A classifier: its network, a function images -> values (B, K) of the factors that vary, and
    whether it is right on images that it was not trained on, (n_test, K) bool.

    Its network is like Encoder's; it is trained on images of the data with faint noise.
    """
    torch.manual_seed(seed)
    k = len(data.varied)
    v = max(data.factor_sizes)
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
    net.eval().requires_grad_(False)

    def read(x):
        return logits(x).argmax(dim=1)

    # test it on images that it was not trained on
    test = rows[:n_test]
    right = read(data.images(test)) == data.factors(test)[:, data.varied]
    return net, read, right


def laplacian(x):
    """Mean squared Laplacian of images, (B,): small where they are blurred, large where grainy."""
    kernel = x.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    channels = x.flatten(0, 1)[:, None]                        # (B C, 1, H, W)
    return squares(F.conv2d(channels, kernel[None, None]).view(len(x), -1))


def nearest_error(images, data, y):
    """Least mean squared error (B,) to any image of the data that is near the values y (B, K).

    480 rows count as near; in 3D Shapes these are all geometries in the same hues. So an image with
    a wrong geometry is not punished, but a blurred or a grainy one is.
    """
    number = (y * data.strides[data.varied]).sum(dim=1)
    places = torch.searchsorted(data.numbers, number)          # among the combinations that exist
    errors = []
    for image, place in zip(images, places.tolist()):
        first = min(place, len(data) - 1) // 480 * 480
        near = data.order[first:first + 480]
        errors.append(squares(data.images(near) - image).min())
    return torch.stack(errors)


def squares(x):
    """Mean square of each image, (B,)."""
    return x.square().flatten(1).mean(dim=1)


def looks(x, y, data):
    """How images x (B, C, H, W) that show the values y (B, K) look, {name: number}.

    "values" and "pairs" are the shares of all values, and of all pairs of values of two factors,
    that occur.
    """
    sizes = data.sizes[data.varied]
    value = torch.cat([F.one_hot(*each) for each in zip(y.T, sizes)], dim=1).float()
    met = value.T @ value > 0                                  # (sum of V, sum of V)
    n_values = met.diagonal().sum()
    n_pairs = sizes.sum()**2 - sizes.square().sum()
    nearest = nearest_error(x, data, y)
    return {"nearest, median": nearest.median(), "nearest, 90 %": nearest.quantile(0.9),
            "Laplacian": laplacian(x).mean(), "values": n_values / sizes.sum(),
            "pairs": (met.sum() - n_values) / n_pairs.clamp(min=1)}


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
    """Frechet distance between Gaussians of features (N, F), (M, F), as a share of b's variance.

    The formula is FID's, but the result is not FID, which uses the features of another network.
    Source: Heusel et al. 2017.
    """
    gap = a.mean(dim=0) - b.mean(dim=0)
    a, b = ((each - each.mean(dim=0)) / (len(each) - 1)**0.5 for each in (a, b))
    # the trace of the root of the product of the covariances a'a and b'b; R of QR has the same
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
    """Median codes (n,) of the rows that have the wanted values, interpolated between values.

    codes, values: (N,), a latent and a factor of the same rows.
    """
    found = np.unique(values)
    medians = [np.median(codes[values == value]) for value in found]
    return np.interp(wanted, found, medians)


def recombined(codes, y, n, seed):
    """{kind: (codes (n, D), values (n, K) that their images should show)}.

    codes: (N, D); y: (N, K), their factors. Redrawn codes are left as they are. In shuffled codes
    each latent comes from another row. In set codes each latent that matches a factor is moved to
    the median code of the rows with that row's value. A factor that no latent matches has value -1.
    """
    # another row for each latent
    index = np.random.default_rng(seed).integers(len(codes), size=(n, codes.shape[1]))
    z = np.take_along_axis(codes, index, axis=0)
    wanted = np.full((n, y.shape[1]), -1)
    kinds = {"redrawn": (codes[:n], y[:n]), "shuffled": (z, wanted)}

    # a latent that matches a factor should show the value of the row that it comes from
    if y.size:
        z = z.copy()
        for i, k in zip(*match(mutual_information(codes, y))):
            wanted[:, k] = y[index[:, i], k]
            z[:, i] = codes_of_values(wanted[:, k], codes[:, i], y[:, k])
        kinds["set"] = z, wanted
    return kinds


@torch.no_grad()
def render(model, z, start, steps=20, sampler="dpmpp", seed=0, keeps_noise=False):
    """{"decoder": images, "diffusion": images}, (B, C, H, W) each, of z (B, D) and start noise.

    start: one noise for all images, or one for each; seed: the seed of the noise that a stochastic
    sampler draws; keeps_noise: diffusion ends where invert began, without the last step of
    model.sample.
    """
    pictures = {"decoder": model.decode(z)}
    if model.unet is None:
        return pictures
    if keeps_noise and sampler in ("em", "pc"):
        raise ValueError(f"--sampler {sampler} adds noise and so cannot keep an image's own.")

    # draw ten at a time
    start = start.expand(len(z), *start.shape[1:])
    batches = list(zip(z.split(10), start.split(10)))
    parts = []
    for part, begin in progress(batches, "diffusion, 10 images each"):
        seeds = [seed + 1] * len(part)                         # the same for every image
        noise = idiff.seeded_noise(seeds, begin.shape[1:], begin.device)
        parts.append(model.sample(part, begin, steps, sampler, noise, last=not keeps_noise))
    pictures["diffusion"] = torch.cat(parts)
    return pictures


def shares(hits, names):
    """{name: share of hits}, for each factor and for all at once; hits: an array (B, K) of bool."""
    return dict(zip(names, [*hits.mean(axis=0), hits.all(axis=1).mean()]))


def generation(model, data, rows, codes, n, seed):
    """How good new images are: {table's title, with n: {row's name: {column's name: number}}}.

    codes: (N, D), the codes of rows (N,). n images are drawn from each kind of codes: as they are
    (redrawn), recombined (shuffled, set), and drawn from p(z|u). Beside them stand real images that
    are drawn alike. Frechet is the distance from other real images. Without factors no values can
    be read.
    """
    cfg = model.cfg
    n = min(n, len(rows))
    y = array(data.factors(rows)[:, data.varied])       # (N, K)
    kinds = recombined(codes, y, n, seed)

    # z from p(z|u), unless the data's u is not the model's
    generator = torch.Generator(data.device).manual_seed(seed)
    torch.manual_seed(seed)
    start = idiff.seeded_noise(range(seed, seed + n), data.image_shape, data.device)()
    others = torch.randint(len(data), (n,), generator=generator, device=data.device)
    drawn, u = data.draw(2 * n, generator, cfg.u, cfg.u_scale)
    if u.shape[1] == cfg.u_dim:
        kinds["p(z|u)"] = model.sample_prior(u[:n]), None

    # a classifier reads values; where training modulates a full grid, u tells how likely each is
    names = [*(data.factor_names[k] for k in data.varied), "all at once"]
    net = model.encoder
    right, log_p, quality = {}, {}, {}
    if y.size:
        net, read, hits = train_reader(data, seed)
        right["classifier"] = shares(array(hits), names)
        modulated = type(cfg.kind_of_u).draw is idiff.ScalesU.draw
        is_full = len(data.distinct) == math.prod(data.factor_sizes)
        if modulated and is_full and "p(z|u)" in kinds:
            chances = chances_given_u(data, **cfg.kind_of_u.unpack(u[:n]))
            log_p["expectation"] = dict(zip(names, -chances.entropy().mean(dim=0)))

    # the images of each kind, then real images that are drawn alike
    for kind, (z, wanted) in kinds.items():
        of_u = wanted is None
        alike, reference = drawn.split(n) if of_u else (rows[:n], others)
        x = data.images(alike)
        reference = features(net, data.images(reference))
        z = torch.as_tensor(z, dtype=x.dtype, device=data.device)
        made = render(model, z, start, seed=seed)
        images = {f"{network}, {kind}": image.clamp(-1, 1) for network, image in made.items()}
        images["real, of u" if of_u else "real"] = x
        for name, image in images.items():
            if name in quality:                                # the real images, done before
                continue
            error = squares(image - x).mean() if kind == "redrawn" else None
            quality[name] = {"Frechet": frechet(features(net, image), reference), "error": error}
            if not y.size:
                continue

            # what the classifier reads: as asked, or as likely as u says
            seen = read(image)                                 # (n, K)
            quality[name].update(looks(image, seen, data))
            if not of_u:
                right[name] = shares(array(seen) == wanted, names)
            elif log_p:
                log_p[name] = dict(zip(names, chances.log_prob(seen).mean(dim=0)))
    found = {"read as asked": right, "log P(value|u), nats": log_p, "images": quality}
    return {f"{title}, n = {n}": rows for title, rows in found.items() if rows}


def format_generation(tables):
    """The tables of generation, as text."""
    text = ""
    for title, rows in tables.items():
        lines = [[title, *[*rows.values()][-1]]]
        for name, row in rows.items():
            texts = ["-" if value is None else f"{value:#.3g}" for value in row.values()]
            lines.append([name, *texts])
        text += idiff.table(zip(*lines)) + "\n"
    return text


# ---- The report ----

# A report is a dict. It has "metrics" and, for comparison, "noise_floor" and "..._on_draws", all
# with keys from NAMES; "per_factor"; "prior", which needs no factors; what a checkpoint says of
# itself; and "generation". Its "arrays" are what pictures show; they stay out of metrics.json.

def report(model, data, n=N_DCI, seed=0, n_bins=20, trees=True, generate=0, name="model"):
    """The report of a model on its data, a dict: see above.

    n: how many random images to encode, and how many that training never saw; n_bins: the number of
    bins for latents, and for factors that are numbers; trees: whether to fit DCI's trees, which
    takes most of the time; generate: how many images to generate and judge; name: what the report
    calls the model.
    """
    check_counts(n, generate, n_bins)
    cfg = model.cfg

    # random images, for what needs factors and for new images
    n = min(n, len(data))
    generator = torch.Generator().manual_seed(seed)            # on the CPU: the same rows anywhere
    rows = torch.randperm(len(data), generator=generator)[:n].to(data.device)
    generator = torch.Generator(data.device).manual_seed(seed)
    if not (data.factor_names or generate):
        rows = rows[:0]

    # images for what needs u: modulated draws, or those that training never saw
    modulated = cfg.u != "own" and len(data.varied) > 0
    if modulated:
        others, every_u = data.draw(min(n, N_SCORES), generator, cfg.u, cfg.u_scale)
        own = torch.arange(len(others), device=data.device)
    else:
        others, every_u = data.held_out[:n], data.u
        own = others
    codes, samples = encode(model, data, torch.cat([rows, others]), seed)
    codes, codes_others = np.split(codes, [len(rows)])
    samples, samples_others = np.split(samples, [len(rows)])

    # what every report has; agreement compares codes of the same rows
    arrays = {"codes": codes if modulated else codes_others}
    kind = "means"
    if cfg.latent != "gaussian":
        kind = "modes"
        n_bins = max(n_bins, cfg.categories)     # a category is never merged with another
    result = {"file": name, "data": data.name, "fingerprint": data.fingerprint, "model": cfg.model,
              "codes": f"{kind} of q(z|x), averaged weights", "config": vars(cfg),
              "training": model.info, "seed": seed, **spread(arrays["codes"])}

    # what needs no factors, if u is what the model was trained with
    if every_u.shape[1] == cfg.u_dim:
        few = slice(N_PAIRS)
        prior, shown = measure_prior(model, data, others[few], samples_others[few], every_u,
                                     own[few])
        result["prior"] = {"images": "modulated draws" if modulated else "images held out", **prior}
        arrays.update(shown)
    if generate:
        result["generation"] = generation(model, data, rows, codes, generate, seed)

    # what needs factors
    if data.factor_names:
        factors = array(data.factors(rows))
        drawn = others if modulated else others[:0]
        factors_drawn = array(data.factors(drawn))
        draws = {}
        if modulated:
            # u as if it were a code: the last columns are its centres, or scales if it has none
            u = every_u[:, -len(data.varied):]
            draws = {"encoder_on_draws": (codes_others, factors_drawn),
                     "u_on_draws": (u, factors_drawn)}
        result.update(measure(codes, factors, data.factor_names, draws, seed, n_bins, trees))
        arrays.update(shown_factors(samples, factors, factors_drawn, n_bins))
    return {**plain(result), "arrays": arrays}


def report_of_codes(codes, factors, names, n=N_DCI, seed=0, n_bins=20, trees=True, name="codes"):
    """The report of codes (N, D) and factors (N, K) of somebody else's model, a dict."""
    check_counts(n, 0, n_bins)
    data = f"factors of {Path(name).name} {idiff.fingerprint(factors)[:8]}"
    result = {"file": name, "data": data, "model": "codes", "codes": "as they are", "config": {}}
    rows = np.random.default_rng(seed).permutation(len(codes))[:n]
    codes, factors = codes[rows], factors[rows]
    result.update(measure(codes, factors, names, {}, seed, n_bins, trees))
    return {**plain(result), "arrays": shown_factors(codes, factors, factors[:0], n_bins)}


def check_counts(n, generate, n_bins):
    """ValueError unless these numbers are in range."""
    if n < 3 or generate < 0 or not 2 <= n_bins <= 1000:
        raise ValueError("--n must be at least 3, --generate 0, --n-bins 2 to 1,000: got "
                         f"{n}, {generate} and {n_bins}.")


def fast_metrics(codes, factors, n_bins):
    """The paper's metrics except DCI's, which need trees: a dict."""
    return {"mig": mig(codes, factors, n_bins),
            "mcc": mcc(codes, factors),
            "modularity": modularity(codes, factors, n_bins)}


def measure(codes, factors, names, draws, seed, n_bins, trees):
    """The numbers that need factors, a dict. draws: {name: (codes, factors)} to compare with."""
    widths = spread(codes)

    # DCI takes up to 15,000 rows
    scores = dict.fromkeys(NAMES, np.nan)
    n_dci = min(len(codes), N_DCI) if trees else 0
    if trees:
        scores.update(dci(codes[:N_DCI], factors[:N_DCI], seed, n_bins))

    # the others take 10,000; codes shuffled among images give the floor of noise
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
            "per_factor": per_factor, **widths, "n": len(codes), "n_dci": n_dci, "mi_over_h": share,
            "seed": seed, "n_bins": n_bins,
            "scikit-learn": version("scikit-learn")}           # it fits DCI's trees


def spread(codes):
    """How many codes (N, D) and active latents there are, and each latent's std: a dict."""
    std = codes.std(axis=0)
    return {"n": len(codes), "n_active": (std >= 0.05 * std.max()).sum(), "latent_std": std}


def plain(result):
    """A dict with plain numbers, as in JSON, and None for NaN and inf."""
    text = json.dumps(result, default=lambda a: a.tolist())
    return json.loads(text, parse_constant=lambda nan: None)


def shown_factors(samples, factors, drawn, n_bins):
    """The arrays that pictures of factors show, a dict; modulated draws have the same classes."""
    every = np.vstack([factors, drawn])
    _, every = as_arrays(every, every, n_bins)
    n = len(factors)
    return {"samples": samples, "factors": every[:n], "drawn": every[n:]}


def write_report(result, folder):
    """Write metrics.json and pictures into a folder."""
    folder = Path(folder)
    numbers = {name: value for name, value in result.items() if name != "arrays"}
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    pictures = {}
    if "metrics" in result:
        pictures = {"latents": draw_latents, "factors": draw_factors,
                    "information": draw_information}
    elif "prior" in result:
        pictures = {"latents": draw_latents_by_u, "information": draw_told}
        if "fit" in result["arrays"]:
            pictures["fit"] = draw_fit
    for name, draw in pictures.items():
        with drawing(folder / f"{name}.png") as picture:
            draw(result).savefig(picture)


def format_report(r):
    """A report, as text."""
    model = MODELS[r["model"]]
    of_dci = f" ({r['n_dci']:,} for DCI)" if r.get("n_dci") else ""
    text = (f"{r['file']}: {model}, {len(r['latent_std'])} latents; {r['data']}\n"
            f"{r['codes']}, n = {r['n']:,}{of_dci}, seed {r['seed']}\n\n")

    # the metrics, and what to compare them with
    titles = {"metrics": "codes", "noise_floor": "noise",
              "encoder_on_draws": "codes, on draws", "u_on_draws": "u alone, on draws"}
    columns = [["metric", *NAMES.values()]]
    for key, title in titles.items():
        if key in r:
            columns.append([title, *(r[key].get(name) for name in NAMES)])

    # which latent found which factor
    if "metrics" in r:
        rows = [["factor", "latent", "MI/H", "gap", "|rho|", "MCC's latent"]]
        for name, row in r["per_factor"].items():
            rows.append([name, *row.values()])
        text += f"{idiff.table(columns)}\n{idiff.table(zip(*rows))}\n"
    if "prior" in r:
        text += format_prior(r["prior"])

    if "generation" in r:
        text += format_generation(r["generation"])
    widths = " ".join(f"{std:.3f}" for std in r["latent_std"])
    return text + f"{r['n_active']} active latents, std: {widths}"


def format_prior(r):
    """What a report tells about p(z|u), as text."""
    n_latents = len(r["information"]) - 1
    columns = [["latent", *latent_names(range(n_latents)), "all"],
               ["nats told of u", *r["information"]],
               ["error", *r["error"]]]
    verdict = ""
    if "rank" in r:
        columns.append(["mean by p(z|u)", *r["fit_mean"], None])
        columns.append(["std by p(z|u)", *r["fit_std"], None])
        change = "means and scales" if r["wanted"] > n_latents else "scales"
        condition = f", condition {r['condition']:.0f}" if r["condition"] else ""
        enough = "1 latent" if r["enough_for"] == 1 else f"{r['enough_for']:,} latents"
        verdict = (f"{r['different_u']:,} different u: enough for {enough} whose {change} change, "
                   f"this model has {n_latents}. p(z|u) has rank {r['rank']} of "
                   f"{r['wanted']}{condition}.\n")
    return (f"{idiff.table(columns)}\n{r['n']:,} {r['images']}: at most {r['at_most']:.2f} nats of "
            "u can be told; where p(z|u) is right the mean is 0, the std 1. The decoder's mean "
            f"squared error is {r['reconstruction_error']:.4f}.\n{verdict}\n")


# ---- The paper's tables, and agreement ----

def format_table(title, columns):
    """A table of {name: group of reports}, each beside the paper's own figures, if it has any.

    Each of the four metrics has a cell: mean ± std / max over the group.
    """
    rows = [["metric", *(NAMES[name] for name in FOUR)]]
    for name, group in columns.items():
        cells = []
        for metric in FOUR:
            values = np.array([r["metrics"][metric] for r in group], float)    # None is NaN
            cell = f"{values.mean():.2f}"
            if len(group) > 1:
                cell += f" ± {values.std(ddof=1):.2f} / {values.max():.2f}"
            cells.append("-" if np.isnan(values).any() else cell)
        rows.append([f"{name}, n = {len(group)}", *cells])
        if name in PAPER:
            rows.append(["paper", *PAPER[name].split(", ")])
    return f"{title}\n\n{idiff.table(rows)}\n"


def format_tables(results):
    """Table 2 (by model) and Table 3 (by configuration, over its seeds), of each data set."""
    by_data, by_config = {}, {}
    for r in [r for r in results if "metrics" in r]:
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


def agreements(results):
    """Agreement of the checkpoints of each data set that has two or more, a list of dicts."""
    groups = defaultdict(list)
    for r in results:
        if "fingerprint" in r and "arrays" in r:
            same_rows = r["fingerprint"], r["config"]["u"] == "own"
            groups[same_rows].append(r)

    # one run has nothing to agree with
    found = []
    for group in groups.values():
        if len(group) > 1:
            found.append({"data": group[0]["data"], "files": [r["file"] for r in group],
                          **agreement([r["arrays"]["codes"] for r in group])})
    return found


def format_agreement(a):
    """The table of an agreement: each run beside the first, whose latents are named."""
    # a row for each pair with the first run, then for all pairs
    first, *others = a["files"]
    names = latent_names(range(len(a["per_latent"])))
    rows = [["run", "agreement", "canonical correlation", "shuffled rows", *names]]
    for name, pair in zip(others, a["pairs"]):                 # the first run's pairs come first
        scores = [pair[score] for score in a["mean"]]
        rows.append([name, *scores, *pair["per_latent"]])
    rows.append(["mean over all pairs", *a["mean"].values(), *[None] * len(names)])
    rows.append(["least", a["least"], None, None, *a["per_latent"]])
    return (f"Agreement with {first}: |rho| of matched latents, and its mean; {a['data']}, "
            f"n = {a['n']:,}\n\n{idiff.table(zip(*rows))}\nAt 1, two runs find the same latents up "
            "to their order and a function of each. Where only the canonical correlation is 1, "
            "they find the same latents up to a linear map.\n")


def latent_names(numbers):
    """The names of the latents with these numbers."""
    return [f"z{i}" for i in numbers]


# ---- Pictures ----

def draw_matrix(ax, matrix, rows, columns):
    """A matrix of numbers in [0, 1], written and coloured, with names of rows and columns."""
    ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")  # pale, for black digits
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center")
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), rows)


def draw_latents(r):
    """Histograms of samples of up to 40 latents, the most informative ones, coloured by the factor
    that each knows best."""
    from matplotlib import colormaps
    share = np.nan_to_num(np.array(r["mi_over_h"], float))     # None is NaN
    shown = np.sort(share.max(axis=1).argsort()[::-1][:40])
    figure, panels = idiff.panels(shown)
    names = list(r["per_factor"])
    arrays = r["arrays"]
    for i, ax in panels:
        j = share[i].argmax()
        name = names[j]
        z = arrays["samples"][:, i]
        y = arrays["factors"][:, j]
        n_values = y.max() + 1

        # stacked by value: a latent that found the factor shows one mode per colour
        by_value = [z[y == value] for value in range(n_values)]
        scheme = "hsv" if "hue" in name else "viridis"
        colours = colormaps[scheme](np.arange(n_values) / n_values)
        bins = np.linspace(z.min(), z.max() + 1e-6, 61)
        ax.hist(by_value, bins, stacked=True, histtype="stepfilled", color=colours)
        ax.set(yticks=[], xlabel=f"z{i}; {name}: MI/H {share[i, j]:.2f}")
    figure.suptitle("samples of latents, by value of a factor\n(dark or red: lowest)")
    return figure


def draw_factors(r):
    """The share of each value of each factor, among the rows and in modulated draws."""
    names = list(r["per_factor"])
    arrays = r["arrays"]
    figure, panels = idiff.panels(names)
    for j, (name, ax) in enumerate(panels):
        shown = {"rows as they are": arrays["factors"][:, j]}
        if len(arrays["drawn"]):
            shown["draws as in training"] = arrays["drawn"][:, j]
        last = max(column.max() for column in shown.values())
        edges = np.arange(last + 2) - 0.5
        ax.hist(list(shown.values()), edges, density=True, label=list(shown))
        ax.set(xlabel=f"share of each {name}, by index", xticks=edges[1::2] - 0.5)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center")
    return figure


def draw_information(r):
    """The matrix MI/H."""
    names = list(r["per_factor"])
    figure, [(share, ax)] = idiff.panels([np.array(r["mi_over_h"], float)],
                                         (1.6 + 0.9 * len(names), 4.5))
    draw_matrix(ax, share, range(len(share)), names)
    ax.set(ylabel="latent", title="mutual information / entropy")
    return figure


def draw_latents_by_u(r):
    """Samples of up to 40 latents against the index of u or, if there are more than 50 different u,
    against the column of u that each latent follows most."""
    # an index is enough for a few u; of many, such as times, the values say more
    arrays = r["arrays"]
    figure, panels = idiff.panels(arrays["samples"].T[:40], (6, 2))
    for i, (z, ax) in enumerate(panels):
        x = arrays["number"]
        name = "index of u"
        if r["prior"]["different_u"] > 50:
            j = correlation(z[:, None], arrays["u"]).argmax()
            x = arrays["u"][:, j]
            name = f"column {j} of u, standardised"
        ax.scatter(x, z, 4, x, cmap="turbo")
        ax.set(xlabel=name, ylabel=f"z{i}")
    figure.suptitle("samples of each latent, by u")
    return figure


def draw_told(r):
    """Bars of what each latent, and all together, tell about u."""
    told = r["prior"]["information"]
    figure, [(_, ax)] = idiff.panels([told], (3 + 0.4 * len(told), 3.5))
    ax.bar([*latent_names(range(len(told) - 1)), "all"], told, yerr=r["prior"]["error"], capsize=3)
    ax.axhline(r["prior"]["at_most"], color="black", linestyle=":")
    ax.set(ylabel="nats", title="what latents tell of u;\ndotted: all there is to tell")
    return figure


def draw_fit(r):
    """Up to 40 latents in units of p(z|u), beside the normal curve that they should follow."""
    figure, panels = idiff.panels(r["arrays"]["fit"].T[:40])
    w = np.linspace(-5, 5, 101)
    for i, (z, ax) in enumerate(panels):
        ax.hist(z.clip(-5, 5), w[::4], density=True)
        ax.plot(w, np.exp(-w**2 / 2) / np.sqrt(2 * np.pi), "k")
        ax.set(yticks=[], xlabel=f"z{i}: mean {z.mean():.2f}, std {z.std():.2f}")
    figure.suptitle("(z - mean) / std by p(z|u), and the normal curve")
    return figure


def draw_agreement(a):
    """|rho| between the latents of the first run and of each other run, matched ones first."""
    first, *others = a["files"]
    n = len(a["per_latent"])
    figure, panels = idiff.panels(others, (3 + 0.7 * n, 1.8 + 0.4 * n))
    for (name, ax), pair in zip(panels, a["pairs"]):
        rho = np.array(pair["rho"])
        i, j = pair["matched"]
        rows = [*i, *np.delete(np.arange(n), i)]
        columns = [*j, *np.delete(np.arange(rho.shape[1]), j)]
        draw_matrix(ax, rho[rows][:, columns], latent_names(rows), latent_names(columns))
        ax.set(ylabel=first, xlabel=name,
               title=f"|rank correlation| of latents: agreement {pair['agreement']:.2f}")
    return figure


# ---- The command line ----

def holds(path):
    """Whether a path holds a "report", "codes" or a "checkpoint", damaged or not, by content."""
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
    except Exception as error:                   # bad JSON, or a missing entry
        reason = f"{type(error).__name__}, {in_one_line(error)}"
        raise ValueError(f"'{path}' is not a report of evaluate.py, or is damaged: {reason}. Make "
                         "it again from the checkpoint.") from None
    return result


def report_of_path(path, args, load):
    """The report of one path; it has arrays only if it was computed here."""
    kind = holds(path)
    how = dict(n=args.n, seed=args.seed, n_bins=args.n_bins, trees=not args.no_dci, name=str(path))
    if kind == "report":
        plain = build_parser().parse_args(["-"])
        plain.paths, plain.out = args.paths, args.out
        if args != plain:
            raise ValueError(f"'{path}' is a report already: --n, --generate, --n-bins, --no-dci, "
                             "--seed, --data and --device need the checkpoint.")
        return read_report(path)

    if kind == "codes":
        if args.generate or args.data:
            raise ValueError(f"'{path}' holds codes: --generate and --data need a checkpoint.")
        return report_of_codes(*read_codes(path), **how)

    device = idiff.pick_device(args.device)
    model, data = idiff.open_checkpoint(path, device, args.data, load)
    return report(model, data, generate=args.generate, **how)


def start(args):
    """Report on one path, or tables over many; returns the reports."""
    idiff.use_free_cores()
    load = lru_cache(maxsize=1)(idiff.load_data)     # one load for many checkpoints
    many = len(args.paths) > 1
    measured = [path for path in args.paths if path.exists() and holds(path) != "report"]
    if len({path.resolve().parent for path in measured}) < len(measured):
        raise ValueError("two of the paths lie in one folder, which can hold one report. Pass them "
                         "one by one, each with --out, then their metrics.json.")

    # a report on each path
    results = []
    for path in args.paths:
        folder = path.parent if many else args.out or path.parent
        if path in measured:
            idiff.try_folder(folder)
        result = report_of_path(path, args, load)
        results.append(result)
        if not many:
            print(format_report(result), flush=True)
        if "arrays" in result:                   # pictures come last: the numbers are printed
            write_report(result, folder)
            print(f"metrics.json and pictures are in {folder}")

    # what many reports have in common
    if many:
        found = agreements(results)
        text = format_tables(results) + "".join(map(format_agreement, found))
        print(text or "nothing to compare: agreement needs two checkpoints of one data set.")
        parents = [path.resolve().parent for path in args.paths]
        folder = args.out or Path(os.path.commonpath(parents))
        idiff.try_folder(folder)
        (folder / "tables.md").write_text(text, "utf-8", "replace")
        for k, each in enumerate(found):
            name = f"agreement-{k + 1}" if k else "agreement"
            (folder / f"{name}.json").write_text(json.dumps(each, indent=1) + "\n", "utf-8")
            with drawing(folder / f"{name}.png") as picture:
                draw_agreement(each).savefig(picture)
    return results


def main(argv=None):
    """Run the command line. Returns the reports, a list of dicts."""
    with idiff.script("evaluate.py", "--n"):
        return start(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
