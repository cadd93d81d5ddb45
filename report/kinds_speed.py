"""Results about speed -> blocks: one function for each kind of result (ladder, ablation, two configs, decoding, …)."""

import math
import statistics
from collections.abc import Callable

from report import results
from report.render import Block, Table
from report.results import all_steps, machine_line, measured, ms_iqr, per_round, ratio, tokens_per_s
from report.stats import Estimate, enough, extent, interval, too_few

# How far a rung may lie from the losses of the first row, in nats, over the compared steps from the same weights and data. By
# rounding alone: in float32 only sums run in another order; 16-bit matmuls are off by 2^-9 of each number, most of which the
# mean over a step's tokens averages out (measured 1.6e-3). Other training shows: another seed is 0.1 away.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}

# Settings that change what is learned, not only how fast. Where two configs differ in one, their losses do not compare.
LEARNING = {"learning_rate", "min_lr", "warmup_steps", "schedule", "max_steps", "weight_decay", "beta1", "beta2", "grad_clip"}
LEARNING |= {"tokens_per_step", "sequence_length", "batch_order", "seed", "dataset", "dropout", "init_from", "init"}
LEARNING |= {"n_layer", "n_head", "n_embd", "bias", "tie_weights", "scale_residual_init"}

TIMES, ONE_DIGIT = "{:.2f}".format, "{:,.1f}".format


def worst_loss(entry: dict, base: dict) -> float:
    """The largest difference of a row's losses from the first row's, in nats."""
    return max(map(abs, results.loss_differences(entry, base)))


def percent(share: float, sign: str = "-") -> str:
    """ "12%", or with sign="+" "+12%"; "0%" rather than "-0%"."""
    text = format(share, f"{sign}.0%")
    return "0%" if text in ("+0%", "-0%") else text


def skipped_line(result: dict) -> list[str]:
    """One paragraph that names the skipped rows, those with the same reason together; none if nothing was skipped."""
    reasons: dict[str, list[str]] = {}
    for entry in result["rungs"]:
        if "skipped" in entry:
            reasons.setdefault(results.reason(entry), []).append(results.label(entry, result["kind"]))
    parts = [f"{', '.join(names)} ({why})" for why, names in reasons.items()]
    return [f"Skipped on this machine: {'; '.join(parts)}."] if parts else []


def steps_head(kind: str) -> list[str]:
    """The columns that differ between a ladder and an ablation."""
    if kind == "ladder":
        return ["rung", "one setting more", "ms/step [IQR]", "tok/s", "× previous [min, max]", "× first", "time saved"]
    which = ["row", "one setting back"] if kind == "ablate" else ["row", "one setting instead"]
    return [*which, "ms/step [IQR]", "tok/s", "× slower [min, max]", "× top", "time added"]


def steps_row(result: dict, entry: dict, base: dict) -> list[str]:
    """One measured row; the last cell but two is MFU, which is left out where the data-sheet peak is not known."""
    ceilings, is_ladder, first = result["ceilings"], result["kind"] == "ladder", entry is base
    versus, asked, peak = results.before(result, entry), entry["requested"], result["ceilings"]["peak_flops"]
    gain = ratio(versus, entry) if is_ladder else ratio(entry, versus)
    flops = tokens_per_s(result, entry) * results.flops_per_token(asked) / results.devices(entry)
    gemm = results.gemm_rate(asked["dtype"], asked["fp32_precision"], ceilings)
    loss, allowed = worst_loss(entry, base), max(LOSS_TOLERANCE[e["requested"]["dtype"]] for e in (entry, base))
    return [
        results.label(entry, result["kind"]),
        results.transition(entry),
        ms_iqr(entry),
        f"{tokens_per_s(result, entry):,.0f}",
        "–" if first else gain.text(TIMES, "×"),
        f"{ratio(base, entry).middle:.2f}×",
        "–" if first else percent(1 - 1 / gain.middle) if is_ladder else percent(gain.middle - 1, "+"),
        f"{entry['memory_gib']:.1f}",
        *([f"{flops / peak:.1%}"] if peak else []),
        f"{flops / gemm:.0%}" if gemm else "n/a",
        "–" if first else f"{loss:.1e}" + " TOO FAR" * (loss > allowed),
    ]


