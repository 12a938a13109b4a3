"""The layer above dparallel_ext: the command line, a server, training, evaluation, and models that ship."""
