"""Settings: every setting of a training run is one field of Config, defined here (or in model.GPTConfig) and nowhere else.

    python train.py config/shakespeare.py --batch_size=8
                    a file, in Python     then flags

A config file is ordinary Python that ends with a `config`: `config = Config(...)` or `config = replace(other, compile=True)`.
It is code, and it is run: use only files you trust. After load() a Config never changes.
"""

import contextlib
import difflib
import io
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from model import GPTConfig, UserError

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Config(GPTConfig):
    """Everything that decides a training run. "auto" means: the best this machine can do, and train.py says what that is."""

    # what is learned from
    dataset: str = "shakespeare"
    """name of a folder in data_dir, made by prepare_data.py"""
    data_dir: str = "data"
    """where prepared data sets lie"""
    batch_order: Literal["shuffled", "sequential", "one_batch"] = "shuffled"
    """shuffled: without replacement, every epoch anew; sequential: as in the text; one_batch: the first batch for ever"""
    seed: int = 1337
    """of the initial weights, dropout and data order"""

    # one optimizer step
    max_steps: int = 1000
    """optimizer steps in the whole run"""
    tokens_per_step: int = 524_288
    """tokens per optimizer step, over all processes; accumulation follows from it, so it alone decides what is learned"""
    sequence_length: int = 0
    """T, tokens per training sequence; 0: the whole block_size"""
    batch_size: int = 16
    """most sequences in one forward pass of a process (the micro-batch): a matter of memory and speed only"""
    learning_rate: float = 6e-4
    """peak learning rate (6e-4: GPT-3 paper, table 2.1, 125M)"""
    min_lr: float = 6e-5
    """learning rate at the end of the schedule"""
    warmup_steps: int = 100
    """steps of linear warm-up from 0"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate goes from its peak to min_lr at max_steps (constant: it does not)"""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only: biases and LayerNorm gains are never decayed"""
    beta1: float = 0.9
    """AdamW's first-moment decay"""
    beta2: float = 0.95
    """AdamW's second-moment decay"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 does not clip"""

    # speed: nothing here changes what is learned, beyond rounding
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute; auto: the first of cuda, mps, cpu that exists"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """autocast precision of matmuls (weights stay float32); auto: bfloat16 where the hardware multiplies it"""
    fp32_precision: Literal["ieee", "tf32", "bf16"] = "ieee"
    """how float32 matmuls are multiplied inside: exactly, or rounded to TF32 (CUDA) or bf16 (CPU) first"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: on where a compiler is installed"""
    compile_scope: Literal["model", "block"] = "model"
    """model: one graph; block: one transformer block, compiled once and used n_layer times (starts sooner)"""
    fused_adamw: bool | Literal["auto"] = "auto"
    """AdamW as one kernel over all parameters instead of a loop of small ones"""
    reuse_memory: bool | Literal["auto"] = "auto"
    """CPU with glibc: keep freed memory in the process, so that a step does not fault its pages in anew"""
    prefetch: bool = True
    """read the next micro-batch, and queue its copy from pinned memory to the GPU, while this one computes"""
    processes: int = 0
    """how many processes torchrun must have started; 0: any number"""

    # the run
    out_dir: str = ""
    """where checkpoints and log.jsonl go; empty: out/<name of the config file>"""
    resume: bool = False
    """continue from the newest checkpoint in out_dir"""
    log_interval: int = 10
    """steps between two log lines"""
    eval_interval: int = 250
    """steps between two validations; the last step always validates"""
    eval_tokens: int = 1_048_576
    """validate on this many tokens from the start of the validation split (or all of it, if shorter)"""
    checkpoint_interval: int = 1000
    """steps between two checkpoints; the last step always saves"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay (the one before the newest is there if the newest is damaged)"""
    wandb: Literal["off", "online", "offline"] = "off"
    """log to Weights & Biases as well"""
    wandb_project: str = "nanoladder"
    """Weights & Biases project"""

    def __post_init__(self):
        check_types(vars(self), Config)
        super().__post_init__()
        counts = (
            "tokens_per_step",
            "batch_size",
            "log_interval",
            "eval_interval",
            "eval_tokens",
            "checkpoint_interval",
        )
        check_at_least(self, 1, *counts, "keep_checkpoints")
        check_at_least(
            self, 0, "max_steps", "warmup_steps", "learning_rate", "min_lr", "weight_decay", "grad_clip", "seed", "processes"
        )
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed} must be below 2**63")
        if self.schedule != "constant" and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: type --min_lr={self.learning_rate / 10:g}"
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
                f"type --tokens_per_step={near}"
            )

    @property
    def T(self) -> int:
        """Tokens per training sequence."""
        return self.sequence_length or self.block_size

    def split_step(self, world_size: int) -> tuple[int, int]:
        """(micro-batch, accumulation steps) of each process: the largest micro-batch up to batch_size that divides its share
        of the step. What the step learns from is the same for every answer. UserError if the shares are not equal.
        """
        sequences = self.tokens_per_step // self.T
        if sequences % world_size:
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} is {sequences} sequences of {self.T}, which {world_size} processes "
                f"cannot share equally: type --tokens_per_step={-(-sequences // world_size) * world_size * self.T} "
                f"(which changes what is learned), or start another number of processes"
            )
        share = sequences // world_size
        micro_batch = max(b for b in range(1, min(self.batch_size, share) + 1) if share % b == 0)
        return micro_batch, share // micro_batch


