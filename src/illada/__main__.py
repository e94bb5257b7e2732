"""`python -m illada`, and so `torchrun --nproc_per_node 2 -m illada pretrain recipe.yaml`."""

from illada.cli import main

main()
