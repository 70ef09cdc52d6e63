# SPDX-License-Identifier: MIT
"""train.py --search: the grid, Optuna's sampler, a shared study, trials that fail or are killed.

    python -m pytest tests/test_search.py
"""
import json
import logging
import os
import subprocess
import sys

import numpy as np
import optuna
import pytest

import evaluate
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
    for trial in study.trials:
        run = folder / f"trial-{trial.number:03d}"
        config = json.loads((run / "log.jsonl").read_text().splitlines()[0])["config"]
        assert (config["kl"], config["rec"], config["u"]) == (*trial.params.values(), "mean+var")
        assert trial.value == json.loads((run / "metrics.json").read_text())["metrics"]["mig"]
    train.main([*argv, "--search", "grid"])
    assert len(study_of(argv).trials) == 4 and text in capsys.readouterr().out


def test_bayes_stays_in_the_papers_ranges_and_the_contrast_is_the_runs_own(tiny_npz, tmp_path):
    train.main([*TINY, "--data", tiny_npz, "--out", str(tmp_path), "--search", "bayes", "--trials",
                "3", "--objective", "contrast"])
    study = study_of(["--out", str(tmp_path)])
    trials = study.trials
    assert len(trials) == 3 and study.best_value == min(trial.value for trial in trials)
    for trial in trials:
        assert 1e-5 <= trial.params["kl"] <= 0.1 and 0.01 <= trial.params["rec"] <= 5
        log = (tmp_path / f"trial-{trial.number:03d}" / "log.jsonl").read_text().splitlines()
        assert trial.value == json.loads(log[-1])["validation"]["contrast"] != 0


def test_a_stopped_trial_runs_again_whatever_it_was_doing(argv, monkeypatch):
    """Here the last of the grid, in its evaluation."""
    report, calls = evaluate.report, []

    def stopped_once(*args, **named):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return report(*args, **named)
    monkeypatch.setattr(evaluate, "report", stopped_once)
    with pytest.raises(SystemExit, match="same command"):
        train.main([*argv, "--search", "grid"])
    assert len(cells(study_of(argv))) == 3
    train.main([*argv, "--search", "grid"])
    assert cells(study_of(argv)) == ALL


def test_the_table_tells_whole_numbers(argv, tmp_path):
    """Another run with the value in the table is the trial's own."""
    value = "1.2345678901234e-05"
    train.main([*argv, "--search", "grid", "--over", "kl", value, "--trials", "1"])
    assert (tmp_path / "a study" / "trials.md").read_text().count(value) == 3  # trial, space, best


def test_the_contrast_orders_runs_that_do_not_learn_by_it(argv):
    train.main([*argv, "--search", "grid", "--trials", "1", "--objective", "contrast",
                "--contrast", "0"])
    assert study_of(argv).trials[0].value != 0


def test_trials_are_evaluated_where_they_are_trained(argv, monkeypatch):
    report, devices = evaluate.report, []

    def recorded(model, data, **named):
        devices.append(str(data.device))
        return report(model, data, **named)
    monkeypatch.setattr(evaluate, "report", recorded)
    train.main([*argv, "--search", "grid", "--trials", "1"])
    assert devices == ["cpu"]


def test_a_search_by_mig_without_factors_is_refused_before_it_trains(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", images=rng.integers(0, 255, (20, 16, 16), np.uint8),
             u=rng.normal(size=(20, 2)))
    argv = [*TINY, "--data", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "S"),
            "--u", "own", "--search", "grid", "--over", "kl", "1e-4", "--over", "rec", "1"]
    with pytest.raises(SystemExit, match="MIG needs factors.*--objective contrast"):
        train.main(argv)
    assert not (tmp_path / "S").exists()
    train.main([*argv, "--objective", "contrast"])
    assert "trial-000/ckpt.pt" in (tmp_path / "S" / "trials.md").read_text()


@pytest.mark.parametrize("flags", ["--rec-images 4", "--over kl 1e-3", "--over contrast 0 1",
                                   "--objective contrast", "--batch-size 4"])
