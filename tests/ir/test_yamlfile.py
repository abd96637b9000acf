"""YAML reading: YAML 1.2 values, lines, every problem at once with its exact text, round trip, hash."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, model_validator

from lagcompile.ir.base import Frozen, Measured, SpecError
from lagcompile.ir.yamlfile import check, dump, dumps, plain, read, read_text, spec_hash, validate


class Balanced(Frozen):
    kind: Literal["balanced"] = "balanced"
    k: PositiveInt


class At(Frozen):
    kind: Literal["at"] = "at"
    after: tuple[str, ...]


class Every(Frozen):
    kind: Literal["every"] = "every"
    n: int = Field(ge=2, le=9)


Split = Annotated[Balanced | At | Every, Field(discriminator="kind")]


class Method(Frozen):
    epsilon: float = Field(default=0.0, ge=0)
    step: float = Field(default=0.1, gt=0, lt=1)
    reduction: Literal["sum", "mean"] = "mean"


class Spec(Measured):
    name: str
    split: Split | None = None
    method: Method = Method()
    cuts: Annotated[int, Field(gt=0)] | Literal["auto"] | Split = "auto"
    stages: tuple[Split, ...] = ()
    schedule: dict[int, float] = Field(default_factory=dict)
    output: Path = Path("runs")
    pair: tuple[int, float] = (1, 2.0)
    record: bool = False
    tags: frozenset[str] = frozenset()

    @model_validator(mode="after")
    def _named(self) -> Spec:
        if self.name == "bad":
            raise ValueError("the name must not be 'bad'")
        return self


def problems(text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        check(read_text(dedent(text), "x.yaml"), Spec)
    return list(caught.value.problems)


def test_values_follow_yaml_1_2() -> None:
    text = "{a: 1e-3, b: on, c: yes, d: .inf, e: 0o17, f: 2001-01-01, g: true, h: ~, i: 012, j: '7', k: -.5, l: 0x1F}"
    data = read_text(text, "x.yaml").data
    assert data == {
        "a": 1e-3, "b": "on", "c": "yes", "d": math.inf, "e": 15, "f": "2001-01-01",
        "g": True, "h": None, "i": 12, "j": "7", "k": -0.5, "l": 31,
    }  # fmt: skip
    assert isinstance(data, dict)
    assert type(data["a"]) is float
    assert type(data["i"]) is int


def test_words_stay_words_under_a_directive() -> None:
    assert read_text("%YAML 1.1\n---\na: on\nb: No", "x.yaml").data == {"a": "on", "b": "No"}


def test_lines_and_aliases() -> None:
    document = read_text("a: &one {k: 1}\nb:\n  - 1\n  - *one\n", "x.yaml")
    assert document.data == {"a": {"k": 1}, "b": [1, {"k": 1}]}
    assert document.line(("b", 1)) == 1 or document.line(("b", 1)) == 4
    assert document.line(("b", 0)) == 3
    assert document.line(("b", "missing")) == 2
    assert document.problem(("b", 0), "no") == "x.yaml:3: b[0]: no"
    assert document.problem((), "no") == "x.yaml:1: no"


def test_every_problem_is_told_once_with_its_line() -> None:
    assert problems("""\
        nam: x
        split:
          kind: balanced
          k: four
        method:
          epsilom: 1
          epsilon: -1
          step: 2
          reduction: means
        stages:
          - {kind: every, n: 1}
          - {kind: evry}
          - {k: 3}
          - 7
          - {kind: balanced}
        schedule: {0: 1.0, later: high}
        pair: [1.5, 2]
        record: yes
        """) == [
        "x.yaml:1: required key 'name' is missing (expected a string)",
        "x.yaml:1: nam: unknown key, did you mean 'name'? Allowed here: "
        "cuts, method, name, output, pair, record, schedule, split, stages, tags",
        "x.yaml:4: split.k: expected a positive integer, got 'four'",
        "x.yaml:6: method.epsilom: unknown key, did you mean 'epsilon'? Allowed here: epsilon, reduction, step",
        "x.yaml:7: method.epsilon: expected a non-negative number, got -1",
        "x.yaml:8: method.step: expected a positive number below 1, got 2",
        "x.yaml:9: method.reduction: expected 'sum' or 'mean', got 'means', did you mean 'mean'?",
        "x.yaml:11: stages[0].n: expected an integer of at least 2 and of at most 9, got 1",
        "x.yaml:12: stages[1].kind: unknown kind 'evry', did you mean 'every'? Known kinds: at, balanced, every",
        "x.yaml:13: stages[2]: key 'kind' is missing; known kinds: at, balanced, every",
        "x.yaml:14: stages[3]: expected a mapping with 'kind' one of at, balanced, every, got 7",
        "x.yaml:15: stages[4]: required key 'k' is missing (expected a positive integer)",
        "x.yaml:16: schedule.later: expected the key to be an integer, got 'later'",
        "x.yaml:16: schedule.later: expected a number, got 'high'",
        "x.yaml:17: pair[0]: expected an integer, got 1.5",
        "x.yaml:18: record: expected true or false, got 'yes'",
    ]


@pytest.mark.parametrize(
    ("cuts", "problem"),
    [
        (
            "autp",
            "cuts: expected a positive integer, 'auto' or a mapping with 'kind' one of at, balanced, every, "
            "got 'autp', did you mean 'auto'?",
        ),
        ("-1", "cuts: expected a positive integer, 'auto' or a mapping with 'kind' one of at, balanced, every, got -1"),
        ("{kind: balanced, k: x}", "cuts.k: expected a positive integer, got 'x'"),
        ("{kind: at, afetr: [a]}", "cuts: required key 'after' is missing (expected a list, each entry a string)"),
        ("{kind: zzz}", "cuts.kind: unknown kind 'zzz'; known kinds: at, balanced, every"),
    ],
)
def test_members_of_a_union_are_told_as_one(cuts: str, problem: str) -> None:
    assert problems(f"name: x\ncuts: {cuts}\n")[0] == f"x.yaml:2: {problem}"


class Wide(Frozen):
    policy: Literal["wide"] = "wide"
    width: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    counts: tuple[int, ...] = Field(default=(1,), min_length=1)


class Narrow(Frozen):
    policy: Literal["narrow", "thin"] = "narrow"


class Other(Frozen):
    shape: int | Annotated[Wide | Narrow, Field(discriminator="policy")] | None = None
    either: Wide | At | None = None
    either_number: int | float = 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "shape: {policy: wid}",
            "shape.policy: unknown policy 'wid', did you mean 'wide'? Known policies: narrow, thin, wide",
        ),
        ("shape: {width: 1}", "shape: key 'policy' is missing; known policies: narrow, thin, wide"),
        ("shape: {policy: wide, width: .inf}", "shape.width: expected a finite number, got inf"),
        ("shape: {policy: wide, counts: []}", "shape.counts: expected at least 1 entries, got []"),
        ("shape: 1.5", "shape: expected an integer or a mapping with 'policy' one of narrow, thin, wide, got 1.5"),
        ("either: {kind: at, after: 3}", "either.after: expected a list, each entry a string, got 3"),
        ("either_number: [1]", "either_number: expected an integer or a number, got [1]"),
        ("either_number: {a: 1}", "either_number: expected an integer or a number, got {'a': 1}"),
        ("either_number: null", "either_number: expected an integer or a number, got null"),
    ],
)
def test_other_unions_and_limits(text: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        check(read_text(text, "x.yaml"), Other)
    assert caught.value.problems == (f"x.yaml:1: {problem}",)


def test_a_validators_own_sentence_and_wrong_tops() -> None:
    assert problems("name: bad") == ["x.yaml:1: the name must not be 'bad'"]
    assert problems("- 1") == ["x.yaml:1: expected a mapping of keys to values, got a list"]
    assert problems("hello") == ["x.yaml:1: expected a mapping of keys to values, got the single value 'hello'"]
    assert problems("zzz: 1\nname: q") == [
        "x.yaml:1: zzz: unknown key; allowed here: "
        "cuts, method, name, output, pair, record, schedule, split, stages, tags"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "x.yaml: the file is empty"),
        (
            "a: [1,\n  2\nb: 2",
            "x.yaml:3: not valid YAML: expected ',' or ']', but got ':' "
            "(while parsing a flow sequence that begins on line 1)",
        ),
        ("a: 1\n b: 2", "x.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "x.yaml:2: not valid YAML: but found another document"),
        ('a: 1\nb: "\\ud800"', "x.yaml:2: b: the text holds half a character (a surrogate)"),
        ("a: *b", "x.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "x.yaml:4: b.c: duplicate key, first given on line 3"),
        ("a: !!python/object:os.system [ls]", "x.yaml:1: a: unknown tag '!!python/object:os.system'"),
        ("a: !odd {b: 1}", "x.yaml:1: a: unknown tag '!odd'; only plain data is read"),
        ("a: !odd 3", "x.yaml:1: a: unknown tag '!odd'; only plain data is read"),
        ("? [1, 2]\n: 3", "x.yaml:1: a key must be a word, not a list or a mapping"),
        ("a: &a {b: 1}\nc: {<<: *a}", "x.yaml:2: c: merge keys (<<) are not part of YAML 1.2"),
        ("&a [*a]", "x.yaml:1: too many or too deeply nested values (an alias inside itself?)"),
        ("a: \x01", "x.yaml: not valid YAML: unacceptable character #x0001"),
        ("a: !!int four", "x.yaml:1: a: 'four' is not a number"),
    ],
)
def test_what_cannot_be_read(text: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_text(text, "x.yaml")
    assert caught.value.problems[0].startswith(problem)


def test_a_file_that_multiplies_itself_is_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 9)]
    with pytest.raises(SpecError, match="too many or too deeply nested values"):
        read_text("\n".join(lines), "x.yaml")


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: there is no such file"):
        read(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match="expected a YAML file, got a folder"):
        read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9t\xe9")
    with pytest.raises(SpecError, match=r"the file is not UTF-8 text \(byte 3\)"):
        read(tmp_path / "latin.yaml")


def test_dump_is_clean_and_reads_back(tmp_path: Path) -> None:
    spec = Spec(
        name="on",
        split=At(after=("conv1", "fc*")),
        method=Method(epsilon=1e-7, step=0.5),
        stages=(Balanced(k=2),),
        schedule={0: 1.0, 10: math.inf},
        tags=frozenset({"b", "a"}),
    )
    assert dumps(spec) == dedent("""\
        name: "on"
        split:
          kind: at
          after: [conv1, fc*]
        method:
          epsilon: 1e-07
          step: 0.5
          reduction: mean
        cuts: auto
        stages:
          - kind: balanced
            k: 2
        schedule:
          "0": 1.0
          "10": .inf
        output: runs
        pair: [1, 2.0]
        record: false
        tags: [a, b]
        """)
    dump(spec, tmp_path / "spec.yaml")
    assert validate(tmp_path / "spec.yaml", Spec) == spec


class Loose(Measured):
    words: tuple[str, ...]
    numbers: tuple[float, ...]
    counts: dict[str, int]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    st.lists(st.floats(allow_nan=False)),
    st.dictionaries(
        st.sampled_from(["a", "on", "1", "1e3", "null", "~", "2001-01-01", "a b", "=", "<<x"]), st.integers()
    ),
)
def test_round_trip(words: list[str], numbers: list[float], counts: dict[str, int]) -> None:
    model = Loose(words=tuple(words), numbers=tuple(numbers), counts=counts)
    assert check(read_text(dumps(model), "x.yaml"), Loose) == model


def test_the_hash_knows_values_not_layout() -> None:
    spec = Spec(name="x", tags=frozenset({"a", "b", "c"}))
    assert spec_hash(spec) == spec_hash(Spec(name="x", tags=frozenset({"c", "b", "a"}), method=Method(step=0.1)))
    assert spec_hash(spec) != spec_hash(Spec(name="y"))
    assert len(spec_hash(spec)) == 16
    assert spec_hash(Balanced(k=3)) == hashlib.sha256(b'{"k":3,"kind":"balanced"}').hexdigest()[:16]


def test_a_list_that_is_too_short_or_too_long() -> None:
    assert problems("name: a\npair: [1]\n") == ["x.yaml:2: pair: expected a list of 2 entries, got [1]"]
    assert problems("name: a\npair: [1, 2, 3]\n") == ["x.yaml:2: pair: expected at most 2 entries, got [1, 2, 3]"]


def test_long_values_are_cut() -> None:
    for length, shown in ((58, "'" + 58 * "x" + "'"), (59, "'" + 56 * "x" + "...")):
        assert problems(f"name: a\noutput: [{length * 'x'}]\nrecord: {length * 'x'}\n")[-1].endswith(f"got {shown}")


def test_models_inside_plain_data_are_plain_too() -> None:
    found = plain({"spec": [Spec(name="a", tags=frozenset("dcba"))], 3: Path("x")})
    assert isinstance(found, dict)
    assert found["spec"][0]["tags"] == ["a", "b", "c", "d"]
    assert found["spec"][0]["method"] == {"epsilon": 0.0, "step": 0.1, "reduction": "mean"}
    assert found["3"] == "x"
