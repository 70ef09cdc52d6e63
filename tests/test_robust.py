# SPDX-License-Identifier: MIT
"""Crashes, full disks, damaged files: one clear line, and the last good checkpoint intact.

    python -m pytest tests/test_robust.py
    python tests/bench_robust.py                    # the same at length
"""
import copy
import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import interpolate
import train
from bench_robust import IMAGES, damage_files, kill_runs
from conftest import TINY, same
import idiff
from idiff import (IDiff, check_memory, load_checkpoint, load_data, read_checkpoint,
                   save_checkpoint)

def refusal(main, argv):
    """What the user reads when main(argv) ends at once: one line."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv)])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code

@contextmanager
def files_of_at_most(n_bytes):
    """As on a full disk, writing beyond n_bytes of any file fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the tiny run, to be harmed."""
    return shutil.copytree(tiny_run, tmp_path / "run")

def change(run, **entries):
    """Path of the run's checkpoint, with entries replaced."""
    content = torch.load(run / "ckpt.pt", weights_only=True)
    torch.save(content | entries, run / "ckpt.pt")
    return run / "ckpt.pt"

# ---- crashes and full disks ----

def test_killed_runs_end_as_if_undisturbed(tmp_path):
    found = kill_runs(tmp_path, 3, per_run=3, steps=9)
    assert found["kills"] == 3 and found["equal bit for bit"] == found["runs"] > 0
    assert not found["exit status not 0"]

def test_full_disk_leaves_the_old_checkpoint_and_no_other_file(tiny_run, tmp_path):
    path = shutil.copy(tiny_run / "ckpt.pt", tmp_path)
    model, before = load_checkpoint(path), (tmp_path / "ckpt.pt").read_bytes()
    with files_of_at_most(20_000), pytest.raises(OSError) as error:
        save_checkpoint(path, model, model)
    assert str(path) in str(error.value) and "disk" in str(error.value)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def test_full_disk_ends_a_run_in_one_line(tiny_npz, tmp_path):
    with files_of_at_most(20_000):
        text = refusal(train.main, [*TINY, "--data", tiny_npz, "--steps", "2", "--out", tmp_path])
    assert "ckpt.pt" in text and "disk" in text
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]

def test_folder_that_cannot_be_made_is_named(tiny_npz, tiny_run):
    for main, argv in ((train.main, [*TINY, "--data", tiny_npz, "--steps", "1"]),
                       (interpolate.main, [tiny_run / "ckpt.pt"])):
        assert "/proc/run" in refusal(main, [*argv, "--out", "/proc/run"])

@pytest.mark.parametrize("files", [
    {"memory.max": "536870912\n", "memory.stat": "anon 268435456\nfile 99999999999\n"},
    {"memory/memory.limit_in_bytes": "536870912\n",
     "memory/memory.stat": "rss 1\ntotal_rss 268435456\n"},
    {"memory.max": "max\n", "memory.stat": "anon 268435456\n"}], ids=["v2", "v1", "none"])
def test_a_containers_limit_counts_less_what_it_holds(monkeypatch, files):
    """256 of 512 MiB are free; pages of files make room, and "max" is no limit."""
    read = Path.read_text

    def of_container(path, *args, **named):
        name = str(path).removeprefix("/sys/fs/cgroup/")
        if name == str(path):
            return read(path, *args, **named)
        if name not in files:
            raise FileNotFoundError(path)
        return files[name]
    monkeypatch.setattr(Path, "read_text", of_container)
    check_memory(200 * 2**20, torch.device("cpu"))
    if "max\n" in files.values():
        check_memory(300 * 2**20, torch.device("cpu"))
    else:
        with pytest.raises(MemoryError, match="0.2 GiB are free"):
            check_memory(300 * 2**20, torch.device("cpu"))

def test_odd_paths_work(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_npz, "- dätä ✓.npz")
    train.main([*TINY, "--data=- dätä ✓.npz", "--steps", "1", "--out=-my rün"])
    train.main(["--resume=-my rün/ckpt.pt", "--device", "cpu"])
    evaluate.main(["--no-dci", "--", "-my rün/ckpt.pt"])
    interpolate.main(["--steps", "1", "--columns", "2", "--", "-my rün/ckpt.pt"])
    assert (tmp_path / "-my rün" / "metrics.json").exists()

