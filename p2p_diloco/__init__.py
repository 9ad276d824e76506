"""p2p-diloco: volunteers on the internet train one language model together. Start reading in ``train.py``."""

__version__ = "0.1.0"
