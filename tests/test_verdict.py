# SPDX-License-Identifier: MIT
"""What is known without factors: agreement of runs, information of u, fit and rank of p(z|u).

    python -m pytest tests/test_verdict.py
    python -m pytest tests/test_verdict.py -k agreement
"""
import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import evaluate
import train
from conftest import TINY
from idiff import Config, Gaussian, IDiff, load_checkpoint, load_data, save_checkpoint


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ---- agreement of runs ----


def test_agreement_of_monotone_images_in_another_order_is_1():
    z = normal(500, 3)
    other = np.stack([-z[:, 2]**3, np.exp(z[:, 0]), 5 - 2 * z[:, 1]], axis=1)
    found = evaluate.agreement([z, other])
    assert found["mean"]["agreement"] == found["least"] == pytest.approx(1)
    assert found["per_latent"] == pytest.approx([1, 1, 1]) and found["n"] == 500
    assert found["pairs"][0]["matched"] == [[0, 1, 2], [1, 2, 0]]
    assert found["mean"]["canonical"] < 0.99
    linear = evaluate.agreement([z, 3 - 2 * z[:, [2, 0, 1]]])
    assert linear["mean"]["canonical"] == pytest.approx(1) == linear["least"]


def test_agreement_of_turned_codes_is_that_of_45_degrees():
    """Pearson's r is 1 / sqrt 2, and of normals Spearman's is 6 / pi asin(r / 2)."""
    z = normal(20_000, 2)
    turn = np.array([[1, 1], [-1, 1]]) / math.sqrt(2)
    mean = evaluate.agreement([z, z @ turn])["mean"]
    assert mean["agreement"] == pytest.approx(6 / math.pi * math.asin(2**-1.5), abs=0.01)
    assert mean["canonical"] == pytest.approx(1) and mean["floor"] < 0.03


def test_agreement_of_unrelated_runs_is_the_floor():
    """|rho| of unrelated columns is half a normal's, sqrt(2 / (pi (N - 1))) on average."""
    mean = evaluate.agreement([normal(100, 1, seed=k) for k in range(25)])["mean"]
    floor = math.sqrt(2 / (math.pi * 99))
    assert mean["agreement"] == pytest.approx(floor, rel=0.15)
    assert mean["floor"] == pytest.approx(floor, rel=0.15)


@pytest.mark.parametrize("spare", [normal(300, 1, seed=1), np.zeros((300, 1))],
                         ids=("noise", "dead"))
def test_a_spare_latent_of_either_run_has_no_match(spare):
    z = normal(300, 3)
    more = np.hstack([spare, z])
    for codes in ([z, more], [more, z]):
        found = evaluate.agreement(codes)
        assert found["least"] == pytest.approx(3 / 4)
        assert found["mean"]["canonical"] == pytest.approx(1)
    assert found["per_latent"] == pytest.approx([0, 1, 1, 1])


def test_a_dead_latent_agrees_with_nothing():
    z = np.hstack([normal(300, 1), np.full((300, 1), 7.0)])
    found = evaluate.agreement([z, z])
    assert found["per_latent"] == pytest.approx([1, 0])
    assert found["mean"]["agreement"] == pytest.approx(1 / 2)
    assert found["mean"]["canonical"] == pytest.approx(1 / 2)


