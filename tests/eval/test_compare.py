"""The whole comparison on tiny checkpoints: record, cache, verdicts, wrong uses, and the page in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.calibration.text import TextSpec
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import compare as comparison
from gptoss_quantize.eval.compare import Settings, compare
from gptoss_quantize.eval.divergence import evaluate
from gptoss_quantize.eval.identity import adapter_difference, cost, fingerprint, pair_warnings
from gptoss_quantize.eval.paired import compare_answers
from gptoss_quantize.eval.report import render, write_report
from gptoss_quantize.eval.tasks import TaskSettings
from gptoss_quantize.eval.verdict import CEILING_KL, LEAST_TOP1, fell, furthest, judge, least_items, sentence
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

TASKS = ("gptoss_agreement", "gptoss_kinds", "gptoss_sequences")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def halves(path: Path) -> Path:
    """Store all gate rows, then all up rows: the layout of most other models, wrong for gpt-oss."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_up_proj" in name:
            tensors[name] = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[str, Path]:
    """The baseline, an int4 checkpoint of it, and one whose gate and up rows are halves instead of interleaved."""
    root = tmp_path_factory.mktemp("compare")
    int4 = root / "int4"
    quantize_checkpoint(
        Checkpoint(tiny.path("float32")), Job(dest=int4, method="rtn", recipe=RECIPES["rtn"], group_size=64), None
    )
    return {"base": tiny.path("float32"), "int4": int4, "halves": halves(tiny.copy("float32", root / "halves"))}


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("texts")
    words = tiny.text.split()
    raw = [{"text": " ".join(words[i:] + words[:i])} for i in range(len(words))]
    chat = [
        {"messages": [{"role": "user", "content": "The sea?"}, {"role": "assistant", "content": tiny.text[:40]}]}
    ] * 3
    for name, rows in (("raw", raw), ("chat", chat)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Settings(
        texts=tuple(
            TextSpec(source=str(folder / f"{name}.jsonl"), tokens=480, seq_len=48, shuffle=False)
            for name in ("raw", "chat")
        ),
        tasks=TaskSettings(names=TASKS, limit=8),
        expert_tokens=150,
        prompts=("What is the sea?",),
        new_tokens=4,
    )


def run(made: dict[str, Path], settings: Settings, dest: Path, start=comparison._quiet) -> dict:
    candidates = {name: Checkpoint(made[name]) for name in ("int4", "halves") if name in made}
    return compare(Checkpoint(made["base"]), candidates, settings, dest, start) | {
        "command": "gptoss-quantize compare"
    }


@pytest.fixture(scope="module")
def done(made, settings, tmp_path_factory) -> tuple[dict, Path]:
    """The record of the comparison, and the directory with its report."""
    dest = tmp_path_factory.mktemp("report")
    record = run(made, settings, dest)
    write_report(record, dest)
    return record, dest


# --- the record


def test_token_numbers_are_those_of_evaluate(done, made, settings):
    record, _ = done
    base = Checkpoint(made["base"])
    from gptoss_quantize.calibration.text import load_tokenizer, load_tokens

    ids = load_tokens(settings.texts[0], load_tokenizer(made["base"])).ids
    (expected,) = evaluate(base, [Checkpoint(made["int4"])], ids)
    got = record["candidates"][0]["texts"][0]["summary"]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_baseline_differs_from_itself_by_less_than_the_noise_floor(done):
    record, _ = done
    own, noise = record["baseline"]["texts"][0]["summary"], record["noise_floor"][0]["summary"]
    assert abs(own["kl_mean"]) < 1e-6 and own["top1_agreement"] == 1
    assert 1e-6 < noise["kl_mean"] < record["candidates"][0]["texts"][0]["summary"]["kl_mean"]


def test_chat_is_scored_beside_raw_text(done):
    record, _ = done
    raw, chat = (text["text"] for text in record["baseline"]["texts"])
    assert raw["kind"] == "raw" and chat["kind"] == "chat" and chat["sequences"] == 3
    assert record["candidates"][0]["texts"][1]["summary"]["tokens"] == chat["scored_tokens"]


def test_a_checkpoint_with_halves_for_interleaved_rows_is_called_broken(done):
    good, broken = (entry["verdict"] for entry in done[0]["candidates"])
    assert good["level"] != "broken"
    assert broken["level"] == "broken" and broken["sentence"].startswith("BROKEN; ")
    assert "KL divergence" in broken["sentence"] or "next token" in broken["sentence"]


def test_costs_are_counted_from_the_file(done, made):
    entry = done[0]["candidates"][0]["cost"]
    assert entry["bits_per_expert_weight"] == 4.25 and entry["format"] == "int4" and entry["method"] == "rtn"
    assert cost(Checkpoint(made["base"]))["bits_per_weight"] == 32
    stored = sum(t.nbytes for file in made["int4"].glob("*.safetensors") for t in load_file(file).values())
    assert entry["bytes"] == sum(entry["bytes_by_part"].values()) == stored


def test_paired_answers_are_counted(done):
    record, _ = done
    for entry in record["candidates"]:
        total = entry["tasks_overall"]
        assert total["items"] == 24
        for key in ("flips_worse", "flips_better"):
            assert total[key] == sum(task["paired"][key] for task in entry["tasks"].values())
        for task, found in entry["tasks"].items():
            ours, theirs = record["baseline"]["tasks"][task]["right"], found["right"]
            assert found["paired"]["flips_worse"] == sum(a > b for a, b in zip(ours, theirs, strict=True))
    assert record["chance"] == pytest.approx((0.5 + 0.25 + 0.25) / 3)


def test_experts_and_examples_are_in_the_record(done):
    record, _ = done
    layers = record["candidates"][0]["experts"]["layers"]
    assert len(layers) == 3 and sum(layers[0]["tokens"]) == 4 * record["candidates"][0]["experts"]["tokens"]
    assert 0 < layers[0]["error_clean"] < 0.1 < record["candidates"][1]["experts"]["layers"][0]["error_clean"]
    assert [e["prompt"] for e in record["baseline"]["examples"]] == ["What is the sea?"]


# --- the cache


def test_a_second_run_computes_nothing_and_says_the_same(done, made, settings, monkeypatch):
    record, dest = done

    def forbidden(*args):
        raise AssertionError("computed again")

    for name in ("predicting_states", "compare_experts", "answer", "run_tasks"):
        monkeypatch.setattr(comparison, name, forbidden)
    again = run(made, settings, dest)
    changing = ("created", "seconds", "machine")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in record.items() if k not in changing
    }


