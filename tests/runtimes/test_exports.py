"""Every export target: read back, loaded by others, refused where it must be, whole or absent."""

import json
import shutil

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM

from gptoss_quantize import api
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import dense_shapes
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.model_card import EXPORT_REPORT
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.runtimes import readback, staging
from gptoss_quantize.runtimes.export_gguf import yarn_attention_factor
from gptoss_quantize.runtimes.exports import GGUF_NAME, WRITERS, export_checkpoint
from gptoss_quantize.runtimes.gguf_vocab import PRE_TOKENIZERS, PROBE, recognise

INT4_TARGETS = ("gguf", "bf16", "autogptq", "autogptq-v2", "autoawq")


def export(path, dest, to, **settings):
    return export_checkpoint(Checkpoint(path), dest, to, **settings)


def fields(path):
    """Metadata of a GGUF file, name -> value."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("to", INT4_TARGETS)
def test_every_target_of_int4_reads_back_equal_and_says_so(int4_path, tmp_path, to, group_size):
    report = export(int4_path(group_size), tmp_path / "out", to)
    assert report["read_back"] == {"different": 0, "first": []}
    assert json.loads((tmp_path / "out" / EXPORT_REPORT).read_text()) == report
    assert not list(tmp_path.glob("*.partial"))
    if to != "gguf":
        assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_targets_are_the_ones_tested_here_and_mxfp4():
    assert set(WRITERS) == {*INT4_TARGETS, "mxfp4"}


@pytest.mark.parametrize(
    ("kind", "expert_type", "expected"),
    [
        ("int4", "stored", Ggml.Q4_0),
        ("mxfp4", "stored", Ggml.MXFP4),
        ("bf16", "stored", Ggml.BF16),
        ("float32", "stored", Ggml.F32),
        ("bf16", "q8_0", Ggml.Q8_0),
        ("int4", "f32", Ggml.F32),
    ],
)
def test_gguf_holds_the_experts_as_stored_or_as_asked(tiny, int4_path, tmp_path, kind, expert_type, expected):
    source = int4_path() if kind == "int4" else tiny.path(kind)
    dense_type = "q8_0" if expert_type == "q8_0" else "stored"
    export(source, tmp_path / "out", "gguf", expert_type=expert_type, dense_type=dense_type)
    path = tmp_path / "out" / GGUF_NAME
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    kinds = {t.tensor_type for name, t in tensors.items() if name.endswith("exps.weight")}
    assert kinds == {expected}
    # what ggml asks to be F32, and the shapes in its order
    narrow = ("_norm.weight", ".bias", "sinks.weight", "ffn_gate_inp.weight")
    assert {t.tensor_type for name, t in tensors.items() if name.endswith(narrow)} == {Ggml.F32}
    assert tensors["blk.1.ffn_gate_exps.weight"].shape.tolist() == [192, 320, 8]
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [320, 192, 8]
    assert tensors["blk.1.ffn_up_exps.bias"].shape.tolist() == [320, 8]
    assert len(tensors) == 3 + 3 * 19
    assert (tmp_path / "out" / "Modelfile").read_text() == f"FROM ./{GGUF_NAME}\n"


def test_gate_and_up_are_the_even_and_the_odd_columns(tiny, tmp_path):
    export(tiny.path("float32"), tmp_path / "out", "gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / GGUF_NAME).tensors}
    fused = tiny.load_all(tiny.path("float32"))["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(torch.from_numpy(tensors["blk.2.ffn_gate_exps.weight"].data.copy()), fused[..., ::2].mT)
    assert torch.equal(torch.from_numpy(tensors["blk.2.ffn_up_exps.weight"].data.copy()), fused[..., 1::2].mT)


def test_gguf_metadata_says_what_the_config_says(tiny, int4_path, tmp_path):
    export(int4_path(), tmp_path / "out", "gguf")
    found = fields(tmp_path / "out" / GGUF_NAME)
    expected = {
        "general.architecture": "gpt-oss",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "gpt-oss.block_count": 3,
        "gpt-oss.context_length": 128,
        "gpt-oss.embedding_length": 192,
        "gpt-oss.expert_feed_forward_length": 320,
        "gpt-oss.expert_count": 8,
        "gpt-oss.expert_used_count": 4,
        "gpt-oss.attention.head_count": 6,
        "gpt-oss.attention.head_count_kv": 2,
        "gpt-oss.attention.key_length": 32,
        "gpt-oss.attention.sliding_window": 16,
        "gpt-oss.rope.freq_base": 5000.0,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 4.0,
        "gpt-oss.rope.scaling.original_context_length": 32,
        "gpt-oss.rope.scaling.yarn_beta_fast": 4.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found[name] for name in expected} == expected
    assert "<|message|>" in found["tokenizer.chat_template"]
    tokenizer = Tokenizer.from_file(str(int4_path() / "tokenizer.json"))
    tokens = found["tokenizer.ggml.tokens"]
    assert [tokenizer.token_to_id(token) for token in tokens[: tokenizer.get_vocab_size()]] == list(
        range(tokenizer.get_vocab_size())
    )
    types = found["tokenizer.ggml.token_type"]
    assert types[1] == gguf.TokenType.CONTROL and types[20] == gguf.TokenType.NORMAL
    # the tokenizer ends before the vocabulary
    assert len(tokens) == tiny.vocab and tokens[-1] == "[PAD299]" and types[-1] == gguf.TokenType.UNUSED


@pytest.mark.parametrize("given", [None, 1.5])
def test_an_attention_factor_reaches_llama_cpp_as_a_quotient(tiny, tmp_path, given):
    source = tiny.copy("bf16", tmp_path / "model")
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    tiny.edit_json(
        source / "config.json", rope_parameters=rope | ({} if given is None else {"attention_factor": given})
    )
    export(source, tmp_path / "out", "gguf")
    factor = fields(tmp_path / "out" / GGUF_NAME).get("gpt-oss.rope.scaling.attn_factor")
    assert factor == (None if given is None else pytest.approx(given / yarn_attention_factor(4.0)))


def test_a_tied_model_gets_its_head_and_a_model_without_attention_biases_zeros(tiny, tmp_path):
    tiny.build(tmp_path / "model", tie_word_embeddings=True, attention_bias=False)
    export(tmp_path / "model", tmp_path / "out", "gguf")
    file = readback.GgufFile(tmp_path / "out" / GGUF_NAME)
    assert torch.equal(file.read("output.weight"), file.read("token_embd.weight"))
    for name in ("q", "k", "v", "output"):
        assert not file.read(f"blk.0.attn_{name}.bias").any()


# --- what the Hugging Face targets mean to transformers


@pytest.mark.parametrize(("dtype", "exact"), [("float16", True), ("bfloat16", False)])
def test_transformers_gives_our_logits_from_a_dequantized_export(tiny, int4_path, tmp_path, dtype, exact):
    checkpoint = Checkpoint(int4_path())
    report = export(int4_path(), tmp_path / "out", "bf16", dtype=dtype)
    assert (report["rounded_weights"] == 0) == exact
    assert report["largest_relative_rounding"] <= (0 if exact else 2.0**-8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype and "quantization_config" not in config and "gptoss_quantize" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tiny.ids(2, 24)
    # bf16 rounds weights: the reference is the export itself
    reference = checkpoint if exact else Checkpoint(tmp_path / "out")
    expected = logits(hidden_states(reference, ids), reference.head().float())
    with torch.inference_mode():
        got = model(ids).logits
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_mxfp4_is_copied_bit_for_bit(tiny, tmp_path):
    export(tiny.path("mxfp4"), tmp_path / "out", "mxfp4")
    before, after = tiny.load_all(tiny.path("mxfp4")), tiny.load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    )


def test_legacy_configs_name_the_layout_and_the_split(int4_path, tmp_path):
    for to, method, layout in (
        ("autogptq", "gptq", "gptq"),
        ("autogptq-v2", "gptq", "gptq_v2"),
        ("autoawq", "awq", 0),
    ):
        export(int4_path(32), tmp_path / to, to)
        config = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["bits"], config["group_size"]) == (method, 4, 32)
        assert config.get("checkpoint_format", 0) == layout
        assert config["meta"]["gate_up_split"] == "interleaved"
        # stock transformers must find no model.safetensors to fill with random experts
        assert not list((tmp_path / to).glob("model*.safetensors*"))


# --- damage, refusals, whole or absent


def test_a_changed_byte_is_found_and_named(int4_path, tmp_path):
    export(int4_path(), tmp_path / "out", "gguf")
    path = tmp_path / "out" / GGUF_NAME
    reader = gguf.GGUFReader(path)
    places = {t.name: t.data_offset for t in reader.tensors}
    del reader
    data = bytearray(path.read_bytes())
    for name in ("blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight", "blk.2.ffn_down_exps.bias"):
        data[places[name] + 1] ^= 0x11
    path.write_bytes(data)
    found = readback.summary(readback.gguf_differences(Checkpoint(int4_path()), path))
    assert found == {"different": 3, "first": ["blk.0.attn_q.weight", "blk.1 expert 0", "blk.2 expert 0"]}


def test_a_difference_on_reading_back_stops_the_export(int4_path, tmp_path, monkeypatch):
    monkeypatch.setattr(readback, "gguf_differences", lambda *_: iter(["blk.0 expert 1"]))
    with pytest.raises(RuntimeError, match=r"1 tensors read back differ.*blk.0 expert 1"):
        export(int4_path(), tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_nothing_stands_anywhere_when_writing_fails(int4_path, tmp_path, monkeypatch):
    real, calls = staging.write_chunks, []

    def full(file, entry, nbytes):
        calls.append(entry.name)
        if len(calls) == 30:
            raise OSError(28, "No space left on device")
        real(file, entry, nbytes)

    monkeypatch.setattr(staging, "write_chunks", full)
    with pytest.raises(InputError, match=r"writing failed.*No space left.*free some space"):
        export(int4_path(), tmp_path / "out", "bf16")
    assert len(calls) == 30 and not list(tmp_path.iterdir())


def test_an_existing_name_is_kept_unless_it_is_an_export_to_be_replaced(int4_path, tmp_path):
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "precious").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"already exists|does not delete"):
            export(int4_path(), dest, "bf16", overwrite=overwrite)
    shutil.rmtree(dest)
    export(int4_path(), dest, "bf16")
    export(int4_path(), dest, "gguf", overwrite=True)
    assert (dest / GGUF_NAME).is_file() and not (dest / "config.json").exists()
    with pytest.raises(InputError, match="holds the input"):
        export(int4_path(), int4_path().parent, "gguf", overwrite=True)


def test_a_scale_that_float16_cannot_hold_is_refused_with_the_way_out(int4_path, tmp_path):
    source = shutil.copytree(int4_path(), tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.w2_weight_scale"
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][5, 0] = 2.0**-30
            save_file(tensors, file, metadata={"format": "pt"})
    for to in ("gguf", "autogptq", "autoawq"):
        with pytest.raises(InputError, match=rf"1 of \d+ scales of {name}.*float16.*--to bf16"):
            export(source, tmp_path / to, to)
    export(source, tmp_path / "bf16", "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types do not alternate"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_refused(tiny, tmp_path, change, message):
    source = tiny.copy("bf16", tmp_path / "model")
    tiny.edit_json(source / "config.json", **change)
    with pytest.raises(InputError, match=message):
        export(source, tmp_path / "out", "gguf")


def test_formats_that_do_not_fit_are_refused(tiny, int4_path, tmp_path):
    with pytest.raises(InputError, match=r"its experts are int4.*second rounding"):
        export(int4_path(), tmp_path / "out", "mxfp4")
    for to in ("autogptq", "autoawq"):
        with pytest.raises(InputError, match="its experts are float, not int4"):
            export(tiny.path("bf16"), tmp_path / "out", to)


# --- the pre-tokenizer


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_known_pre_tokenizer_is_recognised_and_cuts_the_probe_its_own_way(tiny, name):
    tokenizer = Tokenizer.from_file(str(tiny.path("bf16") / "tokenizer.json"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    assert recognise(tokenizer, tiny.path("bf16")) == name
    cuts = {other: tuple(PRE_TOKENIZERS[other].pre_tokenize_str(PROBE)) for other in PRE_TOKENIZERS}
    assert len(set(cuts.values())) == len(PRE_TOKENIZERS)


def test_the_form_of_gpt_oss_tokenizer_json_is_recognised(tiny):
    # the same words, said with "removed" and "inverted" instead of "isolated"
    tokenizer = Tokenizer.from_file(str(tiny.path("bf16") / "tokenizer.json"))
    pattern = json.loads(PRE_TOKENIZERS["gpt-4o"].__getstate__())["pretokenizers"][0]["pattern"]["Regex"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert recognise(tokenizer, tiny.path("bf16")) == "gpt-4o"


def test_an_unknown_pre_tokenizer_is_refused_not_guessed(tiny, tmp_path):
    source = tiny.copy("bf16", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(InputError, match="cuts text like none of gpt-4o"):
        export(source, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_all_dense_tensors_have_a_gguf_name_of_their_own(tiny):
    from gptoss_quantize.runtimes.export_gguf import gguf_name

    names = [gguf_name(name) for name in dense_shapes(Checkpoint(tiny.path("bf16")).config)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("to", ["gguf", "bf16", "autoawq"])
def test_dense_matrices_in_int8_are_exported_with_their_codes(tiny, tmp_path, to):
    job = Job(dest=tmp_path / "int8", method="rtn-signed", recipe=RECIPES["rtn-signed"], group_size=64, dense="int8")
    quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    report = export(tmp_path / "int8", tmp_path / "out", to)
    assert report["read_back"]["different"] == 0
    if to == "gguf":
        tensors = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "out" / GGUF_NAME).tensors}
        assert {tensors[name] for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")} == {
            Ggml.Q8_0
        }


def test_quantize_looks_at_what_it_wrote(tiny, tmp_path):
    name = "model.norm.weight"

    def damage(phase: str, done: int, total: int) -> None:
        # the disk, after the outer shard was written
        if done == total:
            (file,) = (f for f in (tmp_path / "out.partial").glob("*.safetensors") if name in load_file(f))
            tensors = load_file(file)
            tensors[name][7] += 1
            save_file(tensors, file, metadata={"format": "pt"})

    api.quantize(tiny.path("bf16"), tmp_path / "whole", "rtn-signed")
    with pytest.raises(RuntimeError, match=r"1 tensors outside the experts.*model\.norm\.weight"):
        api.quantize(tiny.path("bf16"), tmp_path / "out", "rtn-signed", progress=damage)
