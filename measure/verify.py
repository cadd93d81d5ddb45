"""Prove that the settings of the ladder change the speed and nothing else: python bench.py verify

Each is switched on alone, on top of plain float32, and in the order of the ladder, on top of all before it. Then the real
train.train_step takes one step, and its logits, loss, gradient norm, gradients and update are compared with a float64
reference that shares no line with model.py or optim.py: otherwise a wrong line in them would be in both. Before that,
equalities: accumulated = whole, two processes = one, padded = unpadded, cached = uncached, import -> export = identity.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import sample
import train
from base.errors import UserError
from configurator import Config
from engine import pretrained
from engine.effective import effective, mismatches
from engine.outliers import TrainingStopped
from engine.run import Run, build
from measure.config import BenchConfig
from measure.fresh import in_fresh_process
from measure.ladder import load_ladder, unavailable
from measure.results import header
from measure.rounds import UntilCtrlC
from model import GPT, KVCache

# Correct, but no rungs: a second way to compile, and the precision of GPUs without bfloat16.
BESIDE_THE_LADDER = [{"compile": True, "compile_scope": "block"}, {"dtype": "float16"}]

# The largest error ‖found - expected‖ / ‖expected‖ that passes, by how matmuls read their numbers. Rounding to m bits of
# mantissa is off by up to u = 2^-(m+1) of a number; the sums average most of that out and are float32 themselves, which the
# 1e-5 is for. So 4 u + 1e-5: measured are 7.6e-3 (bfloat16), 1.0e-3 (float16) and 3.5e-6 (float32), at 4 and at 12 layers
# alike. TF32 has 10 bits, but tensor cores cut the rest off instead of rounding it, which costs one more (2.5e-3, simulated).
MANTISSA_BITS = {"ieee": 23, "tf32": 9, "float16": 10, "bf16": 7, "bfloat16": 7}
TOLERANCE = {how: 4 * 2.0 ** -(bits + 1) + 1e-5 for how, bits in MANTISSA_BITS.items()}
KINDS = ("logits", "loss", "norm", "gradients", "update")


def tolerance(cfg: Config) -> float:
    return TOLERANCE[cfg.fp32_precision if cfg.dtype == "float32" else cfg.dtype]


# ---- what is compared --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one training step of a run did, as CPU tensors by name; the vocabulary without its padding rows."""

    logits: dict[str, Tensor]
    loss: dict[str, Tensor]
    norm: dict[str, Tensor]  # of the gradients before clipping
    gradients: dict[str, Tensor]  # clipped, as the optimizer reads them
    update: dict[str, Tensor]  # parameter after - before: the parameter itself would hide an update a thousand times smaller
    wrong: list[str]  # toggles that were asked for and are not on


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ‖a - b‖ / ‖b‖ over the tensors of one kind; NaN if anything is NaN.

    A tensor whose numbers are all but zero beside the others' would be compared with its own rounding: its norm counts as
    at least a thousandth of what its size would give it.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    expected = {name: b.double() for name, b in expected.items()}
    typical = math.sqrt(sum(b.square().sum().item() for b in expected.values()) / sum(b.numel() for b in expected.values()))
    errors = [
        (found[name].double() - b).norm() / max(b.norm().item(), 1e-3 * typical * math.sqrt(b.numel()))
        for name, b in expected.items()
    ]
    return torch.stack(errors).max().item()  # unlike Python's max, it keeps a NaN


@torch.no_grad()
def fill(model: GPT) -> None:
    """Weights as if training had been under way: logits and attention scores of order 1, nothing zero, so that nothing can
    hide. The same for every config; padding rows hold ones, which must not matter.
    """
    random = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        values = torch.randn(shared(name, p, model.cfg).shape, generator=random)
        values *= 1 / math.sqrt(p.size(1)) if p.dim() == 2 else 0.3
        if name.endswith("weight") and p.dim() == 1:
            values += 1  # a LayerNorm's gain
        p.fill_(1.0)[: values.size(0)] = values.to(p.device)


def is_vocabulary(name: str) -> bool:
    return name in ("transformer.wte.weight", "lm_head.weight")


def shared(name: str, tensor: Tensor, cfg: Config) -> Tensor:
    """A parameter, or something of its shape, without the vocabulary's padding rows."""
    return tensor[: cfg.vocab_size] if is_vocabulary(name) else tensor


def one(value: Any) -> dict[str, Tensor]:
    """A kind that has a single tensor."""
    return {"": torch.as_tensor(value, dtype=torch.float64)}


# ---- the reference -----------------------------------------------------------------------------------------------------


