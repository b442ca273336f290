"""``ttun demo`` and ``ttun bench``: two hosts on this machine, and the traffic between them."""
