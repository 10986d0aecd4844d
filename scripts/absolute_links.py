"""Print README.md with absolute links, as the page of a package index needs it: absolute_links.py ADDRESS TAG.

ADDRESS is that of the repository, https://HOST/OWNER/NAME. Pictures get the address of their raw files, other files that of their page.
"""

import re
import sys
from pathlib import Path


def absolute(text: str, address: str, tag: str) -> str:
    """`text` with every relative link of Markdown replaced; what is in a block of code stays."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    link = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|mailto:|#)([^)\s]+)\)")

    def replace(match: re.Match[str]) -> str:
        picture, name, target = match.groups()
        return f"{picture}{name}({address.rstrip('/')}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return "".join(part if part.startswith("```") else link.sub(replace, part) for part in parts)


if __name__ == "__main__":
    sys.stdout.write(absolute((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), *sys.argv[1:]))
