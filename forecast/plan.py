"""What a training run takes, before its first step: memory, time, disk. No device is touched and nothing is computed.

python train.py config/shakespeare.py --plan
python train.py config/gpt2_124m.py --plan --device=cuda --processes=8      for a machine that is not here
"""

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import configurator
from base import system
from base.errors import UserError
from base.files import ROOT
from configurator import Config
from corpus import shards, sources
from engine import machine
from engine.journal import duration
from engine.run import Run, open_data
from forecast import cluster
from forecast.memory import HEAP_GAPS, KINDS, Memory, Target, memory, program, saves
from forecast.speed import Rate, rate
from model import GPT
from report.results import ms

GIB = 2**30


# ---- the machine ------------------------------------------------------------------------------------------------------


def ask_for_gpu() -> tuple[str, int, float] | None:
    """(name, bytes, compute capability) of the first GPU, from the driver's own tool, which starts nothing on it."""
    what = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(what, capture_output=True, text=True, timeout=20)
        name, mib, capability = done.stdout.splitlines()[0].split(", ")
        return name, int(mib) * 2**20, float(capability)
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return None


def resolve(cfg: Config, imported: int, accumulate: Callable[[Run, int], Tensor]) -> tuple[Config, Target]:
    """(cfg without any "auto", as train.py would choose, what it is planned for), without starting a device."""
    processes = cfg.processes or int(os.environ.get("WORLD_SIZE", 1))
    target = dict(processes=processes, imported=imported, accumulate=accumulate)
    gpu = ask_for_gpu() if cfg.device == "cuda" or (cfg.device == "auto" and torch.version.cuda) else None
    if cfg.device == "cuda" or gpu:
        name, total, capability = gpu or (None, None, 9.0)
        cfg, _ = machine.resolve(cfg, torch.device("cuda"), machine.gpu_abilities(capability))
        return cfg, Target(hardware=name, free=total, total=total, **target)
    mps = cfg.device == "mps" or (cfg.device == "auto" and torch.backends.mps.is_available())
    device = torch.device("mps" if mps else "cpu")
    cfg, _ = machine.resolve(cfg, device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    free, total = system.free_memory(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = machine.hardware_name(device)
    return cfg, Target(hardware=hardware, free=free and free // local, total=total // local, **target)


def held_now() -> int:
    """Bytes of memory that this process holds, in steps of 4 MiB, so that the same plan reads the same twice."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux; there the peak
        held = system.peak_memory()
    return round(held / 2**22) * 2**22


# ---- what is refused --------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def least_memory(cfg: Config, target: Target) -> float:
    """A little less than memory().peak, known at once: what is far too large is not followed."""
    whole = target.processes == 1 or cfg.parallel == "ddp"
    base = 0 if cfg.device == "cuda" else program(cfg, target.imported)
    return base + 4 * cluster.FP32 * sum(cluster.parameters(cfg)) * whole


def largest_batch(cfg: Config, target: Target) -> int:
    """The largest micro-batch that fits and divides a process's share of a step, or 0."""
    share = cfg.split_step(target.processes, most=cfg.tokens_per_step)[0]
    top = cfg.split_step(target.processes)[0]
    fitting, sizes = 0, [b for b in range(1, top + 1) if share % b == 0]
    while sizes:  # more sequences take more memory
        middle = (len(sizes) - 1) // 2 if fitting else 0  # often not even one fits
        if memory(replace(cfg, batch_size=sizes[middle]), target).peak <= target.free:
            fitting, sizes = sizes[middle], sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return fitting


def remedies(cfg: Config, processes: int) -> Iterator[dict]:
    """Changes that save memory, in the order in which one would try them; the last ones change what is learned."""
    if cfg.attention == "naive":
        yield dict(attention="sdpa")
    if cfg.dtype == "float32":
        yield dict(dtype="bfloat16")
    if processes > 1 and cfg.parallel != "fsdp":
        yield dict(parallel="fsdp")
    if cfg.background_save and cfg.device != "cuda":
        yield dict(background_save=False)
    for T in (cfg.T // 2**k for k in range(1, 5) if cfg.T % 2**k == 0 and cfg.T // 2**k >= 64):
        yield dict(sequence_length=T)
    layers, width = cfg.n_layer, cfg.n_embd
    while layers > 1:  # smaller models keep their proportions
        layers //= 2
        yield dict(n_layer=layers, n_embd=width)
        if width % (2 * cfg.n_head) == 0:
            width //= 2
            yield dict(n_layer=layers, n_embd=width)


def check_memory(cfg: Config, target: Target) -> Memory:
    """The memory of a run. UserError with the flag that fixes it if that is more than is free."""
    free = target.free
    if free is None:
        return memory(cfg, target)
    least = least_memory(cfg, target)
    what = f"weights, gradients and AdamW's moments alone take {gib(least)} GiB a process, {gib(free)} are free"
    if least <= free:
        found = memory(cfg, target)
        if found.peak <= free:
            return found
        fits = largest_batch(cfg, target)
        if fits and cfg.batch_size == "auto":
            return memory(replace(cfg, batch_size=fits), target)
        sequences = f"{found.micro_batch} sequence{'s' * (found.micro_batch > 1)}"
        what = f"micro-batches of {sequences} take {gib(found.peak)} GiB a process, {gib(free)} are free"
        if fits:
            raise UserError(f"{what}: use --batch_size={fits}")
    for changes in remedies(cfg, target.processes):
        smaller = replace(cfg, **changes)
        if least_memory(smaller, target) <= free and (fits := largest_batch(smaller, target)):
            if fits < smaller.split_step(target.processes)[0]:
                changes |= dict(batch_size=fits)
            flags = " ".join(f"--{name}={value}" for name, value in changes.items() if value != getattr(cfg, name))
            raise UserError(f"{what}, and a smaller batch is not enough: use {flags}")
    raise UserError(f"{what}, and no smaller form of this model fits: use a smaller --n_embd and --vocab_size")


def check_disk(cfg: Config, parameters: int, elsewhere: bool) -> tuple[int, int, int]:
    """(bytes of a checkpoint, how many lie on the disk at a time, bytes free here). UserError if they do not fit, unless the
    run is planned for another machine."""
    one, often = 12 * parameters, saves(cfg)

    def at_a_time(keep: int) -> int:  # the newest, the best, and one that is being written before an old one goes
        return min(often, keep + cfg.keep_best + 1)

    place = next(p for p in (Path(cfg.out_dir).absolute(), *Path(cfg.out_dir).absolute().parents) if p.is_dir())
    free, many = shutil.disk_usage(place).free, at_a_time(cfg.keep_checkpoints)
    if one * many <= free or elsewhere:
        return one, many, free
    fits = [keep for keep in range(1, cfg.keep_checkpoints) if one * at_a_time(keep) <= free]
    flag = f"--keep_checkpoints={fits[-1]}, or --out_dir=another/folder" if fits else "--out_dir=another/folder, or make room"
    raise UserError(f"checkpoints take {gib(one * many)} GiB ({many} of {gib(one)}), {place} has {gib(free)} left: use {flag}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, as far as it is here."""

    tokens: int | None = None
    validation: int | None = None
    bytes: int | None = None
    note: str


def look_at_data(cfg: Config) -> Data:
    """UserError if it is here and does not fit the model."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if (folder / shards.MANIFEST).is_file():
        dataset, batches = open_data(cfg)
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
        tokens = len(batches.stream)
        return Data(tokens=tokens, validation=len(dataset.split("val")), bytes=size, note=f"{tokens:,} tokens to learn from")
    what = cfg.dataset if cfg.dataset in sources.NAMED else f"path/to/your.txt --name={cfg.dataset}"
    note = f"not here: run python prepare_data.py {what}"
    _, source = sources.NAMED.get(cfg.dataset, (None, None))
    if isinstance(source, sources.Hub):  # two bytes a token
        return Data(tokens=source.tokens, bytes=2 * source.tokens, note=f"about {source.tokens / 1e9:.2g}B tokens; {note}")
    return Data(note=note)


# ---- the page ---------------------------------------------------------------------------------------------------------


def parameters(cfg: Config) -> tuple[int, int]:
    """(all that are stored, those that count: without the vocabulary's padding)."""
    with torch.device("meta"):
        gpt = GPT(cfg)
    return sum(p.numel() for p in gpt.parameters()), gpt.n_params()


def expected_loss(cfg: Config) -> tuple[float, float]:
    """(ln of the vocabulary's size, what random weights add): a softmax over logits of variance s² loses s²/2 more.

    The logits are rows of the head times ln_f's output, C numbers of variance 1: s² = C · 0.02² with GPT-2's initialisation,
    C / 3C with nn.Linear's (uniform within 1/sqrt(C)).
    """
    variance = cfg.n_embd * 0.02**2 if cfg.init == "gpt2" else 1 / 3
    return math.log(cfg.vocab_size), variance / 2


def row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<26}{value:>14}   {remark}".rstrip()


def memory_rows(cfg: Config, found: Memory, target: Target) -> list[str]:
    """Each kind's share of the moment at which all together are largest."""
    lines = ["memory at the peak, GiB a process"]
    remarks = KINDS | {
        "the program": "Python, torch" + (", what compiling leaves behind" if cfg.compile else ""),
        "gaps in the heap": f"an allowance for what malloc cannot reuse: {HEAP_GAPS:.0%} of the tensors",
        "held by other processes": f"--parallel={cfg.parallel}",
    }
    lines += [row(kind, gib(size), remarks[kind]) for kind, size in found.parts.items() if size]
    of = f"of {gib(target.total)}; " if target.total else ""
    where = "without what CUDA itself takes" if cfg.device == "cuda" else "as train.py logs it, mostly within 10%"
    lines.append(row("predicted peak", gib(found.training), f"{of}{where}"))
    if found.saving > found.training:
        lines.append(row("while it saves", gib(found.saving), "with a copy of its state; none with --background_save=False"))
    if found.host:
        lines.append(row("copy to be saved", gib(found.host), "in the host's memory; none with --background_save=False"))
    return lines


def time_rows(cfg: Config, speed: Rate, seen: Data) -> list[str]:
    if speed.tokens_per_s is None:
        return ["time", row("tokens per second", "?", speed.source)]
    each = cfg.tokens_per_step / speed.tokens_per_s
    often, length = math.ceil(cfg.max_steps / cfg.eval_interval), min(cfg.eval_tokens, seen.validation or cfg.eval_tokens)
    parts = {"steps": cfg.max_steps * each, "validations": often * length / speed.tokens_per_s / 3}  # forward alone
    if speed.first_step_s:
        parts["more for the first step"] = max(0.0, speed.first_step_s - each)
    return [
        "time",
        row("tokens per second", f"{speed.tokens_per_s:,.0f}", speed.source),
        *([row("which differs in", "", ", ".join(speed.unlike))] if speed.unlike else []),
        row("milliseconds per step", ms(each)),
        row(
            "the whole run",
            duration(sum(parts.values())),
            ", ".join(f"{duration(parts[p])} {p}" for p in parts),
        ),
    ]


def learning_rows(cfg: Config, found: Memory, target: Target, seen: Data) -> list[str]:
    shape = f"{found.accumulation} x {found.micro_batch} x {cfg.T} x {target.processes}"
    tokens = cfg.tokens_per_step * cfg.max_steps
    epochs = f", {tokens / seen.tokens:.3g} epochs" if seen.tokens else ""
    log, more = expected_loss(cfg)
    return [
        "learning",
        row("tokens per step", f"{cfg.tokens_per_step:,}", f"{shape}: micro-steps x sequences x T x processes"),
        row("steps", f"{cfg.max_steps:,}", f"{tokens:,} tokens{epochs}"),
        row("loss at step 0", f"{log + more:.2f}", f"ln {cfg.vocab_size} = {log:.2f}, and {more:.2f} for random weights"),
    ]


def notes(asked: Config, cfg: Config, found: Memory, target: Target) -> Iterator[str]:
    """What is odd about a run."""
    if found.micro_batch != asked.batch_size and asked.batch_size != "auto":
        yield f"batch_size={asked.batch_size} does not divide a process's share of the step: {found.micro_batch} does"
    if 0 < cfg.max_steps <= cfg.warmup_steps:
        yield f"warmup_steps={cfg.warmup_steps} is all of max_steps={cfg.max_steps}: the learning rate never comes down"
    if cfg.init_from:
        yield f"init_from={cfg.init_from}: step 0 has the loss of those weights, not of random ones"
    if cfg.attention == "naive" and not cfg.compile and cfg.device == "cpu":
        yield "eager naive attention leaves larger gaps in the heap: up to 40% more than predicted was measured"
    if cfg.device == "cuda" and target.hardware is None:
        yield "the memory and the speed of that GPU are not known here"


def page(asked: Config, results: Path, imported: int, accumulate: Callable[[Run, int], Tensor]) -> str:
    """The plan of a config. UserError, one line, if it cannot run. imported: bytes of a process that has imported train.py."""
    cfg, target = resolve(asked, imported, accumulate)
    stored, counted = parameters(cfg)
    size, many, left = check_disk(cfg, stored, target.hardware is None)
    seen = look_at_data(cfg)
    found = check_memory(cfg, target)
    cfg = replace(cfg, batch_size=found.micro_batch)
    how = [cfg.device, cfg.dtype, f"{cfg.attention} attention", f"compiled by {cfg.compile_scope}" if cfg.compile else "eager"]
    how += ["fused AdamW" if cfg.fused_adamw else "looped AdamW", *(["freed memory kept"] if cfg.reuse_memory else [])]
    how += [f"{target.processes} processes, {cfg.parallel}" if target.processes > 1 else "1 process"]
    rows = f", in {cfg.padded_vocab_size:,} rows" if cfg.padded_vocab_size != cfg.vocab_size else ""
    shape = f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide; vocabulary {cfg.vocab_size:,}{rows}"
    lines = [
        f"{target.hardware or 'a GPU that is not here'}: {', '.join(how)}",
        "model",
        row("parameters", f"{counted / 1e6:,.2f}M", shape),
        row("FLOPs per token", f"{cfg.flops_per_token(cfg.T) / 1e6:,.1f}M", "forward, backward: 6 a matmul weight + 12 L C T"),
        *learning_rows(cfg, found, target, seen),
        *memory_rows(cfg, found, target),
        *time_rows(cfg, rate(cfg, target.processes, target.hardware, results), seen),
        "disk, GiB",
        row("data", gib(seen.bytes) if seen.bytes else "?", f"{cfg.data_dir}/{cfg.dataset}: {seen.note}"),
        row("checkpoints", gib(size * many), f"{many} at a time x 12 bytes a parameter; {gib(left)} free for {cfg.out_dir}"),
    ]
    odd = [f"  {note}" for note in notes(asked, cfg, found, target)]
    return "\n".join([*lines, *(["notes"] if odd else []), *odd])


def main(argv: list[str], accumulate: Callable[[Run, int], Tensor]) -> None:
    """Print the plan of the config and flags in argv. accumulate: train.accumulate, whose memory is followed."""
    if int(os.environ.get("RANK", 0)):
        return  # torchrun starts several processes, one of them prints
    imported = held_now()
    print(page(configurator.load(argv, __doc__), ROOT / "results", imported, accumulate))
