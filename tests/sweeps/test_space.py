"""The space of a sweep: what is written, what may be drawn, in which order, and how much there is."""

import itertools

import pytest

from boltlab.config.overrides import as_override, given, read, split_space, sweep_values
from boltlab.ground.errors import ConfigError
from boltlab.sweeps import space as spaces

CONDITIONAL = {
    "optimizer.momentum": {"values": "choice(0.5,0.9)", "when": "optimizer=sgd"},
    "optimizer": "choice(sgd,adamw)",
    "data.batch_size": [32, 64, 128],
    "scheduler.warmup": {"values": "range(0,30,10)", "when": "optimizer=adamw"},
}


def drawn(space, seed=0, count=200):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [spaces.suggest_all(space, study.ask()) for _ in range(count)]


@pytest.mark.parametrize(
    ("written", "inside", "kind"),
    [
        ("interval(0.5,2)", lambda v: 0.5 <= v <= 2, float),
        ("tag(log,interval(1e-4,1e-1))", lambda v: 1e-4 <= v <= 1e-1, float),
        ("int(interval(1,8))", lambda v: 1 <= v <= 8, int),
        ("tag(log,int(interval(16,512)))", lambda v: 16 <= v <= 512, int),
        ("range(60,240,20)", lambda v: v in range(60, 240, 20), int),
        ("range(0.1,0.5,0.1)", lambda v: any(abs(v - n / 10) < 1e-12 for n in range(1, 5)), float),
        ("choice(sgd,adamw)", lambda v: v in ("sgd", "adamw"), str),
        ("1,2,4", lambda v: v in ("1", "2", "4"), str),
        ([[1, 2], [3]], lambda v: v in ("[1,2]", "[3]"), str),
        (["a", True, "true", None], lambda v: v in ("a", "true", "'true'", "null"), str),
        (["a,b", "it's", {"k": [1, None]}], lambda v: v in ("'a,b'", r"'it\'s'", "{k:[1,null]}"), str),
    ],
)
def test_what_hydra_writes_is_what_is_drawn(written, inside, kind):
    (dimension,) = spaces.parse({"x.y": written})
    values = [point["x.y"] for point in drawn([dimension])]
    assert all(inside(value) and type(value) is kind for value in values)
    assert 1 < len(set(values)) <= dimension.size()
    assert all(inside(kind(edge) if kind in (int, float) else edge) for edge in dimension.edges())


@pytest.mark.parametrize(
    "value", [None, True, "true", "a,b", "it's", r"back\'s", "1", 1, 0.1, [1, [None]], {"k": "v w"}]
)
def test_what_a_list_of_a_file_holds_is_what_a_trial_gets(value):
    override = read(f"+key={as_override(value)}")
    assert override.value() == value and type(override.value()) is type(value)


def test_a_logarithm_is_drawn_evenly_over_the_decades():
    (dimension,) = spaces.parse({"lr": "tag(log,interval(1e-4,1))"})
    low = sum(point["lr"] < 1e-2 for point in drawn([dimension], count=400))
    assert 150 < low < 250


def test_a_condition_holds_in_every_point_and_no_point_is_missing():
    space = spaces.parse(CONDITIONAL)
    assert [d.key for d in space].index("optimizer") < [d.key for d in space].index("optimizer.momentum")
    found = {tuple(sorted(point.items())) for point in drawn(space, count=2000)}
    for point in map(dict, found):
        assert ("optimizer.momentum" in point) == (point["optimizer"] == "sgd")
        assert ("scheduler.warmup" in point) == (point["optimizer"] == "adamw")
    assert len(found) == spaces.size(space) == 3 * 2 + 3 * 3
    listed = [{key: str(value) for key, value in point.items()} for point in spaces.points(space)]
    assert len(listed) == len(found) and all(
        {key: str(value) for key, value in point} in listed for point in map(tuple, found)
    )


