"""The production machines under a virtual clock, network, disk and file server."""
