"""The memory of one process of a training run, predicted before it starts: a ledger of tensors that hold no data.

The model's own forward and backward passes and AdamW's step run on fake tensors, which have shapes and no contents. A ledger
notes when the storage behind each would be allocated and freed; the peak is the largest sum. Torch's CPU operators stand in
for a GPU's, and Fused for what torch.compile makes of them.
"""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
from configurator import Config
from engine import machine, parallel
from engine.outliers import Outliers
from engine.run import Run
from forecast import cluster
from model import GPT

# Bytes in gaps of malloc's heap that no tensor fits into, as a share of the tensors of a step: fitted on most of the runs that
# LOG.md compares with their plans. Outside 10% there: shakespeare_char without kept memory +22%, two processes +13%, an eager
# naive model in float32 -28%.
HEAP_GAPS = 0.15

# what a process holds: what it is, and what changes it
KINDS = {
    "the program": "Python, torch; what compiling leaves behind, if it does",
    "weights": "float32; smaller with a smaller --n_layer, --n_embd",
    "gradients": "float32, freed after each step",
    "AdamW's moments": "two float32 a parameter; --parallel=zero1 shares them between processes",
    "16-bit weights": "autocast's copies, kept for backward",
    "activations": "grow with batch_size, T and n_layer",
    "logits": "grow with batch_size, T and the vocabulary",
    "temporaries": "of single operators, and gradients on their way",
    "copy to be saved": "from the first save on; none with --background_save=False",
    "gaps in the heap": f"an allowance for what malloc cannot reuse: {HEAP_GAPS:.0%} of the tensors",
    "held by other processes": "what --parallel=zero1 or fsdp shares out",
}

# Bytes that a process holds besides its tensors and what it held after importing train.py: the rest of torch and its caches; if
# it compiles, the compiler, and a little for each layer of a graph of the whole model. Measured with small models, torch 2.13.
PROGRAM, COMPILING, COMPILING_A_LAYER = 116 * 2**20, 210 * 2**20, 4 * 2**20


# ---- following a step -------------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that live, by kind, and keeps the counts of the moment when they were most."""

    def __init__(self):
        super().__init__()
        self.kind = "temporaries"  # of new storages
        self.logits: tuple[int, ...] = ()  # lengths of a row of logits
        self.kinds: dict[int, str] = {}  # of the storages that live, by address
        self.now: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}

    def note(self, t: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, once. kind: what it is from now on."""
        storage = t.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self.kinds.get(address)
        if known is None:
            kind = kind or ("logits" if t.dim() > 1 and t.size(-1) in self.logits else self.kind)
            weakref.finalize(storage, self._freed, address, size)
        elif kind in (None, known):
            return
        else:
            self.now[known] -= size
        self.kinds[address] = kind
        self.now[kind] = self.now.get(kind, 0) + size
        if sum(self.now.values()) > sum(self.at_peak.values()):
            self.at_peak = dict(self.now)

    def _freed(self, address: int, size: int) -> None:
        self.now[self.kinds.pop(address)] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default
        weight = is_cast and self.kinds.get(args[0].untyped_storage()._cdata) == "weights"
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                self.note(t, "16-bit weights" if weight else None)
        return found


class Fused(TorchFunctionMode):
    """Replaces dropout by what a GPU's kernels, or compiled code, keep of it (inductor's code, torch 2.13). What else the
    compiler fuses changes little: of a block it keeps as many bytes a token as eager code does (docs/many_gpus.md).
    """

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.on_gpu = on_gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout:
            return one_byte_dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and (p := kwargs["dropout_p"]):
            if self.on_gpu:  # its kernels draw their dropout anew in backward
                return func(*args, **kwargs | dict(dropout_p=0.0))
            q, k, v = args  # no fused kernel of a CPU has dropout: separate matmuls, the scores kept in float32
            return one_byte_dropout(F.softmax(q @ k.transpose(-2, -1), -1, dtype=torch.float32).to(v.dtype), p) @ v
        return func(*args, **kwargs)


def one_byte_dropout(input: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
    """The mask has one byte an element; that of the plain CPU operator has the type of its input."""
    return torch.native_dropout(input, p, True)[0] if p and training else input


class FusedLoss(torch.autograd.Function):
    """Cross-entropy in one: it reads the logits as the matmul wrote them and overwrites them with their gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0]


def fake_model(cfg: Config, fake: FakeTensorMode) -> GPT:
    """A model with parameters of fake tensors on a CPU, to which autocast applies."""
    with torch.device("meta"):
        gpt = GPT(cfg)
    made: dict[Tensor, nn.Parameter] = {}
    with fake:
        for module in gpt.modules():
            for name, p in module._parameters.items():
                if p is not None:  # a shared one is made once
                    module._parameters[name] = made.setdefault(p, nn.Parameter(torch.empty(p.shape)))
    return gpt


