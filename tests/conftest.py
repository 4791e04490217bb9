"""One thread for torch in every test process and its children: `make test` runs one on each of two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, which no plugin does
