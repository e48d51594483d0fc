"""Benchmarks, and the tools that read compiled kernels.

What the libraries below say at import is no part of any result: bitsandbytes misses kernels that
nothing here runs, and transformers announces its next version.
"""

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
