# SPDX-License-Identifier: MIT
"""The evaluation script on tiny checkpoints: reports, generated images, tables, bad input.

    python -m pytest tests/test_evaluate.py
    python -m pytest tests/test_evaluate.py -k tables
"""
import copy
import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import idiff
from idiff import (Config, IDiff, load_checkpoint, load_data, open_checkpoint,
                   save_checkpoint)

SCRIPT = Path(evaluate.__file__)


def small_grid(path):
    """A data set of 240 images, 16 x 16, of 5 x 4 x 3 x 4 factor values, as an .npz."""
    factors = np.stack(np.meshgrid(*map(np.arange, (5, 4, 3, 4)), indexing="ij"), -1).reshape(-1, 4)
    images = np.zeros((240, 16, 16, 1), np.uint8)
    for image, (x, y, size, shade) in zip(images, factors):
        image[2 * x:2 * x + size + 3, 2 * y:2 * y + size + 3] = 60 + 60 * shade
    np.savez(path, images=images, factors=factors)
    return str(path)


def bands(path, n=240):
    """The first n of 240 images: each of four factors places a block in a band of its own."""
    factors = np.stack(np.meshgrid(*map(np.arange, (5, 4, 3, 4)), indexing="ij"), -1).reshape(-1, 4)
    images = np.zeros((240, 16, 16, 1), np.uint8)
    for image, values in zip(images, factors):
        for k, value in enumerate(values):
            image[4 * k:4 * k + 4, 3 * value:3 * value + 3] = 255
    np.savez(path, images=images[:n], factors=factors[:n])
    return load_data(str(path))


def write_checkpoint(folder, data, **changes):
    """An untrained model's ckpt.pt in a new folder."""
    cfg = Config(**({"image_size": 16, "image_channels": 1, "n_factors": 4, "width": 8,
                     "unet_width": 8, "latent_dim": 5} | changes))
    model = IDiff(cfg)
    model.info = {"data": "grid", "data_arg": data, "step": 0}
    folder.mkdir(parents=True)
    save_checkpoint(folder / "ckpt.pt", model, copy.deepcopy(model))
    return folder / "ckpt.pt"


@pytest.fixture(autouse=True)
def small_classifier(monkeypatch):
    """Fewer steps than 64 x 64 images of six factors need."""
    train = evaluate.train_reader
    monkeypatch.setattr(evaluate, "train_reader", lambda data, seed: train(data, seed, 200))
    return train


def test_metrics_are_those_of_the_means(tmp_path):
    """Not of samples of q(z|x): a user's own call of encode and mig gives the report's number."""
    path = small_grid(tmp_path / "grid.npz")
    ckpt = write_checkpoint(tmp_path / "run", path, settle=0.0)
    evaluate.main([str(ckpt), "--no-dci", "--n", "240"])
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())

    data, rows = load_data(path), torch.arange(240)
    codes, _ = load_checkpoint(str(ckpt)).encode(data.images(rows))
    mig = evaluate.mig(codes.numpy(), data.factors(rows).numpy())
    assert report["metrics"]["mig"] == pytest.approx(mig, abs=1e-9)



