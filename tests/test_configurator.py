"""configurator.py: what is given arrives, what is mistyped is refused in one line with what to use instead."""

import ast
import dataclasses
import json
import re
import resource
from dataclasses import asdict, replace
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import configurator
from base import nanogpt
from base.errors import UserError
from base.settings import field_docs
from configurator import Config, GPTConfig, load


@pytest.fixture
def config_file(tmp_path):
    """config_file("Config(seed=1)") -> path of a config file that ends with that."""

    def write(expression: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(f"from configurator import Config\n\nconfig = {expression}\n")
        return str(path)

    return write


def refused(argv: list[str]) -> str:
    """The one-line message with which argv is refused."""
    with pytest.raises(UserError) as e:
        load(argv, "")
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- what is given arrives --------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults(config_file):
    """Written as people write it; in either order; a bare flag does not swallow the file, after which the run is named."""
    path = config_file("Config(seed=1, max_steps=7)")
    cfg = load([path, "--seed=2"], "")
    assert (cfg.seed, cfg.max_steps, cfg.batch_size) == (2, 7, Config().batch_size)
    assert load(["--seed=2", path], "") == cfg
    assert cfg.out_dir.endswith("mine")
    cfg = load(["--max_steps=1e3", "--compile=false", "--learning_rate=1", "--resume", path], "")
    assert (cfg.max_steps, cfg.compile, cfg.learning_rate, cfg.resume, cfg.seed) == (1000, False, 1, True, 1)


BY_HAND = dict(n_head=6, n_embd=1536, block_size=2048, sequence_length=512, tokens_per_step=2**20, min_lr=1e-5)


def other_value(field: dataclasses.Field):
    """A value that the field allows and that is not its default."""
    choices = get_args(field.type)
    if field.type is bool or bool in choices:
        return field.default is not True
    if int in choices:
        return field.default + 1
    if choices:
        return next(c for c in choices if c != field.default)
    values = {int: field.default + 1 if isinstance(field.default, int) else 0, float: 0.25, str: "some text"}
    return BY_HAND.get(field.name, values[field.type])


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_every_setting_can_be_typed_in_every_form(field, config_file):
    """--name=value, --name value, --the-name=value, a bare --name for yes, and in a file."""
    value = other_value(field)
    forms = [[f"--{field.name}={value}"], [f"--{field.name.replace('_', '-')}={value}"]]
    if not isinstance(value, bool):
        forms.append([f"--{field.name}", str(value)])
    elif value:
        forms.append([f"--{field.name}"])
    expected = replace(Config(), **{field.name: value, **({"out_dir": "out/x"} if field.name != "out_dir" else {})})
    for form in [*forms, [config_file(f"Config({field.name}={value!r})")]]:
        found = load([*form, *(["--out_dir=out/x"] if field.name != "out_dir" else [])], "")
        found = replace(found, curve="") if field.name != "curve" else found  # which load() looks for beside the file
        assert found == expected, form
        assert type(getattr(found, field.name)) is type(value)


def test_a_config_file_is_found_beside_train_py_from_any_folder(root, tmp_path, monkeypatch):
    found = []
    for folder in (tmp_path, root):
        monkeypatch.chdir(folder)
        found.append(replace(load(["config/shakespeare.py"], ""), curve=""))
    assert found[0] == found[1]


# ---- what is mistyped is refused --------------------------------------------------------------------------------------

BAD_VALUES = {  # setting = value as typed -> (value in a file, what the message must say)
    "batch_size=0": ("0", "at least 1"),
    "batch_size=2.5": ("2.5", "batch_size"),
    "dropout=1.5": ("1.5", r"\[0, 1\)"),
    "learning_rate=inf": ("float('inf')", "finite"),
    "beta1=1.0": ("1.0", r"\[0, 1\)"),
    "bias=maybe": ("'maybe'", "True.*False"),
    "compile=yes": ("'yes'", "True.*auto|auto.*True"),
    "dtype=bf16": ("'bf16'", "float32.*bfloat16.*float16"),
    "n_head=5": ("5", "use --n_head=4"),
    "tokens_per_step=1000": ("1000", "use --tokens_per_step=1024"),
    "sequence_length=2000": ("2000", "block_size=1024"),
}


@pytest.mark.parametrize("typed", BAD_VALUES)
def test_a_bad_value_is_refused_in_flag_and_file(typed, config_file):
    name, _, _ = typed.partition("=")
    in_file, message = BAD_VALUES[typed]
    path = config_file(f"Config({name}={in_file})")
    for where in ([f"--{typed}"], [path]):
        assert re.search(message, refused(where)), refused(where)
    assert path in refused([path])


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("batchsize", "batchsize is not a setting: did you mean batch_size"),
        ("max_iters", "nanoGPT's max_iters is max_steps"),
        ("gradient_accumulation_steps", "nanoGPT's gradient_accumulation_steps is tokens_per_step"),
    ],
)
def test_a_typo_names_the_near_setting_and_a_name_of_nanogpts_ours(name, answer, config_file):
    for where in ([f"--{name}=1"], [f"--{name}"], [config_file(f"Config({name}=1)")]):
        assert answer in refused(where)
    assert "--help" in refused(["--zzzzzzzz=1"])


