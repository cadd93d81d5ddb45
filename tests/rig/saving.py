"""F01 to F10: saves that are interrupted, checkpoints that are damaged, forged or written by two at once."""

import contextlib
import itertools
import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from trained import Bomb, edit_manifest, seal

from base.errors import UserError
from corpus import shards
from engine import checkpoint, restore
from rig.processes import PATIENCE, clean, need
from rig.runs import Box, different, digests, fault, rewrite, steps_saved


@fault("F01", "SIGKILL in a save, at 10 byte offsets, and in the first save", "the newest complete checkpoint loads, G2")
def killed_while_saving(box: Box) -> str:
    whole = box.whole()
    first = whole / "step_00000004"
    size = sum(p.stat().st_size for p in first.glob("*.safetensors"))
    parts = [0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.99, 1.0]
    offsets = [size + max(1, int(part * size)) for part in parts]
    box.random.shuffle(offsets)
    for offset in box.some([*offsets, size // 2]):
        out = box.path()
        done = box.start(["-m", "safety.prove", f"--kill_at_byte={offset}", "--", *box.flags(out)]).wait()
        need(done.status == -signal.SIGKILL, f"was not killed at byte {offset}: status {done.status}")
        if offset > size:
            need(steps_saved(out) == [4], f"byte {offset}: {steps_saved(out)} are saved, not [4]")
            need(not different(out, whole), f"byte {offset}: step 4 is not what was saved")
        box.resumed(out, whole, resume="auto")
    return "N/N: the save before loads, the resumed run is bit for bit the same"


@fault("F02", "SIGKILL before each fsync, rename and removal of a save", "as F01, and leftovers are cleaned up")
def killed_between_system_calls(box: Box) -> str:
    """The third save, which removes the first one."""
    whole = box.whole()

    def die(out: Path, n: int, **how) -> list[str]:
        """Die before the n-th system call of the save of step 12; n = 0: save, and return all the calls."""
        done = box.train(out, inject=[f"die_before={n},12,{out}.calls"], **how).wait()
        need(done.status == (-signal.SIGKILL if n else 0), f"before call {n}: ended with status {done.status}")
        return [] if n else Path(f"{out}.calls").read_text().split()

    few = dict(keep_checkpoints=1, keep_best=False)
    calls = die(box.path(), 0, **few)
    need({"rename", "fsync", "rmdir"} <= set(calls), f"the save of step 12 does {calls}")
    removals = [n for n, name in enumerate(calls) if name in ("unlink", "rmdir")]
    chosen = [n + 1 for n in range(len(calls)) if n not in removals[1:-1]]
    box.random.shuffle(chosen)
    for n in box.some(chosen):
        out = box.path()
        die(out, n, **few)
        need(not different(out, whole), f"before {calls[n - 1]} {n}: {different(out, whole)} have changed")
        need(steps_saved(out), f"before {calls[n - 1]} {n}: nothing is saved")
        box.resumed(out, whole, **few)
    return f"killed before {box.tries} calls ({', '.join(sorted(set(calls)))}); nothing lost, nothing left over"


@fault("F03", "disk full: for a save, the last save, the log", "a warning or a clean failure, old checkpoint intact; then G2")
def disk_full(box: Box) -> str:
    """The kernel refuses to let a file grow: beyond 20 KB, so that no checkpoint fits; beyond the log, so that no step does."""
    whole = box.whole()
    for most, words in box.some([(20_000, "cannot save a checkpoint"), (None, "log.jsonl")]):
        out = box.copy_of(whole, upto=8)
        before = digests(out)
        limit = most or (out / "log.jsonl").stat().st_size + 2500
        process = box.train(out, resume=True)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, limit))
        done = process.wait()
        if most:
            warned = done.texts[0][1].count("WARNING: cannot save")
            need(warned >= 3, f"{warned} warnings while training continued: {done.texts[0][1][-300:]}")
        clean(done, words)
        need(digests(out) == before, "the earlier checkpoints have changed")
        box.detect.append(done.seconds)
        box.resumed(out, whole)
    return "training continues with a warning, a final save that fails is an error; the earlier checkpoints are intact"


