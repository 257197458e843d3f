"""Rows of an array that may be too large for memory, on the device and read ahead of time."""
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from common.files import sound_rows
from models.diffusion import sample_latents, to_pixels


class DeviceRows:
    """The rows `keep` of a (memory-mapped) array on the device.

    All are resident where they fit into `budget` bytes, else a background thread gathers them
    ahead of time. Every row is looked at as it is read: one NaN among latents would spoil each step
    that draws it. UserError names the row.
    """

    def __init__(self, array, keep, device, budget):
        self.array = array
        self.keep = keep
        self.device = device
        self.size = array[:1].nbytes * len(keep)
        self.resident = self.size <= budget
        if not self.resident:
            self.pool = ThreadPoolExecutor(1)
            self.next = (None, None)                 # rows asked for ahead, and their future
            return
        dtype = torch.from_numpy(array[:1].copy()).dtype
        self.data = torch.empty((len(keep), *array.shape[1:]), dtype=dtype, device=device)
        # In chunks: a copy of the whole would need as much memory of the CPU once more.
        for lo in range(0, len(keep), 4096):
            self.data[lo:lo + 4096] = self._read(keep[lo:lo + 4096]).to(device)

    def _read(self, rows):
        file = getattr(self.array, "filename", "input")
        return sound_rows(torch.from_numpy(self.array[rows]), rows, file)

    def _gather(self, rows):
        values = self._read(self.keep[rows.numpy()])                  # (b, ...)
        if self.device.type == "cuda":
            # Only from pinned memory a copy goes on beside the computation.
            values = values.pin_memory()
        return values

    def get(self, rows, ahead=None, there=None):
        """Places (b,) in `keep`, int64 on the CPU -> (b, ...); ahead: the places asked for next.

        there: the same places on the device, where the caller has copied them already.
        """
        if self.resident:
            if there is None:
                there = rows.to(self.device, non_blocking=True)
            return self.data[there]
        asked, future = self.next
        if asked == rows.numpy().tobytes():
            values = future.result()                                  # (b, ...)
        else:
            # The first step of a call, or another order than was announced.
            values = self._gather(rows)
        if ahead is not None:
            self.next = (ahead.numpy().tobytes(), self.pool.submit(self._gather, ahead))
        return values.to(self.device, non_blocking=True)


class StepRecord:
    """A memory map (steps, ...) whose last rows wait on the device until they are written together.

    file: None on a rank that writes none.
    """

    def __init__(self, file):
        self.file = file
        self.first = 0                               # the step of the first row that waits
        self.waiting = []

    def add(self, step, row):
        if self.file is None:
            return
        if not self.waiting:
            self.first = step
        self.waiting.append(row)

    def write(self):
        """The only wait for the device."""
        if self.waiting:
            rows = torch.stack(self.waiting).cpu().numpy()
            self.file[self.first:self.first + len(rows)] = rows
            self.file.flush()
        self.waiting = []


def device_budget(device, net, moments=2):
    """Bytes that data may take: of a GPU's memory 60 % of what training will leave, of a CPU's 25.

    net: the network, on the device already, whose gradients and moments are not there yet. The rest
    is for activations. The processes of one machine share a CPU's memory, and runs side by side
    (common/jobs.py) what they run on.
    """
    runs = int(os.environ.get("RUNS_BESIDE", 1))
    if device.type == "cuda":
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        to_come = 4 * trained * (1 + moments)        # float32
        return max(0.0, 0.6 * (torch.cuda.mem_get_info(device)[0] / runs - to_come))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0.25 * memory / runs / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def as_input(x, latent_scale, post, mirrored=None):
    """Rows as stored -> (n, C, H, W) as a network sees them.

    Pixels uint8 (n, H, W, C); or latents (n, 2C, H, W), of which post (n, C, H, W) makes a draw
    that latent_scale multiplies. mirrored (n,) bool: these are turned round.
    """
    if latent_scale is None:
        x = to_pixels(x)                             # float32 in [-1, 1]
    else:
        x = sample_latents(x, latent_scale, post)
    if mirrored is not None:
        # Left and right change places, sample by sample.
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    # The memory format of the networks: convolutions are faster in it.
    return x.contiguous(memory_format=torch.channels_last)
