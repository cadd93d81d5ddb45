"""Where the time of one training step goes: each part beside the least time it can take here, and the setting to try next.

One step of train.train_step is profiled and written as a Chrome trace (open it in https://ui.perfetto.dev); the table is
computed from that file alone. Every moment of the step belongs to exactly one part: on a CPU to the innermost operation that
the training thread is in, on a GPU to the kernel that runs. The floor of a part is the roofline's (Williams et al. 2009):
its operations over the matmul rate measured on this machine, or the bytes that it must read and write over the measured rate
of memory of that size (of a cache, where they fit into one), whichever is longer.
"""

import contextlib
import itertools
import json
import re
import resource
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import configurator
import optim
import train
from base.errors import UserError
from configurator import Config
from engine import machine, parallel
from engine.effective import effective, mismatches
from engine.run import Run, build
from measure.config import BenchConfig
from measure.fresh import in_fresh_process
from measure.ladder import climb, load_ladder, top_rung, unavailable
from measure.results import header, results_dir
from model import GPT
from report.results import gemm_rate

GEMM, ATTENTION, CROSS_ENTROPY, ELEMENTWISE = "GEMM", "attention", "cross-entropy", "norms and elementwise"
OPTIMIZER, DATA, COMMUNICATION, GAPS, OTHER = "optimizer", "data wait", "communication", "launch gaps", "other"
PARTS = (GEMM, ATTENTION, CROSS_ENTROPY, ELEMENTWISE, OPTIMIZER, DATA, COMMUNICATION, GAPS, OTHER)

STEP, SCOPE = "why: train_step", "why: "  # SCOPE + part: what happens inside is that part's, whatever it is called

# ---- which part an operation belongs to ---------------------------------------------------------------------------------

# All that runs inside one of these. AccumulateGrad adds up the gradients of micro-batches, which the optimizer needs.
INSIDE = [
    (DATA, re.compile(f"^{SCOPE}{DATA}$")),
    (COMMUNICATION, re.compile(rf"^{SCOPE}{COMMUNICATION}$|^torch::distributed|^c10d::")),
    (OPTIMIZER, re.compile(rf"^{SCOPE}{OPTIMIZER}$|^Optimizer\.|AccumulateGrad$")),
]
# An operation or kernel by its own name: the first pattern that is found in it. The order matters: the name of a compiled
# kernel lists all that was fused into it, "cpp_fused__log_softmax__to_copy_native_layer_norm_3", the dearest first here.
NAMED = [
    (COMMUNICATION, re.compile(r"nccl|gloo|c10d|allreduce|all_reduce|DistributedDataParallel", re.IGNORECASE)),
    (CROSS_ENTROPY, re.compile(r"log_softmax|nll_loss|cross_entropy|logsumexp", re.IGNORECASE)),
    (ATTENTION, re.compile(r"(?<!log)_softmax|::softmax|masked_fill")),  # written out, or fused from that
    (GEMM, re.compile(r"triton_tem_|triton_mm|cpp_\w*gemm")),  # templates of max-autotune
    (ELEMENTWISE, re.compile(r"(cpp|triton)_\w*fused")),  # casts and copies around an attention kernel, too
    (ATTENTION, re.compile(r"scaled_dot_product|flash|fmha|sdpa|efficient_attention|^aten::(bmm|baddbmm)$")),
    (GEMM, re.compile(r"^aten::_?(mm|addmm|linear|matmul)|gemm|cutlass|nvjet|cublas|xmma|ampere_|sm\d+_|mkldnn")),
    (GAPS, re.compile(r"^autograd::|Backward\d*$|^Compiled|^Torch-Compiled|CompiledFxGraph|^TorchDynamo|^AOTDispatcher")),
    (GAPS, re.compile(rf"^Pregraph|^{STEP}$|^ProfilerStep|^cuda[A-Z]|^cu[A-Z]|^(aten::)?detach_?$|^\[memory\]$")),
    (GAPS, re.compile(r"^aten::(view|_unsafe_view|reshape|t|transpose|permute|expand|slice|select|unbind|alias|as_strided)$")),
    (GAPS, re.compile(r"^aten::(empty|empty_like|empty_strided|resize_|item|_local_scalar_dense|unsqueeze|squeeze|flatten)$")),
    (ELEMENTWISE, re.compile(r"^aten::|at::native|^Memcpy|^Memset|^void |kernel", re.IGNORECASE)),
]


def by_name(name: str) -> str:
    """The part of an operation or kernel, told from its name alone."""
    return next((part for part, pattern in NAMED if pattern.search(name)), OTHER)


