"""F11 to F21: processes that are killed, stopped and resumed; numbers that are not finite, stand out or differ."""

import json
import signal
import time

from base.files import sha256_of
from base.scripts import read_log
from engine import checkpoint
from rig.processes import need
from rig.runs import STEPS, TINY, Box, fault, last_step, loss_apart, same, steps_saved, undamaged, weights_of
from safety import prove


@fault("F11", range(20))
def killed_anywhere(box: Box, kill: int) -> None:
    """One run, each time resumed from what the kill before has left. What is saved is looked at after each kill."""
    steps = dict(max_steps=60 if box.quick else 340, checkpoint_interval=3, eval_interval=10)
    whole, out = box.whole(**steps), box.folder / "run"
    at = last_step(out)
    process = box.train(out, resume="auto", **steps)
    if kill:
        box.reach(process, out, at + 1)
        box.recover.append(time.monotonic() - process.began)
    box.killed(process, out, at + box.random.randint(4, 17))
    undamaged(out, whole)
    box.lost.append(last_step(out) - max(steps_saved(out), default=0))  # nothing is saved if killed before the first save
    if kill == 19 or box.quick:
        box.resumed(out, whole, resume="auto", **steps)


@fault("F12", [1, 0, 0, 0])
def one_of_two_killed(box: Box, restarts: int) -> None:
    """The other ends by itself; resumed by hand or by torchrun, it is the same run."""
    steps = dict(max_steps=300, checkpoint_interval=20, eval_interval=100)
    whole, out = box.whole(2, **steps), box.path()
    process = box.train(out, 2, env=dict(PET_MAX_RESTARTS=str(restarts)), **steps)
    since = box.killed(process, out, box.random.randrange(25, 200), rank=1)
    if restarts:
        box.ends_well(process)
        same(whole, out)
    else:
        box.fails(process, "after step ", "another process has ended", since=since)
        undamaged(out, whole)
        box.resumed(out, whole, 2, resume="auto", **steps)


@fault("F13", [("SIGTERM", 2, 1, 1), ("SIGINT", 2, -1, 3), ("SIGTERM", 2, -1, 3), ("SIGINT", 1, -1, 3), ("SIGTERM", 1, -1, 3)])
def signalled(box: Box, name: str, ranks: int, to: int, times: int) -> None:
    """One run, stopped so many times at random moments."""
    steps = dict(max_steps=200, checkpoint_interval=1000, eval_interval=50)
    whole, out = box.whole(ranks, **steps), box.path()
    for _ in range(times):
        at = last_step(out)
        process = box.train(out, ranks, resume="auto", **steps)
        since = box.killed(process, out, at + box.random.randint(2, 40), to, getattr(signal, name))
        done = process.wait(30)
        box.detect.append(time.monotonic() - since)
        need(ranks > 1 or done.status == 128 + getattr(signal, name), f"exit status {done.status}")
        need(not done.orphans, f"left over: {done.orphans}")
        need("Traceback" not in done.err and not done.errors(), f"it said {done.err[-300:]!r}")
        need(steps_saved(out)[-1:] == [last_step(out)], f"after step {last_step(out)}: {steps_saved(out)} are saved")
    box.resumed(out, whole, ranks, **steps)


@fault("F14", [(2, 1), (1, 2)])
def other_number_of_processes(box: Box, before: int, after: int) -> None:
    how = dict(dropout=0.0, batch_size=2, learning_rate=1e-3, min_lr=1e-4)
    whole = box.whole(before, **how)
    out = box.copy_of(whole, upto=12)
    box.trained(out, after, resume=True, **how)
    need(loss_apart(whole, out) <= 1e-5, f"a loss is {loss_apart(whole, out):.1e} off")
    saved = [json.loads((o / "step_00000024" / "training.json").read_text())["sequences_seen"] for o in (whole, out)]
    need(saved[0] == saved[1], f"data cursors {saved}")


@fault("F15", [(1, 8)] * 3 + [(2, 4)] * 3)
def killed_inside_accumulation(box: Box, ranks: int, per_step: int) -> None:
    """8 micro-batches a step on one process, 4 each on two."""
    whole, out = box.whole(ranks, batch_size=1), box.path()
    step, micro = box.random.randrange(6, STEPS), box.random.randrange(1, per_step)
    done = box.train(out, ranks, inject=f"die_inside={step},{ranks - 1},{micro}", batch_size=1).wait()
    need(done.status != 0 and last_step(out) == step, f"was not killed in step {step + 1}: at {last_step(out)}")
    need(not done.orphans, f"left over: {done.orphans}")
    box.resumed(out, whole, ranks, resume="auto", batch_size=1)


