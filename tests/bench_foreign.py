# SPDX-License-Identifier: MIT
"""Images of somebody else's generator, Infinite dSprites: what a user who is not us would get.

    pip install idsprites
    python tests/bench_foreign.py sprites.npz
    python train.py --data sprites.npz --latent-dim 5 --model ivae

One shape, half of it black, is moved, turned, resized and coloured: five factors, which are
numbers. u names a segment, one of 40, in which each factor has a mean and a scale of its own. No
value was chosen by a result.
"""
import argparse
import colorsys

import numpy as np
from idsprites import Factors, InfiniteDSprites

NAMES = ("x", "y", "scale", "orientation", "hue")
N_SEGMENTS = 40


def draw_factors(n, rng):
    """g (N, 5) in [-1, 1] of n images in each segment, and u (N, 40), one-hot.

    Means are uniform in [-1, 1], scales log-uniform in [0.3, 1]; a value beyond 1 is drawn again.
    """
    segment = np.repeat(np.arange(N_SEGMENTS), n)
    mean = rng.uniform(-1, 1, (N_SEGMENTS, 5))[segment]
    scale = np.exp(rng.uniform(np.log(0.3), 0, (N_SEGMENTS, 5)))[segment]
    g = np.full(mean.shape, np.inf)
    while (outside := abs(g) > 1).any():
        g = np.where(outside, rng.normal(mean, scale), g)
    return g, np.eye(N_SEGMENTS, dtype=np.uint8)[segment]


def draw_images(g):
    """The images (N, 64, 64, 3) uint8 of g; orientations have a gap, so that they are in order."""
    sprites = InfiniteDSprites(img_size=64)
    shape = sprites.generate_shape()
    images = []
    for x, y, scale, turn, hue in g:
        factors = Factors(shape=shape, shape_id=0,
                          color=np.array(colorsys.hsv_to_rgb(0.35 + 0.35 * hue, 1, 1)),
                          scale=0.75 + 0.25 * scale, orientation=2.8 * turn,
                          position_x=0.5 + 0.5 * x, position_y=0.5 + 0.5 * y)
        image = sprites.draw(factors, channels_first=False)
        images.append((255 * image).round().astype(np.uint8))
    return np.stack(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the .npz file to write")
    parser.add_argument("--n", type=int, default=1000, help="images in a segment (default: 1000)")
    args = parser.parse_args()
    np.random.seed(0)                                      # the generator's shape
    g, u = draw_factors(args.n, np.random.default_rng(0))
    np.savez(args.out, images=draw_images(g), factors=g, factor_names=NAMES, u=u)


if __name__ == "__main__":
    main()
