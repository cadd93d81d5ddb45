"""What a training run takes, before its first step: memory, time, disk. No device is touched and nothing is computed.

    python train.py config/shakespeare.py --plan
    python train.py config/gpt2_124m.py --plan --device=cuda --processes=8      for a machine that is elsewhere

Memory is followed, not put into formulas: the model's own forward and backward run on tensors that have shapes and no contents,
and a ledger notes when the storage behind each would be allocated and freed. Torch's CPU operators stand in for a GPU's.
"""

import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configurator
import model
import optim
import train
from base import errors, system
from base.errors import UserError
from configurator import Config
from corpus import shards, sources
from engine import machine, parallel
from engine.journal import duration
from engine.outliers import Outliers
from engine.run import Run, open_data
from forecast import cluster
from model import GPT
from report import results as recorded

GIB = 2**30
CPU = torch.device("cpu")

# What a process comes to hold beyond its tensors and what it held when train.py was imported, in bytes: the rest of torch, its
# kernels and their caches; and if it compiles, the compiler too, and a graph of the whole model, a little for each layer.
# Measured with models of a few MB, on 2 cores with torch 2.13 and Python 3.11; with code compiled before it is a little less.
PROGRAM, COMPILING, COMPILING_A_LAYER = 116 * 2**20, 210 * 2**20, 4 * 2**20

# kind of storage: what it is, and what changes it
KINDS = {
    "weights": "float32; smaller: --n_layer, --n_embd",
    "gradients": "float32, freed behind each step",
    "AdamW's moments": "two float32 a parameter; processes can share them: --parallel=zero1",
    "weights as {dtype}": "autocast's copies, kept for backward",
    "activations": "grow with batch_size, T and n_layer",
    "logits": "grow with batch_size, T and the vocabulary",
    "temporaries": "of single operators, and gradients on their way",
    "copy to be saved": "from the first save on; not with --background_save=False",
}


# ---- following a step -------------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Notes when each storage is allocated and freed: events are (number, bytes), with the bytes negative when it goes."""

    def __init__(self):
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.kinds: dict[int, str] = {}
        self.numbers: dict[int, int] = {}  # of the storages that live, by address
        self.kind = "temporaries"
        self.logits: tuple[int, ...] = ()  # lengths of a row of logits

    def number(self, t: Tensor) -> int:
        """Of the storage behind a tensor; a new one if it has not been seen."""
        storage = t.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.numbers:
            number = self.numbers[address] = len(self.kinds)
            self.kinds[number] = "logits" if t.dim() > 1 and t.size(-1) in self.logits else self.kind
            self.events.append((number, size))
            weakref.finalize(storage, self.freed, address, size)
        return self.numbers[address]

    def freed(self, address: int, size: int) -> None:
        self.events.append((self.numbers.pop(address), -size))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and self.kinds.get(self.numbers.get(_address(args[0]))) == "weights"
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                number = self.number(t)
                if cast:
                    self.kinds[number] = "weights as {dtype}"
        return found


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class FusedLoss(torch.autograd.Function):
    """What torch.compile makes of the cross-entropy, by memory: it reads the logits as the matmul wrote them, in 16 bits or 32,
    and overwrites them with their gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0]


class FusedSoftmax(torch.autograd.Function):
    """The same of scale, mask and softmax: 32-bit scores are overwritten, 16-bit ones kept beside the weights."""

    @staticmethod
    def forward(ctx, scores: Tensor, kept: torch.dtype) -> Tensor:
        if scores.dtype == torch.float32:
            ctx.mark_dirty(scores)
            return scores
        ctx.save_for_backward(scores.to(kept))
        return torch.empty_like(scores)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, kept: torch.dtype | None = None) -> Tensor:
    """model.naive_attention, as far as compiled code keeps anything of it. kept: the scores' type; None: q's."""
    return F.dropout(FusedSoftmax.apply(q @ k.transpose(-2, -1), kept or q.dtype), dropout) @ v


@contextlib.contextmanager
def as_it_runs(cfg: Config) -> Iterator[None]:
    """Within it, the model's operators keep in memory what a GPU's, or compiled ones, keep.

    What else the compiler fuses changes little: of a block it keeps as many bytes a token as eager code (36 C + 4 H + 16 in
    bf16, see docs/scale.md), seen in inductor's code, torch 2.13.
    """
    dropout, attention, naive = F.dropout, dict(model.ATTENTION), model.naive_attention
    if cfg.compile or cfg.device == "cuda":  # a mask of bytes; the plain CPU operator's has the type of its input
        F.dropout = lambda x, p=0.5, training=True: torch.native_dropout(x, p, True)[0] if p and training else x
    if cfg.compile:
        model.naive_attention = model.ATTENTION["naive"] = fused_attention
        if cfg.dropout and cfg.device != "cuda":  # no fused kernel there: separate matmuls, in float32
            model.ATTENTION["sdpa"] = functools.partial(fused_attention, kept=torch.float32)
    if cfg.device == "cuda":  # its kernels draw their dropout anew in backward
        model.ATTENTION["sdpa"] = lambda q, k, v, dropout: attention["sdpa"](q, k, v, 0.0)
    try:
        yield
    finally:
        F.dropout, model.naive_attention = dropout, naive
        model.ATTENTION.update(attention)


class Shapes:
    """Batches without contents, in the place of a run's."""

    def __init__(self, T: int):
        self.T = T

    def batch(self, step: int, micro: int, batch_size: int, *_) -> tuple[Tensor, Tensor]:
        return tuple(torch.empty(batch_size, self.T, dtype=torch.int64) for _ in range(2))


