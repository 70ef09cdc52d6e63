# SPDX-License-Identifier: MIT
"""How disentangled is a code? MIG (Eq. 1), MCC, DCI and modularity, with a report and pictures.

    python evaluate.py runs/NAME/ckpt.pt         # one report; many checkpoints: the paper's tables
    python evaluate.py codes.npz                 # codes of your own: arrays codes and factors

The metrics take codes (N, D) and factors (N, K), torch or numpy, as in disentanglement_lib. What is
undefined is NaN, with a warning; bad input a ValueError. One outlier squeezes a latent's bins.
MIG: Chen et al. 2018; MCC: Hyvarinen & Morioka 2016; DCI: Eastwood & Williams 2018; modularity:
Ridgeway & Mozer 2018; FactorVAE score: Kim & Mnih 2018.
"""
import argparse
import hashlib
import json
import os
import warnings
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from idiff import check_memory, load_checkpoint, load_data

load_data = lru_cache(load_data)      # one load for many checkpoints
N_SCORES, N_DCI = 10_000, 15_000      # rows of the standard; two thirds of DCI's train
NAMES = {"mig": "discrete MIG", "mcc": "Spearman MCC", "disentanglement": "disentanglement",
         "modularity": "modularity", "completeness": "completeness", "factorvae": "FactorVAE score",
         "informativeness": "informativeness", "linear_r2": "linear-probe R²"}
FOUR = list(NAMES)[:4]                # the paper's, in its order
MODELS = {"vae": "VAE", "ivae": "iVAE", "idiff": "iVAE + DDPM", "codes": "codes"}
PAPER = {                                        # Tables 2 and 3: mean ± std / max
    "VAE": "0.06 ± 0.04 / 0.14, 0.20 ± 0.13 / 0.49, 0.09 ± 0.09 / 0.26, 0.51 ± 0.25 / 0.87",
    "iVAE": "0.19 ± 0.07 / 0.34, 0.19 ± 0.09 / 0.39, 0.11 ± 0.10 / 0.30, 0.41 ± 0.12 / 0.63",
    "iVAE + DDPM": "0.16 ± 0.10 / 0.39, 0.23 ± 0.14 / 0.51, 0.13 ± 0.11 / 0.39, 0.45 ± 0.23 / 0.77",
    "all seeds": "0.26 ± 0.09 / 0.34, 0.11 ± 0.08 / 0.21, 0.13 ± 0.11 / 0.25, 0.35 ± 0.11 / 0.47",
    "best": "0.39, 0.21, 0.21, 0.39", "codes": "-, -, -, -"}

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, devices = parser.add_argument, ["cuda"] * torch.cuda.is_available() + ["cpu"]
    add("paths", nargs="+", type=Path, help="checkpoints, or .npz with arrays codes and factors")
    add("--n", type=lambda n: 10**9 if n == "all" else max(3, int(n)), default=N_DCI,
        help="images to encode, or all; of 15,000, MIG, MCC and modularity use 10,000")
    add("--no-dci", action="store_true", help="skip DCI, which takes minutes")
    add("--sampled", action="store_true", help="score samples of q(z|x) in place of its means")
    add("--seed", type=int, default=0, help="seed of rows, samples and trees")
    add("--data", help="name or path of the data, if not those the model was trained on")
    add("--device", choices=devices, default=devices[0], help="runs the encoder")
    add("--fresh", action="store_true", help="compute anew what metrics.json already holds")
    add("--out", type=Path, help="folder of the tables over many files, if not their common parent")
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

def undefined(metric, wanted):
    """NaN, and a warning that says which number is undefined and why."""
    warnings.warn(f"{metric} is undefined: it needs {wanted}.", stacklevel=3)
    return float("nan")

