"""Reading documents: every format, every way in which they can be bad, nothing dropped without a count."""

import csv
import gzip
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hotloop.engine.data import documents as module
from hotloop.engine.data.documents import Documents
from hotloop.engine.data.files import Report, walk
from hotloop.engine.errors import UserError

TEXTS = [
    "plain ascii\nsecond line",
    "Grüße, señor — naïve café",
    "日本語のテキスト。\n二行目",
    "Ελληνικά и русский",
    "🙂 emoji 👩‍👩‍👧",
]


def read(*paths, report=None, **options):
    """Whole documents, joined from their segments."""
    report = Report() if report is None else report
    out, parts = [], []
    for segment in Documents(list(paths), **options).read(report):
        parts.append(segment.text)
        if segment.last:
            out.append("".join(parts))
            parts = []
    assert not parts
    assert report.documents == len(out)
    return out


def compress(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data)
    return pa.compress(data, "zstd", asbytes=True) if suffix == ".zst" else data


def as_csv(rows, field="text"):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", field])
    writer.writerows(enumerate(rows))
    return out.getvalue().encode()


def as_jsonl(rows, field="text", **options):
    return "".join(json.dumps({"id": 1, field: row}, **options) + "\n" for row in rows).encode()


def as_parquet(column, field="text"):
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(column))), field: column}), out)
    return out.getvalue()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_a_row_is_a_document(tmp_path, format, compression):
    data = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}[format](TEXTS, field="body")
    path = tmp_path / f"rows.{format}{compression}"
    path.write_bytes(compress(data, compression))
    assert read(path, text_field="body") == TEXTS
    assert read(tmp_path, text_field="body") == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_a_document(tmp_path, suffix, compression):
    text = "\r\n".join(TEXTS) + "\n"
    (tmp_path / f"a{suffix}{compression}").write_bytes(compress(text.encode(), compression))
    assert read(tmp_path) == [text], "newlines must stay as they are"


def test_concatenated_gzip_members_are_one_stream(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert read(tmp_path) == ["one two"]


def test_parquet_string_types_and_several_row_groups(tmp_path):
    table = pa.table({"text": pa.array(TEXTS * 300).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string())}), tmp_path / "b.parquet")
    assert read(tmp_path) == TEXTS * 301


