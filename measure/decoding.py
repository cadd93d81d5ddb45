"""How fast a model decodes: in each precision, beside the floor, which is its weights read once per token; and with and
without the KV cache.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
from base.errors import UserError
from configurator import Config
from corpus.shards import open_dataset
from engine import machine, restore
from kernels import decode as kernel
from measure.config import BenchConfig
from measure.results import header
from measure.rounds import UntilCtrlC
from model import GPT
from sample import generate
from variants import quantize


def timed_generate(net: Callable, prompt: list[int], B: int, count: int, **how: Any) -> tuple[float, list[Tensor]]:
    """(tokens/s of generate(), greedily, for B sequences, the tokens). The first is not timed: it reads the prompt."""
    times, tokens, began = [], [], time.perf_counter()
    for token in generate(net, prompt, count, num_samples=B, temperature=0, **how):
        tokens.append(token)
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return B * (count - 1) / sum(times[1:]), tokens


def transformers_tokens_per_s(net: Any, prompt: list[int], B: int, count: int) -> float:
    """The same of transformers' generate()."""
    ids, seconds = torch.tensor([prompt] * B, device=net.device), []
    for n in (1, count):
        began = time.perf_counter()
        net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False)
        machine.synchronize(net.device)
        seconds.append(time.perf_counter() - began)
    return B * (count - 1) / (seconds[1] - seconds[0])


def validation_losses(where: str, forms: dict[str, GPT], sizes: BenchConfig, device: torch.device) -> dict[str, dict]:
    """{form: evaluate.validation()} of a run of ours, on what it validated on while it trained; {} for another model."""
    run, chosen = evaluate.run_folder(where)
    if not run:
        return {}
    trained = restore.read_config(chosen or restore.newest(run))
    text = open_dataset(Path(sizes.data_dir) / trained.dataset)
    how = dict(tokens=trained.T if sizes.quick else trained.eval_tokens, T=trained.T, batch_size=max(1, 512 // trained.T))
    split = text.split("val")
    return {f: evaluate.validation(model, split, text.tokenizer, device=device, **how) for f, model in forms.items()}


def load_forms(where: str, n_layer: int, device: torch.device) -> dict[str, GPT]:
    """{"float32": a model, "bfloat16": …, "int8": …, "int4": …}; without a place GPT-2's shape with random weights."""
    forms = {}
    for form in ("float32", "bfloat16", *quantize.FORMS):
        torch.manual_seed(0)
        model = restore.load_model(where, print)[0] if where else GPT(Config(n_layer=n_layer, vocab_multiple=128))
        model = model.to(device, torch.float32 if form == "float32" else torch.bfloat16).eval()
        forms[form] = quantize.convert(model, form) if form in quantize.FORMS else model
    return forms


def ways_to_decode(
    forms: dict[str, GPT], prompt: list[int], count: int, transformers_layers: int
) -> dict[str, tuple[str, Callable[[int], float]]]:
    """{name: (form, batch size -> tokens/s)} of each form with PyTorch, with the kernel where it takes it, and of transformers'
    GPT-2 of so many layers (0: not)."""
    ways: dict[str, tuple[str, Callable[[int], float]]] = {}
    for form, model in forms.items():
        fast = kernel.wrap(model)
        ways[f"{form}, PyTorch"] = form, lambda B, net=model: timed_generate(net, prompt, B, count)[0]
        if fast is not model:
            ways[f"{form}, kernels/decode.c"] = form, lambda B, net=fast: timed_generate(net, prompt, B, count)[0]
    if transformers_layers and find_spec("transformers"):
        import transformers

        device = next(forms["bfloat16"].parameters()).device
        shape = transformers.GPT2Config(n_layer=transformers_layers)
        other = transformers.GPT2LMHeadModel(shape).to(device, torch.bfloat16).eval()
        ways["bfloat16, transformers"] = "bfloat16", lambda B: transformers_tokens_per_s(other, prompt, B, count)
    return ways


def read_rate(size: int, device: torch.device) -> float:
    """Bytes per second at which so many bytes are read, the best of nine times; from a cache if they fit."""
    held = torch.ones(size // 4, device=device)
    return held.nbytes / machine.best_seconds(device, held.sum, 9)


def decode(paths: list[str], asked: BenchConfig, device: torch.device) -> dict:
    """Tokens/s of a model (none: GPT-2 124M with random weights) in each form, one sequence or many, interleaved; the bytes
    that a token reads; how fast as many are read, the faster of once before and once after each measurement.
    """
    if len(paths) > 1:
        raise UserError(f"{paths[1]!r} is one argument too many: run python bench.py decode [out/run]")
    sizes, where = asked.by_device(device.type), "".join(paths)
    forms = load_forms(where, sizes.n_layer, device)
    positions = forms["float32"].cfg.block_size  # the window must not move while the clock runs
    prompt, count = list(range(min(64, positions // 4))), 8 if sizes.quick else min(48, positions // 2)
    ways = ways_to_decode(forms, prompt, count, 0 if where else sizes.n_layer)
    read = {form: quantize.bytes_per_token(model) for form, model in forms.items()}
    entries = [
        {"name": name, "form": form, "batch": B, "bytes_per_token": read[form], "tokens_per_s": [], "read_bytes_per_s": []}
        for B in ((1, 64) if device.type == "cuda" else (1,))
        for name, (form, _) in ways.items()
    ]
    with UntilCtrlC() as until:
        for number in tqdm(range(1 + sizes.rounds), desc="decode", disable=None):
            found = []
            for entry in entries:
                before, speed = read_rate(entry["bytes_per_token"], device), ways[entry["name"]][1](entry["batch"])
                found.append((speed, max(before, read_rate(entry["bytes_per_token"], device))))
                if number:  # the first round warms up
                    tqdm.write(f"{entry['name']:<32} {entry['batch']:>3} sequences {speed:>9,.1f} tok/s")
            for entry, (speed, rate) in zip(entries if number else [], found, strict=False):
                entry["tokens_per_s"].append(speed)
                entry["read_bytes_per_s"].append(rate)
    return (
        header("decode", sizes)
        | until.note(entries[0]["tokens_per_s"])
        | {
            "model": where or f"GPT-2's shape with {sizes.n_layer} layers, random weights",
            "prompt_tokens": len(prompt),
            "new_tokens": count,
            "ways": entries,
            "validation": validation_losses(where, forms, sizes, device) if where and not until.interrupted else {},
        }
    )


def sampling(sizes: BenchConfig, device: torch.device) -> dict:
    """Decode 124M with random weights, cached and uncached in turn: a token's cost does not depend on the weights."""
    torch.manual_seed(0)
    model = GPT(Config(n_layer=sizes.n_layer)).to(device).eval()
    prompt, count = list(range(64)), 8 if sizes.quick else 48
    speeds: dict[str, list[float]] = {"cached": [], "uncached": []}
    same = True
    with UntilCtrlC() as until:
        for number in tqdm(range(1 + sizes.rounds), desc="sampling", disable=None):
            found = {how: timed_generate(model, prompt, 1, count, kv_cache=how == "cached") for how in speeds}
            cached, uncached = ([token.item() for token in tokens] for _, tokens in found.values())
            same = same and cached == uncached
            for how, (speed, _) in found.items() if number else ():  # the first round warms up
                tqdm.write(f"{how:<10} {speed:>9,.1f} tok/s")
                speeds[how].append(speed)
    kept = {"prompt_tokens": 64, "new_tokens": count, "tokens_per_s": speeds, "same_tokens": same}
    return header("sampling", sizes) | until.note(speeds["uncached"]) | kept