def test_of_many_runs_each_latent_has_its_least_agreement():
    """One of three runs found another latent in place of the second."""
    z = normal(300, 2)
    other = np.hstack([z[:, :1], normal(300, 1, seed=1)])
    found = evaluate.agreement([z, -z, other])
    assert [pair["runs"] for pair in found["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert found["per_latent"][0] == pytest.approx(1) and found["per_latent"][1] < 0.2
    each = [pair["agreement"] for pair in found["pairs"]]
    assert found["mean"]["agreement"] == pytest.approx(np.mean(each))
    assert found["least"] == min(each) < 0.6 and each[0] == pytest.approx(1)
    json.dumps(found, allow_nan=False)


def test_only_pairs_with_the_first_run_tell_of_its_latents():
    """Two others that are noisy, each by itself, agree least with each other."""
    z = normal(300, 1)
    found = evaluate.agreement([z, *(z + normal(300, 1, seed=k) for k in (1, 2))])
    first, second, of_others = (pair["agreement"] for pair in found["pairs"])
    assert found["least"] == of_others < min(first, second)
    assert found["per_latent"] == pytest.approx([min(first, second)])


@pytest.mark.parametrize("codes", [[normal(9, 2)], [normal(9, 2), normal(8, 2)],
                                   [normal(9, 2), np.full((9, 2), np.nan)]],
                         ids=("one", "rows", "nan"))
def test_codes_that_cannot_agree_are_told(codes):
    with pytest.raises(ValueError):
        evaluate.agreement(codes)


# ---- information of u, and what it identifies ----


def test_information_of_a_linear_gaussian_model():
    """z|u ~ N(u, s^2), u ~ N(0, 1): 1/2 log(1 + 1 / s^2) each, and their sum jointly."""
    s = torch.tensor([0.5, 1.0, 3.0])
    estimates, errors = [], []
    for seed in range(20):
        u, eps = torch.from_numpy(normal(2, 400, 3, seed=seed)).float()
        told, error = evaluate.information(u + s * eps, Normal(u, s.expand(400, 3)))
        estimates.append(told)
        errors.append(error)
    estimates = torch.stack(estimates)
    exact = 0.5 * (1 + s**-2).log()
    expected = torch.cat([exact, exact.sum()[None]])
    torch.testing.assert_close(estimates.mean(dim=0), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.stack(errors).mean(dim=0), estimates.std(dim=0), rtol=0.5,
                               atol=0.01)


def test_information_of_classes_is_their_entropy_and_without_any_0_or_less():
    label = torch.arange(600) % 5
    z = 10.0 * label[:, None] + torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    one = torch.ones(600, 1)
    told, error = evaluate.information(z, Normal(10.0 * label[:, None], one))
    assert told.tolist() == pytest.approx([math.log(5)] * 2, abs=1e-3) and (error < 1e-3).all()
    told, _ = evaluate.information(z, Normal(10.0 * label[torch.randperm(600)][:, None], one))
    assert (told < 0).all()
    told, error = evaluate.information(z, Normal(0 * z, one))
    assert told.abs().max() < 1e-5 and error.max() < 1e-5


@pytest.mark.parametrize("n_u, d, zero_means, rank, enough", [
    (10, 4, False, 8, 4),          # n k + 1 = 9 different u suffice
    (9, 4, False, 8, 4), (8, 4, False, 7, 3),
    (10, 6, False, 9, 4),          # ten classes never identify six latents of means and scales
    (10, 6, True, 6, 9), (1, 3, False, 0, 0)])
def test_as_many_directions_as_different_u_less_one(n_u, d, zero_means, rank, enough):
    mean, log_std = torch.from_numpy(normal(2, n_u, d)).float()
    found = evaluate.identifiable(Normal(mean, (0.3 * log_std).exp()), zero_means)
    assert (found["rank"], found["enough_for"]) == (rank, enough)
    assert found["wanted"] == (d if zero_means else 2 * d)
    assert (found["condition"] > 1) == (rank == found["wanted"])


def test_a_u_of_two_directions_moves_no_more_whatever_it_is_mapped_to():
    """Means are a linear map of u; scales stay, so that each latent has but one that moves."""
    u = torch.from_numpy(normal(50, 2)).float()
    mean = u @ torch.from_numpy(normal(2, 3, seed=1)).float()
    assert evaluate.identifiable(Normal(mean, torch.full((50, 3), 0.5)))["rank"] == 2
    moved = evaluate.identifiable(Normal(1e4 * mean, (0.5 * mean).exp()))
    assert 4 <= moved["rank"] <= 6                                     # units do not matter


def test_each_u_is_one_of_the_different_ones():
    """To rounding; class k of one-hot columns has the number k."""
    some = torch.tensor([[0, 2, 1], [1, 0, 0], [1, 0, 5.0]])
    u = some[torch.arange(12) % 3]
    values, number = evaluate.different(u + 1e-6 * torch.arange(12)[:, None])
    assert len(values) == 3 and torch.allclose(values[number], u)
    label = torch.tensor([3, 0, 2, 1, 3])
    assert evaluate.different(torch.eye(4)[label])[1].tolist() == label.tolist()
    values, number = evaluate.different(torch.zeros(5, 0))
    assert values.shape == (1, 0) and number.tolist() == [0] * 5


def test_a_prior_that_is_not_finite_is_told():
    p = Gaussian(torch.tensor([[0.0, np.nan], [1.0, 2.0]]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="the model is damaged"):
        evaluate.identifiable(p)


def test_information_of_signs_and_scales():
    """Latent 0 takes its sign from u, latent 1 its scale, latent 2 nothing."""
    u = torch.arange(1000) % 2 * 2.0 - 1
    eps = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([10 * u, 0 * u, 0 * u], dim=1)
    std = torch.stack([u**2, (2 * u).exp(), u**2], dim=1)
    told, _ = evaluate.information(mean + std * eps, Normal(mean, std))
    assert told[[0, 3]].tolist() == pytest.approx([math.log(2)] * 2, abs=1e-3)
    assert told[2].abs() < 1e-5 and 0.2 < told[1] < math.log(2)


def test_two_directions_of_known_condition():
    """Of the four corners of a square, sheared: singular values follow from the correlation r."""
    x, y = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1]], dtype=torch.float64)
    p = Normal(torch.zeros(4, 2).double(), torch.stack([5 + x, 5 + 0.8 * x + 0.6 * y], 1)**-0.5)
    found = evaluate.identifiable(p, zero_means=True)                  # r = 0.8
    assert found["condition"] == pytest.approx(math.sqrt(1.8 / 0.2))


