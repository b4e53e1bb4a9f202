"""Mamba-2: state spaces in place of attention, layers of one part each. (Dao and Gu 2024.)"""

from __future__ import annotations

import math

from penstock.ir import Value, emit
from penstock.models.binding import Wanted
from penstock.models.config import MAX_SIZE, Reader
from penstock.models.families import decoder as common
from penstock.models.families.decoder import MAX_HEAD_DIM, SILU, read_layers
from penstock.models.registry import Family
from penstock.spec import LayerSpec, ModelSpec, Norm, StateSpace

MAX_POSITION = 1 << 20  # tokens; nothing in the model ends, and no config states a length

_INITIAL = (
    "rescale_prenorm_residual", "time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min",
    "time_step_rank", "time_step_scale",
)  # fmt: skip
_PARTS = {
    "mixer_norm": "norm", "mixer.in": "mixer.in_proj", "mixer.conv": "mixer.conv1d", "mixer.norm": "mixer.norm",
    "mixer.out": "mixer.out_proj",
}  # fmt: skip
_WHOLE = {"embedding": "backbone.embeddings", "final_norm": "backbone.norm_f", "head": "lm_head"}
_HEADS = {"mixer.decay": "mixer.A_log", "mixer.step_bias": "mixer.dt_bias", "mixer.skip": "mixer.D"}


def read(reader: Reader) -> ModelSpec:
    """The gate comes before the norm, which is of all heads as one row, whatever `norm_before_gate` says: transformers
    computes the published models so. Steps are limited in prompts and single tokens alike."""
    reader.ignore((*_INITIAL, "chunk_size", "norm_before_gate", "residual_in_fp32"))
    reader.only("rms_norm", True)
    norm = Norm(reader.number("layer_norm_epsilon", 1e-5))
    return ModelSpec(
        layers=(LayerSpec(_mixer(reader, norm.eps), None, norm, None),) * read_layers(reader),
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("hidden_size"),
        final_norm=norm,
        max_position=MAX_POSITION,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def _mixer(reader: Reader, eps: float) -> StateSpace:
    heads, size = reader.size("num_heads"), reader.size("head_dim", 64, MAX_HEAD_DIM)
    width = reader.size("hidden_size") * reader.size("expand", 2)
    if heads * size != width:
        raise reader.refused("num_heads", heads, f"{width // size} = expand * hidden_size / head_dim")
    reader.only("intermediate_size", width)
    groups, state = reader.size("n_groups", 8), reader.size("state_size", 128, MAX_HEAD_DIM)
    if heads % groups:
        raise reader.refused("n_groups", groups, f"a divisor of num_heads = {heads}")
    if width * state > MAX_SIZE:
        raise reader.refused("state_size", state, f"at most {MAX_SIZE} numbers of state in a layer")
    kernel = reader.size("conv_kernel", 4, 64)
    if kernel < 2:
        raise reader.refused("conv_kernel", kernel, "at least 2")
    least, most = _limits(reader)
    act, bias = reader.choice("hidden_act", SILU, "silu"), reader.flag("use_bias", False)
    kernel_bias = reader.flag("use_conv_bias", True)
    return StateSpace(heads, size, state, groups, kernel, act, eps, bias, kernel_bias, least, most)


def _limits(reader: Reader) -> tuple[float, float]:
    """(least, most) of `time_step_limit`; most is 0 where the config says infinity, in either spelling."""
    stated = reader.get("time_step_limit", [0.0, math.inf])
    pair = [math.inf if each == {"__float__": "Infinity"} else each for each in stated] if type(stated) is list else []
    if len(pair) != 2 or any(type(each) not in (int, float) for each in pair) or not 0 <= pair[0] < pair[1]:
        raise reader.refused("time_step_limit", stated, "[least, most], of which most may be Infinity")
    return float(pair[0]), 0.0 if math.isinf(pair[1]) else float(pair[1])


def source(wanted: Wanted) -> str | Value:
    if wanted.part == "mixer.conv.weight":
        name, (channels, width) = f"backbone.layers.{wanted.layer}.mixer.conv1d.weight", wanted.shape
        return emit("reshape", wanted.tensor(name, channels, 1, width), shape=wanted.shape)[0]
    if wanted.part in _HEADS:
        return f"backbone.layers.{wanted.layer}.{_HEADS[wanted.part]}"
    return common.named(wanted, "backbone.layers.{}", _PARTS, _WHOLE)


# The files of the first release call the table in the singular.
FAMILY = Family(
    "mamba2", ("Mamba2ForCausalLM",), read, source, renamed=((r"^backbone\.embedding\.", "backbone.embeddings."),)
)
