# SPDX-License-Identifier: MIT
"""README's commands and its Python blocks do what they say, at tiny sizes."""
import importlib
import json
import re
import shlex
import sys
from types import ModuleType

import pytest
import torch

import evaluate
import idiff
import interpolate
import train
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text()
SMALL = {"train": "--steps 2 --width 8 --unet-width 8 --batch-size 4 --ddpm-images 2 --device cpu",
         "evaluate": "--no-dci --n 200 --device cpu", "interpolate": "--steps 2 --columns 3"}


def readme_commands():
    """The arguments of every "python train.py ..." and the like in README, script first."""
    found = re.findall(r"python ((?:train|evaluate|interpolate)\.py[^#`\n]*)", README)
    return list(dict.fromkeys(tuple(shlex.split(command)) for command in found))


def block_after(words):
    """The Python block of README that follows these words."""
    _, _, rest = README.partition(words)
    assert rest, words
    return re.search(r"```python\n(.*?)```", rest, re.DOTALL)[1]


@pytest.mark.parametrize("argv", readme_commands(), ids=" ".join)
def test_readme_command_parses(argv):
    importlib.import_module(argv[0].removesuffix(".py")).build_parser().parse_args(argv[1:])


def test_readme_commands_and_blocks_run_in_order(tmp_path, monkeypatch, shapes3d):
    """Those that need no file that README does not make."""
    report = evaluate.report

    def report_of_few(path, args, *load):
        args.n = 200                                           # of a search's trials too
        return report(path, args, *load)
    monkeypatch.setattr(evaluate, "report", report_of_few)
    monkeypatch.chdir(tmp_path)
    for script, *flags in readme_commands():
        name = script.removesuffix(".py")
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "load_data", lambda *args: shapes3d)    # rendered once
        if not re.search(r"NAME|\*|\.npz|\.json", " ".join(flags)):
            one_trial = ["--trials", "1"] * ("--search" in flags)
            module.main([*flags, *SMALL[name].split(), *one_trial])
    scope = {}
    exec(block_after("## Use idiff.py elsewhere"), scope)
    assert scope["z"].shape == (1, 6) and scope["x"].shape == (1, 3, 64, 64)
    exec(block_after("## Your data"), {})
    monkeypatch.undo()
    data = idiff.load_data(str(tmp_path / "my.npz"))
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
    exec(block_after("## Your data"), {})
    [flags] = [flags for script, *flags in readme_commands()
               if script == "train.py" and "my.npz" in flags and "ivae" in flags]
    train.main([*flags, "--steps", "2", "--width", "8", "--device", "cpu", "--out", "run"])
    assert idiff.load_checkpoint("run/ckpt.pt").cfg.u == "own"
    evaluate.main(["run/ckpt.pt", "--no-dci", "--n", "500", "--device", "cpu"])
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["data"].startswith("my.npz") and 0 <= report["metrics"]["mig"] <= 1


# ---- the five hacks ----


@pytest.fixture
def hacked(monkeypatch, tiny_npz, tmp_path):
    """A function words, flags -> the model trained and drawn after the block that follows words."""
    for name in ("ScoreUNet", "Encoder"):
        monkeypatch.setattr(idiff, name, getattr(idiff, name))             # put back at the end
    monkeypatch.setattr(train, "log", train.log)

    def hacked(words, *flags):
        exec(block_after(words), {"torch": torch, "idiff": idiff, "train": train})
        argv = [*TINY, "--steps", "3", "--out", str(tmp_path / "run"), *flags]
        train.main(argv if "--data" in flags else [*argv, "--data", tiny_npz])
        path = str(tmp_path / "run" / "ckpt.pt")
        evaluate.main([path, "--no-dci", "--n", "60", "--device", "cpu"])
        interpolate.main([path, "--columns", "3", "--steps", "2", "--device", "cpu"])
        return idiff.load_checkpoint(path)
    yield hacked
    idiff.PRIORS.pop("laplace", None)
    idiff.DATA_SETS.pop("discs", None)


def test_the_file_of_ones_own_passes_its_flags_on(monkeypatch, tmp_path, capsys):
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
    model = hacked("**Another library's U-Net**")
    assert isinstance(model.unet.net, UNet2DModel)


def test_hack_of_a_new_prior(hacked):
    model = hacked("**A new prior**", "--prior", "laplace")
    p = model.prior(torch.rand(4, 6))
    assert isinstance(p, torch.distributions.Laplace) and p.mean.shape == (4, 3)


def test_hack_of_a_data_set_by_a_function(hacked):
    hacked("**A data set by a function**", "--data", "discs")
    data = idiff.load_data("discs")
    x = data.images(torch.arange(20))
    assert x.shape == (20, 1, 32, 32) and len(x.flatten(1).unique(dim=0)) == 20
    assert x.min() == -1 and x.max() == 1


def test_hack_of_the_log(hacked, monkeypatch, tmp_path):
    library, told, begun = ModuleType("wandb"), [], []
    library.run = None

    def init(**about):
        begun.append(about)
        library.run = about
    library.init, library.log = init, told.append
    monkeypatch.setitem(sys.modules, "wandb", library)
    hacked("**Numbers to Weights & Biases**")
    written = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(begun) == 1 and "config" in told[0] and "elbo" in told[-1]["validation"]
    assert [r["step"] for r in told[1:]] == [1, 2, 3, 3]
    assert json.loads(json.dumps(told)) == written


def test_hack_of_the_encoder(hacked):
    model = hacked("**Another encoder**")
    assert model.encoder.net.bn1.num_batches_tracked == 3