def test_pictures_show_modulated_draws_in_the_classes_of_the_grid(tmp_path, monkeypatch):
    """Also those of a number, which go into bins, and of values that the report's rows lack."""
    rng = np.random.default_rng(0)
    factors = np.stack([np.arange(600) % 300, np.arange(600) // 30], axis=1)
    np.savez(tmp_path / "mine.npz", images=rng.integers(0, 255, (600, 16, 16), np.uint8),
             factors=factors)
    path = write_checkpoint(tmp_path / "run", str(tmp_path / "mine.npz"), n_factors=2)
    measure, draws = evaluate.measure, {}

    def recorded(codes, factors, names, compared, *args):
        draws.update(compared)
        return measure(codes, factors, names, compared, *args)
    monkeypatch.setattr(evaluate, "measure", recorded)
    report = evaluate.report(*open_checkpoint(path), n=500, trees=False)
    s = report["arrays"]
    assert s["factors"].max() == s["drawn"][:, 0].max() == 19
    modulated = draws["u_on_draws"][1]
    for j in range(2):
        # classes rise with the values, and the same value is in the same class
        order = np.argsort(modulated[:, j], kind="stable")
        assert (np.diff(s["drawn"][order, j]) >= 0).all()
        assert len(set(zip(modulated[:, j], s["drawn"][:, j]))) == len(set(modulated[:, j]))
    axes = evaluate.draw_factors(report).axes
    assert all(axis.get_xlim()[1] > 19 for axis in axes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five checkpoints: a VAE, an iVAE and three seeds of the whole model."""
    root = tmp_path_factory.mktemp("runs")
    data = small_grid(root / "grid.npz")
    return [write_checkpoint(root / f"{model}{seed}", data, model=model, seed=seed)
            for model, seed in (("vae", 0), ("ivae", 0), ("idiff", 0), ("idiff", 1), ("idiff", 2))]


@pytest.fixture
def measured(tmp_path):
    """A function codes, factors -> the report of a file that has such codes, row by row."""
    def measured(codes, factors, *flags):
        np.savez(tmp_path / "codes.npz", codes=codes, factors=factors)
        evaluate.main([str(tmp_path / "codes.npz"), *flags])
        return json.loads((tmp_path / "metrics.json").read_text())
    return measured


@pytest.mark.usefixtures("pictures")
def test_report_on_known_codes(measured, tmp_path, capsys):
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, size, 300) for size in (3, 4)], axis=1)
    codes = np.hstack([factors + rng.normal(0, 0.1, factors.shape), np.zeros((300, 1))])
    result, shown = measured(codes, factors), capsys.readouterr().out
    names = ["discrete MIG", "Spearman MCC", "disentanglement", "modularity"]
    assert [shown.index(name) for name in names] == sorted(map(shown.index, names))
    expected = {"mig": evaluate.mig(codes, factors), "mcc": evaluate.mcc(codes, factors),
                "modularity": evaluate.modularity(codes, factors)}
    rows = np.random.default_rng(0).permutation(300)           # the report's order
    expected |= evaluate.dci(codes[rows], factors[rows])
    assert {m: result["metrics"][m] for m in expected} == pytest.approx(expected)
    assert result["noise_floor"]["mig"] < 0.05 and result["metrics"]["disentanglement"] > 0.2
    assert result["per_factor"]["factor 1"]["latent"] == 1
    assert (result["n"], result["seed"]) == (300, 0) and result["latent_std"][2] == 0
    for picture in ("latents", "factors", "information"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000


def test_script_runs_as_a_process(runs):
    done = subprocess.run([sys.executable, SCRIPT, runs[1], "--n", "60", "--no-dci"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "iVAE, 5 latents" in done.stdout, done.stderr


@pytest.mark.usefixtures("pictures")
def test_report_on_a_checkpoint(runs, capsys):
    evaluate.main([str(runs[2]), "--n", "100", "--no-dci"])
    assert "iVAE + DDPM, 5 latents" in capsys.readouterr().out
    text = (runs[2].parent / "metrics.json").read_text()
    result = json.loads(text, parse_constant=lambda nan: pytest.fail("JSON has no NaN"))
    assert set(evaluate.NAMES) <= set(result["metrics"])
    assert result["metrics"]["disentanglement"] is None                # --no-dci: never a guess
    assert result["u_on_draws"]["mcc"] > 0.4 > result["noise_floor"]["mcc"]
    assert "means of q(z|x)" in result["codes"] and result["config"]["model"] == "idiff"
    assert len(result["per_factor"]) == 4 and len(result["latent_std"]) == 5
    for picture in ("latents", "factors", "information"):
        assert (runs[2].parent / f"{picture}.png").stat().st_size > 5000
    evaluate.main([str(runs[2]), "--n", "100", "--no-dci"])
    assert (runs[2].parent / "metrics.json").read_text() == text


def test_a_terminal_that_knows_no_such_letters_still_gets_the_report(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "² läuft", small_grid(tmp_path / "grid.npz"))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    assert b"discrete MIG" in shown.getvalue() and b"? l?uft" in shown.getvalue()


@pytest.mark.usefixtures("pictures")
def test_a_picture_that_cannot_be_drawn_is_named_and_the_report_stays(tmp_path, monkeypatch,
                                                                      capsys):
    def fails(*_):
        raise RuntimeError("too many pixels")
    path = write_checkpoint(tmp_path / "run", small_grid(tmp_path / "grid.npz"))
    path.with_name("latents.png").write_text("of another report")
    monkeypatch.setattr(evaluate, "draw_latents", fails)
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    assert "latents.png is missing: too many pixels" in capsys.readouterr().err
    assert {file.name for file in path.parent.iterdir()} == {
        "ckpt.pt", "metrics.json", "factors.png", "information.png"}


def test_a_folder_that_takes_no_file_is_named_before_the_work(runs, monkeypatch):
    monkeypatch.setattr(evaluate, "encode", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit, match="/proc/self"):
        evaluate.main([str(runs[0]), "--out", "/proc/self"])


def test_ctrl_c_is_one_line_and_warnings_stay_the_hosts(runs, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "encode", pressed)
    filters = list(warnings.filters)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(runs[0])])
    assert end.value.code == "evaluate.py: stopped" and warnings.filters == filters


def test_full_memory_is_one_line_even_if_the_error_is_empty(runs, monkeypatch):
    def full(*_):
        raise MemoryError
    monkeypatch.setattr(evaluate, "encode", full)
    with pytest.raises(SystemExit, match="^evaluate.py: out of memory: .*--n"):
        evaluate.main([str(runs[0])])


def test_more_images_than_there_are(runs):
    evaluate.main([str(runs[0]), "--n", "9999", "--no-dci"])
    assert json.loads((runs[0].parent / "metrics.json").read_text())["n"] == 240


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
    evaluate.main([*map(str, runs[:2]), "--n", "100", "--no-dci"])
    assert "Table 3" not in (runs[0].parents[1] / "tables.md").read_text()


@pytest.mark.usefixtures("pictures")
def test_a_report_is_computed_of_a_checkpoint_and_read_as_it_is_of_its_json(tmp_path, capsys):
    """Another data file changes the report of the checkpoint; the JSON stays what it was."""
    data = small_grid(tmp_path / "grid.npz")
    path = write_checkpoint(tmp_path / "run", data)
    stored = path.with_name("metrics.json")
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    shown, where, _ = capsys.readouterr().out.rpartition("metrics.json and pictures are in ")
    text = stored.read_text()

    evaluate.main([str(stored)])
    assert capsys.readouterr().out == shown and where and stored.read_text() == text
    assert set(path.parent.iterdir()) == {path, stored} | {
        path.with_name(f"{name}.png") for name in ("latents", "factors", "information")}

    with np.load(data) as arrays:
        images, factors = arrays["images"], arrays["factors"]
    np.savez(data, images=images, factors=np.random.default_rng(0).permutation(factors))
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    assert capsys.readouterr().out != shown and stored.read_text() != text


@pytest.mark.parametrize("flags", ["--n 60", "--generate 3", "--no-dci", "--seed 1", "--data a.npz",
                                   "--device cpu"])
def test_a_flag_that_would_compute_is_refused_with_a_report(tmp_path, flags):
    path = write_checkpoint(tmp_path / "run", small_grid(tmp_path / "grid.npz"))
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    with pytest.raises(SystemExit, match=f"metrics.json.*{flags.split()[0]}"):
        evaluate.main([str(path.with_name("metrics.json")), *flags.split()])


@pytest.mark.usefixtures("pictures")
def test_out_takes_the_report_of_one_path_and_the_tables_of_many(runs, tmp_path):
    before = {path: sorted(path.parent.iterdir()) for path in runs}
    evaluate.main([str(runs[0]), "--n", "60", "--no-dci", "--out", str(tmp_path / "one")])
    assert (tmp_path / "one" / "metrics.json").exists() and (tmp_path / "one/latents.png").exists()
    assert sorted(runs[0].parent.iterdir()) == before[runs[0]]
    evaluate.main([*map(str, runs[:2]), "--n", "60", "--no-dci", "--out", str(tmp_path / "many")])
    assert {path.name for path in (tmp_path / "many").iterdir()} == {
        "tables.md", "agreement.json", "agreement.png"}
    assert runs[0].with_name("metrics.json").exists()


def test_codes_of_half_precision_may_be_large(tmp_path, capsys):
    """Their squares are beyond 16 bits."""
    codes = np.linspace(-60_000, 60_000, 40, dtype=np.float16).reshape(20, 2)
    np.savez(tmp_path / "codes.npz", codes=codes, factors=np.arange(20)[:, None] % 4)
    evaluate.main([str(tmp_path / "codes.npz"), "--no-dci"])
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["latent_std"] == pytest.approx(codes.astype(float).std(axis=0))


def test_codes_of_somebody_elses_model(tmp_path, capsys):
    """The metrics are those of the arrays; tables set the file beside checkpoints' reports."""
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, size, 300) for size in (3, 4)], axis=1)
    codes = np.hstack([factors + rng.normal(0, 0.1, factors.shape), np.zeros((300, 1))])
    np.savez(tmp_path / "codes.npz", codes=codes, factors=factors)
    evaluate.main([str(tmp_path / "codes.npz"), "--out", str(tmp_path / "report")])
    result = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert result["metrics"]["mcc"] == pytest.approx(evaluate.mcc(codes, factors))
    assert result["metrics"]["mig"] == pytest.approx(evaluate.mig(codes, factors))
    assert result["metrics"]["disentanglement"] > 0.5 and "u_on_draws" not in result
    assert "codes.npz" in capsys.readouterr().out
    evaluate.main([str(tmp_path / "report" / "metrics.json")] * 2)
    assert "codes, n = 2" in capsys.readouterr().out


