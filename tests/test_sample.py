# SPDX-License-Identifier: MIT
"""New images: drawn from u, from shuffled latents, with a factor set; and p(z|u) that fits.

    python -m pytest tests/test_sample.py
"""
import numpy as np
import pytest
import torch
from PIL import Image

import idiff
import interpolate
import train
from conftest import TINY
from test_interpolate import drawn, refusal, write_checkpoint          # noqa: F401

FAST = ["--columns", "2", "--steps", "2"]


@pytest.fixture
def classes_npz(tmp_path):
    """Path of 120 images in three classes: a block in one of three columns; u is the class."""
    label = np.arange(120) % 3
    images = np.zeros((120, 16, 16, 3), np.uint8)
    for image, k in zip(images, label):
        image[4:9, 5 * k:5 * k + 5] = 255
    np.savez(tmp_path / "classes.npz", images=images, u=np.eye(3)[label])
    return str(tmp_path / "classes.npz")


def knows(data, model):
    """What survey gives of a model whose latents 0 and 1 are 2 g + 1 of factors 1 and 0."""
    rows = torch.arange(len(data))
    y = data.factors(rows)
    codes = torch.stack([2.0 * y[:, 1] + 1, 2.0 * y[:, 0] + 1, torch.randn(len(data))], dim=1)
    return rows, codes, {1: "z1 · factor 0", 0: "z0 · factor 1", 2: "z2"}


# ---- z from u ----


@pytest.mark.parametrize("u", ["var", "mean+var"])
def test_u_is_packed_as_it_is_unpacked(shapes3d, u):
    """Scales and centres by name make the u again; one centre changed changes one entry."""
    kind = idiff.Config(u=u).kind_of_u
    _, entries = shapes3d.draw(50, torch.Generator().manual_seed(0), u)
    told = kind.unpack(entries)
    torch.testing.assert_close(kind.pack(**told), entries)
    if u == "mean+var":
        told["centre"] = told["centre"].clone()
        told["centre"][:, 3] = 1.0
        changed = (kind.pack(**told) - entries).abs() > 1e-6
        assert changed.any(dim=0).nonzero().flatten().tolist() == [9]


