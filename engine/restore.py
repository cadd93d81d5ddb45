"""Reading checkpoints: verified, never executed, each value checked again. The writer is checkpoint.py.

A checkpoint, a crash capsule or a folder in the Hugging Face layout may be untrusted. So nothing here runs a file that one of
them names: only load_named(), for what the user typed on the command line, reads a config file.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import safetensors
import torch
from torch import Tensor

import optim
from base.errors import UserError
from base.files import read_text, sha256_of
from configurator import Config, GPTConfig, from_json, load_file
from engine import pretrained
from engine.checkpoint import FORMAT, MOMENTS, STEP_NAME, candidates, set_rng_states, step_name, step_of
from model import GPT
from tokenizer import GPT2Tokenizer, Tokenizer
from tokenizer import from_json as tokenizer_from_json

# What Python raises for JSON of unknown origin: not a file, not UTF-8, not JSON, too deep, another type than expected.
BAD_JSON = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64"}  # safetensors' names, and torch's


# ---- which checkpoint -------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """{file name: (bytes, sha256)} of a checkpoint. UserError if manifest.json cannot be read or does not fit the folder."""
    try:
        manifest = json.loads(read_text(folder / "manifest.json"))
        version, files = manifest["format"], manifest["files"]
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in files.items()}
    except BAD_JSON as e:
        raise UserError(f"{folder} has no readable manifest.json ({type(e).__name__}: {e})") from None
    if version != FORMAT:
        raise UserError(f"{folder} has checkpoint format {version}; this program reads {FORMAT}")
    if STEP_NAME.fullmatch(folder.name) and step_name(manifest.get("step")) != folder.name:
        raise UserError(f"{folder}: manifest.json is of step {manifest.get('step')!r}")
    if outside := [name for name in entries if Path(name).name != name]:
        raise UserError(f"{folder}: manifest.json names a file outside the folder: {outside[0]}")
    if absent := sorted({"config.json", "tokenizer.json", "training.json"} - entries.keys()):
        raise UserError(f"{folder}: manifest.json does not list {absent[0]}")
    if not any(name == "model.safetensors" or name.startswith("shard-") for name in entries):
        raise UserError(f"{folder}: manifest.json does not list model.safetensors")
    return entries


def verify(folder: Path) -> None:
    """UserError unless every file of the manifest is there with its size and sha256."""
    entries = read_manifest(folder)
    if extra := sorted(p.name for p in folder.glob("*.safetensors") if p.name not in entries):
        raise UserError(f"{folder}/{extra[0]} is not listed in manifest.json")
    for name, (size, digest) in entries.items():
        path = folder / name
        try:
            if not path.is_file():
                raise UserError(f"{path} is missing")
            if path.stat().st_size != size:
                raise UserError(f"{path} is damaged: {path.stat().st_size} bytes instead of {size}")
            if sha256_of(path) != digest:
                raise UserError(f"{path} is damaged: its sha256 is not the manifest's")
        except OSError as e:  # a name longer than the file system allows; or the checkpoint was removed meanwhile
            raise UserError(f"{folder}: {name[:80]} cannot be read ({e.strerror})") from None


def runs_in(folder: Path) -> list[str]:
    """A line for each run in a folder: its name, newest step and last validation loss."""
    lines = []
    try:
        runs = {path: found[0] for path in sorted(folder.iterdir()) if (found := candidates(path))}
    except OSError:
        return []
    for path, checkpoint in runs.items():
        lines.append(f"  {path}  step {step_of(checkpoint)}")
        with contextlib.suppress(UserError):
            if (loss := read_training(checkpoint)["val_loss"]) is not None:
                lines[-1] += f", val_loss {loss:.4f}"
    return lines


def newest(run_dir: Path, say: Callable[[str], None] = print) -> Path:
    """The newest checkpoint of a run that verifies; damaged ones are skipped with a warning. UserError if none is left."""
    found, damaged = candidates(run_dir), set()
    if not found:
        there = run_dir.is_dir()
        for line in (runs := runs_in(run_dir if there else run_dir.parent)):
            say(line)
        if runs and there:
            raise UserError(f"{run_dir} is a folder of runs: use one of those listed above")
        hint = ", or use one of the runs listed above" if runs else ""
        raise UserError(f"{run_dir} has no checkpoint: train one first{hint}")
    while left := [folder for folder in found if folder not in damaged]:
        try:
            verify(left[0])
            return left[0]
        except UserError as e:
            damaged.add(left[0])
            if left[0].is_dir():
                say(f"skipping a checkpoint: {e}")
            else:  # the run removed it meanwhile, and has saved newer ones
                found = candidates(run_dir)
    raise UserError(
        f"{run_dir}: none of its {len(damaged)} checkpoint(s) is usable: train again without --resume, which moves them aside"
    )


# ---- its parts --------------------------------------------------------------------------------------------------------


def read_config(folder: Path, cls: type = Config) -> Config | GPTConfig:
    """The configuration a checkpoint was trained with (cls=GPTConfig: only the model's part)."""
    try:
        text = read_text(folder / "config.json")
        if cls is GPTConfig:  # sampling needs no more, and must not refuse settings of training that are newer
            known = {f.name for f in fields(GPTConfig)}
            text = json.dumps({k: v for k, v in json.loads(text).items() if k in known})
        return from_json(text, cls)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder}/config.json: {e}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder's tokenizer.json, in our format."""
    try:
        return tokenizer_from_json(read_text(folder / "tokenizer.json"))
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}/tokenizer.json: {e}") from None


