# SPDX-License-Identifier: MIT
"""README's commands and its Python blocks do what they say, at tiny sizes."""
import importlib
import json
import math
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import idiff
import interpolate
import train
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text()
SMALL = {"train": "--steps 2 --width 8 --unet-width 8 --batch-size 4 --ddpm-images 2 --device cpu",
         "evaluate": "--no-dci --n 200 --device cpu", "interpolate": "--steps 2 --columns 3"}
SCRIPTS = {"idiff": idiff, "train": train, "evaluate": evaluate, "interpolate": interpolate}

# Where each block of the table of hacks begins.
HACKS = {"another U-Net": "**Another library's U-Net**",
         "another prior": "**A new prior**",
         "another data set": "**A data set by a function**",
         "another logger": "**Numbers to Weights & Biases**",
         "another encoder": "**Another encoder**",
         "another loss term": "**A loss term**",
         "v-prediction": "**v-prediction**",
         "another draw of u": "**Another draw of u**"}


def readme_commands():
    """The arguments of every "python train.py ..." and the like in README, script first."""
    found = re.findall(r"python ((?:train|evaluate|interpolate)\.py[^#`\n]*)", README)
    return list(dict.fromkeys(tuple(shlex.split(command)) for command in found))


def block_after(words):
    """The Python block of README that follows these words."""
    _, _, rest = README.partition(words)
    assert rest, words
    return re.search(r"```python\n(.*?)```", rest, re.DOTALL)[1]


def log_of(folder):
    """The records of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- what README names ----


@pytest.mark.parametrize("argv", readme_commands(), ids=" ".join)
def test_readme_command_parses(argv):
    importlib.import_module(argv[0].removesuffix(".py")).build_parser().parse_args(argv[1:])


def test_every_flag_is_one_of_the_scripts():
    known = {"--index-url", "--nproc-per-node", "--gpu", "--load"}   # pip, torchrun, bench_train.py
    for module in (train, evaluate, interpolate):
        known.update(module.build_parser()._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known


def test_every_function_and_class_is_there():
    names = re.findall(r"`((?:idiff|train|evaluate|interpolate)(?:\.\w+)+)`", README)
    names = [name for name in names if not name.endswith((".py", ".png"))]
    assert len(names) > 20
    for name in names:
        script, *path = name.split(".")
        thing = SCRIPTS[script]
        for part in path:
            thing = getattr(thing, part)


def test_hacks_have_as_many_lines_as_their_table_says():
    rows = re.findall(r"^\| (.*?) \| .* \| (\d+)(, .*)? \|$", README, re.MULTILINE)
    rows = {name.replace(" p(z\\|u)", ""): (int(n), link) for name, n, link in rows}
    assert {name for name, (_, link) in rows.items() if link} == HACKS.keys()
    for name, words in HACKS.items():
        assert len(block_after(words).splitlines()) == rows[name][0], name


# ---- what README types ----


def test_readme_commands_and_blocks_run_in_order(tmp_path, monkeypatch, shapes3d):
    """Those that need no file that README does not make."""
    report = evaluate.report

    def report_of_few(model, data, **how):                     # of a search's trials too
        return report(model, data, **{**how, "n": 200})
    monkeypatch.setattr(evaluate, "report", report_of_few)
    monkeypatch.setattr(idiff, "load_data", lambda *args: shapes3d)            # rendered once
    monkeypatch.chdir(tmp_path)
    for script, *flags in readme_commands():
        name = script.removesuffix(".py")
        if not re.search(r"NAME|\*|\.npz|\.json|digits", " ".join(flags)):
            one_trial = ["--trials", "1"] * ("--search" in flags)
            SCRIPTS[name].main([*flags, *SMALL[name].split(), *one_trial])

    Image.new("RGB", (90, 60), "red").save("photo.png")
    scope = {}
    exec(block_after("## From Python"), scope)
    assert scope["x"].shape == scope["x_hat"].shape == scope["x_new"].shape == (1, 3, 64, 64)
    assert scope["z"].shape == (1, 6)
    mean, _ = scope["model"].encode(scope["x"])
    torch.testing.assert_close(scope["z"] - mean, torch.eye(6)[4:5])


def test_example_of_ones_own_u_is_as_described(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block_after("have scales of their own in each of 20 segments"), {})
    data = idiff.load_data("my.npz")
    assert data.factor_sizes == (13, 13) and data.image_shape == (1, 16, 16)
    rows = torch.arange(0, 6000, 7)
    down, across = data.factors(rows).T
    expected = -torch.ones(len(rows), 1, 16, 16)
    for image, i, j in zip(expected, down, across):
        image[0, i:i + 4, j:j + 4] = 1
    assert torch.equal(data.images(rows), expected) and data.u.shape == (6000, 20)


def test_example_of_ones_own_u_trains_and_is_measured(tmp_path, monkeypatch):
    """README's own command on README's own file, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    exec(block_after("have scales of their own in each of 20 segments"), {})
    [flags] = [flags for script, *flags in readme_commands()
               if script == "train.py" and "my.npz" in flags and "ivae" in flags]
    train.main([*flags, "--steps", "2", "--width", "8", "--device", "cpu", "--out", "run"])
    assert idiff.load_checkpoint("run/ckpt.pt").cfg.u == "own"
    [report] = evaluate.main(["run/ckpt.pt", "--no-dci", "--n", "500", "--device", "cpu"])
    assert report["data"].startswith("my.npz") and 0 <= report["metrics"]["mig"] <= 1


