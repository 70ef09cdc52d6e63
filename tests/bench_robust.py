# SPDX-License-Identifier: MIT
"""Does iDiff keep its word on crashes and on damaged files? Prints one table; tests use its parts.

    python tests/bench_robust.py                    # 50 kills, 10,000 files, 10,000 steps
    python tests/bench_robust.py files 500          # or one part of it: kills, files or memory
"""
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate  # noqa: E402
import interpolate  # noqa: E402
import train  # noqa: E402
from conftest import same, start  # noqa: E402
from idiff import load_checkpoint, load_data, read_checkpoint  # noqa: E402

SMALL = ("--width 1 --unet-width 8 --batch-size 2 --ddpm-images 1 --device cpu --latent-dim 2 "
         "--size small --log-every 1 --save-every 1").split()
FACTORS = np.stack(np.unravel_index(np.arange(24), (4, 3, 2)), axis=1)
IMAGES = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), np.uint8)

def quietly(function, *args):
    """What the function returns; what it prints is dropped."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)

def same_run(a, b):
    """Whether two run folders hold the same checkpoint and, but for the clock, the same log."""
    logs = [[{**json.loads(line), "seconds": 0} for line in (run / "log.jsonl").read_text()
             .splitlines()] for run in (a, b)]
    contents = [read_checkpoint(run / "ckpt.pt") for run in (a, b)]
    for content in contents:
        content.pop("log_size")                                # the clock's digits vary
    return logs[0] == logs[1] and same(*contents)

# ---- kills ----

def child(argv):
    """train.py in a process of its own, silent and on one thread."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(argv)

def go_on(out, argv):
    """The process of argv's training in out, where the same command goes on."""
    return start(child, [*argv, "--out", str(out)])

def wait(process, log, rng):
    """Until a random moment: some lines of the log later, and somewhere between two of them."""
    lines, pause, since = rng.choice([0, 2, 2, 3, 4, 5]), 0.5, time.time()
    size = log.stat().st_size if log.exists() else 0
    while lines and process.is_alive():
        time.sleep(0.002)
        if log.exists() and log.stat().st_size != size:
            size = log.stat().st_size
            lines -= 1
            pause = time.time() - since
            since = time.time()
    process.join(rng.uniform(0, 1) * min(pause, 2))

def killed(out, argv, rng, n_kills):
    """Train into out under kill -9 at random moments, then to the end; counts what was hit."""
    found = Counter()
    while found["kills"] < n_kills:
        process = go_on(out, argv)
        wait(process, out / "log.jsonl", rng)
        if process.exitcode is not None:
            break                                       # it had ended
        process.kill()
        process.join()
        found += Counter({"kills": 1, "before the first checkpoint": not (out / "ckpt.pt").exists(),
                          "while writing one": (out / "ckpt.pt.partial").exists()})
    process = go_on(out, argv)
    process.join()
    found["exit status not 0"] += process.exitcode != 0
    return found

def kill_runs(folder, n_kills, per_run=10, steps=40, seed=0):
    """Counts over runs killed per_run times each, against a run that nobody disturbed."""
    data, rng, found = folder / "data.npz", random.Random(seed), Counter()
    np.savez(data, images=IMAGES, factors=FACTORS)
    argv = [*SMALL, "--data", str(data), "--steps", str(steps)]
    start(child, [*argv, "--out", str(folder / "whole")]).join()
    while found["kills"] < n_kills:
        out = folder / f"run{found['runs']}"
        found += killed(out, argv, rng, min(per_run, n_kills - found["kills"]))
        found += Counter({"runs": 1, "equal bit for bit": same_run(out, folder / "whole")})
    return found

# ---- hostile files ----

class Code:
    """What unpickling this does is leave a file behind."""
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")

def odd_values():
    """Values that no file of ours holds in the place of another."""
    t = torch.ones
    return [None, -1, 0, 3, 2**40, 2**70, 1.5, math.nan, math.inf, True, "", "x\ny", "../..", b"",
            [], {}, [[1]], {"a": 1}, {1: 2}, t(()), t(3), t(2, 3) * math.nan,
            t(3, dtype=torch.int64), t(3, dtype=torch.float64), t(3, dtype=torch.complex64),
            t(1).expand(10**6, 10**6), t(2, 2).to_sparse(), t(3, device="meta"), t(0)]

