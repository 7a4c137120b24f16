"""What happened, on its way from the device to the host and to files."""
