"""Training on more GPUs than there are here, on paper: the generated tables of docs/many_gpus.md.

    python -m forecast.cluster                                   write the tables of docs/many_gpus.md again
    python -m forecast.cluster --check                           exit with 1 if they are not what this program computes
    python -m forecast.cluster --network_gb_s=25 --tree=False    print them for other assumptions

Arithmetic alone: one GPU's rate, link speeds and GPT-2's shapes in; step times, memory and failures out.
"""

import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from base import errors, settings
from base.errors import UserError
from base.files import ROOT, write_atomically
from configurator import Config, GPTConfig
from model import GPT2_SIZES
from report import render, results
from report.render import Table


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is assumed, each with its source, as --help prints them."""

    check: bool = False
    """only compare docs/many_gpus.md with what is computed"""
    tokens_per_step: int = Config.tokens_per_step
    """where a GPU got no equal share: the smallest multiple that gives it one"""
    sequence_length: int = 1024
    """T"""
    batch_size: int = Config.batch_size
    """the largest micro-batch; 16 sequences of 1,024 fit at every size"""
    target_tokens: float = 10e9
    """of the run whose hours are shown: the 10B of the public reproductions"""
    tokens_per_s: float = 0.0
    """of the 124M on one GPU; 0: the best of results/ on a GPU, or else the public figure"""
    memory_gb: float = 141.0
    """of one GPU: H200 data sheet"""
    memory_tb_s: float = 4.3
    """at which the optimizer streams: an H200 measured by others (data sheet 4.8)"""
    gpus_per_node: int = 8
    """joined by NVLink, each with a network card of its own: HGX H200"""
    nvlink_gb_s: float = 450.0
    """each way, per GPU: H200 data sheet, 900 both ways"""
    nvlink_achieved: float = 0.82
    """NCCL: 370 of 450, by its maintainer in nccl-tests issue 212"""
    network_gb_s: float = 50.0
    """each way, per GPU: InfiniBand NDR, 400 Gb/s"""
    network_achieved: float = 0.94
    """NCCL: 46 to 48 of 50, by its maintainer in nccl-tests issue 290"""
    tree: bool = True
    """between nodes an all-reduce takes a tree where that is faster than a ring, as NCCL does"""
    pipelined: bool = True
    """the slower of NVLink and network decides; False: one after the other"""
    bucket_mb: float = 25.0
    """MiB: DistributedDataParallel's default"""
    gpu_mtbf_hours: float = 50_677.0
    """Llama 3 paper: 419 interruptions in 54 days of 16,384 H100"""
    checkpoint_s: float = 30.0
    """training stands still: 1558M's 18.7 GB at 0.6 GB/s, a guess"""
    restart_s: float = 900.0
    """10 minutes until a stuck process is noticed, 5 to start, load and compile: a guess"""

    def __post_init__(self):
        settings.check_types(vars(self), Assumptions)
        settings.check_at_least(self, 0, "tokens_per_s")
        if wrong := [k for k, v in vars(self).items() if type(v) is not bool and k != "tokens_per_s" and v <= 0]:
            raise UserError(f"{wrong[0]}={getattr(self, wrong[0])} must be above 0")
        if self.gpus_per_node.bit_count() != 1:
            raise UserError(f"gpus_per_node={self.gpus_per_node} must be a power of two, as the numbers of GPUs are")