def steps_table(result: dict) -> list[Block]:
    """A ladder, an ablation or candidates."""
    ceilings, sizes, base = result["ceilings"], result["sizes"], next(iter(measured(result)), None)
    peak = ceilings["peak_flops"]
    head = [*steps_head(result["kind"]), "GiB", *(["MFU"] if peak else []), "of GEMM", "max |Δ loss|"]
    rows = []
    for entry in result["rungs"]:
        if "skipped" in entry:
            name = results.label(entry, result["kind"])
            rows.append([name, results.transition(entry), "skipped", *["–"] * (len(head) - 3)])
        else:
            rows.append(steps_row(result, entry, base))
    steps = len(base["losses"]) if base else 0
    rates = [(k[5:-6], v) for k, v in ceilings.items() if k.startswith("gemm_")]
    notes = (
        f"{machine_line(result)}. B={sizes['batch_size']}, T={sizes['sequence_length']}, {sizes['tokens_per_step']} tokens per "
        f"step, {sizes['rounds']} interleaved round(s). |Δ loss|: against the first row over {steps} steps; allowed "
        f"{LOSS_TOLERANCE['float32']:g} in float32, {LOSS_TOLERANCE['bfloat16']:g} in 16 bits. "
        f"{'MFU: share of the data-sheet bf16 peak. ' if peak else ''}Of GEMM: share of the rate of a large matmul in the same "
        f"precision, measured here: {', '.join(f'{name} {rate / 1e12:.3g}' for name, rate in rates)} TFLOP/s; "
        f"a copy: {ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s.{too_few(sizes['rounds'], 'round')}"
    )
    return [Table(head, rows, left=(0, 1)), *skipped_line(result), notes]


def ladder_summary(result: dict) -> list[Block]:
    """The ladder in one line: its fastest rung against its first."""
    rows = measured(result)
    base, best = rows[0], min(rows, key=lambda e: statistics.median(all_steps(e)))
    gain = ratio(base, best)
    steps = f"{tokens_per_s(result, base):,.0f} → {tokens_per_s(result, best):,.0f} tokens/s"
    return [
        f"**{gain.text(TIMES, '× as fast**')} as plain fp32, {steps}, at the same losses: the largest difference "
        f"over the first {len(base['losses'])} steps is {worst_loss(best, base):.1e} nats. {machine_line(result)}."
        f"{too_few(len(best['step_s']), 'round')}"
    ]


def rung_table(result: dict, name: str) -> list[Block]:
    """One rung of a ladder beside the one before it, for its page."""
    entry = next((e for e in result["rungs"] if e["name"] == name), None)
    if entry is None:
        raise ValueError(f"there is no rung {name} in it, only {', '.join(e['name'] for e in result['rungs'])}")
    if "skipped" in entry:
        return [f"Skipped on this machine: {results.reason(entry)}. {machine_line(result)}."]
    base, versus = measured(result)[0], results.before(result, entry)
    both = [entry] if entry is base else [versus, entry]
    rows = [
        ["ms/step [IQR]", *map(ms_iqr, both)],
        ["tok/s", *(f"{tokens_per_s(result, e):,.0f}" for e in both)],
        ["peak memory, GiB", *(f"{e['memory_gib']:.1f}" for e in both)],
        ["first step, s", *(f"{statistics.median(e['first_step_s']):.1f}" for e in both)],
    ]
    table = Table(["measured here", *(results.label(e, "ladder") for e in both)], rows)
    if entry is base:
        return [table, f"{machine_line(result)}."]
    saved = statistics.median(all_steps(versus)) - statistics.median(all_steps(entry))
    gain = ratio(versus, entry)
    change = f"{1e3 * abs(saved):,.0f} ms {'less' if saved > 0 else 'more'} per step"
    return [
        table,
        f"**{gain.text(TIMES, '×** as fast')} as {results.label(versus, 'ladder')}: {change}. Largest difference "
        f"of a loss from rung 0's over {len(base['losses'])} steps: {worst_loss(entry, base):.1e}. {machine_line(result)}."
        f"{too_few(len(entry['step_s']), 'round')}",
    ]


def ladder_part(result: dict, words: list[str]) -> list[Block]:
    """`summary`, or one rung by its name."""
    return ladder_summary(result) if words == ["summary"] else rung_table(result, " ".join(words))


def sampling_table(result: dict) -> list[Block]:
    """Decoding with and without the cache of keys and values."""
    speeds, layers = result["tokens_per_s"], result["sizes"]["n_layer"]
    rows = [[how, extent(v).text(ONE_DIGIT)] for how, v in speeds.items()]
    gains = [c / u for c, u in zip(speeds["cached"], speeds["uncached"], strict=True)]
    same = "the same tokens" if result["same_tokens"] else "DIFFERENT TOKENS"
    return [
        Table([f"{'124M' if layers == 12 else f'{layers} layers'}, one sequence, float32", "tok/s [min, max]"], rows),
        f"The cache is {extent(gains).text(ONE_DIGIT, '× as fast')}, with {same}: "
        f"{result['new_tokens']} tokens after {result['prompt_tokens']}. {machine_line(result)}.{too_few(len(gains), 'round')}",
    ]


