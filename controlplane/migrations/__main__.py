"""`python -m controlplane.migrations URL`: for `migrate_apart`."""

import sys

from controlplane.errors import NgpuError
from controlplane.migrations import migrate

try:
    migrate(sys.argv[1])
except (NgpuError, ValueError) as error:
    sys.exit(str(error))
