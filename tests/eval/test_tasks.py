"""The offline suite, and our model behind lm-eval against lm-eval's own `hf` model on the same weights."""

import gzip
import json
import re
from collections import Counter, defaultdict

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from gptoss_quantize.calibration.sources import default_calibration_path
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import lm as streamed
from gptoss_quantize.eval import suite, tasks
from gptoss_quantize.eval.lm import Answers, StreamedLM, blocks, group_pairs
from gptoss_quantize.eval.suite import expand, suite_files
from gptoss_quantize.eval.tasks import TaskSettings, check_tasks, load_tasks, run_tasks
from gptoss_quantize.eval.trees import Tree

SUITE = {
    name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name, path in suite_files().items()
}
ITEMS = [(name, item) for name, items in SUITE.items() for item in items]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


# --- the suite


def test_the_suite_is_large_enough():
    assert len(SUITE) >= 6 and len(ITEMS) >= 1500
    assert min(map(len, SUITE.values())) >= 100


def test_items_are_whole_and_answers_stand_anywhere():
    for name, item in ITEMS:
        assert set(item) == {"query", "choices", "gold"}, name
        assert len(set(item["choices"])) == len(item["choices"]) in (2, 4), item
        assert 0 <= item["gold"] < len(item["choices"]), item
        assert item["query"].strip() == item["query"] and all(c.strip() == c != "" for c in item["choices"]), item
    for name, items in SUITE.items():
        places = Counter(item["gold"] for item in items)
        assert max(places.values()) < 1.5 * len(items) / len(items[0]["choices"]), name


def test_no_two_items_are_near_duplicates():
    holders = defaultdict(list)
    sizes = []
    for number, (_, item) in enumerate(ITEMS):
        text = re.sub(r"[^\w\s]", " ", f"{item['query']} {item['choices'][item['gold']]}".lower()).split()
        grams = {" ".join(text[i : i + 5]) for i in range(len(text) - 4)} or {" ".join(text)}
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(number)
    shared = Counter()
    for numbers in holders.values():
        for i, first in enumerate(numbers):
            for second in numbers[i + 1 :]:
                shared[first, second] += 1
    alike = [(a, b) for (a, b), count in shared.items() if count >= 0.5 * (sizes[a] + sizes[b] - count)]
    assert not [(ITEMS[a][1], ITEMS[b][1]) for a, b in alike]


def test_the_calibration_text_holds_no_item():
    with gzip.open(default_calibration_path(), "rt", encoding="utf-8") as file:
        text = " ".join(" ".join(json.loads(line)["text"].split()) for line in file)
    for name in ("gptoss_continuation", "gptoss_last_words"):
        for item in SUITE[name]:
            assert f"{item['query']} {item['choices'][item['gold']]}" not in text


def test_exported_tasks_are_those_of_the_package(tmp_path):
    import yaml

    suite.export(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.yaml")) == sorted([*SUITE, "offline"])
    for name in SUITE:
        assert yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) == suite.suite_config(name)
    assert yaml.safe_load((tmp_path / "offline.yaml").read_text())["task"] == list(suite.suite_files())


# --- what is refused


@pytest.fixture
def other_tasks(tmp_path, monkeypatch) -> None:
    """Instead of lm-eval's index of thousands of tasks: one of a kind that wants data from the hub."""
    config = suite.suite_config("gptoss_kinds") | {"task": "far_away", "dataset_path": "nobody/far-away-data"}
    del config["dataset_kwargs"]
    (tmp_path / "far_away.yaml").write_text(json.dumps(config))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "_manager", lambda suite_only: manager)


def test_an_unknown_task_is_refused(other_tasks):
    with pytest.raises(
        InputError, match=r"--tasks gptoss_poetry: no such task; expected `offline`, one of gptoss_ag"
    ):
        load_tasks(TaskSettings(names=("gptoss_poetry",)))


def test_a_task_that_needs_the_network_is_named_with_how_to_get_it(other_tasks):
    # conftest.py keeps the hub out of reach
    with pytest.raises(
        InputError, match=r"--tasks far_away: .*needs the hub .*lm_eval validate --tasks far_away.*offline"
    ):
        load_tasks(TaskSettings(names=("far_away",)))


def test_generation_needs_a_chat_template():
    kinds = {"gsm8k": "generate_until", "gptoss_capitals": "multiple_choice"}
    with pytest.raises(InputError, match=r"^gsm8k: generates text.*--apply-chat-template"):
        check_tasks(kinds, TaskSettings(names=()), has_template=True)
    asked = TaskSettings(names=(), apply_chat_template=True)
    with pytest.raises(InputError, match="the baseline's tokenizer has no chat template"):
        check_tasks(kinds, asked, has_template=False)
    check_tasks(kinds, asked, has_template=True)


def test_offline_stands_for_the_whole_suite():
    assert expand(["offline"]) == sorted(SUITE)
    assert expand(["gptoss_kinds", "hellaswag", "gptoss_kinds"]) == ["gptoss_kinds", "hellaswag"]
    kinds = load_tasks(TaskSettings(names=tuple(expand(["offline"]))))
    assert kinds == dict.fromkeys(SUITE, "multiple_choice")


# --- against lm-eval's own model


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[StreamedLM, HFLM]:
    """The same float32 checkpoint as ours and as lm-eval's `hf` model, 128 positions."""
    path = tiny.path("float32")
    tokenizer = load_tokenizer(path)
    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(path), tokenizer=tokenizer, batch_size=3)
    return StreamedLM(Checkpoint(path), tokenizer), theirs


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihoods_are_those_of_the_hf_model(pair, tiny):
    ours, theirs = pair
    asked = requests(
        "loglikelihood",
        ("The sea was", " calm"),
        ("The sea was", " calm, and the lighthouse keeper counted the ships"),
        ("The sea was ", "calm"),
        ("", "The ships"),
        ("<|pad|>The ships", " passed"),
        ("The sea was", " calm"),
        # beyond the 128 positions: cut from the left
        (tiny.text * 5, " The ships"),
    )
    got, exact = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in exact]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in exact], abs=2e-3)
    assert len({round(value, 4) for value, _ in got}) == 5


