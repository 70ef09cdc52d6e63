# SPDX-License-Identifier: MIT
"""interpolate.py on a tiny model: what its grids hold, edits that keep the noise, bad input.

    python -m pytest tests/test_interpolate.py
    python -m pytest tests/test_interpolate.py -k swap
"""
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import idiff
import interpolate
from conftest import ROOT
from idiff import Config, IDiff, load_checkpoint, load_data, save_checkpoint

FAST = ["--columns", "3", "--steps", "4"]


def write_checkpoint(path, data, **config):
    """Path of an untrained model of three latents on the blocks of tiny_npz."""
    torch.manual_seed(0)
    model = IDiff(Config(**({"image_size": 16, "n_factors": 3, "latent_dim": 3, "width": 8,
                             "unet_width": 8} | config)))
    model.info = {"data": "blocks.npz", "data_arg": data, "step": 0}
    save_checkpoint(path, model, model)
    return str(path)


@pytest.fixture
def drawn(monkeypatch):
    """What main draws, {file's name: (images (rows, columns, C, H, W), rows, columns)}."""
    grids, save_grid = {}, idiff.save_grid

    def record(file, images, rows, columns):
        if isinstance(file, Path):
            shape = len(rows), len(columns)
            grids[file.name] = images.unflatten(0, shape), list(rows), list(columns)
        save_grid(file, images, rows, columns)
    monkeypatch.setattr(idiff, "save_grid", record)
    return grids


def refusal(argv):
    """What the user reads when main(argv) ends at once: one line."""
    with pytest.raises(SystemExit) as end:
        interpolate.main([*map(str, argv)])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---- the grids ----


@pytest.mark.usefixtures("pictures")
def test_the_plain_command_writes_grids_and_a_gif_that_loops(tiny_run, tmp_path):
    interpolate.main([str(tiny_run / "ckpt.pt"), *FAST, "--columns", "4", "--out", str(tmp_path)])
    stems = "traversal_decoder", "traversal_diffusion", "true_factors"
    assert {p.name for p in tmp_path.iterdir()} == {"traversal.gif", *(s + ".png" for s in stems)}
    side = 8 * 18                                                      # 16 and 2 pixels, 8 times
    for stem in stems:
        width, height = Image.open(tmp_path / f"{stem}.png").size
        assert 4 * side + 16 < width < 7 * side and 3 * side + 16 < height < 4 * side + 16
    gif = Image.open(tmp_path / "traversal.gif")
    shown = 0                                                          # PIL joins equal frames
    for k in range(gif.n_frames):
        gif.seek(k)
        shown += gif.info["duration"]
    assert shown == 6 * 120 and gif.info["loop"] == 0                  # 4 columns there, 2 back


@pytest.mark.usefixtures("pictures")
def test_a_picture_that_cannot_be_drawn_is_named_and_the_others_are(tiny_run, tmp_path, capsys,
                                                                    monkeypatch):
    save_grid = idiff.save_grid

    def fails_once(file, *args):
        if "true_factors" in str(file):
            raise ValueError("too many pixels")
        save_grid(file, *args)
    monkeypatch.setattr(idiff, "save_grid", fails_once)
    interpolate.main([str(tiny_run / "ckpt.pt"), *FAST, "--out", str(tmp_path)])
    assert "true_factors.png is missing: too many pixels" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {
        "traversal.gif", "traversal_decoder.png", "traversal_diffusion.png"}


def test_a_folder_that_takes_no_file_is_named_before_the_work(tiny_run, monkeypatch):
    monkeypatch.setattr(interpolate, "survey", lambda *_: pytest.fail("work"))
    assert "/proc/self" in refusal([tiny_run / "ckpt.pt", "--out", "/proc/self"])


