"""F22 to F33: data, meeting points, settings, prompts, memory and compilers that are not as they should be."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from trained import seal

from corpus import shards
from rig.processes import PATIENCE, START, Failed, clean, need
from rig.runs import TINY, Box, digests, fault, log, loss_apart, rewrite

# ---- data -------------------------------------------------------------------------------------------------------------


@fault("F22", "a shard is cut off, of odd length, or has a wrong header", "clean failure that names the shard")
def damaged_shard(box: Box) -> str:
    def header(at: int, content: bytes) -> Callable[[bytes], bytes]:
        return lambda b: b[:at] + content + b[at + len(content) :]

    cases = [lambda b: b[: len(b) // 2], lambda b: b[:100], lambda b: b[:-1], lambda b: b + b"\0"]
    cases += [header(0, b"PARQUET1"), header(12, struct.pack("<I", 3))]  # another magic, 3 bytes a token
    cases += [header(16, struct.pack("<I", 50257)), header(20, struct.pack("<Q", 2**60))]  # another vocabulary, too many tokens
    cases += [header(28, b"gpt2".ljust(32, b"\0")), header(1000, b"\1")]  # another tokenizer, another token
    for n, change in enumerate(box.some(cases)):
        name = ("train_000000.bin", "val_000000.bin")[n % 2]
        where = box.data(rewrite(name, change))
        box.refused(box.path(), str(where / "tiny" / name), "prepare", data_dir=str(where))
    return "N/N named, with what to run"


@fault("F23", "a token id beyond the vocabulary", "found on the CPU, with shard and place")
def token_beyond_vocabulary(box: Box) -> str:
    """In a small shard, which is read through at the start; in one of 70 MB, which is looked at as it is read."""
    for size in box.some([0, 35_000_000]):
        content = (box.stage.data / "tiny" / "train_000000.bin").read_bytes()
        head, tokens = content[: shards.HEADER_BYTES], np.frombuffer(content, "<u2", offset=shards.HEADER_BYTES).copy()
        if size:  # the second half is bad: the first step of 8 sequences meets it, or the second
            tokens = np.resize(tokens, size)
            tokens[size // 2 :] = 999
            head = head[:20] + struct.pack("<Q", size) + head[28:]
        else:
            place = box.random.randrange(len(tokens))
            tokens[place] = 60_000
        changed = head + tokens.tobytes()
        where = box.data(rewrite("train_000000.bin", lambda _, changed=changed: changed), sealed=True)
        line = box.fails(box.train(box.path(), data_dir=str(where)), str(where / "tiny" / "train_000000.bin"))
        said = re.search(r"token (\d+) is (\d+), the vocabulary has (\d+)", line)
        need(said, f"the line does not name the token: {line}")
        need(int(said[2]) == tokens[int(said[1])] >= int(said[3]), f"token {said[1]} is {tokens[int(said[1])]}: {line}")
        need(size or int(said[1]) == place, f"changed at {place}: {line}")
    return "in a small shard before step 1, in a large one when it is read; never a device assertion"


@fault("F24", "a shard is missing, empty or too short", "clean failure that names it")
def no_data(box: Box) -> str:
    val = "val_000000.bin"

    def shorter(count: int) -> Callable[[Path], None]:
        size = shards.HEADER_BYTES + 2 * count
        return rewrite(val, lambda b: b[:20] + struct.pack("<Q", count) + b[28:size])

    cases = [
        (val, lambda folder: (folder / val).unlink(), False),
        (val, rewrite(val, lambda _: b""), False),
        ("the validation split", shorter(0), True),
        ("the validation split", shorter(20), True),
        ("tiny", shutil.rmtree, False),
    ]
    for word, change, sealed in box.some(cases):
        box.refused(box.path(), word, data_dir=str(box.data(change, sealed)))
    return "N/N named"


@fault("F25", "the data changed between save and resumption", "refused")
def data_changed(box: Box) -> str:
    """Another text of the same alphabet; one token more or less likely; in a shard whose digest fits, and in one where not."""
    whole = box.whole()
    one_token = rewrite("train_000000.bin", lambda b: b[:1000] + bytes([b[1000] ^ 1]) + b[1001:])

    backwards = box.path("data")
    box.stage.prepare(backwards, lambda text: text[::-1])
    cases = [(backwards, "changed since"), (box.data(one_token), "is damaged"), (box.data(one_token, True), "changed since")]
    for other, word in box.some(cases):
        box.refused(box.copy_of(whole, upto=8), word, resume=True, data_dir=str(other))
    return "N/N refused"


@fault("F26", "the run goes over the end of the data, twice, on 2 processes", "each token once per epoch, processes disjoint")
def epoch_wraps(box: Box) -> str:
    """What each process really reads is written down, with a kill and a resumption in the second epoch."""
    T, per_step = TINY["block_size"], 64
    stream = shards.open_dataset(box.stage.data / "tiny").split("train")
    n = (len(stream) - 1) // T
    steps = dict(tokens_per_step=per_step * T, batch_size=8, max_steps=-(-3 * n // per_step), checkpoint_interval=10)
    out, record = box.folder / "run", box.folder / "record"
    record.mkdir()
    process = box.train(out, 2, inject=[f"record={record}"], **steps)
    if not box.quick:
        box.reach(process, out, steps["max_steps"] // 2)
        process.kill()
        process = box.train(out, 2, inject=[f"record={record}"], resume=True, **steps)
    box.ends_well(process)
    seen: dict[int, dict[tuple[int, int], list[int]]] = {}  # step -> (micro, rank) -> where its sequences begin
    for path in record.iterdir():
        for line in path.read_text().splitlines():
            step, micro, rank, world, starts = json.loads(line)
            if step < steps["max_steps"] and world == 2:  # not what is read ahead of the end, nor for a look at what is on
                known = seen.setdefault(step, {}).setdefault((micro, rank), starts)
                need(known == starts, f"step {step + 1}, process {rank}: the resumed run reads other tokens")
    order = [start for step in sorted(seen) for _, starts in sorted(seen[step].items()) for start in starts]
    need(len(order) == steps["max_steps"] * per_step, f"{len(order)} sequences were read")
    epochs = [order[epoch * n : (epoch + 1) * n] for epoch in range(3)]
    for epoch in range(3):
        starts = sorted(epochs[epoch])
        each_once = starts == list(range(starts[0], starts[0] + n * T, T))
        need(each_once, f"epoch {epoch + 1}: tokens are read twice or left out, {n - len(set(starts))} sequences twice")
        need(starts[0] >= 0 and starts[-1] + T < len(stream), f"epoch {epoch + 1} reaches over the end")
    need(epochs[0] != epochs[1] != epochs[2], "every epoch has the same order")
    return f"3 epochs of {n} sequences: each token once in each, in another order, no two processes the same"


# ---- processes that do not meet, or stand still --------------------------------------------------------------------------


@fault("F27", "SIGSTOP of one process of 2", "time-out (here 9 s) that names it, no orphans")
def stopped(box: Box) -> str:
    """What remains to be waited for then is torchrun, which gives a process 30 s to obey before it kills it."""
    endless = dict(max_steps=10**6, checkpoint_interval=20, timeout_minutes=0.15)
    for rank in box.some([1, 0]):
        out = box.path()
        process = box.train(out, 2, **endless)
        since = box.killed(process, out, 50, rank, signal.SIGSTOP)
        said = f"rank {rank} does not answer"
        with contextlib.suppress(Failed):  # what it says is judged below
            process.until(lambda p=process: any("error: " in err for _, err in p.texts().values()), "a word", 30)
        box.detect.append(time.monotonic() - since)
        done = process.wait(PATIENCE)
        clean(dataclasses.replace(done, seconds=0), said, "timeout_minutes")
        need(len(digests(out)) > 0, "nothing is saved")
    return "named after 9 s and the 3 s in which the others tell where they stand; all gone when torchrun gives up"


def meeting(rank: int, address: str | None, port: int | None) -> dict[str, str | None]:
    """The environment that torchrun would give to one of two processes."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR=address, MASTER_PORT=port)
    return {name: None if value is None else str(value) for name, value in place.items()}


