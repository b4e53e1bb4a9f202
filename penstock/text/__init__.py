"""Text in and out of a model: tokenizer, chat template, incremental detokeniser, stop strings."""

from __future__ import annotations

from penstock.text.chat import ChatTemplate
from penstock.text.detokenize import IncrementalDetokenizer, StopStrings
from penstock.text.files import text_files
from penstock.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopStrings", "Tokenizer", "text_files"]
