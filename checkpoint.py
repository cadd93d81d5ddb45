"""Checkpoints: folders that are complete or not there, and that run no code when they are read.

    out/<run>/step_00000300/
        model.safetensors     weights
        config.json           the resolved Config
        tokenizer.json
        training.safetensors  AdamW's moments and step by parameter name; every rank's random states
        training.json         step, data set's sha256, last losses
        manifest.json         format version; size and sha256 of each file above

A checkpoint is written under a temporary name, flushed to the disk, then renamed. Reading verifies the manifest first.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import pretrained
from configurator import Config, from_json, load_file
from model import GPT, GPTConfig, UserError
from tokenizer import GPT2Tokenizer, Tokenizer
from tokenizer import from_json as tokenizer_from_json

FORMAT = 1
STEP_NAME = re.compile(r"step_(\d{8})")


def rng_states(device: torch.device) -> Tensor:
    """This process's random state (torch's CPU generator, then the device's) as bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_rng_states(states: Tensor, device: torch.device) -> None:
    """The reverse of rng_states."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(states[:size])
    if device.type == "cuda" and states.numel() > size:
        torch.cuda.set_rng_state(states[size:], device)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: GPT) -> dict[str, Tensor]:
    """The optimizer's state by name: "exp_avg.transformer.wte.weight" and so on."""
    return {f"{kind}.{name}": t for name, p in model.named_parameters() for kind, t in optimizer.state.get(p, {}).items()}


