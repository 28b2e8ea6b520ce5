"""One reading of a folder: which files, config and template count for all that follows; ambiguity is refused."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import save_file

from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.runtimes.export_gguf import write_gguf
from gptoss_quantize.runtimes.stock import linked, stock_config, stock_model
from gptoss_quantize.tokenizer_files import side_files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# float32 sums in another order, logits of order 10
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture
def copy(tiny, tmp_path):
    """A private copy of the sharded bf16 checkpoint."""
    return tiny.copy("bf16", tmp_path / "model")


def refused(path, *words):
    with pytest.raises(InputError) as error:
        Checkpoint(path)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def transformers_agrees(checkpoint, tiny):
    """What transformers is handed predicts what we predict, to float32 rounding."""
    ids = tiny.ids(1)
    with torch.inference_mode():
        theirs = stock_model(checkpoint, torch.float32)(ids, use_cache=False).logits[0]
    ours = logits(hidden_states(checkpoint, ids)[0], checkpoint.head().float())
    torch.testing.assert_close(theirs, ours, **TOLERANCE)


def whole(path, tensors):
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / SINGLE, metadata={"format": "pt"})


def equal(checkpoint, tiny):
    expected = tiny.load_all(tiny.path("bf16"))
    assert set(checkpoint.names()) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


# ---- weight files


def no_index(path, tiny):
    (path / INDEX).unlink()


def one_of_one(path, tiny):
    tensors = tiny.load_all(path)
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()
    whole(path, tensors)
    (path / SINGLE).rename(path / "model-00001-of-00001.safetensors")


def another_name(path, tiny):
    one_of_one(path, tiny)
    (path / "model-00001-of-00001.safetensors").rename(path / "merged.safetensors")


def stale_index(path, tiny):
    tensors = tiny.load_all(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    whole(path, tensors)


def index_of_other_shards(path, tiny):
    """The index of an older save whose files are gone, beside a whole set of shards."""
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = {n: f.replace("of-00005", "of-00009") for n, f in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))


def stale_shards(path, tiny):
    for file in list(path.glob("*.safetensors")):
        changed = {n: t + 1 for n, t in tiny.load_all(path).items()}
        save_file(changed, path / file.name.replace("of-", "of-9"))
        break


def twice(path, tiny):
    whole(path, tiny.load_all(path))


USABLE = {
    f.__name__: (f, words)
    for f, words in (
        (no_index, "read without an index"),
        (one_of_one, "read without an index"),
        (another_name, ""),
        (stale_index, "names files that are not there"),
        (index_of_other_shards, "names files that are not there"),
        (stale_shards, "1 weight file(s) are not read"),
        (twice, "hold the same weights twice"),
    )
}


@pytest.mark.parametrize(("change", "words"), USABLE.values(), ids=USABLE)
def test_a_folder_that_means_one_model_is_read_and_it_is_said_how(copy, tiny, change, words):
    change(copy, tiny)
    checkpoint = Checkpoint(copy)
    equal(checkpoint, tiny)
    assert any(words in note for note in checkpoint.notes) or not words
    transformers_agrees(checkpoint, tiny)


def test_two_models_in_one_folder_are_refused_with_both(copy, tiny):
    tensors = tiny.load_all(copy)
    name = "model.layers.2.self_attn.sinks"
    whole(copy, tensors | {name: tensors[name] + 1})
    refused(copy, "two different models", INDEX, SINGLE, name)


def test_two_sets_of_shards_without_an_index(copy, tiny):
    (copy / INDEX).unlink()
    tensors = {n: t + 1 for n, t in tiny.load_all(copy).items()}
    save_file(tensors, copy / "model-00001-of-00001.safetensors")
    refused(copy, "two different models", "of-00001", "of-00005")


def test_shards_that_are_not_whole(copy):
    (copy / INDEX).unlink()
    (copy / "model-00003-of-00005.safetensors").unlink()
    refused(copy, "shard 3 of 5 is not", "no index")


def test_a_tensor_in_two_shards(copy, tiny):
    (copy / INDEX).unlink()
    tensors = tiny.load_all(copy)
    save_file(tensors, copy / "model-00003-of-00005.safetensors")
    refused(copy, "model-00003-of-00005.safetensors", "two models, or saved twice")


def test_pickles_adapters_and_both(copy, tiny, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(copy / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    refused(pickled, "pytorch_model.bin is a pickle", "convert")
    adapter = tiny.adapter(tmp_path / "adapter")
    refused(adapter, "is an adapter, not a model", "--adapter")
    shutil.copy(adapter / "adapter_config.json", copy)
    refused(copy, "a model", "and an adapter", "--adapter")


# ---- config


CONFIGS = {
    "top-k under its old name": ({"num_experts_per_tok": None, "experts_per_token": 1}, {"top_k": 1}),
    "experts under a new name": ({"num_local_experts": None, "num_experts": 8}, {"experts": 8}),
    "no window is used": (
        {"layer_types": ["full_attention"] * 3, "sliding_window": "NULL"},
        {"layer_types": ("full_attention",) * 3},
    ),
    "rope in old keys": (
        {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": "YARN"},
        {"max_positions": 128},
    ),
    "nulls are not given": (
        {"attention_bias": "NULL", "rms_norm_eps": "NULL", "use_cache": "NULL"},
        {"attention_bias": True},
    ),
    "head_dim null": ({"head_dim": "NULL"}, {"head_dim": 32}),
    "bitsandbytes left over": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {}),
    "mxfp4 left over": ({"quantization_config": {"quant_method": "mxfp4"}}, {}),
}


@pytest.mark.parametrize(("change", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_config_is_read_alike_by_transformers(copy, tiny, change, expected):
    raw = json.loads((copy / "config.json").read_text())
    yarn = {k: v for k, v in raw["rope_parameters"].items() if k != "rope_theta"}
    raw = {k: v for k, v in (raw | change).items() if v is not None}
    raw = {k: {"NULL": None, "YARN": yarn}.get(v, v) if isinstance(v, str) else v for k, v in raw.items()}
    (copy / "config.json").write_text(json.dumps(raw))
    checkpoint = Checkpoint(copy)
    assert {name: getattr(checkpoint.config, name) for name in expected} == expected
    assert "quantization_config" not in checkpoint.config.raw
    transformers_agrees(checkpoint, tiny)


def test_head_dim_that_is_not_written_is_64_as_in_transformers(tiny, tmp_path):
    tiny.build(tmp_path / "m", head_dim=64)
    tiny.edit_json(tmp_path / "m" / "config.json", head_dim=None)
    checkpoint = Checkpoint(tmp_path / "m")
    assert checkpoint.config.head_dim == 64
    transformers_agrees(checkpoint, tiny)


@pytest.mark.parametrize(
    "said", [None, {"quant_method": "bitsandbytes"}, {"quant_method": "gptq", "bits": 4}], ids=str
)
def test_mxfp4_experts_are_mxfp4_whatever_the_config_says(tiny, tmp_path, said):
    path = tiny.copy("mxfp4", tmp_path / "m")
    tiny.edit_json(path / "config.json", quantization_config=said)
    checkpoint = Checkpoint(path)
    assert checkpoint.expert_format == "mxfp4"
    assert checkpoint.config.raw["quantization_config"]["quant_method"] == "mxfp4"
    assert any("quantization_config" in note for note in checkpoint.notes)
    transformers_agrees(checkpoint, tiny)


AMBIGUOUS = {
    "two top-k": ({"experts_per_token": 2}, ("num_experts_per_tok is 4", "experts_per_token is 2")),
    "two numbers of experts": ({"num_experts": 4}, ("num_local_experts is 8", "num_experts is 4")),
    "window null": ({"sliding_window": "NULL"}, ("sliding_window is null", "layer_types")),
    "limit null": ({"swiglu_limit": "NULL"}, ("swiglu_limit is null",)),
    "two ropes": ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, ("factor 8.0", "4.0", "rope_parameters")),
    "two thetas": ({"rope_theta": 10000.0}, ("rope_theta is 10000.0", "5000.0")),
    "softcap": ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping is 30.0",)),
    "another activation": ({"hidden_act": "gelu"}, ("hidden_act is 'gelu'",)),
    "shared experts": ({"n_shared_experts": 1}, ("n_shared_experts is 1",)),
    "a number for each layer": ({"num_local_experts": [8, 8, 6]}, ("num_local_experts is a list",)),
}


@pytest.mark.parametrize(("change", "words"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_config_is_refused_with_both(copy, change, words):
    raw = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps({k: None if v == "NULL" else v for k, v in raw.items()}))
    refused(copy, "config.json", *words)


def test_keys_that_mean_nothing_are_left_alone(copy):
    raw = json.loads((copy / "config.json").read_text())
    raw |= {"unsloth_version": "2026.8", "experts_per_token": 4, "final_logit_softcapping": None, "my_note": 3}
    (copy / "config.json").write_text(json.dumps(raw))
    config = Checkpoint(copy).config
    assert config.raw["my_note"] == 3 and stock_config(config).num_experts_per_tok == 4


# ---- heads and rotary tables


def test_a_tied_model_with_a_stored_head(tiny, tmp_path):
    tiny.build(tmp_path / "tied", tie_word_embeddings=True)
    tensors = tiny.load_all(tmp_path / "tied")
    embed = tensors["model.embed_tokens.weight"]
    for head, tied in ((embed.clone(), True), (embed / 3, False)):
        path = tmp_path / f"stored-{tied}"
        shutil.copytree(tmp_path / "tied", path)
        whole(path, tensors | {"lm_head.weight": head})
        checkpoint = Checkpoint(path)
        assert checkpoint.config.tied is tied and checkpoint.config.raw["tie_word_embeddings"] is tied
        assert torch.equal(checkpoint.head(), head)
        assert any("the stored head counts" in note for note in checkpoint.notes) is not tied
        transformers_agrees(checkpoint, tiny)


def test_a_head_that_is_missing_is_not_invented(copy, tiny):
    tensors = {n: t for n, t in tiny.load_all(copy).items() if n != "lm_head.weight"}
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    whole(copy, tensors)
    refused(copy, "lm_head.weight is missing", "set tie_word_embeddings true")


@pytest.mark.parametrize("right", [True, False])
def test_stored_rotary_tables_do_not_count(copy, tiny, right):
    from gptoss_quantize.config import rope_frequencies

    tensors = tiny.load_all(copy)
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    table = rope_frequencies(Checkpoint(tiny.path("bf16")).config)[0]
    whole(copy, tensors | {"model.rotary_emb.inv_freq": table.bfloat16() if right else torch.ones(16)})
    checkpoint = Checkpoint(copy)
    equal(checkpoint, tiny)
    assert any("other frequencies" in note for note in checkpoint.notes) is not right


# ---- tokenizer and template


def templates(path, jinja=None, inside=None, **more):
    """Put templates into a folder: chat_template.jinja, tokenizer_config.json, additional_chat_templates/."""
    (path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(
        json.dumps(settings | ({} if inside is None else {"chat_template": inside}))
    )
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    for name, text in more.items():
        (path / "additional_chat_templates").mkdir(exist_ok=True)
        (path / "additional_chat_templates" / f"{name}.jinja").write_text(text)


CASES = {
    "in the config": ({"inside": "A{{ messages[0].content }}"}, "A{{ messages[0].content }}", ""),
    "two": ({"jinja": "B", "inside": "A"}, "B", "different chat templates"),
    "two equal": ({"jinja": "A", "inside": "A"}, "A", ""),
    "additional": ({"jinja": "B", "inside": "A", "tool_use": "T"}, "B", "different chat templates"),
    "list in the config": (
        {"inside": [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]},
        "D",
        "",
    ),
    "none": ({}, None, ""),
}


@pytest.mark.parametrize(("files", "expected", "note"), CASES.values(), ids=CASES)
def test_one_template_for_tokenizer_gguf_and_copies(copy, tmp_path, files, expected, note):
    templates(copy, **files)
    checkpoint = Checkpoint(copy)
    assert any(note in n for n in checkpoint.notes) if note else checkpoint.notes == []
    tokenizer = load_tokenizer(copy)
    assert (None if tokenizer.chat_template is None else tokenizer.get_chat_template()) == expected
    write_gguf(checkpoint, tmp_path / "m.gguf", name="m")
    field = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.chat_template")
    assert (None if field is None else field.contents()) == expected
    (tmp_path / "copy").mkdir()
    checkpoint.side.write(tmp_path / "copy")
    again = side_files(tmp_path / "copy")
    assert again.template == checkpoint.side.template and again.notes == ()


def test_named_templates_reach_the_copy(copy, tmp_path):
    templates(copy, jinja="B", tool_use="T")
    (tmp_path / "copy").mkdir()
    Checkpoint(copy).side.write(tmp_path / "copy")
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.get_chat_template() == "B" and tokenizer.get_chat_template(tools=[{"x": 1}]) == "T"


def test_no_default_among_several(copy):
    templates(copy, tool_use="T", rag="R")
    with pytest.raises(InputError, match=r"chat templates rag, tool_use, and none is the default"):
        load_tokenizer(copy)


def test_a_processors_template_is_not_read_and_it_is_said(copy):
    templates(copy)
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    assert load_tokenizer(copy).chat_template is None
    assert any("chat_template.json is for processors" in note for note in Checkpoint(copy).notes)


def test_files_without_a_choice_are_copied_byte_for_byte(tiny, tmp_path):
    (tmp_path / "copy").mkdir()
    path = tiny.path("bf16")
    Checkpoint(path).side.write(tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        assert file.read_bytes() == (path / file.name).read_bytes()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        p.name for p in (tmp_path / "copy").iterdir()
    }


# ---- what others get


def test_a_folder_for_others_holds_what_was_read_and_nothing_else(copy, tiny):
    stale_shards(copy, tiny)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    checkpoint = Checkpoint(copy)
    with linked(checkpoint) as folder:
        names = {p.name for p in folder.iterdir()}
        assert not any("of-9" in name or name.endswith(".bin") for name in names)
        equal(Checkpoint(folder), tiny)


def test_transformers_is_refused_a_config_it_reads_otherwise(copy):
    config = Checkpoint(copy).config
    del config.raw["num_experts_per_tok"]
    config.raw["experts_per_token"] = 2
    object.__setattr__(config, "top_k", 2)
    with pytest.raises(InputError, match="transformers reads top_k as 4, we read 2"):
        stock_config(config)
