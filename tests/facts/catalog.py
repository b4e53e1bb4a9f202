"""Every published model of the families beside Llama's: its count, and what its files hold besides weights.

`tensors.py` has Llama, Mistral, Qwen 2 and 3 and Gemma 1, by layout; SOURCES.md says where each fact is from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tests.facts import dense, mixtures, seq2seq
from tests.facts.shapes import Config, Tensors, Weights

FAMILIES: dict[str, Weights] = {
    "BaiChuanForCausalLM": dense.baichuan,
    "BaichuanForCausalLM": dense.baichuan,
    "BartForConditionalGeneration": seq2seq.bart,
    "BartModel": seq2seq.bart,
    "BloomForCausalLM": dense.bloom,
    "ChatGLMModel": lambda c: dense.chatglm(c) if "position_encoding_2d" in c else dense.chatglm2(c),
    "Cohere2ForCausalLM": dense.cohere,
    "CohereForCausalLM": dense.cohere,
    "DbrxForCausalLM": mixtures.dbrx,
    "DeepseekV2ForCausalLM": mixtures.deepseek,
    "DeepseekV3ForCausalLM": mixtures.deepseek,
    "FalconForCausalLM": dense.falcon,
    "GPT2LMHeadModel": dense.gpt2,
    "GPTJForCausalLM": dense.gptj,
    "GPTNeoXForCausalLM": dense.gpt_neox,
    "Gemma2ForCausalLM": dense.gemma2,
    "Gemma3ForCausalLM": dense.gemma3,
    "Glm4ForCausalLM": dense.glm4,
    "GlmForCausalLM": dense.glm,
    "GptOssForCausalLM": mixtures.gpt_oss,
    "GraniteForCausalLM": dense.granite,
    "Grok1ModelForCausalLM": mixtures.grok1,
    "MPTForCausalLM": dense.mpt,
    "Mamba2ForCausalLM": mixtures.mamba2,
    "MixtralForCausalLM": mixtures.mixtral,
    "OPTForCausalLM": dense.opt,
    "Olmo2ForCausalLM": dense.olmo2,
    "Phi3ForCausalLM": dense.phi3,
    "PhiForCausalLM": dense.phi,
    "QWenLMHeadModel": dense.qwen,
    "Qwen2MoeForCausalLM": mixtures.qwen2_moe,
    "Qwen3MoeForCausalLM": mixtures.qwen3_moe,
    "Qwen3NextForCausalLM": mixtures.qwen3_next,
    "RWForCausalLM": dense.falcon,
    "Starcoder2ForCausalLM": dense.starcoder2,
    "T5ForConditionalGeneration": seq2seq.t5,
}


def weights(config: Config) -> Tensors:
    """(name, shape) of every weight, as the published files call it. Raises KeyError for an unknown architecture."""
    return FAMILIES[config["architectures"][0]](config)


# What files hold besides


def _copy(name: str, of: str) -> Weights:
    """The table once more, under another name."""
    return lambda c: iter([(name, next(shape for n, shape in weights(c) if n == of))])


def _each(layers: str, names: Callable[[Config], dict[str, tuple[int, ...]]], count: str) -> Weights:
    return lambda c: ((f"{layers}.{i}.{name}", shape) for i in range(c[count]) for name, shape in names(c).items())


def _all(*parts: Weights) -> Weights:
    return lambda c: (tensor for part in parts for tensor in part(c))


def _causal(c: Config, name: str, masked: bool = True) -> dict[str, tuple[int, ...]]:
    """A mask of the longest context, and the number that stood for minus infinity."""
    length = c.get("n_positions") or c["max_position_embeddings"]
    return {f"{name}.bias": (1, 1, length, length), **({f"{name}.masked_bias": ()} if masked else {})}


def _neox_buffers(c: Config) -> dict[str, tuple[int, ...]]:
    rotary = int(c["hidden_size"] // c["num_attention_heads"] * c["rotary_pct"])
    return _causal(c, "attention") | {"attention.rotary_emb.inv_freq": (rotary // 2,)}


_GPT2 = _each("h", lambda c: _causal(c, "attn", masked=False), "n_layer")
_GPTJ = _each("transformer.h", lambda c: _causal(c, "attn"), "n_layer")
_NEOX = _each("gpt_neox.layers", _neox_buffers, "num_hidden_layers")
_FALCON = _copy("lm_head.weight", "transformer.word_embeddings.weight")
_BAICHUAN = _each("model.layers", lambda _: {"self_attn.rotary_emb.inv_freq": (64,)}, "num_hidden_layers")
_CHATGLM = _all(
    _each("transformer.layers", lambda _: {"attention.rotary_emb.inv_freq": (32,)}, "num_layers"),
    _copy("lm_head.weight", "transformer.word_embeddings.weight"),
)
_CHATGLM2: Weights = lambda _: iter([("transformer.rotary_pos_emb.inv_freq", (32,))])  # noqa: E731
_GROK = _copy("lm_head.weight", "model.embed_tokens.weight")
_T5_TABLES = _all(*(_copy(f"{side}.embed_tokens.weight", "shared.weight") for side in ("encoder", "decoder")))
_CNN: Weights = lambda c: iter([("final_logits_bias", (1, c["vocab_size"]))])  # noqa: E731
_V3 = _all(
    mixtures.deepseek_mtp,
    lambda c: mixtures.deepseek_scales(c, mixtures.deepseek),
    lambda c: mixtures.deepseek_scales(c, mixtures.deepseek_mtp),
)


@dataclass(frozen=True)
class Fact:
    """parameters: as published, tied tables once, experts all, no buffers, no layers for speculation. card: what the
    publisher says where it gives no exact count, and the number is ours. stored: numbers in the files, as the hub
    counts them. extra: tensors of the files that are no weights, or not the model's."""

    hub: str
    parameters: int
    card: str = ""
    stored: int = 0
    extra: Weights = lambda _: iter(())


