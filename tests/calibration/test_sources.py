"""Sources: what is packaged, the orders, `datasets` names, and what is refused before a token is made."""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptoss_quantize.calibration.sources import (
    Row,
    default_calibration_path,
    default_heldout_path,
    describe,
    read_rows,
    shuffled,
)
from gptoss_quantize.errors import InputError


def read(source: Path | str, column: str | None = None, seed: int | None = None) -> list[Row]:
    return list(read_rows(str(source), fields=("messages", "text"), column=column, seed=seed))


def packaged(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


# ---- packaged texts


@pytest.mark.parametrize(
    ("path", "tokens"), [(default_calibration_path(), 140_000), (default_heldout_path(), 40_000)]
)
def test_packaged_texts_are_large_enough(path: Path, tokens: int) -> None:
    # a language model's tokenizer makes about one token of 4.2 bytes here (SmolLM2: 4.24 and 4.33)
    assert sum(len(document["text"].encode()) for document in packaged(path)) > 4.35 * tokens


def test_packaged_names_stand_for_the_packaged_files() -> None:
    for name, path in (("default", default_calibration_path()), ("heldout", default_heldout_path())):
        assert [r.value["text"] for r in read(name)] == [d["text"] for d in packaged(path)]
        assert "PostgreSQL" in describe(name)


def test_calibration_and_heldout_text_share_nothing() -> None:
    calibration, heldout = packaged(default_calibration_path()), packaged(default_heldout_path())
    assert not {d["source"] for d in calibration} & {d["source"] for d in heldout}
    paragraphs = [{p.strip() for d in docs for p in d["text"].split("\n\n")} for docs in (calibration, heldout)]
    assert len(paragraphs[0]) > 2000
    assert len(paragraphs[1]) > 500
    assert not paragraphs[0] & paragraphs[1]


def test_packaged_texts_are_clean_prose_from_both_sources() -> None:
    for path in (default_calibration_path(), default_heldout_path()):
        documents = packaged(path)
        for work in ("Jargon File 4.4.7", "PostgreSQL 15"):
            size = sum(len(d["text"]) for d in documents if d["source"].startswith(work))
            assert size > 0.45 * sum(len(d["text"]) for d in documents)
        for document in documents:
            text = document["text"]
            assert len(text) > 1000
            # no control characters, no drawn tables, no markup, no navigation
            assert not re.search(r"[\x00-\x09\x0b-\x1f\u2500-\u257f\ufffd]|</(p|div|span|a|code)>", text)
            assert not re.search(r"^(Prev|Next|Up|Home)\b.{0,20}$", text, re.MULTILINE)


def test_notice_carries_both_licences() -> None:
    notice = " ".join((default_calibration_path().parent / "NOTICE").read_text(encoding="utf-8").split())
    for words in (
        "Jargon File) is in the public domain",
        "version 4.4.7, 29 Dec 2003",
        "PostgreSQL Global Development Group",
        "The Regents of the University of California",
        "this paragraph and the following two paragraphs appear in all copies",
        "EVEN IF THE UNIVERSITY OF CALIFORNIA HAS BEEN ADVISED",
        'THE SOFTWARE PROVIDED HEREUNDER IS ON AN "AS-IS" BASIS',
    ):
        assert words in notice


# ---- orders


def test_orders_are_the_same_for_ever() -> None:
    # python -c "from gptoss_quantize.calibration.sources import shuffled; print([*shuffled(8, 0)])"
    assert list(shuffled(5, None)) == [0, 1, 2, 3, 4]
    assert list(shuffled(8, 0)) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert list(shuffled(8, 1)) == [2, 4, 7, 5, 0, 6, 3, 1]
    assert list(shuffled(8, 1, 2)) == [5, 6, 3, 2, 1, 0, 4, 7]
    assert sorted(shuffled(1000, 7)) == list(range(1000))


def test_parquet_is_shuffled_within_and_across_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(60)]}), path, row_group_size=20)
    records = read(path, seed=0)
    values = [int(r.value["text"]) for r in records]
    groups = [i // 20 for i in values]
    assert sorted(values) == list(range(60))
    assert groups != sorted(groups)
    assert values[:20] != sorted(values[:20])
    # the place that a record reports is its row in the file, not in its group
    assert all(r.where == f"{path}: row {r.value['text']}" for r in records)


# ---- data sets by name


def test_datasets_name_config_and_split_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for source in ("hf:org/name", "hf:org/name:en", "hf:org/name:en@test[:10%]", "hf:name@dev"):
        assert [r.value for r in read(source)] == [{"text": "a"}, {"text": "b"}]
    assert asked == [
        (("org/name", None), {"split": "train"}),
        (("org/name", "en"), {"split": "train"}),
        (("org/name", "en"), {"split": "test[:10%]"}),
        (("name", None), {"split": "dev"}),
    ]


@pytest.mark.parametrize("source", ["hf:no-such-org/no-such-set", "hf:no-such-org/no-such-set:en@test", "hf:"])
def test_data_sets_out_of_reach_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hf:.*(cannot be loaded|names no data set).*expected hf:NAME"):
        read(source)


def test_a_split_that_a_data_set_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    assert [r.value for r in read(f"hf:{tmp_path / 'set'}")] == [{"text": "a"}]
    with pytest.raises(InputError, match=r"@validation: the data set cannot be loaded \(ValueError: "):
        read(f"hf:{tmp_path / 'set'}@validation")


class Shard:
    """Rows without an end, which count how many were asked for."""

    def __init__(self) -> None:
        self.read = 0

    def rows(self, shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            for i in itertools.count():
                self.read += 1
                yield {"text": f"{shard}:{i}", "id": str(i)}


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> tuple[Shard, list[dict]]:
    """A data set on the Hub of 10 files without an end; (what is read, what was asked of `load_dataset`)."""
    shard, asked = Shard(), []

    def load_dataset(*args, **kwargs):
        asked.append(kwargs)
        return datasets.IterableDataset.from_generator(shard.rows, gen_kwargs={"shards": list(range(10))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return shard, asked


def taken(source: str, count: int, seed: int | None) -> list[str]:
    rows = read_rows(source, fields=("text",), column=None, seed=seed)
    return [row.value["text"] for row in itertools.islice(rows, count)]


def test_a_data_set_on_the_hub_is_streamed_and_costs_what_is_taken(endless) -> None:
    shard, asked = endless
    first = taken("hf:org/name", 50, 0)
    assert asked == [{"split": "train", "streaming": True}]
    assert shard.read < 1100  # a buffer, and what is taken, of rows without an end
    assert taken("hf:org/name", 50, 0) == first != taken("hf:org/name", 50, 1)
    files, places = zip(*(map(int, value.split(":")) for value in first), strict=True)
    assert len(set(first)) == 50 and len(set(files)) == 4 and max(places) > 100
    assert list(places) != sorted(places)


def test_a_stream_in_its_order_and_a_slice_of_it(endless) -> None:
    _, asked = endless
    assert taken("hf:org/name", 3, None) == ["0:0", "0:1", "0:2"]
    assert taken("hf:org/name@train[5:7]", 9, None) == ["0:5", "0:6"]
    assert sorted(taken("hf:org/name@train[5:7]", 9, 3)) == ["0:5", "0:6"]
    assert asked[-1] == {"split": "train", "streaming": True}


def test_every_row_of_a_stream_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(shards: list[int]) -> Iterator[dict[str, str]]:
        yield from ({"text": f"{s}:{i}"} for s in shards for i in range(300 + s))

    made = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(7))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    found = taken("hf:org/name", 10**6, 5)
    assert sorted(found) == sorted(row["text"] for row in rows(list(range(7))))
    assert found != sorted(found)


def test_a_large_local_folder_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_quantize.calibration import hub

    for name in ("a", "b", "c"):
        rows = "".join(json.dumps({"text": f"{name}{i}", "more": i}) + "\n" for i in range(40))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    monkeypatch.setattr(hub, "STREAM_OVER", 100)
    found = taken(f"hf:{tmp_path}", 1000, 0)
    assert sorted(found) == sorted(f"{name}{i}" for name in "abc" for i in range(40)) != found


def test_a_stream_that_breaks_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionResetError("peer went away")

    made = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"hf:org/name: the stream broke off .*peer went away"):
        taken("hf:org/name", 5, None)


def test_a_data_set_saved_to_disk_is_read(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    assert taken(f"hf:{tmp_path / 'one'}", 9, None) == ["a", "b"]
    assert taken(f"hf:{tmp_path / 'two'}@test", 9, None) == ["b"]
    with pytest.raises(InputError, match="cannot be loaded"):
        taken(f"hf:{tmp_path / 'two'}@validation", 9, None)


# ---- files that are refused


def test_paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.txt: no such file; check the path"):
        read(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"is a folder, a file was expected; hf:"):
        read(tmp_path / "folder.txt")


@pytest.mark.parametrize("column", [None, "texts"])
def test_a_parquet_file_without_the_column_is_refused(column: str | None, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(InputError, match=rf"no column '{column or 'messages'}'.* only \['body'\]"):
        read(path, column)
