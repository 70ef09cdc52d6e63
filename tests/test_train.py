# SPDX-License-Identifier: MIT
"""train.py as a user runs it, on tiny images and models.

    python -m pytest tests/test_train.py
    python -m pytest tests/test_train.py -k resume
"""
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import idiff
import interpolate
import train
from conftest import ROOT, TINY, cut_off_after, same
from idiff import Config, load_checkpoint, load_data, read_checkpoint, save_checkpoint


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def steps_of(out):
    return [record for record in log_of(out) if "seconds" in record]


def wait_for_steps(log, over):
    """Until a log tells of some steps, or the run is over."""
    while not over() and not (log.is_file() and log.read_text().count("step") > 5):
        time.sleep(0.05)


def config_of(out):
    return log_of(out)[0]["config"]


def refusal(argv, capsys):
    """What the user reads when main(argv) ends at once: one line, beside argparse's usage."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    shown = capsys.readouterr().err.splitlines()
    text = end.value.code
    if not isinstance(text, str):                                      # argparse prints, exits by 2
        assert text == 2 and shown[0].startswith("usage") and len(shown) == 2
        text = shown[-1]
    assert len(text) > 10 and "\n" not in text
    return text


# ---- a run ----


def test_run_leaves_a_model_a_log_and_pictures(tiny_run):
    first, *_ = log_of(tiny_run)
    assert first["config"]["width"] == 8 and first["config"]["n_factors"] == 3
    records = steps_of(tiny_run)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(math.isfinite(r[k]) for r in records for k in ("ddpm", "rec", "kl"))
    for name in ("losses.png", "samples.png"):
        assert (tiny_run / name).read_bytes()[:4] == b"\x89PNG"
    model = load_checkpoint(str(tiny_run / "ckpt.pt"))
    assert model.cfg.image_size == 16 and model.cfg.latent_dim == 3
    assert "blocks.npz" in model.info["data"]
    assert not list(tiny_run.glob("*.partial"))


def test_run_says_first_what_it_does_and_last_what_comes_next(tiny_npz, tmp_path, capsys):
    train.main([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert all(word in lines[0] for word in ("cpu", "small", "blocks.npz", "parameters"))
    for line, script in zip(lines[-2:], ("evaluate.py", "interpolate.py")):
        _, name, path = line.split()
        assert name == script and Path(path).is_file()


@pytest.mark.parametrize("name", ["it's a run", "a $HOME;run"])
def test_printed_commands_survive_a_shell(tiny_npz, tmp_path, capsys, name):
    out = tmp_path / name
    train.main([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(out)])
    for line in capsys.readouterr().out.splitlines()[-2:]:
        assert shlex.split(line)[2:] == [f"{out}/ckpt.pt"]
    text = refusal([*TINY, "--data", tiny_npz, "--steps", "2", "--out", str(out)], capsys)
    _, _, command = text.partition("with it: ")
    assert shlex.split(command) == ["--resume", f"{out}/ckpt.pt"]


@pytest.mark.usefixtures("pictures")
def test_a_picture_that_cannot_be_drawn_is_named_and_the_run_ends_well(
        tiny_npz, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise TypeError("no such shape")
    monkeypatch.setattr(train, "draw_samples", fails)
    train.main([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert "samples.png is missing: no such shape" in shown.err
    assert "Next:" in shown.out and (tmp_path / "losses.png").is_file()


@pytest.mark.usefixtures("pictures")
def test_samples_are_images_as_they_are_and_as_each_network_redraws_them(
        tiny_run, tiny_npz, monkeypatch):
    drawn = []
    monkeypatch.setattr(idiff, "save_grid", lambda *args: drawn.extend(args))
    model, data = load_checkpoint(str(tiny_run / "ckpt.pt")), load_data(tiny_npz)
    train.draw_samples("samples.png", model, data)
    _, images, rows, columns = drawn
    assert rows == ["image", "decoder", "diffusion"] and columns == [""] * 10
    x, x_hat, redrawn = images.unflatten(0, (3, 10))
    grid = data.images(torch.arange(24))
    assert all((image == grid).flatten(1).all(dim=1).any() for image in x)
    z, _ = model.encode(x)
    torch.testing.assert_close(x_hat, model.decode(z))
    assert not torch.equal(redrawn, x) and not torch.equal(redrawn, x_hat)
    assert redrawn.abs().max() <= 1


def test_a_log_of_stderr_holds_plain_lines_that_tell_the_time_left(
        tiny_npz, tmp_path, capsys, monkeypatch):
    """None in the first half minute, then one every half minute; here every step takes 20 s."""
    argv = [*TINY, "--data", tiny_npz, "--steps", "12"]
    train.main([*argv, "--out", str(tmp_path / "fast")])
    assert not capsys.readouterr().err

    def clock():
        return 20.0 * len(log_of(tmp_path / "slow")) if (tmp_path / "slow").exists() else 0.0

    monkeypatch.setattr("tqdm.std.time", clock)
    train.main([*argv, "--out", str(tmp_path / "slow")])
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) <= 7
    assert all(re.match(r"step: \d+ of 12, \d\d:\d\d left, .*rec=", line) for line in lines)


def test_runs_without_out_get_folders_of_their_own(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*TINY, "--data", tiny_npz, "--steps", "1"])
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and all((run / "ckpt.pt").is_file() for run in runs)


@pytest.mark.parametrize("out", [None, "runs/mine"])
def test_of_two_runs_that_start_at_once_one_has_the_folder(tiny_npz, tmp_path, monkeypatch, capsys,
                                                           out):
    """Here this one starts, with the same command, while the other is at its first step."""
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--data", tiny_npz, "--steps", "1", *(["--out", out] if out else [])]
    step = train.train_step
    said = []

    def other_first(*args):
        monkeypatch.setattr(train, "train_step", step)
        if out:
            said.append(refusal(argv, capsys))
        else:
            train.main(argv)
        return step(*args)
    monkeypatch.setattr(train, "train_step", other_first)
    train.main(argv)
    folders = list(Path("runs").iterdir())
    assert len(folders) == (1 if out else 2) and all("runs/mine" in text for text in said)
    assert all([r["step"] for r in log_of(run)[1:]] == [1, 1] for run in folders)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("kind", ["vae", "ivae"])
def test_models_without_a_unet_train(tiny_npz, tmp_path, kind):
    train.main([*TINY, "--data", tiny_npz, "--model", kind, "--steps", "4", "--out", str(tmp_path),
                "--log-every", "3"])
    records = steps_of(tmp_path)
    assert [r["step"] for r in records] == [3, 4]                      # every third, and the last
    assert all("ddpm" not in r and math.isfinite(r["rec"]) for r in records)
    assert load_checkpoint(str(tmp_path / "ckpt.pt")).unet is None
    assert (tmp_path / "samples.png").is_file()


def test_seed_decides_the_run(tiny_npz, tiny_run, tmp_path):
    """The tiny run again gives its losses again; another seed does not."""
    for seed in ("0", "1"):
        train.main([*TINY, "--data", tiny_npz, "--steps", "4", "--seed", seed,
                    "--out", str(tmp_path / seed)])
    rec = {run: [r["rec"] for r in steps_of(run)]
           for run in (tiny_run, tmp_path / "0", tmp_path / "1")}
    assert rec[tmp_path / "0"] == rec[tiny_run] != rec[tmp_path / "1"]


def test_a_loss_of_weight_zero_trains_nothing(tiny_npz, tmp_path):
    """Eq. 2: rec trains the decoder, KL the prior, and each weight turns its own term off."""
    only = "--contrast 0 --model ivae --prior full --schedule constant"
    weights = {}
    for name, flags in {"rec": "--rec 1 --kl 0", "kl": "--rec 0 --kl 1"}.items():
        for steps in ("1", "2"):
            out = tmp_path / (name + steps)
            train.main([*TINY, "--data", tiny_npz, *flags.split(), *only.split(), "--steps", steps,
                        "--out", str(out)])
            weights[name + steps] = read_checkpoint(str(out / "ckpt.pt"))["model"]

    def moved(name):
        first, second = weights[name + "1"], weights[name + "2"]
        return {k.split(".")[0] for k in first if not torch.equal(first[k], second[k])}
    assert moved("rec") == {"encoder", "decoder"} and moved("kl") == {"encoder", "prior"}


@pytest.mark.parametrize("model, contrast, settles", [("idiff", 1, True), ("ivae", 1, True),
                                                      ("idiff", 0, False), ("vae", 1, False)])
def test_encoder_and_prior_learn_alone_at_first_if_a_contrast_teaches_them(
        tiny_npz, tmp_path, model, contrast, settles):
    """Of 4 steps 2 are theirs; of their weights the losses' average would tell nothing."""
    train.main([*TINY, "--data", tiny_npz, "--model", model, "--contrast", str(contrast),
                "--settle", "0.5", "--steps", "4", "--out", str(tmp_path)])
    has_rec = ["rec" in r for r in steps_of(tmp_path)]
    assert has_rec == [not settles, not settles, True, True]


