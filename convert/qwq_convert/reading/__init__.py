"""Files of checkpoints and GGUFs in, headers and tensor bytes out; nothing is trusted."""
