"""From a request to the text that a model is given: as it is, in the tokenizer's chat template, or in the form that an
adapter was trained on.

    "plain"     the request itself: base models, and texts that the model is to go on with
    "chat"      the tokenizer's own template, one turn of a user, ready for the answer
    "response"  "### Input: <request>\\n### Response:"

Knows nothing about models: tokenizers only.
"""

from __future__ import annotations

from typing import Any, get_args

from lm.errors import UserError
from lm.terms import TextForm

__all__ = ["as_text", "default_form", "response_text"]


def response_text(request: str) -> str:
    """The request between the two headings of the form "response"."""
    return f"### Input: {request.strip()}\n### Response:"


def default_form(tokenizer: Any) -> TextForm:
    """The form "chat" where the tokenizer has a template, else "plain"."""
    return "chat" if getattr(tokenizer, "chat_template", None) else "plain"


def as_text(tokenizer: Any, request: str, form: TextForm) -> str:
    """Text of a request.

    Args:
        tokenizer: of the model; needed for "chat" only.
        request: what a user would write.
        form: see this module.

    Raises:
        ValueError: an unknown form, or "chat" for a tokenizer without a template.
    """
    if form not in get_args(TextForm):
        raise UserError(f"form must be one of {', '.join(get_args(TextForm))}, got {form!r}")
    if form == "plain":
        return request
    if form == "response":
        return response_text(request)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("this tokenizer has no chat template: use the form plain or response")
    turns = [{"role": "user", "content": request}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
