"""`--device` without a card: one made of the processor says where a tensor was forgotten, and numbers are the same.

The card is torch's device `meta`, since anybody may make tensors there; but here they have values. While a `Card` is
plugged in, moving a tensor to `meta` makes it one of the card's, every operation on those gives another one, and one
that gets tensors of both places raises, as on CUDA: a forgotten `.to` is noticed on a machine without a card.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import gptoss_quantize as gq
from gptoss_quantize.calibration.text import TextSpec, load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import compare as comparison
from gptoss_quantize.eval import lm_models
from gptoss_quantize.eval.compare import Settings, compare
from gptoss_quantize.eval.divergence import evaluate
from gptoss_quantize.eval.experts import compare_experts
from gptoss_quantize.eval.tasks import TaskSettings, task_model
from gptoss_quantize.eval.trees import Tree, lay_out
from gptoss_quantize.machine import fitting
from gptoss_quantize.source import placed

NAME = "meta"
# the C++ of the processor and plain torch, which a card runs, round float32 differently
TOLERANCE = 1e-4


class OnCard(torch.Tensor):
    """A tensor of the card: `values` are its numbers, which only the card's own operations see."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnCard":
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=NAME,
        )  # fmt: skip
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the card, and no card is plugged in")


class Card(TorchDispatchMode):
    """The card, plugged in while the context lasts; `operations` counts what it was asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnCard)]
        asked = kwargs.get("device")
        copying = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        # a number from the processor is fine on a card
        if ours and not copying and any(not isinstance(x, OnCard) and x.dim() for x in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cpu and the card")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        stays = bool(ours) if asked is None else torch.device(asked).type == NAME
        if func is torch.ops.aten.copy_.default:
            stays = isinstance(args[0], OnCard)
        if asked is not None and stays != bool(ours) and tensors:
            result = result.clone()  # `to` gives the same tensor where nothing moves, and here it does
        if not stays:
            return result
        self.operations += 1
        return tree_map(lambda x: OnCard(x) if isinstance(x, torch.Tensor) else x, result)


def _values(x: Any) -> Any:
    return x.values if isinstance(x, OnCard) else x


@pytest.fixture(scope="module")
def int4(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("devices") / "int4"
    gq.quantize(tiny.path("bf16"), path, "rtn", device="cpu")
    return path


def close(got, wanted, where="") -> None:
    """Assert that two records are the same, numbers up to the rounding of float32."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for key in wanted:
            close(got[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), where
        for i, pair in enumerate(zip(got, wanted, strict=True)):
            close(*pair, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE), where
    else:
        assert got == wanted, where


def test_the_card_refuses_what_a_card_refuses():
    """The judge is judged: what CUDA refuses is refused, values are right, what comes back is the processor's."""
    here = torch.arange(6.0).view(2, 3)
    with torch.inference_mode(), Card() as card:
        there = here.to(NAME)
        assert isinstance(there, OnCard) and there.device.type == NAME and card.operations == 1
        assert torch.equal((there @ there.T).cpu(), here @ here.T)
        there[0] = 5.0
        assert there.cpu()[0].tolist() == [5.0] * 3 and here[0].tolist() == [0.0, 1.0, 2.0]
        for wrong in (
            lambda: there + here,
            lambda: here + there,
            lambda: there[torch.tensor([0])],
            lambda: torch.nn.functional.embedding(torch.tensor([0]), there),
            lambda: torch.nn.functional.linear(here, there),
            lambda: there.numpy(),
            lambda: torch.cat((there, here)),
        ):
            with pytest.raises(RuntimeError, match=r"same device|not supported"):
                wrong()
    with pytest.raises(RuntimeError, match="no card is plugged in"):
        there.sum()


def test_evaluate_on_a_card_gives_the_same_numbers(tiny, int4):
    models, ids = [Checkpoint(int4), Checkpoint(tiny.path("mxfp4"))], tiny.ids(3, 40)
    base = Checkpoint(tiny.path("bf16"))
    wanted = evaluate(base, models, ids)
    with Card() as card:
        got = evaluate(base, models, ids, device=NAME)
    close(got, wanted)
    # three models of so many layers: the work was done there
    assert card.operations > 3 * base.config.layers * 20


def test_compare_on_a_card_gives_the_same_numbers(tiny, int4, tmp_path):
    text = tmp_path / "sea.txt"
    text.write_text(tiny.text * 20)

    def run(name: str, device: str) -> dict:
        settings = Settings(
            texts=(TextSpec(source=str(text), tokens=144, seq_len=48, shuffle=False),),
            tasks=TaskSettings(names=("gptoss_kinds",), limit=4),
            expert_tokens=100,
            device=device,
        )
        found = compare(Checkpoint(tiny.path("bf16")), {"int4": Checkpoint(int4)}, settings, tmp_path / name)
        return json.loads(json.dumps(found))

    wanted = run("cpu", "cpu")
    with Card() as card:
        got = run("card", NAME)
    assert card.operations > 1000
    assert (got["settings"].pop("device"), wanted["settings"].pop("device")) == (NAME, "cpu")
    for record in (got, wanted):
        for entry in (record["baseline"], *record["candidates"]):
            del entry["seconds"]
        del record["created"], record["seconds"], record["machine"]
    # bfloat16 is rounded by other kernels to other numbers of the same size
    floors = [record.pop("noise_floor")[0]["summary"]["kl_mean"] for record in (got, wanted)]
    assert min(floors) > 0 and max(floors) < 2 * min(floors)
    close(got, wanted)
    # a card's results are not taken for the processor's: the same directory holds both
    with Card() as again:
        run("cpu", NAME)
    assert again.operations > 1000
    run("cpu", "cpu")


def test_experts_without_tokens_on_a_card(tiny, int4):
    # so few tokens that some experts get none
    layout = lay_out([Tree((3,), ((4, 5),))])
    base, ours = Checkpoint(tiny.path("bf16")), Checkpoint(int4)
    wanted = compare_experts(base, [ours], layout)
    assert 0 in wanted[0][0]["tokens"]
    with Card():
        got = compare_experts(placed(base, NAME), [placed(ours, NAME)], layout)
    close(got, wanted)


def test_answers_of_tasks_on_a_card(int4):
    checkpoint, pairs = Checkpoint(int4), [((5, 6), (7,)), ((5, 6), (8, 9)), ((1,), (2,))]
    tokenizer = load_tokenizer(checkpoint.side)

    def answers(device: str) -> list:
        options = {"answers": None, "load_model": None, "on_layer": lambda: None, "device": device}
        return [list(a) for a in task_model(checkpoint, tokenizer, dtype=torch.float32, **options).score(pairs)]

    wanted = answers("cpu")
    with Card() as card:
        got = answers(NAME)
    close(got, wanted)
    assert card.operations > checkpoint.config.layers * 20


def test_a_streamed_model_of_lm_eval_on_a_card(int4, monkeypatch):
    pairs = [((5, 6), (7,)), ((5, 6), (8, 9))]
    wanted = lm_models.StreamedModel(str(int4), device="cpu").score(pairs)
    # no card here: what is asked for is, the card that the processor plays
    monkeypatch.setattr(lm_models, "pick_device", {"cuda": NAME, "auto": NAME}.__getitem__)
    for device in ("cuda", None):
        with Card() as card:
            got = lm_models.StreamedModel(str(int4), device=device).score(pairs)
        close([list(answer) for answer in got], [list(answer) for answer in wanted])
        assert card.operations > Checkpoint(int4).config.layers * 20

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gptoss_quantize.eval.lm.predicting_states", full)
    with pytest.raises(InputError, match="not fit into its memory; take dtype=bfloat16 in --model_args, or --dev"):
        lm_models.StreamedModel(str(int4), device="cuda").score(pairs)


def test_a_place_of_its_own_in_the_cache(tmp_path):
    models = [comparison.Model("m", None, None, "", tmp_path, device) for device in ("cpu", "cuda", "cuda:1")]
    processor, card, another = (model.kept("states", *model.kind) for model in models)
    assert processor != card == another


def test_the_processor_needs_no_copies(tiny):
    checkpoint = Checkpoint(tiny.path("bf16"))
    assert placed(checkpoint, "cpu") is checkpoint
    moved = placed(checkpoint, NAME)
    with Card():
        tensors = [moved.head(), *moved.layer(0).values()]
        expert = moved.expert(0, 1)
    tensors += [expert.gate_up, expert.gate_up_bias, expert.down, expert.down_bias]
    assert all(isinstance(tensor, OnCard) for tensor in tensors)


def test_a_card_that_is_too_small_is_told_with_a_remedy():
    with (
        pytest.raises(InputError, match="--device cuda: does not fit into its memory; take fewer --tokens, or --dev"),
        fitting("cuda", "take fewer --tokens"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
