# SPDX-License-Identifier: MIT
"""torchrun on two processes of the CPU, against one process with the same whole batch.

    python -m pytest tests/test_ddp.py
"""
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, TINY, same
from idiff import read_checkpoint
from test_train import log_of, steps_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = "--schedule constant --steps".split()


def start(*argv):
    return subprocess.Popen([*TORCHRUN, "train.py", *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranks(*argv):
    """Exit status, standard output and error of a run of two ranks."""
    with start(*argv) as run:
        shown = run.communicate(timeout=300)
    return run.returncode, *shown


@pytest.fixture(scope="module")
def four(tmp_path_factory, tiny_npz):
    """Folder and standard output of a run of four steps on two ranks."""
    out = tmp_path_factory.mktemp("ddp") / "four"
    status, shown, error = ranks(*TINY, "--data", tiny_npz, *LONG, "4", "--out", out)
    assert status == 0, error
    return out, shown


def test_ranks_say_and_write_what_one_process_does(four, tiny_run):
    out, shown = four
    lines = shown.splitlines()
    assert len(lines) == 7 and "ranks 2" in lines[0] and "interpolate.py" in lines[-1]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in tiny_run.iterdir())
    assert [r.keys() for r in log_of(out)] == [r.keys() for r in log_of(tiny_run)]
    one, two = log_of(tiny_run)[0]["config"], log_of(out)[0]["config"]
    assert two == one | {"schedule": "constant"}                       # the whole batch's


def test_two_ranks_learn_as_one_process(tmp_path, tiny_npz):
    """Weights, terms and the gradient's norm, where q(z|x) has no noise, the only thing unshared.
    Decoder, U-Net and encoder see different numbers of images: 4, 2 and 8."""
    sub = "--batch-size 8 --rec-images 4 --ddpm-images 2 --steps 4".split()
    begun = tmp_path / "one"
    train.main([*TINY, *sub, "--data", tiny_npz, "--steps", "1", "--out", str(begun)])
    content = torch.load(begun / "ckpt.pt", weights_only=True)
    content["config"]["steps"] = 4
    for part in ("model", "ema"):
        weight, bias = (content[part][f"encoder.net.{name}"] for name in list(
            k.removeprefix("encoder.net.") for k in content[part] if "encoder" in k)[-2:])
        weight[3:], bias[3:] = 0, -60                                  # log-variances, of D = 3
    two = tmp_path / "two"
    two.mkdir()
    for out in (begun, two):
        torch.save(content, out / "ckpt.pt")
    train.main(["--resume", str(begun / "ckpt.pt"), "--device", "cpu", "--log-every", "1"])
    status, _, error = ranks("--resume", two / "ckpt.pt", "--device", "cpu", "--log-every", "1")
    assert status == 0, error
    logs = [[r for r in steps_of(out) if r["step"] > 1] for out in (begun, two)]
    assert len(logs[0]) == 3
    for one, other in zip(*logs):
        for name in ("ddpm", "rec", "kl", "contrast", "gradient norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    one, other = (read_checkpoint(str(out / "ckpt.pt")) for out in (begun, two))
    means = [[state["exp_avg" if "exp_avg" in state else "average"]    # of the gradients
              for optimizer in run["optimizers"] for state in optimizer["state"].values()]
             for run in (one, other)]
    scale = torch.stack([mean.norm() for mean in means[0]]).norm()
    for a, b in zip(*means, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6 * scale
    old, new, same_as = (torch.cat([w.flatten() for w in run["model"].values()])
                         for run in (content, one, other))
    assert (new - same_as).norm() < 1e-2 * (new - old).norm()


def test_two_steps_and_two_resumed_equal_four_on_two_ranks(four, tmp_path, tiny_npz):
    """Bit for bit. The learning rate is constant, so that the two steps know of no others."""
    out = tmp_path / "run"
    status, _, error = ranks(*TINY, "--data", tiny_npz, *LONG, "2", "--out", out)
    assert status == 0, error
    whole, content = (read_checkpoint(str(run / "ckpt.pt")) for run in (four[0], out))
    assert content["step"] == 2
    content["config"] = whole["config"]                                # goes on to step 4
    torch.save(content, out / "ckpt.pt")
    status, _, error = ranks("--resume", out / "ckpt.pt", "--device", "cpu", "--log-every", "1")
    assert status == 0, error
    resumed = read_checkpoint(str(out / "ckpt.pt"))
    assert resumed["step"] == 4
    for part in ("model", "ema", "optimizers", "config"):
        assert same(whole[part], resumed[part]), part


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_ends_both_ranks_and_saves_once(tmp_path, tiny_npz, number):
    out = tmp_path / "run"
    with start(*TINY, "--data", tiny_npz, "--steps", "1000000", "--out", out) as run:
        for _ in range(1200):
            time.sleep(0.1)
            log = out / "log.jsonl"
            if run.poll() is not None or log.is_file() and log.read_text().count("step") > 5:
                break
        run.send_signal(number)                                        # which torchrun passes on
        _, shown = run.communicate(timeout=300)
    assert shown.count(f"--resume {out}/ckpt.pt") == 1
    assert read_checkpoint(str(out / "ckpt.pt"))["step"] == log_of(out)[-1]["step"] > 3


@pytest.mark.parametrize("flags, named", [("--batch-size 5", "--batch-size"),
                                          ("--lr fast", "--lr")])
def test_bad_input_is_told_once(tmp_path, tiny_npz, flags, named):
    status, shown, error = ranks(*TINY, "--data", tiny_npz, "--out", tmp_path / "run",
                                 *flags.split())
    told = [line for line in error.splitlines() if line.startswith("train.py: ")
            or "error: " in line and "train.py" in line]
    assert status != 0 and not shown and len(told) == 1 and named in told[0], error
    assert error.count("Traceback") == 1                               # torchrun's own
    assert not (tmp_path / "run").exists()