def test_what_to_beware_of_is_told_once_and_in_plain_lines(tmp_path, capsys):
    """Though many metrics meet it, and though Python's warnings are turned off."""
    rng = np.random.default_rng(0)
    factors = np.stack([rng.uniform(size=90), np.ones(90)], axis=1)
    np.savez(tmp_path / "codes.npz", codes=factors[:, :1], factors=factors)
    warnings.simplefilter("ignore")                                    # pytest restores it
    evaluate.main([str(tmp_path / "codes.npz")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "warn" in line]
    assert sorted(lines) == sorted({
        "warning: factor 0 is a number, not a class: put into 20 equal bins, but for MCC.",
        "warning: factor 1 is constant: left out of every mean.",
        "warning: completeness is undefined: it needs two latents.",
        "warning: disentanglement is undefined: it needs two varying factors.",
        "warning: modularity is undefined: it needs two varying factors."})


@pytest.mark.parametrize("kind", [str, "S"])
def test_factors_of_codes_keep_their_names(tmp_path, capsys, kind):
    factors = np.stack(np.unravel_index(np.arange(12), (3, 4)), axis=1)
    names = np.array(["hue", "size"], kind)
    np.savez(tmp_path / "codes.npz", codes=factors + 0.5, factors=factors, factor_names=names)
    evaluate.main([str(tmp_path / "codes.npz"), "--no-dci"])
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert list(result["per_factor"]) == ["hue", "size"] and "| size " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:factor")
def test_as_many_bins_as_asked(tmp_path):
    """--n-bins is n_bins of each metric that has bins: of latents, and of factors' numbers."""
    rng = np.random.default_rng(0)
    factors = rng.uniform(-1, 1, (400, 2))
    codes = factors + rng.normal(0, 0.2, factors.shape)
    np.savez(tmp_path / "codes.npz", codes=codes, factors=factors)
    evaluate.main([str(tmp_path / "codes.npz"), "--n-bins", "5"])
    result = json.loads((tmp_path / "metrics.json").read_text())
    scores = result["metrics"]
    assert scores["mig"] == pytest.approx(evaluate.mig(codes, factors, n_bins=5))
    assert scores["modularity"] == pytest.approx(evaluate.modularity(codes, factors, n_bins=5))
    rows = np.random.default_rng(0).permutation(400)           # the report's order
    dci = evaluate.dci(codes[rows], factors[rows], n_bins=5)
    assert scores["disentanglement"] == pytest.approx(dci["disentanglement"])
    assert scores["informativeness"] == pytest.approx(dci["informativeness"])
    assert scores["mcc"] == pytest.approx(evaluate.mcc(codes, factors))
    gaps = [row["gap"] for row in result["per_factor"].values()]
    assert np.mean(gaps) == pytest.approx(scores["mig"]) and result["n_bins"] == 5


@pytest.mark.parametrize("arrays", [
    dict(codes=np.zeros((5, 2))), dict(codes=np.zeros((5, 2)), factors=np.zeros((4, 2), int)),
    dict(codes=np.full((5, 2), np.nan), factors=np.zeros((5, 2), int)),
    dict(codes=np.array([[None]] * 5), factors=np.zeros((5, 1), int)),
    dict(codes=np.zeros((5, 2)), factors=np.zeros((5, 2), int), factor_names=["a", "a"]),
    dict(codes=np.zeros((5, 2)), factors=np.zeros((5, 2), int), factor_names=["a", "b", "c"])])
def test_codes_that_are_none_are_named(tmp_path, arrays):
    np.savez(tmp_path / "codes.npz", **arrays)
    with pytest.raises(SystemExit, match="codes.npz.*codes and factors") as error:
        evaluate.main([str(tmp_path / "codes.npz")])
    assert "\n" not in str(error.value)


def test_two_files_of_one_folder_do_not_overwrite_each_others_reports(tmp_path):
    factors = np.arange(40)[:, None] % 4
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, codes=factors + 0.1, factors=factors)
    with pytest.raises(SystemExit, match="one folder.*--out"):
        evaluate.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "--no-dci"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_arrays_by_other_names_are_told_which_are_wanted(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.zeros((5, 2)), y=np.zeros((5, 2)))
    with pytest.raises(SystemExit, match="a.npz' needs the arrays codes and factors"):
        evaluate.main([str(tmp_path / "a.npz")])


