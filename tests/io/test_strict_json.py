"""JSON of a stranger: ambiguities are refused, and so is what would take much memory."""

import json

import pytest

from awq2marlin.errors import CheckpointError
from awq2marlin.io import strict_json
from awq2marlin.io.strict_json import parse_json


def refused(text, **options):
    """Returns code and message of a refusal."""
    with pytest.raises(CheckpointError) as caught:
        parse_json(text, "x.json", **options)
    (problem,) = caught.value.problems
    assert problem.file == "x.json"
    return problem.code, problem.message


@pytest.mark.parametrize("document", [{"a": [1, -5, 0, 1.5, "x", None, True]}, [], {}, "x", [[["-0"]]], {"-0": -1}])
def test_a_document_is_what_python_says(document):
    assert parse_json(json.dumps(document).encode(), "x.json") == document


@pytest.mark.parametrize(
    ("text", "key"),
    [('{"a": 1, "b": 2, "b": 3, "a": 4}', "b"), ('{"x": {"k": 1, "k": 1}}', "k"), ('{"": 1, "": 2}', "")],
)
def test_the_first_key_that_stands_twice_is_named(text, key):
    assert refused(text.encode()) == ("duplicate-key", f"the key {key!r} appears twice")


@pytest.mark.parametrize("text", ["-0", '{"-0": -0}', "[1, -0]"])
def test_a_zero_with_a_sign_is_refused_where_constants_are(text):
    assert refused(text.encode()) == ("bad-json", "-0 is not JSON")
    parse_json(text.encode(), "x.json", constants=True)


def test_a_document_of_too_many_values_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_VALUES", 100)
    assert len(parse_json(f"[{','.join('1' * 100)}]".encode(), "x.json")) == 100
    for text in (f"[{','.join('1' * 101)}]", f"[{','.join(['[]'] * 60)}]", "{" * 101):
        code, message = refused(text.encode())
        assert code == "too-large"
        assert "values, but at most 100 are read; download it again, or shorten it" in message


def test_a_long_document_must_be_ascii(monkeypatch):
    monkeypatch.setattr(strict_json, "_MAX_UNICODE_BYTES", 20)
    long = "模型" * 10
    assert parse_json(json.dumps([long]).encode(), "x.json") == [long]
    code, message = refused(json.dumps([long], ensure_ascii=False).encode())
    assert code == "too-large"
    assert r"write other characters as \uNNNN" in message
