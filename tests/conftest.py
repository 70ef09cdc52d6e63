# SPDX-License-Identifier: MIT
"""Shared by all tests: one CPU thread, the root on the path, a tiny data file and a tiny run."""
import multiprocessing
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")                  # of the scripts that tests start
torch.set_num_threads(1)

TINY = ("--width 8 --unet-width 8 --batch-size 4 --ddpm-images 2 --device cpu --latent-dim 3 "
        "--size small --settle 0 --unet-share 0 --log-every 1").split()


@pytest.fixture(scope="session", autouse=True)
def short_validation():
    """A run's end sees 512 draws, not 4,096; unmixing 200 codes, not 20,000."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fresh_draws", partial(train.fresh_draws, n=512))
        draw_codes = train.draw_codes
        patch.setattr(train, "draw_codes", lambda model, data, n, held_out:
                      draw_codes(model, data, min(n, 200), held_out))
        yield


@contextmanager
def without_pictures():
    """None is written, for that takes most of the time of a small run's end or report."""
    import interpolate
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **named: None)
        patch.setattr(train, "draw_samples", lambda *args: None)
        patch.setattr(interpolate, "write_gif", lambda *args: None)
        yield


@pytest.fixture
def pictures():
    """Asked for by a test that looks at pictures: its own are drawn."""


@pytest.fixture(autouse=True)
def pictures_where_asked_for(request):
    if "pictures" in request.fixturenames:
        yield
    else:
        with without_pictures():
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


def start(function, *args):
    """A process that calls a function of a module; its server has done the slow imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench_robust", "torch._dynamo", "matplotlib.figure", "optuna",
                                    "sklearn.metrics"])
    process = context.Process(target=function, args=args, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))      # the server would not know it
        process.start()
    return process


@contextmanager
def cut_off_after(step):
    """In this context a run is cut off by a full disk once its checkpoint of a step is written."""
    import idiff
    save = idiff.save_checkpoint

    def save_then_stop(path, model, ema, **state):
        save(path, model, ema, **state)
        if state["step"] == step:
            raise OSError("full")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(idiff, "save_checkpoint", save_then_stop)
        yield


def same(a, b):
    """Whether two nested dicts and lists of tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