@dataclass(frozen=True)
class Trace:
    """The storages of a run up to the end of its first step."""

    events: list[tuple[int, int]]
    begin: int  # of the first step, in events
    kinds: dict[int, str]

    def of(self, steps: int, copies: list[int], save_after: int) -> list[tuple[int, int]]:
        """Events of `steps` steps, with copies for saving made behind one of them. What a step leaves (moments) stays."""
        first = self.events[self.begin :]
        freed, new = {n for n, size in first if size < 0}, {n for n, size in first if size > 0}
        passing = [(n, size) for n, size in first if n in freed & new]
        found, far = self.events[: self.begin] + first, len(self.kinds)
        for step in range(1, steps + 1):
            if step > 1:
                found += [(n + step * far, size) for n, size in passing]
            if step == save_after:
                found += [(-1 - i, size) for i, size in enumerate(copies)]
        return found

    def kind(self, number: int) -> str:
        return "copy to be saved" if number < 0 else self.kinds[number % len(self.kinds)]


def trace(cfg: Config, processes: int) -> Trace:
    """Follow the first step of a run, whose config is resolved, in one of its processes: its own forward and backward passes
    (two micro-steps stand for all that follow), then AdamW's."""
    micro_batch, accumulation = cfg.split_step(processes)
    ledger = Ledger()
    with as_it_runs(cfg), torch.device("meta"):
        gpt = GPT(cfg)
    with FakeTensorMode(), ledger, as_it_runs(cfg):
        ledger.kind, real = "weights", {}
        for module in gpt.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if p not in real:  # one that is shared is made once
                        real[p] = nn.Parameter(torch.empty(p.shape))
                    module._parameters[name] = real[p]
        if processes > 1 and cfg.parallel != "fsdp":  # DistributedDataParallel's buckets stay from step to step
            ledger.kind = "gradients"
            for p in gpt.parameters():
                p.grad = torch.empty_like(p)
        ledger.kind = "temporaries"
        optimizer = optim.adamw(cfg, gpt)
        late: list[Tensor] = []
        if cfg.compile:
            gpt.head = lambda x, targets: FusedLoss.apply(gpt.lm_head(gpt.transformer.ln_f(x)))
            if cfg.compile_scope == "model":  # one graph hands over all its gradients at its end
                for p in gpt.parameters():
                    p.register_hook(lambda gradient, p=p: late.append(gradient) if p.grad is not None else None)
        ledger.logits = tuple({cfg.vocab_size, cfg.padded_vocab_size})
        gpt.register_forward_pre_hook(lambda *_: (late.clear(), setattr(ledger, "kind", "activations"))[0])
        gpt.register_forward_hook(lambda *_: setattr(ledger, "kind", "temporaries"))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        objects = (replace(cfg, prefetch=False), parallel.World(), CPU, None, Shapes(cfg.T), gpt, gpt, gpt, optimizer, scaler)
        run = Run(*objects, micro_batch, min(accumulation, 2), Outliers(cfg))
        begin = len(ledger.events)
        train.accumulate(run, 0)
        late.clear()
        for p in gpt.parameters():
            ledger.kinds[ledger.number(p.grad)] = "gradients"
        ledger.logits = ()
        optimizer.step()
        for kept in optimizer.state.values():
            for t in kept.values():
                ledger.kinds[ledger.number(t)] = "AdamW's moments"
        if processes == 1 or cfg.parallel == "fsdp":
            optimizer.zero_grad(set_to_none=True)
        events = ledger.events[:]
        run.reader.shutdown()
    # autocast forgets its copies in the order of their addresses: what goes together goes in one order
    runs = itertools.groupby(events, key=lambda e: e[1] < 0)
    ordered = [e for frees, run in runs for e in (sorted(run) if frees else run)]
    return Trace(ordered, begin, ledger.kinds)


