"""What a training run takes, before its first step: memory, time, disk. No device is touched and nothing is computed.

python train.py config/shakespeare.py --plan
python train.py config/gpt2_124m.py --plan --device=cuda --processes=8      for a machine that is not here
"""

import bisect
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
from forecast.memory import KINDS, Memory, Target, memory, saves
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
    gpu = ask_for_gpu() if cfg.device == "cuda" or (cfg.device == "auto" and torch.version.cuda) else None
    if cfg.device == "cuda" or gpu:
        name, total, capability = gpu or (None, None, 9.0)
        device, able, free = torch.device("cuda"), machine.gpu_abilities(capability), total
    else:
        mps = cfg.device == "mps" or (cfg.device == "auto" and torch.backends.mps.is_available())
        device = torch.device("mps" if mps else "cpu")
        able, name = machine.abilities(device), machine.hardware_name(device)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local, system.free_memory()
        free = free and free // local
    cfg, _ = machine.resolve(cfg, device, able)
    here = dict(hardware=name, able=able, processes=processes, free=free, total=total)
    return cfg, Target(**here, imported=imported, accumulate=accumulate)


# ---- what does not fit ------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def largest_batch(cfg: Config, target: Target) -> int:
    """The largest micro-batch that fits and divides a process's share of a step, or 0."""
    whole = target.processes == 1 or cfg.parallel == "ddp"
    least = 4 * cluster.FP32 * sum(cluster.parameters(cfg)) * whole
    if least > target.free:  # what is far too large is not followed
        return 0

    def peak(size: int) -> int:
        return memory(replace(cfg, batch_size=size), target).peak

    share, _ = cfg.split_step(target.processes, most=cfg.tokens_per_step)
    top, _ = cfg.split_step(target.processes)
    sizes = [b for b in range(1, top + 1) if share % b == 0]
    if peak(1) > target.free:  # often not even one fits
        return 0
    return sizes[bisect.bisect(sizes, target.free, lo=1, key=peak) - 1]


def remedies(cfg: Config) -> Iterator[dict]:
    """Changes that may save memory, in the order in which one would try them; the last ones change what is learned."""
    yield from (dict(attention="sdpa"), dict(dtype="bfloat16"), dict(parallel="fsdp"), dict(background_save=False))
    for T in (cfg.T // 2**k for k in range(1, 5) if cfg.T % 2**k == 0 and cfg.T // 2**k >= 64):
        yield dict(sequence_length=T)
    layers, width = cfg.n_layer, cfg.n_embd
    while layers > 1:  # smaller models keep their proportions
        layers //= 2
        yield dict(n_layer=layers, n_embd=width)
        if width % (2 * cfg.n_head) == 0:
            width //= 2
            yield dict(n_layer=layers, n_embd=width)


def fit(cfg: Config, target: Target) -> tuple[Memory, str]:
    """(the memory of a run, "" or why that is more than is free, with the flags that fix it)."""
    found = memory(cfg, target)
    if target.free is None or found.peak <= target.free:
        return found, ""
    fits = largest_batch(cfg, target)
    if fits and cfg.batch_size == "auto":
        return memory(replace(cfg, batch_size=fits), target), ""
    sequences = f"{found.micro_batch} sequence{'s' * (found.micro_batch > 1)}"
    what = f"micro-batches of {sequences} take {gib(found.peak)} GiB a process, {gib(target.free)} are free"
    if fits:
        return found, f"{what}: use --batch_size={fits}"
    for changes in remedies(cfg):
        smaller = replace(cfg, **changes)
        if smaller == cfg or machine.not_available(smaller, torch.device(cfg.device), target.able):
            continue
        if fits := largest_batch(smaller, target):
            if fits < smaller.split_step(target.processes)[0]:
                changes |= dict(batch_size=fits)
            flags = " ".join(f"--{name}={value}" for name, value in changes.items() if value != getattr(cfg, name))
            return found, f"{what}, and a smaller batch is not enough: use {flags}"
    return found, f"{what}, and no smaller form of this model fits: use a smaller --n_embd and --vocab_size"


def disk(cfg: Config, parameters: int, elsewhere: bool) -> tuple[str, str]:
    """(the line on checkpoints, "" or what fixes it that they do not fit). A machine elsewhere has another disk."""
    one, often = 12 * parameters, saves(cfg)

    def at_a_time(keep: int) -> int:  # the newest, the best, and one that is being written before an old one goes
        return min(often, keep + cfg.keep_best + 1)

    place = next(p for p in (Path(cfg.out_dir).absolute(), *Path(cfg.out_dir).absolute().parents) if p.is_dir())
    free, many = shutil.disk_usage(place).free, at_a_time(cfg.keep_checkpoints)
    fits = one * many <= free or elsewhere
    remark = f"{many} at a time x 12 bytes a parameter; {gib(free)} free for {cfg.out_dir}"
    line = row("checkpoints", gib(one * many), remark if fits else f"TOO MUCH: {remark}")
    if fits:
        return line, ""
    fewer = [keep for keep in range(1, cfg.keep_checkpoints) if one * at_a_time(keep) <= free]
    flag = f"--keep_checkpoints={fewer[-1]}, or --out_dir=another/folder" if fewer else "--out_dir=another/folder, or make room"
    return line, f"checkpoints take {gib(one * many)} GiB ({many} of {gib(one)}), {place} has {gib(free)} left: use {flag}"


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
        size, tokens = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()), len(batches.stream)
        return Data(tokens=tokens, validation=len(dataset.split("val")), bytes=size, note=f"{tokens:,} tokens to learn from")
    _, source = sources.NAMED.get(cfg.dataset, (None, None))
    note = f"not here: run python prepare_data.py {cfg.dataset if source else f'path/to/your.txt --name={cfg.dataset}'}"
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

    def total(name: str, size: int, remark: str) -> str:
        too_much = target.free is not None and size > target.free
        return row(name, gib(size), f"TOO MUCH: {gib(target.free)} free; {remark}" if too_much else remark)

    where = "without what CUDA itself takes" if cfg.device == "cuda" else "as train.py logs it, mostly within 10%"
    lines = [row(kind, gib(size), KINDS[kind]) for kind, size in found.parts.items() if size]
    lines.append(total("predicted peak", found.training, (f"of {gib(target.total)}; " if target.total else "") + where))
    if found.saving > found.training:
        lines.append(total("while it saves", found.saving, "with a copy of its state; none with --background_save=False"))
    if found.host:
        lines.append(row("copy to be saved", gib(found.host), "in the host's memory; none with --background_save=False"))
    return ["memory at the peak, GiB a process", *lines]


