"""Settings: each setting of a training run is one field of GPTConfig or Config, defined here and nowhere else.

    python train.py config/shakespeare.py --batch_size=8
                    a file, in Python     then flags

A config file is ordinary Python that ends with a `config`: `config = Config(...)` or `config = replace(other, compile=True)`.
It is executed: use only files that you trust. After load() a Config never changes.
"""

import ast
import math
import os
import re
import runpy
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from base import nanogpt, settings
from base.errors import UserError, near_name
from base.files import ROOT
from base.settings import Settings, check_at_least, check_types, parse, split_positional

# The largest sizes read from an untrusted file: it could otherwise keep the builder of blocks busy for days, or overflow the
# size of a tensor. Published models stay several times below each.
LARGEST = {"n_layer": 1000, "n_head": 2**11, "n_embd": 2**18, "block_size": 2**24, "vocab_size": 2**22, "vocab_multiple": 2**22}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape and the mathematics of one GPT. The defaults are GPT-2 124M."""

    block_size: int = 1024
    """longest sequence, in tokens: the number of learned positions"""
    vocab_size: int = 50257
    """number of token ids (GPT-2: 50,000 merges + 256 bytes + <|endoftext|>)"""
    vocab_multiple: int = 1
    """pad the embedding's rows to a multiple of this: 128 makes 50257 into 50304, whole matmul tiles"""
    n_layer: int = 12
    """transformer blocks"""
    n_head: int = 12
    """attention heads per block"""
    n_embd: int = 768
    """width of the residual stream"""
    dropout: float = 0.0
    """probability of dropping an activation (embeddings, attention weights, residual branches)"""
    bias: bool = True
    """biases in linears and LayerNorms, as GPT-2 has them"""
    tie_weights: bool = True
    """one matrix for the token embedding and the output head (124.44M parameters instead of 163.04M)"""
    init: Literal["gpt2", "pytorch"] = "gpt2"
    """initial weights: GPT-2's normals, or what nn.Linear and nn.Embedding do by default"""
    scale_residual_init: bool = True
    """divide the initial weights of each residual branch's last linear by sqrt(2 * n_layer)"""
    attention: Literal["naive", "blocked", "sdpa"] = "sdpa"
    """naive writes out the T x T scores; blocked only those up to the diagonal, some queries at a time (the fastest on a CPU,
    compiled); sdpa is PyTorch's fused kernel (flash where the device has it)"""

    def __post_init__(self):
        check_at_least(self, 1, *LARGEST)
        if self.n_embd % self.n_head:
            near = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            best = min(near, key=lambda h: abs(h - self.n_head))
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: use --n_head={best}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size rounded up to vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def flops_per_token(self, T: int) -> int:
        """Forward and backward operations per token trained in sequences of T: 6 per matmul weight + 12·L·C·T for attention.

        Source: PaLM, appendix B (Chowdhery et al. 2022). Lookups (embeddings), norms and the optimizer are not counted.
        """
        matmul_weights = 12 * self.n_layer * self.n_embd**2 + self.padded_vocab_size * self.n_embd
        return 6 * matmul_weights + 12 * self.n_layer * self.n_embd * T