def decode_table(result: dict) -> list[Block]:
    """Tokens per second in each form, beside what reading the weights once for each token allows."""
    rows = []
    for way in result["ways"]:
        speeds, B, rates = way["tokens_per_s"], way["batch"], way.get("read_bytes_per_s") or way["copy_bytes_per_s"]
        # the weights are read once for all sequences of a batch
        shares = [speed / B * way["bytes_per_token"] / rate for speed, rate in zip(speeds, rates, strict=True)]
        loss = result["validation"].get(way["form"])
        row = [way["name"], f"{B}", extent(speeds).text(ONE_DIGIT), f"{way['bytes_per_token'] / 1e6:,.0f}"]
        row.append(extent(shares).text("{:.0%}".format))
        row += [f"{loss['loss']:.4f}", f"{loss['perplexity']:,.2f}"] if loss else []
        rows.append(row)
    rate = "the rate of reading as many bytes, measured before and after"
    if copies := [rate for way in result["ways"] for rate in way.get("copy_bytes_per_s", [])]:  # in older results
        gb = statistics.median(copies) / 1e9
        rate = f"the rate of a copy measured before and after ({gb:.1f} GB/s, read and written)"
    rounds = len(result["ways"][0]["tokens_per_s"])
    head = ["decoding", "sequences", "tok/s [min, max]", "MB read per token", "of the floor"]
    head += ["validation loss", "perplexity"] if result["validation"] else []
    return [
        Table(head, rows),
        f"{result['model']}; {result['new_tokens']} tokens after {result['prompt_tokens']}, {rounds} interleaved rounds. "
        f"Floor: the weights, read once per token at {rate}. {machine_line(result)}.{too_few(rounds, 'round')}",
    ]


def start_table(result: dict) -> list[Block]:
    """Seconds until the first step, without and with compiled code from an earlier start."""
    rows = []
    for scope, seconds in result["seconds"].items():
        shares = [b / a for a, b in zip(seconds["first"], seconds["second"], strict=True)]
        cells = (extent(v).text(ONE_DIGIT) for v in seconds.values())
        rows.append([f"compile_scope={scope}", *cells, extent(shares).text(TIMES)])
    head = [f"{result['config']}, seconds to the first step", "first start", "second start", "second / first"]
    note = f"Medians [min, max]; the first start finds an empty compiler cache. {machine_line(result)}."
    return [Table(head, rows), note + too_few(len(shares), "round")]


def data_table(result: dict) -> list[Block]:
    """prepare_data.py beside tiktoken by itself; a BPE trained on the text beside GPT-2's."""
    shares, rates = [], []
    for timed in result["rounds"]:
        ways = {name: t["tokens"] / t["s"] for name, t in timed.items()}
        rates.append(ways)
        shares.append(ways["whole"] / max(rate for name, rate in ways.items() if name != "whole"))
    names = {name: f"tiktoken, {name}" for name in rates[0]} | {"whole": "prepare_data.py, from the file to the manifest"}
    rows = [[names[name], extent([r[name] for r in rates]).text("{:,.0f}".format)] for name in rates[0]]
    peak, quarter = (t["peak_bytes"] + sum(t["worker_peak_bytes"]) for t in (result["rounds"][-1]["whole"], result["quarter"]))
    text = result["text"]
    blocks: list[Block] = [
        Table([f"{text['bytes']:,} bytes of text, {result['processes']} processes", "tokens/s [min, max]"], rows),
        f"prepare_data.py reaches {extent(shares).text('{:.0%}'.format)} of the fastest of tiktoken's own ways over "
        f"{len(shares)} round(s). Its processes hold {peak / 2**20:,.0f} MiB together at most, "
        f"{quarter / 2**20:,.0f} on a quarter of the text.{too_few(len(shares), 'round')}",
    ]
    rows = []
    for runs in result["learnt"]:
        first, times = runs[0], [r["s"] for r in runs]
        own, gpt2 = first["bytes_per_token"]["own"], first["bytes_per_token"]["gpt2"]
        learnt = f"{first['merges']:,} merges from {first['text_bytes']:,} bytes"
        rows.append([learnt, extent(times).text(TIMES), f"{own:.2f}", f"{gpt2:.2f}"])
    head = ["training a BPE", "seconds [min, max]", "bytes per token, unseen text", "GPT-2's"]
    return [*blocks, Table(head, rows), f"tiktoken {result['tiktoken']}. {machine_line(result)}."]


