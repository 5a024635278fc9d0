"""Attention patterns are the model's own, rounded to 1/255, of heads that look sharply."""

from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from zoo import tokens, zoo

import mechinterp as mi
from mechinterp.heads.attention import sharpness


def text(model: TransformerBridge) -> mi.Text:
    rows = [[1, 5, 9, 5, 9, 5, 2, 4], [1, 7, 3, 7], [2, 2]]
    return mi.Text.from_tokens(model, rows)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_patterns_are_those_of_a_plain_run(architecture):
    model = zoo(architecture)
    data = text(model)
    result = mi.attention_patterns(model, data, prompts=3, n=None)
    prompts = data.prompts
    acts = mi.HookManager(model).capture(prompts, "pattern")
    assert len(result.heads) == sum(len(block.attn.W_O) for block in model.blocks)
    for layer, head in result.heads:
        for i, length in enumerate(prompts.lengths.tolist()):
            own = acts["pattern", layer][i, head, :length, :length].cpu().numpy()
            kept = result.pattern((layer, head), prompt=i)
            np.testing.assert_allclose(kept, own, atol=0.5 / 255 + 1e-6)
    assert result.tokens(2) == ["2", "2"]
    assert int(result.data["pattern"].sel(prompt=2).values[:, 2:].sum()) == 0


def test_sharpness_agrees_with_a_plain_loop_and_ranks():
    model = zoo("gpt2")
    data = text(model)
    result = mi.attention_patterns(model, data, n=5)
    acts = mi.HookManager(model).capture(data.prompts, "pattern")
    found = {}
    for layer, block in enumerate(model.blocks):
        for head in range(len(block.attn.W_O)):
            own = acts["pattern", layer][0, head]
            looks = [max(float(own[q, k]) for k in range(1, 8) if k != q) for q in range(2, 8)]
            found[layer, head] = sum(looks) / len(looks)
    best = sorted(found, key=lambda head: -found[head])[:5]
    assert result.heads == best
    assert result.effect.values[0] == pytest.approx([found[head] for head in best], abs=1e-6)


def test_sharpness_is_one_for_a_head_that_looks_back_by_one_and_zero_for_one_that_rests():
    back, rests = torch.eye(6).roll(-1, 1), torch.zeros(6, 6)
    rests[:, 0] = 1
    assert sharpness(back) == 1.0 and sharpness(rests) == 0.0
    assert np.isnan(sharpness(torch.eye(2)))


def test_named_heads_are_kept_in_their_order():
    model = zoo("gpt2")
    result = mi.attention_patterns(model, text(model), heads=[(2, 1), (0, 0)], prompts=[1])
    assert result.heads == [(2, 1), (0, 0)] and result.data["prompt"].values.tolist() == [1]
    assert len(result.figure(layer=2).axes) == 2  # one panel, and the scale of colours


def test_what_is_not_there_is_refused_before_any_run():
    model = zoo("gpt2")
    data = text(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"heads": [(0, 99)]}, r"head \(0, 99\) does not exist"),
        ({"prompts": [3]}, "prompt 3 does not exist: there are 0..2"),
        ({"prompts": 0}, "names no prompts"),
        ({"n": 0}, "n=0 keeps no head"),
    ]
    for told, says in wrong:
        with pytest.raises(ValueError, match=says):
            mi.attention_patterns(model, data, **told)
    with pytest.raises(TypeError, match="attention_patterns takes a Text or a Task"):
        mi.attention_patterns(model, tokens(2, 4))
    result = mi.attention_patterns(model, data, heads=[(0, 0)])
    with pytest.raises(ValueError, match=r"head 1\.0 was not kept, only 0\.0"):
        result.plot(head=(1, 0))
    with pytest.raises(ValueError, match="prompt 2 was not kept"):
        result.plot(prompt=2)
    with pytest.raises(ValueError, match="no head of layer 2"):
        result.figure(layer=2)
    with pytest.raises(ValueError, match="Pass one of them"):
        result.figure([(0, 0)], layer=0)
