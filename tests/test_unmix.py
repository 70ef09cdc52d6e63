# SPDX-License-Identifier: MIT
"""Unmixing: the linear map that the variances fix, and rows that training never sees.

    python -m pytest tests/test_unmix.py
"""
import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch

import idiff
import train
from conftest import TINY, cut_off_after, same
from test_train import log_of

N = 20_000


def segments(equal_scales=False, n_segments=8, d=3):
    """z = A g, u and A: g is Gaussian, with a mean and a scale of its own in each segment."""
    generator = torch.Generator().manual_seed(0)
    segment = torch.randint(n_segments, (N + 4000,), generator=generator)
    scale = torch.exp(1.6 * torch.rand(n_segments, d, generator=generator) - 1.6)
    if equal_scales:
        scale[:] = 0.5
    mean = torch.rand(n_segments, d, generator=generator) * 2 - 1
    noise = torch.randn(len(segment), d, generator=generator)
    mixing = torch.randn(d, d, generator=generator)
    z = (mean[segment] + scale[segment] * noise) @ mixing.T
    u = torch.eye(n_segments)[segment]
    return z, (u - u.mean(0)) / u.std(0), mixing


def unmixed(z, u):
    """What unmix finds; the prior that it starts from stays, for it may be gone on with."""
    cfg = idiff.Config(latent_dim=z.shape[1], u="own", n_u=u.shape[1], n_factors=0)
    torch.manual_seed(0)
    prior = idiff.FullPrior(cfg)
    before = [p.clone() for p in prior.parameters()]
    result = train.unmix(prior, z[:N], u[:N], z[N:], u[N:])
    assert all(map(torch.equal, before, prior.parameters()))
    return result


def test_variances_that_differ_by_segment_fix_the_axes():
    """W A is a permutation of a diagonal matrix; held-out codes are likelier by it."""
    z, u, mixing = segments()
    (w, b, prior), told = unmixed(z, u)
    product = w @ mixing
    product = product / product.abs().amax(dim=1, keepdim=True)
    largest = product.abs().argmax(dim=1)
    assert sorted(largest.tolist()) == [0, 1, 2]
    others = product.abs().scatter(1, largest[:, None], 0.0)
    assert others.max() < 1e-2
    assert told["accepted"] and told["to"] > told["from"]

    # and the prior is that of the unmixed codes
    p = prior(u[N:])
    standard = (z[N:] @ w.T + b - p.mean) / p.stddev
    assert standard.mean(0).abs().max() < 0.1 and (standard.std(0) - 1).abs().max() < 0.1


def test_equal_scales_fix_nothing_and_nothing_is_accepted():
    """Any rotation of whitened codes is as likely: decorrelating alone identifies nothing."""
    z, u, _ = segments(equal_scales=True)
    found, told = unmixed(z, u)
    assert found is None and not told["accepted"]


def test_u_that_tells_nothing_is_not_accepted():
    z = torch.randn(N + 4000, 3, generator=torch.Generator().manual_seed(0))
    u = torch.randn(N + 4000, 5, generator=torch.Generator().manual_seed(1))
    assert unmixed(z, u)[0] is None


def test_it_never_comes_before_the_first_step():
    cfg = idiff.Config(steps=2, unet_share=0, settle=0.6, unmix=2)
    assert cfg.settle_steps == 1 and cfg.unmix_steps == [1, 1]


@pytest.mark.parametrize("gains, copies, accepted", [
    ((3.5, 9.0), 1, True), ((2.5, 9.0), 1, False), ((9.0, 2.5), 1, False), ((2.5, 9.0), 4, False),
    ((-9.0, 9.0), 1, False)])
def test_each_gain_must_exceed_three_errors(monkeypatch, gains, copies, accepted):
    """Over a fit without mixing, and over one without scales. An image drawn again counts once."""
    noise = torch.linspace(-1, 1, 101).repeat(copies)
    by_mixing, by_scales = (noise / noise.std() + gain / 101**0.5 for gain in gains)

    def fit(prior, z, u, z_held, u_held, mixes=True, scales=True):
        if mixes and scales:
            return "found", torch.zeros_like(noise)
        return "other", -by_scales if mixes else -by_mixing
    monkeypatch.setattr(train, "fit_unmixing", fit)
    z_held = torch.randn(101, 2, generator=torch.Generator().manual_seed(0)).repeat(copies, 1)
    found, told = train.unmix(None, None, None, z_held, None)
    assert told["accepted"] == accepted and found == ("found" if accepted else None)
    assert told["gain in errors"] == pytest.approx(min(gains), rel=0.01)