def test_another_candidate_computes_only_its_own_part(done, made, settings, tmp_path):
    dest = shutil.copytree(done[1], tmp_path / "again")
    shutil.rmtree(dest / "cache" / comparison.__version__ / fingerprint(Checkpoint(made["halves"]))[:16])
    begun = []

    def start(what, steps):
        begun.append(what)
        return lambda: None

    again = run(made, settings, dest, start)
    assert begun and not [what for what in begun if not what.startswith(("halves:", "experts"))]
    for key in ("texts", "tasks", "tasks_overall", "experts", "verdict"):
        assert again["candidates"][1][key] == done[0]["candidates"][1][key], key


def test_the_hash_is_of_the_content(made, tmp_path):
    copy = shutil.copytree(made["base"], tmp_path / "copy")
    assert (
        fingerprint(Checkpoint(copy))
        == fingerprint(Checkpoint(made["base"]))
        != fingerprint(Checkpoint(made["halves"]))
    )


# --- wrong uses, all before any computation


def refused(made: dict[str, Path], settings: Settings, dest: Path, message: str) -> None:
    begun = []
    with pytest.raises(InputError, match=message):
        run(made, settings, dest, lambda what, steps: begun.append(what) or (lambda: None))
    assert not begun


def test_a_candidate_of_another_training_run_is_refused(made, settings, tiny, tmp_path):
    tiny.build(tmp_path / "other", intermediate_size=320)
    other = load_file(tmp_path / "other" / "model.safetensors")
    generator = torch.Generator().manual_seed(8)
    other["model.embed_tokens.weight"] = torch.randn(other["model.embed_tokens.weight"].shape, generator=generator)
    save_file(other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    wrong = {"base": made["base"], "int4": tmp_path / "other"}
    refused(wrong, settings, tmp_path, r"embed_tokens.weight is not the baseline's \(cosine -?0\.\d\d, .*--baseline")


def test_another_tokenizer_is_refused(made, settings, tmp_path):
    other = shutil.copytree(made["int4"], tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("<|start|>", "<|begin|>"), encoding="utf-8")
    refused(
        {"base": made["base"], "int4": other},
        settings,
        tmp_path,
        "its tokenizer differs from the baseline's in 2 entr",
    )


def test_other_sizes_are_refused(made, settings, tiny, tmp_path):
    tiny.build(tmp_path / "wide", intermediate_size=384)
    refused(
        {"base": made["base"], "int4": tmp_path / "wide"}, settings, tmp_path, "intermediate is 384, the baseline"
    )


def test_no_candidate_is_refused(made, settings, tmp_path):
    refused({"base": made["base"]}, settings, tmp_path, "no candidate")


# --- the verdict


def paired(difference: float, low: float, high: float, base: float = 0.6) -> dict:
    return {"difference": difference, "interval": [low, high], "items": 1500, "baseline_accuracy": base,
            "accuracy": base + difference}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tasks", "level"),
    [
        ((0.05, 0.9), paired(-0.004, -0.015, 0.007), "equivalent"),
        ((0.05, 0.9), paired(-0.015, -0.030, 0.000), "uncertain"),
        ((0.05, 0.9), paired(-0.050, -0.070, -0.030), "worse"),
        ((0.05, 0.9), None, "unmeasured"),
        ((1.50, 0.9), paired(0, -0.01, 0.01), "broken"),
        ((0.05, 0.3), None, "broken"),
        ((0.05, 0.9), paired(-0.200, -0.230, -0.170), "broken"),
        (None, paired(0.03, 0.02, 0.04), "equivalent"),
        # what no accuracy outvotes
        ((0.19, 0.9), paired(0.03, 0.02, 0.04), "worse"),
        ((0.05, 0.77), paired(0.03, 0.02, 0.04), "worse"),
        ((0.19, 0.77), None, "worse"),
        ((CEILING_KL, LEAST_TOP1), paired(0.03, 0.02, 0.04), "equivalent"),
        # nine items
        ((0.05, 0.9), paired(0.0, -0.01, 0.01) | {"items": 9}, "uncertain"),
        ((0.05, 0.9), paired(-0.5, -0.7, -0.3, base=0.9) | {"items": 9}, "broken"),
    ],
)
def test_verdicts(text, tasks, level):
    summary = None if text is None else {"kl_mean": text[0], "top1_agreement": text[1]}
    got, reasons = judge(summary, tasks, margin=0.02, chance=0.3)
    moved = text is not None and (text[0] > CEILING_KL or text[1] < LEAST_TOP1)
    few = tasks is not None and tasks["items"] == 9
    assert got == level and bool(reasons) == (level == "broken" or moved or few)
    entry = {
        "verdict": {"level": got, "reasons": reasons},
        "tasks_overall": tasks,
        "texts": [] if summary is None else [{"summary": summary}],
        "cost": {"bits_per_expert_weight": 4.25},
    }
    assert "4.25 bits" in sentence(entry, 0.02)


