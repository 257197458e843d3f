"""Adan: adaptive Nesterov momentum (Xie et al. 2022, arXiv 2208.06677, Algorithm 1)."""
import torch


class Adan(torch.optim.Optimizer):
    """With g the gradient of step k, d = g - g_{k-1} (0 at the first step):

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) d;  n <- b3 n + (1 - b3) (g + b2 d)^2
        theta <- (theta - lr (m / (1 - b1^k) + b2 v / (1 - b2^k)) / (sqrt(n / (1 - b3^k)) + eps))
                 / (1 + lr weight_decay)

    betas multiply the OLD value. Its state has two tensors more than AdamW's: v, and g_{k-1}, which
    a resumed run must have too.
    """

    def __init__(self, params, lr, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, k=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.step_group(group, params)

    def step_group(self, group, params):
        """One step of the parameters of a group, all of them at once."""
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("m", "v", "n")}
                self.state[p] = {**zeros, "g": p.grad.clone()}
        m, v, n, before = ([self.state[p][name] for p in params] for name in "mvng")
        b1, b2, b3 = group["betas"]
        group["k"] += 1
        k = group["k"]

        delta = torch._foreach_sub(grads, before)
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_lerp_(v, delta, 1 - b2)
        torch._foreach_mul_(delta, b2)
        torch._foreach_add_(delta, grads)                         # g + b2 d
        torch._foreach_mul_(n, b3)
        torch._foreach_addcmul_(n, delta, delta, 1 - b3)
        torch._foreach_copy_(before, grads)

        down = torch._foreach_div(n, 1 - b3**k)
        torch._foreach_sqrt_(down)
        torch._foreach_add_(down, group["eps"])
        up = torch._foreach_div(m, 1 - b1**k)
        torch._foreach_add_(up, v, alpha=b2 / (1 - b2**k))
        torch._foreach_addcdiv_(params, up, down, -group["lr"])
        torch._foreach_div_(params, 1 + group["lr"] * group["weight_decay"])