@pytest.mark.parametrize("model", ["ours", "another net"])
def test_the_encoder_takes_the_map_in(model):
    cfg = idiff.Config(image_size=16, width=8, latent_dim=3)
    encoder = idiff.Encoder(cfg)
    if model == "another net":
        encoder.net = torch.nn.ModuleDict({"body": torch.nn.Flatten(), "fc": torch.nn.Linear(768, 6)})
        encoder.net.forward = lambda x: encoder.net["fc"](encoder.net["body"](x))
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    w, b = torch.randn(3, 3), torch.randn(3)
    before = encoder(x)
    encoder.turn(w, b)
    after = encoder(x)
    torch.testing.assert_close(after.mean, before.mean @ w.T + b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.logvar, before.logvar)


@pytest.fixture
def own(tmp_path):
    """Path of 240 images, a block in one of 8 columns; u is the half that it lies in, and noise."""
    rng = np.random.default_rng(0)
    place = rng.integers(0, 8, 240)
    images = np.zeros((240, 16, 16), np.uint8)
    for image, k in zip(images, place):
        image[4:9, 2 * k:2 * k + 2] = 255
    np.savez(tmp_path / "own.npz", images=images, u=np.stack([place < 4, rng.normal(size=240)], 1))
    return str(tmp_path / "own.npz")


def accepted(prior, z, *_):
    """In place of unmix: z's first latent is turned round, and the prior with it."""
    w = torch.eye(z.shape[1])
    w[0, 0] = -1
    return (w, torch.zeros(len(w)), prior), {"accepted": True, "from": 0.0, "to": 1.0}


def test_it_comes_at_the_end_of_settling_and_is_told(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "unmix", accepted)
    argv = [*TINY, "--data", own, "--settle", "0.5", "--unet-share", "0.2", "--steps", "10"]
    for unmix, steps in ((0, []), (1, [4]), (2, [2, 4])):
        out = tmp_path / str(unmix)
        train.main([*argv, "--unmix", str(unmix), "--out", str(out)])
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if "unmixing" in r] == steps
        assert capsys.readouterr().out.count("latents unmixed") == len(steps)


def test_both_weights_take_it_and_the_optimiser_forgets(own):
    """Codes are turned round in the model and in its average alike; nothing else changes."""
    data = idiff.load_data(own)
    cfg = train.recipe(data, steps=10, width=8, batch_size=8, latent_dim=3, model="ivae")
    model, ema, optimizers = train.build(cfg, data.device)
    for step in range(3):
        train.train_step(cfg, model, ema, optimizers, train.draw_batch(model, data, step), step)
    x = data.images(torch.arange(9))
    before = ema.encode(x)[0].detach()
    codes = ema.encode(data.images(torch.arange(240)))[0].detach()

    def accepted_for_the_average(prior, z, u, *held):
        assert prior is ema.prior and torch.cdist(z, codes).min(dim=1).values.max() < 1e-4
        found, told = accepted(deepcopy(prior), z)
        torch.nn.init.ones_(found[2].linear.bias)
        return found, told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "unmix", accepted_for_the_average)
        train.unmix_model(model, ema, optimizers[0], data, step=3)
    turned = before * torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(ema.encode(x)[0], turned)
    torch.testing.assert_close(model.encode(x)[0], turned)
    assert not optimizers[0].state
    assert same(ema.prior.state_dict(), model.prior.state_dict())
    assert (model.prior.linear.bias == 1).all()


