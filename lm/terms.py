"""The names that options, tables and engines share: one definition each, imported by every package, importing nothing.

Kept apart from what they name so that a command line can be read, explained and refused without torch.
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = [
    "ANSWER_MODES",
    "CONTROLS",
    "DTYPES",
    "KEY_FRAMES",
    "PAIR_CONTROLS",
    "PARTS",
    "PATCH_CONTROLS",
    "SPACES",
    "TIMINGS",
    "TRIAL_CONTROLS",
    "VECTOR_METHODS",
    "AnswerMode",
    "AnswerRule",
    "Attention",
    "ControlText",
    "Device",
    "DrawNorm",
    "Dtype",
    "EditPositions",
    "Engine",
    "KeyFrame",
    "Mask",
    "Part",
    "ProtocolName",
    "Rope",
    "RunTokens",
    "Space",
    "TextForm",
    "Timing",
    "VectorMethod",
    "VectorScale",
]

# --- How a model runs ---

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Attention = Literal["sdpa", "eager"]
TextForm = Literal["plain", "chat", "response"]
"""How a request becomes the text that an ordinary language model is given (lm/chat.py)."""
Mask = Literal["carried", "published"]
"""Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
Rope = Literal["float32", "published"]
"""Rotary frequencies: kept in float32, or rounded as published runs in bfloat16 do."""
ControlText = Literal["plain", "published"]
"""What the text of a control token means in a question: plain text, or the token itself (the published way)."""
ProtocolName = Literal["original", "original-eos", "answer-only"]
AnswerMode = Literal["latent", "direct", "verbal"]
"""What comes before the answer: latents, nothing, or a written chain of thought."""
ANSWER_MODES: tuple[AnswerMode, ...] = get_args(AnswerMode)
AnswerRule = Literal["common", "published"]
"""How an answer is read: by common sense, as numbers in data sets are, or the last number (published evaluation)."""

# --- What is edited, where and when ---

Space = Literal["kv", "embedding", "hidden"]
"""The cache slot of a latent, the vector fed at it, or the state that it is projected from."""
SPACES: tuple[Space, ...] = get_args(Space)
Part = Literal["keys", "values", "both"]
"""Of a cache slot."""
PARTS: tuple[Part, ...] = get_args(Part)
Timing = Literal["early-exit", "continue", "cached"]
"""early-exit: think up to the edited latent, edit, answer. continue: edit and think on. cached: think, then edit."""
TIMINGS: tuple[Timing, ...] = get_args(Timing)
KeyFrame = Literal["content", "raw"]
"""Keys turned back to position 0 before they are averaged, or as they are cached (the published way)."""
KEY_FRAMES: tuple[KeyFrame, ...] = get_args(KeyFrame)
EditPositions = Literal["all", "prompt", "generated", "last", "once", "answer"]
"""Tokens at which the residual stream of an ordinary language model is edited: those of the prompt and all that are
generated after it, every prompt token, every generated token, the last prompt token only, the first generated token
only, or the answer: the last prompt token, which predicts its first token, and every generated one. Padding never."""
Engine = Literal["shared", "clones"]
"""Branches over a shared prefix, or an edited copy of the cache per row."""

# --- Control vectors ---

VectorMethod = Literal["reading", "contrastive", "pca-contrast", "pca-reading"]
"""How a control vector is made of pairs of texts (steering/contrasts.py)."""
VECTOR_METHODS: tuple[VectorMethod, ...] = get_args(VectorMethod)
VectorScale = Literal["mean", "unit"]
"""Length of a principal component: that of the mean it stands for, or 1."""
RunTokens = Literal["generated", "all", "last-prompt"]
"""Which tokens of a written answer are read: those that the model wrote, these and the prompt, or the prompt's last."""

# --- Against what ---

PAIR_CONTROLS = ("random", "covariance", "shuffled")
"""Directions that stand beside the direction of a pair."""
PATCH_CONTROLS = ("patch-scalar", "patch-coordinate", "patch-norm")
"""Random latents that replace instead of being added."""
CONTROLS = (*PAIR_CONTROLS, *PATCH_CONTROLS)
"""What can be asked for."""
TRIAL_CONTROLS = ("none", "direction", *CONTROLS)
"""What stands in the column `control` of a trial table: the baseline, the direction itself, and its controls."""
DrawNorm = Literal["pair", "pooled"]
"""Norms of random draws: those of every pair, or the mean over pairs."""
