"""Watch the device and the local addresses, which others may change during a session."""