def test_a_run_resumed_before_it_ends_as_if_undisturbed(own, tmp_path):
    data = idiff.load_data(own)
    cfg = train.recipe(data, steps=8, width=8, unet_width=8, batch_size=8, latent_dim=2,
                       ddpm_images=2, unet_share=0.25, settle=0.5)
    assert cfg.unmix_steps == [3]
    whole = train.run(cfg, data, str(tmp_path / "whole"))
    with cut_off_after(3):
        train.run(cfg, data, str(tmp_path / "run"), save_every=3)
    train.run(cfg, data, resume=str(tmp_path / "run" / "ckpt.pt"))
    a, b = (idiff.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "run"))
    assert all(same(a[part], b[part]) for part in ("model", "ema", "optimizers"))
    assert whole.info["out"] == str(tmp_path / "whole")


# ---- rows held out ----


def test_codes_that_judge_a_fit_are_not_those_that_it_was_made_of(tiny_npz):
    """Also where u is drawn, so that no row is held out; both draws repeat."""
    data = idiff.load_data(tiny_npz)
    cfg = train.recipe(data, steps=10, width=8, batch_size=20, latent_dim=3, model="ivae")
    model, *_ = train.build(cfg, data.device)
    z, u, z_held, u_held = train.draw_to_fit(model, data, step=9, most=150)
    assert z.shape == (150, 3) and z_held.shape == (180, 3)
    assert not torch.isin(u, u_held).any()
    again = train.draw_to_fit(model, data, step=9, most=150)
    assert all(map(torch.equal, again, (z, u, z_held, u_held)))

def test_rows_held_out_are_the_datas_own_and_never_trained_on(own):
    data, again = idiff.load_data(own), idiff.load_data(own)
    assert len(data.held_out) == 64 and len(data.trained) == 176
    assert torch.equal(data.held_out, again.held_out)
    every = torch.cat([data.held_out, data.trained]).sort().values
    assert torch.equal(every, torch.arange(240))

    generator = torch.Generator().manual_seed(0)
    rows, u = data.draw(5000, generator, "own")
    assert set(rows.tolist()) == set(data.trained.tolist()) and torch.equal(u, data.u[rows])
    rows, u = data.draw(5000, generator, "own", held_out=True)
    assert set(rows.tolist()) == set(data.held_out.tolist()) and torch.equal(u, data.u[rows])


@pytest.mark.parametrize("n, held_out", [(2, 1), (100, 50), (1000, 64), (10_000, 500),
                                         (480_000, 5000)])
def test_how_many_rows_are_held_out(n, held_out):
    data = idiff.Data("mine", {"a": n}, (1, 16, 16), None, "cpu")
    assert len(data.held_out) == held_out and len(data.trained) == n - held_out


def run_on_noise(folder):
    """The model of a run on noise with an unrelated u, its contrast on rows that training saw, on
    rows never seen, and its log."""
    rng = np.random.default_rng(0)
    np.savez(folder / "noise.npz", images=rng.integers(0, 256, (256, 16, 16), np.uint8),
             u=rng.normal(size=(256, 2)))
    data = idiff.load_data(str(folder / "noise.npz"))
    cfg = train.recipe(data, steps=150, width=16, batch_size=64, latent_dim=3, model="ivae",
                       contrast=1.0, unmix=0, settle=0.9)
    model = train.run(cfg, data, str(folder / "run"))
    seen = data.trained[:150]
    by_heart = idiff.contrast_loss(model.encode(data.images(seen))[0], model.prior(data.u[seen]))
    return by_heart, model.info["validation"]["contrast"], log_of(folder / "run")


def test_what_is_learned_by_heart_shows(tmp_path, monkeypatch):
    """The contrast of rows never seen is 0 or worse, that of rows trained on is not."""
    monkeypatch.setattr(train.Watch, "MARGIN", math.inf)
    by_heart, held_out, records = run_on_noise(tmp_path)
    assert by_heart < -0.5 and held_out > -0.1
    assert not any("learned by heart" in record for record in records)


def test_what_is_learned_by_heart_is_taken_back(tmp_path, monkeypatch):
    """Where u tells nothing, settling ends with z as it was before it told the u of images seen."""
    monkeypatch.setattr(train, "fit_prior", lambda *_: None)
    by_heart, held_out, records = run_on_noise(tmp_path)
    assert by_heart > -0.35 and abs(held_out) < 0.1
    assert sum("learned by heart" in record for record in records) == 1