def read_start(folder: Path, tokenizer: Tokenizer) -> int:
    """What an empty prompt begins with, from training.json; the tokenizer's own answer where an older checkpoint has none."""
    try:
        start = json.loads(read_text(folder / "training.json")).get("start", tokenizer.start)
    except BAD_JSON as e:
        raise UserError(f"{folder}/training.json cannot be read ({type(e).__name__}: {e})") from None
    if type(start) is not int or not 0 <= start < tokenizer.vocab_size:
        raise UserError(f"{folder}/training.json: start={str(start)[:20]} is not one of {tokenizer.vocab_size} ids")
    return start


def load_weights(folder: Path, model: GPT) -> None:
    """Weights of a verified checkpoint into a model; UserError names the key that does not fit."""
    if (folder / "model.safetensors").is_file() and not optim.is_sharded(model):
        state = pretrained.read_safetensors(folder / "model.safetensors")
        if model.cfg.tie_weights and "transformer.wte.weight" in state:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        pretrained.checked_load(model, state, f"{folder}/model.safetensors")
    else:
        if model.lm_head.weight.is_meta:
            model.to_empty(device="cpu")
            model.tie_weights()
        fill(folder, {n: p.detach() for n, p in model.named_parameters()}, model)


def load_training(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, rank: int, device: torch.device) -> dict:
    """Load optimizer state, as far as this process keeps it, and this rank's random state from a verified checkpoint.
    Returns training.json."""
    kept = optim.inner_optimizer(optimizer)
    mine = {p for group in kept.param_groups for p in group["params"]}
    for p in mine:
        # AdamW keeps its step counter on the device only when fused; the loop wants it on the CPU
        counter = torch.zeros((), device=device if kept.defaults["fused"] else "cpu")
        kept.state[p] = {"step": counter, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    wanted = {f"{kind}.{n}": kept.state[p][kind] for n, p in model.named_parameters() if p in mine for kind in MOMENTS}
    fill(folder, wanted, model)
    where = folder / ("training.safetensors" if (folder / "training.safetensors").is_file() else "random.safetensors")
    with safetensors.safe_open(where, framework="pt") as f:
        states = f.get_tensor(f"random.{rank}") if f"random.{rank}" in f.keys() else None  # noqa: SIM118 (it is no dict)
    if states is not None:  # if there are more ranks than before, the new ones keep their own
        try:
            set_rng_states(states, device)
        except UserError as e:
            raise UserError(f"{where}: random.{rank}: {e}") from None
    return read_training(folder)


def read_training(folder: Path) -> dict:
    """training.json of a verified checkpoint. It may be untrusted: UserError unless it has all that a run resumes from, each
    value of its type.
    """
    path = folder / "training.json"
    try:
        values = json.loads(read_text(path))
        before = values["outliers"]["before"]
        fits = type(values["step"]) is int and 0 <= values["step"] < 10**8 and isinstance(values["data_sha256"], str)
        fits = fits and type(values["outliers"]["count"]) is int and isinstance(values["scaler"], dict)
        fits = fits and all(type(values[name]) in (int, float, type(None)) for name in ("val_loss", "best_val_loss"))
        fits = fits and type(values["best_step"]) in (int, type(None))
        fits = fits and all(type(v) in (int, float) for found in before.values() for v in found)
    except BAD_JSON as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {e})") from None
    if not fits:
        raise UserError(f"{path} does not hold what a run resumes from")
    if STEP_NAME.fullmatch(folder.name) and step_name(values["step"]) != folder.name:
        raise UserError(f"{path} is of step {values['step']}")
    return values


