"""What a list may say, and everything that is refused about it before anything starts."""

import inspect
import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq2marlin import BatchError, convert, convert_many
from awq2marlin.batch.file import OPTIONS, check_entries, read_batch_file
from awq2marlin.batch.jobs import plan_jobs
from awq2marlin.hub.target import PushTarget


def read(path, text):
    path.write_text(text, "utf-8")
    return [(item.place, item.source, dict(item.options)) for item in read_batch_file(path)]


def refusals(path, text):
    path.write_text(text, "utf-8")
    with pytest.raises(BatchError) as caught:
        read_batch_file(path)
    assert {(each.file, each.code) for each in caught.value.problems} == {(str(path), "bad-batch")}
    return [each.message for each in caught.value.problems]


def test_a_text_file_has_one_source_a_line(tmp_path):
    text = "\ufeff# models\n\n  ./a \r\norg/name@main\n   # not this one\nwith space#1\n"
    expected = [("line 3", "./a", {}), ("line 4", "org/name@main", {}), ("line 6", "with space#1", {})]
    assert read(tmp_path / "models.txt", text) == expected
    assert read(tmp_path / "models", text) == expected


def test_jsonl_has_options_for_each_item(tmp_path):
    lines = ['"a"', "", '{"source": "b\u2028c", "output": "d", "verify": "all", "overwrite": true, "device": null}']
    assert read(tmp_path / "models.jsonl", "\n".join(lines)) == [
        ("line 1", "a", {}),
        ("line 3", "b\u2028c", {"output": "d", "verify": "all", "overwrite": True, "device": None}),
    ]


def test_yaml_and_json_have_options_for_each_item(tmp_path):
    text = "# models\n- a\n- source: b\n  output: d\n  verify: 3\n  unaligned: pad\n"
    options = {"output": "d", "verify": 3, "unaligned": "pad"}
    assert read(tmp_path / "models.yaml", text) == [("line 2", "a", {}), ("line 3", "b", options)]
    assert read(tmp_path / "models.json", json.dumps(["a", {"source": "b", **options}])) == [
        ("item 1", "a", {}),
        ("item 2", "b", options),
    ]


def test_every_problem_is_told_at_once_in_the_list_s_order(tmp_path):
    lines = [
        '{"source": "a", "verfy": 3}',
        "{",
        '{"output": "b"}',
        '{"source": "a", "source": "b"}',
        '{"source": 7, "verify": -1, "workers": 0, "unaligned": "no"}',
        '"sound"',
        *['{"source": "a", "overwrite": "yes"}'] * 5,
    ]
    messages = refusals(tmp_path / "models.jsonl", "\n".join(lines))
    assert messages[0] == "line 1: unknown option 'verfy'; did you mean 'verify'?"
    assert [message.split(":")[0] for message in messages] == [
        f"line {number}" for number in (1, 2, 3, 4, 5, 5, 5, 5, 7, 8, 9, 10, 11)
    ]
    assert "source must be a folder or a repository, found nothing" in messages[2]
    assert "twice" in messages[3]
    assert {message.split(": ")[1].split(" must be")[0] for message in messages[4:8]} == {
        "source",
        "verify",
        "workers",
        "unaligned",
    }
    assert messages[-1] == "line 11: overwrite must be true or false, found 'yes'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- {source: b, source: c}\n", "line 2: it is not YAML that this command reads: it names 'source' twice"),
        ("a: b\n", "it must be a list"),
        ("- [a, b\n", "line 2: it is not YAML"),
        ("- source: !!python/object:os.system x\n", "line 1: it is not YAML that this command reads: could not det"),
        ("- 2024-01-01\n", "source must be a folder"),
        ("- ''\n", "source must be a folder"),
        ("- source: a\n  output: no\n", "output must be a path, found False"),
        ("- &a [*a]\n", "unconstructable recursive node"),
        ("[" * 5000, "it is not YAML"),
        ("- \x07\n", "it is not YAML"),
    ],
)
def test_bad_yaml_is_refused_in_words(tmp_path, text, message):
    assert message in refusals(tmp_path / "models.yaml", text)[0]


def test_a_folder_is_no_list(tmp_path):
    with pytest.raises(BatchError, match="this is a folder, not a list of sources; 'ls -d FOLDER/") as caught:
        read_batch_file(tmp_path)
    assert caught.value.problems[0].file == str(tmp_path)


def test_an_empty_or_binary_list_is_refused(tmp_path):
    assert refusals(tmp_path / "models.txt", "# nothing\n") == ["the list is empty"]
    assert refusals(tmp_path / "models.json", "{}") == ["it must be a list"]
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(BatchError, match="not UTF-8"):
        read_batch_file(tmp_path / "binary")


def test_items_may_give_every_keyword_of_convert():
    parameters = set(inspect.signature(convert).parameters)
    target = {each.name for each in fields(PushTarget)} - {"repo_id"}
    assert set(OPTIONS) == (parameters | target) - {"source", "dry_run", "executor", "progress"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_any_entry_is_taken_or_refused(entry):
    try:
        (item,) = check_entries([entry])
    except BatchError:
        return
    assert item.source
    assert set(item.options) <= set(OPTIONS)


# --- items that would disturb each other ------------------------------------------------------------------


def clashes(*entries, **options):
    with pytest.raises(BatchError) as caught:
        convert_many(entries, **options)
    return [each.message for each in caught.value.problems]


def test_two_items_with_one_output_are_refused_by_their_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (message,) = clashes("x/model", "y/model")
    assert message.startswith("item 2: its output ")
    assert "is that of item 1 too; give one of them its own 'output'" in message
    (tmp_path / "link").symlink_to(tmp_path)
    assert len(clashes({"source": "a", "output": "o"}, {"source": "b", "output": "link/o"})) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_an_output_inside_another_output_or_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (message,) = clashes({"source": "a", "output": "o"}, {"source": "b", "output": "o/p"})
    assert message == "item 2: its output is inside the output of item 1; choose another"
    (message,) = clashes("a", {"source": "b", "output": "a/p"})
    assert message == "item 2: its output is inside the source of item 1; choose another"
    assert "item 2: its source is inside the output of item 1; choose another" in clashes(
        {"source": "a", "output": "o"}, "o"
    )


def test_wrong_options_of_all_items_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "unknown option 'verfy'" in clashes("a", verfy=3)[0]
    assert "use out_dir" in clashes("a", output="b")[0]
    assert "device needs verify" in clashes({"source": "a", "device": "cpu"}, verify="none")[0]
    assert clashes({"source": "a", "private": True}) == ["item 1: private needs push_to"]
    assert clashes("a", private=True, commit_message="x") == ["the options of all items: private needs push_to"]
    some = plan_jobs(["a", {"source": "b", "push_to": "org/b"}], None, None, {"private": True, "revision": None})
    assert [job.options.target and job.options.target.private for job in some] == [None, True]
    assert "is not a repository name" in clashes({"source": "a", "push_to": "a/b/c"})[0]
    assert "a pull request is opened on main" in clashes("a", push_to="org", create_pr=True, revision="x")[0]
    pushed_twice = clashes({"source": "a", "push_to": "org/x"}, {"source": "b", "output": "x"}, push_to="org")
    assert pushed_twice == ["item 2: it would be pushed to the repository of item 1; give it its own 'push_to'"]
    for wrong in ({"jobs": 0}, {"workers": 0}, {"part": (3, 2)}, {"part": (0, 2)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert_many(["a"], **wrong)