# ---- from storages to memory ------------------------------------------------------------------------------------------


def replay(keep: bool, events: list[tuple[int, int]], beside: list[int]) -> int:
    """The most bytes that glibc's malloc takes from the system for a list of allocations: its heap keeps holes that nothing
    fits into. Nothing is written to them, so it costs no memory. Runs in a process of its own.

    beside: sizes of small blocks that come and go with each storage.
    """
    import ctypes

    class Info(ctypes.Structure):  # malloc.h: mallinfo2
        names = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    if keep:  # as machine.set_reuse_memory()
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)

    def taken() -> int:
        info = libc.mallinfo2()
        return info.arena + info.hblkhd

    before, most, held = taken(), 0, {}
    for number, size in events:
        if size > 0:
            at = ctypes.c_void_p()
            if libc.posix_memalign(ctypes.byref(at), 64, size):  # c10's alignment on a CPU
                raise MemoryError
            held[number] = [at, *(libc.malloc(n) for n in beside)]
            most = max(most, taken() - before) if size > 65536 else most
        elif size < 0:
            for at in held.pop(number):
                libc.free(at)
    return most


# BenchConfig of a tensor's own objects (storage, tensor, place in the autograd graph), in round numbers: they matter as what lies
# between large blocks and keeps two holes from being one. Compiled code makes next to none.
SMALL = [100, 208, 300, 600]


def heap(cfg: Config, events: list[tuple[int, int]]) -> int:
    """Bytes that malloc takes for the events, at the most. Where its heap is no glibc's, the bytes that live."""
    code = f"import json, sys\n{inspect.getsource(replay)}\nprint(replay(*json.load(sys.stdin)))"
    given = json.dumps([bool(cfg.reuse_memory), events, [] if cfg.compile else SMALL])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], input=given, capture_output=True, text=True)
    live = max(itertools.accumulate(size for _, size in events))
    found = int(done.stdout) if done.returncode == 0 else live
    # With freed memory kept, what one step leaves behind comes to lie in the largest tensor's place, which takes new room in
    # the next: measured, where the replay does not always show it.
    return max(found, live + max(size for _, size in events)) if cfg.reuse_memory else found


@dataclass(frozen=True)
class Memory:
    """Bytes of one process; `at_most` and `at_peak` by kind."""

    micro_batch: int
    accumulation: int
    training: int  # the peak of its steps
    saving: int  # the peak if the last save in the background comes on top; 0 if there is none, or others came before
    at_most: dict[str, int]
    at_peak: dict[str, int]
    host: int  # that a GPU's process holds on the host beside this, to save

    @property
    def peak(self) -> int:
        return max(self.training, self.saving)


def saves(cfg: Config) -> int:
    """How many checkpoints a run writes, if every validation is the best so far."""
    often, last = [cfg.checkpoint_interval, *([cfg.eval_interval] if cfg.keep_best else [])], cfg.max_steps
    return len({last}.union(*(range(interval, last + 1, interval) for interval in often)))


