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
from PIL import Image

import evaluate
import idiff
import interpolate
import train
from conftest import ROOT, TINY, same
from test_train import log_of


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


@pytest.mark.parametrize("changes", [{"model": "ivae"}, {"model": "idiff", "unet_share": 0.3}])
def test_an_ivae_without_any_loss_is_refused(changes):
    """Also one that a U-Net follows; one beside a U-Net learns nothing, but the U-Net does."""
    nothing = dict(rec=0.0, kl=0.0, contrast=0.0)
    with pytest.raises(ValueError, match="nothing would be learned"):
        idiff.Config(**nothing, **changes)
    idiff.Config(**nothing, unet_share=0.0)


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


@pytest.fixture
def cut_off(tiny_npz, tmp_path, monkeypatch):
    """Flags and folder of a run of four steps that ended after two, as a job that is out of time."""
    out = tmp_path / "run"
    argv = [*TINY, "--data", tiny_npz, "--steps", "4", "--out", str(out)]
    step = train.train_step

    def warned(*args):
        if args[-1] == 1:
            signal.raise_signal(signal.SIGUSR1)
        return step(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", warned)
        train.main(argv)
    return argv, out


def test_a_job_that_is_queued_again_goes_on_by_the_same_command(cut_off, tiny_run, capsys):
    argv, out = cut_off
    train.main(argv)
    assert "after step 2" in capsys.readouterr().out
    whole, again = (idiff.read_checkpoint(run / "ckpt.pt") for run in (tiny_run, out))
    assert again["step"] == 4 and same(whole["ema"], again["ema"])
    assert same(whole["optimizers"], again["optimizers"])
    assert [r.get("step") for r in log_of(out)] == [None, 1, 2, 3, 4, 4]

    # when it has ended, too, and is not written over by another
    train.main(argv)
    assert same(idiff.read_checkpoint(out / "ckpt.pt")["ema"], whole["ema"])
    for flags in (["--seed", "1"], ["--kl", "0.1"], ["--steps", "5"]):
        with pytest.raises(SystemExit, match=f"another run.*{flags[0][2:]} .*--out.*--resume"):
            train.main([*argv, *flags])

    # nor by one whose Config is the same, but on a frozen iVAE
    data = idiff.load_data(argv[argv.index("--data") + 1])
    cfg = idiff.load_checkpoint(out / "ckpt.pt").cfg
    with pytest.raises(ValueError, match="another run, with frozen"):
        train.run(cfg, data, str(out), info={"frozen": "ivae.pt"})


def test_a_job_on_other_data_does_not_go_on(cut_off, tiny_npz, tmp_path):
    argv, out = cut_off
    with np.load(tiny_npz) as file:
        np.savez(tmp_path / "other.npz", images=255 - file["images"], factors=file["factors"])
    with pytest.raises(SystemExit, match="other data.*other.npz"):
        train.main([*argv, "--data", str(tmp_path / "other.npz")])
    assert idiff.read_checkpoint(out / "ckpt.pt")["step"] == 2


def test_a_folder_with_a_log_alone_is_begun_anew(tiny_npz, tiny_run, tmp_path, capsys):
    """As a run leaves it that was killed before its first checkpoint."""
    (tmp_path / "log.jsonl").write_bytes((tiny_run / "log.jsonl").read_bytes()[:999])
    train.main([*TINY, "--data", tiny_npz, "--steps", "4", "--out", str(tmp_path)])
    assert "begins anew" in capsys.readouterr().out
    assert [r.get("step") for r in log_of(tmp_path)] == [None, 1, 2, 3, 4, 4]


def test_a_run_that_lost_its_log_begins_one_with_its_config(cut_off):
    argv, out = cut_off
    config = log_of(out)[0]
    (out / "log.jsonl").unlink()
    train.main(argv)
    first, *records = log_of(out)
    assert first == config and [r["step"] for r in records] == [3, 4, 4]


def test_a_run_goes_on_in_another_folder(cut_off, tiny_run, tmp_path):
    """Where its own cannot be written to; and there once more."""
    _, out = cut_off
    before = {path: path.read_bytes() for path in out.iterdir()}
    argv = ["--resume", str(out / "ckpt.pt"), "--device", "cpu", "--out", str(tmp_path / "new"),
            "--log-every", "1"]
    for _ in range(2):
        train.main(argv)
        whole, again = (idiff.read_checkpoint(run / "ckpt.pt")
                        for run in (tiny_run, tmp_path / "new"))
        assert again["step"] == 4 and same(whole["ema"], again["ema"])
        records = log_of(tmp_path / "new")
        assert "config" in records[0] and [r["step"] for r in records[1:]] == [3, 4, 4]
    assert before == {path: path.read_bytes() for path in out.iterdir()}


# ---- Tables and files ----


def write_pictures(folder, table, n=6, encoding="utf-8", name="table.csv"):
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / name).write_bytes(table.encode(encoding))
    return str(folder)