CATALOG: dict[str, Fact] = {
    "gpt2": Fact("openai-community/gpt2", 124_439_808, stored=137_022_720, extra=_GPT2),
    "gpt2-medium": Fact("openai-community/gpt2-medium", 354_823_168, stored=379_988_992, extra=_GPT2),
    "gpt2-xl": Fact("openai-community/gpt2-xl", 1_557_611_200, extra=_GPT2),
    # The card's 6,053,381,344 is 0.04 % more than its own shapes hold.
    "gpt-j-6b": Fact("EleutherAI/gpt-j-6b", 6_050_882_784, card="6.053381344B", extra=_GPTJ),
    "gpt-neox-20b": Fact("EleutherAI/gpt-neox-20b", 20_554_567_680, extra=_NEOX),
    "pythia-160m": Fact("EleutherAI/pythia-160m", 162_322_944, extra=_NEOX),
    "pythia-12b": Fact("EleutherAI/pythia-12b", 11_846_072_320, extra=_NEOX),
    "falcon-7b": Fact("tiiuae/falcon-7b", 6_921_720_704, stored=7_217_189_760, extra=_FALCON),
    "falcon-7b.RefinedWebModel": Fact("tiiuae/falcon-7b, first revision", 6_921_720_704, extra=_FALCON),
    "falcon-40b": Fact("tiiuae/falcon-40b", 41_303_293_952, card="named 40B", extra=_FALCON),
    "falcon-180B": Fact("tiiuae/falcon-180B", 178_557_088_768, stored=179_522_565_120, extra=_FALCON),
    "falcon-rw-1b": Fact("tiiuae/falcon-rw-1b", 1_311_625_216, extra=_FALCON),
    "mpt-7b": Fact("mosaicml/mpt-7b", 6_649_286_656),
    "mpt-7b-storywriter": Fact("mosaicml/mpt-7b-storywriter", 6_649_286_656),
    "mpt-30b": Fact("mosaicml/mpt-30b", 29_957_200_896, card="30B"),
    "bloom-560m": Fact("bigscience/bloom-560m", 559_214_592),
    "bloom-7b1": Fact("bigscience/bloom-7b1", 7_069_016_064),
    "bloom": Fact("bigscience/bloom", 176_247_271_424),
    "phi-1": Fact("microsoft/phi-1", 1_418_270_720),
    "phi-1_5": Fact("microsoft/phi-1_5", 1_418_270_720),
    "phi-2": Fact("microsoft/phi-2", 2_779_683_840),
    "Phi-3-mini-4k-instruct": Fact("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
    "Phi-3.5-mini-instruct": Fact("microsoft/Phi-3.5-mini-instruct", 3_821_079_552),
    "Phi-3-medium-4k-instruct": Fact("microsoft/Phi-3-medium-4k-instruct", 13_960_238_080),
    "phi-4": Fact("microsoft/phi-4", 14_659_507_200),
    "Phi-4-mini-instruct": Fact("microsoft/Phi-4-mini-instruct", 3_836_021_760),
    "Mixtral-8x7B-v0.1": Fact("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "Mixtral-8x22B-v0.1": Fact("mistralai/Mixtral-8x22B-v0.1", 140_620_634_112),
    "dbrx-base": Fact("databricks/dbrx-base", 131_596_523_520),
    # 314B is what the layers hold, cut; see test_facts.py.
    "grok-1": Fact("hpcai-tech/grok-1", 315_684_820_992, card="named 314B", extra=_GROK),
    "Qwen1.5-MoE-A2.7B-Chat": Fact("Qwen/Qwen1.5-MoE-A2.7B-Chat", 14_315_784_192),
    "Qwen2-57B-A14B": Fact("Qwen/Qwen2-57B-A14B", 57_408_658_944, card="57B"),
    "Qwen3-30B-A3B": Fact("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    "Qwen3-235B-A22B": Fact("Qwen/Qwen3-235B-A22B", 235_093_634_560),
    "gemma-2-2b-it": Fact("google/gemma-2-2b-it", 2_614_341_888),
    "gemma-2-9b": Fact("google/gemma-2-9b", 9_241_705_984),
    "gemma-2-27b-it": Fact("google/gemma-2-27b-it", 27_227_128_320),
    "gemma-3-270m": Fact("google/gemma-3-270m", 268_098_176),
    "gemma-3-1b-it": Fact("google/gemma-3-1b-it", 999_885_952),
    "gemma-3-27b-it.text": Fact("google/gemma-3-27b-it, its text part", 27_009_346_304, card="27.016B"),
    "Qwen-1_8B": Fact("Qwen/Qwen-1_8B", 1_836_828_672),
    "Qwen-7B": Fact("Qwen/Qwen-7B", 7_721_324_544),
    "Qwen-72B": Fact("Qwen/Qwen-72B", 72_287_920_128),
    "Baichuan-7B": Fact("baichuan-inc/Baichuan-7B", 7_000_559_616, extra=_BAICHUAN),
    "Baichuan-13B-Base": Fact("baichuan-inc/Baichuan-13B-Base", 13_264_901_120),
    "Baichuan2-7B-Chat": Fact("baichuan-inc/Baichuan2-7B-Chat", 7_505_973_248),
    "Baichuan2-13B-Chat": Fact("baichuan-inc/Baichuan2-13B-Chat", 13_896_668_160),
    "chatglm-6b": Fact("THUDM/chatglm-6b", 6_173_286_400, card="6.2B", extra=_CHATGLM),
    "chatglm2-6b": Fact("THUDM/chatglm2-6b", 6_243_584_000, extra=_CHATGLM2),
    "chatglm3-6b": Fact("THUDM/chatglm3-6b", 6_243_584_000, extra=_CHATGLM2),
    "glm-4-9b-chat": Fact("THUDM/glm-4-9b-chat", 9_399_951_360, stored=9_399_951_392, extra=_CHATGLM2),
    "glm-4-9b-chat-hf": Fact("THUDM/glm-4-9b-chat-hf", 9_399_951_360),
    "GLM-4-9B-0414": Fact("THUDM/GLM-4-9B-0414", 9_400_279_040),
    "GLM-4-32B-0414": Fact("THUDM/GLM-4-32B-0414", 32_566_081_536, card="32.6B"),
    "t5-small": Fact("google-t5/t5-small", 60_506_624, stored=60_506_880, extra=seq2seq.t5_unused_distances),
    "t5-base": Fact("google-t5/t5-base", 222_903_552, stored=222_903_936, extra=seq2seq.t5_unused_distances),
    "t5-11b": Fact("google-t5/t5-11b", 11_307_321_344, extra=seq2seq.t5_unused_distances),
    "t5-v1_1-base": Fact("google/t5-v1_1-base", 247_577_856, extra=_T5_TABLES),
    "flan-t5-xl": Fact("google/flan-t5-xl", 2_849_757_184, stored=2_981_353_472, extra=_T5_TABLES),
    "bart-base": Fact("facebook/bart-base", 139_420_416),
    "bart-large": Fact("facebook/bart-large", 406_291_456),
    "bart-large-cnn": Fact("facebook/bart-large-cnn", 406_290_432, stored=406_340_696, extra=_CNN),
    "OLMo-2-0425-1B": Fact("allenai/OLMo-2-0425-1B", 1_484_916_736),
    "OLMo-2-1124-7B": Fact("allenai/OLMo-2-1124-7B", 7_298_617_344),
    "OLMo-2-1124-13B": Fact("allenai/OLMo-2-1124-13B", 13_716_198_400, card="13.7B"),
    "OLMo-2-0325-32B": Fact("allenai/OLMo-2-0325-32B", 32_234_279_936, card="32.2B"),
    "granite-3.1-2b-instruct": Fact("ibm-granite/granite-3.1-2b-instruct", 2_533_531_648),
    "granite-3.3-8b-instruct": Fact("ibm-granite/granite-3.3-8b-instruct", 8_170_864_640),
    "aya-23-8B": Fact("CohereForAI/aya-23-8B", 8_028_033_024),
    "c4ai-command-r-v01": Fact("CohereForAI/c4ai-command-r-v01", 34_980_831_232),
    "c4ai-command-r-plus": Fact("CohereForAI/c4ai-command-r-plus", 103_810_674_688),
    "c4ai-command-r7b-12-2024": Fact("CohereForAI/c4ai-command-r7b-12-2024", 8_028_033_024),
    "starcoder2-3b": Fact("bigcode/starcoder2-3b", 3_030_371_328),
    "starcoder2-7b": Fact("bigcode/starcoder2-7b", 7_173_923_840),
    "starcoder2-15b": Fact("bigcode/starcoder2-15b", 15_957_889_024),
    "opt-125m": Fact("facebook/opt-125m", 125_239_296),
    "opt-350m": Fact("facebook/opt-350m", 331_196_416),
    "opt-6.7b": Fact("facebook/opt-6.7b", 6_658_473_984),
    "opt-66b": Fact("facebook/opt-66b", 65_719_701_504, card="66B"),
    "gpt-oss-20b": Fact("openai/gpt-oss-20b", 20_914_757_184, extra=mixtures.gpt_oss_blocks),
    "gpt-oss-120b": Fact("openai/gpt-oss-120b", 116_829_156_672, extra=mixtures.gpt_oss_blocks),
    "DeepSeek-V2-Lite": Fact("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224),
    "DeepSeek-V2": Fact("deepseek-ai/DeepSeek-V2", 235_741_434_880),
    "DeepSeek-V3": Fact("deepseek-ai/DeepSeek-V3", 671_026_419_200, stored=684_531_386_000, extra=_V3),
    "mamba2-2.7b-hf": Fact("AntonV/mamba2-2.7b-hf", 2_702_599_680, card="2.7B"),
    "Mamba-Codestral-7B-v0.1": Fact("mistralai/Mamba-Codestral-7B-v0.1", 7_285_403_648),
    "Qwen3-Next-80B-A3B-Instruct": Fact(
        "Qwen/Qwen3-Next-80B-A3B-Instruct", 79_674_391_296, stored=81_324_862_720, extra=mixtures.qwen3_next_mtp
    ),
}


def counted(config: Config) -> int:
    """Parameters computed from the shapes; the experts of gpt-oss as the numbers that their blocks stand for."""
    experts = mixtures.gpt_oss_experts(config) if config["model_type"] == "gpt_oss" else ()
    return sum(prod(shape) for tensors in (weights(config), experts) for _, shape in tensors)