INTERVALS = [dict(eval_interval=3), dict(log_interval=1), dict(checkpoint_interval=5, background_save=False)]
INTERVALS += [dict(sample_interval=4), dict(eval_interval=1, sample_interval=1, log_interval=3, checkpoint_interval=1)]


@fault("F16", INTERVALS)
def other_intervals(box: Box, changes: dict) -> None:
    whole, out = box.whole(), box.path()
    box.trained(out, **changes)
    need(prove.trajectory(out) == prove.trajectory(whole), "the trajectory differs")
    for name in ("model.safetensors", "training.safetensors"):
        both = [sha256_of(o / "step_00000024" / name) for o in (out, whole)]
        need(both[0] == both[1], f"{name} differs")


@fault("F17", [("n_layer", 1), ("n_embd", 64), ("tie_weights", False), ("block_size", 16), ("bias", False)])
def refused_configuration(box: Box, name: str, value: int) -> None:
    box.refused(box.copy_of(box.whole(), upto=8), name, str(value), "which cannot change", resume=True, **{name: value})


@fault("F17", [("learning_rate", 5e-3), ("batch_size", 8), ("seed", 7), ("tokens_per_step", 512), ("max_steps", 12)])
def shown_configuration(box: Box, name: str, value: float) -> None:
    done = box.trained(box.copy_of(box.whole(), upto=8), resume=True, **{name: value})
    need(f"resuming with {name} = {value!r} (was {TINY.get(name, 1337)!r})" in done.out, "it was not shown")


# ---- numbers ----------------------------------------------------------------------------------------------------------


@fault("F18", [("loss", 1, 0), ("gradient", 1, 0)] * 3)
@fault("F19", [("loss", 2, 1), ("gradient", 2, 1), ("loss", 2, 0)])
def not_a_number(box: Box, what: str, ranks: int, rank: int) -> None:
    """At a random step. The crash capsule's weights are those of the uninterrupted run before that step, and it runs again."""
    each, out, step = dict(checkpoint_interval=1), box.path(), box.random.randrange(2, STEPS)
    whole = box.whole(ranks, **each)
    process = box.train(out, ranks, inject=f"nan={what},{step},{rank}", **each)
    capsule = out / f"crash_{step + 1:08d}"
    words = [f"step {step + 1}: the {what}", "the parameters are those before the step", "h.1.mlp", str(capsule)]
    box.fails(process, *words, *[f"in process {rank}"] * (ranks > 1))
    need(sha256_of(capsule / "model.safetensors") == weights_of(whole, step), "the weights are not those before the step")
    need(steps_saved(out)[-1] == step, f"{steps_saved(out)} are saved")
    undamaged(out, whole)
    again = box.ends_well(box.start(["train.py", "--replay", str(capsule)]))
    need("the step is fine" in again.out, "the capsule does not replay")
    box.resumed(out, whole, ranks, **each)


@fault("F20", ["continue", "skip", "stop"])
def outlier(box: Box, policy: str) -> None:
    """continue updates, skip leaves the update out, stop writes a capsule."""
    step, out = box.random.randrange(10, STEPS - 1), box.path()
    watch = dict(outlier_window=8, outlier_z=8.0, checkpoint_interval=1, keep_checkpoints=100)
    process = box.train(out, inject=f"spike={step}", on_outlier=policy, **watch)
    if policy == "stop":
        box.fails(process, f"step {step + 1}: ", "standard deviations above", "on_outlier=stop", "crash_")
        need(max(steps_saved(out)) == step, f"{steps_saved(out)} are saved, the outlier came in step {step + 1}")
        return
    box.ends_well(process)
    found = [r for r in read_log(out)[0] if r.get("event") == "outlier"]
    need(found and found[0]["step_done"] == step + 1, f"flagged: {found}, spiked in step {step + 1}")
    last = json.loads((out / checkpoint.step_name(STEPS) / "training.json").read_text())
    need(last["outliers"]["count"] == len(found), f"counted {last['outliers']['count']}, flagged {len(found)}")
    unchanged = weights_of(out, step) == weights_of(out, step + 1)
    need(unchanged == (policy == "skip"), f"weights {'un' * unchanged}changed by the step")


@fault("F21", ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.weight"])
def replica_changed(box: Box, name: str) -> None:
    """Found at the next comparison, every 4 steps."""
    step, bit = box.random.randrange(5, STEPS - 4), box.random.randrange(0, 20)  # a bit of the mantissa: no loss shows it
    out, inject = box.path(), f"flip={step},1,{name},{box.random.randrange(18)},{bit}"
    process = box.train(out, 2, inject=inject, replica_interval=4, max_steps=1000, checkpoint_interval=500)
    at = (step // 4 + 1) * 4
    box.fails(process, f"step {at}: ", f"{name} in process 1")
    need(last_step(out) == at, f"flipped in step {step + 1}, found after step {last_step(out)}")