def test_a_part_that_does_not_learn_yet_keeps_its_weights(tiny_npz, tmp_path):
    """Neither does AdamW move it, nor Muon, nor is it forgotten afterwards."""
    train.main([*TINY, "--data", tiny_npz, "--settle", "0.5", "--steps", "4", "--save-every", "1",
                "--out", str(tmp_path)])
    cfg = Config(**config_of(tmp_path))
    data = load_data(tiny_npz)
    model, ema, optimizers = train.build(cfg, data.device)
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def moved():
        return {k.split(".")[0] for k, v in model.state_dict().items() if (v != start[k]).any()}
    for step in (0, 1):
        train.train_step(cfg, model, ema, optimizers, train.draw_batch(model, data, step), step)
    assert moved() == {"encoder", "prior"}
    train.train_step(cfg, model, ema, optimizers, train.draw_batch(model, data, 2), 2)
    assert moved() == {"encoder", "prior", "decoder", "unet"}


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_an_orthogonal_step_has_the_gradients_directions_and_equal_sizes(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sizes, v = torch.linalg.svd(train.orthogonalise(m[None])[0], full_matrices=False)
    of_m = torch.linalg.svd(m, full_matrices=False)
    assert 0.6 < sizes.min() and sizes.max() < 1.3                     # they are 1 at the limit
    nearest = of_m.U @ of_m.Vh
    assert (train.orthogonalise(m[None])[0] - nearest).norm() < 0.4 * nearest.norm()


def test_muon_solves_least_squares():
    torch.manual_seed(0)
    x, wanted = torch.randn(50, 6), torch.randn(6, 4)
    w = torch.zeros(6, 4, requires_grad=True)
    optimizer = train.Muon([w], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        (x @ (w - wanted)).square().mean().backward()
        optimizer.step()
    assert (w - wanted).abs().max() < 0.02


def test_average_without_memory_is_the_model_itself(tiny_npz, tiny_run, tmp_path):
    train.main([*TINY, "--data", tiny_npz, "--steps", "3", "--ema", "0", "--out", str(tmp_path)])
    content = read_checkpoint(str(tmp_path / "ckpt.pt"))
    networks = ("encoder", "decoder", "unet")                  # p(z|u) is fitted once more
    assert same(parts_of(content["model"], networks), parts_of(content["ema"], networks))
    content = read_checkpoint(str(tiny_run / "ckpt.pt"))
    assert not same(dict(content["model"]), dict(content["ema"]))


# ---- which method ----


def test_paper_beats_size_and_flags_beat_both(tiny_npz, tmp_path):
    train.main(["--paper", "--size", "full", "--data", tiny_npz, "--device", "cpu", "--steps", "2",
                "--width", "8", "--unet-width", "8", "--lr", "1e-3", "--precision", "float32",
                "--log-every", "1", "--out", str(tmp_path)])
    cfg = config_of(tmp_path)
    paper = dict(kl=5e-4, rec=0.1, u="var", prior="full", prior_mean="learned",
                 contrast=0.0, settle=0.0, muon=0.0, latent_dim=10, batch_size=32,
                 predict="eps")
    assert {k: cfg[k] for k in paper} == paper
    assert (cfg["width"], cfg["unet_width"], cfg["lr"], cfg["steps"]) == (8, 8, 1e-3, 2)
    assert load_checkpoint(str(tmp_path / "ckpt.pt")).info["method"] == "paper"


def test_kl_and_rec_change_the_recipes_weights_and_nothing_else(tiny_npz, tmp_path):
    for name, flags in {"bare": [], "weights": ["--kl", "5e-4", "--rec", "0.1"]}.items():
        train.main([*TINY, "--data", tiny_npz, "--steps", "1", *flags,
                    "--out", str(tmp_path / name)])
    bare, weights = config_of(tmp_path / "bare"), config_of(tmp_path / "weights")
    assert weights == bare | {"kl": 5e-4, "rec": 0.1}


def test_help_is_short_and_no_switch_is_on_by_default():
    parser = train.build_parser()
    assert len(parser.format_help().splitlines()) < 80
    assert not any(value is True for value in vars(parser.parse_args([])).values())


# ---- one step, by hand ----

def small_cfg(**changes):
    values = dict(width=8, unet_width=8, batch_size=8, rec_images=4, ddpm_images=4, settle=0.0,
                  unet_share=0.0, steps=400)
    return Config(**values | changes)


def test_a_step_descends_eq_2_and_bounds_its_gradient(shapes3d):
    """The gradient's norm is that of the weighted sum; what is left after the step is clipped."""
    cfg = small_cfg(kl=0.02, rec=0.7, contrast=0.4, clip=0.05)
    parts = train.build(cfg, shapes3d.device)
    model = parts[0]
    terms = model(*train.draw_batch(model, shapes3d, 3), n_rec=4)
    loss = terms["ddpm"] + 0.7 * terms["rec"] + 0.02 * terms["kl"] + 0.4 * terms["contrast"]
    wanted = torch.stack([g.norm() for g in torch.autograd.grad(loss, model.parameters())]).norm()

    told = train.train_step(cfg, *parts, train.draw_batch(model, shapes3d, 3), 3)
    left = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(told["gradient norm"]) == pytest.approx(float(wanted), rel=1e-4)
    assert float(wanted) > 0.05 and float(left) == pytest.approx(0.05, rel=1e-3)


def test_the_average_is_warmed_up(shapes3d):
    """A tenth of the first weights is left of them after a step: not 0.998 of chance."""
    cfg = small_cfg()
    model, ema, optimizers = train.build(cfg, shapes3d.device)
    first = model.decoder.head.mix.weight.detach().clone()
    train.train_step(cfg, model, ema, optimizers, train.draw_batch(model, shapes3d, 0), 0)
    moved = model.decoder.head.mix.weight - first
    of_average = ema.decoder.head.mix.weight - first
    torch.testing.assert_close(of_average, 0.9 * moved, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("predict", ["eps", "residual"])
def test_times_are_drawn_one_in_each_stratum(predict, shapes3d):
    """Of (0, 1], or of the logarithm of sigma / alpha from 0.01 to 3; anywhere within it."""
    model = idiff.IDiff(small_cfg(predict=predict, batch_size=16, ddpm_images=16))
    places = []
    for step in range(20):
        _, _, t, _ = train.draw_batch(model, shapes3d, step)
        if predict == "residual":
            ratio = (-idiff.VPSDE().lam(t)).exp()
            t = (ratio / 0.01).log() / math.log(300)
        assert (16 * t - 1e-3).floor().tolist() == list(range(16))
        places.append(16 * t % 1)
    places = torch.cat(places)
    assert 0.4 < places.mean() < 0.6 and places.min() < 0.05 and places.max() > 0.95


def test_kl_waits_for_the_decoder():
    """While encoder and prior learn alone nothing would hold q(z|x) narrow."""
    cfg = small_cfg(settle=0.5, kl=0.1, rec=2.0)
    terms = {name: torch.tensor(1.0) for name in ("ddpm", "rec", "kl", "contrast")}
    weights = idiff.IDiff(cfg).weights
    assert float(train.total_loss(terms, weights(True))[0]) == pytest.approx(1 + 2 + cfg.contrast)
    assert float(train.total_loss(terms, weights())[0]) == pytest.approx(1 + 2.1 + cfg.contrast)


def test_the_average_keeps_statistics_that_are_no_weights():
    model, ema = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    model(torch.rand(8, 3))
    train.average(ema, model, 0.5)
    assert same(dict(ema.named_buffers()), dict(model.named_buffers()))


def test_the_learning_rate_rises_and_falls():
    cfg = small_cfg(steps=1000)
    shares = [train.rate_share(cfg, step) for step in (0, 49, 500, 750, 1000)]
    cosine = [math.cos(math.pi * x / 2) ** 2 for x in (0, 0.049, 0.5, 0.75, 1)]
    assert shares == pytest.approx([a * b for a, b in zip((0.01, 0.5, 1, 1, 1), cosine)])
    assert train.rate_share(small_cfg(schedule="constant"), 399) == 1


def test_validation_draws_the_same_whatever_the_seed(tiny_run, tiny_npz):
    model = load_checkpoint(tiny_run / "ckpt.pt")
    data = load_data(tiny_npz)
    first = train.fresh_draws(model, data)
    model.cfg = replace(model.cfg, seed=5)
    assert train.fresh_draws(model, data) == first


def test_muon_moves_the_matrices_of_decoder_and_unet_alone():
    model, _, (adamw, muon) = train.build(idiff.Config(), torch.device("cpu"))
    moved = {id(p) for group in muon.param_groups for p in group["params"]}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not moved & others
    for name, p in model.named_parameters():
        is_drawn = name.startswith(("decoder", "unet"))
        assert id(p) in (moved if is_drawn and p.dim() > 1 else others)


def test_muon_steps_by_its_rate_along_the_mean_gradient():
    """A tall matrix by the root of its shape's ratio more; one gradient does not turn the mean."""
    for shape, size in (((40, 5), 8**0.5), ((5, 40), 1)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        w = torch.zeros(shape, requires_grad=True)
        optimizer = train.Muon([w], lr=0.1)
        for k in range(6):
            before = w.detach().clone()
            w.grad = gradient if k < 5 else -0.5 * gradient
            optimizer.step()
        step = w.detach() - before
        assert (step * gradient).sum() < 0
        assert torch.linalg.matrix_norm(step, 2) == pytest.approx(0.1 * size, rel=0.3)


def test_muons_momentum_is_nine_tenths():
    """After ten equal gradients the fifth opposite one turns the step: 0.9^k (2 - 0.9^10) < 1."""
    gradient = torch.eye(4)
    w = torch.zeros(4, 4, requires_grad=True)
    optimizer = train.Muon([w], lr=0.1)
    upwards = []
    for k in range(15):
        before = w[0, 0].item()
        w.grad = gradient if k < 10 else -gradient
        optimizer.step()
        upwards.append(w[0, 0].item() > before)
    assert upwards == [False] * 10 + [False] * 4 + [True]


@torch.no_grad()
def test_the_elbo_is_that_of_a_gaussian_decoder(shapes3d):
    cfg = small_cfg()
    result = train.fresh_draws(train.build(cfg, shapes3d.device)[0], shapes3d, n=256)
    deviation = result["rec"] ** 0.5
    density = torch.distributions.Normal(0.0, deviation)
    errors = torch.full((3 * 64 * 64,), deviation)
    assert result["elbo"] == pytest.approx(float(density.log_prob(errors).sum()) - result["kl"])
    assert result["kl"] > 0


# ---- what the U-Net is given, and when it learns ----


def seen_by_the_unet(model, batch, n_rec):
    """z and x_hat that forward gives the U-Net, and the terms."""
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[2:]))
    terms = model(*batch, n_rec)
    hook.remove()
    return *seen, terms


@pytest.mark.parametrize("condition", ["mean", "sample"])
def test_the_unet_is_given_what_it_is_given_in_use(shapes3d, condition):
    """q's mean and the decoder's image of it, from which neither encoder nor decoder learns; every
    fourth z is moved away, its image is not. The paper's is a sample, through which the encoder
    learns. The decoder's own loss is of samples."""
    cfg = small_cfg(condition=condition)
    model = train.build(cfg, shapes3d.device)[0]
    for parameter in model.unet.head.mix.parameters():
        torch.nn.init.normal_(parameter)                       # they start at 0
    batch = train.draw_batch(model, shapes3d, 0)
    z, x_hat, terms = seen_by_the_unet(model, batch, 2)
    mean = model.encode(batch[0])[0][:4]
    if condition == "mean":
        assert torch.equal(z[1:], mean[1:]) and (z[0] != mean[0]).all()
        torch.testing.assert_close(x_hat, model.decode(mean))
    else:
        assert (z != mean).all()
        torch.testing.assert_close(x_hat, model.decode(z))

    terms["ddpm"].backward(retain_graph=True)
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"unet"} | ({"encoder"} if condition == "sample" else set())
    of_means = (model.decode(mean[:2]) - batch[0][:2]).square().mean()
    assert terms["rec"] != of_means


def test_the_unet_learns_last_on_an_ivae_that_stands_still(tiny_npz, tmp_path):
    """The iVAE learns as one without a U-Net does; then its averaged weights stay."""
    argv = [*TINY, "--data", tiny_npz, "--settle", "0.5", "--unmix", "0", "--save-every", "1"]
    train.main([*argv, "--steps", "9", "--unet-share", "0.34", "--out", str(tmp_path / "both")])
    train.main([*argv, "--steps", "6", "--model", "ivae", "--out", str(tmp_path / "ivae")])
    both, ivae = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("both", "ivae"))
    for weights in (both["model"], both["ema"]):
        assert same(parts_of(weights), parts_of(ivae["ema"]))
    no_terms = {"step", "seconds", "gradient norm", "held-out contrast"}
    terms = [set(r) - no_terms for r in steps_of(tmp_path / "both")]
    assert terms == 3 * [{"contrast"}] + 3 * [{"kl", "rec", "contrast"}] + 3 * [{"ddpm"}]


