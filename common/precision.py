"""Which precision is fast on this hardware: --amp auto, and a warning where a wish is not."""
import time
from functools import cache

import torch

from common.loop import AMP
from common.processes import from_rank0, log

AMP_CHOICES = ("auto", *AMP)
# By how much a product must be faster than in float32: copies between the formats take time too.
# What we have seen is far from it: half as fast, and about twice as fast.
LEAST_GAIN = 1.2


def computes(device, amp):
    """Whether the hardware has instructions for this precision; what it lacks torch emulates.

    Torch is asked, not the name of a product. It also knows what ATEN_CPU_CAPABILITY and
    ONEDNN_MAX_CPU_ISA have taken away.
    """
    if amp == "none":
        return True
    if device.type == "cuda":
        # Volta and Turing accept bf16, and convert it back and forth. ROCm has it everywhere.
        return (amp == "fp16" or torch.version.hip is not None
                or torch.cuda.get_device_capability(device) >= (8, 0))
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if amp == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN says yes to every AVX-512, where it may emulate bf16 all the same: hence the second
    # question. Versions of torch that cannot answer it are taken to say no.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name) for name in questions if hasattr(torch.cpu, name)]
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(ask() for ask in known)


@cache
def product_gain(amp):
    """How many times faster than in float32 the CPU multiplies two 256 x 256 matrices.

    The best of five turns each, some milliseconds; a tenth of a second where it is emulated.
    Important! On one thread: on a busy machine several wait for each other, by chance in one format
    more than in the other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ratio_of_times(AMP[amp])
    finally:
        torch.set_num_threads(threads)


def ratio_of_times(dtype):
    """The seconds of a product in float32 over those in this dtype."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    seconds = {}
    for factor in [x, x.to(dtype)] * 5:
        start = time.perf_counter()
        factor @ factor
        taken = time.perf_counter() - start
        seconds[factor.dtype] = min(taken, seconds.get(factor.dtype, taken))
    return seconds[torch.float32] / seconds[dtype]


def pays(device, amp):
    """Whether this precision makes a training faster here.

    Important! Instructions alone do not say so: some server CPUs have those for bf16 and run them
    at half the rate of float32, so on a CPU a product is timed.
    """
    if amp == "none":
        return True
    return computes(device, amp) and (device.type == "cuda" or product_gain(amp) > LEAST_GAIN)


def what_is_slow(device, amp):
    """Why this precision is slower here than float32, in words; "" where it is not."""
    if device.type == "cuda":
        return "" if computes(device, amp) else f"this GPU has no instructions for {amp}"
    gain = 1 if amp == "none" else product_gain(amp)
    if gain > 0.9:
        return ""
    return f"on this CPU a product in {amp} takes {1 / gain:.1f} times as long as in float32"


def fastest(device):
    """bf16 where it pays, fp16 on older GPUs, else none, which is fp32.

    fp16 on a CPU is not chosen: its range needs a scale for the loss, and no run of ours has shown
    it to be faster than bf16.
    """
    if pays(device, "bf16"):
        return "bf16"
    if device.type == "cuda":
        return "fp16"
    return "none"


def settle_amp(args, device, inherited=False):
    """Puts a precision in the place of args.amp = auto. Returns the flags that it left open.

    inherited: args.amp is a checkpoint's, and counts where it pays here. What is left open may
    differ on a resume, on other hardware; a precision that this call names may not.
    """
    asked = args.amp
    if asked != "auto" and not inherited:
        slow = what_is_slow(device, asked)
        if slow:
            log(f"warning: --amp {asked}: {slow}; use --amp auto")
        return []
    keeps = asked != "auto" and pays(device, asked)
    # One precision on all ranks, whatever hardware they have.
    args.amp = from_rank0(lambda: asked if keeps else fastest(device))
    if args.amp != asked:
        whose = "" if asked == "auto" else "the checkpoint's "
        why = f"this hardware computes {args.amp}"
        if args.amp == "none":
            slow = what_is_slow(device, "bf16") or "no gain from bf16 is known here"
            why = f"{slow}; float32 it is"
        log(f"{whose}amp {asked} becomes {args.amp}: {why}")
    return ["amp"]