def check_types(values: dict[str, Any], cls: type) -> None:
    """UserError if one of the values for a dataclass's fields is nothing that its annotation allows."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        hint = hints[name]
        if not any(_fits(value, h) for h in (get_args(hint) if _is_union(hint) else (hint,))):
            raise UserError(f"{name}={value!r} is not allowed: {name} is {_allowed(hint)}")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """UserError if one of the named fields is smaller than `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise UserError(f"{name}={getattr(settings, name)} must be at least {least}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint) and type(value) is str
    if hint is float:
        return type(value) in (int, float) and value == value and abs(value) != float("inf")
    return type(value) is hint  # exactly: True is no int here


def _allowed(hint: Any) -> str:
    if _is_union(hint) or get_origin(hint) is Literal:
        return " or ".join(_allowed(a) if not isinstance(a, str) else repr(a) for a in get_args(hint))
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def near_name(name: str, known: list[str]) -> str:
    """' Did you mean x?' or a pointer to --help."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists what there is"


def split_positional(default: Any, argv: list[str]) -> tuple[list[str], list[str]]:
    """argv -> (arguments that are no flag, flags with their values), in whatever order they were typed."""
    hints, positional, flags = get_type_hints(type(default)), [], []
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("-") or token == "-":
            positional.append(token)
            continue
        flags.append(token)
        hint = hints.get(token[2:].replace("-", "_"))  # None if it has its value after a "=", or is unknown
        if hint is not None and not _is_flag(hint):
            flags += [value for value in [next(tokens, None)] if value is not None]
    return positional, flags


def _is_flag(hint: Any) -> bool:
    return hint is bool or bool in get_args(hint)


def parse(default: Settings, argv: list[str], description: str) -> Settings:
    """`default` (a frozen dataclass) with the flags of argv applied: --name=value, --name value, or a bare --name for True
    (a yes-or-no setting takes its value only after a "=", so that a file may follow it).

    Prints help and exits on --help. Raises UserError, one line, for anything it does not understand.
    """
    hints = get_type_hints(type(default))
    args = []
    for token in argv:
        if not token.startswith("--") or token == "--help":
            args.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name not in hints:
            raise UserError(f"--{name} is not a setting: {near_name(name, list(hints))}")
        bare = not equals and _is_flag(hints[name])
        args.append(f"--{name}=True" if bare else f"--{name}{equals}{value}")

    import tyro  # here, and after the names are checked: reading a config must not wait for it

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            marked = tyro.conf.FlagConversionOff[type(default)]
            return tyro.cli(marked, default=default, args=args, description=description, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
    # tyro draws a box: its text is the lines up to the first rule
    lines = [re.sub(r"^│(.*)│$", r"\1", line).strip() for line in complaint.getvalue().splitlines()[1:]]
    text = " ".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))])
    text = re.sub(r"^Error parsing --(\w+)", r"cannot read --\1", text)
    raise UserError(re.sub(r"^Error parsing \w+: ", "", text) or "cannot read the command line")


def load_file(path: str) -> Config:
    """The `config` of a config file. UserError names the file and line for whatever is wrong in it."""
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("config").rglob("*.py") if p.name != "__init__.py")
        raise UserError(f"there is no config file {path}: {near_name(path, known)}")
    try:
        found = runpy.run_path(path).get("config")
    except UserError as e:
        raise UserError(f"{path}, line {_line_in(path, e)}: {e}") from None
    except Exception as e:
        line = e.lineno if isinstance(e, SyntaxError) else _line_in(path, e)
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(e))
        hint = f": {near_name(unknown[1], [f.name for f in fields(Config)])}" if unknown else ""
        what = f"{unknown[1]} is not a setting" if unknown else f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise UserError(f"{path}, line {line}: {what}{hint}") from None
    if not isinstance(found, Config):
        raise UserError(f"{path} must end with `config = Config(...)`, but its config is {type(found).__name__}")
    return found


def _line_in(path: str, error: Exception) -> int:
    """The line of the file `path` on which the error arose."""
    line, tb = 1, error.__traceback__
    while tb is not None:
        if os.path.abspath(tb.tb_frame.f_code.co_filename) == os.path.abspath(path):
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def load(argv: list[str], description: str) -> Config:
    """argv (an optional config file, then flags) -> Config."""
    files, flags = split_positional(Config(), argv)
    if len(files) > 1:
        raise UserError(f"{files[1]!r} is one argument too many: type one config file, then settings as --name=value")
    base = load_file(files[0]) if files else Config()
    if not base.out_dir:
        base = replace(base, out_dir=os.path.join("out", Path(files[0]).stem if files else "gpt2"))
    return parse(base, flags, description)


def diff(a: GPTConfig, b: GPTConfig) -> dict[str, tuple[Any, Any]]:
    """{field: (value in a, value in b)} where they differ."""
    before, after = asdict(a), asdict(b)
    return {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}


def describe(cfg: Config) -> str:
    """Every setting: first what differs from Config()'s defaults, one a line, then the rest as one paragraph."""
    changed = diff(Config(), cfg)
    lines = [f"  {name} = {value!r}" for name, (_, value) in changed.items()]
    rest = "; ".join(f"{f.name}={getattr(cfg, f.name)!r}" for f in fields(cfg) if f.name not in changed)
    return "\n".join([*lines, f"  defaults: {rest}"])


def from_json(text: str, cls: type[Settings]) -> Settings:
    """A settings dataclass from JSON that may come from a stranger: known names and right types only, else UserError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{unknown[0]} is not a setting of {cls.__name__}: {near_name(unknown[0], sorted(known))}")
    check_types(values, cls)  # before cls computes with them
    return cls(**values)


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError on a GPU; the CPU's allocator raises a plain RuntimeError."""
    return bool(re.search("out of memory|can't allocate memory|not enough memory", str(error)))


def entry(main: Callable[[list[str]], None]) -> None:
    """Run a script's main(argv): whatever the user can mend ends as one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # not the locale's
    who = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        main(sys.argv[1:])
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # the first process says the same, and torchrun then ends this one; if not, it is ours to say
        print(f"{who}error: {e}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        said = str(e).partition("\n")[0]
        print(f"{who}error: out of memory ({said}): type a smaller --batch_size or a smaller model", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{who}stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
