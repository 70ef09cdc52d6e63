# SPDX-License-Identifier: MIT
"""The evaluation script on files of codes and on tiny checkpoints: reports, tables, bad input.

    python -m pytest tests/test_evaluate.py
    python -m pytest tests/test_evaluate.py -k tables
"""
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
from idiff import Config, IDiff, save_checkpoint

SCRIPT = Path(evaluate.__file__)


def small_grid(path):
    """A data set of 240 images, 16 x 16, of 5 x 4 x 3 x 4 factor values, as an .npz."""
    factors = np.stack(np.meshgrid(*map(np.arange, (5, 4, 3, 4)), indexing="ij"), -1).reshape(-1, 4)
    images = np.zeros((240, 16, 16, 1), np.uint8)
    for image, (x, y, size, shade) in zip(images, factors):
        image[2 * x:2 * x + size + 3, 2 * y:2 * y + size + 3] = 60 + 60 * shade
    np.savez(path, images=images, factors=factors)
    return str(path)


def write_checkpoint(folder, data, **changes):
    """An untrained model's ckpt.pt in a new folder."""
    cfg = Config(**({"image_size": 16, "image_channels": 1, "n_factors": 4, "width": 8,
                     "unet_width": 8, "latent_dim": 5} | changes))
    model = IDiff(cfg)
    model.info = {"data": "grid", "data_arg": data, "step": 0}
    folder.mkdir(parents=True)
    save_checkpoint(folder / "ckpt.pt", model, copy.deepcopy(model))
    return folder / "ckpt.pt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five checkpoints: a VAE, an iVAE and three seeds of the whole model."""
    root = tmp_path_factory.mktemp("runs")
    data = small_grid(root / "grid.npz")
    return [write_checkpoint(root / f"{model}{seed}", data, model=model, seed=seed)
            for model, seed in (("vae", 0), ("ivae", 0), ("idiff", 0), ("idiff", 1), ("idiff", 2))]


@pytest.fixture
def codes_path(tmp_path):
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, size, 300) for size in (3, 4)], axis=1)
    codes = np.hstack([factors + rng.normal(0, 0.1, factors.shape), np.zeros((300, 1))])
    np.savez(tmp_path / "mine.npz", codes=codes, factors=factors)
    return tmp_path / "mine.npz"