@pytest.mark.usefixtures("pictures")
def test_example_of_digits_is_told_whether_seeds_agree(tmp_path, monkeypatch, capsys):
    """README's own commands on README's own file, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    exec(block_after("These are scikit-learn's"), {})
    small = {"train.py": "--steps 2 --width 8 --device cpu", "evaluate.py": "--device cpu",
             "interpolate.py": "--device cpu --columns 2"}
    commands = [(script, flags) for script, *flags in readme_commands()
                if any("digits" in flag for flag in flags)]
    assert [script for script, _ in commands] == ["train.py"] * 2 + ["evaluate.py",
                                                                     "interpolate.py"]
    for script, flags in commands:
        SCRIPTS[script.removesuffix(".py")].main([*flags, *small[script].split()])
    assert "Agreement with runs/digits-0/ckpt.pt" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-0" / "classes.png").exists()


def test_a_folder_is_listed_as_described(tmp_path):
    """By README's own header and row."""
    header, row = re.findall(r"`(file,\S+)`|`(\d\.png,\S+)`", README)
    Image.new("RGB", (90, 60), "red").save(tmp_path / row[1].split(",")[0])
    (tmp_path / "table.csv").write_text(f"{header[0]}\n{row[1]}\n")
    data = idiff.load_data(str(tmp_path))
    assert data.factor_names == ("label",) and data.u.shape == (1, 2)
    assert data.image_shape == (3, 64, 64)


def test_metrics_of_another_models_codes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [line] = re.findall(r"`(from evaluate import [\w, ]+)`", README)
    scope = {}
    exec(line, scope)
    factors = np.stack(np.unravel_index(np.arange(240) % 12, (4, 3)), axis=1)
    codes = factors.astype(float)
    assert scope["mig"](codes, factors) == pytest.approx(1)
    assert scope["dci"](codes, factors)["disentanglement"] == pytest.approx(1)
    np.savez("codes.npz", codes=codes, factors=factors)
    [report] = evaluate.main(["codes.npz"])
    assert report["metrics"]["mcc"] == scope["mcc"](codes, factors) == pytest.approx(1)


@pytest.mark.usefixtures("pictures")
def test_notebook_runs_twice_in_one_process(tmp_path, monkeypatch, tiny_npz):
    data = idiff.load_data(tiny_npz)
    recipe, report = train.recipe, evaluate.report
    small = dict(steps=2, width=8, unet_width=8, batch_size=8, ddpm_images=2, latent_dim=3)
    monkeypatch.setattr(idiff, "load_data", lambda *args: data)
    monkeypatch.setattr(train, "recipe", lambda data, **flags: recipe(data, **{**flags, **small}))
    monkeypatch.setattr(evaluate, "report", lambda *args: report(*args, trees=False))
    monkeypatch.chdir(tmp_path)

    block = block_after("measure and draw in a notebook")
    ends = []
    for folder in ("runs/idiff-s1", "runs/idiff-s1-2"):
        scope = {}
        exec(block, scope)
        assert scope["model"].info["out"] == folder and scope["cfg"].seed == 1
        ends.append((scope["report"]["metrics"], (tmp_path / "traversal.png").read_bytes()))
    assert ends[0] == ends[1]