def test_each_stage_has_a_rate_that_rises_and_falls():
    cfg = small_cfg(steps=3000, unet_share=1 / 3)
    assert cfg.ivae_steps == 2000 and cfg.unet_from == 2000
    ivae, unet = small_cfg(steps=2000), small_cfg(steps=1000)
    for step in (0, 50, 1999):
        assert train.rate_share(cfg, step) == train.rate_share(ivae, step)
    for step in (0, 50, 999):
        assert train.rate_share(cfg, 2000 + step) == train.rate_share(unet, step)


def test_the_rate_of_muons_weights_rises_when_they_begin_to_learn(tiny_npz, monkeypatch):
    """Decoder and U-Net wait while the encoder settles; the encoder's own rate goes on falling.

    Their averages begin anew there, or a share of their first weights would remain.
    """
    data = idiff.load_data(tiny_npz)
    cfg = train.recipe(data, steps=2000, model="ivae", settle=0.4, batch_size=4, rec_images=2)
    model, ema, optimizers = train.build(cfg, data.device)
    adamw, muon = optimizers
    decays, rates = [], []
    monkeypatch.setattr(train, "average", lambda ema, model, decay: decays.append(decay))
    for step in (800, 800 + 99, 800 + 600):
        train.train_step(cfg, model, ema, optimizers, train.draw_batch(model, data, step), step)
        rates.append((adamw.param_groups[0]["lr"] / cfg.lr, muon.param_groups[0]["lr"] / cfg.muon))
    wave = [0.5 + 0.5 * math.cos(math.pi * x) for x in (800 / 2000, 899 / 2000, 0.7)]
    late = [0.5 + 0.5 * math.cos(math.pi * x) for x in (0, 99 / 1200, 0.5)]
    assert rates == [pytest.approx((a, b * up)) for a, b, up in zip(wave, late, (0.01, 1, 1))]
    assert decays == [1 / 10, 100 / 109, 601 / 610]


