"""Raw measurements (results/<hardware>/*.json) -> numbers and tables, for a terminal, for Markdown and for page.py's HTML.

A kind of result is one function here: result -> a list of blocks, each a Table, a paragraph (str) or a Quote. Every number that
is printed is computed here, from raw step times and losses. Never imports torch.
"""

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """A table; the first column is text and stands left, the others stand right unless they are named in `left`."""

    head: list[str]
    rows: list[list[str]]
    left: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Quote:
    """Text that is shown as it is, line by line."""

    text: str


Block = Table | str | Quote


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- numbers ----------------------------------------------------------------------------------------------------------


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), linear between neighbours."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def per_round(entry: dict) -> list[float]:
    """Median step time of each round, in seconds."""
    return [statistics.median(times) for times in entry["step_s"]]


def ratio(slow: dict, fast: dict) -> tuple[float, float, float]:
    """(median, least, most) of slow / fast over the rounds, in which the two ran side by side."""
    ratios = [a / b for a, b in zip(per_round(slow), per_round(fast), strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)


def all_steps(entry: dict) -> list[float]:
    return [t for times in entry["step_s"] for t in times]


def tokens_per_s(result: dict, entry: dict) -> float:
    """From the median of all steps of all rounds."""
    return result["sizes"]["tokens_per_step"] / statistics.median(all_steps(entry))


def loss_differences(entry: dict, base: dict) -> list[float]:
    """Loss minus the first row's, step by step, of the steps that both took."""
    return [a - b for a, b in zip(entry["losses"], base["losses"], strict=False)]


def flops_per_token(cfg: dict) -> float:
    """PaLM's count for a resolved config, as model.GPTConfig.flops_per_token (a test compares the two)."""
    rows = math.ceil(cfg["vocab_size"] / cfg["vocab_multiple"]) * cfg["vocab_multiple"]
    T = cfg["sequence_length"] or cfg["block_size"]
    return 6 * (12 * cfg["n_layer"] * cfg["n_embd"] ** 2 + rows * cfg["n_embd"]) + 12 * cfg["n_layer"] * cfg["n_embd"] * T


def law_loss(law: dict, N, D):
    """L(N, D) = E + A/N^α + B/D^β: the form of Hoffmann et al. 2022, of numbers or arrays."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


# Student's t, two-sided 95%, by degrees of freedom (any statistics table); beyond 30 the normal's 1.96 is near enough.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def student(freedom: float) -> float:
    """The table's value; degrees of freedom are rounded down, which errs towards the wider interval."""
    return T_95[max(1, int(freedom)) - 1] if freedom < 31 else 1.96


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the 95% confidence interval of the mean; infinitely wide for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(mean b - mean a, low, high): Welch's 95% confidence interval, which lets the two spread differently."""
    middle = statistics.fmean(b) - statistics.fmean(a)
    if min(len(a), len(b)) < 2:
        return middle, -math.inf, math.inf
    errors = [statistics.variance(v) / len(v) for v in (a, b)]
    if not sum(errors):
        return middle, middle, middle
    freedom = sum(errors) ** 2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, (a, b), strict=True))
    half = student(freedom) * math.sqrt(sum(errors))
    return middle, middle - half, middle + half


