"""How long a training step takes, and how fast this machine multiplies, copies and reads at best."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import train
from base import errors
from configurator import Config
from engine import machine, parallel
from engine.effective import effective, mismatches
from engine.run import build

SETTLED, MAX_WARMUP = 0.1, 5  # a step's difference from the one before it that ends the warm-up; steps at most


def time_steps(
    do_step: Callable[[int], Any],
    steps: int,
    min_timed: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    slowest: Callable[[float], float] = lambda seconds: seconds,
    min_seconds: float = 0.0,
) -> tuple[list[float], int]:
    """Run do_step(0), do_step(1), …: (seconds of each step, how many of the first are warm-up).

    do_step must not return before its work is done. Warm-up ends when a step takes within a tenth of the one before it, or
    after five steps; the first step, which compiles, never counts. At least `steps` steps run, and at least min_timed and
    min_seconds after the warm-up.

    slowest: the longest time of all processes. How many steps run follows from these times alone, so that all processes run
    equally many: one that stopped by its own clock would leave the others waiting for it.
    """
    seconds: list[float] = []
    warmup = 0
    while len(seconds) < max(steps, warmup + min_timed) or sum(seconds[warmup:]) < min_seconds:
        began = clock()
        do_step(len(seconds))
        seconds.append(slowest(clock() - began))
        n = len(seconds)
        if n == warmup + 1 and n <= MAX_WARMUP:  # still warming up: does this step settle it?
            calm = n >= 3 and abs(seconds[-1] - seconds[-2]) <= SETTLED * seconds[-2]
            warmup = n - 1 if calm else n
    return seconds, min(warmup, len(seconds) - 1)


def slowest(device: torch.device) -> Callable[[float], float]:
    """For time_steps: a number of each process -> the largest of them, the same in all."""

    def longest(seconds: float) -> float:
        if parallel.size() == 1:
            return seconds
        return max(t.item() for t in parallel.gather(torch.tensor(seconds, dtype=torch.float64, device=device)))

    return longest


def measure_steps(cfg: Config, steps: int, min_timed: int) -> dict:
    """Build a run, time its steps, read back what was on. A plain dict, with an "error" if that is not what was asked."""
    run = build(cfg)
    losses: list[float] = []

    def one_step(step: int) -> None:
        losses.append(train.train_step(run, step).loss)
        machine.synchronize(run.device)

    # A GPU's clocks take seconds to settle; a CPU's steps are seconds.
    min_seconds = 2.0 if run.device.type == "cuda" else 0.0
    try:
        seconds, warmup = time_steps(one_step, steps, min_timed, slowest=slowest(run.device), min_seconds=min_seconds)
        memory = machine.memory_gib(run.device)
        on = effective(run)
    except RuntimeError as e:
        if not errors.is_out_of_memory(e):
            raise
        return {"error": f"out of memory: {str(e).splitlines()[0]}", "out_of_memory": True}
    wrong = mismatches(run, on)
    if on["micro_batch"] != cfg.split_step(run.world.size)[0]:  # a step that was cut smaller is another measurement
        return {"error": f"out of memory: only micro-batches of {on['micro_batch']} fit", "out_of_memory": True}
    result = {
        "requested": asdict(run.cfg),
        "effective": on,
        "first_step_s": seconds[0],
        "warmup": warmup,
        "step_s": seconds,
        "losses": losses,
        "memory_gib": memory,
    }
    run.close()
    return result | ({"error": "; ".join(wrong)} if wrong else {})


def memory_rates(device: torch.device) -> list[list[float]]:
    """[[bytes, bytes/s], …]: how fast all threads read a buffer again and again, or change it in place (read + written; a
    memory bus may do both at once), whichever is faster: from a buffer that fits a cache to one of 1 GiB.
    """
    big, found = torch.ones(2**28, device=device), []
    for size in (2**power for power in range(20, 31, 2)):
        part, times = big[: size // 4], max(1, 2**26 // size)

        def read(part: torch.Tensor = part, times: int = times) -> None:
            for _ in range(times):
                part.sum()

        def change(part: torch.Tensor = part, times: int = times) -> None:
            for _ in range(times):
                part.mul_(1.0)

        moved = times * size
        found.append([size, max(n * moved / machine.best_seconds(device, work, 9) for n, work in ((1, read), (2, change)))])
    return found


def ceilings(cfg: Config) -> dict:
    """What this machine reaches in its own large matmuls (FLOP/s, per dtype), in a large copy (bytes/s, read + written) and in
    memory of each size."""
    device = machine.pick_device(cfg.device)
    n, repeats = (8192, 20) if device.type == "cuda" else (1536, 6)

    def best(work: Callable[[], Any]) -> float:
        return machine.best_seconds(device, work, repeats)

    rates: dict[str, Any] = {"peak_flops": machine.peak_flops(device), "machine": machine.describe(device)}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # random: zeros run faster than data
        rates[f"gemm_{str(dtype).removeprefix('torch.')}_flops"] = 2 * n**3 / best(lambda a=a, b=b: a @ b)
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.fp32_precision
        machine.set_fp32_precision("tf32", device)
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        rates["gemm_tf32_flops"] = 2 * n**3 / best(lambda: a @ b)
        torch.backends.cuda.matmul.fp32_precision = before
    big = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    other = torch.empty_like(big)
    rates["copy_bytes_per_s"] = 2 * big.nbytes / best(lambda: other.copy_(big))
    return rates | {"memory_bytes_per_s": memory_rates(device)}


def precision(cfg: Config) -> dict:
    """How float32 matmuls really run with cfg.fp32_precision: hardware without that precision computes exactly, and does not
    report it."""
    device = machine.pick_device(cfg.device)
    machine.set_fp32_precision(cfg.fp32_precision, device)
    return {"runs_as": machine.fp32_precision_measured(device)}
