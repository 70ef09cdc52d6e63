# SPDX-License-Identifier: MIT
"""CUDA: where there is a GPU, by running there; elsewhere as far as tensors without content tell."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY

import evaluate
import train
from idiff import Config, load_checkpoint, load_data

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CFG = replace(Config(), width=8, unet_width=16, batch_size=16, rec_images=8, ddpm_images=8,
              settle=0.2, steps=10)


# ---- On a GPU ----

@needs_gpu
@pytest.mark.parametrize("predict", ["residual", "eps"])
def test_the_loss_is_the_cpus(predict, shapes3d):
    cfg = replace(CFG, predict=predict)
    model, _, _ = train.build(cfg, torch.device("cpu"))
    on_gpu, _, _ = train.build(cfg, torch.device("cuda"))
    on_gpu.load_state_dict(model.state_dict())
    x, u, t, eps = train.draw_batch(cfg, shapes3d, 5)
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        z = model.encode(x)[0]
        z_gpu = on_gpu.encode(x.cuda())[0]
        x_hat = model.decode(z)
        x_hat_gpu = on_gpu.decode(z.cuda())
        clean = model.denoise(eps, t, z[:8], x_hat[:8])
        clean_gpu = on_gpu.denoise(eps.cuda(), t.cuda(), z[:8].cuda(), x_hat[:8].cuda())
    torch.testing.assert_close(z_gpu.cpu(), z, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(x_hat_gpu.cpu(), x_hat, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(clean_gpu.cpu(), clean, atol=1e-3, rtol=1e-3)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_step_waits_for_the_gpu(precision):
    cfg = replace(CFG, precision=precision)
    data = load_data("shapes3d", torch.device("cuda"))
    parts = train.build(cfg, data.device)
    for step in (0, 5):                                    # settling and after: compiled here
        train.train_step(cfg, *parts, train.draw_batch(cfg, data, step), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 6):
            train.train_step(cfg, *parts, train.draw_batch(cfg, data, step), step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_run_on_the_gpu_is_read_on_the_cpu(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [flag for flag in TINY if flag not in ("--device", "cpu")]
    train.main([*flags, "--device", "cuda", "--steps", "4", "--out", str(out)])
    evaluate.main([str(out / "ckpt.pt"), "--device", "cpu", "--n", "500", "--no-dci"])
    report = json.loads((out / "metrics.json").read_text())
    assert 0 <= report["metrics"]["mig"] <= 1
    assert load_checkpoint(str(out / "ckpt.pt"), "cpu").unet is not None