def test_a_rounded_checkpoint_on_nine_items_is_not_as_good():
    # no flip on nine items, KL 0.19: called "as good as the baseline" before
    tasks = compare_answers({"t": np.arange(9) < 5}, {"t": np.arange(9) < 5})
    assert judge({"kl_mean": 0.19, "top1_agreement": 0.77}, tasks, 0.02, 0.3)[0] == "worse"
    level, reasons = judge({"kl_mean": 0.03, "top1_agreement": 0.91}, tasks, 0.02, 0.3)
    assert level == "uncertain" and "at least 183 are needed" in reasons[0]


@pytest.mark.parametrize(("margin", "items"), [(0.02, 183), (0.01, 368), (0.05, 72)])
def test_the_least_number_of_items_is_that_of_the_exact_binomial(margin, items):
    # none of n items got worse: a loss of `margin` would have shown itself but for 2.5 %
    assert (1 - margin) ** items <= 0.025 < (1 - margin) ** (items - 1)
    assert least_items(margin) == items
    assert least_items(0) == 1


def test_the_worst_text_counts():
    texts = [{"summary": {"kl_mean": k, "top1_agreement": t}} for k, t in ((0.03, 0.8), (0.2, 0.9))]
    assert furthest(texts) == {"kl_mean": 0.2, "top1_agreement": 0.8} and furthest([]) is None


