# SPDX-License-Identifier: MIT
"""The program from Python: functions of objects, classes that can be replaced, a good guest.

    python -m pytest tests/test_house.py
"""
import importlib
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

import evaluate
import idiff
import interpolate
import train
from conftest import ROOT, cut_off_after, start

SMALL = dict(width=8, unet_width=8, batch_size=8, ddpm_images=2, rec_images=4, latent_dim=3)


@pytest.fixture
def data(tiny_npz):
    return idiff.load_data(tiny_npz)


def run(data, out, steps=2, **changes):
    return train.run(train.recipe(data, steps=steps, **{**SMALL, **changes}), data, str(out))


# ---- functions of objects ----


@pytest.mark.usefixtures("pictures")
def test_a_notebook_trains_reports_and_traverses_twice_in_one_process(data, tmp_path):
    scores = []
    for name in ("a", "b"):
        model = run(data, tmp_path / name)
        assert model.info["out"] == str(tmp_path / name) and not model.training
        report = evaluate.report(model, data, trees=False)
        grids = interpolate.traverse(model, data, columns=3, steps=2)
        idiff.save_grid(tmp_path / name / "mine.png", *grids["diffusion"])
        images, rows, columns = grids["decoder"]
        assert len(images) == len(rows) * len(columns) == 9
        scores.append(report["metrics"]["mig"])
    assert scores[0] == scores[1]
    loaded, its_data = idiff.open_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert its_data.fingerprint == data.fingerprint
    again = evaluate.report(loaded, its_data, trees=False)["metrics"]["mig"]
    assert again == scores[0]


def test_a_diverged_run_in_a_loop_raises_and_the_loop_goes_on(data, tmp_path):
    ends = []
    for lr in (1e12, 2e-3):
        try:
            run(data, tmp_path / str(lr), steps=30, lr=lr, model="ivae")
            ends.append("well")
        except ValueError as error:
            ends.append(str(error))
    assert "not finite" in ends[0] and ends[1] == "well"


def test_main_returns_what_it_made(tiny_npz, tmp_path):
    argv = "--width 8 --batch-size 4 --device cpu --model ivae --steps 1".split()
    made = train.main([*argv, "--data", tiny_npz, "--out", str(tmp_path / "run")])
    assert made["out"] == str(tmp_path / "run") and made["validation"]["rec"] > 0
    [report] = evaluate.main([f"{made['out']}/ckpt.pt", "--no-dci"])
    assert 0 <= report["metrics"]["mig"] <= 1
    paths = interpolate.main([f"{made['out']}/ckpt.pt", "--columns", "2"])
    assert {path.name for path in paths} >= {"traversal_decoder.png", "true_factors.png"}


def test_a_recipe_is_made_in_the_order_that_is_written(data):
    """Size, paper, data, frozen iVAE, changes: each overrules what stands before."""
    assert train.recipe(data, "full").width == 128
    paper = train.recipe(data, "full", paper=True)
    assert (paper.batch_size, paper.width, paper.image_size) == (32, 128, 16)
    assert train.recipe(data, paper=True, batch_size=8).batch_size == 8
    ivae = idiff.IDiff(train.recipe(data, model="ivae", latent_dim=4))
    frozen = train.recipe(data, paper=True, ivae=ivae)
    assert (frozen.latent_dim, frozen.u, frozen.model) == (4, "mean+var", "idiff")
    with pytest.raises(ValueError, match="latent_dim 4, got 5"):
        train.recipe(data, ivae=ivae, latent_dim=5)


