"""AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

from collections.abc import Mapping

import torch
from torch import Tensor

from illada.model.transformer import IlladaForMaskedLM
from illada.training.parallel import by_mesh
from illada.training.recipe import TrainingRecipe


def make_optimizers(model: IlladaForMaskedLM, training: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a recipe, their moments at zero; learning rates are set at every step.

    Weight decay applies to matrices, not to norm gains. Muon (Jordan et al. 2024) takes steps of AdamW's size
    (arXiv 2502.16982), so one learning rate serves both.
    """
    by_muon = muon_matrices(model, training)
    known = set(by_muon)
    by_adamw = [p for p in model.parameters() if p.requires_grad and p not in known]
    matrices = [p for p in by_adamw if p.ndim >= 2]
    gains = [p for p in by_adamw if p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for parameters, decay in ((matrices, training.weight_decay), (gains, 0.0))
        for group in by_mesh(parameters)
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(training.beta1, training.beta2), fused=True)
    for parameter in (*matrices, *gains):
        adamw.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if not by_muon:
        return [adamw]
    muon = torch.optim.Muon(by_muon, lr=0.0, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw")
    for parameter in by_muon:
        muon.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return [adamw, muon]


def muon_matrices(model: IlladaForMaskedLM, training: TrainingRecipe) -> list[Tensor]:
    """Return what Muon trains, with one moment where AdamW has two: the matrices of the blocks, or nothing."""
    return [p for p in model.model.layers.parameters() if training.optimizer == "muon" and p.ndim == 2]


def update(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Change the weights by their gradients at a learning rate, then drop the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def moments(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the optimisers' own tensors, not copies, as "weight/moment", without the count of updates."""
    return {
        f"{names[parameter]}/{slot}": value.detach()
        for optimizer in optimizers
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if slot != "step"
    }


def set_updates(optimizers: list[torch.optim.Optimizer], updates: int) -> None:
    """Set the count of updates."""
    for optimizer in optimizers:
        for slots in optimizer.state.values():
            if "step" in slots:
                slots["step"].fill_(updates)
