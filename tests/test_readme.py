# SPDX-License-Identifier: MIT
"""README's commands and its Python blocks do what they say, at tiny sizes."""
import importlib
import re
import shlex

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SMALL = {"train": "--steps 2 --width 8 --unet-width 8 --batch-size 4 --ddpm-images 2 --device cpu",
         "evaluate": "--no-dci --n 200 --device cpu", "interpolate": "--steps 2 --columns 3"}


def readme_commands():
    """The arguments of every "python train.py ..." and the like in README, script first."""
    found = re.findall(r"python ((?:train|evaluate|interpolate)\.py[^#`\n]*)", README)
    return list(dict.fromkeys(tuple(shlex.split(command)) for command in found))


@pytest.mark.parametrize("argv", readme_commands(), ids=" ".join)
def test_readme_command_parses(argv):
    importlib.import_module(argv[0].removesuffix(".py")).build_parser().parse_args(argv[1:])


def test_readme_commands_and_blocks_run_in_order(tmp_path, monkeypatch, shapes3d):
    monkeypatch.chdir(tmp_path)
    for script, *flags in readme_commands():
        name = script.removesuffix(".py")
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "load_data", lambda *args: shapes3d)    # rendered once
        if "NAME" not in " ".join(flags) and "*" not in " ".join(flags):
            one_trial = ["--trials", "1"] * ("--search" in flags)
            module.main([*flags, *SMALL[name].split(), *one_trial])
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        scope = {}
        exec(block, scope)
        if "model" in scope:
            assert scope["z"].shape == (1, 6) and scope["x"].shape == (1, 3, 64, 64)
    monkeypatch.undo()
    from idiff import load_data
    data = load_data(str(tmp_path / "my.npz"))
    assert data.factor_sizes == (4, 3, 2) and data.image_shape == (3, 16, 16)
