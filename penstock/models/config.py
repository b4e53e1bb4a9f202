"""`config.json`, read to the last key: what no family consumes and no list excuses is an error that names it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.formats import FLOATS
from penstock.text.files import parse_json

MAX_SIZE = 2**31 - 1  # the device indexes with 32 bits

# Keys that say nothing about the mathematics of a forward pass, by the reason why.
IGNORED: Mapping[str, tuple[str, ...]] = {
    "where the file came from; the family was chosen by it, and remote code is never run": (
        "_name_or_path", "_commit_hash", "architectures", "auto_map", "model_type", "name_or_path", "torch_dtype",
        "dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "_attn_implementation",
        "_attn_implementation_autoset",
    ),
    "training only": (
        "attention_dropout", "attn_pdrop", "embd_pdrop", "gradient_checkpointing", "hidden_dropout",
        "initializer_range", "label_smoothing", "resid_pdrop", "hidden_dropout_prob",
    ),
    "special tokens, read with the tokenizer and generation settings": (
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
        "tokenizer_class", "prefix",
    ),
    "generation settings of old files; a request states its own": (
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    ),
    "how another library runs or returns things": (
        "chunk_size_feed_forward", "finetuning_task", "id2label", "is_decoder", "label2id", "num_labels",
        "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type", "return_dict",
        "task_specific_params", "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache", "use_flash_attn",
    ),
}  # fmt: skip

# Keys with which the model would be another one; only the value that leaves it as it is can be read.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
}

_MISSING: Any = object()


def load_config(directory: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory. Raises ConfigError where there is none, or no JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = parse_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a model directory has it beside the safetensors") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, expected an object of keys and values")
    return config


def stored_format(config: Mapping[str, Any]) -> str:
    """The format that the config says its weights are stored in, under either spelling; where it says nothing f32, or
    bf16 for packed ones, which unpack to that.

    Raises ConfigError for one that is no dense float format.
    """
    name = (
        config.get("dtype")
        or config.get("torch_dtype")
        or ("bfloat16" if config.get("quantization_config") else "float32")
    )
    floats = {f.torch_dtype: f.name for f in FLOATS}
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    if name not in floats:
        raise ConfigError(f"config.json: dtype {name!r} is not implemented; expected {', '.join(sorted(floats))}")
    return floats[name]


class Reader:
    """A config that notes which keys were consumed; `close` refuses the rest."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._where = where
        self._consumed: set[str] = set()
        self._spelt: dict[str, str] = {}

    def spelt(self, **keys: str) -> None:
        """From here on a key means the family's own word for it, where the config uses that one: hidden_size="n_embd".

        Raises ConfigError for a config with both that differ.
        """
        for key, own in keys.items():
            if own in self._config:
                if key in self._config and self._config[key] != self._config[own]:
                    raise self.refused(key, self._config[key], f"the same as {own} = {self._config[own]!r}")
                self._consumed.add(key)
                self._spelt[key] = own

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key`; without a default ConfigError where it is missing."""
        key = self._spelt.get(key, key)
        self._consumed.add(key)
        if key in self._config:
            return self._config[key]
        if default is _MISSING:
            raise ConfigError(f"{self._where} has no key {key!r}, which this family needs; add it")
        return default

    def size(self, key: str, default: Any = _MISSING, most: int = MAX_SIZE) -> int:
        """A positive integer, at most `most`."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refused(key, value, f"a positive integer, at most {most}")
        return value

    def optional_size(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int | None:
        """A positive integer, or null or nothing for the default."""
        return default if self.get(key, None) is None else self.size(key, most=most)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A positive number."""
        value = self.get(key, default)
        if not _positive(value):
            raise self.refused(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key, None) is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self.get(key)
        right = isinstance(value, list) and len(value) == count
        if not right or not all(map(_positive, value)):
            raise self.refused(key, value, f"a list of {count} positive numbers")
        return tuple(map(float, value))

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; null counts as missing."""
        value = self.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refused(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: Any = _MISSING) -> str:
        """What `choices` maps the value to."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refused(key, value, f"one of {', '.join(choices)}")
        return choices[value]

    def only(self, key: str, *values: Any) -> None:
        """Consume a key that has a single meaning here: missing, or one of these values."""
        value = self.get(key, values[0])
        if value not in values or isinstance(value, bool) not in {isinstance(v, bool) for v in values}:
            raise self.refused(key, value, f"{' or '.join(map(repr, values))}; use a checkpoint without it")

    def nested(self, key: str) -> Reader | None:
        """The object under `key`; None where it is missing, null or empty."""
        value = self.get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.refused(key, value, "an object")
        return Reader(value, f"{self._where}: {key}") if value else None

    def assume(self, **defaults: Any) -> None:
        """What keys mean that the config leaves out, in a family whose files do so."""
        self._consumed.update(defaults.keys() - self._config.keys())
        self._config = {**defaults, **self._config}

    def consumed(self, key: str) -> bool:
        return key in self._consumed

    def ignore(self, keys: Iterable[str]) -> None:
        self._consumed.update(keys)

    def refused(self, key: str, value: Any, expected: str) -> ConfigError:
        """The error for a value that is not implemented."""
        return ConfigError(
            f"{self._where}: {self._spelt.get(key, key)} = {value!r} is not implemented; expected {expected}"
        )

    def close(self) -> None:
        """Raises ConfigError naming the first keys that nobody consumed."""
        left = [key for key in self._config if key not in self._consumed]
        if left:
            shown = ", ".join(f"{key} = {self._config[key]!r}" for key in left[:5])
            raise ConfigError(
                f"{self._where}: unknown key {shown}: it may change what the model computes, so it is not skipped; "
                f"remove it if it does not, or register a family that reads it"
            )


def _positive(value: object) -> bool:
    """A positive number that a float can hold, which not every integer is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def close(reader: Reader) -> None:
    """The end of every family's reading: keys that it left must be neutral or excused."""
    for key, values in NEUTRAL.items():
        if not reader.consumed(key):
            reader.only(key, *values)
    for keys in IGNORED.values():
        reader.ignore(keys)
    reader.close()