def test_the_page_for_those_who_come_from_nanogpt_has_every_name(root):
    page = (root / "docs" / "from_nanogpt.md").read_text(encoding="utf-8")
    for name, ours in nanogpt.NAMES.items():
        assert re.search(rf"^\| `{name}` \| `?{re.escape(ours)}`? \|$", page, re.MULTILINE), name
    assert all(f"`{name}`" in page for name in nanogpt.SAME)
    assert set(nanogpt.SAME) <= {f.name for f in dataclasses.fields(Config)}


def test_a_config_of_nanogpt_is_answered_with_its_translation(tmp_path, capsys):
    """The one of its README's first example, in our words; what is printed is a config file that loads."""
    lines = ["out_dir = 'out-x'", "eval_interval = 250", "eval_iters = 20", "wandb_log = False", "dataset = 'shakespeare_char'"]
    lines += ["gradient_accumulation_steps = 2", "batch_size = 64", "block_size = 256", "n_layer = 6", "n_head = 6"]
    lines += ["n_embd = 384", "dropout = 0.2", "learning_rate = 1e-3", "max_iters = 5000", "lr_decay_iters = 5000"]
    lines += ["min_lr = 1e-4", "beta2 = 0.99", "warmup_iters = 100", "device = 'cuda:0'", "compile = False", "decay_lr = False"]
    theirs, ours = tmp_path / "train_shakespeare_char.py", tmp_path / "ours.py"
    theirs.write_text("\n".join(lines))
    assert "is a config of nanoGPT's" in refused([str(theirs)])
    ours.write_text(capsys.readouterr().out)
    cfg = load([str(ours)], "")
    assert (cfg.tokens_per_step, cfg.batch_size, cfg.eval_tokens) == (2 * 64 * 256, 64, 20 * 64 * 256)
    assert (cfg.max_steps, cfg.warmup_steps, cfg.schedule, cfg.device) == (5000, 100, "constant", "cuda")
    assert (cfg.n_layer, cfg.n_embd, cfg.dropout, cfg.beta2, cfg.compile) == (6, 384, 0.2, 0.99, False)


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"x = (\n", ", line 1", "SyntaxError"),
        (b"from configurator import Config\n\nconfig = Config(batch_size=0)", ", line 3", "at least 1"),
        (b"def f():\n    return 1 / 0\n\nconfig = f()", ", line 2", "ZeroDivisionError"),
        (b"raise RuntimeError('two\\nlines')", ", line 1", "RuntimeError"),
        (b"config = '\xff'", "", ""),
        (b"config = 1\0", "", ""),
        (b"# coding: nonsense\nconfig = 1", "", ""),
        (b"config = dict(seed=1)", " must end with", "dict"),
    ],
)
def test_whatever_is_wrong_in_a_file_is_named_with_its_line(tmp_path, content, line, what):
    path = tmp_path / "odd.py"
    path.write_bytes(content)
    message = refused([str(path)])
    assert f"{path}{line}" in message
    assert what in message