def test_tables_never_mix_data_sets(runs, tmp_path, capsys):
    """A report of the same model on other data gets a table of its own."""
    evaluate.main([str(runs[2]), "--n", "60", "--no-dci"])
    result = json.loads(runs[2].with_name("metrics.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "b.json").write_text(json.dumps(result | {"data": "other"}))
    capsys.readouterr()
    evaluate.main([str(tmp_path / name) for name in ("a.json", "b.json")])
    text = capsys.readouterr().out
    assert text.count("Table 2") == 2 and "other" in text and "n = 2" not in text


@pytest.mark.parametrize("content", [None, b"hello"])
def test_bad_file_is_one_clear_line(tmp_path, content):
    if content:
        (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="bad.pt") as error:
        evaluate.main([str(tmp_path / "bad.pt")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag, value, message", [
    ("--n", "abc", "invalid int value: 'abc'"), ("--n", "2", "--n must be at least 3"),
    ("--generate", "some", "invalid int value: 'some'"),
    ("--generate", "-1", "--generate 0, --n-bins 2 to 1,000: got 15000, -1 and 20"),
    ("--n-bins", "1", "got 15000, 0 and 1."), ("--n-bins", "2000000000", "got 15000, 0 and"),
])
def test_bad_number_is_one_clear_line(runs, capsys, flag, value, message):
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(runs[1]), flag, value])
    line = capsys.readouterr().err.splitlines()[-1] if error.value.code == 2 else error.value.code
    assert message in line and "\n" not in line


