"""What `make demo` runs: `every_kind_of_child.py`, under trio, asyncio and uvloop in turn."""

from __future__ import annotations

import anyio
from every_kind_of_child import BACKENDS, main

for name, (backend, options) in BACKENDS.items():
    print(f"\n--- {name}", end="")
    anyio.run(main, backend=backend, backend_options=options)
