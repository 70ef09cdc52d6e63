# SPDX-License-Identifier: MIT
"""How disentangled is a code? MIG (Eq. 1), MCC, DCI and modularity, with a report and pictures.

    python evaluate.py runs/NAME/ckpt.pt                 # a report; many: the paper's tables
    python evaluate.py runs/NAME/ckpt.pt --generate 200  # and how good generated images are

Metrics take arrays codes (N, D) and factors (N, K); what is undefined is NaN, with a warning. Chen
2018 (MIG), Hyvarinen 2016 (MCC), Eastwood 2018 (DCI), Ridgeway 2018 (modularity), Kim 2018."""
import argparse
import hashlib
import json
import os
import warnings
from collections import defaultdict
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from idiff import (Config, Encoder, invert, load_checkpoint, load_data, sample_dpmpp, seeded_noise,
                   time_grid)

load_data = lru_cache(load_data)      # one load for many checkpoints
N_SCORES, N_DCI = 10_000, 15_000      # rows of the standard; two thirds of DCI's train
NAMES = {"mig": "discrete MIG", "mcc": "Spearman MCC", "disentanglement": "disentanglement",
         "modularity": "modularity", "completeness": "completeness", "factorvae": "FactorVAE score",
         "informativeness": "informativeness", "linear_r2": "linear-probe R²"}
FOUR = list(NAMES)[:4]                # the paper's, in its order
MODELS = {"vae": "VAE", "ivae": "iVAE", "idiff": "iVAE + DDPM"}
PAPER = {                                        # Tables 2 and 3: mean ± std / max
    "VAE": "0.06 ± 0.04 / 0.14, 0.20 ± 0.13 / 0.49, 0.09 ± 0.09 / 0.26, 0.51 ± 0.25 / 0.87",
    "iVAE": "0.19 ± 0.07 / 0.34, 0.19 ± 0.09 / 0.39, 0.11 ± 0.10 / 0.30, 0.41 ± 0.12 / 0.63",
    "iVAE + DDPM": "0.16 ± 0.10 / 0.39, 0.23 ± 0.14 / 0.51, 0.13 ± 0.11 / 0.39, 0.45 ± 0.23 / 0.77",
    "all seeds": "0.26 ± 0.09 / 0.34, 0.11 ± 0.08 / 0.21, 0.13 ± 0.11 / 0.25, 0.35 ± 0.11 / 0.47",
    "best": "0.39, 0.21, 0.21, 0.39"}

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, devices = parser.add_argument, ["cuda"] * torch.cuda.is_available() + ["cpu"]
    add("paths", nargs="+", type=Path, help="checkpoints of train.py")
    add("--n", type=int, default=N_DCI, help="images to encode; MIG, MCC, modularity take 10,000")
    add("--generate", type=int, default=0, metavar="N", help="images to generate and to judge")
    add("--no-dci", action="store_true", help="skip DCI, which takes minutes")
    add("--seed", type=int, default=0, help="seed of rows, samples and trees")
    add("--data", help="name or path of the data, if not those the model was trained on")
    add("--device", choices=devices, default=devices[0], help="runs the encoder")
    add("--fresh", action="store_true", help="compute anew what metrics.json already holds")
    return parser

# ---- Metrics ----
def as_arrays(codes, factors):
    """codes as float64 (N, D), factors as int64 (N, K) re-indexed to 0, 1, ...; or ValueError."""
    codes, factors = (np.asarray(a.detach().cpu().double() if torch.is_tensor(a) else a)
                      for a in (codes, factors))
    for name, a in (("codes", codes), ("factors", factors)):
        if a.ndim != 2 or 0 in a.shape or len(a) < 2 or a.dtype.kind not in "buif":
            raise ValueError(f"{name} must be numbers, 2 rows or more; got {a.dtype} {a.shape}.")
        if not (finite := np.isfinite(a).all(axis=0)).all():
            raise ValueError(f"{name}: column {finite.argmin()} holds NaN or inf.")
    if len(codes) != len(factors):
        raise ValueError(f"{len(codes)} rows of codes, but {len(factors)} of factors.")
    labels = [np.unique(column, return_inverse=True)[1] for column in factors.T]
    return codes.astype(np.float64), np.stack(labels, axis=1)

