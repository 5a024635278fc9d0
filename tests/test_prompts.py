"""Prompts: what becomes of strings and tokens before the model sees them."""

import pytest
import torch
import transformers as tf
import zoo
from tokenizers import processors

from mechinterp.models import forward, load_model
from mechinterp.tasks import Prompts, Text, as_prompts

BOS, EOS = 1, 2


def with_tokenizer(tokenizer):
    return load_model(zoo.hf("gpt2"), tokenizer=tokenizer)


def adding(template):
    """The zoo's tokenizer, putting special tokens around each text by itself."""
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def without_bos():
    return tf.PreTrainedTokenizerFast(tokenizer_object=zoo.tokenizer().backend_tokenizer)


@pytest.fixture(scope="module")
def model():
    return with_tokenizer(zoo.tokenizer())


def test_a_missing_bos_is_prepended_and_one_in_the_text_is_not_doubled(model):
    prompts = as_prompts(model, ["Mary went", "<bos> Mary went"])
    assert prompts.bos == "prepended"
    assert prompts.rows[0] == prompts.rows[1] and prompts.rows[0].count(BOS) == 1
    assert as_prompts(model, "<bos> Mary went").bos == "given"


def test_special_tokens_of_the_tokenizer_are_kept_and_nothing_is_added():
    prompts = as_prompts(with_tokenizer(adding("<bos> $A <eos>")), "Mary went")
    assert prompts.bos == "tokenizer"
    assert (
        prompts.rows[0][0] == BOS and prompts.rows[0][-1] == EOS and len(prompts.rows[0]) == 4
    )


def test_a_bos_in_the_text_is_not_doubled_by_a_tokenizer_that_adds_one():
    prompts = as_prompts(with_tokenizer(adding("<bos> $A")), ["<bos> Mary went", "Mary went"])
    assert prompts.rows[0] == prompts.rows[1]


def test_a_tokenizer_without_bos_adds_none():
    model = with_tokenizer(without_bos())
    assert as_prompts(model, "Mary went").bos == "none"
    with pytest.raises(ValueError, match="no BOS"):
        as_prompts(model, "Mary went", prepend_bos=True)


def test_prepend_bos_overrides_the_rule(model):
    bare = as_prompts(model, "Mary went", prepend_bos=False)
    assert bare.bos == "none" and BOS not in bare.rows[0]
    own = with_tokenizer(adding("<bos> $A"))
    assert as_prompts(own, "Mary went", prepend_bos=False).rows == bare.rows
    assert as_prompts(own, "Mary went", prepend_bos=True).rows[0].count(BOS) == 1


def test_a_tokenizer_file_that_truncates_does_not():
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert len(as_prompts(with_tokenizer(tokenizer), "Mary " * 9).rows[0]) == 10


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 6, 7],
        [[5, 6, 7]],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]]),
        [torch.tensor([5, 6, 7])],
        torch.tensor([[5, 6, 7]]).numpy(),
    ],
)
def test_token_input_of_any_form_is_never_changed(model, tokens):
    prompts = as_prompts(model, tokens)
    assert prompts.rows == [[5, 6, 7]] and prompts.bos == "given" and prompts.text is None


def test_prompts_of_different_lengths_are_padded_right_and_masked(model):
    prompts = as_prompts(model, [[5, 6, 7], [8]])
    assert prompts.mask.tolist() == [[True] * 3, [True, False, False]]
    assert prompts.lengths.tolist() == [3, 1] and prompts.rows == [[5, 6, 7], [8]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "roberta", "native"])
def test_a_padded_prompt_gives_the_logits_of_the_prompt_alone(name):
    model = zoo.zoo(name)
    both = as_prompts(model, [[5, 6, 7, 8, 9, 10], [11, 12, 13]])
    alone = both[1]
    assert alone.tokens.shape == (1, 3)
    padded = forward(model, both.tokens, both.mask)[1, :3]
    torch.testing.assert_close(
        padded, forward(model, alone.tokens, alone.mask)[0], rtol=0, atol=1e-4
    )


def test_choosing_prompts_keeps_their_text_and_order(model):
    prompts = as_prompts(model, ["Mary went", "John", "the park"])
    assert prompts[[2, 0]].text == ("the park", "Mary went")
    assert prompts[1:].rows == prompts.rows[1:] and prompts[-1].rows == prompts.rows[-1:]
    with pytest.raises(ValueError, match="chooses none"):
        prompts[3:]


def test_prompts_and_data_that_has_them_pass_through(model):
    prompts = as_prompts(model, ["Mary went"])
    assert as_prompts(model, prompts) is prompts
    text = Text.from_strings(model, ["Mary went"])
    assert as_prompts(model, text) is text.prompts


def test_bad_prompts_are_refused_before_any_run(model):
    with pytest.raises(ValueError, match="there are no prompts"):
        as_prompts(model, torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        as_prompts(model, [[5], []])
    with pytest.raises(ValueError, match=r"token id 97 at position 1 of prompt 0.*0\.\.96"):
        as_prompts(model, [5, 97])
    with pytest.raises(ValueError, match=r"prompt 0 has 65 tokens.*context holds 64"):
        as_prompts(model, [5] * 65)
    with pytest.raises(ValueError, match=r"no tokenizer.*token ids"):
        as_prompts(zoo.zoo("gpt2"), "Mary went")
    with pytest.raises(TypeError, match="mix strings and tokens"):
        as_prompts(model, ["Mary", [5]])
    with pytest.raises(TypeError, match="prompts cannot be of type float"):
        as_prompts(model, 0.5)
    with pytest.raises(TypeError, match="token input is never changed"):
        as_prompts(model, [5, 6], prepend_bos=True)


def test_left_padding_is_refused():
    tokens, mask = torch.tensor([[0, 5]]), torch.tensor([[False, True]])
    with pytest.raises(ValueError, match="padding is not on the right"):
        Prompts(tokens, mask, None, "given")