@pytest.mark.parametrize("ratio, rank", [(0.02, 2), (0.005, 1)])
def test_a_direction_below_a_hundredth_of_the_largest_does_not_count(ratio, rank):
    """Of the square's corners again: for this r the ratio is sqrt((1 - r) / (1 + r))."""
    r = (1 - ratio**2) / (1 + ratio**2)
    x, y = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1]], dtype=torch.float64)
    precision = torch.stack([5 + x, 5 + r * x + (1 - r * r)**0.5 * y], dim=1)
    p = Normal(torch.zeros(4, 2).double(), precision**-0.5)
    assert evaluate.identifiable(p, zero_means=True)["rank"] == rank


# ---- reports ----


def write_data(path, seed=0, **arrays):
    """400 images whose first two pixels are all that differs, by 5 classes; and the means."""
    rng = np.random.default_rng(seed)
    label = np.arange(400) % 5
    mean = np.stack([label - 2, label * 2 % 5 - 2], axis=1) * 0.3
    images = np.full((400, 16, 16), 0.5)
    images[:, 0, :2] = ((mean + 0.1 * rng.normal(size=(400, 2))) / 2 + 0.5).clip(0, 1)
    np.savez(path, **{"images": images, "u": np.eye(5)[label]} | arrays)
    return load_data(str(path))


class Exact:
    """A model whose z are the first two pixels of an image, and whose p(z|u) is the data's own."""

    def __init__(self, data, std=0.1, q_std=1e-4):
        self.cfg = Config(model="ivae", u="own", latent_dim=2, image_size=16, image_channels=1,
                          n_factors=0, n_u=5)
        self.info, self.unet, self.std, self.q_std = {}, None, std, q_std

    def encoder(self, x):
        return Gaussian(x[:, 0, 0, :2], torch.full((len(x), 2), 2 * math.log(self.q_std)))

    def encode(self, x):
        return self.encoder(x).code()

    def decode(self, z):
        x = torch.zeros(len(z), 1, 16, 16)
        x[:, 0, 0, :2] = z
        x[:, 0, 15, 15] += 1
        return x

    def prior(self, u):
        label = u.argmax(dim=1)
        mean = torch.stack([label - 2, label * 2 % 5 - 2], dim=1) * 0.3
        return Normal(mean, torch.full_like(mean, self.std))