def test_rolling_loglikelihoods_are_those_of_the_hf_model(pair, tiny):
    ours, theirs = pair
    asked = requests("loglikelihood_rolling", (tiny.text,), (tiny.text * 6,), ("Rain",))
    exact = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(exact, rel=1e-5)


def test_accuracies_are_those_of_the_hf_model(pair):
    ours, theirs = pair
    names = ("gptoss_agreement", "gptoss_kinds", "gptoss_capitals")
    got = run_tasks(ours, TaskSettings(names=names, limit=15))
    configs = [suite.suite_config(name) for name in names]
    options = {"limit": 15, "bootstrap_iters": 0, "task_manager": tasks._manager(True)}
    exact = simple_evaluate(model=theirs, tasks=configs, log_samples=True, **options)
    assert list(got) == list(names)
    for name in names:
        assert got[name]["metrics"]["acc,none"] == exact["results"][name]["acc,none"]
        assert got[name]["right"] == [int(sample["acc"]) for sample in exact["samples"][name]]
        assert got[name]["items"] == 15 and got[name]["metric"] == "acc"
        assert got[name]["chance"] == (0.5 if name == "gptoss_agreement" else 0.25)
    assert 0 < sum(map(sum, (found["right"] for found in got.values()))) < 45


def test_nothing_is_printed_outside_a_git_repository(pair, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_tasks(pair[0], TaskSettings(names=("gptoss_kinds",), limit=1))
    assert capfd.readouterr() == ("", "")


def test_few_shot_and_chat_templates_reach_the_prompts(pair):
    ours, _ = pair
    plain = run_tasks(ours, TaskSettings(names=("gptoss_kinds",), limit=3))
    chat = run_tasks(ours, TaskSettings(names=("gptoss_kinds",), limit=3, apply_chat_template=True))
    assert plain["gptoss_kinds"]["prompts_sha256"] != chat["gptoss_kinds"]["prompts_sha256"]
    assert ours.apply_chat_template([{"role": "user", "content": "Hello"}]).endswith("<|start|>assistant<|message|>")


def test_texts_are_generated_by_the_loaded_model(tiny):
    path = tiny.path("float32")
    tokenizer = load_tokenizer(path)
    loads = []

    def load():
        loads.append(1)
        return AutoModelForCausalLM.from_pretrained(path)

    ours = StreamedLM(Checkpoint(path), tokenizer, load_model=load)
    options = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    asked = requests("generate_until", ("The sea was", options), ("The ships", options))
    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(path), tokenizer=tokenizer, batch_size=1)
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    assert len(loads) == 1
    with pytest.raises(InputError, match="generates text; give `load_model`"):
        StreamedLM(Checkpoint(path), tokenizer).generate_until(asked)


# --- blocks and what is kept


def test_requests_with_one_context_become_one_tree():
    grouped = group_pairs([((1, 2), (3,)), ((4,), (5,)), ((1, 2), (6, 7)), ((1, 2), (3,))])
    assert grouped == {(1, 2): [(3,), (6, 7)], (4,): [(5,)]}


def test_blocks_hold_every_tree_and_stay_small():
    trees = [Tree((1,) * n, ((2,),)) for n in (3, 9, 30, 2, 5)]
    cut = blocks(trees, most=12)
    assert [tree for block in cut for tree in block] == trees
    assert [sum(map(len, block)) for block in cut] == [4, 10, 31, 9]


def test_an_interrupted_run_asks_only_for_the_rest(tiny, tmp_path, monkeypatch):
    path, file = tiny.path("float32"), tmp_path / "answers.jsonl"
    tokenizer, checkpoint = load_tokenizer(path), Checkpoint(path)
    pairs = [((5, 6, 7), (8,)), ((5, 6, 7), (9, 10)), ((20, 21), (22,)), ((30, 31, 32), (33, 34))]
    exact = StreamedLM(checkpoint, tokenizer).score(pairs)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 6)
    monkeypatch.setattr(streamed, "blocks", lambda trees: blocks(trees, 6))
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 5:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StreamedLM(checkpoint, tokenizer, answers=Answers(file), on_layer=stop).score(pairs)
    assert len(file.read_text().splitlines()) == 2
    # the power went while a line was written
    with file.open("a") as half:
        half.write('["0123')
    counted = []
    again = StreamedLM(checkpoint, tokenizer, answers=Answers(file), on_blocks=counted.append)
    got = again.score(pairs)
    assert counted == [2]
    assert [g for _, g in got] == [g for _, g in exact]
    assert [v for v, _ in got] == pytest.approx([v for v, _ in exact], abs=1e-4)
    # now all is known, and the file is whole
    StreamedLM(checkpoint, tokenizer, answers=Answers(file), on_blocks=counted.append).score(pairs)
    assert counted == [2, 0] and len(file.read_text().splitlines()) == 4


def test_bfloat16_answers_are_nearly_the_same(tiny):
    path = tiny.path("float32")
    pairs = [((5, 6, 7), (8,)), ((20, 21), (22, 23))]
    exact, rough = (
        StreamedLM(Checkpoint(path), load_tokenizer(path), dtype=dtype).score(pairs)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert [v for v, _ in rough] == pytest.approx([v for v, _ in exact], abs=0.3)
    assert rough != exact