def ms(seconds: float) -> str:
    """Three digits at least: a GPU's step is short."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def ms_iqr(entry: dict) -> str:
    low, middle, high = quartiles(all_steps(entry))
    return f"{ms(middle)} [{ms(low)}, {ms(high)}]"


# ---- the kinds --------------------------------------------------------------------------------------------------------


def machine_line(result: dict) -> str:
    """Where and when something was measured."""
    m = result["machine"]
    commit = f"{m['commit']}{' + changes' if m['dirty'] else ''}" if m["commit"] else "no commit"
    return f"{m['hardware']}, torch {m['torch']}, {result['date'][:10]}, commit {commit}"


def label(entry: dict, kind: str) -> str:
    """What a row changes: "compile False → True"."""
    change = ", ".join(f"{k} {a} → {b}" for k, (a, b) in entry["changes"].items())
    return change or ("fp32, plain" if kind == "ladder" else "top rung")


def measured(result: dict) -> list[dict]:
    """The rows that were not skipped."""
    return [e for e in result["rungs"] if "skipped" not in e]


def before(result: dict, entry: dict) -> dict:
    """The row that a row is compared with: the one it changes, or if that was skipped, the one below it, and so on."""
    by_name = {e["name"]: e for e in result["rungs"]}
    versus = by_name[entry["versus"]]
    while "skipped" in versus:
        if versus["versus"] == versus["name"]:  # even the first rung failed
            return measured(result)[0]
        versus = by_name[versus["versus"]]
    return versus


def gemm_rate(cfg: dict, ceilings: dict) -> float | None:
    """FLOP/s that a large matmul reached here in the precision that a config multiplies in; None if that was not measured."""
    how = "bfloat16" if cfg["dtype"] != "float32" else {"ieee": "float32"}.get(cfg["fp32_precision"], cfg["fp32_precision"])
    return ceilings.get(f"gemm_{how}_flops")


def devices(entry: dict) -> int:
    """How many devices, each with the measured ceilings, worked on a row: processes on a CPU share one."""
    on = entry["effective"]
    return on["processes"] if on["device"] == "cuda" else 1


# How far a rung may lie from the losses of the first row, in nats, over the compared steps from the same weights and data. By
# rounding alone: in float32 only sums run in another order; 16-bit matmuls are off by 2^-9 of each number, most of which the
# mean over a step's tokens averages out (measured 1.6e-3). Other training shows: another seed is 0.1 away.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}


def loss_cell(entry: dict, base: dict) -> str:
    """The largest difference of a row's losses from the first row's, marked if it is more than rounding."""
    found = max(map(abs, loss_differences(entry, base)))
    allowed = max(LOSS_TOLERANCE[e["requested"]["dtype"]] for e in (entry, base))
    return f"{found:.1e}" + ("" if found <= allowed else " TOO FAR")


def steps_table(result: dict) -> list[Block]:
    """A ladder or an ablation; what was skipped stands below the table with its reason."""
    ceilings, sizes, is_ladder = result["ceilings"], result["sizes"], result["kind"] == "ladder"
    base, peak = next(iter(measured(result)), None), ceilings["peak_flops"]
    rows, notes = [], []
    for entry in result["rungs"]:
        name = label(entry, result["kind"])
        if "skipped" in entry:
            rows.append([name, "skipped", *["–"] * 8])
            notes.append(f"{name}: skipped, {entry['skipped'].rstrip('.')}.")
            continue
        gain, least, most = ratio(before(result, entry), entry) if is_ladder else ratio(entry, before(result, entry))
        flops = tokens_per_s(result, entry) * flops_per_token(entry["requested"])
        flops /= devices(entry)
        gemm = gemm_rate(entry["requested"], ceilings)
        first = entry is base
        rows.append(
            [
                name,
                ms_iqr(entry),
                f"{tokens_per_s(result, entry):,.0f}",
                "–" if first else f"{gain:.2f}× [{least:.2f}, {most:.2f}]",
                f"{ratio(base, entry)[0]:.2f}×",
                "–" if first else f"{1 - 1 / gain:.0%}" if is_ladder else f"{gain - 1:+.0%}",
                f"{entry['memory_gib']:.1f}",
                f"{flops / peak:.1%}" if peak else "n/a",
                f"{flops / gemm:.0%}" if gemm else "n/a",
                "–" if first else loss_cell(entry, base),
            ]
        )
    if is_ladder:
        head = ["one setting more", "ms/step [IQR]", "tok/s", "× previous [min, max]", "× first", "time saved"]
    else:
        back = "one setting back" if result["kind"] == "ablate" else "one setting instead"
        head = [back, "ms/step [IQR]", "tok/s", "× slower [min, max]", "× top", "time added"]
    steps = len(base["losses"]) if base else 0
    notes.append(
        f"{machine_line(result)}. B={sizes['batch_size']}, T={sizes['sequence_length']}, {sizes['tokens_per_step']} tokens per "
        f"step; {sizes['rounds']} interleaved round(s); |Δ loss| against the first row over {steps} steps, "
        f"allowed {LOSS_TOLERANCE['float32']:g} in float32 and {LOSS_TOLERANCE['bfloat16']:g} in 16 bits. "
        f"MFU: share of the data-sheet bf16 peak (n/a: not known). Of GEMM: share of what a large matmul in that precision "
        f"reached here: fp32 {ceilings['gemm_float32_flops'] / 1e12:.3g}, bf16 {ceilings['gemm_bfloat16_flops'] / 1e12:.3g} "
        f"TFLOP/s; a copy: {ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s."
    )
    return [Table([*head, "GiB", "MFU", "of GEMM", "max |Δ loss|"], rows), *notes]


def rung_table(result: dict, words: list[str]) -> list[Block]:
    """One rung of a ladder beside the one before it, for its page. words: its name."""
    (name,) = words
    found = [e for e in result["rungs"] if e["name"] == name]
    if not found:
        raise ValueError(f"there is no rung {name} in it, only {', '.join(e['name'] for e in result['rungs'])}")
    entry = found[0]
    if "skipped" in entry:
        return [f"Not to be had here: {entry['skipped'].rstrip('.')}. {machine_line(result)}."]
    base = measured(result)[0]
    versus = before(result, entry)
    both = [entry] if entry is base else [versus, entry]
    rows = [
        ["ms/step [IQR]", *map(ms_iqr, both)],
        ["tok/s", *(f"{tokens_per_s(result, e):,.0f}" for e in both)],
        ["peak memory, GiB", *(f"{e['memory_gib']:.1f}" for e in both)],
        ["first step, s", *(f"{statistics.median(e['first_step_s']):.1f}" for e in both)],
    ]
    if entry is base:
        return [Table(["measured here", name], rows), f"{machine_line(result)}."]
    saved = statistics.median(all_steps(versus)) - statistics.median(all_steps(entry))
    gain, least, most = ratio(versus, entry)
    worst = max(map(abs, loss_differences(entry, base)))
    change = f"{1e3 * abs(saved):,.0f} ms {'less' if saved > 0 else 'more'} per step"
    return [
        Table(["measured here", versus["name"], name], rows),
        f"**{gain:.2f}×** as fast [{least:.2f}, {most:.2f}] as {versus['name']}: {change}. Largest difference of a loss from "
        f"rung 0's over {len(base['losses'])} steps: {worst:.1e}. {machine_line(result)}.",
    ]


def ab_table(result: dict) -> list[Block]:
    """Two configs: step time of each, and their ratio and loss difference with 95% confidence intervals over the seeds."""
    a, b = result["sides"]
    rows = []
    for side in (a, b):
        tokens = side["requested"]["tokens_per_step"] / statistics.median(all_steps(side))
        last = statistics.fmean(losses[-1] for losses in side["losses"])
        rows.append([side["config"], ms_iqr(side), f"{tokens:,.0f}", f"{last:.4f}"])
    logs = [math.log(x / y) for x, y in zip(per_round(a), per_round(b), strict=True)]
    speed = [math.exp(v) for v in interval(logs)]
    loss = interval([y[-1] - x[-1] for x, y in zip(a["losses"], b["losses"], strict=True)])
    faster = "not distinguishable" if speed[1] <= 1 <= speed[2] else "B is faster" if speed[1] > 1 else "A is faster"
    lower = "not distinguishable" if loss[1] <= 0 <= loss[2] else f"{'A' if loss[1] > 0 else 'B'}'s is lower"
    return [
        Table(["config", "ms/step [IQR]", "tok/s", f"loss at step {len(a['losses'][0])}"], rows),
        f"B is {speed[0]:.2f}× as fast as A, 95% CI [{speed[1]:.2f}, {speed[2]:.2f}], {len(logs)} pairs: {faster}. "
        f"Loss of B minus A {loss[0]:+.4f}, 95% CI [{loss[1]:+.4f}, {loss[2]:+.4f}]: {lower}. {machine_line(result)}.",
    ]


def sampling_table(result: dict) -> list[Block]:
    speeds = result["tokens_per_s"]
    rows = [[how, f"{statistics.median(v):.1f}", f"[{min(v):.1f}, {max(v):.1f}]"] for how, v in speeds.items()]
    gains = [c / u for c, u in zip(speeds["cached"], speeds["uncached"], strict=True)]
    same = "the same tokens" if result["same_tokens"] else "DIFFERENT TOKENS"
    layers = result["sizes"]["n_layer"]
    return [
        Table([f"{'124M' if layers == 12 else f'{layers} layers'}, one sequence, float32", "tok/s", "[min, max]"], rows),
        f"The cache is {statistics.median(gains):.1f}× as fast [{min(gains):.1f}, {max(gains):.1f}], with {same}: "
        f"{result['new_tokens']} tokens after {result['prompt_tokens']}. {machine_line(result)}.",
    ]


def decode_table(result: dict) -> list[Block]:
    """Tokens per second in each form, beside what reading the weights once for each token allows."""
    rows = []
    for way in result["ways"]:
        speeds, B, copies = way["tokens_per_s"], way["batch"], way["copy_bytes_per_s"]
        # the weights are read once for all sequences of a batch
        shares = [speed / B * way["bytes_per_token"] / copy for speed, copy in zip(speeds, copies, strict=True)]
        loss = result["validation"].get(way["form"])
        rows.append(
            [
                way["name"],
                f"{B}",
                f"{statistics.median(speeds):,.1f} [{min(speeds):,.1f}, {max(speeds):,.1f}]",
                f"{way['bytes_per_token'] / 1e6:,.0f}",
                f"{statistics.median(shares):.0%} [{min(shares):.0%}, {max(shares):.0%}]",
                *([f"{loss['loss']:.4f}", f"{loss['perplexity']:,.2f}"] if loss else []),
            ]
        )
    rates = [rate for way in result["ways"] for rate in way["copy_bytes_per_s"]]
    rounds = len(result["ways"][0]["tokens_per_s"])
    head = ["decoding", "sequences", "tok/s [min, max]", "MB read per token", "of the floor"]
    head += ["validation loss", "perplexity"] if result["validation"] else []
    return [
        Table(head, rows),
        f"{result['model']}; {result['new_tokens']} tokens after {result['prompt_tokens']}, {rounds} interleaved rounds. "
        f"Floor: the weights, read once per token at the rate of a copy measured before and after "
        f"({statistics.median(rates) / 1e9:.1f} GB/s, read and written). {machine_line(result)}.",
    ]


def stages_table(result: dict) -> list[Block]:
    rows = [
        [
            re.sub(r"^Stage (\d): (.*?)\.( .*)?$", r"\1. \2", e["title"]),
            f"{e['parameters'] / 1e6:.2f}M",
            f"{e['losses'][0]:.2f}",
            f"{e['losses'][-1]:.4f}" if e["losses"][-1] < 0.1 else f"{e['losses'][-1]:.2f}",
            f"{e['seconds']:.0f} s",
        ]
        for e in result["stages"]
    ]
    std = result["residual_std"]
    return [
        Table(
            ["stage", "parameters", "loss at step 1", f"loss at step {len(result['stages'][0]['losses'])}", "training time"],
            rows,
        ),
        f"ln 50257 = {result['ln_vocab_size']:.3f}. Residual stream at init, standard deviation behind the last of "
        f"{len(std['scaled']) - 1} blocks: {std['scaled'][-1]:.3f} with scaled residual projections, {std['unscaled'][-1]:.3f} "
        f"without. {machine_line(result)}.",
    ]


def shakespeare_table(result: dict) -> list[Block]:
    cfg, seconds = result["requested"], result["seconds"]
    rows = [
        ["parameters", f"{result['parameters'] / 1e6:.2f}M"],
        ["steps × tokens", f"{len(result['losses'])} × {cfg['tokens_per_step']}"],
        ["validation loss", f"{result['val_loss']:.2f}"],
        ["training, start to checkpoint", f"{seconds['train']:.0f} s"],
        ["of it the first step, which compiles", f"{result['first_step_s']:.0f} s"],
        ["ms/step [IQR]", ms_iqr(result)],
        ["sampling 200 tokens", f"{seconds['sample']:.0f} s"],
        ["start to text", f"{seconds['train'] + seconds['sample']:.0f} s"],
    ]
    lines = result["sample"].strip().splitlines()[:16]
    return [Table(["make train", ""], rows), f"{machine_line(result)}. It wrote:", Quote("\n".join(lines))]


def start_table(result: dict) -> list[Block]:
    rows = []
    for scope, seconds in result["seconds"].items():
        shares = [b / a for a, b in zip(seconds["first"], seconds["second"], strict=True)]
        cells = (f"{statistics.median(v):.1f} [{min(v):.1f}, {max(v):.1f}]" for v in seconds.values())
        rows.append(
            [f"compile_scope={scope}", *cells, f"{statistics.median(shares):.2f} [{min(shares):.2f}, {max(shares):.2f}]"]
        )
    head = [f"{result['config']}, seconds to the first step", "first start", "second start", "second / first"]
    return [Table(head, rows), f"Medians [min, max]; the first start finds an empty compiler cache. {machine_line(result)}."]


def run_table(result: dict) -> list[Block]:
    cfg, found = result["requested"], result["evaluation"]["validation"]
    rows = [
        ["parameters", f"{result['parameters'] / 1e6:.2f}M"],
        ["steps × tokens", f"{len(result['losses'])} × {cfg['tokens_per_step']:,}"],
        ["training", f"{result['seconds']['train']:.0f} s, {result['tokens_per_s']:,.0f} tokens/s"],
        ["validation loss", f"{found['loss']:.3f}"],
        ["perplexity", f"{found['perplexity']:.2f}"],
        ["bits per byte", f"{found['bits_per_byte']:.3f}"],
    ]
    quoted = Quote("\n".join(result["sample"].strip().splitlines()[:16]))
    return [Table([result["config"], ""], rows), f"{machine_line(result)}. It wrote:", quoted]


def data_table(result: dict) -> list[Block]:
    """prepare_data.py beside tiktoken by itself; a BPE of one's own beside GPT-2's."""
    # speed.py imports torch by way of prepare_data.py, this file must not: what it calls a way is a key here
    shares, rates = [], []
    for timed in result["rounds"]:
        ways = {name: t["tokens"] / t["s"] for name, t in timed.items()}
        rates.append(ways)
        shares.append(ways["whole"] / max(rate for name, rate in ways.items() if name != "whole"))
    names = {name: f"tiktoken, {name}" for name in rates[0]} | {"whole": "prepare_data.py, from the file to the manifest"}
    rows = [[names[name], *(f"{of(r[name] for r in rates):,.0f}" for of in (statistics.median, min, max))] for name in rates[0]]
    peak, quarter = (t["peak_bytes"] + sum(t["worker_peak_bytes"]) for t in (result["rounds"][-1]["whole"], result["quarter"]))
    text = result["text"]
    blocks: list[Block] = [
        Table([f"{text['bytes']:,} bytes of text, {result['processes']} processes", "tokens/s", "least", "most"], rows),
        f"prepare_data.py reaches {statistics.median(shares):.0%} [{min(shares):.0%}, {max(shares):.0%}] of the fastest of "
        f"tiktoken's own ways in each of {len(shares)} rounds. Its processes hold {peak / 2**20:,.0f} MiB together at most, "
        f"{quarter / 2**20:,.0f} on a quarter of the text.",
    ]
    rows = []
    for runs in result["learnt"]:
        first, times = runs[0], [r["s"] for r in runs]
        own, gpt2 = first["bytes_per_token"]["own"], first["bytes_per_token"]["gpt2"]
        rows.append([f"{first['merges']:,} merges from {first['text_bytes']:,} bytes", f"{statistics.median(times):.2f}"])
        rows[-1] += [f"{min(times):.2f} – {max(times):.2f}", f"{own:.2f}", f"{gpt2:.2f}"]
    head = ["a BPE of one's own", "seconds", "range", "bytes per token, unseen text", "GPT-2's"]
    return [*blocks, Table(head, rows), f"tiktoken {result['tiktoken']}. {machine_line(result)}."]


def safety_table(result: dict) -> list[Block]:
    free, fixed = ([statistics.median(r) for r in result["kernels_s"][name]] for name in ("any", "deterministic"))
    costs = [b / a - 1 for a, b in zip(free, fixed, strict=True)]
    rows = []
    for name, runs in result["saving"].items():
        pauses = [p for run in runs for p in run["pause_ms"][1:]]  # the first also allocates the copy
        first = [run["pause_ms"][0] for run in runs]
        slow = [max(run["step_ms"][s] for s in run["after_steps"]) for run in runs]
        plain = statistics.median(t for run in runs for t in run["step_ms"])
        took = [t for run in runs for t in run["save_ms"]]
        rows.append(
            [
                name,
                *(f"{statistics.median(v):,.0f}" for v in (first, pauses, took)),
                f"{statistics.median(slow):,.0f}",
                f"{plain:,.0f}",
            ]
        )
    head = ["saving", "first pause ms", "later pauses ms", "whole save ms", "slowest step after ms", "step ms"]
    return [
        Table(head, rows),
        f"Medians of {len(free)} runs. Only kernels that always give the same bits (`deterministic=True`): "
        f"{statistics.median(costs):+.1%} step time [{min(costs):+.1%}, {max(costs):+.1%}]. {machine_line(result)}.",
    ]


def kills_table(result: dict) -> list[Block]:
    lost = [e["last_step"] - int((e["newest"] or "step_0").removeprefix("step_")) for e in result["events"]]
    steps, seconds = result["requested"]["max_steps"], result["seconds"]
    every = result["requested"]["checkpoint_interval"]
    return [
        f"`config/shakespeare.py` (deterministic, a checkpoint every {every} steps) was killed by SIGKILL at {result['kills']} "
        f"random moments, {result['in_a_save']} of them in the middle of a save, and resumed each time: losses, gradient norms "
        f"and learning rates of all {steps} steps are equal in hex to the undisturbed run's, and parameters, moments, random "
        f"states and data cursor in sha256 ({result['sha256'][:16]}…). At most {max(lost)} steps were run again after a kill; "
        f"{seconds['whole']:,.0f} s became {seconds['broken']:,.0f} s. {machine_line(result)}."
    ]


def faults_table(result: dict) -> list[Block]:
    """The scorecard of tests/faults.py, and the matrix of kills and resumptions."""

    def verdict(found: dict) -> str:
        return "passed" if found["passed"] else "FAILED"

    def shown(value: float | None, unit: str = "") -> str:
        return "–" if value is None else f"{value:,}{unit}"

    rows = [
        [
            f"{f['id']} {f['title']}",
            f["expected"],
            verdict(f),
            str(f["tries"]),
            shown(f["seconds_to_detect"], " s"),
            shown(f["steps_lost"]),
            shown(f["seconds_to_recover"], " s"),
        ]
        for f in result["faults"]
    ]
    head = ["fault", "passes if", "", "tries", "time to detect", "steps lost", "time to recover"]
    blocks: list[Block] = [Table(head, rows, left=(0, 1, 2))] * bool(rows)
    blocks += [f"{f['id']} FAILED: {f['detail'].rstrip('.')}." for f in result["faults"] if not f["passed"]]
    cells = {(f"{c['dtype']}, {'compiled' if c['compile'] else 'eager'}", c["processes"]): c for c in result["matrix"]}
    if cells:
        kinds, processes = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        head = ["SIGKILL at a random step, then --resume", *(f"{n} process{'es' * (n > 1)}" for n in processes)]
        equal = {True: "bit for bit", False: "FAILED"}
        blocks.append(Table(head, [[k, *(equal[cells[k, n]["passed"]] for n in processes)] for k in kinds]))
        blocks += [f"{k}, {n} process(es) FAILED: {c['detail'].rstrip('.')}." for (k, n), c in cells.items() if not c["passed"]]
    counts = [f"{sum(f['passed'] for f in found)}/{len(found)}" for found in (result["faults"], result["matrix"])]
    parts = [f"{n} {what}" for n, what in zip(counts, ("faults", "of the matrix"), strict=True) if not n.endswith("/0")]
    return [
        *blocks,
        f"{', '.join(parts)} in {result['seconds'] / 60:.0f} minutes "
        f"({result['cpu_seconds'] / 60:.0f} of CPU time). Times and steps are the worst of all tries, and starting "
        "Python and torch is part of them. Time to detect: from the fault (a bad file: from the start) until the process that "
        "says so has ended. Steps lost: done again after resuming. Time to recover: from typing --resume until the run is "
        "where it was. "
        f"{machine_line(result)}.",
    ]


def evaluate_table(result: dict) -> list[Block]:
    """A model's validation loss and HellaSwag, as far as they were measured."""
    rows, said = [], []
    if v := result.get("validation"):
        bits = v["bits_per_byte"]
        rows += [[f"validation loss on {v['dataset']}", f"{v['loss']:.4f}"], ["perplexity", f"{v['perplexity']:,.2f}"]]
        rows += [["bits per byte", f"{bits:.4f}"]] if math.isfinite(bits) else []
        said.append(f"Loss: {v['tokens']:,} tokens ({v['bytes']:,} bytes) in sequences of {v['sequence_length']:,}.")
    if h := result.get("hellaswag"):
        for name in ("acc", "acc_norm"):  # a proportion's standard error
            error = math.sqrt(h[name] * (1 - h[name]) / h["rows"])
            rows.append([f"HellaSwag {name}", f"{h[name]:.2%} ± {error:.2%}"])
        cut = f", {h['cut']:,} of them cut to the model's block" if h["cut"] else ""
        said.append(f"HellaSwag: {h['rows']:,} rows{cut}, completion style; chance is 25%; ± one standard error.")
    step = "" if result["step"] is None else f", step {result['step']:,}"
    return [
        Table([f"{result['model']}{step}, {result['parameters'] / 1e6:.2f}M parameters", ""], rows),
        f"{' '.join(said)} {result['settings']['dtype']}. {machine_line(result)}.",
    ]