def mean_of(values, metric):
    """Mean over the factors that vary, those whose value is not NaN."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else undefined(metric, "a varying factor")

def mutual_information(codes, factors, n_bins=20):
    """I(z_i; y_j) in nats, (D, K), each latent in equal bins between its minimum and maximum."""
    codes, factors = as_arrays(codes, factors)
    edges = np.linspace(codes.min(axis=0), codes.max(axis=0), n_bins + 1)[:-1]   # last bin closed
    bins = np.stack([n_bins * i - 1 + np.searchsorted(edges[:, i], z, side="right")
                     for i, z in enumerate(codes.T)], axis=1)
    mi = np.zeros((codes.shape[1], factors.shape[1]))
    for j, y in enumerate(factors.T):
        shape = len(mi), n_bins, y.max() + 1
        flat = (bins * shape[2] + y[:, None]).ravel()
        p = np.bincount(flat, minlength=np.prod(shape)).reshape(shape) / len(y)
        q = p.sum(axis=2, keepdims=True) * p.sum(axis=1, keepdims=True)  # were they independent
        mi[:, j] = (p * np.log(np.divide(p, q, out=np.ones(shape), where=p > 0))).sum(axis=(1, 2))
    return np.where(mi < 1e-12, 0, mi)           # rounding residue of a dead latent is no score

def entropies(factors):
    """H(y_j) in nats, (K,), of factors re-indexed to 0, 1, ..."""
    return np.array([-(p * np.log(p)).sum() for p in (np.bincount(y) / len(y) for y in factors.T)])

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
    with np.errstate(invalid="ignore"):
        corr = np.corrcoef(ranks, rowvar=False)[:d, d:]
    return np.nan_to_num(np.abs(corr))

def match(corr):
    """Row and column indices of the one-to-one pairs with the largest sum of corr (D, K)."""
    from scipy.optimize import linear_sum_assignment
    return linear_sum_assignment(corr, maximize=True)

def mcc(codes, factors):
    """Spearman's mean correlation coefficient, in [0, 1]; low for a cyclic or unordered factor."""
    codes, factors = as_arrays(codes, factors)
    corr = correlation(codes, factors)[:, varying(factors)]
    if not corr.size:
        return undefined("MCC", "a varying factor")
    return float(corr[match(corr)].sum() / corr.shape[1])   # iVAE's code divides by min(D, K)

def modularity_of_information(mi):
    """Modularity of a matrix (D, K) of mutual information. A latent that knows nothing scores 0."""
    if mi.shape[1] < 2:
        return undefined("modularity", "two varying factors")
    live = mi.max(axis=1) > 0
    scaled = mi / np.where(live, mi.max(axis=1), 1)[:, None]
    return float(np.mean(live - (np.square(scaled).sum(axis=1) - live) / (mi.shape[1] - 1)))

def modularity(codes, factors):
    """How far each latent knows one factor only, in [0, 1]; dead ones count 0, noise about 0.65."""
    codes, factors = as_arrays(codes, factors)
    return modularity_of_information(mutual_information(codes, factors)[:, varying(factors)])

