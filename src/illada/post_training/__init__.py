"""What follows SFT: preferences (dpo) and rewards (rl), on the trainer and the estimates of the other rooms."""