def test_a_task_that_fell_is_said_under_a_green_verdict():
    minus = "\N{MINUS SIGN}"
    alarm = fell([{"task": "gptoss_capitals", "difference": -0.067, "interval": [-0.12, -0.022], "p": 0.03}])
    assert alarm.startswith(f"ALARM: capitals fell by {minus}6.7 points [{minus}12.0, {minus}2.2]")
    entry = {
        "verdict": {"level": "equivalent", "reasons": [], "alarms": [alarm]},
        "tasks_overall": paired(-0.004, -0.015, 0.007),
        "texts": [],
        "cost": {"bits_per_expert_weight": 4.25},
    }
    assert sentence(entry, 0.02).startswith(f"as good as the baseline. {alarm}. 4.25 bits")
    assert fell([]) == ""


def test_alarms_and_warnings_are_in_the_record(done):
    record, _ = done
    # random weights predict nothing: perplexity near or above the vocabulary
    assert "above half of its vocabulary of 300" in record["suspect"]
    assert any(record["suspect"] in words for words in record["warnings"])
    for entry in record["candidates"]:
        assert entry["tasks_fallen"] == [] and entry["verdict"]["alarms"] == []


# --- what a pair does not have in common


def with_adapter_in_report(int4: Path, dest: Path, adapter: Path | None) -> Checkpoint:
    copy = Path(shutil.copytree(int4, dest))
    report = json.loads((copy / "quantization_report.json").read_text(encoding="utf-8"))
    report["settings"]["adapter"] = None if adapter is None else str(adapter)
    files = [] if adapter is None else sorted(adapter.glob("adapter_*"))
    report["settings"]["adapter_files"] = {p.name: [p.stat().st_size, 0] for p in files}
    (copy / "quantization_report.json").write_text(json.dumps(report), encoding="utf-8")
    return Checkpoint(copy)


def test_an_adapter_on_one_side_only_is_told(made, tiny, tmp_path):
    adapter = tiny.adapter(tmp_path / "adapter")
    plain, tuned = Checkpoint(made["base"]), Checkpoint(made["base"], Adapter.open(adapter))
    with_it = with_adapter_in_report(made["int4"], tmp_path / "with", adapter)
    without = with_adapter_in_report(made["int4"], tmp_path / "without", None)
    assert adapter_difference(plain, without) is None and adapter_difference(tuned, with_it) is None
    assert f"made with the adapter {adapter}" in adapter_difference(plain, with_it)
    assert "made without an adapter, and the baseline has" in adapter_difference(tuned, without)
    other = tmp_path / "moved"
    shutil.copytree(adapter, other)
    # the same files elsewhere are the same adapter; other files are another
    assert adapter_difference(Checkpoint(made["base"], Adapter.open(other)), with_it) is None
    settings = json.loads((with_it.path / "quantization_report.json").read_text(encoding="utf-8"))
    settings["settings"]["adapter_files"]["adapter_model.safetensors"][0] += 8
    (with_it.path / "quantization_report.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "made with another adapter" in adapter_difference(tuned, with_it)
    # nothing is known of a checkpoint without a report
    assert adapter_difference(tuned, Checkpoint(made["halves"])) is None
    assert pair_warnings(plain, with_it, "int4")[0].startswith("int4: it was made with the adapter")


def test_another_window_is_told(made, tmp_path):
    copy = Path(shutil.copytree(made["int4"], tmp_path / "window"))
    raw = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(raw | {"sliding_window": 15}), encoding="utf-8")
    base = Checkpoint(made["base"])
    assert pair_warnings(base, Checkpoint(copy), "x") == ["x: sliding_window is 15, the baseline's 16"]
    assert pair_warnings(base, Checkpoint(made["int4"]), "x") == []


