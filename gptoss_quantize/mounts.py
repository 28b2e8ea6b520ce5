"""Which directories no rename can replace: mount points, and those in a parent that may not be written."""

import os
import re
import stat
from pathlib import Path


def _mount_points() -> set[str]:
    """Return where file systems are mounted; a bind mount of the same one has no other sign."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    # blanks and backslashes are written as octal numbers
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}


def is_mount(dest: Path) -> bool:
    """Return whether a directory lies on another file system than its parent, where no rename can reach it."""
    return dest.is_dir() and not dest.is_symlink() and (
        os.path.ismount(dest)
        or dest.stat().st_dev != dest.parent.stat().st_dev
        or os.path.realpath(dest) in _mount_points()
    )  # fmt: skip


def out_of_reach(dest: Path) -> bool:
    """Return whether a directory cannot be replaced by a rename, so that files must move into it."""
    if not dest.is_dir() or dest.is_symlink():
        return False
    if is_mount(dest) or not os.access(dest.parent, os.W_OK | os.X_OK):
        return True
    # as in /tmp: only its owner may rename what is there
    if os.name == "nt":
        return False
    parent, user = dest.parent.stat(), os.geteuid()
    return bool(parent.st_mode & stat.S_ISVTX) and user not in (0, parent.st_uid, dest.stat().st_uid)
