"""The layer above dparallel_ext: tasks, training, evaluation and the command line."""