def test_the_sentence_of_the_issue():
    entry = {
        "verdict": {"level": "equivalent", "reasons": []},
        "tasks_overall": paired(-0.004, -0.015, 0.007),
        "texts": [{"summary": {"kl_mean": 0.0327, "top1_agreement": 0.907}}],
        "cost": {"bits_per_expert_weight": 4.25},
    }
    minus = "\N{MINUS SIGN}"
    assert sentence(entry, 0.02) == (
        f"as good as the baseline. 4.25 bits per expert weight; "
        f"accuracy {minus}0.4 points [{minus}1.5, +0.7] on 1,500 "
        "items, inside the margin of 2; top-1 agreement 90.7 %, KL 0.0327 nats."
    )


# --- the files


def test_the_report_is_one_file_without_network_or_script(done):
    page = (done[1] / "report.html").read_text(encoding="utf-8")
    # a link that a reader may follow loads nothing; names of XML namespaces are no addresses
    loads = re.sub(r"<a href=\"[^\"]*\"", "", page.replace("xlink:href", "href"))
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']+""", loads), "loads something"
    assert '<a href="report.json">' in page
    assert "<script" not in page and "@import" not in page
    assert page.count("<svg") == 8 and len(page) < 2_000_000
    for section in ("verdict", "tasks", "tokens", "experts", "cost", "examples", "repeat"):
        assert f'id="{section}"' in page
    assert "BROKEN" in page and fingerprint_of(done) in page


def fingerprint_of(done: tuple[dict, Path]) -> str:
    return str(done[0]["candidates"][0]["sha256"])


def test_json_and_card(done):
    record, dest = done
    assert json.loads((dest / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    text = (dest / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: ") and "# int4" in text and "4.250 bits per expert weight" in text
    assert "gptoss_kinds" in text and "BROKEN" in text


def test_names_are_escaped(done):
    record = json.loads(json.dumps(done[0]))
    record["candidates"][0]["name"] = "<script>alert(1)</script>"
    page = render(record)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_without_tasks_experts_or_examples_the_report_is_still_one(made, settings, tmp_path):
    from dataclasses import replace

    bare = replace(settings, tasks=None, expert_tokens=0, prompts=(), noise_floor=False, texts=settings.texts[:1])
    record = run(made, bare, tmp_path)
    # the tiny model's rounding moves its predictions far: no tasks are needed to say so
    verdict = record["candidates"][0]["verdict"]
    assert verdict["level"] == "worse" and "which no accuracy outvotes" in verdict["reasons"][0]
    write_report(record, tmp_path)
    assert 'id="tasks"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def browse(*options: str) -> subprocess.CompletedProcess:
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--log-level=0",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(BROWSER is None, reason="no chromium; Debian has it as the package chromium")
def test_a_real_browser_shows_the_report(done, tmp_path):
    from PIL import Image

    page = (done[1] / "report.html").as_uri()
    shown = browse("--dump-dom", f"--user-data-dir={tmp_path / 'a'}", page)
    assert "CONSOLE" not in shown.stderr
    plots = re.findall(r"<svg.*?</svg>", shown.stdout, flags=re.DOTALL)
    assert len(plots) == 8 and all(plot.count("<path") + plot.count("<use") > 5 for plot in plots)
    colours = {}
    for name, scheme in (("light", "1"), ("dark", "0")):
        file = tmp_path / f"{name}.png"
        browse(f"--screenshot={file}", "--window-size=1100,1600", f"--user-data-dir={tmp_path / name}",
               f"--blink-settings=preferredColorScheme={scheme}", page)  # fmt: skip
        image = Image.open(file).convert("L")
        colours[name] = image.getpixel((3, 3))
        # text and plots, not an empty page
        assert len(image.resize((110, 160)).getcolors()) > 20
    assert colours["light"] > 240 and colours["dark"] < 60