def fake_run(cfg: Config, gpt: GPT, optimizer: torch.optim.Optimizer, processes: int) -> Run:
    """A run of one process on batches without contents, with at most two micro-steps: they stand for any number."""
    micro_batch, accumulation = cfg.split_step(processes)

    def batch(*_) -> list[Tensor]:
        return [torch.empty(micro_batch, cfg.T, dtype=torch.int64) for _ in range(2)]

    models = dict(model=gpt, compiled=gpt, train_model=gpt, optimizer=optimizer)
    inputs = dict(dataset=None, batches=SimpleNamespace(batch=batch))
    place = dict(world=parallel.World(), device=torch.device("cpu"), scaler=torch.amp.GradScaler("cpu", enabled=False))
    split = dict(micro_batch=micro_batch, accumulation=min(accumulation, 2))
    return Run(cfg=replace(cfg, prefetch=False), chosen=[], outliers=Outliers(cfg), **models, **inputs, **place, **split)


def follow(cfg: Config, processes: int, accumulate: Callable[[Run, int], Tensor]) -> Ledger:
    """The ledger of a step, not the first, of a run whose config is resolved, in one of its processes as if it shared nothing
    with the others. accumulate: train.accumulate."""
    ledger, fake = Ledger(), FakeTensorMode()
    gpt = fake_model(cfg, fake)
    with fake:
        parameters, late = list(gpt.parameters()), []
        with ledger:
            for p in parameters:
                ledger.note(p, "weights")
                p.grad = torch.empty_like(p)
                ledger.note(p.grad, "gradients")
                p.register_post_accumulate_grad_hook(lambda p: ledger.note(p.grad, "gradients"))
            optimizer = optim.adamw(cfg, gpt)
            optimizer.step()  # makes the moments
            for state in optimizer.state.values():
                for t in state.values():
                    ledger.note(t, "AdamW's moments")
            if processes == 1 or cfg.parallel == "fsdp":  # DistributedDataParallel's buckets stay from step to step
                optimizer.zero_grad(set_to_none=True)
            if cfg.compile:
                gpt.head = lambda x, targets: FusedLoss.apply(gpt.lm_head(gpt.transformer.ln_f(x)))
                if cfg.compile_scope == "model":  # one graph hands over all its gradients when it ends
                    for p in parameters:
                        p.register_hook(lambda gradient, p=p: late.append(gradient) if p.grad is not None else None)

            def begin_forward(*_) -> None:
                late.clear()
                ledger.kind = "activations"

            gpt.register_forward_pre_hook(begin_forward)
            gpt.register_forward_hook(lambda *_: setattr(ledger, "kind", "temporaries"))
            ledger.logits = (cfg.vocab_size, cfg.padded_vocab_size)
            run = fake_run(cfg, gpt, optimizer, processes)
            ledger.at_peak = dict(ledger.now)
            with Fused(cfg.device == "cuda") if cfg.compile or cfg.device == "cuda" else contextlib.nullcontext():
                accumulate(run, 0)
            late.clear()
            ledger.logits = ()
            optimizer.step()
            run.reader.shutdown()
    return ledger


# ---- from tensors to a process ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a plan is made for: the machine, the processes, and the code that trains in them."""

    hardware: str | None  # None: a GPU that is not here
    able: machine.Abilities
    processes: int
    free: int | None  # bytes of memory that one process can have; None: not known
    total: int | None
    imported: int  # bytes that a process holds after importing train.py
    accumulate: Callable[[Run, int], Tensor]  # train.accumulate


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process: of the process itself on a CPU, on the device on a GPU."""

    micro_batch: int
    accumulation: int
    parts: dict[str, int]  # what it holds at the peak of its steps
    saving: int = 0  # the peak if its only background save comes after its last step, else 0
    host: int = 0  # what a GPU's process holds in the host's memory for a background save

    @property
    def training(self) -> int:
        """The peak of its steps."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        return max(self.training, self.saving)


def saves(cfg: Config) -> int:
    """How many checkpoints a run writes, if every validation is the best so far."""
    often, last = [cfg.checkpoint_interval, *([cfg.eval_interval] if cfg.keep_best else [])], cfg.max_steps
    return len({last}.union(*(range(interval, last + 1, interval) for interval in often)))


def memory(cfg: Config, target: Target) -> Memory:
    """What one process of a resolved run takes."""
    n = target.processes
    parts = dict(follow(cfg, n, target.accumulate).at_peak)
    found = dict(zip(("micro_batch", "accumulation"), cfg.split_step(n), strict=True))
    owned = 1.0  # of weights and moments, by the process that saves them
    if n > 1 and cfg.parallel != "ddp":
        owned = 1 / n if cfg.parallel == "fsdp" else (1 + 2 / n) / 3
        elsewhere = cluster.state_bytes(cfg, cfg.parallel, n) - cluster.state_bytes(cfg, "ddp", n)
        parts["held by other processes"] = int(elsewhere)
    copy = int(3 * parts["weights"] * owned) if cfg.background_save else 0
    if cfg.device == "cuda":
        return Memory(**found, parts=parts, host=copy)
    whole_graph = COMPILING_A_LAYER * cfg.n_layer * (cfg.compile_scope == "model")
    base, often = target.imported + (COMPILING + whole_graph if cfg.compile else PROGRAM), saves(cfg) > 1
    parts["gaps in the heap"] = int(HEAP_GAPS * sum(parts.values()))
    held = parts["weights"] + parts["AdamW's moments"] + parts.get("held by other processes", 0)
    saving = 0 if often or not copy else base + int((1 + HEAP_GAPS) * held) + copy
    copied = {"copy to be saved": copy} if often else {}
    return Memory(**found, parts={"the program": base} | parts | copied, saving=saving)
