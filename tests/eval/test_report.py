"""report.html: tables, plots and answers that a reader can read at every width and on paper."""

import re
from importlib.resources import files
from xml.etree import ElementTree

import pytest

from gptoss_quantize.eval import plots
from gptoss_quantize.eval.report import TEMPLATE, spoken_speed, whole_sentences

PAGE = (files("gptoss_quantize.eval") / "data" / TEMPLATE).read_text(encoding="utf-8")


def entry(name, bits=4.25, kl=0.03):
    text = {"summary": {"kl_mean": kl}, "details": {"kl_mean_interval": [0.9 * kl, 1.1 * kl]}}
    return {"name": name, "cost": {"bits_per_expert_weight": bits}, "texts": [text]}


def test_every_table_scrolls_with_its_hint_and_does_not_on_paper():
    tables = PAGE.count("<table")
    assert tables == 6
    box = r'<div class="scroll" tabindex="0"[^>]*><p class="hint">[^<]+</p><table>'
    assert len(re.findall(box, PAGE)) == tables == PAGE.count("</table></div>")
    # a table that goes on overleaf has its headings there too
    assert PAGE.count("<thead>") == tables
    style = PAGE[: PAGE.index("</style>")]
    # the rules for paper stand last, where they win
    paper = style[style.rindex("@media print") :]
    assert "overflow: visible" in paper and "white-space: normal" in paper and ".hint { display: none" in paper
    assert "scroll-state(scrollable: x) { .hint { display: block" in style


def test_letters_of_plots_are_legible_on_a_phone():
    drawn = plots.kl_against_bits([entry("a"), entry("b", 5.25)], 0.001)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawn)[1])
    sizes = [
        float(size) for size in re.findall(r"font: ([\d.]+)px|font-size: ?([\d.]+)px", drawn) for size in size if size
    ]
    # 390 pixels less the margins of the page
    assert sizes and min(sizes) * 350 / width >= 9


@pytest.mark.parametrize(("second", "said"), [(4.25, True), (5.25, False)])
def test_an_axis_of_sizes_stands_only_where_sizes_differ(second, said):
    drawn = plots.kl_against_bits([entry("a"), entry("b", second, 0.05)], None)
    words = "".join(ElementTree.fromstring(drawn).itertext())
    assert ("all at 4.25 bits per expert weight" in words) == said
    assert "a" in words and "b" in words


def test_cells_without_a_number_are_explained():
    def layer(error):
        return {"tokens": [4, 0], "expert_error": [error, None]}

    candidates = [entry("one") | {"experts": {"layers": [layer(0.1), layer(0.2)]}}]
    words = [caption for caption, _ in plots.expert_heatmaps(candidates)]
    assert "Grey: an expert that got none" in words[0]
    assert words[1].startswith("one: ") and "Grey: an expert that got no token." in words[1]


def test_a_cut_answer_ends_with_a_whole_sentence():
    assert whole_sentences("Paris is big. It is known for its") == "Paris is big. …"
    assert whole_sentences("Paris, 3.5 million people, is") == "Paris, 3.5 million people, is …"
    assert whole_sentences("Three: 1. bees. 2. birds. 3. bats") == "Three: 1. bees. 2. birds. …"
    assert whole_sentences("It is so.") == "It is so."


def test_speed_is_that_of_the_answers_alone():
    timed = {"tokens": 11, "seconds": 9.0, "answer_seconds": 2.0}
    assert spoken_speed({"examples": [timed, timed]}) == 5
    # a report of before did not measure it
    assert spoken_speed({"examples": [{"tokens": 11, "seconds": 9.0}]}) is None