def test_script_on_codes(codes_path):
    done = subprocess.run([sys.executable, SCRIPT, codes_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["discrete MIG", "Spearman MCC", "disentanglement", "modularity"]
    assert [done.stdout.index(name) for name in names] == sorted(map(done.stdout.index, names))
    result = json.loads((codes_path.parent / "mine_metrics.json").read_text())
    with np.load(codes_path) as file:
        order = np.random.default_rng(0).permutation(300)
        codes, factors = file["codes"][order], file["factors"][order]
    expected = {"mig": evaluate.mig(codes, factors), "mcc": evaluate.mcc(codes, factors),
                "modularity": evaluate.modularity(codes, factors), **evaluate.dci(codes, factors)}
    assert {m: result["metrics"][m] for m in expected} == pytest.approx(expected)
    assert result["n_active"] == 2 and result["active"]["modularity"] > 0.9
    assert result["noise_floor"]["disentanglement"] < 0.2 < result["metrics"]["disentanglement"]
    assert result["per_factor"]["factor 1"]["latent"] == 1
    assert (result["n"], result["key"]["seed"], result["codes"]) == (300, 0, "means")
    for picture in ("latents", "information", "pairs"):
        assert (codes_path.parent / f"mine_{picture}.png").stat().st_size > 5000


def test_report_on_a_checkpoint(runs, capsys):
    evaluate.main([str(runs[2]), "--n", "100", "--no-dci", "--fresh"])
    assert "iVAE + DDPM, 5 latents" in capsys.readouterr().out
    text = (runs[2].parent / "metrics.json").read_text()
    result = json.loads(text, parse_constant=lambda nan: pytest.fail("JSON has no NaN"))
    assert set(evaluate.NAMES) <= set(result["metrics"])
    assert result["metrics"]["disentanglement"] is None                # --no-dci: never a guess
    assert result["u_on_draws"]["mcc"] > 0.4 > result["noise_floor"]["mcc"]
    assert result["weights"] == "EMA" and result["config"]["model"] == "idiff"
    assert len(result["per_factor"]) == 4 and len(result["latent_std"]) == 5
    for picture in ("latents", "factors", "information", "pairs"):
        assert (runs[2].parent / f"{picture}.png").stat().st_size > 5000
    evaluate.main([str(runs[2]), "--n", "100", "--no-dci", "--fresh"])
    assert (runs[2].parent / "metrics.json").read_text() == text


def test_all_images_and_samples(runs):
    folder = runs[0].parent
    evaluate.main([str(runs[0]), "--n", "all", "--no-dci"])
    means = json.loads((folder / "metrics.json").read_text())
    evaluate.main([str(runs[0]), "--n", "all", "--no-dci", "--sampled"])
    samples = json.loads((folder / "metrics.json").read_text())
    assert (means["n"], means["codes"], samples["codes"]) == (240, "means", "samples")
    assert means["latent_std"] != samples["latent_std"]


def test_tables_of_many_checkpoints(runs, tmp_path, capsys):
    evaluate.main([*map(str, runs), "--n", "100", "--no-dci"])
    text = (runs[0].parents[1] / "tables.md").read_text()
    assert text in capsys.readouterr().out
    assert "Table 2" in text and "iVAE + DDPM, n = 3" in text and "0.16 ± 0.10 / 0.39" in text
    assert "Table 3" in text and "all seeds, n = 3" in text and "0.26 ± 0.09 / 0.34" in text
    scores = [json.loads(path.with_name("metrics.json").read_text())["metrics"]["mig"]
              for path in runs[2:]]
    expected = f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f} / {max(scores):.2f}"
    assert re.search(rf"discrete MIG .*{expected}", text)
    tables = json.loads((runs[0].parents[1] / "tables.json").read_text())
    assert tables["Table 2, mean ± std / max by model"]["iVAE + DDPM"]["mig"] == pytest.approx(
        [np.mean(scores), np.std(scores, ddof=1), max(scores)])
    evaluate.main([*map(str, runs[:2]), "--n", "100", "--no-dci", "--out", str(tmp_path)])
    assert "Table 3" not in (tmp_path / "tables.md").read_text()


def test_results_are_reused_until_the_checkpoint_or_a_setting_changes(tmp_path):
    data = small_grid(tmp_path / "grid.npz")
    path = write_checkpoint(tmp_path / "run", data)
    stored = path.with_name("metrics.json")

    def is_computed(*flags):
        marked = json.loads(stored.read_text()) | {"marked": True}
        stored.write_text(json.dumps(marked))
        evaluate.main([str(path), "--n", "60", "--no-dci", *flags])
        return "marked" not in json.loads(stored.read_text())

    evaluate.main([str(path), "--n", "60", "--no-dci"])
    assert not is_computed()
    assert is_computed("--seed", "1") and is_computed("--fresh")
    path.write_bytes(write_checkpoint(tmp_path / "other", data, seed=5, latent_dim=3).read_bytes())
    assert is_computed()


@pytest.mark.parametrize("name, content, message", [
    ("none.pt", None, "none.pt"), ("none.npz", None, "none.npz"),
    ("text.pt", b"hello", "text.pt"), ("text.npz", b"hello", "arrays codes"),
    ("keys.npz", {"images": np.ones((3, 2))}, "arrays codes"),
    ("nan.npz", {"codes": np.full((9, 2), np.nan), "factors": np.ones((9, 2))}, "NaN or inf"),
    ("shape.npz", {"codes": np.ones((9, 2)), "factors": np.ones(9)}, "factors must be"),
    ("rows.npz", {"codes": np.ones((9, 2)), "factors": np.ones((8, 2))}, "9 rows of codes"),
    ("empty.npz", {"codes": np.ones((0, 2)), "factors": np.ones((0, 2))}, "codes must be"),
])
def test_bad_file_is_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message) as error:
        evaluate.main([str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("codes, factors", [
    (np.zeros((40, 2)), np.arange(80).reshape(40, 2) % 4),               # all latents dead
    (np.arange(40.)[:, None], np.arange(40)[:, None] % 4),               # one latent, one factor
    (np.arange(80.).reshape(40, 2), np.ones((40, 2), int)),              # no factor varies
    (np.arange(40.)[:, None], np.arange(120).reshape(40, 3) % 5),        # fewer latents
    (0.5 + np.arange(80, dtype=np.float32).reshape(40, 2) * 1e-9, np.arange(80).reshape(40, 2) % 3),
    (np.arange(6.).reshape(3, 2), np.array([[0, 1], [1, 0], [1, 1]])),   # three rows
], ids=("dead", "one", "constant", "few", "collapsed", "rows"))
def test_ill_codes_still_give_a_report(tmp_path, capsys, codes, factors):
    np.savez(tmp_path / "ill.npz", codes=codes, factors=factors)
    evaluate.main([str(tmp_path / "ill.npz")])
    result = json.loads((tmp_path / "ill_metrics.json").read_text())
    missing = [m for m, value in result["metrics"].items() if value is None]
    assert "discrete MIG" in capsys.readouterr().out
    assert not missing or result["warnings"]


def test_wrong_data_is_one_clear_line(runs, tmp_path):
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(runs[0]), "--data", str(tmp_path / "no such data.npz")])
    assert "\n" not in str(error.value)
