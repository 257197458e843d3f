"""A GPU that computes nothing: stages run on CUDA tensors without data, on any machine.

    with fake_gpu(monkeypatch) as gpu:
        train.main([..., "--device", "cuda"])
    gpu.waits          Counter of (phase, what, line of ours) that made the host wait for the device

Tensors of the CPU are real, those of cuda:0 are torch's FakeTensors: shapes, dtypes, layouts and devices are computed as on a GPU, so that an operation over two devices raises as it would there.
What the host reads of the device (.item(), bool(), .cpu(), .tolist()) is noted and answered with zeros and True; so are copies to the device that block, and operations whose
result has a size that only the device knows. A CPU's generator where a GPU's is needed raises.

phase is "setup" until common.Run.start, then "step"; from the end of a step at which a log line is due (LOG_EVERY) to the end of the next it is "log": what waits there may belong to the line.
"""
import collections
import contextlib
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.cuda.amp.common
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import common

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0)
LOG_EVERY = 2
UNKNOWN_SIZE = ("aten::nonzero", "aten::unique_dim", "aten::_unique2", "aten::masked_select", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor")


def our_line():
    """The innermost line of the kit that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if ROOT in file.parents and file.parent.name != "tests" and ".venv" not in frame.filename:
            return f"{file.relative_to(ROOT)}: {frame.line}"
    return "torch"


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


class Gpu(TorchDispatchMode):
    """Sends what concerns the GPU to a FakeTensorMode, and everything else to the real CPU."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = collections.Counter()
        self.copies = collections.Counter()
        self.phase = "setup"
        self.seeds = set()                           # of generators that were made for the GPU

    def waited(self, what):
        self.waits[self.phase, what, our_line()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.name()
        there = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        target = kwargs.get("device")
        if name == "aten::_local_scalar_dense" and there:
            self.waited("item")
            return args[0].dtype == torch.bool       # the question is always whether something is finite
        if name in ("aten::_to_copy", "aten::copy_", "aten::set_.source_Tensor"):
            return self.copy(func, name, args, kwargs, there)
        if not there and not on_gpu(target):
            return func(*args, **kwargs)
        if name in UNKNOWN_SIZE:
            self.waited(name)
        if name == "aten::index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.waited("index by a mask")
        generator = kwargs.get("generator")
        if generator is not None:
            assert generator.initial_seed() in self.seeds, f"a CPU generator draws on the GPU: {our_line()}"
            kwargs["generator"] = None
        return self.computed(func, args, kwargs)

    def computed(self, func, args, kwargs):
        """The shape, dtype and device of a result; a tensor of the CPU among the arguments stays one."""
        args, kwargs = tree_map(lambda x: self.fake.from_tensor(x) if type(x) in (torch.Tensor, torch.nn.Parameter) else x, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def copy(self, func, name, args, kwargs, there):
        """Between the devices a copy is a wait unless it is told not to block."""
        source, target = args[0], kwargs.get("device")
        from_gpu = isinstance(source, FakeTensor)
        to_gpu = on_gpu(target) or (from_gpu and target is None)
        blocks = not kwargs.get("non_blocking")
        if name == "aten::copy_":
            source = args[1]
            from_gpu, to_gpu = isinstance(source, FakeTensor), isinstance(args[0], FakeTensor)
            blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if to_gpu and not from_gpu:
            self.copies[self.phase, our_line()] += 1
            if blocks:
                self.waited("blocking copy to the device")
        if from_gpu and not to_gpu:
            self.waited("copy from the device")
            zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return args[0].copy_(zeros) if name == "aten::copy_" else zeros
        if not there and not to_gpu:
            return func(*args, **kwargs)
        return self.computed(func, args, kwargs)

    def in_steps(self):
        """{(what, line): how often} within the steps, log lines aside."""
        return {key[1:]: n for key, n in self.waits.items() if key[0] == "step"}


@contextlib.contextmanager
def fake_gpu(monkeypatch, capability=(8, 0), free=1e12):
    """A machine with one GPU of this capability and so many free bytes, for what runs in the block."""
    if torch.__version__ < "2.14" and not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this version of torch (2.5 is one) makes no CUDA tensors where there is no GPU, not even fake ones")
    torch._C._ensureCUDADeviceGuardSet()             # before is_available is patched
    gpu = Gpu()
    put = monkeypatch.setattr
    for name, value in dict(is_available=lambda: True, device_count=lambda: 1, set_device=lambda *_: None, current_device=lambda: 0, _lazy_init=lambda: None, mem_get_info=lambda *_: (free, free),
                            max_memory_allocated=lambda *_: 0, get_device_name=lambda *_: "no GPU", get_device_capability=lambda *_: capability, is_bf16_supported=lambda *a, **k: capability >= (8, 0),
                            manual_seed_all=lambda *_: None, manual_seed=lambda *_: None, _is_in_bad_fork=lambda: False).items():
        put(torch.cuda, name, value)
    put(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    put(torch.Tensor, "pin_memory", lambda self, *a, **k: self)
    put(common.loop, "generator", lambda seed, *key, device="cpu", make=common.generator: noted(gpu, make(seed, *key), device))
    put(common, "generator", common.loop.generator, raising=False)
    put(common, "save_pt", lambda path, state: Path(path).touch(), raising=False)
    start, advance, optimizer_of = common.Run.start, common.Run.advance, common.optimizer_of
    trained = []

    def starts(run):
        gpu.phase = "step"
        start(run)

    def ends(run):
        done = advance(run)
        gpu.phase = "step" if done % LOG_EVERY else "log"
        return done

    def prepared(net, *args):
        trained[:] = [p for p in net.parameters() if p.requires_grad]
        return optimizer_of(net, *args)

    def backward(loss):
        """The engine of autograd wants a driver: gradients of the right device and layout instead."""
        assert loss.requires_grad and on_gpu(loss.device) and loss.ndim == 0, loss
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 0
    put(torch.Tensor, "backward", backward)
    put(torch.nn.Module, "_apply", moved)
    put(common, "optimizer_of", prepared, raising=False)
    put(common.Run, "start", starts)
    put(common.Run, "advance", ends)
    # torch.tensor(..., device="cuda") then goes by a tensor of the CPU, as it does on a GPU; else it would look for a driver.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(net, fn, recurse=True):
    """Module._apply, which would exchange a fake parameter in place where it is moved twice."""
    for part in net.modules():
        for name, p in part._parameters.items():
            if p is not None:
                with torch.no_grad():
                    part._parameters[name] = torch.nn.Parameter(fn(p), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = fn(b)
    return net


def noted(gpu, generator, device):
    """A generator of the CPU that passes for one of this device."""
    if on_gpu(device):
        gpu.seeds.add(generator.initial_seed())
    return generator