@pytest.mark.parametrize("codes, factors", [
    (np.zeros((40, 2)), np.arange(80).reshape(40, 2) % 4),               # all latents dead
    (np.arange(40.)[:, None], np.arange(40)[:, None] % 4),               # one latent, one factor
    (np.arange(80.).reshape(40, 2), np.ones((40, 2), int)),              # no factor varies
    (np.arange(40.)[:, None], np.arange(120).reshape(40, 3) % 5),        # fewer latents
    (0.5 + np.arange(80, dtype=np.float32).reshape(40, 2) * 1e-9, np.arange(80).reshape(40, 2) % 3),
    (np.arange(6.).reshape(3, 2), np.array([[0, 1], [1, 0], [1, 1]])),   # three rows
], ids=("dead", "one", "constant", "few", "collapsed", "rows"))
def test_ill_codes_still_give_a_report(measured, capsys, codes, factors):
    result = measured(codes, factors)
    shown = capsys.readouterr()
    assert "discrete MIG" in shown.out
    for name, value in result["metrics"].items():
        assert value is not None or f"warning: {name} is undefined" in shown.err.lower()


def test_wrong_data_is_one_clear_line(runs, tmp_path):
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(runs[0]), "--data", str(tmp_path / "no such data.npz")])
    assert "\n" not in str(error.value)


class Renderer:
    """A model whose z are a file's factors, permuted, and whose decoder looks up their image.

    p(z|u) is as narrow as can be about the factors that u tells the centres of.
    """
    encoder = unet = None

    def __init__(self, data, permuted):
        self.data, self.permuted, rows = data, permuted, torch.arange(len(data))
        self.x, self.z = data.images(rows), data.factors(rows)[:, permuted].float()
        self.cfg = Config(image_size=16, image_channels=1, n_factors=4)

    def decode(self, z):
        return self.x[torch.cdist(z, self.z).argmin(dim=1)]

    def sample_prior(self, u):
        """z of each u's likeliest values: as often right as a draw of these could be."""
        centre = (self.cfg.kind_of_u.unpack(u)["centre"] + 1) / 2 * (self.data.sizes - 1)
        return centre.round()[:, self.permuted]


