"""How this process gets along with its system: arguments, signals, the log, files."""