@dataclass(eq=False)
class Event:
    """An interval of the trace on one thread of the host, in microseconds."""

    name: str
    start: float
    end: float
    shapes: list = field(default_factory=list)  # of its inputs, where the profiler noted them
    launch: int | None = None  # the number of what it started on the GPU
    parent: "Event | None" = None
    own: float = 0.0  # what its children do not cover

    def chain(self):
        """Itself, its parent, and so on outwards."""
        event = self
        while event is not None:
            yield event
            event = event.parent


def part_of(event: Event, cfg: Config) -> str:
    """The part of a host operation: what it lies in, else its name, else the shapes it works on."""
    for outer in event.chain():
        if scope := next((part for part, pattern in INSIDE if pattern.search(outer.name)), None):
            return scope
    part = by_name(event.name)
    if part == ELEMENTWISE:
        shapes = [s for s in event.shapes if s and all(isinstance(n, int) for n in s)]
        if any(len(s) >= 4 for s in shapes):
            return ATTENTION  # heads: (B, H, T, D) and (B, H, T, T); nothing else here has four dimensions
        if any(s[-1] in (cfg.vocab_size, cfg.padded_vocab_size) and len(s) >= 2 for s in shapes):
            return CROSS_ENTROPY  # logits: (B, T, V) and (B·T, V)
    return part


# ---- reading the trace --------------------------------------------------------------------------------------------------


def host_events(trace: list[dict]) -> list[Event]:
    """The host's intervals of a Chrome trace, nested thread by thread. `own` adds up to the time covered."""
    device = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "overhead", "Trace")
    found = [e for e in trace if e.get("ph") == "X" and e.get("cat") not in device]
    events, open_ones, thread = [], [], None
    for e in sorted(found, key=lambda e: (str(e["tid"]), e["ts"], -e["dur"])):
        if e["tid"] != thread:
            open_ones, thread = [], e["tid"]
        args = e.get("args", {})
        event = Event(e["name"], e["ts"], e["ts"] + e["dur"], args.get("Input Dims", []), args.get("correlation"), own=e["dur"])
        while open_ones and open_ones[-1].end <= event.start:
            open_ones.pop()
        if open_ones:
            event.parent = open_ones[-1]
            event.end = min(event.end, event.parent.end)  # the last digit is rounded
            event.own = event.end - event.start
            event.parent.own -= event.own
        open_ones.append(event)
        events.append(event)
    return events


def kernels(trace: list[dict], host: list[Event], cfg: Config) -> list[tuple[float, float, str]]:
    """(start, end, part) of what ran on the GPU. A kernel has the number ("correlation") of the call that launched it,
    and so the operation that asked for it: aten::bmm is attention's, though its kernel is called gemm.
    """
    calls = {e.launch: e for e in host if e.launch is not None}
    found = []
    for e in trace:
        if e.get("ph") != "X" or e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        call = calls.get(e.get("args", {}).get("correlation"))
        part = part_of(call.parent, cfg) if call and call.parent else OTHER
        if part in (GAPS, OTHER):  # launched by a compiled graph: the kernel's own name says what it does
            part = by_name(e["name"])
        found.append((e["ts"], e["ts"] + e["dur"], part))
    return sorted(found)


