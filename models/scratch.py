"""The scratch network: a small ResNet trained on a data set's own labels, and EL2N, which needs it.

    state = train_scratch(images, labels, num_classes, "cuda")    # uint8 (N, H, W, C), int (N,)
    scores = el2n(images, labels, num_classes, "cuda")            # float64 (N,)

Needs torch and numpy alone. What cannot be learnt or read raises ValueError with one full line.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------- the network
class Scratch(nn.Module):
    """A small ResNet whose width follows the longer side s of the images, at most 64.

    Stages halve the map until it is at most 8 wide, one stage at least. The last is 4 s wide (32
    for 8 x 8 digits, 128 for CIFAR), each one before it half of that. x is in [0, 1].
    """

    def __init__(self, channels, size, num_classes):
        super().__init__()
        self.channels = channels
        self.size = size
        s = min(max(size, 8), 64)
        stages = max(1, math.ceil(math.log2(s / 8)))
        width = [4 * s >> k for k in range(stages, -1, -1)]        # of the stem, then of each stage
        self.register_buffer("mean", torch.zeros(channels))        # of the training pixels
        self.register_buffer("std", torch.ones(channels))
        self.stem = conv(channels, width[0])
        self.stages = nn.ModuleList()
        for w, w_next in zip(width, width[1:]):
            # The order of these two is that of their random weights.
            down = conv(w, w_next, stride=2)
            res = nn.Sequential(conv(w_next, w_next), conv(w_next, w_next))
            self.stages.append(nn.ModuleDict({"down": down, "res": res}))
        self.head = nn.Linear(width[-1], num_classes)

    @classmethod
    def restore(cls, state):
        """The network in what train_scratch returned, the first where it holds several."""
        s = state["settings"]
        net = cls(int(s["channels"]), int(s["size"]), int(s["num_classes"]))
        net.load_state_dict(state["model"])
        return net

    def forward(self, x):                            # (n, C, H, W)
        side = max(x.shape[2:])
        if side != self.size:
            raise ValueError(f"encoder scratch was trained on images of side {self.size}, "
                             f"these have {side}; train it on this data set")
        return self.body(shrink(x))

    def body(self, x):
        """(pooled (n, D), tokens (n, h w, D), logits (n, K)); CIFAR has 8 x 8 tokens."""
        mean = self.mean.view(-1, 1, 1)
        std = self.std.view(-1, 1, 1)
        x = self.stem((x - mean) / std)
        for stage in self.stages:
            x = stage["down"](x)
            x = x + stage["res"](x)
        z = x.mean((2, 3))                           # (n, D)
        tokens = x.flatten(2).transpose(1, 2)
        return z, tokens, self.head(z)


def conv(w, w_next, stride=1):
    kernel = nn.Conv2d(w, w_next, 3, stride, padding=1, bias=False)
    return nn.Sequential(kernel, nn.BatchNorm2d(w_next), nn.ReLU())


def shrink(x):
    """(n, C, H, W) averaged down so that the longer side is at most 64."""
    scale = 64 / max(x.shape[2:])
    if scale >= 1:
        return x
    sides = [max(1, round(scale * side)) for side in x.shape[2:]]
    return F.interpolate(x, sides, mode="area")


# ---------------------------------------------------------------------------- its training
def augment(x, generator, flip):
    """Each image of x (n, H, W, C) shifted by up to an eighth of its side, black moving in.

    With flip, each is also mirrored with probability 1/2.
    """
    n, h, w, _ = x.shape
    p = max(1, max(h, w) // 8)
    dy, dx = torch.randint(0, 2 * p + 1, (2, n, 1), generator=generator)
    # Where each pixel of the answer comes from in the padded image.
    rows = dy + torch.arange(h)                      # (n, h)
    cols = dx + torch.arange(w)                      # (n, w)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        cols = torch.where(mirrored, cols.flip(1), cols)
    rows = rows[:, :, None].to(x.device)
    cols = cols[:, None, :].to(x.device)
    i = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (0, 0, p, p, p, p))[i, rows, cols]


def train_scratch(images, labels, num_classes, device, seed=0, epochs=None, test_images=None,
                  test_labels=None, stop=None):
    """Train on uint8 images (N, H, W, C) and int labels (N,): SGD, one cycle, shifts and flips.

    Returns {"model": state dict, "settings": {...}, "accuracy": share of the held-out images that
    are read rightly (None without them), "seed": seed}. stop: leave after so many epochs.
    """
    n = len(images)
    channels = images.shape[3]
    size = max(images.shape[1:3])
    batch = min(n, 256, max(16, n // 24))
    if not epochs:
        # About a million images, but as many epochs as are asked for.
        epochs = max(stop or 0, min(30, max(8, 1_000_000 // n)))
    y = checked_labels(labels, n, num_classes).to(device)          # (N,)
    data = small_pixels(images, device)                            # (N, h, w, C)
    net = new_network(data, channels, size, num_classes, seed).to(device)
    # What does not fill a batch comes in with the next shuffle.
    steps = n // batch
    optimizer, schedule = one_cycle(net, batch, epochs * steps)
    # The order of the images and their augmentation are drawn from one stream.
    g = torch.Generator().manual_seed(seed + 1)

    net.train()
    for _ in range(min(stop or epochs, epochs)):
        order = torch.randperm(n, generator=g)[:steps * batch]
        for rows in order.view(steps, batch):
            x = data[rows.to(data.device)].to(device)              # (b, h, w, C)
            # Small digits have no mirror images, photographs have.
            x = augment(x, g, flip=size >= 32)
            x = x.permute(0, 3, 1, 2).float() / 255                # (b, C, h, w)
            logits = net.body(x)[2]                                # (b, K)
            loss = F.cross_entropy(logits, y[rows.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    model = {key: value.cpu().clone() for key, value in net.state_dict().items()}
    settings = {"channels": channels, "size": size, "num_classes": num_classes, "epochs": epochs,
                "batch": batch}
    state = {"model": model, "accuracy": None, "seed": seed, "settings": settings}
    if test_images is not None and len(test_images):
        said = logits_of(state, test_images, device).argmax(1)
        state["accuracy"] = float((said == np.asarray(test_labels)).mean())
    return state


def checked_labels(labels, n, num_classes):
    """labels as int64 (n,), where a classifier can be learnt from them."""
    labels = torch.as_tensor(np.asarray(labels, np.int64))
    if len(labels) != n or labels.min() < 0 or labels.max() >= num_classes:
        found = f"{len(labels)} labels in {int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"scratch network: {found} for {n} images of {num_classes} classes")
    if len(labels.unique()) < 2:
        raise ValueError("scratch network: all images are of one class, so there is nothing to "
                         "learn; use another encoder (inception, dinov2_vitb14, ddae, pixels)")
    return labels


def small_pixels(images, device):
    """uint8 (N, h, w, C) with sides of at most 64, on the device where all of them fit there."""
    data = None
    for lo in range(0, len(images), 2048):
        x = torch.from_numpy(np.array(images[lo:lo + 2048]))       # (b, H, W, C)
        if max(x.shape[1:3]) > 64:
            x = shrink(x.permute(0, 3, 1, 2).float()).round().byte()
            x = x.permute(0, 2, 3, 1)
        if data is None:
            data = torch.empty((len(images), *x.shape[1:]), dtype=torch.uint8)
        data[lo:lo + 2048] = x
    if data.nbytes < 8e9:
        data = data.to(device)
    return data


def new_network(data, channels, size, num_classes, seed):
    """An untrained network that knows mean and spread of the pixels data (N, h, w, C)."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reset the stream of every GPU too.
        torch.default_generator.manual_seed(seed)
        net = Scratch(channels, size, num_classes)
    some = data[::max(1, len(data) // 20_000)].cpu().double() / 255
    net.mean.copy_(some.mean((0, 1, 2)))
    net.std.copy_(some.std((0, 1, 2)).clamp(min=1e-3))
    return net


def one_cycle(net, batch, steps):
    """SGD, and its learning rate: up for a quarter of the steps, then down to nothing."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4,
                                nesterov=True)
    # One step more, for the schedule also moves on after the last batch.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4 * batch / 256, steps + 1,
                                                   pct_start=0.25)
    return optimizer, schedule


def several(state):
    """[state of each network] of what add_networks returned, or of one network alone."""
    return [state, *state.get("more", [])]


def add_networks(state, count, train):
    """`state` with as many networks as asked for, their seeds 0, 1, ...: judges of one kind.

    state: what train_scratch returned, or None. train(seed) makes the next one. The first stays
    where it was, so that whoever knows one network only reads this one.
    """
    states = [] if state is None else several(state)
    for seed in range(len(states), count):
        states.append(train(seed))
    return {**states[0], "more": states[1:]}


# ---------------------------------------------------------------------------- what it says
@torch.no_grad()
def logits_of(state, images, device, batch=256):
    """float32 (n, K) for uint8 images (n, H, W, C), from what train_scratch returned."""
    net = Scratch.restore(state).to(device).eval()
    parts = []
    for lo in range(0, len(images), batch):
        x = torch.from_numpy(np.array(images[lo:lo + batch])).to(device)
        x = x.permute(0, 3, 1, 2).float() / 255                    # (b, C, H, W)
        # Float32 means float32: no autocast, and no TF32, which cuDNN takes by default.
        with (torch.autocast(x.device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            parts.append(net(x)[2].cpu())                          # (b, K)
    logits = torch.cat(parts)
    if not logits.isfinite().all():
        raise ValueError("scratch network: NaN or infinity among its logits; its training diverged")
    return logits.numpy()


def el2n(images, labels, num_classes, device, epochs=10, seeds=3):
    """EL2N of each image (Paul et al. 2021), float64 (N,); the higher, the harder.

    ||softmax(logits) - onehot||_2 after `epochs` epochs of training, mean over the seeds.
    """
    labels = torch.as_tensor(np.asarray(labels)).long()
    total = np.zeros(len(images))
    for seed in range(seeds):
        state = train_scratch(images, labels, num_classes, device, seed, stop=epochs)
        # In parts, for (N, K) may be more than the images are themselves.
        for lo in range(0, len(images), 8192):
            part = slice(lo, lo + 8192)
            logits = torch.from_numpy(logits_of(state, images[part], device))
            error = logits.double().softmax(1)                     # (b, K)
            error[torch.arange(len(error)), labels[part]] -= 1
            total[part] += error.norm(dim=1).numpy()
    return total / seeds
