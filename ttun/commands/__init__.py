"""What only a command line needs: grammar, keys, hooks, the status socket, ``show``, ``doctor``."""