def test_a_batch_holds_what_its_stage_needs(shapes3d):
    """Times and noise for the U-Net alone; where it learns alone, no image that it does not see."""
    cfg = small_cfg(steps=10, settle=0.5, unet_share=0.4)
    model = idiff.IDiff(cfg)
    counts = []
    for step in (0, 5, 6, 9):
        counts.append([len(part) for part in train.draw_batch(model, shapes3d, step)])
    assert counts == 2 * [[8, 8, 0, 0]] + 2 * [[4, 4, 4, 4]]


def test_categories_sharpen_until_the_ivae_stands_still(tiny_npz, tmp_path, monkeypatch):
    """The temperature falls from 1 to 0.3 while the iVAE learns, and stays there."""
    temperatures = []
    step = train.train_step

    def recorded(cfg, model, *args):
        temperatures.append(model.encoder.temperature)
        return step(cfg, model, *args)
    monkeypatch.setattr(train, "train_step", recorded)
    train.main([*TINY, "--data", tiny_npz, "--latent", "gumbel", "--categories", "3",
                "--unet-share", "0.34", "--steps", "6", "--out", str(tmp_path)])
    assert temperatures == pytest.approx([0.3**share for share in (0, 0.25, 0.5, 0.75, 1, 1)])


def test_the_unets_steps_come_on_top_of_the_epochs(shapes3d):
    cfg = train.recipe(shapes3d)
    assert cfg.ivae_steps == train.recipe(shapes3d, model="ivae").steps == 5625
    assert cfg.steps == 7500 and cfg.epochs == 1.5
    assert train.recipe(shapes3d, steps=80).ivae_steps == 60


def test_a_run_resumed_in_the_unets_stage_ends_as_if_undisturbed(tiny_npz, tmp_path):
    data = load_data(tiny_npz)
    cfg = train.recipe(data, steps=8, width=8, unet_width=8, batch_size=8, latent_dim=2,
                       ddpm_images=2, unet_share=0.5, unmix=0)
    train.run(cfg, data, str(tmp_path / "whole"))
    for stop in (4, 6):
        out = str(tmp_path / f"run{stop}")
        with cut_off_after(stop):
            train.run(cfg, data, out, save_every=2)
        train.run(cfg, data, resume=f"{out}/ckpt.pt")
        a, b = (read_checkpoint(f"{run}/ckpt.pt") for run in (tmp_path / "whole", out))
        assert all(same(a[part], b[part]) for part in ("model", "ema", "optimizers"))


# ---- a U-Net on a frozen iVAE ----

IVAE = ("encoder", "prior", "decoder")
UNET = "--unet-width 8 --batch-size 4 --device cpu --size small --log-every 1".split()


