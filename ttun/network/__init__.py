"""The network of this machine: requests to the kernel and to name servers."""
