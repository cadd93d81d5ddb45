"""AdamW with decay on matrices only, and learning rates as a pure function of the step."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configurator import Config


def learning_rate(cfg: Config, step: int) -> float:
    """The learning rate of step 0, 1, … max_steps - 1: linear warm-up, then the schedule down to min_lr in the last."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps  # the first step already moves
    if cfg.schedule == "constant":
        return cfg.learning_rate
    left = 1.0 - min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - 1 - cfg.warmup_steps))
    share = left if cfg.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients as one vector, over all processes if they are sharded: a scalar on their device. Parameters
    without a gradient (frozen ones) do not count."""
    grads = [local_shard(p.grad) for p in model.parameters() if p.grad is not None]
    if grads and grads[0].device.type == "cpu":
        # There, a norm adds up a tensor's squares in a few float32 sums: 0.3% too small for the 38M of an embedding's
        # gradient (torch 2.13). Rows first, then the norm of their norms: 6e-7 (LOG.md).
        grads = [torch.linalg.vector_norm(g, dim=-1) for g in grads]
    norm = nn.utils.get_total_norm(grads)
    if is_sharded(model):
        squares = norm.square()
        dist.all_reduce(squares)
        norm = squares.sqrt()
    return norm


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, largest: float, norm: Tensor) -> None:
    """Scale all gradients by min(1, largest / norm), as torch's clip_grad_norm_ does.

    The fused AdamW scales while it reads them, in its next step; unclip() ends that. Otherwise they are scaled here, in place.
    """
    divisor = ((norm + 1e-6) / largest).clamp(min=1.0)
    adamw = inner_optimizer(optimizer)
    if is_sharded(model) or not adamw.defaults["fused"]:
        for p in model.parameters():
            if p.grad is not None:
                local_shard(p.grad).div_(divisor)
        return
    # what a GradScaler leaves for the fused kernel: "divide by this, and step unless that is 1"
    adamw.grad_scale, adamw.found_inf = divisor, torch.zeros_like(divisor)


def unclip(optimizer: torch.optim.Optimizer) -> None:
    """Remove from the optimizer what clip() left there."""
    adamw = inner_optimizer(optimizer)
    adamw.grad_scale = adamw.found_inf = None


def adamw(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019). Matrices (two dimensions, embeddings included) decay; biases and norms do not. Under
    parallel=zero1 its state is shared out over the processes, whole parameters each."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    # Unfused means torch's plain loop: not its foreach form, which "unset" would choose on CUDA.
    how = dict(fused=True) if cfg.fused_adamw else dict(fused=False, foreach=False)
    how |= dict(lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2))
    if cfg.parallel != "zero1" or not dist.is_initialized():
        return torch.optim.AdamW(groups, **how)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # half a second, for those who shard

    # as views of buckets, parameters are sent a process's share at a time instead of one by one (148 messages for 124M)
    return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, parameters_as_bucket_view=True, **how)


# ---- sharded or not ---------------------------------------------------------------------------------------------------


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The AdamW that holds this process's share of the state."""
    return optimizer.optim if shards_state(optimizer) else optimizer


def shards_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's ZeroRedundancyOptimizer, told without importing it."""
    return hasattr(optimizer, "consolidate_state_dict")


def local_shard(t: Tensor) -> Tensor:
    """This process's share of a tensor: all of it, unless it is sharded."""
    return t.to_local() if hasattr(t, "to_local") else t


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard has been applied, told without importing it."""
    return hasattr(model, "unshard")