def test_a_folder_of_pictures_is_trained_on_and_found_again(tmp_path, monkeypatch):
    """From its own parent, then by all scripts from elsewhere; a folder dsprites is no replica."""
    pics = tmp_path / "dsprites" / "pics"
    pics.mkdir(parents=True)
    lines = ["file,shape,size,u"]
    for i in range(24):
        Image.fromarray(IMAGES[i]).save(pics / f"{i}.png")
        lines.append(f"{i}.png,{i % 2},{i // 2},{i / 4}")
    (pics / "table.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path / "dsprites")
    train.main([*TINY, "--data", "pics/", "--steps", "2", "--image-size", "32", "--out", "run"])
    monkeypatch.chdir(tmp_path)
    cfg = load_checkpoint("dsprites/run/ckpt.pt").cfg
    assert cfg.u == "own" and cfg.image_size == 32 and cfg.n_factors == 2
    train.main(["--resume", "dsprites/run/ckpt.pt", "--device", "cpu"])
    evaluate.main(["dsprites/run/ckpt.pt", "--no-dci", "--n", "24"])
    report = json.loads((tmp_path / "dsprites/run/metrics.json").read_text())
    assert list(report["per_factor"]) == ["shape", "size"] and report["data"].startswith("pics ")
    data_sets = {"dsprites": load_data("dsprites")}
    found = idiff.data_of({"data_arg": "dsprites"}, "ckpt.pt", load=lambda name, *_: data_sets[name])
    assert found is data_sets["dsprites"]
    assert load_data("dsprites").name == "dsprites replica"
    assert ".csv" in refusal(train.main, [*TINY, "--data", tmp_path, "--steps", "2"])
    sized = [*TINY, "--data", pics, "--factor-sizes", "24", "--steps", "2"]
    assert "(24,) is for .npz and .h5 files" in refusal(train.main, sized)

# ---- damaged files ----

def test_damaged_files_run_no_code_and_give_one_line(tmp_path):
    bad = []
    _, growth = damage_files(tmp_path, 80, seed=1, report=bad.append)
    assert not bad and growth < 1000                    # MiB

@pytest.mark.parametrize("entries, words", [
    (dict(format=1), "format is 1"), (dict(config=3), "ckpt.pt"), (dict(info=None), "ckpt.pt"),
    (dict(format=torch.ones(2)), "ckpt.pt"), (dict(info={}), "ckpt.pt"),
    (dict(info={"data_arg": torch.ones(2)}), "ckpt.pt")])
def test_every_script_refuses_a_foreign_checkpoint_in_one_line(run, entries, words):
    path = change(run, **entries)
    assert words in refusal(evaluate.main, [path])
    assert words in refusal(interpolate.main, [path])
    assert words in refusal(train.main, ["--resume", path, "--device", "cpu"])

def test_codes_that_are_not_finite_are_told(run):
    weights = read_checkpoint(run / "ckpt.pt")["ema"]
    weights["encoder.net.1.bias"][0] = torch.nan
    path = change(run, ema=weights)
    assert "NaN" in refusal(evaluate.main, [path, "--no-dci"])
    assert "NaN" in refusal(interpolate.main, [path])

def test_a_checkpoint_that_does_not_name_its_data_is_not_resumed(run, tiny_npz):
    path = change(run, info={})
    assert "--data" in refusal(train.main, ["--resume", path, "--device", "cpu"])
    argv = ["--resume", path, "--device", "cpu", "--data", tiny_npz]
    assert "unnamed" in refusal(train.main, argv)

@pytest.mark.parametrize("info", [{"image_size": 16 * 10**9}, {"image_size": -16},
                                  {"image_size": 3}, {"factor_sizes": "1.5"}, {"data_arg": "/"}])
def test_what_a_checkpoint_says_of_its_data_may_be_damaged(run, info):
    """One line, which names the checkpoint."""
    path = change(run, info={**read_checkpoint(run / "ckpt.pt")["info"], **info})
    for main, argv in ((train.main, ["--resume", path]), (evaluate.main, [path, "--no-dci"])):
        assert str(path) in refusal(main, [*argv, "--device", "cpu"])

def test_a_checkpoint_made_in_python_goes_on(run, capsys):
    """It says nothing of size and method, which are words of the command line."""
    info = read_checkpoint(run / "ckpt.pt")["info"]
    for name in ("size", "method", "frozen"):
        del info[name]
    train.main(["--resume", str(change(run, info=info)), "--device", "cpu"])
    assert "Next:" in capsys.readouterr().out

@pytest.mark.parametrize("entries", [
    dict(step=None), dict(step=torch.tensor([1.0, 1.0])), dict(step=99), dict(step=-1),
    dict(log_size=-1), dict(optimizers=[])])
def test_training_state_that_does_not_fit_is_refused(run, entries):
    path = change(run, **entries)
    before = path.read_bytes()
    assert str(path) in refusal(train.main, ["--resume", path, "--device", "cpu"])
    assert path.read_bytes() == before

def test_state_of_other_shapes_never_reaches_the_optimiser(run):
    for k, name in enumerate(("exp_avg", "average")):
        optimizers = read_checkpoint(run / "ckpt.pt")["optimizers"]
        optimizers[k]["state"][0][name] = torch.zeros(3)
        path = change(run, optimizers=optimizers, step=2)
        assert str(path) in refusal(train.main, ["--resume", path, "--device", "cpu"])

def test_resuming_on_other_data_is_refused(run, tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros((6, 16, 16, 3), np.uint8),
             factors=np.arange(6)[:, None])
    text = refusal(train.main, ["--resume", run / "ckpt.pt", "--data", tmp_path / "other.npz"])
    assert "other.npz" in text and "ckpt.pt" in text

@pytest.mark.parametrize("noise", [b"\xff\xfe\n", b"no json\n", b"[" * 9999 + b"\n", b"[1]\n",
                                   b'{"step": "a"}\n', b'{"step": 1, "rec": 0.\n'])
def test_a_damaged_log_does_not_keep_a_run_from_going_on(run, noise, capsys):
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], noise, *lines[1:5], noise]))
    train.main(["--resume", str(run / "ckpt.pt"), "--device", "cpu"])
    shown = capsys.readouterr()
    assert "Next:" in shown.out and "Traceback" not in shown.err

