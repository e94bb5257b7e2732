"""The network: configuration, attention, transformer, and the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from illada.model.attention import Packing
from illada.model.config import PRESETS, IlladaConfig
from illada.model.transformer import IlladaForMaskedLM, IlladaModel

AutoConfig.register("illada", IlladaConfig, exist_ok=True)
AutoModel.register(IlladaConfig, IlladaModel, exist_ok=True)
AutoModelForMaskedLM.register(IlladaConfig, IlladaForMaskedLM, exist_ok=True)

__all__ = ["PRESETS", "IlladaConfig", "IlladaForMaskedLM", "IlladaModel", "Packing"]
