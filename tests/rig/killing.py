"""F11 to F21: processes that are killed, stopped and resumed; numbers that are not finite, stand out or differ."""

import json
import signal
import time
from pathlib import Path

from base.files import sha256_of
from engine import checkpoint
from rig.processes import need
from rig.runs import STEPS, TINY, Box, different, digests, fault, last_step, log, loss_apart, steps_saved
from safety import prove


@fault("F11", "SIGKILL at 20 random moments of one run", "G2 after each of them")
def killed_anywhere(box: Box) -> str:
    """Each time resumed from what the kill before has left: 20 kills, one run. What is saved is looked at after each kill."""
    steps = dict(max_steps=60 if box.quick else 340, checkpoint_interval=3, eval_interval=10)
    whole, out = box.whole(**steps), box.folder / "run"
    expected, at, kills = prove.trajectory(whole), 0, []
    for _ in box.some(range(20), at_least=2):
        process = box.train(out, resume="auto", **steps)
        if kills:
            box.reach(process, out, at + 1)
            box.recover.append(time.monotonic() - process.began)
        box.killed(process, out, at + box.random.randint(4, 17))
        (out / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes().rpartition(b"\n")[0] + b"\n")
        at = last_step(out)
        kills.append(at)
        wrong = [step for step, found in prove.trajectory(out).items() if found != expected[step]]
        need(not wrong, f"NOT G2: killed at {kills}; then step {wrong[:1]} differs")
        need(not different(out, whole), f"NOT G2: killed at {kills}; then {different(out, whole)} differ")
        box.lost.append(at - max(steps_saved(out), default=0))  # nothing is saved if it was killed before the first save
    box.resumed(out, whole, resume="auto", **steps)
    return f"N/N, killed after steps {', '.join(map(str, kills))}"


@fault("F12", "SIGKILL of process 1 of 2", "the other is out within 60 s; --resume and --max-restarts give G2")
def one_of_two_killed(box: Box) -> str:
    steps = dict(max_steps=300, checkpoint_interval=20, eval_interval=100)
    whole = box.whole(ranks=2, **steps)
    goals = box.random.sample(range(25, 200), 3)

    for goal in box.some(goals):
        out = box.path()
        process = box.train(out, ranks=2, **steps)
        since = box.killed(process, out, goal, rank=1)
        box.fails(process, "after step ", "another process has ended", since=since)
        digests(out)
        box.resumed(out, whole, ranks=2, resume="auto", **steps)
    for goal in box.some(goals[:1]):
        out = box.path()
        process = box.train(out, ranks=2, torchrun=["--max-restarts=1"], **steps)
        box.killed(process, out, goal, rank=1)
        box.ends_well(process)
        box.same(whole, out)
    return "the other ends by itself; resumed by hand, and by torchrun --max-restarts=1, it is the same run"


@fault("F13", "SIGTERM, SIGINT; 1 and 2 processes (to torchrun, to one process)", "saved, out within 30 s, 0 steps lost, G2")
def signalled(box: Box) -> str:
    """One run each, stopped three times at random moments."""
    steps = dict(max_steps=200, checkpoint_interval=1000, eval_interval=50)
    places = [("SIGTERM", 1, -1), ("SIGINT", 1, -1), ("SIGTERM", 2, -1), ("SIGINT", 2, -1), ("SIGTERM", 2, 1)]
    for name, ranks, to in places[: 1 if box.quick else None]:
        whole, out, at = box.whole(ranks, **steps), box.path(), 0
        for _ in box.some(range(3) if to < 0 else range(1)):
            process = box.train(out, ranks, resume="auto", **steps)
            box.reach(process, out, at + 1)
            since = box.killed(process, out, at + box.random.randint(2, 40), to, getattr(signal, name))
            done = process.wait(30)
            box.detect.append(time.monotonic() - since)
            if ranks == 1:
                need(done.status == 128 + getattr(signal, name), f"exit status {done.status}")
            need(not done.orphans, f"left over: {done.orphans}")
            words = "".join(err for _, err in done.texts.values())
            need("Traceback" not in words and not done.errors(), f"it said {words[-300:]!r}")
            at = last_step(out)
            need(steps_saved(out)[-1:] == [at], f"{name} after step {at}: {steps_saved(out)} are saved")
            box.lost.append(at - steps_saved(out)[-1])
        box.resumed(out, whole, ranks, **steps)
    return "N/N saved the very step and resumed to the same run"


