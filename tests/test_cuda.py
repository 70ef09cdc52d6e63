# SPDX-License-Identifier: MIT
"""CUDA: where there is a GPU, by running there; elsewhere as far as empty tensors tell."""
import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import evaluate
import idiff
import train
from idiff import SAMPLERS, Config, load_checkpoint, load_data, time_grid

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CFG = replace(Config(), width=8, unet_width=16, batch_size=16, rec_images=8, ddpm_images=8,
              settle=0.2, steps=10)


# ---- Without one: tensors that claim to be on cuda:0 and have no content ----
# They refuse to meet a tensor of the CPU, and to tell a number, for which the host would wait.

class NoGenerator:
    """Stands for a generator on the GPU, which there is none."""

    def __init__(self, device):
        assert torch.device(device).type == "cuda"

    def manual_seed(self, seed):
        return None


def move(module, device, **_):
    """What Module.to does, which cannot move fake tensors."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(p.detach().to(device))
    return module


@pytest.fixture
def fake_cuda(monkeypatch):
    """The device cuda:0; within, tensors are fake, and backward fills gradients with zeros."""
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda t: torch.arange(len(t), device=t.device))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(idiff, "render_shapes3d", lambda device: torch.zeros(
        480, 4, 64, 64, dtype=torch.uint8, device=device))
    # at their start, stochastic samplers wait: whether times decrease is read off them
    monkeypatch.setattr(idiff, "check_stochastic", lambda noise, ts: None)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        monkeypatch.setattr(train, "deepcopy", lambda model: deepcopy(model, {id(mode): mode}))
        yield device


def fake_step(cfg, data, monkeypatch, step):
    """One training step, draw included."""
    parts = train.build(cfg, data.device)

    def backward(loss):
        assert loss.device == data.device
        for p in parts[0].parameters():
            p.grad = torch.zeros_like(p)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    numbers = train.train_step(cfg, *parts, train.draw_batch(parts[0], data, step), step)
    assert all(number.device == data.device for number in numbers.values())
    return parts[0]


@pytest.mark.parametrize("step, changes", [
    (0, {}),                                               # settling
    (5, {}),
    (8, {}),                                               # the U-Net alone
    (5, dict(unet_share=0.0)),
    (5, dict(model="vae", u="var")),
    (5, dict(prior="known", latent="st")),
    (5, dict(prior="full", kl_balance=0.8, kl_reverse=1.0)),
    (5, dict(predict="eps", muon=0.0, latent="gumbel")),
    (5, dict(patch=2))])
def test_no_step_mixes_devices_or_waits(step, changes, fake_cuda, monkeypatch):
    cfg = replace(CFG, **changes)
    fake_step(cfg, idiff.load_shapes3d(fake_cuda), monkeypatch, step)


def test_what_the_fake_tensors_find(fake_cuda):
    here, there = torch.zeros(2), torch.zeros(2, device=fake_cuda)
    with pytest.raises(RuntimeError, match="device"):
        here + there
    with pytest.raises(DataDependentOutputException):
        float(there[0])


def test_a_step_on_own_data_mixes_no_devices(fake_cuda, monkeypatch):
    images = np.zeros((24, 16, 16, 3), np.uint8)
    data = idiff.check_arrays({"images": images, "u": np.eye(24)}, "own.npz", fake_cuda, None)
    cfg = replace(CFG, u="own", image_size=16, n_factors=0, n_u=24)
    fake_step(cfg, data, monkeypatch, 5)


@torch.no_grad()
@pytest.mark.parametrize("predict", ["residual", "eps"])
def test_sampling_mixes_no_devices(predict, fake_cuda):
    model = idiff.IDiff(replace(CFG, predict=predict)).to(fake_cuda)
    start = torch.zeros(2, 3, 64, 64, device=fake_cuda)
    z, _ = model.encode(start)
    for sampler in SAMPLERS:
        x = model.sample(z, start, 2, sampler, lambda: torch.zeros_like(start))
    noise = idiff.invert(model.eps_fn(z), x, time_grid(2, model.sde).to(x), model.sde)
    assert noise.device == fake_cuda


@pytest.mark.parametrize("predict", ["residual", "eps"])
def test_each_network_compiles_to_one_graph(predict):
    model = idiff.IDiff(replace(CFG, predict=predict))
    x, t, z = torch.rand(2, 3, 64, 64), torch.rand(2), torch.rand(2, 6)
    for network, inputs in ((model.encoder.net, (x,)), (model.decoder, (z,)),
                            (model.unet, (x, t, z, x))):
        found = torch._dynamo.explain(network)(*inputs)
        assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


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
        train.train_step(cfg, *parts, train.draw_batch(parts[0], data, step), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 6):
            train.train_step(cfg, *parts, train.draw_batch(parts[0], data, step), step)
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
