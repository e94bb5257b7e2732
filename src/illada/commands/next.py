"""What to type next: printed by the commands that make something."""


def next_commands(*commands: str) -> None:
    """Print the commands that go on from what was just made; a word in capitals is for the reader to fill in."""
    print("next:", "\n      ".join(line for command in commands for line in command.splitlines()))
