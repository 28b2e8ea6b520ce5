"""Our models in lm-eval: the answers of `compare`, batches, chat templates, texts; options that do nothing."""

import logging

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import lm_models, suite
from gptoss_quantize.eval.lm import StreamedLM
from gptoss_quantize.eval.tasks import TaskSettings, run_tasks
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

NAMES = ("gptoss_agreement", "gptoss_kinds")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    lm_models.register()


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Return kind -> directory: int4, int4 with 8-bit attention, and what they were made of."""
    root = tmp_path_factory.mktemp("models")
    for name, dense in (("int4", "source"), ("int8", "int8")):
        job = Job(dest=root / name, method="rtn", recipe=RECIPES["rtn"], dense=dense)
        quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    return {"int4": root / "int4", "int8": root / "int8", "bf16": tiny.path("bf16"), "mxfp4": tiny.path("mxfp4")}


def by_lm_eval(tmp_path, model: str, path, *, chat: bool = False, batch_size: int = 1, limit: int = 8):
    """What lm-eval finds by name: (results, samples)."""
    suite.export(tmp_path / "tasks")
    found = simple_evaluate(
        model=model,
        model_args={"pretrained": str(path), "dtype": "float32"},
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        limit=limit,
        batch_size=batch_size,
        device="cpu",
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    return found["results"], found["samples"]


def chosen(samples) -> dict[str, list[list[float]]]:
    """Log-probabilities of every choice of every item."""
    return {
        name: [[float(answer[0][0]) for answer in row["resps"]] for row in sorted(rows, key=lambda r: r["doc_id"])]
        for name, rows in samples.items()
    }


@pytest.mark.parametrize(
    ("kind", "chat"), [("int4", False), ("int4", True), ("int8", True), ("bf16", False), ("mxfp4", False)]
)
def test_accuracies_are_those_of_compare(models, tmp_path, kind, chat):
    settings = TaskSettings(names=NAMES, limit=8, apply_chat_template=chat)
    path = models[kind]
    ours = run_tasks(StreamedLM(Checkpoint(path), load_tokenizer(path)), settings)
    whole, samples = by_lm_eval(tmp_path, "gptoss-int4", path, chat=chat, batch_size=4)
    streamed, other = by_lm_eval(tmp_path, "gptoss-streamed", path, chat=chat)
    for name in NAMES:
        exact = ours[name]["metrics"]["acc,none"]
        assert whole[name]["acc,none"] == streamed[name]["acc,none"] == exact
        for rows in (samples[name], other[name]):
            assert [int(r["acc"]) for r in sorted(rows, key=lambda r: r["doc_id"])] == ours[name]["right"]
    for name, values in chosen(samples).items():
        for got, exact in zip(values, chosen(other)[name], strict=True):
            assert got == pytest.approx(exact, abs=2e-3)
    assert 0 < sum(sum(ours[name]["right"]) for name in NAMES) < 16


def generated(model, *texts: str) -> list[str]:
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    return model.generate_until([Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)])


def test_texts_in_batches_are_those_of_one_at_a_time(models):
    texts = ("The sea was", "The ships that passed before the rain came", "Rain", "The lighthouse")
    path = str(models["int4"])
    one = generated(lm_models.PackedLM(path, dtype="float32", device="cpu"), *texts)
    assert generated(lm_models.PackedLM(path, dtype="float32", device="cpu", batch_size=4), *texts) == one
    assert generated(lm_models.StreamedModel(path, batch_size=2), *texts) == one
    assert len(set(one)) > 1


def test_a_forgotten_chat_template_is_told(models, caplog):
    model = lm_models.PackedLM(str(models["int4"]), device="cpu")
    with caplog.at_level(logging.WARNING, "lm_eval"):
        generated(model, "The sea")
        assert "add --apply_chat_template" in caplog.text
        caplog.clear()
        assert model.chat_template(True)
        generated(model, "The sea")
        assert "add --apply_chat_template" not in caplog.text


def test_the_date_of_a_template_is_fixed(models, tiny, tmp_path):
    path = tiny.copy("bf16", tmp_path / "dated")
    for file in path.glob("*chat_template*"):
        file.unlink()
    tiny.edit_json(
        path / "tokenizer_config.json", chat_template="{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    )
    model = lm_models.PackedLM(str(path), device="cpu")
    assert model.apply_chat_template([{"role": "user", "content": "Hello"}]) == "2025-08-05 Hello"
    assert (
        StreamedLM(Checkpoint(path), load_tokenizer(path)).apply_chat_template([{"role": "user", "content": "Hello"}])
        == "2025-08-05 Hello"
    )


@pytest.mark.parametrize("model", lm_models.MODELS.values())
def test_what_would_have_no_effect_is_refused(models, tiny, tmp_path, model):
    path = str(models["int4"])
    with pytest.raises(InputError, match=r"--model_args autogptq: not known here; expected pretrained.*--model hf"):
        model(path, autogptq=True)
    with pytest.raises(InputError, match=r"dtype=int4: expected auto, float32"):
        model(path, dtype="int4")
    with pytest.raises(InputError, match="cannot be merged into int4"):
        model(path, peft=str(tiny.adapter(tmp_path / "adapter")))
    with pytest.raises(InputError, match="--device cuda"):
        model(path, device="cuda")
    with pytest.raises(InputError, match=r"/no/where: no such directory"):
        model("/no/where")


@pytest.mark.parametrize("model", lm_models.MODELS.values())
def test_a_missing_chat_template_is_refused(tiny, tmp_path, model):
    path = tiny.copy("bf16", tmp_path / "plain")
    for file in path.glob("*chat_template*"):
        file.unlink()
    tiny.edit_json(path / "tokenizer_config.json", chat_template=None)
    with pytest.raises(InputError, match=r"no chat template.*leave --apply_chat_template out"):
        model(str(path)).chat_template(True)


def test_an_adapter_is_merged(tiny, tmp_path):
    adapter = tiny.adapter(tmp_path / "adapter")
    plain = lm_models.PackedLM(str(tiny.path("bf16")), dtype="float32", device="cpu").model
    merged = lm_models.PackedLM(str(tiny.path("bf16")), peft=str(adapter), dtype="float32", device="cpu").model
    ids = tiny.ids(1)
    with torch.inference_mode():
        assert not torch.allclose(plain(ids).logits, merged(ids).logits)


def test_what_does_not_fit_goes_layer_by_layer(tiny, monkeypatch):
    monkeypatch.setattr(lm_models, "too_large", lambda *args, **kwargs: "needs 42.0 GiB whole, 7.0 GiB are free")
    with pytest.raises(InputError, match=r"42.0 GiB.*--model gptoss-streamed"):
        lm_models.PackedLM(str(tiny.path("bf16")))


def test_what_is_written_beside_results(models):
    facts = lm_models.PackedLM(str(models["int4"]), device="cpu", dtype="float32").get_model_info()
    assert facts["model_dtype"] == torch.float32 and facts["model_revision"] == "main" and facts["model_sha"] == ""
    assert facts["model_num_parameters"] > 0 and "int4" in facts["model_experts"]
