"""Make the checkout ready to be built for PyPI: absolute links in README.md, addresses in pyproject.toml.

Usage: for_pypi.py https://github.com/OWNER/NAME TAG        (.github/workflows/release.yml; changes both files)

PyPI shows the README away from the repository, where a relative link leads nowhere. The address is known only where
the repository lives, so it is written when a release is built, not kept here. TAG must be v and pyproject's version.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# of a link or a picture: text, then an address that is no anchor and has no scheme
RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?!#|[a-z]+:)([^)]+)\)")


def absolute(readme: str, repository: str, tag: str) -> str:
    """Return a README whose relative links lead to the files of a tag, and pictures to their bytes."""

    def place(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}{match[2]}({repository}/{kind}/{tag}/{match[3]})"

    return RELATIVE.sub(place, readme)


def with_addresses(pyproject: str, repository: str) -> str:
    """Return a pyproject.toml with [project.urls]."""
    urls = {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/main/docs/index.md",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    table = "[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return pyproject.replace("[project.scripts]\n", table + "\n[project.scripts]\n", 1)


def main() -> None:
    """Change both files."""
    if len(sys.argv) != 3 or not re.fullmatch(r"https://[^/\s]+/[^/\s]+/[^/\s]+", sys.argv[1]):
        sys.exit(__doc__)
    repository, tag = sys.argv[1:]
    pyproject, readme = ROOT / "pyproject.toml", ROOT / "README.md"
    text = pyproject.read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    if tag != f"v{project['version']}":
        sys.exit(f"tag {tag}: pyproject.toml has version {project['version']}; tag v{project['version']}")
    if "urls" in project:
        sys.exit("pyproject.toml has [project.urls] already; run this on a fresh checkout")
    pyproject.write_text(with_addresses(text, repository), encoding="utf-8")
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), repository, tag), encoding="utf-8")
    print(f"README.md and pyproject.toml lead to {repository}, {tag}")


if __name__ == "__main__":
    main()