def test_a_config_of_other_data_is_refused(data, tmp_path):
    cfg = train.recipe(data, steps=1, **SMALL)
    for wrong in (dict(image_size=32), dict(n_factors=2), dict(steps=0), dict(rec_images=0)):
        with pytest.raises(ValueError, match="recipe"):
            train.run(replace(cfg, **wrong), data, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_python(data, tmp_path):
    """Two steps, and two more after a stop, are the four of one run."""
    whole = run(data, tmp_path / "whole", steps=4)
    cfg = train.recipe(data, steps=4, **SMALL)
    with cut_off_after(2):
        train.run(cfg, data, str(tmp_path / "run"), save_every=2)
    resumed = train.run(cfg, data, resume=str(tmp_path / "run" / "ckpt.pt"))
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name


def test_another_package_called_evaluate_costs_no_run(data, tmp_path, monkeypatch):
    """Hugging Face has one; a notebook may have imported it before."""
    monkeypatch.setitem(sys.modules, "evaluate", ModuleType("evaluate"))
    monkeypatch.delitem(sys.modules, "train")
    again = importlib.import_module("train")
    monkeypatch.setattr(again, "fresh_draws", lambda *_: {"elbo": 0.0, "rec": 0.0, "kl": 0.0})
    assert again.run(train.recipe(data, steps=1, **SMALL), data, str(tmp_path / "run"))


# ---- one place for each thing ----


@pytest.mark.parametrize("name", ["Encoder", "Decoder", "ScoreUNet", "VPSDE", "IDiff", "Prior",
                                  "FullPrior", "KnownPrior", "PredictResidual"])
def test_a_replaced_class_is_replaced_everywhere(data, tmp_path, monkeypatch, name):
    """In the model that trains, in the one that is returned, and in the one that is loaded."""
    mine = type("Mine", (getattr(idiff, name),), {})
    monkeypatch.setattr(idiff, name, mine)
    for names in (idiff.PRIORS, idiff.PREDICTIONS):
        for key, value in names.items():
            if value.__name__ == name:
                monkeypatch.setitem(names, key, mine)
    trained = []
    build = train.build

    def recorded(*args):
        parts = build(*args)
        trained.append(parts[0])
        return parts
    monkeypatch.setattr(train, "build", recorded)
    model = run(data, tmp_path / "run", steps=1, model="vae" if name == "Prior" else "idiff",
                prior="known" if name == "KnownPrior" else "full")
    loaded, _ = idiff.open_checkpoint(tmp_path / "run" / "ckpt.pt")
    for each in (*trained, model, loaded):
        parts = [each, each.sde, each.prediction, *each.modules()]
        assert any(type(part) is mine for part in parts)
    # and the SDE that draws times is the model's
    assert trained[0].prediction.sde is trained[0].sde


def test_a_replaced_sde_changes_the_times_of_training(data, monkeypatch):
    class Mine(idiff.VPSDE):
        beta_rise = 9.9
    cfg = train.recipe(data, steps=1, **{**SMALL, "settle": 0.0})
    before = train.draw_batch(idiff.IDiff(cfg), data, 0)[2]
    monkeypatch.setattr(idiff, "VPSDE", Mine)
    model = idiff.IDiff(cfg)
    after = train.draw_batch(model, data, 0)[2]
    torch.testing.assert_close(Mine().lam(after), idiff.VPSDE.__mro__[1]().lam(before))


def test_a_term_without_a_weight_is_told_and_one_with_it_trains(data, tmp_path, monkeypatch):
    class Mine(idiff.IDiff):
        def latent_terms(self, q, z, u):
            return {**super().latent_terms(q, z, u), "size": z.square().mean()}
    monkeypatch.setattr(idiff, "IDiff", Mine)
    with pytest.raises(ValueError, match="size.*weight"):
        run(data, tmp_path / "a", steps=1)

    class Weighed(Mine):
        def weights(self, settling=False):
            return {**super().weights(settling), "size": 2.0}
    monkeypatch.setattr(idiff, "IDiff", Weighed)
    run(data, tmp_path / "b", steps=1)
    assert json.loads((tmp_path / "b/log.jsonl").read_text().splitlines()[1])["size"] > 0


def test_another_kind_of_u_is_one_class(data, tmp_path, monkeypatch):
    """Here u tells the factors' values themselves: drawn, trained with and given to the prior."""
    class Exact(idiff.ScalesU):
        def draw(self, data, n, generator):
            rows = torch.randint(len(data), (n,), generator=generator)
            return rows, data.factors(rows).float()
    monkeypatch.setitem(idiff.U_KINDS, "exact", Exact)
    model = run(data, tmp_path / "run", steps=1, u="exact")
    assert model.cfg.u_dim == 3
    rows, u = data.draw(9, torch.Generator(), "exact")
    assert torch.equal(u, data.factors(rows).float())


def test_scales_and_centres_of_u_are_known_by_name(data):
    """They are those by which the rows were drawn."""
    drawn = {}
    modulate = data.modulate

    def recorded(s, m, generator):
        drawn.update(s=s, m=m)
        return modulate(s, m, generator)
    data.modulate = recorded
    for u, told in (("var", torch.zeros(50, 3)), ("mean+var", None)):
        cfg = train.recipe(data, u=u, u_scale=0.1, **SMALL)
        _, entries = data.draw(50, torch.Generator().manual_seed(0), u, 0.1)
        named = cfg.kind_of_u.unpack(entries)
        torch.testing.assert_close(named["log_scale"].exp(), drawn["s"])
        torch.testing.assert_close(named["centre"], drawn["m"] if told is None else told)
    assert entries.shape == (50, cfg.u_dim) and entries.abs().max() <= 1


# ---- a good guest ----


def test_importing_changes_nothing_in_the_hosts_process():
    code = ("import torch, warnings, signal\n"
            "checks = torch.distributions.Distribution._validate_args\n"
            "threads, filters = torch.get_num_threads(), list(warnings.filters)\n"
            "handler = signal.getsignal(signal.SIGINT)\n"
            "import idiff, train, evaluate, interpolate\n"
            "assert torch.distributions.Distribution._validate_args == checks\n"
            "assert torch.get_num_threads() == threads\n"
            "assert signal.getsignal(signal.SIGINT) == handler\n"
            "try:\n"
            "    torch.distributions.Normal(0.0, -1.0)\n"
            "except ValueError:\n"
            "    print('checked')\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "checked\n", done.stderr


def test_weights_start_alike_whatever_the_length():
    states = []
    for changes in ({}, {"steps": 5000}, {"epochs": 0.01}):
        torch.manual_seed(0)
        states.append(idiff.IDiff(idiff.Config(**changes)).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], weight) for name, weight in states[0].items())