def time_rows(cfg: Config, speed: Rate, seen: Data) -> list[str]:
    if speed.tokens_per_s is None:
        return ["time", row("tokens per second", "?", speed.source)]
    each = cfg.tokens_per_step / speed.tokens_per_s
    often, length = math.ceil(cfg.max_steps / cfg.eval_interval), min(cfg.eval_tokens, seen.validation or cfg.eval_tokens)
    parts = {"steps": cfg.max_steps * each, "validations": often * length / speed.tokens_per_s / 3}  # forward alone
    if speed.first_step_s:
        parts["more for the first step"] = max(0.0, speed.first_step_s - each)
    less, more = ("< ", "> ") if speed.at_most else ("", "")
    unlike = [row("which differs in", "", ", ".join(speed.unlike))] if speed.unlike else []
    whole = ", ".join(f"{duration(seconds)} {part}" for part, seconds in parts.items())
    return [
        "time",
        row("tokens per second", f"{less}{speed.tokens_per_s:,.0f}", speed.source),
        *unlike,
        row("milliseconds per step", more + ms(each), speed.launch_bound),
        row("the whole run", more + duration(sum(parts.values())), whole),
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
    if found.micro_batch != asked.batch_size != "auto":
        yield f"batch_size={asked.batch_size} does not divide a process's share of the step: {found.micro_batch} does"
    if 0 < cfg.max_steps <= cfg.warmup_steps:
        yield f"warmup_steps={cfg.warmup_steps} is all of max_steps={cfg.max_steps}: the learning rate never comes down"
    if cfg.init_from:
        yield f"init_from={cfg.init_from}: step 0 has the loss of those weights, not of random ones"
    if cfg.attention == "naive" and not cfg.compile and cfg.device == "cpu":
        yield "eager naive attention leaves larger gaps in the heap: up to 40% more than predicted was measured"
    if cfg.device == "cuda" and target.hardware is None:
        yield "the memory and the speed of that GPU are not known here"


def page(asked: Config, results: Path, imported: int, accumulate: Callable[[Run, int], Tensor]) -> tuple[str, str]:
    """(the plan of a config, "" or what does not fit in one line). UserError if it cannot run at all. imported: bytes of a
    process that has imported train.py."""
    cfg, target = resolve(asked, imported, accumulate)
    stored, counted = parameters(cfg)
    checkpoints, too_many = disk(cfg, stored, target.hardware is None)
    seen = look_at_data(cfg)
    found, too_much = fit(cfg, target)
    cfg = replace(cfg, batch_size=found.micro_batch)
    how = [cfg.device, cfg.dtype, f"{cfg.attention} attention", f"compiled by {cfg.compile_scope}" if cfg.compile else "eager"]
    how += ["fused AdamW" if cfg.fused_adamw else "looped AdamW", *(["freed memory kept"] if cfg.reuse_memory else [])]
    how += [f"{target.processes} processes, {cfg.parallel}" if target.processes > 1 else "1 process"]
    rows = f", in {cfg.padded_vocab_size:,} rows" if cfg.padded_vocab_size != cfg.vocab_size else ""
    shape = f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide; vocabulary {cfg.vocab_size:,}{rows}"
    odd = [f"  {note}" for note in notes(asked, cfg, found, target)]
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
        checkpoints,
        *(["notes", *odd] if odd else []),
    ]
    return "\n".join(lines), "; ".join(filter(None, (too_much, too_many)))


def main(argv: list[str], accumulate: Callable[[Run, int], Tensor]) -> None:
    """Print the plan of the config and flags in argv. accumulate: train.accumulate, whose memory is followed."""
    if int(os.environ.get("RANK", 0)):
        return  # torchrun starts several processes, one of them prints
    imported = round(system.peak_memory() / 2**22) * 2**22  # so that the same plan reads the same twice
    text, too_large = page(configurator.load(argv, __doc__), ROOT / "results", imported, accumulate)
    print(text)
    if too_large:
        raise UserError(too_large)