# ---- the hacks ----


@pytest.fixture
def hacked(monkeypatch, tiny_npz, tmp_path):
    """A function words, flags -> the model trained and drawn after the block that follows words."""
    for name in ("ScoreUNet", "Encoder", "IDiff"):
        monkeypatch.setattr(idiff, name, getattr(idiff, name))             # put back at the end
    monkeypatch.setattr(train, "log", train.log)
    registers = (idiff.PRIORS, idiff.DATA_SETS, idiff.PREDICTIONS, idiff.U_KINDS)
    before = [dict(register) for register in registers]

    def hacked(words, *flags):
        exec(block_after(words), {"torch": torch, "idiff": idiff, "train": train})
        argv = [*TINY, "--steps", "3", "--out", str(tmp_path / "run"), *flags]
        train.main(argv if "--data" in flags else [*argv, "--data", tiny_npz])
        path = str(tmp_path / "run" / "ckpt.pt")
        evaluate.main([path, "--no-dci", "--n", "60", "--device", "cpu"])
        interpolate.main([path, "--columns", "3", "--steps", "2", "--device", "cpu"])
        return idiff.load_checkpoint(path)
    yield hacked
    for register, entries in zip(registers, before):
        register.clear()
        register.update(entries)


def test_the_file_of_ones_own_passes_its_flags_on(monkeypatch, tmp_path):
    block = block_after("## Hack it")
    monkeypatch.setattr(sys, "argv", ["mine.py", "evaluate", str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit, match="none.pt"):
        exec(block, {"__name__": "__main__"})


def test_a_run_of_ones_own_file_names_that_file(monkeypatch, tiny_npz, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "mine.py"), "train"])
    train.main([*TINY, "--data", tiny_npz, "--steps", "1", "--out", str(tmp_path / "run")])
    *_, evaluation, drawing = capsys.readouterr().out.splitlines()
    assert evaluation.split()[:3] == ["python", "mine.py", "evaluate"]
    assert drawing.split()[:3] == ["python", "mine.py", "interpolate"]


def test_hack_of_another_librarys_unet(hacked, monkeypatch):
    """Here a stand-in of its shape; tests/bench_train.py takes the library's own."""
    class UNet2DModel(torch.nn.Module):
        def __init__(self, in_channels, out_channels, block_out_channels, norm_num_groups):
            super().__init__()
            self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)

        def forward(self, x, t):
            assert t.shape == x.shape[:1]
            return type("Output", (), {"sample": self.conv(x)})
    library = ModuleType("diffusers")
    library.UNet2DModel = UNet2DModel
    monkeypatch.setitem(sys.modules, "diffusers", library)
    model = hacked(HACKS["another U-Net"])
    assert isinstance(model.unet.net, UNet2DModel)


def test_hack_of_a_new_prior(hacked):
    model = hacked(HACKS["another prior"], "--prior", "laplace")
    p = model.prior(torch.rand(4, 6))
    assert isinstance(p, torch.distributions.Laplace) and p.mean.shape == (4, 3)


def test_hack_of_a_data_set_by_a_function(hacked):
    hacked(HACKS["another data set"], "--data", "discs")
    data = idiff.load_data("discs")
    x = data.images(torch.arange(20))
    assert x.shape == (20, 1, 32, 32) and len(x.flatten(1).unique(dim=0)) == 20
    assert x.min() == -1 and x.max() == 1


def test_hack_of_the_log(hacked, monkeypatch, tmp_path):
    library, told, begun = ModuleType("wandb"), [], []
    library.run = None

    def init(**about):
        begun.append(about)
        library.run = SimpleNamespace(name=about["name"])
    library.init, library.log, library.finish = init, told.append, lambda: None
    monkeypatch.setitem(sys.modules, "wandb", library)
    hacked(HACKS["another logger"])
    written = log_of(tmp_path / "run")
    assert len(begun) == 1 and "config" in told[0] and "elbo" in told[-1]["validation"]
    assert [r["step"] for r in told[1:]] == [1, 2, 3, 3]
    assert json.loads(json.dumps(told)) == written


