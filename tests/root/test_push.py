"""To the hub and back, against a stand-in on this machine: what is sent, resumed, refused, and read again by name."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub import utils as hub_utils

import gptoss_quantize as gq
from gptoss_quantize import pushing
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import partial_of, put_mark
from gptoss_quantize.hub import resolve
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(server)


# huggingface_hub's own way to speak to httpx2
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    found = server.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    hub_utils.close_session()
    yield found
    hub_utils.close_session()
    found.close()


@pytest.fixture
def int4(tiny, tmp_path):
    """An int4 checkpoint of its own, its source with a licence."""
    source = tiny.copy("bf16", tmp_path / "source")
    (source / "LICENSE").write_text(
        "                                 Apache License\n                           Version 2.0\n"
    )
    job = Job(dest=tmp_path / "out", method="rtn", recipe=RECIPES["rtn"])
    quantize_checkpoint(Checkpoint(source), job, None)
    return tmp_path / "out"


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def test_pushed_and_read_again_by_name(stand_in, int4, tiny):
    (int4 / "notes.txt").write_text("mine")
    done = gq.push(int4, "me/tiny-int4", base_model="openai/gpt-oss-20b")
    assert done.url.startswith(stand_in.url) and done.left == ["notes.txt"]
    there = stand_in.repos["me/tiny-int4"]["main"]
    assert sorted(there) == done.files and stand_in.commits == 1 and not stand_in.private["me/tiny-int4"]
    for name in there.keys() - {"README.md", "quantization_report.json"}:
        assert there[name] == (int4 / name).read_bytes(), name
    assert {"LICENSE", "config.json", "tokenizer.json", "gptoss-int4.safetensors.index.json"} <= there.keys()
    # the directories of this machine stay here
    assert not [name for name, data in there.items() if str(int4.parent).encode() in data]
    assert json.loads(there["quantization_report.json"])["settings"]["source"] == "source"
    card = there["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "openai/gpt-oss-20b" and front["license"] == "apache-2.0"
    assert (
        "vllm serve me/tiny-int4" in card and "# gpt-oss-20b, int4" in card and "OUT" not in card.split("Results")[0]
    )
    # back again, by name alone
    path = resolve("me/tiny-int4")
    ids = tiny.ids(1)
    with torch.inference_mode():
        assert torch.equal(gq.load(path)(ids).logits, gq.load(int4)(ids).logits)
    assert gq.generate("me/tiny-int4", "The sea", raw=True, max_new_tokens=3, device="cpu") == gq.generate(
        int4, "The sea", raw=True, max_new_tokens=3, device="cpu"
    )


def test_an_interrupted_push_goes_on(stand_in, int4):
    stand_in.fail_after = 2
    refused(lambda: gq.push(int4, "me/tiny"), "me/tiny: the", "the line broke", "not sent twice")
    assert len(stand_in.received) == 2 and stand_in.commits == 0
    # nobody sees half of it
    assert stand_in.repos["me/tiny"]["main"] == {}
    stand_in.fail_after = None
    gq.push(int4, "me/tiny")
    shards = len(list(int4.glob("*.safetensors")))
    assert len(stand_in.received) == len(set(stand_in.received)) == shards > 2 and stand_in.commits == 1


def test_private_and_a_branch(stand_in, int4):
    gq.push(int4, "me/tiny", private=True, revision="v2")
    assert stand_in.private["me/tiny"] and stand_in.repos["me/tiny"]["main"] == {}
    assert "config.json" in stand_in.repos["me/tiny"]["v2"]
    # once more: nothing is sent again
    count = len(stand_in.received)
    gq.push(int4, "me/tiny", private=True, revision="v2")
    assert len(stand_in.received) == count


def test_weights_of_another_model_are_not_left_beside(stand_in, int4):
    gq.push(int4, "me/tiny")
    stand_in.repos["me/tiny"]["main"] |= {"model-00001-of-00002.safetensors": b"old", "README.old": b"kept"}
    refused(lambda: gq.push(int4, "me/tiny"), "1 other file(s) of weights, first model-00001", "--replace")
    gq.push(int4, "me/tiny", replace=True)
    assert "model-00001-of-00002.safetensors" not in stand_in.repos["me/tiny"]["main"]
    assert "README.old" in stand_in.repos["me/tiny"]["main"]


def test_tokens_and_names_in_plain_words(stand_in, int4, monkeypatch):
    refused(lambda: gq.push(int4, "tiny"), "expected OWNER/NAME, such as me/tiny")
    refused(lambda: gq.push(int4, "me/a b"), "give OWNER/NAME")
    refused(lambda: gq.push(int4, "openai/tiny"), "the token may not write there", "hf auth whoami")
    monkeypatch.setenv("HF_TOKEN", server.READER)
    refused(lambda: gq.push(int4, "me/tiny"), "the token may not write there", "write permission")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(lambda: gq.push(int4, "me/tiny"), "the hub does not know the token", "hf auth login")
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    refused(lambda: gq.push(int4, "me/tiny"), "not logged in", "hf auth login")
    assert not stand_in.repos and not stand_in.received


def test_no_network(stand_in, int4, monkeypatch):
    stand_in.close()
    refused(lambda: gq.push(int4, "me/tiny"), "cannot be reached", "same command again")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_is_not_whole_is_not_sent(stand_in, int4, tiny, tmp_path):
    first, second = sorted(int4.glob("*.safetensors"))[:2]
    flip(second)
    refused(lambda: gq.push(int4, "me/tiny"), str(second), "CRC-32", "changed or damaged")
    flip(second)
    kept = first.read_bytes()
    first.unlink()
    refused(lambda: gq.push(int4, "me/tiny"), first.name)
    first.write_bytes(kept)
    report = json.loads((int4 / "quantization_report.json").read_text())
    del report["crc32"][first.name]
    (int4 / "quantization_report.json").write_text(json.dumps(report))
    refused(lambda: gq.push(int4, "me/tiny"), str(first), "not named in quantization_report.json")
    unfinished = partial_of(tmp_path / "new")
    unfinished.mkdir()
    put_mark(unfinished, "quantize")
    refused(lambda: gq.push(unfinished, "me/tiny"), "an unfinished run", "--resume")
    refused(lambda: gq.push(tiny.path("bf16"), "me/tiny"), "not written by gptoss-quantize", "hf upload me/tiny")
    refused(lambda: gq.push(tmp_path / "nowhere", "me/tiny"), "no such directory")
    assert not stand_in.repos and not stand_in.received


@pytest.mark.parametrize("to", ["gguf", "bf16", "autogptq"])
def test_exports_are_pushed_too(stand_in, int4, tmp_path, to):
    gq.export(int4, tmp_path / "exported", to)
    gq.push(tmp_path / "exported", "me/exported")
    there = stand_in.repos["me/exported"]["main"]
    assert {"README.md", "export_report.json"} <= there.keys()
    assert any(name.endswith((".gguf", ".safetensors")) for name in there)
    assert f"exported as {to}" in there["README.md"].decode()
    assert not [name for name, data in there.items() if str(tmp_path).encode() in data]


def test_hub_names_wherever_a_model_is_read(stand_in, int4, tiny, tmp_path):
    gq.push(int4, "me/tiny")
    stand_in.repos["me/base"] = {"main": {f.name: f.read_bytes() for f in tiny.path("bf16").iterdir()}}
    adapter = tiny.adapter(tmp_path / "adapter")
    stand_in.repos["me/lora"] = {"main": {f.name: f.read_bytes() for f in adapter.iterdir()}}
    stand_in.private |= {"me/base": False, "me/lora": False}
    options = {"tokens": 96, "seq_len": 48}
    by_name = gq.evaluate("me/tiny", "me/base", adapter="me/lora", **options).report["results"]
    by_path = gq.evaluate(int4, tiny.path("bf16"), adapter=adapter, **options).report["results"]
    assert list(by_name.values()) == list(by_path.values()) and list(by_name) == ["tiny"]
    made = gq.quantize("me/base", tmp_path / "made", "rtn", adapter="me/lora")
    card = (made.path / "README.md").read_text()
    assert 'base_model: "me/base"' in card and "me/base with its experts in int4" in card
    gq.export("me/tiny", tmp_path / "bf16", "bf16")
    refused(lambda: gq.evaluate("me/tiny", "me/base", model_card=True, **options), "no place for a model card")


def test_the_command(stand_in, int4, command):
    code, out, err = command("push", int4, "me/tiny", "--private")
    assert code == 0 and "me/tiny: " in err + out and "chat me/tiny" in err + out, err
    code, out, err = command("push", int4.parent / "no", "me/tiny")
    assert code == 1 and "no such directory" in err
    code, out, err = command("evaluate", "me/tiny", "--baseline", "me/nowhere")
    assert code == 1 and "me/nowhere" in err