def varying(factors):
    """Which factors take more than one value, (K,) bool; warns of each that does not."""
    for j in np.flatnonzero(np.ptp(factors, axis=0) == 0):
        warnings.warn(f"factor {j} is constant: left out of every mean.", stacklevel=3)
    return np.ptp(factors, axis=0) > 0

def mean_of(values, metric, wanted="a varying factor"):
    """Mean of the values that are not NaN; NaN and a warning if there are none."""
    values = np.asarray(values)[~np.isnan(values)]
    if not len(values):
        warnings.warn(f"{metric} is undefined: it needs {wanted}.", stacklevel=3)
    return float(values.mean()) if len(values) else float("nan")

def mutual_information(codes, factors, n_bins=20):
    """I(z_i; y_j) in nats, (D, K), each latent in equal bins between its minimum and maximum."""
    codes, factors = as_arrays(codes, factors)
    mi = np.zeros((codes.shape[1], factors.shape[1]))
    for row, z in zip(mi, codes.T):
        edges = np.linspace(z.min(), z.max(), n_bins + 1)[:-1]           # last bin closed
        bins = np.searchsorted(edges, z, side="right")[:, None] - 1
        both = bins * (factors.max(axis=0) + 1) + factors
        row[:] = entropies(bins) + entropies(factors) - entropies(both)
    return np.where(mi < 1e-12, 0, mi)           # rounding residue of a dead latent is no score

def entropies(columns):
    """H of each column of whole numbers from 0 on, in nats, (K,)."""
    from scipy.special import entr               # entr(0) is 0
    return np.array([entr(np.bincount(y) / len(y)).sum() for y in columns.T])

def mig_per_factor(codes, factors):
    """(I_1 - I_2) / H of each factor's two best latents, (K,), Eq. 1; I_2 = 0 if there is one."""
    codes, factors = as_arrays(codes, factors)
    mi = np.sort(mutual_information(np.insert(codes, 0, 0, axis=1), factors), axis=0)
    return (mi[-1] - mi[-2]) / np.where(varying(factors), entropies(factors), np.nan)

def mig(codes, factors):
    """Discrete mutual information gap, the mean of mig_per_factor, in [0, 1]."""
    return mean_of(mig_per_factor(codes, factors), "MIG")

def correlation(codes, factors):
    """|Spearman's rho|, (D, K), with average ranks for ties; 0 with a constant column."""
    from scipy.stats import rankdata
    d, ranks = np.shape(codes)[1], rankdata(np.hstack(as_arrays(codes, factors)), axis=0)
    ranks = ranks - ranks.mean(axis=0)
    ranks /= np.linalg.norm(ranks, axis=0).clip(1e-9)
    return np.abs(ranks[:, :d].T @ ranks[:, d:])

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
    return float(corr[match(corr)].sum() / corr.shape[1])   # iVAE's code divides by min(D, K)

def modularity_of_information(mi):
    """Modularity of a matrix (D, K) of mutual information. A latent that knows nothing scores 0."""
    if mi.shape[1] < 2:
        return mean_of([], "modularity", "two varying factors")
    live = mi.max(axis=1) > 0
    scaled = mi / np.where(live, mi.max(axis=1), 1)[:, None]
    return float(np.mean(live - (np.square(scaled).sum(axis=1) - live) / (mi.shape[1] - 1)))

def modularity(codes, factors):
    """How far each latent knows one factor only, in [0, 1]; dead ones 0, pure noise up to 0.7."""
    codes, factors = as_arrays(codes, factors)
    return modularity_of_information(mutual_information(codes, factors)[:, varying(factors)])

