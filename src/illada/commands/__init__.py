"""What the commands do with text, files and the terminal; the work itself is done by the other rooms."""