def test_generation_by_the_true_renderer(tmp_path):
    """What was asked for is read; real images are as far from others as those of the model."""
    data = bands(tmp_path / "bands.npz")
    model = Renderer(data, [2, 0, 3, 1])                                 # z's order is not theirs
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    found = evaluate.generation(model, data, rows, model.z[rows].double().numpy(), 200, 0)
    right, log_p, images = found.values()
    assert set(right) == {"classifier", "real", *(f"decoder, {kind}" for kind in
                                                  ("redrawn", "shuffled", "set"))}
    assert all(min(row.values()) > 0.9 for row in right.values())
    for name, number in images["real"].items():
        assert images["decoder, redrawn"][name] == pytest.approx(float(number), rel=1e-5)
    for kind in ("redrawn", "shuffled", "set", "p(z|u)"):
        row = images[f"decoder, {kind}"]
        assert row["nearest, median"] == row["nearest, 90 %"] == 0 and row["Laplacian"] > 0
        assert row["values"] == 1

    # the likeliest values are likelier than drawn ones, by the mean distance from the centre
    for name in data.factor_names:
        assert log_p["decoder, p(z|u)"][name] > log_p["expectation"][name] + 0.1
        assert abs(log_p["real, of u"][name] - log_p["expectation"][name]) < 0.2


@pytest.mark.parametrize("kind", ["gaps", "a draw of its own"])
def test_only_a_modulated_draw_of_a_full_grid_tells_how_likely_values_are(tmp_path, kind,
                                                                          monkeypatch):
    data = bands(tmp_path / "bands.npz", 239 if kind == "gaps" else 240)
    if kind != "gaps":
        class AnyU(idiff.CentresU):
            def draw(self, *args):
                return super().draw(*args)
        monkeypatch.setitem(idiff.U_KINDS, "mean+var", AnyU)
    model = Renderer(data, [0, 1, 2, 3])
    model.sample_prior = lambda u: model.z[:len(u)]
    codes = model.z.double().numpy()
    found = evaluate.generation(model, data, torch.arange(len(data)), codes, 20, 0)
    assert list(found) == ["read as asked, n = 20", "images, n = 20"]


def test_generation_when_z_is_ignored(tmp_path):
    """A decoder that draws one image whatever z is: all is chance, but for what it always shows."""
    data = bands(tmp_path / "bands.npz")
    model = Renderer(data, [0, 1, 2, 3])
    model.decode = lambda z: model.x[:1].expand(len(z), -1, -1, -1)
    found = evaluate.generation(model, data, torch.arange(240), model.z.double().numpy(), 240, 0)
    right, _, images = found.values()
    for kind in ("redrawn", "shuffled", "set"):
        row = right[f"decoder, {kind}"]
        assert row["all at once"] < 0.05 and sum(row.values()) / 5 < 0.35
        assert images[f"decoder, {kind}"]["Frechet"] > 2 * images["real"]["Frechet"]
    error = (model.x - model.x[:1]).square().mean()
    torch.testing.assert_close(images["decoder, redrawn"]["error"], error)
    shown = images["decoder, redrawn"]
    assert shown["values"] == pytest.approx(4 / data.sizes.sum().item())
    pairs = [a * b for k, a in enumerate(data.factor_sizes) for b in data.factor_sizes[:k]]
    assert shown["pairs"] == pytest.approx(6 / sum(pairs))


def test_a_frechet_distance_is_that_of_gaussians():
    """Means apart by m, standard deviations s and 1: m^2 + (s - 1)^2 a feature, over a variance of
    1. Turning both changes nothing; copies are at 0, also where rows are fewer than features."""
    rng = np.random.default_rng(0)
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(3, 3)))[0])
    b = torch.from_numpy(rng.normal(size=(40_000, 3)))
    a = torch.from_numpy(rng.normal(size=(40_000, 3))) * torch.tensor([2.0, 1.0, 0.5]) + 3
    want = (3 * 9 + 1 + 0 + 0.25) / 3
    a, b = a[:4000], b[:4000]
    assert evaluate.frechet(a, b).item() == pytest.approx(want, rel=0.03)
    assert evaluate.frechet(a @ turn, b @ turn).item() == pytest.approx(
        evaluate.frechet(a, b).item(), rel=1e-6)
    few = torch.from_numpy(rng.normal(size=(20, 64)))
    assert abs(evaluate.frechet(few, few.flip(0)).item()) < 1e-9