def test_hack_of_the_encoder(hacked):
    model = hacked(HACKS["another encoder"])
    assert model.encoder.net.bn1.num_batches_tracked == 3


def test_hack_of_a_loss_term_is_the_total_correlation(hacked, tmp_path):
    """0 if latents are independent; (D - 1) log B if each of D latents tells which of B it is."""
    model = hacked(HACKS["another loss term"])
    assert "tc" in log_of(tmp_path / "run")[1]
    assert model.weights()["tc"] == 5 * model.cfg.kl and model.weights(settling=True)["tc"] == 0

    u = torch.rand(8, 6)
    torch.manual_seed(0)
    alike = idiff.Gaussian(torch.zeros(8, 3), torch.zeros(8, 3))
    tc = model.latent_terms(alike, alike.rsample(), u)["tc"]
    torch.testing.assert_close(tc, torch.tensor(0.0), atol=1e-5, rtol=0)
    places = torch.arange(8.0)[:, None].repeat(1, 3)
    copies = idiff.Gaussian(places, torch.full((8, 3), -10.0))
    tc = model.latent_terms(copies, copies.rsample(), u)["tc"]
    torch.testing.assert_close(tc, torch.tensor(2 * math.log(8)))


def test_hack_of_v_prediction(hacked):
    """The right v gives the clean image, and the loss is the mean square of v's own error."""
    model = hacked(HACKS["v-prediction"], "--predict", "v")
    torch.manual_seed(0)
    x, eps, wrong = torch.randn(3, 4, 3, 16, 16, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (model.sde.alpha, model.sde.sigma))
    v = alpha * eps - sigma * x
    x_t = model.sde.add_noise(x, eps, t)

    def x_0(v_hat):
        return model.prediction.denoise(lambda *seen: v_hat, x_t, t, None, None)
    torch.testing.assert_close(x_0(v), x)
    error = model.prediction.error(x_0(v + wrong), x, t)
    torch.testing.assert_close(error.square(), wrong.square())


def test_hack_of_another_draw_of_u(hacked):
    model = hacked(HACKS["another draw of u"], "--u", "half")
    assert model.cfg.u == "half" and model.cfg.u_dim == 3
    data = idiff.load_data(model.info["data_arg"])
    rows, u = data.draw(100, torch.Generator().manual_seed(0), "half")
    assert torch.equal(u > 0, data.grid[torch.arange(3), data.factors(rows)] > 0)
    assert set(u.unique().tolist()) == {-1, 1}


def test_hacks_without_a_block(tiny_npz, tmp_path, monkeypatch, capsys):
    """A metric, a sampler and a learning-rate schedule, where the table says that they go."""
    usual = evaluate.fast_metrics
    monkeypatch.setattr(evaluate, "fast_metrics", lambda codes, factors, n_bins: {
        **usual(codes, factors, n_bins), "largest": abs(codes).max()})
    monkeypatch.setitem(evaluate.NAMES, "largest", "largest code")

    calls = []

    def sample_euler(eps_fn, x, ts, sde, noise=None):
        calls.append(len(ts))
        for t, t_next in zip(ts[:-1], ts[1:]):
            slope = -0.5 * sde.beta(t) * (x - eps_fn(x, t.expand(len(x))) / sde.sigma(t))
            x = x + (t_next - t) * slope
        return x
    monkeypatch.setitem(idiff.SAMPLERS, "euler", sample_euler)

    shares = []
    monkeypatch.setattr(train, "rate_share", lambda cfg, step, begun: shares.append(step) or 0.0)

    path = f"{tmp_path}/run/ckpt.pt"
    train.main([*TINY, "--data", tiny_npz, "--steps", "2", "--out", f"{tmp_path}/run"])
    content = idiff.read_checkpoint(path)
    torch.manual_seed(0)
    start = idiff.IDiff(idiff.Config(**content["config"])).state_dict()
    assert set(shares) == {0, 1}
    assert all(torch.equal(start[name], weight) for name, weight in content["model"].items())

    [report] = evaluate.main([path, "--no-dci", "--n", "60", "--device", "cpu"])
    assert report["metrics"]["largest"] > 0 and "| largest code " in capsys.readouterr().out
    interpolate.main([path, "--columns", "2", "--steps", "4", "--sampler", "euler"])
    assert set(calls) == {5}
