"""What reading data can do without: places other than a folder of this machine."""