@pytest.mark.parametrize("predict", ["residual", "eps"])
def test_double_stays_double_and_half_is_widened(predict):
    cfg = idiff.Config(image_size=16, width=8, unet_width=8, latent_dim=3, predict=predict)
    torch.manual_seed(0)
    model = idiff.IDiff(cfg).eval().requires_grad_(False)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z, _ = model.encode(x)
    wanted = model.decode(z)

    model.double()
    z, logvar = model.encode(x.double())
    x_hat = model.decode(z)
    drawn = model.sample(z, torch.randn(2, 3, 16, 16).double(), steps=2)
    assert {each.dtype for each in (z, logvar, x_hat, drawn)} == {torch.float64}
    assert model.prior(torch.rand(2, 12).double()).mean.dtype == torch.float64
    torch.testing.assert_close(x_hat.float(), wanted, atol=1e-5, rtol=0)

    model.bfloat16()
    z, logvar = model.encode(x)
    x_hat = model.decode(z)
    drawn = model.sample(z, torch.randn(2, 3, 16, 16), steps=2)
    assert {each.dtype for each in (z, logvar, x_hat, drawn)} == {torch.float32}
    torch.testing.assert_close(x_hat, wanted, atol=0.05, rtol=0)


def images_in_another_process(data, path):
    np.save(path, data.images(torch.arange(3)).numpy())


@pytest.mark.parametrize("name", ["file", "dsprites", "shapes3d"])
def test_data_go_to_another_process(name, data, shapes3d, tmp_path):
    if name != "file":
        data = shapes3d if name == "shapes3d" else idiff.load_data("dsprites")
    copy = pickle.loads(pickle.dumps(data))
    rows = torch.arange(0, len(data), max(1, len(data) // 7))
    assert torch.equal(copy.images(rows), data.images(rows))
    assert torch.equal(copy.factors(rows), data.factors(rows))
    if name == "file":
        process = start(images_in_another_process, data, str(tmp_path / "x.npy"))
        process.join()
        assert np.array_equal(np.load(tmp_path / "x.npy"), data.images(torch.arange(3)))


def test_a_library_is_not_told_of_flags():
    with pytest.raises(ValueError) as error:
        idiff.Config(n_factors=0)
    assert "--" not in str(error.value) and "0 factors" in str(error.value)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="32 x 48"):
        idiff.Data("mine", {"a": 2}, (1, 32, 48), lambda rows: None, "cpu")


def test_start_and_steps_of_a_sample_are_checked():
    model = idiff.IDiff(idiff.Config(image_size=16, width=8, unet_width=8, latent_dim=3)).eval()
    z = torch.zeros(2, 3)
    for start_, steps in ((torch.zeros(1, 3, 16, 16), 2), (torch.zeros(2, 3, 16, 16), 0)):
        with pytest.raises(ValueError, match="start must be"):
            model.sample(z, start_, steps)
