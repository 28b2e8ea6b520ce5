"""save_pretrained of a packed model: loaded again, the same logits bit for bit, changed or not; or refused."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GptOssForCausalLM

import gptoss_quantize as gq
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Return a function from (dense, tied) to an int4 directory, each made once."""
    root, found = tmp_path_factory.mktemp("int4"), {}

    def make(dense="source", tied=False):
        key = f"{dense}-{tied}"
        if key not in found:
            source = tiny.path("bf16")
            if tied:
                tiny.build(root / "source-tied", tie_word_embeddings=True)
                source = root / "source-tied"
            job = Job(dest=root / key, method="rtn", recipe=RECIPES["rtn"], dense=dense)
            quantize_checkpoint(Checkpoint(source), job, None)
            found[key] = root / key
        return found[key]

    return make


def logits(model, ids) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("dense", "tied"), [("source", False), ("source", True), ("int8", False), ("int8", True)])
def test_saved_and_loaded_is_the_same(made, tiny, tmp_path, dense, tied, dtype):
    path, ids = made(dense, tied), tiny.ids(2)
    model = gq.load(path, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = gq.load(tmp_path / "saved", dtype=dtype)
    assert torch.equal(logits(again, ids), logits(model, ids))
    # nothing was changed, so the tensors are those of the first directory, bit for bit, and so are all small files
    one, other = Checkpoint(path), Checkpoint(tmp_path / "saved")
    assert one.names() == other.names()
    # float32 weights (the tied model's) that were loaded in bfloat16 are saved as they were loaded
    rounded = tied and dtype == torch.bfloat16
    assert rounded or all(torch.equal(one.read(name), other.read(name)) for name in one.names())
    for file in path.iterdir():
        if file.suffix != ".safetensors" and file.name[0] != "." and file.name not in NEW:
            assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((tmp_path / "saved" / "quantization_report.json").read_text())["changed"] == []


NEW = ("quantization_report.json", "gptoss-int4.safetensors.index.json", "README.md")


def test_what_was_changed_is_saved(made, tiny, tmp_path):
    ids = tiny.ids(2)
    model = gq.load(made())
    before = logits(model, ids)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0123456)
        model.model.layers[1].mlp.router.bias.add_(0.5)
        model.model.layers[0].self_attn.q_proj.weight[3].zero_()
    model.generation_config.max_new_tokens = 7
    changed = logits(model, ids)
    assert not torch.equal(before, changed)
    model.save_pretrained(str(tmp_path / "saved"))
    again = gq.load(tmp_path / "saved")
    assert torch.equal(logits(again, ids), changed)
    # bfloat16 has too few bits for the norm
    assert Checkpoint(tmp_path / "saved").info("model.norm.weight").dtype == torch.float32
    assert Checkpoint(tmp_path / "saved").info("lm_head.weight").dtype == torch.bfloat16
    assert again.generation_config.max_new_tokens == 7
    assert json.loads((tmp_path / "saved" / "quantization_report.json").read_text())["changed"] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.router.bias",
        "model.norm.weight",
    ]
    assert "changed after that, and saved: 3 tensor(s)" in (tmp_path / "saved" / "README.md").read_text()
    # and once more from there, as other tools read it: every expert with its codes
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(gq.load(tmp_path / "twice"), ids), changed)
    gq.export(tmp_path / "twice", tmp_path / "bf16", "bf16", dtype="float32")


def test_stacked_experts_are_saved_too(made, tiny, tmp_path):
    # as on a card, where nothing is mapped
    model = gq.load(made())
    for layer in model.model.layers:
        layer.mlp.experts._put(layer.mlp.experts.experts().stack())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(gq.load(tmp_path / "saved"), tiny.ids(1)), logits(gq.load(made()), tiny.ids(1)))


# PEFT asks for what transformers has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_what_has_no_place_is_refused(made, tiny, tmp_path):
    path, dest = made(), tmp_path / "saved"
    model = gq.load(path)
    refused(lambda: model.save_pretrained(path), "holds the input", "another place")
    refused(lambda: model.save_pretrained(dest, state_dict={}), "state_dict")
    refused(lambda: model.save_pretrained(dest, push_to_hub=True), "push_to_hub", "gptoss_quantize.push")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    refused(lambda: model.save_pretrained(dest), "q_proj", "merge it before quantizing (--adapter)")
    model = gq.load(path)
    model.resize_token_embeddings(320)
    refused(lambda: model.save_pretrained(dest), "model.embed_tokens.weight", "has shape [320, 192]", "quantize that")
    model = gq.load(path)
    model.model.layers[2].mlp.experts = GptOssForCausalLM(model.config).model.layers[2].mlp.experts
    refused(lambda: model.save_pretrained(dest), "model.layers.2.mlp.experts is GptOssExperts")
    model = gq.load(made("int8"))
    model.lm_head = torch.nn.Linear(192, 300, bias=False)
    refused(lambda: model.save_pretrained(dest), "lm_head is Linear, was 8-bit")
    model = gq.load(made(tied=True))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    refused(lambda: model.save_pretrained(dest), "lm_head is no longer the embedding")
    assert not dest.exists() and not dest.with_name("saved.partial").exists()


def test_every_file_has_the_permissions_of_the_umask(tiny, tmp_path):
    """A server of another user can read what was written; under a strict umask nobody else can."""
    source = tiny.copy("bf16", tmp_path / "source")
    for file in source.iterdir():
        # what is copied gets the permissions of a new file, not those that it had
        file.chmod(0o600)
    code = """
import os, sys
os.umask(int(sys.argv[2], 8))
import gptoss_quantize as gq
from pathlib import Path
place, source = Path(sys.argv[1]), Path(sys.argv[1]).parent / "source"
gq.quantize(source, place / "int4", "rtn")
gq.quantize(source, place / "mxfp4", "rtn", "mxfp4")
gq.load(place / "int4").save_pretrained(place / "saved")
for to in ("gguf", "bf16", "autogptq"):
    gq.export(place / "int4", place / to, to)
gq.import_checkpoint(place / "autogptq", place / "imported", split="interleaved")
gq.compare(place / "int4", source, place / "report", tasks="none", text_tokens=96, seq_len=48, expert_tokens=0,
           examples=0, model_card=True)
"""
    for umask, file_mode, folder_mode in (("022", 0o644, 0o755), ("077", 0o600, 0o700)):
        place = tmp_path / umask
        place.mkdir()
        subprocess.run([sys.executable, "-c", code, str(place), umask], check=True, capture_output=True, text=True)
        found = list(place.rglob("*"))
        assert len(found) > 60
        wrong = [
            (str(path.relative_to(place)), oct(path.stat().st_mode & 0o777))
            for path in found
            if path.stat().st_mode & 0o777 != (folder_mode if path.is_dir() else file_mode)
        ]
        assert not wrong
    card = (tmp_path / "022" / "int4" / "README.md").read_text()
    assert "| this |" not in card and "KL mean" in card and "Not measured yet" not in card
