"""The demo: the whole road on one machine, from this Python's standard library to a talking model and its report."""
