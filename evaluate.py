"""Measure a model: validation loss, perplexity, bits per byte; HellaSwag.

    python evaluate.py out/shakespeare                      on the val split of the data set that the run learned from
    python evaluate.py gpt2 --dataset=shakespeare           whatever sample.py takes, on a prepared data set
    python evaluate.py gpt2 --hellaswag                     all 10,042 rows of HellaSwag's validation set
    torchrun --nproc_per_node=2 evaluate.py out/shakespeare --hellaswag --rows=1000

By default a run is measured on the tokens, and in the sequences, that its own validations take, in float32. The result goes to
out/<run>/eval.jsonl, or to the file in --out. It does not depend on the number of processes, which share tokens and rows.

HellaSwag (Zellers et al. 2019) asks which of four endings continues a text. Here in "completion style": the model gets the
text `ctx` as it is in the file, then a space and each `ending`, and nothing else: no label, no shots, no clean-up.
    acc       how often the right ending has the highest total log-probability
    acc_norm  how often it has the highest per token

build-nanogpt and llm.c do the same: 0.2859 and 0.2955 for GPT-2 124M (1558M: 0.3842 and 0.4893). lm-eval-harness puts the
activity's label before the text, removes marks like [title], and divides by characters: 0.2892 and 0.3114.
"""

