"""Which field is read as text, conversations included: `text` wins, nothing is guessed, and all of it is said."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.texts import BOS, EOS, build, make_tokenizer

from factorctl.data.account import SourceAccount, open_accounts
from factorctl.data.documents import Document
from factorctl.data.local_files import read_file
from factorctl.data.mixing import iter_documents
from factorctl.data.spec import parse_data_spec
from factorctl.data.tokenizing import tokenize_documents
from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.progress import SilentProgress

TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
SHAREGPT = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
TEMPLATE = "{% for m in messages %}{{ m.role }} w9 {{ m.content }} </s>{% endfor %}"
"""Roles are words that the tokenizer does not know (id 0)."""


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, field: str | None = None) -> tuple[list[Document], dict[str, Any]]:
    account = SourceAccount("src", SilentProgress())
    return list(read_file(path, path.name, account, field)), account.record


def texts(path: Path, field: str | None = None) -> list[str]:
    return [document.text for document in read(path, field)[0]]


def fault(path: Path, field: str | None = None) -> FactorctlError:
    with pytest.raises(FactorctlError) as caught:
        read(path, field)
    return caught.value


def test_text_wins_where_its_first_rows_are_null(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": None, "url": "u"}, {"text": "a", "url": "u"}, {"text": None}])
    documents, record = read(path)
    assert [document.text for document in documents] == ["a"]
    assert record == {"text": ["field 'text'"], "passed_over": [{"why": "field 'text' is null", "rows": 2}]}


def test_text_wins_where_the_first_row_lacks_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"url": "u"}, {"text": "a", "url": "u"}])
    assert fault(path).message.endswith("a.jsonl, line 1 has no field 'text'")


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array(["a", "b", "a"], pa.large_string()),
        pa.array(["a", "b", "a"], pa.string_view()),
        pa.array([b"a", b"b", b"a"], pa.binary()),
        pa.array([b"a", b"b", b"a"], pa.large_binary()),
        pa.array(["a", None, "b", "a"]),
    ],
    ids=lambda column: str(column.type),
)
def test_text_columns_of_parquet(tmp_path: Path, column: Any) -> None:
    path = table(tmp_path / "a.parquet", text=column, url=["u"] * len(column))
    assert texts(path) == ["a", "b", "a"]


def test_a_column_of_nulls_is_not_replaced(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", text=pa.nulls(3), url=["u"] * 3)
    assert read(path) == ([], {"passed_over": [{"why": "field 'text' is null", "rows": 3}]})


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    error = fault(table(tmp_path / "a.parquet", text=pa.array([b"ok", b"\xff\xd8"]), url=["u"] * 2))
    assert isinstance(error, IntegrityError)
    assert error.message.endswith("a.parquet, row 2: field 'text' holds bytes that are not UTF-8 (byte 1)")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
def test_nested_fields(tmp_path: Path, kind: str) -> None:
    rows = [{"id": "u", "doc": {"body": {"raw": text}}} for text in "ab"]
    path = tmp_path / kind
    if kind == "a.jsonl":
        lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    error = fault(path)
    assert isinstance(error, UsageError)
    assert error.message.endswith("(found: id; doc, an object)")
    assert error.hint == "name the field with --text-field: doc.body.raw, id"
    assert texts(path, "doc.body.raw") == ["a", "b"]


def test_an_object_that_is_null_is_passed_over(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"doc": {"body": "a"}}, {"doc": None}])
    assert texts(path, "doc.body") == ["a"]


def test_a_name_with_a_dot(tmp_path: Path) -> None:
    assert texts(lines(tmp_path / "a.jsonl", [{"doc.body": "a", "x": "y"}]), "doc.body") == ["a"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([["a", "b"]]), "field 'text' holds a list of strings, not text"),
        (pa.array([[1, 2]]), "field 'text' holds a list, not text"),
        (pa.array([{"a": "b"}]), "field 'text' holds an object, not text"),
        (pa.array([3]), "field 'text' holds numbers or other values, not text"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_text_column_of_something_else_is_refused(tmp_path: Path, column: Any, message: str) -> None:
    error = fault(table(tmp_path / "a.parquet", text=column, url=["u"]))
    assert isinstance(error, UsageError)
    assert error.message == f"{tmp_path / 'a.parquet'}: {message}"
    assert error.hint


# conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [TURNS, SHAREGPT, {"role": ["user", "assistant"], "content": ["w1 w2", "w3"]}])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_conversations(tmp_path: Path, kind: str, turns: Any) -> None:
    rows = [{"id": "identity_0", "prompt": "w1 w2", "conversations": turns} for _ in range(2)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        lines(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    documents, record = read(path)
    assert [document.text for document in documents] == ["w1 w2\n\nw3"] * 2
    assert [list(document.messages or ()) for document in documents] == [TURNS] * 2
    assert record == {"text": ["the conversation in field 'conversations'"]}


def test_messages_win_over_other_conversations_and_strings(tmp_path: Path) -> None:
    row = {"prompt": "p", "prompt_id": "i", "chosen": TURNS[:1], "messages": TURNS, "rejected": TURNS[:1]}
    assert texts(lines(tmp_path / "a.jsonl", [row])) == ["w1 w2\n\nw3"]


def test_several_conversations_are_not_guessed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": TURNS, "rejected": TURNS}])
    assert fault(path).hint == "name the field with --text-field: chosen, prompt, rejected"
    assert texts(path, "chosen") == ["w1 w2\n\nw3"]


def test_parts_and_calls(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": " w2"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    (document,), _ = read(lines(tmp_path / "a.jsonl", [{"messages": [parts, call]}]))
    assert document.text == "w1 w2"
    assert document.messages is not None
    assert document.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "moderator", "content": "a"}, "turn 2: no chat template knows the role 'moderator'"),
        ({"content": "a"}, "turn 2 has no role"),
        ({"role": "user", "content": [{"type": "image"}]}, "turn 2 holds more than text"),
    ],
)
def test_turns_that_cannot_be_read(tmp_path: Path, turn: dict[str, Any], message: str) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": [TURNS[0], turn]}])
    assert fault(path).message == f"{path}, line 1: field 'messages', {message}"


def test_lists_of_other_turns_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"id": "i", "dialog": [{"speaker": "A", "line": "b"}]}])
    assert fault(path).message.endswith("(found: id; dialog, a list)")


def test_a_chat_template_writes_conversations(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"id": "i", "messages": TURNS}])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    progress = SilentProgress()
    (document,) = tokenize_documents(parse_data_spec(str(path)), tokenizer, progress=progress)
    assert document.ids == [0, 12, 4, 5, EOS, 0, 12, 6, EOS], "no BOS in front: the template writes none"
    assert progress.notes == [
        f"'{path}': read as text: the conversation in field 'messages'",
        f"'{path}': read as text: turns as the tokenizer's chat template writes them",
    ]


def test_without_a_chat_template_the_turns_are_plain_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"id": "i", "messages": TURNS}])
    progress = SilentProgress()
    (document,) = tokenize_documents(parse_data_spec(str(path)), make_tokenizer(), progress=progress)
    assert document.ids == [BOS, 4, 5, 6]
    assert "turns one behind the other without roles, as the tokenizer has no chat template" in progress.notes[1]


def test_conversations_that_the_template_refuses_are_passed_over(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": TURNS[1:]}, {"messages": TURNS}, {"messages": TURNS[1:]}])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + TEMPLATE
    )
    progress = SilentProgress()
    documents = tokenize_documents(parse_data_spec(str(path)), tokenizer, progress=progress)
    assert [document.id for document in documents] == ["a.jsonl:2"]
    assert progress.notes[-1] == (
        f"'{path}': 2 rows were passed over: the tokenizer's chat template refuses the conversation: the user begins "
        "(first: a.jsonl:1)"
    )


def test_templates_that_write_the_date_write_always_the_same(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": TURNS}])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "w{{ strftime_now('%d') | int }} w{{ date_string[-4:] | int - 2000 }}"
    (document,) = tokenize_documents(parse_data_spec(str(path)), tokenizer)
    assert document.ids == [4, 28], "1 January 2025"


# blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_record_and_repeat_what_was_read(tmp_path: Path) -> None:
    rows = [{"body": f"w{n} w{n + 1} w{n + 2}"} for n in range(200)]
    path = lines(tmp_path / "a.jsonl", [{"body": None}, *rows])
    spec, notes = str(path), []
    for _ in range(2):
        progress = SilentProgress()
        blocks = build(spec, tmp_path / "cache", progress=progress)
        notes.append(progress.notes)
        assert blocks.record["sources"][0]["text"] == ["field 'body'"]
        assert blocks.record["sources"][0]["passed_over"] == [{"why": "field 'body' is null", "rows": 1}]
    assert notes[0][0] == notes[1][0] == f"'{path}': read as text: field 'body'"
    assert notes[0][1] == f"'{path}': 1 row was passed over: field 'body' is null (first: a.jsonl:1)"
    assert notes[1][1] == f"'{path}': 1 row was passed over: field 'body' is null"


def test_templated_conversations_end_as_the_template_ends_them(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": TURNS}] * 100)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE + " w99"
    blocks = build(str(path), tmp_path / "cache", tokenizer, heldout_fraction=0, block_length=10)
    assert blocks.train[3].tolist() == [0, 12, 4, 5, EOS, 0, 12, 6, EOS, 102]
    plain = build(str(path), tmp_path / "cache", heldout_fraction=0, block_length=5)
    assert plain.train[3].tolist() == [BOS, 4, 5, 6, EOS]
    assert plain.fingerprint != blocks.fingerprint


def test_a_short_text_is_read_on_in_its_long_documents(tmp_path: Path) -> None:
    path = lines(tmp_path / "book.jsonl", [{"text": " ".join(f"w{n % 500}" for n in range(1000))}, {"text": "w1"}])
    notes = []
    for _ in range(2):
        progress = SilentProgress()
        blocks = build(
            str(path), tmp_path / "cache", tokens=320, heldout_fraction=0, max_document_tokens=32, progress=progress
        )
        notes.append(progress.notes[-1])
        assert blocks.tokens == 320
        assert blocks.train.reshape(-1)[:320].tolist() == [BOS, *(3 + n % 500 for n in range(319))]
    assert notes == ["the text is short: up to 320 tokens of a document are read, instead of its first 32"] * 2


def test_documents_stay_cut_where_the_text_suffices(tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{n}" for n in range(100))} for _ in range(50)]
    blocks = build(
        str(lines(tmp_path / "a.jsonl", rows)),
        tmp_path / "cache",
        tokens=320,
        heldout_fraction=0,
        max_document_tokens=32,
    )
    assert np.diff(blocks.train_starts).tolist() == [32] * 9


def test_what_a_text_gives_is_counted_whole(tmp_path: Path) -> None:
    path = lines(tmp_path / "book.jsonl", [{"text": " ".join(f"w{n % 500}" for n in range(1000))}])
    with pytest.raises(UsageError) as caught:
        build(str(path), tmp_path / "cache", tokens=3200, heldout_fraction=0, max_document_tokens=32)
    assert caught.value.message == "the calibration text gives 1,002 tokens; 3,200 were asked for"
    assert caught.value.hint is not None
    assert "ask for 992 tokens or fewer" in caught.value.hint
    assert build(str(path), tmp_path / "cache", tokens=992, heldout_fraction=0, max_document_tokens=32).tokens == 992


# the splits of a data set ----------------------------------------------------------------------------------------


def data_set(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines(folder / name, [{"text": f"from {name}"}])
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {}}}, indent=1))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "read_names"),
    [
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/validation-0.jsonl"], 1),
        (["train/a.jsonl", "validation/a.jsonl", "test/b.jsonl"], 1),
        (["my_train.jsonl", "my_dev.jsonl", "my_eval.jsonl"], 1),
        (["train.jsonl", "latest.jsonl", "valid.jsonl"], 2),
    ],
)
def test_the_training_split_of_a_folder_is_read(tmp_path: Path, names: list[str], read_names: int) -> None:
    spec = parse_data_spec(data_set(tmp_path / "d", *names))
    progress = SilentProgress()
    documents = tokenize_documents(spec, make_tokenizer(), progress=progress)
    assert sorted(document.id.rpartition(":")[0] for document in documents) == sorted(names[:read_names])
    left_out = ", ".join(sorted(names[read_names:]))
    assert progress.notes[0] == (
        f"'{tmp_path / 'd'}': its training split is read; left out: {left_out} (name a file to read it)"
    )


def test_test_files_alone_are_read_with_a_note(tmp_path: Path) -> None:
    spec = parse_data_spec(data_set(tmp_path / "d", "test-0.jsonl", "notes.jsonl"))
    progress = SilentProgress()
    assert len(tokenize_documents(spec, make_tokenizer(), progress=progress)) == 2
    assert progress.notes[0] == f"'{tmp_path / 'd'}': read although named as a test or validation split: test-0.jsonl"


def test_files_of_one_folder_with_other_fields(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    data_set(folder, "a.jsonl")
    lines(folder / "b.jsonl", [{"body": "w1 w2"}])
    progress = SilentProgress()
    tokenize_documents(parse_data_spec(str(folder)), make_tokenizer(), progress=progress, seed=0)
    assert progress.notes == [
        f"'{folder}': read as text: field 'body'",
        f"'{folder}': read as text: field 'text' (from a.jsonl:1 on)",
    ]


def test_a_file_that_is_named_is_read_whatever_its_split(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", "train.jsonl", "test.jsonl")
    progress = SilentProgress()
    (document,) = tokenize_documents(parse_data_spec(f"{folder}/test.jsonl"), make_tokenizer(), progress=progress)
    assert document.id == "test.jsonl:1"
    assert progress.notes == [f"'{folder}/test.jsonl': read as text: field 'text'"]


def test_cached_blocks_say_the_splits_again(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", "train.jsonl", "test.jsonl")
    lines(tmp_path / "d" / "train.jsonl", [{"text": f"w{n} w{n + 1}"} for n in range(200)])
    for _ in range(2):
        progress = SilentProgress()
        build(folder, tmp_path / "cache", progress=progress)
        assert "left out: test.jsonl" in progress.notes[0]


DOMAINS = [{"text": f"w{i}", "domain": name, "source": "s"} for i, name in enumerate(["wiki", "code", "books", "code"])]


def told(path: Path, rows: str) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Text and domain of what is read, and what is said."""
    notes: list[str] = []

    class Listening(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    spec = parse_data_spec(f"{path}:{rows}")
    accounts = open_accounts(spec, Listening())
    read = [(document.text, document.domain) for document in iter_documents(spec, seed=0, accounts=accounts)]
    for account in accounts.values():
        account.close()
    return read, notes


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_only_the_rows_that_a_filter_admits_are_read_and_the_others_counted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        lines(path, DOMAINS)
    else:
        table(path, **{name: [row[name] for row in DOMAINS] for name in DOMAINS[0]})
    read, notes = told(path, "domain!=code")
    assert read == [("w0", "wiki"), ("w2", "books")]
    assert any("2 rows were passed over: not domain!=code" in note for note in notes)
    assert told(path, "domain=code+books")[0] == [("w1", "code"), ("w2", "books"), ("w3", "code")]


def test_a_value_that_no_row_has_is_said(tmp_path: Path) -> None:
    read, notes = told(lines(tmp_path / "a.jsonl", DOMAINS), "domain!=cod+wiki")
    assert len(read) == 3
    assert any("no row read has domain 'cod'; found: 'code', 'wiki', 'books'" in note for note in notes)


def test_a_row_without_the_filters_field_is_an_error(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", DOMAINS)
    with pytest.raises(UsageError, match="line 1 has no field 'domian', which 'domian!=code' asks for") as caught:
        told(path, "domian!=code")
    assert "domain" in str(caught.value.hint)
    (tmp_path / "b.txt").write_text("w1")
    with pytest.raises(UsageError, match="is plain text without fields"):
        told(tmp_path / "b.txt", "domain=code")


def test_the_domain_is_the_field_domain_else_source(tmp_path: Path) -> None:
    rows = [{"text": "a", "source": "s"}, {"text": "b", "source": "s", "domain": "d"}, {"text": "c", "domain": 3}]
    documents, _ = read(lines(tmp_path / "a.jsonl", rows))
    assert [document.domain for document in documents] == ["s", "d", None]


def test_filtered_blocks_are_other_blocks_and_say_so(tmp_path: Path) -> None:
    rows = [{"text": f"w{i % 9} " * 40, "domain": "ab"[i % 2]} for i in range(12)]
    path = lines(tmp_path / "a.jsonl", rows)
    all_rows, some = (build(f"{path}{suffix}", tmp_path / "cache", tokens=64) for suffix in ("", ":domain=a"))
    assert all_rows.fingerprint != some.fingerprint
    assert some.sources[0]["rows"] == "domain=a"
    assert "rows" not in all_rows.sources[0]
