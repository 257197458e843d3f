"""Which precision this hardware computes: --amp auto, and a warning where a wish is emulated."""
import torch

from common.loop import AMP
from common.processes import from_rank0, log

AMP_CHOICES = ("auto", *AMP)
# Measured on two cores with AVX2: unet-small at 32 x 32 trained 14 times slower, SiT-S/4 30 times.
FACTOR = "14 to 30 times slower than --amp none where we measured it"


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


def fastest(device):
    """bf16 where the hardware computes it, fp16 on older GPUs, else none, which is fp32.

    fp16 on a CPU is not chosen: its range needs a scale for the loss, and no run of ours has shown
    it to be faster than bf16.
    """
    if computes(device, "bf16"):
        return "bf16"
    if device.type == "cuda":
        return "fp16"
    return "none"


def settle_amp(args, device, inherited=False):
    """Puts a precision in the place of args.amp = auto. Returns the flags that it left open.

    inherited: args.amp is a checkpoint's, and counts where this hardware computes it. What is left
    open may differ on a resume, on other hardware; a precision that this call names may not.
    """
    asked = args.amp
    if asked != "auto" and not inherited:
        if not computes(device, asked):
            log(f"warning: --amp {asked}: this hardware has no instructions for {asked} and "
                f"emulates it, {FACTOR}; use --amp auto")
        return []
    keeps = asked != "auto" and computes(device, asked)
    # One precision on all ranks, whatever hardware they have.
    args.amp = from_rank0(lambda: asked if keeps else fastest(device))
    if args.amp != asked:
        whose = "" if asked == "auto" else "the checkpoint's "
        why = f"computes {args.amp}"
        if args.amp == "none":
            why = "has no instructions for bf16, and computes in float32"
        log(f"{whose}amp {asked} becomes {args.amp}: this hardware {why}")
    return ["amp"]