# ---- what follows from the settings -----------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 400), st.integers(1, 40), st.integers(1, 12))
def test_a_step_is_split_without_rest_or_a_working_remedy_is_printed(T, sequences, batch_size, world):
    """The micro-batch never exceeds batch_size, no larger one divides the share, and what the error says to type works."""
    cfg = Config(block_size=T, tokens_per_step=sequences * T, batch_size=batch_size)
    try:
        micro_batch, accumulation = cfg.split_step(world)
    except UserError as e:
        assert sequences % world  # only then
        assert "\n" not in str(e)  # noqa: PT017
        remedy = int(re.search(r"--tokens_per_step=(\d+)", str(e))[1])
        micro_batch, accumulation = replace(cfg, tokens_per_step=remedy).split_step(world)
        sequences = remedy // T
    assert micro_batch * accumulation * world == sequences
    assert 1 <= micro_batch <= batch_size
    assert not any(sequences // world % b == 0 for b in range(micro_batch + 1, batch_size + 1) if b <= sequences // world)


@given(st.integers(1, 5000), st.integers(1, 100))
def test_the_remedies_for_tokens_per_step_and_n_head_work(large, small):
    assume(large % small)
    with pytest.raises(UserError) as e:
        Config(block_size=small, tokens_per_step=large)
    remedy = int(str(e.value).split("--tokens_per_step=")[1])
    assert Config(block_size=small, tokens_per_step=remedy).tokens_per_step == remedy
    assert abs(remedy - large) < small  # the near one
    with pytest.raises(UserError) as e:
        GPTConfig(n_embd=large, n_head=small)
    assert GPTConfig(n_embd=large, n_head=int(str(e.value).split("--n_head=")[1]))


def test_describe_shows_what_differs_in_lines_of_120_columns():
    changed = {f.name: other_value(f) for f in dataclasses.fields(Config)}
    text = configurator.describe(Config(**changed))
    assert all(f"{name}={value!r}" in " ".join(text.split()) for name, value in changed.items())
    assert max(map(len, text.splitlines())) <= 120
    assert configurator.describe(Config(seed=2)).strip() == "seed=2"


# ---- JSON -------------------------------------------------------------------------------------------------------------


def test_every_file_under_config_loads_says_what_it_is_and_survives_json(root, monkeypatch):
    monkeypatch.chdir(root)
    for path in sorted(p for p in (root / "config").rglob("*.py") if p.name != "__init__.py"):
        cfg = configurator.load_file(str(path))
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
        assert configurator.from_json(json.dumps(asdict(cfg)), Config) == cfg


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"batchsize": 1}', "batchsize is not a setting of Config: did you mean batch_size"),
        ('{"batch_size": true}', "whole number"),  # an int to Python, to a reader a slip
        ('{"dropout": NaN}', "finite"),
        ('{"dtype": []}', "float32"),
        ('{"compile": 1}', "True or False"),
    ],
)
def test_json_of_a_stranger_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        configurator.from_json(text, Config)


# ---- help -------------------------------------------------------------------------------------------------------------


def test_help_shows_every_setting_with_its_doc(run_script):
    docs = field_docs(Config)
    assert set(docs) == {f.name for f in dataclasses.fields(Config)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script("train.py", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # whatever else this machine does
    assert done.returncode == 0
    for name, doc in docs.items():
        assert f"--{name} = " in done.stdout
        assert "".join(doc.split()) in "".join(done.stdout.split()), name
    assert seconds < 5
