"""A tokenizer from its files, or in one line why they cannot be read.

Knows nothing about models or texts. The only place that loads a tokenizer of Hugging Face by name.
"""

from __future__ import annotations

import struct
from typing import Any

from lm.errors import UserError
from lm.weights import UNREADABLE

__all__ = ["read_tokenizer"]


def read_tokenizer(source: str, file: str | None = None, local: bool = False) -> Any:
    """The tokenizer of a folder, hub id or GGUF file, tried once: some settings are first looked at then.

    Args:
        source: folder or hub id.
        file: name of a GGUF file in it; None: the tokenizer's own files.
        local: never look for it on the hub.

    Raises:
        ValueError: files that are missing or damaged.
    """
    from transformers import AutoTokenizer

    more: dict[str, Any] = {} if file is None else {"gguf_file": file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, **more)
        tokenizer(["1+1=?"])
        return tokenizer
    except Exception as error:
        # The tokenizers library raises bare `Exception` for a file that it cannot read; other classes are defects.
        if type(error) is not Exception and not isinstance(error, (*UNREADABLE, ImportError, struct.error)):
            raise
        why = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer of {file or source} could not be loaded: {why}") from error
