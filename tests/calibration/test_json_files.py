"""JSON files of every layout: arrays, arrays inside an object, one row per line; their places, orders and faults."""

import gzip
import json
from pathlib import Path

import pytest

from gptoss_quantize.calibration.sources import Row, read_rows
from gptoss_quantize.errors import InputError

ROWS = [{"text": "one, [two] {three}"}, {"text": 'a "quoted" \\ text', "n": [1, {"deep": None}]}, {"text": "ünïcode"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def read(path: Path, seed: int | None = None) -> list[Row]:
    return list(read_rows(str(path), fields=("text",), column=None, seed=seed))


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


LAYOUTS = {
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "bom.json": "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
    "data.json": json.dumps({"version": "0.1", "meta": {"data": [1]}, "data": ROWS, "after": 1}),
    "instances.json": json.dumps({"type": "text2text", "instances": ROWS}, indent=1),
    "viewer.json": json.dumps({"features": [], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}),
    "lines.json": "\n" + lines(ROWS),
    "lines.jsonl": lines(ROWS),
    "lines.ndjson": lines(ROWS),
    "crlf.json": lines(ROWS).replace("\n", "\r\n"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_rows(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" if packed else name)
    data = LAYOUTS[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    assert [row.value for row in read(path)] == ROWS
    assert not any(row.error or row.continued for row in read(path))
    shuffled = [row.value["text"] for row in read(path, seed=4)]
    assert sorted(shuffled) == sorted(row["text"] for row in ROWS)


def test_the_order_of_an_array_is_that_of_the_same_lines(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(lines(rows), encoding="utf-8")
    orders = [[row.value["text"] for row in read(tmp_path / name, seed=7)] for name in ("a.json", "a.jsonl")]
    assert orders[0] == orders[1] != sorted(orders[0])


def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1), encoding="utf-8")
    assert [row.where for row in read(path)] == [f"{path}: line 2, row 0", f"{path}: line 5, row 1"]


def test_lines_and_arrays_may_hold_conversations_without_an_object_around_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([CHAT, CHAT]), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([CHAT, CHAT]), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        assert [row.value for row in read(tmp_path / name)] == [CHAT, CHAT]


def test_lines_that_begin_with_an_array_are_lines(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(lines([[], ["a"], {"text": "b"}]), encoding="utf-8")
        assert [row.value for row in read(tmp_path / name)] == [[], ["a"], {"text": "b"}]


def test_one_object_is_one_row_unless_it_holds_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for row in ({"messages": CHAT}, {"text": "a", "data": [1, 2]}):
        path.write_text(json.dumps(row, indent=2), encoding="utf-8")
        assert [found.value for found in read(path)] == [row]


def test_a_line_that_is_no_json_is_handed_on_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \ncaf\xe9\n' + b"[" * 100_000 + b'\n{"text": "b"}\n')
    rows = read(path)
    assert [row.value for row in rows if row.error is None] == [{"text": "a"}, {"text": "b"}]
    assert [row.where for row in rows] == [f"{path}: line {i}" for i in range(1, 6)]
    assert "not JSON" in rows[1].error and "not UTF-8" in rows[2].error and "not JSON" in rows[3].error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"\n {"text": "c"}]', "line 2, row 1: not JSON"),
        ('[{"text": "a"}\n {"text": "b"}]', "line 1, row 0: not JSON"),
        ('[{"text": "a"},', "row 1: not JSON"),
        ('{"data": [{"text": "a"}', "a.json: not JSON"),
        ('[\n{"text": "a"}\n]\n{"text": "b"}', "line 4: more text after the end"),
    ],
)
def test_a_broken_array_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl.zst", "unpack it with `unzstd`"),
        ("a.csv", "hf:FOLDER reads it"),
        ("a.xyz", "not a kind of text that is known here; expected a file in .*json"),
    ],
)
def test_files_of_other_kinds_are_refused_with_a_remedy(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_utf_16_is_refused_with_its_own_remedy(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_text(lines(ROWS), encoding="utf-16")
        with pytest.raises(InputError, match="iconv -f utf-16 -t utf-8"):
            read(tmp_path / name)
