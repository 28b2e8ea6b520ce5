"""Trees: every branch gets what it would get alone, from the plain streamed model and from transformers."""

import pytest
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval import trees
from gptoss_quantize.eval.trees import Tree, batches_of, lay_out, predicting_states, target_logprobs
from gptoss_quantize.model import hidden_states

# two float32 implementations agree to 1e-4 on logits (tests/root/test_model.py)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def forest(tiny) -> list[Tree]:
    """Trees of unlike sizes; contexts and branches longer than the window of 16, a single-token context."""
    ids = tiny.ids(8, 60).tolist()
    return [
        Tree(tuple(ids[0][:21]), (tuple(ids[1][:3]), tuple(ids[2][:19]), tuple(ids[3][:1]))),
        Tree(tuple(ids[4][:1]), (tuple(ids[4][1:50]),)),
        Tree(tuple(ids[5][:7]), (tuple(ids[6][:2]), tuple(ids[7][:2]))),
        Tree(tuple(ids[6][:40]), (tuple(ids[6][40:45]),)),
    ]


def alone(checkpoint: Checkpoint, forest: list[Tree]) -> torch.Tensor:
    """The hidden states that predict every branch token, each branch run as a sequence of its own."""
    parts = []
    for tree in forest:
        for branch in tree.branches:
            hidden = hidden_states(checkpoint, torch.tensor([tree.context + branch]))[0]
            parts.append(hidden[len(tree.context) - 1 : -1])
    return torch.cat(parts)


def test_every_branch_gets_what_it_would_get_alone(tiny, forest):
    checkpoint = Checkpoint(tiny.path("float32"))
    layers = []
    got = predicting_states(checkpoint, lay_out(forest), on_layer=lambda: layers.append(1))
    torch.testing.assert_close(got, alone(checkpoint, forest), atol=TOLERANCE, rtol=0)
    assert len(layers) == checkpoint.config.layers


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_do_not_show(tiny, forest, monkeypatch, batch_tokens):
    checkpoint = Checkpoint(tiny.path("float32"))
    whole = predicting_states(checkpoint, lay_out(forest))
    monkeypatch.setattr(trees, "batches_of", lambda layout: batches_of(layout, batch_tokens))
    torch.testing.assert_close(predicting_states(checkpoint, lay_out(forest)), whole, atol=TOLERANCE, rtol=0)


def test_log_probabilities_are_those_of_transformers(tiny, forest):
    checkpoint, model = Checkpoint(tiny.path("float32")), tiny.model()
    layout = lay_out(forest)
    values, greedy = target_logprobs(predicting_states(checkpoint, layout), checkpoint.head(), layout.target)
    exact, first = [], []
    for tree in forest:
        for branch in tree.branches:
            with torch.inference_mode():
                logits = model(torch.tensor([tree.context + branch])).logits[0, len(tree.context) - 1 : -1].double()
            exact.append(torch.log_softmax(logits, -1)[range(len(branch)), list(branch)])
            first.append(logits.argmax(-1) == torch.tensor(branch))
    torch.testing.assert_close(values.double(), torch.cat(exact), atol=2 * TOLERANCE, rtol=0)
    assert torch.equal(greedy, torch.cat(first))


def test_the_layout_by_hand():
    layout = lay_out([Tree((5, 6), ((7, 8), (9,))), Tree((1,), ((2, 3),))])
    assert layout.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert layout.position.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert layout.branch.tolist() == [0, 0, 1, 1, 2, 0, 1, 1]
    assert layout.bounds.tolist() == [0, 5, 8]
    assert layout.source.tolist() == [1, 2, 1, 5, 6]
    assert layout.target.tolist() == [7, 8, 9, 2, 3]
    assert layout.owner.tolist() == [0, 0, 0, 1, 1]
    assert layout.depth == 4 and layout.trees == 2


def test_who_sees_whom_by_hand():
    (batch,) = batches_of(lay_out([Tree((5, 6), ((7, 8), (9,))), Tree((1,), ((2,),))]))
    # the shorter tree comes first, padded
    assert batch.row.tolist() == [[5, 6, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert batch.visible[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert batch.visible[0, 0, :2].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    # a window of two tokens: itself and the position before, whatever stands between in the list
    assert batch.windowed(2)[1, 0].int().tolist()[3:] == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_trees_without_a_context_or_with_an_empty_branch_are_refused():
    for context, branches in (((), ((1,),)), ((1,), ((),))):
        with pytest.raises(ValueError, match="a tree needs a context"):
            Tree(context, branches)