@pytest.fixture(scope="module")
def full_ivae(tmp_path_factory, tiny_npz):
    """Checkpoint of an iVAE unlike the defaults, with a prior that has weights."""
    out = tmp_path_factory.mktemp("frozen") / "ivae"
    train.main([*TINY, "--data", tiny_npz, "--model", "ivae", "--prior", "full", "--u", "var",
                "--patch", "2", "--steps", "3", "--out", str(out)])
    return str(out / "ckpt.pt")


def parts_of(weights, names=IVAE):
    return {k: v for k, v in weights.items() if k.split(".")[0] in names}


def test_frozen_ivae_never_changes_and_the_unet_learns_from_the_denoising_term(
        full_ivae, tmp_path, capsys):
    """Also where the flags weigh the other terms; the resumed run equals the whole one."""
    ckpt = read_checkpoint(full_ivae)
    unets = {}
    for name, flags in {"bare": "--steps 4", "weighed": "--steps 4 --kl 9 --rec 9"}.items():
        train.main([*UNET, "--freeze-ivae", full_ivae, *flags.split(), "--out",
                    str(tmp_path / name)])                             # on the iVAE's data
        content = read_checkpoint(str(tmp_path / name / "ckpt.pt"))
        for weights in (content["model"], content["ema"]):
            assert same(parts_of(weights), parts_of(ckpt["ema"]))
        unets[name] = parts_of(content["model"], ["unet"])
        assert content["config"]["latent_dim"] == 3 and content["config"]["model"] == "idiff"
    assert not same(parts_of(ckpt["model"]), parts_of(ckpt["ema"]))    # or the above says little
    assert unets["bare"] and same(unets["bare"], unets["weighed"])
    assert f"frozen iVAE of {full_ivae}" in capsys.readouterr().out.splitlines()[0]


def test_a_frozen_encoder_with_batch_norm_keeps_its_means(tiny_npz, tmp_path, monkeypatch):
    class Encoder(idiff.Encoder):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.net.insert(2, torch.nn.BatchNorm2d(cfg.width))
    monkeypatch.setattr(idiff, "Encoder", Encoder)
    train.main([*TINY, "--data", tiny_npz, "--model", "ivae", "--steps", "3",
                "--out", str(tmp_path / "ivae")])
    train.main([*UNET, "--freeze-ivae", str(tmp_path / "ivae" / "ckpt.pt"), "--steps", "3",
                "--out", str(tmp_path / "frozen")])
    ckpt, frozen = (read_checkpoint(tmp_path / run / "ckpt.pt") for run in ("ivae", "frozen"))
    assert same(parts_of(frozen["model"]), parts_of(ckpt["ema"]))


def test_a_resumed_run_stays_frozen_without_the_first_checkpoint(full_ivae, tiny_npz, tmp_path,
                                                                 capsys):
    gone, whole, out = (str(tmp_path / name) for name in ("gone.pt", "whole", "run"))
    shutil.copy(full_ivae, gone)
    argv = [*UNET, "--data", tiny_npz, "--freeze-ivae", gone, "--schedule", "constant"]
    train.main([*argv, "--steps", "4", "--out", whole])
    train.main([*argv, "--steps", "2", "--out", out])
    Path(gone).unlink()
    four, content = (read_checkpoint(f"{run}/ckpt.pt") for run in (whole, out))
    content["config"] = four["config"]                                 # goes on to step 4
    torch.save(content, f"{out}/ckpt.pt")
    capsys.readouterr()
    train.main(["--resume", f"{out}/ckpt.pt", "--device", "cpu"])
    assert f"frozen iVAE of {gone}" in capsys.readouterr().out.splitlines()[0]
    resumed = read_checkpoint(f"{out}/ckpt.pt")
    for part in ("model", "ema", "optimizers", "step"):
        assert same(four[part], resumed[part]), part
    assert same(parts_of(resumed["model"]), parts_of(read_checkpoint(full_ivae)["ema"]))


def test_an_ivae_given_in_python_stays_frozen_when_its_run_goes_on(full_ivae, tmp_path):
    ivae, data = idiff.open_checkpoint(full_ivae)
    cfg = train.recipe(data, ivae=ivae, steps=4, unet_width=8, batch_size=4)
    with cut_off_after(2):
        train.run(cfg, data, str(tmp_path / "run"), ivae, save_every=2)
    train.run(cfg, data, str(tmp_path / "run"))
    content = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert content["step"] == 4
    assert same(parts_of(content["model"]), parts_of(read_checkpoint(full_ivae)["ema"]))


@pytest.mark.parametrize("flags, named", [
    ("--latent-dim 4", "latent_dim 3"), ("--prior known", "prior full"),
    ("--prior-mean learned", "prior_mean auto"),
    ("--model ivae", "model idiff"), ("--data dsprites", "image_size 16")])
def test_what_contradicts_a_frozen_ivae_is_named(full_ivae, tiny_npz, tmp_path, capsys, flags,
                                                 named):
    out = tmp_path / "run"
    text = refusal([*UNET, "--data", tiny_npz, "--freeze-ivae", full_ivae, "--out", str(out),
                    *flags.split()], capsys)
    assert full_ivae in text and named in text and not out.exists()


def test_a_vae_is_not_frozen(tiny_npz, tmp_path, capsys):
    """Its prior says nothing of u."""
    train.main([*TINY, "--data", tiny_npz, "--model", "vae", "--steps", "1", "--out",
                str(tmp_path / "vae")])
    path = str(tmp_path / "vae" / "ckpt.pt")
    text = refusal([*UNET, "--data", tiny_npz, "--freeze-ivae", path], capsys)
    assert path in text and "VAE" in text


def test_a_missing_checkpoint_is_not_frozen_nor_a_resumed_run(full_ivae, tiny_npz, capsys):
    assert "no_such.pt" in refusal([*UNET, "--data", tiny_npz, "--freeze-ivae", "no_such.pt"],
                                   capsys)
    assert "--resume" in refusal(["--resume", full_ivae, "--freeze-ivae", full_ivae], capsys)


# ---- stop and resume ----


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def stopped(request, tiny_npz, tmp_path, monkeypatch):
    """A run of four steps, at whose second a signal comes; what it said is in its text."""
    save = idiff.save_checkpoint

    def save_then_press(path, model, ema, **state):
        save(path, model, ema, **state)
        if state["step"] == 2:
            signal.raise_signal(request.param)
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(idiff, "save_checkpoint", save_then_press)
        train.main([*TINY, "--data", tiny_npz, "--steps", "4", "--save-every", "2",
                    "--out", str(out)])
    return out, str(end.value.code)


