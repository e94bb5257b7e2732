"""What follows SFT: preferences (dpo), on the trainer and the estimates of the other rooms."""