import contextlib
import datetime
import functools
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import configurator
import data
from base import errors, settings
from base.errors import UserError
from base.files import write_atomically
from configurator import GPTConfig
from corpus import shards
from corpus.hellaswag import ENDINGS, Row, batch_rows, encode_row, load_rows
from engine import checkpoint, machine, parallel, restore
from engine.parallel import World
from model import GPT, KVCache, cross_entropy
from report import kinds, stats
from tokenizer import Tokenizer, token_bytes


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure, and how."""

    dataset: str = ""
    """name of a prepared data set, of which the val split is used; empty: the one that the run learned from"""
    data_dir: str = ""
    """folder of the prepared data sets (empty: the run's own, else data), and of HellaSwag's file (empty: data)"""
    tokens: int = 0
    """how many tokens from the start of the split; 0: as many as the run's own validations, else 1,048,576"""
    sequence_length: int = 0
    """T, tokens per sequence; 0: as in the run's own validations, else the model's block_size"""
    hellaswag: bool = False
    """HellaSwag instead of a validation loss (with --dataset: both)"""
    rows: int = 0
    """HellaSwag: so many rows, spread evenly over the file; 0: all 10,042"""
    batch_size: int = 0
    """sequences of block_size tokens, or as many tokens, in one forward pass; 0: 16,384 tokens on a GPU, 2,048 on a CPU"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """autocast precision of matmuls (weights stay float32)"""
    compile: bool = False
    """torch.compile for the validation loss (HellaSwag's batches have too many shapes)"""
    out: str = ""
    """write the result to this JSON file, in the form of those in results/"""

    def __post_init__(self):
        settings.check_types(vars(self), EvalConfig)
        settings.check_at_least(self, 0, "tokens", "sequence_length", "rows", "batch_size")
        if self.rows and not self.hellaswag:
            raise UserError(f"rows={self.rows} needs --hellaswag")


# ---- validation -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module, what: str, total: int, unit: str, world: World):
    """Evaluation mode without gradients, and a progress bar: with … as bar."""
    was_training = model.training
    model.eval()
    silent = None if world.is_main else True  # None: where there is no terminal
    try:
        with torch.no_grad(), tqdm(total=total, desc=what, unit=unit, leave=False, disable=silent) as bar:
            yield bar
    finally:
        model.train(was_training)


def validation(
    net: nn.Module,
    stream: shards.TokenStream,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    T: int,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    world: World = World(),  # noqa: B008 - frozen
    broken_off: Callable[[], bool] = lambda: False,
    standard_error: bool = False,
) -> dict | None:
    """The model on the first `tokens` targets of a split: the same ones always, whatever the batch and world size.

    Returns {loss, in nats per token; perplexity, exp(loss); bits_per_byte of the text that the targets are (what ends a
    document costs bits and has no bytes); tokens; bytes} in every process; with standard_error also that of the loss over its
    sequences (None for a single one) and how many those are, from net's logits. net: a GPT, or what is wrapped around one. Each
    process calls it equally often, so it may be sharded. None if broken_off(), asked before each batch, returns True.
    """
    sizes = torch.tensor(token_bytes(tokenizer))
    sums = torch.zeros(7, dtype=torch.float64)  # on the CPU: mps has no float64
    total = min(len(stream) - 1, tokens)
    with evaluating(net, "validation", total, "tok", world) as bar:
        for x, y in data.validation_batches(stream, T, tokens, batch_size, world.rank, world.size):
            if broken_off():
                return None
            n = (y >= 0).sum(1).double()  # targets of each sequence
            with autocast():
                if standard_error:
                    nats = cross_entropy(net(x.to(device)), y.to(device), "none").view(y.shape).cpu().double().sum(1)
                else:
                    nats = net(x.to(device), y.to(device)).item() * n
            if n.any():  # else this process has run out: the mean over nothing is NaN
                terms = (nats, n, sizes[y[y >= 0]], n > 0, nats**2, nats * n, n**2)  # sizes: bytes; n > 0: sequences
                sums += torch.tensor([v.sum().item() for v in terms], dtype=torch.float64)
            bar.update(min(x.numel() * world.size, total - bar.n))
    nats, count, size, sequences, *squares = summed(sums, device).tolist()
    loss = nats / count
    found = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size if size else math.nan,  # a text of document ends alone has no bytes
        "tokens": int(count),
        "bytes": int(size),
    }
    if standard_error:
        found |= {"standard_error": stats.error_of_ratio(loss, count, int(sequences), *squares), "sequences": int(sequences)}
    return found


def summed(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of float64 numbers, on the CPU. (nccl wants them on its GPU; mps is always alone.)"""
    return values if device.type == "mps" else parallel.all_reduce_sum(values.to(device)).cpu()


# ---- HellaSwag --------------------------------------------------------------------------------------------------------


def score_endings(model: GPT, context: Tensor, endings: Tensor) -> Tensor:
    """Log-probability, in nats, of each ending (B, 4, E), padded with -100, after its context (B, S): (B, 4) float64.

    A context is computed once, not four times: all endings attend to one KV cache's keys and values.
    """
    (B, S), E, device = context.shape, endings.size(2), context.device
    cfg, dtype = model.cfg, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    shape = GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=S + E - 1)  # only as needed
    once, each = KVCache(replace(shape, block_size=S), B, device, dtype), KVCache(shape, B * ENDINGS, device, dtype)
    first = model(context, cache=once, last_only=True)  # (B, 1, V): of every ending's first token
    each.k[..., :S, :], each.v[..., :S, :] = (t.repeat_interleave(ENDINGS, dim=1) for t in (once.k, once.v))
    each.length = S
    targets = endings.flatten(0, 1)  # (4B, E)
    later = model(targets[:, :-1].clamp(min=0), cache=each)  # (4B, E - 1, V)
    first = cross_entropy(first.repeat_interleave(ENDINGS, dim=0), targets[:, :1], "none").view(-1, 1)
    later = cross_entropy(later, targets[:, 1:], "none").view(-1, E - 1)
    return -torch.cat((first, later), dim=1).cpu().double().sum(1).view(B, ENDINGS)


def score_rows(
    model: GPT,
    encoded: list[tuple],
    *,
    batch_tokens: int,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    world: World = World(),  # noqa: B008 - frozen
    broken_off: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Total log-probability of each ending, (rows, 4) float64, the same in every process. Arguments as in hellaswag()."""
    device = model.lm_head.weight.device
    scores = torch.zeros(len(encoded), ENDINGS, dtype=torch.float64)
    batches = batch_rows(encoded, batch_tokens)
    rounds = -(-len(batches) // world.size)  # below, not compiled: each batch has a shape of its own
    with evaluating(model, "HellaSwag", len(encoded), "row", world) as bar, torch.compiler.set_stance("force_eager"):
        for number in range(world.rank, rounds * world.size, world.size):
            if broken_off():
                return None
            batch = batches[number % len(batches)]  # a process that has run out repeats others': sharded weights need it
            # two tokens at least: the second pass must exist, in every process
            E = max(2, *(len(ending) for i in batch for ending in encoded[i][1]))
            endings = [[ids + [-100] * (E - len(ids)) for ids in encoded[i][1]] for i in batch]
            contexts = torch.tensor([encoded[i][0] for i in batch])
            with autocast():
                found = score_endings(model, contexts.to(device), torch.tensor(endings).to(device))
            if number < len(batches):
                scores[batch] = found
            bar.update(min(len(batch) * world.size, len(encoded) - bar.n))
    return summed(scores, device)  # each row has its numbers in one process and zeros in all others: nothing is rounded


def hellaswag(model: GPT, tokenizer: Tokenizer, rows: list[Row], **how) -> dict | None:
    """HellaSwag as the top of this file has it: {acc, acc_norm, rows, cut: rows that did not fit whole into block_size}.

    model: not compiled, not replicated (a sharded one is right). how: batch_tokens, tokens in one forward pass, a matter of
    memory and speed; autocast; world; broken_off, asked before each batch: if it returns True, so does this with None.
    """
    if model.cfg.block_size < 2:
        raise UserError(f"block_size={model.cfg.block_size} holds no text and its ending: HellaSwag needs at least 2")
    encoded = [encode_row(row, tokenizer, model.cfg.block_size) for row in rows]
    scores = score_rows(model, encoded, **how)
    if scores is None:
        return None
    lengths = torch.tensor([[len(ending) for ending in endings] for _, endings, _ in encoded])
    labels = torch.tensor([row.label for row in rows])
    acc, acc_norm = ((s.argmax(1) == labels).double().mean().item() for s in (scores, scores / lengths))
    if not scores.isfinite().all():  # a comparison of NaNs is no answer
        acc = acc_norm = math.nan
    return {"acc": acc, "acc_norm": acc_norm, "rows": len(rows), "cut": sum(cut for *_, cut in encoded)}


# ---- the command line -------------------------------------------------------------------------------------------------


def run_folder(place: str) -> tuple[Path | None, Path | None]:
    """(folder of the run, the checkpoint named or None) if a place is one of ours, else (None, None)."""
    path = Path(place)
    if checkpoint.STEP_NAME.fullmatch(path.name) and path.is_dir():
        return path.parent, path
    return (path, None) if checkpoint.candidates(path) else (None, None)


def open_split(cfg: EvalConfig, trained: configurator.Config | None, tokenizer: Tokenizer) -> shards.Dataset:
    """The data set to validate on; UserError if there is none, or if it is in other tokens than the model's."""
    if not cfg.dataset and trained is None:
        raise UserError("which data set? use --dataset=shakespeare (or another prepared one), or --hellaswag")
    folder = Path(cfg.data_dir or (trained.data_dir if trained else "data")) / (cfg.dataset or trained.dataset)
    dataset = shards.open_dataset(folder)
    if dataset.tokenizer.name != tokenizer.name:
        raise UserError(
            f"{folder} has tokens of {dataset.tokenizer.name}, the model reads those of {tokenizer.name}: prepare the text "
            f"again with --tokenizer={'gpt2' if tokenizer.name == 'gpt2' else 'path/to/its/checkpoint'} --name=another"
        )
    return dataset


def evaluate_model(place: str, cfg: EvalConfig) -> dict:
    """Load a model and measure it: the record of it, as JSON values, the same in every process."""
    device = machine.pick_device(cfg.device)
    if cfg.compile and (reason := machine.why_no_compile(device)):
        raise UserError(f"compile=True is not available here: {reason}; or use --compile=False")
    log = print if os.environ.get("RANK", "0") == "0" else lambda _: None  # before the processes are connected
    run, chosen = run_folder(place)
    folder = chosen or (restore.newest(run, log) if run else None)
    trained = restore.read_config(folder) if folder else None
    rows = load_rows(cfg.data_dir or "data", cfg.rows, log) if cfg.hellaswag else []
    model, tokenizer = restore.load_named(str(folder or place), log)
    dataset = open_split(cfg, trained, tokenizer) if cfg.dataset or not cfg.hellaswag else None
    block_size = model.cfg.block_size
    T = cfg.sequence_length or (trained.T if trained else block_size)
    if block_size < T:
        raise UserError(f"sequence_length={T} is more than the model's block_size: use --sequence_length={block_size}")
    batch_tokens = cfg.batch_size * block_size or (16_384 if device.type == "cuda" else 2_048)
    if device.type == "cpu":
        machine.set_reuse_memory()  # faulting the pages of each batch's logits in anew costs a fifth of the time

    world = parallel.start(device)
    facts = {"code": parallel.code_sha256(), "torch": torch.__version__, "data": dataset.sha256 if dataset else None}
    parallel.check_same_on_all_ranks(world, facts | {"model": str(folder or place)} | asdict(cfg))
    model = model.to(device).eval()
    how = dict(autocast=functools.partial(machine.autocast, device, cfg.dtype), world=world)
    found: dict[str, dict] = {}
    if dataset:
        tokens = cfg.tokens or (trained.eval_tokens if trained else 1_048_576)
        began = time.perf_counter()
        sizes = dict(tokens=tokens, T=T, batch_size=max(1, batch_tokens // T), device=device, standard_error=True)
        result = validation(torch.compile(model) if cfg.compile else model, dataset.split("val"), tokenizer, **sizes, **how)
        about = {"dataset": dataset.folder.name, "data_sha256": dataset.sha256, "sequence_length": T}
        found["validation"] = result | about | {"seconds": time.perf_counter() - began}
    if rows:
        began = time.perf_counter()
        result = hellaswag(model, tokenizer, rows, batch_tokens=batch_tokens, **how)
        found["hellaswag"] = result | {"seconds": time.perf_counter() - began}
    if not all(math.isfinite(r.get("loss", 0.0)) and math.isfinite(r.get("acc", 0.0)) for r in found.values()):
        remedy = ", or float16 is too narrow: use --dtype=float32" if cfg.dtype == "float16" else ""
        raise UserError(f"{place}: the model's output is not finite: its weights are damaged{remedy}")
    step = int(checkpoint.STEP_NAME.fullmatch(folder.name)[1]) if folder else None
    about = {"model": place, "step": step, "parameters": model.n_params(), "processes": world.size, "settings": asdict(cfg)}
    about["machine"] = machine.describe(device)
    parallel.stop()
    return about | found


def summary(record: dict) -> dict:
    """The main numbers, on one level."""
    flat = {name: record[name] for name in ("model", "step") if record[name] is not None}
    if v := record.get("validation"):
        flat |= {"dataset": v["dataset"], "val_loss": v["loss"], "standard_error": v["standard_error"]}
        flat |= {name: v[name] for name in ("perplexity", "bits_per_byte", "tokens", "sequences")}
    if h := record.get("hellaswag"):
        flat |= {"hellaswag_acc": h["acc"], "hellaswag_acc_norm": h["acc_norm"], "rows": h["rows"], "rows_cut": h["cut"]}
    return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in flat.items()}


def main(argv: list[str]) -> None:
    places, flags = settings.split_positional(EvalConfig(), argv)
    cfg = settings.parse(EvalConfig(), flags, __doc__)
    if len(places) != 1:
        raise UserError("which model? run python evaluate.py out/shakespeare (one model, then settings)")
    record = evaluate_model(places[0], cfg)
    if os.environ.get("RANK", "0") != "0":
        return
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"kind": "evaluate", "date": when, "command": "python evaluate.py " + " ".join(argv)} | record
    run, _ = run_folder(places[0])
    print(f"{kinds.as_text(record)}\n\n{json.dumps(summary(record))}")
    try:
        if cfg.out:
            write_atomically(Path(cfg.out), (json.dumps(record, indent=1) + "\n").encode())
        elif run:
            with open(run / "eval.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {cfg.out or run / 'eval.jsonl'}: {e.strerror}; use --out=another/file.json") from None


if __name__ == "__main__":
    errors.entry(main)