@dataclass(frozen=True, kw_only=True)
class Config(GPTConfig):
    """Everything that decides a training run. "auto" means the best that this machine can do; train.py reports what that is."""

    # what is learned from
    dataset: str = "shakespeare"
    """name of a folder in data_dir, made by prepare_data.py"""
    data_dir: str = "data"
    """where prepared data sets lie"""
    batch_order: Literal["shuffled", "sequential", "one_batch"] = "shuffled"
    """shuffled: a new permutation each epoch; sequential: as in the text; one_batch: the first batch again and again"""
    seed: int = 1337
    """of the initial weights, dropout and data order"""

    init_from: str = ""
    """start from these weights instead of random ones: gpt2, owner/name on the hub, a run, or a folder in the hub's layout"""

    # one optimizer step
    max_steps: int = 1000
    """optimizer steps in the whole run"""
    tokens_per_step: int = 524_288
    """tokens per optimizer step, over all processes; gradient accumulation follows from it"""
    sequence_length: int = 0
    """T, tokens per training sequence; 0: the whole block_size"""
    batch_size: int | Literal["auto"] = 16
    """most sequences in one forward pass of a process (the micro-batch): changes memory and speed, not what is learned;
    auto: as many as fit"""
    learning_rate: float = 6e-4
    """peak learning rate (6e-4: GPT-3 paper, table 2.1, 125M)"""
    min_lr: float = 6e-5
    """learning rate at the end of the schedule"""
    warmup_steps: int = 100
    """steps of linear warm-up; the first step already has learning_rate / warmup_steps"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls from its peak to min_lr at max_steps (constant: it does not)"""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only: biases and LayerNorm gains are never decayed"""
    beta1: float = 0.9
    """AdamW's first-moment decay"""
    beta2: float = 0.95
    """AdamW's second-moment decay"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0: no clipping"""

    # speed: nothing here changes what is learned, beyond rounding
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute; auto: the first of cuda, mps, cpu that exists"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """autocast precision of matmuls (weights stay float32); auto: bfloat16 where the hardware multiplies it"""
    fp32_precision: Literal["ieee", "tf32", "bf16"] = "ieee"
    """how float32 matmuls are computed: exactly, or from inputs rounded to TF32 (CUDA) or bf16 (CPU)"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: on where a C++ compiler is installed"""
    compile_scope: Literal["auto", "model", "block"] = "auto"
    """model: one graph; block: one transformer block, compiled once and used n_layer times (starts sooner); auto: model,
    but block under fsdp"""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead"] = "default"
    """what torch.compile tries: max-autotune times several kernels for each matmul, reduce-overhead records CUDA graphs"""
    sdpa_backend: Literal["any", "flash", "cudnn", "efficient"] = "any"
    """which of PyTorch's fused attention kernels attention=sdpa may use on CUDA; any: in PyTorch's own order"""
    fused_adamw: bool | Literal["auto"] = "auto"
    """AdamW as one kernel over all parameters instead of a loop of small ones"""
    reuse_memory: bool | Literal["auto"] = "auto"
    """CPU with glibc: keep freed memory in the process, so that no step faults its pages in again"""
    prefetch: bool = True
    """read the next micro-batch, and queue its copy from pinned memory to the GPU, while this one is computed"""
    deterministic: bool = False
    """only kernels that give the same bits every time: a resumed run is then bit for bit the one that was never interrupted"""
    processes: int = 0
    """number of processes that torchrun must have started; 0: any"""
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """what several processes shard besides the tokens: nothing (ddp), optimizer state (zero1), parameters too (fsdp)"""

    # the run
    out_dir: str = ""
    """where checkpoints and log.jsonl go; empty: out/<name of the config file>"""
    resume: bool | Literal["auto"] = False
    """continue from the newest checkpoint in out_dir; auto: if there is one, else start"""
    max_minutes: float = 0.0
    """save and exit after so many minutes, to be resumed (time limits of clusters); 0: no limit"""
    timeout_minutes: float = 10.0
    """when no step, validation or save has finished for so long, report which process is stuck, and exit"""
    log_interval: int = 10
    """steps between two log lines"""
    eval_interval: int = 250
    """steps between two validations; the last step always validates"""
    eval_tokens: int = 1_048_576
    """validate on this many tokens from the start of the validation split (or all of it, if shorter)"""
    hellaswag_interval: int = 0
    """steps between two evaluations on HellaSwag (evaluate.py); 0: none"""
    hellaswag_rows: int = 0
    """how many of its rows, spread evenly; 0: all 10,042, some minutes on a GPU"""
    sample_interval: int = 0
    """steps between two sample texts on the terminal; 0: none"""
    sample_prompt: str = ""
    """prompt of those texts; empty: the start of a document"""
    checkpoint_interval: int = 1000
    """steps between two checkpoints; the last step always saves"""
    keep_checkpoints: int = 2
    """number of newest checkpoints to keep (the second one is there in case the newest is damaged)"""
    keep_best: bool = True
    """save whenever a validation is the best so far, and keep that checkpoint besides the newest ones"""
    background_save: bool = True
    """copy the state in memory and write it while training continues; costs that copy's memory (12 bytes per parameter)"""
    outlier_z: float = 8.0
    """a loss or gradient norm so many standard deviations above the mean before it is an outlier; 0: do not look"""
    outlier_window: int = 100
    """number of steps in that mean; no verdict before there are that many"""
    on_outlier: Literal["continue", "skip", "stop"] = "continue"
    """continue: report and count it; skip: skip the optimizer step as well; stop: write a crash capsule and exit"""
    replica_interval: int = 100
    """steps between two comparisons of the processes' parameters by checksum; 0: never"""
    curve: str = ""
    """reference loss curve to compare with; empty: the config file's own, config/<name>.curve.json, if there is one; or off"""
    wandb: Literal["off", "online", "offline"] = "off"
    """log to Weights & Biases as well"""
    wandb_project: str = "nanoladder"
    """Weights & Biases project"""

    def __post_init__(self):
        check_types(vars(self), Config)
        super().__post_init__()
        check_at_least(self, 1, "tokens_per_step", "log_interval", "eval_interval", "eval_tokens", "checkpoint_interval")
        check_at_least(self, 1, "keep_checkpoints", *(["batch_size"] if self.batch_size != "auto" else []))
        check_at_least(self, 2, "outlier_window")
        check_at_least(self, 0, "max_steps", "warmup_steps", "learning_rate", "min_lr", "weight_decay", "grad_clip", "seed")
        check_at_least(self, 0, "processes", "max_minutes", "outlier_z", "replica_interval", "sample_interval")
        check_at_least(self, 0, "hellaswag_interval", "hellaswag_rows")
        if self.timeout_minutes <= 0:
            raise UserError(f"timeout_minutes={self.timeout_minutes} must be above 0")
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed} must be below 2**63")
        if self.schedule != "constant" and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: use --min_lr={self.learning_rate / 10:g}"
            )
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if not 0 <= self.sequence_length <= self.block_size:
            raise UserError(
                f"sequence_length={self.sequence_length} must lie between 1 and block_size={self.block_size} (0: block_size)"
            )
        if self.tokens_per_step % self.T:
            near = max(1, round(self.tokens_per_step / self.T)) * self.T
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of the sequence length {self.T}: "
                f"use --tokens_per_step={near}"
            )

    @property
    def T(self) -> int:
        """Tokens per training sequence."""
        return self.sequence_length or self.block_size

    def split_step(self, world_size: int, most: int = 0) -> tuple[int, int]:
        """(micro-batch, accumulation steps) of each process: the largest micro-batch up to batch_size (or `most`) that divides
        its share of the step. What the step learns from is the same for every answer. UserError if the shares are not equal.
        """
        sequences = self.tokens_per_step // self.T
        if sequences % world_size:
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} is {sequences} sequences of {self.T}, which {world_size} processes "
                f"cannot share equally: use --tokens_per_step={-(-sequences // world_size) * world_size * self.T} "
                f"(which changes what is learned), or start another number of processes"
            )
        share = sequences // world_size
        most = most or (share if self.batch_size == "auto" else self.batch_size)
        micro_batch = max(b for b in range(1, min(most, share) + 1) if share % b == 0)
        return micro_batch, share // micro_batch