# ---- tensors, whole or in shards --------------------------------------------------------------------------------------


def fill(folder: Path, wanted: dict[str, Tensor], model: GPT) -> None:
    """Copy tensors by name out of a folder's safetensors files into `wanted`. Both may be sharded or whole. UserError if one is
    missing or has another shape or dtype, or if the files have one that is neither a weight nor a moment of the model.
    """
    check_dtypes(folder, wanted)
    import torch.distributed.checkpoint as dcp  # half a second, only where a run resumes

    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        metadata = reader.read_metadata()
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:  # in what the files say of themselves
        raise UserError(f"{folder}: the headers of its safetensors files cannot be read ({type(e).__name__}: {e})") from None
    found = metadata.state_dict_metadata
    files = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
    for name, tensor in wanted.items():
        if name not in found:
            where = folder / ("training.safetensors" if name.partition(".")[0] in MOMENTS else "model.safetensors")
            raise UserError(f"{where if where.is_file() else folder}: {name} is missing")
        size = found[name].size
        if size != tensor.shape:
            raise UserError(f"{files[name]}: {name} has shape {list(size)}, expected {list(tensor.shape)}")
        if not covers(found[name].chunks, size):
            raise UserError(f"{folder}: the shards of {name} do not cover it")
    known = {f"{kind}{n}" for n, _ in model.named_parameters() for kind in ("", *(f"{kind}." for kind in MOMENTS))}
    if unknown := sorted(n for n in found if n not in known and not n.startswith("random.")):
        raise UserError(f"{files[unknown[0]]}: {unknown[0]} does not belong to this model")
    try:
        with warnings.catch_warnings(action="ignore"):  # about no_dist
            dcp.load(wanted, storage_reader=reader, no_dist=True)  # each process reads what it needs
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder} cannot be read: {str(e).partition(chr(10))[0]}") from None


