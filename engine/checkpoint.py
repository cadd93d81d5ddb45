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

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor

import optim
from base.errors import UserError
from base.files import sha256_of, sync
from configurator import Config, GPTConfig, from_json, load_file
from engine import parallel, pretrained
from model import GPT
from tokenizer import GPT2Tokenizer, Tokenizer
from tokenizer import from_json as tokenizer_from_json

FORMAT = 2
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter
PIECE = 2**24  # bytes written and hashed at a time
STEP_NAME = re.compile(r"step_(\d{8})")


def rng_states(device: torch.device) -> Tensor:
    """This process's random state (torch's CPU generator, then the device's) as bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_rng_states(states: Tensor, device: torch.device) -> None:
    """The reverse of rng_states. UserError if these are none, which a stranger's file may hold."""
    size = torch.get_rng_state().numel()
    try:
        torch.set_rng_state(states[:size])
        if device.type == "cuda" and states.numel() > size:
            torch.cuda.set_rng_state(states[size:], device)
    except (RuntimeError, TypeError, IndexError) as e:
        raise UserError(f"no random state ({e})") from None


def state_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights by name, AdamW's state by name: "exp_avg.transformer.wte.weight" and so on), as far as this process has them."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    kept = optim.inner_optimizer(optimizer).state
    return weights, {f"{kind}.{n}": t for n, p in model.named_parameters() for kind, t in kept.get(p, {}).items()}