# ---- config files -----------------------------------------------------------------------------------------------------


def find_file(path: str) -> Path | None:
    """A config file, looked for here and then beside train.py; None if there is none."""
    return next((p for p in (Path(path), ROOT / path) if os.path.isfile(p)), None)


def load_file(path: str) -> Config:
    """Run a config file; returns its `config`. UserError names the file and line for whatever is wrong in it."""
    found = find_file(path)
    if found is None:
        known = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "config").rglob("*.py") if p.name != "__init__.py")
        raise UserError(f"there is no config file {path}: {near_name(path, known)}")
    try:
        values = runpy.run_path(str(found))
    except UserError as e:
        raise UserError(f"{path}, line {_line_in(found, e)}: {e}") from None
    except Exception as e:
        line = e.lineno if isinstance(e, SyntaxError) else _line_in(found, e)
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(e))
        hint = f": {settings.meant(unknown[1], [f.name for f in fields(Config)])}" if unknown else ""
        what = f"{unknown[1]} is not a setting" if unknown else f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise UserError(f"{path}, line {line}: {what}{hint}") from None
    config = values.get("config")
    if config is None and nanogpt.looks_like(values):
        lines = "".join(f"    {name}={value!r},\n" for name, value in nanogpt.translated(values).items())
        print(f"from configurator import Config\n\nconfig = Config(\n{lines})")
        raise UserError(f"{path} is a config of nanoGPT's; its translation is printed above: save that as a config file")
    if not isinstance(config, Config):
        raise UserError(f"{path} must end with `config = Config(...)`, but its config is {type(config).__name__}")
    return config