# Hoffmann et al. 2022: equation 10 and table 2; the 20 is what its sizes come to
CHINCHILLA = {"alpha": 0.34, "beta": 0.28, "law": 0.46, "parabolas": 0.49, "ratio": 20}


def scale_table(result: dict) -> list[Block]:
    """Each budget's best size, the law beside Chinchilla's, and what became of the prediction."""

    def shown(value: float | None, ends: list | None, form: str) -> str:
        if value is None:
            return "–"
        low, high = ("…" if end is None else format(end, form) for end in ends or (None, None))
        return format(value, form) + (f" [{low}, {high}]" if ends else "")

    fit, held = result["fit"], result["held_out"]
    rows = []
    for level in fit["levels"]:
        runs = [r for r in result["runs"] if r["budget"] == level["budget"]]
        curve, law = level["parabola"], level["law"]
        rows.append(
            [
                f"{level['budget']:.1e}",
                f"{min(r['N'] for r in runs):,} – {max(r['N'] for r in runs):,}",
                f"{min(r['D'] for r in runs):,} – {max(r['D'] for r in runs):,}",
                shown(curve["loss"], None, ".3f"),
                shown(curve["N"], curve["N_interval"], ",.0f"),
                shown(curve["ratio"], curve["ratio_interval"], ",.0f"),
                shown(law["N"], law["N_interval"], ",.0f"),
                shown(law["ratio"], law["ratio_interval"], ",.0f"),
            ]
        )
    head = ["C = 6ND", "sizes N", "tokens D", "least loss, parabola", "its N [95%]", "its D/N [95%]"]
    blocks: list[Block] = [Table([*head, "N by the law [95%]", "D/N by the law [95%]"], rows)]
    law, ends = fit["law"], fit["intervals"]
    names = {"E": "E, nats", "A": "A", "alpha": "α", "B": "B", "beta": "β"}
    rows = [[names[k], shown(law[k], ends[k], ".3g"), format(CHINCHILLA[k], "g") if k in CHINCHILLA else ""] for k in names]
    for k, by in (("law", "the law"), ("parabolas", "parabolas")):
        found = shown(fit["exponent"][k], fit["exponent"][f"{k}_interval"], ".2f")
        rows.append([f"a in N ∝ C^a, by {by}", found, format(CHINCHILLA[k], "g")])
    top = fit["levels"][-1]["law"]
    ratio = shown(top["ratio"], top["ratio_interval"], ",.0f")
    rows.append(["D/N at the largest budget, by the law", ratio, f"about {CHINCHILLA['ratio']}"])
    blocks.append(Table(["L = E + A/N^α + B/D^β", "here [95%]", "Chinchilla"], rows))
    guess = held["predicted"]
    times = held["budget"] / fit["levels"][-1]["budget"]
    said = (
        f"Held out: N = {held['N']:,}, D = {held['D']:,}, {times:.3g} times the largest budget. "
        f"Predicted {guess['loss']:.4f} [{guess['low']:.4f}, {guess['high']:.4f}]"
    )
    if held["runs"]:
        losses = [r["loss"] for r in held["runs"]]
        found, first = statistics.fmean(losses), min(r["started"] for r in held["runs"])
        before = ", before it was trained" if held["predicted_at"] < first else " (its runs were there already)"
        spread = f", standard deviation {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        where = "inside" if guess["low"] <= found <= guess["high"] else "OUTSIDE"
        blocks.append(
            f"{said}{before}; measured {found:.4f} (mean of {len(losses)} seed(s){spread}), {found - guess['loss']:+.4f}: "
            f"{where} the 95% interval."
        )
    else:
        blocks.append(f"{said}; not trained yet.")
    every = result["runs"] + held["runs"]
    cost = [r["flops"] / r["C"] for r in every]
    noise = "unknown (one seed)" if fit["noise"] is None else f"{fit['noise']:.2%}"
    study = result["sizes"]
    epochs = max(r["D"] for r in every) / result["train_tokens"]
    blocks.append(
        f"{len(every)} runs on {study['dataset']}, T={study['sequence_length']}, {study['tokens_per_step']} tokens per step, "
        f"at most {epochs:.2f} epochs. N counts all parameters; counted with attention and without lookups (PaLM), a run costs "
        f"{min(cost):.2f} to {max(cost):.2f} times 6ND. Noise between seeds: {noise} of the loss; the law misses a point by "
        f"{fit['misfit']:.2%}. Intervals of the law: {study['bootstraps']} bootstraps over the (N, D); of the parabolas: the "
        f"noise alone. Chinchilla's tokens are BPE, of some four characters. "
        f"{sum(r['seconds'] for r in every) / 60:.0f} minutes of training, {result['jobs']} at a time. {machine_line(result)}."
    )
    return blocks


