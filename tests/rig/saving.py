"""F01 to F10: saves that are interrupted, checkpoints that are damaged, forged or written by two at once."""

import itertools
import json
import os
import pickle
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from trained import edit_manifest

from base.files import ROOT
from corpus import shards
from engine import checkpoint
from rig.damage import damaged, put, refuses_data, refuses_to_resume, refuses_to_sample, rewrite, sealed
from rig.processes import PATIENCE, clean, need
from rig.runs import Box, fault, same, steps_saved, undamaged

TENSORS = ["model.safetensors", "training.safetensors"]


@fault("F01", [1.5, 1.00001, 1.1, 1.2, 1.35, 1.65, 1.8, 1.9, 1.99, 2.0, 0.5])
def killed_while_saving(box: Box, saves: float) -> None:
    """saves: how many are written before it dies."""
    whole, out = box.whole(), box.path()
    size = sum(p.stat().st_size for p in (whole / "step_00000004").glob("*.safetensors"))
    done = box.start(["-m", "safety.prove", f"--kill_at_byte={int(saves * size)}", "--", *box.flags(out)]).wait()
    need(done.status == -signal.SIGKILL, f"was not killed: status {done.status}")
    need(steps_saved(out) == [4] * (saves > 1), f"{steps_saved(out)} are saved")
    undamaged(out, whole)
    box.resumed(out, whole, resume="auto")


FEW = dict(keep_checkpoints=1, keep_best=False)


def die_before(box: Box, out: Path, n: int) -> list[str]:
    """Die before the n-th system call of the third save, which removes the first one; n = 0: save, and return all the calls."""
    done = box.train(out, inject=f"die_before={n},12,{out}.calls", **FEW).wait()
    need(done.status == (-signal.SIGKILL if n else 0), f"ended with status {done.status}")
    return [] if n else Path(f"{out}.calls").read_text().split()


def calls_of_a_save(box: Box) -> list[tuple[int, str]]:
    calls = die_before(box, box.path(), 0)
    need({"rename", "fsync", "rmdir"} <= set(calls), f"the save of step 12 does {calls}")
    return list(enumerate(calls, 1))


@fault("F02", calls_of_a_save)
def killed_between_system_calls(box: Box, n: int, name: str) -> None:
    whole, out = box.whole(), box.path()
    die_before(box, out, n)
    need(steps_saved(out), "nothing is saved")
    undamaged(out, whole)
    box.resumed(out, whole, **FEW)


@fault("F03", [(20_000, "cannot save a checkpoint"), (0, "log.jsonl")])
def disk_full(box: Box, most: int, word: str) -> None:
    """The kernel refuses to let a file grow: beyond 20 KB, so that no checkpoint fits; beyond the log, so that no step does."""
    whole = box.whole()
    out = box.copy_of(whole, upto=8)
    limit = most or (out / "log.jsonl").stat().st_size + 2500
    process = box.train(out, resume=True)
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, limit))
    box.fails(process, word)
    warned = process.said()[1].count("WARNING: cannot save")
    need(warned >= 3 or not most, f"{warned} warnings while training continued")
    need(steps_saved(out) == [4, 8], f"{steps_saved(out)} are saved")
    undamaged(out, whole)
    box.resumed(out, whole)


