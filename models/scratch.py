"""The scratch network: a small ResNet trained on a data set's labels, and EL2N, which reads it early."""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Scratch(nn.Module):
    """A small ResNet whose width follows the image's side s (above 64: averaged down to 64): stages halve the map until it is at most 8 wide, one
    stage at least; the last is 4 s wide (32 for 8 x 8 digits, 128 for CIFAR), each one before it half of that. x is in [0, 1]."""

    def __init__(self, channels, size, num_classes):
        super().__init__()
        self.channels, self.size = channels, size
        side = min(max(size, 8), 64)
        stages = max(1, math.ceil(math.log2(side / 8)))
        width = [4 * side >> (stages - i) for i in range(stages + 1)]   # the stem's, then each stage's
        self.register_buffer("mean", torch.zeros(channels))           # of the training pixels
        self.register_buffer("std", torch.ones(channels))
        self.stem = conv(channels, width[0])
        self.stages = nn.ModuleList(nn.ModuleDict({"down": conv(a, b, 2), "res": nn.Sequential(conv(b, b), conv(b, b))})
                                    for a, b in zip(width, width[1:]))
        self.head = nn.Linear(width[-1], num_classes)

    @classmethod
    def restore(cls, state):
        net = cls(*(int(state["settings"][k]) for k in ("channels", "size", "num_classes")))
        net.load_state_dict(state["model"])
        return net

    def forward(self, x):                                             # (n, C, H, W)
        if max(x.shape[2:]) != self.size:
            raise ValueError(f"encoder scratch was trained on images of side {self.size}, these have {max(x.shape[2:])}; train it on this data set")
        return self.body(shrink(x))

    def body(self, x):
        x = self.stem((x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1))
        for stage in self.stages:
            x = stage["down"](x)
            x = x + stage["res"](x)
        z = x.mean((2, 3))                                            # (n, D)
        return z, x.flatten(2).transpose(1, 2), self.head(z)          # tokens (n, h w, D): 4 x 4 for digits, 8 x 8 for CIFAR


def conv(a, b, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def shrink(x):
    """(n, C, H, W) averaged down so that the longer side is at most 64."""
    s = 64 / max(x.shape[2:])
    return x if s >= 1 else F.interpolate(x, [max(1, round(s * n)) for n in x.shape[2:]], mode="area")


def augment(x, generator, flip):
    """Each image of x (n, H, W, C) shifted by up to an eighth of its side, black moving in, and mirrored at random if flip."""
    n, h, w, _ = x.shape
    p = max(1, max(h, w) // 8)
    dy, dx = torch.randint(0, 2 * p + 1, (2, n, 1), generator=generator)
    rows, cols = dy + torch.arange(h), dx + torch.arange(w)           # (n, h), (n, w): where each pixel comes from
    if flip:
        cols = torch.where(torch.rand(n, 1, generator=generator) < 0.5, cols.flip(1), cols)
    i = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (0, 0, p, p, p, p))[i, rows[:, :, None].to(x.device), cols[:, None].to(x.device)]


def train_scratch(images, labels, num_classes, device, seed=0, epochs=None, test_images=None, test_labels=None, stop=None):
    """Train the scratch network on uint8 images (N, H, W, C) and int labels (N,): SGD, one cycle, random shifts, flips from 32 pixels on.

    Returns {"model": state dict, "settings": {...}, "accuracy": held-out share read rightly (None without held-out images), "seed": seed}.
    stop: leave after so many epochs of the schedule (el2n reads the network early).
    """
    n, size, channels = len(images), max(images.shape[1:3]), images.shape[3]
    labels = torch.as_tensor(np.asarray(labels, np.int64))
    if len(labels) != n or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"scratch network: {len(labels)} labels in {int(labels.min())}..{int(labels.max())} for {n} images of {num_classes} classes")
    if len(labels.unique()) < 2:
        raise ValueError("scratch network: all images are of one class, so there is nothing to learn; use another encoder (inception, dinov2_vitb14, "
                         "ddae, pixels)")
    data = None
    for lo in range(0, n, 2048):
        x = torch.from_numpy(np.array(images[lo:lo + 2048]))
        x = x if size <= 64 else shrink(x.permute(0, 3, 1, 2).float()).round().byte().permute(0, 2, 3, 1)
        data = torch.empty((n, *x.shape[1:]), dtype=torch.uint8) if data is None else data
        data[lo:lo + 2048] = x
    data, labels = (data.to(device) if data.nbytes < 8e9 else data), labels.to(device)             # (N, h, w, C) uint8, sides at most 64
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)                     # not torch.manual_seed, which would reset every GPU's stream too
        net = Scratch(channels, size, num_classes).to(device).train()
    some = data[:: max(1, n // 20_000)].cpu().double() / 255
    net.mean.copy_(some.mean((0, 1, 2)))
    net.std.copy_(some.std((0, 1, 2)).clamp(min=1e-3))
    epochs = epochs or max(stop or 0, min(30, max(8, 1_000_000 // n)))
    batch = min(n, 256, max(16, n // 24))
    steps = n // batch                                                # what does not fill a batch comes in with the next shuffle
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4 * batch / 256, epochs * steps + 1, pct_start=0.25)
    g = torch.Generator().manual_seed(seed + 1)                       # order and augmentation
    for _ in range(min(stop or epochs, epochs)):
        for rows in torch.randperm(n, generator=g)[:steps * batch].view(steps, batch):
            x = augment(data[rows.to(data.device)].to(device), g, size >= 32).permute(0, 3, 1, 2).float() / 255
            loss = F.cross_entropy(net.body(x)[2], labels[rows.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    state = {"model": {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}, "accuracy": None, "seed": seed,
             "settings": {"channels": channels, "size": size, "num_classes": num_classes, "epochs": epochs, "batch": batch}}
    if test_images is not None and len(test_images):
        state["accuracy"] = float((logits_of(state, test_images, device).argmax(1) == np.asarray(test_labels)).mean())
    return state


@torch.no_grad()
def logits_of(state, images, device, batch=256):
    """Class logits float32 (n, K) of uint8 images (n, H, W, C), from what train_scratch returned."""
    net = Scratch.restore(state).to(device).eval().requires_grad_(False)
    out = []
    # fp32 means fp32: neither autocast nor TF32 convolutions, which cuDNN takes by default
    with torch.autocast(torch.device(device).type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for lo in range(0, len(images), batch):
            x = torch.from_numpy(np.array(images[lo:lo + batch])).to(device)
            out.append(net(x.permute(0, 3, 1, 2).float() / 255)[2].float().cpu())
    return torch.cat(out).numpy()


def el2n(images, labels, num_classes, device, epochs=10, seeds=3):
    """EL2N of each image, float64 (N,): ||softmax(logits) - onehot||_2 after `epochs` epochs of training, mean over seeds (Paul et al. 2021)."""
    total, labels = np.zeros(len(images)), np.asarray(labels)
    for seed in range(seeds):
        state = train_scratch(images, labels, num_classes, device, seed, stop=epochs)
        for lo in range(0, len(images), 8192):                        # N x K never stands in memory as a whole
            rows = np.arange(lo, min(lo + 8192, len(images)))
            error = torch.from_numpy(logits_of(state, images[lo:lo + 8192], device)).double().softmax(1)      # (b, K)
            error[torch.arange(len(rows)), torch.from_numpy(labels[rows]).long()] -= 1
            total[rows] += error.norm(dim=1).numpy()
    return total / seeds
