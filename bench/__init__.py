"""Benchmarks, and the tools that read compiled kernels.

Messages of other libraries at import are silenced: bitsandbytes misses kernels that nothing here
runs, and transformers announces its next version.
"""

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
