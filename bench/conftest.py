"""Read before torch is imported: threads that spin while they wait make a busy machine's benchmarks useless."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