def check_dtypes(folder: Path, wanted: dict[str, Tensor]) -> None:
    """UserError unless those of the wanted tensors that the folder's files hold are float32 there."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as f:
                kinds = {n: f.get_slice(n).get_dtype() for n in f.keys() if n in wanted}  # noqa: SIM118 (it is no dict)
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is not a readable safetensors file: {e}") from None
        if other := sorted(n for n, kind in kinds.items() if kind != "F32"):
            raise UserError(f"{path}: {other[0]} is {DTYPES.get(kinds[other[0]], kinds[other[0]])}, expected float32")


def covers(chunks: list, size: torch.Size) -> bool:
    """Whether chunks of rows make up a whole tensor: without gaps, without overlaps, each as wide as it."""
    row = 0
    for chunk in sorted(chunks, key=lambda c: tuple(c.offsets)):
        if chunk.offsets and (chunk.offsets[0] != row or any(chunk.offsets[1:]) or chunk.sizes[1:] != size[1:]):
            return False
        row += chunk.sizes[0] if chunk.sizes else 0
    return not size or row == size[0]


# ---- a model by name --------------------------------------------------------------------------------------------------


def load_named(name: str, say: Callable[[str], None] = print) -> tuple[GPT, Tokenizer]:
    """load_model(), or random weights from a config file. It runs that file: only for names typed on the command line."""
    if Path(name).suffix != ".py" or Path(name).is_dir():
        return load_model(name, say)
    cfg = load_file(name)
    if cfg.vocab_size != GPT2Tokenizer.vocab_size:
        raise UserError(f"{name} has vocab_size={cfg.vocab_size}: random weights are sampled with GPT-2's tokenizer only")
    torch.manual_seed(cfg.seed)
    return GPT(cfg), GPT2Tokenizer()


def load_model(name: str, say: Callable[[str], None] = print) -> tuple[GPT, Tokenizer]:
    """(model on the CPU in fp32, tokenizer) from any of: a run's folder, one checkpoint, a folder in the Hugging Face layout, a
    hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name). Runs nothing: the name may come from an untrusted file.
    """
    path = Path(name)
    try:
        is_folder = path.is_dir()
    except OSError:  # a name longer than the file system allows
        is_folder = False
    if is_folder:
        ours = STEP_NAME.fullmatch(path.name) or candidates(path) or (path / "log.jsonl").exists()
        if not ours and (path / "config.json").exists():
            return with_gpt2_tokenizer(pretrained.load_hf_dir(path), name)
        return load_checkpoint(path) if STEP_NAME.fullmatch(path.name) else load_newest(path, say)
    hub = re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", name) and not name.startswith(("out/", "./"))
    if hub and path.suffix != ".py":
        return with_gpt2_tokenizer(pretrained.load_hub(name), name)
    raise UserError(
        f"{name} is not a run, a checkpoint or a model folder: use a folder like out/shakespeare, a hub name like gpt2, or "
        "(sample.py, evaluate.py) a config file"
    )


def with_gpt2_tokenizer(model: GPT, name: str) -> tuple[GPT, Tokenizer]:
    """A model in the Hugging Face layout, and the only tokenizer there is for it."""
    if model.cfg.vocab_size != GPT2Tokenizer.vocab_size:
        raise UserError(f"{name} has {model.cfg.vocab_size} ids; in this layout only GPT-2's 50257 have a tokenizer")
    return model, GPT2Tokenizer()


def load_newest(run_dir: Path, say: Callable[[str], None]) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of a run's newest checkpoint. If the run, still training, removes that one meanwhile, of the next."""
    while True:
        folder = newest(run_dir, say)
        try:
            return load_checkpoint(folder)
        except UserError:
            if folder.is_dir():
                raise


def load_checkpoint(folder: Path) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of one checkpoint. UserError if their vocabularies differ: an id would be outside the embedding."""
    verify(folder)
    model, tokenizer = pretrained.empty_model(read_config(folder, GPTConfig)), read_tokenizer(folder)
    if tokenizer.vocab_size != model.cfg.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, the model has a vocabulary of {model.cfg.vocab_size}: "
            "they do not belong together"
        )
    load_weights(folder, model)
    tokenizer.start = read_start(folder, tokenizer)
    return model, tokenizer


def check_finite(model: GPT, name: str) -> None:
    """UserError if a weight is NaN or infinite. The outputs need not show it: rounding to int8 makes numbers of NaN."""
    for weight, p in model.named_parameters():
        if not torch.stack(torch.aminmax(p.detach())).isfinite().all():
            raise UserError(f"{name}: {weight} has NaN or infinite values, so there is nothing to sample from")
