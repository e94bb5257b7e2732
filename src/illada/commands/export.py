"""`illada export`: a folder that transformers loads after `import illada`."""

import shutil
from pathlib import Path

import illada
from illada.errors import IlladaError
from illada.loading import Dtype, load_model, model_folder


def export_model(model: str, output: str, dtype: Dtype) -> None:
    """Write weights, configuration, tokenizer and a model card into the new folder `output`.

    Raises:
        IlladaError: when there is no model, or `output` exists.
    """
    target = Path(output)
    if target.exists():
        raise IlladaError(f"{output} exists: choose another --output or delete it")
    network, tokenizer = load_model(model, dtype)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(_card(model_folder(model), network.num_parameters(), dtype))
    partial.rename(target)


def _card(folder: Path, parameters: int, dtype: str) -> str:
    """Return a model card made of what the run folder knows; nothing is invented where it knows nothing."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [illada, masked-diffusion, diffusion-language-model]",
        "---",
        "",
        "# Masked diffusion language model",
        "",
        f"An iLLaDA-style model (arXiv 2606.25331) of {parameters:,} parameters in {dtype}, written by illada "
        f"{illada.__version__}. Attention is bidirectional; logits at position i predict token i.",
        "",
    ]
    run = next((p for p in (folder.parent, folder.parent.parent) if (p / "recipe.yaml").is_file()), None)
    if run is not None:
        from illada.training.report import read_metrics

        records = read_metrics(run / "metrics.jsonl")
        if records:
            lines += ["## Training", "", f"{records[-1]['step']:,} steps on {records[-1]['tokens']:,} tokens."]
            tested = [record for record in records if "validation_bits_per_byte" in record]
            if tested:
                lines[-1] += f" Validation: {tested[-1]['validation_bits_per_byte']:.4f} bits per byte (upper bound)."
        lines += ["", "Recipe:", "", "```yaml", (run / "recipe.yaml").read_text().strip(), "```", ""]
    lines += [
        "## Use",
        "",
        "```python",
        "import illada",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        'model = AutoModelForMaskedLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
