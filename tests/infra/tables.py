"""Tables of the pages that code makes, each between `<!-- its name -->` and `<!-- end -->`."""

import re
from collections.abc import Callable


def with_table(page: str, name: str, make: Callable[[], str]) -> str:
    """The page with this table made anew; as it is where it has no place for it."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{make()}\n{match[2]}", page)
