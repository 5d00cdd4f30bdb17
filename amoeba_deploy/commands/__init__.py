"""The commands of ``amoeba``: each parses its options, calls what computes, and prints.

Results go to standard output, remarks and progress to standard error. What a command computes with is imported when it
runs, so that help and the device catalogue answer at once.
"""