@dataclass
class Snapshot:
    """The state of a run after a step, as the loop hands it over to be written."""

    step: int
    weights: dict[str, Tensor]  # as far as this process has them, like the next
    moments: dict[str, Tensor]
    random_states: list[Tensor]  # rng_states() of every rank, in rank order
    cfg: Config
    tokenizer: Tokenizer
    extra: dict  # JSON values for training.json

    def copied(self, buffers: dict[str, Tensor]) -> "Snapshot":
        """The same with its tensors copied to the CPU, into buffers that are made the first time and kept."""

        for name, t in (self.weights | self.moments).items():  # no moment has the name of a weight
            if name not in buffers:
                buffers[name] = torch.empty_like(t, device="cpu", pin_memory=t.device.type == "cuda")
            buffers[name].copy_(t, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are queued
        weights, moments = ({n: buffers[n] for n in part} for part in (self.weights, self.moments))
        return replace(self, weights=weights, moments=moments)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Write tensors in the safetensors format, through to the disk; returns {bytes, sha256} of what was written.

    The library's own writer gives the same bytes but holds the interpreter while it writes, so that a thread of it would
    stop the training steps; writing and hashing piece by piece, here, does not. The format: a 64-bit length, a JSON header
    padded to 8 bytes, the tensors one after another (https://github.com/huggingface/safetensors).
    """
    dtypes = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
    header, end = {}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": dtypes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 8 + len(text) + end
    with open(path, "wb", buffering=0) as f:

        def put(content: bytes | memoryview) -> None:
            for at in range(0, len(content), PIECE):
                piece = content[at : at + PIECE]
                digest.update(piece)
                while piece:
                    piece = piece[f.write(piece) :]

        put(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            put(memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        os.fsync(f.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write(
    final: Path, snapshot: Snapshot, more: dict[str, dict[str, Tensor]] | None = None, shards: Path | None = None
) -> None:
    """Make the checkpoint folder `final`, wholly or not at all. UserError if the disk does not take it.

    more: further safetensors files of it, by name. shards: a folder beside `final` that sharded weights and moments were
    written to already; it becomes the checkpoint.
    """
    temporary, replaced = beside(final, ".writing_"), beside(final, ".replaced_")
    try:
        if shards is None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        else:
            temporary = shards
        random = {f"random.{rank}": state for rank, state in enumerate(snapshot.random_states)}
        if shards is None:
            files = {"model.safetensors": snapshot.weights, "training.safetensors": snapshot.moments | random}
        else:
            files = {"random.safetensors": random}
        entries = {name: write_safetensors(temporary / name, tensors) for name, tensors in (files | (more or {})).items()}
        write_config(temporary, snapshot.cfg)
        (temporary / "tokenizer.json").write_text(snapshot.tokenizer.to_json(), encoding="utf-8")
        training = {"step": snapshot.step} | snapshot.extra
        (temporary / "training.json").write_text(json.dumps(training, indent=1), encoding="utf-8")
        for path in sorted(temporary.iterdir()):
            if path.name not in entries:
                sync(path)
                entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        manifest = {"format": FORMAT, "step": snapshot.step, "files": dict(sorted(entries.items()))}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(temporary / "manifest.json")
        sync(temporary)
        if final.exists():  # the same step, saved by an earlier attempt: it goes only once the new one is in its place
            os.rename(final, replaced)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        sync(final.parent)
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f"cannot save a checkpoint in {final.parent}: {reason}; earlier ones are untouched") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def beside(final: Path, prefix: str) -> Path:
    """The name of a folder next to `final` that no reader takes for a checkpoint."""
    return final.with_name(prefix + final.name)


def clean_up(run_dir: Path) -> None:
    """Put right what a run that died while saving has left; for who holds the lock."""
    for leftover in run_dir.glob(".writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in run_dir.glob(".replaced_*"):
        final = run_dir / replaced.name.removeprefix(".replaced_")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:  # it died between the two renames: the old one is the one there is
            os.rename(replaced, final)


def save(run_dir: Path, snapshot: Snapshot, keep: int, best_step: int | None = None, shards: Path | None = None) -> Path:
    """Write the checkpoint of a snapshot, then delete all others but the newest, `keep` in all, and that of best_step."""
    final = run_dir / step_name(snapshot.step)
    write(final, snapshot, shards=shards)
    for old in [c for c in candidates(run_dir) if c != final][keep - 1 :]:
        if old.name != step_name(best_step):
            shutil.rmtree(old, ignore_errors=True)
    return final


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def step_name(step: int | None) -> str:
    """The name of a step's checkpoint; of what is no step, none."""
    return f"step_{step:08d}" if type(step) is int else ""


class Saver:
    """Writes a run's checkpoints one after another: in a thread of its own, or (background=False) while the caller waits.

    Every process has one, since sharded state is written by all; the first process writes the rest and makes it final.
    """

    def __init__(self, run_dir: Path, world: parallel.World, sharded: bool, background: bool):
        self.run_dir, self.world, self.sharded, self.background = run_dir, world, sharded, background
        self.buffers: dict[str, Tensor] = {}
        self.thread = ThreadPoolExecutor(1, "saver")
        self.thread.submit(int)  # begins while there is memory for it
        self.pending: Future | None = None
        # a thread's messages must not mix with the steps'
        self.group = dist.new_group(backend="gloo") if sharded else None

    def save(self, snapshot: Snapshot, keep: int, best_step: int | None) -> None:
        """Begin to write a checkpoint, once the one before it is done; wait() tells what became of it."""
        if not self.sharded and not self.world.is_main:
            return
        final = self.run_dir / step_name(snapshot.step)
        if self.background:
            self.wait()
            snapshot = snapshot.copied({} if self.sharded else self.buffers)
        self.pending = self.thread.submit(self._write, final, snapshot, keep, best_step)
        if not self.background:
            wait([self.pending])

    def _write(self, final: Path, snapshot: Snapshot, keep: int, best_step: int | None) -> tuple[Path, float]:
        began, shards = time.perf_counter(), None
        if self.sharded:
            shards = beside(final, ".writing_")
            failed = None
            if self.world.is_main:
                try:
                    shutil.rmtree(shards, ignore_errors=True)
                    shards.mkdir(parents=True)
                except OSError as e:
                    failed = e.strerror or str(e)
            if self._any(failed is not None):
                reason = failed or "process 0 cannot make the folder"
                raise UserError(f"cannot save a checkpoint in {final.parent}: {reason}; earlier ones are untouched")
            import torch.distributed.checkpoint as dcp  # half a second, for those who shard

            try:
                writer = dcp.HuggingFaceStorageWriter(str(shards), save_distributed=True)
                dcp.save(snapshot.weights | snapshot.moments, storage_writer=writer, process_group=self.group)
            except dcp.CheckpointException as e:  # raised in every process if it is in one
                shutil.rmtree(shards, ignore_errors=True)
                reason = next(iter(e.failures.values()))[0]
                raise UserError(f"cannot save a checkpoint in {final.parent}: {reason}; earlier ones are untouched") from None
        if self.world.is_main:
            save(self.run_dir, snapshot, keep, best_step, shards)
        return final, time.perf_counter() - began

    def _any(self, flag: bool) -> bool:
        """Whether the flag is up in some process, asked in the group of the threads."""
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, group=self.group)
        return flags.item() > 0

    def done(self) -> bool:
        """Whether there is something to wait() for that will not take time."""
        return self.pending is not None and self.pending.done()

    def wait(self) -> tuple[Path, float] | None:
        """(folder, seconds it took) of the save under way, once it is done. UserError if it failed."""
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        return pending.result()

    def close(self) -> None:
        self.thread.shutdown()


def write_config(folder: Path, cfg: Config) -> None:
    """The resolved configuration as config.json."""
    (folder / "config.json").write_text(json.dumps(asdict(cfg), indent=1), encoding="utf-8")


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
    if STEP_NAME.fullmatch(folder.name) and step_name(manifest.get("step")) != folder.name:
        raise UserError(f"{folder}: manifest.json is of step {manifest.get('step')!r}")
    if absent := sorted({"config.json", "tokenizer.json", "training.json"} - entries.keys()):
        raise UserError(f"{folder}: manifest.json does not list {absent[0]}")
    if not any(name == "model.safetensors" or name.startswith("shard-") for name in entries):
        raise UserError(f"{folder}: manifest.json does not list model.safetensors")
    if extra := sorted(p.name for p in folder.glob("*.safetensors") if p.name not in entries):
        raise UserError(f"{folder}/{extra[0]} is not listed in manifest.json")
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
    if (folder / "model.safetensors").is_file() and not optim.is_sharded(model):
        state = pretrained.read_safetensors(folder / "model.safetensors")
        if model.cfg.tie_weights and "transformer.wte.weight" in state:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        pretrained.checked_load(model, state, f"{folder}/model.safetensors")
    else:
        if model.lm_head.weight.is_meta:
            model.to_empty(device="cpu")
            model.tie_weights()
        names = [n for n, _ in model.named_parameters()]
        fill(folder, {n: p.detach() for n, p in model.named_parameters()}, {f"{k}.{n}" for k in MOMENTS for n in names})


def load_training(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, rank: int, device: torch.device) -> dict:
    """Optimizer state, as far as this process keeps it, and this rank's random state from a verified checkpoint. Returns
    training.json."""
    kept = optim.inner_optimizer(optimizer)
    mine = {p for group in kept.param_groups for p in group["params"]}
    for p in mine:
        # AdamW keeps its step counter on the device only when fused; the loop wants it on the CPU
        counter = torch.zeros((), device=device if kept.defaults["fused"] else "cpu")
        kept.state[p] = {"step": counter, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    wanted = {f"{kind}.{n}": kept.state[p][kind] for n, p in model.named_parameters() if p in mine for kind in MOMENTS}
    weights = {n for n, _ in model.named_parameters()}
    fill(folder, wanted, weights | {f"{kind}.{n}" for n in weights for kind in MOMENTS})
    where = folder / ("training.safetensors" if (folder / "training.safetensors").is_file() else "random.safetensors")
    with safetensors.safe_open(where, framework="pt") as f:
        states = f.get_tensor(f"random.{rank}") if f"random.{rank}" in f.keys() else None  # noqa: SIM118 (it is no dict)
    if states is not None:  # more ranks than before start their own
        try:
            set_rng_states(states, device)
        except UserError as e:
            raise UserError(f"{where}: random.{rank} is {e}") from None
    return read_training(folder)


def read_training(folder: Path) -> dict:
    """training.json of a verified checkpoint, which may come from a stranger: UserError unless it has all that a run goes on
    from, in its types.
    """
    path = folder / "training.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        before = values["outliers"]["before"]
        fits = type(values["step"]) is int and 0 <= values["step"] < 10**8 and isinstance(values["data_sha256"], str)
        fits = fits and type(values["outliers"]["count"]) is int and isinstance(values["scaler"], dict)
        fits = fits and all(type(values[name]) in (int, float, type(None)) for name in ("val_loss", "best_val_loss"))
        fits = fits and type(values["best_step"]) in (int, type(None))
        fits = fits and all(type(v) in (int, float) for found in before.values() for v in found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {e})") from None
    if not fits:
        raise UserError(f"{path} does not hold what a run goes on from")
    if STEP_NAME.fullmatch(folder.name) and step_name(values["step"]) != folder.name:
        raise UserError(f"{path} is of step {values['step']}")
    return values


def fill(folder: Path, wanted: dict[str, Tensor], others: set[str]) -> None:
    """Copy tensors by name out of a folder's safetensors files into `wanted`, whose tensors may be sharded or whole, as may
    those of the files. UserError if one is missing, has another shape or dtype, or if there is one in neither list.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as f:
                kinds = {n: f.get_slice(n).get_dtype() for n in f.keys() if n in wanted}  # noqa: SIM118 (it is no dict)
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is not a readable safetensors file: {e}") from None
        if other := sorted(n for n, kind in kinds.items() if kind != "F32"):
            kind = {"F16": "float16", "BF16": "bfloat16", "I64": "int64"}.get(kinds[other[0]], kinds[other[0]])
            raise UserError(f"{path}: {other[0]} is {kind}, expected float32")
    import torch.distributed.checkpoint as dcp  # half a second, for those who resume

    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        metadata = reader.read_metadata()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:  # of what the shards say about themselves
        raise UserError(f"{folder}: a shard's own description cannot be read ({type(e).__name__}: {e})") from None
    there = metadata.state_dict_metadata
    files = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
    for name, tensor in wanted.items():
        if name not in there:
            where = "training.safetensors" if name.partition(".")[0] in MOMENTS else "model.safetensors"
            raise UserError(f"{folder / where if (folder / where).is_file() else folder}: {name} is missing")
        size, dtype = there[name].size, there[name].properties.dtype
        if size != tensor.shape or dtype != tensor.dtype:
            expected = f"{tensor.dtype} of shape {list(tensor.shape)}"
            raise UserError(f"{files[name]}: {name} is {dtype} of shape {list(size)}, expected {expected}")
        row = 0  # shares are cut along rows
        for piece in sorted(there[name].chunks, key=lambda c: tuple(c.offsets)):
            if piece.offsets and (piece.offsets[0] != row or any(piece.offsets[1:]) or piece.sizes[1:] != size[1:]):
                raise UserError(f"{folder}: the pieces of {name} do not make a whole")
            row += piece.sizes[0] if piece.sizes else 0
        if size and row != size[0]:
            raise UserError(f"{folder}: the pieces of {name} do not make a whole")
    if strange := sorted(n for n in there if n not in wanted and n not in others and not n.startswith("random.")):
        raise UserError(f"{files[strange[0]]}: {strange[0]} does not belong to this model")
    try:
        with warnings.catch_warnings(action="ignore"):  # that nothing is distributed
            dcp.load(wanted, storage_reader=reader, no_dist=True)  # each process reads what it needs; nothing to agree on
    except (dcp.CheckpointException, ValueError, RuntimeError) as e:  # chunks that do not cover a tensor, say
        raise UserError(f"{folder} cannot be read: {str(e).partition(chr(10))[0]}") from None


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