def test_the_report_of_an_exact_model_without_factors(tmp_path):
    """Of rows held out only: each is told its class, p(z|u) fits, images are decoded but for one
    pixel; means alone move, in 2 of 4 directions."""
    data = write_data(tmp_path / "a.npz")
    r = evaluate.report(Exact(data), data)
    prior = r["prior"]
    held_out = data.held_out
    assert prior["n"] == r["n"] == len(held_out) == 64 and "metrics" not in r
    np.testing.assert_allclose(r["arrays"]["codes"], data.images(held_out)[:, 0, 0, :2], atol=1e-6)

    _, count = np.unique(data.u[held_out].argmax(dim=1), return_counts=True)
    entropy = -(count / 64 * np.log(count / 64)).sum()
    assert prior["at_most"] == pytest.approx(entropy)
    assert prior["information"][2] == pytest.approx(entropy, abs=0.03)
    assert prior["fit_mean"] == pytest.approx([0, 0], abs=0.5)
    assert prior["fit_std"] == pytest.approx([1, 1], abs=0.3)
    assert prior["reconstruction_error"] == pytest.approx(1 / 256, rel=1e-3)
    assert (prior["different_u"], prior["rank"], prior["wanted"]) == (5, 2, 4)
    assert prior["enough_for"] == 2 and prior["condition"] is None

    # classes keep their numbers
    assert (r["arrays"]["number"] == data.u[held_out].argmax(dim=1).numpy()).all()
    text = evaluate.format_report(r)
    assert "5 different u: enough for 2 latents whose means and scales change" in text
    assert "rank 2 of 4." in text and "64 images held out" in text


def test_a_prior_that_is_too_wide_shows_in_the_fit(tmp_path):
    data = write_data(tmp_path / "a.npz")
    right, wide = (evaluate.report(Exact(data, std), data)["prior"] for std in (0.1, 0.2))
    assert 2 * np.array(wide["fit_std"]) == pytest.approx(right["fit_std"], rel=1e-3)


def test_noise_of_q_shows_in_the_fit_and_not_in_what_means_tell(tmp_path):
    """Variances add up: that of p(z|u), 0.1^2, is the unit."""
    data = write_data(tmp_path / "a.npz")
    right, noisy = (evaluate.report(Exact(data, q_std=s), data)["prior"] for s in (1e-4, 0.3))
    wanted = np.sqrt(np.square(right["fit_std"]) + 9)
    assert noisy["fit_std"] == pytest.approx(wanted, rel=0.25)
    assert noisy["information"] == pytest.approx(right["information"])


def test_a_modulated_draw_is_judged_by_its_own_u(tmp_path):
    """z is the value of each factor: within the scale about the centre that the draw's u tells."""
    y = np.stack(np.unravel_index(np.arange(400), (20, 20)), axis=1)
    images = np.full((400, 16, 16), 0.5)
    images[:, 0, :2] = y / 19
    model = Exact(write_data(tmp_path / "a.npz", images=images, u=np.zeros((400, 0)), factors=y))
    model.cfg = Config(model="ivae", latent_dim=2, image_size=16, image_channels=1, n_factors=2)

    def prior(u):
        told = model.cfg.kind_of_u.unpack(u)
        return Normal(told["centre"], told["log_scale"].exp())
    model.prior = prior
    found = evaluate.report(model, load_data(str(tmp_path / "a.npz")), trees=False)["prior"]
    assert found["fit_mean"] == pytest.approx([0, 0], abs=0.2) and max(found["fit_std"]) < 1


