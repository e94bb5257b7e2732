"""The network: configuration, attention, transformer, and the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from illada.model.attention import Packing
from illada.model.config import PRESETS, IlladaConfig, LladaConfig
from illada.model.kv_cache import KVCache, PagePool
from illada.model.transformer import IlladaForMaskedLM, IlladaModel

AutoConfig.register("illada", IlladaConfig, exist_ok=True)
AutoConfig.register("llada", LladaConfig, exist_ok=True)
# Every class gives the model with its head, as the auto_map of the released folders does: scripts written for these
# folders expect logits from AutoModel. The trunk alone is IlladaModel.
for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto.register(IlladaConfig, IlladaForMaskedLM, exist_ok=True)

__all__ = ["PRESETS", "IlladaConfig", "IlladaForMaskedLM", "IlladaModel", "KVCache", "Packing", "PagePool"]