def reference_logits(W: dict[str, Tensor], cfg: Config, idx: Tensor) -> Tensor:
    """GPT-2 in plain tensor arithmetic, from the papers and not from model.py: (B, T) ids -> (B, T, V) float64."""
    B, T = idx.shape

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * W[f"{name}.weight"] + W[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ W[f"{name}.weight"].T + W[f"{name}.bias"]

    x = W["transformer.wte.weight"][idx] + W["transformer.wpe.weight"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for layer in range(cfg.n_layer):
        h = f"transformer.h.{layer}"
        q, k, v = (
            t.reshape(B, T, cfg.n_head, -1).transpose(1, 2)
            for t in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        )
        scores = (q @ k.mT / math.sqrt(cfg.n_embd // cfg.n_head)).masked_fill(future, -math.inf).exp()
        y = scores / scores.sum(-1, keepdim=True) @ v
        x = x + linear(y.transpose(1, 2).reshape(B, T, -1), f"{h}.attn.c_proj")
        y = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ W.get("lm_head.weight", W["transformer.wte.weight"]).T


MOMENT_STEPS = 10  # optimizer steps that the moments stand for


def reference_step(cfg: Config) -> tuple[Found, dict[str, float]]:
    """(one optimizer step in float64 on the CPU, the mean square of each parameter's clipped gradient).

    Those mean squares are the second moments that the step starts from, here and in take_steps(), as if ten steps with such
    gradients and no common direction lay behind. From zero moments AdamW's first step is lr·sign(gradient), in which the
    rounding of a gradient near 0 decides over a full step: its error would be the square root of the gradient's. From
    here the update is smooth in the gradient, and as well-conditioned as it.
    """
    run = build(replace(cfg, device="cpu", reuse_memory=False, processes=0))
    fill(run.model)
    W = {name: shared(name, p.detach(), cfg).double().requires_grad_() for name, p in run.model.named_parameters()}
    x, y = whole_step(run)
    logits = reference_logits(W, cfg, x)
    loss = (logits.exp().sum(-1).log() - logits.gather(-1, y[..., None])[..., 0]).mean()
    loss.backward()
    norm = math.sqrt(sum(w.grad.square().sum().item() for w in W.values()))
    gradients = {name: w.grad * min(1.0, cfg.grad_clip / norm) for name, w in W.items()}
    mean_squares = {name: g.square().mean().item() for name, g in gradients.items()}
    update, t = {}, MOMENT_STEPS + 1
    for name, g in gradients.items():  # Loshchilov & Hutter 2019, algorithm 2
        m = (1 - cfg.beta1) * g
        v = cfg.beta2 * mean_squares[name] + (1 - cfg.beta2) * g * g
        decay = cfg.weight_decay if g.dim() == 2 else 0.0
        adam = m / (1 - cfg.beta1**t) / ((v / (1 - cfg.beta2**t)).sqrt() + 1e-8)
        update[name] = -cfg.learning_rate * (adam + decay * W[name].detach())
    return Found(one(logits.detach()), one(loss.detach()), one(norm), gradients, update, []), mean_squares


# ---- the real thing ----------------------------------------------------------------------------------------------------


def whole_step(run: Run) -> list[Tensor]:
    """Inputs and targets of all sequences of step 0, of all processes, as one batch on the CPU."""
    return run.batches.batch(0, 0, run.cfg.tokens_per_step // run.cfg.T, 1, 0, 1)


def take_steps(cfg: Config, mean_squares: dict[str, float], steps: int = 1) -> Found:
    """Build a run and let train.train_step take its first step (or steps: the loss, norm and gradients are the last one's)."""
    run = build(cfg)
    fill(run.model)
    parameters = dict(run.model.named_parameters())
    for name, p in parameters.items():
        counter = torch.tensor(float(MOMENT_STEPS), device=run.device if run.cfg.fused_adamw else "cpu")
        moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.full_like(p, mean_squares[name]))
        run.optimizer.state[p] = dict(step=counter, **moments)
    before = {name: p.detach().cpu().double() for name, p in parameters.items()}
    gradients: dict[str, Tensor] = {}
    run.optimizer.register_step_post_hook(  # the fused kernel clips as it reads
        lambda *_: gradients.update({name: p.grad.detach().clone().cpu() for name, p in parameters.items()})
    )
    x = whole_step(run)[0].to(run.device)
    # with gradients on, compiled blocks are those that training runs; a compiled model is another graph without targets anyway
    with torch.set_grad_enabled(cfg.compile_scope == "block"), run.autocast():
        logits = torch.cat([run.compiled(part).detach().cpu() for part in x.split(run.micro_batch)])
    for step in range(steps):
        gradients.clear()
        for _ in range(16):  # float16's scaler leaves steps out, and scales by half, until no gradient overflows
            result = train.train_step(run, step)
            if gradients:
                break
        else:
            raise TrainingStopped(step, "16 steps in a row overflow")
    update = {name: p.detach().cpu().double() - before[name] for name, p in parameters.items()}
    on = effective(run)
    wrong = mismatches(run, on)
    for name in filter(is_vocabulary, parameters):
        if gradients[name][cfg.vocab_size :].any():
            wrong.append(f"the padding rows of {name} receive a gradient")
    gradients, update = ({name: shared(name, t, cfg) for name, t in kind.items()} for kind in (gradients, update))
    run.close()
    return Found(one(logits), one(result.loss), one(result.grad_norm), gradients, update, wrong)


def steps_in_two_processes(cfg: Config, mean_squares: dict[str, float], steps: int = 1) -> Found:
    """take_steps() under torchrun: what the first process found. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.pt")
        result = in_fresh_process(cfg, "steps", mean_squares=mean_squares, steps=steps, found=str(found))
        if "error" in result:  # no UserError: that would count as "this machine cannot"
            raise RuntimeError(result["error"])
        return Found(**torch.load(found, weights_only=True))


def keep_steps(cfg: Config, job: dict) -> dict:
    """What each of those processes does."""
    found = take_steps(cfg, job["mean_squares"], job["steps"])
    if os.environ["RANK"] == "0":
        torch.save(vars(found), job["found"])
    return {}


# ---- what is to be verified --------------------------------------------------------------------------------------------


def base_config(data_dir: str, device: torch.device, small: bool) -> Config:
    """The ladder's first rung, at a size for verifying."""
    cfg = load_ladder()[0].cfg
    if small:
        size = dict(n_layer=2, n_head=2, n_embd=64, block_size=32)
    elif device.type == "cuda":
        size = dict(block_size=256)  # GPT-2 124M
    else:
        size = dict(n_layer=4, n_head=4, n_embd=256, block_size=64)
    return replace(
        cfg,
        **size,
        sequence_length=0,
        tokens_per_step=2 * cfg.batch_size * size["block_size"],  # two micro-batches; four and one come up as well
        # Far more than a model would bear, so that the update is not lost in the rounding of a float32 parameter.
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        device=device.type,
        data_dir=data_dir,
    )


def rungs() -> list[dict[str, Any]]:
    """{field: value} that each rung of the ladder changes."""
    return [{field: value for field, (_, value) in rung.changes.items()} for rung in load_ladder()[1:]]


def plan(base: Config, device: torch.device, small: bool) -> dict[Config, str]:
    """{config: name} of every toggle alone and of the ladder's rungs, each on top of those before it that are available here.

    Those that reuse freed memory come last: it cannot be undone.
    """

    def named(change: dict[str, Any]) -> str:
        return ", ".join(f"{field}={value}" for field, value in change.items())

    rows = {base: "float32 as written"}
    for change in [*rungs(), *BESIDE_THE_LADDER]:
        if "processes" not in change:  # two processes alone: one of the equalities
            rows.setdefault(replace(base, **change), f"alone: {named(change)}")
    current = base
    for change in rungs():
        if small and "compile" in change:  # the ladder by blocks, in a third of the time; the model as one graph only alone
            change |= {"compile_scope": "block"}
        cfg = replace(current, **change)
        rows.setdefault(cfg, f"ladder: + {named(change)}")
        current = current if unavailable(cfg, device) else cfg
    return dict(sorted(rows.items(), key=lambda item: item[0].reuse_memory))


# ---- equalities --------------------------------------------------------------------------------------------------------

Outcome = tuple[dict[str, float], list[str]]  # ({kind: error}, what is wrong besides)


def compare(found: Found, expected: Found) -> Outcome:
    return {kind: error(getattr(found, kind), getattr(expected, kind)) for kind in KINDS}, found.wrong + expected.wrong


def cached_as_uncached(base: Config, device: torch.device) -> Outcome:
    """Logits of a sequence read at once, and through the cache in pieces; greedy tokens far beyond block_size."""
    model = GPT(replace(base, attention="sdpa")).to(device).eval()
    fill(model)
    T = base.block_size
    idx = torch.randint(base.vocab_size, (2, T), generator=torch.Generator().manual_seed(2)).to(device)
    cache = KVCache(base, 2, device, torch.float32)
    with torch.inference_mode():
        pieces = torch.cat([model(piece, cache=cache) for piece in idx.split([T - 8, 4, 1, 1, 1, 1], dim=1)], dim=1).cpu()
        whole = model(idx).cpu()
    with_cache, without = (
        list(sample.generate(model, idx[0, : T // 2].tolist(), T, temperature=0, kv_cache=on)) for on in (True, False)
    )
    return {"logits": error({"": pieces}, {"": whole})}, [] if with_cache == without else ["the greedy tokens differ"]


def exported_as_imported(base: Config) -> Outcome:
    """Our weights -> Hugging Face layout -> our weights -> the same layout, bit for bit, tied and untied."""
    wrong = []
    for tied in (True, False):
        model = GPT(replace(base, tie_weights=tied))
        fill(model)
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder, "first"), Path(folder, "second")
            pretrained.save_hf_dir(model, first)
            again = pretrained.load_hf_dir(first)
            pretrained.save_hf_dir(again, second)
            files = [(place / "model.safetensors").read_bytes() for place in (first, second)]
        weights = zip(model.named_parameters(), again.named_parameters(), strict=True)
        if not all(m == n and torch.equal(p, q) for (m, p), (n, q) in weights):
            wrong.append(f"tie_weights={tied}: the weights differ")
        if files[0] != files[1]:
            wrong.append(f"tie_weights={tied}: the files differ")
    return {}, wrong


# ---- all checks ----------------------------------------------------------------------------------------------------------


def row(check: str, against: str, limit: float, outcome: Callable[[], Outcome]) -> dict:
    """One row of the result. What this machine cannot run is skipped; whatever else is not as it should be has failed."""
    errors, status = {}, "passed"
    try:
        errors, wrong = outcome()
        wrong = [kind for kind, e in errors.items() if not e <= limit] + wrong  # NaN is not <= anything
        if wrong:
            status = "FAILED: " + "; ".join(wrong)
    except UserError as e:
        status = ("FAILED: " if isinstance(e, TrainingStopped) else "skipped: ") + str(e)
    except RuntimeError as e:  # a compiler's, a kernel's
        status = f"FAILED: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    finite = {kind: e if math.isfinite(e) else None for kind, e in errors.items()}  # JSON has no NaN
    return {"check": check, "against": against, "tolerance": limit, "errors": finite, "status": status}


def verdict(rows: list[dict]) -> dict:
    return {"rows": rows, "passed": not any(r["status"].startswith("FAILED") for r in rows)}


def verify(data_dir: str, device: torch.device, small: bool, keep: Path) -> dict:
    """{"rows": [{check, against, tolerance, errors: {kind: number, or None if not finite}, status}], "passed": bool}. Each row
    is printed, and added to the file `keep`, as soon as it is done.

    status is "passed", "skipped: why this machine cannot" or "FAILED: what". Best called in a process of its own: it leaves
    reuse_memory on. UserError if there is no data set.
    """
    base = base_config(data_dir, device, small)
    expected, mean_squares = reference_step(base)

    def take(cfg: Config, steps: int = 1) -> Found:
        if reason := unavailable(cfg, torch.device(cfg.device)):
            raise UserError(reason)
        return (steps_in_two_processes if cfg.processes > 1 else take_steps)(cfg, mean_squares, steps)

    whole = replace(base, batch_size=base.tokens_per_step // base.T)
    split = replace(base, batch_size=1)
    padded = replace(base, vocab_multiple=128)
    # one GPU cannot hold two processes of nccl; gloo's on the CPU run the same lines
    alone = replace(base, device="cpu") if unavailable(replace(base, processes=2), device) else base
    exact = TOLERANCE["ieee"]
    checks: list[tuple[str, str, float, Callable[[], Outcome]]] = [
        ("accumulated micro-batches of 1", "one batch", exact, lambda: compare(take(split), take(whole))),
        ("2 processes, 2 steps", "1 process", exact, lambda: compare(take(replace(alone, processes=2), 2), take(alone, 2))),
        ("padded vocabulary", "unpadded", exact, lambda: compare(take(padded), take(base))),
        ("cached", "uncached", exact, lambda: cached_as_uncached(base, device)),
        ("import -> export", "identity", 0.0, lambda: exported_as_imported(base)),
    ]
    checks += [
        (name, "float64", tolerance(cfg), lambda cfg=cfg: compare(take(cfg), expected))
        for cfg, name in plan(base, device, small).items()
    ]
    rows = []
    with tqdm(checks, disable=None, unit="check") as bar:
        for check in bar:
            bar.set_description(check[0])
            rows.append(row(*check))
            tqdm.write(f"{rows[-1]['check']:<48} {rows[-1]['status'].partition(':')[0]}")
            with keep.open("a", encoding="utf-8") as f:
                f.write(json.dumps(rows[-1]) + "\n")
    return verdict(rows)


def command(sizes: BenchConfig, device: torch.device) -> dict:
    """python bench.py verify: every setting against float64; of a small model with --quick."""
    cfg = Config(device=device.type, data_dir=sizes.data_dir)
    result: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder, "rows.jsonl")
        with UntilCtrlC() as until:
            result = in_fresh_process(cfg, "verify", small=sizes.quick, keep=str(keep))
        if until.interrupted:  # the worker has ended as well: what it left
            lines = keep.read_text(encoding="utf-8").splitlines() if keep.is_file() else []
            result = verdict([json.loads(line) for line in lines])
    if "error" in result:
        raise UserError(result["error"])
    return header("verify", sizes) | until.note(result["rows"]) | result