def test_two_steps_and_two_resumed_equal_four(stopped, tiny_run):
    out, text = stopped
    path = str(out / "ckpt.pt")
    assert read_checkpoint(path)["step"] in (2, 3) and f"--resume {path}" in text
    train.main(["--resume", path, "--device", "cpu", "--log-every", "1"])
    whole, resumed = (read_checkpoint(str(run / "ckpt.pt")) for run in (tiny_run, out))
    assert whole["step"] == resumed["step"] == 4
    for part in ("config", "model", "ema", "optimizers"):
        assert same(whole[part], resumed[part]), part
    of_saves = ("seconds", "held-out contrast")
    logs = [[{k: v for k, v in r.items() if k not in of_saves} for r in log_of(run)]
            for run in (tiny_run, out)]
    assert logs[0] == logs[1]


def test_a_notebooks_own_handlers_are_back_after_a_run(tiny_npz, tmp_path, monkeypatch):
    """Whether the run ends well, is stopped or fails."""
    def own(*_):
        raise AssertionError

    def fails(*_, **named):
        raise OSError("disk full")

    def stopped(*_):
        signal.raise_signal(signal.SIGTERM)
        return {"rec": torch.tensor(0.0)}
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, own) for number in signals]
    try:
        argv = [*TINY, "--data", tiny_npz, "--steps", "1", "--out"]
        train.main([*argv, str(tmp_path / "whole")])
        assert all(signal.getsignal(number) is own for number in signals)
        with pytest.raises(SystemExit), monkeypatch.context() as patch:
            patch.setattr(train, "train_step", stopped)
            train.main([*argv, str(tmp_path / "stopped")])
        assert all(signal.getsignal(number) is own for number in signals)
        with pytest.raises(SystemExit, match="disk full"), monkeypatch.context() as patch:
            patch.setattr(idiff, "save_checkpoint", fails)
            train.main([*argv, str(tmp_path / "failed")])
        assert all(signal.getsignal(number) is own for number in signals)
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


@pytest.mark.usefixtures("pictures")
def test_a_thread_may_train(tiny_npz, tmp_path):
    argv = [*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(tmp_path)]
    thread = threading.Thread(target=train.main, args=(argv,))
    thread.start()
    thread.join()
    assert (tmp_path / "ckpt.pt").is_file() and (tmp_path / "samples.png").is_file()


def test_ctrl_c_in_a_terminal_saves(tiny_npz, tmp_path):
    out = tmp_path / "run"
    argv = [sys.executable, "train.py", *TINY, "--data", tiny_npz, "--steps", "1000000",
            "--out", str(out)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as run:
        wait_for_steps(out / "log.jsonl", lambda: run.poll() is not None)
        run.send_signal(signal.SIGINT)
        _, shown = run.communicate(timeout=60)
    assert "Traceback" not in shown and f"--resume {out}/ckpt.pt" in shown.splitlines()[-1]
    content = read_checkpoint(str(out / "ckpt.pt"))
    assert content["step"] == steps_of(out)[-1]["step"] > 3


def test_resuming_a_finished_run_changes_nothing(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / "copy")
    train.main(["--resume", str(out / "ckpt.pt"), "--device", "cpu"])
    assert same(read_checkpoint(str(out / "ckpt.pt")), read_checkpoint(str(tiny_run / "ckpt.pt")))
    assert log_of(out) == log_of(tiny_run)


def test_checkpoint_alone_can_be_resumed(stopped, tmp_path):
    """Someone may copy ckpt.pt to another machine, and leave the log behind."""
    (tmp_path / "alone").mkdir()
    path = shutil.copy(stopped[0] / "ckpt.pt", tmp_path / "alone")
    train.main(["--resume", str(path), "--device", "cpu"])
    assert read_checkpoint(str(path))["step"] == 4


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
        tiny_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "held_out_contrast", lambda *_: 0.0)    # it would tell earlier
    text = refusal([*TINY, "--data", tiny_npz, "--lr", "1e12", "--steps", "50", "--save-every", "1",
                    "--out", str(tmp_path)], capsys)
    assert any(term in text for term in ("ddpm", "rec", "kl", "gradient")) and "step" in text
    content = read_checkpoint(str(tmp_path / "ckpt.pt"))
    assert content["step"] == steps_of(tmp_path)[-1]["step"] < 50
    assert all(torch.isfinite(v).all() for v in content["model"].values())
    assert all(math.isfinite(v) for r in steps_of(tmp_path) for v in r.values())


# ---- bad input ----


@pytest.mark.parametrize("flags, named", [
    ("--kl -1", "kl"), ("--rec -0.5", "rec"), ("--kl nan", "kl"), ("--batch-size 0", "batch_size"),
    ("--batch-size many", "--batch-size"), ("--batch-size 1.5", "--batch-size"), ("--lr inf", "lr"),
    ("--latent-dim 0", "latent_dim"), ("--unet-width 12", "unet_width"), ("--u-scale 1", "u_scale"),
    ("--model gan", "--model"), ("--size huge", "--size"), ("--no-such-flag", "--no-such-flag"),
    ("--batch 4", "--batch"), ("leftover", "leftover"), ("--save-every 0", "--save-every"),
    ("--log-every -1", "--log-every"), ("--device nonsense", "nonsense"),
    ("--device cuda:99", "cuda:99"), ("--data no_such.npz", "no_such.npz"),
    ("--batch-size 30000000000000000000", "batch_size"),
    ("--resume no_such.pt", "no_such.pt"), ("--seed -1", "seed"),
    ("--seed 99999999999999999999", "seed")])
def test_bad_flag_is_named_in_one_line_and_leaves_no_folder(tiny_npz, tmp_path, capsys, flags,
                                                            named):
    out = tmp_path / "run"
    text = refusal([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(out), *flags.split()],
                   capsys)
    assert named.replace("_", "-").strip("-") in text.replace("_", "-")
    assert not out.exists()


