"""Whole runs of the scripts, as a user starts them: what they reach, how long they take, what safety costs."""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import configurator
import prepare_data
from base import scripts
from base.errors import UserError
from base.files import ROOT
from configurator import Config
from corpus.shards import open_dataset
from corpus.sources import NAMED
from measure import preparing
from measure.config import QUICK_LAYERS, BenchConfig
from measure.fresh import in_fresh_process
from measure.results import header, results_dir
from measure.rounds import UntilCtrlC, say
from model import GPT
from safety import prove

SHAKESPEARE = "config/shakespeare.py"  # the main job
SHAKESPEARE_124M = "config/shakespeare_124m.py"  # where compiling, saving and reproducible kernels cost something


# ---- one run --------------------------------------------------------------------------------------------------------------


@contextmanager
def scratch(sizes: BenchConfig, device: torch.device) -> Iterator[Path]:
    """A temporary folder for runs, beside the results: on a disk, as runs are."""
    runs = results_dir(sizes.out, device).resolve() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as folder:
        yield Path(folder)


def quick_flags(sizes: BenchConfig, path: str, steps: int = 4) -> list[str]:
    """With --quick: what makes a script train a small model like the config's, for a few steps."""
    if not sizes.quick:
        return []
    cfg = configurator.load_file(path)
    small = sizes.narrow(replace(cfg, n_layer=min(cfg.n_layer, QUICK_LAYERS)))
    found = {name: getattr(small, name) for name in ("n_layer", "n_head", "n_embd")} | {
        "max_steps": steps,
        "eval_tokens": cfg.T,
    }
    found |= {"warmup_steps": min(cfg.warmup_steps, steps - 1)}
    return [f"--{name}={value}" for name, value in found.items()]


def place_flags(sizes: BenchConfig) -> list[str]:
    """Where a script computes and reads; scripts start in the repository's root, and data_dir is relative to this process."""
    return [f"--data_dir={Path(sizes.data_dir).resolve()}", f"--device={sizes.device}"]


def train_log(out: Path, sizes: BenchConfig, config: str, *flags: str) -> list[dict]:
    """Train a config with train.py; the records of its log."""
    scripts.run("train.py", config, *place_flags(sizes), f"--out_dir={out}", *flags)
    return scripts.read_log(out)[0]


def facts(records: list[dict], sizes: BenchConfig) -> dict:
    """What was asked for and how large the model is, from a run's log."""
    requested = next(r["config"] for r in records if "config" in r)
    # absolute paths of this machine do not belong in a result
    paths = {"data_dir": sizes.data_dir, "out_dir": Path(requested["out_dir"]).name}
    on = next(r["effective"] for r in records if "effective" in r)
    return {"parameters": on["parameters"], "requested": requested | paths}


def steps_of(records: list[dict]) -> list[dict]:
    return [r for r in records if "loss" in r]


def main_job(seed: int, sizes: BenchConfig, device: torch.device) -> tuple[dict, list[dict], str]:
    """The main job as `make train` runs it once it is installed and downloaded, from an empty compiler cache: (what it took and
    reached, its log, the text that the model wrote).
    """
    with scratch(sizes, device) as folder:
        out, env = folder / "shakespeare", os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        flags = [*place_flags(sizes), f"--out_dir={out}", f"--seed={seed}", *quick_flags(sizes, str(ROOT / SHAKESPEARE))]
        loss, step, whole = seconds_of(SHAKESPEARE, flags, env, "loss", "step")
        sample = scripts.run("sample.py", out, "--prompt=ROMEO:", f"--device={sizes.device}", env=env)
        records, _ = scripts.read_log(out)
    validations = [r for r in records if "val_loss" in r]
    found = {"seed": seed, "first_loss_s": loss, "first_step_s": step, "train_s": whole, "sample_s": sample.seconds}
    found |= {"val_losses": {str(r["step"]): r["val_loss"] for r in validations}}
    return found | {"bits_per_byte": validations[-1]["val_bits_per_byte"]}, records, sample.stdout


def shakespeare(sizes: BenchConfig, device: torch.device) -> dict:
    """The main job with three seeds."""
    runs, step_s = [], []
    with UntilCtrlC() as until:
        for seed in range(Config.seed, Config.seed + (1 if sizes.quick else 3)):
            found, records, sample = main_job(seed, sizes, device)
            times = f"first loss after {found['first_loss_s']:.1f} s, finished after {found['train_s']:.1f} s"
            print(f"seed {seed}: {times}, {found['bits_per_byte']:.4f} bits per byte")
            runs.append(found)
            step_s.append([round(r["ms"] / 1e3, 5) for r in steps_of(records)[1::10]])  # every tenth is enough to know them by
    ended = until.note(runs)
    return header("shakespeare", sizes) | ended | {"runs": runs, "step_s": step_s, **facts(records, sizes), "sample": sample}