def dci_of_importance(importance):
    """Disentanglement and completeness of an importance matrix (D, K), a dict; 0 for all zeros."""
    scores = {}
    for name, r, wanted in (("disentanglement", importance, "two varying factors"),
                            ("completeness", importance.T, "two latents")):
        p = (r + 1e-11) / (r + 1e-11).sum(axis=1, keepdims=True)         # avoids 0 ln 0
        order = 1 + (p * np.log(p)).sum(axis=1) / np.log(max(p.shape[1], 2))
        scores[name] = (mean_of([], name, wanted) if p.shape[1] < 2 or not p.size else
                        float(r.sum(axis=1) / (r.sum() or 1) @ order))
    return scores

def fit_trees(codes, factors, seed=0, label=None):
    """Importance (D, K) to boosted trees, and their test accuracy (K,), per varying factor."""
    from joblib import Parallel, delayed
    from sklearn.ensemble import GradientBoostingClassifier
    codes, factors = as_arrays(codes, factors)
    order, split = np.random.default_rng(seed).permutation(len(codes)), 2 * len(codes) // 3
    codes, factors = codes[order], factors[order][:, varying(factors[order[:split]])]
    def fit(j):                                  # scikit-learn's defaults: 100 rounds, depth 3
        trees = GradientBoostingClassifier(random_state=seed).fit(codes[:split], factors[:split, j])
        return j, trees.feature_importances_, trees.score(codes[split:], factors[split:, j])
    jobs = [delayed(fit)(j) for j in np.argsort(-factors.max(axis=0, initial=0))]  # longest first
    matrix, accuracy = np.zeros((codes.shape[1], len(jobs))), np.zeros(len(jobs))
    fits = Parallel(-1, return_as="generator_unordered", prefer="threads")(jobs) if jobs else ()
    for j, *found in tqdm(fits, label, len(jobs), unit="factor", disable=not label):
        matrix[:, j], accuracy[j] = found
    return matrix, accuracy

def dci(codes, factors, seed=0):
    """Disentanglement, completeness and informativeness (mean test accuracy), a dict."""
    matrix, accuracy = fit_trees(codes, factors, seed)
    return dci_of_importance(matrix) | {"informativeness": mean_of(accuracy, "informativeness")}

def factorvae_score(codes, factors, seed=0, n_train=10_000, n_test=5_000, batch=64):
    """Accuracy of majority votes from a batch's least varying latent to the factor it shares."""
    codes, factors = as_arrays(codes, factors)
    std, mask, rng = codes.std(axis=0), varying(factors), np.random.default_rng(seed)
    codes = codes[:, std >= 0.05] / std[std >= 0.05]         # as in the library's study
    if not codes.size or not mask.any():
        return mean_of(np.zeros(mask.sum()), "FactorVAE score")
    factor = rng.choice(np.flatnonzero(mask), n_train + n_test)
    rows = [[np.flatnonzero(y == v) for v in range(y.max() + 1)] for y in factors.T]
    latent, ballots = np.zeros_like(factor), np.zeros((codes.shape[1], len(mask)))
    for vote, j in enumerate(factor):
        same = rng.choice(rows[j][rng.integers(len(rows[j]))], batch)
        latent[vote] = codes[same].var(axis=0).argmin()
    np.add.at(ballots, (latent[:n_train], factor[:n_train]), 1)
    return float((ballots.argmax(axis=1)[latent] == factor)[n_train:].mean())

def linear_r2(codes, factors, seed=0):
    """Test R² of least squares from all latents to each factor's index, (K,); split as in DCI."""
    codes, factors = as_arrays(codes, factors)
    order, split = np.random.default_rng(seed).permutation(len(codes)), 2 * len(codes) // 3
    x, y = np.insert(codes - codes.mean(axis=0), 0, 1, axis=1)[order], factors[order]
    error = np.square(y - x @ np.linalg.lstsq(x[:split], y[:split], rcond=None)[0])[split:]
    total = np.where(np.ptp(y[split:], axis=0) > 0, y[split:].var(axis=0), np.nan)
    return 1 - error.mean(axis=0) / total