def test_chances_given_u_are_those_of_the_draw(shapes3d):
    generator = torch.Generator().manual_seed(0)
    log_scale = torch.tensor([[-1.0, -0.2, -0.5, -1.2, 0.0, -0.7]])
    centre = torch.tensor([[0.3, -1.0, 0.9, 0.0, 0.5, -0.4]])
    chances = evaluate.chances_given_u(shapes3d, log_scale, centre)
    n = 20_000
    rows = shapes3d.modulate(log_scale.exp().expand(n, -1), centre.expand(n, -1), generator)
    y = shapes3d.factors(rows)
    for k, size in enumerate(shapes3d.factor_sizes):
        share = torch.bincount(y[:, k], minlength=15) / n
        torch.testing.assert_close(chances.probs[0, k], share, atol=0.015, rtol=0)
        assert chances.probs[0, k, size:].sum() == 0
    drawn = chances.log_prob(y).mean(dim=0)
    torch.testing.assert_close(drawn, -chances.entropy()[0], atol=0.03, rtol=0)


def test_codes_of_values_are_medians_and_lie_between_them():
    values = np.array([2, 2, 2, 5, 5, 9])
    codes = np.array([0.0, 1.0, 50.0, -3.0, -5.0, 8.0])
    found = evaluate.codes_of_values([2, 5, 9, 3.5], codes, values)
    assert found.tolist() == [1, -4, 8, -1.5]