def whole_run(paths: list[str], asked: BenchConfig, device: torch.device) -> dict:
    """Train a config from its first step to its last, evaluate it, let it write."""
    sizes = asked.by_device(device.type)
    if len(paths) != 1:
        raise UserError("run takes one config file: run python bench.py run config/enwik8.py")
    with scratch(sizes, device) as folder:
        out, places, began = folder / "run", place_flags(sizes), time.perf_counter()
        records = train_log(out, sizes, str(Path(paths[0]).resolve()), *quick_flags(sizes, paths[0]))
        seconds = {"train": time.perf_counter() - began}
        evaluate = scripts.run("evaluate.py", out, *places, f"--out={folder}/evaluation.json")
        sample = scripts.run("sample.py", out, "--max_new_tokens=150", "--temperature=0.8", places[1])
        # absolute paths of this machine do not belong in a result
        text = (folder / "evaluation.json").read_text(encoding="utf-8").replace(f"{folder}/", "")
        evaluation = json.loads(text.replace(str(Path(sizes.data_dir).resolve()), sizes.data_dir))
    steps = steps_of(records)
    return header("run", sizes) | {
        "config": paths[0],
        **facts(records, sizes),
        "seconds": seconds | {"evaluate": evaluate.seconds, "sample": sample.seconds},
        "losses": [round(r["loss"], 4) for r in steps],
        "val_losses": {str(r["step"]): r["val_loss"] for r in records if "val_loss" in r},
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steps[1:]),
        "evaluation": evaluation,
        "sample": sample.stdout,
    }


# ---- the stages -------------------------------------------------------------------------------------------------------------


def residual_stream(cfg: Config) -> list[float]:
    """Standard deviation of the residual stream at init: behind the embedding, then behind each block."""
    torch.manual_seed(cfg.seed)
    model, found = GPT(cfg).eval(), []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: found.append(args[0].std().item()))
    for block in model.transformer.h:
        block.register_forward_hook(lambda *args: found.append(args[2].std().item()))
    tokens = open_dataset(Path(cfg.data_dir) / cfg.dataset).split("train").read(0, 4 * 256)
    with torch.no_grad():
        model(torch.from_numpy(tokens).view(4, 256))
    return found


def stage_entry(path: Path, records: list[dict]) -> dict:
    """What one stage's run came to, from its log."""
    on = next(r["effective"] for r in records if "effective" in r)
    return {
        "config": str(path.relative_to(ROOT)),
        "title": configurator.title_of(path),
        "parameters": on["parameters"],
        "dtype": on["dtype"],
        "seconds": sum(r["ms"] for r in records if "ms" in r) / 1e3,
        "losses": [r["loss"] for r in steps_of(records)],
        "val_loss": [r["val_loss"] for r in records if "val_loss" in r][-1],
    }


def stages(sizes: BenchConfig, device: torch.device) -> dict:
    """Run each training stage's config as a user would, and measure the residual stream of the last one."""
    entries, paths = [], sorted(ROOT.glob("config/stages/s[2-9]_*.py"))
    last = sizes.narrow(replace(configurator.load_file(str(paths[-1])), data_dir=sizes.data_dir))
    streams = {"scaled": residual_stream(last), "unscaled": residual_stream(replace(last, scale_residual_init=False))}
    with UntilCtrlC() as until:
        for path in tqdm(paths, desc="stages", disable=None):
            with scratch(sizes, device) as folder:
                entry = stage_entry(path, train_log(folder / "run", sizes, str(path), *quick_flags(sizes, str(path))))
            tqdm.write(f"{path.stem:<24} {entry['seconds']:>8,.1f} s   loss {entry['losses'][-1]:.4f}")
            entries.append(entry)
    return (
        header("stages", sizes)
        | until.note(entries)
        | {"ln_vocab_size": math.log(50257), "stages": entries, "residual_std": streams}
    )


# ---- starting ---------------------------------------------------------------------------------------------------------------


def seconds_of(config: str, flags: list[str], env: dict[str, str], *words: str) -> list[float]:
    """Seconds from starting train.py until it prints the first line that begins with each word, in that order, and until it
    ends. UserError if it fails.
    """
    began, seconds = time.perf_counter(), []
    with scripts.started(scripts.command("train.py", config, *flags), env=env | {"PYTHONUNBUFFERED": "1"}) as process:
        for line in process.stdout:
            if len(seconds) < len(words) and line.startswith(words[len(seconds)]):
                seconds.append(time.perf_counter() - began)
    if process.returncode or len(seconds) < len(words):
        raise UserError(f"train.py {' '.join(flags)} ended with {process.returncode}")
    return [*seconds, time.perf_counter() - began]


