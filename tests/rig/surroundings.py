"""F22 to F33: data, meeting points, settings, prompts, memory and compilers that are not as they should be."""

import json
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable

import numpy as np

from base.scripts import read_log
from corpus import shards
from rig.damage import put, refuses_data, refuses_to_resume, rewrite, sealed
from rig.processes import PATIENCE, START, clean, need
from rig.runs import TINY, Box, fault, loss_apart, same, steps_saved

TRAIN, VAL, HEADER = "train_000000.bin", "val_000000.bin", shards.HEADER_BYTES

# ---- data -------------------------------------------------------------------------------------------------------------

DAMAGES = [lambda b: b[: len(b) // 2], lambda b: b[:100], lambda b: b[:-1], lambda b: b + b"\0"]
DAMAGES += [put(0, b"PARQUET1"), put(12, struct.pack("<I", 3))]  # another magic, 3 bytes a token
DAMAGES += [put(16, struct.pack("<I", 50257)), put(20, struct.pack("<Q", 2**60))]  # another vocabulary, too many tokens
DAMAGES += [put(28, b"gpt2".ljust(32, b"\0")), put(1000, b"\1")]  # another tokenizer, another token
DAMAGED = [((TRAIN, VAL)[n % 2], change) for n, change in enumerate(DAMAGES)]
fault("F22", [(rewrite(name, change), f"tiny/{name}", "prepare") for name, change in DAMAGED])(refuses_data)


@fault("F23", [0, 35_000_000])
def token_beyond_vocabulary(box: Box, size: int) -> None:
    """In a small shard, which is read through at the start; in one of 70 MB, which is looked at as it is read."""
    content = (box.stage.data / "tiny" / TRAIN).read_bytes()
    head, tokens = content[:HEADER], np.frombuffer(content, "<u2", offset=HEADER).copy()
    place = box.random.randrange(len(tokens))
    if size:  # the second half is bad: the first step of 8 sequences meets it, or the second
        tokens = np.resize(tokens, size)
        tokens[size // 2 :] = 999
        head = put(20, struct.pack("<Q", size))(head)
    else:
        tokens[place] = 60_000
    where = box.data(sealed(rewrite(TRAIN, lambda _: head + tokens.tobytes())))
    line = box.fails(box.train(box.path(), data_dir=where), str(where / "tiny" / TRAIN))
    said = re.search(r"token (\d+) is (\d+), the vocabulary has (\d+)", line)
    need(said, f"the line does not name the token: {line}")
    need(int(said[2]) == tokens[int(said[1])] >= int(said[3]), f"token {said[1]} is {tokens[int(said[1])]}: {line}")
    need(size or int(said[1]) == place, f"changed at {place}: {line}")


def shortened(count: int) -> Callable:
    """A function that cuts the validation shard off after so many tokens, in a data set that is consistent in itself."""
    return sealed(rewrite(VAL, lambda b: put(20, struct.pack("<Q", count))(b)[: HEADER + 2 * count]))


MISSING = [(lambda folder: (folder / VAL).unlink(), VAL), (rewrite(VAL, lambda _: b""), VAL), (shutil.rmtree, "tiny")]
fault("F24", [*MISSING, *((shortened(count), "the validation split") for count in (0, 20))])(refuses_data)

ONE_TOKEN = rewrite(TRAIN, lambda b: b[:1000] + bytes([b[1000] ^ 1]) + b[1001:])
BACKWARDS = sealed(rewrite(TRAIN, lambda b: b[:HEADER] + np.frombuffer(b[HEADER:], "<u2")[::-1].tobytes()))


@fault("F25", [(ONE_TOKEN, "is damaged"), (sealed(ONE_TOKEN), "changed since"), (BACKWARDS, "changed since")])
def data_changed(box: Box, change: Callable, word: str) -> None:
    box.refused(box.copy_of(box.whole(), upto=8), word, resume=True, data_dir=box.data(change))


@fault("F26")
def epoch_wraps(box: Box) -> None:
    """What each process really reads is written down, with a kill and a resumption in the second epoch."""
    T, per_step = TINY["block_size"], 64
    stream = shards.open_dataset(box.stage.data / "tiny").split("train")
    n = (len(stream) - 1) // T
    steps = dict(tokens_per_step=per_step * T, batch_size=8, max_steps=-(-3 * n // per_step), checkpoint_interval=10)
    out, record = box.path(), box.path()
    process = box.train(out, 2, inject=f"record={record}", **steps)
    box.reach(process, out, steps["max_steps"] // 2)
    process.kill()
    box.trained(out, 2, inject=f"record={record}", resume=True, **steps)
    seen: dict[int, dict[tuple[int, int], list[int]]] = {}  # step -> (micro, rank) -> where its sequences begin
    for line in record.read_text().splitlines():
        step, micro, rank, world, starts = json.loads(line)
        if step < steps["max_steps"] and world == 2:  # not what is read ahead of the end, nor for a look at what is on
            known = seen.setdefault(step, {}).setdefault((micro, rank), starts)
            need(known == starts, f"step {step + 1}, process {rank}: the resumed run reads other tokens")
    order = [start for step in sorted(seen) for _, starts in sorted(seen[step].items()) for start in starts]
    need(len(order) == steps["max_steps"] * per_step, f"{len(order)} sequences were read")
    epochs = [order[epoch * n : (epoch + 1) * n] for epoch in range(3)]
    for epoch, starts in enumerate(map(sorted, epochs)):
        each_once = starts == list(range(starts[0], starts[0] + n * T, T))
        need(each_once, f"epoch {epoch + 1}: tokens are read twice or left out, {n - len(set(starts))} sequences twice")
        need(starts[0] >= 0 and starts[-1] + T < len(stream), f"epoch {epoch + 1} reaches over the end")
    need(epochs[0] != epochs[1] != epochs[2], "every epoch has the same order")


# ---- processes that do not meet, or stand still --------------------------------------------------------------------------


@fault("F27", [1, 0])
def stopped(box: Box, rank: int) -> None:
    """Named after 9 s and the 3 s in which the others tell where they stand. What remains to be waited for then is torchrun,
    which gives a process 30 s to obey before it kills it.
    """
    out = box.path()
    process = box.train(out, 2, max_steps=10**6, checkpoint_interval=20, timeout_minutes=0.15)
    since = box.killed(process, out, 50, rank, signal.SIGSTOP)
    process.until(lambda: "error: " in process.said()[1], "a word")
    box.detect.append(time.monotonic() - since)
    clean(process.wait(), f"rank {rank} does not answer", "timeout_minutes", within=3 * PATIENCE)
    need(steps_saved(out), "nothing is saved")


def meeting(rank: int, address: str | None, port: int | None) -> dict[str, str | None]:
    """The environment that torchrun would give to one of two processes."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR=address, MASTER_PORT=port)
    return {name: None if value is None else str(value) for name, value in place.items()}


HERE = "127.0.0.1"


@fault("F28", [(0, HERE, True), (1, "nobody.invalid", True), (1, None, True), (1, HERE, False), (1, HERE, True)])
def no_meeting(box: Box, rank: int, address: str | None, listening: bool) -> None:
    """A process started by hand, as a cluster's scheduler would: port in use, no such host, no address, nobody or somebody else
    there. It gives up by itself and says at which address."""
    with socket.socket() as s:
        s.bind((HERE, 0))
        if listening:
            s.listen()
        port = s.getsockname()[1]
        word = {HERE: str(port), None: "MASTER_ADDR"}.get(address, address)
        process = box.train(box.path(), env=meeting(rank, address, port if address else None))
        box.fails(process, f"process {rank} of 2", word, "--rdzv-endpoint", within=30 + START)


@fault("F29", [("seed", 1), ("n_layer", 1), ("data", None)])
def different_settings(box: Box, word: str, value: int | None) -> None:
    """Refused by both processes."""
    other = {word: value} if value else dict(data_dir=box.data(rewrite(shards.MANIFEST, lambda b: b + b" ")))
    with socket.socket() as s:
        s.bind((HERE, 0))
        port, out = s.getsockname()[1], box.path()
    envs = [meeting(rank, HERE, port) for rank in range(2)]
    for process in [box.train(out, env=envs[0]), box.train(out, env=envs[1], **other)]:
        box.fails(process, "ranks disagree", f"{word} is", "in process 1")
    need(not out.exists(), "a run was begun")


# ---- settings, sampling, machine -----------------------------------------------------------------------------------------


def sampled(box: Box, *flags: str) -> str:
    return box.ends_well(box.sample(box.whole(), "--max_new_tokens=40", *flags)).out


@fault("F30", ["--prompt=" + "the cat sat on a mat, " * 50, "--prompt=", ("--prompt=the", "--top_k=1000000")])
def odd_prompt(box: Box, *flags: str) -> None:
    said = sampled(box, *flags)
    need(set(said) <= set(box.stage.text) and len(said) >= 40, f"it said {said[:50]!r}")


@fault("F30")
def greedy(box: Box) -> None:
    said = {sampled(box, "--prompt=the ", "--temperature=0", f"--seed={seed}") for seed in (1, 2)}
    need(len(said) == 1, "T=0 depends on the seed")


@fault("F30")
def prompt_refused(box: Box) -> None:
    (box.folder / "bad.txt").write_bytes(b"the cat \xff\xfe")
    for flag, word in [("--prompt=Ωmega", "'Ω'"), (f"--prompt_file={box.folder}/bad.txt", "UTF-8")]:
        box.fails(box.sample(box.whole(), flag), word)


@fault("F31")
def unknown_setting(box: Box) -> None:
    path = box.folder / "mine.py"
    path.write_text("from configurator import Config\n\nconfig = Config(batchsize=4)\n")
    box.fails(box.start(["train.py", "--learning_rat=1e-3"]), "learning_rat is not a setting", "learning_rate")
    box.fails(box.start(["train.py", str(path)]), "batchsize is not a setting", "batch_size", "line 3")
    box.fails(box.sample(box.whole(), "--temprature=1"), "temprature", "temperature")


LAYERS = rewrite("config.json", lambda b: b.replace(b"n_layer", b"n_layers"))
fault("F31", [(LAYERS, "config.json", "n_layers", "n_layer")])(refuses_to_resume)


@fault("F32", [(1, 150), (2, 90)])
def out_of_memory(box: Box, ranks: int, megabytes: int) -> None:
    """The kernel refuses more than some MB on top of what the process has when its first step begins: the micro-batch is halved
    until it fits, with the same losses."""
    steps = dict(dropout=0.0, tokens_per_step=2048 * 32, max_steps=6, checkpoint_interval=3, eval_interval=6)
    whole, out = box.whole(ranks, batch_size=64, **steps), box.path()
    done = box.trained(out, ranks, inject=f"memory={megabytes}", batch_size=2048, **steps)
    said = re.findall(r"out of memory with micro-batches of (\d+) .* as \d+ x (\d+)", done.out)
    need(said, f"nothing was said (were {megabytes} MB enough?)")
    need(loss_apart(whole, out) < 1e-4, f"a loss is {loss_apart(whole, out):.0e} off after halving")


@fault("F32", [1, 2])
def one_sequence_too_large(box: Box, ranks: int) -> None:
    how = dict(block_size=4096, tokens_per_step=4096 * ranks, batch_size=1, checkpoint_interval=1, eval_interval=100)
    out = box.path()
    box.trained(out, ranks, max_steps=1, **how)
    box.refused(out, "out of memory", ranks=ranks, inject="memory=60", resume=True, max_steps=4, **how)


@fault("F33")
def no_compiler(box: Box) -> None:
    """auto trains eagerly, says so, and is bit for bit the eager run; compile=True says what to install."""
    bare, out = dict(PATH=str(box.folder), CXX=None, CC=None), box.path()
    done = box.trained(out, env=bare, compile="auto")
    need("compile = False (there is no C++ compiler" in done.out, "it was not reported")
    on = next(r["effective"] for r in read_log(out)[0] if "effective" in r)
    need(on["compile"] is False, "effective() says it was compiled")
    same(box.whole(), out)
    box.refused(box.path(), "compile=True is not available", "--compile=False", env=bare, compile=True)
