"""Whatever stands on the command line or in a run folder: a result or a message, never a traceback."""

import json
import math
import string
from types import SimpleNamespace

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from boltlab import runs
from boltlab.commands import runs as table
from boltlab.config import sources
from boltlab.config.compose import compose
from boltlab.config.sources import groups
from boltlab.ground.errors import ConfigError, UserError

bounded = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def key_paths(node, path=""):
    for key in node:
        here = f"{path}.{key}" if path else str(key)
        yield here
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not OmegaConf.is_interpolation(node, key):
            yield from key_paths(child, here)


KEYS = sorted(key_paths(compose("train", ["augment=basic"], check=False).config)) + sorted(groups())
TARGETS = ["torch.optim.SGD", "torch", "project.models.mlp.MLP", "os.path", "a..b", ".", "builtins.dict", "math.pi"]
texts = st.text(st.sampled_from(string.printable + "é图\u200b\0${}[]:,='\"\\"), max_size=12)
numbers = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([10**400, -(2**63), 2**32, math.inf, math.nan, "1e999", "0x10", "1_0", "0b1", "1e-400", "."]),
)
WORDS = (
    "null true auto '' ??? ${seed} ${nothing} ${data.x} ${oc.env:HOME} ${eval:1} ${ [] ${run_dir} ${..seed} {} range(3)"
    " choice(1,2) glob(*) shuffle(1,2) int(3) float(a) sort(2,1) json_str({a:1}) {_target_:os.getcwd} @ a=b"
    " {a:{b:[1,{c:2}]}}"
)
words = st.sampled_from([*WORDS.split(" "), *TARGETS])
values = st.recursive(
    st.one_of(numbers.map(str), words, texts, texts.map(lambda text: "'" + text.replace("'", "\\'") + "'")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.dictionaries(st.sampled_from(["a", "_target_", "lr", "1", "é"]), inner, max_size=2).map(
            lambda items: "{" + ",".join(f"{k}:{v}" for k, v in items.items()) + "}"
        ),
    ),
    max_leaves=4,
)
known_keys = st.sampled_from(KEYS)
keys = st.one_of(
    *[known_keys] * 4,
    st.builds("{}.{}".format, known_keys, st.one_of(st.sampled_from(["a", "0", "_target_", "_partial_"]), texts)),
    texts,
)
overrides = st.builds(
    lambda prefix, key, sign, value: f"{prefix}{key}{sign}{value}",
    st.sampled_from(["", "", "", "", "+", "++", "~"]),
    keys,
    st.sampled_from(["=", "=", "=", "=", "@a=", ""]),
    values,
)
choices = st.sampled_from(
    [f"{group}={choice}" for group in ("augment", "optimizer", "data") for choice in groups()[group]]
)


@settings(bounded, max_examples=100)
@given(st.lists(st.one_of(*[overrides] * 9, choices), min_size=1, max_size=2))
@example(["~augment=0"])
@example(["augment={}"])
@example(["optimizer=[{}]"])
@example(["experiment=[[]]"])
def test_any_override_gives_a_config_or_named_mistakes(given_overrides):
    mistakes = []
    try:
        assert isinstance(compose("train", given_overrides).config, DictConfig)
    except ConfigError as error:
        mistakes = [(mistake.where, mistake.message) for mistake in error.mistakes]
        assert mistakes
    assert all(where and message for where, message in mistakes)


# -- run folders

plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, st.sampled_from(["[red]", "[/]", "running", "finished"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["val_acc", "a"]), inner)),
    max_leaves=4,
)
FIELDS = ["started", "status", "seconds", "best", "test", "data", "model", "pid", "host"]
summaries = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), plain).map(json.dumps).map(str.encode),
    plain.map(json.dumps).map(str.encode),
    st.binary(max_size=40),
    st.just(b"[" * 100_000),
)


def a_run(log_dir, name, summary, config_yaml=b"seed: 0"):
    folder = log_dir / "train" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (("summary.json", summary), ("config.yaml", config_yaml), ("classes.json", summary)):
        (folder / file).write_bytes(content)
    return folder


@settings(bounded, max_examples=40)
@given(summaries)
@example(b'{"started": NaN, "seconds": Infinity, "best": {"val_acc": "high"}, "pid": 1e400, "status": "[/red]"}')
@example(b'{"started": "yesterday", "pid": 99999999999999999999, "status": "running", "test": [1]}')
def test_any_summary_is_a_row_of_the_table(tmp_path, capsys, monkeypatch, summary):
    chosen = OmegaConf.load(sources.CONFIG_DIR / "runs.yaml")
    chosen.update({"log_dir": str(tmp_path), "limit": 9})
    monkeypatch.setattr(table, "compose", lambda *_: SimpleNamespace(config=chosen))  # it takes most of the time
    good = {"status": "finished", "started": 1e9, "best": {"val_acc": 0.5}}
    a_run(tmp_path, "good", json.dumps(good).encode())
    a_run(tmp_path, "fuzzed", summary)
    assert table.main([]) == 0
    out = capsys.readouterr().out
    assert "fuzzed" in out and "finished" in out and "val_acc 0.5000" in out
    assert runs.find("fuzzed", tmp_path).name == "fuzzed"
    assert runs.find("latest", tmp_path).name in ("fuzzed", "good")


@settings(bounded, max_examples=100)
@given(st.one_of(st.binary(max_size=60), texts.map(str.encode), values.map(lambda value: f"a: {value}".encode())))
@example(b"a: ${b")
@example(b"[1, 2]")
@example(b"")
@example(b"a: &a [*a]")
@example(b"[" * 3000)
def test_any_config_file_is_read_or_named(tmp_path, content):
    folder = a_run(tmp_path, "fuzzed", b"", content)
    message = ""
    try:
        assert runs.load_config(folder).run_dir == str(folder)
    except UserError as error:
        message = str(error)
    assert not message or (str(folder / "config.yaml") in message and ("\n" not in message or "not trusted" in message))


@settings(bounded, max_examples=100)
@given(st.one_of(texts, st.text(max_size=9), st.sampled_from(["..", "/", "~", "a" * 5000, "fuzzed/", "latest "])))
def test_any_name_finds_a_run_or_says_why_not(tmp_path, name):
    folder = a_run(tmp_path / "logs", "fuzzed", b"")
    try:
        found = runs.find(name, tmp_path / "logs")
    except UserError:
        return
    assert found == folder


def test_a_damaged_config_is_named_by_every_verb(boltlab, tmp_path):
    folder = a_run(tmp_path, "broken", b"", b"\xff\xfe{")
    Image.new("RGB", (8, 8)).save("x.png")
    for verb, more in (("eval", []), ("predict", ["input=x.png"])):
        code, out, err = boltlab(verb, f"run={folder}", *more)
        assert (code, out) == (1, "") and str(folder / "config.yaml") in err and len(err.splitlines()) == 1
