"""lm.chat: the text of a request in each form; what a tokenizer cannot do is refused."""

from __future__ import annotations

import pytest
from conftest import make_base, make_tokenizer

from lm.chat import as_text, default_form, response_text
from lm.errors import UserError
from lm.model import LanguageModel

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty():
    tokenizer = make_tokenizer(named=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_forms(chatty):
    request = "What is\n2 + 2? "
    assert as_text(chatty, request, "plain") == request
    assert as_text(None, request, "plain") == request, "a plain text needs no tokenizer"
    assert as_text(chatty, request, "response") == "### Input: What is\n2 + 2?\n### Response:" == response_text(request)
    # One turn of the user, ended, and the beginning of the answer's: ready to be gone on with.
    assert as_text(chatty, request, "chat") == f"<|begin_of_text|><user>{request}<|eot_id|><assistant>"


def test_the_template_decides_the_form_unless_one_is_given(chatty):
    bare = make_tokenizer(named=False)
    assert (default_form(bare), default_form(chatty), default_form(None)) == ("plain", "chat", "plain")
    base = make_base("llama")
    assert LanguageModel(base, bare).text_of("Hi") == "Hi"
    assert LanguageModel(base, chatty).text_of("Hi") == "<|begin_of_text|><user>Hi<|eot_id|><assistant>"
    assert LanguageModel(base, chatty, form="response").text_of("Hi") == "### Input: Hi\n### Response:"


def test_special_tokens_come_once(chatty):
    """From the template in the form chat, from the tokenizer otherwise; each text begins with exactly one."""
    base = make_base("llama")
    for form in ("plain", "chat", "response"):
        model = LanguageModel(base, chatty, form=form)
        ids = model.encode([model.text_of("Hi")]).input_ids[0].tolist()
        assert ids[0] == 256 and ids.count(256) == 1
        assert ids.count(257) == (form == "chat"), "the end of the user's turn is one token"


def test_what_cannot_be_is_refused(chatty):
    with pytest.raises(UserError, match="form must be one of plain, chat, response, got 'poem'"):
        as_text(chatty, "Hi", "poem")
    with pytest.raises(UserError, match="no chat template: use the form plain or response"):
        as_text(make_tokenizer(named=False), "Hi", "chat")