def judged(found: Estimate, even: float, show: Callable, unit: str, below: str, above: str) -> str:
    """A number with its confidence interval and what that means; without an interval the number alone."""
    if not found.known:
        return show(found.middle) + unit
    word = "not distinguishable" if found.low <= even <= found.high else above if found.low > even else below
    return f"{found.text(show, f'{unit}, 95% CI')}: {word}"


def ab_table(result: dict) -> list[Block]:
    """Two configs: step time of each, and their ratio and loss difference with 95% confidence intervals over the seeds."""
    a, b = result["sides"]
    rows = []
    for side in (a, b):
        tokens = side["requested"]["tokens_per_step"] / statistics.median(all_steps(side))
        last = statistics.fmean(losses[-1] for losses in side["losses"])
        rows.append([side["config"], ms_iqr(side), f"{tokens:,.0f}", f"{last:.4f}"])
    logs = [math.log(x / y) for x, y in zip(per_round(a), per_round(b), strict=True)]
    speed = interval(logs).map(math.exp)
    loss = interval([y[-1] - x[-1] for x, y in zip(a["losses"], b["losses"], strict=True)])
    differs = [f"{name} {old} → {new}" for name, (old, new) in result["changes"].items() if name in LEARNING]
    unlike = f"A and B do not train alike ({', '.join(differs)}): their losses may differ for that reason. " if differs else ""
    faster = judged(speed, 1.0, TIMES, "× as fast as A", "A is faster", "B is faster")
    lower = judged(loss, 0.0, "{:+.4f}".format, "", "B's is lower", "A's is lower")
    pairs = f"{len(logs)} pairs." if enough(len(logs)) else too_few(len(logs), "pair").strip()
    return [
        Table(["config", "ms/step [IQR]", "tok/s", f"loss at step {len(a['losses'][0])}"], rows),
        f"{unlike}B is {faster}. Loss of B minus A {lower}. {pairs} {machine_line(result)}.",
    ]


def why_table(result: dict) -> list[Block]:
    """Where a step goes: each part beside the least it can take here, and what to try next."""
    whole = {"part": "step", "ms": result["step_ms"], "share": 1.0, "floor_ms": result["floor_ms"]}
    whole |= {key: sum(s[key] for s in result["shares"]) for key in ("flops", "bytes")}
    rows = []
    for s in [*result["shares"], whole]:
        times = f"{s['ms'] / s['floor_ms']:.1f}×" if s["floor_ms"] else ""
        row = [s["part"], f"{s['ms']:,.1f}", f"{s['share']:.1%}", f"{s['floor_ms']:,.1f}", times]
        row.append(f"{s['flops'] / 1e9:,.1f}" if s["flops"] else "")
        row.append(f"{s['bytes'] / 1e6:,.0f}" if s["bytes"] else "")
        rows.append(row)
    by_size = "memory_bytes_per_s" in result.get("ceilings", {})  # older results have the rate of a copy alone
    memory = "the measured rate of memory of that size, read or changed in place" if by_size else "the measured copy rate"
    return [
        Table(["part", "ms", "share", "floor ms", "× floor", "GFLOP", "MB"], rows),
        f"Floor: operations over the matmul rate measured here, or bytes over {memory}, whichever takes longer. "
        f"{machine_line(result)}.",
        what_next(result),
    ]


def what_next(result: dict) -> str:
    """The advice of `bench.py why` in one paragraph: the settings that promise at least 1% of the step."""
    step = result["step_ms"]
    times = result["profiled_ms"] / step
    doubt = f" The profiled step took {times:.2f}× an ordinary one: do not trust it, run it again."
    if 0.8 < times < 1.25:
        doubt = ""
    advice = [a for a in result["advice"] if a["saves_ms"] >= 0.01 * step]
    if not advice:
        widest = max(result["shares"], key=lambda s: s["ms"] - s["floor_ms"])
        furthest = f"Furthest from its floor: {widest['part']}, {widest['ms'] - widest['floor_ms']:,.1f} ms above it."
        return f"No setting that is off promises 1% of the step. {furthest}{doubt}"
    best, *others = advice
    rest = "; then " + ", ".join(f"{a['setting']} ({a['saves_ms']:,.1f} ms)" for a in others) if others else ""
    return (
        f"Worth trying next: {best['setting']}, which can save up to {best['saves_ms']:,.1f} ms ({step:,.1f} → "
        f"{step - best['saves_ms']:,.1f}): {best['why']}{rest}. Upper bounds, each "
        f"for that setting alone: they do not add up.{doubt}"
    )
