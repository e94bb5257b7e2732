"""What scoring can do without: contexts and candidates as texts."""