def title_of(path: Path) -> str:
    """The first line of a config file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _line_in(path: Path, error: Exception) -> int:
    """The line of the file `path` on which the error arose."""
    line, tb = 1, error.__traceback__
    while tb is not None:
        if os.path.abspath(tb.tb_frame.f_code.co_filename) == os.path.abspath(path):
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def load(argv: list[str], description: str) -> Config:
    """argv (an optional config file, then flags) -> Config. A run goes to out/<config>, or with another data set to
    out/<data set>."""
    files, given = split_positional(Config(), argv)
    if len(files) > 1:
        raise UserError(f"{files[1]!r} is one argument too many: give one config file, then settings as --name=value")
    in_file = load_file(files[0]) if files else Config()
    cfg = parse(in_file, given, description)
    if not cfg.out_dir:
        name = cfg.dataset if cfg.dataset != in_file.dataset else Path(files[0]).stem if files else "gpt2"
        cfg = replace(cfg, out_dir=os.path.join("out", name))
    if not cfg.curve:
        beside = find_file(files[0]).with_suffix(".curve.json") if files else None
        cfg = replace(cfg, curve=str(beside) if beside and beside.is_file() else "off")
    return cfg


# ---- comparing, showing, reading back ---------------------------------------------------------------------------------


def diff(a: GPTConfig, b: GPTConfig) -> dict[str, tuple[Any, Any]]:
    """{field: (value in a, value in b)} where they differ."""
    before, after = asdict(a), asdict(b)
    return {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}


def describe(cfg: Config) -> str:
    """What differs from Config()'s defaults, in lines of at most 120 columns."""
    changed = ", ".join(f"{name}={value!r}" for name, (_, value) in diff(Config(), cfg).items())
    return textwrap.fill(changed, 120, initial_indent="  ", subsequent_indent="  ", break_long_words=False)


def from_json(text: str, cls: type[Settings]) -> Settings:
    """A GPTConfig or Config from JSON that may be untrusted: known names, right types and bounded sizes, else UserError."""
    values = settings.from_json(text, cls)
    check_sizes(values)
    return cls(**values)


def check_sizes(values: dict[str, Any]) -> None:
    """UserError if one of the sizes in an untrusted file is beyond LARGEST."""
    for name, most in LARGEST.items():
        if values.get(name, 0) > most:
            raise UserError(f"{name}={str(values[name])[:20]} is above {most:,}, the largest that is read from a file")
