"""One thread a test process: small tensors gain nothing from more, and spinning threads starve each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