def start(sizes: BenchConfig, device: torch.device) -> dict:
    """Seconds from starting train.py until its first step is done: with an empty compiler cache, and with what that left."""
    seconds: dict[str, dict[str, list[float]]] = {}
    with UntilCtrlC() as until:
        for scope in ("block", "model") * sizes.rounds:
            with scratch(sizes, device) as folder:
                few = quick_flags(sizes, str(ROOT / SHAKESPEARE_124M), steps=2) or ["--max_steps=2", "--eval_tokens=64"]
                flags = [*place_flags(sizes), *few, f"--out_dir={folder}/run", f"--compile_scope={scope}", "--compile=True"]
                env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
                env |= {"XDG_CACHE_HOME": str(folder)}
                first, second = (seconds_of(SHAKESPEARE_124M, flags, env, "step")[0] for _ in range(2))
            print(f"compile_scope={scope:<8} {first:>6.1f} s, with what that compiled {second:>6.1f} s")
            kept = seconds.setdefault(scope, {"first": [], "second": []})
            kept["first"].append(first)
            kept["second"].append(second)
    return header("start", sizes) | until.note(seconds) | {"config": SHAKESPEARE_124M, "seconds": seconds}


# ---- safety -----------------------------------------------------------------------------------------------------------------


def saves_in(records: list[dict]) -> dict:
    """Of a run's log: what each save held up (the last, which everything waits for, left out), what it took, and all steps."""
    saves = [r["step_done"] for r in records if r.get("event") == "saving"][:-1]
    return {
        "after_steps": saves,
        "pause_ms": [r["pause_ms"] for r in records if r.get("event") == "saving" and r["step_done"] in saves],
        "save_ms": [r["save_ms"] for r in records if r.get("event") == "saved" and r["step_done"] in saves],
        "step_ms": [r["ms"] for r in records if "ms" in r],
    }


def config_124m(sizes: BenchConfig) -> Config:
    cfg = replace(configurator.load_file(str(ROOT / SHAKESPEARE_124M)), device=sizes.device, data_dir=sizes.data_dir)
    return sizes.narrow(replace(cfg, n_layer=min(cfg.n_layer, QUICK_LAYERS))) if sizes.quick else cfg


def safety(sizes: BenchConfig, device: torch.device) -> dict:
    """Step time with and without deterministic kernels; what a save holds up, in the foreground and in the background."""
    cfg = config_124m(sizes)
    kernels: dict[str, list[list[float]]] = {"deterministic": [], "any": []}
    saving: dict[str, list[dict]] = {"background": [], "foreground": []}
    steps = 12 if sizes.quick else 48
    few = quick_flags(sizes, str(ROOT / SHAKESPEARE_124M), steps) or [f"--max_steps={steps}", f"--eval_tokens={cfg.T}"]
    few += [f"--checkpoint_interval={steps // 3}", "--keep_best=False"]
    with UntilCtrlC() as until:
        for _ in range(sizes.rounds):
            timed, saved = {}, {}
            for name in kernels:
                found = in_fresh_process(replace(cfg, deterministic=name == "deterministic"), steps=steps, min_timed=steps // 2)
                say(f"kernels: {name}", found)
                if "error" in found:
                    raise UserError(found["error"])
                timed[name] = found["step_s"][found["warmup"] :]
            for name in saving:
                with scratch(sizes, device) as folder:
                    flags = [*few, f"--background_save={name == 'background'}"]
                    saved[name] = saves_in(train_log(folder / "run", sizes, SHAKESPEARE_124M, *flags))
                print(f"saving in the {name}: pauses of {', '.join(f'{ms:,.0f}' for ms in saved[name]['pause_ms'])} ms")
            for kept, new in ((kernels, timed), (saving, saved)):  # whole rounds only
                for name, one in new.items():
                    kept[name].append(one)
    return (
        header("safety", sizes)
        | until.note(saving["foreground"])
        | {"kernels_s": kernels, "saving": saving, "requested": asdict(cfg)}
    )


def kills(sizes: BenchConfig, device: torch.device) -> dict:
    """The run of config/shakespeare_124m.py, killed again and again, ends in the same bits as the undisturbed one."""
    cfg = config_124m(sizes)
    few = dict(max_steps=120, checkpoint_interval=40, compile=False) if sizes.quick else dict(checkpoint_interval=20)
    cfg = replace(cfg, **few)
    with scratch(sizes, device) as folder:
        there = dict(out_dir=str(folder), data_dir=str(Path(sizes.data_dir).resolve()))
        found = prove.prove_kills(replace(cfg, **there), kills=2 if sizes.quick else 20)
    paths = {"data_dir": sizes.data_dir, "out_dir": Path(found["requested"]["out_dir"]).name}
    return header("kills", sizes) | found | {"requested": found["requested"] | paths}


def data(sizes: BenchConfig, device: torch.device) -> dict:
    """How fast prepare_data.py is, on enwik8, or with --quick on tiny Shakespeare."""
    path = prepare_data.local_copy(NAMED["shakespeare" if sizes.quick else "enwik8"][1], sizes.data_dir)
    with scratch(sizes, device) as folder:
        found = preparing.measure(path, folder, rounds=sizes.rounds, learnt=preparing.LEARNT[1 if sizes.quick else 0 :])
    return header("data", sizes) | found
