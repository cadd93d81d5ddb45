"""How fast a model decodes in each form, beside the floor: its weights, read once per token. `python bench.py decode` asks."""

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import evaluate
from configurator import Config
from corpus.shards import open_dataset
from engine import machine, restore
from kernels import decode as kernel
from model import GPT
from sample import generate
from variants import quantize

if TYPE_CHECKING:
    from bench import BenchConfig


def tokens_per_s(net: Callable, prompt: list[int], B: int, count: int) -> float:
    """Of generate(), greedily, for B sequences, after the first token: that one reads the prompt."""
    times, began = [], time.perf_counter()
    for _ in generate(net, prompt, count, num_samples=B, temperature=0):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return B * (count - 1) / sum(times[1:])


def transformers_tokens_per_s(net: Any, prompt: list[int], B: int, count: int) -> float:
    """The same of transformers' generate()."""
    ids, seconds = torch.tensor([prompt] * B, device=net.device), []
    for n in (1, count):
        began = time.perf_counter()
        net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False)
        machine.synchronize(net.device)
        seconds.append(time.perf_counter() - began)
    return B * (count - 1) / (seconds[1] - seconds[0])


def validate(where: str, forms: dict[str, GPT], sizes: "BenchConfig", device: torch.device) -> dict[str, dict]:
    """{form: evaluate.validation()} of a run of ours, on what it validated on while it learned; {} for another model."""
    run, chosen = evaluate.run_folder(where)
    if not run:
        return {}
    trained = restore.read_config(chosen or restore.newest(run))
    text = open_dataset(Path(sizes.data_dir) / trained.dataset)
    how = dict(tokens=trained.T if sizes.quick else trained.eval_tokens, T=trained.T, batch_size=max(1, 512 // trained.T))
    split = text.split("val")
    return {f: evaluate.validation(model, split, text.tokenizer, device=device, **how) for f, model in forms.items()}


def measure(where: str, sizes: "BenchConfig", device: torch.device) -> dict:
    """Tokens/s of a model (none: GPT-2 124M with random weights) in each form, one sequence or many, interleaved; the bytes
    that a token reads; the rate of a copy, taken before and after each measurement.
    """
    batches = (1, 64) if device.type == "cuda" else (1,)
    forms: dict[str, GPT] = {}
    for form in ("float32", "bfloat16", *quantize.FORMS):
        torch.manual_seed(0)
        model = restore.load_model(where, print)[0] if where else GPT(Config(n_layer=sizes.n_layer, vocab_multiple=128))
        model = model.to(device, torch.float32 if form == "float32" else torch.bfloat16).eval()
        forms[form] = quantize.convert(model, form) if form in quantize.FORMS else model
    room = next(iter(forms.values())).cfg.block_size  # the window must not move while the clock runs
    prompt, count = list(range(min(64, room // 4))), 8 if sizes.quick else min(48, room // 2)
    ways: dict[str, tuple[str, Callable]] = {}  # name -> (form, tokens/s of a batch)
    for form, model in forms.items():
        fast = kernel.wrap(model)
        ways[f"{form}, PyTorch"] = form, lambda B, net=model: tokens_per_s(net, prompt, B, count)
        if fast is not model:
            ways[f"{form}, kernels/decode.c"] = form, lambda B, net=fast: tokens_per_s(net, prompt, B, count)
    if not where and find_spec("transformers"):
        import transformers

        shape = transformers.GPT2Config(n_layer=sizes.n_layer)
        other = transformers.GPT2LMHeadModel(shape).to(device, torch.bfloat16).eval()
        ways["bfloat16, transformers"] = "bfloat16", lambda B: transformers_tokens_per_s(other, prompt, B, count)

    read = {form: quantize.bytes_per_token(model) for form, model in forms.items()}
    entries = [
        {"name": name, "form": form, "batch": B, "bytes_per_token": read[form], "tokens_per_s": [], "copy_bytes_per_s": []}
        for B in batches
        for name, (form, _) in ways.items()
    ]
    big = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    there = torch.empty_like(big)

    def copy_rate() -> float:
        """Bytes per second, read and written, the median of nine copies: memory that others use too is not always as fast."""
        seconds = [machine.best_seconds(device, lambda: there.copy_(big), 1) for _ in range(9)]
        return 2 * big.nbytes / statistics.median(seconds)

    for number in tqdm(range(1 + sizes.rounds), desc="decode", disable=None):
        for entry in entries:
            before, speed = copy_rate(), ways[entry["name"]][1](entry["batch"])
            if number:  # the first round warms up
                entry["tokens_per_s"].append(speed)
                entry["copy_bytes_per_s"].append((before + copy_rate()) / 2)
    return {
        "model": where or f"GPT-2's shape with {sizes.n_layer} layers, random weights",
        "prompt_tokens": len(prompt),
        "new_tokens": count,
        "ways": entries,
        "validation": validate(where, forms, sizes, device) if where else {},
    }