# ---- Codes of a checkpoint ----
@torch.no_grad()
def encode(model, data, rows, seed):
    """Means of q(z|x) and one sample of each, of the images in rows: (N, D) twice."""
    parts = tqdm(rows.split(500), "encoding, 500 images each", disable=None, leave=False)
    parts = [torch.stack(model.encode(data.images(part))).double().cpu() for part in parts]
    mean, logvar = torch.cat(parts, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean.numpy(), (mean + (0.5 * logvar).exp() * noise).numpy()

def of_checkpoint(path, args):
    """Codes, samples and factors of random images; those of modulated draws and u's own code."""
    model = load_checkpoint(path, args.device)
    data = load_data(args.data or str(model.info.get("data_arg", f"that of {path}")), args.device)
    n, cfg = min(args.n, len(data)), model.cfg
    rows = torch.from_numpy(np.random.default_rng(args.seed).choice(len(data), n, replace=False))
    drawn, u = data.draw(min(n, N_SCORES), torch.Generator(data.device).manual_seed(args.seed),
                         cfg.u, cfg.u_scale)
    rows = torch.cat([rows.to(data.device), drawn])
    codes, samples = encode(model, data, rows, args.seed)
    factors, u = data.factors(rows).cpu().numpy(), u.cpu().numpy()
    u = u[:, u.shape[1] // 2:] if cfg.u == "mean+var" else u   # the centres, or the log-scales
    info = {"data": data.name, "model": cfg.model, "config": vars(cfg), "weights": "EMA",
            "training": model.info, "versions": {p: version(p) for p in ("torch", "scikit-learn")}}
    if args.generate:
        info["generation"] = generation(model, data, rows[:n], codes[:n], args)
    return {"codes": codes[:n], "samples": samples[:n], "factors": factors[:n], "info": info,
            "names": data.factor_names, "draws": {"encoder_on_draws": (codes[n:], factors[n:]),
                                                  "u_on_draws": (u, factors[n:])}}

# ---- Generated images ----
@lru_cache
def train_reader(data, seed, steps=600):
    """A function images -> values (B, K) of the factors that vary, and its test accuracy (K,).
    A classifier like Encoder, trained on images of data with faint noise and tested on others."""
    torch.manual_seed(seed)
    k, v = len(data.varied), max(data.factor_sizes)
    rows, n_test = torch.randperm(len(data)).to(data.device), min(len(data) // 10 + 1, 2000)
    net = Encoder(Config(image_channels=data.image_shape[0], image_size=data.image_shape[1],
                         latent_dim=(k * v + 1) // 2)).net.to(data.device)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    def logits(x):
        return net(x)[:, :k * v].view(-1, v, k)                        # (B, V values, K)
    for _ in tqdm(range(steps), "training a classifier", disable=None, leave=False):
        batch = rows[torch.randint(n_test, len(data), (128,))]
        x, y = data.images(batch), data.factors(batch)[:, data.varied]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(x + 0.1 * torch.randn_like(x)), y).backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)
    right = [logits(data.images(part)).argmax(dim=1) == data.factors(part)[:, data.varied]
             for part in rows[:n_test].split(500)]
    return lambda x: logits(x).argmax(dim=1), torch.cat(right).double().mean(dim=0)

def draw_images(model, z, x, noise):
    """Images of z (1 + K, B, D) by network, and squared errors, z[0] being the code of x."""
    images, errors = {"decoder": model.decode(z.flatten(0, 1)).clamp(-1, 1)}, {}
    if model.unet:
        images["diffusion"] = model.sample(z.flatten(0, 1), noise().repeat(len(z), 1, 1, 1))
        eps_fn, ts = model.eps_fn(z[0]), time_grid(20, model.sde).to(x)
        back = sample_dpmpp(eps_fn, invert(eps_fn, x, ts, model.sde), ts, model.sde)
        again = model.sample(z[0], noise())      # half their squared difference: the variance
        errors = {"inverted_mse": back.clamp(-1, 1) - x,
                  "std_given_z": (images["diffusion"][:len(x)] - again) / 2**0.5}
    errors |= {f"{network}_mse": image[:len(x)] - x for network, image in images.items()}
    return images, {name: error.square().flatten(1).mean(dim=1) for name, error in errors.items()}

def generation(model, data, rows, codes, args):
    """Shares (K,) of factors that a classifier reads right in images made of codes (N, D) of rows
    (N,), and pixels' errors. Edit k: the next image's latent that matches factor k, same noise."""
    (read, limit), y = train_reader(data, args.seed), data.factors(rows)[:, data.varied]
    pairs, y = zip(*match(mutual_information(codes, y))), y[:args.generate]
    z = torch.from_numpy(codes[:len(y)]).float().to(y.device).repeat(1 + y.shape[1], 1, 1)
    for i, k in pairs:
        z[1 + k, :, i] = z[0, :, i].roll(-1)                           # (1 + K, N, D)
    found, batches = defaultdict(list, classifier=[limit[None]]), torch.arange(len(y)).split(10)
    for ids in tqdm(batches, "generating, 10 images each", disable=None, leave=False):
        x = data.images(rows[ids])
        noise = seeded_noise([args.seed + i for i in ids.tolist()], x.shape[1:], x.device)
        images, errors = draw_images(model, z[:, ids], x, noise)
        for network, image in images.items():
            seen = read(image).view(len(z), len(x), -1)                # (1 + K, B, K)
            old, new = ((seen == a[ids]).double() for a in (y, y.roll(-1, 0)))
            own, edited = (a[1:].diagonal(dim1=0, dim2=2) for a in (old, new))   # (B, K)
            errors |= {network: old[0], f"{network}, z shuffled": new[0],
                       f"{network}, edited": edited,
                       f"{network}, others kept": (old[1:].sum(dim=2).T - own) / (len(z) - 2)}
        for name, value in errors.items():
            found[name].append(value)
    means = {name: torch.cat(parts).mean(dim=0) for name, parts in found.items()}
    names = [*(data.factor_names[k] for k in data.varied), "mean"]
    shares = {name: dict(zip(names, [*v, v.mean()])) for name, v in means.items() if v.dim()}
    pixels = {k: v ** (0.5 if "std" in k else 1) for k, v in means.items() if not v.dim()}
    return {"n": len(y), "accuracy": shares, "pixels": pixels}

# ---- The report ----
def four(codes, factors, matrix=None):
    """The paper's four metrics, a dict; disentanglement of DCI's matrix, NaN without one."""
    d = np.nan if matrix is None else dci_of_importance(matrix)["disentanglement"]
    return {"mig": mig(codes, factors), "mcc": mcc(codes, factors), "disentanglement": d,
            "modularity": modularity(codes, factors)}

def measure(s, args):
    """The numbers of the report, a dict, of what of_checkpoint gives."""
    codes, factors, std = s["codes"], s["factors"], s["codes"].std(axis=0)
    active = std >= 0.05 * std.max()             # a collapsed latent is not constant
    noise = np.random.default_rng(args.seed).permutation(codes)
    few, matrix, floor = (codes[:N_DCI], factors[:N_DCI], args.seed), None, None
    scores = {"factorvae": factorvae_score(*few), "linear_r2": mean_of(linear_r2(*few), "R²")}
    if not args.no_dci:
        matrix, accuracy = fit_trees(*few, "DCI")
        floor, _ = fit_trees(noise[:N_DCI], *few[1:], "DCI, noise floor")
        scores |= dci_of_importance(matrix) | {"informativeness": mean_of(accuracy, "accuracy")}
    if len(codes) <= N_DCI:
        codes, noise, factors = (a[:N_SCORES] for a in (codes, noise, factors))
    mi, corr, gap = (f(codes, factors) for f in (mutual_information, correlation, mig_per_factor))
    share, best = mi / np.where(np.isnan(gap), np.nan, entropies(factors)), mi.argmax(axis=0)
    pairs = {j: i for i, j in zip(*match(corr))}
    return s["info"] | {key: four(*pair) for key, pair in s["draws"].items()} | {
        "metrics": dict.fromkeys(NAMES, np.nan) | scores | four(codes, factors, matrix),
        "noise_floor": four(noise, factors, floor), "n_active": active.sum(), "active":
        four(codes[:, active], factors, matrix if matrix is None else matrix[active]),
        "per_factor": {name: {"latent": best[j], "mi_over_h": share[best[j], j], "gap": gap[j],
                              "rho": corr[best[j], j], "mcc_latent": pairs.get(j)}
                       for j, name in enumerate(s["names"])},
        "n": len(codes), "latent_std": std, "mi_over_h": share}

def report(path, args):
    """The report of one file, a dict: from its metrics.json if nothing changed, or computed."""
    target, content = path.with_name("metrics.json"), path.read_bytes() if path.is_file() else b""
    key = {"sha256": hashlib.sha256(content).hexdigest(), "n": args.n, "seed": args.seed,
           "dci": not args.no_dci, "data": args.data, "generate": args.generate}
    with suppress(Exception), redirect_stdout(None):     # none yet, or too damaged to be shown
        print_report(stored := json.loads(target.read_text()) | {"file": str(path)})
        spare = {"dci": args.no_dci, "generate": not args.generate}     # more than asked for
        if not args.fresh and all(spare.get(k) or stored["key"].get(k) == key[k] for k in key):
            return stored
    if args.n < 3 or args.generate < 0:
        raise ValueError(f"--n must be at least 3, --generate 0: got {args.n}, {args.generate}.")
    s = of_checkpoint(path, args)
    result = measure(s, args) | {"file": str(path), "key": key}
    for draw in (draw_latents, draw_factors, draw_information):
        draw(result, s).savefig(path.with_name(f"{draw.__name__[5:]}.png"), dpi=150)
    result = json.loads(json.dumps(result, default=lambda a: getattr(a, "tolist", a.__str__)()),
                        parse_constant=lambda nan: None)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return result

def table(columns):
    """A Markdown table, padded to be read as it is; floats with three digits, - for None."""
    padded = []
    for column in columns:
        text = ["-" if v is None else f"{v:.3f}" if type(v) is float else str(v) for v in column]
        width = max(map(len, text))
        padded.append([v.ljust(width) for v in (text[0], "-" * width, *text[1:])])
    return "".join(f"| {' | '.join(row)} |\n" for row in zip(*padded))

def print_report(r):
    """Print a report for people."""
    columns = {"codes": "metrics", f"{r['n_active']} active": "active", "noise": "noise_floor",
               "codes, on draws": "encoder_on_draws", "u alone, on draws": "u_on_draws"}
    kind = "modes (MCC by order)" if r["config"].get("latent") in ("st", "gumbel") else "means"
    print(f"{r['file']}: {MODELS[r['model']]}, {len(r['latent_std'])} latents; {r['data']}\n"
          f"{kind} of q(z|x), {r['weights']} weights, n = {r['n']:,}, seed {r['key']['seed']}\n")
    print(table([["metric", *NAMES.values()], *([title, *map(r[key].get, NAMES)]
                                                for title, key in columns.items())]))
    print(table(zip(["factor", "latent", "MI/H", "gap", "|rho|", "MCC's latent"],
                    *([name, *row.values()] for name, row in r["per_factor"].items()))))
    if made := r.get("generation"):
        rows = made["accuracy"]
        print(table(zip([f"read right, n = {made['n']}", *rows["classifier"]],
                        *([name, *row.values()] for name, row in rows.items()))))
        print(", ".join(f"{name} {v:.2g}" for name, v in made["pixels"].items()), end="\n\n")
    print("std of the latents:", *(f"{std:.3f}" for std in r["latent_std"]))

# ---- Pictures ----
def panels(n, size=(6, 1.6)):
    """A figure and its n axes, one above the other, of a size in inches."""
    from matplotlib.figure import Figure
    figure = Figure((size[0], n * size[1]), layout="constrained")
    return figure, figure.subplots(n, squeeze=False)[:, 0]

def draw_latents(r, s):
    """Histograms of samples of each latent, coloured by the factor it knows most of."""
    from matplotlib import colormaps
    share, (figure, axes) = np.nan_to_num(r["mi_over_h"]), panels(len(r["latent_std"]))
    for i, (ax, j) in enumerate(zip(axes, share.argmax(axis=1))):
        z, y = s["samples"][:, i], s["factors"][:, j]
        ax.hist([z[y == v] for v in range(y.max() + 1)], stacked=True, histtype="stepfilled",
                bins=np.linspace(z.min(), z.max() + 1e-6, 61),
                color=colormaps["hsv" if "hue" in s["names"][j] else "viridis"](
                    np.arange(y.max() + 1) / (y.max() + 1)))
        ax.set(yticks=[], xlabel=f"z{i} sampled; {s['names'][j]}: MI/H {share[i, j]:.2f}")
    return figure

def draw_factors(r, s):
    """Share of each value of each factor, over the grid and in modulated draws."""
    figure, axes = panels(len(s["names"]))
    for j, ax in enumerate(axes):
        y = [a[:, j] for a in (s["factors"], s["draws"]["u_on_draws"][1])]
        ax.hist(y, np.arange(y[0].max() + 2) - 0.5, density=True, label=("grid", "modulated draws"))
        ax.set(xlabel=f"{s['names'][j]}, index", ylabel="share", xticks=np.unique(y[0])[::2])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure

def draw_information(r, s):
    """The matrix MI/H."""
    share, (figure, (ax,)) = r["mi_over_h"], panels(1, (1.6 + 0.9 * len(s["names"]), 4.5))
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), v in np.ndenumerate(share):
        ax.text(j, i, f"{v:.2f}", ha="center", va="center", color="1" if v > 0.6 else "0")
    ax.set_xticks(range(len(s["names"])), s["names"], rotation=30, ha="right")
    ax.set(ylabel="latent", title="mutual information / entropy")
    return figure

def write_tables(results):
    """Print and write Table 2 (by model) and Table 3 (by configuration, over its seeds)."""
    models, configs, text = {}, {}, ""
    for r in results:
        models.setdefault(MODELS[r["model"]], []).append(r)
        configs.setdefault(str([r["data"], r["config"] | {"seed": None}]), []).append(r)
    tables = {"Table 2, mean ± std / max by model": models} | {
        f"Table 3, mean ± std / max over seeds of {group[0]['file']}": {
            "best": [max(group, key=lambda r: r["metrics"]["mig"] or 0)], "all seeds": group}
        for group in configs.values() if len(group) > 1}
    for title, columns in tables.items():
        rows = [["metric", *(NAMES[m] for m in FOUR)]]
        for name, group in columns.items():
            form = "{:.2f} ± {:.2f} / {:.2f}" if len(group) > 1 else "{:.2f}"
            v = np.array([[r["metrics"][m] for r in group] for m in FOUR], float)
            texts = ["-" if np.isnan(row).any() else form.format(
                row.mean(), row.std(ddof=len(row) > 1), row.max()) for row in v]
            rows += [[f"{name}, n = {len(group)}", *texts], ["paper", *PAPER[name].split(", ")]]
        text += f"{title}\n\n{table(rows)}\n"
    folder = os.path.commonpath([Path(r["file"]).resolve().parent for r in results])
    print(text, flush=True)
    Path(folder, "tables.md").write_text(text)

def main(argv=None):
    args = build_parser().parse_args(argv)
    warnings.simplefilter("once")
    try:
        results = [report(path, args) for path in args.paths]
        print_report(results[0]) if len(results) == 1 else write_tables(results)
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"evaluate.py: {' '.join(str(error).split())}") from None

if __name__ == "__main__":
    main()