def table_of(n=6, separator=","):
    rows = [["file", "größe", "u"]] + [[f"{i}.png", f"{i % 3}.5", str(i)] for i in range(n)]
    return "\r\n".join(separator.join(row) for row in rows) + "\r\n"


@pytest.mark.parametrize("separator, encoding", [
    (";", "utf-8-sig"), ("\t", "utf-16"), (";", "cp1252"), (",", "cp1252"), (",", "utf-8")])
def test_a_table_is_read_as_excel_saves_it(tmp_path, separator, encoding):
    """In any of its encodings; a German one has semicolons, and then decimal commas."""
    table = table_of(separator=separator)
    if separator == ";":
        table = table.replace(".5", ",5")
    folder = write_pictures(tmp_path / "pics", table + separator * 2 + "\r\n", encoding=encoding)
    for hidden in ("._table.csv", ".~lock.csv"):
        (tmp_path / "pics" / hidden).write_bytes(b"\0\5\x16\7")
    data = idiff.load_data(folder, image_size=16)
    assert data.factor_names == ("größe",) and data.values[0].tolist() == [0.5, 1.5, 2.5]
    assert torch.equal(data.factors(torch.arange(6))[:, 0], torch.arange(6) % 3)
    assert data.u[:, 0].diff().min() > 0


@pytest.mark.parametrize("line, words", [
    ("3.png,1", "line 5: it has 2 cells, not 3"), ("3.png,red,1", "line 5: .*'red'.*np.unique"),
    ("3.png,,1", "line 5"), ("33.png,1,1", "33.png.*No such file")])
def test_what_is_wrong_with_a_table_is_named(tmp_path, line, words):
    folder = write_pictures(tmp_path / "pics", table_of().replace("3.png,0.5,3", line))
    with pytest.raises(ValueError, match=words):
        idiff.load_data(folder, image_size=16)


