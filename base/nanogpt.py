"""nanoGPT's names for settings, and ours: for error messages, for its config files, and for docs/from_nanogpt.md."""

from typing import Any

# nanoGPT's name (train.py and sample.py at its current commit) -> ours, or what to use instead
NAMES = {
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "lr": "learning_rate",
    "start": "prompt",
    "wandb_run_name": "out_dir",
    "gradient_accumulation_steps": "tokens_per_step, which is batch_size * gradient_accumulation_steps * block_size",
    "eval_iters": "eval_tokens, which is eval_iters * batch_size * block_size",
    "lr_decay_iters": "max_steps: the schedule ends with the run",
    "decay_lr": "schedule, constant for decay_lr=False",
    "wandb_log": "wandb, online for wandb_log=True",
    "eval_only": "python evaluate.py out/run",
    "always_save_checkpoint": "keep_best and checkpoint_interval",
    "init_from": "init_from for GPT-2's weights; python train.py out/run for 'resume'",
    "backend": "nothing: it follows from the device",
}
# Settings of a config file that mean the same here under the same name.
SAME = ["out_dir", "eval_interval", "log_interval", "dataset", "batch_size", "block_size", "n_layer", "n_head", "n_embd"]
SAME += ["dropout", "bias", "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "min_lr", "dtype", "compile"]
SAME += ["wandb_project"]


def looks_like(values: dict[str, Any]) -> bool:
    """Whether the names that a Python file has set are those of a config of nanoGPT's."""
    return len(values.keys() & (NAMES.keys() | set(SAME))) >= 3


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a nanoGPT config under our names; what it leaves out has nanoGPT's default where ours differs."""
    get = {"batch_size": 12, "block_size": 1024, "gradient_accumulation_steps": 40, "eval_iters": 200} | values
    found = {name: values[name] for name in SAME if name in values}
    found |= {NAMES[name]: values[name] for name in ("max_iters", "warmup_iters") if name in values}
    sequence = get["batch_size"] * get["block_size"]
    found |= {"batch_size": get["batch_size"], "block_size": get["block_size"]}
    found["tokens_per_step"] = sequence * get["gradient_accumulation_steps"]
    if "eval_iters" in values or "eval_interval" in values:
        found["eval_tokens"] = sequence * get["eval_iters"]
    if values.get("decay_lr") is False:
        found["schedule"] = "constant"
    if values.get("wandb_log"):
        found["wandb"] = "online"
    if str(values.get("init_from", "")).startswith("gpt2"):
        found["init_from"] = values["init_from"]
    if str(values.get("device", "")):
        found["device"] = values["device"].partition(":")[0]
    return found