def test_codes_are_recombined_and_set_by_the_values_that_they_come_with():
    """Shuffled latents keep the codes of some row, set ones get the median of its value."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, (300, 2))
    noise = rng.uniform(-0.4, 0.4, (300, 3))
    codes = noise + np.stack([10 * y[:, 1], y[:, 0], 0 * y[:, 0]], axis=1)
    kinds = evaluate.recombined(codes, y, 200, seed=0)
    assert (kinds["redrawn"][0] == codes[:200]).all() and (kinds["redrawn"][1] == y[:200]).all()

    (shuffled, wanted), (moved, of_set) = kinds["shuffled"], kinds["set"]
    assert all(np.isin(shuffled[:, i], codes[:, i]).all() for i in range(3))
    assert (shuffled.round()[:, :2] == wanted[:, ::-1] * [10, 1]).all() and (wanted == of_set).all()
    assert len(np.unique(shuffled[:, 0])) > 50 and len(np.unique(moved[:, 0])) == 3
    for value in range(3):
        median = np.median(codes[y[:, 1] == value, 0])
        assert moved[wanted[:, 1] == value, 0] == pytest.approx(median)
    assert (moved[:, 2] == shuffled[:, 2]).all()           # it matches no factor


@pytest.mark.parametrize("model", ["ivae", "idiff"])
def test_generate_flag(tmp_path, capsys, monkeypatch, small_classifier, model):
    """A partial grid with a constant factor; all that was named is reported and repeats."""
    monkeypatch.setattr(evaluate, "train_reader",              # what it reads does not matter here
                        lambda data, seed: small_classifier(data, seed, 10))
    with np.load(small_grid(tmp_path / "grid.npz")) as file:
        images, factors = file["images"][::2], np.insert(file["factors"], 1, 7, axis=1)[::2]
    np.savez(tmp_path / "mine.npz", images=images, factors=factors)
    path = write_checkpoint(tmp_path / "run", str(tmp_path / "mine.npz"), model=model, n_factors=5)
    content = torch.load(path, weights_only=True)
    content["config"]["n_factors"] = 4
    flags = [str(path), "--n", "60", "--no-dci", "--generate", "12"]
    evaluate.main(flags)
    assert "decoder, shuffled" in capsys.readouterr().out
    text = path.with_name("metrics.json").read_text()
    made = json.loads(text)["generation"]
    right, *_, images = made.values()
    networks = ["decoder"] + ["diffusion"] * (model == "idiff")
    kinds = ["redrawn", "shuffled", "set"]
    asked = [f"{network}, {kind}" for network in networks for kind in kinds]
    assert set(right) == {"classifier", "real", *asked}
    names = ["factor 0", "factor 2", "factor 3", "factor 4", "all at once"]
    assert all(list(row) == names for row in right.values())
    assert "read as asked, n = 12" in made
    assert {"real", *asked} <= set(images)
    evaluate.main([*flags])
    assert path.with_name("metrics.json").read_text() == text


def test_without_factors_the_distance_of_the_encoders_features_is_all(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", images=rng.integers(0, 256, (80, 16, 16), np.uint8),
             u=np.eye(4)[rng.integers(0, 4, 80)])
    data = load_data(str(tmp_path / "mine.npz"))
    torch.manual_seed(0)
    model = IDiff(Config(model="ivae", image_size=16, image_channels=1, n_factors=0, n_u=4, u="own",
                         width=8, latent_dim=2)).eval().requires_grad_(False)
    rows = torch.arange(80)
    codes = model.encode(data.images(rows))[0].double().numpy()
    found = evaluate.generation(model, data, rows, codes, 30, 0)
    assert list(found) == ["images, n = 30"]
    [images] = found.values()
    assert all(row["Frechet"] > 0 and len(row) == 2 for row in images.values())
    assert set(images) == {"real", "real, of u", "decoder, redrawn", "decoder, shuffled",
                                    "decoder, p(z|u)"}
    assert "Frechet" in evaluate.format_generation(found)


def test_blur_and_grain_show_where_a_wrong_geometry_does_not(shapes3d):
    """Judges of generated images: blur lowers the Laplacian, grain raises it, both are far from any
    image; an image of another geometry is as good as one of the data."""
    rows = torch.tensor([5, 100_000, 321_000])
    x, other = shapes3d.images(rows), shapes3d.images(rows // 480 * 480 + 77)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    grainy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = shapes3d.factors(rows)
    near = [evaluate.nearest_error(im, shapes3d, y) for im in (x, other, blurred, grainy)]
    assert (near[0] == 0).all() and (near[1] == 0).all()
    assert (near[2] > 1e-4).all()
    torch.testing.assert_close(near[3], torch.full((3,), 0.01), rtol=0.1, atol=0)
    sharp = evaluate.laplacian(x)
    assert (evaluate.laplacian(blurred) < 0.7 * sharp).all()
    assert (evaluate.laplacian(grainy) > 1.5 * sharp).all()


# ---- which data ----


def test_data_are_found_beside_the_checkpoint_and_else_both_are_named(tmp_path, monkeypatch):
    data = small_grid(tmp_path / "grid.npz")
    path = write_checkpoint(tmp_path / "run", data)
    (tmp_path / "grid.npz").rename(tmp_path / "run" / "grid.npz")
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    (tmp_path / "run" / "grid.npz").unlink()
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(path), "--n", "60", "--no-dci"])
    text = str(error.value)
    assert "--data" in text and str(path) in text and data in text and "\n" not in text

    # another file has taken its place: both are named, too
    (tmp_path / "grid.npz").write_text("not an archive")
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(path), "--n", "60", "--no-dci"])
    text = str(error.value)
    assert str(path) in text and data in text and "\n" not in text


def test_other_data_than_trained_on_are_told_in_a_line_and_never_share_a_column(tmp_path, capsys):
    data = small_grid(tmp_path / "grid.npz")
    path = write_checkpoint(tmp_path / "run", data)
    content = torch.load(path, weights_only=True)
    content["info"] |= {"fingerprint": load_data(data).fingerprint, "data": load_data(data).name}
    torch.save(content, path)
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    assert "warning" not in capsys.readouterr().err
    first = path.with_name("metrics.json").rename(tmp_path / "a.json")

    with np.load(data) as arrays:
        np.savez(data, images=arrays["images"], factors=arrays["factors"][::-1])
    evaluate.main([str(path), "--n", "60", "--no-dci"])
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1 and "trained on" in told[0] and "ckpt.pt" in told[0]
    reports = [json.loads(name.read_text()) for name in (first, path.with_name("metrics.json"))]
    assert reports[0]["fingerprint"] != reports[1]["fingerprint"]
    evaluate.main([str(first), str(path.with_name("metrics.json"))])
    text = capsys.readouterr().out
    assert text.count("Table 2") == 2 and "n = 2" not in text
