"""The network: configuration, attention, transformer, and the names in released files (paper §2.1; spec §1)."""