def verify_table(result: dict, words: list[str] | None = None) -> list[Block]:
    """Each toggle's errors against its reference. words: only the checks that name one of them, for a rung's page."""
    chosen = [r for r in result["rows"] if not words or any(w in r["check"] for w in words)]
    if not chosen:
        raise ValueError(f"no check in it names {' or '.join(words)}")
    kinds = list(dict.fromkeys(kind for r in result["rows"] for kind in r["errors"]))

    def number(e: float | None) -> str:
        return "not finite" if e is None else f"{e:.1e}"

    rows = [
        [r["check"], r["against"], r["status"].split(":")[0], number(r["tolerance"])]
        + [number(r["errors"][kind]) if kind in r["errors"] else "" for kind in kinds]
        for r in chosen
    ]
    notes = [f"{r['check']}: {r['status'].rstrip('.')}." for r in chosen if r["status"] != "passed"]
    failed, skipped = (sum(r["status"].startswith(how) for r in chosen) for how in ("FAILED", "skipped"))
    counts = f"{len(chosen) - failed - skipped} passed, {failed} FAILED, {skipped} skipped."
    how = "Each number is the largest ‖found − expected‖ / ‖expected‖ over the tensors of its kind, after one real train_step."
    table = Table(["check", "against", "status", "tolerance", *kinds], rows, left=(0, 1, 2))
    return [table, *notes, f"{how} {counts} {machine_line(result)}."]