@fault("F14", "resumed on 1 process after 2, on 2 after 1", "the same tokens in each step, losses within 1e-5 (relative)")
def other_number_of_processes(box: Box) -> str:
    same = dict(dropout=0.0, batch_size=2, learning_rate=1e-3, min_lr=1e-4)
    worst = 0.0
    for before, after in box.some([(2, 1), (1, 2)]):
        whole = box.whole(before, **same)
        out = box.copy_of(whole, upto=12)
        box.trained(out, after, resume=True, **same)
        worst = max(worst, loss_apart(whole, out))
        need(worst <= 1e-5, f"{before} to {after}: a loss is {worst:.1e} off")
        saved = [json.loads((o / "step_00000024" / "training.json").read_text())["sequences_seen"] for o in (whole, out)]
        need(saved[0] == saved[1], f"data cursors {saved}")
    return f"largest relative difference of a loss {worst:.0e}"


@fault("F15", "SIGKILL between two micro-batches of a step", "G2")
def killed_inside_accumulation(box: Box) -> str:
    """8 micro-batches a step on one process, 4 each on two."""
    many = dict(batch_size=1)
    for ranks, per_step in ((1, 8), (2, 4)):
        whole = box.whole(ranks, **many)
        places = zip(box.random.sample(range(6, STEPS), 3), box.random.choices(range(1, per_step), k=3), strict=True)
        for step, micro in box.some(places):
            out = box.path()
            done = box.train(out, ranks, inject=[f"die_inside={step},{micro}"], **many).wait()
            need(done.status != 0 and last_step(out) == step, f"was not killed in step {step + 1}: at {last_step(out)}")
            need(not done.orphans, f"left over: {done.orphans}")
            box.resumed(out, whole, ranks, resume="auto", **many)
    return "N/N, of steps of 8 and of 2 x 4 micro-batches"


@fault("F16", "other intervals of validation, samples, log lines, checkpoints", "every step equal in hex, and the last weights")
def other_intervals(box: Box) -> str:
    whole = box.whole()
    cases = [dict(eval_interval=3), dict(log_interval=1), dict(checkpoint_interval=5, background_save=False)]
    cases += [dict(sample_interval=4), dict(eval_interval=1, sample_interval=1, log_interval=3, checkpoint_interval=1)]
    for changes in box.some(cases):
        out = box.path()
        box.trained(out, **changes)
        need(prove.trajectory(out) == prove.trajectory(whole), f"{changes} changes the trajectory")
        for name in ("model.safetensors", "training.safetensors"):
            both = [sha256_of(o / "step_00000024" / name) for o in (out, whole)]
            need(both[0] == both[1], f"{changes} changes {name}")
    return "N/N the same: moments and random states as well"


@fault("F17", "resumed with another configuration", "differences are shown, what does not fit is refused")
def other_configuration(box: Box) -> str:
    whole = box.whole()
    refused = [dict(n_layer=1), dict(n_embd=64), dict(tie_weights=False), dict(block_size=16), dict(bias=False)]
    for changes in box.some(refused):
        (name, value), *_ = changes.items()
        out = box.copy_of(whole, upto=8)
        box.refused(out, name, str(value), "which cannot change", resume=True, **changes)
    shown = [dict(learning_rate=5e-3), dict(batch_size=8), dict(seed=7), dict(tokens_per_step=512), dict(max_steps=12)]
    for changes in box.some(shown):
        (name, value), *_ = changes.items()
        out = box.copy_of(whole, upto=8)
        done = box.trained(out, resume=True, **changes)
        need(f"resuming with {name} = {value!r} (was {TINY.get(name, 1337)!r})" in done.out, f"{changes} was not shown")
    return f"{len(refused)} refused with what to type, {len(shown)} shown"


# ---- numbers ----------------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> str:
    return sha256_of(folder / "model.safetensors")