def test_what_may_not_be_read_is_not_called_damaged(tiny_npz, tmp_path, monkeypatch):
    """Root may read all, so the system's refusal is played."""
    folder = write_pictures(tmp_path / "pics", table_of())

    def refused(path, *args, **named):
        raise PermissionError(13, "Permission denied", str(path))
    for path, name in ((tiny_npz, "builtins.open"), (folder, "pathlib.Path.read_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(name, refused)
            with pytest.raises(PermissionError, match="Permission denied"):
                idiff.load_data(path)


def test_a_file_without_images_is_told_what_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((4, 16, 16)), arr_0=np.arange(4))
    with pytest.raises(ValueError, match="x_train, arr_0.*images"):
        idiff.load_data(str(tmp_path / "a.npz"))


# ---- Columns that are no factors ----


def test_a_column_without_a_name_is_refused(tmp_path):
    """As df.to_csv() writes its index."""
    lines = table_of().splitlines()
    table = "\n".join(f"{i - 1 if i else ''},{line}" for i, line in enumerate(lines))
    with pytest.raises(ValueError, match="no name.*index=False"):
        idiff.load_data(write_pictures(tmp_path / "pics", table), image_size=16)


def own(path, **columns):
    """A file of 1,200 images, or as many as the columns of factors have rows."""
    factors = np.stack(list(columns.values()), axis=1)
    np.savez(path, images=np.zeros((len(factors), 16, 16), np.uint8), factors=factors,
             factor_names=list(columns))
    return str(path)


@pytest.mark.parametrize("n", [300, 1200])
def test_an_identifier_is_told_by_name(tmp_path, n):
    """Whether rows are few, or so many that no u is made."""
    rows = np.arange(n)
    with pytest.warns(UserWarning, match="'index'.*identifier"):
        data = idiff.load_data(own(tmp_path / "a.npz", x=rows % 5, grey=rows % 4, index=rows))
    if n > 1000:
        with pytest.raises(ValueError, match="1,000 values"):
            train.recipe(data)


def test_a_copy_of_a_factor_is_told_and_others_are_not(tmp_path):
    rows = np.arange(60)
    columns = dict(x=rows % 5, grey=rows % 4, label=10 * (rows % 5) + 3.5, same=0 * rows)
    with pytest.warns(UserWarning) as told:
        idiff.load_data(own(tmp_path / "a.npz", **columns))
    assert [str(each.message) for each in told] == ["factor 'label' is a copy of factor 'x': leave "
                                                    "one out."]


def test_a_picture_listed_twice_is_told(tmp_path):
    table = table_of().replace("5.png", "4.png")
    with pytest.warns(UserWarning, match="lists 6 pictures, of which only 5 differ"):
        idiff.load_data(write_pictures(tmp_path / "pics", table), image_size=16)


@pytest.mark.parametrize("flip", [False, True])
def test_a_draw_does_not_depend_on_the_columns_order(flip):
    """Three combinations that are equally far from the centres, (0, 0) in two rows."""
    factors = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 0]])
    sizes = {"a": 2, "b": 2}
    data = idiff.Data("gaps", sizes, (1, 16, 16), None, torch.device("cpu"),
                      factors.flip(1) if flip else factors)
    s, m = torch.ones(40_000, 2), torch.zeros(40_000, 2)
    rows = data.modulate(s, m, torch.Generator().manual_seed(0))
    share = torch.bincount(rows, minlength=4) / len(rows)
    expected = torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert (share - expected).abs().max() < 4 * (0.25 / 40_000) ** 0.5


def test_a_draw_follows_its_formula_on_a_grid_with_gaps():
    """Against the probabilities of every row, for one u, whatever combinations are missing."""
    rng = np.random.default_rng(0)
    factors = torch.from_numpy(rng.permutation(
        np.stack(np.unravel_index(np.arange(60), (3, 4, 5)), axis=1))[:23])
    data = idiff.Data("gaps", {"a": 3, "b": 4, "c": 5}, (1, 16, 16), None, torch.device("cpu"),
                      factors)
    s, m = torch.tensor([0.4, 0.7, 0.3]), torch.tensor([0.9, -0.2, 0.5])
    rows = data.modulate(s.expand(40_000, 3), m.expand(40_000, 3),
                         torch.Generator().manual_seed(0))
    g = 2 * factors / torch.tensor([2, 3, 4]) - 1
    p = (-0.5 * ((g - m) / s).square().sum(dim=1)).softmax(dim=0)
    share = torch.bincount(rows, minlength=23) / len(rows)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 40_000).sqrt() + 1e-4).all()


# ---- Reports ----


def test_both_numbers_of_rows_are_reported(monkeypatch):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(12_000, 2))
    seen = []
    monkeypatch.setattr(evaluate, "dci", lambda codes, *_: seen.append(len(codes)) or {})
    for trees, n_dci in ((True, 12_000), (False, 0)):
        report = evaluate.report_of_codes(codes, rng.integers(0, 3, (12_000, 2)), ["a", "b"],
                                          n=12_000, trees=trees)
        assert (report["n"], report["n_dci"]) == (10_000, n_dci)
        text = evaluate.format_report(report)
        assert "n = 10,000" in text and ("12,000 for DCI" in text) == trees
    assert seen == [12_000]