def test_cuda_where_there_is_none(tiny_npz, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    text = refusal([*TINY, "--data", tiny_npz, "--device", "cuda"], capsys)
    assert "cuda" in text and "--device cpu" in text


def test_a_batch_beyond_memory_is_one_line_with_a_remedy(tiny_npz, tmp_path, capsys):
    text = refusal([*TINY, "--data", tiny_npz, "--steps", "1", "--batch-size", str(10**12),
                    "--out", str(tmp_path / "run")], capsys)
    assert "memory" in text and "--batch-size" in text


def test_out_that_is_a_file_is_named(tiny_npz, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (file, file / "below"):
        text = refusal([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(out)], capsys)
        assert str(file) in text
    assert file.read_text() == "precious"


@pytest.mark.parametrize("missing", ["samples.png", "log.jsonl"])
def test_out_that_holds_another_run_is_not_written_over(tiny_npz, tiny_run, tmp_path, capsys,
                                                        missing):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / missing).unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in run.iterdir()}
    text = refusal([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(run)], capsys)
    assert str(run) in text and "--resume" in text and "steps 4" in text
    assert before == {path: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize("shape", [(24, 16, 16, 4), (24, 16, 32, 3)])
def test_images_of_an_unfit_shape_are_refused(tmp_path, capsys, shape):
    np.savez(tmp_path / "odd.npz", images=np.zeros(shape, np.uint8), factors=np.arange(24)[:, None])
    data, out = tmp_path / "odd.npz", tmp_path / "run"
    text = refusal([*TINY, "--data", str(data), "--out", str(out)], capsys)
    assert str(shape[1]) in text and not out.exists()


def test_data_in_which_nothing_varies_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "same.npz", images=np.zeros((4, 16, 16, 3), np.uint8),
             factors=np.zeros((4, 2), int))
    assert "factor" in refusal([*TINY, "--data", str(tmp_path / "same.npz")], capsys)


def test_what_cannot_be_resumed_is_named(tiny_run, tiny_npz, tmp_path, capsys):
    bad = tmp_path / "bad.pt"
    bad.write_bytes((tiny_run / "ckpt.pt").read_bytes()[:5000])        # truncated
    assert str(bad) in refusal(["--resume", str(bad)], capsys)
    torch.save({"weights": torch.zeros(2)}, bad)                       # somebody else's
    assert str(bad) in refusal(["--resume", str(bad)], capsys)
    model = load_checkpoint(str(tiny_run / "ckpt.pt"))                 # without the optimiser
    save_checkpoint(str(bad), model, model)
    assert str(bad) in refusal(["--resume", str(bad)], capsys)
    model.info = {}                                                    # without the data's name
    save_checkpoint(str(bad), model, model)
    assert str(bad) in refusal(["--resume", str(bad)], capsys)


def test_resuming_without_the_data_names_them(tiny_run, tmp_path, capsys):
    content = torch.load(tiny_run / "ckpt.pt", weights_only=True)
    content["info"]["data_arg"] = str(tmp_path / "gone.npz")
    torch.save(content, tmp_path / "ckpt.pt")
    assert "gone.npz" in refusal(["--resume", str(tmp_path / "ckpt.pt")], capsys)


def test_data_that_moved_are_found_after_a_run_resumed_with_them(tiny_run, tiny_npz, tmp_path):
    content = torch.load(tiny_run / "ckpt.pt", weights_only=True)
    content["info"]["data_arg"] = str(tmp_path / "gone.npz")
    content["step"] = 2
    torch.save(content, tmp_path / "ckpt.pt")
    moved = str(shutil.copy(tiny_npz, tmp_path / "moved.npz"))
    train.main(["--resume", str(tmp_path / "ckpt.pt"), "--data", moved, "--device", "cpu"])
    assert load_checkpoint(str(tmp_path / "ckpt.pt")).info["data_arg"] == moved