def why_table(result: dict) -> list[Block]:
    """Where a step goes: each part beside the least it can take here, and what to try next."""
    whole = {"part": "step", "ms": result["step_ms"], "share": 1.0, "floor_ms": result["floor_ms"]}
    whole |= {key: sum(s[key] for s in result["shares"]) for key in ("flops", "bytes")}
    rows = [
        [
            s["part"],
            f"{s['ms']:,.1f}",
            f"{s['share']:.1%}",
            f"{s['floor_ms']:,.1f}",
            f"{s['ms'] / s['floor_ms']:.1f}×" if s["floor_ms"] else "",
            f"{s['flops'] / 1e9:,.1f}" if s["flops"] else "",
            f"{s['bytes'] / 1e6:,.0f}" if s["bytes"] else "",
        ]
        for s in [*result["shares"], whole]
    ]
    return [
        Table(["part", "ms", "share", "floor ms", "× floor", "GFLOP", "MB"], rows),
        "Floor: operations over the matmul rate measured here, or bytes over the measured copy rate, whichever takes longer. "
        f"{machine_line(result)}.",
        what_next(result),
    ]


def what_next(result: dict) -> str:
    """What why.py advises, in one paragraph: the settings that promise at least 1% of the step."""
    step = result["step_ms"]
    times = result["profiled_ms"] / step
    doubt = (
        "" if 0.8 < times < 1.25 else f" The profiled step took {times:.2f}× an ordinary one: do not trust it, run it again."
    )
    advice = [a for a in result["advice"] if a["saves_ms"] >= 0.01 * step]
    if not advice:
        widest = max(result["shares"], key=lambda s: s["ms"] - s["floor_ms"])
        furthest = f"Furthest from its floor: {widest['part']}, {widest['ms'] - widest['floor_ms']:,.1f} ms above it."
        return f"No setting that is off promises 1% of the step. {furthest}{doubt}"
    best, *others = advice
    rest = "; then " + ", ".join(f"{a['setting']} ({a['saves_ms']:,.1f} ms)" for a in others) if others else ""
    return (
        f"Worth trying next: {best['setting']}, predicted to save {best['saves_ms']:,.1f} ms ({step:,.1f} → "
        f"{step - best['saves_ms']:,.1f}): {best['why']}{rest}. Predictions, each "
        f"for that setting alone: they do not add up.{doubt}"
    )


