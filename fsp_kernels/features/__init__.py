"""Feature maps of networks.

taps.py      record them by module path while a network runs
paths.py     paths to tensors, such as ``layer3:output[0]``
stages.py    the outputs of all modules for an example; stages of equal spatial size
pairs.py     pairs of maps: finding them, checking that networks fit, projecting channels
"""