def test_a_condition_on_a_conditional_key_is_counted_once():
    space = spaces.parse(
        {
            "a": "choice(x,y)",
            "b": {"values": "choice(p,q)", "when": "a=x"},
            "c": {"values": "choice(1,2,3)", "when": "b=q"},
        }
    )
    found = {tuple(sorted(point.items())) for point in drawn(space, count=500)}
    assert len(found) == spaces.size(space) == 1 + 3 + 1  # x p, x q with three, y


def test_the_points_of_the_check_hold_every_choice_and_every_end():
    space = spaces.parse(CONDITIONAL | {"optimizer.lr": "interval(0.1,1.0)"})
    points = list(spaces.samples(space))
    for d in space:
        assert {point[d.key] for point in points if d.key in point} == set(d.edges()), d.key
    assert all(("optimizer.momentum" in point) == (point["optimizer"] == "sgd") for point in points)
    assert list(spaces.samples([])) == [{}]


def test_groups_stand_before_the_keys_of_their_choice():
    assert spaces.overrides({"optimizer.lr": 0.1 + 0.2, "optimizer": "sgd", "seed": 3}) == [
        "optimizer=sgd",
        "seed=3",
        "optimizer.lr=0.30000000000000004",
    ]


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"lr": "interval(1,0)"}, "low must be below high"),
        ({"lr": "tag(log,interval(0,1))"}, "above 0"),
        ({"lr": "0.1"}, "names one value"),
        ({"lr": "interval(0"}, "cannot be read"),
        ({"lr": "range(1,2)"}, "a range needs two values"),
        ({"lr": {"value": "1,2"}}, "'value' is unknown"),
        ({"lr": {"when": "a=b"}}, "'values' is unknown or missing"),
        ({"lr": "glob(*)"}, "is a pattern"),
        ({"opt": "a,b", "m": {"values": "1,2", "when": "opd=a"}}, "did you mean 'opt'"),
        ({"opt": "a,b", "m": {"values": "1,2", "when": "opt=c"}}, "opt is never 'c'"),
        ({"a": {"values": "1,2", "when": "b=1"}, "b": {"values": "1,2", "when": "a=1"}}, "in a circle: a, b"),
    ],
)
def test_a_mistake_in_a_space_is_named(space, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        spaces.parse(space)


def test_the_command_line_is_divided_into_what_is_fixed_and_what_is_not():
    fixed, space = split_space(["model=mlp", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "seed=1,2", "x=[1,2]"])
    assert fixed == ["model=mlp", "x=[1,2]"]
    assert space == {"optimizer.lr": "tag(log,interval(1e-4,1e-1))", "seed": "1,2"}


def test_sizes_of_a_grid_multiply():
    space = spaces.parse({"a": "1,2", "b": "range(0,10,2)", "c": "int(interval(1,3))"})
    assert spaces.size(space) == 2 * 5 * 3 == len(list(itertools.product(range(2), range(5), range(3))))


def test_a_range_without_an_end_in_sight_is_refused_before_it_is_listed():
    for text in ("range(0,100000000)", "range(0,1,1e-9)", "range(0,inf)"):
        with pytest.raises(ValueError, match="values: give interval"):
            sweep_values("seed", text)
    assert sweep_values("seed", "range(0,9,4)").high == 8


def test_a_choice_keeps_what_may_be_a_text():
    assert sweep_values("data.target", "choice(1_0,2,x)").texts == ("1_0", "2", "x")
    assert sweep_values("optimizer.lr", "choice(1e-3,0.01)").texts == ("0.001", "0.01")


@pytest.mark.parametrize(
    ("text", "override"),
    [("logs", "x=logs"), ("/a/b c", "x=/a/b c"), ("äöü", "x='äöü'"), ("a,b", "x='a,b'"), ("123", "x='123'")],
)
def test_a_text_is_given_on_with_quotes_only_where_it_needs_them(text, override):
    assert given("x", text) == override and read(override).value() == text
