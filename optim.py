"""AdamW with decay on matrices only, and learning rates as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

import parallel
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
    """The norm of all gradients taken as one vector, over all shares if they are sharded: a scalar on their device."""
    grads = [parallel.local(p.grad) for p in model.parameters()]
    if grads[0].device.type == "cpu":
        # There, a norm adds up a tensor's squares in a few float32 sums: 0.3% too small for the 38M of an embedding's
        # gradient (torch 2.13). Rows first, then the norm of their norms: 6e-7 (LOG.md).
        grads = [torch.linalg.vector_norm(g, dim=-1) for g in grads]
    norm = nn.utils.get_total_norm(grads)
    return parallel.sum_over_ranks(norm.square()).sqrt() if parallel.is_sharded(model) else norm


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, largest: float, norm: Tensor) -> None:
    """Scale all gradients by largest / norm, as torch's clip_grad_norm_ does for a norm above `largest`.

    The fused AdamW does so while it reads them, in its next step; unclip() ends that. Else they are scaled here, in place.
    """
    factor = (norm + 1e-6) / largest
    adamw = parallel.own(optimizer)
    if parallel.is_sharded(model) or not adamw.defaults["fused"]:
        for p in model.parameters():
            parallel.local(p.grad).div_(factor)
        return
    # what a GradScaler leaves for the fused kernel: "divide by this, and step unless that is 1"
    adamw.grad_scale, adamw.found_inf = factor, torch.zeros_like(factor)


def unclip(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer forget what clip() left."""
    adamw = parallel.own(optimizer)
    adamw.grad_scale = adamw.found_inf = None


def adamw(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019). Matrices (two dimensions, embeddings included) decay; biases and norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    # Unfused means torch's plain loop: not its foreach form, which "unset" would choose on CUDA.
    how = dict(fused=True) if cfg.fused_adamw else dict(fused=False, foreach=False)
    return parallel.optimizer(groups, cfg.parallel, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), **how)
