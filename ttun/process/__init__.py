"""The process and its system: arguments, signals, the log, files."""