def test_files_come_in_sorted_order_and_others_are_counted(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a.txt", "c.md", "B.txt", "skip.me.txt", "x/skipped/y.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in ("pic.png", "pic2.png", "Makefile"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe.txt")
    report = Report()
    assert read(tmp_path, report=report, exclude=["skip.*", "x/skipped"]) == [
        "B.txt",
        "a.txt",
        "b/a.txt",
        "b/z.txt",
        "c.md",
    ]
    assert report.skipped == {
        ".png": 2, "no suffix": 1, "link to a folder": 1, "not a regular file": 1, "excluded": 2,
    }  # fmt: skip
    assert report.files == 5
    assert [file.group for file in walk([tmp_path], ["skip.*", "x"])] == ["B.txt", "a.txt", "b", "b", "c.md"]


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize(
    "text",
    [
        "Eine Zeile mit Wörtern.\n" * 600,
        "word " * 3000,
        "漢字かな交じり文。\n" * 900,
        "a\r\n\r\n  b " * 1500,
        "x" * 9000,
        "\u3000\n" * 5000,
    ],
)
def test_long_text_files_come_in_segments(tmp_path, monkeypatch, text, compression):
    """Cut, and read, at awkward sizes: joined again they are the text, and every character boundary holds."""
    monkeypatch.setattr(module, "SEGMENT", 1000)
    monkeypatch.setattr(module, "LONGEST_SEGMENT", 2500)
    monkeypatch.setattr(module, "CHUNK", 257)
    (tmp_path / f"a.txt{compression}").write_bytes(compress(text.encode(), compression))
    segments = list(Documents([tmp_path]).read(Report()))
    assert "".join(segment.text for segment in segments) == text
    assert len(segments) > 3
    assert [segment.last for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert max(len(segment.text) for segment in segments) <= 2500 + 257


# Bad input

INVALID = b"good \xff\xfe then \xe9 and cut \xe3\x81"  # a stray pair, a Latin-1 letter, half of a character


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("mode", ["replace", "skip", "error"])
def test_invalid_utf8_in_text_is_counted_with_its_byte(tmp_path, monkeypatch, mode, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(INVALID)
    (tmp_path / "b.txt").write_text("fine, with a real \ufffd inside")
    sink = io.StringIO()
    report = Report(sink=sink)
    if mode == "error":
        with pytest.raises(UserError, match=r"a\.txt: invalid UTF-8 at byte 5 \(0xff\)"):
            read(tmp_path, on_bad_encoding=mode)
        return
    texts = read(tmp_path, report=report, on_bad_encoding=mode)
    assert texts == [INVALID.decode(errors="replace")] * (mode == "replace") + ["fine, with a real \ufffd inside"]
    assert report.problems == {"invalid UTF-8": 1}
    line = json.loads(sink.getvalue())
    assert line["file"] == str(path)
    assert line["byte"] == 5
    if mode == "replace":
        assert line["message"] == "4 invalid sequences, replaced with U+FFFD"


@pytest.mark.parametrize("mode", ["replace", "skip", "error"])
@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_invalid_utf8_in_rows(tmp_path, format, mode):
    path = tmp_path / f"a.{format}"
    if format == "parquet":
        bad = pa.array([b"one", b"b\xffd", b"three"]).cast(pa.binary())
        bad = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
        path.write_bytes(as_parquet(bad))
        byte = 1  # inside the value
    else:
        data = (
            b'{"text": "one"}\n{"text": "b\xffd"}\n{"text": "three"}\n'
            if format == "jsonl"
            else b"text\none\nb\xffd\nthree\n"
        )
        path.write_bytes(data)
        byte = data.index(b"\xff")
    sink = io.StringIO()
    if mode == "error":
        with pytest.raises(UserError, match=f"invalid UTF-8 at .*byte {byte}.*0xff"):
            read(path, on_bad_encoding=mode)
        return
    assert read(path, report=Report(sink=sink), on_bad_encoding=mode) == (
        ["one", "b\ufffdd", "three"] if mode == "replace" else ["one", "three"]
    )
    line = json.loads(sink.getvalue())
    assert (line["kind"], line["byte"]) == ("invalid UTF-8", byte)
    assert line.get("line", line.get("row")) == {"jsonl": 2, "csv": 3, "parquet": 2}[format]


def test_a_lone_surrogate_in_json_is_an_encoding_problem(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\\ud800y"}\n{"text": "\\ud83d\\ude42"}\n')
    report = Report()
    texts = read(tmp_path, report=report)
    assert texts[1] == "🙂"
    assert "\ufffd" in texts[0]
    texts[0].encode()
    assert report.problems == {"invalid UTF-8": 1}
    assert len(read(tmp_path, on_bad_encoding="skip")) == 1


def test_malformed_json_lines_are_counted_with_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "ok"}',
        "",
        '{"text": "cut',
        "[1, 2]",
        '{"other": 1}',
        '{"text": null}',
        '{"text": 5}',
        '{"text": ""}',
        "[" * 200_000,
        '{"text": "last, without newline"}',
    ]
    path.write_text("\n".join(lines))
    sink = io.StringIO()
    report = Report(sink=sink)
    assert read(path, report=report) == ["ok", "last, without newline"]
    assert report.problems == {"malformed JSON": 3, "no text": 3, "empty document": 1}
    found = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [line["line"] for line in found] == [3, 4, 5, 6, 7, 8, 9]
    data = path.read_bytes()
    assert all(data[line["byte"] :].startswith(lines[line["line"] - 1].encode()) for line in found)
    assert "a.jsonl: line 3" in report.examples["malformed JSON"][0]


def test_malformed_csv_rows_are_counted_with_their_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,ok\n2,too,many\n3\n\n4,"two\nlines"\n5,"bad"quote\n6,fine\n7,"never closed\n8,x\n')
    report = Report()
    assert read(path, report=report) == ["ok", "two\nlines", "fine"]
    assert report.problems == {"malformed row": 4}
    assert [example.split(": ")[1] for example in report.examples["malformed row"]] == [
        "line 3",
        "line 4",
        "line 8",
        "line 10",
    ]


def test_a_csv_field_may_be_long_and_the_limit_of_the_process_stays(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_bytes(as_csv(["x" * 300_000]))
    assert read(tmp_path) == ["x" * 300_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path, format):
    path = tmp_path / f"a.{format}"
    path.write_bytes({"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}[format](["x"], field="body"))
    with pytest.raises(UserError, match=r"no field 'text' \(--text-field\).*'id', 'body'"):
        read(tmp_path)


def test_a_parquet_column_of_numbers_is_an_error(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'text' holds int64, expected strings"):
        read(tmp_path)


def test_null_rows_are_counted(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, ""]}), tmp_path / "a.parquet")
    report = Report()
    assert read(tmp_path, report=report) == ["a"]
    assert report.problems == {"no text": 1, "empty document": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_binary_file_is_an_error_if_named_and_counted_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04\0\0binary")
    (tmp_path / "z.txt").write_text("text")
    with pytest.raises(UserError, match=r"binary file \(NUL at byte 4\)"):
        read(tmp_path / name)
    report = Report()
    assert read(tmp_path, report=report) == ["text"]
    assert report.problems == {"binary": 1}
    assert report.files == 1


def test_utf16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match=r"UTF-16.*convert"):
        read(tmp_path / "a.txt")


def test_a_byte_order_mark_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext \xff")
    report = Report()
    assert read(tmp_path, report=report) == ["text \ufffd"]
    assert report.problems == {"byte-order mark": 1, "invalid UTF-8": 1}
    assert "byte 8" in report.examples["invalid UTF-8"][0]


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_compressed_file_keeps_what_was_before(tmp_path, keep):
    rows = [os.urandom(300).hex() for _ in range(4000)]
    data = gzip.compress(as_jsonl(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(data[: int(len(data) * keep)])
    (tmp_path / "b.txt").write_text("after")
    report = Report()
    texts = read(tmp_path, report=report)
    assert texts[-1] == "after"
    assert texts[:-1] == rows[: len(texts) - 1]
    assert report.problems == {"unreadable": 1}
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read: Truncated"):
        read(tmp_path / "a.jsonl.gz")


def test_a_damaged_text_file_is_one_document_up_to_the_damage(tmp_path):
    text = os.urandom(2_000_000).hex()
    data = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(data[: len(data) // 2])
    report = Report()
    (document,) = read(tmp_path, report=report)
    assert document
    assert text.startswith(document)
    assert report.problems == {"unreadable": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.txt.zst"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_text("this is plain text, long enough to look at")
    (tmp_path / "z.txt").write_text("text")
    report = Report()
    assert read(tmp_path, report=report) == ["text"]
    assert report.problems == {"unreadable": 1}
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "no file to read in this folder .*it is empty"),
        (lambda path: (path.mkdir(), (path / "a.png").touch()), "no file to read .*1 .png"),
        (lambda path: None, "no such file or folder"),
        (lambda path: path.symlink_to("nowhere"), "neither a file nor a folder"),
    ],
)
def test_paths_that_hold_nothing(tmp_path, make, message):
    make(tmp_path / "docs")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "docs")


def test_a_named_file_of_unknown_kind(tmp_path):
    (tmp_path / "a.docx").touch()
    with pytest.raises(UserError, match=r"'\.docx' cannot be read; expected \.txt"):
        read(tmp_path / "a.docx")


def test_a_file_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_bytes(b"\xff")
    report = Report(sink=io.StringIO())
    read(tmp_path, report=report)
    report.examples["invalid UTF-8"][0].encode()
    assert r"caf\xe9.txt" in report.examples["invalid UTF-8"][0]
