"""What a rank of the tests imports, imported once: `tests.ranks` forks its ranks off a server that has.

Nothing here may start a thread or touch a process group.
"""

import moe_ext.train  # noqa: F401
import tests.model.tiny  # noqa: F401
import tests.training.tiny  # noqa: F401
