"""Results about what was learned -> blocks: whole runs, the stages, an evaluation, a scaling law."""

import math
import re
import statistics

from report.render import Block, Quote, Table
from report.results import CHINCHILLA, machine_line, ms_iqr
from report.stats import Estimate, too_few


def stages_table(result: dict) -> list[Block]:
    """Loss and size of each stage, and the residual stream at initialisation."""
    rows, std = [], result["residual_std"]
    for e in result["stages"]:
        title = re.sub(r"^Stage (\d): (.*?)\.( .*)?$", r"\1. \2", e["title"])
        last = f"{e['losses'][-1]:.4f}" if e["losses"][-1] < 0.1 else f"{e['losses'][-1]:.2f}"
        rows.append([title, f"{e['parameters'] / 1e6:.2f}M", f"{e['losses'][0]:.2f}", last, f"{e['seconds']:.0f} s"])
    steps = len(result["stages"][0]["losses"])
    return [
        Table(["stage", "parameters", "loss at step 1", f"loss at step {steps}", "training time"], rows),
        f"ln 50257 = {result['ln_vocab_size']:.3f}. Residual stream at init, standard deviation behind the last of "
        f"{len(std['scaled']) - 1} blocks: {std['scaled'][-1]:.3f} with scaled residual projections, {std['unscaled'][-1]:.3f} "
        f"without. {machine_line(result)}.",
    ]


def with_sample(result: dict, table: Table, sizes: str = "") -> list[Block]:
    """A run's table, and the first lines of the text that its model wrote."""
    sample = "\n".join(result["sample"].strip().splitlines()[:16])
    return [table, f"{sizes}{machine_line(result)}.", "It wrote:", Quote(sample)]


def shakespeare_table(result: dict) -> list[Block]:
    """What `make train` took, reached and wrote, by seed."""
    cfg, runs = result["requested"], result["runs"]

    def row(name: str, values: list[float], form: str) -> list[str]:
        spread = f"{statistics.stdev(values):{form}}" if len(values) > 1 else "–"
        return [name, *(f"{v:{form}}" for v in values), f"{statistics.mean(values):{form}}", spread]

    rows = [
        row("bits per byte, whole validation split", [r["bits_per_byte"] for r in runs], ".3f"),
        row("from the command to its end, s", [r["train_s"] for r in runs], ".0f"),
        row("of it until the first loss, s", [r["first_loss_s"] for r in runs], ".1f"),
        row("and until the first step, which compiles, s", [r["first_step_s"] for r in runs], ".1f"),
        row("sampling 200 tokens, s", [r["sample_s"] for r in runs], ".1f"),
    ]
    head = ["make train", *(f"seed {r['seed']}" for r in runs), "mean", "std"]
    steps = f"{cfg['max_steps']:,} steps of {cfg['tokens_per_step']:,} tokens, {ms_iqr(result)} ms/step [IQR]"
    return with_sample(result, Table(head, rows), f"{result['parameters'] / 1e6:.2f}M parameters, {steps}. ")


def run_table(result: dict) -> list[Block]:
    """A whole run, evaluated, and what its model wrote."""
    cfg, found = result["requested"], result["evaluation"]["validation"]
    rows = [
        ["parameters", f"{result['parameters'] / 1e6:.2f}M"],
        ["steps × tokens", f"{len(result['losses'])} × {cfg['tokens_per_step']:,}"],
        ["training", f"{result['seconds']['train']:.0f} s, {result['tokens_per_s']:,.0f} tokens/s"],
        ["validation loss", f"{found['loss']:.3f}"],
        ["perplexity", f"{found['perplexity']:.2f}"],
        ["bits per byte", f"{found['bits_per_byte']:.3f}"],
    ]
    return with_sample(result, Table([result["config"], ""], rows))


def without_sample(result: dict, words: list[str]) -> list[Block]:
    """`numbers`: a run's table without the text that it wrote."""
    if words != ["numbers"]:
        raise ValueError(f"the only part of a run is numbers, not {' '.join(words)}")
    return {"shakespeare": shakespeare_table, "run": run_table}[result["kind"]](result)[:2]


def evaluate_table(result: dict) -> list[Block]:
    """A model's validation loss and HellaSwag, as far as they were measured."""
    rows, notes = [], []
    if v := result.get("validation"):
        bits = v["bits_per_byte"]
        error = f" ± {v['standard_error']:.4f}" if v.get("standard_error") else ""
        rows += [[f"validation loss on {v['dataset']}", f"{v['loss']:.4f}{error}"], ["perplexity", f"{v['perplexity']:,.2f}"]]
        rows += [["bits per byte", f"{bits:.4f}"]] if math.isfinite(bits) else []
        notes.append(f"Loss: {v['tokens']:,} tokens ({v['bytes']:,} bytes) in sequences of {v['sequence_length']:,}.")
        if error:
            notes.append(f"± one standard error over the {v['sequences']:,} sequences, as if each were drawn by itself.")
        elif "sequences" in v:
            notes.append("One sequence has no standard error.")
    if h := result.get("hellaswag"):
        for name in ("acc", "acc_norm"):  # a proportion's standard error
            error = math.sqrt(h[name] * (1 - h[name]) / h["rows"])
            rows.append([f"HellaSwag {name}", f"{h[name]:.2%} ± {error:.2%}"])
        notes.append(f"HellaSwag: {h['rows']:,} rows, completion style; chance is 25%; ± one standard error over the rows.")
        if h["cut"]:
            cut = "rows are longer than the model's block and lost the beginning of their context"
            notes.append(f"rows_cut: {h['cut']:,} {cut}.")
    step = "" if result["step"] is None else f", step {result['step']:,}"
    return [
        Table([f"{result['model']}{step}, {result['parameters'] / 1e6:.2f}M parameters", ""], rows),
        f"{' '.join(notes)} {result['settings']['dtype']}. {machine_line(result)}.",
    ]