def write_checkpoint(folder, path, **changes):
    """An untrained model's ckpt.pt in a new folder."""
    data = load_data(str(path))
    cfg = Config(**{"model": "ivae", "u": "own", "image_size": 16, "image_channels": 1, "width": 8,
                    "unet_width": 8, "latent_dim": 3, "n_factors": len(data.varied),
                    "n_u": data.u.shape[1]} | changes)
    torch.manual_seed(cfg.seed)
    model = IDiff(cfg)
    model.info = {"data": data.name, "fingerprint": data.fingerprint, "data_arg": str(path)}
    folder.mkdir(parents=True)
    save_checkpoint(folder / "ckpt.pt", model, copy.deepcopy(model))
    return folder / "ckpt.pt"


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("u, changes", [
    ("classes", {}), ("numbers", {}), ("numbers", {"prior_mean": "zero"}),
    ("classes", {"latent": "gumbel", "categories": 4}), ("classes", {"model": "vae"}),
    (None, {"model": "vae"}), ("classes", {"latent_dim": 1})],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value or {})))
def test_every_model_without_factors_gets_a_report(tmp_path, capsys, u, changes):
    arrays = {"classes": {}, "numbers": {"u": normal(400, 2)}, None: {"u": np.zeros((400, 0))}}[u]
    write_data(tmp_path / "a.npz", **arrays)
    path = write_checkpoint(tmp_path / "run", tmp_path / "a.npz", **changes)
    [report] = evaluate.main([str(path)])
    shown = capsys.readouterr()
    assert "nats told of u" in shown.out and "missing" not in shown.err
    stored = json.loads(path.with_name("metrics.json").read_text())
    assert stored == {name: value for name, value in report.items() if name != "arrays"}
    told = stored["prior"]["information"]
    assert len(told) == report["config"]["latent_dim"] + 1
    if report["model"] == "vae":
        assert told == pytest.approx([0] * 4, abs=1e-5) and stored["prior"]["rank"] == 0
    pictures = {"latents", "information", "fit"} - ({"fit"} if "latent" in changes else set())
    assert {file.stem for file in path.parent.glob("*.png")} == pictures
    assert all(file.stat().st_size > 5000 for file in path.parent.glob("*.png"))
    evaluate.main([str(path.with_name("metrics.json"))])               # read as it is
    assert capsys.readouterr().out.strip() in shown.out


def test_a_report_with_factors_has_what_needs_none_too(tiny_run, capsys):
    """Also for u that training makes; a report that was written before is still read."""
    [report] = evaluate.main([str(tiny_run / "ckpt.pt"), "--no-dci", "--out", str(tiny_run / "v")])
    assert {"information", "fit_mean", "rank"} <= report["prior"].keys()
    assert len(report["prior"]["information"]) == 4 and report["metrics"]["mig"] is not None
    assert "24 modulated draws" in capsys.readouterr().out
    path = tiny_run / "v" / "metrics.json"
    path.write_text(json.dumps({k: v for k, v in report.items() if k not in ("prior", "arrays")}))
    evaluate.main([str(path)])
    assert "discrete MIG" in capsys.readouterr().out


# ---- many checkpoints ----


@pytest.mark.usefixtures("pictures")
def test_checkpoints_of_one_data_set_get_their_agreement(tmp_path, capsys):
    """Of rows that training never saw, by latents that differ in number; other data stay apart."""
    data = write_data(tmp_path / "a.npz")
    write_data(tmp_path / "b.npz", seed=1)
    paths = [write_checkpoint(tmp_path / "a", tmp_path / "a.npz"),
             write_checkpoint(tmp_path / "b", tmp_path / "a.npz", seed=1, latent_dim=4),
             write_checkpoint(tmp_path / "c", tmp_path / "b.npz", seed=2)]
    evaluate.main([*map(str, paths), "--out", str(tmp_path / "out")])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"tables.md", "agreement.json", "agreement.png"}
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())
    codes = [load_checkpoint(str(path)).encode(data.images(data.held_out))[0] for path in paths[:2]]
    expected = evaluate.agreement(codes)
    assert found["files"] == list(map(str, paths[:2])) and found["data"] == data.name
    assert found["mean"]["agreement"] == pytest.approx(expected["mean"]["agreement"])
    assert np.shape(found["pairs"][0]["rho"]) == (3, 4)
    text = (tmp_path / "out" / "tables.md").read_text()
    assert f"{expected['mean']['agreement']:.3f}" in text and "Table 2" not in text
    assert text in capsys.readouterr().out