KINDS: dict[str, Callable[[dict], list[Block]]] = {
    "ladder": steps_table,
    "ablate": steps_table,
    "candidates": steps_table,
    "ab": ab_table,
    "sampling": sampling_table,
    "decode": decode_table,
    "stages": stages_table,
    "shakespeare": shakespeare_table,
    "start": start_table,
    "run": run_table,
    "data": data_table,
    "safety": safety_table,
    "kills": kills_table,
    "faults": faults_table,
    "evaluate": evaluate_table,
    "verify": verify_table,
    "why": why_table,
    "scale": scale_table,
}
# What a block may pick out of a file: `<!-- begin results/x/ladder.json r03_compile -->`
PARTS = {"ladder": rung_table, "verify": verify_table}


def blocks(result: dict, words: list[str] | None = None) -> list[Block]:
    """A result as tables and paragraphs; of the part of it that words name, if any. ValueError if it has none."""
    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if not words:
        return KINDS[result["kind"]](result)
    if result["kind"] not in PARTS:
        raise ValueError(f"only a part of {' or '.join(PARTS)} can be shown, not of {result['kind']}")
    return PARTS[result["kind"]](result, words)


# ---- as text ----------------------------------------------------------------------------------------------------------


def plain_table(table: Table) -> str:
    """For a terminal."""
    everything = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(table.head))]
    lines = []
    for row in [table.head, ["-" * w for w in widths], *table.rows]:
        cells = [c.ljust(w) if i in table.left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_text(result: dict) -> str:
    """A result for a terminal."""
    how = {Table: plain_table, str: lambda s: s.replace("**", ""), Quote: lambda q: indented(q.text)}
    return "\n\n".join(how[type(block)](block) for block in blocks(result))


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def in_markdown(text: str) -> str:
    """Text of a cell or a paragraph. What came from JSON must not become markup, nor end a generated block or a cell."""
    return re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def markdown_table(table: Table) -> str:
    rule = ["---" if i in table.left else "---:" for i in range(len(table.head))]
    rows = [rule if row is rule else [in_markdown(c) for c in row] for row in [table.head, rule, *table.rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_markdown(result: dict, words: list[str] | None = None) -> str:
    """A result, or a part of it, as Markdown."""
    how = {
        Table: markdown_table,
        str: in_markdown,
        Quote: lambda q: indented(q.text.replace("<!--", "< !--")),  # would end the generated block
    }
    return "\n\n".join(how[type(block)](block) for block in blocks(result, words))