def test_in_a_terminal_an_error_is_one_line_and_a_status(tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--data", "no_such.h5", "--device", "cpu",
                           "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no_such.h5" in done.stderr


def test_in_pythons_development_mode_an_error_says_where_it_arose(tmp_path):
    done = subprocess.run([sys.executable, "-X", "dev", "train.py", "--data", "no_such.h5",
                           "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "in load_data" in done.stderr and "no_such.h5" in done.stderr


def test_resume_with_images_of_other_channels_says_so(tmp_path, tiny_npz):
    train.main([*TINY, "--data", str(tiny_npz), "--steps", "1", "--out", str(tmp_path / "run")])
    with np.load(tiny_npz) as arrays:
        np.savez(tmp_path / "grey.npz", images=arrays["images"][..., :1], factors=arrays["factors"])
    with pytest.raises(SystemExit, match="was trained on other data than"):
        train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--data",
                    str(tmp_path / "grey.npz"), "--device", "cpu"])


def test_a_term_of_no_weight_may_overflow(tmp_path, tiny_npz, monkeypatch):
    def overflowing(model, *batch, **named):
        return {**forward(model, *batch, **named), "kl_reverse": torch.tensor(math.inf)}
    forward = idiff.IDiff.forward
    monkeypatch.setattr(idiff.IDiff, "forward", overflowing)
    argv = [*TINY, "--data", str(tiny_npz), "--steps", "3", "--model", "ivae"]
    train.main([*argv, "--out", str(tmp_path / "run")])
    assert all("rec" in r and "kl_reverse" not in r for r in steps_of(tmp_path / "run"))
    with pytest.raises(SystemExit, match="not finite"):
        train.main([*argv, "--kl-reverse", "1", "--out", str(tmp_path / "other")])


@pytest.mark.usefixtures("pictures")
def test_losses_of_an_ivae_are_drawn_though_none_is_the_unets(tmp_path):
    """A contrast below 0 has no logarithm, and where only one panel is empty none is drawn."""
    more = {"gradient norm": 1, "seconds": 0}
    records = [{"config": {}},
               {"step": 20, "contrast": -0.1, **more},
               {"step": 40, "kl": 2, "contrast": -0.2, "rec": 0.1, **more},
               {"step": 60, "kl": 1, "contrast": -0.3, "rec": 0.2, **more},
               {"step": 60, "validation": {"elbo": -1}}]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    train.draw_losses(tmp_path / "losses.png", tmp_path)
    assert (tmp_path / "losses.png").is_file()


def test_a_torchvision_that_does_not_fit_costs_the_grids_and_is_told_in_a_line(tmp_path, tiny_npz):
    """One made for another torch raises as it is imported."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")')
    argv = [*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    [told] = [line for line in done.stderr.splitlines() if "samples.png is missing" in line]
    assert "torchvision does not fit torch" in told and "requirements.txt" in told
    assert (tmp_path / "run" / "losses.png").exists()


# ---- data of one's own ----


def write_own(path, **arrays):
    """Images of 28 x 28 grey pixels, and what else is given."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(path, **{"images": images} | arrays)
    return str(path)


def test_own_u_trains_and_draws_without_factors(tmp_path, capsys):
    """28 x 28 grey as it is; u by default the file's; latents by what they tell of it."""
    u = np.insert(np.eye(4)[np.arange(40) % 4], 2, 0.1, axis=1)        # one column is constant
    out, path = tmp_path / "run", write_own(tmp_path / "a.npz", u=u)
    train.main([*TINY, "--data", path, "--steps", "2", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert "40 images (1, 32, 32); own u: 4 varying columns, 20 images held out; factors: none" in lines[1]
    assert "28, 28" in lines[2] and "32 x 32" in lines[2]
    cfg = config_of(out)
    assert (cfg["u"], cfg["n_u"], cfg["n_factors"], cfg["image_size"]) == ("own", 5, 0, 32)
    assert "contrast" in steps_of(out)[0]
    interpolate.main([str(out / "ckpt.pt"), "--columns", "2", "--steps", "1", "--device", "cpu"])
    assert {"z0", "z1", "z2"} == set(capsys.readouterr().out.split(";")[0].split(", "))
    train.main(["--resume", str(out / "ckpt.pt"), "--device", "cpu"])
    train.main([*UNET, "--freeze-ivae", str(out / "ckpt.pt"), "--steps", "1",
                "--out", str(tmp_path / "frozen")])


def test_sizes_stand_for_the_factors_of_a_full_grid(tiny_npz, tmp_path, capsys):
    """Its images alone train as with the factors listed, and all scripts know the sizes again."""
    images = np.load(tiny_npz)["images"]
    np.savez(tmp_path / "a.npz", images=images)
    flags = [*TINY, "--steps", "2"]
    sized = ["--data", str(tmp_path / "a.npz"), "--factor-sizes", "4,3,2"]
    train.main([*flags, "--data", tiny_npz, "--out", str(tmp_path / "listed")])
    train.main([*flags, *sized, "--out", str(tmp_path / "sized")])
    listed, found = (steps_of(tmp_path / name)[0] for name in ("listed", "sized"))
    assert {**listed, "seconds": 0} == {**found, "seconds": 0}

    checkpoint = str(tmp_path / "sized" / "ckpt.pt")
    train.main(["--resume", checkpoint, "--device", "cpu"])
    evaluate.main([checkpoint, "--no-dci"])
    interpolate.main([checkpoint, "--columns", "2", "--steps", "1"])
    train.main([*UNET, "--freeze-ivae", checkpoint, "--steps", "1", "--out", str(tmp_path / "f")])
    evaluate.main([str(tmp_path / "f" / "ckpt.pt"), "--no-dci"])
    report = json.loads((tmp_path / "f" / "metrics.json").read_text())
    assert list(report["per_factor"]) == ["factor 0", "factor 1", "factor 2"]
    assert "trained on" not in capsys.readouterr().err         # the same data to all


@pytest.mark.parametrize("sizes, told", [
    ("4,3", "--factor-sizes (4, 3) are of 12 images, but images are (24, "),
    ("1099511627776", "--factor-sizes (1099511627776,) are of 1099511627776 images, but images"),
    ("4,a", "invalid sizes value: '4,a'"), ("4,-3,-2", "invalid sizes value: '4,-3,-2'"),
    ("", "invalid sizes value: ''"), ("4,3,2 --data dsprites", "is for .npz and .h5 files without factors"),
    ("2,3,4 --data TINY", "is for .npz and .h5 files without factors")])
def test_sizes_that_cannot_be_are_refused_in_one_line(tiny_npz, tmp_path, capsys, sizes, told):
    np.savez(tmp_path / "a.npz", images=np.load(tiny_npz)["images"])
    text, *data = sizes.replace("TINY", tiny_npz).split(" --data ")
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--data", *(data or [str(tmp_path / "a.npz")]),
                    f"--factor-sizes={text}", "--steps", "1", "--out", str(tmp_path / "run")])
    assert told in f"{end.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


def test_own_u_beside_factors_is_the_default_and_can_be_left(tmp_path):
    path = write_own(tmp_path / "a.npz", u=np.arange(40.0), factors=np.arange(40) % 5)
    for name, flags in {"own": [], "var": ["--u", "var"]}.items():
        train.main([*TINY, "--data", path, *flags, "--model", "ivae", "--steps", "1",
                    "--out", str(tmp_path / name)])
        assert config_of(tmp_path / name)["u"] == name
        evaluate.main([str(tmp_path / name / "ckpt.pt"), "--no-dci"])


def test_images_alone_train_a_vae_and_nothing_else(tmp_path, capsys):
    path = write_own(tmp_path / "a.npz")
    train.main([*TINY, "--data", path, "--model", "vae", "--steps", "1",
                "--out", str(tmp_path / "vae")])
    out = tmp_path / "run"
    for flags in ([], ["--u", "own"], ["--u", "var"]):
        text = refusal([*TINY, "--data", path, *flags, "--out", str(out)], capsys)
        assert "--model vae" in text and not out.exists()
    assert interpolate.main([str(tmp_path / "vae" / "ckpt.pt"), "--columns", "2"])


@pytest.mark.parametrize("flags, word", [
    (["--prior", "known"], "prior 'full'"),
    (["--image-size", "20"], "multiple of 16"),
    (["--image-size", "1600000000"], "65536"), (["--u", "mean+var"], "u 'mean+var'")])
def test_what_does_not_go_with_own_u_is_refused(tmp_path, capsys, flags, word):
    path = write_own(tmp_path / "a.npz", u=np.arange(40.0))
    assert word in refusal([*TINY, "--data", path, *flags, "--out", str(tmp_path / "run")], capsys)


def test_image_size_resizes_files_alone(tmp_path, capsys):
    path = write_own(tmp_path / "a.npz", u=np.arange(40.0))
    train.main([*TINY, "--data", path, "--image-size", "16", "--steps", "1",
                "--out", str(tmp_path / "run")])
    assert config_of(tmp_path / "run")["image_size"] == 16
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt"), "--device", "cpu"])
    text = refusal([*TINY, "--data", "dsprites", "--image-size", "16"], capsys)
    assert "--image-size" in text and "64" in text


def test_first_lines_tell_what_the_data_hold(tmp_path, capsys):
    factors = np.stack([np.arange(40) % 4, (np.arange(40) % 5) / 2], axis=1)
    path = write_own(tmp_path / "a.npz", factors=factors, factor_names=["shape", "size"])
    train.main([*TINY, "--data", path, "--steps", "1", "--out", str(tmp_path / "run")])
    line = capsys.readouterr().out.splitlines()[1]
    assert "40 images (1, 32, 32)" in line and "u: no" in line
    assert "shape 4 (0.0 to 3.0)" in line and "size 5 (0.0 to 2.0)" in line


def test_resuming_on_changed_data_is_refused_and_a_moved_folder_goes_on(tmp_path, capsys,
                                                                        monkeypatch):
    """A relative path holds where the run was started; a changed file is not the run's."""
    monkeypatch.chdir(tmp_path)
    write_own("a.npz", factors=np.arange(40) % 5)
    train.main([*TINY, "--data", "a.npz", "--steps", "1", "--out", "run"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", "../run/ckpt.pt", "--device", "cpu"])
    write_own("../a.npz", factors=np.arange(40)[::-1] % 5)
    assert "other data" in refusal(["--resume", "../run/ckpt.pt", "--device", "cpu"], capsys)