def save(
    run_dir: Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    cfg: Config,
    tokenizer: Tokenizer,
    random_states: list[Tensor],
    extra: dict,
    keep: int,
) -> Path:
    """Write the checkpoint after `step` steps, then delete all but the newest `keep`. Returns its folder.

    random_states: rng_states() of every rank, in rank order. extra: JSON values for training.json.
    """
    final = run_dir / f"step_{step:08d}"
    temporary = run_dir / f".writing_{final.name}"
    replaced = run_dir / f".replaced_{final.name}"
    try:
        for leftover in (temporary, replaced):  # of a run that died while saving
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        moments = optimizer_tensors(optimizer, model)
        random = {f"random.{rank}": state for rank, state in enumerate(random_states)}
        safetensors.torch.save_file({n: p.detach() for n, p in model.named_parameters()}, temporary / "model.safetensors")
        safetensors.torch.save_file(moments | random, temporary / "training.safetensors")
        write_config(temporary, cfg)
        (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        (temporary / "training.json").write_text(json.dumps({"step": step} | extra, indent=1), encoding="utf-8")
        entries = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": entries}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if final.exists():  # the same step, saved by an earlier attempt: it goes only once the new one is in its place
            os.rename(final, replaced)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        sync(run_dir)
    except (OSError, SafetensorError) as e:  # a full disk is the one or the other, depending on who was writing
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot save a checkpoint in {run_dir}: {reason}; earlier ones are untouched") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in [c for c in candidates(run_dir) if c != final][keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def lock(run_dir: Path) -> IO:
    """Claim a run's folder for as long as the returned file is open; UserError if another process has it."""
    file = open(run_dir / ".lock", "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training in {run_dir}: type --out_dir=another/folder, or stop it first") from None
    return file


def write_config(folder: Path, cfg: Config) -> None:
    """The resolved configuration as config.json."""
    (folder / "config.json").write_text(json.dumps(asdict(cfg), indent=1), encoding="utf-8")


def sync(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def candidates(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, not yet verified."""
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if STEP_NAME.fullmatch(p.name) and p.is_dir()), reverse=True)


def verify(folder: Path) -> None:
    """UserError unless every file of the manifest is there with its size and sha256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise UserError(f"{folder} has no readable manifest.json ({type(e).__name__}: {e})") from None
    if version != FORMAT:
        raise UserError(f"{folder} has checkpoint format {version}; this program reads {FORMAT}")
    needed = {"model.safetensors", "config.json", "tokenizer.json", "training.json"}
    if absent := sorted(needed - entries.keys()):
        raise UserError(f"{folder}: manifest.json does not list {absent[0]}")
    for name, (size, digest) in entries.items():
        path = folder / name
        if Path(name).name != name:
            raise UserError(f"{folder}: manifest.json names a file outside the folder: {name}")
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if path.stat().st_size != size:
            raise UserError(f"{path} is damaged: {path.stat().st_size} bytes instead of {size}")
        if sha256_of(path) != digest:
            raise UserError(f"{path} is damaged: its sha256 is not the manifest's")


def newest(run_dir: Path, say: Callable[[str], None] = print) -> Path:
    """The newest checkpoint of a run that verifies; damaged ones are passed over aloud. UserError if none is left."""
    found = candidates(run_dir)
    if not found:
        raise UserError(f"{run_dir} holds no checkpoint: train one first (without --resume)")
    for folder in found:
        try:
            verify(folder)
            return folder
        except UserError as e:
            say(f"passing over a checkpoint: {e}")
    raise UserError(
        f"{run_dir}: none of its {len(found)} checkpoint(s) is usable: train again without --resume, which moves them aside"
    )


def read_config(folder: Path, cls: type = Config) -> Config | GPTConfig:
    """The configuration a checkpoint was trained with (cls=GPTConfig: only the model's part)."""
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        if cls is GPTConfig:  # sampling needs no more, and must not refuse what training has gained since
            own = {f.name for f in fields(GPTConfig)}
            text = json.dumps({k: v for k, v in json.loads(text).items() if k in own})
        return from_json(text, cls)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder}/config.json: {e}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that has a tokenizer.json of ours."""
    try:
        return tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}/tokenizer.json: {e}") from None


def load_weights(folder: Path, model: GPT) -> None:
    """Weights of a verified checkpoint into a model; UserError names the key that does not fit."""
    state = pretrained.read_safetensors(folder / "model.safetensors")
    if model.cfg.tie_weights and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    pretrained.checked_load(model, state, f"{folder}/model.safetensors")


def load_training(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, rank: int, device: torch.device) -> dict:
    """Optimizer state and this rank's random state from a verified checkpoint. Returns training.json."""
    where = f"{folder}/training.safetensors"
    state = pretrained.read_safetensors(folder / "training.safetensors")
    random = {name: state.pop(name) for name in [n for n in state if n.startswith("random.")]}
    expected = {f"{kind}.{n}": (p, kind) for n, p in model.named_parameters() for kind in ("step", "exp_avg", "exp_avg_sq")}
    if strange := sorted(expected.keys() ^ state.keys()):
        raise UserError(f"{where}: {strange[0]} {'is missing' if strange[0] in expected else 'does not belong to this model'}")
    for name, (p, kind) in expected.items():
        tensor, shape = state[name], torch.Size() if kind == "step" else p.shape
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise UserError(f"{where}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, expected float32 {list(shape)}")
        # AdamW keeps its step counter on the device only when fused; the loop wants it on the CPU
        on_device = kind != "step" or optimizer.defaults["fused"]
        optimizer.state[p][kind] = tensor.to(device) if on_device else tensor
    if (states := random.get(f"random.{rank}")) is not None:  # more ranks than before start their own
        try:
            set_rng_states(states, device)
        except (RuntimeError, TypeError) as e:
            raise UserError(f"{where}: random.{rank} is no random state ({e})") from None
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def load_model(where: str, say: Callable[[str], None] = print) -> tuple[GPT, Tokenizer]:
    """(model on the CPU in fp32, tokenizer) from any of: a run's folder, one checkpoint, a folder in the Hugging Face
    layout, a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name), or a config file, for random weights.
    """
    path = Path(where)
    if path.suffix == ".py":
        cfg = load_file(where)
        if cfg.vocab_size != GPT2Tokenizer.vocab_size:
            raise UserError(f"{where} has vocab_size={cfg.vocab_size}: random weights are sampled with GPT-2's tokenizer only")
        torch.manual_seed(cfg.seed)
        return GPT(cfg), GPT2Tokenizer()
    if path.is_dir():
        ours = STEP_NAME.fullmatch(path.name) or candidates(path) or (path / "log.jsonl").is_file()
        if not ours and (path / "config.json").is_file():
            model = pretrained.load_hf_dir(path)
            if model.cfg.vocab_size != GPT2Tokenizer.vocab_size:
                raise UserError(f"{where} has {model.cfg.vocab_size} ids; in this layout only GPT-2's 50257 have a tokenizer")
            return model, GPT2Tokenizer()
        if STEP_NAME.fullmatch(path.name):
            verify(path)
        else:
            path = newest(path, say)
        model = pretrained.empty_model(read_config(path, GPTConfig))
        load_weights(path, model)
        return model, read_tokenizer(path)
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", where) and not where.startswith(("out/", "./")):
        return pretrained.load_hub(where), GPT2Tokenizer()
    raise UserError(
        f"{where} is no run, checkpoint or model folder: type a folder like out/shakespeare, a config file, or gpt2"
    )