@fault("F18", "NaN in the loss, in a gradient", "stops before the update, weights unchanged, names step and module")
def not_a_number(box: Box) -> str:
    """At a random step each time. The crash capsule's weights are those of the uninterrupted run before that step."""
    each = dict(checkpoint_interval=1)
    whole = box.whole(**each)
    cases = [(what, step) for what in ("loss", "gradient") for step in box.random.sample(range(2, STEPS), 3)]
    replayed = set()
    for what, step in box.some(cases):
        out = box.path()
        process = box.train(out, inject=[f"nan={what},{step},0"], **each)
        line = box.fails(process, f"step {step + 1}: the {what}", "the parameters are those before the step", "h.1.mlp")
        capsule = out / f"crash_{step + 1:08d}"
        need(str(capsule) in line, f"the line does not name the capsule: {line}")
        before = checkpoint.step_name(step)
        need(weights_of(capsule) == weights_of(whole / before), "the weights are not those before the step")
        need(steps_saved(out)[-1] == step and not different(out, whole), "checkpoints differ")
        if what not in replayed:
            replayed.add(what)
            again = box.start(["train.py", "--replay", str(capsule)]).wait()
            said = again.texts[0][1][-200:]
            need(again.status == 0 and "the step is fine" in again.out, f"the capsule does not replay: {said}")
        box.resumed(out, whole, **each)
    return "N/N: stopped before the update, the module is named, the capsule runs again"


@fault("F19", "NaN on one process of 2", "both stop, no hang, the process is named")
def not_a_number_on_one(box: Box) -> str:
    each = dict(checkpoint_interval=1)
    whole = box.whole(2, **each)
    for what, rank in box.some([("loss", 1), ("gradient", 1), ("loss", 0)]):
        step = box.random.randrange(2, STEPS)
        out = box.path()
        process = box.train(out, 2, inject=[f"nan={what},{step},{rank}"], **each)
        box.fails(process, f"step {step + 1}: the ", "h.1.mlp", f"in process {rank}")
        weights = [weights_of(folder) for folder in (out / f"crash_{step + 1:08d}", whole / checkpoint.step_name(step))]
        need(weights[0] == weights[1], "the weights are not those before the step")
        box.resumed(out, whole, 2, **each)
    return "N/N: both stop before the update; the line says in which process it began"


@fault("F20", "a loss or gradient norm far out", "flagged and counted; continue, skip and stop do what they say")
def outlier(box: Box) -> str:
    watch = dict(outlier_window=8, outlier_z=8.0, checkpoint_interval=1, keep_checkpoints=100)
    for policy in box.some(["continue", "skip", "stop"]):
        step, out = box.random.randrange(10, STEPS - 1), box.path()
        process = box.train(out, inject=[f"spike={step}"], on_outlier=policy, **watch)
        if policy == "stop":
            box.fails(process, f"step {step + 1}: ", "standard deviations above", "on_outlier=stop", "crash_")
            need(max(steps_saved(out)) == step, f"{steps_saved(out)} are saved, the outlier came in step {step + 1}")
            continue
        need(process.wait().status == 0, f"on_outlier={policy} ended the run: {process.last_words()}")
        found = [r for r in log(out) if r.get("event") == "outlier"]
        need(found and found[0]["step_done"] == step + 1, f"flagged: {found}, spiked in step {step + 1}")
        last = json.loads((out / checkpoint.step_name(STEPS) / "training.json").read_text())
        need(last["outliers"]["count"] == len(found), f"counted {last['outliers']['count']}, flagged {len(found)}")
        unchanged = weights_of(out / checkpoint.step_name(step)) == weights_of(out / checkpoint.step_name(step + 1))
        need(unchanged == (policy == "skip"), f"on_outlier={policy}: weights {'un' * unchanged}changed by the step")
    return "continue updates, skip leaves the update out, stop writes a capsule"


@fault("F21", "one bit of one process's weights changes", "found at the next comparison, which names step, weight and process")
def replica_changed(box: Box) -> str:
    names = ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.weight"]
    for name in box.some(names):
        step, bit = box.random.randrange(5, STEPS - 4), box.random.randrange(0, 20)  # a bit of the mantissa: no loss shows it
        out = box.path()
        inject = [f"flip={step},1,{name},{box.random.randrange(18)},{bit}"]
        process = box.train(out, 2, inject=inject, replica_interval=4, max_steps=1000, checkpoint_interval=500)
        at = (step // 4 + 1) * 4
        box.fails(process, f"step {at}: ", f"{name} in process 1")
        need(last_step(out) == at, f"flipped in step {step + 1}, found after step {last_step(out)}")
    return "N/N found at the next comparison (every 4 steps)"