def memory(cfg: Config, processes: int, base: int) -> Memory:
    """Of one process of a resolved run. base: bytes that it holds without any tensor (on a GPU those do not count)."""
    followed = trace(cfg, processes)
    sizes = [size for number, size in followed.events[: followed.begin] if followed.kinds[number] == "weights"]
    shared = 0  # what the other processes hold
    if processes > 1:
        shared = int(cluster.state_bytes(cfg, cfg.parallel, processes) - cluster.state_bytes(cfg, "ddp", processes))
    owned = 1.0 if processes == 1 or cfg.parallel == "ddp" else (1 + 2 / processes) / 3  # of the three copies: zero1
    owned = 1 / processes if cfg.parallel == "fsdp" else owned
    copies = [int(size * owned) for size in sizes for _ in range(3)] if cfg.background_save else []
    steps, on_cpu, early = min(3, max(1, cfg.max_steps)), cfg.device != "cuda", saves(cfg) > 1
    events = followed.of(steps, copies if on_cpu and early else [], save_after=min(2, steps))
    at_most, at_peak = occupation(events, followed)
    saving = 0
    if on_cpu:
        extra = {"the program": base, "holes in malloc's heap": heap(cfg, events) - sum(at_peak.values())}
        at_peak, at_most = extra | at_peak, extra | at_most
        if copies and not early:
            saving = base + heap(cfg, followed.of(steps, copies, save_after=steps)) + shared
    if shared:
        at_peak["held by other processes"] = at_most["held by other processes"] = shared
    sizes = cfg.split_step(processes)
    return Memory(*sizes, sum(at_peak.values()), saving, at_most, at_peak, 0 if on_cpu else sum(copies))


def occupation(events: list[tuple[int, int]], followed: Trace) -> tuple[dict[str, int], dict[str, int]]:
    """(the most bytes that each kind holds, what each holds when all together hold most)."""
    now = dict.fromkeys(KINDS, 0)
    at_most, at_peak, total, most = dict(now), dict(now), 0, 0
    for number, size in events:
        kind = followed.kind(number)
        now[kind] += size
        total += size
        at_most[kind] = max(at_most[kind], now[kind])
        if total > most:
            most, at_peak = total, dict(now)
    return at_most, at_peak


# ---- time, disk, learning ---------------------------------------------------------------------------------------------


def parameters(cfg: Config) -> tuple[int, int]:
    """(all that are stored, those that count: without the vocabulary's padding). Each layer has as many, so two models tell."""
    with torch.device("meta"):
        one, two = (GPT(replace(cfg, n_layer=layers)) for layers in (1, 2))
    counts = [(sum(p.numel() for p in gpt.parameters()), gpt.n_params()) for gpt in (one, two)]
    return tuple(a + (cfg.n_layer - 1) * (b - a) for a, b in zip(*counts, strict=True))


def expected_loss(cfg: Config) -> tuple[float, float]:
    """(ln of the vocabulary's size, what random weights add): a softmax over logits of variance s² loses s²/2 more.

    The logits are rows of the head times ln_f's output, C numbers of variance 1: s² = C · 0.02² with GPT-2's initialisation,
    C / 3C with nn.Linear's (uniform within 1/sqrt(C)).
    """
    variance = cfg.n_embd * 0.02**2 if cfg.init == "gpt2" else 1 / 3
    return math.log(cfg.vocab_size), variance / 2


# what a step's speed depends on besides its sizes, the weightiest first
SPEED = ["dtype", "fp32_precision", "compile", "attention", "reuse_memory", "fused_adamw", "deterministic", "processes"]
SIZES = ["n_layer", "n_embd", "T", "tokens_per_step", "micro_batch"]


@dataclass(frozen=True)
class Rate:
    """Tokens per second of a whole run, and where the figure is from."""

    tokens_per_s: float | None
    first_step_s: float | None  # which compiles
    source: str
    unlike: tuple[str, ...] = ()  # settings in which the source differs


def known(requested: dict) -> Config:
    """The settings of a committed result, which an earlier version may have written."""
    names = {f.name for f in fields(Config)}
    return Config(**{name: value for name, value in requested.items() if name in names})


def traits(cfg: Config, processes: int) -> dict:
    """What decides the speed of a step."""
    found = {name: getattr(cfg, name) for name in [*SPEED[:-1], *SIZES[:-1]]}
    if cfg.dtype != "float32":
        found["fp32_precision"] = None  # acts on nothing
    return found | {"processes": processes, "micro_batch": cfg.split_step(processes)[0]}


