"""What a key means that a config leaves out: what Transformers takes it for, or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from penstock.errors import ConfigError, UnsupportedArchitectureError
from penstock.models import family_of, read_spec
from tests.cpu.models import twins

# What the class leaves open, and no published file does.
OPEN: dict[str, dict[str, Any]] = {"deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}}


def known(model_type: str) -> bool:
    try:
        family_of({"model_type": model_type})
    except UnsupportedArchitectureError:
        return False
    return model_type not in twins.REFERENCES


# An object that is stated is taken as it stands: YaRN has defaults of its own, whatever a family's whole one says.
OWN = {"gpt_oss": "rope_parameters."}

FAMILIES = sorted(filter(known, transformers.CONFIG_MAPPING))


def without_one(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config less a key, of its own or of an object within it."""
    for key, value in config.items():
        rest = {k: v for k, v in config.items() if k != key}
        yield key, rest
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", {**rest, key: less}) for inner, less in without_one(value))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_key_left_out_means_what_transformers_takes_it_for(model_type: str) -> None:
    config = json.loads(json.dumps(transformers.AutoConfig.for_model(model_type, **OPEN.get(model_type, {})).to_dict()))
    whole = read_spec(config)
    for key, rest in without_one(config):
        if model_type in OWN and key.startswith(OWN[model_type]):
            continue
        try:
            assert key == "model_type" or read_spec(rest) == whole, key
        except (ConfigError, UnsupportedArchitectureError) as error:
            assert key.rpartition(".")[2] in str(error) or "no key" in str(error), key


def test_most_families_are_compared() -> None:
    assert len(FAMILIES) >= 30