@fault("F28", "port in use, no such host, no address, nobody there, somebody else there", "clean failure within 30 s")
def no_meeting(box: Box) -> str:
    """Processes started by hand, as a cluster's scheduler would."""
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        port, other = taken.getsockname()[1], free.getsockname()[1]
        cases = [
            ("port in use", 0, "127.0.0.1", port, str(port)),
            ("no such host", 1, "nobody.invalid", 29500, "nobody.invalid"),
            ("no address", 1, None, None, "MASTER_ADDR"),
            ("nobody there", 1, "127.0.0.1", other, str(other)),
            ("somebody else there", 1, "127.0.0.1", port, str(port)),
        ]

        def judge(case: tuple) -> str | None:
            what, rank, address, port, word = case
            try:
                process = box.train(box.path(), env=meeting(rank, address, port))
                box.fails(process, f"process {rank} of 2", word, "--rdzv-endpoint", within=30 + START)
            except Failed as e:
                return f"{what}: {e}"

        with ThreadPoolExecutor(len(cases)) as pool:  # at once: they wait, mostly
            wrong = [said for said in pool.map(judge, box.some(cases)) if said]
        need(not wrong, "; ".join(wrong))
    return "N/N give up by themselves and say at which address"


@fault("F29", "two processes started with different settings, data or code", "found before step 1, the difference is named")
def different_settings(box: Box) -> str:
    other = box.data(rewrite(shards.MANIFEST, lambda b: b + b" "))
    cases = [("seed", dict(seed=1)), ("n_layer", dict(n_layer=1)), ("data", dict(data_dir=str(other)))]
    for word, changes in box.some(cases):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port, out = s.getsockname()[1], box.path()
        envs = [meeting(rank, "127.0.0.1", port) for rank in range(2)]
        for process in [box.train(out, env=envs[0]), box.train(out, env=envs[1], **changes)]:
            box.fails(process, "ranks disagree", f"{word} is", "in process 1")
        need(not out.exists(), "a run was begun")
    return "N/N refused by both processes"