@fault("F04", "newest checkpoint truncated to 25, 50, 99%", "refused, resumes from the one before with a warning, G2")
def truncated(box: Box) -> str:
    whole = box.whole()
    files = ["model.safetensors", "training.safetensors"]
    for name, percent in box.some(itertools.product(files, (25, 50, 99))):
        out = box.copy_of(whole, upto=16)
        path = out / "step_00000016" / name
        os.truncate(path, path.stat().st_size * percent // 100)
        done = box.resumed(out, whole)
        notes = [line for line in done.out.splitlines() if "skipping a checkpoint" in line]
        need(len(notes) == 1 and str(path) in notes[0], f"it did not report which checkpoint it skips: {notes}")
    return "N/N refused by name, the one before was taken"


@fault("F05", "one bit of a checkpoint flipped, at 100 places", "100 of 100 refused")
def bit_flipped(box: Box) -> str:
    """Places in all of its files alike; then three of them before train.py --resume and sample.py."""
    out = box.copy_of(box.whole(), upto=4)
    folder = out / "step_00000004"
    files = sorted(folder.iterdir())
    accepted = []

    @contextlib.contextmanager
    def flipped(path: Path) -> Iterator[str]:
        content, at, bit = path.read_bytes(), box.random.randrange(path.stat().st_size), box.random.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        yield f"{path.name}, byte {at}, bit {bit}"
        path.write_bytes(content)

    for k in range(100):
        box.tries += 1
        with flipped(files[k % len(files)]) as place, contextlib.suppress(UserError):
            restore.verify(folder)
            accepted.append(place)
    restore.verify(folder)
    need(not accepted, f"{len(accepted)} of 100 were accepted: {'; '.join(accepted[:5])}")
    for path in box.some(files[:3]):
        with flipped(path):
            # a manifest with another digest in it makes another file look damaged
            box.fails(box.sample(folder), str(folder) if path.name == "manifest.json" else path.name)
            box.fails(box.train(out, resume=True), "none of its 1 checkpoint(s) is usable")
    return "100 of 100 refused, and by train.py --resume and sample.py"


@fault("F06", "a malicious pickle as weights, moments, tokenizer, config, shard, Hugging Face weights", "refused, nothing run")
def malicious_pickle(box: Box) -> str:
    bomb = Bomb(str(box.folder / "ran"))
    whole = box.whole()
    by_torch, by_pickle = torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 0))
    cases = itertools.product(("model.safetensors", "training.safetensors"), (by_torch, by_pickle))
    for name, plant in box.some([*cases, ("tokenizer.json", by_pickle), ("config.json", by_pickle)]):
        out = box.copy_of(whole, upto=4)
        folder = out / "step_00000004"
        plant(bomb, folder / name)
        seal(folder)
        if name != "training.safetensors":
            box.fails(box.sample(folder), name)
        if name != "tokenizer.json":  # a run takes its tokenizer from its data
            box.fails(box.train(out, resume=True), name)
    for name in box.some(["tokenizer.json", "train_000000.bin"]):
        where = box.data(lambda folder, name=name: by_pickle(bomb, folder / name), sealed=True)
        box.refused(box.path(), name, data_dir=str(where))
    for _ in box.some(["hf"]):
        hf = box.path("hf")
        hf.mkdir()
        sizes = dict(model_type="gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=50257, n_positions=8)
        (hf / "config.json").write_text(json.dumps(sizes))
        by_torch(bomb, hf / "pytorch_model.bin")
        box.fails(box.sample(hf), "never opened")
    need(not Path(bomb).exists(), "the pickle was run")
    return "N/N refused by name, nothing was run"


@fault("F07", "a tensor of a checkpoint is missing, extra, of another shape or dtype", "clean failure that names file and key")
def wrong_tensors(box: Box) -> str:
    """In a checkpoint that is consistent in itself: its manifest is made to fit."""
    files = {"model.safetensors": "transformer.h.0.mlp.c_fc.weight", "training.safetensors": "exp_avg.transformer.ln_f.weight"}
    changes = {
        "missing": lambda t, k: t.pop(k),
        "does not belong": lambda t, k: t.update({k + ".more": torch.zeros(2)}),
        "shape": lambda t, k: t.update({k: torch.zeros(3, 5)}),
        "int64": lambda t, k: t.update({k: t[k].long()}),
    }
    for (name, key), (word, change) in box.some(itertools.product(files.items(), changes.items())):
        out = box.copy_of(box.whole(), upto=4)
        path = out / "step_00000004" / name
        tensors = safetensors.torch.load_file(path)
        change(tensors, key)
        safetensors.torch.save_file(tensors, path)
        seal(path.parent)
        box.refused(out, name, key, word, resume=True)
    return "N/N named"


@fault("F08", "unknown format version of checkpoint or data", "clean failure that names it")
def unknown_version(box: Box) -> str:
    out = box.copy_of(box.whole(), upto=4)
    folder = out / "step_00000004"
    edit_manifest(folder, lambda values: values.update(format=99))
    box.tries += 2
    box.fails(box.sample(folder), "checkpoint format 99", f"reads {checkpoint.FORMAT}")
    process = box.train(out, resume=True)
    box.fails(process, "none of its 1 checkpoint(s) is usable")
    need("checkpoint format 99" in process.wait().out, "the resumed run does not report why")
    versions = {
        shards.MANIFEST: lambda b: b.replace(b'"version": 1', b'"version": 99', 1),
        "val_000000.bin": lambda b: b[:8] + struct.pack("<I", 99) + b[12:],
    }
    for name, change in box.some(versions.items()):
        box.refused(box.path(), name, "version 99", data_dir=str(box.data(rewrite(name, change))))
    return "N/N refused with both versions named"


@fault(
    "F09", "two writers, one out_dir: a second run, a resumption, three at once", "one runs and is whole, others are refused"
)
def two_writers(box: Box) -> str:
    steps = dict(max_steps=1500, checkpoint_interval=300, eval_interval=500)
    whole = box.whole(**steps)
    for resume in box.some([False, True, "auto"]):
        out = box.path()
        writer = box.train(out, **steps)
        box.reach(writer, out, 310)
        box.fails(box.train(out, resume=resume, **steps), "another process is training in", str(out))
        need(writer.popen.poll() is None, "the first run had ended before the second was refused: nothing was tested")
        need(writer.wait(2 * PATIENCE).status == 0, "the first run was disturbed")
        box.same(whole, out)
        need(not list(box.folder.glob(f"{out.name}.*")), "the first run's folder was moved")
    for _ in box.some(["at once"]):
        out = box.path()
        ends = [w.wait(2 * PATIENCE) for w in [box.train(out, **steps) for _ in range(3)]]
        need(sorted(e.status for e in ends) == [0, 2, 2], f"three at once ended with {[e.status for e in ends]}")
        for end in ends:
            if end.status:
                clean(end, str(out), within=2 * PATIENCE)
        box.same(whole, out)
    return "refused by name; of three that start at once, one runs"


@fault("F10", "out_dir is read-only, on a read-only file system, or below a file", "found before step 1")
def read_only(box: Box) -> str:
    out = box.copy_of(box.whole(), upto=8)
    (box.folder / "file").write_text("")
    box.refused(box.folder / "file" / "run", "cannot write to out_dir")
    box.refused(Path("/proc/nanoladder"), "cannot write to out_dir")
    box.refused(Path("/proc/nanoladder"), "cannot write to out_dir", ranks=2)
    box.tries += 5
    locked = box.folder / "locked"
    locked.mkdir()
    folders = [locked, *(p for p in [out, *out.rglob("*")] if p.is_dir())]
    if os.geteuid() == 0:  # root may write anywhere: give up that right (capability 1, CAP_DAC_OVERRIDE)
        give_up = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) and sys.exit(99)"
        box.prefix = [sys.executable, "-c", f"{give_up}; os.execv(sys.argv[1], sys.argv[1:])"]
    try:
        for folder in folders:
            folder.chmod(0o555)
        box.refused(locked / "run", "cannot write to out_dir")
        box.refused(out, "cannot write to out_dir", resume=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    return "N/N refused before step 1, also on resuming"