def rate(cfg: Config, processes: int, hardware: str | None, results: Path) -> Rate:
    """From the nearest result that was measured on this hardware: as many equal settings as possible, then near sizes. Other
    sizes are scaled by FLOPs per token. Without one, what a GPU's data sheet allows."""
    here, flops, found = traits(cfg, processes), cfg.flops_per_token(cfg.T), []
    for path in sorted(results.glob("*/*.json")):
        result = recorded.load(path)
        if result["kind"] not in ("ladder", "ablate", "shakespeare", "ab", "run") or result["machine"]["hardware"] != hardware:
            continue
        entries = result["sides"] if result["kind"] == "ab" else recorded.measured(result) if "rungs" in result else [result]
        for e in entries:
            try:
                there = known(e["requested"])
            except UserError:
                continue  # of a setting that is no more
            other = traits(there, e.get("effective", {}).get("processes", 1))
            differ = [name for name in here if here[name] != other[name]]
            speed = sum(len(SPEED) - SPEED.index(name) for name in differ if name in SPEED)
            apart = sum(abs(math.log(here[name] / other[name])) for name in SIZES)
            seconds = statistics.median(recorded.all_steps(e)) if "step_s" in e else there.tokens_per_step / e["tokens_per_s"]
            tokens = there.tokens_per_step / seconds * there.flops_per_token(there.T) / flops
            if cfg.device == "cuda":  # each process has a GPU of its own; on a CPU they share it
                tokens *= processes / other["processes"]
            first = e.get("first_step_s")
            first = statistics.median(first) if isinstance(first, list) else first
            first = first if there.compile == cfg.compile else None
            name = f"results/{path.parent.name}/{path.name}" + (f" {e['name']}" if "name" in e else "")
            how = "measured:" if not differ else "scaled by FLOPs from" if apart < 3 else "a guess, by FLOPs from"
            found.append(((speed, apart, name), Rate(tokens, first, f"{how} {name}", tuple(differ))))
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    peak = machine.peak_flops_of(hardware) if hardware and cfg.device == "cuda" else None
    if peak:
        return Rate(processes * peak / flops, None, "AT MOST: the data sheet's peak; good runs reach a third to a half of it")
    return Rate(None, None, "not known: nothing in results/ is from this hardware; try python bench.py ladder")


@dataclass(frozen=True)
class Data:
    """A data set, as far as it is there."""

    tokens: int | None
    validation: int | None
    bytes: int | None
    note: str


def look_at_data(cfg: Config) -> Data:
    """UserError if it is there and does not fit the model."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if (folder / shards.MANIFEST).is_file():
        dataset, batches = open_data(cfg)
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
        return Data(len(batches.stream), len(dataset.split("val")), size, f"{len(batches.stream):,} tokens to learn from")
    try:
        shards.open_dataset(folder)
    except UserError as e:
        command = str(e).rpartition("type ")[2]
    _, source = sources.NAMED.get(cfg.dataset, (None, None))
    if isinstance(source, sources.Hub):  # two bytes a token
        return Data(source.tokens, None, 2 * source.tokens, f"about {source.tokens / 1e9:.2g}B tokens; not here: {command}")
    return Data(None, None, None, f"not here: {command}")


# ---- the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for."""

    hardware: str | None  # None: a GPU elsewhere
    free: int | None  # bytes that one process can have
    total: int | None


def ask_for_gpu() -> tuple[str, int, float] | None:
    """(name, bytes, compute capability) of the first GPU, told by the driver's own tool: that starts nothing on it."""
    what = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(what, capture_output=True, text=True, timeout=20)
        name, mib, capability = done.stdout.splitlines()[0].split(", ")
        return name, int(mib) * 2**20, float(capability)
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return None


