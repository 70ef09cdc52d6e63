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
from collections import defaultdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
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
        help="images to encode; DCI takes 15,000 at most, the others 10,000, or all if there are "
        "more than 15,000 (default: 15000)")
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
    n_values = factors.max(axis=0) + 1           # trees in each round

    def fit(j):                                  # scikit-learn's defaults: 100 rounds, depth 3
        def tell(*_):                            # whatever it returned could end the fit
            bar.update(n_values[j])
        trees = GradientBoostingClassifier(random_state=seed)
        trees.fit(codes[:split], factors[:split, j], monitor=tell)
        accuracy = trees.score(codes[split:], factors[split:, j])
        return trees.feature_importances_, accuracy

    # factors in parallel, those of many values first, for they take longest
    jobs = [delayed(fit)(j) for j in np.argsort(-n_values)]
    with progress(None, "DCI, trees", total=100 * n_values.sum()) as bar:
        fits = Parallel(-1, prefer="threads")(jobs)
    importance = np.reshape([row for row, _ in fits], (-1, codes.shape[1])).T

    scores = dci_of_importance(importance)       # in whatever order factors come
    scores["informativeness"] = mean_of([accuracy for _, accuracy in fits], "informativeness")
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
                         "finite numbers, N at least 2, and if it has factor_names, K different "
                         "ones. Save it by np.savez.") from None
    return codes, factors, names


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


def draw_images(model, z, start):
    """{network: images (n B, C, H, W)} of codes z (n, B, D), all from one start (B, C, H, W)."""
    every = z.flatten(0, 1)
    images = {"decoder": model.decode(every).clamp(-1, 1)}
    if model.unet is not None:
        images["diffusion"] = model.sample(every, start.repeat(len(z), 1, 1, 1))
    return images


def generation(model, data, rows, codes, n, seed):
    """How well images made of the first n codes (N, D) of rows (N,) show their factors, a dict.

    Shares (K,) of factors that a classifier reads right, and errors of pixels. Edited: the latent
    that matches factor k is the next image's, the noise stays.
    """
    read, limit = train_reader(data, seed)
    y = data.factors(rows)[:, data.varied]                     # (N, K)
    pairs = zip(*match(mutual_information(codes, y)))
    y = y[:n]
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
        start = idiff.seeded_noise([seed + i for i in ids.tolist()], x.shape[1:], x.device)()
        images = draw_images(model, z[:, ids], start)
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

    # means over images: a row for the shares of each kind, one number for pixels
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
    generator = torch.Generator().manual_seed(seed)            # the CPU's: the same rows anywhere
    rows = torch.randperm(len(data), generator=generator)[:n].to(data.device)
    generator = torch.Generator(data.device).manual_seed(seed)
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

    kind = "means"
    if cfg.latent != "gaussian":
        kind = "modes"
        n_bins = max(n_bins, cfg.categories)     # a category is never merged with another
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
    n_dci = min(len(codes), N_DCI) if trees else 0
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
            "per_factor": per_factor, "n": len(codes), "n_dci": n_dci,
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
    text += idiff.table(columns) + "\n"

    # which latent found which factor
    rows = [["factor", "latent", "MI/H", "gap", "|rho|", "MCC's latent"]]
    for name, row in r["per_factor"].items():
        rows.append([name, *row.values()])
    text += idiff.table(zip(*rows)) + "\n"

    # images made of codes, as a classifier reads them
    if "generation" in r:
        made = r["generation"]
        rows = [[f"read right, n = {made['n']}", *made["accuracy"]["classifier"]]]
        for name, row in made["accuracy"].items():
            rows.append([name, *row.values()])
        pixels = [f"{name} {value:.2g}" for name, value in made["pixels"].items()]
        text += f"{idiff.table(zip(*rows))}\n{', '.join(pixels)}\n\n"
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