def recipe_of(data, **changes):
    """A Config of 80 steps of the iVAE, 64 of which settle; it is watched at 20, 40 and 60."""
    small = dict(width=8, unet_width=8, batch_size=8, latent_dim=2, ddpm_images=2)
    return train.recipe(data, steps=100, unet_share=0.2, settle=0.8, **small, **changes)


def test_the_best_codes_come_back(own, monkeypatch):
    """Settling ends with them, at the step at which worse ones were found."""
    data = idiff.load_data(own)
    cfg = recipe_of(data)
    model, ema, optimizers = train.build(cfg, data.device)
    watch = train.Watch(ema)
    values = iter([-1.0, -0.95, -0.8])
    monkeypatch.setattr(train, "held_out_contrast", lambda *_: next(values))
    x = data.images(torch.arange(9))
    best = ema.encode(x)[0]
    worse = []
    for step in range(1, 61):
        worse.append(watch.worse(ema, data, step))
        if step % 20 == 0:
            torch.nn.init.normal_(ema.encoder.last.weight)
    assert worse.index(True) == 59 and sum(worse) == 1 and watch.step == 20

    watch.go_back(model, ema, optimizers[0], 60)
    for each in (model, ema):
        torch.testing.assert_close(each.encode(x)[0], best)
    assert watch.config().settle_steps == 60 and watch.config().unmix_steps == [60]
    assert watch.config().ivae_steps == cfg.ivae_steps
    assert not watch.worse(ema, data, 80)                  # the decoder has joined


@pytest.mark.parametrize("u, changes", [("var", {}), ("own", {"contrast": 0.0, "kl": 1e-2})])
def test_only_a_contrast_of_own_u_is_watched(tiny_npz, own, u, changes):
    data = idiff.load_data(own if u == "own" else tiny_npz)
    _, ema, _ = train.build(recipe_of(data, u=u, **changes), data.device)
    assert not train.Watch(ema).on
    assert not train.Watch(ema).worse(ema, data, 20)


@pytest.mark.parametrize("stop", [20, 30, 40, 50])
def test_a_run_that_went_back_ends_as_if_undisturbed(own, tmp_path, monkeypatch, stop):
    """Whether it stops before, when or after settling ended early."""
    data = idiff.load_data(own)
    cfg = recipe_of(data)
    worse = train.Watch.worse

    def rising(watch, ema, data, step):                    # the contrast
        monkeypatch.setattr(train, "held_out_contrast", lambda *_: step / 10)
        return worse(watch, ema, data, step)
    monkeypatch.setattr(train.Watch, "worse", rising)
    whole = train.run(cfg, data, str(tmp_path / "whole"), save_every=10)
    told = [record["step"] for record in log_of(tmp_path / "whole") if "learned by heart" in record]
    assert told == [40]

    with cut_off_after(stop):
        train.run(cfg, data, str(tmp_path / "run"), save_every=10)
    resumed = train.run(cfg, data, str(tmp_path / "run"), save_every=10)
    assert same(whole.state_dict(), resumed.state_dict())


def test_the_log_shows_it_at_every_save(own, tmp_path):
    data = idiff.load_data(own)
    cfg = train.recipe(data, model="ivae", steps=8, width=8, batch_size=32, latent_dim=2, settle=0.5)
    model = train.run(cfg, data, str(tmp_path / "run"), save_every=4, log_every=2)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    shown = {r["step"]: r["held-out contrast"] for r in records if "held-out contrast" in r}
    assert list(shown) == [4, 8] and all(map(math.isfinite, shown.values()))

    # rows that training draws play no part in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "trained", data.trained[:0])
        assert train.held_out_contrast(model, data) == pytest.approx(shown[8])


def test_the_held_out_contrast_is_one_of_batches_as_in_training(own, monkeypatch):
    """Where z tells u apart it is the bound of a batch of 16, not that of all draws."""
    data = idiff.load_data(own)
    model, *_ = train.build(train.recipe(data, model="ivae", steps=2, batch_size=16), data.device)
    monkeypatch.setattr(train, "draw_codes", lambda model, data, n, held_out:
                        2 * [100.0 * torch.arange(n)[:, None]])
    monkeypatch.setattr(model.prior, "forward", lambda u: idiff.Gaussian(u, 0 * u))
    assert train.held_out_contrast(model, data) == pytest.approx(-math.log(16))