def take(free: list[tuple[float, float]], spans: list[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """(how much of the free intervals the spans cover, what they leave free). Both sorted; so is what is left."""
    taken, left = 0.0, []
    for start, end in free:
        for a, b in spans:
            if b <= start or a >= end:
                continue
            if a > start:
                left.append((start, a))
            taken += min(b, end) - max(a, start)
            start = min(b, end)
        if start < end:
            left.append((start, end))
    return taken, left


def attribute(trace: list[dict], cfg: Config, on_gpu: bool) -> tuple[float, dict[str, float]]:
    """(the step's microseconds, microseconds of each part) from a trace."""
    events = host_events(trace)
    steps = [e for e in events if e.name == STEP]
    if not steps:
        raise UserError("the profiler recorded nothing: this torch was built without it")
    step = steps[-1]
    parts = dict.fromkeys(PARTS, 0.0)
    inside = [e for e in events if step in e.chain()]
    if on_gpu:
        ran = [k for k in kernels(trace, events, cfg) if step.start <= k[0] < step.end]
        if not ran:
            raise UserError("the profiler saw no GPU kernels (CUPTI is missing or in use by another program)")
        for start, end, part in ran:
            if part != COMMUNICATION:
                parts[part] += end - start
        free = [(step.start, step.end)]
        _, free = take(free, [k[:2] for k in ran if k[2] != COMMUNICATION])
        # only what no computation hides; and of the idle rest, what the host spent waiting for data
        parts[COMMUNICATION], free = take(free, [k[:2] for k in ran if k[2] == COMMUNICATION])
        waits, free = take(free, sorted((e.start, e.end) for e in inside if e.name == SCOPE + DATA))
        parts[DATA] += waits
        parts[GAPS] += sum(b - a for a, b in free)
    else:
        for event in inside:
            parts[part_of(event, cfg)] += event.own
        # Outside all operations, while gloo's threads exchange gradients, the training thread waits for them.
        free = [(step.start, step.end)]
        _, free = take(free, [(e.start, e.end) for e in inside if e.parent is step])
        waits, _ = take(free, sorted((e.start, e.end) for e in events if e.name.startswith("gloo:")))
        parts[COMMUNICATION], parts[GAPS] = parts[COMMUNICATION] + waits, parts[GAPS] - waits
    return step.end - step.start, parts


# ---- floors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """The least a part must do in one step of one process, and the time that takes at this machine's measured rates."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


def bytes_per_s(working_set: float, ceilings: dict) -> float:
    """The fastest that memory of this size was read or changed here; no slower than a copy, which old results have alone.
    Between two measured sizes the smaller one counts, which is the faster: a floor must not be too high.
    """
    rates = ceilings.get("memory_bytes_per_s", [])
    fits = max((size for size, _ in rates if size <= working_set), default=0)
    return max([rate for size, rate in rates if size >= fits] + [ceilings["copy_bytes_per_s"]])


def floors(cfg: Config, ceilings: dict, processes: int = 1) -> dict[str, Floor]:
    """The floor of each part for one step of one of `processes` equal processes.

    Bytes assume that every operation between two matmuls is fused with its neighbours. What one operation hands to the next
    may still lie in a cache, if it fits into one: those bytes count at the rate of memory of that size.
    """
    micro_batch, accumulation = cfg.split_step(processes)
    L, C, T = cfg.n_layer, cfg.n_embd, cfg.T
    n = micro_batch * T  # tokens in one forward pass
    N = n * accumulation  # tokens in the step
    e = 4 if cfg.dtype == "float32" else 2  # bytes of a number that a matmul reads or writes; the residual stream has 4
    sharing = processes if cfg.device == "cpu" else 1  # of the cores and the memory; each process has a GPU of its own
    # where the rate in this precision was not measured, as in float32
    rate = gemm_rate(cfg.dtype, cfg.fp32_precision, ceilings) or ceilings["gemm_float32_flops"]
    rate /= sharing
    with torch.device("meta"):
        P = sum(p.numel() for p in GPT(cfg).parameters())  # with the padding rows: they are updated as well
    matrices = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * L + [(C, cfg.padded_vocab_size)]
    weights = sum(i * o for i, o in matrices)

    def floor(flops: float, *moved: tuple[float, float]) -> Floor:
        """moved: (bytes, size of the memory in which they lie), …"""
        seconds = sharing * sum(count / bytes_per_s(size, ceilings) for count, size in moved)
        return Floor(flops, sum(count for count, _ in moved), max(flops / rate, seconds))

    attention_flops = 12 * L * C * T * N  # as flops_per_token counts: q kᵀ and weights·v, forward once and backward twice
    # Between two matmuls, per token and channel of a layer. Add a branch to the stream and normalise: read 4 + e, write
    # 4 + e; backward: read the gradients of the norm's output (e) and of the stream (4), and the stream (4), write the
    # stream's gradient (4) and the branch's (e). Twice in a layer. GELU on 4C: read and write; backward: read two, write one.
    layer = 2 * ((8 + 2 * e) + (12 + 2 * e)) + 4 * (2 * e + 3 * e)
    # Behind the last layer one more norm; before the first the embedding: read and write a row, backward add to a row.
    ends = (8 + 2 * e) + (12 + 2 * e) + (4 + 4) + (4 + 8)
    # That gradient is dense: filled with zeros, then, if the matrix is the head's as well, added to its (read two, write one).
    dense = 4 * (4 if cfg.tie_weights else 1) * cfg.padded_vocab_size * C * accumulation
    # The weights down to 16 bits, their gradients up again. The 16 bits of a matrix go from one operation to the next.
    casts = weights * accumulation if e == 2 else 0
    vocabulary, largest = cfg.padded_vocab_size * C, max(i * o for i, o in matrices)
    return dict.fromkeys(PARTS, Floor()) | {
        # Forward, gradient of the input, gradient of the weight: each reads two of the three matrices and writes the third.
        GEMM: floor(
            N * cfg.flops_per_token(T) - attention_flops,
            (accumulation * 3 * e * sum(n * i + i * o + n * o for i, o in matrices), e * n * C),
        ),
        # The mask leaves T (T + 1) / 2 of the T² scores. Read q, k, v, write o; backward read those and do, write dq, dk, dv.
        ATTENTION: floor(attention_flops * (T + 1) / (2 * T), (12 * e * L * C * N, e * n * C)),
        CROSS_ENTROPY: floor(0, (2 * e * N * cfg.vocab_size, e * n * cfg.vocab_size)),  # read each, write its gradient
        ELEMENTWISE: floor(
            0,
            (N * C * (L * layer + ends), e * n * C),
            (dense, 4 * vocabulary),
            (2 * 4 * casts, 4 * weights),
            (2 * e * casts, e * largest),
        ),
        # AdamW in float32: read p, g, m, v, write p, m, v (28); the gradients' norm reads g (4); each further micro-batch
        # adds its gradients to the sum: read both, write one (12).
        OPTIMIZER: floor(0, (P * (28 + 4 + 12 * (accumulation - 1)), 16 * P)),
        # A ring all-reduce sends and receives 2 (k - 1) / k of the gradients; no link is faster than memory.
        COMMUNICATION: floor(0, (2 * (processes - 1) / processes * 4 * P, 4 * P)),
    }


def raised(ceilings: dict, cfg: Config, optimizer_ms: float, processes: int) -> dict:
    """The ceilings, with a rate of memory that is no lower than what the optimizer reached in this very step: its state fits no
    cache, and the ceilings may have been measured while the machine was busier.
    """
    moved = floors(cfg, ceilings, processes)[OPTIMIZER].bytes * (processes if cfg.device == "cpu" else 1)
    seen = [[moved, 1e3 * moved / optimizer_ms]] if optimizer_ms else []
    return ceilings | {"memory_bytes_per_s": ceilings.get("memory_bytes_per_s", []) + seen}


# ---- what to try next ---------------------------------------------------------------------------------------------------


# The parts that a setting of the ladder makes faster, and how.
FASTER = {
    "dtype": ((GEMM, ATTENTION, CROSS_ENTROPY), "matmuls at the rate of 16 bits, logits of half the bytes"),
    "fp32_precision": ((GEMM,), "the same tensors, multiplied at the rate of fewer bits"),
    "compile": ((ELEMENTWISE, CROSS_ENTROPY), "norms, elementwise operations and loss in fewer passes"),
    "attention": ((ATTENTION,), "the T x T scores stay in cache, or half of them is left out"),
    "vocab_multiple": ((GEMM,), "the head's matmuls at an even width"),
    "fused_adamw": ((OPTIMIZER,), "one pass over parameters, gradients and moments"),
    "prefetch": ((DATA,), "the data wait disappears behind the computation"),
}


def advise(run: Run, ms: dict[str, float], ceilings: dict, kernel_ms: float) -> list[dict]:
    """The ladder's settings that are off and available here, the most milliseconds that each can save, the largest first: what
    its parts take now above their floors with it. These bounds overlap: they do not add up. kernel_ms: how long the operating
    system's kernel worked for the process in a step.
    """
    found = []
    for rung in load_ladder()[1:]:
        ((setting, (off, value)),) = rung.changes.items()
        new = replace(run.cfg, **{setting: value})
        if getattr(run.cfg, setting) != off or unavailable(new, run.device):
            continue
        if (setting == "fp32_precision" and new.dtype != "float32") or (value == "blocked" and run.device.type != "cpu"):
            continue  # no float32 matmul is left for it to act on; a flash kernel leaves out as much
        if setting == "reuse_memory":
            saves = kernel_ms / torch.get_num_threads()  # pages are faulted in by the thread that touches them
            why = f"the kernel works {kernel_ms:,.0f} ms a step for this process, nearly all of it faulting pages in and out"
        elif setting in FASTER:
            parts, why = FASTER[setting]
            least = floors(new, ceilings, run.world.size)
            saves = sum(max(0.0, ms[p] - 1e3 * least[p].seconds) for p in parts)
        else:
            continue
        found.append({"setting": f"{setting}={value}", "saves_ms": saves, "why": why})
    return sorted(found, key=lambda a: -a["saves_ms"])


# ---- one profiled step --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def named_scopes(run: Run):
    """Name, for the profiler, what train_step calls but torch does not name: data, clipping, sums over processes."""
    places = [
        (run, "next_batch", DATA),
        (optim, "gradient_norm", OPTIMIZER),
        (optim, "clip", OPTIMIZER),
        (parallel, "all_reduce_sum", COMMUNICATION),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, part), function in zip(places, before, strict=True):
        setattr(owner, name, record_function(SCOPE + part)(function))
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def profile_step(run: Run, trace: Path, warmup: int, timed: int) -> tuple[float, float]:
    """`warmup` steps, `timed` ordinary ones, and one under the profiler, whose trace is written: (milliseconds of an ordinary
    step, their median, and of the operating system's kernel in one).
    """
    on_gpu, done = run.device.type == "cuda", itertools.count()

    def one_step() -> float:
        began = time.perf_counter()
        train.train_step(run, next(done))
        machine.synchronize(run.device)
        return time.perf_counter() - began

    for _ in range(warmup):
        one_step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    step_ms = 1e3 * statistics.median(one_step() for _ in range(timed))
    kernel_ms = 1e3 * (resource.getrusage(resource.RUSAGE_SELF).ru_stime - before) / timed
    trace.parent.mkdir(parents=True, exist_ok=True)
    with (
        named_scopes(run),
        profile(  # the first profiled step pays for starting the profiler: it is thrown away
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(trace)),
            record_shapes=True,
        ) as profiler,
    ):
        for _ in range(2):
            with record_function(STEP):
                one_step()
            profiler.step()
    return step_ms, kernel_ms


def why(cfg: Config, ceilings: dict, trace_path: Path, warmup: int = 3, timed: int = 5) -> dict:
    """Profile one step of cfg after `warmup` and `timed` ordinary ones; write its trace; the table and advice as JSON values.

    ceilings: timing.ceilings(cfg). Times in milliseconds; those of the parts are the profiled step's, scaled to the median
    of the ordinary ones. In a run of several processes each accounts for its own step, and the first one writes the trace.
    """
    # Compiled C++ kernels appear in a profile by their names only if they were generated for it; it costs nothing otherwise
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        run = build(cfg)
        if run.device.type == "mps":
            raise UserError("torch's profiler does not record mps: use --device=cpu")
        path = trace_path if run.world.is_main else Path(f"{trace_path}.rank{run.world.rank}")
        step_ms, kernel_ms = profile_step(run, path, warmup, timed)
    if wrong := mismatches(run, effective(run)):
        raise UserError("; ".join(wrong))  # the table would be of something else than what was asked for
    trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    total_us, parts_us = attribute(trace, run.cfg, run.device.type == "cuda")
    ms = {part: us / total_us * step_ms for part, us in parts_us.items()}
    ceilings = raised(ceilings, run.cfg, ms[OPTIMIZER], run.world.size)
    least = floors(run.cfg, ceilings, run.world.size)
    shares = [
        {"part": p, "ms": ms[p], "share": ms[p] / step_ms, "floor_ms": 1e3 * f.seconds, "flops": f.flops, "bytes": f.bytes}
        for p, f in least.items()
    ]
    result = {
        "step_ms": step_ms,
        "profiled_ms": total_us / 1e3,
        "floor_ms": sum(s["floor_ms"] for s in shares),
        "shares": shares,
        "advice": advise(run, ms, ceilings, kernel_ms),
        "kernel_ms": kernel_ms,
        "trace": str(path),
    }
    run.close()
    return result


def command(paths: list[str], asked: BenchConfig, device: torch.device) -> dict:
    """python bench.py why: a config as it is, or the top rung at the ladder's sizes."""
    if len(paths) > 1:
        raise UserError(f"{paths[1]!r} is one argument too many: run python bench.py why [config.py]")
    sizes = asked.by_device(device.type)
    if paths:
        name, cfg = paths[0], asked.of_file(configurator.load_file(paths[0]))
    else:
        top = top_rung(*climb(load_ladder(), sizes, device))
        name, cfg = top.name, top.cfg
    trace = results_dir(asked.out, device) / "traces" / f"why_{Path(name).stem}.json"
    rates = in_fresh_process(cfg, "ceilings")
    result = in_fresh_process(cfg, "why", ceilings=rates, trace=str(trace))
    if error := rates.get("error") or result.get("error"):
        raise UserError(f"{name}: {error}")
    print(f"wrote {trace} (open it in chrome://tracing or ui.perfetto.dev)")
    return header("why", sizes) | {"config": name, "requested": asdict(cfg), "ceilings": rates} | result
