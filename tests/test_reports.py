# SPDX-License-Identifier: MIT
"""What users of such programs run into: paths as the shell leaves them, links, signals, advice.

    python -m pytest tests/test_reports.py
"""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import idiff
import interpolate
import train
from conftest import ROOT, TINY


def test_a_home_directory_is_expanded_wherever_a_path_is_given(tiny_npz, tmp_path, monkeypatch):
    """The shell does so in "--out ~/x", not in "--out=~/x"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.npz").write_bytes(Path(tiny_npz).read_bytes())
    argv = [*TINY, "--data=~/d.npz", "--steps", "1", "--model", "ivae"]
    train.main([*argv, "--out=~/run"])
    train.main(["--resume=~/run/ckpt.pt", "--device", "cpu", "--data=~/d.npz"])
    train.main(["--unet-width", "8", "--batch-size", "4", "--steps", "1", "--device", "cpu",
                "--freeze-ivae=~/run/ckpt.pt", "--out=~/frozen"])
    evaluate.main(["~/run/ckpt.pt", "--no-dci", "--data=~/d.npz", "--out=~/report"])
    interpolate.main(["~/run/ckpt.pt", "--columns", "2", "--data=~/d.npz", "--out=~/drawn"])
    assert not (tmp_path / "~").exists()
    assert {"run", "frozen", "report", "drawn"} <= {path.name for path in tmp_path.iterdir()}


def test_a_checkpoint_of_before_goes_on_as_it_began(tiny_npz, tmp_path):
    """Its Config lacks what was added since: its U-Net learned jointly, from samples."""
    train.main([*TINY, "--data", tiny_npz, "--steps", "2", "--condition", "sample", "--unmix", "0",
                "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "ckpt.pt"
    content = torch.load(path, weights_only=True)
    for name in ("condition", "unet_share", "unmix"):
        del content["config"][name]
    torch.save(content, path)
    cfg = idiff.load_checkpoint(path).cfg
    assert (cfg.condition, cfg.unet_share, cfg.unmix) == ("sample", 0.0, 0)
    train.main(["--resume", str(path), "--device", "cpu"])


def test_a_run_resumed_through_a_link_goes_on_in_its_own_folder(tiny_npz, tmp_path):
    data = idiff.load_data(tiny_npz)
    cfg = train.recipe(data, steps=2, width=8, batch_size=4, latent_dim=3, model="ivae")
    train.run(cfg, data, str(tmp_path / "run"), save_every=1)
    content = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    torch.save({**content, "step": 1}, tmp_path / "run" / "ckpt.pt")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "latest.pt"
    link.symlink_to(tmp_path / "run" / "ckpt.pt")
    train.run(cfg, data, resume=str(link))
    assert link.is_symlink() and [path.name for path in link.parent.iterdir()] == ["latest.pt"]
    assert idiff.read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_schedulers_warning_save_too(tiny_npz, tmp_path, number,
                                                             monkeypatch):
    step = train.train_step

    def signalled(*args):
        signal.raise_signal(number)
        return step(*args)
    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit, match="saved.*--resume"):
        train.main([*TINY, "--data", tiny_npz, "--steps", "9", "--out", str(tmp_path / "run")])
    assert idiff.read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 1


def test_the_commands_that_come_next_work_where_one_is(tiny_npz, tmp_path):
    """Called from another folder they say where the scripts are."""
    argv = [sys.executable, str(ROOT / "train.py"), *TINY, "--data", tiny_npz, "--model", "ivae",
            "--steps", "1", "--out", "run"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == "python" and (tmp_path / command[1]).resolve() == ROOT / "interpolate.py"
    assert (tmp_path / command[2]).is_file()


def test_the_message_of_a_diverged_run_names_a_checkpoint_only_if_there_is_one(tiny_npz, tmp_path):
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--data", tiny_npz, "--lr", "1e12", "--steps", "50",
                    "--out", str(tmp_path / "run")])
    assert "No checkpoint was written" in str(end.value)
    assert not os.path.exists(tmp_path / "run" / "ckpt.pt")


def test_a_batch_of_one_has_nothing_to_be_contrasted_with():
    with pytest.raises(ValueError, match="batch_size must be 2"):
        idiff.Config(batch_size=1)
    idiff.Config(batch_size=1, contrast=0.0)


def test_an_edited_program_does_not_write_a_clean_commit(tiny_npz, monkeypatch):
    calls = []

    def recorded(command, **how):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="6262282-dirty\n", stderr="")
    monkeypatch.setattr(subprocess, "run", recorded)
    assert train.provenance(idiff.load_data(tiny_npz))["commit"] == "6262282-dirty"
    assert "--dirty" in str(calls)


def test_two_bayesian_searches_of_one_seed_draw_the_same_trials(tiny_npz, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "run_trial", lambda trial, *_: drawn.append(trial.params) or 0.5)
    argv = [*TINY, "--data", tiny_npz, "--search", "bayes", "--trials", "2", "--model", "ivae"]
    for out in ("a", "b"):
        train.main([*argv, "--out", str(tmp_path / out)])
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


@pytest.mark.usefixtures("pictures")
def test_of_many_latents_the_most_informative_are_drawn():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 4, (300, 2))
    codes = rng.normal(size=(300, 60))
    codes[:, [7, 50]] = factors
    report = evaluate.report_of_codes(codes, factors, ["a", "b"], trees=False)
    axes = evaluate.draw_latents(report).axes
    labels = [axis.get_xlabel() for axis in axes]
    assert len(axes) == 40 and any(label.startswith("z7; a") for label in labels)
    assert any(label.startswith("z50; b") for label in labels)


# ---- machines that others use, too ----


@pytest.mark.parametrize("busy, threads", [(0.02, 4), (0.27, 3), (0.55, 2), (0.97, 1)])
def test_torch_takes_as_many_threads_as_cores_are_free(busy, threads, monkeypatch, capsys):
    used = round(1000 * busy)
    counts = iter(["cpu 5 0 0 7 0 0 0 0 0 0", f"cpu {5 + used} 0 0 {1007 - used} 0 0 0 0 0 0"])
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.path.exists", lambda path: True)
    monkeypatch.setattr(idiff.Path, "read_text", lambda path: next(counts) + "\ncpu0 1 2")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    idiff.use_free_cores()
    assert (chosen or [4]) == [threads]
    assert ("OMP_NUM_THREADS" in capsys.readouterr().err) == (threads < 4)

    monkeypatch.setenv("OMP_NUM_THREADS", "4")                 # who says how many gets them
    idiff.use_free_cores()
    assert len(chosen) <= 1


def test_steps_that_become_slow_are_told_once(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    pace = train.Pace()

    def look(stage, seconds):
        look.step += 10
        now[0] += 10 * seconds
        pace.look(stage, look.step)
        return capsys.readouterr().err
    look.step = 0
    assert not any(look("settling", s) for s in (3, 1, 1.9, 1.2))
    assert not look("decoding", 9)                             # another stage is no slower machine
    assert not look("decoding", 5)
    assert "2.4 times" in look("decoding", 12)
    assert not look("decoding", 20)