@fault("F04", itertools.product(TENSORS, (25, 50, 99)))
def truncated(box: Box, name: str, percent: int) -> None:
    whole = box.whole()
    out = box.copy_of(whole, upto=16)
    path = out / "step_00000016" / name
    os.truncate(path, path.stat().st_size * percent // 100)
    done = box.resumed(out, whole)
    notes = [line for line in done.out.splitlines() if "skipping a checkpoint" in line]
    need(len(notes) == 1 and str(path) in notes[0], f"it did not report which checkpoint it skips: {notes}")


@fault("F05", range(100))
def bit_flipped(box: Box, n: int) -> None:
    """Places in all of its files alike; three of them before train.py --resume and sample.py."""
    out = box.copy_of(box.whole(), upto=4)
    folder = out / "step_00000004"
    files = sorted(folder.iterdir())
    path = files[n % len(files)]
    content, at, bit = path.read_bytes(), box.random.randrange(path.stat().st_size), box.random.randrange(8)
    path.write_bytes(put(at, bytes([content[at] ^ 1 << bit]))(content))
    need(not steps_saved(out), f"{path.name}, byte {at}, bit {bit}: accepted")
    if n < 3:
        # a manifest with another digest in it makes another file look damaged
        box.fails(box.sample(folder), str(folder) if path.name == "manifest.json" else path.name)
        box.fails(box.train(out, resume=True), "none of its 1 checkpoint(s) is usable")


class Exit:
    """Whoever unpickles it ends at once, without the error line that is demanded."""

    def __reduce__(self):
        return os._exit, (77,)


def pickles(*names: str) -> list[tuple[Callable, str]]:
    """(a function that puts a pickle, a bare one or torch.save's, in place of a file in a folder; the file's name)."""
    bare = [(rewrite(name, lambda _: pickle.dumps(Exit(), 0)), name) for name in names]
    return bare + [(lambda folder, name=name: torch.save(Exit(), folder / name), name) for name in names]


fault("F06", pickles(*TENSORS, "config.json"))(refuses_to_resume)
fault("F06", pickles("model.safetensors", "tokenizer.json", "config.json"))(refuses_to_sample)
BARE = pickles("tokenizer.json", "train_000000.bin")[:2]
fault("F06", [(sealed(plant), name) for plant, name in BARE])(refuses_data)


@fault("F06")
def hugging_face_pickle(box: Box) -> None:
    folder = box.path()
    folder.mkdir()
    sizes = dict(model_type="gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=50257, n_positions=8)
    (folder / "config.json").write_text(json.dumps(sizes))
    torch.save(Exit(), folder / "pytorch_model.bin")
    box.fails(box.sample(folder), "never opened")


KEYS = {TENSORS[0]: "transformer.h.0.mlp.c_fc.weight", TENSORS[1]: "exp_avg.transformer.ln_f.weight"}
CHANGES = {
    "missing": lambda t, k: t.pop(k),
    "does not belong": lambda t, k: t.update({k + ".more": torch.zeros(2)}),
    "shape": lambda t, k: t.update({k: torch.zeros(3, 5)}),
    "int64": lambda t, k: t.update({k: t[k].long()}),
}


@fault("F07", itertools.product(TENSORS, CHANGES))
def wrong_tensors(box: Box, name: str, word: str) -> None:
    def changed(content: bytes) -> bytes:
        tensors = safetensors.torch.load(content)
        CHANGES[word](tensors, KEYS[name])
        return safetensors.torch.save(tensors)

    refuses_to_resume(box, rewrite(name, changed), name, KEYS[name], word)


@fault("F08")
def unknown_version(box: Box) -> None:
    folder = damaged(box, lambda folder: edit_manifest(folder, lambda values: values.update(format=99)))
    box.fails(box.sample(folder), "checkpoint format 99", f"reads {checkpoint.FORMAT}")
    process = box.train(folder.parent, resume=True)
    box.fails(process, "none of its 1 checkpoint(s) is usable")
    need("checkpoint format 99" in process.wait().out, "the resumed run does not report why")


OTHER_MANIFEST = rewrite(shards.MANIFEST, lambda b: b.replace(b'"version": 1', b'"version": 99', 1))
OTHER_SHARD = rewrite("val_000000.bin", put(8, struct.pack("<I", 99)))
fault("F08", [(OTHER_MANIFEST, shards.MANIFEST, "version 99"), (OTHER_SHARD, "val_000000.bin", "version 99")])(refuses_data)

LONG = dict(max_steps=1500, checkpoint_interval=300, eval_interval=500)


@fault("F09", [False, True, "auto"])
def two_writers(box: Box, resume: bool | str) -> None:
    whole, out = box.whole(**LONG), box.path()
    writer = box.train(out, **LONG)
    box.reach(writer, out, 310)
    box.fails(box.train(out, resume=resume, **LONG), "another process is training in", str(out))
    need(writer.popen.poll() is None, "the first run had ended before the second was refused: nothing was tested")
    need(writer.wait(2 * PATIENCE).status == 0, "the first run was disturbed")
    same(whole, out)
    need(not list(box.folder.glob(f"{out.name}.*")), "the first run's folder was moved")


@fault("F09")
def three_writers(box: Box) -> None:
    out = box.path()
    ends = [w.wait(2 * PATIENCE) for w in [box.train(out, **LONG) for _ in range(3)]]
    need(sorted(e.status for e in ends) == [0, 2, 2], f"three at once ended with {[e.status for e in ends]}")
    for end in sorted(ends, key=lambda e: e.status)[1:]:
        clean(end, str(out), within=2 * PATIENCE)
    same(box.whole(**LONG), out)


@fault("F10", [(ROOT / "Makefile" / "run", 1), (Path("/proc/nanoladder"), 1), (Path("/proc/nanoladder"), 2)])
def no_place(box: Box, out: Path, ranks: int) -> None:
    box.refused(out, "cannot write to out_dir", ranks=ranks)


@fault("F10", [False, True])
def read_only(box: Box, resume: bool) -> None:
    out = box.copy_of(box.whole(), upto=8)
    folders = [out, *(p for p in out.rglob("*") if p.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o555)
        box.refused(out if resume else out / "run", "cannot write to out_dir", inject="no_root", resume=resume)
    finally:
        for folder in folders:
            folder.chmod(0o755)