def test_a_log_ends_where_the_checkpoint_was_written(run):
    """What a crash had written since then is cut off; no log at all is begun anew."""
    log = run / "log.jsonl"
    whole = log.read_bytes()
    for there in (whole + b'{"step": 9, "re', b""):
        log.write_bytes(there)
        train.main(["--resume", str(run / "ckpt.pt"), "--device", "cpu"])
        for line in log.read_text().splitlines():
            json.loads(line)
        assert log.read_bytes().startswith(there[:len(whole) // 2])

@pytest.mark.parametrize("way", [lambda text: "{", lambda text: "{}", lambda text: text[:-100],
                                 lambda text: json.dumps(json.loads(text) | {"metrics": 3}),
                                 lambda text: json.dumps(json.loads(text) | {"per_factor": [1]})])
def test_a_damaged_report_is_refused_in_one_line(run, way):
    stored = run / "metrics.json"
    evaluate.main([str(run / "ckpt.pt"), "--no-dci"])
    stored.write_text(way(stored.read_text()))
    assert "metrics.json" in refusal(evaluate.main, [stored])

def test_report_tells_of_the_training(run):
    evaluate.main([str(run / "ckpt.pt"), "--no-dci"])
    result = json.loads((run / "metrics.json").read_text())
    assert {"commit", "torch", "data_arg"} <= set(result["training"])
    assert result["config"]["seed"] == 0 and "scikit-learn" in result

def test_dsprites_files_of_whole_bytes_keep_their_grey_values(tmp_path):
    images = np.arange(4, dtype=np.uint8)[:, None, None] * np.full((16, 16), 85, np.uint8)
    np.savez(tmp_path / "a.npz", imgs=images, latents_classes=np.arange(4)[:, None])
    x = load_data(str(tmp_path / "a.npz")).images(torch.arange(4))
    assert torch.allclose(x[:, 0, 0, 0], torch.tensor([-1, -1 / 3, 1 / 3, 1]))

# ---- one seed, one result ----

def test_how_often_is_logged_and_saved_changes_no_weight(tiny_npz, tiny_run, tmp_path):
    argv = [*TINY[:-2], "--data", tiny_npz, "--steps", "4", "--out", str(tmp_path)]
    train.main([*argv, "--log-every", "3", "--save-every", "2"])
    a, b = (read_checkpoint(path / "ckpt.pt") for path in (tiny_run, tmp_path))
    assert all(same(a[k], b[k]) for k in ("model", "ema", "optimizers"))

# ---- wrong arguments ----

def test_latents_of_another_shape_are_named(tiny_run):
    model = load_checkpoint(tiny_run / "ckpt.pt")
    for z in (torch.zeros(2, 5), torch.zeros(3)):
        for call in (model.decode, lambda z: model.sample(z, torch.zeros(2, 3, 16, 16))):
            with pytest.raises(ValueError, match=r"\(B, 3\)"):
                call(z)

def test_a_model_of_ones_own_needs_no_info(tiny_run, tmp_path):
    """save_checkpoint of a script without info can be loaded and sampled from."""
    cfg = load_checkpoint(tiny_run / "ckpt.pt").cfg
    model = IDiff(cfg)
    save_checkpoint(tmp_path / "a.pt", model, copy.deepcopy(model))
    assert load_checkpoint(tmp_path / "a.pt").decode(torch.zeros(1, 3)).shape == (1, 3, 16, 16)