def dci_of_importance(importance):
    """Disentanglement and completeness of an importance matrix (D, K), a dict; 0 for all zeros."""
    scores = {}
    for name, r, wanted in (("disentanglement", importance, "two varying factors"),
                            ("completeness", importance.T, "two latents")):
        p = (r + 1e-11) / (r + 1e-11).sum(axis=1, keepdims=True)         # avoids 0 ln 0
        order = 1 + (p * np.log(p)).sum(axis=1) / np.log(max(p.shape[1], 2))
        scores[name] = (undefined(name, wanted) if p.shape[1] < 2 or not p.size else
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
    latent, ballots = np.zeros_like(factor), np.zeros((codes.shape[1], len(mask)))
    for j in np.unique(factor):
        votes, order = np.flatnonzero(factor == j), np.argsort(factors[:, j])
        value = rng.integers(0, factors[:, j].max() + 1, (len(votes), 1))
        first, last = (np.searchsorted(factors[order, j], value + i) for i in (0, 1))
        batches = codes[order[rng.integers(first, last, (len(votes), batch))]]
        latent[votes] = batches.var(axis=1).argmin(axis=1)
    np.add.at(ballots, (latent[:n_train], factor[:n_train]), 1)
    return float((ballots.argmax(axis=1)[latent] == factor)[n_train:].mean())

def linear_r2(codes, factors, seed=0):
    """Test R² of least squares from all latents to each factor's index, (K,); split as in DCI."""
    codes, factors = as_arrays(codes, factors)
    order, split = np.random.default_rng(seed).permutation(len(codes)), 2 * len(codes) // 3
    x, y = np.insert(codes - codes.mean(axis=0), 0, 1, axis=1)[order], factors[order]
    error = (y - x @ np.linalg.lstsq(x[:split], y[:split], rcond=None)[0])[split:]
    total = y[split:].var(axis=0)
    return 1 - np.square(error).mean(axis=0) / np.where(total > 0, total, np.nan)

# ---- Codes of a checkpoint or a file ----
@torch.no_grad()
def encode(model, data, rows, args):
    """Codes as args has them, and one seeded sample of q(z|x), of the images in rows: (N, D)."""
    generator, parts = torch.Generator(data.device).manual_seed(args.seed), []
    for part in tqdm(rows.split(500), "encoding, 500 images each", disable=None, leave=False):
        mean, logvar = model.encode(data.images(part))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        parts.append(torch.stack([mean, mean + (0.5 * logvar).exp() * noise]).double().cpu())
    mean, sample = torch.cat(parts, dim=1).numpy()
    return sample if args.sampled else mean, sample

def of_checkpoint(path, args):
    """Codes, samples and factors of random images; those of modulated draws and u's own code."""
    model = load_checkpoint(path, args.device)
    data = load_data(args.data or str(model.info.get("data_arg", f"that of {path}")), args.device)
    n, cfg = min(args.n, len(data)), model.cfg
    rows = torch.from_numpy(np.random.default_rng(args.seed).choice(len(data), n, replace=False))
    drawn, u = data.draw(min(n, N_SCORES), torch.Generator(data.device).manual_seed(args.seed),
                         cfg.u, cfg.u_scale)
    rows = torch.cat([rows.to(data.device), drawn])
    codes, samples = encode(model, data, rows, args)
    factors, u = data.factors(rows).cpu().numpy(), u.cpu().numpy()
    u = u[:, u.shape[1] // 2:] if cfg.u == "mean+var" else u   # the centres, or the log-scales
    return {"codes": codes[:n], "samples": samples[:n], "factors": factors[:n],
            "names": data.factor_names, "draws": {"encoder_on_draws": (codes[n:], factors[n:]),
                                                  "u_on_draws": (u, factors[n:])},
            "info": {"data": data.name, "model": cfg.model, "config": vars(cfg), "weights": "EMA",
                     "training": model.info}}

def of_npz(path, args):
    """The arrays codes and factors of an .npz, in seeded order; ValueError in one line if none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            check_memory(sum(entry.file_size for entry in file.zip.infolist()))
            codes, factors = as_arrays(file["codes"], file["factors"])
    except Exception as error:                   # of zip, pickle, key, shape: many kinds
        raise ValueError(f"'{path}' must hold arrays codes and factors: {error}") from None
    rows = np.random.default_rng(args.seed).permutation(len(codes))[:args.n]
    return {"codes": codes[rows], "samples": codes[rows], "factors": factors[rows], "draws": {},
            "names": [f"factor {j}" for j in range(factors.shape[1])],
            "info": {"data": path.name, "model": "codes", "config": None, "weights": None}}

# ---- The report ----
def four(codes, factors, matrix=None):
    """The paper's four metrics, a dict; disentanglement of DCI's matrix, NaN without one."""
    return {metric.__name__: metric(codes, factors) for metric in (mig, mcc, modularity)} | {
        "disentanglement": np.nan if matrix is None else
        dci_of_importance(matrix)["disentanglement"]}

def measure(s, args):
    """The numbers of the report, a dict, of what of_checkpoint or of_npz gives."""
    codes, factors, std = s["codes"], s["factors"], s["codes"].std(axis=0)
    active = std > 0.05 * std.max()              # a collapsed latent is not constant
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
    result = s["info"] | {key: four(*pair) for key, pair in s["draws"].items()} | {
        "metrics": dict.fromkeys(NAMES, np.nan) | scores | four(codes, factors, matrix),
        "noise_floor": four(noise, factors, floor),
        "per_factor": {name: {"latent": best[j], "mi_over_h": share[best[j], j], "gap": gap[j],
                              "rho": corr[best[j], j], "mcc_latent": pairs.get(j)}
                       for j, name in enumerate(s["names"])},
        "n": len(codes), "n_active": active.sum(), "latent_std": std, "mi_over_h": share}
    if active.any():
        result["active"] = four(codes[:, active], factors, None if args.no_dci else matrix[active])
    return result

def write_json(path, content):
    """Write content and return it as it will be read: arrays as lists, NaN as None."""
    content = json.loads(json.dumps(content, default=lambda a: getattr(a, "tolist", a.__str__)()),
                         parse_constant=lambda nan: None)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content

def report(path, args):
    """The report of one file, a dict: from its metrics.json if nothing changed, or computed."""
    if not path.is_file():
        raise SystemExit(f"evaluate.py: file not found: '{path}'. Train a model with train.py.")
    prefix = f"{path.parent}/" if path.name == "ckpt.pt" else f"{path.parent}/{path.stem}_"
    target = Path(f"{prefix}metrics.json")
    key = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "n": args.n, "seed": args.seed,
           "dci": not args.no_dci, "data": args.data, "sampled": args.sampled}
    with suppress(Exception), redirect_stdout(None):     # none yet, or too damaged to be shown
        stored = json.loads(target.read_text()) | {"file": str(path)}
        if not args.fresh and stored["key"] in (key, key | {"dci": True}):
            print_report(stored), spread([stored]), dict(stored["config"] or {})
            return stored
    s = (of_npz if path.suffix == ".npz" else of_checkpoint)(path, args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = measure(s, args)
    result |= {"file": str(path), "key": key, "codes": ("means", "samples")[args.sampled],
               "dci_learner": "scikit-learn GradientBoostingClassifier, defaults",
               "versions": {p: version(p) for p in ("numpy", "scipy", "scikit-learn", "torch")},
               "warnings": sorted({str(w.message) for w in caught})}
    for draw in (draw_latents, draw_factors, draw_information, draw_pairs):
        draw(result, s).savefig(f"{prefix}{draw.__name__.removeprefix('draw_')}.png", dpi=150)
    return write_json(target, result)

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
    columns = {"all": "metrics", f"{r['n_active']} active": "active", "noise floor": "noise_floor",
               "all, on draws": "encoder_on_draws", "u alone, on draws": "u_on_draws"}
    codes = f"{r['codes']} of q(z|x), {r['weights']} weights" if r["weights"] else "codes as given"
    print(f"{r['file']}: {MODELS[r['model']]}, {len(r['latent_std'])} latents; {r['data']}\n"
          f"{codes}, n = {r['n']:,}, seed {r['key']['seed']}\n")
    print(table([["metric", *NAMES.values()], *([title, *map(r[key].get, NAMES)]
                                                for title, key in columns.items() if key in r)]))
    print(table(zip(["factor", "latent", "MI/H", "gap", "|rho|", "MCC's latent"],
                    *([name, *row.values()] for name, row in r["per_factor"].items()))))
    print("std of the latents:", *(f"{std:.3f}" for std in r["latent_std"]),
          *(f"\nwarning: {line}" for line in r["warnings"]))

# ---- Pictures ----
def panels(n, width=3.2, height=2.5):
    """A figure and its n axes, in rows of 3, or of 5 if there are more than 6."""
    from matplotlib.figure import Figure
    columns = min(n, 3 if n <= 6 else 5)
    rows = -(-n // columns)                      # rounded up
    figure = Figure((width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, ax in enumerate(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_visible(i < n)
    return figure, axes[:n]

def colours(name, n_values):
    """A colour per value of a factor, (V, 4): a hue's own, or from dark to light."""
    from matplotlib import colormaps
    return colormaps["hsv" if "hue" in name else "viridis"](np.arange(n_values) / n_values)

def draw_latents(r, s):
    """Histograms of samples of each latent, coloured by the factor it knows most of, if any."""
    share, (figure, axes) = np.nan_to_num(r["mi_over_h"]), panels(len(r["latent_std"]))
    for i, (ax, j) in enumerate(zip(axes, share.argmax(axis=1))):
        z, y, known = s["samples"][:, i], s["factors"][:, j], share[i, j] > 0.05
        ax.hist([z[y == v] for v in range(y.max() + 1)] if known else z, stacked=True,
                bins=np.linspace(z.min(), z.max() + 1e-6, 61), histtype="stepfilled",
                color=colours(s["names"][j], y.max() + 1) if known else "0.7")
        ax.set(yticks=[], xlabel=f"z{i} sampled; {s['names'][j]}: MI/H {share[i, j]:.2f}")
    return figure

def draw_factors(r, s):
    """Share of each value of each factor, over the grid and in modulated draws if there are any."""
    figure, axes = panels(len(s["names"]))
    for j, ax in enumerate(axes):
        for i, y in enumerate([s["factors"], *(y for _, y in s["draws"].values())][:2]):
            values, counts = np.unique(y[:, j], return_counts=True)
            ax.bar(values + 0.4 * i, counts / len(y), 0.4, label=("grid", "modulated draws")[i])
        ax.set(xlabel=f"{s['names'][j]}, index", ylabel="share of images")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure

def draw_information(r, s):
    """The matrix MI/H, each factor's best latent in a box, MCC's pairs in bold."""
    share, (figure, (ax,)) = np.asarray(r["mi_over_h"]), panels(1, 1.6 + 0.9 * len(s["names"]), 4.5)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for j, row in enumerate(r["per_factor"].values()):
        for i, v in enumerate(share[:, j]):
            ax.text(j, i, f"{v:.2f}", ha="center", va="center", color="1" if v > 0.6 else "0",
                    weight="bold" if i == row["mcc_latent"] else "normal", bbox={
                        "fill": False, "ec": "tab:orange", "lw": 2 * (i == row["latent"])})
    ax.set_xticks(range(len(s["names"])), s["names"], rotation=30, ha="right")
    ax.set_yticks(range(len(share)), [f"z{i}" for i in range(len(share))])
    ax.set_title("box: best latent; bold: MCC's pair", fontsize=10)
    figure.colorbar(image, label="mutual information / entropy")
    return figure

def draw_pairs(r, s):
    """Each factor's best latent against the factor's value, medians as bars: folds, cuts show."""
    figure, axes = panels(len(s["names"]))
    for j, (ax, (name, row)) in enumerate(zip(axes, r["per_factor"].items())):
        y, z = s["factors"][:3000, j], s["codes"][:3000, row["latent"]]
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(y))
        ax.scatter(y + jitter, z, 2, colours(name, y.max() + 1)[y])
        ax.plot(np.unique(y), [np.median(z[y == v]) for v in np.unique(y)], "k_", ms=12, mew=2)
        ax.set_title(f"MI/H {row['mi_over_h']:.2f}, |ρ| {row['rho']:.2f}", fontsize=10)
        ax.set(xlabel=f"{name}, index", ylabel=f"z{row['latent']}")
    return figure

def spread(group):
    """{metric: [mean, std, max]} over reports; std with n - 1, NaN where one lacks the metric."""
    v = np.array([[r["metrics"][m] for m in NAMES] for r in group], float)
    return dict(zip(NAMES, np.transpose([v.mean(0), v.std(0, ddof=len(v) > 1), v.max(0)]).tolist()))

def write_tables(results, folder):
    """Print and write Table 2 (by model) and Table 3 (by configuration, over its seeds)."""
    models, configs, text = {}, {}, ""
    for r in results:
        config = json.dumps([r["data"], (r["config"] or {"file": r["file"]}) | {"seed": None}])
        models.setdefault(MODELS[r["model"]], []).append(r)
        configs.setdefault(config, []).append(r)
    tables = {"Table 2, mean ± std / max by model": models} | {
        f"Table 3, mean ± std / max over seeds of {group[0]['file']}": {
            "best": [max(group, key=lambda r: r["metrics"]["mig"] or 0)], "all seeds": group}
        for group in configs.values() if len(group) > 1}
    for title, columns in tables.items():
        rows = [["metric", *(NAMES[m] for m in FOUR)]]
        for name, group in columns.items():
            form = "{:.2f} ± {:.2f} / {:.2f}" if len(group) > 1 else "{:.2f}"
            texts = [form.format(*spread(group)[m]).replace("nan", "-") for m in FOUR]
            rows += [[f"{name}, n = {len(group)}", *texts], ["paper", *PAPER[name].split(", ")]]
        text += f"{title}\n\n{table(rows)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(text)
    write_json(folder / "tables.json", {title: {name: spread(group) for name, group in c.items()}
                                        for title, c in tables.items()})
    print(text)

def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        results = [report(path, args) for path in args.paths]
        folder = args.out or Path(os.path.commonpath([p.resolve().parent for p in args.paths]))
        print_report(results[0]) if len(results) == 1 else write_tables(results, folder)
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"evaluate.py: {' '.join(str(error).split())}") from None

if __name__ == "__main__":
    main()
