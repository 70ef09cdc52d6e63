# SPDX-License-Identifier: MIT
"""How far the encoder itself gets: trained on the true factors, scored as evaluate.py scores.

    python tests/bench_ceiling.py
    python tests/bench_ceiling.py --steps 3000 --seeds 3

The recipe's encoder, optimiser, draws and length, but its means regress each factor's place in
[-1, 1]; no prior, decoder or U-Net. No way of learning from u alone can be asked to beat it.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import train
from idiff import Config, Encoder, load_data

def fit(data, cfg):
    """The encoder after cfg.steps steps of regression on the factors of modulated draws."""
    torch.manual_seed(cfg.seed)
    encoder, generator = Encoder(cfg), torch.Generator().manual_seed(cfg.seed + 1)
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.0)
    for step in range(cfg.steps):
        rows, _ = data.draw(cfg.batch_size, generator, cfg.u, cfg.u_scale)
        place = 2 * data.factors(rows) / (data.sizes - 1) - 1                  # (B, K)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * train.rate_share(cfg, step)
        optimizer.zero_grad()
        (encoder(data.images(rows)).mean - place).square().mean().backward()
        optimizer.step()
    return encoder

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (default: 800)")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: 1)")
    args, data, scores = parser.parse_args(argv), load_data(), []
    rows = torch.from_numpy(np.random.default_rng(0).choice(len(data), 10_000, replace=False))
    for seed in range(args.seeds):
        encoder = fit(data, Config(steps=args.steps, seed=seed))
        with torch.no_grad():
            codes = torch.cat([encoder(data.images(part)).mean for part in rows.split(500)])
        scores.append([metric(codes, data.factors(rows))
                       for metric in (evaluate.mig, evaluate.mcc, evaluate.modularity)])
        print(f"seed {seed}: MIG {scores[-1][0]:.3f}, MCC {scores[-1][1]:.3f}, modularity "
              f"{scores[-1][2]:.3f}", flush=True)
    mean, std = np.mean(scores, axis=0), np.std(scores, axis=0, ddof=len(scores) > 1)
    print("mean ± std:", ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, std)))

if __name__ == "__main__":
    main()