def test_z_has_the_mean_and_scale_that_u_tells():
    """The known prior reads them off u."""
    model = idiff.IDiff(idiff.Config(prior="known", width=8, unet_width=8))
    log_scale = torch.linspace(-1, 0, 6)[None]
    centre = torch.linspace(-1, 1, 6)[None]
    u = model.cfg.kind_of_u.pack(log_scale, centre).expand(40_000, -1)
    torch.manual_seed(0)
    z = model.sample_prior(u)
    torch.testing.assert_close(z.mean(0), centre[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.std(0), log_scale[0].exp(), atol=0, rtol=0.03)
    with pytest.raises(ValueError, match=r"u must be \(B, 12\), got \(3, 6\)"):
        model.sample_prior(u[:3, :6])


@pytest.mark.parametrize("latent", ["gaussian", "st"])
@pytest.mark.parametrize("kind", ["ivae", "idiff"])
def test_images_are_generated_of_z_from_the_prior(latent, kind):
    torch.manual_seed(0)
    cfg = idiff.Config(model=kind, latent=latent, categories=5, image_size=16, latent_dim=3,
                       width=8, unet_width=8, prior="known")
    model = idiff.IDiff(cfg).eval()
    u = torch.rand(4, 12) * 2 - 1
    start = torch.randn(4, 3, 16, 16)
    torch.manual_seed(1)
    x = model.generate(u, start, steps=2)
    torch.manual_seed(1)
    z = model.sample_prior(u)
    assert z.shape == (4, 3)
    if latent == "st":
        assert torch.equal(z, z.round()) and 0 <= z.min() and z.max() < 5
    want = model.sample(z, start, 2) if kind == "idiff" else model.decode(z).clamp(-1, 1)
    torch.testing.assert_close(x, want)


def test_a_category_is_drawn_as_often_as_it_is_likely():
    model = idiff.IDiff(idiff.Config(latent="gumbel", categories=4, prior="known", width=8,
                                     unet_width=8))
    u = torch.rand(1, 12) * 2 - 1
    torch.manual_seed(0)
    z = model.sample_prior(u.expand(20_000, -1)).long()
    for k in range(6):
        share = torch.bincount(z[:, k], minlength=4) / 20_000
        torch.testing.assert_close(share, model.prior(u).probs[0, k], atol=0.015, rtol=0)


# ---- p(z|u) that fits ----


class Coded(torch.nn.Module):
    """In place of a model: codes of two latents, one number of u, and a learned prior."""

    def __init__(self):
        super().__init__()
        self.cfg = idiff.Config(u="own", n_u=1, n_factors=0, latent_dim=2)
        torch.manual_seed(0)
        self.prior = idiff.FullPrior(self.cfg)


def codes(n, seed):
    """z (n, 2) with mean u and -u, and standard deviations 0.3 and 2, and u (n, 1)."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, 1, generator=generator)
    scale = torch.tensor([0.3, 2.0])
    return torch.cat([u, -u], dim=1) + scale * torch.randn(n, 2, generator=generator), u


def standard(model, z, u):
    p = model.prior(u)
    return ((z - p.mean) / p.stddev).std(dim=0)


def learned(rows, width=1.0):
    """A model whose prior is that of codes(rows, 0), but so many times as wide."""
    model = Coded()
    z, u = codes(rows, 0)
    train.minimise(lambda: -model.prior(u).log_prob(z).sum(dim=1).mean(),
                   list(model.prior.parameters()), steps=60)
    with torch.no_grad():
        model.prior.linear.bias[1::2] += 2 * np.log(width)
    return model


def test_a_prior_that_is_too_wide_is_fitted(monkeypatch):
    monkeypatch.setattr(train, "draw_codes", lambda model, data, n, held_out:
                        codes(n, 1 + held_out))
    model = learned(5000, width=1.1)
    with torch.no_grad():
        assert (standard(model, *codes(20_000, 3)) - 1 / 1.1).abs().max() < 0.03
    train.fit_prior(model, None, step=1000)
    with torch.no_grad():
        assert (standard(model, *codes(20_000, 3)) - 1).abs().max() < 0.02


@pytest.mark.parametrize("why", ["the paper's", "frozen", "few rows"])
def test_the_prior_stays_where_a_fit_is_not_wanted(monkeypatch, why):
    """Twenty rows are learned by heart: codes held out would be less likely."""
    n_rows = 20 if why == "few rows" else 5000
    monkeypatch.setattr(train, "draw_codes", lambda model, data, n, held_out:
                        codes(5000 if held_out else n_rows, 1 + held_out))
    model = learned(5000, width=1.0 if why == "few rows" else 1.1)
    if why == "the paper's":
        model.cfg = idiff.Config(u="own", n_u=1, n_factors=0, contrast=0.0)
    if why == "frozen":
        model.requires_grad_(False)
    before = [p.clone() for p in model.prior.parameters()]
    train.fit_prior(model, None, step=1000)
    assert all(map(torch.equal, before, model.prior.parameters()))


def test_a_run_ends_with_the_fit_and_z_stays(classes_npz, tmp_path, monkeypatch):
    fitted = []
    fit = train.fit_prior

    def record(model, data, step):
        x = data.images(torch.arange(9))
        before = model.encode(x)[0]
        fit(model, data, step)
        fitted.append(torch.equal(before, model.encode(x)[0]))
        model.prior.linear.bias.data += 1                  # to be found again
        fitted.append(model.prior.linear.bias.detach().clone())
    monkeypatch.setattr(train, "fit_prior", record)
    for flags in (["--model", "ivae"], ["--unet-share", "0.5"]):
        fitted.clear()
        out = tmp_path / flags[-1]
        train.main([*TINY, *flags, "--data", classes_npz, "--steps", "4", "--out", str(out)])
        assert len(fitted) == 2 and fitted[0]
        saved = idiff.load_checkpoint(out / "ckpt.pt").prior.linear.bias
        assert torch.equal(saved, fitted[1])


# ---- new images ----


def test_shuffled_latents_are_each_another_images(tiny_npz, monkeypatch):
    """Values come from the codes, column by column, and equal columns no longer go together."""
    data = idiff.load_data(tiny_npz)
    codes = torch.randn(24, 1).expand(24, 3)
    known = torch.arange(24), codes, {k: f"z{k}" for k in range(3)}
    monkeypatch.setattr(interpolate, "survey", lambda *_: known)
    z, u, rows = interpolate.draw_codes(None, data, 500)
    assert z.shape == (500, 3) and u is None and rows.shape == (500,)
    assert torch.isin(z, codes).all()
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.2
    again, *_ = interpolate.draw_codes(None, data, 500)
    other, *_ = interpolate.draw_codes(None, data, 500, seed=1)
    assert torch.equal(z, again) and not torch.equal(z, other)

    # 500 = 20 * 24 + 20: no real image is shown once more before all others are
    assert set(torch.bincount(rows, minlength=24).tolist()) == {20, 21}


def test_a_factor_is_set_and_the_other_latents_stay(tiny_npz, monkeypatch):
    data = idiff.load_data(tiny_npz)
    known = knows(data, None)
    z = torch.zeros(2, 3)
    new, rows = interpolate.with_values(z, {"factor 0": 2.5, "z0": 1}, data, known)
    assert new.tolist() == [[3, 6, 0], [3, 6, 0]] and (z == 0).all()
    y = data.factors(rows)                                 # 2.5 is as near to 2 as to 3
    assert set(y[:, 0].tolist()) == {2, 3} and set(y[:, 1].tolist()) == {1}
    monkeypatch.setattr(interpolate, "survey", lambda *_: known)
    _, _, rows = interpolate.draw_codes(None, data, 40, values={"factor 1": 2})
    assert (data.factors(rows)[:, 1] == 2).all()


@pytest.mark.parametrize("values, words", [
    ({"colour": 1}, "no latent is 'colour'. There are: z1 · factor 0, z0 · factor 1, z2"),
    ({"z2": 1}, "'z2' names no latent that matches a factor"),
    ({"factor 0": 4}, "factor 0 goes from 0 to 3, got 4"),
    ({"factor 1": float("nan")}, "factor 1 goes from 0 to 2, got nan")])
def test_what_cannot_be_set_is_told(tiny_npz, values, words):
    data = idiff.load_data(tiny_npz)
    with pytest.raises(ValueError, match=words):
        interpolate.with_values(torch.zeros(1, 3), values, data, knows(data, None))


def test_a_factor_that_is_called_by_a_number_is_meant(tiny_npz):
    """As pandas calls columns: 0 is latent 1 here, 1 is latent 0, and no latent matches 2."""
    data = idiff.load_data(tiny_npz)
    rows, codes, _ = knows(data, None)
    data.factor_names = "0", "1", "2"
    names = {1: "z1 · 0", 0: "z0 · 1", 2: "z2"}
    new, _ = interpolate.with_values(torch.zeros(1, 3), {"0": 1}, data, (rows, codes, names))
    assert new.tolist() == [[0, 3, 0]]
    assert list(interpolate.choose(["1", "2", "z1"], names)) == [0, 2, 1]
    with pytest.raises(ValueError, match="'2' names no latent that matches a factor"):
        interpolate.with_values(torch.zeros(1, 3), {"2": 1}, data, (rows, codes, names))


def test_each_real_image_beside_images_of_u_has_that_u(classes_npz, tmp_path):
    path = write_checkpoint(tmp_path / "c.pt", classes_npz, u="own", n_factors=0, n_u=3)
    model, data = idiff.open_checkpoint(path)
    _, u, rows = interpolate.draw_codes(model, data, 30, how="u")
    assert torch.equal(data.u[rows], u) and len(u.unique(dim=0)) == 3


@pytest.mark.usefixtures("pictures")
def test_new_images_are_drawn_and_written(tiny_run, tmp_path, drawn):  # noqa: F811
    """The picture's rows; a PNG each of the last network's; all in a file that load_data reads."""
    interpolate.main([str(tiny_run / "ckpt.pt"), *FAST, "--sample", "3", "--from", "u", "--out",
                      str(tmp_path)])
    images, rows, columns = drawn["sample.png"]
    assert rows == ["decoder", "diffusion", "real"] and len(columns) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"sample.png", "sample-3", "sample-3.npz"}

    new = np.load(tmp_path / "sample-3.npz")
    model = idiff.load_checkpoint(tiny_run / "ckpt.pt")
    assert new["u"].shape == (3, model.cfg.u_dim)
    z = torch.from_numpy(new["z"])
    torch.testing.assert_close(model.decode(z), images[0], atol=1e-5, rtol=0)
    as_data = idiff.load_data(str(tmp_path / "sample-3.npz"))
    for k, path in enumerate(sorted((tmp_path / "sample-3").iterdir())):
        pixels = np.array(Image.open(path))
        assert path.name == f"0000{k}.png" and (pixels == new["images"][k]).all()
        shown = as_data.images(torch.tensor([k]))[0]
        torch.testing.assert_close(shown, images[1, k], atol=1 / 127, rtol=0)


def test_each_new_image_has_noise_of_its_own(tiny_npz, tmp_path):
    """Also where z is one and the same; image k is the first one of seed + k."""
    model, data = idiff.open_checkpoint(write_checkpoint(tmp_path / "ckpt.pt", tiny_npz))
    rows = torch.arange(3)
    images, *_ = interpolate.draw_new(model, data, torch.zeros(3, 3), rows, steps=2, seed=5)
    by_decoder, by_diffusion, real = images.unflatten(0, (3, 3))
    assert torch.equal(real, data.images(rows))
    for k in range(3):
        alone, *_ = interpolate.draw_new(model, data, torch.zeros(1, 3), rows[:1], 2, seed=5 + k)
        torch.testing.assert_close(by_diffusion[k], alone[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(by_decoder[0], by_decoder[1])
    assert (by_diffusion[0] - by_diffusion[1]).abs().max() > 0.1


def test_new_images_like_a_row_have_its_u(classes_npz, tmp_path, drawn):  # noqa: F811
    """So have the real ones beside them; by default a row is drawn for each class."""
    path = write_checkpoint(tmp_path / "ckpt.pt", classes_npz, u="own", n_u=3, n_factors=0)
    data = idiff.load_data(classes_npz)
    interpolate.main([path, *FAST, "--sample", "2", "--like", "7", "--out", str(tmp_path)])
    new = np.load(tmp_path / "sample-2.npz")
    assert np.allclose(new["u"], data.u[7].numpy())
    _, by_diffusion, real = drawn["sample.png"][0]
    assert (real == data.images(torch.tensor([1]))[0]).all()           # 1 and 7 are of one class

    interpolate.main([path, *FAST, "--out", str(tmp_path)])
    images, rows, columns = drawn["classes.png"]
    assert rows == ["u of row 0", "u of row 1", "u of row 2"] and columns == ["real", "new", ""]
    assert torch.equal(images[:, 0], data.images(torch.arange(3)))
    torch.testing.assert_close(images[1, 1:], by_diffusion)


def test_a_given_image_gets_a_factors_value(tiny_run, tmp_path, drawn, monkeypatch):  # noqa: F811
    model, data = idiff.open_checkpoint(tiny_run / "ckpt.pt")
    monkeypatch.setattr(interpolate, "survey", lambda *_: knows(data, None))
    interpolate.main([str(tiny_run / "ckpt.pt"), *FAST, "--image", "5", "--set", "factor 0=3",
                      "--out", str(tmp_path)])
    images, _, titles = drawn["image.png"]
    assert titles == ["A", "redrawn", "factor 0 = 3"]
    z, _ = model.encode(data.images(torch.tensor([5])))
    z[:, 1] = 7
    torch.testing.assert_close(images[0, 2], model.decode(z)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags, words", [
    (["--sample", "0"], ["--sample", "1, got 0"]),
    (["--sample", "2", "--like", "3"], ["--like", "own", "mean+var"]),
    (["--sample", "2", "--set", "colour=3"], ["colour", "z0"]),
    (["--like", "3"], ["--sample"]),
    (["--from", "u"], ["--sample"]),
    (["--swap", "1", "2", "--set", "z0=1"], ["--sample", "--image"])])
def test_wrong_flags_are_told_in_one_line(tiny_run, tmp_path, flags, words):
    text = refusal([tiny_run / "ckpt.pt", "--out", tmp_path, *flags])
    assert all(word in text for word in words)


def test_a_row_that_is_not_there_is_told(classes_npz, tmp_path):
    path = write_checkpoint(tmp_path / "ckpt.pt", classes_npz, u="own", n_u=3, n_factors=0)
    assert "a row below 120" in refusal([path, "--sample", "2", "--like", "120"])
    assert "z0" in refusal([path, "--sample", "2", "--set", "scale=1"])
