# SPDX-License-Identifier: MIT
"""train.py --search: the grid, Optuna's sampler, a shared study, trials that fail or are killed.

    python -m pytest tests/test_search.py
"""
import json
import os
import subprocess
import sys
import time

import optuna
import pytest

import train
from conftest import ROOT

TINY = ["--model", "ivae", "--steps", "1", "--batch-size", "8", "--width", "8", "--device", "cpu"]


@pytest.fixture
def argv(tiny_npz, tmp_path):
    """The flags of a search over two values of lambda_KL and two of lambda_rec, u fixed."""
    return [*TINY, "--data", tiny_npz, "--out", str(tmp_path / "a study"), "--u", "mean+var",
            "--over", "kl", "1e-4", "1e-2", "--over", "rec", "0.1", "1"]


def study_of(argv):
    path = os.path.join(argv[argv.index("--out") + 1], "study.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    return optuna.load_study(study_name=None, storage=storage)         # the only one


def cells(study, *states):
    return sorted((t.params["kl"], t.params["rec"]) for t in study.trials
                  if t.state.name in (states or ("COMPLETE",)))


ALL = [(1e-4, 0.1), (1e-4, 1.0), (1e-2, 0.1), (1e-2, 1.0)]


def test_grid_runs_each_cell_once_reports_it_and_is_then_done(argv, tmp_path, capsys):
    train.main([*argv, "--search", "grid"])
    study, folder = study_of(argv), tmp_path / "a study"
    assert cells(study) == ALL
    text = (folder / "trials.md").read_text()
    assert f"trial-{study.best_trial.number:03d}/ckpt.pt" in text and "0.0005" in text  # Table 1
    assert (folder / "search.png").is_file()
    for trial in study.trials:
        run = folder / f"trial-{trial.number:03d}"
        config = json.loads((run / "log.jsonl").read_text().splitlines()[0])["config"]
        assert (config["kl"], config["rec"], config["u"]) == (*trial.params.values(), "mean+var")
        assert trial.value == json.loads((run / "metrics.json").read_text())["metrics"]["mig"]
    train.main([*argv, "--search", "grid"])
    assert len(study_of(argv).trials) == 4 and text in capsys.readouterr().out


def test_bayes_stays_in_the_papers_ranges_and_elbo_is_the_runs_own(tiny_npz, tmp_path):
    train.main([*TINY, "--data", tiny_npz, "--out", str(tmp_path), "--search", "bayes", "--trials",
                "3", "--objective", "elbo"])
    trials = study_of(["--out", str(tmp_path)]).trials
    assert len(trials) == 3
    for trial in trials:
        assert 1e-5 <= trial.params["kl"] <= 0.1 and 0.01 <= trial.params["rec"] <= 5
        log = (tmp_path / f"trial-{trial.number:03d}" / "log.jsonl").read_text().splitlines()
        assert trial.value == json.loads(log[-1])["validation elbo"]


@pytest.mark.parametrize("killed", ["first", "last"])
def test_a_killed_trial_is_marked_failed_and_its_cell_runs_again(argv, killed):
    out = argv[argv.index("--out") + 1]
    n_done = int(killed == "last") * 3
    log = os.path.join(out, f"trial-{n_done:03d}", "log.jsonl")
    endless = f"""import sys, time, train
train.main([*sys.argv[1:], "--trials", "{n_done}"]) if {n_done} else None
train.train = lambda *_: time.sleep(1000)
train.main(sys.argv[1:])"""
    worker = subprocess.Popen([sys.executable, "-c", endless, *argv, "--search", "grid"], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists(log) and worker.poll() is None:
        time.sleep(0.1)
    worker.kill()
    worker.wait()
    assert study_of(argv).trials[n_done].state.name == "RUNNING"
    os.utime(log, (0, 0))                                              # silent since long ago
    train.main([*argv, "--search", "grid"])
    study = study_of(argv)
    assert cells(study) == ALL and study.trials[n_done].state.name == "FAIL"


def test_a_stopped_trial_runs_again_whatever_it_was_doing(argv, monkeypatch):
    """Here the last of the grid, in its evaluation."""
    report, calls = train.evaluate.report, []

    def stopped_once(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return report(*args)
    monkeypatch.setattr(train.evaluate, "report", stopped_once)
    with pytest.raises(SystemExit, match="same command"):
        train.main([*argv, "--search", "grid"])
    assert len(cells(study_of(argv))) == 3
    train.main([*argv, "--search", "grid"])
    assert cells(study_of(argv)) == ALL


@pytest.mark.parametrize("flags", ["--rec-images 4", "--over kl 1e-3", "--over contrast 0 1",
                                   "--objective elbo"])
def test_a_folder_holds_one_search(argv, capsys, flags):
    train.main([*argv, "--search", "grid", "--trials", "1"])
    with pytest.raises(SystemExit) as refused:
        train.main([*argv, "--search", "grid", *flags.split()])
    assert "a study" in str(refused.value) and "other flags" in str(refused.value)
    assert len(study_of(argv).trials) == 1


def test_two_workers_share_a_study(argv):
    command = [sys.executable, str(ROOT / "train.py"), *argv, "--search", "grid"]
    workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert set(cells(study_of(argv))) == set(ALL)


def test_a_failed_trial_says_why_and_the_search_goes_on(argv, monkeypatch):
    run, calls = train.run, []

    def fails_once(args):
        calls.append(args)
        if len(calls) == 1:
            raise ValueError("rec is nan")
        return run(args)
    monkeypatch.setattr(train, "run", fails_once)
    train.main([*argv, "--search", "grid"])
    assert len(cells(study_of(argv))) == 3
    path = os.path.join(argv[argv.index("--out") + 1], "trials.md")
    assert "rec is nan" in open(path).read()


def test_a_database_holds_the_study(argv, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    train.main([*argv, "--search", "grid", "--storage", url])
    assert cells(optuna.load_study(study_name=None, storage=url)) == ALL


@pytest.mark.parametrize("flags, named", [
    ("--over no_such 1 2", "no_such"), ("--over kl", "kl"), ("--over kl many", "many"),
    ("--resume ckpt.pt", "--resume")])
def test_bad_searches_are_refused_in_one_line(argv, flags, named):
    with pytest.raises(SystemExit) as refused:
        train.main([*argv, "--search", "grid", *flags.split()])
    assert named in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("flags", ["--over kl 1 2", "--trials 3", "--storage sqlite:///a.db"])
def test_flags_of_a_search_need_one(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="need --search"):
        train.main([*TINY, *flags.split()])
    assert not list(tmp_path.iterdir())


def test_without_optuna_only_the_search_is_lost(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)                   # importing it now fails
    with pytest.raises(SystemExit, match="requirements.txt"):
        train.main([*argv, "--search", "grid"])