def places(content, path=()):
    """Every place in nested dicts and lists, as a path of keys."""
    for key, value in (content.items() if isinstance(content, dict) else enumerate(content)):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))

def with_odd_place(content, rng, values):
    """A copy of nested dicts and lists in which one place is gone, odd or of another shape."""
    content = pickle.loads(pickle.dumps(content))
    top = rng.choice(list(content))                     # each part alike, whatever its size
    inside = [(top, *p) for p in places(content[top])] if isinstance(content[top], dict) else []
    *path, last = rng.choice([(top,), *inside]) if rng.random() < 0.9 else (top,)
    target = content
    for key in path:
        target = target[key]
    value, way = target[last], rng.randrange(6)
    if way == 0:
        del target[last]
    elif way == 1 and isinstance(value, torch.Tensor) and value.is_floating_point():
        target[last] = rng.choice([value * math.nan, value.double(), value[..., :-1] if value.dim()
                                   else value[None], value[None], value.flatten(), value * 1e30])
    elif way == 2 and type(value) in (int, float):
        target[last] = rng.choice([value * 10**rng.randrange(1, 12), -value, value + 1, str(value)])
    else:
        target[last] = rng.choice(values)
    return content

def with_odd_bytes(content, rng):
    """The bytes of a file cut, flipped, zeroed, doubled or filled in."""
    content, at = bytearray(content), rng.randrange(len(content))
    size = rng.choice([1, 4, 64, 4096])
    way = rng.randrange(6)
    if way == 0:
        return content[:at]
    if way == 1:
        for _ in range(rng.choice([1, 8, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == 2:                                      # near the end stand a zip's sizes
        at = rng.randrange(max(0, len(content) - 3000), len(content))
        content[at] ^= 1 << rng.randrange(8)
    elif way == 3:                                      # near the start stand those of h5
        content[rng.randrange(min(3000, len(content)))] ^= 1 << rng.randrange(8)
    elif way == 4:
        content[at:at + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])
    else:
        content[at:at] = rng.choice([content[at:at + size], rng.randbytes(size)])
    return content

def zip_claiming(path, rng, size=2**42):
    """The zip rewritten, one of its entries claiming a size that nothing could hold."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)
        rng.choice(new.filelist).file_size = size

def png_claiming(path, side):
    """The PNG rewritten, its header claiming more pixels than memory holds."""
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)

def odd_array(rng):
    """An array of odd shape, dtype or values."""
    shape = rng.choice([(), (0,), (24,), (24, 0), (24, 3), (24, 1), (23, 3), (2, 2), (24, 16, 16),
                        (24, 16, 16, 3), (24, 15, 16, 3), (24, 0, 0, 3), (24, 4, 4, 1, 1)])
    dtype = rng.choice(["u1", "i8", "f4", "f8", "c16", "?", "S3", "U2", "M8[s]", "u8", "f2",
                        [("a", "u1")]])
    bits = rng.randbytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if np.dtype(dtype).kind == "U":
        return np.full(shape, "x", dtype)                # random bits are no text
    return np.frombuffer(bits, dtype).reshape(shape)

def write_npz(path, arrays, rng, trace):
    """An .npz of arrays, one of them odd: its header, dtype, shape, values or key, or code."""
    key, way = rng.choice(list(arrays)), rng.randrange(6)
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for name, array in arrays.items():
            page = io.BytesIO()
            if name == key and way == 0:
                continue
            if name == key and way == 1:
                array = np.array([Code(trace)], dtype=object)
            if name == key and way in (2, 3):
                array = odd_array(rng)
            np.lib.format.write_array(page, array)
            content = page.getvalue()
            if name == key and way == 4:                # claims terabytes, or nonsense
                shape = rng.choice([(10**12,), (10**6, 10**6), (2**62, 8), (-1, 4),
                                    (10**9, 16, 16, 3), (24, 10**9)])
                page = io.BytesIO()
                np.lib.format.write_array_header_1_0(page, {
                    "descr": rng.choice(["|u1", "<f8", "<i8", "|O", "<U99999"]),
                    "fortran_order": rng.random() < 0.5, "shape": shape})
                content = page.getvalue() + bytes(100)
            file.writestr(name + ".npy" if way != 5 or name != key else "../" + name, content)

def write_h5(path, rng):
    """An .h5 of images and labels, one of them odd."""
    arrays, key, way = {"images": IMAGES, "labels": FACTORS}, rng.choice(["images", "labels"]), \
        rng.randrange(7)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if name != key or way == 0:
                file.create_dataset(name, data=array, chunks=rng.choice([None, True]))
            elif way == 1:
                shape = rng.choice([(10**12,), (10**9, 64, 64, 3), (10**10, 6), (2**50, 2)])
                chunks = tuple(min(8, side) for side in shape)
                file.create_dataset(name, shape, rng.choice(["u1", "f8"]), chunks=chunks)
            elif way == 2:
                file.create_group(name)
            elif way == 3:
                file[name] = h5py.SoftLink("/nowhere") if rng.random() < 0.5 else \
                    h5py.ExternalLink("/etc/passwd", "/x")
            elif way == 4:
                file.create_dataset(name, data=["a", "bc"] * 12, dtype=h5py.string_dtype())
            elif way == 5 and (array := odd_array(rng)).dtype.kind not in "UM":
                file[name] = array

class Bench:
    """A good file of every kind, the runs of a damaged copy, and what became of each."""
    def __init__(self, folder, seed=0):
        self.folder, self.rng, self.trace = folder, random.Random(seed), folder / "trace"
        self.data, self.run = folder / "data.npz", folder / "run"
        np.savez(self.data, images=IMAGES, factors=FACTORS)
        argv = [*SMALL, "--data", str(self.data), "--out", str(self.run)]
        quietly(train.main, [*argv, "--steps", "2"])
        self.good = {"ckpt.pt": (self.run / "ckpt.pt").read_bytes(), "log.jsonl":
                     (self.run / "log.jsonl").read_bytes(), "data.npz": self.data.read_bytes()}
        self.content = torch.load(self.run / "ckpt.pt", weights_only=True)
        with h5py.File(folder / "data.h5", "w") as file:
            file["images"], file["labels"] = IMAGES, FACTORS
        self.good["data.h5"] = (folder / "data.h5").read_bytes()
        quietly(evaluate.main, [str(self.run / "ckpt.pt"), "--no-dci"])
        self.good["metrics.json"] = (self.run / "metrics.json").read_bytes()

    def checkpoint(self, way):
        """A damaged checkpoint in place of the good one, and what may be done with it."""
        path = self.run / "ckpt.pt"
        if way == "bytes":
            path.write_bytes(with_odd_bytes(self.good["ckpt.pt"], self.rng))
        elif way == "size":
            path.write_bytes(self.good["ckpt.pt"])
            zip_claiming(path, self.rng)
        elif way == "code":
            content = dict(self.content, **{self.rng.choice(list(self.content)): Code(self.trace)})
            (torch.save if self.rng.random() < 0.7 else pickle_to)(content, path)
        else:
            torch.save(with_odd_place(self.content, self.rng, odd_values()), path)
        return path, self.rng.choice([
            lambda: load_checkpoint(path), lambda: load_checkpoint(path),
            lambda: evaluate.main([str(path), "--no-dci"]),
            lambda: interpolate.main([str(path), "--steps", "1", "--columns", "2"]),
            lambda: train.main(["--resume", str(path), "--device", "cpu"])])

    def data_file(self, way):
        path = self.folder / "odd.npz"
        if way == "bytes":
            good = self.good[self.rng.choice(["data.npz", "data.h5"])]
            path.write_bytes(with_odd_bytes(good, self.rng))
        elif way == "size":
            path.write_bytes(self.good["data.npz"])
            zip_claiming(path, self.rng)
        elif way == "code":
            pickle_to({"images": Code(self.trace)}, path)
        elif self.rng.random() < 0.3:
            write_h5(path, self.rng)
        else:
            labels = self.rng.choice(["factors", "labels", "latents_classes"])
            arrays = {"images": IMAGES, labels: FACTORS, "u": FACTORS / 3,
                      "factor_names": np.array(["a", "b", "c"])}
            write_npz(path, arrays, self.rng, self.trace)
        u = self.rng.choice(["own", "mean+var"])
        return path, lambda: load_data(str(path)).draw(8, torch.Generator(), u)

    def picture_folder(self, way):
        """A folder of pictures, of which one, or the table, is damaged."""
        folder = self.folder / "pics"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = self.rng.choice(["png", "tiff", "gif", "jpeg"])
        for i in range(4):
            Image.fromarray(IMAGES[i]).save(folder / f"{i}.{kind}")
        rows = [["file", "a", "größe", "u", "u:b"]]
        rows += [[f"{i}.{kind}", str(i % 2), str(i), f"{i}.5", str(-i)] for i in range(4)]
        path = folder / f"{self.rng.randrange(4)}.{kind}"
        if way == "bytes" and self.rng.random() < 0.5:
            path.write_bytes(with_odd_bytes(path.read_bytes(), self.rng))
        elif way == "size":
            rows[1][0] = "0.png"
            Image.fromarray(IMAGES[0]).save(folder / "0.png")
            png_claiming(folder / "0.png", self.rng.choice([60_000, 2**31 - 1]))
        elif way == "code":
            pickle_to(Code(self.trace), path)
        elif way == "structure":
            values = ["", " ", "nan", "inf", "1e999", "x" * 200_000, '"', "\0", "../..",
                      "file", "u", "a,b", "\n", "-1", "١", str(2**70), f"9.{kind}", ".", "~"]
            for _ in range(self.rng.choice([1, 1, 2, 5])):
                row = self.rng.choice(rows)
                at, move = self.rng.randrange(max(1, len(row))), self.rng.randrange(8)
                if move == 0:
                    del row[at:at + 1]
                elif move == 1:
                    row.insert(at, self.rng.choice(values))
                elif move == 2:
                    rows.remove(row)
                    rows = rows or [[]]
                elif row:
                    row[at] = self.rng.choice(values)
        table = "\n".join(",".join(row) for row in rows).encode("utf-8")
        if way == "bytes" and self.rng.random() < 0.6:
            table = with_odd_bytes(table, self.rng)
        (folder / "table.csv").write_bytes(table)
        u = self.rng.choice(["own", "mean+var"])
        return folder, lambda: load_data(str(folder)).draw(8, torch.Generator(), u)

    def codes_file(self, way):
        """Codes and factors of somebody else's model."""
        path = self.folder / "codes.npz"
        arrays = {"codes": np.random.default_rng(0).normal(size=(24, 4)), "factors": FACTORS}
        np.savez(path, **arrays)
        if way == "bytes":
            path.write_bytes(with_odd_bytes(path.read_bytes(), self.rng))
        elif way == "size":
            zip_claiming(path, self.rng)
        else:
            write_npz(path, arrays, self.rng, self.trace)
        return path, lambda: evaluate.main([str(path), "--no-dci", "--n", "24"])

    def text_file(self, way):
        """A damaged metrics.json or log.jsonl beside a good checkpoint."""
        name, path = self.rng.choice(["metrics.json", "log.jsonl"]), self.run / "ckpt.pt"
        path.write_bytes(self.good["ckpt.pt"])
        if way == "bytes":
            content = with_odd_bytes(self.good[name], self.rng)
        elif way == "size":
            content = b"[" * 10**5
        elif name == "metrics.json":
            values = [None, -1, 2.5, 10**400, math.nan, True, "", "x", [], {}, [[1]], {"a": 1}]
            content = json.dumps(with_odd_place(json.loads(self.good[name]), self.rng, values))
        else:
            content = self.rng.choice(['{"step": 1}', '{"step": "a", "rec": []}', "[1]", "{}", "3",
                                       '{"step": null}', '{"step": 1, "rec": 1.2.3}', "NaN"])
        content = content.encode() if isinstance(content, str) else bytes(content)
        (self.run / name).write_bytes(content + b"\n")
        if name == "metrics.json":
            return path, lambda: evaluate.main([str(self.run / name)])
        return path, lambda: train.main(["--resume", str(path), "--device", "cpu"])

def pickle_to(content, path):
    path.write_bytes(pickle.dumps(content))

class Stub(dict):
    def savefig(self, *args, **kwargs):
        pass

def stop(*_):
    raise RuntimeError("took more than a minute")

@contextmanager
def without_pictures():
    """Pictures and the end of a run take seconds and read no file: left out in most cases."""
    kept = {(module, name): getattr(module, name) for module, name in [
        *((evaluate, n) for n in vars(evaluate) if n.startswith("draw_")),
        (interpolate, "traverse"), (interpolate, "true_factors"), (train, "finish")]}
    for module, name in kept:
        setattr(module, name, lambda *args, **named: Stub())
    yield
    for (module, name), function in kept.items():
        setattr(module, name, function)

def outcome(path, action, trace):
    """Short text of what an action on a damaged file did; begins with BAD if it may not."""
    try:
        quietly(action)
        text = "loaded"
    except (SystemExit, ValueError, OSError, MemoryError) as error:
        line, name = str(error), type(error).__name__
        good = "\n" not in line and line != "2" and any(
            name in line for name in (path.name, path.parent.name, "data not found"))
        text = name if good else f"BAD {name}: {line[:300]!r}"
    except BaseException as error:
        last = error.__traceback__
        while last.tb_next:
            last = last.tb_next
        text = (f"BAD {type(error).__name__}: {str(error)[:150]!r} "
                f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}")
    return "BAD code was run" if trace.exists() else text

def damage_files(folder, n, seed=0, report=lambda *args: None):
    """{kind: Counter of outcomes} of n damaged files, and the growth of peak memory in MiB."""
    bench, found = Bench(folder, seed), {}
    kinds = {"checkpoint": bench.checkpoint, "data": bench.data_file, "codes": bench.codes_file,
             "folder": bench.picture_folder,
             "metrics.json, log.jsonl": bench.text_file}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, stop)
    for i in range(n):
        kind = list(kinds)[i % len(kinds)]
        way = bench.rng.choices(["bytes", "structure", "size", "code"], [4, 4, 1, 1])[0]
        path, action = kinds[kind](way)
        signal.alarm(60)
        if i % 200 < 197:
            with without_pictures():
                text = outcome(path, action, bench.trace)
        else:
            text = outcome(path, action, bench.trace)
        signal.alarm(0)
        if text.startswith("BAD"):
            report(f"{kind}, {way}, case {i}: {text}")
        bench.trace.unlink(missing_ok=True)
        found.setdefault(f"{kind}: {way}", Counter())[text.split(":")[0]] += 1
    signal.signal(signal.SIGALRM, handler)
    return found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

# ---- memory ----

def resident(pid):
    """Resident memory of a process in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024

def memory_over_steps(folder, steps=10_000, every=1000):
    """{step: MiB resident} of one training, read as its log grows."""
    np.savez(folder / "data.npz", images=IMAGES, factors=FACTORS)
    process = start(child, [
        *SMALL[:-4], "--data", str(folder / "data.npz"), "--steps", str(steps + 1),
        "--out", str(folder / "long"), "--log-every", str(every), "--save-every", str(every)])
    found = {}
    while process.is_alive() and steps not in found:
        time.sleep(0.02)
        log = folder / "long" / "log.jsonl"
        lines = log.read_text().splitlines()[1:] if log.exists() else []
        if lines and (step := json.loads(lines[-1]).get("step")) not in found:
            found[step] = resident(process.pid)
    process.join()
    return found

def main(part="all", n=None):
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)
    torch.set_num_threads(1)
    for name, default in (("kills", 50), ("files", 10_000), ("memory", 10_000)):
        if part not in ("all", name):
            continue
        count, began = int(n or default), time.time()
        with tempfile.TemporaryDirectory() as folder:
            if name == "kills":
                rows = kill_runs(Path(folder), count).items()
            elif name == "files":
                found, growth = damage_files(Path(folder), count, report=print)
                rows = [*((k, ", ".join(f"{v} {t}" for t, v in c.most_common()))
                          for k, c in sorted(found.items())), ("peak memory grew by, MiB", growth)]
            else:
                rows = ((f"MiB at step {k}", v) for k, v in memory_over_steps(Path(folder), count)
                        .items())
            print(f"\n{name}, {count}, in {time.time() - began:.0f} s")
            for key, value in rows:
                print(f"  {key:36} {value}")

if __name__ == "__main__":
    main(*sys.argv[1:])