def with_interval(value: float | None, ends: list | None, form: str) -> str:
    """ "0.53 [0.45, 0.60]"; an end that is not finite is "…". Without an interval, "0.53"."""
    if value is None:
        return "–"
    low, high = ends or (None, None)
    found = Estimate(value, -math.inf if low is None else low, math.inf if high is None else high)
    return found.text(lambda v: format(v, form) if math.isfinite(v) else "…") if ends else format(value, form)


def budgets_table(result: dict) -> Table:
    """Each budget's best size, by a parabola through its own losses and by the law fitted to all of them."""
    rows = []
    for level in result["fit"]["levels"]:
        runs = [r for r in result["runs"] if r["budget"] == level["budget"]]
        curve, law = level["parabola"], level["law"]
        row = [f"{level['budget']:.1e}"]
        row += [f"{min(r[size] for r in runs):,} – {max(r[size] for r in runs):,}" for size in "ND"]
        row.append(with_interval(curve["loss"], None, ".3f"))
        row += [with_interval(by[k], by[f"{k}_interval"], ",.0f") for by in (curve, law) for k in ("N", "ratio")]
        rows.append(row)
    head = ["C = 6ND", "sizes N", "tokens D", "least loss, parabola", "its N [95%]", "its D/N [95%]"]
    return Table([*head, "N by the law [95%]", "D/N by the law [95%]"], rows)


def law_table(fit: dict) -> Table:
    """The law's numbers beside Chinchilla's."""
    names = {"E": "E, nats", "A": "A", "alpha": "α", "B": "B", "beta": "β"}
    rows = [
        [name, with_interval(fit["law"][k], fit["intervals"][k], ".3g"), format(CHINCHILLA[k], "g") if k in CHINCHILLA else ""]
        for k, name in names.items()
    ]
    for k, by in (("law", "the law"), ("parabolas", "parabolas")):
        found = with_interval(fit["exponent"][k], fit["exponent"][f"{k}_interval"], ".2f")
        rows.append([f"a in N ∝ C^a, by {by}", found, format(CHINCHILLA[k], "g")])
    top = fit["levels"][-1]["law"]
    ratio = with_interval(top["ratio"], top["ratio_interval"], ",.0f")
    rows.append(["D/N at the largest budget, by the law", ratio, f"about {CHINCHILLA['ratio']}"])
    return Table(["L = E + A/N^α + B/D^β", "here [95%]", "Chinchilla"], rows)


def held_out_line(result: dict) -> str:
    """What became of the prediction for a larger run."""
    held, guess = result["held_out"], result["held_out"]["predicted"]
    predicted = Estimate(guess["loss"], guess["low"], guess["high"])
    times = held["budget"] / result["fit"]["levels"][-1]["budget"]
    line = f"Held out: N = {held['N']:,}, D = {held['D']:,}, {times:.3g} times the largest budget. Predicted "
    line += predicted.text("{:.4f}".format)
    if not held["runs"]:
        return f"{line}; not trained yet."
    losses = [r["loss"] for r in held["runs"]]
    found, first = statistics.fmean(losses), min(r["started"] for r in held["runs"])
    when = ", before it was trained" if held["predicted_at"] < first else " (its runs existed already)"
    spread = f", standard deviation {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    line = f"{line}{when}; measured {found:.4f} (mean of {len(losses)} seed(s){spread}), {found - guess['loss']:+.4f}"
    if not predicted.known:
        return f"{line}."
    return f"{line}: {'inside' if predicted.low <= found <= predicted.high else 'OUTSIDE'} the 95% interval."


def scale_table(result: dict) -> list[Block]:
    """Each budget's best size, the law beside Chinchilla's, and what became of the prediction."""
    fit, study, every = result["fit"], result["sizes"], result["runs"] + result["held_out"]["runs"]
    cost = [r["flops"] / r["C"] for r in every]
    noise = "unknown (one seed)" if fit["noise"] is None else f"{fit['noise']:.2%}"
    epochs = max(r["D"] for r in every) / result["train_tokens"]
    points = len({(r["N"], r["D"]) for r in result["runs"]})
    notes = (
        f"{len(every)} runs on {study['dataset']}, T={study['sequence_length']}, {study['tokens_per_step']} tokens per step, "
        f"at most {epochs:.2f} epochs. N counts all parameters; counted with attention and without lookups (PaLM), a run costs "
        f"{min(cost):.2f} to {max(cost):.2f} times 6ND. Noise between seeds: {noise} of the loss; the law misses a point by "
        f"{fit['misfit']:.2%}. Intervals of the law: {study['bootstraps']} bootstraps over the (N, D); of the parabolas: the "
        f"noise alone. Chinchilla's tokens are BPE, of about four characters. "
        f"{sum(r['seconds'] for r in every) / 60:.0f} minutes of training, {result['jobs']} at a time. {machine_line(result)}."
        f"{too_few(points, 'model', len(fit['law']))}"
    )
    return [budgets_table(result), law_table(fit), held_out_line(result), notes]
