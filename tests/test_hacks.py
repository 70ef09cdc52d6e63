# SPDX-License-Identifier: MIT
"""What people run into who change a part: a line says which shape, layer or method is missing.

    python -m pytest tests/test_hacks.py
"""
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import idiff
import train
from conftest import ROOT


class TwoHeads(idiff.Encoder):
    """Mean and log-variance come from layers of their own, which unmixing could not tell apart."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.body = nn.Flatten()
        self.mean = nn.Linear(3 * 16 * 16, cfg.latent_dim)
        self.logvar = nn.Linear(3 * 16 * 16, cfg.latent_dim)

    def forward(self, x):
        h = self.body(x)
        return idiff.Gaussian(self.mean(h), self.logvar(h))


def test_an_encoder_that_cannot_be_unmixed_is_refused_before_the_first_step(tiny_npz, monkeypatch):
    data = idiff.load_data(tiny_npz)
    cfg = train.recipe(data, steps=10, width=8, batch_size=8, model="ivae", settle=0.5)
    monkeypatch.setattr(idiff, "Encoder", TwoHeads)
    with pytest.raises(ValueError, match="--unmix 0"):
        train.build(cfg, data.device)
    model, _, _ = train.build(train.recipe(data, steps=10, width=8, model="ivae", unmix=0),
                              data.device)
    assert isinstance(model.encoder, TwoHeads)


def test_an_encoder_with_another_net_starts_as_narrow(monkeypatch):
    """The decoder comes late: at first it would see little but noise."""
    class Flat(idiff.Encoder):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2 * cfg.latent_dim))

    x = torch.zeros(2, 3, 16, 16)
    for settle, narrow in ((0.4, True), (0.0, False)):
        cfg = idiff.Config(image_size=16, width=8, settle=settle)
        for encoder in (idiff.Encoder, Flat):
            monkeypatch.setattr(idiff, "Encoder", encoder)
            std = idiff.IDiff(cfg).encoder(x).stddev
            assert ((std < 0.2).all() if narrow else (std > 0.5).all()), (settle, encoder)


def test_data_made_in_python_may_have_u_alone():
    u = np.random.default_rng(0).integers(0, 2, (70, 3))
    data = idiff.Data("mine", {}, (1, 16, 16), lambda rows: torch.zeros(len(rows), 1, 16, 16),
                      "cpu", u=u)
    assert len(data) == 70 and data.device == torch.device("cpu")
    rows, drawn = data.draw(9, torch.Generator().manual_seed(0), "own")
    np.testing.assert_array_equal(drawn, u[rows])
    cfg = train.recipe(data, model="ivae", steps=1, width=8)
    assert cfg.u == "own" and cfg.n_u == 3


class Halves(idiff.ScalesU):
    """Tells in which half each factor lies."""

    def draw(self, data, n, generator):
        rows = torch.randint(len(data), (n,), generator=generator)
        return rows, (data.factors(rows) * 2 // data.sizes).float()


def test_a_kind_of_u_of_ones_own_is_checked(tiny_npz, monkeypatch):
    data = idiff.load_data(tiny_npz)
    monkeypatch.setitem(idiff.U_KINDS, "halves", Halves)
    assert data.draw(5, None, "halves")[1].unique().tolist() == [0, 1]

    # the inherited reading of scales would be wrong without a word
    with pytest.raises(ValueError, match="unpack"):
        train.recipe(data, u="halves", prior="known", model="ivae")

    monkeypatch.setattr(Halves, "width", 2)
    with pytest.raises(ValueError, match=r"width 2, but its draw gave \(5, 3\)"):
        data.draw(5, None, "halves")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("predict, n_maps", [("eps", 1), ("residual", 2)])
def test_a_unet_that_gives_other_maps_is_refused(predict, n_maps, channels, monkeypatch):
    """Grey images and the noise's prediction would broadcast in silence."""
    class Net(nn.Module):
        def __init__(self, cfg):
            super().__init__()

        def forward(self, x_t, t, z, x_hat):
            return torch.zeros(len(x_t), self.n * x_t.shape[1], *x_t.shape[2:])

    monkeypatch.setattr(idiff, "ScoreUNet", Net)
    model = idiff.IDiff(idiff.Config(image_size=16, image_channels=channels, predict=predict))
    x = torch.zeros(4, channels, 16, 16)
    t = torch.full((4,), 0.5)
    for Net.n in (1, 2, 3):
        if Net.n == n_maps:
            assert model.denoise(x, t, torch.zeros(4, 6), x).shape == x.shape
        else:
            with pytest.raises(ValueError, match="U-Net must give"):
                model.denoise(x, t, torch.zeros(4, 6), x)


def test_a_schedule_is_chosen_by_name(tiny_npz, monkeypatch):
    monkeypatch.setitem(idiff.SCHEDULES, "linear", lambda done: 1 - done)
    cfg = idiff.Config(schedule="linear", steps=3000, unet_share=1 / 3)
    shares = [train.rate_share(cfg, step) for step in (49, 500, 1500, 2500)]
    assert shares == pytest.approx([0.5 * (1 - 49 / 2000), 0.75, 0.25, 0.5])


def test_commands_name_the_users_own_file(monkeypatch):
    """But not one that called train.run, which would only train again."""
    monkeypatch.chdir(ROOT)
    by_main = {"method": "recipe"}
    for started_as, info, command in (
            ("train.py", by_main, "python train.py --resume 'a b'"),
            ("mine.py", by_main, "python mine.py train --resume 'a b'"),
            ("notebook.py", {}, "python train.py --resume 'a b'"),
            ("/usr/bin/pytest", by_main, "python train.py --resume 'a b'")):
        monkeypatch.setattr("sys.argv", [started_as])
        assert train.command(info, "train", "--resume", "a b") == command
    monkeypatch.chdir(ROOT / "tests")
    assert train.command(by_main, "evaluate", "x") == "python ../evaluate.py x"


def test_a_config_may_have_a_flag_of_its_own(tiny_npz, tmp_path, monkeypatch, capsys):
    @dataclass(frozen=True)
    class MyConfig(idiff.Config):
        free_bits: float = idiff.option(0.5, "nats of each latent that cost nothing")
    monkeypatch.setattr(idiff, "Config", MyConfig)
    out = tmp_path / "run"
    train.main(["--data", tiny_npz, "--model", "ivae", "--steps", "1", "--width", "8",
                "--batch-size", "4", "--unmix", "0", "--free-bits", "2", "--out", str(out)])
    model, _ = idiff.open_checkpoint(out / "ckpt.pt")
    assert model.cfg.free_bits == 2
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "--free-bits" in capsys.readouterr().out


def test_a_short_run_is_unmixed_by_no_more_codes_than_it_saw(tiny_npz, monkeypatch):
    data = idiff.load_data(tiny_npz)
    cfg = train.recipe(data, steps=10, width=8, batch_size=4, latent_dim=3, model="ivae")
    model, ema, optimizers = train.build(cfg, data.device)
    counts = []

    def draw_codes(model, data, n, held_out):
        counts.append(n)
        return torch.randn(n, 3), torch.randn(n, cfg.u_dim)
    monkeypatch.setattr(train, "draw_codes", draw_codes)
    monkeypatch.setattr(train, "unmix", lambda *_: (None, {}))
    for step in (3, 2000, 10_000):
        train.unmix_model(model, ema, optimizers[0], data, step)
    assert counts == [12, 12, 8000, 5000, 20_000, 5000]