def test_two_data_sets_have_an_agreement_each(tmp_path):
    for seed, name in enumerate("ab"):
        write_data(tmp_path / f"{name}.npz", seed=seed)
    paths = [write_checkpoint(tmp_path / f"{name}{seed}", tmp_path / f"{name}.npz", seed=seed)
             for name in "ab" for seed in range(2)]
    evaluate.main(list(map(str, paths)))
    assert len(re.findall("Agreement with", (tmp_path / "tables.md").read_text())) == 2
    found = [json.loads((tmp_path / name).read_text())
             for name in ("agreement.json", "agreement-2.json")]
    assert [len(each["files"]) for each in found] == [2, 2]
    assert found[0]["data"] != found[1]["data"]


def test_with_factors_agreement_stands_beside_the_tables(tmp_path):
    """Of rows held out where the model was told the data's own u, else of the report's rows."""
    label = np.arange(400) % 5
    data = write_data(tmp_path / "a.npz", factors=np.stack([label, np.arange(400) % 4], axis=1))
    for u, n in (("own", len(data.held_out)), ("mean+var", 90)):
        paths = [write_checkpoint(tmp_path / f"{u}{seed}", tmp_path / "a.npz", u=u, seed=seed)
                 for seed in range(2)]
        evaluate.main([*map(str, paths), "--no-dci", "--n", "90"])
        text = (tmp_path / "tables.md").read_text()
        assert text.index("Table 3") < text.index("Agreement with")
        assert json.loads((tmp_path / "agreement.json").read_text())["n"] == n


def test_one_encoder_agrees_with_itself_whatever_u_it_is_told(tmp_path):
    """The rows are the same for every kind of u that training makes."""
    factors = np.stack([np.arange(400) % 5, np.arange(400) % 4], axis=1)
    write_data(tmp_path / "a.npz", factors=factors)
    paths = [write_checkpoint(tmp_path / u, tmp_path / "a.npz", u=u, model="vae")
             for u in ("var", "mean+var")]
    evaluate.main([*map(str, paths), "--no-dci", "--n", "90"])
    assert json.loads((tmp_path / "agreement.json").read_text())["least"] == pytest.approx(1)


def test_reports_alone_have_no_codes_to_agree(tmp_path, capsys):
    write_data(tmp_path / "a.npz")
    path = write_checkpoint(tmp_path / "run", tmp_path / "a.npz")
    evaluate.main([str(path)])
    capsys.readouterr()
    evaluate.main([str(path.with_name("metrics.json"))] * 2)
    assert "agreement needs" in capsys.readouterr().out
    assert not (path.parent / "agreement.json").exists()


def test_training_without_factors_ends_with_the_command_of_the_verdict(tmp_path, capsys):
    write_data(tmp_path / "a.npz")
    train.main([*TINY, "--data", str(tmp_path / "a.npz"), "--model", "ivae", "--steps", "1",
                "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert f"evaluate.py {tmp_path / 'run'}/ckpt.pt" in shown and "interpolate.py" in shown
    [report] = evaluate.main([str(tmp_path / "run" / "ckpt.pt")])
    assert report["prior"]["different_u"] == 5


def test_a_model_told_another_u_is_described_without_it(tmp_path, capsys):
    """It was trained on other data: its p(z|u) cannot read these."""
    write_data(tmp_path / "a.npz")
    write_data(tmp_path / "b.npz", u=np.arange(400) % 3)
    path = write_checkpoint(tmp_path / "run", tmp_path / "a.npz")
    [report] = evaluate.main([str(path), "--data", str(tmp_path / "b.npz")])
    shown = capsys.readouterr()
    assert "prior" not in report and "active latents" in shown.out and "trained on" in shown.err