def resolve(cfg: Config, processes: int) -> tuple[Config, Machine]:
    """(cfg without any "auto", as train.py would choose, the machine), without starting a device."""
    gpu = ask_for_gpu() if cfg.device == "cuda" or (cfg.device == "auto" and torch.version.cuda) else None
    if cfg.device == "cuda" or (cfg.device == "auto" and gpu):
        name, total, capability = gpu or (None, None, 9.0)
        auto = dict(dtype="bfloat16" if capability >= 8 else "float16", compile=capability >= 7, fused_adamw=True)
        auto |= dict(compile_scope="block" if cfg.parallel == "fsdp" else "model", reuse_memory=False)
        cfg = replace(cfg, device="cuda", **{n: value for n, value in auto.items() if getattr(cfg, n) == "auto"})
        return cfg, Machine(name, total, total)
    mps = cfg.device == "mps" or (cfg.device == "auto" and torch.backends.mps.is_available())
    device = torch.device("mps" if mps else "cpu")
    cfg, _ = machine.resolve(cfg, device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    free, total = system.free_memory(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return cfg, Machine(machine.hardware_name(device), free and free // local, total // local)


# ---- what cannot be ---------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def largest_batch(cfg: Config, processes: int, base: int, free: int) -> int:
    """The largest micro-batch that fits and divides a process's share of a step, or 0."""
    share = cfg.split_step(processes, most=cfg.tokens_per_step)[0]
    top = cfg.split_step(processes)[0]
    fitting, sizes = 0, [b for b in range(1, top + 1) if share % b == 0]
    while sizes:  # more sequences take more memory
        middle = (len(sizes) - 1) // 2 if fitting else 0  # often not even one fits
        if memory(replace(cfg, batch_size=sizes[middle]), processes, base).peak <= free:
            fitting, sizes = sizes[middle], sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return fitting


def remedies(cfg: Config, processes: int) -> Iterator[dict]:
    """Changes that take less memory, in the order in which one would try them; the last ones change what is learned."""
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


def check_memory(cfg: Config, processes: int, base: int, free: int | None) -> Memory:
    """The memory of a run. UserError with the flag that mends it if that is more than is free (None: nobody knows)."""
    whole = processes == 1 or cfg.parallel == "ddp"

    def takes(cfg: Config) -> float:
        """A little less than it will be, known at once; what is far too large is not followed step by step."""
        return base + 4 * cluster.FP32 * sum(cluster.parameters(cfg)) * whole

    if free is None:
        return memory(cfg, processes, base)
    what = f"weights, gradients and AdamW's moments alone take {gib(takes(cfg))} GiB a process, {gib(free)} are free"
    if takes(cfg) <= free:
        found = memory(cfg, processes, base)
        if found.peak <= free:
            return found
        fits = largest_batch(cfg, processes, base, free)
        if fits and cfg.batch_size == "auto":
            return memory(replace(cfg, batch_size=fits), processes, base)
        sequences = f"{found.micro_batch} sequence{'s' * (found.micro_batch > 1)}"
        what = f"micro-batches of {sequences} take {gib(found.peak)} GiB a process, {gib(free)} are free"
        if fits:
            raise UserError(f"{what}: type --batch_size={fits}")
    for changes in remedies(cfg, processes):
        smaller = replace(cfg, **changes)
        if takes(smaller) <= free and (fits := largest_batch(smaller, processes, base, free)):
            if fits < smaller.split_step(processes)[0]:
                changes |= dict(batch_size=fits)
            flags = " ".join(f"--{name}={value}" for name, value in changes.items() if value != getattr(cfg, name))
            raise UserError(f"{what}, and fewer sequences at a time do not help: type {flags}")
    raise UserError(f"{what}, and no smaller form of this model fits: type a smaller --n_embd and --vocab_size")


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
    raise UserError(f"{many} checkpoints of {gib(one)} GiB take {gib(one * many)}, {place} has {gib(free)} left: type {flag}")


def held_now() -> int:
    """Bytes of memory that this process holds, in steps of 4 MiB, so that the same plan reads the same twice."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux; there the peak
        held = machine.memory_gib(CPU) * GIB
    return round(held / 2**22) * 2**22


def program(cfg: Config, imported: int) -> int:
    """Bytes of a training process without any tensor. imported: what it holds when it has imported train.py."""
    if not cfg.compile:
        return imported + PROGRAM
    return imported + COMPILING + (COMPILING_A_LAYER * cfg.n_layer if cfg.compile_scope == "model" else 0)


# ---- the page ---------------------------------------------------------------------------------------------------------


def row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<26}{value:>14}   {remark}".rstrip()


def memory_rows(cfg: Config, found: Memory, total: int | None) -> list[str]:
    """Each kind's largest, and its share of the moment at which all together are largest."""
    lines = [f"memory, GiB a process{'at the peak':>21}{'at its most':>14}"]
    remarks = KINDS | {
        "the program": "Python, torch" + (", what compiling leaves behind" if cfg.compile else ""),
        "holes in malloc's heap": "replayed with this machine's own malloc",
        "held by other processes": f"--parallel={cfg.parallel}",
    }
    for kind, size in found.at_peak.items():
        if found.at_most[kind]:
            name = kind.format(dtype=cfg.dtype)
            lines.append(f"  {name:<26}{gib(size):>14}{gib(found.at_most[kind]):>14}   {remarks[kind]}")
    of = f"of {gib(total)}; " if total else ""
    where = "without what CUDA itself takes" if cfg.device == "cuda" else "as train.py logs it"
    lines.append(row("predicted peak", gib(found.training), f"{of}{where}"))
    if found.saving > found.training:
        lines.append(row("while it saves", gib(found.saving), "its copy in memory; not with --background_save=False"))
    if found.host:
        lines.append(row("copy to be saved", gib(found.host), "in the host's memory; not with --background_save=False"))
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
        row("milliseconds per step", recorded.ms(each)),
        row(
            "the whole run",
            duration(sum(parts.values())),
            ", ".join(f"{duration(parts[p])} {p}" for p in parts),
        ),
    ]


def plan(asked: Config, results: Path, imported: int) -> str:
    """The page of a config. UserError, one line, if it cannot run. imported: bytes of a process that has imported train.py."""
    processes = asked.processes or int(os.environ.get("WORLD_SIZE", 1))
    cfg, at = resolve(asked, processes)
    stored, counted = parameters(cfg)
    size, many, left = check_disk(cfg, stored, at.hardware is None)
    seen = look_at_data(cfg)
    found = check_memory(cfg, processes, 0 if cfg.device == "cuda" else program(cfg, imported), at.free)
    cfg = replace(cfg, batch_size=found.micro_batch)
    speed = rate(cfg, processes, at.hardware, results)
    how = [cfg.device, cfg.dtype, f"{cfg.attention} attention", f"compiled by {cfg.compile_scope}" if cfg.compile else "eager"]
    how += ["fused AdamW" if cfg.fused_adamw else "looped AdamW", *(["freed memory kept"] if cfg.reuse_memory else [])]
    how += [f"{processes} processes, {cfg.parallel}" if processes > 1 else "1 process"]
    rows = f", in {cfg.padded_vocab_size:,} rows" if cfg.padded_vocab_size != cfg.vocab_size else ""
    shape = f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide; vocabulary {cfg.vocab_size:,}{rows}"
    cut = f"{found.accumulation} x {found.micro_batch} x {cfg.T} x {processes}: micro-steps x sequences x T x processes"
    tokens = cfg.tokens_per_step * cfg.max_steps
    epochs = f", {tokens / seen.tokens:.3g} epochs" if seen.tokens else ""
    log, more = expected_loss(cfg)
    lines = [
        f"{at.hardware or 'a GPU that is not here'}: {', '.join(how)}",
        "model",
        row("parameters", f"{counted / 1e6:,.2f}M", shape),
        row("FLOPs per token", f"{cfg.flops_per_token(cfg.T) / 1e6:,.1f}M", "forward, backward: 6 a matmul weight + 12 L C T"),
        "learning",
        row("tokens per step", f"{cfg.tokens_per_step:,}", cut),
        row("steps", f"{cfg.max_steps:,}", f"{tokens:,} tokens{epochs}"),
        row("loss at step 0", f"{log + more:.2f}", f"ln {cfg.vocab_size} = {log:.2f}, and {more:.2f} for random weights"),
        *memory_rows(cfg, found, at.total),
        *time_rows(cfg, speed, seen),
        "disk, GiB",
        row("data", gib(seen.bytes) if seen.bytes else "?", f"{cfg.data_dir}/{cfg.dataset}: {seen.note}"),
        row("checkpoints", gib(size * many), f"{many} at a time x 12 bytes a parameter; {gib(left)} free for {cfg.out_dir}"),
    ]
    notes = []
    if found.micro_batch != asked.batch_size and asked.batch_size != "auto":
        notes.append(f"batch_size={asked.batch_size} does not divide a process's share of the step: {found.micro_batch} does")
    if 0 < cfg.max_steps <= cfg.warmup_steps:
        notes.append(f"warmup_steps={cfg.warmup_steps} is all of max_steps={cfg.max_steps}: the learning rate never comes down")
    if cfg.init_from:
        notes.append(f"init_from={cfg.init_from}: step 0 has the loss of those weights, not of random ones")
    if cfg.reuse_memory and not cfg.compile and found.at_peak["logits"] + found.at_peak["activations"] > found.peak / 3:
        notes.append("eager, with freed memory kept: holes differ from run to run and may double; --reuse_memory=False has few")
    if cfg.device == "cuda" and at.hardware is None:
        notes.append("what that GPU has in memory and speed is not known here")
    return "\n".join([*lines, *(["notes"] if notes else []), *(f"  {note}" for note in notes)])


def main(argv: list[str]) -> None:
    if int(os.environ.get("RANK", 0)):
        return  # torchrun starts several, one of them speaks
    imported = held_now()
    cfg = configurator.load([a for a in argv if a != "--plan"], __doc__)
    print(plan(cfg, Path(__file__).parent / "results", imported))


if __name__ == "__main__":
    errors.entry(main)
