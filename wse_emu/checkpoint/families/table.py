"""Every family by its ``model_type``, and which one a config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wse_emu.checkpoint.families.dbrx import DBRX
from wse_emu.checkpoint.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from wse_emu.checkpoint.families.dots import DOTS1
from wse_emu.checkpoint.families.dsa import DEEPSEEK_V32, GLM_MOE_DSA
from wse_emu.checkpoint.families.ernie import ERNIE4_5_MOE
from wse_emu.checkpoint.families.gemma import GEMMA2, GEMMA3_TEXT
from wse_emu.checkpoint.families.glm import GLM4_MOE
from wse_emu.checkpoint.families.gpt_oss import GPT_OSS
from wse_emu.checkpoint.families.granite import GRANITEMOE
from wse_emu.checkpoint.families.hunyuan import HUNYUAN_V1_MOE
from wse_emu.checkpoint.families.llama import LLAMA, MISTRAL, MIXTRAL
from wse_emu.checkpoint.families.llama4 import LLAMA4_TEXT
from wse_emu.checkpoint.families.minimax import MINIMAX_M2
from wse_emu.checkpoint.families.olmoe import OLMOE
from wse_emu.checkpoint.families.phimoe import PHIMOE
from wse_emu.checkpoint.families.qwen import QWEN2_MOE, QWEN3, QWEN3_MOE
from wse_emu.checkpoint.family import Family
from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError

_ALL = (
    LLAMA, MISTRAL, MIXTRAL, QWEN3, QWEN3_MOE, QWEN2_MOE, OLMOE, GRANITEMOE, GEMMA2, GEMMA3_TEXT, DOTS1, GLM4_MOE, HUNYUAN_V1_MOE,
    ERNIE4_5_MOE, MINIMAX_M2, GPT_OSS, PHIMOE, DEEPSEEK_V2, DEEPSEEK_V3, DBRX, LLAMA4_TEXT,
    DEEPSEEK_V32, GLM_MOE_DSA,
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _ALL})
"""``model_type`` to family."""

ARCHITECTURES: Mapping[str, str] = MappingProxyType({family.architecture: family.model_type for family in FAMILIES.values()})
"""Architecture (``architectures`` of config.json) to family (``model_type``)."""


_OTHER_HEADS = (
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "RewardModel", "RewardModeling",
    "Embedding", "TextEncoding",
)  # fmt: skip
"""What an architecture's name ends with whose head does not predict the next token."""


def family_of(fields: Fields) -> Family:
    """Family that a config.json names, by ``model_type``, as transformers does, or else by ``architectures``.

    A released file may call its architecture as its own code did (``PhiMoEForCausalLM``).

    Raises
    ------
    ConfigError
        If it names none that is known, or two, or one with another kind of head; the message lists the known ones.
    """
    known = ", ".join(f"{a} ({f})" for a, f in ARCHITECTURES.items())
    model_type = fields.get("model_type", None)
    architectures = fields.get("architectures", None)
    if architectures is None:
        if model_type is None:
            raise ConfigError(f"{fields.where}: neither `architectures` nor `model_type` is there; known architectures are {known}")
        architectures = []
    elif not isinstance(architectures, list) or not architectures or not all(isinstance(a, str) for a in architectures):
        raise fields.fail("architectures", "must be a list of names")
    for name in architectures:
        if name.endswith(_OTHER_HEADS):
            raise ConfigError(f"{fields.where}: architecture {show(name)} has another head than a language model's; known are {known}")
    families = {ARCHITECTURES[a] for a in architectures if a in ARCHITECTURES}
    if len(families) > 1:
        raise fields.fail("architectures", "must name one family")
    if isinstance(model_type, str) and model_type in FAMILIES:
        if families - {model_type}:
            raise fields.fail("model_type", f"must be {families.pop()!r} for architecture {architectures[0]}")
        return FAMILIES[model_type]
    if model_type is None and families:
        return FAMILIES[families.pop()]
    if families:
        raise fields.fail("model_type", f"must be {families.pop()!r} for architecture {architectures[0]}")
    if architectures:
        raise ConfigError(f"{fields.where}: unknown architecture {show(architectures[0])}; known are {known}")
    raise ConfigError(f"{fields.where}: unknown `model_type` {show(model_type)}; known architectures are {known}")