def test_a_folder_holds_one_search(argv, capsys, flags):
    """Also if the two differ in one flag of many."""
    argv = [*argv, *("--lr 1e-3 --muon 0 --schedule constant --ema 0.9 --epochs 1 --prior full "
                     "--precision float32 --prior-mean learned --seed 1 --u-scale 0.2").split()]
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

    def fails_once(*args, **named):
        calls.append(args)
        if len(calls) == 1:
            raise ValueError("rec is nan")
        return run(*args, **named)
    monkeypatch.setattr(train, "run", fails_once)
    train.main([*argv, "--search", "grid"])
    assert len(cells(study_of(argv))) == 3
    path = os.path.join(argv[argv.index("--out") + 1], "trials.md")
    assert "rec is nan" in open(path).read()


@pytest.mark.parametrize("flags, named", [
    ("--data typo.npz", "typo.npz"), ("--freeze-ivae typo.pt", "typo.pt"),
    ("--over prior full none", "none"), ("--over kl 1e-3 -1", "kl"), ("--save-every 0", "--save"),
    ("--log-every 0", "--log-every"), ("--trials 0", "--trials")])
def test_what_fails_in_every_trial_fails_before_the_first(argv, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as end:
        train.main([*argv, "--search", "grid", *flags.split()])
    assert named in f"{end.value.code} {capsys.readouterr().err.splitlines()[-1:]}"
    assert not (tmp_path / "a study").exists()


def test_data_with_a_u_of_their_own_are_searched_by_it(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, u=np.arange(24.0))
    argv = ["--out", str(tmp_path / "a study")]
    train.main([*TINY, *argv, "--data", str(tmp_path / "own.npz"), "--search", "bayes",
                "--trials", "1", "--objective", "contrast"])
    [trial] = study_of(argv).trials
    assert set(trial.params) == {"kl", "rec"} and trial.value is not None


def test_a_folder_that_takes_no_file_is_named_before_the_first_trial(argv, monkeypatch):
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("a trial"))
    with pytest.raises(SystemExit, match="/proc/self"):
        train.main([*argv, "--search", "grid", "--out", "/proc/self"])


def test_a_search_without_a_complete_trial_does_not_end_well(argv, monkeypatch, capsys):
    def fails(*_, **__):
        raise ValueError("rec is nan")
    monkeypatch.setattr(train, "run", fails)
    with pytest.raises(SystemExit, match="no trial"):
        train.main([*argv, "--search", "grid"])
    assert capsys.readouterr().out.count("rec is nan") == 4


def test_a_full_disk_ends_a_search_and_its_trial_runs_again(argv, monkeypatch):
    def fails(*_, **__):
        raise OSError("disk full")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="disk full"):
        patch.setattr(train, "run", fails)
        train.main([*argv, "--search", "grid"])
    train.main([*argv, "--search", "grid", "--trials", "1"])
    failed, again = study_of(argv).trials
    assert again.value is not None and again.params == failed.params


def test_a_search_locks_its_study_without_links(argv, tmp_path, monkeypatch):
    """Some systems know none; and one to a path that is gone would hold a search for good."""
    def refused(*_):
        raise OSError("no links here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "symlink", refused)
    train.main([*argv, "--search", "grid", "--trials", "1", "--out", "S"])
    assert "S/trial-000/ckpt.pt" in open("S/trials.md").read()
    assert not os.path.exists("S/study.log.lock")
    assert logging.getLogger("optuna.storages").isEnabledFor(logging.WARNING)  # of a long wait


@pytest.mark.parametrize("flags, named", [
    ("--over no_such 1 2", "no_such"), ("--over n_u 1 2", "n_u"), ("--over kl", "kl"),
    ("--over kl many", "many"), ("--resume ckpt.pt", "--resume")])
def test_bad_searches_are_refused_in_one_line(argv, flags, named):
    with pytest.raises(SystemExit) as refused:
        train.main([*argv, "--search", "grid", *flags.split()])
    assert named in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("flags", ["--over kl 1 2", "--trials 3", "--objective contrast"])
def test_flags_of_a_search_need_one(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="need --search"):
        train.main([*TINY, *flags.split()])
    assert not list(tmp_path.iterdir())


def test_without_optuna_only_the_search_is_lost(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)                   # importing it now fails
    with pytest.raises(SystemExit, match="requirements.txt"):
        train.main([*argv, "--search", "grid"])