def test_categories_are_classes_to_a_report(monkeypatch):
    """32 of them, of which each is one value of a factor: a perfect code, and no noise in it."""
    factors = np.stack(np.unravel_index(np.arange(192), (32, 2, 3)), axis=1)[:, :2]
    pixels = torch.zeros(192, 1, 16, 16)
    pixels[:, 0, 0, :2] = torch.from_numpy(factors)
    data = idiff.Data("classes", {"a": 32, "b": 2}, (1, 16, 16), lambda rows: pixels[rows],
                      torch.device("cpu"), torch.from_numpy(factors))
    cfg = train.recipe(data, model="ivae", latent="gumbel", categories=32, width=8, latent_dim=2)
    model = idiff.IDiff(cfg).eval()
    monkeypatch.setattr(model, "encode", lambda x: (x[:, 0, 0, :2], torch.full((len(x), 2), -1.0)))
    report = evaluate.report(model, data, trees=False)
    assert report["metrics"]["mig"] > 0.999
    assert np.array_equal(report["arrays"]["samples"], report["arrays"]["codes"])


def test_dci_shows_how_far_it_is_within_a_factor(monkeypatch):
    """A hundred rounds of a tree for each value; showing them changes no number."""
    shown = []

    class Bar:
        def __init__(self, iterable, desc, total):
            shown.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            shown.append(n)
            return True                                        # as tqdm does when it has drawn
    rng = np.random.default_rng(0)
    factors = np.stack([np.arange(60) % 2, np.arange(60) % 3], axis=1)
    codes = factors + rng.normal(0, 0.3, (60, 2))
    before = evaluate.dci(codes, factors)
    monkeypatch.setattr(evaluate, "progress", Bar)
    assert evaluate.dci(codes, factors) == before
    assert sorted(shown) == [2] * 100 + [3] * 100 + [500]


# ---- What nobody is told otherwise ----


def test_where_no_picture_can_be_drawn_the_exit_says_so(tiny_run, tmp_path, monkeypatch, capsys):
    def full(*args, **named):
        raise OSError("no space left")
    monkeypatch.setattr(idiff, "save_grid", full)
    monkeypatch.setattr(interpolate, "write_gif", full)
    with pytest.raises(SystemExit, match="no picture"):
        interpolate.main([str(tiny_run / "ckpt.pt"), "--columns", "2", "--steps", "1",
                          "--out", str(tmp_path), "--device", "cpu"])
    assert "traversal_decoder.png is missing: no space left" in capsys.readouterr().err


@pytest.mark.usefixtures("pictures")
def test_a_finished_run_that_lost_its_log_says_why_a_picture_is_missing(tiny_run, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((tiny_run / "ckpt.pt").read_bytes())
    train.main(["--resume", str(tmp_path / "ckpt.pt"), "--device", "cpu"])
    assert "losses.png is missing: log.jsonl" in capsys.readouterr().err


def test_a_rank_says_for_whom_it_waits(monkeypatch, capsys):
    """After ten seconds, here at once: variables of torchrun are left, and nobody else is there."""
    class Timer:
        def __init__(self, seconds, function, args):
            self.call = lambda: seconds == 10 and function(*args)

        def start(self):
            self.call()

    def nobody():
        raise ValueError("nobody came")
    monkeypatch.setattr("threading.Timer", Timer)
    monkeypatch.setattr("torch.distributed.init_process_group", nobody)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    with pytest.raises(SystemExit, match="nobody came"):
        train.main(list(TINY))
    line = capsys.readouterr().err
    assert "rank 0 waits at node7 for all 2 ranks" in line and "unset RANK" in line


# ---- machines that others use, too ----


@pytest.mark.parametrize("busy, threads", [(0.02, 4), (0.27, 3), (0.55, 2), (0.97, 1)])
def test_torch_takes_as_many_threads_as_cores_are_free(busy, threads, monkeypatch, capsys):
    """A core that waits for a disk is free."""
    idle = waiting = round(500 * (1 - busy))
    used = 1000 - idle - waiting
    counts = iter(["cpu 5 0 0 7 3 0 0 0 0 0",
                   f"cpu {5 + used} 0 0 {7 + idle} {3 + waiting} 0 0 0 0 0"])
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
    assert not any(look("decoding", s) for s in (5, 8))        # the fastest counts, not the last
    assert "2.4 times" in look("decoding", 12)
    assert not look("decoding", 20)
