"""Reading YAML, JSON and TOML into plain values, with the place of each of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.basics.errors import SpecError
from service.recipes import find_recipe, recipes
from service.spec.documents import (
    LARGEST_FILE_BYTES,
    document_of,
    find,
    override,
    read_document,
    read_values,
    scalar,
    setting_of,
)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def values_of(text: str | bytes, *, name: str = "spec.yaml") -> Any:
    content = text if isinstance(text, bytes) else text.encode()
    Path(name).write_bytes(content)
    return read_document(name).values


def fault_in(text: str | bytes, *, name: str = "spec.yaml") -> str:
    return fault_of(lambda: values_of(text, name=name))


def fault_of(action: Callable[[], object]) -> str:
    with pytest.raises(SpecError, match=r".") as caught:
        action()
    return str(caught.value)


SCALARS = [
    ("1e-3", 0.001),
    ("-1.5E+2", -150.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("012", 12),
    ("+7", 7),
    ("0o17", 15),
    ("0x1F", 31),
    ("1_000", "1_000"),
    ("12:30", "12:30"),
    ("no", "no"),
    ("on", "on"),
    ("yes", "yes"),
    ("True", True),
    ("FALSE", False),
    ("~", None),
    ("Null", None),
    ("None", "None"),
    ("2020-01-01", "2020-01-01"),
    ("-.inf", -math.inf),
    ("inf", "inf"),
    ("0b1", "0b1"),
    ("=", "="),
    ("<<", "<<"),
    ("'1'", "1"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_a_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    read = values_of(f"key: {text}")["key"]
    assert (read, type(read)) == (value, type(value))


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(scalar(".nan"))


def test_every_key_and_value_has_its_place() -> None:
    Path("spec.yaml").write_text("a: 1\nb:\n  c: [x,  y]\n  d: {e: 2}\n")
    document = read_document("spec.yaml")
    assert document.place_of_key(("b", "c")).text == "spec.yaml:3:3"
    assert document.place_of_value(("b", "c", 1)).text == "spec.yaml:3:11"
    assert document.place_of_value(("b", "d", "e")).text == "spec.yaml:4:10"
    assert document.place_of_key(("b", "absent", "deeper")).text == "spec.yaml:2:1"


def test_json_and_toml_read_the_same_with_the_same_places() -> None:
    Path("spec.json").write_text('{\n\t"a": {"b": 1.5, "c": "\\ud83d\\ude00 \\/"}}')
    Path("spec.toml").write_text('# a comment\n[a]\nb = 1.5\nc = "😀 /"\n')
    from_json, from_toml = read_document("spec.json"), read_document("spec.toml")
    assert from_json.values == from_toml.values == {"a": {"b": 1.5, "c": "😀 /"}}
    assert from_json.place_of_value(("a", "b")).text == "spec.json:2:13"
    assert from_toml.place_of_value(("a", "b")).text == "spec.toml:3:5"


def test_a_list_of_toml_tables_knows_which_one_is_which() -> None:
    Path("spec.toml").write_text(
        'text = """\n[[a.b]]\nc = 9\n"""\n[[a.b]]\nc = 1\n[[a.b]]\n[a.b.d]\nc = 2\n'
    )
    document = read_document("spec.toml")
    assert document.place_of_key(("a", "b", 0, "c")).text == "spec.toml:6:1"
    assert document.place_of_key(("a", "b", 1, "d", "c")).text == "spec.toml:9:1"


FAULTS = [
    ("a: 1\na: 2", "spec.yaml:2:1: 'a' is written twice; it is also on line 1"),
    (
        "a: &x 1\nb: *x",
        "spec.yaml:1:4: anchors and aliases (& and *) are not supported; write the value out",
    ),
    (
        "a: *x",
        "spec.yaml:1:4: anchors and aliases (& and *) are not supported; write the value out",
    ),
    (
        "a: !!str 1",
        "spec.yaml:1:4: tags (tag:yaml.org,2002:str) are not supported; write the plain value",
    ),
    ("1: a", "spec.yaml:1:1: a key must be text, but is 1; put it in quotes"),
    ("? [a]\n: 1", "spec.yaml:1:3: a key must be text, but is a list or a mapping"),
    ("- a", "spec.yaml:1:1: must be a mapping of keys to values, but is a list"),
    ("digits", "spec.yaml:1:1: must be a mapping of keys to values, but is 'digits'"),
    ("# nothing", "spec.yaml: must be a mapping of keys to values, but is empty"),
    ("a: 1\n---\nb: 2", "spec.yaml:2:1: a second document begins; a spec is one document"),
    (
        "a:\n\t- 1",
        "spec.yaml:2:1: not valid YAML: a tab where only spaces are allowed; indent with spaces",
    ),
    (
        "a: b: c",
        "spec.yaml:1:5: not valid YAML: this ':' begins a second value; check the indentation, "
        "and put text that contains ': ' in quotes",
    ),
    (
        "a: 1\n  b: 2\nc",
        "spec.yaml:2:4: not valid YAML: this ':' begins a second value; check the indentation, "
        "and put text that contains ': ' in quotes",
    ),
    ("a: 1\nb\nc: 2", "spec.yaml:3:1: not valid YAML: a key without its ':'"),
    ("a: [1, 2", "spec.yaml:1:9: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("a: 'b", "spec.yaml:1:6: not valid YAML: a quote is not closed"),
    (b"a: 1\nb: \xff", "spec.yaml:2:4: not UTF-8 text (byte 0xff)"),
    ("a: 1\nb: \0", "spec.yaml:2:4: the character U+0000 is not text"),
    (
        "a: 1\nb: x\u2028y",
        "spec.yaml:2:5: U+2028 ends a line in YAML 1.1 and none in YAML 1.2. Remove it, or write "
        '"\\u2028" within double quotes',
    ),
    ('a: "\\ud800"', "spec.yaml:1:4: the text contains half a character (a lone surrogate)"),
    ('a: "\\UFFFFFFFF"', "spec.yaml:1:1: an escape in a string after this is not a character"),
    (f"a: {'9' * 5000}", "spec.yaml:1:4: a whole number of 5000 digits is too long"),
    (f"a: {'[' * 5000}", "spec.yaml:1:68: nested deeper than 64 levels"),
]


@pytest.mark.parametrize(("text", "fault"), FAULTS)
def test_a_file_that_is_not_right_is_reported_with_its_place(text: str | bytes, fault: str) -> None:
    assert fault_in(text) == fault


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.json", '{"a": 1\n"b": 2}', "a.json:2:1: not valid JSON: expecting ',' delimiter"),
        ("a.json", '{"a": NaN}', "a.json: not valid JSON: NaN is not a number in JSON"),
        ("a.json", '{"a": 1,\n"a": 2}', "a.json:2:1: 'a' is written twice; it is also on line 1"),
        ("a.json", "[" * 100_000, "a.json: nested deeper than 64 levels"),
        ("a.toml", "a = 1\nb = =", "a.toml:2:5: not valid TOML: invalid value"),
        ("a.toml", "a = 1979-05-27", "a.toml: a: must be null, a truth value, a number, text, "
         "a list or a mapping, but is of type date"),
        ("a.toml", f"a = {'9' * 5000}", "a.toml: a whole number is too long"),
        ("a.toml", f"a = {'[' * 100_000}", "a.toml: nested deeper than 64 levels"),
    ],
)  # fmt: skip
def test_json_and_toml_tell_their_own_faults(name: str, text: str, fault: str) -> None:
    assert fault_in(text, name=name) == fault


def test_a_file_that_is_not_there_is_reported_with_the_ones_that_are(tmp_path: Path) -> None:
    Path("digits.yaml").write_text("a: 1")
    for path, fault in [
        ("digit.yaml", "digit.yaml: there is no such file; did you mean 'digits.yaml'?"),
        ("x/digits.yaml", "x/digits.yaml: there is no such file, and no directory 'x'"),
        (".", ".: is a directory; name a file; known: digits.yaml"),
        ("", "'': there is no such file; known: digits.yaml"),
        ("a\0b", "'a\\x00b': cannot be read: embedded null byte"),
    ]:
        assert fault_of(partial(read_document, path)) == fault


def test_a_file_of_any_size_is_read_no_further_than_the_limit() -> None:
    assert "must be at most 1048576 bytes" in fault_in("#" * (LARGEST_FILE_BYTES + 1))


def test_an_override_is_read_by_the_same_rules() -> None:
    document = document_of({"a": {"b": [{"c": 1}, 2]}, "keep": None})
    for text, steps, value in [
        ("a.b.0.c=1e-3", ("a", "b", 0, "c"), 0.001),
        ("a.b.2=no", ("a", "b", 2), "no"),
        ("a.b=[1, {x: 012}]", ("a", "b"), [1, {"x": 12}]),
        ("a.x.y.0.z=*.bias", ("a", "x", "y", 0, "z"), "*.bias"),
        ("a.x=b: c # d", ("a", "x"), "b: c # d"),
        ("--a.x='1'", ("a", "x"), "1"),
        ("a.x==", ("a", "x"), "="),
        ("keep.x=1", ("keep", "x"), 1),
    ]:
        changed = override(document, setting_of(text))
        assert find(changed.values, steps) == value
        assert changed.place_of_value(steps).text == text


def test_null_can_be_written_in_yaml_and_in_python() -> None:
    document = document_of({"a": 1})
    for text in ("a=", "a=null", "a=None", "a=~"):
        assert override(document, setting_of(text)).values == {"a": None}
    assert override(document, setting_of("a=[None, True]")).values == {"a": [None, True]}
    assert override(document, setting_of("a='None'")).values == {"a": "None"}


def test_an_override_leaves_the_document_it_was_given_as_it_was() -> None:
    document = document_of({"a": {"b": [1]}})
    override(document, setting_of("a.b.0=2"))
    assert document.values == {"a": {"b": [1]}}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a.b 3", "a.b 3: must be key=value, such as optimizer.lr=0.1"),
        ("=3", "=3: '' is not a key; write it as section.key=value"),
        ("a..b=3", "a..b=3: 'a..b' is not a key; write it as section.key=value"),
        (
            "a.c=1",
            "a.c=1: a is a list of 1, counted from 0; 'c' is neither one of them nor the next",
        ),
        (
            "a.2=1",
            "a.2=1: a is a list of 1, counted from 0; '2' is neither one of them nor the next",
        ),
        ("n.x=1", "n.x=1: n is 3 and has nothing inside"),
        ("a=[1", "a=[1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a={b: 1, b: 2}", "a={b: 1, b: 2}: 'b' is written twice"),
        (
            "a=[a-z]+",
            "a=[a-z]+: not valid YAML: something follows the end of the value; text that begins "
            "with a bracket or a quote must be in quotes as a whole",
        ),
        ("a=[*x]", "a=[*x]: anchors and aliases (& and *) are not supported; write the value out"),
    ],
)
def test_an_override_that_is_not_right_is_reported_with_its_text(text: str, fault: str) -> None:
    document = document_of({"a": [1], "n": 3})
    assert fault_of(lambda: override(document, setting_of(text))) == fault


def test_a_mapping_may_hold_plain_values_only() -> None:
    assert document_of({"a": (1, {"b": 2.0})}).values == {"a": [1, {"b": 2.0}]}
    endless: list[Any] = []
    endless.append(endless)
    faults: list[tuple[dict[Any, Any], str]] = [
        ({"a": {"b": object()}}, "a.b: must be null, .* but is of type object"),
        ({"a": {1: 2}}, "a: a key must be text, but is 1"),
        ({"a": endless}, "nested deeper than 64 levels"),
        ({"a": 10**5000}, "a huge number"),
        ({"a": "\ud800"}, "half a character"),
    ]
    for mapping, fault in faults:
        with pytest.raises(SpecError, match=fault):
            document_of(mapping)


words_in_json = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
words_in_json |= st.sampled_from(["a\u2028b", "\x85", "\x7f\x9b", "\ufeff"])
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | words_in_json,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words_in_json, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(words_in_json, json_values), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_a_file_of_json_holds_what_json_says(
    values: dict[str, Any], ascii_only: bool, indent: int | str | None
) -> None:
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent, allow_nan=False)
    assert values_of(text, name="a.json") == json.loads(text)


words = "a b: 1e3 - [ ] { } , &x *x !!a ' \" | > ? # % --- ... \\U \\ud800 \0 \x85 = ."
pieces = st.sampled_from([*words.split(" "), " ", "  ", "\n", "\t", ": "])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.lists(pieces, max_size=25).map("".join) | st.text(max_size=30),
    name=st.sampled_from(["junk.yaml", "junk.json", "junk.toml"]),
    change=st.none() | st.text(max_size=9).map("a.0={}".format),
)
def test_junk_is_a_document_or_a_spec_error(text: str, name: str, change: str | None) -> None:
    Path(name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(SpecError):
        document = read_document(name)
        if change is not None:
            override(document, setting_of(change))


def test_neither_a_document_nor_a_spec_needs_torch() -> None:
    root = Path(__file__).parent.parent
    code = (
        "import sys, service.spec.documents, service.spec.models, service.spec.files; "
        "print(sorted({'torch', 'numpy', 'wandb', 'accelerate'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


DOCUMENTS = (
    "a: 1\nb: [1.5, 0o17, .inf, ~, yes, 012, '1', \"x\\n\"]\nc: {d: {e: text}}\n",
    "a: 'it''s'\nb:\n- >-\n  folded\n  text\n- |\n  kept\n- {}\n- [1_000, 12:30, 2026-11-28]\n",
    'name: "\u00e9\\u00e9"\nkey with spaces: null\n"1": two\n',
)


@pytest.mark.parametrize("text", DOCUMENTS)
def test_values_alone_are_those_of_the_document(text: str) -> None:
    Path("a.yaml").write_text(text)
    assert read_values("a.yaml") == read_document("a.yaml").values


def test_values_alone_of_every_recipe_are_those_of_its_document() -> None:
    for name in recipes():
        path = find_recipe(name)
        assert read_values(path) == read_document(path).values


WRONG = (
    *("a: 1\na: 2\n", "a: &x 1\nb: *x\n", "a: !!int 1\n", "- 1\n", "a: [\n", "a: \x01\n", ""),
    *("1: a\n", "{a: 1}: 2\n", "a: &x [1]\n", "a: !x {b: 1}\n", "&x a: 1\n", "a: 1\n---\nb: 2\n"),
    *('a: "\\ud800"\n', "a: b\x85c\n", f"a: {'9' * 5000}\n", "a: " + "[" * 200 + "]" * 200 + "\n"),
)


@pytest.mark.parametrize("text", WRONG)
def test_values_alone_of_what_is_wrong_are_refused_with_its_place(text: str) -> None:
    Path("a.yaml").write_text(text)
    with pytest.raises(SpecError) as alone:
        read_values("a.yaml")
    assert str(alone.value) == fault_in(text, name="a.yaml")
