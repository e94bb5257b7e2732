"""A training step by dllm's own trainer, for `benchmarks/trainer.py --dllm PATH`; runs on the versions that dllm pins.

Theirs: `MDLMTrainer.training_step` (loss, autocast and backward as under `trainer.train()`), the collator of their
examples, their LLaDA network in our shape. Ours: documents, AdamW, and that packages which the trainer does not need
(evaluation, other models, RL) are not imported.
"""

import sys
from types import ModuleType

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel


def network(path, shape):
    """Return their LLaDA network in a shape of ours, with random weights, once their packages can be imported.

    Args:
        path: checkout of dllm.
        shape: as our configuration names it.
    """
    for name in ("dllm", "dllm.core", "dllm.pipelines", "dllm.pipelines.rl", "dllm.pipelines.rl.grpo"):
        package = ModuleType(name)  # whose own __init__ would import everything
        package.__path__ = [f"{path}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
    from dllm.pipelines.llada.models.modeling_llada import (
        LLaDAModel,
        LLaDAModelLM,
        create_model_config_from_pretrained_config,
    )

    config = LLaDAConfig(
        d_model=shape["hidden_size"],
        n_heads=shape["num_attention_heads"],
        n_kv_heads=shape["num_key_value_heads"],
        n_layers=shape["num_hidden_layers"],
        mlp_hidden_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        embedding_size=shape["vocab_size"],
        max_sequence_length=shape["max_position_embeddings"],
        rope_theta=shape["rope_theta"],
        mask_token_id=shape["mask_token_id"],
        eos_token_id=shape["eos_token_id"],
        pad_token_id=shape["pad_token_id"],
        # As in LLaDA's config.json.
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        rope=True,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        include_bias=False,
        weight_tying=True,
        init_device="cpu",
    )
    return LLaDAModelLM(config, model=LLaDAModel(create_model_config_from_pretrained_config(config), init_params=True))


def step_of(path, windows, shape, dtype, rows):
    """Return a function that makes one optimiser step over given documents.

    Args:
        path: checkout of dllm.
        windows: cut documents into windows of so many tokens, as their pre-training does; None for a document a row.
        shape: of the network, named as in our configuration.
        dtype: "bf16" or "fp32".
        rows: in one pass.
    """
    model = network(path, shape)
    from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
    from dllm.utils.collators import RandomTruncateWrapper

    special = {"pad_token": "pad_token_id", "eos_token": "eos_token_id", "mask_token": "mask_token_id"}
    words = Tokenizer(WordLevel({f"<{key}>": shape[place] for key, place in special.items()}, "<pad_token>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **{key: f"<{key}>" for key in special})
    half = dtype == "bf16"
    arguments = MDLMConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=half, eval_strategy="no")
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, return_tensors="pt", padding=True)
    trainer = MDLMTrainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        data_collator=RandomTruncateWrapper(collator, random_length_ratio=0.0),
    )
    model = trainer.accelerator.prepare(trainer.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(documents):
        texts = torch.cat(documents).split(windows) if windows else documents
        trainer.current_gradient_accumulation_steps = -(-len(texts) // rows)  # as their loop sets it
        for first in range(0, len(texts), rows):
            chosen = [ids.tolist() for ids in texts[first : first + rows]]
            batch = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in chosen])
            trainer.training_step(model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters())