NAMES = {"gpt2": "124M", "gpt2-medium": "350M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
DOCUMENT = "docs/many_gpus.md"
GPUS, ENGINES = (1, 8, 64, 1024), ("ddp", "zero1", "fsdp")
H200, H100 = 498e3, 466e3  # tokens/s of the 124M at T=1024 on one of them: the best public figures
FP32 = 4  # bytes; a parameter has four such numbers: weight, gradient, two moments
LOGITS_BYTES = 12  # per logit at the worst moment: three fp32 numbers, eager, measured (compiled 2, on a CPU)
BACKWARD_SHARE = 2 / 3  # of a micro-step, two of three matmuls: the time in which gradients travel
# seconds a step of a ring within a node and between nodes, a level of a tree: NCCL's cost model (src/graph/tuning.cc, LL128)
NVLINK_HOP, NETWORK_HOP, TREE_HOP = 1.9e-6, 4.0e-6, 8.5e-6


def shape(size: str, T: int = 1024) -> GPTConfig:
    return GPTConfig(vocab_multiple=128, block_size=T, **GPT2_SIZES[size])


# ---- memory -----------------------------------------------------------------------------------------------------------


def parameters(cfg: GPTConfig) -> tuple[int, int]:
    """(of all blocks, of the rest: embeddings, tied to the head, and the last norm), with biases."""
    C = cfg.n_embd
    return cfg.n_layer * (12 * C**2 + 13 * C), (cfg.padded_vocab_size + cfg.block_size + 2) * C


def activation_bytes(cfg: GPTConfig, T: int) -> int:
    """What forward keeps of a sequence for backward, without logits: eager, bf16 autocast, flash attention, no dropout.

    tests/forecast/test_cluster.py compares it with a step on tensors without contents.
    """
    L, C, H = cfg.n_layer, cfg.n_embd, cfg.n_head
    norm = 4 * C + 8 + 2 * C  # the residual stream it reads, fp32; its mean and 1/σ; what it hands to a matmul, bf16
    attention = 6 * C + 2 * C + 4 * H  # q, k and v; their output; of the T × T scores the log-sum-exp alone, fp32
    mlp = 8 * C + 8 * C  # before and behind GELU, bf16, 4C wide
    return T * (L * (2 * norm + attention + mlp) + norm)


def state_bytes(cfg: GPTConfig, engine: str, n: int) -> float:
    """Weights, gradients and moments on one of n GPUs, and the bf16 weights that autocast keeps for backward."""
    (blocks, rest), matrix = parameters(cfg), cfg.padded_vocab_size * cfg.n_embd
    P, casts = blocks + rest, 2 * (12 * cfg.n_layer * cfg.n_embd**2 + matrix)
    if n == 1 or engine == "ddp":
        return casts + FP32 * 4 * P
    if engine == "zero1":  # deals out whole parameters: the largest share is never smaller than the embedding
        return casts + FP32 * (2 * P + 2 * max(P / n, matrix))
    block = blocks / cfg.n_layer  # whole are the rest and two blocks (one arrives), gradients of the rest and of a block
    return casts + FP32 * (4 * P / n + 2 * rest + 3 * block)


# ---- time -------------------------------------------------------------------------------------------------------------


def ring(n: int, nbytes: float, rate: float, hop: float, passes: int) -> tuple[float, float]:
    """Seconds of (transfer, latency) round a ring of n: n - 1 steps a pass, each of 1/n of the bytes."""
    return passes * (n - 1) * nbytes / n / rate, passes * (n - 1) * hop


def collective(a: Assumptions, n: int, nbytes: float, passes: int, calls: int = 1) -> float:
    """Seconds of `calls` collectives with nbytes altogether: an all-reduce is 2 passes, its halves (reduce-scatter,
    all-gather) are 1. A node's GPUs exchange over NVLink; of what leaves the node each carries its share.
    """
    local = min(n, a.gpus_per_node)
    nodes, network = n // local, 1e9 * a.network_gb_s * a.network_achieved
    inside, latency = ring(local, nbytes, 1e9 * a.nvlink_gb_s * a.nvlink_achieved, NVLINK_HOP, passes)
    ways = [ring(nodes, nbytes / local, network, NETWORK_HOP, passes)]
    if a.tree and passes == 2 and nodes > 1:  # everything once up and once down
        ways.append((2 * nbytes / local / network, 2 * math.ceil(math.log2(nodes)) * TREE_HOP))
    join = max if a.pipelined else sum
    return min(join((inside, across)) + calls * (latency + more) for across, more in ways)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one of n GPUs, in seconds and bytes."""

    tokens: int  # of all GPUs
    micro_batch: int
    accumulation: int
    compute: float
    optimizer: float
    communication: float
    exposed: float  # what of it computing does not hide
    memory: float

    def seconds(self) -> tuple[float, float, float]:
        """(expected, if everything overlaps, if nothing does)."""
        busy = (self.compute + self.exposed, max(self.compute, self.communication), self.compute + self.communication)
        return tuple(t + self.optimizer for t in busy)


def step(a: Assumptions, size: str, engine: str, n: int, flops: float) -> Step:
    """flops: what one GPU does per second in training."""
    T, cfg = a.sequence_length, shape(size, a.sequence_length)
    (blocks, rest), matrix = parameters(cfg), cfg.padded_vocab_size * cfg.n_embd
    P = blocks + rest
    tokens = a.tokens_per_step * (n // math.gcd(n, a.tokens_per_step // T))
    micro_batch, accumulation = Config(block_size=T, tokens_per_step=tokens, batch_size=a.batch_size).split_step(n)
    compute = tokens / n * cfg.flops_per_token(T) / flops
    updated = {"ddp": P, "zero1": max(P / n, matrix) if n > 1 else P, "fsdp": P / n}[engine]  # see state_bytes()
    # AdamW reads 16 and writes 12 bytes of a parameter, the gradient's norm reads 4
    optimizer = (28 * updated + 4 * (P / n if engine == "fsdp" else P)) / (1e12 * a.memory_tb_s)
    tail = collective(a, n, FP32, 2)  # the loss: has nothing to hide behind, as all of the tail
    if engine == "fsdp":  # every micro-step gathers all twice and scatters the sums of the gradients
        ends = 2 * collective(a, n, FP32 * rest, 1)  # the first gather and the last scatter
        hidden = 3 * accumulation * collective(a, n, FP32 * P, 1, cfg.n_layer + 1) - ends
        tail, window = tail + ends, compute
    else:  # in the last micro-step's backward; the tied embedding's gradient is whole only when that is over
        hidden = collective(a, n, FP32 * blocks, 2, math.ceil(FP32 * blocks / (a.bucket_mb * 2**20)))
        tail, window = tail + collective(a, n, FP32 * rest, 2), BACKWARD_SHARE * compute / accumulation
    if engine == "zero1":  # each broadcasts what it updated, tensor by tensor (torch's ZeroRedundancyOptimizer)
        tail += collective(a, n, FP32 * P, 1, 12 * cfg.n_layer + 4)
    memory = state_bytes(cfg, engine, n) + micro_batch * (activation_bytes(cfg, T) + T * LOGITS_BYTES * cfg.vocab_size)
    exposed = tail + max(0.0, hidden - window)
    return Step(tokens, micro_batch, accumulation, compute, optimizer, hidden + tail, exposed, memory)


def one_gpu(a: Assumptions, root: Path) -> tuple[float, str]:
    """(operations per second of one GPU in training, where that is from)."""
    per_token, found = shape("gpt2").flops_per_token(1024), []
    if a.tokens_per_s:
        return a.tokens_per_s * per_token, f"from --tokens_per_s={a.tokens_per_s:,.0f}, not measured here"
    for result in map(results.load, sorted((root / "results").glob("*/ladder.json"))):
        for e in results.measured(result) if result["machine"]["device"] == "cuda" else []:
            rate = results.tokens_per_s(result, e) / results.devices(e)
            where = f"measured: {e['name']}, {rate:,.0f} tokens/s, {results.machine_line(result)}"
            found.append((rate * results.flops_per_token(e["requested"]), where))
    public = f"from a public figure, not measured here: {H200:,.0f} tokens/s of the 124M on one H200"
    return max(found, default=(H200 * per_token, public))


def failures(save: float, mtbf: float, restart: float) -> tuple[float, ...]:
    """(best seconds between checkpoints, shares of the time lost to saving, to doing work again, to restarting).

    Young 1974, Daly 2006, first order: sqrt(2 · save · MTBF), where that is much less than the MTBF.
    """
    interval = math.sqrt(2 * save * mtbf)
    return interval, save / interval, interval / 2 / mtbf, restart / mtbf


# ---- the generated blocks ---------------------------------------------------------------------------------------------


def steps_table(a: Assumptions, flops: float) -> Table:
    rows = []
    for size, n, engine in [(size, n, e) for size in NAMES for n in GPUS for e in ENGINES if n > 1 or e == "ddp"]:
        s, one = step(a, size, engine, n, flops), step(a, size, "ddp", 1, flops)
        expected, least, most = s.seconds()
        share = [f"{s.tokens / t / n * one.seconds()[0] / one.tokens:.0%}" for t in (expected, most, least)]
        parts = [results.ms(t) if t else "–" for t in (s.compute, s.optimizer, s.communication, s.exposed)]
        tokens = f"{s.tokens:,}" + (" ‡" if s.tokens != a.tokens_per_step else "")
        row = [NAMES[size], f"{n:,}", engine if n > 1 else "any", tokens, f"{s.micro_batch} × {s.accumulation}", *parts]
        row += [f"{results.ms(expected)} [{results.ms(least)}, {results.ms(most)}]", f"{s.tokens / expected:,.0f}"]
        rows.append([*row, f"{share[0]} [{share[1]}, {share[2]}]", f"{a.target_tokens / s.tokens * expected / 3600:.2g}"])
    head = "model|GPUs|parallel|tokens/step|B × micro-steps|compute, ms †|optimizer, ms|communication, ms|exposed, ms †"
    head += f"|step, ms [bounds] †|tokens/s †|efficiency [bounds] †|hours for {a.target_tokens / 1e9:g}B tokens †"
    return Table(head.split("|"), rows, left=(0, 2))


def memory_table(a: Assumptions, flops: float) -> Table:
    def gb(size: float, digits: int = 2) -> str:
        return f"{size / 1e9:.{digits}f}"

    rows, T = [], a.sequence_length
    for cfg, size, n in [(shape(size, T), size, n) for size in NAMES for n in GPUS]:
        steps = [step(a, size, engine, n, flops) for engine in ENGINES]
        B = steps[0].micro_batch
        state = [gb(state_bytes(cfg, engine, n)) for engine in ENGINES]
        kept = [str(B), gb(B * activation_bytes(cfg, T)), gb(B * T * LOGITS_BYTES * cfg.vocab_size)]
        whole = [gb(s.memory, 1) + " TOO MUCH" * (s.memory > 1e9 * a.memory_gb) for s in steps]
        rows.append([NAMES[size], f"{n:,}", *state, *kept, *whole])
    state, whole = ([f"{what}, {engine}" for engine in ENGINES] for what in ("state", "all"))
    return Table(["GB per GPU", "GPUs", *state, "B", "activations", "logits", *whole], rows)


def checks_table(a: Assumptions) -> Table:
    """Public figures beside what this program says of the same. H100 nodes have the H200's links."""
    per_token = [shape(size).flops_per_token(1024) for size in NAMES]

    def ms(size: str, n: int, tokens: int, bound: int, **changes) -> float:
        known = replace(a, tokens_per_step=tokens, sequence_length=1024, **changes)
        return 1e3 * step(known, size, "ddp", n, H100 * per_token[0]).seconds()[bound]

    def bus(seconds: float) -> float:  # GB/s, as nccl-tests counts them
        return 2 * 1983 / 1984 * 2**29 / seconds / 1e9

    def all_reduce(changed: Assumptions) -> float:
        return bus(collective(changed, 1984, 2**29, 2))

    flat = sum(ring(1984, 2**29, 1e9 * a.network_gb_s * a.network_achieved, NETWORK_HOP, 2))
    apart = "tokens, nothing overlapping: ms per step (3)"
    by_operations = "8 A100: ms per step, from the 124M's 300 by operations (2)"
    found = [
        ("124M, 8 H100, 524,288 tokens: ms per step (1)", 140, ms("gpt2", 8, 2**19, 0)),
        ("1558M, 8 H100, 1,048,576 tokens: ms per step (2)", 2800, ms("gpt2-xl", 8, 2**20, 0)),
        (f"350M, {by_operations}", 820, 300 * per_token[1] / per_token[0]),
        (f"774M, {by_operations}", 1700, 300 * per_token[2] / per_token[0]),
        (f"124M, 16 H100, 786,432 {apart}", 115, ms("gpt2", 16, 786_432, 2, bucket_mb=512)),
        (f"124M, 64 H100, 786,432 {apart}", 30, ms("gpt2", 64, 786_432, 2, bucket_mb=512)),
        ("all-reduce of 512 MiB, 1,984 H200: GB/s of bus bandwidth (4)", 350, all_reduce(a)),
        ("the same with rings by node, one link after the other (4)", 350, all_reduce(replace(a, pipelined=False, tree=False))),
        ("the same with one flat ring through all GPUs (4)", 350, bus(flat)),
        ("all-reduce of 1 KiB, 16 H20: µs (5)", 46, 1e6 * collective(a, 16, 2**10, 2)),
    ]
    rows = [[what, f"{public:,}", f"{here:,.1f}", f"{100 * here / public - 100:+.1f}%"] for what, public, here in found]
    return Table(["", "public", "this program", "difference"], rows)


def failures_table(a: Assumptions, flops: float) -> Table:
    rows = []
    for n in GPUS[1:]:
        mtbf, s = 3600 * a.gpu_mtbf_hours / n, step(a, "gpt2-xl", "ddp", n, flops)
        interval, *lost = failures(a.checkpoint_s, mtbf, a.restart_s)
        run = a.target_tokens / s.tokens * s.seconds()[0]
        row = [f"{n:,}", f"{86400 / mtbf:.2g}", f"{mtbf / 3600:,.0f}", f"{interval / 60:,.0f}"]
        rows.append([*row, *(f"{x:.2%}" for x in (*lost, sum(lost))), f"{run / 3600:.2g}", f"{run / mtbf:.1g}"])
    head = "GPUs|failures per day|hours between two|minutes between checkpoints|lost to saving|to doing again|to restarting"
    head += f"|in all|hours for {a.target_tokens / 1e9:g}B tokens of 1558M, ddp †|failures expected in them †"
    return Table(head.split("|"), rows)


def blocks(a: Assumptions, root: Path) -> dict[str, list[render.Block]]:
    """{name of a generated block: what is in it}."""
    flops, source = one_gpu(a, root)
    origin = f"† {source}; by operations {flops / 1e12:.0f} TFLOP/s."
    shares = f"‡ {a.tokens_per_step // a.sequence_length:,} sequences give these GPUs no equal shares. "
    shares += "Their larger step is another training run."
    return {
        "steps": [steps_table(a, flops), origin, shares],
        "memory": [memory_table(a, flops)],
        "checks": [checks_table(a)],
        "failures": [failures_table(a, flops), origin],
    }


def generated(text: str, found: dict[str, list[render.Block]]) -> str:
    """The text with each part between `<!-- cluster NAME -->` and `<!-- end -->` written again."""
    for name, parts in found.items():
        fresh = f"<!-- cluster {name} -->\n{render.markdown(parts)}\n<!-- end -->"
        pattern = rf"<!-- cluster {name} -->\n((?!<!-- cluster).)*?<!-- end -->"  # never over the next one's begin
        text, times = re.subn(pattern, lambda _, new=fresh: new, text, flags=re.DOTALL)
        if times != 1:
            raise UserError(f"{DOCUMENT} must have <!-- cluster {name} --> … <!-- end --> once, it has it {times} times")
    return text


def main(argv: list[str], root: Path = ROOT) -> None:
    a, path = settings.parse(Assumptions(), argv, __doc__), root / DOCUMENT
    found = blocks(a, root)
    if not a.check and a != Assumptions():
        print("\n\n".join(f"== {name}\n\n{render.text(parts)}" for name, parts in found.items()))
        return
    text = path.read_text(encoding="utf-8")
    fresh = generated(text, found)
    if a.check and fresh != text:
        print(f"error: {DOCUMENT} is not what forecast.cluster computes: run python -m forecast.cluster", file=sys.stderr)
        sys.exit(1)
    if fresh != text:
        write_atomically(path, fresh.encode())
        print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    errors.entry(main)
