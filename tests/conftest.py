# SPDX-License-Identifier: MIT
"""Shared by all tests: one CPU thread, the root on the path, a tiny data file and a tiny run."""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
from idiff import PRIORS  # noqa: E402

TINY = ("--width 8 --unet-width 8 --batch-size 4 --ddpm-images 2 --device cpu --latent-dim 3 "
        "--size small --settle 0 --log-every 1").split()


@pytest.fixture(scope="session", autouse=True)
def short_validation():
    """A run's end sees 512 draws, not 4,096."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "validate", partial(train.validate, n=512))
        yield


@pytest.fixture(scope="session")
def shapes3d():
    """The embedded replica of 3D Shapes, rendered once."""
    from idiff import load_data
    return load_data("shapes3d")


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """Path of 16x16 RGB images of three factors (4 x 3 x 2): row, column and colour of a block."""
    path = tmp_path_factory.mktemp("data") / "blocks.npz"
    factors = np.stack(np.unravel_index(np.arange(24), (4, 3, 2)), axis=1)
    images = np.zeros((24, 16, 16, 3), np.uint8)
    for image, (row, column, colour) in zip(images, factors):
        image[4 * row:4 * row + 4, 5 * column:5 * column + 5, colour] = 220
    np.savez(path, images=images, factors=factors)
    return str(path)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_npz):
    """Folder of a finished iDiff run of four steps on tiny_npz, as train.py leaves it."""
    import train
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([*TINY, "--data", tiny_npz, "--steps", "4", "--out", str(out)])
    return out


def same(a, b):
    """Whether two nested dicts and lists of tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
