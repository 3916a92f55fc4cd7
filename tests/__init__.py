"""The suite; what is here happens before any test module, and before torch, is imported."""

import os
import sys

from jaxtyping import install_import_hook

from tests.fixtures import shapes

# One thread unless asked otherwise (models this small are slower on two), no hub, no screen.
for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}.items():
    os.environ.setdefault(name, value)

# From here on the package's functions check the shapes that stand in their signatures; not where speed is measured.
if "pytest" in sys.modules:
    install_import_hook("emprobe", f"{shapes.__name__}.checked")
