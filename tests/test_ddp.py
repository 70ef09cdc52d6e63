# SPDX-License-Identifier: MIT
"""torchrun on two processes of the CPU, against one process with the same whole batch.

    python -m pytest tests/test_ddp.py
"""
import importlib
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.distributed import TCPStore

import train
from conftest import ROOT, TINY, same, start, without_pictures
from idiff import read_checkpoint
from test_train import log_of, steps_of, wait_for_steps

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = "--schedule constant --steps".split()


def torchrun(*argv):
    return subprocess.Popen([*TORCHRUN, "train.py", *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def shown_by_torchrun(*argv):
    """Exit status, standard output and error of a run of two ranks."""
    with torchrun(*argv) as run:
        shown = run.communicate(timeout=300)
    return run.returncode, *shown


def rank(number, port, file, argv):
    """train.py as torchrun would start it for a rank; what it says goes into a file."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")     # the tests' process keeps the store
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(file, "w")
    importlib.reload(train)                                    # which reads the above
    train.fresh_draws = partial(train.fresh_draws, n=512)
    if "--unmix" in argv:
        train.unmix = partial(accepted_map, scale=1 + number)  # rank 1 finds another map
    with without_pictures():
        train.main(argv)


def accepted_map(prior, z, u, z_held, u_held, scale):
    """What train.unmix returns of a map that mixes the latents."""
    w = scale * torch.eye(z.shape[1]).roll(1, dims=0)
    return ((w, torch.ones(len(w)), prior),
            {"from": 0.0, "to": 1.0, "gain in errors": 9.0, "accepted": True})


def start_ranks(folder, argv):
    """Processes of two ranks, their store, and files of what they say; quicker than torchrun."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    files = [folder / f"rank {number}.txt" for number in range(2)]
    argv = [*map(str, argv)]
    processes = [start(rank, number, store.port, str(file), argv)
                 for number, file in enumerate(files)]
    return processes, store, files


def ranks(folder, *argv):
    """Exit statuses and words of two ranks that were run to the end."""
    processes, _store, files = start_ranks(folder, argv)
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes], [file.read_text() for file in files]


@pytest.fixture(scope="module")
def four(tmp_path_factory, tiny_npz):
    """Folder and standard output of a run of four steps on two ranks."""
    out = tmp_path_factory.mktemp("ddp") / "four"
    status, shown, error = shown_by_torchrun(*TINY, "--data", tiny_npz, *LONG, "4", "--out", out)
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
    statuses, shown = ranks(tmp_path, "--resume", two / "ckpt.pt", "--device", "cpu",
                            "--log-every", "1")
    assert statuses == [0, 0] and "ranks 2" in shown[0], shown
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
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-6 * scale            # q has a little noise
    old, new, same_as = (torch.cat([w.flatten() for w in run["model"].values()])
                         for run in (content, one, other))
    assert (new - same_as).norm() < 1e-2 * (new - old).norm()


def test_ranks_unmix_by_the_map_of_rank_0(tmp_path, tiny_npz, monkeypatch):
    """While settling q(z|x) is not sampled, so that two ranks learn what one process learns."""
    argv = [*TINY, "--data", tiny_npz, "--model", "ivae", "--batch-size", "8", "--steps", "4",
            "--settle", "0.99", "--unmix", "2"]
    monkeypatch.setattr(train, "unmix", partial(accepted_map, scale=1))
    train.main([*argv, "--out", str(tmp_path / "one")])
    statuses, shown = ranks(tmp_path, *argv, "--out", tmp_path / "two")
    assert statuses == [0, 0] and shown[0].count("latents unmixed") == 1, shown
    assert "unmixed" not in shown[1]
    one, two = (read_checkpoint(str(tmp_path / name / "ckpt.pt")) for name in ("one", "two"))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_two_steps_and_two_resumed_equal_four_on_two_ranks(four, tmp_path, tiny_npz):
    """Bit for bit. The learning rate is constant, so that the two steps know of no others."""
    out = tmp_path / "run"
    statuses, shown = ranks(tmp_path, *TINY, "--data", tiny_npz, *LONG, "2", "--out", out)
    assert statuses == [0, 0] and "ranks 2" in shown[0], shown
    whole, content = (read_checkpoint(str(run / "ckpt.pt")) for run in (four[0], out))
    assert content["step"] == 2
    content["config"] = whole["config"]                                # goes on to step 4
    torch.save(content, out / "ckpt.pt")
    statuses, shown = ranks(tmp_path, "--resume", out / "ckpt.pt", "--device", "cpu",
                            "--log-every", "1")
    assert statuses == [0, 0] and "ranks 2" in shown[0], shown
    resumed = read_checkpoint(str(out / "ckpt.pt"))
    assert resumed["step"] == 4
    for part in ("model", "ema", "optimizers", "config"):
        assert same(whole[part], resumed[part]), part


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_ends_both_ranks_and_saves_once(tmp_path, tiny_npz, number):
    """torchrun passes it on."""
    out = tmp_path / "run"
    with torchrun(*TINY, "--data", tiny_npz, "--steps", "1000000", "--out", out) as run:
        wait_for_steps(out / "log.jsonl", lambda: run.poll() is not None)
        run.send_signal(number)
        _, shown = run.communicate(timeout=300)
    assert shown.count(f"--resume {out}/ckpt.pt") == 1
    assert read_checkpoint(str(out / "ckpt.pt"))["step"] == log_of(out)[-1]["step"] > 3


@pytest.mark.parametrize("one", [0, 1])
def test_ctrl_c_of_one_rank_ends_both_after_the_same_step(tmp_path, tiny_npz, one):
    out = tmp_path / "run"
    processes, _store, files = start_ranks(
        tmp_path, [*TINY, "--data", tiny_npz, "--steps", "1000000", "--out", out])
    wait_for_steps(out / "log.jsonl", lambda: not all(p.is_alive() for p in processes))
    os.kill(processes[one].pid, signal.SIGINT)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [1, 0]
    assert sum(file.read_text().count(f"--resume {out}/ckpt.pt") for file in files) == 1
    assert read_checkpoint(str(out / "ckpt.pt"))["step"] == log_of(out)[-1]["step"] > 3


def test_what_torchrun_ends_is_told_once(tmp_path, tiny_npz):
    status, shown, error = shown_by_torchrun(*TINY, "--data", tiny_npz, "--out", tmp_path / "run",
                                             "--batch-size", "5")
    told = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert status != 0 and not shown and len(told) == 1 and "--batch-size" in told[0], error
    assert error.count("Traceback") == 1                               # torchrun's own
    assert not (tmp_path / "run").exists()


def test_a_bad_flag_is_told_by_one_rank(tmp_path, tiny_npz):
    statuses, shown = ranks(tmp_path, *TINY, "--data", tiny_npz, "--out", tmp_path / "run",
                            "--lr", "fast")
    assert statuses == [2, 0] and "--lr" in shown[0] and not shown[1]
    assert "Traceback" not in shown[0] and not (tmp_path / "run").exists()