# ---- settings, sampling, machine -----------------------------------------------------------------------------------------


@fault("F30", "prompts that are long, empty, not in the alphabet, no UTF-8; top_k above the vocabulary; T=0", "defined")
def odd_sampling(box: Box) -> str:
    out = box.whole()
    (box.folder / "bad.txt").write_bytes(b"the cat \xff\xfe")

    def sampled(*flags: str) -> str:
        return box.ends_well(box.sample(out, "--max_new_tokens=40", *flags)).out

    alphabet = set(box.stage.text())
    for flags in box.some([["--prompt=" + "the cat sat on a mat, " * 50], ["--prompt="], ["--prompt=the", "--top_k=1000000"]]):
        said = sampled(*flags)
        need(set(said) <= alphabet and len(said) >= 40, f"{flags[0][:30]}: {said[:50]!r}")
    box.tries += 1
    greedy = {sampled("--prompt=the ", "--temperature=0", f"--seed={seed}") for seed in (1, 2)}
    need(len(greedy) == 1, "T=0 depends on the seed")
    for flags, word in box.some([(["--prompt=Ωmega"], "'Ω'"), ([f"--prompt_file={box.folder}/bad.txt"], "UTF-8")]):
        box.fails(box.sample(out, *flags), word)
    return "prompts are cut, begun or refused by name"


@fault("F31", "unknown setting in a file, a flag, a checkpoint", "refused with the near name")
def unknown_setting(box: Box) -> str:
    path = box.folder / "mine.py"
    path.write_text("from configurator import Config\n\nconfig = Config(batchsize=4)\n")
    box.tries += 4
    box.fails(box.start(["train.py", "--learning_rat=1e-3"]), "learning_rat is not a setting", "learning_rate")
    box.fails(box.start(["train.py", str(path)]), "batchsize is not a setting", "batch_size", "line 3")
    if not box.quick:
        box.fails(box.sample(box.whole(), "--temprature=1"), "temprature", "temperature")
        out = box.copy_of(box.whole(), upto=4)
        folder = out / "step_00000004"
        rewrite("config.json", lambda b: b.replace(b"n_layer", b"n_layers"))(folder)
        seal(folder)
        box.refused(out, "config.json", "n_layers", "n_layer", resume=True)
    return "each refused in one line with what was meant"


@fault("F32", "out of memory: micro-batch, or one sequence, too large; 1 and 2 processes", "halved with a message; or clean")
def out_of_memory(box: Box) -> str:
    """The kernel refuses more than some MB on top of what the process has when its first step begins."""
    steps = dict(dropout=0.0, tokens_per_step=2048 * 32, max_steps=6, checkpoint_interval=3, eval_interval=6)
    for ranks, room in box.some([(1, 150), (2, 90)]):
        whole = box.whole(ranks, batch_size=64, **steps)
        out = box.path()
        done = box.trained(out, ranks, inject=[f"memory={room}"], batch_size=2048, **steps)
        said = re.findall(r"out of memory with micro-batches of (\d+) .* as \d+ x (\d+)", done.out)
        need(said, f"{ranks} process(es): nothing was said (were {room} MB enough?)")
        off = loss_apart(whole, out)
        need(off < 1e-4, f"{ranks} process(es): a loss is {off:.0e} off after halving")
    long = dict(block_size=4096, tokens_per_step=4096, batch_size=1, max_steps=4, checkpoint_interval=1, eval_interval=100)
    for ranks in box.some([1, 2]):
        tokens = dict(tokens_per_step=4096 * ranks)
        out = box.path()
        box.trained(out, ranks, **long | tokens | dict(max_steps=1))
        before = digests(out)
        since = time.monotonic()
        process = box.train(out, ranks, inject=["memory=60"], resume=True, **long | tokens)
        box.fails(process, "out of memory", since=since)
        need(digests(out) == before, "the checkpoint has changed")
    return "halved until it fits, with the same losses; where one sequence does not fit, one line, checkpoint intact"


@fault("F33", "no C++ compiler", "eager with a message; asked for by name: clean failure")
def no_compiler(box: Box) -> str:
    bare = dict(PATH=str(box.folder), CXX=None, CC=None)
    out = box.path()
    box.tries += 2
    done = box.trained(out, env=bare, compile="auto")
    need("compile = False (there is no C++ compiler" in done.out, "it was not reported")
    on = next(r["effective"] for r in log(out) if "effective" in r)
    need(on["compile"] is False, "effective() says it was compiled")
    box.same(box.whole(), out)
    box.refused(box.path(), "compile=True is not available", "--compile=False", env=bare, compile=True)
    return "auto trains eagerly, says so, and is bit for bit the eager run; compile=True says what to install"
