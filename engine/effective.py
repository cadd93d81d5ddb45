"""What is really on: read from the objects of a run, and compared with what was asked for.

A setting that silently does nothing is the characteristic bug of benchmarked code. train.py and bench.py end with an error if
mismatches() finds one.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from engine import machine, parallel
from engine.run import Run


class _Spy(TorchDispatchMode):
    """Records the dtypes that matmuls read and the attention kernels that run, below autocast and autograd."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.kernels, self.rows = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes.update(str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, Tensor))
        if name in ("bmm", "baddbmm"):
            self.rows.add(args[-2].size(-2))  # queries multiplied at a time
        if "scaled_dot_product" in name:
            self.kernels.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


def effective(run: Run) -> dict:
    """What is really on, read from the built objects and from a probe of them; call it after a step. Changes nothing: no
    random number is drawn, no gradient left.
    """
    model, device = run.model, run.device
    x, y = (t.to(device) for t in run.batches.batch(0, 0, 1, 1, 0, 1))
    # in training mode, since dropout decides which kernels can run; fork_rng restores the random state
    kept = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with kept, torch.compiler.set_stance("force_eager"), _Spy() as spy, run.autocast():
        model(x, y)
    stats = torch._dynamo.utils.counters  # what the compiler did in this process
    scope = "block" if "head" in vars(model) else "model" if run.compiled is not model else "none"  # see compile_model()
    # the compiler may fuse attention that was written out: then the naive form is not what runs
    fused = any("math" not in k for k in spy.kernels) or stats["inductor"]["fuse_attention"]
    return {
        "device": next(model.parameters()).device.type,
        "dtype": "+".join(sorted(spy.dtypes)),
        "fp32_precision": machine.fp32_precision_measured(device),
        "attention": "sdpa" if fused else "blocked" if max(spy.rows) < x.size(1) else "naive",
        "attention_kernel": "+".join(sorted(spy.kernels)) or "separate matmuls",
        "sdpa_backend": machine.sdpa_backend(device),
        "compile_scope": scope,
        "compile": scope != "none" and stats["stats"]["unique_graphs"] > 0,
        "compile_mode": mode_of(stats),
        "graphs": stats["stats"]["unique_graphs"],
        "graph_breaks": sum(stats["graph_break"].values()),
        "fused_adamw": bool(optim.inner_optimizer(run.optimizer).param_groups[0]["fused"]),
        "reuse_memory": run.cfg.reuse_memory and machine.reuses_memory(),
        "prefetch": bool(run.pending),
        "tie_weights": model.lm_head.weight is model.transformer.wte.weight,
        "padded_vocab_size": model.lm_head.weight.size(0),
        "parameters": model.n_params(),
        "parameter_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processes": parallel.size(),
        "parallel": parallel.parallel_of(run.train_model, run.optimizer),
        "state_mib": parallel.state_mib(run.model, run.optimizer, device),
        "micro_batch": run.micro_batch,
        "accumulation": run.accumulation,
        "threads": torch.get_num_threads(),
    }


def mode_of(stats: dict) -> str:
    """What torch.compile tried in this process, from what it counted: kernels timed against each other, graphs recorded."""
    if stats["inductor"]["select_algorithm_num_precompiles"] or stats["inductor"]["select_algorithm_autotune"]:
        return "max-autotune-no-cudagraphs"
    if stats["stats"]["unique_graphs"] and torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import get_manager  # one is made when a graph is first recorded

        if get_manager(torch.cuda.current_device(), create_if_none_exists=False):
            return "reduce-overhead"
    return "default"


def mismatches(run: Run, on: dict) -> list[str]:
    """Each setting that was asked for and is not what effective() found, with a remedy."""
    cfg = run.cfg
    speed = ("device", "dtype", "attention", "compile", "fused_adamw", "reuse_memory", "prefetch", "deterministic")
    asked = {name: getattr(cfg, name) for name in (*speed, "tie_weights")} | {"padded_vocab_size": cfg.padded_vocab_size}
    asked["processes"] = cfg.processes or run.world.size
    if run.world.size > 1:
        asked["parallel"] = cfg.parallel
    if cfg.compile and on["compile"]:
        asked |= {"graph_breaks": 0, "compile_scope": cfg.compile_scope, "compile_mode": cfg.compile_mode}
    if cfg.attention == "sdpa" and cfg.sdpa_backend != "any":
        asked["attention_kernel"] = f"scaled_dot_product_{cfg.sdpa_backend}_attention"
    if cfg.dtype == "float32":
        asked["fp32_precision"] = cfg.fp32_precision
    if cfg.attention == "blocked" and cfg.T <= 16:
        asked["attention"] = "naive"  # one block is all
    if cfg.attention == "sdpa" and (on["device"] == "mps" or (on["device"] == "cpu" and cfg.dropout > 0)):
        # PyTorch has no fused kernel for a CPU with dropout, and other names on mps; without one it multiplies in float32.
        # train.py logs which kernel runs.
        del asked["attention"]
        asked["dtype"] = on["dtype"] if cfg.dtype in on["dtype"].split("+") else cfg.dtype
    remedies = {
        "compile": "use --compile=False, or look for the cause with TORCH_LOGS=graph_breaks",
        "graph_breaks": "use --compile=False, or look for the cause with TORCH_LOGS=graph_breaks",
        "dtype": "use --dtype=float32",
        "padded_vocab_size": "use --vocab_multiple=1",
        "compile_mode": "it has no effect here: use --compile_mode=default",
        "attention_kernel": "this kernel does not support these shapes: use --sdpa_backend=any",
        "attention": "no fused attention kernel supports these shapes: use --attention=naive",
        "fp32_precision": "this device does not round float32 matmuls that way: use --fp32_precision=ieee",
    }
    return [
        f"{name}={value!r} was asked for, but {on[name]!r} is what runs: {remedies.get(name, f'use --{name}={on[name]}')}"
        for name, value in asked.items()
        if on[name] != value
    ]
