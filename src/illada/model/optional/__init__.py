"""Ways to run the network that nothing else needs."""