def test_ctrl_c_is_one_line(tiny_run, monkeypatch, tmp_path):
    def pressed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(interpolate, "survey", pressed)
    assert refusal([tiny_run / "ckpt.pt", "--out", tmp_path]) == "interpolate.py: stopped"


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("side", [16, 64])
def test_pixels_are_enlarged_to_even_squares(tmp_path, side):
    """Every pixel of random images shows some 128 / side times larger, and no label is cut off."""
    x = torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cells = [np.pad(c.permute(1, 2, 0).mul(127.5).add(127.5).round().byte().numpy(),
                    ((1, 1), (1, 1), (0, 0)), constant_values=255) for c in x]
    want = np.vstack([np.hstack(cells[:3]), np.hstack(cells[3:])])
    want = want.repeat(128 // side, axis=0).repeat(128 // side, axis=1)
    height, width = want.shape[:2]
    for label in ("a", "word", "a longer one\nof two lines", "z3 · object hue"):
        idiff.save_grid(tmp_path / "grid.png", x, [label, "b"], ["", "c", "d"])
        shown = np.array(Image.open(tmp_path / "grid.png").convert("RGB"))
        assert any(np.array_equal(shown[i:i + height, j:j + width], want)
                   for i in range(len(shown) - height + 1)
                   for j in range(shown.shape[1] - width + 1))
        ink = (shown < 128).any(axis=2)
        assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any()


@pytest.mark.parametrize("sampler", ["dpmpp", "em"])
def test_a_row_varies_its_latent_alone(tiny_run, tmp_path, drawn, monkeypatch, sampler):
    """Where both networks see latent 1 only, all cells but those of its row are equal."""
    model, mask = load_checkpoint(tiny_run / "ckpt.pt"), torch.tensor([0.0, 300.0, 0.0])
    model.decoder.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask,))
    model.unet.register_forward_pre_hook(
        lambda module, inputs: (*inputs[:2], inputs[2] * mask, inputs[3]))
    monkeypatch.setattr(idiff, "load_checkpoint", lambda *_: model)
    interpolate.main(["ckpt.pt", *FAST, "--sampler", sampler, "--latents", "0", "1", "z2",
                      "--out", str(tmp_path)])
    for network in ("decoder", "diffusion"):
        images, rows, _ = drawn[f"traversal_{network}.png"]
        assert [row.split()[0] for row in rows] == ["z0", "z1", "z2"]
        assert torch.allclose(images[::2], images[0, 0].expand_as(images[::2]), atol=1e-5)
        assert (images[1].diff(dim=0).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_values_run_over_the_latents_own_range(tiny_run, tiny_npz, tmp_path, drawn, monkeypatch):
    model, data = load_checkpoint(tiny_run / "ckpt.pt"), load_data(tiny_npz)
    mean, _ = model.encode(data.images(torch.arange(24)))
    codes = (mean - mean.mean(dim=0)) / mean.std(dim=0)                # four steps left it tiny
    encode = model.encode
    monkeypatch.setattr(idiff, "load_checkpoint", lambda *_: model)
    model.encode = lambda x: ((encode(x)[0] - mean.mean(dim=0)) / mean.std(dim=0), None)
    low, high = np.quantile(codes, [0.02, 0.98], axis=0)
    interpolate.main(["ckpt.pt", *FAST, "--latents", "z1", "--out", str(tmp_path)])
    images, rows, columns = drawn["traversal_decoder.png"]
    assert rows[0].splitlines()[1] == f"{low[1]:.2f} to {high[1]:.2f}"
    assert columns == ["2 % quantile", "", "98 % quantile"]
    z = codes.repeat_interleave(3, dim=0).unflatten(0, (24, 3))        # the base image is a row
    z[:, :, 1] = torch.tensor([low[1], (low[1] + high[1]) / 2, high[1]])
    shown = model.decode(z.flatten(0, 1)).unflatten(0, (24, 3))
    assert (shown - images[0]).abs().amax(dim=(1, 2, 3, 4)).min() < 1e-5


def test_factors_that_are_numbers_are_binned_without_a_word(tiny_npz, tmp_path):
    """Python's own warnings, with lines of code, are not for users; evaluate.py tells it."""
    with np.load(tiny_npz) as arrays:
        images = arrays["images"]
    path = str(tmp_path / "numbers.npz")
    np.savez(path, images=images, factors=np.arange(24.0) ** 2)
    checkpoint = write_checkpoint(tmp_path / "ckpt.pt", path, n_factors=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpolate.main([checkpoint, *FAST])


def test_true_factors_say_how_many_values_they_show(tiny_npz):
    _, labels, _ = interpolate.true_factors(load_data(tiny_npz), row=0, columns=3)
    assert labels == ["factor 0\n3 of 4 values", "factor 1\n3 values", "factor 2\n2 values"]


def test_true_factors_vary_one_at_a_time(tiny_run, tiny_npz, tmp_path, drawn):
    interpolate.main([str(tiny_run / "ckpt.pt"), *FAST, "--columns", "4", "--out", str(tmp_path)])
    images, rows, _ = drawn["true_factors.png"]
    everything = load_data(tiny_npz).images(torch.arange(24))
    factors = load_data(tiny_npz).factors(torch.arange(24))
    for k, (n, row) in enumerate(zip((4, 3, 2), images)):
        assert rows[k] == f"factor {k}\n{n} values" and (row[n:] == 1).all()
        shown = [int((everything == x).flatten(1).all(1).nonzero()) for x in row[:n]]
        others = np.delete(factors[shown].numpy(), k, axis=1)
        assert factors[shown, k].tolist() == list(range(n)) and (others == others[0]).all()


@pytest.mark.usefixtures("pictures")
def test_seed_decides_every_pixel(tiny_npz, tmp_path):
    """Seed 0 twice gives the same files; seed 1 gives others. Weights so large that all shows."""
    path = write_checkpoint(tmp_path / "ckpt.pt", tiny_npz)
    content = torch.load(path, weights_only=True)
    content["ema"] = {name: 2 * weight for name, weight in content["ema"].items()}
    torch.save(content, path)
    files = {}
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        interpolate.main([path, *FAST, "--sampler", "pc", "--seed", seed, "--latents", "0",
                          "--out", str(tmp_path / folder)])
        files[folder] = [p.read_bytes() for p in sorted((tmp_path / folder).iterdir())]
    assert files["a"] == files["b"] and all(a != c for a, c in zip(files["a"], files["c"]))


def test_latents_are_named_by_the_factor_they_know(tiny_npz):
    data = load_data(tiny_npz)
    rows = {x.numpy().tobytes(): i for i, x in enumerate(data.images(torch.arange(24)))}

    def encode(x):                                                     # factor 2, nothing, factor 0
        y = data.factors(torch.tensor([rows[image.numpy().tobytes()] for image in x])).float()
        return torch.stack([-y[:, 2], 0 * y[:, 0], 3 * y[:, 0]], dim=1), None
    rows_seen, codes, names = interpolate.survey(SimpleNamespace(encode=encode), data, 0)
    assert sorted(rows_seen.tolist()) == list(range(24)) and codes.shape == (24, 3)
    assert names == {2: "z2 · factor 0", 0: "z0 · factor 2", 1: "z1"}
    assert list(names) == [2, 0, 1]
    for wanted in (["2", "1"], ["z2", "z1"], ["factor 0", "z1"]):
        assert interpolate.choose(wanted, names) == {2: "z2 · factor 0", 1: "z1"}


# ---- edits ----


def test_swapping_all_latents_gives_those_of_b(tiny_run, tmp_path, drawn):
    shown = []
    for pair in (["3", "17"], ["17", "3"]):
        interpolate.main([str(tiny_run / "ckpt.pt"), "--swap", *pair, "--out", str(tmp_path)])
        images, rows, columns = drawn["swap.png"]
        assert rows == ["decoder", "diffusion"]
        assert [*columns[:2], columns[-1]] == ["A", "redrawn", "B"]
        shown.append(images)
    there, back = shown
    assert torch.allclose(there[0, -2], back[0, 1], atol=1e-5)         # decoder: z of B is all of B
    assert torch.equal(there[:, 0], back[:, -1]) and torch.equal(there[:, -1], back[:, 0])
    for images in shown:                                               # A's own noise is kept
        assert (images[1, 1] - images[1, 0]).abs().mean() < 1e-2


def test_swapping_one_latent_changes_one_latent(tiny_run, tiny_npz, tmp_path, drawn):
    model, data = load_checkpoint(tiny_run / "ckpt.pt"), load_data(tiny_npz)
    a, b = model.encode(data.images(torch.tensor([3, 17])))[0]
    interpolate.main([str(tiny_run / "ckpt.pt"), *FAST, "--swap", "3", "17", "--latents", "z2",
                      "--out", str(tmp_path)])
    images, _, columns = drawn["swap.png"]
    assert len(columns) == 4 and columns[2].startswith("z2")           # A, redrawn, z2 of B, B
    assert torch.allclose(model.decode(torch.stack([a[0], a[1], b[2]])[None])[0], images[0, 2],
                          atol=1e-5)


def test_interpolation_ends_at_both_images(tiny_run, tmp_path, drawn):
    interpolate.main([str(tiny_run / "ckpt.pt"), "--columns", "3", "--between", "3", "17", "--out",
                      str(tmp_path)])
    images, _, columns = drawn["between.png"]
    assert columns == ["A", "0.00", "0.50", "1.00", "B"]
    assert (images[1, 1] - images[1, 0]).abs().mean() < 1e-2
    assert (images[1, 3] - images[1, 4]).abs().mean() < 1e-2
    assert (images[1, 2] - images[1, 0]).abs().mean() > 1e-2


def test_slerp_keeps_to_the_sphere():
    a, b = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    b = b * a.norm() / b.norm()
    w = torch.tensor([0.0, 0.25, 0.5, 1.0])
    points = interpolate.slerp(a, b, w)
    assert torch.allclose(points[[0, 3]], torch.cat([a, b]), atol=1e-4)
    assert torch.allclose(points.flatten(1).norm(dim=1), a.norm(), rtol=1e-4)
    angles = [torch.nn.functional.cosine_similarity(a.flatten(), p.flatten(), dim=0).acos()
              for p in points]
    assert 2 * float(angles[1]) == pytest.approx(float(angles[2]), rel=1e-3)   # even steps
    assert torch.allclose(interpolate.slerp(a, a, w), a.expand(4, -1, -1, -1), atol=1e-3)


@pytest.mark.usefixtures("pictures")
def test_a_picture_of_ones_own_is_cropped_redrawn_and_traversed(tiny_run, tmp_path, drawn):
    picture = Image.new("RGB", (90, 40), (0, 0, 255))                  # blue at both sides
    picture.paste((255, 0, 0), (25, 0, 65, 40))                        # the middle square is red
    picture.save(tmp_path / "mine.png")
    interpolate.main([str(tiny_run / "ckpt.pt"), "--columns", "3", "--image",
                      str(tmp_path / "mine.png"), "--out", str(tmp_path)])
    images, rows, columns = drawn["image.png"]
    assert rows == ["decoder", "diffusion"] and columns == ["A", "redrawn"]
    colour = images[1, 0][:, :, 2:-2].flatten(1)                       # without the blurred sides
    assert torch.allclose(colour.T, torch.tensor([1.0, -1.0, -1.0]), atol=0.02)
    assert (images[1, 1] - images[1, 0]).abs().mean() < 1e-2
    assert drawn["image_diffusion.png"][0].shape[:2] == (3, 3) and (tmp_path / "image.gif").exists()


@pytest.mark.parametrize("kind", ["vae", "ivae"])
def test_without_a_unet_the_decoder_draws_alone(tiny_npz, tmp_path, drawn, kind):
    path = write_checkpoint(tmp_path / "ckpt.pt", tiny_npz, model=kind)
    interpolate.main([path, *FAST])
    interpolate.main([path, *FAST, "--swap", "3", "17", "--between", "3", "17", "--image", "3"])
    assert set(drawn) == {"traversal_decoder.png", "true_factors.png", "swap.png", "between.png",
                          "image.png", "image_decoder.png"}
    assert all(drawn[name][1] == ["decoder"] for name in ("swap.png", "between.png", "image.png"))


# ---- bad input ----


@pytest.mark.parametrize("flags, words", [
    (["--latents", "z9"], ["z9", "z0", "z2"]),
    (["--swap", "3", "24"], ["24", "blocks.npz"]),
    (["--image", "no.png"], ["no.png", "picture"]),
    (["--image", __file__], ["test_interpolate.py", "picture"]),
    (["--between", "3", "17", "--sampler", "em"], ["em", "noise"]),
    (["--columns", "1"], ["--columns", "2"]),
    (["--steps", "0"], ["--steps", "1"]),
    (["--seed", "-1"], ["--seed", "0"]),
    (["--data", "no.npz"], ["no.npz"]),
    (["--data", "dsprites"], ["(B, 3, 16, 16)"]),
    (["--out", __file__], ["test_interpolate.py"])])
def test_a_wrong_flag_is_told_in_one_line(tiny_run, tmp_path, flags, words):
    text = refusal([tiny_run / "ckpt.pt", "--out", tmp_path, *flags])
    assert all(word in text for word in words)


def test_a_wrong_checkpoint_is_told_in_one_line(tmp_path):
    (tmp_path / "a.pt").write_text("no checkpoint")
    assert "not found" in refusal([tmp_path / "ckpt.pt"])
    assert "a.pt" in refusal([tmp_path / "a.pt"])
    run = subprocess.run([sys.executable, ROOT / "interpolate.py", tmp_path / "ckpt.pt"],
                         capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1 and not run.stdout


# ---- pictures of any kind, latents without factors ----


def test_pictures_of_16_bits_and_transparent_ones_are_seen_as_they_look(tiny_npz, tmp_path):
    data = load_data(tiny_npz)
    half = np.full((16, 16), 32896, np.uint16)
    Image.fromarray(half).save(tmp_path / "grey.png")
    x = interpolate.read_image(str(tmp_path / "grey.png"), data)
    assert x.shape == (3, 16, 16) and x.abs().max() < 0.01
    clear = np.zeros((16, 16, 4), np.uint8)
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert (interpolate.read_image(str(tmp_path / "clear.png"), data) == 1).all()
    for mode in ("P", "CMYK", "LA", "1"):
        path = tmp_path / f"{mode}.tiff"
        Image.new("RGB", (40, 20), "red").convert(mode if mode != "LA" else "L").save(path)
        assert interpolate.read_image(str(path), data).shape == (3, 16, 16)


def test_a_picture_is_turned_as_its_camera_was_held(tiny_npz, tmp_path):
    """Its left half is white; its camera was turned, so that this half is the upper one."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6                                        # orientation: turn it clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    x = interpolate.read_image(str(tmp_path / "a.png"), load_data(tiny_npz))
    assert (x[:, :8] == 1).all() and (x[:, 8:] == -1).all()


def test_a_colour_picture_is_grey_to_a_model_of_grey_images(tmp_path):
    np.savez(tmp_path / "grey.npz", images=np.eye(16, dtype=np.uint8)[None].repeat(4, axis=0))
    Image.new("RGB", (40, 20), (255, 128, 0)).save(tmp_path / "a.png")
    x = interpolate.read_image(str(tmp_path / "a.png"), load_data(str(tmp_path / "grey.npz")))
    assert x.shape == (1, 16, 16) and torch.allclose(x, torch.tensor(1 / 765, dtype=x.dtype))


def test_pictures_without_one_meaning_are_refused(tiny_npz, tmp_path):
    data = load_data(tiny_npz)
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "a.tiff")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for name in ("a.tiff", "a.gif"):
        with pytest.raises(ValueError, match=f"{name}.*PNG"):
            interpolate.read_image(str(tmp_path / name), data)
