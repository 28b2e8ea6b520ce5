"""Which candidate the report recommends, and that it recommends none where none may be."""

import pytest

from gptoss_quantize.eval.model_card import best
from gptoss_quantize.eval.ranking import rank


def candidate(name, kl=0.03, level="equivalent", *, half=0.002, mib=480, alarms=()):
    """Return the parts of a candidate of report.json that the ranking reads."""
    text = {"summary": {"kl_mean": kl}, "details": {"kl_mean_interval": [kl - half, kl + half]}}
    verdict = {"level": level, "alarms": list(alarms)}
    return {"name": name, "cost": {"bytes": mib * 2**20}, "texts": [text], "verdict": verdict}


def test_the_closest_of_those_that_are_as_good_is_shipped():
    found = rank([candidate("awq", 0.08), candidate("broken", 2.0, "broken"), candidate("gptq", 0.03)], None)
    assert found["ship"] == "gptq" and "0.0300" in found["why"] and "0.0800 of awq" in found["why"]
    assert [(place["name"], place["hindrance"]) for place in found["order"]] == [
        ("gptq", None),
        ("awq", None),
        ("broken", "broken"),
    ]


@pytest.mark.parametrize(("kl", "ship"), [(0.033, "small"), (0.035, "close")])
def test_the_smaller_is_shipped_only_where_the_closer_cannot_be_told_from_it(kl, ship):
    found = rank([candidate("close", 0.03), candidate("small", kl, mib=400)], None)
    assert found["ship"] == ship
    assert ("80 MiB smaller than close" in found["why"]) == (ship == "small")


def test_a_hair_of_size_decides_nothing():
    assert rank([candidate("close", 0.030), candidate("hair", 0.031, mib=479)], None)["ship"] == "close"


def test_the_text_where_it_is_furthest_counts():
    one, two = candidate("one", 0.02), candidate("two", 0.03)
    one["texts"] += candidate("", 0.2)["texts"]
    assert rank([one, two], None)["ship"] == "two"


@pytest.mark.parametrize(
    ("level", "words"),
    [("broken", "broken"), ("worse", "worse"), ("uncertain", "more of them"), ("unmeasured", "no tasks were run")],
)
def test_what_is_not_known_to_be_good_is_not_recommended(level, words):
    found = rank([candidate("a", 0.05, "broken"), candidate("b", 0.03, level)], None)
    assert found["ship"] is None and found["order"][0]["name"] == "b" and words in found["why"]


def test_an_undecided_one_that_is_clearly_closer_stops_the_recommendation():
    undecided = candidate("gptq", 0.03, "uncertain")
    found = rank([candidate("awq", 0.08), undecided], None)
    assert found["ship"] is None and "gptq stays clearly closer" in found["why"]
    assert found["order"][0]["name"] == "gptq"
    # not one that takes more room
    undecided["cost"]["bytes"] *= 2
    assert rank([candidate("awq", 0.08), undecided], None)["ship"] == "awq"


def test_an_alarm_or_a_suspect_baseline_stops_it_too():
    found = rank([candidate("a", alarms=["ALARM: colours fell"])], None)
    assert found["ship"] is None and "single task fell" in found["why"]
    found = rank([candidate("a")], "its perplexity is that of noise")
    assert found["ship"] is None and "suspect" in found["why"]


def test_without_texts_there_is_still_an_answer():
    entry = candidate("a") | {"texts": []}
    assert rank([entry], None)["ship"] == "a"


def test_the_card_is_of_the_one_that_the_page_puts_first():
    # the lowest divergence is broken, and the next one larger than one that cannot be told from it
    record = {
        "candidates": [candidate("a", 0.01, "broken"), candidate("b", 0.03), candidate("c", 0.031, mib=400)],
        "suspect": None,
    }
    assert best(record)["name"] == rank(record["candidates"], None)["ship"] == "c"
    record["candidates"] = [candidate("a", 0.01, "broken"), candidate("b", 0.03, "worse") | {"texts": []}]
    assert best(record)["name"] == "b"
