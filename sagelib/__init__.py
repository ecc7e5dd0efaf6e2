"""SAGE for Visual Place Recognition: learn it, run it, improve it.

One noun a file, read top-down:

    runs  places  images  backbone  softp  interact  aggregators
    model  weights  graph  sampler  describe  retrieval  train  evaluate

Nothing is imported here and nothing happens at import: ``from sagelib.model import SAGE``.
"""

__version__ = "0.1.0"
